"""Contrastive explanations: what changes is what the mask says, the answer changes, and no smaller part does it."""

import torch
from tests.explanation.test_reason import FEATURES, SEEDS, problem, sufficient
from torch import nn

import soundly
from soundly import Proved, Refuted


def test_a_contrast_changes_the_answer_by_the_features_it_names():
    for seed in SEEDS:
        network, x, eps = problem(seed)
        found = soundly.contrast(network, x, eps=eps, clip=None)
        assert isinstance(found.verdict, Refuted) and 0 < found.size < FEATURES
        assert torch.equal(found.witness[0] != x[0], found.changed) and torch.equal(found.mask[0], found.changed)
        assert bool(((found.witness - x).abs() <= eps + 1e-12).all())
        assert found.label == int(network(found.witness).argmax()) != int(network(x).argmax())
        assert not sufficient(seed, ~found.changed, eps)


def test_no_feature_of_a_contrast_is_there_in_vain():
    """In truth: with one of them fixed as well, the answer stays."""
    smallest = []
    for seed in SEEDS:
        network, x, eps = problem(seed)
        found = soundly.contrast(network, x, eps=eps, clip=None)
        kept = ~found.changed
        for i in found.changed.nonzero().flatten().tolist():
            more = kept.clone()
            more[i] = True
            smallest.append(sufficient(seed, more, eps))
    assert sum(smallest) >= 0.8 * len(smallest)  # an attack may miss a counterexample


def test_a_contrast_meets_every_sufficient_reason():
    for seed in SEEDS:
        network, x, eps = problem(seed)
        found = soundly.contrast(network, x, eps=eps, clip=None)
        for search in (0.0, 5.0):
            reason = soundly.explain(network, x, eps=eps, clip=None, search=search)
            assert isinstance(reason.verdict, Proved) and bool((reason.kept & found.changed).any())


def test_where_nothing_changes_the_answer_there_is_no_contrast():
    network, x, _ = problem(0)
    found = soundly.contrast(network, x, eps=1e-4, clip=None)
    assert isinstance(found.verdict, Proved) and found.size == 0 and torch.equal(found.witness, x)


def test_groups_change_together():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    x = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    network = soundly.load(model, x)
    found = soundly.contrast(network, x, eps=0.5, groups=torch.arange(36).reshape(6, 6))
    assert isinstance(found.verdict, Refuted) and found.changed.shape == (36,)
    assert bool((found.mask == found.mask[:, :1]).all())
    assert int(network(found.witness).argmax()) != int(network(x).argmax())
