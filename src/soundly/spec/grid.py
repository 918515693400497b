"""Grids: input sets in which entries, or groups of entries, take one of finitely many values.

Pixel levels, toggles and whole numbers are entries with a list of levels; tokens are groups of entries that take one of
a list of embeddings together. What is not chosen from a list ranges over a box, so that sets may be mixed. To narrow a
box to the grid is all that a search, or its checker, needs to know of it.

Reference: Huang et al., "Safety Verification of Deep Neural Networks", CAV 2017 (DLV: decisions on a grid).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.graph.node import Shape
from soundly.spec.region import Box

AT_ONCE = 2**24
"""Comparisons of boxes with options at once."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Entries of a flattened input that take one of some values together.

    Attributes:
        entries: [m], positions in the flattened input.
        options: [k, m] in float64, what they can be; no row twice.
    """

    entries: Tensor
    options: Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """The points of a box at which every choice takes one of its options.

    Attributes:
        base: the input's shape; where the entries lie that belong to no choice.
        choices: of different entries each. See `of`.
        box: the smallest box around the grid.
    """

    base: Box
    choices: tuple[Choice, ...]
    box: Box = field(init=False)

    def __post_init__(self) -> None:
        lower, upper = (end.flatten().clone() for end in (self.base.lower, self.base.upper))
        taken: set[int] = set()
        for choice in self.choices:
            mine = set(choice.entries.tolist())
            if len(mine) < len(choice.entries) or mine & taken or not mine <= set(range(len(lower))):
                raise InvalidInput("Grid: a choice names an entry twice, one of another choice, or none of the input.")
            if not bool(torch.isfinite(choice.options).all()) or choice.options.shape[1:] != choice.entries.shape:
                raise InvalidInput("Grid: options must be finite numbers [k, m] for the m entries of a choice.")
            if not len(choice.options):
                raise InvalidInput("Grid: a choice has no options.")
            taken |= mine
            lower[choice.entries], upper[choice.entries] = choice.options.amin(0), choice.options.amax(0)
        object.__setattr__(self, "box", Box(lower.reshape(self.shape), upper.reshape(self.shape)))

    @staticmethod
    def of(x: Tensor | Box, choices: Mapping[int | tuple[int, ...], Any]) -> Grid:
        """The inputs that equal x but for some parts, which are taken from lists.

        Args:
            x: a tensor of the input's shape, or a box where the other entries range.
            choices: for an index of x, complete or of its leading axes, the options [k, *x[index].shape]:
                `{(0, 5): [0.0, 0.5, 1.0]}` says what one entry can be, `{2: table}` which rows of an embedding table
                row 2 can be.
        """
        base = x if isinstance(x, Box) else Box(x, x)
        where = torch.arange(base.lower.numel()).reshape(base.shape)
        found = []
        for index, given in choices.items():
            try:
                entries = where[index]
            except (IndexError, TypeError) as error:
                raise InvalidInput(f"choices: {index!r} is no index of an input of shape {base.shape}.") from error
            options = torch.as_tensor(given, dtype=None if isinstance(given, Tensor) else torch.float64)
            options = options.detach().double().cpu()
            if options.dim() != entries.dim() + 1 or options.shape[1:] != entries.shape or not len(options):
                raise InvalidInput(
                    f"choices: the options at {index!r} have shape {tuple(options.shape)}; give "
                    f"(how many, {', '.join(map(str, entries.shape))}), at least one."
                )
            found.append(Choice(entries.reshape(-1), options.reshape(len(options), -1).unique(dim=0)))
        return Grid(base, tuple(found))

    @staticmethod
    def evenly(box: Box, levels: int | Sequence[int]) -> Grid:
        """Evenly spaced levels, the box's ends included, in every entry that varies: `levels` of them, or one number
        per such entry."""
        vary = (box.lower < box.upper).flatten().nonzero().flatten().tolist()
        counts = [levels] * len(vary) if isinstance(levels, int) else list(levels)
        if len(counts) != len(vary) or any(count < 2 for count in counts):
            raise InvalidInput(f"levels: give a number of at least 2, or {len(vary)} of them.")
        lower, upper = box.lower.flatten(), box.upper.flatten()
        choices = []
        for i, count in zip(vary, counts, strict=True):
            share = torch.arange(count, dtype=torch.float64) / (count - 1)
            values = lower[i] + share * (upper[i] - lower[i])
            values[-1] = upper[i]
            choices.append(Choice(torch.tensor([i]), values.clamp(lower[i], upper[i]).unique()[:, None]))
        return Grid(box, tuple(choices))

    @property
    def shape(self) -> Shape:
        return self.base.shape

    @property
    def is_empty(self) -> bool:
        return self.box.is_empty

    @cached_property
    def freedom(self) -> int:
        """How many choices and other entries are not fixed."""
        rest = self.box.lower.flatten() < self.box.upper.flatten()
        for choice in self.choices:
            rest[choice.entries] = False
        return int(rest.sum()) + sum(len(choice.options) > 1 for choice in self.choices)

    @cached_property
    def size(self) -> float:
        """How many points there are: an exact int, or infinity where entries without a choice vary."""
        if self.is_empty:
            return 0
        count = math.prod(len(choice.options) for choice in self.choices)
        return count if self.freedom == sum(len(c.options) > 1 for c in self.choices) else math.inf

    def points(self, *, batch: int = 4096) -> Iterator[Tensor]:
        """All points, in batches [k, *shape]; a finite number of them."""
        if self.size == math.inf:
            raise InvalidInput("points: the grid has entries that range over an interval; there is no list.")
        number = itertools.count(0, batch)
        while (first := next(number)) < self.size:
            ids = range(first, min(first + batch, int(self.size)))
            x = self.base.lower.flatten().repeat(len(ids), 1)
            step = 1
            for choice in self.choices:
                which = torch.tensor([i // step % len(choice.options) for i in ids])
                x[:, choice.entries] = choice.options[which]
                step *= len(choice.options)
            yield x.reshape(-1, *self.shape)

    # -- what every region can do

    def contains(self, x: Tensor, *, strict: bool = False) -> Tensor:
        """Whether points [..., *shape] lie on the grid, exactly; `strict` is about the entries without a choice."""
        inside = self._rest.contains(x, strict=strict)
        flat = x.detach().double().cpu().reshape(*x.shape[: x.dim() - len(self.shape)], -1)
        for choice in self.choices:
            inside &= (flat[..., None, choice.entries] == choice.options).all(-1).any(-1)
        return inside

    def excess(self, x: Tensor) -> Tensor:
        """By how much points [..., *shape] miss the grid in their worst entry, to the nearest option of each choice."""
        return (self.project(x) - x.detach().double().cpu()).abs().flatten(x.dim() - len(self.shape)).amax(-1)

    def project(self, x: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """The nearest points of the grid (in the largest entry), in float64 or rounded to `dtype`."""
        flat = self._rest.project(x, dtype=dtype).reshape(-1, self.base.lower.numel())
        given = x.detach().double().cpu().reshape(flat.shape)
        for choice in self.choices:
            away = torch.cdist(given[:, choice.entries], choice.options, p=torch.inf)
            flat[:, choice.entries] = choice.options[away.argmin(1)].to(dtype)
        return flat.reshape(x.shape)

    def lowest(self, a: Tensor) -> Tensor:
        """Points [k, n], flat, where rows a [k, n] are least."""
        a = a.detach().double().cpu()
        x = torch.where(a > 0, self._rest.lower.flatten(), self._rest.upper.flatten())
        for choice in self.choices:
            x[:, choice.entries] = choice.options[(a[:, choice.entries] @ choice.options.T).argmin(1)]
        return x

    def samples(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """n points [n, *shape]: options drawn alike, other entries uniform."""
        generator = generator or torch.Generator().manual_seed(0)
        x = self._rest.samples(0 if self.is_empty else n, generator=generator)
        flat = x.reshape(len(x), -1)
        for choice in self.choices:
            flat[:, choice.entries] = choice.options[torch.randint(len(choice.options), (len(x),), generator=generator)]
        return flat.reshape(x.shape)

    def corners(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """At most n points [k, *shape] that lie nearest to corners of the box."""
        return self.project(self.box.corners(n, generator=generator))

    # -- boxes

    def narrowed(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest boxes around the grid's points in boxes [k, n], flat and in float64; around some of the points
        beside them where a choice is of several entries. Crossed ends where there is none."""
        lower, upper = lower.clone(), upper.clone()
        for choice in self.choices:
            low, high = lower[:, choice.entries], upper[:, choice.entries]
            for some in torch.arange(len(low)).split(max(1, AT_ONCE // choice.options.numel())):
                a, b = low[some, None], high[some, None]
                inside = ((choice.options >= a) & (choice.options <= b)).all(-1, keepdim=True)
                first = torch.where(inside, choice.options, math.inf).amin(1)
                last = torch.where(inside, choice.options, -math.inf).amax(1)
                none = ~inside.any(1)
                low[some], high[some] = torch.where(none, 1.0, first), torch.where(none, 0.0, last)
            lower[:, choice.entries], upper[:, choice.entries] = low, high
        return lower, upper

    def between(self, entry: Tensor, at: Tensor) -> Tensor:
        """Where to split entries [k] near `at` [k]: halfway between the levels on either side; `at` itself for entries
        without a choice, or without a level on one side."""
        result = at.clone()
        for i in entry.unique().tolist():
            levels = self._levels.get(i)
            if levels is None:
                continue
            mine = (entry == i).nonzero().flatten()
            above = torch.searchsorted(levels, at[mine], right=True)
            known = (above > 0) & (above < len(levels))
            mine, above = mine[known], above[known]
            result[mine] = levels[above - 1] / 2 + levels[above] / 2
        return result

    @cached_property
    def _levels(self) -> dict[int, Tensor]:
        """What each chosen entry can be, ascending."""
        return {
            i: column.unique()
            for choice in self.choices
            for i, column in zip(choice.entries.tolist(), choice.options.T.contiguous(), strict=True)
        }

    @cached_property
    def _rest(self) -> Box:
        """The box of the entries without a choice, with chosen entries anywhere."""
        far = torch.finfo(torch.float64).max / 4
        lower, upper = (end.flatten().clone() for end in (self.base.lower, self.base.upper))
        for choice in self.choices:
            lower[choice.entries], upper[choice.entries] = -far, far
        return Box(lower.reshape(self.shape), upper.reshape(self.shape))
