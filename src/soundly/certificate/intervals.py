"""Intervals of all steps of a program over boxes: forward, by affine forms, and by backward passes where it matters.

Nothing is believed: what a certificate stores are slopes for single bounds, and any slope is sound. Intervals of steps
are met with what is known already, so they only become narrower from a node of a split tree to its children.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from soundly.certificate.absolute import Absolute
from soundly.certificate.bounding import ABOVE, FLOOR, Bound, Frame, View, pieces, relaxed
from soundly.certificate.crop import Crop, Crops
from soundly.certificate.forms import Forms
from soundly.certificate.functions import Band, Sides
from soundly.certificate.program import (
    MOST,
    Affine,
    Apply,
    Program,
    Step,
    Stored,
    Times,
    Variable,
    nonlinear_sources,
)  # fmt: skip
from soundly.certificate.rings import FAR, U

Array = npt.NDArray[Any]

NUMBERS = 2**25  # of the affine functions around absolute values, at most


def in_time(deadline: float) -> None:
    """Raises TimeoutError after the deadline."""
    if time.monotonic() > deadline:
        raise TimeoutError("the deadline of the replay has passed")


def refresh(
    program: Program,
    lower: Array,
    upper: Array,
    inherited: Frame | None,
    group: Array,
    stored: Stored,
    *,
    forms: bool = False,
    together: bool = False,
    narrow: Callable[[Frame, int, Crops], None] | None = None,
    deadline: float = math.inf,
) -> tuple[Frame, Array]:
    """Intervals of all steps over boxes.

    Args:
        lower, upper: boxes [M, inputs].
        inherited: intervals that are known already [M, n].
        group: [M], which group of stored slopes belongs to each box; -1 for none.
        forms: whether affine forms are followed.
        together: whether to find the factors of the products that are bounded together, with forms; nothing else that
            only these read is bounded.
        narrow: puts what else is known of a step into the frame, when this has the steps up to it.
        deadline: on the clock of `time.monotonic`.

    Returns:
        the frame [M, n]; which boxes are empty or hold no point that the inherited intervals allow [M].

    Raises:
        TimeoutError: after the deadline.
    """
    frame, followed, crops = Frame(), Forms(program) if forms else None, Crops(program, {})
    if inherited is not None:
        frame.parted = inherited.parted
    dead = np.asarray((lower > upper).any(axis=1))
    together = together and forms and program.together is not None
    apart = program.together.products if together and program.together is not None else frozenset[int]()
    tightened = program.tightened_before if together else program.tightened
    for i in range(len(program.steps)):
        in_time(deadline)
        low, high, cost, band = _interval(frame, i, program, lower, upper)
        if inherited is not None:
            low, high = np.maximum(low, inherited.lower[i]), np.minimum(high, inherited.upper[i])
        if followed is not None:
            least, greatest = followed.follow(i, frame, lower, upper, cost, band).interval()
            low, high = np.maximum(low, least), np.minimum(high, greatest)
        frame.lower.append(low)
        frame.upper.append(high)
        frame.cost.append(cost)
        dead = dead | _settle(frame, i)
        if tightened[i]:
            wanted = _wanted(program, i, low, frame.upper[i], apart, frame.sides(i)) & ~dead[:, None]
            node, entry = wanted.nonzero()
            if len(node):
                _tighten(program, crops, frame, i, node, entry, group, stored, deadline)
                dead = dead | _settle(frame, i)
        if narrow is not None:
            narrow(frame, i, crops)
            dead = dead | _settle(frame, i)
    if together and followed is not None:
        frame.factors = followed.factors(frame)
    return frame, dead


def _tighten(
    program: Program,
    crops: Crops,
    frame: Frame,
    i: int,
    node: Array,
    entry: Array,
    group: Array,
    stored: Stored,
    deadline: float,
) -> None:
    """Meets the intervals of some entries of step i with backward bounds, each with stored slopes if it has any."""
    node, entry, side = np.repeat(node, 2), np.repeat(entry, 2), np.tile([0, 1], len(node))
    row = stored.rows(group[node], 2 * (program.offsets[i] + entry) + side)
    low, high = frame.lower[i].copy(), frame.upper[i].copy()

    def meet(some: Array, bounds: Array) -> None:
        below = side[some] == 0
        np.maximum.at(low, (node[some[below]], entry[some[below]]), bounds[below])
        np.minimum.at(high, (node[some[~below]], entry[some[~below]]), -bounds[~below])

    sign = 1.0 - 2.0 * side
    view = View(program, frame, frame.pieces, frame.lower[0], frame.upper[0], ball=program.ball)
    plain = np.flatnonzero(row < 0)
    for crop, which, place, inner in crops.of(i, entry[plain]):
        which = plain[which]
        if crop is None:
            for some in _slices(which, program.rows_at_once, deadline):
                meet(some, view.entries(i, entry[some], sign[some], node[some]))
            continue
        pair = node[which] * len(crop.index[0]) + place
        order = np.argsort(pair, kind="stable")  # the rows of one node and place stand together
        for part in _slices(order, crop.program.rows_together, deadline):
            pairs, owner = np.unique(pair[part], return_inverse=True)
            small, some = crop.view(view, *np.divmod(pairs, len(crop.index[0]))), which[part]
            meet(some, _bounds(crop, small, view, i, inner[part], sign[some], owner, node[some], place[part]))
    size = max(1, min(program.rows_at_once, MOST // int(program.offsets[-1])))
    for some in _slices(np.flatnonzero(row >= 0), size, deadline):  # with relaxations of their own
        (boxes, rows), each = np.unique(np.stack([node[some], row[some]]), axis=1, return_inverse=True)
        slopes, each = stored.of(rows), each.reshape(-1)
        own = {j: replace(pieces(program, j, frame, slopes, boxes), owner=each) if program.has_slots(j)
               else known for j, known in frame.pieces.items()}  # fmt: skip
        meet(some, replace(view, pieces=own).entries(i, entry[some], sign[some], node[some]))
    frame.lower[i], frame.upper[i] = low, high


def around(view: View, group: int, stored: Stored, deadline: float) -> Absolute | None:
    """Of a single node affine functions around the entries of either sign whose absolute values are bounded together,
    with the slopes that its group has for their bounds; None if these are too many numbers."""
    program, entry, slopes, offsets = view.program, dict[int, Array](), list[Array](), list[Array]()
    source = {j: nonlinear_sources(program.steps[j])[0] for j in program.absolute}
    for j, i in source.items():
        entry[j] = np.flatnonzero((view.frame.lower[i][0] < 0) & (view.frame.upper[i][0] > 0))
    inputs = program.steps[0].size
    if 2 * sum(map(len, entry.values())) * inputs > NUMBERS:
        return None
    size = max(1, min(program.rows_at_once, MOST // int(program.offsets[-1])))
    for j, i in source.items():
        both, side = np.tile(entry[j], 2), np.repeat([0, 1], len(entry[j]))
        rows = stored.rows(np.full(len(both), group), 2 * (program.offsets[i] + both) + side)
        slope, offset = np.zeros((len(both), inputs)), np.zeros(len(both))
        for some in _slices(np.arange(len(both)), size, deadline):
            slope[some], offset[some] = _affine(view, i, both[some], 1.0 - 2.0 * side[some], rows[some], stored)
        slopes.append(slope.reshape(2, -1, inputs))
        offsets.append(offset.reshape(2, -1))
    factor = {j: program.absolute[j] for j in source}
    return Absolute(entry, factor, np.concatenate(slopes, 1), np.concatenate(offsets, 1), program.contributions)


def _affine(view: View, i: int, entry: Array, sign: Array, rows: Array, stored: Stored) -> tuple[Array, Array]:
    """a [R, inputs], d [R]: sign times entries of step i are at least <a, x> + d on a single node. Rows of slopes are
    given by number, -1 for the default."""
    program, node = view.program, np.zeros(len(entry), int)
    slopes = np.full((len(entry), len(program.slots)), np.nan)
    slopes[rows >= 0] = stored.of(rows[rows >= 0])
    own = {j: replace(pieces(program, j, view.frame, slopes, node), owner=np.arange(len(entry)))
           if program.has_slots(j) else known for j, known in view.pieces.items() if j < i}  # fmt: skip
    bare = replace(view, pieces=own, splits=None, exceptions={}, absolute=None)
    start, constant, lost = bare.start(i, entry, sign, node)
    _, a, before = bare.backward(start, node, constant, lost)
    return a, before.lower()


def _slices(which: Array, size: int, deadline: float) -> Iterator[Array]:
    for begin in range(0, len(which), size):
        in_time(deadline)
        yield which[begin : begin + size]


def _bounds(
    crop: Crop, small: View, whole: View, i: int, entry: Array, sign: Array, owner: Array, node: Array, place: Array
) -> Array:
    """Lower bounds of sign times entries of step i of a crop, each with its pair in the small view, and in the whole
    program its node and place."""
    ends = [j for j in crop.floor if j <= i and crop.index[j].shape[1]]
    if not ends:
        return small.entries(i, entry, sign, owner)
    rows, constant, lost = small.start(i, entry, sign, owner)
    bound = Bound(len(entry))
    bound.add(constant)
    bound.lose(lost)
    left = small.carry(rows, owner, bound, ends)
    spread = {j: crop.spread(j, a, place, whole.program.steps[j].size) for j, a in left.items()}
    if not spread:
        spread = {0: np.zeros((len(entry), whole.program.steps[0].size))}
    return whole.backward(spread, node, bound.d, bound.lost)[0]


def _wanted(
    program: Program, i: int, lower: Array, upper: Array, apart: frozenset[int], sides: Sides | None = None
) -> Array:
    """Entries of step i whose intervals decide how something later is relaxed, itself or through a copy; steps that
    stand apart do not count."""
    wanted = np.zeros(lower.shape, bool)
    for j in program.readers[i]:
        step = program.steps[j]
        if j in apart:
            continue
        if isinstance(step, Apply):
            wanted |= step.function.straight(lower, upper, sides) == -1
        elif isinstance(step, Times):
            wanted |= lower < upper
        elif isinstance(step, Affine) and program.matters[j] and (copy := program.copied(j)) is not None:
            with np.errstate(all="ignore"):
                ends = np.stack([lower[:, copy.columns], upper[:, copy.columns]]) * copy.values
                ends[:, :, copy.rows] = ends.copy()
                ends += step.bias
            mask = _wanted(program, j, ends.min(0), ends.max(0), apart)
            node, row = mask[:, copy.rows].nonzero()
            wanted[node, copy.columns[row]] = True
    return wanted


def _settle(frame: Frame, i: int) -> Array:
    """Which nodes have an empty interval in step i; their intervals become points, whatever they say."""
    empty = np.asarray(frame.lower[i] > frame.upper[i])
    if not empty.any():
        return np.zeros(len(empty), bool)
    frame.upper[i] = np.maximum(frame.lower[i], frame.upper[i])
    return np.asarray(empty.any(axis=1))


def _interval(
    frame: Frame, i: int, program: Program, lower: Array, upper: Array
) -> tuple[Array, Array, Array | None, Band | None]:
    """The interval of step i from those it reads, what its roundings cost, and a function's band.

    The relaxations of functions and products are kept in the frame.
    """
    step: Step = program.steps[i]
    cost = band = None
    with np.errstate(all="ignore"):
        match step:
            case Variable():
                return lower.copy(), upper.copy(), None, None
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
                steps = 4 * terms + 2 * len(bias) + program.contributions + 16
                cost = ABOVE * (steps * U * (size + np.abs(bias)) + weight_error * size + bias_error) + FLOOR
                low, high = centre - radius - cost, centre + radius + cost
            case Apply(source, function):
                ends = frame.lower[source], frame.upper[source]
                (low, high), lines, band = function.follow(*ends, frame.sides(source))
                frame.pieces[i] = relaxed(program, i, lines, [ends])
            case Times(left, right):
                (a, b), (c, d) = ((frame.lower[s], frame.upper[s]) for s in (left, right))
                corners = np.stack([a * c, a * d, b * c, b * d])
                slack = 4 * U * np.abs(corners).max(0) + FLOOR
                low, high = corners.min(0) - slack, corners.max(0) + slack
                if left == right:
                    low = np.maximum(low, 0.0)
                frame.pieces[i] = pieces(program, i, frame, None)
    return np.where(low >= -FAR, low, -np.inf), np.where(high <= FAR, high, np.inf), cost, band
