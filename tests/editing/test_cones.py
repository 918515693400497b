"""Norms and cosines: edits against autograd, scipy and rational arithmetic, and against solvers that are wrong."""

import dataclasses
import importlib
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tests.certificate.test_cones import meant
from tests.editing.edits import deployed, of_kind
from tests.editing.test_program import gradcam, gradient
from tests.editing.test_trunk import Cnn, Mlp, made
from tests.editing.test_wrong_answers import FAULTS, planted
from torch import Tensor

import soundly
from soundly import at
from soundly.certificate import Certificate, check
from soundly.editing.cones import SecondOrderCone
from soundly.editing.confirm import confirm
from soundly.editing.program import Program, compile_program
from soundly.editing.trunk import trunk_of
from soundly.errors import InvalidInput

search = importlib.import_module("soundly.editing.candidate")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double().flatten() @ b.double().flatten() / (a.double().norm() * b.double().norm()))


@pytest.mark.parametrize("kind", ["graph", "module"])
@pytest.mark.parametrize("seed", range(3))
def test_the_cosine_to_a_teacher(kind, seed):
    model, x = made(Cnn, seed)
    teacher = gradcam(made(Cnn, seed + 10)[0].eval(), x, 1).detach().abs() + gradcam(model.eval(), x, 1).detach()
    before = cosine(gradcam(model, x, 1), teacher)
    aim = (1 + before) / 2
    demand = at(x).gradcam(1, "block").cosine_at_least(aim, teacher=1e3 * teacher)
    edit = soundly.edit(of_kind(kind, model, x), [demand, at(x).classified(2)], layer="fc")
    edited = deployed(edit, model)
    assert aim <= cosine(gradcam(edited, x, 1), teacher) <= aim + 1e-5 and int(edited(x).argmax()) == 2
    assert all(meant(edit.certificate)) and edit.rows == edit.proven == len(teacher) + 2 + 5
    assert edit.held_before[0] is False and edit.rows_before < edit.rows and edit.smallest


@pytest.mark.parametrize("kind", ["graph", "module"])
def test_norms_of_gradients_and_of_differences(kind):
    model, x = made(Mlp)
    other = torch.randn_like(x)
    teacher = gradient(model.eval(), x, 0) + 0.05
    p, q = at(x), at(other)
    demands = [
        p.gradient(1).norm_at_most(0.5 * float(gradient(model, x, 1).norm())),
        (p.gradient(0) - teacher).norm_at_most(0.04),
        (q.gradient(2) - p.gradient(2)).norm_at_most(0.1 * q.output(2) + 0.01),
        q.output(2).at_least(0.2),
    ]
    edit = soundly.edit(of_kind(kind, model, x), demands, layer="fc")
    edited = deployed(edit, model)
    assert float(gradient(edited, x, 1).norm()) <= 0.5 * float(gradient(model, x, 1).norm())
    assert float((gradient(edited, x, 0) - teacher).norm()) <= 0.04
    gap, y = gradient(edited, other, 2) - gradient(edited, x, 2), float(edited(other)[0, 2].detach())
    assert float(gap.norm()) <= 0.1 * y + 0.01 and y >= 0.2
    assert all(meant(edit.certificate))
    assert not any(edit.held_before[:2])


def program_of(model, constraints) -> Program:
    return compile_program(trunk_of(model, "fc"), constraints)


def least(program: Program, norm: str) -> float:
    """The optimum by sequential least squares from several starts: the problem is convex."""
    (block,) = program.blocks()
    a, now = block.matrix.numpy(), program.values(program.weights)[block.rows].numpy()
    lower, upper = program.lower[block.rows].numpy() - now, program.upper[block.rows].numpy() - now
    n, spans = a.shape[1], block.cones.tolist()
    linear = [i for i in range(len(a)) if not any(first <= i <= last for first, last in spans)]
    split = {"l2": lambda v: v, "l1": lambda v: v[:n] - v[n:], "linf": lambda v: v[:n]}[norm]
    cost = {"l2": lambda v: v @ v, "l1": lambda v: v.sum(), "linf": lambda v: v[-1]}[norm]
    size = {"l2": n, "l1": 2 * n, "linf": n + 1}[norm]

    def room(v):
        d = split(v)
        value = a @ d
        found = [value[i] - lower[i] for i in linear if np.isfinite(lower[i])]
        found += [upper[i] - value[i] for i in linear if np.isfinite(upper[i])]
        for first, last in spans:
            found.append(value[last] - lower[last] - np.linalg.norm(value[first:last] - lower[first:last]))
        if norm == "linf":
            found += [*(v[-1] - d), *(v[-1] + d)]
        return np.array(found)

    bounds = [(0, None)] * size if norm == "l1" else None
    best = math.inf
    for seed in range(4):
        start = np.abs(np.random.default_rng(seed).standard_normal(size))
        found = minimize(cost, start, constraints={"type": "ineq", "fun": room}, bounds=bounds, method="SLSQP",
                         options={"maxiter": 1000, "ftol": 1e-12})  # fmt: skip
        if found.success and room(found.x).min() > -1e-7:
            best = min(best, float(found.fun))
    return math.sqrt(best) if norm == "l2" else best


