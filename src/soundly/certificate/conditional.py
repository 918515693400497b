"""Intervals that hold only where a clause could fail: what a certificate adds to a value before bounding it.

Suppose a point of a node satisfies every row of the clause, s <= slack. There v >= v + g (s - slack) for every g >= 0,
and the right side is a row like any other, to be carried back over the intervals that are known of such points. If an
interval becomes empty, there is no such point, and the clause is proven on the node.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from soundly.certificate.bounding import ABOVE, FLOOR, Frame, Splits, View, pieces
from soundly.certificate.program import MOST, Apply, Program, Times, nonlinear_sources
from soundly.certificate.rings import U

Array = npt.NDArray[np.float64]
Truths = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
Rows = Callable[[Integers], tuple[dict[int, Array], Array]]


@dataclass(frozen=True, eq=False)
class Conditions:
    """Bounds [R] to be found for some nodes, by node.

    Attributes:
        node, round, key: whose, in which round, and of what: 2 * neuron + side.
        slopes: [R, slots].
        of_row, row, times: entries (bound, row, multiplier g); ascending bounds.
        splits: of bounds, the splits on their nodes' paths with multipliers.
    """

    node: Integers
    round: Integers
    key: Integers
    slopes: Array
    of_row: Integers
    row: Integers
    times: Array
    splits: Splits | None

    def take(self, some: Integers) -> "Conditions":
        """Some of the bounds, in this order."""
        place = np.full(len(self.node), -1)
        place[some] = np.arange(len(some))
        held = np.flatnonzero(place[self.of_row] >= 0)
        splits = self.splits
        if splits is not None:
            mine = np.flatnonzero(place[splits.node] >= 0)
            mine = mine[np.argsort(place[splits.node[mine]], kind="stable")]
            splits = Splits(place[splits.node[mine]], splits.step[mine], splits.entry[mine], splits.at[mine],
                            splits.sign[mine], splits.beta[mine])  # fmt: skip
        return Conditions(
            self.node[some], self.round[some], self.key[some], self.slopes[some], place[self.of_row[held]],
            self.row[held], self.times[held], splits,
        )  # fmt: skip


def tighten(program: Program, frame: Frame, conditions: Conditions, rows: Rows, in_time: Callable[[], None]) -> Truths:
    """Meets the intervals of nodes with bounds, round by round and step by step, in place.

    Args:
        rows: of some numbers the coefficients by step (of the outputs, perhaps of the input), and constant - slack.
        in_time: called now and then; may raise.

    Returns:
        which nodes hold no point that satisfies the rows [M], bool.
    """
    dead = np.zeros(len(frame.lower[0]), bool)
    for some in _together(program, conditions):
        in_time()
        own = conditions.take(some)
        i = int(np.searchsorted(program.offsets, own.key[0] // 2, side="right")) - 1
        entry = own.key // 2 - program.offsets[i]
        sign = np.where(own.key % 2 == 0, 1.0, -1.0)
        bounds = _bounds(program, frame, own, i, entry, sign, rows)
        low, high = frame.lower[i].copy(), frame.upper[i].copy()
        below = sign > 0
        np.maximum.at(low, (own.node[below], entry[below]), bounds[below])
        np.minimum.at(high, (own.node[~below], entry[~below]), -bounds[~below])
        dead |= (low > high).any(axis=1)
        frame.lower[i], frame.upper[i] = low, np.maximum(low, high)  # of the dead ones, whatever it says
        for j, reader in enumerate(program.steps):
            if i in nonlinear_sources(reader):
                frame.pieces.pop(j, None)
    return dead


def _together(program: Program, conditions: Conditions) -> Iterator[Integers]:
    """Bounds of one round and one step, so few that their intervals find room. What a portion finds is used by the
    next."""
    step = np.searchsorted(program.offsets, conditions.key // 2, side="right") - 1
    order = np.lexsort((conditions.node, step, conditions.round))
    change = (np.diff(conditions.round[order]) != 0) | (np.diff(step[order]) != 0)
    size = max(1, min(program.rows_at_once, MOST // int(program.offsets[-1])))
    for some in np.split(order, np.flatnonzero(change) + 1):
        for begin in range(0, len(some), size):
            yield some[begin : begin + size]


def _bounds(program: Program, frame: Frame, own: Conditions, i: int, entry: Integers, sign: Array, rows: Rows) -> Array:
    each = np.arange(len(own.node))
    known = Frame([x if len(x) == 1 else x[own.node] for x in frame.lower],
                  [x if len(x) == 1 else x[own.node] for x in frame.upper],
                  [None if x is None else x[own.node] for x in frame.cost])  # fmt: skip
    relaxed = {
        j: pieces(program, j, known, own.slopes)
        for j, step in enumerate(program.steps)
        if isinstance(step, (Apply, Times))
    }
    view = View(program, known, relaxed, known.lower[0], known.upper[0], {}, own.splits, ball=program.ball)
    used, place = np.unique(own.row, return_inverse=True)
    coefficients, constant = rows(used)
    times = np.zeros((len(each), len(used)))
    times[own.of_row, place.reshape(-1)] = own.times
    count = (len(used) + 6) * U * ABOVE
    start, first, lost = view.start(i, entry, sign, each)
    total = first + times @ constant
    lost = lost + count * (times @ np.abs(constant)) + 4 * U * np.abs(total) + FLOOR
    for step, matrix in coefficients.items():
        added = times @ matrix
        off = count * (times @ np.abs(matrix))
        if step in start:
            added = start[step] + added
            off += U * ABOVE * np.abs(added)
        start[step] = added
        size = np.maximum(np.abs(known.lower[step]), np.abs(known.upper[step]))
        infinite = ~np.isfinite(size)
        lost = lost + np.where(infinite & (off > 0), np.inf, off * np.where(infinite, 0.0, size)).sum(axis=1)
    return view.backward(start, each, total, lost)[0]
