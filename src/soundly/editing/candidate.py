"""From a program to weights that should satisfy it: solved block by block with margins, rounded as they will be stored.

Nothing here is trusted. A candidate becomes an edit only after the checker has proved every row of its certificate.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from soundly.editing.program import Block, Program
from soundly.editing.solve import least_change

Norm = Literal["l2", "l1", "linf"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """Weights to be proved.

    Attributes:
        weights: [classes, K + 1] in the storage type.
        margins: [rows], the slack that the solver was asked for.
        smallest: whether the solver finished.
    """

    weights: Tensor
    margins: Tensor
    smallest: bool


@dataclass(frozen=True, eq=False)
class Failure:
    """Why there is no candidate; `rows` contradict each other, if it is "infeasible"."""

    status: Literal["infeasible", "limit"]
    reason: str
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Search:
    """What the change should be like, and until when to look for it.

    Attributes:
        dtype: the type the layer is stored in.
        norm: what is minimised, for each block by itself.
        bound: no weight changes by more than this.
        retain: [r, K + 1] features whose outputs should change little (norm "l2" only).
        retain_weight: how much that counts.
        deadline: value of `time.perf_counter()`.
    """

    dtype: torch.dtype
    norm: Norm = "l2"
    bound: float | None = None
    retain: Tensor | None = None
    retain_weight: float = 1.0
    deadline: float = math.inf

    def __call__(self, program: Program, blocks: list[Block], caution: float) -> Candidate | Failure:
        """Solves every block with margins that grow with `caution` (1 allows for rounding of the usual size)."""
        rounding = program.rounding(program.weights)
        weights = program.weights.clone()
        margins, smallest = torch.zeros(len(program.lower), dtype=torch.float64), True
        for block in blocks:
            if not block.classes:
                wrong = block.rows[~program.satisfied(program.weights)[block.rows]].tolist()
                if wrong:
                    return Failure("infeasible", f"{program.name_of(wrong[0])} involves no edited output", (wrong[0],))
                continue
            margin = self._margin(program, block, rounding[block.rows], caution)
            solved = self._solve(program, block, margin)
            if isinstance(solved, Failure):
                return solved
            change, finished = solved
            margins[block.rows] = margin
            smallest &= finished
            weights[list(block.classes)] += change.cpu().reshape(len(block.classes), -1)
        return Candidate(weights.to(self.dtype), margins, smallest)

    def _margin(self, program: Program, block: Block, rounding: Tensor, caution: float) -> Tensor:
        """Slack for rounding to the storage type, for the checker's own error bound and for the solver."""
        w = program.weights[list(block.classes)].reshape(-1)
        terms = block.matrix * (w.abs() + w.abs().mean())
        spread = terms.square().sum(1).sqrt()
        storage = self._unit * torch.minimum(4 * spread, 2 * terms.abs().sum(1))
        return caution * (storage + 8 * rounding) + 1e-9 * spread

    @property
    def _unit(self) -> float:
        return torch.finfo(self.dtype).eps / 2

    def _solve(self, program: Program, block: Block, margin: Tensor) -> tuple[Tensor, bool] | Failure:
        """The change of the block's weights, and whether it is known to be the smallest."""
        w = program.weights[list(block.classes)].reshape(-1)
        now = block.matrix @ w + block.frozen
        lower, upper = program.lower[block.rows] - now + margin, program.upper[block.rows] - now - margin
        if bool((lower > upper).any()):
            i = int((lower - upper).argmax())
            row = int(block.rows[i])
            width = float(program.upper[row] - program.lower[row])
            reason = f"{program.name_of(row)} leaves {width:.3g} between its bounds, less than the two margins of "
            return Failure(
                "infeasible", f"{reason}{float(margin[i]):.3g} that proof in {self.dtype} needs; widen it", (row,)
            )
        left = self.deadline - time.perf_counter()
        if left <= 0:
            return Failure("limit", "the time limit was reached before the program was solved")
        retain = None if self.retain is None else torch.block_diag(*[self.retain] * len(block.classes))
        bound = self.bound
        if bound is not None:  # rounding adds to a change; where it may add more than allowed, nothing can change
            bound = max(bound - self._unit * float(w.abs().max() + bound), 1e-300)
        solution = least_change(
            block.matrix,
            lower,
            upper,
            norm=self.norm,
            bound=bound,
            retain=retain,
            retain_weight=self.retain_weight,
            time_limit=None if math.isinf(left) else left,
        )
        if solution.delta is not None:
            value, slack = block.matrix @ solution.delta, margin / 2
            if bool(((value >= lower - slack) & (value <= upper + slack)).all()):
                return solution.delta, solution.status == "optimal"
        if solution.status == "infeasible":
            rows = tuple(int(block.rows[i]) for i in solution.conflict)
            return Failure("infeasible", self._why(program, block, rows, solution.bound_in_conflict), rows)
        late = time.perf_counter() > self.deadline
        why = "the time limit was reached" if late else "the solver did not reach the accuracy it needs"
        return Failure("limit", f"{why} before the program was solved")

    def _why(self, program: Program, block: Block, rows: tuple[int, ...], with_bound: bool) -> str:
        names = list(dict.fromkeys(program.name_of(r) for r in rows))
        shown = "; ".join(names[:6]) + (f"; and {len(names) - 6} more" if len(names) > 6 else "")
        local = [int((block.rows == r).nonzero()[0, 0]) for r in rows]
        rank = int(torch.linalg.matrix_rank(block.matrix[local])) if local else 0
        text = f"{len(rows)} rows (rank {rank}, outputs {', '.join(map(str, block.classes))}) contradict each other"
        if with_bound:
            text += f" as long as no weight may change by more than {self.bound:g}"
        return f"{text}, with the margins that a proof needs: {shown}"
