"""Cones in certificates of edits: against exact rational arithmetic, and with faults planted in the checker."""

import math
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from tests.certificate.test_check import (
    DOCS,
    KINDS,
    Check,
    broken,
    certificate,
    exact_rows,
    hard_certificate,
    inside,
    nearest,
    replaced,
    ulps,
)

from soundly.certificate import Certificate, check


def meant(c: Certificate) -> list[bool]:
    """For every row whether it holds, in rational arithmetic; those of a cone together."""
    lower, upper = c.arrays["lower"].tolist(), c.arrays["upper"].tolist()
    values = exact_rows(c)[0]
    holds = [inside(x, a, b) for x, a, b in zip(values, lower, upper, strict=True)]
    for start, stop in c.arrays["cones"].tolist():
        squares = Fraction(0)
        for i in range(start, stop - 1):
            end = min(max(values[i], lower[i]), upper[i])  # Python compares rationals and floats exactly
            squares += (values[i] - Fraction(end)) ** 2
        radius = values[stop - 1] - Fraction(lower[stop - 1])
        holds[start:stop] = [radius >= 0 and squares <= radius**2] * (stop - start)
    return holds


def cone(values: list[float], lower: list[float], upper: list[float]) -> Certificate:
    """One cone of rows with these values, float64 numbers, and these bounds; the last row has a lower end only."""
    c = certificate(
        [[v] for v in values], [[1.0]], lower=lower, upper=[*upper, np.inf], cones=np.array([[0, len(values)]])
    )
    return replaced(c, {"claims": [{"name": "cone", "rows": [0, len(values)]}]})


def hard_cone(seed: int) -> Certificate:
    """Rows as hard as those of linear certificates, in a cone whose radius is a few ulps off the exact distance."""
    rng = np.random.default_rng(seed)
    blank = hard_certificate(seed)
    values, m = exact_rows(blank)[0], len(blank.arrays["lower"])
    target = np.array([nearest(x * Fraction(float(rng.choice([0, 0.5, 1 + 1e-9, 2])))) for x in values])
    lower, upper = target.copy(), target.copy()
    for i in range(m):
        match int(rng.integers(0, 4)):
            case 0:
                lower[i] = -np.inf
            case 1:
                upper[i] = np.inf
    squares = Fraction(0)
    for x, a, b in zip(values[:-1], lower[:-1].tolist(), upper[:-1].tolist(), strict=True):
        squares += (x - Fraction(min(max(x, a), b))) ** 2
    distance = root(squares)
    end = ulps(nearest(values[-1] - distance), int(rng.integers(-4, 5)))
    lower[-1], upper[-1] = np.clip(end, -np.finfo(float).max, np.finfo(float).max), np.inf
    c = replaced(blank, {"claims": [{"name": "cone", "rows": [0, m]}]}, lower=lower, upper=upper)
    return replaced(c, cones=np.array([[0, m]]))


