"""What an edit changed, in a file by which it can be undone bit for bit.

The file is a .safetensors file: for every parameter the flat positions of its changed entries, and these entries before
and after, as stored. Its metadata hold the SHA-256 of the model file before and after; another file is refused.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from soundly.certificate.format import elements, map_file, parse_json, reason
from soundly.errors import InvalidInput, ModelFileError
from soundly.graph.onnx_weights import digest, replaced, spans

Array = npt.NDArray[Any]

FORMAT = "soundly delta"
VERSION = "1"
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
}
_MAX_HEADER = 16 << 20


@dataclass(frozen=True, eq=False)
class Change:
    """Entries of one parameter that an edit changed.

    Attributes:
        index: their flat positions [k], ascending.
        old, new: the entries before and after [k], in the type of the file.
    """

    index: Array
    old: Array
    new: Array


@dataclass(frozen=True, eq=False)
class Delta:
    """The difference of two model files that differ in entries of parameters only.

    Attributes:
        before, after: the SHA-256 of the files, unpacked.
        changes: by the parameter's name.
    """

    before: str
    after: str
    changes: Mapping[str, Change]

    @staticmethod
    def between(old: bytes, new: bytes) -> Delta:
        """What turns one serialised model into another of the same layout."""
        changes = {}
        for name, span in spans(old).items():
            a, b = span.read(old), span.read(new)
            bits = f"<u{span.dtype.itemsize}"
            index = np.flatnonzero(a.view(bits) != b.view(bits))
            if len(index):
                changes[name] = Change(index.astype(np.int64), a[index], b[index])
        return Delta(digest(old), digest(new), changes)

    def undone(self, data: bytes) -> bytes:
        """The model as it was before the edit.

        Args:
            data: the serialised model after it.

        Raises:
            InvalidInput: the model is not the one that came out of this edit.
        """
        found = digest(data)
        if found != self.after:
            hint = "it is the model before the edit" if found == self.before else "it is another, or was changed since"
            raise InvalidInput(
                f"undo: the delta belongs to the model {self.after[:12]}..., not {found[:12]}...: {hint}."
            )
        where, old = spans(data), {}
        for name, change in self.changes.items():
            span = where.get(name)
            if span is None or change.old.dtype != span.dtype or change.index[-1] >= math.prod(span.shape):
                raise InvalidInput(f"undo: the delta's {name!r} does not fit the model.")
            entries = span.read(data).copy()
            entries[change.index] = change.old
            old[name] = entries.reshape(span.shape)
        result = replaced(data, old)
        if digest(result) != self.before:
            raise InvalidInput("undo: the delta does not lead back to the model it was made from; it is damaged.")
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file; readers see the old one or the whole new one."""
        metadata = {"format": FORMAT, "version": VERSION, "before": self.before, "after": self.after}
        header: dict[str, Any] = {"__metadata__": metadata}
        names, pieces, end = {v: k for k, v in _DTYPES.items()}, [], 0
        arrays = {f"{part}/{name}": getattr(c, part) for name, c in self.changes.items() for part in _PARTS}
        for name, array in sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])):
            begin, end = end, end + array.nbytes
            header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
            pieces.append(array.tobytes())
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = Path(path)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            partial.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Delta:
        """Reads a file of any origin.

        Raises:
            ModelFileError: it cannot be read, or is no delta.
        """
        try:
            return _parse(map_file(path))
        except (OSError, ValueError, KeyError, TypeError) as problem:
            text = reason(problem) if isinstance(problem, OSError | ValueError) else f"{problem} is missing"
            raise ModelFileError(f"{os.fspath(path)}: no delta of an edit, or a damaged one: {text}.") from problem


_PARTS = ("index", "old", "new")


def _parse(data: Any) -> Delta:
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(_MAX_HEADER, len(data) - 8):
        raise ValueError(f"a header of {length} bytes in {len(data)} bytes")
    header = parse_json(data[8 : 8 + length])
    metadata = header.pop("__metadata__", None)
    match metadata:
        case {"format": format, "version": version, "before": str(before), "after": str(after)} if (
            format == FORMAT and version == VERSION
        ):
            pass
        case _:
            raise ValueError(f"its metadata are not those of a {FORMAT} of version {VERSION}")
    parts: dict[str, dict[str, Array]] = {}
    for key, entry in header.items():
        part, _, name = key.partition("/")
        match entry:
            case {"dtype": str(dtype), "shape": [int(size)], "data_offsets": [int(begin), int(end)]} if (
                part in _PARTS
                and dtype in _DTYPES
                and (dtype == "I64") == (part == "index")
                and elements([size])
                and 0 <= begin <= end <= len(data) - 8 - length
                and end - begin == size * _DTYPES[dtype].itemsize
            ):
                array = np.frombuffer(data[8 + length + begin : 8 + length + end], _DTYPES[dtype])
                parts.setdefault(name, {})[part] = array
            case _:
                raise ValueError(f"tensor {key!r:.80} does not fit")
    changes = {}
    for name, found in parts.items():
        index, old, new = (found[part] for part in _PARTS)
        if (
            not len(index) == len(old) == len(new)
            or old.dtype != new.dtype
            or index[0] < 0
            or (np.diff(index) <= 0).any()
        ):
            raise ValueError(f"the parts of {name!r:.80} do not fit each other")
        changes[name] = Change(index, old, new)
    return Delta(before, after, changes)
