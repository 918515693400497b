"""Whether the certificate of an edit is about this network and these constraints.

The rows of the constraints are stated anew for the edited network and compared with the certificate's. Where the editor
chose numbers by the network before the edit (the threshold that separates a class from the others, the least range of
a normalised map, the places of its extremes), any choice that implies the constraint will do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from soundly.certificate.format import HEAD_EDIT, Certificate
from soundly.editing.acceptance import promise
from soundly.editing.constraints import Classified, Constraint, Cosine, Normalised
from soundly.editing.program import Program, compile_program
from soundly.editing.sequential import require
from soundly.editing.trunk import Trunk, trunk_of
from soundly.errors import EditError
from soundly.graph.network import Network
from soundly.verification.problem import problem_of
from soundly.verification.proof import identity

Array = npt.NDArray[Any]
Extremes = Mapping[int, tuple[int, int]]

CLOSE = 1e-5
"""How closely features computed here must agree with a certificate's, relative to the largest of their vector."""
CHOICES = 5
"""How many places of the extremes of a normalised map the editor tries."""


def confirm(certificate: Certificate, network: Network, constraints: Sequence[Constraint]) -> list[str]:
    """What a certificate that was accepted says of other weights, inputs or constraints than these; nothing if it
    proves exactly that these constraints hold for this network.

    Of an edit of a last layer the weights are compared bit by bit, and the features of the frozen part, computed anew
    in the network's type, to 1e-5.
    """
    if certificate.kind == HEAD_EDIT:
        return _head(certificate, network, constraints)
    return _whole(certificate, network, constraints)


def _best(constraints: Sequence[Constraint], compare: Callable[[Extremes], list[str]]) -> list[str]:
    """The fewest differences over the places of extremes; those of each map are its own rows' affair."""
    chosen: Extremes = {}
    least = compare(chosen)
    for i, c in enumerate(constraints):
        for choice in c.extremes()[1:CHOICES] if least and isinstance(c, Normalised) else ():
            found = compare({**chosen, i: choice})
            if len(found) < len(least):
                chosen, least = {**chosen, i: choice}, found
    return least


# -- a verification: programs, boxes and rows are equal


def _whole(certificate: Certificate, network: Network, constraints: Sequence[Constraint]) -> list[str]:
    def arrays(extremes: Extremes, spread: float) -> dict[str, Array]:
        stated = [replace(c, spread=c.spread or spread) if isinstance(c, Normalised) else c for c in constraints]
        return identity(problem_of(promise(require(network, stated, (), extremes=extremes), {})))

    def compare(extremes: Extremes) -> list[str]:
        ours = arrays(extremes, 1.0)
        # What depends on a spread that the constraint leaves open is the number it is compared with, of either sign.
        free = ours["row_constant"] != arrays(extremes, 2.0)["row_constant"]
        return _differences(certificate, ours, free)

    return _best(constraints, compare)


def _differences(certificate: Certificate, ours: Mapping[str, Array], free: Array) -> list[str]:
    header = json.loads(ours["header"].tobytes())
    if any(certificate.header.get(name) != entry for name, entry in header.items()):
        return ["the network has other operations"]
    theirs = certificate.arrays
    rows = ("row_start", "row_column", "row_value", "row_constant", "row_slack", "row_clause")
    cases = ("box_lower", "box_upper", "case_rows", "case_clauses")
    for names, what in ((cases, "it is about other points or regions, or about other numbers of constraints"),
                        (ours.keys() - {*rows, *cases, "header"}, "the network has other weights")):  # fmt: skip
        for name in sorted(names):
            if name not in theirs or theirs[name].dtype != ours[name].dtype:
                return [f"{what} (array {name!r} differs)"]
            if not np.array_equal(theirs[name], ours[name]):
                return [f"{what} (array {name!r} differs)"]
    count = len(free)
    if any(len(theirs[name]) != count for name in ("row_constant", "row_slack", "row_clause")):
        return [f"it has {len(theirs['row_constant'])} rows, the constraints {count}"]
    a, b = theirs["row_constant"], ours["row_constant"]
    same = np.where(free, np.isfinite(a) & (a * np.sign(b) > 0), a == b)
    same &= (theirs["row_slack"] == ours["row_slack"]) & (theirs["row_clause"] == ours["row_clause"])
    wrong = [r for r in range(count) if not (same[r] and _row(theirs, r) == _row(ours, r))]
    return [f"row {r} states something else than the constraints" for r in wrong]


