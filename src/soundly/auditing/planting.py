"""Networks whose answer is known: exact counterexamples planted where attacks do not look, and robust ones besides.

A planted network is a host that is robust, plus a bump: a small network that is 1 at one point and 0 (or nearly) a
short way off, times the height that just violates the claim there. Outside the bump gradients are the host's, so
nothing leads to the point. The host falls away from the centre, entry by entry, through one increasing function, so
that its least margin over a box is taken at a corner that is known: the same construction, with the bump too low, or
without a bump, holds by a margin that is known as well.

Nothing here uses soundly's bounds: truths come from the construction, and from evaluating single points.

Reference: Zhou et al., "SoundnessBench", 2025 (planted counterexamples as a test of verifiers; theirs are trained).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.graph import elementwise as ew
from soundly.graph.composite import Maximum, MaxPool, Softmax
from soundly.graph.linear import Combine, Concat, Gather, Sum, add, reshape, scale, subtract, transpose
from soundly.graph.network import Network
from soundly.graph.node import Constant, Fill, Input, Node, Parameter
from soundly.graph.product import Conv, Dense, MatMul

Bump = Literal["relu", "abs", "max", "tanh", "sigmoid", "softmax", "conv", "attention"]
Host = Literal["relu", "abs", "tanh", "sigmoid", "paired", "conv"]
Position = Literal["corner", "face", "interior"]
BUMPS, HOSTS, POSITIONS = get_args(Bump), get_args(Host), get_args(Position)
F32, F64 = torch.float32, torch.float64


@dataclass(frozen=True, eq=False)
class Instance:
    """A claim whose answer is known: on the box, output 0 exceeds output 1.

    Attributes:
        name: what it is made of.
        network: in float32, with outputs [1, 2].
        lower, upper: the box, numbers of float32 in float64.
        holds: the truth, over the reals.
        margin: the least of output 0 - output 1, or a number that it is known to exceed, when the claim holds; how far
            the witness violates it when it does not.
        witness: the planted point.
    """

    name: str
    network: Network
    lower: Tensor
    upper: Tensor
    holds: bool
    margin: float
    witness: Tensor | None = None


class _Builder:
    """Nodes over one input, and the constants and weights they need."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.x = Input("x", shape)()
        self.values: dict[Node, Tensor] = {}
        self.flat = reshape(self.x, (1, math.prod(shape)))

    def weight(self, value: Tensor) -> Node:
        node = Parameter(f"w{len(self.values)}", tuple(value.shape))()
        self.values[node] = value.to(F32)
        return node

    def constant(self, value: Tensor) -> Node:
        node = Constant(f"c{len(self.values)}", tuple(value.shape))()
        self.values[node] = value.to(F32)
        return node

    def network(self, output: Node, name: str) -> Network:
        return Network((self.x,), (output,), self.values, name=name)


def _absolute(made_of: str, t: Node) -> Node:
    """|t| by ReLUs, a maximum or as itself."""
    if made_of == "relu":
        return add(ew.RELU(t), ew.RELU(scale(t, -1)))
    if made_of == "max":
        return Maximum()(t, scale(t, -1))
    return ew.ABS(t)


def _bump(b: _Builder, point: Tensor, radius: float, made_of: Bump) -> Node:
    """A node [1, 1]: exactly 1 at the point and exactly 0 beyond `radius` (relu, abs, max, conv, in the sum or maximum
    of distances); for the others near these, and greatest at the point."""
    n = point.numel()
    gap = subtract(b.flat, b.constant(point.reshape(1, n)))
    one, near = Fill(1.0, (1, 1))(), 1 / radius
    match made_of:
        case "relu" | "abs":
            return ew.RELU(subtract(one, scale(Sum((1,))(_absolute(made_of, gap)), near)))
        case "max":
            far = reshape(MaxPool((n,), (n,), (0,), (1,))(reshape(_absolute("max", gap), (1, 1, n))), (1, 1))
            return Maximum()(subtract(one, scale(far, near)), Fill(0.0, (1, 1))())
        case "conv":
            square = point.dim() == 4
            shape = tuple(point.shape) if square else (1, 1, 1, n)
            channels = shape[1]
            both = torch.zeros(2 * channels, channels, 1, 1)
            both[range(channels), range(channels)], both[range(channels, 2 * channels), range(channels)] = 1.0, -1.0
            sides = ew.RELU(Conv((1, 1), (0, 0), (1, 1), 1)(reshape(gap, shape), b.weight(both)))
            whole = b.weight(torch.full((1, 2 * channels, *shape[2:]), -near))
            total = reshape(Conv((1, 1), (0, 0), (1, 1), 1)(sides, whole), (1, 1))
            return ew.RELU(add(total, one))
        case "tanh" | "sigmoid":
            f, steep = (ew.TANH, 4.0) if made_of == "tanh" else (ew.SIGMOID, 8.0)
            edge = Fill(steep, (1, n))()
            up, down = (f(Combine((s * steep * near, 1.0))(gap, edge)) for s in (1, -1))
            top = 2 * (math.tanh(steep) if made_of == "tanh" else 1 / (1 + math.exp(-steep)))
            short = add(Sum((1,))(add(up, down)), Fill(-n * top + 0.1, (1, 1))())
            level = f(scale(short, 100.0))
            return scale(add(level, one), 0.5) if made_of == "tanh" else level
        case "softmax":
            score = subtract(one, scale(Sum((1,))(ew.ABS(gap)), near))
            both_scores = Concat(1)(scale(score, 30.0), Fill(0.0, (1, 1))())
            return Gather(1, (0,))(Softmax(1)(both_scores))
        case "attention":
            # One query meets two keys: itself, turned round, and nothing. The value of the second is 1.
            keys = Concat(0)(scale(gap, -1.0), Fill(0.0, (1, n))())
            scores = MatMul()(scale(gap, 30.0 * near * near), transpose(keys))
            bias = b.constant(torch.tensor([[30.0, 0.0]]))
            weights = Softmax(1)(add(scores, bias))
            return MatMul()(weights, b.weight(torch.tensor([[1.0], [0.0]])))
    raise InvalidInput(f"made_of is {made_of!r}; choose one of {', '.join(BUMPS)}.")


