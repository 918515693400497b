"""What the commands share: exit codes, plain text, the status line, arguments and where results may be written."""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundly.errors import InvalidInput

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Verbs = argparse._SubParsersAction

YES, NO, ERROR, UNKNOWN = 0, 1, 2, 3
SHOWN = 20


def status(text: str) -> None:
    """One line of the terminal, written over again and again."""
    print(f"\r{text:<78.78}" + "\r" * (not text), end="", file=sys.stderr, flush=True)


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def onnx_name(text: str) -> str:
    if not text.endswith((".onnx", ".onnx.gz")):
        raise argparse.ArgumentTypeError(f"{text} must end in .onnx or .onnx.gz, the format that is written")
    return text


def require_targets(targets: dict[str, str | None], **sources: str) -> None:
    """Every file can be written, and none of them over another one."""
    taken = {Path(path).absolute(): name for name, path in sources.items()}
    for name, path in targets.items():
        if path is None:
            continue
        target = Path(path).absolute()
        if not target.parent.is_dir():
            raise InvalidInput(f"{name}: {target.parent} is no folder; make it first.")
        same = [other for known, other in taken.items() if known == target or _is_same(known, target)]
        if same:
            raise InvalidInput(f"{name}: {path} is {same[0]} too; give each its own file.")
        taken[target] = name


def _is_same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def plain(text: str) -> str:
    """Without what could move a terminal's cursor: names and paths come from strangers."""
    return "".join(character if character.isprintable() else "?" for character in text)


def finite(value: Any) -> Any:
    """JSON has no infinity; null stands for it."""
    match value:
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value
