"""ONNX's operations on 8-bit numbers, as real ones: whole numbers are kept as they are, rounding stays a step.

Nodes hold integers as real numbers, so a quantised network is one with roundings and clips in it; stored integers
become the weights that they stand for. Scales and zero points may be fixed or come from the data, and then from the
whole tensor.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from soundly.graph import elementwise as ew
from soundly.graph.composite import Rounding, maximum_over
from soundly.graph.linear import add, broadcast, reshape, scale, subtract
from soundly.graph.node import Fill, Node
from soundly.graph.onnx_call import FLOAT, Array, Call, Result, Value, rule
from soundly.graph.onnx_file import DTYPES
from soundly.graph.onnx_ops import matrix_product
from soundly.graph.product import multiply

U8, I32 = np.dtype(np.uint8), np.dtype(np.int32)


def _along(c: Call, i: int, rank: int, axis: int) -> Node:
    """A scale or zero point, a number or one per entry of an axis, ready to be broadcast."""
    x = c.node(i)
    if math.prod(x.shape) == 1:
        return reshape(x, (1,) * rank)
    if len(x.shape) != 1:
        raise c.refuse("scales and zero points in blocks")
    return reshape(x, tuple(x.shape[0] if a == axis else 1 for a in range(rank)))


def _stepped(x: Node, inverse: Node, zero: Node | None, dtype: np.dtype[Any]) -> Node:
    """Divided, rounded, shifted and kept within the type's range."""
    y = Rounding("round")(multiply(x, broadcast(inverse, x.shape)))
    y = y if zero is None else add(y, broadcast(zero, x.shape))
    range_ = np.iinfo(dtype)
    return ew.clip(float(range_.min), float(range_.max))(y)


@rule("DynamicQuantizeLinear")
def _dynamic(c: Call) -> Result:
    """Its scale and zero point are those of the whole tensor."""
    x = c.node(0)
    flat = reshape(x, (math.prod(x.shape),))
    high, low = (ew.RELU(maximum_over(v, 0)) for v in (flat, scale(flat, -1)))  # of 0 and x, and of 0 and -x
    unit = scale(add(high, low), 1 / 255)
    inverse = ew.RECIPROCAL(unit)
    zero = Rounding("round")(multiply(low, inverse))
    ones = (1,) * len(x.shape)
    y = _stepped(x, reshape(inverse, ones), reshape(zero, ones), U8)
    parts = ((U8, y), (FLOAT, reshape(unit, ())), (U8, reshape(zero, ())))
    return [Value(c.name, dtype, node.shape, node=node) for dtype, node in parts]


@rule("QuantizeLinear", known=True)
def _quantise(c: Call) -> Value:
    if not _fixed(c):
        return _quantised_by(c)
    if c.attr("output_dtype", 0):
        raise c.refuse("an element type that is not that of a zero point")
    held, x = c.array(2).dtype if c.has(2) else np.dtype(np.uint8), _operand(c)
    unit, zero = _steps(c, held)
    least, most = np.iinfo(held).min, np.iinfo(held).max
    if not isinstance(x, Node):
        found = np.clip(np.rint(x / unit.astype(x.dtype)) + zero, least, most).astype(held)
        return Value(c.name, held, found.shape, array=found)
    whole = Rounding("round")(ew.clip(float(least - zero), float(most - zero))(scale(x, 1 / float(unit))))
    return Value(c.name, held, x.shape, node=_moved(whole, float(zero)))


@rule("DequantizeLinear", known=True)
def _dequantise(c: Call) -> Value:
    if not _fixed(c):
        return _dequantised_by(c)
    x = _operand(c)
    unit, zero = _steps(c, c.value(0).dtype)
    if isinstance(x, Node):
        return Value(c.name, FLOAT, x.shape, node=scale(_moved(x, -float(zero)), float(unit)))
    real = (x.astype(np.float64) - zero).astype(FLOAT) * unit.astype(FLOAT)
    return Value(c.name, FLOAT, real.shape, array=real.astype(FLOAT))


def _quantised_by(c: Call) -> Value:
    """With a scale or zero point that the data decide."""
    x = c.node(0)
    dtype = c.value(2).dtype if c.has(2) else np.dtype(DTYPES.get(c.attr("output_dtype", 0) or 2, "V"))
    if dtype.kind not in "iu":
        raise c.refuse("quantising to a type that is no integer")
    axis = c.axis(len(x.shape), 1) if len(x.shape) > 1 else 0
    zero = _along(c, 2, len(x.shape), axis) if c.has(2) else None
    y = _stepped(x, ew.RECIPROCAL(_along(c, 1, len(x.shape), axis)), zero, dtype)
    return Value(c.name, dtype, x.shape, node=y)


def _dequantised_by(c: Call) -> Value:
    x = c.node(0)
    axis = c.axis(len(x.shape), 1) if len(x.shape) > 1 else 0
    y = x if not c.has(2) else subtract(x, broadcast(_along(c, 2, len(x.shape), axis), x.shape))
    return Value(c.name, FLOAT, x.shape, node=multiply(y, broadcast(_along(c, 1, len(x.shape), axis), x.shape)))


def _fixed(c: Call) -> bool:
    """Whether scale and zero point are known, and one number each unless what they scale is known, too."""
    known = all(c.reader.known(c.value(i)) is not None for i in (1, 2) if c.has(i))
    return known and (c.array(1).size == 1 or c.reader.known(c.value(0)) is not None)


def _operand(c: Call) -> Array | Node:
    """What is converted: entries, unless it depends on an input."""
    entries = c.reader.known(c.value(0))
    return c.node(0) if entries is None else entries


def _steps(c: Call, held: np.dtype[np.generic]) -> tuple[Array, Array]:
    """Scale and zero point, in float64 and of a shape that the operand's is broadcast with."""
    if c.attr("block_size", 0):
        raise c.refuse("quantisation in blocks")
    if held.kind not in "iu":
        raise c.refuse(f"quantisation to {held}")
    unit = c.array(1).astype(np.float64)
    zero = c.array(2).astype(np.float64) if c.has(2) else np.zeros_like(unit)
    if unit.size == 1:
        return unit.reshape(()), zero.reshape(())
    shape = [1] * len(c.shape(0))
    shape[c.axis(len(shape), 1)] = unit.size
    return unit.reshape(shape), zero.reshape(shape)


def _moved(x: Node, by: float) -> Node:
    return add(x, Fill(by, x.shape)()) if by else x


@rule("MatMulInteger")
def _matmul_integer(c: Call) -> Result:
    a, b = c.node(0), c.node(1)
    if c.has(2):
        a = subtract(a, broadcast(_along(c, 2, len(a.shape), len(a.shape) - 2), a.shape))
    if c.has(3):
        b = subtract(b, broadcast(_along(c, 3, len(b.shape), len(b.shape) - 1), b.shape))
    y = matrix_product(c, a, b)
    return Value(c.name, I32, y.shape, node=y)
