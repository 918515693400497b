"""Search by splitting boxes of inputs: every part gets fresh bounds, and the bounds' planes clip it first.

Where few inputs vary this beats splitting neurons: bounds converge quadratically with the width of the box.

Reference: Wang et al., "Formal Security Analysis of Neural Networks using Symbolic Intervals", 2018 (splitting inputs);
Zhou et al., "Clip-and-Verify", 2025 (clipping).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soundly.bounds.batch import Bounder, Start
from soundly.verification.forest import BOUND, CLIP, INPUT, REFRESH, Forest
from soundly.verification.problem import Problem

BATCH = 512
WORTH = 0.8
"""A clip is kept where it leaves less than this share of the volume: whoever replays the tree must repeat it."""


@dataclass(eq=False)
class Parts:
    """Boxes that wait: their ends [k, n], tree nodes, cases, open clauses [k, clauses] and the bound of the parent."""

    lower: Tensor
    upper: Tensor
    node: Tensor
    case: Tensor
    open: Tensor
    bound: Tensor

    def __len__(self) -> int:
        return len(self.node)

    def pick(self, index: Tensor) -> Parts:
        return Parts(*(v[index] for v in self._fields()))

    def _fields(self) -> tuple[Tensor, ...]:
        return self.lower, self.upper, self.node, self.case, self.open, self.bound

    @staticmethod
    def join(parts: list[Parts]) -> Parts:
        return Parts(*(torch.cat(v) for v in zip(*(p._fields() for p in parts), strict=True)))


class InputSplit:
    """The search; `step` handles one batch of boxes.

    Attributes:
        forest: one tree per case, with all its clauses.
        waiting: the boxes that are neither proved nor split.
    """

    def __init__(self, problem: Problem, bounder: Bounder) -> None:
        self.problem, self.bounder = problem, bounder
        self.dtype = problem.lower.dtype
        self.forest = Forest()
        cases = torch.arange(len(problem.lower))
        spans = problem.spans.tolist()
        nodes = [self.forest.plant(c, 0, last - first) for c, (first, last) in enumerate(spans)]
        bound = torch.full((len(cases),), -torch.inf, dtype=self.dtype)
        self.waiting = Parts(
            problem.lower, problem.upper, torch.tensor(nodes), cases, problem.open_clauses(cases), bound
        )
        self.proved: list[Parts] = []
        self.volume = self._shares(self.waiting.lower, self.waiting.upper, cases)
        self.total = float(self.volume.sum())
        self.subproblems = 0
        self.stuck = 0

    def _shares(self, lower: Tensor, upper: Tensor, case: Tensor) -> Tensor:
        """The parts' shares of their cases' volumes."""
        whole = (self.problem.upper - self.problem.lower)[case]
        return torch.where(whole > 0, (upper - lower) / whole, 1.0).prod(-1)

    @property
    def open_share(self) -> float:
        if not len(self.waiting):
            return 0.0
        return float(self._shares(self.waiting.lower, self.waiting.upper, self.waiting.case).sum()) / self.total

    @property
    def bound(self) -> float:
        """The worst bound among the boxes that wait."""
        return float(self.waiting.bound.min()) if len(self.waiting) else 0.0

    def step(self, batch: int = BATCH) -> Tensor:
        """Bounds the worst boxes, drops what is proved, splits the rest; returns points where the bounds are worst."""
        if len(self.waiting) > batch:
            worst = self.waiting.bound.topk(batch, largest=False, sorted=False).indices
            rest = torch.ones(len(self.waiting), dtype=torch.bool)
            rest[worst] = False
            now, later = self.waiting.pick(worst), self.waiting.pick(rest)
        else:
            now, later = self.waiting, None
        self.subproblems += len(now)
        left, points = self._treat(now)
        self.waiting = left if later is None else Parts.join([later, left])
        return points

    def _treat(self, now: Parts) -> tuple[Parts, Tensor]:
        frame = self.bounder.refresh(now.lower, now.upper)
        owner, row, clause, least, a = self._rows(frame, now)
        k, many = len(now), self.problem.most_clauses
        slack = self.problem.slack[row]
        above = torch.isfinite(least) & (least > slack)
        place = owner * many + clause
        done = torch.zeros(k * many, dtype=torch.bool).index_put_((place[above],), torch.tensor(True)).reshape(k, many)
        done |= frame.infeasible[:, None]
        still = now.open & ~done
        flags = torch.full((k,), REFRESH | BOUND)
        # Clipping: from the box as it is, by all rows of a clause at once; then the hull over clauses.
        alive = still.reshape(-1)[place]
        owner, row, clause, least, a, place = (v[alive] for v in (owner, row, clause, least, a, place))
        low, high = now.lower[owner], now.upper[owner]
        excess = (self.problem.slack[row] - least)[:, None]
        reach = excess / a
        cut_high = torch.where(a > 0, low + reach, high)
        cut_low = torch.where(a < 0, high + reach, low)
        n = a.shape[1]
        clause_low = now.lower.repeat_interleave(many, 0).index_reduce(0, place, cut_low, "amax")
        clause_high = now.upper.repeat_interleave(many, 0).index_reduce(0, place, cut_high, "amin")
        gone = (clause_low > clause_high).any(1).reshape(k, many) & still
        clipped = still & ~gone
        keep = clipped[:, :, None]
        hull_low = torch.where(keep, clause_low.reshape(k, many, n), torch.inf).amin(1)
        hull_high = torch.where(keep, clause_high.reshape(k, many, n), -torch.inf).amax(1)
        width = now.upper - now.lower
        share = torch.where(width > 0, (hull_high - hull_low) / width, 1.0).prod(-1)
        use = still.any(1) & ((share < WORTH) | ~clipped.any(1) | (gone.any(1) & (share < 1)))
        flags[use] |= CLIP
        still = torch.where(use[:, None], clipped, still)
        lower = torch.where(use[:, None], hull_low, now.lower)
        upper = torch.where(use[:, None], hull_high, now.upper)

        open_boxes = still.any(1)
        closed = done.any(1) & open_boxes  # an inner node that proved something
        leaf = ~open_boxes
        self.forest.flags[now.node.numpy()] = torch.where(leaf | use | closed, flags, 0).numpy()
        if bool(leaf.any()):
            self.proved.append(now.pick(leaf))

        # Splitting.
        steep = torch.zeros(k, n, dtype=a.dtype).index_reduce(0, owner, a.abs(), "amax")
        worst = torch.full((k,), torch.inf, dtype=a.dtype).index_reduce(0, owner, least, "amin")
        points = torch.where(a > 0, low, high)[(least <= worst[owner])]
        index = open_boxes.nonzero()[:, 0]
        lower, upper = lower[index], upper[index]
        width = upper - lower
        largest = (problem_width := (self.problem.upper - self.problem.lower)[now.case[index]]).amax(1, keepdim=True)
        floor = 1e-3 * steep[index].amax(1, keepdim=True) + 1e-30
        score = steep[index].maximum(floor) * width
        entry = score.argmax(1)
        del problem_width, largest
        at = (lower.gather(1, entry[:, None]) + upper.gather(1, entry[:, None]))[:, 0] / 2
        fine = (at > lower.gather(1, entry[:, None])[:, 0]) & (at < upper.gather(1, entry[:, None])[:, 0])
        self.stuck += int((~fine).sum())
        children = self.forest.split(now.node[index].numpy(), INPUT, entry.numpy(), at.numpy())
        both = torch.arange(len(index)).repeat_interleave(2)
        child = Parts(
            lower[both], upper[both], torch.from_numpy(children.reshape(-1)), now.case[index][both],
            still[index][both], worst[index][both],
        )  # fmt: skip
        child.upper[0::2].scatter_(1, entry[:, None], at[:, None])
        child.lower[1::2].scatter_(1, entry[:, None], at[:, None])
        return child, points

    def _rows(self, frame: object, now: Parts) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """owner, row, clause, lower bound and input coefficients of every open row of the boxes."""
        from soundly.bounds.batch import Frame

        assert isinstance(frame, Frame)
        problem, bounder = self.problem, self.bounder
        rows, clauses = (t[now.case] for t in problem.table)
        open_rows = (rows >= 0) & now.open.gather(1, clauses.clamp(min=0))
        owner, slot = open_rows.nonzero(as_tuple=True)
        row, clause = rows[owner, slot], clauses[owner, slot]
        lines = bounder.lines(frame)
        last = len(bounder.steps) - 1
        bounds, planes = [], []
        for part in bounder.portions(len(owner)):
            which, who = row[part], owner[part]
            a = {last: problem.rows.y[which]}
            if problem.rows.reads_inputs:
                a[0] = problem.rows.x[which]
            found = bounder.backward(frame, lines, Start(a, problem.rows.constant[which], who))
            bounds.append(found.least(now.lower[who], now.upper[who]))
            planes.append(found.a)
        return owner, row, clause, torch.cat(bounds), torch.cat(planes)
