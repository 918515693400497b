"""Provable edits of a last linear layer: the smallest change of its weights after which every constraint holds.

The constraints become linear rows over frozen features; the solver's answer is only a candidate. It is rounded to the
layer's own storage type, written into a certificate and accepted only if the independent checker proves every row. A
result that is not proven is never returned as a model.
"""

from __future__ import annotations

import copy
import hashlib
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from soundly.certificate.check import CheckResult, check
from soundly.certificate.format import Certificate, head_edit
from soundly.editing.candidate import Candidate, Failure, Norm, Search
from soundly.editing.constraints import Constraint, Functional, Normalised, Point
from soundly.editing.program import Program, compile_program
from soundly.editing.trunk import ModuleTrunk, Trunk, trunk_of
from soundly.errors import EditError, InvalidInput
from soundly.graph.network import Network

Status = Literal["proved", "infeasible", "unproven", "limit"]


@dataclass(frozen=True, eq=False)
class Edit:
    """The outcome of an edit.

    Attributes:
        status: "proved": all rows hold, by the checker. "infeasible": no weights satisfy the rows with the margins that
            a proof needs, and other positions of the extremes of normalised maps did not help (see `reason`).
            "unproven": a candidate was found but not every row could be proven in the storage type.
            "limit": time ran out.
        rows, rows_before, proven: how many rows there are, how many held before the edit, how many are proven now.
        held_before: for each constraint, whether all its rows held before the edit (measured).
        seconds: {"features", "solve", "check"}: wall-clock times of the three phases.
        model: the edited model, of the class that was given (a copy); None unless proved.
        certificate, check: the proof, and what the checker said of it; None unless proved.
        delta: {class: change of its weights and bias [K + 1]}, float64, as stored; empty unless proved.
        smallest: False if time ran out before no smaller change was known to exist; the proof stands all the same.
        reason: why there is no model, in words: conflicting constraints by name, ranks, bounds.
        conflict: names of rows that contradict each other, if infeasible.
    """

    status: Status
    rows: int
    rows_before: int
    proven: int
    held_before: tuple[bool, ...]
    seconds: dict[str, float]
    model: Network | nn.Module | None = None
    certificate: Certificate | None = None
    check: CheckResult | None = None
    delta: dict[int, Tensor] = field(default_factory=dict)
    smallest: bool = False
    reason: str = ""
    conflict: tuple[str, ...] = ()

    def applied_to(self, module: nn.Module, *, layer: str) -> nn.Module:
        """A copy of a module with the edited rows in its layer: for edits of a captured network.

        Raises:
            EditError: nothing was proved, or the layer's weights are not those that were edited.
        """
        if self.certificate is None:
            raise EditError(f"there is no proved edit to apply: {self.status}, {self.reason}")
        return _edited_module(module, layer, self.certificate)


