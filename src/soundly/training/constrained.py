"""Training under hard constraints: fine-tune towards them, then edit until they hold, with proof.

A penalty makes violations small but seldom none; an edit makes them none but moves weights as little as possible,
whatever the task. One after the other they give a model that is good at its task and keeps its promises. The penalty
reads the same constraints as the edit: on outputs, gradients, derivatives and explanations, at points and on regions.

Reference: Tao and Thakur, "Provable Gradient Editing of Deep Neural Networks", NeurIPS 2025, section 5.3 (gradient
descent, then an edit).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from soundly.editing.constraints import Constraint
from soundly.editing.edit import Edit, edit
from soundly.editing.inner import sampled
from soundly.editing.sequential import require
from soundly.errors import InvalidInput
from soundly.graph.load import load
from soundly.graph.network import Network

ROOM = 1e-3
"""Rows are pulled inside their bounds by this share of their size."""

Loss = Callable[[nn.Module, Tensor], Tensor]
"""The loss of a module on a batch: indices of examples, or examples themselves, as `data` holds them."""


class Penalty:
    """How far constraints are from holding, as a differentiable function of a module's parameters.

    The mean over rows of the squared excess beyond their bounds (for a norm or a cosine: beyond the radius), each in
    units of the row's size before training. On regions it sees some points.

    Args:
        network: the captured module.
        constraints: as for `soundly.edit`.
        batch: how many points are looked at in a call, drawn at random; all where a constraint compares points.

    Raises:
        InvalidInput: the constraints do not fit the network.
    """

    def __init__(self, network: Network, constraints: Sequence[Constraint], *, batch: int = 64) -> None:
        self.names = tuple(network.parameters)
        self.requirements = require(network, sampled(constraints), tuple(network.parameters.values()))
        evidence = self.requirements.evidence
        self.scale = self.requirements.magnitude(evidence(evidence.theta)[0])
        apart = bool((self.requirements.owner >= 0).all()) and not len(self.requirements.cones)
        self.batch = batch if apart else len(evidence.points)

    def __call__(self, module: nn.Module) -> Tensor:
        r, evidence = self.requirements, self.requirements.evidence
        parameters = dict(module.named_parameters())
        theta = torch.cat([parameters[name].double().reshape(-1) for name in self.names])
        chosen = torch.randperm(len(evidence.points))[: self.batch]
        found = torch.vmap(lambda x: evidence.at(theta, x)[0], chunk_size=evidence.chunk)(evidence.points[chosen])
        rows = r.values(found.new_zeros(len(evidence.points), r.width).index_copy(0, chosen, found))
        excess = torch.maximum(r.lower - rows, rows - r.upper)
        counts = torch.isin(r.owner, chosen) | (r.owner < 0)
        for start, stop in r.cones.tolist():
            part, last = slice(start, stop - 1), stop - 1
            missed = (rows[part] - rows[part].clamp(r.lower[part], r.upper[part])).norm()
            counts[start:last] = False
            excess = excess.index_put((torch.tensor([last]),), missed - (rows[last] - r.lower[last]))
        return (excess / self.scale + ROOM).clamp(min=0)[counts].square().mean()


def fit(
    module: nn.Module,
    data: Tensor,
    loss: Loss,
    *,
    epochs: int,
    batch: int = 64,
    learning_rate: float = 1e-2,
    decay: float = 0.997,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    weight: float = 1.0,
) -> None:
    """Trains a module in place, by Adam with a rate that falls by `decay` after every epoch.

    Args:
        data: what batches are taken from, along its first axis.
        loss: of the module on a batch.
        penalty: added to every batch's loss, times `weight`.
    """
    optimiser = torch.optim.Adam(module.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, decay)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data)).split(batch):
            total = loss(module, data[chosen])
            if penalty is not None:
                total = total + weight * penalty(module).to(total)
            optimiser.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        schedule.step()


@dataclass(frozen=True, eq=False)
class Constrained:
    """A module that was fine-tuned, and the edit that followed.

    Attributes:
        edit: whether the constraints are proved, and the certificate.
        module: the edited module; None unless proved.
        tuned: the fine-tuned module, which only tends to keep the constraints.
        penalties: the penalty before fine-tuning and after it.
    """

    edit: Edit
    module: nn.Module | None
    tuned: nn.Module
    penalties: tuple[float, float]


def constrained(
    module: nn.Module,
    constraints: Sequence[Constraint],
    data: Tensor,
    loss: Loss,
    *,
    example: Tensor,
    layer: str | Sequence[str],
    epochs: int,
    weight: float = 1.0,
    batch: int = 64,
    learning_rate: float = 1e-3,
    decay: float = 1.0,
    **options: Any,
) -> Constrained:
    """Fine-tunes a module towards constraints, and edits a layer so that they hold, with proof.

    Args:
        module: trained or not; left as it is.
        constraints: see `soundly.at` and `soundly.over`.
        data, loss, epochs, batch, learning_rate, decay: of the task, see `fit`.
        example: an input, for capturing the module.
        layer: what the edit changes; fine-tuning changes every parameter that asks for a gradient.
        weight: of the penalty beside the loss.
        options: further arguments of `soundly.edit`.

    Returns:
        The outcome. The edit is the smallest, or one near the goals, measured from the fine-tuned weights.

    Raises:
        InvalidInput, EditError, CaptureError: the constraints, layer or module do not fit; before any training.
    """
    tuned = copy.deepcopy(module)
    network = load(tuned, example)
    missing = set(network.parameters) - {name for name, _ in tuned.named_parameters()}
    if missing:
        raise InvalidInput(f"module: {', '.join(sorted(missing))} of the captured network are none of its parameters.")
    penalty = Penalty(network, constraints, batch=batch)
    with torch.no_grad():
        before = float(penalty(tuned))
    fit(tuned, data, loss, epochs=epochs, batch=batch, learning_rate=learning_rate, decay=decay, penalty=penalty,
        weight=weight)  # fmt: skip
    with torch.no_grad():
        after = float(penalty(tuned))
    outcome = edit(load(tuned, example), constraints, layer=layer, **options)
    edited = outcome.applied_to(tuned) if outcome.certificate is not None else None
    return Constrained(outcome, edited, tuned, (before, after))
