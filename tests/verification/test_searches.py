"""The searches: parts cover the region, what is called proved is true, and no counterexample is ever clipped away."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tests.bounds.samples import made, mlp
from torch import Tensor, nn

from soundly.bounds.batch import Bounder
from soundly.bounds.conditional import multiplier, tighten, with_rows
from soundly.certificate.format import Certificate
from soundly.certificate.verification import replay
from soundly.graph import elementwise as ew
from soundly.graph.linear import Combine
from soundly.graph.network import Network
from soundly.graph.node import Input
from soundly.spec.claim import Claim, Property, Row, within
from soundly.spec.region import Box, Union
from soundly.verification import neuron_split
from soundly.verification.forest import BOUND, INPUT, LEAF, NEURON, Forest
from soundly.verification.input_split import InputSplit, Parts
from soundly.verification.neuron_split import NeuronSplit
from soundly.verification.problem import Problem, problem_of
from soundly.verification.proof import certificate

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
            terms = ({i: _fraction(c) for i, c in enumerate(side)} for side in (w, v))
            rows.append(Row(*terms, _fraction(-level)))
        clauses.append(rows)
    return Claim(network, region, Property.of(clauses, outputs=y.shape[1], inputs=x.shape[1]))


def _fraction(value: float) -> Fraction:
    return Fraction(round(float(value) * 2**16), 2**16)


def counterexamples(problem: Problem, x: Tensor) -> Tensor:
    """Which clauses [m, clauses] are true at points."""
    return problem.rows.worst(values(problem, x)) <= 0


# -- splitting inputs


def lost(search: InputSplit, problem: Problem, x: Tensor, tolerance: float = 1e-9) -> int:
    """How many counterexamples lie in no part that still waits with their clause open. Clipped ends are rounded."""
    bad = counterexamples(problem, x)
    kept = torch.zeros_like(bad)
    for part in search.stack:
        for low, high, open_ in zip(part.lower, part.upper, part.open, strict=True):
            inside = ((x >= low - tolerance) & (x <= high + tolerance)).all(-1)
            kept |= inside[:, None] & open_
    return int((bad & ~kept).sum())


FALSE = {
    "few": lambda: conjunctive(net(0), square(2), 0.02, 0),
    "many": lambda: conjunctive(net(1), square(2), 0.4, 1),
    "tanh": lambda: conjunctive(net(2, activation=nn.Tanh), square(2), 0.05, 2),
    "three inputs": lambda: conjunctive(net(3, inputs=3), square(3), 0.01, 3),
    "output": lambda: within(net(4), square(2), None, -1.3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FALSE)
def test_no_counterexample_is_clipped_away(name, dtype):
    claim = FALSE[name]()
    problem = problem_of(claim)
    x = grid(claim.region, 61 if problem.program.inputs == 2 else 17)
    assert counterexamples(problem, x).any()
    search = InputSplit(problem, Bounder(problem.program.to(dtype)))
    volume = [1.0]
    for _ in range(12):
        search.step(64)
        assert lost(search, problem, x, 1e-9 if dtype == F64 else 1e-5) == 0
        volume.append(search.open_share)
    assert volume[-1] < 0.95 and all(0 < v <= 1 + 1e-12 for v in volume)


class WrongSide(InputSplit):
    def _clipped(self, now, still, owner, place, reach, a):
        return super()._clipped(now, still, owner, place, reach, -a)


class TooShort(InputSplit):
    def _clipped(self, now, still, owner, place, reach, a):
        return super()._clipped(now, still, owner, place, 0.8 * reach, a)


class AnyClause(InputSplit):
    """Clips with the rows of all clauses together, as if they were one."""

    def _clipped(self, now, still, owner, place, reach, a):
        many = still.shape[1]
        clipped, low, high = super()._clipped(now, still, owner, owner * many, reach, a)
        return clipped[:, :1].expand_as(still) & still, low, high


@pytest.mark.parametrize("wrong", [WrongSide, TooShort, AnyClause])
def test_wrong_clips_are_caught(wrong):
    missing = 0
    for make in (FALSE["few"], FALSE["many"], FALSE["tanh"]):
        claim = make()
        problem = problem_of(claim)
        x = grid(claim.region, 61)
        search = wrong(problem, Bounder(problem.program))
        for _ in range(8):
            if len(search):
                search.step(64)
        missing += lost(search, problem, x)
    assert missing > 0


def true_claim(seed: int, activation: type[nn.Module] = nn.ReLU, inputs: int = 2) -> Claim:
    """Conjunctive clauses without a counterexample: rows of a grid's counterexamples moved beyond its least."""
    network = net(seed, inputs=inputs, activation=activation)
    claim = conjunctive(network, square(inputs), 0.2, seed)
    problem = problem_of(claim)
    x = grid(claim.region, 41 if inputs == 2 else 15)
    rows = values(problem, x)
    worst = problem.rows.worst(rows).amin(0)
    shift = [_fraction(0.05 - float(worst[int(c)])) for c in claim.property.clause]
    exact = claim.property.exact
    assert exact is not None
    clauses = [
        [replace(r, b=r.b + s) for r, s, c in zip(exact, shift, claim.property.clause, strict=True) if int(c) == k]
        for k in range(claim.property.clauses)
    ]
    prop = Property.of(clauses, outputs=claim.property.outputs, inputs=claim.property.inputs)
    return Claim(network, claim.region, prop)


