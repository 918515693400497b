"""Contrastive explanations: what changes is what the mask says, the answer changes, and no smaller part does it."""

import pytest
import torch
from tests.explanation.test_reason import FEATURES, SEEDS, problem, sufficient, worst
from torch import nn

import soundly
from soundly import Proved, Refuted, Unknown
from soundly.errors import InvalidInput
from soundly.explanation import contrast as module
from soundly.verification.verdict import Effort


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


# ---------------------------------------------------------------- the shortest change


def true(seed: int, found: module.Radius) -> bool:
    """Whether the exact radius lies where it must."""
    nothing = (False,) * FEATURES
    return worst(seed, nothing, 0.999 * found.proved) > 0 > worst(seed, nothing, 1.001 * found.found)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_true_radius_lies_between_what_is_proved_and_what_is_found(seed):
    network, x, _ = problem(seed)
    found = soundly.radius(network, x, clip=None, within=3.0, timeout=30)
    assert true(seed, found) and found.found <= 1.05 * found.proved
    assert found.found == float((found.witness - x).abs().max())
    assert found.label == int(network(found.witness).argmax()) != int(network(x).argmax())
    assert soundly.check(found.verdict.certificate).accepted
    assert float(found.claim.region.radius) == found.proved


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", float("inf"))])
def test_the_radius_of_a_linear_network_is_its_margin_by_the_dual_norm_of_its_slope(norm, dual):
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x = torch.rand(1, 4, dtype=torch.float64)
    y, w = model(x).detach()[0], model.weight.detach()
    true = float((y[0] - y[1]).abs() / torch.linalg.vector_norm(w[0] - w[1], dual))
    found = soundly.radius(soundly.load(model, x), x, norm=norm, clip=None, within=9.0, ratio=1.01)
    assert found.proved <= true * (1 + 1e-9) and found.found >= true * (1 - 1e-9)
    assert found.found <= 1.01 * found.proved


def test_where_no_input_is_another_answer_all_of_the_radius_is_proved():
    network, x, _ = problem(0)
    found = soundly.radius(network, x, clip=None, within=1e-3)
    assert found.proved == 1e-3 and found.witness is found.label is None and found.found == float("inf")


def test_an_answer_that_is_not_given_at_x_itself_has_no_radius():
    network, x, _ = problem(0)
    found = soundly.radius(network, x, target=(int(network(x).argmax()) + 1) % 3, clip=None)
    assert found.proved == 0 and found.verdict is None and found.found <= 1e-6


def test_what_the_verifier_cannot_decide_is_not_proved(monkeypatch):
    network, x, _ = problem(0)
    unknown = Unknown(float("nan"), 1.0, "out of time", Effort(0.0, 0, ""))
    monkeypatch.setattr(module, "verify", lambda claim, timeout: unknown)
    found = soundly.radius(network, x, clip=None)
    assert (found.proved, found.verdict, found.found) == (0.0, None, float("inf"))


def test_a_verifier_that_proves_too_much_is_found_out_by_the_truth(monkeypatch):
    """The planted fault that the first test of this part would catch."""
    network, x, _ = problem(0)
    proof = soundly.verify(soundly.robust(network, x, eps=1e-4, clip=None))

    def wrong(claim, timeout):
        return soundly.verify(claim, timeout=timeout) if float(claim.region.radius) == 3.0 else proof

    monkeypatch.setattr(module, "verify", wrong)
    assert not true(0, soundly.radius(network, x, clip=None, within=3.0))


@pytest.mark.parametrize("wrong", [{"within": 0.0}, {"within": float("inf")}, {"ratio": 1.0}, {"timeout": 0.0}])
def test_radii_that_make_no_sense(wrong):
    network, x, _ = problem(0)
    with pytest.raises(InvalidInput, match="give positive numbers"):
        soundly.radius(network, x, **wrong)
