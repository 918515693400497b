"""Reading ONNX files that nobody vouches for.

A file may be broken or hostile: bombs in a few bytes, external data that points out of its folder, another format under
an .onnx name. Everything here checks sizes before it allocates, opens nothing outside the model's folder, and ends in
`ModelFileError` naming the file and the place. Nothing in a file is ever executed.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soundly.errors import CaptureError, ModelFileError, UnsupportedOp

try:
    import onnx as onnx
except ModuleNotFoundError as error:
    raise CaptureError("ONNX files need the onnx and onnxruntime packages: pip install 'soundly[onnx]'.") from error

FILE_BYTES = 2**31
"""No model file is larger, packed or unpacked: protobuf's own limit."""
UNPACKED_BYTES = 2**30
"""The most that a gzipped file may unpack to."""
NODES = 2**17
"""The most operations that a file may hold."""

DTYPES = {
    1: "<f4", 2: "|u1", 3: "|i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "|b1", 10: "<f2", 11: "<f8", 12: "<u4",
    13: "<u8",
}  # fmt: skip
"""numpy's names for ONNX's numbers of element types."""
_FIELDS = {1: "float_data", 7: "int64_data", 11: "double_data", 12: "uint64_data", 13: "uint64_data"}
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, such as a PyTorch checkpoint"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to"),
)


@dataclass(frozen=True)
class ModelFile:
    """A parsed file: nothing in it has been interpreted yet.

    Attributes:
        model: the protobuf message.
        name: the file's name, for messages.
        folder: where external data may lie; None if the model did not come from a file.
        data: the serialised model as it was read; None for a message that the caller built.
    """

    model: onnx.ModelProto
    name: str
    folder: Path | None
    data: bytes | None


def read_file(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> ModelFile:
    """Parses a model from a path (.onnx or .onnx.gz), from bytes of either, or takes a message as it is.

    Raises:
        ModelFileError: the file is missing, too large, not ONNX, or broken.
    """
    if isinstance(source, onnx.ModelProto):
        return ModelFile(source, source.graph.name or "model", None, None)
    if isinstance(source, bytes):
        name, folder, data = "model", None, source
    else:
        path = Path(source)
        name, folder = path.name, path.parent
        data = _read(path, name)
    if data[:2] == b"\x1f\x8b":
        data = _unpack(data, name)
    if not data:
        raise ModelFileError(f"{name} is empty.")
    for magic, kind in _FOREIGN:
        if data.startswith(magic):
            raise ModelFileError(f"{name} is {kind}, not an ONNX model; it was not opened further.")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's own exception types differ between its versions
        raise ModelFileError(f"{name} is not an ONNX model, or is damaged: {error}.") from error
    if not model.HasField("graph") or not model.graph.output:
        raise ModelFileError(f"{name} holds no graph with an output; is it an ONNX model?")
    if len(model.graph.node) > NODES:
        raise ModelFileError(f"{name} holds {len(model.graph.node)} operations; the limit is {NODES}.")
    return ModelFile(model, name, folder, data)


def _read(path: Path, name: str) -> bytes:
    try:
        if not path.is_file():
            raise ModelFileError(f"{path} is not a file.")
        size = path.stat().st_size
        if size >= FILE_BYTES:
            raise ModelFileError(f"{name} has {size} bytes; an ONNX file has fewer than {FILE_BYTES}.")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}.") from error


def _unpack(data: bytes, name: str) -> bytes:
    """Unpacks gzip in memory, at most `UNPACKED_BYTES`."""
    result, rest = bytearray(), data
    try:
        while rest:
            stream = zlib.decompressobj(wbits=31)
            while rest and not stream.eof:
                result += stream.decompress(rest, 2**24)
                rest = stream.unconsumed_tail
                if len(result) > UNPACKED_BYTES:
                    raise ModelFileError(f"{name} unpacks to more than {UNPACKED_BYTES} bytes.")
            if not stream.eof:
                raise ModelFileError(f"{name} is a truncated gzip file.")
            rest = stream.unused_data
    except zlib.error as error:
        raise ModelFileError(f"{name} is a damaged gzip file: {error}.") from error
    return bytes(result)


