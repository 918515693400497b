"""Gradients as graphs: reverse-mode differentiation that returns nodes of the same kinds.

The result is an ordinary part of a network, so whatever soundly can do to an output (bound it, edit it, differentiate
it again) it can do to a gradient. At a kink the derivative's value is torch's choice, its enclosure the Clarke set.
"""

from __future__ import annotations

from collections.abc import Sequence

from soundly.errors import InvalidInput, MissingRule
from soundly.graph.elementwise import Elementwise
from soundly.graph.linear import add
from soundly.graph.node import Composite, Fill, Linear, Node, Product, dependents, topological
from soundly.graph.product import Multiply


def differentiate(of: Node, wrt: Sequence[Node], *, seed: Node | None = None) -> tuple[Node, ...]:
    """The gradient of <seed, of> with respect to each node of `wrt`, as nodes.

    Args:
        of: any node.
        wrt: inputs, parameters or inner nodes; each is treated as a variable of its own, so the derivative towards a
            node passes through the others.
        seed: a node of the shape of `of`; needed unless `of` holds a single number.

    Returns:
        One node per entry of `wrt`, of its shape; an explicit zero where `of` does not depend on it.

    Raises:
        InvalidInput: the seed is missing or has the wrong shape.
        MissingRule: an operation on the way has no derivative. A missing rule is never read as zero.
    """
    if seed is None:
        if any(n != 1 for n in of.shape):
            raise InvalidInput(f"`of` has shape {of.shape}: give a `seed` of that shape, or select one entry first.")
        seed = Fill(1.0, of.shape)()
    if seed.shape != of.shape:
        raise InvalidInput(f"`seed` has shape {seed.shape}, but `of` has shape {of.shape}.")
    order = topological([of])
    varying = dependents(order, wrt)
    parts: dict[Node, list[Node]] = {of: [seed]} if of in varying else {}
    totals: dict[Node, Node] = {}
    for node in reversed(order):
        if node not in parts:
            continue
        cotangent = totals[node] = add(*parts.pop(node))
        slots = [slot for slot, child in enumerate(node.inputs) if child in varying]
        if not slots:
            continue
        for slot, part in zip(slots, _pull(node, slots, cotangent), strict=True):
            if not (isinstance(part.op, Fill) and part.op.value == 0):
                parts.setdefault(node.inputs[slot], []).append(part)
    return tuple(totals.get(node) or Fill(0.0, node.shape)() for node in wrt)


def _pull(node: Node, slots: Sequence[int], cotangent: Node) -> list[Node]:
    """The derivative of <cotangent, node> towards some of its inputs: one rule per kind."""
    match node.op:
        case Linear() as op:
            return [op.adjoint(slot, cotangent, node.inputs) for slot in slots]
        case Product() as op:
            return [op.partial(slot, cotangent, node.inputs) for slot in slots]
        case Elementwise(derivative=slope):
            if slope.is_zero:
                return [Fill(0.0, node.shape)()]
            return [Multiply()(cotangent, slope(node.inputs[0]))]
        case Composite() as op:
            pulled = op.pullback(cotangent, node)
            return [pulled[slot] for slot in slots]
        case _:
            raise MissingRule(f"{node!r} has no derivative rule.")
