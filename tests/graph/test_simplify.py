"""Simplified and folded networks compute the same numbers, and named places stay what they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from soundly.graph import elementwise as ew
from soundly.graph.composite import Maximum
from soundly.graph.differentiate import differentiate
from soundly.graph.fold import fold_affine, fold_constants
from soundly.graph.from_torch import from_torch
from soundly.graph.linear import Combine, Concat, Embed, Expand, Gather, Permute, Reshape, ScatterAdd, Slice, Sum
from soundly.graph.network import Network
from soundly.graph.node import Constant, Fill, Input, Node, Parameter
from soundly.graph.product import Conv, Multiply
from soundly.graph.simplify import simplify

SHAPE = (2, 3)


# Every rewriting rule of simplify, and the operations around it, as maps from [2, 3] and [2, 3] to [2, 3].
STEPS = [
    lambda a, b: Combine((1.0, 1.0))(a, b),
    lambda a, b: Combine((1.0, -1.0))(a, b),
    lambda a, b: Combine((2.0, 0.0, 1.0))(a, b, a),
    lambda a, b: Combine((1.0, 1.0, 1.0))(a, Fill(0.5, SHAPE)(), Fill(-0.25, SHAPE)()),
    lambda a, b: Combine((1.0, -1.0))(a, a),
    lambda a, b: Combine((0.5,))(a),
    lambda a, b: Combine((-1.0,))(Combine((3.0,))(a)),
    lambda a, b: Multiply()(a, b),
    lambda a, b: Multiply()(a, Fill(1.0, SHAPE)()),
    lambda a, b: Multiply()(Fill(0.0, SHAPE)(), a),
    lambda a, b: Multiply()(Fill(-2.0, SHAPE)(), a),
    lambda a, b: Reshape(SHAPE)(Reshape((6,))(a)),
    lambda a, b: Reshape(SHAPE)(a),
    lambda a, b: Permute((1, 0))(Permute((1, 0))(a)),
    lambda a, b: Permute((1, 0))(Reshape((3, 2))(a)),
    lambda a, b: Expand(SHAPE)(Sum((0,))(a)),
    lambda a, b: Expand(SHAPE)(Expand((1, 3))(Sum((0, 1))(a))),
    lambda a, b: Expand(SHAPE)(Sum((0,))(Fill(1.5, SHAPE)())),
    lambda a, b: Embed((0, 1), (1, 1), SHAPE)(Slice((0, 0), (2, 2), (1, 1))(a)),
    lambda a, b: Embed((0, 0), (1, 2), SHAPE)(Fill(0.0, (2, 2))()),
    lambda a, b: Embed((0, 0), (1, 2), SHAPE)(Fill(1.0, (2, 2))()),
    lambda a, b: Slice((0, 0), SHAPE, (1, 1))(a),
    lambda a, b: Slice((1, 0), SHAPE, (1, 1))(Concat(0)(a, b)),
    lambda a, b: Gather(0, (1, 0))(a),
    lambda a, b: ScatterAdd(1, (2, 0, 2), 3)(b),
    lambda a, b: ew.RELU(a),
    lambda a, b: ew.TANH(Combine((0.3,))(a)),
    lambda a, b: ew.STEP.derivative(a),
    lambda a, b: Maximum()(a, b),
]


@st.composite
def networks(draw) -> Network:
    """A random graph on two inputs and a parameter, some of its values named, one or two of them outputs."""
    x, y, w = Input("x", SHAPE)(), Input("y", SHAPE)(), Parameter("w", SHAPE)()
    nodes: list[Node] = [x, y, w, Fill(draw(st.sampled_from([0.0, 1.0, 0.5])), SHAPE)()]
    for _ in range(draw(st.integers(1, 12))):
        step = draw(st.sampled_from(STEPS))
        recent = st.sampled_from(nodes[-5:])
        nodes.append(step(draw(recent), draw(st.sampled_from(nodes))))
    named = draw(st.lists(st.sampled_from(nodes[3:]), max_size=3))
    outputs = [nodes[-1], *draw(st.lists(st.sampled_from(nodes), max_size=1))]
    value = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(SHAPE)
    return Network((x, y), tuple(outputs), {w: value}, {f"place {i}": n for i, n in enumerate(named)})


def inputs(seed: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=source, dtype=torch.float64) for _ in range(2)]


def equal(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert bool(((got - want).abs() <= tolerance * (1 + want.abs())).all())


@settings(max_examples=150, derandomize=True)
@given(networks(), st.integers(0, 10))
def test_random_networks_compute_the_same_from_no_more_nodes(network, seed):
    smaller = simplify(network)
    assert len(smaller.nodes) <= len(network.nodes)
    x = inputs(seed)
    for got, want in zip(smaller.evaluate(smaller.outputs, *x), network.evaluate(network.outputs, *x), strict=True):
        equal(got, want)
    for folded in (fold_constants(network), fold_constants(network, parameters=True), fold_affine(network)):
        for got, want in zip(folded.evaluate(folded.outputs, *x), network.evaluate(network.outputs, *x), strict=True):
            equal(got, want)


@settings(max_examples=150, derandomize=True)
@given(networks(), st.integers(0, 10))
def test_random_places_keep_their_value_and_their_gradient(network, seed):
    smaller, x = simplify(network), inputs(seed)
    for name, new in smaller.places.items():
        old = network.places[name]
        equal(*smaller.evaluate([new], *x), *network.evaluate([old], *x))
        cotangent = Fill(1.0, SHAPE)()
        for output, original in zip(smaller.outputs, network.outputs, strict=True):
            (got,) = differentiate(output, [new], seed=cotangent)
            (want,) = differentiate(original, [old], seed=cotangent)
            equal(*smaller.evaluate([got], *x), *network.evaluate([want], *x))


def test_simplifying_twice_changes_nothing_more():
    x = Input("x", SHAPE)()
    y = Multiply()(Reshape(SHAPE)(Reshape((6,))(x)), Fill(1.0, SHAPE)())
    once = simplify(Network((x,), (Combine((2.0, -1.0))(y, y),), {}))
    assert once.outputs == (x,)
    assert simplify(once).outputs == once.outputs


def test_equal_values_are_computed_once():
    x = Input("x", SHAPE)()
    network = simplify(Network((x,), (ew.TANH(x), ew.TANH(x), ew.RELU(x)), {}))
    assert network.outputs[0] is network.outputs[1] and len(network.nodes) == 3


def test_functions_that_differ_in_the_seventh_digit_are_two():
    x = Input("x", SHAPE)()
    a, b = ew.elu(1.0, 1.0, 0.33333331), ew.elu(1.0, 1.0, 0.33333332)
    assert a != b and ew.power(0.33333331) != ew.power(0.33333332)
    assert len(simplify(Network((x,), (a(x), b(x)), {})).nodes) == 3


@pytest.mark.parametrize(
    "build",
    [
        lambda wall: Reshape(SHAPE)(wall),
        lambda wall: Permute((1, 0))(wall),
        lambda wall: Combine((0.5,))(wall),
        lambda wall: Multiply()(wall, Fill(1.0, wall.shape)()),
    ],
)
def test_places_are_walls(build):
    """A chain that would collapse without the named value in its middle keeps it."""
    x = Input("x", SHAPE)()
    for inner in (Reshape((3, 2)), Permute((1, 0)), Combine((2.0,))):
        wall = inner(x)
        output = build(wall)
        network = simplify(Network((x,), (output,), {}, {"wall": wall}))
        assert network.at("wall") in network.nodes and network.at("wall").op == inner


def test_a_named_constant_is_not_swallowed():
    """Its factor and the other constants of the sum all survive, and the gradient towards it is right."""
    x, wall = Input("x", SHAPE)(), Fill(3.0, SHAPE)()
    output = Combine((1.0, 2.0, 1.0, 1.0))(x, wall, Fill(1.0, SHAPE)(), Fill(2.0, SHAPE)())
    network = simplify(Network((x,), (output,), {}, {"wall": wall}))
    zeros = torch.zeros(SHAPE)
    assert torch.equal(network(zeros), torch.full(SHAPE, 9.0))
    (slope,) = differentiate(network.output, [network.at("wall")], seed=Fill(1.0, SHAPE)())
    assert torch.equal(*network.evaluate([slope], zeros), torch.full(SHAPE, 2.0))


def test_infinite_constants_are_left_alone():
    x = Input("x", SHAPE)()
    output = Combine((1.0, 1.0, 1.0))(x, Fill(float("inf"), SHAPE)(), Fill(float("-inf"), SHAPE)())
    network = simplify(Network((x,), (output,), {}))
    assert bool(torch.isnan(network(torch.zeros(SHAPE))).all())


# -- folding


class Normed(nn.Module):
    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.3, 3.0)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


LAYERS = {
    "conv": (lambda: Normed(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (2, 3, 5, 5)),
    "conv with bias": (lambda: Normed(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (1, 3, 5, 5)),
    "grouped": (lambda: Normed(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (1, 4, 5, 5)),
    "depthwise": (lambda: Normed(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), (1, 3, 5, 5)),
    "one dimension": (lambda: Normed(nn.Conv1d(3, 4, 3, stride=2), nn.BatchNorm1d(4)), (1, 3, 7)),
    "dense": (lambda: Normed(nn.Linear(3, 4), nn.BatchNorm1d(4)), (5, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_batch_norm_is_folded_into_the_layer_before_it(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    module = make().double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    network = from_torch(module, x)
    folded = fold_affine(network)
    equal(folded(x), module(x))
    equal(folded.gradient(of=3)(x), network.gradient(of=3)(x))
    assert not folded.parameters and not any(isinstance(n.op, Multiply) for n in folded.nodes)
    assert sum(isinstance(n.op, (Constant,)) for n in folded.nodes) == 2
    equal(network(x), module(x))


def test_a_shared_layer_is_not_touched():
    """Where something else also reads the convolution, a folded weight would change that too."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normed = Normed(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.normed.conv(x)
            return self.normed.norm(y) + torch.tanh(y)

    torch.manual_seed(0)
    module = Shared().double().eval()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    folded = fold_affine(from_torch(module, x))
    equal(folded(x), module(x))
    assert sum(isinstance(n.op, Conv) for n in folded.nodes) == 1


def test_a_layer_that_is_an_output_is_not_touched():
    module = LAYERS["conv with bias"][0]().double().eval()
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    network = from_torch(module, x)
    both = network.with_outputs(network.at("conv"), network.output)
    for got, want in zip(fold_affine(both)(x), both(x), strict=True):
        equal(got, want)


def test_folding_a_residual_network_and_reading_it_as_constant():
    torch.manual_seed(0)
    one, two = LAYERS["conv"][0](), Normed(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = one, two, nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            return self.head((x + self.two(x)).mean((2, 3)))

    module = Net().double().eval()
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    network = from_torch(module, x)
    equal(fold_affine(network)(x), module(x))
    constant = fold_constants(network, parameters=True)
    equal(constant(x), module(x))
    assert not constant.parameters and network.parameters
    kept = fold_constants(network)
    assert set(kept.parameters) == set(network.parameters)
