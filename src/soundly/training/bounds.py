"""Bounds of a network over boxes that training can follow downhill: differentiable in the weights and in the boxes.

One capture serves a whole batch, one box per example, and always with the module's present weights. Intervals are
carried forwards through every operation; linear rows of the output are then carried backwards through lines around the
intervals (CROWN-IBP). Nothing here accounts for rounding: what training reaches is proved afterwards, by
`soundly.verify`.

Reference: Gowal et al., "On the Effectiveness of Interval Bound Propagation", 2018; Zhang et al., "Towards Stable and
Efficient Training of Verifiably Robust Neural Networks", ICLR 2020.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from soundly.bounds.interval import Interval
from soundly.bounds.propagate import propagate
from soundly.errors import InvalidInput, MissingRule
from soundly.graph import elementwise
from soundly.graph.elementwise import Elementwise
from soundly.graph.evaluate import Plan
from soundly.graph.load import load
from soundly.graph.node import Composite, Fill, Input, Linear, Node, Product, dependents, fill_value, topological
from soundly.graph.simplify import rebuild

Method: TypeAlias = Literal["interval", "crown-ibp"]


class TrainingBounds:
    """Differentiable bounds of a module of one input and one output, whose first dimension is the batch.

    Each example must be computed on its own: batch norm counts as in evaluation mode.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        """
        Args:
            example: a batch [n, ...]; bounds are then for batches of n.
        """
        self.network = load(module, example)
        self.weights = dict(module.named_parameters())
        self.input = self.network.input
        new: dict[Node, Node] = {node: node for node in self.network.nodes}
        while any(isinstance(node.op, Composite) for node in topological([new[self.network.output]])):
            step = rebuild([new[self.network.output]], lambda _, node: _expanded(node))
            new = {old: step[n] for old, n in new.items() if n in step}
        self.output, self.input = new[self.network.output], new[self.network.input]
        self.order = topological([self.output])
        self.varying = dependents(self.order, [self.input])
        self.values = {new[node]: value for node, value in self.network.values.items() if node in new}
        self.parameters = {new[node]: name for name, node in self.network.parameters.items() if node in new}
        self.plans: dict[tuple[Node, int], tuple[Plan, Node, Node]] = {}

    def intervals(self, lower: Tensor, upper: Tensor) -> dict[Node, Interval]:
        """Intervals of all values over boxes [n, ...], by node."""
        if tuple(lower.shape) != self.input.shape or tuple(upper.shape) != self.input.shape:
            raise InvalidInput(f"boxes have shape {tuple(lower.shape)}, but bounds were made for {self.input.shape}.")
        given = {self.input: Interval(lower, upper)}
        for node, value in self.values.items():
            live = self.weights.get(self.parameters.get(node, ""), value)
            given[node] = Interval(live, live)
        return propagate(self.network, _Soft(self.network.dtype), given, self.order)

    def lower(self, rows: Tensor, lower: Tensor, upper: Tensor, *, method: Method = "crown-ibp") -> Tensor:
        """Lower bounds of linear functions of the outputs.

        Args:
            rows: coefficients [k, n, outputs]; row i of example j asks for <rows[i, j], output j>.
            lower, upper: boxes [n, ...].

        Returns:
            [k, n], in real arithmetic not above the functions' least values.
        """
        known = self.intervals(lower, upper)
        rows = rows.reshape(len(rows), *self.output.shape)
        if method == "interval":
            return _least(rows, known[self.output])
        return self._backward(rows, known)

    def margins(self, label: Tensor, lower: Tensor, upper: Tensor, *, method: Method = "crown-ibp") -> Tensor:
        """Lower bounds [n, classes] of output[label] - output[j] over boxes; 0 at j = label. Only an example whose
        others are positive keeps its label in all of its box."""
        classes = self.output.shape[1]
        eye = torch.eye(classes, dtype=lower.dtype, device=lower.device)
        rows = eye[label][None] - eye[:, None]  # [classes, n, classes]
        found = self.lower(rows, lower, upper, method=method).T
        return found.masked_fill(eye[label].bool(), 0.0)

    def _backward(self, rows: Tensor, known: Mapping[Node, Interval]) -> Tensor:
        open_rows: defaultdict[Node, list[Tensor]] = defaultdict(list)
        open_rows[self.output].append(rows)
        total = rows.new_zeros(rows.shape[:2])
        for node in reversed(self.order):
            if node not in open_rows:
                continue
            a: Tensor = sum(open_rows.pop(node))  # type: ignore[assignment]
            if node is self.input or node not in self.varying:
                total = total + _least(a, known[node])
            elif isinstance(node.op, Elementwise):
                (child,) = node.inputs
                slope_low, low, slope_high, high = _lines(node.op, known[child], known[node])
                up, down = a.clamp(min=0), a.clamp(max=0)
                total = total + (up * low + down * high).flatten(2).sum(-1)
                open_rows[child].append(up * slope_low + down * slope_high)
            elif isinstance(node.op, Linear):
                for slot, child in enumerate(node.inputs):
                    open_rows[child].append(self._pull(node, slot, a, None))
            elif isinstance(node.op, Product):
                fixed = [slot for slot, child in enumerate(node.inputs) if child not in self.varying]
                if not fixed:  # both factors vary: the interval is what is known
                    total = total + _least(a, known[node])
                    continue
                other = known[node.inputs[fixed[0]]].lower
                open_rows[node.inputs[1 - fixed[0]]].append(self._pull(node, 1 - fixed[0], a, other))
            else:
                raise MissingRule(f"{node!r} is of no known kind.")
        return total

    def _pull(self, node: Node, slot: int, a: Tensor, other: Tensor | None) -> Tensor:
        """The transposed map of a node towards one input, for all rows at once."""
        if (node, slot) not in self.plans:
            cotangent = Input("cotangent", node.shape)()
            inputs = tuple(Input(str(i), child.shape)() for i, child in enumerate(node.inputs))
            rule = node.op.adjoint if isinstance(node.op, Linear) else node.op.partial  # type: ignore[attr-defined]
            self.plans[node, slot] = Plan([rule(slot, cotangent, inputs)]), cotangent, inputs[-1 - slot]
        plan, cotangent, partner = self.plans[node, slot]
        given = {} if other is None else {partner: other}

        def run(row: Tensor) -> Tensor:
            return plan({**given, cotangent: row}, dtype=a.dtype, device=a.device)[0]

        pulled: Tensor = torch.vmap(run)(a)
        return pulled


