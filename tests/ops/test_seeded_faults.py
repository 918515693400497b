"""Faults planted in the operations, each of which the checks of test_every_op.py and test_elementwise.py must find.

A check that accepts a broken operation proves nothing about the others.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.ops import test_elementwise as functions
from tests.ops import test_every_op as every
from tests.ops.samples import CASES, FUNCTIONS, Case, Function

from soundly.bounds import interval
from soundly.bounds.interval import Interval, interval_bounds
from soundly.errors import MissingRule
from soundly.graph import elementwise as ew
from soundly.graph.composite import Maximum, MaxPool, Normalise, Rounding, Softmax
from soundly.graph.differentiate import differentiate
from soundly.graph.elementwise import Elementwise
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
    add,
    scale,
)
from soundly.graph.network import Network
from soundly.graph.node import Fill, Input, Linear, Op, Product
from soundly.graph.product import Conv, ConvKernel, ConvTranspose, Dense, MatMul, Multiply

CLASSES = sorted({type(case.op) for case in CASES}, key=lambda kind: kind.__name__)
kinds = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
sloped = pytest.mark.parametrize("kind", [k for k in CLASSES if k is not Rounding], ids=lambda kind: kind.__name__)


def samples(kind: type[Op]) -> list[Case]:
    return [case for case in CASES if type(case.op) is kind]


def function(op: Elementwise) -> Function:
    return next(f for f in FUNCTIONS if f.op == op)


def caught(check: Callable[..., None], samples: list[Any]) -> bool:
    """Whether the check refuses at least one sample."""
    for sample in samples:
        try:
            check(sample)
        except AssertionError:
            return True
    return False


# -- every class: values, shapes, derivatives


@kinds
def test_a_wrong_value_is_caught(kind, monkeypatch):
    original = kind.apply
    monkeypatch.setattr(kind, "apply", lambda self, *values: original(self, *values) + 1e-3)
    assert caught(every.check_value, samples(kind))


@kinds
def test_a_wrong_shape_rule_is_caught(kind, monkeypatch):
    original = kind.shape
    monkeypatch.setattr(kind, "shape", lambda self, *shapes: (*original(self, *shapes), 1))
    assert caught(every.check_shape, samples(kind))


def _derivative_rule(kind: type[Op]) -> str:
    return "adjoint" if issubclass(kind, Linear) else "partial" if issubclass(kind, Product) else "pullback"


def _negated(result: Any) -> Any:
    return tuple(scale(node, -1) for node in result) if isinstance(result, tuple) else scale(result, -1)


def _bent(result: Any) -> Any:
    """A relative error of one thousandth."""
    return tuple(scale(node, 1.001) for node in result) if isinstance(result, tuple) else scale(result, 1.001)


@sloped
@pytest.mark.parametrize("fault", [_negated, _bent])
def test_a_wrong_derivative_is_caught(kind, fault, monkeypatch):
    name = _derivative_rule(kind)
    original = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, *args: fault(original(self, *args)))
    assert caught(every.check_slots, samples(kind))


@sloped
def test_a_derivative_read_as_zero_is_caught(kind, monkeypatch):
    def zero(self, slot, cotangent, inputs):
        return Fill(0.0, inputs[slot].shape)()

    def zeros(self, cotangent, node):
        return tuple(Fill(0.0, child.shape)() for child in node.inputs)

    name = _derivative_rule(kind)
    monkeypatch.setattr(kind, name, zeros if name == "pullback" else zero)
    assert caught(every.check_slots, samples(kind))


@kinds
def test_a_missing_derivative_raises_and_is_never_zero(kind, monkeypatch):
    """The rule removed: differentiation raises MissingRule, naming the operation."""
    name = _derivative_rule(kind)
    for owner in kind.__mro__:
        if name in vars(owner) and owner.__name__ not in ("Linear", "Product", "Composite"):
            monkeypatch.delattr(owner, name)
    if name == "pullback" and "expand" in vars(kind):
        monkeypatch.delattr(kind, "expand")
    for case in samples(kind):
        nodes = every.leaves(case)
        y = case.op(*nodes)
        with pytest.raises(MissingRule, match=kind.__name__):
            differentiate(y, [nodes[0]], seed=Input("seed", y.shape)())


def test_an_operation_of_no_kind_raises():
    class Odd(Op):
        def shape(self, *shapes):
            return shapes[0]

    x = Input("x", (2,))()
    y = Odd()(x)
    with pytest.raises(MissingRule):
        differentiate(y, [x], seed=Fill(1.0, (2,))())
    with pytest.raises(MissingRule):
        interval_bounds(Network((x,), (y,), {}), {x: (torch.zeros(2), torch.ones(2))})
    with pytest.raises(MissingRule):
        Network((x,), (y,), {})(torch.zeros(2))


@kinds
def test_state_in_apply_is_caught(kind, monkeypatch):
    """A mapped batch that leaks between its members."""
    original = kind.apply
    kept: list[torch.Tensor] = []

    def sticky(self, *values):
        result = original(self, *values)
        kept.append(result)
        return result + 1e-3 * len(kept)

    monkeypatch.setattr(kind, "apply", sticky)
    assert caught(every.check_vmap, samples(kind)[:1])


# -- linear maps


LINEAR = [Combine, Sum, Expand, Reshape, Permute, Slice, Embed, Concat, Gather, ScatterAdd]


@pytest.mark.parametrize("kind", LINEAR)
def test_wrong_signs_are_caught(kind, monkeypatch):
    original = kind.signs
    monkeypatch.setattr(kind, "signs", lambda self, arity: tuple(-s for s in original(self, arity)))
    assert caught(every.check_linear, samples(kind))


@pytest.mark.parametrize("kind", LINEAR)
def test_an_affine_map_is_caught(kind, monkeypatch):
    original = kind.apply
    monkeypatch.setattr(kind, "apply", lambda self, *values: original(self, *values) + 0.5)
    assert caught(every.check_linear, samples(kind))


def test_a_forgotten_absolute_value_is_caught(monkeypatch):
    monkeypatch.setattr(Combine, "absolute", property(lambda self: self))
    assert caught(every.check_linear, samples(Combine))


@pytest.mark.parametrize("kind", [Combine, Sum, ScatterAdd])
def test_too_few_terms_are_caught(kind, monkeypatch):
    monkeypatch.setattr(kind, "terms", lambda self, *shapes: 1)
    assert caught(every.check_linear, samples(kind))
    assert caught(every.check_enclosed, samples(kind)), "intervals without their rounding errors"


def test_an_adjoint_of_another_kind_is_caught(monkeypatch):
    def adjoint(self, slot, cotangent, inputs):
        return Multiply()(cotangent, Fill(1.0, cotangent.shape)())

    monkeypatch.setattr(Combine, "adjoint", adjoint)
    assert caught(every.check_closure, samples(Combine))


def test_the_adjoint_of_the_wrong_slot_is_caught(monkeypatch):
    original = Concat.adjoint
    monkeypatch.setattr(Concat, "adjoint", lambda self, slot, c, inputs: original(self, 0, c, inputs))
    assert caught(every.check_slots, samples(Concat))


# -- products


PRODUCTS = [Multiply, MatMul, Dense, Conv, ConvTranspose, ConvKernel]


@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_map_that_is_no_product_is_caught(kind, monkeypatch):
    original = kind.apply
    monkeypatch.setattr(kind, "apply", lambda self, a, b: original(self, a, b) * 2)
    assert caught(every.check_product, samples(kind))


@pytest.mark.parametrize("kind", [k for k in PRODUCTS if k is not Multiply])
def test_too_few_products_are_caught(kind, monkeypatch):
    monkeypatch.setattr(kind, "terms", lambda self, *shapes: 1)
    assert caught(every.check_product, samples(kind))
    assert caught(every.check_enclosed, samples(kind)), "intervals by corners where products add up"


@pytest.mark.parametrize("kind", [Conv, ConvTranspose, ConvKernel, MatMul])
def test_swapped_partials_are_caught(kind, monkeypatch):
    original = kind.partial

    def swapped(self, slot, cotangent, inputs):
        return original(self, 1 - slot, cotangent, inputs)

    monkeypatch.setattr(kind, "partial", swapped)
    for case in samples(kind):
        if case.shapes[0] != case.shapes[1]:
            with pytest.raises((AssertionError, ValueError)):
                every.check_slots(case)


def test_a_partial_that_drops_the_other_input_is_caught(monkeypatch):
    monkeypatch.setattr(Multiply, "partial", lambda self, slot, cotangent, inputs: cotangent)
    assert caught(every.check_closure, samples(Multiply)) and caught(every.check_slots, samples(Multiply))


# -- composites


@pytest.mark.parametrize("kind", [Maximum, MaxPool, Softmax, Normalise])
def test_a_wrong_expansion_is_caught(kind, monkeypatch):
    original = kind.expand
    monkeypatch.setattr(kind, "expand", lambda self, *inputs: scale(original(self, *inputs), 1.001))
    assert caught(every.check_composite, samples(kind))


@pytest.mark.parametrize("kind", [Maximum, MaxPool, Softmax, Rounding])
@pytest.mark.parametrize("end", [0, 1])
def test_an_enclosure_that_forgets_one_end_is_caught(kind, end, monkeypatch):
    original = kind.enclose

    def narrow(self, *bounds, unit):
        found = original(self, *bounds, unit=unit)
        return (found[end], found[end])

    monkeypatch.setattr(kind, "enclose", narrow)
    assert caught(every.check_enclosed, samples(kind))


def test_a_softmax_that_ignores_the_other_scores_is_caught(monkeypatch):
    def own(self, *bounds, unit):
        return self.apply(bounds[0][0], *(m[0] for m in bounds[1:])), self.apply(
            bounds[0][1], *(m[1] for m in bounds[1:])
        )

    monkeypatch.setattr(Softmax, "enclose", own)
    assert caught(every.check_enclosed, samples(Softmax))


def test_windows_off_by_one_are_caught(monkeypatch):
    original = MaxPool._starts
    monkeypatch.setattr(MaxPool, "_starts", lambda self, axis, size: [s + 1 for s in original(self, axis, size)])
    with pytest.raises((AssertionError, IndexError, ValueError)):
        for case in samples(MaxPool):
            every.check_composite(case)


# -- elementwise functions


@pytest.mark.parametrize("op", [ew.TANH, ew.GELU, ew.SIN, ew.LOG, ew.SQRT], ids=str)
def test_a_wrong_ring_rule_is_caught(op):
    ring = op.ring
    rule = tuple((e, 1.01 * c) for e, c in ring.rules[0])
    broken = type(ring)(ring.name, (rule, *ring.rules[1:]), ring.bases, ring.period, ring.lower, ring.upper, ring.pole)
    bad = Elementwise(op.name, op.pieces, broken, op.breaks, op.held, op.kernel)
    sample = function(op)
    faulty = Function(bad, sample.formula, sample.domain, sample.pole)
    assert caught(functions.check_derivatives, [faulty])
    assert caught(every.check_slots, [faulty.case])


TURNING = [ew.SQUARE, ew.GELU, ew.SILU, ew.SIN, ew.COS, ew.MISH, ew.power(4), ew.HARDSWISH]


@pytest.mark.parametrize("op", TURNING, ids=str)
def test_forgotten_turning_points_are_caught(op, monkeypatch):
    monkeypatch.setattr(Elementwise, "special_points", property(lambda self: ()))  # before any cached value
    assert caught(functions.check_range, [function(op)])
    assert caught(every.check_enclosed, [function(op).case]) or caught(functions.check_tails, [function(op)])


def test_a_scan_that_misses_the_seam_of_a_period_is_caught(monkeypatch):
    original = Elementwise.points_with_slope

    def missing(self, slope):
        return tuple(t for t in original(self, slope) if min(abs(t), abs(t - 2 * math.pi)) > 1e-6)

    monkeypatch.setattr(Elementwise, "points_with_slope", missing)
    assert caught(functions.check_slopes, [function(ew.COS)])


@pytest.mark.parametrize("op", [ew.EXP, ew.SQRT, ew.TANH, ew.GELU, ew.SQUARE], ids=str)
def test_missing_points_with_a_slope_are_caught(op, monkeypatch):
    monkeypatch.setattr(Elementwise, "points_with_slope", lambda self, slope: ())
    assert caught(functions.check_slopes, [function(op)])


@pytest.mark.parametrize("op", [ew.EXP, ew.TANH], ids=str)
def test_invented_points_with_a_slope_are_caught(op, monkeypatch):
    monkeypatch.setattr(Elementwise, "points_with_slope", lambda self, slope: (0.321,))
    assert caught(functions.check_slopes, [function(op)])


@pytest.mark.parametrize("op", [ew.RELU, ew.ABS, ew.STEP, ew.SIGN, ew.clip(0.0, 6.0), ew.leaky_relu(0.01)], ids=str)
def test_a_forgotten_side_of_a_kink_is_caught(op, monkeypatch):
    """Only torch's own value at the kink, not the Clarke set."""

    def ends(self, lower, upper):
        return self.apply(lower), self.apply(upper)

    monkeypatch.setattr(Elementwise, "enclose", ends)
    assert caught(functions.check_clarke, [function(op)])


