"""Lemmas: bounds of single neurons over a case's box, each with a split tree of its own.

A refresh that has come to a neuron's step proves them from the intervals of the steps before, and narrows the neuron's
interval. A tree is replayed on the crop that the neuron depends on, where a pass costs little; leaves of neurons with
equal crops are bounded together. A lemma that is not proved narrows nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from soundly.certificate.bounding import Frame, Pieces, Splits, View, relax
from soundly.certificate.crop import Crops
from soundly.certificate.program import MOST, Apply, Program, Times, nonlinear_sources
from soundly.certificate.reading import Lemmas

Array = npt.NDArray[Any]

Fact = tuple[int, int, int, float]
"""Of a step an entry that is at least (side 0) or at most (1) some number."""


@dataclass(frozen=True, eq=False)
class _Leaf:
    """One leaf of the lemma at position `owner`: splits on the way (step, entry, at, sign, multiplier), and by step and
    side the stored slopes of some entries; entries of the program that it is replayed on."""

    owner: int
    splits: list[tuple[int, int, float, int, float]]
    slopes: list[tuple[int, int, Array, Array]]


@dataclass(eq=False)
class Narrowing:
    """Proves lemmas, each once.

    Attributes:
        limit: raises where there is no time left.
        proved: by number.
    """

    program: Program
    lemmas: Lemmas
    limit: Callable[[], None]
    proved: dict[int, bool] = field(default_factory=dict)

    def known(self, case: int) -> list[Fact]:
        """What is proved over a case's box."""
        return [self._fact(k) for k, proved in self.proved.items() if proved and self.lemmas.case[k] == case]

    def _fact(self, k: int) -> Fact:
        of = self.lemmas
        return int(of.step[k]), int(of.entry[k]), int(of.side[k]), float(of.value[k])

    def narrow(self, cases: Array, frame: Frame, i: int, crops: Crops) -> None:
        """Narrows the intervals of step i in a frame over the boxes of some cases [M]."""
        about = np.flatnonzero((self.lemmas.step == i) & np.isin(self.lemmas.case, cases))
        new = np.array([k for k in about.tolist() if k not in self.proved], int)
        if len(new):
            self._prove(new, (self.lemmas.case[new][:, None] == cases).argmax(axis=1), frame, i, crops)
        frame.lower[i], frame.upper[i] = frame.lower[i].copy(), frame.upper[i].copy()
        for k in about.tolist():
            if self.proved[k]:
                narrow(frame, cases == self.lemmas.case[k], self._fact(k))

    def _prove(self, new: Array, row: Array, frame: Frame, i: int, crops: Crops) -> None:
        """Decides lemmas about step i, each over its row of the frame."""
        whole, entry = View(self.program, frame, frame.pieces, frame.lower[0], frame.upper[0]), self.lemmas.entry[new]
        starts = self.program.offsets
        for crop, which, place, inner in crops.of(i, entry):
            if crop is None or any(crop.index[j].shape[1] for j in crop.floor if j <= i):
                bare = Frame(frame.lower, frame.upper, frame.cost).take(row[which])
                every = [np.arange(starts[i + 1])] * len(which)
                self._replay(self.program, bare, i, new[which], entry[which], every)
            else:
                every = [np.concatenate([s + at[p] for s, at in zip(starts, crop.index, strict=False)])
                         for p in place.tolist()]  # fmt: skip
                self._replay(crop.program, crop.view(whole, row[which], place).frame, i, new[which], inner, every)

    def _replay(
        self, program: Program, frame: Frame, i: int, numbers: Array, entry: Array, neurons: Sequence[Array]
    ) -> None:
        """Replays the trees of some lemmas on a program, each over its row of the frame.

        Args:
            entry: the entry of step i that each is about.
            neurons: for each which neurons of the whole program those of this one are, ascending.
        """
        leaves = [leaf for k, own in enumerate(neurons) for leaf in self._leaves(k, int(numbers[k]), program, own)]
        self.proved |= dict.fromkeys(numbers.tolist(), True)
        sign = 1.0 - 2.0 * self.lemmas.side[numbers]
        size = max(1, min(program.rows_together, MOST // int(program.offsets[-1])))
        for begin in range(0, len(leaves), size):
            self.limit()
            some = leaves[begin : begin + size]
            owner = np.array([leaf.owner for leaf in some])
            part, splits, dead = _clamped(frame.take(owner), some)
            relaxed = {j: _relaxed(program, part, j, some) for j, step in enumerate(program.steps[: i + 1])
                       if isinstance(step, (Apply, Times)) and step.size}  # fmt: skip
            view = View(program, part, relaxed, part.lower[0], part.upper[0], {}, splits)
            bound = view.entries(i, entry[owner], sign[owner], np.arange(len(some)))
            closed = dead | (np.isfinite(bound) & (bound >= (sign * self.lemmas.value[numbers])[owner]))
            self.proved |= dict.fromkeys(numbers[owner[~closed]].tolist(), False)

    def _leaves(self, owner: int, k: int, program: Program, neurons: Array) -> Iterator[_Leaf]:
        """The leaves of lemma k. What is said of neurons that the program does not have says nothing about its entries,
        and is left out."""
        of = self.lemmas
        first, last = of.start[k : k + 2].tolist()
        slots = of.slots[of.slot_start[k] : of.slot_start[k + 1]]
        known, step, at = _places(program, neurons, slots // 2)
        kept = [(j, side, np.flatnonzero(known & (step == j) & (slots % 2 == side)))
                for j in np.unique(step[known]).tolist() for side in (0, 1)]  # fmt: skip
        paths: dict[int, tuple[tuple[int, float, int], ...]] = {first: ()}
        beta, slope = int(of.beta_start[k]), int(of.slope_start[k])
        for node in range(first, last):
            path = paths.pop(node)
            if of.what[node] >= 0:
                for side, sign in enumerate((-1, 1)):
                    paths[int(of.child[node]) + side] = (*path, (int(of.what[node]), float(of.at[node]), sign))
                continue
            stored, forces = of.slopes[slope : slope + len(slots)], of.beta[beta : beta + len(path)].tolist()
            beta, slope = beta + len(path), slope + len(slots)
            has, where, entry = _places(program, neurons, np.array([what for what, _, _ in path], int))
            every = zip(has.tolist(), where.tolist(), entry.tolist(), path, forces, strict=True)
            splits = [(j, e, t, sign, force) for own, j, e, (_, t, sign), force in every if own]
            yield _Leaf(owner, splits, [(j, side, at[some], stored[some]) for j, side, some in kept])


def narrow(frame: Frame, rows: Array, fact: Fact) -> None:
    """Puts a fact into some rows of a frame, in place."""
    i, entry, side, value = fact
    ends, meet = (frame.upper, np.minimum) if side else (frame.lower, np.maximum)
    ends[i][rows, entry] = meet(ends[i][rows, entry], value)


def _places(program: Program, neurons: Array, wanted: Array) -> tuple[Array, Array, Array]:
    """Which of the wanted neurons a program has, and their steps and entries there."""
    at = np.searchsorted(neurons, wanted)
    has = at < len(neurons)
    has[has] = neurons[at[has]] == wanted[has]
    step = np.searchsorted(program.offsets, at, side="right") - 1
    return has, step, at - program.offsets[step]


def _clamped(frame: Frame, leaves: Sequence[_Leaf]) -> tuple[Frame, Splits | None, Array]:
    """The frame with the splits on the way to each leaf, one row each; these splits; which leaves hold no point."""
    rows = [(n, *split) for n, leaf in enumerate(leaves) for split in leaf.splits]
    empty = np.zeros(len(leaves), bool)
    if not rows:
        return frame, None, empty
    node, step, entry, at, sign, force = (np.array(v) for v in zip(*rows, strict=True))
    for i in np.unique(step).tolist():
        low, high = frame.lower[i].copy(), frame.upper[i].copy()
        right, left = (step == i) & (sign > 0), (step == i) & (sign < 0)
        np.maximum.at(low, (node[right], entry[right]), at[right])
        np.minimum.at(high, (node[left], entry[left]), at[left])
        empty |= (low > high).any(axis=1)
        frame.lower[i], frame.upper[i] = low, np.maximum(low, high)
    return frame, Splits(node, step, entry, at.astype(float), sign, force.astype(float)), empty


def _relaxed(program: Program, frame: Frame, j: int, leaves: Sequence[_Leaf]) -> Pieces:
    """The relaxation of step j in each leaf."""
    slopes = np.full((2, *frame.lower[j].shape), np.nan)
    for n, leaf in enumerate(leaves):
        for i, side, entry, value in leaf.slopes:
            if i == j:
                slopes[side, n, entry] = value
    intervals = [(frame.lower[s], frame.upper[s]) for s in nonlinear_sources(program.steps[j])]
    return relax(program, j, intervals, slopes[0], slopes[1])
