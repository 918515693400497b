"""What a certificate needs to know of tightened intervals, as a search collects it: flat arrays, one row per bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from soundly.verification.proof import Rounds


@dataclass(frozen=True, eq=False)
class Bounds:
    """Bounds that tightened intervals, in the order of their making.

    Attributes:
        node, round, key: [R], of which node, in which round, 2 * neuron + side.
        slopes: [R, slots].
        rows, force: [R] and [R, most rows], multipliers of the clause's rows: so many.
        depth, beta: [R] and [R, most constraints], multipliers of the constraints on the node's path.
    """

    node: Tensor
    round: Tensor
    key: Tensor
    slopes: Tensor
    rows: Tensor
    force: Tensor
    depth: Tensor
    beta: Tensor

    def _asdict(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def join(found: Sequence[Bounds]) -> Bounds:
        deepest = max(b.beta.shape[1] for b in found)
        joined = {f.name: [getattr(b, f.name) for b in found] for f in fields(Bounds)}
        joined["beta"] = [torch.cat([v, v.new_zeros(len(v), deepest - v.shape[1])], 1) for v in joined["beta"]]
        return Bounds(**{name: torch.cat(values) for name, values in joined.items()})

    def rounds(self, first: int) -> dict[int, Rounds]:
        """Node -> its bounds; the rows of slopes are counted from `first`."""
        nodes = {}
        order = self.node.argsort(stable=True)
        for some in order.split(self.node[order].unique_consecutive(return_counts=True)[1].tolist()):
            rows, depth = int(self.rows[some[0]]), int(self.depth[some[0]])
            force = torch.cat([self.force[some, :rows], self.beta[some, :depth]], 1)
            nodes[int(self.node[some[0]])] = Rounds(
                self.round[some].numpy(), self.key[some].numpy(), (first + some).numpy(), force.double().numpy()
            )
        return nodes


def bounds_found(
    node: Tensor, turn: int, key: Tensor, slopes: Tensor, own: Tensor, force: Tensor, depth: Tensor, beta: Tensor
) -> Bounds:
    """The bounds of one step, found together.

    Args:
        own: [R, all rows], which rows belong to the node's clause; `force` has multipliers of all of them.
    """
    rank = (~own).to(torch.uint8).sort(dim=1, stable=True).indices  # the clause's rows, in order, come first
    every = node, torch.full_like(key, turn), key, slopes, own.sum(1), force.gather(1, rank), depth, beta
    order = key.argsort(stable=True)
    order = order[node[order].argsort(stable=True)]
    return Bounds(*(v[order] for v in every))
