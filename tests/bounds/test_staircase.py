"""Rounding to whole numbers: over a region a staircase, which is the rounding itself there."""

import math
from dataclasses import replace

import pytest
import torch
from tests.bounds.samples import F64, box, function, kinds, mlp
from torch import Tensor

from soundly.bounds import lower as lowering
from soundly.bounds.lines import bent, lines
from soundly.bounds.lower import lower, staircase
from soundly.bounds.program import Function
from soundly.errors import CaptureMismatch, InvalidInput, MissingRule
from soundly.graph import elementwise as ew
from soundly.graph.composite import Rounding
from soundly.graph.linear import (
    Combine,
)  # fmt: skip
from soundly.graph.network import Network

ROUNDINGS = ["floor", "ceil", "trunc", "round"]
RANGES = [(-3.0, 4.0), (-2.5, 1.5), (0.2, 0.4), (-0.3, 0.3), (0.5, 0.5), (1.0, 1.0), (-7.75, -3.1), (140.5, 150.0)]
rounding = pytest.mark.parametrize("kind", ROUNDINGS)
ranges = pytest.mark.parametrize("ends", RANGES, ids=str)


def covering(low: float, high: float) -> Tensor:
    """A grid with every whole number and half, and their neighbours."""
    middle = torch.arange(math.floor(low), math.ceil(high) + 1, 0.5, dtype=F64)
    near = [middle, *(torch.nextafter(middle, torch.full_like(middle, end)) for end in (-math.inf, math.inf))]
    points = torch.cat([torch.linspace(low, high, 1001, dtype=F64), *near, torch.tensor([low, high], dtype=F64)])
    return points[(low <= points) & (points <= high)]


@rounding
@ranges
def test_a_staircase_is_the_rounding_on_its_range(kind, ends):
    op = Rounding(kind)
    f, x = staircase(op, *ends), covering(*ends)
    assert torch.equal(f.apply(x), op.apply(x))
    assert torch.equal(f._evaluate(x), op.apply(x)), "pieces and kernel differ"
    far = torch.cat([x, torch.tensor([-1e9, 1e9, -0.5, 0.5, 0.0], dtype=F64), torch.randn(99, dtype=F64) * 9])
    assert torch.equal(f._evaluate(far), f.apply(far))
    assert f.derivative.is_zero and not f.derivative.apply(x).any()
    assert len(f.breaks) <= ends[1] - ends[0] + 1


@rounding
@ranges
def test_enclosures_and_lines_of_a_staircase_hold_both_sides_of_its_jumps(kind, ends):
    f = staircase(Rounding(kind), *ends)
    x = covering(*ends)
    pick = torch.randint(len(x), (2, 400), generator=torch.Generator().manual_seed(2))
    low, high = x[pick].amin(0), x[pick].amax(0)
    least, greatest = f.enclose(low, high)
    found, straight = lines(f, low, high), ~bent(f, low, high)
    jumps = torch.tensor(f.breaks, dtype=F64)
    for t, at in ((x, x), (jumps - 1e-9, jumps), (jumps + 1e-9, jumps)):  # at a jump both sides count
        inside = (low <= at[:, None]) & (at[:, None] <= high)
        y, at = f.apply(t)[:, None], at[:, None]
        assert bool(((least <= y) & (y <= greatest))[inside].all())
        assert bool((found.slope_low * at + found.offset_low <= y + 1e-9)[inside].all())
        assert bool((y <= found.slope_high * at + found.offset_high + 1e-9)[inside].all())
        assert bool((y == f.apply(low))[inside & straight & (low < high)].all())


def rounded() -> Network:
    """Each kind of rounding, of a layer and of sums of roundings."""
    inner = mlp()
    y = Combine((5.0,))(inner.outputs[0])
    floor, ceil = Rounding("floor")(y), Rounding("ceil")(Combine((0.5,))(y))
    sums = Combine((1.0, 1.0, 0.3))(floor, ceil, y)
    output = Combine((1.0, 2.0))(Rounding("round")(sums), Rounding("trunc")(Combine((0.7,))(sums)))
    return replace(inner, outputs=(output,))


