"""The inner maximum of adversarial losses: projected gradient ascent inside a box, one box per example.

It must climb: a training loop whose attack returns its starting point trains against noise and reports what no attack
confirms. A test holds this function to raising the loss.

Reference: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def ascend(
    loss: Callable[[Tensor], Tensor],
    lower: Tensor,
    upper: Tensor,
    *,
    steps: int,
    size: float = 2.5,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points of boxes where a loss is large.

    Args:
        loss: the losses [n] of points [n, ...], each of its own point only.
        lower, upper: boxes [n, ...]; entries where they agree stay.
        steps: signed gradient steps.
        size: their length, where a box's half width divided by `steps` is 1.
        start: points [n, ...]; uniformly random in the boxes if None.

    Returns:
        The best points met [n, ...], the start included; detached.
    """
    lower, upper = lower.detach(), upper.detach()
    if start is None:
        u = torch.rand(lower.shape, dtype=lower.dtype, device=lower.device, generator=generator)
        start = lower + u * (upper - lower)
    x, length = start.detach(), (upper - lower) / 2 * size / max(steps, 1)
    best, highest = x, None
    for i in range(steps + 1):
        with torch.set_grad_enabled(i < steps):
            value = loss(x.requires_grad_(i < steps))
            slope = torch.autograd.grad(value.sum(), x)[0] if i < steps else None
        value, x = value.detach(), x.detach()
        better = torch.ones_like(value, dtype=torch.bool) if highest is None else value > highest
        highest = value if highest is None else torch.where(better, value, highest)
        best = torch.where(better.reshape(-1, *[1] * (x.dim() - 1)), x, best)
        if slope is not None:
            x = torch.minimum(torch.maximum(x + length * slope.sign(), lower), upper)
    return best
