"""A network as a short list of flat steps: affine maps, elementwise functions and products.

What an analysis runs thousands of times on batches wants few, large steps. A program has no shapes and no data
movement of its own: every value is a vector, every chain of linear operations is one affine step, and composites are
expanded. `soundly.bounds.lower` makes one from a network; certificates contain it, so a checker needs nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from soundly.graph.elementwise import Elementwise
from soundly.graph.node import Shape


@dataclass(frozen=True, eq=False)
class Matrix:
    """x [blocks * n] to y [blocks * m]: each block times the transpose of `weight` [m, n]."""

    weight: Tensor
    blocks: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """Outputs, inputs."""
        return self.blocks * self.weight.shape[0], self.blocks * self.weight.shape[1]

    @property
    def terms(self) -> int:
        """How many products are added up to one output."""
        return self.weight.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        """x [..., n] to y [..., m]."""
        if self.blocks == 1:
            return x @ self.weight.T
        y = x.unflatten(-1, (self.blocks, self.weight.shape[1])) @ self.weight.T
        return y.flatten(-2)

    def pull(self, a: Tensor) -> Tensor:
        """Coefficients of y [..., m] to those of x [..., n]: the transposed map."""
        if self.blocks == 1:
            return a @ self.weight
        x = a.unflatten(-1, (self.blocks, self.weight.shape[0])) @ self.weight
        return x.flatten(-2)

    @cached_property
    def absolute(self) -> Matrix:
        """The map with absolute coefficients."""
        return replace(self, weight=self.weight.abs())

    def to(self, dtype: torch.dtype, device: torch.device | str) -> Matrix:
        return replace(self, weight=self.weight.to(device=device, dtype=dtype))


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution without bias, or its adjoint.

    Attributes:
        weight: [O, C / groups, *kernel].
        wide: (C, *size), what the convolution reads.
        narrow: (O, *out), what it writes.
        padding: zeros before the first entries; those after the last are as many as `narrow` needs. Where it is
            negative, entries are left out.
        transposed: the adjoint map, from `narrow` to `wide`.
    """

    weight: Tensor
    wide: Shape
    narrow: Shape
    stride: Shape
    padding: Shape
    dilation: Shape
    groups: int
    transposed: bool = False

    @property
    def size(self) -> tuple[int, int]:
        wide, narrow = math.prod(self.wide), math.prod(self.narrow)
        return (wide, narrow) if self.transposed else (narrow, wide)

    @property
    def terms(self) -> int:
        channels = self.weight.shape[0] // self.groups if self.transposed else self.weight.shape[1]
        return channels * math.prod(self.weight.shape[2:])

    def apply(self, x: Tensor) -> Tensor:
        return self._widen(x) if self.transposed else self._narrow(x)

    def pull(self, a: Tensor) -> Tensor:
        return self._narrow(a) if self.transposed else self._widen(a)

    @cached_property
    def _after(self) -> Shape:
        """The padding after the last entries."""
        axes = zip(
            self.wide[1:], self.narrow[1:], self.stride, self.padding, self.dilation, self.weight.shape[2:], strict=True
        )
        return tuple((out - 1) * s + d * (k - 1) + 1 - n - p for n, out, s, p, d, k in axes)

    @cached_property
    def _even(self) -> bool:
        """Whether the padding is the same on both sides, up to places that no stride reaches."""
        return all(p >= 0 and p - s < q <= p for p, q, s in zip(self.padding, self._after, self.stride, strict=True))

    def _narrow(self, x: Tensor) -> Tensor:
        zeros = [0] * len(self.stride)
        args = (list(self.stride), list(self.padding) if self._even else zeros, list(self.dilation), False, zeros)
        image = x.reshape(-1, *self.wide)
        if not self._even:
            image = _padded(image, self.padding, self._after)
        y = torch.convolution(image, self.weight, None, *args, self.groups)
        return y.reshape(*x.shape[:-1], -1)

    def _widen(self, a: Tensor) -> Tensor:
        zeros = [0] * len(self.stride)
        extra = [p - q for p, q in zip(self.padding, self._after, strict=True)] if self._even else zeros
        args = (list(self.stride), list(self.padding) if self._even else zeros, list(self.dilation), True, extra)
        x = torch.convolution(a.reshape(-1, *self.narrow), self.weight, None, *args, self.groups)
        if not self._even:
            x = _padded(x, [-p for p in self.padding], [-p for p in self._after])
        return x.reshape(*a.shape[:-1], -1)

    @cached_property
    def absolute(self) -> Convolution:
        return replace(self, weight=self.weight.abs())

    def to(self, dtype: torch.dtype, device: torch.device | str) -> Convolution:
        return replace(self, weight=self.weight.to(device=device, dtype=dtype))


