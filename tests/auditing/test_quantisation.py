"""Quantised networks hold the numbers that they should, and what that costs is proved."""

import pytest
import torch
from torch import nn

import soundly
from soundly.auditing.quantisation import quantise
from soundly.errors import InvalidInput


def model() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
    return net, torch.rand(30, 1, 1, 4, 4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_weights_are_the_nearest_of_few_numbers(bits, per):
    module, x = model()
    other = quantise(soundly.load(module, x[0]), bits, per=per)
    most = 2 ** (bits - 1) - 1
    names = [name for name, p in module.named_parameters() if p.dim() > 1]
    assert names
    for name, p in module.named_parameters():
        q = other.values[other.parameters[name]]
        if p.dim() == 1:
            assert torch.equal(q, p)
            continue
        rows = zip(p, q, strict=True) if per == "channel" else [(p, q)]
        for old, new in rows:
            unit = old.detach().abs().max() / most
            levels = new / unit
            assert torch.allclose(levels, levels.round(), atol=1e-4) and float(levels.abs().max()) <= most + 1e-4
            assert bool(((new - old).abs() <= unit * 0.5001).all())


def test_activations_are_multiples_between_the_ends_on_the_examples():
    """Against torch's own fake quantisation, layer by layer."""
    module, x = model()
    net = soundly.load(module, x[0])
    other = quantise(net, 8, activations=4, calibration=x)

    def fake(v: torch.Tensor, all_: torch.Tensor) -> torch.Tensor:
        low, high = min(0.0, float(all_.min())), max(0.0, float(all_.max()))
        unit = (high - low) / 15
        return torch.fake_quantize_per_tensor_affine(v, unit, -round(low / unit), 0, 15)

    with torch.no_grad():
        now, whole = x[:, 0], x[:, 0]
        for layer in module:
            if not isinstance(layer, (nn.Conv2d, nn.Linear)):
                now, whole = layer(now), layer(whole)
                continue
            unit = layer.weight.abs().max() / 127
            weight, entered = torch.round(layer.weight / unit) * unit, fake(now, whole)
            if isinstance(layer, nn.Conv2d):
                now = nn.functional.conv2d(entered, weight, layer.bias)
            else:
                now = nn.functional.linear(entered, weight, layer.bias)
            whole = layer(whole)
        for one, expected in zip(x, now, strict=True):
            assert torch.allclose(other(one)[0], expected, atol=1e-4)


def test_what_rounded_activations_change_is_proved():
    torch.manual_seed(1)
    x = torch.rand(20, 1, 4)
    net = soundly.load(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), x[0])
    box = soundly.Box(x[0] - 0.05, x[0] + 0.05)
    uppers = []
    for bits in (4, 6):
        other = quantise(net, 8, activations=bits, calibration=x)
        found = soundly.gap(net, other, box, timeout=60)
        points = torch.cat([box.samples(300), box.corners(100)])
        a, b = (torch.vmap(v.to(torch.float64))(points) for v in (net, other))
        assert isinstance(found.verdict, soundly.Proved) and float((a - b).abs().max()) <= found.upper
        uppers.append(found.upper)
    assert uppers[1] < uppers[0] / 2


def test_arguments_that_make_no_sense():
    module, x = model()
    net = soundly.load(module, x[0])
    for call, text in (
        (lambda: quantise(net, 1), "bits"),
        (lambda: quantise(net, 8, per="row"), "per"),
        (lambda: quantise(net, 8, activations=8), "calibration"),
        (lambda: quantise(net, 8, activations=8, calibration=x[:0]), "calibration"),
        (lambda: quantise(soundly.load(nn.ReLU(), x[0]), 8), "no layer"),
    ):
        with pytest.raises(InvalidInput, match=text):
            call()