SIZE = {"l2": lambda d: float(d.norm()), "l1": lambda d: float(d.abs().sum()), "linf": lambda d: float(d.abs().max())}


@pytest.mark.parametrize("norm", SIZE)
@pytest.mark.parametrize("seed", range(2))
def test_the_change_is_the_smallest(norm, seed):
    model, x = made(Mlp, seed)
    teacher = torch.randn(4, generator=torch.Generator().manual_seed(seed)).double()
    constraints = [
        at(x).gradient(1).cosine_at_least(0.8, teacher=teacher, length=0.05),
        at(-x).gradient(1).norm_at_most(0.5 * float(gradient(model.eval(), -x, 1).norm())),
        at(x).output(1).at_least(0.3),
    ]
    edit = soundly.edit(model, constraints, layer="fc", norm=norm)
    best = least(program_of(model, constraints), norm)
    assert best > 0.01 and SIZE[norm](edit.delta[1]) == pytest.approx(best, rel=1e-4)


def test_a_cone_joins_the_outputs_it_is_about():
    model, x = made(Mlp)
    program = program_of(
        model, [(at(x).gradient(0) - at(x).gradient(2)).norm_at_most(0.1), at(x).output(1).at_least(0)]
    )
    assert sorted(block.classes for block in program.blocks()) == [(0, 2), (1,)]


def test_rows_of_several_outputs_in_one_cone():
    """Each entry is about another output; the cone makes them one block."""
    model, x = made(Mlp)
    first = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    both = at(x).output(0).combined(first) + at(x).output(1).combined(first.flip(0))
    program = program_of(model, [(both - torch.tensor([1.0, 2.0])).norm_at_most(0.1)])
    assert [block.classes for block in program.blocks()] == [(0, 1)]
    y = deployed(soundly.edit(model, [(both - torch.tensor([1.0, 2.0])).norm_at_most(0.1)], layer="fc"), model)(x)[0]
    assert math.hypot(float(y[0].detach()) - 1, float(y[1].detach()) - 2) <= 0.1


def test_contradictions_are_named():
    model, x = made(Mlp)
    teacher = torch.randn(4).double()
    map = at(x).gradient(1)
    demands = [
        map.cosine_at_least(0.6, teacher=teacher, name="towards"),
        map.cosine_at_least(0.9, teacher=-teacher, name="away"),
        at(x).output(0).at_least(1.0),
    ]
    edit = soundly.edit(model, demands, layer="fc")
    assert edit.status == "infeasible" and edit.model is None
    assert {name.split(" [")[0] for name in edit.conflict} == {"towards", "away"}
    small = map.norm_at_most(1e-9, name="small")
    edit = soundly.edit(model, [small, at(x).output(1).at_least(-100)], layer="fc", bound=1e-4)
    assert edit.status == "infeasible" and set(edit.conflict) == {"small"} and "0.0001" in edit.reason


