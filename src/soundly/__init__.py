"""soundly: guarantees about neural networks.

    import soundly

    net = soundly.load("model.onnx")                       # or soundly.load(module, example)
    map = soundly.gradcam(net, of=3, layer="features")     # an explanation is a network too
    verdict = soundly.verify(soundly.robust(net, x, eps=0.01))
    why = soundly.explain(net, x, eps=0.1)                 # a set of features, proved to decide
    edit = soundly.edit(net, [soundly.at(x).classified(3), ...], layer="fc")
    edit.certificate.save("edit.cert")                     # soundly check edit.cert

Every public name is listed here, in reading order. Importing soundly does not import torch;
the first use of a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soundly.bounds.difference import difference as difference
    from soundly.bounds.interval import Interval as Interval
    from soundly.bounds.interval import interval_bounds as interval_bounds
    from soundly.bounds.linear import linear_bounds as linear_bounds
    from soundly.certificate.check import check as check
    from soundly.certificate.format import Certificate as Certificate
    from soundly.editing.constraints import at as at
    from soundly.editing.constraints import over as over
    from soundly.editing.edit import Edit as Edit
    from soundly.editing.edit import edit as edit
    from soundly.explanation.attribution import cam as cam
    from soundly.explanation.attribution import contributions as contributions
    from soundly.explanation.attribution import gradcam as gradcam
    from soundly.explanation.attribution import integrated_gradients as integrated_gradients
    from soundly.explanation.attribution import smoothgrad as smoothgrad
    from soundly.explanation.certified import certify_change as certify_change
    from soundly.explanation.certified import certify_map as certify_map
    from soundly.explanation.certified import certify_top_k as certify_top_k
    from soundly.explanation.contrast import Contrast as Contrast
    from soundly.explanation.contrast import contrast as contrast
    from soundly.explanation.contrast import radius as radius
    from soundly.explanation.question import top_mask as top_mask
    from soundly.explanation.reason import Reason as Reason
    from soundly.explanation.reason import certify_mask as certify_mask
    from soundly.explanation.reason import explain as explain
    from soundly.graph.differentiate import differentiate as differentiate
    from soundly.graph.fold import fold_affine as fold_affine
    from soundly.graph.fold import fold_constants as fold_constants
    from soundly.graph.load import load as load
    from soundly.graph.network import Network as Network
    from soundly.graph.simplify import simplify as simplify
    from soundly.graph.to_onnx import to_onnx as to_onnx
    from soundly.graph.to_torch import to_torch as to_torch
    from soundly.spec.claim import Claim as Claim
    from soundly.spec.claim import monotone as monotone
    from soundly.spec.claim import pairwise as pairwise
    from soundly.spec.claim import robust as robust
    from soundly.spec.claim import top_k as top_k
    from soundly.spec.claim import within as within
    from soundly.spec.grid import Grid as Grid
    from soundly.spec.region import Ball as Ball
    from soundly.spec.region import Box as Box
    from soundly.spec.region import Union as Union
    from soundly.spec.region import join as join
    from soundly.spec.vnnlib import read_vnnlib as read_vnnlib
    from soundly.verification.equivalence import equal as equal
    from soundly.verification.equivalence import gap as gap
    from soundly.verification.equivalence import same_argmax as same_argmax
    from soundly.verification.verdict import Empty as Empty
    from soundly.verification.verdict import Proved as Proved
    from soundly.verification.verdict import Refuted as Refuted
    from soundly.verification.verdict import Unknown as Unknown
    from soundly.verification.verify import verify as verify

_HOME = {
    # networks
    "load": "graph.load",
    "Network": "graph.network",
    "differentiate": "graph.differentiate",
    "simplify": "graph.simplify",
    "fold_constants": "graph.fold",
    "fold_affine": "graph.fold",
    "to_torch": "graph.to_torch",
    "to_onnx": "graph.to_onnx",
    # explanations
    "contributions": "explanation.attribution",
    "cam": "explanation.attribution",
    "gradcam": "explanation.attribution",
    "integrated_gradients": "explanation.attribution",
    "smoothgrad": "explanation.attribution",
    "certify_map": "explanation.certified",
    "certify_top_k": "explanation.certified",
    "certify_change": "explanation.certified",
    # bounds
    "Interval": "bounds.interval",
    "interval_bounds": "bounds.interval",
    "linear_bounds": "bounds.linear",
    # claims
    "Box": "spec.region",
    "Ball": "spec.region",
    "Union": "spec.region",
    "Grid": "spec.grid",
    "join": "spec.region",
    "Claim": "spec.claim",
    "robust": "spec.claim",
    "within": "spec.claim",
    "monotone": "spec.claim",
    "top_k": "spec.claim",
    "pairwise": "spec.claim",
    "read_vnnlib": "spec.vnnlib",
    # verdicts
    "verify": "verification.verify",
    "Proved": "verification.verdict",
    "Refuted": "verification.verdict",
    "Unknown": "verification.verdict",
    "Empty": "verification.verdict",
    # two networks
    "difference": "bounds.difference",
    "equal": "verification.equivalence",
    "same_argmax": "verification.equivalence",
    "gap": "verification.equivalence",
    # reasons
    "certify_mask": "explanation.reason",
    "top_mask": "explanation.question",
    "explain": "explanation.reason",
    "Reason": "explanation.reason",
    "contrast": "explanation.contrast",
    "Contrast": "explanation.contrast",
    "radius": "explanation.contrast",
    # edits
    "at": "editing.constraints",
    "over": "editing.constraints",
    "edit": "editing.edit",
    "Edit": "editing.edit",
    # proofs
    "Certificate": "certificate.format",
    "check": "certificate.check",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'soundly' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"soundly.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
