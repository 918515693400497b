"""Sums of absolute values at the end of a program, bounded together: how far many values move at once.

A chord above each |v| says how far each value can go, as if all could do so at one input. Instead every v gets affine
functions of the input on both sides, l <= v <= u, so that |v| <= (u - l) / 2 + |u + l| / 2. A row is then at least an
affine function less a sum of absolute values of affine ones, and what that is at most on a box is one norm of a matrix.

References: Grothendieck, "Résumé de la théorie métrique des produits tensoriels topologiques", 1953 (the norm is less
than 1.783 times too large); Burer and Monteiro, "A nonlinear programming algorithm for solving semidefinite programs
via low-rank factorization", 2003 (how it is found).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soundly.bounds.batch import Bounder
from soundly.bounds.frame import Frame, Side, Start
from soundly.bounds.lines import kink
from soundly.bounds.optimise import Freedom, Refined, bounds_of, first
from soundly.bounds.program import Affine, Function, Step

RANK, FIRST, NEXT = 16, 60, 20
"""The dimension of the vectors that make the norm, and how often they are improved at first and after a change."""
RATE, DECAY = 0.2, 0.8
"""The first step of slopes, of their range, and what remains of it a round later."""


@dataclass(frozen=True, eq=False)
class Summed:
    """Lower bounds [rows] of rows, and by the step of the values the slopes of the functions on both their sides."""

    bound: Tensor
    refined: dict[int, Refined]


def absolute(steps: Sequence[Step]) -> dict[int, float]:
    """The functions k |v| that only affine steps read, to the end, with their k."""
    straight = [True] * len(steps)
    for i in reversed(range(len(steps))):
        linear = isinstance(steps[i], Affine) and straight[i]
        for source in steps[i].sources:
            straight[source] &= linear
    kinks = {i: kink(s.op) for i, s in enumerate(steps) if straight[i] and isinstance(s, Function)}
    return {i: k[1] for i, k in kinks.items() if k is not None and k[0] == -k[1] != 0}


def summed(bounder: Bounder, frame: Frame, start: Start, *, rounds: int) -> Summed | None:
    """Lower bounds of rows of one subproblem, by sums of absolute values; None if there are no sums to be bounded."""
    steps, factor, box = bounder.steps, absolute(bounder.steps), (frame.lower[0], frame.upper[0])
    lines = bounder.lines(frame)
    found = bounder.backward(frame, lines, start, until=factor)
    weight, left = dict[int, Tensor](), {0: found.a}
    for j, a in found.left.items():
        source = steps[j].sources[0]
        both = (frame.lower[source] < 0) & (frame.upper[source] > 0)
        weight[j] = torch.where(both, -a * factor[j], 0.0).clamp(min=0)
        left[j] = torch.where(weight[j] > 0, 0.0, a)
    if not any(bool(((w > 0).sum(1) > 1).any()) for w in weight.values()):
        return None
    found = bounder.backward(frame, lines, Start(left, found.d, start.owner))
    parts = {j: w.any(0).nonzero()[:, 0] for j, w in weight.items()}
    chosen = torch.cat([weight[j][:, e] for j, e in parts.items()], 1)
    middle, radius = (box[0] + box[1])[0] / 2, (box[1] - box[0])[0] / 2
    rest = _Rest(*(v.double() for v in (found.a, found.d, chosen, middle, radius)))
    sides = {j: _Sides(bounder, frame, steps[j].sources[0], e) for j, e in parts.items() if len(e)}
    bound, best, vectors = rest.d.new_full((len(rest.d),), -math.inf), dict[int, dict[Side, Tensor]](), None
    for t in range(1, rounds + 2):
        forms = [own.forms() for own in sides.values()]
        a, d = (torch.cat([f[k] for f in forms], 1) for k in (0, 1))
        b, constant = rest.matrices(a, d)
        vectors = _vectors(b, vectors)
        now = constant - _norm(b, *vectors)
        if not best or float(now.sum()) > float(bound.sum()):
            bound, best = now, {j: dict(own.slopes) for j, own in sides.items()}
        if t <= rounds:
            begin = 0
            points = rest.points(*vectors)
            for own in sides.values():
                size = len(own.entry) // 2
                own.improve(points[:, begin : begin + size], RATE * DECAY ** (t - 1), t)
                begin += size
    refined = {own.i: Refined(own.entry, own.side, torch.arange(len(own.entry)), best[j]) for j, own in sides.items()}
    return Summed(bound, refined)


@dataclass(eq=False)
class _Rest:
    """Rows <a, x> + d less sums of weight |v|, on a box: a [rows, inputs], weight [rows, P]."""

    a: Tensor
    d: Tensor
    weight: Tensor
    middle: Tensor
    radius: Tensor

    def matrices(self, slope: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """b [rows, P + 1, inputs + 1], constant [rows]: rows are at least the constant less the norm of b, where every
        v >= <slope[0], x> + offset[0], -v >= <slope[1], x> + offset[1]."""
        half, total, gap = self.weight / 2, slope[0] + slope[1], slope[0] - slope[1]
        constant = self.d + self.a @ self.middle + half @ (total @ self.middle + offset.sum(0))
        inner = torch.cat([gap * self.radius, (gap @ self.middle + offset[0] - offset[1])[:, None]], 1)
        last = torch.nn.functional.pad((self.a + half @ total) * self.radius, (0, 1))
        return torch.cat([half[:, :, None] * inner, last[:, None]], 1), constant

    def points(self, s: Tensor, z: Tensor) -> Tensor:
        """[2, P, inputs]: where the bound asks both functions around each v to be good, as it is their value there, up
        to a factor, by which it depends on them (envelope theorem)."""
        inner = s @ z.transpose(1, 2)
        own, last, both = inner[:, :-1, :-1], inner[:, -1:, :-1], inner[:, :-1, -1:]
        found = []
        for sign in (1.0, -1.0):
            share = self.weight[:, :, None] * (1 - sign * both).clamp(min=1e-2)
            move = (self.weight[:, :, None] * (sign * own + last)).sum(0) / share.sum(0).clamp(min=1e-30)
            found.append(self.middle - self.radius * move)
        return torch.stack(found)


class _Sides:
    """Affine functions around some entries [P] of a step: first those below v, then those below -v."""

    def __init__(self, bounder: Bounder, frame: Frame, i: int, entry: Tensor) -> None:
        self.bounder, self.i, self.box = bounder, i, (frame.lower[0], frame.upper[0])
        self.entry, self.side = entry.repeat(2), torch.tensor([0, 1]).repeat_interleave(len(entry))
        many = len(self.entry)
        self.slopes = {key: v.expand(many, -1) for key, v in first(bounder, frame, upto=i + 1).items()}
        self.freedom = Freedom(bounder, frame, self.slopes)
        self.start = bounds_of(bounder.steps[i], i, self.entry, self.side, frame.lower[i])
        self.frame = frame

    def forms(self) -> tuple[Tensor, Tensor]:
        """Slopes [2, P, inputs] and offsets [2, P]."""
        self.lines = self.freedom.relaxations(self.slopes)
        self.found = self.bounder.backward(self.frame, self.lines, self.start, keep=True)
        return self.found.a.double().unflatten(0, (2, -1)), self.found.d.double().unflatten(0, (2, -1))

    def improve(self, points: Tensor, pace: float, t: int) -> None:
        """A step towards functions that are greater at their points [2, P, inputs]."""
        values = self.bounder.follow(self.lines, self.found, points.flatten(0, 1).to(self.start.d.dtype))
        for key, slope in self.slopes.items():
            gradient = self.freedom.gradient(key, self.found, values)
            if gradient is not None:
                self.slopes[key] = self.freedom.moved(key, slope, gradient, pace, t)


def _vectors(b: Tensor, before: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Unit vectors s, z that make the sum of b_ij <s_i, z_j> great: [rows, m, RANK], [rows, n, RANK]."""
    if before is None:
        drawn = torch.randn(b.shape[2], RANK, generator=torch.Generator().manual_seed(0), dtype=b.dtype)
        z = torch.nn.functional.normalize(drawn, dim=-1).expand(len(b), -1, -1)
    else:
        z = before[1]
    for _ in range(FIRST if before is None else NEXT):
        s = torch.nn.functional.normalize(b @ z, dim=-1)
        z = torch.nn.functional.normalize(b.transpose(1, 2) @ s, dim=-1)
    return s, z


def _norm(b: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """[rows]: at least the greatest <u, b x> over all |u_i| <= 1 and |x_j| <= 1."""
    left, right = (b @ z).norm(dim=-1), (b.transpose(1, 2) @ s).norm(dim=-1)
    p, q = (v.clamp(min=1e-12 * float(v.max()) + 1e-300) for v in (left, right))
    scaled = b / p.sqrt()[:, :, None] / q.sqrt()[:, None, :]
    spectral = torch.linalg.eigvalsh(scaled @ scaled.transpose(1, 2))[:, -1].sqrt()
    return spectral * (p.sum(1) * q.sum(1)).sqrt()
