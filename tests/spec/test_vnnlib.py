"""Specifications are read as they are written: against an evaluator of their text, and with harmful files."""

import gzip
import math
import random
import resource
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soundly.errors import InvalidInput, SoundlyError
from soundly.spec import vnnlib as module
from soundly.spec.claim import Claim, Shapes
from soundly.spec.vnnlib import read_vnnlib

# -- the reference: the text evaluated as it stands, in fractions


def forms(text: str) -> list[Any]:
    """The nested lists of an S-expression file."""
    text = "\n".join(line.partition(";")[0] for line in text.splitlines())
    stack: list[list[Any]] = [[]]
    for token in text.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            stack.append([])
        elif token == ")":
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    (result,) = stack
    return result


def value(form: Any, at: dict[str, Fraction]) -> Any:
    if isinstance(form, str):
        return at[form] if form in at else Fraction(form)
    head, args = form[0], [value(part, at) for part in form[1:]]
    match head:
        case "<=" | ">=" | "<" | ">" | "=":
            a, b = args
            return {"<=": a <= b, ">=": a >= b, "<": a < b, ">": a > b, "=": a == b}[head]
        case "and":
            return all(args)
        case "or":
            return any(args)
        case "+":
            return sum(args)
        case "-":
            return -args[0] if len(args) == 1 else args[0] - sum(args[1:])
        case "*":
            product = Fraction(1)
            for arg in args:
                product *= arg
            return product
    raise AssertionError(head)


def is_counterexample(text: str, x: list[float], y: list[float]) -> bool:
    at = {f"X_{i}": Fraction(v) for i, v in enumerate(x)} | {f"Y_{j}": Fraction(v) for j, v in enumerate(y)}
    return all(value(form[1], at) for form in forms(text) if form[0] == "assert")


def claim_of(text: str, n: int = 2, m: int = 2) -> Claim:
    return read_vnnlib(text, Shapes(((n,),), ((m,),)))


def spec(*asserted: str, n: int = 2, m: int = 2, box: bool = True) -> str:
    lines = [f"(declare-const X_{i} Real)" for i in range(n)] + [f"(declare-const Y_{j} Real)" for j in range(m)]
    if box:
        lines += [f"(assert (>= X_{i} -1)) (assert (<= X_{i} 1))" for i in range(n)]
    return "\n".join([*lines, *(f"(assert {a})" for a in asserted)])


GRID = (-1.0, -0.5, 0.0, 0.1, 0.25, 0.5, 1.0, 2.0)
NUMBERS = ("-1", "-0.5", "0.0", ".1", "0.25", "+0.5", "1", "2.", "1e-1", "5E-1", "-10e-1", "0.1", "0.3")


def disagreements(text: str, claim: Claim, points: int, seed: int, n: int = 2, m: int = 2) -> Iterator[Any]:
    """Points, most of them next to a bound, where the claim and the text disagree, or a proof would lose one."""
    rng = random.Random(seed)
    numbers = [v for g in GRID for v in (g, math.nextafter(g, 9.0), math.nextafter(g, -9.0))]
    for _ in range(points):
        x = [rng.choice(numbers) if rng.random() < 0.8 else rng.uniform(-1.2, 1.2) for _ in range(n)]
        y = [rng.choice(numbers) if rng.random() < 0.8 else rng.uniform(-1.2, 1.2) for _ in range(m)]
        wrong = is_counterexample(text, x, y)
        if claim.holds_at(f64(x), f64(y)) == wrong:
            yield "judged", x, y
        if wrong and not in_outer_set(claim, f64(x), f64(y)):
            yield "lost", x, y


