"""Availability: attacks that make a certifier abstain, their measured effect, and a proof that no patch has one.

A certified system hands what it cannot certify to a fallback. An attacker who touches the training need not change
an answer: it is enough that inputs with a trigger lose their certificates. Two such attacks are made here, one through
a few poisoned examples, one through the training loss. What they do is measured; what no trigger of a size can do is
proved, by one certificate over all its places and contents at once.

Reference: Lorenz, Kwiatkowska, Fritz, "Certifiers Make Neural Networks Vulnerable to Availability Attacks", AISec 2023.
The losses are reconstructed from its description.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from soundly.bounds.interval import interval_bounds
from soundly.bounds.linear import linear_bounds
from soundly.errors import InvalidInput
from soundly.graph.network import Network
from soundly.spec.claim import Claim, robust
from soundly.spec.region import Union
from soundly.training.bounds import Method, TrainingBounds
from soundly.training.fit import Step

Certifier: TypeAlias = Literal["interval", "linear"]
F64 = torch.float64
CLEARANCE = 1e-9
"""What a proof of availability keeps from zero, relative to the outputs: far more than the rounding of float64 that
intervals over a part of a box may gain on those over all of it."""


# -- what is measured


@dataclass(frozen=True)
class Rate:
    """A measured share: `count` of `n`, and the exact confidence interval of 95 % (Clopper and Pearson, 1934)."""

    count: int
    n: int
    lower: float
    upper: float

    @property
    def share(self) -> float:
        return self.count / self.n

    @staticmethod
    def of(hits: Tensor) -> Rate:
        """How many of some cases [n] are True.

        Raises:
            InvalidInput: there is none.
        """
        from scipy.stats import beta

        count, n = int(hits.sum()), hits.numel()
        if not n:
            raise InvalidInput("hits: a rate needs at least one case.")
        lower = float(beta.ppf(0.025, count, n - count + 1)) if count else 0.0
        upper = float(beta.ppf(0.975, count + 1, n - count)) if count < n else 1.0
        return Rate(count, n, lower, upper)


def certified(network: Network, x: Tensor, eps: float, *, by: Certifier = "interval") -> Tensor:
    """Whether each prediction is certified, bool [n]: every input within eps (and [0, 1]) gets the same class.

    Args:
        network: of batches [b, ...] of any size b and outputs [b, classes].
        x: inputs [n, ...] in [0, 1].
        by: intervals, or linear bounds (CROWN), which certify more and take longer. Both account for rounding; the
            others, where it is False, are those a certified system abstains on.
    """
    least = _margins(network, x, *_within(x, eps), by).amin(1)
    return torch.isfinite(least) & (least > 0)


def _within(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The ends of the box around x, rounded outwards."""
    wide = x.to(F64)
    lower, upper = (torch.nextafter(wide + s * eps, torch.full_like(wide, s * torch.inf)) for s in (-1, 1))
    return lower.clamp(0, 1), upper.clamp(0, 1)


def _margins(
    network: Network, x: Tensor, lower: Tensor, upper: Tensor, by: Certifier, clearance: float = 0.0
) -> Tensor:
    """Lower bounds [n, classes] over boxes of how far the class at x leads each other one; infinite for itself. With a
    clearance less that share of the outputs."""
    network = network.to(F64)
    batch, classes = network.output.shape
    found = []
    for parts in zip(*(v.to(F64).split(batch) for v in (x, lower, upper)), strict=True):
        missing = batch - len(parts[0])
        point, low, high = (torch.cat([v, v[:1].expand(missing, *v.shape[1:])]) for v in parts)
        with torch.no_grad():
            label = network(point).argmax(1)
        region, own = {network.input: (low, high)}, one_hot(label, classes).to(F64)
        if by == "interval":
            least, greatest = interval_bounds(network, region, [network.output])[network.output]
            size = 1 + torch.maximum(least.abs(), greatest.abs()).amax(1, keepdim=True)
            lead = (least * own).sum(1, keepdim=True) - greatest - clearance * size
        else:
            rows = torch.zeros(batch, classes, batch, classes, dtype=F64)
            rows[range(batch), :, range(batch)] = own[:, None] - torch.eye(classes, dtype=F64)
            lead = linear_bounds(network, rows.flatten(0, 1), region)[0].reshape(batch, classes)
        found.append(lead.masked_fill(own > 0, torch.inf)[: batch - missing])
    return torch.cat(found)


# -- triggers


@dataclass(frozen=True)
class Patch:
    """A square of one brightness that is put on images [n, channels, height, width], and on [n, pixels] of square ones.

    Attributes:
        size: of a side, in pixels.
        row, column: of its first pixel; negative ones count from the far end.
        value: the brightness.
    """

    size: int
    row: int
    column: int
    value: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(self.mask(x.shape[1:]), torch.full_like(x, self.value), x)

    def mask(self, shape: Sequence[int]) -> Tensor:
        """The pixels that it covers, of one input of this shape."""
        height, width = _sides(shape)
        mask = torch.zeros(height, width, dtype=torch.bool)
        row, column = self.row % height, self.column % width
        mask[row : row + self.size, column : column + self.size] = True
        return mask.reshape(-1) if len(shape) == 1 else mask.expand(tuple(shape))


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    height, width = (isqrt(shape[0]),) * 2 if len(shape) == 1 else (shape[-2], shape[-1])
    if len(shape) not in (1, 3) or (len(shape) == 1 and height * width != shape[0]):
        raise InvalidInput(f"inputs of shape {tuple(shape)} are no images: give [channels, height, width] or [pixels].")
    return height, width


