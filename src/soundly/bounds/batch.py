"""Backward linear bounds of a program over many subproblems at once: the work horse of verification.

A subproblem is a box of inputs and, possibly, narrower intervals of some inner values. Rows of all subproblems are
carried backwards together, each with an owner, so that every affine step is one matrix product. Nothing here accounts
for rounding: what a search finds is proved by the checker of its certificate.

Reference: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions", NeurIPS
2018; Xu et al., "Fast and Complete" (alpha-CROWN), ICLR 2021; Wang et al., "Beta-CROWN", NeurIPS 2021.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from soundly.bounds.ball import Ball
from soundly.bounds.crop import Crop, Crops
from soundly.bounds.forms import Forms
from soundly.bounds.frame import Frame, OutOfTime, Pass, Relaxations, Side, Slopes, Split, Start
from soundly.bounds.lines import bent, kink, lines, lines_of, open_sides
from soundly.bounds.products import Last, Planes, factors_of, last_products, planes, remainder, tangents
from soundly.bounds.program import Affine, Convolution, Function, Map, Matrix, Program, Sparse, Step, Times, Variable
from soundly.bounds.relaxation import Lines

CHUNK = 2**21
"""How many numbers the coefficients of one pass may have: larger arrays leave the cache."""


class Bounder:
    """Bounds of one program in its own type and on its own device.

    Attributes:
        deadline: the time (of `time.monotonic`) at which a long pass raises `OutOfTime`.
        cost: products per row of a backward pass through the whole program.
        dtype: of all numbers.
        room: how many numbers a row of the outputs needs.
        last: the products to be bounded together, where few inputs vary; None if there are none.
        ball: where all inputs lie besides their boxes.
    """

    def __init__(
        self,
        program: Program,
        *,
        together: bool = False,
        chunk: int = CHUNK,
        deadline: float = math.inf,
        ball: Ball | None = None,
    ) -> None:
        self.program = program
        self.deadline = deadline
        self.steps = program.steps
        readers = program.consumers()
        self.readers = readers
        self.last = last_products(self.steps) if together else None
        self.read = self._read(frozenset())
        self.read_before = self.read if self.last is None else self._read(self.last.products)
        # Where the forward interval is already the exact range: one map of the box's own entries.
        self.exact = [isinstance(step, Variable) for step in self.steps]
        for i, step in enumerate(self.steps):
            if ball is None and isinstance(step, Affine) and len(step.parts) == 1:
                source = step.parts[0][1]
                below = copied(self.steps[source])
                plain = below is not None and len(below.columns.unique()) == len(below.columns)
                self.exact[i] = source == 0 or (self.exact[source] and plain)
        self.widest = max(step.size for step in self.steps)
        self.room = self.widest if self.last is None else max(self.widest, self.last.room(self.steps))
        self.chunk = chunk
        self.dtype = next((s.bias.dtype for s in self.steps if isinstance(s, Affine)), torch.float64)
        self.ball = None if ball is None else ball.map(lambda v: v.to(self.dtype))
        maps = [m for step in self.steps if isinstance(step, Affine) for m, _ in step.parts]
        self.bounders: dict[Program, Bounder] = {}
        self.cost = sum(len(m.rows) if isinstance(m, Sparse) else m.size[0] * m.terms for m in maps)

    def _read(self, apart: frozenset[int]) -> list[bool]:
        """Of every step whether a function or product reads it, itself or a copy of it; those `apart` do not count."""
        read = [False] * len(self.steps)
        for i in range(len(self.steps) - 1, -1, -1):
            read[i] = any(
                (isinstance(self.steps[j], (Function, Times)) and j not in apart)
                or (read[j] and copied(self.steps[j]) is not None)
                for j in self.readers[i]
            )
        return read

    @cached_property
    def crops(self) -> Crops:
        return Crops(self.program)

    # ---------------------------------------------------------------- intervals

    def refresh(
        self,
        lower: Tensor,
        upper: Tensor,
        *,
        inherited: Frame | None = None,
        slopes: Mapping[int, Slopes] | None = None,
        first: int = 0,
    ) -> Frame:
        """Intervals of every step over boxes [batch, inputs]: forward intervals, met with the inherited ones, and with
        backward bounds where a relaxation depends on them.

        Args:
            slopes: for the rows of some steps, the slopes of the functions below.
            first: steps before this one keep the inherited intervals, unless affine forms are followed.
        """
        frame = self._intervals(lower, upper, inherited, slopes, self.last, first)
        if frame is None:
            frame = self._intervals(lower, upper, inherited, slopes, None, first)
            assert frame is not None
        return frame

    def _intervals(
        self,
        lower: Tensor,
        upper: Tensor,
        inherited: Frame | None,
        slopes: Mapping[int, Slopes] | None,
        last: Last | None,
        first: int,
    ) -> Frame | None:
        """None where the last products were to be bounded together and that says nothing."""
        frame = Frame([], [], (lower > upper).any(-1))
        forms = Forms(self.steps, lower, upper)
        last = last if forms.used else None
        read = self.read if last is None else self.read_before
        known = frame.known
        reach = lower.new_zeros(len(lower), 1)  # the largest number so far: what sums may cancel
        for i, step in enumerate(self.steps):
            if inherited is not None and i < first and not forms.used:
                frame.lower.append(inherited.lower[i])
                frame.upper.append(inherited.upper[i])
                known |= {j: line for j, line in inherited.known.items() if j == i}
                continue
            low, high = (lower, upper) if isinstance(step, Variable) else self.forward(step, frame)
            if inherited is not None:
                low, high = torch.maximum(low, inherited.lower[i]), torch.minimum(high, inherited.upper[i])
            if isinstance(step, Function):
                low_in, high_in = frame.lower[step.source], frame.upper[step.source]
                known[i] = lines(step.op, low_in, high_in)
            elif isinstance(step, Times):
                known[i] = planes(*factors(step, frame))
            if forms.used:
                least, greatest = forms.follow(i, frame, known)
                low, high = torch.maximum(low, least), torch.minimum(high, greatest)
            frame.lower.append(low)
            frame.upper.append(high)
            if read[i] and not self.exact[i] and copied(step) is None:
                own = None if slopes is None else slopes.get(i)
                self._tighten(i, frame, last, known if own is None else self.lines(frame, own, known=known))
            low, high = frame.lower[i], frame.upper[i]
            # Rounding must not make an interval of one point look empty.
            size = low.abs() + high.abs()
            reach = torch.maximum(reach, size.nan_to_num(0, 0, 0).amax(-1, keepdim=True))
            slack = torch.finfo(self.dtype).eps * (1000 * size + 100 * reach)
            frame.infeasible = frame.infeasible | (low > high + slack).any(-1)
            # An empty interval would only produce nonsense further up.
            frame.lower[i], frame.upper[i] = torch.minimum(low, high), torch.maximum(low, high)
        if last is not None:
            narrow = {i: forms.narrow(i, frame.lower[i], frame.upper[i]) for i in last.sources}
            frame.factors = factors_of(last, self.steps, narrow)
            if not all(f.finite for pair in frame.factors.values() for f in pair):
                return None
            known |= {i: tangents(*pair) for i, pair in frame.factors.items()}
        return frame

    def forward(self, step: Affine | Function | Times, frame: Frame) -> tuple[Tensor, Tensor]:
        """A step's interval from those of the steps it reads."""
        match step:
            case Affine(((copy, source),), bias) if copied(step) is copy:  # by its ends: a wide one's centre loses them
                assert isinstance(copy, Sparse)
                ends = [v[:, copy.columns] * copy.values for v in (frame.lower[source], frame.upper[source])]
                low, high = torch.minimum(*ends) + bias, torch.maximum(*ends) + bias
            case Affine(parts, bias):
                centre = bias.expand(len(frame), -1)
                radius = torch.zeros_like(centre)
                for part, source in parts:
                    low, high = frame.lower[source], frame.upper[source]
                    centre = centre + part.apply((low + high) / 2)
                    radius = radius + part.absolute.apply((high - low) / 2)
                low, high = centre - radius, centre + radius
            case Function(source, op):
                low, high = op.enclose(frame.lower[source], frame.upper[source])
            case Times(left, right):
                ends = [
                    x * y
                    for x in (frame.lower[left], frame.upper[left])
                    for y in (frame.lower[right], frame.upper[right])
                ]
                corners = torch.stack(ends)
                low, high = corners.amin(0), corners.amax(0)
                if left == right:
                    low = low.clamp(min=0)
        low = low.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        return low, high.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)

    def loose(self, i: int, frame: Frame) -> Tensor:
        """[batch, n]: which entries of a step's interval a relaxation depends on."""
        return self._wanted(i, frame.lower[i], frame.upper[i], frozenset())

    def straight(self, frame: Frame) -> Tensor:
        """[batch]: where no relaxation leaves anything, and rows are affine functions of the input."""
        found = torch.ones(len(frame), dtype=torch.bool)
        for step in self.steps:
            if isinstance(step, Function):
                found &= ~bent(step.op, frame.lower[step.source], frame.upper[step.source]).any(1)
            elif isinstance(step, Times):
                xl, xu, yl, yu = factors(step, frame)
                found &= ~((xl < xu) & (yl < yu)).any(1)
        return found

    def _wanted(self, i: int, low: Tensor, high: Tensor, apart: frozenset[int]) -> Tensor:
        wanted = torch.zeros_like(low, dtype=torch.bool)
        for j in self.readers[i]:
            reader = self.steps[j]
            if j in apart:
                continue
            if isinstance(reader, Function):
                wanted |= bent(reader.op, low, high)
            elif isinstance(reader, Times):
                wanted |= low < high
            elif self.read[j] and (copy := copied(reader)) is not None:
                # A copy is bounded where it comes from; its own interval is that one, scaled.
                least, greatest = low[:, copy.columns] * copy.values, high[:, copy.columns] * copy.values
                assert isinstance(reader, Affine)
                ends = torch.minimum(least, greatest) + reader.bias, torch.maximum(least, greatest) + reader.bias
                mask = self._wanted(j, *ends, apart)
                wanted |= torch.zeros_like(low).index_add_(1, copy.columns, mask.to(low.dtype)) > 0
        return wanted

    def _tighten(self, i: int, frame: Frame, last: Last | None, lines: Relaxations) -> None:
        apart = frozenset[int]() if last is None else last.products
        owner, entry = self._wanted(i, frame.lower[i], frame.upper[i], apart).nonzero(as_tuple=True)
        if len(owner) == 0:
            return
        low, high = frame.lower[i].clone(), frame.upper[i].clone()

        def meet(some: Tensor, bound: Tensor) -> None:
            who, what = owner[some], entry[some]
            least, greatest = bound.chunk(2)
            low[who, what] = torch.maximum(low[who, what], least)
            high[who, what] = torch.minimum(high[who, what], -greatest)

        whole, crops = self.crops.of(i, entry)
        for part in self.portions(len(whole)):
            start = self._both(i, entry[whole[part]], owner[whole[part]])
            found = self.backward(frame, lines, start)
            meet(whole[part], found.least(*_boxes(frame, start)))
        for crop, which, place, inner in crops:
            small = self._small(crop)
            # Rows of one subproblem and place stand together.
            order = torch.argsort(owner[which] * len(crop.index[0]) + place, stable=True)
            for part in self.portions(len(which), width=small.widest):
                some = order[part]
                meet(which[some], self._inside(i, crop, frame, lines, owner[which[some]], place[some], inner[some]))
        frame.lower[i], frame.upper[i] = low, high

    def _small(self, crop: Crop) -> Bounder:
        if crop.program not in self.bounders:
            self.bounders[crop.program] = Bounder(crop.program)
        return self.bounders[crop.program]

    def _inside(
        self, i: int, crop: Crop, frame: Frame, lines: Relaxations, owner: Tensor, place: Tensor, entry: Tensor
    ) -> Tensor:
        """The lower and the negated upper bounds of entries of step i of a crop, by subproblem and place."""
        small = self._small(crop)
        pairs, member = torch.unique_consecutive(owner * len(crop.index[0]) + place, return_inverse=True)
        batch, at = pairs // len(crop.index[0]), pairs % len(crop.index[0])
        box = [crop.take(0, ends, batch, at) for ends in (frame.lower[0], frame.upper[0])]
        view = Frame([box[0]], [box[1]], torch.zeros_like(batch, dtype=torch.bool))
        near = {
            j: type(line)(*(crop.take(j, v, batch, at) for v in line))
            for j, line in lines.items() if j <= i and small.steps[j].size
        }  # fmt: skip
        start = small._both(i, entry, member)
        found = small.backward(view, near, start, until=crop.floor)
        if not found.left:
            if self.ball is not None:
                found = replace(found, ball=self.ball.map(lambda v: crop.take(0, v, batch, at)[member.repeat(2)]))
            return found.least(*_boxes(view, start))
        left = {**found.left, 0: found.a}
        a = {j: crop.spread(j, place.repeat(2), v, self.steps[j].size) for j, v in left.items()}
        start = Start(a, found.d, owner.repeat(2))
        return self.backward(frame, lines, start).least(*_boxes(frame, start))

    def _both(self, i: int, entry: Tensor, owner: Tensor) -> Start:
        """Rows for the lower and the negated upper bounds of entries of a step."""
        step = self.steps[i]
        a: dict[int, Tensor] = {}
        if isinstance(step, Affine):
            for m, source in step.parts:
                rows = entries(m, entry, step.bias)
                a[source] = a[source] + rows if source in a else rows
            d = step.bias[entry]
        else:
            d = torch.zeros(len(entry), dtype=self.dtype)
            a[i] = step_rows(entry, step.size, d)
        return Start({s: torch.cat([v, -v]) for s, v in a.items()}, torch.cat([d, -d]), owner.repeat(2))

    def portions(self, rows: int, *, width: int | None = None) -> Iterator[slice]:
        """Slices of rows that are small enough to be carried together."""
        many = max(1, self.chunk // (width or self.widest))
        for first in range(0, rows, many):
            if time.monotonic() > self.deadline:
                raise OutOfTime
            yield slice(first, min(first + many, rows))

    # ---------------------------------------------------------------- relaxations

    def lines(
        self,
        frame: Frame,
        slopes: Slopes | None = None,
        *,
        upto: int | None = None,
        known: Relaxations | None = None,
    ) -> dict[int, Lines | Planes]:
        """Relaxations [batch, n] of every function and product below a step, with the given slopes where there are any.

        Args:
            known: the default ones, if they have been computed before.
        """
        found: dict[int, Lines | Planes] = {}
        for j, step in enumerate(self.steps[:upto]):
            if known is not None and j not in known:
                continue
            low, high = (None, None) if slopes is None else (slopes.get((j, 0)), slopes.get((j, 1)))
            best = None if known is None else known[j]
            if isinstance(step, (Function, Times)) and best is not None and low is None and high is None:
                found[j] = best
            elif isinstance(step, Function):
                ends = frame.lower[step.source], frame.upper[step.source]
                assert not isinstance(best, Planes)
                found[j] = lines_of(step.op, *ends, low, high, best)
            elif isinstance(step, Times):
                found[j] = planes(*factors(step, frame), low, high)
        return found

    def free(self, frame: Frame, *, upto: int | None = None) -> dict[Side, Tensor]:
        """[batch, n]: of which entries the relaxations have something to choose, by step and side."""
        found: dict[Side, Tensor] = {}
        for j, step in enumerate(self.steps[:upto]):
            if isinstance(step, Function):
                low, high = frame.lower[step.source], frame.upper[step.source]
                mask = bent(step.op, low, high) & (high - low < (step.op.ring.period or math.inf))
                sides = zip((0, 1), open_sides(step.op, low, high), strict=True)
            elif isinstance(step, Times):
                xl, xu, yl, yu = factors(step, frame)
                mask = (xl < xu) & (yl < yu) & torch.isfinite(xu - xl) & torch.isfinite(yu - yl)
                sides = zip((0, 1), (mask, mask), strict=True)
            else:
                continue
            found |= {(j, side): mask & own for side, own in sides if bool((mask & own).any())}
        return found

    # ---------------------------------------------------------------- the backward pass

    def backward(
        self,
        frame: Frame,
        lines: Relaxations,
        start: Start,
        *,
        splits: Mapping[int, Split] | None = None,
        keep: bool = False,
        until: Collection[int] = (),
    ) -> Pass:
        """Carries rows back to the inputs, or to some steps where they are left."""
        a, d, owner = dict(start.a), start.d, start.owner
        alone = len(frame) == 1

        def of(v: Tensor) -> Tensor:
            """A batch's numbers, row by row."""
            return v if owner is None or alone else v.index_select(0, owner)

        kept, rest, last = {}, {}, dict[int, Tensor]()
        for i in range(max(a, default=0), 0, -1):
            if i not in a:
                continue
            here = a.pop(i)
            if i in until:
                rest[i] = here
                continue
            step = self.steps[i]
            if splits is not None and i in splits:
                split = splits[i]
                force = split.sign * split.multiplier
                here = here - of(force)
                d = d + of((force * split.at).sum(-1))
            parts: list[tuple[int, Tensor]]
            match step:
                case Affine(maps, bias):
                    d = d + here @ bias
                    parts = [(source, m.pull(here)) for m, source in maps]
                case Function(source, op):
                    if keep:
                        kept[i] = here
                    line = lines[i]
                    assert isinstance(line, Lines)
                    slopes_of = kink(op)
                    if slopes_of is not None and slopes_of[1] >= slopes_of[0]:  # the lower line goes through 0
                        d = d + (here.clamp(max=0) * of(line.offset_high)).sum(-1)
                        parts = [(source, here * torch.where(here >= 0, of(line.slope_low), of(line.slope_high)))]
                    else:
                        up, down = here.clamp(min=0), here.clamp(max=0)
                        d = d + _meet(up, of(line.offset_low)) + _meet(down, of(line.offset_high))
                        parts = [(source, up * of(line.slope_low) + down * of(line.slope_high))]
                case Times(left, right):
                    if keep:
                        kept[i] = here
                    if frame.factors is not None and i in frame.factors:
                        last[i] = here
                    plane = lines[i]
                    assert isinstance(plane, Planes)
                    p = Planes(*(of(v) for v in plane))
                    up, down = here.clamp(min=0), here.clamp(max=0)
                    d = d + _meet(up, p.c_low) + _meet(down, p.c_high)
                    parts = [(left, up * p.x_low + down * p.x_high), (right, up * p.y_low + down * p.y_high)]
            for source, part in parts:
                a[source] = a[source] + part if source in a else part
        if last and frame.factors is not None:
            d = d - remainder(frame.factors, last, owner)
        x = a.get(0)
        if x is None:
            x = d.new_zeros(len(d), self.program.inputs)
        if splits is not None and 0 in splits:
            force = splits[0].sign * splits[0].multiplier
            x, d = x - of(force), d + of((force * splits[0].at).sum(-1))
        return Pass(x, d, kept, rest, self.ball)

    def follow(self, lines: Relaxations, found: Pass, x: Tensor) -> list[Tensor]:
        """Where the point x [rows, inputs] goes under the very planes that a pass chose, one row per subproblem: the
        gradient of a bound in a slope is a coefficient times such a value (envelope theorem)."""
        values: list[Tensor] = []
        for i, step in enumerate(self.steps):
            match step:
                case Variable():
                    values.append(x)
                case Affine(parts, bias):
                    total = bias.expand(len(x), -1)
                    for part, source in parts:
                        total = total + part.apply(values[source])
                    values.append(total)
                case Function(source):
                    line = lines[i]
                    assert isinstance(line, Lines)
                    v = values[source]
                    low, high = line.slope_low * v + line.offset_low, line.slope_high * v + line.offset_high
                    values.append(torch.where(found.kept[i] >= 0, low, high) if i in found.kept else low)
                case Times(left, right):
                    p = lines[i]
                    assert isinstance(p, Planes)
                    u, v = values[left], values[right]
                    low, high = p.x_low * u + p.y_low * v + p.c_low, p.x_high * u + p.y_high * v + p.c_high
                    values.append(torch.where(found.kept[i] >= 0, low, high) if i in found.kept else low)
        return values


def _boxes(frame: Frame, start: Start) -> tuple[Tensor, Tensor]:
    """The box of each row."""
    low, high = frame.lower[0], frame.upper[0]
    return (low, high) if len(frame) == 1 or start.owner is None else (low[start.owner], high[start.owner])


def plainly(frame: Frame, start: Start) -> Tensor:
    """Lower bounds [rows] of rows from intervals alone: where functions jump they may say more than planes."""
    total = start.d
    for i, a in start.a.items():
        low, high = frame.lower[i], frame.upper[i]
        if start.owner is not None and len(frame) > 1:
            low, high = low.index_select(0, start.owner), high.index_select(0, start.owner)
        total = total + _meet(a.clamp(min=0), low) + _meet(a.clamp(max=0), high)
    return total.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


def copied(step: Step) -> Sparse | None:
    """The map of a step whose every entry is one entry of another step, scaled and shifted."""
    if not isinstance(step, Affine) or len(step.parts) != 1:
        return None
    part = step.parts[0][0]
    return part if isinstance(part, Sparse) and part.selects else None


def _meet(a: Tensor, b: Tensor) -> Tensor:
    """sum a * b over the last axis, where zero times infinity is zero."""
    return torch.where(a == 0, torch.zeros_like(a), a * b).sum(-1) if bool(torch.isinf(b).any()) else (a * b).sum(-1)


def step_rows(entry: Tensor, size: int, like: Tensor) -> Tensor:
    """Unit rows [k, size]."""
    rows = like.new_zeros(len(entry), size)
    return rows.scatter_(1, entry[:, None], 1.0)


def entries(m: Map, entry: Tensor, like: Tensor) -> Tensor:
    """The map's coefficients for some of its outputs [k, inputs]."""
    match m:
        case Matrix(weight, 1):
            return weight.index_select(0, entry)
        case Sparse() if m._dense is not None:
            return m._dense.index_select(0, entry)
        case Matrix() | Convolution() | Sparse():
            return m.pull(step_rows(entry, m.size[0], like))


def factors(step: Times, frame: Frame) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return frame.lower[step.left], frame.upper[step.left], frame.lower[step.right], frame.upper[step.right]
