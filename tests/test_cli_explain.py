"""`soundly explain`: exit codes, files, and the page it writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from torch import nn

import soundly
from soundly.cli import main

SIDE = 6


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A network of images [1, 1, 6, 6] in net.onnx, and one of them in x.npy and x.png."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    grey = np.round(np.random.default_rng(0).uniform(0.2, 0.8, (SIDE, SIDE)) * 255) / 255
    soundly.to_onnx(soundly.load(made, torch.zeros(1, 1, SIDE, SIDE)), "net.onnx")
    np.save("x.npy", grey.astype(np.float32))
    image.imsave("x.png", np.repeat(grey[:, :, None], 3, 2))
    return made


def run(*arguments: str) -> int:
    return main(["explain", "net.onnx", "--input", "x.npy", *arguments])


def test_a_reason_is_found_proved_and_shown(model, capsys):
    assert run("--eps", "0.1", "--save", "mask.npy", "--report", "why.html", "--certificate", "why.cert") == 0
    assert capsys.readouterr().out.startswith("proved ")
    mask = np.load("mask.npy")
    assert mask.shape == (1, 1, SIDE, SIDE) and mask.dtype == bool
    assert soundly.check("why.cert").accepted
    page = Path("why.html").read_text(encoding="utf-8")
    assert f"Kept: {mask.sum()} of 36 pixels" in page and "data:image/png" in page and "proved" in page
    assert run("--eps", "0.1", "--mask", "mask.npy") == 0


def test_a_mask_that_does_not_decide_is_refuted_and_repaired(model, capsys):
    np.save("none.npy", np.zeros((SIDE, SIDE), bool))
    assert run("--eps", "0.6", "--mask", "none.npy", "--report", "why.html", "--format", "json") == 1
    facts = json.loads(capsys.readouterr().out)
    x = torch.from_numpy(np.load("x.npy"))[None, None]
    witness = torch.tensor(facts["witness"]).float().reshape(x.shape)
    assert facts["verdict"] == "refuted" and int(model(witness).argmax()) != int(model(x).argmax())
    page = Path("why.html").read_text(encoding="utf-8")
    assert "A counterexample." in page and not Path("why.cert").exists()
    first = np.zeros((SIDE, SIDE), bool)
    first[0] = True
    np.save("first.npy", first)
    assert run("--eps", "0.6", "--keep", "first.npy", "--save", "more.npy") == 0
    assert np.load("more.npy")[0, 0][0].all()


def test_pictures_and_arrays_are_the_same_input(model, capsys):
    assert run("--eps", "0.1", "--save", "a.npy") == 0
    assert main(["explain", "net.onnx", "--input", "x.png", "--eps", "0.1", "--save", "b.npy"]) == 0
    assert np.array_equal(np.load("a.npy"), np.load("b.npy"))


def test_a_map_between_its_bounds_is_shown(model, capsys):
    network = soundly.load("net.onnx")
    layer = next(name for name, node in network.places.items() if len(node.shape) == 4 and node.shape[1] == 3)
    assert run("--eps", "0.01", "--layer", layer, "--report", "why.html") == 0
    page = Path("why.html").read_text(encoding="utf-8")
    assert "At least" in page and "At most" in page


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--eps", "0"], "positive"),
        (["--eps", "0.1", "--target", "9"], "9"),
        (["--eps", "0.1", "--mask", "x.npy"], "top_mask"),
        (["--eps", "0.1", "--mask", "m.npy", "--keep", "k.npy"], "give one"),
        (["--eps", "0.1", "--input", "x.txt"], "neither"),
        (["--eps", "0.1", "--input", "small.npy"], "takes"),
        (["--eps", "0.1", "--range", "0.9", "1"], "clip"),
        (["--eps", "0.1", "--save", "x.npy"], "own file"),
    ],
)
def test_wrong_arguments_are_errors_that_say_so(model, arguments, word, capsys):
    np.save("small.npy", np.zeros(3))
    Path("x.txt").write_text("0")
    assert run(*arguments) == 2
    assert word in capsys.readouterr().err
