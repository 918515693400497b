"""Input sets: boxes, balls in three norms, unions of boxes.

A region is a set of real tensors of one shape. A network with several inputs takes the concatenation of its flattened
inputs (`join`), the order in which VNN-LIB numbers them. Bounds are float64 and two-faced where the exact set has ends
that float64 cannot hold: `lower` and `upper` are rounded outward, so that a proof loses no point, and `inner` holds the
ends rounded inward. A float64 number lies above 1/10 exactly if it lies above 1/10 rounded up; so `inner` decides
membership of every float64 point in the exact set without error, and no decimals need to be kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.graph.node import Shape

Norm = Literal["linf", "l2", "l1"]
Ends = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Box:
    """All x with lower <= x <= upper, entry by entry; empty where the bounds contradict each other.

    Attributes:
        lower, upper: finite bounds of the input's shape, equal for constant inputs. Kept in float64 on the CPU.
        inner: the least and greatest float64 numbers of the exact set, entry by entry, where `lower` and `upper` were
            rounded outward; None if they are the exact ends.
    """

    lower: Tensor
    upper: Tensor
    inner: Ends | None = None

    def __post_init__(self) -> None:
        _keep_bounds(self, "Box")

    @staticmethod
    def exactly(lower: Sequence[Any], upper: Sequence[Any]) -> Box:
        """A box [n] whose ends are exact numbers: Fraction, Decimal, decimal strings, int or float."""
        low = [rounded(_fraction("lower", v)) for v in lower]
        high = [rounded(_fraction("upper", v)) for v in upper]
        if len(low) != len(high):
            raise InvalidInput(f"Box: lower has {len(low)} numbers and upper {len(high)}; give one of each per input.")
        ends = [_tensor("bounds", [v[side] for v in row]) for row, side in ((low, 0), (high, 1), (low, 1), (high, 0))]
        if any(_fraction("lower", a) > _fraction("upper", b) for a, b in zip(lower, upper, strict=True)):
            return Box(ends[2], ends[3])  # contradictory ends stay so when rounded inward
        return Box(ends[0], ends[1], inner=(ends[2], ends[3]))

    @property
    def shape(self) -> Shape:
        return tuple(self.lower.shape)

    @property
    def points(self) -> Ends:
        """The least and greatest float64 numbers of the exact set. Crossed where it holds none, 1/10 alone say."""
        return self.inner or (self.lower, self.upper)

    @property
    def box(self) -> Box:
        """The smallest box around the region: itself."""
        return self

    @cached_property
    def is_empty(self) -> bool:
        return bool((self.lower > self.upper).any())

    @property
    def widths(self) -> Tensor:
        """upper - lower."""
        return self.upper - self.lower

    @property
    def volume(self) -> float:
        """The product of the widths of the entries that vary; 1 for a point, 0 if empty. In many dimensions it may
        underflow."""
        return 0.0 if self.is_empty else float(self.widths[self.widths > 0].prod())

    def contains(self, x: Tensor, *, strict: bool = False) -> Tensor:
        """Whether points [..., *shape] lie in the exact set; decided without rounding.

        Args:
            strict: off the ends, too, except in entries that are constant.
        """
        x, (lower, upper) = _points(x, self.shape), self.points
        if strict:
            inside = ((x > lower) & (x < upper)) | ((x == lower) & (x == upper))
        else:
            inside = (x >= lower) & (x <= upper)
        return _all(inside, self.shape)

    def excess(self, x: Tensor) -> Tensor:
        """By how much points [..., *shape] leave the box in their worst entry; 0 inside. Rounded, for tolerances."""
        x, (lower, upper) = _points(x, self.shape), self.points
        return _flat(torch.maximum(lower - x, x - upper).clamp(min=0), self.shape).amax(-1)

    def project(self, x: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """The nearest points of the exact set that `dtype` can hold; where it holds none there, the closest outside,
        which `contains` tells.

        Args:
            x: points [..., *shape].
            dtype: torch.float64 or torch.float32.
        """
        if self.is_empty:
            raise InvalidInput("project: the region is empty; look at is_empty first.")
        if dtype not in (torch.float64, torch.float32):
            raise InvalidInput(f"project: dtype is {dtype}; give torch.float64 or torch.float32.")
        lower, upper = self.points
        low, high = lower.to(dtype), upper.to(dtype)
        infinity = torch.full_like(low, math.inf)
        low = torch.where(low.double() < lower, torch.nextafter(low, infinity), low)
        high = torch.where(high.double() > upper, torch.nextafter(high, -infinity), high)
        return torch.minimum(torch.maximum(_points(x, self.shape).to(dtype), low), high)

    def samples(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """n uniform points [n, *shape], none if the region is empty. Without a generator always the same ones."""
        if self.is_empty:
            return self.lower.new_empty((0, *self.shape))
        u = torch.rand((n, *self.shape), dtype=torch.float64, generator=generator or _seeded())
        return self.project(self.lower + u * self.widths)

    def corners(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """At most n corners [k, *shape]: all of them if n suffices, random ones otherwise."""
        if self.is_empty:
            return self.lower.new_empty((0, *self.shape))
        lower, upper = (end.flatten() for end in self.points)
        vary = (lower < upper).nonzero().flatten()
        if len(vary) < 40 and 2 ** len(vary) <= n:
            at_upper = torch.arange(2 ** len(vary))[:, None] >> torch.arange(len(vary)) & 1 == 1
        else:
            at_upper = torch.rand((n, len(vary)), generator=generator or _seeded()) < 0.5
        result = lower.expand(len(at_upper), -1).clone()
        result[:, vary] = torch.where(at_upper, upper[vary], lower[vary])
        return result.reshape(-1, *self.shape)

    def split(self, entry: int | Sequence[int], at: float | None = None) -> tuple[Box, Box]:
        """Two boxes that cover this one and share the cut.

        Args:
            entry: a position in the flattened input, or one index per axis.
            at: where to cut, within the bounds; the middle if None.
        """
        i = _entry(entry, self.shape)
        low, high = float(self.lower.flatten()[i]), float(self.upper.flatten()[i])
        at = low / 2 + high / 2 if at is None else float(at)
        if not low <= at <= high:
            raise InvalidInput(f"split: at={at!r} lies outside [{low!r}, {high!r}], the bounds of entry {i}.")

        def cut(end: Tensor, limit: Any) -> Tensor:
            end = end.clone(memory_format=torch.contiguous_format)
            end.view(-1)[i] = limit(float(end.view(-1)[i]), at)
            return end

        left = None if self.inner is None else (self.inner[0], cut(self.inner[1], min))
        right = None if self.inner is None else (cut(self.inner[0], max), self.inner[1])
        return Box(self.lower, cut(self.upper, min), left), Box(cut(self.lower, max), self.upper, right)

    def intersect(self, other: Box) -> Box:
        """The points of both boxes."""
        if self.shape != other.shape:
            raise InvalidInput(f"intersect: boxes of shapes {self.shape} and {other.shape} have no common points.")
        (a, b), (c, d) = self.points, other.points
        inner = (torch.maximum(a, c), torch.minimum(b, d)) if self.inner or other.inner else None
        return Box(torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper), inner)


@dataclass(frozen=True, eq=False)
class Ball:
    """All x of `clip` with norm(x - centre) <= radius.

    Attributes:
        centre: a tensor of the input's shape.
        radius: a number, or one per entry: then norm((x - centre) / radius) <= 1, and x = centre where it is 0.
        norm: "linf", "l2" or "l1".
        clip: the box of valid inputs; it need not contain the centre.
    """

    centre: Tensor
    radius: Tensor | float
    norm: Norm = "linf"
    clip: Box | None = None

    def __post_init__(self) -> None:
        centre, radius = _tensor("Ball: centre", self.centre), _tensor("Ball: radius", self.radius)
        if radius.shape not in ((), centre.shape):
            raise InvalidInput(f"Ball: radius has shape {tuple(radius.shape)}; give a number or {tuple(centre.shape)}.")
        if not bool((radius >= 0).all()):
            raise InvalidInput("Ball: radius must not be negative.")
        if self.norm not in ("linf", "l2", "l1"):
            raise InvalidInput(f'Ball: norm is {self.norm!r}; give "linf", "l2" or "l1".')
        if self.clip is not None and (not isinstance(self.clip, Box) or self.clip.shape != tuple(centre.shape)):
            raise InvalidInput(f"Ball: clip must be a Box of shape {tuple(centre.shape)}, the centre's, or None.")
        object.__setattr__(self, "centre", centre)
        object.__setattr__(self, "radius", radius)

    @property
    def shape(self) -> Shape:
        return tuple(self.centre.shape)

    @cached_property
    def box(self) -> Box:
        """The bounding box; for linf the region itself, with its exact ends."""
        radius = torch.as_tensor(self.radius).expand(self.shape)
        low, high = _sum(self.centre, -radius), _sum(self.centre, radius)
        box = Box(low[0], high[1], inner=(low[1], high[0]))
        return box if self.clip is None else box.intersect(self.clip)

    @cached_property
    def is_empty(self) -> bool:
        if self.box.is_empty or self.norm == "linf" or self.clip is None:
            return self.box.is_empty
        # Each entry of the clipped centre is the nearest one to the centre, so no point of the clip is closer.
        nearest = torch.minimum(torch.maximum(self.centre, self.clip.lower), self.clip.upper)
        return not bool(self._within(nearest)[()])

    @property
    def _heart(self) -> Tensor:
        return self.centre if self.clip is None else self.clip.project(self.centre)

    def contains(self, x: Tensor, *, strict: bool = False) -> Tensor:
        """As `Box.contains`: decided without rounding, by rational arithmetic next to the sphere."""
        x = _points(x, self.shape)
        inside = self.box.contains(x, strict=strict) if self.norm == "linf" else self._within(x, strict)
        return inside if self.clip is None else inside & self.clip.contains(x, strict=strict)

    def _within(self, x: Tensor, strict: bool = False) -> Tensor:
        """Whether points lie in the unclipped l1 or l2 ball."""
        centre = self.centre.flatten()
        radius = torch.as_tensor(self.radius).expand(self.shape).flatten()
        vary = radius > 0
        rows = _flat(x, self.shape)
        fixed = (rows == centre)[..., ~vary].all(-1)
        rows, centre, radius = rows[..., vary], centre[vary], radius[vary]
        norm = torch.linalg.vector_norm((rows - centre) / radius, 2 if self.norm == "l2" else 1, dim=-1)
        error = (len(radius) + 8) * 2.0**-51
        inside = norm < 1 - error
        for index in ((norm - 1).abs() <= error).nonzero():
            exact = _side_of_sphere([*map(Fraction, rows[tuple(index)].tolist())], centre, radius, self.norm)
            inside[tuple(index)] = exact < 0 or (exact == 0 and not strict)
        return inside & fixed

    def excess(self, x: Tensor) -> Tensor:
        """As `Box.excess`, the distance from the ball measured in its norm (times the largest radius)."""
        x, radius = _points(x, self.shape), torch.as_tensor(self.radius)
        outside = self.box.excess(x)
        if self.norm == "linf":
            return outside
        scaled = torch.where(radius > 0, (x - self.centre) / radius.clamp(min=5e-324), 0.0)
        norm = torch.linalg.vector_norm(_flat(scaled, self.shape), 2 if self.norm == "l2" else 1, dim=-1)
        return torch.maximum(outside, (norm - 1).clamp(min=0) * radius.max())

    def project(self, x: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Points [..., *shape] moved into the region: clipped, then drawn towards the centre (the nearest points only
        for linf, and for l2 without a clip)."""
        if self.is_empty:
            raise InvalidInput("project: the region is empty; look at is_empty first.")
        if self.norm == "linf":
            return self.box.project(x, dtype=dtype)
        heart = self._heart
        x = _points(x, self.shape)
        step = (x if self.clip is None else self.clip.project(x)) - heart
        scale = (..., *(None for _ in self.shape))

        def moved(t: Tensor) -> Tensor:
            return self.box.project(heart + t[scale] * step, dtype=dtype)

        low, high = torch.zeros(step.shape[: step.dim() - len(self.shape)], dtype=torch.float64), None
        high = torch.ones_like(low)
        done = self.contains(moved(high))
        for _ in range(50):  # the norm is convex along the step, so bisection ends next to the sphere
            middle = (low + high) / 2
            inside = self.contains(moved(middle))
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        return moved(torch.where(done, 1.0, low))

    def samples(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """n points [n, *shape], uniform in the ball and then moved into the clip; none if the region is empty."""
        if self.norm == "linf" or self.is_empty:
            return self.box.samples(0 if self.is_empty else n, generator=generator)
        generator = generator or _seeded()
        size = self.centre.numel()
        way = torch.randn((n, size), dtype=torch.float64, generator=generator)
        if self.norm == "l1":
            way = way.sign() * -torch.rand(way.shape, dtype=torch.float64, generator=generator).clamp(min=1e-300).log()
        length = torch.linalg.vector_norm(way, 2 if self.norm == "l2" else 1, dim=-1, keepdim=True)
        share = torch.rand((n, 1), dtype=torch.float64, generator=generator) ** (1 / max(size, 1))
        return self.project(self.centre + self.radius * (way / length * share).reshape(n, *self.shape))

    def corners(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """At most n extreme points [k, *shape]: corners for linf, vertices for l1, random points of the sphere for l2,
        moved into the clip."""
        if self.norm == "linf" or self.is_empty:
            return self.box.corners(0 if self.is_empty else n, generator=generator)
        generator, size = generator or _seeded(), self.centre.numel()
        if self.norm == "l2":
            way = torch.randn((n, size), dtype=torch.float64, generator=generator)
            way = way / torch.linalg.vector_norm(way, dim=-1, keepdim=True)
        else:
            vertex = torch.arange(2 * size) if 2 * size <= n else torch.randint(2 * size, (n,), generator=generator)
            way = torch.zeros((len(vertex), size), dtype=torch.float64)
            way[torch.arange(len(vertex)), vertex // 2] = 1 - 2 * (vertex % 2).double()
        return self.project(self.centre + self.radius * way.reshape(-1, *self.shape))

    def split(self, entry: int | Sequence[int], at: float | None = None) -> tuple[Ball, Ball]:
        """Two parts that cover this region and share the cut; see `Box.split`."""
        left, right = self.box.split(entry, at)
        return tuple(Ball(self.centre, self.radius, self.norm, part) for part in (left, right))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Union:
    """The points of any of k boxes, which may overlap.

    Attributes:
        lower, upper, inner: as those of Box, with a leading dimension [k, *shape].
    """

    lower: Tensor
    upper: Tensor
    inner: Ends | None = None

    def __post_init__(self) -> None:
        _keep_bounds(self, "Union")
        if self.lower.dim() == 0:
            raise InvalidInput("Union: lower and upper need a leading dimension, one row per box.")

    @staticmethod
    def of(boxes: Sequence[Box]) -> Union:
        """The union of boxes of one shape."""
        if not boxes or any(box.shape != boxes[0].shape for box in boxes):
            raise InvalidInput("Union.of: give at least one box, all of one shape.")
        inner = None
        if any(box.inner for box in boxes):
            inner = (torch.stack([b.points[0] for b in boxes]), torch.stack([b.points[1] for b in boxes]))
        return Union(torch.stack([b.lower for b in boxes]), torch.stack([b.upper for b in boxes]), inner)

    def __len__(self) -> int:
        return len(self.lower)

    def __getitem__(self, i: int) -> Box:
        inner = None if self.inner is None else (self.inner[0][i], self.inner[1][i])
        return Box(self.lower[i], self.upper[i], inner)

    @property
    def shape(self) -> Shape:
        return tuple(self.lower.shape[1:])

    @cached_property
    def filled(self) -> list[int]:
        """The indices of the boxes that are not empty."""
        empty = _flat(self.lower > self.upper, self.shape).any(-1)
        return torch.nonzero(~empty).flatten().tolist()

    @property
    def is_empty(self) -> bool:
        return not self.filled

    @property
    def box(self) -> Box:
        """The bounding box; an empty one if the region is empty."""
        if self.is_empty:
            return Box(torch.ones(self.shape), torch.zeros(self.shape))
        return Box(self.lower[self.filled].amin(0), self.upper[self.filled].amax(0))

    def members(self, x: Tensor, *, strict: bool = False, tolerance: float = 0.0) -> Tensor:
        """Which boxes contain one point x [*shape], or have it within `tolerance` in every entry: bool [k]."""
        x, (lower, upper) = _points(x, self.shape), self.inner or (self.lower, self.upper)
        if strict:
            inside = ((x > lower) & (x < upper)) | ((x == lower) & (x == upper))
        else:
            inside = (x >= lower) & (x <= upper)
        if tolerance > 0:
            inside |= (lower - x <= tolerance) & (x - upper <= tolerance)
        return _all(inside, self.shape)

    def contains(self, x: Tensor, *, strict: bool = False) -> Tensor:
        """As `Box.contains`: in one of the boxes (strictly in a single one)."""
        x = _points(x, self.shape)
        rows = x.reshape(-1, *self.shape)
        found = [bool(self.members(row, strict=strict).any()) for row in rows]
        return torch.tensor(found, dtype=torch.bool).reshape(x.shape[: x.dim() - len(self.shape)])

    def excess(self, x: Tensor) -> Tensor:
        """As `Box.excess`, from the nearest box."""
        x = _points(x, self.shape)
        each = [self[i].excess(x) for i in self.filled]
        return torch.stack(each).amin(0) if each else torch.full(x.shape[: x.dim() - len(self.shape)], math.inf)

    def project(self, x: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Points [..., *shape] moved into their nearest box."""
        if self.is_empty:
            raise InvalidInput("project: the region is empty; look at is_empty first.")
        x = _points(x, self.shape)
        rows, moved = x.reshape(-1, *self.shape), []
        lower, upper = self.lower[self.filled], self.upper[self.filled]
        for row in rows:
            away = _flat(torch.maximum(lower - row, row - upper).clamp(min=0), self.shape).amax(-1)
            moved.append(self[self.filled[int(away.argmin())]].project(row, dtype=dtype))
        return torch.stack(moved).reshape(x.shape) if moved else x.to(dtype)

    def samples(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """n points [n, *shape], each uniform in a box drawn at random; none if the region is empty."""
        return self._gather("samples", n, generator or _seeded())

    def corners(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """At most n corners [k, *shape] of the boxes."""
        return self._gather("corners", n, generator or _seeded())

    def _gather(self, method: str, n: int, generator: torch.Generator) -> Tensor:
        if self.is_empty:
            return self.lower.new_empty((0, *self.shape))
        chosen = torch.randperm(len(self.filled), generator=generator)[:n].tolist()
        share = [n // len(chosen) + (rank < n % len(chosen)) for rank in range(len(chosen))] if chosen else []
        parts = [
            getattr(self[self.filled[i]], method)(k, generator=generator) for i, k in zip(chosen, share, strict=True)
        ]
        return torch.cat([self.lower.new_empty((0, *self.shape)), *parts])


def join(*boxes: Box) -> Box:
    """One box for a network with several inputs: [n], their flattened entries in call order."""
    if not boxes or any(not isinstance(box, Box) for box in boxes):
        raise InvalidInput("join: give one Box per input of the network, in call order.")
    ends = [torch.cat([getattr(box, side).flatten() for box in boxes]) for side in ("lower", "upper")]
    inner = (torch.cat([b.points[0].flatten() for b in boxes]), torch.cat([b.points[1].flatten() for b in boxes]))
    return Box(ends[0], ends[1], inner if any(box.inner for box in boxes) else None)


def rounded(q: Fraction) -> tuple[float, float]:
    """The greatest float64 number <= q and the least one >= q; infinite where there is none."""
    try:
        near = q.numerator / q.denominator  # correctly rounded
    except OverflowError:
        near = math.inf if q > 0 else -math.inf
    if math.isinf(near):
        largest = math.nextafter(math.inf, 0.0)
        return (largest, math.inf) if near > 0 else (-math.inf, -largest)
    n, d = near.as_integer_ratio()
    difference = n * q.denominator - q.numerator * d
    if difference == 0:
        return near, near
    return (math.nextafter(near, -math.inf), near) if difference > 0 else (near, math.nextafter(near, math.inf))


def _fraction(name: str, value: Any) -> Fraction:
    try:
        return Fraction(value if isinstance(value, (str, Decimal, Fraction, int)) else float(value))
    except (ValueError, OverflowError, TypeError, ZeroDivisionError) as error:
        raise InvalidInput(f"Box: {name} holds {value!r}, which is not a finite number.") from error


def _sum(a: Tensor, b: Tensor) -> Ends:
    """a + b rounded down and rounded up, by the exact error of a sum (Knuth, TAOCP 2, 4.2.2)."""
    total = a + b
    t = total - a
    error = (a - (total - t)) + (b - t)
    infinity = torch.full_like(total, math.inf)
    return (
        torch.where(error < 0, torch.nextafter(total, -infinity), total),
        torch.where(error > 0, torch.nextafter(total, infinity), total),
    )


def _side_of_sphere(x: list[Fraction], centre: Tensor, radius: Tensor, norm: Norm) -> Fraction:
    """The sign of sum (|x - centre| / radius)^p - 1, exactly. Sums by pairs, unreduced: reducing is the slow part."""
    p = 2 if norm == "l2" else 1
    terms = []
    for a, c, r in zip(x, map(Fraction, centre.tolist()), map(Fraction, radius.tolist()), strict=True):
        term = (abs(a - c) / r) ** p
        terms.append((term.numerator, term.denominator))
    while len(terms) > 1:
        odd = terms[-1:] if len(terms) % 2 else []
        terms = [
            (a * d + c * b, b * d) if b != d else (a + c, b)
            for (a, b), (c, d) in zip(terms[:-1:2], terms[1::2], strict=True)
        ] + odd
    total = terms[0] if terms else (0, 1)
    return Fraction((total[0] > total[1]) - (total[0] < total[1]))


def _keep_bounds(region: Box | Union, kind: str) -> None:
    lower, upper = _tensor(f"{kind}: lower", region.lower), _tensor(f"{kind}: upper", region.upper)
    if lower.shape != upper.shape:
        raise InvalidInput(
            f"{kind}: lower has shape {tuple(lower.shape)} and upper {tuple(upper.shape)}; both need the input's shape."
        )
    if region.inner is not None:
        inner = tuple(_tensor(f"{kind}: inner", end, finite=False) for end in region.inner)
        if any(end.shape != lower.shape for end in inner) or bool(((inner[0] < lower) | (inner[1] > upper)).any()):
            raise InvalidInput(f"{kind}: inner must lie between lower and upper and have their shape.")
        same = all(torch.equal(a, b) for a, b in zip(inner, (lower, upper), strict=True))
        object.__setattr__(region, "inner", None if same else inner)
    object.__setattr__(region, "lower", lower)
    object.__setattr__(region, "upper", upper)


def _tensor(name: str, value: Any, *, finite: bool = True) -> Tensor:
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
        if tensor.is_complex():
            raise TypeError("it is complex")
        tensor = tensor.to(device="cpu", dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{name} must be a tensor of numbers: {error}.") from error
    if finite and not bool(torch.isfinite(tensor).all()):
        raise InvalidInput(f"{name} holds NaN or infinite entries; give finite numbers.")
    return tensor


def _points(x: Tensor, shape: Shape) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() < len(shape) or tuple(x.shape[x.dim() - len(shape) :]) != shape:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise InvalidInput(f"x is {got}; give points of the region's shape {shape}, batched by leading dimensions.")
    return x.detach().to(device="cpu", dtype=torch.float64)


def _flat(x: Tensor, shape: Shape) -> Tensor:
    return x.reshape(*x.shape[: x.dim() - len(shape)], math.prod(shape))


def _all(inside: Tensor, shape: Shape) -> Tensor:
    return _flat(inside, shape).all(-1)


def _entry(entry: int | Sequence[int], shape: Shape) -> int:
    index = [entry] if isinstance(entry, int) else list(entry)
    sizes = [math.prod(shape)] if isinstance(entry, int) else list(shape)
    if len(index) != len(sizes) or any(not 0 <= i < n for i, n in zip(index, sizes, strict=True)):
        raise InvalidInput(f"entry {entry} does not lie inside an input of shape {shape}.")
    flat = 0
    for i, n in zip(index, sizes, strict=True):
        flat = flat * n + i
    return flat


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
