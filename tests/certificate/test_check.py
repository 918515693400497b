"""The checker against exact rational arithmetic, and against itself with faults planted in it."""

import ast
import ctypes
import dataclasses
import hashlib
import importlib
import math
import platform
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soundly.certificate import Certificate, CheckResult, check, head_edit
from soundly.errors import CertificateError

checker = importlib.import_module("soundly.certificate.check")
Check = Callable[[Certificate], CheckResult]
NAMES = {"float32": "float32", "float64": "float64", "uint16": "bfloat16"}


def certificate(vectors, weights, *, values=None, rows=None, lower=None, upper=None, **changes) -> Certificate:
    """A certificate with one claim per row.

    `values` lists (vector, class), by default every vector with class 0; a row lists (coefficient, value), by default
    there is one row for each value.
    """
    vectors, weights = np.atleast_2d(vectors), np.atleast_2d(weights)
    values = [(v, 0) for v in range(len(vectors))] if values is None else list(values)
    rows = [[(1.0, t)] for t in range(len(values))] if rows is None else rows
    m = len(rows)
    return head_edit(**{
        "vectors": vectors,
        "value_vector": np.array([v for v, _ in values], int),
        "value_class": np.array([c for _, c in values], int),
        "classes": np.arange(len(weights)) * 3,
        "weights": weights,
        "bf16": weights.dtype == np.uint16,
        "row_start": np.cumsum([0, *map(len, rows)]),
        "row_value": np.array([t for row in rows for _, t in row], int),
        "row_coefficient": np.array([c for row in rows for c, _ in row], float),
        "lower": np.full(m, -np.inf) if lower is None else np.array(lower, float),
        "upper": np.full(m, np.inf) if upper is None else np.array(upper, float),
        "margin": np.zeros(m),
        "error": np.zeros(m),
        "claims": [{"name": f"row {i}", "rows": [i, i + 1]} for i in range(m)],
        "model": {"before": "0" * 64, "after": "1" * 64, "layer": "fc", "dtype": NAMES.get(str(weights.dtype), "?")},
        "made_with": {"soundly": "0"},
        **changes,
    })  # fmt: skip


def replaced(c: Certificate, header: Mapping[str, Any] | None = None, **arrays: Any) -> Certificate:
    """The certificate with some arrays or header entries exchanged, and nothing else repaired."""
    return Certificate({**c.header, **(header or {})}, {**c.arrays, **arrays})


def exactly(array: np.ndarray) -> list[Any]:
    """Nested lists of rationals; bfloat16 decoded by struct, independently of the checker."""
    if array.ndim > 1:
        return [exactly(row) for row in array]
    if array.dtype == np.uint16:
        return [Fraction(struct.unpack("<f", struct.pack("<I", int(bits) << 16))[0]) for bits in array]
    return [Fraction(float(x)) for x in array]


def exact_rows(c: Certificate) -> tuple[list[Fraction], list[Fraction]]:
    """Every row, and the sum of the absolute values of its terms, in rational arithmetic."""
    vectors, weights = exactly(c.arrays["vectors"]), exactly(c.arrays["weights"])
    coefficients, start = exactly(c.arrays["row_coefficient"]), c.arrays["row_start"].tolist()
    values, sizes = [], []
    for begin, end in pairwise(start):
        terms = []
        for k in range(begin, end):
            t = int(c.arrays["row_value"][k])
            vector, weight = vectors[int(c.arrays["value_vector"][t])], weights[int(c.arrays["value_class"][t])]
            terms += [coefficients[k] * x * w for x, w in zip(vector, weight, strict=True)]
        values.append(sum(terms, Fraction(0)))
        sizes.append(sum(map(abs, terms), Fraction(0)))
    return values, sizes


def inside(value: Fraction, lower: float, upper: float) -> bool:
    """lower <= value <= upper. Python compares a rational with a float exactly, infinities included."""
    return bool(lower <= value <= upper)


