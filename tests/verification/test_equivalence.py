"""Gaps of quantised and of edited networks: above every sample, proved, and about as small as they can be."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

import soundly
from soundly.auditing.quantisation import quantise
from soundly.errors import InvalidInput
from soundly.verification import equivalence as module

Proved, Refuted = soundly.Proved, soundly.Refuted


def trained() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.rand(200, 8)
    label = (x[:, :4].sum(1) > x[:, 4:].sum(1)).long() + (x[:, 0] > 0.8).long()
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), label).backward()
        optimiser.step()
    return model, x


@pytest.fixture(scope="module")
def setting():
    model, x = trained()
    net = soundly.load(model, x[:1])
    return net, x, soundly.Box(x[:1] - 0.1, x[:1] + 0.1)


def sampled(net, other, box) -> float:
    points = torch.cat([box.samples(2000), box.corners(1000)])
    a, b = (torch.vmap(v.to(torch.float64))(points) for v in (net, other))
    return float((a - b).abs().max())


def test_a_proved_gap_is_above_every_sample_and_halves_with_each_bit(setting):
    net, _, box = setting
    uppers = []
    for bits in (4, 6, 8, 10):
        other = quantise(net, bits)
        found = soundly.gap(net, other, box)
        assert isinstance(found.verdict, Proved) and soundly.check(found.verdict.certificate).accepted
        assert 0 < sampled(net, other, box) <= found.upper and found.reached <= found.upper
        assert bool(box.contains(found.worst)) and found.upper < 3 * found.reached
        uppers.append(found.upper)
    # Two bits, a factor of four; up to how the single weights happen to fall.
    assert all(2 < a / b < 8 for a, b in pairwise(uppers))
    assert uppers[0] / uppers[-1] == pytest.approx(64, rel=0.6)


def test_searches_lower_a_gap(setting):
    net, x, _ = setting
    box, other = soundly.Box(x[:1] - 0.05, x[:1] + 0.05), quantise(net, 6)
    plain, closer = (soundly.gap(net, other, box, tighten=t) for t in (0.0, 5.0))
    assert isinstance(closer.verdict, Proved)
    assert sampled(net, other, box) <= closer.upper <= plain.upper and closer.reached >= plain.reached


@pytest.mark.parametrize("share, answer", [(1.0, Proved), (0.9, Refuted)])
def test_equal_is_proved_above_what_is_reached_and_refuted_below(setting, share, answer):
    net, _, box = setting
    other = quantise(net, 6)
    found = soundly.gap(net, other, box)
    limit = found.upper if share == 1 else share * found.reached
    verdict = soundly.verify(soundly.equal(net, other, box, within=limit), timeout=60)
    assert isinstance(verdict, answer)
    if isinstance(verdict, Refuted):
        a, b = (v.to(torch.float64)(verdict.witness.double()) for v in (net, other))
        assert float((a - b).abs().max()) > limit


def test_bounds_that_are_too_small_are_not_called_proved(setting, monkeypatch):
    """A planted fault."""
    right = module.root

    def wrong(problem, **sums):
        found = right(problem, **sums)
        return replace(found, bound=0.5 * found.bound)

    monkeypatch.setattr(module, "root", wrong)
    net, _, box = setting
    assert not isinstance(soundly.gap(net, quantise(net, 6), box, timeout=20).verdict, Proved)


def test_decisions_agree_wherever_the_lead_exceeds_twice_the_gap(setting):
    """On a region that a border between classes crosses."""
    net, x, _ = setting
    other = quantise(net, 5)
    border = next(
        (p + q)[None] / 2 for p in x for q in x if int(net(p[None]).argmax()) != int(net(q[None]).argmax())
        and float((p - q).abs().max()) < 0.5
    )  # fmt: skip
    box = soundly.Box(border - 0.3, border + 0.3)
    limit = soundly.gap(net, other, box).upper
    assert isinstance(soundly.verify(soundly.same_argmax(net, other, box, margin=2.001 * limit), timeout=60), Proved)
    verdict = soundly.verify(soundly.same_argmax(net, other, box), timeout=60)
    assert isinstance(verdict, Refuted)
    a, b = (v.to(torch.float64)(verdict.witness.double())[0] for v in (net, other))
    assert int(a.argmax()) != int(b.argmax())


def test_decisions_agree_on_a_ball_within_one_class(setting):
    net, x, _ = setting
    ball = soundly.Ball(x[:1], 0.02)
    assert isinstance(soundly.verify(soundly.same_argmax(net, quantise(net, 8), ball), timeout=60), Proved)


def test_the_gap_of_an_edit(setting):
    net, x, box = setting
    edit = soundly.edit(net, [soundly.at(x[:1]).output(of=0).at_least(float(net(x[:1])[0, 0]) + 0.1)], layer="4")
    found = soundly.gap(net, edit.model, box)
    assert (
        isinstance(found.verdict, Proved) and 0.1 <= found.upper + 1e-6 and sampled(net, edit.model, box) <= found.upper
    )


def test_arguments_that_make_no_sense(setting):
    net, _, box = setting
    for call, text in (
        (lambda: soundly.equal(net, net, box, within=-1.0), "within"),
        (lambda: soundly.equal(net, net, box, within=float("nan")), "within"),
        (lambda: soundly.same_argmax(net, net, box, margin=-1.0), "margin"),
    ):
        with pytest.raises(InvalidInput, match=text):
            call()
