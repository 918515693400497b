"""Interval enclosures: the cheapest sound bound on every value in a network, its gradients and its explanations.

An interval is a pair (lower, upper) of tensors. Linear maps act on the ends; products move centre and radius, with
radius |a| rb + ra |b| + ra rb; elementwise functions are monotone between their turning points. Any leaf may range:
inputs, weights or both. Intervals seed every other method; nothing here is optimised for tightness.

Ends are widened by a-priori rounding errors, so an interval holds the value over the reals and also every result of
evaluating the network in its own floating type, whatever the order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from soundly.bounds.propagate import propagate
from soundly.errors import InvalidInput
from soundly.graph.elementwise import Elementwise
from soundly.graph.network import Network
from soundly.graph.node import Composite, Fill, Input, Linear, Node, Product, fill_value


class Interval(NamedTuple):
    """Bounds of a tensor, entry by entry; infinite where nothing is known, never NaN."""

    lower: Tensor
    upper: Tensor

    @property
    def is_point(self) -> bool:
        """True for constants, which share one tensor."""
        return self.lower is self.upper

    @property
    def size(self) -> Tensor:
        """The largest absolute value."""
        return self.lower.abs() if self.is_point else torch.maximum(self.lower.abs(), self.upper.abs())


def interval_bounds(
    network: Network, region: Mapping[Node, tuple[Tensor, Tensor]], nodes: Sequence[Node] | None = None
) -> dict[Node, Interval]:
    """Encloses values of a network while inputs and weights range over boxes.

    Args:
        region: bounds (lower, upper), of the node's shape, of every input and of each parameter that ranges. Inner
            nodes may be bounded too; their bounds then replace the computed ones.
        nodes: what to bound; by default every node of the network. May include nodes built on top of it.

    Returns:
        For each node an interval that contains its value for every point of the region: the real one, and the
        one computed in the network's floating type with any order of summation. At a kink or jump of a derivative
        the interval contains the whole Clarke set.

    Raises:
        InvalidInput: bounds of the wrong shape or type, NaN, or a lower bound above an upper one.
    """
    given = {}
    for node, (lower, upper) in region.items():
        for side, value in (("lower", lower), ("upper", upper)):
            if tuple(value.shape) != node.shape or value.dtype != network.dtype:
                raise InvalidInput(
                    f"region: the {side} bound of {node!r} is {value.dtype} of shape {tuple(value.shape)}; "
                    f"give {network.dtype} of shape {node.shape}."
                )
        if not bool((lower <= upper).all()):
            raise InvalidInput(f"region: the bounds of {node!r} are NaN or contradict each other somewhere.")
        given[node] = Interval(lower, upper)
    nodes = network.nodes if nodes is None else nodes
    with torch.no_grad():
        return propagate(network, _Intervals(network.dtype), given, nodes)


def interval_step(network: Network, node: Node, inputs: Sequence[Interval]) -> Interval:
    """The node's interval from those of its inputs alone; a leaf's from its value."""
    given = {Input("", child.shape)(): bounds for child, bounds in zip(node.inputs, inputs, strict=True)}
    step = Node(node.op, tuple(given), node.shape, node.origin) if given else node
    return propagate(network, _Intervals(network.dtype), given, [step])[step]


class _Intervals:
    """The interval domain. `unit` is the unit roundoff; slack factors cover our own rounding and the network's."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.unit = torch.finfo(dtype).eps / 2
        self.tiny = torch.finfo(dtype).tiny  # what underflow may lose, even where subnormal numbers are flushed to 0

    def _rounding(self, steps: int) -> float:
        """gamma_n = n u / (1 - n u): the relative error of n roundings (Higham, Accuracy and Stability, 3.1)."""
        error = steps * self.unit
        return error / (1 - error) if error < 1 else math.inf

    def constant(self, value: Tensor) -> Interval:
        return Interval(value, value) if bool(torch.isfinite(value).all()) else _whole(value, value)

    def fill(self, op: Fill, device: torch.device) -> Interval:
        value = fill_value(op, dtype=self.dtype, device=device)
        if float(torch.tensor(op.value, dtype=self.dtype)) == op.value:
            return self.constant(value)
        # The model's number lies between two of this type: 0.1 is no float32.
        infinity = torch.full_like(value, math.inf)
        return _whole(torch.nextafter(value, -infinity), torch.nextafter(value, infinity))

    def linear(self, op: Linear, node: Node, *x: Interval) -> Interval:
        terms = op.terms(*(child.shape for child in node.inputs))
        signs = op.signs(len(x))
        if all(v.is_point for v in x) and terms == 1:
            return self.constant(op.apply(*(v.lower for v in x)))
        lower = op.apply(*(v.lower if s > 0 else v.upper for v, s in zip(x, signs, strict=True)))
        upper = op.apply(*(v.upper if s > 0 else v.lower for v, s in zip(x, signs, strict=True)))
        if terms > 1:
            slack = self._rounding(4 * terms) * op.absolute.apply(*(v.size for v in x)) + 4 * terms * self.tiny
            lower, upper = lower - slack, upper + slack
        return _whole(lower, upper)

    def product(self, op: Product, node: Node, a: Interval, b: Interval) -> Interval:
        terms = op.terms(*(child.shape for child in node.inputs))
        slack = self._rounding(4 * (terms + 4)) * op.apply(a.size, b.size) + 4 * terms * self.tiny
        if terms == 1:
            corners = [op.apply(x, y) for x in set(a) for y in set(b)]
            lower, upper = corners[0], corners[0]
            for corner in corners[1:]:
                lower, upper = torch.minimum(lower, corner), torch.maximum(upper, corner)
            return _whole(lower - slack, upper + slack)
        (ca, ra), (cb, rb) = _ball(a), _ball(b)
        centre = op.apply(ca, cb)
        radius = slack
        if rb is not None:
            radius = radius + op.apply(a.size, rb)
        if ra is not None:
            radius = radius + op.apply(ra, cb.abs())
        return _whole(centre - radius, centre + radius)

    def elementwise(self, op: Elementwise, x: Interval) -> Interval:
        least, greatest = op.enclose(*x)
        if op.exact:
            return _whole(least, greatest)
        least, greatest = op.widen(*x, least, greatest, self.unit)
        lost = op.underflow * self.tiny
        return _whole(least - lost, greatest + lost)

    def composite(self, op: Composite, *x: Interval) -> Interval | None:
        bounds = op.enclose(*x, unit=self.unit)
        return None if bounds is None else _whole(*bounds)


def _ball(x: Interval) -> tuple[Tensor, Tensor | None]:
    """Centre and radius; no radius for a constant. Rounding of both is covered by the slack of the product."""
    if x.is_point:
        return x.lower, None
    centre = x.lower / 2 + x.upper / 2
    return centre, torch.maximum(x.upper - centre, centre - x.lower)


def _whole(lower: Tensor, upper: Tensor) -> Interval:
    """The interval with every NaN and every overflow to the wrong side replaced by "unknown"."""
    unknown = torch.isnan(lower) | torch.isnan(upper) | (lower == math.inf) | (upper == -math.inf)
    return Interval(lower.masked_fill(unknown, -math.inf), upper.masked_fill(unknown, math.inf))
