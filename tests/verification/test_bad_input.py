"""Broken and harmful files through `soundly verify`: an error with exit code 2 that names the file and the place, or an
answer that is right, and either soon and in little memory."""

import gzip
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tests.spec.test_vnnlib import is_counterexample

from soundly.cli import main

VERDICTS = {0: ("proved", "empty"), 1: ("refuted",), 3: ("unknown",)}
LIMIT = 1.0  # seconds that a search may take; broken files should never get that far


# -- small base files


def network(inputs: int = 3, outputs: int = 2) -> onnx.ModelProto:
    rng = np.random.default_rng(4)
    constants = {
        "w": rng.normal(size=(6, inputs)), "b": rng.normal(size=6), "v": rng.normal(size=(6, outputs)),
        "s": np.array([0.5] * outputs), "shape": np.array([1, -1]),
    }  # fmt: skip
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["a"], name="first", transB=1),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "v"], ["z"], name="second"),
        helper.make_node("Reshape", ["z", "shape"], ["flat"], name="reshape"),
        helper.make_node("Sub", ["flat", "s"], ["y"], name="shift"),
    ]
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, size))
        for name, size in (("x", inputs), ("y", outputs))
    ]
    stored = [
        numpy_helper.from_array(v.astype(np.int64 if k == "shape" else np.float32), k) for k, v in constants.items()
    ]
    graph = helper.make_graph(nodes, "small", infos[:1], infos[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def values(model: onnx.ModelProto, x: Any) -> Any:
    """The outputs by onnx's own evaluator, which shares no code with soundly or onnxruntime."""
    port = model.graph.input[0]
    shape = [d.dim_value or 1 for d in port.type.tensor_type.shape.dim]
    kind = helper.tensor_dtype_to_np_dtype(port.type.tensor_type.elem_type)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        results = ReferenceEvaluator(model).run(None, {port.name: np.array(x, dtype=kind).reshape(shape)})
    return np.concatenate([np.asarray(r, np.float64).reshape(-1) for r in results])


def spec(*asserted: str, inputs: int = 3, outputs: int = 2, box: str = "0.25") -> str:
    lines = [f"(declare-const X_{i} Real)" for i in range(inputs)] + [
        f"(declare-const Y_{j} Real)" for j in range(outputs)
    ]
    lines += [f"(assert (>= X_{i} -{box}))\n(assert (<= X_{i} {box}))" for i in range(inputs)]
    return "\n".join(["; a comment (with a parenthesis", *lines, *(f"(assert {a})" for a in asserted)]) + "\n"


SPECS = (
    spec("(<= Y_0 -100)"),
    spec("(or (and (<= Y_0 Y_1) (>= Y_1 1e2)) (and (>= (+ Y_0 (* -2 Y_1)) 50) (<= X_0 0.1)))"),
    spec("(or (and (<= X_0 0) (>= X_1 0.1)) (and (>= X_0 0.05) (<= X_2 0)))", "(>= Y_0 -100.5)"),
    spec("(<= (- Y_0 Y_1) (+ X_0 0.125 (* 3 X_1)))", "(< Y_1 1e3)"),
)


# -- mutations: bytes, structure, sizes


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(rng.randint(1, 2)):
        i = rng.randrange(len(found))
        match rng.randrange(4):
            case 0:
                found[i] = rng.randrange(256)
            case 1:
                del found[i : i + rng.randint(1, 30)]
            case 2:
                found[i:i] = found[rng.randrange(len(found)) :][: rng.randint(1, 100)]
            case 3 if rng.random() < 0.3:
                del found[max(i, len(found) // 2) :]
        if not found:
            return b""
    return bytes(found)


TOKENS = (
    '( ) and or assert <= >= < = + - * / 1 -1 0 1e400 1e-400 9e999999 nan inf 0.1 X_0 X_3 Y_0 Y_2 Y_99999 ; " |'.split()
)


def changed_weights(data: bytes, rng: random.Random) -> bytes:
    """Single bytes replaced, so that more than every tenth file stays readable."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        found[rng.randrange(len(found))] = rng.randrange(256)
    return bytes(found)


def changed_text(data: bytes, rng: random.Random) -> bytes:
    """Tokens and lines replaced, removed, doubled and exchanged."""
    tokens = re.findall(r"[()]|[^\s()]+|\n", data.decode())
    for _ in range(rng.randint(1, 3)):
        i, j = rng.randrange(len(tokens)), rng.randrange(len(tokens))
        match rng.randrange(5):
            case 0:
                tokens[i] = rng.choice(TOKENS)
            case 1:
                tokens[i : i + rng.randint(1, 6)] = []
            case 2:
                tokens[i:i] = tokens[j : j + rng.randint(1, 20)]
            case 3:
                tokens[i], tokens[j] = tokens[j], tokens[i]
            case _:
                numbers = [k for k, token in enumerate(tokens) if re.fullmatch(r"-?[0-9.e]+", token)]
                if numbers:
                    tokens[rng.choice(numbers)] = f"{rng.gauss(0, 1):.3g}"
        if not tokens:
            return b""
    return " ".join(tokens).encode()


def changed_sizes(data: bytes, rng: random.Random) -> bytes:
    """Other numbers of variables, and long numbers, chains and lists."""
    text, n = data.decode(), rng.choice((0, 1, 2, 4, 40))
    match rng.randrange(6):
        case 0:
            return spec("(<= Y_0 -100)", inputs=n).encode()
        case 1:
            return spec("(<= X_0 0)", outputs=n).encode()
        case 2:
            return text.replace("0.25", "0." + "3" * rng.choice((100, 1190, 5000))).encode()
        case 3:
            depth = rng.choice((10, 1000, 50_000))
            return (text + "(assert " + "(and " * depth + "(<= Y_0 9)" + ")" * (depth + rng.choice((0, 1, 1)))).encode()
        case 4:
            return (text + "(assert (or " + "(<= Y_0 -99)" * rng.choice((100, 2_000)) + "))").encode()
        case _:
            return (text + "(assert (or (<= Y_0 0) (>= X_0 0.1) (<= Y_1 X_0)))" * rng.choice((2, 60))).encode()


def changed_model(data: bytes, rng: random.Random) -> bytes:
    """The graph itself: other shapes, types, edges, attributes and weights."""
    model = onnx.load_model_from_string(data)
    graph = model.graph
    node = rng.choice(graph.node)
    names = [t.name for t in graph.initializer] + ["x", "a", "r", "z", "flat", "y", "nowhere", ""]
    for _ in range(rng.randint(1, 2)):
        match rng.randrange(9):
            case 0:
                node.input[rng.randrange(len(node.input))] = rng.choice(names)
            case 1:
                node.op_type = rng.choice(
                    ("Relu", "Gemm", "Add", "Sign", "Floor", "Softmax", "TopK", "LSTM", "If", "Div")
                )
            case 2:
                rng.choice(graph.initializer).dims[0] = rng.choice((0, 1, 2, 6, 7, -1, 2**40))
            case 3:
                rng.choice(graph.initializer).data_type = rng.choice((1, 6, 7, 8, 10, 11, 99))
            case 4:
                ports = rng.choice((graph.input, graph.output))
                ports[0].type.tensor_type.shape.dim[rng.randrange(2)].dim_value = rng.choice((0, 1, 2, 3, 4, -1, 2**31))
            case 5:
                stored = rng.choice(
                    [t for t in graph.initializer if t.data_type == TensorProto.FLOAT] or graph.initializer
                )
                scale = rng.choice((0.0, -1.0, 1e20, 1e-40, np.nan, np.inf))
                if stored.data_type == TensorProto.FLOAT:
                    with np.errstate(all="ignore"):
                        weights = np.frombuffer(stored.raw_data, np.float32) * np.float32(scale)
                    stored.raw_data = weights.tobytes()
            case 6:
                graph.node.remove(node) if node in graph.node and len(graph.node) > 1 else None
                node = graph.node[0]
            case 7:
                graph.node.insert(rng.randrange(len(graph.node)), node)
            case _:
                node.attribute.append(
                    helper.make_attribute(rng.choice(("axis", "alpha", "transA", "to")), rng.choice((0, 1, 9)))
                )
    return bytes(model.SerializeToString())


# -- the check


class Trial:
    """Runs `soundly verify` in this process on files in a folder, and counts what comes of it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.outcomes: Counter[str] = Counter()
        self.judged = 0

    def run(self, model: bytes, text: bytes) -> dict[str, Any] | None:
        (self.folder / "net.onnx").write_bytes(model)
        (self.folder / "p.vnnlib").write_bytes(text)
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = main(arguments(self.folder))
        out, err = self.capsys.readouterr()
        assert time.monotonic() - start < LIMIT + 9
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
        facts = verdict(code, out, err)
        self.outcomes["error" if facts is None else facts["verdict"]] += 1
        return facts


def arguments(folder: Path) -> list[str]:
    files = [str(folder / "net.onnx"), str(folder / "p.vnnlib")]
    return ["verify", *files, "--timeout", f"{LIMIT}", "--format", "json", "--quiet"]


PLACE = re.compile(
    r"p\.vnnlib(, line \d+, column \d+: |: input X_\d+ is not bounded|: a bound on input X_| declares \d+ "
    r"| does not declare [XY]_|: its assertions multiply out| is a (damaged )?gzip)|net\.onnx(: | is | holds | uses )"
)
"""How messages begin: with the file, and with what in it is wrong, where there is such a place."""


def verdict(code: int, out: str, err: str) -> dict[str, Any] | None:
    """The answer, None for an error; anything else fails."""
    if code == 2:
        assert re.fullmatch(r"soundly: [^\n]+\n", err) and not out, err
        assert PLACE.match(err, len("soundly: ")), err
        return None
    facts: dict[str, Any] = json.loads(out)
    assert facts["verdict"] in VERDICTS[code] and not err, (code, out, err)
    return facts


def judge(trial: Trial, facts: dict[str, Any], text: str, model: onnx.ModelProto, rng: random.Random) -> None:
    """Whether the answer is right, by evaluators of both files that are not soundly's."""
    evaluate: Callable[[Any], Any] = lambda x: values(model, x)  # noqa: E731
    if facts["verdict"] == "refuted":
        x, y = facts["witness"], facts["outputs"]
        np.testing.assert_allclose(evaluate(x), y, rtol=1e-4, atol=1e-4)
        near = [Fraction(v) for v in x]
        assert is_counterexample(text, near, y) or facts["violation"] < 1e-6, (text, x, y)  # type: ignore[arg-type]
    if facts["verdict"] in ("proved", "empty"):
        for _ in range(8):
            x = np.array([rng.uniform(-0.3, 0.3) for _ in range(3)], np.float32).tolist()
            assert not is_counterexample(text, x, evaluate(x).tolist()), (text, x)
    trial.judged += 1


# -- the tests

CHANGES = {"bytes": changed_bytes, "structure": changed_text, "sizes": changed_sizes}
MODELS = {"bytes": changed_weights, "structure": changed_model}


def mutated_spec(kind: str, rng: random.Random) -> bytes:
    """One of the specifications, changed; every other one of changed bytes is packed before or after."""
    text = rng.choice(SPECS).encode()
    match rng.randrange(4) if kind == "bytes" else 0:
        case 1:
            return changed_bytes(gzip.compress(text, mtime=0), rng)
        case 2:
            return gzip.compress(changed_bytes(text, rng), mtime=0)
    return CHANGES[kind](text, rng)


@pytest.mark.parametrize(("kind", "count"), [("bytes", 400), ("structure", 500), ("sizes", 100)])
def test_mutated_specifications(kind: str, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, model = random.Random(kind), network()
    trial, data = Trial(tmp_path, capsys), model.SerializeToString()
    for _ in range(count):
        text = mutated_spec(kind, rng)
        facts = trial.run(data, text)
        if facts is not None and text[:2] != b"\x1f\x8b":
            try:
                judge(trial, facts, text.decode("utf-8", "replace"), model, rng)
            except (KeyError, ValueError, RecursionError):  # beyond the reference: chains of comparisons, "true", depth
                continue
    assert trial.outcomes["error"] > count / 4 and trial.outcomes["unknown"] < count / 20, trial.outcomes
    assert trial.judged > count / 20, trial.judged


@pytest.mark.parametrize(("kind", "count"), [("bytes", 250), ("structure", 250)])
def test_mutated_networks(kind: str, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, data = random.Random(kind), network().SerializeToString()
    trial = Trial(tmp_path, capsys)
    for _ in range(count):
        mutated, text = MODELS[kind](data, rng), rng.choice(SPECS)
        facts = trial.run(mutated, text.encode())
        if facts is not None:
            judge(trial, facts, text, onnx.load_model_from_string(mutated), rng)
    assert trial.outcomes["error"] > count / 4, trial.outcomes
    assert trial.judged > count / 20, trial.judged


def test_the_judge_finds_wrong_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reference is awake: answers turned round are caught."""
    trial, model, rng = Trial(tmp_path, capsys), network(), random.Random(0)
    true, false = spec("(<= Y_0 -100)"), spec("(>= Y_0 -100)")
    facts = trial.run(model.SerializeToString(), false.encode())
    assert facts is not None and facts["verdict"] == "refuted"
    judge(trial, facts, false, model, rng)
    with pytest.raises(AssertionError):
        judge(trial, facts, true, model, rng)
    with pytest.raises(AssertionError):
        judge(trial, {**facts, "outputs": [9.0, 9.0]}, false, model, rng)
    with pytest.raises(AssertionError):
        judge(trial, {"verdict": "proved"}, false, model, rng)


def test_mutated_files_in_a_process_of_their_own(tmp_path: Path) -> None:
    """With memory and time that the system enforces: a crash or a hang would show here."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))

    rng, data = random.Random(20), network().SerializeToString()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    codes = Counter[int]()
    for k in range(4):
        mutated, text = data, SPECS[0].encode()
        if k == 0:
            pass  # what nobody has touched is decided
        elif k % 2:
            mutated = MODELS[rng.choice(list(MODELS))](data, rng)
        else:
            text = mutated_spec(rng.choice(list(CHANGES)), rng)
        (tmp_path / "net.onnx").write_bytes(mutated)
        (tmp_path / "p.vnnlib").write_bytes(text)
        done = subprocess.run(
            [sys.executable, "-m", "soundly", *arguments(tmp_path)], capture_output=True, text=True, timeout=60,
            env=environment, preexec_fn=limit,
        )  # fmt: skip
        verdict(done.returncode, done.stdout, done.stderr)
        codes[done.returncode] += 1
    assert codes[2] and len(codes) > 1, codes


# -- what is no error, and what must be one


@pytest.mark.parametrize("asserted", ["(>= X_0 0.250000000000000001)", "(and (< X_1 0.1) (>= X_1 0.1))", "(or)"])
def test_contradictory_bounds_claim_nothing(asserted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = Trial(tmp_path, capsys).run(network().SerializeToString(), spec(asserted, "(<= Y_0 0)").encode())
    assert facts is not None and facts["verdict"] == "empty"


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [(5, 2, "declares 5 inputs, but the network has 3"), (3, 10, "declares 10 outputs, but the network has 2")],
)
def test_a_specification_of_another_network(
    inputs: int, outputs: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.onnx").write_bytes(network().SerializeToString())
    (tmp_path / "p.vnnlib").write_text(spec("(<= Y_0 0)", inputs=inputs, outputs=outputs))
    assert main(arguments(tmp_path)) == 2
    err = capsys.readouterr().err
    assert message in err and "it was written for another network" in err


@pytest.mark.parametrize(("bound", "expected"), [("-100", "proved"), ("100", "refuted")])
def test_a_network_that_ignores_its_input(
    bound: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = network()
    model.graph.node[4].input[0] = "s"  # y = s - s
    model.graph.initializer[3].dims[:] = [1, 2]
    facts = Trial(tmp_path, capsys).run(model.SerializeToString(), spec(f"(<= Y_0 {bound})").encode())
    assert facts is not None and facts["verdict"] == expected


def test_a_product_with_a_factor_that_is_constant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """y = exp((x w) (x 0)) is 1, whatever x."""
    model = network()
    graph = model.graph
    del graph.node[:]
    graph.initializer.append(numpy_helper.from_array(np.ones((3, 2), np.float32), "p"))
    graph.initializer.append(numpy_helper.from_array(np.zeros((3, 2), np.float32), "q"))
    for op, inputs, output in (("MatMul", "xp", "k"), ("MatMul", "xq", "l"), ("Mul", "kl", "m"), ("Exp", "m", "y")):
        graph.node.append(helper.make_node(op, list(inputs), [output]))
    facts = Trial(tmp_path, capsys).run(model.SerializeToString(), spec("(<= Y_0 0.5)").encode())
    assert facts is not None and facts["verdict"] == "proved"


@pytest.mark.parametrize("swapped", [True, False])
def test_files_that_are_something_else(swapped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files exchanged, and both empty."""
    model, text = (SPECS[0].encode(), network().SerializeToString()) if swapped else (b"", b"")
    assert Trial(tmp_path, capsys).run(model, text) is None
    assert Trial(tmp_path, capsys).run(network().SerializeToString(), text) is None
