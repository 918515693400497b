"""The one search for minimal sets, of features of an input or of neurons of a pattern.

Each member of a set is kept, or freed: a kept feature does not move, a kept neuron has the sign that a pattern says.
Freeing more can only break a claim: a proof for one set of free members proves every smaller one, a counterexample
refutes every larger one. Bounds of many sets at once free blocks of members, then single ones, until none can be freed
any more; a complete verifier goes on from there. What the search ends with has been proved by that verifier.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from soundly.spec.claim import Claim
from soundly.verification.replay import replay
from soundly.verification.verdict import Proved, Refuted, Verdict

PREFIXES = 48
"""How many sets of growing size are bounded at once."""
WORTH = 0.05
"""Blocks are freed as long as one of them holds this share of what is left."""
PATIENCE = 30.0
"""Seconds for the proof of a set that bounds say is sufficient."""


class Oracle(Protocol):
    """What the search asks about sets; `free` is bool [members], or [k, members] for k sets.

    Attributes:
        margin: what a bound must exceed to count here; the verifier has the last word.
    """

    margin: float

    @property
    def features(self) -> int:
        """How many members there are."""

    def bounds(self, free: Tensor) -> Tensor:
        """[k]: by how much no counterexample exists."""

    def costs(self, free: Tensor) -> Tensor:
        """[members]: what freeing each costs, roughly; the cheapest are freed first."""

    def refer(self, free: Tensor) -> None:
        """Chooses bounds that are good where these are free."""

    def claim(self, free: Tensor) -> Claim:
        """What is to be proved where these are free."""

    def decide(self, claim: Claim, timeout: float | None, attack: bool) -> Verdict:
        """The complete verifier."""

    def violated(self, x: Tensor) -> Tensor:
        """bool [members]: a counterexample, flat, refutes every set in which these are free."""

    def near(self, free: Tensor) -> Tensor:
        """A point [k, inputs] for each set, perhaps a counterexample."""


@dataclass(frozen=True, eq=False)
class Minimal:
    """A set that cannot be freed further, as far as it was tried.

    Attributes:
        free: bool [members].
        verdict: on `claim`, that of this set.
        minimal: whether it is proved, and each kept member was tried.
        verifier: by what: bounds, or a search of so many seconds each.
        witnesses: by kept member a counterexample, flat, to freeing it besides the others.
        seconds: of wall-clock time.
    """

    free: Tensor
    verdict: Verdict
    claim: Claim
    minimal: bool
    verifier: str
    witnesses: Mapping[int, Tensor]
    seconds: float


def minimal(oracle: Oracle, fixed: Tensor, *, search: float, timeout: float | None) -> Minimal:
    """Frees members as long as the claim stays proved.

    Args:
        fixed: bool [members], which stay kept.
        search: seconds of the complete verifier for each member that bounds cannot free.
        timeout: seconds after which the search stops; the set found so far is still proved.
    """
    return _Search(oracle, fixed, search, timeout).found()


@dataclass(eq=False)
class _Search:
    oracle: Oracle
    fixed: Tensor
    search: float
    timeout: float | None
    witnesses: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begun = time.monotonic()
        self.deadline = math.inf if self.timeout is None else self.begun + self.timeout
        self.free = torch.zeros_like(self.fixed)
        self.minimal = False
        self.proof: tuple[Tensor, Verdict] | None = None

    def found(self) -> Minimal:
        self._blocks()
        self._singles()
        if self.search > 0 and self.minimal:
            self._complete()
        verdict, claim = self._proved()
        witnesses = {}
        for i in (~self.free).nonzero().flatten().tolist():
            found = next((x for violated, x in self.witnesses if not bool((violated & ~self._more(i)).any())), None)
            if found is not None:
                witnesses[i] = found
        return Minimal(
            self.free, verdict, claim, self.minimal and isinstance(verdict, Proved),
            f"verify, {self.search:g} s each" if self.search > 0 else "linear bounds", witnesses,
            time.monotonic() - self.begun,
        )  # fmt: skip

    @property
    def open(self) -> Tensor:
        """The members that may still be freed."""
        return (~self.free & ~self.fixed).nonzero().flatten()

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    # ---------------------------------------------------------------- linear bounds

    def _blocks(self) -> None:
        """Frees as many of the cheapest members as bounds allow, and again with slopes that suit what is free."""
        tried = False
        while len(left := self.open) and not self.late:
            gained = self._prefix(left[self.oracle.costs(self.free)[left].argsort()])
            if not gained and (tried or bool(self.free.any())):
                return
            tried = True
            self.oracle.refer(self.free)
            if gained and gained < WORTH * len(left):
                return

    def _singles(self) -> None:
        """Frees what can be freed alone, those first that cost least, until with fresh slopes nothing can."""
        waiting, fresh = self.open, True
        while len(waiting) and not self.late:
            alone = self._with(waiting)
            bounds = self.oracle.bounds(alone)
            proved = bounds > self.oracle.margin
            waiting = waiting[proved][bounds[proved].argsort(descending=True)]
            if len(waiting):
                count = max(1, self._prefix(waiting))
                self.free = self.free.clone()
                self.free[waiting[:count]] = True
                waiting, fresh = waiting[count:], False
            if not len(waiting) and not fresh:
                self.oracle.refer(self.free)
                waiting, fresh = self.open, True
        self.minimal = not self.late

    def _prefix(self, order: Tensor) -> int:
        """Frees the largest of some prefixes that bounds prove; how many that are."""
        n = len(order)
        lengths = torch.linspace(n, 1, min(n, PREFIXES)).round().long()
        rank = torch.full_like(self.free, n, dtype=torch.int64)
        rank[order] = torch.arange(n)
        sets = self.free | (rank < lengths[:, None])
        proved = (self.oracle.bounds(sets) > self.oracle.margin).nonzero().flatten()
        if not len(proved):
            return 0
        self.free = sets[proved[0]]
        return int(lengths[proved[0]])

    def _with(self, members: Tensor) -> Tensor:
        """[k, features]: what is free, and one more."""
        sets = self.free.repeat(len(members), 1)
        sets[torch.arange(len(members)), members] = True
        return sets

    # ---------------------------------------------------------------- the complete verifier

    def _complete(self) -> None:
        """Tries each member that is left by a search, unless a counterexample is known."""
        order = self.open
        if not len(order):
            return
        bounds = self.oracle.bounds(self._with(order))
        near = self.oracle.near(self._with(order))
        for i, point in zip(order.tolist(), near, strict=True):
            found = None if self._refuted(i) else replay(self.oracle.claim(self._more(i)), point)
            if found is not None:
                self._learn(found.x)
        for i in order[bounds.argsort(descending=True)].tolist():
            if self._refuted(i):
                continue
            left = self.deadline - time.monotonic()
            if left <= 0:
                self.minimal = False
                return
            seconds = min(self.search, left)
            verdict = self.oracle.decide(
                self.oracle.claim(self._more(i)), None if seconds == math.inf else seconds, True
            )
            if isinstance(verdict, Proved):
                self.free = self._more(i)
                self.proof = self.free, verdict
            elif isinstance(verdict, Refuted):
                self._learn(verdict.witness)

    def _more(self, member: int) -> Tensor:
        """What is free, and one more."""
        free = self.free.clone()
        free[member] = True
        return free

    def _learn(self, x: Tensor) -> None:
        self.witnesses.append((self.oracle.violated(x.reshape(-1)), x.reshape(-1)))

    def _refuted(self, member: int) -> bool:
        """Whether a known counterexample needs nothing but this one and what is free."""
        free = self._more(member)
        return any(not bool((violated & ~free).any()) for violated, _ in self.witnesses)

    # ---------------------------------------------------------------- the proof

    def _proved(self) -> tuple[Verdict, Claim]:
        """The verdict on what is free; as long as it is not proved, ever more members are kept again."""
        back = 1
        while True:
            claim = self.oracle.claim(self.free)
            if self.proof is not None and torch.equal(self.proof[0], self.free):
                return self.proof[1], claim
            verdict = self.oracle.decide(claim, PATIENCE, False)
            if isinstance(verdict, Proved) or not bool(self.free.any()):
                return verdict, claim
            if isinstance(verdict, Refuted):
                self._learn(verdict.witness)
            self.minimal = False
            freed = self.free.nonzero().flatten()
            self.free = self.free.clone()
            self.free[freed[self.oracle.costs(self.free)[freed].argsort(descending=True)[:back]]] = False
            back *= 2
