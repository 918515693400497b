"""The algebra of expressions, and what may not be asked for."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from soundly import at
from soundly.editing.constraints import Bounded, Expression
from soundly.errors import InvalidInput

X = torch.zeros(1, 4, dtype=torch.float64)


class Frozen:
    """A trunk with given features and directional derivatives that are twice the direction."""

    layer, weight, bias = "fc", torch.zeros(3, 4), torch.zeros(3)

    def features(self, x: Tensor) -> Tensor:
        return torch.arange(8.0, dtype=torch.float64).reshape(2, 4)

    def value(self, x: Tensor, place: str | None) -> Tensor:
        return x

    def tangents(self, x: Tensor, place: str | None, directions: Tensor) -> Tensor:
        one = 2 * directions.reshape(len(directions), 1, 4)
        return torch.cat([one, 10 * one], 1)

    def tangents_along(self, path: Tensor, directions: Tensor) -> Tensor:
        return torch.stack([self.tangents(x, None, directions) for x in path])


def evaluated(e: Expression, weights: Tensor) -> Tensor:
    """The expression for weights [classes, 5], straight from its definition."""
    total = e.constant
    for t in e.terms:
        values = t.factor * (t.functional.vectors(Frozen()) @ weights[t.functional.of])
        total = total + (values if t.matrix is None else t.matrix @ values)
    return total


def test_expressions_follow_the_rules_of_arithmetic():
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = at(X, position=0)
    a, b = p.gradient(0), p.gradient(2) + torch.arange(4.0)
    va, vb = evaluated(a, weights), evaluated(b, weights)
    m = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cases = {
        "sum": (a + b, va + vb),
        "difference": (a - b, va - vb),
        "negation": (-b, -vb),
        "scaled": (b * -0.3, -0.3 * vb),
        "scaled from the left": (-0.3 * b, -0.3 * vb),
        "number added": (a + 1.5, va + 1.5),
        "number subtracted": (a - 1.5, va - 1.5),
        "numbers subtracted": (a - torch.arange(4.0), va - torch.arange(4.0)),
        "nested": (2 * (a - (b - 1.0)) - (-a), 2 * (va - vb + 1.0) + va),
        "combined": (b.combined(m), m @ vb),
        "combined difference": ((a - 2 * b).combined(m) + 1.0, m @ (va - 2 * vb) + 1.0),
        "combined twice": (b.combined(m).combined(m[:, :2]), m[:, :2] @ m @ vb),
        "constant alone combined": ((a + 2.0).combined(m), m @ (va + 2.0)),
    }
    for name, (expression, want) in cases.items():
        torch.testing.assert_close(evaluated(expression, weights), want, rtol=1e-14, atol=1e-14, msg=name)
    assert a.constant.tolist() == [0.0] and len(a.terms) == 1  # nothing above changed a or b


def test_values_are_those_of_the_position_that_is_meant():
    for position, scale, h in ((0, 1, 0), (1, 10, 4), (-1, 10, 4), (-2, 1, 0)):
        p = at(X, position=position)
        assert p.output(1).terms[0].functional.vectors(Frozen())[0].tolist() == [h, h + 1, h + 2, h + 3, 1]
        g = p.gradient(1, entries=[2, 0]).terms[0].functional.vectors(Frozen())
        assert g.tolist() == [[0, 0, 2 * scale, 0, 0], [2 * scale, 0, 0, 0, 0]]
    for position in (None, 2, -3):
        p = at(X, position=position, name="here")
        for e in (p.output(1), p.gradient(0), p.directional(0, X[None]), p.integrated_gradients(0, baseline=X + 1)):
            with pytest.raises(InvalidInput, match="positions"):
                e.terms[0].functional.vectors(Frozen())


def test_equality_to_numbers_and_expressions_is_a_pair_of_bounds():
    p = at(X, position=0)
    near = p.gradient(0).equals(torch.arange(4.0), tolerance=0.5)
    assert near.lower.tolist() == [-0.5] and near.upper.tolist() == [0.5]
    assert near.expression.constant.tolist() == [0, -1, -2, -3]
    both = p.gradient(0).equals(p.gradient(1), tolerance=0.0)
    assert [t.factor for t in both.expression.terms] == [1.0, -1.0]
    with pytest.raises(InvalidInput):
        p.gradient(0).equals(1.0, tolerance=-1e-9)
    with pytest.raises(InvalidInput):
        p.gradient(0).equals(1.0, tolerance=math.nan)


def test_names_tell_what_is_constrained_and_may_be_given():
    p, q = at(X, name="photo"), at(X, name="sketch")
    assert "photo" in p.output(2).at_least(0).name and "2" in p.output(2).at_least(0).name
    assert {"photo", "sketch"} <= set((p.output(2) - q.output(2)).within(0, 1).name.split())
    assert p.output(1).at_most(0.0, name="mine").name == "mine"
    assert p.gradient(0).normalised_near(torch.arange(4.0), eps=0.1, name="mine").name == "mine"
    assert p.gradient(0).keeps_top(torch.arange(4) > 1, name="mine").name == "mine"
    assert "photo" in p.classified(1).name


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.3, 0.499])
def test_extremes_are_all_admissible_pairs_once_and_the_targets_own_first(eps):
    target = torch.tensor([0.3, 0.0, 1.0, 0.09, 0.93, 0.5, 0.01])
    found = at(X).gradient(0).normalised_near(target, eps=eps).extremes()
    t = target.double().tolist()
    want = {(p, q) for p, q in itertools.product(range(7), repeat=2) if t[p] <= eps and t[q] >= 1 - eps}
    assert set(found) == want and len(found) == len(want) and found[0] == (1, 2)
    assert all(p != q for p, q in found)


def test_targets_are_normalised_whatever_their_scale_and_shape():
    for target in (torch.tensor([[-3.0, 5.0], [1.0, -3.0]]), 1e-30 * torch.tensor([0.0, 8.0, 4.0, 0.0])):
        made = at(X).gradient(0).normalised_near(target, eps=0.1)
        torch.testing.assert_close(made.target, torch.tensor([0.0, 1.0, 0.5, 0.0], dtype=torch.float64))


def test_requests_that_make_no_sense_are_refused_at_once():
    g, nan, inf = at(X).gradient(0), math.nan, math.inf
    nothing = torch.zeros(4)
    requests = [
        lambda: g.within(1.0, 0.0),
        lambda: g.within(nan, 1.0),
        lambda: g.within(0.0, nan),
        lambda: g.within(torch.tensor([0.0, 0, 2, 0]), torch.tensor([1.0, 1, 1, 1])),
        lambda: g.within(-inf, inf),
        lambda: g.within(inf, inf),
        lambda: g.within(torch.tensor([-inf, 0]), torch.tensor([inf, 1])),
        lambda: g.at_least(-inf),
        lambda: g.at_least(inf),
        lambda: g.at_most(inf),
        lambda: g.normalised_near(torch.ones(4), eps=0.1),
        lambda: g.normalised_near(torch.tensor([0.0, nan, 1, 1]), eps=0.1),
        lambda: g.normalised_near(torch.tensor([0.0, inf, 1, 1]), eps=0.1),
        lambda: g.normalised_near(torch.arange(4.0), eps=0.0),
        lambda: g.normalised_near(torch.arange(4.0), eps=0.5),
        lambda: g.normalised_near(torch.arange(4.0), eps=-0.1),
        lambda: g.normalised_near(torch.arange(4.0), eps=nan),
        lambda: g.keeps_top(nothing),
        lambda: g.keeps_top(nothing + 1),
        lambda: g.keeps_top(torch.arange(4) > 1, margin=nan),
        lambda: at(X).classified(0, margin=-1e-3),
        lambda: at(X).classified(0, margin=nan),
        lambda: at(X).classified(0, margin=inf),
        lambda: g.keeps_top(torch.arange(4) > 1, margin=-1e-9),
        lambda: at(X * nan),
        lambda: at(X + inf),
        lambda: at([0.0, 1.0]),
    ]
    for i, request in enumerate(requests):
        with pytest.raises(InvalidInput) as caught:
            request()
        assert len(str(caught.value)) > 15, i


def test_bounds_are_taken_as_they_are():
    made = at(X).gradient(0).within(torch.tensor([-math.inf, 0.1]), 0.3)
    assert isinstance(made, Bounded)
    mine = torch.zeros(4, dtype=torch.float64)
    kept = at(X).gradient(0).at_least(mine)
    mine += 1.0  # the user's own tensor afterwards
    assert kept.lower.tolist() == [0.0] * 4
    # A float32 bound is the number it stores, not the decimal it came from.
    assert made.lower.tolist() == [-math.inf, float(torch.tensor(0.1))] and made.upper.tolist() == [0.3]
