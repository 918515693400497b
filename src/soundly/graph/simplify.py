"""Rewriting a graph into a smaller one that computes the same numbers.

`simplify` cancels what differentiation and capture leave behind: products with ones and zeros, chains of reshapes,
values computed twice. It never looks through a named place of the user's model, so gradients towards places stay right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from soundly.graph.elementwise import Elementwise
from soundly.graph.linear import Combine, Embed, Expand, Permute, Reshape, ScatterAdd, Slice, Sum, broadcast
from soundly.graph.node import Fill, Leaf, Node, Product, topological
from soundly.graph.product import Multiply

if TYPE_CHECKING:
    from soundly.graph.network import Network


def rebuild(outputs: Iterable[Node], rule: Callable[[Node, Node], Node]) -> dict[Node, Node]:
    """Replaces every node by rule(old node, the same over already replaced inputs); the map from old to new."""
    new: dict[Node, Node] = {}
    for node in topological(outputs):
        inputs = tuple(new[child] for child in node.inputs)
        new[node] = rule(node, node if inputs == node.inputs else Node(node.op, inputs, node.shape, node.origin))
    return new


def simplify(network: Network) -> Network:
    """The same function from fewer nodes; values and places that no output needs are forgotten."""
    places = set(network.places.values())
    walls: set[Node] = set()
    known: dict[tuple[object, ...], Node] = {}

    def rule(old: Node, node: Node) -> Node:
        if old in places:  # stays a value of its own: joined with an equal one, its gradient would be that of both
            walls.add(node)
            return node
        while (smaller := _smaller(node, walls)) is not node:
            node = smaller
        if not isinstance(node.op, Leaf) or isinstance(node.op, Fill):
            node = known.setdefault((node.op, node.inputs), node)
        return node

    return renamed(network, rebuild(network.outputs, rule))


def renamed(network: Network, new: dict[Node, Node]) -> Network:
    """The network over rebuilt nodes, without the values and places that its outputs do not depend on."""
    outputs = tuple(new[node] for node in network.outputs)
    reached = set(topological(outputs))
    return replace(
        network,
        outputs=outputs,
        values={n: v for n, v in network.values.items() if n in reached},
        places={name: new[n] for name, n in network.places.items() if new.get(n) in reached},
        like=torch.empty(0, dtype=network.dtype, device=network.device),
    )


def _smaller(node: Node, walls: set[Node]) -> Node:
    """One step towards a simpler node of the same value; the node itself where there is none."""
    op, inputs = node.op, node.inputs
    if not inputs:
        return node
    fills = [c.op.value if isinstance(c.op, Fill) and c not in walls else None for c in inputs]
    if isinstance(op, Combine):
        return _smaller_sum(node, walls)
    if isinstance(op, Product):
        if 0.0 in fills:
            return Fill(0.0, node.shape)()
        if isinstance(op, Multiply):
            for factor, other in ((fills[0], inputs[1]), (fills[1], inputs[0])):
                if factor is not None:
                    return other if factor == 1 else Combine((factor,))(other, origin=node.origin)
    if isinstance(op, Elementwise) and op.is_zero:
        return Fill(0.0, node.shape)()
    if fills[0] is not None:
        if isinstance(op, (Reshape, Expand, Permute, Slice)) or (isinstance(op, (Embed, ScatterAdd)) and fills[0] == 0):
            return Fill(fills[0], node.shape)()
        if isinstance(op, Sum):
            return Fill(fills[0] * op.terms(inputs[0].shape), node.shape)()
    if isinstance(op, (Reshape, Expand, Slice, Embed, Sum)) and node.shape == inputs[0].shape:
        return inputs[0]
    if isinstance(op, Permute) and op.axes == tuple(range(len(op.axes))):
        return inputs[0]
    if isinstance(op, Multiply) and all(isinstance(c.op, Expand) and c not in walls for c in inputs):
        a, b = (c.inputs[0] for c in inputs)
        if a.shape == b.shape:
            return Expand(node.shape)(Multiply()(a, b, origin=node.origin))
    if isinstance(op, Sum) and isinstance(inputs[0].op, Expand) and inputs[0] not in walls:
        small = inputs[0].inputs[0]
        repeated = tuple(a for a in op.axes if small.shape[a] != inputs[0].shape[a])
        if repeated:
            count = math.prod(inputs[0].shape[a] for a in repeated)
            rest = Sum(tuple(a for a in op.axes if a not in repeated))(small, origin=node.origin)
            return Combine((float(count),))(broadcast(rest, node.shape))
    if inputs[0] not in walls and type(inputs[0].op) is type(op):
        inner = inputs[0]
        if isinstance(op, (Reshape, Expand)):
            return op(inner.inputs[0], origin=node.origin)
        if isinstance(op, Permute) and isinstance(inner.op, Permute):
            return Permute(tuple(inner.op.axes[a] for a in op.axes))(inner.inputs[0], origin=node.origin)
    return node


def _smaller_sum(node: Node, walls: set[Node]) -> Node:
    """Drops zeros, joins equal inputs, adds up constants, merges the scaling of a scaling."""
    assert isinstance(node.op, Combine)
    total: dict[Node, float] = {}
    constant = 0.0
    for factor, child in zip(node.op.coefficients, node.inputs, strict=True):
        if isinstance(child.op, Fill) and child not in walls:
            constant += factor * child.op.value
            continue
        if isinstance(child.op, Combine) and len(child.inputs) == 1 and child not in walls:
            factor, child = factor * child.op.coefficients[0], child.inputs[0]
        total[child] = total.get(child, 0.0) + factor
    if not all(map(math.isfinite, (constant, *total.values()))):
        return node
    total = {child: factor for child, factor in total.items() if factor != 0}
    if not total:
        return Fill(constant, node.shape)()
    if constant:
        filled = [c for c in node.inputs if isinstance(c.op, Fill) and c not in walls and c.op.value == constant]
        total[filled[0] if filled else Fill(constant, node.shape)()] = 1.0
    inputs, coefficients = tuple(total), tuple(total.values())
    if coefficients == (1.0,):
        return inputs[0]
    if inputs == node.inputs and coefficients == node.op.coefficients:
        return node
    return Node(Combine(coefficients), inputs, node.shape, node.origin)