@pytest.mark.parametrize("op", [ew.EXP, ew.TANH, ew.GELU, ew.SOFTPLUS, ew.LOG, ew.RECIPROCAL, ew.SIN], ids=str)
def test_a_missing_widening_is_caught(op, monkeypatch):
    monkeypatch.setattr(Elementwise, "widen", lambda self, lower, upper, least, greatest, unit: (least, greatest))
    assert caught(functions.check_tails, [function(op)])


@pytest.mark.parametrize("op", [ew.SILU, ew.MISH], ids=str)
def test_forgotten_underflow_is_caught(op, monkeypatch):
    monkeypatch.setattr(Elementwise, "underflow", property(lambda self: 1.0))
    assert caught(functions.check_tails, [function(op)])


@pytest.mark.parametrize("op", [ew.RECIPROCAL, ew.power(-2)], ids=str)
def test_a_forgotten_pole_is_caught(op):
    sample = function(op)
    ring = type(op.ring)(op.ring.name, op.ring.rules, op.ring.bases)
    bad = Elementwise(op.name, op.pieces, ring, op.breaks, op.held, op.kernel)
    assert caught(functions.check_range, [Function(bad, sample.formula, sample.domain, sample.pole)])


def test_magnitudes_far_beyond_a_piece_are_caught(monkeypatch):
    """The terms of ELU's left piece taken on the right: sound, but useless."""
    sample = function(ew.elu(1.0))
    original = Elementwise.magnitude
    monkeypatch.setattr(Elementwise, "magnitude", lambda self, a, b: original(self, a, b) * torch.exp(b))
    assert caught(functions.check_tight, [sample])


