"""Capture of an nn.Module: torch.export at its highest level, then one small rule per ATen operation.

Only this file and `aten.py` know ATen. What `torch.export` keeps whole (convolutions, norms, softmax, attention) stays
whole; operations without a rule are replaced by torch's own decomposition where there is one (recurrent cells,
einsum). Every capture is compared at once with the module it came from, values and a gradient, in float64.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from soundly.errors import CaptureError, CaptureMismatch, DynamicModel, InvalidInput, UnsupportedOp
from soundly.graph.aten import Masked, Value, op_name, supported
from soundly.graph.aten_layers import RULES
from soundly.graph.differentiate import differentiate
from soundly.graph.network import Network
from soundly.graph.node import Constant, Input, Node, Parameter
from soundly.graph.simplify import simplify


def from_torch(module: nn.Module, example: Tensor | Sequence[Tensor], *, check: bool = True) -> Network:
    """Captures a module in evaluation mode as a graph with exactly the example's shapes.

    Args:
        module: any module that `torch.export` accepts; its training flags are restored afterwards. Weights are shared,
            not copied.
        example: the positional tensor arguments of a call. Floating-point tensors become the network's inputs;
            integer ones (token ids) are frozen at the example's values.
        check: compare the graph with the module in float64: outputs, and the gradient of a random combination of them.

    Returns:
        A network whose parameters carry the module's names and whose places are its module paths.

    Raises:
        DynamicModel: control flow or shapes depend on the data.
        UnsupportedOp: an operation has no rule; the message says where the model uses it.
        CaptureMismatch: the graph and the module disagree.
    """
    examples = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    if not isinstance(module, nn.Module) or not examples or not all(isinstance(e, Tensor) for e in examples):
        raise InvalidInput("from_torch needs an nn.Module and an example: a tensor or a sequence of tensors.")
    with evaluation(module), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = _export(module, examples)
    network, dtype = _lower(program, type(module).__name__, examples)
    network = simplify(network)
    if check:
        compare(network, module, examples)
    return network.to(dtype)


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, every submodule's own flag restored after."""
    flags = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in flags:
            m.training = training


def _export(module: nn.Module, examples: tuple[Tensor, ...]) -> Any:
    try:
        program = torch.export.export(module, examples)
        table = torch.export.default_decompositions()
        missing: set[Any] = set()
        for attempt in range(5):
            calls = [n for n in program.graph.nodes if n.op == "call_function"]
            unknown = {n.target for n in calls if not supported(n.target)}
            new = {target for target in unknown if target in table} - missing
            if not new and not any(_overwrites(n) for n in calls) and (attempt or not unknown):
                break
            # Replaces what has no rule by torch's own decomposition (what is only a name for other calls, such as
            # movedim, always has one), and removes in-place operations.
            missing |= new
            program = program.run_decompositions({op: table[op] for op in missing})
        return program
    except Exception as error:
        kind = type(error).__name__
        text = str(error).strip()
        reason = "\n".join(line for line in text.splitlines() if line.strip())[:2000]
        if (
            "DataDependent" in kind + text
            or "data-dependent" in text.lower()
            or "UserError" in kind
            or "dynamic" in text.lower()
        ):
            raise DynamicModel(
                f"{type(module).__name__}: control flow or shapes depend on the data, which a graph cannot hold "
                f"({kind}: {reason})"
            ) from error
        raise CaptureError(f"torch.export could not capture {type(module).__name__} ({kind}: {reason})") from error


