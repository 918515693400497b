"""The checker of verifications against sampling and rational arithmetic, and against itself with faults in it."""

import importlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from soundly.certificate import Certificate, check
from soundly.certificate.format import FORMAT, NETWORK, VERIFICATION, VERSION

checker = importlib.import_module("soundly.certificate.verification")
reading = importlib.import_module("soundly.certificate.reading")
programs = importlib.import_module("soundly.certificate.program")
intervals = importlib.import_module("soundly.certificate.intervals")
forms = importlib.import_module("soundly.certificate.forms")
products = importlib.import_module("soundly.certificate.products")
REFRESH, BOUND, CLIP, TOGETHER = 1, 2, 4, 8

RELU = {"name": "relu", "ring": "polynomial", "pieces": [[], [(1.0, 1)]], "breaks": [0.0]}
STEP = {"name": "step", "ring": "polynomial", "pieces": [[], [(1.0, 0)]], "breaks": [0.0]}
REACHED = {**STEP, "name": "reached", "held_kind": ["right"]}
HALF = {**STEP, "name": "half", "held_kind": ["own"], "held": [0.5]}
FULL = {**STEP, "name": "full", "held_kind": ["own"], "held": [1.0]}
PEAK = {**STEP, "name": "peak", "held_kind": ["own"], "held": [3.0]}
SQUARE = {"name": "square", "ring": "polynomial", "pieces": [[(1.0, 2)]]}
TANH = {"name": "tanh", "ring": "tanh", "pieces": [[(1.0, 0, 1)]]}
FUNCTIONS = {f["name"]: f for f in (RELU, STEP, REACHED, HALF, FULL, PEAK, SQUARE, TANH)}


@dataclass
class Node:
    """A node of a tree: a leaf, or split with (position, at, left child, right child)."""

    flags: int = REFRESH | BOUND
    kind: int = 0
    what: int = 0
    at: float = 0.0
    children: tuple["Node", "Node"] | None = None
    beta: Sequence[float] = ()
    slopes_bound: int = -1
    slopes_refresh: int = -1

    def split(self, kind: int, what: int, at: float, flags: int = REFRESH | BOUND) -> tuple["Node", "Node"]:
        self.kind, self.what, self.at, self.children = kind, what, at, (Node(flags), Node(flags))
        return self.children


def levels(root: Node) -> list[Node]:
    found = [root]
    for node in found:
        found += node.children or ()
    return found


@dataclass
class Claim:
    """A network, cases (lower, upper, clauses of rows (y, x, constant, slack)), and trees (case, first, last, root)."""

    steps: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]
    cases: list[tuple[Any, Any, list[list[tuple[Any, Any, float, float]]]]]
    trees: list[tuple[int, int, int, Node]] = field(default_factory=list)
    slots: Sequence[int] = ()
    slopes: Any = None
    groups: Sequence[Mapping[int, int]] = ()

    def certificate(self) -> Certificate:
        a = dict(self.arrays)
        functions = []
        for step in self.steps:
            if step["step"] == "function":
                known = [f["name"] for f in functions]
                f = FUNCTIONS[step["function"]]
                if f["name"] not in known:
                    k = len(functions)
                    breaks = f.get("breaks", [])
                    width = max((len(t) for p in f["pieces"] for t in p), default=2)
                    a[f"t{k}"] = np.array([t for p in f["pieces"] for t in p], float).reshape(-1, width)
                    a[f"k{k}"], a[f"h{k}"] = (
                        np.array(breaks, float),
                        np.array(f.get("held", 0 * np.array(breaks)), float),
                    )
                    functions.append({
                        "name": f["name"], "ring": f["ring"], "rate": None, "pieces": [len(p) for p in f["pieces"]],
                        "terms": f"t{k}", "breaks": f"k{k}", "held": f"h{k}", 
                        "held_kind": f.get("held_kind", ["left"] * len(breaks)),
                    })  # fmt: skip
        names = [f["name"] for f in functions]
        steps = [{**s, "function": names.index(s["function"])} if "function" in s else s for s in self.steps]
        outputs = steps[-1]["size"]
        start, column, value, constant, slack, clause, case_rows = [0], [], [], [], [], [], [0]
        for _, _, clauses in self.cases:
            for c, rows in enumerate(clauses):
                for y, x, b, s in rows:
                    both = np.concatenate([np.asarray(y, float), np.asarray(x, float)])
                    column += np.flatnonzero(both).tolist()
                    value += both[both != 0].tolist()
                    start.append(len(column))
                    constant, slack, clause = [*constant, b], [*slack, s], [*clause, c]
            case_rows.append(len(clause))
        assert all(len(y) == outputs for _, _, cs in self.cases for rows in cs for y, *_ in rows)
        nodes = [levels(root) for *_, root in self.trees]
        flat = [n for tree in nodes for n in tree]
        integers = {
            "row_start": start, "row_column": column, "row_clause": clause, "case_rows": case_rows,
            "case_clauses": [len(c) for _, _, c in self.cases], "tree_case": [t[0] for t in self.trees],
            "tree_start": np.cumsum([0, *map(len, nodes)]), "flags": [n.flags for n in flat],
            "kind": [n.kind for n in flat], "what": [n.what for n in flat],
            "slopes_bound": [n.slopes_bound for n in flat], "slopes_refresh": [n.slopes_refresh for n in flat],
            "beta_start": np.cumsum([0, *(len(n.beta) for n in flat)]), "slots": list(self.slots),
            "group_start": np.cumsum([0, *map(len, self.groups)]),
            "group_key": [key for group in self.groups for key in sorted(group)],
            "group_row": [group[key] for group in self.groups for key in sorted(group)],
        }  # fmt: skip
        floats = {
            "box_lower": [c[0] for c in self.cases], "box_upper": [c[1] for c in self.cases], "row_value": value,
            "row_constant": constant, "row_slack": slack, "at": [n.at for n in flat],
            "beta": [b for n in flat for b in n.beta],
        }  # fmt: skip
        a |= {name: np.array(v, np.int64) for name, v in integers.items()}
        a |= {name: np.array(v, np.float64) for name, v in floats.items()}
        a["tree_clause"] = np.array([[t[1], t[2]] for t in self.trees], np.int64).reshape(-1, 2)
        a["slopes"] = np.zeros((0, len(self.slots)), "f4") if self.slopes is None else np.array(self.slopes, "f4")
        header = {
            "format": FORMAT, "version": VERSION, "kind": VERIFICATION, "arithmetic": NETWORK, "claim": "a test",
            "model": {}, "made_with": {}, "program": steps, "functions": functions,
        }  # fmt: skip
        return Certificate(header, a)


def mlp(rng: np.random.Generator, sizes: Sequence[int], function: str = "relu") -> tuple[list, dict]:
    """Steps and arrays of a fully connected network."""
    steps, arrays = [{"step": "variable", "size": sizes[0]}], {}
    for i, (n, m) in enumerate(pairwise(sizes)):
        steps.append(affine(len(steps), m, [{"map": "matrix", "from": len(steps) - 1, "array": f"w{i}", "blocks": 1}],
                            f"b{i}"))  # fmt: skip
        arrays[f"w{i}"] = rng.standard_normal((m, n)) / np.sqrt(n)
        arrays[f"b{i}"] = rng.standard_normal(m) / 4
        if i < len(sizes) - 2:
            steps.append({"step": "function", "from": len(steps) - 1, "size": m, "function": function})
    return steps, arrays


def affine(i: int, size: int, parts: list[dict], bias: str) -> dict:
    return {"step": "affine", "size": size, "parts": parts, "bias": bias, "bias_error": None, "weight_error": None}


def evaluate(c: Certificate, x: np.ndarray) -> np.ndarray:
    """The program of a certificate at points [p, n], by loops that share nothing with the checker."""
    a, values = c.arrays, []
    for step in c.header["program"]:
        if step["step"] == "variable":
            values.append(x)
        elif step["step"] == "function":
            values.append(apply(c, c.header["functions"][step["function"]], values[step["from"]]))
        elif step["step"] == "times":
            values.append(values[step["left"]] * values[step["right"]])
        else:
            y = np.tile(a[step["bias"]].astype(float), (len(x), 1))
            for part in step["parts"]:
                y = y + values[part["from"]] @ dense(c, part, values[part["from"]].shape[1], step["size"]).T
            values.append(y)
    return values[-1]


