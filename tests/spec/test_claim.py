"""Claims mean what they say: each one-liner against its definition at points, ties and roundings included."""

import itertools
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from soundly.errors import InvalidInput
from soundly.graph.load import load
from soundly.graph.network import Network
from soundly.spec.claim import Claim, Property, Row, Shapes, monotone, pairwise, robust, top_k, within
from soundly.spec.region import Ball, Box, Union, join

SHAPES = Shapes(((2,),), ((4,),))
UNIT = Box(torch.zeros(2), torch.ones(2))
INSIDE = torch.tensor([0.5, 0.5], dtype=torch.float64)


def f64(v: Any) -> Tensor:
    return torch.tensor(v, dtype=torch.float64)


class TwoInputs(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a * b.sum(), b.flatten()


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(1)
    return load(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4)), torch.zeros(1, 2))


outputs = st.lists(st.sampled_from((-1.0, 0.0, 0.1, math.nextafter(0.1, 1), 0.3, 2.0)), min_size=4, max_size=4)


@given(outputs, st.integers(0, 3))
def test_robust_counts_ties_against_the_label(y: list[float], label: int) -> None:
    claim = robust(SHAPES, INSIDE, eps=0.1, label=label)
    assert claim.holds_at(INSIDE, f64(y)) == all(y[label] > v for j, v in enumerate(y) if j != label)
    assert claim.violation(INSIDE, f64(y)) == max(v - y[label] for j, v in enumerate(y) if j != label)
    assert claim.holds_at(INSIDE + 0.11, f64(y)) and claim.violation(INSIDE + 0.11, f64(y)) == -math.inf


@given(outputs, st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), st.integers(1, 4))
def test_top_k_is_every_ranking_with_ties_against_the_claim(y: list[float], labels: list[int], k: int) -> None:
    claim = top_k(SHAPES, UNIT, labels, k)
    rankings = [order for order in itertools.permutations(range(4)) if sorted(y, reverse=True) == [y[i] for i in order]]
    if len(labels) <= k:
        holds = all(set(labels) <= set(order[:k]) for order in rankings)
    else:
        holds = all(set(order[:k]) <= set(labels) for order in rankings)
    assert claim.holds_at(INSIDE, f64(y)) == holds


@given(outputs, outputs, outputs)
def test_within_is_entry_by_entry_and_closed(y: list[float], a: list[float], b: list[float]) -> None:
    lower, upper = [min(e) for e in zip(a, b, strict=True)], [max(e) for e in zip(a, b, strict=True)]
    claim = within(SHAPES, UNIT, f64(lower), f64(upper))
    assert claim.holds_at(INSIDE, f64(y)) == all(low <= v <= high for low, v, high in zip(lower, y, upper, strict=True))
    below = within(SHAPES, UNIT, None, f64([0.0, math.inf, 0.0, math.inf]))
    assert below.property.clauses == 2 and below.holds_at(INSIDE, f64(y)) == (y[0] <= 0 and y[2] <= 0)


@given(outputs, st.sampled_from((0.0, 0.2, -0.2)))
def test_pairwise_is_exact_where_float64_is_not(y: list[float], margin: float) -> None:
    claim = pairwise(SHAPES, UNIT, 1, 3, margin)
    assert claim.holds_at(INSIDE, f64(y)) == (Fraction(y[1]) - Fraction(y[3]) >= Fraction(margin))


fractions = st.fractions(-4, 4, max_denominator=30) | st.sampled_from([Fraction("0.1"), Fraction("1e-20")])
numbers = st.floats(-3, 3)
rows = st.builds(
    Row,
    st.dictionaries(st.integers(0, 3), fractions.filter(bool), max_size=3),
    st.dictionaries(st.integers(0, 1), fractions.filter(bool), max_size=2),
    fractions,
    st.booleans(),
)
points = st.tuples(st.lists(numbers, min_size=4, max_size=4), st.lists(numbers, min_size=2, max_size=2))


