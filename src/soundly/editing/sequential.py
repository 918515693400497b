"""Weights under which constraints at points hold, whatever the layer: linear programs, each around the last one's answer.

Around weights theta the constraints are linear rows, and so is the demand that no function behind the edited weights leaves
the piece it is on. Where that makes the network affine (docs/editing.md says when) the first solution is exact. Elsewhere it
is a Newton step, shortened until it helps, and rows are taken anew. Rows enter a program when they are violated: of the
thousands of pieces few matter. If pieces contradict the constraints they are let go, and the next program starts from the
pieces that this leads to.

Nothing here is trusted: what comes out is a candidate, proved by others or not at all.

References: Tao and Thakur, "Provable Gradient Editing of Deep Neural Networks", NeurIPS 2025, sections 3 and 4 (rows that hold
the activation pattern); Nocedal and Wright, "Numerical Optimization", chapter 18 (sequential programming).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from soundly.editing.candidate import Failure, Norm
from soundly.editing.constraints import Classified, Constraint, Functional, Outputs, Point
from soundly.editing.evidence import Evidence, joined, key_of, quantity
from soundly.editing.rows import Claim, Rows
from soundly.editing.solve import least_change
from soundly.errors import InvalidInput
from soundly.graph.network import Network
from soundly.graph.node import Node

ROUNDS = 24
"""Programs, each around the answer of the one before."""
ENTER = 400
"""The most rows that enter a program at a time."""


@dataclass(frozen=True, eq=False)
class Requirements:
    """Rows lower <= sum_k coefficient_k * value_k <= upper over the values [P * V] of some evidence.

    Attributes:
        network: the quantities of one point, [V], as a function of the input.
        points: in the order of the evidence; for an area one of its points.
        row_start, row_value, row_coefficient, lower, upper, claims: as in `program.Program`.
    """

    network: Network
    evidence: Evidence
    points: tuple[Point, ...]
    row_start: Tensor
    row_value: Tensor
    row_coefficient: Tensor
    lower: Tensor
    upper: Tensor
    claims: tuple[Claim, ...]

    @cached_property
    def row_of_entry(self) -> Tensor:
        """[nnz]: the row each entry belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.lower)), self.row_start.diff())

    @property
    def width(self) -> int:
        """V, the number of values at a point."""
        return math.prod(self.network.output.shape)

    @cached_property
    def owner(self) -> Tensor:
        """[m]: the point that a row is about, -1 where it is about several."""
        point = self.row_value // self.width
        first = torch.full((len(self.lower),), len(self.points)).scatter_reduce(0, self.row_of_entry, point, "amin")
        last = torch.full((len(self.lower),), -1).scatter_reduce(0, self.row_of_entry, point, "amax")
        return torch.where(first == last, first, -1)

    def values(self, values: Tensor) -> Tensor:
        """The rows [m] for values [P, V]."""
        terms = values.reshape(-1)[self.row_value] * self.row_coefficient
        return torch.zeros_like(self.lower).index_add_(0, self.row_of_entry, terms)

    def magnitude(self, values: Tensor) -> Tensor:
        """The size of each row's terms [m] at values [P, V], with its bounds."""
        terms = (values.reshape(-1)[self.row_value] * self.row_coefficient).abs()
        total = torch.zeros_like(self.lower).index_add_(0, self.row_of_entry, terms)
        ends = [torch.where(end.isfinite(), end.abs(), 0.0) for end in (self.lower, self.upper)]
        return total + torch.maximum(*ends) + 1e-300

    def excess(self, values: Tensor) -> Tensor:
        """How far each row [m] lies beyond its bounds; not positive where it holds."""
        rows = self.values(values)
        return torch.maximum(self.lower - rows, rows - self.upper)

    def at_point(self, point: int, values: Tensor) -> Tensor:
        """`excess` with these values [V] at one point (those of the others are meaningless)."""
        spread = values.new_zeros(len(self.points), self.width)
        spread[point] = values
        return self.excess(spread)

    def tightened(self, share: float) -> Requirements:
        """The same rows with bounds moved inwards by a share of their size, at most by a quarter of their distance."""
        size = share * self.magnitude(self.evidence(self.evidence.theta)[0])
        gap = torch.minimum(size, (self.upper - self.lower) / 4)
        return replace(self, lower=self.lower + gap, upper=self.upper - gap)

    def name_of(self, row: int) -> str:
        """The claim of a row and the row's number inside it."""
        claim = next(c for c in self.claims if c.start <= row < c.stop)
        return claim.name if claim.stop - claim.start == 1 else f"{claim.name} [row {row - claim.start}]"


