"""Necks: lemmas that the few neurons through which a network's values pass stay on one side of their kinks.

Where everything behind some step depends on the input only through a handful of its neurons, a neck, each fact about
one of them serves all clauses, and is proved more easily than any: its network ends there. Bounds behind the neck are
then found anew, with the narrower intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from soundly.bounds.batch import Bounder
from soundly.bounds.conditional import with_rows
from soundly.bounds.frame import Frame
from soundly.bounds.lines import bent, kink
from soundly.bounds.program import Affine, Function, Program
from soundly.verification.lemmas import recorded
from soundly.verification.neuron_split import NeuronSplit
from soundly.verification.problem import Problem
from soundly.verification.proof import Lemma
from soundly.verification.rows import Rows

NECK = 8
"""How many neurons a neck has at most."""
BEYOND = 0.01
"""How far from its kink a neuron shall stay, of its interval's length, where the function is not constant there."""


@dataclass(frozen=True, eq=False)
class Neck:
    """Neurons of a step and the ends of their intervals to be proved.

    Attributes:
        step: an affine one.
        entry, side: [k], 0 for a lower end and 1 for an upper one.
        level: [k], float64, the ends.
    """

    step: int
    entry: Tensor
    side: Tensor
    level: Tensor


def neck_of(bounder: Bounder, root: Frame) -> Neck | None:
    """The neck of a program over a root's intervals where most neurons in front of it are not stable; None without
    one."""
    found, best = None, NECK + 1
    for j, step in enumerate(bounder.steps):
        ends = kink(step.op) if isinstance(step, Function) else None
        if not isinstance(step, Function) or ends is None or min(ends) < 0:
            continue
        i = step.source
        alone = bounder.readers[i] == [j] and all(s >= j for later in bounder.steps[j + 1 :] for s in later.sources)
        if not alone or not isinstance(bounder.steps[i], Affine) or bounder.exact[i]:
            continue
        alive = int((root.lower[j] < root.upper[j]).sum())
        low, high = (v[i][0].double() for v in (root.lower, root.upper))
        entry = bent(step.op, low, high).nonzero()[:, 0]
        if alive < best and len(entry):
            side = (high < -low)[entry].long()  # the kink is nearer to this end
            slope = torch.where(side == 0, ends[1], ends[0])
            level = (1 - 2 * side) * BEYOND * (high - low)[entry] * (slope != 0)
            found, best = Neck(i, entry, side, level), alive
    return found


class NeckSplit(NeuronSplit):
    """The search for a neck's ends: one tree each, on the part of the program in front.

    Args:
        main: the search that is to profit, with nothing known before.
    """

    def __init__(self, main: NeuronSplit, ends: Neck) -> None:
        i, many, problem = ends.step, len(ends.entry), main.problem
        program = Program(problem.program.steps[: i + 1])
        sign = (1 - 2 * ends.side).double()
        y = torch.zeros(many, program.steps[i].size, dtype=torch.float64)
        y[torch.arange(many), ends.entry] = sign
        none = torch.zeros((), dtype=torch.float64)
        rows = Rows(y, none.expand(many, program.inputs), -sign * ends.level, torch.arange(many))
        spans = torch.zeros(len(problem.lower), 2, dtype=torch.int64)
        spans[main.case, 1], spans[main.case + 1 :] = many, many
        part = Problem(
            program, problem.lower, problem.upper, rows, torch.zeros(many, dtype=torch.float64), spans, problem.ball
        )
        whole = with_rows(program, y, None, rows.constant).to(main.dtype)
        own = Bounder(whole, deadline=main.bounder.deadline, ball=problem.ball)
        frame = Frame(main.root.lower[: i + 1], main.root.upper[: i + 1], main.root.infeasible)
        last = own.steps[-1]
        assert isinstance(last, Affine)
        low, high = own.forward(last, frame)
        root = Frame([*frame.lower, low], [*frame.upper, high], frame.infeasible)
        refined = {j: r for j, r in main.refined.items() if j <= i}
        super().__init__(part, own, main.case, root, list(range(many)), margin=main.margin, refined=refined)
        self.main, self.ends = main, ends

    @property
    def due(self) -> bool:
        return False

    def _urgent(self, batch: int) -> Tensor:
        """As many of every tree: the easy ones shall be done soon."""
        order = self.waiting.bound.argsort()
        order = order[self.waiting.tree[order].argsort(stable=True)]
        tree = self.waiting.tree[order]
        place = torch.arange(len(order)) - torch.searchsorted(tree, tree)
        return order[place.topk(batch, largest=False, sorted=False).indices]

    @property
    def fresh(self) -> bool:
        """Whether not even the roots are bounded."""
        return not self.proved and not self.subproblems

    @property
    def done(self) -> list[int]:
        """The trees that have nothing left to prove."""
        left = torch.cat([p.tree for p in (self.waiting, *self.stuck)]).tolist()
        return [t for t in range(len(self.ends.entry)) if t not in left]

    def frame(self, trees: Sequence[int]) -> Frame:
        """Intervals of the whole program's steps, as far as some trees have proved them."""
        bounds = self.main.root
        lower = [torch.full_like(v, -math.inf) for v in bounds.lower]
        upper = [torch.full_like(v, math.inf) for v in bounds.upper]
        i, some = self.ends.step, torch.tensor(list(trees), dtype=torch.int64)
        for side, end in ((0, lower[i]), (1, upper[i])):
            mine = some[self.ends.side[some] == side]
            end[0, self.ends.entry[mine]] = self.ends.level[mine].to(end)
        return Frame(lower, upper, torch.zeros_like(bounds.infeasible))

    def lemmas_of(self, trees: Sequence[int]) -> list[Lemma]:
        """What some finished trees prove. The part in front has the same neurons as the whole, by number."""
        ends, same = self.ends, np.arange(int(self.offset[self.ends.step + 1]))
        key = (2 * (self.offset[ends.step] + ends.entry) + ends.side).tolist()
        return [recorded(self, t, key[t], float(ends.level[t]), same, case=self.case) for t in trees]
