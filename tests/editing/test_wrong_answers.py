"""Nothing is returned but what the checker accepted, whatever the solver or the program says."""

import dataclasses
import importlib
import math

import pytest
import torch
from tests.editing.edits import deployed, problem
from tests.editing.test_trunk import Mlp, made

import soundly
from soundly import at
from soundly.editing.program import Program
from soundly.errors import EditError

editor = importlib.import_module("soundly.editing.edit")
search = importlib.import_module("soundly.editing.candidate")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def planted(fault):
    """A solver whose answers are changed by `fault`."""
    honest = search.least_change

    def solver(*args, **options):
        solution = honest(*args, **options)
        return dataclasses.replace(solution, delta=fault(solution.delta))

    return solver


FAULTS = {
    "nothing": torch.zeros_like,
    "too little": lambda d: 0.999 * d,
    "too much": lambda d: 3 * d,
    "backwards": lambda d: -d,
    "reversed": lambda d: d.flip(0),
    "nan": lambda d: d * math.nan,
    "overflow": lambda d: d * 1e300 * 1e300,
    "noise": lambda d: d + 1e-3 * torch.sin(torch.arange(len(d), dtype=d.dtype)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_answer_of_the_solver_is_never_proved(fault, monkeypatch):
    model, constraints, _ = problem()
    monkeypatch.setattr(search, "least_change", planted(FAULTS[fault]))
    result = soundly.edit(model, constraints, layer="fc")
    assert result.status in ("unproven", "limit") and result.model is None and result.certificate is None
    assert result.delta == {} and result.proven < result.rows and "time" not in result.reason


BLOCKS = {
    "sign": lambda b: dataclasses.replace(b, matrix=-b.matrix),
    "scale": lambda b: dataclasses.replace(b, matrix=2 * b.matrix),
    "order": lambda b: dataclasses.replace(b, matrix=b.matrix.flip(0)),
    "bias": lambda b: dataclasses.replace(
        b, matrix=b.matrix * (torch.arange(b.matrix.shape[1]) != b.matrix.shape[1] - 1)
    ),
    "frozen": lambda b: dataclasses.replace(b, frozen=b.frozen + 0.5),
    "classes": lambda b: dataclasses.replace(b, classes=(0,)),
}


@pytest.mark.parametrize("fault", BLOCKS)
def test_a_wrong_block_is_never_proved(fault, monkeypatch):
    model, constraints, _ = problem()
    honest = Program.blocks
    monkeypatch.setattr(Program, "blocks", lambda self: (BLOCKS[fault](b) for b in honest(self)))
    result = soundly.edit(model, constraints, layer="fc")
    assert result.status != "proved" and result.model is None and result.certificate is None


def test_a_wrong_answer_that_satisfies_the_rows_is_still_a_proof(monkeypatch):
    model, x = made(Mlp)
    monkeypatch.setattr(search, "least_change", planted(lambda d: 3 * d))
    result = soundly.edit(model, [at(x).output(1).at_least(2.0)], layer="fc")
    assert float(deployed(result, model)(x)[0, 1].detach()) >= 2.0


def test_a_solver_that_calls_a_feasible_program_infeasible_returns_nothing(monkeypatch):
    model, constraints, _ = problem()
    honest = search.least_change
    monkeypatch.setattr(
        search,
        "least_change",
        lambda *a, **o: dataclasses.replace(honest(*a, **o), delta=None, status="infeasible", conflict=(0,)),
    )
    result = soundly.edit(model, constraints, layer="fc")
    assert result.status == "infeasible" and result.model is None


def test_a_refused_certificate_is_never_a_proof(monkeypatch):
    model, constraints, _ = problem()
    honest = editor.check
    monkeypatch.setattr(editor, "check", lambda c: dataclasses.replace(honest(c), accepted=False))
    result = soundly.edit(model, constraints, layer="fc")
    assert result.status == "unproven" and result.model is None and result.certificate is None


def test_only_the_proved_weights_are_put_into_a_model():
    model, constraints, _ = problem()
    result = soundly.edit(model, constraints, layer="fc")
    arrays = {**result.certificate.arrays, "weights": result.certificate.arrays["weights"] * 1.5}
    wrong = dataclasses.replace(result, certificate=dataclasses.replace(result.certificate, arrays=arrays))
    with pytest.raises(EditError, match="differs from the certificate"):
        wrong.applied_to(model, layer="fc")
