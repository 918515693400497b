"""`soundly train`: recipes from the command line, their files, and what is refused."""

import json

import pytest
import torch

import soundly
from soundly.cli import main

QUICK = ["--train", "256", "--test", "60", "--epochs", "2", "--batch", "64"]


def test_self_explaining(tmp_path, capsys):
    model = tmp_path / "net.onnx"
    assert main(["train", "sst", "digits", *QUICK, "--hidden", "16", "--proofs", "3", "--onnx", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "proved" in lines[0] and lines[1].startswith("size 0.06")
    network = soundly.load(model)
    assert network.input.shape == (1, 1, 8, 8) and network.output.shape == (1, 10)


def test_several_sizes_and_their_plot(tmp_path, capsys):
    picture = tmp_path / "sizes.png"
    command = ["train", "sst", "digits", *QUICK, "--hidden", "16", "--proofs", "2", "--size", "0.1", "0.5"]
    assert main([*command, "--masking", "baseline", "--plot", str(picture), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"size 0.1", "size 0.5"}
    assert {"accuracy", "size", "faithful", "empty", "constant", "proofs"} < set(found["size 0.1"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--checkpoint", str(tmp_path / "c.pt")]) == 2
    assert "give one --size" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_network_and_a_checkpoint_goes_on(tmp_path, capsys):
    outputs = []
    for checkpoint in ([], ["--checkpoint", str(tmp_path / "c.pt")], ["--checkpoint", str(tmp_path / "c.pt")]):
        command = ["train", "int", "digits", *QUICK, "--method", "int2", "--seed", "3", *checkpoint]
        assert main(command) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2] and outputs[0].startswith("accuracy")
    assert set(torch.load(tmp_path / "c.pt", weights_only=True)) >= {"model", "optimiser", "history"}


def test_json_of_the_other_recipe(capsys):
    assert main(["train", "int", "digits", *QUICK, "--method", "normal", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"accuracy", "tau", "kept"} and next(iter(found["accuracy"])) == "0.0"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["sst", "cifar"], "choose one of digits"),
        (["sst", "mnist"], "soundly data mnist"),
        (["int", "digits", "--train", "10"], "batch is 64"),
        (["int", "digits", "--onnx", "nowhere/net.onnx"], "make it first"),
    ],
)
def test_what_is_refused(command, said, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SOUNDLY_CACHE", str(tmp_path))
    assert main(["train", *command]) == 2
    assert said in capsys.readouterr().err
