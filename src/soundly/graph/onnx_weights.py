"""Replacing weights inside an ONNX file and nothing else: everything but their numbers stays as it is, bit for bit.

Parsing a file and writing it again may move fields and drop what the parser does not know. So the bytes of each
initialiser are found in the file's own encoding (protocol buffers: a field's number and kind, its length, its content)
and overwritten where they are.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from soundly.errors import EditError, ModelFileError

Array = npt.NDArray[Any]

_GRAPH, _INITIALIZER = (7, 2), (5, 2)
"""Field and kind (2: bytes) of the graph in a model and of an initialiser in a graph."""
_TYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 10: np.dtype("<f2"), 11: np.dtype("<f8")}


@dataclass(frozen=True)
class Span:
    """Where a file keeps the entries of an initialiser: data[begin:end], little-endian, in C order."""

    begin: int
    end: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def read(self, data: bytes | bytearray) -> Array:
        """The entries [n], not copied."""
        return np.frombuffer(data, self.dtype, (self.end - self.begin) // self.dtype.itemsize, self.begin)


def digest(data: bytes | bytearray) -> str:
    """What a model file is recognised by: the SHA-256 of its content, unpacked."""
    return hashlib.sha256(data).hexdigest()


def spans(data: bytes) -> dict[str, Span]:
    """The initialisers of a serialised model that can be replaced where they are, by name.

    Those are floating-point numbers in one piece inside the file.

    Raises:
        ModelFileError: the bytes are no ONNX model.
    """
    graphs = [(begin, end) for field, kind, begin, end in _fields(data, 0, len(data)) if (field, kind) == _GRAPH]
    if len(graphs) != 1:
        raise ModelFileError(f"the model holds {len(graphs)} graphs; weights are replaced where there is one.")
    found: dict[str, Span] = {}
    twice: set[str] = set()
    for field, kind, begin, end in _fields(data, *graphs[0]):
        if (field, kind) == _INITIALIZER:
            name, span = _tensor(data, begin, end)
            twice |= {name} & found.keys()
            if span is not None:
                found[name] = span
    return {name: span for name, span in found.items() if name not in twice}


def replaced(data: bytes, new: Mapping[str, Array]) -> bytes:
    """The model with other entries of some initialisers.

    Args:
        data: the serialised model.
        new: arrays of the initialisers' shapes, by name; stored in the file's type, which must hold them exactly.

    Raises:
        EditError: a name is no initialiser that can be replaced, or its type cannot hold the entries.
    """
    where, result = spans(data), bytearray(data)
    for name, array in new.items():
        span = where.get(name)
        if span is None:
            raise EditError(
                f"the file does not hold the entries of {name!r} in one piece (external data, say); save it with "
                "onnx.save_model(..., save_as_external_data=False)."
            )
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array, span.dtype)
        same = stored.astype(array.dtype).tobytes() == array.tobytes()
        if tuple(array.shape) != span.shape or not same:
            raise EditError(
                f"the file stores {name!r} as {span.dtype.name} {list(span.shape)}, which cannot hold the edited "
                "weights exactly; convert the model to the type it computes in first."
            )
        result[span.begin : span.end] = stored.tobytes()
    return bytes(result)


def write(data: bytes, path: str | os.PathLike[str], accept: Callable[[Path], None] = lambda partial: None) -> None:
    """Writes a model, gzipped if the path ends in ".gz"; readers see the old file or the whole new one.

    Args:
        accept: called with the finished file before it gets its name; if it raises, nothing is kept.
    """
    path = Path(path)
    suffix = ".onnx.gz" if path.name.endswith(".gz") else ".onnx"
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{suffix}")
    try:
        with partial.open("xb") as file:
            file.write(gzip.compress(data, mtime=0) if suffix == ".onnx.gz" else data)
            file.flush()
            os.fsync(file.fileno())
        accept(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _tensor(data: bytes, begin: int, end: int) -> tuple[str, Span | None]:
    """The name of a TensorProto, and where its entries are if they are floating-point numbers in one piece."""
    name, code, dims, external = "", 0, list[int](), False
    payloads: list[tuple[int, int, int]] = []
    for field, kind, first, last in _fields(data, begin, end):
        match field, kind:
            case 8, 2:  # name
                name = data[first:last].decode("utf-8", "replace")
            case 2, 0:  # data_type
                code = first
            case 1, 0:  # dims, one by one
                dims.append(first)
            case 1, 2:  # dims, packed
                while first < last:
                    dim, first = _varint(data, first, last)
                    dims.append(dim)
            case 14, 0:  # data_location
                external = first != 0
            case ((4 | 9 | 10), _):  # float_data, raw_data, double_data
                payloads.append((field if kind == 2 else 0, first, last))
    dtype = _TYPES.get(code)
    if dtype is None or external or len(payloads) != 1:
        return name, None
    field, first, last = payloads[0]
    if (field, code) not in ((9, 1), (9, 10), (9, 11), (4, 1), (10, 11)) or last - first != math.prod(
        dims
    ) * dtype.itemsize:
        return name, None
    return name, Span(first, last, dtype, tuple(dims))


def _fields(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, kind, and first and last byte of the content of each field; for an integer the number itself."""
    while begin < end:
        key, begin = _varint(data, begin, end)
        field, kind = key >> 3, key & 7
        match kind:
            case 0:
                value, begin = _varint(data, begin, end)
                yield field, kind, value, begin
                continue
            case 1 | 5:
                length = 8 if kind == 1 else 4
            case 2:
                length, begin = _varint(data, begin, end)
            case _:
                raise ModelFileError(f"byte {begin} of the model is no field of a protocol buffer.")
        if begin + length > end:
            raise ModelFileError(f"byte {begin} of the model: {length} bytes do not fit; it is damaged.")
        yield field, kind, begin, begin + length
        begin += length


def _varint(data: bytes, begin: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if begin >= end:
            break
        byte = data[begin]
        value, begin = value | (byte & 127) << shift, begin + 1
        if byte < 128:
            return value, begin
    raise ModelFileError(f"byte {begin} of the model: a number does not end; it is damaged.")
