"""What a rule for an ONNX operation receives and returns, and the table that rules are entered into.

A rule receives a `Call` and returns the result as a node, or as an array where everything it depends on is known:
shape arithmetic is computed while reading and never enters the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from soundly.errors import DynamicModel, UnsupportedOp
from soundly.graph.linear import Gather, Permute, Slice, broadcast, reshape
from soundly.graph.node import Node, Shape

Array = np.ndarray[Any, Any]
Result = Any
"""A node, an array, or a list of these and of None for outputs that are not available."""
INDICES = 2**22
"""The most positions that one operation may gather."""

FLOAT, INT, BOOL = np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.bool_)


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor of the file: its entries where they are known, otherwise its node.

    Attributes:
        name: the tensor's name in the file.
        dtype: its element type there; nodes hold integers and booleans as real numbers.
        shape: its shape.
        array: the entries, if they do not depend on an input.
        node: its value in the graph, if it has one.
        trained: whether it is one of the file's weights, which stay variables of the graph.
    """

    name: str
    dtype: np.dtype[Any]
    shape: Shape
    array: Array | None = None
    node: Node | None = None
    trained: bool = False


class Reader(Protocol):
    """What rules need of the file that is being read."""

    def lift(self, value: Value) -> Node: ...
    def constant(self, name: str, array: Array) -> Node: ...
    def known(self, value: Value) -> Array | None: ...
    def entries(self, node: Node) -> Array | None: ...
    def room(self, shape: Sequence[int], *, folded: bool = False) -> Shape: ...