class _Builder(Rows):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.points: dict[Point, int] = {}
        self.quantities: dict[object, tuple[Network, int]] = {}
        self.wanted: list[tuple[int, object, Tensor]] = []  # where values go: the point, the quantity, their indices
        self.size = 0
        self.known: dict[Functional, Tensor] = {}
        self.wide = network.to(torch.float64)

    def quantity_of(self, functional: Functional) -> tuple[Network, int]:
        key = key_of(functional)
        if key not in self.quantities:
            made = quantity(self.network, functional)
            self.quantities[key] = made, made.output.shape[0]
        self.points.setdefault(functional.point, len(self.points))
        return self.quantities[key]

    def values_of(self, functional: Functional) -> Tensor:
        _, size = self.quantity_of(functional)
        index = torch.arange(self.size, self.size + size)
        self.size += size
        self.wanted.append((self.points[functional.point], key_of(functional), index))
        return index

    def now(self, functional: Functional) -> Tensor:
        made, _ = self.quantity_of(functional)
        with torch.no_grad():
            value: Tensor = made.to(torch.float64)(functional.point.x.detach().double().reshape(made.input.shape))
        return value

    def classified(self, c: Classified) -> None:
        """y_label - y_k >= margin for every other k."""
        classes = self.network.output.shape[-1]
        if classes < 2 or not 0 <= c.label < classes:
            raise InvalidInput(f"{c.name}: the network has outputs 0..{classes - 1}.")
        index = self.values_of(Outputs(c.point))
        others = torch.tensor([k for k in range(classes) if k != c.label])
        row = torch.arange(len(others)).repeat_interleave(2)
        value = torch.stack([index[c.label].expand(len(others)), index[others]], 1).reshape(-1)
        factor = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(len(others))
        lower = torch.full((len(others),), c.margin, dtype=torch.float64)
        self.add(c.name, row, value, factor, lower, torch.full_like(lower, math.inf))


def require(
    network: Network,
    constraints: Sequence[Constraint],
    free: Sequence[Node],
    *,
    extremes: Mapping[int, tuple[int, int]] | None = None,
) -> Requirements:
    """Writes constraints as rows over quantities of a network with free leaves.

    Raises:
        InvalidInput: a constraint does not fit the network.
    """
    build = _Builder(network)
    build.state(constraints, extremes or {})
    start, value, factor, lower, upper = build.table()
    offset, spans = 0, {}
    for key, (_, size) in build.quantities.items():
        spans[key] = slice(offset, offset + size)
        offset += size
    place = torch.empty(build.size, dtype=torch.long)
    for point, key, index in build.wanted:
        place[index] = torch.arange(spans[key].start, spans[key].stop) + point * offset
    points = tuple(build.points)
    whole = joined(network, [made for made, _ in build.quantities.values()])
    evidence = Evidence.of(whole, [p.x for p in points], free)
    return Requirements(whole, evidence, points, start, place[value], factor, lower, upper, tuple(build.claims))


@dataclass(frozen=True, eq=False)
class Move:
    """Weights at which all rows hold with their margins, in float64.

    Attributes:
        theta: [n].
        programs: how many were solved.
        let_go: how many pieces had to be left.
        smallest: whether no smaller change satisfies the last program.
    """

    theta: Tensor
    programs: int
    let_go: int
    smallest: bool