def _row(arrays: Mapping[str, Array], row: int) -> tuple[bytes, bytes]:
    part = slice(*arrays["row_start"][row : row + 2].tolist())
    return arrays["row_column"][part].tobytes(), arrays["row_value"][part].tobytes()


# -- an edit of the last layer: weights are equal, features close, rows imply the constraints


def _head(certificate: Certificate, network: Network, constraints: Sequence[Constraint]) -> list[str]:
    layer = certificate.header["model"]["layer"]
    try:
        trunk = trunk_of(network, layer)
    except EditError as error:
        return [f"the network has no last layer {layer!r} that was edited: {error}"]
    known: dict[Any, torch.Tensor] = {}
    stated = [replace(c, spread=c.spread or 1.0) if isinstance(c, Normalised) else c for c in constraints]
    stated = [replace(c, length=c.length or 1.0) if isinstance(c, Cosine) else c for c in stated]

    def compare(extremes: Extremes) -> list[str]:
        program = compile_program(trunk, stated, extremes=extremes, evaluated=known)
        return _head_differences(certificate, trunk, program, constraints)

    return _best(constraints, compare)


def _head_differences(
    certificate: Certificate, trunk: Trunk, program: Program, constraints: Sequence[Constraint]
) -> list[str]:
    a = certificate.arrays
    rows = len(program.lower)
    if len(a["lower"]) != rows or not np.array_equal(a["row_start"], program.row_start.numpy()):
        return [f"it has {len(a['lower'])} rows, the constraints {rows}"] * rows
    if not np.array_equal(a.get("cones", np.zeros((0, 2))), program.cones.numpy()):
        return ["it has other cones"] * rows
    classes, weights = torch.tensor(a["classes"]), torch.tensor(a["weights"])
    bias = torch.zeros(len(trunk.weight)) if trunk.bias is None else trunk.bias.detach().cpu()
    mine = torch.cat([trunk.weight.detach().cpu(), bias.to(trunk.weight.dtype).cpu()[:, None]], 1)
    if bool((classes >= len(mine)).any()) or weights.numpy().tobytes() != mine[classes].numpy().tobytes():
        return ["the layer has other weights"] * rows
    value, ours = torch.tensor(a["row_value"]), program.row_value
    vectors = torch.tensor(a["vectors"]).double()[torch.tensor(a["value_vector"])[value]]
    wanted = program.vectors[program.value_vector[ours]]
    if vectors.shape != wanted.shape:
        return ["its features have other sizes"] * rows
    far = (vectors - wanted).abs().amax(1) > CLOSE * wanted.abs().amax(1)
    far |= classes[torch.tensor(a["value_class"])[value]] != program.value_class[ours]
    far |= torch.tensor(a["row_coefficient"]) != program.row_coefficient
    other = np.zeros(rows, dtype=bool)
    other[program.row_of_entry[far].numpy()] = True
    lower, upper = a["lower"], a["upper"]
    low, high = program.lower.numpy(), program.upper.numpy()
    wrong = other | (lower != low) | (upper != high)
    for c, claim in zip(constraints, program.claims, strict=True):
        mine_rows = slice(claim.start, claim.stop)
        if (isinstance(c, Normalised) and c.spread is None) or (isinstance(c, Cosine) and c.length is None):
            last = claim.stop - 1
            wrong[last] = other[last] | ~(lower[last] > 0) | (upper[last] != high[last])
        if isinstance(c, Classified):
            wrong[mine_rows] = other[mine_rows] | ~_separated(lower[mine_rows], upper[mine_rows], c)
    return [f"row {r} ({program.name_of(r)}) states something else" for r in np.flatnonzero(wrong).tolist()]


def _separated(lower: Array, upper: Array, c: Classified) -> Array:
    """Whether bounds on every output imply that one exceeds all others by the margin, by any threshold."""
    rivals = np.arange(len(upper)) != c.label
    right = np.isfinite(upper) | ~rivals
    most = upper[rivals].max()
    ends = np.isfinite(lower[c.label]) and np.isfinite(most)
    right[c.label] = ends and Fraction(float(lower[c.label])) - Fraction(float(most)) >= Fraction(c.margin)
    return right
