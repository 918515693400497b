"""Intervals tightened by the clause's rows and by splits: nothing false is proven by them, and something more."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.certificate.claims import BOUND, REFRESH, Claim, Node, affine, changed, mlp
from tests.certificate.meaning import checker, evaluate_all, points, untrue
from tests.certificate.samples import tightly

from soundly.certificate import Certificate


@cache
def tightened_certificate(seed: int) -> Certificate:
    """Neuron splits, a tree for each clause, with intervals tightened by the clause's rows and random multipliers."""
    rng = np.random.default_rng(seed)
    rooms = [-0.2, -0.05, -0.01, -0.001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
    steps, arrays = mlp(rng, [2, 5, 4, 2], ["relu", "relu", "tanh"][seed % 3])
    claim = tightly(steps, arrays, [-0.8, -0.6], [0.7, 0.9], rooms, seed)
    if seed % 2:  # slacks, and second rows that read the input and are never above theirs
        for rows in claim.cases[0][2]:
            y, x, b, _ = rows[0]
            rows[0] = (y, x, b + 0.2, 0.2)
            rows.append((0 * y, rng.standard_normal(2), -5.0, 0.0))
    offsets = np.cumsum([0, *(s["size"] for s in steps)])
    relaxed = [offsets[i] + k for i in (2, 4) for k in range(steps[i]["size"])]
    claim.slots = [int(2 * k + side) for k in relaxed for side in (0, 1)]
    claim.slopes = rng.choice([0, 0.5, 1.0], (8, len(claim.slots)))
    keys = [int(2 * (offsets[i] + k) + side) for i in (1, 3) for k in range(steps[i]["size"]) for side in (0, 1)]
    values = evaluate_all(claim.certificate(), points(claim.certificate(), 0, rng))
    rows = 1 + seed % 2
    claim.trees = []
    for c in range(len(claim.cases[0][2])):
        root = Node(REFRESH | BOUND)
        level = [root]
        for depth in range(3):
            below = []
            for node in level:
                node.tightened = [
                    (turn, key, int(rng.integers(0, 8)), [*rng.choice([0, 0.3, 1.0, 3.0], rows).tolist(),
                                                          *rng.choice([0, 0.3], depth).tolist()])
                    for turn in range(2) for key in keys if rng.random() < 0.8
                ]  # fmt: skip
                if depth < 2:
                    step = int(rng.choice([1, 3]))
                    entry = int(rng.integers(0, steps[step]["size"]))
                    at = float(np.quantile(values[step][:, entry], rng.uniform(0.2, 0.8)))
                    below += node.split(2, int(offsets[step]) + entry, at, BOUND)
            for node in below:
                node.beta = rng.choice([0, 0.3], depth + 1).tolist()
            level = below
        claim.trees.append((0, c, c + 1, root))
    return claim.certificate()


def between(room: float) -> Certificate:
    """Claims of x in [-1, 1] that 0.7 - x > 0.1 or relu(x) - w > 0.1; that is so just if w < 0.5, by the room.

    Neither row can show it. Where both fail, x >= 0.6 by the first, and so relu(x) = x <= w + 0.1 by the second.
    """
    steps = [
        {"step": "variable", "size": 1},
        affine(1, 1, [matrix(0, "w1")], "b1"),
        {"step": "function", "from": 1, "size": 1, "function": "relu"},
        affine(3, 1, [matrix(2, "w1")], "b1"),
    ]
    arrays = {"w1": np.ones((1, 1)), "b1": np.zeros(1)}
    clause = [([0.0], [-1.0], 0.7, 0.1), ([1.0], [0.0], -(0.5 - room), 0.1)]
    root = Node(tightened=[(0, 2, 0, [1.0, 0.0]), (1, 3, 0, [0.0, 1.0])])
    return Claim(steps, arrays, [([-1.0], [1.0], [clause])], [(0, 0, 1, root)], [], [[]]).certificate()


def around(room: float) -> Certificate:
    """h = relu(x) is split at 0.4 + room and, of a copy, at 0.4: what is above the first and below the second is empty
    if there is room, as intervals of 2 h show. Everything else stays open."""
    steps = [
        {"step": "variable", "size": 1},
        affine(1, 1, [matrix(0, "w1")], "b1"),
        {"step": "function", "from": 1, "size": 1, "function": "relu"},
        affine(3, 3, [matrix(2, "w3")], "b3"),
        {"step": "function", "from": 3, "size": 3, "function": "relu"},
        affine(5, 1, [matrix(4, "w5")], "b1"),
    ]
    arrays = {"w1": np.ones((1, 1)), "b1": np.zeros(1), "w3": np.array([[1.0], [1.0], [2.0]]), "b3": np.zeros(3),
              "w5": np.zeros((1, 3))}  # fmt: skip
    root = Node()
    inner = root.split(2, 3, 0.4 + room)[1]
    leaf = inner.split(2, 4, 0.4)[0]
    leaf.flags, leaf.tightened = BOUND, [(0, 10, 0, [0.0, 2.0, 0.0]), (0, 11, 0, [0.0, 0.0, 2.0])]
    return Claim(steps, arrays, [([0.1], [1.0], [[([1.0], [0.0], -1.0, 0.0)]])], [(0, 0, 1, root)], [],
                 [[]]).certificate()  # fmt: skip


def matrix(source: int, array: str) -> dict:
    return {"map": "matrix", "from": source, "array": array, "blocks": 1}


def several() -> Certificate:
    """Intervals tightened below a split in a tree for two clauses."""
    steps, arrays = mlp(np.random.default_rng(0), [2, 4, 1])
    claim = tightly(steps, arrays, [-1, -1], [1, 1], [0.5])
    root = Node()
    for child in root.split(2, 2, 0.0):
        child.tightened = [(0, 4, 0, [])]
    claim.trees, claim.slopes = [(0, 0, 2, root)], [[]]
    return claim.certificate()


def untightened(c: Certificate) -> Certificate:
    none = {f"tighten_{name}": c.arrays[f"tighten_{name}"][:0] for name in ("node", "round", "key", "row", "force")}
    return changed(c, **none, force_start=np.zeros(1, int))


def test_intervals_of_possible_counterexamples_prove_nothing_false_and_something_more():
    more = 0
    for seed in range(40):
        c = tightened_certificate(seed)
        assert untrue(c, seed) == []
        result, before = checker.replay(c), checker.replay(untightened(c))
        assert result.problems == before.problems == ()
        more += int((result.proven & ~before.proven).sum())  # other slopes are the best for other intervals
    assert more > 10


def test_tightening_does_not_depend_on_what_is_tightened_together(monkeypatch):
    certificates = [tightened_certificate(seed) for seed in range(10)]
    together = [checker.replay(c) for c in certificates]
    monkeypatch.setattr(checker, "FRAME", 1)
    for c, before in zip(certificates, together, strict=True):
        after = checker.replay(c)
        assert after.failed == before.failed and after.margin == pytest.approx(before.margin, rel=1e-9, abs=1e-9)


def misplaced(with_: Any) -> bool:
    """Whether the checker is wrong about where a tightened interval ends."""
    proven = [bool(with_.replay(between(room)).proven.all()) for room in (1e-6, -1e-6)]
    failed = [with_.replay(around(room)).failed for room in (1e-6, -1e-6)]
    return proven != [True, False] or failed != [[(0, 1), (0, 4)], [(0, 1), (0, 3), (0, 4)]]


def test_tightened_intervals_end_where_they_should():
    assert not misplaced(checker)
