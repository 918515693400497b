"""Intervals of inner values at those points only that may be counterexamples.

A counterexample satisfies the splits of its subproblem and every row of its clause, s <= slack. Each constraint, times
a multiplier, may be added to a value before it is bounded; slopes and multipliers are those of that bound alone. The
tighter intervals tighten the rows, and these again the intervals.

Reference: Kotha et al., "Provably Bounding Neural Network Preimages" (INVPROP), NeurIPS 2023; Zhou et al.,
"Clip-and-Verify", NeurIPS 2025 (the best multiplier of one constraint).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soundly.bounds.batch import Bounder, copied
from soundly.bounds.frame import Frame, Pass, Side, Slopes, Split, Start
from soundly.bounds.lines import kink
from soundly.bounds.optimise import bounds_of, enough, raised
from soundly.bounds.program import Affine, Function, Matrix, Program

ROUNDS, RATE = 10, 0.1
"""How often slopes and multipliers of a bound are improved, and the first step, of their sizes."""
WORTH = 1e-3
"""Bounds that cut off less of an interval are forgotten."""


@dataclass(frozen=True, eq=False)
class Tightened:
    """Better bounds of entries of one step, and what they were found with.

    Attributes:
        tried: how many bounds were looked for, to find these.
        owner, entry, side: [rows], which subproblem's interval, and 0 for its lower or 1 for its upper end.
        slopes: the free slopes [rows, n].
        multipliers: by step [rows, n], of its constraints.
    """

    step: int
    tried: int
    owner: Tensor
    entry: Tensor
    side: Tensor
    slopes: dict[Side, Tensor]
    multipliers: dict[int, Tensor]


def with_rows(program: Program, y: Tensor, x: Tensor | None, constant: Tensor) -> Program:
    """A program whose last step are rows y.Y + x.X + constant of its outputs Y and inputs X."""
    last = len(program.steps) - 1
    bias = constant.to(next((s.bias.dtype for s in program.steps if isinstance(s, Affine)), torch.float64))
    parts = [(Matrix(y.to(bias)), last)]
    if x is not None:
        parts.append((Matrix(x.to(bias)), 0))
    return Program((*program.steps, Affine(tuple(parts), bias)))


def tighten(
    bounder: Bounder, frame: Frame, row: Start, slopes: Slopes, splits: Mapping[int, Split], wanted: Sequence[int]
) -> Iterator[Tightened]:
    """Tightens the intervals of subproblems step by step, in place.

    Args:
        wanted: the steps, ascending.
        frame: of k subproblems; where some interval becomes empty they are infeasible.
        row: the row that each subproblem has to bound.
        slopes, splits: as for `raised`, of that row; the splits of the last step are the rows of the clause.
    """
    k, last = len(frame), len(bounder.steps) - 1
    read = [i for i in range(1, last) if bounder.read[i] and copied(bounder.steps[i]) is None]
    for i in wanted:
        step = bounder.steps[i]
        found = bounder.backward(frame, bounder.lines(frame, slopes), row, splits=splits, keep=True)
        loose = bounder.loose(i, frame).expand(k, -1) & ~frame.infeasible[:, None]
        if not any(bool(bounder.loose(j, frame).any()) for j in read if j > i):
            loose = loose & _concave(bounder, i, found)
        owner, entry = loose.nonzero(as_tuple=True)
        owner, entry, side = owner.repeat(2), entry.repeat(2), torch.tensor([0, 1]).repeat_interleave(len(owner))
        low, high = (v[i].expand(k, -1).clone() for v in (frame.lower, frame.upper))
        for part in bounder.portions(len(owner)):
            who, what, end = owner[part], entry[part], side[part]
            own, width = _picked(frame, who), (high - low)[who, what]
            now = {key: _of(v, who).expand(len(who), -1) for key, v in slopes.items()}
            cuts = {j: Split(*(_of(v, who) for v in (s.sign, s.at, s.multiplier))) for j, s in splits.items()}
            start = bounds_of(step, i, what, end, low)
            cuts, scale = _first(bounder, i, own, start, Pass(found.a[who], found.d[who]), now, cuts)
            start.a[last] = low.new_zeros(len(who), bounder.steps[last].size)
            best = raised(
                bounder, own, start, now, rounds=ROUNDS, goal=enough(bounder, i, width), splits=cuts, rate=RATE,
                scale=scale,
            )  # fmt: skip
            # What single precision may have added is given back.
            bound = best.bound - 8 * torch.finfo(low.dtype).eps * (best.bound.abs() + width)
            old = torch.where(end == 0, low[who, what], -high[who, what])
            better = torch.isfinite(bound) & (bound > old + WORTH * width)
            who, what, end, bound = (v[better] for v in (who, what, end, bound))
            below = end == 0
            low[who[below], what[below]] = bound[below]
            high[who[~below], what[~below]] = -bound[~below]
            yield Tightened(
                i, len(better), who, what, end, {key: v[better] for key, v in best.slopes.items()},
                {j: v[better] for j, v in best.multipliers.items()},
            )  # fmt: skip
        slack = 1000 * torch.finfo(low.dtype).eps * (low.abs() + high.abs())
        frame.infeasible = frame.infeasible | (low > high + slack).any(1)
        frame.lower[i], frame.upper[i] = torch.minimum(low, high), torch.maximum(low, high)


def _concave(bounder: Bounder, i: int, found: Pass) -> Tensor:
    """Which entries the rows read through a function's chord: the bound on its other side is exact, given the best
    slopes, whatever the interval."""
    wanted = torch.zeros(())
    for j in bounder.readers[i]:
        reader = bounder.steps[j]
        ends = kink(reader.op) if isinstance(reader, Function) else None
        if ends is None or j not in found.kept:
            return torch.ones((), dtype=torch.bool)
        wanted = wanted + (found.kept[j] < 0 if ends[1] >= ends[0] else found.kept[j] > 0)
    return wanted > 0


def _first(
    bounder: Bounder, i: int, own: Frame, start: Start, row: Pass, slopes: Slopes, splits: Mapping[int, Split]
) -> tuple[dict[int, Split], dict[int, Tensor]]:
    """Constraints to begin with: those of the row, times the best multiplier of its plane; and their size."""
    last = len(bounder.steps) - 1
    plain = bounder.backward(own, bounder.lines(own, slopes), start)
    slack = (splits[last].multiplier * splits[last].at).sum(1)
    times, size = multiplier(plain.a, row.a, row.d - slack, own.lower[0], own.upper[0])
    cuts = {j: replace(s, multiplier=times[:, None] * s.multiplier) for j, s in splits.items()}
    return cuts, {i: torch.ones_like(size)[:, None], last: size[:, None]}


def multiplier(w: Tensor, a: Tensor, d: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The g >= 0 for which the least of <w + g a, x> + g d on the box is greatest; and a size that g may have.

    The function of g is concave, and its slope falls by 2 |a_k| r_k where w_k + g a_k changes sign.
    """
    middle, radius = (low + high) / 2, (high - low) / 2
    fall = a.abs() * radius
    at, order = torch.where(a == 0, math.inf, -w / a).sort(1)
    rate = ((a * middle).sum(1) + d + fall.sum(1))[:, None] - 2 * fall.gather(1, order).cumsum(1)
    over = rate <= 0
    best = at.gather(1, over.to(torch.uint8).argmax(1, keepdim=True))[:, 0].clamp(min=0)
    best = torch.where(over.any(1) & torch.isfinite(best), best, 0.0)
    size = (w.abs() * radius).sum(1) / fall.sum(1).clamp(min=1e-30)
    return best, torch.where(best > 0, best, 0.3 * size)


def _of(v: Tensor, who: Tensor) -> Tensor:
    """Those subproblems' numbers, of a batch or of one for all."""
    return v if len(v) == 1 else v[who]


def _picked(frame: Frame, who: Tensor) -> Frame:
    low, high = ([_of(v, who) for v in ends] for ends in (frame.lower, frame.upper))
    return Frame(low, high, frame.infeasible[who])
