"""Compiled rows against autograd, for any weights of the edited layer, and the decomposition into blocks.

The decisive test: put other weights into the model, compute the constrained quantity with reverse-mode autograd, and
find it in the rows. What holds for random weights holds for whatever the solver returns.
"""

import importlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.editing.test_trunk import Cnn, Decoder, Mlp, made
from torch import Tensor, nn

import soundly
from soundly import at
from soundly.editing.constraints import Constraint, Expression
from soundly.editing.program import Program, compile_program
from soundly.editing.rows import GRID
from soundly.editing.trunk import trunk_of
from soundly.errors import InvalidInput

compiler = importlib.import_module("soundly.editing.program")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def with_weights(model: nn.Module, weights: Tensor) -> nn.Module:
    """The model with weights [classes, K + 1] in its layer fc."""
    model.eval()
    with torch.no_grad():
        model.fc.weight.copy_(weights[:, :-1])
        if model.fc.bias is not None:
            model.fc.bias.copy_(weights[:, -1])
    return model


def gradient(model: nn.Module, x: Tensor, of: int, position: int = 0) -> Tensor:
    """dy/dx, flat, by reverse mode."""
    x = x.detach().clone().requires_grad_()
    y = model(x).reshape(-1, model.fc.out_features)[position, of]
    return torch.autograd.grad(y, x)[0].flatten()


def place_and_gradient(model: nn.Module, x: Tensor, of: int, position: int = 0) -> tuple[Tensor, Tensor]:
    """The value at the model's place and dy/d(it)."""
    seen: list[Tensor] = []
    hook = getattr(model, model.place).register_forward_hook(lambda m, args, out: seen.append(out))
    y = model(x).reshape(-1, model.fc.out_features)[position, of]
    hook.remove()
    return seen[0].detach(), torch.autograd.grad(y, seen[0])[0]


def gradcam(model: nn.Module, x: Tensor, of: int) -> Tensor:
    """Equations 1 and 2 of the paper without ReLU, flat."""
    features, slope = place_and_gradient(model, x, of)
    return (slope.mean((2, 3), keepdim=True) * features).sum(1).flatten()


