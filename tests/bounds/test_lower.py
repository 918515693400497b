"""Lowering: a program computes what its network computes, in few steps, and its recorded errors contain the truth."""

import math
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bounds.test_interval import networks
from torch import Tensor, nn

from soundly.bounds import compose
from soundly.bounds import lower as lowering
from soundly.bounds.lines import bent, lines
from soundly.bounds.lower import lower, staircase
from soundly.bounds.program import Affine, Convolution, Function, Matrix, Program, Sparse, Times, Variable
from soundly.errors import CaptureMismatch, InvalidInput, MissingRule
from soundly.graph import elementwise as ew
from soundly.graph.composite import Rounding
from soundly.graph.from_torch import from_torch
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
from soundly.graph.node import Constant, Fill, Input, Node, Parameter, dependents, topological
from soundly.graph.product import Conv, ConvKernel, ConvTranspose, Dense, MatMul, Multiply

F64 = torch.float64


class Block(nn.Module):
    """A residual block with batch normalisation, and a shortcut with a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.norm2, self.short = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1, stride=2)
        self.stem, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.norm2(self.two(torch.relu(self.norm(self.one(x)))))
        z = torch.relu(y + self.short(x))
        w = torch.relu(self.norm2(self.two(z)) + z)
        return self.head(w.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v)


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(2, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.max_pool2d(torch.tanh(self.conv(x / 3 - 0.1)), 2, padding=1)
        z = nn.functional.avg_pool2d(y, 2, stride=1).permute(0, 2, 3, 1).permute(0, 3, 1, 2)
        return torch.cat([self.up(z).flatten(1), y.flatten(1)[:, ::3]], 1).abs()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def made(module: nn.Module, *shape: int, seed: int = 0) -> Network:
    """The captured module, with random weights and running statistics."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.dtype.is_floating_point:
                value.copy_(torch.randn(value.shape, generator=source) / math.sqrt(max(1, value[0].numel())))
            if name.endswith("running_var"):
                value.abs_().add_(0.5)
    return from_torch(module.eval(), (torch.zeros(1, *shape),))


def mlp(activation: type[nn.Module] = nn.ReLU) -> Network:
    return made(nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 6), activation(), nn.Linear(6, 3)), 4)


def convnet() -> Network:
    layers = [nn.Conv2d(1, 3, 3, stride=2), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)]
    return made(nn.Sequential(*layers), 1, 7, 7)


NETWORKS = {
    "mlp": mlp,
    "convnet": convnet,
    "residual": lambda: made(Block(), 2, 6, 6),
    "pools": lambda: made(Pools(), 2, 8, 8),
    "attention": lambda: made(Attention(), 3, 4),
    "lstm": lambda: made(Recurrent(), 3, 3),
    "gradient of relu": lambda: mlp().gradient(of=1),
    "gradient of tanh": lambda: mlp(nn.Tanh).gradient(of=2),
    "gradient of weights": lambda: mlp().gradient(of=0, wrt="0.weight"),
    "gradient of convnet": lambda: convnet().gradient(of=1),
    "gradient of kernel": lambda: convnet().gradient(of=0, wrt="2.weight"),
    "gradient of attention": lambda: made(Attention(), 3, 4).gradient(of=3),
}


def assert_computes(program: Program, network: Network, tolerance: float = 1e-10, count: int = 5) -> None:
    wide = network.to(F64)
    points = torch.randn(count, program.inputs, generator=torch.Generator().manual_seed(7), dtype=F64)
    found = program.evaluate(points)[-1]
    for point, y in zip(points, found, strict=True):
        pieces = point.split([math.prod(n.shape) for n in network.inputs])
        truth = wide.evaluate(
            network.outputs, *(p.reshape(n.shape) for p, n in zip(pieces, network.inputs, strict=True))
        )
        truth = torch.cat([t.reshape(-1) for t in truth])
        assert bool(((y - truth).abs() <= tolerance * (1 + truth.abs())).all())


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