def edit(
    model: Network | nn.Module,
    constraints: Sequence[Constraint],
    *,
    layer: str,
    norm: Norm = "l2",
    bound: float | None = None,
    retain: Sequence[Tensor] | None = None,
    retain_weight: float = 1.0,
    time_limit: float | None = None,
) -> Edit:
    """Changes the last linear layer as little as possible so that all constraints hold, with proof.

    Args:
        model: a captured network, or any module (whose frozen part is then run as it is, whatever its size).
        constraints: see `soundly.at`; all must hold at once.
        layer: path of the last linear layer, "fc".
        norm: what "little" means, per independent block of classes: Euclidean (fast, unique), sum of absolute changes
            (few weights change), or the largest change.
        bound: no weight changes by more than this.
        retain: inputs whose outputs should change little (soft; Euclidean norm only).
        retain_weight: how much, relative to the change of the weights.
        time_limit: seconds for solving.

    Returns:
        An `Edit`. Its model holds the constraints in the layer's own storage type. What is proved: every row, over the
        reals, for the features of the frozen part as computed here in its own type and the weights as stored. If no
        such weights are found, the reason; never a best effort.

    Raises:
        InvalidInput, EditError: the constraints do not fit the model, or the layer is not its last operation.

    Reference: Tao and Thakur, "Provable Gradient Editing of Deep Neural Networks", NeurIPS 2025, section 4, for the
        problem; rows, margins and proof are derived in docs/editing.md.
    """
    if norm not in ("l2", "l1", "linf"):
        raise InvalidInput(f'norm must be "l2", "l1" or "linf", not {norm!r}.')
    if bound is not None and not 0 < bound < math.inf:
        raise InvalidInput(f"bound must be positive and finite, not {bound}; None for no bound.")
    started = time.perf_counter()
    trunk = trunk_of(model, layer)
    evaluated: dict[Functional | Point, Tensor] = {}
    program = compile_program(trunk, constraints, evaluated=evaluated)
    kept = [torch.nn.functional.pad(trunk.features(x), (0, 1), value=1.0).cpu() for x in retain or ()]
    seconds = {"features": time.perf_counter() - started, "solve": 0.0, "check": 0.0}
    deadline = math.inf if time_limit is None else time.perf_counter() + time_limit
    search = Search(trunk.weight.dtype, norm, bound, torch.cat(kept) if kept else None, retain_weight, deadline)

    first = outcome = _solve_and_prove(model, trunk, program, search, seconds)
    # A normalised map allows several positions of its extremes; another choice may turn infeasible into feasible.
    extremes: dict[int, tuple[int, int]] = {}
    left = {i: c.extremes()[1:5] for i, c in enumerate(constraints) if isinstance(c, Normalised)}
    while outcome.status == "infeasible" and time.perf_counter() < deadline:
        names = [claim.name for claim in program.claims]  # one claim for each constraint
        rows = [row.split(" [row ")[0] for row in outcome.conflict]
        blamed = [i for i, choices in left.items() if choices and names[i] in rows]
        if not blamed:
            return first
        extremes[blamed[0]] = left[blamed[0]].pop(0)
        program = compile_program(trunk, constraints, extremes=extremes, evaluated=evaluated)
        outcome = _solve_and_prove(model, trunk, program, search, seconds)
    return first if outcome.status == "infeasible" else outcome


def _solve_and_prove(
    model: Network | nn.Module, trunk: Trunk, program: Program, search: Search, seconds: dict[str, float]
) -> Edit:
    """Looks for a candidate and has it proved; with growing margins while a proof fails for want of them."""
    blocks = list(program.blocks())
    satisfied = program.satisfied(program.weights)
    before = tuple(bool(satisfied[claim.start : claim.stop].all()) for claim in program.claims)
    proven = 0

    def failed(status: Status, reason: str, rows: tuple[int, ...] = ()) -> Edit:
        names = tuple(dict.fromkeys(program.name_of(r) for r in rows))
        return Edit(
            status=status,
            reason=reason,
            rows=len(program.lower),
            rows_before=int(satisfied.sum()),
            proven=proven,
            held_before=before,
            conflict=names,
            seconds=dict(seconds),
        )

    for caution in (1.0, 4.0, 16.0, 256.0):
        started = time.perf_counter()
        candidate = search(program, blocks, caution)
        seconds["solve"] += time.perf_counter() - started
        if isinstance(candidate, Failure):
            if candidate.status == "infeasible" and caution > 1:
                break  # feasible, but not with margins as wide as the storage type would need
            return failed(candidate.status, candidate.reason, candidate.rows)
        started = time.perf_counter()
        certificate = _certificate(trunk, program, candidate, model)
        result = check(certificate)
        seconds["check"] += time.perf_counter() - started
        moved = candidate.weights.double() - program.weights
        if result.accepted and (search.bound is None or bool((moved.abs() <= search.bound).all())):
            return Edit(
                status="proved",
                model=_edited(model, trunk, certificate),
                certificate=certificate,
                delta={c: moved[c] for c in program.edited},
                rows=len(program.lower),
                rows_before=int(satisfied.sum()),
                proven=result.proven,
                held_before=before,
                smallest=candidate.smallest,
                seconds=dict(seconds),
                check=result,
            )
        proven = result.proven
    reason = f"weights exist, but in {search.dtype} only {proven} of {len(program.lower)} rows could be proven; "
    return failed("unproven", reason + "widen the tightest constraints, or store the layer in a wider type")


