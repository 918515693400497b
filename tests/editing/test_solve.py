"""Least changes against references that share nothing with the solver.

An optimum in the Euclidean norm is recognised by the Karush-Kuhn-Tucker conditions, checked from scratch on the change
alone: scipy's non-negative least squares must write its gradient as a combination of active rows with the right signs.
The other norms, feasibility and conflicts are compared with one plain, unsplit linear program (scipy.optimize.linprog).
"""

import math
import time

import highspy
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog, nnls
from torch import Tensor

from soundly.editing import least_norm, linear_program
from soundly.editing.least_norm import excludes, nearest_point
from soundly.editing.linear_program import contradiction
from soundly.editing.solve import Solution, least_change
from soundly.errors import InvalidInput

Array = NDArray[np.float64]
Problem = tuple[Array, Array, Array]  # rows [m, n], lower [m], upper [m]
INF = math.inf


def solve(problem: Problem, **options: object) -> Solution:
    rows, lower, upper = (torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in problem)
    return least_change(rows, lower, upper, **options)  # type: ignore[arg-type]


def kkt_error(problem: Problem, d: Array, *, bound: float = INF, metric: Array | None = None) -> float:
    """How far d is, relative to its size, from the minimum of d @ metric @ d over the problem and |d_j| <= bound."""
    rows, lower, upper = problem
    size = np.linalg.norm(rows, axis=1)
    rows, lower, upper = (
        rows[size > 0] / size[size > 0, None],
        lower[size > 0] / size[size > 0],
        upper[size > 0] / size[size > 0],
    )
    rows = np.concatenate([rows, np.eye(len(d))])
    lower, upper = np.append(lower, np.full(len(d), -bound)), np.append(upper, np.full(len(d), bound))
    unit = max(np.linalg.norm(d), 1e-300)
    value = rows @ d
    missed = max(0.0, float(np.max(lower - value)), float(np.max(value - upper))) / unit
    active = np.concatenate([rows[value <= lower + 1e-9 * unit], -rows[value >= upper - 1e-9 * unit]])
    gradient = d if metric is None else metric @ d
    if not len(active) or not gradient.any():
        return missed + float(np.linalg.norm(gradient)) / unit
    return missed + nnls(active.T, gradient, maxiter=100 * len(active))[1] / float(np.linalg.norm(gradient))


def smallest_norm(problem: Problem, norm: str, bound: float = INF) -> float | None:
    """The optimum of the plain linear program over (d, t); None if it is infeasible."""
    rows, lower, upper = problem
    n = rows.shape[1]
    extra = n if norm == "l1" else 1
    link = np.eye(n) if norm == "l1" else np.ones((n, 1))
    wide = np.hstack([rows, np.zeros((len(rows), extra))])
    has_upper, has_lower = np.isfinite(upper), np.isfinite(lower)
    matrix = np.vstack(
        [wide[has_upper], -wide[has_lower], np.hstack([np.eye(n), -link]), np.hstack([-np.eye(n), -link])]
    )
    ends = np.concatenate([upper[has_upper], -lower[has_lower], np.zeros(2 * n)])
    cost = np.append(np.zeros(n), np.ones(extra))
    limits = [(-bound, bound)] * n + [(0, None)] * extra
    outcome = linprog(cost if norm != "none" else 0 * cost, A_ub=matrix, b_ub=ends, bounds=limits, method="highs")
    assert outcome.status in (0, 2), outcome.message
    return float(outcome.fun) if outcome.status == 0 else None


def consistent(problem: Problem, rows: tuple[int, ...], bound: float = INF) -> bool:
    chosen = list(rows)
    part = problem[0][chosen], problem[1][chosen], problem[2][chosen]
    return smallest_norm(part, "none", bound) is not None


def feasible_problem(seed: int, m: int, n: int) -> Problem:
    """Rows around a known solution: repeated, opposite, dependent, zero, badly scaled; equal and missing ends."""
    draw = np.random.default_rng(seed)
    rows = draw.standard_normal((m, n))
    if seed % 2:  # rank at most 3
        rows = draw.standard_normal((m, min(3, n))) @ draw.standard_normal((min(3, n), n))
    for i in range(1, m):
        kind = draw.integers(8)
        if kind == 0:
            rows[i] = rows[draw.integers(i)]
        elif kind == 1:
            rows[i] = -rows[draw.integers(i)]
        elif kind == 2:
            rows[i] = rows[draw.integers(i)] - 2 * rows[draw.integers(i)]
        elif kind == 3:
            rows[i] = 0.0
    value = rows @ (3 * draw.standard_normal(n))
    below, above = draw.exponential(size=m), draw.exponential(size=m)
    tight = draw.random(m) < 0.3
    below[tight], above[tight & (draw.random(m) < 0.5)] = 0.0, 0.0
    lower, upper = value - below, value + above
    lower[(draw.random(m) < 0.3) & ~tight], upper[draw.random(m) < 0.3] = -INF, INF
    scale = 10.0 ** draw.integers(-3, 4, m)
    return rows * scale[:, None], lower * scale, upper * scale


