"""Which inner values a subproblem may be split at, and roughly what each split would bring.

The two scores of a neuron are what its relaxation costs the bound: at the point where the bound is taken, and at the
worst point of its interval.

Reference: Bunel et al., "Branch and Bound for Piecewise Linear Neural Network Verification", JMLR 2020; De Palma et
al., "Improved Branch and Bound", 2021; Shi et al., "Neural Network Verification with Branch-and-Bound for General
Nonlinearities", 2024 (splitting points).
"""

from __future__ import annotations

import torch
from torch import Tensor

from soundly.bounds.batch import Bounder
from soundly.bounds.frame import Frame, Pass, Relaxations
from soundly.bounds.lines import bent, jumps, kink
from soundly.bounds.program import Function
from soundly.bounds.relaxation import Lines


def candidates(
    bounder: Bounder, frame: Frame, lines: Relaxations, found: Pass, x: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Neurons [c], where to split them [k, c], two scores [2, k, c] (-1 where there is nothing to split), and the first
    multipliers of both halves [2, k, c].

    Args:
        found: of one row for each subproblem, with what it kept.
        x: [k, inputs], where the rows are least.
        offset: the number of each step's first neuron.
    """
    values, many = bounder.follow(lines, found, x), len(x)
    neurons, points, here, worst, force = [], [], [], [], []
    for j, step in enumerate(bounder.steps):
        # Inputs are split by the other search.
        if not isinstance(step, Function) or j not in found.kept or step.source == 0:
            continue
        i = step.source
        low, high = frame.lower[i].expand(many, -1), frame.upper[i].expand(many, -1)
        index = bent(step.op, low, high).any(0).nonzero()[:, 0]
        if len(index) == 0:
            continue
        low, high, a = low[:, index], high[:, index], found.kept[j][:, index]
        v, known = values[i][:, index].clamp(low, high), lines[j]
        assert isinstance(known, Lines)
        line = [w.expand(many, -1)[:, index] for w in known]
        plane = torch.where(a >= 0, line[0] * v + line[1], line[2] * v + line[3])
        loss = a * (step.op.apply(v) - plane)
        at = torch.zeros_like(low) if kink(step.op) is not None else (low + high) / 2
        for t in step.op.breaks:
            at = torch.where((low < t) & (t < high), t, at)
        for t in jumps(step.op):
            at = torch.where((low <= t) & (t <= high), t, at)
        widest = torch.where(a < 0, line[3], torch.zeros_like(a))  # the chord's intercept
        if kink(step.op) is None:
            middle = step.op.apply(at)
            widest = torch.where(a >= 0, middle - line[0] * at - line[1], line[2] * at + line[3] - middle)
            widest = widest.clamp(min=0)
            loss = torch.maximum(loss, 0.5 * a.abs() * widest)
        inside = bent(step.op, low, high)
        neurons.append(index + offset[i])
        points.append(at)
        here.append(torch.where(inside, loss, -1.0))
        worst.append(torch.where(inside, a.abs() * widest, -1.0))
        # On each half the function is one straight line, and a plane that was better beyond it is made up for.
        ends, slope = kink(step.op), torch.where(a >= 0, line[0], line[2])
        left, right = (slope, slope) if ends is None else ends
        force.append(torch.stack([a * (slope - left), a * (right - slope)]).clamp(min=0))
    if not neurons:
        none = x.new_empty(2, many, 0)
        return torch.empty(0, dtype=torch.int64), none[0], none, none
    return (
        torch.cat(neurons),
        torch.cat(points, 1),
        torch.stack([torch.cat(here, 1), torch.cat(worst, 1)]),
        torch.cat(force, 2),
    )
