"""From a finished search to its certificate: the program, the boxes and rows, and the trees, ready to be replayed.

The definition of the file is docs/certificates.md. The certificate holds no bound that its checker would have to
believe: only what was split and with which slopes and multipliers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from soundly.bounds.program import Affine, Convolution, Function, Matrix, Program, Sparse, Times, Variable
from soundly.certificate.format import FLOAT32, FORMAT, NETWORK, VERIFICATION, VERSION, Certificate
from soundly.graph.elementwise import Elementwise
from soundly.spec.grid import Choice
from soundly.verification.forest import BOUND, LEAF, REFRESH, Forest
from soundly.verification.problem import Problem

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Rounds:
    """Bounds that tightened the intervals of a node, in rounds: 2 * neuron + side, with a row of slopes and multipliers
    of the clause's rows and of the constraints on the path."""

    round: Array
    key: Array
    row: Array
    force: Array


@dataclass(frozen=True, eq=False)
class Lemma:
    """A bound of one neuron v on a case's box, and the tree that proves it.

    Attributes:
        key: 2 * neuron + 0 for v >= value, + 1 for v <= value.
        what, at: nodes level by level, which neuron is split and where; -1 and 0 for a leaf.
        slots: [S], 2 * neuron + side of the free slopes.
        slopes: [leaves, S] float32.
        beta: multipliers of the splits above each leaf, one leaf after the other.
    """

    case: int
    key: int
    value: float
    what: Array
    at: Array
    slots: Array
    slopes: Array
    beta: Array


@dataclass(frozen=True, eq=False)
class Grown:
    """Finished trees and what their nodes were bounded with.

    Attributes:
        forest: where they grew.
        trees: which of its trees.
        slots: [S], 2 * neuron + side of the free slopes, ascending.
        slopes: [K, S] float32.
        bound_slopes: node -> row of `slopes`.
        betas: node -> multipliers of the constraints on its path.
        root_slopes: 2 * neuron + side of a bound of the roots' intervals -> row of `slopes`.
        tightened: node -> how its intervals were tightened.
        lemmas: what was proved before.
        begins: tree -> the node below which its search began, if that is not the root: what leads there are splits that
            the clause's own rows decide.
    """

    forest: Forest
    trees: Sequence[int]
    slots: Array
    slopes: Array
    bound_slopes: Mapping[int, int]
    betas: Mapping[int, Array]
    root_slopes: Mapping[int, int]
    tightened: Mapping[int, Rounds]
    lemmas: Sequence[Lemma] = ()
    begins: Mapping[int, int] = field(default_factory=dict)


def certificate(problem: Problem, grown: Sequence[Grown], *, claim: str, model: Mapping[str, str]) -> Certificate:
    """The certificate of a search that left nothing open."""
    header, arrays = _question(problem)
    arrays |= _trees(grown) | _lemmas([lemma for g in grown for lemma in g.lemmas])
    return Certificate(
        {
            "format": FORMAT, "version": VERSION, "kind": VERIFICATION, "claim": claim,
            "model": dict(model), "made_with": {"torch": torch.__version__}, **header,
        },
        arrays,
    )  # fmt: skip


def identity(problem: Problem) -> dict[str, Array]:
    """The numbers of a problem: equal for equal problems."""
    header, arrays = _question(problem)
    return arrays | {"header": np.frombuffer(json.dumps(header, sort_keys=True).encode(), dtype=np.uint8)}


def differences(proof: Certificate, problem: Problem) -> list[str]:
    """How a certificate's network, boxes and rows differ from those of a problem; none if it proves exactly that."""
    header, arrays = _question(problem)
    names = [*header, *({"ball", "grid"} - set(header))]
    found = [f"{name} differs" for name in names if proof.header.get(name) != header.get(name)]
    for name, array in arrays.items():
        other = proof.arrays.get(name)
        if other is None or other.dtype != array.dtype or not np.array_equal(other, array):
            found.append(f"array {name!r} differs")
    return found


