"""From constraints to one sparse program of linear rows, and its decomposition into independent blocks.

A value is (feature vector) . (a class's weights and bias). A row is a short fixed combination of values between two
numbers. Rows that share no edited class do not interact, so each connected set of classes is a block of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soundly.editing.constraints import (
    Bounded,
    Classified,
    Cone,
    Constraint,
    Cosine,
    Normalised,
    Point,
    TopMask,
    terms_of,
)
from soundly.editing.functionals import Functional, Output
from soundly.editing.rows import Rows, Table
from soundly.editing.trunk import Trunk
from soundly.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Program(Table):
    """Rows whose values are vector . weights of a class.

    Attributes:
        vectors: [v, K + 1] float64; the last column multiplies the bias.
        value_vector, value_class: [s] which vector and which class make a value.
        weights: [classes, K + 1] float64, as they were before the edit.
        edited: the classes whose weights may change, sorted.
    """

    vectors: Tensor
    value_vector: Tensor
    value_class: Tensor
    weights: Tensor
    edited: tuple[int, ...]

    def values(self, weights: Tensor) -> Tensor:
        """The value of every row for weights [classes, K + 1], in float64 without error control."""
        return self._rows(weights, self.row_coefficient, lambda v, w: v @ w)

    def rounding(self, weights: Tensor) -> Tensor:
        """[m]: the checker's bound on the rounding error of each row's value (docs/certificates.md)."""
        operations = self.vectors.shape[1] + self.row_start.diff() + 8
        size = self._rows(weights, self.row_coefficient.abs(), lambda v, w: v.abs() @ w.abs())
        return operations * 2.0**-53 * size

    def _rows(self, weights: Tensor, coefficient: Tensor, dot: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        value = torch.empty(len(self.value_vector), dtype=torch.float64)
        classes, counts = self.value_class.sort().values.unique_consecutive(return_counts=True)
        members = self.value_class.argsort(stable=True).split(counts.tolist())
        for c, mine in zip(classes.tolist(), members, strict=True):
            value[mine] = dot(self.vectors[self.value_vector[mine]], weights[c])
        return torch.zeros_like(self.lower).index_add_(0, self.row_of_entry, value[self.row_value] * coefficient)

    def satisfied(self, weights: Tensor) -> Tensor:
        """[m] bool: which rows hold for these weights (measured, not proven)."""
        return self.held(self.values(weights))

    def blocks(self) -> Iterator[Block]:
        """The independent parts. Rows without any edited class belong to a block without classes."""
        entry_class = self.value_class[self.row_value]
        is_edited = torch.zeros(len(self.weights), dtype=torch.bool)
        is_edited[list(self.edited)] = True
        moving = is_edited[entry_class]
        parent = {c: c for c in self.edited}

        def root(c: int) -> int:
            while parent[c] != c:
                parent[c] = parent[parent[c]]
                c = parent[c]
            return c

        group, first = torch.arange(len(self.lower)), torch.full((len(self.lower),), -1)
        for start, stop in self.cones.tolist():
            group[start:stop] = start
        row = group[self.row_of_entry]
        pairs = torch.unique(torch.stack([row[moving], entry_class[moving]]), dim=1).T.tolist()
        for r, c in pairs:
            if first[r] < 0:
                first[r] = c
            else:
                parent[root(c)] = root(int(first[r]))
        roots = torch.tensor([root(int(c)) if c >= 0 else -1 for c in first.tolist()])[group]
        for r in dict.fromkeys(roots.tolist()):
            rows = (roots == r).nonzero()[:, 0]
            yield self._block(rows, tuple(c for c in self.edited if r >= 0 and root(c) == r))

    def _block(self, rows: Tensor, classes: Sequence[int]) -> Block:
        """Dense coefficients of the classes' weights, and what the frozen rest contributes."""
        width = self.vectors.shape[1]
        place = torch.full((len(self.lower),), -1)
        place[rows] = torch.arange(len(rows))
        mine = place[self.row_of_entry] >= 0
        entry_row, value, factor = place[self.row_of_entry][mine], self.row_value[mine], self.row_coefficient[mine]
        vector, cls = self.value_vector[value], self.value_class[value]
        matrix = torch.zeros(len(rows), len(classes) * width, dtype=torch.float64)
        for k, c in enumerate(classes):
            here = cls == c
            used, local = vector[here].unique(return_inverse=True)
            combine = torch.sparse_coo_tensor(
                torch.stack([entry_row[here], local]), factor[here], (len(rows), len(used)), check_invariants=False
            )
            matrix[:, k * width : (k + 1) * width] = combine @ self.vectors[used]
        frozen = torch.zeros(len(rows), dtype=torch.float64)
        rest = ~torch.isin(cls, torch.tensor(classes, dtype=cls.dtype))
        if bool(rest.any()):
            contribution = (self.vectors[vector[rest]] * self.weights[cls[rest]]).sum(1) * factor[rest]
            frozen.index_add_(0, entry_row[rest], contribution)
        cones = place[self.cones - torch.tensor([0, 1])]
        return Block(tuple(classes), rows, matrix, frozen, cones[cones[:, 0] >= 0])


