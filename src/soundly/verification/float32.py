"""What float32 adds to the slack of a problem: the search asks the checker, whose answer counts in the end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from soundly.certificate.float32 import row_errors
from soundly.certificate.reading import read
from soundly.verification.forest import Forest
from soundly.verification.problem import Problem
from soundly.verification.proof import Grown, certificate

ROOM = 1e-9
"""Slack is a little larger here than there."""


def with_float32(problem: Problem, deadline: float) -> Problem:
    """The problem with as much more slack as float32 may take from its rows; infinite where there is no bound."""
    forest = Forest()
    trees = [forest.plant(case, 0, int(b - a)) for case, (a, b) in enumerate(problem.spans.tolist())]
    empty = np.empty(0, np.int64)
    grown = Grown(forest, range(len(trees)), empty, np.empty((0, 0), np.float32), {}, {}, {}, {})
    proof = read(certificate(problem, [grown], claim="", model={}))
    at_once = max(1, 2**20 // int(proof.program.offsets[-1]))
    with np.errstate(all="ignore"):
        errors = torch.from_numpy(row_errors(proof, at_once=at_once, deadline=deadline))
    order = torch.cat([torch.arange(first, last) for first, last in problem.row_spans.tolist()])
    most = torch.zeros_like(problem.slack).scatter_reduce(0, order, errors, "amax")
    return replace(problem, slack=(problem.slack + most) * (1 + ROOM), stated=problem.slack)
