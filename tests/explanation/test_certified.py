"""What is called certain about an attribution: against autograd at samples and corners, and against captum's metric."""

import math

import pytest
import torch
from captum.metrics import sensitivity_max
from torch import Tensor, nn

import soundly
from soundly import Ball, Box, Empty, Proved
from soundly.errors import InvalidInput
from soundly.explanation import certified as module
from soundly.explanation.adapters import LayerGradCam
from soundly.explanation.certified import certify_change, certify_map, certify_top_k

F64 = torch.float64


class Pooled(nn.Module):
    """Convolutions, global average pooling and a dense layer: a network with a CAM."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 2))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def pooled() -> tuple[Pooled, Tensor, soundly.Network]:
    torch.manual_seed(0)
    model, x = Pooled().double(), torch.rand(1, 1, 6, 6, dtype=F64)
    return model, x, soundly.load(model, x)


def maps() -> dict[str, tuple[soundly.Network, Tensor]]:
    _, x, network = pooled()
    smooth = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    z = torch.rand(1, 4, dtype=F64)
    other = soundly.load(smooth, z)
    return {
        "cam": (soundly.cam(network, of=1, layer="features"), x),
        "gradcam": (soundly.gradcam(network, of=2, layer="features.1"), x),
        "gradient": (network.gradient(of=0), x),
        "gradient times input": (soundly.contributions(other, of=1), z),
        "integrated gradients": (soundly.integrated_gradients(other, of=0, baseline=0 * z, steps=3), z),
    }


def points(region: Box, n: int = 300) -> Tensor:
    return torch.cat([region.samples(n), region.corners(n)])


@pytest.mark.parametrize("name", maps())
def test_no_map_leaves_its_bounds(name):
    network, x = maps()[name]
    region = Box(x - 0.02, x + 0.02)
    found = certify_map(network, region)
    assert isinstance(found.verdict, Proved) and soundly.check(found.verdict.certificate).accepted
    values = torch.vmap(network)(points(region))
    assert found.lower.shape == network.output.shape
    assert bool((found.lower <= values).all() and (values <= found.upper).all())
    reach = values.amax(0) - values.amin(0)
    assert float((found.upper - found.lower).sum()) < 4 * float(reach.sum()) + 0.2


@pytest.mark.parametrize("name", maps())
@pytest.mark.parametrize("norm, order", [("l1", 1), ("l2", 2), ("linf", math.inf)])
def test_no_map_changes_by_more_than_is_certified(name, norm, order):
    network, x = maps()[name]
    region = Box(x - 0.02, x + 0.02)
    found = certify_change(network, x, region, norm=norm, relative=False)
    assert isinstance(found.verdict, Proved)
    base = network(x)
    change = torch.stack([(network(z) - base).norm(p=order) for z in points(region)])
    assert float(change.max()) <= found.upper
    assert bool(region.contains(found.worst)) and found.reached <= found.upper
    assert float((network(found.worst) - base).norm(p=order)) == pytest.approx(found.reached, rel=1e-4, abs=1e-6)
    assert found.reached > 0.6 * float(change.max())


def test_the_certified_sensitivity_is_above_that_which_captum_samples():
    _, x, network = pooled()
    explainer = LayerGradCam(network, "features")
    torch.manual_seed(0)
    sampled = float(sensitivity_max(explainer.attribute, x, perturb_radius=0.02, target=1))
    found = certify_change(explainer.network(1), x, Ball(x, 0.02), norm="l2")
    assert isinstance(found.verdict, Proved) and 0 < sampled <= found.upper < 6 * sampled + 0.1


def test_searches_lower_the_bound_on_the_change():
    _, x, network = pooled()
    gradient = network.gradient(of=0)
    region = Box(x - 0.05, x + 0.05)
    plain = certify_change(gradient, x, region, relative=False)
    closer = certify_change(gradient, x, region, relative=False, tighten=20.0)
    assert isinstance(closer.verdict, Proved) and closer.upper <= plain.upper
    assert closer.upper <= 1.03 * closer.reached < plain.upper and closer.reached >= plain.reached


@pytest.mark.parametrize("eps", [0.005, 0.03])
def test_cells_that_are_certain_stay_among_the_largest(eps):
    _, x, network = pooled()
    cam = soundly.cam(network, of=1, layer="features")
    region = Box(x - eps, x + eps)
    found = certify_top_k(cam, x, region, 4)
    assert set(found.certain) <= set(found.cells) and len(found.cells) == 4
    values = torch.vmap(cam)(points(region)).flatten(1)
    stays = (values.argsort(1, descending=True)[:, :4, None] == torch.tensor(found.cells)).any(1).all(0)
    kept = {cell for cell, always in zip(found.cells, stays.tolist(), strict=True) if always}
    assert set(found.certain) <= kept
    if eps == 0.005:
        assert found.certain and isinstance(found.verdict, Proved)


def test_where_no_cell_is_certain_nothing_is_claimed():
    _, x, network = pooled()
    found = certify_top_k(soundly.cam(network, of=1, layer="features"), x, Box(x - 3, x + 3), 2)
    assert found.certain == () and isinstance(found.verdict, Empty)


def test_bounds_that_are_too_narrow_are_not_called_proved(monkeypatch):
    """A planted fault: intervals that shrink to half their size about the middle."""
    right = module.least
    network, x = maps()["cam"]
    region = Box(x - 0.02, x + 0.02)

    def wrong(problem):
        low, high = right(problem).chunk(2)
        middle = (low - high) / 2
        return torch.cat([middle + 0.3 * (low - middle), -middle + 0.3 * (high + middle)])

    monkeypatch.setattr(module, "least", wrong)
    found = certify_map(network, region, timeout=20)
    assert not isinstance(found.verdict, Proved)


def test_a_change_that_is_too_small_is_not_called_proved(monkeypatch):
    right = module.least
    network, x = maps()["cam"]
    monkeypatch.setattr(module, "least", lambda problem: 0.2 * right(problem))
    assert not isinstance(certify_change(network, x, Box(x - 0.02, x + 0.02), timeout=20).verdict, Proved)


def test_requests_that_do_not_fit_are_refused():
    _, x, network = pooled()
    cam = soundly.cam(network, of=0, layer="features")
    region = Box(x - 0.1, x + 0.1)
    zero = soundly.contributions(network, of=0)
    requests = [
        (lambda: certify_top_k(cam, x, region, 0), "k is 0"),
        (lambda: certify_top_k(cam, x, region, 10**6), "k is"),
        (lambda: certify_change(cam, x, region, norm="l3"), "norm"),
        (lambda: certify_change(zero, 0 * x, region), "relative"),
        (lambda: certify_map(cam, Box(x, x - 1)), "holds a point"),
        (lambda: certify_map(cam, Box(x[0], x[0])), "shape"),
    ]
    for request, word in requests:
        with pytest.raises(InvalidInput, match=word):
            request()