def integrated(model: nn.Module, x: Tensor, start: Tensor, of: int, steps: int, position: int = 0) -> Tensor:
    """Gauss-Legendre quadrature of the gradient along the line, times the line, flat."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros(x.numel(), dtype=x.dtype)
    for node, weight in zip(nodes, weights, strict=True):
        total += weight / 2 * gradient(model, start + (node + 1) / 2 * (x - start), of, position)
    return total * (x - start).flatten()


def quantities(kind: type[nn.Module], x: Tensor, other: Tensor, position: int = 0):
    """Every expression at x (and another input), with how autograd computes it from a model."""
    p = at(x, position=None if kind is not Decoder else position, name="x")
    q = at(other, position=None if kind is not Decoder else position, name="other")
    k = position if kind is Decoder else 0
    few = [0, 3, x.numel() - 1]
    draw = torch.Generator().manual_seed(1)
    directions = torch.randn(3, *x.shape, generator=draw, dtype=torch.float64)
    groups = torch.randint(-1, 3, x.shape, generator=draw)
    groups.view(-1)[:4] = torch.tensor([0, 1, 2, -1])
    matrix = torch.randn(2, 3, generator=draw, dtype=torch.float64)

    def output(model, x, of):
        return model(x).detach().reshape(-1, model.fc.out_features)[k, of].reshape(1)

    def grouped(model):
        flat = integrated(model, x, 0.3 * other, 1, 4, k)
        return torch.stack([flat[groups.flatten() == t].sum() for t in range(3)])

    yield "output", p.output(2), lambda m: output(m, x, 2)
    yield "all gradients", p.gradient(1), lambda m: gradient(m, x, 1, k)
    yield "entries", p.gradient(0, entries=few), lambda m: gradient(m, x, 0, k)[few]
    yield "inner", p.gradient(2, place=kind.place), lambda m: place_and_gradient(m, x, 2, k)[1].flatten()
    yield "directional", p.directional(1, directions), lambda m: directions.flatten(1) @ gradient(m, x, 1, k)
    yield "groups", p.integrated_gradients(1, baseline=0.3 * other, steps=4, groups=groups), grouped
    yield (
        "difference",
        p.gradient(0, entries=few) - q.gradient(1, entries=few),
        lambda m: (gradient(m, x, 0, k) - gradient(m, other, 1, k))[few],
    )
    yield (
        "arithmetic",
        2.5 * -(p.output(0) - 0.5) + q.output(1) * 3 - p.output(2) + 0.25,
        lambda m: -2.5 * (output(m, x, 0) - 0.5) + 3 * output(m, other, 1) - output(m, x, 2) + 0.25,
    )
    yield (
        "combined",
        (p.gradient(0, entries=few) + torch.tensor([1.0, 2.0, 3.0])).combined(matrix) - 1.0,
        lambda m: matrix @ (gradient(m, x, 0, k)[few] + torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) - 1,
    )
    yield (
        "combined twice",
        (p.gradient(0, entries=few) - q.gradient(2, entries=few)).combined(matrix).combined(matrix[:, :2]),
        lambda m: matrix[:, :2] @ matrix @ (gradient(m, x, 0, k) - gradient(m, other, 2, k))[few],
    )
    yield "mixed", p.output(1) - q.gradient(1, entries=[0]), lambda m: output(m, x, 1) - gradient(m, other, 1, k)[:1]
    if kind is Cnn:
        yield "Grad-CAM", p.gradcam(3, "block"), lambda m: gradcam(m, x, 3)
        yield (
            "Grad-CAM change",
            p.gradcam(3, "block") - q.gradcam(1, "block"),
            lambda m: gradcam(m, x, 3) - gradcam(m, other, 1),
        )
    if kind is Mlp:
        yield "IG", p.integrated_gradients(2, baseline=other, steps=3), lambda m: integrated(m, x, other, 2, 3)


def compiled(model: nn.Module, x: Tensor, constraints: list[Constraint], graph: bool) -> Program:
    return compile_program(trunk_of(soundly.load(model, x) if graph else model, "fc"), constraints)


def random_weights(program: Program, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(program.weights.shape, generator=draw, dtype=torch.float64)


CASES = [(Cnn, True, 0), (Cnn, False, 0), (Mlp, True, 0), (Mlp, False, 0), (Decoder, True, 2), (Decoder, False, -1)]


def differences(kind: type[nn.Module], graph: bool, position: int, bias: bool = True) -> dict[str, float]:
    """Largest distance, per quantity, between the rows and autograd over random weights and the model's own."""
    model, x = made(kind, bias=bias)
    other = torch.randn_like(x)
    cases = list(quantities(kind, x, other, position))
    constraints = [e.within(-1000.0 - i, 1000.0 + i) for i, (_, e, _) in enumerate(cases)]
    program = compiled(model, x, constraints, graph)
    found = dict.fromkeys((name for name, _, _ in cases), 0.0)
    for seed in range(3):
        weights = random_weights(program, seed) if seed else program.weights
        if not bias:
            weights[:, -1] = 0
        rows = program.values(weights)
        copy = with_weights(model, weights)
        for (name, expression, reference), claim, i in zip(cases, program.claims, range(99), strict=False):
            # A constant is moved into the bounds: value + constant within [-b, b].
            span = slice(claim.start, claim.stop)
            constant = -1000.0 - i - program.lower[span]
            assert torch.allclose(constant, expression.constant.expand(len(constant)), atol=1e-9)
            assert torch.allclose(1000.0 + i - program.upper[span], constant, atol=1e-9)
            want = reference(copy)
            assert want.shape == rows[span].shape
            gap = (rows[span] + expression.constant - want).abs() / (1 + want.abs())
            found[name] = max(found[name], float(gap.max()))
    return found


@pytest.mark.parametrize(("kind", "graph", "position"), CASES)
def test_rows_are_the_quantities_for_any_weights(kind, graph, position):
    for name, gap in differences(kind, graph, position).items():
        assert gap < 1e-9, (name, gap)


