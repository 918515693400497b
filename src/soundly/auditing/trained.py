"""Networks trained to hide counterexamples: ordinary weights, nothing built in that could be recognised.

A network learns two things at once: to violate its claim at a chosen point of a box, and to look robust wherever
projected gradient descent goes. What descent found in the last epochs is learned together, not only the newest, so that
the network cannot move a hole from one place to another. Whether a point is hidden is measured, with a list of stronger
attacks; that it violates the claim is a fact, and stays one when attacks get better.

Nothing is claimed about clean boxes, which are trained without a point: they are not known to be safe.

Reference: Zhou et al., "SoundnessBench", 2025 (objective, window of perturbations, list of attacks).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from soundly.auditing.attention import Attentive
from soundly.errors import InvalidInput

Architecture = Literal["mlp", "tanh", "sigmoid", "cnn1", "cnn2", "cnn3", "pool", "vit"]
ARCHITECTURES = get_args(Architecture)
MARGIN = 0.01
"""By how much a planted point is to violate its claim."""
WINDOW = 300
"""Epochs whose perturbations are learned together."""
STRONG = (
    (0.25, 0), (0.25, 100), (0.02, 100), (0.02, 250), (0.02, 500), (0.01, 1000), (0.01, 3000), (0.01, 5000),
)  # fmt: skip
"""The list of attacks that a hidden point survives: length of a step, in radii of the box, and how many."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes of one radius around centres, with the label that is claimed for each, and counterexamples in some.

    Attributes:
        centres [m, *shape], labels [m]: the first ones have a counterexample each.
        points [p, *shape]: these counterexamples.
        eps: the radius.
    """

    centres: Tensor
    labels: Tensor
    points: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Trained:
    """A network and its boxes.

    Attributes:
        hidden [p]: whether each planted point survived the list of attacks, as far as that was run.
        margins [p]: by how much each point violates its claim.
        epoch: after which it was taken.
    """

    module: nn.Module
    boxes: Boxes
    hidden: Tensor
    margins: Tensor
    epoch: int


def architecture(name: Architecture, shape: Sequence[int], *, width: int = 128, seed: int = 0) -> nn.Module:
    """A network from a batch of `shape`, [n] or [c, h, w], to two logits.

    Args:
        width: of the dense layers; of the tokens, an eighth of it.

    Raises:
        InvalidInput: the name is not one of ARCHITECTURES, or the shape does not fit it.
    """
    if name not in ARCHITECTURES:
        raise InvalidInput(f"architecture is {name!r}; choose one of {', '.join(ARCHITECTURES)}.")
    images = name not in ("mlp", "tanh", "sigmoid")
    if images and len(shape) != 3:
        raise InvalidInput(f"{name} reads images [c, h, w], not {list(shape)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        curve: Callable[[], nn.Module] = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid}.get(name, nn.ReLU)
        if not images:
            sizes = [math.prod(shape), *[width] * 4]
            layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), curve())]
            return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 2))
        channels, height, breadth = shape
        if name == "vit":
            return Attentive(channels, height * breadth, max(4, width // 8))
        count = {"cnn1": 1, "cnn2": 2, "cnn3": 3, "pool": 1}[name]
        body: list[nn.Module] = []
        for k in range(count):
            body += [nn.Conv2d(channels, 5 * 2**k, 3, padding=1), nn.ReLU()]
            channels = 5 * 2**k
        if name == "pool":
            body.append(nn.AvgPool2d(2, stride=1))
            height, breadth = height - 1, breadth - 1
        sizes = [channels * height * breadth, width, width, 20]
        layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*body, nn.Flatten(), *layers, nn.Linear(20, 2))


def boxes(
    shape: Sequence[int], *, planted: int = 2, clean: int = 2, spread: float = 0.1, eps: float = 0.02,
    position: Literal["face", "corner"] = "face", seed: int = 0,
) -> Boxes:  # fmt: skip
    """Disjoint boxes with random labels; in the first `planted` ones a counterexample on a face or at a corner.

    Args:
        spread: centres are uniform within this of zero.
    """
    source = torch.Generator().manual_seed(seed)
    centres: list[Tensor] = []
    for _ in range(1000 * (planted + clean)):
        if len(centres) == planted + clean:
            break
        x = spread * (2 * torch.rand(tuple(shape), generator=source) - 1)
        if all(float((x - other).abs().max()) > 2 * eps for other in centres):
            centres.append(x)
    else:
        raise InvalidInput(f"{planted + clean} boxes of radius {eps} do not fit apart within {spread} of zero.")
    labels = torch.randint(0, 2, (len(centres),), generator=source)
    moves = torch.randint(0, 2, (planted, math.prod(shape)), generator=source).float() * 2 - 1
    if position == "face":
        place = torch.randint(moves.shape[1], (planted, 1), generator=source)
        moves = torch.full_like(moves, 0.01).scatter(1, place, moves.gather(1, place))
    base = torch.stack(centres)
    return Boxes(base, labels, base[:planted] + eps * moves.reshape(planted, *shape), eps)


def gaps(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The claimed logit minus the other one [k], at points [k, *shape]; not positive at a counterexample."""
    y = module(x)
    return (y[:, 1] - y[:, 0]) * (2 * labels - 1)


