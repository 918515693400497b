"""`soundly edit`, `undo` and `check --constraints`: what is written is what was proved, and can be taken back."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tests.editing.test_statement import CAT, NOISY, cnn

from soundly import gradcam
from soundly.certificate import Certificate, check
from soundly.cli import main
from soundly.editing import confirm as confirming
from soundly.editing import deliver as delivering
from soundly.editing.confirm import confirm
from soundly.editing.constraints import Normalised
from soundly.editing.delta import Delta
from soundly.editing.statement import read_statement
from soundly.errors import EditError, InvalidInput, ModelFileError
from soundly.graph.load import load
from soundly.graph.onnx_weights import replaced, spans

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def mlp() -> onnx.ModelProto:
    """y = W2 relu(W1 x + b1) + b2 with 2 inputs, 6 hidden values and 3 outputs; weights in both encodings, and more
    than soundly reads: a weight that nothing uses, metadata, an unknown field."""
    draw = np.random.default_rng(3)
    weights = {"fc1.weight": (6, 2), "fc1.bias": (6,), "fc2.weight": (3, 6), "fc2.bias": (3,), "unused": (5,)}
    stored = [numpy_helper.from_array(draw.normal(size=s).astype(np.float32), name) for name, s in weights.items()]
    listed = numpy_helper.to_array(stored[2])  # as a list of floats instead of bytes
    stored[2] = helper.make_tensor("fc2.weight", TensorProto.FLOAT, listed.shape, listed.flatten().tolist())
    nodes = [
        helper.make_node("Gemm", ["x", "fc1.weight", "fc1.bias"], ["h"], transB=1, name="first"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "fc2.weight", "fc2.bias"], ["y"], transB=1, doc_string="the last"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 2]), ("y", [1, 3]))]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8, producer_name="a test")
    helper.set_model_props(model, {"trained": "yesterday"})
    return model


UNKNOWN_FIELD = b"\xfa\xff\x03\x05hello"  # field 8191, of bytes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run: two networks, points, constraints."""
    monkeypatch.chdir(tmp_path)
    Path("cnn.onnx").write_bytes(cnn())
    Path("mlp.onnx").write_bytes(mlp().SerializeToString() + UNKNOWN_FIELD)
    np.save("cat.npy", CAT)
    np.save("noisy.npy", NOISY)
    return tmp_path


def state(*entries: Any, path: str = "c.json", **more: Any) -> str:
    Path(path).write_text(json.dumps({"version": 1, "constraints": list(entries), **more}))
    return path


def soundly(command: str) -> int:
    return main(command.split())


