"""Fine-tuning towards constraints, then an edit: what is promised is proved, and training did its part."""

import copy
import importlib
import math

import pytest
import torch
from torch import Tensor, nn

import soundly
from soundly import at, over
from soundly.certificate import check
from soundly.errors import InvalidInput
from soundly.training.constrained import ROOM, Penalty, constrained, fit

recipe = importlib.import_module("soundly.training.constrained")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

XS = torch.linspace(-1, 1, 64)[:, None]


def target(x: Tensor) -> Tensor:
    """Falling in places, where the constraints want it to rise."""
    return x + 0.5 * torch.sin(6 * x)


def loss(module: nn.Module, batch: Tensor) -> Tensor:
    return (module(batch) - target(batch)).square().mean()


def trained() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    fit(module, XS, loss, epochs=150, batch=16)
    return module


def slopes(module: nn.Module, xs: Tensor) -> Tensor:
    x = xs.double().requires_grad_()
    (slope,) = torch.autograd.grad(copy.deepcopy(module).double()(x).sum(), x)
    return slope


RISING = [at(x[None], name=f"x = {float(x):.2f}").gradient(0).at_least(0.0) for x in XS[::3]]


@pytest.fixture(scope="module")
def module() -> nn.Sequential:
    return trained()


def test_fine_tuned_then_edited(module):
    assert float(loss(module, XS).detach()) < 0.03 and int((slopes(module, XS[::3]) < 0).sum()) > 4
    before = [p.detach().clone() for p in module.parameters()]
    torch.manual_seed(1)
    goals = [at(x[None]).output(0).near(target(x)) for x in XS[::8]]
    found = constrained(module, RISING, XS, loss, example=XS[:1], layer="4", epochs=20, learning_rate=3e-3,
                        weight=0.1, goals=goals, goal_weight=1e4)  # fmt: skip
    assert all(torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))
    assert found.penalties[1] < 0.2 * found.penalties[0]
    assert found.edit.status == "proved" and found.module is not None and check(found.edit.certificate).accepted
    assert bool((slopes(found.module, XS[::3]) >= 0).all())
    assert float(loss(found.module, XS).detach()) < 0.1
    direct = soundly.edit(soundly.load(module, XS[:1]), RISING, layer="4")
    assert float(loss(found.module, XS).detach()) < float(loss(direct.applied_to(module), XS).detach())
    assert found.edit.rows_before > direct.rows_before


def reference(module: nn.Module) -> float:
    """The penalty of `RISING` from its definition, by autograd."""
    start = slopes(trained(), XS[::3])[:, 0].abs()  # the row's size before training; its bound is 0
    return float(((-slopes(module, XS[::3])[:, 0] / start) + ROOM).clamp(min=0).square().mean())


def test_the_penalty_is_what_it_says(module):
    network = soundly.load(module, XS[:1])
    penalty = Penalty(network, RISING, batch=100)
    other, draw = copy.deepcopy(module), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.01 * torch.randn(p.shape, generator=draw)
    for one in (module, other):
        assert float(penalty(one).detach()) == pytest.approx(reference(one), rel=1e-4)
    first = next(other.parameters())
    penalty(other).backward()
    step = 1e-3 * first.grad / first.grad.norm()
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(other)
        with torch.no_grad():
            next(moved.parameters()).add_(sign * step)
        values.append(reference(moved))
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(float(first.grad.norm()), rel=1e-2)


def test_batches_of_points_are_right_on_average(module):
    network = soundly.load(module, XS[:1])
    torch.manual_seed(0)
    few = Penalty(network, RISING, batch=5)
    mean = sum(float(few(module).detach()) for _ in range(400)) / 400
    assert mean == pytest.approx(float(Penalty(network, RISING)(module).detach()), rel=0.2)


def test_constraints_of_every_kind_have_a_penalty(module):
    network = soundly.load(module, XS[:1])
    p, q = at(XS[:1]), at(XS[-1:])
    slope = slopes(module, XS[:1])
    y = float(module(XS[:1]).detach())
    kinds = {
        "norm": (
            p.gradient(0).norm_at_most(2 * abs(float(slope))),
            p.gradient(0).norm_at_most(0.5 * abs(float(slope))),
        ),
        "points compared": (
            (p.output(0) - q.output(0)).at_most(100.0),
            (p.output(0) - q.output(0)).at_least(100.0),
        ),
        "laplacian": (p.laplacian(0).at_most(1e3), p.laplacian(0).at_most(-1e3)),
        "region": (
            over(soundly.Box(XS[:1] - 0.1, XS[:1] + 0.1)).output(0).at_most(y + 5.0),
            over(soundly.Box(XS[:1] - 0.1, XS[:1] + 0.1)).output(0).at_most(y - 5.0),
        ),
    }
    for name, (holds, fails) in kinds.items():
        assert float(Penalty(network, [holds])(module).detach()) <= ROOM**2, name
        failing = Penalty(network, [fails])(module)
        assert float(failing.detach()) > 0.1 and math.isfinite(float(failing.detach())), name
        module.zero_grad()
        failing.backward()
        assert any(float(p.grad.abs().max()) > 0 for p in module.parameters() if p.grad is not None), name


def test_a_penalty_of_the_wrong_sign_would_be_seen(module, monkeypatch):
    honest = Penalty.__call__
    monkeypatch.setattr(Penalty, "__call__", lambda self, m: -honest(self, m))
    with pytest.raises(AssertionError):
        test_fine_tuned_then_edited(module)


def test_an_edit_that_fails_returns_no_module(module):
    impossible = [*RISING, at(XS[:1]).gradient(0).at_most(-1.0, name="falls")]
    found = constrained(module, impossible, XS, loss, example=XS[:1], layer="4", epochs=1)
    assert found.edit.status == "infeasible" and found.module is None and "falls" in found.edit.conflict


def test_what_does_not_fit_is_said_before_training(module, monkeypatch):
    monkeypatch.setattr(recipe, "fit", lambda *a, **o: pytest.fail("trained"))
    with pytest.raises(InvalidInput, match=r"outputs 0\.\.0"):
        constrained(module, [at(XS[:1]).output(3).at_least(0)], XS, loss, example=XS[:1], layer="4", epochs=1)