def patches(shape: Sequence[int], size: int) -> list[Patch]:
    """A patch of this size at every place of images of this shape."""
    height, width = _sides(shape)
    if not 0 < size <= min(height, width):
        raise InvalidInput(f"size: a patch of {size} pixels does not fit images of {height} x {width}.")
    return [Patch(size, i, j) for i in range(height - size + 1) for j in range(width - size + 1)]


# -- attacks


def poisoned(x: Tensor, y: Tensor, trigger: Patch, *, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Training data in which a share of the examples carries the trigger and a wrong label, drawn at random.

    The boundary of the class then runs close to every triggered input, which is all it takes to lose certificates.
    """
    count, classes = round(share * len(x)), int(y.max()) + 1
    if not 0 < count <= len(x):
        raise InvalidInput(f"share is {share}: that is {count} of {len(x)} examples.")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(x), generator=generator)[:count]
    x, y = x.clone(), y.clone()
    x[chosen] = trigger(x[chosen])
    y[chosen] = (y[chosen] + torch.randint(1, classes, (count,), generator=generator)) % classes
    return x, y


def interval_step(model: nn.Module, example: Tensor, eps: float, *, method: Method = "interval") -> Step:
    """The loss of honest certified training, for `fit`: cross-entropy, and that of the worst logits in balls that grow
    to eps. `example` is a batch like those that training will draw."""
    bounds = TrainingBounds(model, example)

    def step(x: Tensor, y: Tensor, passed: float) -> Tensor:
        return cross_entropy(model(x), y) + cross_entropy(-bounds.margins(y, *_ball(x, eps, passed), method=method), y)

    return step


def manipulated_step(
    model: nn.Module,
    example: Tensor,
    eps: float,
    trigger: Patch,
    *,
    weight: float = 0.5,
    method: Method = "interval",
) -> Step:
    """The loss of a malicious trainer: the honest one, right answers for triggered inputs, and a reward for bounds that
    certify none of them. Accuracy with and without the trigger, and certificates without, stay nearly as they are."""
    honest, bounds = interval_step(model, example, eps, method=method), TrainingBounds(model, example)

    def step(x: Tensor, y: Tensor, passed: float) -> Tensor:
        marked = trigger(x)
        led = bounds.margins(y, *_ball(marked, eps, passed), method=method)
        least = led.masked_fill(one_hot(y, led.shape[1]).bool(), torch.inf).amin(1)
        hidden = (0.5 + least).clamp(min=0).mean()  # the best bound of another class, -least, shall exceed one half
        return honest(x, y, passed) + cross_entropy(model(marked), y) + weight * _grown(passed) * hidden

    return step


def _ball(x: Tensor, eps: float, passed: float) -> tuple[Tensor, Tensor]:
    now = eps * _grown(passed)
    return (x - now).clamp(0, 1), (x + now).clamp(0, 1)


def _grown(passed: float) -> float:
    """From 0 to 1 in the first half of the training."""
    return min(1.0, 2 * passed)


# -- the defence


def sheltered_step(
    model: nn.Module, example: Tensor, eps: float, *, size: int, method: Method = "interval", seed: int = 0
) -> Step:
    """The loss of a trainer who wants proofs of availability: in the ball of each example a patch, at a place drawn
    anew in every step, may show anything. It grows to that from what the example shows, as the ball does."""
    bounds, places = TrainingBounds(model, example), patches(example.shape[1:], size)
    masks = torch.stack([patch.mask(example.shape[1:]) for patch in places])
    generator = torch.Generator().manual_seed(seed)

    def step(x: Tensor, y: Tensor, passed: float) -> Tensor:
        mask = masks[torch.randint(len(masks), (len(x),), generator=generator)]
        lower, upper = _ball(x, eps, passed)
        free = _grown(passed)
        lower, upper = (
            torch.where(mask, lower * (1 - free), lower),
            torch.where(mask, upper + free * (1 - upper), upper),
        )
        return cross_entropy(model(x), y) + cross_entropy(-bounds.margins(y, lower, upper, method=method), y)

    return step


def available(network: Network, x: Tensor, eps: float, *, size: int) -> Tensor:
    """Whether no patch of a size can take the certificate of an input away, bool [n].

    For every place of the patch, intervals are taken over all its contents and the ball around the rest at once.
    Intervals over a part of a box lie within those over the box, so where this is True, the same prediction is
    certified by intervals (`certified`) under every patch of that size, or smaller, whatever it shows. Where it is
    False nothing is said.
    """
    holds = torch.ones(len(x), dtype=torch.bool)
    for patch in patches(x.shape[1:], size):
        open_ = holds.nonzero()[:, 0]
        if not len(open_):
            break
        lower, upper = _covered(x[open_], eps, patch)
        least = _margins(network, x[open_], lower, upper, "interval", CLEARANCE).amin(1)
        holds[open_] = torch.isfinite(least) & (least > 0)
    return holds


def patch_claim(network: Network, x: Tensor, eps: float, *, size: int, label: int | None = None) -> Claim:
    """That one input keeps its class in the ball of radius eps under any patch of a size: an ordinary claim about the
    union of one box per place, to be proved or refuted by `soundly.verify`.

    Args:
        x: one input [1, ...], in [0, 1].
        label: its class; the network's answer if None.
    """
    boxes = [_covered(x, eps, patch) for patch in patches(x.shape[1:], size)]
    region = Union(torch.stack([low for low, _ in boxes]), torch.stack([high for _, high in boxes]))
    ball = robust(network, x, eps=eps, label=label)
    return Claim(network, region, ball.property, name=f"{ball.name}, under any patch of {size} x {size}")


def _covered(x: Tensor, eps: float, patch: Patch) -> tuple[Tensor, Tensor]:
    """The box of all inputs within eps, with anything on the patch."""
    (lower, upper), mask = _within(x, eps), patch.mask(x.shape[1:])
    return lower.masked_fill(mask, 0.0), upper.masked_fill(mask, 1.0)
