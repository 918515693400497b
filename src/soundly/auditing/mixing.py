"""An accurate network mixed with a robust one: the robust one's margins certify the mixture.

The mixture's probabilities are (1 - a) softmax(g) + a softmax(h). Those of g lie in [0, 1], whatever it computes; so
class y stays the mixture's answer wherever h's probabilities p satisfy

    p_y - p_j > (1 - a) / a    for all j other than y,

and with margins z_y - z_j >= t_j of h's scores, t_j >= 0, the left side is at least (1 - e^-t_j) / (1 + sum_i e^-t_i),
which grows with every t. So it suffices to prove margins of h: an ordinary claim with an ordinary certificate. No
Lipschitz constant is needed, and g is never bounded.

Reference: Bai, Anderson, Kim, Sojoudi, "Improving the Accuracy-Robustness Trade-Off of Classifiers via Adaptive
Smoothing", 2023 (the condition, with Lipschitz constants and for smoothed h). The form in margins is ours.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.graph.composite import Softmax
from soundly.graph.elementwise import LOG
from soundly.graph.linear import add, broadcast, reshape, scale, subtract
from soundly.graph.network import Network
from soundly.graph.node import Constant, Fill, Leaf, Node
from soundly.graph.product import Multiply
from soundly.graph.simplify import rebuild
from soundly.spec.claim import Claim, robust
from soundly.spec.region import Norm
from soundly.verification.problem import problem_of
from soundly.verification.root import root

_EXACT = decimal.Context(prec=60, Emax=10**8, Emin=-(10**8))
_ERROR = Decimal(10) ** -50  # relative: exp, ln and every operation err by less than 10^-59
_ENOUGH = 1e3  # a margin counts as no more than this: e to the power of its negative is nothing beside 1

ROOM = 1e-3
"""What is claimed of a margin is its bound less this share of it, and less this."""


def mixed(g: Network, h: Network, a: float | Network, *, scale_g: float = 1.0, scale_h: float = 1.0) -> Network:
    """The network log((1 - a) softmax(scale_g g) + a softmax(scale_h h)).

    Args:
        g, h: of one input and one output shape and one floating type; the last axis is that of the classes.
        a: the share of h, or a network of the same input with one number between 0 and 1 as its output.

    Raises:
        InvalidInput: the networks do not fit each other.
    """
    x, out, size = h.input, h.output.shape, math.prod(h.output.shape)
    if (g.input.shape, g.output.shape, g.dtype) != (x.shape, out, h.dtype) or out[-1] != size:
        raise InvalidInput(f"{g!r} and {h!r} must have one input shape, one floating type and the same classes.")
    values: dict[Node, Tensor] = dict(h.values)
    own = [scale(h.output, scale_h), scale(_over(g, x, "accurate", values), scale_g)]
    robust_part, accurate = (Softmax(len(out) - 1)(node) for node in own)
    if isinstance(a, Network):
        if a.input.shape != x.shape or math.prod(a.output.shape) != 1 or a.dtype != h.dtype:
            raise InvalidInput(f"a: {a!r} must take the same input and return one number.")
        share = broadcast(reshape(_over(a, x, "share", values), (1,) * len(out)), out)
        rest = subtract(Fill(1.0, out)(), share)
        total = add(Multiply()(share, robust_part), Multiply()(rest, accurate))
    else:
        total = add(scale(robust_part, _share(a)), scale(accurate, 1 - a))
    return replace(h, outputs=(LOG(total),), values=values, places={}, name=f"{g.name} mixed with {h.name}")


def suffices(margins: Sequence[float], a: float) -> bool:
    """Whether the mixture certainly keeps a class whose scores in h lead all others by these margins, whatever g says.

    Decided with all rounding accounted for; in exact arithmetic it is min_j (1 - e^-t_j) / (1 + sum_i e^-t_i) against
    (1 - a) / a.

    Args:
        margins: lower bounds t_j, one for each other class, of h's scores as they enter its softmax.
        a: the least share of h.
    """
    if not margins or not all(math.isfinite(t) and t >= 0 for t in margins):
        return False
    with decimal.localcontext(_EXACT):
        grown = [Decimal(-min(t, _ENOUGH)).exp() * (1 + _ERROR) for t in margins]
        gap = (1 - max(grown)) / (1 + sum(grown)) * (1 - _ERROR)
        share = Decimal(_share(a))
        # Not strict: g's probabilities lie strictly between 0 and 1, so their difference does not reach -1.
        return share * gap >= (1 - share) * (1 + _ERROR)


def least_margin(a: float, classes: int) -> float:
    """The least t, rounded up, such that margins t to every other class suffice; infinite for a <= 1/2.

    It is log((1 + (K - 1) m) / (1 - m)) with m = (1 - a) / a.
    """
    if classes < 2:
        raise InvalidInput(f"classes is {classes}; there must be another one.")
    with decimal.localcontext(_EXACT):
        share = Decimal(_share(a))
        if 2 * share <= 1:
            return math.inf
        m = (1 - share) / share
        t = max(float(((1 + (classes - 1) * m) / (1 - m)).ln()), 1e-30)  # below that, 1 - e^-t drowns
    while not suffices([t] * (classes - 1), a):  # a few units in the last place
        t = math.nextafter(t, math.inf)
    return t


def mixed_claim(
    h: Network,
    x: Tensor,
    *,
    eps: float,
    a: float,
    label: int | None = None,
    scale_h: float = 1.0,
    norm: Norm = "linf",
    clip: tuple[float, float] | None = (0.0, 1.0),
) -> Claim:
    """A claim on h alone that implies: every mixture of h with a share of at least `a` answers `label` within eps of x.

    Where linear bounds of h's margins suffice together, each class has a margin of its own; otherwise all have the
    least one that suffices, and the search may do better than those bounds.

    Args:
        h: the robust network; its output are scores.
        label: the answer of h at x if None.
        scale_h: the positive number that h's scores are multiplied by in the mixture.
        norm, clip: of the ball, as for `robust`.

    Raises:
        InvalidInput: a is not above 1/2: then g decides alone.
    """
    if not (math.isfinite(scale_h) and scale_h > 0):
        raise InvalidInput(f"scale_h is {scale_h}; give a positive number.")
    claim = robust(h, x, eps=eps, label=label, norm=norm, clip=clip)
    rows = len(claim.property)
    uniform = least_margin(a, rows + 1)
    if not math.isfinite(uniform):
        raise InvalidInput(f"a is {a}; only a share of h above 1/2 can be certified.")
    margins = [uniform] * rows
    if claim.region.box.widths.any():
        bounds = root(problem_of(replace(claim, region=claim.region.box)), sums=False).bound
        known = [math.nextafter(b * scale_h, -math.inf) * (1 - ROOM) - ROOM for b in bounds.tolist()]
        if suffices(known, a):
            margins = known
    # scale_h (z_y - z_j) >= t_j follows from z_y - z_j >= t_j / scale_h, rounded up.
    needed = torch.tensor([t / scale_h for t in margins], dtype=torch.float64)
    needed = torch.nextafter(needed, torch.full_like(needed, math.inf))
    name = f"any mixture with a share of at least {a:g} is {claim.name}"
    return replace(claim, property=replace(claim.property, b=claim.property.b - needed, exact=None), name=name)


def _over(network: Network, x: Node, role: str, values: dict[Node, Tensor]) -> Node:
    """The network's output over another input and leaves of its own, whose values are added."""
    leaves: dict[Node, Node] = {network.input: x}
    for node, value in network.values.items():
        assert isinstance(node.op, Leaf)
        leaves[node] = Constant(f"{role}: {node.op}", node.shape)()
        values[leaves[node]] = value
    return rebuild([network.output], lambda old, node: leaves.get(old, node))[network.output]


def _share(a: float) -> float:
    if not 0 <= a <= 1:
        raise InvalidInput(f"a is {a}; give a share between 0 and 1.")
    return float(a)
