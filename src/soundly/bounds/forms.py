"""Affine forms: values followed forward over boxes in which few inputs vary, for next to nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from soundly.bounds.lines import band, kink
from soundly.bounds.program import Affine, Function, Step, Times, Variable
from soundly.bounds.relaxation import Lines

if TYPE_CHECKING:
    from soundly.bounds.frame import Frame, Relaxations

FORWARD = 32
"""With at most this many varying inputs, values are followed forward as affine forms as well."""


class Forms:
    """Affine forms: the value of a step is centre + <generators, e> + r with |e| <= 1, one e per varying input, and
    |r| <= rest. A forward pass over few inputs costs next to nothing, and is all that early steps need.

    Reference: Stolfi and de Figueiredo, "Self-validated numerical methods", 1997 (affine arithmetic).
    """

    def __init__(self, steps: Sequence[Step], lower: Tensor, upper: Tensor) -> None:
        self.steps = steps
        self.box = lower, upper
        self.vary = (upper > lower).any(0).nonzero()[:, 0]
        self.used = 0 < len(self.vary) <= FORWARD
        self.centre: list[Tensor] = []
        self.generators: list[Tensor] = []
        self.rest: list[Tensor] = []

    def follow(self, i: int, frame: Frame, known: Relaxations) -> tuple[Tensor, Tensor]:
        """The form of the next step, and the interval it says."""
        step = self.steps[i]
        match step:
            case Variable():
                lower, upper = self.box
                centre, rest = (lower + upper) / 2, torch.zeros_like(lower)
                generators = torch.diag_embed((upper - lower) / 2)[:, self.vary]
            case Affine(parts, bias):
                centre = bias.expand(len(frame), -1)
                rest = torch.zeros_like(centre)
                generators = centre.new_zeros(len(frame), len(self.vary), step.size)
                for part, source in parts:
                    centre = centre + part.apply(self.centre[source])
                    generators = generators + part.apply(self.generators[source])
                    rest = rest + part.absolute.apply(self.rest[source])
            case Function(source, op):
                low, high = frame.lower[source], frame.upper[source]
                centre, generators, rest = self.narrow(source, low, high)
                line = known[i]
                assert isinstance(line, Lines)
                slopes_of = kink(op)
                if slopes_of is not None and slopes_of[1] >= slopes_of[0]:
                    k_, least, greatest = line.slope_high, torch.zeros_like(low), line.offset_high
                elif slopes_of is not None:
                    k_, least, greatest = line.slope_low, line.offset_low, torch.zeros_like(low)
                else:
                    k_ = torch.where(torch.isfinite(line.slope_high), line.slope_high, 0.0)
                    least, greatest = (v.reshape(low.shape) for v in band(op, low, high, k_))
                centre = k_ * centre + (least + greatest) / 2
                generators, rest = k_[:, None] * generators, k_.abs() * rest + (greatest - least) / 2
            case Times(left, right):
                (a, ga, ra), (b, gb, rb) = (self.narrow(j, frame.lower[j], frame.upper[j]) for j in (left, right))
                wide_a, wide_b = ga.abs().sum(1) + ra, gb.abs().sum(1) + rb
                centre = a * b
                generators = a[:, None] * gb + b[:, None] * ga
                rest = a.abs() * rb + b.abs() * ra + wide_a * wide_b
        self.centre.append(centre)
        self.generators.append(generators)
        self.rest.append(rest)
        wide = generators.abs().sum(1) + rest
        low = (centre - wide).nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        return low, (centre + wide).nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)

    def narrow(self, i: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A step's form, or its interval alone where that is tighter than the rest."""
        centre, generators, rest = self.centre[i], self.generators[i], self.rest[i]
        half = (high - low) / 2
        plain = (half < rest) | ~torch.isfinite(rest)
        return (
            torch.where(plain, (low + high) / 2, centre),
            torch.where(plain[:, None], 0.0, generators),
            torch.where(plain, half, rest),
        )
