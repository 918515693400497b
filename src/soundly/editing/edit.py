"""Provable edits: the smallest change of a layer's weights after which every constraint holds.

Where the layer is the last linear one, constraints at points are linear rows over frozen features. Anywhere else, and
on regions, they are rows of the network itself (`inner`). Either way the solver's answer is only a candidate: rounded
to the storage type, written into a certificate and accepted only if the independent checker proves every row. A result
that is not proven is never returned as a model.
"""

from __future__ import annotations

import copy
import hashlib
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from soundly.certificate.check import CheckResult, check
from soundly.certificate.format import HEAD_EDIT, Certificate, head_edit
from soundly.editing.candidate import Candidate, Failure, Norm, Search
from soundly.editing.constraints import (
    Area,
    Bounded,
    Constraint,
    Expression,
    Goal,
    Normalised,
    Point,
    at,
    points_of,
)
from soundly.editing.functionals import Functional, Outputs
from soundly.editing.inner import Inner, Status, edit_inside
from soundly.editing.moved import Moved
from soundly.editing.program import Program, compile_program
from soundly.editing.trunk import ModuleTrunk, NotLast, Trunk, trunk_of
from soundly.errors import EditError, InvalidInput
from soundly.graph.network import Network


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
        delta: {class: change of its weights and bias [K + 1]} for a last layer, otherwise {parameter: its change};
            float64, as stored; empty unless proved.
        moved: {parameter: how many of its entries changed, and by how much}, exact for the weights as stored; empty
            unless proved.
        smallest: False if time ran out before no smaller change was known to exist; the proof stands all the same.
        reason: why there is no model, in words: conflicting constraints by name, ranks, bounds.
        conflict: names of rows that contradict each other, if infeasible.
        claims: the constraints' names, in order.
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
    delta: Mapping[int | str, Tensor] = field(default_factory=dict)
    moved: Mapping[str, Moved] = field(default_factory=dict)
    smallest: bool = False
    reason: str = ""
    conflict: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()

    def applied_to(self, module: nn.Module, *, layer: str | None = None) -> nn.Module:
        """A copy of a module with the edited weights: for edits of a captured network.

        Args:
            layer: where the last layer was edited, its path; else the parameters go by their names.

        Raises:
            EditError: nothing was proved, or the module's weights are not those that were edited.
        """
        if self.certificate is None:
            raise EditError(f"there is no proved edit to apply: {self.status}, {self.reason}")
        if self.certificate.kind == HEAD_EDIT:
            return _edited_module(module, layer or self.certificate.header["model"]["layer"], self.certificate)
        assert isinstance(self.model, Network)
        edited = copy.deepcopy(module)
        parameters = dict(edited.named_parameters())
        for name, change in self.delta.items():
            new = self.model.values[self.model.parameters[str(name)]]
            old = parameters.get(str(name))
            if old is None or not torch.equal(old.detach().double().cpu() + change.cpu(), new.double().cpu()):
                raise EditError(f"parameter {name!r} of {type(module).__name__} is not the one that was edited.")
            with torch.no_grad():
                old.copy_(new)
        return edited


