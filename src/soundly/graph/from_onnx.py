"""Reading ONNX models: the second door into soundly, beside PyTorch.

Shape arithmetic is computed while reading, the rest becomes a graph by one short rule per operation (`onnx_ops.py`,
`onnx_shapes.py`, `onnx_layers.py`). Weights stay variables under their names in the file. Every network is compared at
once with onnxruntime run on the file itself; files are untrusted (`onnx_file.py`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soundly.errors import (
    CaptureError,
    CaptureMismatch,
    DynamicModel,
    InvalidInput,
    ModelFileError,
    SoundlyError,
    UnsupportedOp,
)
from soundly.graph import onnx_layers as _layers  # noqa: F401 (with what it imports, it fills RULES)
from soundly.graph import onnx_quantised as _quantised  # noqa: F401 (it does, too)
from soundly.graph.evaluate import Plan
from soundly.graph.linear import Expand, Permute, Reshape
from soundly.graph.network import Network
from soundly.graph.node import Constant, Fill, Input, Leaf, Node, Parameter, Product, Shape
from soundly.graph.onnx_call import RULES, Array, Call, Result, Rule, Value
from soundly.graph.onnx_file import DTYPES, ModelFile, onnx, read_attributes, read_file, read_tensor
from soundly.graph.simplify import rebuild, renamed, simplify

SUPPORTED: tuple[str, ...] = tuple(sorted(RULES))
"""The operations of ONNX that can be read."""

ENTRIES, ALL_ENTRIES, FOLDED, PRODUCTS = 2**28, 2**31, 2**28, 2**38
"""Limits on one value, on all values of a network together, on computed constants, and on multiplications."""


def from_onnx(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
    *,
    example_shapes: Mapping[str, Sequence[int]] | None = None,
    check: bool = True,
) -> Network:
    """Reads an ONNX model as a graph with static shapes.

    Args:
        source: a path (.onnx or .onnx.gz), the bytes of such a file, or a message in memory.
        example_shapes: a shape per input name, needed where the file leaves dimensions open. A leading dimension that
            is open is taken to be 1 if this is not given, and the network's name says so.
        check: compare with onnxruntime, run on the same model, at three random inputs (one if an evaluation takes
            seconds): to 1e-5 of the largest output entry, or to the rounding that float32 shows against float64, at
            most 1e-2; half precision to 2e-2.

    Returns:
        A network whose parameters are the file's float weights by name, and whose places are its tensor names. It
        computes in float64 if the model does, otherwise in float32.

    Raises:
        ModelFileError: the file is broken, hostile, or not ONNX.
        UnsupportedOp: an operation has no rule; the message says which and where.
        DynamicModel: shapes depend on the data, or a dimension is open.
        CaptureMismatch: the graph and onnxruntime disagree.
    """
    file = read_file(source)
    try:
        reader = _Reader(file, example_shapes)
        network = reader.network()
        if check:
            huge = reader.size > 2**28 or reader.products > 2**36
            compare(network, reader.runnable(), file.name, tolerance=reader.tolerance, samples=1 if huge else 3)
        return network
    except SoundlyError:
        raise
    except Exception as error:
        raise ModelFileError(f"{file.name} cannot be read: {type(error).__name__}: {error}.") from error


class _Reader:
    """Walks through a file's operations, keeping a value for every tensor name."""

    def __init__(self, file: ModelFile, example_shapes: Mapping[str, Sequence[int]] | None) -> None:
        self.file, self.model = file, file.model
        graph = self.model.graph
        self.values: dict[str, Value] = {}
        self.tensors: dict[Node, Tensor] = {}
        self.lifted: dict[Value, Node] = {}
        self.origins: dict[Node, str] = {}
        self.varying: set[Node] = set()
        self.assumed: list[str] = []
        self.folded = self.size = self.products = 0
        versions = [o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")]
        self.opset = max(versions, default=1)
        if self.opset < 7:
            raise UnsupportedOp(
                f"{file.name} uses operator set {self.opset}; convert it to 7 or later (onnx.version_converter)."
            )
        if graph.sparse_initializer:
            raise UnsupportedOp(f"{file.name} holds sparse tensors; store them densely.")
        self.live = self._live()
        used = {name for node in self.live for name in node.input} | {o.name for o in graph.output}
        for proto in graph.initializer:
            if proto.name in self.values:
                raise ModelFileError(f"{file.name}: two initialisers are called {proto.name!r}.")
            if proto.name in used:
                array = read_tensor(proto, file)
                self.values[proto.name] = Value(
                    proto.name, array.dtype, array.shape, array, trained=array.dtype.kind == "f"
                )
        inputs = [i for i in graph.input if i.name not in {t.name for t in graph.initializer}]
        names = [i.name for i in inputs]
        unknown = set(example_shapes or ()) - set(names)
        if unknown:
            raise InvalidInput(
                f"example_shapes: {file.name} has no input {', '.join(sorted(unknown))}; it has {', '.join(names)}."
            )
        doubles = {v.dtype for v in self.values.values()} | {
            np.dtype(DTYPES.get(i.type.tensor_type.elem_type, "V")) for i in inputs
        }
        self.dtype = torch.float64 if np.dtype(np.float64) in doubles else torch.float32
        self.inputs = [self._input(i, (example_shapes or {}).get(i.name)) for i in inputs]

    def _live(self) -> list[onnx.NodeProto]:
        """The operations that an output depends on, in the file's order."""
        graph = self.model.graph
        wanted = {o.name for o in graph.output}
        live = []
        for node in reversed(graph.node):
            if any(name in wanted for name in node.output if name):
                live.append(node)
                wanted.update(node.input)
        return live[::-1]

    def _input(self, info: Any, example: Sequence[int] | None) -> Node:
        name, kind = info.name, info.type.tensor_type
        where = f"{self.file.name}: input {name!r}"
        if name in self.values:
            raise ModelFileError(f"{where} is listed twice.")
        dtype = np.dtype(DTYPES.get(kind.elem_type, "V"))
        if dtype.kind != "f":
            raise UnsupportedOp(f"{where} does not hold real numbers (ONNX element type {kind.elem_type}).")
        if not kind.HasField("shape") and example is None:
            raise DynamicModel(f"{where} has no shape; give one: example_shapes={{{name!r}: (...)}}.")
        dims = [
            d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or "?" for d in kind.shape.dim
        ]
        if example is not None:
            fits = not kind.HasField("shape") or (
                len(dims) == len(example)
                and all(isinstance(d, str) or d == e for d, e in zip(dims, example, strict=True))
            )
            if not fits or any(e < 0 for e in example):
                raise InvalidInput(f"example_shapes: {where} has shape {dims}, not {list(example)}.")
            shape = tuple(int(e) for e in example)
        else:
            if any(isinstance(d, str) for d in dims[1:]):
                guess = tuple(d if isinstance(d, int) else 1 for d in dims)
                raise DynamicModel(
                    f"{where} has open dimensions {dims}; fix them, e.g. example_shapes={{{name!r}: {guess}}}."
                )
            self.assumed += [f"{name}: {d} = 1" for d in dims[:1] if isinstance(d, str)]
            shape = tuple(1 if isinstance(d, str) else d for d in dims)
        try:
            node = Input(name, self.room(shape))()
        except ModelFileError as error:
            raise ModelFileError(f"{where}: {error}.") from error
        self.varying.add(node)
        self.values[name] = Value(name, dtype, shape, node=node)
        return node

    # -- what rules ask for

    def room(self, shape: Sequence[int], *, folded: bool = False) -> Shape:
        """The shape, after checking that a value of it may exist."""
        dims = tuple(int(n) for n in shape)
        size = math.prod(dims)
        if any(n < 0 for n in dims) or size > ENTRIES:
            raise ModelFileError(f"a value of shape {list(dims)} is larger than {ENTRIES} entries, or negative")
        if folded:
            self.folded += size
            if self.folded > FOLDED:
                raise ModelFileError(f"the computed constants have more than {FOLDED} entries together")
        return dims

    def lift(self, value: Value) -> Node:
        """A value as a node: its own, a parameter for a weight, otherwise a constant."""
        if value.node is not None:
            return value.node
        if value not in self.lifted:
            assert value.array is not None
            if value.trained:
                node = self.lifted[value] = Parameter(value.name, value.shape)()
                self.tensors[node] = torch.tensor(np.asarray(value.array, order="C")).to(self.dtype)
            else:
                self.lifted[value] = self.constant(value.name, value.array)
        return self.lifted[value]

    def constant(self, name: str, array: Array) -> Node:
        """Fixed numbers as a leaf; one number where all are equal."""
        flat = array.reshape(-1)
        if flat.size and np.isfinite(flat[0]) and bool((flat == flat[0]).all()):
            return Fill(float(flat[0]), array.shape)()
        node = Constant(name, array.shape)()
        self.tensors[node] = torch.tensor(np.ascontiguousarray(array).reshape(array.shape)).to(self.dtype)
        return node

    def known(self, value: Value) -> Array | None:
        """The entries of a value that depends on no input."""
        return value.array if value.array is not None else self.entries(self.lift(value))

    def entries(self, node: Node) -> Array | None:
        """The entries of a node that depends on no input."""
        if node in self.varying:
            return None
        (result,) = Plan([node])(self.tensors, dtype=self.dtype, device=torch.device("cpu"))
        array: Array = result.numpy()
        return array

    # -- the walk

    def network(self) -> Network:
        graph, seen = self.model.graph, set(self.values)
        places: dict[str, Node] = {}
        for proto in self.live:
            origin = f"{proto.name or next(iter(proto.output), '')} ({proto.op_type})"
            for name in (n for n in proto.output if n):
                if name in seen:
                    raise ModelFileError(f"{self.file.name}: {origin} computes {name!r}, which exists already.")
                seen.add(name)
            for name, value in self._call(proto, origin).items():
                self.values[name] = value
                if value.node is not None:
                    places[name] = value.node
        outputs = []
        for info in graph.output:
            if info.name not in self.values:
                raise ModelFileError(f"{self.file.name}: output {info.name!r} is computed by no operation.")
            outputs.append(self.lift(self.values[info.name]))
            places.setdefault(info.name, outputs[-1])
        places |= {node.op.name: node for node in self.inputs if isinstance(node.op, Input)}
        stem = self.file.name
        name = f"{stem} ({', '.join(self.assumed)})" if self.assumed else stem
        network = Network(tuple(self.inputs), tuple(outputs), self.tensors, places, name)

        def located(old: Node, node: Node) -> Node:
            origin = self.origins.get(old, "")
            return node if origin == node.origin else Node(node.op, node.inputs, node.shape, origin)

        network = simplify(renamed(network, rebuild(network.outputs, located)))
        return replace(network, like=torch.empty(0, dtype=self.dtype))

    def _call(self, proto: onnx.NodeProto, origin: str) -> dict[str, Value]:
        """Reads one operation; every failure names the file and the operation."""
        where = f"{self.file.name}: {origin}"
        rule = RULES.get(proto.op_type) if proto.domain in ("", "ai.onnx") else None
        if rule is None:
            op = f"{proto.domain}.{proto.op_type}" if proto.domain else proto.op_type
            raise UnsupportedOp(f"{where}: operation {op} is not supported. Supported: {', '.join(SUPPORTED)}.")
        missing = [name for name in proto.input if name and name not in self.values]
        if missing:
            raise ModelFileError(
                f"{where} needs {missing[0]!r}, which nothing before it computes (missing, or a cycle)."
            )
        operands = tuple(self.values[name] if name else None for name in proto.input)
        try:
            call = Call(
                proto.op_type, next(iter(proto.output), ""), self.opset, operands,
                read_attributes(proto, self.file), len(proto.output), self,
            )  # fmt: skip
            return self._results(proto, rule, call, self._result(rule, call), origin)
        except DynamicModel as error:
            raise DynamicModel(f"{where}: {error}") from error
        except UnsupportedOp as error:
            raise UnsupportedOp(f"{where} is not supported in this form: {error}.") from error
        except SoundlyError as error:
            raise type(error)(f"{where}: {error}.") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
            if self.assumed:
                raise DynamicModel(
                    f"{where}: {reason}. Open dimensions were taken to be 1 ({', '.join(self.assumed)}); "
                    "if they are others, say so with example_shapes."
                ) from error
            raise ModelFileError(f"{where} is malformed: {reason}.") from error

    def _result(self, rule: Rule, call: Call) -> Result:
        arrays = [v.array for v in call.inputs if v is not None and v.array is not None and not v.trained]
        if rule.fold is not None and len(arrays) == len(call.inputs):
            self.room(np.broadcast_shapes(*(a.shape for a in arrays)), folded=True)
            with np.errstate(all="ignore"):
                return np.asarray(rule.fold(*arrays))
        return rule.build(call)

    def _results(self, proto: onnx.NodeProto, rule: Rule, call: Call, result: Result, origin: str) -> dict[str, Value]:
        """The values by tensor name."""
        results = result if isinstance(result, list) else [result]
        dtype = rule.gives or next((v.dtype for v in call.inputs if v is not None), np.dtype(np.float32))
        values: dict[str, Value] = {}
        for i, name in enumerate(proto.output):
            part = results[i] if i < len(results) else None
            if part is None:
                if name and self._used(name):
                    raise UnsupportedOp(f"its output {i} ({name!r}) has no rule")
            elif isinstance(part, Value):
                values[name] = part
            elif isinstance(part, Node):
                values[name] = Value(name, dtype, part.shape, node=part)
            else:
                values[name] = Value(name, part.dtype, part.shape, array=part)
        for value in values.values():
            if value.node is not None:
                self._register(value.node, origin)
        values.pop("", None)
        return values

    def _used(self, name: str) -> bool:
        return any(name in node.input for node in self.live) or any(o.name == name for o in self.model.graph.output)

    def _register(self, result: Node, origin: str) -> None:
        """Notes where the new nodes come from and whether they vary, and that the network stays affordable."""
        stack = [(result, False)]
        while stack:
            node, done = stack.pop()
            if node in self.origins:
                continue
            if not done:
                stack += [(node, True), *((child, False) for child in node.inputs)]
                continue
            self.origins[node] = "" if isinstance(node.op, Leaf) else origin
            if any(child in self.varying for child in node.inputs):
                self.varying.add(node)
            if isinstance(node.op, (Leaf, Expand, Reshape, Permute)):
                continue
            entries = math.prod(node.shape)
            self.size += entries
            if isinstance(node.op, Product):
                self.products += entries * node.op.terms(*(child.shape for child in node.inputs))
            if entries > ENTRIES or self.size > ALL_ENTRIES or self.products > PRODUCTS:
                raise ModelFileError("the network is too large to be evaluated")

    @property
    def tolerance(self) -> float:
        """How closely onnxruntime must agree: it computes in half precision where the file does."""
        return 2e-2 if np.dtype(np.float16) in {v.dtype for v in self.values.values()} else 1e-5

    def runnable(self) -> bytes:
        """The model for onnxruntime: the file itself, without what no output needs and with external data inside."""
        graph = self.model.graph
        external = any(t.data_location for t in graph.initializer)
        if self.file.data is not None and not external and len(self.live) == len(graph.node):
            return self.file.data
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        if len(self.live) != len(graph.node):
            del copy.graph.node[:]
            copy.graph.node.extend(self.live)
        for proto in copy.graph.initializer:
            if proto.data_location and proto.name in self.values:
                array = self.values[proto.name].array
                assert array is not None
                del proto.external_data[:]
                proto.data_location, proto.raw_data = 0, array.tobytes()  # type: ignore[assignment]
        return copy.SerializeToString()


def compare(network: Network, model: bytes, name: str, *, tolerance: float = 1e-5, samples: int = 3) -> float:
    """Compares a network with onnxruntime at random inputs.

    Returns:
        The largest difference, relative to the largest output entry.

    Raises:
        CaptureMismatch: they differ by more than `tolerance` and by more than rounding explains.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise CaptureError(
            f"{name} cannot be compared with onnxruntime, which is missing: pip install 'soundly[onnx]', or pass "
            "check=False."
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    try:
        session = onnxruntime.InferenceSession(
            model,
            options,
            providers=["CPUExecutionProvider"],
            enable_fallback=False,  # which prints
        )
        types = {i.name: np.dtype(_ORT_TYPES[i.type]) for i in session.get_inputs()}
    except Exception as error:
        raise ModelFileError(f"{name} is refused by onnxruntime; check=False reads it unchecked: {error}") from error
    exact = network.to(torch.float64)
    for i in range(samples):
        feed = {}
        for leaf in (node.op for node in network.inputs):
            assert isinstance(leaf, Input)
            feed[leaf.name] = _sample(leaf.dims, i, generator).numpy().astype(types[leaf.name])
        try:
            wanted = session.run(None, feed)
        except Exception as error:
            raise ModelFileError(f"{name}: onnxruntime cannot run the model: {error}") from error
        inputs = [torch.tensor(v.astype(np.float64)) for v in feed.values()]
        with torch.no_grad():
            got = network.evaluate(network.outputs, *(x.to(network.dtype) for x in inputs))
        for k, (g, w) in enumerate(zip(got, wanted, strict=True)):
            want = torch.tensor(np.asarray(w).astype(np.float64))
            what = f"{name}: output {k} at random input {i}"
            if g.shape != want.shape:
                raise CaptureMismatch(f"{what} has shape {tuple(g.shape)}, but onnxruntime gives {tuple(want.shape)}.")
            finite = torch.isfinite(want)
            if not torch.equal(finite, torch.isfinite(g)):
                raise CaptureMismatch(f"{what}: infinite or NaN entries differ from onnxruntime's.")
            if not bool(finite.any()):
                continue
            error_, largest = float((g.double() - want)[finite].abs().max()), float(want[finite].abs().max())
            allowed = tolerance * largest
            if error_ > allowed:
                with torch.no_grad():
                    true = exact.evaluate([network.outputs[k]], *inputs)[0]
                # Rounding of either side, judged by how far our own float32 evaluation lies from the float64 one.
                allowed = min(allowed + 8 * float((g.double() - true)[finite].abs().max()), 1e-2 * largest)
                error_ = min(error_, float((true - want)[finite].abs().max()))
            if not error_ <= allowed:
                raise CaptureMismatch(
                    f"{what} differs from onnxruntime by {error_:.3g} (largest entry {largest:.3g}); nothing may be "
                    "proved with it."
                )
            worst = max(worst, error_ / largest if largest else 0.0)
    return worst


_ORT_TYPES = {"tensor(float)": "f4", "tensor(double)": "f8", "tensor(float16)": "f2"}


def _sample(shape: Shape, i: int, generator: torch.Generator) -> Tensor:
    """Random inputs: normal ones, and every second time some in [0, 1]."""
    draw = torch.rand if i % 2 else torch.randn
    return draw(shape, generator=generator)
