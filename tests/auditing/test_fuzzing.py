"""The fuzzer finds nothing in soundly as it is, finds again what it once found, and finds what is planted."""

import random
from pathlib import Path

import pytest
import torch
from torch import nn

import soundly
from soundly.auditing.faults import FAULTS, Fault, broken, planted
from soundly.auditing.fuzzing import Tally, examine, fuzz, shrunk
from soundly.auditing.generation import OPERATIONS, recipe
from soundly.auditing.mutation import hunt, line, mutate, score
from soundly.auditing.oracles import ORACLES
from soundly.auditing.recipes import Call, Recipe
from soundly.auditing.subject import Subject
from soundly.auditing.truth import least
from soundly.bounds.program import Affine, Function, Matrix, Program, Variable
from soundly.cli import main
from soundly.errors import InvalidInput
from soundly.graph import elementwise as ew

REGRESSIONS = sorted((Path(__file__).parent / "regressions").glob("*.json"))
F64 = torch.float64


def test_a_few_random_networks_show_nothing() -> None:
    tally = Tally()
    found = [(f.seed, f.oracle, f.text) for f in fuzz(range(20), shrink=False, tally=tally)]
    assert found == [] and tally.recipes == 20
    assert set(tally.checks) >= {"capture", "intervals", "planes", "linear", "splitting", "exact"}


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.stem)
def test_what_was_found_once_stays_fixed(path: Path) -> None:
    kept = Recipe.load(path)
    seed = int(kept.label.rsplit(" ", 1)[1])
    assert list(examine(kept, seed)) == []


def test_recipes_are_the_same_again_and_of_every_size() -> None:
    sizes, ops = set(), set()
    for seed in range(300):
        made = recipe(seed)
        assert made == recipe(seed)
        sizes.add(len(made.calls))
        ops |= {call.op for call in made.calls}
    assert sizes >= set(range(1, OPERATIONS + 1)) and len(ops) > 70


def test_a_recipe_is_a_file(tmp_path: Path) -> None:
    for seed in range(20):
        made = recipe(seed)
        made.save(tmp_path / "r.json")
        again = Recipe.load(tmp_path / "r.json")
        assert [tuple(c.arguments) for c in again.calls] == [tuple(c.arguments) for c in made.calls]
        for a, b in zip((*again.box[0], *again.box[1]), (*made.box[0], *made.box[1]), strict=True):
            assert torch.equal(a, b)
    (tmp_path / "r.json").write_text('{"calls": [{"op": "os.system", "arguments": []}]}')
    with pytest.raises(InvalidInput, match="no recipe"):
        Recipe.load(tmp_path / "r.json")


def test_findings_are_made_small() -> None:
    """With a fault in one operation little more than that operation is left."""
    fault = next(f for f in FAULTS if f.name == "subtraction adds")
    seed = next(s for s in range(100) if len(recipe(s).calls) > 5 and any(c.op == "sub" for c in recipe(s).calls))
    with planted(fault):
        assert next(examine(recipe(seed), seed, oracles={"capture": ORACLES["capture"][1]}), None) is not None
        small = shrunk(recipe(seed), seed, "capture", seconds=5)
    assert len(small.calls) <= 3 and any(call.op == "sub" for call in small.calls)
    assert list(examine(small, seed, oracles={"capture": ORACLES["capture"][1]})) == []


def test_every_fault_of_the_catalogue_applies_and_is_taken_back() -> None:
    assert len(FAULTS) >= 40 and len({f.name for f in FAULTS}) == len(FAULTS)
    assert {f.part for f in FAULTS} == {"operations", "linear bounds", "search", "splitting", "claims", "checker"}
    for fault in FAULTS:
        assert callable(broken(fault))
    fault = next(f for f in FAULTS if f.name == "subtraction adds")
    one = Recipe(([1.0],), ([2.0],), (Call("sub", ({"value": 0}, 0.5)),))
    with planted(fault):
        assert float(one.network()(torch.ones(1, dtype=F64))) == 1.5
    assert float(one.network()(torch.ones(1, dtype=F64))) == 0.5
    with pytest.raises(InvalidInput, match="adapt it"):
        broken(Fault("?", "search", "bounds.batch:Bounder.backward", "no such piece", ""))


QUICK = ("slopes exchanged in passes", "the box's ends exchanged", "splits without their points", "biases lost",
         "right halves begin too late", "the checker forgets leaves", "turning points forgotten below")  # fmt: skip


def test_planted_faults_are_found() -> None:
    """Those that show soonest, from every part; `soundly audit mutate` runs all of them."""
    found = list(mutate([f for f in FAULTS if f.name in QUICK], seconds=60))
    assert len(found) == len(QUICK) and all(m.found for m in found), "\n".join(map(line, found))
    assert score(found).startswith(f"mutation score {len(QUICK)} of {len(QUICK)}, 100 %; ")


def test_a_fault_that_changes_nothing_is_not_found() -> None:
    harmless = Fault(
        "none", "search", "bounds.batch:Bounder.backward", "alone = len(frame) == 1", "alone = len(frame) == 1"
    )
    assert not hunt(harmless, seconds=1.0).found


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["audit", "fuzz", "--count", "3", "--keep", str(tmp_path)]) == 0
    assert "3 networks, 0 findings" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_derivative_of_a_maximum_of_a_value_and_a_function_of_it() -> None:
    """Found by the fuzzer: what flows back through one input counted for the other as well."""

    class Highest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.maximum(torch.maximum(x, self.layer(x)), x)

    torch.manual_seed(0)
    module = Highest().double()
    network = soundly.load(module, torch.zeros(1, 3, dtype=F64))
    for seed in range(5):
        x = torch.randn(1, 3, dtype=F64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        for i in range(3):
            (expected,) = torch.autograd.grad(module(x)[0, i], x)
            if not bool((x == module(x)).any()):
                assert torch.allclose(network.gradient(of=i)(x.detach()), expected)


@pytest.mark.parametrize("seed", range(6))
def test_the_exact_minimum_agrees_with_a_dense_grid(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    w, v = (torch.randn(*size, generator=source, dtype=F64) for size in ((4, 2), (1, 4)))
    steps = (
        Variable(2), Affine(((Matrix(w, 1), 0),), torch.randn(4, generator=source, dtype=F64)),
        Function(1, ew.RELU if seed % 2 else ew.ABS, 4), Affine(((Matrix(v, 1), 2),), torch.zeros(1, dtype=F64)),
    )  # fmt: skip
    program = Program(steps)
    low, high = -torch.ones(2, dtype=F64), torch.ones(2, dtype=F64)
    axis = torch.linspace(-1, 1, 201, dtype=F64)
    truth = float(program.evaluate(torch.cartesian_prod(axis, axis))[-1].min())
    found = least(program, low, high, 0)
    assert found is not None and found <= truth + 1e-6 and found >= truth - 0.02 * float(w.abs().sum() * v.abs().max())


def test_points_lie_in_the_box_and_among_them_are_its_corners() -> None:
    subject = Subject(recipe(random.Random(1).randrange(100)))
    low, high = subject.ends
    assert bool(((subject.points >= low) & (subject.points <= high)).all())
    assert bool((subject.points == low).all(1).any()) or len(low) > 4
