"""Sufficient reasons against the exact truth: mixed-integer programs for every set of features of small networks."""

import math
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

import soundly
from soundly import Box, Proved, Refuted
from soundly.errors import InvalidInput
from soundly.explanation import reason as module
from soundly.explanation.question import Question, question, top_mask
from soundly.explanation.reason import Screen, certify_mask, explain

F64 = torch.float64
FEATURES = 6
SEEDS = (0, 3, 7)
EPS = 3.0  # some sets of features are sufficient, some are not
SUBSETS = list(product([False, True], repeat=FEATURES))


def model_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()


@cache
def problem(seed: int) -> tuple[soundly.Network, Tensor, float]:
    x = torch.rand(1, FEATURES, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return soundly.load(model_of(seed), x), x, EPS


@cache
def worst(seed: int, kept: tuple[bool, ...], eps: float) -> float:
    """The least margin of the prediction over the box where features that are not kept move: exact, by a MILP."""
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in model_of(seed) if isinstance(m, nn.Linear)]
    x = torch.rand(1, FEATURES, dtype=F64, generator=torch.Generator().manual_seed(seed))[0].numpy()
    low = np.where(kept, x, x - eps)
    high = np.where(kept, x, x + eps)
    y = model_of(seed)(torch.tensor(x)).detach().numpy()
    label = int(y.argmax())
    sizes = [FEATURES, *(len(b) for _, b in layers[:-1])]
    # Variables: inputs, then z >= 0 of every hidden layer, then its on/off switches.
    at = np.cumsum([0, FEATURES, 5, 4, 5, 4])
    n = at[-1]
    rows, lows, highs = [], [], []
    ends_low, ends_high = low, high
    for k, (w, b) in enumerate(layers[:-1]):
        pre_low = np.minimum(w * ends_low, w * ends_high).sum(1) + b
        pre_high = np.maximum(w * ends_low, w * ends_high).sum(1) + b
        for i in range(sizes[k + 1]):
            before, z, s = slice(at[k], at[k + 1]), at[k + 1] + i, at[3 + k] + i
            big = max(abs(pre_low[i]), abs(pre_high[i])) + 1
            row = np.zeros(n)
            row[before], row[z] = -w[i], 1.0
            rows.append(row.copy())
            lows.append(b[i])
            highs.append(math.inf)
            row[s] = big
            rows.append(row)
            lows.append(-math.inf)
            highs.append(b[i] + big)
            row = np.zeros(n)
            row[z], row[s] = 1.0, -big
            rows.append(row)
            lows.append(-math.inf)
            highs.append(0.0)
        ends_low, ends_high = np.maximum(pre_low, 0), np.maximum(pre_high, 0)
    bounds = Bounds(
        np.concatenate([low, np.zeros(9), np.zeros(9)]), np.concatenate([high, np.full(9, np.inf), np.ones(9)])
    )
    integer = np.concatenate([np.zeros(FEATURES + 9), np.ones(9)])
    w, b = layers[-1]
    best = math.inf
    for j in range(3):
        if j == label:
            continue
        objective = np.zeros(n)
        objective[at[2] : at[3]] = w[label] - w[j]
        found = milp(objective, constraints=LinearConstraint(np.array(rows), lows, highs), integrality=integer,
                     bounds=bounds)  # fmt: skip
        assert found.status == 0
        best = min(best, float(found.fun) + b[label] - b[j])
    return best


def sufficient(seed: int, kept: Tensor, eps: float) -> bool:
    return worst(seed, tuple(kept.tolist()), eps) > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_every_mask_gets_the_verdict_that_is_true(seed):
    network, x, eps = problem(seed)
    counts = {Proved: 0, Refuted: 0}
    for kept in SUBSETS:
        margin = worst(seed, kept, eps)
        verdict = certify_mask(network, x, torch.tensor(kept), eps=eps, clip=None)
        if abs(margin) > 1e-6:
            assert isinstance(verdict, Proved if margin > 0 else Refuted)
            counts[type(verdict)] += 1
        if isinstance(verdict, Refuted):
            held = torch.tensor(kept)
            assert torch.equal(verdict.witness[0][held], x[0][held])
            assert bool(((verdict.witness - x).abs() <= eps + 1e-12).all())
            assert int(network(verdict.witness).argmax()) != int(network(x).argmax())
    assert min(counts.values()) > 3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reason_by_bounds_is_sufficient_and_no_single_feature_more_is_proved(seed):
    network, x, eps = problem(seed)
    found = explain(network, x, eps=eps, clip=None)
    assert isinstance(found.verdict, Proved) and found.minimal and found.verifier == "linear bounds"
    assert sufficient(seed, found.kept, eps)
    assert torch.equal(found.mask[0], found.kept) and found.size == int(found.kept.sum())
    assert soundly.check(found.verdict.certificate).accepted


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reason_by_search_is_minimal_in_truth(seed):
    network, x, eps = problem(seed)
    found = explain(network, x, eps=eps, clip=None, search=math.inf)
    assert isinstance(found.verdict, Proved) and found.minimal and sufficient(seed, found.kept, eps)
    for i in found.kept.nonzero().flatten().tolist():
        smaller = found.kept.clone()
        smaller[i] = False
        assert not sufficient(seed, smaller, eps)
        assert bool(found.necessary[i])
        witness = found.witnesses[i]
        assert torch.equal(witness[0][smaller], x[0][smaller])
        assert int(network(witness).argmax()) != int(network(x).argmax())
    assert int(found.necessary.sum()) == found.size


