"""Linear bounds: no sampled value escapes, affine networks are exact, ReLU networks are as the textbook says."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bounds.test_interval import MODELS, networks
from torch import Tensor, nn

from soundly.bounds import linear
from soundly.bounds.interval import Interval, interval_bounds
from soundly.bounds.linear import linear_bounds
from soundly.bounds.relaxation import Lines
from soundly.errors import InvalidInput, MissingRule
from soundly.graph import elementwise as ew
from soundly.graph.composite import Maximum, MaxPool, Normalise, Rounding, Softmax
from soundly.graph.evaluate import Plan
from soundly.graph.from_torch import from_torch
from soundly.graph.linear import Combine, Concat, Sum, reshape
from soundly.graph.network import Network
from soundly.graph.node import Fill, Input, Node, Parameter
from soundly.graph.product import Dense, MatMul, Multiply

F64 = torch.float64
Region = dict[Node, tuple[Tensor, Tensor]]


def units(node: Node, dtype: torch.dtype = F64) -> Tensor:
    """A row per entry of the node, and two more."""
    size = math.prod(node.shape)
    rows = torch.cat([torch.eye(size), torch.ones(1, size), torch.linspace(-1, 1, size)[None]])
    return rows.to(dtype).reshape(-1, *node.shape)


def values(network: Network, node: Node, region: Region, seed: int = 0, count: int = 24) -> Tensor:
    """[samples, *node] in float64 at random points and corners of the region."""
    source = torch.Generator().manual_seed(seed)
    wide, found = network.to(F64), []
    plan = Plan([node], stop=region)
    for i in range(count):
        point = {}
        for n, (lower, upper) in region.items():
            unit = torch.rand(lower.shape, generator=source, dtype=F64)
            unit = unit.round() if i % 2 else unit
            point[n] = torch.lerp(lower.double(), upper.double(), unit).clamp(lower.double(), upper.double())
        found.append(plan({**wide.values, **point}, dtype=F64, device=torch.device("cpu"))[0])
    return torch.stack(found)


def assert_bounded(network: Network, node: Node, region: Region, seed: int = 0, **kwargs) -> tuple[Tensor, Tensor]:
    """No sample escapes (but for the rounding of its own evaluation), and no bound is looser than the interval's."""
    rows = units(node, network.dtype)
    lower, upper = linear_bounds(network, rows, region, of=node, **kwargs)
    assert lower.shape == upper.shape == (len(rows),) and lower.dtype == upper.dtype == network.dtype
    assert not bool(torch.isnan(lower).any() | torch.isnan(upper).any()) and bool((lower <= upper).all())
    got = values(network, node, region, seed).flatten(1) @ rows.double().flatten(1).T
    error = 1e-12 * (1 + got.abs()).nan_to_num(0.0)
    known = torch.isfinite(got)
    escaped = known & ((got < lower.double() - error) | (got > upper.double() + error))
    assert not bool(escaped.any()), f"{node}: {got[escaped][0]} lies outside"
    plain = interval_bounds(network, region, [node])[node]
    size = math.prod(node.shape)
    slack = 1e-12 if network.dtype == F64 else 1e-5
    for ours, theirs, sign in ((lower, plain.lower, 1), (upper, plain.upper, -1)):
        theirs = theirs.reshape(-1)
        allowed = torch.where(torch.isfinite(theirs), slack * (1 + theirs.abs()), 0.0)
        assert bool((sign * ours[:size] >= sign * theirs - allowed).all()), "looser than the interval"
    return lower, upper


def ranging(
    network: Network, eps: float, seed: int, inputs: bool = True, weights: bool = False
) -> tuple[Network, Region]:
    """A network in float64 and boxes around a point and around its first weight; what does not range is fixed."""
    source = torch.Generator().manual_seed(seed)
    network, x = network.to(F64), network.input
    centre = torch.randn(x.shape, generator=source, dtype=F64)
    region = {x: (centre - eps, centre + eps)} if inputs else {}
    used = [p for p in network.parameters.values() if p in network.nodes]
    if weights and used:
        value = network.values[used[0]]
        region[used[0]] = (value - eps / 4, value + eps / 4)
    if not inputs:
        network = Network(network.inputs, network.outputs, {**network.values, x: centre})
    return network, region


# -- soundness


