"""Changes of a given rank, and the count of what an edit changed."""

import importlib

import pytest
import torch
from tests.editing.edits import deployed, of_kind
from tests.editing.test_trunk import Mlp, made
from torch import Tensor, nn

import soundly
from soundly import at, over
from soundly.certificate import check
from soundly.editing.low_rank import LowRank
from soundly.errors import InvalidInput

inner = importlib.import_module("soundly.editing.inner")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def rank_of(change: Tensor) -> int:
    """Up to the rounding of the weights to float32."""
    values = torch.linalg.svdvals(change.reshape(len(change), -1))
    return int((values > 1e-5 * values[0]).sum())


def relu_net(seed: int = 0) -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 2))
    return model, [torch.randn(1, 3) for _ in range(4)]


def wishes(network, xs: list[Tensor], room: float = 0.02):
    """Another slope and output at each point."""
    demands = []
    for i, x in enumerate(xs):
        p, slope = at(x, name=f"x{i}"), network.gradient(of=0)(x)[0, i % 3]
        demands.append(p.gradient(0, entries=[i % 3]).within(slope + 0.05 - room, slope + 0.05 + room))
        demands.append(p.output(1).at_least(float(network(x)[0, 1]) + 0.02))
    return demands


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_the_change_has_the_rank(rank, layer):
    model, xs = relu_net()
    network = soundly.load(model, xs[0])
    demands = wishes(network, xs[: max(2, rank)])
    edit = soundly.edit(network, demands, layer=layer, rank=rank)
    assert edit.status == "proved" and check(edit.certificate).accepted, edit.reason
    change = edit.delta[f"{layer}.weight"]
    assert rank_of(change) <= rank and float(change.norm()) > 1e-3
    free = soundly.edit(network, demands, layer=layer)
    size = {name: sum(float(d.square().sum()) for d in e.delta.values()) for name, e in (("all", free), ("low", edit))}
    assert size["all"] <= size["low"] * (1 + 1e-3)
    if rank == 1 and layer == "2":
        assert rank_of(free.delta["2.weight"]) > 1  # otherwise nothing was asked for


def test_kernels_are_matrices_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))
    x = torch.randn(1, 1, 6, 6)
    network = soundly.load(model, x)
    slope = network.gradient(of=0)(x).flatten()[:3]
    edit = soundly.edit(network, [at(x).gradient(0, entries=[0, 1, 2]).at_least(slope + 0.01)], layer="2", rank=2)
    assert edit.status == "proved" and rank_of(edit.delta["2.weight"]) <= 2
    assert edit.delta["2.weight"].shape == (6, 4, 3, 3)


def test_regions_and_goals():
    model, xs = relu_net()
    network = soundly.load(model, xs[0])
    box = soundly.Box(xs[0] - 0.02, xs[0] + 0.02)
    demand = over(box).output(0).at_most(float(network(xs[0])[0, 0]) - 0.05)
    edit = soundly.edit(network, [demand], layer="2", rank=1, goals=[at(xs[1]).output(0).near(0.0)], time_limit=100)
    assert edit.status == "proved" and rank_of(edit.delta["2.weight"]) == 1
    assert float(edit.model(xs[0])[0, 0]) <= float(network(xs[0])[0, 0]) - 0.05


def test_a_rank_that_is_too_small_is_infeasible():
    """Two slopes of a linear network whose matrix has one row in each: rank 1 cannot turn both their own way."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[1].weight.copy_(torch.eye(2))
    x = torch.ones(1, 2)
    network = soundly.load(model, x)
    turned = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    demands = [at(x).gradient(k).within(turned[k] - 0.1, turned[k] + 0.1, name=f"row {k}") for k in (0, 1)]
    assert soundly.edit(network, demands, layer="0").status == "proved"
    assert soundly.edit(network, demands, layer="0", rank=2).status == "proved"
    edit = soundly.edit(network, demands, layer="0", rank=1)
    assert edit.status == "infeasible" and edit.model is None


def test_without_the_projection_the_rank_would_be_too_large(monkeypatch):
    monkeypatch.setattr(LowRank, "__call__", lambda self, rows: rows)
    with pytest.raises(AssertionError):
        test_the_change_has_the_rank(1, "2")


def test_what_does_not_go_with_a_rank():
    model, xs = relu_net()
    network, demand = soundly.load(model, xs[0]), at(xs[0]).output(0).at_least(1.0)
    for options in ({"rank": 0}, {"norm": "l1"}, {"bound": 1.0}, {"start": {}}):
        with pytest.raises(InvalidInput, match="rank"):
            soundly.edit(network, [demand], layer="2", **{"rank": 1, **options})
    with pytest.raises(InvalidInput, match="captured network"):
        soundly.edit(model, [demand], layer="4", rank=1)


# -- what changed


@pytest.mark.parametrize("kind", ["graph", "module"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_what_changed_is_counted(kind, norm):
    model, x = made(Mlp)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    edit = soundly.edit(of_kind(kind, model, x), [at(x).gradient(1).within(0.1, 0.3)], layer="fc", norm=norm)
    after = dict(deployed(edit, model).named_parameters())
    assert edit.moved.keys() == {"fc.weight", "fc.bias"}
    for name, moved in edit.moved.items():
        change = after[name].detach() - before[name]
        assert (moved.changed, moved.of) == (int((change != 0).sum()), change.numel())
        assert moved.norm == pytest.approx(float(change.norm())) and moved.largest == float(change.abs().max())
        assert moved.relative == pytest.approx(float(change.norm() / before[name].norm()))
    assert edit.moved["fc.bias"].changed == 0
    few = edit.moved["fc.weight"].changed
    assert few == 6 if norm == "l2" else few <= 4  # a vertex: as many weights as gradient entries that decide


def test_what_changed_inside_is_counted_by_layer():
    model, xs = relu_net()
    network = soundly.load(model, xs[0])
    edit = soundly.edit(network, wishes(network, xs[:2]), layer="2")
    assert set(edit.moved) == set(edit.delta)
    for name, moved in edit.moved.items():
        assert moved.changed == int((edit.delta[name] != 0).sum())
    assert soundly.edit(network, [at(xs[0]).output(0).at_least(1e9)], layer="2", bound=1e-3).moved == {}
