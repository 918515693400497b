"""Better slopes and multipliers for backward bounds, by projected Adam with closed-form gradients.

A bound is taken at one point of the box. Sent forward through the very planes that the backward pass chose, it gives
every step a value v; the bound's derivative in the slope of a line is the step's coefficient times v - t, where t is
the point at which the line touches (envelope theorem); in the share of a product's plane it is the coefficient times
the difference of the two planes, in a multiplier how far the value violates the constraint. So a round costs one pass
back and one forth, and no tape.

Reference: Xu et al., "Fast and Complete" (alpha-CROWN), ICLR 2021; Wang et al., "Beta-CROWN", NeurIPS 2021; Shi et al.,
"Neural Network Verification with Branch-and-Bound for General Nonlinearities", 2024 (slopes of smooth functions).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soundly.bounds.batch import Bounder, copied, entries, factors, step_rows
from soundly.bounds.frame import Frame, Pass, Relaxations, Side, Slopes, Split, Start
from soundly.bounds.lines import Samples, bent, kink
from soundly.bounds.products import Planes
from soundly.bounds.program import Affine, Function, Step, Times, Variable
from soundly.bounds.relaxation import Lines


@dataclass(frozen=True, eq=False)
class Raised:
    """What an optimisation found.

    Attributes:
        bound: [rows], the best lower bounds.
        slopes: the free slopes [rows, n] that gave them.
        multipliers: per step with constraints [rows, n].
    """

    bound: Tensor
    slopes: dict[Side, Tensor]
    multipliers: dict[int, Tensor]


RATE, DECAY = 0.2, 0.9
"""The first step, of a range of slopes, where a choice is shared, and what remains of it a round later."""


class _Adam:
    """Ascent steps, one moment estimate per number (Kingma and Ba, 2015)."""

    def __init__(self) -> None:
        self.moments: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def step(self, key: tuple[int, int], gradient: Tensor, t: int) -> Tensor:
        first, second = self.moments.get(key, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
        first = torch.lerp(first, gradient, 0.1)
        second = torch.lerp(second, gradient * gradient, 0.001)
        self.moments[key] = first, second
        return first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-12)


class Freedom:
    """What is free in the relaxations over a frame: the relaxations for given slopes, a bound's gradients in them, and
    steps along it. Slopes of one sign move by factors, as they may span magnitudes."""

    def __init__(self, bounder: Bounder, frame: Frame, slopes: Slopes) -> None:
        self.bounder, self.frame = bounder, frame
        self.default = bounder.lines(frame)
        self.adam = _Adam()
        self.samples: dict[int, Samples] = {}
        self.touching: dict[Side, Tensor] = {}
        self.range: dict[int, tuple[Tensor, Tensor]] = {}
        for j in sorted({j for j, _ in slopes}):
            step = bounder.steps[j]
            if isinstance(step, Function) and kink(step.op) is None:
                low, high = frame.lower[step.source], frame.upper[step.source]
                samples = Samples(step.op, low, high)
                self.samples[j] = samples
                self.range[j] = samples.slope.amin(0), samples.slope.amax(0)

    def relaxations(self, slopes: Slopes) -> Relaxations:
        plain = {key: v for key, v in slopes.items() if key[0] not in self.samples}
        found = self.bounder.lines(self.frame, plain, known=self.default)
        for (j, side), slope in slopes.items():
            if j in self.samples:
                step, line = self.bounder.steps[j], found[j]
                assert isinstance(step, Function) and isinstance(line, Lines)
                low, high = self.frame.lower[step.source], self.frame.upper[step.source]
                known = bent(step.op, low, high) & torch.isfinite(line.offset_low) & torch.isfinite(line.offset_high)
                offset, self.touching[j, side] = self.samples[j].extreme(slope, side)
                ends = list(line)
                ends[2 * side] = torch.where(known, slope, ends[2 * side])
                ends[2 * side + 1] = torch.where(known, offset, ends[2 * side + 1])
                found[j] = Lines(*ends)
        return found

    def gradient(self, key: Side, found: Pass, values: Sequence[Tensor]) -> Tensor | None:
        """[rows, n]: the derivative of rows' bounds in a slope; None if they do not depend on it."""
        j, side = key
        if j not in found.kept:
            return None
        step, a = self.bounder.steps[j], found.kept[j]
        a = a.clamp(min=0) if side == 0 else a.clamp(max=0)
        if isinstance(step, Function):
            v = values[step.source]
            return a * (v - self.touching[key] if j in self.samples else v)
        assert isinstance(step, Times)
        xl, xu, yl, yu = factors(step, self.frame)
        x, y, dx, dy = values[step.left], values[step.right], xu - xl, yu - yl
        return a * (yu * xu - yl * xl - dy * x - dx * y if side == 0 else yl * xu - yu * xl + dy * x - dx * y)

    def moved(self, key: Side, slope: Tensor, gradient: Tensor, pace: float, t: int) -> Tensor:
        """The slope after a step."""
        j = key[0]
        step = self.bounder.steps[j]
        if j not in self.samples:
            ends = kink(step.op) if isinstance(step, Function) else (0.0, 1.0)
            assert ends is not None
            return (slope + pace * self.adam.step(key, gradient, t)).clamp(min(ends), max(ends))
        least, greatest = self.range[j]
        signed = least * greatest > 0
        move = self.adam.step(key, torch.where(signed, gradient * slope, gradient), t)
        factor = torch.where(signed, greatest / least, 1.0).log().abs()
        moved = torch.where(signed, slope * torch.exp(pace * factor * move), slope + pace * (greatest - least) * move)
        return moved.clamp(least, greatest)


