"""Affine forms, rigorous: the values of steps followed forward over boxes in which few inputs vary.

The value of a step is centre + <generators, e> + r with |e_k| <= 1, one e for every varying input, and |r| <= rest. The
numbers stored are exact; what roundings, uncertain weights and curvature may change goes into the rest. Forms cost next
to nothing, and over small boxes they leave little for backward passes to do.

Reference: Stolfi and de Figueiredo, "Self-validated numerical methods", 1997 (affine arithmetic).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from soundly.certificate.bounding import ABOVE, FLOOR, Frame
from soundly.certificate.functions import Band
from soundly.certificate.products import Factor, Pair
from soundly.certificate.program import Affine, Apply, Map, Program, Times, Variable
from soundly.certificate.rings import FAR, U

Array = npt.NDArray[Any]

INPUTS = 32
"""Forms are used where at most so many inputs of a case vary."""


@dataclass(frozen=True, eq=False)
class Form:
    """centre [M, n], generators [M, G, n], rest [M, n], and spread [M, n] >= the sum of |generators|."""

    centre: Array
    generators: Array
    rest: Array
    spread: Array

    def interval(self) -> tuple[Array, Array]:
        with np.errstate(all="ignore"):
            wide = (self.spread + self.rest) * (1 + 4 * U)
            slack = 4 * U * (np.abs(self.centre) + wide) + FLOOR
            low, high = self.centre - wide - slack, self.centre + wide + slack
        return np.where(low >= -FAR, low, -np.inf), np.where(high <= FAR, high, np.inf)


@dataclass(eq=False)
class Forms:
    """The forms of a program's steps, one after the other."""

    program: Program
    forms: list[Form] = field(default_factory=list)

    def follow(self, i: int, frame: Frame, low: Array, high: Array, cost: Array | None, band: Band | None) -> Form:
        """The form of step i; the intervals of the steps before it are final.

        Args:
            frame: the intervals of the steps before.
            low, high: the box, for the first step.
            cost: for an affine step what its roundings and uncertain numbers may change, given the intervals.
            band: for a function, of its source's final intervals.
        """
        step = self.program.steps[i]
        with np.errstate(all="ignore"):
            match step:
                case Variable():
                    form = _box(low, high)
                case Affine():
                    assert cost is not None
                    form = self._affine(step, cost, {s: self.forms[s] for _, s in step.parts}, self.forms[0])
                case Apply(source):
                    assert band is not None
                    form = _bent(self._narrow(source, frame), band)
                case Times(left, right):
                    form = _product(self._narrow(left, frame), self._narrow(right, frame))
        self.forms.append(form)
        return form

    def _narrow(self, i: int, frame: Frame) -> Form:
        """A step's form, or its interval alone where that is narrower than the rest."""
        form, low, high = self.forms[i], frame.lower[i], frame.upper[i]
        middle = low / 2 + high / 2
        half = np.maximum(high - middle, middle - low) * (1 + 4 * U)
        half = np.where(np.isnan(half), np.inf, half)
        plain = ~(form.rest <= half)  # so that NaN is replaced
        if not plain.any():
            return form
        return Form(
            np.where(plain, middle, form.centre), np.where(plain[:, None], 0.0, form.generators),
            np.where(plain, half, form.rest), np.where(plain, 0.0, form.spread),
        )  # fmt: skip

    def factors(self, frame: Frame) -> dict[int, Pair]:
        """Of the products that are bounded together, once all is followed: forms of their factors in which every entry
        of what they come from has a symbol for its rest, so that the factors share it."""
        together, found = self.program.together, dict[int, Form]()
        assert together is not None
        varying = self.forms[0].generators.shape[1]
        symbols = varying + sum(self.program.steps[i].size for i in together.sources if i)
        used = varying
        for i in together.sources:
            form = self._narrow(i, frame)
            many, _, n = form.generators.shape
            generators, rest = np.zeros((many, symbols, n)), form.rest
            generators[:, :varying] = form.generators
            if i:
                entry = np.arange(n)
                generators[:, used + entry, entry] = np.where(np.isfinite(rest), rest, 0.0)
                used, rest = used + n, np.where(np.isfinite(rest), 0.0, rest)
            found[i] = _made(form.centre, generators, rest)
        for i in together.affine:
            step, cost = self.program.steps[i], frame.cost[i]
            assert isinstance(step, Affine) and cost is not None
            own = np.zeros((len(cost), symbols, 0))
            found[i] = self._affine(step, cost, found, Form(cost, own, cost, cost))
        pairs = {i: self.program.steps[i] for i in sorted(together.products)}
        return {
            i: (_factor(found[s.left]), _factor(found[s.right])) for i, s in pairs.items() if isinstance(s, Times)
        }  # fmt: skip

    def _affine(self, step: Affine, cost: Array, forms: Mapping[int, Form], like: Form) -> Form:
        terms = sum(part.terms for part, _ in step.parts)
        rounding = (4 * terms + 2 * step.size + self.program.contributions + 16) * U * ABOVE
        many, count, _ = like.generators.shape
        centre = np.repeat(step.bias[None], many, axis=0)
        generators = np.zeros((many, count, step.size))
        rest = np.zeros(centre.shape)
        for part, source in step.parts:
            form = forms[source]
            size = np.abs(form.centre) + form.spread + form.rest
            centre = centre + part.apply(form.centre)
            generators = generators + _each(part, form.generators)
            rest = rest + part.absolute.apply(form.rest + rounding * size)
        rest = rest * (1 + rounding) + rounding * np.abs(step.bias) + cost
        return _made(centre, generators, rest)


