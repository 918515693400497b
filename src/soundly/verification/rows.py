"""The inequalities of a property as dense matrices, for attacks and bounds that handle all of them at once.

A point is a counterexample if all rows of one clause are <= 0 there. The measure of a point, the least over clauses of
their largest row, is what a search drives below zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from soundly.spec.claim import Property


@dataclass(frozen=True, eq=False)
class Rows:
    """s = y.Y + x.X + constant, the rows s [R] at flat outputs Y and inputs X.

    Attributes:
        y: [R, outputs].
        x: [R, inputs]; takes no memory where no row reads inputs.
        constant: [R].
        clause: the clause of each row [R], int64, ascending from 0, none left out.
    """

    y: Tensor
    x: Tensor
    constant: Tensor
    clause: Tensor

    def __len__(self) -> int:
        return len(self.constant)

    @property
    def clauses(self) -> int:
        return int(self.clause[-1]) + 1 if len(self.clause) else 0

    @cached_property
    def reads_inputs(self) -> bool:
        """Whether any row has a coefficient on inputs."""
        return bool(self.x.any())

    def at(self, y: Tensor, x: Tensor) -> Tensor:
        """The rows [..., R] at outputs [..., outputs] and inputs [..., inputs]. Differentiable."""
        rows = y @ self.y.T + self.constant
        return rows + x @ self.x.T if self.reads_inputs else rows

    def worst(self, rows: Tensor) -> Tensor:
        """The largest row of each clause [..., clauses], from rows [..., R]; NaN where one of them is."""
        if self.clauses == len(self):
            return rows
        start = rows.new_full((*rows.shape[:-1], self.clauses), -math.inf)
        return start.scatter_reduce(-1, self.clause.expand(rows.shape), rows, "amax")

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Rows:
        y, constant = (v.to(device=device, dtype=dtype) for v in (self.y, self.constant))
        x = self.x.to(device=device, dtype=dtype) if self.reads_inputs else y.new_zeros(()).expand(self.x.shape)
        return Rows(y, x, constant, self.clause.to(device))


def rows_of(property: Property) -> Rows:
    """The rows of a property in its order, float64. A clause without rows, always true, gets the row 0 <= 0 at its
    place."""
    counts = torch.bincount(property.clause, minlength=property.clauses)
    bare = (counts == 0).nonzero().flatten()
    clause, order = torch.cat([property.clause, bare]).sort(stable=True)
    m = len(property)
    y = property.y.dense(m, property.outputs)
    x = property.x.dense(m, property.inputs) if len(property.x.row) else None
    if len(bare):
        y = torch.cat([y, y.new_zeros((len(bare), property.outputs))])[order]
        x = None if x is None else torch.cat([x, x.new_zeros((len(bare), property.inputs))])[order]
    constant = torch.cat([property.b, property.b.new_zeros(len(bare))])[order]
    if x is None:
        x = y.new_zeros(()).expand(len(constant), property.inputs)
    return Rows(y, x, constant, clause)