@pytest.mark.parametrize("kind", [Cnn, Mlp, Decoder])
def test_rows_are_the_quantities_for_layers_without_bias(kind):
    for name, gap in differences(kind, True, 0, bias=False).items():
        assert gap < 1e-9, (name, gap)


def _wrong_sign(self, name, row, value, factor, lower, upper, right=compiler._Builder.add):
    right(self, name, row, value, -factor, lower, upper)


def _wrong_class(self, vector, cls, right=compiler._Builder.new_values):
    return right(self, vector, (cls + 1) % self.classes)


def _wrong_bias(self, functional, right=compiler._Builder.vectors_of):
    start, vectors = right(self, functional)
    vectors[:, -1] = 1.0
    return start, vectors


def _wrong_order(self, functional, right=compiler._Builder.vectors_of):
    start, vectors = right(self, functional)
    if len(vectors) > 1:
        vectors[[0, 1]] = vectors[[1, 0]].clone()
    return start, vectors


@pytest.mark.parametrize(
    ("method", "fault"),
    [("add", _wrong_sign), ("new_values", _wrong_class), ("vectors_of", _wrong_bias), ("vectors_of", _wrong_order)],
)
def test_faults_planted_in_the_compiler_are_seen(method, fault, monkeypatch):
    monkeypatch.setattr(compiler._Builder, method, fault)
    assert max(differences(Mlp, False, 0).values()) > 1e-3


# -- normalised maps


class Values(nn.Module):
    """y = W x, so that the gradient of class 0 is any map we like."""

    place = None

    def __init__(self, n: int, classes: int = 2) -> None:
        super().__init__()
        self.fc = nn.Linear(n, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def map_program(target: Tensor, eps: float, *, extremes=None, before: Tensor | None = None, **options) -> Program:
    """Rows for the gradient of class 0 of y = W x, whose entries are the weights themselves."""
    n = len(target)
    model = Values(n).double()
    with torch.no_grad():
        model.fc.weight[0] = target if before is None else before
    constraint = at(torch.zeros(1, n, dtype=torch.float64)).gradient(0).normalised_near(target, eps=eps, **options)
    return compile_program(trunk_of(model, "fc"), [constraint], extremes=None if extremes is None else {0: extremes})


def holds(program: Program, values: Tensor) -> bool:
    """Whether all rows hold exactly, in rational arithmetic, where the map is `values`."""
    weights = [*map(Fraction, values.tolist()), Fraction(0)]
    for i, (lower, upper) in enumerate(zip(program.lower.tolist(), program.upper.tolist(), strict=True)):
        row = Fraction(0)
        for k in range(int(program.row_start[i]), int(program.row_start[i + 1])):
            t = int(program.row_value[k])
            assert int(program.value_class[t]) == 0
            vector = map(Fraction, program.vectors[program.value_vector[t]].tolist())
            row += Fraction(float(program.row_coefficient[k])) * sum(
                v * w for v, w in zip(vector, weights, strict=True)
            )
        if not lower <= row <= upper:
            return False
    return True


def normalised(values: Tensor) -> list[Fraction]:
    exact = [Fraction(v) for v in values.tolist()]
    low, high = min(exact), max(exact)
    return [(v - low) / (high - low) for v in exact]


def near(values: Tensor, target: Tensor, eps: float) -> bool:
    """|n(values) - n(target)| <= eps exactly, with n(target) as the constraint computes it in float64."""
    flat = (target - target.min()) / (target.max() - target.min())
    pairs = zip(normalised(values), flat.tolist(), strict=True)
    return all(abs(a - Fraction(b)) <= Fraction(eps) for a, b in pairs)


maps = st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=6).filter(lambda v: max(v) > min(v))


