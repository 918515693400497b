"""A network with numbers of few bits, as the network that an integer kernel computes: what it costs is then a claim.

Weights become multiples of a scale: other numbers, kept exactly. Activations are rounded to multiples of a scale of
their own on their way into every layer, between ends found on examples: staircases, which verification knows.
`soundly.gap` bounds what that changes in any output, `soundly.same_argmax` whether it changes a decision.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018 (affine quantisation with a zero point).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.graph.composite import Rounding
from soundly.graph.elementwise import clip
from soundly.graph.linear import scale
from soundly.graph.network import Network
from soundly.graph.node import Node, Product, dependents
from soundly.graph.product import ConvTranspose, MatMul, Multiply
from soundly.graph.simplify import rebuild, renamed


def quantise(
    net: Network,
    bits: int,
    *,
    per: Literal["tensor", "channel"] = "tensor",
    activations: int | None = None,
    calibration: Tensor | None = None,
) -> Network:
    """The network with the weights of its layers, and perhaps its activations, rounded to few bits.

    Weights are symmetric: whole multiples, from -(2^(bits-1) - 1) to 2^(bits-1) - 1, of the largest absolute value over
    2^(bits-1) - 1. Biases stay. Activations are affine: 2^activations multiples of a scale, zero among them, from the
    least to the greatest value on the examples; what lies beyond is clipped.

    Args:
        bits: of a weight, 2 to 16.
        per: one scale for a layer's weights, or one for each output channel.
        activations: bits of what enters each layer, 2 to 16; None leaves them as they are.
        calibration: examples [n, *input] for the ends of the activations.

    Raises:
        InvalidInput: no layer to quantise, or arguments out of range.
    """
    _check(net, bits, per, activations, calibration)
    varying = dependents(net.nodes, net.inputs)
    layers = [n for n in net.nodes if isinstance(n.op, Product) and not isinstance(n.op, Multiply) and n in varying]
    weights = {w: _channels(n, slot) for n in layers for slot, w in enumerate(n.inputs) if w in net.values}
    if not weights:
        raise InvalidInput(f"{net.name} has no layer whose weights could be quantised.")
    values = {n: _weight(v, bits, weights[n], per) if n in weights else v for n, v in net.values.items()}
    result = replace(net, values=values, name=f"{net.name} in {bits} bits")
    if activations is None:
        return result
    assert calibration is not None
    entering = list(dict.fromkeys(c for n in layers for c in n.inputs if c in varying))
    rounds = dict(zip(entering, _ends(net, entering, calibration), strict=True))
    rounded: dict[Node, Node] = {}

    def rule(old: Node, node: Node) -> Node:
        if old not in layers:
            return node
        inputs = []
        for before, now in zip(old.inputs, node.inputs, strict=True):
            if before in rounds:
                now = rounded.setdefault(before, _rounded(now, *rounds[before], activations))
            inputs.append(now)
        return Node(node.op, tuple(inputs), node.shape, node.origin)

    return renamed(result, rebuild(net.outputs, rule))


def _weight(value: Tensor, bits: int, axis: int, per: str) -> Tensor:
    most = 2 ** (bits - 1) - 1
    wide = value.double()
    others = tuple(i for i in range(wide.dim()) if i != axis % wide.dim())
    largest = wide.abs().amax(others, keepdim=True) if per == "channel" else wide.abs().amax()
    unit = torch.where(largest > 0, largest / most, torch.ones_like(largest))
    return (torch.round(wide / unit) * unit).to(value)


def _channels(layer: Node, slot: int) -> int:
    """The weight's axis of output channels."""
    if isinstance(layer.op, MatMul):
        return -2 if slot == 0 else -1
    return 1 if isinstance(layer.op, ConvTranspose) else 0


def _ends(net: Network, nodes: Sequence[Node], examples: Tensor) -> list[tuple[float, float]]:
    """The least and greatest value of nodes over examples, zero included."""
    with torch.no_grad():
        found = [[(float(v.min()), float(v.max())) for v in net.evaluate(nodes, x.to(net.dtype))] for x in examples]
    return [(min(0.0, *(low for low, _ in of)), max(0.0, *(high for _, high in of))) for of in zip(*found, strict=True)]


def _rounded(x: Node, low: float, high: float, bits: int) -> Node:
    """x, clipped to the ends, at the nearest of 2^bits multiples of a unit; exactly halfway to the even one."""
    levels = 2**bits - 1
    unit = (high - low) / levels or 1.0
    first = round(low / unit)
    return scale(Rounding("round")(clip(float(first), float(first + levels))(scale(x, 1 / unit))), unit)


def _check(net: Network, bits: int, per: str, activations: int | None, calibration: Tensor | None) -> None:
    if not isinstance(net, Network):
        raise InvalidInput(f"net is a {type(net).__name__}; give a Network, as soundly.load returns.")
    for name, number in (("bits", bits), ("activations", activations)):
        if number is not None and not (isinstance(number, int) and 2 <= number <= 16):
            raise InvalidInput(f"{name} is {number!r}; give 2 to 16.")
    if per not in ("tensor", "channel"):
        raise InvalidInput(f'per is {per!r}; give "tensor" or "channel".')
    if activations is not None and (
        calibration is None or len(calibration) == 0 or tuple(calibration.shape[1:]) != net.input.shape
    ):
        raise InvalidInput(f"activations need calibration examples [n, {', '.join(map(str, net.input.shape))}].")
