"""Search by splitting boxes of inputs: every part gets fresh bounds, and the bounds' planes clip it first.

Where few inputs vary this beats splitting neurons: bounds converge quadratically with the width of the box.

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

from soundly.bounds.batch import Bounder, Frame, Start, plainly
from soundly.verification.forest import BOUND, CLIP, INPUT, REFRESH, TOGETHER, Forest
from soundly.verification.problem import Problem
from soundly.verification.proof import Grown

ROOM = 1e-6
"""A clip leaves this share of the width beyond where it could cut."""
FORGET = 0.9
"""How much of what splits brought counts in the next step."""
WORTH = 0.8
"""A clip is kept where it leaves less than this share of the volume: whoever replays the tree must repeat it."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Boxes: their ends [k, n], tree nodes, cases, open clauses [k, clauses] and the worst bound known; by a split of
    which entry (-1: none) they came about, and what it promised."""

    lower: Tensor
    upper: Tensor
    node: Tensor
    case: Tensor
    open: Tensor
    bound: Tensor
    entry: Tensor
    promise: Tensor

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
        return Parts(*(torch.cat(v) for v in zip(*(p._fields() for p in parts), strict=True)))


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
            torch.full_like(cases, -1), torch.zeros_like(bound),
        )  # fmt: skip
        self.gained, self.promised = torch.zeros(2, problem.lower.shape[1], dtype=torch.float64)
        self.stack = [roots]
        self.proved: list[Parts] = []
        self.subproblems = 0
        self.stuck = False

    def __len__(self) -> int:
        return sum(map(len, self.stack))

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
        return arrays | {"subproblems": np.array(self.subproblems)}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Goes on where a journal left it."""
        self.forest.restore({k.removeprefix("forest."): v for k, v in state.items() if k.startswith("forest.")})
        for name in ("waiting", "proved"):
            found = {k.split(".")[1]: torch.from_numpy(v) for k, v in state.items() if k.startswith(name + ".")}
            parts = Parts(**found) if found else None
            setattr(self, "stack" if name == "waiting" else name, [] if parts is None else [parts])
        self.subproblems = int(state["subproblems"])

    def grown(self, trees: Sequence[int]) -> Grown:
        """Some trees, for a certificate."""
        return Grown(self.forest, trees, np.empty(0, np.int64), np.empty((0, 0), np.float32), {}, {}, {})

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
        lower, upper, still = (
            torch.stack([torch.from_numpy(left[n][k]) for n in leaves.node.tolist()]) for k in range(3)
        )
        rest = torch.zeros(len(leaves), leaves.open.shape[1] - still.shape[1], dtype=torch.bool)
        leaves = replace(leaves, lower=lower, upper=upper, open=torch.cat([still, rest], 1))
        children = self._split(leaves, torch.ones_like(leaves.lower))
        self.stack.append(children)
        return True

    def _treat(self, now: Parts) -> tuple[Parts, Tensor]:
        frame = self.bounder.refresh(now.lower.to(self.bounder.dtype), now.upper.to(self.bounder.dtype))
        owner, row, clause, least, base, a = self._rows(frame, now)
        k, many = now.open.shape
        slack = self.problem.slack[row]
        place = owner * many + clause
        above = torch.isfinite(least) & (least > slack + self.margin)
        done = torch.zeros(k * many, dtype=torch.bool)
        done[place[above]] = True
        done = done.reshape(k, many) | frame.infeasible[:, None]
        still = now.open & ~done

        alive = still.reshape(-1)[place]
        owner, least, base, slack, a, place = (v[alive] for v in (owner, least, base, slack, a, place))
        low, high = now.lower[owner], now.upper[owner]
        points = torch.where(a > 0, low, high)
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

        left = still.any(1)
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
        return self._split(inner, steep[left]), points

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
        # A little room: a box that is clipped to a point could not be split.
        room = ROOM * (high - low)
        cut_high = torch.where(a > 0, low + reach + room, high)
        cut_low = torch.where(a < 0, high + reach - room, low)
        index = place[:, None].expand(-1, n)
        clause_low = now.lower.repeat_interleave(many, 0).scatter_reduce(0, index, cut_low, "amax")
        clause_high = now.upper.repeat_interleave(many, 0).scatter_reduce(0, index, cut_high, "amin")
        clause_low, clause_high = clause_low.reshape(k, many, n), clause_high.reshape(k, many, n)
        clipped = still & ~(clause_low > clause_high).any(2)
        hull_low = torch.where(clipped[:, :, None], clause_low, torch.inf).amin(1)
        hull_high = torch.where(clipped[:, :, None], clause_high, -torch.inf).amax(1)
        return clipped, hull_low.maximum(now.lower), hull_high.minimum(now.upper)

    def _split(self, parts: Parts, steep: Tensor) -> Parts:
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
        at = low / 2 + high / 2
        self.stuck |= not bool(((low < at) & (at < high)).all())
        made = self.forest.split(parts.node.numpy(), INPUT, entry[:, 0].numpy(), at[:, 0].numpy())
        both = torch.arange(len(parts)).repeat_interleave(2)
        children = replace(
            parts.pick(both), node=torch.from_numpy(np.ascontiguousarray(made.reshape(-1))), entry=entry[both, 0],
            promise=promise.gather(1, entry)[both, 0],
        )  # fmt: skip
        children.upper[0::2].scatter_(1, entry, at)
        children.lower[1::2].scatter_(1, entry, at)
        return children

    def _rows(self, frame: Frame, now: Parts) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """owner, row, clause, lower bound, the least of the plane below and its coefficients, for every open row."""
        problem, bounder = self.problem, self.bounder
        rows, clauses = (t[now.case] for t in problem.table)
        wanted = (rows >= 0) & now.open.gather(1, clauses.clamp(min=0))
        owner, slot = wanted.nonzero(as_tuple=True)
        row, clause = rows[owner, slot], clauses[owner, slot]
        lines = frame.known
        last = len(bounder.steps) - 1
        bounds, bases = [now.lower.new_empty(0)], [now.lower.new_empty(0)]
        planes = [now.lower.new_empty(0, now.lower.shape[1])]
        for part in bounder.portions(len(owner), width=bounder.room):
            which, who = row[part], owner[part]
            a = {last: problem.rows.y[which].to(bounder.dtype)}
            if problem.rows.reads_inputs:
                a[0] = problem.rows.x[which].to(bounder.dtype)
            start = Start(a, problem.rows.constant[which].to(bounder.dtype), who)
            found = bounder.backward(frame, lines, start)
            least = found.least(frame.lower[0][who], frame.upper[0][who])
            bounds.append(torch.maximum(least, plainly(frame, start)).double())
            bases.append(least.double())
            planes.append(found.a.double())
        return owner, row, clause, torch.cat(bounds), torch.cat(bases), torch.cat(planes)
