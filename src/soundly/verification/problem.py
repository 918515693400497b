"""A claim made ready for a search: one flat program, boxes of inputs, rows to be proved positive."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from soundly.bounds.lower import lower
from soundly.bounds.program import Program
from soundly.graph.network import Network
from soundly.spec.claim import Claim
from soundly.spec.region import Union
from soundly.verification.rows import Rows, rows_of


@dataclass(frozen=True, eq=False)
class Problem:
    """Boxes and, for each, the clauses that must be refuted on it.

    A clause is refuted on a box if one of its rows is above its slack everywhere. All numbers are float64.

    Attributes:
        program: the network.
        lower, upper: the boxes [cases, inputs]; together they cover the region.
        rows: all rows; their clauses are numbered through.
        slack: [rows], not negative.
        spans: [cases, 2], the clauses of each box: first to last - 1.
    """

    program: Program
    lower: Tensor
    upper: Tensor
    rows: Rows
    slack: Tensor
    spans: Tensor

    @cached_property
    def row_spans(self) -> Tensor:
        """[cases, 2]: the rows of each box."""
        return torch.searchsorted(self.rows.clause, self.spans)

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

    def open_clauses(self, cases: Tensor) -> Tensor:
        """[k, most clauses]: the clauses that those boxes have."""
        counts = self.spans[:, 1] - self.spans[:, 0]
        return torch.arange(self.most_clauses) < counts[cases, None]


def problem_of(claim: Claim) -> Problem:
    """The claim over the boxes of its region; balls in other norms than linf are enclosed in their bounding box.

    Raises:
        MissingRule: an operation that no program can hold.
    """
    network = claim.network
    assert isinstance(network, Network)
    region = claim.region
    n = sum(node.shape.numel() if isinstance(node.shape, torch.Size) else _numel(node.shape) for node in network.inputs)
    if isinstance(region, Union):
        kept = torch.tensor(region.filled)
        low, high = (end.reshape(len(region), n)[kept] for end in (region.lower, region.upper))
        spans = torch.tensor([[0, claim.property.clauses]]).expand(len(kept), 2)
        if claim.spans is not None:
            spans = claim.spans[kept]
    else:
        box = region.box
        low, high = box.lower.reshape(1, n), box.upper.reshape(1, n)
        spans = torch.tensor([[0, claim.property.clauses]])
    program = lower(network)
    rows = rows_of(claim.property)
    return Problem(program, low, high, rows, torch.zeros_like(rows.constant), spans)


def _numel(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
