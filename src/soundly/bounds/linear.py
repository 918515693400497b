"""Backward linear bounds (CROWN): outputs and explanations alike, as linear functions of the inputs.

A row asks for a bound on a linear function of some node. It is carried back through the graph: through linear maps and
products with a constant by their adjoints, which are the derivative rules; through elementwise functions by lines below
and above; through products of two variables by McCormick planes. The pass never mentions an operation by name.

Reference: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions", NeurIPS
2018; McCormick, Mathematical Programming 10, 1976.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from soundly.bounds.interval import Interval, interval_bounds
from soundly.bounds.relaxation import Lines, default_lines
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
        region: bounds (lower, upper) of every input, and of each parameter that ranges.
        of: bound another node than the output.
        chunk: how many numbers the largest intermediate coefficient array may have.

    Returns:
        lower, upper [k] with lower[i] <= <rows[i], value> <= upper[i] over the region, in real arithmetic up to the
        rounding of this pass itself. Infinite where nothing is known, never NaN.

    Raises:
        InvalidInput: rows or region do not fit.
    """
    node = of or network.output
    if tuple(rows.shape[1:]) != node.shape:
        raise InvalidInput(f"rows have shape {tuple(rows.shape)}; give [k, {', '.join(map(str, node.shape))}].")
    known = interval_bounds(network, region, topological([node]))  # also checks the region
    flat, new = _expanded(network, node)
    bounds = _refined(flat, region, new[node], {new[n]: b for n, b in known.items() if n in new}, chunk)
    with torch.no_grad():
        return _Pass(flat, region, bounds, new[node], chunk).bounds(rows.to(network.dtype))


def _expanded(network: Network, node: Node) -> tuple[Network, dict[Node, Node]]:
    """The network with every composite replaced by its expansion, and the map from old to new nodes."""
    total = {n: n for n in topological([node])}
    while any(isinstance(n.op, Composite) for n in topological([total[node]])):
        step = rebuild([total[node]], lambda _, n: n.op.expand(*n.inputs) if isinstance(n.op, Composite) else n)
        total = {old: step[n] for old, n in total.items() if n in step}
    return replace(network, outputs=(total[node],), places={}), total


def _refined(
    network: Network, region: Region, of: Node, known: dict[Node, Interval], chunk: int
) -> dict[Node, Interval]:
    """Intervals of all nodes, those that a relaxation depends on tightened by backward passes, inputs first."""
    order = topological([of])
    varying = dependents(order, region)
    relaxed = {c for n in order if n in varying for c in n.inputs if c in varying and _relaxes(n, varying)}
    bounds: dict[Node, Interval] = {}
    for node in order:
        if isinstance(node.op, Leaf):
            bounds |= interval_bounds(network, region, [node])
        else:
            given = {**{n: (b.lower, b.upper) for n, b in bounds.items() if n in node.inputs}, **region}
            bounds |= interval_bounds(network, given, [node])
        if node in known:
            bounds[node] = _meet(bounds[node], known[node])
        if node in relaxed and node not in region:
            bounds[node] = _tightened(network, region, bounds, node, chunk)
    return bounds


def _relaxes(node: Node, varying: set[Node]) -> bool:
    """Whether a node is neither linear nor a product with a constant."""
    if isinstance(node.op, Product):
        return node.inputs[0] in varying and node.inputs[1] in varying
    return not isinstance(node.op, Linear)