def root(x: Fraction) -> Fraction:
    """The square root to 200 bits, rounded down."""
    shift = max(0, 200 - (x.numerator.bit_length() - x.denominator.bit_length()) // 2)
    return Fraction(math.isqrt(math.floor(x * 4**shift)), 2**shift)


def good() -> Certificate:
    """Distance 5 to the target (1, 1) and to [0, 7], radius 5.2; then a row of its own."""
    c = certificate([[4.0], [-3.0], [5.0], [2.0], [8.0]], [[1.0]], lower=[1, 1, 0, -3.2, 7], upper=[1, 1, 7, np.inf, 9],
                    cones=np.array([[0, 4]]))  # fmt: skip
    return replaced(c, {"claims": [{"name": "cone", "rows": [0, 4]}, {"name": "row", "rows": [4, 5]}]})


def malformed() -> dict[str, Certificate]:
    c = good()

    def cones(*spans: list[int]) -> Certificate:
        return replaced(c, cones=np.array(spans).reshape(-1, 2))

    return {
        "begins before the rows": cones([-1, 4]),
        "ends after the rows": cones([3, 6]),
        "ends far after the rows": cones([0, 2**63 - 1]),
        "begins far before": cones([-(2**63), 4]),
        "of one row": cones([3, 4]),
        "of no rows": cones([3, 3]),
        "backwards": cones([4, 0]),
        "overlapping": cones([0, 4], [2, 4]),
        "twice": cones([0, 4], [0, 4]),
        "out of order": replaced(c, {"claims": [{"name": "x", "rows": [0, 5]}]}, cones=np.array([[2, 4], [0, 2]]),
                                 upper=np.array([1, np.inf, 7, np.inf, 9], float)),
        "beyond its claim": replaced(
            c, {"claims": [{"name": "x", "rows": [0, 2]}, {"name": "y", "rows": [2, 5]}]}),
        "radius with an upper end": replaced(c, upper=np.array([1, 1, 7, 100, 9], float)),
        "radius without a lower end": replaced(c, lower=np.array([1, 1, 0, -np.inf, 7], float),
                                               upper=np.array([1, 1, 7, 10, 9], float)),
        "three numbers": replaced(c, cones=np.array([[0, 4, 4]])),
        "one number": replaced(c, cones=np.array([[4]])),
        "flat": replaced(c, cones=np.array([0, 4])),
        "floating point": replaced(c, cones=np.array([[0.0, 4.0]])),
    }  # fmt: skip


def stagnating() -> Certificate:
    """1 + u + u + ... in float64 is less than it is; the radius lies in between. The rows are exact: they are empty."""
    target = [1.0] + [2.0**-27] * 126
    radius = ulps(float(root(sum((Fraction(t) ** 2 for t in target), Fraction(0)))), -1)
    c = certificate([[1.0]], [[1.0]], rows=[[] for _ in range(128)], lower=[*target, -radius],
                    upper=[*target, np.inf], cones=np.array([[0, 128]]))  # fmt: skip
    return replaced(c, {"claims": [{"name": "cone", "rows": [0, 128]}]})


def untrue() -> dict[str, Certificate]:
    c = good()
    return {
        "radius too small": replaced(c, lower=np.array([1, 1, 0, -2.9, 7], float)),
        "negative radius": replaced(c, lower=np.array([1, 1, 0, 8, 7], float)),
        "beyond an interval": replaced(c, upper=np.array([1, 1, 1, np.inf, 9], float)),
        "below an interval": replaced(c, lower=np.array([1, 1, 9, -3.2, 7]), upper=np.array([1, 1, 9, np.inf, 9])),
        "the row behind it": replaced(c, lower=np.array([1, 1, 0, -4, 8.5], float)),
        "not a number": replaced(c, vectors=np.array([[4.0], [np.nan], [5], [2], [8]])),
        "an infinite radius": replaced(c, vectors=np.array([[4.0], [-3.0], [5], [np.inf], [8]])),
        "an overflow": replaced(c, vectors=np.array([[1e200], [-3.0], [5], [1e201], [8]])),
        "a sum that stagnates": stagnating(),
        "no cone at all": replaced(c, cones=np.zeros((0, 2), int)),
    }  # fmt: skip


def faults(check: Check) -> Iterator[str]:
    """Everything that a checker proves, accepts or refuses wrongly."""
    if not check(good()).accepted:
        yield "refuses a good certificate"
    wrong, false = malformed(), untrue()
    for name, c in {**wrong, **false}.items():
        try:
            result = check(c)
        except Exception as crash:
            yield f"crashes: {name}: {crash!r}"
        else:
            if result.accepted or bool(result.problems) != (name in wrong):
                yield f"{name}: {result}"
    for seed in range(300):
        c = hard_cone(seed)
        if check(c).accepted and not all(meant(c)):
            yield f"seed {seed} is proved, and false"


def test_nothing_false_is_proven_and_nothing_malformed_is_accepted():
    assert list(faults(check)) == []


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_hard_cones_are_hard(kind):
    assert {all(meant(hard_cone(seed))) for seed in range(kind, 300, len(KINDS))} == {True, False}


def test_a_cone_with_room_is_proven():
    rng = np.random.default_rng(0)
    for size in (1, 2, 50, 3000):
        x = rng.standard_normal(size)
        c = cone([*x, 0.0], [*np.zeros(size), -np.linalg.norm(x) * (1 + 1e-12)], [0.0] * size)
        assert check(c).accepted and all(meant(c))
        result = check(replaced(c, lower=np.append(np.zeros(size), -np.linalg.norm(x) * (1 - 1e-12))))
        assert not result.accepted and result.problems == () and result.proven == 0


def test_rows_of_a_cone_are_proven_together():
    assert check(good()).proven == 5
    result = check(untrue()["radius too small"])
    assert [claim.proven for claim in result.claims] == [0, 1]
    assert result.claims[0].worst_slack == pytest.approx(-0.1)


def test_tiny_numbers_are_not_lost():
    """Squares of 1e-200 are 0 in float64."""
    assert not check(cone([1e-200, 0.0], [0.0, -1e-201], [0.0])).accepted
    assert check(cone([1e-140, 0.0], [0.0, -1.1e-140], [0.0])).accepted


FAULTS = {
    "no rounding": ("* (1 + (stop - start + 8) * U)", "* 1.0"),
    "no floor": ("(missed * missed).sum() + FLOOR", "(missed * missed).sum()"),
    "the radius from above": ("radius = low[stop - 1]", "radius = high[stop - 1]"),
    "squares compared, without the sign": ("and size <= radius", "and size**2 <= radius**2"),
    "lower ends ignored": ("np.maximum(lower - low, high - upper)[start", "(high - upper)[start"),
    "upper ends ignored": ("np.maximum(lower - low, high - upper)[start", "(lower - low)[start"),
    "enclosures exchanged": ("np.maximum(lower - low, high - upper)", "np.maximum(lower - high, low - upper)"),
    "the last member forgotten": ("[start : stop - 1], 0.0)", "[start : stop - 2], 0.0)"),
    "the first member forgotten": ("[start : stop - 1], 0.0)", "[start + 1 : stop - 1], 0.0)"),
    "the largest miss only": ("np.sqrt((missed * missed).sum() + FLOOR)", "missed.max()"),
    "what is kept counts against what is missed": (
        "np.maximum(np.maximum(lower - low, high - upper)[start : stop - 1], 0.0)",
        "np.maximum(lower - low, high - upper)[start : stop - 1]"),
    "NaN passes": ("np.isfinite(size) and np.isfinite(radius) and size <= radius", "not size > radius"),
    "everything proven": ("and size <= radius", "and True"),
    "cones ignored": ("return certificate.arrays[\"cones\"] if", "return np.zeros((0, 2), np.int64) if"),
    "order unchecked": ("wrong[1:] |= start[1:] < stop[:-1]", "pass"),
    "starts unchecked": ("wrong = (start < 0) | ", "wrong = "),
    "ends unchecked": ("(stop > len(lower)) | ", ""),
    "one row is enough": ("(stop - start < 2)", "(stop - start < 1)"),
    "claims unchecked": ("stop > claims[owner, 1]", "stop < 0"),
    "upper ends of radii unchecked": ("| ~np.isposinf(upper[stop - 1])", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name):
    with np.errstate(all="ignore"):
        assert next(faults(broken(*FAULTS[name])), None) is not None


@pytest.mark.skipif(not DOCS.exists(), reason="a source distribution has no docs")
def test_the_checker_in_the_documentation_knows_cones(tmp_path):
    (code,) = [block for block in DOCS.read_text(encoding="utf-8").split("```") if "Fraction" in block]
    (tmp_path / "own.py").write_text(code.removeprefix("python\n"), encoding="utf-8")
    for c, count in ((good(), 5), (untrue()["radius too small"], 1), (untrue()["negative radius"], 1)):
        c.save(tmp_path / "x.cert")
        run = [sys.executable, tmp_path / "own.py", tmp_path / "x.cert"]
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.stdout == f"{count} of 5 rows hold, ['cone', 'row']\n", done.stderr
