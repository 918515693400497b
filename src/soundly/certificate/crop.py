"""Crops: what a few entries of a step depend on, cut out of a program as a smaller one.

A neuron of a convolutional layer depends on a small window of each layer below it, and a convolution between windows is
a convolution again. Entries at one place of a map share their windows; places whose windows are cut out alike have one
small program, and are bounded together like the nodes of a split tree. Windows are found by following which entries
read which; that a small program computes just the entries that it says is then established from what was found alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from soundly.certificate.ball import Ball
from soundly.certificate.bounding import Frame, Pieces, View
from soundly.certificate.program import (
    Affine,
    Apply,
    Convolution,
    Map,
    Matrix,
    Program,
    Sparse,
    Step,
    Times,
    Variable,
    nonlinear_sources,
)  # fmt: skip

Array = npt.NDArray[Any]

TOGETHER = 2**21  # entries of all windows of a step at once
PLACES = 4096  # on larger maps neighbours share a window
SAVING = 2  # a crop must be cheaper than the whole by this factor
NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Crop:
    """A small program for some places, and by step which entries [places, n] of the whole program its entries are.

    It ends at the steps of `floor`, whose entries are left to the whole program.
    """

    program: Program
    index: tuple[Array, ...]
    floor: frozenset[int]

    def view(self, whole: View, node: Array, place: Array) -> View:
        """What a pass over the small program needs to know, for pairs of nodes and places."""

        def some(j: int, x: Array) -> Array:
            entry = self.index[j][place]
            return x[0][entry] if len(x) == 1 else x[node[:, None], entry]

        frame, relaxed = Frame(), dict[int, Pieces]()
        for j in range(len(self.index)):
            cost = whole.frame.cost[j]
            frame.lower.append(some(j, whole.frame.lower[j]))
            frame.upper.append(some(j, whole.frame.upper[j]))
            frame.cost.append(None if cost is None else some(j, cost))
            if j in whole.pieces and self.index[j].shape[1]:
                p = whole.pieces[j]
                below, above = (tuple(some(j, x) for x in side) for side in (p.below, p.above))
                offsets = (None if x is None else some(j, x) for x in (p.below_offset, p.above_offset))
                low, high = offsets
                relaxed[j] = Pieces(below, low, above, high, some(j, p.cost))
        ball = whole.ball
        if ball is not None:  # whose points have entries in the ball of these entries
            ball = Ball(some(0, ball.centre), some(0, ball.radius), ball.norm)
        return View(self.program, frame, relaxed, some(0, whole.lower), some(0, whole.upper), ball=ball)

    def spread(self, j: int, a: Array, place: Array, size: int) -> Array:
        """Coefficients of step j [R, n], each where it belongs in the whole."""
        result = np.zeros((len(a), size))
        np.put_along_axis(result, self.index[j][place], a, axis=1)
        return result


@dataclass(frozen=True, eq=False)
class _Group:
    """Places, and by kin the entries [places, n] that each of them needs, ascending."""

    places: Array
    kept: dict[int, Array]

    def take(self, rows: Array) -> "_Group":
        return _Group(self.places[rows], {k: v[rows] for k, v in self.kept.items()})


@dataclass(frozen=True, eq=False)
class Crops:
    """Finds the crops of a program; those found once are remembered."""

    program: Program
    programs: dict[tuple[Any, ...], Program | None]

    @cached_property
    def kin(self) -> list[int]:
        """For every step the first of those that are computed entry by entry from each other."""
        kin = list(range(len(self.program.steps)))
        for j, step in enumerate(self.program.steps):
            alike = {kin[s] for s in (j, *nonlinear_sources(step))}
            kin = [min(alike) if k in alike else k for k in kin]
        return kin

    @cached_property
    def floor(self) -> frozenset[int]:
        """Steps that read a matrix product: of everything."""
        return frozenset(
            j for j, step in enumerate(self.program.steps)
            if isinstance(step, Affine) and any(isinstance(part, Matrix) for part, _ in step.parts)
        )  # fmt: skip

    @cached_property
    def place(self) -> tuple[Array | None, ...]:
        """For every step where in the last convolution's map each entry lies; None where there was none."""
        found: list[Array | None] = []
        for step in self.program.steps:
            here: Array | None = None
            if isinstance(step, Affine):
                for part, source in step.parts:
                    below = found[source]
                    if isinstance(part, Convolution):
                        area = (part.wide if part.transposed else part.narrow)[1:]
                        edge = math.ceil((math.prod(area) / PLACES) ** (1 / len(area)))
                        corner = np.stack(np.unravel_index(np.arange(step.size) % math.prod(area), area)) // edge
                        here = np.ravel_multi_index(tuple(corner), area)
                    elif isinstance(part, Sparse) and below is not None and len(part.rows):
                        here = np.zeros(step.size, dtype=np.int64)
                        here[part.rows] = below[part.columns]
                    if here is not None:
                        break
            else:
                here = next((found[s] for s in nonlinear_sources(step) if found[s] is not None), None)
            found.append(here)
        return tuple(found)

    def of(self, i: int, entry: Array) -> Iterator[tuple[Crop | None, Array, Array, Array]]:
        """Parts of some entries [k] of step i: the crop for each, None for the whole program; which ones they are, the
        row of their place in the crop's index, and their position in the small step."""
        where = self.place[i]
        if where is None or i in self.floor:
            yield None, np.arange(len(entry)), NOTHING, NOTHING
            return
        order = np.argsort(where, kind="stable")
        places = np.unique(where[entry])
        first, last = (np.searchsorted(where[order], places, side) for side in ("left", "right"))
        whole = []
        for count in np.unique(last - first).tolist():
            alike = np.flatnonzero(last - first == count)
            entries = order[first[alike, None] + np.arange(count)]
            size = max(1, TOGETHER // self.widest(i, entries[:1]))
            for begin in range(0, len(alike), size):
                some = alike[begin : begin + size]
                for group in self._windows(i, _Group(places[some], {self.kin[i]: entries[begin : begin + size]})):
                    for program, row, index in self._programs(i, group):
                        member = np.isin(where[entry], group.places[row]).nonzero()[0]
                        at = np.searchsorted(group.places[row], where[entry[member]])
                        if program is None:
                            whole.append(member)
                        else:
                            inner = (index[i][at] < entry[member][:, None]).sum(axis=1)
                            yield Crop(program, index, self.floor), member, at, inner
        if whole:
            yield None, np.concatenate(whole), NOTHING, NOTHING

    def widest(self, i: int, entries: Array) -> int:
        """How many entries of a step some place needs at most, by its own windows."""
        groups = self._windows(i, _Group(np.zeros(1, dtype=np.int64), {self.kin[i]: entries}))
        return max(v.shape[1] for group in groups for v in group.kept.values())

    def _windows(self, i: int, group: _Group) -> list[_Group]:
        """Follows what reads what; groups are divided where that does not go on alike."""
        groups = [group]
        for j in range(i, 0, -1):
            step = self.program.steps[j]
            if isinstance(step, Affine) and j not in self.floor:
                for part, source in step.parts:
                    groups = [new for old in groups if self.kin[j] in old.kept for new in
                              self._read(old, part, self.kin[j], self.kin[source])] + [
                        old for old in groups if self.kin[j] not in old.kept]  # fmt: skip
        return groups

    def _read(self, group: _Group, part: Map, j: int, source: int) -> Iterator[_Group]:
        own, have = group.kept[j], group.kept.get(source, np.zeros((len(group.places), 0), dtype=np.int64))
        if isinstance(part, Convolution):
            here, there = (part.wide, part.narrow) if part.transposed else (part.narrow, part.wide)
            low, high = _box(own, here)
            first, last = _seen(part, low, high)
            if have.shape[1]:
                others = _box(have, there)
                first, last = np.minimum(first, others[0]), np.maximum(last, others[1])
            for rows in _alike(np.concatenate([high - low, last - first], axis=1)):
                areas = (_entries(here, low[rows], high[rows]), _entries(there, first[rows], last[rows]))
                yield _Group(group.places[rows], {k: v[rows] for k, v in group.kept.items()} | {
                    j: areas[0], source: areas[1]})  # fmt: skip
            return
        assert isinstance(part, Sparse)
        count, _, column, _ = part.coefficients(own)
        for rows in _alike(count):
            length = int(count[rows[0]].sum())
            begin = np.cumsum(count.sum(axis=1)) - count.sum(axis=1)
            read = np.concatenate([column[begin[rows, None] + np.arange(length)], have[rows]], axis=1)
            read = np.sort(read, axis=1)
            new = np.ones(read.shape, bool)
            new[:, 1:] = read[:, 1:] > read[:, :-1]
            for same in _alike(new.sum(axis=1)[:, None]):
                some = group.take(rows[same])
                some.kept[source] = read[same][new[same]].reshape(len(same), -1)
                yield some

    def _programs(self, i: int, group: _Group) -> Iterator[tuple[Program | None, Array, tuple[Array, ...]]]:
        """Divides a group into places with one small program; None where there is none, or it saves too little."""
        none = np.zeros((len(group.places), 0), dtype=np.int64)
        index = [group.kept.get(self.kin[j], none) for j in range(i + 1)]
        if not self._saves(index):
            yield None, np.arange(len(group.places)), tuple(index)
            return
        facts = [none]
        for j, step in enumerate(self.program.steps[: i + 1]):
            if isinstance(step, Affine) and index[j].shape[1] and j not in self.floor:
                facts.append(step.bias[index[j]])
                facts.append(step.bias_error[index[j]])
                for part, source in step.parts:
                    facts.append(_facts(part, index[j], index[source]))
        facts = [np.ascontiguousarray(f).view(np.int64) for f in facts]
        for rows in _alike(np.concatenate(facts, axis=1)):
            one = [v[rows[:1]] for v in index]
            key = (i, *(v.shape[1] for v in index), *(f[rows[0]].tobytes() for f in facts))
            if key not in self.programs:
                self.programs[key] = self._small(one)
            yield self.programs[key], rows, tuple(v[rows] for v in index)

    def _saves(self, index: Sequence[Array]) -> bool:
        cost = whole = 0
        for j, step in enumerate(self.program.steps[: len(index)]):
            if isinstance(step, Affine) and j not in self.floor and index[j].shape[1]:
                terms = sum(part.terms for part, _ in step.parts)
                cost, whole = cost + terms * index[j].shape[1], whole + terms * step.size
        return SAVING * cost <= whole

    def _small(self, index: Sequence[Array]) -> Program | None:
        """The program of one place, whose entries are index [1, n]; None if they do not belong together."""
        steps: list[Step] = []
        for j, step in enumerate(self.program.steps[: len(index)]):
            size = index[j].shape[1]
            if isinstance(step, Variable):
                steps.append(Variable(size))
            elif isinstance(step, (Apply, Times)):
                steps.append(replace(step, size=size))
            else:
                parts: list[tuple[Map, int]] = []
                for part, source in step.parts if size and j not in self.floor else ():
                    cut = _cut(part, index[j], index[source])
                    if cut is None:
                        return None
                    parts.append((cut, source))
                at = index[j][0]
                steps.append(Affine(tuple(parts), step.bias[at], step.weight_error, step.bias_error[at]))
        return Program(tuple(steps), NOTHING)


def _alike(key: Array) -> list[Array]:
    """Positions of equal rows."""
    if key.shape[1] == 0 or (key == key[:1]).all():
        return [np.arange(len(key))]
    _, number = np.unique(key, axis=0, return_inverse=True)
    number = number.reshape(-1)
    return [np.flatnonzero(number == n) for n in range(int(number.max()) + 1)]


def _box(entry: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """The corners [places, dimensions] of the smallest boxes around entries [places, n] in all channels."""
    if entry.shape[1] == 0:
        return (np.zeros((len(entry), len(shape) - 1), dtype=np.int64),) * 2
    at = np.stack(np.unravel_index(entry % math.prod(shape[1:]), shape[1:]), axis=-1)
    return at.min(axis=1), at.max(axis=1) + 1


def _entries(shape: tuple[int, ...], low: Array, high: Array) -> Array:
    """The entries [places, n] of boxes of one size in all channels, ascending."""
    extent = (high - low)[0].tolist()
    steps = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    inside = sum(np.ix_(*(np.arange(n) * s for n, s in zip((shape[0], *extent), steps, strict=True))))
    return np.reshape(inside, -1) + (low @ np.array(steps[1:]))[:, None]


def _seen(part: Convolution, low: Array, high: Array) -> tuple[Array, Array]:
    """Of boxes of what a convolution writes the boxes of what it reads."""
    there = np.array((part.narrow if part.transposed else part.wide)[1:])
    s, p, d = (np.array(v) for v in (part.stride, part.padding, part.dilation))
    reach = d * (np.array(part.weight.shape[2:]) - 1)
    if part.transposed:
        first, last = -((reach - low - p) // s), (high - 1 + p) // s + 1
    else:
        first, last = low * s - p, (high - 1) * s - p + reach + 1
    first = np.clip(first, 0, there)
    last = np.maximum(np.clip(last, 0, there), first)
    empty = ((high <= low) | (last <= first)).any(axis=1)[:, None]
    return np.where(empty, 0, first), np.where(empty, 0, last)


def _facts(part: Map, own: Array, read: Array) -> Array:
    """What tells apart how a map is cut out at places: two cuts are equal where this [places, facts] is."""
    if isinstance(part, Convolution):
        here, there = (part.wide, part.narrow) if part.transposed else (part.narrow, part.wide)
        (low, high), (first, last) = _box(own, here), _box(read, there)
        narrow, wide = (first, low) if part.transposed else (low, first)
        return np.concatenate([high - low, last - first, wide - narrow * np.array(part.stride)], axis=1)
    assert isinstance(part, Sparse)
    count, place, column, value = part.coefficients(own)
    if (count.sum(axis=1) != count[0].sum()).any():  # never equal
        return np.repeat(np.arange(len(own))[:, None], 1, axis=1)
    rank = (read[place] < column[:, None]).sum(axis=1) if read.shape[1] < 64 else _rank(read, place, column)
    return np.concatenate(
        [count, rank.reshape(len(own), -1), value.view(np.int64).reshape(len(own), -1)], axis=1
    )  # fmt: skip


def _rank(read: Array, place: Array, column: Array) -> Array:
    """How many of the entries of its place each column exceeds."""
    far = int(max(read.max(), column.max())) + 1
    flat = (read + far * np.arange(len(read))[:, None]).reshape(-1)
    return np.searchsorted(flat, column + far * place) - place * read.shape[1]


def _cut(part: Map, own: Array, read: Array) -> Map | None:
    """The map from entries `read` [1, m] to entries `own` [1, n]; None if there is none of that kind."""
    if isinstance(part, Convolution):
        here, there = (part.wide, part.narrow) if part.transposed else (part.narrow, part.wide)
        (low, high), (first, last) = _box(own, here), _box(read, there)
        seen = _seen(part, low, high)
        fits = np.array_equal(_entries(here, low, high), own) and np.array_equal(_entries(there, first, last), read)
        if not fits or not read.size or (seen[0] < first).any() or (seen[1] > last).any():
            return None
        narrow, wide = ((first, last), (low, high)) if part.transposed else ((low, high), (first, last))
        padding = np.array(part.padding) + wide[0][0] - narrow[0][0] * np.array(part.stride)
        sizes = [(c, *(b - a)[0].tolist()) for c, (a, b) in ((part.wide[0], wide), (part.narrow[0], narrow))]
        return replace(part, wide=sizes[0], narrow=sizes[1], padding=tuple(padding.tolist()))
    assert isinstance(part, Sparse)
    count, _, column, value = part.coefficients(own)
    at = np.searchsorted(read[0], column)
    if len(column) and (not read.size or (read[0][np.minimum(at, read.size - 1)] != column).any()):
        return None
    return Sparse(np.repeat(np.arange(own.shape[1]), count[0]), at, value, (own.shape[1], read.shape[1]))
