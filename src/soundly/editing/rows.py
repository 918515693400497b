"""Constraints as linear rows over values, whatever those values are made of.

A bound, a normalised map, a kept top set: each is a few short rows `lower <= sum_k c_k value_k <= upper`. The rows of a
cone may miss these bounds, in the Euclidean norm by no more than the last of them has to spare. What a value is (a
feature vector times a weight vector; an entry of a gradient at a point), and how one class is made to win, is decided
by whoever compiles the rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from soundly.editing.constraints import (
    Bounded,
    Classified,
    Cone,
    Constraint,
    Cosine,
    Expression,
    Normalised,
    TopMask,
)
from soundly.editing.functionals import Functional
from soundly.errors import InvalidInput

GRID = 2.0**40
"""Interpolation factors of normalised maps are rounded inwards to this grid, so that 1 - factor is exact."""


@dataclass(frozen=True)
class Claim:
    """A constraint as the user named it, and its rows start..stop - 1."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Table:
    """Rows lower <= sum_k coefficient_k * value_k <= upper over values that a subclass defines.

    Attributes:
        row_start: [m + 1]; row i consists of the entries row_start[i] .. row_start[i + 1] - 1 of
        row_value, row_coefficient: [nnz].
        lower, upper: [m] float64.
        cones: [q, 2] (start, stop), ascending: of the rows start .. stop - 1 the last exceeds its lower end by at least
            the Euclidean norm of what the others miss their bounds by.
        claims: cover the rows in order.
    """

    row_start: Tensor
    row_value: Tensor
    row_coefficient: Tensor
    lower: Tensor
    upper: Tensor
    cones: Tensor
    claims: tuple[Claim, ...]

    @cached_property
    def row_of_entry(self) -> Tensor:
        """[nnz]: the row each entry belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.lower)), self.row_start.diff())

    def name_of(self, row: int) -> str:
        """The claim of a row and the row's number inside it."""
        claim = next(c for c in self.claims if c.start <= row < c.stop)
        whole = claim.stop - claim.start == 1 or bool(((self.cones[:, 0] <= row) & (row < self.cones[:, 1])).any())
        return claim.name if whole else f"{claim.name} [row {row - claim.start}]"

    def held(self, values: Tensor) -> Tensor:
        """[m] bool: which rows hold if these are their values [m]; those of a cone together."""
        held = (self.lower <= values) & (values <= self.upper)
        for start, stop in self.cones.tolist():
            part, last = slice(start, stop - 1), stop - 1
            missed = values[part] - values[part].clamp(self.lower[part], self.upper[part])
            held[start:stop] = missed.norm() <= values[last] - self.lower[last]
        return held


