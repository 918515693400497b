"""The smallest point of a polyhedron {lower <= rows d <= upper} in the sum or maximum norm, by linear programs.

Two choices make dense rows affordable. Each norm is stated with few rows of its own: d = p - q with p, q >= 0 for
the sum, d = s - t with 0 <= s <= 2t for the maximum. And the given rows enter when they are violated, the most violated
first, from a warm start; so the value of each round bounds the optimum from below. The solver is HiGHS.
"""

import time
from dataclasses import dataclass
from typing import Literal

import highspy
import numpy as np
from scipy.sparse import csr_matrix, hstack, identity

from .least_norm import ACCEPTED, Array, Nearest, excludes

OPTIMAL, INFEASIBLE = highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kInfeasible

BATCH = 300  # rows that enter in one round
TOLERANCE = 1e-10  # of the solver for rows and reduced costs, in units where the entries of d are about 1


@dataclass(frozen=True)
class Vertex:
    """What `smallest_vertex` found.

    Attributes:
        point: a smallest point [n]; None if the solver did not finish or its point misses a row by more than ACCEPTED.
        side: per row [m], 1 where its lower end is active, -1 where its upper end is, 0 elsewhere.
        lower_bound: no point of the polyhedron has a smaller norm, up to TOLERANCE.
        rounds: linear programs solved.
    """

    point: Array | None
    side: Array
    lower_bound: float
    rounds: int


def smallest_vertex(
    rows: Array,
    lower: Array,
    upper: Array,
    *,
    norm: Literal["l1", "linf"],
    nearest: Nearest,
    bound: float | None,
    deadline: float,
) -> Vertex:
    """Minimise the norm of d over lower <= rows d <= upper and |d_j| <= bound, given the least Euclidean solution.

    Args:
        rows: unit rows [m, n].
        lower, upper: ends [m], lower <= upper, infinite where there is none.
        nearest: the point of least Euclidean norm, not 0, with its active rows; it fixes the units and the first rows.
        deadline: value of `time.monotonic()` after which to stop.
    """
    m, n = rows.shape
    assert nearest.point is not None
    unit = float(np.linalg.norm(nearest.point)) / np.sqrt(n)  # of d for the solver, whose tolerances are absolute
    if norm == "l1":  # columns p, q
        solver = _solver(np.ones(2 * n), np.zeros(2 * n), np.full(2 * n, np.inf if bound is None else bound / unit))
    else:  # columns s, t with rows s_j - 2t <= 0; the least t is within the bound because some point is
        solver = _solver(np.append(np.zeros(n), 1.0), np.zeros(n + 1), np.full(n + 1, np.inf))
        _enter(solver, hstack([identity(n), np.full((n, 1), -2.0)]), np.full(n, -np.inf), np.zeros(n))
    side, entered, lower_bound, rounds = np.zeros(m, dtype=np.int64), np.zeros(0, dtype=np.int64), 0.0, 0
    new = _first(lower, upper, nearest)
    while len(new):
        block = rows[new]
        block = np.hstack([block, -block] if norm == "l1" else [block, -block.sum(axis=1, keepdims=True)])
        _enter(solver, block, lower[new] / unit, upper[new] / unit)
        entered = np.append(entered, new)
        rounds += 1
        if _run(solver, deadline) != OPTIMAL:
            return Vertex(None, side, lower_bound, rounds)
        lower_bound = max(lower_bound, unit * solver.getInfo().objective_function_value)
        columns = unit * np.array(solver.getSolution().col_value)
        point = columns[:n] - (columns[n:] if norm == "l1" else columns[n])
        new = _violated(point, rows, lower, upper, entered, TOLERANCE * unit)
    ends = np.array(solver.getBasis().row_status[-len(entered) :])
    side[entered[ends == highspy.HighsBasisStatus.kLower]] = 1
    side[entered[ends == highspy.HighsBasisStatus.kUpper]] = -1
    missed = float(_excess(point, rows, lower, upper).max())
    return Vertex(point if missed <= ACCEPTED * float(np.linalg.norm(point)) else None, side, lower_bound, rounds)


def contradiction(
    rows: Array, lower: Array, upper: Array, *, nearest: Nearest, bound: float, deadline: float
) -> Array | None:
    """Look for rows that no d with |d_j| <= bound satisfies, given the nearest point without the bound.

    Returns:
        multipliers y [m], positive on lower and negative on upper ends, that `excludes` confirms; they are an extreme
        ray, so no row or bound they use can be left out. None if the rows are consistent or the search took too long.
    """
    n = rows.shape[1]
    solver = _solver(np.zeros(n), np.full(n, -1.0), np.full(n, 1.0))
    solver.setOptionValue("presolve", "off")  # it may find infeasibility without a ray
    solver.setOptionValue("simplex_iteration_limit", 2 * n)
    entered, new = np.zeros(0, dtype=np.int64), _first(lower, upper, nearest)
    while len(new):
        _enter(solver, rows[new], lower[new] / bound, upper[new] / bound)
        entered = np.append(entered, new)
        outcome = _run(solver, deadline)
        if outcome == INFEASIBLE:
            _, exists, ray = solver.getDualRay()  # type: ignore[attr-defined] # missing in highspy's stubs
            y = np.zeros(len(rows))
            y[entered] = np.where(np.abs(ray) > 1e-12 * np.max(np.abs(ray)), ray, 0.0) if exists else 0.0
            return y if excludes(y, rows, lower, upper, radius=bound, norm="linf") else None
        if outcome != OPTIMAL:
            return None
        point = bound * np.array(solver.getSolution().col_value)
        new = _violated(point, rows, lower, upper, entered, TOLERANCE * bound)
    return None


def _solver(cost: Array, lower: Array, upper: Array) -> highspy.Highs:
    """A linear program over columns with these costs and bounds, and no rows yet."""
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = len(cost), 0
    program.col_cost_, program.col_lower_, program.col_upper_ = cost, lower, upper
    program.a_matrix_.start_ = np.zeros(len(cost) + 1, dtype=np.int32)
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("small_matrix_value", 1e-12)
    solver.setOptionValue("primal_feasibility_tolerance", TOLERANCE)
    solver.setOptionValue("dual_feasibility_tolerance", TOLERANCE)
    solver.passModel(program)
    return solver


def _enter(solver: highspy.Highs, rows: Array, lower: Array, upper: Array) -> None:
    sparse = csr_matrix(rows)
    solver.addRows(len(lower), lower, upper, sparse.nnz, sparse.indptr[:-1], sparse.indices, sparse.data)


def _run(solver: highspy.Highs, deadline: float) -> highspy.HighsModelStatus:
    # HiGHS compares its limit with the time of all runs together.
    solver.setOptionValue("time_limit", solver.getRunTime() + min(max(0.0, deadline - time.monotonic()), 1e9))
    solver.run()
    return solver.getModelStatus()


def _first(lower: Array, upper: Array, nearest: Nearest) -> Array:
    return np.flatnonzero((nearest.side[: len(lower)] != 0) | (lower > 0) | (upper < 0))


def _violated(point: Array, rows: Array, lower: Array, upper: Array, entered: Array, tolerance: float) -> Array:
    """The rows to enter next: those violated most, among the ones that the program does not have yet."""
    excess = _excess(point, rows, lower, upper)
    excess[entered] = 0.0
    worst = np.argsort(-excess)[:BATCH]
    return worst[excess[worst] > tolerance]


def _excess(point: Array, rows: Array, lower: Array, upper: Array) -> Array:
    value = rows @ point
    return np.maximum(np.maximum(lower - value, value - upper), 0.0)