@settings(max_examples=60)
@given(target=maps, eps=st.floats(1e-9, 0.49), seed=st.integers(0, 2**31), far=st.floats(0, 1.5))
def test_a_map_that_satisfies_the_rows_is_near_and_a_near_map_satisfies_rows(target, eps, seed, far):
    target = torch.tensor(target, dtype=torch.float64)
    flat = (target - target.min()) / (target.max() - target.min())
    draw = torch.Generator().manual_seed(seed)
    values = flat + far * eps * (2 * torch.rand(len(flat), generator=draw, dtype=torch.float64) - 1)
    if not float(values.max()) > float(values.min()):
        return
    spread = float(values.max() - values.min()) / 2
    constraint = at(torch.zeros(1, len(flat))).gradient(0).normalised_near(target, eps=eps)
    some = [holds(map_program(target, eps, extremes=pq, spread=spread), values) for pq in constraint.extremes()[:9]]
    if any(some):
        assert near(values, target, eps)
    # Conversely: a map that is near by more than the grid satisfies the rows for its own extremes.
    if near(values, target, eps - 2.0**-39):
        own = int(values.argmin()), int(values.argmax())
        assert own in constraint.extremes()
        assert holds(map_program(target, eps, extremes=own, spread=spread), values)


@pytest.mark.parametrize(
    "eps", [0.01, 0.25, 0.25 - 2**-40, 1 / 3, 2.0**-30, math.nextafter(0.125, 0), math.nextafter(0.5, 0)]
)
def test_corners_of_the_normalised_rows_are_inside(eps):
    # Targets at which target -+ eps meets 0, 1 or the grid, or rounds outwards.
    corners = [
        0.0,
        0.75,
        eps,
        math.nextafter(eps, 1),
        1 - eps,
        0.5,
        eps + 2**-40,
        1 / 3,
        0.1,
        math.nextafter(1.0, 0),
        1.0,
    ]
    target = torch.tensor(corners, dtype=torch.float64)
    program = map_program(target, eps)
    p, q = 0, len(target) - 1
    for row in range(len(program.lower) - 1):
        entries = range(int(program.row_start[row]), int(program.row_start[row + 1]))
        factor = {int(program.row_value[k]): Fraction(float(program.row_coefficient[k])) for k in entries}
        j = row // 2 + 1
        level = -factor.get(q, Fraction(0))
        assert factor[j] == 1 and factor.get(p, Fraction(0)) == level - 1  # exactly an interpolation of p and q
        want = Fraction(corners[j])
        if row % 2 == 0:
            assert program.lower[row] == 0 and program.upper[row] == math.inf
            assert 0 <= level and level >= want - Fraction(eps)
            assert level <= max(Fraction(0), want - Fraction(eps)) + Fraction(1, 2**39)
        else:
            assert program.lower[row] == -math.inf and program.upper[row] == 0
            assert level <= 1 and level <= want + Fraction(eps)
            assert level >= min(Fraction(1), want + Fraction(eps)) - Fraction(1, 2**39)


def test_the_spread_of_a_normalised_map_is_kept():
    target = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    program = map_program(target, 0.1, before=torch.tensor([3.0, 1.0, -1.0], dtype=torch.float64))
    assert float(program.lower[-1]) == pytest.approx(0.4)  # a tenth of the map's range
    assert not holds(program, torch.zeros(3, dtype=torch.float64))
    assert not holds(program, target * 0.39) and holds(program, target * 0.41)
    assert float(map_program(target, 0.1, spread=2.0).lower[-1]) == 2.0
    with pytest.raises(InvalidInput, match="spread"):
        map_program(target, 0.1, before=torch.ones(3, dtype=torch.float64))
    for spread in (0.0, -1.0, math.nan):
        with pytest.raises(InvalidInput, match="spread"):
            map_program(target, 0.1, spread=spread)


def test_a_grid_rounded_outwards_would_be_seen(monkeypatch):
    monkeypatch.setattr(compiler.torch, "ceil", torch.floor)
    with pytest.raises(AssertionError):
        test_corners_of_the_normalised_rows_are_inside(0.01)


def test_the_grid_makes_one_minus_a_factor_exact():
    assert all(Fraction(1 - k / GRID) == 1 - Fraction(k / GRID) for k in (1, 3, 2**39 - 1, 2**40 - 1, 123456789))


