"""The products: maps linear in each of two inputs. Weights are inputs like any other.

Each family is closed under differentiation. Multiply is its own; MatMul and Dense give each other; a convolution, its
transpose and its kernel correlation are the three faces of one trilinear form <y, x * w>, so each one's partial
derivatives are the other two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from soundly.graph.linear import Permute, reshape, transpose
from soundly.graph.node import Node, Product, Shape


@dataclass(frozen=True)
class Multiply(Product):
    """Entrywise product of two values of one shape."""

    def apply(self, *values: Tensor) -> Tensor:
        return values[0] * values[1]

    def shape(self, *shapes: Shape) -> Shape:
        if shapes[0] != shapes[1]:
            raise ValueError(f"Multiply needs equal shapes, not {shapes}")
        return shapes[0]

    def partial(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        return Multiply()(cotangent, inputs[1 - slot])

    def terms(self, *shapes: Shape) -> int:
        return 1


@dataclass(frozen=True)
class MatMul(Product):
    """a [*batch, i, k] times b [*batch, k, j]."""

    def apply(self, *values: Tensor) -> Tensor:
        return values[0] @ values[1]

    def shape(self, *shapes: Shape) -> Shape:
        a, b = shapes
        if len(a) != len(b) or len(a) < 2 or a[:-2] != b[:-2] or a[-1] != b[-2]:
            raise ValueError(f"MatMul needs [*batch, i, k] and [*batch, k, j], not {a} and {b}")
        return (*a[:-1], b[-1])

    def partial(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        a, b = inputs
        return MatMul()(cotangent, transpose(b)) if slot == 0 else MatMul()(transpose(a), cotangent)

    def terms(self, *shapes: Shape) -> int:
        return shapes[0][-1]


@dataclass(frozen=True)
class Dense(Product):
    """x [*any, n] times the transpose of a weight [m, n]: a linear layer without its bias."""

    def apply(self, *values: Tensor) -> Tensor:
        return torch.nn.functional.linear(values[0], values[1])

    def apply_with_bias(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    def shape(self, *shapes: Shape) -> Shape:
        x, w = shapes
        if len(w) != 2 or not x or x[-1] != w[1]:
            raise ValueError(f"Dense needs [*any, n] and [m, n], not {x} and {w}")
        return (*x[:-1], w[0])

    def partial(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        x, w = inputs
        if slot == 0:
            return Dense()(cotangent, Permute((1, 0))(w))
        rows = math.prod(x.shape[:-1])
        return MatMul()(transpose(reshape(cotangent, (rows, w.shape[0]))), reshape(x, (rows, w.shape[1])))

    def terms(self, *shapes: Shape) -> int:
        return shapes[0][-1]


@dataclass(frozen=True)
class _Convolution(Product):
    """What the three faces share; each spatial tuple has one entry per spatial axis (1, 2 or 3 of them)."""

    stride: Shape
    padding: Shape
    dilation: Shape
    groups: int

    def _backward(self, y: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
        zeros = [0] * len(self.stride)
        return torch.ops.aten.convolution_backward(
            y, x, w, None, self.stride, self.padding, self.dilation, False, zeros, self.groups, mask
        )

    def _check(self, x: Shape, w: Shape, y: Shape) -> None:
        """That x [N, C, *size], w [O, C / groups, *kernel] and y [N, O, *out] belong together."""
        n = len(self.stride)
        if not len(x) == len(w) == len(y) == n + 2:
            raise ValueError(f"{type(self).__name__} over {n} axes does not fit shapes {x}, {w}, {y}")
        wide = zip(x[2:], self.padding, self.dilation, w[2:], self.stride, strict=True)
        out = tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in wide)
        if x[1] != w[1] * self.groups or w[0] % self.groups or y != (x[0], w[0], *out):
            raise ValueError(f"{self}: x {x}, kernel {w} and y {y} do not belong together")


@dataclass(frozen=True)
class Conv(_Convolution):
    """x [N, C, *size] and kernel w [O, C / groups, *k] to y [N, O, *out] (cross-correlation, zero padding)."""

    def apply(self, *values: Tensor) -> Tensor:
        return self.apply_with_bias(values[0], values[1], None)

    def apply_with_bias(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        zeros = [0] * len(self.stride)
        args = (list(self.stride), list(self.padding), list(self.dilation), False, zeros, self.groups)
        return torch.convolution(x, weight, bias, *args)

    def shape(self, *shapes: Shape) -> Shape:
        x, w = shapes
        wide = zip(x[2:], self.padding, self.dilation, w[2:], self.stride, strict=False)
        y = (x[0], w[0], *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in wide))
        self._check(x, w, y)
        return y

    def partial(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        x, w = inputs
        face = (self.stride, self.padding, self.dilation, self.groups)
        if slot == 0:
            return ConvTranspose(*face, x.shape[2:])(cotangent, w)
        return ConvKernel(*face, w.shape[2:])(x, cotangent)

    def terms(self, *shapes: Shape) -> int:
        return math.prod(shapes[1][1:])


@dataclass(frozen=True)
class ConvTranspose(_Convolution):
    """y [N, O, *out] and kernel w [O, C / groups, *k] to x [N, C, *size]: the adjoint of Conv in x."""

    size: Shape

    def apply(self, *values: Tensor) -> Tensor:
        y, w = values
        x = y.new_empty(1).expand((y.shape[0], w.shape[1] * self.groups, *self.size))
        result = self._backward(y, x, w, [True, False, False])[0]
        assert result is not None
        return result

    def shape(self, *shapes: Shape) -> Shape:
        y, w = shapes
        x = (y[0], w[1] * self.groups, *self.size)
        self._check(x, w, y)
        return x

    def partial(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        y, w = inputs
        face = (self.stride, self.padding, self.dilation, self.groups)
        return Conv(*face)(cotangent, w) if slot == 0 else ConvKernel(*face, w.shape[2:])(cotangent, y)

    def terms(self, *shapes: Shape) -> int:
        return shapes[1][0] // self.groups * math.prod(shapes[1][2:])


@dataclass(frozen=True)
class ConvKernel(_Convolution):
    """x [N, C, *size] and y [N, O, *out] to a kernel [O, C / groups, *k]: the adjoint of Conv in its kernel."""

    kernel: Shape

    def apply(self, *values: Tensor) -> Tensor:
        x, y = values
        w = x.new_empty(1).expand((y.shape[1], x.shape[1] // self.groups, *self.kernel))
        result = self._backward(y, x, w, [False, True, False])[1]
        assert result is not None
        return result

    def shape(self, *shapes: Shape) -> Shape:
        x, y = shapes
        w = (y[1], x[1] // self.groups, *self.kernel)
        self._check(x, w, y)
        return w

    def partial(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        x, y = inputs
        face = (self.stride, self.padding, self.dilation, self.groups)
        return ConvTranspose(*face, x.shape[2:])(y, cotangent) if slot == 0 else Conv(*face)(x, cotangent)

    def terms(self, *shapes: Shape) -> int:
        return shapes[1][0] * math.prod(shapes[1][2:])


def multiply(a: Node, b: Node) -> Node:
    """Entrywise product of two values of one shape."""
    return Multiply()(a, b)