def located(forest: Forest, root: int, x: Tensor) -> np.ndarray:
    """The leaf of each point [m, n], by descending the splits of inputs."""
    node = np.full(len(x), root)
    points = x.numpy()
    while True:
        inner = forest.kind[node] != LEAF
        if not inner.any():
            return node
        assert (forest.kind[node[inner]] == INPUT).all()
        where = points[inner, forest.what[node[inner]]] > forest.at[node[inner]]
        node[inner] = forest.left[node[inner]] + where


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("seed", range(3))
def test_finished_input_splits_cover_and_are_true(seed, activation):
    claim = true_claim(seed, activation)
    problem = problem_of(claim)
    search = InputSplit(problem, Bounder(problem.program))
    for _ in range(200):
        if not len(search):
            break
        search.step(64)
    assert not len(search) and search.open_share == 0 and not search.stuck
    x = grid(claim.region, 61)
    leaf = located(search.forest, search.forest.root[0], x)
    proved = torch.cat([p.node for p in search.proved]).tolist()
    assert set(leaf.tolist()) <= set(proved) and len(set(proved)) == len(proved)
    assert all(search.forest.flags[n] & BOUND for n in proved)
    # Every leaf's statement: in its box each clause that is open there has a positive row.
    rows = values(problem, x)
    seen = 0
    for part in search.proved:
        for low, high, open_ in zip(part.lower, part.upper, part.open, strict=True):
            inside = ((x >= low) & (x <= high)).all(-1)
            seen += int(inside.sum())
            assert bool((problem.rows.worst(rows[inside])[:, open_] > 0).all())
    assert seen > 100
    assert len(proved) > 1
    order = search.forest.order(0)
    assert len(order) == 2 * len(proved) - 1  # a full binary tree


def test_cases_are_searched_side_by_side():
    """A union with clauses of its own for each box: every box has a tree of just its clauses."""
    network = net(0)
    low = torch.tensor([[[-1.0, -1.0]], [[0.0, 0.0]], [[0.5, -1.0]]])
    y = {0: _fraction(1.0)}
    clauses = [[Row(y, {}, _fraction(b))] for b in (10, 12, -10, 9)]
    region = Union(low, low + 0.5)
    spans = torch.tensor([[0, 2], [2, 3], [3, 4]])
    claim = Claim(network, region, Property.of(clauses, outputs=3, inputs=2), spans=spans)
    problem = problem_of(claim)
    search = InputSplit(problem, Bounder(problem.program))
    assert len(search.forest.root) == 3 and list(zip(search.forest.first, search.forest.last, strict=True)) == [
        (0, 2), (0, 1), (0, 1)
    ]  # fmt: skip
    search.step(8)
    assert set(search.waiting.case.tolist()) == {1}  # y_0 <= 10 is refuted everywhere in box 1, and there alone
    assert [p.case.tolist() for p in search.proved] == [[0, 2]]
    first = search.waiting
    assert bool((first.lower >= 0.0).all() and (first.upper <= 0.5).all())


def test_a_box_too_small_to_split_is_told():
    network = net(0)
    low = torch.ones(1, 2, dtype=F64)
    tiny = Box(low, torch.nextafter(low, 2 * low))
    problem = problem_of(within(network, tiny, None, float(network(low.float()).min()) - 1.0))
    search = InputSplit(problem, Bounder(problem.program))
    search.step(8)
    assert search.stuck


def test_reopened_leaves_are_split_again():
    claim = true_claim(1)
    problem = problem_of(claim)
    search = InputSplit(problem, Bounder(problem.program))
    while len(search):
        search.step(64)
    proved = Parts.join(search.proved).pick(slice(3))
    boxes = [(low - 0.01, high) for low, high in zip(proved.lower.numpy(), proved.upper.numpy(), strict=True)]
    open_ = np.ones(proved.open.shape[1], bool)
    count = search.forest.size
    search.reopen({node: (*box, open_) for node, box in zip(proved.node.tolist(), boxes, strict=True)})
    assert len(search) == 6 and search.forest.size == count + 6
    now = search.waiting  # what the checker was left with, halved
    assert bool(now.open.all()) and torch.equal(now.lower[::2].sort(0)[0], (proved.lower - 0.01).sort(0)[0])
    while len(search):
        search.step(64)
    leaf = located(search.forest, search.forest.root[0], grid(claim.region, 31))
    assert set(leaf.tolist()) <= set(torch.cat([p.node for p in search.proved]).tolist())


# -- holding what jumps on one side


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


# -- splitting neurons


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


CLAIMS = {
    "relu": lambda: true_claim(0, inputs=3),
    "relu, false": lambda: conjunctive(net(1), square(2), 0.1, 1),
    "tanh": lambda: true_claim(2, nn.Tanh),
    "leaky": lambda: true_claim(3, nn.LeakyReLU),
    "gradient": lambda: within(net(4).gradient(of=0), square(2), None, 0.5),
    "mlp": lambda: within(mlp(), square(4), -2.0, 2.0),
}


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


class WrongSign(NeuronSplit):
    """Adds the constraints' multipliers with the wrong sign."""

    def _frame(self, parts):
        frame, splits = super()._frame(parts)
        return frame, {i: replace(s, sign=-s.sign) for i, s in splits.items()}


class WrongHalf(NeuronSplit):
    """Clamps a neuron to the half that it was not assigned."""

    def _frame(self, parts):
        return super()._frame(replace(parts, sign=-parts.sign))


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


# -- intervals of possible counterexamples


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
