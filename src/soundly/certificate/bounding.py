"""Backward linear bounds of a flat program for many boxes at once, in float64 and with every rounding paid for.

A row <A, step> + d is carried back to the input. Its coefficients are taken as exactly the numbers they are; what a
step's rounding may change is <|A|, cost>, with costs known in advance from the size of the step's terms, and is taken
off d. docs/certificates.md derives the costs. Rows have owners: the nodes of a split tree, each with its own box and
intervals, or all with the same intervals except for a few clamped entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from soundly.certificate.functions import FAR, U
from soundly.certificate.program import Affine, Apply, Program, Step, Stored, Times, Variable, nonlinear_sources

Array = npt.NDArray[Any]

FLOOR = 2.0**-600  # pays for all underflow in one row, where no value is beyond 2^300
ABOVE = 1 + 2.0**-16  # for the roundings of the error terms themselves


@dataclass(eq=False)
class Frame:
    """Intervals of all steps [M, n], and what the roundings of affine steps may cost, per unit of coefficient."""

    lower: list[Array] = field(default_factory=list)
    upper: list[Array] = field(default_factory=list)
    cost: list[Array | None] = field(default_factory=list)

    def take(self, rows: Array) -> "Frame":
        return Frame(
            [x[rows] for x in self.lower],
            [x[rows] for x in self.upper],
            [None if x is None else x[rows] for x in self.cost],
        )

    @staticmethod
    def join(frames: Sequence["Frame"]) -> "Frame":
        if len(frames) == 1:
            return frames[0]
        joined = Frame()
        for i in range(len(frames[0].lower)):
            joined.lower.append(np.concatenate([f.lower[i] for f in frames]))
            joined.upper.append(np.concatenate([f.upper[i] for f in frames]))
            costs = [f.cost[i] for f in frames]
            joined.cost.append(None if costs[0] is None else np.concatenate([c for c in costs if c is not None]))
        return joined


@dataclass(frozen=True, eq=False)
class Pieces:
    """Of a function or product, per side: slopes towards each source, and an offset that pays for roundings [M, n].

    Below: where the coefficient is positive. by_row: of each row of a pass instead of each node.
    """

    below: tuple[Array, ...]
    below_offset: Array
    above: tuple[Array, ...]
    above_offset: Array
    by_row: bool = False


@dataclass(frozen=True, eq=False)
class Exceptions:
    """Entries of a step that have pieces of their own in some nodes: positions [p], pieces [p]."""

    node: Array
    entry: Array
    pieces: Pieces


@dataclass(frozen=True, eq=False)
class Splits:
    """Neuron splits on the way to nodes: node, step and entry, at, sign (+1 above) and multiplier, each [s]."""

    node: Array
    step: Array
    entry: Array
    at: Array
    sign: Array
    beta: Array


def relax(program: Program, i: int, intervals: Sequence[tuple[Array, Array]], low: Array, high: Array) -> Pieces:
    """The relaxation of entries of step i, given the intervals of what they read.

    Args:
        intervals: for each source, of any shape.
        low, high: slopes of that shape, NaN where the default is wanted.
    """
    step = program.steps[i]
    steps = 2 * step.size + program.contributions + 16
    with np.errstate(all="ignore"):
        sizes = [np.maximum(np.abs(a), np.abs(b)) for a, b in intervals]
        if isinstance(step, Apply):
            k, b, top_k, top_b = step.function.lines(*intervals[0], low, high)
            cost, top_cost = (
                steps * U * (np.where(slope == 0, 0.0, np.abs(slope) * sizes[0]) + np.abs(offset)) * ABOVE + FLOOR
                for slope, offset in ((k, b), (top_k, top_b))
            )
            return Pieces((k,), _below(b - cost), (top_k,), -_below(-top_b - top_cost))
        (xl, xu), (yl, yu) = intervals
        known = np.isfinite(sizes[0]) & np.isfinite(sizes[1])
        found = []
        for sign, rate in ((1, low), (-1, high)):  # -x y = (-x) y has its planes below where x y has them above
            r, (a, b) = np.where(np.isnan(rate), 0.5, rate), (yl, yu) if sign > 0 else (yu, yl)
            cx, cy = (np.where(known & np.isfinite(c), c, 0.0) for c in (b + r * (a - b), xu + r * (xl - xu)))
            offset = np.full(cx.shape, np.inf)
            for x, y in ((xl, yl), (xl, yu), (xu, yl), (xu, yu)):  # x y - cx x - cy y is least in a corner
                size = np.abs(x * y) + np.abs(cx * x) + np.abs(cy * y)
                offset = np.minimum(offset, sign * (x * y - cx * x - cy * y) - 8 * U * size)
            cost = steps * U * (np.abs(cx) * sizes[0] + np.abs(cy) * sizes[1] + np.abs(offset)) * ABOVE + FLOOR
            found.append(((cx, cy), np.where(known, _below(offset - cost), -np.inf)))
    return Pieces(*found[0], found[1][0], -found[1][1])


def pieces(program: Program, i: int, frame: Frame, slopes: Array | None, owner: Array | None = None) -> Pieces:
    """The relaxation of step i over a frame, with stored slopes [M or 1, S] or the default; or [owners, S] by row."""
    intervals = [(frame.lower[s], frame.upper[s]) for s in nonlinear_sources(program.steps[i])]
    if owner is not None:
        intervals = [(_owned(a, owner), _owned(b, owner)) for a, b in intervals]
    low, high = program.stored(i, slopes, 1 if slopes is None else len(slopes))
    shape = intervals[0][0].shape if len(low) == 1 else low.shape
    intervals = [(np.broadcast_to(a, shape), np.broadcast_to(b, shape)) for a, b in intervals]
    found = relax(program, i, intervals, np.broadcast_to(low, shape).copy(), np.broadcast_to(high, shape).copy())
    return found if owner is None else replace(found, by_row=True)


def _below(x: Array) -> Array:
    return np.where(np.isnan(x) | (np.abs(x) > FAR), -np.inf, x)


class Bound:
    """Lower bounds d of rows while they are collected; `lost` is what roundings of d may have changed."""

    def __init__(self, rows: int) -> None:
        self.d, self.lost = np.zeros(rows), np.full(rows, FLOOR)

    def copy(self) -> "Bound":
        other = Bound(0)
        other.d, other.lost = self.d.copy(), self.lost.copy()
        return other

    def add(self, value: Array) -> None:
        self.d = self.d + value
        self.lost += U * np.abs(self.d)

    def lose(self, value: Array) -> None:
        self.lost += value

    def lower(self) -> Array:
        """-inf where nothing is known, never NaN."""
        bound = self.d - ABOVE * self.lost
        bound = bound - 2 * U * np.abs(bound)
        return np.where(np.isfinite(bound), bound, -np.inf)


def _owned(q: Array, owner: Array) -> Array:
    """A quantity [M, n] of nodes for their rows; all share it if M is 1."""
    return q if len(q) == 1 else q[owner]


def _dot(a: Array, q: Array, owner: Array) -> Array:
    """<a[r], q[owner[r]]>; -inf where a coefficient other than zero meets an infinite number."""
    known = np.isfinite(q)
    if known.all():
        return a @ q[0] if len(q) == 1 else np.einsum("rn,rn->r", a, q[owner])
    clean = np.where(known, q, 0.0)
    value: Array = a @ clean[0] if len(q) == 1 else np.einsum("rn,rn->r", a, clean[owner])
    unknown = ((a != 0) & _owned(~known, owner)).any(axis=1)
    return np.where(unknown, -np.inf, value)


@dataclass(frozen=True, eq=False)
class View:
    """What a backward pass needs to know of the nodes: relaxations, costs, boxes, and what is special in some.

    Attributes:
        pieces: by step [M, n].
        frame: for the costs and sizes.
        lower, upper: the boxes [M, inputs].
    """

    program: Program
    frame: Frame
    pieces: dict[int, Pieces]
    lower: Array
    upper: Array
    exceptions: dict[int, Exceptions] = field(default_factory=dict)
    splits: Splits | None = None

    def backward(
        self, start: dict[int, Array], owner: Array, constant: Array | float = 0.0
    ) -> tuple[Array, Array, Bound]:
        """Carries rows back to the input.

        Args:
            start: coefficients [R, n] by step; the arrays are used up.
            owner: the node of each row, ascending if there are exceptions or splits.
            constant: to be added to each row.

        Returns:
            bounds from below [R]; the coefficients of the input [R, inputs]; the bound before the input was put in.
        """
        program, coefficients, bound = self.program, dict(start), Bound(len(owner))
        bound.add(np.zeros(len(owner)) + constant)
        for i in sorted(start)[:-1]:  # others will be added to these; what they bring is in the costs of their steps
            size = np.maximum(np.abs(self.frame.lower[i]), np.abs(self.frame.upper[i]))
            bound.lose(-_dot(np.abs(start[i]), -program.contributions * U * size, owner))

        def give(source: int, part: Array) -> None:
            if source in coefficients:
                coefficients[source] += part
            else:
                coefficients[source] = part

        for i in range(max(coefficients), 0, -1):
            a = coefficients.pop(i, None)
            if self.splits is not None:
                a = self._split(i, a, owner, bound)
            if a is None:
                continue
            step = program.steps[i]
            if isinstance(step, Affine):
                cost = self.frame.cost[i]
                assert cost is not None
                bound.add(a @ step.bias)
                bound.lose(-_dot(np.abs(a), -cost, owner))
                for part, source in step.parts:
                    give(source, part.pull(a))
            elif isinstance(step, (Apply, Times)):
                sources, some = nonlinear_sources(step), self.pieces[i]
                extra: list[tuple[Array, Array, Array]] = []
                if i in self.exceptions:
                    extra = self._exceptional(i, a, owner, bound)
                positive, who = a > 0, np.arange(len(a)) if some.by_row else owner
                offset = np.where(positive, _owned(some.below_offset, who), _owned(some.above_offset, who))
                bound.add(_rowwise(a, offset))
                for j, source in enumerate(sources):
                    slope = np.where(positive, _owned(some.below[j], who), _owned(some.above[j], who))
                    slope *= a
                    if extra:
                        row, entry, parts = extra[j]
                        slope[row, entry] = parts
                    give(source, slope)
        a = coefficients.pop(0, None)
        if a is None:
            a = np.zeros((len(owner), program.steps[0].size))
        before = bound.copy()
        n = a.shape[1]
        size = np.maximum(np.abs(self.lower), np.abs(self.upper))
        cost = (2 * n + program.contributions + 8) * U * ABOVE * size
        bound.add(_rowwise(a, np.where(a > 0, _owned(self.lower - cost, owner), _owned(self.upper + cost, owner))))
        return bound.lower(), a, before

    def _exceptional(self, i: int, a: Array, owner: Array, bound: Bound) -> list[tuple[Array, Array, Array]]:
        """Takes the exceptional entries out of a; returns rows, entries and new coefficients, for each source."""
        special = self.exceptions[i]
        pair, row = _rows_of(special.node, owner)
        entry = special.entry[pair]
        values = a[row, entry]
        a[row, entry] = 0.0
        positive, some = values > 0, special.pieces
        offset = np.where(positive, some.below_offset[pair], some.above_offset[pair])
        with np.errstate(all="ignore"):
            term = np.where(values == 0, 0.0, values * offset)
        bound.add(np.bincount(row, np.where(np.isnan(term), -np.inf, term), len(owner)))
        return [
            (row, entry, values * np.where(positive, below[pair], above[pair]))
            for below, above in zip(some.below, some.above, strict=True)
        ]

    def _split(self, i: int, a: Array | None, owner: Array, bound: Bound) -> Array | None:
        splits = self.splits
        assert splits is not None
        at = np.flatnonzero((splits.step == i) & (splits.beta > 0))
        if len(at) == 0:
            return a
        which, row = _rows_of(splits.node[at], owner)
        which = at[which]
        if len(which) == 0:
            return a
        if a is None:
            a = np.zeros((len(owner), self.program.steps[i].size))
        entry, change = splits.entry[which], splits.beta[which] * splits.sign[which]
        np.subtract.at(a, (row, entry), change)
        size = np.maximum(np.abs(self.frame.lower[i]), np.abs(self.frame.upper[i]))
        size = size[0, entry] if len(size) == 1 else size[owner[row], entry]
        count = 2 * (len(np.unique(at)) + 2)
        with np.errstate(all="ignore"):
            lost = count * U * (np.abs(a[row, entry]) + 2 * np.abs(change)) * size
        bound.lose(np.bincount(row, np.where(np.isnan(lost), np.inf, lost), len(owner)))
        shift = change * splits.at[which]
        bound.add(np.bincount(row, shift, len(owner)))
        bound.lose(count * U * np.bincount(row, np.abs(shift), len(owner)))
        return a


def _rowwise(a: Array, q: Array) -> Array:
    """<a[r], q[r]>; -inf where a coefficient other than zero meets an infinite number."""
    value: Array = np.einsum("rn,rn->r", a, q)
    if np.isfinite(value).all():
        return value
    infinite = ~np.isfinite(q)
    value = np.einsum("rn,rn->r", a, np.where(infinite, 0.0, q))
    return np.where(((a != 0) & infinite).any(axis=1) | np.isnan(value), -np.inf, value)


def _rows_of(node: Array, owner: Array) -> tuple[Array, Array]:
    """For nodes [p] all rows that belong to them: position in `node`, row."""
    first, last = np.searchsorted(owner, node), np.searchsorted(owner, node, side="right")
    pair = np.repeat(np.arange(len(node)), last - first)
    start = np.cumsum(last - first) - (last - first)
    return pair, np.arange(len(pair)) - start[pair] + first[pair]


def refresh(
    program: Program, lower: Array, upper: Array, inherited: Frame | None, group: Array, stored: Stored
) -> tuple[Frame, Array]:
    """Intervals of all steps over boxes.

    Args:
        lower, upper: boxes [M, inputs].
        inherited: intervals that are known already [M, n].
        group: [M], which group of stored slopes belongs to each box; -1 for none.

    Returns:
        the frame [M, n]; which boxes are empty or hold no point that the inherited intervals allow [M].
    """
    frame = Frame()
    dead = np.asarray((lower > upper).any(axis=1))
    current: dict[int, Pieces] = {}
    for i, step in enumerate(program.steps):
        low, high, cost = _interval(frame, step, lower, upper, program.contributions)
        if inherited is not None:
            low, high = np.maximum(low, inherited.lower[i]), np.minimum(high, inherited.upper[i])
        frame.lower.append(low)
        frame.upper.append(high)
        frame.cost.append(cost)
        dead = dead | _settle(frame, i)
        if isinstance(step, (Apply, Times)):
            current[i] = pieces(program, i, frame, None)
        if i not in program.bounded or _is_exact(step):
            continue
        node, entry = (_wanted(program, frame, i) & ~dead[:, None]).nonzero()
        if len(node):
            _tighten(program, frame, i, current, node, entry, group, stored)
            dead = dead | _settle(frame, i)
    return frame, dead


def _tighten(
    program: Program,
    frame: Frame,
    i: int,
    current: dict[int, Pieces],
    node: Array,
    entry: Array,
    group: Array,
    stored: Stored,
) -> None:
    """Meets the intervals of some entries of step i with backward bounds, each with its stored slopes, if it has any."""
    node, entry, side = np.tile(node, 2), np.tile(entry, 2), np.repeat([0, 1], len(node))
    row = stored.rows(group[node], 2 * (program.offsets[i] + entry) + side)
    low, high = frame.lower[i].copy(), frame.upper[i].copy()
    for chosen in (False, True):
        which = np.flatnonzero((row >= 0) == chosen)
        for begin in range(0, len(which), program.rows_at_once):
            some = which[begin : begin + program.rows_at_once]
            owner, at, sign = node[some], entry[some], 1.0 - 2.0 * side[some]
            own = current
            if chosen:
                slopes = stored.of(row[some])
                own = {j: pieces(program, j, frame, slopes, owner) if program.has_slots(j) else current[j]
                       for j in current}  # fmt: skip
            start = np.zeros((len(some), program.steps[i].size))
            start[np.arange(len(some)), at] = sign
            bounds, *_ = View(program, frame, own, frame.lower[0], frame.upper[0]).backward({i: start}, owner)
            below = sign > 0
            low[owner[below], at[below]] = np.maximum(low[owner[below], at[below]], bounds[below])
            high[owner[~below], at[~below]] = np.minimum(high[owner[~below], at[~below]], -bounds[~below])
    frame.lower[i], frame.upper[i] = low, high


def _is_exact(step: Step) -> bool:
    """Whether its interval is already as tight as a backward pass could make it."""
    return isinstance(step, Variable) or (isinstance(step, Affine) and [s for _, s in step.parts] == [0])


def _wanted(program: Program, frame: Frame, i: int) -> Array:
    """Entries of step i whose intervals decide how something later is relaxed."""
    lower, upper = frame.lower[i], frame.upper[i]
    wanted = np.zeros(lower.shape, bool)
    for step in program.steps[i + 1 :]:
        if isinstance(step, Apply) and step.source == i:
            wanted |= step.function.straight(lower, upper) == -1
        elif isinstance(step, Times) and i in (step.left, step.right):
            wanted |= lower < upper
    return wanted


def _settle(frame: Frame, i: int) -> Array:
    """Which nodes have an empty interval in step i; their intervals become points, whatever they say."""
    empty = np.asarray(frame.lower[i] > frame.upper[i])
    if not empty.any():
        return np.zeros(len(empty), bool)
    frame.upper[i] = np.maximum(frame.lower[i], frame.upper[i])
    return np.asarray(empty.any(axis=1))


def _interval(
    frame: Frame, step: Step, lower: Array, upper: Array, contributions: int
) -> tuple[Array, Array, Array | None]:
    """The interval of a step from those it reads, and what its roundings cost."""
    cost = None
    with np.errstate(all="ignore"):
        match step:
            case Variable():
                return lower.copy(), upper.copy(), None
            case Affine(parts, bias, weight_error, bias_error):
                centre = np.repeat(bias[None], len(lower), axis=0)
                radius = np.zeros(centre.shape)
                size = np.zeros(centre.shape)
                for part, source in parts:
                    a, b = frame.lower[source], frame.upper[source]
                    largest = np.maximum(np.abs(a), np.abs(b))
                    unknown = ~np.isfinite(largest)
                    m = np.where(unknown, 0.0, a / 2 + b / 2)
                    r = np.where(unknown, 0.0, np.maximum(b - m, m - a) * (1 + 4 * U))
                    centre += part.apply(m)
                    radius += part.absolute.apply(r)
                    size += part.absolute.apply(np.where(unknown, 0.0, largest))
                    if unknown.any():
                        size[part.absolute.apply(unknown.astype(float)) > 0] = np.inf
                terms = sum(part.terms for part, _ in parts)
                steps = 4 * terms + 2 * len(bias) + contributions + 16
                cost = ABOVE * (steps * U * (size + np.abs(bias)) + weight_error * size + bias_error) + FLOOR
                low, high = centre - radius - cost, centre + radius + cost
            case Apply(source, function):
                low, high = function.range(frame.lower[source], frame.upper[source])
            case Times(left, right):
                (a, b), (c, d) = ((frame.lower[s], frame.upper[s]) for s in (left, right))
                corners = np.stack([a * c, a * d, b * c, b * d])
                slack = 4 * U * np.abs(corners).max(0) + FLOOR
                low, high = corners.min(0) - slack, corners.max(0) + slack
    return np.where(low >= -FAR, low, -np.inf), np.where(high <= FAR, high, np.inf), cost