def _factor(form: Form) -> Factor:
    known = np.isfinite(form.centre) & (form.spread <= FAR) & (form.rest <= FAR)
    centre, rest, spread = (np.where(known, x, 0.0) for x in (form.centre, form.rest, form.spread))
    return Factor(centre, np.where(known[:, None], form.generators, 0.0), rest, spread, known)


def _each(part: Map, generators: Array) -> Array:
    many, count, n = generators.shape
    if count == 0:
        return np.zeros((many, 0, part.size[0]))
    return part.apply(generators.reshape(many * count, n)).reshape(many, count, -1)


def _made(centre: Array, generators: Array, rest: Array) -> Form:
    """A form; its rest is infinite where anything in it is no number."""
    spread = np.abs(generators).sum(axis=1) * (1 + (generators.shape[1] + 8) * U)
    known = np.isfinite(centre) & (spread <= FAR) & (rest <= FAR)
    return Form(centre, generators, np.where(known, rest * (1 + 4 * U) + FLOOR, np.inf), spread)


def _box(low: Array, high: Array) -> Form:
    middle = low / 2 + high / 2
    half = np.maximum(high - middle, middle - low) * (1 + 4 * U)
    node, entry = (high > low).nonzero()
    count = np.bincount(node, minlength=len(low))
    place = np.arange(len(node)) - np.repeat(np.cumsum(count) - count, count)
    generators = np.zeros((len(low), int(count.max(initial=0)), low.shape[1]))
    generators[node, place, entry] = half[node, entry]
    return Form(middle, generators, np.where(high > low, 0.0, half), np.where(high > low, half, 0.0))


def _bent(form: Form, band: Band) -> Form:
    """f(v) = k v + (f(v) - k v), the bracket within the band."""
    k = band.slope
    middle = band.floor / 2 + band.ceiling / 2
    half = np.maximum(band.ceiling - middle, middle - band.floor) * (1 + 4 * U)
    steep = np.abs(k)
    rounding = 8 * U * (steep * (np.abs(form.centre) + form.spread) + np.abs(middle))
    rest = (steep * form.rest + half) * (1 + 8 * U) + rounding
    return _made(k * form.centre + middle, k[:, None] * form.generators, rest)


def _product(a: Form, b: Form) -> Form:
    wide_a, wide_b = a.spread + a.rest, b.spread + b.rest
    size_a, size_b = np.abs(a.centre), np.abs(b.centre)
    rest = (size_a * b.rest + size_b * a.rest + wide_a * wide_b) * (1 + 8 * U)
    rest = rest + 16 * U * (size_a + wide_a) * (size_b + wide_b)
    generators = a.centre[:, None] * b.generators + b.centre[:, None] * a.generators
    return _made(a.centre * b.centre, generators, rest)
