"""Holding on one side what jumps: no counterexample is lost, and tight caps of gradients are proved at once."""

import math
from dataclasses import replace

import pytest
import torch
from tests.verification.claims import F64, counterexamples, grid, net, square
from torch import Tensor

from soundly.bounds.batch import Bounder
from soundly.certificate.format import Certificate
from soundly.certificate.verification import replay
from soundly.spec.claim import Claim, within
from soundly.verification.forest import LEAF, NEURON
from soundly.verification.input_split import InputSplit
from soundly.verification.problem import Problem, problem_of
from soundly.verification.proof import certificate


def jumping(seed: int, share: float, inputs: int = 2) -> tuple[Claim, float]:
    """That an entry of a gradient stays below a cap, `share` of its range above its largest value on a grid."""
    gradient = net(seed, inputs=inputs, outputs=1, width=10).gradient(of=0)
    network, region = gradient.with_outputs(gradient.entry(0)), square(inputs)
    y = torch.vmap(network.to(F64))(grid(region, 201 if inputs == 2 else 31)[:, None]).reshape(-1)
    cap = float(y.max() + share * (y.max() - y.min()))
    return within(network, region, None, cap), cap


def astray(search: InputSplit, problem: Problem, x: Tensor) -> int:
    """How many counterexamples lie in no part that waits, given its box and the sides on which it holds entries."""
    bad = counterexamples(problem, x)[:, 0]
    v, kept = torch.cat(problem.program.evaluate(x), -1), torch.zeros_like(bad)
    parts = search.waiting
    for k in range(len(parts)):
        inside = ((x >= parts.lower[k] - 1e-9) & (x <= parts.upper[k] + 1e-9)).all(-1)
        for neuron, sign, end in zip(parts.neuron[k].tolist(), parts.sign[k], parts.end[k], strict=True):
            if neuron >= 0:
                inside &= sign * (v[:, neuron] - end) >= -1e-9
        kept |= inside
    return int((bad & ~kept).sum())


def roaming(kind: type[InputSplit], seed: int) -> int:
    """How many counterexamples get lost in some steps."""
    claim, _ = jumping(seed, -0.3)
    problem = problem_of(claim)
    x = grid(claim.region, 101)
    assert counterexamples(problem, x).any()
    search = kind(problem, Bounder(problem.program))
    lost_, deep = 0, 0
    for _ in range(12):
        if len(search):
            search.step(64)
        if not len(search):
            return int(counterexamples(problem, x).sum())
        lost_ = max(lost_, astray(search, problem, x))
        deep = max(deep, search.waiting.neuron.shape[1])
    assert deep > 0
    return lost_


class SidesExchanged(InputSplit):
    def _held(self, parts, candidate):
        children = super()._held(parts, candidate)
        return replace(children, sign=children.sign.clone().index_fill_(1, torch.tensor(-1), 1.0))


class OneSideOnly(InputSplit):
    def _held(self, parts, candidate):
        return super()._held(parts, candidate).pick(slice(1, None, 2))


class CutTheOtherWay(InputSplit):
    def _held(self, parts, candidate):
        children = super()._held(parts, candidate)
        pairs = torch.arange(len(children)).reshape(-1, 2).flip(1).reshape(-1)
        return replace(children, lower=children.lower[pairs], upper=children.upper[pairs])


@pytest.mark.parametrize("seed", range(4))
def test_no_counterexample_is_lost_where_entries_are_held(seed):
    assert roaming(InputSplit, seed) == 0


@pytest.mark.parametrize("wrong", [SidesExchanged, OneSideOnly, CutTheOtherWay])
def test_wrong_sides_are_caught(wrong):
    assert sum(roaming(wrong, seed) for seed in range(4)) > 0


@pytest.mark.parametrize(("seed", "inputs"), [(0, 2), (1, 2), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_tight_caps_of_gradients_are_proved_at_once(seed, inputs):
    """Boxes around crossings of kinks are finished, and the checker agrees without reopening a leaf."""
    claim, cap = jumping(seed, 0.001, inputs)
    problem = problem_of(claim)
    search = InputSplit(problem, Bounder(problem.program), margin=1e-9)
    worst = -math.inf
    while len(search):
        points = search.step(64)
        assert search.subproblems < 20000 and not search.stuck
        if len(points):
            worst = max(worst, float(torch.vmap(claim.network.to(F64))(points[:, None]).max()))
        if worst > cap:  # a piece that the grid has missed
            return
    proof = certificate(problem, [search.grown([0])], claim=claim.name, model={})
    result = replay(proof)
    assert bool(result.proven.all()) and not result.failed
    kind = proof.arrays["kind"]
    if (kind == NEURON).any():
        # Which entry, where, and that both sides are there: none of it can be changed.
        first = int((kind == NEURON).nonzero()[0][0])
        for name, value in (("what", proof.arrays["what"][first] + 1), ("at", 1e3), ("kind", LEAF)):
            array = proof.arrays[name].copy()
            array[first] = value
            other = Certificate(dict(proof.header), {**proof.arrays, name: array})
            after = replay(other)
            assert after.problems or not after.proven.all()