def violated(clauses: list[list[Row]], y: list[float], x: list[float]) -> list[bool]:
    result = []
    for clause in clauses:
        true = True
        for row in clause:
            value = row.b + sum(w * Fraction(y[j]) for j, w in row.y.items())
            value += sum(v * Fraction(x[i]) for i, v in row.x.items())
            true = true and (value < 0 or (value == 0 and not row.strict))
        result.append(true)
    return result


@settings(max_examples=200)
@given(st.lists(st.lists(rows, max_size=3), max_size=4), points)
def test_rows_are_judged_exactly_and_their_float64_form_loses_nothing(clauses: list[list[Row]], at: Any) -> None:
    y, x = at
    prop = Property.of(clauses, outputs=4, inputs=2)
    expected = violated(clauses, y, x)
    assert prop.violated(f64(y), f64(x)).tolist() == expected
    slack = prop.slack(f64(y).abs(), f64(x).abs())
    values, flat = exactly(prop, y, x), [row for clause in clauses for row in clause]
    for k, row in enumerate(flat):
        if row.holds(y, x):
            assert values[k] <= Fraction(slack[k].item())
    for first in range(len(clauses)):
        part = prop.between(first, len(clauses))
        assert part.violated(f64(y), f64(x)).tolist() == expected[first:]
    assert prop.worst(f64([y, y]), f64([x, x])).shape == (2, len(clauses))


def exactly(prop: Property, y: list[float], x: list[float]) -> list[Fraction]:
    """The float64 rows without rounding of their evaluation."""
    values = [Fraction(v) for v in prop.b.tolist()]
    for terms, v in ((prop.y, y), (prop.x, x)):
        for k, i, w in zip(terms.row.tolist(), terms.column.tolist(), terms.value.tolist(), strict=True):
            values[k] += Fraction(w) * Fraction(v[i])
    return values


def test_rounding_a_constant_to_nearest_would_be_caught() -> None:
    row = Row({0: Fraction(1)}, {}, Fraction("-0.1"))  # y <= 1/10; the nearest float64 to -1/10 lies below it
    assert row.scaled()[2] == -0.1 and Row({0: Fraction(-1)}, {}, Fraction("0.1")).scaled()[2] < 0.1
    y = [math.nextafter(0.1, 0)]
    assert Property.of([[row]], outputs=1, inputs=0).violated(f64(y), f64([])).tolist() == [True]
    assert Property.of([[row]], outputs=1, inputs=0).violated(f64([0.1]), f64([])).tolist() == [False]


def test_decimal_coefficients_become_exact_integers() -> None:
    prop = Property.of([[Row({0: Fraction("0.1"), 1: Fraction("-0.3")}, {}, Fraction(0))]], outputs=2, inputs=0)
    first, second = map(Fraction, prop.y.value.tolist())
    assert first * -3 == second and prop.inexact is None
    digits = {0: Fraction("0.12345678901234567891"), 1: Fraction(1)}
    long = Property.of([[Row(digits, {}, Fraction(0))]], outputs=2, inputs=0)
    assert long.inexact is not None and long.slack(f64([1.0, 1.0]), f64([]))[0] > 0


@given(st.lists(st.decimals(-100, 100, places=3), min_size=1, max_size=3), st.decimals(-100, 100, places=9))
def test_constants_are_the_greatest_numbers_that_are_not_above(weights: list[Decimal], constant: Decimal) -> None:
    """A proof of the float64 row is one of the exact row only if its constant was rounded down."""
    row = Row({j: Fraction(w) for j, w in enumerate(weights) if w}, {}, Fraction(constant))
    y, _, b, exact = row.scaled()
    scales = {Fraction(y[j]) / w for j, w in row.y.items()} or {Fraction(1)}
    assert exact and len(scales) == 1 and min(scales) > 0
    wanted = row.b * scales.pop()
    assert Fraction(b) <= wanted < Fraction(math.nextafter(b, math.inf))
    assert Property.of([[row]], outputs=3, inputs=0).b.tolist() == [b]


