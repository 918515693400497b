"""Splitting neurons: parts cover the region, their bounds hold, and the checker accepts what was proved."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from tests.verification.claims import CLAIMS, F64, WrongHalf, WrongSign, begun, grid, net, square, true_claim, values
from torch import Tensor

from soundly.bounds.batch import Bounder
from soundly.certificate.verification import replay
from soundly.graph import elementwise as ew
from soundly.graph.linear import Combine
from soundly.graph.network import Network
from soundly.graph.node import Input
from soundly.spec.claim import Claim, Property, Row, within
from soundly.spec.region import Box
from soundly.verification import neuron_split
from soundly.verification.forest import BOUND, LEAF, NEURON
from soundly.verification.neuron_split import NeuronSplit
from soundly.verification.problem import problem_of
from soundly.verification.proof import certificate


def everything(search: NeuronSplit) -> list[tuple[str, neuron_split.Parts]]:
    groups = [("proved", p) for p in search.proved] + [("stuck", p) for p in search.stuck]
    return [*groups, ("waiting", search.waiting)]


def untrue(search: NeuronSplit, x: Tensor) -> tuple[float, int]:
    """By how much rows at points fall below the bounds of the parts that hold them; how many points are in no part."""
    problem = search.problem
    steps = problem.program.evaluate(x)
    neurons, rows = torch.cat(steps, -1), values(problem, x)
    held = torch.zeros(len(x), len(search.forest.root), dtype=torch.bool)
    worst = -math.inf
    for kind, parts in everything(search):
        for k in range(len(parts)):
            chosen = parts.neuron[k] >= 0
            at, sign = parts.at[k][chosen].double(), parts.sign[k][chosen].double()
            beyond = sign * (neurons[:, parts.neuron[k][chosen]] - at)
            inside = ((beyond > 0) | ((beyond == 0) & (sign < 0))).all(
                -1
            )  # steps take their left value where they jump
            tree = int(parts.tree[k])
            held[inside, tree] = True
            bound = float(parts.bound[k])
            if kind == "proved":
                assert bound > 0
            if bool(inside.any()):
                worst = max(worst, bound - float(rows[inside, search.rows[tree]].min()))
    return worst, int((~held).sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CLAIMS)
def test_neuron_splits_cover_and_their_bounds_hold(name, dtype):
    claim = CLAIMS[name]()
    search = begun(claim, dtype)
    box = claim.region
    x = grid(box, 41 if box.shape[1] == 2 else 13 if box.shape[1] == 3 else 7)
    tolerance = 1e-9 if dtype == F64 else 1e-4
    for _ in range(10):
        worst, uncovered = untrue(search, x)
        assert worst <= tolerance and uncovered == 0
        if not len(search.waiting):
            break
        search.step(16, 5)
    assert search.subproblems > 0


@pytest.mark.parametrize("seed", range(3))
def test_a_search_for_a_true_claim_ends(seed):
    """ReLU networks have finitely many parts, so splitting all neurons must decide."""
    claim = true_claim(seed)
    problem = problem_of(claim)
    single = [c for c in range(claim.property.clauses) if int((claim.property.clause == c).sum()) == 1]
    bounder = Bounder(problem.program)
    root = bounder.refresh(problem.lower, problem.upper)
    search = NeuronSplit(problem, bounder, 0, root, single, margin=1e-5)
    search.begin(10)
    for _ in range(60):
        if not len(search.waiting):
            break
        search.step(32, 20)
    assert not len(search.waiting) and not search.stuck
    for tree, clause in enumerate(single):
        nodes = search.forest.order(tree)
        leaves = nodes[search.forest.kind[nodes] == LEAF]
        assert (search.forest.kind[nodes[search.forest.kind[nodes] != LEAF]] == NEURON).all()
        proved = set(torch.cat([p.node for p in search.proved]).tolist())
        assert set(leaves.tolist()) <= proved and all(search.forest.flags[n] & BOUND for n in leaves)
        assert (search.forest.first[tree], search.forest.last[tree]) == (tree, tree + 1) or clause != tree


@pytest.mark.parametrize("batches", [(32,), (1,), (3, 1, 2, 5)], ids=str)
def test_the_checker_accepts_what_a_search_proved_in_any_order(batches):
    """Batches smaller than what waits mix parts of all depths; a fast machine seldom makes such."""
    network, region = net(1, inputs=3), square(3)
    least = torch.cat([network(x.reshape(1, -1)) for x in grid(region, 15).float()]).amin(0)
    search = begun(within(network, region, least - 0.02, None))
    for batch in itertools.islice(itertools.cycle(batches), 1000):
        if len(search.waiting):
            search.step(batch, 5)
    assert not len(search.waiting) and not search.stuck
    proof = certificate(search.problem, [search.grown(range(len(search.forest.root)))], claim="", model={})
    result = replay(proof)
    assert result.problems == () and result.failed == [] and result.proven.all()
    depths = {int(n) for p in search.proved for n in (p.neuron >= 0).sum(1)}
    assert len(depths) > 3


def test_a_jump_at_the_end_of_an_interval_keeps_both_sides_until_it_is_split():
    """step(2 a) + step(2 b) > 1/2 fails at a = 0, b <= 0, where a's interval begins; to split b tells nothing of a."""
    x = Input("x", (1, 2))()
    network = Network((x,), (ew.STEP(Combine((2.0,))(x)),), {}, like=torch.empty(0, dtype=F64))
    region = Box(torch.tensor([[0.0, -1.0]]), torch.tensor([[1.0, 1.0]]))
    row = Row({0: Fraction(1), 1: Fraction(1)}, {}, Fraction(-1, 2))
    search = begun(Claim(network, region, Property.of([[row]], outputs=2, inputs=2)))
    for _ in range(4):
        worst, uncovered = untrue(search, grid(region, 21))
        assert worst <= 1e-9 and uncovered == 0
        if len(search.waiting):
            search.step(4, 5)
    assert search.subproblems > 1


class OneChild(NeuronSplit):
    """Forgets the right child of every split."""

    def _keep(self, parts):
        super()._keep(parts.pick(slice(0, None, 2)) if parts.neuron.shape[1] > 0 else parts)


@pytest.mark.parametrize("wrong", [WrongSign, WrongHalf, OneChild])
def test_faults_of_neuron_splits_are_caught(wrong):
    seen = False
    for name in ("relu", "relu, false", "leaky"):
        claim = CLAIMS[name]()
        search = begun(claim, F64, wrong)
        x = grid(claim.region, 41 if claim.region.shape[1] == 2 else 13)
        for _ in range(4):
            if len(search.waiting):
                search.step(16, 5)
        worst, uncovered = untrue(search, x)
        seen |= worst > 1e-3 or uncovered > 0
    assert seen
