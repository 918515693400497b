"""Elementwise functions: what is computed from their rings agrees with textbook formulas and autograd.

As in test_every_op.py, each check is a plain function of one sample, so that seeded faults can be shown to it.
"""

import inspect
import math
from collections.abc import Sequence

import pytest
import torch
from tests.ops.samples import FUNCTIONS, Function
from tests.ops.test_every_op import assert_enclosed, generator
from torch import Tensor

from soundly.bounds.interval import interval_bounds
from soundly.graph import elementwise as ew
from soundly.graph.elementwise import Elementwise
from soundly.graph.network import Network
from soundly.graph.node import Input

functions = pytest.mark.parametrize("function", FUNCTIONS, ids=str)


def slope_of(function: Function, x: Tensor, order: int) -> Tensor:
    """The formula's derivative of some order by autograd, entry by entry."""
    x = x.clone().requires_grad_()
    value = function.formula(x)
    for _ in range(order):
        if not value.requires_grad:
            return torch.zeros_like(x)
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return value.detach()


def grid(function: Function, count: int = 1001) -> Tensor:
    """Points of the domain away from breaks and poles."""
    x = torch.linspace(*function.domain, count, dtype=torch.float64) + 1e-4
    for t in (*function.op.breaks, *([] if function.pole is None else [function.pole])):
        x = x[(x - t).abs() > 1e-2]
    return x


def check_derivatives(function: Function) -> None:
    """Derivatives of order one to three are autograd's away from breaks; a zero one says so."""
    x, op = grid(function), function.op
    for order in (1, 2, 3):
        op = op.derivative
        want = slope_of(function, x, order)
        assert bool(((op.apply(x) - want).abs() <= 1e-8 * (1 + want.abs())).all())
        assert op.is_zero == (not bool(want.any()))


def dense(function: Function) -> Tensor:
    """Many points of the whole domain, near and far: consecutive ones lie in one piece."""
    far = torch.logspace(-9, 4, 6001, dtype=torch.float64)
    near = torch.linspace(-40.0, 40.0, 16001, dtype=torch.float64)
    x = torch.cat([-far, near, far]).sort().values.unique()
    if function.domain[0] > 0:
        x = x[x > 0]
    if function.op.ring.period:
        x = x[x.abs() < 40]
    return x


def check_slopes(function: Function, *, slopes: Sequence[float] = ()) -> None:
    """`points_with_slope` finds every crossing that a dense scan of autograd's derivative brackets, and no others."""
    op, x = function.op, dense(function)
    derivative = slope_of(function, x, 1)
    finite = torch.isfinite(derivative)
    source = generator(5)
    pick = torch.randint(len(x), (12,), generator=source)
    wanted = [*slopes, 0.0, *torch.randn(4, generator=source, dtype=torch.float64).tolist(), *derivative[pick].tolist()]
    breaks = torch.tensor([*op.breaks, *([] if function.pole is None else [function.pole])], dtype=torch.float64)
    piece = torch.bucketize(x, breaks, right=False)
    for slope in wanted:
        if not math.isfinite(slope):
            continue
        found = op.points_with_slope(slope)
        excess = derivative - slope
        noise = 1e-9 * (abs(slope) + derivative.abs()) + 1e-13
        clear = finite & (excess.abs() > noise)
        px, pe, pp = x[clear], excess[clear], piece[clear]
        crossing = (torch.sign(pe[1:]) != torch.sign(pe[:-1])) & (pp[1:] == pp[:-1])
        for a, b in zip(px[:-1][crossing].tolist(), px[1:][crossing].tolist(), strict=True):
            if op.ring.period:
                turns = [t + k * op.ring.period for t in found for k in range(-9, 10)]
            else:
                turns = list(found)
            margin = 1e-9 * max(abs(a), 1e-9)
            near = any(a - margin <= t <= b + margin for t in turns)
            assert near, f"{op}' = {slope} between {a} and {b}, not in {found}"
        for t in found:
            at, bend = (float(slope_of(function, torch.tensor([t], dtype=torch.float64), order)) for order in (1, 2))
            scale = abs(slope) + abs(bend) * max(1.0, abs(t))
            assert abs(at - slope) <= 1e-8 * (1 + scale), f"{op}' is {at} and not {slope} at {t}"


def check_range(function: Function) -> None:
    """In float64 the range on a random interval is the least and greatest value of a dense scan, for f, f' and f''."""
    source = generator(7)
    op, formula = function.op, function
    for order in range(3):
        for _ in range(40):
            low, high = function.domain
            a, b = sorted((low + (high - low) * torch.rand(2, generator=source, dtype=torch.float64)).tolist())
            b = a + (b - a) * float(torch.rand((), generator=source) ** 3)
            if function.pole is not None and a <= function.pole <= b:
                least, greatest = op.enclose(torch.tensor(a), torch.tensor(b))
                assert (float(least), float(greatest)) == (-math.inf, math.inf)
                continue
            x = torch.linspace(a, b, 4001, dtype=torch.float64)
            values = slope_of(formula, x, order) if order else function.formula(x)
            near = [(x - t).abs() < 1e-12 for t in op.breaks]
            values = values[~torch.stack(near).any(0)] if near else values
            least, greatest = (float(v) for v in op.enclose(x[0], x[-1]))
            scale = 1 + float(values.abs().max())
            fine = 1e-9 * scale
            assert least <= float(values.min()) + fine and float(values.max()) - fine <= greatest
            step = (b - a) / 4000
            steepest = float(slope_of(formula, x, order + 1).abs().max()) if a < b else 0.0
            slack = 1e-9 * scale + 2 * step * (steepest + scale)
            assert least >= float(values.min()) - slack, f"{op} on [{a}, {b}]"
            assert greatest <= float(values.max()) + slack, f"{op} on [{a}, {b}]"
        op = op.derivative


