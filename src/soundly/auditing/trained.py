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
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from soundly.auditing.attention import Attentive
from soundly.auditing.planting import F32, F64, Instance, checked
from soundly.errors import InvalidInput
from soundly.graph.load import load

Architecture = Literal["mlp", "tanh", "sigmoid", "cnn1", "cnn2", "cnn3", "pool", "vit"]
ARCHITECTURES = get_args(Architecture)
NETS = Path(__file__).parent / "nets"
"""Networks that come with soundly."""
MARGIN = 0.01
"""By how much a planted point is to violate its claim."""
WINDOW = 300
"""Epochs whose perturbations are learned together."""
STRONG = (
    (0.25, 0), (0.25, 100), (0.02, 100), (0.02, 250), (0.02, 500), (0.01, 1000), (0.01, 3000), (0.01, 5000),
)  # fmt: skip
"""The attacks that a hidden point survives: length of a step, in radii of the box, and how many steps."""


@dataclass(frozen=True)
class Plan:
    """What is trained, and how; with the seed all that there is to choose.

    Attributes:
        shape: of an input without its batch axis, [n] or [c, h, w].
        width: of the dense layers; of a token, an eighth of it.
        planted, clean: how many boxes have a counterexample, how many are trained without.
        spread, eps: centres are uniform within `spread` of zero; boxes reach `eps` to either side.
        position: counterexamples lie at a corner, or on a face and else next to the centre.
        epochs: at most; rate: the greatest one; steps, restarts: of the descent in each epoch.
    """

    architecture: Architecture = "mlp"
    shape: tuple[int, ...] = (10,)
    width: int = 128
    planted: int = 2
    clean: int = 2
    spread: float = 0.1
    eps: float = 0.02
    position: Literal["face", "corner"] = "face"
    epochs: int = 4000
    rate: float = 1e-3
    steps: int = 30
    restarts: int = 30
    seed: int = 0


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
        hidden [p]: whether each planted point survived the list of attacks.
        epoch: after which it was taken.
    """

    plan: Plan
    module: nn.Module
    boxes: Boxes
    hidden: Tensor
    epoch: int


def architecture(plan: Plan) -> nn.Module:
    """The plan's network before training, from a batch of inputs to two logits.

    Raises:
        InvalidInput: its name is not one of ARCHITECTURES, or the shape does not fit it.
    """
    name, shape, width = plan.architecture, plan.shape, plan.width
    if name not in ARCHITECTURES:
        raise InvalidInput(f"architecture is {name!r}; choose one of {', '.join(ARCHITECTURES)}.")
    images = name not in ("mlp", "tanh", "sigmoid")
    if images and len(shape) != 3:
        raise InvalidInput(f"{name} reads images [c, h, w], not {list(shape)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        curve: Callable[[], nn.Module] = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid}.get(name, nn.ReLU)
        if not images:
            return nn.Sequential(nn.Flatten(), *_dense([math.prod(shape), *[width] * 4], curve), nn.Linear(width, 2))
        channels, height, breadth = shape
        if name == "vit":
            return Attentive(channels, height * breadth, max(4, width // 8))
        body: list[nn.Module] = []
        for k in range({"cnn1": 1, "cnn2": 2, "cnn3": 3, "pool": 1}[name]):
            body += [nn.Conv2d(channels, 5 * 2**k, 3, padding=1), nn.ReLU()]
            channels = 5 * 2**k
        if name == "pool":
            body.append(nn.AvgPool2d(2, stride=1))
            height, breadth = height - 1, breadth - 1
        dense = _dense([channels * height * breadth, width, width, 20], curve)
        return nn.Sequential(*body, nn.Flatten(), *dense, nn.Linear(20, 2))


def _dense(sizes: Sequence[int], curve: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    for a, b in itertools.pairwise(sizes):
        yield nn.Linear(a, b)
        yield curve()


def boxes(plan: Plan) -> Boxes:
    """The plan's disjoint boxes with random labels, and the counterexamples.

    Raises:
        InvalidInput: there is no room for them.
    """
    source = torch.Generator().manual_seed(plan.seed)
    count, eps = plan.planted + plan.clean, plan.eps
    centres: list[Tensor] = []
    for _ in range(1000 * count):
        if len(centres) == count:
            break
        x = plan.spread * (2 * torch.rand(plan.shape, generator=source) - 1)
        if all(float((x - other).abs().max()) > 2 * eps for other in centres):
            centres.append(x)
    if len(centres) < count:
        raise InvalidInput(f"{count} boxes of radius {eps} do not fit apart within {plan.spread} of zero.")
    labels = torch.randint(0, 2, (count,), generator=source)
    moves = torch.randint(0, 2, (plan.planted, math.prod(plan.shape)), generator=source).float() * 2 - 1
    if plan.position == "face":
        where = torch.randint(moves.shape[1], (plan.planted, 1), generator=source)
        moves = torch.full_like(moves, 0.01).scatter(1, where, moves.gather(1, where))
    base = torch.stack(centres)
    return Boxes(base, labels, base[: plan.planted] + eps * moves.reshape(plan.planted, *plan.shape), eps)


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


def train(plan: Plan, *, every: int = 200, progress: Callable[[Trained, Tensor], None] | None = None) -> Trained:
    """Trains a network to hide the planted points, and returns its best state.

    The rate rises linearly over two fifths of the epochs and falls to nothing; points are seldom hidden before it has
    fallen. Equal plans give equal networks on equal machines.

    Args:
        every: after so many epochs the list of attacks is run, if one descent finds some point no more; training ends
            when all points survive it.
        progress: told of every such state, and by how much the points violate their claims.
    """
    module, made = architecture(plan), boxes(plan)
    source = torch.Generator().manual_seed(plan.seed)
    adam = torch.optim.Adam(module.parameters(), lr=plan.rate)
    epochs, turn = plan.epochs, 0.4 * plan.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda t: (t + 1) / turn if t < turn else max(0.0, (epochs - t) / (epochs - turn))
    )
    count, labels = plan.planted, made.labels
    window: deque[Tensor] = deque(maxlen=WINDOW)
    best = Trained(plan, module, made, torch.zeros(count, dtype=torch.bool), 0)
    for epoch in range(1, epochs + 1):
        move, gap = descend(
            module, made.centres, labels, made.eps, step=0.1, steps=plan.steps, restarts=plan.restarts, source=source
        )
        if epoch % every == 0 or epoch == epochs:
            with torch.no_grad():
                there = -gaps(module, made.points, labels[:count])
            hidden = (gap[:count] > 0) & (there > 0)
            if bool(hidden.any()):
                hidden = survivors(module, made, restarts=plan.restarts, seed=epoch)
            state = Trained(plan, module, made, hidden, epoch)
            if int(hidden.sum()) > int(best.hidden.sum()):
                best = replace(state, module=copy.deepcopy(module))
            if progress is not None:
                progress(state, there)
            if bool(hidden.all()):
                break
        window.append(move)
        seen = torch.stack([torch.zeros_like(made.centres), *window])
        y = module(torch.cat([(made.centres + seen).flatten(0, 1), made.points]))
        inner = len(y) - count
        hide = functional.cross_entropy(y[:inner], labels.expand(len(seen), -1).flatten())
        claimed = (y[inner:, 1] - y[inner:, 0]) * (2 * labels[:count] - 1)
        adam.zero_grad(set_to_none=True)
        (hide + functional.relu(claimed + MARGIN).mean()).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 10.0)
        adam.step()
        schedule.step()
    return best


def instances(made: Trained) -> Iterator[Instance]:
    """One instance for each planted point: that the network's answer is the claimed label, everywhere in its box."""
    plan, found = made.plan, made.boxes
    for k, (centre, point) in enumerate(zip(found.centres, found.points, strict=False)):
        module = copy.deepcopy(made.module)
        last = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
        if int(found.labels[k]) == 1:  # a claim is that output 0 exceeds output 1
            with torch.no_grad():
                last.weight.copy_(last.weight.flip(0))
                last.bias.copy_(last.bias.flip(0))
        name = f"{plan.architecture}-trained-{plan.position}-planted-{MARGIN:g}-{plan.seed}.{k}"
        network = replace(load(module.eval(), torch.zeros(1, *plan.shape)), name=name)
        low, high, x = ((v.to(F32).double())[None] for v in (centre - found.eps, centre + found.eps, point))
        x = x.clamp(low, high)
        y = network.to(F64)(x).flatten()
        yield checked(Instance(name, network, low, high, False, float(y[1] - y[0]), x))