@dataclass(frozen=True, eq=False)
class Mover:
    """What the change should be like, and until when to look for it.

    Attributes:
        requirements: what must hold.
        dtype: the type that the weights are stored in.
        norm, bound: what is minimised, and how far a weight may move.
        deadline: value of `time.perf_counter()`.
    """

    requirements: Requirements
    dtype: torch.dtype
    norm: Norm = "l2"
    bound: float | None = None
    deadline: float = math.inf

    def __call__(self, start: Tensor, caution: float) -> Move | Failure:
        """Programs around `start` [n], then around what they lead to, with margins that grow with `caution`."""
        evidence, requirements = self.requirements.evidence, self.requirements
        origin, theta, let_go = evidence.theta, start, 0
        for programs in range(1, ROUNDS + 1):
            program = _Program(self, theta, caution)
            if programs > 1 and program.deficit(theta) == 0:
                return Move(theta, programs - 1, let_go, let_go == 0)
            solved = program.solve(origin)
            if isinstance(solved, Failure):
                return solved
            let_go += program.let_go
            step, length, before = solved - theta, 1.0, program.deficit(theta)
            while program.deficit(theta + length * step) >= before > 0 and not program.let_go:
                length /= 2
                if length < 1e-3:
                    return self._stuck(theta)
            theta = theta + length * step
        return self._stuck(theta)

    def _stuck(self, theta: Tensor) -> Failure:
        requirements = self.requirements
        excess = requirements.excess(requirements.evidence(theta)[0])
        worst = [int(r) for r in excess.argsort(descending=True)[:6] if excess[r] > 0]
        names = "; ".join(f"{requirements.name_of(r)} (by {float(excess[r]):.3g})" for r in worst)
        why = "the time limit was reached" if time.perf_counter() > self.deadline else "no step helps any more"
        return Failure("limit", f"{why}; still violated: {names}", tuple(worst))


