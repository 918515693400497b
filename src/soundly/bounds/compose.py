"""Values under construction: affine functions of steps, how they compose and add up, and what rounding does to them.

A value is kept as maps of steps with a bias for as long as composing it costs nothing. Every coefficient that is
computed here is known up to a relative error, every bias up to an absolute one, and both are recorded with the value;
where a sum of terms of different signs would lose that, nothing is composed. Underflow apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soundly.bounds.interval import Interval
from soundly.bounds.program import Convolution, Map, Matrix, Sparse
from soundly.errors import MissingRule
from soundly.graph.node import Node

_UNIT = 2.0**-53
_TINY = 2.0**-960  # below this a product may have underflowed


# Compared by identity: values serve as keys.
@dataclass(frozen=True, eq=False)
class Value:
    """An affine function of steps that is not a step itself yet; the fields are those of `Affine`."""

    parts: tuple[tuple[Map, int], ...]
    bias: Tensor
    weight_error: float = 0.0
    bias_error: Tensor | None = None

    @property
    def view(self) -> tuple[Sparse, int] | None:
        """(map, step) where the value is a sparse map of one step, without error or bias."""
        if len(self.parts) != 1 or self.weight_error or self.bias_error is not None or bool(self.bias.any()):
            return None
        part, source = self.parts[0]
        return (part, source) if isinstance(part, Sparse) else None

    @property
    def content(self) -> tuple[object, ...]:
        """Equal for two sums of sparse maps that are the same: differentiation writes some values down twice."""
        if not all(isinstance(part, Sparse) for part, _ in self.parts):
            return (self,)
        parts = [(p.rows, p.columns, p.values, i) for p, i in self.parts if isinstance(p, Sparse)]
        numbers = [self.bias] if self.bias_error is None else [self.bias, self.bias_error]
        return self.weight_error, *(
            x.numpy().tobytes() if isinstance(x, Tensor) else x for part in (*parts, numbers) for x in part
        )


def through(outer: Map, error: float, value: Value) -> Value | None:
    """outer(value), the outer coefficients being known up to the relative error; None where that would be dearer than
    two steps, or where the rounding would not stay relative to each coefficient."""
    parts, worst = [], 0.0
    for inner, source in value.parts:
        composed = _composed(outer, inner, exact=not error and not value.weight_error)
        if composed is None:
            return None
        if work(composed[0]):
            parts.append((composed[0], source))
        worst = max(worst, composed[1])
    before = sum(work(part) for part, _ in value.parts)
    limit = (2 if len(value.parts) == 1 else 1) * work(outer) + before + len(value.bias)
    if sum(work(part) for part, _ in parts) > limit:
        return None
    bias, bias_error = _image(outer, error, value.bias, value.bias_error)
    return Value(tuple(parts), bias, _both(_both(error, value.weight_error), worst), bias_error)


def _composed(outer: Map, inner: Map, exact: bool) -> tuple[Map, float] | None:
    """outer after inner as one map, and what rounding adds to the relative error of its coefficients; None where there
    is no such map, or where terms of different signs would be added up and not both maps are `exact`."""
    if isinstance(inner, Sparse) and is_identity(inner):
        return outer, 0.0
    if isinstance(outer, Sparse) and is_identity(outer):
        return inner, 0.0
    match outer, inner:
        case Sparse(), Sparse():
            return _composed_sparse(outer, inner, exact)
        case Matrix(), Sparse() if outer.blocks == 1 and inner.size[1] <= 2 * inner.size[0]:
            if len(inner.columns.unique()) < len(inner.columns):
                return None
            weight = outer.weight.new_zeros(outer.weight.shape[0], inner.size[1])
            taken = outer.weight[:, inner.rows]
            weight[:, inner.columns] = taken * inner.values
            return Matrix(weight), _product_error(taken, inner.values)
        case Sparse(), Matrix() if inner.blocks == outer.terms == 1 and outer.size[0] <= 2 * outer.size[1]:
            weight = inner.weight.new_zeros(outer.size[0], inner.weight.shape[1])
            taken = inner.weight[outer.columns]
            weight[outer.rows] = taken * outer.values[:, None]
            return Matrix(weight), _product_error(taken, outer.values)
        case Sparse(), Matrix():
            scale = _repeated(outer, inner.blocks, inner.weight.shape[0], 1)
            if scale is not None:
                weight = inner.weight * scale[:, None]
                return replace(inner, weight=weight), _product_error(inner.weight, scale)
        case Matrix(), Sparse():
            scale = _repeated(inner, outer.blocks, outer.weight.shape[1], 1)
            if scale is not None:
                return replace(outer, weight=outer.weight * scale), _product_error(outer.weight, scale)
        case Sparse(), Convolution():
            return _scaled_channels(inner, outer, not inner.transposed)
        case Convolution(), Sparse():
            return _scaled_channels(outer, inner, outer.transposed)
    return None


def _composed_sparse(outer: Sparse, inner: Sparse, exact: bool) -> tuple[Sparse, float] | None:
    counts = torch.bincount(inner.rows, minlength=inner.size[0])
    starts = counts.cumsum(0) - counts
    repeats = counts[outer.columns]
    total = int(repeats.sum())
    if total > len(outer.rows) + len(inner.rows) + outer.size[0]:
        return None
    left = torch.repeat_interleave(torch.arange(len(repeats)), repeats)
    right = starts[outer.columns[left]] + torch.arange(total) - (repeats.cumsum(0) - repeats)[left]
    rows, columns = outer.rows[left], inner.columns[right]
    values = outer.values[left] * inner.values[right]
    size = outer.size[0], inner.size[1]
    error = _product_error(outer.values, inner.values)
    if outer.terms == 1:
        return sparse(rows, columns, values, size), error
    merged = _added(rows, columns, values, size, exact and not error)
    return None if merged is None else (merged[0], _both(error, merged[1]))


def _added(
    rows: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int], exact: bool
) -> tuple[Sparse, float] | None:
    """Coefficients of equal positions added up, and the relative error that this adds; None where signs differ, unless
    all are `exact` whole numbers: otherwise the error of a difference is not relative to it."""
    key, where = torch.unique(rows * size[1] + columns, return_inverse=True)
    total = values.new_zeros(len(key)).index_add(0, where, values)
    most = int(torch.bincount(where).max()) if len(where) else 1
    if most > 1:
        largest = values.new_zeros(len(key)).index_add(0, where, values.abs())
        exact = exact and bool((values == values.round()).all()) and float(largest.max()) < 2.0**53
        if not exact and not bool((total.abs() == largest).all()):
            return None
    key, total = key[total != 0], total[total != 0]
    return sparse(key // size[1], key % size[1], total, size), 0.0 if exact else _gamma(most - 1)


def _repeated(scale: Sparse, blocks: int, size: int, inner: int) -> Tensor | None:
    """[size] where a diagonal map of [blocks, size, inner] has the same number throughout its first and last axis."""
    n = blocks * size * inner
    if scale.size != (n, n) or len(scale.rows) != n or not bool((scale.rows == scale.columns).all()):
        return None
    numbers = scale.values.reshape(blocks, size, inner)
    return numbers[0, :, 0] if bool((numbers == numbers[:1, :, :1]).all()) else None


def _scaled_channels(layer: Convolution, scale: Sparse, narrow: bool) -> tuple[Map, float] | None:
    """The layer with its narrow or wide channels scaled."""
    channels, *area = layer.narrow if narrow else layer.wide
    factors = _repeated(scale, 1, channels, math.prod(area))
    if factors is None:
        return None
    out, per_group = layer.weight.shape[:2]
    grouped = layer.weight.reshape(layer.groups, out // layer.groups, per_group, -1)
    factors = factors.reshape((layer.groups, -1, 1, 1) if narrow else (layer.groups, 1, -1, 1))
    weight = (grouped * factors).reshape(layer.weight.shape)
    return replace(layer, weight=weight), _product_error(layer.weight, factors)


def work(part: Map) -> int:
    """How many products one application takes."""
    match part:
        case Matrix():
            return part.blocks * part.weight.numel()
        case Convolution():
            return part.weight.numel() * math.prod(part.narrow[1:])
    return len(part.rows)


def sparse(rows: Tensor, columns: Tensor, values: Tensor | None, size: tuple[int, int]) -> Sparse:
    return Sparse(rows, columns, torch.ones(len(rows), dtype=torch.float64) if values is None else values, size)


def identity(size: int) -> Sparse:
    return sparse(torch.arange(size), torch.arange(size), None, (size, size))


def is_identity(part: Sparse) -> bool:
    n = part.size[0]
    return part.size == (n, n) and len(part.rows) == n and bool(
        (part.rows == part.columns).all() & (part.values == 1).all()
    )  # fmt: skip


def only_moves(part: Sparse) -> bool:
    """Whether every output is one input, and every input is used."""
    alone = len(part.rows) == part.size[0] and part.terms == 1 and bool((part.values == 1).all())
    return alone and len(part.columns.unique()) == part.size[1]


# -- sums, and what rounding does to them


def summed(values: list[Value], size: int = 0) -> Value:
    """The sum of values; sparse maps of one step are added up where that is exact enough."""
    parts: list[tuple[Map, int]] = []
    bias = torch.zeros(len(values[0].bias) if values else size, dtype=torch.float64)
    bias_error: Tensor | None = None
    weight_error = max((value.weight_error for value in values), default=0.0)
    for value in values:
        total, lost = _two_sum(bias, value.bias)
        bias = total
        for error in (lost if bool(lost.any()) else None, value.bias_error):
            if error is not None:
                bias_error = error if bias_error is None else _up(bias_error + error)
        for part, source in value.parts:
            for i, (other, known) in enumerate(parts):
                if known == source and isinstance(part, Sparse) and isinstance(other, Sparse):
                    rows, columns = torch.cat([other.rows, part.rows]), torch.cat([other.columns, part.columns])
                    merged = _added(
                        rows, columns, torch.cat([other.values, part.values]), part.size, exact=not weight_error
                    )
                    if merged is not None:
                        parts[i] = merged[0], source
                        weight_error = _both(weight_error, merged[1])
                        break
            else:
                parts.append((part, source))
    return Value(tuple(parts), bias, weight_error, bias_error)


def _image(outer: Map, error: float, bias: Tensor, bias_error: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """outer(bias), and by how much the true one may differ."""
    if not bool(bias.any()) and bias_error is None:
        return torch.zeros(outer.size[0], dtype=torch.float64), None
    result = outer.apply(bias)
    if isinstance(outer, Sparse) and outer.terms == 1:
        rounding = _product_error(outer.values, bias)
    else:
        rounding = _gamma(outer.terms + 1)
    factor = _both(error, rounding)
    lost = _up(factor * outer.absolute.apply(bias.abs())) if factor else None
    if bias_error is not None:
        carried = _up((1 + error) * outer.absolute.apply(bias_error))
        lost = carried if lost is None else _up(lost + carried)
    return result, lost


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and by how much exactly it was rounded (Knuth's TwoSum)."""
    total = a + b
    part = total - a
    return total, ((a - (total - part)) + (b - part)).abs()


