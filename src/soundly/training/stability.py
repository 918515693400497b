"""How firm labels and maps are under attack: accuracy within a distance, and Kendall's tau of attacked maps.

Both are measured by attacks: true values are not above them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from soundly.errors import InvalidInput
from soundly.training.attack import ascend
from soundly.training.maps import Cam, ConvNet, Map


def accuracy(model: ConvNet, x: Tensor, y: Tensor, *, eps: float = 0.0, steps: int = 40, restarts: int = 1) -> float:
    """The share of inputs [n, ...] in [0, 1] that keep their label y [n] under attacks within eps (linf)."""
    right = torch.ones_like(y, dtype=torch.bool)
    for _ in range(restarts if eps else 1):
        moved = x
        if eps:
            lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
            moved = ascend(lambda z: cross_entropy(model(z), y, reduction="none"), lower, upper, steps=steps)
        with torch.no_grad():
            right &= model(moved).argmax(1) == y
    return float(right.float().mean())


@dataclass(frozen=True)
class Stability:
    """Attacks on maps: the mean of Kendall's tau between clean and attacked maps of the label, over the inputs whose
    label the attack left alone, and the share of these. A network with few of them looks stable: read both."""

    tau: float
    kept: float


def stability(
    model: ConvNet, x: Tensor, y: Tensor, *, eps: float, top: int = 8, steps: int = 40, map: Map | None = None
) -> Stability:
    """Attacks the map of the label within eps (linf): its `top` largest places shall become small.

    Reference: Ghorbani et al., "Interpretation of Neural Networks is Fragile", AAAI 2019 (the attack); Boopathy et al.,
    ICML 2020 (the measure).
    """
    map = map or Cam()

    def own(z: Tensor) -> Tensor:
        maps = map(model, z).maps
        return maps[torch.arange(len(y)), y]

    clean = own(x).detach()
    if not 0 < top <= clean.shape[1]:
        raise InvalidInput(f"top is {top}, but the map has {clean.shape[1]} places.")
    largest = clean.topk(top, 1).indices
    lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    moved = ascend(lambda z: -own(z).gather(1, largest).sum(1), lower, upper, steps=steps)
    with torch.no_grad():
        kept = model(moved).argmax(1) == model(x).argmax(1)
    taus = kendall(clean, own(moved).detach())[kept]
    return Stability(float(taus.mean()) if len(taus) else float("nan"), float(kept.float().mean()))


def kendall(a: Tensor, b: Tensor) -> Tensor:
    """Kendall's tau-b of each row of [n, places] with the same row of another: 1 the same order, -1 the reverse; 0
    where all entries of one are equal."""
    i, j = torch.triu_indices(a.shape[1], a.shape[1], 1)
    p, q = (torch.sign(v[:, i] - v[:, j]) for v in (a, b))
    pairs = (p.abs().sum(1) * q.abs().sum(1)).sqrt()
    return torch.where(pairs > 0, (p * q).sum(1) / pairs.clamp(min=1), 0.0)


def curve(model: ConvNet, x: Tensor, y: Tensor, eps: Sequence[float], *, steps: int = 40) -> list[float]:
    """Accuracy under attack at several distances."""
    return [accuracy(model, x, y, eps=e, steps=steps) for e in eps]
