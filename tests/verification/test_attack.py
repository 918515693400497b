"""The attack finds counterexamples that are known to exist, and never one where there is none."""

import math
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from soundly.bounds.program import Affine, Function, Matrix, Program, Sparse, Times, Variable
from soundly.graph.elementwise import EXP, LOG, RECIPROCAL, RELU, SIGN, SQUARE, STEP, TANH
from soundly.verification import attack as module
from soundly.verification.attack import Attack, logits
from soundly.verification.rows import Rows


def layers(*parts):
    """A program of alternating (weight, bias) and elementwise functions."""
    steps = [Variable(next(p for p in parts if isinstance(p, tuple))[0].shape[1])]
    for part in parts:
        i = len(steps) - 1
        if isinstance(part, tuple):
            steps.append(Affine(((Matrix(part[0].double()), i),), part[1].double()))
        else:
            steps.append(Function(i, part, steps[i].size))
    return Program(tuple(steps))


def net(sizes, op, seed):
    g = torch.Generator().manual_seed(seed)
    parts = []
    for n, m in pairwise(sizes):
        parts += [(torch.randn(m, n, generator=g) * (2 / n) ** 0.5, torch.randn(m, generator=g) * 0.3), op]
    return layers(*parts[:-1])


def identity(n):
    return layers((torch.eye(n), torch.zeros(n)))


def softmax(program):
    """The program followed by a softmax."""
    n, i = program.outputs, len(program.steps)
    rows, zero = torch.zeros(n, dtype=torch.int64), torch.zeros(n).double()
    ones = torch.ones(n).double()
    total = Sparse(rows, torch.arange(n), ones, (1, n))
    share = Sparse(torch.arange(n), rows, ones, (n, 1))
    tail = (
        Function(i - 1, EXP, n), Affine(((total, i),), zero[:1]), Function(i + 1, RECIPROCAL, 1),
        Affine(((share, i + 2),), zero), Times(i, i + 3, n),
    )  # fmt: skip
    return Program((*program.steps, *tail))


def rows(y, constant, clause, x=None):
    y = torch.tensor(y, dtype=torch.float64)
    x = torch.zeros((len(y), 1)).double().expand(len(y), -1) if x is None else torch.tensor(x).double()
    return Rows(y, x, torch.tensor(constant, dtype=torch.float64), torch.tensor(clause))


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def points(*size):
    return torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def box(n, lower=-1.0, upper=1.0):
    return torch.full((n,), lower).double(), torch.full((n,), upper).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
def test_reaches_what_a_dense_grid_reaches(seed, dtype):
    program = net((2, 12, 12, 2), RELU if seed % 2 else TANH, seed)
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 301, dtype=torch.float64)] * 2)
    y = program.evaluate(grid)[-1]
    measure = torch.minimum(torch.maximum(y[:, 0], -y[:, 1]), y[:, 1] - 0.5 * y[:, 0])
    # Nothing less than the grid's minimum is a counterexample, so the attack has to descend all the way.
    least = float(measure.min()) - 1e-6
    found = rows([[1.0, 0.0], [0.0, -1.0], [-0.5, 1.0]], [-least] * 3, [0, 0, 1])
    attack = Attack(program.to(dtype), found, *box(2), seed=0)
    attack.search(rounds=5)
    assert attack.best[0] <= 2e-6


def test_the_measure_is_that_of_the_rows():
    program = net((3, 8, 4), TANH, 0)
    y, x = points(5, 4), points(5, 3)
    some = Rows(y, x, points(5), torch.tensor([0, 0, 1, 1, 1]))
    drawn = points(20, 3)
    value = program.evaluate(drawn)[-1] @ y.T + drawn @ x.T + some.constant
    wanted = torch.stack([value[:, :2].amax(1), value[:, 2:].amax(1)]).amin(0)
    attack = Attack(program, some, *box(3), seed=0)
    assert torch.allclose(attack.values(drawn), wanted, rtol=0, atol=1e-12)
    assert attack.best[0] == pytest.approx(float(wanted.min()), abs=1e-12)
    assert torch.equal(attack.best[1], drawn[wanted.argmin()])


