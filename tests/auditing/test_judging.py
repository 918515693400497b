"""Judging tools that are honest, careless and broken, on suites whose answers are under seal."""

import json
import sys
from pathlib import Path

import pytest
import torch

from soundly.auditing.judging import judge, table
from soundly.auditing.planting import Instance
from soundly.auditing.suite import planted, read_answers, vnnlib, write
from soundly.cli import main
from soundly.errors import InvalidInput
from soundly.graph.load import load
from soundly.spec.claim import Claim
from soundly.spec.vnnlib import read_vnnlib
from soundly.verification.bench import read_instances
from soundly.verification.verdict import Proved, Refuted
from soundly.verification.verify import verify


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite") / "new"
    assert write(folder, planted(10, 3, robust=0.4), timeout=5) == 10
    return folder


def claim_of(made: Instance) -> Claim:
    return read_vnnlib(vnnlib(made), made.network)


def judged(folder: Path, tool: str):
    return list(judge(tool, read_instances(folder), read_answers(folder)))


def says(word: str) -> str:
    return f"{sys.executable} -c \"import sys; print('{word}')\" {{onnx}} {{vnnlib}}"


def test_the_files_say_what_the_instances_are(suite: Path) -> None:
    answers = read_answers(suite)
    for made, (key, answer) in zip(planted(10, 3, robust=0.4), answers.items(), strict=True):
        onnx, spec = key.split()
        network = load(suite / onnx)
        claim = read_vnnlib(suite / spec, network)
        assert torch.equal(claim.region.box.lower.reshape(-1), made.lower.reshape(-1)) and claim.region.inner is None
        assert torch.equal(claim.region.box.upper.reshape(-1), made.upper.reshape(-1))
        assert answer.holds == made.holds and answer.name == made.name
        if not made.holds:
            x = torch.tensor(answer.witness, dtype=torch.float64)
            assert not claim.holds_at(x.reshape(claim.region.shape))
            y = network.to(torch.float64)(x.reshape(made.lower.shape)).reshape(-1)
            assert float(y[1] - y[0]) == pytest.approx(answer.margin, rel=1e-2)


def test_no_name_that_is_handed_out_tells_the_answer(suite: Path) -> None:
    for path in suite.rglob("*"):
        if path.is_file() and path.name != "answers.json":
            data = path.read_bytes()
            assert not any(word in data for word in (b"planted", b"robust")), path


def test_what_tools_claim_is_counted(suite: Path, tmp_path: Path) -> None:
    answers = read_answers(suite)
    holds = sum(a.holds for a in answers.values())
    assert 0 < holds < 10
    always = judged(suite, says("unsat"))
    assert sum(j.wrong for j in always) == 10 - holds and not any(j.missed for j in always)
    text = "\n".join(table(always))
    assert text.count("WRONG") == 10 - holds and "falsely proved" in text
    false_proof = next(j for j in always if j.wrong)
    assert all(f"{v:.9g}" in text for v in false_proof.answer.witness), "the sealed point stands next to a false proof"
    never = judged(suite, says("sat"))
    assert sum(j.wrong for j in never) == holds and "falsely refuted" in "\n".join(table(never))
    for word in ("unknown", "timeout", "I do not know", ""):
        assert all(j.missed and not j.wrong for j in judged(suite, says(word)))


def test_an_answer_in_a_file_and_a_tool_that_fails(suite: Path) -> None:
    script = "import sys; open(sys.argv[1], 'w').write('sat\\n((X_0 1))'); print('unsat')"
    some = read_instances(suite)[:2]
    (one, _) = judge(f'{sys.executable} -c "{script}" {{results}} {{onnx}} {{vnnlib}}', some, read_answers(suite))
    assert one.claimed == "sat"
    crash = list(judge(f"{sys.executable} -c 'import nothing_such' {{onnx}} {{vnnlib}}", some, read_answers(suite)))
    assert all(j.missed and "ModuleNotFoundError" in j.detail for j in crash)


def test_a_tool_without_places_for_the_files_is_refused(suite: Path) -> None:
    with pytest.raises(InvalidInput, match="onnx"):
        judged(suite, "echo unsat")


def test_answers_that_were_changed_are_refused(suite: Path, tmp_path: Path) -> None:
    changed = tmp_path / "answers.json"
    data = json.loads((suite / "answers.json").read_text())
    next(iter(data.values()))["holds"] ^= True
    changed.write_text(json.dumps(data))
    with pytest.raises(InvalidInput, match="not the file"):
        read_answers(suite, answers=changed)
    changed.write_text("{")
    with pytest.raises(InvalidInput):
        read_answers(suite, answers=changed)


def test_a_folder_that_is_in_use_is_left_alone(suite: Path) -> None:
    with pytest.raises(InvalidInput, match="not empty"):
        write(suite, planted(1))


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "made")
    assert main(["audit", "planted", folder, "--count", "3", "--seed", "5", "--robust", "0"]) == 0
    assert main(["audit", "run", folder, "--tool", says("unknown")]) == 0
    assert "3: 0 claimed, 0 wrong" in capsys.readouterr().out
    assert main(["audit", "run", folder, "--tool", says("unsat"), "--only", "0001"]) == 1
    assert "WRONG" in capsys.readouterr().out
    assert main(["audit", "run", folder, "--tool", says("unsat"), "--json"]) == 1
    assert all(j["wrong"] for j in json.loads(capsys.readouterr().out))
    assert main(["audit", "run", str(tmp_path)]) == 2


def test_soundly_proves_no_planted_instance_and_refutes_no_robust_one() -> None:
    """Attacks off for what is planted: a proof is what must not be found. Small ones, seconds for all."""
    for made in planted(16, 7, robust=0.3):
        verdict = verify(claim_of(made), timeout=0.5, attack=made.holds)
        assert not isinstance(verdict, Refuted if made.holds else Proved), made.name
