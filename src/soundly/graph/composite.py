"""Composites: operations defined by the three kinds, kept whole until an analysis asks for their expansion.

They stay whole because lowering is a tightness decision: a softmax lies in [0, 1] whatever its expansion's bounds say,
and a variance written as a product of two copies would be allowed to be negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from soundly.graph import elementwise
from soundly.graph.linear import Combine, Concat, Gather, Permute, Sum, add, broadcast, mean, reshape, scale, subtract
from soundly.graph.node import Composite, Constant, Fill, Node, Shape
from soundly.graph.product import Multiply

FEW = 16
"""Up to how many entries a softmax compares with each other one by one."""


@dataclass(frozen=True)
class Maximum(Composite):
    """The larger of two values of one shape, entrywise."""

    def apply(self, *values: Tensor) -> Tensor:
        return torch.maximum(*values)

    def shape(self, *shapes: Shape) -> Shape:
        return Combine((1.0, 1.0)).shape(*shapes)

    def expand(self, *inputs: Node) -> Node:
        a, b = inputs
        return add(b, elementwise.RELU(subtract(a, b)))

    def enclose(self, *bounds: tuple[Tensor, Tensor], unit: float) -> tuple[Tensor, Tensor] | None:
        (la, ua), (lb, ub) = bounds
        return torch.maximum(la, lb), torch.maximum(ua, ub)

    def reach(self, *marks: Tensor) -> Tensor | None:
        return torch.maximum(*marks)


@dataclass(frozen=True)
class MaxPool(Composite):
    """The maximum over windows of the trailing axes, one entry of each tuple per axis; padding is never the maximum."""

    kernel: Shape
    stride: Shape
    padding: Shape
    dilation: Shape
    ceil: bool = False

    def apply(self, *values: Tensor) -> Tensor:
        pool = (torch.nn.functional.max_pool1d, torch.nn.functional.max_pool2d, torch.nn.functional.max_pool3d)
        return pool[len(self.kernel) - 1](values[0], self.kernel, self.stride, self.padding, self.dilation, self.ceil)

    def _starts(self, axis: int, size: int) -> list[int]:
        """The first position of every window along one spatial axis."""
        k, s, p, d = self.kernel[axis], self.stride[axis], self.padding[axis], self.dilation[axis]
        room = size + 2 * p - d * (k - 1) - 1
        count = (-(-room // s) if self.ceil else room // s) + 1
        return [i * s - p for i in range(count) if i * s - p < size + p and not (self.ceil and i * s >= size + p)]

    def shape(self, *shapes: Shape) -> Shape:
        n = len(self.kernel)
        if len(shapes[0]) != n + 2:
            raise ValueError(f"MaxPool over {n} axes needs [N, C, *size], not {shapes[0]}")
        result = (*shapes[0][:-n], *(len(self._starts(i, size)) for i, size in enumerate(shapes[0][-n:])))
        if 0 in result and 0 not in shapes[0]:
            raise ValueError(f"MaxPool's window {self.kernel} is larger than its input {shapes[0]}")
        return result

    def expand(self, *inputs: Node) -> Node:
        """One axis after the other; a tap that falls outside is replaced by one inside the same window."""
        (x,) = inputs
        first = len(x.shape) - len(self.kernel)
        for i, k in enumerate(self.kernel):
            size, d = x.shape[first + i], self.dilation[i]
            taps = []
            for tap in range(k):
                index = []
                for start in self._starts(i, size):
                    inside = [start + d * j for j in range(k) if 0 <= start + d * j < size]
                    index.append(start + d * tap if 0 <= start + d * tap < size else inside[0])
                taps.append(Gather(first + i, tuple(index))(x))
            x = taps[0]
            for other in taps[1:]:
                x = Maximum()(x, other)
        return x

    def enclose(self, *bounds: tuple[Tensor, Tensor], unit: float) -> tuple[Tensor, Tensor] | None:
        ((lower, upper),) = bounds
        return self.apply(lower), self.apply(upper)

    def reach(self, *marks: Tensor) -> Tensor | None:
        return self.apply(*marks)


@dataclass(frozen=True)
class Softmax(Composite):
    """exp(x) over its sum along an axis. With a second input, a constant mask of zeros and ones of the same shape,
    only over the entries where it is one; the others are 0 (and so is a row that is masked altogether)."""

    axis: int

    def __call__(self, *inputs: Node, origin: str = "") -> Node:
        if len(inputs) == 2 and not isinstance(inputs[1].op, (Constant, Fill)):
            raise ValueError("a softmax mask must be a constant")
        return super().__call__(*inputs, origin=origin)

    def apply(self, *values: Tensor) -> Tensor:
        x = values[0]
        if len(values) == 1:
            return torch.softmax(x, self.axis)
        masked = torch.where(values[1] > 0, x, torch.full_like(x, -math.inf))
        return torch.softmax(masked, self.axis).nan_to_num(nan=0.0) * values[1]

    def shape(self, *shapes: Shape) -> Shape:
        if len(shapes) == 2 and shapes[0] != shapes[1]:
            raise ValueError(f"a softmax mask needs the shape {shapes[0]} of the scores, not {shapes[1]}")
        return shapes[0]

    def expand(self, *inputs: Node) -> Node:
        """Over few entries 1 / (1 + sum_j exp(x_j - x_i)): exponentials of differences, no product, never above 1; over
        many, where there would be too many differences, exp(x_i) / sum_j exp(x_j)."""
        x, *mask = inputs
        n = x.shape[self.axis]
        if 1 < n <= FEW:
            return self._compared(x, *mask)
        powers = elementwise.EXP(x)
        if mask:
            powers = Multiply()(powers, mask[0])
        total = elementwise.RECIPROCAL(Sum((self.axis,))(powers))
        return Multiply()(powers, broadcast(total, x.shape))

    def _compared(self, x: Node, *mask: Node) -> Node:
        """Each difference is formed once, for i < j, and read with both signs."""
        axis, n = self.axis, x.shape[self.axis]
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        pairs = list(combinations(range(n), 2))
        place = {pair: k for k, pair in enumerate(pairs)}
        gaps = subtract(*(Gather(axis, tuple(p[side] for p in pairs))(x) for side in (1, 0)))
        order = [(i, j) for i in range(n) for j in range(n) if j != i]
        both = Concat(axis)(gaps, scale(gaps, -1.0))
        taken = tuple(place[i, j] if i < j else len(pairs) + place[j, i] for i, j in order)
        growth = elementwise.EXP(Gather(axis, taken)(both))
        if mask:
            growth = Multiply()(growth, Gather(axis, tuple(j for _, j in order))(mask[0]))
        others = Sum((axis + 1,))(reshape(growth, (*before, n, n - 1, *after)))
        share = elementwise.RECIPROCAL(add(Fill(1.0, x.shape)(), reshape(others, x.shape)))
        return Multiply()(share, mask[0]) if mask else share

    def pullback(self, cotangent: Node, node: Node) -> tuple[Node, ...]:
        weighted = Multiply()(cotangent, node)
        centre = broadcast(Sum((self.axis,))(weighted), node.shape)
        score = subtract(weighted, Multiply()(centre, node))
        return (score, *(Fill(0.0, mask.shape)() for mask in node.inputs[1:]))

    def enclose(self, *bounds: tuple[Tensor, Tensor], unit: float) -> tuple[Tensor, Tensor] | None:
        """p_i = 1 / (1 + sum_j exp(x_j - x_i)) is extreme with x_i at one end and all others at the other."""
        (lower, upper), *mask = bounds
        i, n = self.axis, lower.shape[self.axis]
        keep = mask[0][0] > 0 if mask else torch.ones_like(lower, dtype=torch.bool)
        other = ~torch.eye(n, dtype=torch.bool, device=lower.device).reshape(n, n, *(1,) * (lower.dim() - 1 - i))
        counted = keep.unsqueeze(i) & other
        ends = []
        for own, others in ((lower, upper), (upper, lower)):
            growth = torch.exp(others.unsqueeze(i) - own.unsqueeze(i + 1))
            total = torch.where(counted, growth, torch.zeros_like(growth)).sum(i + 1)
            ends.append(torch.where(keep, 1 / (1 + total), torch.zeros_like(own)))
        # Each exponential inherits the rounding of its exponent, the sum that of n terms; twice, for our value and
        # theirs.
        spread = upper.amax(i, keepdim=True) - lower.amin(i, keepdim=True)
        slack = 4 * unit * (n + 8 + spread)
        tiny = torch.finfo(lower.dtype).tiny  # what underflow may lose
        least, greatest = ends[0] * (1 - slack).clamp(min=0) - tiny, ends[1] * (1 + slack) + tiny
        return least.clamp(min=0), greatest.masked_fill(~keep, 0)


@dataclass(frozen=True)
class Normalise(Composite):
    """x / sqrt(mean(x^2) + eps) over some axes, after subtracting the mean if `centred`: layer, group, instance and RMS
    normalisation without their trained scale and shift."""

    axes: tuple[int, ...]
    eps: float
    centred: bool = True

    def apply(self, *values: Tensor) -> Tensor:
        (x,) = values
        if self.centred:
            x = x - x.mean(self.axes, keepdim=True)
        return x * torch.rsqrt(torch.square(x).mean(self.axes, keepdim=True) + self.eps)

    def shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    def expand(self, *inputs: Node) -> Node:
        (x,) = inputs
        if self.centred:
            x = subtract(x, broadcast(mean(x, self.axes), x.shape))
        variance = mean(elementwise.SQUARE(x), self.axes)
        shifted = add(variance, Fill(self.eps, variance.shape)())
        return Multiply()(x, broadcast(elementwise.RSQRT(shifted), x.shape))


@dataclass(frozen=True)
class Rounding(Composite):
    """Each entry rounded to a whole number: "floor", "ceil", "trunc", or "round" (halves to even).

    It has infinitely many steps, so it has no expansion into pieces: only its value and its monotone range.
    """

    kind: Literal["floor", "ceil", "trunc", "round"]

    def apply(self, *values: Tensor) -> Tensor:
        result: Tensor = getattr(torch, self.kind)(values[0])
        return result

    def shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    def pullback(self, cotangent: Node, node: Node) -> tuple[Node, ...]:
        return (Fill(0.0, node.shape)(),)

    def enclose(self, *bounds: tuple[Tensor, Tensor], unit: float) -> tuple[Tensor, Tensor] | None:
        ((lower, upper),) = bounds
        return self.apply(lower), self.apply(upper)

    def reach(self, *marks: Tensor) -> Tensor | None:
        return marks[0]


def maximum_over(x: Node, axis: int) -> Node:
    """The maximum along an axis, which is kept with length one."""
    kept = [i for i in range(len(x.shape)) if i != axis]
    size = x.shape[axis]
    rows = reshape(Permute((*kept, axis))(x), (1, math.prod(x.shape[i] for i in kept), size))
    greatest = MaxPool((size,), (size,), (0,), (1,))(rows)
    return reshape(greatest, tuple(1 if i == axis else n for i, n in enumerate(x.shape)))


def minimum(a: Node, b: Node) -> Node:
    """The smaller of two values, entrywise."""
    return scale(Maximum()(scale(a, -1), scale(b, -1)), -1)
