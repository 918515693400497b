"""Searching a box for counterexamples: batches of points that descend along gradients, in pieces that a search can
interleave with bounding.

Nothing here is trusted: a candidate counts after `soundly.verification.replay` has confirmed it. Points start at the
centre, corners, random places and where the outputs differ most; each heads for a clause of its own, and the best ones
are polished in float64. Jumps (sign, step, the derivative of ReLU) have no slope that gradients could follow; theirs
is replaced by that of a sigmoid as wide as what it reads is spread.

References: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018 (projected gradient
descent); Tashiro, Song, Ermon, "Diversity Can Be Enhanced", NeurIPS 2020 (diversified output initialisation);
Andriushchenko et al., "Square Attack", ECCV 2020 (search without gradients); Frank and Wolfe, 1956 (steps in balls).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from soundly.bounds.program import Affine, Function, Program, Times
from soundly.graph.elementwise import EXP, RECIPROCAL, Elementwise
from soundly.verification.rows import Rows

KEPT = 16
"""How many of the best points are remembered."""
MEMORY = 2**25
"""About how many numbers a batch may hold in all its steps together."""

Loss = Callable[[Tensor, Tensor], Tensor]
Project = Callable[[Tensor], Tensor]


class Attack:
    """The search for a counterexample of one case, with what it has found so far.

    Args:
        program: decides the floating type and device of the descent.
        rows: the clauses.
        lower, upper: the box [n].
        seed: equal seeds give equal candidates, time limits apart.
        project: moves points [k, n] into a region within the box, such as a ball.
        lowest: points [k, n] of that region where rows a [k, n] are least.

    Attributes:
        best: the least measure met so far (infinite before the first run), and its point [n] in float64. The measure,
            the least over clauses of their largest row (between logits where `logits` finds some), is not positive at
            a counterexample.
    """

    def __init__(
        self,
        program: Program,
        rows: Rows,
        lower: Tensor,
        upper: Tensor,
        seed: int,
        project: Project | None = None,
        lowest: Project | None = None,
    ) -> None:
        self.program = program = logits(program, rows)
        self.dtype, self.device = next(
            ((step.bias.dtype, step.bias.device) for step in program.steps if isinstance(step, Affine)),
            (lower.dtype, lower.device),
        )
        self.rows = rows.to(self.dtype, self.device)
        self.lower, self.upper = (end.to(self.device, torch.float64) for end in (lower, upper))
        self.project, self.lowest = project, lowest
        self.best: tuple[float, Tensor] = (math.inf, (self.lower / 2 + self.upper / 2).cpu())
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._kept = self.lower.new_empty((0, len(self.lower)))
        self._kept_values = self.lower.new_empty(0)
        self._promise = torch.full((rows.clauses,), math.inf, dtype=self.dtype, device=self.device)
        self._goal = 0.0
        self._runs = 0
        self.batch = max(1, MEMORY // (sum(step.size for step in program.steps) + len(rows)))

    # -- the interface

    def values(self, x: Tensor) -> Tensor:
        """The measure [k] of points [k, n] that come for free; infinite where an output is not finite."""
        x = self.inside(x.to(self.device, torch.float64))
        value = self._measured(x.to(self.dtype)).double()
        self._keep(x, value)
        return value.cpu()

    def run(self, starts: Tensor | None = None, *, steps: int, restarts: int, deadline: float = math.inf) -> Tensor:
        """Searches from `restarts` points, and stops early at a counterexample. To run again after one is to ask for
        one that lies deeper.

        Args:
            starts: points [k, n] to begin with; the rest is drawn anew in every run.
            steps: of descent. Without any the starting points are evaluated, nothing more.
            restarts: how many points.
            deadline: the time (of `time.monotonic`) to stop at; one step may exceed it.

        Returns:
            The best points of all runs so far [k, n], best first, in float64 on the CPU.
        """
        if not len(self.rows) or not bool((self.lower <= self.upper).all()):
            return self._kept.cpu()
        self.deepen()
        x = self._starts(starts, restarts)
        self.values(x)
        for part in x.split(self.batch) if steps else ():
            if self.done(deadline):
                break
            part = part.to(self.dtype)
            if self._runs % 2:
                part = self._diversified(part, min(steps, 5), deadline)
            part = self._descend(part, self._towards(part), steps, deadline)
            if not self.done(deadline):
                self._polish(2 + steps // 10, deadline)
            if self._jumps and not self.done(deadline):
                self._flip(steps, deadline)
        self._runs += 1
        return self._kept.cpu()

    def offer(self, x: Tensor) -> None:
        """Evaluates points [k, n] in float64."""
        x = self.inside(x.to(self.device, torch.float64))
        self._keep(x, self._measured(x, fine=True))

    def deepen(self) -> None:
        """Asks for a counterexample that lies deeper than one that is known."""
        if self.best[0] <= self._goal:
            self._goal = 2 * self.best[0] - 1e-6 * float(self._kept_values.abs().max()) - 1e-12

    def search(self, deadline: float = math.inf, *, rounds: int = 8) -> Tensor:
        """Runs of growing size until a counterexample, the deadline, or the last round."""
        found = self.run(steps=0, restarts=min(64, self.batch))
        for k in range(rounds):
            if self.done(deadline):
                break
            found = self.run(steps=10 * 2 ** min(k, 4), restarts=min(8 * 2 ** min(k, 4), self.batch), deadline=deadline)
        return found

    # -- points and their values

    @property
    def kept(self) -> Tensor:
        """The best points so far [k, n], best first, in float64."""
        return self._kept

    def done(self, deadline: float) -> bool:
        """Whether there is a counterexample, as deep as was asked for, or no time."""
        return self.best[0] <= self._goal or time.monotonic() >= deadline

    def inside(self, x: Tensor) -> Tensor:
        """Points [k, n] moved into the region."""
        x = torch.minimum(torch.maximum(x, self.lower.to(x)), self.upper.to(x))
        return x if self.project is None else self.project(x).to(x)

    def _worst(self, x: Tensor, program: Program, rows: Rows) -> tuple[Tensor, Tensor]:
        """The rows [k, R] and the largest of each clause [k, clauses], infinite where they are not finite."""
        value = rows.at(program.evaluate(x)[-1], x)
        value = torch.where(torch.isfinite(value), value, math.inf)
        return value, rows.worst(value)

    @torch.no_grad()
    def _measured(self, x: Tensor, *, fine: bool = False) -> Tensor:
        program, rows = (self.fine, self.fine_rows) if fine else (self.program, self.rows)
        found = []
        for part in x.split(self.batch):
            worst = self._worst(part, program, rows)[1]
            self._promise = torch.minimum(self._promise, worst.amin(0).to(self.dtype))
            found.append(worst.amin(-1))
        return torch.cat(found)

    def _keep(self, x: Tensor, value: Tensor) -> None:
        """Remembers the best points."""
        value, order = value.double().topk(min(KEPT, len(value)), largest=False)
        values, points = torch.cat([self._kept_values, value]), torch.cat([self._kept, x[order].double()])
        values, order = values.sort(stable=True)
        fresh = torch.isfinite(values)
        fresh[1:] &= values[1:] != values[:-1]
        order = order[fresh][:KEPT]
        self._kept_values, self._kept = values[fresh][:KEPT], points[order]
        if len(order) and float(self._kept_values[0]) < self.best[0]:
            self.best = float(self._kept_values[0]), self._kept[0].cpu()

    def _random(self, *size: int) -> Tensor:
        return torch.rand(size, dtype=self.dtype, device=self.device, generator=self._generator)

    def _starts(self, given: Tensor | None, restarts: int) -> Tensor:
        """Points given, the best so far, the centre at first, then half corners and half uniform ones: [k, n]."""
        parts = [] if given is None else [given.to(self.device, torch.float64)]
        parts += [self._kept[: restarts // 4]] if self._runs else [(self.lower / 2 + self.upper / 2)[None]]
        missing = max(restarts - sum(map(len, parts)), 0)
        share = self._random(missing, len(self.lower)).double()
        share[::2] = share[::2].round()
        parts.append(self.lower + share * (self.upper - self.lower))
        return self.inside(torch.cat(parts))

    # -- descent

    def _towards(self, x: Tensor) -> Loss:
        """A loss that draws each point to a clause: every other one to that nearest to it, the others to the most
        promising ones in turn."""
        with torch.no_grad():
            target = self._worst(x, self.program, self.rows)[1].argmin(-1)
        order = self._promise.argsort()
        others = target[1::2]
        others.copy_(order[torch.arange(len(others), device=self.device) % min(len(order), max(4, len(others)))])
        mine = self.rows.clause == target[:, None]

        def loss(y: Tensor, x: Tensor) -> Tensor:
            rows = torch.where(mine, self.rows.at(y, x), -math.inf)
            return (rows - self._goal).clamp(min=0).sum(-1) + rows.amax(-1)

        return loss

    def _diversified(self, x: Tensor, steps: int, deadline: float) -> Tensor:
        """Points moved along random directions of the outputs."""
        way = 2 * self._random(len(x), self.program.outputs) - 1
        return self._descend(x, lambda y, _: (y * way).sum(-1), steps, deadline)

    def _descend(self, x: Tensor, loss: Loss, steps: int, deadline: float) -> Tensor:
        """Projected descent: one half by signs, or towards where the gradient is least, the other by Adam. Points
        without a gradient are drawn anew."""
        width = (self.upper - self.lower).to(self.dtype)
        mean, square = torch.zeros_like(x), torch.zeros_like(x)
        best, least = x.clone(), x.new_full((len(x),), math.inf)
        for t in range(steps):
            gradient, value = self._slope(x, loss)
            better = value < least
            least, best = torch.where(better, value, least), torch.where(better[:, None], x, best)
            if bool((value <= self._goal).any()):
                break
            gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
            mean, square = 0.75 * mean + 0.25 * gradient, 0.9 * square + 0.1 * gradient**2
            adam = (mean / (1 - 0.75 ** (t + 1))) / ((square / (1 - 0.9 ** (t + 1))).sqrt() + 1e-30)
            way = gradient.sign()
            way[::2] = adam[::2]
            length = 0.25 * 0.02 ** (t / steps)
            moved = x - length * width * way
            if self.lowest is not None:
                moved[1::2] = torch.lerp(x[1::2], self.lowest(gradient[1::2].double()).to(x), length)
            x = self.inside(moved)
            still = (gradient == 0).all(-1)
            if bool(still.any()):
                drawn = self.inside(self.lower + self._random(int(still.sum()), x.shape[1]) * width)
                x[still] = drawn.to(self.dtype)
            if time.monotonic() >= deadline:
                break
        else:
            self.values(x)
        self._keep(best, least)
        return x

    def _slope(self, x: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """The gradient of the loss at each point, and the points' measure."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = self._smooth.evaluate(x)[-1]
            total = loss(y, x).sum()
            gradient = derivative(total, x)
        with torch.no_grad():
            rows = self.rows.at(y, x)
            worst = self.rows.worst(torch.where(torch.isfinite(rows), rows, math.inf))
            self._promise = torch.minimum(self._promise, worst.amin(0))
        return gradient, worst.amin(-1)

    @cached_property
    def _jumps(self) -> bool:
        return any(isinstance(step, Function) and _jumps(step.op) for step in self.program.steps)

    @cached_property
    def _smooth(self) -> Program:
        """The program with slopes at jumps; its values are the same."""
        if not self._jumps:
            return self.program
        return Program(tuple(_with_slope(s) if isinstance(s, Function) else s for s in self.program.steps))

    # -- refinement of the best points

    @cached_property
    def fine(self) -> Program:
        """The program in float64."""
        return self.program if self.dtype == torch.float64 else self.program.to(torch.float64, self.device)

    @cached_property
    def fine_rows(self) -> Rows:
        return self.rows if self.dtype == torch.float64 else self.rows.to(torch.float64, self.device)

    def _polish(self, rounds: int, deadline: float) -> None:
        """Line searches in float64 from the best points."""
        for k in range(rounds):
            if self.done(deadline) or not len(self._kept):
                return
            x, before = self._kept[k % 2 % len(self._kept)], self.best[0]
            trials = self.inside(torch.cat([self._lines(x), self._coordinates(x)]))
            self._keep(trials, self._measured(trials, fine=True))
            if k % 2 and not self.best[0] < before:
                return

    def _lines(self, x: Tensor) -> Tensor:
        """Points along mixtures of the gradients of the largest rows of x's best clause."""
        width, jumps = self.upper - self.lower, self._jumps
        x = x.clone().requires_grad_()
        program = self.fine
        if jumps:
            program = Program(tuple(_with_slope(s) if isinstance(s, Function) else s for s in program.steps))
        with torch.enable_grad():
            rows, worst = self._worst(x[None], program, self.fine_rows)
            mine = (self.fine_rows.clause == worst[0].argmin()).nonzero().flatten()
            mine = mine[rows[0, mine].topk(min(len(mine), 8)).indices]
            slopes = [derivative(rows[0, i], x) for i in mine.tolist()]
        gradients = torch.nan_to_num(torch.stack(slopes), nan=0.0, posinf=0.0, neginf=0.0)
        weights = torch.zeros((1 if len(mine) == 1 else 6, len(mine)), dtype=torch.float64, device=self.device)
        weights[:, 0] = 1
        if len(mine) > 1:
            weights[1] = 1 / len(mine)
            weights[2:] = -self._random(len(weights) - 2, len(mine)).double().clamp(min=1e-9).log()
        mixed = weights @ gradients
        scaled = mixed * width**2
        scaled = scaled / (scaled.abs() / width.clamp(min=1e-300)).amax(-1, keepdim=True).clamp(min=1e-300)
        ways = torch.cat([mixed.sign() * width, scaled])
        lengths = 4.0 ** -torch.arange(0, 12, dtype=torch.float64, device=self.device)
        # The shortest step, measured in widths, that the linear model says ends all violations: Gauss-Newton.
        excess = rows.detach()[0, mine] - self._goal
        wrong = torch.isfinite(excess) & (excess > 0)
        newton = width * (torch.linalg.pinv(gradients[wrong] * width) @ excess[wrong])
        shares = lengths.new_tensor([0.25, 0.5, 1.0, 1.01, 1.5, 4.0])
        steps = torch.cat([(lengths[:, None, None] * ways).flatten(0, 1), shares[:, None] * newton])
        return x.detach() - steps

    def _coordinates(self, x: Tensor) -> Tensor:
        """Single entries moved to either end and to random places; for inputs that are few."""
        vary = (self.upper > self.lower).nonzero().flatten()
        if len(vary) > 32:
            return x.new_empty((0, len(x)))
        places = [self.lower, self.upper, self.lower + self._random(len(x)).double() * (self.upper - self.lower)]
        trials = x.repeat(len(places), len(vary), 1)
        for trial, place in zip(trials, places, strict=True):
            trial[torch.arange(len(vary)), vary] = place[vary]
        return trials.flatten(0, 1)

    def _flip(self, rounds: int, deadline: float) -> None:
        """From the best point, random entries moved to an end: fewer and fewer as the rounds go by."""
        count = min(self.batch, 64)
        for k in range(rounds):
            if self.done(deadline) or not len(self._kept):
                return
            x = self._kept[0].to(self.dtype).expand(count, -1)
            share = 0.3 * 0.01 ** (k / rounds)
            chosen = self._random(*x.shape) < share
            end = torch.where(self._random(*x.shape) < 0.5, self.lower.to(x), self.upper.to(x))
            self.values(torch.where(chosen, end, x))


