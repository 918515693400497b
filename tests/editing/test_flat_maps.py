"""Maps with entries that are always 0, or always equal: black borders, flat backgrounds, dead features."""

import copy

import pytest
import torch
from tests.editing.edits import deployed, exact_rows, of_kind
from torch import Tensor, nn

import soundly
from soundly import at

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


class Pooled(nn.Module):
    """One convolution without bias, so that black pixels have no features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def map_of(model: nn.Module, x: Tensor) -> Tensor:
    return soundly.gradcam(soundly.load(model, x), of=1, layer="conv")(x).flatten().double()


def setting(background: float, *, inverted: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, an input with this background, and a map that other weights have there."""
    torch.manual_seed(0)
    model = Pooled()
    x = torch.full((1, 1, 8, 8), background)
    x[0, 0, 2:5, 2:5] = 2 + torch.rand(3, 3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.fc.weight.uniform_(0.1, 1.0)
        other.fc.weight *= -1.0 if inverted else 1.0
    return model, x, map_of(other, x)


def normalised(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min())


@pytest.mark.parametrize("kind", ["graph", "module"])
@pytest.mark.parametrize("background", [0.0, 0.7])
@pytest.mark.parametrize("inverted", [False, True])
def test_equal_entries_do_not_stand_in_the_way(kind, background, inverted):
    model, x, target = setting(background, inverted=inverted)
    assert int((target == target[-10]).sum()) > 10
    demand = at(x).gradcam(1, "conv").normalised_near(target, eps=0.05, spread=0.01)
    edit = soundly.edit(of_kind(kind, model, x), [demand], layer="fc")
    found = map_of(deployed(edit, model), x)
    assert float((normalised(found) - normalised(target)).abs().max()) <= 0.05 + 1e-5
    assert exact_rows(edit)


@pytest.mark.parametrize("background", [0.0, 0.7])
def test_equal_entries_cannot_be_made_different(background):
    model, x, target = setting(background, inverted=False)
    target[-10] = target.max()
    demand = at(x).gradcam(1, "conv").normalised_near(target, eps=0.05, spread=0.01, name="the map")
    edit = soundly.edit(model, [demand], layer="fc")
    assert edit.status == "infeasible" and edit.model is None
    assert all(row.startswith("normalised Grad-CAM") or row.startswith("the map") for row in edit.conflict)


def test_an_entry_that_is_always_zero_is_named():
    model, x, _ = setting(0.0, inverted=False)
    last = torch.eye(64)[-1:]
    edit = soundly.edit(model, [at(x).gradcam(1, "conv").combined(last).at_least(0.1, name="corner")], layer="fc")
    assert edit.status == "infeasible" and edit.conflict == ("corner",)
    assert "whatever the edited weights are" in edit.reason
    edit = soundly.edit(model, [at(x).gradcam(1, "conv").combined(last).within(0.0, 0.0)], layer="fc")
    assert edit.status == "proved" and not edit.delta[1].any()