def integer_problem(seed: int, m: int, n: int) -> Problem:
    """Small integers, so that feasible and infeasible problems are both common and never a matter of rounding."""
    draw = np.random.default_rng(seed)
    lower = draw.integers(-3, 4, m).astype(float)
    upper = lower + draw.integers(0, 3, m)
    lower[draw.random(m) < 0.4], upper[draw.random(m) < 0.4] = -INF, INF
    return draw.integers(-2, 3, (m, n)).astype(float), lower, upper


def gradcam_problem(
    images: int, n: int, *, eps: float = 0.05, seed: int = 0
) -> tuple[Problem, Array, list[Array], list[Array]]:
    """Normalised Grad-CAM rows of one class on synthetic features; also the weights, map operators and targets."""
    draw = np.random.default_rng(seed)
    weights = 0.02 * draw.standard_normal(n)
    rows, lower, maps, targets = [], [], [], []
    for _ in range(images):
        features = np.maximum(draw.standard_normal((49, n)), 0)
        clean = np.maximum(features + 0.5 * draw.standard_normal((49, n)), 0) @ weights
        target = (clean - clean.min()) / np.ptp(clean)
        p, q = int(clean.argmin()), int(clean.argmax())
        span = features[q] - features[p]
        for j in set(range(49)) - {p, q}:
            rows.append(features[j] - features[p] - max(0.0, target[j] - eps) * span)
            rows.append(min(1.0, target[j] + eps) * span - features[j] + features[p])
        rows.append(span)
        lower += [0.0] * 94 + [0.1 * np.ptp(clean)]
        maps.append(features)
        targets.append(target)
    matrix = np.array(rows)
    return (matrix, np.array(lower) - matrix @ weights, np.full(len(rows), INF)), weights, maps, targets


shapes = {"seed": st.integers(0, 10**6), "m": st.integers(1, 14), "n": st.integers(1, 9)}


@settings(max_examples=150)
@given(**shapes)
def test_the_least_square_change_satisfies_the_kkt_conditions(seed: int, m: int, n: int) -> None:
    problem = feasible_problem(seed, m, n)
    found = solve(problem)
    assert found.status == "optimal" and found.delta is not None
    d = found.delta.numpy()
    assert kkt_error(problem, d) < 1e-7
    assert found.objective == pytest.approx(d @ d) and found.lower_bound == pytest.approx(d @ d, rel=1e-8, abs=1e-15)
    value, ends = problem[0] @ d, np.stack(problem[1:])
    size = np.linalg.norm(problem[0], axis=1) * np.linalg.norm(d)
    assert all(np.abs(ends[:, i] - value[i]).min() <= 1e-9 * size[i] for i in found.active)
    assert found.residual == pytest.approx(
        max(0.0, np.max(ends[0] - value), np.max(value - ends[1])), abs=1e-13 * size.max()
    )


@settings(max_examples=150)
@given(**shapes)
def test_feasibility_agrees_with_linprog_and_conflicts_are_irreducible(seed: int, m: int, n: int) -> None:
    problem = integer_problem(seed, m, n)
    found = solve(problem)
    assert found.status in ("optimal", "infeasible")
    assert (found.status == "optimal") == consistent(problem, tuple(range(m)))
    if found.status == "optimal":
        assert found.delta is not None and kkt_error(problem, found.delta.numpy()) < 1e-7
    else:
        assert found.delta is None and not found.bound_in_conflict and found.lower_bound == INF
        assert not consistent(problem, found.conflict)
        for i in found.conflict:
            assert consistent(problem, tuple(j for j in found.conflict if j != i))