@pytest.mark.parametrize("seed", SEEDS)
def test_repairing_a_mask_keeps_it_and_adds_no_feature_in_vain(seed):
    network, x, eps = problem(seed)
    for mask in SUBSETS[::5]:
        held = torch.tensor(mask)
        found = explain(network, x, eps=eps, clip=None, keep=held, search=math.inf)
        assert isinstance(found.verdict, Proved) and found.minimal and sufficient(seed, found.kept, eps)
        assert bool(found.kept[held].all())
        if worst(seed, mask, eps) > 1e-6:
            assert torch.equal(found.kept, held)
        for i in (found.kept & ~held).nonzero().flatten().tolist():
            smaller = found.kept.clone()
            smaller[i] = False
            assert not sufficient(seed, smaller, eps)


# -- planted faults: the checks above must catch them


def wrong(seed: int) -> bool:
    """Whether the reason of a network is called proved and is not sufficient in truth."""
    network, x, eps = problem(seed)
    found = explain(network, x, eps=eps, clip=None)
    return isinstance(found.verdict, Proved) and not sufficient(seed, found.kept, eps)


def test_a_freed_feature_that_stays_out_of_the_box_is_caught(monkeypatch):
    right = Question.freed

    def forgetful(self, kept):
        more = kept.clone()
        more[int((~kept).int().argmax())] = True
        return right(self, more)

    monkeypatch.setattr(Question, "freed", forgetful)
    bounds = Screen.bounds
    monkeypatch.setattr(Screen, "bounds", lambda self, free: bounds(self, free) + (free.sum(1) < 4) * 100.0)
    assert any(map(wrong, SEEDS))


def test_a_mask_that_is_inverted_is_caught(monkeypatch):
    right = Question.freed
    monkeypatch.setattr(Question, "freed", lambda self, kept: right(self, ~kept))
    network, x, eps = problem(0)
    verdicts = [certify_mask(network, x, torch.tensor(kept), eps=eps, clip=None) for kept in SUBSETS]
    truth = [worst(0, kept, eps) > 0 for kept in SUBSETS]
    assert any(isinstance(v, Proved) and not t for v, t in zip(verdicts, truth, strict=True))


@pytest.mark.parametrize("lie", [100.0, -100.0, math.nan, math.inf])
def test_bounds_that_lie_change_no_verdict(lie, monkeypatch):
    """The search may believe them; what is called proved was proved again."""
    monkeypatch.setattr(Screen, "bounds", lambda self, free: torch.full((len(free),), lie, dtype=F64))
    for seed in SEEDS:
        assert not wrong(seed)
        network, x, eps = problem(seed)
        assert isinstance(explain(network, x, eps=eps, clip=None).verdict, Proved)


def test_the_bound_of_another_set_changes_no_verdict(monkeypatch):
    right = Screen.bounds
    monkeypatch.setattr(Screen, "bounds", lambda self, free: right(self, free).roll(1))
    assert not any(map(wrong, SEEDS))


# -- networks of other kinds, and what may be asked


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.Sigmoid])
def test_reasons_of_smooth_networks_hold_at_samples(activation):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 12), activation(), nn.Linear(12, 4)).double()
    x = torch.rand(1, 8, dtype=F64)
    found = explain(soundly.load(model, x), x, eps=0.3)
    assert isinstance(found.verdict, Proved) and found.minimal
    z = found.claim.region.samples(2000).reshape(-1, 8)
    z = torch.cat([z, found.claim.region.corners(2000).reshape(-1, 8)])
    assert torch.equal(z[:, found.kept], x.expand(len(z), -1)[:, found.kept])
    assert bool((model(z).argmax(1) == model(x).argmax()).all())


