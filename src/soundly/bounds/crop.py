"""Crops: the part of a program that a few entries of a step depend on, as a program of its own.

What a neuron of a convolutional layer depends on is a small window of every layer below. A crop of a convolution is
again a convolution, on a smaller map, so bounds inside a crop need no other method, only less work. Places of a map
that see equal windows have equal crops, and are bounded together like subproblems of one program.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from soundly.bounds.program import Affine, Convolution, Function, Map, Matrix, Program, Sparse, Step, Times, Variable
from soundly.graph.node import Shape

Array: TypeAlias = npt.NDArray[Any]

WORTH = 0.5
"""The most that a crop may cost of what the whole costs."""
PLACES = 4096
"""At most so many crops are made of one step: on larger maps places next to each other share one."""


@dataclass(frozen=True)
class Area:
    """The entries of a value `shape` = (C, *size) in a box: low <= place < high, all channels."""

    shape: Shape
    low: Shape
    high: Shape

    def __len__(self) -> int:
        return self.shape[0] * math.prod(self.extent)

    @property
    def extent(self) -> Shape:
        return tuple(b - a for a, b in zip(self.low, self.high, strict=True))

    def entries(self) -> Array:
        """Ascending."""
        axes = (np.arange(a, b) for a, b in zip((0, *self.low), (self.shape[0], *self.high), strict=True))
        return np.ravel_multi_index(np.ix_(*axes), self.shape).reshape(-1)


Some: TypeAlias = Area | Array
"""Entries of a value: an area of it, or their ascending positions."""


def entries_of(some: Some) -> Array:
    return some.entries() if isinstance(some, Area) else some


def _area(shape: Shape, some: Some) -> Area:
    """The smallest area around some entries."""
    if isinstance(some, Area) and some.shape == shape:
        return some
    entry = entries_of(some)
    if len(entry) == 0:
        return Area(shape, (0,) * (len(shape) - 1), (0,) * (len(shape) - 1))
    place = np.unravel_index(entry % math.prod(shape[1:]), shape[1:])
    return Area(shape, tuple(int(p.min()) for p in place), tuple(int(p.max()) + 1 for p in place))


def _joined(some: Some | None, other: Some) -> Some:
    if some is None or len(some) == 0:
        return other
    if len(other) == 0:
        return some
    if isinstance(some, Area) and isinstance(other, Area) and some.shape == other.shape:
        low, high = (tuple(map(f, x, y)) for f, x, y in ((min, some.low, other.low), (max, some.high, other.high)))
        return Area(some.shape, low, high)
    return np.union1d(entries_of(some), entries_of(other))


def _window(m: Convolution, area: Area) -> Area:
    """What of its input the entries of an area depend on."""
    low, high = [], []
    there = m.narrow if m.transposed else m.wide
    axes = zip(area.low, area.high, there[1:], m.stride, m.padding, m.dilation, m.weight.shape[2:], strict=True)
    for first, last, n, s, p, d, k in axes:
        reach = d * (k - 1)
        # Of a convolution, o reads o s - p + 0, d, ... reach; the adjoint turns that around.
        a, b = (-(-(first + p - reach) // s), (last - 1 + p) // s) if m.transposed else (
            first * s - p, (last - 1) * s - p + reach)  # fmt: skip
        a, b = max(a, 0), min(b + 1, n)
        low.append(min(a, n))
        high.append(max(min(a, n), b))
    if len(area) == 0 or any(a >= b for a, b in zip(low, high, strict=True)):
        return Area(there, (0,) * len(low), (0,) * len(low))
    return Area(there, tuple(low), tuple(high))


@dataclass(frozen=True, eq=False)
class Crop:
    """What some places of a step depend on, each on its own part of the program but all on equal ones.

    Attributes:
        program: that part, up to the step; what it does not depend on has size 0.
        index: by step, [places, n]: which entries of the whole program these are.
        floor: steps at which the part ends.
    """

    program: Program
    index: tuple[Tensor, ...]
    floor: frozenset[int]

    def take(self, j: int, v: Tensor, batch: Tensor, place: Tensor) -> Tensor:
        """Of numbers [batch, n] of step j those [pairs, m] of some subproblems at some places."""
        index = self.index[j][place]
        return v[0][index] if len(v) == 1 else v[batch[:, None], index]

    def spread(self, j: int, place: Tensor, a: Tensor, size: int) -> Tensor:
        """Coefficients [rows, m] of step j at some places, each where it belongs in the whole [rows, n]."""
        return a.new_zeros(len(a), size).scatter_(1, self.index[j][place], a)


class Crops:
    """The crops of one program."""

    def __init__(self, program: Program) -> None:
        self.steps = program.steps
        # Functions and products work entry by entry: what they read and what they give is cropped alike.
        self.kin = list(range(len(self.steps)))
        for j, step in enumerate(self.steps):
            if isinstance(step, (Function, Times)):
                alike = {self.kin[s] for s in (j, *step.sources)}
                self.kin = [min(alike) if k in alike else k for k in self.kin]
        self.place: list[Array | None] = []
        for step in self.steps:
            self.place.append(self._places(step))
        self.uniform = [self._is_uniform(step) for step in self.steps]
        self.sparse: dict[int, tuple[Array, Array, Array]] = {}
        self.found: dict[tuple[int, int], tuple[Any, list[Some]] | None] = {}
        self.members: dict[int, dict[int, Array]] = {}
        self.programs: dict[Any, tuple[Program, frozenset[int]]] = {}

    def _places(self, step: Step) -> Array | None:
        """[n]: the place of every entry in the map that a convolution made; None where there is no map."""
        if isinstance(step, (Function, Times)):
            return next((p for s in step.sources if (p := self.place[s]) is not None), None)
        for part, source in step.parts if isinstance(step, Affine) else ():
            if isinstance(part, Convolution):
                size = (part.wide if part.transposed else part.narrow)[1:]
                edge = math.ceil((math.prod(size) / PLACES) ** (1 / len(size)))
                at = np.indices(size).reshape(len(size), -1) // edge
                place = np.ravel_multi_index(tuple(at), size)
                return np.tile(place, step.size // len(place))
            below = self.place[source]
            if isinstance(part, Sparse) and below is not None and len(part.rows):
                first = np.searchsorted(part.rows.numpy(), np.arange(step.size)).clip(max=len(part.rows) - 1)
                return below[part.columns.numpy()[first]]
        return None

    @staticmethod
    def _is_uniform(step: Step) -> bool:
        """Whether a step's bias is the same everywhere in each channel."""
        if not isinstance(step, Affine):
            return True
        shapes = {m.wide if m.transposed else m.narrow for m, _ in step.parts if isinstance(m, Convolution)}
        if len(shapes) != 1:
            return False
        bias = step.bias.reshape(next(iter(shapes))[0], -1)
        return bool((bias == bias[:, :1]).all())

    def of(self, i: int, entry: Tensor) -> tuple[Tensor, list[tuple[Crop, Tensor, Tensor, Tensor]]]:
        """Crops for entries [k] of step i.

        Returns:
            which of the entries no crop is worth its while for; crops, each with which entries it is for, the place
            of each (a row of the crop's index) and its position in the cropped step.
        """
        place = self.place[i]
        if place is None:
            return torch.arange(len(entry)), []
        every = entry.numpy()
        places, inverse = np.unique(place[every], return_inverse=True)
        members: dict[Any, list[int]] = {}
        for number, p in enumerate(places.tolist()):
            if (i, p) not in self.found:
                self.found[i, p] = self._crop(i, self._members(i, place)[p])
            known = self.found[i, p]
            members.setdefault(None if known is None else known[0], []).append(number)
        rest, crops = np.empty(0, dtype=np.int64), list[tuple[Crop, Tensor, Tensor, Tensor]]()
        for key, numbers in members.items():
            row = np.full(len(places), -1)
            row[numbers] = np.arange(len(numbers))
            which = np.flatnonzero(row[inverse] >= 0)
            if key is None:
                rest = which
                continue
            index = self._index(i, places[numbers].tolist())
            program, floor = self.programs[key]
            at = row[inverse[which]]
            # Positions of the entries in the index of their place, which ascends.
            own = index[i]
            flat = own + np.arange(len(own))[:, None] * self.steps[i].size
            inner = np.searchsorted(flat.reshape(-1), every[which] + at * self.steps[i].size) - at * own.shape[1]
            crop = Crop(program, tuple(map(torch.from_numpy, index)), floor)
            crops.append((crop, torch.from_numpy(which), torch.from_numpy(at), torch.from_numpy(inner)))
        return torch.from_numpy(rest), crops

    def _members(self, i: int, place: Array) -> dict[int, Array]:
        """The entries at each place."""
        if i not in self.members:
            order = np.argsort(place, kind="stable")
            names, first = np.unique(place[order], return_index=True)
            self.members[i] = dict(zip(names.tolist(), np.split(order, first[1:]), strict=True))
        return self.members[i]

    def _index(self, i: int, places: Sequence[int]) -> list[Array]:
        """By step up to i, the entries [places, n] that each place needs."""
        known = [known for p in places if (known := self.found[i, p]) is not None]
        made: dict[int, Array] = {}
        for j in range(i + 1):
            if self.kin[j] not in made:
                made[self.kin[j]] = np.stack([entries_of(some[j]) for _, some in known])
        return [made[self.kin[j]] for j in range(i + 1)]

    def _crop(self, i: int, entry: Array) -> tuple[Any, list[Some]] | None:
        """What some entries of a step depend on: what tells whether another crop is equal, and the entries by step."""
        kept: dict[int, Some] = {self.kin[i]: entry}
        floor = frozenset(
            j for j, step in enumerate(self.steps[: i + 1])
            if isinstance(step, Affine) and any(isinstance(m, Matrix) for m, _ in step.parts)
        )  # fmt: skip
        if i in floor:
            return None
        size = -1
        while size != (size := sum(map(len, kept.values()))):
            for j in range(i, 0, -1):
                step, own = self.steps[j], kept.get(self.kin[j])
                if own is None or not isinstance(step, Affine) or j in floor:
                    continue
                for part, source in step.parts:
                    have = kept.get(self.kin[source])
                    own, kept[self.kin[source]] = self._reach(part, own, have)
                    own = kept[self.kin[j]] = _joined(kept.get(self.kin[j]), own)  # they may be kin
        some = [kept.get(self.kin[j], np.empty(0, dtype=np.int64)) for j in range(i + 1)]
        cost = whole = 0
        for j, step in enumerate(self.steps[: i + 1]):
            if isinstance(step, Affine) and j not in floor and len(some[j]):
                terms = sum(part.terms for part, _ in step.parts)
                cost, whole = cost + terms * len(some[j]), whole + terms * step.size
        if cost > WORTH * whole:
            return None
        index = tuple(map(entries_of, some))
        key: list[Any] = [i]
        for j, step in enumerate(self.steps[: i + 1]):
            key.append(len(index[j]))
            if isinstance(step, Affine) and len(index[j]) and j not in floor:
                if not self.uniform[j]:
                    key.append(step.bias.numpy()[index[j]].tobytes())
                for part, source in step.parts:
                    if isinstance(part, Convolution):
                        key.append(_moved(part, some[j], some[source]))
                    elif isinstance(part, Sparse):
                        key += [v.tobytes() for v in self._restricted(part, index[j], index[source])]
        name = tuple(key)
        if name not in self.programs:
            self.programs[name] = self._program(i, some, index, floor), floor
        return name, some

    def _reach(self, part: Map, own: Some, have: Some | None) -> tuple[Some, Some]:
        """For entries of a map's result those that it can be cropped to, and what it reads for them, besides what it
        is known to read."""
        if isinstance(part, Convolution):
            there, here = (part.narrow, part.wide) if part.transposed else (part.wide, part.narrow)
            own = _area(here, own)
            return own, _area(there, _joined(have, _window(part, own)))
        assert isinstance(part, Sparse)
        return own, _joined(have, np.unique(self._rows(part, entries_of(own))[1]))

    def _rows(self, part: Sparse, entry: Array) -> tuple[Array, Array, Array]:
        """The coefficients of some entries: which one [t], column, value."""
        if id(part) not in self.sparse:
            self.sparse[id(part)] = part.rows.numpy(), part.columns.numpy(), part.values.numpy()
        rows, columns, values = self.sparse[id(part)]
        first, last = np.searchsorted(rows, entry), np.searchsorted(rows, entry, side="right")
        which = np.repeat(np.arange(len(entry)), last - first)
        at = np.arange(len(which)) + np.repeat(first - (np.cumsum(last - first) - (last - first)), last - first)
        return which, columns[at], values[at]

    def _restricted(self, part: Sparse, own: Array, read: Array) -> tuple[Array, Array, Array]:
        rows, columns, values = self._rows(part, own)
        return rows, np.searchsorted(read, columns), values

    def _program(self, i: int, some: Sequence[Some], index: Sequence[Array], floor: Iterable[int]) -> Program:
        steps: list[Step] = []
        for j, step in enumerate(self.steps[: i + 1]):
            size = len(index[j])
            match step:
                case Variable():
                    steps.append(Variable(size))
                case Function() | Times():
                    steps.append(replace(step, size=size))
                case Affine(parts, bias):
                    cropped: list[tuple[Map, int]] = []
                    for part, source in parts if size and j not in floor else ():
                        if len(index[source]) == 0:  # it sees padding only
                            continue
                        if isinstance(part, Convolution):
                            wide, narrow, padding = _moved(part, some[j], some[source])
                            cropped.append((replace(part, wide=wide, narrow=narrow, padding=padding), source))
                        elif isinstance(part, Sparse):
                            rows, columns, values = map(
                                torch.from_numpy, self._restricted(part, index[j], index[source])
                            )
                            cropped.append((Sparse(rows, columns, values, (size, len(index[source]))), source))
                    steps.append(Affine(tuple(cropped), bias[torch.from_numpy(index[j])]))
        return Program(tuple(steps))


def _moved(m: Convolution, own: Some, read: Some) -> tuple[Shape, Shape, Shape]:
    """A convolution's sizes and padding from one area to another."""
    wide, narrow = (_area(m.wide, own), _area(m.narrow, read)) if m.transposed else (
        _area(m.wide, read), _area(m.narrow, own))  # fmt: skip
    # Narrow place o meets wide place o s - p + k d, both counted from their areas' corners.
    padding = (p + w - o * s for p, w, o, s in zip(m.padding, wide.low, narrow.low, m.stride, strict=True))
    return (wide.shape[0], *wide.extent), (narrow.shape[0], *narrow.extent), tuple(padding)
