"""Functions that jump: a split gives each side one value where the function says so, and never one too few."""

import importlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.certificate.claims import BOUND, REFRESH, Claim, Node, affine
from tests.certificate.meaning import checker, evaluate

from soundly.certificate import Certificate

programs = importlib.import_module("soundly.certificate.program")


def jumping(functions: Sequence[str], weight: Any, lower: Any, split: int | None, flags: int) -> Claim:
    """Functions of v = weight x over a box from `lower` to 1; the outputs are their values and the values' products
    with the first one. A tree that splits v[split] at 0, and no clauses."""
    weight = np.array(weight, float)
    (m, n), k = weight.shape, len(functions)
    steps = [{"step": "variable", "size": n},
             affine(1, m, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b")]  # fmt: skip
    steps += [{"step": "function", "from": 1, "size": m, "function": f} for f in functions]
    steps += [{"step": "times", "left": 2, "right": 2 + j, "size": m} for j in range(k)]
    parts = [{"map": "sparse", "from": 2 + j, "rows": f"r{j}", "columns": "c", "array": "one", "size": [2 * k * m, m]}
             for j in range(2 * k)]  # fmt: skip
    steps.append(affine(len(steps), 2 * k * m, parts, "d"))
    arrays = {"w": weight, "b": np.zeros(m), "d": np.zeros(2 * k * m), "one": np.ones(m), "c": np.arange(m)}
    arrays |= {f"r{j}": np.arange(m) + j * m for j in range(2 * k)}
    root = Node(REFRESH | BOUND)
    if split is not None:
        root.split(2, n + split, 0.0, flags)
    return Claim(steps, arrays, [(np.array(lower, float), np.ones(n), [])], [(0, 0, 0, root)])


def claiming(claim: Claim, clauses: Sequence[Sequence[tuple[Mapping[int, float], float]]]) -> Certificate:
    """That <y, row> + constant > 0 for a row of each clause."""
    (lower, upper, _), (*_, root) = claim.cases[0], claim.trees[0]
    unit = np.eye(claim.steps[-1]["size"])
    rows = [[(sum(k * unit[i] for i, k in row.items()), np.zeros(len(lower)), constant, 0.0) for row, constant in some]
            for some in clauses]  # fmt: skip
    return Claim(claim.steps, claim.arrays, [(lower, upper, rows)], [(0, 0, len(rows), root)]).certificate()


@cache
def jumps() -> dict[str, tuple[Certificate, bool]]:
    """Claims about functions that jump at 0, and whether they are to be proven."""
    found, one = {}, [[1.0]]
    apart = [[({0: 1.0}, -0.6), ({0: -1.0}, 0.4)]]
    equal = [[({1: 1.0, 0: -1.0}, 0.01)], [({1: -1.0, 0: 1.0}, 0.01)]]
    whole = [[({1: 1.0, 0: -1.0}, 0.01)]]
    for flags in (BOUND, REFRESH | BOUND):
        for f, true in (("step", True), ("reached", True), ("full", True), ("half", False)):
            found[f, "split", flags] = claiming(jumping([f], one, [-1], 0, flags), apart), true
            found[f, "unsplit", flags] = claiming(jumping([f], one, [-1], None, flags), apart), False
        for split in (0, None):
            for top, true in ((2.0, False), (4.0, True)):
                c = claiming(jumping(["peak"], one, [-1], split, flags), [[({0: -1.0}, top)]])
                found["peak", split, top, flags] = c, true
        for f, g, true in (("step", "step", True), ("reached", "full", True), ("step", "reached", False),
                           ("full", "step", False), ("half", "half", False)):  # fmt: skip
            found[f, g, flags] = claiming(jumping([f, g], one, [-1], 0, flags), equal), true
        for f, true in (("step", True), ("reached", True), ("half", False)):  # f f >= f if f is 0 or 1
            c = claiming(jumping([f], one, [-1], 0, flags), whole)
            found[f, "squared", flags] = c, true and bool(flags & REFRESH)
            c = claiming(jumping([f, "relu"], one, [-1], 0, flags), [[({3: 1.0, 1: -1.0}, 0.01)]])
            found[f, "times relu", flags] = c, true and bool(flags & REFRESH)
        # Steps are 0 at 0, where only the first of two was split.
        for entry in (0, 1):
            c = claiming(jumping(["step"], [[1.0], [1.0]], [0], 0, flags), [[({entry: 1.0}, -0.5)]])
            found["step", "from 0", entry, flags] = c, False
    return found


@pytest.mark.parametrize("name", jumps(), ids=str)
def test_split_jumps_have_one_side_each(name):
    c, true = jumps()[name]
    assert checker.replay(c).proven.all() == true


def test_jumps_are_proven_and_not():
    assert {true for _, true in jumps().values()} == {False, True}


GRID = np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * 2), -1).reshape(-1, 2)


@cache
def kinked_certificate(seed: int) -> tuple[Certificate, np.ndarray]:
    """Jumps of small integers split at 0, and the least excess of each clause where they are met exactly."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-2, 3, (3, 2))
    names = rng.choice([["relu", "step"], ["step", "relu"], ["reached", "full"], ["step", "reached"], ["half", "step"],
                        ["full", "relu"]])  # fmt: skip
    claim = jumping(list(names), weight, rng.choice([-1.0, -0.5, 0.0], 2), None, BOUND)
    (lower, *_), (*_, root) = claim.cases[0], claim.trees[0]
    level = [root]
    for depth in range(1, 4):
        below = []
        for node in level:
            for child in node.split(2, 2 + int(rng.integers(0, 3)), float(rng.choice([0.0, 0.0, -0.5, 0.5]))):
                child.flags = int(rng.choice([BOUND, REFRESH | BOUND, 7]))
                child.beta = rng.choice([0, 0.5], depth).tolist()
                below.append(child)
        level = below
    y = evaluate(claiming(claim, [[({0: 1.0}, 0.0)]]), GRID[(GRID >= lower).all(1)])
    clauses, worst = [], []
    for _ in range(12):  # of the values of one neuron
        row = {3 * k + j: float(rng.choice([-1, 1])) for j in [int(rng.integers(0, 3))]
               for k in rng.permutation(4)[:2].tolist()}  # fmt: skip
        least = float(sum(k * y[:, i] for i, k in row.items()).min())
        for room in (-0.3, -0.01, 0.01, 0.3):
            clauses.append([(row, room - least)])
            worst.append(room)
    return claiming(claim, clauses), np.array(worst)


def untrue_at_jumps(seed: int, with_: Any = checker) -> bool:
    c, worst = kinked_certificate(seed)
    return bool((with_.replay(c).proven & (worst < 0)).any())


def test_nothing_is_proven_that_fails_at_a_jump(monkeypatch):
    seeds = range(60)
    assert [seed for seed in seeds if untrue_at_jumps(seed)] == []
    proven = sum(int(checker.replay(kinked_certificate(seed)[0]).proven.sum()) for seed in seeds)
    monkeypatch.setattr(programs.Program, "parted", property(lambda self: (frozenset(),) * len(self.steps)))
    assert proven > sum(int(checker.replay(kinked_certificate(seed)[0]).proven.sum()) for seed in seeds)