def test_roundings_are_lowered_over_a_region():
    network = rounded()
    program = lower(network, region=box(network, -0.5, 1.0))
    wide = network.to(F64)
    x = torch.rand(200, 4, generator=torch.Generator().manual_seed(8), dtype=F64) * 1.5 - 0.5
    truth = torch.stack([wide(point[None])[0] for point in x])
    assert torch.allclose(program.evaluate(x)[-1], truth, rtol=1e-9, atol=1e-9)
    beyond = 40 * x  # where the staircases have ended
    far = torch.stack([wide(point[None])[0] for point in beyond])
    assert not torch.allclose(program.evaluate(beyond)[-1], far, rtol=1e-9, atol=1e-9)
    with pytest.raises(MissingRule, match="64 steps"):
        lower(network, region=box(network, -50.0, 50.0))
    with pytest.raises(MissingRule, match="region"):
        lower(network)
    with pytest.raises(InvalidInput, match="region"):
        lower(network, region={})


def test_a_region_that_reaches_no_jump_has_constants():
    network = function(ew.RELU, 0.2, 0.5)
    whole = Network(network.inputs, (Rounding("floor")(network.outputs[0]),), {}, like=network.like)
    program = lower(whole, region=box(whole, -1.0, 1.0))
    assert kinds(program) == ["Variable", ""]
    assert program.evaluate(torch.rand(5, 3, dtype=F64))[-1].tolist() == [[0.0] * 3] * 5


@rounding
def test_whole_numbers_are_rounded_at_a_distance_from_jumps(kind):
    """Where no number of the region lies across a jump, rounding is exact even after a rounding error."""
    network = function(ew.RELU, 1.0)
    x = network.inputs[0]
    network = Network((x,), (Rounding(kind)(x),), {}, like=network.like)
    low = torch.tensor([0.0, 1.0, 2.0], dtype=F64).reshape(x.shape)
    program = lower(network, region={x: (low, low)})
    step = program.steps[-1]
    assert isinstance(step, Function)
    for error in (-1e-9, 0.0, 1e-9):
        assert torch.equal(program.evaluate(low.reshape(1, -1) + error)[-1], low.reshape(1, -1))
    assert kind == "round" or not set(step.op.breaks) & {0.0, 1.0, 2.0}
    high = low + torch.tensor([0.0, 0.0, 0.6], dtype=F64).reshape(x.shape)
    program = lower(network, region={x: (low - 0.25, high)})  # now some do
    points = torch.cat([torch.lerp(low - 0.25, high, torch.tensor(t, dtype=F64)).reshape(1, -1) for t in (0, 0.5, 1)])
    assert torch.equal(program.evaluate(points)[-1], Rounding(kind).apply(points))


@pytest.mark.parametrize("fault", ["floor", "few"])
def test_wrong_staircases_are_noticed(monkeypatch, fault):
    def wrong(op: Rounding, low: float, high: float) -> ew.Elementwise:
        return staircase(Rounding("floor"), low, high) if fault == "floor" else staircase(op, low, high / 2)

    network = function(ew.RELU, 8.0)
    whole = Network(network.inputs, (Rounding("round")(network.outputs[0]),), {}, like=network.like)
    lower(whole, region=box(whole, -1.0, 1.0))
    monkeypatch.setattr(lowering, "staircase", wrong)
    with pytest.raises(CaptureMismatch):
        lower(whole, region=box(whole, -1.0, 1.0))


def test_many_steps_are_fast():
    f, x = staircase(Rounding("round"), -32.0, 31.0), torch.rand(10**6, dtype=F64) * 63 - 32
    assert len(f.breaks) >= 60
    assert torch.equal(f.apply(x), x.round())
    assert f.special_points and f.kernel is not None
