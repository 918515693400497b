"""Reads a certificate of kind "verification" of any origin: everything is checked before anything is computed.

Types, sizes, ranges, finiteness, the order of steps, the shape of trees, the coverage of clauses. What the replay would
ignore is refused, and sizes are checked before anything is allocated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from soundly.certificate.ball import L1, L2, Ball
from soundly.certificate.format import DTYPES, FLOAT32, NETWORK, Certificate
from soundly.certificate.functions import Function
from soundly.certificate.grid import Grid
from soundly.certificate.program import (
    Affine,
    Apply,
    Convolution,
    Map,
    Matrix,
    Program,
    Sparse,
    Step,
    Stored,
    Times,
    Variable,
)
from soundly.certificate.rings import FAR, Term, ring

Array = npt.NDArray[Any]

REFRESH, BOUND, CLIP, TOGETHER, SUMMED = 1, 2, 4, 8, 16
LEAF, INPUT, NEURON = 0, 1, 2
MAX_NEURONS, MAX_STEPS, MAX_TERMS, MAX_POWER, MAX_CLIPPED = 2**23, 2**12, 256, 64, 2**26
FUNCTION = ("name", "ring", "rate", "pieces", "terms", "breaks", "held", "held_kind")
OPTIONAL = frozenset({"ball", "grid"})
ENTRIES = frozenset({"format", "version", "kind", "arithmetic", "claim", "model", "program", "functions", "made_with"})


class Refused(Exception):
    """The first thing that is wrong with a certificate."""


def _refuse(problem: str) -> NoReturn:
    raise Refused(problem)


@dataclass(frozen=True, eq=False)
class Lemmas:
    """Bounds of single neurons, at least (side 0) or at most (1) `value` on a case's box, and their trees.

    start [L + 1]: the nodes of each; what is -1 in a leaf, else the neuron that is split. slot_start, slope_start and
    beta_start [L + 1]: the slots of each, a row of slopes per leaf, and the multipliers above each leaf in turn.
    """

    case: Array
    step: Array
    entry: Array
    side: Array
    value: Array
    start: Array
    what: Array
    at: Array
    child: Array
    slot_start: Array
    slots: Array
    slope_start: Array
    slopes: Array
    beta_start: Array
    beta: Array


@dataclass(frozen=True, eq=False)
class Proof:
    """A certificate's contents, valid in themselves.

    pair_start [cases + 1]: the clauses of each case; pair_rows [pairs + 1]: the rows of each clause.
    start, column, value, constant, slack: the rows; float32: whether they are claimed of what that computes, too.
    grid: on which alone points count. The tree's arrays are those of the file.
    """

    program: Program
    lower: Array
    upper: Array
    pair_start: Array
    pair_rows: Array
    start: Array
    column: Array
    value: Array
    constant: Array
    slack: Array
    tree_case: Array
    tree_clause: Array
    tree_start: Array
    flags: Array
    kind: Array
    what: Array
    at: Array
    child: Array
    slopes_bound: Array
    slopes_refresh: Array
    beta_start: Array
    beta: Array
    tighten_start: Array
    tighten_round: Array
    tighten_key: Array
    tighten_row: Array
    force_start: Array
    force: Array
    stored: Stored
    float32: bool
    lemmas: Lemmas
    grid: Grid | None = None


class _Reader:
    """The certificate's arrays, by dtype and shape; remembers which were asked for."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays, self.used = arrays, set[str]()

    def get(self, name: object, dtypes: str, *shape: int | None) -> Array:
        """None in the shape stands for any size."""
        if not isinstance(name, str) or name not in self.arrays:
            _refuse(f"array {name!r:.80} is missing")
        array = self.arrays[name]
        self.used.add(name)
        if array.dtype not in [DTYPES[dtype] for dtype in dtypes.split()] or array.ndim != len(shape):
            _refuse(f"{name}: {array.dtype} with {array.ndim} dimensions; expected {dtypes} with {len(shape)}")
        if any(want is not None and want != size for want, size in zip(shape, array.shape, strict=True)):
            _refuse(f"{name}: shape {array.shape}; expected {tuple('any' if n is None else n for n in shape)}")
        return array

    def numbers(self, name: object, *shape: int | None, dtypes: str = "f8", largest: float = FAR) -> Array:
        """Finite numbers of a size that cannot overflow, as float64."""
        array = self.get(name, dtypes, *shape).astype(np.float64)
        if not (np.abs(array) <= largest).all():  # so that NaN fails
            _refuse(f"{name}: not finite, or larger than {largest:.3g}")
        return array

    def offsets(self, name: str, size: int, total: int, *, least: int = 0) -> Array:
        """Where each of `size` ranges begins, from 0 to `total`."""
        array = self.get(name, "i8", size + 1)
        if array[0] != 0 or array[-1] != total or (array < 0).any() or (array > total).any():
            _refuse(f"{name} must begin with 0 and end with {total}")
        if (np.diff(array) < least).any():
            _refuse(f"{name} decreases, or leaves something empty")
        return array

    def indices(self, name: object, size: int | None, limit: int, *, least: int = 0) -> Array:
        array = self.get(name, "i8", size)
        if ((array < least) | (array >= limit)).any():
            _refuse(f"{name} out of range")
        return array