def _overwrites(call: Any) -> bool:
    """Whether a call changes in place a value that anything else may see: not one just made and used only here."""
    schema = getattr(call.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    changed = call.args[0]
    maker = getattr(changed.target, "_schema", None) if changed.op == "call_function" else None
    fresh = maker is not None and all(r.alias_info is None for r in maker.returns)
    return not fresh or len(changed.users) > 1


def _lower(program: Any, name: str, examples: tuple[Tensor, ...]) -> tuple[Network, torch.dtype]:
    """Interprets the exported graph, with nodes for what varies and tensors, in float64, for what is fixed."""
    specs = {s.arg.name: s for s in program.graph_signature.input_specs}
    fixed = {**program.state_dict, **program.constants}
    env: dict[str, Value] = {}
    inputs: list[Node] = []
    values: dict[Node, Tensor] = {}
    places: dict[str, Node] = {}
    remaining = list(examples)
    floating = [t.dtype for t in (*program.state_dict.values(), *examples) if t.is_floating_point()]
    dtype = floating[0] if floating else torch.get_default_dtype()
    mixed = {str(v.dtype) for v in program.state_dict.values() if v.is_floating_point()} - {str(dtype)}
    if mixed:
        raise InvalidInput(
            f"{name} holds weights of several floating types ({dtype}, {', '.join(mixed)}); convert it to one."
        )

    def leaf(tensor: Tensor, label: str) -> Node:
        node = Constant(label, tuple(tensor.shape))()
        values[node] = _wide(tensor.detach())
        return node

    for node in program.graph.nodes:
        if node.op == "placeholder":
            kind = specs[node.name].kind.name
            if kind == "PARAMETER":
                tensor = fixed[specs[node.name].target]
                parameter = Parameter(specs[node.name].target, tuple(tensor.shape))()
                env[node.name], values[parameter] = parameter, tensor.detach()
            elif kind == "USER_INPUT":
                tensor = remaining.pop(0)
                if tensor.is_floating_point():
                    if tensor.dtype != dtype:
                        raise InvalidInput(f"example: {node.name} is {tensor.dtype}, but {name} computes in {dtype}.")
                    env[node.name] = Input(node.name, tuple(tensor.shape))()
                    inputs.append(env[node.name])
                else:
                    env[node.name] = tensor
            elif isinstance(fixed.get(specs[node.name].target), Tensor):
                env[node.name] = _wide(fixed[specs[node.name].target])
            else:
                raise UnsupportedOp(f"{name} uses an operation with side effects, which a graph cannot hold.")
        elif node.op == "call_function":
            origin = _origin(node)
            args = torch.fx.node.map_arg(node.args, lambda n: env[n.name])
            kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: env[n.name])
            value = _call(node.target, args, kwargs, origin, leaf)
            env[node.name] = value
            if isinstance(value, Node):
                for path, _ in (node.meta.get("nn_module_stack") or {}).values():
                    if path:
                        places[path] = value
        elif node.op == "output":
            results = [env[s.arg.name] for s in program.graph_signature.output_specs if s.kind.name == "USER_OUTPUT"]
            if any(isinstance(r, Masked) for r in results):
                raise UnsupportedOp(f"{name}: an output is masked with minus infinity and no softmax follows.")
            if not results or not all(isinstance(r, Node) for r in results):
                raise CaptureError(f"{name}: an output does not depend on the floating-point inputs or weights.")
            return Network(tuple(inputs), tuple(r for r in results if isinstance(r, Node)), values, places, name), dtype
        else:
            raise UnsupportedOp(f"{name} uses a {node.op} node ({node.target}): higher-order operations have no graph.")
    raise CaptureError(f"{name}: the exported program has no output.")


def _call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], origin: str, leaf: Any) -> Value:
    flat = torch.utils._pytree.tree_leaves((args, kwargs))
    if not any(isinstance(a, (Node, Masked)) for a in flat):
        if op_name(target) == "_assert_tensor_metadata":
            return None  # it asserts the model's own types; fixed values are kept in float64 here
        with torch.no_grad():
            value: Value = target(*args, **kwargs)  # nothing varies: compute it now
        return _wide(value) if isinstance(value, Tensor) else value
    rule = RULES.get(op_name(target))
    if rule is None:
        raise UnsupportedOp(
            f"{target} at {origin} is not supported. Supported operations: {', '.join(sorted(RULES))}. "
            "If yours is built from these, write it with them."
        )
    try:
        value = rule(leaf, *args, **kwargs)
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise UnsupportedOp(f"{target} at {origin} is used in a way soundly has no rule for: {error}") from error
    return _with_origin(value, origin)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _with_origin(value: Value, origin: str) -> Value:
    if isinstance(value, Node) and value.inputs and value.origin != origin:
        return Node(value.op, value.inputs, value.shape, origin)
    return value


