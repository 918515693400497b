"""What the user holds: a graph together with the values of its leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.graph.differentiate import differentiate
from soundly.graph.evaluate import Plan
from soundly.graph.linear import Embed, reshape
from soundly.graph.node import Fill, Node, Parameter, Shape, topological


@dataclass(frozen=True, eq=False, repr=False)
class Network:
    """A function of its inputs and parameters, as a graph of operations. Immutable.

    Attributes:
        inputs: the variables, in call order.
        outputs: the results, in order.
        values: a tensor for every parameter and constant; all of one floating dtype and device.
        places: named values of the user's model (module paths or tensor names), for `at`.
        name: the model's name, for messages.
        like: an empty tensor; its floating dtype and device are those of a network that holds no values.
    """

    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    values: Mapping[Node, Tensor]
    places: Mapping[str, Node] = field(default_factory=dict)
    name: str = "network"
    like: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    def __repr__(self) -> str:
        ins, outs = (" and ".join(str(list(n.shape)) for n in nodes) for nodes in (self.inputs, self.outputs))
        weights = sum(math.prod(n.shape) for n in self.parameters.values())
        size = f"{len(self.nodes)} operations, {weights:,} weights"
        return f"<Network {self.name}: {ins} -> {outs}, {size}, {self.dtype}>"

    # -- values

    def __call__(self, *inputs: Tensor) -> Any:
        """The output for inputs of exactly the captured shapes; a tuple if there are several outputs.

        Differentiable by autograd, and mappable by `torch.vmap` over added leading dimensions.
        """
        results = self.evaluate(self.outputs, *inputs)
        return results[0] if len(results) == 1 else results

    def evaluate(
        self, nodes: Sequence[Node], *inputs: Tensor, given: Mapping[Node, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """The values of any nodes of this graph, or of nodes built on top of it.

        Args:
            nodes: what to evaluate.
            inputs: the network's inputs.
            given: values that replace those of leaves or inner nodes.
        """
        if len(inputs) != len(self.inputs):
            raise InvalidInput(f"{self.name} takes {len(self.inputs)} inputs, not {len(inputs)}.")
        for node, value in zip(self.inputs, inputs, strict=True):
            if tuple(value.shape) != node.shape:
                raise InvalidInput(
                    f"input {node.op} has shape {tuple(value.shape)}, but the network was captured for {node.shape}; "
                    "capture it again with an example of the new shape, or use torch.vmap for a batch."
                )
            if value.dtype != self.dtype:
                raise InvalidInput(
                    f"input {node.op} is {value.dtype} but the network computes in {self.dtype}; "
                    f"convert one of them, e.g. network.to({value.dtype})."
                )
        bound = {**self.values, **dict(zip(self.inputs, inputs, strict=True)), **(given or {})}
        key = (tuple(nodes), tuple(given or ()))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = Plan(nodes, stop=given or ())
        return plan(bound, dtype=self.dtype, device=self.device)

    @cached_property
    def _plans(self) -> dict[Any, Plan]:
        return {}

    @property
    def dtype(self) -> torch.dtype:
        """The floating type that the network computes in."""
        return next(iter(self.values.values()), self.like).dtype

    @property
    def device(self) -> torch.device:
        """Where the network's values live."""
        return next(iter(self.values.values()), self.like).device

    def to(self, target: torch.dtype | torch.device | str) -> Network:
        """The same network computing in another floating type or on another device."""
        values = {node: v.to(target) for node, v in self.values.items()}
        return replace(self, values=values, like=self.like.to(target))

    # -- structure

    @property
    def output(self) -> Node:
        """The only output."""
        if len(self.outputs) != 1:
            raise InvalidInput(f"{self.name} has {len(self.outputs)} outputs; choose one of `outputs`.")
        return self.outputs[0]

    @property
    def input(self) -> Node:
        """The only input."""
        if len(self.inputs) != 1:
            raise InvalidInput(f"{self.name} has {len(self.inputs)} inputs; choose one of `inputs`.")
        return self.inputs[0]

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Every node the outputs depend on, inputs first."""
        return tuple(topological(self.outputs))

    @cached_property
    def parameters(self) -> dict[str, Node]:
        """The trained weights by name."""
        leaves = [*self.values, *(n for n in self.nodes if isinstance(n.op, Parameter))]
        return {node.op.name: node for node in leaves if isinstance(node.op, Parameter)}

    def at(self, place: str) -> Node:
        """The value of a module or tensor of the user's model, for Grad-CAM, inner gradients and edits.

        Args:
            place: a module path such as "layer4.1.relu", or a tensor name of an ONNX file.
        """
        if place not in self.places:
            import difflib

            near = difflib.get_close_matches(place, self.places, n=5, cutoff=0.4) or list(self.places)[-5:]
            raise InvalidInput(f"{self.name} has no place {place!r}. Near: {', '.join(near)}.")
        return self.places[place]

    def with_outputs(self, *outputs: Node) -> Network:
        """The network that computes other nodes of this graph (or built on top of it)."""
        return replace(self, outputs=outputs)

    def after(self, first: Network) -> Network:
        """The network that takes the inputs of `first` and computes this one of its output; in this one's type."""
        first = first.to(self.dtype).to(self.device)
        if first.output.shape != self.input.shape:
            raise InvalidInput(
                f"{first.name} computes {first.output.shape}, but {self.name} takes {self.input.shape}; reshape one."
            )
        from soundly.graph.simplify import rebuild, renamed

        new = rebuild(self.outputs, lambda old, node: first.output if old is self.input else node)
        joined = renamed(self, new)
        return replace(joined, inputs=first.inputs, values={**first.values, **joined.values})

    def with_values(self, values: Mapping[str, Tensor]) -> Network:
        """The network with other parameter values, by name."""
        new = dict(self.values)
        for name, value in values.items():
            node = self.parameters.get(name)
            if node is None:
                raise InvalidInput(
                    f"{self.name} has no parameter {name!r}; it has {', '.join(list(self.parameters)[:8])}."
                )
            if tuple(value.shape) != node.shape:
                raise InvalidInput(f"parameter {name!r} has shape {node.shape}, not {tuple(value.shape)}.")
            new[node] = value.to(new[node])
        return replace(self, values=new)

    # -- derivatives

    def entry(self, index: int | Sequence[int], *, of: Node | None = None) -> Node:
        """One number of the output, as a node of shape [1].

        Args:
            index: a position in the flattened output, or one index per axis.
            of: another node to take the entry of.
        """
        node = of or self.output
        flat = _flat_index(index, node.shape)
        from soundly.graph.linear import narrow

        return narrow(reshape(node, (math.prod(node.shape),)), 0, flat, 1)

    def gradient(self, *, of: int | Sequence[int] | Node, wrt: Node | str | None = None) -> Network:
        """The gradient of one output entry as another network of the same inputs.

        Args:
            of: a position in the flattened output (with a batch of one: the class), one index per axis, or any node
                holding a single number.
            wrt: a node, a place or a parameter name; the only input if None.

        Returns:
            A network whose output has the shape of `wrt`.
        """
        target = of if isinstance(of, Node) else self.entry(of)
        if wrt is None:
            wrt = self.input
        elif isinstance(wrt, str):
            wrt = self.parameters[wrt] if wrt in self.parameters else self.at(wrt)
        (result,) = differentiate(target, [wrt])
        from soundly.graph.simplify import simplify

        return simplify(replace(self, outputs=(result,), name=f"gradient of {self.name}"))

    def one_hot(self, index: int | Sequence[int], *, of: Node | None = None) -> Node:
        """A seed for `differentiate`: one at one entry of the output, zero elsewhere."""
        node = of or self.output
        flat = _flat_index(index, node.shape)
        return reshape(Embed((flat,), (1,), (math.prod(node.shape),))(Fill(1.0, (1,))()), node.shape)


def _flat_index(index: int | Sequence[int], shape: Shape) -> int:
    size = math.prod(shape)
    if isinstance(index, int):
        flat = index
    else:
        if len(index) != len(shape) or any(not 0 <= i < n for i, n in zip(index, shape, strict=False)):
            raise InvalidInput(f"index {tuple(index)} does not lie inside an output of shape {shape}.")
        flat = 0
        for i, n in zip(index, shape, strict=True):
            flat = flat * n + i
    if not 0 <= flat < size:
        raise InvalidInput(f"index {index} does not lie inside an output of {size} entries (shape {shape}).")
    return flat
