"""The split trees of a search, as they grow: what a certificate needs to replay it.

A node records what its search did: where it computed intervals anew, which rows it bounded, how it was split. It holds
no bound; whoever replays the tree finds them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

REFRESH, BOUND, CLIP, TOGETHER, SUMMED = 1, 2, 4, 8, 16
LEAF, INPUT, NEURON = 0, 1, 2

Integers = npt.NDArray[np.int64]


@dataclass(eq=False)
class Forest:
    """Nodes by number, in order of their making; a tree's root first.

    Attributes:
        case, first, last: per tree, which clauses of which case it proves.
        root: per tree, its root's number.
    """

    case: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    root: list[int] = field(default_factory=list)
    flags: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    kind: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    what: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    left: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    at: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    size: int = 0

    def _grow(self, count: int) -> Integers:
        made = np.arange(self.size, self.size + count)
        self.size += count
        if self.size > len(self.flags):
            room = max(1024, 2 * self.size)
            for name in ("flags", "kind", "what", "left", "at"):
                old = getattr(self, name)
                new = np.zeros(room, old.dtype)
                new[: len(old)] = old
                setattr(self, name, new)
        return made

    def plant(self, case: int, first: int, last: int) -> int:
        """A new tree; its root's number."""
        (root,) = self._grow(1)
        self.case.append(case)
        self.first.append(first)
        self.last.append(last)
        self.root.append(int(root))
        return int(root)

    def split(self, nodes: Integers, kind: int, what: Integers, at: npt.NDArray[np.float64]) -> Integers:
        """Splits nodes; the children [k, 2], left and right."""
        made = self._grow(2 * len(nodes)).reshape(-1, 2)
        self.kind[nodes], self.what[nodes], self.at[nodes], self.left[nodes] = kind, what, at, made[:, 0]
        return made

    def order(self, tree: int) -> Integers:
        """The nodes of a tree, level by level."""
        level = np.array([self.root[tree]])
        levels = []
        while len(level):
            levels.append(level)
            inner = level[self.kind[level] != LEAF]
            level = (self.left[inner][:, None] + np.arange(2)).reshape(-1)
        return np.concatenate(levels)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, as arrays."""
        trees = np.array([self.case, self.first, self.last, self.root], dtype=np.int64).reshape(4, -1)
        nodes = {name: getattr(self, name)[: self.size] for name in ("flags", "kind", "what", "left", "at")}
        return {"trees": trees, **nodes}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """The inverse of `state`."""
        self.case, self.first, self.last, self.root = (row.tolist() for row in state["trees"])
        self.flags, self.kind, self.what, self.left = (
            state[name].astype(np.int64) for name in ("flags", "kind", "what", "left")
        )
        self.at = state["at"].astype(np.float64)
        self.size = len(self.flags)
