"""What bounds of a whole region say, before anything is claimed: rows as low as they may be, and then their proof.

A search asks whether a claim holds. Here the claim is made from the bounds, so that they prove it at once: a
certificate of trees that are roots alone, accepted by the checker like any other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soundly.bounds.absolute import Summed, summed
from soundly.bounds.batch import Bounder
from soundly.bounds.frame import Frame, Side, Start
from soundly.bounds.optimise import Refined, first, raised, refine
from soundly.certificate.verification import replay
from soundly.spec.claim import Claim
from soundly.verification.neuron_split import NeuronSplit
from soundly.verification.problem import Problem, problem_of
from soundly.verification.proof import certificate
from soundly.verification.verdict import Effort, Proved

ROUNDS, JOINTLY = 20, 6
"""How often the slopes of each bound are improved, and those around absolute values that are bounded together."""
REFINING, TOGETHER, WORK = 20, 3, 2e11
"""Rounds of improving the slopes behind inner intervals, each bound's own or all of a step's together, and up to how
many products that may take."""
SMALL = 2**16
"""Programs of at most so many products are searched in float64."""


@dataclass(frozen=True, eq=False)
class Root:
    """Lower bounds of rows on a box, and what gave them.

    Attributes:
        bound: [rows], float64.
        jointly: whether absolute values were bounded together.
        slopes: the free slopes [rows, n].
    """

    bounder: Bounder
    frame: Frame
    refined: dict[int, Refined]
    slopes: dict[Side, Tensor]
    bound: Tensor
    jointly: bool


def root(problem: Problem, *, sums: bool = True) -> Root:
    """Bounds of the rows of a problem, one to a clause, by optimised linear bounds.

    Args:
        problem: with one box.
        sums: whether absolute values may be bounded together.
    """
    with torch.no_grad():
        bounder = Bounder(problem.program.to(torch.float32))
        if bounder.cost <= SMALL:
            bounder = Bounder(problem.program)
        frame = bounder.refresh(*(v[:1].to(bounder.dtype) for v in (problem.lower, problem.upper)))
        joint = _summed(bounder, frame, problem) if sums else None
        if joint is not None:
            slopes = {key: v.expand(len(joint.bound), -1) for key, v in first(bounder, frame).items()}
            return Root(bounder, frame, joint.refined, slopes, joint.bound, True)
        loose = sum(int(bounder.loose(i, frame).sum()) for i in range(len(bounder.steps)) if bounder.read[i])
        refined: dict[int, Refined] = {}
        if 8 * REFINING * loose * bounder.cost < WORK:
            refined = refine(bounder, frame, rounds=REFINING)
        elif 8 * TOGETHER * loose * bounder.cost < WORK:
            refined = refine(bounder, frame, rounds=TOGETHER, together=True)
        slopes, bounds = first(bounder, frame), [torch.empty(0, dtype=bounder.dtype)]
        chosen = {key: [v[:0]] for key, v in slopes.items()}
        for part in bounder.portions(len(problem.rows)):
            start = _start(bounder, problem, part)
            many = {key: v.expand(len(start.d), -1) for key, v in slopes.items()}
            found = raised(bounder, frame, start, many, rounds=ROUNDS, goal=torch.full_like(start.d, math.inf))
            bounds.append(found.bound)
            for key, v in found.slopes.items():
                chosen[key].append(v)
        return Root(bounder, frame, refined, {k: torch.cat(v) for k, v in chosen.items()},
                    torch.cat(bounds).double(), False)  # fmt: skip


def _start(bounder: Bounder, problem: Problem, part: slice) -> Start:
    rows = problem.rows
    a = {len(bounder.steps) - 1: rows.y[part].to(bounder.dtype)}
    return Start(a, rows.constant[part].to(bounder.dtype))


def _summed(bounder: Bounder, frame: Frame, problem: Problem) -> Summed | None:
    """None unless that is better for all rows than bounding absolute values one by one."""
    start = _start(bounder, problem, slice(None))
    joint = summed(bounder, frame, start, rounds=JOINTLY)
    if joint is None:
        return None
    alone = bounder.backward(frame, bounder.lines(frame), start).least(frame.lower[0], frame.upper[0])
    return joint if bool((joint.bound > alone).all()) else None


def proved(
    claim: Claim, root: Root, rows: Sequence[int] | None = None, *, timeout: float | None = None
) -> Proved | None:
    """The proof of a claim by a root's bounds; None if the checker does not accept it.

    Args:
        claim: whose rows are those of the root's problem, up to their constants and a common factor above 0.
        rows: which of them these are; all if None.
        timeout: seconds for the checker.
    """
    begun = time.monotonic()
    problem = problem_of(claim)
    count = len(problem.rows)
    chosen = torch.arange(count) if rows is None else torch.tensor(rows)
    search = NeuronSplit(problem, root.bounder, 0, root.frame, range(count), margin=0.0, refined=root.refined)
    search.grant({key: v[chosen] for key, v in root.slopes.items()}, jointly=root.jointly)
    proof = certificate(problem, [search.grown(range(count))], claim=claim.name, model={})
    try:
        result = replay(proof, deadline=None if timeout is None else begun + timeout)
    except TimeoutError:
        return None
    if result.problems or not len(result.proven) or not bool(result.proven.all()):
        return None
    return Proved(proof, Effort(time.monotonic() - begun, count, "root bound"))
