"""The command line: exit codes, stable output, and no heavy import on the way to `soundly check`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from soundly.certificate import Certificate, head_edit
from soundly.cli import main
from soundly.spec.claim import Claim
from soundly.verification.verdict import Effort, Empty, Progress, Proved, Refuted, Unknown

WEIGHTS = np.array([[2.0, 0.5]], np.float32)


def save(path: Path, *, upper: list[float], names: list[str] | None = None, **changes: Any) -> str:
    """One claim per row; every row is the number 2.5."""
    m = len(upper)
    names = names or [f"claim {i}" for i in range(m)]
    arguments: dict[str, Any] = {
        "vectors": np.ones((1, 2)), "value_vector": np.array([0]), "value_class": np.array([0]),
        "classes": np.array([1]), "weights": WEIGHTS,
        "row_start": np.arange(m + 1), "row_value": np.zeros(m, int), "row_coefficient": np.ones(m),
        "lower": np.full(m, -np.inf), "upper": np.array(upper, float), "margin": np.zeros(m), "error": np.zeros(m),
        "claims": [{"name": name, "rows": [i, i + 1]} for i, name in enumerate(names)],
        "model": {"before": "0", "after": "1", "layer": "fc", "dtype": "float32"}, "made_with": {},
    }  # fmt: skip
    head_edit(**{**arguments, **changes}).save(path)
    return os.fspath(path)


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), **options.pop("env", {})}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, **options)


def test_an_accepted_certificate(tmp_path, capsys):
    assert main(["check", save(tmp_path / "a.cert", upper=[3, 100], names=["small", "much larger"])]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "  proved      small        1 of 1 rows  slack 0.5",
        "  proved      much larger  1 of 1 rows  slack 98",
        "accepted      2 of 2 rows proved, over the reals, for the stored features and weights",
    ]


def test_a_refused_certificate_shows_what_failed_first(tmp_path, capsys):
    assert main(["check", save(tmp_path / "a.cert", upper=[3, 2])]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "  not proved  claim 1  0 of 1 rows  slack -0.5",
        "  proved      claim 0  1 of 1 rows  slack 0.5",
        "refused       1 of 2 rows proved, over the reals, for the stored features and weights",
    ]


def test_problems_are_shown(tmp_path, capsys):
    assert main(["check", save(tmp_path / "a.cert", upper=[3], claims=[])]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "  problem     the claims cover 0 of 1 rows",
        "refused       0 of 1 rows proved, over the reals, for the stored features and weights",
    ]


def test_many_claims_are_summed_up(tmp_path, capsys):
    assert main(["check", save(tmp_path / "a.cert", upper=[3.0] * 30)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 22 and lines[-2] == "  and 10 more claims, all proved"
    assert main(["check", save(tmp_path / "a.cert", upper=[3.0, 1.0] * 25)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "  and 30 more claims, 5 not proved" and "not proved" in lines[0]


def test_names_from_strangers_cannot_write_to_the_terminal(tmp_path, capsys):
    path = save(tmp_path / "a.cert", upper=[3, 3], names=["\x1b[2J\r\nproved \u202e", "x" * 500])
    assert main(["check", path]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out and "\u202e" not in out
    assert max(map(len, out.splitlines())) < 120
    done = run("-m", "soundly", "check", save(tmp_path / "b.cert", upper=[3], names=["größer"]),
               env={"PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert done.returncode == 0 and "gr\\xf6\\xdfer" in done.stdout


def test_the_model_is_compared(tmp_path, capsys):
    path, model = save(tmp_path / "a.cert", upper=[3]), tmp_path / "m.safetensors"
    save_file({"fc.weight": np.array([[9], [2]], np.float32), "fc.bias": np.array([9, 0.5], np.float32)}, model)
    assert main(["check", path, "--model", str(model)]) == 0
    assert f"  model       {model} holds exactly these weights" in capsys.readouterr().out.splitlines()
    save_file({"fc.weight": np.array([[9], [2]], np.float32), "fc.bias": np.array([9, 0.25], np.float32)}, model)
    assert main(["check", path, "--model", str(model)]) == 1
    assert "fc.bias differs from the certificate, first in row 1" in capsys.readouterr().out
    model.write_bytes(b"")
    assert main(["check", path, "--model", str(model)]) == 2
    assert "cannot be read as .safetensors" in capsys.readouterr().err


def test_json_output_is_stable(tmp_path, capsys):
    path = save(tmp_path / "a.cert", upper=[3, 2])
    assert main(["check", path, "--format", "json"]) == 1
    first = capsys.readouterr().out
    found = json.loads(first)
    slack = [claim.pop("worst_slack") for claim in found["claims"]]
    assert slack == pytest.approx([0.5, -0.5])
    assert found == {
        "file": path,
        "accepted": False,
        "rows": 2,
        "proven": 1,
        "claims": [{"name": "claim 0", "rows": 1, "proven": 1}, {"name": "claim 1", "rows": 1, "proven": 0}],
        "problems": [],
        "arithmetic": "over the reals, for the stored features and weights",
        "model_matches": None,
    }
    assert run("-m", "soundly", "check", path, "--format", "json").stdout == first


def test_json_has_no_infinity(tmp_path, capsys):
    path = save(tmp_path / "a.cert", upper=[3], vectors=np.array([[np.nan, 1]]))
    assert main(["check", path, "--format", "json"]) == 1

    def refuse(text: str) -> None:
        raise AssertionError(text)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["claims"] == [{"name": "claim 0", "rows": 1, "proven": 0, "worst_slack": None}]


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["prove"], ["check"], ["check", "a", "b"], ["check", "a", "--format", "yaml"], ["--verbose"],
        ["verify", "a.onnx"], ["verify", "a.onnx", "b.vnnlib", "--timeout", "0"], ["bench"],
        ["verify", "a.onnx", "b.vnnlib", "--timeout", "nan"], ["verify", "a.onnx", "b.vnnlib", "--memory", "much"],
    ],
)  # fmt: skip
def test_usage_errors(arguments, capsys):
    assert main(arguments) == 2
    assert "usage: soundly" in capsys.readouterr().err


def test_a_bad_file_is_an_error_and_not_a_refusal(tmp_path, capsys):
    (tmp_path / "bad.cert").write_bytes(b"{}" * 50)
    for name in ("bad.cert", "absent.cert", "\x1b[2J.cert"):
        assert main(["check", str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("soundly: ") and "\x1b" not in captured.err


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert "re-check a certificate" in capsys.readouterr().out
    assert main(["check", "--help"]) == 0
    assert "example: soundly check" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("soundly")


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_a_closed_pipe_is_an_error_without_a_traceback(tmp_path):
    path = save(tmp_path / "a.cert", upper=[3.0] * 9000)
    command = f"{sys.executable} -m soundly check {path} --format json | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (2, "{\n", "")


def test_check_needs_no_torch(tmp_path):
    """Of others' packages `soundly check` needs numpy alone: with these missing, it works."""
    path = save(tmp_path / "a.cert", upper=[3])
    code = (
        "import sys\n"
        "for name in ('torch', 'scipy', 'highspy', 'onnx', 'matplotlib'): sys.modules[name] = None\n"
        "from soundly.cli import main\n"
        "raise SystemExit(main(sys.argv[1:]))"
    )
    done = run("-c", code, "check", path)
    assert done.returncode == 0 and "accepted" in done.stdout, done.stderr
    done = run("-X", "importtime", "-m", "soundly", "check", path)
    assert "soundly.certificate.check" in done.stderr and "torch" not in done.stderr