def _padded(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """With zeros before and after the entries of the last axes, or, where they are negative, without some entries."""
    ends = [n for p, q in zip(reversed(before), reversed(after), strict=True) for n in (p, q)]  # the last axis first
    return pad(pad(x, [max(n, 0) for n in ends]), [min(n, 0) for n in ends])


@dataclass(frozen=True, eq=False)
class Sparse:
    """y[rows[k]] += values[k] * x[columns[k]]; rows ascending, no (row, column) twice."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    size: tuple[int, int]

    @cached_property
    def terms(self) -> int:
        return int(torch.bincount(self.rows).max()) if len(self.rows) else 1

    @cached_property
    def selects(self) -> bool:
        """Whether every output is one scaled input."""
        return len(self.rows) == self.size[0] and self.terms == 1

    @cached_property
    def _places(self) -> bool:
        """Whether every input goes to one output."""
        return len(self.columns) == self.size[1] and len(self.columns.unique()) == self.size[1]

    @cached_property
    def _plain(self) -> bool:
        return bool((self.values == 1).all())

    @cached_property
    def _dense(self) -> Tensor | None:
        """[m, n], where that is cheap."""
        if self.size[0] * self.size[1] > 2**17 or self.selects:
            return None
        dense = self.values.new_zeros(self.size)
        dense[self.rows, self.columns] = self.values
        return dense

    @cached_property
    def _by_column(self) -> Tensor:
        return torch.argsort(self.columns)

    def apply(self, x: Tensor) -> Tensor:
        if self.selects:
            y = x.index_select(-1, self.columns)
            return y if self._plain else y * self.values
        if self._dense is not None:
            return x @ self._dense.T
        y = x.new_zeros((*x.shape[:-1], self.size[0]))
        return y.index_add_(-1, self.rows, x.index_select(-1, self.columns) * self.values)

    def pull(self, a: Tensor) -> Tensor:
        if self._places:
            order = self._by_column
            x = a.index_select(-1, self.rows[order])
            return x if self._plain else x * self.values[order]
        if self._dense is not None:
            return a @ self._dense
        x = a.new_zeros((*a.shape[:-1], self.size[1]))
        return x.index_add_(-1, self.columns, a.index_select(-1, self.rows) * self.values)

    @cached_property
    def absolute(self) -> Sparse:
        return replace(self, values=self.values.abs())

    def to(self, dtype: torch.dtype, device: torch.device | str) -> Sparse:
        return Sparse(
            self.rows.to(device), self.columns.to(device), self.values.to(device=device, dtype=dtype), self.size
        )


Map: TypeAlias = Matrix | Convolution | Sparse


@dataclass(frozen=True, eq=False)
class Variable:
    """The input: all inputs of the network, flattened and joined."""

    size: int

    @property
    def sources(self) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True, eq=False)
class Affine:
    """The sum of linear maps of earlier values, and a bias.

    Attributes:
        parts: maps with the position of the step that each one reads.
        bias: [n].
        weight_error: the true coefficients differ from the stored ones by at most this factor, entry by entry: folding
            constants rounds.
        bias_error: [n], by how much the true bias may differ from the stored one.
    """

    parts: tuple[tuple[Map, int], ...]
    bias: Tensor
    weight_error: float = 0.0
    bias_error: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.bias)

    @property
    def sources(self) -> tuple[int, ...]:
        return tuple(source for _, source in self.parts)


@dataclass(frozen=True, eq=False)
class Function:
    """An elementwise function of an earlier value."""

    source: int
    op: Elementwise
    size: int

    @property
    def sources(self) -> tuple[int, ...]:
        return (self.source,)


@dataclass(frozen=True, eq=False)
class Times:
    """The entrywise product of two earlier values."""

    left: int
    right: int
    size: int

    @property
    def sources(self) -> tuple[int, ...]:
        return (self.left, self.right)


Step: TypeAlias = Variable | Affine | Function | Times


@dataclass(frozen=True, eq=False)
class Program:
    """Steps in order of evaluation: the variable first, the network's outputs, flattened and joined, last.

    Where the network rounds to whole numbers, a program is made for a region and says nothing about points beyond it.
    """

    steps: tuple[Step, ...]

    @property
    def inputs(self) -> int:
        return self.steps[0].size

    @property
    def outputs(self) -> int:
        return self.steps[-1].size

    def evaluate(self, x: Tensor) -> list[Tensor]:
        """The value [..., n] of every step at points x [..., inputs]."""
        values: list[Tensor] = []
        for step in self.steps:
            match step:
                case Variable():
                    values.append(x)
                case Affine(parts, bias):
                    total = bias.expand(*x.shape[:-1], -1)
                    for part, source in parts:
                        total = total + part.apply(values[source])
                    values.append(total)
                case Function(source, op):
                    values.append(op.apply(values[source]))
                case Times(left, right):
                    values.append(values[left] * values[right])
        return values

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Program:
        """With every number in another type: for searching, not for proving."""

        def moved(step: Step) -> Step:
            if not isinstance(step, Affine):
                return step
            parts = tuple((part.to(dtype, device), source) for part, source in step.parts)
            error = None if step.bias_error is None else step.bias_error.to(device=device, dtype=dtype)
            return Affine(parts, step.bias.to(device=device, dtype=dtype), step.weight_error, error)

        return Program(tuple(moved(step) for step in self.steps))

    def consumers(self) -> list[list[int]]:
        """For every step the later steps that read it."""
        found: list[list[int]] = [[] for _ in self.steps]
        for i, step in enumerate(self.steps):
            for source in step.sources:
                found[source].append(i)
        return found