def test_the_network_is_evaluated_in_the_points_own_type(network: Network) -> None:
    x = torch.tensor([[0.3, 0.6]])
    claim = robust(network, x, eps=0.2)
    label = int(network(x).argmax())
    assert claim.name == f"robust within linf 0.2 as {label}" and claim.holds_at(x)
    assert torch.equal(claim.outputs(x), network(x).flatten())
    assert claim.outputs(x.double()).dtype == torch.float64
    assert robust(network, x, eps=0.1, label=(label + 1) % 4).violation(x) > 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_robust_regions(network: Network, norm: Any) -> None:
    x = torch.tensor([[0.05, 0.6]])
    claim = robust(network, x, eps=torch.tensor([[0.1, 0.2]]), norm=norm)
    assert isinstance(claim.region, Ball) and claim.region.box.lower[0, 0] == 0
    assert not robust(network, x, eps=0.1, norm=norm, clip=None).region.box.lower[0, 0] == 0
    assert [len(prop) for _, prop in claim.cases()] == [3]


def test_monotone_is_a_claim_about_the_gradient(network: Network) -> None:
    region = Box(torch.zeros(1, 2), torch.ones(1, 2))
    for of, entry, up in itertools.product(range(4), range(2), (True, False)):
        claim = monotone(network, region, of=of, entry=entry, increasing=up)
        assert claim.assumptions and claim.property.outputs == 1
        for x in region.samples(10):
            at = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(network.to(torch.float64)(at).flatten()[of], at)
            assert claim.holds_at(x) == (slope[0, entry] >= 0 if up else slope[0, entry] <= 0)


def test_several_inputs_and_outputs_are_joined() -> None:
    network = load(TwoInputs(), (torch.ones(3), torch.ones(1, 2)))
    region = join(Box(torch.zeros(3), torch.ones(3)), Box(torch.zeros(1, 2), torch.ones(1, 2)))
    claim = within(network, region, None, 1.5)
    x = f64([1.0, 0.5, 0.0, 0.75, 1.0])
    assert [tuple(v.shape) for v in claim.inputs(x)] == [(3,), (1, 2)]
    assert claim.outputs(x).tolist() == [1.75, 0.875, 0.0, 0.75, 1.0]
    assert not claim.holds_at(x) and claim.violation(x) == 0.25
    with pytest.raises(InvalidInput, match=r"takes \(5,\), its inputs joined"):
        within(network, Box(torch.zeros(3), torch.ones(3)), 0.0, 1.0)


def test_clauses_apply_in_their_own_boxes() -> None:
    region = Union.of([Box(f64([0.0, 0.0]), f64([1.0, 1.0])), Box(f64([2.0, 0.0]), f64([3.0, 1.0]))])
    low, high = Row({0: Fraction(1)}, {}, Fraction(0)), Row({0: Fraction(-1)}, {}, Fraction(0), strict=True)
    prop = Property.of([[low], [high]], outputs=4, inputs=2)
    claim = Claim(SHAPES, region, prop, spans=torch.tensor([[0, 1], [1, 2]]))
    for x, y in itertools.product((0.5, 1.5, 2.5), (-1.0, 0.0, 1.0)):
        wrong = (x == 0.5 and y <= 0) or (x == 2.5 and y > 0)
        assert claim.holds_at(f64([x, 0.0]), f64([y, 0, 0, 0])) == (not wrong)
        assert (claim.violation(f64([x, 0.0]), f64([y, 0, 0, 0])) >= 0) == (wrong or (x == 2.5 and y == 0))
    assert [(box.lower[0].item(), p.strict.tolist()) for box, p in claim.cases()] == [(0.0, [False]), (2.0, [True])]


