"""What an edit needs of everything before the edited layer: features, and how they move.

The edited layer is the last linear one, y_c = w_c . h(x) + b_c. Then the value, every derivative and every linear
explanation of y_c is w_c . v for a vector v that the frozen part alone decides: the features h, or a directional
derivative D h(z)[d] of them at some place z of the network. Both trunks below answer exactly these two questions, one
from a captured graph, one by running any PyTorch module of any size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from soundly.errors import EditError, InvalidInput
from soundly.graph.differentiate import differentiate
from soundly.graph.linear import Combine, Reshape, Sum, broadcast, reshape
from soundly.graph.network import Network
from soundly.graph.node import Input, Leaf, Node, Shape, dependents, topological
from soundly.graph.product import Dense, multiply
from soundly.graph.simplify import simplify


class Trunk(Protocol):
    """The frozen part of a network before its last linear layer, and that layer's weights.

    Attributes:
        layer: the layer's path in the user's model.
        weight: [classes, K], as stored.
        bias: [classes] or None.
    """

    layer: str
    weight: Tensor
    bias: Tensor | None

    def features(self, x: Tensor) -> Tensor:
        """The layer's input at x, one row per position it is applied to: [positions, K], as float64."""
        ...

    def value(self, x: Tensor, place: str | None) -> Tensor:
        """The value at a place of the network (the input itself for None)."""
        ...

    def tangents(self, x: Tensor, place: str | None, directions: Tensor) -> Tensor:
        """D h[d] for each direction d at a place: [m, *shape] to [m, positions, K], as float64; the shape of a direction
        is that of the place's value, or broadcasts to it."""
        ...