def test_a_bound_and_retained_inputs_go_with_cones():
    model, x = made(Mlp)
    half = at(x).gradient(1).norm_at_most(0.5 * float(gradient(model.eval(), x, 1).norm()))
    free = soundly.edit(model, [half], layer="fc")
    least = float(soundly.edit(model, [half], layer="fc", norm="linf").delta[1].abs().max())
    assert float(free.delta[1].abs().max()) > 1.1 * least
    bounded = soundly.edit(model, [half], layer="fc", bound=1.05 * least)
    assert bounded.status == "proved" and float(bounded.delta[1].abs().max()) <= 1.05 * least
    assert soundly.edit(model, [half], layer="fc", bound=0.95 * least).status == "infeasible"
    kept = soundly.edit(model, [half], layer="fc", retain=[-x], retain_weight=1e4)
    moved = [abs(float((deployed(e, model)(-x) - model(-x))[0, 1].detach())) for e in (free, kept)]
    assert moved[1] < 0.05 * moved[0]


def test_the_time_limit_is_kept():
    model, x = made(Mlp)
    half = at(x).gradient(1).norm_at_most(1e-3)
    edit = soundly.edit(model, [half], layer="fc", time_limit=1e-9)
    assert edit.status == "limit" and edit.model is None


# -- what is wrong is not proved


def demands(model, x):
    teacher = gradient(made(Mlp, 5)[0].eval(), x, 1)
    return [at(x).gradient(1).cosine_at_least(0.9, teacher=teacher), at(-x).gradient(1).norm_at_most(0.2)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_answer_of_the_solver_is_never_proved(fault, monkeypatch):
    model, x = made(Mlp)
    monkeypatch.setattr(search, "least_change", planted(FAULTS[fault]))
    result = soundly.edit(model, demands(model, x), layer="fc")
    assert result.status != "proved" or all(meant(result.certificate))
    assert result.status in ("unproven", "limit", "infeasible") or fault == "too much"


CUTS = {
    "too weak": lambda cone, delta: dataclasses.replace(cone, radius=cone.radius * 1.5, spare=cone.spare * 1.5),
    "of other rows": lambda cone, delta: dataclasses.replace(cone, rows=cone.rows.flip(0)),
    "without targets": lambda cone, delta: dataclasses.replace(cone, lower=0 * cone.lower, upper=0 * cone.upper),
    "never": lambda cone, delta: dataclasses.replace(cone, rows=0 * cone.rows, spare=1e9),
}  # fmt: skip


@pytest.mark.parametrize("fault", CUTS)
def test_wrong_cuts_prove_nothing(fault, monkeypatch):
    model, x = made(Mlp)
    honest = SecondOrderCone.cut
    monkeypatch.setattr(SecondOrderCone, "cut", lambda cone, delta: honest(CUTS[fault](cone, delta), delta))
    result = soundly.edit(model, demands(model, x), layer="fc")
    assert result.status != "proved" and result.model is None and result.certificate is None


def test_cuts_keep_what_the_cone_allows():
    """Each cut holds at every point of the cone, and fails where it was made."""
    draw = torch.Generator().manual_seed(0)
    seen = 0
    for _ in range(200):
        k, n = int(torch.randint(1, 6, (1,), generator=draw)), 4
        rows, radius = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((k, n), (n,)))
        lower = torch.randn(k, generator=draw, dtype=torch.float64)
        upper = lower + torch.rand(k, generator=draw, dtype=torch.float64) * (torch.arange(k) % 2)
        cone = SecondOrderCone(rows, lower, upper, radius, 1.0, 1e-3)
        at_point = torch.randn(n, generator=draw, dtype=torch.float64)
        cut = cone.cut(at_point)
        others = torch.randn(2000, n, generator=draw, dtype=torch.float64)
        value = others @ rows.T
        missed = (value - value.clamp(lower, upper)).norm(dim=1)
        allowed = others[missed <= (1 - 1e-6) * (others @ radius + 1.0) - 1e-3]
        assert bool((allowed @ cut.row >= cut.lower - 1e-12).all())
        if cut.excess > 1e-2:
            assert float(cut.row @ at_point) < cut.lower
            seen += len(allowed)
    assert seen > 1000


