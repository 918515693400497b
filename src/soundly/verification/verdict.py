"""What a verification can end with. Only `Proved` and `Refuted` decide the claim, and both carry their evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from soundly.certificate import Certificate


@dataclass(frozen=True)
class Effort:
    """What an answer cost.

    Attributes:
        seconds: wall-clock time.
        subproblems: how many parts of the region were bounded.
        settled: how, in words: "attack", "root bound", "input splitting", "neuron splitting".
    """

    seconds: float
    subproblems: int
    settled: str


@dataclass(frozen=True, eq=False)
class Proved:
    """The claim holds, over the reals; `certificate` was accepted by `soundly.check`."""

    certificate: Certificate
    effort: Effort


@dataclass(frozen=True, eq=False)
class Refuted:
    """The claim is false.

    Attributes:
        witness: a point of the region, in its shape, where the network violates the claim.
        outputs: the network's flat outputs there, as the original model computes them.
        violation: how deep the witness lies among the counterexamples (not negative).
        replayed: by what the witness was confirmed: "onnxruntime", "network".
    """

    witness: Tensor
    outputs: Tensor
    violation: float
    replayed: str
    effort: Effort


@dataclass(frozen=True)
class Unknown:
    """Neither proved nor refuted.

    Attributes:
        bound: the best lower bound found on how far the claim is from failing; negative, or not finite if nothing is
            known.
        open: which share of the region's volume (input splitting) or of the tree (neuron splitting) is left.
        reason: why it stopped, and what may help.
    """

    bound: float
    open: float
    reason: str
    effort: Effort


@dataclass(frozen=True)
class Empty:
    """The region holds no point, or the property no clause: nothing is claimed, nothing is wrong."""

    effort: Effort


Verdict: TypeAlias = Proved | Refuted | Unknown | Empty


@dataclass(frozen=True)
class Progress:
    """How far a verification is: `open_share` of the region or the tree is left, and `bound` is the worst there."""

    seconds: float
    subproblems: int
    open_share: float
    bound: float