def in_outer_set(claim: Claim, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether a proof over the float64 bounds and rows covers the point."""
    for region, prop in claim.cases():
        inside = bool(((region.box.lower <= x) & (x <= region.box.upper)).all())
        slack = prop.slack(y.abs(), x.abs()) + 1e-13  # rounding of this evaluation
        allowed = torch.ones(prop.clauses, dtype=torch.bool)
        allowed[prop.clause[prop.rows(y, x) > slack]] = False
        if inside and bool(allowed.any()):
            return True
    return False


def f64(v: Any) -> torch.Tensor:
    return torch.tensor(v, dtype=torch.float64)


@st.composite
def terms(draw: Any, depth: int = 2) -> str:
    kind = draw(st.integers(0, 7 if depth else 2))
    if kind <= 1:
        return draw(st.sampled_from(("X_0", "X_1", "Y_0", "Y_1")))
    if kind == 2:
        return draw(st.sampled_from(NUMBERS))
    if kind in (3, 4):
        return f"(+ {draw(terms(depth - 1))} {draw(terms(depth - 1))})"
    if kind == 5:
        return f"(- {draw(terms(depth - 1))})"
    if kind == 6:
        return f"(- {draw(terms(depth - 1))} {draw(terms(depth - 1))})"
    factors = [draw(st.sampled_from(NUMBERS)), draw(terms(depth - 1))]
    return f"(* {' '.join(draw(st.permutations(factors)))})"


@st.composite
def formulas(draw: Any, depth: int = 3) -> str:
    kind = draw(st.integers(0, 5 if depth else 2))
    if kind <= 1:
        op = draw(st.sampled_from(("<=", ">=", "<", ">")))
        variable = draw(st.sampled_from(("X_0", "X_1", "Y_0", "Y_1")))
        sides = draw(st.permutations([variable, draw(st.sampled_from(NUMBERS))]))
        return f"({op} {sides[0]} {sides[1]})"
    if kind == 2:
        return f"({draw(st.sampled_from(('<=', '>=', '<', '>', '=')))} {draw(terms())} {draw(terms())})"
    parts = draw(st.lists(formulas(depth - 1), min_size=1, max_size=3))
    return f"({'and' if kind == 3 else 'or'} {' '.join(parts)})"


@settings(max_examples=150)
@given(st.lists(formulas(), max_size=3), st.integers(0, 10**6))
def test_a_claim_says_what_its_text_says(asserted: list[str], seed: int) -> None:
    text = spec(*asserted)
    assert list(disagreements(text, claim_of(text), 25, seed)) == []


CASES = {
    "two levels of or": "(or (and (>= X_0 0.1) (or (<= Y_0 0.1) (>= Y_1 0.3))) (and (< X_0 -0.1) (> Y_0 Y_1)))",
    "box per clause": "(or (and (>= X_0 0.1) (<= X_0 0.25) (<= Y_0 0.1)) (and (>= X_0 0.1) (<= X_0 .25) (>= Y_0 0.3)))",
    "inputs alone": "(or (and (>= X_0 0.25) (<= X_0 0.5)) (<= X_0 -0.5))",
    "equal": "(and (= Y_0 0.1) (= X_1 0.25))",
    "mixed row": "(<= (+ (* 0.3 Y_0) (* -0.1 X_0)) (- Y_1 0.1))",
    "long coefficients": "(>= (* 0.12345678901234567 Y_0) (* 0.98765432109876543 Y_1))",
    "chain": "(and (<= -0.5 Y_0) (<= Y_0 0.5))",
}


@pytest.mark.parametrize("name", CASES)
def test_the_forms_of_the_competition(name: str) -> None:
    text = spec(CASES[name])
    assert list(disagreements(text, claim_of(text), 400, 1)) == []


FAULTS = {
    "flipped inequality": ("(<= Y_0 0.1)", "(>= Y_0 0.1)"),
    "dropped clause": ("(and (<= X_0 0.1) (>= Y_1 0.3) (> Y_0 0.25))", ""),
    "dropped row": ("(>= Y_1 0.3)", ""),
    "closed end": ("(< X_0 0.25)", "(<= X_0 0.25)"),
    "closed row": ("(> Y_0 0.25)", "(>= Y_0 0.25)"),
    "other variable": ("(>= Y_1 0.3)", "(>= Y_0 0.3)"),
}


FAULTY = "(or (and (>= X_0 0.1) (< X_0 0.25) (<= Y_0 0.1)) (and (<= X_0 0.1) (>= Y_1 0.3) (> Y_0 0.25)))"


def test_the_text_of_the_planted_faults_is_read_rightly() -> None:
    text = spec(FAULTY)
    assert list(disagreements(text, claim_of(text), 2000, 1)) == []


@pytest.mark.parametrize("fault", [*FAULTS, "box rounded to nearest", "box rounded inwards", "constant rounded up"])
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = spec(FAULTY)
    if fault in FAULTS:
        wrong = claim_of(text.replace(*FAULTS[fault]))
    elif fault == "constant rounded up":
        wrong = claim_of(text)
        wrong.property.b.add_(1e-9)
    else:
        step = 0.0 if "nearest" in fault else 1e-9  # lower ends then move inwards
        monkeypatch.setattr(module, "rounded", lambda q: (float(q) + step, float(q) + step))
        wrong = claim_of(text)
    assert next(disagreements(text, wrong, 2000, 1), None) is not None


# -- exactness


def test_bounds_are_rounded_outward_and_the_decimals_still_decide() -> None:
    claim = claim_of("(declare-const X_0 Real)(declare-const Y_0 Real)(assert (>= X_0 0.1))(assert (<= X_0 0.3))", 1, 1)
    low, high = Fraction("0.1"), Fraction("0.3")
    assert Fraction(claim.region.lower.item()) < low < Fraction(torch.nextafter(claim.region.lower, f64(1.0)).item())
    assert Fraction(claim.region.upper.item()) > high > Fraction(torch.nextafter(claim.region.upper, f64(0.0)).item())
    assert not claim.region.contains(claim.region.lower[0])
    assert claim.region.contains(torch.nextafter(claim.region.lower, f64(1.0))[0])


def test_contradictions_are_judged_on_the_decimals() -> None:
    head = "(declare-const X_0 Real)(declare-const Y_0 Real)"
    gap = "(assert (>= X_0 0.10000000000000000000001))(assert (<= X_0 0.1))"
    assert claim_of(head + gap, 1, 1).is_empty
    assert not claim_of(head + "(assert (>= X_0 0.1))(assert (<= X_0 0.1))", 1, 1).is_empty
    assert claim_of(head + "(assert (>= X_0 0.1))(assert (< X_0 0.1))", 1, 1).is_empty
    either = "(assert (>= X_0 0))(assert (<= X_0 1))(assert (or (and (> X_0 1) (> Y_0 0)) (and (< X_0 0) (< Y_0 0))))"
    assert claim_of(head + either, 1, 1).is_empty
    assert list(claim_of(head + gap, 1, 1).cases()) == []


def test_inputs_fixed_to_decimals_that_no_float_equals_are_judged_with_a_tolerance() -> None:
    claim = claim_of(spec("(= X_0 0.1)", "(<= Y_0 0)"))
    x, y = claim.region.project(f64([0.0, 0.0])), f64([-1.0, 0.0])
    assert not claim.is_empty and claim.holds_at(x, y) and claim.violation(x, y) == -math.inf
    assert not claim.holds_at(x, y, tolerance=1e-12) and claim.violation(x, y, tolerance=1e-12) == 1.0
    assert claim.holds_at(x + 1e-9, y, tolerance=1e-12) and claim.holds_at(x, -y, tolerance=1e-12)


def test_alternatives_of_inputs_become_boxes_and_share_their_clauses() -> None:
    halves = [f"(or (<= X_{i} -0.5) (>= X_{i} 0.5))" for i in range(8)]
    claim = claim_of(spec(*halves, "(or (<= Y_0 0) (<= Y_1 0))", n=8), 8)
    assert len(claim.region) == 2**8 and claim.property.clauses == 2 and not claim.is_empty


def test_clauses_of_one_box_are_merged() -> None:
    both = [f"(and (>= X_0 {k / 10}) (<= X_0 {k / 10 + 0.1}) ({op} Y_0 0.5))" for k in range(5) for op in ("<=", ">=")]
    claim = claim_of(spec("(or " + " ".join(both) + ")"))
    assert len(claim.region) == 5 and claim.spans.tolist() == [[2 * k, 2 * k + 2] for k in range(5)]


def test_a_spec_without_output_constraints_is_violated_everywhere() -> None:
    claim = claim_of(spec())
    assert claim.property.clauses == 1 and len(claim.property) == 0
    assert not claim.holds_at(f64([0.0, 0.0]), f64([1.0, 1.0]))
    assert claim_of(spec("(or false (and))")).property.clauses == 1
    assert claim_of(spec("false")).property.clauses == 0


# -- files


def test_files_packed_files_and_bytes(tmp_path: Path) -> None:
    text = "\ufeff; a comment ( with ) ; parentheses\r\n(set-logic QF_LRA)\t(declare-fun\nX_1 () Real)" + spec(
        "(<= Y_0\n\t0.1)"
    ).replace("(declare-const X_1 Real)", "")
    plain, packed = tmp_path / "a (1).vnnlib", tmp_path / "a.vnnlib.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    for source in (plain, str(plain), packed, str(packed), text.encode(), gzip.compress(text.encode())):
        assert list(disagreements(text[1:], read_vnnlib(source, ([(2,)], [(2,)])), 50, 1)) == []


HEAD = "(declare-const X_0 Real)\n(declare-const Y_0 Real)\n(assert (>= X_0 0))\n(assert (<= X_0 1))\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(assert (<= Y_1 0))", "line 5, column 13: Y_1 is used but not declared"),
        ("\n  (assert (<= Z 0))", "line 6, column 15: 'Z' is neither"),
        ("(assert (<= Y_0 (* Y_0 X_0)))", "line 5, column 17: only linear"),
        ("(assert (<= Y_0 (/ X_0 0)))", "divides by zero"),
        ("(assert (<= Y_0 0)", "line 5, column 1: this parenthesis is never closed"),
        ("(assert (<= Y_0 0)))", "line 5, column 20: this parenthesis closes nothing"),
        ("(assert (not (<= Y_0 0)))", "line 5, column 9: 'not'"),
        ("(assert Y_0)", "takes one formula"),
        ("(assert (and Y_0 3))", "joins formulas"),
        ("(assert (<= Y_0 (and)))", "a number or variable was expected"),
        ("(assert ())", "empty"),
        ("(assert ((<=) Y_0 0))", "an operator was expected"),
        ("(assert (<= Y_0 1e99999))", "too long or too large"),
        ("(assert (<= Y_0 1e9999999999))", "neither a number"),
        ("(assert (<= Y_0 nan))", "neither a number"),
        ("(assert (<= (* 1e1200 Y_0) X_0))", "range of float64"),
        ("(declare-const Y_0 Real)", "declared twice"),
        ("(declare-const y Real)", "variables are called"),
        ("(declare-const Y_1 Int)", "a declaration reads"),
        ("(declare-network N)", "VNN-LIB 2.0"),
        ("(<= Y_0 0)", "does not belong here"),
        ("(assert (assert (<= Y_0 0)))", "do not nest"),
        ("x", "outside of any command"),
        ('(assert (<= Y_0 "))', "line 5"),
    ],
)
def test_errors_name_line_column_and_reason(text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        claim_of(HEAD + text, 1, 1)
    assert message in str(error.value)


def test_errors_about_the_network() -> None:
    with pytest.raises(InvalidInput, match=r"declares 2 inputs, but the network has 3"):
        claim_of(spec(), 3, 2)
    with pytest.raises(InvalidInput, match=r"declares 2 outputs, but the network has 5"):
        claim_of(spec(), 2, 5)
    with pytest.raises(InvalidInput, match="X_1 is not bounded from below"):
        claim_of(spec("(<= X_1 1)", "(>= X_0 0)", "(<= X_0 1)", box=False))
    with pytest.raises(InvalidInput, match="X_1 is not bounded from above"):
        claim_of(spec("(or (and (<= X_1 1) (>= X_1 0)) (>= X_1 0))", "(= X_0 0)", box=False))
    with pytest.raises(InvalidInput, match="does not declare X_0"):
        claim_of("(declare-const X_5 Real)", 1, 0)
    with pytest.raises(InvalidInput, match=r"missing\.vnnlib cannot be read"):
        read_vnnlib("missing.vnnlib", Shapes(((1,),), ((1,),)))


def test_300_mutated_files_read_or_raise_our_error() -> None:
    rng = random.Random(1)
    texts = [spec(formula).encode() for formula in CASES.values()]
    refused = 0
    for k in range(300):
        data = bytearray(rng.choice(texts))
        if k % 5 == 4:
            data = bytearray(gzip.compress(bytes(data)))
        for _ in range(rng.randint(1, 6)):
            i, j = sorted(rng.randrange(len(data)) for _ in range(2))
            match rng.randrange(5):
                case 0:
                    data[i] = rng.randrange(256)
                case 1:
                    del data[i : i + rng.randint(1, 40)]
                case 2:
                    data[i:i] = rng.choice([b"(", b")", b"-", b" 1e", b"X_7", b"Y_0", b";", b'"', b"|", b"\0", b"or "])
                case 3:
                    data[i:i] = data[i : min(j, i + 200)]
                case _:
                    data = data[: max(len(data) // 2, j)]
        try:
            read_vnnlib(bytes(data), ([(2,)], [(2,)]))
        except SoundlyError as error:
            refused += 1
            assert "the specification" in str(error)
    assert refused > 150


def large(kind: str) -> str | bytes:
    million = 10**6
    match kind:
        case "deep":
            return HEAD + "(assert " + "(and " * (million // 3) + "(<= Y_0 0)" + ")" * (million // 3) + ")"
        case "deep minus":
            return HEAD + "(assert (<= 0 " + "(- " * (million // 3) + "Y_0" + ")" * (million // 3) + "))"
        case "open":
            return HEAD + "(" * million
        case "wide":
            return HEAD + "(assert (or" + "(<= Y_0 1)" * (million // 5) + "))"
        case "nested sums":
            return HEAD + "(assert (<= 0 " + "(+ Y_0 (- X_0 " * 100_000 + "0" + "))" * 100_000 + "))"
        case "powers":
            return HEAD + "(assert (<= Y_0 (*" + " 1e1000" * 100_000 + ")))"
        case "product of ors":
            return HEAD + "(assert (or (<= Y_0 0) (>= Y_0 1) (<= Y_0 X_0)))" * 60
        case "product of boxes":
            return HEAD + "(assert (or (<= X_0 0.1) (>= X_0 0.2)))" * 60
        case "rows times clauses":
            return HEAD + "(assert (<= Y_0 X_0))" * 5000 + "(assert (or" + "(<= Y_0 1)" * 50_000 + "))"
        case "alternating":
            return HEAD + "(assert " + "(or (<= Y_0 0) (and (<= Y_0 1) " * 50_000 + "(<= Y_0 0)" + "))" * 50_000 + ")"
        case "long number":
            return HEAD + "(assert (<= Y_0 " + "9" * million + "))"
        case "many numbers":
            return HEAD + "(assert (or" + "".join(f"(<= Y_0 {k}e-1100)" for k in range(100_000)) + "))"
        case "gzip bomb":
            return gzip.compress(b" " * (200 * million), 9)
        case "comment":
            return ";" * million * 10
        case "quotes":
            return HEAD + '" ' * million
    raise AssertionError(kind)


LARGE = (
    "deep", "deep minus", "open", "wide", "nested sums", "powers", "product of ors", "product of boxes",
    "rows times clauses", "alternating", "long number", "many numbers", "gzip bomb", "comment", "quotes",
)  # fmt: skip


@pytest.mark.parametrize("kind", LARGE)
def test_large_and_harmful_files_end_soon_in_little_memory(kind: str) -> None:
    source = large(kind)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read_vnnlib(source, ([(1,)], [(1,)]))
        outcome = "read"
    except SoundlyError:
        outcome = "refused"
    assert time.process_time() - start < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert outcome == ("read" if kind in ("deep", "deep minus", "wide", "nested sums", "many numbers") else "refused")


def test_ten_thousand_boxes_are_read_soon() -> None:
    parts = [
        f"(and (>= X_0 {k * 1e-4!r}) (<= X_0 {k * 1e-4 + 1e-5!r}) ({op} Y_0 {k * 1e-3!r}))"
        for k in range(10_000)
        for op in ("<=", ">=")
    ]
    start = time.process_time()
    claim = claim_of(HEAD + "(assert (or " + "\n".join(parts) + "))", 1, 1)
    assert time.process_time() - start < 6
    assert len(claim.region) == 10_000 and claim.property.clauses == 20_000
