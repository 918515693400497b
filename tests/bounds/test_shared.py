"""Bounds with the slopes of one box: no row falls below its bound on any other, whatever the network."""

import pytest
import torch
from tests.bounds.test_batch import MADE, program_of
from torch import Tensor

from soundly.bounds import shared as module
from soundly.bounds.batch import Bounder
from soundly.bounds.frame import Start
from soundly.bounds.shared import Shared

F64 = torch.float64


def escape(name: str, seed: int = 0, width: float = 0.4) -> tuple[float, float]:
    """By how much a sampled row falls below its bound, at most; and how far bounds at the reference lie from those of
    the bounder itself, at most. Relative to the rows' sizes."""
    program, source = program_of(name), torch.Generator().manual_seed(seed)
    bounder = Bounder(program)
    centre = torch.randn(program.inputs, generator=source, dtype=F64)
    low, high = centre - width, centre + width
    x = torch.lerp(low, high, torch.rand(program.inputs, generator=source, dtype=F64))
    a = torch.randn(5, program.outputs, generator=source, dtype=F64)
    start = Start({len(program.steps) - 1: a}, torch.randn(5, generator=source, dtype=F64), torch.zeros(5).long())
    whole = bounder.refresh(low[None], high[None])
    free = torch.rand(12, program.inputs, generator=source) < torch.rand(12, 1, generator=source)
    lower, upper = torch.where(free, low, x), torch.where(free, high, x)
    bounds = Shared(bounder, whole, lower[0], upper[0], start)
    least = bounds.least(lower, upper)
    values = _sampled(program.evaluate, lower, upper, source) @ a.T + start.d
    size = values.abs().amax()
    own = bounder.refresh(lower[:1], upper[:1])
    wanted = bounder.backward(own, own.known, start).least(lower[:1], upper[:1])
    assert torch.isfinite(least).any()
    return float((least[:, None] - values).max() / size), float(((least[0] - wanted).abs() / size).max())


def _sampled(evaluate, lower: Tensor, upper: Tensor, source: torch.Generator) -> Tensor:
    """Outputs [boxes, points, outputs] at random points and corners."""
    u = torch.rand(len(lower), 200, lower.shape[1], generator=source, dtype=F64)
    u = torch.cat([u, u.round()], 1)
    x = torch.lerp(lower[:, None], upper[:, None], u)
    return evaluate(x.flatten(0, 1))[-1].unflatten(0, u.shape[:2])


@pytest.mark.parametrize("name", MADE)
def test_no_row_falls_below_its_bound_on_any_box(name):
    for seed in range(3):
        assert escape(name, seed)[0] <= 1e-9


@pytest.mark.parametrize("name", ["mlp", "residual", "convnet"])
def test_at_the_reference_the_bounds_are_those_of_the_bounder(name):
    assert escape(name)[1] < 1e-3


def _frozen(f, lower, upper, slope, side, *, original=module._offset):
    """An offset that stays that of the first box of a batch."""
    return original(f, lower[:1], upper[:1], slope, side).expand(lower.shape)


def _swapped(f, lower, upper, slope, side, *, original=module._offset):
    return original(f, lower, upper, slope, 1 - side)


@pytest.mark.parametrize("fault", [_frozen, _swapped])
def test_offsets_that_do_not_follow_their_box_are_caught(fault, monkeypatch):
    monkeypatch.setattr(module, "_offset", fault)
    assert max(escape(name, seed)[0] for name in ("kinks", "smooth") for seed in range(3)) > 1e-3


def test_a_corner_that_is_left_out_is_caught(monkeypatch):
    right = module._corner

    def wrong(sides, plane):
        xl, xu, yl, _ = sides
        return right((xl, xu, yl, yl), plane)

    monkeypatch.setattr(module, "_corner", wrong)
    assert max(escape("gradient of weights", seed)[0] for seed in range(4)) > 1e-2


def test_without_room_for_rows_the_intervals_of_the_whole_remain_and_hold(monkeypatch):
    monkeypatch.setattr(module, "ROOM", 0)
    for name in ("kinks", "smooth"):
        assert escape(name)[0] <= 1e-9
