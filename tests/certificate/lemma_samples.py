"""Small convolutional networks under jumps, certificates with lemmas about them, and what is true of their neurons."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from tests.bounds.test_crop import affine, conv, random

from soundly.bounds.batch import Bounder
from soundly.bounds.conditional import with_rows
from soundly.bounds.program import Affine, Function, Program, Variable
from soundly.certificate import Certificate
from soundly.graph import elementwise as ew
from soundly.verification import lemmas
from soundly.verification.neuron_split import NeuronSplit
from soundly.verification.problem import Problem
from soundly.verification.proof import certificate
from soundly.verification.rows import Rows

F64 = torch.float64
SCORES, PLACES = 5, 24
"""The step that the jump reads, and its entries."""


def network(seed: int) -> Program:
    """Two layers, a score at every place, and a jump."""
    first = conv((2, PLACES), 4, 3, padding=1, seed=seed)
    second = conv(first.narrow, 4, 3, padding=1, seed=seed + 1)
    score = conv(second.narrow, 2, 1, seed=seed + 2)
    return Program((
        Variable(first.size[1]), affine((first, 0), seed=seed), Function(1, ew.RELU, first.size[0]),
        affine((second, 2), seed=seed + 1), Function(3, ew.RELU, second.size[0]), affine((score, 4), seed=seed + 2),
        Function(5, ew.STEP, score.size[0]),
    ))  # fmt: skip


def problem(seed: int, open_: tuple[int, int] = (0, 0), radius: float = 0.3) -> Problem:
    """On two boxes: all but a few of the scores have the sign that they have in the middle."""
    program = network(seed)
    middle = random(2, program.inputs, seed=seed + 3)
    n = program.outputs
    sign = torch.stack([program.evaluate(x)[-1] for x in middle]) * 2 - 1
    # A score of the right sign counts 1, another one 0; so many may count 0.
    constant = (sign < 0).sum(1) - (n - torch.tensor(open_) - 0.5)
    rows = Rows(sign, torch.zeros(2, program.inputs, dtype=F64), constant, torch.arange(2))
    return Problem(program, middle - radius, middle + radius, rows, torch.zeros(2, dtype=F64),
                   torch.tensor([[0, 1], [1, 2]]))  # fmt: skip


def search(made: Problem, case: int, share: float = 1.0) -> NeuronSplit:
    """The root of one case, with lemmas."""
    r = made.rows
    program = with_rows(made.program, r.y[case : case + 1], None, r.constant[case : case + 1])
    bounder = Bounder(program)
    root = bounder.refresh(made.lower[case : case + 1], made.upper[case : case + 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lemmas, "SMALL", share)
        known = lemmas.narrowed(made, bounder, program, root, case)
    found = NeuronSplit(made, bounder, case, known.frame, [0], margin=1e-9, lemmas=known.lemmas)
    found.begin(20)
    return found


def undecided(found: NeuronSplit) -> int:
    low, high = found.root.lower[SCORES], found.root.upper[SCORES]
    return int(((low <= 0) & (high >= 0)).sum())


@cache
def provable(seed: int) -> Problem:
    """As many scores may have the wrong sign as lemmas leave undecided."""
    made = problem(seed)
    return problem(seed, tuple(undecided(search(made, case)) for case in (0, 1)))


@cache
def with_lemmas(seed: int) -> Certificate:
    made = provable(seed)
    return certificate(made, [search(made, case).grown([0]) for case in (0, 1)], claim="", model={})


@cache
def extreme(seed: int, case: int, i: int, entry: int, sign: int) -> float:
    """The least value of sign times an entry of a step before the jump on a case's box: a mixed-integer program."""
    made = problem(seed)
    low, high = made.lower[case].numpy(), made.upper[case].numpy()
    needed = {i: {entry}}
    for j in range(i, 0, -1):
        match made.program.steps[j]:
            case Affine(((part, source),)):
                read = part.apply(torch.eye(part.size[1], dtype=F64)).T[sorted(needed[j])].any(0)
                needed[source] = set(read.nonzero()[:, 0].tolist())
            case Function(source):
                needed[source] = needed[j]
    size, matrices = 0, []
    start, least, most, whole = [], [], [], []
    for step in made.program.steps[: i + 1]:
        start.append(size)
        match step:
            case Variable():
                least.append(low), most.append(high)
            case Affine(((part, source),), bias):
                dense = part.apply(torch.eye(part.size[1], dtype=F64)).T.numpy()
                a, b = least[source], most[source]
                centre, radius = dense @ (a + b) / 2 + bias.numpy(), np.abs(dense) @ (b - a) / 2
                least.append(centre - radius), most.append(centre + radius)
                matrices.append((len(start) - 1, source, dense, bias.numpy()))
            case Function(source):
                least.append(np.maximum(least[source], 0)), most.append(np.maximum(most[source], 0))
                whole.append((len(start) - 1, source))
        size += step.size
    binaries = sum(len(needed[j]) for j, _ in whole)
    lower = np.concatenate([*least, np.zeros(binaries)])
    upper = np.concatenate([*most, np.ones(binaries)])
    rows, below, above = [], [], []

    def add(row: dict[int, float], a: float, b: float) -> None:
        rows.append(row), below.append(a), above.append(b)

    for j, source, dense, bias in matrices:
        for k in needed[j]:
            some = np.flatnonzero(dense[k])
            add({start[j] + k: 1.0, **{start[source] + c: -dense[k, c] for c in some}}, bias[k], bias[k])
    z = size
    for j, source in whole:
        for k in needed[j]:
            y, v, a, b = start[j] + k, start[source] + k, least[source][k], most[source][k]
            add({y: 1.0, v: -1.0}, 0.0, math.inf)
            add({y: 1.0, z: -max(b, 0.0)}, -math.inf, 0.0)
            add({y: 1.0, v: -1.0, z: -min(a, 0.0)}, -math.inf, -min(a, 0.0))
            z += 1
    matrix = np.zeros((len(rows), size + binaries))
    for r, row in enumerate(rows):
        matrix[r, list(row)] = list(row.values())
    cost = np.zeros(size + binaries)
    cost[start[i] + entry] = sign
    kind = np.r_[np.zeros(size), np.ones(binaries)]
    found = milp(cost, constraints=LinearConstraint(matrix, below, above), bounds=Bounds(lower, upper),
                 integrality=kind, options={"mip_rel_gap": 0.0})  # fmt: skip
    assert found.success
    return float(found.fun)
