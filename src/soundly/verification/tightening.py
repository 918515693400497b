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
    node: Tensor, turn: int, key: Tensor, slopes: Tensor, rows: tuple[Tensor, Tensor], splits: tuple[Tensor, Tensor]
) -> Bounds:
    """The bounds of one step, found together.

    Args:
        rows, splits: [R, m] each, which of the case's rows belong to the node's clause, or which constraints there are
            on its path, and the multipliers of all.
    """
    counts, forces = [], []
    for own, force in (rows, splits):  # those that count come first, in their order
        counts.append(own.sum(1))
        forces.append(torch.where(own, force, 0.0).gather(1, (~own).to(torch.uint8).sort(dim=1, stable=True).indices))
    order = key.argsort(stable=True)
    order = order[node[order].argsort(stable=True)]
    every = node, torch.full_like(key, turn), key, slopes, counts[0], forces[0], counts[1], forces[1]
    return Bounds(*(v[order] for v in every))
