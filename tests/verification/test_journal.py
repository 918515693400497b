"""A search goes on from its journal as if nothing had happened, from no other's, and no journal makes a proof."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.verification.claims import begun, grid, net, square

from soundly.bounds.batch import Bounder
from soundly.certificate.verification import replay
from soundly.errors import InvalidInput
from soundly.spec.claim import Claim, within
from soundly.verification.input_split import InputSplit
from soundly.verification.journal import Journal
from soundly.verification.neuron_split import NeuronSplit
from soundly.verification.problem import problem_of
from soundly.verification.proof import certificate, identity
from soundly.verification.verdict import Proved, Unknown
from soundly.verification.verify import verify


def claim_below(room: float, seed: int = 1) -> Claim:
    """Three outputs above their least value on a grid, less some room."""
    network, region = net(seed, inputs=3), square(3)
    least = torch.cat([network(x.reshape(1, -1)) for x in grid(region, 15).float()]).amin(0)
    return within(network, region, least - room, None)


def fresh(kind: str, claim: Claim) -> InputSplit | NeuronSplit:
    problem = problem_of(claim)
    return begun(claim) if kind == "neurons" else InputSplit(problem, Bounder(problem.program), margin=1e-6)


def worked(search: InputSplit | NeuronSplit, steps: int) -> InputSplit | NeuronSplit:
    for _ in range(steps):
        if isinstance(search, NeuronSplit) and len(search.waiting):
            search.step(4, 5)
        elif isinstance(search, InputSplit) and len(search):
            search.step(16)
    return search


@pytest.mark.parametrize("kind", ["inputs", "neurons"])
def test_a_search_goes_on_from_its_journal(tmp_path: Path, kind: str):
    claim = claim_below(0.02)
    numbers = identity(problem_of(claim))
    search = worked(fresh(kind, claim), 6)
    first = Journal(tmp_path / "journal", numbers)
    first.follow(kind, search)
    first.write(now=True)
    again = fresh(kind, claim)
    Journal(tmp_path / "journal", numbers).follow(kind, again)
    kept, restored = search.state(), again.state()
    assert kept.keys() == restored.keys() and all(np.array_equal(kept[k], restored[k]) for k in kept)
    worked(again, 1000)
    assert again.subproblems > search.subproblems
    trees = range(len(again.forest.root))
    assert replay(certificate(problem_of(claim), [again.grown(trees)], claim="", model={})).failed == []


def test_parts_that_nothing_can_split_any_more_are_kept(tmp_path: Path):
    claim = claim_below(-0.05)
    search = fresh("neurons", claim)
    assert isinstance(search, NeuronSplit)
    worked(search, 200)
    assert search.stuck and not len(search.waiting)
    first = Journal(tmp_path / "journal", {})
    first.follow("neurons", search)
    first.write(now=True)
    again = fresh("neurons", claim)
    assert isinstance(again, NeuronSplit)
    Journal(tmp_path / "journal", {}).follow("neurons", again)
    assert len(again.waiting) == sum(map(len, search.stuck))


def interrupt(_: object) -> None:
    """Ctrl-C at the first word of progress."""
    raise KeyboardInterrupt


def test_a_verification_is_interrupted_and_finished(tmp_path: Path):
    claim, path = claim_below(0.02), tmp_path / "journal"
    begun = verify(claim, attack=False, journal=path, progress=interrupt)
    assert isinstance(begun, Unknown) and begun.reason == "interrupted" and path.exists()
    assert isinstance(verify(claim, timeout=60, attack=False, journal=path), Proved)


@pytest.mark.parametrize("other", [claim_below(0.5), claim_below(1e-4, seed=2)], ids=["property", "network"])
def test_the_journal_of_another_problem_is_refused(tmp_path: Path, other: Claim):
    path = tmp_path / "journal"
    verify(claim_below(1e-4), attack=False, journal=path, progress=interrupt)
    kept = path.read_bytes()
    with pytest.raises(InvalidInput, match="another network, region or property"):
        verify(other, timeout=5, journal=path)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("content", [b"", b"no journal", b"PK\x03\x04"])
def test_other_files_are_refused(tmp_path: Path, content: bytes):
    (tmp_path / "journal").write_bytes(content)
    with pytest.raises(InvalidInput, match="journal"):
        Journal(tmp_path / "journal", {})


def test_other_arrays_are_refused(tmp_path: Path):
    np.savez(tmp_path / "other.npz", a=np.zeros(1))
    np.save(tmp_path / "other.npy", np.zeros(1))
    for name in ("other.npz", "other.npy"):
        with pytest.raises(InvalidInput, match="no journal"):
            Journal(tmp_path / name, {})


def test_a_journal_that_forgets_what_is_open_proves_nothing(tmp_path: Path):
    """Nothing waits, so the search believes that it is done; the checker does not, and without end is no answer."""
    claim, path = claim_below(-0.05), tmp_path / "journal"
    numbers = identity(problem_of(claim))
    search = worked(fresh("inputs", claim), 6)
    assert isinstance(search, InputSplit)
    search.stack = []
    journal = Journal(path, numbers)
    journal.follow("inputs", search)
    journal.write(now=True)
    verdict = verify(claim, timeout=20, attack=False, journal=path)
    assert isinstance(verdict, Unknown) and "certificate" in verdict.reason


def test_a_crash_while_writing_leaves_the_last_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "journal"
    journal = Journal(path, {})
    journal.write(now=True)
    kept = path.read_bytes()

    def crash(file, **arrays):
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(np, "savez", crash)
    with pytest.raises(OSError, match="full"):
        journal.write(now=True)
    assert path.read_bytes() == kept and list(tmp_path.iterdir()) == [path]
