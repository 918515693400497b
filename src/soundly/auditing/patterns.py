"""Neural activation patterns as specifications: which inner values are on (v >= 0) and which are off (v <= 0).

A pattern is mined from samples of a class and describes a region of inputs, often far larger than a ball around one of
them. What follows a pattern is a condition of inner values, and so part of a claim: its rows join every clause, and
`soundly.verify`, certificates and replayed witnesses stay what they are.

Reference: Geng et al., "Towards Reliable Neural Specifications", ICML 2023; Geng et al., "Learning Minimal Neural
Specifications", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.graph.elementwise import RELU, Elementwise
from soundly.graph.network import Network
from soundly.graph.node import Node
from soundly.spec.claim import Claim, Property, Region, Row, Terms
from soundly.verification.verdict import Empty, Proved, Refuted, Unknown, Verdict
from soundly.verification.verify import verify

AT_ONCE = 256
"""How many samples are evaluated together."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """Inner values of a network with their required signs; closed half-spaces, which meet at 0.

    Attributes:
        network: whose values they are.
        layers: nodes of its graph; their entries, flattened and joined, are the neurons.
        sign: [neurons], int8: +1 for v >= 0, -1 for v <= 0, 0 where nothing is required.
    """

    network: Network
    layers: tuple[Node, ...]
    sign: Tensor

    def __post_init__(self) -> None:
        if tuple(self.sign.shape) != (_size(self.layers),) or not bool((self.sign.abs() <= 1).all()):
            raise InvalidInput(f"sign needs one entry -1, 0 or +1 for each of {_size(self.layers)} neurons.")
        outside = [node for node in self.layers if node not in self.network.nodes]
        if outside:
            raise InvalidInput(f"layers: {outside[0]!r} is no value that {self.network.name} computes.")

    def __len__(self) -> int:
        return int((self.sign != 0).sum())

    @property
    def share(self) -> float:
        """Which share of the neurons it fixes."""
        return len(self) / max(1, len(self.sign))

    def keeping(self, literals: Tensor) -> Pattern:
        """The weaker pattern that requires only some: bool [neurons]."""
        return replace(self, sign=torch.where(literals, self.sign, 0))

    def follows(self, inputs: Tensor) -> Tensor:
        """Which inputs [k, *input] have these signs, evaluated in the network's own type: bool [k]."""
        held = []
        for values in _values(self.network, self.layers, inputs):
            signed = values * self.sign.to(values)
            held.append(((signed >= 0) | (self.sign == 0)).all(1))
        return torch.cat(held) if held else torch.zeros(0, dtype=torch.bool)


@dataclass(frozen=True)
class Measured:
    """A rate on samples: measured, not proved, for this pattern and these inputs.

    Attributes:
        hits, count: how many of how many.
        lower, upper: the exact 95% interval of the underlying rate (Clopper and Pearson, Biometrika 1934), if the
            inputs are independent of whatever the pattern was mined from.
    """

    hits: int
    count: int

    @property
    def rate(self) -> float:
        return self.hits / self.count if self.count else math.nan

    @cached_property
    def _ends(self) -> tuple[float, float]:
        from scipy.stats import beta

        k, n = self.hits, self.count
        low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
        return low, float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0

    @property
    def lower(self) -> float:
        return self._ends[0]

    @property
    def upper(self) -> float:
        return self._ends[1]