def evaluated(path: str, x: np.ndarray) -> np.ndarray:
    """The first output by onnxruntime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0][0]


def weights(path: str) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def slope(path: str, x: np.ndarray, of: int) -> np.ndarray:
    """The gradient of an output of the two-layer network, by its formula."""
    w = {name: array.astype(np.float64) for name, array in weights(path).items()}
    on = w["fc1.weight"] @ x[0] + w["fc1.bias"] > 0
    return (w["fc2.weight"][of] * on) @ w["fc1.weight"]


AT, OTHER = np.array([[0.5, -1.0]], np.float32), np.array([[-0.25, 0.75]], np.float32)
FLAT = {"gradient": {"of": 2}, "within": [-0.25, 0.25]}
HEAD = [
    {"at": AT.tolist(), "name": "a", "require": [{"classified": 1, "margin": 0.5}, FLAT]},
    {"at": OTHER.tolist(), "name": "b", "require": [
        {"gradient": {"of": 0}, "equals": {"gradient": {"of": 0}, "at": "a"}, "tolerance": 0.125},
        {"sum": [{"output": 0}, {"output": 2, "times": -1}], "at_most": 1.5}]},
]  # fmt: skip


def holds(path: str) -> bool:
    """HEAD, by onnxruntime and the formula of the gradient."""
    a, b = evaluated(path, AT), evaluated(path, OTHER)
    close = np.abs(slope(path, AT, 0) - slope(path, OTHER, 0)).max() <= 0.125 + 1e-9
    flat = np.abs(slope(path, AT, 2)).max() <= 0.25 + 1e-9
    return bool(a[1] - np.delete(a, 1).max() >= 0.5 - 1e-5 and flat and close and b[0] - b[2] <= 1.5 + 1e-5)


# -- edits


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_edit_holds_in_the_file_and_can_be_undone(suffix, folder, capsys):
    if suffix:
        assert os.system("gzip -k mlp.onnx") == 0
    state(*HEAD, layer="fc2")
    assert not holds("mlp.onnx")
    assert soundly(f"edit mlp.onnx{suffix} c.json -o new.onnx{suffix} --certificate c.cert --delta d.delta") == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == "proved        8 rows, 3 held before, all hold now, over the reals, for the stored features and weights"
    )
    assert lines[1].startswith("  changed     fc2.weight  ") and lines[2].startswith("  changed     fc2.bias    ")
    assert lines[-3:] == [
        f"  output      new.onnx{suffix}", "  certificate c.cert", "  delta       d.delta",
    ]  # fmt: skip
    if suffix:
        assert os.system("gzip -dk new.onnx.gz") == 0
    assert holds("new.onnx")

    # Nothing but entries of two weights differs, and these are where they were.
    old, new = Path("mlp.onnx").read_bytes(), Path("new.onnx").read_bytes()
    assert len(old) == len(new) and new.endswith(UNKNOWN_FIELD)
    differ = {i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b}
    where = spans(old)
    edited = {i for name in ("fc2.weight", "fc2.bias") for i in range(where[name].begin, where[name].end)}
    assert differ and differ <= edited
    before, after = onnx.load("mlp.onnx"), onnx.load("new.onnx")
    count = {}
    for a, b in zip(before.graph.initializer, after.graph.initializer, strict=True):
        count[a.name] = int((numpy_helper.to_array(a) != numpy_helper.to_array(b)).sum())
    said = {line.split()[1]: int(line.split()[2]) for line in lines[1:3]}
    assert {name: n for name, n in count.items() if n} == said
    del before.graph.initializer[:], after.graph.initializer[:]
    assert before.SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True)

    assert soundly(f"undo new.onnx{suffix} d.delta -o back.onnx") == 0
    assert f"{sum(said.values())} weights as before" in capsys.readouterr().out
    assert Path("back.onnx").read_bytes() == old
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []


def test_the_delta_tells_the_change_and_undoes_no_other_model(folder, capsys):
    state(*HEAD, layer="fc2")
    assert soundly("edit mlp.onnx c.json -o new.onnx --delta d.delta") == 0
    from safetensors.numpy import load_file

    delta, old, new = load_file("d.delta"), weights("mlp.onnx"), weights("new.onnx")
    for name in ("fc2.weight", "fc2.bias"):
        index = np.flatnonzero(old[name] != new[name])
        assert np.array_equal(delta[f"index/{name}"], index)
        assert np.array_equal(delta[f"old/{name}"], old[name].flatten()[index])
        assert np.array_equal(delta[f"new/{name}"], new[name].flatten()[index])
    other = onnx.load("new.onnx")
    other.producer_name = "another"
    onnx.save(other, "other.onnx")
    for model, hint in (("mlp.onnx", "it is the model before the edit"), ("other.onnx", "was changed since")):
        assert soundly(f"undo {model} d.delta -o back.onnx") == 2
        assert hint in capsys.readouterr().err and not Path("back.onnx").exists()
    assert soundly("undo new.onnx mlp.onnx -o back.onnx") == 2
    assert soundly("undo new.onnx d.delta -o new.onnx") == 2
    assert "is EDITED too" in capsys.readouterr().err


def test_a_damaged_delta_is_an_error_or_undoes_exactly(folder):
    state(*HEAD, layer="fc2")
    assert soundly("edit mlp.onnx c.json -o new.onnx --delta d.delta") == 0
    good, draw, refused = Path("d.delta").read_bytes(), random.Random(0), 0
    original, edited = Path("mlp.onnx").read_bytes(), Path("new.onnx").read_bytes()
    for i in range(300):
        bad = bytearray(good)
        if i % 3 == 0:
            bad = bad[: draw.randrange(len(bad))]
        else:
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        Path("bad.delta").write_bytes(bad)
        try:
            assert Delta.load("bad.delta").undone(edited) == original
        except (InvalidInput, ModelFileError, EditError):
            refused += 1
    assert refused > 200


def test_an_infeasible_edit_names_the_rows_that_contradict(folder, capsys):
    item = {"gradient": {"of": 0, "entries": [0]}, "at_least": 1, "name": "steep"}
    state({"at": AT.tolist(), "require": [item, {**item, "at_least": None, "within": [None, 0.5], "name": "flat"}]})
    text = Path("c.json").read_text().replace('"at_least": null, ', "")
    Path("c.json").write_text(text)
    assert soundly("edit mlp.onnx c.json -o new.onnx --layer fc2 --certificate c.cert --delta d.delta") == 1
    out = capsys.readouterr().out
    assert out.startswith("infeasible    ") and "  conflict    steep\n" in out and "  conflict    flat\n" in out
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["cnn.onnx", "mlp.onnx", "cat.npy", "noisy.npy", "c.json"]
    )


def test_running_out_of_time_is_not_a_proof(folder, capsys):
    state(*HEAD, layer=["fc1", "fc2"])
    assert soundly("edit mlp.onnx c.json -o new.onnx --timeout 1e-9 --format json") == 3
    found = json.loads(capsys.readouterr().out)
    assert found["status"] in ("limit", "unproven") and found["reason"] and found["output"] is None
    assert not Path("new.onnx").exists()


def test_json_output_and_options(folder, capsys):
    state(*HEAD, layer="fc1", norm="linf")
    assert soundly("edit mlp.onnx c.json -o new.onnx --layer fc2 --norm l1 --bound 5 --format json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["rows"], found["rows_before"], found["proven"]) == ("proved", 8, 3, 8)
    assert [c["name"] for c in found["claims"]][:2] == ["class 1 at a", "gradient of 2 at a"]
    assert set(found["changes"]) <= {"fc2.weight", "fc2.bias"} and found["certificate"] is None
    change, old, new = found["changes"]["fc2.weight"], weights("mlp.onnx"), weights("new.onnx")
    moved = new["fc2.weight"].astype(float) - old["fc2.weight"]
    assert change["changed"] == np.count_nonzero(moved) < 18 == change["of"]
    assert change["norm"] == pytest.approx(np.linalg.norm(moved))
    assert change["relative"] == pytest.approx(np.linalg.norm(moved) / np.linalg.norm(old["fc2.weight"]))
    assert change["largest"] == pytest.approx(np.abs(moved).max()) and change["largest"] <= 5
    assert holds("new.onnx")


def test_what_holds_already_changes_nothing(folder, capsys):
    state({"at": AT.tolist(), "require": [{"output": 0, "at_most": 1e6}]}, layer="fc2")
    assert soundly("edit mlp.onnx c.json -o new.onnx --delta d.delta") == 0
    assert "changed     nothing" in capsys.readouterr().out
    assert Path("new.onnx").read_bytes() == Path("mlp.onnx").read_bytes()
    assert soundly("undo new.onnx d.delta -o back.onnx") == 0


def test_files_and_arguments_that_do_not_fit(folder, capsys):
    state(*HEAD)
    shutil.copy("mlp.onnx", "copy.onnx")
    os.link("mlp.onnx", "linked.onnx")
    cases = {
        "edit mlp.onnx c.json -o new.onnx": "there are fc1, fc2",
        "edit mlp.onnx c.json -o new.onnx --layer fc9": "fc9",
        "edit mlp.onnx c.json -o mlp.onnx --layer fc2": "-o: mlp.onnx is MODEL too",
        "edit mlp.onnx c.json -o linked.onnx --layer fc2": "is MODEL too",
        "edit mlp.onnx c.json -o new.onnx --layer fc2 --delta c.json": "is CONSTRAINTS too",
        "edit mlp.onnx c.json -o new.onnx --layer fc2 --delta new.onnx": "is -o too",
        "edit mlp.onnx c.json -o absent/new.onnx --layer fc2": "is no folder",
        "edit mlp.onnx absent.json -o new.onnx --layer fc2": "absent.json: cannot be read",
        "edit cnn.onnx c.json -o new.onnx --layer fc": "c.json.constraints[0].at",
        "edit c.json c.json -o new.onnx --layer fc2": "soundly reads .onnx",
        "check c.cert --constraints c.json": "give both",
        "check c.cert --model mlp.onnx": "give both",
    }
    for command, message in cases.items():
        assert soundly(command) == 2, command
        captured = capsys.readouterr()
        assert message in captured.err and captured.out == "" and len(captured.err.splitlines()) == 1
    for command in ("check c.cert --model m.onnx --constraints c.json --spec p.vnnlib", "undo m.onnx c.json -o x.pt",
                    "edit mlp.onnx c.json -o new.pt --layer fc2", "edit mlp.onnx c.json --layer fc2"):  # fmt: skip
        assert soundly(command) == 2 and "usage: soundly" in capsys.readouterr().err
    assert Path("mlp.onnx").read_bytes() == Path("copy.onnx").read_bytes()


@pytest.mark.parametrize("fault", ["another weight", "another bit", "another network"])
def test_a_file_that_differs_from_what_was_proved_is_not_kept(fault, folder, capsys, monkeypatch):
    state(*HEAD, layer="fc2")

    def broken(data: bytes, new: dict[str, np.ndarray]) -> bytes:
        new = dict(new)
        if fault == "another weight":
            new["fc1.bias"] = weights("mlp.onnx")["fc1.bias"] + 1
        elif fault == "another bit":
            new["fc2.bias"] = np.nextafter(new["fc2.bias"], np.float32(9))
        elif fault == "another network":
            return cnn()
        return replaced(data, new)

    monkeypatch.setattr(delivering, "replaced", broken)
    assert soundly("edit mlp.onnx c.json -o new.onnx --certificate c.cert --delta d.delta") == 2
    assert "does not hold the weights that were proved" in capsys.readouterr().err
    assert not any(Path(p).exists() for p in ("new.onnx", "c.cert", "d.delta"))
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_weights_that_cannot_be_replaced_in_place(folder, capsys):
    model = mlp()
    onnx.save(model, "external.onnx", save_as_external_data=True, location="data.bin", size_threshold=0)
    half = mlp()
    for t in half.graph.initializer:
        t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t).astype(np.float16), t.name))
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(half, "half.onnx")
    state(*HEAD, layer="fc2")
    for path, message in (("external.onnx", "save_as_external_data=False"), ("half.onnx", "float16")):
        assert soundly(f"edit {path} c.json -o new.onnx") == 2
        assert message in capsys.readouterr().err and not Path("new.onnx").exists()


def test_weights_of_any_name_can_be_edited(folder):
    """Elsewhere a layer's weight and bias need not be called layer.weight and layer.bias."""
    text = Path("mlp.onnx").read_bytes()
    Path("mlp.onnx").write_bytes(text.replace(b"fc2.weight", b"MatMul_W_2").replace(b"fc2.bias", b"Bias_of2"))
    state(*HEAD)
    assert soundly("edit mlp.onnx c.json -o new.onnx --layer MatMul_W_2 --delta d.delta") == 0
    renamed = Path("new.onnx").read_bytes().replace(b"MatMul_W_2", b"fc2.weight").replace(b"Bias_of2", b"fc2.bias")
    Path("named.onnx").write_bytes(renamed)
    assert holds("named.onnx")
    assert soundly("undo new.onnx d.delta -o back.onnx") == 0
    assert Path("back.onnx").read_bytes() == Path("mlp.onnx").read_bytes()