def read(certificate: Certificate) -> Proof:
    """Everything in the certificate, checked. Raises Refused with the first problem."""
    header, arrays = certificate.header, _Reader(certificate.arrays)
    if set(header) - OPTIONAL != ENTRIES:
        _refuse(f"missing or unknown entries: {sorted((set(header) - OPTIONAL) ^ ENTRIES)!s:.200}")
    if header["arithmetic"] not in (NETWORK, FLOAT32):
        _refuse(f"claimed {header['arithmetic']!r:.80}; this checker proves {NETWORK!r} or {FLOAT32!r}")
    if not isinstance(header["claim"], str) or not isinstance(header["made_with"], dict):
        _refuse("claim must be a text and made_with an object")
    if not isinstance(header["model"], dict) or not all(isinstance(v, str) for v in header["model"].values()):
        _refuse("model must be an object of texts")
    functions = [_function(arrays, entry, i) for i, entry in enumerate(_list(header["functions"], "functions"))]
    slots = arrays.get("slots", "i8", None)
    program = _program(arrays, _list(header["program"], "program"), functions, slots)
    neurons, inputs, outputs = int(program.offsets[-1]), program.steps[0].size, program.steps[-1].size
    if ((slots < 0) | (slots >= 2 * neurons)).any() or len(np.unique(slots)) != len(slots):
        _refuse("slots out of range, or one twice")
    slopes = arrays.get("slopes", "f4", None, len(slots))
    if not (np.abs(slopes) < np.inf).all():
        _refuse("slopes are not finite")
    if "ball" in header:
        program = replace(program, ball=_ball(arrays, header["ball"], inputs))
    grid = _grid(arrays, header["grid"], inputs) if "grid" in header else None
    cases = _cases(arrays, inputs, outputs)
    stored = _stored(arrays, slopes, neurons)
    trees = _trees(arrays, program, cases["pair_start"], cases["pair_rows"], stored)
    lemmas = _lemmas(arrays, program, len(cases["lower"]))
    rows = np.diff(cases["pair_rows"][cases["pair_start"]]).max()
    if rows * inputs > MAX_CLIPPED and (trees["flags"] & CLIP).any():
        _refuse(f"flags: {rows} rows of one case with {inputs} inputs are too many to clip with")
    if unused := set(certificate.arrays) - arrays.used:
        _refuse(f"arrays that nothing refers to: {sorted(unused)!s:.200}")
    return Proof(
        program=program, stored=stored, lemmas=lemmas, grid=grid, float32=header["arithmetic"] == FLOAT32, **cases,
        **trees,
    )  # fmt: skip


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        _refuse(f"{name} must be a list")
    return value


def _size(value: object, name: str, least: int = 1, limit: int = MAX_NEURONS) -> int:
    if type(value) is not int or not least <= value <= limit:
        _refuse(f"{name}: {value!r:.40} is not an integer between {least} and {limit}")
    return value


