"""The exact answer where every neuron is split: the network is affine there, and a row's least value a linear program.

Its dual solution is what a certificate needs: multipliers of the splits with which the backward pass reaches the same
bound. Its primal solution is a point where the row is least, a counterexample if it is not positive.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linprog
from torch import Tensor

from soundly.bounds.batch import Bounder
from soundly.bounds.frame import Frame, OutOfTime, Split, Start
from soundly.bounds.optimise import bounds_of
from soundly.bounds.program import Affine, Function

Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Leaf:
    """The solution of a leaf.

    Attributes:
        bound: the row's least value on the leaf; infinite if the leaf is empty.
        multipliers: per step with splits, [1, n], not negative.
        point: [inputs], where the row is least, or, below the goal, deep inside where it is; None if the leaf is empty.
            With a ball it may lie a little outside.
    """

    bound: float
    multipliers: dict[int, Tensor]
    point: Tensor | None


def solve(bounder: Bounder, frame: Frame, start: Start, splits: Mapping[int, Split], goal: float = 0.0) -> Leaf | None:
    """Solves one leaf, a frame of one subproblem in which no function is bent, for one row that should exceed a goal.

    Returns:
        None where a number is not finite, or the solver does not reach an optimum.
    """
    lines = bounder.lines(frame)
    row = bounder.backward(frame, lines, start)
    sides, ends, where = [], [], []
    for i, split in splits.items():
        entry = split.sign[0].nonzero()[:, 0]
        step = bounder.steps[i]
        assert isinstance(step, (Affine, Function))
        plane = bounder.backward(frame, lines, bounds_of(step, i, entry, torch.zeros_like(entry), frame.lower[0]))
        sign, at = split.sign[0, entry], split.at[0, entry]
        sides.append(-sign[:, None] * plane.a)  # sign (<a, x> + d - at) >= 0
        ends.append(sign * (plane.d - at))
        where += [(i, int(e)) for e in entry]
    a, b = torch.cat(sides).double().numpy(), torch.cat(ends).double().numpy()
    scale = np.abs(a).max(1).clip(1e-30)
    a, b = a / scale[:, None], b / scale
    box = torch.stack([frame.lower[0][0], frame.upper[0][0]], 1).double().numpy()
    if not all(bool(np.isfinite(v).all()) for v in (a, b, row.a.numpy(), row.d.numpy())):
        return None
    cost = row.a[0].double().numpy()
    result = _solved(bounder, cost, a, b, box)
    for _ in range(CUTS if bounder.ball is not None else 0):
        assert bounder.ball is not None
        if result.status != 0 or result.fun + float(row.d[0]) > goal:
            break
        cut = bounder.ball.plane(torch.from_numpy(result.x))
        if cut is None:
            break
        a, b = np.r_[a, cut[0].numpy()[None]], np.r_[b, float(cut[1])]
        result = _solved(bounder, cost, a, b, box)
    empty = {i: torch.zeros_like(s.sign) for i, s in splits.items()}
    if result.status == 2:
        return Leaf(np.inf, _farkas(a, b, box, where, scale, empty), None)
    if result.status != 0:
        return None
    for (i, e), dual, size in zip(where, result.ineqlin.marginals[: len(where)], scale, strict=True):
        empty[i][0, e] = max(-dual, 0.0) / size
    bound = float(result.fun) + float(row.d[0])
    target = (bound + goal) / 2 - float(row.d[0])
    if bound > goal or not math.isfinite(target):
        return Leaf(bound, empty, torch.from_numpy(result.x))
    inside = _inside(np.r_[a, row.a.double().numpy()], np.r_[b, target], box)
    return Leaf(bound, empty, torch.from_numpy(result.x if inside is None else inside))


def _solved(bounder: Bounder, cost: Array, a: Array, b: Array, box: Array) -> Any:
    if time.monotonic() > bounder.deadline:
        raise OutOfTime
    limit = {} if math.isinf(bounder.deadline) else {"time_limit": max(0.1, bounder.deadline - time.monotonic())}
    return linprog(cost, A_ub=a, b_ub=b, bounds=box, method="highs-ds", options=limit)


def _inside(a: Array, b: Array, box: Array) -> Array | None:
    """The centre of the largest cube where a x <= b in a box: a corner would lie between pieces of the network, where
    its gradient is anyone's guess. None if there is no room."""
    n = a.shape[1]
    sides = np.r_[np.c_[a, np.abs(a).sum(1)], np.c_[np.eye(n), np.ones(n)], np.c_[-np.eye(n), np.ones(n)]]
    bounds = [(None, None)] * n + [(0, None)]
    result = linprog(np.r_[np.zeros(n), -1.0], sides, np.r_[b, box[:, 1], -box[:, 0]], bounds=bounds, method="highs-ds")
    centre: Array = result.x
    return centre[:n] if result.status == 0 else None


def _farkas(
    a: Array, b: Array, box: Array, where: list[tuple[int, int]], scale: Array, empty: dict[int, Tensor]
) -> dict[int, Tensor]:
    """Multipliers that show that a leaf is empty: of the least violation of its constraints, much enlarged."""
    n = a.shape[1]
    wide = np.concatenate([a, -np.ones((len(a), 1))], 1)
    cost = np.r_[np.zeros(n), 1.0]
    result = linprog(cost, A_ub=wide, b_ub=b, bounds=np.r_[box, [[0.0, np.inf]]], method="highs-ds")
    if result.status == 0 and result.fun > 0:
        for (i, entry), dual, size in zip(where, result.ineqlin.marginals[: len(where)], scale, strict=True):
            empty[i][0, entry] = max(-dual, 0.0) / size * ENLARGED / result.fun
    return empty


CUTS = 50
"""A ball is cut out by at most so many of its tangent planes, each where the last solution left it (Kelley, 1960)."""
ENLARGED = 1e3
"""The bound that an empty leaf shall reach, roughly: rows are far smaller."""
