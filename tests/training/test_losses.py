"""Every loss of interpretability-aware training against its formula, written out in loops over examples and classes.

The attacked points come from a second implementation of gradient ascent, so that what the inner maximum maximises is
held too. Each formula has broken variants, as a slip would make them: all of them must differ.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from soundly.training.interpretable import IgNorm, Int, method
from soundly.training.maps import Cam, ConvNet, Explained, GradCam, IntegratedGradients, cnn

EPS, STEPS, GAMMA, POINTS, CLASSES = 0.1, 2, 0.7, 5, 4
Formula = Callable[[ConvNet, Tensor, int, Tensor], Tensor]
"""The loss of one example x, its label, and its attacked point."""


def net() -> ConvNet:
    torch.manual_seed(1)
    model = cnn((1, 8, 8), CLASSES, (4, 6, 5)).double()
    with torch.no_grad():
        model.head.weight *= 20  # logits apart, so that every softmax matters
    return model


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), torch.arange(3)


# ---------------------------------------------------------------- formulas


def entropy(model: ConvNet, x: Tensor, label: int) -> Tensor:
    f = model(x[None])[0]
    return torch.log(sum(torch.exp(v) for v in f)) - f[label]  # type: ignore[arg-type]


def places(model: ConvNet, x: Tensor, label: int) -> Tensor:
    """The class activation map of a label, place by place."""
    a = model.features(x[None])[0]
    return sum((w * a[k] for k, w in enumerate(model.head.weight[label])), start=torch.zeros(())) / a[0].numel()


def change(model: ConvNet, x: Tensor, z: Tensor, label: int) -> Tensor:
    return (places(model, x, label) - places(model, z, label)).abs().sum()


def apart(model: ConvNet, x: Tensor, label: int, z: Tensor) -> Tensor:
    """Boopathy et al., ICML 2020, eq. 8: half the label's change, half the others' by their softmax at z."""
    f = model(z[None])[0]
    others = [i for i in range(CLASSES) if i != label]
    total = sum(math.e ** f[i] for i in others)
    moved = sum((math.e ** f[i] / total * change(model, x, z, i) for i in others), start=torch.zeros(()))
    return change(model, x, z, label) / 2 + moved / 2


def divergence(model: ConvNet, x: Tensor, z: Tensor) -> Tensor:
    """KL(answer at x || answer at z)."""
    p, q = (torch.exp(v) / torch.exp(v).sum() for v in (model(x[None])[0], model(z[None])[0]))
    return sum((p[i] * torch.log(p[i] / q[i]) for i in range(CLASSES)), start=torch.zeros(()))


def integrated(model: ConvNet, x: Tensor, label: int, z: Tensor) -> Tensor:
    """Integrated Gradients of the cross entropy from x to z."""
    slopes = torch.zeros_like(x)
    for k in range(POINTS):
        between = (x + (2 * k + 1) / (2 * POINTS) * (z - x)).requires_grad_()
        slopes = slopes + torch.autograd.grad(entropy(model, between, label), between, create_graph=True)[0]
    return (z - x) * slopes / POINTS


FORMULAS: dict[str, Formula] = {
    "normal": lambda m, x, t, z: entropy(m, x, t),
    "pgd": lambda m, x, t, z: entropy(m, z, t),
    "trades": lambda m, x, t, z: entropy(m, x, t) + 6 * divergence(m, x, z),
    "ig-norm": lambda m, x, t, z: entropy(m, x, t) + integrated(m, x, t, z).abs().sum(),
    "ig-norm-sum": lambda m, x, t, z: entropy(m, z, t) + integrated(m, x, t, z).abs().sum(),
    "int-one-class": lambda m, x, t, z: entropy(m, x, t) + GAMMA * change(m, x, z, t),
    "int": lambda m, x, t, z: entropy(m, x, t) + GAMMA * apart(m, x, t, z),
    "int2": lambda m, x, t, z: entropy(m, x, t) + GAMMA * apart(m, x, t, z),
    "int-adv": lambda m, x, t, z: entropy(m, z, t) + GAMMA * apart(m, x, t, z),
    "int2-adv": lambda m, x, t, z: entropy(m, z, t) + GAMMA * apart(m, x, t, z),
}


def inner(name: str) -> Formula:
    """What the attack maximises."""
    match name:
        case "trades":
            return lambda m, x, t, z: divergence(m, x, z)
        case "int" | "int-adv":
            return apart
        case "int-one-class":
            return lambda m, x, t, z: change(m, x, z, t)
        case _:
            return lambda m, x, t, z: entropy(m, z, t)


def climbed(model: ConvNet, x: Tensor, y: Tensor, goal: Formula, eps: float) -> list[Tensor]:
    """The best of the points that signed gradient steps visit, example by example, from the same random start."""
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    found = []
    for one, t, z, a, b in zip(x, y.tolist(), low + torch.rand_like(x) * (high - low), low, high, strict=True):
        path = [z]
        for _ in range(STEPS):
            at = path[-1].clone().requires_grad_()
            slope = torch.autograd.grad(goal(model, one, t, at), at)[0]
            path.append((path[-1] + 2.5 / STEPS * (b - a) / 2 * slope.sign()).clamp(a, b))
        found.append(max(path, key=lambda p: float(goal(model, one, t, p).detach())))
    return found


def value_and_slope(value: Tensor, model: ConvNet) -> tuple[float, Tensor]:
    slopes = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return float(value.detach()), torch.cat([s.flatten() for s in slopes])


def expected(name: str, formula: Formula, goal: Formula, eps: float = EPS) -> tuple[float, Tensor]:
    model, (x, y) = net(), batch()
    torch.manual_seed(3)
    moved = climbed(model, x, y, goal, eps)
    value = sum(formula(model, one, t, z) for one, t, z in zip(x, y.tolist(), moved, strict=True)) / len(x)
    return value_and_slope(value, model)  # type: ignore[arg-type]


def ours(name: str, passed: float = 1.0) -> tuple[float, Tensor]:
    model, (x, y) = net(), batch()
    torch.manual_seed(3)
    return value_and_slope(method(name, eps=EPS, steps=STEPS, gamma=GAMMA)(model, x, y, passed), model)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_and_its_gradient_are_those_of_the_formula(name):
    (value, slope), (want, wanted) = ours(name), expected(name, FORMULAS[name], inner(name))
    assert value == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(slope, wanted, rtol=1e-7, atol=1e-9)


def frozen_share(m: ConvNet, x: Tensor, t: int, z: Tensor) -> Tensor:
    """The softmax at x instead of the attacked point."""
    f = m(x[None])[0]
    share = [0.0 if i == t else float(torch.exp(f[i].detach())) for i in range(CLASSES)]
    return sum(s / sum(share) * change(m, x, z, i) for i, s in enumerate(share)) / 2 + change(m, x, z, t) / 2  # type: ignore[return-value]


BROKEN: list[tuple[str, str, Formula, Formula]] = [
    ("the gain is subtracted", "int", lambda m, x, t, z: entropy(m, x, t) - GAMMA * apart(m, x, t, z), apart),
    ("no half", "int", lambda m, x, t, z: entropy(m, x, t) + 2 * GAMMA * apart(m, x, t, z), apart),
    ("shares at x", "int", lambda m, x, t, z: entropy(m, x, t) + GAMMA * frozen_share(m, x, t, z), frozen_share),
    ("one class only", "int", FORMULAS["int-one-class"], inner("int-one-class")),
    ("inner attack on labels", "int", FORMULAS["int"], inner("int2")),
    ("inner attack on maps", "int2", FORMULAS["int2"], inner("int")),
    ("cross entropy at x", "int-adv", FORMULAS["int"], apart),
    ("maps are not normalised", "int-one-class", lambda m, x, t, z: entropy(m, x, t) + 16 * GAMMA * change(m, x, z, t),
     inner("int-one-class")),
    ("divergence the other way", "trades", lambda m, x, t, z: entropy(m, x, t) + 6 * divergence(m, z, x),
     inner("trades")),
    ("divergence subtracted", "trades", lambda m, x, t, z: entropy(m, x, t) - 6 * divergence(m, x, z),
     inner("trades")),
    ("inner attack on the label", "trades", FORMULAS["trades"], inner("pgd")),
    ("the attack descends", "pgd", FORMULAS["pgd"], lambda m, x, t, z: -entropy(m, z, t)),
    ("gradients are not integrated", "ig-norm",
     lambda m, x, t, z: entropy(m, x, t) + integrated(m, x, t, z).sum().abs(), inner("ig-norm")),
]  # fmt: skip


@pytest.mark.parametrize(("slip", "name", "formula", "goal"), BROKEN, ids=[b[0] for b in BROKEN])
def test_a_slip_in_a_formula_would_show(slip, name, formula, goal):
    (value, _), (want, _) = ours(name), expected(name, formula, goal)
    assert abs(value - want) > 1e-5 * abs(want), f"{slip}: {value} and {want} agree"


@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "normal"])
def test_distances_grow_over_the_first_three_tenths(name):
    want, _ = expected(name, FORMULAS[name], inner(name), eps=EPS / 3)
    assert ours(name, passed=0.1)[0] == pytest.approx(want, rel=1e-9)
    assert ours(name, passed=0.3)[0] == ours(name, passed=1.0)[0] != pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", ["int", "int-one-class", "int2", "int-adv", "int2-adv", "trades"])
def test_a_step_is_one_forward_pass_more_than_adversarial_training(name):
    """The clean input's: it is what the cost of a step beyond that of `pgd` consists of."""
    counts = {}
    for kind in ("pgd", name):
        model, passes = net(), []
        model.features.register_forward_hook(lambda *_, seen=passes: seen.append(1))
        method(kind, eps=EPS, steps=STEPS)(model, *batch())
        counts[kind] = len(passes)
    assert counts[name] == counts["pgd"] + 1 == STEPS + 3


