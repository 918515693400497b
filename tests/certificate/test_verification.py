"""The checker of verifications proves what its trees prove, and nothing that a sample refutes."""

import importlib
import time
from functools import cache

import numpy as np
import pytest
from tests.certificate.claims import BOUND, CLIP, REFRESH, Claim, Node, affine, changed
from tests.certificate.meaning import checker, untrue
from tests.certificate.samples import SEEDS, good, neuron_certificate, random_certificate, relu_claim

from soundly.certificate import Certificate, check
from soundly.certificate.format import NETWORK

programs = importlib.import_module("soundly.certificate.program")


def test_a_relu_network_is_proven_by_input_splits():
    claim = relu_claim()
    c = claim.certificate()
    result = check(c)
    assert result.accepted and result.rows == result.proven == 4 and result.arithmetic == NETWORK
    assert len(c.arrays["kind"]) > 3
    assert untrue(c) == []


@pytest.mark.parametrize("seeds", [range(k, k + 40) for k in range(0, SEEDS, 40)], ids=str)
def test_nothing_that_a_sample_refutes_is_proven(seeds):
    proven = 0
    for seed in seeds:
        c = random_certificate(seed)
        result = checker.replay(c)
        assert result.problems == (), seed
        assert untrue(c, seed) == [], seed
        proven += int(result.proven.sum())
    assert proven > 40


def test_neuron_splits_prove_nothing_false_and_something_more():
    more = 0
    for seed in range(40):
        c = neuron_certificate(seed)
        assert untrue(c, seed) == []
        result = checker.replay(c)
        root = changed(c, **{k: c.arrays[k][:1] for k in ("flags", "what", "at", "slopes_bound", "slopes_refresh")},
                       kind=np.zeros(1, int), tree_start=np.array([0, 1]), beta_start=np.zeros(2, int),
                       beta=np.zeros(0))  # fmt: skip
        alone = checker.replay(changed(root, what=np.zeros(1, int), at=np.zeros(1)))
        assert alone.problems == () and (result.proven >= alone.proven).all()
        more += int(result.proven.sum() - alone.proven.sum())
    assert more > 0


