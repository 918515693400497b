"""A search on disk: what an interrupted verification had done, so that the next one goes on from there.

The journal belongs to one problem, which a digest of its numbers identifies. It is written beside the old one and moved
into place, so a crash leaves one or the other. Nothing in it is trusted: what a resumed search proves is replayed by
the checker like everything else.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from soundly.errors import InvalidInput

Array = npt.NDArray[Any]
EVERY = 10.0
"""Seconds between two writes."""


class Search(Protocol):
    """What can be kept: its state as named arrays."""

    def state(self) -> dict[str, Array]: ...
    def restore(self, state: Mapping[str, Array]) -> None: ...


class Journal:
    """The searches of one verification, by name.

    Args:
        path: the file; None keeps nothing.
        numbers: arrays that identify the problem.

    Raises:
        InvalidInput: the file is no journal, or that of another problem.
    """

    def __init__(self, path: str | os.PathLike[str] | None, numbers: Mapping[str, Array]) -> None:
        self.path = None if path is None else Path(path)
        self.searches: dict[str, Search] = {}
        self.found: dict[str, dict[str, Array]] = {}
        self.written = time.monotonic()
        if self.path is None:
            return
        digest = hashlib.sha256()
        for name in sorted(numbers):
            digest.update(f"{name} {numbers[name].dtype} {numbers[name].shape};".encode())
            digest.update(np.ascontiguousarray(numbers[name]).tobytes())
        self.digest = np.frombuffer(digest.digest(), dtype=np.uint8)
        if self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            with path.open("rb") as file:  # numpy leaves a file open that it opened itself and cannot read
                loaded = np.load(file, allow_pickle=False)
                arrays = {name: loaded[name] for name in getattr(loaded, "files", ())}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InvalidInput(f"journal {path} cannot be read: {error}. Name another file or remove it.") from error
        if "digest" not in arrays:
            raise InvalidInput(f"{path} is no journal of a verification. Name another file.")
        if not np.array_equal(arrays.pop("digest"), self.digest):
            raise InvalidInput(f"journal {path} belongs to another network, region or property. Name another file.")
        for name, array in arrays.items():
            key, _, field = name.partition("/")
            self.found.setdefault(key, {})[field] = array

    def follow(self, key: str, search: Search) -> None:
        """Keeps a search from now on; first takes it to where the journal left it."""
        if key in self.found:
            search.restore(self.found.pop(key))
        self.searches[key] = search

    def forget(self, key: str) -> None:
        """Keeps a search no longer."""
        self.searches.pop(key, None)

    def write(self, *, now: bool = False) -> None:
        """Writes the file if it is time."""
        if self.path is None or not (now or time.monotonic() - self.written > EVERY):
            return
        arrays = {f"{key}/{name}": v for key, s in self.searches.items() for name, v in s.state().items()}
        partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            with partial.open("xb") as file:
                np.savez(file, digest=self.digest, **arrays)  # type: ignore[arg-type]
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
        self.written = time.monotonic()