def _function(arrays: _Reader, entry: object, i: int) -> Function:
    where = f"function {i}"
    if not isinstance(entry, dict) or set(entry) != set(FUNCTION):
        _refuse(f"{where}: needs {', '.join(FUNCTION)}")
    title, name, rate, pieces, terms, breaks, held, held_kind = (entry[key] for key in FUNCTION)
    if not all(isinstance(v, kind) for v, kind in ((title, str), (name, str), (pieces, list), (held_kind, list))):
        _refuse(f"{where}: name and ring must be texts, pieces and held_kind lists")
    try:
        base = ring(name, None if rate is None else float(arrays.numbers(rate, 1)[0]))
    except ValueError as problem:
        _refuse(f"{where}: {problem}")
    counts = [_size(count, f"{where}: pieces", 0, MAX_TERMS) for count in pieces]
    if not 0 < len(counts) <= MAX_TERMS or len(held_kind) != len(counts) - 1:
        _refuse(f"{where}: needs pieces, and one held_kind for every break between them")
    table = arrays.numbers(terms, sum(counts), 2 + len(base.bases))
    powers = table[:, 1:]
    if (powers != np.round(powers)).any() or (powers < 0).any() or (powers.sum(axis=1) > MAX_POWER).any():
        _refuse(f"{where}: exponents must be whole numbers from 0 to {MAX_POWER}")
    points = arrays.numbers(breaks, len(counts) - 1)
    if (points[1:] <= points[:-1]).any():
        _refuse(f"{where}: breaks must increase")
    values = arrays.numbers(held, len(counts) - 1)
    if not all(kind in ("left", "right", "own") for kind in held_kind):
        _refuse(f"{where}: held_kind must be left, right or own")
    polynomials, begin = [], 0
    for count in counts:
        rows = table[begin : begin + count].tolist()
        polynomial = tuple(Term(tuple(map(int, e)), Fraction(c), abs(Fraction(c))) for c, *e in rows)
        if len({term.exponents for term in polynomial}) != count:
            _refuse(f"{where}: the same exponents twice in one piece")
        polynomials.append(polynomial)
        begin += count
    own = [v if kind == "own" else math.nan for v, kind in zip(values.tolist(), held_kind, strict=True)]
    say = tuple(1 if kind == "right" else -1 for kind in held_kind)
    return Function(base, tuple(polynomials), tuple(points.tolist()), tuple(own), say)


def _program(arrays: _Reader, entries: list[Any], functions: Sequence[Function], slots: Array) -> Program:
    if not 0 < len(entries) <= MAX_STEPS:
        _refuse(f"program: needs 1 to {MAX_STEPS} steps")
    sizes: list[int] = []
    steps: list[Step] = []
    for i, entry in enumerate(entries):
        where = f"step {i}"
        if not isinstance(entry, dict):
            _refuse(f"{where} must be an object")
        size = _size(entry.get("size"), f"{where}: size")
        step: Step
        match entry:
            case {"step": "variable", "size": _} if len(entry) == 2 and i == 0:
                step = Variable(size)
            case {"step": "affine", "size": _, "parts": list(parts), "bias": bias, "bias_error": error,
                  "weight_error": factor} if len(entry) == 6 and i > 0:  # fmt: skip
                maps = tuple(_part(arrays, part, sizes, size, f"{where}, part {j}") for j, part in enumerate(parts))
                bias_error = np.zeros(size) if error is None else np.abs(arrays.numbers(error, size))
                weight_error = 0.0 if factor is None else abs(float(arrays.numbers(factor, 1, largest=1.0)[0]))
                step = Affine(maps, arrays.numbers(bias, size, dtypes="f4 f8"), weight_error, bias_error)
            case {"step": "function", "size": _, "from": source, "function": k} if len(entry) == 4 and i > 0:
                _same_size(sizes, source, size, where)
                step = Apply(source, functions[_size(k, f"{where}: function", 0, len(functions) - 1)], size)
            case {"step": "times", "size": _, "left": left, "right": right} if len(entry) == 4 and i > 0:
                _same_size(sizes, left, size, where)
                _same_size(sizes, right, size, where)
                step = Times(left, right, size)
            case _:
                _refuse(f"{where}: is none of variable (which comes first), affine, function and times")
        steps.append(step)
        sizes.append(size)
        if sum(sizes) > MAX_NEURONS:
            _refuse(f"program: more than {MAX_NEURONS} neurons")
    return Program(tuple(steps), slots)


