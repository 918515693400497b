"""Absolute values bounded together: no sample is below a row's bound, and many are bounded better than one by one."""

import pytest
import torch
from torch import Tensor, nn

import soundly
from soundly import Box
from soundly.bounds import absolute as module
from soundly.bounds.absolute import absolute, summed
from soundly.bounds.batch import Bounder
from soundly.bounds.frame import Start
from soundly.spec.claim import within
from soundly.verification.problem import problem_of

F64 = torch.float64


class Sums(nn.Module):
    """Sums of absolute values behind a hidden layer; the second row has one of each sign."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.outer = nn.Sequential(nn.Linear(5, 8), inner, nn.Linear(8, 6)), nn.Linear(6, 2)
        self.outer.weight.data[0].abs_()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.outer(self.inner(x).abs())
        return result


def case(seed: int) -> tuple[soundly.Network, Box, Bounder, Start]:
    torch.manual_seed(seed)
    model = Sums([nn.ReLU(), nn.Tanh(), nn.Softplus()][seed % 3]).double()
    x, width = torch.randn(1, 5, dtype=F64), [0.3, 1.0, 2.0][seed // 3 % 3]
    with torch.no_grad():
        model.inner[2].bias -= model.inner(x)[0]
    network, region = soundly.load(model, x), Box(x - width, x + width)
    problem = problem_of(within(network, region, None, 0.0))
    bounder = Bounder(problem.program)
    rows = problem.rows
    return network, region, bounder, Start({len(bounder.steps) - 1: rows.y}, rows.constant)


def below(seed: int) -> float:
    """How far a row gets below its bound."""
    network, region, bounder, start = case(seed)
    frame = bounder.refresh(region.lower.reshape(1, -1), region.upper.reshape(1, -1))
    with torch.no_grad():
        found = summed(bounder, frame, start, rounds=4)
        assert found is not None
        values = torch.vmap(network)(torch.cat([region.samples(500), region.corners(32)])).flatten(1)
    return float((found.bound - (-values).amin(0)).max())


@pytest.mark.parametrize("seed", range(9))
def test_no_sample_is_below_a_bound(seed):
    assert below(seed) < 1e-9


def test_bounds_that_are_too_high_are_noticed(monkeypatch):
    true = module._norm
    monkeypatch.setattr(module, "_norm", lambda *parts: 0.7 * true(*parts))
    assert max(below(seed) for seed in range(9)) > 1e-3


def test_rounds_raise_bounds_above_those_of_values_one_by_one():
    gain = 0
    for seed in range(0, 9, 2):
        _, region, bounder, start = case(seed)
        frame = bounder.refresh(region.lower.reshape(1, -1), region.upper.reshape(1, -1))
        start = Start({i: a[:1] for i, a in start.a.items()}, start.d[:1])
        with torch.no_grad():
            bounds = [float(summed(bounder, frame, start, rounds=r).bound) for r in (0, 6)]
            alone = float(bounder.backward(frame, bounder.lines(frame), start).least(frame.lower[0], frame.upper[0]))
        assert bounds[0] <= bounds[1]
        gain += bounds[1] > alone
    assert gain >= 3


def test_only_sums_at_the_end_are_concerned():
    _, _, bounder, _ = case(0)
    assert list(absolute(bounder.steps).values()) == [1.0]
    inner = soundly.load(
        nn.Sequential(Sums(nn.ReLU()), nn.ReLU(), nn.Linear(2, 1)).double(), torch.zeros(1, 5, dtype=F64)
    )
    problem = problem_of(within(inner, Box(-torch.ones(1, 5, dtype=F64), torch.ones(1, 5, dtype=F64)), None, 0.0))
    assert absolute(problem.program.steps) == {}
