"""Lemmas: bounds of single inner values over the whole box, each proved by a search of its own on the small part of the
program that the value depends on, before the main search goes on with the narrower intervals.

Where a function jumps within a value's interval no line is near it, and in the main search a split of that value alone
costs passes through the whole program. Where the value depends on a small part only, that part is split instead.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from soundly.bounds.batch import Bounder
from soundly.bounds.frame import Frame, OutOfTime
from soundly.bounds.lines import jumps
from soundly.bounds.program import Function, Program
from soundly.verification.forest import LEAF
from soundly.verification.neuron_split import NeuronSplit
from soundly.verification.problem import Problem
from soundly.verification.proof import Lemma
from soundly.verification.rows import Rows

SMALL = 1 / 64
"""The most that a part may cost of what the whole program costs."""
PARTS, FAILURES = 200, 8
"""The most subproblems of one lemma; after so many failures in a row no further value of a step is tried."""
MARGIN = 1e-3
"""How far beyond a jump values shall be, relative to the width of their interval; half of that is claimed."""
TURN = 8
"""So many lemmas are added before the rows are bounded again."""


@dataclass(frozen=True, eq=False)
class Known:
    """Intervals of a box that lemmas made narrower.

    Attributes:
        frame: a batch of one.
        lemmas: what is used.
        subproblems: how many it took.
    """

    frame: Frame
    lemmas: list[Lemma]
    subproblems: int


@dataclass(frozen=True, eq=False)
class _Wish:
    """An entry of a step whose lower end (side 0) or upper end (1) shall move beyond a jump."""

    entry: int
    side: int
    jump: float
    width: float


def narrowed(problem: Problem, bounder: Bounder, exact: Program, root: Frame, case: int) -> Known:
    """Proves of values at which functions jump on which side they are, until intervals prove the case's rows.

    Args:
        bounder: of the problem's program and, as a last step, the rows of the case (`with_rows`).
        exact: the same program in float64.
        root: intervals of all steps on the box of the case.
    """
    frame = Frame(list(root.lower), list(root.upper), root.infeasible, dict(root.known))
    found, subproblems = list[Lemma](), 0
    parts_of = Bounder(exact)
    for i in range(1, len(bounder.steps)):
        fresh, failures = 0, 0
        for wish in _wishes(bounder, frame, i):
            if time.monotonic() > bounder.deadline:
                raise OutOfTime
            lemma, tried = _proved(parts_of, frame, case, i, wish)
            subproblems += tried
            failures = failures + 1 if lemma is None else 0
            if failures == FAILURES:
                break
            if lemma is not None:
                found.append(lemma)
                fresh += 1
                ends = (frame.lower, frame.upper)[wish.side]
                ends[i] = ends[i].clone()
                ends[i][0, wish.entry] = lemma.value
                if fresh % TURN == 0:
                    frame = _onward(bounder, frame, i)
                    if _hold(problem, case, frame):
                        return Known(frame, found, subproblems)
        if fresh % TURN:
            frame = _onward(bounder, frame, i)
            if _hold(problem, case, frame):
                break
    return Known(frame, found, subproblems)


def _hold(problem: Problem, case: int, frame: Frame) -> bool:
    """Whether by the rows' intervals every clause has one above its slack."""
    first, last = problem.row_spans[case].tolist()
    clause = problem.rows.clause[first:last] - problem.spans[case, 0]
    excess = frame.lower[-1][0].double() - problem.slack[first:last]
    best = excess.new_full((int(clause[-1]) + 1,), -math.inf).scatter_reduce(0, clause, excess, "amax")
    return bool((best > MARGIN).all())


def _onward(bounder: Bounder, frame: Frame, i: int) -> Frame:
    """With the intervals of later steps than i found anew."""
    return bounder.refresh(frame.lower[0], frame.upper[0], inherited=frame, first=i + 1)


