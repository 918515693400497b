"""What constraints are about, as functions of the weights that may change: one graph for all points.

A trunk knows features because the edited layer is the last one. Anywhere else the quantities themselves (outputs,
gradients, maps) are evaluated as a graph in float64, together with the inputs of every function with a break behind
the edited weights. While none of those crosses a break, a network of piecewise linear functions is affine in weights
of which no path meets two, its gradients included (docs/editing.md). Derivatives towards the weights come by rows,
only those that are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vjp

from soundly.editing.functionals import (
    Coordinates,
    Directional,
    Functional,
    GradCam,
    Gradient,
    IntegratedGradients,
    Output,
    Outputs,
)
from soundly.errors import EditError, InvalidInput
from soundly.explanation.attribution import gradcam, integrated_gradients
from soundly.graph.elementwise import Elementwise
from soundly.graph.linear import Combine, Concat, Expand, Gather, reshape
from soundly.graph.network import Network
from soundly.graph.node import Composite, Constant, Node, dependents
from soundly.graph.product import MatMul
from soundly.graph.simplify import rebuild, renamed, simplify

CHUNK = 2**24
"""Numbers that a batch of rows may hold at each node, roughly."""


def quantity(network: Network, functional: Functional) -> Network:
    """A functional's values [m] as a network of the input.

    Raises:
        InvalidInput: the functional does not fit the network.
    """
    outputs, name = math.prod(network.output.shape), functional.point.name
    of = functional.of
    if functional.point.position is not None:
        classes = network.output.shape[-1]
        of = functional.point.position % (outputs // classes) * classes + of
    if not 0 <= of < outputs:
        raise InvalidInput(f"{name}: the network has outputs 0..{outputs - 1}, not {of}.")
    match functional:
        case Outputs():
            return _entries(_flat(network), range(of, of + network.output.shape[-1]), name)
        case Output():
            return network.with_outputs(network.entry(of))
        case Coordinates():
            x = network.input
            return _entries(network.with_outputs(reshape(x, (math.prod(x.shape),))), functional.entries, name)
        case Gradient(place=place, entries=entries):
            return _entries(_flat(network.gradient(of=of, wrt=place)), entries, name)
        case Directional(place=place, along=along):
            shape, count = _place(network, place).shape, len(along[0])
            flat = [d.detach().double().expand(count, *shape).reshape(count, -1) for d in along]
            once = _times(_flat(network.gradient(of=of, wrt=place)), flat[0])
            if len(flat) == 1:
                return once
            moved = [once.with_outputs(once.entry(i)) for i in range(count)]
            for directions in flat[1:]:
                moved = [_times(_flat(one.gradient(of=0, wrt=place)), d[None])
                         for one, d in zip(moved, directions, strict=True)]  # fmt: skip
            return joined(network, moved)
        case GradCam(layer=layer):
            return _flat(gradcam(network, of=of, layer=layer))
        case IntegratedGradients(baseline=baseline, steps=steps, groups=groups):
            map = _flat(integrated_gradients(network, of=of, baseline=baseline, steps=steps))
            if groups is None:
                return map
            if groups.shape != network.input.shape:
                raise InvalidInput(f"{name}: groups must have the input's shape {network.input.shape}.")
            labels = torch.arange(int(groups.max()) + 1)
            return _times(map, (groups.reshape(1, -1) == labels[:, None]).double())
    raise InvalidInput(f"{name}: a {type(functional).__name__} can only be constrained where the last layer is edited.")


def _place(network: Network, place: str | None) -> Node:
    return network.input if place is None else network.at(place)


def _flat(network: Network) -> Network:
    return network.with_outputs(reshape(network.output, (math.prod(network.output.shape),)))


def _entries(network: Network, entries: Sequence[int] | None, name: str) -> Network:
    size = math.prod(network.output.shape)
    if entries is None:
        return network
    if not entries or any(not 0 <= i < size for i in entries):
        raise InvalidInput(f"entries at {name} must be some of 0..{size - 1}.")
    return network.with_outputs(Gather(0, tuple(entries))(network.output))


def _times(network: Network, matrix: Tensor) -> Network:
    """matrix @ the network's flat output."""
    leaf = Constant("directions", tuple(matrix.shape))()
    column = MatMul()(leaf, reshape(network.output, (matrix.shape[1], 1)))
    grown = network.with_outputs(reshape(column, (matrix.shape[0],)))
    return replace(grown, values={**grown.values, leaf: matrix.to(network.like.new_empty(0, dtype=network.dtype))})


