"""What the documentation shows runs as it stands, and what is generated is up to date."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import soundly

DOCS = Path(__file__).resolve().parent.parent / "docs"


def shown(page: str, names: dict[str, Any]) -> list[str]:
    """Runs all examples of a page, in order, and says what the comments behind their prints promise."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    for i, block in enumerate(blocks):
        exec(compile(block, f"{page}.md, example {i + 1}", "exec"), names)
    return re.findall(r"^ *print\(.*\) +# (.*)$", "".join(blocks), re.MULTILINE)


def test_the_page_of_operations_is_what_the_code_says() -> None:
    """Otherwise: python docs/operations.py"""
    generated = runpy.run_path(str(DOCS / "operations.py"))["page"]()
    assert (DOCS / "operations.md").read_text(encoding="utf-8") == generated


def test_the_examples_of_the_page_on_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them in one run, in order; what a comment after a print promises is what is printed."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    text = (DOCS / "verification.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"model": model, "x": torch.full((1, 4), 0.5)}
    soundly.to_onnx(soundly.load(model, names["x"]), "net.onnx")
    for i, block in enumerate(blocks):
        exec(compile(block, f"verification.md, example {i + 1}", "exec"), names)
    promised = re.findall(r"^ *print\(.*\) +# (.*)$", "".join(blocks), re.MULTILINE)
    assert promised and capsys.readouterr().out.splitlines() == promised


def test_the_examples_of_the_page_on_grids(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    promised = shown("grids", names)
    assert promised and capsys.readouterr().out.splitlines() == promised


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_the_examples_of_the_page_on_editing(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "editing.md").read_text(encoding="utf-8"), re.DOTALL)
    u = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    v = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    names: dict[str, Any] = {"model": model, "x": torch.full((1, 3), 0.5), "u": u, "v": v, "torch": torch}
    for i, block in enumerate(blocks):
        exec(compile(block, f"editing.md, example {i + 1}", "exec"), names)
    promised = re.findall(r"^ *print\(.*\) +# (.*)$", "".join(blocks), re.MULTILINE)
    assert promised and capsys.readouterr().out.splitlines() == promised
    assert int(names["edited"](names["x"]).argmax()) == 2


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients:UserWarning")
def test_the_examples_of_the_page_on_explanations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the page's picture can be drawn from them: python docs/explanations.py"""
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(DOCS / "explanations.py"))
    script["draw"](script["found"]()).savefig("drawn.png")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "explanations.md").read_text(encoding="utf-8"), re.DOTALL)
    promised = re.findall(r"^ *print\(.*\) +# (.*)$", "".join(blocks), re.MULTILINE)
    assert promised and capsys.readouterr().out.splitlines() == promised


def test_the_examples_of_the_page_on_auditing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    promised = shown("auditing", names)
    assert len(promised) >= 17 and capsys.readouterr().out.splitlines() == promised


def test_the_examples_of_the_page_on_patterns(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    promised = shown("patterns", names)
    assert len(promised) == 5 and capsys.readouterr().out.splitlines() == promised


def test_the_examples_of_the_page_on_training(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    promised = shown("training", names)
    assert promised and capsys.readouterr().out.splitlines() == promised
    assert names["proofs"].proved >= 12 and names["report"].accuracy > 0.75
    assert len(names["lines"]) == 2 and 0 <= names["maps"].kept <= 1


def test_the_examples_of_the_page_on_two_networks(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    promised = shown("equivalence", names)
    assert promised and capsys.readouterr().out.splitlines() == promised
