"""The values of a JSON file, each with its place in it: what is wrong is said where it is.

Arrays of numbers stand in the file itself or in .npy and .npz files beside it. Files are untrusted: sizes are compared
before anything is allocated, nothing in them is executed, and NaN is never a number.
"""

from __future__ import annotations

import difflib
import io
import json
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.graph.node import Shape

LARGEST = 2**30
"""The most bytes that a file may have, unpacked."""


def read_json(path: str | os.PathLike[str]) -> Value:
    """The value of a whole file.

    Raises:
        InvalidInput: it cannot be read, or is no JSON without duplicate keys, NaN and infinities.
    """
    path = Path(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ValueError(f"the key {twice!r:.60} occurs twice in one object")
        return found

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"{text} is no number in JSON; leave a bound open with null")

    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes; keep large arrays in .npy files")
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as problem:
        what = problem.strerror if isinstance(problem, OSError) else problem or "nested too deeply"
        raise InvalidInput(f"{path}: cannot be read as JSON: {what}.") from problem
    return Value(data, path.name, path.parent)


@dataclass(frozen=True)
class Value:
    """A value of the file; `where` is its place, for messages, `folder` where files that it names lie."""

    data: Any
    where: str
    folder: Path

    def fail(self, text: str) -> NoReturn:
        raise InvalidInput(f"{self.where}: {text}")

    def object(self, required: str, optional: str = "") -> dict[str, Value]:
        """The values of an object with these keys and no others."""
        if not isinstance(self.data, dict):
            self.fail(f"expected an object with {required.replace(' ', ', ') or optional}, not {_kind(self.data)}.")
        known = [*required.split(), *optional.split()]
        for key in self.data:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                self.fail(f"{key!r:.60} is not known here; {hint}Known are {', '.join(known)}.")
        for key in required.split():
            if key not in self.data:
                self.fail(f"{key!r} is missing.")
        return {key: Value(v, f"{self.where}.{key}", self.folder) for key, v in self.data.items()}

    def list(self) -> list[Value]:
        if not isinstance(self.data, list) or not self.data:
            self.fail(f"expected a list of at least one entry, not {_kind(self.data)}.")
        return [Value(v, f"{self.where}[{i}]", self.folder) for i, v in enumerate(self.data)]

    def text(self, choices: Sequence[str] = ()) -> str:
        if not isinstance(self.data, str) or not self.data:
            self.fail(f"expected a text, not {_kind(self.data)}.")
        if choices and self.data not in choices:
            self.fail(f"{self.data!r:.60} is none of {', '.join(choices)}.")
        return self.data

    def integer(self, least: int, end: int) -> int:
        if type(self.data) is not int:
            self.fail(f"expected an integer, not {_kind(self.data)}.")
        if not least <= self.data < end:
            self.fail(f"{self.data!r:.40} does not lie in {least}..{end - 1}.")
        return self.data

    def number(self, least: float = -math.inf, *, above: bool = False) -> float:
        """A finite number of at least, or `above`, another one."""
        if isinstance(self.data, bool) or not isinstance(self.data, int | float):
            self.fail(f"expected a number, not {_kind(self.data)}.")
        value = self._float(self.data)
        if value < least or (above and value == least):
            self.fail(f"{value} is too small; give {'more than' if above else 'at least'} {least:g}.")
        return value

    def integers(self, end: int) -> tuple[int, ...]:
        return tuple(v.integer(0, end) for v in self.list())

    def array(self, *, size: int | None = None, open_end: float | None = None) -> Tensor:
        """Numbers in float64: one, nested lists of them, or a file.

        Args:
            size: how many there must be, one number standing for as many.
            open_end: an infinity that is allowed, and that null stands for.
        """
        if isinstance(self.data, str):
            found = self._file()
        else:
            found = np.array(self._numbers(open_end))
        if found.dtype.kind not in "fiub":
            self.fail(f"expected an array of numbers, not of {found.dtype}.")
        array = torch.tensor(found.astype(np.float64))
        wrong = ~torch.isfinite(array) if open_end is None else torch.isnan(array) | (array == -open_end)
        if bool(wrong.any()):
            first = int(wrong.reshape(-1).nonzero()[0])
            self.fail(f"{int(wrong.sum())} numbers are not finite, first at flat position {first}.")
        if size is not None and array.numel() not in (1, size):
            self.fail(f"expected {size} numbers, or one for all, not {array.numel()} (shape {list(array.shape)}).")
        return array

    def shaped(self, shape: Shape) -> Tensor:
        """Numbers of a shape whose leading 1 may be left out; one number stands for all."""
        array = self.array()
        if array.dim() == 0:
            return array.expand(shape).clone()
        if tuple(array.shape) == shape or (1, *array.shape) == shape:
            return array.reshape(shape)
        self.fail(f"expected numbers of shape {list(shape)}, the network's, not {list(array.shape)}.")

    def _numbers(self, open_end: float | None) -> Any:
        """Nested lists of floats, all equally long at each level."""
        if self.data is None and open_end is not None:
            return open_end
        if isinstance(self.data, bool):
            return float(self.data)
        if not isinstance(self.data, list):
            return self.number()
        parts = [v._numbers(open_end) for v in self.list()]
        sizes = {np.shape(part) for part in parts}
        if len(sizes) > 1:
            self.fail(f"its entries have different shapes: {', '.join(str(list(s)) for s in sorted(sizes))}.")
        return np.array(parts)

    def _float(self, number: float) -> float:
        try:
            value = float(number)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            self.fail("the number is too large for float64.")
        return value

    def _file(self) -> npt.NDArray[Any]:
        """The array of a file "x.npy", "x.npz" (with one array) or "x.npz:name"."""
        text = self.data
        name, key = (text[: end + 4], text[end + 5 :]) if (end := text.find(".npz:")) >= 0 else (text, None)
        path = self.folder / name
        try:
            if not name.endswith((".npy", ".npz")):
                raise ValueError("expected numbers, or the name of a .npy or .npz file")
            if not path.is_file():
                raise ValueError("there is no such file; names are relative to the file of constraints")
            if name.endswith(".npy"):
                if path.stat().st_size > LARGEST:
                    raise ValueError(f"it has more than {LARGEST} bytes")
                return _array(path.read_bytes())
            with zipfile.ZipFile(path) as archive:
                names = [n.removesuffix(".npy") for n in archive.namelist()]
                if key is None and len(names) == 1:
                    key = names[0]
                if key not in names:
                    raise ValueError(f'choose one of its arrays by "{name}:NAME"; it has {", ".join(names[:8])}')
                member = archive.infolist()[names.index(key)]
                if member.file_size > LARGEST:
                    raise ValueError(f"{key} unpacks to more than {LARGEST} bytes")
                with archive.open(member) as stream:
                    return _array(stream.read(LARGEST))
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as problem:
            self.fail(f"{text!r:.200} cannot be read: {problem}.")


def _array(data: bytes) -> npt.NDArray[Any]:
    """The array of a .npy file's bytes; its size is compared before anything is allocated."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in headers:
        raise ValueError(f"version {version} of the .npy format is not known")
    shape, fortran, dtype = headers[version](stream)
    if dtype.kind not in "fiub":
        raise ValueError(f"it holds {dtype}, not numbers")
    if len(data) - stream.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"its size is not that of {dtype} {list(shape)}; it is damaged")
    flat = np.frombuffer(data, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def _kind(data: Any) -> str:
    match data:
        case None:
            return "null"
        case bool():
            return "true" if data else "false"
        case int() | float():
            return f"the number {data!r:.40}"
        case str():
            return f"the text {data!r:.60}"
        case list():
            return "a list" if data else "an empty list"
    return "an object"


@contextmanager
def located(value: Value) -> Iterator[None]:
    """Errors of the functions that are called get the place in the file."""
    try:
        yield
    except InvalidInput as error:
        text = str(error)
        raise error if text.startswith(value.where) else InvalidInput(f"{value.where}: {text}") from error