class _Soft:
    """The interval domain without rounding, so that gradients pass: fit to train with, not to prove with."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def constant(self, value: Tensor) -> Interval:
        return Interval(value, value)

    def fill(self, op: Fill, device: torch.device) -> Interval:
        return self.constant(fill_value(op, dtype=self.dtype, device=device))

    def linear(self, op: Linear, node: Node, *x: Interval) -> Interval:
        if all(v.is_point for v in x):
            return self.constant(op.apply(*(v.lower for v in x)))
        signs = op.signs(len(x))
        lower = op.apply(*(v.lower if s > 0 else v.upper for v, s in zip(x, signs, strict=True)))
        return Interval(lower, op.apply(*(v.upper if s > 0 else v.lower for v, s in zip(x, signs, strict=True))))

    def product(self, op: Product, node: Node, a: Interval, b: Interval) -> Interval:
        (ca, ra), (cb, rb) = ((v.lower / 2 + v.upper / 2, v.upper / 2 - v.lower / 2) for v in (a, b))
        if a.is_point and b.is_point:
            return self.constant(op.apply(a.lower, b.lower))
        if b.is_point:
            centre, radius = op.apply(ca, b.lower), op.apply(ra, b.lower.abs())
        elif a.is_point:
            centre, radius = op.apply(a.lower, cb), op.apply(a.lower.abs(), rb)
        else:
            centre = op.apply(ca, cb)
            radius = op.apply(ca.abs(), rb) + op.apply(ra, cb.abs()) + op.apply(ra, rb)
        return Interval(centre - radius, centre + radius)

    def elementwise(self, op: Elementwise, x: Interval) -> Interval:
        if x.is_point:
            return self.constant(op.apply(x.lower))
        return Interval(*op.enclose(*x))

    def composite(self, op: Composite, *x: Interval) -> Interval | None:
        return None


def _expanded(node: Node) -> Node:
    return node.op.expand(*node.inputs) if isinstance(node.op, Composite) else node


def _least(a: Tensor, x: Interval) -> Tensor:
    """The least value of <a[i, j], x[j]> over intervals of the shape [n, ...]: [k, n]. Also of what all share."""
    if x.is_point:
        return (a * x.lower).flatten(2).sum(-1)
    return (a.clamp(min=0) * x.lower + a.clamp(max=0) * x.upper).flatten(2).sum(-1)


def _lines(op: Elementwise, x: Interval, y: Interval) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slope and offset of a line below and of one above; the range's ends where the function is not ReLU's."""
    if op != elementwise.RELU:
        flat = torch.zeros_like(y.lower)
        return flat, y.lower, flat, y.upper
    low, high = x.lower.clamp(max=0), x.upper.clamp(min=0)
    chord = high / (high - low).clamp(min=torch.finfo(high.dtype).tiny)
    below = ((x.upper > -x.lower) | (x.lower >= 0)) & (x.upper > 0)  # the line with the smaller area
    return below.to(low), torch.zeros_like(low), chord, -chord * low
