"""What an edit must achieve: constraints on outputs, gradients and explanations at points.

With the edited layer last, each quantity below is an affine function of its weights, so each constraint is a few
linear rows, or a cone of them. A functional names vectors v with value w_c . v (+ b_c); an `Expression` is a fixed
linear combination of such values; a `Constraint` bounds expressions. Nothing is evaluated before `soundly.edit` asks.

    p = at(image)
    p.classified(3)
    p.gradcam(of=3, layer="features").normalised_near(target, eps=0.01)
    p.gradcam(of=3, layer="features").cosine_at_least(0.95, teacher=map)
    (p.gradient(of=3, entries=[0, 4]) - at(other).gradient(of=3, entries=[0, 4])).within(-0.1, 0.1)

References: Tao and Thakur, "Provable Gradient Editing of Deep Neural Networks", NeurIPS 2025 (the problem); the linear
forms of normalised maps, masks and integrated gradients are derived in docs/editing.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from soundly.editing.functionals import (
    Coordinates,
    Directional,
    Functional,
    GradCam,
    Gradient,
    IntegratedGradients,
    Output,
)
from soundly.errors import InvalidInput
from soundly.spec.region import Box, Union


@dataclass(frozen=True, eq=False)
class Point:
    """One input of the network, and the position of the output that is meant.

    Attributes:
        x: the input, exactly of the model's input shape.
        position: which of the layer's positions (tokens); may stay None where there is only one.
        name: for messages and certificates.
    """

    x: Tensor
    position: int | None = None
    name: str = "x"

    def output(self, of: int) -> Expression:
        """The output y_of itself (a logit, where the network ends in logits)."""
        return Expression.of(Output(self, of), f"output {of} at {self.name}")

    def gradient(self, of: int, *, place: str | None = None, entries: Sequence[int] | None = None) -> Expression:
        """Entries of the gradient of y_of, flattened in C order.

        Args:
            of: the output.
            place: differentiate with respect to this place's value instead of the input.
            entries: which flat entries; all if None.
        """
        return Expression.of(
            Gradient(self, of, place, None if entries is None else tuple(entries)), f"gradient of {of} at {self.name}"
        )

    def directional(self, of: int, directions: Tensor, *, place: str | None = None) -> Expression:
        """Directional derivatives of y_of.

        Args:
            directions: [m, *shape] of the input, or of the value at `place`.
        """
        functional = Directional(self, of, place, (directions,))
        return Expression.of(functional, f"directional derivative of {of} at {self.name}")

    def derivative(self, of: int, along: Sequence[int | Tensor]) -> Expression:
        """One derivative of y_of, of any order: a term of a linear differential operator, such as a PDE's residual.

        Args:
            along: an entry of the input, flattened, or a direction of its shape, for each time that y_of is
                differentiated: [0, 1, 1] for the third derivative once in entry 0 and twice in entry 1.
        """
        if not along:
            raise InvalidInput(f"derivative of {of} at {self.name}: say along what; y itself is `output`.")
        directions = tuple(self._unit(d)[None] if isinstance(d, int) else d[None] for d in along)
        said = ", ".join(str(d) if isinstance(d, int) else "a direction" for d in along)
        return Expression.of(Directional(self, of, None, directions), f"derivative of {of} along {said} at {self.name}")

    def laplacian(self, of: int, *, entries: Sequence[int] | None = None) -> Expression:
        """The Laplacian of y_of: the sum of its second derivatives in single entries of the input.

        Args:
            entries: in which flat entries (those of space, say); all if None.
        """
        chosen = range(self.x.numel()) if entries is None else entries
        if not len(chosen):
            raise InvalidInput(f"entries: a Laplacian at {self.name} needs at least one.")
        units = torch.stack([self._unit(i) for i in chosen])
        expression = Expression.of(Directional(self, of, None, (units, units)), f"Laplacian of {of} at {self.name}")
        return expression.combined(torch.ones(1, len(chosen)))

    def _unit(self, entry: int) -> Tensor:
        """The direction of one entry of the input."""
        if not 0 <= entry < self.x.numel():
            raise InvalidInput(f"entries of the input at {self.name} are 0..{self.x.numel() - 1}, not {entry}.")
        unit = torch.zeros(self.x.numel(), dtype=torch.float64, device=self.x.device)
        unit[entry] = 1.0
        return unit.reshape(self.x.shape)

    def gradcam(self, of: int, layer: str) -> Expression:
        """The Grad-CAM map of y_of at a layer [1, C, *size], without its ReLU, flattened: sum_k mean(dy/dF_k) F_k.

        Reference: Selvaraju et al., "Grad-CAM", ICCV 2017, equations 1 and 2.
        """
        return Expression.of(GradCam(self, of, layer), f"Grad-CAM of {of} at {self.name}")

    def integrated_gradients(
        self, of: int, *, baseline: Tensor, steps: int = 25, groups: Tensor | None = None
    ) -> Expression:
        """Integrated Gradients of y_of along the straight line from `baseline`, by Gauss-Legendre quadrature.

        Args:
            baseline: of the input's shape.
            steps: quadrature nodes; the quantity that is constrained is the quadrature, not the integral.
            groups: integer labels 0..g-1 of the input's shape, -1 to leave an entry out; the attributions of each
                label are summed (a token's embedding entries, a superpixel). Every entry by itself if None.

        Reference: Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017.
        """
        functional = IntegratedGradients(self, of, baseline, steps, groups)
        return Expression.of(functional, f"Integrated Gradients of {of} at {self.name}")

    def classified(self, label: int, *, margin: float = 1e-3) -> Classified:
        """y_label exceeds every other output by at least `margin`."""
        if not 0 <= margin < math.inf:
            raise InvalidInput(f"margin must be at least 0 and finite, not {margin}.")
        return Classified(self, label, margin, f"class {label} at {self.name}")


@dataclass(frozen=True, eq=False)
class Area(Point):
    """All inputs of a region: what is demanded here must hold for every one of them. Its `x` is one of them."""

    region: Box | Union = field(kw_only=True)

    def coordinates(self, entries: Sequence[int] | None = None) -> Expression:
        """Entries of the input itself, flattened: bounds may depend on them linearly."""
        return Expression.of(Coordinates(self, 0, None if entries is None else tuple(entries)), f"input on {self.name}")


def over(region: Box | Union, *, position: int | None = None, name: str = "region") -> Area:
    """A region to state constraints on, for all its inputs at once.

    Args:
        region: a box or a union of boxes, of the network's input shape.
    """
    if not isinstance(region, (Box, Union)) or region.is_empty:
        raise InvalidInput("over(region): give a Box or a Union that holds at least one point (for a Ball its `box`).")
    box = region if isinstance(region, Box) else region[region.filled[0]]
    return Area(box.project((box.lower + box.upper) / 2), position, name, region=region)


def at(x: Tensor, *, position: int | None = None, name: str = "x") -> Point:
    """A point of the input space to state constraints at."""
    if not isinstance(x, Tensor) or not bool(torch.isfinite(x).all()):
        raise InvalidInput("at(x): x must be a tensor of finite numbers.")
    return Point(x, position, name)


# -- expressions and constraints


@dataclass(frozen=True, eq=False)
class Term:
    """factor * matrix @ (the functional's values); the identity for None."""

    functional: Functional
    matrix: Tensor | None = None
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Expression:
    """A vector of m values, each a fixed linear combination of functionals' values plus a number.

    Attributes:
        terms: added up; all must have the same number of values.
        constant: numbers [m] or [1] that are added, in float64.
        name: for messages and certificates.
    """

    terms: tuple[Term, ...]
    constant: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    name: str = "expression"

    @staticmethod
    def of(functional: Functional, name: str) -> Expression:
        """The values of one functional as they are."""
        return Expression((Term(functional),), name=name)

    def __add__(self, other: Expression | Tensor | float) -> Expression:
        if isinstance(other, Expression):
            return Expression(
                (*self.terms, *other.terms), self.constant + other.constant, f"{self.name} + {other.name}"
            )
        return Expression(self.terms, self.constant + _numbers(other), self.name)

    def __neg__(self) -> Expression:
        return self * -1.0

    def __sub__(self, other: Expression | Tensor | float) -> Expression:
        if isinstance(other, Expression):
            name = f"{self.name} - {other.name}"
            return Expression((*self.terms, *(-other).terms), self.constant - other.constant, name)
        return self + -_numbers(other)

    def __mul__(self, factor: float) -> Expression:
        terms = tuple(replace(t, factor=t.factor * factor) for t in self.terms)
        return Expression(terms, self.constant * factor, self.name)

    __rmul__ = __mul__

    def combined(self, matrix: Tensor) -> Expression:
        """The linear combinations matrix [k, m] of these m values: sums, differences, selections."""
        wide = matrix.double()
        terms = tuple(replace(t, matrix=wide if t.matrix is None else wide @ t.matrix) for t in self.terms)
        return Expression(terms, wide @ self.constant.expand(wide.shape[1]), self.name)

    # -- constraints

    def near(self, target: Tensor | float) -> Goal:
        """Not a constraint but a wish: the value should be as near to the target as the constraints allow."""
        values = _numbers(target)
        if not bool(torch.isfinite(values).all()):
            raise InvalidInput(f"near: the target of {self.name} must be finite.")
        return Goal(self, values)

    def within(self, lower: Tensor | float, upper: Tensor | float, *, name: str | None = None) -> Bounded:
        """lower <= value <= upper, entry by entry; either may be infinite."""
        low, high = _numbers(lower), _numbers(upper)
        if bool(torch.isnan(low).any()) or bool(torch.isnan(high).any()) or not bool((low <= high).all()):
            raise InvalidInput(f"within: the bounds of {self.name} are NaN or contradict each other.")
        if bool((torch.isinf(low) & torch.isinf(high)).any()):
            raise InvalidInput(f"within: an entry of {self.name} is left without any finite bound.")
        return Bounded(self, low, high, name or self.name)

    def at_least(self, lower: Tensor | float, *, name: str | None = None) -> Bounded:
        """value >= lower; with 0 and a gradient: non-decreasing at the point."""
        return self.within(lower, math.inf, name=name)

    def at_most(self, upper: Tensor | float, *, name: str | None = None) -> Bounded:
        """value <= upper."""
        return self.within(-math.inf, upper, name=name)

    def equals(self, other: Expression | Tensor | float, *, tolerance: float, name: str | None = None) -> Bounded:
        """|value - other| <= tolerance, for another expression (equal explanations at two points) or numbers."""
        return (self - other).within(-tolerance, tolerance, name=name)

    def normalised_near(
        self, target: Tensor, *, eps: float, spread: float | None = None, name: str | None = None
    ) -> Normalised:
        """The map, min-max-normalised to [0, 1], differs from the normalised target by at most eps in every entry.

        Args:
            target: a map of the same number of entries, not constant; normalised here.
            eps: 0 < eps < 1/2.
            spread: the map's own range (largest minus smallest entry) must stay at least this; by default a tenth of
                its range before the edit. Without it the zero map would be allowed.
        """
        flat = target.detach().double().reshape(-1)
        if not bool(torch.isfinite(flat).all()) or not float(flat.max()) > float(flat.min()):
            raise InvalidInput(f"normalised_near: the target of {self.name} must be finite and not constant.")
        if not 0 < eps < 0.5:
            raise InvalidInput(f"normalised_near: eps must lie between 0 and 1/2, not {eps}.")
        flat = (flat - flat.min()) / (flat.max() - flat.min())
        return Normalised(self, flat, eps, spread, name or f"normalised {self.name}")

    def keeps_top(self, mask: Tensor, *, margin: float = 1e-6, name: str | None = None) -> TopMask:
        """Every entry inside the mask exceeds every entry outside by at least `margin`: the top-q set is the mask."""
        flat = mask.reshape(-1).bool()
        if not 0 < int(flat.sum()) < flat.numel():
            raise InvalidInput(f"keeps_top: the mask of {self.name} must select some entries and leave out some.")
        if not 0 <= margin < math.inf:
            raise InvalidInput(f"keeps_top: margin must be at least 0 and finite, not {margin}.")
        return TopMask(self, flat, margin, name or f"top {int(flat.sum())} of {self.name}")

    def norm_at_most(self, radius: Expression | float, *, name: str | None = None) -> Cone:
        """The Euclidean norm of all entries together is at most `radius`: (map - teacher).norm_at_most(0.1).

        Args:
            radius: a positive number, or an expression of one entry.
        """
        name = name or f"norm of {self.name}" + (f" at most {radius:g}" if isinstance(radius, float | int) else "")
        if not isinstance(radius, Expression):
            if not 0 < radius < math.inf:
                raise InvalidInput(
                    f"norm_at_most: the radius of {self.name} must be positive and finite, not {radius}."
                )
            radius = Expression((), _numbers(radius))
        return Cone(self, radius, name)

    def cosine_at_least(
        self, cosine: float, *, teacher: Tensor, length: float | None = None, name: str | None = None
    ) -> Cosine:
        """The cosine of the angle between the map and a teacher's is at least `cosine`.

        Args:
            cosine: 0 < cosine < 1.
            teacher: a map of the same number of entries, not zero.
            length: the map's component along the teacher must stay at least this; by default a tenth of the map's norm
                before the edit. Without it the zero map would be allowed.
        """
        flat = teacher.detach().double().reshape(-1)
        if not bool(torch.isfinite(flat).all()) or not bool(flat.any()):
            raise InvalidInput(f"cosine_at_least: the teacher of {self.name} must be finite and not zero.")
        if not 0 < cosine < 1 or not (length is None or 0 < length < math.inf):
            raise InvalidInput(
                f"cosine_at_least: {self.name} needs a cosine between 0 and 1, not {cosine}, and a positive length."
            )
        flat = flat * 2.0 ** -math.frexp(float(flat.abs().max()))[1]  # exact: only the direction matters
        return Cosine(self, flat, cosine, length, name or f"cosine of {self.name} to its teacher at least {cosine:g}")


@dataclass(frozen=True, eq=False)
class Bounded:
    """lower <= expression <= upper."""

    expression: Expression
    lower: Tensor
    upper: Tensor
    name: str


@dataclass(frozen=True, eq=False)
class Goal:
    """expression near target, as well as it goes."""

    expression: Expression
    target: Tensor


@dataclass(frozen=True, eq=False)
class Normalised:
    """A min-max-normalised map near a target, exact for a chosen smallest and largest position (docs/editing.md)."""

    expression: Expression
    target: Tensor
    eps: float
    spread: float | None
    name: str

    def extremes(self) -> list[tuple[int, int]]:
        """The admissible (argmin, argmax) positions, the target's own first. The constraint is the union over them."""
        t = self.target
        low = sorted((i for i in range(len(t)) if t[i] <= self.eps), key=lambda i: float(t[i]))
        high = sorted((i for i in range(len(t)) if t[i] >= 1 - self.eps), key=lambda i: -float(t[i]))
        return sorted(((p, q) for p in low for q in high), key=lambda pq: low.index(pq[0]) + high.index(pq[1]))


@dataclass(frozen=True, eq=False)
class TopMask:
    """A kept set of largest entries."""

    expression: Expression
    mask: Tensor
    margin: float
    name: str


@dataclass(frozen=True, eq=False)
class Cone:
    """|expression| <= radius, a quantity of one entry, in the Euclidean norm: a second-order cone."""

    expression: Expression
    radius: Expression
    name: str


@dataclass(frozen=True, eq=False)
class Cosine:
    """<teacher, map> >= cosine |teacher| |map|, and >= length |teacher|."""

    expression: Expression
    teacher: Tensor
    cosine: float
    length: float | None
    name: str


@dataclass(frozen=True, eq=False)
class Classified:
    """One output exceeds all others."""

    point: Point
    label: int
    margin: float
    name: str


def _numbers(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach().reshape(-1).clone()


Constraint = Bounded | Normalised | TopMask | Cone | Cosine | Classified


def points_of(c: Constraint) -> list[Point]:
    """The points and areas that a constraint is about."""
    if isinstance(c, Classified):
        return [c.point]
    return list(dict.fromkeys(t.functional.point for t in terms_of(c)))


def terms_of(c: Bounded | Normalised | TopMask | Cone | Cosine) -> tuple[Term, ...]:
    """The terms of all expressions of a constraint."""
    return (*c.expression.terms, *(c.radius.terms if isinstance(c, Cone) else ()))