def edit(
    model: Network | nn.Module,
    constraints: Sequence[Constraint],
    *,
    layer: str | Sequence[str],
    norm: Norm = "l2",
    bound: float | None = None,
    rank: int | None = None,
    retain: Sequence[Tensor] | None = None,
    retain_weight: float = 1.0,
    goals: Sequence[Goal] = (),
    goal_weight: float = 1.0,
    start: Mapping[str, Tensor] | None = None,
    time_limit: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Edit:
    """Changes layers as little as possible so that all constraints hold, with proof.

    Args:
        model: a captured network; or, where the layer is its last linear one and constraints are stated at points, any
            module (whose frozen part is then run as it is, whatever its size).
        constraints: see `soundly.at` and `soundly.over`; all must hold at once.
        layer: path of a layer, "fc", or several. Where layers follow, their biases may change too: they move no
            gradient, but help to hold what follows where it is.
        norm: what "little" means, per independent block of classes: Euclidean (fast, unique), sum of absolute changes
            (few weights change), or the largest change.
        bound: no weight changes by more than this.
        rank: the change of a matrix (of a kernel, flattened behind its first axis) is U V with V [rank, columns] fixed,
            up to rounding to the storage type; Euclidean norm without bound and start only. V are the leading right
            singular vectors of the smallest change of any rank.
        retain: inputs whose outputs should change little (soft; Euclidean norm only).
        retain_weight: how much, relative to the change of the weights.
        goals: what should hold as well as the constraints allow, from `Expression.near` (Euclidean norm only).
        goal_weight: the weight of the mean of their squared misses.
        start: parameters by name to begin from, such as fine-tuned ones; the change is still measured from the model's.
        time_limit: seconds for solving, and for proving where that is a search.
        progress: called with a line of text now and then, on longer searches.

    Returns:
        An `Edit`. Its model holds the constraints in its own storage type. What is proved: for a last layer at points,
        every row, over the reals, for the features of the frozen part as computed here in its own type and the weights
        as stored; otherwise the constraints themselves, from the input on, over the reals, by a verification. If no
        such weights are found, the reason; never a best effort.

    Raises:
        InvalidInput, EditError: the constraints do not fit the model, or the layer is none of its own.

    Reference: Tao and Thakur, "Provable Gradient Editing of Deep Neural Networks", NeurIPS 2025, section 4, for the
        problem; rows, margins and proof are derived in docs/editing.md.
    """
    if norm not in ("l2", "l1", "linf"):
        raise InvalidInput(f'norm must be "l2", "l1" or "linf", not {norm!r}.')
    if bound is not None and not 0 < bound < math.inf:
        raise InvalidInput(f"bound must be positive and finite, not {bound}; None for no bound.")
    if rank is not None and (rank < 1 or norm != "l2" or bound is not None or start is not None):
        raise InvalidInput('rank must be at least 1, and goes with norm="l2", without a bound and a start.')
    layers = (layer,) if isinstance(layer, str) else tuple(layer)
    regional = any(isinstance(p, Area) for c in constraints for p in points_of(c))
    attempt: Attempt
    trunk = None
    if len(layers) == 1 and not (regional or goals or start is not None or rank is not None):
        try:
            trunk = trunk_of(model, layers[0])
        except NotLast:
            if not isinstance(model, Network):
                raise
    deadline = math.inf if time_limit is None else time.perf_counter() + time_limit
    if trunk is not None:
        attempt = _AtHead(model, trunk, constraints, norm, bound, retain, retain_weight, time_limit)
    elif not isinstance(model, Network):
        raise InvalidInput(
            "model: regions, goals, ranks and inner layers need a captured network: soundly.load(model, x)."
        )
    else:
        if retain is not None:
            goals = [*goals, *_kept(model, retain)]
            goal_weight = retain_weight if len(goals) == len(retain) else goal_weight
        if goals and (norm != "l2" or bound is not None):
            raise InvalidInput('goals and retain go with norm="l2" and without a bound; state hard limits as rows.')
        wishes = [Bounded(g.expression, g.target, g.target, "goal") for g in goals]

        def attempt(extremes: Mapping[int, tuple[int, int]]) -> Edit:
            inner = edit_inside(
                model, constraints, layers, norm=norm, bound=bound, goals=wishes, goal_weight=goal_weight, start=start,
                rank=rank, extremes=extremes, deadline=deadline, progress=progress,
            )  # fmt: skip
            return _inner(model, inner)

    first = outcome = attempt({})
    # A normalised map allows several positions of its extremes; another choice may turn infeasible into feasible.
    extremes: dict[int, tuple[int, int]] = {}
    left = {i: c.extremes()[1:5] for i, c in enumerate(constraints) if isinstance(c, Normalised)}
    while outcome.status == "infeasible" and time.perf_counter() < deadline:
        rows = [row.split(" [row ")[0] for row in outcome.conflict]
        blamed = [i for i, choices in left.items() if choices and outcome.claims[i] in rows]
        if not blamed:
            return first
        extremes[blamed[0]] = left[blamed[0]].pop(0)
        outcome = attempt(extremes)
    return first if outcome.status == "infeasible" else outcome


Attempt = Callable[[Mapping[int, tuple[int, int]]], Edit]
"""An edit with these positions of the extremes of normalised maps, by constraint."""


class _AtHead:
    """Edits of the last linear layer at points."""

    def __init__(
        self, model: Network | nn.Module, trunk: Trunk, constraints: Sequence[Constraint], norm: Norm,
        bound: float | None, retain: Sequence[Tensor] | None, retain_weight: float, time_limit: float | None,
    ) -> None:  # fmt: skip
        started = time.perf_counter()
        self.model, self.trunk, self.constraints = model, trunk, constraints
        self.evaluated: dict[Functional | Point, Tensor] = {}
        first = compile_program(trunk, constraints, evaluated=self.evaluated)
        self.programs: dict[tuple[tuple[int, tuple[int, int]], ...], Program] = {(): first}
        bias = 0.0 if trunk.bias is None else 1.0  # what multiplies the bias in an output
        kept = [torch.nn.functional.pad(trunk.features(x), (0, 1), value=bias).cpu() for x in retain or ()]
        self.seconds = {"features": time.perf_counter() - started, "solve": 0.0, "check": 0.0}
        deadline = math.inf if time_limit is None else time.perf_counter() + time_limit
        kinds = torch.cat(kept) if kept else None
        self.search = Search(trunk.weight.dtype, norm, bound, kinds, retain_weight, deadline)

    def __call__(self, extremes: Mapping[int, tuple[int, int]]) -> Edit:
        key = tuple(sorted(extremes.items()))
        if key not in self.programs:
            program = compile_program(self.trunk, self.constraints, extremes=extremes, evaluated=self.evaluated)
            self.programs[key] = program
        return _solve_and_prove(self.model, self.trunk, self.programs[key], self.search, self.seconds)


def _kept(model: Network, retain: Sequence[Tensor]) -> list[Goal]:
    """The wish that outputs stay as they are."""
    return [_stay(model, x, i) for i, x in enumerate(retain)]


def _stay(model: Network, x: Tensor, i: int) -> Goal:
    outputs = Expression.of(Outputs(at(x)), f"outputs at retained input {i}")
    with torch.no_grad():
        return outputs.near(model(x.to(model.like.new_empty(0, dtype=model.dtype))))


def _inner(model: Network, inner: Inner) -> Edit:
    """The outcome of an edit by `edit_inside`."""
    r = inner.requirements
    excess = r.excess(r.evidence(r.evidence.theta)[0])
    held = [bool((excess[claim.start : claim.stop] <= 0).all()) for claim in r.claims]
    for i, area in enumerate(r.points):
        if isinstance(area, Area):  # measured at one of its points only: not known to hold
            for k, claim in enumerate(r.claims):
                held[k] &= not bool((r.owner[claim.start : claim.stop] == i).any())
    result = None if inner.certificate is None else check(inner.certificate)
    if result is not None and not result.accepted:
        raise EditError(f"the certificate of an edit was refused: {result.problems[:1] or result.claims[:1]}")
    new = model.with_values(inner.values) if result is not None else None
    return Edit(
        status=inner.status,
        model=new,
        certificate=inner.certificate,
        delta={n: v.double() - model.values[model.parameters[n]].double() for n, v in inner.values.items()},
        moved={n: Moved.between(model.values[model.parameters[n]], v) for n, v in inner.values.items()},
        rows=len(r.lower),
        rows_before=int((excess <= 0).sum()),
        proven=len(r.lower) if result is not None else 0,
        held_before=tuple(held),
        smallest=inner.smallest,
        seconds={"features": 0.0, **inner.seconds},
        check=result,
        reason=inner.reason,
        conflict=inner.conflict,
        claims=tuple(claim.name for claim in r.claims),
    )


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
            claims=tuple(claim.name for claim in program.claims),
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
        change = candidate.weights.double() - program.weights
        if result.accepted and (search.bound is None or bool((change.abs() <= search.bound).all())):
            weight, bias = _changed(trunk.weight, trunk.bias, certificate)
            moved = {_weight_name(model, trunk): Moved.between(trunk.weight, weight)}
            if trunk.bias is not None and bias is not None:
                moved[f"{trunk.layer}.bias".removeprefix(".")] = Moved.between(trunk.bias, bias)
            return Edit(
                status="proved",
                model=_edited(model, trunk, certificate),
                certificate=certificate,
                delta={c: change[c] for c in program.edited},
                moved=moved,
                rows=len(program.lower),
                rows_before=int(satisfied.sum()),
                proven=result.proven,
                held_before=before,
                smallest=candidate.smallest,
                seconds=dict(seconds),
                check=result,
                claims=tuple(claim.name for claim in program.claims),
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
        cones=program.cones.numpy(),
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
    return model.with_values(
        {_weight_name(model, trunk): weight} | ({} if bias is None else {f"{trunk.layer}.bias": bias})
    )


def _weight_name(model: Network | nn.Module, trunk: Trunk) -> str:
    """The parameter that the layer's weight is in its model."""
    named = f"{trunk.layer}.weight".removeprefix(".")
    return trunk.layer if isinstance(model, Network) and named not in model.parameters else named


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
