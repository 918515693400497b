"""Whole edits: what is called proved holds when autograd looks again, and nothing else is ever called proved."""

import dataclasses
import importlib
import math
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, nnls
from tests.editing.test_program import Values, gradcam, gradient, integrated, normalised, place_and_gradient
from tests.editing.test_trunk import Cnn, Decoder, Mlp, Tied, made
from torch import Tensor, nn

import soundly
from soundly import Edit, at
from soundly.certificate import Certificate, check
from soundly.editing.program import Program, compile_program
from soundly.editing.trunk import trunk_of
from soundly.errors import CertificateError, EditError, InvalidInput
from soundly.graph.network import Network

editor = importlib.import_module("soundly.editing.edit")
search = importlib.import_module("soundly.editing.candidate")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def of_kind(kind: str, model: nn.Module, x: Tensor) -> Network | nn.Module:
    return soundly.load(model, x) if kind == "graph" else model


def deployed(edit: Edit, original: nn.Module) -> nn.Module:
    """The edited model as a module."""
    assert edit.status == "proved", (edit.status, edit.reason)
    assert edit.model is not None and edit.certificate is not None and check(edit.certificate).accepted
    return (edit.model if isinstance(edit.model, nn.Module) else edit.applied_to(original, layer="fc")).eval()


def exact_rows(edit: Edit) -> bool:
    """All rows of the certificate in rational arithmetic: the checker's answer by other means."""
    a = edit.certificate.arrays
    weights = a["weights"]
    if weights.dtype == np.uint16:
        weights = (weights.astype(np.uint32) << 16).view(np.float32)
    cache: dict[int, Fraction] = {}
    for i, (lower, upper) in enumerate(zip(a["lower"].tolist(), a["upper"].tolist(), strict=True)):
        row = Fraction(0)
        for k in range(a["row_start"][i], a["row_start"][i + 1]):
            t = int(a["row_value"][k])
            if t not in cache:
                v, w = a["vectors"][a["value_vector"][t]].tolist(), weights[a["value_class"][t]].tolist()
                cache[t] = sum((Fraction(p) * Fraction(q) for p, q in zip(v, w, strict=True)), Fraction(0))
            row += Fraction(float(a["row_coefficient"][k])) * cache[t]
        if not lower <= row <= upper:
            return False
    return True


# -- what is proved holds


