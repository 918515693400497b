"""Changes of low rank: weights W + U V with V fixed, so that everything stays linear in U.

V has orthonormal rows, hence |U V| = |U|, and the smallest change among those of the form U V is the smallest change
for rows whose gradients are projected onto that form. Which V is a choice: here the leading right singular vectors of
the smallest change without a limit to its rank, the ones that the constraints ask for most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soundly.graph.node import Node


@dataclass(frozen=True, eq=False)
class LowRank:
    """A subspace of changes: of each matrix (or kernel, flattened behind its first axis) U V, of vectors anything.

    Attributes:
        unknowns: the leaves that change, flattened one after another.
        bases: V [rank, columns] for each of them; None for vectors.
    """

    unknowns: tuple[Node, ...]
    bases: tuple[Tensor | None, ...]

    @staticmethod
    def around(unknowns: Sequence[Node], change: Tensor, rank: int) -> LowRank:
        """The subspace whose V are the leading right singular vectors of a change [n]."""
        bases: list[Tensor | None] = []
        for node, part in zip(unknowns, _split(unknowns, change), strict=True):
            matrix = part.reshape(node.shape[0], -1) if len(node.shape) > 1 else None
            bases.append(None if matrix is None else torch.linalg.svd(matrix, full_matrices=False).Vh[:rank])
        return LowRank(tuple(unknowns), tuple(bases))

    def __call__(self, rows: Tensor) -> Tensor:
        """Each row [k, n], or change [n], projected."""
        parts = []
        for part, node, basis in zip(_split(self.unknowns, rows), self.unknowns, self.bases, strict=True):
            if basis is not None:
                matrix = part.reshape(*part.shape[:-1], node.shape[0], -1)
                part = (matrix @ basis.T @ basis).reshape(part.shape)
            parts.append(part)
        return torch.cat(parts, -1)


def _split(unknowns: Sequence[Node], flat: Tensor) -> tuple[Tensor, ...]:
    return flat.split([torch.Size(n.shape).numel() for n in unknowns], -1)
