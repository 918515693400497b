"""The errors that a program records for its weights and biases contain the truth, in rational arithmetic."""

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bounds.samples import F64, assert_computes, made
from torch import Tensor, nn

from soundly.bounds import compose
from soundly.bounds import lower as lowering
from soundly.bounds.lower import lower
from soundly.bounds.program import Affine, Convolution, Program
from soundly.graph.linear import (
    Combine,
    Concat,
    Embed,
    Expand,
    Gather,
    Permute,
    Reshape,
    ScatterAdd,
    Slice,
    Sum,
    reshape,
)  # fmt: skip
from soundly.graph.network import Network
from soundly.graph.node import Constant, Fill, Input, Node, dependents, topological
from soundly.graph.product import Conv, ConvTranspose, Dense, MatMul, Multiply


def test_folded_batch_norm_contains_the_exact_weights():
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    (step,) = lower(made(module, 2, 3, 3)).steps[1:]
    ((layer, _),) = step.parts
    assert isinstance(layer, Convolution)
    assert 0 < step.weight_error < 1e-13 and 0 < float(step.bias_error.max()) < 1e-12

    def exact(name: str, *index: int) -> Decimal:
        return Decimal(float(module.state_dict()[name][index]))

    with localcontext() as context:
        context.prec = 60
        for o in range(3):
            scale = exact("1.weight", o) / (exact("1.running_var", o) + Decimal.from_float(1e-5)).sqrt()
            for c in range(2):
                stored = Decimal(float(layer.weight[o, c, 0, 0]))
                gap = abs(exact("0.weight", o, c, 0, 0) * scale - stored)
                assert 0 < gap <= Decimal(step.weight_error) * abs(stored)
            bias = (exact("0.bias", o) - exact("1.running_mean", o)) * scale + exact("1.bias", o)
            assert abs(bias - Decimal(float(step.bias[9 * o]))) <= Decimal(float(step.bias_error[9 * o]))


def exact_matrix(size: int, apply) -> list[list[tuple[int, Fraction]]]:
    """Rows of (column, coefficient) of a linear map whose coefficients are copied, not computed."""
    columns = torch.stack([apply(unit).reshape(-1) for unit in torch.eye(size, dtype=F64)], 1)
    return [[(int(j), Fraction(float(row[j]))) for j in row.nonzero()[:, 0]] for row in columns]


def exact_values(network: Network, point: list[Fraction]) -> list[Fraction]:
    """The network's output in rational arithmetic; all of its operations are linear in what varies."""
    values = {}
    order = topological(network.outputs)
    varying = dependents(order, network.inputs)
    for node in order:
        if node in network.inputs:
            values[node] = point
        elif isinstance(node.op, Fill):
            values[node] = [Fraction(node.op.value)] * math.prod(node.shape)
        elif not node.inputs:
            values[node] = [Fraction(v) for v in network.values[node].double().reshape(-1).tolist()]
        else:
            total = [Fraction(0)] * math.prod(node.shape)
            product = isinstance(node.op, (Multiply, Dense, Conv, MatMul, ConvTranspose))
            for slot, child in enumerate(node.inputs):
                if product and child not in varying and any(c in varying for c in node.inputs):
                    continue
                if product and not any(c in varying for c in node.inputs):
                    assert isinstance(node.op, Multiply)
                    total = [a * b for a, b in zip(*(values[c] for c in node.inputs), strict=True)]
                    break
                # Products are probed with positions, so that their constant may itself be any rational number.
                other = [torch.zeros(c.shape, dtype=F64) for c in node.inputs]
                if product:
                    fixed = node.inputs[1 - slot]
                    count = math.prod(fixed.shape)
                    other[1 - slot] = torch.arange(1.0, count + 1, dtype=F64).reshape(fixed.shape)

                def apply(unit, node=node, slot=slot, child=child, other=other):
                    return node.op.apply(*[unit.reshape(child.shape) if i == slot else v for i, v in enumerate(other)])

                for i, row in enumerate(exact_matrix(math.prod(child.shape), apply)):
                    for j, c in row:
                        factor = values[node.inputs[1 - slot]][int(c) - 1] if product else c
                        total[i] += factor * values[child][j]
            values[node] = total
    return values[network.outputs[0]]


def enclosed(program: Program, point: list[Fraction], truth: list[Fraction]) -> bool:
    """Whether the affine program with coefficients and biases anywhere within their errors can give the truth."""
    values = [[(v, v) for v in point]]
    for step in program.steps[1:]:
        assert isinstance(step, Affine)
        lost = step.bias_error if step.bias_error is not None else torch.zeros(step.size, dtype=F64)
        total = [
            (Fraction(b) - Fraction(e), Fraction(b) + Fraction(e))
            for b, e in zip(step.bias.tolist(), lost.tolist(), strict=True)
        ]
        for part, source in step.parts:
            for i, row in enumerate(exact_matrix(part.size[1], part.apply)):
                for j, c in row:
                    ends = [
                        c * f * x
                        for x in values[source][j]
                        for f in (1 - Fraction(step.weight_error), 1 + Fraction(step.weight_error))
                    ]
                    total[i] = total[i][0] + min(ends), total[i][1] + max(ends)
        values.append(total)
    return all(low <= t <= high for (low, high), t in zip(values[-1], truth, strict=True))


