"""A witness is a counterexample of the original model at a point of the region, or it is none."""

import gzip
import math
import re

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from soundly.errors import InvalidInput, ModelFileError
from soundly.graph.load import load
from soundly.graph.node import Shape
from soundly.spec.claim import Claim, Property, Row, Shapes, monotone, robust, within
from soundly.spec.region import Ball, Box, Union
from soundly.spec.vnnlib import read_vnnlib
from soundly.verification import replay as module
from soundly.verification.replay import replay, witness_text

WEIGHT = torch.tensor([[1.0, -2.0], [0.5, 0.75]])
BIAS = torch.tensor([0.1, -0.2])


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def linear(weight=WEIGHT, bias=BIAS):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    return load(layer, torch.zeros(1, weight.shape[1]))


class Map(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def box(*ends, shape: Shape = None):
    lower, upper = f64(*(a for a, _ in ends)), f64(*(b for _, b in ends))
    return Box(lower.reshape(shape or (1, -1)), upper.reshape(shape or (1, -1)))


def onnx_file(path, weight=WEIGHT, bias=BIAS, kind=TensorProto.FLOAT, op="Relu"):
    """y = op(x W^T + b), as a file."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    values = [numpy_helper.from_array(v.numpy().astype(dtype), n) for v, n in ((weight, "w"), (bias, "b"))]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1), helper.make_node(op, ["h"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, [1, weight.shape[1]])],
        [helper.make_tensor_value_info("y", kind, [1, weight.shape[0]])],
        values,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    data = model.SerializeToString()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["m.onnx", "m.onnx.gz"])
def test_the_file_itself_answers(tmp_path, name):
    path = onnx_file(tmp_path / name)
    claim = within(load(path), box((-1, 1), (-1, 1)), None, 2.0)  # relu(x - 2 y + 0.1) is up to 3.1
    found = replay(claim, f64(1.0, -0.9), model=path)
    assert found.by == "onnxruntime"
    h = WEIGHT.numpy() @ found.x.numpy().astype(np.float32) + BIAS.numpy()
    assert np.allclose(found.outputs, np.maximum(h, 0), rtol=1e-6)
    assert found.violation == pytest.approx(2.9 - 2, abs=1e-5)
    assert claim.region.contains(found.x.reshape(1, 2))
    assert torch.equal(found.x.float().double(), found.x)
    assert replay(claim, f64(0.0, 0.0), model=path) is None


def test_another_model_than_the_network_decides(tmp_path):
    network = load(onnx_file(tmp_path / "mine.onnx"))
    claim = within(network, box((-1, 1), (-1, 1)), None, 2.0)
    changed = onnx_file(tmp_path / "changed.onnx", bias=BIAS - 2)
    assert replay(claim, f64(1.0, -0.9)) is not None
    assert replay(claim, f64(1.0, -0.9), model=changed) is None
    # A changed file under the same name is read again.
    onnx_file(tmp_path / "changed.onnx", bias=BIAS + 20)
    assert float(replay(claim, f64(1.0, -0.9), model=changed).outputs[0]) == pytest.approx(22.9, abs=1e-4)


def test_double_models_run_in_double(tmp_path):
    path = onnx_file(tmp_path / "d.onnx", kind=TensorProto.DOUBLE)
    claim = within(load(path), box((-1, 1), (-1, 1)), None, 2.0)
    x = f64(1 / 3, -0.9999999999)
    found = replay(claim, x, model=path)
    assert torch.equal(found.x, x)


def test_models_that_are_not_the_claims(tmp_path):
    path = onnx_file(tmp_path / "m.onnx")
    claim = within(load(path), box((-1, 1), (-1, 1)), None, 2.0)
    wide = onnx_file(tmp_path / "wide.onnx", weight=torch.ones(3, 2), bias=torch.zeros(3))
    with pytest.raises(InvalidInput, match="3 outputs"):
        replay(claim, f64(1, -1), model=wide)
    other = onnx_file(tmp_path / "other.onnx", weight=torch.ones(2, 3))
    with pytest.raises(ModelFileError, match="cannot run"):
        replay(claim, f64(1, -1), model=other)
    with pytest.raises(ModelFileError, match="cannot be read"):
        replay(claim, f64(1, -1), model=tmp_path / "absent.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x08nothing")
    with pytest.raises(ModelFileError):
        replay(claim, f64(1, -1), model=broken)
    shapes = within(Shapes(((1, 2),), ((1, 2),)), claim.region, None, 2.0)
    with pytest.raises(InvalidInput, match="without its network"):
        replay(shapes, f64(1, -1))
    assert replay(shapes, f64(1, -1), model=path).by == "onnxruntime"


def test_the_network_answers_in_its_own_type_and_in_float64():
    claim = within(linear(), box((-1, 1), (-1, 1)), None, 2.0)
    found = replay(claim, f64(1, -1))
    assert found.by == "network" and found.violation == pytest.approx(1.1, abs=1e-6)
    # In float32 (x + 1e8) - 1e8 is 0 for x = 0.75, an output that no real arithmetic gives.
    rounding = load(Map(lambda x: (x * 1e8 + 1e16) * 1e-8 - 1e8), torch.zeros(1, 1))
    claim = within(rounding, box((0.75, 0.75)), 0.5, None)
    assert not claim.holds_at(torch.tensor([[0.75]]))
    assert claim.holds_at(f64(0.75).reshape(1, 1))
    assert replay(claim, f64(0.75)) is None


def test_points_are_moved_into_the_region():
    claim = within(linear(), box((-1, 0.1), (-1, 1)), None, 1.5)
    found = replay(claim, f64(0.1000001, -1.2))
    assert claim.region.contains(found.x.reshape(1, 2))
    assert float(found.x[0]) < 0.1  # the float32 number next to 1/10 lies above it
    ball = robust(linear(), torch.zeros(1, 2), eps=0.5, label=0, norm="l2", clip=None)
    found = replay(ball, f64(-3.0, 3.0))
    assert found is not None and ball.region.contains(found.x.reshape(1, 2))
    assert float(found.x.norm()) <= 0.5


def test_points_beside_the_region_are_no_witnesses_however_deep_they_fail():
    claim = within(linear(), box((-1, 1), (-1, 1)), None, -100)
    judge = module._judge(claim, None)
    assert judge(f64(1.0, 0.5))[0] is not None
    for outside in (1e-6, 1e-4, 1e-2):
        assert judge(f64(1.0 + outside, 0.5)) == (None, -math.inf)


def test_empty_regions_and_points_that_are_not_finite():
    claim = within(linear(), box((-1, 1), (-1, 1)), None, 2.0)
    assert replay(claim, f64(math.nan, 0.0)) is None
    assert replay(claim, f64(math.inf, 0.0)) is None
    assert replay(within(linear(), box((1, -1), (-1, 1)), None, 2.0), f64(0.0, 0.0)) is None


@pytest.mark.parametrize(
    "f, at",
    [
        (lambda x: 1 / x, 0.0),
        (torch.log, 0.0),
        (lambda x: torch.exp(2000 * x), 1.0),
        (lambda x: -torch.exp(2000 * x), 1.0),
    ],
)
def test_outputs_that_are_not_finite_are_no_witness(f, at):
    network = load(Map(f), torch.full((1, 1), 0.01))
    for side in ((None, 1e30), (1e30, None)):
        claim = within(network, box((at, at)), *side)
        assert not math.isfinite(float(claim.outputs(f64(at).reshape(1, 1))))
        assert replay(claim, f64(at)) is None


class TestNumbersThatNoFloatHolds:
    text = """(declare-const X_0 Real) (declare-const X_1 Real) (declare-const Y_0 Real) (declare-const Y_1 Real)
    (assert (>= X_0 {0})) (assert (<= X_0 {0})) (assert (>= X_1 -1)) (assert (<= X_1 1)) (assert (>= Y_0 {1}))"""

    @pytest.mark.parametrize("fixed", ["0.1", "4.0433324470371925", "-400.1"])
    def test_the_nearest_one_counts(self, tmp_path, fixed):
        path = onnx_file(tmp_path / "m.onnx", op="LeakyRelu")
        claim = read_vnnlib(self.text.format(fixed, "-100"), load(path))
        found = replay(claim, f64(float(fixed), -0.5), model=path)
        assert float(found.x[0]) == float(np.float32(fixed)) != float(fixed)

    def test_only_if_the_exact_input_violates_the_claim_too(self):
        # y = x - 2^24 at x = 2^24 + 1, which float32 rounds to 2^24.
        network = linear(torch.tensor([[1.0]]), torch.tensor([-(2.0**24)]))
        region = box((2**24 + 1, 2**24 + 1))
        assert replay(within(network, region, 0.5, None), f64(2**24 + 1)) is None
        assert replay(within(network, region, 1.5, None), f64(2**24 + 1)) is not None

    def test_never_further_away(self, monkeypatch):
        claim = within(linear(), box((0.1, 0.1), (-1, 1)), None, 1.5)
        x = f64(0.1, -1)
        assert replay(claim, x) is not None
        monkeypatch.setattr(module, "TOLERANCE", 1e-10)
        assert replay(claim, x) is None


class TestNearMisses:
    def test_a_point_next_to_a_witness_leads_to_it(self):
        network = linear(torch.tensor([[1.0, 1.0]]), torch.tensor([0.0]))
        claim = within(network, box((0, 1), (0, 1)), None, 1.5)
        found = replay(claim, f64(0.75 - 1e-5, 0.75 - 1e-5))
        assert found is not None and float(found.x.sum()) > 1.5
        assert float((found.x - 0.75).abs().max()) < 2e-3

    def test_a_point_far_from_any_is_left(self, monkeypatch):
        network = linear(torch.tensor([[1.0, 1.0]]), torch.tensor([0.0]))
        claim = within(network, box((0, 1), (0, 1)), None, 1.5)
        calls = []
        own = module._ByNetwork.outputs
        monkeypatch.setattr(module._ByNetwork, "outputs", lambda self, x: calls.append(x) or own(self, x))
        assert replay(claim, f64(0.4, 0.4)) is None
        assert len(calls) == 1

    def test_the_number_of_tries_is_bounded(self, monkeypatch):
        network = load(Map(lambda x: 5 - (x - 0.5).square().sum(-1)), torch.zeros(1, 6))
        claim = within(network, box(*[(0, 1)] * 6), None, 5.0)  # nearly violated, but true
        calls = []
        own = module._ByNetwork.outputs
        monkeypatch.setattr(module._ByNetwork, "outputs", lambda self, x: calls.append(x) or own(self, x))
        assert replay(claim, torch.full((6,), 0.5001).double()) is None
        assert 10 < len(calls) <= module.TRIES


def test_boxes_that_touch_apply_their_own_clauses():
    network = linear(torch.tensor([[1.0]]), torch.tensor([0.0]))
    region = Union(f64(0, 1).reshape(2, 1, 1), f64(1, 2).reshape(2, 1, 1))
    always, never = Row({0: 1}, {}, -5), Row({0: -1}, {}, 5)  # y <= 5, y >= 5
    for first, second, at in ((always, never, 0.0), (never, always, 1.0)):
        prop = Property.of([[first], [second]], outputs=1, inputs=1)
        claim = Claim(network, region, prop, torch.tensor([[0, 1], [1, 2]]))
        inner, border, other = at + 0.5, 1.0, 1.5 - at
        assert replay(claim, f64(inner)) is not None
        assert replay(claim, f64(border)) is not None  # it lies in both
        assert replay(claim, f64(border + (1e-12 if at == 0 else -1e-12))) is not None
        assert replay(claim, f64(other)) is None


def test_a_point_beside_a_border_that_no_float_holds():
    network = linear(torch.tensor([[1.0]]), torch.tensor([0.0]))
    region = Union(f64(0, 0.1).reshape(2, 1, 1), f64(0.1, 1).reshape(2, 1, 1))
    prop = Property.of([[Row({0: 1}, {}, -5)], [Row({0: -1}, {}, 5)]], outputs=1, inputs=1)
    found = replay(Claim(network, region, prop, torch.tensor([[0, 1], [1, 2]])), f64(0.1 + 1e-12))
    assert float(found.x) == float(np.nextafter(np.float32(0.1), np.float32(0)))


def test_a_claim_about_a_gradient_is_judged_by_the_gradient():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    claim = monotone(load(net, torch.zeros(1, 2)), box((-1, 1), (-1, 1)), of=0, entry=0)
    answers = set()
    for x in claim.region.samples(40):
        point = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net.double()(point).sum(), point)
        found = replay(claim, x.flatten())
        answers.add(found is not None)
        if float(slope[0, 0]) < -1e-3:
            assert found.by == "network" and float(found.outputs[0]) == pytest.approx(float(slope[0, 0]), abs=1e-4)
        elif float(slope[0, 0]) > 1e-1:
            assert found is None
    assert answers == {True, False}


def test_witness_text_keeps_every_bit():
    x, y = torch.rand(5, dtype=torch.float64) * 1e-7, torch.tensor([1.5, -3e-300, 0.1]).double()
    text = witness_text(x, y)
    assert text.startswith("sat\n((X_0 ") and text.endswith("))\n")
    assert text.count("(") == text.count(")") == 9
    pairs = re.findall(r"\((\w+) ([^()\s]+)\)", text)
    assert [name for name, _ in pairs] == [*(f"X_{i}" for i in range(5)), *(f"Y_{j}" for j in range(3))]
    assert torch.equal(f64(*(float(v) for _, v in pairs)), torch.cat([x, y]))


def test_without_onnxruntime_the_network_answers(tmp_path, monkeypatch):
    path = onnx_file(tmp_path / "m.onnx")
    claim = within(load(path), box((-1, 1), (-1, 1)), None, 2.0)
    module._session.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert replay(claim, f64(1, -1), model=path).by == "network"
    module._session.cache_clear()


def test_l1_balls_and_flat_regions_of_several_inputs():
    class Two(nn.Module):
        def forward(self, a, b):
            return a.sum() + b.flatten()

    network = load(Two(), (torch.zeros(2), torch.zeros(1, 2)))
    region = Ball(torch.zeros(4), 1.0, "l1")
    claim = within(network, region, None, 0.9)
    found = replay(claim, f64(0.4, 0.4, 0.3, 0.0))
    assert found is not None and region.contains(found.x)
    assert float(found.outputs.max()) > 0.9
    assert replay(claim, f64(0.0, 0.1, 0.3, 0.0)) is None