def test_meets_many_rows_of_one_clause_at_once():
    n, place = 8, torch.rand(8, generator=torch.Generator().manual_seed(1)).double() * 1.6 - 0.8
    eye = torch.eye(n).double()
    both = torch.cat([eye, -eye]).tolist()
    found = rows(both, torch.cat([-place - 1e-3, place - 1e-3]).tolist(), [0] * 2 * n)  # a share 1e-24 of the box
    attack = Attack(identity(n), found, *box(n), seed=0)
    attack.search(rounds=6)
    assert attack.best[0] <= 0
    assert (attack.best[1] - place).abs().max() <= 1e-3 + 1e-9


def test_every_clause_has_its_turn():
    # Everywhere one clause is nearer to true, but never becomes so; the other one does in one corner.
    one, quarter = (Matrix(torch.full((1, 40), w).double()) for w in (1.0, 0.25))
    total = Affine(((one, 0), (quarter, 1)), torch.zeros(1).double())
    program = Program((Variable(40), Function(0, SQUARE, 40), total))
    found = rows([[1.0], [-10.0]], [30.1, 490.0], [0, 1])  # the sum of x + x^2 / 4 is -30 to 50
    attack = Attack(program, found, *box(40), seed=0)
    attack.search(rounds=4)
    assert attack.best[0] <= 0
    assert (attack.best[1] > 0).all()


def test_refinement_reaches_what_steps_are_too_wide_for(monkeypatch):
    place, near = torch.linspace(-0.71, 0.83, 8).double(), 1e-6
    both = torch.cat([torch.eye(8), -torch.eye(8)]).tolist()
    found = rows(both, torch.cat([-place - near, place - near]).tolist(), [0] * 16)
    attack = Attack(identity(8).to(torch.float32), found, *box(8), seed=0)
    attack.search(rounds=2)
    assert attack.best[0] <= 0
    monkeypatch.setattr(Attack, "_polish", lambda self, rounds, deadline: None)
    blunt = Attack(identity(8).to(torch.float32), found, *box(8), seed=0)
    blunt.search(rounds=2)
    assert blunt.best[0] > 0


def test_outputs_are_spread_before_a_descent():
    attack = Attack(net((6, 20, 20, 3), TANH, 0), rows([[1.0, 0.0, 0.0]], [9.0], [0]), *box(6), seed=0)
    x = points(64, 6)
    spread = [attack.program.evaluate(v)[-1].std(0) for v in (x, attack._diversified(x, 5, math.inf))]
    assert (spread[1] > 1.15 * spread[0]).all()


def binary(seed):
    """A net of signs whose counterexamples random points miss: output 0 counts agreeing hidden units."""
    g = torch.Generator().manual_seed(seed)
    first, second = torch.randn(64, 40, generator=g).sign(), torch.randn(32, 64, generator=g).sign()
    return layers((first, torch.full((64,), 0.1)), SIGN, (second, torch.full((32,), 0.1)), SIGN,
                  (-torch.ones(1, 32), torch.zeros(1)))  # fmt: skip


def test_jumps_are_climbed(monkeypatch):
    program, found = binary(0), rows([[1.0]], [24.5], [0])
    reached = Attack(program, found, *box(40), seed=0)
    reached.search(rounds=5)
    assert reached.best[0] <= 0
    # Without slopes at jumps nothing guides the points.
    monkeypatch.setattr(module, "_with_slope", lambda step: step)
    monkeypatch.setattr(Attack, "_flip", lambda self, rounds, deadline: None)
    blind = Attack(program, found, *box(40), seed=0)
    blind.search(rounds=5)
    assert blind.best[0] > 0