@pytest.mark.parametrize("name", NETWORKS)
def test_pull_is_the_transpose_of_apply(name):
    source = torch.Generator().manual_seed(1)
    for part in maps(lower(NETWORKS[name]())):
        m, n = part.size
        x, y = torch.randn(2, n, generator=source, dtype=F64), torch.randn(2, m, generator=source, dtype=F64)
        forth, back = (y * part.apply(x)).sum(-1), (part.pull(y) * x).sum(-1)
        assert torch.allclose(forth, back, rtol=1e-12, atol=1e-12)


def kinds(program: Program) -> list[str]:
    def kind(step) -> str:
        if isinstance(step, Affine):
            return "+".join(type(part).__name__ for part, _ in step.parts)
        return str(step.op) if isinstance(step, Function) else type(step).__name__

    return [kind(step) for step in program.steps]


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


# -- rounding


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


@settings(max_examples=60, deadline=None)
@given(network=linear_networks())
def test_recorded_errors_contain_exact_arithmetic(network):
    program = lower(network)
    assert_computes(program, network, 1e-9)
    assert enclosed(program, POINT, exact_values(network, POINT))


@settings(max_examples=60, deadline=None)
@given(network=networks())
def test_random_graphs_compute_the_same(network):
    assert_computes(lower(network), network, 1e-8, count=2)


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


# -- the check


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


def box(network: Network, low: float, high: float) -> dict[Node, tuple[Tensor, Tensor]]:
    return {n: tuple(torch.full(n.shape, end, dtype=F64) for end in (low, high)) for n in network.inputs}


def function(op: ew.Elementwise, factor: float = 1.0, shift: float = 0.0) -> Network:
    x = Input("x", (3,))()
    moved = Combine((factor, 1.0))(x, Fill(shift, (3,))())
    return Network((x,), (op(moved),), {}, like=torch.empty(0, dtype=F64))


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


# -- rounding to whole numbers

ROUNDINGS = ["floor", "ceil", "trunc", "round"]
RANGES = [(-3.0, 4.0), (-2.5, 1.5), (0.2, 0.4), (-0.3, 0.3), (0.5, 0.5), (1.0, 1.0), (-7.75, -3.1), (140.5, 150.0)]
rounding = pytest.mark.parametrize("kind", ROUNDINGS)
ranges = pytest.mark.parametrize("ends", RANGES, ids=str)


def covering(low: float, high: float) -> Tensor:
    """A grid with every whole number and half, and their neighbours."""
    middle = torch.arange(math.floor(low), math.ceil(high) + 1, 0.5, dtype=F64)
    near = [middle, *(torch.nextafter(middle, torch.full_like(middle, end)) for end in (-math.inf, math.inf))]
    points = torch.cat([torch.linspace(low, high, 1001, dtype=F64), *near, torch.tensor([low, high], dtype=F64)])
    return points[(low <= points) & (points <= high)]


@rounding
@ranges
def test_a_staircase_is_the_rounding_on_its_range(kind, ends):
    op = Rounding(kind)
    f, x = staircase(op, *ends), covering(*ends)
    assert torch.equal(f.apply(x), op.apply(x))
    assert torch.equal(f._evaluate(x), op.apply(x)), "pieces and kernel differ"
    far = torch.cat([x, torch.tensor([-1e9, 1e9, -0.5, 0.5, 0.0], dtype=F64), torch.randn(99, dtype=F64) * 9])
    assert torch.equal(f._evaluate(far), f.apply(far))
    assert f.derivative.is_zero and not f.derivative.apply(x).any()
    assert len(f.breaks) <= ends[1] - ends[0] + 1


