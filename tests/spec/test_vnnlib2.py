"""VNN-LIB 2.0 says what its text says, and whatever goes beyond one network and linear arithmetic is refused."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.spec.test_vnnlib import disagreements
from torch import nn

import soundly
from soundly.errors import InvalidInput
from soundly.spec.claim import Claim, Shapes
from soundly.spec.vnnlib import read_vnnlib
from soundly.spec.vnnlib2 import DEPTH

pytest.importorskip("vnnlib", reason="VNN-LIB 2.0 is read by way of the package vnnlib")

SHAPES = Shapes(((1, 2),), ((2,),))
BOX = tuple(f"({c} X[0,{i}] {v})" for i in (0, 1) for c, v in ((">=", "-1.0"), ("<=", "1.0")))


def spec(*asserted: str, kind: str = "Real", inputs: str = "[1,2]", outputs: str = "[2]", box: bool = True) -> str:
    head = (
        f"; a comment\n(vnnlib-version <2.0>)\n(declare-network net\n  (declare-input X {kind} {inputs})\n"
        f"  (declare-output Y {kind} {outputs})\n)\n"
    )
    return head + "\n".join(f"(assert {a})" for a in (*(BOX if box else ()), *asserted))


def first(text: str) -> str:
    """The same text with the names of version 1.0, for its evaluator."""
    for i in (0, 1):
        text = text.replace(f"X[0,{i}]", f"X_{i}").replace(f"Y[{i}]", f"Y_{i}")
    return text.replace("(== ", "(= ")


NAMES = ("X[0,0]", "X[0,1]", "Y[0]", "Y[1]")
NUMBERS = ("-1.0", "-0.5", "0.0", "0.10", "0.25", "0.5", "1.0", "0.3")


@st.composite
def terms(draw: st.DrawFn, depth: int = 2) -> str:
    kind = draw(st.integers(0, 5 if depth else 1))
    if kind == 0:
        return draw(st.sampled_from(NAMES))
    if kind == 1:
        return draw(st.sampled_from(NUMBERS))
    if kind == 2:
        return f"(- {draw(terms(depth - 1))})"
    if kind == 3:
        return f"(* {draw(st.sampled_from(NUMBERS))} {draw(terms(depth - 1))})"
    parts = draw(st.lists(terms(depth - 1), min_size=1 + (kind == 4), max_size=3))
    return f"({'-' if kind == 4 else '+'} {' '.join(parts)})"


@st.composite
def formulas(draw: st.DrawFn, depth: int = 2) -> str:
    kind = draw(st.integers(0, 4 if depth else 2))
    if kind <= 2:
        return f"({draw(st.sampled_from(('<=', '>=', '<', '>', '==')))} {draw(terms())} {draw(terms())})"
    parts = draw(st.lists(formulas(depth - 1), min_size=1, max_size=3))
    return f"({'and' if kind == 3 else 'or'} {' '.join(parts)})"


@settings(max_examples=100)
@given(st.lists(formulas(), max_size=3), st.integers(0, 10**6))
def test_a_claim_says_what_its_text_says(asserted: list[str], seed: int) -> None:
    text = spec(*asserted)
    claim = read_vnnlib(text, SHAPES)
    flat = Claim(Shapes(((2,),), ((2,),)), claim.region, claim.property, claim.spans)
    asserts = "".join(f"(assert {a})" for a in (*BOX, *asserted))
    assert list(disagreements(first(asserts), flat, 25, seed)) == []


def test_not_equal_is_either_side() -> None:
    claim = read_vnnlib(spec("(!= Y[0] 0.5)"), SHAPES)
    x = torch.zeros(2)
    for y, wrong in ((0.5, False), (0.25, True), (0.75, True)):
        assert claim.holds_at(x, torch.tensor([y, 0.0])) is not wrong


def test_decimals_stay_exact() -> None:
    """0.1 is read from its digits: through a float it would be another number, and 0.1 <= x <= 0.1 a single point."""
    (box, _), = read_vnnlib(spec("(== X[0,0] 0.1)"), SHAPES).cases()  # fmt: skip
    assert float(box.box.lower[0]) < float(box.box.upper[0])


@pytest.mark.parametrize("kind", ["Real", "float32", "float64"])
def test_element_types(kind: str) -> None:
    claim = read_vnnlib(spec("(<= (* 2.0 Y[0]) 0.5)", "(<= -0.5 X[0,0])", kind=kind), SHAPES)
    assert bool(claim.assumptions) == (kind != "Real")


def test_several_tensors_follow_the_order_of_declaration() -> None:
    text = (
        "(vnnlib-version <2.0>)(declare-network n (declare-input a Real []) (declare-input B Real [2,3])"
        "(declare-output y Real [2]) (declare-output Z Real [1,2]))"
        "(assert (and (<= 0.0 a) (<= a 1.0)))"
        + "".join(f"(assert (and (>= B[{i},{j}] {i}.{j}) (<= B[{i},{j}] 9.0)))" for i in (0, 1) for j in (0, 1, 2))
        + "(assert (<= (+ y[1] Z[0,1]) a))"
    )
    claim = read_vnnlib(text, Shapes(((), (2, 3)), ((2,), (1, 2))))
    assert claim.region[0].box.upper.tolist() == [1.0] + [9.0] * 6  # type: ignore[index]
    low = claim.region[0].box.lower  # type: ignore[index]
    torch.testing.assert_close(low, torch.tensor([0, 0, 0.1, 0.2, 1, 1.1, 1.2], dtype=torch.float64))
    rows = claim.property.y.dense(1, 4), claim.property.x.dense(1, 7)
    assert rows[0].tolist() == [[0, 1, 0, 1]] and rows[1].tolist() == [[-1, 0, 0, 0, 0, 0, 0]]
    with pytest.raises(InvalidInput, match=r"input B\[1, 2\] is not bounded from above"):
        read_vnnlib(text.replace("(<= B[1,2] 9.0)", "(<= B[1,1] 9.0)"), claim.shapes)


def test_a_verification(tmp_path: Path) -> None:
    net = soundly.load(nn.Linear(2, 2), torch.zeros(1, 2))
    (tmp_path / "a.vnnlib").write_text(spec("(>= Y[0,0] 100.0)", outputs="[1,2]"))
    assert isinstance(soundly.verify(read_vnnlib(tmp_path / "a.vnnlib", net)), soundly.Proved)
    wrong = read_vnnlib(spec("(>= Y[0,0] -100.0)", outputs="[1,2]"), net)
    assert isinstance(soundly.verify(wrong), soundly.Refuted)


NETWORK = "(declare-network other (declare-input W Real [1])(declare-output V Real [1]))"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (spec("(<= (* X[0,0] Y[0]) 0.0)"), "line 11: only linear arithmetic"),
        (spec("(<= Y[0] Z[0])"), "line 11: .*Z"),
        (spec("(<= Y[2] 0.0)"), r"line 11: .*Y\[2\]"),
        (spec("(<= Y[-1] 0.0)"), "line 11: square brackets"),
        (spec("(<= Y[1.5] 0.0)"), "line 11: square brackets"),
        (spec("(<= Y[99999999999999999999] 0.0)"), "square brackets"),
        (spec("(<= Y[0] 0.0"), "line 11"),
        (spec("(<= Y[0] 1e5)"), "line 11"),
        (spec(f"(<= Y[0] 1{'0' * 1300}.0)"), "."),
        (spec(kind="int32", box=False), "."),
        (spec("(<= X[0,0] 1)", kind="int32", box=False), "element type I32"),
        (spec("(<= X[0,0] 1.0)", kind="float16", box=False), "element type F16"),
        (spec("(<= Y[0] 0.0)", box=False), r"X\[0, 0\] is not bounded from below"),
        (spec("(<= Y[0] 0.0)", outputs="[3]"), r"outputs of the shapes \[\(3,\)\].*\[\(2,\)\].*another network"),
        (spec("(<= Y[0,0] 0.0)", outputs="[2,1]"), "another network"),
        (spec().replace(")\n)\n", ")\n)\n" + NETWORK, 1), "2 networks"),
        (spec().replace("  (declare-output", '(declare-hidden H Real [1] "h")(declare-output'), "hidden value H"),
        (spec().replace("<2.0>", "<2.7>"), "version <2.7>"),
        (spec().replace("<2.0>", "<1.0>"), "version <1.0>"),
        ("(vnnlib-version)", "version"),
        (spec("(and " * (DEPTH + 1) + "(<= Y[0] 0.0)" + ")" * (DEPTH + 1)), "nested more than"),
        (spec("(<= Y[0] \0)"), "line 11: a byte is zero"),
        (spec('"a;b"'), "line 11: names in quotes"),
    ],
)
def test_what_is_refused(text: str, match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        read_vnnlib(text, SHAPES)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vnnlib", None)
    with pytest.raises(InvalidInput, match=r"soundly\[vnnlib\]"):
        read_vnnlib(spec(), SHAPES)
    monkeypatch.setitem(sys.modules, "vnnlib", sys)
    with pytest.raises(InvalidInput, match="too old"):
        read_vnnlib(spec(), SHAPES)
    assert isinstance(read_vnnlib("(declare-const X_0 Real)(assert (= X_0 0))", Shapes(((1,),), ((0,),))), Claim)


def test_tensors_matched_by_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1.0.2 of the package cannot parse such names; a later one may."""
    import vnnlib

    kind = vnnlib.DType.F32
    named = [SimpleNamespace(name=n, onnx_name=f'"{n}"', dtype=kind, shape=[1]) for n in "ab"]
    network = SimpleNamespace(inputs=named, outputs=named[:1], hidden=())
    query = SimpleNamespace(networks=(network,), assertions=())
    monkeypatch.setattr(vnnlib, "parse_query_string", lambda text: query)
    with pytest.raises(InvalidInput, match="ONNX names"):
        read_vnnlib(spec(), SHAPES)


