"""Planes around products: around each on its own, or for all at the end of a program together.

A row over products that only affine maps read is a quadratic function of what they read. Planes around each product
forget that they belong together: that squares do not cancel, that a quadratic Lyapunov function is convex. So each is
replaced by its tangent plane in the middle, and what that leaves, the sum of a (u - u0) (v - v0), is one quadratic form
in the symbols of affine forms, bounded once per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from soundly.bounds.forms import FORWARD
from soundly.bounds.program import Affine, Step, Times, Variable

SYMBOLS = 32
"""Where the rests of more values than this would be symbols, products are bounded one by one."""


class Planes(NamedTuple):
    """Planes x u + y v + c below a product u v, and above; each [batch, n]."""

    x_low: Tensor
    y_low: Tensor
    c_low: Tensor
    x_high: Tensor
    y_high: Tensor
    c_high: Tensor


def planes(
    xl: Tensor, xu: Tensor, yl: Tensor, yu: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Planes:
    """Planes below and above x y on a rectangle, the mean of McCormick's two or `low` and `high` of the first."""
    r, s = (0.5 if share is None else share for share in (low, high))
    dx, dy = xu - xl, yu - yl
    return Planes(
        yu - r * dy, xu - r * dx, r * (yu * xu - yl * xl) - yu * xu,
        yl + s * dy, xu - s * dx, s * (yl * xu - yu * xl) - yl * xu,
    )  # fmt: skip


@dataclass(frozen=True)
class Last:
    """Where the last products of a program come from.

    Attributes:
        products: the products that only affine steps read, to the end.
        between: the affine steps that lead to their factors, in order.
        sources: the steps that these begin with: the variable, functions and other products.
        symbols: how many entries the sources have apart from the variable.
    """

    products: frozenset[int]
    between: tuple[int, ...]
    sources: tuple[int, ...]
    symbols: int

    def room(self, steps: Sequence[Step]) -> int:
        """How many numbers a row needs."""
        symbols = min(FORWARD, steps[0].size) + self.symbols
        return symbols * max(symbols, *(steps[i].size for i in self.products))


def last_products(steps: Sequence[Step]) -> Last | None:
    """None where there are none, or too many symbols."""
    straight = [True] * len(steps)  # whether all readers are affine, to the end
    for i in reversed(range(len(steps))):
        linear = isinstance(steps[i], Affine) and straight[i]
        for source in steps[i].sources:
            straight[source] &= linear
    products = frozenset(i for i, step in enumerate(steps) if isinstance(step, Times) and straight[i])
    waiting, seen = [s for i in products for s in steps[i].sources], set[int]()
    while waiting:
        i = waiting.pop()
        if i not in seen:
            seen.add(i)
            waiting += steps[i].sources if isinstance(steps[i], Affine) else ()
    between = tuple(sorted(i for i in seen if isinstance(steps[i], Affine)))
    sources = tuple(sorted(seen.difference(between)))
    symbols = sum(steps[i].size for i in sources if not isinstance(steps[i], Variable))
    return Last(products, between, sources, symbols) if products and sources and symbols <= SYMBOLS else None


@dataclass(frozen=True, eq=False)
class Factor:
    """centre + <generators, e> + r with |e| <= 1, |r| <= rest; [batch, n], [batch, symbols, n], [batch, n].

    The symbols are those of the varying inputs, and one for the rest of every entry of the sources.
    """

    centre: Tensor
    generators: Tensor
    rest: Tensor

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(v).all()) for v in (self.centre, self.generators, self.rest))


def factors_of(
    last: Last, steps: Sequence[Step], forms: dict[int, tuple[Tensor, Tensor, Tensor]]
) -> dict[int, tuple[Factor, Factor]]:
    """Both factors of every last product, given the affine forms of the sources."""
    found: dict[int, Factor] = {}
    batch, inputs, _ = next(iter(forms.values()))[1].shape
    used = inputs
    for i in last.sources:
        centre, generators, rest = forms[i]
        wide = generators.new_zeros(batch, inputs + last.symbols, centre.shape[1])
        wide[:, :inputs] = generators
        if not isinstance(steps[i], Variable):
            after = used + centre.shape[1]
            wide[:, used:after] = torch.diag_embed(rest)
            used, rest = after, torch.zeros_like(rest)
        found[i] = Factor(centre, wide, rest)
    for i in last.between:
        step = steps[i]
        assert isinstance(step, Affine)
        centre = step.bias.expand(batch, -1)
        generators, rest = centre.new_zeros(batch, inputs + last.symbols, step.size), torch.zeros_like(centre)
        for part, source in step.parts:
            form = found[source]
            centre, rest = centre + part.apply(form.centre), rest + part.absolute.apply(form.rest)
            generators = generators + part.apply(form.generators)
        found[i] = Factor(centre, generators, rest)
    pairs = ((i, steps[i]) for i in sorted(last.products))
    return {i: (found[s.left], found[s.right]) for i, s in pairs if isinstance(s, Times)}


def tangents(left: Factor, right: Factor) -> Planes:
    """The planes that touch each product in the middle of its factors."""
    u, v = left.centre, right.centre
    return Planes(v, u, -u * v, v, u, -u * v)


def remainder(factors: Mapping[int, tuple[Factor, Factor]], a: Mapping[int, Tensor], owner: Tensor | None) -> Tensor:
    """By how much at most [rows] rows with coefficients a [rows, n] of the last products lie below their tangents."""
    some = torch.stack([(v != 0).any(1) for v in a.values()]).any(0).nonzero()[:, 0]
    whose = some if owner is None else owner[some]
    lost = next(iter(a.values())).new_zeros(len(some))
    form: Tensor | float = 0.0
    for i, coefficients in a.items():
        left, right = factors[i]
        wide, other = left.generators.abs().sum(1), right.generators.abs().sum(1)
        more = wide * right.rest + left.rest * (other + right.rest)
        c = coefficients[some]
        lost = lost + (c.abs() * more[whose]).sum(-1)
        form = form + (left.generators[whose] * c[:, None]) @ right.generators[whose].transpose(1, 2)
    assert isinstance(form, Tensor)
    found = next(iter(a.values())).new_zeros(len(next(iter(a.values()))))
    found[some] = lost - least(form)
    return found


def least(form: Tensor) -> Tensor:
    """Lower bounds [rows] of <e, Q e> over |e| <= 1, for quadratic forms Q [rows, n, n], symmetric or not.

    Squares are completed, p (e_k + ...)^2 >= 0, as long as that helps; for what is left 2 |e_i e_j| <= e_i^2 + e_j^2.
    """
    q = (form + form.transpose(1, 2)) / 2
    bound = _dominated(q)
    for k in range(q.shape[-1]):
        pivot = q[:, k, k]
        row = q[:, k] / torch.where(pivot > 0, pivot, torch.inf)[:, None]
        rest = q - row[:, :, None] * q[:, None, k]
        rest[:, k] = rest[:, :, k] = 0.0
        now = _dominated(rest)
        better = (pivot > 0) & (now > bound)
        q = torch.where(better[:, None, None], rest, q)
        bound = torch.where(better, now, bound)
    return bound


def _dominated(q: Tensor) -> Tensor:
    d = q.diagonal(dim1=1, dim2=2)
    return (d + d.abs() - q.abs().sum(-1)).clamp(max=0).sum(-1)
