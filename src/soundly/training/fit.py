"""One loop for every recipe: seeded, resumable, stopped early where validation no longer improves.

An epoch's order and noise depend on the seed and the epoch alone, so a run that was interrupted and taken up again ends
with the same weights as one that was not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from soundly.errors import InvalidInput

Step = Callable[[Tensor, Tensor, float], Tensor]
"""The loss of a batch x, y, and how much of the training has passed, from 0 to 1."""


@dataclass(frozen=True)
class Epoch:
    """What a progress callback is told after each epoch: how many are done, and of how many; the mean loss; the
    validation loss, if there is one; seconds since the start."""

    done: int
    of: int
    loss: float
    validation: float | None
    seconds: float


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    step: Step,
    *,
    epochs: int,
    batch: int = 64,
    lr: float = 1e-3,
    cooling: float = 0.3,
    seed: int = 0,
    validate: Callable[[], float] | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    about: object = "",
    progress: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Trains a model in place with Adam.

    Args:
        x, y: examples [n, ...] and labels [n]; each epoch leaves out what does not fill a batch.
        step: the loss of a batch.
        cooling: the last share of the training, in which the learning rate falls to a tenth.
        validate: a loss to watch after each epoch.
        patience: epochs without improvement after which training stops; with it the best weights are kept.
        checkpoint: a file that is written after each epoch, and resumed from if it is there.
        about: what else belongs to the settings, the loss above all: a checkpoint of other settings is refused.

    Returns:
        The epochs, those of before an interruption included.

    Raises:
        InvalidInput: the checkpoint belongs to another model or other settings, or the loss is not finite.
    """
    if len(x) < batch:
        raise InvalidInput(f"batch is {batch}, but there are {len(x)} examples; give a smaller one.")
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    data = len(x), float(x.double().mean()), float(y.double().mean())
    settings = f"{type(model).__name__} {data} {epochs} {batch} {lr} {cooling} {seed} {patience} {about}"
    history: list[Epoch] = []
    best: tuple[float, int, dict[str, Tensor]] | None = None
    if checkpoint is not None and Path(checkpoint).exists():
        history, best = _resume(Path(checkpoint), settings, model, optimiser)
    before, begun, batches = (history[-1].seconds if history else 0.0), time.monotonic(), len(x) // batch
    for epoch in range(len(history), epochs):
        if patience is not None and best is not None and epoch - best[1] > patience:
            break
        total = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(x))[: batches * batch].reshape(batches, batch)
            for i, chosen in enumerate(order):
                passed = (epoch + i / batches) / epochs
                for group in optimiser.param_groups:
                    group["lr"] = lr * min(1.0, 0.1 + 0.9 * (1 - passed) / cooling) if cooling else lr
                loss = step(x[chosen], y[chosen], passed)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                total += float(loss.detach())
            watched = validate() if validate is not None else None
        if not abs(total) < float("inf"):
            raise InvalidInput(f"the loss was not finite in epoch {epoch + 1}; give a smaller learning rate.")
        if watched is not None and (best is None or watched < best[0]):
            best = watched, epoch, {name: value.clone() for name, value in model.state_dict().items()}
        history.append(Epoch(epoch + 1, epochs, total / batches, watched, before + time.monotonic() - begun))
        if checkpoint is not None:
            _keep(Path(checkpoint), settings, model, optimiser, history, best)
        if progress is not None:
            progress(history[-1])
    if patience is not None and best is not None:
        model.load_state_dict(best[2])
    return history


def _keep(
    file: Path,
    settings: str,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    history: list[Epoch],
    best: tuple[float, int, dict[str, Tensor]] | None,
) -> None:
    rows = [(e.done, e.of, e.loss, e.validation, e.seconds) for e in history]
    state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "history": rows, "best": best}
    part = file.with_name(file.name + ".part")
    torch.save({"settings": settings, **state}, part)
    os.replace(part, file)


def _resume(
    file: Path, settings: str, model: nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[list[Epoch], tuple[float, int, dict[str, Tensor]] | None]:
    try:
        state = torch.load(file, weights_only=True)
        if state["settings"] != settings:
            raise InvalidInput(
                f"{file} is the checkpoint of other settings; name another file, or remove it. "
                f"Its settings: {state['settings']}; now: {settings}."
            )
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        return [Epoch(*row) for row in state["history"]], state["best"]
    except InvalidInput:
        raise
    except Exception as problem:
        raise InvalidInput(f"{file} is no checkpoint of this model: {problem}") from problem
