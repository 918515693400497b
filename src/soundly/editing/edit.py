"""Provable edits of a last linear layer: the smallest change of its weights after which every constraint holds.

The constraints become linear rows over frozen features; the solver's answer is only a candidate. It is rounded to the
layer's own storage type, written into a certificate and accepted only if the independent checker proves every row. A
result that is not proven is never returned as a model.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
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
from soundly.editing.constraints import Constraint, Normalised
from soundly.editing.program import Block, Program, compile_program
from soundly.editing.solve import least_change
from soundly.editing.trunk import ModuleTrunk, Trunk, trunk_of
from soundly.errors import EditError, InvalidInput
from soundly.graph.network import Network

Norm = Literal["l2", "l1", "linf"]
Status = Literal["proved", "infeasible", "unproven", "limit"]


@dataclass(frozen=True, eq=False)
class Edit:
    """The outcome of an edit.

    Attributes:
        status: "proved": all rows hold, by the checker. "infeasible": no weights satisfy the rows (see `reason`).
            "unproven": a candidate was found but not every row could be proven in the storage type.
            "limit": time ran out.
        model: the edited model, of the class that was given (a copy); None unless proved.
        certificate: the proof, None unless proved.
        reason: why there is no model, in words: conflicting constraints by name, ranks, bounds.
        delta: {class: change of its weights and bias [K + 1]}, float64, as stored; empty unless proved.
        rows, rows_before, proven: how many rows there are, how many held before the edit, how many are proven now.
        conflict: names of rows that contradict each other, if infeasible.
        smallest: False if time ran out before it was known that no smaller change exists; the proof stands all the same.
        seconds: {"features", "solve", "check"}: wall-clock times of the three phases.
    """

    status: Status
    model: Network | nn.Module | None
    certificate: Certificate | None
    reason: str
    delta: dict[int, Tensor]
    rows: int
    rows_before: int
    proven: int
    conflict: tuple[str, ...] = ()
    smallest: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    check: CheckResult | None = None

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
        reals, for the features of the frozen part as computed here in its own type and the weights as stored. If no such
        weights exist, the reason; never a best effort.

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
    program = compile_program(trunk, constraints)
    kept = [torch.nn.functional.pad(trunk.features(x), (0, 1), value=1.0).cpu() for x in retain or ()]
    seconds = {"features": time.perf_counter() - started, "solve": 0.0, "check": 0.0}
    deadline = math.inf if time_limit is None else time.perf_counter() + time_limit
    solver = _Solver(norm, bound, torch.cat(kept) if kept else None, retain_weight, deadline, trunk.weight.dtype)

    outcome: Edit | None = None
    for extremes in _orders(constraints):
        if extremes:
            program = compile_program(trunk, constraints, extremes=extremes)
        outcome = _solve_and_prove(model, trunk, program, solver, seconds)
        # Only another choice of a normalised map's extreme positions can turn infeasible into feasible.
        if outcome.status != "infeasible" or time.perf_counter() > deadline:
            break
    assert outcome is not None
    return outcome


def _orders(constraints: Sequence[Constraint]) -> list[dict[int, tuple[int, int]]]:
    """The default positions of every normalised map, then each map's alternatives one at a time."""
    orders: list[dict[int, tuple[int, int]]] = [{}]
    for i, c in enumerate(constraints):
        if isinstance(c, Normalised):
            orders += [{i: pq} for pq in itertools.islice(c.extremes(), 1, 5)]
    return orders


@dataclass(frozen=True, eq=False)
class _Solver:
    norm: Norm
    bound: float | None
    retain: Tensor | None
    retain_weight: float
    deadline: float
    dtype: torch.dtype

    def __call__(
        self, program: Program, block: Block, rounding: Tensor, caution: float
    ) -> tuple[Tensor | None, str, tuple[int, ...], Tensor]:
        """(change of the block's weights, status or reason, conflicting rows of the program, margins)."""
        w = program.weights[list(block.classes)].reshape(-1)
        margin = self.margin(block, w, rounding, caution)
        now = block.matrix @ w + block.frozen
        lower, upper = program.lower[block.rows] - now + margin, program.upper[block.rows] - now - margin
        if bool((lower > upper).any()):
            i = int((lower - upper).argmax())
            row = int(block.rows[i])
            width = float(program.upper[row] - program.lower[row])
            reason = f"{program.name_of(row)} leaves {width:.3g} between its bounds, less than the two margins of "
            reason += f"{float(margin[i]):.3g} that proof in {self.dtype} needs; widen it"
            return None, reason, (row,), margin
        left = self.deadline - time.perf_counter()
        if left <= 0:
            return None, "limit", (), margin
        retain = None
        if self.retain is not None:
            retain = torch.block_diag(*[self.retain] * len(block.classes))
        bound = self.bound
        if bound is not None:  # rounding adds to a change; where it may add more than allowed, nothing can change
            bound = max(bound - self.unit * float(w.abs().max() + bound), 1e-300)
        solution = least_change(
            block.matrix, lower, upper, norm=self.norm, bound=bound, retain=retain, retain_weight=self.retain_weight,
            time_limit=None if math.isinf(left) else left,
        )  # fmt: skip
        if solution.delta is not None:
            value, slack = block.matrix @ solution.delta, margin / 2
            if bool(((value >= lower - slack) & (value <= upper + slack)).all()):
                return solution.delta, solution.status, (), margin
        if solution.status == "infeasible":
            rows = tuple(int(block.rows[i]) for i in solution.conflict)
            return None, _why(program, block, rows, solution.bound_in_conflict, self.bound), rows, margin
        return None, "limit", (), margin

    @property
    def unit(self) -> float:
        """The unit roundoff of the storage type."""
        return torch.finfo(self.dtype).eps / 2

    def margin(self, block: Block, w: Tensor, rounding: Tensor, caution: float) -> Tensor:
        """Slack for rounding to the storage type (typical size, times caution), for the checker and for the solver."""
        terms = block.matrix * (w.abs() + w.abs().mean())
        spread = terms.square().sum(1).sqrt()
        storage = self.unit * torch.minimum(4 * spread, 2 * terms.abs().sum(1))
        return caution * (storage + 8 * rounding[block.rows]) + 1e-9 * spread


