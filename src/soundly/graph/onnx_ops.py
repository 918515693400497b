"""ONNX's arithmetic, comparisons, shapes and reductions in terms of soundly's operations: one short rule each.

A rule receives a `Call` and returns the result as a node, or as an array where everything it depends on is known:
shape arithmetic is computed while reading and never enters the graph. Layers with weights are in `onnx_layers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from soundly.errors import DynamicModel, UnsupportedOp
from soundly.graph import elementwise as ew
from soundly.graph.composite import Maximum, Rounding, maximum_over, minimum
from soundly.graph.elementwise import Elementwise
from soundly.graph.linear import (
    Combine,
    Concat,
    Gather,
    Permute,
    ScatterAdd,
    Slice,
    Sum,
    add,
    broadcast,
    mean,
    pad,
    reshape,
    scale,
    subtract,
)  # fmt: skip
from soundly.graph.node import Fill, Node, Shape
from soundly.graph.product import Dense, MatMul, multiply
from soundly.graph.ring import polynomial

Array = np.ndarray[Any, Any]
Result = Any
"""A node, an array, or a list of these and of None for outputs that are not available."""
INDICES = 2**24
"""The most positions that one operation may gather."""

_FLOAT, _INT, _BOOL = np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.bool_)


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
            raise DynamicModel(f"its operand {self.value(i).name!r} must be fixed, but depends on an input of the model")
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


# -- arithmetic


def _quotient(a: Array, b: Array) -> Array:
    if np.issubdtype(a.dtype, np.integer):
        whole = np.abs(a) // np.abs(b)
        return np.where((a < 0) != (b < 0), -whole, whole).astype(a.dtype)
    return np.divide(a, b)


def _power(a: Array, b: Array) -> Array:
    return np.power(a.astype(np.float64), b.astype(np.float64)).astype(a.dtype)


def _shifted(c: Call, sign: float) -> Node:
    a, b = c.pair()
    return add(a, b) if sign > 0 else subtract(a, b)


@rule("Add", fold=np.add)
def _add(c: Call) -> Node:
    return _shifted(c, 1.0)


@rule("Sub", fold=np.subtract)
def _sub(c: Call) -> Node:
    return _shifted(c, -1.0)


@rule("Mul", fold=np.multiply)
def _mul(c: Call) -> Node:
    shape = c.common(0, 1)
    for i in (0, 1):
        factor = c.uniform(i)
        if factor is not None:
            return scale(c.node(1 - i, shape), factor)
    return product(*c.pair())


def product(a: Node, b: Node) -> Node:
    """a * b: a square is not a product of two copies, and x * sigmoid(x) has a name of its own."""
    if a is b:
        return ew.SQUARE(a)
    for x, gate in ((a, b), (b, a)):
        if gate.op == ew.SIGMOID and gate.inputs[0] is x:
            return ew.SILU(x)
    return multiply(a, b)


@rule("Div", fold=_quotient)
def _div(c: Call) -> Node:
    if c.value(0).dtype.kind in "iub":
        raise c.refuse("the division of integers that depend on an input rounds them")
    shape = c.common(0, 1)
    divisor = c.uniform(1)
    if divisor:
        return scale(c.node(0, shape), 1 / divisor)
    inverse = broadcast(ew.RECIPROCAL(c.node(1)), shape)
    dividend = c.uniform(0)
    return multiply(c.node(0, shape), inverse) if dividend is None else scale(inverse, dividend)


@rule("Pow", fold=_power)
def _pow(c: Call) -> Node:
    exponent = c.scalar(1, "exponent", None)
    if exponent is None and c.reader.known(c.value(1)) is not None:
        entries = np.unique(c.array(1))
        exponent = float(entries[0]) if len(entries) == 1 else None
    if exponent is not None:
        return powered(c.node(0, c.common(0, 1)), float(exponent))
    base = c.uniform(0)
    if base is not None and base > 0:
        return ew.EXP(scale(c.node(1, c.common(0, 1)), math.log(base)))
    raise c.refuse("a power is supported with one fixed exponent, or one fixed positive base")


def powered(x: Node, exponent: float) -> Node:
    if exponent == 0:
        return Fill(1.0, x.shape)()
    named = {1: None, 2: ew.SQUARE, 0.5: ew.SQRT, -0.5: ew.RSQRT, -1: ew.RECIPROCAL}
    function = named.get(exponent, ew.power(exponent))
    return x if function is None else function(x)


@rule("Mod", fold=lambda a, b: np.mod(a, b))
def _mod(c: Call) -> Node:
    raise c.refuse("a remainder of values that depend on an input")


@rule("Sum")
def _sum(c: Call) -> Node:
    shape = c.common()
    return add(*(c.node(i, shape) for i in range(len(c.inputs))))


@rule("Mean")
def _mean(c: Call) -> Node:
    return scale(_sum(c), 1 / len(c.inputs))


def _extreme(largest: bool) -> Callable[[Call], Node]:
    def build(c: Call) -> Node:
        shape = c.common()
        numbers = [c.uniform(i) for i in range(len(c.inputs))]
        fixed = [v for v in numbers if v is not None]
        nodes = [c.node(i, shape) for i, v in enumerate(numbers) if v is None]
        if not nodes:
            return Fill(max(fixed) if largest else min(fixed), shape)()
        result = nodes[0]
        for other in nodes[1:]:
            result = Maximum()(result, other) if largest else minimum(result, other)
        if not fixed:
            return result
        return clipped(result, max(fixed), math.inf) if largest else clipped(result, -math.inf, min(fixed))

    return build


def clipped(x: Node, lower: float, upper: float) -> Node:
    if lower == 0 and upper == math.inf:
        return ew.RELU(x)
    return x if (lower, upper) == (-math.inf, math.inf) else ew.clip(lower, upper)(x)


rule("Max", fold=lambda *a: np.maximum.reduce(np.broadcast_arrays(*a)))(_extreme(True))
rule("Min", fold=lambda *a: np.minimum.reduce(np.broadcast_arrays(*a)))(_extreme(False))


@rule("Clip")
def _clip(c: Call) -> Node:
    x = c.node(0)
    lower, upper = c.scalar(1, "min", -math.inf), c.scalar(2, "max", math.inf)
    if lower is not None and upper is not None:
        # Where the bounds are crossed, the upper one wins.
        return clipped(x, min(lower, upper), upper)
    x = Maximum()(x, c.node(1, x.shape)) if c.has(1) else x
    return minimum(x, c.node(2, x.shape)) if c.has(2) else x


# -- functions of one number


def each(function: Elementwise) -> Callable[[Call], Node]:
    return lambda c: function(c.node(0))


rule("Neg", fold=np.negative)(lambda c: scale(c.node(0), -1))
rule("Abs", fold=np.abs)(each(ew.ABS))
rule("Exp", fold=np.exp)(each(ew.EXP))
rule("Log", fold=np.log)(each(ew.LOG))
rule("Sqrt", fold=np.sqrt)(each(ew.SQRT))
rule("Reciprocal", fold=np.reciprocal)(each(ew.RECIPROCAL))
rule("Sin", fold=np.sin)(each(ew.SIN))
rule("Cos", fold=np.cos)(each(ew.COS))
rule("Sign", fold=np.sign)(each(ew.SIGN))
for _name, _function in {
    "Relu": ew.RELU, "Sigmoid": ew.SIGMOID, "Tanh": ew.TANH, "Erf": ew.ERF, "Softplus": ew.SOFTPLUS, "Mish": ew.MISH,
    "HardSwish": ew.HARDSWISH, "Atan": ew.ATAN,
}.items():  # fmt: skip
    rule(_name)(each(_function))
rule("Tan")(lambda c: multiply(ew.SIN(c.node(0)), ew.RECIPROCAL(ew.COS(c.node(0)))))
rule("Sinh")(lambda c: Combine((0.5, -0.5))(ew.EXP(c.node(0)), ew.EXP(scale(c.node(0), -1))))
rule("Cosh")(lambda c: Combine((0.5, 0.5))(ew.EXP(c.node(0)), ew.EXP(scale(c.node(0), -1))))
rule("LeakyRelu")(lambda c: ew.leaky_relu(c.attr("alpha", 0.01))(c.node(0)))
rule("Elu")(lambda c: ew.elu(c.attr("alpha", 1.0))(c.node(0)))
rule("Celu")(lambda c: ew.elu(c.attr("alpha", 1.0), 1.0, 1 / c.attr("alpha", 1.0))(c.node(0)))
rule("Gelu")(lambda c: (ew.GELU_TANH if c.attr("approximate", "none") == "tanh" else ew.GELU)(c.node(0)))
rule("Swish")(lambda c: scale(ew.SILU(scale(c.node(0), c.attr("alpha", 1.0))), 1 / c.attr("alpha", 1.0)))


@rule("Selu")
def _selu(c: Call) -> Node:
    return ew.elu(c.attr("alpha", 1.6732631921768188), c.attr("gamma", 1.0507010221481323))(c.node(0))


@rule("HardSigmoid")
def _hard_sigmoid(c: Call) -> Node:
    x = scale(c.node(0), c.attr("alpha", 0.2))
    return ew.clip(0.0, 1.0)(add(x, Fill(c.attr("beta", 0.5), x.shape)()))


@rule("Softsign")
def _softsign(c: Call) -> Node:
    x = c.node(0)
    return multiply(x, ew.RECIPROCAL(add(ew.ABS(x), Fill(1.0, x.shape)())))


@rule("ThresholdedRelu")
def _thresholded_relu(c: Call) -> Node:
    t = c.attr("alpha", 1.0)
    return Elementwise(f"thresholded_relu({t:g})", ((), polynomial({(1,): 1})), breaks=(t,))(c.node(0))


@rule("Shrink")
def _shrink(c: Call) -> Node:
    t, bias = c.attr("lambd", 0.5), c.attr("bias", 0.0)
    if t < 0:
        raise c.refuse("Shrink with a negative lambd")
    pieces = (polynomial({(1,): 1, (0,): bias}), (), polynomial({(1,): 1, (0,): -bias}))
    return Elementwise(f"shrink({t:g}, {bias:g})", pieces, breaks=(-t, t), held=("right", "left"))(c.node(0))


@rule("PRelu")
def _prelu(c: Call) -> Node:
    x = c.node(0)
    slope = c.uniform(1)
    if slope is not None:
        return ew.leaky_relu(slope)(x)
    below = scale(ew.RELU(scale(x, -1)), -1)
    return add(ew.RELU(x), multiply(c.node(1, x.shape), below))


for _name, _fold in {"Floor": np.floor, "Ceil": np.ceil, "Round": np.round}.items():
    rule(_name, fold=_fold)(lambda c: Rounding(c.op.lower())(c.node(0)))  # type: ignore[arg-type]


@rule("Cast", "CastLike", known=True)
def _cast(c: Call) -> Result:
    code = c.attr("to") if c.op == "Cast" else None
    target = c.value(1).dtype if c.op == "CastLike" else np.dtype(_CAST.get(code or 0, "V"))
    if target.kind == "V":
        raise c.refuse(f"a cast to ONNX element type {code}")
    value, x = c.value(0), c.given(0)
    if not isinstance(x, Node):
        return Value(c.name, target, value.shape, array=x.astype(target))
    source = value.dtype.kind
    if target.kind == "b" and source != "b":
        x = nonzero(x, whole=source in "iu")
    elif target.kind in "iu" and source == "f":
        x = Rounding("trunc")(x)
    elif target.kind == "u" and source == "i":
        raise c.refuse("a cast to unsigned integers of a value that depends on an input")
    return Value(c.name, target, value.shape, node=x)


_CAST = {1: "f4", 2: "u1", 3: "i1", 4: "u2", 5: "i2", 6: "i4", 7: "i8", 9: "?", 10: "f2", 11: "f8", 12: "u4", 13: "u8"}

# -- comparisons: 0 or 1


def negated(x: Node) -> Node:
    return subtract(Fill(1.0, x.shape)(), x)


def nonzero(x: Node, *, whole: bool) -> Node:
    """1 where x is not zero; for whole numbers a continuous function does."""
    return ew.clip(-math.inf, 1.0)(ew.ABS(x)) if whole else add(ew.STEP(x), ew.STEP(scale(x, -1)))


rule("Greater", fold=np.greater, gives=_BOOL)(lambda c: ew.STEP(_shifted(c, -1.0)))
rule("Less", fold=np.less, gives=_BOOL)(lambda c: ew.STEP(scale(_shifted(c, -1.0), -1)))
rule("GreaterOrEqual", fold=np.greater_equal, gives=_BOOL)(lambda c: negated(ew.STEP(scale(_shifted(c, -1.0), -1))))
rule("LessOrEqual", fold=np.less_equal, gives=_BOOL)(lambda c: negated(ew.STEP(_shifted(c, -1.0))))
rule("Not", fold=np.logical_not, gives=_BOOL)(lambda c: negated(c.node(0)))
rule("And", fold=np.logical_and, gives=_BOOL)(lambda c: multiply(*c.pair()))
rule("Or", fold=np.logical_or, gives=_BOOL)(lambda c: Maximum()(*c.pair()))
rule("Xor", fold=np.logical_xor, gives=_BOOL)(lambda c: nonzero(_shifted(c, -1.0), whole=True))


@rule("Equal", fold=np.equal, gives=_BOOL)
def _equal(c: Call) -> Node:
    return negated(nonzero(_shifted(c, -1.0), whole=c.value(0).dtype.kind in "iub"))


@rule("Where", known=True)
def _where(c: Call) -> Result:
    shape = c.common(0, 1, 2)
    dtype = c.value(1).dtype
    condition, parts = c.given(0), (c.given(1), c.given(2))
    if all(not isinstance(v, Node) for v in (condition, *parts)):
        c.reader.room(shape, folded=True)
        return Value(c.name, dtype, shape, array=np.where(condition, *parts))  # type: ignore[arg-type]
    if isinstance(condition, Node):
        chosen = broadcast(condition, shape)
        node = add(multiply(chosen, c.node(1, shape)), multiply(negated(chosen), c.node(2, shape)))
        return Value(c.name, dtype, shape, node=node)
    # Entries that are not chosen may be infinite: they are replaced, not multiplied by zero.
    kept = []
    for i, mask in ((1, condition != 0), (2, condition == 0)):
        part = parts[i - 1]
        if isinstance(part, Node):
            weights = c.constant(f"mask {i}", mask.astype(_FLOAT))
            kept.append(multiply(broadcast(weights, shape), broadcast(part, shape)))
        else:
            c.reader.room(shape, folded=True)
            kept.append(c.constant(f"choice {i}", np.broadcast_to(np.where(mask, part, np.zeros((), part.dtype)), shape)))
    return Value(c.name, dtype, shape, node=add(*kept))


# -- shapes


rule("Identity", known=True)(lambda c: c.value(0))


@rule("Dropout", known=True)
def _dropout(c: Call) -> Result:
    if c.opset >= 12 and c.has(2) and bool(c.array(2)):
        raise c.refuse("dropout in training mode")
    return [c.value(0), None]


@rule("Shape", gives=_INT, known=True)
def _shape(c: Call) -> Array:
    shape = c.shape(0)
    return np.array(shape[slice(c.attr("start"), c.attr("end"))], np.int64)


@rule("Size", gives=_INT, known=True)
def _size(c: Call) -> Array:
    return np.array(math.prod(c.shape(0)), np.int64)


@rule("Constant", known=True)
def _constant(c: Call) -> Array:
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64), ("value_ints", np.int64)):
        if name in c.attributes:
            return np.array(c.attr(name), dtype)
    if not isinstance(c.attr("value"), np.ndarray):
        raise c.refuse("a constant that is not a tensor of numbers")
    entries: Array = c.attr("value")
    return entries


@rule("ConstantOfShape", known=True)
def _constant_of_shape(c: Call) -> Array:
    shape = c.reader.room(c.numbers(0), folded=True)
    fill = c.attr("value", np.zeros(1, np.float32))
    return np.full(shape, fill.reshape(-1)[0], fill.dtype)


@rule("Range", known=True)
def _range(c: Call) -> Array:
    start, limit, step = (c.array(i).reshape(-1)[0] for i in range(3))
    count = max(0, math.ceil((float(limit) - float(start)) / float(step)))
    c.reader.room((count,), folded=True)
    return (start + np.arange(count, dtype=np.int64).astype(start.dtype) * step).astype(start.dtype)


@rule("EyeLike", known=True)
def _eye_like(c: Call) -> Array:
    rows, columns = c.reader.room(c.shape(0), folded=True)
    return np.eye(rows, columns, c.attr("k", 0), dtype=np.dtype(_CAST[c.attr("dtype", 1)]))


@rule("Reshape", known=True)
def _reshape(c: Call) -> Result:
    old, wanted = c.shape(0), list(c.numbers(1, "shape"))
    if not c.attr("allowzero", 0):
        wanted = [old[i] if n == 0 else n for i, n in enumerate(wanted)]
    if -1 in wanted:
        rest = math.prod(n for n in wanted if n != -1)
        wanted[wanted.index(-1)] = math.prod(old) // rest if rest else 0
    if math.prod(wanted) != math.prod(old) or any(n < 0 for n in wanted):
        raise ValueError(f"a value of shape {old} cannot be reshaped to {wanted}")
    return reshaped(c.given(0), c.room(wanted))


@rule("Flatten", known=True)
def _flatten(c: Call) -> Result:
    shape, axis = c.shape(0), c.attr("axis", 1)
    if not -len(shape) <= axis <= len(shape):
        raise ValueError(f"axis {axis} does not exist in a value with {len(shape)} axes")
    axis = axis if axis >= 0 else axis + len(shape)
    return reshaped(c.given(0), (math.prod(shape[:axis]), math.prod(shape[axis:])))


@rule("Transpose", known=True)
def _transpose(c: Call) -> Result:
    n = len(c.shape(0))
    axes = [normal(a, n) for a in c.attr("perm", tuple(reversed(range(n))))]
    if sorted(axes) != list(range(n)):
        raise ValueError(f"{axes} is no order of {n} axes")
    return permuted(c.given(0), axes)


@rule("Squeeze", known=True)
def _squeeze(c: Call) -> Result:
    shape = c.shape(0)
    axes = c.numbers(1, "axes", tuple(i for i, n in enumerate(shape) if n == 1))
    drop = {normal(a, len(shape)) for a in axes}
    if any(shape[a] != 1 for a in drop):
        raise ValueError(f"axes {sorted(drop)} of a value of shape {shape} do not have length one")
    return reshaped(c.given(0), [n for i, n in enumerate(shape) if i not in drop])


@rule("Unsqueeze", known=True)
def _unsqueeze(c: Call) -> Result:
    shape, axes = c.shape(0), c.numbers(1, "axes")
    rank = len(shape) + len(axes)
    new, rest = {normal(a, rank) for a in axes}, iter(shape)
    if len(new) != len(axes):
        raise ValueError(f"axes {axes} are not distinct")
    return reshaped(c.given(0), [1 if i in new else next(rest) for i in range(rank)])


@rule("Slice", known=True)
def _slice(c: Call) -> Result:
    shape = c.shape(0)
    starts, ends = c.numbers(1, "starts"), c.numbers(2, "ends")
    axes = c.numbers(3, "axes", tuple(range(len(starts))))
    steps = c.numbers(4, "", (1,) * len(starts))
    x = c.given(0)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        a = normal(axis, len(shape))
        n = shape[a]
        # An end before the first entry, as large negative numbers mean with a negative step, is None in Python.
        stop = None if step < 0 and end < -n else end
        x = taken(x, a, range(n)[slice(start, stop, step)])
    return x


@rule("Split", known=True)
def _split(c: Call) -> Result:
    shape = c.shape(0)
    axis = c.axis(len(shape), 0)
    sizes = c.numbers(1, "split")
    if sizes is None:
        count = c.attr("num_outputs", c.outputs)
        size = -(-shape[axis] // count)
        sizes = [max(0, min(size, shape[axis] - i * size)) for i in range(count)]
    if sum(sizes) != shape[axis] or any(n < 0 for n in sizes):
        raise ValueError(f"parts {list(sizes)} do not add up to axis {axis} of a value of shape {shape}")
    ends = np.cumsum(sizes).tolist()
    return [taken(c.given(0), axis, range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


@rule("Concat", known=True)
def _concat(c: Call) -> Result:
    parts = [c.given(i) for i in range(len(c.inputs))]
    axis = c.axis(len(parts[0].shape), 1)
    if not any(isinstance(p, Node) for p in parts):
        c.reader.room((sum(p.size for p in parts if not isinstance(p, Node)),), folded=True)
        return np.concatenate(parts, axis)  # type: ignore[arg-type]
    nodes = [c.node(i) for i, part in enumerate(parts) if part.shape[axis]]
    return nodes[0] if len(nodes) == 1 else Concat(axis)(*nodes)


@rule("Gather", known=True)
def _gather(c: Call) -> Result:
    shape = c.shape(0)
    axis, index = c.axis(len(shape), 0), c.array(1)
    result = (*shape[:axis], *index.shape, *shape[axis + 1 :])
    c.reader.room(result, folded=not isinstance(c.given(0), Node))
    return reshaped(taken(c.given(0), axis, index), result)


@rule("GatherElements", known=True)
def _gather_elements(c: Call) -> Result:
    axis = c.axis(len(c.shape(0)), 0)
    return rearranged(c, lambda x: np.take_along_axis(x, c.array(1) % x.shape[axis], axis))


@rule("GatherND", known=True)
def _gather_nd(c: Call) -> Result:
    index = c.array(1)
    if c.attr("batch_dims", 0):
        raise c.refuse("GatherND with batch_dims")
    return rearranged(c, lambda x: x[tuple(np.moveaxis(index, -1, 0))])


def _replaced(c: Call, owner: Array) -> Result:
    """Operand 0 with some entries from the operand of updates: owner says which, -1 where it stays."""
    shape, reduction = c.shape(0), c.attr("reduction", "none")
    data, updates = c.given(0), c.given(2)
    size = math.prod(shape)
    if reduction == "none":
        both = [reshaped(data, (size,)), reshaped(updates, (math.prod(updates.shape),))]
        places = np.where(owner < 0, np.arange(size), owner + size)
        if not any(isinstance(p, Node) for p in both):
            return np.concatenate(both)[places].reshape(shape)  # type: ignore[arg-type]
        joined = Concat(0)(reshape(c.node(0), (size,)), reshape(c.node(2), (math.prod(updates.shape),)))
        return reshaped(taken(joined, 0, places), shape)
    raise c.refuse(f"{c.op} with reduction {reduction!r}")


@rule("ScatterND", known=True)
def _scatter_nd(c: Call) -> Result:
    index, shape = c.array(1), c.shape(0)
    depth = index.shape[-1]
    rows = index.reshape(-1, depth)
    if ((rows < -np.array(shape[:depth])) | (rows >= np.array(shape[:depth]))).any():
        raise ValueError(f"a position lies outside a value of shape {shape}")
    inner = math.prod(shape[depth:])
    flat = np.ravel_multi_index(tuple((rows % np.array(shape[:depth])).T), shape[:depth]) if depth else np.zeros(len(rows), int)
    flat = (flat[:, None] * inner + np.arange(inner)).reshape(-1)
    if c.attr("reduction", "none") == "add":
        total = ScatterAdd(0, tuple(flat.tolist()), math.prod(shape))(reshape(c.node(2), (len(flat),)))
        return add(c.node(0), reshape(total, shape))
    owner = np.full(math.prod(c.reader.room(shape, folded=True)), -1)
    owner[flat] = np.arange(len(flat))
    return _replaced(c, owner)


@rule("ScatterElements", "Scatter", known=True)
def _scatter_elements(c: Call) -> Result:
    shape, index = c.shape(0), c.array(1)
    axis = c.axis(len(shape), 0)
    owner = np.full(c.reader.room(shape, folded=True), -1)
    where = list(np.indices(index.shape))
    where[axis] = index % shape[axis]
    owner[tuple(where)] = np.arange(index.size).reshape(index.shape)
    return _replaced(c, owner.reshape(-1))


@rule("Expand", known=True)
def _expand(c: Call) -> Result:
    shape = c.room(np.broadcast_shapes(c.shape(0), c.numbers(1)))
    x = c.given(0)
    if isinstance(x, Node):
        return broadcast(x, shape)
    c.reader.room(shape, folded=True)
    return np.broadcast_to(x, shape).copy()


@rule("Tile", known=True)
def _tile(c: Call) -> Result:
    shape, repeats = c.shape(0), c.numbers(1)
    result = c.room([n * r for n, r in zip(shape, repeats, strict=True)])
    x = c.given(0)
    if not isinstance(x, Node):
        c.reader.room(result, folded=True)
        return np.tile(x, repeats)
    pairs = [m for n, r in zip(shape, repeats, strict=True) for m in (r, n)]
    x = broadcast(reshape(x, [m for n in shape for m in (1, n)]), pairs)
    return reshape(x, result)


@rule("Pad", known=True)
def _pad(c: Call) -> Result:
    shape, mode = c.shape(0), c.attr("mode", "constant")
    pads = c.numbers(1, "pads") or c.attr("paddings")
    axes = [normal(a, len(shape)) for a in c.numbers(3, "", tuple(range(len(shape))))]
    if len(pads) != 2 * len(axes):
        raise ValueError(f"{len(pads)} pads do not fit {len(axes)} axes")
    before, after = [0] * len(shape), [0] * len(shape)
    for i, a in enumerate(axes):
        before[a], after[a] = pads[i], pads[len(axes) + i]
    result = c.room([n + b + a for n, b, a in zip(shape, before, after, strict=True)])
    if mode == "constant":
        fill = c.scalar(2, "value", 0.0)
        if fill is None:
            raise c.refuse("padding with a value that depends on an input")
        x = pad(c.node(0), before, after)
        if not fill:
            return x
        inside = pad(Fill(1.0, shape)(), before, after)
        return add(x, scale(negated(inside), float(fill)))
    kind = {"edge": "edge", "reflect": "reflect", "wrap": "wrap"}.get(mode)
    if kind is None:
        raise c.refuse(f"padding mode {mode!r}")
    c.reader.room((max(result, default=0),), folded=True)
    x: Array | Node = c.given(0)
    for axis, (n, b, a) in enumerate(zip(shape, before, after, strict=True)):
        if b or a:
            places: Array = np.pad(np.arange(n), (max(b, 0), max(a, 0)), mode=kind)  # type: ignore[call-overload]
            x = taken(x, axis, places[max(-b, 0) : len(places) - max(-a, 0)])
    return x


@rule("DepthToSpace", known=True)
def _depth_to_space(c: Call) -> Result:
    n, depth, h, w = c.shape(0)
    b = c.attr("blocksize")
    if c.attr("mode", "DCR") == "DCR":
        split, order = (n, b, b, depth // b**2, h, w), (0, 3, 4, 1, 5, 2)
    else:
        split, order = (n, depth // b**2, b, b, h, w), (0, 1, 4, 2, 5, 3)
    return reshaped(permuted(reshaped(c.given(0), split), order), (n, depth // b**2, h * b, w * b))


@rule("SpaceToDepth", known=True)
def _space_to_depth(c: Call) -> Result:
    n, depth, h, w = c.shape(0)
    b = c.attr("blocksize")
    if c.attr("mode", "DCR") != "DCR":
        raise c.refuse(f"SpaceToDepth with mode {c.attr('mode')!r}")
    split = reshaped(c.given(0), (n, depth, h // b, b, w // b, b))
    return reshaped(permuted(split, (0, 3, 5, 1, 2, 4)), (n, depth * b**2, h // b, w // b))


@rule("Trilu", known=True)
def _trilu(c: Call) -> Result:
    k = int(c.array(1)) if c.has(1) else 0
    x = c.given(0)
    keep = np.triu if c.attr("upper", 1) else np.tril
    if not isinstance(x, Node):
        return keep(x, k)
    mask = keep(np.ones(c.reader.room(x.shape[-2:], folded=True), _FLOAT), k)
    return multiply(x, broadcast(c.constant("mask", mask), x.shape))


@rule("CumSum", known=True)
def _cumsum(c: Call) -> Result:
    shape = c.shape(0)
    axis = normal(int(c.array(1).reshape(-1)[0]), len(shape))
    n = shape[axis]
    c.reader.room((n, n), folded=True)
    matrix = np.tril(np.ones((n, n), _FLOAT), -1 if c.attr("exclusive", 0) else 0)
    if c.attr("reverse", 0):
        matrix = matrix.T
    x = c.given(0)
    if not isinstance(x, Node):
        return np.moveaxis(np.moveaxis(x, axis, -1) @ matrix.T.astype(x.dtype), -1, axis)
    order = [*(i for i in range(len(shape)) if i != axis), axis]
    summed = Dense()(permuted(x, order), c.constant("triangle", matrix.copy()))  # type: ignore[arg-type]
    return permuted(summed, np.argsort(order).tolist())


@rule("NonZero", gives=_INT, known=True)
def _nonzero_positions(c: Call) -> Array:
    return np.array(np.nonzero(c.array(0)), np.int64)


# -- reductions


def _reduced(c: Call) -> tuple[tuple[int, ...], Shape]:
    """The axes to reduce and the result's shape."""
    shape = c.shape(0)
    axes = c.numbers(1, "axes")
    if not axes:
        axes = () if c.attr("noop_with_empty_axes", 0) else tuple(range(len(shape)))
    over = tuple(sorted({normal(a, len(shape)) for a in axes}))
    keep = c.attr("keepdims", 1)
    return over, tuple(1 if i in over else n for i, n in enumerate(shape) if keep or i not in over)


