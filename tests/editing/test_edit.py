"""Whole edits: what is called proved holds when autograd looks again."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from tests.editing.edits import deployed, exact_rows, of_kind
from tests.editing.test_program import Values, gradcam, gradient, integrated, normalised, place_and_gradient
from tests.editing.test_trunk import Cnn, Decoder, Mlp, made
from torch import nn

import soundly
from soundly import at
from soundly.errors import EditError, InvalidInput

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.mark.parametrize("kind", ["graph", "module"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolutional_network_does_what_was_proved(kind, bias):
    model, x = made(Cnn, bias=bias)
    other = torch.randn_like(x)
    start = torch.zeros_like(x)
    p, q = at(x, name="p"), at(other, name="q")
    groups = (torch.arange(x.numel()) % 5).reshape(x.shape)
    # Maps that some weights have: with four channels not every map is one.
    wanted, _ = made(Cnn, seed=1, bias=bias)
    wanted.load_state_dict({**model.state_dict(), **{k: v for k, v in wanted.state_dict().items() if k[:2] == "fc"}})
    target, mask = gradcam(wanted.eval(), x, 0), gradcam(wanted, x, 4)
    mask = mask > mask.sort().values[9:11].mean()
    ceiling = integrated(model.eval(), x, start, 3, 4)
    ceiling = torch.stack([ceiling[groups.flatten() == t].sum() for t in range(5)]) + 0.01
    before = model.fc.weight.detach().clone()
    result = soundly.edit(
        of_kind(kind, model, x),
        [
            p.classified(0, margin=0.2),
            q.classified(4, margin=0.1),
            p.gradcam(0, "block").normalised_near(target, eps=0.02),
            q.gradient(2, entries=[0, 5, 9]).at_least(0.01, name="monotone"),
            (p.gradient(1, entries=[3, 4]) - q.gradient(1, entries=[3, 4])).within(-0.001, 0.001, name="equal"),
            p.integrated_gradients(3, baseline=start, steps=4, groups=groups).at_most(ceiling),
            p.gradcam(4, "block").keeps_top(mask, margin=1e-5),
        ],
        layer="fc",
    )
    new = deployed(result, model)
    assert result.rows == result.proven and result.rows_before < result.rows and exact_rows(result)
    slack = 1e-9
    y = new(x)[0].detach(), new(other)[0].detach()
    for scores, label, margin in ((y[0], 0, 0.2), (y[1], 4, 0.1)):
        rivals = [c for c in range(5) if c != label]
        assert float(scores[label] - scores[rivals].max()) >= margin - slack
    exact = torch.tensor([float(v) for v in normalised(gradcam(new, x, 0))], dtype=torch.float64)
    scaled = (target - target.min()) / (target.max() - target.min())
    assert float((exact - scaled).abs().max()) <= 0.02 + slack
    assert float(gradient(new, other, 2)[[0, 5, 9]].min()) >= 0.01 - slack
    assert float((gradient(new, x, 1) - gradient(new, other, 1))[[3, 4]].abs().max()) <= 0.001 + slack
    ig = integrated(new, x, start, 3, 4)
    assert bool((torch.stack([ig[groups.flatten() == t].sum() for t in range(5)]) <= ceiling + slack).all())
    cam = gradcam(new, x, 4)
    assert float(cam[mask].min() - cam[~mask].max()) >= 1e-5 - slack
    assert torch.equal(model.fc.weight, before)


@pytest.mark.parametrize("kind", ["graph", "module"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_transformer_does_what_was_proved_at_several_tokens(kind, bias):
    model, x = made(Decoder, bias=bias)
    first, last = at(x, position=1, name="second token"), at(x, position=-1, name="last token")
    groups = torch.arange(4)[None, :, None].expand(x.shape)
    result = soundly.edit(
        of_kind(kind, model, x),
        [
            first.classified(6),
            last.classified(2, margin=0.5),
            last.integrated_gradients(2, baseline=torch.zeros_like(x), steps=5, groups=groups).at_least(0.05),
            last.gradient(3, place="attended", entries=[25, 31]).equals(0.25, tolerance=1e-3),
        ],
        layer="fc",
    )
    new = deployed(result, model)
    assert new(x)[0].argmax(1)[[1, 3]].tolist() == [6, 2]
    ig = integrated(new, x, torch.zeros_like(x), 2, 5, position=-1).reshape(4, 8).sum(1)
    assert float(ig.min()) >= 0.05 - 1e-9
    slope = place_and_gradient(new, x, 3, -1)[1].flatten()[[25, 31]]
    assert float((slope - 0.25).abs().max()) <= 1e-3 + 1e-9


@pytest.mark.parametrize("kind", ["graph", "module"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_every_storage_type_is_proved_as_stored(kind, dtype, norm):
    model, x = made(Mlp)
    model, x = model.to(dtype), x.to(dtype)
    box = at(x).gradient(1, entries=[0, 2]).within(0.2, 0.4)
    result = soundly.edit(of_kind(kind, model, x), [box, at(x).classified(2, margin=0.1)], layer="fc", norm=norm)
    new = deployed(result, model)
    assert exact_rows(result) and result.certificate.arrays["weights"].dtype != np.float16
    wide, far = new.double(), 1e-9 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 3e-2
    slope = gradient(wide, x.double(), 1)[[0, 2]]
    assert float(slope.min()) >= 0.2 - far and float(slope.max()) <= 0.4 + far
    y = wide(x.double())[0].detach()
    assert float(y[2] - y[:2].max()) >= 0.1 - far


def test_half_precision_heads_without_a_certificate_format_are_refused():
    model, x = made(Mlp)
    with pytest.raises((InvalidInput, EditError), match="float16"):
        soundly.edit(model.half(), [at(x.half()).output(0).at_least(1.0)], layer="fc")


def test_another_choice_of_extremes_is_tried_where_the_targets_own_cannot_be():
    target = torch.tensor([0.0, 0.02, 0.5, 0.99, 1.0], dtype=torch.float64)
    torch.manual_seed(0)
    model, x = Values(5).double(), torch.zeros(1, 5, dtype=torch.float64)
    with torch.no_grad():
        model.fc.weight[0] = target
    g = at(x).gradient(0)
    swapped = g.combined(torch.tensor([[1.0, -1.0, 0, 0, 0]])).at_least(0.01, name="first above second")
    result = soundly.edit(model, [g.normalised_near(target, eps=0.05), swapped], layer="fc")
    values = deployed(result, model).fc.weight[0].detach()
    assert values[0] >= values[1] + 0.01
    gaps = [abs(a - Fraction(b)) for a, b in zip(normalised(values), target.tolist(), strict=True)]
    assert max(gaps) <= Fraction(0.05)
    both = g.combined(torch.tensor([[1.0, 0, -1.0, 0, 0]])).at_least(0.01, name="first above third")
    refusal = soundly.edit(model, [g.normalised_near(target, eps=0.05), both], layer="fc")
    assert refusal.status == "infeasible" and refusal.model is None


def test_two_maps_may_both_need_other_extremes():
    """Each map's own extreme positions are contradicted by an output box; neighbours within eps of them are not."""
    torch.manual_seed(3)
    weight = torch.eye(4, dtype=torch.float64)[:1].repeat(2, 1)
    layer = nn.Linear(4, 2).double()
    with torch.no_grad():
        layer.weight.copy_(weight + 0.1 * torch.randn_like(weight))
        layer.bias.zero_()
    model = nn.Sequential(nn.Identity(), layer)
    point = at(torch.ones(1, 4, dtype=torch.float64))
    target = torch.tensor([0.0, 0.02, 0.5, 1.0], dtype=torch.float64)
    constraints = []
    for c in (0, 1):
        gradient = point.gradient(c)  # the row w_c itself
        constraints.append(gradient.normalised_near(target, eps=0.1, spread=0.5))
        difference = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.float64)
        constraints.append(gradient.combined(difference).at_least(0.01))  # entry 0 must not be the smallest
    result = soundly.edit(model, constraints, layer="1")
    assert result.status == "proved", result.reason
    rows = result.model[1].weight.detach()
    for row in rows:
        scaled = (row - row.min()) / (row.max() - row.min())
        assert float((scaled - target).abs().max()) <= 0.1 + 1e-12 and float(row[0] - row[1]) >= 0.01 - 1e-12