def test_the_command_line_starts_quickly():
    """Below 0.3 s of its own, the best of three runs, without numpy."""

    def seconds() -> float:
        code = "import time; t = time.process_time(); import soundly.cli; print(time.process_time() - t)\n"
        return float(run("-c", code + "import sys; assert 'numpy' not in sys.modules").stdout)

    assert min(seconds() for _ in range(3)) < 0.3


# -- verify, with a stand-in for the engine

EFFORT = Effort(seconds=1.234, subproblems=3, settled="input splitting")
SPEC = """
(declare-const X_0 Real) (declare-const X_1 Real) (declare-const Y_0 Real)
(assert (>= X_0 0)) (assert (<= X_0 1)) (assert (>= X_1 0)) (assert (<= X_1 1))
(assert (>= Y_0 3))
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """y = relu(2 x_0 + 0.5 x_1), and the claim that it stays below 3."""
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 2]), ("y", [1, 1]))]
    nodes = [helper.make_node("Gemm", ["x", "w"], ["h"], transB=1), helper.make_node("Relu", ["h"], ["y"])]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], [numpy_helper.from_array(WEIGHTS, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx")
    (tmp_path / "p.vnnlib").write_text(SPEC)
    return os.fspath(tmp_path / "m.onnx"), os.fspath(tmp_path / "p.vnnlib")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What `verify` answers, an error to raise included; `given` is what it was called with."""
    stand_in = SimpleNamespace(answer=Empty(EFFORT), given=None)

    def verify(claim: Claim, **options: Any) -> Any:
        stand_in.given = {"claim": claim, **options}
        if isinstance(stand_in.answer, BaseException):
            raise stand_in.answer
        return stand_in.answer

    monkeypatch.setitem(sys.modules, "soundly.verification.verify", SimpleNamespace(verify=verify))
    return stand_in