def _origin(node: Any) -> str:
    """Where the user's model calls it: "layer1.0.conv (model.py:41)"."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    frames = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")
    ]
    frames = [f for f in frames if "torch/nn/" not in f] or frames
    where = ""
    if frames:
        file, line = frames[-1].split('"')[1], frames[-1].split("line ")[1].split(",")[0]
        where = f" ({file.rsplit('/', 1)[-1]}:{line})"
    return f"{(stack[-1] if stack else '') or node.name}{where}"


@torch.enable_grad()
def compare(network: Network, module: nn.Module, examples: Sequence[Tensor], *, tolerance: float = 1e-6) -> None:
    """Compares a captured network with its module in float64 at random inputs: outputs and one gradient.

    Raises:
        CaptureMismatch: they differ by more than `tolerance`, relative to the largest entry.
        InvalidInput: the module's own values are not finite there.
    """
    with evaluation(module):
        reference = copy.deepcopy(module).double()
    doubled = network.to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    inputs: list[Tensor] = []
    for e in examples:
        noise = torch.randn(e.shape, generator=generator, dtype=torch.float64).to(e.device)
        spread = e.double().std(correction=0).item() if e.is_floating_point() and e.numel() > 1 else 1.0
        inputs.append(e.double() + 0.1 * (spread or 1.0) * noise if e.is_floating_point() else e)
    floats = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    expected = reference(*(x.clone() for x in inputs))  # the model may overwrite its input
    wanted = [t for t in torch.utils._pytree.tree_leaves(expected) if isinstance(t, Tensor)]
    seeds = [torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w.device) for w in wanted]
    scalar = sum(((w * s).sum() for w, s in zip(wanted, seeds, strict=True)), torch.zeros((), dtype=torch.float64))
    slopes = torch.autograd.grad(scalar, floats, allow_unused=True) if scalar.requires_grad else [None] * len(floats)

    cotangents = [Input(f"cotangent {i}", node.shape)() for i, node in enumerate(network.outputs)]
    totals: list[Node] = []
    for node, cotangent in zip(network.outputs, cotangents, strict=True):
        totals += differentiate(node, network.inputs, seed=cotangent)
    given = dict(zip(cotangents, seeds, strict=True))
    with torch.no_grad():
        results = doubled.evaluate([*network.outputs, *totals], *(x.detach() for x in floats), given=given)
    n, k = len(network.outputs), len(floats)
    for i, (got, want) in enumerate(zip(results[:n], wanted, strict=True)):
        _agree(got, want.detach(), f"output {i} of {network.name}", tolerance)
    for j, slope in enumerate(slopes):
        got = sum((results[n + i * k + j] for i in range(n)), torch.zeros((), dtype=torch.float64))
        _agree(
            got, torch.zeros_like(floats[j]) if slope is None else slope, f"the gradient of {network.name}", tolerance
        )


def _agree(got: Tensor, want: Tensor, what: str, tolerance: float) -> None:
    if tuple(got.shape) != tuple(want.shape):
        raise CaptureMismatch(f"{what}: the graph gives shape {tuple(got.shape)}, the model {tuple(want.shape)}.")
    if not bool(torch.isfinite(want).all()):
        raise InvalidInput(f"{what}: the model's own is not finite near the example; give one inside its domain.")
    scale = float(want.abs().max()) if want.numel() else 0.0
    error = float((got - want).abs().max()) if want.numel() else 0.0
    if not error <= tolerance * max(scale, 1.0):
        raise CaptureMismatch(
            f"{what}: graph and model differ by {error:.3g} (largest entry {scale:.3g}); "
            "nothing may be proved with this graph."
        )
