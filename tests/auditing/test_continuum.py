"""From a grid to its box: never where linear programs over all patterns of ReLUs refute, and not with half the fall."""

from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

import soundly
from soundly import Box, Claim, Proved, within
from soundly.auditing import continuum
from soundly.auditing.continuum import from_grid
from soundly.certificate import check
from soundly.errors import InvalidInput
from soundly.spec.claim import Property, Row

LEVELS = 9


@cache
def instance(seed: int) -> tuple[soundly.Network, Box, float, float]:
    """A network of two inputs and five ReLUs, with its least value and its range on a box, exactly."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)).double().requires_grad_(False)
    w, b, v, c = (p.numpy() for p in (model[0].weight, model[0].bias, model[2].weight[0], model[2].bias))
    ends = []
    for sign in (1, -1):
        values = []
        for on in map(np.array, product((0.0, 1.0), repeat=5)):
            a = -(2 * on - 1)[:, None] * w
            found = linprog(sign * (v * on) @ w, A_ub=a, b_ub=(2 * on - 1) * b, bounds=[(-2, 2)] * 2)
            if found.status == 0:
                values.append(found.fun + sign * float((v * on) @ b + c[0]))
        ends.append(sign * min(values))
    box = Box(torch.full((2,), -2.0), torch.full((2,), 2.0))
    return soundly.load(model, torch.zeros(2, dtype=torch.float64)), box, ends[0], ends[1] - ends[0]


def lower(seed: int, room: float) -> Claim:
    net, box, least, width = instance(seed)
    return within(net, box, least - room * width, None)


def test_never_proved_where_linear_programs_refute():
    held = 0
    for seed in range(12):
        assert not from_grid(lower(seed, -0.002), LEVELS).holds, seed
        if seed % 2:
            continue
        result = from_grid(lower(seed, 0.3), LEVELS)
        held += result.holds
        if result.holds:
            assert check(result.verdict.certificate).accepted and check(result.steepness.verdict.certificate).accepted
            assert isinstance(soundly.verify(lower(seed, 0.3)), Proved)
    assert held >= 3


def valley() -> soundly.Network:
    """|x - 1/8| + |y - 1/8|, which is 0 in the middle of four points of the grid and 1/4 at each of them."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).requires_grad_(False)
    model[0].weight[:] = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    model[0].bias[:] = torch.tensor([-0.125, 0.125, -0.125, 0.125])
    model[2].weight[:], model[2].bias[:] = 1.0, 0.0
    return soundly.load(model, torch.zeros(2))


def test_half_of_the_fall_is_not_enough(monkeypatch):
    """A planted fault: half steps of half the size prove that the valley is nowhere below 0.1, though it is."""
    box = Box(torch.full((2,), -1.0), torch.full((2,), 1.0))
    false = within(valley(), box, 0.1, None)
    assert not from_grid(false, LEVELS).holds
    assert from_grid(within(valley(), box, -0.02, None), LEVELS).holds
    plain = continuum.certify_map

    def halved(*arguments, **options):
        found = plain(*arguments, **options)
        return replace(found, lower=found.lower / 2, upper=found.upper / 2)

    monkeypatch.setattr(continuum, "certify_map", halved)
    assert from_grid(false, LEVELS).holds


def test_rows_of_inputs_count():
    """y - 2 x <= 0.1 on the diagonal's network y = x: false at x = -1 alone, by the row's own part in x."""
    model = nn.Linear(1, 1, bias=False).requires_grad_(False)
    model.weight[:] = 1.0
    net, box = soundly.load(model, torch.zeros(1)), Box(torch.tensor([-1.0]), torch.tensor([1.0]))
    row = Row({0: 1}, {0: -2}, 0)
    for b, true in ((1.3, True), (0.9, False)):
        clause = [replace(row, b=Fraction(b))]
        claim = Claim(net, box, Property.of([clause], outputs=1, inputs=1))
        result = from_grid(claim, 5)
        assert float(result.fall) == pytest.approx(0.25, rel=1e-2) and result.holds == true


def test_a_point_of_the_grid_may_refute_the_claim_itself():
    result = from_grid(within(valley(), Box(torch.full((2,), -1.0), torch.full((2,), 1.0)), 0.3, None), LEVELS)
    assert not result.holds and result.counterexample is not None
    assert float(valley()(result.counterexample.float())) <= 0.3


def test_networks_that_jump_are_refused():
    class Sign(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sign(x - 0.05)

    box = Box(torch.full((2,), -1.0), torch.full((2,), 1.0))
    with pytest.raises(InvalidInput, match="jumps"):
        from_grid(within(soundly.load(Sign(), torch.zeros(2)), box, -2.0, None), 3)
    with pytest.raises(InvalidInput, match="Box"):
        from_grid(within(valley(), soundly.Ball(torch.zeros(2), 1.0, "l2"), -2.0, None), 3)
