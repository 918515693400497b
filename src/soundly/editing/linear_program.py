"""The smallest point of a polyhedron {lower <= rows d <= upper} in the sum or maximum norm, by linear programs (HiGHS).

Two choices make dense rows affordable. Each norm is stated with few rows of its own: d = p - q with p, q >= 0 for the sum,
d = s - t with 0 <= s <= 2t for the maximum. And the given rows enter when they are violated, the most violated first, from
a warm start; so the value of each round bounds the optimum from below.
"""

import time
from dataclasses import dataclass
from typing import Literal

import highspy
import numpy as np
from scipy.linalg import lstsq
from scipy.sparse import csr_matrix, hstack, identity

from .least_norm import ACCEPTED, Array, Nearest

LOWER, UPPER = highspy.HighsBasisStatus.kLower, highspy.HighsBasisStatus.kUpper
BASIC = highspy.HighsBasisStatus.kBasic

BATCH = 300  # rows that enter in one round
TOLERANCE = 1e-9  # of the solver for rows and reduced costs, in units where the entries of d are about 1


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
    """Minimise the norm of d over lower <= rows d <= upper and |d_j| <= bound, given the solution in the Euclidean norm.

    Args:
        rows: unit rows [m, n].
        lower, upper: ends [m], lower <= upper, infinite where there is none.
        nearest: the point of least Euclidean norm, not 0, with its active rows; it fixes the units and the first rows.
        deadline: value of `time.monotonic()` after which to stop.
    """
    m, n = rows.shape
    assert nearest.point is not None
    unit = float(np.linalg.norm(nearest.point)) / np.sqrt(n)  # of d for the solver, whose tolerances are absolute
    solver = _program(n, norm, np.inf if bound is None else bound / unit)
    side, entered = np.zeros(m, dtype=np.int64), np.zeros(0, dtype=np.int64)
    new = np.flatnonzero((nearest.side[:m] != 0) | (lower > 0) | (upper < 0))
    lower_bound, rounds = 0.0, 0
    while len(new):
        block = rows[new]
        sparse = csr_matrix(np.hstack([block, -block] if norm == "l1" else [block, -block.sum(axis=1, keepdims=True)]))
        solver.addRows(
            len(new), lower[new] / unit, upper[new] / unit, sparse.nnz, sparse.indptr[:-1], sparse.indices, sparse.data
        )
        entered = np.append(entered, new)
        solver.setOptionValue("time_limit", solver.getRunTime() + min(max(0.0, deadline - time.monotonic()), 1e9))
        solver.run()
        rounds += 1
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return Vertex(None, side, lower_bound, rounds)
        lower_bound = max(lower_bound, unit * solver.getInfo().objective_function_value)
        columns = unit * np.array(solver.getSolution().col_value)
        point = columns[:n] - (columns[n:] if norm == "l1" else columns[n])
        excess = _excess(point, rows, lower, upper)
        excess[entered] = 0.0
        new = np.flatnonzero(excess > TOLERANCE * unit)
        new = new[np.argsort(-excess[new])[:BATCH]]
    basis = solver.getBasis()
    column, row = np.array(basis.col_status), np.array(basis.row_status)
    links, ends = row[: -len(entered)], row[-len(entered) :]
    side[entered[ends == LOWER]], side[entered[ends == UPPER]] = 1, -1
    if norm == "l1":
        inner = (column[:n] == BASIC) | (column[n:] == BASIC)
        together = np.zeros(n)
    else:
        inner = (column[:n] == BASIC) & (links == BASIC)
        together = np.where(inner, 0.0, np.where(column[:n] == BASIC, 1.0, -1.0))
        point = np.where(inner, point, together * columns[n])
    point = _polish(point, rows, lower, upper, side, inner, together)
    missed = float(_excess(point, rows, lower, upper).max())
    return Vertex(point if missed <= ACCEPTED * float(np.linalg.norm(point)) else None, side, lower_bound, rounds)


def _program(n: int, norm: str, bound: float) -> highspy.Highs:
    """The program without rows: columns (p, q) for d = p - q, or (s, t) for d = s - t with rows s_j - 2t <= 0."""
    columns = 2 * n if norm == "l1" else n + 1
    links = hstack([identity(n), np.full((n, 1), -2.0)]).tocsr() if norm == "linf" else csr_matrix((0, columns))
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = columns, links.shape[0]
    program.col_cost_ = np.ones(columns) if norm == "l1" else np.append(np.zeros(n), 1.0)
    program.col_lower_ = np.zeros(columns)
    program.col_upper_ = np.full(columns, bound) if norm == "l1" else np.append(np.full(n, np.inf), bound)
    program.row_lower_, program.row_upper_ = np.full(links.shape[0], -np.inf), np.zeros(links.shape[0])
    matrix = program.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kRowwise
    matrix.start_, matrix.index_, matrix.value_ = links.indptr, links.indices, links.data
    solver = highspy.Highs()
    options = {"output_flag": False, "threads": 1, "small_matrix_value": 1e-12}
    options |= {"primal_feasibility_tolerance": TOLERANCE, "dual_feasibility_tolerance": TOLERANCE}
    for name, choice in options.items():
        solver.setOptionValue(name, choice)
    solver.passModel(program)
    return solver


def _excess(point: Array, rows: Array, lower: Array, upper: Array) -> Array:
    value = rows @ point
    return np.maximum(np.maximum(lower - value, value - upper), 0.0)


def _polish(point: Array, rows: Array, lower: Array, upper: Array, side: Array, inner: Array, together: Array) -> Array:
    """Move the vertex in its own degrees of freedom so that its active rows hold to rounding, not only to TOLERANCE.

    Those are the entries `inner` (bool [n]) one by one, and all others in the direction `together` [n].
    """
    active = np.flatnonzero(side)
    moves = np.column_stack([rows[active][:, inner], rows[active] @ together])
    missing = np.where(side > 0, lower, upper)[active] - rows[active] @ point
    step = lstsq(moves, missing, lapack_driver="gelsy", check_finite=False)[0]
    polished = point + step[-1] * together
    polished[inner] += step[:-1]
    better = _excess(polished, rows, lower, upper).max() < _excess(point, rows, lower, upper).max()
    return polished if better else point