def test_the_example_of_the_page_on_editing(folder, capsys):
    text = (Path(__file__).parents[1] / "docs" / "editing.md").read_text(encoding="utf-8")
    section = text[text.index("## At the command line") :]
    commands = re.findall(r"^soundly (.*)$", section, re.MULTILINE)
    Path("constraints.json").write_text(re.findall(r"```json\n(.*?)```", section, re.DOTALL)[0])
    np.savez("points.npz", dog=OTHER)
    shutil.copy("mlp.onnx", "net.onnx")
    assert [command.split()[0] for command in commands] == ["edit", "check", "undo"]
    for command in commands:
        assert soundly(command.replace("--layer fc ", "--layer fc2 ")) == 0, capsys.readouterr().err
    assert Path("net-again.onnx").read_bytes() == Path("net.onnx").read_bytes()


def test_hostile_bytes_are_refused_or_replaced_where_they_were():
    data, draw = mlp().SerializeToString() + UNKNOWN_FIELD, random.Random(2)
    assert set(spans(data)) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "unused"}
    refused = 0
    for _ in range(2000):
        bad = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        bad = bad[: draw.choice([len(bad), draw.randrange(len(bad))])]
        try:
            found = spans(bytes(bad))
        except ModelFileError:
            refused += 1
            continue
        for name, span in found.items():
            assert 0 <= span.begin <= span.end <= len(bad)
            new = replaced(bytes(bad), {name: np.ones(span.shape, span.dtype)})
            assert new[: span.begin] + new[span.end :] == bad[: span.begin] + bad[span.end :]
    assert 200 < refused < 1900