def _question(problem: Problem) -> tuple[dict[str, Any], dict[str, Array]]:
    header, arrays = _program(problem.program)
    header["arithmetic"] = FLOAT32 if problem.arithmetic == "float32" else NETWORK
    ball = problem.ball
    if ball is not None:
        header["ball"] = ball.norm
        arrays |= {"ball_centre": _f8(ball.centre[0]), "ball_radius": _f8(ball.radius[0])}
    if problem.grid is not None and problem.grid.choices:
        header["grid"] = len(problem.grid.choices)
        arrays |= _grid(problem.grid.choices)
    return header, arrays | _cases(problem)


def _grid(choices: Sequence[Choice]) -> dict[str, Array]:
    entries, values = [_i8(c.entries) for c in choices], [_f8(c.options).reshape(-1) for c in choices]
    return {
        "grid_entry": np.concatenate(entries), "grid_start": np.cumsum([0, *map(len, entries)]).astype(np.int64),
        "grid_value": np.concatenate(values), "grid_value_start": np.cumsum([0, *map(len, values)]).astype(np.int64),
    }  # fmt: skip


def _f8(x: Tensor) -> Array:
    return np.ascontiguousarray(x.detach().cpu().double().numpy())


def _i8(x: Tensor) -> Array:
    return np.ascontiguousarray(x.detach().cpu().long().numpy())


def _weights(x: Tensor) -> Array:
    """In float32 where that holds them exactly."""
    wide = _f8(x)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    return narrow if bool((narrow == wide).all()) else wide


def _program(program: Program) -> tuple[dict[str, Any], dict[str, Array]]:
    steps: list[dict[str, Any]] = []
    functions: list[dict[str, Any]] = []
    numbers: dict[Elementwise, int] = {}
    arrays: dict[str, Array] = {}
    for i, step in enumerate(program.steps):
        match step:
            case Variable(size):
                steps.append({"step": "variable", "size": size})
            case Affine(parts, bias, weight_error, bias_error):
                entry: dict[str, Any] = {"step": "affine", "size": step.size, "bias": f"b{i}"}
                arrays[f"b{i}"] = _weights(bias)
                entry["parts"] = []
                for k, (part, source) in enumerate(parts):
                    made, own = _map(part, source, f"{i}.{k}")
                    entry["parts"].append(made)
                    arrays |= own
                entry["weight_error"] = f"f{i}" if weight_error else None
                if weight_error:
                    arrays[f"f{i}"] = np.array([weight_error])
                entry["bias_error"] = None if bias_error is None else f"e{i}"
                if bias_error is not None:
                    arrays[f"e{i}"] = _f8(bias_error)
                steps.append(entry)
            case Function(source, op, size):
                if op not in numbers:
                    numbers[op] = len(functions)
                    made, own = _function(op, len(functions))
                    functions.append(made)
                    arrays |= own
                steps.append({"step": "function", "from": source, "size": size, "function": numbers[op]})
            case Times(left, right, size):
                steps.append({"step": "times", "left": left, "right": right, "size": size})
    return {"program": steps, "functions": functions}, arrays


def _map(part: Matrix | Convolution | Sparse, source: int, at: str) -> tuple[dict[str, Any], dict[str, Array]]:
    match part:
        case Matrix(weight, blocks):
            return (
                {"map": "matrix", "from": source, "array": f"w{at}", "blocks": blocks},
                {f"w{at}": _weights(weight)},
            )
        case Convolution():
            entry = {
                "map": "convolution", "from": source, "array": f"w{at}", "shape": list(part.weight.shape),
                "wide": list(part.wide), "narrow": list(part.narrow), "stride": list(part.stride),
                "padding": list(part.padding), "dilation": list(part.dilation), "groups": part.groups,
                "transposed": part.transposed,
            }  # fmt: skip
            return entry, {f"w{at}": _weights(part.weight.reshape(-1))}
        case Sparse(rows, columns, values, size):
            return (
                {"map": "sparse", "from": source, "rows": f"r{at}", "columns": f"c{at}", "array": f"w{at}",
                 "size": list(size)},
                {f"r{at}": _i8(rows), f"c{at}": _i8(columns), f"w{at}": _weights(values)},
            )  # fmt: skip