def _certificate(trunk: Trunk, program: Program, candidate: Candidate, model: Network | nn.Module) -> Certificate:
    """The rows, the features and the stored weights of every class that a row mentions."""
    stored = candidate.weights
    classes = program.value_class.unique()
    index = torch.full((len(stored),), -1)
    index[classes] = torch.arange(len(classes))
    kept = stored[classes]
    bf16 = kept.dtype == torch.bfloat16
    before = weights_hash(trunk.weight, trunk.bias)
    after = weights_hash(stored[:, :-1], None if trunk.bias is None else stored[:, -1])
    return head_edit(
        vectors=_narrow(program.vectors).numpy(),
        value_vector=program.value_vector.numpy(),
        value_class=index[program.value_class].numpy(),
        classes=classes.numpy(),
        weights=kept.view(torch.uint16).numpy() if bf16 else kept.numpy(),
        bf16=bf16,
        row_start=program.row_start.numpy(),
        row_value=program.row_value.numpy(),
        row_coefficient=program.row_coefficient.numpy(),
        lower=program.lower.numpy(),
        upper=program.upper.numpy(),
        margin=candidate.margins.numpy(),
        error=program.rounding(stored.double()).numpy(),
        claims=[{"name": c.name, "rows": [c.start, c.stop]} for c in program.claims],
        model={
            "name": model.name if isinstance(model, Network) else type(model).__name__,
            "layer": trunk.layer,
            "dtype": str(trunk.weight.dtype).removeprefix("torch."),
            "before": before,
            "after": after,
        },
        made_with={"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
    )


def _narrow(vectors: Tensor) -> Tensor:
    """The same numbers in float32 where that changes none of them."""
    small = vectors.float()
    return small if torch.equal(small.double(), vectors) else vectors


def weights_hash(weight: Tensor, bias: Tensor | None) -> str:
    """SHA-256 of a layer's weight and bias as stored, little-endian, C order."""
    digest = hashlib.sha256()
    for tensor in (weight, bias):
        if tensor is not None:
            raw = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            digest.update(raw.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _edited(model: Network | nn.Module, trunk: Trunk, certificate: Certificate) -> Network | nn.Module:
    if isinstance(model, nn.Module):
        new = _edited_module(model, trunk.layer, certificate)
        if isinstance(trunk, ModuleTrunk) and trunk.tried is not None:
            ModuleTrunk(new, trunk.layer).try_other_weights(trunk.tried)  # a copy may still call the original's layer
        return new
    weight, bias = _changed(trunk.weight, trunk.bias, certificate)
    name = f"{trunk.layer}.weight" if f"{trunk.layer}.weight" in model.parameters else trunk.layer
    return model.with_values({name: weight} | ({} if bias is None else {f"{trunk.layer}.bias": bias}))


def _changed(weight: Tensor, bias: Tensor | None, certificate: Certificate) -> tuple[Tensor, Tensor | None]:
    """The layer with the certificate's rows, bit for bit."""
    classes = torch.from_numpy(np.array(certificate.arrays["classes"])).to(weight.device)
    rows = torch.from_numpy(np.array(certificate.arrays["weights"])).view(weight.dtype).to(weight.device)
    weight, bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
    weight[classes] = rows[:, :-1]
    if bias is not None:
        bias[classes] = rows[:, -1]
    if weights_hash(weight, bias) != certificate.header["model"]["after"]:
        raise EditError("the edited layer is not the one that was proved: its hash differs from the certificate's.")
    return weight, bias


def _edited_module(module: nn.Module, layer: str, certificate: Certificate) -> nn.Module:
    trunk = ModuleTrunk(module, layer)  # refuses layers whose weights something else uses too
    if weights_hash(trunk.weight, trunk.bias) != certificate.header["model"]["before"]:
        raise EditError(f"layer {layer!r} does not hold the weights that were edited.")
    weight, bias = _changed(trunk.weight, trunk.bias, certificate)
    edited = copy.deepcopy(module)
    new = edited.get_submodule(layer)
    assert isinstance(new, nn.Linear)
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
    return edited
