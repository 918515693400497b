"""Folding: values that never change are computed once.

`fold_constants` evaluates every subgraph without variables. `fold_affine` moves a scale per channel (batch norm) into
the weights of the convolution or dense layer before it. Both change which parameters exist, so both are on demand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from soundly.graph.evaluate import Plan
from soundly.graph.linear import Combine, Expand, add, broadcast, reshape
from soundly.graph.node import Constant, Fill, Leaf, Node, Parameter, dependents, topological
from soundly.graph.product import Conv, Dense, Multiply
from soundly.graph.simplify import rebuild, renamed, simplify

if TYPE_CHECKING:
    from soundly.graph.network import Network


def fold_constants(network: Network, *, parameters: bool = False) -> Network:
    """Replaces every subgraph without variables by its value.

    Args:
        parameters: whether the trained weights count as constants too; otherwise they are variables.
    """
    fixed = (Constant, Fill, Parameter) if parameters else (Constant, Fill)
    order = topological(network.outputs)
    varying = dependents(order, [n for n in order if isinstance(n.op, Leaf) and not isinstance(n.op, fixed)])
    border = [n for n in network.outputs if n not in varying]
    border += [child for n in order if n in varying for child in n.inputs if child not in varying]
    wanted: dict[Node, None] = {}
    for node in border:
        while isinstance(node.op, Expand):  # a repeated value stays repeated: folding it would only cost memory
            node = node.inputs[0]
        if not isinstance(node.op, Leaf) or (parameters and isinstance(node.op, Parameter)):
            wanted[node] = None
    if not wanted:
        return network
    results = Plan(list(wanted))(network.values, dtype=network.dtype, device=network.device)
    leaf = {n: Constant(f"{n.op}", n.shape)(origin=n.origin) for n in wanted}
    values = {**network.values, **{leaf[n]: v.detach().clone() for n, v in zip(wanted, results, strict=True)}}
    new = rebuild(network.outputs, lambda old, node: leaf.get(old, node))
    return renamed(replace(network, values=values), new)


def fold_affine(network: Network) -> Network:
    """Folds scales and shifts per channel, and all constants, into the weights before them.

    The result has no parameters left, only constants, and computes the same function up to rounding.
    """
    order = topological(network.outputs)
    varying = dependents(order, network.inputs)
    uses: dict[Node, int] = {}
    for node in (*(c for n in order for c in n.inputs), *network.outputs):
        uses[node] = uses.get(node, 0) + 1
    layers: set[Node] = set()  # new nodes: a weighted layer, perhaps shifted, that only one other node uses

    def rule(old: Node, node: Node) -> Node:
        moving = [child for child, before in zip(node.inputs, old.inputs, strict=True) if before in varying]
        if len(moving) != 1:
            return node
        if node.op == Multiply() and moving[0] in layers:
            node = _scaled(moving[0], next(c for c in node.inputs if c is not moving[0])) or node
        elif isinstance(node.op, Combine):
            node = _shifted(node, moving[0], layers)
        elif not isinstance(node.op, (Conv, Dense)) or node.inputs[0] is not moving[0]:
            return node
        if uses[old] == 1 and (
            isinstance(node.op, (Conv, Dense)) or (isinstance(node.op, Combine) and moving[0] in layers)
        ):
            layers.add(node)
        return node

    bare = replace(network, places={})
    return simplify(fold_constants(renamed(bare, rebuild(network.outputs, rule)), parameters=True))


def _scaled(layer: Node, factor: Node) -> Node | None:
    """factor * layer with the factor, one number per channel, inside the weights; None where that is impossible."""
    if not isinstance(factor.op, Expand):
        return None
    if isinstance(layer.op, Combine):
        inner = _scaled(layer.inputs[0], factor)
        if inner is None:
            return None
        small = factor.inputs[0]
        shifts = (Multiply()(c.inputs[0], small) for c in layer.inputs[1:] if c.inputs[0].shape == small.shape)
        rest = tuple(Expand(layer.shape)(shift) for shift in shifts)
        if len(rest) + 1 != len(layer.inputs):
            return None
        return layer.op(inner, *rest, origin=layer.origin)
    x, weight = layer.inputs
    channel = 1 if isinstance(layer.op, Conv) else len(layer.shape) - 1
    if factor.inputs[0].shape != tuple(n if i == channel else 1 for i, n in enumerate(layer.shape)):
        return None
    per_row = reshape(factor.inputs[0], (weight.shape[0], *(1,) * (len(weight.shape) - 1)))
    return layer.op(x, Multiply()(weight, broadcast(per_row, weight.shape)), origin=layer.origin)


def _shifted(node: Node, moving: Node, layers: set[Node]) -> Node:
    """A layer plus constants, written as the layer first and one expanded constant second, where it is one."""
    assert isinstance(node.op, Combine)
    layer, shifts, outer = moving, [], 1.0
    for factor, child in zip(node.op.coefficients, node.inputs, strict=True):
        if child is moving:
            outer = factor
        else:
            shifts.append((factor, child))
    if moving not in layers or outer != 1:
        return node
    if isinstance(moving.op, Combine):
        layer = moving.inputs[0]
        shifts += list(zip(moving.op.coefficients[1:], moving.inputs[1:], strict=True))
    small = [child.inputs[0] for _, child in shifts if isinstance(child.op, Expand)]
    if len(small) != len(shifts) or any(c.shape != small[0].shape for c in small):
        return node
    total = Combine(tuple(f for f, _ in shifts))(*small)
    return add(layer, Expand(node.shape)(total))