@settings(max_examples=40, derandomize=True)
@given(
    networks(),
    st.sampled_from([0.0, 1e-6, 0.01, 0.3, 2.0]),
    st.sampled_from([(True, False), (True, True), (False, True)]),
    st.integers(0, 100),
)
def test_no_value_escapes_in_outputs_and_gradients(network, eps, which, seed):
    """Inputs, weights or both ranging."""
    gradient = network.gradient(of=1)
    for net in (network, gradient):
        net, region = ranging(net, eps, seed, *which)
        assert_bounded(net, net.output, region, seed)


@settings(max_examples=15, derandomize=True)
@given(networks(), st.sampled_from([0.0, 1e-3, 0.3]), st.integers(0, 100))
def test_bounds_in_float32_hold_for_the_reals(network, eps, seed):
    x = network.input
    centre = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    for net in (network, network.gradient(of=1)):
        assert_bounded(net, net.output, {x: (centre - eps, centre + eps)}, seed)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eps", [0.0, 0.02])
def test_no_value_escapes_in_captured_models(name, eps):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    x = torch.randn(shape)
    network = from_torch(make().eval(), x).to(F64)
    for net in (network, network.gradient(of=1)):
        assert_bounded(net, net.output, {net.input: (x.double() - eps, x.double() + eps)})


def one(op, *shapes, low=-1.0, high=2.0) -> tuple[Network, Region]:
    """An operation between two dense layers, in float64."""
    source = torch.Generator().manual_seed(0)
    inputs = [Input(f"x{i}", s)() for i, s in enumerate(shapes)]
    mixed, parameters = [], {}
    for i, x in enumerate(inputs):
        weight = Parameter(f"w{i}", (x.shape[-1], x.shape[-1]))()
        parameters[weight] = torch.randn(weight.shape, generator=source, dtype=F64) / 2
        mixed.append(Dense()(x, weight))
    network = Network(tuple(inputs), (op(*mixed),), parameters)
    return network, {x: (torch.full(x.shape, low, dtype=F64), torch.full(x.shape, high, dtype=F64)) for x in inputs}


COMPOSITES = [
    (Softmax(1), (2, 3)),
    (MaxPool((2, 2), (1, 1), (0, 0), (1, 1)), (1, 2, 3, 3)),
    (Normalise((1,), 1e-3), (2, 4)),
    (Normalise((1,), 1e-3, centred=False), (2, 4)),
    (Maximum(), (2, 3), (2, 3)),
    (Rounding("floor"), (2, 3)),
]


@pytest.mark.parametrize("op, shapes", [(op, shapes) for op, *shapes in COMPOSITES], ids=lambda v: str(v)[:30])
def test_composites_are_bounded_by_their_expansion_or_their_own_interval(op, shapes):
    for low, high in ((-1.0, 2.0), (0.3, 0.35), (0.5, 0.5)):
        network, region = one(op, *shapes, low=low, high=high)
        y = network.output
        weight = Parameter("head", (2, y.shape[-1]))()
        head = network.with_outputs(Dense()(y, weight))
        head = Network(
            head.inputs,
            head.outputs,
            {**head.values, weight: torch.tensor([[1.0, -1.0] * 4]).double()[:, : y.shape[-1]].repeat(2, 1)},
        )
        for node in (y, head.output):
            assert_bounded(head, node, region)


def test_a_composite_without_expansion_counts_with_its_interval():
    network, region = one(Rounding("round"), (1, 2), low=-1.0, high=2.0)
    lower, upper = linear_bounds(network, units(network.output), region)
    plain = interval_bounds(network, region)[network.output]
    assert lower[:2].tolist() == pytest.approx(plain.lower[0].tolist())
    assert upper[:2].tolist() == pytest.approx(plain.upper[0].tolist())
    shifted = network.with_outputs(Combine((1.0, 1.0))(network.output, network.output))
    assert_bounded(shifted, shifted.output, region)


def test_softmax_stays_within_zero_and_one():
    """Its expansion alone does not know that."""
    x = Input("x", (1, 4))()
    network = Network((x,), (Softmax(1)(x),), {}, like=torch.empty(0, dtype=F64))
    region = {x: (torch.full((1, 4), -5.0, dtype=F64), torch.full((1, 4), 5.0, dtype=F64))}
    lower, upper = linear_bounds(network, torch.eye(4, dtype=F64).reshape(4, 1, 4), region)
    assert bool((lower >= 0).all() & (upper <= 1 + 1e-12).all())
    inner = network.with_outputs(Multiply()(network.output, x))
    assert_bounded(inner, inner.output, region)


