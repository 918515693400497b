"""Random computations as plain data: a list of ATen calls, which torch can run and soundly can capture.

A recipe is JSON all the way down, so a failure is a small file that can be read, edited and replayed. Its graph is
made by the very rules that capture uses (`soundly.graph.aten`), call by call, so that a rule and torch's own operation
can be compared value for value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soundly.errors import InvalidInput, UnsupportedOp
from soundly.graph.aten_layers import RULES
from soundly.graph.network import Network
from soundly.graph.node import Constant, Input, Node, Parameter
from soundly.graph.simplify import simplify

Argument = Any
"""None, a number, a string, a list of these, {"value": i} for an earlier value or {"weight": nested lists}."""


@dataclass(frozen=True)
class Call:
    """One call of an ATen operation by its name, with arguments as above."""

    op: str
    arguments: tuple[Argument, ...]

    @property
    def sources(self) -> list[int]:
        """The earlier values that it reads."""
        return [a["value"] for a in _leaves(self.arguments) if isinstance(a, dict) and "value" in a]


@dataclass(frozen=True)
class Recipe:
    """A function of one or more inputs over a box. Values 0, 1, ... are the inputs, then the calls in order.

    Attributes:
        lower, upper: per input the ends of its box, as nested lists.
        calls: the operations; the last one's value is the output.
        of: an output entry whose gradient towards the first input is the function meant; None for the output itself.
        label: where it comes from.
    """

    lower: tuple[Any, ...]
    upper: tuple[Any, ...]
    calls: tuple[Call, ...]
    of: int | None = None
    label: str = field(default="", compare=False)

    @cached_property
    def box(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The lower and the upper ends of every input, float64."""
        lower, upper = (tuple(torch.tensor(v, dtype=torch.float64) for v in ends) for ends in (self.lower, self.upper))
        return lower, upper

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """All values as torch computes them, the inputs first."""
        values = list(inputs)
        for call in self.calls:
            arguments = [_filled(a, values, inputs[0].dtype) for a in call.arguments]
            found = getattr(torch.ops.aten, call.op)(*arguments)
            values.append(found[0] if isinstance(found, (tuple, list)) else found)
        return values

    def graph(self) -> tuple[Network, list[Node]]:
        """The network, in float64 and as the rules make it, and the node of every value.

        Raises:
            UnsupportedOp: a rule refuses a call.
        """
        leaves: dict[Node, Tensor] = {}

        def leaf(value: Tensor, name: str) -> Node:
            node = Constant(f"{name} {len(leaves)}", tuple(value.shape))()
            leaves[node] = value.double()
            return node

        def weight(value: Tensor) -> Node:
            node = Parameter(f"weight {len(leaves)}", tuple(value.shape))()
            leaves[node] = value
            return node

        nodes: list[Any] = [Input(f"x{i}", tuple(v.shape))() for i, v in enumerate(self.box[0])]
        inputs = tuple(nodes)
        for call in self.calls:
            arguments = [_filled(a, nodes, torch.float64, weight) for a in call.arguments]
            try:
                found = RULES[call.op](leaf, *arguments)
            except (ValueError, TypeError, IndexError, AttributeError) as error:  # as capture does
                raise UnsupportedOp(f"{call.op} is used in a way soundly has no rule for: {error}") from error
            nodes.append(found[0] if isinstance(found, tuple) else found)
        like = torch.empty(0, dtype=torch.float64)
        return Network(inputs, (nodes[-1],), leaves, name=self.label or "recipe", like=like), nodes

    def network(self) -> Network:
        """What the recipe means: the output, or its gradient."""
        network, _ = self.graph()
        return simplify(network) if self.of is None else network.gradient(of=self.of, wrt=network.inputs[0])

    def module(self) -> nn.Module:
        """The same computation as a module, for capture by `torch.export`."""
        return _Module(self)

    # -- as a file

    def save(self, path: Path) -> None:
        """Writes the recipe as JSON."""
        calls = [{"op": c.op, "arguments": list(c.arguments)} for c in self.calls]
        data = {"label": self.label, "lower": self.lower, "upper": self.upper, "of": self.of, "calls": calls}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Recipe:
        """Reads what `save` wrote.

        Raises:
            InvalidInput: the file is no recipe.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            calls = tuple(Call(str(c["op"]), tuple(c["arguments"])) for c in data["calls"])
            unknown = [c.op for c in calls if c.op not in RULES]
            if unknown:
                raise ValueError(f"there is no rule for {unknown[0]}")
            return Recipe(tuple(data["lower"]), tuple(data["upper"]), calls, data["of"], str(data["label"]))
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise InvalidInput(f"{path} is no recipe of a computation: {problem}.") from problem

    # -- smaller ones

    def simpler(self) -> Iterator[Recipe]:
        """Recipes with less in them, the boldest changes first."""
        first = len(self.lower)
        for last in range(1, len(self.calls)):
            yield self._with(calls=self.calls[:last])
        for k in reversed(range(len(self.calls))):
            for source in self.calls[k].sources[:2]:
                yield self._with(calls=_without(self.calls, k, first, source))
        yield self._with(of=None)
        lower, upper = self.box
        middle = tuple(((a + b) / 2) for a, b in zip(lower, upper, strict=True))
        for low, high in ((lower, middle), (middle, upper), (middle, middle)):
            if any(not torch.equal(a, b) for a, b in zip((*low, *high), (*lower, *upper), strict=True)):
                yield self._with(lower=_lists(low), upper=_lists(high))
        for digits in (0, 1, 2):
            rounded = tuple(Call(c.op, tuple(_rounded(a, digits) for a in c.arguments)) for c in self.calls)
            ends = [tuple(torch.round(v, decimals=digits) for v in side) for side in (lower, upper)]
            yield self._with(calls=rounded, lower=_lists(ends[0]), upper=_lists(ends[1]))
            yield self._with(calls=rounded)

    def _with(self, **changes: Any) -> Recipe:
        fields = {"lower": self.lower, "upper": self.upper, "calls": self.calls, "of": self.of, "label": self.label}
        return _used(Recipe(**{**fields, **changes}))


class _Module(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.weights = nn.ParameterDict()
        for k, call in enumerate(recipe.calls):
            for i, a in enumerate(call.arguments):
                if isinstance(a, dict) and "weight" in a:
                    value = torch.tensor(a["weight"], dtype=torch.float64)
                    self.weights[f"{k}_{i}"] = nn.Parameter(value, requires_grad=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        values = list(inputs)
        for k, call in enumerate(self.recipe.calls):
            arguments = [
                self.weights[f"{k}_{i}"] if f"{k}_{i}" in self.weights else _filled(a, values, inputs[0].dtype)
                for i, a in enumerate(call.arguments)
            ]
            found = getattr(torch.ops.aten, call.op)(*arguments)
            values.append(found[0] if isinstance(found, (tuple, list)) else found)
        return values[-1]


def _leaves(argument: Argument) -> Iterator[Argument]:
    if isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _leaves(item)
    else:
        yield argument


def _filled(argument: Argument, values: Sequence[Any], dtype: torch.dtype, weight: Any = None) -> Any:
    """An argument as torch or a rule takes it."""
    match argument:
        case {"value": index}:
            return values[index]
        case {"weight": numbers}:
            value = torch.tensor(numbers, dtype=dtype)
            return value if weight is None else weight(value)
        case {"index": numbers}:
            return torch.tensor(numbers, dtype=torch.int64)
        case list() | tuple():
            return [_filled(item, values, dtype, weight) for item in argument]
    return argument


def _renamed(argument: Argument, names: Mapping[int, int]) -> Argument:
    match argument:
        case {"value": index}:
            return {"value": names[index]}
        case list() | tuple():
            return [_renamed(item, names) for item in argument]
    return argument


def _without(calls: Sequence[Call], k: int, first: int, source: int) -> tuple[Call, ...]:
    """The calls with the k-th replaced by one of the values that it reads."""
    names = {i: i if i < first + k else i - 1 for i in range(first + len(calls))} | {first + k: source}
    rest = [*calls[:k], *calls[k + 1 :]]
    return tuple(Call(c.op, tuple(_renamed(a, names) for a in c.arguments)) for c in rest)


def _used(recipe: Recipe) -> Recipe:
    """Without the calls that the last one does not need."""
    first, calls = len(recipe.lower), recipe.calls
    if not calls:
        return recipe
    needed = {first + len(calls) - 1}
    for k in reversed(range(len(calls))):
        if first + k in needed:
            needed |= set(calls[k].sources)
    kept = [k for k in range(len(calls)) if first + k in needed]
    names = {i: i for i in range(first)} | {first + k: first + n for n, k in enumerate(kept)}
    left = tuple(Call(calls[k].op, tuple(_renamed(a, names) for a in calls[k].arguments)) for k in kept)
    return Recipe(recipe.lower, recipe.upper, left, recipe.of, recipe.label)


def _rounded(argument: Argument, digits: int) -> Argument:
    match argument:
        case {"weight": numbers}:
            return {"weight": torch.round(torch.tensor(numbers, dtype=torch.float64), decimals=digits).tolist()}
        case float():
            return round(argument, digits)
    return argument


def _lists(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple(t.tolist() for t in tensors)