def test_a_nan_output_is_neither_a_proof_nor_a_counterexample() -> None:
    claim = within(SHAPES, UNIT, 0.0, 1.0)
    for bad in (math.nan, math.inf):
        with pytest.raises(InvalidInput, match="NaN or infinite"):
            claim.holds_at(INSIDE, f64([0.0, bad, 0.0, 0.0]))


def test_empty_regions_make_empty_claims() -> None:
    nothing = Box(torch.ones(2), torch.zeros(2))
    claim = within(SHAPES, nothing, 0.0, 1.0)
    assert claim.is_empty and list(claim.cases()) == [] and claim.holds_at(INSIDE, f64([9.0] * 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: robust(n, torch.zeros(1, 2) - 1, eps=0.1), "x lies outside clip"),
        (lambda n: robust(n, torch.zeros(1, 2), eps=-0.1), "negative"),
        (lambda n: robust(n, torch.zeros(1, 2), eps=0.1, label=4), "label: 4 is no output"),
        (lambda n: robust(n, torch.zeros(1, 2), eps=0.1, norm="l7"), "norm is 'l7'"),
        (lambda n: robust(n, torch.zeros(1, 3), eps=0.1), "region has shape"),
        (lambda n: robust(n, torch.zeros(1, 2), eps=0.1, clip=(1, 0)), "clip is"),
        (lambda n: robust(n, torch.zeros(1, 2, dtype=torch.int64), eps=0.1), "floating-point"),
        (lambda n: robust(SHAPES, torch.zeros(2), eps=0.1), "label"),
        (lambda n: robust(3, torch.zeros(1, 2), eps=0.1), "network is a int"),
        (lambda n: within(n, Box(torch.zeros(3), torch.ones(3)), 0.0, 1.0), r"shape \(3,\), but .* \(1, 2\)"),
        (lambda n: within(n, UNIT, torch.zeros(3), 1.0), "lower needs one number or 4"),
        (lambda n: within(n, UNIT, None, None), "both None"),
        (lambda n: within(n, UNIT, math.nan, None), "NaN"),
        (lambda n: within(n, UNIT, math.inf, None), "no output satisfies"),
        (lambda n: within(n, "box", 0.0, 1.0), "region is a str"),
        (lambda n: monotone(n, UNIT, of=9, entry=0), "index 9"),
        (lambda n: monotone(n, UNIT, of=0, entry=2), "index 2"),
        (lambda n: top_k(n, UNIT, [0], 5), "k is 5"),
        (lambda n: top_k(n, UNIT, [], 1), "k is 1 with 0 labels"),
        (lambda n: top_k(n, UNIT, [4], 1), "labels: 4"),
        (lambda n: top_k(Shapes(((2,),), ((1000,),)), UNIT, [3], 5), "too many clauses"),
        (lambda n: pairwise(n, UNIT, 1, 1, 0.0), "two different outputs"),
        (lambda n: pairwise(n, UNIT, 1, 2, math.nan), "finite margin"),
        (lambda n: pairwise(n, UNIT, 1, -2, 0.0), "j: -2"),
        (lambda n: pairwise(SHAPES, UNIT, 1, 2).holds_at(INSIDE), "without its network"),
        (lambda n: pairwise(SHAPES, UNIT, 1, 2).holds_at(INSIDE, f64([1.0])), "y has 1 entries"),
        (lambda n: Property.of([[Row({9: Fraction(1)}, {}, Fraction(0))]], outputs=4, inputs=2), "beyond 4 outputs"),
    ],
)
def test_wrong_arguments_are_named(network: Network, make: Callable[[Network], Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make(network)


def test_sums_that_float64_gets_wrong_are_judged_exactly() -> None:
    row = Row({0: Fraction(1), 1: Fraction(1), 2: Fraction(1)}, {}, Fraction(-1, 2))
    prop, y = Property.of([[row]], outputs=3, inputs=0), f64([1e16, 1.0, -1e16])
    assert float(prop.rows(y, f64([]))[0]) < 0, "in float64 it seems to hold"
    assert prop.violated(y, f64([])).tolist() == [False]
