"""`soundly check --model M --spec S`: a certificate is about this model and this specification, or it is refused."""

from pathlib import Path

import pytest
from tests.verification.test_bad_input import network, spec

from soundly.cli import main

SPEC = spec("(or (and (<= Y_0 -100) (<= X_0 0.1)) (>= (+ Y_0 (* -2 Y_1)) 50))")


@pytest.fixture(scope="module")
def proved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network, a specification and its certificate."""
    folder = tmp_path_factory.mktemp("proved")
    (folder / "net.onnx").write_bytes(network().SerializeToString())
    (folder / "p.vnnlib").write_text(SPEC)
    files = [str(folder / name) for name in ("net.onnx", "p.vnnlib", "proof.cert")]
    assert main(["verify", *files[:2], "--timeout", "60", "--quiet", "--certificate", files[2]]) == 0
    return folder


def compared(folder: Path, model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["check", str(folder / "proof.cert"), "--model", str(model), "--spec", str(text)])
    return code, capsys.readouterr().out


def test_the_model_and_the_specification_of_a_certificate(proved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = compared(proved, proved / "net.onnx", proved / "p.vnnlib", capsys)
    assert code == 0 and "not the claim" not in out


@pytest.mark.parametrize(
    ("old", "new"),
    [("-100", "-100.5"), ("50", "51"), ("0.25)", "0.2500001)"), ("0.1)", "0.11)"), ("-2 Y_1", "-3 Y_1"), ("50", "-50")],
)
def test_another_specification_is_noticed(
    proved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str
) -> None:
    assert old in SPEC
    (tmp_path / "p.vnnlib").write_text(SPEC.replace(old, new))
    code, out = compared(proved, proved / "net.onnx", tmp_path / "p.vnnlib", capsys)
    assert code == 1 and "not the claim" in out


def test_a_clause_more_or_less_is_noticed(proved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (spec("(>= (+ Y_0 (* -2 Y_1)) 50)"), SPEC + "(assert (<= Y_1 1000))\n"):
        (tmp_path / "p.vnnlib").write_text(text)
        code, out = compared(proved, proved / "net.onnx", tmp_path / "p.vnnlib", capsys)
        assert code == 1 and "not the claim" in out


@pytest.mark.parametrize("name", ["w", "b", "v", "s"])
def test_one_other_weight_is_noticed(
    proved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model = network()
    (stored,) = (t for t in model.graph.initializer if t.name == name)
    data = bytearray(stored.raw_data)
    data[-4] ^= 1  # the last bit of the last number
    stored.raw_data = bytes(data)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    code, out = compared(proved, tmp_path / "net.onnx", proved / "p.vnnlib", capsys)
    assert code == 1 and "not the claim" in out


def test_another_operation_is_noticed(proved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    model.graph.node[1].op_type = "Abs"
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    code, out = compared(proved, tmp_path / "net.onnx", proved / "p.vnnlib", capsys)
    assert code == 1 and "not the claim" in out


def test_both_belong_together(proved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, name in (("--model", "net.onnx"), ("--spec", "p.vnnlib")):
        assert main(["check", str(proved / "proof.cert"), option, str(proved / name)]) == 2
        assert "give both" in capsys.readouterr().err
