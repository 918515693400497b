"""Claims about balls in l1 and l2: verdicts against all linear regions of small networks, witnesses, certificates."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import soundly
from soundly import Ball, Box, Proved, Refuted, Unknown, verify, within
from soundly.certificate import Certificate, check
from soundly.graph.network import Network
from soundly.verification.problem import Problem, problem_of
from soundly.verification.proof import differences, identity

F64 = torch.float64


def network(seed: int, n: int, hidden: tuple[int, ...]) -> tuple[Network, nn.Sequential]:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in zip((n, *hidden[:-1]), hidden, strict=True):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(hidden[-1], 1)).double()
    return soundly.load(model, (torch.zeros(1, n, dtype=F64),)), model


def least(model: nn.Sequential, ball: Ball, sign: float) -> float:
    """The least value of sign times the network on a ball and its clip, by enumeration of all patterns of ReLUs. Each
    is a linear program; the round ball is cut out by its tangent planes until nothing sticks out."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    c, r = (v.reshape(-1).numpy() for v in (ball.centre, torch.as_tensor(ball.radius).expand(ball.shape)))
    box = np.stack([ball.box.lower.reshape(-1).numpy(), ball.box.upper.reshape(-1).numpy()], 1)
    sizes, found, n = [m.out_features for m in layers[:-1]], np.inf, len(c)
    ends = np.array([s for s in product((-1, 1), repeat=n)]) / r if ball.norm == "l1" else np.zeros((0, n))
    for pattern in product((0.0, 1.0), repeat=sum(sizes)):
        w, b, rows, limits, at = np.eye(n), np.zeros(n), [], [], 0
        for m in layers[:-1]:
            w, b = m.weight.detach().numpy() @ w, m.weight.detach().numpy() @ b + m.bias.detach().numpy()
            on = np.array(pattern[at : at + len(b)])
            at += len(b)
            rows.append(-(2 * on - 1)[:, None] * w)
            limits.append((2 * on - 1) * b)
            w, b = on[:, None] * w, on * b
        cost = sign * (layers[-1].weight.detach().numpy() @ w)[0]
        offset = sign * float((layers[-1].weight.detach().numpy() @ b + layers[-1].bias.detach().numpy())[0])
        a, e = np.concatenate([*rows, ends]), np.concatenate([*limits, 1 + ends @ c])
        for _ in range(100):
            result = linprog(cost, A_ub=a, b_ub=e, bounds=box)
            if result.status != 0 or ball.norm == "l1" or result.fun + offset >= found:
                break
            y = (result.x - c) / r
            size = np.linalg.norm(y)
            if size <= 1 + 1e-6:
                break
            a, e = np.r_[a, (y / size / r)[None]], np.r_[e, 1 + (y / size / r) @ c]
        if result.status == 0:
            found = min(found, result.fun + offset)
    return found


def regions(seed: int, n: int) -> list[Ball]:
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(1, n, dtype=F64, generator=g) - 0.5
    some = 0.3 + torch.rand(1, n, dtype=F64, generator=g)
    clip = Box(centre - 0.4, centre + 0.25)
    beside = Box(centre + 0.05, centre + 0.9)
    return [
        Ball(centre, 0.8, "l2"), Ball(centre, some, "l1", clip), Ball(centre, 0.8, "l1"),
        Ball(centre, some, "l2", clip), Ball(centre, 0.7, "l2", beside), Ball(centre, 0.7, "l1", beside),
    ][:: 1 if n == 2 else 2]  # fmt: skip


