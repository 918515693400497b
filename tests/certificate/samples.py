"""Certificates in great numbers: grown by input splits, random in everything, split at neurons, true by a few ulps."""

import importlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from tests.certificate.claims import BOUND, CLIP, REFRESH, TOGETHER, Claim, Node, affine, levels, mlp
from tests.certificate.meaning import checker, evaluate, evaluate_all, exact, points

from soundly.certificate import Certificate

reading = importlib.import_module("soundly.certificate.reading")


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


def tightly(
    steps: list,
    arrays: dict,
    lower: Any,
    upper: Any,
    rooms: Sequence[float],
    seed: int = 0,
    ball: Any = None,
    grid: Any = (),
) -> Claim:
    """Claims that each output exceeds its sampled minimum less some room, and stays below its maximum plus it.

    With a room below 0 the sample refutes the claim.
    """
    lower, upper = np.asarray(lower, float), np.asarray(upper, float)
    m, n = steps[-1]["size"], len(lower)
    blank = Claim(steps, arrays, [(lower, upper, [[(np.ones(m), np.zeros(n), 0.0, 0.0)]])], ball=ball, grid=grid)
    c = blank.certificate()
    y = evaluate(c, points(c, 0, np.random.default_rng(seed), 4000))
    clauses = []
    for room in rooms:
        for sign in (1.0, -1.0):
            for j in range(m):
                clauses.append([(sign * np.eye(m)[j], np.zeros(n), float(room - (sign * y[:, j]).min()), 0.0)])
    return Claim(steps, arrays, [(lower, upper, clauses)], [(0, 0, len(clauses), Node())], ball=ball, grid=grid)


def relu_claim(seed: int = 0, rooms: Sequence[float] = (0.05,)) -> Claim:
    steps, arrays = mlp(np.random.default_rng(seed), [2, 8, 8, 2])
    return grown(tightly(steps, arrays, [-1, -1], [1, 1], rooms), 14, widest)


@cache
def good() -> Certificate:
    return relu_claim().certificate()


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


@cache
def random_certificate(seed: int) -> Certificate:
    return random_claim(seed).certificate()


@cache
def ball_certificate(seed: int) -> Certificate:
    """A small network over a ball and a box that cuts it, with a random tree; claims true and false by little."""
    rng = np.random.default_rng(seed)
    n = int(rng.choice([1, 2, 3, 6]))
    steps, arrays = mlp(rng, [n, 5, 4, 2][: 2 + seed % 3], ["relu", "tanh"][seed % 2])
    centre, radius = rng.standard_normal(n), rng.choice([0.1, 0.5, 1.0], n)
    near, far = rng.choice([0.3, 0.9, 1.0, 2.0], (2, n))
    if seed % 5 == 0:
        near[0] = -0.2  # the centre lies outside the box
    if seed % 7 == 0:
        radius[0] = 0.0
    ball = (["l1", "l2"][seed // 2 % 2], centre, radius)
    rooms = [-0.1, -0.01, -1e-3, -1e-5, 1e-5, 1e-3, 0.01, 0.1]
    wide = np.where(radius > 0, radius, 0.2)
    claim = tightly(steps, arrays, centre - near * wide, centre + far * wide, rooms, seed, ball)
    claim.trees = [(0, 0, len(claim.cases[0][2]), random_tree(rng, claim))]
    return claim.certificate()


@cache
def grid_certificate(seed: int) -> Certificate:
    """A small network over a grid of single and joint choices, with a random tree; claims true and false by little."""
    rng = np.random.default_rng(seed)
    n = int(rng.choice([1, 2, 3, 6]))
    steps, arrays = mlp(rng, [n, 5, 4, 2][: 2 + seed % 3], ["relu", "tanh"][seed % 2])
    order, grid = rng.permutation(n).tolist(), []
    while order and (rng.random() < 0.8 or not grid):
        entries = [order.pop() for _ in range(min(len(order), int(rng.choice([1, 1, 2]))))]
        grid.append((entries, rng.choice([0.0, 0.3, 1.0, -0.7, 0.31], (int(rng.integers(1, 5)), len(entries)))))
    lower, upper = -np.ones(n), np.ones(n)
    for entries, options in grid:
        lower[entries], upper[entries] = options.min(0), options.max(0)
    if seed % 5 == 0:
        upper[grid[0][0]] += 0.5
    claim = tightly(steps, arrays, lower, upper, [-0.1, -0.01, -1e-3, 1e-5, 1e-3, 0.01, 0.1], seed, None, grid)
    claim.trees = [(0, 0, len(claim.cases[0][2]), random_tree(rng, claim))]
    return claim.certificate()


SEEDS = 200


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