def _wishes(bounder: Bounder, frame: Frame, i: int) -> list[_Wish]:
    """The entries of step i within whose intervals a function jumps, the nearest to a jump first."""
    points = sorted({t for j in bounder.readers[i] if isinstance(step := bounder.steps[j], Function)
                     for t in jumps(step.op)})  # fmt: skip
    if not points:
        return []
    low, high, at = frame.lower[i][0].double(), frame.upper[i][0].double(), torch.tensor(points, dtype=torch.float64)
    inside = (low[:, None] <= at) & (at <= high[:, None])
    below = torch.where(inside, at - low[:, None], math.inf).min(1)  # to be shown to be above the first of them
    above = torch.where(inside, high[:, None] - at, math.inf).min(1)
    gap, width = torch.minimum(below.values, above.values), high - low
    some = (torch.isfinite(gap) & (width > 0)).nonzero()[:, 0]
    wishes = []
    for e in some[gap[some].argsort(stable=True)].tolist():
        side = int(above.values[e] < below.values[e])
        jump = points[int((above if side else below).indices[e])]
        wishes.append(_Wish(e, side, jump, float(width[e])))
    return wishes


def _proved(bounder: Bounder, frame: Frame, case: int, i: int, wish: _Wish) -> tuple[Lemma | None, int]:
    """The lemma, or None where that would take too long; and how many subproblems it took."""
    _, crops = bounder.crops.of(i, torch.tensor([wish.entry]))
    if not crops:
        return None, 0
    crop, _, place, (inner,) = crops[0]
    program, sign = crop.program, -1.0 if wish.side else 1.0
    part = bounder.bounders.setdefault(program, Bounder(program))
    if part.cost > SMALL * bounder.cost or any(program.steps[j].size for j in crop.floor):
        return None, 0
    one = torch.zeros(1, dtype=torch.int64)
    low, high = ([crop.take(j, v[j], one, place).double() for j in range(i + 1)] for v in (frame.lower, frame.upper))
    root = Frame(low, high, torch.zeros(1, dtype=torch.bool))
    y = torch.zeros(1, program.outputs, dtype=torch.float64)
    y[0, inner] = sign
    nothing = torch.zeros(1, dtype=torch.float64)
    rows = Rows(y, nothing.expand(1, program.inputs), nothing - sign * wish.jump, one)
    problem = Problem(program, root.lower[0], root.upper[0], rows, nothing, torch.tensor([[0, 1]]))
    search = NeuronSplit(problem, part, 0, root, [0], margin=MARGIN * wish.width)
    search.begin(20)
    while len(search.waiting) and not search.stuck and search.subproblems < PARTS:
        search.step(64, 10)
    if len(search.waiting) or search.stuck:
        return None, search.subproblems
    value = wish.jump + sign * MARGIN * wish.width / 2
    starts = np.cumsum([0, *(step.size for step in bounder.steps)]).tolist()
    number = np.concatenate([s + index[int(place)].numpy() for s, index in zip(starts, crop.index, strict=False)])
    key = 2 * (starts[i] + wish.entry) + wish.side
    return recorded(search, 0, key, value, number, case=case), search.subproblems


def recorded(
    search: NeuronSplit, tree: int, key: int, value: float, number: npt.NDArray[np.int64], *, case: int
) -> Lemma:
    """What a finished tree of a search proves, with the number of every neuron in the whole program."""
    grown, forest = search.grown([tree]), search.forest
    nodes = forest.order(tree)
    leaf = forest.kind[nodes] == LEAF
    leaves = nodes[leaf].tolist()
    return Lemma(
        case, key, value, np.where(leaf, -1, number[forest.what[nodes]]), np.where(leaf, 0.0, forest.at[nodes]),
        2 * number[grown.slots // 2] + grown.slots % 2, grown.slopes[[grown.bound_slopes[n] for n in leaves]],
        np.concatenate([grown.betas[n] for n in leaves]),
    )  # fmt: skip
