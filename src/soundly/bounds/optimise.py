"""Better slopes and multipliers for backward bounds, by projected Adam with closed-form gradients.

A bound is taken at one point of the box. Sent forward through the very planes that the backward pass chose, it gives
every step a value; the bound's derivative in a slope is the step's coefficient times that value (envelope theorem), in
a multiplier how far the value violates the constraint. So a round costs one pass back and one forth, and no tape.

Reference: Xu et al., "Fast and Complete" (alpha-CROWN), ICLR 2021; Wang et al., "Beta-CROWN", NeurIPS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soundly.bounds.batch import Bounder, Frame, Split, Start, copied, entries, kink, step_rows
from soundly.bounds.program import Affine, Function


@dataclass(frozen=True, eq=False)
class Raised:
    """What an optimisation found.

    Attributes:
        bound: [rows], the best lower bounds.
        slopes: per function step with a kink the free slopes [rows, n] that gave them.
        multipliers: per step with constraints [rows, n].
    """

    bound: Tensor
    slopes: dict[int, Tensor]
    multipliers: dict[int, Tensor]


class _Adam:
    """Ascent steps, one moment estimate per number (Kingma and Ba, 2015)."""

    def __init__(self) -> None:
        self.moments: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def step(self, key: tuple[str, int], gradient: Tensor, t: int) -> Tensor:
        first, second = self.moments.get(key, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
        first = torch.lerp(first, gradient, 0.1)
        second = torch.lerp(second, gradient * gradient, 0.001)
        self.moments[key] = first, second
        return first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-12)


def raised(
    bounder: Bounder,
    frame: Frame,
    start: Start,
    slopes: Mapping[int, Tensor],
    *,
    rounds: int,
    goal: Tensor,
    splits: Mapping[int, Split] | None = None,
    rate: float = 0.1,
    decay: float = 0.98,
) -> Raised:
    """Raises lower bounds of rows, one row per subproblem (or all of one), until all are above their goals.

    Args:
        slopes: per function step with a kink the first free slopes [rows, n].
        goal: [rows].
        splits: constraints, with their first multipliers.
    """
    now = {j: v for j, v in slopes.items()}
    cuts = {} if splits is None else {i: replace(s) for i, s in splits.items()}
    best = torch.full_like(start.d, -math.inf)
    best_slopes, best_force = dict(now), {i: s.multiplier for i, s in cuts.items()}
    low, high = frame.lower[0], frame.upper[0]
    adam = _Adam()
    scale: dict[int, Tensor] = {}  # of the coefficients where a constraint acts: that of its multiplier
    for t in range(1, rounds + 2):
        lines = bounder.lines(frame, {j: (v, None) for j, v in now.items()})
        found = bounder.backward(frame, lines, start, splits=cuts, keep=True)
        least = found.least(low, high)
        better = least > best
        best = torch.where(better, least, best)
        best_slopes = {j: torch.where(better[:, None], v, best_slopes[j]) for j, v in now.items()}
        best_force = {i: torch.where(better[:, None], s.multiplier, best_force[i]) for i, s in cuts.items()}
        if t > rounds or bool(((best > goal) | frame.infeasible).all()):
            break
        values = bounder.follow(frame, lines, found, torch.where(found.a > 0, low, high))
        pace = rate * decay ** (t - 1)
        for j, a in found.kept.items():
            step = bounder.steps[j]
            if not isinstance(step, Function):
                continue
            if t == 1:
                scale[step.source] = a.abs().mean(1, keepdim=True)
            slopes_of = kink(step.op)
            if j in now and slopes_of is not None:
                left, right = slopes_of
                side = a.clamp(min=0) if right >= left else a.clamp(max=0)
                move = adam.step(("slope", j), side * values[step.source], t)
                now[j] = (now[j] + pace * move).clamp(min(left, right), max(left, right))
        for i, s in cuts.items():
            move = adam.step(("force", i), s.sign * (s.at - values[i]), t)
            s.multiplier = (s.multiplier + pace * scale.get(i, 1.0) * move).clamp(min=0) * (s.sign != 0)
    return Raised(best, best_slopes, best_force)


@dataclass(frozen=True, eq=False)
class Refined:
    """Slopes with which a step's intervals were tightened.

    Attributes:
        entry, side: [rows], which bound each row is: of which entry, 0 lower or 1 upper.
        slopes: per function step with a kink, the free slopes [rows, n].
    """

    entry: Tensor
    side: Tensor
    slopes: dict[int, Tensor]


def refine(bounder: Bounder, frame: Frame, *, rounds: int) -> dict[int, Refined]:
    """Tightens the intervals of one subproblem, step by step, with slopes of their own for every bound; in place.

    Returns:
        The slopes by step, for whoever has to find the same intervals again.
    """
    found: dict[int, Refined] = {}
    box = frame.lower[0], frame.upper[0]
    for i, step in enumerate(bounder.steps):
        if not isinstance(step, (Affine, Function)) or not bounder.read[i] or copied(step) is not None:
            continue
        if i in found or not any(isinstance(s, Function) for s in bounder.steps[: i + 1]):
            continue
        entry = bounder.loose(i, frame)[0].nonzero()[:, 0]
        default = bounder.lines(frame, upto=i + 1)
        free = {
            j: (line.slope_low if k[1] >= k[0] else line.slope_high)
            for j, line in default.items()
            if isinstance(function := bounder.steps[j], Function) and (k := kink(function.op)) is not None
        }
        if len(entry) == 0 or not free:
            continue
        entry, side = entry.repeat(2), torch.tensor([0, 1]).repeat_interleave(len(entry))
        low, high = frame.lower[i].clone(), frame.upper[i].clone()
        kept: list[dict[int, Tensor]] = []
        for part in bounder.portions(len(entry)):
            start = _bounds_of(step, i, entry[part], side[part], low)
            many = {j: v.expand(len(start.d), -1) for j, v in free.items()}
            # A neuron that has become stable needs no better bound.
            goal = torch.zeros_like(start.d)
            result = raised(bounder, frame, start, many, rounds=rounds, goal=goal, rate=0.2)
            kept.append(result.slopes)
            lower = side[part] == 0
            what, bound = entry[part], result.bound
            low[0, what[lower]] = torch.maximum(low[0, what[lower]], bound[lower])
            high[0, what[~lower]] = torch.minimum(high[0, what[~lower]], -bound[~lower])
        found[i] = Refined(entry, side, {j: torch.cat([k[j] for k in kept]) for j in kept[0]})
        frame.lower[i], frame.upper[i] = low, high
        assert box[0] is frame.lower[0]
    return found


def _bounds_of(step: Affine | Function, i: int, entry: Tensor, side: Tensor, like: Tensor) -> Start:
    """Rows for the lower (side 0) and negated upper (side 1) bounds of entries of a step."""
    sign = (1 - 2 * side).to(like.dtype)[:, None]
    if isinstance(step, Function):
        rows = step_rows(entry, step.size, like)
        return Start({i: sign * rows}, rows.new_zeros(len(entry)))
    a: dict[int, Tensor] = {}
    for m, source in step.parts:
        rows = sign * entries(m, entry, step.bias)
        a[source] = a[source] + rows if source in a else rows
    return Start(a, sign[:, 0] * step.bias[entry])