class GraphTrunk:
    """The trunk of a captured network; directional derivatives come from differentiating its graph twice.

    Raises:
        EditError: the layer is not a linear layer, is used more than once, or something other than an addition of
            constants follows it.
    """

    def __init__(self, network: Network, layer: str) -> None:
        self.layer, self.network = layer, network
        weight = network.parameters.get(f"{layer}.weight") or network.parameters.get(layer)
        if weight is None:
            linear = sorted({n.inputs[1].op.name for n in network.nodes if _is_weighted(n)})  # type: ignore[attr-defined]
            raise EditError(
                f"layer={layer!r} has no weight in {network.name}. Linear layers' weights: {', '.join(linear)}."
            )
        users = [n for n in network.nodes if weight in n.inputs]
        if len(users) != 1 or not isinstance(users[0].op, Dense) or users[0].inputs[1] is not weight:
            raise EditError(
                f"layer {layer!r}: its weight must be used once, by a linear layer, not by {users or 'nothing'}. "
                "A tied or shared weight must be untied (cloned) first."
            )
        self._dense = users[0]
        self.bias_node = _head_bias(network, self._dense, layer)
        self.weight = network.values[weight]
        self.bias = None if self.bias_node is None else network.values[self.bias_node]
        # The features are those the deployed network computes, in its own type; half precision is widened.
        self._dtype = torch.promote_types(network.dtype, torch.float32)
        self._features = replace(network.to(self._dtype), outputs=(self._dense.inputs[0],))
        self._last: tuple[Tensor | None, dict[Node, Tensor]] = (None, {})
        self._moves: dict[tuple[str | None, Shape], tuple[Network, Node, Node]] = {}

    def features(self, x: Tensor) -> Tensor:
        return self._at(x, self._dense.inputs[0]).reshape(-1, self.weight.shape[1]).double()

    def value(self, x: Tensor, place: str | None) -> Tensor:
        return self._at(x, self._place(place))

    def _at(self, x: Tensor, node: Node) -> Tensor:
        """A node's value at x, starting from what is known of the last point."""
        if self._last[0] is not x:
            self._last = (x, {})
        known = self._last[1]
        if node not in known:
            with torch.no_grad():
                known[node] = self._features.evaluate([node], x.to(self._dtype), given=known)[0]
        return known[node]

    def _place(self, place: str | None) -> Node:
        return self.network.input if place is None else self.network.at(place)

    def tangents(self, x: Tensor, place: str | None, directions: Tensor) -> Tensor:
        shape = tuple(directions.shape[1:])
        if (place, shape) not in self._moves:
            self._moves[place, shape] = self._move(place, shape)
        network, direction, node = self._moves[place, shape]
        given = {} if place is None else {node: self.value(x, place)}  # nothing before the place is evaluated again

        def moved(d: Tensor) -> Tensor:
            return network.evaluate(network.outputs, x.to(self._dtype), given={**given, direction: d})[0]

        with torch.no_grad():
            size = max(1, 2**24 // max(1, math.prod(node.shape)))
            result: Tensor = torch.vmap(moved, chunk_size=size)(directions.to(self._dtype))
        return result.reshape(len(directions), -1, self.weight.shape[1]).double()

    def _move(self, place: str | None, shape: Shape) -> tuple[Network, Node, Node]:
        """The network d -> D h[d], its direction leaf, and the place in it."""
        node, h = self._place(place), self._dense.inputs[0]
        if h not in dependents(topological([h]), [node]):
            raise EditError(f"layer {self.layer!r} does not depend on {place!r}, so no explanation there involves it.")
        cotangent, direction = Input("cotangent", h.shape)(), Input("direction", shape)()
        try:
            spread = broadcast(direction, node.shape)
        except ValueError as error:
            raise InvalidInput(f"directions of shape {shape} do not fit {place!r}, which has {node.shape}.") from error
        # <c, D h[d]> is linear in c, and its gradient towards c is D h[d].
        (pulled,) = differentiate(h, [node], seed=cotangent)
        paired = reshape(Sum(tuple(range(len(node.shape))))(multiply(pulled, spread)), (1,))
        (moved,) = differentiate(paired, [cotangent])
        network = simplify(replace(self._features, outputs=(moved,), places={"place": node}))
        return network, direction, network.places.get("place", node)


def _is_weighted(node: Node) -> bool:
    return isinstance(node.op, Dense) and hasattr(node.inputs[1].op, "name")


def _head_bias(network: Network, dense: Node, layer: str) -> Node | None:
    """The layer's bias parameter, after checking that only additions of constants and reshapes follow the layer."""
    named = network.parameters.get(f"{layer}.bias")
    varying = dependents(network.nodes, [dense])
    fixed = {n for n in network.nodes} - dependents(network.nodes, network.inputs)
    if network.output not in varying:
        raise EditError(f"layer {layer!r} does not reach the output of {network.name}.")
    bias = None
    for node in network.nodes:
        if node not in varying or node is dense:
            continue
        before = [c for c in node.inputs if c in varying]
        constants = [c for c in node.inputs if c not in varying]
        is_sum = isinstance(node.op, Combine) and node.op.coefficients == (1.0,) * len(node.inputs)
        if len(before) != 1 or not (isinstance(node.op, Reshape) or is_sum) or any(c not in fixed for c in constants):
            raise EditError(
                f"layer {layer!r} is not the last one: {node!r} follows it, so outputs are not affine in it."
            )
        leaves = [n for n in topological(constants) if isinstance(n.op, Leaf)]
        bias = named if named in leaves else bias
        if any(n is not named for n in leaves):
            raise EditError(f"layer {layer!r}: {node!r} adds something other than the layer's own bias to its output.")
    return bias


class ModuleTrunk:
    """The trunk of any nn.Module, run as it is with its weights frozen; directional derivatives are forward-mode.

    Raises:
        EditError: the layer is not an nn.Linear, is tied to another weight, or is not the last operation.
    """

    def __init__(self, module: nn.Module, layer: str) -> None:
        self.layer, self.module = layer, module
        modules = dict(module.named_modules())
        head = modules.get(layer)
        if not isinstance(head, nn.Linear):
            linear = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
            raise EditError(
                f"layer={layer!r} is no nn.Linear of {type(module).__name__}. Those are: {', '.join(linear)}."
            )
        for name, other in module.named_parameters(remove_duplicate=False):
            if other.data_ptr() == head.weight.data_ptr() and name != f"{layer}.weight":
                raise EditError(
                    f"layer {layer!r} is tied to {name!r}: editing it would change the frozen part too. Untie it first "
                    f"(give the layer its own copy of the weight)."
                )
        self._head = head
        self.weight = head.weight.detach()
        self.bias: Tensor | None = None if head.bias is None else head.bias.detach()
        self._modules = modules

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        from soundly.graph.from_torch import evaluation

        attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with evaluation(self.module), attention:
            yield

    def _run(self, x: Tensor, place: str | None = None, put: Tensor | None = None) -> dict[str, Any]:
        """The head's input, its output, the model's output and the value at a place, which `put` replaces."""
        seen: dict[str, Any] = {}

        def head_hook(m: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if "head" in seen:
                raise EditError(f"layer {self.layer!r} is applied more than once in a call.")
            seen["head"], seen["logits"] = args[0], out

        def place_hook(m: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            if not isinstance(out, Tensor) or "place" in seen:
                raise EditError(f"place {place!r} must return one tensor, once per call.")
            seen["place"] = out
            return out if put is None else put

        hooks = [self._head.register_forward_hook(head_hook)]
        if place is not None:
            if place not in self._modules:
                raise InvalidInput(f"{type(self.module).__name__} has no module {place!r}.")
            hooks.append(self._modules[place].register_forward_hook(place_hook))
        try:
            with self._frozen():
                out = self.module(x if place is not None or put is None else put)
        finally:
            for hook in hooks:
                hook.remove()
        tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        logits = seen.get("logits")
        if logits is None or len(tensors) != 1 or tensors[0].numel() != logits.numel():
            raise EditError(f"layer {self.layer!r} does not produce the output of {type(self.module).__name__}.")
        return {**seen, "out": tensors[0]}

    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            seen = self._run(x)
        if not torch.equal(seen["logits"].reshape(-1), seen["out"].reshape(-1)):
            raise EditError(f"layer {self.layer!r} is not the last operation: the output differs from the layer's.")
        features: Tensor = seen["head"].reshape(-1, self.weight.shape[1]).double()
        return features

    def value(self, x: Tensor, place: str | None) -> Tensor:
        if place is None:
            return x
        with torch.no_grad():
            value: Tensor = self._run(x, place)["place"]
        return value

    def tangents(self, x: Tensor, place: str | None, directions: Tensor) -> Tensor:
        here = self.value(x, place)

        def moved(d: Tensor) -> Tensor:
            return torch.func.jvp(lambda z: self._run(x, place, z)["head"], (here,), (d.expand(here.shape),))[1]

        with torch.no_grad():
            size = max(1, 2**26 // max(1, here.numel()))
            try:
                result: Tensor = torch.vmap(moved, chunk_size=size)(directions.to(here.dtype))
            except (NotImplementedError, RuntimeError) as error:
                raise EditError(
                    f"torch has no forward-mode derivative of {type(self.module).__name__} at {place or 'its input'} "
                    f"({error}). Load it as a graph first: soundly.edit(soundly.load(model, example), ...)."
                ) from error
        return result.reshape(len(directions), -1, self.weight.shape[1]).double()


def trunk_of(model: Network | nn.Module, layer: str) -> Trunk:
    """The trunk of a captured network or of any module."""
    if isinstance(model, Network):
        return GraphTrunk(model, layer)
    if isinstance(model, nn.Module):
        return ModuleTrunk(model, layer)
    raise InvalidInput(f"model must be a soundly Network or an nn.Module, not {type(model).__name__}.")