def apply(c: Certificate, function: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    """A function of the file, piece by piece; polynomials in x and perhaps its hyperbolic tangent."""
    ends = np.cumsum([0, *function["pieces"]])
    breaks, held, result = c.arrays[function["breaks"]], c.arrays[function["held"]], np.zeros(x.shape)
    for i, (first, last) in enumerate(pairwise(ends)):
        y = np.zeros(x.shape)
        for coefficient, power, *other in c.arrays[function["terms"]][first:last]:
            y += coefficient * x**power * (np.tanh(x) ** other[0] if other else 1)
        kind = "left" if i == 0 else function["held_kind"][i - 1]
        result = y if i == 0 else np.where(x >= breaks[i - 1] if kind == "right" else x > breaks[i - 1], y, result)
        if kind == "own":
            result = np.where(x == breaks[i - 1], held[i - 1], result)
    return result


def dense(c: Certificate, part: Mapping[str, Any], n: int, m: int) -> np.ndarray:
    weight = c.arrays[part["array"]].astype(float)
    if part["map"] == "matrix":
        return np.kron(np.eye(part["blocks"]), weight)
    result = np.zeros((m, n))
    if part["map"] == "sparse":
        for i, j, v in zip(c.arrays[part["rows"]], c.arrays[part["columns"]], weight, strict=True):
            result[i, j] += v
        return result
    wide, narrow, w = part["wide"], part["narrow"], weight.reshape(part["shape"])
    flat = np.zeros((int(np.prod(narrow)), int(np.prod(wide))))
    per = part["shape"][0] // part["groups"]
    for o, *to in np.ndindex(*narrow):
        for k, *offset in np.ndindex(*part["shape"][1:]):
            at = [t * s - p + q * d for t, s, p, q, d in
                  zip(to, part["stride"], part["padding"], offset, part["dilation"], strict=True)]  # fmt: skip
            if all(0 <= t < size for t, size in zip(at, wide[1:], strict=True)):
                channel = o // per * part["shape"][1] + k
                flat[np.ravel_multi_index((o, *to), narrow), np.ravel_multi_index((channel, *at), wide)] += w[
                    (o, k, *offset)
                ]
    return flat.T if part["transposed"] else flat


def excess(c: Certificate, case: int, x: np.ndarray) -> np.ndarray:
    """For each clause of a case and each point [p, n]: the greatest s - slack among the clause's rows [clauses, p]."""
    a, y = c.arrays, evaluate(c, x)
    both = np.concatenate([y, x], axis=1)
    found = np.full((int(a["case_clauses"][case]), len(x)), -np.inf)
    for r in range(a["case_rows"][case], a["case_rows"][case + 1]):
        at = slice(a["row_start"][r], a["row_start"][r + 1])
        s = both[:, a["row_column"][at]] @ a["row_value"][at] + a["row_constant"][r] - a["row_slack"][r]
        found[a["row_clause"][r]] = np.maximum(found[a["row_clause"][r]], s)
    return found


def points(c: Certificate, case: int, rng: np.random.Generator, count: int = 400) -> np.ndarray:
    lower, upper = c.arrays["box_lower"][case], c.arrays["box_upper"][case]
    n = len(lower)
    inside = lower + (upper - lower) * rng.random((count, n))
    corners = np.where(rng.random((count // 2, n)) < 0.5, lower, upper)
    return np.concatenate([inside, corners, (lower + upper)[None] / 2])


@cache
def truth(c: Certificate, seed: int = 0) -> tuple[np.ndarray, ...]:
    """For each case the least excess of each clause among samples: what is well below 0 must not be proven."""
    found = []
    for case in range(len(c.arrays["box_lower"])):
        with np.errstate(all="ignore"):
            worst = excess(c, case, points(c, case, np.random.default_rng(seed), 4000)).min(axis=1)
        some = (c.arrays["box_lower"][case] <= c.arrays["box_upper"][case]).all()
        found.append(worst if some else np.full(len(worst), np.inf))
    return tuple(found)


def untrue(c: Certificate, seed: int = 0, with_: Any = checker) -> list[tuple[int, int]]:
    """Clauses that the checker proves and a sample refutes."""
    result = with_.replay(c)
    if result.problems:
        return []
    found = []
    for case, (first, worst) in enumerate(zip(result.pair_start.tolist(), truth(c, seed), strict=False)):
        found += [(case, i) for i in range(len(worst)) if result.proven[first + i] and worst[i] < -1e-9]
    return found


def grown(claim: Claim, rounds: int, split: Callable[[Node, np.ndarray, np.ndarray], None]) -> Claim:
    """Splits what the checker leaves open, for some rounds; `split` gets the leaf and its box."""
    for _ in range(rounds):
        failed = set(checker.replay(claim.certificate()).failed)
        if not failed:
            break
        for t, (case, _, _, root) in enumerate(claim.trees):
            nodes = levels(root)
            boxes = {id(root): tuple(np.array(v, float) for v in claim.cases[case][:2])}
            for node in nodes:
                if node.children:
                    for side, child in enumerate(node.children):
                        lower, upper = (v.copy() for v in boxes[id(node)])
                        if node.kind == 1:
                            (upper if side == 0 else lower)[node.what] = node.at
                        boxes[id(child)] = (lower, upper)
            for position, node in enumerate(nodes):
                if (t, position) in failed:
                    split(node, *boxes[id(node)])
    return claim


def widest(node: Node, lower: np.ndarray, upper: np.ndarray) -> None:
    k = int(np.argmax(upper - lower))
    node.split(1, k, float((lower[k] + upper[k]) / 2))


def tightly(steps: list, arrays: dict, lower: Any, upper: Any, rooms: Sequence[float], seed: int = 0) -> Claim:
    """Claims that each output exceeds its sampled minimum less some room, and stays below its maximum plus it.

    With a room below 0 the sample refutes the claim.
    """
    lower, upper = np.asarray(lower, float), np.asarray(upper, float)
    m, n = steps[-1]["size"], len(lower)
    blank = Claim(steps, arrays, [(lower, upper, [[(np.ones(m), np.zeros(n), 0.0, 0.0)]])])
    c = blank.certificate()
    y = evaluate(c, points(c, 0, np.random.default_rng(seed), 4000))
    clauses = []
    for room in rooms:
        for sign in (1.0, -1.0):
            for j in range(m):
                clauses.append([(sign * np.eye(m)[j], np.zeros(n), float(room - (sign * y[:, j]).min()), 0.0)])
    return Claim(steps, arrays, [(lower, upper, clauses)], [(0, 0, len(clauses), Node())])


def relu_claim(seed: int = 0, rooms: Sequence[float] = (0.05,)) -> Claim:
    steps, arrays = mlp(np.random.default_rng(seed), [2, 8, 8, 2])
    return grown(tightly(steps, arrays, [-1, -1], [1, 1], rooms), 14, widest)


def test_a_relu_network_is_proven_by_input_splits():
    claim = relu_claim()
    c = claim.certificate()
    result = check(c)
    assert result.accepted and result.rows == result.proven == 4 and result.arithmetic == NETWORK
    assert len(c.arrays["kind"]) > 3
    assert untrue(c) == []


SHAPES = [  # shape of the weight, wide, narrow, stride, padding, dilation, groups
    ([2, 1, 3], [1, 4], [2, 4], [1], [1], [1], 1), ([1, 2, 2], [2, 4], [1, 2], [2], [0], [1], 1),
    ([4, 1, 2], [2, 4], [4, 2], [1], [0], [2], 2), ([1, 1, 2, 3], [1, 2, 4], [1, 3, 1], [1, 2], [1, 0], [1, 1], 1),
    ([2, 2, 1, 2], [2, 2, 2], [2, 2, 3], [1, 1], [0, 1], [1, 1], 1), ([2, 1, 3], [2, 4], [2, 3], [2], [2], [1], 2),
]  # fmt: skip


def random_claim(seed: int) -> Claim:
    """A small program of every kind of step, with random splits, slopes and multipliers; anything goes."""
    rng = np.random.default_rng(seed)
    n = int(rng.choice([1, 2, 4, 8]))
    steps: list[dict] = [{"step": "variable", "size": n}]
    arrays: dict[str, np.ndarray] = {}
    for i in range(1, int(rng.integers(3, 9))):
        source = int(rng.integers(max(0, i - 3), i))
        size = steps[source]["size"]
        kind = str(rng.choice(["affine", "affine", "relu", "tanh", "square", "step", "times"]))
        if kind == "times":
            same = [j for j in range(i) if steps[j]["size"] == size]
            steps.append({"step": "times", "size": size, "left": source, "right": int(rng.choice(same))})
        elif kind != "affine":
            steps.append({"step": "function", "from": source, "size": size, "function": kind})
        else:
            parts, m = [], 0
            for k in range(int(rng.integers(1, 3))):
                part, m, own = random_part(rng, f"{i}.{k}", source, steps[source]["size"], m)
                parts.append(part)
                arrays |= own
                source = int(rng.integers(0, i))
            arrays[f"b{i}"] = rng.standard_normal(m).astype("f4")
            steps.append(affine(i, m, parts, f"b{i}"))
            if rng.random() < 0.3:
                steps[-1]["bias_error"], arrays[f"e{i}"] = f"e{i}", rng.random(m) * 1e-3
            if rng.random() < 0.3:
                steps[-1]["weight_error"], arrays[f"f{i}"] = f"f{i}", np.array([1e-3])
    centre, radius = rng.standard_normal(n), rng.choice([0, 1e-3, 0.3, 1.0], n)
    claim = tightly(steps, arrays, centre - radius, centre + radius, [-0.3, -0.01, -1e-6, 1e-6, 0.3], seed)
    root = random_tree(rng, claim)
    claim.trees = [(0, 0, len(claim.cases[0][2]), root)]
    if seed % 4 == 3 and reading.read(claim.certificate()).program.together is not None:
        for node in levels(root):
            if node.flags & 3 == 3:
                node.flags |= TOGETHER
    return claim


def random_part(rng: np.random.Generator, name: str, source: int, n: int, m: int) -> tuple[dict, int, dict]:
    """A map from n numbers to m, or to anything if m is 0."""
    kind = rng.choice(["matrix", "convolution", "sparse"])
    if kind == "convolution":
        for index in rng.permutation(len(SHAPES)):
            transposed = bool(rng.random() < 0.5)
            shape, wide, narrow, stride, padding, dilation, groups = SHAPES[index]
            sizes = [int(np.prod(wide)), int(np.prod(narrow))]
            inputs, outputs = sizes[::-1] if transposed else sizes
            if inputs == n and m in (0, outputs):
                part = {"map": "convolution", "from": source, "array": f"w{name}", "shape": shape, "wide": wide,
                        "narrow": narrow, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
                        "transposed": transposed}  # fmt: skip
                return part, outputs, {f"w{name}": rng.standard_normal(int(np.prod(shape))).astype("f4")}
        kind = "matrix"
    if kind == "matrix":
        blocks = int(rng.choice([b for b in (1, 2, 4) if n % b == 0 and m % b == 0]))
        m = m or blocks * int(rng.integers(1, 4))
        weight = rng.standard_normal((m // blocks, n // blocks)) / np.sqrt(n)
        return {"map": "matrix", "from": source, "array": f"w{name}", "blocks": blocks}, m, {f"w{name}": weight}
    m = m or int(rng.integers(1, 9))
    rows, columns = (rng.random((m, n)) < 0.4).nonzero()
    own = {f"r{name}": rows, f"c{name}": columns, f"w{name}": rng.standard_normal(len(rows))}
    part = {"map": "sparse", "from": source, "rows": f"r{name}", "columns": f"c{name}", "array": f"w{name}",
            "size": [m, n]}  # fmt: skip
    return part, m, own


def random_tree(rng: np.random.Generator, claim: Claim) -> Node:
    """Splits anywhere, with any flags; the claim gets slots and slopes."""
    steps, (lower, upper, _) = claim.steps, claim.cases[0]
    offsets = np.cumsum([0, *(s["size"] for s in steps)])
    read = sorted({s[k] for s in steps if s["step"] in ("function", "times") for k in ("from", "left", "right")
                   if k in s})  # fmt: skip
    relaxed = [i for i, s in enumerate(steps) if s["step"] in ("function", "times")]
    slots = [2 * int(k) + side for i in relaxed for k in range(offsets[i], offsets[i + 1]) for side in (0, 1)]
    claim.slots = [s for s in slots if rng.random() < 0.5]
    claim.slopes = rng.choice([0, 0.25, 0.5, 1.0], (6, len(claim.slots)))
    keys = [2 * int(k) + side for i in read for k in range(offsets[i], offsets[i + 1]) for side in (0, 1)]
    claim.groups = [{k: int(rng.integers(0, 6)) for k in keys if rng.random() < share} for share in (0, 0.5, 1)]
    c = claim.certificate()
    samples = points(c, 0, rng, 200)
    root = Node(REFRESH | BOUND | int(rng.choice([0, CLIP])))
    leaves = [(root, 0)]
    for _ in range(int(rng.integers(0, 12))):
        node, depth = leaves.pop(int(rng.integers(0, len(leaves))))
        flags = int(rng.choice([0, BOUND, BOUND, BOUND | CLIP, REFRESH, REFRESH | BOUND, 7]))
        hidden = [i for i in read if i > 0]
        if hidden and rng.random() < 0.6:
            step = int(rng.choice(hidden))
            entry = int(rng.integers(0, steps[step]["size"]))
            value = evaluate_all(c, samples)[step][:, entry]
            at = float(rng.choice([0.0, np.median(value), value.max(), value.min() - 1]))
            children = node.split(2, int(offsets[step]) + entry, at, flags)
            depth += 1
        else:
            k = int(rng.integers(0, len(lower)))
            children = node.split(1, k, float(rng.uniform(lower[k] - 0.1, upper[k] + 0.1)), flags)
        leaves += [(child, depth) for child in children]
        for child in children:
            if child.flags & BOUND and rng.random() < 0.7:
                child.beta = rng.choice([0, 0.1, 1.0], depth).tolist()
    for node in levels(root):
        if node.flags & REFRESH and rng.random() < 0.5:
            node.slopes_refresh = int(rng.integers(0, 3))
        if node.flags & BOUND and rng.random() < 0.5:
            node.slopes_bound = int(rng.integers(0, len(claim.slopes)))
    return root


def evaluate_all(c: Certificate, x: np.ndarray) -> list[np.ndarray]:
    """The values of all steps."""
    found = []
    for i in range(len(c.header["program"])):
        part = Certificate({**c.header, "program": list(c.header["program"])[: i + 1]}, c.arrays)
        found.append(evaluate(part, x))
    return found


@cache
def random_certificate(seed: int) -> Certificate:
    return random_claim(seed).certificate()


SEEDS = 200


def quadratic_claim(seed: int, together: bool = True, rooms: Sequence[float] = (-0.1, -1e-3, 0.003, 0.03)) -> Claim:
    """Quadratic forms in inputs and a hidden layer, with claims near the least values that they take."""
    rng = np.random.default_rng(seed)
    n, hidden, m = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 4))
    function = ["relu", "tanh", "square"][seed % 3]
    steps: list[dict] = [{"step": "variable", "size": n}]
    arrays: dict[str, np.ndarray] = {}

    def add(i: int, size: int, sources: Sequence[int]) -> None:
        parts = []
        for k, source in enumerate(sources):
            parts.append({"map": "matrix", "from": source, "array": f"w{i}.{k}", "blocks": 1})
            arrays[f"w{i}.{k}"] = rng.standard_normal((size, steps[source]["size"]))
        arrays[f"b{i}"] = rng.standard_normal(size) * 0.3
        steps.append(affine(i, size, parts, f"b{i}"))

    add(1, hidden, [0])
    steps.append({"step": "function", "from": 1, "size": hidden, "function": function})
    steps.append({"step": "function", "from": 1, "size": hidden, "function": "tanh"})
    add(4, m, [0, 2])
    add(5, m, [3, 0] if seed % 2 else [4])
    steps.append({"step": "times", "size": m, "left": 4, "right": 4 if rng.random() < 0.3 else 5})
    steps.append({"step": "times", "size": n, "left": 0, "right": 0})
    add(8, 2, [6, 7, 0] if seed % 4 else [6])
    centre, radius = rng.standard_normal(n) * 0.5, rng.choice([0.01, 0.1, 0.4], n)
    claim = tightly(steps, arrays, centre - radius, centre + radius, rooms, seed)
    flags = REFRESH | BOUND | (TOGETHER if together else 0)
    root = Node(flags)
    claim.trees = [(0, 0, len(claim.cases[0][2]), root)]
    if seed % 5 == 0:
        root.flags |= CLIP
        for child in root.split(1, 0, float(centre[0]), flags | CLIP):
            child.split(1, n - 1, float(centre[n - 1]), flags)
    return claim


def square_of_uncertain() -> Certificate:
    """(w x)^2 < 1.7 on [0, 1], where w is 1 up to a half: not so."""
    steps = [
        {"step": "variable", "size": 1},
        {**affine(1, 1, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b"), "weight_error": "f"},
        {"step": "times", "size": 1, "left": 1, "right": 1},
        affine(3, 1, [{"map": "matrix", "from": 2, "array": "w", "blocks": 1}], "b"),
    ]
    arrays = {"w": np.ones((1, 1)), "b": np.zeros(1), "f": np.array([0.5])}
    case = (np.zeros(1), np.ones(1), [[(-np.ones(1), np.zeros(1), 1.7, 0.0)]])
    return Claim(steps, arrays, [case], [(0, 0, 1, Node(REFRESH | BOUND | TOGETHER))]).certificate()


@cache
def quadratic_certificate(seed: int) -> Certificate:
    return quadratic_claim(seed).certificate()


def test_products_bounded_together_prove_nothing_false_and_something_more():
    alone = both = 0
    for seed in range(60):
        c = quadratic_certificate(seed)
        assert not checker.replay(c).problems and untrue(c, seed) == []
        both += int(checker.replay(c).proven.sum())
        alone += int(checker.replay(quadratic_claim(seed, together=False).certificate()).proven.sum())
    assert both > 1.15 * alone > 0


def forms_of_squares(seed: int, size: int = 5) -> np.ndarray:
    """Quadratic forms whose least values on the cube are 0, up to roundings, or known from their corners."""
    rng = np.random.default_rng(seed)
    v = rng.standard_normal((40, int(rng.integers(1, size)), size)).astype("f4").astype(float)
    q = v.transpose(0, 2, 1) @ v
    q[::2] -= rng.choice([0, 0.1, 1.0], (20, 1, 1)) * np.eye(size)
    return q


def exactly(q: np.ndarray, e: Sequence[Fraction]) -> Fraction:
    terms = ((Fraction(float(q[i, j])), i, j) for i in range(len(e)) for j in range(len(e)))
    return sum((c * e[i] * e[j] for c, i, j in terms), Fraction(0))


def above_least(with_: Any) -> Iterator[str]:
    """Bounds of quadratic forms that points of the cube lie below, in rational arithmetic."""
    for seed in range(12):
        q = forms_of_squares(seed)
        bound, lost = with_.least(q.copy())
        _, vectors = np.linalg.eigh(q)
        for i, (b, error) in enumerate(zip(bound.tolist(), lost.tolist(), strict=True)):
            rng = np.random.default_rng(i)
            corners = rng.choice([-1.0, 1.0], (20, 5))
            flat = vectors[i].T / np.abs(vectors[i]).max()
            for e in (*corners, *flat, *rng.uniform(-1, 1, (5, 5))):
                if exactly(q[i], [Fraction(float(t)) for t in e]) < Fraction(b) - Fraction(error):
                    yield f"form {seed}, {i} at {e}"


def test_quadratic_forms_are_bounded_from_below_and_squares_by_zero():
    assert list(above_least(products)) == []
    squares = forms_of_squares(1)[1::2]
    bound, lost = products.least(squares)
    assert (bound - lost > -1e-12).all()


@cache
def neuron_certificate(seed: int) -> Certificate:
    """Neuron splits at values that are taken, three deep, with intervals from the root only and random multipliers."""
    rng = np.random.default_rng(seed)
    steps, arrays = mlp(rng, [2, 4, 4, 2], ["relu", "tanh"][seed % 2])
    claim = tightly(steps, arrays, [-0.3, -0.2], [0.5, 0.4], [-0.1, -0.01, -0.001, 0.001, 0.003, 0.01, 0.03, 0.1], seed)
    root = Node(REFRESH | BOUND)
    claim.trees = [(0, 0, len(claim.cases[0][2]), root)]
    c = claim.certificate()
    values, offsets = evaluate_all(c, points(c, 0, rng)), np.cumsum([0, *(s["size"] for s in steps)])
    level = [root]
    for depth in range(1, 4):
        below = []
        for node in level:
            step, entry = int(rng.choice([1, 3])), int(rng.integers(0, 4))
            at = float(np.quantile(values[step][:, entry], rng.uniform(0.2, 0.8)))
            below += node.split(2, int(offsets[step]) + entry, at, BOUND)
        for node in below:
            node.beta = rng.choice([0, 0.3], depth).tolist()
        level = below
    return claim.certificate()


def test_neuron_splits_prove_nothing_false_and_something_more():
    more = 0
    for seed in range(40):
        c = neuron_certificate(seed)
        assert untrue(c, seed) == []
        result = checker.replay(c)
        root = changed(c, **{k: c.arrays[k][:1] for k in ("flags", "what", "at", "slopes_bound", "slopes_refresh")},
                       kind=np.zeros(1, int), tree_start=np.array([0, 1]), beta_start=np.zeros(2, int),
                       beta=np.zeros(0))  # fmt: skip
        alone = checker.replay(changed(root, what=np.zeros(1, int), at=np.zeros(1)))
        assert alone.problems == () and (result.proven >= alone.proven).all()
        more += int(result.proven.sum() - alone.proven.sum())
    assert more > 0


def test_shared_intervals_give_the_bounds_of_own_ones(monkeypatch):
    certificates = [*(neuron_certificate(seed) for seed in range(20)), *(random_certificate(s) for s in range(40))]
    shared = [checker.replay(c) for c in certificates]
    monkeypatch.setattr(checker._Replayer, "_can_share", lambda *_: False)
    for c, before in zip(certificates, shared, strict=True):
        after = checker.replay(c)
        assert after.failed == before.failed and after.margin == pytest.approx(before.margin, rel=1e-9, abs=1e-9)


def uncertain(kind: str, factor: float) -> Certificate:
    """y = 3 x - 1 at x = 2, weight or bias known up to 0.01 or so: claims y > 5 less `factor` times what that makes."""
    step = affine(1, 1, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b")
    arrays = {"w": np.array([[3.0]]), "b": np.array([-1.0]), "f": np.array([0.01])}
    step["weight_error" if kind == "weight" else "bias_error"] = "f"
    room = factor * (0.06 if kind == "weight" else 0.01)
    clause = [([1.0], [0.0], -5.0 + room, 0.0)]
    return Claim([{"step": "variable", "size": 1}, step], arrays, [([2.0], [2.0], [clause])],
                 [(0, 0, 1, Node())]).certificate()  # fmt: skip


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_networks_within_the_stated_errors_are_covered(kind):
    assert not check(uncertain(kind, 0.99)).accepted and check(uncertain(kind, 1.01)).accepted


@pytest.mark.parametrize("seeds", [range(k, k + 40) for k in range(0, SEEDS, 40)], ids=str)
def test_nothing_that_a_sample_refutes_is_proven(seeds):
    proven = 0
    for seed in seeds:
        c = random_certificate(seed)
        result = checker.replay(c)
        assert result.problems == (), seed
        assert untrue(c, seed) == [], seed
        proven += int(result.proven.sum())
    assert proven > 40


def maps() -> Iterator[tuple[Certificate, dict, int, int]]:
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.choice([1, 2, 4, 6, 8]))
        part, m, own = random_part(rng, "0", 0, n, 0)
        steps = [{"step": "variable", "size": n}, affine(1, m, [part], "b")]
        c = Claim(steps, {"b": np.zeros(m), **own}, [(np.zeros(n), np.zeros(n), [[(np.ones(m), np.zeros(n), 0, 0)]])],
                  [(0, 0, 1, Node())]).certificate()  # fmt: skip
        yield c, part, n, m


def test_maps_are_the_matrices_they_stand_for():
    rng, kinds = np.random.default_rng(1), set()
    for c, part, n, m in maps():
        ((found, _),) = reading.read(c).program.steps[1].parts
        matrix = dense(c, part, n, m)
        x, a = rng.standard_normal((3, n)), rng.standard_normal((3, m))
        assert found.size == (m, n) and found.apply(x) == pytest.approx(x @ matrix.T, abs=1e-12)
        assert found.pull(a) == pytest.approx(a @ matrix, abs=1e-12)
        entry = rng.integers(0, m, 5)
        assert found.rows_of(entry) == pytest.approx(matrix[entry], abs=1e-12)
        assert found.absolute.apply(x) == pytest.approx(x @ abs(matrix).T, abs=1e-12)
        assert found.terms >= max((matrix != 0).sum(0).max(), (matrix != 0).sum(1).max())
        kinds.add((part["map"], part.get("transposed"), str(part.get("shape"))))
    assert len(kinds) > 8


def test_large_sparse_maps_are_the_matrices_they_stand_for():
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, 700, 900), rng.integers(0, 600, 900)
    keep = np.unique(rows * 600 + columns, return_index=True)[1]
    rows, columns = rows[keep], columns[keep]
    found = programs.Sparse(rows, columns, rng.standard_normal(len(rows)), (700, 600))
    matrix = np.zeros((700, 600))
    matrix[rows, columns] = found.values
    x, a = rng.standard_normal((2, 600)), rng.standard_normal((2, 700))
    assert found._dense is None
    entry = rng.integers(0, 700, 50)
    assert (found.rows_of(entry) == matrix[entry]).all()
    assert found.apply(x) == pytest.approx(x @ matrix.T) and found.pull(a) == pytest.approx(a @ matrix)


def exact(c: Certificate, x: Sequence[Fraction]) -> list[Fraction]:
    """The outputs of a program of matrices and ReLUs in rational arithmetic."""
    values: list[list[Fraction]] = []
    for step in c.header["program"]:
        match step["step"]:
            case "variable":
                values.append(list(x))
            case "function":
                values.append([max(v, Fraction(0)) for v in values[step["from"]]])
            case "affine":
                y = [Fraction(float(b)) for b in c.arrays[step["bias"]]]
                for part in step["parts"]:
                    for i, row in enumerate(c.arrays[part["array"]]):
                        y[i] += sum(Fraction(float(w)) * v for w, v in zip(row, values[part["from"]], strict=True))
                values.append(y)
    return values[-1]


def hard_claim(seed: int) -> tuple[Certificate, list[bool]]:
    """A network at a point, and rows whose exact excess is a few ulps above or below 0; which of them hold."""
    rng = np.random.default_rng(seed)
    n, sizes = int(rng.integers(1, 5)), [int(k) for k in rng.integers(1, 6, int(rng.integers(1, 4)))]
    steps, arrays = mlp(rng, [n, *sizes])
    for i in range(len(sizes)):
        w = arrays[f"w{i}"]
        match seed % 4:
            case 1:
                arrays[f"w{i}"] = np.ldexp(w, rng.integers(-200, 40, w.shape))
            case 2 if w.shape[1] > 1:
                w[:, 1] = -w[:, 0] * (1 + 2.0**-48)
            case 3:
                arrays[f"w{i}"] = np.ldexp(w, -300 if i == 0 else 100)
    x = rng.standard_normal(n)
    x[1:2] = x[0]
    blank = Claim(steps, arrays, [(x, x, [[(np.ones(sizes[-1]), np.zeros(n), 0.0, 0.0)]])], [(0, 0, 1, Node())])
    y = exact(blank.certificate(), [Fraction(float(v)) for v in x])
    clauses, holds = [], []
    for _ in range(8):
        a, b = rng.standard_normal(len(y)), rng.standard_normal(n) * (rng.random() < 0.5)
        a *= not b.any() or rng.random() < 0.5
        s = sum((Fraction(float(p)) * q for p, q in zip([*a, *b], [*y, *map(Fraction, x.tolist())], strict=True)),
                Fraction(0))  # fmt: skip
        constant = float(-s)
        for _ in range(int(rng.integers(0, 4))):
            constant = float(np.nextafter(constant, rng.choice([-np.inf, np.inf])))
        clauses.append([(a, b, constant, 0.0)])
        holds.append(s + Fraction(constant) > 0)
    blank.cases, blank.trees = [(x, x, clauses)], [(0, 0, len(clauses), Node())]
    return blank.certificate(), holds


hard = cache(hard_claim)


def test_rows_within_ulps_of_their_exact_value_are_never_proven_wrongly():
    answers = set()
    for seed in range(120):
        c, holds = hard(seed)
        proven = checker.replay(c).proven
        assert not any(p and not h for p, h in zip(proven.tolist(), holds, strict=True)), seed
        answers |= set(holds)
    assert answers == {True, False}


@pytest.mark.parametrize("seed", range(12))
def test_bounds_of_points_are_within_rounding_of_the_exact_value(seed):
    """Completeness: with 1e-10 of room everything of ordinary size is proven."""
    c, _ = hard(4 * seed)
    wide = Certificate(c.header, {**c.arrays, "row_constant": c.arrays["row_constant"] + 1e-10})
    assert checker.replay(wide).proven.all()


def test_bounds_over_boxes_in_rational_arithmetic():
    """An affine network is bounded exactly, up to rounding: its least value lies in a corner."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        steps, arrays = mlp(rng, [3, 4])
        lower = rng.standard_normal(3)
        upper = lower + rng.random(3)
        blank = Claim(steps, arrays, [(lower, upper, [[(np.eye(4)[0], np.zeros(3), 0.0, 0.0)]])], [(0, 0, 1, Node())])
        c = blank.certificate()
        corners = [[Fraction(float(v[i])) for i, v in enumerate(zip(lower, upper, strict=True))] for v in ()]
        corners = [[Fraction(float((upper if k >> i & 1 else lower)[i])) for i in range(3)] for k in range(8)]
        least = min(exact(c, corner)[0] for corner in corners)
        for ulps in (-40, -2, -1, 0, 1, 2, 40):
            constant = float(-least) + ulps * float(np.spacing(float(-least)))
            some = Certificate(c.header, {**c.arrays, "row_constant": np.array([constant])})
            proven = bool(checker.replay(some).proven[0])
            assert not proven or least + Fraction(constant) > 0
        assert checker.replay(Certificate(c.header, {**c.arrays, "row_constant": np.array([constant + 1e-12])})).proven


def test_neuron_splits_need_their_multipliers():
    """relu(x) - x / 2 is at least 0: proven at once with both halves' multipliers, for neither without.

    The split value is not affine in the input in one step, so the input's box is not halved.
    """
    steps = [
        {"step": "variable", "size": 1},
        affine(1, 1, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b"),
        affine(2, 1, [{"map": "matrix", "from": 1, "array": "w", "blocks": 1}], "b"),
        {"step": "function", "from": 2, "size": 1, "function": "relu"},
        affine(4, 1, [{"map": "matrix", "from": 3, "array": "w", "blocks": 1},
                      {"map": "matrix", "from": 0, "array": "v", "blocks": 1}], "b"),
    ]  # fmt: skip
    arrays = {"w": np.ones((1, 1)), "v": np.full((1, 1), -0.5), "b": np.zeros(1)}
    for constant, true in ((0.001, True), (-0.001, False)):
        root = Node(REFRESH | BOUND)
        claim = Claim(steps, arrays, [([-1.0], [0.9], [[([1.0], [0.0], constant, 0.0)]])], [(0, 0, 1, root)])
        assert not check(claim.certificate()).accepted
        children = root.split(2, 2, 0.0, BOUND)
        assert checker.replay(claim.certificate()).failed == [(0, 1), (0, 2)]
        for beta, enough in ((0.25, False), (0.5, True), (0.75, False)):
            for child in children:
                child.beta = [beta]
            assert check(claim.certificate()).accepted is (enough and true)
        for child in children:
            child.beta, child.flags = [], REFRESH | BOUND
        assert not check(claim.certificate()).accepted  # intervals alone do not see that the input is halved


@cache
def grouped(side: int) -> Certificate:
    """-relu(x) + x / 4 - 0.01 < 0: known at the root with the slope 1/4 for the upper bound, and with no other."""
    steps = [
        {"step": "variable", "size": 1},
        affine(1, 1, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b"),
        {"step": "function", "from": 1, "size": 1, "function": "relu"},
        affine(3, 1, [{"map": "matrix", "from": 2, "array": "m", "blocks": 1},
                      {"map": "matrix", "from": 0, "array": "q", "blocks": 1}], "c"),
        {"step": "function", "from": 3, "size": 1, "function": "relu"},
    ]  # fmt: skip
    arrays = {"w": np.ones((1, 1)), "m": -np.ones((1, 1)), "q": np.full((1, 1), 0.25), "b": np.zeros(1),
              "c": np.full(1, -0.01)}  # fmt: skip
    case = ([-1.0], [0.9], [[([-1.0], [0.0], 0.001, 0.0)]])
    return Claim(steps, arrays, [case], [(0, 0, 1, Node(slopes_refresh=0))], [4], [[0.25]],
                 [{2 * 3 + side: 0}]).certificate()  # fmt: skip


def test_slopes_are_used_for_the_bound_that_they_are_stored_for():
    assert check(grouped(1)).accepted and not check(grouped(0)).accepted


@cache
def halved(error: float) -> Certificate:
    """|x| <= 1, |y| <= 1, split where x + 2 y = 0: on the right y >= -1/2, on the left y <= 1/2, claimed with 0.01 to
    spare by a row each; neither holds everywhere."""
    step = affine(1, 1, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b")
    arrays = {"w": np.array([[1.0, 2.0]]), "b": np.zeros(1), "one": np.ones((1, 1))}
    if error:
        step["bias_error"], arrays["f"] = "f", np.array([error])
    steps = [
        {"step": "variable", "size": 2}, step, {"step": "function", "from": 1, "size": 1, "function": "relu"},
        affine(3, 1, [{"map": "matrix", "from": 2, "array": "one", "blocks": 1}], "b"),
    ]  # fmt: skip
    root = Node(REFRESH | BOUND)
    for child in root.split(2, 2, 0.0, BOUND):
        child.beta = [0.0]
    clause = [([0.0], [0.0, 1.0], 0.51, 0.0), ([0.0], [0.0, -1.0], 0.51, 0.0)]
    return Claim(steps, arrays, [([-1.0, -1.0], [1.0, 1.0], [clause])], [(0, 0, 1, root)]).certificate()


def test_splits_of_what_is_affine_in_the_input_clip_the_box():
    assert check(halved(0.0)).accepted and check(halved(0.01)).accepted and not check(halved(0.05)).accepted


@cache
def unlikely(room: float) -> Certificate:
    """relu(x - 2.005 + e) < room at x = 2 with |e| <= 0.01: true if room > 0.005."""
    steps = [
        {"step": "variable", "size": 1},
        affine(1, 1, [{"map": "matrix", "from": 0, "array": "one", "blocks": 1}], "zero"),
        {**affine(2, 1, [{"map": "matrix", "from": 1, "array": "one", "blocks": 1}], "b"), "bias_error": "f"},
        {"step": "function", "from": 2, "size": 1, "function": "relu"},
    ]  # fmt: skip
    arrays = {"one": np.ones((1, 1)), "zero": np.zeros(1), "b": np.array([-2.005]), "f": np.array([0.01])}
    case = ([2.0], [2.0], [[([-1.0], [0.0], room, 0.0)]])
    return Claim(steps, arrays, [case], [(0, 0, 1, Node())]).certificate()


def test_uncertain_numbers_count_in_hidden_intervals():
    assert check(unlikely(0.0051)).accepted and not check(unlikely(0.0049)).accepted


def jumping(functions: Sequence[str], weight: Any, lower: Any, split: int | None, flags: int) -> Claim:
    """Functions of v = weight x over a box from `lower` to 1; the outputs are their values and the values' products
    with the first one. A tree that splits v[split] at 0, and no clauses."""
    weight = np.array(weight, float)
    (m, n), k = weight.shape, len(functions)
    steps = [{"step": "variable", "size": n},
             affine(1, m, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b")]  # fmt: skip
    steps += [{"step": "function", "from": 1, "size": m, "function": f} for f in functions]
    steps += [{"step": "times", "left": 2, "right": 2 + j, "size": m} for j in range(k)]
    parts = [{"map": "sparse", "from": 2 + j, "rows": f"r{j}", "columns": "c", "array": "one", "size": [2 * k * m, m]}
             for j in range(2 * k)]  # fmt: skip
    steps.append(affine(len(steps), 2 * k * m, parts, "d"))
    arrays = {"w": weight, "b": np.zeros(m), "d": np.zeros(2 * k * m), "one": np.ones(m), "c": np.arange(m)}
    arrays |= {f"r{j}": np.arange(m) + j * m for j in range(2 * k)}
    root = Node(REFRESH | BOUND)
    if split is not None:
        root.split(2, n + split, 0.0, flags)
    return Claim(steps, arrays, [(np.array(lower, float), np.ones(n), [])], [(0, 0, 0, root)])


def claiming(claim: Claim, clauses: Sequence[Sequence[tuple[Mapping[int, float], float]]]) -> Certificate:
    """That <y, row> + constant > 0 for a row of each clause."""
    (lower, upper, _), (*_, root) = claim.cases[0], claim.trees[0]
    unit = np.eye(claim.steps[-1]["size"])
    rows = [[(sum(k * unit[i] for i, k in row.items()), np.zeros(len(lower)), constant, 0.0) for row, constant in some]
            for some in clauses]  # fmt: skip
    return Claim(claim.steps, claim.arrays, [(lower, upper, rows)], [(0, 0, len(rows), root)]).certificate()


@cache
def jumps() -> dict[str, tuple[Certificate, bool]]:
    """Claims about functions that jump at 0, and whether they are to be proven."""
    found, one = {}, [[1.0]]
    apart = [[({0: 1.0}, -0.6), ({0: -1.0}, 0.4)]]
    equal = [[({1: 1.0, 0: -1.0}, 0.01)], [({1: -1.0, 0: 1.0}, 0.01)]]
    whole = [[({1: 1.0, 0: -1.0}, 0.01)]]
    for flags in (BOUND, REFRESH | BOUND):
        for f, true in (("step", True), ("reached", True), ("full", True), ("half", False)):
            found[f, "split", flags] = claiming(jumping([f], one, [-1], 0, flags), apart), true
            found[f, "unsplit", flags] = claiming(jumping([f], one, [-1], None, flags), apart), False
        for split in (0, None):
            for top, true in ((2.0, False), (4.0, True)):
                c = claiming(jumping(["peak"], one, [-1], split, flags), [[({0: -1.0}, top)]])
                found["peak", split, top, flags] = c, true
        for f, g, true in (("step", "step", True), ("reached", "full", True), ("step", "reached", False),
                           ("full", "step", False), ("half", "half", False)):  # fmt: skip
            found[f, g, flags] = claiming(jumping([f, g], one, [-1], 0, flags), equal), true
        for f, true in (("step", True), ("reached", True), ("half", False)):  # f f >= f if f is 0 or 1
            c = claiming(jumping([f], one, [-1], 0, flags), whole)
            found[f, "squared", flags] = c, true and bool(flags & REFRESH)
            c = claiming(jumping([f, "relu"], one, [-1], 0, flags), [[({3: 1.0, 1: -1.0}, 0.01)]])
            found[f, "times relu", flags] = c, true and bool(flags & REFRESH)
        # Steps are 0 at 0, where only the first of two was split.
        for entry in (0, 1):
            c = claiming(jumping(["step"], [[1.0], [1.0]], [0], 0, flags), [[({entry: 1.0}, -0.5)]])
            found["step", "from 0", entry, flags] = c, False
    return found


def wrong_at_jumps(with_: Any = checker) -> list[Any]:
    return [name for name, (c, true) in jumps().items() if with_.replay(c).proven.all() != true]


def test_split_jumps_have_one_side_each():
    assert wrong_at_jumps() == []
    assert {true for _, true in jumps().values()} == {False, True}


GRID = np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * 2), -1).reshape(-1, 2)


@cache
def kinked_certificate(seed: int) -> tuple[Certificate, np.ndarray]:
    """Jumps of small integers split at 0, and the least excess of each clause where they are met exactly."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-2, 3, (3, 2))
    names = rng.choice([["relu", "step"], ["step", "relu"], ["reached", "full"], ["step", "reached"], ["half", "step"],
                        ["full", "relu"]])  # fmt: skip
    claim = jumping(list(names), weight, rng.choice([-1.0, -0.5, 0.0], 2), None, BOUND)
    (lower, *_), (*_, root) = claim.cases[0], claim.trees[0]
    level = [root]
    for depth in range(1, 4):
        below = []
        for node in level:
            for child in node.split(2, 2 + int(rng.integers(0, 3)), float(rng.choice([0.0, 0.0, -0.5, 0.5]))):
                child.flags = int(rng.choice([BOUND, REFRESH | BOUND, 7]))
                child.beta = rng.choice([0, 0.5], depth).tolist()
                below.append(child)
        level = below
    y = evaluate(claiming(claim, [[({0: 1.0}, 0.0)]]), GRID[(GRID >= lower).all(1)])
    clauses, worst = [], []
    for _ in range(12):  # of the values of one neuron
        row = {3 * k + j: float(rng.choice([-1, 1])) for j in [int(rng.integers(0, 3))]
               for k in rng.permutation(4)[:2].tolist()}  # fmt: skip
        least = float(sum(k * y[:, i] for i, k in row.items()).min())
        for room in (-0.3, -0.01, 0.01, 0.3):
            clauses.append([(row, room - least)])
            worst.append(room)
    return claiming(claim, clauses), np.array(worst)


def untrue_at_jumps(seed: int, with_: Any = checker) -> bool:
    c, worst = kinked_certificate(seed)
    return bool((with_.replay(c).proven & (worst < 0)).any())


def test_nothing_is_proven_that_fails_at_a_jump(monkeypatch):
    seeds = range(60)
    assert [seed for seed in seeds if untrue_at_jumps(seed)] == []
    proven = sum(int(checker.replay(kinked_certificate(seed)[0]).proven.sum()) for seed in seeds)
    monkeypatch.setattr(programs.Program, "parted", property(lambda self: (frozenset(),) * len(self.steps)))
    assert proven > sum(int(checker.replay(kinked_certificate(seed)[0]).proven.sum()) for seed in seeds)


def refreshed(c: Certificate, with_: Any = checker) -> list[Any]:
    """The intervals of all steps over the first box, without affine forms and with them."""
    proof, none = with_.read(c), np.full(1, -1)
    box = proof.lower[:1], proof.upper[:1]
    with np.errstate(all="ignore"):
        return [with_.refresh(proof.program, *box, None, none, proof.stored, forms=forms) for forms in (False, True)]


@cache
def sampled(seed: int) -> list[np.ndarray]:
    c = random_certificate(seed)
    with np.errstate(all="ignore"):
        return evaluate_all(c, points(c, 0, np.random.default_rng(seed)))


def escaped(seed: int, with_: Any = checker) -> bool:
    """Whether a value lies outside its step's interval, or a box counts as empty."""
    for frame, dead in refreshed(random_certificate(seed), with_):
        for low, high, value in zip(frame.lower, frame.upper, sampled(seed), strict=True):
            room = 1e-9 * (1 + np.abs(value))
            if dead[0] or not ((low <= value + room) & (value <= high + room)).all():
                return True
    return False


def factor_escaped(seed: int, with_: Any = checker) -> bool:
    """Whether a factor, or the sum or difference of a product's two, leaves the form with shared symbols."""
    c = quadratic_certificate(seed)
    proof, none = with_.read(c), np.full(1, -1)
    box = proof.lower, proof.upper
    frame, _ = with_.refresh(proof.program, *box, None, none, proof.stored, forms=True, together=True)
    values = evaluate_all(c, points(c, 0, np.random.default_rng(seed)))
    for i, (u, v) in frame.factors.items():
        step = c.header["program"][i]
        for sign in (0, 1, -1):
            value = values[step["left"]] + sign * values[step["right"]]
            centre, generators = u.centre + sign * v.centre, u.generators + sign * v.generators
            wide = np.abs(generators).sum(axis=1) + u.rest + abs(sign) * v.rest
            if (np.abs(value - centre) > wide + 1e-9).any():
                return True
    return False


def test_factors_stay_within_forms_that_share_symbols():
    assert not any(factor_escaped(seed) for seed in range(60))


def test_intervals_of_every_step_hold_all_samples_and_forms_make_them_narrower():
    narrower = 0
    for seed in range(SEEDS):
        assert not escaped(seed), seed
        (plain, _), (followed, _) = refreshed(random_certificate(seed))
        for i in range(len(plain.lower)):
            with np.errstate(invalid="ignore"):
                width, other = plain.upper[i] - plain.lower[i], followed.upper[i] - followed.lower[i]
                narrower += int((width - other > 1e-6).sum())
    assert narrower > 200


def test_forms_hold_exactly():
    """Of every step of small ReLU networks, in rational arithmetic at corners and inside."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        steps, arrays = mlp(rng, [2, 3, 3, 2])
        lower = rng.standard_normal(2)
        upper = lower + rng.random(2) * 10.0 ** rng.integers(-6, 1)
        clause = [(np.ones(2), np.zeros(2), 0.0, 0.0)]
        c = Claim(steps, arrays, [(lower, upper, [clause])], [(0, 0, 1, Node())]).certificate()
        found: list[Any] = []

        class Kept(forms.Forms):
            def follow(self, *args: Any, found: list[Any] = found) -> Any:
                found.append(super().follow(*args))
                return found[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(intervals, "Forms", Kept)
            refreshed(c)
        assert len(found) == len(steps)
        for t in (*np.ndindex(2, 2), *rng.random((4, 2))):
            x = [Fraction(float(a)) * (1 - Fraction(s)) + Fraction(float(b)) * Fraction(s)
                 for a, b, s in zip(lower, upper, map(float, t), strict=True)]  # fmt: skip
            base = found[0]
            e = [(v - Fraction(float(m))) / Fraction(float(base.generators[0, k, k]))
                 for k, (v, m) in enumerate(zip(x, base.centre[0], strict=True))]  # fmt: skip
            assert all(abs(v) <= 1 for v in e)
            for i, form in enumerate(found):
                for j, v in enumerate(exact(Certificate({**c.header, "program": steps_of(c, i)}, c.arrays), x)):
                    line = sum((Fraction(float(g)) * s for g, s in zip(form.generators[0, :, j], e, strict=True)),
                               Fraction(float(form.centre[0, j])))  # fmt: skip
                    assert abs(v - line) <= Fraction(float(form.rest[0, j])), (seed, i)


def steps_of(c: Certificate, last: int) -> list[Any]:
    return list(c.header["program"])[: last + 1]


def test_a_deadline_ends_the_replay():
    c = good()
    with pytest.raises(TimeoutError, match="deadline"):
        checker.replay(c, deadline=time.monotonic() - 1)
    assert checker.replay(c, deadline=time.monotonic() + 600).proven.all()


def test_clipping_shrinks_boxes_as_it_should():
    """y = x1 + x2 - 3 on [0, 1] x [0, 4] is at most 0 only where x2 <= 3; then a second look at the box closes it."""
    steps = [{"step": "variable", "size": 2},
             affine(1, 1, [{"map": "matrix", "from": 0, "array": "w", "blocks": 1}], "b")]  # fmt: skip
    arrays = {"w": np.array([[1.0, 1.0]]), "b": np.array([-3.0])}
    rows = [([1.0], [0.0, 0.0], 0.0, 0.0), ([0.0], [0.0, 1.0], -3.0, 0.0)]
    for constant, closed in ((-3.0, False), (0.001, True)):
        root = Node(REFRESH | BOUND | CLIP)
        case = ([0.0, 0.0], [1.0, 4.0], [[rows[0], ([0.0], [0.0, -1.0], 3.0 + constant, 0.0)]])
        claim = Claim(steps, arrays, [case], [(0, 0, 1, root)])
        root.split(1, 1, 3.5)
        c = claim.certificate()
        assert untrue(c) == []
        # Row 1 holds where x2 < 3 + constant, row 0 where x1 + x2 > 3: the clipped box lies between.
        assert check(c).accepted is closed


def test_trees_of_one_case_and_many_cases():
    a, b = relu_claim(0), relu_claim(0, (0.3,))
    cases = [a.cases[0], b.cases[0], a.cases[0]]
    trees = [(0, 0, 2, a.trees[0][3]), (1, 0, 4, b.trees[0][3]), (0, 2, 4, a.trees[0][3]), (2, 0, 4, Node())]
    result = checker.replay(Claim(a.steps, a.arrays, cases, trees).certificate())
    assert result.proven.tolist()[:8] == [True] * 8 and not result.proven[8:].all()
    assert {tree for tree, _ in result.failed} == {3} and result.failed[0] == (3, 0)
    assert (result.margin[:8] > 0).all() and (result.margin[8:][~result.proven[8:]] <= 0).all()


def test_small_batches_change_nothing(monkeypatch):
    certificates = [relu_claim().certificate(), *(random_certificate(seed) for seed in range(30))]
    whole = [checker.replay(c) for c in certificates]
    monkeypatch.setattr(checker, "BATCH", 3)
    monkeypatch.setattr(checker, "FRAME", 1)
    monkeypatch.setattr(programs, "NUMBERS", 1)
    monkeypatch.setattr(programs, "MOST", 40)
    for c, before in zip(certificates, whole, strict=True):
        after = checker.replay(c)
        assert after.failed == before.failed and (after.proven == before.proven).all()
        assert after.margin == pytest.approx(before.margin, rel=1e-9, abs=1e-9)


def changed(c: Certificate, header: Mapping[str, Any] | None = None, **arrays: Any) -> Certificate:
    return Certificate({**c.header, **(header or {})}, {**c.arrays, **arrays})


@cache
def good() -> Certificate:
    return relu_claim().certificate()


@cache
def malformed() -> dict[str, Certificate]:
    """Certificates that claim nothing, too much, or nonsense. Each must be refused with a problem that says so."""
    c, deep, square = good(), random_certificate(4), quadratic_certificate(0)
    a, n = c.arrays, len(c.arrays["kind"])
    program = [dict(step) for step in c.header["program"]]

    def step(i: int, **entries: Any) -> dict:
        return {"program": [{**s, **entries} if i == j else s for j, s in enumerate(program)]}

    def put(name: str, i: Any, value: Any) -> Certificate:
        array = np.array(a[name])
        array[i] = value
        return changed(c, **{name: array})

    leaf, inner = int(np.flatnonzero(a["kind"] == 0)[0]), int(np.flatnonzero(a["kind"])[0])
    found = {
        "no cases": changed(c, box_lower=np.zeros((0, 2)), box_upper=np.zeros((0, 2)), case_rows=np.zeros(1, int),
                            case_clauses=np.zeros(0, int)),
        "no trees": changed(c, tree_case=np.zeros(0, int), tree_clause=np.zeros((0, 2), int),
                            tree_start=np.zeros(1, int), **{k: a[k][:0] for k in (
                                "flags", "kind", "what", "at", "slopes_bound", "slopes_refresh")},
                            beta_start=np.zeros(1, int)),
        "clause not covered": put("tree_clause", (0, 1), 3), "clause backwards": put("tree_clause", 0, [2, 2]),
        "first clause not covered": put("tree_clause", (0, 0), 1), "too many clauses": put("tree_clause", (0, 1), 5),
        "negative clause": put("tree_clause", (0, 0), -1), "tree of no case": put("tree_case", 0, 1),
        "tree of a negative case": put("tree_case", 0, -1), "NaN in the box": put("box_lower", (0, 0), np.nan),
        "infinite box": put("box_upper", (0, 0), np.inf), "negative slack": put("row_slack", 0, -1.0),
        "NaN slack": put("row_slack", 0, np.nan), "infinite row": put("row_value", 0, np.inf),
        "NaN constant": put("row_constant", 0, np.nan), "column beyond": put("row_column", 0, 4),
        "negative column": put("row_column", 0, -1), "clause without a row": put("row_clause", 0, 1),
        "clause beyond": put("row_clause", 3, 4), "clauses not ascending": put("row_clause", 3, 0),
        "more clauses than rows": put("case_clauses", 0, 5), "fewer clauses than rows": put("case_clauses", 0, 3),
        "no clauses": put("case_clauses", 0, 0), "rows begin late": put("row_start", 0, 1),
        "rows decrease": put("row_start", 1, 99), "case begins late": put("case_rows", 0, 1),
        "case ends early": put("case_rows", 1, 3), "unknown flags": put("flags", 0, 19),
        "together but not refreshed": changed(
            square, flags=square.arrays["flags"] - (np.arange(len(square.arrays["flags"])) == 1)
        ),
        "together where there are no products": put("flags", 0, REFRESH | BOUND | TOGETHER),
        "root not refreshed": put("flags", 0, BOUND), "clipped but not bounded": put("flags", 0, REFRESH | CLIP),
        "unknown kind": put("kind", 0, 3), "leaf turned split": put("kind", leaf, 1),
        "split turned leaf": put("kind", inner, 0), "leaf with a place": put("what", leaf, 1),
        "leaf with a point": put("at", leaf, 1.0), "split of no input": put("what", inner, 2),
        "split of a negative input": put("what", inner, -1), "split at NaN": put("at", inner, np.nan),
        "split of an input as a neuron": put("kind", inner, 2), "slopes beyond": put("slopes_bound", 0, 0),
        "slopes below": put("slopes_bound", 0, -2), "refreshed slopes beyond": put("slopes_refresh", 0, 0),
        "dropped leaf": changed(c, **{k: a[k][:-1] for k in ("flags", "kind", "what", "at", "slopes_bound",
                                                              "slopes_refresh", "beta_start")},
                                tree_start=np.array([0, n - 1])),
        "nodes without a tree": changed(c, tree_start=np.array([0, n - 2])),
        "arrays of other lengths": changed(c, at=a["at"][:-1]), "flags of another type": changed(
            c, flags=a["flags"].astype(float)),
        "beta without splits": changed(c, beta=np.ones(1), beta_start=np.r_[0, np.ones(n, int)]),
        "array missing": Certificate(c.header, {k: v for k, v in a.items() if k != "row_slack"}),
        "array unused": changed(c, more=np.zeros(1)), "header with more": changed(c, {"assumptions": "none"}),
        "another arithmetic": changed(c, {"arithmetic": "in float32"}), "no claim": changed(c, {"claim": None}),
        "program no list": changed(c, {"program": {}}), "empty program": changed(c, {"program": []}),
        "two variables": changed(c, {"program": [program[0], program[0]]}),
        "step reads itself": changed(c, step(2, **{"from": 2})), "step reads a later one": changed(
            c, step(2, **{"from": 3})), "step reads before the first": changed(c, step(2, **{"from": -1})),
        "huge step": changed(c, step(2, size=2**40)), "size no integer": changed(c, step(2, size=True)),
        "step unknown": changed(c, step(2, step="magic")), "function beyond": changed(c, step(2, function=1)),
        "function negative": changed(c, step(2, function=-1)), "weights of another shape": changed(
            c, w0=np.zeros((2, 8))),
        "infinite weights": changed(c, w0=np.full((8, 2), np.inf)), "NaN bias": changed(c, b0=np.full(8, np.nan)),
        "slots out of range": changed(c, slots=np.array([10**6]), slopes=np.zeros((0, 1), "f4")),
        "infinite slopes": changed(c, slots=np.array([20]), slopes=np.full((1, 1), np.inf, "f4")),
        "breaks not increasing": changed(c, k0=np.array([np.nan])), "fractional exponent": changed(
            c, t0=np.array([[1.0, 0.5]])), "negative exponent": changed(c, t0=np.array([[1.0, -1.0]])),
        "huge exponent": changed(c, t0=np.array([[1.0, 1e9]])), "infinite coefficient": changed(
            c, t0=np.array([[np.inf, 1.0]])),
        "unknown ring": changed(c, {"functions": [{**c.header["functions"][0], "ring": "magic"}]}),
        "function with more": changed(c, {"functions": [{**c.header["functions"][0], "more": 1}]}),
    }  # fmt: skip
    assert len(deep.arrays["beta"]) > 0
    betas = deep.arrays["beta"]
    grouped = next(c for c in map(random_certificate, range(SEEDS)) if len(c.arrays["group_key"]) > 3)
    key, row, start = (np.array(grouped.arrays[f"group_{name}"]) for name in ("key", "row", "start"))
    first = np.arange(len(key)) == start[2]
    found |= {
        "group of another size": changed(grouped, group_row=row[:-1]), "no group_start": changed(
            grouped, group_start=np.zeros(0, int)),
        "groups begin late": changed(grouped, group_start=np.r_[1, start[1:]]), "groups end early": changed(
            grouped, group_start=np.r_[start[:-1], len(key) - 1]),
        "the same bound twice": changed(grouped, group_key=np.where(first, key[start[2] + 1], key)),
        "negative bound": changed(grouped, group_key=np.where(first, -1, key)), "bound of no neuron": changed(
            grouped, group_key=np.where(np.arange(len(key)) == len(key) - 1, 2**40, key)),
        "bound with slopes beyond": changed(grouped, group_row=row + 6), "bound with negative slopes": changed(
            grouped, group_row=row - 6),
        "group beyond": changed(grouped, slopes_refresh=np.where(grouped.arrays["slopes_refresh"] >= -1, 3, 0)),
    }  # fmt: skip
    found["negative beta"] = changed(deep, beta=np.where(np.arange(len(betas)) == 0, -1.0, betas))
    found["NaN beta"] = changed(deep, beta=np.where(np.arange(len(betas)) == 0, np.nan, betas))
    found["betas of another node"] = changed(
        deep, beta=np.r_[betas, 0.0], beta_start=np.r_[deep.arrays["beta_start"][:-1], len(betas) + 1]
    )
    return found


@pytest.mark.parametrize("name", malformed())
def test_malformed_certificates_are_refused(name):
    result = check(malformed()[name])
    assert not result.accepted and len(result.problems) == 1 and result.claims == ()


def corrupted(c: Certificate, rng: np.random.Generator) -> Certificate:
    """Somebody who knows the format alters, moves, drops or adds a number or an entry."""
    arrays, header = {k: np.array(v) for k, v in c.arrays.items()}, dict(c.header)
    name = str(rng.choice(sorted(arrays)))
    array = arrays[name]
    match int(rng.integers(0, 6)):
        case 0 if array.size:
            at = tuple(int(rng.integers(0, n)) for n in array.shape)
            array[at] = rng.choice([array[at] + 1, -array[at], 0, array[at] - 1])
        case 1 if array.size and array.dtype.kind == "f":
            at = tuple(int(rng.integers(0, n)) for n in array.shape)
            array[at] = rng.choice([np.nan, np.inf, -np.inf, 1e30, rng.standard_normal(), array[at] * 1.5])
        case 2 if array.size:
            arrays[name] = array[:-1]
        case 3 if array.size:
            arrays[name] = array[rng.permutation(len(array))]
        case 4 if array.size:
            arrays[name] = np.concatenate([array, array[-1:]])
        case _:
            program = [dict(step) for step in header["program"]]
            step = program[int(rng.integers(0, len(program)))]
            key = str(rng.choice(sorted(step)))
            step[key] = [0, 1, 2, 7, -1, None, [], "affine", {}, 2**40][int(rng.integers(0, 10))]
            header["program"] = program
    return Certificate(header, arrays)


def test_a_thousand_corruptions_prove_nothing_false():
    """Refused, not accepted, or true of the numbers as they now are; and never a crash."""
    rng, outcome = np.random.default_rng(7), {"refused": 0, "open": 0, "proven": 0}
    for i in range(1000):
        c = corrupted(good() if i % 2 else random_certificate(int(rng.integers(0, SEEDS))), rng)
        result = check(c)
        assert bool(result.problems) == (result.claims == ())
        if result.problems:
            outcome["refused"] += 1
        else:
            outcome["proven" if result.accepted else "open"] += 1
            assert untrue(c, i) == [], i
    assert min(outcome.values()) > 50


def broken(old: str, new: str) -> Any:
    """The checker with one piece of its source exchanged."""
    folder = Path(checker.__file__).parent
    names = ("rings", "functions", "products", "program", "bounding", "forms", "intervals", "reading", "verification")
    sources = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in names}
    assert sum(s.count(old) for s in sources.values()) == 1, f"{old!r} is not in the checker exactly once: adapt this"
    for name in names:
        module = ModuleType(f"broken_{name}")
        source = sources[name].replace(old, new)
        for other in names:
            source = source.replace(f"soundly.certificate.{other}", f"broken_{other}")
        sys.modules[module.__name__] = module
        exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module


def faults(with_: Any) -> Iterator[str]:
    """Everything a checker proves that is not so, or accepts that it may not, or refuses that it should accept."""
    if not with_.replay(good()).proven.all():
        yield "refuses a good certificate"
    for name, c in malformed().items():
        try:
            if not with_.replay(c).problems:
                yield f"takes {name}"
        except Exception as crash:
            yield f"crashes: {name}: {crash!r}"
    for seed in range(120):
        c, holds = hard(seed)
        if any(p and not h for p, h in zip(with_.replay(c).proven.tolist(), holds, strict=False)):
            yield f"proves by rounding {seed}"
    if not with_.replay(grouped(1)).proven.all():
        yield "ignores stored slopes"
    if with_.replay(halved(0.03)).proven.all() or not with_.replay(halved(0.0)).proven.all():
        yield "halves boxes wrongly"
    if with_.replay(unlikely(0.004)).proven.all():
        yield "forgets the error of a bias in hidden intervals"
    for seed in range(60):
        if escaped(seed, with_):
            yield f"loses values of intervals {seed}"
    yield from (f"is wrong at jumps: {name}" for name in wrong_at_jumps(with_))
    yield from (f"proves what fails at a jump {seed}" for seed in range(60) if untrue_at_jumps(seed, with_))
    try:
        with_.replay(good(), deadline=-1.0)
        yield "ignores the deadline"
    except TimeoutError:
        pass
    for kind in ("weight", "bias"):
        if with_.replay(uncertain(kind, 0.9)).proven.all():
            yield f"forgets the error of a {kind}"
    for seed in range(40):
        if wrong := untrue(neuron_certificate(seed), seed, with_):
            yield f"proves {wrong} of neuron splits {seed}"
    for seed in range(60):
        if wrong := untrue(quadratic_certificate(seed), seed, with_):
            yield f"proves {wrong} of quadratic forms {seed}"
    for seed in range(60):
        if factor_escaped(seed, with_):
            yield f"loses values of factors {seed}"
    if with_.replay(square_of_uncertain()).proven.all():
        yield "forgets the error of a weight in products"
    yield from above_least(sys.modules[with_.__name__.replace("verification", "products")])
    for seed in range(SEEDS):
        if wrong := untrue(random_certificate(seed), seed, with_):
            yield f"proves {wrong} of {seed}"


FAULTS = {
    "no rounding in dot products": ("bound.lose(-_rowwise(np.abs(a), -worst))", "pass"),
    "no rounding of constants and of the input": ("bound = self.d - ABOVE * self.lost", "bound = self.d - 0.0"),
    "weight errors ignored": ("+ weight_error * size + bias_error", "+ bias_error"),
    "bias errors ignored": ("weight_error * size + bias_error)", "weight_error * size)"),
    "beta with the wrong sign": ("np.subtract.at(a, (row, entry), change)", "np.add.at(a, (row, entry), change)"),
    "beta without its constant": ("shift = change * splits.at[which]", "shift = 0 * change"),
    "lines exchanged": (
        "np.where(positive, owned(some.below[j]), owned(some.above[j]))",
        "np.where(positive, owned(some.above[j]), owned(some.below[j]))"),
    "offsets exchanged": (
        "np.where(positive, owned(below), owned(above))", "np.where(positive, owned(above), owned(below))"),
    "offsets above for positive coefficients": ("bound.add(_rowwise(np.minimum(a, 0.0), owned(above)))",
                                                "bound.add(_rowwise(np.maximum(a, 0.0), owned(above)))"),
    "offsets of split neurons exchanged": (
        "values * np.where(positive, below, above))", "values * np.where(positive, above, below))"),
    "split neurons counted for the wrong node": ("pair, row = _rows_of(special.node, owner)",
                                                 "pair, row = _rows_of(np.sort(special.node)[::-1], owner)"),
    "clamps exchanged": ("np.maximum.at(low, place[sign > 0], at[sign > 0])",
                         "np.maximum.at(low, place[sign < 0], at[sign < 0])"),
    "clamps exchanged in gathered frames": (
        "                ends = (frame.lower if",
        "                sign = -sign\n                ends = (frame.lower if"),
    "the input's ends exchanged": (
        "bound.add(-_product(np.abs(a), _owned(radius, owner)))", "bound.add(_product(a, _owned(radius, owner)))"),
    "bias forgotten": ("bound.add(a @ step.bias)", "pass"),
    "constant forgotten": ("np.zeros(len(owner)) + constant", "np.abs(constant) + np.zeros(len(owner))"),
    "slack ignored": ("best > proof.slack[rows]", "best > -proof.slack[rows] - 1e-2"),
    "all rows of a clause at once": ("closed = np.logical_or.reduceat(", "closed = True | np.logical_or.reduceat("),
    "a row skipped": ("some = slice(begin, begin + size)", "best[0] = 1e9; some = slice(begin + 1, begin + size)"),
    "one clause closes all": ("open_[each[done]] = False", "open_[each] = open_[each] & ~done.any()"),
    "clip with the wrong sign": ("known & (a < 0), edge_down, -np.inf), np.where(known & (a > 0)",
                                 "known & (a > 0), edge_down, -np.inf), np.where(known & (a < 0)"),
    "clip by the whole row": ("rest = total[:, None] - least", "rest = total[:, None] + 0 * least"),
    "clip to the smallest clause": ("((np.minimum, left), (np.maximum, right))",
                                    "((np.maximum, left), (np.minimum, right))"),
    "input split exchanged": ("upper[what] = min(upper[what], at)", "upper[what] = min(upper[what], at - 0.4)"),
    "leaves forgotten": ("self.left_open[node.tree] |= node.open", "pass"),
    "right children forgotten": ("for side, sign in ((0, -1), (1, 1)):", "for side, sign in ((0, -1),):"),
    "left children forgotten": ("for side, sign in ((0, -1), (1, 1)):", "for side, sign in ((1, 1),):"),
    "coverage unchecked": ("(np.cumsum(covered)[:-1] < 1).any()", "False"),
    "uncovered clauses proven": ("proven = np.zeros(pairs, bool)", "proven = np.ones(pairs, bool)"),
    "level order unchecked": ("(np.diff(start) != 1 + 2 * splits).any()", "False"),
    "negative beta accepted": ("(beta < 0).any()", "False"),
    "NaN accepted": ("not (np.abs(array) <= largest).all()", "(np.abs(array) > largest).any()"),
    "negative slack accepted": ("(slack < 0).any()", "False"),
    "unused arrays accepted": ("unused := set(certificate.arrays) - arrays.used", "unused := set()"),
    "intervals too narrow": ("low, high = centre - radius - cost, centre + radius + cost",
                             "low, high = centre - radius / 2, centre + radius / 2"),
    "no absolute values in radii": ("radius += part.absolute.apply(r)", "radius += np.abs(part.apply(r))"),
    "empty means proven": ("dead = dead | _settle(frame, i)\n        if not tightened",
                           "dead = dead | True\n        if not tightened"),
    "the wrong row of the frame": ("node.frame, node.row = frame, row", "node.frame, node.row = frame, 0"),
    "corners of products forgotten": ("corners = np.stack([a * c, a * d, b * c, b * d])",
                                      "corners = np.stack([a * c, b * d])"),
    "planes in one corner": ("for x, y in ((xl, yl), (xl, yu), (xu, yl), (xu, yu)):", "for x, y in ((xl, yl),):"),
    "curvature ignored": ("fall = reach - arc / 2", "fall = reach"),
    "steepness ignored": ("fall = reach - arc / 2", "fall = 0 * reach"),
    "half of an interval": ("a, b = np.maximum(lower[at], left), np.minimum(upper[at], right)",
                            "a, b = np.maximum(lower[at], left), np.minimum(lower[at] / 2 + upper[at] / 2, right)"),
    "rests not through absolute weights": ("rest + part.absolute.apply(form.rest + rounding * size)",
                                           "rest + part.apply(form.rest + rounding * size)"),
    "generators forgotten": ("spread = np.abs(generators).sum(axis=1)", "spread = 0 * np.abs(generators).sum(axis=1)"),
    "product of the radii forgotten": ("+ size_b * a.rest + wide_a * wide_b)", "+ size_b * a.rest)"),
    "bands forgotten": ("(steep * form.rest + half) * (1 + 8 * U)", "(steep * form.rest) * (1 + 8 * U)"),
    "rests forgotten in intervals of forms": ("wide = (self.spread + self.rest)", "wide = (self.spread)"),
    "uncertain weights forgotten in forms": ("rounding * np.abs(step.bias) + cost", "rounding * np.abs(step.bias)"),
    "one generator for all": ("generators[node, place, entry] = half[node, entry]",
                              "generators[node, 0 * place, entry] = half[node, entry]"),
    "the chord below": ("Lines(through, offset, chord, rise)", "Lines(chord, offset, through, rise)"),
    "the chord without its offset": ("np.where(across, rise * (1 + 4 * U) + TINY, 0.0)", "np.where(across, 0.0, 0.0)"),
    "stored slopes for the other side": ("2 * (program.offsets[i] + entry) + side",
                                         "2 * (program.offsets[i] + entry) + 1 - side"),
    "bounds of the other side": ("            below = sign > 0\n", "            below = sign < 0\n"),
    "halves exchanged": ("sign = np.array([-1.0, 1.0])", "sign = np.array([1.0, -1.0])"),
    "halves for the other child": ("lower, upper = halves[side]", "lower, upper = halves[1 - side]"),
    "halves by certain weights": ("np.full(2, cost[node.row, entry])", "np.zeros(2)"),
    "no bias in first rows": ("sign * step.bias[entry], lost", "0 * step.bias[entry], lost"),
    "first rows are certain": ("sign * step.bias[entry], lost", "sign * step.bias[entry]"),
    "jumps from the wrong side": ("met &= ~(sides[0] & (lower == right)) & ~(sides[1] & (upper == left))",
                                  "met &= ~(sides[0] & (lower == left)) & ~(sides[1] & (upper == right))"),
    "jumps without a split": ("return (low == after) & (low < high), (high == before) & (low < high)",
                              "return (low >= after) & (low < high), (high <= before) & (low < high)"),
    "jumps without a split in exceptions": ("sides = (low == after) & (low < high), (high == before) & (low < high)",
                                            "sides = low < high, low < high"),
    "jumps of split points only": ("jump = np.isin(at, list(self.proof.program.parted[step.source]))",
                                   "jump = np.isfinite(at)"),
    "jumps of gathered frames at any point": ("if at in proof.program.parted[step]:", "if True:"),
    "jumps with a value of their own": ("len(set.intersection(*(f.sides(t) for f in functions))) == 1",
                                        "len(set.intersection(*(f.sides(t) for f in functions))) <= 1"),
    "jumps on either side": ("return {self.say[i]} if self.say else set()", "return {-1, 1}"),
    "own values on any side": ("== Fraction(own)\n", "!= None\n"),
    "own values forgotten": ("                    inside = (self.lower <= t) & (self.upper >= t)\n",
                             "                    inside = (self.lower > t) & (self.upper < t)\n"),
    "plain bounds without their ends": ("_rowwise(np.maximum(-a, 0.0), _owned(-high, owner))",
                                        "_rowwise(np.maximum(-a, 0.0), _owned(-low, owner))"),
    "plain bounds without rounding": ("_owned(-(2 * a.shape[1] + 16) * U * size, owner)",
                                      "_owned(0 * size, owner)"),
    "plain bounds of the wrong sign": ("_rowwise(np.maximum(a, 0.0), _owned(low, owner))",
                                       "_rowwise(np.maximum(a, 0.0), _owned(high, owner))"),
    "slopes of another bound's box": ("owner=each)", "owner=np.sort(each)[::-1])"),
    "what tangents leave ignored": ("            bound.add(value)\n", ""),
    "rests of factors forgotten": ("(np.abs(a) * (rest + rounding))", "(np.abs(a) * rounding)"),
    "signs of coefficients forgotten": ("left.generators * a[:, None, :]", "left.generators * np.abs(a)[:, None, :]"),
    "one symbol for all rests": ("generators[:, used + entry, entry]", "generators[:, used + 0 * entry, entry]"),
    "no symbols for rests": ("np.where(np.isfinite(rest), rest, 0.0)\n", "0.0\n"),
    "one symbol for two sources": ("used, rest = used + n,", "used, rest = used,"),
    "tangents through zero": ("offset = -left.centre * right.centre", "offset = 0.0 * left.centre"),
    "slopes of tangents exchanged": ("slopes, known = (right.centre, left.centre)",
                                     "slopes, known = (left.centre, right.centre)"),
    "squares left out that are none": ("better = (pivot >= PIVOT) & (now > bound)", "better = now > bound"),
    "squares without their tails": ("rest = q - square", "rest = q + 0 * square"),
    "no rounding in quadratic forms": ("return bound, lost + (4 * size + 16) * U * total", "return bound, 0 * lost"),
    "only half of a quadratic form": ("sizes = np.abs(q).sum(axis=2)", "sizes = np.abs(np.tril(q)).sum(axis=2)"),
    "factors of another node": ("factor.take(owner[some])", "factor.take(np.sort(owner)[::-1][some])"),
    "together where nothing is refreshed": ("(together & ~(refreshed & bounded)).any()", "False"),
    "the deadline ignored": ("raise TimeoutError", "pass; TimeoutError"),
    "everything refused": ("return Replay(proven, self.margin", "return Replay(0 * proven, self.margin"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name):
    with np.errstate(all="ignore"):
        assert next(faults(broken(*FAULTS[name])), None) is not None


def test_the_checker_unchanged_has_no_faults():
    assert list(faults(broken("FRAME = 2**20", "FRAME = 2**20 "))) == []