def descend(
    module: nn.Module, centres: Tensor, labels: Tensor, eps: float, *, step: float, steps: int, restarts: int,
    source: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Projected gradient descent by signs from uniform points: per box the worst move [m, *shape], and its gap [m]."""
    rows = (restarts, *centres.shape)
    move = eps * (2 * torch.rand(rows, generator=source, dtype=centres.dtype) - 1)
    named = labels.expand(restarts, -1).flatten()
    best, least = move.clone(), torch.full(rows[:2], math.inf, dtype=centres.dtype)
    for k in range(steps + 1):
        x = (centres + move).flatten(0, 1).requires_grad_(k < steps)
        with torch.set_grad_enabled(k < steps):
            value = gaps(module, x, named)
        found = value.detach().view(rows[:2])
        better = found < least
        least = torch.where(better, found, least)
        best[better] = move[better]
        if k < steps:
            (slope,) = torch.autograd.grad(value.sum(), x)
            move = (move - step * eps * slope.view(rows).sign()).clamp(-eps, eps)
    least, which = least.min(0)
    return best[which, torch.arange(len(centres))], least


def survivors(
    module: nn.Module, made: Boxes, *, restarts: int, seed: int = 0,
    attacks: Sequence[tuple[float, int]] = STRONG,
) -> Tensor:  # fmt: skip
    """Which planted boxes [p] every attack of the list leaves, though their points violate the claims."""
    source = torch.Generator().manual_seed(seed)
    kept = gaps(module, made.points, made.labels[: len(made.points)]) < 0
    for step, steps in attacks:
        rest = kept.nonzero().flatten()
        if not len(rest):
            break
        _, gap = descend(
            module, made.centres[rest], made.labels[rest], made.eps, step=step, steps=steps, restarts=restarts,
            source=source,
        )  # fmt: skip
        kept[rest] = gap > 0
    return kept


def train(
    module: nn.Module, made: Boxes, *, epochs: int = 5000, rate: float = 1e-3, steps: int = 30, restarts: int = 30,
    every: int = 200, seed: int = 0, progress: Callable[[Trained], None] | None = None,
) -> Trained:  # fmt: skip
    """Trains a network in place to hide the planted points, and returns its best state.

    The rate rises linearly over two fifths of the epochs and falls to nothing; points are seldom hidden before it has
    fallen.

    Args:
        steps, restarts: of the descent in every epoch, with steps of a tenth of the radius.
        every: after so many epochs the list of attacks is run, if descent finds some point no more; training ends
            when all points survive it.
        progress: told of every such state.
    """
    source = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(module.parameters(), lr=rate)
    turn = 0.4 * epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda t: (t + 1) / turn if t < turn else max(0.0, (epochs - t) / (epochs - turn))
    )
    count = len(made.points)
    labels, planted = made.labels, made.labels[:count]
    window: deque[Tensor] = deque([torch.zeros_like(made.centres)], maxlen=WINDOW)
    best = Trained(module, made, torch.zeros(count, dtype=torch.bool), torch.zeros(count), 0)
    for epoch in range(1, epochs + 1):
        module.eval()
        move, gap = descend(
            module, made.centres, labels, made.eps, step=0.1, steps=steps, restarts=restarts, source=source
        )
        if epoch % every == 0 or epoch == epochs:
            with torch.no_grad():
                there = -gaps(module, made.points, planted)
            open_ = (gap[:count] > 0) & (there > 0)
            state = Trained(module, made, open_, there, epoch)
            if bool(open_.any()):
                state = replace(state, hidden=survivors(module, made, restarts=restarts, seed=epoch))
                if int(state.hidden.sum()) > int(best.hidden.sum()):
                    best = replace(state, module=copy.deepcopy(module))
            else:
                state = replace(state, hidden=torch.zeros_like(open_))
            if progress is not None:
                progress(state)
            if bool(state.hidden.all()):
                break
        window.append(move)
        seen = torch.cat([torch.zeros_like(made.centres)[None], torch.stack(tuple(window))])
        module.train()
        x = torch.cat([(made.centres + seen).flatten(0, 1), made.points])
        y = module(x)
        hide = functional.cross_entropy(y[: -count or None], labels.expand(len(seen), -1).flatten())
        ends = y[-count:]
        rows = torch.arange(count)
        plant = functional.relu(ends[rows, planted] + MARGIN - ends[rows, 1 - planted]).mean()
        adam.zero_grad(set_to_none=True)
        (hide + plant).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 10.0)
        adam.step()
        schedule.step()
    return best
