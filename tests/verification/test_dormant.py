"""Functions that are flat at every point seen are found and woken, and what hides behind them is met."""

import math
import time
from itertools import pairwise

import pytest
import torch

from soundly.auditing.planting import instance
from soundly.bounds.batch import Bounder
from soundly.bounds.lower import lower
from soundly.bounds.program import Affine, Function, Matrix, Program, Variable
from soundly.graph.elementwise import RELU, SIGN, TANH
from soundly.verification import dormant as module
from soundly.verification.attack import Attack
from soundly.verification.dormant import Waking
from soundly.verification.rows import Rows

F64 = torch.float64


def waking(program, low, high, y=(1.0, -1.0), project=None):
    """An attack that looks for y . outputs <= 0, after a short search of its own, and what may wake."""
    row = torch.tensor([y], dtype=F64)
    none = row.new_zeros(1)
    attack = Attack(program, Rows(row, none.expand(1, len(low)), none, torch.tensor([0])), low, high, 0, project)
    attack.run(steps=20, restarts=16)
    frame = Bounder(program).refresh(low[None], high[None])
    return Waking(attack, *([v[0] for v in ends] for ends in (frame.lower, frame.upper)))


def planted(**kind):
    made = instance(**{"margin": 1e-4, "shape": (1, 10), "position": "interior", "seed": 3, **kind})
    program = lower(made.network, region={made.network.inputs[0]: (made.lower, made.upper)})
    return made, waking(program, made.lower.flatten(), made.upper.flatten())


def soon(seconds=60.0):
    return time.monotonic() + seconds


@pytest.mark.parametrize("bump", ["relu", "max", "tanh", "softmax", "attention"])
def test_a_bump_that_gradients_do_not_show_is_climbed(bump) -> None:
    made, woken = planted(bump=bump, host="paired" if bump == "relu" else "tanh")
    assert woken.attack.best[0] > 0.1
    woken.run(soon())
    value, x = woken.attack.best
    assert value <= 0 and bool(((x >= made.lower.flatten()) & (x <= made.upper.flatten())).all())
    y = made.network.to(F64)(x.reshape(made.lower.shape)).flatten()
    assert float(y[0] - y[1]) <= 0
    assert made.witness is not None and float((x - made.witness.flatten()).abs().max()) < 0.05


def test_nothing_is_met_by_climbing_what_was_awake(monkeypatch) -> None:
    """Without the entries that are flat the same effort ends with nothing; so does one gradient instead of many."""
    monkeypatch.setattr(module, "FLAT", -1.0)
    _, blind = planted(bump="relu")
    blind.run(soon())
    assert blind.attack.best[0] > 0.1
    monkeypatch.undo()
    monkeypatch.setattr(module.Waking, "_random", lambda self, *size: torch.full(size, 0.5, dtype=F64))
    _, rigid = planted(bump="max")
    rigid.run(soon(2))
    assert rigid.attack.best[0] > 0.1


def bent(bias, op):
    """op(x + bias), entrywise, then 1 - sum."""
    n = len(bias)
    return Program((
        Variable(n), Affine(((Matrix(torch.eye(n, dtype=F64)), 0),), torch.tensor(bias, dtype=F64)),
        Function(1, op, n), Affine(((Matrix(-torch.ones(1, n, dtype=F64)), 2),), torch.ones(1, dtype=F64)),
    ))  # fmt: skip


def test_dormant_is_what_is_flat_at_all_points_and_need_not_be() -> None:
    low, high = -torch.ones(4, dtype=F64), torch.ones(4, dtype=F64)
    # Never awake, always awake, both, and flat at what was seen: where x is near 1.
    woken = waking(bent([-2.0, 2.0, 0.0, -0.9], RELU), low, high, y=(1.0,))
    woken.seen = woken.seen.minimum(torch.tensor([1.0, 1.0, 1.0, 0.8], dtype=F64))
    found = woken.dormant()
    assert list(zip(found.source.tolist(), found.entry.tolist(), found.sign.tolist(), strict=True)) == [(1, 3, 1.0)]
    assert float(found.worth[0]) == pytest.approx(0.1), "it would bring the row down by what it can become"
    # Saturated below, saturated above, both within reach of the bend, and beyond it.
    curved = waking(bent([-40.0, 40.0, 0.0, 100.0], TANH), 40 * low, 40 * high, y=(1.0,))
    curved.seen = torch.full_like(curved.seen, 10.0)
    found = curved.dormant()
    assert dict(zip(found.entry.tolist(), found.sign.tolist(), strict=True)) == {0: 1.0, 1: -1.0, 2: -1.0}
    assert len(waking(bent([0.0] * 4, SIGN), low, high, y=(1.0,)).dormant()) == 0, "a jump has no slope to find"


def test_a_point_and_time_that_is_over() -> None:
    made, late = planted(bump="relu")
    before = late.attack.best[0]
    late.run(time.monotonic() - 1)
    assert late.attack.best[0] == before and len(late.dormant(-math.inf)) == 0
    x = made.lower.flatten()
    fixed = waking(late.program, x, x)
    fixed.run(soon(1))
    assert fixed.attack.best[0] > 0
    empty = waking(late.program, made.upper.flatten() + 1, made.lower.flatten())
    empty.run(soon(1))
    assert len(empty.attack.kept) == 0


def test_a_dear_network_takes_no_longer_than_it_may() -> None:
    g = torch.Generator().manual_seed(0)
    sizes, steps = [200, 1000, 1000, 1000, 1], [Variable(200)]
    for n, m in pairwise(sizes):
        weight = torch.randn(m, n, generator=g, dtype=F64) / n**0.5
        steps.append(Affine(((Matrix(weight), len(steps) - 1),), torch.full((m,), -0.5, dtype=F64)))
        if m > 1:
            steps.append(Function(len(steps) - 1, RELU, m))
    end = torch.ones(200, dtype=F64)
    dear = waking(Program((*steps[:-1], Affine(steps[-1].parts, 9 + steps[-1].bias))), -end, end, y=(1.0,))
    begun = time.process_time()
    dear.run(soon(0.3))
    assert time.process_time() - begun < 3


def test_points_stay_in_a_ball() -> None:
    def project(x):
        return x * (0.25 / x.norm(dim=-1, keepdim=True).clamp(min=0.25))

    end = torch.full((6,), 0.25, dtype=F64)
    woken = waking(bent([-0.2] * 6, RELU), -end, end, y=(1.0,), project=project)
    woken.seen = woken.seen.clamp(max=0.1)
    points = woken._climb(woken.dormant(), soon())
    assert len(points) == 6 * module.POINTS
    assert float(points.norm(dim=1).max()) <= 0.25 * (1 + 1e-9)
    assert float(points.amax(1).min()) > 0.24, "an entry reaches nearly as far as the ball"