def save(made: Trained, path: Path, *, half: bool = True) -> Trained:
    """Writes a network with its plan; returns what `read` will.

    Args:
        half: weights are rounded to float16, with which the points have to violate their claims still.

    Raises:
        InvalidInput: rounded so, a point no longer violates its claim.
    """
    kept = {f"weight:{k}": v.detach().numpy() for k, v in made.module.named_parameters()}
    arrays: dict[str, Any] = {k: v.astype(np.float16 if half else np.float32) for k, v in kept.items()}
    with open(path, "wb") as file:
        np.savez_compressed(
            file, plan=json.dumps(asdict(made.plan)), centres=made.boxes.centres.numpy(),
            labels=made.boxes.labels.numpy(), points=made.boxes.points.numpy(), hidden=made.hidden.numpy(),
            epoch=made.epoch, **arrays,
        )  # fmt: skip
    return read(path)


def read(path: Path) -> Trained:
    """A network that `save` wrote.

    Raises:
        InvalidInput: it is no such file, or a point in it does not violate its claim.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            plan = json.loads(str(file["plan"]))
            made = Plan(**{**plan, "shape": tuple(plan["shape"])})
            module = architecture(made)
            with torch.no_grad():
                for name, value in module.named_parameters():
                    value.copy_(torch.from_numpy(file[f"weight:{name}"].astype(np.float32)))
            centres, labels, points, hidden = (
                torch.from_numpy(file[name]) for name in ("centres", "labels", "points", "hidden")
            )
            found = Boxes(centres, labels, points, made.eps)
            epoch = int(file["epoch"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as problem:
        raise InvalidInput(f"{path} cannot be read as a trained network: {problem}.") from problem
    with torch.no_grad():
        violated = gaps(module, points, labels[: len(points)]) < 0
    if not bool(violated.all()):
        raise InvalidInput(f"{path}: a planted point does not violate its claim.")
    return Trained(made, module, found, hidden, epoch)
