"""The smallest change of the weights under which linear constraints hold: the numerical end of every edit.

`least_change` minimises a norm of d subject to lower <= rows @ d <= upper. It scales the rows, chooses the method by
the norm and measures the outcome against the rows as given. Its answers are candidates: whoever claims a guarantee
evaluates the edited network with rounding accounted for, and so asks for a little more than needed when stating rows.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInput
from .least_norm import ACCEPTED, Nearest, nearest_point
from .linear_program import contradiction, smallest_vertex

Norm = Literal["l2", "l1", "linf"]


@dataclass(frozen=True)
class Solution:
    """The outcome of `least_change`.

    Attributes:
        delta: the change [n]; None if infeasible. With status "limit" it is the best candidate at hand: with "l1" and
            "linf" usually the admissible change of least "l2", otherwise one that violates rows. `residual` tells.
        status: "optimal": every row holds up to 1e-9 |row| |delta|, and no smaller change does; "infeasible": the rows
            of `conflict` contradict each other; "limit": neither was established, for want of time or accuracy.
        active: indices of the rows that hold with equality and determine delta.
        side: per row [m], 1 where its lower end determines delta, -1 where its upper end does, 0 elsewhere.
        conflict: if infeasible, indices of rows that cannot hold together. None of them can be left out, unless
            bounds |delta_j| <= bound on other entries take its place.
        bound_in_conflict: whether the contradiction needs the bound on |delta_j| besides the rows of `conflict`.
        objective: the norm of delta; for "l2" its square, plus the retain term if there is one; inf if infeasible.
        lower_bound: no admissible change has a smaller objective, up to the solver's accuracy; inf if infeasible.
        iterations: rounds of all methods used.
        residual: the largest violation of any row by delta, in the units of that row; inf if infeasible.
    """

    delta: Tensor | None
    status: Literal["optimal", "infeasible", "limit"]
    active: tuple[int, ...]
    conflict: tuple[int, ...]
    bound_in_conflict: bool
    objective: float
    lower_bound: float
    iterations: int
    residual: float
    side: Tensor


def least_change(
    rows: Tensor,
    lower: Tensor,
    upper: Tensor,
    *,
    norm: Norm = "l2",
    bound: float | None = None,
    retain: Tensor | None = None,
    retain_weight: float = 1.0,
    side: Tensor | None = None,
    time_limit: float | None = None,
) -> Solution:
    """Find the smallest d [n] with lower <= rows @ d <= upper and |d_j| <= bound, or rows that contradict each other.

    Args:
        rows: coefficients [m, n], float64, on any device. Repeated, dependent and zero rows are allowed.
        lower, upper: ends [m], float64; -inf and inf where there is none. A row with lower > upper is a conflict.
        norm: "l2" minimises sum d_j^2 (fast, unique), "l1" sum |d_j| (few entries change), "linf" max |d_j|.
        bound: largest |d_j| allowed; kept exactly.
        retain: features [r, n] whose values should change little: with norm "l2",
            retain_weight * mean((retain @ d)^2) is added to the objective.
        side: the rows to start from, as in `Solution.side`: those of a similar problem.
        time_limit: seconds after which to stop with status "limit".

    Returns:
        A `Solution`. "infeasible" rests on multipliers, checked in float64 with rounding accounted for, which exclude
        every change up to 1e6 times as long as the farthest single row asks for.

    Raises:
        InvalidInput: shapes, types or values do not fit, or `retain` comes with a norm other than "l2".
    """
    _check(rows, lower, upper, norm, bound, retain, retain_weight, time_limit)
    deadline = time.monotonic() + (math.inf if time_limit is None else time_limit)
    rows, lower, upper = rows.detach(), lower.detach(), upper.detach()
    whiten = _whitening(retain, retain_weight)
    unit_rows, scale = _unit(rows)
    low, high = lower / scale, upper / scale
    zero = ~unit_rows.any(dim=1)
    impossible = (low > high) | (low == math.inf) | (high == -math.inf) | (zero & ((low > 0) | (high < 0)))
    if impossible.any():
        return _infeasible((int(impossible.nonzero()[0]),), False, 0, len(rows))
    kept = (~zero & (low.isfinite() | high.isfinite())).nonzero().squeeze(1)
    unit_rows, low, high = unit_rows[kept], low[kept], high[kept]

    first = None if side is None else side[kept].to(torch.int8)
    found = _nearest_within(unit_rows, low, high, whiten, bound, first, deadline)
    if found.point is None:
        used = torch.from_numpy(found.certificate != 0).to(kept.device)
        conflict = tuple(kept[used[: len(kept)]].tolist())
        return _infeasible(conflict, bool(used[len(kept) :].any()), found.steps, len(rows))
    delta = whiten(torch.from_numpy(found.point).to(rows.device))
    ends, steps, finished = found.side[: len(kept)], found.steps, found.finished
    floor = float(found.point @ found.point)
    if norm != "l2":
        floor = math.sqrt(floor / (1 if norm == "l1" else rows.shape[1]))
        if finished and delta.any():
            arrays = unit_rows.cpu().numpy(), low.cpu().numpy(), high.cpu().numpy()
            vertex = smallest_vertex(*arrays, norm=norm, nearest=found, bound=bound, deadline=deadline)
            steps, floor, finished = steps + vertex.rounds, max(floor, vertex.lower_bound), vertex.point is not None
            if vertex.point is not None:  # otherwise the change of least Euclidean norm stands: it is admissible
                ends, delta = vertex.side, torch.from_numpy(vertex.point).to(rows.device)
    if bound is not None:
        delta = delta.clamp(-bound, bound)
    # What nothing depends on stays where it is: factors leave some rounding there.
    counts = rows.any(dim=0) if retain is None else rows.any(dim=0) | retain.any(dim=0)
    delta = torch.where(counts, delta, 0.0)

    value = rows @ delta
    excess = torch.maximum(lower - value, value - upper).clamp(min=0.0)
    exact = bool((excess <= ACCEPTED * scale * torch.linalg.vector_norm(delta)).all())
    objective = float(delta @ delta if norm == "l2" else delta.abs().sum() if norm == "l1" else delta.abs().max())
    if retain is not None:
        objective += retain_weight * float((retain @ delta).square().mean())
    return Solution(
        delta=delta,
        status="optimal" if finished and exact else "limit",
        active=tuple(kept[torch.from_numpy(ends != 0).to(kept.device)].tolist()),
        conflict=(),
        bound_in_conflict=False,
        objective=objective,
        lower_bound=floor,
        iterations=steps,
        residual=float(excess.max()) if len(rows) else 0.0,
        side=torch.zeros(len(rows), dtype=torch.int8).index_copy_(0, kept.cpu(), torch.from_numpy(ends).to(torch.int8)),
    )


def _infeasible(conflict: tuple[int, ...], bound_in_conflict: bool, iterations: int, rows: int) -> Solution:
    nothing = torch.zeros(rows, dtype=torch.int8)
    return Solution(
        None, "infeasible", (), conflict, bound_in_conflict, math.inf, math.inf, iterations, math.inf, nothing
    )


def _nearest_within(
    rows: Tensor, low: Tensor, high: Tensor, whiten: Callable[[Tensor], Tensor], bound: float | None,
    first: Tensor | None, deadline: float,
) -> Nearest:  # fmt: skip
    """The nearest point in whitened coordinates; entries beyond the bound become further rows, after the given ones."""
    white, scale = _unit(whiten(rows))
    ends, noise = (low / scale, high / scale), 1.0 / scale  # what whitening shortens, it also blurs
    found = nearest_point(white, *ends, side=first, noise=noise, deadline=deadline)
    steps = found.steps
    held = torch.zeros(rows.shape[1], dtype=torch.bool, device=rows.device)
    while bound is not None and found.finished and found.point is not None:
        delta = whiten(torch.from_numpy(found.point).to(rows.device))
        over = (delta.abs() > bound) & ~held
        if not over.any():
            break
        if not held.any() and bound < 1.5 * float(delta.square().mean().sqrt()):
            # A bound near the mean entry may contradict many rows at once: `nearest_point` needs many steps to see it.
            arrays = rows.cpu().numpy(), low.cpu().numpy(), high.cpu().numpy()
            y = contradiction(*arrays, nearest=found, bound=bound, deadline=deadline)
            if y is not None:
                found = replace(found, point=None, certificate=np.concatenate([y, -y @ arrays[0]]))
                break
        held |= over
        entries = torch.zeros(int(over.sum()), len(over), dtype=rows.dtype, device=rows.device)
        entries[torch.arange(len(entries)), over.nonzero().squeeze(1)] = 1.0
        further, scale = _unit(whiten(entries))
        white = torch.cat([white, further])
        ends = torch.cat([ends[0], -bound / scale]), torch.cat([ends[1], bound / scale])
        noise = torch.cat([noise, 1.0 / scale])
        side = np.concatenate([found.side, np.zeros(len(further), dtype=found.side.dtype)])
        start = torch.from_numpy(side).to(rows.device)
        found = nearest_point(white, *ends, side=start, noise=noise, deadline=deadline)
        steps += found.steps
    return replace(found, steps=steps)


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows at length 1 (zero rows stay) and what they were divided by [m]; no square over- or underflows."""
    peak = rows.abs().amax(dim=1)
    peak = torch.where(peak > 0, peak, 1.0)
    scaled = rows / peak[:, None]
    length = torch.linalg.vector_norm(scaled, dim=1)
    length = torch.where(length > 0, length, 1.0)
    return scaled / length[:, None], peak * length