def nearest(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return float(np.finfo(float).max) if value > 0 else -float(np.finfo(float).max)


def ulps(x: float, steps: int) -> float:
    for _ in range(abs(steps)):
        x = math.nextafter(x, math.copysign(math.inf, steps))
    return x


def numbers(rng: np.random.Generator, kind: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    x = rng.standard_normal(shape)
    low, high = {"float32": (-149, 127), "uint16": (-133, 127), "float64": (-1074, 1000)}[dtype]
    match kind:
        case "tiny":
            x = np.ldexp(x, rng.integers(low, low // 2, shape))
        case "huge":
            x = np.ldexp(x, rng.integers(high // 2 - 10, high // 2 + 10, shape))
        case "mixed":
            x = np.ldexp(x, rng.integers(low // 2, high // 2, shape))
        case "cancelling" if shape[-1] > 1:
            x[..., 1::2] = -x[..., : shape[-1] - 1 : 2] * (1 + rng.choice([0, 2.0**-50], x[..., 1::2].shape))
        case "stagnating":
            x = np.where(np.arange(shape[-1]) == 0, 1.0, 2.0**-53 * np.ones(shape))
    if dtype == "uint16":
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(dtype)


KINDS = ("plain", "tiny", "huge", "mixed", "cancelling", "stagnating")


def hard_certificate(seed: int) -> Certificate:
    """Random rows whose bounds lie within a few ulps of the true value, on either side of it."""
    rng = np.random.default_rng(seed)
    kind, n, v, c = KINDS[seed % 6], int(rng.integers(1, 8)), int(rng.integers(1, 6)), int(rng.integers(1, 4))
    vectors = numbers(rng, kind, (v, n), str(rng.choice(["float32", "float64"])))
    weights = numbers(rng, kind, (c, n), str(rng.choice(["float32", "float64", "uint16"])))
    if kind == "stagnating":  # 1 + u + u + ... = 1 in float64: every rounding errs in the same direction
        vectors, weights = vectors.astype(float), np.ones((c, n), np.float32)
    s = int(rng.integers(1, 9))
    pairs = list(zip(rng.integers(0, v, s).tolist(), rng.integers(0, c, s).tolist(), strict=True))
    rows = []
    for _ in range(6):
        k = int(rng.integers(1, 60 if kind == "stagnating" else 4))
        coefficient = numbers(rng, "tiny" if kind == "huge" else "huge" if kind == "tiny" else kind, (k,), "float64")
        rows.append(list(zip(coefficient.tolist(), rng.integers(0, s, k).tolist(), strict=True)))
    blank = certificate(vectors, weights, values=pairs, rows=rows)
    near = [nearest(value) for value in exact_rows(blank)[0]]
    side = rng.integers(0, 3, len(rows))
    lower = [ulps(x, int(rng.integers(-4, 5))) if b != 0 else -np.inf for x, b in zip(near, side, strict=True)]
    upper = [ulps(x, int(rng.integers(-4, 5))) if b != 1 else np.inf for x, b in zip(near, side, strict=True)]
    return replaced(blank, lower=np.array(lower), upper=np.array(upper))


def good() -> Certificate:
    """Three rows, five values, four vectors (the last unused) and two classes; proven with room to spare."""
    vectors = np.array([[1, 2, 1], [3, -1, 1], [0.5, 0.25, 0], [9, 9, 9]], np.float32)
    weights = np.array([[1, 1, 0.5], [2, -1, 0]], np.float32)
    values = [(1, 1), (0, 0), (2, 0), (1, 0), (0, 1)]  # 7, 3.5, 0.75, 2.5, 0
    rows = [[(1.0, 1), (-1.0, 0)], [(2.0, 2)], [(1.0, 3), (1.0, 4)]]  # -3.5, 1.5, 2.5
    return certificate(vectors, weights, values=values, rows=rows, lower=[-4, 1, 2], upper=[-3, 2, np.inf])


def untrue() -> dict[str, Certificate]:
    """Well-formed certificates with rows that do not hold, or that float64 cannot decide."""
    c = good()

    def times(factor: float) -> np.ndarray:
        return c.arrays["vectors"] * np.where(np.arange(12).reshape(4, 3) == 4, factor, 1).astype("f4")

    return {
        "lower +inf": replaced(c, lower=np.array([-4, 1, np.inf])),
        "last row violated": replaced(c, lower=np.array([-4, 1, 2.75])),
        "first row violated": replaced(c, lower=np.array([-3.4, 1, 2])),
        "NaN vector": replaced(c, vectors=times(np.nan)),
        "infinite vector": replaced(c, vectors=times(np.inf)),
        "NaN coefficient": replaced(c, row_coefficient=np.array([1, -1, np.nan, 1, 1])),
        "overflow": replaced(c, row_coefficient=np.array([1e308, -1e308, 1, 1e308, 1])),
        "class flipped": replaced(c, value_class=np.array([0, 0, 0, 0, 1])),
        "two classes swapped": replaced(c, value_class=np.array([0, 1, 0, 0, 1])),
        "vector off by one": replaced(c, value_vector=np.array([2, 0, 2, 1, 0])),
        "every vector off by one": replaced(c, value_vector=c.arrays["value_vector"] + 1),
        "value off by one": replaced(c, row_value=np.array([1, 0, 3, 3, 4])),
    }  # fmt: skip


def malformed() -> dict[str, Certificate]:
    """Certificates that claim nothing, too much, or nonsense. Each must be refused with a problem that says so."""
    c = good()
    a, infinite, claims = c.arrays, np.full(3, np.inf), c.header["claims"]

    def spans(*rows: list[int]) -> dict[str, Any]:
        return {"claims": [{"name": "x", "rows": list(row)} for row in rows]}

    def weights(w: np.ndarray) -> Certificate:
        return replaced(c, {"edit": hashlib.sha256(w.tobytes()).hexdigest()}, weights=w)

    empty = {name: np.empty(0) for name in ("lower", "upper", "margin", "error")}
    return {
        "no rows": replaced(c, {"claims": []}, **empty, row_start=np.zeros(1, int), row_value=np.zeros(0, int),
                            row_coefficient=np.zeros(0)),
        "no bounds": replaced(c, lower=-infinite, upper=infinite),
        "one row without bounds": replaced(c, lower=np.array([-4, 1, -np.inf])),
        "NaN bounds": replaced(c, upper=np.array([np.nan, 2, 8])),
        "infinite weights": weights(np.array([[1, 1, 0.5], [2, -1, np.inf]], np.float32)),
        "weights not those of the edit": replaced(c, weights=a["weights"] + np.float32(2**-20)),
        "weights not those of the edit, unused class": replaced(
            certificate([[1.0]], np.array([[1.0], [1.0]]), lower=[0.5]), weights=np.array([[1.0], [2.0]])),
        "class out of range": replaced(c, value_class=np.array([1, 0, 0, 0, 2])),
        "class negative": replaced(c, value_class=np.array([-1, 0, 0, 0, 1])),
        "class far negative": replaced(c, value_class=np.array([1, 0, 0, 0, -(2**63)])),
        "vector out of range": replaced(c, value_vector=np.array([1, 0, 2, 1, 4])),
        "vector negative": replaced(c, value_vector=np.array([1, 0, -2, 1, 0])),
        "value out of range": replaced(c, row_value=np.array([1, 0, 2, 3, 5])),
        "value negative": replaced(c, row_value=np.array([1, 0, 2, 3, -1])),
        "an unused value out of range": replaced(
            c, value_vector=np.array([1, 0, 2, 1, 0, 4]), value_class=np.array([1, 0, 0, 0, 1, 0])),
        "vectors and classes of different values": replaced(c, value_class=np.array([1, 0, 0, 0, 1, 0])),
        "class index negative": replaced(c, classes=np.array([-3, 3])),
        "same class twice": replaced(c, classes=np.array([3, 3])),
        "row_start decreases": replaced(c, row_start=np.array([0, 3, 2, 5])),
        "row_start overflows": replaced(c, row_start=np.array([0, 2**63 - 1, -(2**63), 5])),
        "row_start begins late": replaced(c, row_start=np.array([1, 2, 3, 5])),
        "row_start ends early": replaced(c, row_start=np.array([0, 2, 3, 4])),
        "row_start too short": replaced(c, row_start=np.array([0, 2, 5])),
        "gap between claims": replaced(c, spans([0, 1], [2, 3])),
        "claims overlap": replaced(c, spans([0, 2], [1, 3])),
        "claims miss the last row": replaced(c, spans([0, 2])),
        "claims begin late": replaced(c, spans([1, 3])),
        "claims end late": replaced(c, spans([0, 4])),
        "empty claim": replaced(c, spans([0, 0], [0, 3])),
        "claims backwards": replaced(c, spans([1, 3], [0, 1])),
        "claims not integers": replaced(c, {"claims": [{"name": "x", "rows": [False, 3]}]}),
        "claims without name": replaced(c, {"claims": [{"rows": [0, 3]}]}),
        "claims with more": replaced(c, {"claims": [{"name": "x", "rows": [0, 3], "given": "no rain"}]}),
        "claims missing": Certificate({k: v for k, v in c.header.items() if k != "claims"}, a),
        "claims no list": replaced(c, {"claims": {"x": [0, 3]}}),
        "header with more": replaced(c, {"assumptions": "none"}),
        "another arithmetic": replaced(c, {"arithmetic": "in every floating-point arithmetic"}),
        "another dtype": replaced(c, {"model": {**c.header["model"], "dtype": "bfloat16"}}),
        "model missing": replaced(c, {"model": None}),
        "array missing": Certificate(c.header, {k: v for k, v in a.items() if k != "error"}),
        "array unknown": replaced(c, exceptions=np.zeros(1)),
        "array of another dtype": replaced(c, lower=a["lower"].astype(np.float32)),
        "array of another shape": replaced(c, lower=a["lower"][:, None]),
        "bounds too short": replaced(c, upper=a["upper"][:2]),
        "weights too narrow": weights(np.ones((2, 2), np.float32)),
        "dropped row, claims kept": replaced(c, {"claims": claims}, lower=a["lower"][:2], upper=a["upper"][:2],
                                             margin=a["margin"][:2], error=a["error"][:2], row_start=a["row_start"][:3],
                                             row_value=a["row_value"][:3], row_coefficient=a["row_coefficient"][:3]),
        "no columns": certificate(np.ones((3, 0)), np.ones((1, 0)), lower=[-1, -1, -1]),
    }  # fmt: skip


def faults(check: Check, seeds: range = range(300)) -> Iterator[str]:
    """Everything a checker proves that is not so, accepts that it may not, or refuses that it should accept."""
    if not check(good()).accepted:
        yield "refuses a good certificate"
    wrong, false = malformed(), untrue()
    for name, c in {**wrong, **false}.items():
        try:
            result = check(c)
        except Exception as crash:
            yield f"crashes: {name}: {crash!r}"
        else:
            if result.accepted:
                yield f"accepts: {name}"
            if bool(result.problems) != (name in wrong):
                yield f"wrong problems: {name}: {result.problems}"
    for seed in seeds:
        c = hard_certificate(seed)
        values, _ = exact_rows(c)
        for i, claim in enumerate(check(c).claims):
            if claim.proven and not inside(values[i], c.arrays["lower"][i], c.arrays["upper"][i]):
                yield f"seed {seed}, row {i}: proves what is false"


def test_nothing_false_is_proven_and_nothing_malformed_is_accepted():
    assert list(faults(check)) == []


@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_hard_certificates_are_hard(seed):
    """In every family both answers occur near the bounds, so that a checker which guesses is wrong somewhere."""
    answers = set()
    for s in range(seed, 120, len(KINDS)):
        c = hard_certificate(s)
        answers |= {inside(x, c.arrays["lower"][i], c.arrays["upper"][i]) for i, x in enumerate(exact_rows(c)[0])}
    assert answers == {True, False}


@pytest.mark.parametrize("seed", range(60))
def test_rows_with_slack_are_proven(seed):
    """Completeness: four times the rounding bound, computed from the exact magnitudes, is always enough."""
    c = hard_certificate(seed)
    n, length = c.arrays["vectors"].shape[1], np.diff(c.arrays["row_start"])
    values, sizes = exact_rows(c)
    absolute = [sum(map(abs, exactly(c.arrays["row_coefficient"])[s : s + k]), Fraction(0))
                for s, k in zip(c.arrays["row_start"], length, strict=False)]  # fmt: skip
    room = [4 * (n + int(k) + 8) * (Fraction(2) ** -53 * size + Fraction(2) ** -1000 * (1 + total))
            for k, size, total in zip(length, sizes, absolute, strict=True)]  # fmt: skip
    pairs = zip(c.arrays["value_vector"], c.arrays["value_class"], strict=True)
    each = certificate(c.arrays["vectors"], c.arrays["weights"], values=pairs)
    if max(sizes + exact_rows(each)[1]) > Fraction(2) ** 1020:
        pytest.skip("overflows float64, which rightly proves nothing")
    lower = [ulps(nearest(x - r), -1) for x, r in zip(values, room, strict=True)]
    upper = [ulps(nearest(x + r), +1) for x, r in zip(values, room, strict=True)]
    result = check(replaced(c, lower=np.array(lower), upper=np.array(upper)))
    assert result.accepted and result.proven == result.rows == len(values), result
    assert all(claim.worst_slack >= 0 for claim in result.claims)


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=300)
@given(x=st.lists(finite, min_size=4, max_size=4), w=st.lists(finite, min_size=2, max_size=2),
       c=st.lists(finite, min_size=2, max_size=2), steps=st.integers(-3, 3), below=st.booleans())  # fmt: skip
def test_no_row_is_proven_beyond_its_exact_value(x, w, c, steps, below):
    blank = certificate(np.reshape(x, (2, 2)), np.array([w]), rows=[[(c[0], 0), (c[1], 1)]])
    value = exact_rows(blank)[0][0]
    bound = ulps(nearest(value), steps)
    lower, upper = (bound, np.inf) if below else (-np.inf, bound)
    if math.isinf(bound):
        return
    result = check(replaced(blank, lower=np.array([lower]), upper=np.array([upper])))
    assert not result.accepted or inside(value, lower, upper)


def test_long_vectors_are_not_proven_beyond_their_exact_value():
    """numpy sums long vectors in blocks; the bound holds for any order."""
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((40, 1281)).astype(np.float32)
    blank = certificate(vectors, rng.standard_normal((1, 1281)))
    values = exact_rows(blank)[0]
    upper = [ulps(float(x), int(s)) for x, s in zip(values, rng.integers(-40, 40, 40), strict=True)]
    result = check(replaced(blank, upper=np.array(upper)))
    assert not any(c.proven for c, x, u in zip(result.claims, values, upper, strict=True) if x > u)
    assert check(replaced(blank, upper=np.array(upper) + 1e-9)).accepted


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint16"])
def test_every_stored_dtype_is_read_exactly(dtype):
    """Each dtype's extreme numbers, alone in a row, proven within a hair of their rational value."""
    info = {"float32": np.array([1, 2**23 - 1, 2**23, 0x7F7FFFFF, 0x80000001], np.uint32).view(np.float32),
            "float64": np.array([2.0**-950, 1.5, -(2.0**900)]),
            "uint16": np.array([1, 0x7F, 0x80, 0x7F7F, 0x8001, 0x3F81], np.uint16)}[dtype]  # fmt: skip
    weights = info[:, None]
    values = [row[0] for row in exactly(weights)]
    c = certificate(np.ones((1, 1)), weights, values=[(0, i) for i in range(len(info))],
                    lower=[float(x) - abs(float(x)) * 2.0**-49 for x in values],
                    upper=[float(x) + abs(float(x)) * 2.0**-49 for x in values])  # fmt: skip
    assert check(c).accepted
    assert check(replaced(c, lower=c.arrays["upper"], upper=np.full(len(info), np.inf))).proven == 0


def test_the_result_says_what_is_proven():
    result = check(good())
    assert result == CheckResult(True, 3, 3, result.claims, (), "over the reals, for the stored features and weights")
    assert [(c.name, c.rows, c.proven) for c in result.claims] == [("row 0", 1, 1), ("row 1", 1, 1), ("row 2", 1, 1)]
    assert [c.worst_slack for c in result.claims] == pytest.approx([0.5, 0.5, 0.5], abs=1e-12)
    one = check(replaced(good(), {"claims": [{"name": "all", "rows": [0, 3]}]}, upper=np.array([-3, 1.25, 9])))
    assert (one.accepted, one.rows, one.proven, one.problems) == (False, 3, 2, ())
    assert one.claims[0].worst_slack == pytest.approx(-0.25)


def test_a_row_that_is_not_finite_has_no_slack():
    result = check(untrue()["NaN vector"])
    assert [(c.proven, c.worst_slack) for c in result.claims if not c.proven] == [(0, -np.inf), (0, -np.inf)]


def test_a_vector_that_no_value_uses_may_be_anything():
    vectors = good().arrays["vectors"].copy()
    vectors[3] = np.nan
    assert check(replaced(good(), vectors=vectors)).accepted


def test_an_empty_row_is_zero():
    c = certificate([[1.0]], [[1.0]], rows=[[], [(1.0, 0)], []], lower=[-1, 0, 1], upper=[1, 2, 2])
    assert [claim.proven for claim in check(c).claims] == [1, 1, 0]
    exact = certificate([[1.0]], [[1.0]], rows=[[], [], []], lower=[0, 5e-324, -1], upper=[0, 1, -5e-324])
    assert [claim.proven for claim in check(exact).claims] == [1, 0, 0]


def test_underflow_is_paid_for():
    """1e-200 * 1e-200 is 0 in float64, and 1e300 times the truth is not."""
    c = certificate([[1e-200]], [[1e-170]], rows=[[(1e300, 0)]], upper=[1e-75])
    assert exact_rows(c)[0][0] > Fraction(1e-75)
    assert not check(c).accepted


def test_chunks_cover_every_value(monkeypatch):
    """Fewer vectors than values, in any order, as where a claim compares one vector with every class."""
    rng = np.random.default_rng(0)
    vectors, weights = rng.standard_normal((5, 7)), rng.standard_normal((10, 7))
    values = [(v, c) for v in range(5) for c in range(10)]
    rng.shuffle(values)
    value = np.array([float(x) for x in exact_rows(certificate(vectors, weights, values=values))[0]])
    c = certificate(vectors, weights, values=values, lower=value - 1e-12, upper=value + 1e-12)
    whole = check(c)
    monkeypatch.setattr(checker, "CHUNK", 21)
    assert whole.accepted and check(c) == whole


def test_an_unknown_kind_is_an_error():
    for kind in ("tail edit", None, ["head edit"], {}):
        with pytest.raises(CertificateError, match="head edit"):
            check(replaced(good(), {"kind": kind}))


def test_a_widened_bound_is_a_weaker_claim_and_true(tmp_path):
    replaced(good(), upper=np.array([100.0, 2, np.inf])).save(tmp_path / "weaker.cert")
    assert check(tmp_path / "weaker.cert").accepted


def test_an_altered_weight_with_its_hash_recomputed_is_judged_anew():
    weights = good().arrays["weights"].copy()
    weights[1, 0] = 1  # row 0 becomes 3.5 - 4, above its bound -3
    result = check(replaced(good(), {"edit": hashlib.sha256(weights.tobytes()).hexdigest()}, weights=weights))
    assert not result.accepted and result.problems == () and result.claims[0].proven == 0


def test_flipped_bytes_with_a_new_digest_prove_nothing_false(tmp_path):
    """1,000 files altered by somebody who knows the format: refused, or true by the exact reference."""
    rng, path = np.random.default_rng(1), tmp_path / "x.cert"
    good().save(path)
    original, accepted = path.read_bytes(), 0
    for _ in range(1000):
        data = bytearray(original[:-32])
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(data + hashlib.sha256(data).digest())
        try:
            c = Certificate.load(path)
            result = check(c)
        except CertificateError:
            continue
        if result.accepted:
            accepted += 1
            bounds = zip(c.arrays["lower"], c.arrays["upper"], strict=True)
            assert all(inside(x, *b) for x, b in zip(exact_rows(c)[0], bounds, strict=True))
    assert 0 < accepted < 900  # names and informational arrays may change; most else is caught


def test_a_truncated_file_is_an_error(tmp_path):
    good().save(tmp_path / "x.cert")
    data = (tmp_path / "x.cert").read_bytes()
    (tmp_path / "x.cert").write_bytes(data[:-1])
    with pytest.raises(CertificateError, match="truncated"):
        check(tmp_path / "x.cert")


@pytest.mark.skipif((platform.machine(), platform.libc_ver()[0]) != ("x86_64", "glibc"), reason="sets x86-64's MXCSR")
@pytest.mark.parametrize("mode", [0x8000, 0x0040, 0x2000, 0x4000, 0x6000], ids=["FTZ", "DAZ", "down", "up", "zero"])
def test_a_process_without_ieee_arithmetic_is_refused(mode):
    """Libraries built with -ffast-math flush subnormals for the whole process; the error bound does not allow that."""
    libm = ctypes.CDLL("libm.so.6")
    saved, changed = ctypes.create_string_buffer(32), ctypes.create_string_buffer(32)
    assert libm.fegetenv(saved) == 0
    (mxcsr,) = struct.unpack_from("<I", saved, 28)
    changed.raw = saved.raw[:28] + struct.pack("<I", mxcsr | mode)
    c = good()
    try:
        libm.fesetenv(changed)
        result = check(c)
    finally:
        libm.fesetenv(saved)
    assert not result.accepted and result.claims == () and "IEEE" in result.problems[0]
    assert check(c).accepted


def broken(old: str, new: str) -> Check:
    """The checker with one piece of its source exchanged."""
    source = Path(checker.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} is not in the checker exactly once: adapt this test"
    namespace: dict[str, Any] = {"__name__": checker.__name__}
    exec(compile(source.replace(old, new), "broken check", "exec"), namespace)
    found: Check = namespace["check"]
    return found


FAULTS = {
    "no error term": ("(n + length + 8) * U * total_magnitude", "0.0 * total_magnitude"),
    "error term without the vector's length": ("(n + length + 8) * U", "(length + 1) * U"),
    "error term without the row's length": ("(n + length + 8) * U", "(n + 8) * U"),
    "magnitude without absolute values": ("np.abs(product, out=product).sum", "product.sum"),
    "row magnitude without absolute values": ("np.abs(coefficient) * magnitude", "coefficient * magnitude"),
    "no underflow term": ("FLOOR = 2.0**-960", "FLOOR = 0.0"),
    "upper bound ignored": ("& (high <= upper)", ""),
    "short rows taken for 0": ("np.where(length > 0, low, 0.0)", "np.where(length > 1, low, 0.0)"),
    "lower bound ignored": ("& (low >= lower)", ""),
    "negated comparison, so that NaN passes": (
        "np.isfinite(low) & np.isfinite(high) & (low >= lower) & (high <= upper)", "~((low < lower) | (high > upper))"),
    "last row skipped": ("    spans = [", "    proven[-1] = True\n    spans = ["),
    "first row skipped": ("    spans = [", "    proven[0] = True\n    spans = ["),
    "claims may leave gaps": ("start == covered < stop", "covered <= start < stop"),
    "claims may overlap": ("start == covered < stop", "start <= covered < stop"),
    "claims may be empty": ("covered < stop", "covered <= stop"),
    "claims may end early": ("if covered != rows", "if covered > rows"),
    "claims may end late": ("if covered != rows", "if covered < rows"),
    "zero rows accepted": (
        "    if rows == 0:\n        yield", "    if rows == -1:\n        yield"),
    "rows without bounds accepted": ('_first("no bound at all (-inf and +inf)", ', '_first("", False & '),
    "negative indices accepted": ("(a[name] < 0) | ", ""),
    "large indices accepted": (" | (a[name] >= size)", ""),
    "row_value unchecked": ('("row_value", sizes["s"]), ', ""),
    "value_vector unchecked": ('("value_vector", sizes["v"]), ', ""),
    "value_class unchecked": (', ("value_class", sizes["c"])', ""),
    "row_value compared with the vectors": ('"row_value", sizes["s"]', '"row_value", sizes["v"]'),
    "value_vector compared with the values": ('"value_vector", sizes["v"]', '"value_vector", sizes["s"]'),
    "value_class compared with the vectors": ('"value_class", sizes["c"]', '"value_class", sizes["v"]'),
    "value_class may be longer": ('"value_class": ("i8", "s")', '"value_class": ("i8", "z")'),
    "vectors off by one": ('a["value_vector"][some]', 'a["value_vector"][some] - 1'),
    "vectors taken in order": ('a["value_vector"][some]', 'np.arange(count)[some] % len(a["vectors"])'),
    "classes swapped": ('a["value_class"][some]', 'a["value_class"][some][::-1]'),
    "classes off by one": ('a["value_class"][some]', 'a["value_class"][some] - 1'),
    "values of other entries": ("coefficient * value[term]", "coefficient * value[np.roll(term, 1)]"),
    "magnitudes of other values": ("magnitude[term]", "magnitude[np.roll(term, 1)]"),
    "repeated classes accepted": ('len(np.unique(a["classes"])) != sizes["c"]', "False"),
    "decreasing rows accepted": ("start[1:] < start[:-1]", "np.diff(start) < -9"),
    "edit hash ignored": ('self.header["edit"] != ', 'False and self.header["edit"] != '),
    "unknown entries ignored": ("set(self.header) != self.entries or ", "not set(self.header) >= self.entries or "),
    "foreign arithmetic accepted": ('self.header["arithmetic"] != REALS', "False"),
    "everything refused": ("not problems and 0 < proven", "problems and 0 < proven"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name):
    assert next(faults(broken(*FAULTS[name])), None) is not None


def test_the_checker_depends_on_nothing_it_checks():
    """Errors and the file format are all it takes from soundly; numpy is all it takes from others."""
    folder, found = Path(checker.__file__).parent, set()
    parts = (
        "verification", "conditional", "lemmas", "reading", "rows", "intervals", "crop", "forms", "bounding",
        "products", "program", "functions", "rings", "ball", "grid", "absolute", "float32",
    )  # fmt: skip
    for name in (f"{part}.py" for part in ("check", "format", *parts)):
        for node in ast.walk(ast.parse((folder / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found.add("." * node.level + (node.module or ""))
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
    found = {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}
    own = {f"soundly.certificate.{name}" for name in ("format", *parts)}
    assert found == {"numpy", "numpy.typing", "soundly.errors", *own}


DOCS = Path(__file__).parents[2] / "docs" / "certificates.md"


@pytest.mark.skipif(not DOCS.exists(), reason="a source distribution has no docs")
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint16"])
def test_the_checker_in_the_documentation_works(tmp_path, dtype):
    bits = np.array([[0x3F80, 0x3F80], [0x4000, 0xBF80]], np.uint16)  # 1, 1 and 2, -1
    weights = bits if dtype == "uint16" else np.array([[1, 1], [2, -1]], dtype)
    c = certificate(np.eye(2), weights, values=[(1, 1), (0, 0), (0, 1)],
                    rows=[[(1.0, 1)], [(2.0, 0), (1.0, 2)]], lower=[0, 0.5], upper=[1.5, 1])  # fmt: skip
    c.save(tmp_path / "x.cert")
    (code,) = [block for block in DOCS.read_text(encoding="utf-8").split("```") if "Fraction" in block]
    (tmp_path / "own.py").write_text(code.removeprefix("python\n"), encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "own.py", tmp_path / "x.cert"], capture_output=True, text=True)
    assert done.stdout == "1 of 2 rows hold, ['row 0', 'row 1']\n", done.stderr
    assert [claim.proven for claim in check(c).claims] == [1, 0]


def test_results_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        check(good()).accepted = True
