"""Isolation: which inputs an output must not depend on, proved from the structure or refuted by a pair of inputs.

One item of a batch must not see the others; an earlier token not a later one; a decision not a protected feature. Each
is a wall between some input entries and some output entries. What no label crosses (`dependence`) is proved. Where one
may cross, a pair of inputs is sought that agree everywhere else and whose outputs behind the wall differ; both are run
by the original model. Neither found: unknown, and the places that the labels pass are named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from soundly.auditing.crossing import crossings
from soundly.auditing.dependence import dependence, meetings, through
from soundly.bounds.interval import interval_bounds
from soundly.errors import CaptureMismatch, InvalidInput
from soundly.graph.elementwise import Elementwise
from soundly.graph.from_torch import evaluation
from soundly.graph.network import Network
from soundly.graph.node import Node, dependents
from soundly.verification.replay import runtime

SEARCHED = 4
"""At how many walls a pair is sought."""
Model: TypeAlias = nn.Module | str | os.PathLike[str] | None
Answer = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, eq=False)
class Wall:
    """That some outputs do not depend on some inputs.

    Attributes:
        name: what the inputs are, for messages: "item 2".
        of: bool per input [*input]: what must not matter.
        outputs: bool per output [*output]: to what.
    """

    name: str
    of: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Independent:
    """Proved: no labelled input reaches an output behind its wall, on no path through the graph.

    It holds over the real numbers, and in floating point as long as nothing overflows; exact zeros among the weights
    and masks do count as walls. It is a statement about the captured graph, which was compared with the model; the
    model was also run on pairs of random inputs.

    Attributes:
        claim: what is proved, in words.
        operations: how many the labels were carried through.
    """

    claim: str
    operations: int


@dataclass(frozen=True, eq=False)
class Dependent:
    """Refuted: two inputs that agree everywhere but on what must not matter, with different outputs.

    Attributes:
        claim: what is false.
        leak: the name of the inputs that matter.
        first, second: the inputs, one tensor each.
        output: which output differs, and `entry` where.
        entry: a position in it.
        values: the two numbers there, as the original model computes them.
        replayed: by what: "onnxruntime", "module" or "network". Intervals around both evaluations, rounding errors
            included, do not meet either.
        where: the places that the leak passes.
    """

    claim: str
    leak: str
    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    output: int
    entry: tuple[int, ...]
    values: tuple[float, float]
    replayed: str
    where: tuple[str, ...]


@dataclass(frozen=True)
class Undecided:
    """Neither: there are paths, but no pair of inputs was found that shows them.

    Attributes:
        claim: what is neither proved nor refuted.
        leaks: the names of the inputs that may matter.
        where: the places that the first of them passes.
    """

    claim: str
    leaks: tuple[str, ...]
    where: tuple[str, ...]


Isolation: TypeAlias = Independent | Dependent | Undecided


def isolated(network: Network, *, model: Model = None, example: Sequence[Tensor] | None = None) -> Isolation:
    """Each item of a batch is computed from itself alone: output [b, ...] depends on input [b, ...] and on no other.

    Args:
        network: with a batch of two or more as the first dimension of every input and output.
        model: the module or ONNX file that the network was loaded from, to replay a pair of batches. Without one the
            network answers.
        example: inputs of the usual size, around which pairs are sought; zeros if None.

    Reference: within-batch data stealing by architectural backdoors, and the labels that rule it out; see `dependence`.
    """
    sizes = {node.shape[:1] for node in (*network.inputs, *network.outputs)}
    if len(sizes) != 1 or not (batch := next(iter(sizes))) or batch[0] < 2:
        raise InvalidInput(
            f"{network.name} has inputs {[n.shape for n in network.inputs]} and outputs "
            f"{[n.shape for n in network.outputs]}; capture it with a batch of two or more as their first dimension."
        )
    walls = [
        Wall(
            f"item {b}",
            tuple(_at(node, 0, range(b, b + 1)) for node in network.inputs),
            tuple(~_at(node, 0, range(b, b + 1)) for node in network.outputs),
        )
        for b in range(batch[0])
    ]
    claim = "each item of the batch depends on itself alone"
    return decide(network, walls, claim, model=model, example=example, separate=True)


def causal(
    network: Network, *, axis: int = 1, model: Model = None, example: Sequence[Tensor] | None = None
) -> Isolation:
    """No position of a sequence sees a later one: output position t depends on input positions 0 to t.

    Args:
        axis: of the positions, in every input and output.
    """
    nodes = (*network.inputs, *network.outputs)
    sizes = {node.shape[axis] if -len(node.shape) <= axis < len(node.shape) else 0 for node in nodes}
    length = next(iter(sizes))
    if len(sizes) != 1 or length < 2:
        raise InvalidInput(f"axis {axis} has not the same length, of two or more, in every input and output.")
    walls = [
        Wall(
            f"position {t}",
            tuple(_at(node, axis, range(t, t + 1)) for node in network.inputs),
            tuple(_at(node, axis, range(t)) for node in network.outputs),
        )
        for t in range(1, length)
    ]
    return decide(network, walls, f"no position of axis {axis} depends on a later one", model=model, example=example)


def independent(
    network: Network,
    of: Tensor | Sequence[Tensor],
    *,
    outputs: Tensor | Sequence[Tensor] | None = None,
    model: Model = None,
    example: Sequence[Tensor] | None = None,
) -> Isolation:
    """The outputs do not depend on some inputs: a protected feature, a leaked label, a neighbour.

    Args:
        of: bool, of the input's shape (a sequence for several inputs): what must not matter.
        outputs: bool, of the output's shape: to what; everything if None.
    """
    masks = (of,) if isinstance(of, Tensor) else tuple(of)
    if outputs is None:
        outputs = [torch.ones(node.shape, dtype=torch.bool) for node in network.outputs]
    watched = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    count = sum(int(mask.sum()) for mask in masks)
    wall = Wall(f"{count} input entries", masks, watched)
    return decide(network, [wall], f"the outputs do not depend on {count} input entries", model=model, example=example)


def decide(
    network: Network,
    walls: Sequence[Wall],
    claim: str,
    *,
    model: Model = None,
    example: Sequence[Tensor] | None = None,
    separate: bool = False,
) -> Isolation:
    """Whether every wall holds; `claim` says it in words.

    Args:
        separate: whether what is behind different walls should never meet, so that the places where it does tell most.

    Raises:
        InvalidInput: masks or an example that do not fit.
        CaptureMismatch: the model contradicts what the graph proves.
        MissingRule: an operation that does not say what it reads.
    """
    for wall in walls:
        for title, masks, nodes in (("of", wall.of, network.inputs), ("outputs", wall.outputs, network.outputs)):
            if [tuple(m.shape) for m in masks] != [n.shape for n in nodes] or any(m.dtype != torch.bool for m in masks):
                raise InvalidInput(f"{title}: give bool tensors of shapes {[n.shape for n in nodes]}.")
    if example is not None and [tuple(v.shape) for v in example] != [n.shape for n in network.inputs]:
        raise InvalidInput(f"example: give tensors of shapes {[n.shape for n in network.inputs]}.")
    labels = [torch.stack([wall.of[i] for wall in walls]) for i in range(len(network.inputs))]
    reached = dependence(network, labels)
    crossed = [r & torch.stack([wall.outputs[j] for wall in walls]) for j, r in enumerate(reached)]
    leaking = [k for k in range(len(walls)) if any(bool(c[k].any()) for c in crossed)]
    answer, by = _original(network, model)
    if not leaking:
        _contradicted(network, walls, answer, example)
        return Independent(claim, sum(1 for node in network.nodes if node.inputs))
    for k in leaking[:SEARCHED]:
        behind = [c[k] for c in crossed]
        for pair in crossings(network, walls[k].of, behind, example=example):
            shown = _shown(network, pair, behind, answer)
            if shown is not None:
                output, entry, values = shown
                where = _where(network, labels, crossed, k, separate)
                return Dependent(claim, walls[k].name, *pair, output, entry, values, by, where)
    return Undecided(
        claim, tuple(walls[k].name for k in leaking), _where(network, labels, crossed, leaking[0], separate)
    )


def _at(node: Node, axis: int, positions: range) -> Tensor:
    """The entries at some positions of an axis."""
    mask = torch.zeros(node.shape, dtype=torch.bool)
    mask.movedim(axis, 0)[list(positions)] = True
    return mask


def _where(
    network: Network, labels: Sequence[Tensor], crossed: Sequence[Tensor], k: int, separate: bool
) -> tuple[str, ...]:
    """The places at which labels meet that never should; otherwise those on every path behind the k-th wall."""
    nodes = meetings(network, labels) if separate else []
    if not nodes:
        j, entry = next((j, c[k].nonzero()[0].tolist()) for j, c in enumerate(crossed) if bool(c[k].any()))
        nodes = through(network, [v[k : k + 1] for v in labels], j, entry)
    return tuple(dict.fromkeys(_place(network, node) for node in nodes))


def _place(network: Network, node: Node) -> str:
    """What a node does and where; one without an origin belongs to the first that has one and needs it."""
    name = node.op.name if isinstance(node.op, Elementwise) else type(node.op).__name__
    needing = dependents(network.nodes, [node])
    origin = next((n.origin for n in network.nodes if n in needing and n.origin), "")
    return f"{name} at {origin}" if origin else name


# -- pairs


def _original(network: Network, model: Model) -> tuple[Answer, str]:
    """What runs the original model, on inputs in float64: its flat outputs, in float64."""
    if isinstance(model, (str, os.PathLike)):
        session = runtime(Path(model))
        kinds = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
        if session is not None and all(port.type in kinds for port in session.get_inputs()):
            ports = [(port.name, kinds[port.type]) for port in session.get_inputs()]

            def run(x: Sequence[Tensor]) -> Tensor:
                feed = {name: v.numpy().astype(kind) for (name, kind), v in zip(ports, x, strict=True)}
                return _flat([torch.from_numpy(np.asarray(y)) for y in session.run(None, feed)])

            return run, "onnxruntime"
    if isinstance(model, nn.Module):
        module = model

        def call(x: Sequence[Tensor]) -> Tensor:
            with evaluation(module), torch.no_grad():
                found = module(*(v.to(network.device, network.dtype) for v in x))
            return _flat([y for y in torch.utils._pytree.tree_leaves(found) if isinstance(y, Tensor)])

        return call, "module"

    def evaluate(x: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return _flat(network.evaluate(network.outputs, *(v.to(network.device, network.dtype) for v in x)))

    return evaluate, "network"


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([v.detach().cpu().double().reshape(-1) for v in values])


def _shown(
    network: Network, pair: Sequence[Sequence[Tensor]], crossed: Sequence[Tensor], answer: Answer
) -> tuple[int, tuple[int, ...], tuple[float, float]] | None:
    """Where the outputs of a pair differ beyond all rounding, in the real numbers and in the original model."""
    wide = network.to(torch.float64)
    ranges = []
    for x in pair:
        region = {node: (v, v) for node, v in zip(wide.inputs, x, strict=True)}
        found = interval_bounds(wide, region, wide.outputs)
        ranges.append(
            [torch.cat([getattr(found[n], end).reshape(-1) for n in wide.outputs]) for end in ("lower", "upper")]
        )
    (low, high), (lower, upper) = ranges
    apart = ((high < lower) | (upper < low)).cpu() & torch.cat([c.reshape(-1) for c in crossed])
    a, b = (answer(x) for x in pair)
    rounding = 16 * torch.finfo(network.dtype).eps * (1 + torch.maximum(a.abs(), b.abs()).max())
    gap = torch.where(apart, (a - b).abs(), torch.zeros_like(a))
    k = int(gap.argmax())
    if not bool(torch.isfinite(gap[k]) & (gap[k] > rounding)):
        return None
    values = float(a[k]), float(b[k])
    for j, node in enumerate(network.outputs):
        if k < (size := int(np.prod(node.shape))):
            return j, tuple(int(i) for i in np.unravel_index(k, node.shape)), values
        k -= size
    raise AssertionError("an entry beyond all outputs")


def _contradicted(network: Network, walls: Sequence[Wall], answer: Answer, example: Sequence[Tensor] | None) -> None:
    """Refuses a proof that the model itself denies on a pair of random inputs."""
    generator = torch.Generator().manual_seed(0)
    base = [torch.zeros(n.shape) for n in network.inputs] if example is None else example
    x = [v.double() + torch.randn(v.shape, generator=generator) for v in base]
    before = answer(x)
    for wall in walls:
        moved = [torch.where(m, torch.randn(v.shape, generator=generator), v) for m, v in zip(wall.of, x, strict=True)]
        watched = torch.cat([mask.reshape(-1) for mask in wall.outputs])
        gap = (answer(moved) - before)[watched].abs()
        if bool((gap > 1e-3 * (1 + before.abs().max())).any()):
            raise CaptureMismatch(
                f"{network.name}: by its graph the outputs do not depend on {wall.name}, but the model's change by "
                f"{float(gap.max()):.3g}; nothing may be proved with this graph."
            )
