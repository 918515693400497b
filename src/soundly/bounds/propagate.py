"""One walk through a graph for every forward analysis.

An analysis says what a value is (a `Domain`) and how each kind of operation maps it; the walk does the rest. No domain
mentions an operation by name, so a new operation works in all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from soundly.errors import MissingRule
from soundly.graph.elementwise import Elementwise
from soundly.graph.network import Network
from soundly.graph.node import Composite, Fill, Leaf, Linear, Node, Product, topological

V = TypeVar("V")


class Domain(Protocol[V]):
    """What a forward analysis must know: one rule per kind of operation."""

    def constant(self, value: Tensor) -> V: ...
    def fill(self, op: Fill, device: torch.device) -> V: ...
    def linear(self, op: Linear, node: Node, *x: V) -> V: ...
    def product(self, op: Product, node: Node, a: V, b: V) -> V: ...
    def elementwise(self, op: Elementwise, x: V) -> V: ...
    def composite(self, op: Composite, *x: V) -> V | None: ...


def propagate(network: Network, domain: Domain[V], given: Mapping[Node, V], nodes: Sequence[Node]) -> dict[Node, V]:
    """The domain's value of every node of `nodes`.

    Args:
        given: values of variables; other leaves are constants with the network's values.
        nodes: what is asked for; nodes of the network or built on top of it.

    Raises:
        MissingRule: a leaf without a value, or an operation of no known kind.
    """
    values: dict[Node, V] = dict(given)

    def visit(targets: Sequence[Node]) -> None:
        for node in topological(targets):
            if node in values:
                continue
            op, x = node.op, node.inputs
            if isinstance(op, Fill):
                values[node] = domain.fill(op, network.device)
            elif isinstance(op, Leaf):
                if node not in network.values:
                    raise MissingRule(f"{node!r} has no value: name it in the region, or build it for this network.")
                values[node] = domain.constant(network.values[node])
            elif isinstance(op, Linear):
                values[node] = domain.linear(op, node, *(values[c] for c in x))
            elif isinstance(op, Product):
                values[node] = domain.product(op, node, values[x[0]], values[x[1]])
            elif isinstance(op, Elementwise):
                values[node] = domain.elementwise(op, values[x[0]])
            elif isinstance(op, Composite):
                whole = domain.composite(op, *(values[c] for c in x))
                if whole is None:
                    expansion = op.expand(*x)
                    visit([expansion])
                    whole = values[expansion]
                values[node] = whole
            else:
                raise MissingRule(f"{node!r} is of no known kind.")

    visit(nodes)
    return {node: values[node] for node in nodes}