@pytest.mark.parametrize("kind", ["graph", "module"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolutional_network_does_what_was_proved(kind, bias):
    model, x = made(Cnn, bias=bias)
    other = torch.randn_like(x)
    start = torch.zeros_like(x)
    p, q = at(x, name="p"), at(other, name="q")
    groups = (torch.arange(x.numel()) % 5).reshape(x.shape)
    # Maps that some weights have: with four channels not every map is one.
    wanted, _ = made(Cnn, seed=1, bias=bias)
    wanted.load_state_dict({**model.state_dict(), **{k: v for k, v in wanted.state_dict().items() if k[:2] == "fc"}})
    target, mask = gradcam(wanted.eval(), x, 0), gradcam(wanted, x, 4)
    mask = mask > mask.sort().values[9:11].mean()
    ceiling = integrated(model.eval(), x, start, 3, 4)
    ceiling = torch.stack([ceiling[groups.flatten() == t].sum() for t in range(5)]) + 0.01
    before = model.fc.weight.detach().clone()
    result = soundly.edit(
        of_kind(kind, model, x),
        [
            p.classified(0, margin=0.2),
            q.classified(4, margin=0.1),
            p.gradcam(0, "block").normalised_near(target, eps=0.02),
            q.gradient(2, entries=[0, 5, 9]).at_least(0.01, name="monotone"),
            (p.gradient(1, entries=[3, 4]) - q.gradient(1, entries=[3, 4])).within(-0.001, 0.001, name="equal"),
            p.integrated_gradients(3, baseline=start, steps=4, groups=groups).at_most(ceiling),
            p.gradcam(4, "block").keeps_top(mask, margin=1e-5),
        ],
        layer="fc",
    )
    new = deployed(result, model)
    assert result.rows == result.proven and result.rows_before < result.rows and exact_rows(result)
    slack = 1e-9
    y = new(x)[0].detach(), new(other)[0].detach()
    for scores, label, margin in ((y[0], 0, 0.2), (y[1], 4, 0.1)):
        rivals = [c for c in range(5) if c != label]
        assert float(scores[label] - scores[rivals].max()) >= margin - slack
    exact = torch.tensor([float(v) for v in normalised(gradcam(new, x, 0))], dtype=torch.float64)
    scaled = (target - target.min()) / (target.max() - target.min())
    assert float((exact - scaled).abs().max()) <= 0.02 + slack
    assert float(gradient(new, other, 2)[[0, 5, 9]].min()) >= 0.01 - slack
    assert float((gradient(new, x, 1) - gradient(new, other, 1))[[3, 4]].abs().max()) <= 0.001 + slack
    ig = integrated(new, x, start, 3, 4)
    assert bool((torch.stack([ig[groups.flatten() == t].sum() for t in range(5)]) <= ceiling + slack).all())
    cam = gradcam(new, x, 4)
    assert float(cam[mask].min() - cam[~mask].max()) >= 1e-5 - slack
    assert torch.equal(model.fc.weight, before)


@pytest.mark.parametrize("kind", ["graph", "module"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_transformer_does_what_was_proved_at_several_tokens(kind, bias):
    model, x = made(Decoder, bias=bias)
    first, last = at(x, position=1, name="second token"), at(x, position=-1, name="last token")
    groups = torch.arange(4)[None, :, None].expand(x.shape)
    result = soundly.edit(
        of_kind(kind, model, x),
        [
            first.classified(6),
            last.classified(2, margin=0.5),
            last.integrated_gradients(2, baseline=torch.zeros_like(x), steps=5, groups=groups).at_least(0.05),
            last.gradient(3, place="attended", entries=[25, 31]).equals(0.25, tolerance=1e-3),
        ],
        layer="fc",
    )
    new = deployed(result, model)
    assert new(x)[0].argmax(1)[[1, 3]].tolist() == [6, 2]
    ig = integrated(new, x, torch.zeros_like(x), 2, 5, position=-1).reshape(4, 8).sum(1)
    assert float(ig.min()) >= 0.05 - 1e-9
    slope = place_and_gradient(new, x, 3, -1)[1].flatten()[[25, 31]]
    assert float((slope - 0.25).abs().max()) <= 1e-3 + 1e-9


@pytest.mark.parametrize("kind", ["graph", "module"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_every_storage_type_is_proved_as_stored(kind, dtype, norm):
    model, x = made(Mlp)
    model, x = model.to(dtype), x.to(dtype)
    box = at(x).gradient(1, entries=[0, 2]).within(0.2, 0.4)
    result = soundly.edit(of_kind(kind, model, x), [box, at(x).classified(2, margin=0.1)], layer="fc", norm=norm)
    new = deployed(result, model)
    assert exact_rows(result) and result.certificate.arrays["weights"].dtype != np.float16
    wide, far = new.double(), 1e-9 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 3e-2
    slope = gradient(wide, x.double(), 1)[[0, 2]]
    assert float(slope.min()) >= 0.2 - far and float(slope.max()) <= 0.4 + far
    y = wide(x.double())[0].detach()
    assert float(y[2] - y[:2].max()) >= 0.1 - far


def test_half_precision_heads_without_a_certificate_format_are_refused():
    model, x = made(Mlp)
    with pytest.raises((InvalidInput, EditError), match="float16"):
        soundly.edit(model.half(), [at(x.half()).output(0).at_least(1.0)], layer="fc")


def test_another_choice_of_extremes_is_tried_where_the_targets_own_cannot_be():
    target = torch.tensor([0.0, 0.02, 0.5, 0.99, 1.0], dtype=torch.float64)
    torch.manual_seed(0)
    model, x = Values(5).double(), torch.zeros(1, 5, dtype=torch.float64)
    with torch.no_grad():
        model.fc.weight[0] = target
    g = at(x).gradient(0)
    swapped = g.combined(torch.tensor([[1.0, -1.0, 0, 0, 0]])).at_least(0.01, name="first above second")
    result = soundly.edit(model, [g.normalised_near(target, eps=0.05), swapped], layer="fc")
    values = deployed(result, model).fc.weight[0].detach()
    assert values[0] >= values[1] + 0.01
    gaps = [abs(a - Fraction(b)) for a, b in zip(normalised(values), target.tolist(), strict=True)]
    assert max(gaps) <= Fraction(0.05)
    both = g.combined(torch.tensor([[1.0, 0, -1.0, 0, 0]])).at_least(0.01, name="first above third")
    refusal = soundly.edit(model, [g.normalised_near(target, eps=0.05), both], layer="fc")
    assert refusal.status == "infeasible" and refusal.model is None


def test_an_edit_that_is_not_needed_changes_nothing():
    model, x = made(Mlp)
    result = soundly.edit(model, [at(x).output(0).within(-100, 100)], layer="fc")
    assert result.rows_before == result.rows == 1
    assert torch.equal(deployed(result, model).fc.weight, model.fc.weight)
    assert all(float(d.abs().max()) == 0 for d in result.delta.values())


# -- the change is the smallest


def problem(seed: int = 0):
    model, x = made(Mlp, seed)
    other = torch.randn_like(x)
    constraints = [
        at(x).gradient(1).within(0.1, 0.3),
        at(other).output(1).at_least(1.0),
        at(other).gradient(1, entries=[1]).at_most(-0.2),
    ]
    return model, constraints, compile_program(trunk_of(model, "fc"), constraints)


def least(program, norm: str, bound: float = math.inf) -> float:
    """The optimal value of the same rows by scipy: a linear program, or Lawson and Hanson's least-distance problem."""
    (block,) = program.blocks()
    now = program.values(program.weights)[block.rows]
    a, low, high = block.matrix.numpy(), (program.lower - now).numpy(), (program.upper - now).numpy()
    g = np.concatenate([a[np.isfinite(low)], -a[np.isfinite(high)]])
    h = np.concatenate([low[np.isfinite(low)], -high[np.isfinite(high)]])  # g d >= h
    n = a.shape[1]
    if norm == "l2":
        u, _ = nnls(np.concatenate([g.T, h[None]]), np.append(np.zeros(n), 1.0), maxiter=10000)
        r = np.concatenate([g.T @ u, [h @ u - 1.0]])
        return float(np.linalg.norm(r[:n] / r[n]))
    if norm == "l1":
        found = linprog(np.ones(2 * n), np.hstack([-g, g]), -h, bounds=[(0, bound)] * 2 * n)
    else:
        rows = np.vstack([np.hstack([-g, np.zeros((len(g), 1))]), *(
            np.hstack([s * np.eye(n), -np.ones((n, 1))]) for s in (1, -1)
        )])  # fmt: skip
        found = linprog(
            np.append(np.zeros(n), 1.0),
            rows,
            np.append(-h, np.zeros(2 * n)),
            bounds=[(-bound, bound)] * n + [(0, None)],
        )
    assert found.status == 0
    return float(found.fun)


SIZE = {"l2": lambda d: float(d.norm()), "l1": lambda d: float(d.abs().sum()), "linf": lambda d: float(d.abs().max())}


@pytest.mark.parametrize("seed", range(3))
def test_each_norm_is_smallest_in_its_own_measure(seed):
    model, constraints, program = problem(seed)
    changes = {n: soundly.edit(model, constraints, layer="fc", norm=n).delta[1] for n in SIZE}
    for norm, size in SIZE.items():
        best = least(program, norm)
        assert best > 0.01 and size(changes[norm]) == pytest.approx(best, rel=1e-5)
        assert all(size(other) >= size(changes[norm]) * (1 - 1e-9) for other in changes.values())
    assert int((changes["l1"].abs() > 1e-12).sum()) < int((changes["l2"].abs() > 1e-12).sum())


@pytest.mark.parametrize("norm", SIZE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_weight_changes_by_more_than_the_bound(norm, dtype):
    model, constraints, program = problem()
    free = least(program, "linf")
    model = model.to(dtype)
    constraints = [dataclasses.replace(c, expression=_in_type(c.expression, dtype)) for c in constraints]
    result = soundly.edit(model, constraints, layer="fc", norm=norm, bound=1.05 * free)
    new = deployed(result, model)
    change = (new.fc.weight.double() - model.fc.weight.double()).detach().abs()
    assert float(change.max()) <= 1.05 * free
    assert all(float(d.abs().max()) <= 1.05 * free for d in result.delta.values())
    if norm == "l1" and dtype == torch.float64:
        assert SIZE["l1"](result.delta[1]) == pytest.approx(least(program, "l1", 1.05 * free), rel=1e-5)
    refusal = soundly.edit(model, constraints, layer="fc", norm=norm, bound=0.9 * free)
    assert refusal.status == "infeasible" and refusal.model is None and "may change by more" in refusal.reason


def _in_type(expression, dtype):
    terms = tuple(
        dataclasses.replace(
            t, functional=dataclasses.replace(t.functional, point=at(t.functional.point.x.to(dtype)))
        )
        for t in expression.terms
    )  # fmt: skip
    return dataclasses.replace(expression, terms=terms)


def test_a_solver_that_ignores_the_bound_is_not_believed(monkeypatch):
    model, constraints, program = problem()
    honest = search.least_change
    monkeypatch.setattr(search, "least_change", lambda *args, bound, **options: honest(*args, bound=None, **options))
    result = soundly.edit(model, constraints, layer="fc", bound=0.9 * least(program, "linf"))
    assert result.status == "unproven" and result.model is None


@pytest.mark.parametrize("bound", [1e-3, 1e-6, 1e-30, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bounds_below_the_rounding_of_the_type_are_infeasible_not_wrong(bound, dtype):
    model, x = made(Mlp)
    model, x = model.to(dtype), x.to(dtype)
    result = soundly.edit(model, [at(x).output(0).at_least(50.0)], layer="fc", bound=bound)
    assert result.status == "infeasible" and result.model is None


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_bounds_must_be_positive_numbers(bound):
    model, x = made(Mlp)
    with pytest.raises(InvalidInput, match="bound"):
        soundly.edit(model, [at(x).output(0).at_least(1.0)], layer="fc", bound=bound)


@pytest.mark.parametrize("kind", [Mlp, Decoder])
def test_retained_inputs_change_less(kind):
    model, x = made(kind)
    model.eval()
    kept = [torch.randn_like(x) for _ in range(3)]
    constraints = [
        at(x, position=-1).output(1).at_least(float(model(x).detach().reshape(-1, model.fc.out_features)[-1, 1]) + 2)
    ]
    changes, sizes = [], []
    for weight in (0.0, 10.0, 1e4):
        result = soundly.edit(model, constraints, layer="fc", retain=kept, retain_weight=weight)
        new = deployed(result, model)
        changes.append(sum(float((new(k) - model(k)).detach().square().sum()) for k in kept))
        sizes.append(float(result.delta[1].norm()))
    assert changes[0] > 1.2 * changes[1] > changes[2] and sizes[0] < sizes[1] < sizes[2]
    plain = soundly.edit(model, constraints, layer="fc")
    assert float(plain.delta[1].norm()) == pytest.approx(sizes[0], rel=1e-9)


# -- what cannot be is not proved


def infeasible(result: Edit, *names: str) -> None:
    """Nothing is returned, and the conflict names these constraints and no others."""
    assert result.status == "infeasible", (result.status, result.reason)
    assert result.model is None and result.certificate is None and result.delta == {} and result.proven == 0
    assert {re.sub(r" \[row \d+\]$", "", name) for name in result.conflict} == set(names), result.conflict
    assert all(name in result.reason for name in names)
    with pytest.raises(EditError, match="no proved edit"):
        result.applied_to(nn.Linear(1, 1), layer="fc")


def bystanders(x: Tensor) -> list:
    other = torch.flip(x, [-1]) + 0.3
    return [at(other, name="bystander").output(c).within(-5, 5, name=f"bystander {c}") for c in range(3)]


def test_contradictory_boxes_are_named():
    model, x = made(Mlp)
    g = at(x).gradient(0, entries=[0, 1])
    constraints = [g.within(0.0, 0.1, name="small"), *bystanders(x), g.within(0.2, 0.3, name="large")]
    infeasible(soundly.edit(model, constraints, layer="fc"), "small", "large")


def test_equal_features_with_disjoint_bounds_are_named():
    class Even(Mlp):
        def trunk(self, x: Tensor) -> Tensor:
            return super().trunk(x * x)

    model, x = made(Even)
    constraints = [
        at(x).output(1).at_most(0.0, name="low"),
        *bystanders(x),
        at(-x).output(1).at_least(0.5, name="high"),
    ]
    infeasible(soundly.edit(model, constraints, layer="fc"), "low", "high")
    for same in (x, x.clone()):  # the same point twice
        constraints[-1] = at(same).output(1).at_least(0.5, name="high")
        infeasible(soundly.edit(model, constraints, layer="fc"), "low", "high")


def test_two_classes_at_one_point_are_infeasible():
    model, x = made(Mlp)
    result = soundly.edit(model, [at(x, name="p").classified(0), at(x, name="p").classified(1)], layer="fc")
    assert result.status == "infeasible" and result.model is None
    assert set(name.split(" [")[0] for name in result.conflict) == {"class 0 at p", "class 1 at p"}


def test_an_equality_without_tolerance_is_refused_with_the_remedy():
    model, x = made(Mlp)
    box = at(x).gradient(0, entries=[1]).within(0.3, 0.3, name="exactly")
    result = soundly.edit(model, [box, *bystanders(x)], layer="fc")
    infeasible(result, "exactly")
    assert "widen" in result.reason


def test_more_independent_rows_than_weights_are_infeasible_and_the_rank_is_told():
    class Narrow(Mlp):
        def trunk(self, x: Tensor) -> Tensor:
            return super().trunk(x)[:, :1].expand(-1, 6)

    model, x = made(Narrow)
    points = [torch.randn_like(x) for _ in range(4)]
    constraints = [at(p, name=f"p{i}").output(0).equals(float((-1) ** i), tolerance=1e-6) for i, p in enumerate(points)]
    result = soundly.edit(model, constraints, layer="fc")
    assert result.status == "infeasible" and result.model is None
    rank = int(re.search(r"rank (\d+)", result.reason).group(1))
    assert rank == 2 and len(result.conflict) == 3  # one direction of features, and the bias


def test_a_gradient_that_no_weight_moves_is_infeasible():
    class Dead(Mlp):
        def trunk(self, x: Tensor) -> Tensor:
            return super().trunk(torch.cat([x[:, :1], x[:, :1], x[:, 2:]], 1))

    model, x = made(Dead)
    for kind in ("graph", "module"):
        m = of_kind(kind, model, x)
        infeasible(soundly.edit(m, [at(x).gradient(0, entries=[1]).at_least(0.1, name="dead")], layer="fc"), "dead")
        held = soundly.edit(m, [at(x).gradient(0, entries=[1]).within(-0.1, 0.1)], layer="fc")
        assert held.status == "proved" and held.rows_before == 1
    infeasible(soundly.edit(model, [(0.0 * at(x).output(1)).at_least(1.0, name="never")], layer="fc"), "never")


def test_rows_without_room_for_the_storage_type_are_not_proved_in_it():
    _, x = made(Mlp)
    for dtype, width in ((torch.float64, 1e-6), (torch.float32, 1e-3), (torch.bfloat16, 0.2)):
        m, y = made(Mlp)[0].to(dtype), x.to(dtype)
        fine = soundly.edit(m, [at(y).output(0).equals(0.7, tolerance=width)], layer="fc")
        assert fine.status == "proved" and exact_rows(fine)
        tight = soundly.edit(m, [at(y).output(0).equals(0.7, tolerance=width * 1e-9)], layer="fc")
        assert tight.status in ("unproven", "infeasible") and tight.model is None and tight.certificate is None


def test_no_time_is_a_limit():
    model, constraints, _ = problem()
    for time_limit in (0.0, -1.0, 1e-9):
        result = soundly.edit(model, constraints, layer="fc", time_limit=time_limit)
        assert result.status == "limit" and result.model is None and result.certificate is None
    assert soundly.edit(model, constraints, layer="fc", time_limit=60.0).status == "proved"


def test_arguments_out_of_range_are_refused():
    model, x = made(Mlp)
    fine = [at(x).output(0).at_least(1.0)]
    for options in ({"norm": "l3"}, {"norm": "l1", "retain": [x]}, {"retain": [x], "retain_weight": -1.0}):
        with pytest.raises(InvalidInput):
            soundly.edit(model, fine, layer="fc", **options)
    with pytest.raises(InvalidInput):
        soundly.edit("model.onnx", fine, layer="fc")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["edited row", "edited bias", "rival", "frozen part", "input"])
def test_numbers_that_are_not_finite_prove_nothing(bad, where):
    model, x = made(Mlp)
    point = at(x)
    with torch.no_grad():
        if where == "edited row":
            model.fc.weight[0, 2] = bad
        elif where == "edited bias":
            model.fc.bias[0] = bad
        elif where == "rival":
            model.fc.weight[1, 2] = bad
        elif where == "frozen part":
            model.b.weight.mul_(bad)
        else:
            point = dataclasses.replace(point, x=x * bad)
    for constraint in (point.output(0).at_least(1.0), point.classified(0), point.gradient(0).within(-9, 9)):
        if where == "rival" and not hasattr(constraint, "label"):
            continue  # a class that no row mentions is nobody's business
        try:
            result = soundly.edit(model, [constraint], layer="fc")
        except (InvalidInput, EditError):
            continue
        # tanh of an infinite value is finite: only then may anything hold.
        finite = where in ("frozen part", "input") and math.isinf(bad)
        assert finite or (result.status != "proved" and result.model is None)


# -- nothing is returned but what the checker accepted


def planted(fault):
    """A solver whose answers are changed by `fault`."""
    honest = search.least_change

    def solver(*args, **options):
        solution = honest(*args, **options)
        return dataclasses.replace(solution, delta=fault(solution.delta))

    return solver


FAULTS = {
    "nothing": torch.zeros_like,
    "too little": lambda d: 0.999 * d,
    "too much": lambda d: 3 * d,
    "backwards": lambda d: -d,
    "reversed": lambda d: d.flip(0),
    "nan": lambda d: d * math.nan,
    "overflow": lambda d: d * 1e300 * 1e300,
    "noise": lambda d: d + 1e-3 * torch.sin(torch.arange(len(d), dtype=d.dtype)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_answer_of_the_solver_is_never_proved(fault, monkeypatch):
    model, constraints, _ = problem()
    monkeypatch.setattr(search, "least_change", planted(FAULTS[fault]))
    result = soundly.edit(model, constraints, layer="fc")
    assert result.status in ("unproven", "limit") and result.model is None and result.certificate is None
    assert result.delta == {} and result.proven < result.rows and "time" not in result.reason


BLOCKS = {
    "sign": lambda b: dataclasses.replace(b, matrix=-b.matrix),
    "scale": lambda b: dataclasses.replace(b, matrix=2 * b.matrix),
    "order": lambda b: dataclasses.replace(b, matrix=b.matrix.flip(0)),
    "bias": lambda b: dataclasses.replace(
        b, matrix=b.matrix * (torch.arange(b.matrix.shape[1]) != b.matrix.shape[1] - 1)
    ),
    "frozen": lambda b: dataclasses.replace(b, frozen=b.frozen + 0.5),
    "classes": lambda b: dataclasses.replace(b, classes=(0,)),
}


@pytest.mark.parametrize("fault", BLOCKS)
def test_a_wrong_block_is_never_proved(fault, monkeypatch):
    model, constraints, _ = problem()
    honest = Program.blocks
    monkeypatch.setattr(Program, "blocks", lambda self: (BLOCKS[fault](b) for b in honest(self)))
    result = soundly.edit(model, constraints, layer="fc")
    assert result.status != "proved" and result.model is None and result.certificate is None


def test_a_wrong_answer_that_satisfies_the_rows_is_still_a_proof(monkeypatch):
    model, x = made(Mlp)
    monkeypatch.setattr(search, "least_change", planted(lambda d: 3 * d))
    result = soundly.edit(model, [at(x).output(1).at_least(2.0)], layer="fc")
    assert float(deployed(result, model)(x)[0, 1].detach()) >= 2.0


def test_a_solver_that_calls_a_feasible_program_infeasible_returns_nothing(monkeypatch):
    model, constraints, _ = problem()
    honest = search.least_change
    monkeypatch.setattr(
        search,
        "least_change",
        lambda *a, **o: dataclasses.replace(honest(*a, **o), delta=None, status="infeasible", conflict=(0,)),
    )
    result = soundly.edit(model, constraints, layer="fc")
    assert result.status == "infeasible" and result.model is None


def test_a_refused_certificate_is_never_a_proof(monkeypatch):
    model, constraints, _ = problem()
    honest = editor.check
    monkeypatch.setattr(editor, "check", lambda c: dataclasses.replace(honest(c), accepted=False))
    result = soundly.edit(model, constraints, layer="fc")
    assert result.status == "unproven" and result.model is None and result.certificate is None


def test_only_the_proved_weights_are_put_into_a_model():
    model, constraints, _ = problem()
    result = soundly.edit(model, constraints, layer="fc")
    arrays = {**result.certificate.arrays, "weights": result.certificate.arrays["weights"] * 1.5}
    wrong = dataclasses.replace(result, certificate=dataclasses.replace(result.certificate, arrays=arrays))
    with pytest.raises(EditError, match="differs from the certificate"):
        wrong.applied_to(model, layer="fc")


# -- the certificate and the model that comes with it


def checked(*args: str | Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-W", "error", "-m", "soundly", "check", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_another_process_accepts_the_certificate_and_the_saved_model(dtype, tmp_path):
    from safetensors.torch import save_file

    model, x = made(Mlp)
    model, x = model.to(dtype), x.to(dtype)
    result = soundly.edit(model, [at(x).classified(1), at(x).gradient(0, entries=[2]).within(0.1, 0.3)], layer="fc")
    file, saved, old = tmp_path / "edit.cert", tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    result.certificate.save(file)
    save_file(deployed(result, model).state_dict(), saved)
    save_file(model.state_dict(), old)
    accepted = checked(file, "--model", saved)
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    assert checked(file, "--model", old).returncode == 1
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert checked(file).returncode == 2


def test_the_certificate_tells_the_layer_and_the_weights_before_and_after():
    model, x = made(Mlp)
    for kind in ("graph", "module"):
        result = soundly.edit(of_kind(kind, model, x), [at(x).output(1).at_least(2.0, name="much")], layer="fc")
        new = deployed(result, model)
        said = result.certificate.header["model"]
        assert said["layer"] == "fc" and said["dtype"] == "float64" and said["name"] == "Mlp"
        assert said["before"] == editor.weights_hash(model.fc.weight, model.fc.bias)
        assert said["after"] == editor.weights_hash(new.fc.weight, new.fc.bias) != said["before"]
        assert result.certificate.header["claims"] == [{"name": "much", "rows": [0, 1]}]
        rows = result.certificate.arrays
        for c, row in zip(rows["classes"], rows["weights"], strict=True):
            assert torch.equal(torch.tensor(row[:-1]), new.fc.weight[c].detach()) and row[-1] == new.fc.bias[c]
            change = torch.cat([new.fc.weight[c] - model.fc.weight[c], (new.fc.bias[c] - model.fc.bias[c])[None]])
            assert torch.equal(result.delta[int(c)], change.detach())
        if isinstance(result.model, Network):
            torch.testing.assert_close(result.model(x), new(x), rtol=0, atol=1e-12)
            assert torch.equal(result.model.values[result.model.parameters["fc.weight"]], new.fc.weight)


def test_a_tampered_certificate_is_refused(tmp_path):
    model, constraints, _ = problem()
    certificate = soundly.edit(model, constraints, layer="fc").certificate
    path = tmp_path / "edit.cert"
    certificate.save(path)
    loaded = Certificate.load(path)
    assert check(loaded).accepted

    def changed(**arrays) -> Certificate:
        return dataclasses.replace(loaded, arrays={**loaded.arrays, **arrays})

    a = loaded.arrays
    shifted = np.array(a["lower"])
    shifted[np.isfinite(shifted)] += 1.0
    for other in (changed(weights=a["weights"] * 1.5), changed(lower=shifted), changed(vectors=a["vectors"][:, ::-1])):
        try:
            assert not check(other).accepted
        except CertificateError:
            pass
    data = path.read_bytes()
    for cut in (data[:-1], data[:100], b"", data + b"\0"):
        path.write_bytes(cut)
        with pytest.raises(CertificateError):
            check(path)


def test_hashes_do_not_depend_on_strides():
    block = torch.arange(7.0, dtype=torch.float64).reshape(1, 7)
    plain = editor.weights_hash(block[:, :-1].clone(), torch.tensor([6.0], dtype=torch.float64))
    assert editor.weights_hash(block[:, :-1], block[:, -1]) == plain
    wide = torch.arange(12.0).reshape(3, 4)
    assert editor.weights_hash(wide.T.contiguous().T, None) == editor.weights_hash(wide, None)
    assert editor.weights_hash(wide, None) != editor.weights_hash(wide.T, None)
    assert editor.weights_hash(wide, wide[:, 0]) != editor.weights_hash(wide, None)


def test_a_layer_with_one_output_can_be_edited():
    model, x = made(Mlp, classes=1)
    new = deployed(soundly.edit(model, [at(x).output(0).within(1.0, 1.5)], layer="fc"), model)
    assert 1.0 <= float(new(x).detach()) <= 1.5


def test_weights_of_very_different_size_are_stored_exactly():
    for dtype in (torch.float64, torch.float32):
        model = Values(3).to(dtype)
        with torch.no_grad():
            model.fc.weight[0] = torch.tensor([1.0, 1e8, -3e-7])
        x = torch.zeros(1, 3, dtype=dtype)
        wanted = at(x).gradient(0).within(torch.tensor([0.09, 1e-9, 5.0]), torch.tensor([0.11, 2e-9, 6.0]))
        result = soundly.edit(model, [wanted], layer="fc")
        if result.status == "proved":
            new = deployed(result, model).fc.weight[0].detach().double()
            assert 0.09 <= float(new[0]) <= 0.11 and 1e-9 <= float(new[1]) <= 2e-9 and 5.0 <= float(new[2]) <= 6.0
        else:
            assert result.model is None


def test_models_keep_their_class_their_buffers_and_their_modes():
    model, x = made(Cnn)
    model.train()
    model.block.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kept = x.clone()
    result = soundly.edit(model, [at(x).classified(3)], layer="fc")
    new = result.model
    assert type(new) is Cnn and new is not model
    assert new.training and not new.block.training and model.training and not model.block.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(
        torch.equal(value, state[name]) for name, value in new.state_dict().items() if not name.startswith("fc.")
    )
    assert not torch.equal(new.fc.weight, model.fc.weight) and new.fc.weight.requires_grad
    untouched = [c for c in range(5) if c != 3]
    assert torch.equal(new.fc.weight[untouched], model.fc.weight[untouched])
    assert new.stem[1].running_mean.data_ptr() != model.stem[1].running_mean.data_ptr()
    assert torch.equal(x, kept) and not any(m._forward_hooks for m in [*model.modules(), *new.modules()])


def test_a_model_whose_copy_still_calls_the_original_is_refused():
    class Closed(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.run = lambda x: self.fc(self.trunk(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    model, x = made(Closed)
    with pytest.raises(EditError, match="'fc'"):
        soundly.edit(model, [at(x).output(1).at_least(2.0)], layer="fc")


def test_networks_stay_as_they_were():
    model, x = made(Cnn)
    network = soundly.load(model, x)
    values = {node: value.clone() for node, value in network.values.items()}
    result = soundly.edit(network, [at(x).classified(3)], layer="fc")
    assert all(torch.equal(network.values[node], value) for node, value in values.items())
    assert isinstance(result.model, Network) and int(result.model(x).argmax()) == 3
    changed = [n for n, v in values.items() if not torch.equal(result.model.values[n], v)]
    assert {n.op.name for n in changed} == {"fc.weight", "fc.bias"}


def test_edits_are_deterministic(tmp_path):
    files = []
    for name in ("a", "b"):
        model, x = made(Cnn)
        constraints = [at(x).classified(3), at(x).gradcam(3, "block").at_least(0.001)]
        result = soundly.edit(soundly.load(model, x), constraints, layer="fc")
        result.certificate.save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_an_edit_is_applied_only_to_the_weights_it_was_made_for():
    model, x = made(Mlp)
    result = soundly.edit(soundly.load(model, x), [at(x).output(1).at_least(2.0)], layer="fc")
    assert float(result.applied_to(model, layer="fc")(x)[0, 1].detach()) >= 2.0
    stranger, _ = made(Mlp, seed=1)
    for other, layer in ((stranger, "fc"), (model, "a"), (model, "nowhere"), (made(Mlp)[0].float(), "fc")):
        with pytest.raises(EditError):
            result.applied_to(other, layer=layer)
    twin = made(Mlp)[0]
    twin.fc.bias = None
    with pytest.raises(EditError):
        result.applied_to(twin, layer="fc")
    shared = made(Mlp)[0]
    shared.alias = shared.fc
    with pytest.raises(EditError, match="alias"):
        result.applied_to(shared, layer="fc")


def test_a_tied_model_is_not_edited_through_its_untied_graph():
    torch.manual_seed(0)
    model, x = Tied("memory"), torch.randn(1, 6)
    result = soundly.edit(soundly.load(model, x), [at(x).output(1).at_least(2.0)], layer="fc")
    assert result.status == "proved"
    with pytest.raises(EditError, match="embed"):
        result.applied_to(model, layer="fc")


def test_two_maps_may_both_need_other_extremes():
    """Each map's own extreme positions are contradicted by an output box; neighbours within eps of them are not."""
    torch.manual_seed(3)
    weight = torch.eye(4, dtype=torch.float64)[:1].repeat(2, 1)
    layer = nn.Linear(4, 2).double()
    with torch.no_grad():
        layer.weight.copy_(weight + 0.1 * torch.randn_like(weight))
        layer.bias.zero_()
    model = nn.Sequential(nn.Identity(), layer)
    point = at(torch.ones(1, 4, dtype=torch.float64))
    target = torch.tensor([0.0, 0.02, 0.5, 1.0], dtype=torch.float64)
    constraints = []
    for c in (0, 1):
        gradient = point.gradient(c)  # the row w_c itself
        constraints.append(gradient.normalised_near(target, eps=0.1, spread=0.5))
        difference = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.float64)
        constraints.append(gradient.combined(difference).at_least(0.01))  # entry 0 must not be the smallest
    result = soundly.edit(model, constraints, layer="1")
    assert result.status == "proved", result.reason
    rows = result.model[1].weight.detach()
    for row in rows:
        scaled = (row - row.min()) / (row.max() - row.min())
        assert float((scaled - target).abs().max()) <= 0.1 + 1e-12 and float(row[0] - row[1]) >= 0.01 - 1e-12
