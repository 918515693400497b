"""Where the functions of a program jump: entries that a search over boxes holds on one side, beside cutting its boxes.

However small a box around a point where several entries jump, bounds of their products stay apart from the truth. With
each of these entries held on one side of its jump, nothing jumps any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from soundly.bounds.batch import entries
from soundly.bounds.frame import Frame, Pass, Relaxations, Split
from soundly.bounds.lines import jumps
from soundly.bounds.program import Affine, Function, Step
from soundly.bounds.relaxation import Lines

F64 = torch.float64


class Jumps:
    """The candidates [c] of a program: every entry of the steps that functions with jumps read, at each jump.

    Subproblems are described by the sides on which they hold entries, [k, depth]: neurons (entries numbered through all
    steps; -1: none), signs (+1 above, -1 below) and the ends of the neurons' intervals there.

    Attributes:
        neuron: the candidates' numbers.
        at: their jumps.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        self.offset = torch.tensor([0, *(step.size for step in steps)]).cumsum(0)
        self.readers: dict[int, list[int]] = {}
        points: dict[int, set[float]] = {}
        for j, step in enumerate(steps):
            if isinstance(step, Function):
                self.readers.setdefault(step.source, []).append(j)
                points.setdefault(step.source, set()).update(jumps(step.op))
        self.points = [(i, t) for i, found in sorted(points.items()) for t in sorted(found)]
        blocks = [torch.arange(int(self.offset[i]), int(self.offset[i + 1])) for i, _ in self.points]
        self.neuron = torch.cat([torch.empty(0, dtype=torch.int64), *blocks])
        ats = [torch.full((steps[i].size,), t, dtype=F64) for i, t in self.points]
        self.at = torch.cat([torch.empty(0, dtype=F64), *ats])

    def __len__(self) -> int:
        return len(self.neuron)

    def crossed(self, frame: Frame) -> Tensor:
        """[k, c]: where the jump lies in the entry's interval."""
        masks = [torch.empty(len(frame), 0, dtype=torch.bool)]
        for i, t in self.points:
            low, high = frame.lower[i], frame.upper[i]
            masks.append((low <= t) & (t <= high) & (low < high))
        return torch.cat(masks, 1)

    def losses(self, lines: Relaxations, found: Pass, owner: Tensor) -> Tensor:
        """[rows, c]: how far apart the lines of the functions that read the entry are where it jumps, times how much
        that counts in the row."""
        losses = [found.d.new_empty(len(found.d), 0)]
        for i, t in self.points:
            total = found.d.new_zeros(len(found.d), self.steps[i].size)
            for j in self.readers[i]:
                if j in found.kept:
                    line = lines[j]
                    assert isinstance(line, Lines)
                    room = (line.slope_high - line.slope_low) * t + line.offset_high - line.offset_low
                    total = total + found.kept[j].abs() * room[owner]
            losses.append(total)
        return torch.cat(losses, 1)

    def intervals(self, neuron: Tensor, sign: Tensor, end: Tensor, dtype: torch.dtype) -> Frame | None:
        """What the sides of subproblems say of the intervals; None if nothing."""
        k, depth = neuron.shape
        if depth == 0:
            return None
        unknown = torch.full((1, 1), math.inf, dtype=dtype)
        lower = [(-unknown).expand(k, step.size) for step in self.steps]
        upper = [unknown.expand(k, step.size) for step in self.steps]
        step_of = self._step_of(neuron)
        for i in step_of[neuron >= 0].unique().tolist():
            owner, place = (step_of == i).nonzero(as_tuple=True)
            flat = owner * self.steps[i].size + neuron[owner, place] - self.offset[i]
            above, value = sign[owner, place] > 0, end[owner, place].to(dtype)
            lower[i], upper[i] = lower[i].clone(), upper[i].clone()
            lower[i].view(-1).scatter_reduce_(0, flat[above], value[above], "amax")
            upper[i].view(-1).scatter_reduce_(0, flat[~above], value[~above], "amin")
        return Frame(lower, upper, torch.zeros(k, dtype=torch.bool))

    def end(self, at: Tensor, sign: Tensor, dtype: torch.dtype) -> Tensor:
        """The ends of sides: next to the jump. That itself counts with the side whose value it has."""
        return torch.nextafter(at.to(dtype), (sign * math.inf).to(dtype)).double()

    def splits(self, neuron: Tensor, sign: Tensor, end: Tensor, dtype: torch.dtype) -> dict[int, Split]:
        """The sides of one subproblem [depth] as constraints; of a neuron's several the last one."""
        found: dict[int, Split] = {}
        for i, v, s, t in zip(*(x.tolist() for x in (self._step_of(neuron), neuron, sign, end)), strict=True):
            if v >= 0:
                if i not in found:
                    found[i] = Split(*(torch.zeros(1, self.steps[i].size, dtype=dtype) for _ in range(3)))
                entry = v - int(self.offset[i])
                found[i].sign[0, entry], found[i].at[0, entry] = s, t
        return found

    def multipliers(self, neuron: Tensor, dense: Mapping[int, Tensor]) -> npt.NDArray[np.float64]:
        """The numbers of those constraints, in the order of the sides."""
        neuron = neuron[neuron >= 0]
        beta, order = np.zeros(len(neuron)), neuron.tolist()
        for place, i in enumerate(self._step_of(neuron).tolist()):
            if order[place] not in order[place + 1 :]:
                beta[place] = float(dense[i][0, order[place] - int(self.offset[i])])
        return beta

    def planes(self, neuron: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [k, inputs] and constants [k] of the neurons that are affine in the input in one step; 0
        elsewhere."""
        a, d = torch.zeros(len(neuron), self.steps[0].size, dtype=F64), torch.zeros(len(neuron), dtype=F64)
        step_of = self._step_of(neuron)
        for i in step_of.unique().tolist():
            step = self.steps[i]
            if isinstance(step, Affine) and all(source == 0 for source in step.sources):
                mine = step_of == i
                entry = neuron[mine] - self.offset[i]
                d[mine] = step.bias[entry].double()
                for part, _ in step.parts:
                    a[mine] += entries(part, entry, step.bias).double()
        return a, d

    def _step_of(self, neuron: Tensor) -> Tensor:
        return torch.bucketize(neuron, self.offset, right=True) - 1