def test_normalised_maps_of_combinations_are_those_of_the_combined_values():
    model, x = made(Cnn)
    pool = torch.kron(torch.eye(4), torch.full((1, 4), 0.25)).double()
    expression = at(x).gradcam(1, "block").combined(pool)
    target = torch.tensor([0.0, 0.2, 1.0, 0.7])
    program = compiled(model, x, [expression.normalised_near(target, eps=0.1, spread=0.5)], True)
    for seed in range(1, 4):
        weights = random_weights(program, seed)
        pooled = pool @ gradcam(with_weights(model, weights), x, 1)
        low, high = pooled[0], pooled[2]
        want = [pooled[1] - low - 0.1 * (high - low), pooled[1] - low - 0.3 * (high - low)]
        want += [pooled[3] - low - 0.6 * (high - low), pooled[3] - low - 0.8 * (high - low), high - low]
        torch.testing.assert_close(program.values(weights), torch.stack(want), rtol=1e-9, atol=1e-9)
    assert torch.equal(program.lower, torch.tensor([0, -math.inf, 0, -math.inf, 0.5], dtype=torch.float64))
    assert torch.equal(program.upper, torch.tensor([math.inf, 0, math.inf, 0, math.inf], dtype=torch.float64))


# -- top sets and classes


def test_the_top_set_is_kept_exactly_where_the_rows_hold():
    mask = torch.tensor([True, False, True, False, False])
    model = Values(5).double()
    constraint = at(torch.zeros(1, 5, dtype=torch.float64)).gradient(0).keeps_top(mask, margin=0.25)
    program = compile_program(trunk_of(model, "fc"), [constraint])
    assert len(program.lower) == 6
    for seed in range(200):
        weights = random_weights(program, seed)
        weights[0, [0, 2]] += 1.5
        values = weights[0, :5]
        kept = bool(values[mask].min() >= values[~mask].max() + 0.25)
        assert kept == bool(program.satisfied(weights).all())


@pytest.mark.parametrize("margin", [0.0, 1e-20, 1e-3, 0.5])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_a_class_is_decided_where_the_rows_hold(margin, scale):
    torch.manual_seed(0)
    model, x = made(Mlp, classes=4)
    with torch.no_grad():
        model.fc.weight.mul_(scale)
    for label in range(4):
        program = compiled(model, x, [at(x).classified(label, margin=margin)], False)
        # Exactly: every weight that satisfies the rows puts the label's bound above each other's by the margin.
        low, high = Fraction(float(program.lower[label])), [Fraction(v) for v in program.upper.tolist() if v < math.inf]
        assert len(high) == 3 and all(low >= h + Fraction(margin) for h in high)
        assert torch.equal(program.value_class, torch.arange(4)) and program.edited == (label,)
        y = program.weights[:, :-1] @ model.trunk(x).detach()[0] + program.weights[:, -1]
        torch.testing.assert_close(program.values(program.weights), y)
        rivals = [c for c in range(4) if c != label]
        assert bool(program.satisfied(program.weights)[rivals].all())  # only the label's own row can be left to do
        clear = bool(y[label] > y[rivals].max() + margin + 1e-5 * y.abs().max())
        assert clear == bool(program.satisfied(program.weights).all())


def test_a_layer_with_one_output_has_no_classes():
    model, x = made(Mlp, classes=1)
    with pytest.raises(InvalidInput, match="one output"):
        compiled(model, x, [at(x).classified(0)], False)


# -- bounds


@pytest.mark.parametrize("constant", [0.1, 1e16, -1e-17, 123.456, 1e300])
def test_bounds_move_inwards_with_a_constant(constant):
    model, x = made(Mlp)
    for lower, upper in ((-0.3, 0.7), (0.1, math.inf), (-math.inf, 1e-30), (-1e-300, 1e-300)):
        program = compiled(model, x, [(at(x).output(0) + constant).within(lower, upper)], False)
        low, high = float(program.lower[0]), float(program.upper[0])
        assert (low == -math.inf) == (lower == -math.inf) and (high == math.inf) == (upper == math.inf)
        if lower > -math.inf:
            assert Fraction(low) + Fraction(constant) >= Fraction(lower)
        if upper < math.inf:
            assert Fraction(high) + Fraction(constant) <= Fraction(upper)


