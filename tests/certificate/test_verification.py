"""The checker of verifications against sampling and rational arithmetic, and against itself with faults planted in it."""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soundly.certificate import Certificate, check
from soundly.certificate.format import FORMAT, NETWORK, VERIFICATION, VERSION

checker = importlib.import_module("soundly.certificate.verification")
bounding = importlib.import_module("soundly.certificate.bounding")
REFRESH, BOUND, CLIP = 1, 2, 4

RELU = {"name": "relu", "ring": "polynomial", "pieces": [[], [(1.0, 1)]], "breaks": [0.0]}
STEP = {"name": "step", "ring": "polynomial", "pieces": [[], [(1.0, 0)]], "breaks": [0.0]}
SQUARE = {"name": "square", "ring": "polynomial", "pieces": [[(1.0, 2)]]}
TANH = {"name": "tanh", "ring": "tanh", "pieces": [[(1.0, 0, 1)]]}
FUNCTIONS = {"relu": RELU, "step": STEP, "square": SQUARE, "tanh": TANH}
VALUES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0), "step": lambda x: (x > 0) * 1.0, "square": np.square, "tanh": np.tanh,
}  # fmt: skip


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
    """A network, cases (lower, upper, clauses: lists of rows (y, x, constant, slack)), and trees (case, first, last)."""

    steps: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]
    cases: list[tuple[Any, Any, list[list[tuple[Any, Any, float, float]]]]]
    trees: list[tuple[int, int, int, Node]] = field(default_factory=list)
    slots: Sequence[int] = ()
    slopes: Any = None

    def certificate(self) -> Certificate:
        a = dict(self.arrays)
        functions = []
        for i, step in enumerate(self.steps):
            if step["step"] == "function":
                known = [f["name"] for f in functions]
                f = FUNCTIONS[step["function"]]
                if f["name"] not in known:
                    k = len(functions)
                    breaks = f.get("breaks", [])
                    width = max((len(t) for p in f["pieces"] for t in p), default=2)
                    a[f"t{k}"] = np.array([t for p in f["pieces"] for t in p], float).reshape(-1, width)
                    a[f"k{k}"], a[f"h{k}"] = np.array(breaks, float), np.zeros(len(breaks))
                    functions.append({
                        "name": f["name"], "ring": f["ring"], "rate": None, "pieces": [len(p) for p in f["pieces"]],
                        "terms": f"t{k}", "breaks": f"k{k}", "held": f"h{k}", "held_kind": ["left"] * len(breaks),
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
            values.append(VALUES[c.header["functions"][step["function"]]["name"]](values[step["from"]]))
        elif step["step"] == "times":
            values.append(values[step["left"]] * values[step["right"]])
        else:
            y = np.tile(a[step["bias"]].astype(float), (len(x), 1))
            for part in step["parts"]:
                y = y + values[part["from"]] @ dense(c, part, values[part["from"]].shape[1], step["size"]).T
            values.append(y)
    return values[-1]


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


def untrue(c: Certificate, seed: int = 0) -> list[tuple[int, int]]:
    """Clauses that the checker proves and a sample refutes."""
    result, rng = checker.replay(c), np.random.default_rng(seed)
    if result.problems:
        return []
    found = []
    for case, (first, last) in enumerate(pairwise(result.pair_start.tolist())):
        if not (c.arrays["box_lower"][case] <= c.arrays["box_upper"][case]).all():
            continue
        with np.errstate(all="ignore"):
            worst = excess(c, case, points(c, case, rng)).min(axis=1)
        found += [(case, i) for i in range(last - first) if result.proven[first + i] and worst[i] < -1e-9]
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
    """Claims that each output exceeds its sampled minimum less some room, and stays below its maximum plus it."""
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
    claim = tightly(steps, arrays, centre - radius, centre + radius, [1e-6, 0.01, 0.3, 3], seed)
    claim.trees = [(0, 0, len(claim.cases[0][2]), random_tree(rng, claim))]
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
    claim.slopes = rng.choice([0, 0.25, 0.5, 1.0], (len(read) + 3, len(claim.slots)))
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


@pytest.mark.parametrize("seeds", [range(k, k + 50) for k in range(0, 300, 50)], ids=str)
def test_nothing_that_a_sample_refutes_is_proven(seeds):
    proven = 0
    for seed in seeds:
        c = random_claim(seed).certificate()
        result = checker.replay(c)
        assert result.problems == (), seed
        assert untrue(c, seed) == [], seed
        proven += int(result.proven.sum())
    assert proven > 100
