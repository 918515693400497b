"""Activation patterns against mixed-integer programs that know nothing of soundly, and broken ones that they catch."""

import importlib
from collections import Counter
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

import soundly
from soundly import Box, Empty, Proved, Refuted, Unknown
from soundly.auditing import patterns as module
from soundly.auditing.literals import minimal_pattern
from soundly.auditing.patterns import Measured, Pattern, anyone, decide, mine, never, precision, recall, under
from soundly.errors import InvalidInput
from soundly.spec.claim import Property, Row, top_k
from soundly.verification import verify as search
from soundly.verification.decided import Decided
from soundly.verification.verdict import Effort

checker = importlib.import_module("soundly.certificate.verification")
SEEDS = range(6)
CLASSES = 3


@cache
def model_of(seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    sizes = [3 + seed % 4, 6, 5, CLASSES]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((torch.rand(p.shape, generator=generator) - 0.5) * 2.4)
    return model


@cache
def scene(seed: int) -> tuple[soundly.Network, Tensor, Box, Pattern, Pattern]:
    """A network, a point, a box around it, a pattern mined near it, and one of random signs."""
    generator = torch.Generator().manual_seed(100 + seed)
    n = model_of(seed)[0].in_features
    x = torch.rand(1, n, generator=generator)
    network = soundly.load(model_of(seed), x)
    box = Box((x - 0.4).clamp(min=0).double(), (x + 0.4).clamp(max=1).double())
    near = (x + (torch.rand(9, 1, n, generator=generator) - 0.5) * 0.6).clamp(0, 1)
    mined = mine(network, near, delta=["1", "7/10", "0.6"][seed % 3])
    sign = torch.randint(-1, 2, mined.sign.shape, generator=generator).to(torch.int8)
    return network, x, box, mined, Pattern(network, mined.layers, sign)


def least(seed: int, rows: list[np.ndarray], sign: Tensor) -> float:
    """The least value over the box and the pattern of the greatest row of the outputs (0 without any), by a mixed
    integer program; infinite if nothing follows the pattern."""
    weights = [(m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in model_of(seed)[::2]]
    box = scene(seed)[2]
    low, high = box.lower.numpy()[0], box.upper.numpy()[0]
    hidden = sum(len(b) for _, b in weights[:-1])
    n, size = len(low), len(low) + 3 * hidden + 1
    lb, ub, whole = np.full(size, -np.inf), np.full(size, np.inf), np.zeros(size)
    lb[:n], ub[:n] = low, high
    a, left, right = [], [], []

    def require(terms: dict[int, float], at_least: float, at_most: float) -> None:
        row = np.zeros(size)
        row[list(terms)] = list(terms.values())
        a.append(row)
        left.append(at_least)
        right.append(at_most)

    before, begin, number = list(range(n)), n, 0
    for w, b in weights[:-1]:
        after = []
        for i in range(len(b)):
            z, y, on = begin, begin + 1, begin + 2
            begin += 3
            big = float(np.abs(w[i]) @ np.maximum(np.abs(low), np.abs(high)) + abs(b[i])) + 1
            require({z: 1.0} | {j: -c for j, c in zip(before, w[i], strict=True)}, b[i], b[i])
            require({y: 1.0, z: -1.0}, 0, np.inf)
            require({y: 1.0, z: -1.0, on: big}, -np.inf, big)
            require({y: 1.0, on: -big}, -np.inf, 0)
            lb[z], ub[z] = (0 if sign[number] > 0 else -big), (0 if sign[number] < 0 else big)
            lb[y], ub[y], lb[on], ub[on], whole[on] = 0, big, 0, 1, 1
            number += 1
            after.append(y)
        reach = np.abs(w) @ np.maximum(np.abs(low), np.abs(high)) + np.abs(b)
        before, low, high = after, np.zeros(len(b)), reach
    w, b = weights[-1]
    for c in rows:
        require({size - 1: 1.0} | {j: -v for j, v in zip(before, c @ w, strict=True)}, float(c @ b), np.inf)
    if not rows:
        lb[-1] = 0
    cost = np.zeros(size)
    cost[-1] = 1
    found = milp(cost, constraints=LinearConstraint(np.array(a), left, right), bounds=Bounds(lb, ub), integrality=whole)
    assert found.status in (0, 2)
    return np.inf if found.status == 2 else float(found.fun)


def questions(seed: int):
    """The four claims under each pattern, with the exact least measure of a counterexample."""
    network, x, box, mined, drawn = scene(seed)
    e, label = np.eye(CLASSES), int(model_of(seed)(x).argmax())
    other = (label + 1) % CLASSES
    for pattern in (mined, drawn):
        sign = pattern.sign
        yield "class", top_k(network, box, [label], 1), (pattern,), min(
            least(seed, [e[label] - e[j]], sign) for j in range(CLASSES) if j != label)  # fmt: skip
        yield "never", never(network, box, other), (pattern,), least(
            seed, [e[j] - e[other] for j in range(CLASSES) if j != other], sign)  # fmt: skip
        yield "empty", anyone(network, box), (pattern,), least(seed, [], sign)
    clash = bool((mined.sign * drawn.sign < 0).any())
    together = torch.where(mined.sign != 0, mined.sign, drawn.sign)
    if not clash:  # otherwise only v = 0 is left, which a solver's tolerances cannot tell from nothing
        yield "apart", anyone(network, box), (mined, drawn), least(seed, [], together)
    weaker = mined.keeping(torch.arange(len(mined.sign)) % 2 == 0)
    yield "apart", anyone(network, box), (mined, weaker), least(seed, [], mined.sign)


def right(kind: str, verdict: object, measure: float) -> bool:
    """Whether a verdict is true; of measures next to 0 any is."""
    if abs(measure) < 1e-6 and kind in ("class", "never"):
        return True
    return not isinstance(verdict, Refuted if measure > 0 else Proved)


def judged(seeds=SEEDS, timeout=20):
    for seed in seeds:
        for kind, claim, patterns, measure in questions(seed):
            verdict = soundly.verify(module.under(claim, *patterns), timeout=timeout)
            yield kind, verdict, measure


def test_the_four_claims_get_the_verdicts_that_are_true():
    counts = Counter()
    for kind, verdict, measure in judged():
        assert right(kind, verdict, measure) and not isinstance(verdict, Unknown)
        counts[kind, type(verdict)] += 1
        if isinstance(verdict, Proved):
            assert soundly.check(verdict.certificate).accepted
    for kind in ("class", "never", "empty"):
        assert counts[kind, Proved] and counts[kind, Refuted]
    assert counts["apart", Refuted]


def test_a_witness_follows_the_pattern_in_the_model_itself():
    found = 0
    for seed in range(3):
        _, _, box, pattern, _ = scene(seed)
        for kind, claim, patterns, _ in questions(seed):
            verdict = soundly.verify(under(claim, *patterns), timeout=20)
            if not isinstance(verdict, Refuted) or patterns != (pattern,):
                continue
            x, values = verdict.witness.float(), []
            y = x
            for layer in model_of(seed):
                y = layer(y)
                values += [y[0]] if isinstance(layer, nn.Linear) else []
            assert bool((torch.cat(values[:-1]) * pattern.sign >= 0).all()) and bool(box.contains(verdict.witness)[()])
            label = int(model_of(seed)(scene(seed)[1]).argmax())
            if kind == "class":
                assert bool((y[0] >= y[0, label]).sum() > 1)
            found += 1
    assert found > 2


# -- broken ones


@pytest.mark.parametrize("change", [lambda k, s: (k, -s), lambda k, s: (k, 1), lambda k, s: (max(k - 1, CLASSES), s)])
def test_rows_of_another_pattern_are_caught(change, monkeypatch):
    joined = module.joined
    monkeypatch.setattr(
        module, "joined", lambda p, required, n: joined(p, [change(*pair) for pair in required], n)
    )  # fmt: skip
    assert not all(right(*found) for found in judged())


def test_a_search_that_takes_the_wrong_half_proves_nothing_untrue(monkeypatch):
    decided = search.decided

    def turned(problem, case):
        found = decided(problem, case)
        return found and Decided(found.step, found.entry, -found.sign, found.rows)

    monkeypatch.setattr(search, "decided", turned)
    assert all(right(*found) for found in judged(range(2)))
    signs = checker.row_signs

    def believed(proof):
        return {key: [(pair, -sign) for pair, sign in said] for key, said in signs(proof).items()}

    monkeypatch.setattr(search, "replay", lambda *a, **k: None)  # no counterexample comes to the rescue
    monkeypatch.setattr(checker, "row_signs", believed)
    assert not all(right(*found) for found in judged(range(4), timeout=1))


def test_rows_with_a_constant_decide_no_sign():
    """v <= 1/2 leaves both signs: whoever looks at v <= 0 alone misses the counterexample."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        for p, v in zip(model.parameters(), ([[1.0]], [0.0], [[-1.0], [0.0]], [0.25, 0.0]), strict=True):
            p.copy_(torch.tensor(v))
    network = soundly.load(model, torch.zeros(1, 1))
    (layer,) = mine(network, torch.ones(1, 1, 1)).layers
    joint = network.with_outputs(network.output, layer)
    box = Box(torch.full((1, 1), -1.0).double(), torch.full((1, 1), 1.0).double())
    for bound, proved in ((0.5, False), (0.0, True)):
        rows = [Row({0: Fraction(1), 1: Fraction(-1)}, {}, Fraction(0)),
                Row({2: Fraction(1)}, {}, Fraction(-bound))]  # fmt: skip
        claim = soundly.Claim(joint, box, Property.of([rows], outputs=3, inputs=1))
        assert isinstance(soundly.verify(claim, timeout=10), Proved if proved else Refuted)


# -- mining and measuring


def test_mining_counts_exactly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    network = soundly.load(model, torch.zeros(1, 2))
    x = torch.tensor([[[1.0, -1.0]]] * 9 + [[[-1.0, 0.0]]])
    assert mine(network, x).sign.tolist() == [0, -1]  # zero counts as off
    assert mine(network, x, delta="0.9").sign.tolist() == [1, -1]  # 9 of 10 are 0.9, whatever 1 - 0.9 is
    assert mine(network, x, delta=Fraction(91, 100)).sign.tolist() == [0, -1]
    pattern = mine(network, x, delta="0.9")
    assert recall(pattern, x) == Measured(9, 10)
    assert precision(pattern, x, torch.tensor([1] * 4 + [0] * 6), 1) == Measured(4, 9)
    assert pattern.follows(torch.tensor([[[0.0, 0.0]]])).all()  # half-spaces are closed
    measured = Measured(9, 10)
    assert measured.lower < 0.6 and measured.upper > 0.99 and 0.55 < measured.lower  # Clopper and Pearson's table
    for bad in (0.9, "1/2", "1.1", 0):
        with pytest.raises(InvalidInput):
            mine(network, x, delta=bad)
    with pytest.raises(InvalidInput):
        mine(network, x[:0])


def test_patterns_of_convolutions_and_smooth_layers_are_those_of_the_modules():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    x = torch.rand(40, 1, 1, 6, 6)
    network = soundly.load(model, x[0])
    pattern = mine(network, x[:20], delta="0.8", layers=["1", "3"])
    first = model[0](x[:, 0])
    second = model[2](torch.tanh(first))
    z = torch.cat([first.flatten(1), second.flatten(1)], 1)
    share = (z[:20] > 0).sum(0)
    assert torch.equal(pattern.sign, (share >= 16).to(torch.int8) - (share <= 4).to(torch.int8))
    follows = ((z * pattern.sign >= 0) | (pattern.sign == 0)).all(1)
    assert torch.equal(pattern.follows(x), follows)
    own = pattern.keeping(torch.arange(len(pattern.sign)) % 3 == 0)
    region = Box(x[0].double() - 0.05, x[0].double() + 0.05)
    verdict = soundly.verify(under(top_k(network, region, [int(model(x[0]).argmax())], 1), own), timeout=20)
    assert isinstance(verdict, Proved)


def test_where_nothing_follows_nothing_is_proved():
    empties = 0
    for seed in SEEDS:
        network, x, box, mined, drawn = scene(seed)
        label = int(model_of(seed)(x).argmax())
        for pattern in (mined, drawn):
            decision = decide(top_k(network, box, [label], 1), pattern, samples=x[None], timeout=20)
            if least(seed, [], pattern.sign) == np.inf:
                empties += 1
                assert isinstance(decision.verdict, Empty) and decision.follower is None
            else:
                assert not isinstance(decision.verdict, Empty)
                assert bool(pattern.follows(decision.follower[None].float()))
    assert empties


def test_what_may_be_empty_is_not_proved(monkeypatch):
    network, _, box, mined, _ = scene(0)
    unknown = Unknown(0.0, 1.0, "no time", Effort(0.0, 0, "unknown"))
    monkeypatch.setattr(module, "follow", lambda *a, **k: None)
    claim = anyone(network, Box(box.lower + 5, box.upper + 5))
    monkeypatch.setattr(module, "verify", lambda *a, **k: Proved(None, unknown.effort))
    assert isinstance(decide(claim, mined).verdict, Unknown)


# -- minimal patterns


@pytest.mark.parametrize("by_search", [False, True])
def test_a_minimal_pattern_suffices_and_no_neuron_of_it_is_idle(by_search):
    found, dropped = 0, 0
    for seed in SEEDS:
        network, x, box, mined, _ = scene(seed)
        e, label = np.eye(CLASSES), int(model_of(seed)(x).argmax())

        def worst(sign):
            return min(least(seed, [e[label] - e[j]], sign) for j in range(CLASSES) if j != label)  # noqa: B023

        claim = top_k(network, box, [label], 1)
        if worst(mined.sign) < 1e-4:
            continue
        result = minimal_pattern(claim, mined, search=10.0 if by_search else 0.0, samples=x[None])
        found += 1
        dropped += len(mined) - len(result.pattern)
        assert isinstance(result.verdict, Proved) and worst(result.pattern.sign) > 0
        assert bool(((result.pattern.sign == 0) | (result.pattern.sign == mined.sign)).all())
        if by_search:
            assert result.minimal and set(result.witnesses) == set(result.pattern.sign.nonzero()[:, 0].tolist())
        for i, witness in result.witnesses.items():
            others = result.pattern.keeping(torch.arange(len(mined.sign)) != i)
            assert bool(others.follows(witness[None].float())) and worst(others.sign) < 1e-6
    assert found > 1 and dropped > 5
