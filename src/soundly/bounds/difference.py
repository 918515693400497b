"""The difference of two networks as a network that is easy to bound: equal structures are subtracted layer by layer.

Bounds of net(x) - other(x) taken apart from each other are as wide as the values themselves. Here the difference is
carried along instead: through a layer as W d + (W - W') y', through a ReLU by the identity

    relu(b + d) - relu(b) = relu(d - relu(-b)) - relu(-d - relu(-b - d)),

which holds for all numbers and lies between min(d, 0) and max(d, 0) whatever is known of b. So the result *is*
net - other, at every input; a region only decides in which of two equal ways an entry is written.

Reference: Paulsen, Wang, Wang, "ReluDiff: Differential Verification of Deep Neural Networks", ICSE 2020 (differences
of neurons with intervals of their own); the identity is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product

import torch
from torch import Tensor

from soundly.bounds.batch import Bounder
from soundly.bounds.lower import lower
from soundly.errors import CaptureMismatch, InvalidInput
from soundly.graph.composite import Rounding, Softmax
from soundly.graph.elementwise import RELU, Elementwise
from soundly.graph.linear import Gather, ScatterAdd, add, reshape, scale, subtract
from soundly.graph.network import Network
from soundly.graph.node import Composite, Constant, Fill, Leaf, Linear, Node, Product, dependents, topological
from soundly.graph.simplify import rebuild
from soundly.spec.region import Ball, Box

Ends = tuple[Tensor, Tensor]

POINTS = 4
"""At how many points a difference is compared with the networks it was made of."""


def difference(net: Network, other: Network, region: Box | Ball) -> Network:
    """The network x -> net(x) - other(x), written so that its bounds over the region are of the size of the change.

    It computes in float64, on the CPU, where differences of float32 weights are exact.

    Args:
        net, other: of the same input and output shapes. Where both graphs have the same
            operations (weights apart), differences are carried through them; roundings that only one of them has, as
            of quantised activations, count as what they change; from where the graphs part, values are subtracted.
        region: where bounds will be sought; it has no say in the values.

    Raises:
        InvalidInput: the networks do not fit each other or the region.
        MissingRule: a network has an operation that cannot be bounded.
        CaptureMismatch: the result disagrees with the networks at a point, which would be a defect of soundly.
    """
    return _compared(_Differences(net, other, region).network(), net, other, region)


def joined(net: Network, other: Network, region: Box | Ball) -> Network:
    """The network with two outputs other(x) and net(x) - other(x), the latter as `difference` writes it."""
    return _compared(_Differences(net, other, region).network(both=True), net, other, region)


class _Differences:
    """A walk over both graphs at once; each pair of nodes that compute the same thing has its difference."""

    def __init__(self, net: Network, other: Network, region: Box | Ball) -> None:
        _check(net, other, region)
        self.net = _expanded(net.to(torch.float64).to("cpu"))
        self.other = _expanded(_renamed(other.to(torch.float64).to("cpu"), net))
        self.values = {**self.net.values, **self.other.values}
        self.varying = dependents(self.net.nodes, net.inputs) | dependents(self.other.nodes, net.inputs)
        order = self._pairs()
        bends = [pair for pair, (kind, _) in order.items() if kind == "same" and self._bends(pair[0])]
        ends = [
            _ranges(network, [pair[k].inputs[0] for pair in bends], region)
            for k, network in enumerate((self.net, self.other))
        ]
        self.ranges = {pair: (p, q) for pair, p, q in zip(bends, *ends, strict=True)}
        self.difference: dict[tuple[Node, Node], Node | None] = {}
        for pair, (kind, below) in order.items():
            self.difference[pair] = self._of(pair, kind, below)

    def network(self, *, both: bool = False) -> Network:
        pairs = zip(self.net.outputs, self.other.outputs, strict=True)
        found = ((pair, self.difference[pair]) for pair in pairs)
        outputs = [Fill(0.0, pair[0].shape)() if node is None else node for pair, node in found]
        outputs = [*self.other.outputs, *outputs] if both else outputs
        reached = set(topological(outputs))
        return Network(
            self.net.inputs, tuple(outputs), {n: v for n, v in self.values.items() if n in reached},
            name=f"{self.net.name} - {self.other.name}", like=self.net.like,
        )  # fmt: skip

    # -- which nodes belong together

    def _pairs(self) -> dict[tuple[Node, Node], tuple[str, list[tuple[Node, Node]]]]:
        """Every pair that is needed, those below first: how its nodes are related, and the pairs that this rests on."""
        found: dict[tuple[Node, Node], tuple[str, list[tuple[Node, Node]]]] = {}
        order: dict[tuple[Node, Node], tuple[str, list[tuple[Node, Node]]]] = {}
        for root in zip(self.net.outputs, self.other.outputs, strict=True):
            stack = [root]
            while stack:
                pair = stack[-1]
                if pair not in found:
                    found[pair] = self._related(*pair)
                    stack += [below for below in found[pair][1] if below not in order]
                else:
                    order.setdefault(stack.pop(), found[pair])
        return order

    def _related(self, n: Node, m: Node) -> tuple[str, list[tuple[Node, Node]]]:
        if n is m or (isinstance(n.op, Fill) and n.op == m.op):
            return "equal", []
        if n in self.values and m in self.values:
            return ("equal" if torch.equal(self.values[n], self.values[m]) else "weights"), []
        if _alike(n, m):
            return "same", list(zip(n.inputs, m.inputs, strict=True))
        for below in product(_beneath(n, self.varying), _beneath(m, self.varying)):
            if below != (n, m) and (below[0] is below[1] or _alike(*below)):
                return "rounded", [below]
        return "apart", []

    def _bends(self, n: Node) -> bool:
        return isinstance(n.op, Elementwise) and n in self.varying and _hinges(n.op) is not None

    # -- differences

    def _of(self, pair: tuple[Node, Node], kind: str, below: Sequence[tuple[Node, Node]]) -> Node | None:
        """n - m; None where that is zero everywhere."""
        n, m = pair
        if kind == "equal":
            return None
        if kind == "weights":
            return self._constants(n, m)
        if kind == "apart":
            return subtract(n, m)
        d = [self.difference[pair] for pair in below]
        if kind == "rounded":
            (p, q), parts = below[0], [] if d[0] is None else [d[0]]
            parts += [subtract(q, m)] if q is not m else []
            parts += [subtract(n, p)] if n is not p else []
            return add(*parts)
        if all(v is None for v in d):
            return None
        if isinstance(n.op, Product):
            left, right = d
            parts = [n.op(left, self._own(n.inputs[1], m.inputs[1], right))] if left is not None else []
            return add(*parts, n.op(m.inputs[0], right)) if right is not None else parts[0]
        if isinstance(n.op, Linear):
            return n.op(*(Fill(0.0, c.shape)() if v is None else v for v, c in zip(d, n.inputs, strict=True)))
        assert len(d) == 1 and d[0] is not None
        if pair in self.ranges:
            assert isinstance(n.op, Elementwise)
            return _bent(n.op, m.inputs[0], d[0], *self.ranges[pair])
        return subtract(n.op(add(m.inputs[0], d[0])), m)

    def _constants(self, n: Node, m: Node) -> Node:
        """Two tensors' difference, exactly: rounded, and what the rounding lost (Knuth's two-sum)."""
        a, b = self.values[n], -self.values[m]
        total = a + b
        back = total - a
        lost = (a - (total - back)) + (b - back)
        parts = []
        for name, value in (("difference", total), ("its rounding", lost)):
            if bool(value.any()):
                parts.append(Constant(f"{n.op}: {name}", n.shape)())
                self.values[parts[-1]] = value
        return add(*parts)

    def _own(self, n: Node, m: Node, d: Node | None) -> Node:
        """The net's value, where it varies as the other's and their difference, so that these cancel."""
        return n if n not in self.varying else m if d is None else add(m, d)


def _alike(n: Node, m: Node) -> bool:
    """Whether both apply one operation, to values of the same shapes."""
    leaf = isinstance(n.op, Leaf)
    return not leaf and n.op == m.op and [c.shape for c in n.inputs] == [c.shape for c in m.inputs]


def _beneath(node: Node, varying: set[Node]) -> Iterator[Node]:
    """The node, and where it is a rounded value, what is rounded: the nodes below the rounding of the same shape."""
    yield node
    passed = False
    while True:
        passed |= isinstance(node.op, Rounding)
        below = [c for c in node.inputs if c in varying]
        if len(below) != 1 or below[0].shape != node.shape:
            return
        (node,) = below
        if passed:
            yield node


# -- bends


def _hinges(op: Elementwise) -> tuple[float, tuple[tuple[float, float, float], ...]] | None:
    """(c, hinges) with f(x) = constant + c x + sum of p relu(x - t) - q relu(t - x) over the hinges (t, p, q), in exact
    arithmetic; None where there is no such form."""
    lines = []
    for piece in op.pieces:
        if any(e[0] > 1 or any(e[1:]) for e, _ in piece):
            return None
        terms = {e[0]: Fraction(c) for e, c in piece}
        lines.append((terms.get(1, Fraction(0)), terms.get(0, Fraction(0))))
    sides = [(t, *ends) for t, ends in zip(op.breaks, pairwise(lines), strict=True)]
    if not sides or any(a * Fraction(t) + b != p * Fraction(t) + q for t, (a, b), (p, q) in sides):
        return None
    slopes = [a for a, _ in lines]
    turns = [float(q - p) for p, q in pairwise(slopes)]
    if all(turn == q - p for turn, (p, q) in zip(turns, pairwise(slopes), strict=True)):
        return float(slopes[0]), tuple((t, turn, 0.0) for t, turn in zip(op.breaks, turns, strict=True))
    return (0.0, ((op.breaks[0], float(slopes[1]), float(slopes[0])),)) if len(slopes) == 2 else None


def _bent(op: Elementwise, b: Node, d: Node, own: Ends, others: Ends) -> Node:
    """op(b + d) - op(b). Entries that stay on one side of every bend in both networks are subtracted as they are: there
    both values are straight. All others are written as hinges."""
    size = math.prod(b.shape)
    low, high = torch.minimum(own[0], others[0]).reshape(-1), torch.maximum(own[1], others[1]).reshape(-1)
    settled = torch.ones(size, dtype=torch.bool)
    for t in op.breaks:
        settled &= (low >= t) | (high <= t)
    parts = []
    for chosen, straight in ((settled, True), (~settled, False)):
        index = tuple(chosen.nonzero()[:, 0].tolist())
        if not index:
            continue
        y, e = (Gather(0, index)(reshape(v, (size,))) for v in (b, d))
        part = subtract(op(add(y, e)), op(y)) if straight else _hinged(op, y, e)
        parts.append(ScatterAdd(0, index, size)(part))
    return reshape(add(*parts), b.shape)


def _hinged(op: Elementwise, b: Node, d: Node) -> Node:
    found = _hinges(op)
    assert found is not None
    parts = [scale(d, found[0])] if found[0] else []
    for t, p, q in found[1]:
        moved = add(b, Fill(-t, b.shape)()) if t else b
        parts += [scale(_opened(moved, d), p)] if p else []
        parts += [scale(_opened(scale(moved, -1), scale(d, -1)), -q)] if q else []
    return add(*parts)


def _opened(b: Node, d: Node) -> Node:
    """relu(b + d) - relu(b), between 0 and d."""
    rises = RELU(subtract(d, RELU(scale(b, -1))))
    return subtract(rises, RELU(subtract(scale(d, -1), RELU(scale(add(b, d), -1)))))


# -- graphs and bounds


def _check(net: Network, other: Network, region: Box | Ball) -> None:
    for name, network in (("net", net), ("other", other)):
        if not isinstance(network, Network):
            raise InvalidInput(f"{name} is a {type(network).__name__}; give a Network, as soundly.load returns.")
    for side in ("inputs", "outputs"):
        shapes = [[node.shape for node in getattr(network, side)] for network in (net, other)]
        if shapes[0] != shapes[1]:
            raise InvalidInput(f"net and other have {side} of shapes {shapes[0]} and {shapes[1]}; they must be equal.")
    if not isinstance(region, (Box, Ball)) or region.is_empty:
        raise InvalidInput("region must be a Box or a Ball that holds a point.")
    if math.prod(region.shape) != sum(math.prod(node.shape) for node in net.inputs):
        raise InvalidInput(f"region has shape {region.shape}, but the networks take {[n.shape for n in net.inputs]}.")


def _compared(result: Network, net: Network, other: Network, region: Box | Ball) -> Network:
    """The result, which has to agree with the networks at some points of the region."""
    sizes = [math.prod(node.shape) for node in net.inputs]
    for x in region.samples(POINTS):
        inputs = [part.reshape(n.shape) for part, n in zip(x.reshape(-1).split(sizes), net.inputs, strict=True)]
        with torch.no_grad():
            own, others = (v.to(torch.float64).to("cpu").evaluate(v.outputs, *inputs) for v in (net, other))
            found = result.evaluate(result.outputs[-len(own) :], *inputs)
        for y, a, b in zip(found, own, others, strict=True):
            if not bool(((y - (a - b)).abs() <= 1e-9 * (1 + a.abs() + b.abs()).max()).all()):
                gap = float((y - (a - b)).abs().max())
                raise CaptureMismatch(
                    f"the difference of {net.name} and {other.name} is off by {gap:.3g} at a point; nothing may be "
                    "proved with it. Please report the networks."
                )
    return result


def _renamed(other: Network, net: Network) -> Network:
    """The network over the net's inputs and leaves of its own: both may be versions of one graph."""
    inputs = dict(zip(other.inputs, net.inputs, strict=True))
    leaves = {
        n: n if n in inputs else Constant(f"other: {n.op.name}", n.shape)()  # type: ignore[attr-defined]
        for n in other.values
    }
    new = rebuild(other.outputs, lambda old, node: inputs.get(old) or leaves.get(old) or node)
    values = {leaves[n]: v for n, v in other.values.items()}
    return replace(other, inputs=net.inputs, outputs=tuple(new[n] for n in other.outputs), values=values, places={})