def test_nonzero_called_zero_is_caught(monkeypatch):
    monkeypatch.setattr(Elementwise, "is_zero", property(lambda self: True))
    for op in (ew.RELU, ew.TANH):
        assert caught(functions.check_derivatives, [function(op)])
        assert caught(every.check_slots, [function(op).case])


# -- the interval domain


def _without_cross_radius(self, op, node, a, b):
    (ca, ra), (cb, rb) = interval._ball(a), interval._ball(b)
    centre = op.apply(ca, cb)
    radius = torch.zeros_like(centre) + 1e-4 * op.apply(a.size, b.size)
    radius = radius if rb is None else radius + op.apply(ca.abs(), rb)
    radius = radius if ra is None else radius + op.apply(ra, cb.abs())
    return Interval(centre - radius, centre + radius)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_product_without_its_cross_radius_is_caught(kind, monkeypatch):
    monkeypatch.setattr(interval._Intervals, "product", _without_cross_radius)
    assert caught(every.check_enclosed, samples(kind))


def _lower_to_lower(self, op, node, *x):
    slack = 1e-4 * op.absolute.apply(*(v.size for v in x))
    return Interval(op.apply(*(v.lower for v in x)) - slack, op.apply(*(v.upper for v in x)) + slack)


def test_a_linear_map_that_ignores_signs_is_caught(monkeypatch):
    monkeypatch.setattr(interval._Intervals, "linear", _lower_to_lower)
    assert caught(every.check_enclosed, samples(Combine))


