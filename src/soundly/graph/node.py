"""A network as data: operations applied to values, nothing else.

Every analysis asks one question of an operation: is it linear, a product of two inputs, or elementwise? An operation
answers by its kind and by a few facts; the algorithms live in the analyses. Shapes are static, as the user's example
had them; no dimension is "the batch". Weights are leaves like inputs, so "linear" depends on what is held constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soundly.errors import MissingRule

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One value in a network: an operation applied to other values. Compared by identity.

    Attributes:
        op: the operation.
        inputs: the values it is applied to.
        shape: the static shape of the value.
        origin: where the user's model computes it, "layer2.0.conv1 (model.py:41)"; shown in every error.
    """

    op: Op
    inputs: tuple[Node, ...]
    shape: Shape
    origin: str = ""

    def __repr__(self) -> str:
        at = f" at {self.origin}" if self.origin else ""
        return f"<{self.op} {list(self.shape)}{at}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Node:
        return self  # nothing in it changes, and a copy would be another value


class Op:
    """An operation: immutable, comparable by value, holds no tensors. Called on nodes, it makes a node."""

    __slots__ = ()

    def apply(self, *values: Tensor) -> Tensor:
        """The value for input values of the node's shapes."""
        raise MissingRule(f"{self} cannot be evaluated.")

    def shape(self, *shapes: Shape) -> Shape:
        """The result's shape for the inputs' shapes; ValueError where they do not fit."""
        raise MissingRule(f"{self} has no shape rule.")

    def __call__(self, *inputs: Node, origin: str = "") -> Node:
        shape = self.shape(*(node.shape for node in inputs))
        return Node(self, inputs, tuple(shape), origin or next((n.origin for n in inputs if n.origin), ""))


class Leaf(Op):
    """A value that a network is given rather than computes."""

    __slots__ = ()


@dataclass(frozen=True)
class Input(Leaf):
    """A variable that the user supplies at each call."""

    name: str
    dims: Shape

    def shape(self, *shapes: Shape) -> Shape:
        return self.dims


@dataclass(frozen=True)
class Parameter(Leaf):
    """A trained weight, by its name in the user's model. Its value lives in the network."""

    name: str
    dims: Shape

    def shape(self, *shapes: Shape) -> Shape:
        return self.dims


@dataclass(frozen=True)
class Constant(Leaf):
    """A fixed tensor of the model: a buffer or a folded value. Its value lives in the network."""

    name: str
    dims: Shape

    def shape(self, *shapes: Shape) -> Shape:
        return self.dims


@dataclass(frozen=True)
class Fill(Leaf):
    """A tensor with the same number everywhere: seeds, zeros, scalars."""

    value: float
    dims: Shape

    def shape(self, *shapes: Shape) -> Shape:
        return self.dims


class Linear(Op):
    """A structural linear map without weights, of one or more inputs.

    Every map on the list is plus or minus a map with non-negative coefficients in each input, which is all that
    intervals need to know; `signs` says which.
    """

    __slots__ = ()

    def adjoint(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        """The transposed map towards one input, again from this list."""
        raise MissingRule(f"{self} has no adjoint for input {slot}.")

    def signs(self, arity: int) -> tuple[int, ...]:
        """+1 or -1 per input: the sign of its (otherwise non-negative) coefficients."""
        return (1,) * arity

    @property
    def absolute(self) -> Linear:
        """The map with absolute coefficients; itself for all but sums with negative ones."""
        return self

    def terms(self, *shapes: Shape) -> int:
        """The largest number of floating-point operations behind one output entry, 1 meaning none: it is copied."""
        return 1


class Product(Op):
    """A map linear in each of two inputs, with coefficients 0 or 1, so that applied to absolute values it bounds
    the result (the "map with absolute values" is the map itself)."""

    __slots__ = ()

    def partial(self, slot: int, cotangent: Node, inputs: tuple[Node, ...]) -> Node:
        """The transposed derivative towards one input, again a product: of the cotangent and the other input."""
        raise MissingRule(f"{self} has no partial derivative for input {slot}.")

    def terms(self, *shapes: Shape) -> int:
        """The number of products that are added up to one output entry."""
        raise MissingRule(f"{self} does not say how many products it adds up.")


class Composite(Op):
    """An operation defined by others. Kept whole until an analysis asks: its expansion may be looser."""

    __slots__ = ()

    def expand(self, *inputs: Node) -> Node:
        """The same value from linear maps, products and elementwise functions (or simpler composites)."""
        raise MissingRule(f"{self} has no expansion.")

    def pullback(self, cotangent: Node, node: Node) -> tuple[Node, ...]:
        """The derivative towards each input of `node`; by default that of the expansion."""
        from soundly.graph.differentiate import differentiate
        from soundly.graph.simplify import rebuild

        # Over leaves that stand for the inputs: one of these may be, or depend on, another.
        apart = {Input(str(i), child.shape)(): child for i, child in enumerate(node.inputs)}
        seed = Input("cotangent", node.shape)()
        pulled = differentiate(self.expand(*apart), tuple(apart), seed=seed)
        new = rebuild(pulled, lambda old, found: {**apart, seed: cotangent}.get(old, found))
        return tuple(new[part] for part in pulled)

    def enclose(self, *bounds: tuple[Tensor, Tensor], unit: float) -> tuple[Tensor, Tensor] | None:
        """Bounds from bounds of the inputs, of the real value and of any evaluation with unit roundoff `unit`; None
        where those of the expansion are used."""
        return None

    def reach(self, *marks: Tensor) -> Tensor | None:
        """Marks (1, else 0) of the entries that marked input entries can change, for operations that also send zeros
        to zero; None where the expansion says it as well."""
        return None


def topological(outputs: Iterable[Node]) -> list[Node]:
    """All nodes that the outputs depend on, inputs first. Iterative: unrolled networks are deep."""
    order: list[Node] = []
    seen: set[Node] = set()
    for output in outputs:
        stack: list[tuple[Node, Iterator[Node]]] = []
        if output not in seen:
            seen.add(output)
            stack.append((output, iter(output.inputs)))
        while stack:
            node, rest = stack[-1]
            for child in rest:
                if child not in seen:
                    seen.add(child)
                    stack.append((child, iter(child.inputs)))
                    break
            else:
                order.append(node)
                stack.pop()
    return order


def dependents(nodes: Iterable[Node], sources: Iterable[Node]) -> set[Node]:
    """Those of `nodes` (in topological order) that depend on a source; sources included."""
    found = set(sources)
    for node in nodes:
        if any(child in found for child in node.inputs):
            found.add(node)
    return found


def fill_value(op: Fill, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A Fill as a tensor without memory of its own (one number, expanded)."""
    return torch.full((), op.value, dtype=dtype, device=device).expand(op.dims)