def refuted(n: int = 2) -> Refuted:
    return Refuted(torch.tensor([[1.0, 0.1] * (n // 2)]), torch.tensor([3.5]), 0.5, "onnxruntime", EFFORT)


def test_verify_proved(tmp_path, capsys, files, engine):
    engine.answer = Proved(Certificate.load(save(tmp_path / "a.cert", upper=[3])), EFFORT)
    target = tmp_path / "out.cert"
    assert main(["verify", *files, "--certificate", str(target)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "proved        no counterexample exists, over the reals, for the stored features and weights",
        "  effort      input splitting, 3 subproblems, 1.23 s",
        f"  certificate {target}",
    ]
    assert main(["check", str(target)]) == 0
    capsys.readouterr()
    assert main(["verify", *files, "--format", "vnncomp"]) == 0
    assert capsys.readouterr().out == "unsat\n"
    assert main(["verify", *files, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "verdict": "proved", "model": files[0], "spec": files[1], "certificate": None, "seconds": 1.234,
        "subproblems": 3, "settled": "input splitting",
        "arithmetic": "over the reals, for the stored features and weights",
    }  # fmt: skip


def test_verify_refuted(tmp_path, capsys, files, engine):
    engine.answer = refuted()
    assert main(["verify", *files, "--certificate", str(tmp_path / "out.cert")]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "refuted       by a counterexample, replayed by onnxruntime",
        "  violation   0.5",
        "  inputs      1, 0.1",
        "  outputs     3.5",
        "  effort      input splitting, 3 subproblems, 1.23 s",
    ]
    assert not (tmp_path / "out.cert").exists()
    assert main(["verify", *files, "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert torch.equal(torch.tensor(found["witness"], dtype=torch.float32), engine.answer.witness.flatten())
    assert (found["verdict"], found["outputs"], found["violation"]) == ("refuted", [3.5], 0.5)
    engine.answer = refuted(100)
    assert main(["verify", *files]) == 1
    assert "  inputs      1, 0.1, 1, 0.1, 1, 0.1, ... 100 in all" in capsys.readouterr().out.splitlines()


def test_a_counterexample_as_the_competition_reads_it(capsys, files, engine):
    engine.answer = refuted()
    assert main(["verify", *files, "--format", "vnncomp"]) == 1
    word, rest = capsys.readouterr().out.split("\n", 1)
    assert word == "sat" and rest.count("(") == rest.count(")") == 4
    values = dict(pair.split() for pair in rest.replace("(", "\n").replace(")", "\n").split("\n") if pair.strip())
    assert {k: np.float32(v) for k, v in values.items()} == {"X_0": 1, "X_1": np.float32(0.1), "Y_0": 3.5}


def test_verify_unknown(capsys, files, engine):
    engine.answer = Unknown(-0.25, 0.125, "time limit reached\x1b[2J; more time may help", EFFORT)
    assert main(["verify", *files]) == 3
    assert capsys.readouterr().out.splitlines() == [
        "unknown       time limit reached?[2J; more time may help",
        "  bound       -0.25 at best, 12.5% of the search open",
        "  effort      3 subproblems, 1.23 s",
    ]
    assert main(["verify", *files, "--format", "vnncomp"]) == 3
    assert capsys.readouterr().out == "unknown\n"
    engine.answer = Unknown(float("-inf"), 1.0, "interrupted", EFFORT)
    assert main(["verify", *files, "--format", "json"]) == 3
    assert json.loads(capsys.readouterr().out)["bound"] is None


def test_verify_an_empty_specification(tmp_path, capsys, files, engine):
    assert main(["verify", *files, "--certificate", str(tmp_path / "out.cert")]) == 0
    assert (
        capsys.readouterr().out.splitlines()[0] == "empty         the specification allows no input: nothing is claimed"
    )
    assert not (tmp_path / "out.cert").exists()
    assert main(["verify", *files, "--format", "vnncomp"]) == 0
    assert capsys.readouterr().out == "unsat\n"


def test_what_verify_is_asked(tmp_path, files, engine):
    main(["verify", *files])
    claim = engine.given.pop("claim")
    assert claim.network.inputs[0].shape == (1, 2) and not claim.holds_at(torch.tensor([1.0, 1.0]), torch.tensor([3.0]))
    nothing = {"timeout": None, "memory": None, "attack": True, "journal": None, "progress": None}
    assert engine.given == {"model": files[0], **nothing, "arithmetic": "real"}
    main(["verify", *files, "--timeout", "60", "--memory", "1.5", "--no-attack", "--quiet"])
    assert 0 < 60 - engine.given["timeout"] < 30  # reading the files counts
    assert (engine.given["memory"], engine.given["attack"]) == (3 << 29, False)
    main(["verify", *files, "--arithmetic", "float32"])
    assert engine.given["arithmetic"] == "float32"
    main(["verify", *files, "--timeout", "1e-9"])
    assert engine.given["timeout"] > 0


def test_progress_is_for_terminals(capsys, files, engine, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(["verify", *files, "--quiet"])
    assert engine.given["progress"] is None and capsys.readouterr().err == ""
    main(["verify", *files])
    capsys.readouterr()
    engine.given["progress"](Progress(12.3, 450, 0.25, -0.5))
    assert capsys.readouterr().err.strip() == "12 s  450 subproblems  25.0% open  bound -0.5"


@pytest.mark.parametrize("problem", [RuntimeError("broken"), MemoryError(), KeyboardInterrupt(), OSError("disk full")])
def test_what_breaks_is_an_error_and_refutes_nothing(problem, capsys, files, engine):
    engine.answer = problem
    assert main(["verify", *files]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err
    assert captured.err.startswith("Traceback") != isinstance(problem, (OSError, KeyboardInterrupt))


def test_a_certificate_that_cannot_be_written_is_an_error(tmp_path, capsys, files, engine):
    engine.answer = Proved(Certificate.load(save(tmp_path / "a.cert", upper=[3])), EFFORT)
    assert main(["verify", *files, "--certificate", str(tmp_path / "absent" / "out.cert")]) == 2
    assert engine.given is None and "is no folder" in capsys.readouterr().err  # said before the search, not after it
    (tmp_path / "taken").mkdir()
    assert main(["verify", *files, "--certificate", str(tmp_path / "taken")]) == 2
    assert capsys.readouterr().out == ""


def test_files_that_do_not_fit_are_named(tmp_path, capsys, files, engine):
    model, spec = files
    Path(spec).write_text(SPEC.replace("(declare-const X_1 Real)", "(declare-const X_1 Real) (declare-const X_2 Real)"))
    cases = {
        (model, spec): "p.vnnlib declares 3 inputs, but the network has 2",
        (model, str(tmp_path / "absent.vnnlib")): "absent.vnnlib cannot be read",
        (str(tmp_path / "absent.onnx"), spec): "absent.onnx",
        (spec, spec): "soundly reads .onnx",
    }
    for pair, message in cases.items():
        assert main(["verify", *pair]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.out == "" and len(captured.err.splitlines()) == 1
    Path(spec).write_text(SPEC + "(assert (>= Y_0 (* X_0 X_1)))")
    assert main(["verify", model, spec]) == 2
    assert "p.vnnlib, line 5, column" in capsys.readouterr().err


# -- the competition's scripts

COMPETITION = Path(__file__).parents[1] / "competition"


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
@pytest.mark.parametrize(
    ("printed", "code", "expected"),
    [
        ("unsat", 0, "unsat\n"),
        ("sat\n((X_0 1.0)\n(Y_0 2.0))", 1, "sat\n((X_0 1.0)\n(Y_0 2.0))\n"),
        ("unknown", 3, "unknown\n"),
        ("", 1, "error\n"),  # a crash of the interpreter
        ("unsat", 1, "error\n"),
        ("unsat", 137, "error\n"),
        ("", 0, "error\n"),
    ],
)
def test_the_results_file_of_the_competition(tmp_path, printed, code, expected):
    python, result = tmp_path / "python", tmp_path / "result.txt"
    python.write_text(f"#!/bin/bash\necho \"$@\" > {tmp_path}/given\nprintf '%s\\n' '{printed}'\nexit {code}\n")
    python.chmod(0o755)
    result.write_text("sat")
    command = [COMPETITION / "run_instance.sh", "v1", "acasxu", "m.onnx", "p.vnnlib", result, "116"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHON": str(python)})
    assert result.read_text() == expected and sorted(p.name for p in tmp_path.iterdir()) == [
        "given", "python", "result.txt"
    ]  # fmt: skip
    given = "-m soundly verify m.onnx p.vnnlib --timeout 116 --format vnncomp --quiet\n"
    assert (tmp_path / "given").read_text() == given


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_the_competition_scripts_refuse_other_protocols(tmp_path, files):
    def code(script: str, *arguments: object) -> int:
        command = [os.fspath(COMPETITION / script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True).returncode

    assert code("prepare_instance.sh", "v1", "acasxu", *files) == 0
    assert code("prepare_instance.sh", "v1", "acasxu", files[0], tmp_path / "absent.vnnlib") != 0
    assert code("prepare_instance.sh", "v2", "acasxu", *files) == 1
    assert code("run_instance.sh", "v2", "acasxu", *files, tmp_path / "r", 9) == 1
    assert code("run_instance.sh", "v1", "acasxu", *files) == 1 and code("install_tool.sh", "v2") == 1