# -- certificates are about a network and constraints


@pytest.fixture
def edited(folder: Path) -> Callable[[list[Any], str], str]:
    """Edits a network; the certificate is c.cert, the network new.onnx, the constraints c.json."""

    def edit(entries: list[Any], model: str, layer: str) -> None:
        state(*entries)
        command = f"edit {model} c.json -o new.onnx --layer {layer} --certificate c.cert --quiet"
        assert soundly(command) == 0

    return edit


INNER = [
    {"at": AT.tolist(), "name": "a", "require": [{"classified": 1, "margin": 0.5}]},
    {"over": {"centre": [1.0, 1.0], "eps": 0.125}, "name": "r", "require": [{"output": 0, "within": [-4, -2]}]},
]


def test_an_edit_inside_holds_on_the_whole_region(edited):
    edited(INNER, "mlp.onnx", "fc1")
    assert not -4 <= evaluated("mlp.onnx", np.ones((1, 2), np.float32))[0] <= -2
    a = evaluated("new.onnx", AT)
    assert a[1] - np.delete(a, 1).max() >= 0.5 - 1e-5
    corners = [[x, y] for x in (0.875, 1, 1.125) for y in (0.875, 1, 1.125)]
    for x in [*corners, *(1 + (np.random.default_rng(0).random((100, 2)) - 0.5) / 4)]:
        assert -4 - 1e-5 <= evaluated("new.onnx", np.array([x], np.float32))[0] <= -2 + 1e-5


