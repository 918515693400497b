"""Lowering: a program computes what its network computes, in few steps, or is refused."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from tests.bounds.samples import F64, NETWORKS, assert_computes, box, convnet, function, kinds, mlp
from tests.bounds.test_interval import networks

from soundly.bounds import compose
from soundly.bounds import lower as lowering
from soundly.bounds.lower import lower
from soundly.bounds.program import Affine, Convolution, Function, Matrix, Program, Sparse, Times, Variable
from soundly.errors import CaptureMismatch, MissingRule
from soundly.graph import elementwise as ew
from soundly.graph.composite import Rounding
from soundly.graph.linear import (
    Combine,
    Expand,
    Permute,
    Reshape,
    reshape,
)  # fmt: skip
from soundly.graph.network import Network
from soundly.graph.node import Constant, Fill, Input, Node, Parameter
from soundly.graph.product import Conv, ConvKernel, ConvTranspose, Dense, MatMul, Multiply


def maps(program: Program) -> list:
    return [part for step in program.steps if isinstance(step, Affine) for part, _ in step.parts]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_program_computes_its_network(name):
    network = NETWORKS[name]()
    program = lower(network)
    assert_computes(program, network)
    assert isinstance(program.steps[0], Variable) and program.steps[0].size == math.prod(network.input.shape)
    for i, step in enumerate(program.steps):
        assert all(source < i for source in step.sources)
        for source in step.sources if isinstance(step, (Function, Times)) else ():
            assert program.steps[source].size == step.size
        if isinstance(step, Affine):
            assert all(part.size == (step.size, program.steps[source].size) for part, source in step.parts)
    assert all(read for read in program.consumers()[:-1]), "a dead step"
    entries = sum(len(part.rows) for part in maps(program) if isinstance(part, Sparse))
    assert entries <= 8 * sum(step.size for step in program.steps)


@settings(max_examples=60)
@given(network=networks())
def test_random_graphs_compute_the_same(network):
    assert_computes(lower(network), network, 1e-8, count=2)


@pytest.mark.parametrize("name", NETWORKS)
def test_pull_is_the_transpose_of_apply(name):
    source = torch.Generator().manual_seed(1)
    for part in maps(lower(NETWORKS[name]())):
        m, n = part.size
        x, y = torch.randn(2, n, generator=source, dtype=F64), torch.randn(2, m, generator=source, dtype=F64)
        forth, back = (y * part.apply(x)).sum(-1), (part.pull(y) * x).sum(-1)
        assert torch.allclose(forth, back, rtol=1e-12, atol=1e-12)


def test_steps_are_what_one_would_write_by_hand():
    assert kinds(lower(mlp())) == ["Variable", "Matrix", "relu", "Matrix", "relu", "Matrix"]
    assert kinds(lower(convnet())) == ["Variable", "Convolution", "relu", "Convolution", "relu", "Matrix"]
    residual = kinds(lower(NETWORKS["residual"]()))
    conv = "Convolution"
    assert residual[:4] == ["Variable", conv, "relu", conv]
    assert sorted(residual[5].split("+")) == [conv, conv] and residual[6] == "relu"
    assert sorted(residual[7].split("+")) == [conv, "Sparse"]
    assert residual[8:] == ["relu", "Sparse", "Matrix"]


def test_gates_of_an_lstm_are_rows_of_its_matrices():
    program = lower(NETWORKS["lstm"]())
    assert not any(
        isinstance(step, Affine) and len(step.parts) == 1 and step.parts[0][0].size[0] == 16 for step in program.steps
    )


def test_several_inputs_and_outputs_are_joined_in_order():
    x, y = Input("x", (2, 3))(), Input("y", (3,))()
    a = Combine((2.0, -1.0))(y, y)
    network = Network((x, y), (Permute((1, 0))(x), a, Fill(3.0, (2,))(), x), {}, like=torch.empty(0, dtype=F64))
    program = lower(network)
    value = program.evaluate(torch.arange(9.0, dtype=F64))[-1]
    assert value.tolist() == [0, 3, 1, 4, 2, 5, 6, 7, 8, 3, 3, 0, 1, 2, 3, 4, 5]
    assert kinds(program) == ["Variable", "Sparse"]
    assert kinds(lower(network, [x, y])) == ["Variable", "Sparse"]  # the outputs are a step of their own


def test_a_value_is_computed_once():
    x = Input("x", (4,))()
    wide = ew.RELU(reshape(x, (2, 2)))
    outputs = (Combine((1.0, 1.0))(ew.RELU(x), reshape(wide, (4,))), Multiply()(x, x))
    program = lower(Network((x,), outputs, {}))
    assert kinds(program) == ["Variable", "relu", "square", "Sparse+Sparse"]


def test_a_function_of_repeated_entries_is_computed_before_they_are_repeated():
    x = Input("x", (1, 3))()
    program = lower(Network((x,), (ew.TANH(Expand((5, 3))(x)),), {}))
    assert [step.size for step in program.steps] == [3, 3, 15]


@pytest.mark.parametrize(
    "kind", ["dense", "matmul left", "matmul right", "batched", "conv batch", "transpose", "kernel", "varying"]
)
def test_every_product_with_a_constant(kind):
    source = torch.Generator().manual_seed(5)

    def leaf(*shape: int) -> Node:
        return Constant("c", shape)()

    x = Input("x", (2, 2, 4))()
    conv = ((2,), (1,), (1,), 2)
    node, c = {
        "dense": lambda: (Dense()(c := leaf(3, 4), Reshape((4, 4))(x)), c),
        "matmul left": lambda: (MatMul()(c := leaf(2, 3, 2), x), c),
        "matmul right": lambda: (MatMul()(Reshape((1, 4, 4))(x), c := leaf(1, 4, 3)), c),
        "batched": lambda: (MatMul()(x, c := leaf(2, 4, 3)), c),
        "conv batch": lambda: (Conv(*conv)(x, c := leaf(4, 1, 3)), c),
        "transpose": lambda: (ConvTranspose(*conv, (8,))(x, c := leaf(2, 3, 3)), c),
        "kernel": lambda: (ConvKernel(*conv, (3,))(c := leaf(2, 4, 8), x), c),
        "varying": lambda: (Conv((1,), (0,), (1,), 1)(c := leaf(1, 2, 7), Reshape((2, 2, 4))(x)), c),
    }[kind]()
    value = torch.randn(c.shape, generator=source, dtype=F64)
    network = Network((x,), (ew.RELU(node),), {c: value})
    program = lower(network)
    assert_computes(program, network)
    assert all(isinstance(part, (Matrix, Convolution, Sparse)) for part in maps(program))


# -- what cannot be lowered


def test_missing_rules_name_the_node():
    x, y = Input("x", (1, 1, 4))(), Input("y", (1, 1, 2))()
    large = Input("a", (1, 1, 2**13))(), Input("b", (1, 1, 5))()
    conv = Conv((1,), (0,), (1,), 1)
    with pytest.raises(MissingRule, match="here"):
        lower(Network(large, (conv(*large, origin="here"),), {}))
    assert_computes(lower(network := Network((x, y), (conv(x, y),), {})), network)
    with pytest.raises(MissingRule, match="floor"):
        lower(Network((x,), (Rounding("floor")(x),), {}))
    w = Parameter("w", (1, 1, 4))()
    with pytest.raises(MissingRule, match="finite"):
        lower(Network((x,), (Combine((1.0, 1.0))(x, w),), {w: torch.full((1, 1, 4), -math.inf)}))
    third = Combine((1.0, -1.0))(Multiply()(w, w), Multiply()(w, w))
    with pytest.raises(MissingRule, match="cancels"):
        lower(Network((x,), (Multiply()(x, third),), {w: torch.full((1, 1, 4), 0.1)}))
    fixed = Combine((1.0, 1.0))(x, Rounding("floor")(w))  # rounding a constant is no obstacle
    assert_computes(lower(network := Network((x,), (fixed,), {w: torch.full((1, 1, 4), 1.5)})), network)


def test_a_wrong_lowering_is_refused(monkeypatch):
    network = NETWORKS["pools"]()
    image, movement, layer = compose._image, lowering._movement, lowering._layer

    def dropped_bias(outer, error, bias, bias_error):
        result, lost = image(outer, error, bias, bias_error)
        return torch.zeros_like(result), lost

    def flipped(node, slot):
        found = movement(node, slot)
        return replace(found, values=-found.values)

    def shifted(node, slot):
        found = movement(node, slot)
        return replace(found, columns=found.columns.roll(1))

    def single(node, slot, constant):
        return layer(node, slot, constant.half().double())

    faults = {"_image": [dropped_bias], "_movement": [flipped, shifted], "_layer": [single]}
    for name, variants in faults.items():
        for wrong in variants:
            with monkeypatch.context() as patch:
                patch.setattr(compose if name == "_image" else lowering, name, wrong)
                with pytest.raises(CaptureMismatch):
                    lower(network)
    lower(network)


def test_points_of_comparison_come_closer_until_all_is_finite(monkeypatch):
    steep = function(ew.EXP, 5000.0)
    lower(steep)
    wrong = lowering._movement
    monkeypatch.setattr(lowering, "_layer", lambda node, slot, c: wrong(node, slot))
    monkeypatch.setattr(lowering._Lowering, "_scaled", lambda self, value, factor: value)
    with pytest.raises(CaptureMismatch):  # 5000 has become 1, and the network overflows at nearly every point
        lower(steep)


def test_a_program_that_cannot_be_compared_is_refused():
    network = function(ew.LOG, 1.0, -5.0)
    with pytest.raises(MissingRule, match="could not be compared"):
        lower(network)
    lower(network, region={network.input: (torch.full((3,), 6.0).double(), torch.full((3,), 7.0).double())})


def test_a_jump_decided_by_rounding_is_no_defect(monkeypatch):
    network, right = function(ew.STEP), lowering._Lowering._function

    def moved(to: float) -> None:
        step = replace(ew.STEP, breaks=(to,), kernel=None)
        monkeypatch.setattr(lowering._Lowering, "_function", lambda self, op, value: right(self, step, value))

    moved(1e-12)
    lower(network, region=box(network, -1.0, 1.0))
    with pytest.raises(MissingRule, match="at a jump"):  # but somewhere they have to agree
        lower(network, region=box(network, 5e-13, 5e-13))
    moved(0.5)
    for ends in ((-1.0, 1.0), (0.2, 0.2)):
        with pytest.raises(CaptureMismatch):
            lower(network, region=box(network, *ends))
