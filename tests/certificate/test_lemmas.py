"""Lemmas about ends of neurons' intervals: nothing false is proven with them, something more, and nothing without."""

from functools import cache
from typing import Any

import numpy as np
from tests.certificate.claims import BOUND, REFRESH, Claim, Node, affine, changed, mlp
from tests.certificate.meaning import checker, evaluate_all, points, untrue
from tests.certificate.samples import tightly

from soundly.certificate import Certificate


@cache
def lemma_certificate(seed: int) -> Certificate:
    """Lemmas about two neurons of the second layer, some false by a little, with splits of the whole first one; and one
    tree."""
    rng = np.random.default_rng(seed)
    steps, arrays = mlp(rng, [2, 3, 2, 2])
    rooms = [-0.1, -0.001, 0.001, *np.linspace(0.01, 0.6, 40).tolist()]
    claim = tightly(steps, arrays, [-0.9, -0.8], [0.7, 0.9], rooms, seed)
    c = claim.certificate()
    values, offsets = evaluate_all(c, points(c, 0, rng)), np.cumsum([0, *(s["size"] for s in steps)])
    claim.trees, lemmas = [], {}
    for k in range(2):
        side = int(rng.integers(0, 2))
        end = float(values[3][:, k].max() if side else values[3][:, k].min())
        room = float(rng.choice([-0.02, 0.02, 0.1, 0.2, 0.3]))
        root = Node(REFRESH | BOUND)
        level = [root]
        for depth in range(3):
            level = [child for node in level for child in node.split(2, int(offsets[1]) + depth, 0.0, BOUND)]
            for node in level:
                node.beta = rng.choice([0, 0, 0.3], depth + 1).tolist()
        lemmas[k] = (2 * int(offsets[3] + k) + side, end + (room if side else -room))
        claim.trees.append((0, 0, 0, root))
    claim.trees.append((0, 0, len(claim.cases[0][2]), Node(REFRESH | BOUND)))
    claim.lemmas = lemmas
    return claim.certificate()


def alone(c: Certificate) -> Certificate:
    """Without the lemmas."""
    last = int(c.arrays["tree_start"][-2])
    nodes = {k: c.arrays[k][last:] for k in ("flags", "kind", "what", "at", "slopes_bound", "slopes_refresh")}
    trees = {k: c.arrays[k][-1:] for k in ("tree_case", "tree_clause", "tree_lemma", "tree_level")}
    return changed(c, **nodes, **trees, tree_start=np.array([0, len(nodes["kind"])]), beta=np.zeros(0),
                   beta_start=np.zeros(len(nodes["kind"]) + 1, int))  # fmt: skip


def test_lemmas_prove_nothing_false_and_something_more():
    more, refused = 0, 0
    for seed in range(60):
        c = lemma_certificate(seed)
        assert untrue(c, seed) == []
        result, before = checker.replay(c), checker.replay(alone(c))
        assert result.problems == before.problems == ()
        key, level = c.arrays["tree_lemma"][:-1], c.arrays["tree_level"][:-1]
        values = np.concatenate(evaluate_all(c, points(c, 0, np.random.default_rng(seed + 1))), axis=1)[:, key // 2]
        sign = 1 - 2 * (key % 2)
        false = (sign * (values - level) < 0).any(axis=0)
        assert set(np.flatnonzero(false).tolist()) <= {tree for tree, _ in result.failed}
        if result.failed and min(result.failed)[0] < len(key):
            assert not result.proven.any() and all(tree < len(key) for tree, _ in result.failed)
            refused += 1
        else:
            more += int((result.proven & ~before.proven).sum())
    assert more > 5 and refused > 5


def necks(level: float, case: int) -> Certificate:
    """h = relu(x) - x / 2 and y = relu(h) - h in two equal cases; that y is 0, up to a millionth, follows if h is at
    least `level`, as a lemma says in one of them. It is at least 0, as its two halves show."""
    steps = [
        {"step": "variable", "size": 1},
        affine(1, 1, [{"map": "matrix", "from": 0, "array": "one", "blocks": 1}], "b"),
        {"step": "function", "from": 1, "size": 1, "function": "relu"},
        affine(3, 1, [{"map": "matrix", "from": 2, "array": "one", "blocks": 1},
                      {"map": "matrix", "from": 0, "array": "half", "blocks": 1}], "b"),
        {"step": "function", "from": 3, "size": 1, "function": "relu"},
        affine(5, 1, [{"map": "matrix", "from": 4, "array": "one", "blocks": 1},
                      {"map": "matrix", "from": 3, "array": "less", "blocks": 1}], "b"),
    ]  # fmt: skip
    arrays = {name: np.full((1, 1), v) for name, v in (("one", 1.0), ("half", -0.5), ("less", -1.0))}
    cases = [([-1.0], [0.9], [[([-1.0], [0.0], 1e-6, 0.0)]])] * 2
    root = Node(REFRESH | BOUND)
    root.split(2, 1, 0.0, BOUND)
    trees = [(case, 0, 0, root), (0, 0, 1, Node()), (1, 0, 1, Node())]
    return Claim(steps, arrays | {"b": np.zeros(1)}, cases, trees, lemmas={0: (2 * 3, level)}).certificate()


def misplaced_lemmas(with_: Any) -> bool:
    """Whether the checker is wrong about where a lemma's end lies, or in which case it holds."""
    found = [with_.replay(necks(*lemma)) for lemma in ((-1e-7, 0), (-1e-7, 1), (1e-7, 0))]
    proven, failed = [r.proven.tolist() for r in found], [r.failed for r in found]
    return proven != [[True, False], [False, True], [False, False]] or failed != [[(2, 0)], [(1, 0)], [(0, 1), (0, 2)]]


def test_lemmas_hold_in_their_case_and_end_where_they_should():
    assert not misplaced_lemmas(checker)