def layers(a: Node, b: Node, factors: tuple[float, float], constant: Callable[..., Node]) -> list[Callable[[], Node]]:
    """Everything linear that keeps the shape [2, 6]."""
    return [
        lambda: Permute((0, 1))(Reshape((2, 6))(Permute((1, 0))(a))),
        lambda: Embed((0, 1), (1, 2), (2, 6))(Slice((0, 0), (2, 3), (1, 2))(a)),
        lambda: Gather(1, (0, 0, 3, 5, 1, 3))(a),
        lambda: ScatterAdd(1, (0, 0, 3, 5, 1, 3), 6)(a),
        lambda: Expand((2, 6))(Sum((1,))(a)),
        lambda: Combine(factors)(a, b),
        lambda: Combine(factors)(b, a),
        lambda: Combine((0.3,))(a),
        lambda: Slice((0, 1), (2, 6), (1, 1))(Concat(1)(a, b)),
        lambda: Dense()(a, constant(6, 6)),
        lambda: Multiply()(a, Multiply()(constant(2, 6), constant(2, 6))),
        lambda: Multiply()(a, Expand((2, 6))(constant(1, 6))),
        lambda: Combine((1.0, 0.1))(a, Expand((2, 6))(constant(2, 1))),
        lambda: reshape(Conv((1,), (1,), (1,), 1)(Reshape((1, 2, 6))(a), constant(2, 2, 3)), (2, 6)),
        lambda: MatMul()(constant(2, 2), a),
    ]


@st.composite
def linear_networks(draw) -> Network:
    """A random graph of linear operations over a [2, 6] input, with constants of float32 and of float64."""
    source = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    x = Input("x", (2, 6))()
    nodes, weights = [x], {}

    def constant(*shape: int) -> Node:
        value = torch.randn(shape, generator=source, dtype=F64)
        leaf = Constant(f"c{len(weights)}", shape)()
        weights[leaf] = value.float().double() if len(weights) % 2 else value
        return leaf

    for kind in draw(st.lists(st.integers(0, 14), min_size=1, max_size=8)):
        a, b = nodes[-1], nodes[draw(st.integers(0, len(nodes) - 1))]
        factors = draw(st.sampled_from([(1.0, 1.0), (1.0, -1.0), (0.1, 0.7), (-0.5, 0.3), (1 / 3, -1 / 3)]))
        nodes.append(layers(a, b, factors, constant)[kind]())
    return Network((x,), (nodes[-1],), weights, like=torch.empty(0, dtype=F64))


POINT = [Fraction(k * k * 7 % 23 - 11, 8) for k in range(12)]


@settings(max_examples=60)
@given(network=linear_networks())
def test_recorded_errors_contain_exact_arithmetic(network):
    program = lower(network)
    assert_computes(program, network, 1e-9)
    assert enclosed(program, POINT, exact_values(network, POINT))


def chain(op: Callable[..., Node], count: int) -> Network:
    """One constant after the other is added to the input, or multiplied with it."""
    x, leaves = Input("x", (12,))(), [Constant(f"c{i}", (12,))() for i in range(count)]
    source, node = torch.Generator().manual_seed(3), x
    for leaf in leaves:
        node = op(node, leaf)
    return Network((x,), (node,), {leaf: torch.randn(12, generator=source, dtype=F64) for leaf in leaves})


def forgotten(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a + b, torch.zeros_like(a)


@pytest.mark.parametrize(
    ("name", "wrong", "network"),
    [
        ("_product_error", lambda a, b: 0.0, chain(Multiply(), 2)),
        ("_both", max, chain(Multiply(), 9)),
        ("_two_sum", forgotten, chain(Combine((1.0, 1.0)), 2)),
        ("_gamma", lambda steps: 0.0, chain(Combine((0.1, 1.0)), 3)),
        ("relative", lambda c, radius, node: (c, 0.0), chain(lambda x, c: Multiply()(x, Multiply()(c, c)), 1)),
    ],
)  # fmt: skip
def test_forgotten_rounding_is_noticed(monkeypatch, name, wrong, network):
    truth = exact_values(network, POINT)
    assert enclosed(lower(network), POINT, truth)
    monkeypatch.setattr(lowering if name == "relative" else compose, name, wrong)
    assert not enclosed(lower(network), POINT, truth)


def test_terms_that_cancel_are_not_added_up():
    """(1/3 x + c x) - 1/3 x: the rounding of the first sum is large beside what remains."""
    x = Input("x", (1,))()
    c = Combine((1.0, 1e-9))(x, x)
    network = Network((x,), (Combine((1.0, -1.0))(c, x),), {}, like=torch.empty(0, dtype=F64))
    program = lower(network)
    assert enclosed(program, [Fraction(1)], [Fraction(1e-9)])
    assert not any(step.weight_error > 1e-12 for step in program.steps if isinstance(step, Affine))
