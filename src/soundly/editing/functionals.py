"""What may be constrained: quantities of one output at one point, each with its linear form in the edited layer.

With the edited layer last, y_c = w_c . h + b_c, every linear operator D acting on functions of the input gives
D y_c = w_c . D h: a functional names the vectors D h, and asks the frozen part for them (docs/editing.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from soundly.editing.trunk import Trunk
from soundly.errors import InvalidInput

if TYPE_CHECKING:
    from soundly.editing.constraints import Point


class Functional(Protocol):
    """Quantities of one output at one point that are linear in the edited layer's row for that output."""

    @property
    def point(self) -> Point: ...
    @property
    def of(self) -> int: ...

    def vectors(self, trunk: Trunk) -> Tensor:
        """[m, K + 1] in float64; the last column multiplies the bias."""
        ...


def _position(trunk_rows: Tensor, point: Point) -> int:
    count = trunk_rows.shape[-2]
    if point.position is None and count != 1:
        raise InvalidInput(f"the edited layer has {count} positions at {point.name}: say which, at(x, position=...).")
    position = point.position or 0
    if not -count <= position < count:
        raise InvalidInput(f"position {position} at {point.name}: the edited layer has {count} positions.")
    return position % count


def _widen(vectors: Tensor, bias: float) -> Tensor:
    return torch.cat([vectors, torch.full((len(vectors), 1), bias, dtype=torch.float64, device=vectors.device)], 1)


@dataclass(frozen=True, eq=False)
class Output:
    """y_c = w_c . h + b_c."""

    point: Point
    of: int

    def vectors(self, trunk: Trunk) -> Tensor:
        h = trunk.features(self.point.x)
        return _widen(h[_position(h, self.point)][None], 1.0)


@dataclass(frozen=True, eq=False)
class Outputs:
    """All outputs at a point's position."""

    point: Point
    of: int = 0

    def vectors(self, trunk: Trunk) -> Tensor:
        raise InvalidInput(f"{self.point.name}: outputs of an edited last layer are constrained one by one.")


def _moved(trunk: Trunk, point: Point, place: str | None, *along: Tensor) -> Tensor:
    """D h[d] at the point's position, [m, K + 1]; the bias has no derivative."""
    rows = trunk.tangents(point.x, place, *along)
    return _widen(rows[:, _position(rows, point)], 0.0)


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Entries of the input itself, which no edit moves."""

    point: Point
    of: int
    entries: tuple[int, ...] | None

    def vectors(self, trunk: Trunk) -> Tensor:
        raise InvalidInput(f"{self.point.name}: at one point the input is known; write it as numbers.")


@dataclass(frozen=True, eq=False)
class Directional:
    """D y_c[d] = w_c . D h[d], or with more than one tensor of directions D^2 y_c[d, e] = w_c . D^2 h[d, e], and on."""

    point: Point
    of: int
    place: str | None
    along: tuple[Tensor, ...]

    def vectors(self, trunk: Trunk) -> Tensor:
        return _moved(trunk, self.point, self.place, *self.along)


@dataclass(frozen=True, eq=False)
class Gradient:
    """dy_c / dz_i, the directional derivative along a coordinate."""

    point: Point
    of: int
    place: str | None
    entries: tuple[int, ...] | None

    def vectors(self, trunk: Trunk) -> Tensor:
        z = trunk.value(self.point.x, self.place)
        entries = range(z.numel()) if self.entries is None else self.entries
        if not entries or any(not 0 <= i < z.numel() for i in entries):
            raise InvalidInput(f"entries of a gradient at {self.point.name} must be some of 0..{z.numel() - 1}.")
        if len(entries) * z.numel() > 2**30:
            raise InvalidInput(
                f"{len(entries)} gradient entries at {self.point.name} are too many to constrain one by one; name the "
                "`entries` you need, or constrain directional derivatives, groups or Grad-CAM."
            )
        directions = torch.zeros(len(entries), z.numel(), dtype=z.dtype, device=z.device)
        directions[range(len(entries)), list(entries)] = 1
        return _moved(trunk, self.point, self.place, directions.reshape(-1, *z.shape))


@dataclass(frozen=True, eq=False)
class GradCam:
    """L_p = sum_k mean_q(dy_c / dF_kq) F_kp = D y_c[d_p] with d_p = F_p / size, constant over positions."""

    point: Point
    of: int
    layer: str

    def vectors(self, trunk: Trunk) -> Tensor:
        z = trunk.value(self.point.x, self.layer)
        if z.dim() < 3 or z.shape[0] != 1:
            raise InvalidInput(f"Grad-CAM needs a layer of shape [1, C, *size]; {self.layer!r} is {tuple(z.shape)}.")
        channels, size = z.shape[1], math.prod(z.shape[2:])
        pixels = z.reshape(channels, size).T / size  # [p, k]
        return _moved(trunk, self.point, self.layer, pixels.reshape(size, 1, channels, *(1,) * (z.dim() - 2)))


@dataclass(frozen=True, eq=False)
class IntegratedGradients:
    """IG_t = w_c . sum_s omega_s D h(x0 + a_s d)[d restricted to t]."""

    point: Point
    of: int
    baseline: Tensor
    steps: int
    groups: Tensor | None

    def vectors(self, trunk: Trunk) -> Tensor:
        x = trunk.value(self.point.x, None)  # in the type that the trunk computes in
        start = self.baseline.to(x)
        if start.shape != x.shape or (self.groups is not None and self.groups.shape != x.shape):
            raise InvalidInput(
                f"baseline and groups at {self.point.name} must have the input's shape {tuple(x.shape)}."
            )
        labels = torch.arange(x.numel()).reshape(x.shape) if self.groups is None else self.groups
        count = int(labels.max()) + 1
        if self.steps < 1 or count < 1:
            raise InvalidInput(
                f"Integrated Gradients at {self.point.name}: give at least one step and a label >= 0 in `groups`."
            )
        if count * x.numel() > 2**30:
            raise InvalidInput(f"Integrated Gradients at {self.point.name}: too many entries; give `groups`.")
        delta = x - start
        masks = torch.stack([(labels == t).to(x) for t in range(count)])
        nodes, weights = np.polynomial.legendre.leggauss(self.steps)
        path = torch.stack([start + float(a) * delta for a in (nodes + 1) / 2])
        found = trunk.tangents_along(path, masks * delta)
        found = found[:, :, _position(found, self.point)]
        mean = torch.einsum("s,smk->mk", torch.from_numpy(weights / 2).to(found), found)
        return _widen(mean, 0.0)
