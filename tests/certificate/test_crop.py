"""The checker's crops: small programs compute what they say, and bounds through them are those of the whole program.

One check measures how far bounds with and without crops are apart; it must catch faults planted in the crops.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.bounds.test_crop import PROGRAMS, boxes
from tests.bounds.test_crop import random as random_tensor

from soundly.bounds import program as searched
from soundly.certificate.program import Affine, Apply, Convolution, Program, Stored, Times, Variable
from soundly.verification import proof

crops = importlib.import_module("soundly.certificate.crop")
intervals = importlib.import_module("soundly.certificate.intervals")
reading = importlib.import_module("soundly.certificate.reading")
NONE = Stored(np.zeros((0, 0), np.float32), np.zeros(1, int), np.zeros(0, int), np.zeros(0, int))


def as_read(program: searched.Program) -> Program:
    """The checker's own program, from what a certificate would hold."""
    header, arrays = proof._program(program)
    reader = reading._Reader(arrays)
    functions = [reading._function(reader, entry, i) for i, entry in enumerate(header["functions"])]
    return reading._program(reader, header["program"], functions, np.zeros(0, dtype=np.int64))


def intervals_of(program: Program, low: np.ndarray, high: np.ndarray, forms: bool = False) -> list[np.ndarray]:
    with np.errstate(all="ignore"):
        frame, dead = intervals.refresh(program, low, high, None, np.full(len(low), -1), NONE, forms=forms)
    if dead.any():
        raise ValueError("an interval is empty")
    return frame.lower + frame.upper


