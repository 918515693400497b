"""Subproblems of a search by neuron splits as flat arrays: which constraints they have, and which free slopes.

Neurons are the entries of all steps, numbered through. A constraint is v >= at or v <= at for one of them; free slopes
stand in a row, step by step, and only where a relaxation at the root has something to choose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from soundly.bounds.batch import Bounder
from soundly.bounds.frame import Frame, Side, Slopes, Split
from soundly.bounds.lines import jumps
from soundly.bounds.program import Function, Step


@dataclass(frozen=True, eq=False)
class Parts:
    """Subproblems: `neuron`, `sign`, `at` and `beta` [k, depth] describe the constraints (neuron -1: none), `slopes`
    [k, slots] the free lines; with tree nodes, trees, bounds, and which of the search's intervals they have."""

    neuron: Tensor
    sign: Tensor
    at: Tensor
    beta: Tensor
    slopes: Tensor
    node: Tensor
    tree: Tensor
    bound: Tensor
    ends: Tensor

    def __len__(self) -> int:
        return len(self.node)

    def _asdict(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _fields(self) -> tuple[Tensor, ...]:
        return self.neuron, self.sign, self.at, self.beta, self.slopes, self.node, self.tree, self.bound, self.ends

    def pick(self, index: Tensor | slice) -> Parts:
        return Parts(*(v[index] for v in self._fields()))

    @staticmethod
    def join(parts: list[Parts]) -> Parts:
        depth = max(p.neuron.shape[1] for p in parts)
        wide = [p.deeper(depth) for p in parts]
        return Parts(*(torch.cat(v) for v in zip(*(p._fields() for p in wide), strict=True)))

    @property
    def last(self) -> Tensor:
        """[k, depth]: which constraints are the last ones of their neuron."""
        order = self.neuron.sort(dim=1, stable=True)
        same = torch.zeros_like(order.values, dtype=torch.bool)
        same[:, :-1] = order.values[:, 1:] == order.values[:, :-1]
        return torch.zeros_like(same).scatter_(1, order.indices, ~same)

    def deeper(self, depth: int) -> Parts:
        """With room for that many constraints."""
        extra = depth - self.neuron.shape[1]
        if extra == 0:
            return self
        neuron, sign, at, beta = (
            torch.cat([v, v.new_full((len(v), extra), fill)], 1)
            for v, fill in ((self.neuron, -1), (self.sign, 0), (self.at, 0), (self.beta, 0))
        )
        return replace(self, neuron=neuron, sign=sign, at=at, beta=beta)

    def extended(self, neuron: Tensor, sign: Tensor, at: Tensor, beta: Tensor) -> Parts:
        """With one constraint more each."""
        more = {"neuron": neuron, "sign": sign, "at": at, "beta": beta}
        return replace(self, **{name: torch.cat([getattr(self, name), v], 1) for name, v in more.items()})


@dataclass(frozen=True, eq=False)
class Slots:
    """Which free slopes there are: the entries whose relaxations at the root have something to choose.

    Attributes:
        entries: step and side -> entries.
        first: step and side -> position of its first entry among all slots.
        count: of all of them.
    """

    entries: dict[Side, Tensor]
    first: dict[Side, int]
    count: int

    @staticmethod
    def of(bounder: Bounder, root: Frame) -> Slots:
        entries, first, count = {}, {}, 0
        for side, mask in bounder.free(root).items():
            entries[side], first[side] = mask[0].nonzero()[:, 0], count
            count += len(entries[side])
        return Slots(entries, first, count)

    def dense(self, slopes: Tensor, steps: Sequence[Step]) -> dict[Side, Tensor]:
        """[k, count] as the slopes [k, n] of the steps; 0 where there is no choice."""
        found = {}
        for side, index in self.entries.items():
            found[side] = slopes.new_zeros(len(slopes), steps[side[0]].size)
            found[side][:, index] = slopes[:, self.first[side] : self.first[side] + len(index)]
        return found

    def flat(self, slopes: Slopes, like: Tensor) -> Tensor:
        """The inverse: what is `like` [k, count] where no slopes are given."""
        flat = like.clone()
        for side, index in self.entries.items():
            if side in slopes:
                flat[:, self.first[side] : self.first[side] + len(index)] = slopes[side][:, index].to(flat)
        return flat


class Neurons:
    """The neurons of some steps.

    Attributes:
        offset: [steps + 1], where each step's begin.
        jumps: by step, where functions that read it jump.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.offset = torch.tensor([0, *(step.size for step in steps)]).cumsum(0)
        self.jumps: dict[int, set[float]] = {}
        for step in steps:
            if isinstance(step, Function):
                self.jumps.setdefault(step.source, set()).update(jumps(step.op))

    def held(self, parts: Parts, lower: Sequence[Tensor], upper: Sequence[Tensor]) -> tuple[Frame, dict[int, Split]]:
        """Intervals as the constraints clamp them; and these by step, of a neuron's several the last one."""
        k = len(parts)
        lower, upper = list(lower), list(upper)
        splits = {}
        step_of = self._step_of(parts)
        last = parts.last
        for i in step_of[parts.neuron >= 0].unique().tolist():
            owner, place = (step_of == i).nonzero(as_tuple=True)
            entry = parts.neuron[owner, place] - self.offset[i]
            sign, at, beta = (v[owner, place] for v in (parts.sign, parts.at, parts.beta))
            low, high = (v[i].expand(k, -1).clone() for v in (lower, upper))
            # A neuron may be split at several points: all clamp it, the last one has a multiplier.
            for side, end, pick in ((1, low, "amax"), (-1, high, "amin")):
                mine = sign == side
                flat = end.view(-1)
                flat.scatter_reduce_(0, (owner * end.shape[1] + entry)[mine], at[mine], pick)
            dense = [torch.zeros_like(low) for _ in range(3)]
            mine = last[owner, place]
            for v, target in zip((sign, at, beta), dense, strict=True):
                target[owner[mine], entry[mine]] = v[mine]
            for t in self.jumps.get(i, ()):
                # Both sides of a jump belong to one half each: the right half has the right side's value at t, too.
                here = (dense[0] != 0) & (dense[1] == t)
                beyond = (
                    torch.nextafter(low.new_tensor(t), low.new_tensor(math.inf)),
                    torch.nextafter(low.new_tensor(t), low.new_tensor(-math.inf)),
                )
                low = torch.where(here & (dense[0] > 0) & (low == t) & (high > t), beyond[0], low)
                high = torch.where(here & (dense[0] < 0) & (high == t) & (low < t), beyond[1], high)
            lower[i], upper[i] = low, high
            splits[i] = Split(*dense)
        empty = torch.zeros(k, dtype=torch.bool)
        for i in splits:
            empty |= (lower[i] > upper[i]).any(1)
            lower[i], upper[i] = torch.minimum(lower[i], upper[i]), torch.maximum(lower[i], upper[i])
        return Frame(lower, upper, empty), splits

    def multipliers(self, parts: Parts, force: Mapping[int, Tensor]) -> Tensor:
        """Multipliers [k, depth] of the parts' constraints from those by step [k, n]; theirs where none are given."""
        beta, step_of = parts.beta.clone(), self._step_of(parts)
        for i, v in force.items():
            owner, place = ((step_of == i) & parts.last & (parts.neuron >= 0)).nonzero(as_tuple=True)
            beta[owner, place] = v[owner, parts.neuron[owner, place] - self.offset[i]]
        return beta

    def _step_of(self, parts: Parts) -> Tensor:
        return torch.bucketize(parts.neuron, self.offset, right=True) - 1
