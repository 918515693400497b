"""Writing networks as ONNX models that any runtime can run: forward graphs, gradients and explanations alike.

One row per class of operation. Elementwise functions without a name in ONNX, such as derivatives of any order, are
written as what they are: polynomials in a few base functions between break points. Composites without a row of their
own are written as their expansion.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soundly.errors import InvalidInput, MissingRule
from soundly.graph import composite, linear, product
from soundly.graph import elementwise as ew
from soundly.graph import ring as rings
from soundly.graph.elementwise import Elementwise
from soundly.graph.network import Network
from soundly.graph.node import Composite, Constant, Fill, Input, Node, Op, Parameter, topological
from soundly.graph.onnx_file import FILE_BYTES, onnx
from soundly.graph.ring import Polynomial

OPSETS = range(16, 26)
_DTYPES: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


def to_onnx(network: Network, path: str | os.PathLike[str] | None = None, *, opset: int = 18) -> onnx.ModelProto:
    """Writes a network as a standard ONNX model.

    Args:
        network: any network in float32 or float64; onnxruntime has few kernels for convolutions in float64.
        path: where to save it; gzipped if it ends in ".gz". Not saved if None.
        opset: the operator set, 16 or later.

    Returns:
        The model. Parameters are initialisers under their names, and tensors carry the names of the network's places.

    Raises:
        MissingRule: an operation has no counterpart in ONNX.
        InvalidInput: the opset, or the network's floating type, is not supported.
    """
    if opset not in OPSETS:
        raise InvalidInput(f"opset {opset} is not supported; choose one of {OPSETS.start} to {OPSETS.stop - 1}.")
    if network.dtype not in _DTYPES:
        raise InvalidInput(f"{network.name} computes in {network.dtype}; convert it first: network.to(torch.float32).")
    model = _Writer(network, opset).model()
    if path is not None:
        data = model.SerializeToString() if model.ByteSize() < FILE_BYTES else None
        if data is None:
            raise InvalidInput(f"{network.name} has more than {FILE_BYTES} bytes, which one ONNX file cannot hold.")
        Path(path).write_bytes(gzip.compress(data) if str(path).endswith(".gz") else data)
    return model


class _Writer:
    """The operations written so far and the name of every node's value."""

    def __init__(self, network: Network, opset: int) -> None:
        self.network, self.opset = network, opset
        self.dtype = _DTYPES[network.dtype]
        self.operations: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.names: dict[Node, str] = {}
        self.shared: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self.places = {node: name for name, node in reversed(list(network.places.items()))}
        self.taken = {n.op.name for n in (*network.inputs, *network.values) if isinstance(n.op, (Input, Parameter))}

    def model(self) -> onnx.ModelProto:
        network, kind = self.network, onnx.helper.np_dtype_to_tensor_dtype(self.dtype)
        for node in topological(network.outputs):
            self.write(node)
        outputs: list[str] = []
        for i, node in enumerate(network.outputs):
            name = self.names[node]
            if not node.inputs or name in outputs:  # an output must be computed, and only once
                name = self.emit("Identity", name, name=self.fresh(f"output_{i}"))
            outputs.append(name)
        inputs = [
            onnx.helper.make_tensor_value_info(n.op.name, kind, n.shape)
            for n in network.inputs
            if isinstance(n.op, Input)
        ]
        results = [
            onnx.helper.make_tensor_value_info(o, kind, n.shape) for o, n in zip(outputs, network.outputs, strict=True)
        ]
        graph = onnx.helper.make_graph(self.operations, network.name, inputs, results, self.stored)
        versions = [onnx.helper.make_opsetid("", self.opset)]
        return onnx.helper.make_model(graph, opset_imports=versions, producer_name="soundly", ir_version=10)

    def write(self, node: Node) -> str:
        """The name of a node's value; its inputs are written already."""
        if node in self.names:
            return self.names[node]
        row = next((ROWS[c] for c in type(node.op).__mro__ if c in ROWS), None)
        if row is not None:
            before, place = len(self.operations), self.places.get(node, "")
            name = row(self, node, *(self.names[child] for child in node.inputs))
            if len(self.operations) > before and place and place not in self.taken:
                self.operations[-1].output[0] = name = self.fresh(place)
        elif isinstance(node.op, Composite):
            expansion = node.op.expand(*node.inputs)
            for inner in topological([expansion]):
                self.write(inner)
            name = self.names[expansion]
        else:
            raise MissingRule(f"{node!r} cannot be written as ONNX: {type(node.op).__name__} has no row in to_onnx.")
        self.names[node] = name
        return name

    def fresh(self, wanted: str) -> str:
        name, i = wanted, 1
        while name in self.taken:
            name, i = f"{wanted}_{i}", i + 1
        self.taken.add(name)
        return name

    def emit(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Appends an operation; the name of its result."""
        name = name or self.fresh(f"{op.lower()}_{len(self.operations)}")
        self.operations.append(onnx.helper.make_node(op, list(inputs), [name], name=f"{op}:{name}", **attributes))
        return name

    def value(self, leaf: Node) -> np.ndarray[Any, Any]:
        if leaf not in self.network.values:
            raise MissingRule(f"{leaf!r} has no value in {self.network.name}; was it built for another network?")
        array: np.ndarray[Any, Any] = self.network.values[leaf].detach().cpu().contiguous().numpy()
        return array

    def fixed(self, array: np.ndarray[Any, Any], what: str) -> str:
        """A constant, written once. Not an initialiser: those are the weights."""
        key = (str(array.dtype), array.tobytes(), array.shape)
        if key not in self.shared:
            tensor = onnx.numpy_helper.from_array(array)
            self.shared[key] = self.emit("Constant", name=self.fresh(what), value=tensor)
        return self.shared[key]

    def whole(self, numbers: Sequence[int]) -> str:
        return self.fixed(np.array(numbers, np.int64), "numbers")

    def number(self, value: float) -> str:
        return self.fixed(np.array(value, self.dtype), "number")

    def scaled(self, x: str, factor: float) -> str:
        return x if factor == 1 else self.emit("Neg", x) if factor == -1 else self.emit("Mul", x, self.number(factor))

    def sliced(self, x: str, starts: Sequence[int], ends: Sequence[int], steps: Sequence[int]) -> str:
        axes = range(len(starts))
        return self.emit("Slice", x, self.whole(starts), self.whole(ends), self.whole(tuple(axes)), self.whole(steps))

    def reshaped(self, x: str, dims: Sequence[int]) -> str:
        return self.emit("Reshape", x, self.whole(dims), allowzero=int(0 in dims))


Row = Callable[..., str]
ROWS: dict[type[Op], Row] = {}


def _row(*classes: type[Op]) -> Callable[[Row], Row]:
    def enter(row: Row) -> Row:
        ROWS.update(dict.fromkeys(classes, row))
        return row

    return enter


# -- leaves


@_row(Input)
def _input(w: _Writer, node: Node) -> str:
    assert isinstance(node.op, Input)
    return node.op.name


@_row(Parameter)
def _parameter(w: _Writer, node: Node) -> str:
    assert isinstance(node.op, Parameter)
    w.stored.append(onnx.numpy_helper.from_array(w.value(node), node.op.name))
    return node.op.name


@_row(Constant)
def _constant(w: _Writer, node: Node) -> str:
    return w.fixed(w.value(node), w.places.get(node) or "constant")


@_row(Fill)
def _fill(w: _Writer, node: Node) -> str:
    assert isinstance(node.op, Fill)
    if not node.shape:
        return w.number(node.op.value)
    value = onnx.numpy_helper.from_array(np.array([node.op.value], w.dtype))
    return w.emit("ConstantOfShape", w.whole(node.shape), value=value)


# -- structural maps


@_row(linear.Combine)
def _combine(w: _Writer, node: Node, *inputs: str) -> str:
    factors = node.op.coefficients  # type: ignore[attr-defined]
    total = w.scaled(inputs[0], factors[0])
    for factor, x in zip(factors[1:], inputs[1:], strict=True):
        total = w.emit("Sub", total, x) if factor == -1 else w.emit("Add", total, w.scaled(x, factor))
    return w.emit("Identity", total) if total == inputs[0] else total


ROWS |= {
    linear.Sum: lambda w, n, x: w.emit("ReduceSum", x, w.whole(n.op.axes), keepdims=1, noop_with_empty_axes=1),
    linear.Expand: lambda w, n, x: w.emit("Expand", x, w.whole(n.op.dims)),
    linear.Reshape: lambda w, n, x: w.reshaped(x, n.op.dims),
    linear.Permute: lambda w, n, x: (
        w.emit("Transpose", x, perm=list(n.op.axes)) if n.op.axes else w.emit("Identity", x)
    ),
    linear.Concat: lambda w, n, *xs: w.emit("Concat", *xs, axis=n.op.axis),
    linear.Gather: lambda w, n, x: w.emit("Gather", x, w.whole(n.op.index), axis=n.op.axis),
}


@_row(linear.Slice)
def _slice(w: _Writer, node: Node, x: str) -> str:
    op = node.op
    assert isinstance(op, linear.Slice)
    ends = [a + (n - 1) * s + 1 if n else a for a, n, s in zip(op.starts, op.counts, op.steps, strict=True)]
    return w.sliced(x, op.starts, ends, op.steps)


@_row(linear.Embed)
def _embed(w: _Writer, node: Node, x: str) -> str:
    op, shape = node.op, node.inputs[0].shape
    assert isinstance(op, linear.Embed)
    if any(s != 1 for s in op.steps):  # zeros between the entries: one axis more, padded, flattened again
        x = w.reshaped(x, [m for n in shape for m in (n, 1)])
        x = _padded(w, x, [0] * 2 * len(shape), [m for s in op.steps for m in (0, s - 1)])
        x = w.reshaped(x, [n * s for n, s in zip(shape, op.steps, strict=True)])
        shape = tuple((n - 1) * s + 1 if n else 0 for n, s in zip(shape, op.steps, strict=True))
        x = w.sliced(x, [0] * len(shape), shape, [1] * len(shape))
    return _padded(w, x, op.starts, [d - a - n for d, a, n in zip(op.dims, op.starts, shape, strict=True)])


def _padded(w: _Writer, x: str, before: Sequence[int], after: Sequence[int]) -> str:
    return w.emit("Pad", x, w.whole([*before, *after]), w.number(0.0))


@_row(linear.ScatterAdd)
def _scatter_add(w: _Writer, node: Node, x: str) -> str:
    op, n = node.op, len(node.shape)
    assert isinstance(op, linear.ScatterAdd)
    front = [op.axis, *(i for i in range(n) if i != op.axis)]
    rows = w.emit("Transpose", x, perm=front)
    zeros = w.emit("Expand", w.number(0.0), w.whole([node.shape[i] for i in front]))
    index = w.fixed(np.array(op.index, np.int64).reshape(-1, 1), "positions")
    total = w.emit("ScatterND", zeros, index, rows, reduction="add")
    return w.emit("Transpose", total, perm=np.argsort(front).tolist())


# -- products


ROWS |= {
    product.Multiply: lambda w, n, a, b: w.emit("Mul", a, b),
    product.MatMul: lambda w, n, a, b: w.emit("MatMul", a, b),
}


@_row(product.Dense)
def _dense(w: _Writer, node: Node, x: str, weight: str) -> str:
    if len(node.shape) == 2:
        none = w.fixed(np.zeros(node.shape[1], w.dtype), "zeros")  # some readers want a bias, which may be left out
        return w.emit("Gemm", x, weight, none, transB=1)
    return w.emit("MatMul", x, w.emit("Transpose", weight, perm=[1, 0]))


def _window(op: product._Convolution, kernel: Sequence[int]) -> dict[str, Any]:
    return {
        "kernel_shape": list(kernel),
        "strides": list(op.stride),
        "pads": [*op.padding, *op.padding],
        "dilations": list(op.dilation),
        "group": op.groups,
    }


@_row(product.Conv)
def _conv(w: _Writer, node: Node, x: str, weight: str) -> str:
    assert isinstance(node.op, product.Conv)
    return w.emit("Conv", x, weight, **_window(node.op, node.inputs[1].shape[2:]))


@_row(product.ConvTranspose)
def _conv_transpose(w: _Writer, node: Node, y: str, weight: str) -> str:
    op = node.op
    assert isinstance(op, product.ConvTranspose)
    out, kernel = node.inputs[0].shape[2:], node.inputs[1].shape[2:]
    wide = zip(op.size, out, op.stride, op.padding, op.dilation, kernel, strict=True)
    extra = [size - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for size, m, s, p, d, k in wide]
    return w.emit("ConvTranspose", y, weight, output_padding=extra, **_window(op, kernel))


@_row(product.ConvKernel)
def _conv_kernel(w: _Writer, node: Node, x: str, y: str) -> str:
    """A convolution of x with y over positions, where channels and examples have changed places."""
    op, (n, channels, *size), kernel = node.op, node.inputs[0].shape, node.shape[2:]
    assert isinstance(op, product.ConvKernel)
    each, spatial = channels // op.groups, list(range(2, 2 + len(size)))
    x = w.reshaped(x, (n, op.groups, each, *size))
    x = w.reshaped(w.emit("Transpose", x, perm=[2, 1, 0, *(i + 1 for i in spatial)]), (each, op.groups * n, *size))
    y = w.emit("Transpose", y, perm=[1, 0, *spatial])
    exchanged = product.Conv(op.dilation, op.padding, op.stride, op.groups)
    result = w.emit("Conv", x, y, **_window(exchanged, node.inputs[1].shape[2:]))
    result = w.emit("Transpose", result, perm=[1, 0, *spatial])
    return w.sliced(result, [0] * len(node.shape), (node.shape[0], each, *kernel), [1] * len(node.shape))


# -- elementwise functions


_NAMED: dict[Elementwise, str] = {
    ew.RELU: "Relu", ew.ABS: "Abs", ew.ABS.derivative: "Sign", ew.SIGN: "Sign", ew.SIGMOID: "Sigmoid",
    ew.TANH: "Tanh", ew.EXP: "Exp",
    ew.LOG: "Log", ew.SQRT: "Sqrt", ew.RECIPROCAL: "Reciprocal", ew.SIN: "Sin", ew.COS: "Cos", ew.ERF: "Erf",
    ew.ATAN: "Atan", ew.SOFTPLUS: "Softplus", ew.GELU: "Gelu", ew.HARDSWISH: "HardSwish", ew.MISH: "Mish",
}  # fmt: skip
_SINCE = {"Gelu": 20, "Mish": 18}
_SINGLE = ("Gelu", "HardSwish", "Mish")  # onnxruntime has these in float32 only
_IDENTITY: Polynomial = rings.polynomial({(1,): 1})


@_row(Elementwise)
def _elementwise(w: _Writer, node: Node, x: str) -> str:
    op = node.op
    assert isinstance(op, Elementwise)
    name = _NAMED.get(op, "")
    if name and w.opset >= _SINCE.get(name, 0) and (w.dtype == np.float32 or name not in _SINGLE):
        return w.emit(name, x)
    if op == ew.SQUARE:
        return w.emit("Mul", x, x)
    if op == ew.SILU:
        return w.emit("Mul", x, w.emit("Sigmoid", x))
    if op == ew.STEP:
        return w.emit("Cast", w.emit("Greater", x, w.number(0.0)), to=onnx.helper.np_dtype_to_tensor_dtype(w.dtype))
    choices: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = (
        (op.breaks[:1], op.breaks[1:]),
        ((), op.breaks[:1]),
    )
    for lower, upper in choices:
        ends = (*lower, -math.inf)[0], (*upper, math.inf)[0]
        if op.breaks and ends[0] < ends[1] and op == ew.clip(*ends):
            return w.emit("Clip", x, w.number(ends[0]) if lower else "", w.number(ends[1]) if upper else "")
    if op.breaks == (0.0,) and op.pieces[1] == _IDENTITY:
        slope = dict(op.pieces[0]).get((1,), 0.0)
        # Attributes are float32: a slope that is not must be written as a constant.
        if op == ew.leaky_relu(slope) and w.dtype.type(np.float32(slope)) == w.dtype.type(slope):
            return w.emit("LeakyRelu", x, alpha=slope)
    return _pieces(w, op, x, node.shape)


def _pieces(w: _Writer, op: Elementwise, x: str, shape: Sequence[int]) -> str:
    """Each piece at the points clamped to where it belongs, chosen by comparisons with the breaks."""
    ends = (-math.inf, *op.breaks, math.inf)
    parts = []
    for a, b, piece in zip(ends, ends[1:], op.pieces, strict=False):
        inside = x
        if op.ring.rules and (math.isfinite(a) or math.isfinite(b)):
            inside = w.emit("Clip", x, w.number(a) if math.isfinite(a) else "", w.number(b) if math.isfinite(b) else "")
        parts.append(_polynomial(w, op, piece, inside))
    result = parts[0]
    for t, held, part in zip(op.breaks, op._held, parts[1:], strict=True):
        condition = w.emit("GreaterOrEqual" if held == "right" else "Greater", x, w.number(t))
        result = w.emit("Where", condition, part, result)
        if not isinstance(held, str):
            result = w.emit("Where", w.emit("Equal", x, w.number(t)), w.number(held), result)
    constant = not op.breaks and not any(any(e) for e, _ in op.pieces[0])
    return w.emit("Expand", result, w.whole(shape)) if constant else result


def _polynomial(w: _Writer, op: Elementwise, piece: Polynomial, x: str) -> str:
    used = any(any(e[1:]) for e, _ in piece)
    values = [x, *(_bases(w, op, x) if used else ())]
    total = ""
    for exponents, c in piece:
        term = ""
        for value, e in zip(values, exponents, strict=False):
            if e:
                power = value if e == 1 else w.emit("Pow", value, w.number(e))
                term = w.emit("Mul", term, power) if term else power
        term = w.scaled(term, c) if term else w.number(c)
        total = w.emit("Add", total, term) if total else term
    return total or w.number(0.0)


def _bases(w: _Writer, op: Elementwise, x: str) -> list[str]:
    """The base functions of a ring, from their definitions in ring.py."""
    ring = op.ring

    def exp(v: str, rate: float = 1.0) -> str:
        return w.emit("Exp", w.scaled(v, rate))

    def square(v: str) -> str:
        return w.emit("Mul", v, v)

    def inverse(v: str) -> str:
        return w.emit("Reciprocal", v)

    def inner() -> str:  # of the tanh approximation of GELU
        cubic = w.emit("Mul", w.scaled(square(x), 0.044715), x)
        return w.scaled(w.emit("Add", x, cubic), math.sqrt(2 / math.pi))

    def softplus() -> str:
        return w.emit("Softplus", x)

    written: dict[str, Callable[[], list[str]]] = {
        rings.SIGMOID.name: lambda: [w.emit("Sigmoid", x)],
        rings.TANH.name: lambda: [w.emit("Tanh", x)],
        rings.SOFTPLUS.name: lambda: [softplus(), w.emit("Sigmoid", x)],
        rings.TANH_SOFTPLUS.name: lambda: [w.emit("Tanh", softplus()), w.emit("Sigmoid", x)],
        rings.GAUSS.name: lambda: [w.emit("Erf", w.scaled(x, math.sqrt(0.5))), exp(square(x), -0.5)],
        rings.ERF.name: lambda: [w.emit("Erf", x), exp(square(x), -1.0)],
        rings.TANH_GELU.name: lambda: [w.emit("Tanh", inner())],
        rings.CIRCLE.name: lambda: [w.emit("Sin", x), w.emit("Cos", x)],
        rings.ATAN.name: lambda: [w.emit("Atan", x), inverse(w.emit("Add", square(x), w.number(1.0)))],
        rings.LOG.name: lambda: [w.emit("Log", x), inverse(x)],
        rings.SQRT.name: lambda: [root := w.emit("Sqrt", x), inverse(root)],
        rings.RECIPROCAL.name: lambda: [inverse(x)],
    }
    if ring.name in written:
        return written[ring.name]()
    # Families with a parameter, which is the coefficient of the first base's rule.
    rate = ring.rules[0][0][1] if ring.rules and len(ring.rules[0]) == 1 else math.nan
    if ring.name.startswith("exp") and ring.rules == (rings.polynomial({(0, 1): rate}),):
        return [exp(x, rate)]
    if ring == rings.power_ring(rate):
        return [w.emit("Pow", x, w.number(rate)), inverse(x)]
    raise MissingRule(f"{op} cannot be written as ONNX: the base functions {ring.name!r} have no row in to_onnx.")


# -- composites that ONNX knows


@_row(composite.MaxPool)
def _max_pool(w: _Writer, node: Node, x: str) -> str:
    op = node.op
    assert isinstance(op, composite.MaxPool)
    # The padding after the end is spelled out, so that runtimes need not agree on what ceil_mode means.
    wide = zip(node.shape[2:], node.inputs[0].shape[2:], op.kernel, op.stride, op.padding, op.dilation, strict=True)
    after = [max((m - 1) * s + d * (k - 1) + 1 - size - p, 0) for m, size, k, s, p, d in wide]
    window: dict[str, Any] = {
        "kernel_shape": list(op.kernel),
        "strides": list(op.stride),
        "dilations": list(op.dilation),
    }
    return w.emit("MaxPool", x, pads=[*op.padding, *after], **window)


@_row(composite.Softmax)
def _softmax(w: _Writer, node: Node, x: str, mask: str = "") -> str:
    op = node.op
    assert isinstance(op, composite.Softmax)
    if not mask or isinstance(node.inputs[1].op, Fill):
        y = w.emit("Softmax", x, axis=op.axis)
        return w.emit("Mul", y, mask) if mask else y
    kept = w.value(node.inputs[1]) > 0
    some = kept.any(op.axis, keepdims=True)  # rows without any entry are zero afterwards
    bias = np.where(kept | ~some, 0.0, -np.inf).astype(w.dtype)
    y = w.emit("Softmax", w.emit("Add", x, w.fixed(bias, "bias")), axis=op.axis)
    return y if some.all() else w.emit("Mul", y, mask)


@_row(composite.Rounding)
def _rounding(w: _Writer, node: Node, x: str) -> str:
    op = node.op
    assert isinstance(op, composite.Rounding)
    if op.kind == "trunc":
        return w.emit("Mul", w.emit("Sign", x), w.emit("Floor", w.emit("Abs", x)))
    return w.emit(op.kind.capitalize(), x)


ROWS[composite.Maximum] = lambda w, n, a, b: w.emit("Max", a, b)
