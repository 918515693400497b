"""Grids in the checker: narrowed boxes against all points one by one, whole certificates by samples, bad files."""

import importlib
from itertools import product

import numpy as np
import pytest
from tests.certificate.claims import BOUND, CLIP, REFRESH, Claim, Node, changed, mlp
from tests.certificate.meaning import checker, untrue
from tests.certificate.samples import grid_certificate

from soundly.certificate import Certificate, check

grid = importlib.import_module("soundly.certificate.grid")


def test_narrowed_boxes_lose_no_point_and_end_at_options():
    rng = np.random.default_rng(0)
    for _ in range(60):
        entries = ([2], [0, 3])
        options = tuple(rng.choice([0.0, 0.1, 0.5, 2.0], (int(rng.integers(1, 4)), len(e))) for e in entries)
        some = grid.Grid(tuple(map(np.array, entries)), options)
        ends = np.sort(rng.choice([-1, 0.0, 0.05, 0.1, 0.5, 1.0, 2.0], (2, 5, 4)), axis=0)
        low, high = some.narrowed(*ends)
        assert some.size == len(options[0]) * len(options[1])
        for k in range(5):
            inside = []
            for a, b in product(*options):
                x = np.array([b[0], ends[0, k, 1], a[0], b[1]])
                if ((x >= ends[0, k]) & (x <= ends[1, k])).all():
                    inside.append(x)
            if inside:
                inside = np.array(inside)[:, [0, 2, 3]]
                assert (low[k, [0, 2, 3]] == inside.min(0)).all() and (high[k, [0, 2, 3]] == inside.max(0)).all()
                assert low[k, 1] == ends[0, k, 1] and high[k, 1] == ends[1, k, 1]
            else:
                assert (low[k] > high[k]).any()


def test_random_certificates_with_grids_prove_no_untruth_and_something():
    proven = 0
    for seed in range(60):
        assert untrue(grid_certificate(seed), seed) == []
        proven += int(checker.replay(grid_certificate(seed)).proven.sum())
    assert proven > 60


def notch() -> Claim:
    """|x + y| > 0.2 in rows, true at the four corners of the square and false between: x, y in {-1, 0.5}."""
    steps, arrays = mlp(np.random.default_rng(0), [2, 2, 1])
    arrays |= {"w0": np.array([[1.0, 1.0], [-1.0, -1.0]]), "b0": np.zeros(2), "w1": np.ones((1, 2)), "b1": np.zeros(1)}
    row = [[(np.ones(1), np.zeros(2), -0.2, 0.0)]]
    root = Node(REFRESH)
    for half in root.split(1, 0, -0.25, REFRESH):
        half.split(1, 1, -0.25, REFRESH | BOUND)
    values = np.array([[-1.0], [0.5]])
    return Claim(steps, arrays, [([-1, -1], [0.5, 0.5], row)], [(0, 0, 1, root)], grid=[([0], values), ([1], values)])


def test_a_claim_that_holds_on_the_grid_alone_is_proved():
    c = notch().certificate()
    result = check(c)
    assert result.accepted and result.claims[0].name == "case 0, on a grid of 4 choices"
    header = {k: v for k, v in c.header.items() if k != "grid"}
    box = Certificate(header, {k: v for k, v in c.arrays.items() if not k.startswith("grid_")})
    assert not check(box).accepted  # without the grid it is false
    for more in (-0.5, 1.0):  # outside the box there is nothing to prove, inside the claim is false
        claim = notch()
        claim.grid = [claim.grid[0], ([1], np.array([[-1.0], [0.5], [more]]))]
        assert check(claim.certificate()).accepted == (more == 1.0)
    joint = notch()
    joint.grid = [([0, 1], np.array([[-1.0, -1.0], [0.5, 0.5]]))]
    assert check(joint.certificate()).accepted
    joint.grid = [([0, 1], np.array([[-1.0, -1.0], [0.5, 0.5], [-0.3, 0.3]]))]
    assert not check(joint.certificate()).accepted


def test_a_box_that_a_clip_leaves_without_options_is_closed():
    """x > -0.2 on {-1 (out of the box), 0, 1}: the clip keeps [-0.5, -0.2], where no option lies."""
    steps, arrays = mlp(np.random.default_rng(0), [1, 1])
    arrays |= {"w0": np.eye(1), "b0": np.zeros(1)}
    row = [[(np.ones(1), np.zeros(1), 0.2, 0.0)]]
    claim = Claim(steps, arrays, [([-0.5], [1.0], row)], grid=[([0], np.array([[-1.0], [0.0], [1.0]]))])
    claim.trees = [(0, 0, 1, Node(REFRESH))]
    assert not check(claim.certificate()).accepted
    claim.trees = [(0, 0, 1, Node(REFRESH | BOUND | CLIP))]
    assert check(claim.certificate()).accepted


@pytest.mark.parametrize(
    ("header", "arrays", "why"),
    [
        ({"grid": 0}, {}, "grid"), ({"grid": None}, {}, "grid"), ({"grid": 3}, {}, "grid"),
        ({}, {"grid_entry": np.array([0, 0])}, "twice"), ({}, {"grid_entry": np.array([0, 2])}, "range"),
        ({}, {"grid_value": np.array([0, 1, np.nan, 1.0])}, "finite"),
        ({}, {"grid_value": np.array([0, 1, 2, 1], np.float32)}, "expected"),
        ({}, {"grid_value_start": np.array([0, 4, 4])}, "empty"),
        ({}, {"grid_start": np.array([0, 2, 2])}, "empty"),
        ({"grid": 1}, {"grid_start": np.array([0, 2]), "grid_value_start": np.array([0, 3]),
                       "grid_value": np.zeros(3)}, "lengths"),
    ],
)  # fmt: skip
def test_malformed_grids_are_refused(header, arrays, why):
    result = check(changed(notch().certificate(), header, **arrays))
    assert not result.accepted and why in result.problems[0]


def test_grids_half_missing_are_refused():
    c = notch().certificate()
    no_header = Certificate({k: v for k, v in c.header.items() if k != "grid"}, c.arrays)
    no_arrays = Certificate(c.header, {k: v for k, v in c.arrays.items() if k != "grid_start"})
    for other in (no_header, no_arrays):
        assert not check(other).accepted and check(other).problems