def test_an_edit_that_is_not_needed_changes_nothing():
    model, x = made(Mlp)
    result = soundly.edit(model, [at(x).output(0).within(-100, 100)], layer="fc")
    assert result.rows_before == result.rows == 1
    assert torch.equal(deployed(result, model).fc.weight, model.fc.weight)
    assert all(float(d.abs().max()) == 0 for d in result.delta.values())


def test_a_layer_with_one_output_can_be_edited():
    model, x = made(Mlp, classes=1)
    new = deployed(soundly.edit(model, [at(x).output(0).within(1.0, 1.5)], layer="fc"), model)
    assert 1.0 <= float(new(x).detach()) <= 1.5


def test_weights_of_very_different_size_are_stored_exactly():
    for dtype in (torch.float64, torch.float32):
        model = Values(3).to(dtype)
        with torch.no_grad():
            model.fc.weight[0] = torch.tensor([1.0, 1e8, -3e-7])
        x = torch.zeros(1, 3, dtype=dtype)
        wanted = at(x).gradient(0).within(torch.tensor([0.09, 1e-9, 5.0]), torch.tensor([0.11, 2e-9, 6.0]))
        result = soundly.edit(model, [wanted], layer="fc")
        if result.status == "proved":
            new = deployed(result, model).fc.weight[0].detach().double()
            assert 0.09 <= float(new[0]) <= 0.11 and 1e-9 <= float(new[1]) <= 2e-9 and 5.0 <= float(new[2]) <= 6.0
        else:
            assert result.model is None


def test_edits_are_deterministic(tmp_path):
    files = []
    for name in ("a", "b"):
        model, x = made(Cnn)
        constraints = [at(x).classified(3), at(x).gradcam(3, "block").at_least(0.001)]
        result = soundly.edit(soundly.load(model, x), constraints, layer="fc")
        result.certificate.save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
