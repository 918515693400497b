"""A mixture keeps its answer where the robust network's margins say so: against hand-made probabilities and attacks."""

import math

import pytest
import torch
from torch import nn

import soundly
from soundly.auditing import mixing as module
from soundly.auditing.mixing import least_margin, mixed, mixed_claim, suffices
from soundly.errors import InvalidInput
from soundly.training.attack import ascend

SHARES = (0.55, 0.7, 0.84, 0.95, 1.0)


def worst_mixture(scores: torch.Tensor, a: float) -> float:
    """The mixture's margin for class 0 against the worst g: all its probability on the strongest other class."""
    p = torch.softmax(scores.double(), 0)
    return float((a * (p[0] - p[1:]) - (1 - a)).min())


@pytest.mark.parametrize("a", SHARES)
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_least_margin_is_where_the_worst_mixture_ties(a, classes):
    t = least_margin(a, classes)
    m = (1 - a) / a
    assert t == pytest.approx(math.log((1 + (classes - 1) * m) / (1 - m)), rel=1e-12, abs=1e-20)
    for factor, keeps in ((1 + 1e-9, True), (1 - 1e-9, False)):
        margins = [factor * t] * (classes - 1)
        if t > 1e-20:
            assert suffices(margins, a) == keeps
            assert (
                worst_mixture(torch.tensor([factor * t, *[0.0] * (classes - 1)], dtype=torch.float64), a) > 0
            ) == keeps


def test_margins_suffice_as_the_formula_says():
    generator = torch.Generator().manual_seed(0)
    agreed = set()
    for _ in range(300):
        scores = 3 * torch.rand(5, generator=generator, dtype=torch.float64)
        margins = (scores.max() - scores.sort(descending=True).values[1:]).tolist()
        a = 0.5 + 0.5 * float(torch.rand(1, generator=generator))
        value = worst_mixture(scores.sort(descending=True).values, a)
        if abs(value) > 1e-9:
            assert suffices(margins, a) == (value > 0)
            agreed.add(value > 0)
    assert agreed == {True, False}


def test_larger_margins_never_suffice_less():
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        margins = (4 * torch.rand(4, generator=generator)).tolist()
        more = [t + float(torch.rand(1, generator=generator)) for t in margins]
        assert suffices(more, 0.8) or not suffices(margins, 0.8)


def test_what_is_not_known_does_not_suffice():
    for margins in ([], [math.nan, 9.0], [math.inf, 9.0], [-1e-9, 9.0], [-math.inf]):
        assert not suffices(margins, 1.0)
    assert not suffices([1e9] * 3, 0.5) and least_margin(0.5, 10) == math.inf


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    wild = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    calm = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        wild[0].weight *= 20
        wild[2].weight *= 20
        calm[2].weight *= 8
    return wild, calm


def test_the_mixture_is_the_mixture():
    g, h = nets()
    x = torch.rand(1, 4)
    share = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    for a in (0.7, share):
        net = a if isinstance(a, float) else soundly.load(a, x)
        f = mixed(soundly.load(g, x), soundly.load(h, x), net, scale_g=1.5, scale_h=0.5)
        for z in torch.rand(20, 1, 4):
            part = a if isinstance(a, float) else a(z)
            p = (1 - part) * torch.softmax(1.5 * g(z), 1) + part * torch.softmax(0.5 * h(z), 1)
            assert torch.allclose(f(z), p.log(), atol=1e-4)


def certified(h, points, a, eps) -> list[torch.Tensor]:
    claims = [(x, mixed_claim(h, x[None], eps=eps, a=a)) for x in points]
    return [x for x, claim in claims if isinstance(soundly.verify(claim, timeout=20), soundly.Proved)]


def broken(g, h, points, a, eps) -> int:
    """At how many points an attack on the mixture changes what h answers there."""
    f = torch.vmap(mixed(g, h, a))
    count = 0
    for x in points:
        y = int(h(x[None]).argmax())
        lower, upper = ((x + s * eps).clamp(0, 1).expand(20, 1, -1) for s in (-1, 1))

        def loss(z, y=y):
            scores = f(z)[:, 0]
            return scores.index_fill(1, torch.tensor([y]), -math.inf).amax(1) - scores[:, y]

        found = ascend(loss, lower, upper, steps=20, generator=torch.Generator().manual_seed(0))
        count += bool((f(found)[:, 0].argmax(1) != y).any())
    return count


@pytest.mark.parametrize("a", (0.7, 0.95))
def test_no_attack_succeeds_where_a_mixture_is_certified(a):
    g, h = (soundly.load(net, torch.zeros(1, 4)) for net in nets())
    points = torch.rand(16, 4, generator=torch.Generator().manual_seed(2))
    kept = certified(h, points, a, 0.03)
    assert kept and broken(g, h, kept, a, 0.03) == 0


def test_a_wrong_formula_is_caught_by_the_attack(monkeypatch):
    """Margins above 0 alone, as if the robust network decided by itself."""
    monkeypatch.setattr(module, "suffices", lambda margins, a: min(margins) > 0)
    g, h = (soundly.load(net, torch.zeros(1, 4)) for net in nets())
    points = torch.rand(40, 4, generator=torch.Generator().manual_seed(2))[20:36]
    monkeypatch.setattr(module, "least_margin", lambda a, classes: 0.0)
    kept = certified(h, points, 0.6, 0.03)
    assert broken(g, h, kept, 0.6, 0.03) > 0


def test_a_larger_share_certifies_no_less_and_half_nothing():
    h = soundly.load(nets()[1], torch.zeros(1, 4))
    points = torch.rand(10, 4, generator=torch.Generator().manual_seed(3))
    counts = [len(certified(h, points, a, 0.03)) for a in (0.6, 0.8, 1.0)]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    with pytest.raises(InvalidInput, match="above 1/2"):
        mixed_claim(h, points[:1], eps=0.1, a=0.5)
