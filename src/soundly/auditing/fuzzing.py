"""Fuzzing soundly: random recipes, every oracle, and what fails made small.

A finding is a recipe and an oracle that refuses it. Seeds say everything: the same seed gives the same recipe, the same
oracles in the same order, and the same draws within them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from soundly.auditing.generation import recipe as drawn
from soundly.auditing.oracles import ORACLES, Oracle
from soundly.auditing.recipes import Recipe
from soundly.auditing.subject import Subject
from soundly.errors import CaptureMismatch, SoundlyError

SHRINKING = 20.0
"""Seconds for making one finding small."""


@dataclass(frozen=True)
class Finding:
    """A recipe that an oracle refuses.

    Attributes:
        seed: of the recipe, and of the oracle's draws.
        oracle: its name.
        text: what it says.
        recipe: the smallest one found that it refuses still.
    """

    seed: int
    oracle: str
    text: str
    recipe: Recipe


@dataclass
class Tally:
    """What a run has seen: recipes, checks by oracle, refusals (operations that soundly says it does not support)."""

    recipes: int = 0
    checks: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)


def examine(
    recipe: Recipe,
    seed: int = 0,
    *,
    oracles: Mapping[str, Oracle] | None = None,
    tally: Tally | None = None,
) -> Iterator[tuple[str, str]]:
    """The oracles that refuse a recipe, each with what it says first; all of them by default.

    Exceptions other than `SoundlyError` count: soundly either answers or says why not.
    """
    subject = Subject(recipe)
    for name, oracle in (oracles or {n: o for n, (_, o) in ORACLES.items()}).items():
        if tally is not None:
            tally.checks[name] = tally.checks.get(name, 0) + 1
        try:
            text = next(oracle(subject, random.Random(seed)), None)
        except CaptureMismatch as error:  # lowering compares itself with the network: a mismatch is a fault of its own
            text = f"{type(error).__name__}: {error}"
        except SoundlyError as error:
            if tally is not None:
                kind = f"{name}: {type(error).__name__}"
                tally.refusals[kind] = tally.refusals.get(kind, 0) + 1
            continue
        except Exception as crash:
            text = f"{type(crash).__name__}: {crash}"
        if text is not None:
            yield name, text


def fuzz(
    seeds: Iterator[int] | Sequence[int],
    *,
    seconds: float | None = None,
    shrink: bool = True,
    tally: Tally | None = None,
    progress: Callable[[Tally], None] | None = None,
) -> Iterator[Finding]:
    """Examines the recipes of the seeds, each by the oracles whose turn it is, until there are no more or time is up.

    Args:
        seconds: of wall-clock time.
        shrink: whether recipes of findings are made small first.
        tally: is filled in as the run goes.
        progress: called after every recipe.
    """
    tally = Tally() if tally is None else tally
    deadline = None if seconds is None else time.monotonic() + seconds
    for seed in seeds:
        if deadline is not None and time.monotonic() > deadline:
            return
        r = random.Random(seed)
        turn = {name: oracle for name, (share, oracle) in ORACLES.items() if r.random() < share}
        recipe = drawn(seed)
        for name, text in examine(recipe, seed, oracles=turn, tally=tally):
            small = shrunk(recipe, seed, name) if shrink else recipe
            yield Finding(seed, name, text, small)
        tally.recipes += 1
        if progress is not None:
            progress(tally)


def shrunk(recipe: Recipe, seed: int, oracle: str, *, seconds: float = SHRINKING) -> Recipe:
    """A recipe with less in it that the oracle refuses as well; greedily, the boldest changes first."""
    deadline = time.monotonic() + seconds
    only = {oracle: ORACLES[oracle][1]}

    def fails(candidate: Recipe) -> bool:
        try:
            point = [(a + b) / 2 for a, b in zip(*candidate.box, strict=True)]
            values = candidate.run(point)
            valid = all(v.numel() and bool(torch.isfinite(v).all()) for v in values)
            valid &= (candidate.of or 0) < values[-1].numel()
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
            return False  # torch refuses it: no recipe at all
        return valid and next(examine(candidate, seed, oracles=only), None) is not None

    going = True
    while going:
        going = False
        for candidate in recipe.simpler():
            if time.monotonic() > deadline:
                return recipe
            if candidate != recipe and len(candidate.calls) and fails(candidate):
                recipe, going = candidate, True
                break
    return recipe
