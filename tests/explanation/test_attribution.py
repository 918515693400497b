"""Attribution networks against autograd and captum."""

import math

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import soundly
from soundly.errors import InvalidInput
from soundly.explanation.attribution import cosine, minmax


class Small(nn.Module):
    """A convolutional network; `features` makes the map's layer."""

    def __init__(self, act: nn.Module, pool: bool, residual: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), act, *([nn.MaxPool2d(2)] if pool else []))
        self.deep = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), act)
        self.residual, self.fc = residual, nn.Linear(4, 3)
        self.deep[1].running_mean.uniform_(-0.2, 0.2)
        self.deep[1].running_var.uniform_(0.5, 2.0)

    def rest(self, z: Tensor) -> Tensor:
        deep = self.deep(z)
        return self.fc((z + deep if self.residual else deep).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.features(x))


KINDS = {
    "relu": (nn.ReLU(), False, False),
    "gelu": (nn.GELU(), False, True),
    "relu and max-pool": (nn.ReLU(), True, False),
    "softplus, max-pool, residual": (nn.Softplus(), True, True),
    "relu and residual": (nn.ReLU(), True, True),
}


@pytest.fixture(params=KINDS)
def small(request) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Small(*KINDS[request.param]).double().eval(), torch.randn(1, 2, 6, 6, dtype=torch.float64)


def by_autograd(model: nn.Module, x: Tensor, of: int) -> Tensor:
    """Equations 1 and 2 of Grad-CAM by reverse mode. [*size]"""
    z = model.features(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.rest(z)[0, of], z)
    return (slope.mean((2, 3), keepdim=True) * z.detach()).sum(1)[0]


@pytest.mark.parametrize("relu", [False, True])
def test_gradcam_is_that_of_autograd_and_captum(small, relu):
    model, x = small
    network = soundly.load(model, x)
    reference = captum.attr.LayerGradCam(model, model.features)
    for of in range(3):
        found = soundly.gradcam(network, of=of, layer="features", relu=relu)
        want = by_autograd(model, x, of)
        theirs = reference.attribute(x, target=of, relu_attributions=relu).detach()[0, 0]
        assert found.output.shape == want.shape
        torch.testing.assert_close(found(x), want.relu() if relu else want, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found(x), theirs, rtol=1e-8, atol=1e-10)
    other = torch.randn_like(x)  # one network for all inputs
    torch.testing.assert_close(found(other), by_autograd(model, other, 2).clamp(min=0 if relu else -math.inf))


def test_integrated_gradients_are_those_of_captum_and_of_plain_quadrature(small):
    model, x = small
    network, start = soundly.load(model, x), 0.2 * torch.randn_like(x)
    for steps in (1, 2, 7):
        found = soundly.integrated_gradients(network, of=1, baseline=start, steps=steps)
        theirs = captum.attr.IntegratedGradients(model).attribute(
            x, baselines=start, target=1, n_steps=steps, method="gausslegendre"
        )
        total = torch.zeros_like(x)
        for node, weight in zip(*np.polynomial.legendre.leggauss(steps), strict=True):
            z = (start + (node + 1) / 2 * (x - start)).requires_grad_()
            total += weight / 2 * torch.autograd.grad(model(z)[0, 1], z)[0]
        assert found.output.shape == tuple(x.shape)
        # captum rounds the quadrature's weights to float32
        torch.testing.assert_close(found(x), theirs.detach(), rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))
        torch.testing.assert_close(found(x), total * (x - start), rtol=1e-8, atol=1e-10)


def test_integrated_gradients_add_up_to_the_change_of_the_output():
    torch.manual_seed(0)
    model = Small(nn.GELU(), False, True).double().eval()
    x, start = torch.randn(2, 1, 2, 6, 6, dtype=torch.float64)
    network = soundly.load(model, x)
    change = (model(x) - model(start))[0, 2].detach()
    gaps = []
    for steps in (2, 4, 8, 24):
        total = soundly.integrated_gradients(network, of=2, baseline=start, steps=steps)(x).sum()
        gaps.append(float((total - change).abs()))
    assert gaps[-1] < 1e-8 and gaps[0] > gaps[1] > gaps[2] > gaps[3]


def test_integrated_gradients_of_a_linear_model_are_exact_with_one_step():
    torch.manual_seed(0)
    model, x, start = nn.Linear(5, 2).double(), *torch.randn(2, 1, 5, dtype=torch.float64)
    found = soundly.integrated_gradients(soundly.load(model, x[None]), of=1, baseline=start[None], steps=1)(x[None])
    torch.testing.assert_close(found, ((x - start) * model.weight[1]).detach()[None])


def test_attributions_are_networks_like_any_other():
    torch.manual_seed(0)
    model, x = Small(nn.GELU(), False, False).double().eval(), torch.randn(1, 2, 6, 6, dtype=torch.float64)
    start = torch.zeros_like(x)
    network = soundly.load(model, x)
    maps = {
        "gradcam": soundly.gradcam(network, of=0, layer="features"),
        "ig": soundly.integrated_gradients(network, of=0, baseline=start, steps=3),
    }
    slopes = {
        "gradcam": torch.autograd.functional.jacobian(lambda z: _gradcam(model, z), x),
        "ig": torch.autograd.functional.jacobian(lambda z: _integrated(model, z, start, 3), x),
    }
    for name, network in maps.items():
        entry = math.prod(network.output.shape) // 2
        want = slopes[name].reshape(-1, *x.shape)[entry]
        torch.testing.assert_close(network.gradient(of=entry)(x), want, rtol=1e-8, atol=1e-10)
        both = torch.vmap(network)(torch.stack([x, -x]))
        torch.testing.assert_close(both[1], network(-x))


