"""Planted instances that every verifier reads: dense layers with ReLUs between them, one after the other.

The same construction as in `soundly.auditing.planting`, of one kind: a sum of distances from the centre, and a bump of
one. As those it is exact, and as plain as any network can be.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from soundly.auditing.planting import F32, F64, Instance, Position, checked, place, two_parts
from soundly.errors import InvalidInput
from soundly.graph.load import load


def plain(
    *, position: Position = "corner", size: int = 6, eps: float = 0.25, radius: float = 0.0625, margin: float = 1e-3,
    holds: bool = False, seed: int = 0,
) -> Instance:  # fmt: skip
    """An instance of three dense layers over inputs [1, size]; see `soundly.auditing.planting.instance`.

    Args:
        radius: of the bump, a power of two, so that every weight is exact.
    """
    if not (eps > 0 and margin > 0 and radius > 0 and float(torch.tensor(radius).frexp().mantissa) == 0.5):
        raise InvalidInput(f"eps={eps}, margin={margin}, radius={radius}: give positive numbers, for radius 2^k.")
    found = place(position, (1, size), eps, torch.Generator().manual_seed(seed))
    name = f"dense-relu-{position}-{'robust' if holds else 'planted'}-{margin:g}-{seed}"
    both = torch.cat([torch.eye(size), -torch.eye(size)])
    centre, point, corner = (v.reshape(-1) for v in (found.centre, found.point, found.corner))
    zero, ones, slopes = torch.zeros(1, 2 * size), torch.ones(1, 2 * size), found.slopes.to(F32).repeat(2)[None]
    bump = torch.cat([zero, -ones / radius], 1)
    outwards = torch.cat([-centre, centre, -point, point])
    layers = [
        _linear(torch.cat([both, both]), outwards),
        _linear(torch.cat([torch.cat([slopes, zero], 1), bump, bump]), torch.tensor([0.0, 1.0, 1.0])),
    ]
    body = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU()).to(F64)
    with torch.no_grad():
        there, far = (float(body(x[None])[0, 0]) for x in (point, corner))
    top = float(torch.tensor(1 + far, dtype=F32))
    # The bump is 1 at the point; the wall, top - distance, is least at the corner.
    height = top - far - margin if holds else top - there + margin
    one, two = two_parts(Fraction(height), down=holds)
    last = _linear(torch.tensor([[-1.0, 0.0, 0.0], [0.0, one, two]]), torch.tensor([top, 0.0]))
    module = nn.Sequential(*body.to(F32), last)
    network = replace(load(module, torch.zeros(1, size)), name=name)
    truth = top - far - (one + two) if holds else (one + two) - (top - there)
    low, high = found.centre - found.wide, found.centre + found.wide
    return checked(Instance(name, network, low, high, holds, truth, None if holds else found.point))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer
