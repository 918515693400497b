"""What cannot be is not proved: conflicts are named, and nothing is returned."""

import dataclasses
import math
import re

import pytest
import torch
from tests.editing.edits import exact_rows, of_kind, problem
from tests.editing.test_trunk import Mlp, made
from torch import Tensor, nn

import soundly
from soundly import Edit, at
from soundly.errors import EditError, InvalidInput

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def infeasible(result: Edit, *names: str) -> None:
    """Nothing is returned, and the conflict names these constraints and no others."""
    assert result.status == "infeasible", (result.status, result.reason)
    assert result.model is None and result.certificate is None and result.delta == {} and result.proven == 0
    assert {re.sub(r" \[row \d+\]$", "", name) for name in result.conflict} == set(names), result.conflict
    assert all(name in result.reason for name in names)
    with pytest.raises(EditError, match="no proved edit"):
        result.applied_to(nn.Linear(1, 1), layer="fc")


def bystanders(x: Tensor) -> list:
    other = torch.flip(x, [-1]) + 0.3
    return [at(other, name="bystander").output(c).within(-5, 5, name=f"bystander {c}") for c in range(3)]


def test_contradictory_boxes_are_named():
    model, x = made(Mlp)
    g = at(x).gradient(0, entries=[0, 1])
    constraints = [g.within(0.0, 0.1, name="small"), *bystanders(x), g.within(0.2, 0.3, name="large")]
    infeasible(soundly.edit(model, constraints, layer="fc"), "small", "large")


def test_equal_features_with_disjoint_bounds_are_named():
    class Even(Mlp):
        def trunk(self, x: Tensor) -> Tensor:
            return super().trunk(x * x)

    model, x = made(Even)
    constraints = [
        at(x).output(1).at_most(0.0, name="low"),
        *bystanders(x),
        at(-x).output(1).at_least(0.5, name="high"),
    ]
    infeasible(soundly.edit(model, constraints, layer="fc"), "low", "high")
    for same in (x, x.clone()):  # the same point twice
        constraints[-1] = at(same).output(1).at_least(0.5, name="high")
        infeasible(soundly.edit(model, constraints, layer="fc"), "low", "high")


def test_two_classes_at_one_point_are_infeasible():
    model, x = made(Mlp)
    result = soundly.edit(model, [at(x, name="p").classified(0), at(x, name="p").classified(1)], layer="fc")
    assert result.status == "infeasible" and result.model is None
    assert set(name.split(" [")[0] for name in result.conflict) == {"class 0 at p", "class 1 at p"}


def test_an_equality_without_tolerance_is_refused_with_the_remedy():
    model, x = made(Mlp)
    box = at(x).gradient(0, entries=[1]).within(0.3, 0.3, name="exactly")
    result = soundly.edit(model, [box, *bystanders(x)], layer="fc")
    infeasible(result, "exactly")
    assert "widen" in result.reason


def test_more_independent_rows_than_weights_are_infeasible_and_the_rank_is_told():
    class Narrow(Mlp):
        def trunk(self, x: Tensor) -> Tensor:
            return super().trunk(x)[:, :1].expand(-1, 6)

    model, x = made(Narrow)
    points = [torch.randn_like(x) for _ in range(4)]
    constraints = [at(p, name=f"p{i}").output(0).equals(float((-1) ** i), tolerance=1e-6) for i, p in enumerate(points)]
    result = soundly.edit(model, constraints, layer="fc")
    assert result.status == "infeasible" and result.model is None
    rank = int(re.search(r"rank (\d+)", result.reason).group(1))
    assert rank == 2 and len(result.conflict) == 3  # one direction of features, and the bias


def test_a_gradient_that_no_weight_moves_is_infeasible():
    class Dead(Mlp):
        def trunk(self, x: Tensor) -> Tensor:
            return super().trunk(torch.cat([x[:, :1], x[:, :1], x[:, 2:]], 1))

    model, x = made(Dead)
    for kind in ("graph", "module"):
        m = of_kind(kind, model, x)
        infeasible(soundly.edit(m, [at(x).gradient(0, entries=[1]).at_least(0.1, name="dead")], layer="fc"), "dead")
        held = soundly.edit(m, [at(x).gradient(0, entries=[1]).within(-0.1, 0.1)], layer="fc")
        assert held.status == "proved" and held.rows_before == 1
    infeasible(soundly.edit(model, [(0.0 * at(x).output(1)).at_least(1.0, name="never")], layer="fc"), "never")


def test_rows_without_room_for_the_storage_type_are_not_proved_in_it():
    _, x = made(Mlp)
    for dtype, width in ((torch.float64, 1e-6), (torch.float32, 1e-3), (torch.bfloat16, 0.2)):
        m, y = made(Mlp)[0].to(dtype), x.to(dtype)
        fine = soundly.edit(m, [at(y).output(0).equals(0.7, tolerance=width)], layer="fc")
        assert fine.status == "proved" and exact_rows(fine)
        tight = soundly.edit(m, [at(y).output(0).equals(0.7, tolerance=width * 1e-9)], layer="fc")
        assert tight.status in ("unproven", "infeasible") and tight.model is None and tight.certificate is None


def test_no_time_is_a_limit():
    model, constraints, _ = problem()
    for time_limit in (0.0, -1.0, 1e-9):
        result = soundly.edit(model, constraints, layer="fc", time_limit=time_limit)
        assert result.status == "limit" and result.model is None and result.certificate is None
    assert soundly.edit(model, constraints, layer="fc", time_limit=60.0).status == "proved"


def test_arguments_out_of_range_are_refused():
    model, x = made(Mlp)
    fine = [at(x).output(0).at_least(1.0)]
    for options in ({"norm": "l3"}, {"norm": "l1", "retain": [x]}, {"retain": [x], "retain_weight": -1.0}):
        with pytest.raises(InvalidInput):
            soundly.edit(model, fine, layer="fc", **options)
    with pytest.raises(InvalidInput):
        soundly.edit("model.onnx", fine, layer="fc")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["edited row", "edited bias", "rival", "frozen part", "input"])
def test_numbers_that_are_not_finite_prove_nothing(bad, where):
    model, x = made(Mlp)
    point = at(x)
    with torch.no_grad():
        if where == "edited row":
            model.fc.weight[0, 2] = bad
        elif where == "edited bias":
            model.fc.bias[0] = bad
        elif where == "rival":
            model.fc.weight[1, 2] = bad
        elif where == "frozen part":
            model.b.weight.mul_(bad)
        else:
            point = dataclasses.replace(point, x=x * bad)
    for constraint in (point.output(0).at_least(1.0), point.classified(0), point.gradient(0).within(-9, 9)):
        if where == "rival" and not hasattr(constraint, "label"):
            continue  # a class that no row mentions is nobody's business
        try:
            result = soundly.edit(model, [constraint], layer="fc")
        except (InvalidInput, EditError):
            continue
        # tanh of an infinite value is finite: only then may anything hold.
        finite = where in ("frozen part", "input") and math.isinf(bad)
        assert finite or (result.status != "proved" and result.model is None)
