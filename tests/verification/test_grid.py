"""Claims over grids: verdicts against brute force, witnesses, certificates, searches that drop what they must not."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import soundly
from soundly import Box, Claim, Grid, Proved, Refuted, Unknown, pairwise, top_k, verify
from soundly.certificate import check
from soundly.errors import InvalidInput
from soundly.graph.network import Network
from soundly.spec.grid import Choice
from soundly.verification.input_split import InputSplit
from soundly.verification.problem import Problem, problem_of
from soundly.verification.proof import differences

F64 = torch.float64


def network(seed: int, n: int) -> tuple[Network, nn.Sequential]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh() if seed % 5 == 0 else nn.ReLU(),
                          nn.Linear(8, 3))  # fmt: skip
    return soundly.load(model, torch.zeros(n)), model.double().requires_grad_(False)


@cache
def instance(seed: int) -> tuple[Claim, Tensor, Tensor]:
    """A claim, true or false by little, over levels of two to five entries or joint choices of several; all points
    and how far each is from violating it. All numbers are float32's, so that witnesses are points of the grid."""
    torch.manual_seed(seed)
    n = int(torch.randint(2, 6, ()))
    net, model = network(seed, n)
    x, choices = torch.rand(n).double(), {}
    if seed % 3 == 2:
        half = n // 2
        for at in (torch.arange(half), torch.arange(half, n)):
            choices[tuple(at.tolist())] = torch.randn(int(torch.randint(2, 7, ())), len(at)).double()
        grid = Grid(Box(x, x), tuple(Choice(torch.tensor(at), table) for at, table in choices.items()))
    else:
        for i in range(max(0, n - 4), n):
            choices[i] = 0.8 * torch.randn(int(torch.randint(1, 6, ())))
        grid = Grid.of(x, choices)
    points = torch.cat(list(grid.points(batch=100)))
    assert len(points) == grid.size
    y = model(points)
    label = int(y[0].argmax())
    if seed % 2:
        other = (label + 1) % 3
        gaps = y[:, label] - y[:, other]
        room = 1e-3 if seed % 4 == 1 else -1e-3
        claim = pairwise(net, grid, label, other, margin=float(gaps.min()) - room)
        return claim, points, gaps - gaps.min() + room
    others = [j for j in range(3) if j != label]
    return top_k(net, grid, [label], 1), points, (y[:, [label]] - y[:, others]).amin(1)


@pytest.mark.parametrize("attack", [True, False])
def test_verdicts_equal_brute_force_on_fifty_grids(attack):
    found = Counter[str]()
    for seed in range(50):
        claim, points, gaps = instance(seed)
        verdict = verify(claim, attack=attack, timeout=60)
        match verdict:
            case Proved(certificate=proof):
                assert bool((gaps > 0).all()), seed
                assert check(proof).accepted and not differences(proof, problem_of(claim))
                if attack:
                    hull = Claim(claim.network, claim.region.box, claim.property)
                    found["proved on the grid alone"] += isinstance(verify(hull, timeout=0.3), Refuted)
            case Refuted(witness=x):
                assert bool((points == x).all(1).any()), seed
                assert float(gaps[(points == x).all(1)].min()) <= 1e-6
                found["refuted"] += 1
            case _:
                raise AssertionError((seed, verdict))
    assert found["refuted"] >= 10 and (found["proved on the grid alone"] >= 5 or not attack)


def test_levels_and_an_interval_at_once():
    net, model = network(1, 3)
    grid = Grid.of(Box(torch.zeros(3), torch.tensor([0.0, 0.5, 0.0])), {0: [-1.0, 1.0], 2: [0.0, 1.0]})
    assert grid.size == float("inf") and grid.freedom == 3
    x = torch.cat([grid.samples(2000), grid.corners(100)])
    least = float((model(x)[:, 0] - model(x)[:, 1]).min())
    proved = verify(pairwise(net, grid, 0, 1, margin=least - 0.01))
    assert isinstance(proved, Proved) and check(proved.certificate).accepted
    broken = verify(pairwise(net, grid, 0, 1, margin=least + 0.01))
    assert isinstance(broken, Refuted) and bool(grid.contains(broken.witness))


def test_many_choices_where_the_whole_box_is_provable_and_where_it_is_not():
    net, model = network(3, 20)
    x = torch.rand(20, dtype=F64)
    grid = Grid.of(x, {i: [0.0, 0.1 * float(x[i]), float(x[i])] for i in range(10)})
    assert grid.size == 3**10
    y = model(torch.cat(list(grid.points())))
    gaps = y[:, 0] - y[:, 1]
    for room, kind in ((1e-3, Proved), (-1e-3, Refuted)):
        verdict = verify(pairwise(net, grid, 0, 1, margin=float(gaps.min()) - room), timeout=60)
        assert isinstance(verdict, kind), verdict


def test_a_proof_over_a_grid_covers_float32_too():
    claim, _, gaps = instance(1)
    assert float(gaps.min()) > 0
    proved = verify(claim, arithmetic="float32")
    assert isinstance(proved, Proved) and check(proved.certificate).arithmetic.endswith("for the stored network")
    assert "float32" in check(proved.certificate).arithmetic


def test_certificates_say_that_they_are_about_a_grid():
    claim = instance(1)[0]
    proof = verify(claim).certificate
    assert "grid" in check(proof).claims[0].name
    whole = Claim(claim.network, claim.region.box, claim.property)
    assert "grid differs" in differences(proof, problem_of(whole))
    grid = claim.region
    fewer = Grid(grid.base, (Choice(grid.choices[0].entries, grid.choices[0].options[:-1]), *grid.choices[1:]))
    assert differences(proof, problem_of(Claim(claim.network, fewer, claim.property)))


