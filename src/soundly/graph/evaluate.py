"""Running a graph: a list of calls made once, replayed for each input.

Values are dropped after their last use, and a bias added to a convolution or a dense layer is handed to the kernel that
can add it on the way. Nothing here knows an operation by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from soundly.errors import MissingRule
from soundly.graph.linear import Combine, Expand
from soundly.graph.node import Fill, Leaf, Node, fill_value, topological


class Plan:
    """The calls that compute some nodes from leaves (and from the nodes of `stop`, whose values are given)."""

    def __init__(self, nodes: Sequence[Node], *, stop: Iterable[Node] = ()) -> None:
        stopped = set(stop)
        order = _reachable(nodes, stopped)
        self.outputs = tuple(nodes)
        self.leaves = [n for n in order if isinstance(n.op, Leaf) or n in stopped]
        self.fills = [n for n in self.leaves if isinstance(n.op, Fill) and n not in stopped]
        uses: dict[Node, int] = {}
        for node in order:
            if node not in stopped:
                for child in node.inputs:
                    uses[child] = uses.get(child, 0) + 1
        for node in nodes:
            uses[node] = uses.get(node, 0) + 2
        steps: list[tuple[Node, Callable[..., Tensor], tuple[Node, ...]]] = []
        fused: set[Node] = set()
        inner = [n for n in order if not isinstance(n.op, Leaf) and n not in stopped]
        biased = {}
        for node in inner:
            found = _bias(node, uses, stopped)
            if found:
                biased[node] = found
                fused.add(found[0])
        for node in inner:
            if node in fused:
                continue
            if node in biased:
                product, bias = biased[node]
                steps.append((node, partial(_apply_with_bias, product.op), (*product.inputs, bias)))
            else:
                steps.append((node, node.op.apply, node.inputs))
        last = {child: i for i, (_, _, inputs) in enumerate(steps) for child in inputs}
        keep = {*self.outputs, *self.leaves}
        dropped: list[list[Node]] = [[] for _ in steps]
        for node, i in last.items():
            if node not in keep:
                dropped[i].append(node)
        self.steps = [(*step, tuple(d)) for step, d in zip(steps, dropped, strict=True)]

    def __call__(self, given: Mapping[Node, Tensor], *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        values: dict[Node, Tensor] = {}
        for node in self.fills:
            values[node] = fill_value(node.op, dtype=dtype, device=device)  # type: ignore[arg-type]
        for node in self.leaves:
            if node in given:
                values[node] = given[node]
            elif node not in values:
                raise MissingRule(f"{node!r} has no value in this network; was it built for another one?")
        for node, apply, inputs, dropped in self.steps:
            values[node] = apply(*[values[child] for child in inputs])
            for old in dropped:
                del values[old]
        return tuple(values[node] for node in self.outputs)


def _apply_with_bias(op: Any, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    result: Tensor = op.apply_with_bias(a, b, bias.reshape(-1))
    return result


def _reachable(nodes: Sequence[Node], stopped: set[Node]) -> list[Node]:
    if not stopped:
        return topological(nodes)
    needed: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            if node not in stopped:
                stack.extend(node.inputs)
    return [n for n in topological(nodes) if n in needed]


def _bias(node: Node, uses: Mapping[Node, int], stopped: set[Node]) -> tuple[Node, Node] | None:
    """(product, bias vector) where the node adds a bias per channel to a product that nothing else uses."""
    if node.op != Combine((1.0, 1.0)):
        return None
    for product, bias in (node.inputs, node.inputs[::-1]):
        if not hasattr(product.op, "apply_with_bias") or uses[product] > 1 or product in stopped:
            continue
        channel = len(product.shape) - 1 if len(product.inputs[1].shape) == 2 else 1
        if isinstance(bias.op, Expand) and bias not in stopped:
            bias = bias.inputs[0]
        if bias.shape == tuple(n if i == channel else 1 for i, n in enumerate(product.shape)):
            return product, bias
    return None
