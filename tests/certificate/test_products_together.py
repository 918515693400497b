"""Products bounded together: nothing false is proven, more than with planes of their own, and roundings are paid."""

import importlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from tests.certificate.claims import BOUND, CLIP, REFRESH, TOGETHER, Claim, Node, affine
from tests.certificate.meaning import checker, evaluate_all, points, untrue
from tests.certificate.samples import tightly

from soundly.certificate import Certificate

products = importlib.import_module("soundly.certificate.products")


def quadratic_claim(seed: int, together: bool = True, rooms: Sequence[float] = (-0.1, -1e-3, 0.003, 0.03)) -> Claim:
    """Quadratic forms in inputs and a hidden layer, with claims near the least values that they take."""
    rng = np.random.default_rng(seed)
    n, hidden, m = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 4))
    function = ["relu", "tanh", "square"][seed % 3]
    steps: list[dict] = [{"step": "variable", "size": n}]
    arrays: dict[str, np.ndarray] = {}

    def add(i: int, size: int, sources: Sequence[int]) -> None:
        parts = []
        for k, source in enumerate(sources):
            parts.append({"map": "matrix", "from": source, "array": f"w{i}.{k}", "blocks": 1})
            arrays[f"w{i}.{k}"] = rng.standard_normal((size, steps[source]["size"]))
        arrays[f"b{i}"] = rng.standard_normal(size) * 0.3
        steps.append(affine(i, size, parts, f"b{i}"))

    add(1, hidden, [0])
    steps.append({"step": "function", "from": 1, "size": hidden, "function": function})
    steps.append({"step": "function", "from": 1, "size": hidden, "function": "tanh"})
    add(4, m, [0, 2])
    add(5, m, [3, 0] if seed % 2 else [4])
    steps.append({"step": "times", "size": m, "left": 4, "right": 4 if rng.random() < 0.3 else 5})
    steps.append({"step": "times", "size": n, "left": 0, "right": 0})
    add(8, 2, [6, 7, 0] if seed % 4 else [6])
    centre, radius = rng.standard_normal(n) * 0.5, rng.choice([0.01, 0.1, 0.4], n)
    claim = tightly(steps, arrays, centre - radius, centre + radius, rooms, seed)
    flags = REFRESH | BOUND | (TOGETHER if together else 0)
    root = Node(flags)
    claim.trees = [(0, 0, len(claim.cases[0][2]), root)]
    if seed % 5 == 0:
        root.flags |= CLIP
        for child in root.split(1, 0, float(centre[0]), flags | CLIP):
            child.split(1, n - 1, float(centre[n - 1]), flags)
    return claim


def square_of_uncertain() -> Certificate:
    """(w x)^2 < 1.7 on [0, 1], where w is 1 up to a half: not so."""
    steps = [
        {"step": "variable", "size": 1},
        {**affine(1, 1, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b"), "weight_error": "f"},
        {"step": "times", "size": 1, "left": 1, "right": 1},
        affine(3, 1, [{"map": "matrix", "from": 2, "array": "w", "blocks": 1}], "b"),
    ]
    arrays = {"w": np.ones((1, 1)), "b": np.zeros(1), "f": np.array([0.5])}
    case = (np.zeros(1), np.ones(1), [[(-np.ones(1), np.zeros(1), 1.7, 0.0)]])
    return Claim(steps, arrays, [case], [(0, 0, 1, Node(REFRESH | BOUND | TOGETHER))]).certificate()


@cache
def quadratic_certificate(seed: int) -> Certificate:
    return quadratic_claim(seed).certificate()


def test_products_bounded_together_prove_nothing_false_and_something_more():
    alone = both = 0
    for seed in range(60):
        c = quadratic_certificate(seed)
        assert not checker.replay(c).problems and untrue(c, seed) == []
        both += int(checker.replay(c).proven.sum())
        alone += int(checker.replay(quadratic_claim(seed, together=False).certificate()).proven.sum())
    assert both > 1.15 * alone > 0


def forms_of_squares(seed: int, size: int = 5) -> np.ndarray:
    """Quadratic forms whose least values on the cube are 0, up to roundings, or known from their corners."""
    rng = np.random.default_rng(seed)
    v = rng.standard_normal((40, int(rng.integers(1, size)), size)).astype("f4").astype(float)
    q = v.transpose(0, 2, 1) @ v
    q[::2] -= rng.choice([0, 0.1, 1.0], (20, 1, 1)) * np.eye(size)
    return q


def exactly(q: np.ndarray, e: Sequence[Fraction]) -> Fraction:
    terms = ((Fraction(float(q[i, j])), i, j) for i in range(len(e)) for j in range(len(e)))
    return sum((c * e[i] * e[j] for c, i, j in terms), Fraction(0))


def above_least(with_: Any, *seeds: int) -> Iterator[str]:
    """Bounds of quadratic forms that points of the cube lie below, in rational arithmetic."""
    for seed in seeds:
        q = forms_of_squares(seed)
        bound, lost = with_.least(q.copy())
        _, vectors = np.linalg.eigh(q)
        for i, (b, error) in enumerate(zip(bound.tolist(), lost.tolist(), strict=True)):
            rng = np.random.default_rng(i)
            corners = rng.choice([-1.0, 1.0], (20, 5))
            flat = vectors[i].T / np.abs(vectors[i]).max()
            for e in (*corners, *flat, *rng.uniform(-1, 1, (5, 5))):
                if exactly(q[i], [Fraction(float(t)) for t in e]) < Fraction(b) - Fraction(error):
                    yield f"form {seed}, {i} at {e}"


def test_quadratic_forms_are_bounded_from_below_and_squares_by_zero():
    assert list(above_least(products, *range(12))) == []
    squares = forms_of_squares(1)[1::2]
    bound, lost = products.least(squares)
    assert (bound - lost > -1e-12).all()


def factor_escaped(seed: int, with_: Any = checker) -> bool:
    """Whether a factor, or the sum or difference of a product's two, leaves the form with shared symbols."""
    c = quadratic_certificate(seed)
    proof, none = with_.read(c), np.full(1, -1)
    box = proof.lower, proof.upper
    frame, _ = with_.refresh(proof.program, *box, None, none, proof.stored, forms=True, together=True)
    values = evaluate_all(c, points(c, 0, np.random.default_rng(seed)))
    for i, (u, v) in frame.factors.items():
        step = c.header["program"][i]
        for sign in (0, 1, -1):
            value = values[step["left"]] + sign * values[step["right"]]
            centre, generators = u.centre + sign * v.centre, u.generators + sign * v.generators
            wide = np.abs(generators).sum(axis=1) + u.rest + abs(sign) * v.rest
            if (np.abs(value - centre) > wide + 1e-9).any():
                return True
    return False


def test_factors_stay_within_forms_that_share_symbols():
    assert not any(factor_escaped(seed) for seed in range(60))