def _reduction(node: Callable[[Node, tuple[int, ...]], Node], array: Callable[..., Any] | None = None) -> Callable[[Call], Result]:
    def build(c: Call) -> Result:
        axes, shape = _reduced(c)
        x = c.given(0)
        if not isinstance(x, Node) and array is not None:
            return np.asarray(array(x, axis=axes, keepdims=True), x.dtype).reshape(shape)
        return reshape(node(c.node(0), axes), shape)

    return build


def largest(x: Node, axes: Sequence[int]) -> Node:
    for axis in axes:
        x = maximum_over(x, axis)
    return x


def _log_sum_exp(x: Node, axes: tuple[int, ...]) -> Node:
    peak = largest(x, axes)
    return add(ew.LOG(Sum(axes)(ew.EXP(subtract(x, broadcast(peak, x.shape))))), peak)


def _multiplied(x: Node, axes: tuple[int, ...]) -> Node:
    for axis in axes:
        parts = [taken(x, axis, [i]) for i in range(x.shape[axis])]
        x = parts[0]  # type: ignore[assignment]
        for part in parts[1:]:
            x = multiply(x, part)  # type: ignore[arg-type]
    return x


for _name, _node, _array in (
    ("ReduceSum", lambda x, axes: Sum(axes)(x), np.sum),
    ("ReduceMean", mean, np.mean),
    ("ReduceMax", largest, np.max),
    ("ReduceMin", lambda x, axes: scale(largest(scale(x, -1), axes), -1), np.min),
    ("ReduceProd", _multiplied, np.prod),
    ("ReduceL1", lambda x, axes: Sum(axes)(ew.ABS(x)), None),
    ("ReduceL2", lambda x, axes: ew.SQRT(Sum(axes)(ew.SQUARE(x))), None),
    ("ReduceSumSquare", lambda x, axes: Sum(axes)(ew.SQUARE(x)), None),
    ("ReduceLogSum", lambda x, axes: ew.LOG(Sum(axes)(x)), None),
    ("ReduceLogSumExp", _log_sum_exp, None),
):
    rule(_name, known=True)(_reduction(_node, _array))


