"""ONNX's linear quantisation, as files of few bits have it: QuantizeLinear and DequantizeLinear.

Stored integers become the weights that they stand for. Values that depend on an input are held as the whole numbers
that an integer tensor would hold: clipped to what its element type can say, and rounded, halves to even.
"""

from __future__ import annotations

import numpy as np

from soundly.graph.composite import Rounding
from soundly.graph.elementwise import clip
from soundly.graph.linear import add, scale
from soundly.graph.node import Fill, Node
from soundly.graph.onnx_call import FLOAT, Array, Call, Value, rule


@rule("QuantizeLinear", known=True)
def _quantise(c: Call) -> Value:
    if c.attr("output_dtype", 0):
        raise c.refuse("an element type that is not that of a zero point")
    held, x = c.array(2).dtype if c.has(2) else np.dtype(np.uint8), _operand(c)
    unit, zero = _steps(c, held, isinstance(x, Node))
    least, most = np.iinfo(held).min, np.iinfo(held).max
    if not isinstance(x, Node):
        found = np.clip(np.rint(x / unit.astype(x.dtype)) + zero, least, most).astype(held)
        return Value(c.name, held, found.shape, array=found)
    whole = Rounding("round")(clip(float(least - zero), float(most - zero))(scale(x, 1 / float(unit))))
    return Value(c.name, held, x.shape, node=_moved(whole, float(zero)))


@rule("DequantizeLinear", known=True)
def _dequantise(c: Call) -> Value:
    x = _operand(c)
    unit, zero = _steps(c, c.value(0).dtype, isinstance(x, Node))
    if isinstance(x, Node):
        return Value(c.name, FLOAT, x.shape, node=scale(_moved(x, -float(zero)), float(unit)))
    real = (x.astype(np.float64) - zero).astype(FLOAT) * unit.astype(FLOAT)
    return Value(c.name, FLOAT, real.shape, array=real.astype(FLOAT))


def _operand(c: Call) -> Array | Node:
    """What is converted: entries, unless it depends on an input."""
    entries = c.reader.known(c.value(0))
    return c.node(0) if entries is None else entries


def _steps(c: Call, held: np.dtype[np.generic], varies: bool) -> tuple[Array, Array]:
    """Scale and zero point, in float64 and of a shape that the operand's is broadcast with."""
    if c.attr("block_size", 0):
        raise c.refuse("quantisation in blocks")
    if held.kind not in "iu":
        raise c.refuse(f"quantisation to {held}")
    unit = c.array(1).astype(np.float64)
    zero = c.array(2).astype(np.float64) if c.has(2) else np.zeros_like(unit)
    if unit.size == 1:
        return unit.reshape(()), zero.reshape(())
    if varies:
        raise c.refuse("a scale for each channel of a value that depends on an input")
    shape = [1] * len(c.shape(0))
    shape[c.axis(len(shape), 1)] = unit.size
    return unit.reshape(shape), zero.reshape(shape)


def _moved(x: Node, by: float) -> Node:
    return add(x, Fill(by, x.shape)()) if by else x
