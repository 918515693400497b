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
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from soundly.bounds.program import Function, Program
from soundly.graph.elementwise import Elementwise
from soundly.verification.attack import Attack, derivative

SAMPLES = 256
"""Random points by which functions are taken to be flat."""
FLAT, STEEP = 1e-6, 1e-3
"""Slopes up to FLAT lead nowhere; one of STEEP somewhere in its interval makes a function worth waking."""
AT_ONCE, POINTS, NEIGHBOURS, PLACES = 16, 8, 8, 8
"""Entries that are tried together, points that climb for each, neighbours whose gradients are averaged, and single
entries of the input that are moved in each round."""
ROUNDS, LAST = 100, 1e-8
"""Rounds of a climb, and its last step in widths of the box."""
EVALUATIONS = 3 * (NEIGHBOURS + 1) + 10 + PLACES
"""About how many evaluations a round takes for each point."""


@dataclass(frozen=True, eq=False)
class Dormant:
    """Entries of functions that are flat at all points seen, and need not be: [k] each.

    Attributes:
        source: the step that the function reads.
        entry: which of its entries.
        sign: of the direction in which it would wake.
        worth: how much nearer to a counterexample that would come, by the gradients at the best points.
    """

    source: Tensor
    entry: Tensor
    sign: Tensor
    worth: Tensor

    def __len__(self) -> int:
        return len(self.source)

    def pick(self, index: Tensor | slice) -> Dormant:
        return Dormant(self.source[index], self.entry[index], self.sign[index], self.worth[index])


NONE = Dormant(*torch.empty(4, 0))


