"""Certificates of verification by hand: programs, cases of rows and trees of splits, as arrays of the format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from soundly.certificate import Certificate
from soundly.certificate.format import FORMAT, NETWORK, VERIFICATION, VERSION

REFRESH, BOUND, CLIP, TOGETHER, SUMMED = 1, 2, 4, 8, 16
RELU = {"name": "relu", "ring": "polynomial", "pieces": [[], [(1.0, 1)]], "breaks": [0.0]}
STEP = {"name": "step", "ring": "polynomial", "pieces": [[], [(1.0, 0)]], "breaks": [0.0]}
REACHED = {**STEP, "name": "reached", "held_kind": ["right"]}
HALF = {**STEP, "name": "half", "held_kind": ["own"], "held": [0.5]}
FULL = {**STEP, "name": "full", "held_kind": ["own"], "held": [1.0]}
PEAK = {**STEP, "name": "peak", "held_kind": ["own"], "held": [3.0]}
SQUARE = {"name": "square", "ring": "polynomial", "pieces": [[(1.0, 2)]]}
TANH = {"name": "tanh", "ring": "tanh", "pieces": [[(1.0, 0, 1)]]}
ABSOLUTE = {"name": "absolute", "ring": "polynomial", "pieces": [[(-1.0, 1)], [(1.0, 1)]], "breaks": [0.0]}
TWICE = {**ABSOLUTE, "name": "twice", "pieces": [[(-2.0, 1)], [(2.0, 1)]]}
NEGATED = {**ABSOLUTE, "name": "negated", "pieces": [[(1.0, 1)], [(-1.0, 1)]]}
FUNCTIONS = {f["name"]: f for f in (RELU, STEP, REACHED, HALF, FULL, PEAK, SQUARE, TANH, ABSOLUTE, TWICE, NEGATED)}


@dataclass
class Node:
    """A node of a tree: a leaf, or split with (position, at, left child, right child). Bounds that tighten intervals
    are round, 2 * neuron + side, row of slopes, multipliers."""

    flags: int = REFRESH | BOUND
    kind: int = 0
    what: int = 0
    at: float = 0.0
    children: tuple["Node", "Node"] | None = None
    beta: Sequence[float] = ()
    slopes_bound: int = -1
    slopes_refresh: int = -1
    tightened: Sequence[tuple[int, int, int, Sequence[float]]] = ()

    def split(self, kind: int, what: int, at: float, flags: int = REFRESH | BOUND) -> tuple["Node", "Node"]:
        self.kind, self.what, self.at, self.children = kind, what, at, (Node(flags), Node(flags))
        return self.children


def levels(root: Node) -> list[Node]:
    found = [root]
    for node in found:
        found += node.children or ()
    return found


@dataclass
class Lemma:
    """Neuron key / 2 is at least (even key) or at most value; a row of slopes for each leaf of the tree."""

    key: int
    value: float
    root: Node
    case: int = 0
    slots: Sequence[int] = ()
    slopes: Sequence[Sequence[float]] = ()


def lemma_arrays(lemmas: Sequence[Lemma]) -> dict[str, np.ndarray]:
    trees = [levels(lemma.root) for lemma in lemmas]
    nodes = [node for tree in trees for node in tree]
    integers = {
        "lemma_case": [lemma.case for lemma in lemmas], "lemma_key": [lemma.key for lemma in lemmas],
        "lemma_start": np.cumsum([0, *map(len, trees)]), "lemma_what": [n.what if n.kind else -1 for n in nodes],
        "lemma_slot_start": np.cumsum([0, *(len(lemma.slots) for lemma in lemmas)]),
        "lemma_slots": [slot for lemma in lemmas for slot in lemma.slots],
    }  # fmt: skip
    floats = {
        "lemma_value": [lemma.value for lemma in lemmas], "lemma_at": [n.at for n in nodes],
        "lemma_beta": [b for n in nodes for b in n.beta],
    }  # fmt: skip
    slopes = np.array([v for lemma in lemmas for row in lemma.slopes for v in row], "f4")
    return {
        **{name: np.array(v, np.int64) for name, v in integers.items()},
        **{name: np.array(v, np.float64) for name, v in floats.items()}, "lemma_slopes": slopes,
    }  # fmt: skip


@dataclass
class Claim:
    """A network, cases (lower, upper, clauses of rows (y, x, constant, slack)), and trees (case, first, last, root);
    perhaps lemmas, a ball (norm, centre, radius), a grid of choices (entries, options)."""

    steps: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]
    cases: list[tuple[Any, Any, list[list[tuple[Any, Any, float, float]]]]]
    trees: list[tuple[int, int, int, Node]] = field(default_factory=list)
    slots: Sequence[int] = ()
    slopes: Any = None
    groups: Sequence[Mapping[int, int]] = ()
    lemmas: Sequence[Lemma] = ()
    ball: tuple[str, Any, Any] | None = None
    grid: Sequence[tuple[Any, Any]] = ()

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
        bounds = [(k, *bound) for k, n in enumerate(flat) for bound in n.tightened]
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
            "tighten_node": [b[0] for b in bounds], "tighten_round": [b[1] for b in bounds],
            "tighten_key": [b[2] for b in bounds], "tighten_row": [b[3] for b in bounds],
            "force_start": np.cumsum([0, *(len(b[4]) for b in bounds)]),
        }  # fmt: skip
        floats = {
            "box_lower": [c[0] for c in self.cases], "box_upper": [c[1] for c in self.cases], "row_value": value,
            "row_constant": constant, "row_slack": slack, "at": [n.at for n in flat],
            "beta": [b for n in flat for b in n.beta], "tighten_force": [g for b in bounds for g in b[4]],
        }  # fmt: skip
        a |= {name: np.array(v, np.int64) for name, v in integers.items()}
        a |= {name: np.array(v, np.float64) for name, v in floats.items()}
        a |= lemma_arrays(self.lemmas)
        a["tree_clause"] = np.array([[t[1], t[2]] for t in self.trees], np.int64).reshape(-1, 2)
        a["slopes"] = np.zeros((0, len(self.slots)), "f4") if self.slopes is None else np.array(self.slopes, "f4")
        header = {
            "format": FORMAT, "version": VERSION, "kind": VERIFICATION, "arithmetic": NETWORK, "claim": "a test",
            "model": {}, "made_with": {}, "program": steps, "functions": functions,
        }  # fmt: skip
        if self.ball is not None:
            header["ball"], centre, radius = self.ball
            a |= {"ball_centre": np.array(centre, np.float64), "ball_radius": np.array(radius, np.float64)}
        if self.grid:
            header["grid"] = len(self.grid)
            entries, values = ([np.asarray(choice[k]).reshape(-1) for choice in self.grid] for k in (0, 1))
            a |= {"grid_entry": np.concatenate(entries).astype(np.int64),
                  "grid_value": np.concatenate(values).astype(np.float64),
                  "grid_start": np.cumsum([0, *map(len, entries)]).astype(np.int64),
                  "grid_value_start": np.cumsum([0, *map(len, values)]).astype(np.int64)}  # fmt: skip
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


def changed(c: Certificate, header: Mapping[str, Any] | None = None, **arrays: Any) -> Certificate:
    return Certificate({**c.header, **(header or {})}, {**c.arrays, **arrays})
