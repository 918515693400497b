"""Backward bounds over many boxes that share their slopes: rows are carried back once, boxes differ in offsets only.

Every line keeps the slope that is good on one box, the reference, and moves until it holds on another. So a further box
costs a few matrix products and no backward pass. The boxes of a search for explanations differ in a few inputs: there
next to nothing is lost. Nothing here accounts for rounding, as in `soundly.bounds.batch`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from soundly.bounds.batch import Bounder, copied, factors
from soundly.bounds.frame import Frame, Start
from soundly.bounds.lines import band, kink, lines
from soundly.bounds.products import Planes, planes
from soundly.bounds.program import Function, Times, Variable
from soundly.bounds.relaxation import Lines
from soundly.graph.elementwise import Elementwise

ROOM = 2**26
"""How many numbers the rows of one step may take; without room its intervals are those of the whole."""


@dataclass(frozen=True, eq=False)
class Carried:
    """Rows at the inputs: at least <a, x> + d + the offsets of functions and products times their coefficients.

    Attributes:
        a: [rows, inputs].
        d: [rows].
        kept: by step [rows, n], the coefficients of its values on the way.
    """

    a: Tensor
    d: Tensor
    kept: Mapping[int, Tensor]

    def least(self, lower: Tensor, upper: Tensor, offsets: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
        """Lower bounds [batch, rows] over boxes [batch, inputs]."""
        value = self.d + (lower + upper) / 2 @ self.a.T - (upper - lower) / 2 @ self.a.abs().T
        for j, k in self.kept.items():
            below, above = offsets[j]
            value = value + below @ k.clamp(min=0).T + above @ k.clamp(max=0).T
        return value.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


class Shared:
    """Bounds of rows of a program's outputs over boxes, with the slopes that are good on one of them.

    Args:
        whole: intervals of every step over one box that holds all others.
        lower, upper: the reference [inputs].
        start: the rows, all of one subproblem.

    Attributes:
        rows: the rows at the inputs.
    """

    def __init__(self, bounder: Bounder, whole: Frame, lower: Tensor, upper: Tensor, start: Start) -> None:
        self.bounder, self.whole = bounder, whole
        self.entries = self._carriable()
        self.needed = self._needed()
        self.carried: dict[int, Carried] = {}
        self.slopes: dict[int, Lines | Planes] = {}
        frame, _ = self._follow(lower[None], upper[None], choose=True)
        self.rows = self._carry(frame, start)

    def least(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Lower bounds of the rows over boxes within the whole [batch, inputs]: [batch, rows]."""
        _, offsets = self._follow(lower, upper)
        return self.rows.least(lower, upper, offsets)

    def _carriable(self) -> dict[int, Tensor]:
        """Which entries of which steps get bounds from rows: those on which a relaxation may depend."""
        bounder, found = self.bounder, {}
        for i, step in enumerate(bounder.steps):
            if bounder.read[i] and not bounder.exact[i] and copied(step) is None:
                entry = bounder.loose(i, self.whole)[0].nonzero()[:, 0]
                if len(entry) and 2 * len(entry) * bounder.widest <= ROOM:
                    found[i] = entry
        return found

    def _needed(self) -> set[int]:
        """The steps whose intervals are asked for: what functions and products read, and what those come from."""
        needed: set[int] = set()
        for i in reversed(range(len(self.bounder.steps))):
            step = self.bounder.steps[i]
            if isinstance(step, (Function, Times)) or (i in needed and i not in self.entries):
                needed.update(step.sources)
        return needed

    def _follow(
        self, lower: Tensor, upper: Tensor, *, choose: bool = False
    ) -> tuple[Frame, dict[int, tuple[Tensor, Tensor]]]:
        """Intervals of the steps that are needed, and the offsets of functions and products. At the reference the
        slopes are chosen on the way, and the rows of inner steps carried back."""
        bounder, whole = self.bounder, self.whole
        frame = Frame([lower], [upper], torch.zeros(len(lower), dtype=torch.bool))
        offsets: dict[int, tuple[Tensor, Tensor]] = {}
        for i, step in enumerate(bounder.steps[1:], 1):
            assert not isinstance(step, Variable)
            low, high = whole.lower[i], whole.upper[i]
            if i in self.needed and i not in self.entries:
                least, greatest = bounder.forward(step, frame)
                low, high = torch.maximum(low, least), torch.minimum(high, greatest)
            if isinstance(step, Function):
                ends = frame.lower[step.source], frame.upper[step.source]
                line = self.slopes.setdefault(i, lines(step.op, *ends)) if choose else self.slopes[i]
                assert isinstance(line, Lines)
                offsets[i] = _offset(step.op, *ends, line.slope_low, 0), _offset(step.op, *ends, line.slope_high, 1)
            elif isinstance(step, Times):
                sides = factors(step, frame)
                plane = self.slopes.setdefault(i, planes(*sides)) if choose else self.slopes[i]
                assert isinstance(plane, Planes)
                offsets[i] = _corner(sides, plane)
            if i in self.entries and i in self.needed:
                entry = self.entries[i]
                if choose:
                    self.carried[i] = self._carry(frame, bounder._both(i, entry, torch.zeros_like(entry)))
                least, greatest = self.carried[i].least(lower, upper, offsets).chunk(2, 1)
                low, high = low.repeat(len(lower), 1), high.repeat(len(lower), 1)
                low[:, entry] = torch.maximum(low[:, entry], least)
                high[:, entry] = torch.minimum(high[:, entry], -greatest)
            frame.lower.append(torch.minimum(low, high))  # apart only by rounding
            frame.upper.append(torch.maximum(low, high))
        return frame, offsets

    def _carry(self, frame: Frame, start: Start) -> Carried:
        """Rows back to the inputs without any offset: those are a box's own."""
        bare: dict[int, Lines | Planes] = {}
        for j, line in self.slopes.items():
            zero = torch.zeros_like(line[0])
            if isinstance(line, Planes):
                bare[j] = line._replace(c_low=zero, c_high=zero)
            else:
                bare[j] = line._replace(offset_low=zero, offset_high=zero)
        found = self.bounder.backward(frame, bare, start, keep=True)
        return Carried(found.a, found.d, found.kept)


def _offset(f: Elementwise, lower: Tensor, upper: Tensor, slope: Tensor, side: int) -> Tensor:
    """The least (side 0) or greatest of f(t) - slope t on intervals [batch, n], for slopes [1, n]."""
    slopes = kink(f)
    if slopes is None:
        return band(f, lower, upper, slope.expand(lower.shape))[side].reshape(lower.shape)
    inside = torch.zeros_like(lower).clamp(lower, upper)
    points = torch.stack([lower, upper, inside])
    left, right = slopes
    value = torch.where(points >= 0, right * points, left * points) - slope * points
    return value.amin(0) if side == 0 else value.amax(0)


def _corner(rectangle: tuple[Tensor, Tensor, Tensor, Tensor], plane: Planes) -> tuple[Tensor, Tensor]:
    """By how much planes of given directions must be moved to lie below and above u v on rectangles: at a corner."""
    xl, xu, yl, yu = rectangle
    corners = [(u, v) for u in (xl, xu) for v in (yl, yu)]
    below = torch.stack([u * v - plane.x_low * u - plane.y_low * v for u, v in corners]).amin(0)
    above = torch.stack([u * v - plane.x_high * u - plane.y_high * v for u, v in corners]).amax(0)
    return below, above
