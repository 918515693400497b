"""The exact minimum of a small piecewise linear program over a box, by mixed-integer programming.

A reference that shares nothing with bounds and searches: maps are taken as matrices, intervals for the big-M
constraints are computed here, and HiGHS does the rest.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from soundly.bounds.program import Affine, Function, Program


def least(program: Program, lower: Tensor, upper: Tensor, entry: int, *, seconds: float = 2.0) -> float | None:
    """The least value of an output over the box [lower, upper], to the solver's tolerance (1e-6 of the values).

    Args:
        program: of affine steps, `relu` and `abs` alone, in float64.

    Returns:
        None where the solver did not finish in time.
    """
    starts, count = [0], program.steps[0].size
    low, high = [lower.numpy()], [upper.numpy()]
    rows: list[tuple[dict[int, float], float, float]] = []
    whole: list[int] = []
    extra = sum(step.size for step in program.steps)  # binary variables follow the values

    for step in program.steps[1:]:
        first = count
        starts.append(first)
        count += step.size
        if isinstance(step, Affine):
            centre, radius = np.zeros(step.size), np.zeros(step.size)
            terms: list[dict[int, float]] = [{first + k: -1.0} for k in range(step.size)]
            for part, source in step.parts:
                matrix = part.apply(torch.eye(program.steps[source].size, dtype=torch.float64)).T.numpy()
                centre += matrix @ (low[source] + high[source]) / 2
                radius += np.abs(matrix) @ (high[source] - low[source]) / 2
                for k, j in zip(*matrix.nonzero(), strict=True):
                    place = starts[source] + int(j)
                    terms[k][place] = terms[k].get(place, 0.0) + float(matrix[k, j])
            bias = step.bias.numpy()
            rows += [(t, -float(b), -float(b)) for t, b in zip(terms, bias, strict=True)]
            low.append(centre - radius + bias - 1e-9 * (1 + np.abs(centre) + radius))
            high.append(centre + radius + bias + 1e-9 * (1 + np.abs(centre) + radius))
        else:
            assert isinstance(step, Function)
            a, b = low[step.source], high[step.source]
            both = step.op.name == "abs"
            for k in range(step.size):
                x, y = starts[step.source] + k, first + k
                if a[k] >= 0 or b[k] <= 0:  # one straight line
                    slope = 1.0 if a[k] >= 0 else (-1.0 if both else 0.0)
                    rows.append(({y: 1.0, x: -slope}, 0.0, 0.0))
                    continue
                z, left = extra + len(whole), -1.0 if both else 0.0
                whole.append(z)
                # z = 1 on the right of zero: y >= x, y >= left x, y <= x + (left - 1) a (1 - z), y <= left x + ... z
                rows.append(({y: 1.0, x: -1.0}, 0.0, np.inf))
                rows.append(({y: 1.0, x: -left}, 0.0, np.inf))
                gap = (left - 1) * float(a[k])
                rows.append(({y: 1.0, x: -1.0, z: gap}, -np.inf, gap))
                rows.append(({y: 1.0, x: -left, z: -(1 - left) * float(b[k])}, -np.inf, 0.0))
            ends = (np.abs(a), np.abs(b)) if both else (np.maximum(a, 0), np.maximum(b, 0))
            straddles = (a < 0) & (b > 0)
            low.append(np.where(straddles, 0.0, np.minimum(*ends)))
            high.append(np.maximum(*ends))
    total = extra + len(whole)
    matrix = np.zeros((len(rows), total))
    for i, (coefficients, _, _) in enumerate(rows):
        for j, v in coefficients.items():
            matrix[i, j] += v
    cost = np.zeros(total)
    cost[starts[-1] + entry] = 1.0
    bounds = Bounds(np.r_[np.concatenate(low), np.zeros(len(whole))], np.r_[np.concatenate(high), np.ones(len(whole))])
    integral = np.r_[np.zeros(extra), np.ones(len(whole))]
    limits = LinearConstraint(matrix, np.array([v for _, v, _ in rows]), np.array([v for _, _, v in rows]))
    found = milp(cost, constraints=limits, bounds=bounds, integrality=integral, options={"time_limit": seconds})
    return float(found.fun) if found.status == 0 else None
