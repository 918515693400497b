"""From a grid to its box: what holds at all points of a grid by more than a row can fall on the way holds everywhere.

Huang et al. assume of their discretisation that nothing happens between its points; here that is a claim of its own, a
bound on the gradient, with a certificate of its own. Two proofs, of other networks than the direct one, reach the same
conclusion: an audit of it. As a way to decide it is the slower one, as docs/verification.md shows.

Reference: Huang et al., "Safety Verification of Deep Neural Networks", CAV 2017 (DLV).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soundly.bounds.program import Function
from soundly.errors import InvalidInput
from soundly.explanation.certified import MapBounds, certify_map
from soundly.graph.linear import Concat, Gather, reshape
from soundly.graph.network import Network
from soundly.graph.node import Constant, Node
from soundly.graph.product import Dense
from soundly.graph.simplify import simplify
from soundly.spec.claim import Claim
from soundly.spec.grid import Grid
from soundly.spec.region import Box
from soundly.verification.problem import problem_of
from soundly.verification.verdict import Proved, Refuted, Verdict
from soundly.verification.verify import verify


@dataclass(frozen=True, eq=False)
class Continuum:
    """What a grid says about its box.

    Attributes:
        holds: whether the claim holds on the whole box: both proofs are there. Never a reason to believe the opposite.
        counterexample: a point of the grid where the claim itself fails, if one was found.
        grid: the points, and what each of them stands for: the box within half a step of it.
        steepness: the derivatives of the rows by the varying inputs on the box [rows, entries], with verdict and claim.
        fall: by how much each row can fall between a point and the edge of its box [rows].
        verdict: on `claim`, which is the original one at the grid's points with that much to spare.
    """

    holds: bool
    counterexample: Tensor | None
    grid: Grid
    steepness: MapBounds
    fall: Tensor
    verdict: Verdict
    claim: Claim


def from_grid(claim: Claim, levels: int | Sequence[int], *, timeout: float | None = None) -> Continuum:
    """Proves a claim over a box from the points of a grid and from bounds on the gradient.

    A row s with derivatives between the bounds satisfies s(x) >= s(g) - sum of |ds/dx_i| |x_i - g_i|, and of some point
    g of the grid x is no farther than half a step in each entry. So a clause that has at every g a row above what that
    row can fall has a positive row everywhere.

    Args:
        claim: over a Box, about a continuous network with one input.
        levels: how many of each varying entry, or a number for each; see `Grid.evenly`.
        timeout: seconds, for both proofs together.

    Raises:
        InvalidInput: the region is no box, or a function of the network jumps: derivatives do not see that.
    """
    network, box = claim.network, claim.region
    if not isinstance(box, Box) or box.is_empty or not isinstance(network, Network):
        raise InvalidInput("from_grid: give a claim over a Box that holds a point, with its network.")
    _require_continuous(claim)
    begun = time.monotonic()
    grid = Grid.evenly(box, levels)
    entries = [int(choice.entries) for choice in grid.choices]
    steep = certify_map(_derivatives(claim, entries), box, timeout=timeout)
    rows = claim.property
    of_inputs = rows.x.dense(len(rows), rows.inputs)[:, entries]
    largest = torch.maximum((steep.lower + of_inputs).abs(), (steep.upper + of_inputs).abs())
    half = torch.stack([choice.options[:, 0].diff().amax() / 2 for choice in grid.choices])
    fall = (largest * half).sum(1) * (1 + 1e-12)
    infinity = torch.full_like(fall, math.inf)
    spared = replace(rows, b=torch.nextafter(rows.b - fall, -infinity), exact=None)
    on_grid = Claim(network, grid, spared, name=f"{claim.name}, {fall.max():.3g} to spare")
    left = None if timeout is None else max(timeout - (time.monotonic() - begun), 1e-3)
    verdict = verify(on_grid, timeout=left)
    point = verdict.witness if isinstance(verdict, Refuted) and not claim.holds_at(verdict.witness) else None
    holds = isinstance(steep.verdict, Proved) and isinstance(verdict, Proved)
    return Continuum(holds, point, grid, steep, fall, verdict, on_grid)


def _derivatives(claim: Claim, entries: Sequence[int]) -> Network:
    """Those of the rows' outputs by some entries of the input: [rows, entries]."""
    assert isinstance(claim.network, Network)
    network, rows = claim.network.to(torch.float64), claim.property  # which holds its weights and the rows' exactly
    outputs = [reshape(node, (math.prod(node.shape),)) for node in network.outputs]
    weight = rows.y.dense(len(rows), rows.outputs)
    matrix = Constant("rows", tuple(weight.shape))()
    values = {**network.values, matrix: weight.to(network.device)}
    scores = Dense()(Concat(0)(*outputs), matrix)
    whole = replace(network, outputs=(scores,), values=values)
    found: list[Node] = []
    for r in range(len(rows)):
        gradient = whole.gradient(of=r)
        values |= gradient.values
        flat = reshape(gradient.output, (math.prod(gradient.output.shape),))
        found.append(reshape(Gather(0, tuple(entries))(flat), (1, len(entries))))
    return simplify(replace(whole, outputs=(Concat(0)(*found),), values=values, name=f"slopes of {network.name}"))


def _require_continuous(claim: Claim) -> None:
    for step in problem_of(claim).program.steps:
        if isinstance(step, Function) and any(low != high for _, low, high in step.op.special_points):
            raise InvalidInput(f"from_grid: {step.op} jumps, which no derivative tells of; verify the claim directly.")