def raised(
    bounder: Bounder,
    frame: Frame,
    start: Start,
    slopes: Slopes,
    *,
    rounds: int,
    goal: Tensor,
    splits: dict[int, Split] | None = None,
    rate: float = 0.1,
    decay: float = 0.98,
    scale: Mapping[int, Tensor] | None = None,
) -> Raised:
    """Raises lower bounds of rows, one row per subproblem (or all of one), until all are above their goals.

    Args:
        slopes: the first free slopes [rows, n].
        goal: [rows].
        splits: constraints, with their first multipliers.
        scale: by step [rows, 1] how large multipliers are; otherwise as the coefficients where the constraint acts.
    """
    now = dict(slopes)
    cuts = {} if splits is None else {i: replace(s) for i, s in splits.items()}
    best = torch.full_like(start.d, -math.inf)
    best_slopes, best_force = dict(now), {i: s.multiplier for i, s in cuts.items()}
    low, high = frame.lower[0], frame.upper[0]
    freedom, adam = Freedom(bounder, frame, slopes), _Adam()
    sizes = dict(scale or {})
    for t in range(1, rounds + 2):
        lines = freedom.relaxations(now)
        found = bounder.backward(frame, lines, start, splits=cuts, keep=True)
        least = found.least(low, high)
        better = least > best
        best = torch.where(better, least, best)
        best_slopes = {key: torch.where(better[:, None], v, best_slopes[key]) for key, v in now.items()}
        best_force = {i: torch.where(better[:, None], s.multiplier, best_force[i]) for i, s in cuts.items()}
        if t > rounds or time.monotonic() > bounder.deadline or bool(((best > goal) | frame.infeasible).all()):
            break
        values = bounder.follow(lines, found, found.lowest(low, high))
        pace = rate * decay ** (t - 1)
        if t == 1:
            for j, a in found.kept.items():
                for source in bounder.steps[j].sources:
                    sizes.setdefault(source, a.abs().mean(1, keepdim=True))
        for key, slope in now.items():
            gradient = freedom.gradient(key, found, values)
            if gradient is not None:
                now[key] = freedom.moved(key, slope, gradient, pace, t)
        for i, s in cuts.items():
            move = adam.step((i, -1), s.sign * (s.at - values[i]), t)
            s.multiplier = (s.multiplier + pace * sizes.get(i, 1.0) * move).clamp(min=0) * (s.sign != 0)
    return Raised(best, best_slopes, best_force)


def first(bounder: Bounder, frame: Frame, *, upto: int | None = None) -> dict[Side, Tensor]:
    """The default slopes [batch, n] of whatever is free."""
    found = {}
    lines = bounder.lines(frame, upto=upto)
    for j, side in bounder.free(frame, upto=upto):
        line = lines[j]
        found[j, side] = torch.full_like(line.x_low, 0.5) if isinstance(line, Planes) else line[2 * side]
    return found


@dataclass(frozen=True, eq=False)
class Refined:
    """Slopes with which a step's intervals were tightened.

    Attributes:
        entry, side: [rows], which bound each row is: of which entry, 0 lower or 1 upper.
        which: [rows], its row of the slopes.
        slopes: the free slopes [vectors, n].
    """

    entry: Tensor
    side: Tensor
    which: Tensor
    slopes: dict[Side, Tensor]


