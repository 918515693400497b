"""Lemmas about a neck: they hold on dense grids, the checker accepts them, and a claim that needs them is proved."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.bounds.samples import made
from tests.verification.claims import F64, begun, grid, net, square
from torch import Tensor, nn

from soundly import Proved, verify
from soundly.certificate import check
from soundly.certificate.verification import replay
from soundly.graph.network import Network
from soundly.spec.claim import Claim, within
from soundly.verification.lemmas import Lemmas, Neck, neck
from soundly.verification.neuron_split import NeuronSplit
from soundly.verification.proof import certificate
from soundly.verification.verify import _Run


def funnel(seed: int, width: int = 16, neurons: int = 2, activation: type[nn.Module] = nn.ReLU) -> Network:
    """A network whose third layer is narrow."""
    sizes = [4, width, width, neurons, width, 2]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), activation())]
    return made(nn.Sequential(*layers[:-1]), 4, seed=seed)


def claimed(seed: int, activation: type[nn.Module] = nn.ReLU) -> tuple[Claim, Tensor]:
    """Outputs stay in the range of a grid, and a little more; with the grid."""
    network, box = funnel(seed, activation=activation), square(4)
    x = grid(box, 9)
    y = torch.cat([network.to(F64)(p.reshape(1, -1)) for p in x])
    return within(network.to(torch.float32), box, y.amin(0) - 0.01, y.amax(0) + 0.01), x


def sought(seed: int, activation: type[nn.Module] = nn.ReLU) -> tuple[NeuronSplit, Lemmas | None, Tensor]:
    claim, x = claimed(seed, activation)
    main = begun(claim)
    ends = neck(main.bounder, main.root)
    return main, None if ends is None else Lemmas(main, ends), x


def searched(lemmas: Lemmas, steps: int = 60) -> Lemmas:
    if lemmas.fresh:
        lemmas.begin(10)
    for _ in range(steps):
        if len(lemmas.waiting):
            lemmas.step(16, 10)
    return lemmas


def beyond(lemmas: Lemmas, x: Tensor) -> float:
    """How far values at points lie outside what is called proved."""
    known, steps = lemmas.frame(lemmas.done), lemmas.main.problem.program.evaluate(x)
    return max(float(torch.maximum(low - v, v - high).max()) for v, low, high in zip(
        steps, known.lower, known.upper, strict=True))  # fmt: skip


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_lemmas_hold_on_a_grid_and_the_checker_accepts_them(activation):
    found = 0
    for seed in range(8):
        main, lemmas, x = sought(seed, activation)
        if lemmas is None:
            continue
        searched(lemmas)
        assert beyond(lemmas, x) <= 1e-9
        found += len(lemmas.done)
        proof = certificate(main.problem, [lemmas.grown(lemmas.done), main.grown(range(len(main.forest.root)))],
                            claim="", model={})  # fmt: skip
        result = replay(proof)
        assert result.problems == () and all(tree >= len(lemmas.done) for tree, _ in result.failed)
        key, level = proof.arrays["tree_lemma"][: len(lemmas.done)], proof.arrays["tree_level"][: len(lemmas.done)]
        values = torch.cat(main.problem.program.evaluate(x), 1)[:, torch.from_numpy(key // 2)].numpy()
        assert ((1 - 2 * (key % 2)) * (values - level) >= 0).all()
    assert found > 3


class TooEager(Lemmas):
    """Calls proved what is not."""

    @property
    def done(self) -> list[int]:
        return list(range(len(self.ends.entry)))


def test_lemmas_that_are_false_are_seen_and_refused():
    seen = refused = 0
    for seed in range(8):
        main, lemmas, x = sought(seed)
        if lemmas is None:
            continue
        far = Neck(lemmas.ends.step, lemmas.ends.entry, 1 - lemmas.ends.side, 0 * lemmas.ends.level)
        wrong = searched(TooEager(main, far), 5)
        if not len(wrong.waiting):
            continue
        seen += beyond(wrong, x) > 1e-3
        wrong._keep(wrong.waiting.pick(slice(0, 0)))
        left, wrong.waiting = wrong.waiting, wrong.waiting.pick(slice(0, 0))
        wrong.proved.append(left)
        wrong.forest.flags[left.node.numpy()] |= 2
        proof = certificate(main.problem, [wrong.grown(wrong.done), main.grown(range(len(main.forest.root)))],
                            claim="", model={})  # fmt: skip
        result = replay(proof)
        assert result.problems == () and not result.proven.any() and result.failed
        refused += 1
    assert seen > 1 and refused > 1


def test_networks_without_a_narrow_place_have_no_neck():
    wide = begun(within(net(1, inputs=4, width=24), square(4), -0.1, 0.1))
    assert neck(wide.bounder, wide.root) is None
    main, lemmas, _ = sought(0)
    assert lemmas is not None and lemmas.ends.step == 5 and len(lemmas.ends.entry) <= 2
    assert main.bounder.steps[5].size == 2


def test_a_claim_that_needs_lemmas_is_proved_with_them(monkeypatch):
    """Splitting is left to the lemmas: the main search only ever bounds its roots."""
    work = _Run._work_neurons

    def mainly(self, search, until, **told):
        if isinstance(search, Lemmas):
            work(self, search, np.inf, **told)

    monkeypatch.setattr(_Run, "_work_neurons", mainly)
    used = 0
    for seed in range(6):
        claim, _ = claimed(seed)
        monkeypatch.setattr("soundly.verification.verify.FEW", 0)
        monkeypatch.setattr("soundly.verification.verify.SOME", 0)
        verdict = verify(claim, timeout=2)
        if isinstance(verdict, Proved):
            assert check(verdict.certificate).accepted
            used += bool((verdict.certificate.arrays["tree_lemma"] >= 0).any())
    assert used > 0


def test_a_search_with_lemmas_goes_on_where_a_journal_left_it(tmp_path, monkeypatch):
    monkeypatch.setattr("soundly.verification.verify.FEW", 0)
    monkeypatch.setattr("soundly.verification.verify.SOME", 0)
    main, lemmas, _ = next(s for s in map(sought, range(8)) if s[1] is not None)
    assert lemmas is not None
    searched(lemmas, 3)
    other = Lemmas(main, lemmas.ends)
    other.restore({k: np.array(v) for k, v in lemmas.state().items()})
    assert other.done == lemmas.done
    for one in (lemmas, other):
        searched(one)
    assert other.done == lemmas.done and other.forest.size == lemmas.forest.size