def _why(program: Program, block: Block, rows: tuple[int, ...], with_bound: bool, bound: float | None) -> str:
    names = list(dict.fromkeys(program.name_of(r) for r in rows))
    shown = "; ".join(names[:6]) + (f"; and {len(names) - 6} more" if len(names) > 6 else "")
    local = [int((block.rows == r).nonzero()[0, 0]) for r in rows]
    part = block.matrix[local]
    rank = int(torch.linalg.matrix_rank(part)) if len(local) else 0
    text = f"{len(rows)} rows (rank {rank}, outputs {', '.join(map(str, block.classes))}) contradict each other"
    if with_bound:
        text += f" as long as no weight may change by more than {bound:g}"
    return f"{text}: {shown}"


def _solve_and_prove(
    model: Network | nn.Module, trunk: Trunk, program: Program, solver: _Solver, seconds: dict[str, float]
) -> Edit:
    before = int(program.satisfied(program.weights).sum())
    rows = len(program.lower)

    def failed(status: Status, reason: str, conflict: tuple[int, ...] = (), proven: int = 0) -> Edit:
        names = tuple(dict.fromkeys(program.name_of(r) for r in conflict))
        return Edit(status, None, None, reason, {}, rows, before, proven, names, False, dict(seconds))

    blocks = list(program.blocks())
    rounding = program.rounding(program.weights)
    result: CheckResult | None = None
    for caution in (1.0, 4.0, 16.0, 256.0):
        started = time.perf_counter()
        stored = program.weights.clone()
        margins, smallest = torch.zeros(rows, dtype=torch.float64), True
        for block in blocks:
            if not block.classes:
                wrong = block.rows[
                    ~((program.lower <= (v := program.values(stored))) & (v <= program.upper))[block.rows]
                ]
                if len(wrong):
                    row = int(wrong[0])
                    return failed(
                        "infeasible", f"{program.name_of(row)} involves no edited output and does not hold", (row,)
                    )
                continue
            change, status, conflict, margin = solver(program, block, rounding, caution)
            margins[block.rows] = margin
            smallest &= status == "optimal"
            if change is None:
                seconds["solve"] += time.perf_counter() - started
                if status == "limit":
                    late = time.perf_counter() > solver.deadline
                    why = "the time limit was reached" if late else "the solver did not reach the accuracy it needs"
                    return failed("limit", f"{why} before the program was solved")
                if caution > 1:
                    break  # feasible, but not with margins as wide as the storage type would need
                return failed("infeasible", status, conflict)
            width = program.vectors.shape[1]
            stored[list(block.classes)] += change.cpu().reshape(-1, width)
        else:
            stored = stored.to(trunk.weight.dtype)  # rounded as it will be stored
            seconds["solve"] += time.perf_counter() - started
            started = time.perf_counter()
            certificate = _certificate(trunk, program, stored, margins, model)
            result = check(certificate)
            seconds["check"] += time.perf_counter() - started
            moved = stored.double() - program.weights
            if result.accepted and (solver.bound is None or bool((moved.abs() <= solver.bound).all())):
                delta = {c: moved[c] for c in program.edited}
                new = _edited(model, trunk, certificate)
                return Edit(
                    "proved",
                    new,
                    certificate,
                    "",
                    delta,
                    rows,
                    before,
                    result.proven,
                    (),
                    smallest,
                    dict(seconds),
                    result,
                )
            continue
        break
    proven = result.proven if result else 0
    text = (
        f"weights exist, but in {trunk.weight.dtype} only {proven} of {rows} rows could be proven; widen the tightest "
    )
    return failed("unproven", text + "constraints, or store the layer in a wider type", proven=proven)


def _certificate(
    trunk: Trunk, program: Program, stored: Tensor, margins: Tensor, model: Network | nn.Module
) -> Certificate:
    """The rows, the features and the stored weights of every class that a row mentions."""
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
        margin=margins.numpy(),
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