def read_tensor(proto: onnx.TensorProto, file: ModelFile) -> np.ndarray[Any, Any]:
    """The entries of a tensor, after checking that the file really holds as many as its shape claims."""
    where = f"{file.name}: tensor {proto.name!r}"
    code = DTYPES.get(proto.data_type)
    if code is None:
        raise UnsupportedOp(
            f"{where} has ONNX element type {proto.data_type}; supported are real numbers, integers, booleans."
        )
    if proto.HasField("segment") or any(n < 0 for n in proto.dims):
        raise ModelFileError(f"{where} is in segments or has a negative dimension {list(proto.dims)}.")
    dtype, dims = np.dtype(code), tuple(proto.dims)
    size = math.prod(dims)
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        raw = _external(proto, size * dtype.itemsize, file, where)
    elif proto.HasField("raw_data"):
        raw = proto.raw_data
    else:
        entries = getattr(proto, _FIELDS.get(proto.data_type, "int32_data"))
        if len(entries) != size:
            raise ModelFileError(f"{where} claims shape {list(dims)} but holds {len(entries)} entries.")
        if proto.data_type == 10:  # half floats are stored as bit patterns
            return np.array(entries, np.uint16).view(np.float16).reshape(dims)
        return np.array(entries).astype(dtype).reshape(dims)
    if len(raw) != size * dtype.itemsize:
        raise ModelFileError(f"{where} claims shape {list(dims)} of {dtype} but holds {len(raw)} bytes.")
    if dtype == np.bool_:
        return (np.frombuffer(raw, np.uint8) != 0).reshape(dims)
    return np.frombuffer(raw, dtype).reshape(dims)


def _external(proto: onnx.TensorProto, size: int, file: ModelFile, where: str) -> bytes:
    """The bytes of a tensor that lies in another file of the model's folder."""
    entry = {e.key: e.value for e in proto.external_data}
    location = entry.get("location", "")
    if file.folder is None:
        raise ModelFileError(f"{where} lies in another file ({location!r}); load the model from its path.")
    try:
        offset, length = int(entry.get("offset", 0)), int(entry.get("length", size))
        target, root = (file.folder / location).resolve(), file.folder.resolve()
        inside = (
            location and not os.path.isabs(location) and ".." not in Path(location).parts and root in target.parents
        )
        if not inside or not target.is_file():
            raise ModelFileError(
                f"{where} points to {location!r}, which is no file inside the model's folder; it was not opened."
            )
        if length != size or offset < 0 or offset + length > target.stat().st_size:
            raise ModelFileError(
                f"{where} wants {length} bytes at {offset} of {location!r}, which do not fit its shape or file."
            )
        with target.open("rb") as stream:
            stream.seek(offset)
            return stream.read(length)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{where} points to {location!r}, which cannot be read: {error}.") from error


def read_attributes(node: onnx.NodeProto, file: ModelFile) -> dict[str, Any]:
    """The attributes of an operation as numbers, texts, tuples and arrays."""
    found: dict[str, Any] = {}
    for a in node.attribute:
        kind = a.type or next((k for k, (field, _) in _ATTRIBUTES.items() if _filled(a, field)), 0)
        if kind not in _ATTRIBUTES:
            raise UnsupportedOp(
                f"{file.name}: {node.op_type} {node.name!r} has attribute {a.name!r} of a kind without a rule "
                "(a graph, a type, a sparse tensor)."
            )
        field, read = _ATTRIBUTES[kind]
        found[a.name] = read_tensor(a.t, file) if field == "t" else read(getattr(a, field))
    return found


def _filled(a: onnx.AttributeProto, field: str) -> bool:
    return a.HasField(field) if len(field) == 1 else len(getattr(a, field)) > 0  # type: ignore[arg-type]


def _texts(values: Iterable[bytes]) -> tuple[str, ...]:
    return tuple(v.decode("utf-8", "replace") for v in values)


_ATTRIBUTES: dict[int, tuple[str, Any]] = {
    1: ("f", float),
    2: ("i", int),
    3: ("s", lambda s: s.decode("utf-8", "replace")),
    4: ("t", None),
    6: ("floats", lambda v: tuple(map(float, v))),
    7: ("ints", lambda v: tuple(map(int, v))),
    8: ("strings", _texts),
}