def joined(network: Network, quantities: Sequence[Network]) -> Network:
    """Quantities of a network one after another, as one network with output [V]; all parameters stay."""
    values = {n: v for q in quantities for n, v in q.values.items()}
    outputs = tuple(q.output for q in quantities)
    whole = outputs[0] if len(outputs) == 1 else Concat(0)(*outputs)
    small = simplify(replace(network, outputs=(whole,), values={**network.values, **values}, places={}))
    return replace(small, values={**network.values, **small.values})


def key_of(functional: Functional) -> tuple[Any, ...]:
    """Equal for functionals that differ in their point only."""
    parts = [getattr(functional, f.name) for f in fields(functional) if f.name != "point"]  # type: ignore[arg-type]
    parts = [tuple(map(_identity, p)) if isinstance(p, tuple) else _identity(p) for p in parts]
    return (type(functional), functional.point.position, *parts)


def _identity(part: Any) -> Any:
    """Equal for equal tensors."""
    return (part.shape, part.detach().double().cpu().numpy().tobytes()) if isinstance(part, Tensor) else part


def unknowns(network: Network, layers: Sequence[str]) -> tuple[Node, ...]:
    """The parameters that an edit of these layers may change: their own, and every bias behind them.

    A bias moves no gradient as long as no function crosses a break; it is what keeps it from crossing.

    Raises:
        EditError: a layer has no parameters.
    """
    found: dict[Node, None] = {}
    for layer in layers:
        own = [n for name, n in network.parameters.items() if name == layer or name.rpartition(".")[0] == layer]
        if not own:
            linear = [name.removesuffix(".weight") for name in network.parameters if name.endswith("weight")]
            raise EditError(f"layer={layer!r} has no parameters in {network.name}. Layers: {', '.join(linear)}.")
        found.update(dict.fromkeys(own))
    behind = dependents(network.nodes, found)
    parameters = set(network.parameters.values())
    for node in network.nodes:
        if node in behind and isinstance(node.op, Combine) and any(c in behind for c in node.inputs):
            for child in node.inputs:
                leaf = child.inputs[0] if isinstance(child.op, Expand) else child
                leaf = leaf.inputs[0] if leaf.op and leaf.inputs and leaf not in parameters else leaf
                if leaf in parameters and leaf not in behind:
                    found[leaf] = None
    if not any(node in behind for node in network.outputs):
        raise EditError(f"layers {', '.join(layers)} do not reach the output of {network.name}.")
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Values [P, V] and hinges [P, H] at points, as functions of the unknown weights theta [n], in float64.

    Attributes:
        network: its first output are the values [V], the others the inputs of functions with breaks.
        points: [P, *input].
        unknowns: the leaves that theta replaces, flattened one after another.
        breaks: for each hinge the breaks of its functions, ascending, padded with infinity [H, b].
    """

    network: Network
    points: Tensor
    unknowns: tuple[Node, ...]
    breaks: Tensor

    @staticmethod
    def of(network: Network, points: Sequence[Tensor], free: Sequence[Node]) -> Evidence:
        """The evidence of a network's flat output at these points, for free leaves."""
        joined = simplify(_expanded(network))
        joined = replace(joined, values={**network.values, **joined.values}).to(torch.float64)
        moving = dependents(joined.nodes, [n for n in free if n in set(joined.nodes)])
        bent = [n.inputs[0] for n in joined.nodes if isinstance(n.op, Elementwise) and n.op.breaks]
        hinges = tuple(dict.fromkeys(n for n in bent if n in moving))
        most = max((len(_breaks(joined.nodes, h)) for h in hinges), default=0)
        table = []
        for hinge in hinges:
            row = _breaks(joined.nodes, hinge)
            row = [*row, *[math.inf] * (most - len(row))]
            table.append(torch.tensor(row, dtype=torch.float64).expand(math.prod(hinge.shape), most))
        breaks = torch.cat(table) if table else torch.zeros(0, 0, dtype=torch.float64)
        stacked = torch.stack([x.detach().double().reshape(joined.input.shape) for x in points])
        return Evidence(joined.with_outputs(joined.output, *hinges), stacked,
                        tuple(free), breaks)  # fmt: skip

    @property
    def theta(self) -> Tensor:
        """The unknown weights as they are."""
        return torch.cat([self._value(n).reshape(-1) for n in self.unknowns])

    def _value(self, node: Node) -> Tensor:
        return self.network.values[node].detach().double()

    def split(self, theta: Tensor) -> dict[Node, Tensor]:
        """theta as the values of the leaves."""
        parts = theta.split([math.prod(n.shape) for n in self.unknowns])
        return {n: part.reshape(n.shape) for n, part in zip(self.unknowns, parts, strict=True)}

    def at(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values [V] and hinges [H] at one point; differentiable."""
        values, *hinges = self.network.evaluate(self.network.outputs, x, given=self.split(theta))
        return values, torch.cat([h.reshape(-1) for h in hinges]) if hinges else values.new_zeros(0)

    def __call__(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Values [P, V] and hinges [P, H]."""
        with torch.no_grad():
            found: tuple[Tensor, Tensor] = torch.vmap(lambda x: self.at(theta, x), chunk_size=self.chunk)(self.points)
        return found

    def moved(self, theta: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives of values and hinges along a direction [n]."""

        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(theta, direction)
            found = torch.vmap(lambda x: self.at(dual, x), chunk_size=self.chunk)(self.points)
            tangents = [forward_ad.unpack_dual(part).tangent for part in found]
        values, hinges = (torch.zeros_like(part) if t is None else t for part, t in zip(found, tangents, strict=True))
        return values, hinges

    def rows(self, theta: Tensor, point: Tensor, values: Tensor, hinges: Tensor) -> Tensor:
        """Gradients towards theta of combinations at single points.

        Args:
            point: [r] which point.
            values: [r, V] coefficients of the values.
            hinges: [r, H] coefficients of the hinges.

        Returns:
            [r, n].
        """

        def pulled(x: Tensor, v: Tensor, h: Tensor) -> Tensor:
            _, pull = vjp(lambda t: self.at(t, x), theta)  # type: ignore[misc]
            return pull((v, h))[0]

        size = max(1, min(self.chunk, CHUNK // max(1, len(theta))))
        with torch.no_grad():
            found: Tensor = torch.vmap(pulled, chunk_size=size)(self.points[point], values, hinges)
        return found

    @property
    def chunk(self) -> int:
        """How many points are evaluated at a time."""
        widest = max(math.prod(n.shape) for n in self.network.nodes)
        return max(1, CHUNK // max(1, widest))

    def pieces(self, hinges: Tensor) -> tuple[Tensor, Tensor]:
        """The breaks on either side of hinges [P, H]: lower and upper ends, infinite where there is none."""
        edges = torch.cat([torch.full((len(self.breaks), 1), -math.inf).double(), self.breaks], 1)
        edges = torch.cat([edges, torch.full((len(self.breaks), 1), math.inf).double()], 1)
        index = (hinges[..., None] > self.breaks).sum(-1)
        rows = torch.arange(len(self.breaks)).expand(hinges.shape)
        return edges[rows, index], edges[rows, index + 1]


def _expanded(network: Network) -> Network:
    """Composite operations replaced by what they are made of."""
    while any(isinstance(n.op, Composite) for n in network.nodes):
        new = rebuild(network.outputs, lambda old, n: n.op.expand(*n.inputs) if isinstance(n.op, Composite) else n)
        network = renamed(network, new)
    return network


def _breaks(nodes: Sequence[Node], hinge: Node) -> list[float]:
    """Where any function of this value has a break."""
    ops = [n.op for n in nodes if isinstance(n.op, Elementwise) and n.inputs[0] is hinge]
    return sorted({t for op in ops for t in op.breaks})