class Waking:
    """Goes through the dormant entries of an attack's program, those first that promise most.

    Args:
        attack: where points go; the intervals are of the steps of its program, and perhaps of more after them.
        lower, upper: [n] per step.
    """

    def __init__(self, attack: Attack, lower: Sequence[Tensor], upper: Sequence[Tensor]) -> None:
        self.attack, self.program = attack, attack.fine
        self.lower, self.upper = lower, upper
        self.tried: set[tuple[int, int, float]] = set()
        self.generator = torch.Generator(attack.device).manual_seed(1)
        self.seen = self._samples()

    def run(self, deadline: float) -> None:
        """Tries entries until the deadline, a counterexample, or the last one; with all tried, begins anew. Nothing is
        begun that would take longer than there is time."""
        attack = self.attack
        if not len(attack.kept) or not bool((attack.upper > attack.lower).any()):
            return
        attack.deepen()
        while not attack.done(deadline):
            begun = time.monotonic()
            dormant = self.dormant(deadline)
            if not len(dormant):
                if not self.tried:
                    return
                self.tried.clear()
                self.seen = self._samples()
                continue
            now = time.monotonic()
            first_round = EVALUATIONS * POINTS * (now - begun) / len(self.seen)  # of one entry, at most
            most = min(AT_ONCE, int(0.2 * (deadline - now) / first_round))
            some = dormant.pick((dormant.source == dormant.source[0]).nonzero()[:most, 0])
            points = self._climb(some, deadline) if len(some) else self.seen[:0]
            if not len(points):
                return
            if time.monotonic() < deadline:  # they are at the top
                self.tried.update(_keys(some.pick(slice(len(points) // POINTS))))
                self.seen = torch.cat([self.seen, points])[-2 * SAMPLES :]
            attack.offer(points)
            if not attack.done(deadline):
                attack.run(points, steps=20, restarts=len(points), deadline=deadline)

    def dormant(self, deadline: float = math.inf) -> Dormant:
        """The dormant entries that were not tried, the most promising ones first; none if there is no time to tell."""
        steps = self.program.steps
        functions = {j: step for j, step in enumerate(steps) if isinstance(step, Function)}
        flat = {j: torch.ones(step.size, dtype=torch.bool, device=self.seen.device) for j, step in functions.items()}
        least = {step.source: self.seen.new_full((step.size,), math.inf) for step in functions.values()}
        greatest = {i: -v for i, v in least.items()}
        for part in self.seen.split(self.attack.batch):
            values = self.program.evaluate(part)
            for j, step in functions.items():
                flat[j] &= (_slope(step.op, values[step.source]) <= FLAT).all(0)
            for i in least:
                least[i] = least[i].minimum(values[i].amin(0))
                greatest[i] = greatest[i].maximum(values[i].amax(0))
            if time.monotonic() >= deadline:
                return NONE
        forces = self._forces()
        found = []
        for j, step in functions.items():
            i, e = step.source, flat[j].nonzero()[:, 0]
            ways, changes = [], []
            for sign, last, end in ((1.0, greatest[i][e], self.upper[i][e]), (-1.0, least[i][e], self.lower[i][e])):
                away = sign * (last.abs() + 1) * 2.0 ** torch.arange(-8, 3, dtype=last.dtype)[:, None]
                met = (last + away).minimum(end.to(last)) if sign > 0 else (last + away).maximum(end.to(last))
                ways.append(_slope(step.op, met).amax(0))
                changes.append(step.op.apply(met[-1]) - step.op.apply(last))
            up = ways[0] >= ways[1]
            worth = torch.nan_to_num(-forces[j][e] * torch.where(up, changes[0], changes[1]))
            every = Dormant(torch.full_like(e, i), e, torch.where(up, 1.0, -1.0).to(worth), worth)
            found.append(every.pick(torch.maximum(*ways) >= STEEP))
        if not found:
            return NONE
        joined = Dormant(*(torch.cat([getattr(d, f.name) for d in found]) for f in fields(Dormant)))
        joined = joined.pick(joined.worth.argsort(descending=True, stable=True))
        fresh = [key not in self.tried for key in _keys(joined)]
        return joined.pick(torch.tensor(fresh, dtype=torch.bool))

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
            total = worst[torch.isfinite(worst)].sum() / len(best)
            slopes = torch.autograd.grad(total, list(moved.values()), allow_unused=True) if len(best) and moved else ()
        none = [torch.zeros_like(v) for v in moved.values()]
        return dict(zip(moved, (n if s is None else s for s, n in zip(slopes or none, none, strict=True)), strict=True))

    def _climb(self, some: Dormant, deadline: float) -> Tensor:
        """The points [POINTS k, n] where what entries of one step read is largest, in their direction, of all that were
        met; of the first k of the entries, for which there is time."""
        program, attack = Program(self.program.steps[: int(some.source[0]) + 1]), self.attack
        entry, sign = (v.repeat_interleave(POINTS) for v in (some.entry, some.sign))
        width = attack.upper - attack.lower
        vary = (width > 0).nonzero()[:, 0]

        def height(x: Tensor) -> Tensor:  # [t, k, n] to [t, k]
            y = program.evaluate(x)[-1].gather(2, entry.expand(len(x), -1)[..., None])[..., 0]
            return torch.nan_to_num(sign * y, nan=-math.inf, posinf=-math.inf)

        seen = torch.cat([program.evaluate(p)[-1][:, some.entry] for p in self.seen.split(attack.batch)])
        known = torch.nan_to_num(some.sign * seen, nan=-math.inf, posinf=-math.inf)
        best = self.seen[known.topk(POINTS, 0).indices.T.flatten()]
        top = height(best[None])[0]
        most = max(1, attack.batch // len(best))
        begun = time.monotonic()
        for t in range(ROUNDS):
            now = time.monotonic()
            if t == 1:
                kept = POINTS * int(min(1.0, (deadline - now) / (ROUNDS * (now - begun))) * len(some))
                best, top, entry, sign = (v[:kept] for v in (best, top, entry, sign))
            if now >= deadline or not len(best):
                break
            length = 0.25 * (4 * LAST) ** (t / ROUNDS)
            around = best + length * width * (2 * self._random(NEIGHBOURS, *best.shape) - 1)
            around = torch.cat([best[None], attack.inside(around.flatten(0, 1)).view_as(around)])
            slopes = torch.cat([_gradients(height, p) for p in around.split(most)])
            steps = length * 2.0 ** torch.arange(-2, 3, dtype=best.dtype, device=best.device)
            ways = torch.stack([slopes[0].sign(), slopes.mean(0).sign()])
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

    def _samples(self) -> Tensor:
        low, high = self.attack.lower, self.attack.upper
        return self.attack.inside(low + self._random(SAMPLES, len(low)) * (high - low))

    def _random(self, *size: int) -> Tensor:
        return torch.rand(size, dtype=torch.float64, device=self.attack.device, generator=self.generator)


def _keys(dormant: Dormant) -> list[tuple[int, int, float]]:
    return list(zip(dormant.source.tolist(), dormant.entry.tolist(), dormant.sign.tolist(), strict=True))


def _gradients(height: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.nan_to_num(derivative(height(x).sum(), x), nan=0.0, posinf=0.0, neginf=0.0)


def _slope(op: Elementwise, x: Tensor) -> Tensor:
    """Absolute slopes; zero where they are not defined."""
    return torch.nan_to_num(op.derivative.apply(x), nan=0.0, posinf=math.inf, neginf=-math.inf).abs()
