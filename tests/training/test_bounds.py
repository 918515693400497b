"""Differentiable bounds: sound on samples and corners, exact where they can be, live in the weights."""

import pytest
import torch
from torch import nn

import soundly
from soundly.training import bounds
from soundly.training.bounds import TrainingBounds


class Net(nn.Module):
    """Dense or convolutional, with a skip, a pool and a smooth function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.next = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        y = torch.relu(self.conv(x))
        y = torch.tanh(self.next(y)) + y
        return self.fc(nn.functional.max_pool2d(y, 2).flatten(1))


def dense() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


MODELS = {"dense": dense, "convolutional": Net}


@pytest.fixture(params=MODELS)
def module(request):
    torch.manual_seed(0)
    return MODELS[request.param]().double()


def boxes(n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.rand(n, 1, 8, 8, dtype=torch.float64)
    free = torch.rand_like(x) < 0.5
    return x, x - 0.2 * free, x + 0.2 * free


@pytest.mark.parametrize("method", ["interval", "crown-ibp"])
def test_no_point_of_a_box_is_below(module, method):
    assert (gaps(module, method) >= -1e-12).all()


def gaps(module: nn.Module, method: str) -> torch.Tensor:
    """How far the bounds of random rows are below the least value of samples and corners."""
    x, lower, upper = boxes()
    rows = torch.randn(5, 3, 4, dtype=torch.float64)
    found = TrainingBounds(module, x).lower(rows, lower, upper, method=method)
    assert found.shape == (5, 3)
    closest = torch.full_like(found, torch.inf)
    for u in [*torch.rand(200, *x.shape, dtype=torch.float64), *torch.randint(0, 2, (200, *x.shape)).double()]:
        values = torch.einsum("knc,nc->kn", rows, module(lower + u * (upper - lower)))
        closest = torch.minimum(closest, values)
    return (closest - found).detach()


def test_samples_catch_a_chord_that_is_too_low(monkeypatch):
    """ReLU's upper line through the origin: what one gets by forgetting its offset."""
    lines = bounds._lines

    def broken(op, x, y):
        slope_low, low, slope_high, high = lines(op, x, y)
        return slope_low, low, slope_high, torch.zeros_like(high)

    torch.manual_seed(0)
    module = dense().double()
    assert (gaps(module, "crown-ibp") >= -1e-12).all()
    monkeypatch.setattr(bounds, "_lines", broken)
    assert (gaps(module, "crown-ibp") < -1e-6).any()


@pytest.mark.parametrize("method", ["interval", "crown-ibp"])
def test_at_a_point_bounds_are_the_value(module, method):
    x, *_ = boxes()
    rows = torch.randn(5, 3, 4, dtype=torch.float64)
    found = TrainingBounds(module, x).lower(rows, x, x, method=method)
    torch.testing.assert_close(found, torch.einsum("knc,nc->kn", rows, module(x)), rtol=0, atol=1e-12)


def test_backward_bounds_are_not_looser_than_needed():
    """Where no ReLU changes sign the network is affine, and backward bounds are exact; intervals are not."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    module[0].bias.data += 10
    x = torch.rand(2, 6, dtype=torch.float64)
    known = TrainingBounds(module, x)
    rows = torch.randn(1, 2, 3, dtype=torch.float64)
    weight = torch.einsum("knc,ch,hi->kni", rows, module[2].weight, module[0].weight)
    exact = torch.einsum("knc,nc->kn", rows, module(x)) - 0.1 * weight.abs().sum(-1)
    torch.testing.assert_close(known.lower(rows, x - 0.1, x + 0.1), exact, rtol=0, atol=1e-12)
    assert (known.lower(rows, x - 0.1, x + 0.1, method="interval") < exact - 1e-3).all()


def test_intervals_are_those_of_the_rigorous_domain():
    x, lower, upper = boxes()
    module = dense().double()
    network = soundly.load(module, x)
    rigorous = soundly.interval_bounds(network, {network.input: (lower, upper)})[network.output]
    known = TrainingBounds(module, x)
    found = known.intervals(lower, upper)[known.output]
    torch.testing.assert_close(found.lower, rigorous.lower, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["interval", "crown-ibp"])
def test_gradients_reach_the_present_weights_and_the_boxes(module, method):
    x, lower, upper = boxes()
    known = TrainingBounds(module, x)
    label = torch.tensor([0, 1, 2])
    before = known.margins(label, lower, upper, method=method)
    assert (before.gather(1, label[:, None]) == 0).all()
    lower = lower.requires_grad_()
    known.margins(label, lower, upper, method=method).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())
    assert lower.grad is not None and bool((lower.grad != 0).any())
    with torch.no_grad():  # a step along the gradient widens the margins: the same object follows the weights
        for p in module.parameters():
            p += 1e-4 * p.grad / p.grad.norm()
    assert known.margins(label, lower, upper, method=method).sum() > before.sum()


def test_the_gradient_of_a_bound_is_its_derivative():
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = torch.rand(2, 4, dtype=torch.float64)
    known = TrainingBounds(module, x)
    label = torch.tensor([0, 2])

    def margin(lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        return known.margins(label, lower, upper)

    ends = (x - 0.3).requires_grad_(), (x + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(margin, ends)
