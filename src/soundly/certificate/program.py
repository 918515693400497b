"""A network as a flat program, as a certificate holds it: affine maps, elementwise functions and products.

The checker's own, in numpy: it shares nothing with the program that the prover bounds. Every map knows how many terms
are added up in it, which is what its rounding depends on, and how much room a row takes on its way through.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from soundly.certificate.ball import Ball
from soundly.certificate.functions import Function

Array = npt.NDArray[Any]

NUMBERS, MOST = 2**17, 2**24  # of coefficients at once: what fits a cache, but not too few rows
ALL = (slice(None), slice(None))
SYMBOLS = 32  # products are bounded together where those that their factors come from have at most so many entries


class Map(Protocol):
    """A linear map of vectors [..., n] to [..., m]."""

    @property
    def size(self) -> tuple[int, int]:
        """m, n."""

    @property
    def terms(self) -> int:
        """How many products are summed up to one entry at most, here or in the transposed map."""

    @property
    def room(self) -> int:
        """How many numbers a row needs on the way."""

    def apply(self, x: Array) -> Array: ...

    def pull(self, a: Array) -> Array: ...

    def rows_of(self, entry: Array) -> Array:
        """Coefficients of some entries of the result [k, n]; an array of its own."""

    @property
    def absolute(self) -> "Map": ...


@dataclass(frozen=True, eq=False)
class Matrix:
    """Each of the blocks of x times the transpose of weight [m, n]."""

    weight: Array
    blocks: int

    @property
    def size(self) -> tuple[int, int]:
        return self.blocks * self.weight.shape[0], self.blocks * self.weight.shape[1]

    @property
    def terms(self) -> int:
        return max(self.weight.shape)

    @property
    def room(self) -> int:
        return max(self.size)

    def apply(self, x: Array) -> Array:
        return self._blockwise(x, self.weight.T)

    def pull(self, a: Array) -> Array:
        return self._blockwise(a, self.weight)

    def rows_of(self, entry: Array) -> Array:
        (m, n), k = self.weight.shape, np.arange(len(entry))
        if self.blocks == 1:
            return self.weight[entry]
        rows = np.zeros((len(entry), self.blocks, n))
        rows[k, entry // m] = self.weight[entry % m]
        return rows.reshape(len(entry), -1)

    def _blockwise(self, x: Array, weight: Array) -> Array:
        y: Array = x.reshape(len(x) * self.blocks, -1) @ weight
        return y.reshape(len(x), -1)

    @cached_property
    def absolute(self) -> "Matrix":
        return replace(self, weight=np.abs(self.weight))


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution from `wide` (C, *in) to `narrow` (O, *out) with weight [O, C / groups, *kernel], or its adjoint.

    padding: zeros before the first entries; where it is negative, entries are left out.
    """

    weight: Array
    wide: tuple[int, ...]
    narrow: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool

    @property
    def size(self) -> tuple[int, int]:
        wide, narrow = math.prod(self.wide), math.prod(self.narrow)
        return (wide, narrow) if self.transposed else (narrow, wide)

    @property
    def terms(self) -> int:
        return max(len(self.weight) // self.groups, self.weight.shape[1]) * math.prod(self.weight.shape[2:])

    @cached_property
    def padded(self) -> tuple[int, ...]:
        """How long each axis is with zeros before and after; those after reach as far as `narrow` needs."""
        axes = zip(
            self.wide[1:], self.narrow[1:], self.stride, self.padding, self.dilation, self.weight.shape[2:], strict=True
        )
        return tuple(max(n + p, (out - 1) * s + d * (k - 1) + 1) for n, out, s, p, d, k in axes)

    @property
    def room(self) -> int:
        return 2 * max(self.wide[0] * math.prod(self.padded), *self.size)

    def apply(self, x: Array) -> Array:
        return self._widen(x) if self.transposed else self._narrow(x)

    def pull(self, a: Array) -> Array:
        return self._narrow(a) if self.transposed else self._widen(a)

    def rows_of(self, entry: Array) -> Array:
        """Written kernel position by kernel position: what an entry reads is a small part of the whole."""
        here, there = (self.wide, self.narrow) if self.transposed else (self.narrow, self.wide)
        outputs, inputs = len(self.weight) // self.groups, self.weight.shape[1]
        channel, *place = np.unravel_index(entry, here)
        rows = np.zeros((len(entry), there[0], math.prod(there[1:])))
        for position in np.ndindex(self.weight.shape[2:]):
            met, at = np.ones(len(entry), bool), np.zeros(len(entry), int)
            for j, (k, d, s, p) in enumerate(zip(position, self.dilation, self.stride, self.padding, strict=True)):
                if self.transposed:
                    where, left = np.divmod(place[j] + p - k * d, s)
                    met &= left == 0
                else:
                    where = place[j] * s - p + k * d
                met &= (where >= 0) & (where < there[j + 1])
                at = at * there[j + 1] + where
            some, weight = np.flatnonzero(met), self.weight[ALL + position]
            if self.transposed:
                group = channel[some] // inputs
                values = weight.reshape(self.groups, outputs, inputs)[group, :, channel[some] % inputs]
                others = group[:, None] * outputs + np.arange(outputs)
            else:
                values = weight[channel[some]]
                others = (channel[some] // outputs)[:, None] * inputs + np.arange(inputs)
            rows[some[:, None], others, at[some][:, None]] = values
        return rows.reshape(len(entry), -1)

    def _positions(self) -> Iterator[tuple[tuple[slice, ...], Array]]:
        """For every position in the kernel: what it meets of the padded input, and its weights [g, O / g, C / g]."""
        for position in np.ndindex(self.weight.shape[2:]):
            met = tuple(
                slice(k * d, k * d + (out - 1) * s + 1, s)
                for k, d, s, out in zip(position, self.dilation, self.stride, self.narrow[1:], strict=True)
            )
            weight = self.weight[ALL + position]
            yield met, np.ascontiguousarray(weight.reshape(self.groups, -1, weight.shape[1]))  # or BLAS is not used

    def _narrow(self, x: Array) -> Array:
        rows, channels, (inner, used) = len(x), self.wide[0], self._inner
        padded = np.zeros((rows, channels, *self.padded))
        padded[ALL + inner] = x.reshape(rows, *self.wide)[ALL + used]
        y = np.zeros((rows, self.groups, len(self.weight) // self.groups, math.prod(self.narrow[1:])))
        for met, weight in self._positions():
            part = padded[ALL + met].reshape(rows, self.groups, weight.shape[2], -1)
            y += weight @ part
        return y.reshape(rows, -1)

    def _widen(self, a: Array) -> Array:
        rows, (inner, used), area = len(a), self._inner, self.narrow[1:]
        # Places first, then rows, channels last: one product for all of them, and whole blocks are added up.
        a = a.reshape(rows, self.groups, len(self.weight) // self.groups, -1).transpose(1, 3, 0, 2)
        a = np.ascontiguousarray(a).reshape(self.groups, -1, a.shape[3])
        padded = np.zeros((self.groups, *self.padded, rows, self.weight.shape[1]))
        for met, weight in self._positions():
            at = slice(None), *met
            padded[at] += (a @ weight).reshape(self.groups, *area, rows, -1)
        result = np.zeros((rows, self.groups, self.weight.shape[1], *self.wide[1:]))
        to, of = (*ALL, slice(None), *used), (slice(None), *inner)
        result[to] = np.moveaxis(padded[of], (-2, 0, -1), (0, 1, 2))
        return result.reshape(rows, -1)

    @cached_property
    def _inner(self) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the input lies within the padded one, and what of it does."""
        axes = list(zip(self.padding, self.wide[1:], strict=True))
        return tuple(slice(max(p, 0), p + n) for p, n in axes), tuple(slice(max(-p, 0), n) for p, n in axes)

    @cached_property
    def absolute(self) -> "Convolution":
        return replace(self, weight=np.abs(self.weight))


@dataclass(frozen=True, eq=False)
class Sparse:
    """y[rows[k]] += values[k] * x[columns[k]]."""

    rows: Array
    columns: Array
    values: Array
    size: tuple[int, int]

    @cached_property
    def terms(self) -> int:
        return max((int(np.bincount(side).max()) for side in (self.rows, self.columns) if len(side)), default=1)

    def coefficients(self, entry: Array) -> tuple[Array, Array, Array, Array]:
        """For entries [p, n] of the result how many coefficients each has; of these, in turn, the p, column, value."""
        first, last = (np.searchsorted(self.rows[self._by_row], entry, side) for side in ("left", "right"))
        count = (last - first).reshape(-1)
        at = np.arange(count.sum()) + np.repeat(first.reshape(-1) - (np.cumsum(count) - count), count)
        at, of = self._by_row[at], np.repeat(np.arange(len(entry)), (last - first).sum(axis=1))
        return last - first, of, self.columns[at], self.values[at]

    @property
    def room(self) -> int:
        return max(len(self.values), *self.size)

    @cached_property
    def _dense(self) -> Array | None:
        if self.size[0] * self.size[1] > 2**17:
            return None
        dense = np.zeros(self.size)
        dense[self.rows, self.columns] = self.values
        return dense

    def apply(self, x: Array) -> Array:
        if self._dense is not None:
            return x @ self._dense.T
        return self._sum(x, self._by_row, self.rows, self.columns, self.size[0])

    def pull(self, a: Array) -> Array:
        if self._dense is not None:
            return a @ self._dense
        return self._sum(a, self._by_column, self.columns, self.rows, self.size[1])

    def rows_of(self, entry: Array) -> Array:
        _, k, column, value = self.coefficients(entry[:, None])
        rows = np.zeros((len(entry), self.size[1]))
        rows[k, column] = value
        return rows

    @cached_property
    def selects(self) -> bool:
        """Whether every entry of the result is one entry, scaled."""
        return len(self.rows) == self.size[0] == len(np.unique(self.rows))

    @cached_property
    def _by_row(self) -> Array:
        return np.argsort(self.rows, kind="stable")

    @cached_property
    def _by_column(self) -> Array:
        return np.argsort(self.columns, kind="stable")

    def _sum(self, x: Array, order: Array, to: Array, of: Array, size: int) -> Array:
        y = np.zeros((len(x), size))
        if len(order):
            to = to[order]
            first = np.flatnonzero(np.r_[True, to[1:] != to[:-1]])
            y[:, to[first]] = np.add.reduceat(x[:, of[order]] * self.values[order], first, axis=1)
        return y

    @cached_property
    def absolute(self) -> "Sparse":
        return replace(self, values=np.abs(self.values))


@dataclass(frozen=True)
class Variable:
    size: int


@dataclass(frozen=True, eq=False)
class Affine:
    """Maps of earlier steps, added up, plus a bias; the true weights and bias may differ from these."""

    parts: tuple[tuple[Map, int], ...]
    bias: Array
    weight_error: float
    bias_error: Array

    @property
    def size(self) -> int:
        return len(self.bias)


@dataclass(frozen=True)
class Apply:
    """A function of each entry."""

    source: int
    function: Function
    size: int


@dataclass(frozen=True)
class Times:
    left: int
    right: int
    size: int


Step: TypeAlias = Variable | Affine | Apply | Times


@dataclass(frozen=True)
class Together:
    """The products that nothing but affine steps reads, the affine steps behind their factors, in order, and the other
    steps that these begin with; products themselves, functions and the input."""

    products: frozenset[int]
    affine: tuple[int, ...]
    sources: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """Steps in order of evaluation: the input first, the outputs last.

    slots: the places of slopes in a stored row: 2 * the number of a neuron + its side, ascending or not.
    ball: where all inputs lie besides their boxes.
    """

    steps: tuple[Step, ...]
    slots: Array
    ball: Ball | None = None

    @cached_property
    def offsets(self) -> Array:
        """Where each step's neurons begin, and how many there are."""
        return np.cumsum([0, *(step.size for step in self.steps)])

    @cached_property
    def bounded(self) -> tuple[int, ...]:
        """The steps whose intervals matter: those that a function or a product reads."""
        read = [s for step in self.steps for s in nonlinear_sources(step)]
        return tuple(sorted(set(read)))

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """For every step which ones read it."""
        found: list[list[int]] = [[] for _ in self.steps]
        for j, step in enumerate(self.steps):
            for source in {s for _, s in step.parts} if isinstance(step, Affine) else set(nonlinear_sources(step)):
                found[source].append(j)
        return tuple(map(tuple, found))

    def copied(self, i: int) -> Sparse | None:
        """The map of step i if every entry of it is one entry of another step, scaled and shifted."""
        step = self.steps[i]
        if not isinstance(step, Affine) or len(step.parts) != 1:
            return None
        part = step.parts[0][0]
        return part if isinstance(part, Sparse) and part.selects else None

    @cached_property
    def matters(self) -> tuple[bool, ...]:
        """Of every step whether a function or product reads it, itself or a copy of it."""
        return self._matter(frozenset())

    def _matter(self, apart: frozenset[int]) -> tuple[bool, ...]:
        found = [False] * len(self.steps)
        for i in reversed(range(len(self.steps))):
            for j in self.readers[i]:
                if isinstance(self.steps[j], Affine):
                    found[i] |= found[j] and self.copied(j) is not None
                else:
                    found[i] |= j not in apart
        return tuple(found)

    @cached_property
    def _ends(self) -> frozenset[int]:
        """The steps that nothing but affine steps reads, directly and further on."""
        ends: set[int] = set()
        for i in reversed(range(len(self.steps))):
            if all(j in ends and isinstance(self.steps[j], Affine) for j in self.readers[i]):
                ends.add(i)
        return frozenset(ends)

    @cached_property
    def absolute(self) -> dict[int, float]:
        """The functions k |v| that nothing but affine steps reads, with their k."""
        found = {}
        for i in sorted(self._ends):
            step = self.steps[i]
            kink = step.function.kink if isinstance(step, Apply) else None
            if kink is not None and kink[1] != 0 and kink[0] == -kink[1]:
                found[i] = kink[1]
        return found

    @cached_property
    def together(self) -> Together | None:
        """The products that may be bounded together; None if there are none, or their factors come from too many."""
        products = frozenset(i for i in self._ends if isinstance(self.steps[i], Times))
        affine, sources = set[int](), set[int]()
        below = {source for i in products for source in nonlinear_sources(self.steps[i])}
        while below:
            i = below.pop()
            step = self.steps[i]
            if isinstance(step, Affine):
                affine.add(i)
                below |= {source for _, source in step.parts} - affine
            else:
                sources.add(i)
        if not products or sum(self.steps[i].size for i in sources if i) > SYMBOLS:
            return None
        return Together(products, tuple(sorted(affine)), tuple(sorted(sources)))

    @cached_property
    def exact(self) -> tuple[bool, ...]:
        """Of every step whether its interval from those it reads is its range: one map of the box's own entries."""
        found = [isinstance(step, Variable) for step in self.steps]
        for i, step in enumerate(self.steps):
            if self.ball is None and isinstance(step, Affine) and len(step.parts) == 1:
                source, copy = step.parts[0][1], self.copied(step.parts[0][1])
                distinct = copy is not None and len(np.unique(copy.columns)) == len(copy.columns)
                found[i] = source == 0 or (found[source] and distinct)
        return tuple(found)

    @cached_property
    def parted(self) -> tuple[frozenset[float], ...]:
        """Of every step the points at which a split parts the pieces of the functions that read it.

        Some function jumps there, and all have the value of the piece on the same side.
        """
        found = []
        for readers in self.readers:
            functions = [step.function for j in readers if isinstance(step := self.steps[j], Apply)]
            breaks = {t for f in functions for t in f.breaks}
            found.append(frozenset(t for t in breaks if len(set.intersection(*(f.sides(t) for f in functions))) == 1))
        return tuple(found)

    @cached_property
    def tightened(self) -> tuple[bool, ...]:
        """Of every step whether backward passes may make its intervals narrower and that matters.

        Not so for what is known exactly, nor for copies, which are bounded where they come from.
        """
        return self._tightened(self.matters)

    @cached_property
    def tightened_before(self) -> tuple[bool, ...]:
        """The same where the last products are bounded together."""
        return self._tightened(self._matter(self.together.products if self.together else frozenset()))

    def _tightened(self, matters: tuple[bool, ...]) -> tuple[bool, ...]:
        return tuple(matters[i] and not self.exact[i] and self.copied(i) is None for i in range(len(self.steps)))

    @cached_property
    def contributions(self) -> int:
        """How many terms are added up to one coefficient at most, besides those inside a map."""
        count = np.full(len(self.steps), 4)
        for step in self.steps:
            for source in [s for _, s in step.parts] if isinstance(step, Affine) else nonlinear_sources(step):
                count[source] += 1
        return int(count.max())

    @cached_property
    def room(self) -> int:
        """How many numbers a row needs."""
        maps = [part.room for step in self.steps if isinstance(step, Affine) for part, _ in step.parts]
        return max(*(step.size for step in self.steps), *maps, 1)

    @property
    def rows_at_once(self) -> int:
        return max(1, NUMBERS // self.room, min(64, MOST // self.room))

    @property
    def rows_together(self) -> int:
        """As many rows as are carried at once through a small program: few products take as long as they are called."""
        return max(64, 8 * NUMBERS // self.room)

    @cached_property
    def _placed(self) -> dict[int, list[tuple[Array, Array]]]:
        """For every function and product, per side: entries that have a stored slope, and where."""
        found = {}
        for i, step in enumerate(self.steps):
            if isinstance(step, (Apply, Times)):
                sides = []
                for side in (0, 1):
                    neuron = self.slots // 2 - self.offsets[i]
                    at = np.flatnonzero((neuron >= 0) & (neuron < step.size) & (self.slots % 2 == side))
                    sides.append((neuron[at], at))
                found[i] = sides
        return found

    def has_slots(self, i: int) -> bool:
        """Whether any slope of step i can be stored."""
        return any(len(entry) for entry, _ in self._placed[i])

    def stored(self, i: int, slopes: Array | None, nodes: int) -> tuple[Array, Array]:
        """Stored slopes of step i [nodes, n], lower and upper, NaN where there are none."""
        result = np.full((2, nodes, self.steps[i].size), np.nan)
        if slopes is not None:
            for side, (entry, at) in enumerate(self._placed[i]):
                result[side][:, entry] = slopes[:, at]
        return result[0], result[1]


@dataclass(frozen=True, eq=False)
class Stored:
    """The slopes of a certificate [K, slots], and groups of them for single bounds.

    Entry e of group g, for e from start[g] to start[g + 1]: the bound key[e] = 2 * neuron + side (0 its lower, 1 its
    upper bound) is found with row[e] of the slopes. Keys ascend within a group.
    """

    slopes: Array
    start: Array
    key: Array
    row: Array

    def rows(self, group: Array, key: Array) -> Array:
        """For bounds [p] the rows of slopes that their groups have for them, or -1; group -1 has none."""
        found = np.full(len(key), -1)
        for g in np.unique(group[group >= 0]).tolist():
            first, last = self.start[g : g + 2]
            own = np.flatnonzero(group == g)
            at = np.minimum(first + np.searchsorted(self.key[first:last], key[own]), max(first, last - 1))
            if last > first:
                found[own] = np.where(self.key[at] == key[own], self.row[at], -1)
        return found

    def of(self, rows: Array) -> Array:
        return self.slopes[rows].astype(np.float64)


def nonlinear_sources(step: Step) -> tuple[int, ...]:
    match step:
        case Apply(source):
            return (source,)
        case Times(left, right):
            return left, right
    return ()