CHANGES = [
    ('"margin": 0.5', '"margin": 0.75'), ('"classified": 1', '"classified": 0'), ("[[0.5, -1.0]]", "[[0.5, -1.25]]"),
]  # fmt: skip
HEAD_CHANGES = [
    *CHANGES, ("[-0.25, 0.25]", "[-0.25, 0.125]"), ("0.125}", "0.0625}"), ('"of": 2', '"of": 1'),
    ('"times": -1', '"times": 1'), ('"at_most": 1.5', '"at_most": 1.25'), ('"at": "a"}', '"at": "b"}'),
]  # fmt: skip
INNER_CHANGES = [
    *CHANGES, ('"eps": 0.125', '"eps": 0.25'), ("-2]}]", "-2.25]}]"), ('"output": 0', '"output": 2'),
    ("[-4, -2]", "[null, -2]"), ("[1.0, 1.0]", "[1.0, 1.125]"),
]  # fmt: skip


@pytest.mark.parametrize(("entries", "layer"), [(HEAD, "fc2"), (HEAD, "fc1"), (INNER, "fc1")])
def test_a_certificate_is_about_its_network_and_constraints_alone(entries, layer, edited, capsys):
    edited(entries, "mlp.onnx", layer)
    capsys.readouterr()
    assert soundly("check c.cert --model new.onnx --constraints c.json") == 0
    assert "model       new.onnx holds exactly these weights" in capsys.readouterr().out
    text = Path("c.json").read_text()
    others = HEAD_CHANGES if entries is HEAD else INNER_CHANGES
    for old, new in others:
        assert old in text
        Path("d.json").write_text(text.replace(old, new, 1))
        assert soundly("check c.cert --model new.onnx --constraints d.json") == 1, (old, new)
        assert "this is not the claim of d.json about new.onnx" in capsys.readouterr().out
    document = json.loads(text)
    document["constraints"][0]["require"].append({"output": 0, "at_most": 1e6})
    Path("d.json").write_text(json.dumps(document))
    assert soundly("check c.cert --model new.onnx --constraints d.json") == 1
    capsys.readouterr()
    for path, name in (("mlp.onnx", None), ("near.onnx", "fc1.bias"), ("near.onnx", "fc2.weight")):
        if name is not None:  # the last bit of one weight
            data = Path("new.onnx").read_bytes()
            array = weights("new.onnx")[name].copy()
            array.flat[2] = np.nextafter(array.flat[2], np.float32(0)) if name != "fc1.bias" or layer == "fc1" else 9
            Path(path).write_bytes(replaced(data, {name: array}))
        assert soundly(f"check c.cert --model {path} --constraints c.json") == 1, (path, name)
        assert "this is not the claim of c.json" in capsys.readouterr().out


CAM = {"gradcam": {"of": 0, "layer": "features"}, "normalised_near": "map.npy", "eps": 0.3}


