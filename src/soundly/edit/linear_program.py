"""The smallest point of a polyhedron {lower <= rows d <= upper} in the sum or maximum norm, by linear programs (HiGHS).

Two choices make dense rows affordable. Each norm is stated with bounds on variables instead of a pair of rows per entry: d = p - q with
p, q >= 0 for the sum, d = s - t with 0 <= s <= 2t for the maximum. And rows enter when they are violated, most violated first, from
a warm start; so the value of each round bounds the optimum from below.
"""

import time
from dataclasses import dataclass
from typing import Literal

import highspy
import numpy as np
from scipy.linalg import lstsq
from scipy.sparse import csr_matrix, hstack, identity

from .least_norm import ACCEPTED, Array

BATCH = 300  # rows that enter in one round


@dataclass(frozen=True)
class Vertex:
    """What `smallest_vertex` found.

    Attributes:
        point: a vertex of the optimal face [n]; None if the solver did not finish.
        side: per row [m], 1 where its lower end is active, -1 where its upper end is, 0 elsewhere.
        lower_bound: no point of the polyhedron has a smaller norm (as far as the solver's own tolerance of 1e-9 goes).
        rounds: linear programs solved.
    """

    point: Array | None
    side: Array
    lower_bound: float
    rounds: int


def smallest_vertex(
    rows: Array, lower: Array, upper: Array, *, norm: Literal["l1", "linf"], start: Array, bound: float = np.inf, deadline: float = np.inf
) -> Vertex:
    """Minimise the norm of d over lower <= rows d <= upper and |d_j| <= bound. The problem is known to be feasible.

    Args:
        rows: unit rows [m, n].
        lower, upper: ends [m], lower <= upper, infinite where there is none; zero must not satisfy all rows.
        start: which rows to begin with, bool [m]. Rows active in another norm are good ones.
        deadline: value of `time.monotonic()` after which to stop.
    """
    n = rows.shape[1]
    unit = max(float(np.max(lower)), float(np.max(-upper))) / np.sqrt(n)  # so that entries of rows and of d are about 1
    solver = _program(n, norm, bound / unit)
    low, high = lower / (unit * np.sqrt(n)), upper / (unit * np.sqrt(n))
    entered, new = np.zeros(0, dtype=int), np.flatnonzero(start)
    value, rounds = 0.0, 0
    while True:
        block = rows[new] * np.sqrt(n)
        block = np.hstack([block, -block] if norm == "l1" else [block, -block.sum(1, keepdims=True)])
        sparse = csr_matrix(block / np.sqrt(n) * np.sqrt(n))
        solver.addRows(len(new), low[new], high[new], sparse.nnz, sparse.indptr[:-1], sparse.indices, sparse.data)
        entered = np.append(entered, new)
        solver.setOptionValue("time_limit", solver.getRunTime() + max(0.0, min(deadline - time.monotonic(), 1e9)))
        solver.run()
