"""From a program to weights that should satisfy it: solved block by block with margins, rounded as they will be stored.

Nothing here is trusted. A candidate becomes an edit only after the checker has proved every row of its certificate.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from soundly.editing.cones import SecondOrderCone
from soundly.editing.program import Block, Program
from soundly.editing.solve import Solution, least_change

Norm = Literal["l2", "l1", "linf"]
CUTS = 1000
"""Rounds of cutting planes before a program with cones is given up."""
SHARES = (1e-6, 1e-2)
"""The parts of a radius that are given away, so that finitely many cuts are enough; the second after CUTS rounds."""


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
                    why = f"{program.name_of(wrong[0])} is the same whatever the edited weights are"
                    return Failure("infeasible", why, (wrong[0],))
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
        cones, linear = self._cones(program, block, now, margin)
        # Rows of cones have no bounds of their own.
        none = torch.where(linear, 0.0, math.inf)
        lower = program.lower[block.rows] - now + margin - none
        upper = program.upper[block.rows] - now - margin + none
        if bool((lower > upper).any()):
            i = int((lower - upper).argmax())
            row = int(block.rows[i])
            width = float(program.upper[row] - program.lower[row])
            reason = f"{program.name_of(row)} leaves {width:.3g} between its bounds, less than the two margins of "
            return Failure(
                "infeasible", f"{reason}{float(margin[i]):.3g} that proof in {self.dtype} needs; widen it", (row,)
            )
        for share in SHARES:
            found = self._cut(program, block, lower, upper, margin / 2, [replace(c, share=share) for c in cones])
            if isinstance(found, tuple):
                return found[0], found[1] and share == SHARES[0]
            if isinstance(found, Failure) and share == SHARES[0]:
                return found
        late = time.perf_counter() > self.deadline
        why = "the time limit was reached" if late else "the solver did not reach the accuracy it needs"
        return Failure("limit", f"{why} before the program was solved")

    def _cut(
        self, program: Program, block: Block, lower: Tensor, upper: Tensor, slack: Tensor, cones: list[SecondOrderCone]
    ) -> tuple[Tensor, bool] | Failure | None:
        """The least change within the rows and cones, cut by cut; None if time, accuracy or patience runs out."""
        w = program.weights[list(block.classes)].reshape(-1)
        retain = None if self.retain is None else torch.block_diag(*[self.retain] * len(block.classes))
        bound = self.bound
        if bound is not None:  # rounding adds to a change; where it may add more than allowed, nothing can change
            bound = max(bound - self._unit * float(w.abs().max() + bound), 1e-300)
        matrix, side = block.matrix, torch.zeros(len(lower), dtype=torch.int8)
        owner, new = list(range(len(lower))), [(k, cone.first()) for k, cone in enumerate(cones)]
        for _ in range(CUTS):
            owner += [int(block.cones[k, 1]) for k, _ in new]
            matrix = torch.cat([matrix, *(cut.row[None] for _, cut in new)])
            lower = torch.cat([lower, lower.new_tensor([cut.lower for _, cut in new])])
            upper = torch.cat([upper, upper.new_full((len(new),), math.inf)])
            slack = torch.cat([slack, slack.new_tensor([cones[k].room / 2 for k, _ in new])])
            left = self.deadline - time.perf_counter()
            if left <= 0:
                return None
            solution = least_change(
                matrix,
                lower,
                upper,
                norm=self.norm,
                bound=bound,
                retain=retain,
                retain_weight=self.retain_weight,
                side=torch.cat([side, side.new_zeros(len(new))]),
                time_limit=None if math.isinf(left) else left,
            )
            if solution.status == "infeasible":
                found = list(solution.conflict)
                rows = tuple(dict.fromkeys(int(block.rows[owner[i]]) for i in found))
                return Failure("infeasible", self._why(program, block, rows, matrix[found], solution), rows)
            assert solution.delta is not None
            value = matrix @ solution.delta
            if not bool(((value >= lower - slack) & (value <= upper + slack)).all()):
                return None
            seen = [(k, cone.cut(solution.delta)) for k, cone in enumerate(cones)]
            new = [(k, cut) for k, cut in seen if not cut.excess <= 0]
            if not new:
                return solution.delta, solution.status == "optimal"
            side = solution.side
        return None

    def _cones(
        self, program: Program, block: Block, now: Tensor, margin: Tensor
    ) -> tuple[list[SecondOrderCone], Tensor]:
        """The block's cones, as a change of the weights sees them, and which rows belong to none."""
        lower, upper = program.lower[block.rows] - now, program.upper[block.rows] - now
        linear, cones = torch.ones(len(block.rows), dtype=torch.bool), []
        for first, last in block.cones.tolist():
            part, linear[first : last + 1] = slice(first, last), False
            room = float(margin[part].norm() + margin[last])
            spare = -float(lower[last])
            cones.append(SecondOrderCone(block.matrix[part], lower[part], upper[part], block.matrix[last], spare, room))
        return cones, linear

    def _why(self, program: Program, block: Block, rows: tuple[int, ...], matrix: Tensor, found: Solution) -> str:
        names = list(dict.fromkeys(program.name_of(r) for r in rows))
        shown = "; ".join(names[:6]) + (f"; and {len(names) - 6} more" if len(names) > 6 else "")
        rank = int(torch.linalg.matrix_rank(matrix)) if len(matrix) else 0
        text = f"{len(matrix)} rows (rank {rank}, outputs {', '.join(map(str, block.classes))}) contradict each other"
        if found.bound_in_conflict:
            text += f" as long as no weight may change by more than {self.bound:g}"
        return f"{text}, with the margins that a proof needs: {shown}"
