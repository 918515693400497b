"""When a search looks for lemmas, and that what it goes on with holds."""

import torch
from tests.certificate.lemma_samples import SCORES, provable, search
from torch import nn

import soundly
from soundly.bounds.batch import Bounder
from soundly.bounds.conditional import with_rows
from soundly.verification import lemmas
from soundly.verification.proof import certificate
from soundly.verification.verify import verify

F64 = torch.float64


def test_intervals_after_lemmas_hold_at_points():
    made, generator = provable(10), torch.Generator().manual_seed(0)
    for case in (0, 1):
        found = search(made, case)
        share = torch.rand(2000, made.program.inputs, generator=generator, dtype=F64)
        x = torch.lerp(made.lower[case], made.upper[case], torch.cat([share, share.round()]))
        for v, low, high in zip(made.program.evaluate(x), found.root.lower, found.root.upper, strict=False):
            assert bool(((v >= low - 1e-9) & (v <= high + 1e-9)).all())
        assert found.lemmas and not len(found.waiting)


def test_no_lemma_where_a_part_is_not_small():
    found = search(provable(10), 0, share=0.0)
    assert not found.lemmas and len(found.waiting)


def test_no_lemma_where_nothing_jumps():
    made = provable(10)
    program = type(made.program)(made.program.steps[: SCORES + 1])
    rows = with_rows(program, torch.ones(1, program.outputs, dtype=F64), None, torch.zeros(1, dtype=F64))
    bounder = Bounder(rows)
    root = bounder.refresh(made.lower[:1], made.upper[:1])
    known = lemmas.narrowed(made, bounder, rows, root, 0)
    assert not known.lemmas and known.subproblems == 0


def test_bounds_from_a_step_on_are_those_of_all_steps():
    made = provable(10)
    bounder = Bounder(made.program)
    root = bounder.refresh(made.lower, made.upper)
    middle = (root.lower[SCORES] + root.upper[SCORES]) / 2
    root.lower[SCORES] = torch.where(middle > 0, middle, root.lower[SCORES])
    whole = bounder.refresh(made.lower, made.upper, inherited=root)
    onward = bounder.refresh(made.lower, made.upper, inherited=root, first=SCORES + 1)
    for a, b in zip(whole.lower + whole.upper, onward.lower + onward.upper, strict=True):
        assert torch.equal(a, b)
    assert onward.known.keys() == whole.known.keys()


def test_equal_searches_find_equal_lemmas():
    made = provable(10)
    proofs = [certificate(made, [search(made, case).grown([0]) for case in (0, 1)], claim="", model={}) for _ in (0, 1)]
    for name, array in proofs[0].arrays.items():
        assert (array == proofs[1].arrays[name]).all()


class Signs(nn.Module):
    """How many places of a long signal have a positive score."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.Sequential(nn.Conv1d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv1d(3, 3, 3, padding=1), nn.ReLU(),
                                    nn.Conv1d(3, 1, 1))  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layers(x) > 0).float().sum(dim=(1, 2))[:, None]


def test_a_claim_is_proved_with_lemmas(monkeypatch):
    torch.manual_seed(1)
    x = 2 * torch.randn(1, 1, 400)
    net = soundly.load(Signs(), x)
    # By intervals alone 26 places may lose their sign; of two of these lemmas say that they do not.
    claim = soundly.within(net, soundly.Box(x - 0.2, x + 0.2), net(x) - 25, net(x) + 100)
    verdict = verify(claim, timeout=60)
    assert isinstance(verdict, soundly.Proved) and verdict.effort.settled == "root bound"
    assert len(verdict.certificate.arrays["lemma_key"]) and soundly.check(verdict.certificate).accepted
    monkeypatch.setattr(lemmas, "SMALL", 0.0)
    without = verify(claim, timeout=60)
    assert isinstance(without, soundly.Proved) and not len(without.certificate.arrays["lemma_key"])
    assert without.effort.subproblems > 0