@pytest.mark.parametrize(("n", "hidden"), [(2, (4,)), (3, (2, 2)), (5, (3,))])
def test_verdicts_against_all_linear_regions(n, hidden):
    """A claim that holds by 0.5 % of what the network can do is proved, one that fails by as much is refuted."""
    net, model = network(n + 10, n, hidden)
    for ball in regions(n, n):
        low, high = least(model, ball, 1.0), -least(model, ball, -1.0)
        room = 0.005 * (high - low)
        assert room > 0
        inside = verify(within(net, ball, low - room, high + room), timeout=60)
        assert isinstance(inside, Proved), (ball.norm, inside)
        assert check(inside.certificate).accepted
        assert inside.certificate.header["ball"] == ball.norm
        for ends in ((low + room, None), (None, high - room)):
            broken = verify(within(net, ball, *ends), timeout=60)
            assert isinstance(broken, Refuted), (ball.norm, ends, broken)
            assert bool(ball.contains(broken.witness))


def test_the_box_around_a_ball_is_far_larger():
    """A linear network, exactly: the dual norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 1, bias=False)).double()
    net = soundly.load(model, (torch.zeros(1, 50, dtype=F64),))
    w = model[0].weight[0].detach()
    for norm, dual in (("l2", w.norm()), ("l1", w.abs().max())):
        ball = Ball(torch.zeros(1, 50), 2.0, norm)
        bound = 2 * float(dual)
        assert isinstance(verify(within(net, ball, -bound * (1 + 1e-9), None)), Proved)
        assert isinstance(verify(within(net, ball, -bound * (1 - 1e-3), None), timeout=20), Refuted)
        assert isinstance(verify(within(net, ball.box, -bound * 1.1, None), timeout=20), Refuted)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_an_image(norm):
    """Convolutions, whose neurons see parts of the ball only."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(48, 2),
    )  # fmt: skip
    net = soundly.load(model, (torch.zeros(1, 1, 9, 9),))
    x = torch.rand(1, 1, 9, 9)
    ball = Ball(x, 0.4 if norm == "l2" else 1.0, norm, Box(torch.zeros_like(x), torch.ones_like(x)))
    values = torch.cat([model(p).detach() for p in ball.samples(300).float()]).double()
    least, greatest = values.amin(0) - 0.3, values.amax(0) + 0.3
    verdict = verify(within(net, ball, least, greatest), timeout=60)
    assert isinstance(verdict, Proved)
    assert not isinstance(verify(within(net, ball.box, least, greatest), timeout=3), Proved)


def test_certificates_of_another_ball():
    net, _ = network(2, 2, (4,))
    ball = regions(2, 2)[0]
    claim = within(net, ball, -50.0, 50.0)
    proof = verify(claim).certificate
    problem = problem_of(claim)
    assert differences(proof, problem) == []
    other = problem_of(within(net, Ball(ball.centre, 0.81, "l2"), -50.0, 50.0))
    assert any("ball_radius" in d for d in differences(proof, other))
    assert any("ball" in d for d in differences(proof, problem_of(within(net, ball.box, -50.0, 50.0))))
    header = {k: v for k, v in proof.header.items() if k != "ball"}
    bare = Certificate(header, {k: v for k, v in proof.arrays.items() if not k.startswith("ball_")})
    assert any("ball" in d for d in differences(bare, problem))
    one, two = identity(problem), identity(problem_of(within(net, Ball(ball.centre, 0.8, "l1"), -50.0, 50.0)))
    assert not np.array_equal(one["header"], two["header"])


@pytest.mark.parametrize("fault", ["radius", "centre"])
def test_a_search_in_another_ball_proves_nothing_false(monkeypatch, fault):
    """What is searched is wrong; what is asked of the checker is not."""
    net, model = network(2, 2, (4,))
    ball = regions(2, 2)[0]
    low = least(model, ball, 1.0)
    claim = within(net, ball, low + 0.01, None)

    def believed(self: Problem, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        assert self.ball is not None
        scale, shift = (0.5, 0.0) if fault == "radius" else (1.0, 0.5)
        some = type(self.ball)(self.ball.centre + shift, scale * self.ball.radius, self.ball.norm)
        return some.narrowed(lower, upper)

    monkeypatch.setattr(Problem, "narrowed", believed)
    verdict = verify(claim, timeout=3, attack=False)
    assert isinstance(verdict, (Unknown, Refuted))
