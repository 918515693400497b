"""What can depend on what: labels carried from input entries through a network, to every entry that they may reach.

A label stands for a set of input entries. Linear maps and products pass it on wherever a coefficient is not zero,
functions of one number where they stand, composites as their expansion says: one rule per kind, none per operation. An
entry that a label does not reach is the same number whatever the labelled entries are. The converse does not hold: a
path may cancel, or never open.

Reference: the labels of within-batch non-interference checking, "Architectural Backdoors for Within-Batch Data Stealing
and Model Inference Manipulation", 2025; here they are sets, per entry, over the kinds of operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from soundly.bounds.propagate import propagate
from soundly.errors import InvalidInput
from soundly.graph.elementwise import Elementwise
from soundly.graph.network import Network
from soundly.graph.node import Composite, Fill, Linear, Node, Product

F64 = torch.float64


class Marks(NamedTuple):
    """Which labels may reach each entry, and which entries may differ from zero; both bool.

    Attributes:
        labels: [labels, *shape], or None where there are none.
        support: [*shape].
    """

    labels: Tensor | None
    support: Tensor


def dependence(network: Network, labels: Sequence[Tensor], *, without: Node | None = None) -> tuple[Tensor, ...]:
    """Which output entries may depend on labelled input entries.

    Args:
        labels: per input, which of its entries carry each label: bool [labels, *input].
        without: a node that is taken to be fixed, to see what depends through others.

    Returns:
        Per output, bool [labels, *output]. Where it is False, the entry is the same for all values of the entries with
        that label, the other entries being fixed: over the real numbers, and in every arithmetic in which zero times a
        number is zero. So it is in floating point unless a value overflows (zero times infinity is NaN).

    Raises:
        InvalidInput: labels that do not fit the inputs.
        MissingRule: an operation that says nothing about what it reads. Nothing is assumed about it.
    """
    found = _carried(network, labels, network.outputs, without)
    return tuple(found[node] for node in network.outputs)


def meetings(network: Network, labels: Sequence[Tensor]) -> list[Node]:
    """The nodes where two labels first come together in one entry, none of their inputs having such entries."""
    found = _carried(network, labels, network.nodes, None)
    mixed = {node for node in network.nodes if bool((found[node].sum(0) > 1).any())}
    return [n for n in network.nodes if n in mixed and not any(child in mixed for child in n.inputs)]


def through(network: Network, labels: Sequence[Tensor], output: int, entry: Sequence[int]) -> list[Node]:
    """The nodes that every path from the inputs with the one label to an output entry takes, in order."""
    place = (0, *entry)
    inner = [node for node in network.nodes if node.inputs]
    return [n for n in inner if not bool(dependence(network, labels, without=n)[output][place])]


def _carried(
    network: Network, labels: Sequence[Tensor], nodes: Sequence[Node], without: Node | None
) -> dict[Node, Tensor]:
    count = {len(marks) for marks in labels}
    fits = len(labels) == len(network.inputs) and len(count) == 1
    if not fits or any(tuple(m.shape[1:]) != n.shape for m, n in zip(labels, network.inputs, strict=True)):
        shapes = ", ".join(str(("labels", *node.shape)) for node in network.inputs)
        raise InvalidInput(f"labels: give one bool tensor per input, of shapes {shapes}.")
    given = {
        node: Marks(marks.to(network.device, torch.bool), _all(node, network))
        for node, marks in zip(network.inputs, labels, strict=True)
    }
    if without is not None:
        given[without] = Marks(None, _all(without, network))
    with torch.no_grad():
        found = propagate(network, _Labels(), given, nodes)
    none = torch.zeros((), dtype=torch.bool)
    return {
        node: none.expand(*count, *node.shape) if marks.labels is None else marks.labels.cpu()
        for node, marks in found.items()
    }


def _all(node: Node, network: Network) -> Tensor:
    return torch.ones(node.shape, dtype=torch.bool, device=network.device)


class _Labels:
    """The domain of labels. Marks are counted in float64, exactly; what cannot be counted (NaN) counts as reached."""

    def constant(self, value: Tensor) -> Marks:
        return Marks(None, value != 0)

    def fill(self, op: Fill, device: torch.device) -> Marks:
        return self.constant(torch.full((), op.value, dtype=F64, device=device).expand(op.dims))

    def linear(self, op: Linear, node: Node, *x: Marks) -> Marks:
        return _passed(op.absolute.apply, x)

    def product(self, op: Product, node: Node, a: Marks, b: Marks) -> Marks:
        # A factor that is always zero lets nothing of the other pass.
        parts = [
            _passed(lambda v: op.apply(v, b.support.to(F64)), (a,)),
            _passed(lambda v: op.apply(a.support.to(F64), v), (b,)),
        ]
        labels = [part.labels for part in parts if part.labels is not None]
        return Marks(torch.stack(labels).any(0) if labels else None, parts[0].support)

    def elementwise(self, op: Elementwise, x: Marks) -> Marks:
        at_zero = op.apply(torch.zeros((), dtype=F64, device=x.support.device))
        return Marks(x.labels, x.support if bool(at_zero == 0) else torch.ones_like(x.support))

    def composite(self, op: Composite, *x: Marks) -> Marks | None:
        known = op.reach(*(v.support.to(F64) for v in x)) is not None
        return _passed(op.reach, x) if known else None  # type: ignore[arg-type]


def _passed(through: Callable[..., Tensor], x: Sequence[Marks]) -> Marks:
    """Labels and supports on the other side of a map without negative coefficients."""
    support = ~(through(*(v.support.to(F64) for v in x)) == 0)
    count = next((len(v.labels) for v in x if v.labels is not None), None)
    if count is None:
        return Marks(None, support)
    none = torch.zeros((), dtype=torch.bool, device=support.device)
    labels = [none.expand(count, *v.support.shape) if v.labels is None else v.labels for v in x]
    return Marks(~(torch.vmap(through)(*(v.to(F64) for v in labels)) == 0), support)
