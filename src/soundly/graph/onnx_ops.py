"""ONNX's arithmetic, functions of one number, comparisons and matrix products: one short rule each."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from soundly.graph import elementwise as ew
from soundly.graph.composite import Maximum, Rounding, minimum
from soundly.graph.elementwise import Elementwise
from soundly.graph.linear import Combine, Permute, add, broadcast, reshape, scale, subtract
from soundly.graph.node import Fill, Node
from soundly.graph.onnx_call import BOOL, FLOAT, Array, Call, Result, Value, rule
from soundly.graph.onnx_file import DTYPES
from soundly.graph.product import Dense, MatMul, multiply
from soundly.graph.ring import polynomial

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
    target = c.value(1).dtype if c.op == "CastLike" else np.dtype(DTYPES.get(code or 0, "V"))
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


# -- comparisons: 0 or 1


def negated(x: Node) -> Node:
    return subtract(Fill(1.0, x.shape)(), x)


def nonzero(x: Node, *, whole: bool) -> Node:
    """1 where x is not zero; for whole numbers a continuous function does."""
    return ew.clip(-math.inf, 1.0)(ew.ABS(x)) if whole else add(ew.STEP(x), ew.STEP(scale(x, -1)))


rule("Greater", fold=np.greater, gives=BOOL)(lambda c: ew.STEP(_shifted(c, -1.0)))
rule("Less", fold=np.less, gives=BOOL)(lambda c: ew.STEP(scale(_shifted(c, -1.0), -1)))
rule("GreaterOrEqual", fold=np.greater_equal, gives=BOOL)(lambda c: negated(ew.STEP(scale(_shifted(c, -1.0), -1))))
rule("LessOrEqual", fold=np.less_equal, gives=BOOL)(lambda c: negated(ew.STEP(_shifted(c, -1.0))))
rule("Not", fold=np.logical_not, gives=BOOL)(lambda c: negated(c.node(0)))
rule("And", fold=np.logical_and, gives=BOOL)(lambda c: multiply(*c.pair()))
rule("Or", fold=np.logical_or, gives=BOOL)(lambda c: Maximum()(*c.pair()))
rule("Xor", fold=np.logical_xor, gives=BOOL)(lambda c: nonzero(_shifted(c, -1.0), whole=True))


@rule("Equal", fold=np.equal, gives=BOOL)
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
            weights = c.constant(f"mask {i}", mask.astype(FLOAT))
            kept.append(multiply(broadcast(weights, shape), broadcast(part, shape)))
        else:
            c.reader.room(shape, folded=True)
            kept.append(
                c.constant(f"choice {i}", np.broadcast_to(np.where(mask, part, np.zeros((), part.dtype)), shape))
            )
    return Value(c.name, dtype, shape, node=add(*kept))


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
