"""Edits of inner layers at points: every promised row is evaluated again by PyTorch's own autograd."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools

import captum.attr
import numpy as np
import pytest
import torch
from torch import nn

import soundly
from soundly.editing.acceptance import promise
from soundly.editing.evidence import unknowns
from soundly.editing.functionals import Gradient, Output
from soundly.editing.sequential import Mover, require

# Raised inside torch by forward-mode differentiation.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
sequential = importlib.import_module("soundly.editing.sequential")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(4 * 9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.stem(x))
        h = torch.relu(h + self.two(torch.relu(self.norm(self.one(h)))))
        return self.fc(self.pool(h).flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        h = x + self.out(torch.softmax(q @ k.transpose(-1, -2) / 6**0.5, -1) @ v)
        return self.head((h + self.down(nn.functional.gelu(self.up(h)))).mean(1))


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


MODELS = {
    "relu, first layer": (lambda: mlp(3, 16, 16, 3), "0", (1, 3)),
    "relu, second layer": (lambda: mlp(3, 16, 16, 3), "2", (1, 3)),
    "leaky": (lambda: mlp(3, 12, 12, 3, act=nn.LeakyReLU), "0", (1, 3)),
    "relu6": (lambda: mlp(3, 12, 12, 3, act=nn.ReLU6), "0", (1, 3)),
    "tanh": (lambda: mlp(3, 12, 12, 3, act=nn.Tanh), "0", (1, 3)),
    "gelu": (lambda: mlp(3, 12, 12, 3, act=nn.GELU), "2", (1, 3)),
    "convolution behind a residual": (Residual, "one", (1, 1, 6, 6)),
    "two parallel layers": (Residual, ["stem", "fc"], (1, 1, 6, 6)),
    "attention": (Attention, "down", (1, 4, 6)),
    "queries and keys": (Attention, "qkv", (1, 4, 6)),
}


def model_of(name: str, seed: int = 0) -> tuple[nn.Module, str, tuple[int, ...]]:
    torch.manual_seed(seed)
    make, layer, shape = MODELS[name]
    module = make().eval()
    if isinstance(module, Residual):
        module.norm.running_mean += torch.randn(4) / 4
        module.norm.running_var *= 1.5
    return module, layer, shape


def gradient(module: nn.Module, x: torch.Tensor, of: int) -> torch.Tensor:
    """By autograd, in float64, of a float32 module's exact weights."""
    wide = copy.deepcopy(module).double()
    x = x.double().requires_grad_()
    return torch.autograd.grad(wide(x).reshape(-1)[of], x)[0].reshape(-1)


