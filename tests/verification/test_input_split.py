"""Splitting inputs: parts cover the region, what is called proved is true, no counterexample is ever clipped away."""

import numpy as np
import pytest
import torch
from tests.verification.claims import (
    F64,
    conjunctive,
    counterexamples,
    fraction,
    grid,
    net,
    square,
    true_claim,
    values,
)
from torch import Tensor, nn

from soundly.bounds.batch import Bounder
from soundly.spec.claim import Claim, Property, Row, within
from soundly.spec.region import Box, Union
from soundly.verification.forest import BOUND, INPUT, LEAF, Forest
from soundly.verification.input_split import InputSplit, Parts
from soundly.verification.problem import Problem, problem_of


def lost(search: InputSplit, problem: Problem, x: Tensor, tolerance: float = 1e-9) -> int:
    """How many counterexamples lie in no part that still waits with their clause open. Clipped ends are rounded."""
    bad = counterexamples(problem, x)
    kept = torch.zeros_like(bad)
    for part in search.stack:
        for low, high, open_ in zip(part.lower, part.upper, part.open, strict=True):
            inside = ((x >= low - tolerance) & (x <= high + tolerance)).all(-1)
            kept |= inside[:, None] & open_
    return int((bad & ~kept).sum())


FALSE = {
    "few": lambda: conjunctive(net(0), square(2), 0.02, 0),
    "many": lambda: conjunctive(net(1), square(2), 0.4, 1),
    "tanh": lambda: conjunctive(net(2, activation=nn.Tanh), square(2), 0.05, 2),
    "three inputs": lambda: conjunctive(net(3, inputs=3), square(3), 0.01, 3),
    "output": lambda: within(net(4), square(2), None, -1.3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FALSE)
def test_no_counterexample_is_clipped_away(name, dtype):
    claim = FALSE[name]()
    problem = problem_of(claim)
    x = grid(claim.region, 61 if problem.program.inputs == 2 else 17)
    assert counterexamples(problem, x).any()
    search = InputSplit(problem, Bounder(problem.program.to(dtype)))
    volume = [1.0]
    for _ in range(12):
        search.step(64)
        assert lost(search, problem, x, 1e-9 if dtype == F64 else 1e-5) == 0
        volume.append(search.open_share)
    assert volume[-1] < 0.95 and all(0 < v <= 1 + 1e-12 for v in volume)


class WrongSide(InputSplit):
    def _clipped(self, now, still, owner, place, reach, a):
        return super()._clipped(now, still, owner, place, reach, -a)


class TooShort(InputSplit):
    def _clipped(self, now, still, owner, place, reach, a):
        return super()._clipped(now, still, owner, place, 0.8 * reach, a)


class AnyClause(InputSplit):
    """Clips with the rows of all clauses together, as if they were one."""

    def _clipped(self, now, still, owner, place, reach, a):
        many = still.shape[1]
        clipped, low, high = super()._clipped(now, still, owner, owner * many, reach, a)
        return clipped[:, :1].expand_as(still) & still, low, high


@pytest.mark.parametrize("wrong", [WrongSide, TooShort, AnyClause])
def test_wrong_clips_are_caught(wrong):
    missing = 0
    for make in (FALSE["few"], FALSE["many"], FALSE["tanh"]):
        claim = make()
        problem = problem_of(claim)
        x = grid(claim.region, 61)
        search = wrong(problem, Bounder(problem.program))
        for _ in range(8):
            if len(search):
                search.step(64)
        missing += lost(search, problem, x)
    assert missing > 0


def located(forest: Forest, root: int, x: Tensor) -> np.ndarray:
    """The leaf of each point [m, n], by descending the splits of inputs."""
    node = np.full(len(x), root)
    points = x.numpy()
    while True:
        inner = forest.kind[node] != LEAF
        if not inner.any():
            return node
        assert (forest.kind[node[inner]] == INPUT).all()
        where = points[inner, forest.what[node[inner]]] > forest.at[node[inner]]
        node[inner] = forest.left[node[inner]] + where


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("seed", range(3))
def test_finished_input_splits_cover_and_are_true(seed, activation):
    claim = true_claim(seed, activation)
    problem = problem_of(claim)
    search = InputSplit(problem, Bounder(problem.program))
    for _ in range(200):
        if not len(search):
            break
        search.step(64)
    assert not len(search) and search.open_share == 0 and not search.stuck
    x = grid(claim.region, 61)
    leaf = located(search.forest, search.forest.root[0], x)
    proved = torch.cat([p.node for p in search.proved]).tolist()
    assert set(leaf.tolist()) <= set(proved) and len(set(proved)) == len(proved)
    assert all(search.forest.flags[n] & BOUND for n in proved)
    # Every leaf's statement: in its box each clause that is open there has a positive row.
    rows = values(problem, x)
    seen = 0
    for part in search.proved:
        for low, high, open_ in zip(part.lower, part.upper, part.open, strict=True):
            inside = ((x >= low) & (x <= high)).all(-1)
            seen += int(inside.sum())
            assert bool((problem.rows.worst(rows[inside])[:, open_] > 0).all())
    assert seen > 100
    assert len(proved) > 1
    order = search.forest.order(0)
    assert len(order) == 2 * len(proved) - 1  # a full binary tree


def test_cases_are_searched_side_by_side():
    """A union with clauses of its own for each box: every box has a tree of just its clauses."""
    network = net(0)
    low = torch.tensor([[[-1.0, -1.0]], [[0.0, 0.0]], [[0.5, -1.0]]])
    y = {0: fraction(1.0)}
    clauses = [[Row(y, {}, fraction(b))] for b in (10, 12, -10, 9)]
    region = Union(low, low + 0.5)
    spans = torch.tensor([[0, 2], [2, 3], [3, 4]])
    claim = Claim(network, region, Property.of(clauses, outputs=3, inputs=2), spans=spans)
    problem = problem_of(claim)
    search = InputSplit(problem, Bounder(problem.program))
    assert len(search.forest.root) == 3 and list(zip(search.forest.first, search.forest.last, strict=True)) == [
        (0, 2), (0, 1), (0, 1)
    ]  # fmt: skip
    search.step(8)
    assert set(search.waiting.case.tolist()) == {1}  # y_0 <= 10 is refuted everywhere in box 1, and there alone
    assert [p.case.tolist() for p in search.proved] == [[0, 2]]
    first = search.waiting
    assert bool((first.lower >= 0.0).all() and (first.upper <= 0.5).all())


def test_a_box_too_small_to_split_is_told():
    network = net(0)
    low = torch.ones(1, 2, dtype=F64)
    tiny = Box(low, torch.nextafter(low, 2 * low))
    problem = problem_of(within(network, tiny, None, float(network(low.float()).min()) - 1.0))
    search = InputSplit(problem, Bounder(problem.program))
    search.step(8)
    assert search.stuck


def test_reopened_leaves_are_split_again():
    claim = true_claim(1)
    problem = problem_of(claim)
    search = InputSplit(problem, Bounder(problem.program))
    while len(search):
        search.step(64)
    proved = Parts.join(search.proved).pick(slice(3))
    boxes = [(low - 0.01, high) for low, high in zip(proved.lower.numpy(), proved.upper.numpy(), strict=True)]
    open_ = np.ones(proved.open.shape[1], bool)
    count = search.forest.size
    search.reopen({node: (*box, open_) for node, box in zip(proved.node.tolist(), boxes, strict=True)})
    assert len(search) == 6 and search.forest.size == count + 6
    now = search.waiting  # what the checker was left with, halved
    assert bool(now.open.all()) and torch.equal(now.lower[::2].sort(0)[0], (proved.lower - 0.01).sort(0)[0])
    while len(search):
        search.step(64)
    leaf = located(search.forest, search.forest.root[0], grid(claim.region, 31))
    assert set(leaf.tolist()) <= set(torch.cat([p.node for p in search.proved]).tolist())
