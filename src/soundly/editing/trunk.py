"""What an edit needs of everything before the edited layer: features, and how they move.

The edited layer is the last linear one, y_c = w_c . h(x) + b_c. Then the value, every derivative and every linear
explanation of y_c is w_c . v for a vector v that the frozen part alone decides: the features h, or a directional
derivative D h(z)[d] of them at some place z of the network. Both trunks below answer exactly these two questions, one
from a captured graph, one by running any PyTorch module of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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

    def tangents(self, x: Tensor, place: str | None, *along: Tensor) -> Tensor:
        """D h[d] for each direction d at a place: [m, *shape] to [m, positions, K], as float64.

        Given several tensors of directions, D^2 h[d, e] and so on, row by row. The shape of a direction is that of the
        place's value, or broadcasts to it.
        """
        ...

    def tangents_along(self, path: Tensor, directions: Tensor) -> Tensor:
        """D h(x)[d] at several inputs x, [s, *shape], for each direction d, [m, *shape]: [s, m, positions, K]."""
        ...


class NotLast(EditError):
    """The layer is a layer, but not a last linear one with a bias of its own name: it can be edited from inside."""


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
        if len(users) == 1 and not isinstance(users[0].op, Dense):
            raise NotLast(f"layer {layer!r} is not a linear layer but {users[0].op}.")
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
        self._moves: dict[tuple[str | None, tuple[Shape, ...]], tuple[Network, list[Node], Node]] = {}

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

    def tangents(self, x: Tensor, place: str | None, *along: Tensor) -> Tensor:
        shapes = tuple(tuple(directions.shape[1:]) for directions in along)
        if (place, shapes) not in self._moves:
            self._moves[place, shapes] = self._move(place, shapes)
        network, leaves, node = self._moves[place, shapes]
        given = {} if place is None else {node: self.value(x, place)}  # nothing before the place is evaluated again

        def moved(*directions: Tensor) -> Tensor:
            chosen = dict(zip(leaves, directions, strict=True))
            return network.evaluate(network.outputs, x.to(self._dtype), given={**given, **chosen})[0]

        with torch.no_grad():
            size = max(1, 2**24 // max(1, math.prod(node.shape)))
            result: Tensor = torch.vmap(moved, chunk_size=size)(*(directions.to(self._dtype) for directions in along))
        return result.reshape(len(along[0]), -1, self.weight.shape[1]).double()

    def tangents_along(self, path: Tensor, directions: Tensor) -> Tensor:
        return torch.stack([self.tangents(x, None, directions) for x in path])

    def _move(self, place: str | None, shapes: Sequence[Shape]) -> tuple[Network, list[Node], Node]:
        """The network d, e, ... -> D^n h[d, e, ...], the leaves of its directions, and the place in it."""
        node, h = self._place(place), self._dense.inputs[0]
        if h not in dependents(topological([h]), [node]):
            raise EditError(f"layer {self.layer!r} does not depend on {place!r}, so no explanation there involves it.")
        moved, leaves = h, []
        for i, shape in enumerate(shapes):
            cotangent, direction = Input(f"cotangent {i}", h.shape)(), Input(f"direction {i}", shape)()
            leaves.append(direction)
            try:
                spread = broadcast(direction, node.shape)
            except ValueError as error:
                raise InvalidInput(
                    f"directions of shape {shape} do not fit {place!r}, which has {node.shape}."
                ) from error
            # <c, D h[d]> is linear in c, and its gradient towards c is D h[d].
            (pulled,) = differentiate(moved, [node], seed=cotangent)
            paired = reshape(Sum(tuple(range(len(node.shape))))(multiply(pulled, spread)), (1,))
            (moved,) = differentiate(paired, [cotangent])
        network = simplify(replace(self._features, outputs=(moved,), places={"place": node}))
        return network, leaves, network.places.get("place", node)


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
            raise NotLast(f"layer {layer!r} is not the last one: {node!r} follows it, so outputs are not affine in it.")
        for constant in constants:
            if named is None or bias is not None or not _repeats(network, constant, named):
                raise NotLast(
                    f"layer {layer!r}: {node!r} adds something other than the layer's own bias, once, to its output."
                )
            bias = named
    if bias in topological([dense]):
        raise EditError(f"layer {layer!r}: what is before it uses its bias {bias!r} too. Untie (clone) it first.")
    return bias


def _repeats(network: Network, constant: Node, bias: Node) -> bool:
    """Whether a node of constants is the bias itself, once per position of the layer; tried with two signed values."""
    if {n for n in topological([constant]) if isinstance(n.op, Leaf)} != {bias}:
        return False
    probe = (torch.arange(math.prod(bias.shape)) + 1.0).to(network.dtype)
    alone = replace(network, inputs=(), outputs=(constant,))
    return all(
        torch.equal(found := alone.evaluate([constant], given={bias: b})[0].reshape(-1, len(b)), b.expand_as(found))
        for b in (probe, -probe)
    )


class ModuleTrunk:
    """The trunk of any nn.Module, run as it is with its weights frozen; directional derivatives are forward-mode.

    Weights and inputs of half precision are widened to float32: the features are those of the stored weights, nearly
    exact, not those that arithmetic in half precision makes of them.

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
        if type(head).forward is not nn.Linear.forward or "weight" not in head._parameters or head._forward_hooks:
            raise EditError(
                f"layer {layer!r} computes more than weight @ h + bias of its own parameters (a subclass, a "
                "parametrization such as weight_norm, or a forward hook). Make it a plain nn.Linear first."
            )
        for own, mine in head.named_parameters():
            for name, other in (*module.named_parameters(remove_duplicate=False), *module.named_buffers()):
                if name != f"{layer}.{own}".removeprefix(".") and _overlap(mine, other):
                    raise EditError(
                        f"layer {layer!r} is tied: its {own} shares memory with {name!r}, so that editing it would "
                        f"change the frozen part too. Untie it first (give the layer its own copy)."
                    )
        self._head = head
        self.weight = head.weight.detach()
        self.bias: Tensor | None = None if head.bias is None else head.bias.detach()
        self._modules = modules
        stored = (*module.named_parameters(), *module.named_buffers())
        self._widened = {name: _wide(t.detach()) for name, t in stored if _wide(t) is not t}
        self.tried: Tensor | None = None

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        from soundly.graph.from_torch import evaluation

        attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with evaluation(self.module), attention:
            yield

    def _run(
        self, x: Tensor, place: str | None = None, put: Tensor | None = None, weights: dict[str, Tensor] | None = None,
        *, to_head: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """The head's input, its output, the model's output and the value at a place, which `put` replaces; only the
        head's input, and nothing behind it is computed, if `to_head`."""
        seen: dict[str, Any] = {}

        def reached(m: nn.Module, args: tuple[Any, ...]) -> None:
            seen["head"] = args[0].clone()
            raise _Reached

        def head_hook(m: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if "head" in seen:
                raise EditError(f"layer {self.layer!r} is applied more than once in a call.")
            if len(args) != 1:
                raise EditError(f"layer {self.layer!r} must be called with its input alone, by position.")
            seen["head"], seen["logits"] = args[0].clone(), out.clone()  # what follows may write into them

        def place_hook(m: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            if not isinstance(out, Tensor) or "place" in seen:
                raise EditError(f"place {place!r} must return one tensor, once per call.")
            if "head" in seen:
                raise EditError(f"layer {self.layer!r} does not depend on {place!r}, which comes after it.")
            seen["place"] = out.clone()
            return out if put is None else put

        if place is not None and place not in self._modules:
            raise InvalidInput(f"{type(self.module).__name__} has no module {place!r}.")
        head = self._head
        hooks = [head.register_forward_pre_hook(reached) if to_head else head.register_forward_hook(head_hook)]
        if place is not None:
            hooks.append(self._modules[place].register_forward_hook(place_hook))
        try:
            with self._frozen():
                given = _wide(x if place is not None or put is None else put)
                state = {**self._widened, **(weights or {})}
                out = torch.func.functional_call(self.module, state, (given.clone(),))  # it may overwrite it
        except _Reached:
            return seen
        except RuntimeError as error:
            if not self._widened or "dtype" not in str(error):
                raise
            raise EditError(
                f"{type(self.module).__name__} holds weights of half precision and could not be run with them widened "
                f"({error}). Convert it first: module.float()."
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if place is not None and "place" not in seen:
            raise InvalidInput(f"place {place!r} takes no part in a call of {type(self.module).__name__}.")
        tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        logits = seen.get("logits")
        if logits is None or len(tensors) != 1 or tensors[0].numel() != logits.numel():
            raise EditError(f"layer {self.layer!r} does not produce the output of {type(self.module).__name__}.")
        return {**seen, "out": tensors[0]}

    def try_other_weights(self, x: Tensor) -> None:
        """That the layer is last and its weights are used nowhere else, tried once with other weights in their place:
        features must not move, and output and layer's output must agree (also far away, where a clamp would act)."""
        if self.tried is not None:
            return
        with torch.no_grad():
            features = self._run(x)["head"]
            if not bool(torch.isfinite(features).all()):
                raise InvalidInput("the features at a point are not finite.")
            for scale in (1.0, -1.0, 1e4, -1e4):
                draw = torch.Generator().manual_seed(0)
                weights = {
                    f"{self.layer}.{name}".removeprefix("."): _wide(
                        (scale * torch.randn(p.shape, generator=draw)).to(p)
                    )
                    for name, p in self._head.named_parameters()
                }
                seen = self._run(x, weights=weights)
                if not torch.equal(seen["head"], features):
                    raise EditError(
                        f"what is before layer {self.layer!r} is random or uses its weights too. Untie (clone) them."
                    )
                if not torch.equal(seen["logits"].double().reshape(-1), seen["out"].double().reshape(-1)):
                    raise EditError(
                        f"layer {self.layer!r} is not the last operation: the output differs from its own. Capture the "
                        "model with soundly.load to edit layers before the last."
                    )
        self.tried = x

    def features(self, x: Tensor) -> Tensor:
        self.try_other_weights(x)
        with torch.no_grad():
            seen = self._run(x)
        features: Tensor = seen["head"].reshape(-1, self.weight.shape[1]).double()
        return features

    def value(self, x: Tensor, place: str | None) -> Tensor:
        if place is None:
            return _wide(x)
        with torch.no_grad():
            value: Tensor = self._run(x, place)["place"]
        return value

    def tangents(self, x: Tensor, place: str | None, *along: Tensor) -> Tensor:
        self.try_other_weights(x)
        return self._moved(x, place, self.value(x, place)[None], along)[0]

    def tangents_along(self, path: Tensor, directions: Tensor) -> Tensor:
        self.try_other_weights(path[0])
        return self._moved(path[0], None, path, (directions,))

    def _moved(self, x: Tensor, place: str | None, values: Tensor, along: tuple[Tensor, ...]) -> Tensor:
        """[s, m, positions, K]: how features move with each of several values at a place, in each direction."""
        shape, count = values.shape[1:], len(along[0])
        for directions in along:
            try:
                values.new_empty(directions.shape[1:]).expand(shape)
            except RuntimeError as error:
                shapes = f"{tuple(directions.shape[1:])} do not fit {place or 'the input'}, which has {tuple(shape)}"
                raise InvalidInput(f"directions of shape {shapes}.") from error

        def moved(value: Tensor, directions: tuple[Tensor, ...]) -> Tensor:
            function: Callable[[Tensor], Tensor] = lambda z: self._run(x, place, z, to_head=True)["head"]  # noqa: E731
            for d in directions:
                function = _derivative(function, d.expand(shape))
            return function(value)

        size = max(1, 2**26 // max(1, math.prod(shape)))
        at_one = torch.vmap(moved, (None, 0), chunk_size=size)
        at_several = torch.vmap(at_one, (0, None), chunk_size=max(1, size // max(1, count)))
        along = tuple(directions.to(values.dtype) for directions in along)
        with torch.no_grad():
            self._run(x, place, values[0])  # the whole module, with its checks
            try:
                found = None
                if len(values) > 1:
                    with suppress(RuntimeError):  # of modules that look at their input's values
                        found = at_several(values, along)
                if found is None:
                    found = torch.stack([at_one(value, along) for value in values])
            except (NotImplementedError, RuntimeError) as error:
                raise EditError(
                    f"torch could not differentiate {type(self.module).__name__} forward at {place or 'its input'} "
                    f"({error}). Load it as a graph first: soundly.edit(soundly.load(model, example), ...)."
                ) from error
        return found.reshape(len(values), count, -1, self.weight.shape[1]).double()


def _derivative(function: Callable[[Tensor], Tensor], direction: Tensor) -> Callable[[Tensor], Tensor]:
    """The directional derivative of a function as a function."""

    def moved(z: Tensor) -> Tensor:
        tangent: Tensor = torch.func.jvp(function, (z,), (direction,))[1]
        return tangent

    return moved


class _Reached(Exception):
    """The layer is about to be called: nothing behind its input is needed."""


def _wide(t: Tensor) -> Tensor:
    """The same numbers in float32 where they are of half precision."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory (as far as their first and last entries tell)."""

    def end(t: Tensor) -> int:
        last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr() + t.element_size() * (last + 1)

    apart = a.device != b.device or a.data_ptr() >= end(b) or b.data_ptr() >= end(a)
    return a.numel() > 0 < b.numel() and not apart


def trunk_of(model: Network | nn.Module, layer: str) -> Trunk:
    """The trunk of a captured network or of any module."""
    if isinstance(model, Network):
        return GraphTrunk(model, layer)
    if isinstance(model, nn.Module):
        return ModuleTrunk(model, layer)
    raise InvalidInput(f"model must be a soundly Network or an nn.Module, not {type(model).__name__}.")