def logits(program: Program, rows: Rows) -> Program:
    """The program without a final softmax over all outputs, where every row compares two outputs: w (y_i - y_j) has the
    same sign before and after it, but no gradient where it saturates. Otherwise the program itself."""
    steps, last = program.steps, program.steps[-1]
    pairs = not rows.reads_inputs and not bool(rows.constant.any())
    pairs = pairs and bool(((rows.y != 0).sum(-1) == 2).all()) and bool((rows.y.sum(-1) == 0).all())
    if not pairs or not isinstance(last, Times):
        return program
    for top, share in ((last.left, last.right), (last.right, last.left)):
        exp, spread = steps[top], steps[share]
        if not isinstance(exp, Function) or exp.op != EXP or not isinstance(spread, Affine) or spread.bias.any():
            continue
        inverse = steps[spread.sources[0]]
        if len(spread.parts) != 1 or not isinstance(inverse, Function) or inverse.op != RECIPROCAL or inverse.size != 1:
            continue
        total = steps[inverse.source]
        if not isinstance(total, Affine) or total.sources != (top,) or bool((total.bias < 0).any()):
            continue
        factors = spread.parts[0][0].apply(torch.ones_like(total.bias))
        positive = bool((total.parts[0][0].pull(torch.ones_like(total.bias)) > 0).all())
        if positive and bool((factors == factors[0]).all()) and bool(factors[0] > 0):
            return Program(steps[: exp.source + 1])
    return program


def derivative(value: Tensor, x: Tensor) -> Tensor:
    """The derivative of a number, zero where it does not depend on x."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    found = torch.autograd.grad(value, x, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(x) if found is None else found


def _jumps(op: Elementwise) -> list[tuple[float, float]]:
    """Where the function jumps, and by how much."""

    def value(i: int, t: float) -> float:
        return float(op.ring.evaluate(op.pieces[i], torch.tensor(t, dtype=torch.float64)))

    each = [(t, value(i + 1, t) - value(i, t)) for i, t in enumerate(op.breaks)]
    return [(t, jump) for t, jump in each if abs(jump) > 1e-9]


def _with_slope(step: Function) -> Function:
    """The same function with a backward pass that sees jumps as steep sigmoids."""
    op, jumps = step.op, _jumps(step.op)
    if not jumps:
        return step

    def kernel(x: Tensor) -> Tensor:
        value = op.apply(x)
        spread = x.detach().square().mean(-1, keepdim=True).sqrt() + 1e-30
        soft = sum((jump / 2 * torch.tanh((x - t) / spread) for t, jump in jumps), torch.zeros_like(x))
        return value + (soft - soft.detach())

    return replace(step, op=replace(op, kernel=kernel))
