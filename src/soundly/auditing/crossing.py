"""Pairs of inputs that show a dependence: equal but for some entries, as different as can be in some outputs.

First at random, at several scales. Then uphill, through a smoothed network: a jump becomes a steep sigmoid, rounding
the identity, a ReLU a softplus, each less smooth from round to round. So a trigger that almost no input meets still has
a slope that leads to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from soundly.graph import elementwise
from soundly.graph.composite import Rounding
from soundly.graph.elementwise import Elementwise
from soundly.graph.linear import Combine, scale
from soundly.graph.network import Network
from soundly.graph.node import Fill, Node
from soundly.graph.simplify import rebuild

Pair = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]

SCALES = (1.0, 0.1, 10.0, 100.0)
SHARPNESS = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5)
"""Widths of smoothed jumps, as shares of what is seen before them."""
POINTS, STARTS, STEPS = 4, 8, 40
"""Random pairs per scale, starting points uphill, steps per sharpness."""
ENTRIES = 2**26
"""How many numbers may be held at once."""


def crossings(
    network: Network, of: Sequence[Tensor], outputs: Sequence[Tensor], *, example: Sequence[Tensor] | None = None
) -> Iterator[Pair]:
    """Pairs of inputs that differ in `of` alone and seem to change `outputs`, the likeliest first.

    Args:
        of: bool per input.
        outputs: bool per output.
        example: inputs of the usual size; zeros if None.

    Returns:
        Inputs that the network's type holds, in float64; whoever believes them checks them.
    """
    search = _Search(network, of, outputs, example)
    yield from search.random()
    yield from search.uphill()


class _Search:
    def __init__(
        self, network: Network, of: Sequence[Tensor], outputs: Sequence[Tensor], example: Sequence[Tensor] | None
    ) -> None:
        self.network, self.dtype = network.to(torch.float64), network.dtype
        self.sizes = [math.prod(node.shape) for node in network.inputs]
        self.of = torch.cat([mask.reshape(-1) for mask in of]).to(network.device)
        self.watched = torch.cat([mask.reshape(-1) for mask in outputs]).to(network.device)
        base = [torch.zeros(n.shape) for n in network.inputs] if example is None else example
        self.centre = torch.cat([v.reshape(-1).double() for v in base]).to(network.device)
        self.chunk = max(1, ENTRIES // sum(math.prod(node.shape) for node in network.nodes))
        self.generator = torch.Generator().manual_seed(0)

    def random(self) -> Iterator[Pair]:
        """All scales of the common part with all scales of the difference."""
        scales = torch.cartesian_prod(*[torch.tensor(SCALES, dtype=torch.float64)] * 2).repeat_interleave(POINTS, 0)
        yield from self._best(
            *(self.centre + size[:, None] * self._noise(len(size)) for size in scales.to(self.centre).T)
        )

    def uphill(self) -> Iterator[Pair]:
        """Ascent of the difference's logarithm in both inputs, through smoothed networks."""
        count = max(1, min(STARTS, self.chunk // 4) // len(SCALES))
        size = torch.tensor(SCALES, dtype=torch.float64, device=self.centre.device).repeat_interleave(count)[:, None]
        x, u = (self._noise(len(size)) for _ in range(2))
        widths = self._widths(torch.cat([self.centre + size * v for v in (x, torch.where(self.of, u, x))]))
        for share in SHARPNESS if widths else ():
            smooth = _smoothed(self.network, {node: share * width for node, width in widths.items()})
            x, u = x.detach().requires_grad_(), u.detach().requires_grad_()
            optimiser = torch.optim.Adam([x, u], lr=0.1 * min(1.0, 10 * share))
            for _ in range(STEPS):
                loss = -torch.log(self._gap(smooth, self.centre + size * x, self.centre + size * u) + 1e-200).sum()
                if not bool(torch.isfinite(loss)):
                    break
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            yield from self._best(*(self.centre + size * v.detach() for v in (x, u)))

    def _noise(self, count: int) -> Tensor:
        noise = torch.randn((count, len(self.centre)), generator=self.generator, dtype=torch.float64)
        return noise.to(self.centre.device)

    def _gap(self, network: Network, x: Tensor, u: Tensor) -> Tensor:
        """How far the watched outputs lie apart [k], relative to the outputs."""
        ends = []
        for points in (x, torch.where(self.of, u, x)):
            found = self._values(network, list(network.outputs), points)
            ends.append(torch.cat([v.flatten(1) for v in found], 1)[:, self.watched])
        a, b = ends
        return (a - b).abs().sum(1) / (1 + a.abs().sum(1) + b.abs().sum(1))

    def _values(self, network: Network, nodes: Sequence[Node], points: Tensor) -> tuple[Tensor, ...]:
        def one(x: Tensor) -> tuple[Tensor, ...]:
            parts = [v.reshape(n.shape) for v, n in zip(x.split(self.sizes), network.inputs, strict=True)]
            return network.evaluate(nodes, *parts)

        return torch.vmap(one, chunk_size=self.chunk)(points)  # type: ignore[no-any-return]

    def _best(self, x: Tensor, u: Tensor) -> Iterator[Pair]:
        """The pairs with the greatest differences, as the network's type holds them."""
        first = x.to(self.dtype).double()
        second = torch.where(self.of, u.to(self.dtype).double(), first)
        with torch.no_grad():
            gap = self._gap(self.network, first, second).nan_to_num(nan=0.0)
        for k in gap.argsort(descending=True)[:3].tolist():
            if bool(gap[k] > 0):
                yield self._inputs(first[k]), self._inputs(second[k])

    def _inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = zip(x.cpu().split(self.sizes), self.network.inputs, strict=True)
        return tuple(v.reshape(node.shape) for v, node in parts)

    def _widths(self, points: Tensor) -> dict[Node, float]:
        """What has to be smoothed, and the spread of what it is applied to."""
        nodes = [n for n in self.network.nodes if _is_sharp(n)]
        with torch.no_grad():
            seen = self._values(self.network, [n.inputs[0] for n in nodes], points) if nodes else ()
        return {n: max(1e-6, float(v.nan_to_num().abs().median())) for n, v in zip(nodes, seen, strict=True)}


def _is_sharp(node: Node) -> bool:
    """A ReLU, a rounding, or a function that is constant between its jumps."""
    op = node.op
    steps = isinstance(op, Elementwise) and bool(op.breaks) and op.derivative.is_zero
    return steps or op == elementwise.RELU or isinstance(op, Rounding)


def _smoothed(network: Network, widths: dict[Node, float]) -> Network:
    """The network with jumps, kinks and roundings smoothed over a width each."""

    def rule(old: Node, node: Node) -> Node:
        if old not in widths:
            return node
        (x,), op, width = node.inputs, node.op, widths[old]
        if not isinstance(op, Elementwise):
            return x
        narrow = scale(x, 1 / width)
        if op == elementwise.RELU:
            return scale(elementwise.SOFTPLUS(narrow), width)
        levels = [sum(c for _, c in piece) for piece in op.pieces]
        rises = [elementwise.SIGMOID(Combine((1.0, -1.0))(narrow, Fill(t / width, x.shape)())) for t in op.breaks]
        jumps = tuple(b - a for a, b in pairwise(levels))
        return Combine((*jumps, 1.0))(*rises, Fill(levels[0], x.shape)())

    new = rebuild(network.outputs, rule)
    return replace(network, outputs=tuple(new[node] for node in network.outputs))