def test_neuron_splits_need_their_multipliers():
    """relu(x) - x / 2 is at least 0: proven at once with both halves' multipliers, for neither without.

    The split value is not affine in the input in one step, so the input's box is not halved.
    """
    steps = [
        {"step": "variable", "size": 1},
        affine(1, 1, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b"),
        affine(2, 1, [{"map": "matrix", "from": 1, "array": "w", "blocks": 1}], "b"),
        {"step": "function", "from": 2, "size": 1, "function": "relu"},
        affine(4, 1, [{"map": "matrix", "from": 3, "array": "w", "blocks": 1},
                      {"map": "matrix", "from": 0, "array": "v", "blocks": 1}], "b"),
    ]  # fmt: skip
    arrays = {"w": np.ones((1, 1)), "v": np.full((1, 1), -0.5), "b": np.zeros(1)}
    for constant, true in ((0.001, True), (-0.001, False)):
        root = Node(REFRESH | BOUND)
        claim = Claim(steps, arrays, [([-1.0], [0.9], [[([1.0], [0.0], constant, 0.0)]])], [(0, 0, 1, root)])
        assert not check(claim.certificate()).accepted
        children = root.split(2, 2, 0.0, BOUND)
        assert checker.replay(claim.certificate()).failed == [(0, 1), (0, 2)]
        for beta, enough in ((0.25, False), (0.5, True), (0.75, False)):
            for child in children:
                child.beta = [beta]
            assert check(claim.certificate()).accepted is (enough and true)
        for child in children:
            child.beta, child.flags = [], REFRESH | BOUND
        assert not check(claim.certificate()).accepted  # intervals alone do not see that the input is halved


@cache
def grouped(side: int) -> Certificate:
    """-relu(x) + x / 4 - 0.01 < 0: known at the root with the slope 1/4 for the upper bound, and with no other."""
    steps = [
        {"step": "variable", "size": 1},
        affine(1, 1, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b"),
        {"step": "function", "from": 1, "size": 1, "function": "relu"},
        affine(3, 1, [{"map": "matrix", "from": 2, "array": "m", "blocks": 1},
                      {"map": "matrix", "from": 0, "array": "q", "blocks": 1}], "c"),
        {"step": "function", "from": 3, "size": 1, "function": "relu"},
    ]  # fmt: skip
    arrays = {"w": np.ones((1, 1)), "m": -np.ones((1, 1)), "q": np.full((1, 1), 0.25), "b": np.zeros(1),
              "c": np.full(1, -0.01)}  # fmt: skip
    case = ([-1.0], [0.9], [[([-1.0], [0.0], 0.001, 0.0)]])
    return Claim(steps, arrays, [case], [(0, 0, 1, Node(slopes_refresh=0))], [4], [[0.25]],
                 [{2 * 3 + side: 0}]).certificate()  # fmt: skip


def test_slopes_are_used_for_the_bound_that_they_are_stored_for():
    assert check(grouped(1)).accepted and not check(grouped(0)).accepted


@cache
def halved(error: float) -> Certificate:
    """|x| <= 1, |y| <= 1, split where x + 2 y = 0: on the right y >= -1/2, on the left y <= 1/2, claimed with 0.01 to
    spare by a row each; neither holds everywhere."""
    step = affine(1, 1, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b")
    arrays = {"w": np.array([[1.0, 2.0]]), "b": np.zeros(1), "one": np.ones((1, 1))}
    if error:
        step["bias_error"], arrays["f"] = "f", np.array([error])
    steps = [
        {"step": "variable", "size": 2}, step, {"step": "function", "from": 1, "size": 1, "function": "relu"},
        affine(3, 1, [{"map": "matrix", "from": 2, "array": "one", "blocks": 1}], "b"),
    ]  # fmt: skip
    root = Node(REFRESH | BOUND)
    for child in root.split(2, 2, 0.0, BOUND):
        child.beta = [0.0]
    clause = [([0.0], [0.0, 1.0], 0.51, 0.0), ([0.0], [0.0, -1.0], 0.51, 0.0)]
    return Claim(steps, arrays, [([-1.0, -1.0], [1.0, 1.0], [clause])], [(0, 0, 1, root)]).certificate()


def test_splits_of_what_is_affine_in_the_input_clip_the_box():
    assert check(halved(0.0)).accepted and check(halved(0.01)).accepted and not check(halved(0.05)).accepted


def test_clipping_shrinks_boxes_as_it_should():
    """y = x1 + x2 - 3 on [0, 1] x [0, 4] is at most 0 only where x2 <= 3; then a second look at the box closes it."""
    steps = [{"step": "variable", "size": 2},
             affine(1, 1, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b")]  # fmt: skip
    arrays = {"w": np.array([[1.0, 1.0]]), "b": np.array([-3.0])}
    rows = [([1.0], [0.0, 0.0], 0.0, 0.0), ([0.0], [0.0, 1.0], -3.0, 0.0)]
    for constant, closed in ((-3.0, False), (0.001, True)):
        root = Node(REFRESH | BOUND | CLIP)
        case = ([0.0, 0.0], [1.0, 4.0], [[rows[0], ([0.0], [0.0, -1.0], 3.0 + constant, 0.0)]])
        claim = Claim(steps, arrays, [case], [(0, 0, 1, root)])
        root.split(1, 1, 3.5)
        c = claim.certificate()
        assert untrue(c) == []
        # Row 1 holds where x2 < 3 + constant, row 0 where x1 + x2 > 3: the clipped box lies between.
        assert check(c).accepted is closed


def test_trees_of_one_case_and_many_cases():
    a, b = relu_claim(0), relu_claim(0, (0.3,))
    cases = [a.cases[0], b.cases[0], a.cases[0]]
    trees = [(0, 0, 2, a.trees[0][3]), (1, 0, 4, b.trees[0][3]), (0, 2, 4, a.trees[0][3]), (2, 0, 4, Node())]
    result = checker.replay(Claim(a.steps, a.arrays, cases, trees).certificate())
    assert result.proven.tolist()[:8] == [True] * 8 and not result.proven[8:].all()
    assert {tree for tree, _ in result.failed} == {3} and result.failed[0] == (3, 0)
    assert (result.margin[:8] > 0).all() and (result.margin[8:][~result.proven[8:]] <= 0).all()


def test_small_batches_change_nothing(monkeypatch):
    certificates = [relu_claim().certificate(), *(random_certificate(seed) for seed in range(30))]
    whole = [checker.replay(c) for c in certificates]
    monkeypatch.setattr(checker, "BATCH", 3)
    monkeypatch.setattr(checker, "FRAME", 1)
    monkeypatch.setattr(programs, "NUMBERS", 1)
    monkeypatch.setattr(programs, "MOST", 40)
    for c, before in zip(certificates, whole, strict=True):
        after = checker.replay(c)
        assert after.failed == before.failed and (after.proven == before.proven).all()
        assert after.margin == pytest.approx(before.margin, rel=1e-9, abs=1e-9)


def test_a_deadline_ends_the_replay():
    c = good()
    with pytest.raises(TimeoutError, match="deadline"):
        checker.replay(c, deadline=time.monotonic() - 1)
    assert checker.replay(c, deadline=time.monotonic() + 600).proven.all()