@settings(max_examples=100)
@given(**shapes, bound=st.sampled_from([0.3, 1.0, 2.5]))
def test_the_bound_is_kept_or_named_in_the_conflict(seed: int, m: int, n: int, bound: float) -> None:
    problem = integer_problem(seed, m, n)
    found = solve(problem, bound=bound)
    if found.status == "optimal":
        assert found.delta is not None and float(found.delta.abs().max()) <= bound
        assert kkt_error(problem, found.delta.numpy(), bound=bound) < 1e-7
    else:
        assert found.status == "infeasible" and not consistent(problem, found.conflict, bound)
        assert found.bound_in_conflict == consistent(problem, found.conflict)


@settings(max_examples=60)
@given(**shapes, norm=st.sampled_from(["l1", "linf"]), bound=st.sampled_from([None, 1.0, 2.5]))
def test_other_norms_agree_with_the_plain_linear_program(
    seed: int, m: int, n: int, norm: str, bound: float | None
) -> None:
    problem = integer_problem(seed, m, n) if seed % 3 else feasible_problem(seed, m, n)
    found = solve(problem, norm=norm, bound=bound)
    expected = smallest_norm(problem, norm, INF if bound is None else bound)
    if expected is None:
        assert found.status == "infeasible" and not consistent(problem, found.conflict, INF if bound is None else bound)
        return
    assert found.status == "optimal" and found.delta is not None
    d = found.delta.numpy()
    assert found.objective == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert found.objective == pytest.approx(np.abs(d).sum() if norm == "l1" else np.abs(d).max(initial=0.0))
    assert found.lower_bound == pytest.approx(found.objective, rel=1e-7, abs=1e-12)
    value, slack = problem[0] @ d, 1e-9 * np.linalg.norm(problem[0], axis=1) * np.linalg.norm(d)
    assert (value >= problem[1] - slack).all() and (value <= problem[2] + slack).all()
    assert bound is None or np.abs(d).max() <= bound


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), r=st.integers(1, 12), weight=st.sampled_from([0.0, 0.5, 30.0, 1e6]))
@example(seed=1000000, r=1, weight=1e6)  # dependent rows that whitening blurs into independent ones
def test_retained_features_enter_the_objective(seed: int, r: int, weight: float) -> None:
    problem, n = feasible_problem(seed, 6, 5), 5
    retain = np.random.default_rng(seed).standard_normal((r, n))
    retain[-1] = retain[0]  # singular retain @ retain.T whenever r > 1
    metric = np.eye(n) + weight / r * retain.T @ retain
    found = solve(problem, retain=torch.from_numpy(retain), retain_weight=weight)
    assert found.status == "optimal" and found.delta is not None
    d = found.delta.numpy()
    assert kkt_error(problem, d, metric=metric) < 1e-6
    assert found.objective == pytest.approx(d @ metric @ d, rel=1e-8)
    assert found.lower_bound == pytest.approx(d @ metric @ d, rel=1e-8, abs=1e-12)


def test_retained_equalities_have_the_closed_form() -> None:
    draw = np.random.default_rng(0)
    rows, retain, b = draw.standard_normal((20, 60)), draw.standard_normal((15, 60)), draw.standard_normal(20)
    inverse = np.linalg.inv(np.eye(60) + 7.0 / 15 * retain.T @ retain)
    expected = inverse @ rows.T @ np.linalg.solve(rows @ inverse @ rows.T, b)
    found = solve((rows, b, b), retain=torch.from_numpy(retain), retain_weight=7.0)
    assert found.delta is not None and np.allclose(found.delta.numpy(), expected, rtol=0, atol=1e-12)
    tight = solve((rows, b, b), retain=torch.from_numpy(retain), retain_weight=7.0, bound=0.7 * np.abs(expected).max())
    assert tight.status == "optimal" and tight.delta is not None
    metric = np.eye(60) + 7.0 / 15 * retain.T @ retain
    assert kkt_error((rows, b, b), tight.delta.numpy(), bound=0.7 * np.abs(expected).max(), metric=metric) < 1e-8


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), m=st.integers(1, 30), n=st.integers(1, 12))
def test_any_starting_guess_ends_at_the_same_answer(seed: int, m: int, n: int) -> None:
    rows, lower, upper = feasible_problem(2 * seed, m, n)
    size = np.linalg.norm(rows, axis=1)
    part = size > 0
    a, low, high = (
        torch.from_numpy(x[part])
        for x in (rows / np.maximum(size, 1e-9)[:, None], lower / size.clip(1e-9), upper / size.clip(1e-9))
    )
    side = torch.from_numpy(np.random.default_rng(seed).integers(-1, 2, int(part.sum())))
    side[(side > 0) & ~low.isfinite()] = 0
    side[(side < 0) & ~high.isfinite()] = 0
    first, second = nearest_point(a, low, high), nearest_point(a, low, high, side=side)
    assert first.finished and second.finished and first.point is not None and second.point is not None
    assert np.allclose(first.point, second.point, rtol=0, atol=1e-8 * max(1e-9, np.linalg.norm(first.point)))


