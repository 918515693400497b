"""Interval enclosures: no value escapes, whatever ranges; nothing unknown looks known; simple ranges are exact."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.test_every_op import assert_enclosed
from torch import Tensor, nn

from soundly.bounds import interval
from soundly.bounds.interval import Interval, interval_bounds
from soundly.errors import InvalidInput, MissingRule
from soundly.graph import elementwise as ew
from soundly.graph.composite import Maximum, MaxPool, Normalise, Softmax
from soundly.graph.differentiate import differentiate
from soundly.graph.from_torch import from_torch
from soundly.graph.linear import Combine, Concat, Sum, broadcast
from soundly.graph.network import Network
from soundly.graph.node import Input, Node, Parameter, topological
from soundly.graph.product import Conv, Dense, MatMul, Multiply

ACTIVATIONS = [ew.RELU, ew.TANH, ew.SIGMOID, ew.GELU, ew.SILU, ew.ABS, ew.SQUARE, ew.SIN, ew.leaky_relu(0.1)]
BATCH, WIDTH = 2, 4


def step(x: Node, y: Node, weight: Node, kind: str, activation: ew.Elementwise) -> Node:
    """One more layer on [BATCH, WIDTH]."""
    match kind:
        case "dense":
            return activation(Dense()(x, weight))
        case "multiply":
            return Multiply()(activation(x), y)
        case "residual":
            return Combine((1.0, -0.3))(activation(x), y)
        case "attention":
            scores = MatMul()(x, Dense()(weight, y))
            return MatMul()(Softmax(1)(scores), y)
        case "norm":
            return Multiply()(Normalise((1,), 1e-3)(x), activation(y))
        case "mean":
            return activation(Combine((0.25, 1.0))(broadcast(Sum((1,))(x), x.shape), y))
        case "maximum":
            return Maximum()(activation(x), y)
    raise AssertionError(kind)


KINDS = ["dense", "multiply", "residual", "norm", "mean", "maximum", "dense"]


@st.composite
def networks(draw) -> Network:
    """A random network of an input and some weights, with branches."""
    x = Input("x", (BATCH, WIDTH))()
    seed = draw(st.integers(0, 1000))
    source = torch.Generator().manual_seed(seed)
    nodes, values = [x], {}
    for i in range(draw(st.integers(1, 4))):
        weight = Parameter(f"w{i}", (WIDTH, WIDTH))()
        values[weight] = torch.randn(weight.shape, generator=source) * draw(st.sampled_from([0.3, 1.0]))
        kind, activation = draw(st.sampled_from(KINDS)), draw(st.sampled_from(ACTIVATIONS))
        nodes.append(step(nodes[-1], draw(st.sampled_from(nodes)), weight, kind, activation))
    return Network((x,), (nodes[-1],), values)


@settings(max_examples=60, derandomize=True)
@given(networks(), st.sampled_from([0.0, 1e-6, 0.01, 0.3, 3.0]), st.booleans(), st.integers(0, 100))
def test_no_value_escapes_in_outputs_and_gradients(network, eps, weights_range, seed):
    """At every node of the network and of two of its gradients, inputs, weights or both ranging."""
    source = torch.Generator().manual_seed(seed)
    x = network.input
    used = [p for p in network.parameters.values() if p in network.nodes]
    centre = torch.randn(x.shape, generator=source)
    region = {x: (centre - eps, centre + eps)}
    if weights_range and used:
        value = network.values[used[0]]
        region[used[0]] = (value - eps / 4, value + eps / 4)
        if seed % 3 == 0:
            network = Network(network.inputs, network.outputs, {**network.values, x: region.pop(x)[0]})
    entry = network.entry(1)
    slopes = differentiate(entry, [x, *used[:1]])
    assert_enclosed(network, topological([*network.outputs, *slopes]), region, seed)


MODELS = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
        ),
        (1, 2, 4, 4),
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True), (1, 3, 4)),
    "recurrent": (lambda: nn.Sequential(nn.Linear(3, 3), nn.GRUCell(3, 2)), (2, 3)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_no_value_escapes_in_captured_models(name, eps):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    x = torch.randn(shape)
    network = from_torch(make().eval(), x)
    (slope,) = differentiate(network.entry(1), [network.input])
    assert_enclosed(network, topological([network.output, slope]), {network.input: (x - eps, x + eps)})


def test_the_network_in_its_own_type_is_enclosed_in_any_order_of_summation():
    """Sums of numbers that cancel: every order of adding them stays inside, and so does the exact sum."""
    values = torch.tensor([1e8, 1.0, -1e8, 1e-3] * 8)
    weight = Parameter("w", (1, 32))()
    x = Input("x", (32,))()
    network = Network((x,), (Dense()(x, weight),), {weight: torch.ones(1, 32)})
    lower, upper = interval_bounds(network, {x: (values, values)})[network.output]
    for order in range(20):
        shuffled = values[torch.randperm(32, generator=torch.Generator().manual_seed(order))]
        total = torch.zeros(())
        for v in shuffled:
            total = total + v
        assert float(lower) <= float(total) <= float(upper)
    assert float(lower) <= float(values.double().sum()) <= float(upper)


# -- kinks


def clarke(op: ew.Elementwise, low: float, high: float) -> tuple[float, float]:
    x = Input("x", (1,))()
    gradient = Network((x,), (op(x),), {}).gradient(of=0)
    lower, upper = interval_bounds(gradient, {x: (torch.tensor([low]), torch.tensor([high]))})[gradient.output]
    return float(lower), float(upper)


@pytest.mark.parametrize(
    "op, low, high, expected",
    [
        (ew.RELU, 0.0, 0.0, (0, 1)),
        (ew.RELU, 0.0, 1.0, (0, 1)),
        (ew.RELU, -1.0, 0.0, (0, 1)),
        (ew.RELU, 0.1, 1.0, (1, 1)),
        (ew.RELU, -1.0, -0.1, (0, 0)),
        (ew.ABS, -0.5, 0.5, (-1, 1)),
        (ew.clip(0.0, 6.0), 6.0, 7.0, (0, 1)),
        (ew.clip(0.0, 6.0), 6.5, 7.0, (0, 0)),
        (ew.leaky_relu(0.125), 0.0, 0.0, (0.125, 1)),
    ],
    ids=str,
)
def test_at_a_kink_the_derivative_is_the_clarke_set(op, low, high, expected):
    lower, upper = clarke(op, low, high)
    assert (lower, upper) == pytest.approx(expected, abs=1e-30)


def test_the_maximum_of_equal_values_has_both_gradients():
    x, y = Input("x", (1,))(), Input("y", (1,))()
    slopes = differentiate(Maximum()(x, y), [x, y])
    same = (torch.ones(1), torch.ones(1))
    bounds = interval_bounds(Network((x, y), slopes, {}), {x: same, y: same})
    for slope in slopes:
        lower, upper = bounds[slope]
        assert float(lower) <= 0 and 1 <= float(upper)


# -- what is unknown stays unknown


INFINITE = [(-math.inf, math.inf), (0.0, math.inf), (-math.inf, 0.0), (1e38, 3e38), (-3e38, 3e38)]


@pytest.mark.parametrize("low, high", INFINITE)
@settings(max_examples=15, derandomize=True)
@given(network=networks())
def test_unbounded_inputs_never_yield_wrong_bounds(low, high, network):
    """Values of float64 stay inside the bounds even where float32 overflows; nothing is NaN."""
    x = network.input
    shape = x.shape
    (slope,) = differentiate(network.entry(1), [x])
    nodes = topological([*network.outputs, slope])
    bounds = interval_bounds(network, {x: (torch.full(shape, low), torch.full(shape, high))}, nodes)
    wide = network.to(torch.float64)
    for magnitude in (0.0, 1.0, 30.0, 1e3, 1e9, 2e38):
        for sign in (-1.0, 1.0):
            value = sign * magnitude * torch.linspace(0.5, 1.0, math.prod(shape), dtype=torch.float64).reshape(shape)
            if bool((value < low).any() | (value > high).any()):
                continue
            for node, got in zip(nodes, wide.evaluate(nodes, value), strict=True):
                lower, upper = (b.double() for b in bounds[node])
                assert not bool(torch.isnan(lower).any() | torch.isnan(upper).any())
                known = torch.isfinite(got)
                assert bool(((lower <= got) & (got <= upper))[known].all()), f"{node} escapes at {sign * magnitude}"


def test_products_of_zero_and_infinity_are_unknown():
    x, y = Input("x", (1,))(), Input("y", (1,))()
    network = Network((x, y), (Multiply()(x, y),), {})
    region = {x: (torch.zeros(1), torch.zeros(1)), y: (torch.tensor([-math.inf]), torch.tensor([math.inf]))}
    lower, upper = interval_bounds(network, region)[network.output]
    assert (float(lower), float(upper)) == (-math.inf, math.inf)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_makes_everything_after_it_unknown(value):
    weight, x = Parameter("w", (2, 2))(), Input("x", (2,))()
    y = ew.SIGMOID(ew.RELU(Dense()(x, weight)))
    network = Network((x,), (y, Combine((1.0,))(weight)), {weight: torch.tensor([[value, 1.0], [0.0, 1.0]])})
    bounds = interval_bounds(network, {x: (torch.zeros(2), torch.ones(2))})
    assert all(not bool(torch.isnan(b).any()) for pair in bounds.values() for b in pair)
    lower, upper = bounds[network.outputs[1]]
    assert (float(lower[0, 0]), float(upper[0, 0])) == (-math.inf, math.inf)
    first = bounds[y]
    assert float(first.lower[0]) <= 0.5 and float(first.upper[0]) >= 1, "the whole range of sigmoid after ReLU"


def test_a_reciprocal_over_zero_is_unknown():
    x = Input("x", (4,))()
    network = Network((x,), (ew.RECIPROCAL(x),), {})
    lower, upper = torch.tensor([-1.0, 0.0, -1.0, 0.5]), torch.tensor([1.0, 1.0, 0.0, 2.0])
    bounds = interval_bounds(network, {x: (lower, upper)})[network.output]
    assert bool(torch.isinf(bounds.lower[:3]).all() & torch.isinf(bounds.upper[:3]).all())
    assert (float(bounds.lower[3]), float(bounds.upper[3])) == pytest.approx((0.5, 2.0), rel=1e-5)


def test_a_logarithm_left_of_its_domain_is_unknown():
    x = Input("x", (2,))()
    network = Network((x,), (ew.LOG(x),), {})
    region = {x: (torch.tensor([-2.0, -1.0]), torch.tensor([-1.0, 1.0]))}
    lower, upper = interval_bounds(network, region)[network.output]
    assert (float(lower[0]), float(upper[0])) == (-math.inf, math.inf)
    assert float(lower[1]) == -math.inf


# -- bad regions


def _square() -> Network:
    x = Input("x", (2,))()
    return Network((x,), (ew.SQUARE(x),), {})


@pytest.mark.parametrize(
    "lower, upper",
    [
        (torch.ones(2), torch.zeros(2)),
        (torch.tensor([0.0, math.nan]), torch.ones(2)),
        (torch.zeros(2), torch.full((2,), math.nan)),
        (torch.zeros(3), torch.ones(3)),
        (torch.zeros(1), torch.ones(1)),
        (torch.zeros(()), torch.ones(())),
        (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)),
        (torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)),
    ],
    ids=["crossed", "NaN below", "NaN above", "longer", "shorter", "scalar", "float64", "integer"],
)
def test_bad_regions_are_refused(lower, upper):
    network = _square()
    with pytest.raises(InvalidInput, match="region"):
        interval_bounds(network, {network.input: (lower, upper)})


def test_an_input_without_bounds_is_refused():
    with pytest.raises(MissingRule, match="no value"):
        interval_bounds(_square(), {})


def test_bounds_of_inner_nodes_replace_the_computed_ones():
    x = Input("x", (2,))()
    inner = Combine((2.0,))(x)
    network = Network((x,), (ew.RELU(inner),), {})
    box = (-torch.ones(2), torch.ones(2))
    bounds = interval_bounds(network, {x: box, inner: (torch.zeros(2), torch.full((2,), 0.5))})
    assert bounds[network.output].upper.tolist() == [0.5, 0.5]


# -- tightness


def test_softmax_is_exact_at_the_ends_and_within_zero_and_one():
    """The largest probability has its own score highest and all others lowest; the expansion could not say so."""
    x = Input("x", (1, 5))()
    network = Network((x,), (Softmax(1)(x),), {})
    source = torch.Generator().manual_seed(0)
    for width in (0.0, 0.1, 2.0, 50.0):
        lower = 3 * torch.randn(1, 5, generator=source)
        upper = lower + width * torch.rand(1, 5, generator=source)
        bounds = interval_bounds(network, {x: (lower, upper)})[network.output]
        for i in range(5):
            for own, others, got in ((upper, lower, bounds.upper), (lower, upper, bounds.lower)):
                point = others.clone()
                point[0, i] = own[0, i]
                exact = float(torch.softmax(point.double(), 1)[0, i])
                assert float(got[0, i]) == pytest.approx(exact, rel=1e-4, abs=1e-30)
        assert bool((bounds.lower >= 0).all()) and bool((bounds.upper <= 1 + 1e-4).all())


def test_a_variance_is_never_negative():
    x = Input("x", (1, 4))()
    network = Network((x,), (Normalise((1,), 1e-5)(x),), {})
    lower, upper = interval_bounds(network, {x: (-torch.ones(1, 4), torch.ones(1, 4))})[network.output]
    assert bool(torch.isfinite(lower).all() & torch.isfinite(upper).all())


EXACT = [
    (Combine((2.0, -1.0)), [(-1.0, 1.0), (0.0, 3.0)], (-5.0, 2.0)),
    (Multiply(), [(-1.0, 2.0), (-3.0, 5.0)], (-6.0, 10.0)),
    (Multiply(), [(2.0, 3.0), (-1.0, 0.0)], (-3.0, 0.0)),
    (Maximum(), [(-1.0, 0.5), (0.0, 0.25)], (0.0, 0.5)),
    (ew.RELU, [(-1.0, 2.0)], (0.0, 2.0)),
    (ew.SQUARE, [(-1.0, 2.0)], (0.0, 4.0)),
    (ew.ABS, [(-3.0, 2.0)], (0.0, 3.0)),
    (ew.TANH, [(-1.0, 2.0)], (math.tanh(-1), math.tanh(2))),
    (ew.COS, [(-1.0, 2.0)], (math.cos(2), 1.0)),
    (ew.SIN, [(1.0, 5.5)], (-1.0, 1.0)),
    (ew.EXP, [(-1.0, 1.0)], (math.exp(-1), math.e)),
    (ew.GELU, [(-3.0, 0.0)], (-0.16997120747990369, 0.0)),
    (ew.SILU, [(-3.0, 0.0)], (-0.27846454276107380, 0.0)),
]


@pytest.mark.parametrize("op, boxes, expected", EXACT, ids=lambda v: str(v))
def test_one_operation_has_its_exact_range(op, boxes, expected):
    nodes = [Input(f"x{i}", (1,))() for i in range(len(boxes))]
    network = Network(tuple(nodes), (op(*nodes),), {})
    region = {n: (torch.tensor([low]), torch.tensor([high])) for n, (low, high) in zip(nodes, boxes, strict=True)}
    lower, upper = interval_bounds(network, region)[network.output]
    assert (float(lower), float(upper)) == pytest.approx(expected, abs=2e-5)
    assert float(lower) <= expected[0] and expected[1] <= float(upper)


def test_linear_layers_with_fixed_weights_have_their_exact_range():
    """|W| maps the radius: enumeration of all corners gives the same."""
    source = torch.Generator().manual_seed(0)
    weight, x = Parameter("w", (3, 5))(), Input("x", (5,))()
    network = Network((x,), (Dense()(x, weight),), {weight: torch.randn(3, 5, generator=source)})
    lower, upper = -torch.rand(5, generator=source), torch.rand(5, generator=source)
    corners = torch.tensor([[(i >> j) & 1 for j in range(5)] for i in range(32)])
    values = torch.where(corners == 1, upper, lower).double() @ network.values[weight].double().T
    bounds = interval_bounds(network, {x: (lower, upper)})[network.output]
    torch.testing.assert_close(bounds.lower.double(), values.amin(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(bounds.upper.double(), values.amax(0), rtol=0, atol=1e-5)


def test_max_pooling_is_exact():
    x = Input("x", (1, 1, 4))()
    network = Network((x,), (MaxPool((2,), (2,), (0,), (1,))(x),), {})
    lower, upper = torch.tensor([[[-1.0, 0.0, 2.0, 1.0]]]), torch.tensor([[[3.0, 0.5, 2.5, 4.0]]])
    bounds = interval_bounds(network, {x: (lower, upper)})[network.output]
    assert bounds.lower.tolist() == [[[0.0, 2.0]]] and bounds.upper.tolist() == [[[3.0, 4.0]]]


def test_constants_stay_points_through_copies():
    x, weight = Input("x", (2,))(), Parameter("w", (2,))()
    network = Network((x,), (Concat(0)(weight, weight), Combine((-1.0,))(weight)), {weight: torch.tensor([0.1, 0.2])})
    bounds = interval_bounds(network, {x: (torch.zeros(2), torch.ones(2))})
    assert all(bounds[node].is_point for node in network.outputs)


# -- planted faults


def test_an_interval_without_cross_terms_is_caught(monkeypatch):
    def careless(self, op, node, a: Interval, b: Interval) -> Interval:
        return Interval(op.apply(a.lower, b.lower), op.apply(a.upper, b.upper))

    monkeypatch.setattr(interval._Intervals, "product", careless)
    a, b = Input("a", (1, 2, 3, 3))(), Input("b", (2, 2, 2, 2))()
    y = Conv((1, 1), (0, 0), (1, 1), 1)(a, b)
    region = {n: (-torch.ones(n.shape), torch.full(n.shape, 2.0)) for n in (a, b)}
    with pytest.raises(AssertionError, match="outside"):
        assert_enclosed(Network((a, b), (y,), {}), [y], region)


def test_the_sampling_itself_finds_a_box_that_is_too_small():
    x = Input("x", (3,))()
    y = ew.TANH(x)
    network = Network((x,), (y,), {})

    def shrunk(*args) -> dict[Node, tuple[Tensor, Tensor]]:
        return {node: (lower + 1e-6, upper - 1e-6) for node, (lower, upper) in interval_bounds(*args).items()}

    from tests.ops import test_every_op

    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="outside"):
        patch.setattr(test_every_op, "interval_bounds", shrunk)
        assert_enclosed(network, [y], {x: (torch.full((3,), 0.2), torch.full((3,), 0.3))})