def _expanded(network: Network) -> Network:
    """The same network without composites that have expansions; softmax stays: its exponentials could overflow."""
    kept: set[Node] = set()

    def expand(old: Node, node: Node) -> Node:
        if not isinstance(node.op, Composite):
            return node
        if not isinstance(node.op, (Rounding, Softmax)):
            return node.op.expand(*node.inputs)
        kept.add(node)
        return node

    outputs = network.outputs
    while any(isinstance(n.op, Composite) and n not in kept for n in topological(outputs)):
        new = rebuild(outputs, expand)
        outputs = tuple(new[n] for n in outputs)
    return replace(network, outputs=outputs, places={})


def _ranges(network: Network, nodes: Sequence[Node], region: Box | Ball) -> list[Ends]:
    """Bounds of nodes that functions read, over the region's box; good enough to choose by."""
    if not nodes:
        return []
    box, sizes = region.box, [math.prod(node.shape) for node in network.inputs]
    low, high = (end.reshape(-1) for end in (box.lower, box.upper))
    hull: Mapping[Node, Ends] = {
        node: (a.reshape(node.shape), b.reshape(node.shape))
        for node, a, b in zip(network.inputs, low.split(sizes), high.split(sizes), strict=True)
    }
    # Only what a function reads is bounded well; so the functions are asked for, too.
    readers = [RELU(node) for node in nodes]
    with torch.no_grad():
        bounder = Bounder(lower(network, [*nodes, *readers], region=hull).to(torch.float32))
        frame = bounder.refresh(low[None].float(), high[None].float())
    total = sum(math.prod(node.shape) for node in nodes)
    parts = [
        end[-1][0, :total].double().split([math.prod(n.shape) for n in nodes]) for end in (frame.lower, frame.upper)
    ]
    return list(zip(*parts, strict=True))