def test_single_exchanges_alone_reach_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, *_ = gradcam_problem(2, 300)
    whole = solve(problem)
    monkeypatch.setattr(least_norm, "guess_active", lambda rows, lower, upper, side, deadline: (side, 0))
    single = solve(problem)
    assert whole.iterations < 15 < single.iterations
    assert (
        whole.delta is not None
        and single.delta is not None
        and torch.allclose(whole.delta, single.delta, rtol=0, atol=1e-12)
    )


def test_every_single_exchange_raises_the_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(5)
    rows = draw.standard_normal((200, 30))
    value = rows @ draw.standard_normal(30)
    problem = rows, value - 0.2 * draw.random(200), value + 0.2 * draw.random(200)
    lengths: list[float] = []
    honest = least_norm._Active.solve

    def recorded(self: least_norm._Active) -> tuple[Array, Array]:
        point, multipliers = honest(self)
        assert not lengths or (multipliers * self.side[self.index] >= -1e-12).all()
        lengths.append(float(np.linalg.norm(point)))
        return point, multipliers

    monkeypatch.setattr(least_norm, "guess_active", lambda rows, lower, upper, side, deadline: (side, 0))
    monkeypatch.setattr(least_norm._Active, "solve", recorded)
    found = solve(problem)
    assert found.delta is not None and kkt_error(problem, found.delta.numpy()) < 1e-9
    assert len(lengths) > 1.5 * len(found.active)  # rows left again on the way
    assert (np.diff(lengths[1:-2]) > 0).all()  # the rest is the fresh factorisation at either end


def test_a_known_conflict_is_found_among_many_harmless_rows() -> None:
    draw = np.random.default_rng(3)
    rows = draw.standard_normal((60, 40))
    lower = np.where(draw.random(60) < 0.2, 0.5, -1.0)
    rows[50] = rows[3] + rows[17] - 2 * rows[31]
    upper = np.full(60, INF)
    lower[[3, 17]], upper[31], upper[50] = 1.0, -1.0, 3.9  # the three force rows[50] @ d >= 4
    found = solve((rows, lower, upper))
    assert found.status == "infeasible" and found.conflict == (3, 17, 31, 50) and not found.bound_in_conflict
    upper[50] = 4.1
    assert solve((rows, lower, upper)).status == "optimal"


def test_rows_that_only_a_very_long_change_satisfies_are_not_called_infeasible() -> None:
    rows = np.array([[1.0, 0.0], [1.0, 1e-5]])
    problem = rows, np.array([1.0, -INF]), np.array([INF, 0.0])
    found = solve(problem)
    assert found.status == "optimal" and found.delta is not None and kkt_error(problem, found.delta.numpy()) < 1e-7
    assert found.delta[1] == pytest.approx(-1e5)
    bounded = solve(problem, bound=1e3)
    assert bounded.status == "infeasible" and bounded.conflict == (0, 1) and bounded.bound_in_conflict


def test_what_rounding_blurs_is_neither_solved_nor_called_infeasible() -> None:
    rows = np.array([[1.0, 0.0], [1.0, 5e-14]])  # d = (1, -2e5) solves the problem below
    problem = rows, np.array([1.0, -INF]), np.array([INF, 1.0 - 1e-8])
    found = solve(problem)
    assert found.status == "limit" and found.delta is not None and found.residual == pytest.approx(1e-8)


def test_a_bound_that_contradicts_many_rows_at_once() -> None:
    problem, *_ = gradcam_problem(1, 200, seed=1)
    smallest = smallest_norm(problem, "linf")
    assert smallest is not None
    bounded = solve(problem, bound=0.9 * smallest)
    assert bounded.status == "infeasible" and bounded.bound_in_conflict
    assert not consistent(problem, bounded.conflict, 0.9 * smallest)
    above = solve(problem, bound=1.05 * smallest)
    assert above.status == "optimal" and above.delta is not None
    assert kkt_error(problem, above.delta.numpy(), bound=1.05 * smallest) < 1e-7