def _up(error: Tensor) -> Tensor:
    """An error bound with room for its own rounding."""
    return error * (1 + 2.0**-20)


def _gamma(steps: int) -> float:
    """The relative error of some roundings, generously (Higham, Accuracy and Stability, 3.1)."""
    return 1.01 * steps * _UNIT


def _both(a: float, b: float) -> float:
    """The relative error of a product of two numbers with relative errors."""
    return (a + b + a * b) * (1 + 2.0**-20) if a and b else a + b


def _product_error(a: Tensor, b: Tensor) -> float:
    """The relative error of products of entries: none for two numbers of float32 or for powers of two."""
    return 0.0 if _is_binary(b) or _is_binary(a) or (_is_single(a) and _is_single(b)) else _gamma(1)


def _is_single(x: Tensor) -> bool:
    return bool((x.float().double() == x).all())


def _is_binary(x: Tensor) -> bool:
    """Whether all entries are zero or +- a moderate power of two."""
    mantissa, exponent = torch.frexp(x)
    return bool(((mantissa.abs() == 0.5) & (exponent.abs() < 64) | (x == 0)).all())


def ball(bounds: Interval) -> tuple[Tensor, Tensor | None]:
    """Centre and radius; no radius for an exact number."""
    lower, upper = bounds
    if bounds.is_point or bool((lower == upper).all()):
        return lower, None
    centre = lower / 2 + upper / 2
    return centre, _up(torch.maximum(upper - centre, centre - lower))


def relative(centre: Tensor, radius: Tensor | None, node: Node) -> tuple[Tensor, float]:
    """The numbers to use for a constant, and their relative error; what may only have underflowed counts as 0."""
    if not bool(torch.isfinite(centre).all()):
        raise MissingRule(f"{node!r} is a constant that is not finite; nothing can be multiplied with it.")
    if radius is None:
        return centre, 0.0
    centre = torch.where(centre.abs() + radius < _TINY, 0.0, centre)
    error = float(torch.where(centre == 0, 0.0, radius / centre.abs()).max())
    uncertain = (centre == 0) & (radius >= _TINY)
    if not error < 2.0**-10 or bool(uncertain.any()):
        raise MissingRule(f"{node!r} is a constant that cancels to zero up to rounding; fold it exactly beforehand.")
    return centre, error * (1 + 2.0**-20)