def _same_size(sizes: Sequence[int], source: object, size: int, where: str) -> None:
    if sizes[_size(source, f"{where}: source", 0, len(sizes) - 1)] != size:
        _refuse(f"{where}: size {size} differs from that of step {source}")


def _part(arrays: _Reader, part: object, sizes: Sequence[int], size: int, where: str) -> tuple[Map, int]:
    if not isinstance(part, dict):
        _refuse(f"{where}: must be an object")
    source = _size(part.get("from"), f"{where}: from", 0, len(sizes) - 1)
    n = sizes[source]
    found: Map | None = None
    match part:
        case {"map": "matrix", "from": _, "array": name, "blocks": blocks} if len(part) == 4:
            blocks = _size(blocks, f"{where}: blocks")
            if size % blocks or n % blocks:
                _refuse(f"{where}: {blocks} blocks do not divide {size} outputs and {n} inputs")
            weight = arrays.numbers(name, size // blocks, n // blocks, dtypes="f4 f8")
            found = Matrix(weight, blocks)
        case {"map": "convolution", "from": _} if len(part) == 11:
            found = _convolution(arrays, part, where)
        case {"map": "sparse", "from": _, "rows": rows, "columns": columns, "array": name, "size": list(shape)} if len(
            part
        ) == 6 and shape == [size, n]:
            values = arrays.numbers(name, None, dtypes="f4 f8")
            rows, columns = arrays.indices(rows, len(values), size), arrays.indices(columns, len(values), n)
            if len(np.unique(rows * n + columns)) != len(values):
                _refuse(f"{where}: the same row and column twice")
            found = Sparse(rows, columns, values, (size, n))
    if found is None or found.size != (size, n):
        _refuse(f"{where}: is no matrix, convolution or sparse map from {n} to {size} numbers")
    return found, source


def _convolution(arrays: _Reader, part: Mapping[str, Any], where: str) -> Convolution:
    lists: dict[str, tuple[int, ...]] = {}
    for key, least in (("shape", 1), ("wide", 1), ("narrow", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        values = _list(part.get(key), f"{where}: {key}")
        lists[key] = tuple(_size(value, f"{where}: {key}", least) for value in values)
    groups, transposed = _size(part.get("groups"), f"{where}: groups"), part.get("transposed")
    wide, narrow, shape, dimensions = lists["wide"], lists["narrow"], lists["shape"], len(lists["stride"])
    lengths = {len(v) - (k in ("wide", "narrow")) - 2 * (k == "shape") for k, v in lists.items()}
    if lengths != {dimensions} or not 1 <= dimensions <= 3 or type(transposed) is not bool:
        _refuse(f"{where}: the convolution's dimensions disagree")
    fits = shape[0] == narrow[0] and shape[0] % groups == 0 and shape[1] * groups == wide[0]
    for w, m, k, s, p, d in zip(
        wide[1:], narrow[1:], shape[2:], lists["stride"], lists["padding"], lists["dilation"], strict=True
    ):
        fits &= 0 <= w + 2 * p - d * (k - 1) - 1 and m == (w + 2 * p - d * (k - 1) - 1) // s + 1
    padded = math.prod(w + 2 * p for w, p in zip(wide[1:], lists["padding"], strict=True))
    if not fits or max(math.prod(wide), math.prod(narrow), wide[0] * padded) > MAX_NEURONS:
        _refuse(f"{where}: the convolution's sizes disagree, or are too large")
    weight = arrays.numbers(part.get("array"), math.prod(shape), dtypes="f4 f8").reshape(shape)
    return Convolution(weight, wide, narrow, lists["stride"], lists["padding"], lists["dilation"], groups, transposed)


def _ball(arrays: _Reader, norm: object, inputs: int) -> Ball:
    if norm not in (L1, L2):
        _refuse(f"ball: {norm!r:.40} is neither {L1!r} nor {L2!r}")
    centre, radius = arrays.numbers("ball_centre", inputs), arrays.numbers("ball_radius", inputs)
    if ((radius != 0) & (radius < 1 / FAR)).any():
        _refuse("ball_radius is negative, or too small to divide by")
    return Ball(centre[None], radius[None], str(norm))


def _grid(arrays: _Reader, choices: object, inputs: int) -> Grid:
    count = _size(choices, "grid", 1, inputs)
    entry = arrays.indices("grid_entry", None, inputs)
    if len(np.unique(entry)) != len(entry):
        _refuse("grid_entry: one twice")
    value = arrays.numbers("grid_value", None)
    start = arrays.offsets("grid_start", count, len(entry), least=1)
    value_start = arrays.offsets("grid_value_start", count, len(value), least=1)
    if (np.diff(value_start) % np.diff(start)).any():
        _refuse("grid_value: options of different lengths")
    entries = tuple(entry[a:b] for a, b in pairwise(start.tolist()))
    spans = zip(entries, pairwise(value_start.tolist()), strict=True)
    return Grid(entries, tuple(value[a:b].reshape(-1, len(own)) for own, (a, b) in spans))


def _cases(arrays: _Reader, inputs: int, outputs: int) -> dict[str, Array]:
    lower = arrays.numbers("box_lower", None, inputs)
    cases = len(lower)
    upper = arrays.numbers("box_upper", cases, inputs)
    if cases == 0:
        _refuse("nothing is claimed: there are no cases")
    constant = arrays.numbers("row_constant", None)
    rows = len(constant)
    slack = arrays.numbers("row_slack", rows)
    if (slack < 0).any():
        _refuse("row_slack is negative")
    value = arrays.numbers("row_value", None)
    column = arrays.indices("row_column", len(value), outputs + inputs)
    start = arrays.offsets("row_start", rows, len(value))
    inner = np.ones(len(column), bool)
    inner[start[:-1][start[:-1] < len(column)]] = False
    if (np.diff(column)[inner[1:]] <= 0).any():
        _refuse("row_column must increase within a row")
    case_rows = arrays.offsets("case_rows", cases, rows)
    clauses = arrays.get("case_clauses", "i8", cases)
    if ((clauses < 1) | (clauses > rows)).any():
        _refuse("case_clauses: every case needs a clause, and every clause a row")
    pair_start = np.cumsum([0, *clauses.tolist()])
    row_case = np.repeat(np.arange(cases), np.diff(case_rows))
    clause = arrays.get("row_clause", "i8", rows)
    if ((clause < 0) | (clause >= clauses[row_case])).any():
        _refuse("row_clause out of range")
    pair = pair_start[row_case] + clause
    if (np.diff(pair) < 0).any() or len(np.unique(pair)) != pair_start[-1]:
        _refuse("row_clause decreases within a case, or a clause has no row")
    pair_rows = np.searchsorted(pair, np.arange(pair_start[-1] + 1))
    return {
        "lower": lower, "upper": upper, "pair_start": pair_start, "pair_rows": pair_rows, "start": start,
        "column": column, "value": value, "constant": constant, "slack": slack,
    }  # fmt: skip


def _stored(arrays: _Reader, slopes: Array, neurons: int) -> Stored:
    count = len(arrays.get("group_start", "i8", None)) - 1
    if count < 0:
        _refuse("group_start is empty")
    row = arrays.indices("group_row", None, len(slopes))
    key = arrays.indices("group_key", len(row), 2 * neurons)
    start = arrays.offsets("group_start", count, len(key))
    group = np.repeat(np.arange(count), np.diff(start))
    if (np.diff(group * (2 * neurons) + key) <= 0).any():
        _refuse("group_key must increase within a group")
    return Stored(slopes, start, key, row)


def _trees(arrays: _Reader, program: Program, pair_start: Array, pair_rows: Array, stored: Stored) -> dict[str, Array]:
    case = arrays.indices("tree_case", None, len(pair_start) - 1)
    trees = len(case)
    clause = arrays.get("tree_clause", "i8", trees, 2)
    most = np.diff(pair_start)[case]
    if ((clause[:, 0] < 0) | (clause[:, 0] >= clause[:, 1]) | (clause[:, 1] > most)).any():
        _refuse("tree_clause must be a range of the case's clauses that is not empty")
    covered = np.zeros(pair_start[-1] + 1, int)
    np.add.at(covered, pair_start[case] + clause[:, 0], 1)
    np.add.at(covered, pair_start[case] + clause[:, 1], -1)
    if (np.cumsum(covered)[:-1] < 1).any():
        _refuse("a clause is covered by no tree")
    flags = arrays.indices("flags", None, 32)
    nodes = len(flags)
    start = arrays.offsets("tree_start", trees, nodes, least=1)
    kind = arrays.indices("kind", nodes, 3)
    what = arrays.get("what", "i8", nodes)
    at = arrays.numbers("at", nodes)
    beta = arrays.numbers("beta", None)
    if (beta < 0).any():
        _refuse("beta is negative")
    beta_start = arrays.offsets("beta_start", nodes, len(beta))
    bound = arrays.indices("slopes_bound", nodes, len(stored.slopes), least=-1)
    group = arrays.indices("slopes_refresh", nodes, len(stored.start) - 1, least=-1)
    refreshed, bounded, clipped, together, summed = (
        (flags & flag) > 0 for flag in (REFRESH, BOUND, CLIP, TOGETHER, SUMMED)
    )
    if not refreshed[start[:-1]].all():
        _refuse("flags: the root of a tree must be refreshed")
    if (clipped & ~bounded).any():
        _refuse("flags: a node is clipped that is not bounded")
    if (together & ~(refreshed & bounded)).any() or (together.any() and program.together is None):
        _refuse("flags: products are bounded together where nothing is refreshed or bounded, or where there are none")
    if (summed & ~(refreshed & bounded)).any() or (summed.any() and not program.absolute):
        _refuse("flags: absolute values are summed up where nothing is refreshed or bounded, or where there are none")
    if ((bound >= 0) & ~bounded).any() or ((group >= 0) & ~refreshed).any():
        _refuse("slopes for a node that does not use them")
    if (np.diff(beta_start)[~bounded] > 0).any():
        _refuse("beta for a node that is not bounded")
    leaf, split = kind == LEAF, kind == NEURON
    if (what[leaf] != 0).any() or (at[leaf] != 0).any():
        _refuse("what and at must be 0 in leaves")
    if ((what < 0) | (what >= np.where(split, program.offsets[-1], program.steps[0].size)))[~leaf].any():
        _refuse("what: no such input or neuron")
    step = np.searchsorted(program.offsets, what[split], side="right") - 1
    if not np.isin(step, [i for i in program.bounded if i > 0]).all():
        _refuse("what: a neuron is split that no function or product reads, or an input as a neuron")
    tree, child, depth = _levels(start, ~leaf, split)
    rows = np.where(clause[:, 1] - clause[:, 0] == 1, np.diff(pair_rows)[pair_start[case] + clause[:, 0]], -1)
    length = np.diff(beta_start)
    if ((length != 0) & (length != depth)).any():
        _refuse("beta: one number for each neuron split above the node, or none")
    return {
        "tree_case": case, "tree_clause": clause, "tree_start": start, "flags": flags, "kind": kind, "what": what,
        "at": at, "child": child, "slopes_bound": bound, "slopes_refresh": group, "beta_start": beta_start,
        "beta": beta,
        **_tightened(arrays, program, stored, depth, rows[tree]),
    }  # fmt: skip


def _levels(start: Array, inner: Array, counted: Array) -> tuple[Array, Array, Array]:
    """Of nodes in level order: their trees, the first of the two children of each, how many counted ones are above."""
    # The children of a tree's i-th split are its nodes 1 + 2 i and 2 + 2 i: then every node is reached once.
    nodes, trees = len(inner), len(start) - 1
    before = np.cumsum(inner) - inner
    tree = np.repeat(np.arange(trees), np.diff(start))
    position, number = np.arange(nodes) - start[tree], before - before[start[tree]]
    if (position > 2 * number)[inner].any():
        _refuse("kind: the nodes of a tree are not in level order")
    splits = np.add.reduceat(inner, start[:-1], dtype=int) if trees else np.zeros(0, int)
    if (np.diff(start) != 1 + 2 * splits).any():
        _refuse("kind: a tree's splits and nodes do not fit")
    depth = np.zeros(nodes, int)
    child = start[tree] + 1 + 2 * number
    for node in np.flatnonzero(inner).tolist():
        depth[child[node] : child[node] + 2] = depth[node] + counted[node]
    return tree, child, depth


def _lemmas(arrays: _Reader, program: Program, cases: int) -> Lemmas:
    starts, neurons = program.offsets, int(program.offsets[-1])
    key = arrays.indices("lemma_key", None, 2 * neurons, least=2 * int(starts[1]))
    count = len(key)
    case, value = arrays.indices("lemma_case", count, cases), arrays.numbers("lemma_value", count)
    what = arrays.indices("lemma_what", None, neurons, least=-1)
    at = arrays.numbers("lemma_at", len(what))
    start = arrays.offsets("lemma_start", count, len(what), least=1)
    inner = what >= 0
    tree, child, depth = _levels(start, inner, inner)
    if (at[~inner] != 0).any():
        _refuse("lemma_at must be 0 in leaves")
    step, of = np.searchsorted(starts, key // 2, side="right") - 1, np.searchsorted(starts, what, side="right") - 1
    bounded = [i for i in program.bounded if i > 0]
    if (~np.isin(of, bounded) | (of >= step[tree]))[inner].any():
        _refuse("lemma_what: an input, a neuron that no function or product reads, or one of no earlier step")
    slots = arrays.indices("lemma_slots", None, 2 * neurons)
    slot_start = arrays.offsets("lemma_slot_start", count, len(slots))
    number = np.repeat(np.arange(count), np.diff(slot_start))
    if len(np.unique(number * (2 * neurons) + slots)) != len(slots):
        _refuse("lemma_slots: one twice")
    leaves = np.bincount(tree[~inner], minlength=count)
    slope_start = np.cumsum([0, *(leaves * np.diff(slot_start)).tolist()])
    beta_start = np.cumsum([0, *np.bincount(tree, np.where(inner, 0, depth), count).astype(int).tolist()])
    slopes = arrays.numbers("lemma_slopes", int(slope_start[-1]), dtypes="f4")
    force = arrays.numbers("lemma_beta", int(beta_start[-1]))
    if not (force >= 0).all():
        _refuse("lemma_beta is negative")
    return Lemmas(
        case, step, key // 2 - starts[step], key % 2, value, start, what, at, child, slot_start, slots, slope_start,
        slopes, beta_start, force,
    )  # fmt: skip


def _tightened(arrays: _Reader, program: Program, stored: Stored, depth: Array, rows: Array) -> dict[str, Array]:
    """How intervals of nodes are tightened; of nodes their splits above and the rows of their clause, -1 if it is not
    one clause."""
    key = arrays.get("tighten_key", "i8", None)
    count = len(key)
    number = arrays.get("tighten_round", "i8", count)
    row = arrays.indices("tighten_row", count, len(stored.slopes))
    node = arrays.indices("tighten_node", count, len(depth))
    if (np.diff(node) < 0).any():
        _refuse("tighten_node decreases")
    if ((key < 0) | (key >= 2 * program.offsets[-1])).any():
        _refuse("tighten_key out of range")
    step = np.searchsorted(program.offsets, key // 2, side="right") - 1
    if not np.isin(step, [i for i in program.bounded if i > 0]).all():
        _refuse("tighten_key: an input, or a neuron that no function or product reads")
    if (number < 0).any():
        _refuse("tighten_round is negative")
    same = (np.diff(node) == 0) & (np.diff(number) == 0)
    if ((np.diff(node) == 0) & (np.diff(number) < 0)).any() or (same & (np.diff(key) <= 0)).any():
        _refuse("tighten_round must not decrease within a node, and tighten_key must increase within a round")
    if (rows[node] < 0).any():
        _refuse("tighten_node: of a tree for several clauses")
    force = arrays.numbers("tighten_force", None)
    if (force < 0).any():
        _refuse("tighten_force is negative")
    force_start = arrays.offsets("force_start", count, len(force))
    if (np.diff(force_start) != (rows + depth)[node]).any():
        _refuse("tighten_force: one number for each row of the clause and each neuron split above the node")
    start = np.searchsorted(node, np.arange(len(depth) + 1))
    return {
        "tighten_start": start, "tighten_round": number, "tighten_key": key, "tighten_row": row,
        "force_start": force_start, "force": force,
    }  # fmt: skip