def mine(
    network: Network, inputs: Tensor, *, delta: Fraction | str | int = 1, layers: Sequence[Node | str] | None = None
) -> Pattern:
    """The pattern of some inputs, say all of one class: on where a share of at least delta has v > 0, off where a
    share of at least delta has v <= 0.

    Args:
        inputs: [k, *input], of the network's type.
        delta: a fraction such as "0.95" or Fraction(19, 20), compared with exact counts; above 1/2, at most 1. At 1 a
            neuron is fixed only if there is no exception. Lower ones fix more neurons, and describe fewer inputs.
        layers: values, or the places of modules; of an activation function what it reads. What all of the network's
            ReLUs read, if None.

    How many inputs follow all of it at once is another matter: see `recall`.
    """
    if isinstance(delta, float):
        raise InvalidInput(f'delta is the float {delta!r}, which is not the decimal it looks like; write "{delta!r}".')
    share = Fraction(delta)
    if not Fraction(1, 2) < share <= 1:
        raise InvalidInput(f"delta is {delta}; give a fraction above 1/2, at most 1.")
    nodes = _layers(network, layers)
    on, count = torch.zeros(_size(nodes), dtype=torch.int64), 0
    for values in _values(network, nodes, inputs):
        if not bool(torch.isfinite(values).all()):
            raise InvalidInput("inputs: an inner value is not finite there.")
        on += (values > 0).sum(0)
        count += len(values)
    if not count:
        raise InvalidInput("inputs is empty: there is nothing to mine a pattern from.")
    needed = -(-share.numerator * count // share.denominator)  # the least whole number of at least share * count
    sign = (on >= needed).to(torch.int8) - (count - on >= needed).to(torch.int8)
    return Pattern(network, nodes, sign)


def recall(pattern: Pattern, inputs: Tensor) -> Measured:
    """How many inputs of the pattern's class, [k, *input], follow it."""
    return Measured(int(pattern.follows(inputs).sum()), len(inputs))


def precision(pattern: Pattern, inputs: Tensor, labels: Tensor, label: int) -> Measured:
    """How many of the inputs that follow a pattern are of its class."""
    followers = pattern.follows(inputs)
    return Measured(int((labels[followers] == label).sum()), int(followers.sum()))


# -- claims


def under(claim: Claim, *patterns: Pattern) -> Claim:
    """The claim, for those inputs that follow all of some patterns: their signs become rows of every clause.

    The network of the new claim computes the layers as well. Everything is exact; ties count against the claim, at 0
    both signs hold.
    """
    network, required = joint(claim, *patterns)
    rows = joined(claim.property, list(dict.fromkeys(required)), _size(network.outputs))
    name = f"{claim.name}, under {' and '.join(f'a pattern of {len(p)} neurons' for p in patterns)}"
    return Claim(network, claim.region, rows, claim.spans, claim.assumptions, name)


def joint(claim: Claim, *patterns: Pattern) -> tuple[Network, list[tuple[int, int]]]:
    """The network of a claim with the layers of patterns as further outputs; of every required sign, in order, the
    position among the flattened outputs, and the sign."""
    network = claim.network
    if not isinstance(network, Network):
        raise InvalidInput(f"{claim.name} was read without its network; give it as well.")
    outputs, required = list(network.outputs), []
    for pattern in patterns:
        start = 0
        for node in pattern.layers:
            sign = pattern.sign[start : start + _size([node])]
            start += len(sign)
            if not bool(sign.any()):
                continue
            if node not in network.nodes:
                raise InvalidInput(f"{node!r} of a pattern is no value that {network.name} computes.")
            if node not in outputs:
                outputs.append(node)
            first = _size(outputs[: outputs.index(node)])
            required += [(first + k, int(sign[k])) for k in sign.nonzero()[:, 0].tolist()]
    return network.with_outputs(*outputs), required


def joined(property: Property, required: Sequence[tuple[int, int]], outputs: int) -> Property:
    """A property with one row more for each required sign in every clause: -v <= 0 or v <= 0."""
    d, m, clauses = len(required), len(property), property.clauses
    clause = torch.cat([property.clause, torch.arange(clauses).repeat_interleave(d)])
    clause, order = clause.sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    column = torch.tensor([k for k, _ in required], dtype=torch.int64).repeat(clauses)
    value = torch.tensor([-float(s) for _, s in required], dtype=torch.float64).repeat(clauses)
    y, x = property.y, property.x
    rows = torch.cat([place[y.row], place[m:]])
    ascending = rows.argsort(stable=True)
    joined = Terms(rows[ascending], torch.cat([y.column, column])[ascending], torch.cat([y.value, value])[ascending])
    of_input = place[x.row]
    ascending = of_input.argsort(stable=True)
    extra = torch.zeros(d * clauses, dtype=torch.float64)
    exact = None
    if property.exact is not None:
        signs = [Row({k: Fraction(-s)}, {}, Fraction(0)) for k, s in required] * clauses
        exact = tuple(([*property.exact, *signs])[i] for i in order.tolist())
    inexact = None
    if property.inexact is not None:
        inexact = torch.cat([property.inexact, extra.bool()])[order]
    return Property(
        outputs, property.inputs, joined, Terms(of_input[ascending], x.column[ascending], x.value[ascending]),
        torch.cat([property.b, extra])[order], clause, clauses, torch.cat([property.strict, extra.bool()])[order],
        exact, inexact,
    )  # fmt: skip


def anyone(network: Network, region: Region) -> Claim:
    """That the region holds no input: false, unless it is empty. `under` patterns: that no input follows all of them.
    Of one pattern that is its emptiness, of those of two classes that nothing is ambiguous."""
    none = torch.empty(0, dtype=torch.int64)
    nothing = Terms(none, none, none.double())
    sizes = _size(network.outputs), _size(network.inputs)
    clause = Property(*sizes, nothing, nothing, none.double(), none, 1, none.bool())
    return Claim(network, region, clause, name="no input")


def never(network: Network, region: Region, label: int) -> Claim:
    """No input of the region is predicted as `label`; a tie for the largest output counts as predicted."""
    n = _size(network.outputs)
    if not 0 <= label < n:
        raise InvalidInput(f"label: {label} is no output; the network has outputs 0 to {n - 1}.")
    rows = [Row({j: Fraction(1), label: Fraction(-1)}, {}, Fraction(0)) for j in range(n) if j != label]
    property = Property.of([rows], outputs=n, inputs=_size(network.inputs))
    return Claim(network, region, property, name=f"never {label}")


@dataclass(frozen=True, eq=False)
class Decision:
    """What is known of a claim under patterns.

    Attributes:
        verdict: `Empty` where no input of the region follows the patterns, which is no success of the claim. `Proved`
            only if some input does.
        follower: an input of the region that follows them, if one was found.
    """

    verdict: Verdict
    follower: Tensor | None


def decide(claim: Claim, *patterns: Pattern, samples: Tensor | None = None, timeout: float | None = None) -> Decision:
    """Decides a claim for the inputs that follow all of some patterns; first whether there are any.

    Args:
        samples: [k, *input], where to look for one that follows; the search looks beyond them.
        timeout: seconds, for each of the two questions.
    """
    follower = follow(claim, *patterns, samples=samples, timeout=timeout)
    if isinstance(follower, Empty):
        return Decision(follower, None)
    verdict = verify(under(claim, *patterns), timeout=timeout)
    if isinstance(verdict, Refuted):
        follower = verdict.witness
    if isinstance(verdict, Proved) and follower is None:
        reason = "the claim holds under the patterns, but whether any input follows them is not known"
        verdict = Unknown(0.0, 0.0, reason, verdict.effort)
    return Decision(verdict, follower)


def follow(
    claim: Claim, *patterns: Pattern, samples: Tensor | None = None, timeout: float | None = None
) -> Tensor | Empty | None:
    """An input of a claim's region that follows all of some patterns; `Empty` where it is proved that there is none,
    None where neither is known. The arguments are those of `decide`."""
    if not isinstance(claim.network, Network):
        raise InvalidInput(f"{claim.name} was read without its network; give it as well.")
    none = under(anyone(claim.network, claim.region), *patterns)
    for x in () if samples is None else samples:
        if not none.holds_at(x):
            return x
    found = verify(none, timeout=timeout)
    if isinstance(found, Refuted):
        return found.witness
    return None if isinstance(found, Unknown) else Empty(found.effort)


# -- inner values


def _layers(network: Network, layers: Sequence[Node | str] | None) -> tuple[Node, ...]:
    if layers is None:
        nodes = [node.inputs[0] for node in network.nodes if node.op == RELU]
    else:
        nodes = [network.at(layer) if isinstance(layer, str) else layer for layer in layers]
        nodes = [node.inputs[0] if isinstance(node.op, Elementwise) else node for node in nodes]
    if not nodes:
        raise InvalidInput(f"layers: {network.name} has no ReLU; name the values that the pattern is about.")
    return tuple(dict.fromkeys(nodes))


def _values(network: Network, nodes: Sequence[Node], inputs: Tensor) -> Iterator[Tensor]:
    """The nodes' entries, flattened and joined, at some inputs at a time: [k, neurons]."""
    shape = network.input.shape
    if not isinstance(inputs, Tensor) or inputs.dim() != len(shape) + 1 or tuple(inputs.shape[1:]) != shape:
        raise InvalidInput(f"inputs must be a tensor [k, {', '.join(map(str, shape))}] of the network's inputs.")

    def joined(x: Tensor) -> Tensor:
        return torch.cat([v.reshape(-1) for v in network.evaluate(nodes, x)])

    with torch.no_grad():
        for some in inputs.to(device=network.device, dtype=network.dtype).split(AT_ONCE) if len(inputs) else ():
            yield torch.vmap(joined)(some).cpu()


def _size(nodes: Sequence[Node]) -> int:
    return sum(math.prod(node.shape) for node in nodes)
