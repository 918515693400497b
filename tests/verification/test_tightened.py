"""Intervals of possible counterexamples: none escapes them, the checker proves them, and they spare splits."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tests.bounds.samples import made
from tests.verification.claims import CLAIMS, F64, WrongHalf, WrongSign, begun, counterexamples, grid, square
from torch import Tensor, nn

from soundly.bounds.conditional import multiplier, tighten
from soundly.certificate.verification import replay
from soundly.spec.claim import Claim, within
from soundly.verification import neuron_split
from soundly.verification.neuron_split import NeuronSplit
from soundly.verification.proof import certificate


def escaped(search: NeuronSplit, x: Tensor) -> tuple[float, int]:
    """How far values at counterexamples lie outside the intervals of the parts that hold them; how many counterexamples
    are in no part that is left."""
    problem = search.problem
    steps = problem.program.evaluate(x)
    neurons, bad = torch.cat(steps, -1), counterexamples(problem, x)
    held, worst = torch.zeros_like(bad), 0.0
    for parts in (search.waiting, *search.stuck):
        for k in range(len(parts)):
            chosen = parts.neuron[k] >= 0
            at, sign = parts.at[k][chosen].double(), parts.sign[k][chosen].double()
            clause = search.forest.first[int(parts.tree[k])]
            inside = bad[:, clause] & (sign * (neurons[:, parts.neuron[k][chosen]] - at) >= 0).all(-1)
            held[inside, clause] = True
            v = torch.cat([steps[i][inside][:, entry] for i, entry in search.loose.items()], 1)
            low, high = search.low[parts.ends[k]], search.high[parts.ends[k]]
            worst = max([worst, *(low - v).amax(1).tolist(), *(v - high).amax(1).tolist()])
    return worst, int((bad & ~held).sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CLAIMS)
def test_tightened_intervals_hold_all_counterexamples(name, dtype):
    claim = CLAIMS[name]()
    search = begun(claim, dtype)
    box = claim.region
    x = grid(box, 41 if box.shape[1] == 2 else 13 if box.shape[1] == 3 else 7)
    if len(search.waiting):
        search.squeeze(10)
    for _ in range(4):
        outside, missing = escaped(search, x)
        assert outside <= (1e-9 if dtype == F64 else 1e-4) and missing == 0
        if len(search.waiting):
            search.step(16, 5)


class Turned(NeuronSplit):
    """Believes that counterexamples are above their slack."""

    def _tightened(self, parts, turn):
        def turned(bounder, frame, row, slopes, splits, wanted):
            last = len(bounder.steps) - 1
            return tighten(
                bounder, frame, row, slopes, splits | {last: replace(splits[last], sign=-splits[last].sign)}, wanted
            )

        with patch.object(neuron_split, "tighten", turned):
            return super()._tightened(parts, turn)


class Narrowed(NeuronSplit):
    """Has tightened intervals end a little too early."""

    def _tightened(self, parts, turn):
        found = super()._tightened(parts, turn)
        self.low[found.ends] += 0.2 * (self.high[found.ends] - self.low[found.ends])
        return found


@pytest.mark.parametrize("wrong", [Turned, Narrowed, WrongSign, WrongHalf])
def test_faults_of_tightened_intervals_are_caught(wrong):
    seen = False
    for name in ("relu, false", "gradient", "mlp"):
        claim = CLAIMS[name]()
        search = begun(claim, F64, wrong)
        if len(search.waiting):
            search.squeeze(10)
        for _ in range(3):
            if len(search.waiting):
                search.step(16, 5)
        n = claim.region.shape[1]
        outside, missing = escaped(search, grid(claim.region, 41 if n == 2 else 7))
        seen |= outside > 1e-3 or missing > 0
    assert seen


def narrow_claim(seed: int) -> Claim:
    """One hidden layer on six inputs, its first output at least as large as at the worst of many samples, less a
    little."""
    network = made(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1)), 6, seed=seed).to(F64)
    box = square(6)
    x = torch.cat([grid(box, 4), box.samples(2000).reshape(-1, 6)])
    return within(network, box, float(torch.stack([network(p[None]) for p in x[:3000]]).min()) - 0.3, None)


def test_tightened_intervals_are_proved_by_the_checker_and_spare_splits():
    fewer = 0
    for seed in range(4):
        claim, sizes = narrow_claim(seed), []
        for squeezing in (False, True):
            search = begun(claim)
            if squeezing and len(search.waiting):
                search.squeeze(10)
            for _ in range(200):
                if len(search.waiting):
                    search.step(16, 10)
            if search.stuck or len(search.waiting):
                sizes.append(10**6)
                continue
            proof = certificate(search.problem, [search.grown(range(len(search.forest.root)))], claim="", model={})
            result = replay(proof)
            assert result.problems == () and result.failed == [] and result.proven.all()
            assert not squeezing or sizes[0] == 1 or len(proof.arrays["tighten_key"]) > 0
            sizes.append(len(proof.arrays["kind"]))
        fewer += sizes[1] < sizes[0]
        assert sizes[1] <= sizes[0]
    assert fewer > 0


def test_a_squeezed_search_goes_on_where_a_journal_left_it():
    claim = next(c for c in map(narrow_claim, range(9)) if len(begun(c).waiting))
    search, other = begun(claim), begun(claim)
    search.squeeze(3)
    if len(search.waiting):
        search.step(4, 3)
    other.restore({k: np.array(v) for k, v in search.state().items()})
    for one in (search, other):
        for _ in range(100):
            if len(one.waiting):
                one.step(16, 10)
    assert other.squeezing and other.forest.size == search.forest.size
    proofs = [certificate(s.problem, [s.grown([0])], claim="", model={}) for s in (search, other)]
    assert all(np.array_equal(proofs[0].arrays[k], proofs[1].arrays[k]) for k in proofs[0].arrays)
    assert replay(proofs[1]).proven.all() and len(proofs[1].arrays["tighten_key"]) > 0


def test_the_best_multiplier_of_one_constraint():
    source = torch.Generator().manual_seed(0)
    w, a, low = (torch.randn(50, 6, generator=source, dtype=F64) for _ in range(3))
    high, d = low + 1, torch.randn(50, generator=source, dtype=F64) - (a * (low + 0.5)).sum(1)
    found, size = multiplier(w, a, d, low, high)

    def least(g: Tensor) -> Tensor:
        c = w + g[..., None] * a
        return g * d + (c.clamp(min=0) * low + c.clamp(max=0) * high).sum(-1)

    feasible = d + (a.clamp(min=0) * low + a.clamp(max=0) * high).sum(1) <= 0
    tried = torch.cat([torch.linspace(0, 20, 2001, dtype=F64)[:, None].expand(-1, 50), found[None]])
    assert bool((least(tried) <= least(found) + 1e-9)[:, feasible].all()) and int(feasible.sum()) > 30
    assert bool((found >= 0).all() and (size > 0).all()) and int((found > 0).sum()) > 10
