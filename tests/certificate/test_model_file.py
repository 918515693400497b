"""Comparing a certificate with a .safetensors model: only bit-identical weights match, and hostile files only raise."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from soundly.certificate import Certificate, check, head_edit
from soundly.errors import ModelFileError

CLASSES = np.array([4, 1])


def certificate(weights: np.ndarray, layer: str = "fc", **changes: Any) -> Certificate:
    """One row, true whatever the weights are."""
    dtype = {"<f4": "float32", "<f8": "float64", "<u2": "bfloat16"}[weights.dtype.str]
    arguments: dict[str, Any] = {
        "vectors": np.zeros((1, weights.shape[1])), "value_vector": np.array([0]), "value_class": np.array([0]),
        "classes": CLASSES, "weights": weights, "bf16": dtype == "bfloat16",
        "row_start": np.array([0, 1]), "row_value": np.array([0]),
        "row_coefficient": np.ones(1), "lower": np.array([-1.0]), "upper": np.array([1.0]), "margin": np.zeros(1),
        "error": np.zeros(1), "claims": [{"name": "zero", "rows": [0, 1]}], "made_with": {},
        "model": {"before": "0", "after": "1", "layer": layer, "dtype": dtype},
    }  # fmt: skip
    return head_edit(**{**arguments, **changes})


def model(weights: np.ndarray, prefix: str = "fc.") -> dict[str, np.ndarray]:
    """Tensors of a layer with six outputs whose rows CLASSES are these weights."""
    whole = np.arange(6 * weights.shape[1]).reshape(6, -1).astype(weights.dtype)
    whole[CLASSES] = weights
    return {f"{prefix}weight": whole[:, :-1].copy(), f"{prefix}bias": whole[:, -1].copy(), "other": np.ones(3)}


def written(path: Path, tensors: dict[str, tuple[str, list[int], bytes]], **changes: Any) -> Path:
    """A .safetensors file by hand; `changes` override entries of its table."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    table.update(changes)
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


WEIGHTS = np.array([[0.1, -0.0, 3, 1e-40], [1, 2, -5, 0.25]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layer", ["fc", "model.head", ""])
def test_the_same_weights_match(tmp_path, dtype, layer):
    weights = WEIGHTS.astype(dtype)
    save_file(model(weights, f"{layer}." if layer else ""), tmp_path / "m.safetensors")
    result = check(certificate(weights, layer), model=tmp_path / "m.safetensors")
    assert result.accepted and result.model_matches is True and result.problems == ()


def test_bfloat16_bits_match(tmp_path):
    weights = (WEIGHTS.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    tensors = model(weights)
    path = written(
        tmp_path / "m", {k: ("BF16", list(a.shape), a.tobytes()) for k, a in tensors.items() if k != "other"}
    )
    assert check(certificate(weights), model=path).accepted
    path = written(tmp_path / "m", {k: ("F16", list(a.shape), a.tobytes()) for k, a in tensors.items() if k != "other"})
    assert not check(certificate(weights), model=path).accepted


def test_any_flipped_bit_of_a_claimed_row_is_found(tmp_path):
    weights = WEIGHTS.astype(np.float32)
    tensors = model(weights)
    for name in ("fc.weight", "fc.bias"):
        for index in np.ndindex(tensors[name].shape):
            for bit in (0, 22, 31):
                changed = {k: a.copy() for k, a in tensors.items()}
                changed[name].view(np.uint32)[index] ^= 1 << bit
                save_file(changed, tmp_path / "m")
                result = check(certificate(weights), model=tmp_path / "m")
                claimed = index[0] in CLASSES
                assert result.accepted is result.model_matches is (not claimed)
                if claimed:
                    (problem,) = result.problems
                    assert f"{name} differs from the certificate, first in row {index[0]}" in problem


def test_rows_in_another_chunk_are_compared(tmp_path, monkeypatch):
    monkeypatch.setitem(check.__globals__, "CHUNK", 3)
    weights = WEIGHTS.astype(np.float32)
    tensors = model(weights)
    tensors["fc.weight"][1, 2] += 1
    save_file(tensors, tmp_path / "m")
    assert "row 1" in check(certificate(weights), model=tmp_path / "m").problems[0]


def test_a_layer_without_bias_needs_zeros(tmp_path):
    weights = WEIGHTS.astype(np.float32)
    tensors = model(weights)
    del tensors["fc.bias"]
    save_file(tensors, tmp_path / "m")
    assert "no tensor 'fc.bias'" in check(certificate(weights), model=tmp_path / "m").problems[0]
    weights[:, -1] = [0.0, -0.0]
    assert check(certificate(weights), model=tmp_path / "m").accepted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "fc.weight": t["fc.weight"].astype(np.float64)}, "fc.weight is F64"),
        (lambda t: {**t, "fc.bias": t["fc.bias"].astype(np.float64)}, "fc.bias is F64"),
        (lambda t: {**t, "fc.weight": t["fc.weight"].view(np.int32)}, "fc.weight is I32"),
        (lambda t: {**t, "fc.weight": t["fc.weight"][:, :-1].copy()}, "fc.weight is F32"),
        (lambda t: {**t, "fc.weight": t["fc.weight"].reshape(-1)}, "fc.weight is F32"),
        (lambda t: {**t, "fc.bias": t["fc.bias"][:, None].copy()}, "fc.bias is F32"),
        (lambda t: {**t, "fc.weight": t["fc.weight"][:4].copy()}, "has 4 rows"),
        (lambda t: {**t, "fc.bias": t["fc.bias"][:3].copy()}, "has 3 rows"),
        (lambda t: {"other": t["other"]}, "no tensor 'fc.weight'"),
    ],
)
def test_another_model_is_a_problem(tmp_path, change, message):
    weights = WEIGHTS.astype(np.float32)
    save_file(change(model(weights)), tmp_path / "m")
    result = check(certificate(weights), model=tmp_path / "m")
    assert not result.accepted and result.model_matches is False
    assert any(message in problem for problem in result.problems), result.problems
    assert result.proven == 1  # the rows hold all the same


