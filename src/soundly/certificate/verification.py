"""Replays the proof of a verification: reads the program, the cases and the split trees, and derives every bound anew.

The file holds no bound that is believed: boxes come from the cases and the splits, intervals and bounds from
`soundly.certificate.bounding`. A clause of a case is proven by a tree if below every leaf something closed it: a bound,
an empty box or an empty interval. Nodes are replayed in batches, deepest first, so that memory stays bounded.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from soundly.certificate.bounding import (
    Affine,
    Apply,
    Bound,
    Convolution,
    Exceptions,
    Frame,
    Map,
    Matrix,
    Pieces,
    Program,
    Sparse,
    Splits,
    Step,
    Times,
    Variable,
    View,
    pieces,
    refresh,
    relax,
)
from soundly.certificate.format import DTYPES, NETWORK, Certificate
from soundly.certificate.functions import FAR, Function, Term, U, ring

Array = npt.NDArray[Any]

REFRESH, BOUND, CLIP = 1, 2, 4
LEAF, INPUT, NEURON = 0, 1, 2
BATCH = 512  # nodes at once
FRAME = 2**22  # neurons of all nodes of a batch with intervals of their own
MAX_NEURONS, MAX_STEPS, MAX_TERMS, MAX_POWER = 2**23, 2**12, 256, 64
ENTRIES = frozenset({"format", "version", "kind", "arithmetic", "claim", "model", "program", "functions", "made_with"})


class _Refused(Exception):
    """The first thing that is wrong with a certificate."""


def _refuse(problem: str) -> NoReturn:
    raise _Refused(problem)


@dataclass(frozen=True, eq=False)
class Replay:
    """What the trees prove.

    proven: for every clause of every case, in order, whether it is proven on its whole box.
    margin: by how much its bounds exceed the slack in the worst leaf; infinite where no bound was needed.
    pair_start: where the clauses of each case begin.
    failed: (tree, position in the tree) of leaves where a clause stays open.
    problems: why nothing was replayed.
    """

    proven: Array
    margin: Array
    pair_start: Array
    failed: list[tuple[int, int]]
    problems: tuple[str, ...] = ()


def replay(certificate: Certificate) -> Replay:
    """Derive all bounds of a certificate of kind "verification" again.

    Guarantee: a clause that counts as proven has, for every real point x of its case's box, a row with
    s(x) > slack, for the stored network and every network within its stated errors, in real arithmetic.
    """
    try:
        proof = read(certificate)
    except _Refused as problem:
        nothing = np.zeros(0, bool)
        return Replay(nothing, nothing.astype(float), np.zeros(1, int), [], (str(problem),))
    with np.errstate(all="ignore"):  # overflow ends in infinities and NaN, which prove nothing
        return _Replayer(proof).run()


@dataclass(frozen=True, eq=False)
class Proof:
    """A certificate's contents, valid in themselves.

    pair_start [cases + 1]: the clauses of each case; pair_rows [pairs + 1]: the rows of each clause.
    start, column, value, constant, slack: the rows. The tree's arrays are those of the file.
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
    slopes: Array


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
    """Everything in the certificate, checked. Raises _Refused with the first problem."""
    header, arrays = certificate.header, _Reader(certificate.arrays)
    if set(header) != ENTRIES:
        _refuse(f"missing or unknown entries: {sorted(set(header) ^ ENTRIES)!s:.200}")
    if header["arithmetic"] != NETWORK:
        _refuse(f"claimed {header['arithmetic']!r:.80}; this checker proves {NETWORK!r}")
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
    cases = _cases(arrays, inputs, outputs)
    trees = _trees(arrays, program, cases["pair_start"], len(slopes))
    if unused := set(certificate.arrays) - arrays.used:
        _refuse(f"arrays that nothing refers to: {sorted(unused)!s:.200}")
    return Proof(program=program, slopes=slopes, **cases, **trees)


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
    match entry:
        case {
            "name": str(),
            "ring": str(name),
            "rate": rate,
            "pieces": list(pieces),
            "terms": terms,
            "breaks": breaks,
            "held": held,
            "held_kind": list(held_kind),
        } if len(entry) == 8:
            pass
        case _:
            _refuse(f"{where}: needs name, ring, rate, pieces, terms, breaks, held and held_kind")
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
    return Function(base, tuple(polynomials), tuple(points.tolist()), tuple(own))


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
    n, found = sizes[source], None
    match part:
        case {"map": "matrix", "from": _, "array": name, "blocks": blocks} if len(part) == 4:
            blocks = _size(blocks, f"{where}: blocks")
            if size % blocks or n % blocks:
                _refuse(f"{where}: {blocks} blocks do not divide {size} outputs and {n} inputs")
            weight = arrays.numbers(name, size // blocks, n // blocks, dtypes="f4 f8")
            found: Map | None = Matrix(weight, blocks)  # type: ignore[no-redef]
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


def _trees(arrays: _Reader, program: Program, pair_start: Array, stored: int) -> dict[str, Array]:
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
    flags = arrays.indices("flags", None, 8)
    nodes = len(flags)
    start = arrays.offsets("tree_start", trees, nodes, least=1)
    kind = arrays.indices("kind", nodes, 3)
    what = arrays.get("what", "i8", nodes)
    at = arrays.numbers("at", nodes)
    beta = arrays.numbers("beta", None)
    if (beta < 0).any():
        _refuse("beta is negative")
    beta_start = arrays.offsets("beta_start", nodes, len(beta))
    bound = arrays.indices("slopes_bound", nodes, stored, least=-1)
    rows = arrays.indices("slopes_refresh", nodes, stored, least=-1)
    if (rows[rows >= 0] + len(program.bounded) > stored).any():
        _refuse("slopes_refresh: fewer rows of slopes follow than there are steps to bound")
    refreshed, bounded, clipped = ((flags & flag) > 0 for flag in (REFRESH, BOUND, CLIP))
    if not refreshed[start[:-1]].all():
        _refuse("flags: the root of a tree must be refreshed")
    if (clipped & ~bounded).any():
        _refuse("flags: a node is clipped that is not bounded")
    if ((bound >= 0) & ~bounded).any() or ((rows >= 0) & ~refreshed).any():
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
    # In level order the children of the i-th split are nodes 1 + 2 i and 2 + 2 i: then every node is reached once.
    before = np.cumsum(~leaf) - ~leaf
    tree = np.repeat(np.arange(trees), np.diff(start))
    position, number = np.arange(nodes) - start[tree], before - before[start[tree]]
    if (position > 2 * number)[~leaf].any():
        _refuse("kind: the nodes of a tree are not in level order")
    splits = np.add.reduceat(~leaf, start[:-1], dtype=int) if trees else np.zeros(0, int)
    if (np.diff(start) != 1 + 2 * splits).any():
        _refuse("kind: a tree's splits and nodes do not fit")
    depth = np.zeros(nodes, int)  # how many neuron splits lie above a node
    child = start[tree] + 1 + 2 * number
    for node in np.flatnonzero(~leaf).tolist():
        depth[child[node] : child[node] + 2] = depth[node] + split[node]
    length = np.diff(beta_start)
    if ((length != 0) & (length != depth)).any():
        _refuse("beta: one number for each neuron split above the node, or none")
    return {
        "tree_case": case, "tree_clause": clause, "tree_start": start, "flags": flags, "kind": kind, "what": what,
        "at": at, "child": child, "slopes_bound": bound, "slopes_refresh": rows, "beta_start": beta_start, "beta": beta,
    }  # fmt: skip


Neuron = tuple[int, int, float, int]
"""A split on the way to a node: step, entry, at, and +1 above or -1 below."""


@dataclass(slots=True, eq=False)
class _Node:
    """A node to be replayed: its place in the file and the state that it inherits."""

    tree: int
    place: int
    depth: int
    lower: Array
    upper: Array
    frame: Frame
    row: int
    splits: tuple[Neuron, ...]
    open: Array


@dataclass(eq=False)
class _Replayer:
    proof: Proof
    pending: dict[int, list[_Node]] = field(default_factory=dict)
    shared: dict[tuple[int, int, int], tuple[Frame, Frame, dict[int, Pieces]]] = field(default_factory=dict)

    def run(self) -> Replay:
        proof, pairs = self.proof, int(self.proof.pair_start[-1])
        self.failed: list[tuple[int, int]] = []
        self.margin = np.full(pairs, np.inf)
        self.left_open = [np.zeros(last - first, bool) for first, last in proof.tree_clause.tolist()]
        self.narrow = max(1, min(BATCH, FRAME // int(proof.program.offsets[-1])))
        roots = proof.tree_start[:-1]
        # Trees of one case that refresh the root alike share its intervals.
        keys = np.stack([proof.tree_case, proof.slopes_refresh[roots]], axis=1)
        unique, number = np.unique(keys, axis=0, return_inverse=True)
        order = np.argsort(number.reshape(-1), kind="stable")
        number = number.reshape(-1)[order]
        for begin in range(0, len(unique), self.narrow):
            some = unique[begin : begin + self.narrow]
            lower, upper = proof.lower[some[:, 0]], proof.upper[some[:, 0]]
            row_of: dict[int, tuple[Frame, int, bool]] = {}
            for which in _alike((some[:, 1] >= 0).astype(int)):
                frame, dead = self._refresh(lower[which], upper[which], None, some[which, 1])
                row_of |= {int(key): (frame, row, bool(dead[row])) for row, key in enumerate(which)}
            first, last = np.searchsorted(number, [begin, begin + len(some)])
            for tree, key in zip(order[first:last].tolist(), (number[first:last] - begin).tolist(), strict=True):
                frame, row, gone = row_of[key]
                if not gone:
                    open_ = np.ones(len(self.left_open[tree]), bool)
                    node = _Node(tree, int(roots[tree]), 0, lower[key], upper[key], frame, row, (), open_)
                    self.pending.setdefault(0, []).append(node)
            while self.pending:
                deepest = max(self.pending)
                waiting = self.pending[deepest]
                batch, self.pending[deepest] = waiting[-BATCH:], waiting[:-BATCH]
                if not self.pending[deepest]:
                    del self.pending[deepest]
                self._replay(batch)
            self.shared.clear()
        proven = np.zeros(pairs, bool)
        for case, (first, last), left in zip(
            proof.tree_case.tolist(), proof.tree_clause.tolist(), self.left_open, strict=True
        ):
            base = proof.pair_start[case]
            proven[base + first : base + last] |= ~left
        return Replay(proven, self.margin, proof.pair_start, sorted(self.failed))

    def _refresh(self, lower: Array, upper: Array, inherited: Frame | None, first: Array) -> tuple[Frame, Array]:
        """Intervals of boxes; `first` [M]: where their slopes begin, all -1 or none."""
        slopes = None
        if first[0] >= 0:
            rows = range(len(self.proof.program.bounded))
            slopes = [self.proof.slopes[first + j].astype(np.float64) for j in rows]
        return refresh(self.proof.program, lower, upper, inherited, slopes)

    def _replay(self, batch: list[_Node]) -> None:
        proof, living = self.proof, []
        renewed = [n for n in batch if n.depth and proof.flags[n.place] & REFRESH]
        living = [n for n in batch if not (n.depth and proof.flags[n.place] & REFRESH)]
        renewed.sort(key=lambda n: (bool(proof.slopes_refresh[n.place] >= 0), id(n.frame)))
        for which in _alike(np.array([proof.slopes_refresh[n.place] >= 0 for n in renewed], int)):
            for begin in range(0, len(which), self.narrow):
                nodes = [renewed[i] for i in which[begin : begin + self.narrow]]
                inherited = self._gather(nodes)
                boxes = inherited.lower[0], inherited.upper[0]
                first = np.array([proof.slopes_refresh[n.place] for n in nodes])
                frame, dead = self._refresh(*boxes, inherited, first)
                for row, node in enumerate(nodes):
                    if not dead[row]:
                        node.frame, node.row = frame, row
                        living.append(node)
        bounded = [n for n in living if proof.flags[n.place] & BOUND]
        groups: dict[tuple[int, int, int], list[_Node]] = {}
        for node in bounded:
            groups.setdefault((id(node.frame), node.row, int(proof.slopes_bound[node.place])), []).append(node)
        mixed: list[_Node] = []
        for key, nodes in groups.items():
            if len(nodes) > 1 and self._can_share(nodes):
                self._bound(nodes, self._shared_view(key, nodes))
            else:
                mixed += nodes
        mixed.sort(key=lambda n: (bool(proof.slopes_bound[n.place] >= 0), id(n.frame)))
        for which in _alike(np.array([proof.slopes_bound[n.place] >= 0 for n in mixed], int)):
            for begin in range(0, len(which), self.narrow):
                nodes = [mixed[i] for i in which[begin : begin + self.narrow]]
                self._bound(nodes, self._mixed_view(nodes))
        for node in living:
            self._branch(node)

    def _gather(self, nodes: Sequence[_Node]) -> Frame:
        """The nodes' intervals, with their boxes and their neuron splits; nodes with one frame stand together."""
        found, begin = [], 0
        while begin < len(nodes):
            end = begin
            while end < len(nodes) and nodes[end].frame is nodes[begin].frame:
                end += 1
            found.append(nodes[begin].frame.take(np.array([n.row for n in nodes[begin:end]])))
            begin = end
        frame = Frame.join(found)
        frame.lower[0], frame.upper[0] = np.stack([n.lower for n in nodes]), np.stack([n.upper for n in nodes])
        for row, node in enumerate(nodes):
            for step, entry, at, sign in node.splits:
                if sign > 0:
                    frame.lower[step][row, entry] = max(frame.lower[step][row, entry], at)
                else:
                    frame.upper[step][row, entry] = min(frame.upper[step][row, entry], at)
        return frame

    def _splits(self, nodes: Sequence[_Node]) -> Splits | None:
        """All splits on the way to the nodes, with the multipliers that the file has for them."""
        proof = self.proof
        rows: list[tuple[int, int, int, float, int]] = []
        betas: list[Array] = []
        for i, node in enumerate(nodes):
            rows += [(i, *split) for split in node.splits]
            first, last = proof.beta_start[node.place : node.place + 2]
            betas.append(proof.beta[first:last] if last > first else np.zeros(len(node.splits)))
        if not rows:
            return None
        number, step, entry, at, sign = map(np.array, zip(*rows, strict=True))
        return Splits(number, step, entry, at.astype(float), sign, np.concatenate(betas))

    def _can_share(self, nodes: Sequence[_Node]) -> bool:
        """Whether the nodes' intervals differ in few places: not in the input, nor in a factor of a product."""
        steps = self.proof.program.steps
        if 0 in self.proof.program.bounded and any(n.lower is not nodes[0].lower for n in nodes):
            return False
        factors = {s for step in steps if isinstance(step, Times) for s in (step.left, step.right)}
        return not factors or not any(split[0] in factors for node in nodes for split in node.splits)

    def _mixed_view(self, nodes: Sequence[_Node]) -> View:
        proof, frame = self.proof, self._gather(nodes)
        rows = np.array([proof.slopes_bound[n.place] for n in nodes])
        slopes = proof.slopes[rows].astype(np.float64) if rows[0] >= 0 else None
        return View(proof.program, frame, self._pieces(frame, slopes), frame.lower[0], frame.upper[0], {},
                    self._splits(nodes))  # fmt: skip

    def _pieces(self, frame: Frame, slopes: Array | None) -> dict[int, Pieces]:
        program = self.proof.program
        return {
            i: pieces(program, i, frame, slopes)
            for i, step in enumerate(program.steps)
            if isinstance(step, (Apply, Times))
        }

    def _shared_view(self, key: tuple[int, int, int], nodes: Sequence[_Node]) -> View:
        proof, program = self.proof, self.proof.program
        slopes = proof.slopes[key[2]][None].astype(np.float64) if key[2] >= 0 else None
        same_box = all(n.lower is nodes[0].lower and n.upper is nodes[0].upper for n in nodes)
        boxes = nodes[:1] if same_box else nodes
        lower, upper = np.stack([n.lower for n in boxes]), np.stack([n.upper for n in boxes])
        if key not in self.shared or 0 in program.bounded:
            frame = nodes[0].frame.take(np.array([nodes[0].row]))
            if 0 in program.bounded:
                frame.lower[0], frame.upper[0] = lower, upper
            if len(self.shared) >= 4:
                self.shared.pop(next(iter(self.shared)))
            self.shared[key] = (nodes[0].frame, frame, self._pieces(frame, slopes))  # the first keeps its id alive
        _, frame, relaxed = self.shared[key]
        splits, exceptions = self._splits(nodes), {}
        if splits is not None:
            for i, step in enumerate(program.steps):
                if isinstance(step, Apply) and (splits.step == step.source).any():
                    exceptions[i] = self._exceptions(i, step, frame, slopes, splits)
        return View(program, frame, relaxed, lower, upper, exceptions, splits)

    def _exceptions(self, i: int, step: Apply, frame: Frame, slopes: Array | None, splits: Splits) -> Exceptions:
        """What step i is in the nodes where a neuron that it reads was split."""
        some = splits.step == step.source
        at, sign = splits.at[some], splits.sign[some]
        key, place = np.unique(splits.node[some] * step.size + splits.entry[some], return_inverse=True)
        node, entry = key // step.size, key % step.size
        low, high = frame.lower[step.source][0, entry], frame.upper[step.source][0, entry]
        np.maximum.at(low, place[sign > 0], at[sign > 0])
        np.minimum.at(high, place[sign < 0], at[sign < 0])
        below, above = self.proof.program.stored(i, slopes, 1)
        relaxed = relax(self.proof.program, i, [(low, high)], below[0, entry], above[0, entry])
        return Exceptions(node, entry, relaxed)

    def _bound(self, nodes: Sequence[_Node], view: View) -> None:
        """Bounds the open clauses of the nodes, closes those that are proven, and clips boxes."""
        proof, program = self.proof, self.proof.program
        pair, number = [], []
        for i, node in enumerate(nodes):
            clauses = np.flatnonzero(node.open)
            base = proof.pair_start[proof.tree_case[node.tree]] + proof.tree_clause[node.tree, 0]
            pair.append(base + clauses)
            number.append(np.full(len(clauses), i))
        pairs, owners = np.concatenate(pair), np.concatenate(number)
        counts = proof.pair_rows[pairs + 1] - proof.pair_rows[pairs]
        first = np.cumsum(counts) - counts
        rows = np.arange(counts.sum()) - np.repeat(first, counts) + np.repeat(proof.pair_rows[pairs], counts)
        owner = np.repeat(owners, counts)
        clips = np.array([bool(proof.flags[n.place] & CLIP) for n in nodes])
        best = np.full(len(rows), -np.inf)
        shapes = (len(rows), program.steps[0].size)
        narrow, wide = (np.full(shapes, v) if clips.any() else None for v in (-np.inf, np.inf))
        size = program.rows_at_once
        for begin in range(0, len(rows), size):
            some = slice(begin, begin + size)
            lower, a, bound = view.backward(self._rows(rows[some]), owner[some], proof.constant[rows[some]])
            best[some] = np.where(np.isfinite(lower), lower, -np.inf)
            if narrow is not None and wide is not None:
                narrow[some], wide[some] = _clipped(view, a, bound, owner[some], proof.slack[rows[some]])
        excess = best - proof.slack[rows]
        closed = np.maximum.reduceat((np.isfinite(best) & (best > proof.slack[rows])).astype(int), first) > 0
        margin = np.maximum.reduceat(excess, first)
        if narrow is not None and wide is not None:
            left, right = np.maximum.reduceat(narrow, first, axis=0), np.minimum.reduceat(wide, first, axis=0)
        for i, node in enumerate(nodes):
            begin, end = np.searchsorted(owners, [i, i + 1])
            if narrow is not None and clips[i]:
                a, b = np.maximum(left[begin:end], node.lower), np.minimum(right[begin:end], node.upper)
                empty = (a > b).any(axis=1) & ~closed[begin:end]
                remain = ~closed[begin:end] & ~empty
                if remain.any():
                    node.lower, node.upper = a[remain].min(axis=0), b[remain].max(axis=0)
                done = closed[begin:end] | empty
            else:
                done = closed[begin:end]
            told = closed[begin:end] | ((proof.kind[node.place] == LEAF) & ~done)
            np.minimum.at(self.margin, pairs[begin:end][told], margin[begin:end][told])
            node.open = node.open.copy()
            node.open[np.flatnonzero(node.open)[done]] = False

    def _rows(self, rows: Array) -> dict[int, Array]:
        """Coefficients of the rows: of the outputs and, where there are any, of the input."""
        proof, program = self.proof, self.proof.program
        outputs, inputs, last = program.steps[-1].size, program.steps[0].size, len(program.steps) - 1
        length = proof.start[rows + 1] - proof.start[rows]
        row = np.repeat(np.arange(len(rows)), length)
        place = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        place += np.repeat(proof.start[rows], length)
        column, value = proof.column[place], proof.value[place]
        result = np.zeros((len(rows), outputs))
        y = column < outputs
        result[row[y], column[y]] = value[y]
        found = {last: result}
        if not y.all():
            of_input = np.zeros((len(rows), inputs))
            of_input[row[~y], column[~y] - outputs] = value[~y]
            if last == 0:
                of_input += result
            found[0] = of_input
        return found

    def _branch(self, node: _Node) -> None:
        """Passes what is open to the children, or notes that a leaf left it open."""
        proof, place = self.proof, node.place
        if not node.open.any():
            return
        if proof.kind[place] == LEAF:
            self.left_open[node.tree] |= node.open
            self.failed.append((node.tree, place - int(proof.tree_start[node.tree])))
            return
        what, at = int(proof.what[place]), float(proof.at[place])
        for side, sign in ((0, -1), (1, 1)):
            lower, upper, splits = node.lower, node.upper, node.splits
            if proof.kind[place] == INPUT:
                if side == 0:
                    upper = upper.copy()
                    upper[what] = min(upper[what], at)
                else:
                    lower = lower.copy()
                    lower[what] = max(lower[what], at)
                if lower[what] > upper[what]:
                    continue
            else:
                step = int(np.searchsorted(proof.program.offsets, what, side="right")) - 1
                entry = what - int(proof.program.offsets[step])
                splits = (*splits, (step, entry, at, sign))
                low, high = node.frame.lower[step][node.row, entry], node.frame.upper[step][node.row, entry]
                same = [(t, s) for i, j, t, s in splits if (i, j) == (step, entry)]
                if max([low, *(t for t, s in same if s > 0)]) > min([high, *(t for t, s in same if s < 0)]):
                    continue
            child = _Node(node.tree, int(proof.child[place]) + side, node.depth + 1, lower, upper, node.frame, node.row,
                          splits, node.open)  # fmt: skip
            self.pending.setdefault(child.depth, []).append(child)


def _alike(keys: Array) -> Iterator[Array]:
    """Positions with equal keys, in order."""
    for key in np.unique(keys):
        yield np.flatnonzero(keys == key)


def _clipped(view: View, a: Array, bound: Bound, owner: Array, slack: Array) -> tuple[Array, Array]:
    """For rows a x + d: what a x + d <= slack leaves of each input's interval, the others being anywhere in theirs."""
    lower, upper = (x if len(x) == 1 else x[owner] for x in (view.lower, view.upper))
    n, contributions = a.shape[1], view.program.contributions
    least = np.minimum(a * lower, a * upper)
    size = np.abs(a) * np.maximum(np.abs(lower), np.abs(upper))
    error = (2 * n + contributions + 16) * U * (size.sum(axis=1) + slack)
    total = bound.lower() - slack + least.sum(axis=1) - 2 * error
    total -= 4 * U * np.abs(total)
    rest = total[:, None] - least
    rest -= 4 * U * (np.abs(total[:, None]) + np.abs(least))
    edge = -rest / a
    edge_up, edge_down = (edge + sign * (4 * U * np.abs(edge) + 2.0**-1000) for sign in (1, -1))
    known = np.isfinite(edge) & np.isfinite(rest)
    return np.where(known & (a < 0), edge_down, -np.inf), np.where(known & (a > 0), edge_up, np.inf)
