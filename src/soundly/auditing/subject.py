"""A recipe under examination: its network, its program, and points of its box with their values, computed once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from soundly.auditing.recipes import Recipe
from soundly.bounds.batch import Bounder
from soundly.bounds.lower import lower
from soundly.bounds.program import Function, Program
from soundly.graph.network import Network
from soundly.graph.node import Node
from soundly.spec.claim import Claim, within
from soundly.spec.region import Box, join

F64 = torch.float64
POINTS, GRID = 24, 17
"""Random points per box, and points per axis of the grid where at most two entries vary."""
ROUNDING = 1e-9
"""What rounding may add to a comparison, times the largest value met: far above float64's, far below a fault's."""

SAMPLED = 4.0
"""On wider intervals the search's lines of curved functions are no bounds."""


@dataclass(eq=False)
class Subject:
    """A recipe with what several oracles need of it, computed once."""

    recipe: Recipe

    @cached_property
    def network(self) -> Network:
        return self.recipe.network()

    @cached_property
    def region(self) -> dict[Node, tuple[Tensor, Tensor]]:
        return dict(zip(self.network.inputs, zip(*self.recipe.box, strict=True), strict=True))

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The box of the flattened inputs, joined."""
        low, high = (torch.cat([v.reshape(-1) for v in side]) for side in self.recipe.box)
        return low, high

    @cached_property
    def points(self) -> Tensor:
        """Points [k, n] of the box: corners, random ones, and a grid where few entries vary."""
        low, high = self.ends
        box = Box(low, high)
        parts = [box.corners(16), box.samples(POINTS), (low / 2 + high / 2)[None]]
        vary = (low < high).nonzero()[:, 0]
        if 0 < len(vary) <= 2:
            axes = torch.cartesian_prod(*[torch.linspace(0, 1, GRID, dtype=F64)] * len(vary)).reshape(-1, len(vary))
            grid = low.expand(len(axes), -1).clone()
            grid[:, vary] = low[vary] + axes * (high - low)[vary]
            parts.append(grid.minimum(high))
        return torch.cat(parts)

    def values(self, nodes: list[Node], points: Tensor, network: Network | None = None) -> list[Tensor]:
        """The nodes' values [k, *shape] at points [k, n]."""
        network = network or self.network
        sizes = [math.prod(node.shape) for node in network.inputs]

        def one(x: Tensor) -> tuple[Tensor, ...]:
            parts = [v.reshape(n.shape) for v, n in zip(x.split(sizes), network.inputs, strict=True)]
            return network.evaluate(nodes, *parts)

        return list(torch.vmap(one)(points))

    @cached_property
    def program(self) -> Program:
        return lower(self.network, region=self.region)

    @cached_property
    def steps(self) -> list[Tensor]:
        """The values of all steps of the program at the points; only points where all are finite."""
        found = self.program.evaluate(self.points)
        finite = torch.stack([torch.isfinite(v).all(1) for v in found]).all(0)
        return [v[finite] for v in found]

    @cached_property
    def kept(self) -> Tensor:
        """Those points."""
        return self.steps[0]

    @cached_property
    def room(self) -> Tensor:
        """[k]: what rounding may add at each point."""
        return ROUNDING * (1 + torch.stack([v.abs().amax(1) for v in self.steps]).amax(0))

    @cached_property
    def approximate(self) -> bool:
        """Whether a curved function has a wide interval, on which the search's lines come from samples and may err: it
        says so, and its checker has lines of its own."""
        low, high = (end[None] for end in self.ends)
        frame = Bounder(self.program).refresh(low, high)
        return any(
            isinstance(step, Function) and not step.op.derivative.derivative.is_zero
            and bool((frame.upper[step.source] - frame.lower[step.source] > SAMPLED).any())
            for step in self.program.steps
        )  # fmt: skip

    def claim(self, below: float, entry: int) -> Claim:
        """That an output entry is at least a number."""
        size = sum(math.prod(node.shape) for node in self.network.outputs)
        least = torch.full((size,), -math.inf, dtype=F64)
        least[entry] = below
        boxes = [Box(a, b) for a, b in zip(*self.recipe.box, strict=True)]
        return within(self.network, boxes[0] if len(boxes) == 1 else join(*boxes), least, None)