def _function(f: Elementwise, k: int) -> tuple[dict[str, Any], dict[str, Array]]:
    name, rate = f.ring.name, None
    arrays: dict[str, Array] = {}
    if name.startswith("exp("):
        rate, name = float(name[4:-3]), "exp(rate x)"
    elif name.startswith("x^"):
        rate, name = float(name[2:].split(",")[0]), "x^p, 1/x"
    terms = [[c, *map(float, e)] for piece in f.pieces for e, c in piece]
    width = 1 + 1 + len(f.ring.rules)
    held = f.held or ("left",) * len(f.breaks)
    arrays[f"function{k}.terms"] = np.array(terms, dtype=np.float64).reshape(-1, width)
    arrays[f"function{k}.breaks"] = np.array(f.breaks, dtype=np.float64)
    arrays[f"function{k}.held"] = np.array([0.0 if isinstance(h, str) else float(h) for h in held])
    if rate is not None:
        arrays[f"function{k}.rate"] = np.array([rate])
    entry = {
        "name": f.name, "ring": name, "rate": None if rate is None else f"function{k}.rate",
        "pieces": [len(piece) for piece in f.pieces], "terms": f"function{k}.terms",
        "breaks": f"function{k}.breaks", "held": f"function{k}.held",
        "held_kind": [h if isinstance(h, str) else "own" for h in held],
    }  # fmt: skip
    return entry, arrays


def _cases(problem: Problem) -> dict[str, Array]:
    rows, slack = problem.rows, problem.slack if problem.stated is None else problem.stated
    spans = problem.row_spans.tolist()
    order = np.concatenate([np.arange(first, last) for first, last in spans])
    y, x = _f8(rows.y)[order], _f8(rows.x)[order] if rows.reads_inputs else np.zeros((len(order), 0))
    both = np.concatenate([y, x], 1)
    at, column = both.nonzero()
    clause = _i8(rows.clause)[order]
    counts = [last - first for first, last in spans]
    clause = clause - np.repeat(_i8(problem.spans[:, 0]), counts)
    return {
        "box_lower": _f8(problem.lower), "box_upper": _f8(problem.upper),
        "case_rows": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "case_clauses": _i8(problem.spans[:, 1] - problem.spans[:, 0]),
        "row_start": np.searchsorted(at, np.arange(len(order) + 1)).astype(np.int64),
        "row_column": column.astype(np.int64), "row_value": both[at, column],
        "row_constant": _f8(rows.constant)[order], "row_slack": _f8(slack)[order], "row_clause": clause,
    }  # fmt: skip


