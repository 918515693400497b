"""Constraints from JSON say what the Python functions say, and whatever is wrong with a file is said where it is."""

import copy
import io
import json
import random
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from soundly import at, over
from soundly.editing.constraints import Constraint
from soundly.editing.sequential import Requirements, require
from soundly.editing.statement import Statement, read_statement
from soundly.errors import InvalidInput
from soundly.graph.from_onnx import from_onnx
from soundly.graph.network import Network
from soundly.spec.region import Ball, Box, Union


@cache
def cnn() -> bytes:
    """[1, 1, 4, 4] -> convolution with 3 channels, "features" -> mean -> "fc" with 4 outputs; as an ONNX file."""
    draw = np.random.default_rng(0)
    weights = {"conv.weight": (3, 1, 3, 3), "conv.bias": (3,), "fc.weight": (4, 3), "fc.bias": (4,)}
    arrays = {name: draw.normal(size=s).astype(np.float32) for name, s in weights.items()}
    arrays["conv.bias"] += 6  # so that no position is without any feature
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["features"]),
        helper.make_node("GlobalAveragePool", ["features"], ["p"]),
        helper.make_node("Flatten", ["p"], ["h"]),
        helper.make_node("Gemm", ["h", "fc.weight", "fc.bias"], ["y"], transB=1),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 1, 4, 4]), ("y", [1, 4]))]
    graph = helper.make_graph(nodes, "cnn", ends[:1], ends[1:], stored)
    opset = [helper.make_opsetid("", 18)]
    model: bytes = helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    return model


@pytest.fixture(scope="module")
def network() -> Network:
    return from_onnx(cnn())


CAT, NOISY = (np.random.default_rng(s).normal(size=(1, 1, 4, 4)).astype(np.float32) for s in (1, 2))
MAP = np.linspace(0, 1, 16).reshape(4, 4)


def written(folder: Path, document: Any) -> Path:
    """The document as a file, with the arrays that the tests name beside it."""
    np.save(folder / "cat.npy", CAT)
    np.savez(folder / "points.npz", noisy=NOISY[0], other=CAT)
    np.save(folder / "map.npy", np.asfortranarray(MAP))
    path = folder / "c.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def stated(folder: Path, network: Network, *entries: Any, **more: Any) -> Statement:
    return read_statement(written(folder, {"version": 1, "constraints": list(entries), **more}), network)


def rows(network: Network, constraints: list[Constraint] | tuple[Constraint, ...]) -> Requirements:
    return require(network, constraints, [network.parameters["fc.weight"]])


def same(network: Network, left: tuple[Constraint, ...], right: list[Constraint]) -> bool:
    """Whether two lists of constraints are the same rows of the same values, under the same names."""
    a, b = rows(network, left), rows(network, right)
    numbers = ("row_start", "row_value", "row_coefficient", "lower", "upper", "cones")
    values = torch.equal(a.evidence(a.evidence.theta)[0], b.evidence(b.evidence.theta)[0])
    return values and a.claims == b.claims and all(torch.equal(getattr(a, n), getattr(b, n)) for n in numbers)


P, Q = at(torch.tensor(CAT), name="cat"), at(torch.tensor(NOISY), name="noisy")
BOX = Box(torch.full((1, 1, 4, 4), -0.5).double(), torch.linspace(0, 1, 16).reshape(1, 1, 4, 4).double())
R = over(BOX, name="box")
GROUPS = (torch.arange(16) % 3 - 1).reshape(1, 1, 4, 4)

CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "class": ({"classified": 2, "margin": 0.1}, lambda p: p.classified(2, margin=0.1)),
    "class, default": ({"classified": 0}, lambda p: p.classified(0)),
    "output": ({"output": 3, "at_most": 1.5}, lambda p: p.output(3).at_most(1.5)),
    "named": ({"output": 3, "at_least": 1, "name": "n"}, lambda p: p.output(3).at_least(1, name="n")),
    "gradient": (
        {"gradient": {"of": 3, "entries": [0, 4]}, "within": [-0.1, 0.1]},
        lambda p: p.gradient(3, entries=[0, 4]).within(-0.1, 0.1),
    ),
    "whole gradient": (
        {"gradient": {"of": 1}, "within": [None, MAP.tolist()]},
        lambda p: p.gradient(1).at_most(torch.tensor(MAP)),
    ),
    "inner gradient": (
        {"gradient": {"of": 1, "place": "h"}, "within": [[-1, None, -3], [None, 2, 3]]},
        lambda p: p.gradient(1, place="h").within(torch.tensor([-1, -torch.inf, -3]), torch.tensor([torch.inf, 2, 3])),
    ),
    "bound in a file": (
        {"gradient": {"of": 1}, "at_most": "map.npy"},
        lambda p: p.gradient(1).at_most(torch.tensor(MAP)),
    ),
    "directional": (
        {"directional": {"of": 2, "directions": "cat.npy", "place": "x"}, "at_least": 0},
        lambda p: p.directional(2, torch.tensor(CAT)[None], place="x").at_least(0),
    ),
    "derivative": (
        {"derivative": {"of": 2, "along": [3, 3]}, "at_least": 0},
        lambda p: p.derivative(2, [3, 3]).at_least(0),
    ),
    "laplacian": ({"laplacian": {"of": 2}, "at_least": 0}, lambda p: p.laplacian(2).at_least(0)),
    "laplacian of some": (
        {"laplacian": {"of": 2, "entries": [0, 5]}, "at_least": 0},
        lambda p: p.laplacian(2, entries=[0, 5]).at_least(0),
    ),
    "gradcam": (
        {"gradcam": {"of": 0, "layer": "features"}, "normalised_near": "map.npy", "eps": 0.2},
        lambda p: p.gradcam(0, "features").normalised_near(torch.tensor(MAP), eps=0.2),
    ),
    "gradcam, spread": (
        {"gradcam": {"of": 0, "layer": "features"}, "normalised_near": MAP.tolist(), "eps": 0.2, "spread": 0.3},
        lambda p: p.gradcam(0, "features").normalised_near(torch.tensor(MAP), eps=0.2, spread=0.3),
    ),
    "top": (
        {"gradcam": {"of": 0, "layer": "features"}, "keeps_top": (MAP > 0.8).tolist(), "margin": 0.01},
        lambda p: p.gradcam(0, "features").keeps_top(torch.tensor(MAP > 0.8), margin=0.01),
    ),
    "norm": ({"gradient": {"of": 1}, "norm_at_most": 2}, lambda p: p.gradient(1).norm_at_most(2.0)),
    "norm of a difference": (
        {"sum": [{"gradient": {"of": 1}}, {"gradient": {"of": 1}, "at": "noisy", "times": -1}], "norm_at_most": 0.5},
        lambda p: (p.gradient(1) + -1 * Q.gradient(1)).norm_at_most(0.5),
    ),
    "cosine": (
        {"gradcam": {"of": 0, "layer": "features"}, "cosine_at_least": 0.9, "teacher": "map.npy"},
        lambda p: p.gradcam(0, "features").cosine_at_least(0.9, teacher=torch.tensor(MAP)),
    ),
    "cosine, length": (
        {"gradcam": {"of": 0, "layer": "features"}, "cosine_at_least": 0.9, "teacher": MAP.tolist(), "length": 0.2},
        lambda p: p.gradcam(0, "features").cosine_at_least(0.9, teacher=torch.tensor(MAP), length=0.2),
    ),
    "integrated": (
        {"integrated_gradients": {"of": 1, "baseline": 0, "steps": 3}, "at_most": 2},
        lambda p: p.integrated_gradients(1, baseline=torch.zeros(1, 1, 4, 4), steps=3).at_most(2),
    ),
    "integrated, groups": (
        {"integrated_gradients": {"of": 1, "baseline": "points.npz:noisy", "groups": GROUPS[0].tolist()}, "at_most": 2},
        lambda p: p.integrated_gradients(1, baseline=torch.tensor(NOISY), groups=GROUPS).at_most(2),
    ),
    "equal to numbers": (
        {"gradient": {"of": 1, "entries": [1, 2]}, "equals": [0.5, 0.25], "tolerance": 0.1},
        lambda p: p.gradient(1, entries=[1, 2]).equals(torch.tensor([0.5, 0.25]), tolerance=0.1),
    ),
    "equal at two points": (
        {"gradient": {"of": 1}, "equals": {"gradient": {"of": 1}, "at": "noisy"}, "tolerance": 0.1},
        lambda p: p.gradient(1).equals(Q.gradient(1), tolerance=0.1),
    ),
    "at another point": ({"output": 0, "at": "noisy", "at_least": 1}, lambda p: Q.output(0).at_least(1)),
    "sum": (
        {"sum": [{"output": 0}, {"output": 1, "times": -2.5}, {"output": 1, "at": "noisy"}], "at_least": 0},
        lambda p: (p.output(0) + -2.5 * p.output(1) + Q.output(1)).at_least(0),
    ),
    "combined": (
        {"gradient": {"of": 1, "entries": [0, 1]}, "combined": [[1, -1], [1, 1], [0, 1]], "times": 2, "plus": 0.5,
         "at_most": [1, 2, 3]},
        lambda p: (p.gradient(1, entries=[0, 1]).combined(torch.tensor([[1, -1], [1, 1], [0, 1]])) * 2 + 0.5)
        .at_most(torch.tensor([1, 2, 3])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_constraint_is_that_of_python(case, tmp_path, network):
    item, made = CASES[case]
    if case == "directional":  # [number, *shape]
        np.save(tmp_path / "directions.npy", CAT[None])
        item = {**item, "directional": {**item["directional"], "directions": "directions.npy"}}
    noisy = {"at": "points.npz:noisy", "name": "noisy", "require": [{"classified": 1}]}
    found = stated(tmp_path, network, {"at": "cat.npy", "name": "cat", "require": [item]}, noisy)
    wanted = [made(P), Q.classified(1)]
    assert same(network, found.constraints, wanted)
    assert not same(network, found.constraints, [made(at(torch.tensor(CAT + 1), name="cat")), Q.classified(0)])


@pytest.mark.parametrize(
    ("value", "region"),
    [
        ({"lower": -0.5, "upper": BOX.upper[0].tolist()}, BOX),
        ({"centre": "cat.npy", "eps": 0.1}, Ball(torch.tensor(CAT), 0.1).box),
        ({"centre": 0.0625, "eps": 0.125, "clip": [0, 1]}, None),
        ([{"lower": 0, "upper": 1}, {"lower": 2, "upper": 3}], None),
    ],
)
def test_regions(value, region, tmp_path, network):
    item = {"sum": [{"output": 0}, {"coordinates": {"entries": [3]}, "times": 2}], "at_least": -50}
    found = stated(tmp_path, network, {"over": value, "name": "box", "require": [item]}).constraints
    if region is None:
        ones = torch.ones(1, 1, 4, 4).double()
        union = Union.of([Box(0 * ones, ones), Box(2 * ones, 3 * ones)])
        region = Box(0 * ones, 0.1875 * ones) if isinstance(value, dict) else union
    area = over(region, name="box")
    assert same(network, found, [(area.output(0) + 2 * area.coordinates([3])).at_least(-50)])
    mine = found[0].expression.terms[0].functional.point.region
    assert torch.equal(mine.lower, region.lower) and torch.equal(mine.upper, region.upper)


def test_goals_and_options(tmp_path, network):
    entry = {"at": "cat.npy", "require": [{"classified": 1}], "wish": [{"output": 2, "near": 0.5}]}
    found = stated(
        tmp_path, network, entry, layer=["fc", "conv"], norm="l1", bound=0.5, goal_weight=2, retain=["points.npz:other"]
    )
    (goal,) = found.goals
    assert float(goal.target) == 0.5 and goal.expression.name == "output 2 at point 0"
    assert (found.layer, found.norm, found.bound) == (("fc", "conv"), "l1", 0.5)
    assert found.options["goal_weight"] == 2 and torch.equal(found.options["retain"][0], torch.tensor(CAT))
    assert stated(tmp_path, network, entry, layer="fc").layer == ("fc",)
    assert stated(tmp_path, network, entry).layer is None


def test_points_are_rounded_to_the_type_of_the_network(tmp_path, network):
    (c,) = stated(tmp_path, network, {"at": 0.1, "require": [{"classified": 1}]}).constraints
    assert c.point.x.dtype == torch.float32 and float(c.point.x[0, 0, 0, 0]) == float(np.float32(0.1))


VALID: dict[str, Any] = {
    "version": 1,
    "layer": "fc",
    "constraints": [
        {"at": "cat.npy", "name": "cat", "require": [item for n, (item, _) in CASES.items() if n != "directional"]},
        {"at": "points.npz:noisy", "name": "noisy", "require": [{"classified": 1}]},
        {"over": {"centre": 0, "eps": 0.1, "clip": [-1, 1]}, "require": [{"classified": 1}]},
    ],
}  # fmt: skip
GRADIENT = {"gradient": {"of": 1, "entries": [0, 1]}}
CAM = {"gradcam": {"of": 0, "layer": "features"}}


def one(item: Any) -> dict[str, Any]:
    return {"version": 1, "constraints": [{"at": "cat.npy", "require": [item]}]}


@pytest.mark.parametrize(
    ("document", "place", "remedy"),
    [
        ([], "c.json:", "expected an object"),
        ({"constraints": []}, "c.json:", "'version' is missing"),
        ({"version": 2, "constraints": []}, "c.json.version:", "reads version 1"),
        ({"version": True, "constraints": []}, "c.json.version:", "expected an integer"),
        ({"version": 1, "constraints": []}, "c.json.constraints:", "at least one"),
        ({"version": 1, "constraint": []}, "c.json:", "did you mean 'constraints'"),
        ({**VALID, "layer": 3}, "c.json.layer:", "list"),
        ({**VALID, "norm": "l3"}, "c.json.norm:", "l2, l1, linf"),
        ({**VALID, "bound": 0}, "c.json.bound:", "more than 0"),
        ({"version": 1, "constraints": [{"require": []}]}, "c.json.constraints[0]:", '"at", a point, or "over"'),
        ({"version": 1, "constraints": [{"at": 0}]}, "c.json.constraints[0]:", '"require" or "wish"'),
        ({"version": 1, "constraints": [{"at": 0, "wish": [{"output": 0, "near": 1}]}]}, "constraints:", "required"),
        ({"version": 1, "constraints": [{"at": [0, 1], "require": [{"classified": 0}]}]}, "[0].at:", "[1, 1, 4, 4]"),
        ({"version": 1, "constraints": [{"at": "no.npy", "require": [{"classified": 0}]}]}, "[0].at:", "no such file"),
        ({"version": 1, "constraints": [{"at": "c.txt", "require": [{"classified": 0}]}]}, "[0].at:", ".npz file"),
        ({"version": 1, "constraints": [{"at": "points.npz", "require": [{"classified": 0}]}]}, ".at:", "noisy, other"),
        ({"version": 1, "constraints": [{"at": 1e300, "require": [{"classified": 0}]}]}, "[0].at:", "float32"),
        ({"version": 1, "constraints": [{"at": 0, "position": 1, "require": [{"classified": 0}]}]}, "position:", "-1"),
        ({"version": 1, "constraints": [{"over": {"lower": 0}, "require": [{"classified": 0}]}]}, ".over:", '"upper"'),
        ({"version": 1, "constraints": [{"over": {"lower": 1, "upper": 0}, "require": [{"classified": 0}]}]}, ".over:",
         "empty"),
        ({"version": 1, "constraints": [{"over": {"centre": 1, "eps": -1}, "require": [{"classified": 0}]}]}, ".over:",
         "negative"),
        ({"version": 1, "constraints": [{"at": 0, "name": "a", "require": [{"classified": 0}]},
                                        {"at": 1, "name": "a", "require": [{"classified": 0}]}]}, "1].name:", "other"),
        (one({"classified": 4}), "require[0].classified:", "0..3"),
        (one({"classified": 1.0}), "require[0].classified:", "expected an integer"),
        (one({"classified": 1, "margin": -1}), "require[0].margin:", "at least 0"),
        (one({"classified": 1, "eps": 1}), "require[0]:", "'eps' is not known here"),
        (one({"output": 1}), "require[0]:", "demand one of within"),
        (one({"output": 1, "at_least": 0, "at_most": 1}), "require[0]:", "at_least and at_most"),
        (one({"at_least": 0}), "require[0]:", "give one of output"),
        (one({"output": 1, **GRADIENT, "at_least": 0}), "require[0]:", "output and gradient"),
        (one({"output": 1, "at_least": 0, "tolerance": 1}), "require[0]:", '"tolerance" does not go with "at_least"'),
        (one({"output": 1, "at": "dog", "at_least": 0}), "require[0].at:", "point 0"),
        (one({**GRADIENT, "within": [0, 1, 2]}), "require[0].within:", "[lower, upper]"),
        (one({**GRADIENT, "within": [1, 0]}), "require[0].within:", "contradict"),
        (one({**GRADIENT, "within": [None, None]}), "require[0].within:", "finite bound"),
        (one({**GRADIENT, "at_least": [0, 1, 2]}), "require[0].at_least:", "expected 2 numbers"),
        (one({**GRADIENT, "at_least": [0, [1, 2]]}), "require[0].at_least:", "different shapes"),
        (one({**GRADIENT, "at_least": [0, "1"]}), "require[0].at_least[1]:", "expected a number"),
        (one({**GRADIENT, "at_least": None}), "require[0].at_least:", "null"),
        (one({**GRADIENT, "at_least": 10**400}), "require[0].at_least:", "too large"),
        (one({**GRADIENT, "equals": 0}), "require[0]:", '"equals" needs "tolerance"'),
        (one({**GRADIENT, "equals": {"output": 1}, "tolerance": 1}), "require[0].equals:", "2"),
        (one({"gradient": {"of": 1, "entries": [16]}, "at_least": 0}), "gradient.entries[0]:", "0..15"),
        (one({"gradient": {"of": 1, "entry": [1]}, "at_least": 0}), "require[0].gradient:", "did you mean 'entries'"),
        (one({"gradient": {"of": 1, "place": "featured"}, "at_least": 0}), "gradient.place:", "features"),
        (one({"directional": {"of": 1, "directions": [1, 2]}, "at_least": 0}), "directions:", "[number, 1, 1, 4, 4]"),
        (one({"gradcam": {"of": 1, "layer": "h"}, "at_least": 0}), "gradcam.layer:", "[1, C, *size]"),
        (one({**CAM, "normalised_near": [1, 2], "eps": 0.1}), "normalised_near:", "16 numbers"),
        (one({**CAM, "normalised_near": [1] * 16, "eps": 0.1}), "normalised_near:", "not constant"),
        (one({**CAM, "normalised_near": "map.npy"}), "require[0]:", '"normalised_near" needs "eps"'),
        (one({**CAM, "normalised_near": "map.npy", "eps": 0.5}), "normalised_near:", "between 0 and 1/2"),
        (one({**CAM, "normalised_near": "map.npy", "eps": 0.1, "spread": 0}), "require[0].spread:", "more than 0"),
        (one({**CAM, "keeps_top": [2] * 16}), "keeps_top:", "true or false"),
        (one({**CAM, "keeps_top": [1] * 16}), "keeps_top:", "leave out some"),
        (one({**CAM, "norm_at_most": 0}), "norm_at_most:", "0"),
        (one({"derivative": {"of": 0, "along": []}, "at_most": 0}), "along:", ""),
        (one({"derivative": {"of": 0, "along": [16]}, "at_most": 0}), "along[0]:", "16"),
        (one({"derivative": {"of": 0, "along": [1] * 5}, "at_most": 0}), "along:", "order 5"),
        (one({"laplacian": {"of": 9}, "at_most": 0}), "of:", "9"),
        (one({**CAM, "cosine_at_least": 1.5, "teacher": MAP.tolist()}), "cosine_at_least:", "between 0 and 1"),
        (one({**CAM, "cosine_at_least": 0.5}), "cosine_at_least:", "teacher"),
        (one({**CAM, "cosine_at_least": 0.5, "teacher": [1, 2]}), "teacher:", "16 numbers"),
        (one({**CAM, "cosine_at_least": 0.5, "teacher": 0}), "teacher:", "16 numbers"),
        (one({**CAM, "norm_at_most": 0.5, "teacher": MAP.tolist()}), "require[0]", "does not go with"),
        (one({"integrated_gradients": {"of": 1, "baseline": 0, "steps": 10**9}, "at_most": 1}), "steps:", "1..1000"),
        (one({"integrated_gradients": {"of": 1, "baseline": 0, "groups": 0.5}, "at_most": 1}), "groups:", "integers"),
        (one({"integrated_gradients": {"of": 1}, "at_most": 1}), "integrated_gradients:", "'baseline' is missing"),
        (one({"coordinates": {}, "at_most": 1}), "coordinates:", "write it as numbers"),
        (one({"sum": [{"output": 1}, GRADIENT], "at_most": 1}), "require[0].sum[1]:", "equally many"),
        (one({**GRADIENT, "combined": [1, 2], "at_most": 1}), "combined:", "2 columns"),
        (one({**GRADIENT, "times": "2", "at_most": 1}), "times:", "expected a number"),
        ('{"version": 1, "version": 1, "constraints": []}', "c.json", "'version' occurs twice"),
        ('{"version": 1, "constraints": NaN}', "c.json", "null"),
        ('{"version": 1', "c.json", "JSON"),
        ("[" * 100000, "c.json", "JSON"),
        ("\udcff", "c.json", "JSON"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_where_it_is(document, place, remedy, tmp_path, network):
    if document == "\udcff":
        written(tmp_path, "").write_bytes(b"\xff\xfe")
        path = tmp_path / "c.json"
    else:
        path = written(tmp_path, document)
    with pytest.raises(InvalidInput) as caught:
        read_statement(path, network)
    text = str(caught.value)
    assert place in text and remedy in text and "\n" not in text


def test_what_an_array_file_may_not_be(tmp_path, network):
    """Pickles, NaN, texts, headers that claim more than there is, archives that unpack to gigabytes, folders."""
    good = io.BytesIO()
    np.save(good, CAT)
    huge = good.getvalue().replace(b"(1, 1, 4, 4)", b"(1, 1, 4, 400000000)".ljust(12))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\0" * 2**21)
    bomb = bytearray((tmp_path / "bomb.npz").read_bytes())
    at_size = bomb.rfind(b"PK\x01\x02") + 24
    bomb[at_size : at_size + 4] = (2**31).to_bytes(4, "little")
    files = {
        "pickle.npy": lambda p: np.save(p, np.array([{}, None]), allow_pickle=True),
        "text.npy": lambda p: np.save(p, np.array(["a"])),
        "complex.npy": lambda p: np.save(p, CAT + 1j),
        "nan.npy": lambda p: np.save(p, CAT * np.nan),
        "inf.npy": lambda p: np.save(p, CAT / 0.0),
        "huge.npy": lambda p: p.write_bytes(huge),
        "cut.npy": lambda p: p.write_bytes(good.getvalue()[:-4]),
        "empty.npy": lambda p: p.write_bytes(b""),
        "bomb.npz": lambda p: p.write_bytes(bomb),
        "broken.npz": lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)),
        "folder.npy": lambda p: p.mkdir(),
    }
    for name, make in files.items():
        with np.errstate(all="ignore"):
            make(tmp_path / name)
        with pytest.raises(InvalidInput, match=r"c\.json\.constraints\[0\]\.at: .*(cannot be read|not finite)"):
            stated(tmp_path, network, {"at": name, "require": [{"classified": 0}]})


JUNK: list[Any] = [
    None, True, 0, -1, 7, 10**30, -(10**400), 0.5, 1e308, "", "cat", "cat.npy", "x.npz:", "fc", "\u202e", [], [[]],
    [None], {}, [1, 2], {"of": 0}, {"output": 0}, ["cat.npy"], [[1, 2], [3]], {"lower": 0, "upper": 1},
]  # fmt: skip


def mutated(document: Any, draw: random.Random) -> Any:
    """The document with one value replaced, removed, renamed, or put somewhere else."""
    document = copy.deepcopy(document)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(document)
    holder, key = draw.choice(places)
    match draw.randrange(4):
        case 0:
            del holder[key]
        case 1:
            other, place = draw.choice(places)
            holder[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else None)
        case 2 if isinstance(holder, dict):
            holder[draw.choice(["of", "at", "within", "eps", "combined", "plus", "name", "x"])] = holder.pop(key)
        case _:
            holder[key] = draw.choice(JUNK)
    return document


def test_mutated_files_are_refused_with_the_place_or_mean_something(tmp_path, network):
    draw, refused = random.Random(0), 0
    path = written(tmp_path, VALID)
    assert len(read_statement(path, network).constraints) == len(CASES) + 1
    for i in range(400):
        document: Any = mutated(VALID, draw)
        if i % 4 == 0:
            text = json.dumps(document)
            cut = draw.randrange(len(text))
            document = text[:cut] + draw.choice(["", "\0", "{", "]", '"', "9" * 500, "NaN", "\u00e9"]) + text[cut + 1 :]
        path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
        try:
            found = read_statement(path, network)
        except InvalidInput as error:
            refused += 1
            assert "c.json" in str(error) and len(str(error)) < 1000
        else:
            assert found.constraints
    assert 200 < refused < 400
