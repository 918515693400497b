"""What is edited in the tests of whole edits, and what must hold of every result."""

from fractions import Fraction

import numpy as np
import torch
from tests.editing.test_trunk import Mlp, made
from torch import Tensor, nn

import soundly
from soundly import Edit, at
from soundly.certificate import check
from soundly.editing.program import compile_program
from soundly.editing.trunk import trunk_of
from soundly.graph.network import Network


def of_kind(kind: str, model: nn.Module, x: Tensor) -> Network | nn.Module:
    return soundly.load(model, x) if kind == "graph" else model


def deployed(edit: Edit, original: nn.Module) -> nn.Module:
    """The edited model as a module."""
    assert edit.status == "proved", (edit.status, edit.reason)
    assert edit.model is not None and edit.certificate is not None and check(edit.certificate).accepted
    return (edit.model if isinstance(edit.model, nn.Module) else edit.applied_to(original, layer="fc")).eval()


def exact_rows(edit: Edit) -> bool:
    """All rows of the certificate in rational arithmetic: the checker's answer by other means."""
    a = edit.certificate.arrays
    weights = a["weights"]
    if weights.dtype == np.uint16:
        weights = (weights.astype(np.uint32) << 16).view(np.float32)
    cache: dict[int, Fraction] = {}
    for i, (lower, upper) in enumerate(zip(a["lower"].tolist(), a["upper"].tolist(), strict=True)):
        row = Fraction(0)
        for k in range(a["row_start"][i], a["row_start"][i + 1]):
            t = int(a["row_value"][k])
            if t not in cache:
                v, w = a["vectors"][a["value_vector"][t]].tolist(), weights[a["value_class"][t]].tolist()
                cache[t] = sum((Fraction(p) * Fraction(q) for p, q in zip(v, w, strict=True)), Fraction(0))
            row += Fraction(float(a["row_coefficient"][k])) * cache[t]
        if not lower <= row <= upper:
            return False
    return True


def problem(seed: int = 0):
    model, x = made(Mlp, seed)
    other = torch.randn_like(x)
    constraints = [
        at(x).gradient(1).within(0.1, 0.3),
        at(other).output(1).at_least(1.0),
        at(other).gradient(1, entries=[1]).at_most(-0.2),
    ]
    return model, constraints, compile_program(trunk_of(model, "fc"), constraints)
