"""What rows say of counterexamples, where they are not above their slack: a part of the box, the sign of a value."""

from typing import Any

import numpy as np
import numpy.typing as npt

from soundly.certificate.program import Affine
from soundly.certificate.reading import Proof
from soundly.certificate.rings import U

Array = npt.NDArray[Any]


def row_signs(proof: Proof) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Rows that say of an inner value v which sign it has at counterexamples: by step and entry of v, the clause
    (numbered through the cases) and -1 for v <= 0 or +1 for v >= 0.

    Such a row has slack and constant 0 and reads one output, which is c v and nothing else, c != 0 whatever its error.
    """
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    last = proof.program.steps[-1]
    if not isinstance(last, Affine) or not last.weight_error < 0.5:
        return found
    rows = np.flatnonzero((proof.constant == 0) & (proof.slack == 0) & (np.diff(proof.start) == 1))
    rows = rows[proof.column[proof.start[rows]] < last.size]
    output = proof.column[proof.start[rows]]
    rows = rows[(last.bias[output] == 0) & (last.bias_error[output] == 0)]
    for begin in range(0, len(rows), proof.program.rows_at_once):
        some = rows[begin : begin + proof.program.rows_at_once]
        output, sign = proof.column[proof.start[some]], np.sign(proof.value[proof.start[some]])
        pair = np.searchsorted(proof.pair_rows, some, side="right") - 1
        count, where, entry = np.zeros((3, len(some)), int)
        for part, source in last.parts:
            c = part.rows_of(output)
            alone = np.count_nonzero(c, axis=1)
            count += alone
            at = np.abs(c).argmax(axis=1)
            where[alone == 1], entry[alone == 1] = source, at[alone == 1]
            sign = np.where(alone == 1, sign * np.sign(c[np.arange(len(c)), at]), sign)
        for k in np.flatnonzero((count == 1) & (sign != 0)).tolist():
            found.setdefault((int(where[k]), int(entry[k])), []).append((int(pair[k]), -int(sign[k])))
    return found


def clipped(
    a: Array, d: Array, slack: Array, lower: Array, upper: Array, contributions: int = 0
) -> tuple[Array, Array]:
    """For rows [R, n]: what a x + d <= slack leaves of each input's interval, infinite where that is everything."""
    n = a.shape[1]
    least = np.minimum(a * lower, a * upper)
    size = np.abs(a) * np.maximum(np.abs(lower), np.abs(upper))
    error = (2 * n + contributions + 16) * U * (size.sum(axis=1) + slack)
    total = d - slack + least.sum(axis=1) - 2 * error
    total -= 4 * U * np.abs(total)
    rest = total[:, None] - least
    rest -= 4 * U * (np.abs(total[:, None]) + np.abs(least))
    edge = -rest / a
    edge_up, edge_down = (edge + sign * (4 * U * np.abs(edge) + 2.0**-1000) for sign in (1, -1))
    known = np.isfinite(edge) & np.isfinite(rest)
    return np.where(known & (a < 0), edge_down, -np.inf), np.where(known & (a > 0), edge_up, np.inf)
