"""A network becomes an ordinary module again: the same numbers, its own parameters, trainable through its gradient."""

import copy

import pytest
import torch
from torch import nn

import soundly
from soundly.graph.network import Network


@pytest.fixture
def captured() -> tuple[nn.Module, Network, torch.Tensor]:
    torch.manual_seed(0)
    module = (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(64, 3)).double().eval()
    )
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    return module, soundly.load(module, x), x


def test_the_module_computes_the_same(captured: tuple[nn.Module, Network, torch.Tensor]) -> None:
    module, network, x = captured
    exported = soundly.to_torch(network)
    assert torch.allclose(exported(x), module(x), rtol=0, atol=1e-12)
    assert {name for name, _ in exported.named_parameters()} == {name.replace(".", "_") for name in network.parameters}


def test_its_parameters_are_copies(captured: tuple[nn.Module, Network, torch.Tensor]) -> None:
    module, network, x = captured
    before = module(x).detach().clone()
    exported = soundly.to_torch(network)
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.zero_()
    assert torch.equal(module(x), before) and torch.equal(network(x), before)


def test_a_gradient_trains_with_first_order_autograd(captured: tuple[nn.Module, Network, torch.Tensor]) -> None:
    """The loss is on an explanation; its gradient towards the weights equals that of double backward."""
    module, network, x = captured
    saliency = soundly.to_torch(network.gradient(of=1))
    loss = saliency(x).square().sum()
    ours = dict(
        zip(dict(saliency.named_parameters()), torch.autograd.grad(loss, list(saliency.parameters())), strict=True)
    )
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(module(leaf)[0, 1], leaf, create_graph=True)
    named = {name: p for name, p in module.named_parameters() if name.replace(".", "_") in ours}
    theirs = torch.autograd.grad(slope.square().sum(), list(named.values()), allow_unused=True)
    for name, want in zip(named, theirs, strict=True):
        got = ours[name.replace(".", "_")]
        assert torch.allclose(got, torch.zeros_like(got) if want is None else want, rtol=1e-8, atol=1e-10), name


def test_it_moves_and_saves_like_any_module(captured: tuple[nn.Module, Network, torch.Tensor]) -> None:
    _, network, x = captured
    exported, other = soundly.to_torch(network), soundly.to_torch(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(exported.state_dict())
    assert torch.equal(other(x), exported(x))
    assert exported.float()(x.float()).dtype == torch.float32


def test_several_outputs_stay_a_tuple(captured: tuple[nn.Module, Network, torch.Tensor]) -> None:
    _, network, x = captured
    both = network.with_outputs(network.output, network.at("0"))
    logits, features = soundly.to_torch(both)(x)
    assert logits.shape == (1, 3) and features.shape == (1, 4, 4, 4)


def test_a_copy_of_a_deep_module_is_a_module_of_its_own() -> None:
    """Deeper than Python's recursion goes; the copy computes the same from weights of its own."""
    torch.manual_seed(0)
    deep = nn.Sequential(*(layer for _ in range(300) for layer in (nn.Linear(2, 2), nn.Tanh()))).double()
    x = torch.randn(1, 2, dtype=torch.float64)
    exported = soundly.to_torch(soundly.load(deep, x))
    copied = copy.deepcopy(exported)
    assert torch.equal(copied(x), exported(x))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(copied(x), torch.zeros(1, 2).double()) and torch.allclose(exported(x), deep(x), atol=1e-12)