def winners(x: Node, axis: int, *, last: bool = False) -> Node:
    """1 at the first (or last) largest entry along an axis, else 0: exact, from running maxima on both sides."""
    n = x.shape[axis]
    order = range(n - 1, -1, -1) if last else range(n)
    parts = [taken(x, axis, [i]) for i in order]
    after: list[Node | None] = [None] * n
    for i in range(n - 2, -1, -1):
        step = after[i + 1]
        after[i] = parts[i + 1] if step is None else Maximum()(parts[i + 1], step)  # type: ignore[assignment, arg-type]
    before: Node | None = None
    flags: list[Node] = []
    for part, later in zip(parts, after, strict=True):
        assert isinstance(part, Node)
        flag = None if later is None else negated(ew.STEP(subtract(later, part)))
        if before is not None:
            strictly = ew.STEP(subtract(part, before))
            flag = strictly if flag is None else multiply(flag, strictly)
        flags.append(Fill(1.0, part.shape)() if flag is None else flag)
        before = part if before is None else Maximum()(before, part)
    flags = flags[::-1] if last else flags
    return flags[0] if n == 1 else Concat(axis)(*flags)


@rule("ArgMax", "ArgMin", gives=_INT)
def _arg_extreme(c: Call) -> Node:
    x = c.node(0) if c.op == "ArgMax" else scale(c.node(0), -1)
    axis = c.axis(len(x.shape), 0)
    flags = winners(x, axis, last=bool(c.attr("select_last_index", 0)))
    index = [taken(flags, axis, [i]) for i in range(x.shape[axis])]
    total = Combine(tuple(map(float, range(len(index)))))(*index)  # type: ignore[arg-type]
    shape = [1 if i == axis else n for i, n in enumerate(x.shape) if c.attr("keepdims", 1) or i != axis]
    return reshape(total, shape)