# ---------------------------------------------------------------- theorems


def test_the_norm_of_integrated_gradients_is_at_least_the_rise_of_the_loss():
    """They add up to the rise, up to the quadrature: IG-Norm bounds adversarial training's loss from above."""
    model, (x, y) = net(), batch()
    torch.manual_seed(3)
    many = IgNorm(EPS, STEPS, points=100)(model, x, y)
    torch.manual_seed(3)
    assert (many - method("pgd", eps=EPS, steps=STEPS)(model, x, y)).item() > -1e-4


@pytest.mark.parametrize("explains", [Cam(), GradCam(), IntegratedGradients(2)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("one", [False, True])
def test_int_of_any_map_is_the_formula_over_that_map(explains, one):
    """The outer loss, given the attacked point: gradients through the map included."""
    model, (x, y) = net(), batch()
    torch.manual_seed(3)
    value = Int(EPS, 0, GAMMA, one=one, map=explains)(model, x, y)
    torch.manual_seed(3)
    low, high = (x - EPS).clamp(min=0), (x + EPS).clamp(max=1)
    z = low + torch.rand_like(x) * (high - low)
    total = torch.zeros((), dtype=torch.float64)
    for i, t in enumerate(y.tolist()):
        here, there = (Explained(*(v[0] for v in explains(model, p[i : i + 1]))) for p in (x, z))
        moved = [(here.maps[c] - there.maps[c]).abs().sum() for c in range(CLASSES)]
        others = [c for c in range(CLASSES) if c != t]
        shares = torch.softmax(torch.stack([there.logits[c] for c in others]), 0)
        both = moved[t] / 2 + sum(s * moved[c] for s, c in zip(shares, others, strict=True)) / 2
        total = total + entropy(model, x[i], t) + GAMMA * (moved[t] if one else both)
    (ours_, slope), (want, wanted) = value_and_slope(value, model), value_and_slope(total / len(x), model)
    assert ours_ == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(slope, wanted, rtol=1e-7, atol=1e-9)