def _host(b: _Builder, centre: Tensor, slopes: Tensor, made_of: Host, seed: int) -> Node:
    """A node [1, 1] that is least, -phi(sum_i slopes_i psi(+-radius)), at the corner centre + radius."""
    n = centre.numel()
    gap = subtract(b.flat, b.constant(centre.reshape(1, n)))
    weights = b.weight(slopes.reshape(1, n))
    match made_of:
        case "relu" | "abs":
            return scale(Dense()(_absolute(made_of, gap), weights), -1.0)
        case "conv":
            shape = tuple(centre.shape) if centre.dim() == 4 else (1, 1, 1, n)
            kernel = b.weight(slopes.reshape(1, *shape[1:]))
            rises = ew.RELU(reshape(gap, shape))
            return scale(reshape(Conv((1, 1), (0, 0), (1, 1), 1)(rises, kernel), (1, 1)), -1.0)
        case "tanh" | "sigmoid":
            return scale((ew.TANH if made_of == "tanh" else ew.SIGMOID)(Dense()(ew.TANH(gap), weights)), -1.0)
        case "paired":
            # relu(t) - relu(-t) - t vanishes, and every relaxation of it does not.
            source = torch.Generator().manual_seed(seed)
            mixed = b.weight(torch.randint(-8, 9, (2 * n, n), generator=source).float() / 8)
            t = Dense()(gap, mixed)
            pairs = Combine((1.0, -1.0, -1.0))(ew.RELU(t), ew.RELU(scale(t, -1)), t)
            return Combine((-1.0, 1.0))(Dense()(_absolute("relu", gap), weights), Sum((1,))(pairs))
    raise InvalidInput(f"host is {made_of!r}; choose one of {', '.join(HOSTS)}.")


@dataclass(frozen=True, eq=False)
class Place:
    """Where things are: dyadic numbers, so that the box, the point and their differences are the same in float32, in
    float64 and as decimals.

    Attributes:
        centre, wide: of the box, and how far it reaches to either side.
        point: of the bump.
        corner: where the host is least.
        slopes: [n], of the host.
    """

    centre: Tensor
    wide: Tensor
    point: Tensor
    corner: Tensor
    slopes: Tensor


def place(position: Position, shape: tuple[int, ...], eps: float, source: torch.Generator) -> Place:
    """A box about as wide as eps says, and a point of it.

    Raises:
        InvalidInput: there is no such position.
    """
    if position not in POSITIONS:
        raise InvalidInput(f"position is {position!r}; choose one of {', '.join(POSITIONS)}.")
    n = math.prod(shape)
    centre = torch.randint(-64, 65, shape, generator=source).double() / 128
    wide = torch.full(shape, 2.0 ** round(math.log2(eps)), dtype=F64)
    share = torch.randint(-48, 49, shape, generator=source).double() / 64
    sides = torch.randint(0, 2, shape, generator=source).double() * 2 - 1
    if position == "corner":
        share = sides
    elif position == "face":
        k = int(torch.randint(n, (1,), generator=source))
        share.view(-1)[k] = sides.view(-1)[k]
    slopes = (0.25 + 0.75 * torch.rand(n, generator=source)) / (n * float(wide.flatten()[0]))
    return Place(centre, wide, centre + share * wide, centre + wide, slopes)


