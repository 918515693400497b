"""What becomes of the features outside of a mask: four answers, each with a loss and a test of faithfulness.

A mask is sufficient if the prediction stays whatever these features become: a fixed value (baseline), random values
(probabilistic), the worst values within a distance that an attack finds (robust), or all values within a distance, by
bounds (certified). Only the last one proves something, and it is the one whose loss is never too small.

Masks are numbers, 1 for a kept feature, of a shape that expands to the input's: [n, 1, h, w] keeps or frees a pixel's
channels together, [n, t, 1] a token's embedding. Losses are differentiable in the mask, so that it learns from them.

Reference: Bassan et al., "Explain Yourself, Briefly! Self-Explaining Neural Networks with Concise Sufficient Reasons",
ICLR 2025 (the first three).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from soundly.training.attack import ascend
from soundly.training.bounds import Method, TrainingBounds


class Masking(Protocol):
    """One meaning of "the features outside of the mask do not matter"."""

    @property
    def name(self) -> str: ...

    def loss(self, model: nn.Module, x: Tensor, mask: Tensor, label: Tensor, ramp: float = 1.0) -> Tensor:
        """How far predictions at x [n, ...] with this mask are from `label` [n]; `ramp` scales a distance."""
        ...

    def faithful(self, model: nn.Module, x: Tensor, mask: Tensor, label: Tensor) -> Tensor:
        """Whether each prediction stays [n], as far as this masking can tell."""
        ...


@dataclass(frozen=True, eq=False)
class Baseline:
    """One completion: a fixed value, 0 for images, the embedding of a mask token for text."""

    value: Tensor | float = 0.0
    name: str = "baseline"

    def _filled(self, x: Tensor, mask: Tensor) -> Tensor:
        return mask * x + (1 - mask) * torch.as_tensor(self.value, dtype=x.dtype)

    def loss(self, model: nn.Module, x: Tensor, mask: Tensor, label: Tensor, ramp: float = 1.0) -> Tensor:
        return cross_entropy(model(self._filled(x, mask)), label)

    def faithful(self, model: nn.Module, x: Tensor, mask: Tensor, label: Tensor) -> Tensor:
        return model(self._filled(x, mask)).argmax(1) == label


@dataclass(frozen=True, eq=False)
class Probabilistic:
    """Random completions, a new one for every example.

    Attributes:
        eps: each number uniform within this distance of its own, and within `clip`.
        rows: if given, a table [words, width] instead: whole rows of it, for embeddings of tokens.
        samples: completions that a faithful mask must all survive.
    """

    eps: float = 0.12
    clip: tuple[float, float] = (0.0, 1.0)
    rows: Tensor | None = None
    samples: int = 10
    name: str = "probabilistic"

    def _filled(self, x: Tensor, mask: Tensor, ramp: float) -> Tensor:
        if self.rows is None:
            low, high = (x - ramp * self.eps).clamp(min=self.clip[0]), (x + ramp * self.eps).clamp(max=self.clip[1])
            z = low + torch.rand_like(x) * (high - low)
        else:
            z = self.rows[torch.randint(len(self.rows), x.shape[:-1])]
        return mask * x + (1 - mask) * z

    def loss(self, model: nn.Module, x: Tensor, mask: Tensor, label: Tensor, ramp: float = 1.0) -> Tensor:
        return cross_entropy(model(self._filled(x, mask, ramp)), label)

    def faithful(self, model: nn.Module, x: Tensor, mask: Tensor, label: Tensor) -> Tensor:
        kept = [model(self._filled(x, mask, 1.0)).argmax(1) == label for _ in range(self.samples)]
        return torch.stack(kept).all(0)


@dataclass(frozen=True, eq=False)
class Robust:
    """The worst completion within eps (linf) that projected gradient ascent finds.

    Where a feature is kept the attack is not at work; what it would do there next, one signed step to the end of the
    range, stands for the completion, so that the mask learns what to keep as well as what to free.

    Attributes:
        steps: of the attack in training; measuring takes `restarts` attacks of 40.
    """

    eps: float = 0.12
    clip: tuple[float, float] = (0.0, 1.0)
    steps: int = 10
    restarts: int = 2
    name: str = "robust"

    def loss(self, model: nn.Module, x: Tensor, mask: Tensor, label: Tensor, ramp: float = 1.0) -> Tensor:
        kept = mask.detach()
        lower, upper = box(x, kept, ramp * self.eps, self.clip)
        worst = ascend(lambda z: cross_entropy(model(z), label, reduction="none"), lower, upper, steps=self.steps)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(cross_entropy(model(worst.requires_grad_()), label), worst)
        next_ = (x + ramp * self.eps * slope.sign()).clamp(*self.clip)
        worst = torch.where(kept > 0.5, next_, worst).detach()
        return cross_entropy(model(mask * x + (1 - mask) * worst), label)

    def faithful(self, model: nn.Module, x: Tensor, mask: Tensor, label: Tensor) -> Tensor:
        lower, upper = box(x, mask, self.eps, self.clip)
        kept = torch.ones_like(label, dtype=torch.bool)
        for _ in range(self.restarts):
            worst = ascend(lambda z: cross_entropy(model(z), label, reduction="none"), lower, upper, steps=40)
            with torch.no_grad():
                kept &= model(worst).argmax(1) == label
        return kept


@dataclass(frozen=True, eq=False)
class Certified:
    """All completions within eps (linf), by differentiable bounds of the margins.

    The loss is the cross entropy of the worst logits that the bounds allow: not below that of any completion. What
    training reaches is for `soundly.verify` to prove; `faithful` says what these bounds see, rounding not counted.

    Attributes:
        method: "interval" costs a third of "crown-ibp", and what it has trained is bounded as well.
    """

    eps: float = 0.12
    clip: tuple[float, float] = (0.0, 1.0)
    method: Method = "interval"
    name: str = "certified"
    made: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], TrainingBounds]] = field(
        default_factory=WeakKeyDictionary, repr=False
    )

    def margins(self, model: nn.Module, x: Tensor, mask: Tensor, label: Tensor, ramp: float = 1.0) -> Tensor:
        """Lower bounds [n, classes] of the label's logit minus each, 0 for itself."""
        known, shape = self.made.setdefault(model, {}), tuple(x.shape)
        if shape not in known:
            known[shape] = TrainingBounds(model, x.detach())
        return known[shape].margins(label, *box(x, mask, ramp * self.eps, self.clip), method=self.method)

    def loss(self, model: nn.Module, x: Tensor, mask: Tensor, label: Tensor, ramp: float = 1.0) -> Tensor:
        return cross_entropy(-self.margins(model, x, mask, label, ramp), label)

    def faithful(self, model: nn.Module, x: Tensor, mask: Tensor, label: Tensor) -> Tensor:
        with torch.no_grad():
            margins = self.margins(model, x, mask, label)
        others = torch.arange(margins.shape[1]) != label[:, None]
        return ((torch.isfinite(margins) & (margins > 0)) | ~others).all(1)


def box(x: Tensor, mask: Tensor, eps: float, clip: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The box around x [n, ...] whose kept features are fixed and whose others lie within eps and clip.

    Differentiable in the mask: to keep a feature pulls its ends to x.
    """
    free = 1 - mask
    return x - free * (x - (x - eps).clamp(min=clip[0])), x + free * ((x + eps).clamp(max=clip[1]) - x)
