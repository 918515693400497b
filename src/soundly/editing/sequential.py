"""Weights under which constraints at points hold, whatever the layer: programs, each around the last one's answer.

Around weights theta the constraints are linear rows, and so is the demand that no function behind the edited weights
leaves the piece it is on. Where that makes the network affine (docs/editing.md says when) the first solution is exact.
Elsewhere it is a Newton step, shortened until it helps, and rows are taken anew. Rows enter a program when they are
violated: of the thousands of pieces few matter. Pieces that contradict the constraints are let go, and the next
program starts from the pieces that this leads to. Nothing here is trusted: what comes out is a candidate, proved by
others or not at all.

References: Tao and Thakur, "Provable Gradient Editing of Deep Neural Networks", NeurIPS 2025, sections 3 and 4 (rows
that hold the activation pattern); Nocedal and Wright, "Numerical Optimization", chapter 18 (sequential programming).
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
from soundly.editing.constraints import Classified, Constraint, Point
from soundly.editing.evidence import Evidence, joined, key_of, quantity
from soundly.editing.functionals import Functional, Outputs
from soundly.editing.low_rank import LowRank
from soundly.editing.rows import Rows, Table
from soundly.editing.solve import least_change
from soundly.errors import InvalidInput
from soundly.graph.network import Network
from soundly.graph.node import Node

ROUNDS = 24
"""Programs, each around the answer of the one before."""
ENTER = 400
"""The most rows that enter a program at a time."""
CONFLICTS = 50
"""Contradictions that are resolved in one program before it is given up."""
DESCENT, STRIDE = 300, 0.03
"""Steps of descent before a further attempt, and their length in mean weights."""
WANDER = (0.0, *(1.0,) * 8)
"""How far from the start, at random and in mean weights, the further attempts begin."""


@dataclass(frozen=True, eq=False)
class Requirements(Table):
    """Rows over the values [P * V] of some evidence.

    Attributes:
        network: the quantities of one point, [V], as a function of the input.
        points: in the order of the evidence; for an area one of its points.
    """

    network: Network
    evidence: Evidence
    points: tuple[Point, ...]

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

    def at_points(self, point: int, values: Tensor) -> Tensor:
        """`excess` [k, m] with each of these values [k, V] at one point (rows about others are meaningless)."""
        whole = values.new_zeros(len(values), len(self.points), self.width)
        whole[:, point] = values
        terms = whole.reshape(len(values), -1)[:, self.row_value] * self.row_coefficient
        rows = values.new_zeros(len(values), len(self.lower)).index_add_(1, self.row_of_entry, terms)
        return torch.maximum(self.lower - rows, rows - self.upper)

    def tightened(self, share: float) -> Requirements:
        """The same rows with bounds moved inwards by a share of their size, at most by a quarter of their distance."""
        size = share * self.magnitude(self.evidence(self.evidence.theta)[0])
        gap = torch.minimum(size, (self.upper - self.lower) / 4)
        return replace(self, lower=self.lower + gap, upper=self.upper - gap)


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
    start, value, factor, lower, upper, cones = build.table()
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
    table = (start, place[value], factor, lower, upper, cones, tuple(build.claims))
    return Requirements(*table, network=whole, evidence=evidence, points=points)


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
class Goals:
    """Values that rows should come near: weight * mean((rows - target)^2) is added to the squared change.

    Attributes:
        rows: as requirements whose lower and upper ends are the targets.
        weight: how much the mean counts.
    """

    rows: Requirements
    weight: float


@dataclass(frozen=True, eq=False)
class Mover:
    """What the change should be like, and until when to look for it.

    Attributes:
        requirements: what must hold.
        dtype: the type that the weights are stored in.
        norm, bound: what is minimised, and how far a weight may move.
        deadline: value of `time.perf_counter()`.
        goals: what should hold as well as it can (norm "l2" only).
        within: the changes to choose from; all if None (norm "l2" without a bound only).
    """

    requirements: Requirements
    dtype: torch.dtype
    norm: Norm = "l2"
    bound: float | None = None
    deadline: float = math.inf
    goals: Goals | None = None
    within: LowRank | None = None

    def __call__(self, start: Tensor, caution: float) -> Move | Failure:
        """Programs around `start` [n], then around what they lead to, with margins that grow with `caution`.

        Where that leads nowhere, again from where descent leads: from the start, then from some way off. Two points
        that share a piece and ask for different slopes have to be parted, and no slope tells which way.
        """
        found = self._from(start, caution)
        draw, size = torch.Generator().manual_seed(0), start.abs().mean()
        for far in WANDER if len(self.requirements.evidence.breaks) else ():
            if isinstance(found, Move) or time.perf_counter() > self.deadline:
                break
            noise = torch.randn(start.shape, generator=draw, dtype=start.dtype).to(start)
            again = self._from(self.descended(start + far * size * noise), caution)
            found = again if isinstance(again, Move) else found
        return found

    def descended(self, theta: Tensor) -> Tensor:
        """Weights that violate the rows less, by ordinary descent: across breaks, where programs do not look."""
        requirements, evidence, origin = self.requirements, self.requirements.evidence, self.requirements.evidence.theta

        def chosen(theta: Tensor) -> Tensor:
            return theta if self.within is None else origin + self.within(theta - origin)

        scale = requirements.magnitude(evidence(theta)[0])
        moving = theta.clone().requires_grad_()
        descent = torch.optim.Adam([moving], lr=float(STRIDE * theta.abs().mean()))
        best, least = theta, math.inf
        with torch.enable_grad():
            for _ in range(DESCENT):
                there = chosen(moving)
                values = torch.vmap(lambda x, t=there: evidence.at(t, x)[0], chunk_size=evidence.chunk)(evidence.points)
                loss = (requirements.excess(values) / scale).clamp(min=-1e-3).add(1e-3).square().sum()
                value = float(loss.detach())
                if time.perf_counter() > self.deadline or not value < math.inf:
                    break
                if value < least:
                    best, least = there.detach().clone(), value
                descent.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                descent.step()
        return best

    def _from(self, start: Tensor, caution: float) -> Move | Failure:
        origin, theta, let_go = self.requirements.evidence.theta, start, 0
        for programs in range(1, ROUNDS + 1):
            program = Program(self, theta, caution)
            deficit = program.deficit(theta)
            if programs > 1 and deficit == 0:
                return self._polished(program, Move(theta, programs - 1, let_go, False), caution)
            solved = program.solve(origin)
            if isinstance(solved, Failure):
                return solved
            let_go += program.let_go
            after = program.deficit(solved)
            if after == 0 and program.let_go == 0 and program.exact(solved):
                return self._bounded(Move(solved, programs, let_go, let_go == 0))
            if not program.let_go and after > deficit / 2 > 0:
                # Curvature undoes what the step to the nearest weights gains: the shortest step first of all repairs.
                solved = self._shortened(program, theta, deficit)
                if isinstance(solved, Failure):
                    return solved
            theta = solved
        return self._stuck(theta)

    def _polished(self, program: Program, found: Move, caution: float) -> Move | Failure:
        """A smaller change, nearer to the goals: steps to the nearest weights, repaired, as long as that pays."""
        theta, least = found.theta, self.objective(found.theta)
        for length in (1.0, 0.3) if self.goals is None else (1.0, 0.5, 0.25, 0.125) * 2:
            nearest = program.solve(self.requirements.evidence.theta)
            if isinstance(nearest, Failure):
                break
            moved = theta + length * (nearest - theta)
            for _ in range(4):
                there = Program(self, moved, caution)
                if there.deficit(moved) == 0:
                    break
                repaired = there.solve(None)
                if isinstance(repaired, Failure):
                    break
                moved = repaired
            value = self.objective(moved)
            if there.theta is not moved or there.deficit(moved) > 0 or not value < (1 - 1e-3) * least:
                continue
            theta, least, program = moved, value, there
        return self._bounded(replace(found, theta=theta))

    def objective(self, theta: Tensor) -> float:
        """What is minimised, up to the monotone function that a norm may be under."""
        change = theta - self.requirements.evidence.theta
        size = {"l2": lambda: change @ change, "l1": lambda: change.abs().sum(), "linf": lambda: change.abs().max()}
        total = float(size[self.norm]())
        if self.goals is not None:
            rows = self.goals.rows
            miss = rows.values(rows.evidence(theta)[0]) - rows.lower
            total += self.goals.weight * float(miss.square().mean())
        return total

    def _bounded(self, found: Move) -> Move | Failure:
        change = (found.theta - self.requirements.evidence.theta).abs()
        if self.bound is not None and not bool((change <= self.bound * (1 + 1e-12)).all()):
            return Failure("limit", f"only changes beyond the bound {self.bound:g} were found")
        return found

    def _shortened(self, program: Program, theta: Tensor, deficit: float) -> Tensor | Failure:
        """The shortest step to where the linear rows hold, halved until it helps."""
        repaired = program.solve(None)
        if isinstance(repaired, Failure):
            return repaired
        length = 1.0
        while program.deficit(theta + length * (repaired - theta)) >= deficit:
            length /= 2
            if length < 1e-3:
                return self._stuck(theta)
        return theta + length * (repaired - theta)

    def _stuck(self, theta: Tensor) -> Failure:
        requirements = self.requirements
        excess = requirements.excess(requirements.evidence(theta)[0])
        worst = [int(r) for r in excess.argsort(descending=True)[:6] if excess[r] > 0]
        names = "; ".join(f"{requirements.name_of(r)} (by {float(excess[r]):.3g})" for r in worst)
        why = "the time limit was reached" if time.perf_counter() > self.deadline else "no step helps any more"
        return Failure("limit", f"{why}; still violated: {names or 'the margins that a proof needs'}", tuple(worst))


class Program:
    """The linear rows around some weights: those of the requirements, then one for each hinge.

    Attributes:
        let_go: how many demands were given up: pieces that contradict the constraints, or full steps.
    """

    def __init__(self, mover: Mover, theta: Tensor, caution: float) -> None:
        self.mover, self.theta = mover, theta
        self.requirements, self.evidence = mover.requirements, mover.requirements.evidence
        self.values, self.hinges = self.evidence(theta)
        self.let_go, self.share = 0, 1.0
        r, (lowest, highest) = self.requirements, self.evidence.pieces(self.hinges)
        self.now = torch.cat([r.values(self.values), self.hinges.reshape(-1)])
        self.size = torch.cat([r.magnitude(self.values), 1 + self.hinges.abs().reshape(-1)])
        self.margin = 4 * caution * self._rounding() + 1e-9 * self.size
        self.lower = torch.cat([r.lower, lowest.reshape(-1)]) + self.margin - self.now
        self.upper = torch.cat([r.upper, highest.reshape(-1)]) - self.margin - self.now

    def _rounding(self) -> Tensor:
        """What rounding the weights to their type may change, estimated along random directions."""
        unit = torch.finfo(self.mover.dtype).eps / 2
        draw = torch.Generator().manual_seed(0)
        size, most = self.theta.abs() + self.theta.abs().mean(), torch.zeros_like(self.now)
        for _ in range(4):
            signs = torch.randint(0, 2, self.theta.shape, generator=draw).double() * 2 - 1
            most = torch.maximum(most, self._moved(unit * size * signs.to(size)).abs())
        return most

    def deficit(self, theta: Tensor) -> float:
        """The sum of what rows at theta lack, half their margins included; 0 where all hold, infinite if not finite."""
        excess = self.requirements.excess(self.evidence(theta)[0])
        total = float((excess + self.margin[: len(excess)] / 2).clamp(min=0).sum())
        return total if math.isfinite(total) else math.inf

    def exact(self, theta: Tensor) -> bool:
        """Whether the linear rows say of theta what evaluation says."""
        predicted = self.now + self._moved(theta - self.theta)
        values, hinges = self.evidence(theta)
        found = torch.cat([self.requirements.values(values), hinges.reshape(-1)])
        return bool(((found - predicted).abs() <= 1e-9 * self.size).all())

    def solve(self, origin: Tensor | None) -> Tensor | Failure:
        """The weights nearest to `origin` at which all linear rows hold; None for the shortest step, whatever the goals
        and the bound."""
        self.repairing = origin is None
        m, so_far = len(self.requirements.lower), self.theta - (self.theta if origin is None else origin)
        entered = torch.zeros(0, dtype=torch.long)
        matrix = torch.zeros(0, len(self.theta), dtype=torch.float64)
        idle = torch.zeros_like(self.now, dtype=torch.bool)  # rows that entered, or that need not hold
        self.side, conflicts = torch.zeros(0, dtype=torch.int8), 0
        step = self._least(matrix, entered, so_far)
        while True:
            if isinstance(step, Failure):
                return step
            assert isinstance(step, Tensor)  # no row has entered that others could contradict
            moved = self._moved(step)
            lower, upper = self._ends()
            missing = (torch.maximum(lower - moved, moved - upper) - self.margin / 4) / self.size
            missing[idle] = 0
            new = missing.argsort(descending=True)[:ENTER]
            new = new[missing[new] > 0]
            if len(new) == 0:
                return self.theta + step
            rows = self._rows(new)
            moving = rows.abs().amax(1) > 0
            dead = new[~moving & (new < m)].tolist()
            if dead:
                why = f"{self.requirements.name_of(dead[0])} does not depend on the edited weights"
                return Failure("infeasible", why, tuple(dead))
            idle[new] = True
            entered, matrix = torch.cat([entered, new[moving]]), torch.cat([matrix, rows[moving]])
            self.side = torch.cat([self.side, self.side.new_zeros(int(moving.sum()))])
            while not isinstance(found := self._least(matrix, entered, so_far), Tensor):
                if isinstance(found, Failure):
                    return found
                pieces = found.rows[found.rows >= m]
                conflicts += 1
                if conflicts > CONFLICTS:
                    return self._contradiction(found)
                if len(pieces):  # the pieces that stand against the constraints
                    self.let_go += len(pieces)
                    keep = ~torch.isin(entered, pieces)
                    entered, matrix, self.side = entered[keep], matrix[keep], self.side[keep]
                elif self.share < 0.1 or found.bound:
                    return self._contradiction(found)
                else:  # a part of the way may lead to where rows no longer contradict each other
                    self.share /= 2
                    self.let_go += 1
            step = found

    def _ends(self) -> tuple[Tensor, Tensor]:
        """The bounds on what rows change; of what is violated only a share is asked for."""
        lower = torch.where(self.lower > 0, self.share * self.lower, self.lower)
        return lower, torch.where(self.upper < 0, self.share * self.upper, self.upper)

    def _least(self, matrix: Tensor, entered: Tensor, so_far: Tensor) -> Tensor | _Conflict | Failure:
        """The step to the weights nearest to the origin at which the entered rows hold."""
        left = self.mover.deadline - time.perf_counter()
        if left <= 0:
            return Failure("limit", "the time limit was reached before the program was solved")
        base = matrix @ so_far
        lower, upper = (end[entered] + base for end in self._ends())
        limit = None if math.isinf(left) else left
        norm, bound, goals = self.mover.norm, self.mover.bound, self.mover.goals
        if self.repairing:
            bound = goals = None
        if goals is None:
            if not len(entered):
                return -so_far
            solution = least_change(matrix, lower, upper, norm=norm, bound=bound, side=self.side, time_limit=limit)
            centre = torch.zeros_like(so_far)
        else:
            towards, wanted = self._goal_rows
            centre = _ridge(towards, wanted + towards @ so_far, goals.weight)
            shift = matrix @ centre
            solution = least_change(
                matrix,
                lower - shift,
                upper - shift,
                retain=towards,
                retain_weight=goals.weight,
                side=self.side,
                time_limit=limit,
            )
        if solution.delta is not None:
            self.side = solution.side
            return centre + solution.delta - so_far
        if solution.status == "limit":
            return Failure("limit", "the time limit was reached before the program was solved")
        return _Conflict(entered[list(solution.conflict)], solution.bound_in_conflict)

    @cached_property
    def _goal_rows(self) -> tuple[Tensor, Tensor]:
        """Gradients of the goals' rows [g, n], and how far these are from their targets [g]."""
        assert self.mover.goals is not None
        goals = self.mover.goals.rows
        values = goals.evidence(self.theta)[0]
        rows = self._rows(torch.arange(len(goals.lower)), goals)
        return rows, goals.lower - goals.values(values)

    def _moved(self, step: Tensor) -> Tensor:
        values, hinges = self.evidence.moved(self.theta, step)
        return torch.cat([self.requirements.values(values), hinges.reshape(-1)])

    def _rows(self, index: Tensor, requirements: Requirements | None = None) -> Tensor:
        rows = row_gradients(requirements or self.requirements, self.theta, index)
        return rows if self.mover.within is None else self.mover.within(rows)

    def _contradiction(self, found: _Conflict) -> Failure:
        rows = tuple(int(r) for r in found.rows)
        names = list(dict.fromkeys(self.requirements.name_of(r) for r in rows))
        shown = "; ".join(names[:6]) + (f"; and {len(names) - 6} more" if len(names) > 6 else "")
        text = f"{len(rows)} rows contradict each other"
        if found.bound:
            text += f" as long as no weight may change by more than {self.mover.bound:g}"
        return Failure("infeasible", f"{text}, with the margins that a proof needs: {shown}", rows)