def _value(network: Network, node: Node, x: Tensor) -> Fraction:
    """A number [1, 1] of the network at a point, evaluated in float64: exact to some 1e-15 of what it adds up."""
    (value,) = network.to(F64).evaluate([node], x.double())
    return Fraction(float(value))


def instance(
    *,
    host: Host = "relu",
    bump: Bump | None = "relu",
    position: Position = "corner",
    shape: tuple[int, ...] = (1, 6),
    eps: float = 0.25,
    radius: float = 0.05,
    margin: float = 1e-3,
    holds: bool = False,
    seed: int = 0,
) -> Instance:
    """A claim of robustness whose answer is known.

    Args:
        host: what the robust part is made of. It leaves a margin of about 1 everywhere.
        bump: what the planted part is made of; None for the host alone, whose margin at the box's corner then decides.
        position: where in the box the bump is: a corner, the middle of a face up to random moves within it, or inside.
        shape: of the input; [1, c, h, w] or [1, n].
        radius: of the bump.
        margin: by how much the witness violates the claim, or by how much it holds.
        holds: whether the claim is to hold: the bump is then too low by `margin` at the point of the box where the host
            is least, and elsewhere lower still.

    Raises:
        InvalidInput: an argument is not one of those listed, or not positive.
    """
    if not (eps > 0 and radius > 0 and margin > 0):
        raise InvalidInput(f"eps={eps}, radius={radius}, margin={margin}: give positive numbers.")
    found = place(position, shape, eps, torch.Generator().manual_seed(seed))
    centre, wide, point, corner, slopes = found.centre, found.wide, found.point, found.corner, found.slopes
    b = _Builder(shape)
    base = _host(b, centre, slopes.to(F32), host, seed)
    draft = b.network(base, "host")
    worst = _value(draft, base, corner)
    name = f"{host}-{bump or 'plain'}-{position}-{'robust' if holds else 'planted'}-{margin:g}-{seed}"
    zero = Fill(0.0, (1, 1))()
    if bump is None:
        # The margin is least at the corner; there it is to be +-margin.
        parts = two_parts(Fraction(margin if holds else -margin) - worst, down=not holds)
        raised = add(base, *(b.constant(torch.tensor([[part]])) for part in parts))
        network = b.network(Concat(1)(raised, zero), name)
        by = float(worst + sum(map(Fraction, parts)))
        witness = None if holds else corner
        return checked(Instance(name, network, centre - wide, centre + wide, holds, by if holds else -by, witness))
    top = b.constant(torch.tensor([[float(1 - worst)]]))
    hump = _bump(b, point, radius, bump)
    wall = add(base, top)
    draft = b.network(Concat(1)(wall, hump), name)
    there, peak = _value(draft, wall, point), _value(draft, hump, point)
    if holds:  # at any point the wall is at least what it is at the corner, and the bump at most its peak
        least = _value(draft, wall, corner)
        height = (least - Fraction(margin)) / peak
        one, two = two_parts(height, down=True)
        truth = float(least - (Fraction(one) + Fraction(two)) * peak)
        result = Combine((one, two))(hump, hump)
        return checked(
            Instance(name, b.network(Concat(1)(wall, result), name), centre - wide, centre + wide, True, truth)
        )
    one, two = two_parts((there + Fraction(margin)) / peak, down=False)
    result = Combine((one, two))(hump, hump)
    depth = float((Fraction(one) + Fraction(two)) * peak - there)
    network = b.network(Concat(1)(wall, result), name)
    return checked(Instance(name, network, centre - wide, centre + wide, False, depth, point))


def two_parts(q: Fraction, *, down: bool) -> tuple[float, float]:
    """Two numbers of float32 whose sum is q to some 1e-14 of it, on the safe side."""
    one = float(torch.tensor(float(q), dtype=F32))
    rest = torch.tensor(float(q - Fraction(one)), dtype=F32)
    way = torch.tensor(-math.inf if down else math.inf)
    return one, float(torch.nextafter(rest, way))


def checked(made: Instance) -> Instance:
    """The instance, if evaluating its witness agrees with what was meant.

    The truth is decided over the reals; float64 errs by some 1e-14 here, less than the smallest margin.
    """
    network = made.network.to(F64)
    if not made.margin > 1e-11:
        raise InvalidInput(f"margin: {made.margin:.3g} is below what float64 can tell; allow 1e-10 at least.")
    if made.witness is not None:
        y = network(made.witness.double()).reshape(-1)
        inside = bool(((made.witness >= made.lower) & (made.witness <= made.upper)).all())
        if not inside or not float(y[1] - y[0]) > made.margin / 2:
            raise InvalidInput(f"{made.name}: the planted point is no counterexample; this is a defect of soundly.")
    return made
