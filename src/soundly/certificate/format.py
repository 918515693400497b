"""The certificate file: what an edit proved, in one file that anybody can read with a page of code.

    magic (8 bytes) | version (u32) | header length (u32) | header (JSON) | arrays, each at a multiple of 64 | SHA-256

Everything is little-endian. Header and layout are canonical, so equal inputs give byte-identical files, and a reader
may refuse whatever the writer would not have written. No pickle, no compression, nothing is executed. The digest
detects accidents; trust comes from `soundly.certificate.check`, which re-proves every row from the numbers.
"""

import hashlib
import json
import math
import mmap
import os
import secrets
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from soundly.errors import CertificateError, InvalidInput

Array = npt.NDArray[Any]

MAGIC = b"\x89soundly"
VERSION = 1
FORMAT = "soundly certificate"
HEAD_EDIT = "head edit"
VERIFICATION = "verification"
REALS = "over the reals, for the stored features and weights"
NETWORK = "over the reals, for the stored network"
FLOAT32 = "over the reals and in float32 in any order of summation, for the stored network"
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {"bf16": np.dtype("<u2"), "f4": np.dtype("<f4"), "f8": np.dtype("<f8"), "i8": np.dtype("<i8")}
)
MAX_HEADER = 4 << 20
_PRELUDE = struct.Struct("<8sII")
_ALIGN = 64
_DIGEST = 32
_MAX_DEPTH = 16
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, eq=False)
class Certificate:
    """A header (plain JSON without floats) and named arrays; `check` says what they prove.

    header: the JSON object of the file without its table of arrays.
    arrays: read-only, C order, at most four dimensions, float32, float64, int64, or uint16 standing for the bits of
        bfloat16. They are not copied: whoever keeps a writable reference must not write to it.

    Raises:
        InvalidInput: the header is not plain JSON or of another format, or an array has another dtype.
    """

    header: Mapping[str, Any]
    arrays: Mapping[str, Array]

    def __post_init__(self) -> None:
        try:
            header = parse_json(canonical_json(dict(self.header)))
        except ValueError as problem:
            raise InvalidInput(f"certificate header: {problem}") from problem
        if header.get("format") != FORMAT or header.get("version") != VERSION or "arrays" in header:
            raise InvalidInput(f"certificate header: needs format {FORMAT!r} and version {VERSION}, and no 'arrays'.")
        arrays = {}
        for name in sorted(self.arrays):
            array = np.asarray(self.arrays[name])
            little = array.dtype.newbyteorder("<")
            if little not in DTYPES.values() or array.ndim > _MAX_DIMENSIONS:
                raise InvalidInput(f"array {name!r}: {array.dtype} {array.shape} cannot be stored; see Certificate.")
            arrays[name] = np.ascontiguousarray(array, dtype=little).reshape(array.shape).view()
            arrays[name].flags.writeable = False
        object.__setattr__(self, "header", MappingProxyType(header))
        object.__setattr__(self, "arrays", MappingProxyType(arrays))

    @property
    def kind(self) -> object:
        """What sort of claim this is: "head edit" or "verification"."""
        return self.header.get("kind")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; readers see the old file or the whole new one, never a part.

        Raises:
            InvalidInput: the header with the table of arrays is larger than 4 MiB.
            OSError: the directory cannot be written.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        digest = hashlib.sha256()
        try:
            with partial.open("xb") as file:
                for piece in self._pieces():
                    digest.update(piece)
                    file.write(piece)
                file.write(digest.digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _pieces(self) -> Iterator[bytes | memoryview]:
        names = {dtype: name for name, dtype in DTYPES.items()}
        table, offset = {}, 0
        for key, array in self.arrays.items():
            offset = _aligned(offset)
            table[key] = {"dtype": names[array.dtype], "offset": offset, "shape": list(array.shape)}
            offset += array.nbytes
        header = canonical_json({**self.header, "arrays": table})
        if len(header) > MAX_HEADER:
            raise InvalidInput(f"certificate header: {len(header)} bytes, at most {MAX_HEADER}; use fewer claims.")
        yield _PRELUDE.pack(MAGIC, VERSION, len(header)) + header
        end = _PRELUDE.size + len(header)
        for array in self.arrays.values():
            yield bytes(_aligned(end) - end)
            yield raw_bytes(array)
            end = _aligned(end) + array.nbytes

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Certificate":
        """Read a file of any origin; its arrays are memory-mapped and read-only.

        Lengths are compared with the file's size before anything is allocated, and the header is at most 4 MiB, so
        memory stays bounded. Do not truncate the file in place while its certificate is in use.

        Raises:
            CertificateError: the file cannot be read, is damaged, or is no certificate; says which file and where.
        """
        try:
            data = map_file(path)
        except (OSError, ValueError) as problem:
            raise CertificateError(f"{os.fspath(path)}: cannot be read: {reason(problem)}.") from problem
        return _parse(os.fspath(path), data)


def head_edit(
    *,
    vectors: Array,
    value_vector: Array,
    value_class: Array,
    classes: Array,
    weights: Array,
    bf16: bool = False,
    row_start: Array,
    row_value: Array,
    row_coefficient: Array,
    lower: Array,
    upper: Array,
    cones: Array | None = None,
    margin: Array,
    error: Array,
    claims: Sequence[Mapping[str, Any]],
    model: Mapping[str, str],
    made_with: Mapping[str, Any],
) -> Certificate:
    """The certificate of an edited last linear layer. It states; only `check` proves.

    With value[t] = vectors[value_vector[t]] . weights[value_class[t]], row i claims, over the reals,

        lower[i] <= sum of row_coefficient[k] * value[row_value[k]], k in row_start[i] : row_start[i + 1] <= upper[i].

    A cone [start, stop) claims of its rows, instead, that the last one exceeds its lower end by at least the Euclidean
    norm of what the others miss their bounds by.

    Arrays that already have the stored dtype, in C order, are kept and not copied; do not write to them afterwards.

    Args:
        vectors: features [v, n], float32 or float64; column n - 1 multiplies the bias.
        value_vector, value_class: position in `vectors`, position in `classes` [s], in any order.
        classes: the output each row of weights belongs to [c].
        weights: weights and, in the last column, bias, exactly as the edited model stores them [c, n]: float32,
            float64, or, with bf16=True, the uint16 bits of bfloat16.
        row_start, row_value, row_coefficient: the rows, compressed: [m + 1], [entries], [entries].
        lower, upper: bounds [m], at least one of them finite in every row.
        cones: [q, 2] (start, stop), ascending, each inside one claim; stored if there are any.
        margin: slack the solver was asked for [m]; error: rounding bound that the editor used [m]. For the record only.
        claims: {"name": str, "rows": [start, stop]}, in order, covering 0..m.
        model: "before" and "after" (SHA-256, hex), "layer" (module path), "dtype" ("float32", "float64", "bfloat16").
        made_with: versions, settings; strings and integers.

    Raises:
        InvalidInput: a dtype is none of those above, or a number would change when stored.
    """
    if (weights.dtype == np.uint16) != bf16:
        raise InvalidInput(f"weights: {weights.dtype} with bf16={bf16}; pass bfloat16 as uint16 bits with bf16=True.")
    integers = {
        "value_vector": value_vector, "value_class": value_class, "classes": classes,
        "row_start": row_start, "row_value": row_value,
    }  # fmt: skip
    if cones is not None and len(cones):
        integers["cones"] = cones
    floats = {"row_coefficient": row_coefficient, "lower": lower, "upper": upper, "margin": margin, "error": error}
    arrays = {"vectors": vectors, "weights": weights}
    for given, dtype in ((integers, np.int64), (floats, np.float64)):
        for name, array in given.items():
            if not np.can_cast(np.asarray(array).dtype, dtype, casting="safe"):
                raise InvalidInput(f"{name}: {np.asarray(array).dtype} does not fit into {np.dtype(dtype)}.")
            arrays[name] = np.asarray(array, dtype=dtype)
    edit = hashlib.sha256(raw_bytes(np.asarray(weights, dtype=weights.dtype.newbyteorder("<")))).hexdigest()
    header = {
        "format": FORMAT, "version": VERSION, "kind": HEAD_EDIT, "arithmetic": REALS, "model": dict(model),
        "claims": [dict(claim) for claim in claims], "edit": edit, "made_with": dict(made_with),
    }  # fmt: skip
    return Certificate(header, arrays)


def map_file(path: str | os.PathLike[str]) -> mmap.mmap:
    """A regular file's bytes, read as they are needed. Raises OSError, or ValueError if it is empty or not regular."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device could block for ever
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def reason(problem: OSError | ValueError) -> str:
    """What the operating system or a parser objected to, without repeating the path."""
    return (isinstance(problem, OSError) and problem.strerror) or str(problem)


def raw_bytes(array: Array) -> memoryview:
    """The bytes of an array in C order, without a copy where it is already contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def elements(shape: object) -> int | None:
    """The number of elements of an array of this shape; None if it is no shape or numpy could not address it."""
    if not isinstance(shape, list) or not all(type(d) is int and d >= 0 for d in shape):
        return None
    addressable = len(shape) <= _MAX_DIMENSIONS and math.prod(max(d, 1) for d in shape) < 2**56
    return math.prod(shape) if addressable else None


def canonical_json(value: object) -> bytes:
    """The one way to write this value: ASCII, sorted keys, no spaces. Raises ValueError if it is not plain."""
    _require_plain(value, _MAX_DEPTH)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys, floats or deep nesting; anything else raises ValueError."""
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _require_plain(value, _MAX_DEPTH)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _require_plain(value: object, depth: int) -> None:
    if depth == 0:
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
    match value:
        case None | bool():
            pass
        case int():
            if not -(2**63) <= value < 2**63:
                raise ValueError("an integer outside 64 bits")
        case str():
            value.encode("utf-8")  # half a surrogate pair raises here, and nowhere later
        case list() | tuple():
            for item in value:
                _require_plain(item, depth - 1)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"the key {key!r:.80} is not a string")
                key.encode("utf-8")
                _require_plain(item, depth - 1)
        case _:
            raise ValueError(f"{type(value).__name__} is not allowed; write numbers with a fraction as text or arrays")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_float(text: str) -> NoReturn:
    raise ValueError(f"the number {text[:40]} is not an integer")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_no_float, parse_constant=_no_float)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def _refuse(name: str, what: str) -> NoReturn:
    raise CertificateError(f"{name}: {what}.")


def _parse(name: str, data: mmap.mmap) -> Certificate:
    size = len(data)
    if size < _PRELUDE.size + _DIGEST:
        _refuse(name, f"{size} bytes are too few for a certificate; the file is truncated or not one")
    magic, version, length = _PRELUDE.unpack(data[: _PRELUDE.size])
    if magic != MAGIC:
        _refuse(name, f"byte 0: {magic!r} is not how a soundly certificate begins")
    if version != VERSION:
        _refuse(name, f"byte 8: format version {version}; this soundly reads version {VERSION}, another may read it")
    if length > min(MAX_HEADER, size - _PRELUDE.size - _DIGEST):
        _refuse(name, f"byte 12: no room for a header of {length} bytes (file {size}, limit {MAX_HEADER})")
    raw = data[_PRELUDE.size : _PRELUDE.size + length]
    try:
        header = parse_json(raw)
        if canonical_json(header) != raw:
            _refuse(name, "header (byte 16): not in canonical form (ASCII, sorted keys, no spaces)")
    except ValueError as problem:
        _refuse(name, f"header (byte 16): {problem}")
    if header.get("format") != FORMAT or type(header.get("version")) is not int or header["version"] != version:
        _refuse(name, f"header (byte 16): 'format' must be {FORMAT!r} and 'version' {version}")
    table = header.pop("arrays", None)
    if not isinstance(table, dict):
        _refuse(name, "header (byte 16): the table 'arrays' is missing")
    end = _PRELUDE.size + length
    base = _aligned(end)
    gaps: list[tuple[int, int]] = []
    found: dict[str, tuple[np.dtype[Any], list[int], int]] = {}
    for key, entry in table.items():  # sorted, because the header is canonical
        dtype, shape, count = _entry(name, key, entry)
        begin = _aligned(end)
        if entry["offset"] != begin - base:
            _refuse(name, f"array {key!r:.80}: offset {entry['offset']} where the layout has {begin - base}")
        gaps.append((end, begin))
        found[key], end = (dtype, shape, begin), begin + count * dtype.itemsize
    if end + _DIGEST != size:
        _refuse(name, f"{size} bytes where the header asks for {end + _DIGEST}; truncated or extended")
    if any(data[start:stop].strip(b"\0") for start, stop in gaps):
        _refuse(name, "the padding between the arrays is not zero")
    with memoryview(data) as view, view[:end] as body:
        if hashlib.sha256(body).digest() != data[end:]:
            _refuse(name, f"byte {end}: the SHA-256 digest does not match; the file is damaged")
    return Certificate(header, {k: np.ndarray(s, d, buffer=data, offset=o) for k, (d, s, o) in found.items()})


def _entry(name: str, key: str, entry: object) -> tuple[np.dtype[Any], list[int], int]:
    """dtype, shape and number of elements of one entry of the table; nothing is allocated."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "offset", "shape"}:
        _refuse(name, f"array {key!r:.80}: its entry needs exactly dtype, offset and shape")
    dtype, offset, shape = entry["dtype"], entry["offset"], entry["shape"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse(name, f"array {key!r:.80}: dtype {dtype!r:.80} is none of {', '.join(DTYPES)}")
    count = elements(shape)
    if type(offset) is not int or count is None:
        _refuse(name, f"array {key!r:.80}: offset {str(offset)[:40]} or shape {str(shape)[:80]} is impossible")
    return DTYPES[dtype], shape, count