@pytest.mark.parametrize(("layer", "choice"), [("fc", 0), ("fc", 3), ("conv", 1)])
def test_numbers_that_the_editor_chose_do_not_matter(layer, choice, edited, capsys, monkeypatch):
    """The places of a map's extremes and its least range, chosen by the network before the edit."""
    chosen = Normalised.extremes
    with torch.no_grad():
        np.save("map.npy", gradcam(load("cnn.onnx"), of=0, layer="features")(torch.tensor(CAT)).numpy())
    monkeypatch.setattr(Normalised, "extremes", lambda self: chosen(self)[choice : choice + 1])
    entries = [{"at": "cat.npy", "name": "cat", "require": [CAM, {"classified": 3}]}]
    edited(entries, "cnn.onnx", layer)
    monkeypatch.setattr(Normalised, "extremes", chosen)
    capsys.readouterr()
    assert soundly("check c.cert --model new.onnx --constraints c.json") == 0, capsys.readouterr().out
    assert (Path("new.onnx").read_bytes() == cnn()) == (choice == 0)
    certificate, network = Certificate.load("c.cert"), load("new.onnx")
    constraints = read_statement("c.json", network).constraints
    name = "lower" if layer == "fc" else "row_constant"
    for i in np.flatnonzero(np.isfinite(certificate.arrays[name]) & (certificate.arrays[name] != 0)):
        arrays = {key: np.array(array) for key, array in certificate.arrays.items()}
        arrays[name][i] *= -1  # a range that need not be positive is none
        assert confirm(Certificate(certificate.header, arrays), network, constraints)
    for more in ({"eps": 0.29}, {"spread": 1e-9}):
        state({"at": "cat.npy", "name": "cat", "require": [{**CAM, **more}, {"classified": 3}]}, path="d.json")
        assert soundly("check c.cert --model new.onnx --constraints d.json") == 1


def tampered(certificate: Certificate, draw: random.Random) -> tuple[Certificate, str]:
    """The certificate with one entry of one array changed, under a digest that is right again."""
    arrays = {name: np.array(array) for name, array in certificate.arrays.items()}
    name = draw.choice([name for name, array in arrays.items() if array.size])
    flat = arrays[name].reshape(-1)
    i = draw.randrange(len(flat))
    old = flat[i].copy()
    if flat.dtype.kind == "f":
        flat[i] = draw.choice([-flat[i], flat[i] * 1.5, flat[i] + 1e-3, 0.0, np.inf, np.nan, np.nextafter(flat[i], 9)])
    else:
        flat[i] += draw.choice([-1, 1, 2])
    return Certificate(certificate.header, arrays), "" if flat[i] == old else name


@pytest.mark.parametrize(("entries", "layer"), [(HEAD, "fc2"), (INNER, "fc1")])
def test_tampered_certificates_prove_the_same_or_nothing(entries, layer, edited):
    """What is still accepted differs in how it is proved, not in what: in slopes, margins for the record, or in
    numbers that imply the constraints all the same."""
    edited(entries, "mlp.onnx", layer)
    certificate, network = Certificate.load("c.cert"), load("new.onnx")
    constraints = read_statement("c.json", network).constraints
    draw, refused, kept = random.Random(1), 0, set()
    for _ in range(200):
        other, name = tampered(certificate, draw)
        result = check(other)
        if name and (not result.accepted or confirm(other, network, constraints)):
            refused += 1
        else:
            kept.add(name)
    how = {
        "",
        "slopes",
        "beta",
        "what",
        "at",
        "flags",
        "slopes_bound",
        "slopes_refresh",
        "group_row",
        "group_key",
        "slots",
    }
    head = {"", "margin", "error", "vectors", "lower", "upper", "value_vector"}
    assert refused > 100 and kept <= (head if layer == "fc2" else how), kept


def test_claims_that_are_weaker_are_not_the_constraints(edited):
    """Certificates that are valid, about this very network, but prove less: a wider bound, a smaller margin."""
    edited(HEAD, "mlp.onnx", "fc2")
    certificate, network = Certificate.load("c.cert"), load("new.onnx")
    constraints = read_statement("c.json", network).constraints
    assert confirm(certificate, network, constraints) == []
    weaker = {
        "bound": ("upper", 3, 9.0),
        "label": ("lower", 1, -50.0),
        "rival": ("upper", 0, 50.0),
        "top": ("upper", 2, np.inf),
    }
    for name, row, value in weaker.values():
        arrays = {k: np.array(v) for k, v in certificate.arrays.items()}
        arrays[name][row] = value
        if value == np.inf:
            arrays["lower"][row] = -1e9
        other = Certificate(certificate.header, arrays)
        assert check(other).accepted and confirm(other, network, constraints)


def test_confirming_without_looking_at_thresholds_would_be_caught(edited, monkeypatch):
    monkeypatch.setattr(confirming, "_separated", lambda lower, upper, c: np.ones(len(lower), dtype=bool))
    with pytest.raises(AssertionError):
        test_claims_that_are_weaker_are_not_the_constraints(edited)