@pytest.mark.parametrize("name", MODELS)
def test_every_promise_holds_by_autograd(name: str) -> None:
    module, layer, shape = model_of(name)
    network = soundly.load(module, torch.zeros(shape))
    constraints, points = [], []
    for i in range(4):
        x = torch.rand(shape)
        before = gradient(module, x, i % 3)
        shift = 0.1 * before.abs().max() * torch.randn(2).double()
        middle = before[:2] + shift
        p = soundly.at(x, name=f"point {i}")
        width = 0.02 * float(before.abs().max())
        constraints += [
            p.gradient(of=i % 3, entries=[0, 1]).within(middle - width, middle + width),
            p.classified(i % 3),
        ]
        points.append((x, i % 3, middle, width))
    result = soundly.edit(network, constraints, layer=layer, time_limit=60)
    assert result.status == "proved", result.reason
    assert result.rows_before < result.rows == result.proven and result.check is not None and result.check.accepted
    edited = result.applied_to(module)
    wide = copy.deepcopy(edited).double()
    for x, label, middle, width in points:
        assert bool(((gradient(edited, x, label)[:2] - middle).abs() <= width + 1e-12).all())
        y = wide(x.double()).reshape(-1).detach()
        assert float(y[label]) - float(y[[k for k in range(3) if k != label]].max()) >= 1e-3 - 1e-12
    changed = {
        n for (n, a), b in zip(module.named_parameters(), edited.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert changed <= set(result.delta) and changed
    assert torch.equal(result.model(points[0][0]), soundly.load(edited, points[0][0])(points[0][0]))


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_the_derivatives_towards_the_weights(name: str) -> None:
    module, layer, shape = model_of(name, 1)
    module = module.double()
    network = soundly.load(module, torch.zeros(shape).double())
    points = [torch.rand(shape).double() for _ in range(3)]
    constraints = [soundly.at(x).gradient(of=1, entries=[0, 2]).within(-1, 1) for x in points]
    constraints += [soundly.at(x).output(of=2).at_least(0) for x in points]
    free = unknowns(network, [layer] if isinstance(layer, str) else layer)
    r = require(network, constraints, free)
    theta = r.evidence.theta
    rows = sequential.row_gradients(r, theta, torch.arange(len(r.lower)))
    parameters = dict(module.named_parameters())
    wanted = [parameters[n.op.name] for n in free]
    expected = []
    for x in points:
        x = x.clone().requires_grad_()
        g = torch.autograd.grad(module(x).reshape(-1)[1], x, create_graph=True)[0].reshape(-1)
        for entry in (g[0], g[2]):
            expected.append(torch.autograd.grad(entry, wanted, retain_graph=True, allow_unused=True))
    for x in points:
        expected.append(torch.autograd.grad(module(x).reshape(-1)[2], wanted, allow_unused=True))
    flat = torch.stack(
        [
            torch.cat([(torch.zeros_like(w) if g is None else g).reshape(-1) for g, w in zip(e, wanted, strict=True)])
            for e in expected
        ]
    )
    assert float((rows - flat).abs().max()) < 1e-12 * max(1.0, float(flat.abs().max()))


def test_while_no_break_is_crossed_everything_is_affine() -> None:
    module, _, shape = model_of("convolution behind a residual", 2)
    network = soundly.load(module, torch.zeros(shape))
    constraints = [soundly.at(torch.rand(shape)).gradient(of=1, entries=[0, 5]).within(-1, 1) for _ in range(3)]
    r = require(network, constraints, unknowns(network, ["one"]))
    theta = r.evidence.theta
    values, hinges = r.evidence(theta)
    lowest, highest = r.evidence.pieces(hinges)
    assert bool(((lowest <= hinges) & (hinges <= highest)).all())
    crossed = 0
    for k in range(8):
        step = torch.randn_like(theta) * 4.0 ** -(k % 8)
        there, hinges_there = r.evidence(theta + step)
        moved, hinges_moved = r.evidence.moved(theta, step)
        inside = bool(((lowest <= hinges_there) & (hinges_there <= highest)).all(1).all())
        crossed += not inside
        if inside:
            assert torch.allclose(there, values + moved, rtol=0, atol=1e-12)
            assert torch.allclose(hinges_there, hinges + hinges_moved, rtol=0, atol=1e-12)
    assert 0 < crossed < 8


def test_explanations_by_captum() -> None:
    """Maps at inner layers, Integrated Gradients of groups, kept top sets, directional derivatives."""
    module, _, shape = model_of("convolution behind a residual", 3)
    network = soundly.load(module, torch.zeros(shape))
    a, b = torch.rand(shape), torch.rand(shape)
    target = soundly.gradcam(network, of=2, layer="stem")(a)
    groups = torch.arange(36).reshape(shape) // 9
    before = captum.attr.IntegratedGradients(module).attribute(a, torch.zeros(shape), target=1, n_steps=4)
    sums = torch.stack([before[groups == t].sum() for t in range(4)])
    order = sums.argsort()
    mask = torch.zeros(4, dtype=torch.bool)
    mask[order[[1, 3]]] = True  # the third group in importance shall overtake the second
    p, q = soundly.at(a, name="a"), soundly.at(b, name="b")
    constraints = [
        p.integrated_gradients(of=1, baseline=torch.zeros(shape), steps=4, groups=groups).keeps_top(mask, margin=1e-3),
        p.gradcam(of=2, layer="stem").normalised_near(target, eps=0.2),
        q.directional(of=2, directions=torch.ones(1, *shape)).at_most(0.05),
    ]
    result = soundly.edit(network, constraints, layer="fc", start={}, time_limit=200)
    assert result.status == "proved", result.reason
    edited = result.applied_to(module)
    after = captum.attr.IntegratedGradients(edited).attribute(a, torch.zeros(shape), target=1, n_steps=4)
    sums = torch.stack([after[groups == t].sum() for t in range(4)])
    assert set(sums.argsort(descending=True)[:2].tolist()) == set(order[[1, 3]].tolist())
    map = captum.attr.LayerGradCam(edited, edited.stem).attribute(a, target=2, relu_attributions=False)[0, 0].detach()
    scaled, wanted = (t / t.max() for t in (map - map.min(), target - target.min()))
    assert float((scaled - wanted).abs().max()) <= 0.2 + 1e-4
    assert float(gradient(edited, b, 2).sum()) <= 0.05


def test_equal_gradients_at_two_points() -> None:
    module = model_of("relu, first layer")[0]
    network = soundly.load(module, torch.zeros(1, 3))
    a, b = torch.rand(1, 3), -torch.rand(1, 3)
    p, q = soundly.at(a, name="a"), soundly.at(b, name="b")
    before = (gradient(module, a, 1) - gradient(module, b, 1)).abs().max()
    constraints = [p.gradient(of=1).equals(q.gradient(of=1), tolerance=1e-3), p.classified(0), q.classified(2)]
    result = soundly.edit(network, constraints, layer="2", time_limit=100)
    assert result.status == "proved", result.reason
    edited = result.applied_to(module)
    assert float(before) > 0.01 > float((gradient(edited, a, 1) - gradient(edited, b, 1)).abs().max()) * 10
    assert [int(edited(x).argmax()) for x in (a, b)] == [0, 2]


def test_two_demands_in_one_linear_region_contradict_each_other() -> None:
    module = mlp(2, 6, 1)
    network = soundly.load(module, torch.zeros(1, 2))
    x = torch.tensor([[0.3, 0.4]])
    one, two = soundly.at(x, name="here"), soundly.at(x + 1e-4, name="there")
    result = soundly.edit(network, [one.gradient(of=0).within(1, 2), two.gradient(of=0).within(-2, -1)], layer="2")
    assert result.status == "infeasible" and result.model is None and result.certificate is None
    assert any("here" in c for c in result.conflict) and any("there" in c for c in result.conflict)


@pytest.mark.parametrize("seed", range(6))
def test_random_cases_that_have_an_answer(seed: int) -> None:
    torch.manual_seed(seed)
    module = mlp(2, 16, 16, 1)
    star, k = copy.deepcopy(module), [0, 2][seed % 2]
    with torch.no_grad():
        star[k].weight += star[k].weight.std() * torch.randn_like(star[k].weight)
    network, constraints = soundly.load(module, torch.zeros(1, 2)), []
    for i in range(6):
        x = torch.rand(1, 2) * 2 - 1
        g, y = gradient(star, x, 0), float(star.double()(x.double()).detach())
        star = star.float()
        p = soundly.at(x, name=f"x{i}")
        constraints += [p.gradient(of=0).within(g - 0.05, g + 0.05), p.output(of=0).within(y - 0.1, y + 0.1)]
    result = soundly.edit(network, constraints, layer=str(k), time_limit=60)
    assert result.status == "proved", result.reason


def test_points_are_verified_one_bound_each() -> None:
    """Rows met with margins near the rounding of float64 are beyond float32, and a point cannot be split."""
    torch.manual_seed(3)
    network, x = soundly.load(mlp(2, 16, 16, 1), torch.zeros(1, 2)), torch.rand(5, 1, 2)
    slopes = [network.to(torch.float64).gradient(of=0)(p.double()).reshape(-1) for p in x]
    rows = [soundly.at(p).gradient(of=0).within(g - 1e-10, g + 1e-10) for p, g in zip(x, slopes, strict=True)]
    requirements = require(network, rows, unknowns(network, ["2"]))
    verdict = soundly.verify(promise(requirements, {}))
    assert isinstance(verdict, soundly.Proved) and verdict.effort.subproblems == len(x), verdict
    narrow = dataclasses.replace(requirements, upper=requirements.lower + 0.5e-10)
    assert not isinstance(soundly.verify(promise(narrow, {})), soundly.Proved)


def test_norms_bound_start_and_goals() -> None:
    torch.manual_seed(5)
    module = mlp(2, 12, 12, 1, act=nn.Tanh)
    network = soundly.load(module, torch.zeros(1, 2))
    points = [soundly.at(torch.rand(1, 2), name=f"x{i}") for i in range(3)]
    constraints = [p.gradient(of=0, entries=[0]).at_least(0.3) for p in points]
    sizes = {
        "l2": lambda d: float(d.norm()),
        "l1": lambda d: float(d.abs().sum()),
        "linf": lambda d: float(d.abs().max()),
    }
    flat = {}
    for norm in sizes:
        result = soundly.edit(network, constraints, layer="2", norm=norm)
        assert result.status == "proved", result.reason
        flat[norm] = torch.cat([d.reshape(-1) for d in result.delta.values()])
    for norm, size in sizes.items():
        assert all(size(flat[norm]) <= 1.02 * size(other) for other in flat.values())
    limit = 1.5 * sizes["linf"](flat["linf"])
    held = soundly.edit(network, constraints, layer="2", bound=limit)
    assert held.status == "proved" and all(float(d.abs().max()) <= limit for d in held.delta.values())
    tight = soundly.edit(network, constraints, layer="2", bound=0.5 * sizes["linf"](flat["linf"]))
    assert tight.status == "infeasible" and "may change by more than" in tight.reason
    wish = [p.output(of=0).near(0.7) for p in points]
    wished = soundly.edit(network, constraints, layer="2", goals=wish, goal_weight=1e6)
    plain = soundly.edit(network, constraints, layer="2")
    miss = [sum(abs(float(e.model(p.x)) - 0.7) for p in points) for e in (wished, plain)]
    assert wished.status == "proved" and miss[0] < 0.25 * miss[1]
    begun = soundly.edit(
        network, constraints, layer="2", start={n: v.float() for n, v in _values(wished.model).items()}
    )
    assert begun.status == "proved"


def _values(network: soundly.Network) -> dict[str, torch.Tensor]:
    return {name: network.values[node] for name, node in network.parameters.items()}


# -- what must be refused


def test_arguments() -> None:
    module = mlp(2, 4, 1)
    network, p = soundly.load(module, torch.zeros(1, 2)), soundly.at(torch.zeros(1, 2))
    row = p.gradient(of=0).within(-1, 1)
    with pytest.raises(soundly.errors.EditError, match="no parameters"):
        soundly.edit(network, [row], layer=["5", "2"])
    with pytest.raises(soundly.errors.EditError, match="does not produce the output"):
        soundly.edit(module, [row], layer="0")
    with pytest.raises(soundly.errors.InvalidInput, match="goals"):
        soundly.edit(network, [row], layer="0", norm="l1", goals=[p.output(of=0).near(1.0)])
    with pytest.raises(soundly.errors.InvalidInput, match="outputs"):
        soundly.edit(network, [p.gradient(of=7).within(-1, 1)], layer="0")
    with pytest.raises(soundly.errors.InvalidInput, match="Ball"):
        soundly.over(soundly.Ball(torch.zeros(1, 2), 0.1, "l2"))
    with pytest.raises(soundly.errors.InvalidInput, match="captured"):
        soundly.edit(
            module, [soundly.over(soundly.Box(torch.zeros(1, 2), torch.ones(1, 2))).output(of=0).at_least(0)], layer="2"
        )


def _claims_by_hand(network: soundly.Network, x: torch.Tensor) -> tuple[float, float]:
    wide = network.to(torch.float64)
    slope = wide.gradient(of=0)(x.double()).reshape(-1)
    return float(slope[1]), float(wide(x.double()).reshape(-1)[1])


def test_the_claim_that_is_proved_is_the_constraint() -> None:
    """Whether the promise of an edit holds is, for many weights, what evaluation says of the constraints."""
    torch.manual_seed(7)
    network = soundly.load(mlp(2, 5, 2), torch.zeros(1, 2))
    x = torch.rand(1, 2)
    p, (slope, y) = soundly.at(x), _claims_by_hand(network, x)
    low, high, most = slope - 0.1, slope + 0.1, y + 0.05
    constraints = [p.gradient(of=0, entries=[1]).within(low, high), p.output(of=1).at_most(most)]
    r = require(network, constraints, unknowns(network, ["0"]))
    assert len(r.lower) == 2
    seen = set()
    for _ in range(60):
        weight = network.values[network.parameters["0.weight"]] + 0.4 * torch.randn(5, 2)
        claim = promise(r, {"0.weight": weight})
        slope, y = _claims_by_hand(network.with_values({"0.weight": weight}), x)
        holds = low <= slope <= high and y <= most
        seen.add((slope < low, slope > high, y > most))
        assert claim.holds_at(x.double()) == holds
    assert len(seen) >= 4


def _loosened(self: Mover, start: torch.Tensor, caution: float, right=Mover.__call__):
    r = self.requirements
    loose = dataclasses.replace(r, lower=r.lower - 0.01, upper=r.upper + 0.01)
    return right(dataclasses.replace(self, requirements=loose), start, caution)


FAULTS = {
    "nothing is moved": (Mover, "__call__", lambda self, start, caution: sequential.Move(start, 1, 0, True)),
    "rows of the wrong sign": (
        sequential, "row_gradients", lambda *a, right=sequential.row_gradients: -right(*a)
    ),
    "rows are loosened": (Mover, "__call__", _loosened),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_candidate_is_not_proved(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    module = mlp(2, 16, 16, 1)
    network = soundly.load(module, torch.zeros(1, 2))
    points = [torch.rand(1, 2) * 2 - 1 for _ in range(6)]
    constraints = [soundly.at(x).gradient(of=0).within(0.2 + 0.1 * i, 0.25 + 0.1 * i) for i, x in enumerate(points)]
    assert soundly.edit(network, constraints, layer="0", time_limit=60).status == "proved"
    where, name, wrong = FAULTS[fault]
    monkeypatch.setattr(where, name, wrong)
    result = soundly.edit(network, constraints, layer="0", time_limit=10)
    assert result.status != "proved" and result.model is None and result.certificate is None and result.reason


def test_tampered_certificates_of_inner_edits_are_refused() -> None:
    torch.manual_seed(4)
    network = soundly.load(mlp(2, 8, 8, 1), torch.zeros(1, 2))
    constraints = [soundly.at(torch.rand(1, 2)).gradient(of=0).within(0.1, 0.1001) for _ in range(2)]
    result = soundly.edit(network, constraints, layer="2", time_limit=60)
    assert result.status == "proved", result.reason
    certificate, draw = result.certificate, np.random.default_rng(0)
    names = [n for n, a in certificate.arrays.items() if a.size and a.dtype.kind == "f"]
    refused = 0
    for _ in range(60):
        name = names[draw.integers(len(names))]
        array = certificate.arrays[name].copy()
        array.reshape(-1)[draw.integers(array.size)] += draw.choice([-1.0, 1.0, 1e-2, np.nan, np.inf])
        broken = dataclasses.replace(certificate, arrays={**certificate.arrays, name: array})
        refused += not soundly.check(broken).accepted
    assert refused > 30  # the others changed what nothing promised depends on, or the claim still holds


def test_functionals_are_told_apart() -> None:
    """Quantities are shared between points only where they are the same."""
    p, q = soundly.at(torch.zeros(1, 2)), soundly.at(torch.ones(1, 2))
    key = importlib.import_module("soundly.editing.evidence").key_of
    assert key(Gradient(p, 0, None, (1,))) == key(Gradient(q, 0, None, (1,)))
    assert len({key(f) for f in (Gradient(p, 0, None, (1,)), Gradient(p, 1, None, (1,)), Gradient(p, 0, None, None),
                                 Gradient(p, 0, "a", (1,)), Output(p, 0), Output(p, 1))}) == 6  # fmt: skip