@rule("Hardmax")
def _hardmax(c: Call) -> Node:
    x = c.node(0)
    if c.opset >= 13:
        return winners(x, c.axis(len(x.shape), -1))
    axis = c.axis(len(x.shape), 1)
    return reshape(winners(reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))), 1), x.shape)


@rule("OneHot", known=True)
def _one_hot(c: Call) -> Result:
    index, depth, ends = c.given(0), int(c.array(1).reshape(-1)[0]), c.array(2)
    rank = len(index.shape) + 1
    axis = c.axis(rank, -1)
    shape = c.room((*index.shape[:axis], depth, *index.shape[axis:]))
    column = [*index.shape[:axis], 1, *index.shape[axis:]]
    levels = np.arange(depth).reshape([depth if i == axis else 1 for i in range(rank)])
    if not isinstance(index, Node):
        c.reader.room(shape, folded=True)
        places = np.where(index < 0, index + depth, index).reshape(column)
        return Value(c.name, ends.dtype, shape, array=np.where(places == levels, ends[1], ends[0]))
    if c.value(0).dtype.kind == "f":
        raise c.refuse("OneHot of indices that are not whole numbers")
    position = broadcast(reshape(index, column), shape)
    flags = [
        _levels(subtract(position, broadcast(c.constant(f"levels {k}", levels - k * depth), shape))) for k in (0, 1)
    ]  # positions from -depth to -1 count from the end
    node = scale(add(*flags), float(ends[1]) - float(ends[0]))
    return Value(c.name, ends.dtype, shape, node=add(node, Fill(float(ends[0]), shape)()))