@pytest.mark.parametrize("kind", [Combine, Sum, MatMul, Conv, Normalise])
def test_intervals_without_rounding_are_caught(kind, monkeypatch):
    monkeypatch.setattr(interval._Intervals, "_rounding", lambda self, steps: 0.0)
    assert caught(every.check_enclosed, samples(kind))


def test_a_number_rounded_to_float32_is_caught(monkeypatch):
    def rounded(self, op, device):
        return self.constant(torch.full(op.dims, op.value, dtype=self.dtype))

    monkeypatch.setattr(interval._Intervals, "fill", rounded)
    assert caught(every.check_enclosed, samples(Normalise))


def test_nan_taken_for_fine_is_caught(monkeypatch):
    """0 * inf in a product: without the replacement by "unknown" the bounds are NaN."""
    monkeypatch.setattr(interval, "_whole", lambda lower, upper: Interval(lower, upper))
    x, y = (Input(name, (1,))() for name in "xy")
    product = Multiply()(x, y)
    region = {x: (torch.zeros(1), torch.ones(1)), y: (torch.full((1,), -math.inf), torch.full((1,), math.inf))}
    with pytest.raises(AssertionError, match="NaN"):
        every.assert_enclosed(Network((x, y), (product,), {}), [product], region)


def test_a_sum_of_unequal_shapes_is_refused():
    with pytest.raises(ValueError):
        add(Input("x", (2,))(), Input("y", (3,))())


def test_the_checks_accept_what_is_right():
    """Otherwise everything above would be caught for the wrong reason."""
    for case in CASES[::5]:
        assert not caught(every.check_slots, [case])
    for kind in (Combine, Multiply, Softmax, Rounding):
        assert not caught(every.check_enclosed, samples(kind))
    for op in (ew.COS, ew.GELU, ew.RELU):
        for check in (functions.check_slopes, functions.check_range, functions.check_clarke, functions.check_tails):
            assert not caught(check, [function(op)])