def test_nothing_is_compared_with_a_malformed_certificate(tmp_path):
    result = check(certificate(WEIGHTS, claims=[]), model=tmp_path / "absent")
    assert not result.accepted and result.model_matches is None


F4 = ("F32", [6, 3], bytes(72))


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"dtype": "F32", "shape": [6, 3]},
        {"dtype": "F32", "shape": [6, 3], "data_offsets": [0, 68]},
        {"dtype": "F32", "shape": [6, 3], "data_offsets": [4, 76]},
        {"dtype": "F32", "shape": [6, 3], "data_offsets": [-4, 68]},
        {"dtype": "F32", "shape": [6, 3], "data_offsets": [72, 0]},
        {"dtype": "F32", "shape": [6, 3], "data_offsets": ["0", "72"]},
        {"dtype": "F32", "shape": [6, 3], "data_offsets": [2**62, 2**62 + 72]},
        {"dtype": "F32", "shape": [6, -3], "data_offsets": [0, 72]},
        {"dtype": "F32", "shape": [-6, -3], "data_offsets": [0, 72]},
        {"dtype": "F32", "shape": [2**62, 3], "data_offsets": [0, 72]},
        {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": 18, "data_offsets": [0, 72]},
        {"dtype": ["F32"], "shape": [6, 3], "data_offsets": [0, 72]},
    ],
    ids=str,
)
def test_a_lying_entry_is_a_model_file_error(tmp_path, entry):
    path = written(tmp_path / "m", {"fc.weight": F4}, **{"fc.weight": entry})
    with pytest.raises(ModelFileError, match=r"fc\.weight.*damaged"):
        check(certificate(np.zeros((2, 4), np.float32)), model=path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\2\0\0",
        struct.pack("<Q", 2),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 22) + b'{"fc.weight":1.5,"b":1}',
        struct.pack("<Q", 13) + b'{"a":1,"a":2}',
        struct.pack("<Q", 50000) + b'{"a":' * 10000,
        struct.pack("<Q", 4) + b'"\xff"}',
    ],
    ids=lambda data: str(data)[:30],
)
def test_a_broken_file_is_a_model_file_error(tmp_path, data):
    path = tmp_path / "m"
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match="cannot be read"):
        check(certificate(WEIGHTS), model=path)
    with pytest.raises(ModelFileError, match="cannot be read"):
        check(certificate(WEIGHTS), model=tmp_path)


def test_damaged_model_files_never_crash_and_match_only_if_the_weights_do(tmp_path):
    weights, path = WEIGHTS.astype(np.float32), tmp_path / "m"
    save_file(model(weights), path)
    original, rng = path.read_bytes(), np.random.default_rng(0)
    c, outcomes = certificate(weights), set()
    for _ in range(600):
        data = bytearray(original)
        for _ in range(int(rng.integers(1, 3))):
            data[int(rng.integers(0, len(data)))] = int(rng.integers(0, 256))
        path.write_bytes(data[: int(rng.integers(len(data) - 9, len(data) + 1))])
        try:
            outcomes.add(check(c, model=os.fspath(path)).model_matches)
        except ModelFileError:
            outcomes.add(None)
    assert outcomes == {True, False, None}