# -- exactness


def corners(network: Network, region: Region) -> Tensor:
    """The output at every corner of the region: for networks affine in each ranging entry, its exact range."""
    found = []
    for choice in itertools.product((0, 1), repeat=sum(lower.numel() for lower, _ in region.values())):
        at, point = 0, {}
        for n, (lower, upper) in region.items():
            pick = torch.tensor(choice[at : at + lower.numel()]).reshape(lower.shape)
            point[n], at = torch.where(pick == 1, upper, lower), at + lower.numel()
        plan = Plan([network.output], stop=region)
        found.append(plan({**network.values, **point}, dtype=network.dtype, device=network.device)[0].reshape(-1))
    return torch.stack(found)


def test_affine_networks_have_their_exact_range():
    """Two dense layers and a skip connection: intervals lose, linear bounds do not."""
    source = torch.Generator().manual_seed(0)
    x = Input("x", (2, 3))()
    w, v = Parameter("w", (3, 3))(), Parameter("v", (3, 3))()
    hidden = Dense()(x, w)
    y = Sum((0,))(Combine((1.0, -0.7, 1.0))(Dense()(hidden, v), x, Fill(0.1, (2, 3))()))
    parameters = {n: torch.randn(3, 3, generator=source, dtype=F64) for n in (w, v)}
    network = Network((x,), (Concat(0)(y, Combine((-2.0,))(y)),), parameters)
    region = {x: (-torch.rand(2, 3, generator=source, dtype=F64), torch.rand(2, 3, generator=source, dtype=F64))}
    lower, upper = assert_bounded(network, network.output, region)
    rows = units(network.output).flatten(1)
    exact = corners(network, region) @ rows.T
    torch.testing.assert_close(lower, exact.amin(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(upper, exact.amax(0), rtol=0, atol=1e-12)
    plain = interval_bounds(network, region)[network.output]
    assert float((upper - lower)[:6].sum()) < 0.8 * float((plain.upper - plain.lower).sum())


def test_stable_relus_are_exact():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    x = torch.randn(1, 3, dtype=F64)
    network = from_torch(module, x)
    region = {network.input: (x - 1e-3, x + 1e-3)}
    lower, upper = linear_bounds(network, units(network.output), region)
    exact = corners(network, region) @ units(network.output).flatten(1).T
    torch.testing.assert_close(lower, exact.amin(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(upper, exact.amax(0), rtol=0, atol=1e-12)


def test_weights_alone_ranging_in_one_layer_are_exact():
    source = torch.Generator().manual_seed(0)
    x, w = Input("x", (1, 3))(), Parameter("w", (2, 3))()
    network = Network((x,), (Dense()(x, w),), {x: torch.randn(1, 3, generator=source, dtype=F64)})
    region = {w: (-torch.rand(2, 3, generator=source, dtype=F64), torch.rand(2, 3, generator=source, dtype=F64))}
    lower, upper = assert_bounded(network, network.output, region)
    exact = corners(network, region) @ units(network.output).flatten(1).T
    torch.testing.assert_close(lower, exact.amin(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(upper, exact.amax(0), rtol=0, atol=1e-12)


def textbook(layers: list[tuple[np.ndarray, np.ndarray]], low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, ...]:
    """CROWN with adaptive slopes for dense ReLU networks, met with intervals; no row for a stable neuron."""
    bounds = []

    def backward(a: np.ndarray, depth: int) -> np.ndarray:
        constant = np.zeros(len(a))
        for i in reversed(range(depth)):
            weight, bias = layers[i]
            constant, a = constant + a @ bias, a @ weight
            if i:
                below, above = bounds[i - 1]
                crossing = (below < 0) & (above > 0)
                gap = np.where(crossing, above - below, 1)
                steep = np.where(crossing, above / gap, below >= 0)
                flat = np.where(crossing, above > -below, below >= 0)
                constant = constant + np.minimum(a, 0) @ np.where(crossing, -above * below / gap, 0)
                a = np.maximum(a, 0) * flat + np.minimum(a, 0) * steep
        return constant + np.maximum(a, 0) @ low + np.minimum(a, 0) @ high

    before = low, high
    for depth, (weight, bias) in enumerate(layers, 1):
        plus, minus = np.maximum(weight, 0), np.minimum(weight, 0)
        below, above = plus @ before[0] + minus @ before[1] + bias, plus @ before[1] + minus @ before[0] + bias
        wanted = ((below < 0) & (above > 0)) | (depth == len(layers))
        unit = np.eye(len(weight))
        below = np.where(wanted, np.maximum(below, backward(unit, depth)), below)
        above = np.where(wanted, np.minimum(above, -backward(-unit, depth)), above)
        bounds.append((below, above))
        before = np.maximum(below, 0), np.maximum(above, 0)
    return bounds[-1]


@pytest.mark.parametrize("sizes", [(3, 6, 2), (4, 10, 10, 3), (5, 12, 12, 12, 4)])
@pytest.mark.parametrize("eps", [0.01, 0.1, 0.5])
def test_relu_networks_are_bounded_as_in_the_textbook(sizes, eps):
    torch.manual_seed(sum(sizes))
    modules = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())][:-1]
    module = nn.Sequential(*modules).double()
    x = torch.randn(1, sizes[0], dtype=F64)
    network = from_torch(module, x)
    rows = torch.eye(sizes[-1], dtype=F64).unsqueeze(1)
    lower, upper = linear_bounds(network, rows, {network.input: (x - eps, x + eps)})
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in modules if isinstance(m, nn.Linear)]
    low, high = textbook(layers, (x - eps)[0].numpy(), (x + eps)[0].numpy())
    np.testing.assert_allclose(lower.numpy(), low, rtol=0, atol=1e-10)
    np.testing.assert_allclose(upper.numpy(), high, rtol=0, atol=1e-10)


def test_a_product_has_the_middle_planes():
    """xy over a box, by hand: the planes through the centre, met with the four corners."""
    x, y = Input("x", (1,))(), Input("y", (1,))()
    network = Network((x, y), (Combine((1.0, -1.0))(Multiply()(x, y), x),), {}, like=torch.empty(0, dtype=F64))
    tensor = lambda v: torch.tensor([v], dtype=F64)  # noqa: E731
    region = {x: (tensor(1.0), tensor(3.0)), y: (tensor(2.0), tensor(4.0))}
    lower, upper = linear_bounds(network, torch.ones(1, 1, dtype=F64), region)
    # xy - x lies between 3 x + 2 y - 6 - 1 - x and 3 x + 2 y - 6 + 1 - x; at best 2 + 4 - 7 = -1 and 6 + 8 - 5 = 9.
    assert (float(lower), float(upper)) == pytest.approx((-1.0, 9.0))


# -- other nodes, other arguments


def test_any_node_may_be_bounded():
    torch.manual_seed(0)
    x = torch.randn(1, 4, dtype=F64)
    network = from_torch(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), x)
    region = {network.input: (x - 0.1, x + 0.1)}
    for node in network.nodes:
        assert_bounded(network, node, region)
    assert_bounded(network, reshape(ew.SQUARE(network.output), (3,)), region)


def test_bounds_of_inner_nodes_replace_the_computed_ones():
    torch.manual_seed(0)
    x = torch.randn(1, 4, dtype=F64)
    network = from_torch(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), x)
    (inner,) = [n for n in network.nodes if n.op == ew.TANH]
    box = torch.full((1, 5), 0.25, dtype=F64)
    region = {network.input: (x - 9, x + 9), inner: (-box, box)}
    lower, upper = linear_bounds(network, units(network.output), region)
    exact = corners(network, {inner: (-box, box)}) @ units(network.output).flatten(1).T
    torch.testing.assert_close(lower, exact.amin(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(upper, exact.amax(0), rtol=0, atol=1e-12)


def test_chunks_do_not_change_the_numbers():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4)
    network = from_torch(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).eval(), x).to(F64)
    region = {network.input: (x.double() - 0.05, x.double() + 0.05)}
    rows = units(network.output)
    whole = linear_bounds(network, rows, region)
    for chunk in (1, 7, 100, 10**4):
        for a, b in zip(whole, linear_bounds(network, rows, region, chunk=chunk), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_rows_give_no_bounds():
    network, region = one(ew.RELU, (1, 3))
    lower, upper = linear_bounds(network, torch.zeros(0, 1, 3, dtype=F64), region)
    assert lower.shape == upper.shape == (0,)


def test_constants_are_points():
    x = Input("x", (2,))()
    c, f = Parameter("c", (2,))(), Fill(0.1, (2,))()
    network = Network((x,), (Concat(0)(x, c, f),), {c: torch.tensor([1.0, -2.0], dtype=F64)})
    region = {x: (torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))}
    lower, upper = linear_bounds(network, torch.eye(6, dtype=F64), region)
    assert lower.tolist() == pytest.approx([0, 0, 1, -2, 0.1, 0.1]) and upper.tolist() == pytest.approx(
        [1, 1, 1, -2, 0.1, 0.1]
    )
    for node in (c, f, x, ew.RELU(c), Softmax(0)(c)):
        assert_bounded(network, node, region)


# -- what is not known


def test_unknown_values_give_infinite_bounds_and_never_nan():
    x = Input("x", (3,))()
    y = Multiply()(ew.RECIPROCAL(x), ew.EXP(x))
    network = Network((x,), (Combine((1.0, -1.0))(y, ew.SQUARE(y)),), {}, like=torch.empty(0, dtype=F64))
    lower = torch.tensor([-1.0, 1.0, -math.inf], dtype=F64)
    upper = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    low, high = linear_bounds(network, torch.eye(3, dtype=F64), {x: (lower, upper)})
    assert torch.isinf(low).tolist() == torch.isinf(high).tolist() == [True, False, True]
    assert low[0] == -math.inf and high[0] == math.inf
    assert not bool((torch.isfinite(low) & (low > 0))[[0, 2]].any())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_makes_everything_after_it_unknown(value):
    weight, x = Parameter("w", (2, 2))(), Input("x", (1, 2))()
    network = Network((x,), (Dense()(ew.RELU(x), weight),), {weight: torch.tensor([[value, 1.0], [0.0, 1.0]])})
    region = {x: (torch.ones(1, 2), torch.full((1, 2), 2.0))}
    lower, upper = linear_bounds(network, torch.eye(2).unsqueeze(1), region)
    assert (float(lower[0]), float(upper[0])) == (-math.inf, math.inf)
    assert not bool(torch.isnan(lower).any() | torch.isnan(upper).any())


def test_overflow_is_unknown():
    network, region = one(lambda x: ew.EXP(ew.EXP(ew.EXP(x))), (1, 2), low=-1.0, high=40.0)
    lower, upper = linear_bounds(network, units(network.output), region)
    assert bool((upper == math.inf).any()) and not bool(torch.isnan(lower).any() | torch.isnan(upper).any())


def test_bad_arguments_are_refused():
    network, region = one(ew.RELU, (1, 3))
    good = torch.ones(1, 1, 3, dtype=F64)
    for rows in (good[0], good[0, 0], good.reshape(1, 3, 1), good.float(), good * math.nan, good / 0):
        with pytest.raises(InvalidInput, match="rows"):
            linear_bounds(network, rows, region)
    with pytest.raises(MissingRule, match="no value"):
        linear_bounds(network, good, {})
    (x,) = region
    with pytest.raises(InvalidInput, match="region"):
        linear_bounds(network, good, {x: region[x][::-1]})


# -- planted faults


def caught(monkeypatch, target: object, name: str, broken) -> bool:
    """Whether the checks above notice a fault on a few networks."""

    def sample(f):
        yield one(lambda a, b: Combine((1.0, -0.5))(f(a), b), (2, 2), (2, 2))
        yield one(lambda a: Dense()(Combine((1.0, -0.5))(f(a), a), a), (2, 2))
        yield one(lambda a, b: Combine((1.0, -1.0, 0.5))(Multiply()(f(a), b), a, b), (2, 2), (2, 2))
        yield one(lambda a, b: MatMul()(Multiply()(f(a), Combine((1.0, -1.0))(b, a)), f(b)), (2, 2), (2, 2))

    monkeypatch.setattr(target, name, broken)
    try:
        for network, region in itertools.chain(sample(ew.RELU), sample(ew.TANH)):
            for width in (3.0, 0.5):
                assert_bounded(network, network.output, {x: (low, low + width) for x, (low, _) in region.items()})
    except AssertionError:
        return True
    finally:
        monkeypatch.undo()
    return False


def test_the_checks_pass_without_a_fault(monkeypatch):
    assert not caught(monkeypatch, linear, "_ball", linear._ball)


def test_planes_through_a_wrong_corner_are_caught(monkeypatch):
    right = linear._ball
    assert caught(monkeypatch, linear, "_ball", lambda x: (right(x)[0], right(x)[1] / 2))
    assert caught(monkeypatch, linear, "_ball", lambda x: (x.lower, right(x)[1]))
    assert caught(monkeypatch, linear, "_ball", lambda x: (right(x)[0], right(x)[1] * 0))


def test_lines_swapped_for_negative_coefficients_are_caught(monkeypatch):
    right = linear.default_lines

    def swapped(op, lower, upper):
        lines = right(op, lower, upper)
        return Lines(lines.slope_low, lines.offset_low, lines.slope_low, lines.offset_low)

    assert caught(monkeypatch, linear, "default_lines", swapped)


def test_forgotten_offsets_are_caught(monkeypatch):
    right = linear.default_lines

    def forgotten(op, lower, upper):
        lines = right(op, lower, upper)
        return lines._replace(offset_high=0 * lines.offset_high, offset_low=0 * lines.offset_low)

    assert caught(monkeypatch, linear, "default_lines", forgotten)


def test_overwritten_coefficients_of_shared_nodes_are_caught(monkeypatch):
    """A node's contributions come as a list; only the last one for each input survives here."""
    right = linear._Pass._back
    seen: dict[int, set[Node]] = {}

    def overwritten(self, node, a, total):
        done = seen.setdefault(id(total), set())
        parts = right(self, node, a, total)
        kept = [(c, p if c not in done else 0 * p) for c, p in parts]
        done.update(c for c, _ in parts)
        return kept

    assert caught(monkeypatch, linear._Pass, "_back", overwritten)


def test_rounding_that_is_not_accounted_for_is_caught(monkeypatch):
    """In float32 a sum of numbers that cancel is off by more than nothing."""
    x, w = Input("x", (1, 64))(), Parameter("w", (64, 64))()
    source = torch.Generator().manual_seed(0)
    y = Dense()(Dense()(x, w), w)
    network = Network((x,), (y,), {w: torch.randn(64, 64, generator=source)})
    point = 1e3 * torch.randn(1, 64, generator=source)
    monkeypatch.setattr(linear, "_meet", lambda a, b: a)
    assert_bounded_alone(network, {x: (point, point.clone())})
    monkeypatch.setattr(linear._Total, "lose", lambda *args: None)
    with pytest.raises(AssertionError):
        assert_bounded_alone(network, {x: (point, point.clone())})


def assert_bounded_alone(network: Network, region: Region) -> None:
    rows = units(network.output, torch.float32)
    lower, upper = linear_bounds(network, rows, region)
    got = values(network, network.output, region, count=2).flatten(1) @ rows.double().flatten(1).T
    assert bool(((lower.double() <= got) & (got <= upper.double())).all())


def test_expansions_that_are_not_met_with_the_composite_are_caught(monkeypatch):
    right = linear._expanded
    monkeypatch.setattr(linear, "_expanded", lambda *args: dataclasses.replace(right(*args), new={}, wholes=()))
    with pytest.raises(AssertionError):
        test_softmax_stays_within_zero_and_one()


def test_expansions_are_met_with_the_composite_over_tightened_inputs():
    """The scores cancel, which intervals do not see; the softmax of the tightened scores is nearly constant."""
    x, w = Input("x", (1, 3))(), Parameter("w", (3, 3))()
    scores = Combine((1.0, -1.0))(Dense()(x, w), Combine((1.0,))(Dense()(x, w)))
    network = Network((x,), (Softmax(1)(scores),), {w: torch.randn(3, 3, dtype=F64)})
    region = {x: (torch.full((1, 3), -2.0, dtype=F64), torch.full((1, 3), 2.0, dtype=F64))}
    lower, upper = linear_bounds(network, torch.eye(3, dtype=F64).unsqueeze(1), region)
    assert lower.tolist() == pytest.approx([1 / 3] * 3) and upper.tolist() == pytest.approx([1 / 3] * 3)
    plain = interval_bounds(network, region)[network.output]
    assert bool((plain.upper - plain.lower > 0.5).all())


def test_intervals_are_met_as_promised():
    a = Interval(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0]))
    b = Interval(torch.tensor([0.5, 0.0]), torch.tensor([2.0, 1.0]))
    met = linear._meet(a, b)
    assert met.lower.tolist() == [0.5, 0.0] and met.upper.tolist() == [1.0, 1.0]