def test_comments_before_the_first_command_take_no_time() -> None:
    start = time.process_time()
    with pytest.raises(InvalidInput):
        read_vnnlib("(" + ";" * 200_000 + "\n" + ";\n" * 100_000, SHAPES)
    with pytest.raises(InvalidInput):
        read_vnnlib(";\n" * 100_000 + ";" * 200_000, SHAPES)
    assert time.process_time() - start < 5


FUZZ = r"""
import random, sys
from soundly.errors import InvalidInput
from soundly.spec.claim import Shapes
from soundly.spec.vnnlib import read_vnnlib
text, seed = open(sys.argv[1]).read(), int(sys.argv[2])
rng, kept = random.Random(seed), 0
parts = "( ) [ ] [0] <2.0> \"n\" Real int8 and - 1.0 Y[1] X , \0 \xe9 ; \n".split(" ")
for _ in range(600):
    data = list(text)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(data))
        j = min(len(data), i + rng.randint(0, 30))
        k = rng.randrange(len(text))
        data[i:j] = rng.choice([list(rng.choice(parts)), data[i:j] * rng.randint(0, 3), list(text[k : k + 20])])
    try:
        read_vnnlib("".join(data), Shapes(((1, 2),), ((2,),)))
        kept += 1
    except InvalidInput:
        pass
print("kept", kept)
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_mutated_files_do_not_crash_the_process(seed: int, tmp_path: Path) -> None:
    """In a process of their own: the package is C++."""
    path = tmp_path / "a.vnnlib"
    path.write_text(spec("(or (<= (+ Y[0] (* 2.0 X[0,1])) 0.5) (!= (- Y[1] Y[0]) (- X[0,0])))"))
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(path), str(seed)], capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(Path(soundly.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 5  # some mutations change numbers alone
