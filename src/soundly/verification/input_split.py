"""Search by splitting boxes of inputs: every part gets fresh bounds, and the bounds' planes clip it first.

Where few inputs vary this beats splitting neurons: bounds converge quadratically with the width of the box. Around
jumps they do not: where few entries jump in a box, it is split into what is below and above such a jump instead.

Reference: Wang et al., "Formal Security Analysis of Neural Networks using Symbolic Intervals", 2018 (splitting inputs);
Zhou et al., "Clip-and-Verify", 2025 (clipping).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from soundly.bounds.batch import Bounder, plainly
from soundly.bounds.frame import Frame, Start
from soundly.bounds.program import Affine, Function
from soundly.verification.forest import BOUND, CLIP, INPUT, NEURON, REFRESH, TOGETHER, Forest
from soundly.verification.jumps import Jumps
from soundly.verification.leaf import solve
from soundly.verification.problem import Problem
from soundly.verification.proof import Grown

ROOM = 1e-6
"""A clip leaves this share of the width beyond where it could cut."""
FORGET = 0.9
"""How much of what splits brought counts in the next step."""
WORTH = 0.8
"""A clip is kept where it leaves less than this share of the volume: whoever replays the tree must repeat it."""
CROSSING = 2
"""A box is halved at a jump where at most so many of them, per input that varies, meet it."""
ENDS = 16
"""At most so many linear programs are solved in a step."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Boxes: their ends [k, n], tree nodes, cases, open clauses [k, clauses] and the worst bound known; by a split of
    which entry (-1: none) they came about, and what it promised; the `neuron`s [k, depth] that are held on one side of
    a jump (-1: none), which side that is, and where their intervals end there."""

    lower: Tensor
    upper: Tensor
    node: Tensor
    case: Tensor
    open: Tensor
    bound: Tensor
    entry: Tensor
    promise: Tensor
    neuron: Tensor
    sign: Tensor
    end: Tensor

    def __len__(self) -> int:
        return len(self.node)

    def pick(self, index: Tensor | slice) -> Parts:
        return Parts(*(v[index] for v in self._fields()))

    def _asdict(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _fields(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    @staticmethod
    def join(parts: Sequence[Parts]) -> Parts:
        if len(parts) == 1:
            return parts[0]
        depth = max(p.neuron.shape[1] for p in parts)
        parts = [p.deeper(depth) for p in parts]
        return Parts(*(torch.cat(v) for v in zip(*(p._fields() for p in parts), strict=True)))

    def deeper(self, depth: int) -> Parts:
        """With room for that many sides."""
        extra = depth - self.neuron.shape[1]
        if extra == 0:
            return self
        neuron, sign, end = (
            torch.cat([v, v.new_full((len(v), extra), fill)], 1)
            for v, fill in ((self.neuron, -1), (self.sign, 0), (self.end, 0))
        )
        return replace(self, neuron=neuron, sign=sign, end=end)


class InputSplit:
    """The search; `step` handles one batch of boxes.

    Args:
        cases: which boxes of the problem; all if None.
        margin: by how much rows must exceed their slack here, since the checker knows more about rounding.

    Attributes:
        forest: one tree per case, with all its clauses.
        stack: the boxes that are neither proved nor split.
        proved: the leaves.
        subproblems: how many boxes were bounded.
        betas: of leaves that a linear program closed, its multipliers of the sides above, by node.
        stuck: whether some box was too small to be split.
    """

    def __init__(self, problem: Problem, bounder: Bounder, cases: Tensor | None = None, *, margin: float = 0.0) -> None:
        self.problem, self.bounder, self.margin = problem, bounder, margin
        self.forest = Forest()
        cases = torch.arange(len(problem.lower)) if cases is None else cases
        spans = problem.spans[cases].tolist()
        nodes = [self.forest.plant(c, 0, b - a) for c, (a, b) in zip(cases.tolist(), spans, strict=True)]
        bound = torch.full((len(cases),), -torch.inf, dtype=torch.float64)
        roots = Parts(
            problem.lower[cases], problem.upper[cases], torch.tensor(nodes), cases, problem.open_clauses(cases), bound,
            torch.full_like(cases, -1), torch.zeros_like(bound), cases.new_empty(len(cases), 0),
            bound.new_empty(len(cases), 0), bound.new_empty(len(cases), 0),
        )  # fmt: skip
        self.jumps = Jumps(problem.program.steps)
        self.gained, self.promised = torch.zeros(2, problem.lower.shape[1], dtype=torch.float64)
        self.stack = [roots]
        self.proved: list[Parts] = []
        self.subproblems = 0
        self.stuck = False
        self.betas: dict[int, npt.NDArray[np.float64]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.stack))

    def whole(self, case: int) -> Frame:
        """Intervals over the whole box of a case."""
        ends = (v[case : case + 1].to(self.bounder.dtype) for v in (self.problem.lower, self.problem.upper))
        return self.bounder.refresh(*ends)

    @property
    def waiting(self) -> Parts:
        """The boxes that are neither proved nor split; at least one."""
        return Parts.join(self.stack)

    @property
    def open_share(self) -> float:
        """Which share of the volume waits, the mean over cases."""
        if not self.stack:
            return 0.0
        now = self.waiting
        whole = (self.problem.upper - self.problem.lower)[now.case]
        shares = torch.where(whole > 0, (now.upper - now.lower) / whole, 1.0).prod(-1)
        return min(1.0, float(shares.sum()) / len(self.forest.root))

    @property
    def bound(self) -> float:
        """The worst bound among the boxes that wait."""
        return float(self.waiting.bound.min()) if len(self) else 0.0

    def step(self, batch: int) -> Tensor:
        """Bounds the boxes on top, drops what is proved, splits the rest; returns points where bounds are worst.

        Depth first, the worst of a batch first: what waits stays little.
        """
        taken = [self.stack.pop()]
        while self.stack and sum(map(len, taken)) < batch:
            taken.append(self.stack.pop())
        now = Parts.join(taken)
        if len(now) > batch:
            self.stack.append(now.pick(slice(batch, None)))
            now = now.pick(slice(None, batch))
        try:
            left, points = self._treat(now)
        except BaseException:  # a limit or Ctrl-C: nothing was recorded
            self.stack.append(now)
            raise
        self.subproblems += len(now)
        if len(left):
            self.stack.append(left.pick(left.bound.argsort()))
        return points

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What a journal keeps."""
        arrays = {f"forest.{k}": v for k, v in self.forest.state().items()}
        for name, parts in (("waiting", self.stack), ("proved", self.proved)):
            for field, value in Parts.join(parts)._asdict().items() if parts else ():
                arrays[f"{name}.{field}"] = value.numpy()
        betas = {
            "nodes": np.array(list(self.betas), dtype=np.int64),
            "counts": np.array([len(v) for v in self.betas.values()], dtype=np.int64),
            "values": np.concatenate([np.empty(0), *self.betas.values()]),
        }
        arrays |= {f"betas.{k}": v for k, v in betas.items()}
        return arrays | {"subproblems": np.array(self.subproblems)}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Goes on where a journal left it."""
        self.forest.restore({k.removeprefix("forest."): v for k, v in state.items() if k.startswith("forest.")})
        for name in ("waiting", "proved"):
            found = {k.split(".")[1]: torch.from_numpy(v) for k, v in state.items() if k.startswith(name + ".")}
            parts = Parts(**found) if found else None
            setattr(self, "stack" if name == "waiting" else name, [] if parts is None else [parts])
        values = np.split(state["betas.values"], np.cumsum(state["betas.counts"])[:-1])
        self.betas = dict(zip(state["betas.nodes"].tolist(), values, strict=False))
        self.subproblems = int(state["subproblems"])

    def grown(self, trees: Sequence[int]) -> Grown:
        """Some trees, for a certificate."""
        return Grown(self.forest, trees, np.empty(0, np.int64), np.empty((0, 0), np.float32), {}, self.betas, {}, {})

    def reopen(self, left: Mapping[int, tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]]) -> bool:
        """Splits leaves that were proved but whose proof was not accepted; whether there are any among these.

        Args:
            left: by node, the box and the clauses that the checker is left with: it clips a little differently.
        """
        if not self.proved:
            return False
        leaves = Parts.join(self.proved)
        again = torch.isin(leaves.node, torch.tensor(list(left)))
        if not bool(again.any()):
            return False
        self.proved = [leaves.pick(~again)]
        leaves = leaves.pick(again)
        self._notice_points(leaves)
        lower, upper, still = (
            torch.stack([torch.from_numpy(left[n][k]) for n in leaves.node.tolist()]) for k in range(3)
        )
        rest = torch.zeros(len(leaves), leaves.open.shape[1] - still.shape[1], dtype=torch.bool)
        leaves = replace(leaves, lower=lower, upper=upper, open=torch.cat([still, rest], 1))
        for node in leaves.node.tolist():
            self.betas.pop(node, None)
        children = self._halved(leaves, torch.ones_like(leaves.lower))
        self.stack.append(children)
        return True

    def _notice_points(self, open: Parts) -> None:
        """Boxes of a grid that were points when they were bounded are too small to be split."""
        if self.problem.grid is not None:
            self.stuck |= bool((open.lower == open.upper).all(1).any())

    def _treat(self, now: Parts) -> tuple[Parts, Tensor]:
        dtype = self.bounder.dtype
        lower, upper = self.problem.narrowed(now.lower, now.upper)
        now = replace(now, lower=lower, upper=upper)
        held = self.jumps.intervals(now.neuron, now.sign, now.end, dtype)
        frame = self.bounder.refresh(now.lower.to(dtype), now.upper.to(dtype), inherited=held)
        owner, row, clause, least, base, a, points, loss = self._rows(frame, now)
        k, many = now.open.shape
        slack = self.problem.slack[row]
        place = owner * many + clause
        above = torch.isfinite(least) & (least > slack + self.margin)
        done = torch.zeros(k * many, dtype=torch.bool)
        done[place[above]] = True
        done = done.reshape(k, many) | frame.infeasible[:, None]
        still = now.open & ~done

        alive = still.reshape(-1)[place]
        owner, row, least, base, slack, a, points, loss, place = (
            v[alive] for v in (owner, row, least, base, slack, a, points, loss, place)
        )
        # A clause is as far from being refuted as its best row, a box as its worst clause.
        reached = torch.full((k * many,), -torch.inf, dtype=a.dtype).scatter_reduce(0, place, least, "amax")
        best = least >= reached[place]
        worst = torch.full((k,), torch.inf, dtype=a.dtype).scatter_reduce(0, owner, reached[place], "amin")
        points = points[best & (least <= worst[owner])]
        self._learn(now, worst)
        clipped, hull_low, hull_high = self._clipped(now, still, owner, place, (slack - base)[:, None] / a, a)
        width = now.upper - now.lower
        share = torch.where(width > 0, (hull_high - hull_low) / width, 1.0).prod(-1)
        use = still.any(1) & ((share < WORTH) | ~clipped.any(1))
        still = torch.where(use[:, None], clipped, still)
        lower = torch.where(use[:, None], hull_low, now.lower)
        upper = torch.where(use[:, None], hull_high, now.upper)
        lower, upper = self.problem.narrowed(lower, upper)

        left = still.any(1) & (lower <= upper).all(1)
        self._notice_points(now.pick(left))
        if now.neuron.shape[1]:
            bad = best & (least <= worst[owner])
            closed, found = self._finished(now, frame, still, owner[bad], row[bad])
            left, use = left & ~closed, use & ~closed
            points = torch.cat([points, *found])
        told = ~left | use | done.any(1)  # leaves, and inner nodes that found something
        what = REFRESH | BOUND | (TOGETHER if frame.factors is not None else 0)
        flags = torch.where(told, torch.where(use, what | CLIP, what), 0)
        self.forest.flags[now.node.numpy()] = flags.numpy()
        if not bool(left.all()):
            self.proved.append(now.pick(~left))
        steep = torch.zeros(k, a.shape[1], dtype=a.dtype).scatter_reduce(
            0, owner[best, None].expand(-1, a.shape[1]), a[best].abs(), "amax"
        )
        inner = replace(now, lower=lower, upper=upper, open=still, bound=torch.maximum(now.bound, worst)).pick(left)
        lost = torch.zeros(k, len(self.jumps), dtype=loss.dtype).scatter_reduce(
            0, owner[best, None].expand(-1, len(self.jumps)), loss[best], "amax"
        )
        return self._split(inner, steep[left], torch.where(self.jumps.crossed(frame), lost, -1.0)[left]), points

    def _finished(
        self, now: Parts, frame: Frame, still: Tensor, owner: Tensor, row: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Where nothing is bent any more on the sides that are held, a linear program tells whether the worst of the
        rows holds: which boxes are done, and counterexamples."""
        closed, points = torch.zeros(len(now), dtype=torch.bool), []
        ready = self.bounder.straight(frame) & (now.neuron >= 0).any(1) & still.any(1)
        for i in ready.nonzero()[:ENDS, 0].tolist():
            splits = self.jumps.splits(now.neuron[i], now.sign[i], now.end[i], self.bounder.dtype)
            if not all(isinstance(self.bounder.steps[s], (Affine, Function)) for s in splits):
                continue
            which = row[owner == i][:1]
            goal = float(self.problem.slack[which]) + self.margin
            leaf = solve(self.bounder, frame.pick(torch.tensor([i])), self._start(which), splits, goal)
            if leaf is None:
                continue
            if leaf.bound > goal and (leaf.point is None or int(still[i].sum()) == 1):
                closed[i] = True
                self.betas[int(now.node[i])] = self.jumps.multipliers(now.neuron[i], leaf.multipliers)
            elif leaf.point is not None:
                points.append(leaf.point[None].double())
        return closed, points

    def _start(self, row: Tensor, owner: Tensor | None = None) -> Start:
        rows, bounder = self.problem.rows, self.bounder
        a = {len(bounder.steps) - 1: rows.y[row].to(bounder.dtype)}
        if rows.reads_inputs:
            a[0] = rows.x[row].to(bounder.dtype)
        return Start(a, rows.constant[row].to(bounder.dtype), owner)

    def _learn(self, now: Parts, worst: Tensor) -> None:
        """Remembers what the splits behind these boxes brought: the share of the parent's bound that is gone."""
        known = (now.entry >= 0) & torch.isfinite(now.bound) & (now.bound < 0)
        before, entry = now.bound[known], now.entry[known]
        share = ((worst[known].clamp(max=0) - before) / -before).clamp(0, 1)
        self.gained = (FORGET * self.gained).index_add(0, entry, share)
        self.promised = (FORGET * self.promised).index_add(0, entry, now.promise[known])

    def _clipped(
        self, now: Parts, still: Tensor, owner: Tensor, place: Tensor, reach: Tensor, a: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which clauses still have points, and the smallest box around the points of all of them.

        A counterexample satisfies every row of its clause, so from <a, x> + d <= slack each entry lies within `reach`
        of the end where the row is least.
        """
        k, many = still.shape
        n = a.shape[1]
        low, high = now.lower[owner], now.upper[owner]
        cut_low, cut_high = _cut(low, high, reach, a)
        index = place[:, None].expand(-1, n)
        clause_low = now.lower.repeat_interleave(many, 0).scatter_reduce(0, index, cut_low, "amax")
        clause_high = now.upper.repeat_interleave(many, 0).scatter_reduce(0, index, cut_high, "amin")
        clause_low, clause_high = clause_low.reshape(k, many, n), clause_high.reshape(k, many, n)
        clipped = still & ~(clause_low > clause_high).any(2)
        hull_low = torch.where(clipped[:, :, None], clause_low, torch.inf).amin(1)
        hull_high = torch.where(clipped[:, :, None], clause_high, -torch.inf).amax(1)
        return clipped, hull_low.maximum(now.lower), hull_high.minimum(now.upper)

    def _split(self, parts: Parts, steep: Tensor, lost: Tensor) -> Parts:
        """Halves each box, or holds an entry on either side of its jump: that with the largest of `lost` (where it
        jumps in the box; below 0 elsewhere), if few jump there."""
        crossing = (lost >= 0).sum(1)
        few = (crossing > 0) & (crossing <= CROSSING * (parts.lower < parts.upper).sum(1))
        if not bool(few.any()):
            return self._halved(parts, steep)
        held = self._held(parts.pick(few), lost[few].argmax(1))
        return Parts.join([held, self._halved(parts.pick(~few), steep[~few])])

    def _held(self, parts: Parts, candidate: Tensor) -> Parts:
        """Each box twice, with an entry below its jump and above it; where the entry is affine in the input, its plane
        cuts the box."""
        neuron, at = self.jumps.neuron[candidate], self.jumps.at[candidate]
        made = self.forest.split(parts.node.numpy(), NEURON, neuron.numpy(), at.numpy())
        both = torch.arange(len(parts)).repeat_interleave(2)
        sign = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(len(parts))
        depth = parts.neuron.shape[1]
        wide = parts.pick(both).deeper(depth + 1)
        wide.neuron[:, depth], wide.sign[:, depth] = neuron[both], sign
        wide.end[:, depth] = self.jumps.end(at[both], sign, self.bounder.dtype)
        a, d = self.jumps.planes(neuron[both])
        a, d = -sign[:, None] * a, sign * (at[both] - d)  # on its side a x + d <= 0
        least = d + torch.where(a > 0, a * wide.lower, a * wide.upper).sum(1)
        low, high = _cut(wide.lower, wide.upper, -least[:, None] / a, a)
        full = (low <= high).all(1, keepdim=True)  # a side without points: its bounds will tell
        return replace(
            wide, node=torch.from_numpy(np.ascontiguousarray(made.reshape(-1))), entry=torch.full_like(wide.node, -1),
            promise=torch.zeros_like(wide.promise), lower=torch.where(full, low, wide.lower),
            upper=torch.where(full, high, wide.upper),
        )  # fmt: skip

    def _halved(self, parts: Parts, steep: Tensor) -> Parts:
        """Halves each box in one entry. The more the rows' planes change along an entry and the wider it is, the more
        a split promises; the splits so far tell how far to trust that, entry by entry."""
        width = parts.upper - parts.lower
        steep = steep.maximum(1e-3 * steep.amax(1, keepdim=True) + 1e-30)
        promise = steep.sqrt() * width
        promise = promise / promise.amax(1, keepdim=True).clamp(min=1e-300)
        kept = (self.gained + 0.5) / (self.promised + 0.5)
        kept = torch.where(self.promised > 0, kept, (self.gained.sum() + 0.5) / (self.promised.sum() + 0.5))
        entry = (promise * kept).argmax(1, keepdim=True)
        low, high = parts.lower.gather(1, entry), parts.upper.gather(1, entry)
        at, point = low / 2 + high / 2, torch.zeros_like(low, dtype=torch.bool)
        if self.problem.grid is not None:
            at, point = self.problem.grid.between(entry[:, 0], at[:, 0])[:, None], low == high
        self.stuck |= not bool((point | ((low < at) & (at < high))).all())
        # Beyond a point: one child is the point once more, to be bounded as such, and the other one is empty.
        at = torch.where(point, torch.nextafter(high, torch.full_like(high, torch.inf)), at)
        made = self.forest.split(parts.node.numpy(), INPUT, entry[:, 0].numpy(), at[:, 0].numpy())
        both = torch.arange(len(parts)).repeat_interleave(2)
        children = replace(
            parts.pick(both), node=torch.from_numpy(np.ascontiguousarray(made.reshape(-1))), entry=entry[both, 0],
            promise=promise.gather(1, entry)[both, 0],
        )  # fmt: skip
        children.upper[0::2].scatter_(1, entry, at)
        children.lower[1::2].scatter_(1, entry, at)
        return children

    def _rows(self, frame: Frame, now: Parts) -> tuple[Tensor, ...]:
        """owner, row, clause, lower bound, the least of the plane below over the box and its coefficients, where it is
        least, and what jumps cost, for every open row."""
        problem, bounder = self.problem, self.bounder
        rows, clauses = (t[now.case] for t in problem.table)
        wanted = (rows >= 0) & now.open.gather(1, clauses.clamp(min=0))
        owner, slot = wanted.nonzero(as_tuple=True)
        row, clause = rows[owner, slot], clauses[owner, slot]
        lines = frame.known
        bounds, bases = [now.lower.new_empty(0)], [now.lower.new_empty(0)]
        planes, points = ([now.lower.new_empty(0, now.lower.shape[1])] for _ in range(2))
        losses = [now.lower.new_empty(0, len(self.jumps))]
        for part in bounder.portions(len(owner), width=bounder.room):
            which, who = row[part], owner[part]
            start = self._start(which, who)
            found = bounder.backward(frame, lines, start, keep=len(self.jumps) > 0)
            box = frame.lower[0][who], frame.upper[0][who]
            base = least = replace(found, ball=None).least(*box)
            if found.ball is not None:
                least = torch.maximum(base, found.least(*box))
            bounds.append(torch.maximum(least, plainly(frame, start)).double())
            bases.append(base.double())
            planes.append(found.a.double())
            points.append(found.lowest(now.lower[who], now.upper[who]))
            losses.append(self.jumps.losses(lines, found, who).double())
        least, base, a, at, loss = (torch.cat(v) for v in (bounds, bases, planes, points, losses))
        return owner, row, clause, least, base, a, at, loss


def _cut(low: Tensor, high: Tensor, reach: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of boxes where each entry lies within `reach` of the end where a row with coefficients a is least.

    With a little room: a box that is clipped to a point could not be split.
    """
    room = ROOM * (high - low)
    return (
        torch.where(a < 0, (high + reach - room).maximum(low), low),
        torch.where(a > 0, (low + reach + room).minimum(high), high),
    )