def refine(bounder: Bounder, frame: Frame, *, rounds: int, together: bool = False) -> dict[int, Refined]:
    """Tightens the intervals of one subproblem, step by step, with slopes of their own for every bound; in place.

    Args:
        together: one choice of slopes per round for all bounds of a step; each keeps the round that was best for it.

    Returns:
        The slopes by step, for whoever has to find the same intervals again.
    """
    found: dict[int, Refined] = {}
    for i, step in enumerate(bounder.steps):
        if isinstance(step, Variable):
            continue
        low, high = bounder.forward(step, frame)
        frame.lower[i], frame.upper[i] = torch.maximum(low, frame.lower[i]), torch.minimum(high, frame.upper[i])
        if not bounder.read[i] or bounder.exact[i] or copied(step) is not None:
            continue
        entry = bounder.loose(i, frame)[0].nonzero()[:, 0]
        free = first(bounder, frame, upto=i + 1)
        if len(entry) == 0 or not free:
            continue
        entry, side = entry.repeat(2), torch.tensor([0, 1]).repeat_interleave(len(entry))
        if together:
            bound, which, slopes = _together(bounder, frame, i, entry, side, free, rounds)
        else:
            kept = []
            for part in bounder.portions(len(entry)):
                start = bounds_of(step, i, entry[part], side[part], frame.lower[i])
                many = {key: v.expand(len(start.d), -1) for key, v in free.items()}
                # A neuron that has become stable beyond doubt needs no better bound.
                goal = enough(bounder, i, (frame.upper[i] - frame.lower[i])[0, entry[part]])
                kept.append(raised(bounder, frame, start, many, rounds=rounds, goal=goal, rate=0.2))
            bound, which = torch.cat([k.bound for k in kept]), torch.arange(len(entry))
            slopes = {key: torch.cat([k.slopes[key] for k in kept]) for key in free}
        low, high = frame.lower[i].clone(), frame.upper[i].clone()
        below = side == 0
        low[0, entry[below]] = torch.maximum(low[0, entry[below]], bound[below])
        high[0, entry[~below]] = torch.minimum(high[0, entry[~below]], -bound[~below])
        frame.lower[i], frame.upper[i] = torch.minimum(low, high), torch.maximum(low, high)
        found[i] = Refined(entry, side, which, slopes)
    return found


def enough(bounder: Bounder, i: int, width: Tensor) -> Tensor:
    """From where on a bound of a step's entries need not be better: a little above 0 if only kinks depend on it."""
    readers = [bounder.steps[j] for j in bounder.readers[i]]
    kinks = all(isinstance(step, Function) and kink(step.op) is not None for step in readers)
    return 1e-3 * width if kinks else torch.full_like(width, math.inf)


def _together(
    bounder: Bounder, frame: Frame, i: int, entry: Tensor, side: Tensor, free: dict[Side, Tensor], rounds: int
) -> tuple[Tensor, Tensor, dict[Side, Tensor]]:
    """The best bounds [rows], the round of each, and the slopes [rounds, n]."""
    step = bounder.steps[i]
    freedom = Freedom(bounder, frame, free)
    now, tried = dict(free), []
    best = frame.lower[i].new_full((len(entry),), -math.inf)
    which = torch.zeros_like(entry)
    low, high = frame.lower[0], frame.upper[0]
    for t in range(1, rounds + 2):
        lines = freedom.relaxations(now)
        tried.append(dict(now))
        total = {key: torch.zeros_like(v) for key, v in now.items()}
        for part in bounder.portions(len(entry)):
            start = bounds_of(step, i, entry[part], side[part], low)
            found = bounder.backward(frame, lines, replace(start, owner=torch.zeros_like(entry[part])), keep=True)
            least = found.least(low, high)
            better = least > best[part]
            best[part] = torch.where(better, least, best[part])
            which[part] = torch.where(better, t - 1, which[part])
            if t <= rounds:
                values = bounder.follow(lines, found, found.lowest(low, high))
                for key, v in total.items():
                    gradient = freedom.gradient(key, found, values)
                    if gradient is not None:
                        v += gradient.sum(0, keepdim=True)
        if t <= rounds:
            now = {key: freedom.moved(key, v, total[key], RATE * DECAY ** (t - 1), t) for key, v in now.items()}
    return best, which, {key: torch.cat([v[key] for v in tried]) for key in now}


def bounds_of(step: Step, i: int, entry: Tensor, side: Tensor, like: Tensor) -> Start:
    """Rows for the lower (side 0) and negated upper (side 1) bounds of entries of a step."""
    sign = (1 - 2 * side).to(like.dtype)[:, None]
    if not isinstance(step, Affine):
        rows = step_rows(entry, step.size, like)
        return Start({i: sign * rows}, rows.new_zeros(len(entry)))
    a: dict[int, Tensor] = {}
    for m, source in step.parts:
        rows = sign * entries(m, entry, step.bias)
        a[source] = a[source] + rows if source in a else rows
    return Start(a, sign[:, 0] * step.bias[entry])