@dataclass(frozen=True)
class Call:
    """One operation of the file with its operands."""

    op: str
    name: str
    opset: int
    inputs: tuple[Value | None, ...]
    attributes: dict[str, Any]
    outputs: int
    reader: Reader = field(repr=False)

    def attr(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def has(self, i: int) -> bool:
        return i < len(self.inputs) and self.inputs[i] is not None

    def value(self, i: int) -> Value:
        value = self.inputs[i] if i < len(self.inputs) else None
        if value is None:
            raise ValueError(f"input {i} is missing")
        return value

    def shape(self, i: int) -> Shape:
        return self.value(i).shape

    def node(self, i: int, shape: Sequence[int] | None = None) -> Node:
        """An operand as a node, broadcast to `shape` if one is given."""
        node = self.reader.lift(self.value(i))
        return node if shape is None else broadcast(node, self.room(shape))

    def given(self, i: int) -> Array | Node:
        """An operand as an array if it is known and not a weight, else as a node."""
        value = self.value(i)
        return value.array if value.array is not None and not value.trained else self.node(i)

    def array(self, i: int) -> Array:
        """The entries of an operand that must not depend on an input."""
        entries = self.reader.known(self.value(i))
        if entries is None:
            raise DynamicModel(
                f"its operand {self.value(i).name!r} must be fixed, but depends on an input of the model"
            )
        return entries

    def numbers(self, i: int, name: str = "", default: Any = None) -> Any:
        """Whole numbers that older opsets keep in an attribute and newer ones in an operand."""
        if name and name in self.attributes:
            return self.attributes[name]
        return tuple(int(n) for n in self.array(i).reshape(-1)) if self.has(i) else default

    def scalar(self, i: int, name: str, default: Any) -> Any:
        """A number that older opsets keep in an attribute; None where it depends on an input or is a tensor."""
        if name in self.attributes:
            return self.attributes[name]
        if not self.has(i):
            return default
        entries = self.reader.known(self.value(i))
        return None if entries is None or entries.size != 1 else entries.reshape(-1)[0].item()

    def room(self, shape: Sequence[int]) -> Shape:
        return self.reader.room(shape)

    def constant(self, what: str, array: Array) -> Node:
        return self.reader.constant(f"{self.name}:{what}", array)

    def common(self, *slots: int) -> Shape:
        """The shape that operands broadcast to."""
        shapes = [self.shape(i) for i in slots or range(len(self.inputs))]
        return self.room(np.broadcast_shapes(*shapes))

    def pair(self) -> tuple[Node, Node]:
        shape = self.common(0, 1)
        return self.node(0, shape), self.node(1, shape)

    def uniform(self, i: int) -> float | None:
        """The number that a fixed operand repeats; None where it is a weight, not fixed, or holds different ones."""
        value = self.value(i)
        if value.array is None or value.trained or not value.array.size:
            return None
        first = value.array.reshape(-1)[0]
        return float(first) if np.isfinite(first) and bool((value.array == first).all()) else None

    def axis(self, rank: int, default: int, name: str = "axis") -> int:
        return normal(self.attr(name, default), rank)

    def refuse(self, reason: str) -> UnsupportedOp:
        return UnsupportedOp(reason)


@dataclass(frozen=True)
class Rule:
    """How an operation is read: `build` in general, `fold` (of arrays, broadcasting) where all operands are known."""

    build: Callable[[Call], Result]
    fold: Callable[..., Array] | None = None
    gives: np.dtype[Any] | None = None
    known: bool = False  # whether `build` itself handles arrays


RULES: dict[str, Rule] = {}


def rule(
    *names: str, fold: Callable[..., Any] | None = None, gives: np.dtype[Any] | None = None, known: bool = False
) -> Callable[[Callable[[Call], Result]], Callable[[Call], Result]]:
    """Enters a function into the table."""

    def enter(build: Callable[[Call], Result]) -> Callable[[Call], Result]:
        RULES.update(dict.fromkeys(names, Rule(build, fold, gives, known)))
        return build

    return enter


def normal(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} does not exist in a value with {rank} axes")
    return axis % rank


# -- structural maps, of nodes and arrays alike


def reshaped(x: Array | Node, shape: Sequence[int]) -> Array | Node:
    return reshape(x, shape) if isinstance(x, Node) else x.reshape(tuple(shape))


def permuted(x: Array | Node, axes: Sequence[int]) -> Array | Node:
    if isinstance(x, Node):
        return x if tuple(axes) == tuple(range(len(axes))) else Permute(tuple(axes))(x)
    return x.transpose(tuple(axes))


def taken(x: Array | Node, axis: int, index: Sequence[int] | Array) -> Array | Node:
    """Entries of one axis; a run of them as a slice."""
    size = x.shape[axis]
    run = index if isinstance(index, range) and index.step > 0 else None
    if run is None:
        places = np.asarray(index, np.int64).reshape(-1)
        if len(places) > INDICES or ((places < -size) | (places >= size)).any():
            raise ValueError(f"{len(places)} positions do not fit axis {axis} of a value of shape {x.shape}")
        places = places % max(size, 1)
        step = int(places[1] - places[0]) if len(places) > 1 else 1
        if len(places) and step > 0 and (np.diff(places) == step).all():
            run = range(int(places[0]), int(places[-1]) + 1, step)
    if not isinstance(x, Node):
        return x.take(np.asarray(index if run is None else run, np.int64).reshape(-1), axis)
    if run is None:
        return Gather(axis, tuple(places.tolist()))(x)
    if run == range(size):
        return x
    n = len(x.shape)
    return Slice(
        tuple(run.start if i == axis and run else 0 for i in range(n)),
        tuple(len(run) if i == axis else m for i, m in enumerate(x.shape)),
        tuple(run.step if i == axis else 1 for i in range(n)),
    )(x)


def rearranged(c: Call, move: Callable[[Array], Array]) -> Array | Node:
    """Operand 0 with its entries in other places: `move` is applied to their positions."""
    x = c.given(0)
    if not isinstance(x, Node):
        return move(x)
    places = move(np.arange(math.prod(c.reader.room(x.shape, folded=True))).reshape(x.shape))
    return reshaped(taken(reshape(x, (math.prod(x.shape),)), 0, places), places.shape)
