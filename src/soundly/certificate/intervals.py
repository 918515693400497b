"""Intervals of all steps of a program over boxes: forward, by affine forms, and by backward passes where it matters.

Nothing is believed: what a certificate stores are slopes for single bounds, and any slope is sound. Intervals of steps
are met with what is known already, so they only become narrower from a node of a split tree to its children.
"""

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from soundly.certificate.bounding import ABOVE, FLOOR, Frame, Pieces, View, pieces, relaxed
from soundly.certificate.forms import Forms
from soundly.certificate.functions import Band, Sides
from soundly.certificate.program import MOST, Affine, Apply, Program, Step, Stored, Times, Variable
from soundly.certificate.rings import FAR, U

Array = npt.NDArray[Any]


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
        deadline: on the clock of `time.monotonic`.

    Returns:
        the frame [M, n]; which boxes are empty or hold no point that the inherited intervals allow [M].

    Raises:
        TimeoutError: after the deadline.
    """
    frame, followed = Frame(), Forms(program) if forms else None
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
        if not tightened[i]:
            continue
        node, entry = (_wanted(program, i, low, frame.upper[i], apart, frame.sides(i)) & ~dead[:, None]).nonzero()
        if len(node):
            _tighten(program, frame, i, node, entry, group, stored, deadline)
            dead = dead | _settle(frame, i)
    if together and followed is not None:
        frame.factors = followed.factors(frame)
    return frame, dead


def _tighten(
    program: Program, frame: Frame, i: int, node: Array, entry: Array, group: Array, stored: Stored, deadline: float
) -> None:
    """Meets the intervals of some entries of step i with backward bounds, each with stored slopes if it has any."""
    node, entry, side = np.repeat(node, 2), np.repeat(entry, 2), np.tile([0, 1], len(node))
    row = stored.rows(group[node], 2 * (program.offsets[i] + entry) + side)
    low, high = frame.lower[i].copy(), frame.upper[i].copy()
    for chosen in (False, True):
        which = np.flatnonzero((row >= 0) == chosen)
        size = program.rows_at_once
        if chosen:  # with relaxations of their own
            size = max(1, min(size, MOST // int(program.offsets[-1])))
        for begin in range(0, len(which), size):
            in_time(deadline)
            some = which[begin : begin + size]
            owner, at, sign = node[some], entry[some], 1.0 - 2.0 * side[some]
            own: dict[int, Pieces] = frame.pieces
            if chosen:
                (boxes, rows), each = np.unique(np.stack([owner, row[some]]), axis=1, return_inverse=True)
                slopes, each = stored.of(rows), each.reshape(-1)
                own = {j: replace(pieces(program, j, frame, slopes, boxes), owner=each) if program.has_slots(j)
                       else known for j, known in own.items()}  # fmt: skip
            view = View(program, frame, own, frame.lower[0], frame.upper[0])
            bounds = view.entries(i, at, sign, owner)
            below = sign > 0
            np.maximum.at(low, (owner[below], at[below]), bounds[below])
            np.minimum.at(high, (owner[~below], at[~below]), -bounds[~below])
    frame.lower[i], frame.upper[i] = low, high


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
