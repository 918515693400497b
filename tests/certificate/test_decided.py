"""Splits of neurons whose sign a clause's own row says: the other half is done, and no half that it does not say."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.certificate.claims import BOUND, REFRESH, Claim, Node, affine
from tests.certificate.meaning import checker, untrue

from soundly.certificate import Certificate


def signed(
    rows: list[list[tuple[dict[int, float], float, float]]], bounded: int, *, at: float = 0.0, function: str = "relu",
    of_v: float = 1.0, of_x: float = 0.0, bias: float = 0.0, bias_error: float = 0.0, weight_error: float = 0.0,
    apart: bool = False,
) -> Certificate:  # fmt: skip
    """A value v = x on [-1, 1], split at a number, of which only one half is bounded (-1 the left). The outputs are
    of_v v + of_x x + bias, f(v) and v; rows by clause: coefficients of outputs (3: the input), constant, slack.
    The clauses have one tree, or, if they are `apart`, one each."""
    matrix: dict[str, Any] = {"map": "matrix", "blocks": 1}
    steps = [
        {"step": "variable", "size": 1}, affine(1, 1, [{**matrix, "from": 0, "array": "w"}], "b"),
        {"step": "function", "from": 1, "size": 1, "function": function},
        affine(3, 3, [{**matrix, "from": 0, "array": "w0"}, {**matrix, "from": 2, "array": "w2"},
                      {**matrix, "from": 1, "array": "w1"}], "d"),
    ]  # fmt: skip
    arrays = {"w": np.ones((1, 1)), "b": np.zeros(1), "w1": np.array([[of_v], [0], [1]]), "d": np.array([bias, 0, 0]),
              "w2": np.array([[0.0], [1], [0]]), "w0": np.array([[of_x], [0], [0]])}  # fmt: skip
    if bias_error:
        steps[-1]["bias_error"], arrays["e"] = "e", np.array([bias_error, 0, 0])
    if weight_error:
        steps[-1]["weight_error"], arrays["f"] = "f", np.array([weight_error])
    unit = np.eye(4)
    clauses = []
    for clause in rows:
        full = [(sum(c * unit[k] for k, c in row.items()), b, s) for row, b, s in clause]
        clauses.append([(v[:3], v[3:], b, s) for v, b, s in full])
    trees = []
    for first in range(len(clauses) if apart else 1):
        root = Node(REFRESH)
        left, right = root.split(2, 1, at, 0)
        (left if bounded < 0 else right).flags = REFRESH | BOUND
        trees.append((0, first, first + 1 if apart else len(clauses), root))
    return Claim(steps, arrays, [(-np.ones(1), np.ones(1), clauses)], trees).certificate()


LEFT = ({1: -1.0}, 0.3, 0.0)  # 0.3 - f(v): positive where v <= 0
RIGHT = ({2: 1.0}, 0.3, 0.0)  # v + 0.3: positive where v >= 0


def says(k: float, b: float = 0.0, slack: float = 0.0) -> tuple[dict[int, float], float, float]:
    return {0: k}, b, slack


@cache
def decided() -> dict[str, tuple[Certificate, bool]]:
    """Claims with one half bounded, and whether the other one needs no bound."""
    return {
        "v <= 0": (signed([[LEFT, says(1.0)]], -1), True),
        "2 v <= 0": (signed([[LEFT, says(2.0)]], -1), True),
        "-v >= 0": (signed([[LEFT, says(-1.0)]], -1, of_v=-1.0), True),
        "v >= 0": (signed([[RIGHT, says(-1.0)]], 1), True),
        "nearly v <= 0": (signed([[LEFT, says(1.0)]], -1, weight_error=1e-6), True),
        "v >= 0, the other half": (signed([[LEFT, says(-1.0)]], -1), False),
        "-v <= 0": (signed([[LEFT, says(1.0)]], -1, of_v=-1.0), False),
        "v <= 1/2 by the constant": (signed([[LEFT, says(1.0, -0.5)]], -1), False),
        "v <= 1/2 by the slack": (signed([[LEFT, says(1.0, 0.0, 0.5)]], -1), False),
        "v <= 1/2 by the bias": (signed([[LEFT, says(1.0)]], -1, bias=-0.5), False),
        "v <= 1/2, perhaps": (signed([[LEFT, says(1.0)]], -1, bias_error=0.5), False),
        "perhaps 0 <= 0": (signed([[LEFT, says(1.0)]], -1, weight_error=1.0), False),
        "v - 2 x <= 0": (signed([[LEFT, says(1.0)]], -1, of_x=-2.0), False),
        "-v - 2 x <= 0": (signed([[LEFT, says(1.0)]], -1, of_v=-1.0, of_x=-2.0), False),
        "v - 2 f(v) <= 0": (signed([[LEFT, ({0: 1.0, 1: -2.0}, 0.0, 0.0)]], -1), False),
        "v - 2 x <= 0 by the row": (signed([[LEFT, ({0: 1.0, 3: -2.0}, 0.0, 0.0)]], -1), False),
        "-x <= 0": (signed([[LEFT, ({3: -1.0}, 0.0, 0.0)]], -1), False),
        "another clause": (signed([[LEFT], [LEFT, says(1.0)]], -1), False),
        "a clause of another tree": (signed([[LEFT, says(1.0)], [LEFT]], -1, apart=True), False),
        "split elsewhere": (signed([[({2: -1.0}, -0.3, 0.0), says(1.0)]], -1, at=-0.5), False),
        "at a jump": (signed([[({1: -1.0}, 0.5, 0.0), says(1.0)]], -1, function="step"), False),
    }


@pytest.mark.parametrize("name", decided())
def test_what_a_row_says_closes_one_half(name):
    c, true = decided()[name]
    assert checker.replay(c).proven.all() == true
    assert not untrue(c, 0)


def wrong(name: str, with_: Any = checker) -> bool:
    c, true = decided()[name]
    return bool(with_.replay(c).proven.all()) is not true
