"""Metrics of explanations against their definitions, captum, exact truth, and methods that lie."""

import json
from dataclasses import replace
from itertools import pairwise

import captum.metrics
import pytest
import torch
from tests.explanation.test_reason import FEATURES, SEEDS, model_of, problem, sufficient
from torch import Tensor, nn

import soundly
from soundly.errors import InvalidInput
from soundly.explanation.metrics import NOTHING, Comparison, compare, infidelity, insertion_deletion
from soundly.training.masking import Baseline, Probabilistic

F64 = torch.float64


def area(points: list[tuple[float, float]]) -> float:
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))


def one_by_one(model: nn.Module, x: Tensor, scores: Tensor, of: int, baseline: float) -> tuple[float, float]:
    """Insertion and deletion by their definition, a feature at a time."""
    into, out = torch.full_like(x, baseline), x.clone()
    curves: tuple[list, list] = ([], [])
    for k, i in enumerate([None, *scores.argsort(descending=True).tolist()]):
        if i is not None:
            into[0, i], out[0, i] = x[0, i], baseline
        for curve, z in zip(curves, (into, out), strict=True):
            curve.append((k / len(scores), float(model(z).detach().softmax(1)[0, of])))
    return area(curves[0]), area(curves[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_insertion_and_deletion_are_what_they_are_defined_to_be(seed):
    network, x, _ = problem(seed)
    scores = torch.randn(FEATURES, dtype=F64, generator=torch.Generator().manual_seed(seed))
    for baseline in (0.0, -1.5):
        for of in range(3):
            found = insertion_deletion(network, x, scores[None], of=of, baseline=baseline)
            assert found == pytest.approx(one_by_one(model_of(seed), x, scores, of, baseline), abs=1e-12)


def test_features_of_one_score_go_together():
    network, x, _ = problem(0)
    kept = torch.tensor([True, False, True, False, False, False])

    def p(z: Tensor) -> float:
        return float(model_of(0)(z).detach().softmax(1)[0, 1])

    some, rest = torch.where(kept, x, 0.0), torch.where(kept, 0.0, x)
    into, out = insertion_deletion(network, x, kept.double(), of=1)
    assert into == pytest.approx(area([(0, p(0 * x)), (2 / 6, p(some)), (1, p(x))]))
    assert out == pytest.approx(area([(0, p(x)), (2 / 6, p(rest)), (1, p(0 * x))]))


def test_many_steps_are_thinned_and_the_ends_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    x, scores = torch.rand(1, 300, dtype=F64), torch.rand(300, dtype=F64)
    found = insertion_deletion(soundly.load(model, x), x, scores, of=0)
    assert found == pytest.approx(one_by_one(model, x, scores, 0, 0.0), abs=2e-3)


@pytest.mark.parametrize("scaled", [False, True])
def test_infidelity_is_captums(scaled):
    for seed in SEEDS:
        network, x, _ = problem(seed)
        z = torch.randn(50, FEATURES, dtype=F64, generator=torch.Generator().manual_seed(seed))
        map = network.gradient(of=2)(x)

        def changed(inputs: Tensor, z: Tensor = z) -> tuple[Tensor, Tensor]:
            return inputs - z, z

        theirs = captum.metrics.infidelity(
            model_of(seed), changed, x, map, target=2, n_perturb_samples=50, max_examples_per_batch=50, normalize=scaled
        )
        assert infidelity(network, x, map, z, of=2, scaled=scaled) == pytest.approx(float(theirs), rel=1e-9)


def test_the_gradient_of_a_linear_network_is_faithful_without_error():
    model = nn.Linear(5, 3).double()
    x, z = torch.rand(1, 5, dtype=F64), torch.rand(20, 5, dtype=F64)
    network = soundly.load(model, x)
    map = network.gradient(of=1)(x)
    assert infidelity(network, x, map, z, of=1) < 1e-25
    assert infidelity(network, x, 3 * map, z, of=1) > 1e-3  # another scale is another map
    assert infidelity(network, x, 3 * map, z, of=1, scaled=True) < 1e-25
    assert infidelity(network, x, -map.roll(1), z, of=1, scaled=True) > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_every_column_is_what_it_says(seed):
    """Against the exact truth (proofs), the maskings of self-explaining training, and plain loops."""
    network, x, eps = problem(seed)
    model, label = model_of(seed), int(network(x).argmax())
    generator = torch.Generator().manual_seed(seed)
    masks = {str(k): torch.rand(1, FEATURES, generator=generator) < 0.6 for k in range(6)}
    rows = compare(network, x, masks, eps=eps, clip=None, samples=2000).rows
    assert [r.method for r in rows] == [*masks, NOTHING]
    masks[NOTHING] = torch.zeros(1, FEATURES, dtype=torch.bool)
    for row in rows:
        mask = masks[row.method]
        true = sufficient(seed, mask[0], eps)
        assert (row.proved, row.robust) == (true, true)
        assert row.size == pytest.approx(float(mask.double().mean())) and row.infidelity is None
        assert row.baseline == bool(Baseline().faithful(model, x, mask.to(x), torch.tensor([label])))
        many = Probabilistic(eps, clip=(-99.0, 99.0), samples=1)
        kept = many.faithful(model, x.expand(2000, -1), mask.to(x).expand(2000, -1), torch.full((2000,), label))
        assert row.random == pytest.approx(float(kept.double().mean()), abs=0.06)
        assert row.random >= row.proved


def test_our_reasons_beside_maps_of_the_same_size():
    torch.manual_seed(1)
    x = torch.cat([problem(seed)[1] for seed in SEEDS])
    network, _, eps = problem(0)
    found = compare(
        network,
        x,
        {
            "gradient": lambda z, label: network.gradient(of=label)(z).abs(),
            "random": torch.rand(3, FEATURES),
            "explain": lambda z, label: soundly.explain(network, z, eps=eps, clip=None),
        },
        eps=eps, clip=None, keep="explain",
    )  # fmt: skip
    gradient, random, ours, nothing = found.rows
    assert ours.proved == ours.robust == 1 and 0 < ours.size == gradient.size == random.size
    assert nothing.size == nothing.proved == 0 and gradient.infidelity is not None and ours.infidelity is None
    assert ours.seconds is not None and random.seconds is None
    assert json.loads(json.dumps(found.records()))[2]["proved"] == 1


def test_a_method_that_lies_about_its_mask_is_found_out():
    network, x, eps = problem(0)
    honest = soundly.explain(network, x, eps=eps, clip=None)
    nothing = torch.zeros(FEATURES, dtype=torch.bool)
    found = compare(network, x, {"liar": lambda z, label: replace(honest, kept=nothing)}, eps=eps, clip=None)
    assert found.rows[0].proved == found.rows[0].robust == 0


def test_what_takes_too_long_is_late():
    network, x, eps = problem(0)
    found = compare(network, x, {"slow": lambda z, label: z > 0}, eps=eps, clip=None, limit=0.0)
    assert found.rows[0].late == 1 and found.rows[1].late == 0


def test_groups_are_features():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    x, pixels = torch.rand(2, 3, 4, 4, dtype=F64), torch.arange(16).reshape(4, 4)
    network = soundly.load(model, x[:1])
    map = torch.rand(2, 3, 4, 4, dtype=F64)
    same = {"entries": map, "features": map.sum(1).flatten(1)}
    entries, features, _ = compare(network, x, same, eps=0.1, groups=pixels, keep=5).rows
    assert entries.size == features.size == 5 / 16 and entries.infidelity is not None and features.infidelity is None
    assert replace(entries, method="", infidelity=None) == replace(features, method="")


def test_tables():
    network, x, eps = problem(0)
    found = compare(network, x, {"all": torch.ones(1, FEATURES, dtype=torch.bool)}, eps=eps, clip=None)
    assert isinstance(found, Comparison) and found.inputs == 1
    lines = str(found).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1].startswith("all") and "100.0%" in lines[1]
    assert found.markdown().splitlines()[0].startswith("|  | size | seconds |")
    assert found.markdown().splitlines()[2].startswith("| all | 100.0% | - | 0 | 100.0% |")


@pytest.mark.parametrize(
    ("methods", "more", "said"),
    [
        ({"map": torch.rand(1, FEATURES)}, {}, "map gives scores; say with keep"),
        ({"map": torch.rand(1, FEATURES)}, {"keep": "ours"}, "'ours', which is not the name"),
        ({"map": torch.rand(1, 4)}, {"keep": 1}, "scores have shape"),
        ({"map": torch.full((1, FEATURES), float("nan"))}, {"keep": 1}, "NaN"),
        ({"mask": torch.ones(1, 4) > 0}, {}, "mask has shape"),
        ({}, {"inputs": torch.rand(2, 3)}, "inputs have shape"),
    ],
)
def test_what_is_refused(methods, more, said):
    network, x, eps = problem(0)
    with pytest.raises(InvalidInput, match=said):
        compare(network, **{"inputs": x, "methods": methods, "eps": eps, "clip": None, **more})
