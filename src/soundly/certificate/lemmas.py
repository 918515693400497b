"""Lemmas: ends of neurons' intervals on the whole box of a case, each proven by a split tree of its own.

A lemma's tree relies on nothing but the case. Once every leaf is closed, the end is a fact, and all other trees of the
case begin with it.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from soundly.certificate.bounding import Frame, View
from soundly.certificate.reading import Proof

Integers = npt.NDArray[np.int64]
Truths = npt.NDArray[np.bool_]


def known(proof: Proof, cases: Integers) -> Frame | None:
    """What all lemmas say of the intervals in some cases [M]; None if nothing."""
    mine = np.flatnonzero((proof.tree_lemma >= 0) & np.isin(proof.tree_case, cases))
    if len(mine) == 0:
        return None
    frame = Frame()
    for size in np.diff(proof.program.offsets).tolist():
        frame.lower.append(np.full((len(cases), size), -np.inf))
        frame.upper.append(np.full((len(cases), size), np.inf))
    step, entry, lower = _about(proof, mine)
    for tree, i, k, below in zip(mine.tolist(), step.tolist(), entry.tolist(), lower.tolist(), strict=True):
        row, level = cases == proof.tree_case[tree], proof.tree_level[tree]
        if below:
            frame.lower[i][row, k] = np.maximum(frame.lower[i][row, k], level)
        else:
            frame.upper[i][row, k] = np.minimum(frame.upper[i][row, k], level)
    return frame


def holds(proof: Proof, trees: Integers, view: View, in_time: Callable[[], None]) -> Truths:
    """Where bounds over a view's nodes prove the lemmas of the nodes' trees [M]."""
    step, entry, lower = _about(proof, trees)
    sign = np.where(lower, 1.0, -1.0)
    done, size = np.zeros(len(trees), bool), proof.program.rows_at_once
    for i in np.unique(step).tolist():
        which = np.flatnonzero(step == i)
        for begin in range(0, len(which), size):
            in_time()
            some = which[begin : begin + size]
            least = view.entries(i, entry[some], sign[some], some)
            done[some] = np.isfinite(least) & (least >= sign[some] * proof.tree_level[trees[some]])
    return done


def _about(proof: Proof, trees: Integers) -> tuple[Integers, Integers, Truths]:
    """Of lemmas the step, the entry, and whether it is the lower end."""
    offsets, neuron = proof.program.offsets, proof.tree_lemma[trees] // 2
    step = np.searchsorted(offsets, neuron, side="right") - 1
    return step, neuron - offsets[step], proof.tree_lemma[trees] % 2 == 0
