"""Reading ONNX: every operation against onnxruntime, in the forms that operator sets 7 to 22 give it."""

import gzip
import math
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from soundly.errors import CaptureError, CaptureMismatch, DynamicModel, InvalidInput, UnsupportedOp
from soundly.graph import Composite, Input, Parameter
from soundly.graph import elementwise as ew
from soundly.graph.composite import Softmax
from soundly.graph.from_onnx import SUPPORTED, compare, from_onnx
from soundly.graph.node import topological
from soundly.graph.onnx_call import RULES, Rule
from soundly.graph.product import Dense

rng = np.random.default_rng(0)
I64 = np.int64


def build(
    nodes: list[Any], inputs: dict[str, Any], constants: dict[str, Any], outputs: list[str], opset: int = 18
) -> Any:
    """A model from (op, inputs, outputs, attributes) rows."""
    rows = [helper.make_node(op, i, o, name=f"n{k}", **a) for k, (op, i, o, a) in enumerate(nodes)]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    infos = [helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in inputs.items()]
    results = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
    graph = helper.make_graph(rows, "small", infos, results, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def one(op: str, *operands: Any, opset: int = 18, outputs: int = 1, **attributes: Any) -> Any:
    """A model of one operation; tuples are the shapes of inputs, arrays are fixed, None is left out."""
    names, inputs, constants = [], {}, {}
    for i, operand in enumerate(operands):
        name = "" if operand is None else f"v{i}"
        names.append(name)
        if isinstance(operand, tuple):
            inputs[name] = operand
        elif operand is not None:
            constants[name] = operand
    results = [f"y{i}" for i in range(outputs)]
    # Casts, so that results of any element type are compared as real numbers.
    casts = [("Cast", [r], [f"z{i}"], {"to": TensorProto.FLOAT}) for i, r in enumerate(results)]
    return build(
        [(op, names, results, attributes), *casts], inputs, constants, [f"z{i}" for i in range(outputs)], opset
    )


def agree(model: Any, *, positive: bool = False, tolerance: float = 1e-5, **options: Any) -> Any:
    """Reads a model and compares it with onnxruntime here, apart from from_onnx's own check."""
    network = from_onnx(model, **options)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    for _ in range(3):
        xs = [rng.normal(size=n.shape).astype(np.float32) * 2 for n in network.inputs]
        xs = [np.abs(x) + 0.1 for x in xs] if positive else xs
        wanted = session.run(None, {n.op.name: x for n, x in zip(network.inputs, xs, strict=True)})
        got = network.evaluate(network.outputs, *(torch.tensor(x) for x in xs))
        for g, want in zip(got, wanted, strict=True):
            assert tuple(g.shape) == want.shape
            if want.size:
                assert np.isfinite(want).all() and np.abs(g.numpy() - want).max() <= tolerance * max(
                    np.abs(want).max(), 1e-6
                )
    return network


def w(*shape: int) -> Any:
    return rng.normal(size=shape).astype(np.float32)


def i(*numbers: int) -> Any:
    return np.array(numbers, I64)


def f(*numbers: float) -> Any:
    return np.array(numbers, np.float32)


U8, I8 = np.uint8, np.int8

CASES: dict[str, Any] = {
    # few bits
    "QuantizeLinear": lambda: one("QuantizeLinear", (2, 3), f(0.03)[0], U8(120)),
    "QuantizeLinear signed": lambda: one("QuantizeLinear", (2, 3), f(0.01)[0], I8(-3)),
    "QuantizeLinear unsaid": lambda: one("QuantizeLinear", (2, 3), f(0.1)[0]),
    "QuantizeLinear known": lambda: build(
        [("QuantizeLinear", ["w", "s", "z"], ["q"], {"axis": 0}), ("Cast", ["q"], ["c"], {"to": TensorProto.FLOAT}),
         ("Add", ["x", "c"], ["y"], {})],
        {"x": (2, 3)}, {"w": w(2, 3), "s": f(0.01, 0.1), "z": np.array([3, -4], I8)}, ["y"],
    ),
    "DequantizeLinear": lambda: build(
        [("QuantizeLinear", ["x", "s", "z"], ["q"], {}), ("DequantizeLinear", ["q", "s", "z"], ["d"], {}),
         ("DequantizeLinear", ["w", "t", "n"], ["v"], {"axis": 0}), ("Gemm", ["d", "v"], ["y"], {"transB": 1})],
        {"x": (2, 3)},
        {"s": f(0.04)[0], "z": U8(100), "w": np.array([[1, -2, 100], [127, -128, 0]], I8), "t": f(0.1, 0.02),
         "n": np.array([0, 5], I8)}, ["y"],
    ),
    "DequantizeLinear unsaid": lambda: build(
        [("DequantizeLinear", ["w", "s"], ["v"], {}), ("Mul", ["x", "v"], ["y"], {})], {"x": (2, 3)},
        {"s": f(0.25)[0], "w": np.array([[1, 2, 255], [7, 0, 9]], U8)}, ["y"],
    ),
    # arithmetic and broadcasting
    "Add": lambda: one("Add", (2, 3), (3,)),
    "Add weight": lambda: one("Add", (2, 3), w(2, 1)),
    "Sub": lambda: one("Sub", (3,), (2, 1)),
    "Mul": lambda: one("Mul", (2, 3), (1,)),
    "Div": lambda: one("Div", w(3), w(2, 3) + 9),
    "Sum": lambda: one("Sum", (2, 3), (3,), w(1, 1)),
    "Mean": lambda: one("Mean", (2, 3), (3,)),
    "Max": lambda: one("Max", (2, 3), (3,), w(2, 1)),
    "Min": lambda: one("Min", (2, 3), (3,)),
    "Pow 3": lambda: one("Pow", (2, 3), f(3)),
    "Pow integer exponent": lambda: one("Pow", (2, 3), np.array(2, I64)),
    "Pow base 2": lambda: build(
        [("Constant", [], ["b"], {"value_float": 2.0}), ("Pow", ["b", "x"], ["y"], {})], {"x": (2, 3)}, {}, ["y"]
    ),
    "Neg": lambda: one("Neg", (2, 3)),
    "Abs": lambda: one("Abs", (2, 3)),
    "Clip": lambda: one("Clip", (2, 3), np.array(-1, np.float32), np.array(0.5, np.float32)),
    "Clip above only": lambda: one("Clip", (2, 3), None, np.array(0.5, np.float32)),
    "Clip opset 7": lambda: one("Clip", (2, 3), min=-0.5, max=1.5, opset=7),
    # functions
    **{op: lambda op=op: one(op, (2, 3)) for op in (
        "Relu Sigmoid Tanh Erf Softplus Sin Cos Tan Atan Exp Sign Softsign HardSigmoid HardSwish LeakyRelu Elu "
        "Selu Celu Mish ThresholdedRelu Shrink Sinh Cosh Floor Ceil Round Identity Reciprocal"
    ).split()},
    "Gelu": lambda: one("Gelu", (2, 3), opset=20),
    "Gelu tanh": lambda: one("Gelu", (2, 3), approximate="tanh", opset=20),
    "PRelu": lambda: one("PRelu", (2, 3, 4), w(3, 1)),
    "LeakyRelu 0.3": lambda: one("LeakyRelu", (2, 3), alpha=0.3),
    "HardSigmoid attributes": lambda: one("HardSigmoid", (2, 3), alpha=0.5, beta=0.6),
    "Shrink biased": lambda: one("Shrink", (2, 9), lambd=1.0, bias=0.5),
    # comparisons
    **{op: lambda op=op: one(op, (4, 5), (5,)) for op in "Greater Less GreaterOrEqual LessOrEqual Equal".split()},
    "Where": lambda: build([("Greater", ["a", "b"], ["c"], {}), ("Where", ["c", "a", "b"], ["y"], {})],
                           {"a": (3, 4), "b": (4,)}, {}, ["y"]),
    "Where fixed": lambda: one("Where", np.array([True, False, True]), (2, 3), w(2, 1)),
    "Where infinite": lambda: build([("Where", ["c", "x", "m"], ["s"], {}), ("Softmax", ["s"], ["y"], {})],
                                    {"x": (2, 3)}, {"c": np.array([True, False, True]), "m": f(-1e9)}, ["y"]),
    "logic": lambda: build(
        [("Greater", ["a", "b"], ["p"], {}), ("Less", ["a", "k"], ["q"], {}), ("Not", ["q"], ["nq"], {}),
         ("And", ["p", "nq"], ["r"], {}), ("Or", ["r", "q"], ["s"], {}), ("Xor", ["s", "p"], ["t"], {}),
         ("Cast", ["t"], ["y"], {"to": 1})], {"a": (5, 5), "b": (5, 5)}, {"k": f(0.3)}, ["y"]),
    "Cast to integers and back": lambda: build(
        [("Cast", ["x"], ["k"], {"to": 7}), ("Equal", ["k", "one"], ["e"], {}), ("Cast", ["e"], ["y"], {"to": 1})],
        {"x": (9, 9)}, {"one": i(1)}, ["y"]),
    "Cast to booleans": lambda: build(
        [("Floor", ["x"], ["k"], {}), ("Cast", ["k"], ["b"], {"to": 9}), ("Cast", ["b"], ["y"], {"to": 1})],
        {"x": (9, 9)}, {}, ["y"]),
    # shapes
    "Reshape": lambda: one("Reshape", (2, 3, 4), i(0, -1)),
    "Flatten": lambda: one("Flatten", (2, 3, 4), axis=2),
    "Flatten negative": lambda: one("Flatten", (2, 3, 4), axis=-1, opset=11),
    "Transpose": lambda: one("Transpose", (2, 3, 4), perm=[2, 0, 1]),
    "Transpose default": lambda: one("Transpose", (2, 3, 4)),
    "Squeeze": lambda: one("Squeeze", (2, 1, 3, 1), i(1, -1)),
    "Squeeze opset 11": lambda: one("Squeeze", (2, 1, 3, 1), axes=[1], opset=11),
    "Squeeze all": lambda: one("Squeeze", (2, 1, 3, 1)),
    "Unsqueeze": lambda: one("Unsqueeze", (2, 3), i(0, -1)),
    "Unsqueeze opset 11": lambda: one("Unsqueeze", (2, 3), axes=[0, 3], opset=11),
    "Slice": lambda: one("Slice", (5, 6), i(1, -5), i(9, -1), i(0, 1), i(2, 1)),
    "Slice backwards": lambda: one("Slice", (5, 6), i(-1), i(-99), i(1), i(-2)),
    "Slice opset 9": lambda: one("Slice", (5, 6), starts=[1], ends=[3], axes=[1], opset=9),
    "Split": lambda: one("Split", (5, 6), i(1, 2, 3), axis=1, outputs=3),
    "Split opset 11": lambda: one("Split", (5, 6), split=[2, 4], axis=1, outputs=2, opset=11),
    "Split uneven": lambda: one("Split", (7, 2), axis=0, num_outputs=3, outputs=3),
    "Concat": lambda: one("Concat", (2, 3), w(2, 1), (2, 2), axis=-1),
    "Gather": lambda: one("Gather", (4, 5), np.array([[0, -1], [2, 2]], I64), axis=1),
    "Gather scalar": lambda: one("Gather", (4, 5), np.array(-2, I64), axis=0),
    "GatherElements": lambda: one("GatherElements", (3, 4), np.array([[0, 1, 2, 0], [2, -1, 0, 1]], I64), axis=0),
    "GatherND": lambda: one("GatherND", (3, 4, 2), np.array([[0, 1], [2, -1]], I64)),
    "ScatterND": lambda: one("ScatterND", (4, 3), np.array([[1], [3]], I64), (2, 3)),
    "ScatterND fixed data": lambda: one("ScatterND", w(4, 3), np.array([[1, 2], [3, 0]], I64), (2,)),
    "ScatterND add": lambda: one("ScatterND", (4, 3), np.array([[1], [1]], I64), (2, 3), reduction="add"),
    "ScatterElements": lambda: one("ScatterElements", (3, 4), np.array([[1, 0, 2, -1]], I64), (1, 4), axis=0),
    "Expand": lambda: one("Expand", (3, 1), i(2, 1, 4)),
    "Tile": lambda: one("Tile", (2, 3), i(2, 3)),
    "Pad": lambda: one("Pad", (2, 3), i(1, 0, 2, -1), np.array(0.5, np.float32)),
    "Pad axes": lambda: one("Pad", (2, 3), i(1, 2), None, i(-1)),
    "Pad opset 9": lambda: one("Pad", (2, 3), pads=[1, 0, 2, 1], value=2.0, opset=9),
    "Pad reflect": lambda: one("Pad", (4, 5), i(2, 0, 1, 3), mode="reflect"),
    "Pad edge": lambda: one("Pad", (4, 5), i(2, 0, 1, 3), mode="edge"),
    "Pad wrap": lambda: one("Pad", (4, 5), i(2, 0, 1, 3), mode="wrap", opset=19),
    "DepthToSpace": lambda: one("DepthToSpace", (1, 8, 2, 3), blocksize=2),
    "DepthToSpace CRD": lambda: one("DepthToSpace", (1, 8, 2, 3), blocksize=2, mode="CRD"),
    "SpaceToDepth": lambda: one("SpaceToDepth", (1, 2, 4, 6), blocksize=2),
    "Trilu": lambda: one("Trilu", (4, 4), np.array(1, I64), upper=0),
    "CumSum": lambda: one("CumSum", (3, 4), np.array(1, np.int32), exclusive=1, reverse=1),
    "Dropout": lambda: one("Dropout", (2, 3)),
    "Dropout opset 7": lambda: one("Dropout", (2, 3), ratio=0.3, opset=7),
    "DynamicQuantizeLinear": lambda: one("DynamicQuantizeLinear", (3, 4), outputs=3),
    "QuantizeLinear without a zero point": lambda: one("QuantizeLinear", (2, 3, 4), f(0.03)),
    "QuantizeLinear signed, shifted": lambda: one("QuantizeLinear", (2, 3), f(0.01), np.asarray(7, np.int8)),
    "QuantizeLinear along an axis": lambda: one(
        "QuantizeLinear", (2, 3, 4), f(0.1, 0.02, 0.3), np.array([3, 200, 0], np.uint8), axis=1),
    "DequantizeLinear along an axis": lambda: build(
        [("QuantizeLinear", ["x", "s", "z"], ["q"], {"axis": -1}),
         ("DequantizeLinear", ["q", "s", "z"], ["y"], {"axis": -1})],
        {"x": (2, 3)}, {"s": f(0.1, 0.02, 0.3), "z": np.array([-3, 0, 100], np.int8)}, ["y"]),
    "DequantizeLinear of a weight": lambda: build(
        [("DequantizeLinear", ["k", "s"], ["w"], {"axis": 0}), ("MatMul", ["x", "w"], ["y"], {})],
        {"x": (2, 3)}, {"k": rng.integers(-128, 128, (3, 4)).astype(np.int8), "s": f(0.1, 0.02, 0.3)}, ["y"]),
    "MatMulInteger": lambda: build(
        [("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], {}), ("MatMulInteger", ["q", "w", "z", "v"], ["k"], {}),
         ("Cast", ["k"], ["f"], {"to": 1}), ("Mul", ["f", "s"], ["y"], {})],
        {"x": (5, 3)}, {"w": rng.integers(0, 100, (3, 4)).astype(np.uint8), "v": np.array([1, 2, 50, 3], np.uint8)},
        ["y"]),
    "MatMulInteger without zero points": lambda: build(
        [("QuantizeLinear", ["x", "s"], ["q"], {}), ("MatMulInteger", ["q", "w"], ["k"], {}),
         ("Cast", ["k"], ["y"], {"to": 1})],
        {"x": (2, 5, 3)}, {"s": f(0.05), "w": rng.integers(-60, 60, (3, 4)).astype(np.int8)}, ["y"]),
    "CastLike": lambda: one("CastLike", (2, 3), w(1)),
    "EyeLike": lambda: build([("Constant", [], ["s"], {"value": numpy_helper.from_array(w(3, 3))}),
                              ("EyeLike", ["s"], ["e"], {"k": 1}), ("MatMul", ["x", "e"], ["y"], {})], {"x": (2, 3)},
        {}, ["y"]),
    # reductions
    **{op: lambda op=op: one(op, (2, 3, 4), axes=[1], opset=11)
       for op in "ReduceSum ReduceMean ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp "
       "ReduceProd".split()},
    "ReduceSum operand": lambda: one("ReduceSum", (2, 3, 4), i(0, -1), keepdims=0),
    "ReduceSum all": lambda: one("ReduceSum", (2, 3, 4)),
    "ReduceSum none": lambda: one("ReduceSum", (2, 3, 4), i(), noop_with_empty_axes=1),
    "ReduceMean operand": lambda: one("ReduceMean", (2, 3, 4), i(1)),
    "ArgMax": lambda: one("ArgMax", (3, 5), axis=1, keepdims=0),
    "ArgMax last": lambda: one("ArgMax", (3, 5), axis=0, select_last_index=1),
    "ArgMin": lambda: one("ArgMin", (3, 5), axis=-1),
    **{f"{op} of Softmax, {how}": lambda op=op, nodes=nodes, axis=axis: build(
        [("Softmax", ["x"], ["p"], {"axis": 2}), *nodes, (op, ["q"], ["k"], {"axis": axis}),
         ("Cast", ["k"], ["y"], {"to": TensorProto.FLOAT})], {"x": (2, 3, 4)}, {"pads": i(0, 0, 1, 0, 0, 0)}, ["y"])
       for op in ("ArgMax", "ArgMin") for how, nodes, axis in (
           ("moved", [("Transpose", ["p"], ["q"], {"perm": [2, 0, 1]})], 0),
           ("turned", [("Neg", ["p"], ["q"], {})], 2), ("across", [("Identity", ["p"], ["q"], {})], 1),
           ("reshaped", [("Flatten", ["p"], ["q"], {"axis": 1})], 1),
           ("padded", [("Pad", ["p", "pads"], ["q"], {})], 2))},
    "OneHot of ArgMax": lambda: build(
        [("ArgMax", ["x"], ["k"], {"axis": 1, "keepdims": 0}), ("OneHot", ["k", "d", "v"], ["y"], {"axis": -1})],
        {"x": (4, 5)}, {"d": i(5), "v": f(-1, 3)}, ["y"]),
    "Hardmax": lambda: one("Hardmax", (3, 5)),
    "Hardmax opset 11": lambda: one("Hardmax", (3, 2, 2), opset=11),
    # products
    "MatMul weight": lambda: one("MatMul", (2, 3), w(3, 4)),
    "MatMul batch": lambda: one("MatMul", (2, 5, 3), (3, 4)),
    "MatMul broadcast": lambda: one("MatMul", (4, 1, 5, 3), (2, 3, 6)),
    "MatMul vector": lambda: one("MatMul", (2, 5, 3), (3,)),
    "MatMul vector first": lambda: one("MatMul", (3,), (2, 3, 4)),
    "MatMul weight first": lambda: one("MatMul", w(4, 3), (2, 3, 5)),
    "Gemm": lambda: one("Gemm", (2, 3), w(4, 3), w(4), transB=1, alpha=0.5, beta=2.0),
    "Gemm transA": lambda: one("Gemm", (3, 2), w(3, 4), w(2, 1), transA=1),
    "Gemm no bias": lambda: one("Gemm", (2, 3), w(3, 4)),
    # convolution
    "Conv": lambda: one("Conv", (1, 4, 7, 8), w(6, 2, 3, 2), w(6), group=2, strides=[2, 1], pads=[1, 0, 1, 0],
        dilations=[1, 2]),
    "Conv one-sided": lambda: one("Conv", (1, 2, 7, 8), w(3, 2, 3, 3), pads=[0, 1, 2, 0]),
    "Conv 1d": lambda: one("Conv", (2, 2, 7), w(3, 2, 3), w(3), pads=[1, 1]),
    "Conv 3d": lambda: one("Conv", (1, 2, 4, 5, 3), w(3, 2, 2, 2, 2)),
    "Conv SAME_UPPER": lambda: one("Conv", (1, 2, 7, 8), w(3, 2, 3, 2), auto_pad="SAME_UPPER", strides=[2, 2]),
    "Conv SAME_LOWER": lambda: one("Conv", (1, 2, 7, 8), w(3, 2, 4, 2), auto_pad="SAME_LOWER"),
    "Conv VALID": lambda: one("Conv", (1, 2, 7, 8), w(3, 2, 3, 2), auto_pad="VALID"),
    "ConvTranspose": lambda: one("ConvTranspose", (1, 4, 4, 5), w(4, 3, 3, 3), w(6), group=2, strides=[2, 3],
        pads=[1, 1, 1, 1],
                                 output_padding=[1, 2]),
    "ConvTranspose one-sided": lambda: one("ConvTranspose", (1, 2, 4, 5), w(2, 3, 3, 3), strides=[2, 2], pads=[0, 1,
        2, 0]),
    "ConvTranspose dilated": lambda: one("ConvTranspose", (1, 2, 4, 5), w(2, 3, 3, 2), dilations=[2, 3]),
    "ConvTranspose output_shape": lambda: one("ConvTranspose", (1, 2, 4, 5), w(2, 3, 3, 3), strides=[2, 2],
        output_shape=[8, 10]),
    "ConvTranspose 1d": lambda: one("ConvTranspose", (1, 2, 4), w(2, 3, 3), strides=[2]),
    # pooling
    "MaxPool": lambda: one("MaxPool", (1, 2, 7, 8), kernel_shape=[3, 2], strides=[2, 2], pads=[1, 1, 1, 1]),
    "MaxPool ceil": lambda: one("MaxPool", (1, 2, 7, 8), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "MaxPool one-sided": lambda: one("MaxPool", (1, 2, 7, 8), kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 2, 0]),
    "MaxPool dilated": lambda: one("MaxPool", (1, 2, 7, 8), kernel_shape=[2, 2], dilations=[3, 2]),
    "MaxPool SAME": lambda: one("MaxPool", (1, 2, 7, 8), kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    "MaxPool 1d": lambda: one("MaxPool", (1, 2, 7), kernel_shape=[3]),
    "AveragePool": lambda: one("AveragePool", (1, 2, 7, 8), kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1]),
    "AveragePool tiles": lambda: one("AveragePool", (1, 2, 7, 8), kernel_shape=[2, 4], strides=[2, 4]),
    "AveragePool include": lambda: one("AveragePool", (1, 2, 7, 8), kernel_shape=[3, 3], pads=[1, 1, 1, 1],
        count_include_pad=1),
    "AveragePool ceil": lambda: one("AveragePool", (1, 2, 7, 8), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1,
        opset=19),
    "AveragePool SAME": lambda: one("AveragePool", (1, 2, 7, 8), kernel_shape=[3, 3], strides=[2, 2],
        auto_pad="SAME_LOWER"),
    "GlobalAveragePool": lambda: one("GlobalAveragePool", (1, 2, 3, 4)),
    "GlobalMaxPool": lambda: one("GlobalMaxPool", (1, 2, 3, 4)),
    # normalisation
    "BatchNormalization": lambda: one("BatchNormalization", (2, 3, 4, 4), w(3), w(3), w(3), np.abs(w(3)) + 0.1,
        epsilon=1e-3),
    "BatchNormalization opset 9": lambda: one("BatchNormalization", (2, 3), w(3), w(3), w(3), np.abs(w(3)) + 0.1,
        opset=9),
    "InstanceNormalization": lambda: one("InstanceNormalization", (2, 3, 4, 4), w(3), w(3)),
    "LayerNormalization": lambda: one("LayerNormalization", (2, 3, 4), w(3, 4), w(3, 4), axis=1),
    "GroupNormalization": lambda: one("GroupNormalization", (2, 6, 4), w(6), w(6), num_groups=3, opset=21),
    "MeanVarianceNormalization": lambda: one("MeanVarianceNormalization", (2, 3, 4, 4)),
    "LpNormalization": lambda: one("LpNormalization", (2, 3), p=2),
    "LpNormalization 1": lambda: one("LpNormalization", (2, 3), p=1, axis=0),
    "LRN": lambda: one("LRN", (1, 7, 3, 3), size=3, alpha=0.3, beta=0.6, bias=1.5),
    "Softmax": lambda: one("Softmax", (2, 3, 4), axis=1),
    "Softmax opset 11": lambda: one("Softmax", (2, 3, 4), axis=1, opset=11),
    "LogSoftmax": lambda: one("LogSoftmax", (2, 3, 4)),
    "Softmax masked": lambda: build([("Add", ["x", "m"], ["s"], {}), ("Softmax", ["s"], ["y"], {})], {"x": (2, 3)},
                                    {"m": f(0, -math.inf, 0.5)}, ["y"]),
    # resampling
    "Resize nearest": lambda: one("Resize", (1, 2, 3, 4), None, f(1, 1, 2, 2.5), mode="nearest"),
    "Resize asymmetric": lambda: one("Resize", (1, 2, 5, 4), None, f(1, 1, 0.6, 2), mode="nearest",
        nearest_mode="floor",
                                     coordinate_transformation_mode="asymmetric"),
    "Resize linear": lambda: one("Resize", (1, 2, 3, 4), None, None, i(1, 2, 5, 7), mode="linear"),
    "Resize corners": lambda: one("Resize", (1, 2, 3, 4), None, None, i(1, 2, 5, 7), mode="linear",
                                  coordinate_transformation_mode="align_corners"),
    "Resize cubic": lambda: one("Resize", (1, 2, 5, 6), None, None, i(1, 2, 8, 9), mode="cubic"),
    "Resize opset 10": lambda: one("Resize", (1, 2, 3, 4), f(1, 1, 2, 2), mode="nearest", opset=10),
    "Upsample": lambda: one("Upsample", (1, 2, 3, 4), f(1, 1, 2, 3), mode="nearest", opset=9),
    "Upsample linear": lambda: one("Upsample", (1, 2, 3, 4), f(1, 1, 2, 3), mode="linear", opset=9),
    # recurrence
    "LSTM": lambda: one("LSTM", (3, 2, 4), w(1, 20, 4), w(1, 20, 5), w(1, 40), None, w(1, 2, 5), w(1, 2, 5),
        hidden_size=5, outputs=3),
    "LSTM both ways": lambda: one("LSTM", (3, 2, 4), w(2, 20, 4), w(2, 20, 5), hidden_size=5, outputs=2,
        direction="bidirectional"),
    "GRU": lambda: one("GRU", (3, 2, 4), w(1, 15, 4), w(1, 15, 5), w(1, 30), hidden_size=5, outputs=2),
    "GRU as in torch": lambda: one("GRU", (3, 2, 4), w(1, 15, 4), w(1, 15, 5), w(1, 30), hidden_size=5, outputs=2,
        linear_before_reset=1),
    "RNN reversed": lambda: one("RNN", (3, 2, 4), w(1, 5, 4), w(1, 5, 5), w(1, 10), hidden_size=5, outputs=2,
        direction="reverse"),
}  # fmt: skip
POSITIVE = {op: lambda op=op: one(op, (2, 3)) for op in ("Log", "Sqrt", "ReduceLogSum")}
POSITIVE["Div"] = lambda: one("Div", (2, 3), (3,))
POSITIVE["Pow 1.5"] = lambda: one("Pow", (2, 3), f(1.5))
POSITIVE["Pow -0.5"] = lambda: one("Pow", (2, 3), f(-0.5))


@pytest.mark.parametrize("case", CASES)
def test_every_operation_agrees_with_onnxruntime(case: str) -> None:
    agree(CASES[case]())


@pytest.mark.parametrize("case", POSITIVE)
def test_functions_of_positive_numbers(case: str) -> None:
    agree(POSITIVE[case](), positive=True)


def test_rms_normalisation_and_swish_by_their_definitions() -> None:
    """onnxruntime has no kernels for these yet."""
    x = torch.randn(2, 3)
    scale = w(3)
    got = from_onnx(one("RMSNormalization", (2, 3), scale, opset=23), check=False)(x)
    assert torch.allclose(got, torch.nn.functional.rms_norm(x, (3,), torch.tensor(scale), 1e-5), atol=1e-6)
    swish = from_onnx(one("Swish", (2, 3), alpha=2.0, opset=24), check=False)(x)
    assert torch.allclose(swish, x * torch.sigmoid(2 * x), atol=1e-6)


def test_every_supported_operation_has_a_case() -> None:
    tested = {n.op_type for table in (CASES, POSITIVE) for case in table.values() for n in case().graph.node}
    arithmetic = {n.op_type for n in shape_arithmetic().graph.node}
    assert set(SUPPORTED) - tested - arithmetic == {"RMSNormalization", "Swish", "Scatter"}


def shape_arithmetic() -> Any:
    """What exporters write for x.reshape(x.size(0), 2, -1), and much else that never reaches the graph."""
    nodes = [
        ("Shape", ["x"], ["s"], {}),
        ("Gather", ["s", "zero"], ["n"], {}),
        ("Unsqueeze", ["n", "axis"], ["n1"], {}),
        ("Constant", [], ["two"], {"value_ints": [2]}),
        ("Constant", [], ["minus"], {"value": numpy_helper.from_array(i(-1))}),
        ("Concat", ["n1", "two", "minus"], ["shape"], {"axis": 0}),
        ("Reshape", ["x", "shape"], ["r"], {}),
        ("Size", ["x"], ["size"], {}),
        ("Div", ["size", "seven"], ["quotient"], {}),
        ("Mod", ["quotient", "three"], ["rest"], {}),
        ("Range", ["zero0", "three", "one"], ["range"], {}),
        ("ConstantOfShape", ["two"], ["zeros"], {}),
        ("NonZero", ["range"], ["places"], {}),
        ("ReduceProd", ["shape2"], ["six"], {"keepdims": 0}),
        ("Cast", ["rest"], ["restf"], {"to": 1}),
        ("Cast", ["six"], ["sixf"], {"to": 1}),
        ("Cast", ["places"], ["placesf"], {"to": 1}),
        ("ReduceSum", ["placesf"], ["total"], {"keepdims": 0}),
        ("ReduceSum", ["zeros"], ["none"], {"keepdims": 0}),
        ("Add", ["restf", "sixf"], ["a"], {}),
        ("Add", ["a", "total"], ["b"], {}),
        ("Add", ["b", "none"], ["c"], {}),
        ("Mul", ["r", "c"], ["y"], {}),
    ]
    fixed = {
        "zero": np.array(0, I64), "zero0": np.array(0, I64), "axis": i(0), "seven": np.array(-7, I64),
        "three": np.array(3, I64),
        "one": np.array(1, I64), "shape2": i(2, 3),
    }  # fmt: skip
    return build(nodes, {"x": (2, 6)}, fixed, ["y"])


def test_shape_arithmetic_never_reaches_the_graph() -> None:
    network = agree(shape_arithmetic())
    assert len(network.nodes) <= 3 and not network.values


def test_weights_are_parameters_and_statistics_are_constants() -> None:
    nodes = [
        ("Conv", ["x", "kernel", "bias"], ["c"], {}),
        ("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"], {}),
        ("Flatten", ["n"], ["flat"], {}),
        ("Gemm", ["flat", "matrix"], ["y"], {}),
    ]
    values = {
        "kernel": w(2, 1, 3, 3),
        "bias": w(2),
        "gamma": w(2),
        "beta": w(2),
        "mean": w(2),
        "var": f(1, 2),
        "matrix": w(8, 3),
    }
    network = agree(build(nodes, {"x": (1, 1, 4, 4)}, values, ["y"]))
    assert set(network.parameters) == {"kernel", "bias", "gamma", "beta", "matrix"}
    assert all(torch.equal(network.values[p], torch.tensor(values[name])) for name, p in network.parameters.items())
    assert {"x", "c", "n", "flat", "y"} <= set(network.places)
    assert network.at("c").origin == "n0 (Conv)"
    assert sum(isinstance(n.op, Dense) for n in network.nodes) == 1


def test_weights_of_constant_nodes_are_constants() -> None:
    nodes = [("Constant", [], ["k"], {"value": numpy_helper.from_array(w(3, 2))}), ("MatMul", ["x", "k"], ["y"], {})]
    assert not agree(build(nodes, {"x": (1, 3)}, {}, ["y"])).parameters


def test_squares_and_gates_keep_their_names() -> None:
    square = agree(build([("Mul", ["x", "x"], ["y"], {})], {"x": (2,)}, {}, ["y"]))
    assert square.output.op == ew.SQUARE
    nodes = [("Sigmoid", ["x"], ["s"], {}), ("Mul", ["s", "x"], ["y"], {})]
    assert agree(build(nodes, {"x": (2,)}, {}, ["y"])).output.op == ew.SILU


def test_open_batch_dimension_is_one_and_says_so() -> None:
    model = one("Relu", ("batch", 3))
    network = from_onnx(model)
    assert network.input.shape == (1, 3) and "batch = 1" in network.name
    assert from_onnx(model, example_shapes={"v0": (5, 3)}).input.shape == (5, 3)


def test_other_open_dimensions_need_an_example() -> None:
    model = one("Relu", ("batch", "width"))
    with pytest.raises(DynamicModel, match="example_shapes"):
        from_onnx(model)
    assert from_onnx(model, example_shapes={"v0": (1, 4)}).input.shape == (1, 4)
    with pytest.raises(InvalidInput, match="no input"):
        from_onnx(model, example_shapes={"other": (1, 4)})
    with pytest.raises(InvalidInput, match="has shape"):
        from_onnx(one("Relu", (2, 3)), example_shapes={"v0": (1, 3)})


def test_a_wrong_guess_of_the_batch_dimension_names_the_remedy() -> None:
    with pytest.raises(DynamicModel, match="example_shapes"):
        from_onnx(one("Reshape", ("batch", 3), i(2, 3)))


def test_operands_that_must_be_fixed() -> None:
    with pytest.raises(DynamicModel, match="must be fixed"):
        from_onnx(one("BatchNormalization", (1, 3), w(3), w(3), w(3), (3,)))


def test_an_unknown_operation_is_named_with_what_is_supported() -> None:
    model = build([("Det", ["x"], ["y"], {})], {"x": (3, 3)}, {}, ["y"])
    with pytest.raises(UnsupportedOp, match=r"n0 \(Det\).*Det is not supported.*Conv"):
        from_onnx(model)


@pytest.mark.parametrize("op", ["Pow", "Mod"])
def test_forms_without_an_exact_counterpart_are_refused(op: str) -> None:
    with pytest.raises(UnsupportedOp, match="not supported in this form"):
        from_onnx(one(op, (2, 3), (2, 3), **({"fmod": 1} if op == "Mod" else {})))


def test_rounding_is_kept_whole() -> None:
    network = from_onnx(one("Floor", (2, 3)))
    assert any(isinstance(n.op, Composite) for n in network.nodes)
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(network.gradient(of=0)(x), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_floating_types(dtype: Any) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    infos = [helper.make_tensor_value_info(n, kind, s) for n, s in (("x", (2, 3)), ("y", (2, 4)))]
    weights = w(3, 4).astype(dtype)
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], [numpy_helper.from_array(weights, "w")])
    network = from_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    assert network.dtype == (torch.float64 if dtype == np.float64 else torch.float32)
    x = torch.randn(2, 3, dtype=network.dtype)
    want = torch.relu(x @ torch.tensor(weights.astype(np.float64)).to(network.dtype))
    assert torch.allclose(network(x), want, rtol=1e-6)


