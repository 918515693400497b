"""Captures compared with their modules, with the built-in check switched off.

`from_torch` compares each capture with its module itself; comparing again without it, neither can hide the gaps of the
other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from soundly.graph.from_torch import compare, from_torch
from soundly.graph.network import Network


class Call(nn.Module):
    """A function of tensors as a module, with weights of its own."""

    def __init__(self, function: Callable[..., Any], **weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *x: Tensor) -> Any:
        return self.function(*x, *self.parameters())


def agree(module: nn.Module, *examples: Tensor, tolerance: float = 1e-10) -> Network:
    """Captures without the built-in check and compares outputs and input gradients at new inputs, in float64."""
    module = module.double().eval()
    examples = tuple(e.double() if e.is_floating_point() else e for e in examples)
    network = from_torch(module, examples, check=False)
    torch.manual_seed(1)
    inputs = [e + 0.3 * torch.randn_like(e) if e.is_floating_point() else e for e in examples]
    floats = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    want = module(*[x.clone() if x.is_floating_point() else x for x in inputs])
    want = [w for w in (want if isinstance(want, tuple) else (want,)) if isinstance(w, Tensor)]
    got = network(*floats)
    got = got if isinstance(got, tuple) else (got,)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert bool(((g - w).abs() <= tolerance * (1 + w.abs())).all()), f"largest error {(g - w).abs().max()}"
    seeds = [torch.randn_like(w) for w in want]
    totals = [sum((v * s).sum() for v, s in zip(values, seeds, strict=True)) for values in (got, want)]
    slopes = [torch.autograd.grad(total, floats, allow_unused=True) for total in totals]
    for g, w in zip(*slopes, strict=True):
        zero = torch.zeros(())
        assert bool(((zero if g is None else g) - (zero if w is None else w)).abs().max() <= 1e-8)
    compare(network, module, examples)  # and the built-in check agrees
    return network


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)), dtype=torch.float64)
