"""Claims: a network, a set of inputs, a property, and what is assumed.

A property is stated by its counterexamples, in disjunctive normal form: a point x with output y violates it if some
clause has all its rows w.y + v.x + b <= 0 (< 0 for strict ones). To prove a claim is to find in every clause, for every
input, a row that is positive. Rows are float64; where a specification's decimals are not, the constant is rounded down
and coefficients are scaled to integers, so that a positive row proves the exact one positive, and the exact rows are
kept to judge a counterexample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.graph.network import Network
from soundly.graph.node import Node, Shape
from soundly.spec.grid import Grid
from soundly.spec.region import Ball, Box, Norm, Union, rounded

Region: TypeAlias = Box | Ball | Union | Grid

CLAUSES = 10**6
"""The most clauses of a property."""


@dataclass(frozen=True)
class Shapes:
    """The input and output shapes of a network that is not at hand."""

    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]


@dataclass(frozen=True, eq=False)
class Row:
    """One inequality sum w_j y_j + sum v_i x_i + b <= 0 (< 0 if strict) in exact numbers, by flat positions."""

    y: Mapping[int, Fraction]
    x: Mapping[int, Fraction]
    b: Fraction
    strict: bool = False

    def holds(self, y: Sequence[float], x: Sequence[float]) -> bool:
        """Whether the inequality is true at floating-point numbers, in rational arithmetic."""
        value = self.b + sum(w * Fraction(y[j]) for j, w in self.y.items())
        value += sum(v * Fraction(x[i]) for i, v in self.x.items())
        return value < 0 if self.strict else value <= 0

    def scaled(self) -> tuple[dict[int, float], dict[int, float], float, bool]:
        """A positive multiple in float64: y, x, b rounded down, and whether all coefficients are exact."""
        numbers = [*self.y.values(), *self.x.values()]
        if all(abs(q) == 1 for q in numbers):
            y, x = ({i: float(q) for i, q in side.items()} for side in (self.y, self.x))
            return y, x, rounded(self.b)[0], True
        scale = Fraction(1)
        if any(rounded(q)[0] != q for q in numbers):
            unit = Fraction(math.lcm(*(q.denominator for q in numbers)), math.gcd(*(q.numerator for q in numbers)))
            shift = unit.numerator.bit_length() - unit.denominator.bit_length()
            scale = unit / 2**shift if shift >= 0 else unit * 2**-shift
            if any(abs(q * unit) > 2**53 for q in numbers):
                scale = Fraction(1)
        values = [q * scale for q in numbers]
        floats = [_nearest(q) for q in values]
        exact = all(f == q for f, q in zip(floats, values, strict=True))
        y, x = dict(zip(self.y, floats, strict=False)), dict(zip(self.x, floats[len(self.y) :], strict=True))
        return y, x, rounded(self.b * scale)[0], exact


@dataclass(frozen=True, eq=False)
class Terms:
    """A sparse matrix [rows, size]: `value[k]` at (`row[k]`, `column[k]`), `row` ascending."""

    row: Tensor
    column: Tensor
    value: Tensor

    def times(self, v: Tensor, rows: int) -> Tensor:
        """The product with vectors [..., size]: [..., rows]. Differentiable in v."""
        result = v.new_zeros((*v.shape[:-1], rows))
        return result.index_add(-1, self.row, v[..., self.column] * self.value.to(v))

    def sizes(self, v: Tensor, rows: int) -> Tensor:
        """The sum of absolute values of the products."""
        return Terms(self.row, self.column, self.value.abs()).times(v.abs(), rows)

    def dense(self, rows: int, size: int) -> Tensor:
        """The matrix itself."""
        return torch.zeros((rows, size), dtype=torch.float64).index_put_((self.row, self.column), self.value, True)

    def between(self, first: int, last: int) -> Terms:
        """Those of rows first to last - 1."""
        low, high = torch.searchsorted(self.row, torch.tensor([first, last])).tolist()
        return Terms(self.row[low:high] - first, self.column[low:high], self.value[low:high])


@dataclass(frozen=True, eq=False)
class Property:
    """The counterexamples as OR over clauses of AND over rows w.y + v.x + b <= 0.

    Attributes:
        outputs, inputs: the numbers of entries of y and x, flattened and joined.
        y, x: the coefficients w [m, outputs] and v [m, inputs], sparse.
        b: the constants [m].
        clause: the clause of each row [m], ascending; a clause without rows is always true.
        clauses: how many clauses there are; without any nothing violates the property.
        strict: which rows need < 0. Proofs may treat them as <= 0.
        exact: the exact rows, where the float64 ones had to be rounded.
        inexact: the rows [m] whose coefficients are rounded as well; None if there are none. See `slack`.
    """

    outputs: int
    inputs: int
    y: Terms
    x: Terms
    b: Tensor
    clause: Tensor
    clauses: int
    strict: Tensor
    exact: tuple[Row, ...] | None = None
    inexact: Tensor | None = None

    @staticmethod
    def of(clauses: Sequence[Sequence[Row]], *, outputs: int, inputs: int) -> Property:
        """A property from exact rows."""
        flat = [row for clause in clauses for row in clause]
        tables: list[tuple[list[int], list[int], list[float]]] = [([], [], []), ([], [], [])]
        b: list[float] = []
        inexact: list[bool] = []
        for k, row in enumerate(flat):
            here, there, constant, sharp = row.scaled()
            b.append(constant)
            inexact.append(not sharp)
            for (rows, columns, values), terms in zip(tables, (here, there), strict=True):
                rows.extend([k] * len(terms))
                columns.extend(terms)
                values.extend(terms.values())
        y, x = (
            Terms(torch.tensor(r, dtype=torch.int64), torch.tensor(c, dtype=torch.int64), _f64(v)) for r, c, v in tables
        )
        for side, size in ((y, outputs), (x, inputs)):
            if bool(((side.column < 0) | (side.column >= size)).any()):
                raise InvalidInput(f"a row names an entry beyond {outputs} outputs and {inputs} inputs.")
        finite = torch.isfinite(y.value).all() & torch.isfinite(x.value).all() & torch.isfinite(_f64(b)).all()
        if not bool(finite):
            raise InvalidInput("a row has a coefficient or constant beyond the range of float64; scale it.")
        owner = [i for i, clause in enumerate(clauses) for _ in clause]
        return Property(
            outputs, inputs, y, x, _f64(b), torch.tensor(owner, dtype=torch.int64), len(clauses),
            torch.tensor([row.strict for row in flat], dtype=torch.bool), tuple(flat),
            torch.tensor(inexact, dtype=torch.bool) if any(inexact) else None,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.b)

    def rows(self, y: Tensor, x: Tensor) -> Tensor:
        """w.y + v.x + b for flat outputs [..., outputs] and inputs [..., inputs]: [..., m]. Differentiable."""
        result = self.y.times(y, len(self)) + self.b.to(y)
        return result + self.x.times(x.to(y), len(self)) if len(self.x.row) else result

    def worst(self, y: Tensor, x: Tensor) -> Tensor:
        """The largest row of each clause [..., clauses]: not positive at a counterexample. Differentiable."""
        rows = self.rows(y, x)
        start = rows.new_full((*rows.shape[:-1], self.clauses), -math.inf)
        return start.scatter_reduce(-1, self.clause.expand(rows.shape), rows, "amax")

    def slack(self, y: Tensor, x: Tensor) -> Tensor:
        """What rounded coefficients may add to the rows [m] while |outputs| <= y and |inputs| <= x, flat. Zero for
        rows that are exact, nearly all: a lower bound of a row proves the exact row only above its slack."""
        if self.inexact is None:
            return torch.zeros_like(self.b)
        size = self.y.sizes(y.double(), len(self)) + self.x.sizes(x.double(), len(self))
        return torch.where(self.inexact, size * 2.0**-51 + 1e-300, 0.0)

    def between(self, first: int, last: int) -> Property:
        """The clauses first to last - 1."""
        low, high = torch.searchsorted(self.clause, torch.tensor([first, last])).tolist()
        return Property(
            self.outputs, self.inputs, self.y.between(low, high), self.x.between(low, high), self.b[low:high],
            self.clause[low:high] - first, last - first, self.strict[low:high],
            None if self.exact is None else self.exact[low:high],
            None if self.inexact is None else self.inexact[low:high],
        )  # fmt: skip

    def violated(self, y: Tensor, x: Tensor) -> Tensor:
        """Which clauses are true at one flat output and input, decided without rounding: bool [clauses]."""
        y, x = y.double(), x.double()
        if not bool(torch.isfinite(y).all() & torch.isfinite(x).all()):
            raise InvalidInput("y holds NaN or infinite entries, which neither satisfy nor violate a claim.")
        terms = self.y.sizes(y, len(self)) + self.x.sizes(x, len(self)) + self.b.abs()
        counts = torch.bincount(torch.cat([self.y.row, self.x.row]), minlength=len(self))
        error = (counts + 4) * 2.0**-51 * terms + 1e-300
        value = self.rows(y, x)
        false = torch.zeros(self.clauses, dtype=torch.bool)
        false[self.clause[value > error]] = True
        unsure = ~(value < -error) & ~false[self.clause]
        here, there = y.tolist(), x.tolist()
        for k in unsure.nonzero().flatten().tolist():
            owner = int(self.clause[k])
            if not false[owner] and not self._row(k).holds(here, there):
                false[owner] = True
        return ~false

    def _row(self, k: int) -> Row:
        if self.exact is not None:
            return self.exact[k]
        y, x = self._sides
        return Row(y.get(k, {}), x.get(k, {}), Fraction(float(self.b[k])), bool(self.strict[k]))

    @cached_property
    def _sides(self) -> tuple[dict[int, dict[int, Fraction]], dict[int, dict[int, Fraction]]]:
        sides: tuple[dict[int, dict[int, Fraction]], dict[int, dict[int, Fraction]]] = ({}, {})
        for terms, side in zip((self.y, self.x), sides, strict=True):
            for k, i, v in zip(terms.row.tolist(), terms.column.tolist(), terms.value.tolist(), strict=True):
                row = side.setdefault(k, {})
                row[i] = row.get(i, Fraction(0)) + Fraction(v)
        return sides


@dataclass(frozen=True, eq=False)
class Claim:
    """No input of the region violates the property.

    Attributes:
        network: the function, or only its shapes where a specification is read without it.
        region: the inputs, of the network's input shape, or [n] for the flattened inputs joined in call order.
        property: the counterexamples.
        spans: for each box of a Union the clauses [first, last) that apply there, [k, 2]; None if all apply everywhere.
        assumptions: what the statement in words needs beyond the claim itself.
        name: for messages and reports.
    """

    network: Network | Shapes
    region: Region
    property: Property
    spans: Tensor | None = None
    assumptions: tuple[str, ...] = ()
    name: str = "claim"
    shapes: Shapes = field(init=False)

    def __post_init__(self) -> None:
        shapes = shapes_of(self.network)
        object.__setattr__(self, "shapes", shapes)
        _check_region(self.region, shapes)
        sizes = (_size(shapes.outputs), _size(shapes.inputs))
        if (self.property.outputs, self.property.inputs) != sizes:
            raise InvalidInput(
                f"property is about {self.property.outputs} outputs and {self.property.inputs} inputs, but the network "
                f"has {sizes[0]} and {sizes[1]}."
            )
        if self.spans is not None and (
            not isinstance(self.region, Union) or tuple(self.spans.shape) != (len(self.region), 2)
        ):
            raise InvalidInput("spans belong to a Union and need one row [first, last) per box.")

    @cached_property
    def is_empty(self) -> bool:
        """Whether there is no input at all: nothing is claimed."""
        return self.region.is_empty

    def cases(self) -> Iterator[tuple[Box | Ball | Grid, Property]]:
        """The parts of the region that are not empty, each with its clauses. Claims hold if each part does."""
        if not isinstance(self.region, Union):
            if not self.region.is_empty:
                yield self.region, self.property
            return
        for i in self.region.filled:
            first, last = (0, self.property.clauses) if self.spans is None else self.spans[i].tolist()
            yield self.region[i], self.property.between(first, last)

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The network's input tensors at a point of the region."""
        flat = x.reshape(-1)
        sizes = [math.prod(shape) for shape in self.shapes.inputs]
        return tuple(v.reshape(s) for v, s in zip(flat.split(sizes), self.shapes.inputs, strict=True))

    def outputs(self, x: Tensor) -> Tensor:
        """The network's flat outputs at a point, in the point's own type: float64 ones are evaluated in float64."""
        if not isinstance(self.network, Network):
            raise InvalidInput(f"{self.name} was read without its network; pass the outputs y as well.")
        network = self.network if self.network.dtype == x.dtype else self._other
        values = self.inputs(x.to(device=network.device, dtype=network.dtype))
        with torch.no_grad():
            results = network.evaluate(network.outputs, *values)
        return torch.cat([value.reshape(-1) for value in results]).cpu()

    @cached_property
    def _other(self) -> Network:
        assert isinstance(self.network, Network)
        return self.network.to(torch.float64)

    def holds_at(self, x: Tensor, y: Tensor | None = None, *, tolerance: float = 0.0) -> bool:
        """Whether x is no counterexample: it lies outside the exact region, or every clause has a row that is false.

        Args:
            x: one point of the region's shape.
            y: the network's flat outputs there, from wherever; evaluated if None. Given x and y nothing is rounded.
            tolerance: points this near count as inside: for inputs fixed to decimals that no float64 number equals.
        """
        values = self._values(x, y) if self._inside(x, tolerance) else None
        return values is None or not bool((self.property.violated(*values) & self._applying(x, tolerance)).any())

    def violation(self, x: Tensor, y: Tensor | None = None, *, tolerance: float = 0.0) -> float:
        """How deep x lies among the counterexamples: the largest row of the best clause, negated; not negative at a
        counterexample, minus infinity outside the region. In float64: `holds_at` decides the close cases."""
        if not self._inside(x, tolerance):
            return -math.inf
        worst = self.property.worst(*self._values(x, y))[self._applying(x, tolerance)]
        return -float(worst.min()) if len(worst) else -math.inf

    def _inside(self, x: Tensor, tolerance: float) -> bool:
        if self.region.is_empty:
            return False
        return bool(self.region.contains(x)[()]) or (tolerance > 0 and float(self.region.excess(x)) <= tolerance)

    def _values(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        y = (self.outputs(x) if y is None else y).detach().double().reshape(-1)
        if len(y) != self.property.outputs:
            raise InvalidInput(f"y has {len(y)} entries, but the claim is about {self.property.outputs} outputs.")
        return y, x.detach().double().cpu().reshape(-1)

    def _applying(self, x: Tensor, tolerance: float) -> Tensor:
        """The clauses of the boxes that contain x."""
        if self.spans is None or not isinstance(self.region, Union):
            return torch.ones(self.property.clauses, dtype=torch.bool)
        applying = torch.zeros(self.property.clauses, dtype=torch.bool)
        for first, last in self.spans[self.region.members(x, tolerance=tolerance)].tolist():
            applying[first:last] = True
        return applying


def robust(
    network: Network | Shapes,
    x: Tensor,
    *,
    eps: float | Tensor,
    label: int | None = None,
    norm: Norm = "linf",
    clip: tuple[float, float] | Box | None = (0.0, 1.0),
) -> Claim:
    """Every input within `eps` of x, and within `clip`, gets `label`: its output is larger than every other.

    Args:
        x: the input's shape.
        eps: the radius, or one per entry.
        label: a flat output position; the network's answer at x if None.
        norm: "linf", "l2" or "l1".
        clip: the range of valid inputs, a box, or None for no limit.
    """
    n = _size(shapes_of(network).outputs)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InvalidInput("x must be a floating-point tensor of the network's input shape.")
    if isinstance(clip, tuple):
        if len(clip) != 2 or not clip[0] <= clip[1]:
            raise InvalidInput(f"clip is {clip!r}; give (lowest, highest), a Box or None.")
        clip = Box(torch.full(x.shape, float(clip[0])).double(), torch.full(x.shape, float(clip[1])).double())
    if clip is not None and not bool(clip.contains(x)[()]):
        raise InvalidInput("x lies outside clip; pass the range that your inputs are scaled to, or clip=None.")
    region = Ball(x, eps, norm, clip)
    _check_region(region, shapes_of(network))
    if label is None:
        if not isinstance(network, Network):
            raise InvalidInput("label is needed where only the network's shapes are given.")
        outputs = network.evaluate(network.outputs, *_inputs(network, x))
        label = int(torch.cat([y.reshape(-1) for y in outputs]).argmax())
    _check_index("label", label, n)
    others = [j for j in range(n) if j != label]
    rows = _differences(network, [label] * len(others), others, clause=range(len(others)))
    return Claim(network, region, rows, name=f"robust within {norm} {_text(eps)} as {label}")


def within(
    network: Network | Shapes, region: Region, lower: Tensor | float | None, upper: Tensor | float | None
) -> Claim:
    """lower <= output <= upper, entry by entry, for every input of the region.

    Args:
        lower, upper: numbers or tensors of the output's shape; None or infinite entries where there is no bound.
    """
    n = _size(shapes_of(network).outputs)
    column, sign, constant = [], [], []
    for name, bound, s in (("lower", lower, 1.0), ("upper", upper, -1.0)):
        if bound is None:
            continue
        values = torch.as_tensor(bound, dtype=None if isinstance(bound, Tensor) else torch.float64)
        values = values.detach().double().cpu()
        if values.numel() not in (1, n) or bool(torch.isnan(values).any()):
            raise InvalidInput(f"{name} needs one number or {n}, as the network has outputs, and none may be NaN.")
        values = values.reshape(-1).expand(n)
        if bool((values == s * math.inf).any()):
            raise InvalidInput(f"{name} is {s * math.inf} somewhere, which no output satisfies.")
        kept = torch.isfinite(values).nonzero().flatten()
        column.append(kept)
        sign.append(torch.full((len(kept),), s, dtype=torch.float64))
        constant.append(-s * values[kept])
    if not column:
        raise InvalidInput("lower and upper are both None: nothing is claimed.")
    columns, m = torch.cat(column), sum(map(len, column))
    terms = Terms(torch.arange(m), columns, torch.cat(sign))
    rows = _property(network, terms, torch.cat(constant), torch.arange(m), strict=True)
    return Claim(network, region, rows, name="output within bounds")


def monotone(
    network: Network,
    region: Region,
    *,
    of: int | Sequence[int] | Node,
    entry: int | Sequence[int],
    increasing: bool = True,
    wrt: Node | str | None = None,
) -> Claim:
    """Output `of` never decreases (never increases) as input `entry` grows: a claim about the network's gradient.

    Args:
        of: a flat output position, or as in `Network.gradient`.
        entry: a position in the flattened input, or one index per axis.
        wrt: which input, if there are several.
    """
    gradient = network.gradient(of=of, wrt=wrt)
    slope = gradient.with_outputs(gradient.entry(entry))
    bounds: tuple[float | None, float | None] = (0.0, None) if increasing else (None, 0.0)
    claim = within(slope, region, *bounds)
    return Claim(
        slope, claim.region, claim.property, name=f"{'in' if increasing else 'de'}creasing in entry {entry}",
        assumptions=("the network is continuous, and piecewise differentiable along lines within the region",),
    )  # fmt: skip


def top_k(network: Network | Shapes, region: Region, labels: Sequence[int], k: int) -> Claim:
    """For every input of the region the outputs `labels` are among the k largest; given more than k labels, the k
    largest are among `labels`. Ties count against the claim."""
    n, inside = _size(shapes_of(network).outputs), list(dict.fromkeys(labels))
    for label in inside:
        _check_index("labels", label, n)
    if not isinstance(k, int) or not 0 < k <= n or not inside:
        raise InvalidInput(f"k is {k!r} with {len(inside)} labels; give 1 to {n} and at least one label.")
    outside = [j for j in range(n) if j not in set(inside)]
    # The lowest label falls out of the k largest once k - |labels| + 1 outsiders reach it; the highest outsider gets
    # in once it reaches |labels| - k + 1 labels.
    one, many = (inside, outside) if len(inside) <= k else (outside, inside)
    size = abs(len(inside) - k) + 1
    if len(one) * math.comb(len(many), size) * size > CLAUSES:
        raise InvalidInput(
            f"labels, k: {len(inside)} labels among the top {k} of {n} is a choice of {size} out of {len(many)}: too "
            "many clauses. Give exactly k labels, or fewer outputs."
        )
    pairs = [(i, chosen) for i in one for chosen in combinations(many, size)]
    first = [i for i, chosen in pairs for _ in chosen]
    second = [j for _, chosen in pairs for j in chosen]
    if len(inside) > k:
        first, second = second, first
    clause = [c for c, (_, chosen) in enumerate(pairs) for _ in chosen]
    rows = _differences(network, first, second, clause=clause)
    return Claim(network, region, rows, name=f"{inside} in the top {k}")


def pairwise(network: Network | Shapes, region: Region, i: int, j: int, margin: float = 0.0) -> Claim:
    """Output i exceeds output j by at least `margin` for every input of the region."""
    n = _size(shapes_of(network).outputs)
    _check_index("i", i, n)
    _check_index("j", j, n)
    if i == j or not math.isfinite(margin):
        raise InvalidInput(f"i={i}, j={j}, margin={margin}: give two different outputs and a finite margin.")
    rows = _differences(network, [i], [j], clause=[0], b=-float(margin), strict=True)
    return Claim(network, region, rows, name=f"output {i} >= output {j} + {margin:g}")


def _differences(
    network: Network | Shapes, first: Sequence[int], second: Sequence[int], *, clause: Sequence[int], b: float = 0.0,
    strict: bool = False,
) -> Property:  # fmt: skip
    """Rows y_first - y_second + b <= 0."""
    m = len(first)
    columns = torch.tensor([first, second], dtype=torch.int64).T.reshape(-1)
    terms = Terms(torch.arange(m).repeat_interleave(2), columns, _f64([1.0, -1.0]).repeat(m))
    owner = torch.tensor(list(clause), dtype=torch.int64)
    return _property(network, terms, torch.full((m,), b, dtype=torch.float64), owner, strict=strict)


def _property(network: Network | Shapes, y: Terms, b: Tensor, clause: Tensor, *, strict: bool) -> Property:
    shapes, none = shapes_of(network), torch.empty(0, dtype=torch.int64)
    clauses = int(clause.max()) + 1 if len(clause) else 0
    return Property(
        _size(shapes.outputs), _size(shapes.inputs), y, Terms(none, none, _f64([])), b, clause, clauses,
        torch.full(b.shape, strict),
    )  # fmt: skip


def shapes_of(network: Any) -> Shapes:
    """The shapes of a network's inputs and outputs."""
    if isinstance(network, Shapes):
        return network
    if not isinstance(network, Network):
        raise InvalidInput(f"network is a {type(network).__name__}; give a Network, as soundly.load returns.")
    return Shapes(tuple(n.shape for n in network.inputs), tuple(n.shape for n in network.outputs))


def _inputs(network: Network, x: Tensor) -> tuple[Tensor, ...]:
    flat = x.detach().to(device=network.device, dtype=network.dtype).reshape(-1)
    parts = flat.split([math.prod(node.shape) for node in network.inputs])
    return tuple(part.reshape(node.shape) for part, node in zip(parts, network.inputs, strict=True))


def _check_region(region: Any, shapes: Shapes) -> None:
    if not isinstance(region, (Box, Ball, Union, Grid)):
        raise InvalidInput(f"region is a {type(region).__name__}; give a Box, a Ball, a Union or a Grid.")
    n = _size(shapes.inputs)
    if region.shape != (n,) and (len(shapes.inputs) != 1 or region.shape != shapes.inputs[0]):
        wanted = f"{shapes.inputs[0]}" if len(shapes.inputs) == 1 else f"({n},), its inputs joined"
        raise InvalidInput(f"region has shape {region.shape}, but the network takes {wanted}.")


def _check_index(name: str, index: Any, n: int) -> None:
    if not isinstance(index, int) or not 0 <= index < n:
        raise InvalidInput(f"{name}: {index!r} is no output; the network has outputs 0 to {n - 1}.")


def _size(shapes: Sequence[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _nearest(q: Fraction) -> float:
    try:
        return q.numerator / q.denominator
    except OverflowError:
        return math.inf if q > 0 else -math.inf


def _f64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _text(eps: float | Tensor) -> str:
    return f"{float(eps):g}" if torch.as_tensor(eps).numel() == 1 else "per entry"