def _levels(difference: Node) -> Node:
    """1 where a whole number is zero, else 0."""
    return negated(nonzero(difference, whole=True))


# -- matrix products


@rule("MatMul")
def _matmul(c: Call) -> Node:
    return matrix_product(c, c.node(0), c.node(1))


def matrix_product(c: Call, a: Node, b: Node) -> Node:
    """numpy's matmul; a dense layer where the second factor is one matrix."""
    if not a.shape or not b.shape:
        raise ValueError("a matrix product of a single number")
    if len(b.shape) == 2:
        return Dense()(a, Permute((1, 0))(b))
    first, last = len(a.shape) == 1, len(b.shape) == 1
    if last:
        return reshape(Dense()(a, reshape(b, (1, *b.shape))), a.shape[:-1])
    a = reshape(a, (1, *a.shape)) if first else a
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    y = MatMul()(broadcast(a, c.room((*batch, *a.shape[-2:]))), broadcast(b, c.room((*batch, *b.shape[-2:]))))
    return reshape(y, (*y.shape[:-2], y.shape[-1])) if first else y


@rule("Gemm")
def _gemm(c: Call) -> Node:
    a, b = c.node(0), c.node(1)
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise ValueError(f"Gemm needs two matrices, not shapes {a.shape} and {b.shape}")
    a = Permute((1, 0))(a) if c.attr("transA", 0) else a
    b = b if c.attr("transB", 0) else Permute((1, 0))(b)
    y = scale(Dense()(a, b), c.attr("alpha", 1.0))
    beta = c.attr("beta", 1.0)
    return add(y, scale(c.node(2, y.shape), beta)) if c.has(2) and beta else y