def _whitening(retain: Tensor | None, weight: float) -> Callable[[Tensor], Tensor]:
    """The map x -> x M^(-1/2) on rows, M = 1 + weight/r * retain.T @ retain: in its coordinates the objective is |d|^2.

    M is 1 off the row space of retain; there its eigenvectors v [n, min(r, n)] come from factors of retain, without
    inverting anything that may be singular. No n x n matrix is formed unless r > n.
    """
    if retain is None:
        return lambda x: x
    q, triangle = torch.linalg.qr(retain.detach().T)
    values, vectors = torch.linalg.eigh(triangle @ triangle.T)
    v = q @ vectors
    shrinkage = 1.0 - torch.rsqrt(1.0 + weight / len(retain) * values.clamp(min=0.0))
    return lambda x: x - ((x @ v) * shrinkage) @ v.T


def _check(
    rows: Tensor,
    lower: Tensor,
    upper: Tensor,
    norm: str,
    bound: float | None,
    retain: Tensor | None,
    retain_weight: float,
    time_limit: float | None,
) -> None:
    tensors = {"rows": rows, "lower": lower, "upper": upper} | ({} if retain is None else {"retain": retain})
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float64:
            raise InvalidInput(f"{name} has dtype {tensor.dtype}; pass {name}.double(): edits are solved in float64.")
        if tensor.isnan().any() or (name in ("rows", "retain") and tensor.isinf().any()):
            raise InvalidInput(f"{name} contains nan or infinite entries; only lower and upper may be infinite.")
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise InvalidInput(f"rows has shape {tuple(rows.shape)}; it must be [m, n] with n > 0.")
    if lower.shape != rows.shape[:1] or upper.shape != rows.shape[:1]:
        shapes = f"lower {tuple(lower.shape)} and upper {tuple(upper.shape)}"
        raise InvalidInput(f"{shapes} must have one entry per row: [{len(rows)}].")
    if norm not in ("l2", "l1", "linf"):
        raise InvalidInput(f'norm is {norm!r}; choose "l2", "l1" or "linf".')
    if bound is not None and not 0 < bound < math.inf:
        raise InvalidInput(f"bound is {bound}; it must be positive and finite, or None for no bound.")
    if time_limit is not None and not time_limit > 0:
        raise InvalidInput(f"time_limit is {time_limit}; it must be a positive number of seconds, or None.")
    if retain is None:
        return
    if norm != "l2":
        raise InvalidInput(
            f'retain needs norm="l2", not {norm!r}: drop it, or state what to keep as rows with two ends.'
        )
    if retain.ndim != 2 or retain.shape[1] != rows.shape[1] or len(retain) == 0:
        raise InvalidInput(f"retain has shape {tuple(retain.shape)}; it must be [r, {rows.shape[1]}] with r > 0.")
    if not 0 <= retain_weight < math.inf:
        raise InvalidInput(f"retain_weight is {retain_weight}; it must be finite and not negative.")
