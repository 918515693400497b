"""What an edit must achieve, read from a JSON file: `soundly.at`, `soundly.over` and what follows them, as data.

    {"version": 1, "layer": "fc", "constraints": [
        {"at": "cat.npy", "name": "cat", "require": [
            {"classified": 3},
            {"gradient": {"of": 3, "entries": [0, 4]}, "within": [-0.1, 0.1]}]}]}

The names are those of the Python functions. docs/editing.md describes the format. Whatever is wrong is an error that
names its place in the file, before anything is computed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from soundly.editing.candidate import Norm
from soundly.editing.constraints import Area, Constraint, Expression, Goal, Point, at, over
from soundly.editing.json_values import Value, located, read_json
from soundly.errors import InvalidInput
from soundly.graph.network import Network
from soundly.graph.node import Shape
from soundly.spec.region import Ball, Box, Union

VERSION = 1
STEPS = 1000
"""The most quadrature nodes of Integrated Gradients."""

DEMANDS: Mapping[str, str] = {
    "within": "", "at_least": "", "at_most": "", "equals": "tolerance", "normalised_near": "eps spread",
    "keeps_top": "margin", "norm_at_most": "", "cosine_at_least": "teacher length",
}  # fmt: skip
"""What may be demanded of an expression, and the options of each demand."""
QUANTITIES = (
    "output", "gradient", "directional", "derivative", "laplacian", "gradcam", "integrated_gradients", "coordinates",
    "sum",
)  # fmt: skip
ORDER = 4
"""The highest order of a derivative."""
CHANGES = "at combined times plus"


@dataclass(frozen=True, eq=False)
class Statement:
    """The arguments of `soundly.edit` that a file gives.

    Attributes:
        constraints, goals: as there.
        layer, norm, bound: None where the file leaves them open.
        options: further arguments.
    """

    constraints: tuple[Constraint, ...]
    goals: tuple[Goal, ...] = ()
    layer: tuple[str, ...] | None = None
    norm: Norm | None = None
    bound: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def read_statement(path: str | os.PathLike[str], network: Network) -> Statement:
    """Reads constraints for a network.

    Args:
        path: a JSON file; files of numbers that it names are looked for beside it.

    Raises:
        InvalidInput: something in the file is wrong or does not fit the network; the message names the place.
    """
    parts = read_json(path).object("version constraints", "layer norm bound goal_weight retain retain_weight")
    if parts["version"].integer(0, 2**31) != VERSION:
        parts["version"].fail(f"this soundly reads version {VERSION}; another may read it.")
    reader = _Reader(network)
    entries = [reader.place(entry, i) for i, entry in enumerate(parts["constraints"].list())]
    constraints, goals = [], []
    for point, entry in entries:
        reader.names.setdefault(point.name, point)
        if reader.names[point.name] is not point:
            entry["name"].fail(f"{point.name!r} is the name of another entry too; give each its own.")
    for point, entry in entries:
        wanted = entry["require"].list() if "require" in entry else []
        wished = entry["wish"].list() if "wish" in entry else []
        constraints += [reader.constraint(item, point) for item in wanted]
        goals += [reader.goal(item, point) for item in wished]
    if not constraints:
        parts["constraints"].fail('nothing is required; give at least one "require".')
    options: dict[str, Any] = {}
    for name in ("goal_weight", "retain_weight"):
        if name in parts:
            options[name] = parts[name].number(0.0)
    if "retain" in parts:
        options["retain"] = [reader.input(v) for v in parts["retain"].list()]
    norm: Any = parts["norm"].text(("l2", "l1", "linf")) if "norm" in parts else None
    bound = parts["bound"].number(0.0, above=True) if "bound" in parts else None
    return Statement(tuple(constraints), tuple(goals), _layers(parts.get("layer")), norm, bound, options)


def _layers(value: Value | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return (value.text(),) if isinstance(value.data, str) else tuple(v.text() for v in value.list())


# -- what they say about a network


class _Reader:
    """Turns the file's entries into points, expressions and constraints of one network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.shape, outputs = network.input.shape, network.output.shape
        self.classes = outputs[-1] if outputs else 1
        self.positions = math.prod(outputs) // max(1, self.classes)
        self.names: dict[str, Point] = {}

    # -- points and regions

    def place(self, value: Value, i: int) -> tuple[Point, dict[str, Value]]:
        """The point or region of an entry, and the entry's parts."""
        parts = value.object("", "at over name position require wish")
        if ("at" in parts) == ("over" in parts):
            value.fail('give either "at", a point, or "over", a region.')
        if "require" not in parts and "wish" not in parts:
            value.fail('nothing is said of it; give "require" or "wish", a list.')
        parts.setdefault("name", Value(f"{'point' if 'at' in parts else 'region'} {i}", value.where, value.folder))
        name, position = parts["name"].text(), None
        if "position" in parts:
            position = parts["position"].integer(-self.positions, self.positions)
        elif self.positions > 1:
            value.fail(f'the output has {self.positions} positions; say which, "position": 0.')
        with located(value):
            if "at" in parts:
                return at(self.input(parts["at"]), position=position, name=name), parts
            return over(self.region(parts["over"]), position=position, name=name), parts

    def input(self, value: Value) -> Tensor:
        """A point of the network's input, in the network's type."""
        x = value.shaped(self.shape).to(self.network.dtype)
        if not bool(torch.isfinite(x).all()):
            value.fail(f"a number is too large for the network's {self.network.dtype}.")
        return x

    def region(self, value: Value) -> Box | Union:
        if isinstance(value.data, list):
            return Union.of([self.box(v) for v in value.list()])
        return self.box(value)

    def box(self, value: Value) -> Box:
        parts = value.object("", "lower upper centre eps clip")
        with located(value):
            if parts.keys() == {"lower", "upper"}:
                box = Box(parts["lower"].shaped(self.shape), parts["upper"].shaped(self.shape))
            elif parts.keys() - {"clip"} == {"centre", "eps"}:
                clip = None
                if "clip" in parts:
                    ends = parts["clip"].list()
                    if len(ends) != 2:
                        parts["clip"].fail("expected [lower, upper].")
                    clip = Box(ends[0].shaped(self.shape), ends[1].shaped(self.shape))
                box = Ball(parts["centre"].shaped(self.shape), parts["eps"].shaped(self.shape), clip=clip).box
            else:
                value.fail('give "lower" and "upper", or "centre" and "eps" (and perhaps "clip").')
        if box.is_empty:
            value.fail("the region is empty: a lower bound exceeds its upper bound.")
        return box

    # -- expressions

    def expression(self, parts: Mapping[str, Value], whole: Value, here: Point) -> tuple[Expression, int]:
        """What a constraint is about, and how many numbers it has."""
        kinds = [key for key in QUANTITIES if key in parts]
        if len(kinds) != 1:
            whole.fail(f"give one of {', '.join(QUANTITIES)}; it has {' and '.join(kinds) or 'none'}.")
        if "at" in parts:
            name = parts["at"].text()
            if name not in self.names:
                parts["at"].fail(f"{name!r:.60} is the name of no entry; there are {', '.join(self.names)}.")
            here = self.names[name]
        value = parts[kinds[0]]
        with located(value):
            e, size = getattr(self, f"_{kinds[0]}")(value, here)
        if "combined" in parts:
            matrix = parts["combined"].array()
            if matrix.dim() != 2 or matrix.shape[1] != size or not len(matrix):
                parts["combined"].fail(f"expected a matrix of {size} columns, not shape {list(matrix.shape)}.")
            e, size = e.combined(matrix), len(matrix)
        if "times" in parts:
            e = e * parts["times"].number()
        if "plus" in parts:
            e = e + parts["plus"].array(size=size).reshape(-1)
        return e, size

    def _sum(self, value: Value, here: Point) -> tuple[Expression, int]:
        terms: list[tuple[Expression, int]] = []
        for item in value.list():
            parts = item.object("", f"{' '.join(QUANTITIES)} {CHANGES}")
            term, size = self.expression(parts, item, here)
            if terms and size != terms[0][1]:
                item.fail(f"it has {size} numbers, the first of the sum {terms[0][1]}; a sum needs equally many.")
            terms.append((term, size))
        return reduce(add, (term for term, _ in terms)), terms[0][1]

    def _output(self, value: Value, here: Point) -> tuple[Expression, int]:
        return here.output(value.integer(0, self.classes)), 1

    def _gradient(self, value: Value, here: Point) -> tuple[Expression, int]:
        parts = value.object("of", "place entries")
        of, (place, shape) = parts["of"].integer(0, self.classes), self._place(parts.get("place"))
        size = math.prod(shape)
        entries = parts["entries"].integers(size) if "entries" in parts else None
        return here.gradient(of, place=place, entries=entries), size if entries is None else len(entries)

    def _directional(self, value: Value, here: Point) -> tuple[Expression, int]:
        parts = value.object("of directions", "place")
        of, (place, shape) = parts["of"].integer(0, self.classes), self._place(parts.get("place"))
        directions = parts["directions"].array()
        if directions.dim() < 1 or tuple(directions.shape[1:]) != shape or not len(directions):
            parts["directions"].fail(f"expected shape [number, {str(list(shape))[1:]}, not {list(directions.shape)}.")
        return here.directional(of, directions, place=place), len(directions)

    def _derivative(self, value: Value, here: Point) -> tuple[Expression, int]:
        parts = value.object("of along")
        along = parts["along"].integers(math.prod(self.shape))
        if len(along) > ORDER:
            parts["along"].fail(f"derivatives of order {len(along)}; at most {ORDER}.")
        return here.derivative(parts["of"].integer(0, self.classes), along), 1

    def _laplacian(self, value: Value, here: Point) -> tuple[Expression, int]:
        parts = value.object("of", "entries")
        entries = parts["entries"].integers(math.prod(self.shape)) if "entries" in parts else None
        return here.laplacian(parts["of"].integer(0, self.classes), entries=entries), 1

    def _gradcam(self, value: Value, here: Point) -> tuple[Expression, int]:
        parts = value.object("of layer")
        of, (layer, shape) = parts["of"].integer(0, self.classes), self._place(parts["layer"])
        if len(shape) < 3 or shape[0] != 1:
            parts["layer"].fail(f"Grad-CAM needs a place of shape [1, C, *size]; this one has {list(shape)}.")
        assert layer is not None
        return here.gradcam(of, layer), math.prod(shape[2:])

    def _integrated_gradients(self, value: Value, here: Point) -> tuple[Expression, int]:
        parts = value.object("of baseline", "steps groups")
        of, groups, size = parts["of"].integer(0, self.classes), None, math.prod(self.shape)
        if "groups" in parts:
            labels = parts["groups"].shaped(self.shape)
            groups = labels.long()
            size = int(groups.max()) + 1
            if not torch.equal(groups.double(), labels) or int(groups.min()) < -1 or not 0 < size <= groups.numel():
                parts["groups"].fail("labels must be integers 0, 1, ..., or -1 to leave an entry out.")
        steps = parts["steps"].integer(1, STEPS + 1) if "steps" in parts else 25
        return here.integrated_gradients(of, baseline=self.input(parts["baseline"]), steps=steps, groups=groups), size

    def _coordinates(self, value: Value, here: Point) -> tuple[Expression, int]:
        if not isinstance(here, Area):
            value.fail("at a point the input is known; write it as numbers.")
        size = math.prod(self.shape)
        parts = value.object("", "entries")
        entries = parts["entries"].integers(size) if "entries" in parts else None
        return here.coordinates(entries), size if entries is None else len(entries)

    def _place(self, value: Value | None) -> tuple[str | None, Shape]:
        """A place of the network and the shape of its value; the input if None."""
        if value is None:
            return None, self.shape
        with located(value):
            return value.text(), self.network.at(value.text()).shape

    # -- constraints

    def constraint(self, value: Value, here: Point) -> Constraint:
        if isinstance(value.data, dict) and "classified" in value.data:
            parts = value.object("classified", "margin name")
            if self.classes < 2:
                value.fail("the network has one output, so there is nothing to exceed.")
            label = parts["classified"].integer(0, self.classes)
            margin = {"margin": parts["margin"].number(0.0)} if "margin" in parts else {}
            c = here.classified(label, **margin)
            return replace(c, name=parts["name"].text()) if "name" in parts else c
        options = " ".join(DEMANDS.values())
        parts = value.object("", f"{' '.join(QUANTITIES)} {CHANGES} {' '.join(DEMANDS)} {options} name")
        demands = [key for key in DEMANDS if key in parts]
        if len(demands) != 1:
            known = ", ".join((*DEMANDS, "classified"))
            value.fail(f"demand one of {known}; it has {' and '.join(demands) or 'none'}.")
        demand = demands[0]
        for option in options.split():
            if option in parts and option not in DEMANDS[demand].split():
                value.fail(f'"{option}" does not go with "{demand}".')
        e, size = self.expression(parts, value, here)
        name = parts["name"].text() if "name" in parts else None
        with located(parts[demand]):
            return self._demand(demand, parts, e, size, here, name)

    def _demand(
        self, demand: str, parts: Mapping[str, Value], e: Expression, size: int, here: Point, name: str | None
    ) -> Constraint:
        value = parts[demand]

        def option(key: str, default: float | None = None, *, above: bool = False) -> float:
            if key not in parts and default is None:
                raise InvalidInput(f'{value.where.rpartition(".")[0]}: "{demand}" needs "{key}".')
            return parts[key].number(0.0, above=above) if key in parts else default or 0.0

        def flat(v: Value, open_end: float | None = None) -> Tensor:
            return v.array(size=size, open_end=open_end).reshape(-1)

        match demand:
            case "within":
                ends = value.list()
                if len(ends) != 2:
                    value.fail("expected [lower, upper]; null leaves one of them open.")
                return e.within(flat(ends[0], -math.inf), flat(ends[1], math.inf), name=name)
            case "at_least":
                return e.at_least(flat(value), name=name)
            case "at_most":
                return e.at_most(flat(value), name=name)
            case "equals":
                tolerance = option("tolerance")
                if not isinstance(value.data, dict):
                    return e.equals(flat(value), tolerance=tolerance, name=name)
                other, count = self.expression(value.object("", f"{' '.join(QUANTITIES)} {CHANGES}"), value, here)
                if count != size:
                    value.fail(f"it has {count} numbers, what it should equal {size}.")
                return e.equals(other, tolerance=tolerance, name=name)
            case "normalised_near":
                target = value.array()
                if target.numel() != size:
                    value.fail(f"expected a map of {size} numbers, not {target.numel()} ({list(target.shape)}).")
                spread = option("spread", above=True) if "spread" in parts else None
                return e.normalised_near(target, eps=option("eps", above=True), spread=spread, name=name)
            case "keeps_top":
                mask = value.array()
                if mask.numel() != size or not bool(((mask == 0) | (mask == 1)).all()):
                    value.fail(f"expected a mask of {size} numbers, each true or false, 1 or 0.")
                return e.keeps_top(mask, margin=option("margin", 1e-6), name=name)
            case "norm_at_most":
                return e.norm_at_most(value.number(0.0, above=True), name=name)
            case "cosine_at_least":
                if "teacher" not in parts:
                    value.fail('it needs a "teacher", a map.')
                teacher = parts["teacher"].array()
                if teacher.numel() != size:
                    parts["teacher"].fail(f"expected a map of {size} numbers, not {teacher.numel()}.")
                length = option("length", above=True) if "length" in parts else None
                return e.cosine_at_least(value.number(0.0, above=True), teacher=teacher, length=length, name=name)
        raise AssertionError(demand)

    def goal(self, value: Value, here: Point) -> Goal:
        parts = value.object("near", f"{' '.join(QUANTITIES)} {CHANGES}")
        e, size = self.expression(parts, value, here)
        with located(parts["near"]):
            return e.near(parts["near"].array(size=size).reshape(-1))
