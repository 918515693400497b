"""Self-explaining training (SST): one network that predicts and, in the same pass, says which features suffice.

A trunk feeds two heads: logits, and a score in (0, 1) per feature; the features with a score of at least 1/2 are the
reason. A second pass, with the other features replaced (see `masking`), must predict the same: the faithfulness loss. A
cardinality loss makes reasons small.

Three things differ from the paper's released code. The mask passes its gradient straight through, so that the head
learns which features matter. The cardinality loss is charged above a budget that shrinks to the wished size while
training goes on: without it the scores of all features die together and no gradient brings them back. And a little
weight on the logits of scores keeps the sigmoids alive.

Reference: Bassan et al., "Explain Yourself, Briefly! Self-Explaining Neural Networks with Concise Sufficient Reasons",
ICLR 2025.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from soundly.errors import InvalidInput
from soundly.training.fit import Epoch, fit
from soundly.training.masking import Masking

THRESHOLD = 0.5
LEARNING_RATES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
CARDINALITIES = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-11)
"""The grids of the paper's released code for images; it fixes the threshold to 1/2 and the faithfulness weight to 1."""


class SelfExplaining(nn.Module):
    """A trunk with a head for logits and one for the scores of features.

    Attributes:
        classifier: trunk and first head, an ordinary module: what `soundly.load` takes.
        mask_shape: of one example's mask; expands to the shape of one input.
        embed: applied to the inputs first; what it returns is masked. For token ids: an nn.Embedding, masks [t, 1].
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        score: nn.Module,
        mask_shape: Sequence[int],
        *,
        embed: nn.Module | None = None,
    ) -> None:
        """
        Args:
            trunk: from inputs [n, ...] to what both heads read.
            head: from there to logits [n, classes].
            score: from there to scores [n, ...], as many as a mask has entries; `dense_scores` makes one.
        """
        super().__init__()
        self.mask_shape = tuple(mask_shape)
        self.classifier = nn.Sequential(trunk, head)
        self.score = score
        self.embed = nn.Identity() if embed is None else embed

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of inputs (not embedded ones)."""
        logits: Tensor = self.classifier(self.embed(x))
        return logits

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, classes] and the scores' logits [n, *mask_shape] of embedded inputs."""
        features = self.classifier[0](x)
        return self.classifier[1](features), self.score(features).reshape(len(x), *self.mask_shape)

    @torch.no_grad()
    def explain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions [n] and their reasons, bool [n, *mask_shape], in one forward pass."""
        logits, scores = self.both(self.embed(x))
        return logits.argmax(1), scores.sigmoid() >= THRESHOLD


def dense_scores(width: int, mask_shape: Sequence[int]) -> nn.Linear:
    """Scores from features [n, width] that keep all to begin with."""
    score = nn.Linear(width, math.prod(mask_shape))
    nn.init.constant_(score.bias, 1.0)
    return score


def mlp(shape: Sequence[int], classes: int, hidden: Sequence[int] = (128, 64)) -> SelfExplaining:
    """The paper's network for MNIST: dense layers with ReLU, and a score for each pixel."""
    sizes = [math.prod(shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return SelfExplaining(nn.Sequential(*layers), nn.Linear(sizes[-1], classes), dense_scores(sizes[-1], shape), shape)


def straight_through(scores: Tensor) -> Tensor:
    """The mask: 1 where a score (a logit) is at least that of 1/2, else 0; with the gradient of the sigmoid."""
    soft = scores.sigmoid()
    return (soft >= THRESHOLD).to(soft) + soft - soft.detach()


@dataclass(frozen=True)
class Objective:
    """The loss: cross entropy + `faithfulness` * masked cross entropy + `cardinality` * size above a budget.

    Attributes:
        size: the share of features that costs a reason nothing at the end. A price, not a limit: reasons end somewhat
            larger where it pays; 0 charges the scores of all, as the paper does.
        shrinking: the share of the training in which the budget falls from all features to `size`.
        warming: the share of the training in which distances of the masking grow to their full value.
        decay: weight of the squared logits of scores.
        target: whether the masked pass must give the label or the network's own answer (as in the paper). In
            training the label is better: own answers that are wrong are not made firm.
    """

    faithfulness: float = 1.0
    cardinality: float = 12.0
    size: float = 0.06
    shrinking: float = 0.6
    warming: float = 0.3
    decay: float = 0.01
    target: Literal["label", "prediction"] = "label"

    def budget(self, passed: float) -> float:
        """The share of features that costs nothing after this share of the training."""
        return self.size + (1 - self.size) * max(0.0, 1 - passed / self.shrinking) if self.size else 0.0

    def __call__(self, model: SelfExplaining, masking: Masking, x: Tensor, y: Tensor, passed: float = 1.0) -> Tensor:
        """The loss of a batch."""
        x = model.embed(x)
        logits, scores = model.both(x)
        mask = straight_through(scores)
        label = y if self.target == "label" else logits.argmax(1)
        ramp = min(1.0, passed / self.warming) if self.warming else 1.0
        size = (mask if self.size else scores.sigmoid()).flatten(1).mean(1)
        return (
            cross_entropy(logits, y)
            + self.faithfulness * masking.loss(model.classifier, x, mask, label, ramp)
            + self.cardinality * (size - self.budget(passed)).clamp(min=0).mean()
            + self.decay * scores.square().mean()
        )


def train(
    model: SelfExplaining,
    x: Tensor,
    y: Tensor,
    masking: Masking,
    *,
    objective: Objective | None = None,
    epochs: int = 4,
    batch: int = 128,
    lr: float = 2e-3,
    validation: float = 0.0,
    patience: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Trains a self-explaining network in place; see `fit` for what is not said here.

    Args:
        validation: the share of the examples, the last ones, that is kept for validation (the paper: 0.1, with a
            patience of 5).
    """
    objective = objective or Objective()
    if not 0 <= validation < 1 or (patience is not None and not validation):
        raise InvalidInput("validation is a share of the examples, below 1, and above 0 where patience is given.")
    kept = round(len(x) * validation)
    first, last = (x[: len(x) - kept], y[: len(y) - kept]), (x[len(x) - kept :], y[len(y) - kept :])

    def validate() -> float:
        parts = [(a, b) for a, b in zip(last[0].split(batch), last[1].split(batch), strict=True) if len(a) == batch]
        with torch.no_grad():
            return sum(float(objective(model, masking, a, b)) for a, b in parts) / max(1, len(parts))

    return fit(
        model, *first, lambda a, b, passed: objective(model, masking, a, b, passed), epochs=epochs, batch=batch, lr=lr,
        seed=seed, validate=validate if kept else None, patience=patience, checkpoint=checkpoint,
        about=(masking, objective), progress=progress,
    )  # fmt: skip


def search(
    build: Callable[[], SelfExplaining],
    x: Tensor,
    y: Tensor,
    masking: Masking,
    *,
    rates: Sequence[float] = LEARNING_RATES,
    cardinalities: Sequence[float] = CARDINALITIES,
    objective: Objective | None = None,
    epochs: int = 100,
    batch: int = 64,
    validation: float = 0.1,
    patience: int = 5,
    seed: int = 0,
) -> tuple[SelfExplaining, float, float]:
    """The paper's schedule: a network for each learning rate and cardinality weight, each stopped early.

    Args:
        build: a new network; it is called under the seed.
        objective: its cardinality weight is replaced; by default the paper's loss.

    Returns:
        The network with the smallest sum of prediction and faithfulness loss on the validation examples, its learning
        rate and its cardinality weight. These losses do not see the size: look at it before you take the answer.
    """
    objective = objective or Objective(size=0.0, target="prediction", decay=0.0, warming=0.0)
    kept = round(len(x) * validation)
    free = replace(objective, cardinality=0.0)
    best: tuple[float, SelfExplaining | None, float, float] = (math.inf, None, 0.0, 0.0)
    for lr in rates:
        for weight in cardinalities:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = build()
            train(
                model, x, y, masking, objective=replace(objective, cardinality=weight), epochs=epochs, batch=batch,
                lr=lr, validation=validation, patience=patience, seed=seed,
            )  # fmt: skip
            with torch.no_grad():
                loss = float(free(model, masking, x[len(x) - kept :], y[len(y) - kept :]))
            if loss < best[0]:
                best = loss, model, lr, weight
    if best[1] is None:
        raise InvalidInput("no learning rate of the search led to a finite loss; give smaller ones.")
    return best[1], best[2], best[3]
