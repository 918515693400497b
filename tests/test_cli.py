"""The command line: exit codes, stable output, and no heavy import on the way to `soundly check`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from soundly.certificate import head_edit
from soundly.cli import main

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
    "arguments", [[], ["prove"], ["check"], ["check", "a", "b"], ["check", "a", "--format", "yaml"], ["--verbose"]]
)
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
    """Below 0.3 s, the best of three runs, without numpy."""

    def seconds() -> float:
        code = "import time; t = time.perf_counter(); import soundly.cli; print(time.perf_counter() - t)\n"
        return float(run("-c", code + "import sys; assert 'numpy' not in sys.modules").stdout)

    assert min(seconds() for _ in range(3)) < 0.3