@rounding
@ranges
def test_enclosures_and_lines_of_a_staircase_hold_both_sides_of_its_jumps(kind, ends):
    f = staircase(Rounding(kind), *ends)
    x = covering(*ends)
    pick = torch.randint(len(x), (2, 400), generator=torch.Generator().manual_seed(2))
    low, high = x[pick].amin(0), x[pick].amax(0)
    least, greatest = f.enclose(low, high)
    found, straight = lines(f, low, high), ~bent(f, low, high)
    jumps = torch.tensor(f.breaks, dtype=F64)
    for t, at in ((x, x), (jumps - 1e-9, jumps), (jumps + 1e-9, jumps)):  # at a jump both sides count
        inside = (low <= at[:, None]) & (at[:, None] <= high)
        y, at = f.apply(t)[:, None], at[:, None]
        assert bool(((least <= y) & (y <= greatest))[inside].all())
        assert bool((found.slope_low * at + found.offset_low <= y + 1e-9)[inside].all())
        assert bool((y <= found.slope_high * at + found.offset_high + 1e-9)[inside].all())
        assert bool((y == f.apply(low))[inside & straight & (low < high)].all())


def rounded() -> Network:
    """Each kind of rounding, of a layer and of sums of roundings."""
    inner = mlp()
    y = Combine((5.0,))(inner.outputs[0])
    floor, ceil = Rounding("floor")(y), Rounding("ceil")(Combine((0.5,))(y))
    sums = Combine((1.0, 1.0, 0.3))(floor, ceil, y)
    output = Combine((1.0, 2.0))(Rounding("round")(sums), Rounding("trunc")(Combine((0.7,))(sums)))
    return replace(inner, outputs=(output,))


def test_roundings_are_lowered_over_a_region():
    network = rounded()
    program = lower(network, region=box(network, -0.5, 1.0))
    wide = network.to(F64)
    x = torch.rand(200, 4, generator=torch.Generator().manual_seed(8), dtype=F64) * 1.5 - 0.5
    truth = torch.stack([wide(point[None])[0] for point in x])
    assert torch.allclose(program.evaluate(x)[-1], truth, rtol=1e-9, atol=1e-9)
    beyond = 40 * x  # where the staircases have ended
    far = torch.stack([wide(point[None])[0] for point in beyond])
    assert not torch.allclose(program.evaluate(beyond)[-1], far, rtol=1e-9, atol=1e-9)
    with pytest.raises(MissingRule, match="64 steps"):
        lower(network, region=box(network, -50.0, 50.0))
    with pytest.raises(MissingRule, match="region"):
        lower(network)
    with pytest.raises(InvalidInput, match="region"):
        lower(network, region={})


def test_a_region_that_reaches_no_jump_has_constants():
    network = function(ew.RELU, 0.2, 0.5)
    whole = Network(network.inputs, (Rounding("floor")(network.outputs[0]),), {}, like=network.like)
    program = lower(whole, region=box(whole, -1.0, 1.0))
    assert kinds(program) == ["Variable", ""]
    assert program.evaluate(torch.rand(5, 3, dtype=F64))[-1].tolist() == [[0.0] * 3] * 5


@pytest.mark.parametrize("fault", ["floor", "few"])
def test_wrong_staircases_are_noticed(monkeypatch, fault):
    def wrong(op: Rounding, low: float, high: float) -> ew.Elementwise:
        return staircase(Rounding("floor"), low, high) if fault == "floor" else staircase(op, low, high / 2)

    network = function(ew.RELU, 8.0)
    whole = Network(network.inputs, (Rounding("round")(network.outputs[0]),), {}, like=network.like)
    lower(whole, region=box(whole, -1.0, 1.0))
    monkeypatch.setattr(lowering, "staircase", wrong)
    with pytest.raises(CaptureMismatch):
        lower(whole, region=box(whole, -1.0, 1.0))


def test_many_steps_are_fast():
    f, x = staircase(Rounding("round"), -32.0, 31.0), torch.rand(10**6, dtype=F64) * 63 - 32
    assert len(f.breaks) >= 60
    assert torch.equal(f.apply(x), x.round())
    assert f.special_points and f.kernel is not None


# -- products with a constant


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