def _tightened(network: Network, region: Region, bounds: dict[Node, Interval], node: Node, chunk: int) -> Interval:
    """The node's interval met with a backward pass for each of its entries that ranges."""
    lower, upper = (side.reshape(-1).clone() for side in bounds[node])
    entries = (lower < upper).nonzero()[:, 0]
    run = _Pass(network, region, bounds, node, chunk)
    for part in entries.split(max(1, chunk // max(1, run.widest))):
        rows = torch.zeros(len(part), len(lower), dtype=lower.dtype, device=lower.device)
        rows[torch.arange(len(part)), part] = 1
        low, high = run.bounds(rows.reshape(-1, *node.shape))
        lower[part], upper[part] = torch.maximum(lower[part], low), torch.minimum(upper[part], high)
    return _meet(Interval(lower.reshape(node.shape), upper.reshape(node.shape)), bounds[node])


def _meet(a: Interval, b: Interval) -> Interval:
    """The intersection; where rounding makes it empty, the second."""
    lower, upper = torch.maximum(a.lower, b.lower), torch.minimum(a.upper, b.upper)
    crossed = lower > upper
    return Interval(torch.where(crossed, b.lower, lower), torch.where(crossed, b.upper, upper))


class _Pass:
    """Backward passes from one node; relaxations are computed once and used for every row."""

    def __init__(self, network: Network, region: Region, bounds: Mapping[Node, Interval], of: Node, chunk: int) -> None:
        self.network, self.region, self.interval, self.of = network, region, bounds, of
        self.order = topological([of])
        self.varying = dependents(self.order, region)
        self.widest = max(math.prod(n.shape) for n in self.order)
        self.chunk = chunk
        fixed = [n for n in self.order if n not in self.varying]
        values = Plan(fixed)(network.values, dtype=network.dtype, device=network.device) if fixed else ()
        self.values = dict(zip(fixed, values, strict=True))
        self.lines: dict[Node, Lines] = {}

    def bounds(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """lower, upper [k] of <row, of>."""
        parts = rows.split(max(1, self.chunk // max(1, self.widest)))
        lower = torch.cat([self._lower(part) for part in parts])
        upper = torch.cat([-self._lower(-part) for part in parts])
        return lower, upper

    def _lower(self, rows: Tensor) -> Tensor:
        total = torch.zeros(len(rows), dtype=rows.dtype, device=rows.device)
        coefficients: dict[Node, Tensor] = {self.of: rows}

        def add(node: Node, a: Tensor) -> None:
            coefficients[node] = coefficients[node] + a if node in coefficients else a

        for node in reversed(self.order):
            a = coefficients.pop(node, None)
            if a is None:
                continue
            if node in self.values:
                total = total + _dot(a, self.values[node])
            elif node in self.region:
                lower, upper = self.region[node]
                total = total + _dot(a.clamp(min=0), lower) + _dot(a.clamp(max=0), upper)
            elif isinstance(node.op, Elementwise):
                lines = self.lines.setdefault(node, default_lines(node.op, *self.interval[node.inputs[0]]))
                up, down = a.clamp(min=0), a.clamp(max=0)
                add(node.inputs[0], up * lines.slope_low + down * lines.slope_high)
                total = total + _dot(up, lines.offset_low) + _dot(down, lines.offset_high)
            elif isinstance(node.op, Product) and all(c in self.varying for c in node.inputs):
                total = total + self._mccormick(node, a, add)
            elif isinstance(node.op, (Linear, Product)):
                for slot, child in enumerate(node.inputs):
                    if child in self.varying:
                        add(child, self._pull(node, slot, a, self.values))
                    elif isinstance(node.op, Linear):
                        total = total + _dot(self._pull(node, slot, a, self.values), self.values[child])
            else:
                raise MissingRule(f"{node!r} has no linear relaxation.")
        return total.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)

    def _mccormick(self, node: Node, a: Tensor, add: object) -> Tensor:
        """x y >= x yl + xl y - xl yl, and x y <= x yu + xl y - xl yu, each for the rows' signs, averaged with the
        planes at the opposite corners."""
        x, y = node.inputs
        (xl, xu), (yl, yu) = self.interval[x], self.interval[y]
        up, down = a.clamp(min=0) / 2, a.clamp(max=0) / 2
        total = torch.zeros(len(a), dtype=a.dtype, device=a.device)
        for part, cx, cy in ((up, xl, yl), (up, xu, yu), (down, xl, yu), (down, xu, yl)):
            add(x, self._pull(node, 0, part, {y: cy}))  # type: ignore[operator]
            add(y, self._pull(node, 1, part, {x: cx}))  # type: ignore[operator]
            total = total - _dot(part, node.op.apply(cx, cy))
        return total

    def _pull(self, node: Node, slot: int, a: Tensor, values: Mapping[Node, Tensor]) -> Tensor:
        """The transposed map towards one input, for all rows at once: the derivative rule, evaluated."""
        cotangent = Input("cotangent", node.shape)()
        op = node.op
        rule = op.adjoint if isinstance(op, Linear) else op.partial  # type: ignore[attr-defined]
        pulled = rule(slot, cotangent, node.inputs)
        plan = Plan([pulled], stop=node.inputs)
        given = {c: values[c] for c in node.inputs if c in values}

        def run(row: Tensor) -> Tensor:
            return plan({**given, cotangent: row}, dtype=a.dtype, device=a.device)[0]

        result: Tensor = torch.vmap(run)(a)
        return result


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """<a[i], b> for each row; an infinite bound with coefficient zero counts as zero."""
    product = torch.where(a == 0, torch.zeros_like(a), a * b)
    return product.reshape(len(a), -1).sum(1)


__all__: Sequence[str] = ["linear_bounds"]
