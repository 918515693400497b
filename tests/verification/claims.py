"""Small networks, claims about them that hold or fail, dense grids of points, and a search to begin with."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch
from tests.bounds.samples import made, mlp
from torch import Tensor, nn

from soundly.bounds.batch import Bounder
from soundly.bounds.conditional import with_rows
from soundly.spec.claim import Claim, Property, Row, within
from soundly.spec.region import Box
from soundly.verification.neuron_split import NeuronSplit
from soundly.verification.problem import Problem, problem_of

F64 = torch.float64


def net(seed: int, inputs: int = 2, outputs: int = 3, width: int = 8, activation: type[nn.Module] = nn.ReLU):
    layers = [nn.Linear(inputs, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, outputs)]
    return made(nn.Sequential(*layers), inputs, seed=seed)


def square(n: int, half: float = 1.0) -> Box:
    return Box(torch.full((1, n), -half), torch.full((1, n), half))


def grid(box: Box, steps: int = 41) -> Tensor:
    """A dense grid [m, n] of a flat box, corners included."""
    axes = [
        torch.linspace(float(a), float(b), steps, dtype=F64) for a, b in zip(box.lower[0], box.upper[0], strict=True)
    ]
    return torch.cartesian_prod(*axes).reshape(-1, len(axes))


def values(problem: Problem, x: Tensor) -> Tensor:
    """The rows [m, R] at points."""
    return problem.rows.at(problem.program.evaluate(x)[-1], x)


def conjunctive(network, region: Box, share: float, seed: int) -> Claim:
    """Three clauses of one to three rows, on outputs and inputs; about `share` of the region violates some clause."""
    source = np.random.default_rng(seed)
    x = grid(region, 15)
    y = torch.cat([network.to(F64)(p.reshape(1, -1)) for p in x])
    clauses = []
    for k in range(3):
        rows = []
        for _ in range(k + 1):
            w, v = source.normal(size=y.shape[1]), source.normal(size=x.shape[1]) * 0.3
            s = y @ torch.tensor(w) + x @ torch.tensor(v)
            level = float(s.quantile(share ** (1 / (k + 1))))
            terms = ({i: fraction(c) for i, c in enumerate(side)} for side in (w, v))
            rows.append(Row(*terms, fraction(-level)))
        clauses.append(rows)
    return Claim(network, region, Property.of(clauses, outputs=y.shape[1], inputs=x.shape[1]))


def fraction(value: float) -> Fraction:
    return Fraction(round(float(value) * 2**16), 2**16)


def counterexamples(problem: Problem, x: Tensor) -> Tensor:
    """Which clauses [m, clauses] are true at points."""
    return problem.rows.worst(values(problem, x)) <= 0


def true_claim(seed: int, activation: type[nn.Module] = nn.ReLU, inputs: int = 2) -> Claim:
    """Conjunctive clauses without a counterexample: rows of a grid's counterexamples moved beyond its least."""
    network = net(seed, inputs=inputs, activation=activation)
    claim = conjunctive(network, square(inputs), 0.2, seed)
    problem = problem_of(claim)
    x = grid(claim.region, 41 if inputs == 2 else 15)
    rows = values(problem, x)
    worst = problem.rows.worst(rows).amin(0)
    shift = [fraction(0.05 - float(worst[int(c)])) for c in claim.property.clause]
    exact = claim.property.exact
    assert exact is not None
    clauses = [
        [replace(r, b=r.b + s) for r, s, c in zip(exact, shift, claim.property.clause, strict=True) if int(c) == k]
        for k in range(claim.property.clauses)
    ]
    prop = Property.of(clauses, outputs=claim.property.outputs, inputs=claim.property.inputs)
    return Claim(network, claim.region, prop)


def begun(claim: Claim, dtype: torch.dtype = F64, kind: type[NeuronSplit] = NeuronSplit) -> NeuronSplit:
    problem = problem_of(claim)
    rows = problem.rows
    bounder = Bounder(
        with_rows(problem.program, rows.y, rows.x if rows.reads_inputs else None, rows.constant).to(dtype)
    )
    root = bounder.refresh(problem.lower.to(dtype), problem.upper.to(dtype))
    search = kind(problem, bounder, 0, root, list(range(claim.property.clauses)), margin=1e-5)
    search.begin(10)
    return search


CLAIMS = {
    "relu": lambda: true_claim(0, inputs=3),
    "relu, false": lambda: conjunctive(net(1), square(2), 0.1, 1),
    "tanh": lambda: true_claim(2, nn.Tanh),
    "leaky": lambda: true_claim(3, nn.LeakyReLU),
    "gradient": lambda: within(net(4).gradient(of=0), square(2), None, 0.5),
    "mlp": lambda: within(mlp(), square(4), -2.0, 2.0),
}


class WrongSign(NeuronSplit):
    """Adds the constraints' multipliers with the wrong sign."""

    def _frame(self, parts):
        frame, splits = super()._frame(parts)
        return frame, {i: replace(s, sign=-s.sign) for i, s in splits.items()}


class WrongHalf(NeuronSplit):
    """Clamps a neuron to the half that it was not assigned."""

    def _frame(self, parts):
        return super()._frame(replace(parts, sign=-parts.sign))