def test_paths_bytes_and_gzip(tmp_path: Any) -> None:
    data = one("Relu", (2, 3)).SerializeToString()
    plain, packed = tmp_path / "m.onnx", tmp_path / "m.onnx.gz"
    plain.write_bytes(data)
    packed.write_bytes(gzip.compress(data))
    x = torch.randn(2, 3)
    for source in (plain, str(plain), packed, data, gzip.compress(data)):
        assert torch.equal(from_onnx(source)(x), torch.relu(x))
    assert from_onnx(packed).name == "m.onnx.gz"


def test_external_data_inside_the_folder(tmp_path: Any) -> None:
    model = one("MatMul", (1, 64), w(64, 64))
    want = from_onnx(model)
    path = tmp_path / "m.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    x = torch.randn(1, 64)
    assert torch.equal(from_onnx(path)(x), want(x))


def test_parts_that_no_output_needs_are_ignored() -> None:
    nodes = [("Det", ["x"], ["d"], {}), ("Relu", ["x"], ["y"], {})]
    assert agree(build(nodes, {"x": (3, 3)}, {}, ["y"]))


@pytest.mark.parametrize("op", ["Relu", "Gemm", "Softmax", "MaxPool"])
def test_a_wrong_rule_is_caught_by_the_check(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted mistakes: the result is off by one part in a thousand, or a NaN appears."""
    model = {
        "Relu": CASES["Relu"],
        "Gemm": CASES["Gemm"],
        "Softmax": CASES["Softmax"],
        "MaxPool": CASES["MaxPool"],
    }[op]()
    rule = RULES[op]
    from soundly.graph.linear import scale

    for factor in (1.001, math.nan):
        wrong = Rule(lambda c, factor=factor: scale(rule.build(c), factor))
        monkeypatch.setitem(RULES, op, wrong)
        with pytest.raises(CaptureMismatch):
            from_onnx(model)


def test_the_check_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(CaptureError, match=r"soundly\[onnx\]"):
        from_onnx(CASES["Relu"]())


def test_the_check_forgives_rounding_only() -> None:
    """A sum that cancels: float32 evaluations differ by much more than 1e-5 of the result, and rightly so."""
    column = np.concatenate([np.full(500, 1e4), np.full(500, -1e4)]).astype(np.float32)[:, None]
    nodes = [("Mul", ["x", "zero"], ["z"], {}), ("Add", ["z", "third"], ["a"], {}), ("MatMul", ["a", "k"], ["y"], {})]
    third = (np.full((1, 1000), 1 / 3) + 3e-3 * np.random.default_rng(0).normal(size=(1, 1000))).astype(np.float32)
    model = build(nodes, {"x": (1, 1000)}, {"zero": f(1e-6), "third": third, "k": column}, ["y"])
    assert 1e-5 < compare(from_onnx(model), model.SerializeToString(), "sum") < 1e-2


def test_inputs_are_named_and_ordered_as_in_the_file() -> None:
    network = agree(one("Sub", (2, 3), (3,)))
    assert [n.op for n in network.inputs] == [Input("v0", (2, 3)), Input("v1", (3,))]
    assert not any(isinstance(n.op, Parameter) for n in network.nodes)


def test_the_largest_share_of_a_softmax_is_that_of_the_largest_score():
    """Where nothing but one softmax is compared it is left out; across several it stays."""
    gone = {how for how in ("moved", "turned", "across", "reshaped", "padded")
            if not any(isinstance(node.op, Softmax) for node in topological(
                from_onnx(CASES[f"ArgMax of Softmax, {how}"]()).outputs))}  # fmt: skip
    assert gone == {"moved", "turned"}


def test_halves_are_rounded_to_even_and_ends_are_kept() -> None:
    network = from_onnx(one("QuantizeLinear", (1, 6), f(0.5)[0], I8(0)), check=False)
    x = torch.tensor([[0.25, 0.75, 1.25, -0.25, 1e6, -1e6]])
    assert network(x).tolist() == [[0, 2, 2, 0, 127, -128]]
