"""Necks: lemmas about them hold on dense grids, the checker accepts them, and a claim that needs them is proved."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.bounds.samples import made
from tests.certificate.test_lemmas import proved
from tests.verification.claims import F64, begun, grid, net, square
from torch import Tensor, nn

from soundly import Proved, verify
from soundly.certificate import Certificate, check
from soundly.graph.from_torch import from_torch
from soundly.graph.network import Network
from soundly.spec.claim import Claim, within
from soundly.verification.forest import BOUND
from soundly.verification.necks import Neck, NeckSplit, neck_of
from soundly.verification.neuron_split import NeuronSplit
from soundly.verification.proof import certificate
from soundly.verification.verify import _Run


def funnel(seed: int, activation: type[nn.Module] = nn.ReLU) -> tuple[Network, Tensor]:
    """A network with two neurons in the middle, on a grid one always above 0 by a little, one below; and the grid."""
    sizes, x = [3, 12, 12, 2, 12, 2], grid(square(3), 13)
    module = nn.Sequential(*[m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), activation())][:-1])
    made(module, 3, seed=seed)
    with torch.no_grad():
        v = module[:5](x.float())
        room = 0.1 * (v.amax(0) - v.amin(0))
        module[4].bias += torch.stack([room[0] - v[:, 0].min(), -room[1] - v[:, 1].max()])
    return from_torch(module.eval(), (torch.zeros(1, 3),)), x


def claimed(seed: int, activation: type[nn.Module] = nn.ReLU, share: float = 0.1) -> tuple[Claim, Tensor]:
    """Outputs stay in the range of a grid, and a little more; with the grid."""
    network, x = funnel(seed, activation)
    y = torch.vmap(network.to(F64))(x[:, None])[:, 0]
    room = share * (y.amax(0) - y.amin(0))
    return within(network.to(torch.float32), square(3), y.amin(0) - room, y.amax(0) + room), x


def sought(seed: int, activation: type[nn.Module] = nn.ReLU) -> tuple[NeuronSplit, NeckSplit | None, Tensor]:
    claim, x = claimed(seed, activation)
    main = begun(claim)
    ends = neck_of(main.bounder, main.root)
    return main, None if ends is None else NeckSplit(main, ends), x


def searched(lemmas: NeckSplit, steps: int = 60) -> NeckSplit:
    if lemmas.fresh:
        lemmas.begin(10)
    for _ in range(steps):
        if len(lemmas.waiting):
            lemmas.step(16, 10)
    return lemmas


def concluded(main: NeuronSplit, lemmas: NeckSplit) -> Certificate:
    """The certificate of both, as if nothing were left to do."""
    for search in (main, lemmas):
        search.proved.append(search.waiting)
        search.forest.flags[search.waiting.node.numpy()] |= BOUND
    main.lemmas = lemmas.lemmas_of(lemmas.done)
    return certificate(main.problem, [main.grown(range(len(main.forest.root)))], claim="", model={})


def beyond(lemmas: NeckSplit, x: Tensor) -> float:
    """How far values at points lie outside what is called proved."""
    known, steps = lemmas.frame(lemmas.done), lemmas.main.problem.program.evaluate(x)
    return max(float(torch.maximum(low - v, v - high).max()) for v, low, high in zip(
        steps, known.lower, known.upper, strict=False))  # fmt: skip


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
        proof = concluded(main, lemmas)
        assert proved(proof) == [True] * len(lemmas.done)
        key, level = proof.arrays["lemma_key"], proof.arrays["lemma_value"]
        values = torch.cat(main.problem.program.evaluate(x), 1)[:, torch.from_numpy(key // 2)].numpy()
        assert ((1 - 2 * (key % 2)) * (values - level) >= 0).all()
    assert found > 3


class TooEager(NeckSplit):
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
        proof = concluded(main, wrong)
        assert not all(proved(proof))
        refused += 1
    assert seen > 1 and refused > 1


def test_networks_without_a_narrow_place_have_no_neck():
    wide = begun(within(net(1, inputs=4, width=24), square(4), -0.1, 0.1))
    assert neck_of(wide.bounder, wide.root) is None
    found = [lemmas.ends for _, lemmas, _ in map(sought, range(8)) if lemmas is not None]
    assert len(found) > 2 and all(ends.step == 5 and 0 < len(ends.entry) <= 2 for ends in found)


def test_a_claim_that_needs_lemmas_is_proved_with_them(monkeypatch):
    """Splitting is left to the lemmas: the main search only ever bounds its roots."""
    work = _Run._work_neurons

    def mainly(self, search, until, **told):
        self._limits()
        if isinstance(search, NeckSplit):
            work(self, search, np.inf, **told)

    monkeypatch.setattr(_Run, "_work_neurons", mainly)
    used = 0
    for seed in range(6):
        claim, _ = claimed(seed, share=0.5)
        monkeypatch.setattr("soundly.verification.verify.FEW", 0)
        monkeypatch.setattr("soundly.verification.verify.SOME", 0)
        verdict = verify(claim, timeout=2)
        if isinstance(verdict, Proved):
            assert check(verdict.certificate).accepted
            used += len(verdict.certificate.arrays["lemma_key"])
    assert used > 0


def test_a_search_with_lemmas_goes_on_where_a_journal_left_it(tmp_path, monkeypatch):
    monkeypatch.setattr("soundly.verification.verify.FEW", 0)
    monkeypatch.setattr("soundly.verification.verify.SOME", 0)
    main, lemmas, _ = next(s for s in map(sought, range(8)) if s[1] is not None)
    assert lemmas is not None
    searched(lemmas, 3)
    other = NeckSplit(main, lemmas.ends)
    other.restore({k: np.array(v) for k, v in lemmas.state().items()})
    assert other.done == lemmas.done
    for one in (lemmas, other):
        searched(one)
    assert other.done == lemmas.done and other.forest.size == lemmas.forest.size
