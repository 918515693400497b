"""Neurons whose sign a claim's own rows settle.

Where every counterexample has v <= 0 or v >= 0 for an inner value v, because a row of its clause says so, only that
half of v counts: the search begins as if v had been split and the other half were done. The checker sees from the rows
why it is. An activation pattern, given as rows, becomes as many splits that cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soundly.bounds.batch import Bounder, entries
from soundly.bounds.frame import Frame, Start
from soundly.bounds.lines import jumps, kink
from soundly.bounds.program import Affine, Function, Program
from soundly.bounds.relaxation import Lines
from soundly.verification.problem import Problem


@dataclass(frozen=True, eq=False)
class Decided:
    """Entries of steps, with +1 where counterexamples have v >= 0 and -1 where v <= 0: [d] each; and which rows of the
    case [rows] say so and nothing else; and, once a search begins, the intervals of the whole box."""

    step: Tensor
    entry: Tensor
    sign: Tensor
    rows: Tensor
    whole: Frame | None = None

    def numbered(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The neurons [d], numbered through by where each step's begin, and their signs."""
        return offset[self.step] + self.entry, self.sign

    def held(self, bounder: Bounder) -> Frame:
        """The intervals [1, n] where the signs are these."""
        root = self.whole
        assert root is not None
        lower, upper = [v.clone() for v in root.lower], [v.clone() for v in root.upper]
        empty = root.infeasible.clone()
        for i in self.step.unique().tolist():
            mine = self.step == i
            above, below = self.entry[mine & (self.sign > 0)], self.entry[mine & (self.sign < 0)]
            room = 1000 * torch.finfo(lower[i].dtype).eps * (lower[i].abs() + upper[i].abs())
            lower[i][0, above] = lower[i][0, above].clamp(min=0)
            upper[i][0, below] = upper[i][0, below].clamp(max=0)
            empty |= (lower[i] > upper[i] + room).any(1)
            lower[i], upper[i] = torch.minimum(lower[i], upper[i]), torch.maximum(lower[i], upper[i])
        if bool(empty.any()):
            return Frame(lower, upper, empty)
        return bounder.refresh(lower[0], upper[0], inherited=Frame(lower, upper, empty))

    def force(self, bounder: Bounder, rows: Start) -> Tensor:
        """Multipliers [rows, d] of the constraints with which bounds are no worse than those of the whole box."""
        assert self.whole is not None
        lines = bounder.lines(self.whole)
        found = bounder.backward(self.whole, lines, Start(rows.a, rows.d, None), keep=True)
        force = torch.zeros(len(rows.d), len(self.step), dtype=rows.d.dtype)
        for j, step in enumerate(bounder.steps):
            ends = kink(step.op) if isinstance(step, Function) else None
            if not isinstance(step, Function) or ends is None or j not in found.kept:
                continue
            mine, line = self.step == step.source, lines[j]
            assert isinstance(line, Lines)
            entry = self.entry[mine]
            a = found.kept[j][:, entry]
            slope = torch.where(a >= 0, line.slope_low[:, entry], line.slope_high[:, entry])
            force[:, mine] += torch.where(self.sign[mine] > 0, a * (ends[1] - slope), a * (slope - ends[0]))
        return force.clamp(min=0)


def decided(problem: Problem, case: int) -> Decided | None:
    """What every clause of a case settles; None where that is nothing.

    A row w.y <= 0 without constant and slack settles v if it reads one output and that output is a multiple of v. Only
    values count that a function reads, and none where a function jumps at 0: there both halves hold a part of v = 0.
    """
    first, last = problem.row_spans[case].tolist()
    if first == last:
        return None
    rows, clause = problem.rows, problem.rows.clause[first:last]
    clear = (rows.constant[first:last] == 0) & (problem.slack[first:last] == 0)
    if rows.reads_inputs:
        clear &= ~rows.x[first:last].any(1)
    y = rows.y[first:last]
    alone = (clear & ((y != 0).sum(1) == 1)).nonzero()[:, 0]
    if not len(alone):
        return None
    output = y[alone].abs().argmax(1)
    pairs = list(zip(output.tolist(), y[alone, output].sign().long().tolist(), strict=True))
    said: list[set[tuple[int, int]]] = [set() for _ in range(int(clause[-1] - clause[0]) + 1)]
    for pair, c in zip(pairs, (clause[alone] - clause[0]).tolist(), strict=True):
        said[c].add(pair)
    common = sorted(set.intersection(*said))
    if not common:
        return None
    at, factor = torch.tensor(common).unbind(1)
    step, entry, sign = behind(problem.program, at)
    known = sign != 0
    if not bool(known.any()):
        return None
    used = {pair for pair, here in zip(common, known.tolist(), strict=True) if here}
    says = torch.zeros_like(clear)
    says[alone] = torch.tensor([pair in used for pair in pairs])
    return Decided(step[known], entry[known], -(factor * sign)[known], says)


def behind(program: Program, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For outputs [k] the step and entry that each is a multiple of, and the sign of the factor; 0 where it is none."""
    last = program.steps[-1]
    none = torch.zeros_like(output)
    if not isinstance(last, Affine):
        return none, none, none
    readers: dict[int, list[Function]] = {}
    for step in program.steps:
        if isinstance(step, Function):
            readers.setdefault(step.source, []).append(step)
    clear = (last.bias[output] == 0) & (last.weight_error < 0.5)
    if last.bias_error is not None:
        clear &= last.bias_error[output] == 0
    count, where, entry, sign = none.clone(), none.clone(), none.clone(), none.clone()
    for part, source in last.parts:
        weight = entries(part, output, last.bias)
        some = (weight != 0).sum(1)
        count += some
        at = weight.abs().argmax(1)
        smooth = source in readers and not any(0.0 in jumps(f.op) for f in readers[source])
        here = (some == 1) & smooth
        where, entry = torch.where(here, source, where), torch.where(here, at, entry)
        sign = torch.where(here, weight.gather(1, at[:, None])[:, 0].sign().long(), sign)
    return where, entry, torch.where(clear & (count == 1), sign, 0)
