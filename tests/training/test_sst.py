"""Self-explaining training: what each masking promises, controls, and a loop that resumes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import soundly
from soundly.errors import InvalidInput
from soundly.training import sst
from soundly.training.attack import ascend
from soundly.training.data import read
from soundly.training.fit import fit
from soundly.training.masking import Baseline, Certified, Masking, Probabilistic, Robust, box
from soundly.training.report import evaluate, prove, table

EPS = 0.12
MASKINGS: list[Masking] = [Baseline(), Probabilistic(), Robust(), Certified()]


@pytest.fixture(scope="module")
def digits():
    return read("digits")


def small(seed: int = 0) -> sst.SelfExplaining:
    torch.manual_seed(seed)
    return sst.mlp((1, 8, 8), 10, (32, 16))


@pytest.fixture(scope="module")
def trained(digits) -> sst.SelfExplaining:
    model = small()
    sst.train(model, digits.train, digits.train_labels, Certified(), epochs=30, batch=64, lr=5e-3)
    return model


def batch(digits, n: int = 32) -> tuple[Tensor, Tensor]:
    return digits.train[:n], digits.train_labels[:n]


def masks(x: Tensor) -> Tensor:
    return (torch.rand(len(x), 1, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.3).to(x)


# ---------------------------------------------------------------- the attack


def losses(model: nn.Module, y: Tensor):
    return lambda z: cross_entropy(model(z), y, reduction="none")


def test_the_inner_attack_raises_the_loss(digits, trained):
    """The regression test for an attack that returns where it started."""
    x, y = batch(digits)
    lower, upper = box(x, masks(x), EPS, (0.0, 1.0))
    start = lower + torch.rand_like(x) * (upper - lower)
    loss = losses(trained.classifier, y)
    found = ascend(loss, lower, upper, steps=10, start=start)
    assert ((found >= lower) & (found <= upper)).all()
    with torch.no_grad():
        before, after = loss(start), loss(found)
    assert (after >= before).all() and (after > before + 1e-3).float().mean() > 0.9
    assert after.mean() > 1.5 * before.mean()


def test_an_attack_that_does_not_climb_is_caught(digits, trained):
    """The same check refuses the start itself, which is what zero steps return."""
    x, y = batch(digits)
    lower, upper = box(x, masks(x), EPS, (0.0, 1.0))
    start = lower + torch.rand_like(x) * (upper - lower)
    assert torch.equal(ascend(losses(trained.classifier, y), lower, upper, steps=0, start=start), start)


def test_a_linear_loss_is_maximised_exactly():
    w = torch.randn(1, 6)
    lower, upper = -torch.rand(4, 6), torch.rand(4, 6)
    found = ascend(lambda z: (z * w).sum(1), lower, upper, steps=10)
    torch.testing.assert_close(found, torch.where(w > 0, upper, lower))


# ---------------------------------------------------------------- masks and maskings


def test_a_box_fixes_what_is_kept(digits):
    x, _ = batch(digits)
    mask = masks(x)
    lower, upper = box(x, mask, EPS, (0.0, 1.0))
    kept = mask.bool()
    assert torch.equal(lower[kept], x[kept]) and torch.equal(upper[kept], x[kept])
    torch.testing.assert_close(lower[~kept], (x - EPS).clamp(min=0)[~kept])
    torch.testing.assert_close(upper[~kept], (x + EPS).clamp(max=1)[~kept])


@pytest.mark.parametrize("masking", MASKINGS, ids=lambda m: m.name)
def test_faithfulness_teaches_the_mask_head(digits, masking):
    """Without the straight-through mask this gradient is exactly 0, and scores learn only to be small."""
    x, y = batch(digits)
    model = small()
    objective = sst.Objective(cardinality=0.0, decay=0.0, size=0.5)
    objective(model, masking, x, y).backward()
    assert model.score.weight.grad is not None and float(model.score.weight.grad.abs().max()) > 1e-6

    hard = model.both(x)[1].sigmoid() >= sst.THRESHOLD  # the broken variant
    loss = masking.loss(model.classifier, x, hard.to(x), y)
    assert torch.autograd.grad(loss, model.score.weight, allow_unused=True)[0] is None


def test_the_mask_is_hard_and_its_gradient_soft():
    scores = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    mask = sst.straight_through(scores)
    torch.testing.assert_close(mask, torch.tensor([0.0, 1.0, 1.0]))
    mask.sum().backward()
    soft = scores.detach().sigmoid()
    torch.testing.assert_close(scores.grad, soft * (1 - soft))


def test_certified_loss_is_not_below_that_of_any_completion(digits, trained):
    x, y = batch(digits)
    mask = masks(x)
    certified = Certified(EPS)
    margins = certified.margins(trained.classifier, x, mask, y)
    lower, upper = box(x, mask, EPS, (0.0, 1.0))
    with torch.no_grad():
        for masking in (Robust(EPS), Probabilistic(EPS)):
            assert masking.loss(trained.classifier, x, mask, y) <= certified.loss(trained.classifier, x, mask, y)
        for u in torch.rand(50, *x.shape):
            logits = trained.classifier(lower + u.round() * (upper - lower))
            assert (logits.gather(1, y[:, None]) - logits >= margins - 1e-4).all()


def test_what_bounds_certify_no_attack_breaks_and_the_verifier_proves(digits, trained):
    x = digits.test[:40]
    label, reason = trained.explain(x)
    certified = Certified(EPS).faithful(trained.classifier, x, reason.to(x), label)
    robust = Robust(EPS).faithful(trained.classifier, x, reason.to(x), label)
    assert certified.any() and not (certified & ~robust).any()
    proofs = prove(trained, x, eps=EPS)
    assert proofs.proved + proofs.refuted + proofs.unknown == 40
    assert int(certified.sum()) <= proofs.proved <= int(robust.sum())


def test_an_inverted_mask_proves_another_claim(digits, trained):
    """That the kept features are fixed and not the others: a network that reads one pixel knows the difference."""
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    model = sst.SelfExplaining(trunk, nn.Linear(2, 2), sst.dense_scores(2, (1, 8, 8)), (1, 8, 8))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        trunk[1].weight[0, 10] = 1.0
        trunk[1].bias[0] = -0.5
        model.classifier[1].weight[0, 0] = 1.0
        model.score.bias.fill_(-1.0)
        model.score.bias[10] = 1.0  # the reason is the pixel that counts
    x = torch.full((1, 1, 8, 8), 0.55)
    assert prove(model, x, eps=EPS).proved == 1
    with torch.no_grad():
        model.score.bias.neg_()
    assert prove(model, x, eps=EPS).refuted == 1


def test_masks_of_tokens():
    """Ids are embedded first; a mask keeps or replaces whole embeddings, here by random words."""
    torch.manual_seed(0)
    embed = nn.Embedding(20, 6)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(30, 16), nn.ReLU())
    model = sst.SelfExplaining(trunk, nn.Linear(16, 2), sst.dense_scores(16, (5, 1)), (5, 1), embed=embed)
    ids = torch.randint(20, (256, 5))
    y = (ids[:, 0] < 10).long()  # the first word alone decides
    masking = Probabilistic(rows=embed.weight.detach())
    sst.train(model, ids, y, masking, objective=sst.Objective(size=0.25), epochs=60, batch=64, lr=1e-2)
    label, reason = model.explain(ids)
    assert reason.shape == (256, 5, 1) and (label == y).float().mean() > 0.95
    assert reason[:, 0].float().mean() > 0.9 and reason[:, 1:].float().mean() < 0.2
    filled = masking._filled(model.embed(ids), reason.float(), 1.0)
    rows = (filled[:, :, None] == embed.weight).all(-1).any(-1)
    assert rows.all()
    assert Baseline(embed.weight.detach()[0]).faithful(model.classifier, model.embed(ids), reason.float(), y).any()


# ---------------------------------------------------------------- objective, report, loop


def test_budget_falls_to_the_size_and_stays():
    objective = sst.Objective(size=0.1, shrinking=0.5)
    assert objective.budget(0) == 1 and objective.budget(0.5) == objective.budget(1) == 0.1
    assert objective.budget(0.25) == pytest.approx(0.55)
    assert replace(objective, size=0.0).budget(0) == 0


def test_reasons_are_small_and_controls_are_reported(digits, trained):
    found = evaluate(trained, digits.test, digits.test_labels, MASKINGS, measured=200)
    assert found.accuracy > 0.8 and found.size < 0.25
    assert set(found.faithful) == set(found.empty) == set(found.constant) == {m.name for m in MASKINGS}
    assert found.faithful["certified"] <= found.faithful["robust"]
    assert found.faithful["certified"] > found.empty["certified"] + 0.2
    lines = list(table({"one": replace(found, proofs=prove(trained, digits.test[:4], eps=EPS))}))
    assert len(lines) == 2 and f"{found.faithful['robust']:.1%}" in lines[1]


def test_controls_see_through_a_constant_mask(digits):
    model = small()
    with torch.no_grad():
        model.score.weight.zero_()
        model.score.bias.copy_(torch.linspace(-1, 1, 64))
    found = evaluate(model, digits.test, digits.test_labels, [Certified()], measured=100)
    assert found.varying == 0 and found.constant == found.faithful and found.size == 0.5


def test_an_interrupted_run_ends_with_the_same_weights(digits, tmp_path):
    x, y = digits.train[:320], digits.train_labels[:320]
    file = tmp_path / "run.pt"

    def run(model: nn.Module, stop: int | None) -> None:
        def progress(epoch):
            if epoch.done == stop:
                raise KeyboardInterrupt

        sst.train(model, x, y, Probabilistic(), epochs=4, batch=64, checkpoint=file if stop != -1 else None,
                  progress=progress)  # fmt: skip

    whole, first, second = small(), small(), small(1)
    run(whole, -1)
    with pytest.raises(KeyboardInterrupt):
        run(first, 2)
    run(second, None)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_other_settings_or_none_at_all(digits, tmp_path):
    x, y = digits.train[:128], digits.train_labels[:128]
    file = tmp_path / "run.pt"
    sst.train(small(), x, y, Baseline(), epochs=1, checkpoint=file)
    with pytest.raises(InvalidInput, match="other settings"):
        sst.train(small(), x, y, Baseline(), epochs=2, checkpoint=file)
    with pytest.raises(InvalidInput, match="other settings"):
        sst.train(small(), x, y, Robust(), epochs=1, checkpoint=file)
    with pytest.raises(InvalidInput, match="other settings"):
        sst.train(small(), 1 - x, y, Baseline(), epochs=1, checkpoint=file)
    file.write_bytes(b"no checkpoint")
    with pytest.raises(InvalidInput, match="no checkpoint of this model"):
        sst.train(small(), x, y, Baseline(), epochs=1, checkpoint=file)


def test_training_stops_early_and_keeps_the_best_weights():
    model = nn.Linear(1, 1)
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    seen: list[Tensor] = []

    def validate() -> float:
        seen.append(model.weight.detach().clone())
        return next(losses)

    x = torch.randn(8, 1)
    done = fit(model, x, x[:, 0], lambda a, b, _: (model(a)[:, 0] - 2 * b).square().mean(), epochs=20, batch=4,
               validate=validate, patience=2)  # fmt: skip
    assert len(done) == 4 and torch.equal(model.weight, seen[1])


def test_the_papers_loss_and_its_search(digits):
    """With size 0 all scores are charged, with their own values; the search keeps the best of its grid."""
    x, y = digits.train[:320], digits.train_labels[:320]
    model, paper = small(), sst.Objective(size=0.0, cardinality=2.0, decay=0.0, target="prediction", warming=0.0)
    logits, scores = model.both(x)
    mask, label = (scores >= 0).float(), logits.argmax(1)
    want = cross_entropy(logits, y) + Baseline().loss(model.classifier, x, mask, label) + 2 * scores.sigmoid().mean()
    torch.testing.assert_close(paper(model, Baseline(), x, y), want)
    best, lr, weight = sst.search(
        small, x, y, Baseline(), rates=(1e-2, 1e-7), cardinalities=(1e-3,), epochs=25, batch=32, patience=5
    )
    assert (lr, weight) == (1e-2, 1e-3) and (best(x).argmax(1) == y).float().mean() > 0.5


def test_what_cannot_be_trained_on(digits):
    with pytest.raises(InvalidInput, match="batch is 64"):
        sst.train(small(), digits.train[:10], digits.train_labels[:10], Baseline(), batch=64)
    with pytest.raises(InvalidInput, match="not finite"):
        sst.train(small(), digits.train[:64] * float("nan"), digits.train_labels[:64], Baseline(), batch=64, epochs=1)
    with pytest.raises(InvalidInput, match="no examples"):
        evaluate(small(), digits.test[:0], digits.test_labels[:0], [])


def test_the_trained_network_is_an_ordinary_one(trained, digits):
    network = soundly.load(trained.classifier, digits.test[:1])
    torch.testing.assert_close(network(digits.test[:1]), trained(digits.test[:1]))
