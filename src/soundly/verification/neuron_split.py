"""Search by splitting inner values: ReLUs at zero, other functions at a point of their interval.

A part of the region is described by constraints v_i >= p or v_i <= p. They clamp the values' intervals, and enter the
rows with multipliers that are optimised together with the slopes of the lines; both by closed-form gradients, without
an autograd tape. Intervals of inner values are those of the root.

Reference: Wang et al., "Beta-CROWN", NeurIPS 2021; De Palma et al., "Improved Branch and Bound", 2021 (filtered
branching).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from soundly.bounds.batch import Bounder, copied, plainly
from soundly.bounds.conditional import ROUNDS, Tightened, tighten
from soundly.bounds.frame import Frame, Pass, Side, Slopes, Split, Start
from soundly.bounds.lines import kink
from soundly.bounds.optimise import Refined, raised
from soundly.bounds.optimise import first as first_slopes
from soundly.bounds.program import Function, Step
from soundly.verification.branching import candidates
from soundly.verification.decided import Decided
from soundly.verification.forest import BOUND, LEAF, NEURON, SUMMED, Forest
from soundly.verification.leaf import solve
from soundly.verification.neuron_parts import Neurons, Parts, Slots
from soundly.verification.problem import Problem
from soundly.verification.proof import Grown, Lemma
from soundly.verification.tightening import Bounds, bounds_found

CANDIDATES = 3
"""How many neurons each of the two scores proposes; all of them are tried."""
GAIN, YIELD, TURN = 0.05, 0.02, 1e10
"""Intervals are tightened again if that brought this share of what a bound lacks; those of a step are left alone for a
while, longer each time, if of its intervals a smaller share became tighter; up to how many products that may take."""
PASSES = 20
"""Roughly how many passes a subproblem takes."""


class NeuronSplit:
    """The search over one box; `step` handles one batch. The bounder is of the problem's program and, as a last step,
    the rows of the case (`with_rows`).

    Attributes:
        forest: one tree per clause.
        root: the intervals at the root, a batch of one, of what is decided the decided halves.
        decided: neurons whose sign the rows of every clause settle: split before the search begins.
    """

    def __init__(
        self,
        problem: Problem,
        bounder: Bounder,
        case: int,
        root: Frame,
        clauses: Sequence[int],
        *,
        margin: float,
        refined: Mapping[int, Refined] | None = None,
        lemmas: Sequence[Lemma] = (),
        decided: Decided | None = None,
    ) -> None:
        self.problem, self.bounder, self.case, self.root, self.margin = problem, bounder, case, root, margin
        self.refined, self.lemmas, self.decided = refined or {}, lemmas, decided
        self.steps = bounder.steps
        self.dtype = root.lower[0].dtype
        self.forest = Forest()
        self.neurons, self.slots = Neurons(self.steps), Slots.of(bounder, root)
        self.offset = self.neurons.offset
        self.rows = self._best_rows(clauses)
        loose = {i: bounder.loose(i, root)[0].nonzero()[:, 0] for i in range(len(self.steps)) if bounder.read[i]}
        self.loose = {i: entry for i, entry in loose.items() if len(entry) and copied(self.steps[i]) is None}
        self.low, self.high = (torch.cat([v[i][0, e] for i, e in self.loose.items()])[None] if self.loose else
                               torch.empty(1, 0, dtype=self.dtype) for v in (root.lower, root.upper))  # fmt: skip
        self.tightened: list[Bounds] = []
        self.pauses = dict.fromkeys(self.loose, (0, 1))
        self.squeezing = False
        self.waiting = self.roots = self._plant(clauses)
        self.begins = dict(enumerate(self.roots.node.tolist()))
        self.proved: list[Parts] = []
        self.subproblems = 0
        self.stuck: list[Parts] = []
        self.refused: set[int] = set()

    # ---------------------------------------------------------------- the root

    def _best_rows(self, clauses: Sequence[int]) -> Tensor:
        """For each clause the row that is most nearly proved at the root."""
        rows, clause = (t[self.case] for t in self.problem.table)
        lines = self.bounder.lines(self.root)
        chosen = []
        for k in clauses:
            own = rows[(clause == k) & (rows >= 0)]
            if self.decided is not None:  # what the other rows say has multipliers of its own
                other = own[~self.decided.rows[own - self.problem.row_spans[self.case, 0]]]
                own = other if len(other) else own
            if len(own) > 1:
                start = self._start(own)
                found = self.bounder.backward(self.root, lines, Start(start.a, start.d, None))
                least = torch.maximum(found.least(self.root.lower[0], self.root.upper[0]), plainly(self.root, start))
                own = own[least.argmax()][None]
            chosen.append(own)
        return torch.cat(chosen)

    def _start(self, rows: Tensor) -> Start:
        problem = self.problem
        a = {len(problem.program.steps) - 1: problem.rows.y[rows].to(self.dtype)}
        if problem.rows.reads_inputs:
            a[0] = problem.rows.x[rows].to(self.dtype)
        return Start(a, problem.rows.constant[rows].to(self.dtype))

    def _plant(self, clauses: Sequence[int]) -> Parts:
        nodes = [self.forest.plant(self.case, k, k + 1) for k in clauses]
        n = len(nodes)
        neuron = sign = torch.empty(0, dtype=torch.int64)
        if self.decided is not None:
            neuron, sign = self.decided.numbered(self.offset)
        for what, side in zip(neuron.tolist(), sign.tolist(), strict=True):
            made = self.forest.split(np.array(nodes), NEURON, np.full(n, what), np.zeros(n))
            nodes = made[:, int(side > 0)].tolist()
        slopes = self.slots.flat(
            first_slopes(self.bounder, self.root), torch.zeros(n, self.slots.count, dtype=self.dtype)
        )
        start, none = self._start(self.rows), torch.zeros(n, len(neuron), dtype=self.dtype)
        beta = none if self.decided is None else self.decided.force(self.bounder, start)
        return Parts(
            neuron.repeat(n, 1), none + sign.to(self.dtype), none, beta, slopes, torch.tensor(list(nodes)),
            torch.arange(n), plainly(self.root, start), torch.zeros(n, dtype=torch.int64),
        )  # fmt: skip

    # ---------------------------------------------------------------- bounding

    def _frame(self, parts: Parts) -> tuple[Frame, dict[int, Split]]:
        """Intervals and constraints of some subproblems."""
        k = len(parts)
        lower, upper = list(self.root.lower), list(self.root.upper)
        if bool(parts.ends.any()):
            begin = 0
            for i, entry in self.loose.items():
                span = slice(begin, begin + len(entry))
                begin += len(entry)
                lower[i], upper[i] = lower[i].repeat(k, 1), upper[i].repeat(k, 1)
                lower[i][:, entry], upper[i][:, entry] = self.low[parts.ends, span], self.high[parts.ends, span]
        return self.neurons.held(parts, lower, upper)

    def _slopes(self, parts: Parts) -> dict[Side, Tensor]:
        return self.slots.dense(parts.slopes, self.steps)

    def _bound(self, parts: Parts, *, keep: bool = False) -> tuple[Tensor, Pass, Frame, dict[int, Split]]:
        frame, splits = self._frame(parts)
        lines = self.bounder.lines(frame, self._slopes(parts))
        start = self._start(self.rows[parts.tree])
        found = self.bounder.backward(frame, lines, start, splits=splits, keep=keep)
        least = found.least(frame.lower[0], frame.upper[0])
        return torch.where(frame.infeasible, math.inf, least), found, frame, splits

    def optimise(self, parts: Parts, rounds: int, *, rate: float = 0.1, beyond: float = 0.0) -> Parts:
        """Raises the bounds by better slopes and multipliers, until they are that far beyond their goals."""
        if len(parts) == 0:
            return parts
        frame, splits = self._frame(parts)
        start = self._start(self.rows[parts.tree])
        found = raised(
            self.bounder, frame, start, self._slopes(parts), rounds=rounds, goal=self._goal(parts) + beyond,
            splits=splits, rate=rate,
        )  # fmt: skip
        self.subproblems += len(parts)
        bound = torch.where(frame.infeasible, math.inf, found.bound)
        return self._updated(parts, found.slopes, found.multipliers, bound)

    def _updated(self, parts: Parts, slopes: Slopes, force: Mapping[int, Tensor], bound: Tensor) -> Parts:
        flat, beta = self.slots.flat(slopes, parts.slopes), self.neurons.multipliers(parts, force)
        return replace(parts, beta=beta, slopes=flat, bound=torch.maximum(parts.bound, bound))

    # ---------------------------------------------------------------- intervals of possible counterexamples

    def _squeezed(self, parts: Parts, rounds: int) -> Parts:
        """Tightens intervals and bounds in turn, as long as that brings enough."""
        finished, turn = [], 0
        before = torch.full_like(parts.bound, math.inf)
        while len(parts):
            lack = self._goal(parts) - parts.bound
            # What remains of the lack before is little enough, and not yet nothing.
            more = torch.isfinite(lack) & (lack >= 0) & (lack <= (1 - GAIN) * before)
            finished.append(parts.pick(~more))
            parts, before = parts.pick(more), lack[more]
            if len(parts):
                found = [self._tightened(p, turn) for p in _portions(parts, self.bounder)]
                parts = self._improved(Parts.join(found), rounds)
            turn += 1
        return Parts.join(finished) if finished else parts

    def _tightened(self, parts: Parts, turn: int) -> Parts:
        """With intervals that hold for counterexamples."""
        problem, k, last = self.problem, len(parts), len(self.steps) - 1
        frame, splits = self._frame(parts)
        frame = Frame([v.expand(k, -1) for v in frame.lower], [v.expand(k, -1) for v in frame.upper], frame.infeasible)
        first, beyond = problem.row_spans[self.case].tolist()
        clause = problem.rows.clause[first:beyond] - problem.spans[self.case, 0]
        own = clause == torch.tensor(self.forest.first)[parts.tree][:, None]
        slack = problem.slack[first:beyond].to(self.dtype).expand(k, -1)
        unit = torch.zeros_like(slack).scatter_(1, (self.rows[parts.tree] - first)[:, None], 1.0)
        splits = splits | {last: Split(-own.to(self.dtype), slack, unit)}
        start = self._start(self.rows[parts.tree])
        now = [i for i, (pause, _) in self.pauses.items() if pause == 0]
        worth = dict.fromkeys(now, 0.0)
        for found in tighten(self.bounder, frame, start, self._slopes(parts), splits, now):
            worth[found.step] += len(found.entry) - YIELD * found.tried
            if len(found.entry):
                self.tightened.append(self._recorded(parts.pick(found.owner), found, own, turn))
        for i, (pause, length) in self.pauses.items():
            if pause:
                self.pauses[i] = pause - 1, length
            else:
                self.pauses[i] = (0, 1) if worth[i] >= 0 else (length, 2 * length)
        low, high = (torch.cat([v[i][:, e] for i, e in self.loose.items()], 1) for v in (frame.lower, frame.upper))
        ends = len(self.low) + torch.arange(k)
        self.low, self.high = torch.cat([self.low, low]), torch.cat([self.high, high])
        bound = torch.where(frame.infeasible, math.inf, parts.bound)
        return replace(parts, ends=ends, bound=bound)

    def _recorded(self, parts: Parts, found: Tightened, own: Tensor, turn: int) -> Bounds:
        """For the certificate; one part for each bound."""
        slopes = self.slots.flat(found.slopes, torch.zeros(len(parts), self.slots.count))
        parts = self._updated(replace(parts, beta=torch.zeros_like(parts.beta)), {}, found.multipliers, parts.bound)
        key = 2 * (self.offset[found.step] + found.entry) + found.side
        force = found.multipliers[len(self.steps) - 1]
        return bounds_found(parts.node, turn, key, slopes, (own[found.owner], force), (parts.neuron >= 0, parts.beta))

    def _goal(self, parts: Parts) -> Tensor:
        return self.problem.slack[self.rows[parts.tree]].to(self.dtype) + self.margin

    # ---------------------------------------------------------------- branching

    def _branched(self, parts: Parts) -> tuple[Parts, Tensor, Tensor]:
        """Both children of the best split of each subproblem, [2k] in turn; who could not be split; worst points."""
        _, found, frame, _ = self._bound(parts, keep=True)
        lines = self.bounder.lines(frame, self._slopes(parts))
        x = found.lowest(frame.lower[0], frame.upper[0])
        neurons, points, scores, force = candidates(self.bounder, frame, lines, found, x, self.offset)
        k = len(parts)
        if len(neurons) == 0:
            return parts.pick(slice(0, 0)), torch.ones(k, dtype=torch.bool), x
        take = min(CANDIDATES, len(neurons))
        chosen = torch.cat([s.topk(take, 1).indices for s in scores], 1)
        valid = scores.amax(0).gather(1, chosen) >= 0
        stuck = ~valid.any(1)
        width = chosen.shape[1]
        many = torch.arange(k).repeat_interleave(2 * width)
        wide = parts.pick(many)
        neuron = neurons[chosen].repeat_interleave(2, 1).reshape(-1, 1)
        at = points.gather(1, chosen).repeat_interleave(2, 1).reshape(-1, 1)
        sign = torch.tensor([-1.0, 1.0], dtype=self.dtype).repeat(k * width)[:, None]
        beta = torch.stack([f.gather(1, chosen) for f in force], 2).reshape(-1, 1)
        trial = wide.extended(neuron, sign, at, beta)
        least = torch.cat([self._bound(trial.pick(part))[0] for part in self.bounder.portions(len(trial))])
        least = torch.maximum(least, trial.bound).reshape(k, width, 2)
        goal = self._goal(parts)[:, None, None]
        value = least.minimum(goal)
        merit = torch.where(valid, value.amin(2) + 1e-3 * value.amax(2), -math.inf)
        best = merit.argmax(1)
        index = ((torch.arange(k) * width + best)[:, None] * 2 + torch.arange(2)).reshape(-1)
        children = trial.pick(index)
        bound = least.reshape(-1)[index]
        keep = (~stuck).repeat_interleave(2)
        children = replace(children, bound=bound).pick(keep)
        self.subproblems += len(index)
        return children, stuck, x

    def _urgent(self, batch: int) -> Tensor:
        """Which subproblems come next: where the bound is worst."""
        return self.waiting.bound.topk(batch, largest=False, sorted=False).indices

    def step(self, batch: int, rounds: int) -> Tensor:
        """Splits the worst subproblems; returns points where their bounds are worst."""
        if len(self.waiting) > batch:
            worst = self._urgent(batch)
            rest = torch.ones(len(self.waiting), dtype=torch.bool)
            rest[worst] = False
            now, later = self.waiting.pick(worst), self.waiting.pick(rest)
        else:
            now, later = self.waiting, None
        children, stuck, x = self._branched(now)
        for i in stuck.nonzero()[:, 0].tolist():
            x[i] = self._settle(now.pick(slice(i, i + 1)), x[i])
        parents = now.pick(~stuck)
        if len(parents):
            first = children.neuron.shape[1] - 1
            made = self.forest.split(
                parents.node.numpy(), NEURON, children.neuron[0::2, first].numpy(),
                children.at[0::2, first].double().numpy(),
            )  # fmt: skip
            children = replace(children, node=torch.from_numpy(made.reshape(-1)))
        self.waiting = later if later is not None else children.pick(slice(0, 0))
        children = self._improved(children, rounds)
        self._keep(self._squeezed(children, rounds) if self.squeezing else children)
        return x

    def _settle(self, part: Parts, x: Tensor) -> Tensor:
        """Decides one subproblem without anything left to split, as a linear program; the point where it is worst."""
        frame, splits = self._frame(part)
        bent_somewhere = any(bool(self.bounder.loose(i, frame).any()) for i in range(len(self.steps)))
        leaf = None
        if splits and not bent_somewhere and int(part.node) not in self.refused:
            leaf = solve(self.bounder, frame, self._start(self.rows[part.tree]), splits)
        if leaf is None:
            self.stuck.append(part)
            return x
        part = self._updated(part, self._slopes(part), leaf.multipliers, part.bound.new_tensor([leaf.bound]))
        if leaf.bound > float(self._goal(part)):
            self.forest.flags[part.node.numpy()] |= BOUND
            self.proved.append(part)
        else:
            self.stuck.append(part)
        return x if leaf.point is None else leaf.point.to(x)

    def begin(self, rounds: int) -> None:
        """Bounds the roots. Where relaxations are sampled, as far as they go: a checker's bounds differ a little, and
        to check a root again costs far more than to bound it well."""
        now, self.waiting = self.waiting, self.waiting.pick(slice(0, 0))
        exact = all(piecewise(self.steps[j]) for j, _ in self.slots.entries)
        self._keep(self._improved(now, rounds, beyond=0.0 if exact else math.inf))
        self.roots = self.waiting

    def grant(self, slopes: Slopes, *, jointly: bool) -> None:
        """Takes the roots for proved, with slopes [roots, n], and perhaps absolute values bounded together."""
        self.forest.flags[self.waiting.node.numpy()] |= SUMMED if jointly else 0
        bound = torch.full_like(self.waiting.bound, math.inf)
        parts, self.waiting = self._updated(self.waiting, slopes, {}, bound), self.waiting.pick(slice(0, 0))
        self._keep(parts)

    @property
    def due(self) -> bool:
        """Whether splits alone have cost as much as it would cost to tighten the roots' intervals, and did not do."""
        passes = 4 * ROUNDS * sum(map(len, self.loose.values()))
        patience = len(self.roots) * passes > PASSES * self.subproblems
        return bool(self.loose) and not (self.squeezing or patience or passes * self.bounder.cost > TURN)

    def squeeze(self, rounds: int) -> None:
        """Begins anew with the trees that are not done, and tightens intervals from now on."""
        left = torch.cat([p.tree for p in (self.waiting, *self.stuck)]).unique()
        roots = self.roots.pick(torch.isin(self.roots.tree, left))
        self.proved = [p.pick(~torch.isin(p.tree, left)) for p in self.proved]
        self.forest.flags[roots.node.numpy()], self.forest.kind[roots.node.numpy()] = 0, LEAF
        self.waiting, self.stuck, self.squeezing = roots.pick(slice(0, 0)), [], True
        self._keep(self._squeezed(roots, rounds))

    def _improved(self, parts: Parts, rounds: int, *, beyond: float = 0.0) -> Parts:
        """Subproblems, optimised where that is still of use."""
        done = parts.bound > self._goal(parts)
        found = [self.optimise(p, rounds, beyond=beyond) for p in _portions(parts.pick(~done), self.bounder)]
        return Parts.join([parts.pick(done), *found])

    def _keep(self, parts: Parts) -> None:
        """Files what is proved, and what is left to do."""
        done = torch.isfinite(parts.bound) & (parts.bound > self._goal(parts)) | (parts.bound == math.inf)
        finished = parts.pick(done)
        if len(finished):
            flags = torch.full((len(finished),), BOUND)
            self.forest.flags[finished.node.numpy()] |= flags.numpy()
            self.proved.append(finished)
        left = parts.pick(~done)
        self.waiting = Parts.join([self.waiting, left]) if len(self.waiting) else left

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What a journal keeps."""
        arrays = {f"forest.{k}": v for k, v in self.forest.state().items()}
        for name, parts in (("waiting", [self.waiting, *self.stuck]), ("proved", self.proved)):
            for field, value in Parts.join(parts)._asdict().items() if parts else ():
                arrays[f"{name}.{field}"] = value.numpy()
        if self.tightened:
            self.tightened = [Bounds.join(self.tightened)]
            arrays |= {f"tightened.{field}": v.numpy() for field, v in self.tightened[0]._asdict().items()}
        arrays |= {"low": self.low.numpy(), "high": self.high.numpy(), "squeezing": np.array(self.squeezing)}
        return arrays | {"subproblems": np.array(self.subproblems)}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Goes on where a journal left it."""
        self.forest.restore({k.removeprefix("forest."): v for k, v in state.items() if k.startswith("forest.")})
        for name in ("waiting", "proved", "tightened"):
            found = {k.split(".")[1]: torch.from_numpy(v) for k, v in state.items() if k.startswith(name + ".")}
            if name == "tightened":
                self.tightened = [Bounds(**found)] if found else []
            elif name == "proved":
                self.proved = [Parts(**found)] if found else []
            elif found:
                self.waiting = Parts(**found)
        self.squeezing = bool(state["squeezing"])
        self.low, self.high = torch.from_numpy(state["low"]), torch.from_numpy(state["high"])
        self.subproblems = int(state["subproblems"])

    def grown(self, trees: Sequence[int]) -> Grown:
        """Some trees, for a certificate."""
        slots = [2 * (self.offset[j] + index) + side for (j, side), index in self.slots.entries.items()]
        slot = torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64)
        leaves = Parts.join(self.proved)
        node = leaves.node.tolist()
        held = (leaves.neuron >= 0).numpy()  # a part that waited among deeper ones has columns without a constraint
        beta = leaves.beta.double().numpy()
        keys, rows = self._root_slopes()
        slopes = [leaves.slopes.float(), rows]
        tightened = {}
        if self.tightened:
            bounds = Bounds.join(self.tightened)
            tightened = bounds.rounds(len(leaves) + len(rows))
            slopes.append(bounds.slopes)
        return Grown(
            self.forest, trees, slot.numpy(), torch.cat(slopes).numpy(),
            {n: k for k, n in enumerate(node)}, {n: beta[k, held[k]] for k, n in enumerate(node)},
            {key: len(leaves) + row for key, row in keys.items()}, tightened, self.lemmas, self.begins,
        )  # fmt: skip

    def _root_slopes(self) -> tuple[dict[int, int], Tensor]:
        """2 * neuron + side of the bounds that the root's intervals were refined with, with their rows of slopes."""
        keys: dict[int, int] = {}
        rows = [torch.empty(0, self.slots.count)]
        count = 0
        for i, r in self.refined.items():
            used, which = r.which.unique(return_inverse=True)
            slot = 2 * (self.offset[i] + r.entry) + r.side
            keys |= dict(zip(slot.tolist(), (which + count).tolist(), strict=True))
            none = torch.zeros(len(used), self.slots.count)
            rows.append(self.slots.flat({side: v[used] for side, v in r.slopes.items()}, none))
            count += len(used)
        return keys, torch.cat(rows)

    def reopen(self, nodes: Iterable[int]) -> bool:
        """Splits leaves that were proved but whose proof was not accepted; whether there are any among these."""
        if not self.proved:
            return False
        leaves = Parts.join(self.proved)
        again = torch.isin(leaves.node, torch.tensor(list(nodes)))
        self.proved = [leaves.pick(~again)]
        self.forest.flags[leaves.node[again].numpy()] = 0
        self.refused.update(nodes)
        bound = torch.full((int(again.sum()),), -math.inf, dtype=self.dtype)
        again_parts = replace(leaves.pick(again), bound=bound)
        self.waiting = Parts.join([self.waiting, again_parts]) if len(self.waiting) else again_parts
        return bool(again.any())

    @property
    def bound(self) -> float:
        """The worst bound among the subproblems that are not proved."""
        left = [float(p.bound.min()) for p in (self.waiting, *self.stuck) if len(p)]
        return min(left, default=0.0)


def piecewise(step: Step) -> bool:
    """Whether a step is linear on both sides of zero."""
    return isinstance(step, Function) and kink(step.op) is not None


def _portions(parts: Parts, bounder: Bounder) -> list[Parts]:
    return [parts.pick(p) for p in bounder.portions(len(parts))]
