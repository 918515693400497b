"""Crops: rows carried through small windows give the bounds that the whole map gives, whatever the geometry.

One check measures how far the bounds of a program differ with crops and without; it must catch faults planted in them.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from soundly.bounds import crop as module
from soundly.bounds.batch import Bounder
from soundly.bounds.crop import Area, Crops
from soundly.bounds.program import Affine, Convolution, Function, Map, Matrix, Program, Sparse, Step, Times, Variable
from soundly.graph import elementwise as ew

F64 = torch.float64


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def conv(
    wide: tuple[int, ...], channels: int, kernel: int | tuple[int, ...], *, stride: int = 1, padding: int = 0,
    dilation: int = 1, groups: int = 1, transposed: bool = False, seed: int = 0,
) -> Convolution:  # fmt: skip
    """From `wide` (C, *size); a transposed one goes to it."""
    n = len(wide) - 1
    kernels = (kernel,) * n if isinstance(kernel, int) else kernel
    out = ((w + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for w, k in zip(wide[1:], kernels, strict=True))
    weight = random(channels, wide[0] // groups, *kernels, seed=seed) / math.prod(kernels) ** 0.5
    return Convolution(
        weight, wide, (channels, *out), (stride,) * n, (padding,) * n, (dilation,) * n, groups, transposed
    )


def affine(*parts: tuple[Map, int], seed: int = 0, uneven: bool = False) -> Affine:
    m, size = parts[0][0], parts[0][0].size[0]
    bias = random(size, seed=seed + 100) / 4
    if isinstance(m, Convolution) and not uneven:
        channels = (m.wide if m.transposed else m.narrow)[0]
        bias = bias[:channels].repeat_interleave(size // channels)
    return Affine(parts, bias)


def chain(*maps: Map, uneven: bool = False) -> Program:
    """With a ReLU between any two."""
    steps: list[Step] = [Variable(maps[0].size[1])]
    for k, m in enumerate(maps):
        steps.append(affine((m, len(steps) - 1), seed=k, uneven=uneven))
        steps.append(Function(len(steps) - 1, ew.RELU, m.size[0]))
    return Program(tuple(steps[:-1]))


def diagonal(size: int, seed: int) -> Sparse:
    i = torch.arange(size)
    return Sparse(i, i, random(size, seed=seed), (size, size))


def plain(**options: int) -> Callable[[], Program]:
    """Three convolutions of that kind."""

    def make() -> Program:
        first = conv((2, 13, 11), 4, 3, padding=1, seed=1)
        second = conv(first.narrow, 4, 3, seed=2, **options)
        return chain(first, second, conv(second.narrow, 3, 2, padding=1, seed=3))

    return make


def long() -> Program:
    first = conv((1, 40), 3, 5, stride=2, padding=2, seed=1)
    second = conv(first.narrow, 4, 3, padding=1, seed=2)
    return chain(first, second, conv(second.narrow, 2, 4, stride=3, seed=3))


def solid() -> Program:
    first = conv((1, 6, 7, 6), 2, 2, seed=1)
    second = conv(first.narrow, 2, 2, padding=1, seed=2)
    return chain(first, second, conv(second.narrow, 1, 2, seed=3))


def up_and_down() -> Program:
    down = conv((2, 12, 13), 4, 3, stride=2, padding=1, seed=1)
    up = conv((3, 12, 13), 4, 3, stride=2, padding=1, transposed=True, seed=2)
    return chain(down, up, conv(up.wide, 2, (3, 2), seed=3))


def residual() -> Program:
    """Two paths of different reach, one of them without a convolution, and different steps of different strides."""
    first = conv((2, 12, 12), 4, 3, padding=1, seed=1)
    inner = conv(first.narrow, 4, 3, padding=1, seed=2)
    n = inner.size[0]
    down, skip = conv(inner.narrow, 3, 3, stride=2, padding=1, seed=3), conv(inner.narrow, 3, 1, stride=2, seed=4)
    return Program((
        Variable(first.size[1]), affine((first, 0)), Function(1, ew.RELU, n),
        affine((inner, 2), (diagonal(n, 5), 2), seed=1), Function(3, ew.RELU, n),
        affine((down, 4), (skip, 4), seed=2), Function(5, ew.RELU, down.size[0]),
        affine((conv(down.narrow, 2, 2, seed=6), 6), seed=3),
    ))  # fmt: skip


def gated() -> Program:
    """Products, two functions of one value, differences of channels: all of it place by place. No smooth functions:
    the choice of their lines may turn on the last bit."""
    first = conv((2, 11, 12), 4, 3, padding=1, seed=1)
    n = first.size[0]
    second = conv(first.narrow, 4, 3, padding=1, seed=2)
    i = torch.arange(n // 2)
    apart = Sparse(
        i.repeat_interleave(2), torch.stack([i, i + n // 2], 1).reshape(-1),
        torch.tensor([1.0, -1.0], dtype=F64).repeat(n // 2), (n // 2, n),
    )  # fmt: skip
    return Program((
        Variable(first.size[1]), affine((first, 0)), Function(1, ew.ABS, n), affine((second, 2), seed=1),
        Function(3, ew.ABS, n), Function(3, ew.RELU, n), Times(4, 5, n), affine((apart, 6), seed=2),
        Function(7, ew.ABS, n // 2), affine((conv((2, 11, 12), 2, 3, seed=4), 8), seed=3),
    ))  # fmt: skip


def below_a_matrix() -> Program:
    """What lies below a dense layer is not cropped."""
    first = conv((2, 12, 12), 4, 3, padding=1, seed=1)
    return chain(
        Matrix(random(first.size[1], 5, seed=7)), first, conv(first.narrow, 3, 3, padding=1, seed=2),
        conv((3, 12, 12), 2, 3, seed=3),
    )  # fmt: skip


PROGRAMS: dict[str, Callable[[], Program]] = {
    **{f"padding {p}": plain(padding=p) for p in (0, 1, 2)},
    **{f"stride {s}": plain(stride=s, padding=1) for s in (2, 3)},
    **{f"dilation {d}": plain(dilation=d, padding=2) for d in (2, 3)},
    **{f"groups {g}": plain(groups=g, padding=1) for g in (2, 4)},
    "stride, dilation and groups": plain(stride=2, dilation=2, padding=2, groups=2),
    "one axis": long, "three axes": solid, "transposed": up_and_down, "residual": residual, "gated": gated,
    "below a matrix": below_a_matrix,
    "uneven bias": lambda: chain(
        conv((2, 9, 9), 3, 3, padding=1, seed=1), conv((3, 9, 9), 3, 3, padding=1, seed=2),
        conv((3, 9, 9), 2, 3, seed=3), uneven=True,
    ),
}  # fmt: skip


def boxes(program: Program, batch: int = 2) -> tuple[Tensor, Tensor]:
    middle = random(batch, program.inputs, seed=9)
    radius = 0.2 * random(batch, program.inputs, seed=10).abs()
    return middle - radius, middle + radius


def gap(program: Program, monkeypatch: pytest.MonkeyPatch) -> float:
    """How far intervals are from those without crops; infinite where crops cannot be made or none is."""
    low, high = boxes(program)
    bounder = Bounder(program)
    try:
        found = bounder.refresh(low, high)
    except (RuntimeError, IndexError, ValueError):
        return math.inf
    if not bounder.bounders:
        return math.inf
    with monkeypatch.context() as patch:
        patch.setattr(module, "WORTH", -1.0)
        dense = Bounder(program)
        expected = dense.refresh(low, high)
        assert not dense.bounders
    pairs = zip(found.lower + found.upper, expected.lower + expected.upper, strict=True)
    return max(float(((a - b).abs() / (1 + b.abs())).max()) for a, b in pairs)


@pytest.mark.parametrize("name", PROGRAMS)
def test_crops_give_the_bounds_of_the_whole(name, monkeypatch):
    assert gap(PROGRAMS[name](), monkeypatch) < 1e-10


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "below a matrix"])
def test_a_crop_computes_the_entries_that_it_says(name):
    program = PROGRAMS[name]()
    x = random(program.inputs, seed=11)
    values, crops = program.evaluate(x), Crops(program)
    made = 0
    for i, step in enumerate(program.steps):
        whole, parts = crops.of(i, torch.arange(step.size))
        covered = [whole]
        for crop, which, place, inner in parts:
            made += 1
            covered.append(which)
            small = crop.program.evaluate(x[crop.index[0]])
            assert torch.equal(crop.index[i][place, inner], which)
            for value, index, v in zip(values, crop.index, small, strict=False):
                assert torch.allclose(value[index], v, rtol=1e-12, atol=1e-12)
        assert torch.equal(torch.cat(covered).sort().values, torch.arange(step.size))
    assert made


def test_large_maps_share_places_among_neighbours(monkeypatch):
    monkeypatch.setattr(module, "PLACES", 30)
    program = plain(padding=1)()
    assert len(set(Crops(program).place[3].tolist())) <= 42
    assert gap(program, monkeypatch) < 1e-10


def test_equal_windows_share_one_program():
    program = plain(padding=1)()
    crops = Crops(program)
    _, parts = crops.of(3, torch.arange(program.steps[3].size))
    assert sum(len(crop.index[3]) for crop, *_ in parts) == 13 * 11
    assert len(crops.programs) == 25  # two places from an edge nothing is cut off: 5 kinds along each axis


def narrower(window: Callable[[Convolution, Area], Area]) -> Callable[[Convolution, Area], Area]:
    def wrong(m: Convolution, area: Area) -> Area:
        right = window(m, area)
        return replace(right, high=(max(right.low[0] + 1, right.high[0] - 1), *right.high[1:]))

    return wrong


FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "window too small": ("residual", lambda p: p.setattr(module, "_window", narrower(module._window))),
    "padding everywhere": (
        "padding 1",
        lambda p: p.setattr(module, "_moved", lambda m, own, read, f=module._moved: (*f(m, own, read)[:2], m.padding)),
    ),
    "padding on both sides alike": (
        "padding 2", lambda p: p.setattr(Convolution, "_after", property(lambda m: m.padding)),
    ),
    "stride forgotten": (
        "stride 2",
        lambda p: p.setattr(module, "_moved", lambda m, own, read, f=module._moved: f(
            replace(m, stride=(1,) * len(m.stride)), own, read)),
    ),
    "bias of another place": (
        "uneven bias", lambda p: p.setattr(Crops, "_is_uniform", staticmethod(lambda step: True)),
    ),
    "coefficients left in the corner": (
        "below a matrix",
        lambda p: p.setattr(module.Crop, "spread", lambda crop, j, place, a, size: torch.nn.functional.pad(
            a, (0, size - a.shape[1]))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    name, plant = FAULTS[fault]
    program = PROGRAMS[name]()
    assert gap(program, monkeypatch) < 1e-10
    plant(monkeypatch)
    assert gap(program, monkeypatch) > 1e-4
