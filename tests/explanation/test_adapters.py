"""Adapters in captum's shape: the same calls give the same numbers, in batches, with a graph, and now with bounds."""

import captum.attr
import pytest
import torch
from tests.explanation.test_attribution import Small
from torch import Tensor, nn

import soundly
from soundly import Box, Proved
from soundly.errors import InvalidInput
from soundly.explanation import adapters


def made() -> tuple[nn.Module, soundly.Network, Tensor]:
    torch.manual_seed(0)
    model = Small(nn.GELU(), False, True).double().eval()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    return model, soundly.load(model, x[:1]), x


TARGETS = [2, [0, 2, 1], torch.tensor([1, 1, 0])]


def pairs(model: nn.Module, network: soundly.Network):
    yield captum.attr.Saliency(model), adapters.Saliency(network), {}
    yield captum.attr.InputXGradient(model), adapters.InputXGradient(network), {}
    yield (
        captum.attr.IntegratedGradients(model),
        adapters.IntegratedGradients(network),
        {"n_steps": 6, "baselines": 0.1},
    )
    yield captum.attr.LayerGradCam(model, model.features), adapters.LayerGradCam(network, "features"), {}
    activation = captum.attr.LayerGradientXActivation(model, model.features)
    yield activation, adapters.LayerGradientXActivation(network, "features"), {}


@pytest.mark.parametrize("target", TARGETS)
def test_a_batch_gets_the_attributions_of_captum(target):
    model, network, x = made()
    for theirs, ours, options in pairs(model, network):
        of = target if isinstance(target, int) else torch.as_tensor(target)
        want = theirs.attribute(x.clone().requires_grad_(), target=of, **options).detach()
        found = ours.attribute(x, target=target, **options)
        assert found.shape == want.shape
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


def test_fixed_noise_is_that_of_captum_with_the_same_samples():
    model, network, x = made()
    noise = 0.2 * torch.randn(4, 1, 2, 6, 6, dtype=torch.float64)
    found = adapters.SmoothGrad(network, noise=noise).attribute(x, target=1)
    plain = captum.attr.Saliency(model)
    want = torch.stack([plain.attribute((x + n).requires_grad_(), target=1, abs=False) for n in noise]).mean(0)
    torch.testing.assert_close(found, want.detach(), rtol=1e-6, atol=1e-8)
    drawn = adapters.SmoothGrad(network, nt_samples=3, stdevs=0.1)
    assert torch.equal(drawn.attribute(x, target=1), drawn.attribute(x, target=1))


def test_attributions_may_be_part_of_a_loss():
    model, network, x = made()
    for _, ours, options in pairs(model, network):
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(ours.attribute(z, target=1, **options).square().sum(), z)
        step = 1e-6 * torch.randn_like(x)
        change = ours.attribute(x + step, target=1, **options).square().sum()
        change = change - ours.attribute(x - step, target=1, **options).square().sum()
        assert float(change) == pytest.approx(2 * float((slope * step).sum()), rel=1e-4)


def test_bounds_hold_what_the_same_adapter_attributes():
    _, network, x = made()
    region = Box(x[:1] - 0.005, x[:1] + 0.005)
    for ours in (adapters.InputXGradient(network), adapters.LayerGradCam(network, "features")):
        found = ours.bounds(region, target=1)
        assert isinstance(found.verdict, Proved)
        values = ours.attribute(region.samples(40).flatten(0, 1), target=1)
        assert bool((found.lower <= values).all() and (values <= found.upper).all())


def test_requests_that_do_not_fit_are_refused():
    model, network, x = made()
    requests = [
        (lambda: adapters.Saliency(model), "takes a Network"),
        (lambda: adapters.Saliency(network).attribute(x[:, :1]), "inputs"),
        (lambda: adapters.Saliency(network).attribute(x, target=[0, 1]), "target"),
        (lambda: adapters.Saliency(network).attribute(x, target=3), "3"),
    ]
    for request, word in requests:
        with pytest.raises(InvalidInput, match=word):
            request()