def test_a_certificate_is_believed_only_if_it_excludes() -> None:
    rows, lower, upper = (
        np.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]]),
        np.array([1.0, -INF, 2.0]),
        np.array([INF, 0.5, INF]),
    )
    good = np.array([1.0, -1.0, 0.0])
    assert excludes(good, rows, lower, upper, radius=1e12)
    assert not excludes(-good, rows, lower, upper, radius=1.0)  # asks for the missing ends
    assert not excludes(np.array([1.0, -1.0, 1e-3]), rows, lower, upper, radius=1e6)  # does not cancel
    assert not excludes(
        np.array([0.0, 0.0, 1.0]), rows, lower, upper, radius=2.1
    )  # a far row excludes near points only
    assert excludes(np.array([0.0, 0.0, 1.0]), rows, lower, upper, radius=1.9)
    assert not excludes(np.array([np.nan, -1.0, 0.0]), rows, lower, upper, radius=1.0)
    assert excludes(np.array([0.0, 0.0, 1.0]), rows, lower, upper, radius=1.4, norm="linf")
    assert not excludes(np.array([0.0, 0.0, 1.0]), rows, lower, upper, radius=1.5, norm="linf")


def test_a_contradiction_exists_only_below_the_least_bound() -> None:
    (rows, lower, upper), *_ = gradcam_problem(1, 200, seed=1)
    size = np.linalg.norm(rows, axis=1)
    unit = rows / size[:, None], lower / size, upper / size
    nearest = nearest_point(*(torch.from_numpy(x) for x in unit))
    assert nearest.point is not None
    smallest = smallest_norm((rows, lower, upper), "linf")
    assert smallest is not None
    assert contradiction(*unit, nearest=nearest, bound=1.01 * smallest, deadline=INF) is None
    y = contradiction(*unit, nearest=nearest, bound=0.9 * smallest, deadline=INF)
    assert y is not None and not consistent((rows, lower, upper), tuple(np.flatnonzero(y)), 0.9 * smallest)


FAULTS = {
    "last active row dropped": lambda p, s: solve(tuple(np.delete(part, s.active[-1], axis=0) for part in p)).delta,
    "all violated rows made tight": lambda p, s: torch.from_numpy(np.linalg.pinv(p[0][p[1] > 0]) @ p[1][p[1] > 0]),
    "too long": lambda p, s: 1.001 * s.delta,
    "too short": lambda p, s: 0.999 * s.delta,
    "a step along the active rows' null space": lambda p, s: s.delta + 1e-3 * _orthogonal(p[0][list(s.active)]),
    "other norm": lambda p, s: solve(p, norm="l1").delta,
}


def _orthogonal(rows: Array) -> Tensor:
    return torch.from_numpy(np.linalg.svd(rows)[2][-1] * np.abs(rows).max())


@pytest.mark.parametrize("fault", FAULTS)
def test_the_kkt_check_catches_a_broken_solver(fault: str) -> None:
    problem, *_ = gradcam_problem(1, 100)
    found = solve(problem)
    assert found.delta is not None and kkt_error(problem, found.delta.numpy()) < 1e-9
    broken = FAULTS[fault](problem, found)
    assert broken is not None and kkt_error(problem, broken.numpy()) > 1e-5


def test_a_broken_bound_is_caught() -> None:
    problem, *_ = gradcam_problem(1, 100)
    free = solve(problem).delta
    assert free is not None
    bound = 0.8 * float(free.abs().max())
    kept = solve(problem, bound=bound).delta
    assert kept is not None and kkt_error(problem, kept.numpy(), bound=bound) < 1e-9
    assert kkt_error(problem, free.numpy(), bound=bound) > 1e-3
    assert kkt_error(problem, free.clamp(-bound, bound).numpy(), bound=bound) > 1e-5


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_a_gradcam_block_of_resnet_size(norm: str) -> None:
    images, n = (5, 2048) if norm == "l2" else (1, 512)
    problem, weights, maps, targets = gradcam_problem(images, n)
    started = time.process_time()
    found = solve(problem, norm=norm)
    seconds = time.process_time() - started
    assert found.status == "optimal" and found.delta is not None
    edited = weights + found.delta.numpy()
    for features, target in zip(maps, targets, strict=True):
        new = features @ edited
        assert np.abs((new - new.min()) / np.ptp(new) - target).max() <= 0.05 + 1e-12
    assert np.abs(found.delta.numpy()).max() < 0.2
    if norm == "l2":
        assert kkt_error(problem, found.delta.numpy()) < 1e-10
        assert seconds < 5  # takes 0.1 s on an idle core


