"""Whether an edited network keeps its promises: a claim for the verifier, whose proof is the edit's certificate.

Every point is a box of width zero with the rows stated there, every region a box with the rows stated on it. So one
claim covers an edit, and `soundly.verify` decides it: over the reals, for the weights as stored, from the input on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from soundly.editing.constraints import Area
from soundly.editing.sequential import Requirements
from soundly.errors import InvalidInput
from soundly.graph.linear import Concat
from soundly.graph.network import Network
from soundly.graph.node import Input, Node
from soundly.graph.simplify import rebuild
from soundly.spec.claim import Claim, Property, Terms
from soundly.spec.region import Box, Union


def promise(requirements: Requirements, values: dict[str, Tensor]) -> Claim:
    """That every row holds, point by point or on the whole of its region, once parameters have these values."""
    if len(requirements.cones):
        raise InvalidInput("norms and cosines are proved at points, of the last layer only: give that `layer`.")
    network = requirements.network.with_values(values)
    owner = requirements.owner
    if bool((owner < 0).any()):
        return _together(requirements, network)
    boxes: list[Box] = []
    rows: list[Tensor] = []
    for i, point in enumerate(requirements.points):
        mine = (owner == i).nonzero()[:, 0]
        for box in _boxes(point.region) if isinstance(point, Area) else [_box(point.x, network)]:
            boxes.append(box)
            rows.append(mine)
    sizes = torch.tensor([0, *[2 * len(r) for r in rows]]).cumsum(0)
    width = requirements.width
    property = _property(requirements, torch.cat(rows), lambda value: value % width, width, _inputs(network))
    return Claim(
        network, Union.of(boxes), property, torch.stack([sizes[:-1], sizes[1:]], 1), name="promises of an edit"
    )


def _box(x: Tensor, network: Network) -> Box:
    flat = x.detach().double().cpu().reshape(network.input.shape)
    return Box(flat, flat)


def _boxes(region: Box | Union) -> list[Box]:
    return [region] if isinstance(region, Box) else [region[i] for i in region.filled]


def _inputs(network: Network) -> int:
    return sum(int(torch.tensor(n.shape).prod()) for n in network.inputs)


def _property(r: Requirements, rows: Tensor, place: Callable[[Tensor], Tensor], outputs: int, inputs: int) -> Property:
    """Clauses row - lower < 0 and upper - row < 0 for each of the rows that has such a bound; two for each."""
    y_row, y_column, y_value, b = [], [], [], []
    for k, row in enumerate(rows.tolist()):
        part = slice(int(r.row_start[row]), int(r.row_start[row + 1]))
        column, factor = place(r.row_value[part]), r.row_coefficient[part]
        for j, (sign, bound) in enumerate(((1.0, -r.lower[row]), (-1.0, r.upper[row]))):
            # A row without this bound repeats the other one: clauses keep their places.
            if not bool(torch.isfinite(bound)):
                sign, bound = -sign, r.upper[row] if j == 0 else -r.lower[row]
            y_row.append(torch.full((len(column),), 2 * k + j))
            y_column.append(column)
            y_value.append(sign * factor)
            b.append(bound)
    m, none = 2 * len(rows), torch.empty(0, dtype=torch.int64)
    terms = Terms(torch.cat(y_row), torch.cat(y_column), torch.cat(y_value))
    no_terms = Terms(none, none, torch.empty(0, dtype=torch.float64))
    return Property(
        outputs, inputs, terms, no_terms, torch.stack(b), torch.arange(m), m, torch.ones(m, dtype=torch.bool)
    )


def _together(requirements: Requirements, network: Network) -> Claim:
    """Rows that compare points: one network with an input for each of them."""
    if any(isinstance(p, Area) for p in requirements.points):
        raise InvalidInput(
            "a constraint compares points while another holds on a region; edit them one after the other."
        )
    old, inputs, outputs = network.input, [], []
    for i, _ in enumerate(requirements.points):
        new = Input(f"{getattr(old.op, 'name', 'x')} {i}", old.shape)()
        inputs.append(new)

        def rule(before: Node, node: Node, new: Node = new) -> Node:
            return new if before is old else node

        outputs.append(rebuild([network.output], rule)[network.output])
    joined = replace(network, inputs=tuple(inputs), outputs=(Concat(0)(*outputs),), places={})
    flat = torch.cat([p.x.detach().double().cpu().reshape(-1) for p in requirements.points])
    size = requirements.width * len(requirements.points)
    rows = torch.arange(len(requirements.lower))
    property = _property(requirements, rows, lambda value: value, size, len(flat))
    return Claim(joined, Box(flat, flat), property, name="promises of an edit")
