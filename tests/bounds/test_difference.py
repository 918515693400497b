"""A difference network is the difference of every pair of networks, and its bounds are of the size of what changed."""

import copy

import pytest
import torch
from torch import nn

import soundly
from soundly.bounds import difference as module
from soundly.bounds.difference import difference
from soundly.bounds.interval import interval_bounds
from soundly.errors import CaptureMismatch, InvalidInput
from soundly.graph.linear import subtract
from soundly.spec.claim import within
from soundly.spec.region import Ball, Box
from soundly.verification.problem import problem_of
from soundly.verification.root import root


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        return self.last(y + torch.abs(self.second(y)) * y)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), 2) @ self.v(x))


def perceptron(*between: nn.Module) -> nn.Sequential:
    layers = [layer for act in between for layer in (nn.Linear(6, 6), act)]
    return nn.Sequential(*layers, nn.Linear(6, 3))


def models() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(3)
    flat, image = torch.rand(1, 6), torch.rand(1, 1, 4, 4)
    conv = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2), nn.ReLU6(),
        nn.Flatten(), nn.Linear(2, 3),
    ).eval()  # fmt: skip
    return {
        "relu": (perceptron(nn.ReLU(), nn.ReLU()), flat),
        "bent": (perceptron(nn.LeakyReLU(0.01), nn.Hardtanh(), nn.PReLU()), flat),
        "smooth": (perceptron(nn.Tanh(), nn.GELU(), nn.Sigmoid()), flat),
        "residual": (Residual(), flat),
        "convolution": (conv, image),
        "attention": (Attention(), torch.rand(1, 4, 3)),
    }


def changed(model: nn.Module, size: float) -> nn.Module:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p += size * torch.randn(p.shape, generator=generator)
    return other


def pair(name: str, size: float = 0.05) -> tuple[soundly.Network, soundly.Network, torch.Tensor]:
    model, x = models()[name]
    return soundly.load(model, x), soundly.load(changed(model, size), x), x


def bound(network: soundly.Network, box: Box) -> float:
    return float((-root(problem_of(within(network, box, 0.0, 0.0)), sums=False).bound).max())


@pytest.mark.parametrize("name", models())
def test_the_difference_is_the_difference_within_the_region_and_far_outside(name):
    net, other, x = pair(name)
    apart = difference(net, other, Box(x - 0.1, x + 0.1))
    wide = [v.to(torch.float64) for v in (net, other)]
    for scale in (0.1, 1.0, 10.0):
        for z in x.double() + scale * torch.randn((20, *x.shape), dtype=torch.float64):
            a, b = (v(z) for v in wide)
            assert torch.allclose(apart(z), a - b, rtol=1e-9, atol=1e-9 * float(1 + a.abs().max() + b.abs().max()))


@pytest.mark.parametrize("name", models())
def test_no_sample_leaves_the_bounds_of_the_difference(name):
    net, other, x = pair(name)
    box = Box(x - 0.05, x + 0.05)
    apart = difference(net, other, box)
    lower, upper = root(problem_of(within(apart, box, 0.0, 0.0)), sums=False).bound.chunk(2)
    values = [v.to(torch.float64) for v in (net, other)]
    for z in [*box.samples(60), *box.corners(30)]:
        d = (values[0](z) - values[1](z)).reshape(-1)
        assert bool((lower - 1e-6 <= d).all() and (d <= -upper + 1e-6).all())


@pytest.mark.parametrize("name", ["relu", "bent", "residual", "convolution"])
def test_bounds_are_of_the_size_of_the_change(name):
    """Those of the outputs' plain difference are not: they say how wide the values are."""
    found = []
    for size in (1e-2, 1e-4):
        net, other, x = pair(name, size)
        box = Box(x - 0.3, x + 0.3)
        found.append(bound(difference(net, other, box), box))
        apart = module._Differences(net, other, box)
        plain = subtract(apart.net.output, apart.other.output)
        both = soundly.Network(apart.net.inputs, (plain,), apart.values)
    assert found[1] < 0.02 * found[0]
    assert found[1] < 0.05 * bound(both, box)


def test_a_network_minus_itself_is_zero():
    for model, x in models().values():
        net = soundly.load(model, x)
        apart = difference(net, soundly.load(model, x), Box(x - 1, x + 1))
        assert len(apart.nodes) == 1 and not apart(x.double()).any()


def test_versions_of_one_graph_keep_their_own_weights():
    net, _, x = pair("relu")
    moved = net.with_values({name: net.values[node] + 1 for name, node in net.parameters.items()})
    apart = difference(net, moved, Ball(x, 0.1))
    assert torch.allclose(apart(x.double()).float(), net(x) - moved(x), atol=1e-4) and float(
        apart(x.double()).abs().max()
    )


def test_where_graphs_part_values_are_subtracted():
    model, x = models()["relu"]
    net, other = soundly.load(model, x), soundly.load(nn.Sequential(*list(changed(model, 0.1))[:3], nn.Linear(6, 3)), x)
    apart = difference(net, other, Box(x - 0.1, x + 0.1))
    for z in torch.randn(20, 1, 6, dtype=torch.float64):
        assert torch.allclose(apart(z), net.to(torch.float64)(z) - other.to(torch.float64)(z), atol=1e-9)


def test_differences_of_weights_are_exact():
    """1 - 2^-60 has no float64; a rounded difference would make the proof one about other weights."""
    weights = [torch.tensor([[v]], dtype=torch.float64) for v in (1.0, 2.0**-60)]
    nets = []
    for w in weights:
        layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(w)
        nets.append(soundly.load(layer, torch.ones(1, 1, dtype=torch.float64)))
    box = Box(torch.zeros(1, 1), torch.ones(1, 1))
    apart = difference(*nets, box)
    parts = sorted(float(v) for v in apart.values.values())
    assert parts == [-(2.0**-60), 1.0]


@pytest.mark.parametrize("fault", ["sign", "missing"])
def test_a_wrong_identity_is_noticed_before_anything_is_proved(fault, monkeypatch):
    right = module._opened

    def wrong(b, d):
        return right(b, module.scale(d, -1)) if fault == "sign" else module.RELU(d)

    monkeypatch.setattr(module, "_opened", wrong)
    net, other, x = pair("relu", 0.5)
    with pytest.raises(CaptureMismatch, match="off by"):
        difference(net, other, Box(x - 1, x + 1))


def test_intervals_of_a_hinge_lie_between_zero_and_the_change():
    """The identity alone, where nothing is known of the value that is moved."""
    net, other, x = pair("relu", 1e-3)
    box = Box(x - 10, x + 10)
    apart = difference(net, other, box)
    ends = {apart.input: (box.lower.reshape(x.shape), box.upper.reshape(x.shape))}
    assert float(interval_bounds(apart, ends)[apart.output].size.max()) < 5


def test_networks_that_do_not_fit_are_refused():
    net, other, x = pair("relu")
    box = Box(x, x + 1)
    third = soundly.load(nn.Linear(6, 2), x)
    for call, text in (
        (lambda: difference(net, third, box), "outputs of shapes"),
        (lambda: difference(net, "other", box), "other is a str"),
        (lambda: difference(net, other, Box(torch.zeros(2), torch.ones(2))), "region has shape"),
        (lambda: difference(net, other, Box(x + 1, x)), "region"),
    ):
        with pytest.raises(InvalidInput, match=text):
            call()