def test_an_ill_conditioned_function_block() -> None:
    t, draw = np.linspace(-1, 1, 2048), np.random.default_rng(0)
    rows = np.tanh(
        np.outer(t, 3 * draw.standard_normal(100)) + draw.standard_normal(100)
    )  # singular values 3e2 .. 1e-13
    problem = rows, np.sin(4 * t) - 1e-3, np.sin(4 * t) + 1e-3
    found = solve(problem)
    assert found.status == "optimal" and found.delta is not None
    assert found.residual <= 1e-11 and kkt_error(problem, found.delta.numpy()) < 1e-6


def test_running_out_of_time_is_said() -> None:
    problem, *_ = gradcam_problem(3, 600)
    best = solve(problem)
    cut = solve(problem, time_limit=1e-9)
    assert cut.status == "limit" and cut.delta is not None
    assert cut.residual > 0 and cut.lower_bound <= best.objective


def test_running_out_of_time_in_the_linear_program_leaves_an_admissible_change(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, *_ = gradcam_problem(2, 600)
    best, square = solve(problem, norm="l1"), solve(problem)
    honest, rounds = linear_program._run, iter(range(2))

    def cut_short(solver: highspy.Highs, deadline: float) -> highspy.HighsModelStatus:
        outcome = honest(solver, deadline)
        return outcome if next(rounds, None) is not None else highspy.HighsModelStatus.kTimeLimit

    monkeypatch.setattr(linear_program, "BATCH", 1)
    monkeypatch.setattr(linear_program, "_run", cut_short)
    cut = solve(problem, norm="l1")
    assert cut.status == "limit" and cut.delta is not None and cut.residual <= 1e-12
    assert square.delta is not None and torch.equal(cut.delta, square.delta)
    assert 0 < cut.lower_bound <= best.objective * (1 + 1e-9) < cut.objective


def test_trivial_rows() -> None:
    eye = np.eye(3)
    nothing = solve((np.zeros((0, 3)), np.zeros(0), np.zeros(0)))
    assert (
        nothing.status == "optimal" and nothing.delta is not None and not nothing.delta.any() and nothing.residual == 0
    )
    for norm in ("l2", "l1", "linf"):
        held = solve((eye, -np.ones(3), np.array([0.0, 1.0, INF])), norm=norm)
        assert held.status == "optimal" and held.delta is not None and not held.delta.any() and held.objective == 0
    free = solve((eye, np.full(3, -INF), np.full(3, INF)))
    assert free.status == "optimal" and free.objective == 0
    rows = np.array([[1.0, 0, 0], [0, 0, 0], [0, 1.0, 0]])
    assert solve((rows, np.array([1.0, -1, 0]), np.array([2.0, 0, 0]))).objective == pytest.approx(1.0)
    assert solve((rows, np.array([1.0, 0.5, 0]), np.array([2.0, 1, 0]))).conflict == (1,)
    assert solve((rows, np.array([1.0, 0, 1]), np.array([2.0, 0, 0.9]))).conflict == (2,)
    assert solve((rows, np.array([INF, 0, 1]), np.array([INF, 0, 1]))).conflict == (0,)
    tiny = solve((1e-200 * eye, np.full(3, 1e-200), np.full(3, INF)))
    huge = solve((1e200 * eye, np.full(3, 1e200), np.full(3, INF)))
    for scaled in (tiny, huge):
        assert (
            scaled.status == "optimal"
            and scaled.delta is not None
            and torch.allclose(scaled.delta, torch.ones(3).double())
        )


def test_bad_arguments_are_named() -> None:
    rows, end = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for message, call in {
        "rows has dtype": lambda: least_change(rows.float(), end, end),
        "rows contains nan": lambda: least_change(rows * math.nan, end, end),
        "lower contains nan": lambda: least_change(rows, end * math.nan, end),
        "rows has shape": lambda: least_change(end, end, end),
        "one entry per row": lambda: least_change(rows, end[:2], end),
        "norm is": lambda: least_change(rows, end, end, norm="l0"),  # type: ignore[arg-type]
        "bound is": lambda: least_change(rows, end, end, bound=0.0),
        "time_limit is": lambda: least_change(rows, end, end, time_limit=math.nan),
        'retain needs norm="l2"': lambda: least_change(rows, end, end, norm="l1", retain=rows),
        "retain has shape": lambda: least_change(rows, end, end, retain=rows[:, :2]),
        "retain_weight is": lambda: least_change(rows, end, end, retain=rows, retain_weight=-1.0),
    }.items():
        with pytest.raises(InvalidInput, match=message):
            call()
