"""A claim made ready for a search: one flat program, boxes of inputs, rows to be proved positive."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from soundly.bounds.ball import Ball
from soundly.bounds.interval import interval_bounds
from soundly.bounds.lower import lower
from soundly.bounds.program import Program
from soundly.errors import InvalidInput
from soundly.graph.composite import Maximum, MaxPool, Softmax
from soundly.graph.linear import Reshape
from soundly.graph.network import Network
from soundly.graph.node import Composite, Node, dependents, topological
from soundly.spec.claim import Claim, Property
from soundly.spec.grid import Grid
from soundly.spec.region import Ball as Region
from soundly.spec.region import Union
from soundly.verification.rows import Rows, rows_of

Arithmetic: TypeAlias = Literal["real", "float32"]


@dataclass(frozen=True, eq=False)
class Problem:
    """Boxes and, for each, the clauses that must be refuted on it, or on what it has in common with a ball or a grid.

    A clause is refuted there if one of its rows is above its slack everywhere. All numbers are float64.

    Attributes:
        program: the network on the boxes; of a softmax that is only compared with itself, the scores.
        lower, upper: the boxes [cases, inputs]; together, and met with the ball or the grid, they are the region.
        rows: all rows; their clauses are numbered through.
        slack: [rows], not negative.
        spans: [cases, 2], the clauses of each box: first to last - 1.
        grid: where all points of the region lie, and around which the boxes are; None where all points count.
        arithmetic: "float32" if what float32 computes is claimed, too; the slack covers how far that is from the reals.
        stated: [rows], the slack without that.
        ball: in the norm l1 or l2, where all points of the region lie; None where boxes say it all.
    """

    program: Program
    lower: Tensor
    upper: Tensor
    rows: Rows
    slack: Tensor
    spans: Tensor
    ball: Ball | None = None
    grid: Grid | None = None
    arithmetic: Arithmetic = "real"
    stated: Tensor | None = None

    @cached_property
    def row_spans(self) -> Tensor:
        """[cases, 2]: the rows of each box."""
        return torch.searchsorted(self.rows.clause, self.spans.contiguous())

    @cached_property
    def most_clauses(self) -> int:
        return int((self.spans[:, 1] - self.spans[:, 0]).max())

    @cached_property
    def table(self) -> tuple[Tensor, Tensor]:
        """rows, clauses [cases, most rows]: the rows of each box and their clauses counted from the box's first;
        -1 beyond them."""
        first, last = self.row_spans.unbind(1)
        index = first[:, None] + torch.arange(int((last - first).max()))
        inside = index < last[:, None]
        index = torch.where(inside, index, 0)
        clause = self.rows.clause[index] - self.spans[:, :1]
        return torch.where(inside, index, -1), torch.where(inside, clause, -1)

    def narrowed(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """What the ball or the grid leaves of boxes [k, inputs]; with crossed ends where that is nothing."""
        limit = self.ball or self.grid
        return (lower, upper) if limit is None else limit.narrowed(lower, upper)

    def open_clauses(self, cases: Tensor) -> Tensor:
        """[k, most clauses]: the clauses that those boxes have."""
        counts = self.spans[:, 1] - self.spans[:, 0]
        return torch.arange(self.most_clauses) < counts[cases, None]


def problem_of(claim: Claim, arithmetic: Arithmetic = "real") -> Problem:
    """The claim over the boxes of its region, or a box and a ball or grid.

    Args:
        claim: about a network that is at hand, over a region that is not empty.

    Raises:
        MissingRule: an operation that no program can hold.
        InvalidInput: float32 is asked for, of a network in another type or with an operation whose roundings are not
            known.
    """
    if arithmetic == "float32":
        _require_known(claim)
    network, region = claim.network, claim.region
    assert isinstance(network, Network)
    ball = None
    n, spans = claim.property.inputs, torch.tensor([[0, claim.property.clauses]])
    if isinstance(region, Union):
        kept = torch.tensor(region.filled)
        low, high = (end.reshape(len(region), n)[kept] for end in (region.lower, region.upper))
        spans = spans.expand(len(kept), 2) if claim.spans is None else claim.spans[kept]
    else:
        low, high = region.box.lower.reshape(1, n), region.box.upper.reshape(1, n)
        if isinstance(region, Region) and region.norm != "linf":
            radius = torch.as_tensor(region.radius, dtype=torch.float64).expand(region.shape)
            ball = Ball(region.centre.reshape(1, n), radius.reshape(1, n), region.norm)
    ends = low.amin(0), high.amax(0)
    sizes = [math.prod(node.shape) for node in network.inputs]
    split = zip(network.inputs, *(end.split(sizes) for end in ends), strict=True)
    hull = {node: (a.reshape(node.shape), b.reshape(node.shape)) for node, a, b in split}
    real = arithmetic == "real"
    scores = _scores(network, claim.property) if real else None
    program = lower(network, None if scores is None else [scores], region=hull, executed=not real)
    rows = rows_of(claim.property)
    slack = torch.zeros_like(rows.constant)
    if claim.property.inexact is not None:
        bounds = interval_bounds(network.to(torch.float64).to("cpu"), hull, network.outputs)
        outputs = torch.cat([bounds[node].size.reshape(-1) for node in network.outputs])
        found = claim.property.slack(outputs, torch.maximum(ends[0].abs(), ends[1].abs()))
        counts = torch.bincount(claim.property.clause, minlength=claim.property.clauses)
        slack[counts[rows.clause] > 0] = found.nan_to_num(nan=math.inf, posinf=math.inf)
    grid = region if isinstance(region, Grid) else None
    return Problem(program, low, high, rows, slack, spans, ball, grid, arithmetic)


def _require_known(claim: Claim) -> None:
    network = claim.network
    assert isinstance(network, Network)
    if network.dtype != torch.float32:
        raise InvalidInput(f'arithmetic="float32": the network is in {network.dtype}; load it in float32.')
    order = topological(network.outputs)
    varying = dependents(order, network.inputs)
    for node in order:
        if node in varying and isinstance(node.op, Composite) and not isinstance(node.op, (Maximum, MaxPool)):
            raise InvalidInput(
                f'arithmetic="float32": how {node!r} is rounded is not known. Claim something of what it reads, or use '
                'arithmetic="real".'
            )


def _scores(network: Network, property: Property) -> Node | None:
    """What a final softmax over all outputs is taken of, if every row is the difference of two of its outputs: that of
    their scores has the same sign."""
    node = network.outputs[0]
    while isinstance(node.op, Reshape):
        node = node.inputs[0]
    if len(network.outputs) > 1 or not isinstance(node.op, Softmax) or len(node.inputs) > 1:
        return None
    y, each = property.y, torch.arange(len(property)).repeat_interleave(2)
    compares = (
        node.shape[node.op.axis] == property.outputs
        and torch.equal(y.row, each)
        and bool((y.column[::2] != y.column[1::2]).all())
        and bool(((y.value[::2].abs() == 1) & (y.value[::2] == -y.value[1::2])).all())
        and not bool(property.b.any() | property.x.value.any())
    )
    return node.inputs[0] if compares else None