def test_a_point_that_holds_by_nothing_is_unknown():
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    net = soundly.load(model, torch.zeros(2))
    grid = Grid.of(torch.zeros(2), {0: [-1.0, 0.5], 1: [-1.0, 0.5]})
    verdict = verify(pairwise(net, Grid.of(torch.zeros(2), {0: [0.5, 2.0], 1: [-1.0, 0.5]}), 0, 1), timeout=20)
    assert isinstance(verdict, Unknown) and "point of the grid" in verdict.reason
    assert isinstance(verify(pairwise(net, grid, 0, 1), timeout=20), Refuted)


def dropped(method):
    """The search forgets the greatest option of every choice."""

    def narrowed(self: Grid, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        less = tuple(Choice(c.entries, c.options[:-1] if len(c.options) > 1 else c.options) for c in self.choices)
        return method(Grid(self.base, less), lower, upper)

    return narrowed


def halved_past_a_level(self: InputSplit, parts, steep):
    """Splits as usual, but the right child begins above the next level."""
    children = original_halved(self, parts, steep)
    children.lower[1::2] += 0.4 * (children.upper[1::2] - children.lower[1::2])
    return children


original_halved = InputSplit._halved


@pytest.mark.parametrize("fault", ["levels dropped", "levels skipped", "a shifted grid"])
def test_a_search_that_loses_points_proves_nothing_false(fault, monkeypatch):
    false = [seed for seed in range(50) if bool((instance(seed)[2] <= 0).any())][:8]
    match fault:
        case "levels dropped":
            monkeypatch.setattr(Grid, "narrowed", dropped(Grid.narrowed))
        case "levels skipped":
            monkeypatch.setattr(InputSplit, "_halved", halved_past_a_level)
        case _:
            plain = Problem.narrowed
            monkeypatch.setattr(Problem, "narrowed", lambda self, a, b: plain(self, a + 0.1, b + 0.1))
    for seed in false:
        claim = instance(seed)[0]
        monkeypatch.setattr("soundly.verification.verify._Run._offer", lambda *_: None)  # nothing but proofs
        assert not isinstance(verify(claim, attack=False, timeout=0.2), Proved), (fault, seed)


def test_only_the_checker_stands_between_a_broken_search_and_a_falsehood(monkeypatch):
    """With the same fault in both, false claims are proved: so the test above can fail."""
    from soundly.certificate.grid import Grid as Checked

    plain = Checked.narrowed

    def less(self: Checked, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return plain(Checked(self.entries, tuple(o[:-1] if len(o) > 1 else o for o in self.options)), low, high)

    monkeypatch.setattr(Grid, "narrowed", dropped(Grid.narrowed))
    monkeypatch.setattr(Checked, "narrowed", less)
    monkeypatch.setattr("soundly.verification.verify._Run._offer", lambda *_: None)
    false = [seed for seed in range(50) if bool((instance(seed)[2] <= 0).any())][:12]
    assert any(isinstance(verify(instance(seed)[0], attack=False, timeout=0.2), Proved) for seed in false)


def test_grids_that_make_no_sense_are_refused():
    x = torch.zeros(2, 3)
    assert Grid.of(x, {1: torch.ones(4, 3)}).size == 1  # the same option four times
    for choices in ({2: [1.0]}, {(0, 0): 1.0}, {(0, 0): []}, {0: torch.zeros(4, 2)}, {(0, 0): [float("nan")]},
                    {(0, 0): [0.0], 0: torch.zeros(1, 3)}, {(0, 0): [float("inf")]}):  # fmt: skip
        with pytest.raises(InvalidInput):
            Grid.of(x, choices)
    with pytest.raises(InvalidInput, match="list"):
        next(Grid.of(Box(x, x + 1), {(0, 0): [0.0]}).points())
    with pytest.raises(InvalidInput, match="levels"):
        Grid.evenly(Box(x, x + 1), 1)


def test_what_grids_can_do_agrees_with_their_points():
    for seed in range(20):
        claim, points, _ = instance(seed)
        grid, rng = claim.region, torch.Generator().manual_seed(seed)
        assert bool(grid.contains(points).all()) and len(points.unique(dim=0)) == len(points)
        assert bool(grid.contains(grid.samples(20)).all()) and bool(grid.contains(grid.corners(20)).all())
        x = grid.box.samples(20) + 0.2
        near = grid.project(x)
        assert bool(grid.contains(near).all())
        assert torch.equal(grid.contains(x), (x[:, None] == points).all(-1).any(-1))
        for choice in grid.choices:  # the nearest option, choice by choice
            away = (x[:, None, choice.entries] - choice.options).abs().amax(-1).amin(-1)
            assert torch.equal((x - near)[:, choice.entries].abs().amax(-1), away)
        a = torch.randn(5, points.shape[1], dtype=F64, generator=rng)
        assert torch.allclose((grid.lowest(a) * a).sum(1), (a @ points.T).amin(1))
        low, high = (grid.box.samples(8, generator=rng) for _ in range(2))
        ends = torch.minimum(low, high), torch.maximum(low, high)
        narrow = grid.narrowed(*ends)
        for k in range(8):
            inside = points[((points >= ends[0][k]) & (points <= ends[1][k])).all(1)]
            if len(inside):
                assert bool(((inside >= narrow[0][k]) & (inside <= narrow[1][k])).all())
            else:
                assert bool((narrow[0][k] > narrow[1][k]).any())
    even = Grid.evenly(Box(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])), 5)
    assert np.allclose(sorted(float(p[0]) for p in torch.cat(list(even.points()))), [0, 0.25, 0.5, 0.75, 1])
