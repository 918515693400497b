"""Backward linear bounds of a flat program for many boxes at once, in float64 and with every rounding paid for.

A row <A, step> + d is carried back to the input. Its coefficients are taken as exactly the numbers they are; what a
step's rounding may change is <|A|, cost>, with costs known in advance from the size of the step's terms, and is taken
off d. docs/certificates.md derives the costs. Rows have owners: the nodes of a split tree, each with its own box and
intervals, or all with the same intervals except for a few clamped entries.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from soundly.certificate.absolute import Absolute
from soundly.certificate.ball import Ball
from soundly.certificate.functions import Lines, Sides
from soundly.certificate.products import Factor, Pair, remainder
from soundly.certificate.program import Affine, Apply, Program, Times, nonlinear_sources
from soundly.certificate.rings import FAR, U

Array = npt.NDArray[Any]

FLOOR = 2.0**-600  # pays for all underflow in one row, where no value is beyond 2^300
ABOVE = 1 + 2.0**-16  # for the roundings of the error terms themselves


@dataclass(frozen=True, eq=False)
class Pieces:
    """Of a function or product, per side: slopes towards each source, and an offset; [M, n] or for all nodes [1, n].

    Below: where the coefficient is positive. An offset of None is 0. cost: what roundings may change per unit of
    coefficient. owner: which of these each row of a pass has, if that is not its node's.
    """

    below: tuple[Array, ...]
    below_offset: Array | None
    above: tuple[Array, ...]
    above_offset: Array | None
    cost: Array
    owner: Array | None = None

    def take(self, rows: Array) -> "Pieces":
        def some(x: Array | None) -> Array | None:
            return None if x is None else x[rows]

        below, above = (tuple(x[rows] for x in side) for side in (self.below, self.above))
        return Pieces(below, some(self.below_offset), above, some(self.above_offset), self.cost[rows])

    @staticmethod
    def join(found: Sequence["Pieces"]) -> "Pieces":
        def offsets(all_: Sequence[Array | None]) -> Array | None:
            if all(x is None for x in all_):
                return None
            pairs = zip(all_, found, strict=True)
            return np.concatenate([np.zeros(p.cost.shape) if x is None else x for x, p in pairs])

        below, above = (tuple(map(np.concatenate, zip(*sides, strict=True)))
                        for sides in ([p.below for p in found], [p.above for p in found]))  # fmt: skip
        return Pieces(
            below, offsets([p.below_offset for p in found]), above, offsets([p.above_offset for p in found]),
            np.concatenate([p.cost for p in found]),
        )  # fmt: skip


@dataclass(eq=False)
class Frame:
    """Intervals of all steps [M, n], what the roundings of affine steps may cost per unit of coefficient, and the
    default relaxations for these intervals, where they are known already.

    parted: of some steps points [M, n] and [M, n] that splits have parted: where the lower end is the first one, or
    the upper end the second, the functions that read the step have the value there that belongs to the inside. These
    are not taken along, but found anew from the splits.
    factors: of the products that are bounded together, if any are.
    """

    lower: list[Array] = field(default_factory=list)
    upper: list[Array] = field(default_factory=list)
    cost: list[Array | None] = field(default_factory=list)
    pieces: dict[int, Pieces] = field(default_factory=dict)
    parted: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    factors: dict[int, Pair] = field(default_factory=dict)

    def sides(self, i: int) -> Sides | None:
        """Which ends of the intervals of step i belong to the inside alone; none of a point."""
        if i not in self.parted:
            return None
        (after, before), low, high = self.parted[i], self.lower[i], self.upper[i]
        return (low == after) & (low < high), (high == before) & (low < high)

    def take(self, rows: Array) -> "Frame":
        if len(rows) == len(self.lower[0]) and (rows == np.arange(len(rows))).all():
            return Frame(
                list(self.lower), list(self.upper), list(self.cost), dict(self.pieces), factors=dict(self.factors)
            )
        return Frame(
            [x[rows] for x in self.lower],
            [x[rows] for x in self.upper],
            [None if x is None else x[rows] for x in self.cost],
            {i: p.take(rows) for i, p in self.pieces.items()},
            factors={i: (u.take(rows), v.take(rows)) for i, (u, v) in self.factors.items()},
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
            if all(i in f.pieces for f in frames):
                joined.pieces[i] = Pieces.join([f.pieces[i] for f in frames])
            if all(i in f.factors for f in frames):
                left, right = zip(*(f.factors[i] for f in frames), strict=True)
                joined.factors[i] = Factor.join(left), Factor.join(right)
        return joined


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


def relax(
    program: Program,
    i: int,
    intervals: Sequence[tuple[Array, Array]],
    low: Array,
    high: Array,
    sides: Sides | None = None,
) -> Pieces:
    """The relaxation of entries of step i, given the intervals of what they read.

    Args:
        intervals: for each source, of any shape.
        low, high: slopes of that shape (or one that broadcasts), NaN where the default is wanted.
        sides: which ends belong to the inside alone, for a function.
    """
    step = program.steps[i]
    if isinstance(step, Apply):
        return relaxed(program, i, step.function.lines(*intervals[0], low, high, sides), intervals)
    (xl, xu), (yl, yu) = intervals
    planes = []
    with np.errstate(all="ignore"):
        known = np.isfinite(xl) & np.isfinite(xu) & np.isfinite(yl) & np.isfinite(yu)
        for sign, rate in ((1, low), (-1, high)):  # -x y = (-x) y has its planes below where x y has them above
            r, (a, b) = np.where(np.isnan(rate), 0.5, rate), (yl, yu) if sign > 0 else (yu, yl)
            cx, cy = (np.where(known & np.isfinite(c), c, 0.0) for c in (b + r * (a - b), xu + r * (xl - xu)))
            offset = np.full(cx.shape, np.inf)
            for x, y in ((xl, yl), (xl, yu), (xu, yl), (xu, yu)):  # x y - cx x - cy y is least in a corner
                size = np.abs(x * y) + np.abs(cx * x) + np.abs(cy * y)
                offset = np.minimum(offset, sign * (x * y - cx * x - cy * y) - 8 * U * size)
            planes.append(((cx, cy), sign * np.where(known, offset, -np.inf)))
    (below, below_offset), (above, above_offset) = planes
    return _paid(program, i, below, below_offset, above, above_offset, intervals)


def relaxed(program: Program, i: int, lines: Lines, intervals: Sequence[tuple[Array, Array]]) -> Pieces:
    """The relaxation that lines of step i make."""
    return _paid(
        program, i, (lines.below,), lines.below_offset, (lines.above,), lines.above_offset, intervals
    )  # fmt: skip


def _paid(
    program: Program,
    i: int,
    below: tuple[Array, ...],
    below_offset: Array,
    above: tuple[Array, ...],
    above_offset: Array,
    intervals: Sequence[tuple[Array, Array]],
) -> Pieces:
    """With the cost of roundings; where that is not finite nothing is known."""
    with np.errstate(all="ignore"):
        b, top_b = np.abs(below_offset), np.abs(above_offset)
        size = np.maximum(np.where(b <= FAR, b, 0.0), np.where(top_b <= FAR, top_b, 0.0))
        for k, top_k, (l, u) in zip(below, above, intervals, strict=True):  # noqa: E741
            slope = np.maximum(np.abs(k), np.abs(top_k))
            size = size + np.where(slope == 0, 0.0, slope * np.maximum(np.abs(l), np.abs(u)))
        cost = (2 * program.steps[i].size + program.contributions + 16) * U * ABOVE * size + FLOOR
        known = cost <= FAR
        below_offset = np.where(known & (b <= FAR), below_offset, -np.inf)
        above_offset = np.where(known & (top_b <= FAR), above_offset, np.inf)
    return Pieces(
        below, below_offset if below_offset.any() else None, above, above_offset if above_offset.any() else None,
        np.where(known, cost, 0.0),
    )  # fmt: skip


def tangent(program: Program, i: int, frame: Frame) -> Pieces:
    """The planes that touch a product in the middle of its factors, below and above: without what these leave."""
    left, right = frame.factors[i]
    slopes, known = (right.centre, left.centre), left.known & right.known
    offset = -left.centre * right.centre
    intervals = [(frame.lower[s], frame.upper[s]) for s in nonlinear_sources(program.steps[i])]
    below, above = np.where(known, offset, -np.inf), np.where(known, offset, np.inf)
    return _paid(program, i, slopes, below, slopes, above, intervals)


def pieces(program: Program, i: int, frame: Frame, slopes: Array | None, owner: Array | None = None) -> Pieces:
    """The relaxation of step i over a frame, with stored slopes [M or 1, S] or the default; with an owner, of those
    boxes with slopes [owners, S]."""
    sources = nonlinear_sources(program.steps[i])
    intervals, sides = [(frame.lower[s], frame.upper[s]) for s in sources], frame.sides(sources[0])
    if owner is not None:
        intervals = [(_owned(a, owner), _owned(b, owner)) for a, b in intervals]
        sides = None if sides is None else (_owned(sides[0], owner), _owned(sides[1], owner))
    return relax(program, i, intervals, *program.stored(i, slopes, 1 if slopes is None else len(slopes)), sides)


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

    def lose(self, value: Array | float) -> None:
        self.lost += value

    def lower(self) -> Array:
        """-inf where nothing is known, never NaN."""
        bound = self.d - ABOVE * self.lost
        bound = bound - 2 * U * np.abs(bound)
        return np.where(np.isfinite(bound), bound, -np.inf)


def _owned(q: Array, owner: Array) -> Array:
    """A quantity [M, n] of nodes for their rows; all share it if M is 1."""
    return q if len(q) == 1 else q.take(owner, axis=0)


def _rowwise(a: Array, q: Array) -> Array:
    """<a[r], q[r]>, or q[0] for all; -inf where a coefficient other than zero meets an infinite number."""
    value = _product(a, q)
    if np.isfinite(value).all():
        return value
    infinite = ~np.isfinite(q)
    value = _product(a, np.where(infinite, 0.0, q))
    return np.where(((a != 0) & infinite).any(axis=1) | np.isnan(value), -np.inf, value)


def _product(a: Array, q: Array) -> Array:
    value: Array = a @ q[0] if len(q) == 1 else np.einsum("rn,rn->r", a, q)
    return value


@dataclass(frozen=True, eq=False)
class View:
    """What a backward pass needs to know of the nodes: relaxations, costs, boxes, and what is special in some.

    Attributes:
        pieces: by step [M, n].
        frame: for the costs and sizes.
        lower, upper: the boxes [M, inputs].
        factors: of the products that are bounded together; their pieces are tangents.
        ball: where all inputs lie besides their boxes.
        absolute: of absolute values that are bounded together, which entries; of a single node.
    """

    program: Program
    frame: Frame
    pieces: dict[int, Pieces]
    lower: Array
    upper: Array
    exceptions: dict[int, Exceptions] = field(default_factory=dict)
    splits: Splits | None = None
    factors: dict[int, Pair] = field(default_factory=dict)
    ball: Ball | None = None
    absolute: Absolute | None = None

    def backward(
        self, start: dict[int, Array], owner: Array, constant: Array | float = 0.0, lost: Array | float = 0.0
    ) -> tuple[Array, Array, Bound]:
        """Carries rows back to the input.

        Args:
            start: coefficients [R, n] by step; the arrays are used up.
            owner: the node of each row, ascending if there are exceptions or splits.
            constant: to be added to each row.
            lost: how far each row may be from what it stands for.

        Returns:
            bounds from below [R]; the coefficients of the input [R, inputs]; the bound before the input was put in, and
            nothing of rows with absolute values that are bounded together.
        """
        bound = Bound(len(owner))
        bound.add(np.zeros(len(owner)) + constant)
        bound.lose(lost)
        weights: dict[int, Array] = {}
        coefficients = self.carry(start, owner, bound, weights=weights)
        a = coefficients.pop(0, None)
        if a is None:
            a = np.zeros((len(owner), self.program.steps[0].size))
        before = bound.copy()
        middle = self.lower / 2 + self.upper / 2
        size = np.maximum(np.abs(self.lower), np.abs(self.upper))
        radius = np.maximum(self.upper - middle, middle - self.lower) * (1 + 4 * U)
        widened = (4 * a.shape[1] + self.program.contributions + 8) * U * ABOVE * size + FLOOR
        rest = a
        if self.ball is not None:
            rest, d, off = self.ball.take(owner).lifted(a, _owned(self.lower, owner), _owned(self.upper, owner))
            bound.add(d)
            bound.lose(off)
            self._lose(bound, rest, 2 * U * size, owner)
        bound.add(_product(rest, _owned(middle, owner)))
        if self.absolute is not None and weights:
            before.lose(np.inf)
            bound.lose(_product(np.abs(rest), widened))
            bound.add(-self.absolute.most(weights, rest, middle[0], radius[0]))
        else:
            bound.add(-_product(np.abs(rest), _owned(radius + widened, owner)))
        return bound.lower(), a, before

    def carry(
        self,
        start: dict[int, Array],
        owner: Array,
        bound: Bound,
        until: Collection[int] = (),
        weights: dict[int, Array] | None = None,
    ) -> dict[int, Array]:
        """Carries rows back to the input and to the steps in `until`; returns the coefficients there. If `weights` are
        wanted, absolute values that are bounded together are put aside: [R, p] by step."""
        program, coefficients = self.program, dict(start)
        for i in sorted(start)[:-1]:  # others will be added to these; what they bring is in the costs of their steps
            size = np.maximum(np.abs(self.frame.lower[i]), np.abs(self.frame.upper[i]))
            self._lose(bound, start[i], program.contributions * U * size, owner)

        def give(source: int, part: Array) -> None:
            if source in coefficients:
                coefficients[source] += part
            else:
                coefficients[source] = part

        together: dict[int, Array] = {}
        for i in range(max(coefficients), 0, -1):
            if i in until:
                continue
            a = coefficients.pop(i, None)
            if self.splits is not None:
                a = self._split(i, a, owner, bound)
            if a is None or not a.shape[1]:
                continue
            step = program.steps[i]
            if isinstance(step, Affine):
                cost = self.frame.cost[i]
                assert cost is not None
                bound.add(a @ step.bias)
                self._lose(bound, a, cost, owner, exact=step.weight_error > 0)
                for part, source in step.parts:
                    give(source, part.pull(a))
            elif isinstance(step, (Apply, Times)):
                if self.absolute is not None and weights is not None and i in self.absolute.entry:
                    weights[i] = self.absolute.take(i, a)
                if i in self.factors:
                    together[i] = a
                self._relaxed(i, a, owner, bound, give)
        if together:
            value, lost = remainder(self.factors, together, owner)
            bound.add(value)
            bound.lose(lost)
        return coefficients

    def plain(self, start: dict[int, Array], owner: Array, constant: Array) -> Array:
        """Lower bounds of rows from intervals alone: where functions jump they may say more than lines."""
        bound = Bound(len(owner))
        bound.add(constant)
        for i, a in start.items():
            low, high = (self.lower, self.upper) if i == 0 else (self.frame.lower[i], self.frame.upper[i])
            size = np.maximum(np.abs(low), np.abs(high))
            bound.lose(-_rowwise(np.abs(a), _owned(-(2 * a.shape[1] + 16) * U * size, owner)))
            bound.add(_rowwise(np.maximum(a, 0.0), _owned(low, owner)))
            bound.add(_rowwise(np.maximum(-a, 0.0), _owned(-high, owner)))
        return bound.lower()

    def entries(self, i: int, entry: Array, sign: Array, owner: Array) -> Array:
        """Lower bounds of sign times entries of step i [R]."""
        rows, constant, lost = self.start(i, entry, sign, owner)
        return self.backward(rows, owner, constant, lost)[0]

    def start(self, i: int, entry: Array, sign: Array, owner: Array) -> tuple[dict[int, Array], Array, Array | float]:
        """Rows for sign times entries of step i: coefficients, constants, and how far off they may be."""
        step = self.program.steps[i]
        if not isinstance(step, Affine):
            unit = np.zeros((len(entry), step.size))
            unit[np.arange(len(entry)), entry] = sign
            return {i: unit}, np.zeros(len(entry)), 0.0
        cost = self.frame.cost[i]
        assert cost is not None
        rows: dict[int, Array] = {}
        for part, source in step.parts:
            found = part.rows_of(entry)
            found *= sign[:, None]
            rows[source] = rows[source] + found if source in rows else found
        lost = cost[0, entry] if len(cost) == 1 else cost[owner, entry]
        if not rows:
            rows = {0: np.zeros((len(entry), self.program.steps[0].size))}
        return rows, sign * step.bias[entry], lost

    def _lose(self, bound: Bound, a: Array, cost: Array, owner: Array, exact: bool = False) -> None:
        """Takes off what roundings cost: that of the worst node, unless it is infinite, or `exact`."""
        worst = cost.max(axis=0, keepdims=True) if len(cost) > 1 else cost
        if exact or not np.isfinite(worst).all():
            worst = _owned(cost, owner)
        bound.lose(-_rowwise(np.abs(a), -worst))

    def _relaxed(self, i: int, a: Array, owner: Array, bound: Bound, give: Callable[[int, Array], None]) -> None:
        """Hands the coefficients of a function or product on to what it reads."""
        some = self.pieces[i]
        extra: list[tuple[Array, Array, Array]] = []
        if i in self.exceptions:
            extra = self._exceptional(i, a, owner, bound)

        owner = owner if some.owner is None else some.owner

        def owned(q: Array) -> Array:
            return _owned(q, owner)

        positive = a > 0
        below, above = some.below_offset, some.above_offset
        if below is not None and above is not None:
            bound.add(_rowwise(a, np.where(positive, owned(below), owned(above))))
        elif above is not None:
            bound.add(_rowwise(np.minimum(a, 0.0), owned(above)))
        elif below is not None:
            bound.add(_rowwise(np.maximum(a, 0.0), owned(below)))
        self._lose(bound, a, some.cost, owner)
        for j, source in enumerate(nonlinear_sources(self.program.steps[i])):
            slope = np.where(positive, owned(some.below[j]), owned(some.above[j]))
            slope *= a
            if extra:
                row, entry, parts = extra[j]
                slope[row, entry] = parts
            give(source, slope)

    def _exceptional(self, i: int, a: Array, owner: Array, bound: Bound) -> list[tuple[Array, Array, Array]]:
        """Takes the exceptional entries out of a; returns rows, entries and new coefficients, for each source."""
        special = self.exceptions[i]
        pair, row = _rows_of(special.node, owner)
        entry = special.entry[pair]
        values = a[row, entry]
        a[row, entry] = 0.0
        positive, some = values > 0, special.pieces
        below, above = (np.zeros(len(pair)) if x is None else x[pair] for x in (some.below_offset, some.above_offset))
        with np.errstate(all="ignore"):
            term = np.where(values == 0, 0.0, values * np.where(positive, below, above))
        bound.add(np.bincount(row, np.where(np.isnan(term), -np.inf, term), len(owner)))
        bound.lose(np.bincount(row, np.abs(values) * some.cost[pair], len(owner)))
        return [
            (row, entry, values * np.where(positive, k[pair], top_k[pair]))
            for k, top_k in zip(some.below, some.above, strict=True)
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


def _rows_of(node: Array, owner: Array) -> tuple[Array, Array]:
    """For nodes [p] all rows that belong to them: position in `node`, row."""
    first, last = np.searchsorted(owner, node), np.searchsorted(owner, node, side="right")
    pair = np.repeat(np.arange(len(node)), last - first)
    start = np.cumsum(last - first) - (last - first)
    return pair, np.arange(len(pair)) - start[pair] + first[pair]
