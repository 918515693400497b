"""Importing soundly is cheap: nothing heavy is loaded before it is used, and every public name exists."""

import subprocess
import sys

import pytest

import soundly


def test_importing_soundly_loads_no_torch() -> None:
    code = "import sys, soundly; print([m for m in ('torch', 'numpy', 'scipy', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", soundly.__all__)
def test_every_public_name_is_what_it_says_and_stays_it(name: str) -> None:
    value = getattr(soundly, name)
    assert callable(value) and value.__name__ == name
    assert getattr(soundly, name) is value  # also after its package has been imported


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'verfy'"):
        soundly.verfy  # noqa: B018
