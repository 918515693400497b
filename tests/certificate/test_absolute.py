"""Absolute values bounded together: nothing false is proven, more than one by one, and norms are never too small."""

import importlib
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from tests.certificate.claims import BOUND, CLIP, REFRESH, SUMMED, Claim, Node, affine, changed
from tests.certificate.meaning import checker, evaluate, points, untrue
from tests.certificate.samples import tightly

from soundly.certificate import Certificate

absolute = importlib.import_module("soundly.certificate.absolute")
intervals = importlib.import_module("soundly.certificate.intervals")


def sums_claim(seed: int, summed: bool = True) -> Claim:
    """Sums and differences of absolute values behind a hidden layer, claimed to be near the least that they are."""
    rng = np.random.default_rng(seed)
    n, hidden, m = int(rng.integers(2, 6)), int(rng.integers(2, 5)), int(rng.integers(2, 9))
    steps: list[dict] = [{"step": "variable", "size": n}]
    arrays: dict[str, np.ndarray] = {}

    def add(size: int, *sources: int) -> None:
        i, parts = len(steps), []
        for k, source in enumerate(sources):
            parts.append({"map": "matrix", "from": source, "array": f"w{i}.{k}", "blocks": 1})
            arrays[f"w{i}.{k}"] = rng.standard_normal((size, steps[source]["size"]))
        arrays[f"b{i}"] = rng.standard_normal(size) * 0.1
        steps.append(affine(i, size, parts, f"b{i}"))

    add(hidden, 0)
    steps.append({"step": "function", "from": 1, "size": hidden, "function": "relu" if seed % 3 else "tanh"})
    add(m, 2, 0)
    names = ["absolute", "twice", "negated"]
    steps.append({"step": "function", "from": 3, "size": m, "function": names[seed % 3]})
    steps.append({"step": "function", "from": 3, "size": m, "function": names[(seed // 3) % 3]})
    add(2, 4, 5, *([0] if seed % 2 else []))
    arrays["w6.0"] = np.abs(arrays["w6.0"])
    if seed % 4 == 0:
        steps[3]["weight_error"], arrays["error"] = "error", np.array([1e-3])
    centre, radius = rng.standard_normal(n) * 0.3, rng.choice([0.05, 0.3, 1.0], n)
    ball = ("l2" if seed % 2 else "l1", centre, 1.2 * radius) if seed % 5 == 1 else None
    claim = tightly(steps, arrays, centre - radius, centre + radius, (-1e-3, 0.3, 1.0, 3.0), seed, ball)
    flags = REFRESH | BOUND | (SUMMED if summed else 0) | (CLIP if seed % 6 == 4 else 0)
    root = Node(flags)
    claim.trees = [(0, 0, len(claim.cases[0][2]), root)]
    if seed % 2:
        first = int(steps[0]["size"])
        claim.slots = [2 * (first + hidden + k) for k in range(hidden)]
        claim.slopes = rng.random((4, hidden))
        start = first + 2 * hidden
        claim.groups = [{2 * (start + k) + side: int(rng.integers(4)) for k in range(m) for side in (0, 1)}]
        root.slopes_refresh, root.slopes_bound = 0, 1
    if seed % 3 == 2:
        for child in root.split(2, n, 0.0, flags):
            child.beta = [float(rng.random())]
    return claim


@cache
def sums_certificate(seed: int) -> Certificate:
    return sums_claim(seed).certificate()


def test_absolute_values_bounded_together_prove_nothing_false_and_all_that_they_prove_alone():
    for seed in range(12):
        c = sums_certificate(seed)
        assert not checker.replay(c).problems and untrue(c, seed) == []
        alone = checker.replay(sums_claim(seed, summed=False).certificate())
        assert (checker.replay(c).proven >= alone.proven).all()


def rotated(limit: float, flags: int) -> Certificate:
    """|x + y| + |x - y| < limit on [-1, 1]^2: 2 at most, 4 for one after the other, 2 sqrt 2 for unit vectors."""
    steps: list[dict] = [{"step": "variable", "size": 2}]
    steps.append(affine(1, 2, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b"))
    steps.append({"step": "function", "from": 1, "size": 2, "function": "absolute"})
    arrays = {"w": np.array([[1.0, 1.0], [1.0, -1.0]]), "b": np.zeros(2)}
    case = (-np.ones(2), np.ones(2), [[(-np.ones(2), np.zeros(2), limit, 0.0)]])
    return Claim(steps, arrays, [case], [(0, 0, 1, Node(flags))]).certificate()


def test_bounded_together_they_prove_more():
    both, alone = REFRESH | BOUND | SUMMED, REFRESH | BOUND
    assert checker.replay(rotated(2.8285, both)).proven.all() and not checker.replay(rotated(2.8284, both)).proven.any()
    assert (
        checker.replay(rotated(4.0001, alone)).proven.all() and not checker.replay(rotated(3.9999, alone)).proven.any()
    )


def untrue_sums() -> dict[str, Certificate]:
    """|relu(x) - 1/4| < 0.7 on [-1, 1], and |w x| < 1.4 there, where w is 1 up to a half: neither is so."""
    found = {}
    for name, limit in (("ramp", 0.7), ("uncertain", 1.4)):
        steps = [{"step": "variable", "size": 1}, {"step": "function", "from": 0, "size": 1, "function": "relu"}]
        source = 1 if name == "ramp" else 0
        steps.append(affine(2, 1, [{"map": "matrix", "from": source, "array": "w", "blocks": 1}], "b"))
        steps.append({"step": "function", "from": 2, "size": 1, "function": "absolute"})
        arrays = {"w": np.ones((1, 1)), "b": np.zeros(1), "error": np.array([0.5])}
        if name == "ramp":
            arrays["b"] = np.array([-0.25])
            del arrays["error"]
        else:
            steps[2]["weight_error"] = "error"
        case = (-np.ones(1), np.ones(1), [[(-np.ones(1), np.zeros(1), limit, 0.0)]])
        node = Node(REFRESH | BOUND | SUMMED)
        found[name] = Claim(steps, arrays, [case], [(0, 0, 1, node)]).certificate()
    return found


@pytest.mark.parametrize("name", untrue_sums())
def test_what_single_inputs_and_weights_refute_is_not_proven(name):
    replay = checker.replay(untrue_sums()[name])
    assert not replay.problems and not replay.proven.any()


def test_where_there_are_too_many_numbers_they_are_bounded_one_by_one(monkeypatch):
    monkeypatch.setattr(intervals, "NUMBERS", 0)
    for seed in range(6):
        alone = checker.replay(sums_claim(seed, summed=False).certificate())
        assert np.array_equal(checker.replay(sums_certificate(seed)).proven, alone.proven)


def escaped(seed: int, with_: Any = checker) -> bool:
    """Whether at a sample a row is below the bound of a pass, or the pass says something of it without its sums."""
    c = sums_claim(seed).certificate()
    proof = with_.read(c)
    box, none = (proof.lower, proof.upper), np.full(1, -1)
    frame, _ = with_.refresh(proof.program, *box, None, none, proof.stored)
    view = with_.View(proof.program, frame, frame.pieces, *box, ball=proof.program.ball)
    view = with_.replace(view, absolute=with_.around(view, -1, proof.stored, np.inf))
    last, y = len(proof.program.steps) - 1, points(c, 0, np.random.default_rng(seed))
    rows = np.concatenate([np.eye(2), -np.eye(2), -np.ones((1, 2))])
    bound, _, before = view.backward({last: rows.copy()}, np.zeros(len(rows), int))
    values = evaluate(c, y) @ rows.T
    return bool(np.isfinite(before.lower()).any()) or bool((values.min(axis=0, initial=np.inf) < bound - 1e-9).any())


def test_no_row_is_below_its_bound():
    assert not any(escaped(seed) for seed in range(40))


def matrices(seed: int) -> np.ndarray:
    """Matrices of rank one, of signs, of small and large numbers, with rows and columns of zeros."""
    rng = np.random.default_rng(seed)
    m, n = int(rng.integers(1, 6)), int(rng.integers(1, 9))
    b = rng.standard_normal((m, n))
    if seed % 4 == 0:
        b = np.outer(b[:, 0], rng.standard_normal(n))
    elif seed % 4 == 1:
        b = np.sign(b)
    elif seed % 4 == 2:
        b *= 10.0 ** rng.integers(-12, 12, (m, n))
    if seed % 3 == 0:
        b[rng.integers(m)] = 0
    return b * 10.0 ** float(rng.choice([-200, 0, 0, 200]))


def greatest(b: np.ndarray) -> Fraction:
    """The greatest <s, b z>: with the best z for every choice of signs s, in rational arithmetic."""
    exact = [[Fraction(float(v)) for v in row] for row in b]
    signs = product((1, -1), repeat=len(b) - 1)
    return max(sum(abs(sum(t * v for t, v in zip((1, *s), column, strict=True))) for column in zip(*exact, strict=True))
               for s in signs)  # fmt: skip


def too_small(with_: Any, *seeds: int) -> Iterator[str]:
    for seed in seeds:
        found = with_.norm(matrices(seed))
        if not np.isfinite(found) or Fraction(found) < greatest(matrices(seed)):
            yield f"matrix {seed}"


def test_a_norm_is_never_too_small_nor_much_too_large():
    assert list(too_small(absolute, *range(120))) == []
    for seed in range(120):
        b = matrices(seed)
        assert absolute.norm(b) <= 1.6 * float(greatest(b)) + 1e-80 * (np.abs(b).max() or 1.0)
        if seed % 4 == 0:  # where the best is known
            assert absolute.norm(b) == pytest.approx(float(greatest(b)), rel=1e-9)
    assert absolute.norm(np.array([[1.0, np.inf]])) == np.inf and absolute.norm(np.array([[np.nan]])) == np.inf
    assert 0 <= absolute.norm(np.zeros((2, 3))) < 1e-80


@pytest.mark.parametrize("lie", ["vectors", "values", "fails"])
def test_norms_do_not_rest_on_eigenvalues(monkeypatch, lie):
    true = np.linalg.eigh

    def eigh(m: np.ndarray) -> Any:
        if lie == "fails":
            raise np.linalg.LinAlgError("no convergence")
        values, vectors = true(m)
        return (values, vectors[::-1]) if lie == "vectors" else (0.1 * values, vectors)

    monkeypatch.setattr(np.linalg, "eigh", eigh)
    assert list(too_small(absolute, *range(60))) == []


def wrong_flags() -> dict[str, Certificate]:
    """Nodes whose absolute values cannot be bounded together."""
    c = sums_certificate(0)
    plain = Claim(
        [{"step": "variable", "size": 1}, affine(1, 1, [], "b")], {"b": np.ones(1)},
        [(np.zeros(1), np.ones(1), [[(np.ones(1), np.zeros(1), 0.0, 0.0)]])], [(0, 0, 1, Node(REFRESH | BOUND))],
    ).certificate()  # fmt: skip
    return {
        "sums that are not bounded": changed(c, flags=np.array([REFRESH | SUMMED])),
        "sums without absolute values": changed(plain, flags=np.array([REFRESH | BOUND | SUMMED])),
        "an unknown flag": changed(c, flags=np.array([REFRESH | BOUND | 32])),
    }


@pytest.mark.parametrize("name", wrong_flags())
def test_flags_that_do_not_fit_are_refused(name):
    assert "flags" in checker.replay(wrong_flags()[name]).problems[0]