def test_tampered_certificates_prove_the_same_or_nothing():
    model, x = made(Mlp)
    constraints = [*demands(model, x), at(x).output(0).within(-1.0, 1.0)]
    network = soundly.load(model, x)
    edit = soundly.edit(network, constraints, layer="fc")
    certificate, rng, refused = edit.certificate, np.random.default_rng(0), 0
    assert confirm(certificate, edit.model, constraints) == [] and check(certificate).accepted
    for _ in range(200):
        arrays = {name: np.array(array) for name, array in certificate.arrays.items()}
        name = str(rng.choice(["cones", "lower", "upper", "row_coefficient", "vectors", "row_value", "value_class"]))
        flat = arrays[name].reshape(-1)
        i = int(rng.integers(0, len(flat)))
        old = flat[i].copy()
        flat[i] = -old if flat.dtype.kind == "f" and rng.random() < 0.5 else old + 1
        if flat[i] == old or (np.isnan(flat[i]) and np.isnan(old)):
            continue
        other = Certificate(certificate.header, arrays)
        result = check(other)
        if result.accepted:
            assert all(meant(other))
            kept = confirm(other, edit.model, constraints) == []
            last = [claim.stop - 1 for claim in program_of(network, constraints).claims]
            assert not kept or (name == "lower" and i == last[0] and flat[i] > 0), (name, i)
        refused += not result.accepted
    assert refused > 60


def test_weaker_cones_are_not_the_constraints():
    model, x = made(Mlp)
    network, constraints = soundly.load(model, x), demands(model, x)
    edit = soundly.edit(network, constraints, layer="fc")
    teacher = gradient(made(Mlp, 5)[0].eval(), x, 1)
    norm = constraints[1]
    for others in (
        [at(x).gradient(1).cosine_at_least(0.91, teacher=teacher), norm],
        [at(x).gradient(1).cosine_at_least(0.9, teacher=teacher.flip(0)), norm],
        [at(x).gradient(1).cosine_at_least(0.9, teacher=teacher, length=100.0), norm],
        [constraints[0], at(-x).gradient(1).norm_at_most(0.19)],
        [constraints[0], (at(-x).gradient(1) - 1e-3).norm_at_most(0.2)],
        [constraints[0], at(-x).gradient(0).norm_at_most(0.2)],
    ):
        assert confirm(edit.certificate, edit.model, others)
    assert confirm(edit.certificate, edit.model, constraints) == []


def test_what_does_not_fit_is_refused():
    model, x = made(Mlp)
    map = at(x).gradient(1)
    for radius in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidInput, match="radius"):
            map.norm_at_most(radius)
    for value in (0.0, 1.0, -0.5, math.nan):
        with pytest.raises(InvalidInput, match="between 0 and 1"):
            map.cosine_at_least(value, teacher=torch.ones(4))
    with pytest.raises(InvalidInput, match="not zero"):
        map.cosine_at_least(0.5, teacher=torch.zeros(4))
    with pytest.raises(InvalidInput, match="length"):
        map.cosine_at_least(0.5, teacher=torch.ones(4), length=0.0)
    wrong = {
        "4 entries, its teacher 3": map.cosine_at_least(0.5, teacher=torch.ones(3)),
        "needs a map of its own": (map + 1.0).cosine_at_least(0.5, teacher=torch.ones(4)),
        "must be one number": map.norm_at_most(at(x).gradient(0)),
        "zero before the edit": (0.0 * map).cosine_at_least(0.5, teacher=torch.ones(4)),
    }
    for text, constraint in wrong.items():
        with pytest.raises(InvalidInput, match=text):
            soundly.edit(model, [constraint], layer="fc")
    with pytest.raises(InvalidInput, match="last layer"):
        soundly.edit(soundly.load(model, x), [map.norm_at_most(0.1)], layer="b")


def test_a_radius_near_the_smallest_possible_one(monkeypatch):
    """More cuts than there is patience for: the answer keeps the cone, but is not called the smallest."""
    model, x = made(Mlp)
    map, limit = at(x).gradient(1), float(gradient(model.eval(), x, 1).norm())
    demand = (map - gradient(made(Mlp, 7)[0].eval(), x, 1)).norm_at_most(0.05 * limit)
    patient = soundly.edit(model, [demand], layer="fc")
    assert patient.status == "proved" and patient.smallest
    monkeypatch.setattr(search, "CUTS", 28)
    hasty = soundly.edit(model, [demand], layer="fc")
    assert hasty.status == "proved" and not hasty.smallest and all(meant(hasty.certificate))
    least = float(patient.delta[1].norm())
    assert least * (1 - 1e-6) <= float(hasty.delta[1].norm()) <= 1.05 * least
    monkeypatch.setattr(search, "CUTS", 2)
    edit = soundly.edit(model, [demand], layer="fc")
    assert edit.status == "limit" and edit.model is None