@dataclass(frozen=True, eq=False)
class Block:
    """Rows [m] of a program that involve the weights of some classes only: matrix @ w + frozen.

    Attributes:
        classes: edited together; empty for rows that no edit can change.
        rows: [m] indices into the program.
        matrix: [m, len(classes) * (K + 1)].
        frozen: [m], the part that unedited classes contribute.
        cones: [q, 2] (first, last) of the rows of each cone, as positions in the block.
    """

    classes: tuple[int, ...]
    rows: Tensor
    matrix: Tensor
    frozen: Tensor
    cones: Tensor


class _Builder(Rows):
    def __init__(self, trunk: Trunk, evaluated: dict[Functional | Point, Tensor]) -> None:
        super().__init__()
        self.trunk, self.evaluated = trunk, evaluated
        self.classes = trunk.weight.shape[0]
        bias = torch.zeros(self.classes) if trunk.bias is None else trunk.bias
        self.weights = torch.cat([trunk.weight.detach().double(), bias.detach().double()[:, None]], 1).cpu()
        self.vectors = 0
        self.known: dict[Functional | Point, tuple[int, Tensor]] = {}
        self.value_vector: list[Tensor] = []
        self.value_class: list[Tensor] = []
        self.values = 0

    def vectors_of(self, functional: Functional, *, shared: Point | None = None) -> tuple[int, Tensor]:
        """Where a functional's vectors start, and the vectors [m, K + 1]; `shared` stands for equal functionals."""
        key = shared or functional
        if key not in self.evaluated:
            found = functional.vectors(self.trunk).cpu()
            if not bool(torch.isfinite(found).all()):
                raise InvalidInput(f"the features at {functional.point.name} are not finite.")
            if self.trunk.bias is None:
                found[:, -1] = 0
            self.evaluated[key] = found
        if key not in self.known:
            self.known[key] = self.vectors, self.evaluated[key]
            self.vectors += len(self.evaluated[key])
        return self.known[key]

    def new_values(self, vector: Tensor, cls: Tensor) -> Tensor:
        """Indices of new values."""
        start = self.values
        self.value_vector.append(vector)
        self.value_class.append(cls)
        self.values += len(vector)
        return torch.arange(start, start + len(vector))

    def values_of(self, functional: Functional) -> Tensor:
        start, vectors = self.vectors_of(functional)
        count = len(vectors)
        values = self.new_values(torch.arange(start, start + count), torch.full((count,), functional.of))
        distinct, group = vectors.unique(dim=0, return_inverse=True)
        first = torch.full((len(distinct),), count).scatter_reduce(0, group, torch.arange(count), "amin")
        return torch.where(vectors.any(1), values[first[group]], -1)

    def now(self, functional: Functional) -> Tensor:
        return self.vectors_of(functional)[1] @ self.weights[functional.of]

    def classified(self, c: Classified) -> None:
        """y_label >= t + margin and y_k <= t for every other k, with one threshold t: rows of single classes."""
        if self.classes < 2:
            raise InvalidInput(f"{c.name}: the edited layer has one output, so there is nothing to exceed.")
        start, h = self.vectors_of(Output(c.point, c.label), shared=c.point)
        y = self.weights @ h[0]
        rival = float(torch.cat([y[: c.label], y[c.label + 1 :]]).max())
        # Room on both sides of the threshold where the point has it already, half the margin otherwise.
        room = max(0.5 * (float(y[c.label]) - rival - c.margin), 0.5 * c.margin, 1e-6 * float(y.abs().max()))
        threshold = rival + room
        value = self.new_values(torch.full((len(y),), start), torch.arange(len(y)))
        lower, upper = torch.full_like(y, -math.inf), torch.full_like(y, threshold)
        lower[c.label], upper[c.label] = math.nextafter(threshold + c.margin, math.inf), math.inf
        self.add(c.name, torch.arange(len(y)), value, torch.ones_like(y), lower, upper)


def compile_program(
    trunk: Trunk,
    constraints: Sequence[Constraint],
    *,
    extremes: Mapping[int, tuple[int, int]] | None = None,
    evaluated: dict[Functional | Point, Tensor] | None = None,
) -> Program:
    """Evaluates the frozen part at every point and writes the constraints as rows.

    Args:
        extremes: for the i-th constraint, if it is a normalised map, the (argmin, argmax) positions to impose instead
            of the target's own.
        evaluated: feature vectors of an earlier program at the same points; filled in.

    Raises:
        InvalidInput: a constraint does not fit the model.
    """
    build = _Builder(trunk, {} if evaluated is None else evaluated)
    stated = [c for c in constraints if isinstance(c, Bounded | Normalised | TopMask | Cone | Cosine)]
    edited = {t.functional.of for c in stated for t in terms_of(c)}
    edited |= {c.label for c in constraints if isinstance(c, Classified)}
    if any(not 0 <= c < build.classes for c in edited):
        raise InvalidInput(
            f"constraints name outputs {sorted(edited)}; layer {trunk.layer!r} has 0..{build.classes - 1}."
        )
    build.state(constraints, extremes or {})
    start, value, factor, lower, upper, cones = build.table()
    return Program(
        vectors=torch.cat([v for _, v in build.known.values()]),
        value_vector=torch.cat(build.value_vector),
        value_class=torch.cat(build.value_class),
        row_start=start,
        row_value=value,
        row_coefficient=factor,
        lower=lower,
        upper=upper,
        cones=cones,
        claims=tuple(build.claims),
        weights=build.weights,
        edited=tuple(sorted(edited)),
    )
