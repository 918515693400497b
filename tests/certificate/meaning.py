"""What a verification certificate claims: by loops, samples and rational numbers, nothing shared with the checker."""

import importlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from soundly.certificate import Certificate

checker = importlib.import_module("soundly.certificate.verification")


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


def evaluate_all(c: Certificate, x: np.ndarray) -> list[np.ndarray]:
    """The values of all steps."""
    found = []
    for i in range(len(c.header["program"])):
        part = Certificate({**c.header, "program": list(c.header["program"])[: i + 1]}, c.arrays)
        found.append(evaluate(part, x))
    return found


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


def exact(c: Certificate, x: Sequence[Fraction]) -> list[Fraction]:
    """The outputs of a program of matrices, ReLUs, squares and products in rational arithmetic."""
    values: list[list[Fraction]] = []
    for step in c.header["program"]:
        match step["step"]:
            case "variable":
                values.append(list(x))
            case "function":
                square = c.header["functions"][step["function"]]["name"] == "square"
                values.append([v * v if square else max(v, Fraction(0)) for v in values[step["from"]]])
            case "times":
                values.append([a * b for a, b in zip(values[step["left"]], values[step["right"]], strict=True)])
            case "affine":
                y = [Fraction(float(b)) for b in c.arrays[step["bias"]]]
                for part in step["parts"]:
                    for i, row in enumerate(c.arrays[part["array"]]):
                        y[i] += sum(Fraction(float(w)) * v for w, v in zip(row, values[part["from"]], strict=True))
                values.append(y)
    return values[-1]


def steps_of(c: Certificate, last: int) -> list[Any]:
    return list(c.header["program"])[: last + 1]


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
    found = np.concatenate([inside, corners, (lower + upper)[None] / 2])
    if "grid" in c.header:
        return on_grid(c, lower, upper, found, rng)
    return found if "ball" not in c.header else in_ball(c, lower, upper, found, rng)


def on_grid(c: Certificate, lower: np.ndarray, upper: np.ndarray, x: np.ndarray, rng: Any) -> np.ndarray:
    """Points of a box, each choice of the certificate's grid at one of its options."""
    for at, values in zip(
        np.split(c.arrays["grid_entry"], c.arrays["grid_start"][1:-1]),
        np.split(c.arrays["grid_value"], c.arrays["grid_value_start"][1:-1]),
        strict=True,
    ):
        options = values.reshape(-1, len(at))
        x[:, at] = options[rng.integers(0, len(options), len(x))]
    return x[((x >= lower) & (x <= upper)).all(axis=1)]


def in_ball(c: Certificate, lower: np.ndarray, upper: np.ndarray, x: np.ndarray, rng: Any) -> np.ndarray:
    """Points of a box and of the certificate's ball: those given, drawn to the centre, and points of the sphere."""
    centre, radius = c.arrays["ball_centre"], c.arrays["ball_radius"]
    order = {"l1": 1, "l2": 2}[str(c.header["ball"])]
    way = rng.standard_normal(x.shape) * (rng.random(x.shape) < rng.choice([0.2, 0.5, 1.0], (len(x), 1)))
    y = np.concatenate([np.divide(x - centre, radius, out=np.zeros_like(x), where=radius > 0), 100 * way])
    y = y / np.maximum(1 + 1e-12, np.linalg.norm(y, order, axis=1, keepdims=True))
    found = np.where(radius > 0, centre + radius * y, np.concatenate([x, x]))
    return found[((found >= lower) & (found <= upper)).all(axis=1)]


@cache
def truth(c: Certificate, seed: int = 0) -> tuple[np.ndarray, ...]:
    """For each case the least excess of each clause among samples: what is well below 0 must not be proven."""
    found = []
    for case in range(len(c.arrays["box_lower"])):
        with np.errstate(all="ignore"):
            some = points(c, case, np.random.default_rng(seed), 4000)
            worst = excess(c, case, some).min(axis=1, initial=np.inf)
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