def test_a_constant_that_is_zero_leaves_bounds_alone():
    model, x = made(Mlp)
    program = compiled(model, x, [(at(x).output(0) + 0.5 - 0.5).within(-0.3, 0.7)], False)
    assert program.lower.tolist() == [-0.3] and program.upper.tolist() == [0.7]


# -- rows and blocks


def busy_program(graph: bool = False) -> tuple[nn.Module, Program]:
    """Rows over classes {0, 1} together, 2 alone, 3 frozen (a rival only), and two claims without any edited class."""
    model, x = made(Cnn, classes=5)
    other = torch.randn_like(x)
    p, q = at(x, name="p"), at(other, name="q")
    constraints = [
        p.classified(2),
        (p.gradient(0, entries=[0, 1]) - q.gradient(1, entries=[5, 6])).within(-0.1, 0.1, name="pair"),
        p.gradcam(2, "block").normalised_near(torch.rand(16), eps=0.1, spread=0.1),
        q.output(1).at_most(0.5),
        (0.0 * q.output(4)).within(-1, 1, name="nothing"),
        q.gradient(0, entries=[3, 3]).at_least(-1),
    ]
    return model, compiled(model, x, constraints, graph)


@pytest.mark.parametrize("graph", [True, False])
def test_blocks_partition_rows_and_classes_and_have_the_rows_values(graph):
    _, program = busy_program(graph)
    blocks = list(program.blocks())
    rows = torch.cat([b.rows for b in blocks])
    assert torch.equal(rows.sort().values, torch.arange(len(program.lower)))
    classes = [c for b in blocks for c in b.classes]
    assert len(classes) == len(set(classes)) and set(classes) <= set(program.edited)
    assert sorted(b.classes for b in blocks) == [(), (0, 1), (2,), (4,)]
    assert program.edited == (0, 1, 2, 4)  # 4 is named, though its factor is zero; 3 is only a rival
    for seed in range(4):
        weights = program.weights.clone()
        weights[list(program.edited)] += random_weights(program, seed)[list(program.edited)]
        value = program.values(weights)
        for b in blocks:
            found = b.frozen + b.matrix @ weights[list(b.classes)].reshape(-1)
            torch.testing.assert_close(found, value[b.rows], rtol=1e-12, atol=1e-12)


def test_rows_that_hold_are_counted_as_such():
    _, program = busy_program()
    value = program.values(program.weights)
    want = (program.lower <= value) & (value <= program.upper)
    assert torch.equal(program.satisfied(program.weights), want) and not bool(want.all())
    empty = program.row_start.diff() == 0  # "nothing", which holds whatever the weights are
    assert torch.equal(program.satisfied(program.weights * math.nan), empty)  # NaN never holds


def test_claims_cover_the_rows_in_order_and_name_them():
    _, program = busy_program()
    stops = [0, *(c.stop for c in program.claims)]
    assert [c.start for c in program.claims] == stops[:-1] and stops[-1] == len(program.lower)
    assert [c.stop - c.start for c in program.claims] == [5, 2, 29, 1, 1, 2]
    assert program.name_of(5) == "pair [row 0]" and program.name_of(6) == "pair [row 1]"
    assert program.name_of(stops[3]) == "output 1 at q"


def test_values_sum_over_rows_as_dense_algebra_does():
    _, program = busy_program()
    weights = random_weights(program, 5)
    value = (program.vectors[program.value_vector] * weights[program.value_class]).sum(1)
    dense = torch.zeros(len(program.lower), len(value), dtype=torch.float64)
    for i in range(len(program.lower)):
        for k in range(int(program.row_start[i]), int(program.row_start[i + 1])):
            dense[i, program.row_value[k]] += program.row_coefficient[k]
    torch.testing.assert_close(program.values(weights), dense @ value, rtol=1e-12, atol=1e-12)


