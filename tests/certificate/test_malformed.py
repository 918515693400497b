"""Verifications that claim nothing, too much or nonsense, and a thousand altered ones: none proves a falsehood."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.certificate.claims import BOUND, CLIP, REFRESH, TOGETHER, changed
from tests.certificate.meaning import untrue
from tests.certificate.samples import SEEDS, good, random_certificate
from tests.certificate.test_conditional import several, tightened_certificate
from tests.certificate.test_products_together import quadratic_certificate

from soundly.certificate import Certificate, check


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
    t = tightened_certificate(0)
    key, force, node = t.arrays["tighten_key"], t.arrays["tighten_force"], t.arrays["tighten_node"]
    one = np.arange(len(force)) == 0

    def other(name: str, value: Any) -> Certificate:
        array = np.array(t.arrays[name])
        array[0] = value
        return changed(t, **{name: array})

    found |= {
        "tightened for several clauses": several(), "negative multiplier of a row": changed(
            t, tighten_force=np.where(one, -1.0, force)),
        "NaN multiplier of a row": changed(t, tighten_force=np.where(one, np.nan, force)),
        "multipliers missing": changed(t, tighten_force=force[:-1], force_start=np.minimum(
            t.arrays["force_start"], len(force) - 1)),
        "tightened key beyond": other("tighten_key", 2**40), "tightened key negative": other("tighten_key", -1),
        "tightened input": other("tighten_key", 0), "tightened output": other("tighten_key", 2 * 20),
        "the same tightened twice": other("tighten_key", key[1]), "round negative": other("tighten_round", -1),
        "rounds decrease": other("tighten_round", 5), "tightened node beyond": changed(
            t, tighten_node=node + len(t.arrays["kind"])),
        "tightened nodes descend": changed(t, tighten_node=node[::-1]), "tightened slopes beyond": other(
            "tighten_row", 8), "tightened slopes negative": other("tighten_row", -1),
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
    name = str(rng.choice(sorted(k for k, v in arrays.items() if v.size)))
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
        kinds = (lambda: random_certificate(int(rng.integers(0, SEEDS))), good,
                 lambda: tightened_certificate(int(rng.integers(0, 40))))  # fmt: skip
        c = corrupted(kinds[i % 3](), rng)
        result = check(c)
        assert bool(result.problems) == (result.claims == ())
        if result.problems:
            outcome["refused"] += 1
        else:
            outcome["proven" if result.accepted else "open"] += 1
            assert untrue(c, i) == [], i
    assert min(outcome.values()) > 50