class Rows(ABC):
    """Collects rows; a subclass says what a functional's values are."""

    def __init__(self) -> None:
        self.count = 0
        self.entries: list[tuple[Tensor, Tensor, Tensor]] = []  # row, value, coefficient
        self.bounds: list[tuple[Tensor, Tensor]] = []
        self.cones: list[tuple[int, int]] = []
        self.claims: list[Claim] = []

    @abstractmethod
    def values_of(self, functional: Functional) -> Tensor:
        """Indices of the functional's values: equal ones for values that are always equal, -1 for those always 0."""

    @abstractmethod
    def now(self, functional: Functional) -> Tensor:
        """The functional's values before the edit, in float64."""

    @abstractmethod
    def classified(self, constraint: Classified) -> None:
        """Rows under which one output exceeds all others."""

    def state(self, constraints: Sequence[Constraint], extremes: Mapping[int, tuple[int, int]]) -> None:
        """Adds the rows of every constraint; `extremes` as in `compile_program`."""
        if not constraints:
            raise InvalidInput("constraints: give at least one.")
        for i, constraint in enumerate(constraints):
            match constraint:
                case Bounded():
                    self._bounded(constraint)
                case Normalised():
                    self._normalised(constraint, extremes.get(i) or constraint.extremes()[0])
                case TopMask():
                    self._top(constraint)
                case Cone():
                    self._cone(constraint)
                case Cosine():
                    self._cosine(constraint)
                case Classified():
                    self.classified(constraint)
                case _:
                    raise InvalidInput(
                        f"constraints[{i}] is a {type(constraint).__name__}; finish it with .within, .classified, ..."
                    )

    def add(
        self, name: str, row: Tensor, value: Tensor, factor: Tensor, lower: Tensor, upper: Tensor, *, cone: int = 0
    ) -> None:
        """Adds rows 0..len(lower)-1 of a claim, given as entries; the first `cone` rows form one."""
        if cone:
            self.cones.append((self.count, self.count + cone))
        keep = (factor != 0) & (value >= 0)
        self.entries.append((row[keep] + self.count, value[keep], factor[keep].double()))
        self.bounds.append((lower.double(), upper.double()))
        self.claims.append(Claim(name, self.count, self.count + len(lower)))
        self.count += len(lower)

    def table(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All rows: row_start [m + 1], row_value and row_coefficient [nnz] in order of rows, lower and upper [m], and
        cones [q, 2]."""
        row, value, factor = (torch.cat(parts) for parts in zip(*self.entries, strict=True))
        order = torch.argsort(row, stable=True)
        start = torch.zeros(self.count + 1, dtype=torch.long)
        start[1:] = torch.bincount(row, minlength=self.count).cumsum(0)
        lower, upper = (torch.cat(parts) for parts in zip(*self.bounds, strict=True))
        cones = torch.tensor(self.cones, dtype=torch.long).reshape(-1, 2)
        return start, value[order], factor[order], lower, upper, cones

    def expression(self, e: Expression) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Entries (row, value, factor) and the constant [m] of an expression."""
        rows, values, factors = [torch.zeros(0).long()], [torch.zeros(0).long()], [torch.zeros(0).double()]
        size = None if e.terms else len(e.constant)
        for term in e.terms:
            value = self.values_of(term.functional)
            matrix = torch.eye(len(value), dtype=torch.float64) if term.matrix is None else term.matrix
            if matrix.shape[1] != len(value) or (size is not None and len(matrix) != size):
                raise InvalidInput(
                    f"{e.name}: its parts have different numbers of entries ({size}, {tuple(matrix.shape)})."
                )
            size = len(matrix)
            row, column = matrix.nonzero(as_tuple=True)
            rows.append(row)
            values.append(value[column])
            factors.append(matrix[row, column] * term.factor)
        assert size is not None
        if len(e.constant) not in (1, size):
            raise InvalidInput(f"{e.name} has {size} entries, but a constant of {len(e.constant)} was added.")
        return torch.cat(rows), torch.cat(values), torch.cat(factors), e.constant.expand(size)

    def value(self, e: Expression) -> Tensor:
        """The expression before the edit."""
        total = e.constant.clone()
        for term in e.terms:
            values = self.now(term.functional) * term.factor
            total = total + (values if term.matrix is None else term.matrix @ values)
        return total

    def _bounded(self, c: Bounded) -> None:
        row, value, factor, constant = self.expression(c.expression)
        if len(c.lower) not in (1, len(constant)) or len(c.upper) not in (1, len(constant)):
            raise InvalidInput(f"{c.name}: {len(constant)} entries, but bounds of {len(c.lower)} and {len(c.upper)}.")
        lower, upper = c.lower.expand(len(constant)), c.upper.expand(len(constant))
        # Where a constant is moved across, the bound is rounded inwards.
        up, down = torch.tensor(math.inf, dtype=torch.float64), torch.tensor(-math.inf, dtype=torch.float64)
        moved = constant != 0
        lower = torch.where(moved & lower.isfinite(), torch.nextafter(lower - constant, up), lower)
        upper = torch.where(moved & upper.isfinite(), torch.nextafter(upper - constant, down), upper)
        self.add(c.name, row, value, factor, lower, upper)

    def _normalised(self, c: Normalised, extremes: tuple[int, int]) -> None:
        """With p, q the places of the smallest and largest entry: a_j (L_q - L_p) <= L_j - L_p <= b_j (L_q - L_p)."""
        base_row, base_value, base_factor, constant = self.expression(c.expression)
        n, (p, q) = len(constant), extremes
        if n != len(c.target):
            raise InvalidInput(f"{c.name}: the map has {n} entries, its target {len(c.target)}.")
        if bool((constant != 0).any()):
            raise InvalidInput(f"{c.name}: a normalised map must not have a constant added.")
        up, down = torch.tensor(2.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
        least = torch.ceil(torch.nextafter(c.target - c.eps, up).clamp(min=0) * GRID) / GRID
        most = torch.floor(torch.nextafter(c.target + c.eps, down).clamp(max=1) * GRID) / GRID
        others = [j for j in range(n) if j not in (p, q)]
        matrix = torch.zeros(2 * len(others) + 1, n, dtype=torch.float64)
        for k, j in enumerate(others):
            for r, level in ((2 * k, float(least[j])), (2 * k + 1, float(most[j]))):
                matrix[r, j] = 1.0
                matrix[r, p] = level - 1.0
                matrix[r, q] = -level
        matrix[-1, q], matrix[-1, p] = 1.0, -1.0
        before = self.value(c.expression)
        spread = c.spread if c.spread is not None else 0.1 * float(before.max() - before.min())
        if not spread > 0:
            raise InvalidInput(f"{c.name}: the map is constant before the edit; give its least `spread` explicitly.")
        infinite = torch.full((len(others), 2), math.inf, dtype=torch.float64)
        lower, upper = -infinite, infinite.clone()
        lower[:, 0], upper[:, 1] = 0.0, 0.0
        end = torch.tensor([spread], dtype=torch.float64)
        name = f"{c.name} within {c.eps:g} of its target (smallest entry {p}, largest {q}, range >= {spread:.3g})"
        # The map's entries may themselves be combinations of values.
        # Entries that are the same value share its column, so that they cancel; on the grid, exactly.
        values, place = base_value.unique(return_inverse=True)
        base = torch.zeros(n, len(values), dtype=torch.float64)
        base.index_put_((base_row, place), base_factor, accumulate=True)
        combined = matrix @ base
        row, column = combined.nonzero(as_tuple=True)
        self.add(
            name, row, values[column], combined[row, column],
            torch.cat([lower.reshape(-1), end]), torch.cat([upper.reshape(-1), end * math.inf]),
        )  # fmt: skip

    def _top(self, c: TopMask) -> None:
        n = len(c.mask)
        inside, outside = c.mask.nonzero()[:, 0], (~c.mask).nonzero()[:, 0]
        pairs = torch.cartesian_prod(inside, outside)
        matrix = torch.zeros(len(pairs), n, dtype=torch.float64)
        index = torch.arange(len(pairs))
        matrix[index, pairs[:, 0]], matrix[index, pairs[:, 1]] = 1.0, -1.0
        self._bounded(c.expression.combined(matrix).at_least(c.margin, name=c.name))

    def _cone(self, c: Cone) -> None:
        row, value, factor, constant = self.expression(c.expression)
        last, more, times, radius = self.expression(c.radius)
        if len(radius) != 1:
            raise InvalidInput(f"{c.name}: the radius has {len(radius)} entries; it must be one number.")
        n = len(constant)
        lower = torch.cat([-constant, -radius])
        upper = torch.cat([-constant, radius.new_full((1,), math.inf)])
        entries = torch.cat([row, last + n]), torch.cat([value, more]), torch.cat([factor, times])
        self.add(c.name, *entries, lower, upper, cone=n + 1)

    def _cosine(self, c: Cosine) -> None:
        """Rows s L_i, <t, L>, <t, L> with s >= cosine |t|: the first ones form a cone, the last has a lower end."""
        row, value, factor, constant = self.expression(c.expression)
        n = len(constant)
        if n != len(c.teacher):
            raise InvalidInput(f"{c.name}: the map has {n} entries, its teacher {len(c.teacher)}.")
        if bool((constant != 0).any()):
            raise InvalidInput(f"{c.name}: add the constant to the teacher's side; an angle needs a map of its own.")
        length = c.length if c.length is not None else 0.1 * float(self.value(c.expression).norm())
        if not length > 0:
            raise InvalidInput(f"{c.name}: the map is zero before the edit; give its least `length` explicitly.")
        size = math.sqrt(math.fsum(t * t for t in c.teacher.tolist())) * (1 + 2.0**-50)  # at least |t|
        along = c.teacher[row] * factor
        lower = torch.cat([torch.zeros(n + 1), torch.tensor([math.nextafter(length * size, math.inf)])])
        upper = torch.cat([torch.zeros(n), torch.full((2,), math.inf)])
        self.add(
            c.name, torch.cat([row, torch.full_like(row, n), torch.full_like(row, n + 1)]), value.repeat(3),
            torch.cat([factor * math.nextafter(c.cosine * size, math.inf), along, along]), lower, upper, cone=n + 1,
        )  # fmt: skip
