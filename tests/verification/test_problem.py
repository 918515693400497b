"""Problems: what a search proves of the program's rows on the boxes is what the claim says of the network."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soundly.bounds.program import Function
from soundly.graph import elementwise as ew
from soundly.graph.composite import Rounding, Softmax
from soundly.graph.from_torch import from_torch
from soundly.graph.linear import Combine, Permute, reshape
from soundly.graph.network import Network
from soundly.graph.node import Node
from soundly.spec.claim import Claim, Property, Row, pairwise, robust
from soundly.spec.region import Box, Union
from soundly.verification import problem as making
from soundly.verification.problem import Problem, problem_of
from soundly.verification.proof import identity

F64 = torch.float64


def scorer(*outputs: int) -> Network:
    """A small network with scores of that shape, in float64."""
    torch.manual_seed(4)
    layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, math.prod(outputs)))
    network = from_torch(layers.eval(), (torch.zeros(1, 3),)).to(F64)
    return replace(network, outputs=(reshape(network.outputs[0], outputs),))


def classifier(*outputs: int, axis: int = -1) -> Network:
    """The same with probabilities, which are reshaped once more."""
    network = scorer(*outputs)
    probabilities = Softmax(axis % len(outputs))(network.outputs[0])
    return replace(network, outputs=(reshape(probabilities, (math.prod(outputs),)),))


def box(radius: float = 1.0, *shape: int) -> Box:
    shape = shape or (1, 3)
    return Box(torch.full(shape, -radius, dtype=F64), torch.full(shape, radius, dtype=F64))


def row(y: dict[int, float], x: dict[int, float] | None = None, b: float = 0.0, strict: bool = False) -> Row:
    exact = [{i: Fraction(v) for i, v in side.items()} for side in (y, x or {})]
    return Row(exact[0], exact[1], Fraction(b), strict)


def claimed(network: Network, *clauses: list[Row]) -> Claim:
    outputs = sum(math.prod(node.shape) for node in network.outputs)
    return Claim(network, box(), Property.of(clauses, outputs=outputs, inputs=3))


def reads_scores(problem: Problem) -> bool:
    """A softmax takes powers."""
    return not any(isinstance(step, Function) and step.op.name == "exp" for step in problem.program.steps)


def same_signs(claim: Claim, problem: Problem) -> bool:
    """Whether the problem's rows have the signs of the claim's at random points."""
    x = claim.region.samples(300)
    truth = torch.stack([claim.property.rows(claim.outputs(v), v.reshape(-1)) for v in x])
    found = problem.rows.at(problem.program.evaluate(x.reshape(len(x), -1))[-1], x.reshape(len(x), -1))
    return bool((truth.sign() == found.sign()).all())


# -- softmax


@pytest.mark.parametrize("outputs", [(1, 4), (4,), (2, 1, 3)])
def test_differences_of_probabilities_become_differences_of_scores(outputs):
    network = classifier(*outputs, axis=-1)
    claims = [robust(network, torch.zeros(1, 3).double(), eps=0.5, label=1, clip=None)]
    claims += [claimed(network, [row({0: 1, 2: -1}, strict=True), row({1: -1, 2: 1})], [row({1: 1, 0: -1})])]
    for claim in claims:
        problem = problem_of(claim)
        whole = outputs != (2, 1, 3)  # two rows of probabilities: those of different rows cannot be compared
        assert reads_scores(problem) is whole
        assert same_signs(claim, problem)


@pytest.mark.parametrize(
    "rows",
    [
        [row({0: 1})],
        [row({0: 1, 1: -1}, b=-0.25)],
        [row({0: 1, 1: -1}, {2: 1})],
        [row({0: 1, 1: 1})],
        [row({0: 1, 1: -2})],
        [row({0: 1, 1: -1}), row({0: 1})],
        [row({0: 1, 1: -1}), row({0: 1, 1: -1, 2: 1}), row({2: 1})],
    ],
    ids=["one", "margin", "inputs", "sum", "weights", "mixed", "three and one"],
)
def test_other_rows_keep_the_softmax(rows):
    claim = claimed(classifier(1, 4), rows)
    problem = problem_of(claim)
    assert not reads_scores(problem)
    assert same_signs(claim, problem)


def test_only_a_softmax_at_the_very_end_is_left_out():
    rows = [row({0: 1, 1: -1})]
    network = classifier(1, 4)
    negated = replace(network, outputs=(Combine((-1.0,))(network.outputs[0]),))
    turned = replace(network, outputs=(Permute((1, 0))(reshape(network.outputs[0], (2, 2))),))
    both = replace(network, outputs=(*network.outputs, *network.outputs))
    for other in (negated, turned, both):
        claim = claimed(other, rows)
        assert not reads_scores(problem_of(claim))
        assert same_signs(claim, problem_of(claim))


def test_a_rule_that_ignores_the_margin_is_noticed(monkeypatch):
    claim = pairwise(classifier(1, 4), box(), 0, 1, margin=-0.2)
    assert same_signs(claim, problem_of(claim))

    def careless(network: Network, property: Property) -> Node:
        return network.outputs[0].inputs[0].inputs[0]

    monkeypatch.setattr(making, "_scores", careless)
    assert not same_signs(claim, problem_of(claim))


# -- slack


def test_slack_covers_what_rounded_coefficients_change():
    """Rows whose coefficients no float64 numbers have, among exact ones and a clause without rows."""
    network = scorer(1, 4)
    third = Row({0: Fraction(1, 3), 1: Fraction(1, 7**30)}, {2: Fraction(-1, 3)}, Fraction(0))
    claim = claimed(network, [row({0: 1}), third], [], [row({1: -1, 2: 1}), third])
    problem = problem_of(claim)
    assert claim.property.inexact is not None and claim.property.inexact.tolist() == [False, True, False, True]
    assert (problem.slack > 0).tolist() == [False, True, False, False, True]
    for x in claim.region.samples(50):
        y, x = claim.outputs(x).tolist(), x.reshape(-1).tolist()
        truth = third.y[0] * Fraction(y[0]) + third.y[1] * Fraction(y[1]) + third.x[2] * Fraction(x[2])
        for k in (1, 4):
            weights = [Fraction(w) for side in (problem.rows.y, problem.rows.x) for w in side[k].tolist()]
            stored = sum(w * Fraction(v) for w, v in zip(weights, [*y, *x], strict=True))
            assert 0 < abs(stored - truth) <= Fraction(float(problem.slack[k]))
    assert not bool(problem_of(claimed(network, [row({0: 0.1})])).slack.any())


def test_a_certificate_names_every_row_with_its_slack():
    third = Row({0: Fraction(1, 3), 1: Fraction(1, 7**30)}, {2: Fraction(-1, 3)}, Fraction(1, 4))
    problem = problem_of(claimed(scorer(1, 4), [row({0: 1}), third], [row({1: -1, 2: 1}), third]))
    arrays = identity(problem)
    assert arrays["row_slack"].tolist() == problem.slack.tolist() and (arrays["row_slack"] > 0).sum() == 2
    assert arrays["row_constant"].tolist() == problem.rows.constant.tolist()
    assert arrays["row_clause"].tolist() == [0, 0, 1, 1] and arrays["row_start"].tolist() == [0, 1, 4, 6, 9]
    both = torch.cat([problem.rows.y, problem.rows.x], 1).numpy()
    which = np.repeat(np.arange(4), np.diff(arrays["row_start"]))
    assert np.array_equal(both[which, arrays["row_column"]], arrays["row_value"])


def test_slack_without_known_bounds_is_infinite():
    inner = scorer(1, 4)
    network = replace(inner, outputs=(ew.RECIPROCAL(inner.outputs[0]),))
    third = Row({0: Fraction(1, 3), 1: Fraction(1, 7**30)}, {}, Fraction(0))
    problem = problem_of(claimed(network, [third]))
    assert problem.slack.tolist() == [math.inf]


# -- regions


def test_boxes_keep_their_clauses_where_others_are_empty():
    ends = [(1.0, -1.0), (-1.0, 0.0), (1.0, 0.5), (0.5, 2.0)]
    lower, upper = (torch.tensor([e[k] for e in ends], dtype=F64)[:, None, None].repeat(1, 1, 3) for k in (0, 1))
    clauses = [[row({0: 1}, b=float(k))] for k in range(5)]
    spans = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 5]])
    claim = Claim(scorer(1, 4), Union(lower, upper), Property.of(clauses, outputs=4, inputs=3), spans=spans)
    problem = problem_of(claim)
    assert problem.lower[:, 0].tolist() == [-1.0, 0.5] and problem.spans.tolist() == [[1, 2], [3, 5]]
    constants = [[problem.rows.constant[r].item() for r in rows if r >= 0] for rows in problem.table[0].tolist()]
    assert constants == [[1.0], [3.0, 4.0]]


def test_roundings_are_lowered_over_the_hull_of_all_boxes():
    inner = scorer(1, 4)
    network = replace(inner, outputs=(Rounding("floor")(Combine((3.0,))(inner.outputs[0])),))
    boxes = Union.of([Box(torch.full((1, 3), a).double(), torch.full((1, 3), a + 0.5).double()) for a in (-2, 0, 1.5)])
    claim = Claim(network, boxes, Property.of([[row({0: 1})]], outputs=4, inputs=3))
    problem = problem_of(claim)
    for low, high in zip(problem.lower, problem.upper, strict=True):
        x = low + torch.rand(100, 3, dtype=F64) * (high - low)
        truth: list[Tensor] = [claim.outputs(v.reshape(1, 3)) for v in x]
        assert torch.equal(problem.program.evaluate(x)[-1], torch.stack(truth))
