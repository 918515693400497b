"""How far an edit moved parameters, counted and measured on the weights as they are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moved:
    """How far an edit moved a parameter.

    Attributes:
        changed, of: how many entries changed, of how many.
        norm, largest: the Euclidean norm of the change, and the largest change of an entry.
        relative: the norm over that of the parameter before; infinite if that is 0.
    """

    changed: int
    of: int
    norm: float
    largest: float
    relative: float

    @staticmethod
    def between(old: Tensor, new: Tensor) -> Moved:
        """What distinguishes two versions of a parameter."""
        before, change = old.detach().double(), new.detach().double() - old.detach().double()
        norm, size, most = float(change.norm()), float(before.norm()), float(change.abs().max())
        return Moved(int((old != new).sum()), old.numel(), norm, most, norm / size if size else math.inf)
