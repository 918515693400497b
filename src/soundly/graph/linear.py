"""The structural linear maps: ten operations, closed under taking the adjoint.

Broadcasting is always an explicit `Expand`, whose adjoint is `Sum`; a strided `Slice` and the zero-filling `Embed` are
adjoint, `Gather` and `ScatterAdd` are, and the others are their own family. Means, differences, padding, pooling by
averages, repetition and nearest upsampling are all made of these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soundly.graph.node import Linear, Node, Shape


@dataclass(frozen=True)
class Combine(Linear):
    """The sum of inputs of one shape, each times a number: adds, subtracts, negates, scales."""

    coefficients: tuple[float, ...]

    def apply(self, *values: Tensor) -> Tensor:
        first, *rest = self.coefficients
        total = values[0] if first == 1 else -values[0] if first == -1 else values[0] * first
        for factor, value in zip(rest, values[1:], strict=True):
            total = torch.add(total, value, alpha=factor)
        return total

    def shape(self, *shapes: Shape) -> Shape:
        if len(shapes) != len(self.coefficients) or any(s != shapes[0] for s in shapes):
            raise ValueError(f"Combine of {len(self.coefficients)} inputs needs equal shapes, not {shapes}")
        return shapes[0]

    def adjoint(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        return scale(cotangent, self.coefficients[slot])

    def signs(self, arity: int) -> tuple[int, ...]:
        return tuple(-1 if c < 0 else 1 for c in self.coefficients)

    @property
    def absolute(self) -> Combine:
        return Combine(tuple(abs(c) for c in self.coefficients))

    def terms(self, *shapes: Shape) -> int:
        return len(self.coefficients) + any(abs(c) != 1 for c in self.coefficients)


@dataclass(frozen=True)
class Sum(Linear):
    """The sum over some axes, which are kept with length one."""

    axes: tuple[int, ...]

    def apply(self, *values: Tensor) -> Tensor:
        return values[0].sum(self.axes, keepdim=True) if self.axes else values[0]

    def shape(self, *shapes: Shape) -> Shape:
        return tuple(1 if axis in self.axes else n for axis, n in enumerate(shapes[0]))

    def adjoint(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        return Expand(inputs[0].shape)(cotangent)

    def terms(self, *shapes: Shape) -> int:
        return math.prod(shapes[0][axis] for axis in self.axes)


@dataclass(frozen=True)
class Expand(Linear):
    """Repeats axes of length one up to `dims`, without copying."""

    dims: Shape

    def apply(self, *values: Tensor) -> Tensor:
        return values[0].expand(self.dims)

    def shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        if len(shape) != len(self.dims) or any(a not in (1, b) for a, b in zip(shape, self.dims, strict=True)):
            raise ValueError(f"a value of shape {shape} cannot be expanded to {self.dims}")
        return self.dims

    def adjoint(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        pairs = zip(inputs[0].shape, self.dims, strict=True)
        return Sum(tuple(axis for axis, (a, b) in enumerate(pairs) if a != b))(cotangent)


@dataclass(frozen=True)
class Reshape(Linear):
    """The same entries in C order under another shape."""

    dims: Shape

    def apply(self, *values: Tensor) -> Tensor:
        return values[0].reshape(self.dims)

    def shape(self, *shapes: Shape) -> Shape:
        if math.prod(shapes[0]) != math.prod(self.dims):
            raise ValueError(f"a value of shape {shapes[0]} cannot be reshaped to {self.dims}")
        return self.dims

    def adjoint(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        return Reshape(inputs[0].shape)(cotangent)


@dataclass(frozen=True)
class Permute(Linear):
    """Axes in another order: axis i of the result is axis `axes[i]` of the input."""

    axes: tuple[int, ...]

    def apply(self, *values: Tensor) -> Tensor:
        return values[0].permute(self.axes)

    def shape(self, *shapes: Shape) -> Shape:
        if sorted(self.axes) != list(range(len(shapes[0]))):
            raise ValueError(f"{self.axes} is no permutation of the axes of {shapes[0]}")
        return tuple(shapes[0][axis] for axis in self.axes)

    def adjoint(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        inverse = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return Permute(tuple(inverse))(cotangent)


@dataclass(frozen=True)
class Slice(Linear):
    """Per axis the entries start, start + step, ..., `counts` of them, with positive steps."""

    starts: tuple[int, ...]
    counts: Shape
    steps: tuple[int, ...]

    def apply(self, *values: Tensor) -> Tensor:
        return values[0][self._index()]

    def _index(self) -> tuple[slice, ...]:
        ranges = zip(self.starts, self.counts, self.steps, strict=True)
        return tuple(slice(a, a + (n - 1) * s + 1 if n else a, s) for a, n, s in ranges)

    def shape(self, *shapes: Shape) -> Shape:
        for size, a, n, s in zip(shapes[0], self.starts, self.counts, self.steps, strict=True):
            if s < 1 or a < 0 or n < 0 or (n and a + (n - 1) * s >= size):
                raise ValueError(f"{self} does not lie inside a value of shape {shapes[0]}")
        return self.counts

    def adjoint(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        return Embed(self.starts, self.steps, inputs[0].shape)(cotangent)


@dataclass(frozen=True)
class Embed(Linear):
    """Places a value into zeros of shape `dims`, per axis at start, start + step, ...: pads and dilates."""

    starts: tuple[int, ...]
    steps: tuple[int, ...]
    dims: Shape

    def apply(self, *values: Tensor) -> Tensor:
        (value,) = values
        if all(step == 1 for step in self.steps):
            sides = zip(self.starts, value.shape, self.dims, strict=True)
            pad = [side for a, n, size in reversed(list(sides)) for side in (a, size - a - n)]
            return torch.nn.functional.pad(value, pad)
        result = value.new_zeros(self.dims)
        result[Slice(self.starts, tuple(value.shape), self.steps)._index()] = value
        return result

    def shape(self, *shapes: Shape) -> Shape:
        Slice(self.starts, shapes[0], self.steps).shape(self.dims)
        return self.dims

    def adjoint(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        return Slice(self.starts, inputs[0].shape, self.steps)(cotangent)


@dataclass(frozen=True)
class Concat(Linear):
    """The inputs one after the other along an axis."""

    axis: int

    def apply(self, *values: Tensor) -> Tensor:
        return torch.cat(values, self.axis)

    def shape(self, *shapes: Shape) -> Shape:
        if any(
            s[: self.axis] + s[self.axis + 1 :] != shapes[0][: self.axis] + shapes[0][self.axis + 1 :] for s in shapes
        ):
            raise ValueError(f"values of shapes {shapes} cannot be joined along axis {self.axis}")
        return (*shapes[0][: self.axis], sum(s[self.axis] for s in shapes), *shapes[0][self.axis + 1 :])

    def adjoint(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        before = sum(node.shape[self.axis] for node in inputs[:slot])
        return narrow(cotangent, self.axis, before, inputs[slot].shape[self.axis])


@dataclass(frozen=True)
class Gather(Linear):
    """Entries of one axis by constant positions, which may repeat."""

    axis: int
    index: tuple[int, ...]

    def apply(self, *values: Tensor) -> Tensor:
        (value,) = values
        return value.index_select(self.axis, torch.tensor(self.index, dtype=torch.long, device=value.device))

    def shape(self, *shapes: Shape) -> Shape:
        size = shapes[0][self.axis]
        if any(not 0 <= i < size for i in self.index):
            raise ValueError(f"a gathered position lies outside axis {self.axis} of {shapes[0]}")
        return (*shapes[0][: self.axis], len(self.index), *shapes[0][self.axis + 1 :])

    def adjoint(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        return ScatterAdd(self.axis, self.index, inputs[0].shape[self.axis])(cotangent)


@dataclass(frozen=True)
class ScatterAdd(Linear):
    """Adds the entries of one axis into zeros of length `size` at constant positions, which may repeat."""

    axis: int
    index: tuple[int, ...]
    size: int

    def apply(self, *values: Tensor) -> Tensor:
        (value,) = values
        zeros = value.new_zeros((*value.shape[: self.axis], self.size, *value.shape[self.axis + 1 :]))
        return zeros.index_add(self.axis, torch.tensor(self.index, dtype=torch.long, device=value.device), value)

    def shape(self, *shapes: Shape) -> Shape:
        if shapes[0][self.axis] != len(self.index) or any(not 0 <= i < self.size for i in self.index):
            raise ValueError(f"{len(self.index)} positions do not fit a value of shape {shapes[0]}")
        return (*shapes[0][: self.axis], self.size, *shapes[0][self.axis + 1 :])

    def adjoint(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        return Gather(self.axis, self.index)(cotangent)

    def terms(self, *shapes: Shape) -> int:
        return max((self.index.count(i) for i in set(self.index)), default=1)


def scale(x: Node, factor: float) -> Node:
    """x times a number."""
    return x if factor == 1 else Combine((float(factor),))(x)


def add(*values: Node) -> Node:
    """The sum of values of one shape."""
    return values[0] if len(values) == 1 else Combine((1.0,) * len(values))(*values)


def subtract(a: Node, b: Node) -> Node:
    """a - b for values of one shape."""
    return Combine((1.0, -1.0))(a, b)


def mean(x: Node, axes: Sequence[int]) -> Node:
    """The mean over axes, which are kept with length one."""
    count = math.prod(x.shape[axis] for axis in axes)
    return scale(Sum(tuple(axes))(x), 1 / count)


def reshape(x: Node, shape: Sequence[int]) -> Node:
    """x under another shape; x itself where it has it already."""
    return x if tuple(shape) == x.shape else Reshape(tuple(shape))(x)


def broadcast(x: Node, shape: Sequence[int]) -> Node:
    """x repeated to `shape` by the usual broadcasting rule, explicitly."""
    padded = reshape(x, (1,) * (len(shape) - len(x.shape)) + x.shape)
    return padded if padded.shape == tuple(shape) else Expand(tuple(shape))(padded)


def transpose(x: Node) -> Node:
    """The last two axes exchanged."""
    n = len(x.shape)
    return Permute((*range(n - 2), n - 1, n - 2))(x)


def narrow(x: Node, axis: int, start: int, count: int) -> Node:
    """`count` entries of one axis from `start` on."""
    if (start, count) == (0, x.shape[axis]):
        return x
    n = len(x.shape)
    starts = tuple(start if i == axis else 0 for i in range(n))
    counts = tuple(count if i == axis else size for i, size in enumerate(x.shape))
    return Slice(starts, counts, (1,) * n)(x)


def pad(x: Node, before: Sequence[int], after: Sequence[int]) -> Node:
    """Zeros around x per axis; negative amounts crop."""
    starts = tuple(max(0, -b) for b in before)
    counts = tuple(n + min(0, b) + min(0, a) for n, b, a in zip(x.shape, before, after, strict=True))
    if counts != x.shape:
        x = Slice(starts, counts, (1,) * len(counts))(x)
    dims = tuple(n + max(0, b) + max(0, a) for n, b, a in zip(counts, before, after, strict=True))
    return x if dims == x.shape else Embed(tuple(max(0, b) for b in before), (1,) * len(dims), dims)(x)
