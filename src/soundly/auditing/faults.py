"""Soundness bugs, one at a time: small wrongs in operations, relaxations, splitting, clipping, claims and certificates.

A fault is a function of soundly and a piece of its source that is exchanged; all else stays as it is. If the piece is
no longer there exactly once, the fault says so, and has to be adapted. The checker's own catalogue, which is finer, is
in tests/certificate/test_planted_faults.py, that of every operation in tests/ops/test_seeded_faults.py; this one asks
whether the fuzzer, which knows of no particular place, would notice.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from soundly.errors import InvalidInput
from soundly.graph.aten_layers import RULES


@dataclass(frozen=True)
class Fault:
    """A fault: its name, the part of soundly it is in, a function as "module:name" or "module:Class.name", and what is
    exchanged for what in its source."""

    name: str
    part: str
    where: str
    old: str
    new: str


def _owner(fault: Fault) -> tuple[ModuleType, Any, str]:
    module_name, _, path = fault.where.partition(":")
    module = importlib.import_module(f"soundly.{module_name}")
    *outer, name = path.split(".")
    owner: Any = module
    for part in outer:
        owner = getattr(owner, part)
    return module, owner, name


def broken(fault: Fault) -> Any:
    """The function with its fault.

    Raises:
        InvalidInput: the piece is not in the function's source exactly once.
    """
    module, owner, name = _owner(fault)
    source = textwrap.dedent(inspect.getsource(vars(owner)[name]))
    source = source[source.index("def ") :]  # what decorates it has been done
    if source.count(fault.old) != 1:
        raise InvalidInput(f"fault {fault.name!r}: {fault.old!r} is not in {fault.where} exactly once; adapt it.")
    # Compiled as this module is: annotations are not evaluated.
    code = compile(source.replace(fault.old, fault.new), f"<{fault.name}>", "exec")
    made: dict[str, Any] = {}
    exec(code, module.__dict__, made)
    return made[name]


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """soundly with the fault, wherever its function is known by name; without it again afterwards.

    What soundly has cached in between stays: give a fault a process of its own.
    """
    _, owner, name = _owner(fault)
    old, new = vars(owner)[name], broken(fault)
    places = [(owner, name)]
    if isinstance(owner, ModuleType):
        loaded = [m for key, m in sys.modules.items() if key.startswith("soundly.") and m is not owner]
        places += [(m, key) for m in loaded for key, value in vars(m).items() if value is old]
    rules = [key for key, value in RULES.items() if value is old]
    try:
        for place, key in places:
            setattr(place, key, new)
        RULES.update(dict.fromkeys(rules, new))
        yield
    finally:
        for place, key in places:
            setattr(place, key, old)
        RULES.update(dict.fromkeys(rules, old))


_OPS, _LINEAR, _SEARCH, _SPLIT, _CLAIM, _CHECK = (
    "operations", "linear bounds", "search", "splitting", "claims", "checker",
)  # fmt: skip

FAULTS: tuple[Fault, ...] = (
    # operations and capture
    Fault("subtraction adds", _OPS, "graph.aten:_sub", "-float(alpha)", "float(alpha)"),
    Fault("padding without its value", _OPS, "graph.aten:_pad", "if not value:", "if True:"),
    Fault("flips count from one", _OPS, "graph.aten:_flip", "reversed(range(x.shape[a]))", "range(x.shape[a])"),
    Fault("average of padding turned round", _OPS, "graph.aten_layers:average_pool", "b - a if include_pad else",
          "b - a if not include_pad else"),
    Fault("asymmetric padding of transposed convolutions", _OPS, "graph.aten_layers:_conv_transpose",
          "- 2 * p + d", "- p + d"),
    Fault("maximum of the other difference", _OPS, "graph.composite:Maximum.expand", "subtract(a, b)",
          "subtract(b, a)"),
    Fault("a tap of the maximum forgotten", _OPS, "graph.composite:MaxPool.expand", "taps[1:]", "taps[2:]"),
    Fault("normalisation without eps", _OPS, "graph.composite:Normalise.expand", "Fill(self.eps,", "Fill(0.0,"),
    Fault("softmax that ignores the others", _OPS, "graph.composite:Softmax.enclose",
          "((lower, upper), (upper, lower))", "((lower, lower), (upper, upper))"),
    Fault("turning points forgotten below", _OPS, "graph.elementwise:Elementwise.enclose",
          "torch.where(inside, least.clamp(max=low), least)", "least"),
    Fault("contributions of the second reader lost", _OPS, "graph.differentiate:differentiate",
          "add(*parts.pop(node))", "parts.pop(node)[0]"),
    Fault("intervals of linear maps ignore signs", _OPS, "bounds.interval:_Intervals.linear",
          "op.apply(*(v.lower if s > 0 else v.upper", "op.apply(*(v.lower if s != 0 else v.upper"),
    Fault("intervals of products without the cross radius", _OPS, "bounds.interval:_Intervals.product",
          "op.apply(a.size, rb)", "op.apply(ca.abs(), rb)"),
    Fault("NaN taken for a bound", _OPS, "bounds.interval:_whole",
          "torch.isnan(lower) | torch.isnan(upper) |", "torch.zeros_like(lower, dtype=torch.bool) |"),
    # linear bounds of networks
    Fault("lower intercepts lost", _LINEAR, "bounds.linear:_Pass._back", "total.add(up, lines.offset_low)", "pass"),
    Fault("upper intercepts lost", _LINEAR, "bounds.linear:_Pass._back", "total.add(down, lines.offset_high)", "pass"),
    Fault("slopes exchanged", _LINEAR, "bounds.linear:_Pass._back", "up * lines.slope_low + down * lines.slope_high",
          "up * lines.slope_high + down * lines.slope_low"),
    Fault("products without the radii", _LINEAR, "bounds.linear:_Pass._back",
          "total.add(-a.abs(), op.apply(rx, ry)", "total.add(0 * a, op.apply(rx, ry)"),
    Fault("the box's ends exchanged", _LINEAR, "bounds.linear:_Total.concretise",
          "self.add(a.clamp(min=0), bounds.lower)", "self.add(a.clamp(min=0), bounds.upper)"),
    # bounds of the search
    Fault("biases lost", _SEARCH, "bounds.batch:Bounder.backward", "d = d + here @ bias", "pass"),
    Fault("slopes exchanged in passes", _SEARCH, "bounds.batch:Bounder.backward",
          "up * of(line.slope_low) + down * of(line.slope_high)",
          "up * of(line.slope_high) + down * of(line.slope_low)"),
    Fault("the chord's intercept for positive coefficients", _SEARCH, "bounds.batch:Bounder.backward",
          "(here.clamp(max=0) * of(line.offset_high))", "(here.clamp(min=0) * of(line.offset_high))"),
    Fault("splits with the wrong sign", _SEARCH, "bounds.batch:Bounder.backward", "here = here - of(force)",
          "here = here + of(force)"),
    Fault("splits without their points", _SEARCH, "bounds.batch:Bounder.backward",
          "d = d + of((force * split.at).sum(-1))", "pass"),
    Fault("planes of products exchanged", _SEARCH, "bounds.batch:Bounder.backward", "_meet(up, p.c_low)",
          "_meet(up, p.c_high)"),
    Fault("the box shrunk by a tenth", _SEARCH, "bounds.frame:Pass.least", "self.a.clamp(min=0) * lower",
          "self.a.clamp(min=0) * (0.9 * lower + 0.1 * upper)"),
    Fault("the lift of chords a tenth too low", _SEARCH, "bounds.lines:_kinked", "(left - chord) * lower",
          "0.9 * (left - chord) * lower"),
    Fault("radii without absolute values", _SEARCH, "bounds.batch:Bounder.forward", "part.absolute.apply((high",
          "part.apply((high"),
    Fault("corners of products forgotten", _SEARCH, "bounds.batch:Bounder.forward", "corners.amin(0), corners.amax(0)",
          "corners[0], corners[-1]"),
    Fault("inner upper bounds shrunk", _SEARCH, "bounds.batch:Bounder._tighten", "high[who, what], -greatest)",
          "high[who, what], -greatest - 0.05 * greatest.abs())"),
    Fault("rests of forms not through absolute weights", _SEARCH, "bounds.forms:Forms.follow",
          "rest + part.absolute.apply(", "rest + part.apply("),
    Fault("products of forms without their radii", _SEARCH, "bounds.forms:Forms.follow", "+ wide_a * wide_b", ""),
    # splitting and clipping
    Fault("right halves begin too late", _SPLIT, "verification.input_split:InputSplit._halved",
          "children.lower[1::2].scatter_(1, entry, at)",
          "children.lower[1::2].scatter_(1, entry, at + 0.2 * (high - at))"),
    Fault("clips cut a tenth too far", _SPLIT, "verification.input_split:_cut", "(low + reach + room)",
          "(low + 0.9 * reach + room)"),
    Fault("boxes closed below their slack", _SPLIT, "verification.input_split:InputSplit._treat",
          "(least > slack + self.margin)", "(least > slack - 0.1 * least.abs().amax())"),
    Fault("one clause closes all", _SPLIT, "verification.input_split:InputSplit._treat", "still = now.open & ~done",
          "still = now.open & ~done & (least.amin() < -0.3)"),
    Fault("halves of neurons lose their sign", _SPLIT, "verification.neuron_parts:Neurons.held", "mine = sign == side",
          "mine = sign != 0"),
    # claims and counterexamples
    Fault("bounds of claims turned round", _CLAIM, "spec.claim:within", "constant.append(-s * values[kept])",
          "constant.append(s * values[kept])"),
    Fault("witnesses believed unseen", _CLAIM, "verification.replay:_Judge.__call__",
          "any(claim.holds_at(point, y, tolerance=tolerance) for point, y in answers)", "False"),
    Fault("boxes of several inputs joined backwards", _CLAIM, "spec.region:join",
          "torch.cat([getattr(box, side).flatten() for box in boxes])",
          "torch.cat([getattr(box, side).flatten() for box in boxes[::-1]])"),
    # the checker of certificates
    Fault("the checker forgets leaves", _CHECK, "certificate.verification:_Replayer._branch",
          "self.left_open[node.tree] |= node.open", "pass"),
    Fault("the checker exchanges lines", _CHECK, "certificate.bounding:View._relaxed",
          "owned(some.below[j]), owned(some.above[j])", "owned(some.above[j]), owned(some.below[j])"),
    Fault("the checker forgets biases", _CHECK, "certificate.bounding:View.carry", "bound.add(a @ step.bias)", "pass"),
    Fault("the checker's boxes have one end", _CHECK, "certificate.bounding:View.backward",
          "bound.add(-_product(np.abs(rest), _owned(radius + widened, owner)))",
          "bound.add(_product(rest, _owned(radius + widened, owner)))"),
    Fault("the checker shifts what is to be shown", _CHECK, "certificate.verification:_Replayer._bound",
          "best > proof.slack[rows]", "best > proof.slack[rows] - 1e-2 * (1 + np.abs(best))"),
)  # fmt: skip