def _gradcam(model: Small, x: Tensor) -> Tensor:
    z = model.features(x)
    (slope,) = torch.autograd.grad(model.rest(z)[0, 0], z, create_graph=True)
    return (slope.mean((2, 3), keepdim=True) * z).sum(1)[0]


def _integrated(model: Small, x: Tensor, start: Tensor, steps: int) -> Tensor:
    total = torch.zeros_like(x)
    for node, weight in zip(*np.polynomial.legendre.leggauss(steps), strict=True):
        z = start + (node + 1) / 2 * (x - start)
        total = total + weight / 2 * torch.autograd.grad(model(z)[0, 0], z, create_graph=True)[0]
    return total * (x - start)


def test_the_network_that_is_explained_stays_as_it_was():
    torch.manual_seed(0)
    model, x = Small(nn.ReLU(), True, True).eval(), torch.randn(1, 2, 6, 6)
    network = soundly.load(model, x)
    before, outputs, values = network(x), network.outputs, dict(network.values)
    start = torch.zeros_like(x)
    ig = soundly.integrated_gradients(network, of=0, baseline=start, steps=2)
    kept = ig(x)
    start += 1.0  # the user's own tensor afterwards
    assert network.outputs == outputs and dict(network.values) == values and torch.equal(network(x), before)
    assert ig.dtype == torch.float32 and torch.equal(ig(x), kept)


def test_requests_that_do_not_fit_are_refused():
    model, x = Small(nn.ReLU(), True, True).eval(), torch.randn(1, 2, 6, 6)
    network = soundly.load(model, x)
    requests = [
        (lambda: soundly.gradcam(network, of=3, layer="features"), "3"),
        (lambda: soundly.gradcam(network, of=-1, layer="features"), "-1"),
        (lambda: soundly.gradcam(network, of=0, layer="feature"), "features"),
        (lambda: soundly.gradcam(network, of=0, layer="fc"), "shape"),
        (lambda: soundly.integrated_gradients(network, of=3, baseline=x), "3"),
        (lambda: soundly.integrated_gradients(network, of=0, baseline=x[0]), "baseline"),
        (lambda: soundly.integrated_gradients(network, of=0, baseline=x * math.nan), "baseline"),
        (lambda: soundly.integrated_gradients(network, of=0, baseline=x, steps=0), "steps"),
    ]
    for request, word in requests:
        with pytest.raises(InvalidInput, match=word):
            request()


def test_a_map_between_zero_and_one():
    a = torch.tensor([[-1.0, 3.0], [1.0, 0.0]])
    torch.testing.assert_close(minmax(a), torch.tensor([[0.0, 1.0], [0.5, 0.25]]))
    assert torch.equal(minmax(torch.full((2, 2), 7.0)), torch.zeros(2, 2))
    torch.testing.assert_close(minmax(-5 * a + 2), 1 - minmax(a))


def test_the_cosine_of_two_maps():
    a, b = torch.randn(2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    assert cosine(a, b) == pytest.approx(want, rel=1e-12) and cosine(a, 3 * a) == pytest.approx(1.0)
    assert cosine(a, -a) == pytest.approx(-1.0) and cosine(a, 0 * a) == 0.0


def test_contributions_and_gradients_are_those_of_captum(small):
    model, x = small
    network = soundly.load(model, x)
    layer = captum.attr.LayerGradientXActivation(model, model.features)
    for of in range(3):
        theirs = captum.attr.InputXGradient(model).attribute(x.clone().requires_grad_(), target=of).detach()
        torch.testing.assert_close(soundly.contributions(network, of=of)(x), theirs, rtol=1e-8, atol=1e-10)
        theirs = layer.attribute(x, target=of).detach()
        found = soundly.contributions(network, of=of, layer="features")
        torch.testing.assert_close(found(x), theirs, rtol=1e-8, atol=1e-10)


def test_smoothgrad_is_the_mean_gradient_at_the_given_points(small):
    model, x = small
    noise = 0.3 * torch.randn(4, *x.shape, dtype=torch.float64)
    found = soundly.smoothgrad(soundly.load(model, x), of=1, noise=noise)
    for z in (x, -x):
        parts = []
        for move in noise:
            point = (z + move).requires_grad_()
            parts.append(torch.autograd.grad(model(point)[0, 1], point)[0])
        torch.testing.assert_close(found(z), torch.stack(parts).mean(0), rtol=1e-8, atol=1e-10)


def test_a_class_activation_map_sums_to_the_output_and_needs_a_linear_end():
    torch.manual_seed(0)
    model = Small(nn.ReLU(), False, False).double().eval()
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    network = soundly.load(model, x)
    for of in range(3):
        found = soundly.cam(network, of=of, layer="deep")
        features = model.deep(model.features(x))[0]
        want = (model.fc.weight[of, :, None, None] * features).sum(0) / 36
        torch.testing.assert_close(found(x), want.detach(), rtol=1e-8, atol=1e-10)
        total = (model(x)[0, of] - model.fc.bias[of]).detach()
        torch.testing.assert_close(found(x).sum(), total, rtol=1e-8, atol=1e-10)
    with pytest.raises(InvalidInput, match="not linear"):
        soundly.cam(network, of=0, layer="features")


def test_noise_that_does_not_fit_is_refused():
    model, x = Small(nn.ReLU(), True, True).eval(), torch.randn(1, 2, 6, 6)
    network = soundly.load(model, x)
    for noise in (x, x[None][:0], x[None] * math.nan):
        with pytest.raises(InvalidInput, match="noise"):
            soundly.smoothgrad(network, of=0, noise=noise)