def test_random_flips_alone_get_somewhere(monkeypatch):
    monkeypatch.setattr(module, "_with_slope", lambda step: step)
    program, found = binary(1), rows([[1.0]], [20.5], [0])
    attack = Attack(program, found, *box(40), seed=0)
    attack.search(rounds=5)
    assert attack.best[0] <= 0


@pytest.mark.parametrize("op", [SIGN, STEP, RELU.derivative, replace(RELU, kernel=None).derivative])
def test_slopes_at_jumps_change_no_value(op):
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    y = module._with_slope(Function(0, op, 5)).op.apply(x)
    assert torch.equal(y, op.apply(x))
    assert (torch.autograd.grad(y.sum(), x)[0] > 0).all()


def test_functions_without_jumps_keep_their_gradient():
    for op in (RELU, TANH, SQUARE):
        step = Function(0, op, 3)
        assert module._with_slope(step) is step


@pytest.mark.parametrize("seed", range(3))
def test_finds_nothing_where_there_is_nothing(seed):
    program = net((4, 10, 3), RELU, seed)
    program = Program((*program.steps, Function(len(program.steps) - 1, SQUARE, 3)))
    never = rows([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [1e-3, 1e-3], [0, 1])  # squares above zero
    attack = Attack(program.to(torch.float32), never, *box(4), seed=seed)
    attack.search(rounds=4)
    assert 0 < attack.best[0] < math.inf


def test_values_that_are_not_finite_are_no_counterexamples():
    nan = layers((torch.tensor([[1.0]]), torch.tensor([-5.0])), LOG, (torch.tensor([[1.0]]), torch.zeros(1)))
    infinite = layers((torch.tensor([[1.0]]), torch.tensor([2000.0])), EXP, (torch.tensor([[-1.0]]), torch.zeros(1)))
    for program in (nan, infinite):
        attack = Attack(program, rows([[1.0]], [0.0], [0]), *box(1), seed=0)
        assert (attack.values(torch.zeros(3, 1)) == math.inf).all()
        found = attack.search(rounds=2)
        assert attack.best[0] == math.inf and len(found) == 0


def test_candidates_lie_in_the_box_and_the_region():
    lower, upper = torch.tensor([0.1, -0.3, 0.2]).double(), torch.tensor([0.7, 0.4, 0.2]).double()
    heart, radius = torch.tensor([0.4, 0.05, 0.2]).double(), 0.2

    def ball(x):
        way = x - heart.to(x)
        return heart.to(x) + way * (radius / way.norm(dim=-1, keepdim=True).clamp(min=radius))

    program, far = net((3, 9, 2), RELU, 2), rows([[1.0, -1.0]], [50.0], [0])
    for project in (None, ball):
        attack = Attack(program, far, lower, upper, seed=3, project=project)
        found = attack.run(torch.full((2, 3), 9.0), steps=20, restarts=20)
        assert len(found) > 2
        assert ((found >= lower - 1e-12) & (found <= upper + 1e-12)).all()
        if project:
            assert ((found - heart).norm(dim=-1) <= radius + 1e-9).all()


def test_best_first_and_the_same_again():
    program, far = net((5, 9, 2), TANH, 2), rows([[1.0, -1.0]], [50.0], [0])
    runs = []
    for _ in range(2):
        attack = Attack(program.to(torch.float32), far, *box(5), seed=7)
        runs.append([attack.run(steps=5, restarts=12) for _ in range(3)][-1])
    assert torch.equal(*runs)
    value = attack.values(runs[0])
    assert (value[1:] >= value[:-1] - 1e-4).all()
    assert attack.best[0] <= float(value[0])


def test_a_start_that_is_a_counterexample_is_taken_at_once():
    place = torch.tensor([[0.123, -0.321]]).double()
    near = rows([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [-0.1231, 0.1229, 0.3209, -0.3211], [0] * 4)
    attack = Attack(identity(2), near, *box(2), seed=0)
    found = attack.run(place, steps=0, restarts=4)
    assert attack.best[0] <= 0
    assert torch.equal(found[0], place[0])


def test_running_again_after_a_hit_goes_deeper():
    attack = Attack(net((4, 10, 2), TANH, 5), rows([[1.0, -1.0]], [0.0], [0]), *box(4), seed=0)
    depths = []
    for _ in range(3):
        attack.search(rounds=3)
        depths.append(attack.best[0])
    assert depths[0] <= 0 and depths[2] < depths[1] < depths[0]


def test_stops_at_the_deadline():
    attack = Attack(net((30, 200, 200, 1), TANH, 0), rows([[1.0]], [100.0], [0]), *box(30), seed=0)
    start = time.monotonic()
    attack.run(steps=10**6, restarts=32, deadline=start + 0.2)
    assert time.monotonic() - start < 2
    assert len(attack.run(steps=10, restarts=4, deadline=0.0)) > 0


def test_a_box_of_one_point_and_a_property_without_clauses():
    point = torch.tensor([0.5, 0.5]).double()
    attack = Attack(net((2, 5, 1), SIGN, 0), rows([[1.0]], [10.0], [0]), point, point, seed=0)
    assert torch.equal(attack.search(rounds=3), point[None])
    nothing = Rows(
        torch.empty(0, 1).double(), torch.empty(0, 2).double(), torch.empty(0).double(), torch.empty(0).long()
    )
    attack = Attack(net((2, 5, 1), RELU, 0), nothing, *box(2), seed=0)
    assert len(attack.search(rounds=2)) == 0
    assert attack.best[0] == math.inf


class TestLogits:
    pair = rows([[1.0, -1.0, 0.0], [0.0, -2.0, 2.0]], [0.0, 0.0], [0, 1])

    def test_the_signs_of_differences_stay(self):
        program = softmax(net((4, 8, 3), TANH, 0))
        plain = logits(program, self.pair)
        assert len(plain.steps) == len(program.steps) - 5
        x = points(200, 4)
        before, after = (p.evaluate(x)[-1] @ self.pair.y.T for p in (program, plain))
        assert torch.equal(before.sign(), after.sign()) and len(before.sign().unique()) == 2

    @pytest.mark.parametrize(
        "other",
        [
            rows([[1.0, -1.0, 0.0]], [-0.1], [0]),
            rows([[1.0, -2.0, 0.0]], [0.0], [0]),
            rows([[1.0, -2.0, 1.0]], [0.0], [0]),
            rows([[1.0, -1.0, 0.0]], [0.0], [0], x=[[1.0, 0.0, 0.0, 0.0]]),
        ],
    )
    def test_other_rows_keep_the_softmax(self, other):
        program = softmax(net((4, 8, 3), TANH, 0))
        assert logits(program, other) is program

    def test_shares_that_differ_keep_it(self):
        program = softmax(net((4, 8, 3), TANH, 0))
        spread = program.steps[-2]
        uneven = replace(spread.parts[0][0], values=torch.tensor([1.0, 2.0, 1.0]).double())
        steps = (*program.steps[:-2], replace(spread, parts=((uneven, spread.parts[0][1]),)), program.steps[-1])
        assert len(logits(Program(steps), self.pair).steps) == len(steps)

    def test_a_saturated_softmax_is_no_obstacle(self):
        program = net((20, 16, 3), RELU, 1)
        big = layers((torch.eye(3) * 300, torch.zeros(3)))
        steep = Program((*program.steps, Affine(((big.steps[1].parts[0][0], len(program.steps) - 1),),
                                                torch.tensor([0.0, 900.0, 0.0]).double())))  # fmt: skip
        attack = Attack(softmax(steep).to(torch.float32), rows([[0.0, 1.0, -1.0]], [0.0], [0]), *box(20), seed=0)
        attack.search(rounds=4)
        assert attack.best[0] <= 0
