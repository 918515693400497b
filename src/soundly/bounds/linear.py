"""Backward linear bounds (CROWN): outputs and explanations alike, as linear functions of the inputs.

A row asks for a bound on a linear function of some node. It is carried back through the graph: through linear maps and
products with a constant by their adjoints, which are the derivative rules; through elementwise functions by lines below
and above; through products of two variables by planes; what has no relaxation counts with its interval. The pass never
mentions an operation by name.

Each step replaces <a, y> by <a', x> + d; what rounding changes in it is at most a few units of <|a|, size of y's terms>
and is subtracted, so that the bounds hold for the real numbers whatever type the pass computes in.

Reference: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions", NeurIPS
2018; McCormick, Mathematical Programming 10, 1976.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soundly.bounds.interval import Interval, interval_bounds, interval_step
from soundly.bounds.relaxation import Lines, default_lines, outward, straight
from soundly.errors import InvalidInput, MissingRule
from soundly.graph.elementwise import Elementwise
from soundly.graph.evaluate import Plan
from soundly.graph.network import Network
from soundly.graph.node import Composite, Input, Leaf, Linear, Node, Product, dependents, topological
from soundly.graph.simplify import rebuild

Region = Mapping[Node, tuple[Tensor, Tensor]]


def linear_bounds(
    network: Network, rows: Tensor, region: Region, *, of: Node | None = None, chunk: int = 2**26
) -> tuple[Tensor, Tensor]:
    """Bounds linear functions of the output while inputs and weights range over boxes.

    Args:
        rows: coefficients [k, *output]; row i asks for bounds on <rows[i], output>.
        region: bounds (lower, upper) of every input, and of each parameter that ranges; as for `interval_bounds`.
        of: bound another node than the output.
        chunk: how many numbers the largest intermediate coefficient array may have.

    Returns:
        lower, upper [k] with lower[i] <= <rows[i], value> <= upper[i] over the region in real arithmetic (underflow
        apart), never looser than intervals. Infinite where nothing is known, never NaN.

    Raises:
        InvalidInput: rows or region do not fit.
        MissingRule: an input without bounds.
    """
    node = network.output if of is None else of
    if tuple(rows.shape[1:]) != node.shape or rows.dim() == len(node.shape):
        raise InvalidInput(f"rows have shape {tuple(rows.shape)}; give [k, {', '.join(map(str, node.shape))}].")
    if rows.dtype != network.dtype or not bool(torch.isfinite(rows).all()):
        raise InvalidInput(f"rows are {rows.dtype}, or not finite; give finite numbers in {network.dtype}.")
    known = interval_bounds(network, region, topological([node]))  # also checks the region
    with torch.no_grad():
        return _Pass(network, _expanded(node, region), known, chunk).bounds(rows)


@dataclass(frozen=True)
class _Graph:
    """A node's graph without what lies below the region, and composites expanded where they can be.

    Attributes:
        of: what is bounded.
        region: the boxes, by new leaves.
        new: where the original nodes went.
        wholes: the root of each expansion, and the composite over new nodes that it replaced.
    """

    of: Node
    region: dict[Node, Interval]
    new: dict[Node, Node]
    wholes: tuple[tuple[Node, Node], ...]


def _expanded(of: Node, region: Region) -> _Graph:
    new = rebuild([of], lambda old, node: Input(str(node.op), node.shape)() if old in region else node)
    boxes = {new[node]: Interval(*box) for node, box in region.items() if node in new}
    wholes: list[tuple[Node, Node]] = []
    kept: set[Node] = set()

    def expand(old: Node, node: Node) -> Node:
        if not isinstance(node.op, Composite) or old not in varying:
            return node
        try:
            root = node.op.expand(*node.inputs)
        except MissingRule:  # it stays, and counts with its interval
            kept.add(node)
            return node
        wholes.append((root, node))
        return root

    while True:  # expansions may hold composites
        varying = dependents(order := topological([new[of]]), boxes)
        if not any(isinstance(n.op, Composite) and n in varying and n not in kept for n in order):
            break
        before, wholes = wholes, []
        step = rebuild([new[of]], expand)
        for root, whole in before:
            if all(node in step for node in (root, *whole.inputs)):
                wholes.append((step[root], replace(whole, inputs=tuple(step[c] for c in whole.inputs))))
        new = {old: step[n] for old, n in new.items() if n in step}
    last = set(order)
    return _Graph(new[of], boxes, {old: n for old, n in new.items() if n in last}, tuple(wholes))


class _Pass:
    """Backward passes through one graph: intervals of all nodes, inputs first, then any rows of the last.

    Intervals that a relaxation depends on are tightened by a pass from there, row by row, where it may help.
    """

    def __init__(self, network: Network, graph: _Graph, known: Mapping[Node, Interval], chunk: int) -> None:
        self.graph, self.dtype, self.device = graph, network.dtype, network.device
        self.order = topological([graph.of])
        self.position = {node: i for i, node in enumerate(self.order)}
        self.varying = dependents(self.order, graph.region)
        self.consumers: defaultdict[Node, list[Node]] = defaultdict(list)
        for node in self.order:
            for child in node.inputs:
                self.consumers[child].append(node)
        self.rows_at_once = max(1, chunk // (2 * max(math.prod(n.shape) for n in self.order)))
        self.interval: dict[Node, Interval] = {}
        self.lines: dict[Node, Lines] = {}
        self.plans: dict[tuple[Node, int], tuple[Plan, Node, Node, int]] = {}
        also: defaultdict[Node, list[Node | Interval]] = defaultdict(list)  # what else encloses a node
        for root, whole in graph.wholes:
            also[root].append(whole)
        for old, new in graph.new.items():
            also[new].append(known[old])

        def step(node: Node) -> Interval:
            return interval_step(network, node, [self.interval[child] for child in node.inputs])

        for node in self.order:
            self.interval[node] = graph.region[node] if node in graph.region else step(node)
            if node in self.varying and node not in graph.region:
                for other in also[node]:
                    self.interval[node] = _meet(step(other) if isinstance(other, Node) else other, self.interval[node])
                self._tighten(node)

    def _tighten(self, node: Node) -> None:
        """Meets the node's interval with a backward pass, where a relaxation above depends on it."""
        lower, upper = self.interval[node]
        wanted = torch.zeros_like(lower, dtype=torch.bool)
        for consumer in self.consumers[node]:
            if isinstance(consumer.op, Elementwise):
                wanted |= ~straight(consumer.op, lower, upper)
            elif isinstance(consumer.op, Composite) or (
                isinstance(consumer.op, Product) and all(c in self.varying for c in consumer.inputs)
            ):
                wanted |= True
        entries = (wanted & (lower < upper)).reshape(-1).nonzero()[:, 0]
        if len(entries) == 0 or isinstance(node.op, Composite):
            return
        low, high = lower.reshape(-1).clone(), upper.reshape(-1).clone()
        for part in entries.split(self.rows_at_once):
            rows = torch.zeros(len(part), len(low), dtype=self.dtype, device=self.device)
            rows.scatter_(1, part[:, None], 1)
            low[part], high[part] = self._chunk(rows.reshape(-1, *node.shape), node)
        self.interval[node] = _meet(Interval(low.reshape(node.shape), high.reshape(node.shape)), self.interval[node])

    def bounds(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """lower, upper [k] of <row, value>, met with what the interval says."""
        of = self.graph.of
        plain = _Total(torch.cat([rows, -rows]))
        plain.concretise(plain.rows, self.interval[of])
        parts = [self._chunk(part, of) for part in rows.split(self.rows_at_once)]
        lower, upper = (torch.cat(side) for side in zip(*parts, strict=True))
        return _meet(Interval(lower, upper), plain.sides())

    def _chunk(self, rows: Tensor, of: Node) -> Interval:
        """Bounds of <row, of>: one pass for both sides."""
        total = _Total(torch.cat([rows, -rows]))
        coefficients = {of: total.rows}
        for node in reversed(self.order[: self.position[of] + 1]):
            a = coefficients.pop(node, None)
            if a is None:
                continue
            if node not in self.varying or isinstance(node.op, (Leaf, Composite)):
                total.concretise(a, self.interval[node])
                continue
            for child, part in self._back(node, a, total):
                coefficients[child] = coefficients[child] + part if child in coefficients else part
        return total.sides()

    def _back(self, node: Node, a: Tensor, total: _Total) -> list[tuple[Node, Tensor]]:
        """Coefficients of the node's inputs for those of the node; constants and rounding go to the total."""
        op, x = node.op, node.inputs
        steps = 4 + max(len(self.consumers[child]) for child in x)
        if isinstance(op, Elementwise):
            lines = self.lines.get(node)
            if lines is None:
                lines = self.lines[node] = default_lines(op, *self.interval[x[0]])
            up, down = a.clamp(min=0), a.clamp(max=0)
            total.add(up, lines.offset_low)
            total.add(down, lines.offset_high)
            steepest = torch.maximum(lines.slope_low.abs(), lines.slope_high.abs())
            total.lose(a, torch.where(steepest == 0, 0.0, steepest * self.interval[x[0]].size), steps)
            return [(x[0], up * lines.slope_low + down * lines.slope_high)]
        size = [self.interval[child].size for child in x]
        if isinstance(op, Linear):
            pulled = [self._pull(node, slot, a) for slot in range(len(x))]
            total.lose(a, op.absolute.apply(*size), steps + max(n for _, n in pulled))
            return [(child, part) for child, (part, _) in zip(x, pulled, strict=True)]
        if not isinstance(op, Product):
            raise MissingRule(f"{node!r} has no linear relaxation.")
        for slot, child in enumerate(x):
            if self.interval[child].is_point:
                part, n = self._pull(node, 1 - slot, a, self.interval[child].lower)
                total.lose(a, op.apply(*size), steps + n)
                return [(x[1 - slot], part)]
        # With centres c and radii r, (x - cx) (y - cy) lies between -rx ry and rx ry: the middle McCormick planes.
        (cx, rx), (cy, ry) = (_ball(self.interval[child]) for child in x)
        (part_x, n), (part_y, m) = self._pull(node, 0, a, cy), self._pull(node, 1, a, cx)
        total.add(-a, op.apply(cx, cy))
        total.add(-a.abs(), op.apply(rx, ry).nan_to_num(nan=math.inf))
        total.lose(a, 4 * op.apply(*size), steps + n + m + op.terms(*(child.shape for child in x)))
        return [(x[0], part_x), (x[1], part_y)]

    def _pull(self, node: Node, slot: int, a: Tensor, other: Tensor | None = None) -> tuple[Tensor, int]:
        """The transposed map towards one input for all rows at once, and how many roundings an entry of it took."""
        known = self.plans.get((node, slot))
        if known is None:
            cotangent = Input("cotangent", node.shape)()
            # Inputs of their own, so that the two of a product are told apart even where both are one node.
            inputs = tuple(Input(str(i), child.shape)() for i, child in enumerate(node.inputs))
            rule = node.op.adjoint if isinstance(node.op, Linear) else node.op.partial  # type: ignore[attr-defined]
            pulled = rule(slot, cotangent, inputs)
            inner = [n for n in topological([pulled]) if isinstance(n.op, (Linear, Product))]
            steps = sum(n.op.terms(*(child.shape for child in n.inputs)) for n in inner)  # type: ignore[attr-defined]
            known = self.plans[node, slot] = (
                Plan([pulled]),
                cotangent,
                inputs[-1 - slot] if other is not None else cotangent,
                steps,
            )
        plan, cotangent, partner, steps = known
        given = {} if other is None else {partner: other}

        def run(row: Tensor) -> Tensor:
            return plan({**given, cotangent: row}, dtype=self.dtype, device=self.device)[0]

        result: Tensor = torch.vmap(run)(a)
        return result, steps


class _Total:
    """Lower bounds of rows as they are collected, in float64, and what rounding may have changed in them."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.unit = torch.finfo(rows.dtype).eps / 2
        self.value = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        self.error = torch.zeros_like(self.value)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Adds <a[i], b>; where a coefficient other than zero meets an infinite number, nothing is known."""
        value, size = _dot(a, b), _dot(a.abs(), b.abs())
        self.value = self.value + torch.where(size < math.inf, value, -math.inf)
        self.error = self.error + (b.numel() + 4) * 2.0**-53 * size

    def lose(self, a: Tensor, size: Tensor, steps: int) -> None:
        """Accounts for some roundings of terms of that size."""
        self.error = self.error + steps * self.unit * _dot(a.abs(), size.nan_to_num(nan=math.inf))

    def concretise(self, a: Tensor, bounds: Interval) -> None:
        """Adds the least of <a[i], x> for x in an interval."""
        if bounds.is_point:
            self.add(a, bounds.lower)
        else:
            self.add(a.clamp(min=0), bounds.lower)
            self.add(a.clamp(max=0), bounds.upper)

    def sides(self) -> Interval:
        """What rows and their negatives say together: lower and upper bounds."""
        bound = self.value - 2 * self.error
        low = bound.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        lower, upper = low.chunk(2)
        return Interval(outward(lower, -1, self.rows.dtype), outward(-upper, 1, self.rows.dtype))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """<a[i], b> for each row in float64, infinite where a coefficient other than zero meets an infinite number."""
    a, b = a.reshape(len(a), b.numel()).double(), b.reshape(-1).double()
    infinite = torch.isinf(b)
    if not bool(infinite.any()):
        return a @ b
    return torch.where((a[:, infinite] != 0).any(1), math.inf, a @ b.masked_fill(infinite, 0))


def _ball(x: Interval) -> tuple[Tensor, Tensor]:
    """Centre and radius; a radius is infinite where nothing is known."""
    centre = (x.lower / 2 + x.upper / 2).nan_to_num(0.0, 0.0, 0.0)
    return centre, torch.maximum(x.upper - centre, centre - x.lower)


def _meet(a: Interval, b: Interval) -> Interval:
    """The intersection; where that is empty, the second."""
    lower, upper = torch.maximum(a.lower, b.lower), torch.minimum(a.upper, b.upper)
    crossed = lower > upper
    return Interval(torch.where(crossed, b.lower, lower), torch.where(crossed, b.upper, upper))
