"""Edits that hold on whole regions: the edited network is looked at on dense grids, by PyTorch's own autograd."""

from __future__ import annotations

import copy
import importlib
import itertools

import pytest
import torch
from torch import Tensor, nn

import soundly

# Raised inside torch by forward-mode differentiation.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
acceptance = importlib.import_module("soundly.editing.acceptance")
inner = importlib.import_module("soundly.editing.inner")


def network_of(act: type[nn.Module], seed: int, hidden: int = 2) -> nn.Sequential:
    torch.manual_seed(seed)
    widths = [2, *[10] * hidden, 2]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    module = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 1.5
    return module


def grid(box: soundly.Box, steps: int = 201) -> Tensor:
    ends = zip(box.lower.reshape(-1).tolist(), box.upper.reshape(-1).tolist(), strict=True)
    axes = [torch.linspace(a, b, steps, dtype=torch.float64) for a, b in ends]
    return torch.cartesian_prod(*axes)


def seen(module: nn.Module, x: Tensor, of: int) -> tuple[Tensor, Tensor]:
    """Outputs [k] and gradients [k, 2] on a grid, in float64."""
    x = x.clone().requires_grad_()
    y = copy.deepcopy(module).double()(x)[:, of]
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


BOX = soundly.Box(torch.tensor([[-0.4, -0.3]]).double(), torch.tensor([[0.4, 0.5]]).double())
CASES = {"relu": (nn.ReLU, "2"), "relu, last layer": (nn.ReLU, "4"), "tanh": (nn.Tanh, "0"), "gelu": (nn.GELU, "2")}


@pytest.mark.parametrize("name", CASES)
def test_a_cap_on_a_derivative_holds_everywhere(name: str) -> None:
    act, layer = CASES[name]
    module = network_of(act, 3)
    network = soundly.load(module, torch.zeros(1, 2))
    slopes = seen(module, grid(BOX), 1)[1][:, 0]
    cap = float(slopes.max() - 0.25 * (slopes.max() - slopes.min()))
    area = soundly.over(BOX, name="box")
    result = soundly.edit(network, [area.gradient(of=1, entries=[0]).at_most(cap)], layer=layer, time_limit=200)
    assert result.status == "proved", result.reason
    assert result.check is not None and result.check.accepted and result.held_before == (False,)
    assert float(seen(result.applied_to(module), grid(BOX), 1)[1][:, 0].max()) <= cap + 1e-12


def test_bounds_may_depend_on_the_input_and_points_may_join() -> None:
    module = network_of(nn.Tanh, 5)
    network = soundly.load(module, torch.zeros(1, 2))
    area, point = soundly.over(BOX, name="box"), soundly.at(torch.tensor([[1.0, 1.0]]), name="outside")
    low = float((seen(module, grid(BOX), 0)[0] - grid(BOX)[:, 0]).min()) + 0.05
    constraints = [
        (area.output(of=0) - area.coordinates([0])).at_least(low),
        area.gradient(of=0).within(-4.0, 4.0),
        point.classified(1, margin=0.05),
    ]
    result = soundly.edit(network, constraints, layer="4", goals=[point.output(of=0).near(-1.0)], time_limit=200)
    assert result.status == "proved", result.reason
    edited = result.applied_to(module)
    y, slopes = seen(edited, grid(BOX), 0)
    assert float((y - grid(BOX)[:, 0]).min()) >= low - 1e-12 and float(slopes.abs().max()) <= 4.0
    assert int(edited(point.x).argmax()) == 1


def test_a_claim_about_a_union_is_about_all_of_its_boxes() -> None:
    module = network_of(nn.ReLU, 7, hidden=1)
    network = soundly.load(module, torch.zeros(1, 2))
    boxes = [soundly.Box(BOX.lower + shift, BOX.lower + shift + 0.2) for shift in (0.0, 0.5)]
    tops = [float(seen(module, grid(box), 0)[0].max()) for box in boxes]
    result = soundly.edit(
        network,
        [soundly.over(soundly.Union.of(boxes)).output(of=0).at_most(min(tops) - 0.1)],
        layer="0",
        time_limit=100,
    )
    assert result.status == "proved", result.reason
    for box in boxes:
        assert float(seen(result.applied_to(module), grid(box), 0)[0].max()) <= min(tops) - 0.1 + 1e-12


def _only_a_point(region, right=acceptance._boxes):
    return [soundly.Box(box.lower, box.lower) for box in right(region)]


def _nothing_found(whole, claim, samples):
    return 0


def test_no_region_is_proved_by_a_point_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would notice a claim that speaks of a point where a region is meant."""
    module = network_of(nn.ReLU, 3)
    network = soundly.load(module, torch.zeros(1, 2))
    slopes = seen(module, grid(BOX), 1)[1][:, 0]
    cap = float(slopes.max() - 0.25 * (slopes.max() - slopes.min()))
    constraint = soundly.over(BOX).gradient(of=1, entries=[0]).at_most(cap)
    monkeypatch.setattr(inner, "_violations", _nothing_found)  # the verifier alone decides
    monkeypatch.setattr(inner, "_first", lambda area: [area.x])
    honest = soundly.edit(network, [constraint], layer="2", time_limit=200)
    assert honest.status == "proved", honest.reason
    assert float(seen(honest.applied_to(module), grid(BOX), 1)[1][:, 0].max()) <= cap + 1e-12
    monkeypatch.setattr(acceptance, "_boxes", _only_a_point)
    wrong = soundly.edit(network, [constraint], layer="2", time_limit=200)
    assert wrong.status == "proved"
    assert float(seen(wrong.applied_to(module), grid(BOX), 1)[1][:, 0].max()) > cap + 1e-6


def test_what_cannot_hold_is_not_proved() -> None:
    network = soundly.load(network_of(nn.ReLU, 1, hidden=1), torch.zeros(1, 2))
    output = soundly.over(BOX, name="box").output(of=0)
    result = soundly.edit(network, [output.at_least(1.0), output.at_most(0.5)], layer="0", time_limit=20)
    assert result.status == "infeasible" and result.model is None and any("box" in name for name in result.conflict)
    with pytest.raises(soundly.errors.InvalidInput, match=r"compares points"):
        point = soundly.at(torch.zeros(1, 2), name="x")
        both = soundly.over(BOX).output(of=0) - point.output(of=0)
        soundly.edit(network, [both.within(-1, 1)], layer="0", time_limit=20)
