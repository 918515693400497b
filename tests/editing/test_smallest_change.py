"""The change that an edit makes is the smallest in its norm, and within its bound."""

import dataclasses
import importlib
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, nnls
from tests.editing.edits import deployed, problem
from tests.editing.test_trunk import Decoder, Mlp, made

import soundly
from soundly import at
from soundly.errors import InvalidInput

search = importlib.import_module("soundly.editing.candidate")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


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


@pytest.mark.parametrize("captured", [True, False])
def test_a_layer_without_a_bias_gets_none_from_retained_inputs(captured):
    model, x = made(Mlp, bias=False)
    kept = [torch.randn_like(x) for _ in range(3)]
    network = soundly.load(model, x) if captured else model
    constraint = at(x).output(1).at_least(float(model(x).detach()[0, 1]) + 2)
    result = soundly.edit(network, [constraint], layer="fc", retain=kept, retain_weight=10.0)
    assert result.certificate is not None and not result.certificate.arrays["weights"][:, -1].any()
    assert float(result.delta[1][-1]) == 0.0 < float(result.delta[1].norm())