def test_the_stated_rounding_bound_covers_the_exact_value():
    _, program = busy_program()
    value, bound = program.values(program.weights).tolist(), program.rounding(program.weights).tolist()
    for i in range(len(value)):
        exact = Fraction(0)
        for k in range(int(program.row_start[i]), int(program.row_start[i + 1])):
            t = int(program.row_value[k])
            v = map(Fraction, program.vectors[program.value_vector[t]].tolist())
            w = map(Fraction, program.weights[program.value_class[t]].tolist())
            exact += Fraction(float(program.row_coefficient[k])) * sum(a * b for a, b in zip(v, w, strict=True))
        assert abs(exact - Fraction(value[i])) <= Fraction(bound[i])


def test_positions_of_one_input_do_not_mix():
    model, x = made(Decoder)
    tokens = [at(x, position=i) for i in (0, 1, 3, -1)]
    program = compiled(model, x, [t.output(2).at_least(0) for t in tokens], False)
    want = model.eval()(x)[0, [0, 1, 3, 3], 2].detach()
    torch.testing.assert_close(program.values(program.weights), want)
    for position in (None, 4, -5):
        with pytest.raises(InvalidInput, match="positions"):
            compiled(model, x, [at(x, position=position).output(0).at_least(0)], False)


def test_a_widened_network_integrates_in_float64_whatever_the_types_of_the_points():
    model, x = made(Mlp)
    x, start = x.float(), torch.randn(1, 4)
    network = soundly.load(model.float(), x).to(torch.float64)
    constraint = at(x).integrated_gradients(1, baseline=start, steps=3).within(-9, 9)
    program = compile_program(trunk_of(network, "fc"), [constraint])
    want = integrated(model.double().eval(), x.double(), start.double(), 1, 3)
    torch.testing.assert_close(program.values(program.weights), want, rtol=1e-12, atol=1e-12)


def test_sizes_and_outputs_that_do_not_fit_are_refused():
    model, x = made(Mlp)
    p = at(x)
    wrong: list[Expression | Constraint] = [
        p.gradient(0),
        p.output(0),
        p.output(3).at_least(0),
        p.output(-1).at_least(0),
        p.classified(3),
        p.classified(-1),
        (p.gradient(0) + p.output(0)).at_least(0),
        p.gradient(0).combined(torch.ones(2, 3)).at_least(0),
        p.gradient(0).within(torch.zeros(3), 1.0),
        (p.gradient(0) + torch.ones(3)).at_least(0),
        p.gradient(0).normalised_near(torch.tensor([0.0, 1.0]), eps=0.1),
        (p.gradient(0) + 1.0).normalised_near(torch.arange(4.0), eps=0.1),
        p.gradient(0).keeps_top(torch.tensor([True, False])),
        p.gradient(0, entries=[4]).at_least(0),
        p.gradient(0, entries=[-1]).at_least(0),
        p.gradient(0, entries=[]).at_least(0),
        p.gradient(0, place="nowhere").at_least(0),
        p.gradcam(0, "b").at_least(0),
        p.integrated_gradients(0, baseline=torch.zeros(1, 3)).at_least(0),
        p.integrated_gradients(0, baseline=x, steps=0).at_least(0),
        p.integrated_gradients(0, baseline=x, groups=-torch.ones(1, 4, dtype=torch.long)).at_least(0),
        p.integrated_gradients(0, baseline=x, groups=torch.ones(4, dtype=torch.long)).at_least(0),
        at(x).directional(0, torch.full((1, 1, 4), math.nan)).at_least(0),
    ]
    for graph in (True, False):
        for i, constraint in enumerate(wrong):
            with pytest.raises(InvalidInput) as caught:
                compiled(model, x, [p.output(1).at_least(0), constraint], graph)
            assert str(caught.value), i
        with pytest.raises(InvalidInput, match="at least one"):
            compiled(model, x, [], graph)