def gap(name: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """How far intervals with crops are from those without; infinite where crops cannot be made, or none is."""
    original = PROGRAMS[name]()
    program, (low, high) = as_read(original), (v.numpy() for v in boxes(original))
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(crops.Crop, "view", lambda *args, f=crops.Crop.view: made.append(1) or f(*args))
        try:
            found = intervals_of(program, low, high)
        except (ValueError, IndexError):
            return math.inf
    if not made:
        return math.inf
    with monkeypatch.context() as patch:
        patch.setattr(crops, "SAVING", math.inf)
        patch.setattr(crops.Crop, "view", None)
        expected = intervals_of(program, low, high)
    return max(float(np.max(np.abs(a - b) / (1 + np.abs(b)))) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", PROGRAMS)
def test_crops_give_the_bounds_of_the_whole(name, monkeypatch):
    assert gap(name, monkeypatch) < 1e-10


@pytest.mark.parametrize("name", PROGRAMS)
def test_crops_give_the_intervals_that_the_search_found(name):
    program = PROGRAMS[name]()
    low, high = boxes(program)
    theirs = importlib.import_module("soundly.bounds.batch").Bounder(program).refresh(low, high)
    ours = intervals_of(as_read(program), low.numpy(), high.numpy(), program.inputs <= 32)
    for a, b in zip(ours, theirs.lower + theirs.upper, strict=True):
        assert np.max(np.abs(a - b.numpy()) / (1 + np.abs(a))) < 1e-9


def values(program: Program, x: np.ndarray, known: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """Every step's values at points [places, n]; steps that end a crop have `known` ones."""
    found: list[np.ndarray] = []
    for i, step in enumerate(program.steps):
        if isinstance(step, Variable):
            found.append(x)
        elif isinstance(step, Affine):
            total = np.repeat(step.bias[None], len(x), axis=0)
            for part, source in step.parts:
                total = total + part.apply(found[source])
            found.append(total if known is None or known[i] is None else known[i])
        elif isinstance(step, Apply):
            v = found[step.source]
            # Of a function only its values are wanted: those of the middle of a point's range.
            low, high = step.function.range(v, v)
            found.append((low + high) / 2)
        elif isinstance(step, Times):
            found.append(found[step.left] * found[step.right])
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_crop_computes_the_entries_that_it_says(name):
    program = as_read(PROGRAMS[name]())
    x = random_tensor(1, program.steps[0].size, seed=11).numpy()
    with np.errstate(all="ignore"):
        whole, made = values(program, x), 0
        for i, step in enumerate(program.steps):
            covered = []
            for crop, which, place, inner in crops.Crops(program, {}).of(i, np.arange(step.size)):
                covered.append(which)
                if crop is None:
                    continue
                made += 1
                assert (crop.index[i][place, inner] == which).all()
                inside = [whole[j][0][index] for j, index in enumerate(crop.index)]
                ends = [v if j in crop.floor else None for j, v in enumerate(inside)]
                for v, expected in zip(values(crop.program, inside[0], ends), inside, strict=True):
                    assert np.allclose(v, expected, rtol=1e-12, atol=1e-12)
            assert (np.sort(np.concatenate(covered)) == np.arange(step.size)).all()
    assert made


def test_large_maps_share_places_among_neighbours(monkeypatch):
    monkeypatch.setattr(crops, "PLACES", 30)
    assert gap("padding 1", monkeypatch) < 1e-10
    assert len(np.unique(crops.Crops(as_read(PROGRAMS["padding 1"]()), {}).place[3])) <= 42


@pytest.mark.parametrize("before", [-2, -1, 0, 1, 3])
@pytest.mark.parametrize("after", [-2, 0, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_padding_of_any_kind_on_either_side(before, after, stride, groups):
    """The checker's convolution and the search's against one whose zeros are written out, both ways."""
    size, kernel, out = 9, 3, (9 + before + after - 3) // stride + 1
    weight = random_tensor(4, 2 // groups, kernel, seed=1)
    geometry = ((2, size), (4, out), (stride,), (before,), (1,), groups)
    mine = Convolution(weight.numpy(), *geometry, False)
    theirs = searched.Convolution(weight, *geometry)
    x, y = random_tensor(3, 2 * size, seed=2), random_tensor(3, 4 * out, seed=3)
    image = torch.nn.functional.pad(x.reshape(3, 2, size), (before, after))
    expected = torch.nn.functional.conv1d(image, weight, stride=stride, groups=groups).reshape(3, -1)
    assert np.allclose(mine.apply(x.numpy()), expected.numpy()) and torch.allclose(theirs.apply(x), expected)
    # <y, A x> = <A^T y, x>
    assert np.allclose((mine.pull(y.numpy()) * x.numpy()).sum(1), (expected * y).sum(1).numpy())
    assert torch.allclose((theirs.pull(y) * x).sum(1), (expected * y).sum(1))
    turned, back = replace(mine, transposed=True), replace(theirs, transposed=True)
    assert np.allclose(turned.apply(y.numpy()), mine.pull(y.numpy()))
    assert torch.allclose(back.apply(y), theirs.pull(y))
    rows = np.arange(4 * out)
    assert np.allclose(mine.rows_of(rows), mine.pull(np.eye(4 * out)))
    assert np.allclose(turned.rows_of(np.arange(2 * size)), mine.apply(np.eye(2 * size)))


def smaller(f: Callable) -> Callable:
    def wrong(part, low, high):
        first, last = f(part, low, high)
        return first, np.maximum(last - np.eye(first.shape[1], dtype=int)[0], first + 1)

    return wrong


FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "window too small": ("residual", lambda p: p.setattr(crops, "_seen", smaller(crops._seen))),
    "padding everywhere": (
        "padding 1",
        lambda p: p.setattr(crops, "_cut", lambda part, *a, f=crops._cut: replace(f(part, *a), padding=part.padding)
                            if isinstance(part, Convolution) else f(part, *a)),
    ),
    "stride forgotten": (
        "stride 2",
        lambda p: p.setattr(crops, "_cut", lambda part, own, read, f=crops._cut: replace(
            f(part, own, read), padding=tuple(np.array(part.padding) + crops._box(read, part.wide)[0][0]
                                              - crops._box(own, part.narrow)[0][0]))),
    ),
    "all places alike": (
        "uneven bias", lambda p: p.setattr(crops, "_alike", lambda key: [np.arange(len(key))]),
    ),
    "coefficients of another place": (
        "below a matrix",
        lambda p: p.setattr(crops.Crop, "spread", lambda crop, j, a, place, size, f=crops.Crop.spread: f(
            crop, j, a, place[::-1], size)),
    ),
    "boxes of another place": (
        "padding 1",
        lambda p: p.setattr(crops.Crop, "view", lambda crop, whole, node, place, f=crops.Crop.view: f(
            crop, whole, node, 0 * place)),
    ),
    "boxes of another node": (
        "padding 1",
        lambda p: p.setattr(crops.Crop, "view", lambda crop, whole, node, place, f=crops.Crop.view: f(
            crop, whole, 0 * node, place)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    name, plant = FAULTS[fault]
    assert gap(name, monkeypatch) < 1e-10
    plant(monkeypatch)
    assert gap(name, monkeypatch) > 1e-4