@dataclass(frozen=True, eq=False)
class _Conflict:
    """Rows that cannot hold together, perhaps only because of the bound on changes."""

    rows: Tensor
    bound: bool


def row_gradients(r: Requirements, theta: Tensor, index: Tensor) -> Tensor:
    """Gradients [k, n] towards theta of rows (index < m) and, beyond them, of single hinges."""
    m, width, hinges = len(r.lower), r.width, len(r.evidence.breaks)
    place = torch.full((m,), -1)
    mine, far = (index < m).nonzero()[:, 0], (index >= m).nonzero()[:, 0]
    place[index[mine]] = mine
    entry = place[r.row_of_entry] >= 0
    owner, value, factor = place[r.row_of_entry][entry], r.row_value[entry], r.row_coefficient[entry]
    pairs, which = torch.unique(torch.stack([owner, value // width]), dim=1, return_inverse=True)  # a row at a point
    v = torch.zeros(pairs.shape[1] + len(far), width, dtype=torch.float64)
    v.index_put_((which, value % width), factor, accumulate=True)
    h = torch.zeros(len(v), hinges, dtype=torch.float64)
    if len(far):
        h[torch.arange(pairs.shape[1], len(v)), (index[far] - m) % hinges] = 1.0
    point = torch.cat([pairs[1], (index[far] - m) // max(1, hinges)])
    found = r.evidence.rows(theta, point, v, h)
    return found.new_zeros(len(index), len(theta)).index_add_(0, torch.cat([pairs[0], far]), found)


def _ridge(rows: Tensor, target: Tensor, weight: float) -> Tensor:
    """The d that minimises |d|^2 + weight * mean((rows d - target)^2)."""
    scale = math.sqrt(weight / len(rows))
    n = rows.shape[1]
    stacked = torch.cat([scale * rows, torch.eye(n, dtype=rows.dtype)])
    wanted = torch.cat([scale * target, target.new_zeros(n)])
    return torch.linalg.lstsq(stacked, wanted[:, None], driver="gelsd").solution[:, 0]
