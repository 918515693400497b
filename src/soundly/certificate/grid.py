"""Grids, rigorous: what the points of a grid leave of boxes.

All that is done here is to compare numbers, so nothing is rounded.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

AT_ONCE = 2**24  # comparisons


@dataclass(frozen=True, eq=False)
class Grid:
    """All x whose entries `entries[g]` [m] equal a row of `options[g]` [k, m], for every g."""

    entries: tuple[Array, ...]
    options: tuple[Array, ...]

    def narrowed(self, low: Array, high: Array) -> tuple[Array, Array]:
        """Boxes [k, n] around the grid's points in boxes; some ends are crossed only where there is none."""
        low, high = low.copy(), high.copy()
        for entries, options in zip(self.entries, self.options, strict=True):
            size = max(1, AT_ONCE // options.size)
            for begin in range(0, len(low), size):
                a, b = (end[begin : begin + size, None, entries] for end in (low, high))
                inside = np.all((options >= a) & (options <= b), axis=2)[:, :, None]
                some = inside.any(axis=1)
                first = np.where(inside, options, np.inf).min(axis=1)
                last = np.where(inside, options, -np.inf).max(axis=1)
                low[begin : begin + size, entries] = np.where(some, first, 1.0)
                high[begin : begin + size, entries] = np.where(some, last, 0.0)
        return low, high

    @property
    def size(self) -> int:
        """How many ways there are to choose."""
        count = 1
        for options in self.options:
            count *= len(options)
        return count
