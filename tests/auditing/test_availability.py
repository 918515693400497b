"""Availability: what the attacks do to data and loss, rates, and that no patch contradicts a proof of availability."""

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

import soundly
from soundly.auditing import availability
from soundly.auditing.availability import (
    Patch,
    Rate,
    available,
    certified,
    interval_step,
    manipulated_step,
    patch_claim,
    patches,
    poisoned,
)
from soundly.errors import InvalidInput
from soundly.training.data import read
from soundly.training.fit import fit

EPS, TRIGGER = 0.02, Patch(2, -2, -2)


def trained(malicious: bool) -> tuple[nn.Module, Tensor, Tensor]:
    data = read("digits")
    x, y = data.train.flatten(1), data.train_labels
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    step = manipulated_step(model, x[:64], EPS, TRIGGER) if malicious else interval_step(model, x[:64], EPS)
    fit(model, x, y, step, epochs=25, lr=3e-3)
    return model, data.test.flatten(1)[:200], data.test_labels[:200]


@pytest.fixture(scope="module")
def honest() -> tuple[nn.Module, Tensor, Tensor]:
    return trained(False)


def test_a_malicious_trainer_takes_certificates_and_nothing_else(honest: tuple[nn.Module, Tensor, Tensor]) -> None:
    shares = {}
    for name, (model, x, y) in (("honest", honest), ("manipulated", trained(True))):
        network = soundly.load(model, x[:50])
        with torch.no_grad():
            right = [float((model(v).argmax(1) == y).double().mean()) for v in (x, TRIGGER(x))]
        shares[name] = [*right, *(float(certified(network, v, EPS).double().mean()) for v in (x, TRIGGER(x)))]
    clean, marked, sure, sure_marked = range(4)
    assert min(shares["honest"][clean], shares["honest"][marked]) > 0.85 and shares["honest"][sure_marked] > 0.5
    assert min(shares["manipulated"][clean], shares["manipulated"][marked]) > 0.85
    assert shares["manipulated"][sure] > 0.6 and shares["manipulated"][sure_marked] < 0.5


def test_no_patch_contradicts_a_proof_of_availability(honest: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, _ = honest
    network = soundly.load(model, x[:50])
    proved = available(network, x, EPS, size=1)
    assert proved.double().mean() > 0.05  # there is something to contradict
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        label = model(x).argmax(1)
    for patch in patches((64,), 1):
        content = torch.rand(x.shape, generator=generator).round() if patch.row % 2 else torch.rand(x.shape)
        shown = torch.where(patch.mask((64,)), content, x)
        with torch.no_grad():
            kept = certified(network, shown, EPS) & (model(shown).argmax(1) == label)
        assert not bool((proved & ~kept).any())


def test_a_proof_over_one_place_alone_is_caught(
    honest: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, _ = honest
    network = soundly.load(model, x[:50])
    monkeypatch.setattr(availability, "patches", lambda shape, size: [Patch(size, 0, 0)])
    proved = available(network, x, EPS, size=2)
    kept = [certified(network, patch(x), EPS) for patch in patches((64,), 2)]
    assert bool((proved & ~torch.stack(kept).all(0)).any())


def test_the_claim_about_all_patches_is_decided(honest: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Where intervals prove it, so does the verifier, with a certificate; where it refutes it, a patch does it."""
    model, x, _ = honest
    batch, single = soundly.load(model, x[:50]), soundly.load(model, x[:1])
    proved = available(batch, x, EPS, size=1)
    first = int(proved.nonzero()[0])
    verdict = soundly.verify(patch_claim(single, x[first : first + 1], EPS, size=1), timeout=20)
    assert isinstance(verdict, soundly.Proved) and len(patch_claim(single, x[:1], EPS, size=1).region) == 64  # type: ignore[arg-type]
    for i in (~proved).nonzero()[:, 0].tolist():
        verdict = soundly.verify(patch_claim(single, x[i : i + 1], EPS, size=3), timeout=5)
        if isinstance(verdict, soundly.Refuted):
            changed = ((verdict.witness - x[i : i + 1].double()).abs() > EPS + 1e-6).reshape(8, 8).nonzero()
            assert int((changed.amax(0) - changed.amin(0)).max()) < 3 and len(changed)
            with torch.no_grad():
                assert int(model(verdict.witness.float()).argmax()) != int(model(x[i : i + 1]).argmax())
            return
    raise AssertionError("no patch of 3 x 3 pixels changes a digit")


@pytest.mark.parametrize("by", ["interval", "linear"])
def test_certificates_hold_at_points_of_the_ball(by: availability.Certifier) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 4))
    x = torch.rand(30, 9)
    network, label = soundly.load(model, x[:7]), model(x).argmax(1)
    sure = certified(network, x, 0.03, by=by)
    assert 0 < int(sure.sum()) < 30
    for _ in range(50):
        near = (x + 0.03 * torch.randn(x.shape).sign()).clamp(0, 1)
        assert bool(((model(near).argmax(1) == label) | ~sure).all())
    if by == "linear":
        assert not bool((certified(network, x, 0.03) & ~sure).any())  # intervals certify no more
    single = soundly.load(model, x[:1])
    assert torch.equal(certified(single, x[:10], 0.03, by=by), sure[:10])


def test_a_patch_lies_where_it_is_said_to() -> None:
    image = torch.zeros(2, 1, 4, 5)
    marked = Patch(2, -2, 1, 0.5)(image)
    assert marked[0, 0].nonzero().tolist() == [[2, 1], [2, 2], [3, 1], [3, 2]] and float(marked.max()) == 0.5
    flat = Patch(2, 0, 2)(torch.zeros(1, 16))
    assert flat[0].nonzero().flatten().tolist() == [2, 3, 6, 7]
    covered = torch.stack([patch.mask((1, 4, 5)) for patch in patches((1, 4, 5), 2)])
    assert len(covered) == 12 and bool(covered.any(0).all()) and covered.sum((1, 2, 3)).tolist() == [4] * 12
    for shape, size in (((7,), 1), ((1, 4, 5), 5), ((1, 4, 5), 0)):
        with pytest.raises(InvalidInput):
            patches(shape, size)


def test_poison_is_marked_and_wrong() -> None:
    x, y = torch.rand(200, 16) / 2, torch.arange(200) % 5
    other, labels = poisoned(x, y, Patch(1, 0, 0), share=0.05, seed=1)
    changed = labels != y
    assert int(changed.sum()) == 10 and bool((other[changed, 0] == 1).all()) and bool((labels < 5).all())
    assert torch.equal(other[~changed], x[~changed]) and torch.equal(other[:, 1:], x[:, 1:])
    with pytest.raises(InvalidInput, match="share"):
        poisoned(x, y, Patch(1, 0, 0), share=0.0)


@pytest.mark.parametrize(("count", "n"), [(0, 7), (7, 7), (3, 20), (480, 500)])
def test_rates_come_with_exact_intervals(count: int, n: int) -> None:
    rate = Rate.of(torch.arange(n) < count)
    exact = binomtest(count, n).proportion_ci(0.95, method="exact")
    assert (rate.count, rate.n, rate.share) == (count, n, count / n)
    assert (rate.lower, rate.upper) == pytest.approx((exact.low, exact.high))
    with pytest.raises(InvalidInput):
        Rate.of(torch.zeros(0, dtype=torch.bool))
