"""Waking functions that were flat wherever an attack has been, because nothing flows back through them.

A ReLU that is zero, or a tanh that is saturated, at every point met so far hides what depends on it from descent along
gradients. Each such entry whose interval says that it need not be so gets an attack of its own: points climb what it
reads, until it may be awake. Ordinary descent goes on from there; what is found is again a candidate and no more.

Points climb along gradients averaged over a neighbourhood that shrinks geometrically, to the last digits: maxima of
minima, as of sums of -|x_i - c_i| or of their least, lie at kinks that a single gradient steps over.

References: Pei et al., "DeepXplore", SOSP 2017 (activating neurons that no test has); Burke, Lewis, Overton, "A Robust
Gradient Sampling Algorithm", 2005 (averaged gradients).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soundly.bounds.program import Function, Program
from soundly.graph.elementwise import Elementwise
from soundly.verification.attack import Attack

SAMPLES = 256
"""Random points by which functions are taken to be flat."""
FLAT, STEEP = 1e-6, 1e-3
"""Slopes up to FLAT lead nowhere; one of STEEP somewhere in its interval makes a function worth waking."""
AT_ONCE, POINTS, NEIGHBOURS, PLACES = 16, 8, 8, 8
"""Entries that are tried together, points that climb for each, neighbours whose gradients are averaged, and single
entries of the input that are moved in each round."""
ROUNDS, LAST = 100, 1e-8
"""Rounds of a climb, and its last step in widths of the box."""
CLIMB = ROUNDS * POINTS * (3 * (NEIGHBOURS + 1) + 10 + PLACES)
"""About how many evaluations a climb takes for each entry."""


@dataclass(frozen=True)
class Entry:
    """An entry of a function that is flat at all points seen: the step that the function reads, which of its entries,
    and the sign of the direction in which it would wake."""

    source: int
    entry: int
    sign: float


class Waking:
    """Goes through the dormant entries of an attack's program, those first that promise most.

    Args:
        attack: where points go; its program, or a longest common beginning of it, is what the intervals are of.
        lower, upper: [n] per step.
    """

    def __init__(self, attack: Attack, lower: Sequence[Tensor], upper: Sequence[Tensor]) -> None:
        self.attack, self.program = attack, attack.fine
        self.lower, self.upper = ([v.double() for v in ends] for ends in (lower, upper))
        self.tried: set[Entry] = set()
        self.generator = torch.Generator(attack.device).manual_seed(1)
        share = self._random(SAMPLES, len(attack.lower))
        self.seen = attack.inside(attack.lower + share * (attack.upper - attack.lower))

    def run(self, deadline: float) -> None:
        """Tries entries until the deadline, a counterexample, or the last one; with all tried, begins anew. Nothing is
        begun that would take longer than there is time."""
        self.attack.deepen()
        while not self.attack.done(deadline):
            begun = time.monotonic()
            dormant = [e for e in self.dormant() if e not in self.tried]
            if not dormant:
                self.tried.clear()
                return
            each = CLIMB * (time.monotonic() - begun) / len(self.seen)
            source = dormant[0].source
            some = [e for e in dormant if e.source == source][: min(AT_ONCE, int((deadline - begun) / each))]
            if not some:
                return
            points = self._climb(source, some, deadline)
            self.tried.update(some)
            self.seen = torch.cat([self.seen, points])[-2 * SAMPLES :]
            self.attack.offer(points)
            if not self.attack.done(deadline):
                self.attack.run(points, steps=20, restarts=len(points), deadline=deadline)

    def dormant(self) -> list[Entry]:
        """The entries that are flat at every point seen and need not be: first those whose waking would, by the
        gradients at the best points, bring a counterexample nearest."""
        program, found, worth = self.program, list[Entry](), list[Tensor]()
        parts = [program.evaluate(p) for p in self.seen.split(self.attack.batch)]
        values = [torch.cat(each) for each in zip(*parts, strict=True)]
        force = self._forces()
        for j, step in enumerate(program.steps):
            if not isinstance(step, Function):
                continue
            i, v = step.source, values[step.source]
            e = (_slope(step.op, v) <= FLAT).all(0).nonzero()[:, 0]
            ways, changes = [], []
            for sign, end in ((1.0, self.upper[i]), (-1.0, self.lower[i])):
                last = sign * (sign * v[:, e]).amax(0)
                far = sign * (last.abs() + 1) * 2.0 ** torch.arange(-8, 3, dtype=v.dtype)[:, None]
                inside = (last + far).minimum(end[e]) if sign > 0 else (last + far).maximum(end[e])
                ways.append(_slope(step.op, inside).amax(0))
                changes.append(torch.nan_to_num(step.op.apply(inside[-1]) - step.op.apply(last)))
            up = ways[0] >= ways[1]
            awake = torch.maximum(*ways) >= STEEP
            gain = torch.nan_to_num(-force[j][e] * torch.where(up, *changes))
            for k in awake.nonzero()[:, 0].tolist():
                found.append(Entry(i, int(e[k]), 1.0 if up[k] else -1.0))
                worth.append(gain[k])
        order = torch.stack(worth).argsort(descending=True, stable=True).tolist() if worth else []
        return [found[k] for k in order]

    def _forces(self) -> dict[int, Tensor]:
        """How the measure changes with each function's values, on average over the best points."""
        program, moved = self.program, dict[int, Tensor]()

        def with_force(j: int, step: Function) -> Function:
            op = step.op
            moved[j] = self.seen.new_zeros(step.size).requires_grad_()
            return replace(step, op=replace(op, kernel=lambda x: op.apply(x) + moved[j]))

        free = Program(tuple(with_force(j, s) if isinstance(s, Function) else s for j, s in enumerate(program.steps)))
        best = self.attack.kept
        with torch.enable_grad():
            rows = self.attack.fine_rows
            worst = rows.worst(rows.at(free.evaluate(best)[-1], best)).amin(-1)
            total = worst[torch.isfinite(worst)].sum()
            slopes = torch.autograd.grad(total, list(moved.values()), allow_unused=True) if len(best) else ()
        none = [torch.zeros_like(v) for v in moved.values()]
        return dict(zip(moved, (n if s is None else s for s, n in zip(slopes or none, none, strict=True)), strict=True))

    def _climb(self, source: int, entries: Sequence[Entry], deadline: float) -> Tensor:
        """The points [k, n] where what the entries read is largest, in their direction, among all that were met."""
        program, attack = Program(self.program.steps[: source + 1]), self.attack
        entry = torch.tensor([e.entry for e in entries]).repeat_interleave(POINTS)
        sign = self.seen.new_tensor([e.sign for e in entries]).repeat_interleave(POINTS)
        width = attack.upper - attack.lower
        vary = (width > 0).nonzero()[:, 0]

        def height(x: Tensor) -> Tensor:  # [t, k, n] to [t, k]
            y = program.evaluate(x)[-1].gather(2, entry.expand(len(x), -1)[..., None])[..., 0]
            return torch.nan_to_num(sign * y, nan=-math.inf, posinf=-math.inf)

        seen = torch.cat([program.evaluate(p)[-1] for p in self.seen.split(attack.batch)])
        known = torch.nan_to_num(torch.stack([e.sign * seen[:, e.entry] for e in entries]), nan=-math.inf)
        best = self.seen[known.topk(POINTS).indices.flatten()]
        top = height(best[None])[0]
        most = max(1, attack.batch // len(best))
        for t in range(ROUNDS):
            if time.monotonic() >= deadline:
                break
            length = 0.25 * (4 * LAST) ** (t / ROUNDS)
            around = best + length * width * (2 * self._random(NEIGHBOURS, *best.shape) - 1)
            around = torch.cat([best[None], attack.inside(around.flatten(0, 1)).view_as(around)])
            gradient = torch.cat([_gradient(height, p) for p in around.split(most)])
            steps = length * 2.0 ** torch.arange(-2, 3, dtype=best.dtype, device=best.device)
            ways = torch.stack([gradient[0].sign(), gradient.mean(0).sign()])
            trials = (best + (steps[:, None, None, None] * ways * width)).flatten(0, 1)
            # Single entries of the input, near and far: what is flat in all of them but a few has no gradient.
            which = vary[torch.randint(len(vary), (PLACES, len(best), 1), generator=self.generator)]
            share = self._random(PLACES, len(best), 1)
            near = best.expand(PLACES, -1, -1).gather(2, which) + 4 * length * width[which] * (2 * share - 1)
            far = attack.lower[which] + share * width[which]
            place = torch.where(self._random(PLACES, len(best), 1) < 0.5, near, far)
            trials = torch.cat([trials, best.expand(PLACES, -1, -1).scatter(2, which, place)])
            trials = attack.inside(trials.flatten(0, 1)).view_as(trials)
            value, k = torch.cat([height(p) for p in trials.split(most)]).max(0)
            better = (value > top).nonzero()[:, 0]
            best[better], top[better] = trials[k[better], better], value[better]
        return best

    def _random(self, *size: int) -> Tensor:
        return torch.rand(size, dtype=torch.float64, device=self.attack.device, generator=self.generator)


def _gradient(height: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(height(x).sum(), x)
    return torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)


def _slope(op: Elementwise, x: Tensor) -> Tensor:
    """Absolute slopes; zero where they are not defined."""
    return torch.nan_to_num(op.derivative.apply(x), nan=0.0, posinf=math.inf, neginf=-math.inf).abs()