def test_features_may_be_groups_and_masks_anything_that_fits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    x = torch.rand(1, 3, 6, 6, dtype=F64)
    network = soundly.load(model, x)
    pixels = torch.arange(36).reshape(6, 6)
    found = explain(network, x, eps=0.02, groups=pixels)
    assert isinstance(found.verdict, Proved) and found.kept.shape == (36,) and found.mask.shape == (1, 3, 6, 6)
    assert bool((found.mask == found.mask[:, :1]).all())
    blocks = (torch.arange(6)[:, None] // 3 * 2 + torch.arange(6) // 3).numpy()
    same = [
        certify_mask(network, x, found.kept, eps=0.02, groups=pixels),
        certify_mask(network, x, found.kept.reshape(6, 6).numpy(), eps=0.02, groups=pixels),
        certify_mask(network, x, found.mask, eps=0.02),
        certify_mask(network, x, found.mask.int().tolist(), eps=0.02, groups=pixels),
    ]
    assert all(isinstance(v, Proved) for v in same)
    assert isinstance(certify_mask(network, x, np.ones(4), eps=0.3, groups=blocks), Proved)
    with pytest.raises(InvalidInput, match="in parts"):
        certify_mask(network, x, pixels % 2 == 0, eps=0.02, groups=blocks)


def test_a_claim_may_be_asked_about_instead_of_a_prediction():
    network, x, _ = problem(0)
    box = Box(x - 0.5, x + 0.5)
    slope = network.gradient(of=0)
    lower = float(slope(x)[0, 2]) - 0.2
    claim = soundly.within(slope.with_outputs(slope.entry(2)), box, lower, None)
    found = explain(claim, x, search=math.inf)
    assert isinstance(found.verdict, Proved)
    z = found.claim.region.samples(500)
    assert min(float(slope(v)[0, 2]) for v in z) >= lower


def test_where_everything_may_be_free_the_reason_is_empty_and_where_x_fails_there_is_none():
    network, x, _ = problem(3)
    found = explain(network, x, eps=1e-4)
    assert found.size == 0 and isinstance(found.verdict, Proved) and found.minimal
    other = (int(network(x).argmax()) + 1) % 3
    found = explain(network, x, eps=0.1, target=other)
    assert isinstance(found.verdict, Refuted) and found.size == FEATURES and not found.minimal


def test_a_search_that_is_out_of_time_still_proves_what_it_has():
    network, x, eps = problem(7)
    found = explain(network, x, eps=eps, clip=None, timeout=1e-6)
    assert isinstance(found.verdict, Proved) and not found.minimal and sufficient(7, found.kept, eps)


def test_the_largest_scores_are_a_mask():
    scores = torch.tensor([[0.1, -3.0, 2.0], [2.0, 0.0, 1.0]])
    assert top_mask(scores, 2).tolist() == [[False, False, True], [True, False, False]]
    assert torch.equal(top_mask(scores.abs().numpy(), 1 / 3), torch.tensor([[False, True, True], [False] * 3]))
    assert int(top_mask(scores, 0).sum()) == 0 and int(top_mask(scores, 1.0).sum()) == 6


def test_requests_that_do_not_fit_are_refused():
    network, x, _ = problem(0)
    box = Box(x - 1, x + 1)
    requests = [
        (lambda: explain(network, x), "either eps"),
        (lambda: explain(network, x, eps=0.1, box=box), "either eps"),
        (lambda: explain(network, x, box=Box(x + 1, x + 2)), "inside"),
        (lambda: explain(network, x[:, :3], eps=0.1, clip=None), "shape"),
        (lambda: explain(network, x, eps=0.1, groups=torch.arange(FEATURES) * 2), "every number"),
        (lambda: explain(network, x, eps=0.1, groups=torch.rand(FEATURES)), "whole"),
        (lambda: explain(network, x, eps=0.1, groups=torch.arange(4)), "broadcast"),
        (lambda: explain(network, x, eps=0.1, search=math.nan), "seconds"),
        (lambda: explain(soundly.robust(network, x, eps=0.1), x, eps=0.1), "own region"),
        (lambda: explain(soundly.robust(network, x, eps=0.1, norm="l2"), x), "linf"),
        (lambda: certify_mask(network, x, torch.rand(FEATURES), eps=0.1), "top_mask"),
        (lambda: certify_mask(network, x, torch.ones(5), eps=0.1), "shape"),
        (lambda: top_mask(torch.tensor([math.nan]), 1), "NaN"),
        (lambda: top_mask(torch.rand(3), 4), "keep"),
    ]
    for request, word in requests:
        with pytest.raises(InvalidInput, match=word):
            request()


def test_what_is_free_in_the_box_is_what_the_mask_does_not_keep():
    network, x, _ = problem(0)
    about = question(network, x, eps=0.25, clip=None)
    kept = torch.tensor([True, False, True, False, False, True])
    box = about.freed(kept).region.box
    assert torch.equal(box.lower[0][kept], x[0][kept]) and torch.equal(box.upper[0][kept], x[0][kept])
    assert bool((box.lower[0][~kept] <= x[0][~kept] - 0.25).all() and (box.upper[0][~kept] >= x[0][~kept] + 0.25).all())
    moved = x.clone()
    moved[0, 3] += 1e-9
    assert about.support(moved).tolist() == [False, False, False, True, False, False]
    assert module.Reason.__dataclass_params__.frozen
