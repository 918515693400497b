"""Interpretability-aware training (Int): if maps cannot be moved, neither can labels; and what it is compared with.

Every loss here is a callable of a model, a batch, and how much of the training has passed (distances grow from 0 over
the first part). The discrepancy of maps between x, of label t, and x' is, in one normalisation everywhere,

    D(x, x') = 1/2 |I(x, t) - I(x', t)|_1 + 1/2 sum over i != t of s_i(x') |I(x, i) - I(x', i)|_1,

with maps I that add up to logits and s the softmax over the classes other than t at x': a smooth stand-in for the class
that an attack moves x' to. With s at that class t' alone it is the two-class discrepancy D_2, and for complete maps

    D_2(x, x') >= 1/2 (f_t(x) - f_t'(x))    whenever x' is taken for t'

(`floor`): no attack changes the label without changing the maps. The one-class discrepancy |I(x, t) - I(x', t)|_1 has
no such floor. The released code weighs un-normalised maps by 0.01, which here is gamma = 0.02 times the number of
places.

Reference: Boopathy et al., "Proper Network Interpretability Helps Adversarial Robustness in Classification", ICML 2020.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from soundly.errors import InvalidInput
from soundly.training.attack import ascend
from soundly.training.maps import Cam, ConvNet, Explained, Map

WARMING = 0.3
"""The share of the training in which distances grow to their full value."""


class Loss(Protocol):
    """What a recipe minimises."""

    @property
    def name(self) -> str: ...

    def __call__(self, model: ConvNet, x: Tensor, y: Tensor, passed: float = 1.0) -> Tensor: ...


def discrepancy(clean: Explained, moved: Explained, y: Tensor, *, one: bool = False) -> Tensor:
    """D [n], see above, or the one-class discrepancy."""
    change = (moved.maps - clean.maps).abs().sum(-1)  # [n, classes]
    label = y[:, None] == torch.arange(change.shape[1], device=y.device)
    if one:
        return change[label]
    share = moved.logits.masked_fill(label, -torch.inf).softmax(1) + label
    return (share * change).sum(1) / 2


def two_class(clean: Explained, moved: Explained, y: Tensor, other: Tensor) -> Tensor:
    """D_2 [n] with the classes `other` [n]."""
    change = (clean.maps - moved.maps).abs().sum(-1)
    return (change.gather(1, y[:, None])[:, 0] + change.gather(1, other[:, None])[:, 0]) / 2


def floor(clean: Explained, y: Tensor, other: Tensor) -> Tensor:
    """What D_2 [n] is at least, for complete maps, where a moved input is taken for `other` [n]."""
    return (clean.logits.gather(1, y[:, None]) - clean.logits.gather(1, other[:, None]))[:, 0] / 2


@dataclass(frozen=True)
class Plain:
    """Cross entropy."""

    name: str = "normal"

    def __call__(self, model: ConvNet, x: Tensor, y: Tensor, passed: float = 1.0) -> Tensor:
        return cross_entropy(model(x), y)


@dataclass(frozen=True)
class Adversarial:
    """Cross entropy at the worst point that gradient ascent finds. Madry et al., ICLR 2018."""

    eps: float
    steps: int = 10
    name: str = "pgd"

    def __call__(self, model: ConvNet, x: Tensor, y: Tensor, passed: float = 1.0) -> Tensor:
        return cross_entropy(model(_worst_label(model, x, y, self.eps * _ramp(passed), self.steps)), y)


@dataclass(frozen=True)
class Trades:
    """Cross entropy plus `beta` times the largest divergence of the answer. Zhang et al., ICML 2019."""

    eps: float
    steps: int = 10
    beta: float = 6.0
    name: str = "trades"

    def __call__(self, model: ConvNet, x: Tensor, y: Tensor, passed: float = 1.0) -> Tensor:
        logits = model(x)
        fixed = logits.detach().softmax(1)

        def divergence(z: Tensor) -> Tensor:
            return kl_div(model(z).log_softmax(1), fixed, reduction="none").sum(1)

        moved = ascend(divergence, *_ball(x, self.eps * _ramp(passed)), steps=self.steps)
        apart = kl_div(model(moved).log_softmax(1), logits.softmax(1), reduction="batchmean")
        return cross_entropy(logits, y) + self.beta * apart


@dataclass(frozen=True)
class IgNorm:
    """Cross entropy plus the l1 norm of the loss's Integrated Gradients from x to the attacked x', per example.

    They add up to the loss at x' less that at x, so the norm is at least what `Adversarial` adds. The attack is on the
    label: one on the norm itself would take second derivatives at every step.

    Attributes:
        points: of the quadrature.
        summed: cross entropy at x' instead of x (IG-Norm-Sum).

    Reference: Chen et al., "Robust Attribution Regularization", NeurIPS 2019.
    """

    eps: float
    steps: int = 10
    points: int = 5
    weight: float = 1.0
    summed: bool = False

    @property
    def name(self) -> str:
        return "ig-norm-sum" if self.summed else "ig-norm"

    def __call__(self, model: ConvNet, x: Tensor, y: Tensor, passed: float = 1.0) -> Tensor:
        moved = _worst_label(model, x, y, self.eps * _ramp(passed), self.steps)
        total = torch.zeros_like(x)
        for i in range(self.points):
            between = (x + (i + 0.5) / self.points * (moved - x)).requires_grad_()
            value = cross_entropy(model(between), y, reduction="sum")
            total = total + torch.autograd.grad(value, between, create_graph=True)[0]
        norm = ((moved - x) * total / self.points).abs().flatten(1).sum(1).mean()
        return cross_entropy(model(moved if self.summed else x), y) + self.weight * norm


@dataclass(frozen=True)
class Int:
    """Cross entropy plus `gamma` times the largest discrepancy of maps within eps.

    Attributes:
        gamma: weight of D in its one normalisation. The released code's is 0.98 on maps of 49 places. On digits 1 keeps
            almost the accuracy of adversarial training, 3 gives up some for labels that hold beyond eps; at 10 all maps
            become constant.
        inner: what the inner attack maximises: the discrepancy itself (Int), or the cross entropy (Int2).
        one: the one-class discrepancy (Int-one-class).
        adversarial: cross entropy at the attacked point instead (Int-Adv, Int2-Adv).
        map: what explains.
    """

    eps: float
    steps: int = 10
    gamma: float = 1.0
    inner: Literal["map", "label"] = "map"
    one: bool = False
    adversarial: bool = False
    map: Map = field(default_factory=Cam)

    @property
    def name(self) -> str:
        kind = "int-one-class" if self.one else "int" if self.inner == "map" else "int2"
        return f"{kind}-adv" if self.adversarial else kind

    def __call__(self, model: ConvNet, x: Tensor, y: Tensor, passed: float = 1.0) -> Tensor:
        clean = self.map(model, x)
        eps = self.eps * _ramp(passed)
        if self.inner == "label":
            moved = _worst_label(model, x, y, eps, self.steps)
        else:
            fixed = Explained(*(v.detach() for v in clean))

            def change(z: Tensor) -> Tensor:
                return discrepancy(fixed, self.map(model, z), y, one=self.one)

            moved = ascend(change, *_ball(x, eps), steps=self.steps)
        there = self.map(model, moved)
        apart = discrepancy(clean, there, y, one=self.one).mean()
        return cross_entropy(there.logits if self.adversarial else clean.logits, y) + self.gamma * apart


def _ramp(passed: float) -> float:
    return min(1.0, passed / WARMING)


def _ball(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (x - eps).clamp(min=0), (x + eps).clamp(max=1)


def _worst_label(model: ConvNet, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    return ascend(lambda z: cross_entropy(model(z), y, reduction="none"), *_ball(x, eps), steps=steps)


def method(name: str, *, eps: float, steps: int = 10, gamma: float = 1.0, map: Map | None = None) -> Loss:
    """A loss by the name it goes by: normal, pgd, trades, ig-norm, ig-norm-sum, int, int-one-class, int2, int-adv,
    int2-adv."""
    explains = map or Cam()
    known: list[Loss] = [
        Plain(), Adversarial(eps, steps), Trades(eps, steps), IgNorm(eps, steps), IgNorm(eps, steps, summed=True),
        Int(eps, steps, gamma, map=explains), Int(eps, steps, gamma, one=True, map=explains),
        Int(eps, steps, gamma, inner="label", map=explains), Int(eps, steps, gamma, adversarial=True, map=explains),
        Int(eps, steps, gamma, inner="label", adversarial=True, map=explains),
    ]  # fmt: skip
    for loss in known:
        if loss.name == name:
            return loss
    raise InvalidInput(f"there is no method {name!r}; choose one of {', '.join(loss.name for loss in known)}.")
