"""Trained networks violate their claims at the planted points, look robust to descent, and are never proved."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from soundly.auditing import trained as module
from soundly.auditing.suite import plain_ones, read_answers, trained_ones, vnnlib
from soundly.auditing.trained import (
    ARCHITECTURES,
    NETS,
    STRONG,
    Boxes,
    Plan,
    Trained,
    architecture,
    boxes,
    gaps,
    instances,
    read,
    save,
    survivors,
    train,
)
from soundly.cli import main
from soundly.errors import InvalidInput
from soundly.graph.load import load
from soundly.spec.vnnlib import read_vnnlib
from soundly.verification.verdict import Proved
from soundly.verification.verify import verify

FILES = sorted(NETS.glob("*.npz"))
TINY = Plan(width=8, epochs=20, steps=3, restarts=4, shape=(4,), seed=2)


def test_what_comes_with_soundly_is_small_and_says_how_it_was_made() -> None:
    assert len(FILES) >= 1 and sum(path.stat().st_size for path in FILES) <= 300_000
    for path in FILES:
        made = read(path)
        assert made.plan.seed > 0 and bool(made.hidden.all()) and 0 < made.epoch <= made.plan.epochs
        again = boxes(made.plan)
        assert torch.equal(again.centres, made.boxes.centres) and torch.equal(again.points, made.boxes.points)
        for value in made.module.parameters():
            assert torch.equal(value, value.half().float())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_points_violate_and_descent_does_not_find_them(path: Path) -> None:
    made = read(path)
    for one, label in zip(instances(made), made.boxes.labels, strict=False):
        assert one.witness is not None and bool(((one.lower <= one.witness) & (one.witness <= one.upper)).all())
        y, own = one.network.to(torch.float64)(one.witness).flatten(), made.module(one.witness.float()).flatten()
        assert float(y[1] - y[0]) == pytest.approx(one.margin) and one.margin > 1e-3
        assert float((own[1 - label] - own[label]).detach()) == pytest.approx(one.margin, abs=1e-4)
        x = one.lower + (one.upper - one.lower) * torch.rand(5000, *one.lower.shape, dtype=torch.float64)
        y = torch.vmap(one.network.to(torch.float64))(x).reshape(-1, 2)
        assert bool((y[:, 0] > y[:, 1]).all()), "no random point shows it"
    assert bool(survivors(made.module, made.boxes, restarts=10, attacks=STRONG[:4]).all())


@pytest.mark.parametrize("one", list(trained_ones()), ids=lambda one: one.name)
def test_soundly_proves_none(one) -> None:
    """Without attacks: a proof is what must not be found."""
    assert not isinstance(verify(read_vnnlib(vnnlib(one), one.network), timeout=1.5, attack=False), Proved)


def test_what_does_not_hide_is_told() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        linear[1].weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    centre, point = torch.full((1, 3), 0.05), torch.full((1, 3), -0.05)
    wide = Boxes(centre, torch.tensor([0]), point, 0.1)
    assert float(gaps(linear, point, wide.labels).detach()) < 0 and not survivors(linear, wide, restarts=2).any()
    assert survivors(linear, wide, restarts=2, attacks=()).all(), "nothing was tried"
    assert not survivors(linear, replace(wide, points=-point), restarts=2, attacks=()).any(), "no counterexample"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_train_and_are_captured(name) -> None:
    shape = (4,) if name in ("mlp", "tanh", "sigmoid") else (2, 3, 3)
    told = []
    plan = replace(TINY, architecture=name, shape=shape, epochs=2)
    made = train(plan, every=1, progress=lambda state, there: told.append((state.epoch, there)))
    assert [epoch for epoch, _ in told] == [1, 2] and told[0][1].shape == (2,)
    assert load(made.module.eval(), torch.zeros(1, *shape)).outputs[0].shape == (1, 2)


def test_training_plants_the_points_and_is_repeatable(monkeypatch) -> None:
    def violated(plan: Plan) -> list[float]:
        told = []
        train(plan, every=10**6, progress=lambda _, there: told.append(there))
        return told[-1].tolist()

    plan = replace(TINY, epochs=60, width=32, rate=0.02)
    once = violated(plan)
    assert min(once) > 0 and once == violated(plan)
    monkeypatch.setattr(module, "MARGIN", -(10.0**6))  # an objective without the planted part
    assert min(violated(plan)) < 0


def test_a_file_is_read_as_it_was_written_or_not_at_all(tmp_path: Path) -> None:
    made = read(FILES[0])
    path = tmp_path / "a.npz"
    again = save(made, path)
    assert asdict(again.plan) == asdict(made.plan) and torch.equal(again.boxes.points, made.boxes.points)
    with torch.no_grad():
        for name, value in again.module.named_parameters():
            assert torch.equal(value, dict(made.module.named_parameters())[name])
    blunt = Trained(made.plan, made.module, replace(made.boxes, points=made.boxes.centres[:2]), made.hidden, 1)
    with pytest.raises(InvalidInput, match="does not violate"):
        save(blunt, path)
    path.write_bytes(b"nothing")
    with pytest.raises(InvalidInput, match="cannot be read"):
        read(path)
    np.savez(path, plan="{}")
    with pytest.raises(InvalidInput, match="cannot be read"):
        read(path)


def test_plans_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidInput, match="choose one of"):
        architecture(replace(TINY, architecture="rnn"))
    with pytest.raises(InvalidInput, match="images"):
        architecture(replace(TINY, architecture="vit"))
    with pytest.raises(InvalidInput, match="do not fit"):
        boxes(replace(TINY, eps=0.2))


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--shape", "4", "--width", "8", "--epochs", "3"]
    assert main(["audit", "train", str(tmp_path / "t.npz"), *tiny]) == 3
    assert "0 of 2 points are hidden" in capsys.readouterr().out and not (tmp_path / "t.npz").exists()
    assert main(["audit", "planted", str(tmp_path / "a"), "--trained"]) == 0
    assert main(["audit", "planted", str(tmp_path / "b"), "--trained", str(FILES[0])]) == 0
    assert len(read_answers(tmp_path / "a")) >= len(read_answers(tmp_path / "b")) == 2
    assert main(["audit", "planted", str(tmp_path / "c"), "--plain", "--count", "3"]) == 0
    assert [a.name for a in read_answers(tmp_path / "c").values()] == [one.name for one in plain_ones(3)]