def _trees(grown: Sequence[Grown]) -> dict[str, Array]:
    names = "flags kind what at slopes_bound slopes_refresh tree_case tree_clause beta group_key group_row".split()
    names += "tighten_node tighten_round tighten_key tighten_row tighten_force".split()
    parts: dict[str, list[Array]] = {name: [np.empty(0, np.int64)] for name in names}
    parts |= {name: [np.empty(0)] for name in ("beta", "tighten_force")}
    parts |= {"at": [], "tree_clause": [np.empty((0, 2), np.int64)]}
    counts: list[int] = []
    tree_sizes: list[int] = []
    group_sizes: list[int] = []
    forces: list[int] = []
    before = 0
    first_row = 0
    for g in grown:
        forest = g.forest
        group = -1
        if g.root_slopes:
            group = len(group_sizes)
            keys = np.array(sorted(g.root_slopes), dtype=np.int64)
            group_sizes.append(len(keys))
            parts["group_key"].append(keys)
            parts["group_row"].append(np.array([g.root_slopes[k] + first_row for k in keys.tolist()], dtype=np.int64))
        for t in g.trees:
            nodes = forest.order(t)
            tree_sizes.append(len(nodes))
            kind = forest.kind[nodes]
            flags = forest.flags[nodes].copy()
            begin = int(np.flatnonzero(nodes == g.begins.get(t, nodes[0]))[0])
            flags[[0, begin]] |= REFRESH
            inner = kind != LEAF
            parts["flags"].append(flags)
            parts["kind"].append(kind)
            parts["what"].append(np.where(inner, forest.what[nodes], 0))
            parts["at"].append(np.where(inner, forest.at[nodes], 0.0))
            bound = np.array([g.bound_slopes.get(n, -1) for n in nodes.tolist()], dtype=np.int64)
            parts["slopes_bound"].append(np.where((bound >= 0) & (flags & BOUND > 0), bound + first_row, -1))
            refresh = np.full(len(nodes), -1, dtype=np.int64)
            refresh[begin] = group
            parts["slopes_refresh"].append(refresh)
            for at, (n, f) in enumerate(zip(nodes.tolist(), flags.tolist(), strict=True), before):
                beta = g.betas.get(n) if f & BOUND else None
                counts.append(0 if beta is None else len(beta))
                if beta is not None:
                    parts["beta"].append(beta)
                rounds = g.tightened.get(n)
                if rounds is not None:
                    parts["tighten_node"].append(np.full(len(rounds.key), at))
                    parts["tighten_round"].append(rounds.round)
                    parts["tighten_key"].append(rounds.key)
                    parts["tighten_row"].append(rounds.row + first_row)
                    parts["tighten_force"].append(rounds.force.reshape(-1))
                    forces += [rounds.force.shape[1]] * len(rounds.key)
            before += len(nodes)
            parts["tree_case"].append(np.array([forest.case[t]], dtype=np.int64))
            parts["tree_clause"].append(np.array([[forest.first[t], forest.last[t]]], dtype=np.int64))
        first_row += len(g.slopes)
    slots = np.unique(np.concatenate([g.slots for g in grown])).astype(np.int64)
    slopes = np.zeros((first_row, len(slots)), np.float32)
    first_row = 0
    for g in grown:
        slopes[first_row : first_row + len(g.slopes), np.searchsorted(slots, g.slots)] = g.slopes
        first_row += len(g.slopes)
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    for name, sizes in (
        ("tree_start", tree_sizes), ("beta_start", counts), ("group_start", group_sizes),
        ("force_start", forces),
    ):  # fmt: skip
        arrays[name] = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return arrays | {"slots": slots, "slopes": slopes}


def _lemmas(lemmas: Sequence[Lemma]) -> dict[str, Array]:
    def joined(values: list[Array], dtype: type) -> Array:
        return np.concatenate([np.empty(0, dtype), *values]).astype(dtype)

    def starts(values: list[Array]) -> Array:
        return np.concatenate([[0], np.cumsum([len(v) for v in values])]).astype(np.int64)

    nodes, slots = [lemma.what for lemma in lemmas], [lemma.slots for lemma in lemmas]
    return {
        "lemma_case": np.array([lemma.case for lemma in lemmas], np.int64),
        "lemma_key": np.array([lemma.key for lemma in lemmas], np.int64),
        "lemma_value": np.array([lemma.value for lemma in lemmas], np.float64),
        "lemma_start": starts(nodes), "lemma_what": joined(nodes, np.int64),
        "lemma_at": joined([lemma.at for lemma in lemmas], np.float64),
        "lemma_slot_start": starts(slots), "lemma_slots": joined(slots, np.int64),
        "lemma_slopes": joined([lemma.slopes.reshape(-1) for lemma in lemmas], np.float32),
        "lemma_beta": joined([lemma.beta for lemma in lemmas], np.float64),
    }  # fmt: skip