class _Program:
    """The rows around some weights; they enter a linear program as its answers violate them."""

    def __init__(self, mover: Mover, theta: Tensor, caution: float) -> None:
        self.mover, self.theta = mover, theta
        self.requirements, self.evidence = mover.requirements, mover.requirements.evidence
        self.values, self.hinges = self.evidence(theta)
        self.lowest, self.highest = self.evidence.pieces(self.hinges)
        self.row_margin, self.hinge_margin = self._margins(caution)
        self.let_go = 0
        self.free = torch.zeros_like(self.hinges, dtype=torch.bool)

    def _margins(self, caution: float) -> tuple[Tensor, Tensor]:
        """What rounding the weights to their type may change, estimated along random directions."""
        unit = torch.finfo(self.mover.dtype).eps / 2
        draw = torch.Generator().manual_seed(0)
        rows, hinges = torch.zeros_like(self.requirements.lower), torch.zeros_like(self.hinges)
        size = self.theta.abs() + self.theta.abs().mean()
        for _ in range(4):
            signs = torch.randint(0, 2, self.theta.shape, generator=draw).double() * 2 - 1
            values, moved = self.evidence.moved(self.theta, unit * size * signs)
            rows = torch.maximum(rows, self.requirements.values(values).abs())
            hinges = torch.maximum(hinges, moved.abs())
        scale = self.requirements.magnitude(self.values)
        return (4 * caution * rows + 1e-9 * scale, 4 * caution * hinges + 1e-9 * (1 + self.hinges.abs()))

    def deficit(self, theta: Tensor) -> float:
        """The sum of what rows at theta lack, half their margins included; 0 where all hold. Infinite if not finite."""
        excess = self.requirements.excess(self.evidence(theta)[0]) + self.row_margin / 2
        total = float(excess.clamp(min=0).sum())
        return total if math.isfinite(total) else math.inf

    def solve(self, origin: Tensor) -> Tensor | Failure:
        """The weights nearest to `origin` at which all linear rows hold."""
        n, so_far = len(self.theta), self.theta - origin
        now = torch.cat([self.requirements.values(self.values), self.hinges.reshape(-1)])
        m = len(self.requirements.lower)
        target = self.requirements.lower + self.row_margin, self.requirements.upper - self.row_margin
        lower = torch.cat([target[0], (self.lowest + self.hinge_margin).reshape(-1)]) - now
        upper = torch.cat([target[1], (self.highest - self.hinge_margin).reshape(-1)]) - now
        share = 1.0
        entered, matrix, held = (
            torch.zeros(0, dtype=torch.long),
            torch.zeros(0, n).double(),
            torch.zeros(m + self.hinges.numel(), dtype=torch.bool),
        )
        step = torch.zeros(n, dtype=torch.float64)
        while True:
            moved = torch.cat([part.reshape(-1) for part in self._moved(step)])
            tolerance = torch.cat([self.row_margin, self.hinge_margin.reshape(-1)]) / 4
            low = torch.where(lower > 0, share * lower, lower)
            high = torch.where(upper < 0, share * upper, upper)
            missing = torch.maximum(low - moved, moved - high) - tolerance
            missing[m:][self.free.reshape(-1)] = 0
            missing[held] = 0
            new = (missing > 0).nonzero()[:, 0]
            if len(new) == 0:
                return self.theta + step
            weight = (
                missing[new]
                / torch.cat([self.requirements.magnitude(self.values), 1 + self.hinges.abs().reshape(-1)])[new]
            )
            new = new[weight.argsort(descending=True)[:ENTER]]
            rows = self._rows(new)
            moving = rows.abs().amax(1) > 0
            if bool((~moving & (new < m)).any()):
                dead = int(new[~moving & (new < m)][0])
                return Failure(
                    "infeasible", f"{self.requirements.name_of(dead)} does not depend on the edited weights", (dead,)
                )
            self.free.view(-1)[new[~moving] - m] = True
            entered, matrix = torch.cat([entered, new[moving]]), torch.cat([matrix, rows[moving]])
            held[new[moving]] = True
            while True:
                left = self.mover.deadline - time.perf_counter()
                if left <= 0:
                    return Failure("limit", "the time limit was reached before the program was solved")
                base = matrix @ so_far
                low = torch.where(lower > 0, share * lower, lower)[entered] + base
                high = torch.where(upper < 0, share * upper, upper)[entered] + base
                solution = least_change(
                    matrix,
                    low,
                    high,
                    norm=self.mover.norm,
                    bound=self.mover.bound,
                    time_limit=None if math.isinf(left) else left,
                )
                if solution.delta is not None:
                    step = solution.delta - so_far
                    break
                conflict = entered[list(solution.conflict)]
                pieces = conflict[conflict >= m]
                if len(pieces):
                    self.let_go += len(pieces)
                    self.free.view(-1)[pieces - m] = True
                    keep = ~torch.isin(entered, pieces)
                    entered, matrix = entered[keep], matrix[keep]
                    continue
                if share < 0.1 or solution.bound_in_conflict:
                    rows = tuple(int(r) for r in conflict)
                    return Failure("infeasible", self._why(rows, solution.bound_in_conflict), rows)
                share /= 2
                self.let_go += 1

    def _moved(self, step: Tensor) -> tuple[Tensor, Tensor]:
        values, hinges = self.evidence.moved(self.theta, step)
        return self.requirements.values(values), hinges

    def _rows(self, index: Tensor) -> Tensor:
        """Gradients [r, n] of rows (index < m) and hinges."""
        r, evidence, requirements = self.requirements, self.evidence, self.requirements
        m, (points, width), hinges = len(r.lower), self.values.shape, self.hinges.shape[1]
        result = torch.zeros(len(index), len(self.theta), dtype=torch.float64)
        mine = (index < m).nonzero()[:, 0]
        place = torch.full((m,), -1)
        place[index[mine]] = mine
        entry = place[r.row_of_entry] >= 0
        owner, value, factor = place[r.row_of_entry][entry], r.row_value[entry], r.row_coefficient[entry]
        pairs, which = torch.unique(torch.stack([owner, value // width]), dim=1, return_inverse=True)
        v = torch.zeros(pairs.shape[1], width, dtype=torch.float64)
        v.index_put_((which, value % width), factor, accumulate=True)
        far = (index >= m).nonzero()[:, 0]
        h = torch.zeros(len(far), hinges, dtype=torch.float64)
        if len(far):
            h[torch.arange(len(far)), (index[far] - m) % hinges] = 1.0
        point = torch.cat([pairs[1], (index[far] - m) // hinges if len(far) else far])
        found = evidence.rows(
            self.theta, point, torch.cat([v, h.new_zeros(len(far), width)]), torch.cat([v.new_zeros(len(v), hinges), h])
        )
        return result.index_add_(0, torch.cat([pairs[0], far]), found)

    def _why(self, rows: tuple[int, ...], with_bound: bool) -> str:
        names = list(dict.fromkeys(self.requirements.name_of(r) for r in rows))
        shown = "; ".join(names[:6]) + (f"; and {len(names) - 6} more" if len(names) > 6 else "")
        text = f"{len(rows)} rows contradict each other"
        if with_bound:
            text += f" as long as no weight may change by more than {self.mover.bound:g}"
        return f"{text}, with the margins that a proof needs: {shown}"