def check_clarke(function: Function) -> None:
    """An interval that touches a break holds the limits from both sides, of f and of f'."""
    for op in (function.op, function.op.derivative):
        for t in op.breaks:
            at = torch.tensor(t, dtype=torch.float64)
            sides = [float(op.apply(at - 1e-12)), float(op.apply(at + 1e-12))]
            for low, high in ((0.0, 0.0), (0.0, 0.05), (-0.05, 0.0), (-0.05, 0.05)):
                least, greatest = (float(v) for v in op.enclose(at + low, at + high))
                held = least <= min(sides) + 1e-9 and max(sides) - 1e-9 <= greatest
                assert held, f"{op} at {t}: [{least}, {greatest}]"


def check_tails(function: Function) -> None:
    """Float32 intervals hold f, f', f'' and f''' far out and near the ends of the domain, in float32 and in float64."""
    x = Input("x", (64,))()
    ops = [function.op]
    for _ in range(3):
        ops.append(ops[-1].derivative)
    nodes = [op(x) for op in ops]
    source = generator(11)
    for reach in (1e-4, 0.1, 1.0, 5.0, 14.0, 40.0, 90.0, 1e4):
        for width in (0.0, 1e-3, 0.5):
            centre = reach * (2 * torch.rand(64, generator=source) - 1)
            centre = centre.abs() if function.domain[0] > 0 else centre
            lower, upper = centre - width * centre.abs(), centre + width * centre.abs()
            network = Network((x,), tuple(nodes), {})
            assert_enclosed(network, nodes, {x: (lower, upper)})


def check_tight(function: Function) -> None:
    """Float32 bounds of f and f' exceed the range by rounding only, over short and long intervals."""
    source, x = generator(13), Input("x", (20,))()
    nodes = [function.op(x), function.op.derivative(x)]
    low, high = function.domain
    a = (low + (high - low) * torch.rand(20, generator=source)) * torch.logspace(-3, 0, 20)
    b = torch.where(torch.arange(20) % 2 == 0, a + 0.01 * a.abs(), a + 5 * torch.rand(20, generator=source))
    a[-1], b[-1] = max(low, -1.0), 14.0
    if function.pole is not None:
        a, b = a.abs() + 0.01, b.abs() + a.abs() + 0.01
    lower, upper = torch.minimum(a, b), torch.maximum(a, b)
    bounds = interval_bounds(Network((x,), tuple(nodes), {}), {x: (lower, upper)}, nodes)
    for op, node in zip((function.op, function.op.derivative), nodes, strict=True):
        least, greatest = op.enclose(lower.double(), upper.double())
        size = 1 + torch.maximum(least.abs(), greatest.abs()) + torch.maximum(lower.abs(), upper.abs())
        known = torch.isfinite(least) & torch.isfinite(greatest)
        slack = 2e-4 * size[known]
        assert bool((bounds[node].lower[known] >= least[known] - slack).all()), f"{op} from below"
        assert bool((bounds[node].upper[known] <= greatest[known] + slack).all()), f"{op} from above"


def test_every_elementwise_function_has_samples():
    sampled = {f.op for f in FUNCTIONS}
    constants = {v for v in vars(ew).values() if isinstance(v, Elementwise)}
    assert constants <= sampled
    factories = {
        name
        for name, f in inspect.getmembers(ew, inspect.isfunction)
        if f.__module__ == ew.__name__ and not name.startswith("_") and f.__annotations__.get("return") == "Elementwise"
    }
    assert factories == {name for name in factories if any(op.name.startswith(f"{name}(") for op in sampled)}
    assert {"clip", "power", "elu", "leaky_relu"} <= factories


@functions
def test_derivatives_of_three_orders_are_autograds(function):
    check_derivatives(function)


@functions
def test_points_with_a_slope_are_all_found(function):
    check_slopes(function)


@functions
def test_ranges_are_exact(function):
    check_range(function)


@functions
def test_breaks_belong_to_both_sides(function):
    check_clarke(function)


@functions
def test_no_value_escapes_far_out(function):
    check_tails(function)


@functions
def test_bounds_are_tight(function):
    check_tight(function)


@pytest.mark.parametrize("function", [ew.RSQRT, ew.SQRT.derivative, ew.LOG, ew.power(-0.5)], ids=str)
def test_minus_zero_is_zero(function):
    ends = [function.enclose(torch.tensor([zero]), torch.tensor([4.0])) for zero in (-0.0, 0.0)]
    assert ends[0] == ends[1] and math.inf in (-ends[0][0], ends[0][1])
