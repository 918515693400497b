"""The bench reports what the instances' processes did, whatever they do. A stub stands for `soundly`."""

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soundly.errors import InvalidInput
from soundly.verification import bench as module
from soundly.verification.bench import Instance, Outcome, Summary, bench, lines, measure, read_instances, table

STUB = '''
"""Does what the specification says: `soundly verify MODEL SPEC ...`, `soundly check FILE`."""
import json, os, pathlib, subprocess, sys, time
if sys.argv[1] == "check":
    sys.exit(0 if pathlib.Path(sys.argv[2]).read_text() == "good" else 1)
model, spec = map(pathlib.Path, sys.argv[2:4])
word, *rest = spec.read_text().split()
with (spec.parent / "runs").open("a") as file:
    print(spec.name, *sys.argv[4:], file=file)
codes = {"proved": 0, "empty": 0, "refuted": 1, "unknown": 3}
def say(verdict, code):
    print(json.dumps({"verdict": verdict, "settled": "attack", "subproblems": 7, "reason": "time limit reached"}))
    sys.exit(code)
if word in codes:
    if rest and "--certificate" in sys.argv:
        pathlib.Path(sys.argv[sys.argv.index("--certificate") + 1]).write_text(rest[0])
    say(word, codes[word])
if word == "says":
    say(rest[0], int(rest[1]))
if word == "raise":
    raise RuntimeError("the engine broke")
if word == "burn":
    child = "import time\\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-S", "-c", child], check=True)
    say("proved", 0)
if word == "swell":
    block = b"x" * (300 << 20)
if word == "spawn":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (spec.parent / "child").write_text(str(child.pid))
if word == "leave":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (spec.parent / "child").write_text(str(child.pid))
    say("proved", 0)
if word == "silent":
    sys.exit(int(rest[0]))
time.sleep(60)
'''


@pytest.fixture
def stub(tmp_path: Path) -> list[str]:
    (tmp_path / "stub.py").write_text(STUB)
    return [sys.executable, "-S", "-E", str(tmp_path / "stub.py")]


def folder(path: Path, specs: dict[str, tuple[str, str]], limit: float = 20) -> Path:
    """instances.csv with one instance per entry: {name: (what the stub does, expected)}."""
    rows = [f"net.onnx,{name}.vnnlib,{limit},{expected},1.5" for name, (_, expected) in specs.items()]
    (path / "instances.csv").write_text("\n".join(["onnx,vnnlib,timeout_s,expected,other", *rows]) + "\n")
    (path / "net.onnx").write_text("")
    for name, (text, _) in specs.items():
        (path / f"{name}.vnnlib").write_text(text)
    return path


def ran(path: Path) -> list[str]:
    log = path / "runs"
    return [line.split()[0].removesuffix(".vnnlib") for line in log.read_text().splitlines()] if log.exists() else []


def verdicts(path: Path, stub: list[str], **options: Any) -> dict[str, str]:
    outcomes = bench(read_instances(path), command=stub, **options)
    return {o.name.split()[1].removesuffix(".vnnlib"): o.verdict for o in outcomes}


def gone(pid: int, within: float = 5) -> bool:
    """Whether a process ends; one that nobody has waited for yet counts as ended."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


# -- the list of instances


def test_instances_with_titles_in_any_order(tmp_path: Path) -> None:
    for name in ("a.onnx", "p.vnnlib"):
        (tmp_path / name).write_text("")
    (tmp_path / "q.vnnlib.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "instances.csv").write_text(
        "\ufeffexpected, vnnlib ,onnx,elsewhere_s,timeout_s\nunsat?,p.vnnlib,a.onnx,3,100\n\n sat,q.vnnlib,a.onnx,,30\n"
    )
    one, two = read_instances(tmp_path, timeout=60)
    assert one == Instance("a.onnx p.vnnlib", tmp_path / "a.onnx", tmp_path / "p.vnnlib", 60, "unsat?")
    assert two == Instance("a.onnx q.vnnlib", tmp_path / "a.onnx", tmp_path / "q.vnnlib.gz", 30, "sat")
    assert read_instances(tmp_path, only="q.vnn") == [two]


def test_instances_as_the_competition_lists_them(tmp_path: Path) -> None:
    folder(tmp_path, {"p": ("proved", "")})
    (tmp_path / "instances.csv").write_text("./net.onnx,./p.vnnlib,116\nnet.onnx,p.vnnlib\n")
    one, two = read_instances(tmp_path)
    assert (one.limit, one.expected, one.model.name) == (116, "", "net.onnx")
    assert two.limit == module.DEFAULT_LIMIT and read_instances(tmp_path, timeout=9)[1].limit == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("net.onnx,absent.vnnlib,3\n", "line 1: absent.vnnlib is missing"),
        ("onnx,vnnlib,timeout_s\nnet.onnx,p.vnnlib,5\nnet.onnx,p.vnnlib,soon\n", "line 3: the time limit 'soon'"),
        ("net.onnx,p.vnnlib,-1\n", "line 1: the time limit '-1'"),
        ("net.onnx,p.vnnlib,nan\n", "line 1: the time limit 'nan'"),
        ("net.onnx\n", "line 1: a network and a specification"),
        ("onnx,vnnlib\n", "no instances"),
    ],
)
def test_a_bad_list_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    folder(tmp_path, {"p": ("proved", "")})
    (tmp_path / "instances.csv").write_text(text)
    with pytest.raises(InvalidInput, match=message):
        read_instances(tmp_path)


def test_a_missing_list_and_an_empty_selection_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_instances(tmp_path)
    with pytest.raises(InvalidInput, match="no instance has 'q'"):
        read_instances(folder(tmp_path, {"p": ("proved", "")}), only="q")


# -- one process


def test_answers_are_taken_with_their_cost(tmp_path: Path, stub: list[str]) -> None:
    path = folder(
        tmp_path, {"a": ("proved", "unsat"), "b": ("refuted", "sat"), "c": ("unknown", ""), "d": ("empty", "")}
    )
    outcomes = bench(read_instances(path), command=stub)
    assert [o.verdict for o in outcomes] == ["proved", "refuted", "unknown", "empty"]
    assert [o.detail for o in outcomes] == ["", "", "time limit reached", ""]
    assert all(o.subproblems == 7 and o.settled == "attack" for o in outcomes)
    assert all(0 < o.cpu < 5 and 0 < o.seconds < 15 and 2**20 < o.memory < 2**28 for o in outcomes)
    given = (path / "runs").read_text().splitlines()[0].split()
    assert given == ["a.vnnlib", "--timeout", "20", "--format", "json", "--quiet"]


def test_cpu_seconds_are_those_of_the_whole_process_and_its_children(tmp_path: Path, stub: list[str]) -> None:
    (outcome,) = bench(read_instances(folder(tmp_path, {"a": ("burn", "")})), command=stub)
    assert outcome.verdict == "proved" and 0.3 <= outcome.cpu < 3


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("raise", "RuntimeError: the engine broke"),  # exits with 1, which means refuted
        ("silent 0", "exit code 0"),
        ("silent 1", "exit code 1"),
        ("says proved 1", "exit code 1"),
        ("says proved 3", "exit code 3"),
        ("says refuted 0", "exit code 0"),
        ("says verified 0", "exit code 0"),
    ],
)
def test_an_answer_needs_its_word_and_its_exit_code(tmp_path: Path, stub: list[str], text: str, detail: str) -> None:
    for expected in ("sat", "unsat"):
        (outcome,) = bench(read_instances(folder(tmp_path, {"a": (text, expected)})), command=stub)
        assert (outcome.verdict, outcome.detail) == ("error", detail)
        assert not outcome.solved and not outcome.wrong


def test_what_hangs_is_killed_with_its_children(tmp_path: Path, stub: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "GRACE", 0.5)
    started = time.monotonic()
    (outcome,) = bench(read_instances(folder(tmp_path, {"a": ("spawn", "unsat")}, limit=1)), command=stub)
    assert 1.5 <= time.monotonic() - started < 10
    assert (outcome.verdict, outcome.detail) == ("killed", "still running after 1.5 s")
    assert outcome.seconds >= 1.5 and not outcome.solved
    assert gone(int((tmp_path / "child").read_text()))


def test_what_a_finished_process_leaves_behind_is_killed(tmp_path: Path, stub: list[str]) -> None:
    assert verdicts(folder(tmp_path, {"a": ("leave", "unsat")}), stub) == {"a": "proved"}
    assert gone(int((tmp_path / "child").read_text()))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is watched through /proc")
def test_what_swells_is_killed(tmp_path: Path, stub: list[str]) -> None:
    path = folder(tmp_path, {"a": ("swell", "")})
    started = time.monotonic()
    (outcome,) = bench(read_instances(path), command=stub, memory=100 << 20)
    assert outcome.verdict == "killed" and outcome.detail.startswith("held 0.") and time.monotonic() - started < 15
    assert "--memory 0.0976562" in (path / "runs").read_text()


def test_one_thread_and_no_input() -> None:
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS'], os.environ['MORE'], repr(sys.stdin.read()))"
    done = measure([sys.executable, "-c", code], timeout=20, env={"MORE": "yes"})
    assert (done.code, done.out.strip(), done.killed) == (0, "1 yes ''", "")
    assert measure([sys.executable, "-c", "import os; os.abort()"], timeout=20).code == -6


# -- right and wrong


def outcome(verdict: str, expected: str, **more: Any) -> Outcome:
    return Outcome("net.onnx p.vnnlib", expected, 60, verdict, **more)


@pytest.mark.parametrize(
    ("verdict", "expected", "contradicts", "wrong"),
    [
        ("proved", "unsat", False, False),
        ("proved", "sat", True, True),
        ("empty", "sat", True, True),
        ("refuted", "unsat", True, True),
        ("refuted", "sat", False, False),
        ("proved", "sat?", True, False),
        ("refuted", "unsat?", True, False),
        ("refuted", "sat?", False, False),
        ("proved", "open", False, False),
        ("refuted", "", False, False),
        ("unknown", "sat", False, False),
        ("killed", "unsat", False, False),
        ("error", "sat", False, False),
    ],
)
def test_what_is_wrong(verdict: str, expected: str, contradicts: bool, wrong: bool) -> None:
    found = outcome(verdict, expected)
    assert (found.contradicts, found.wrong) == (contradicts, wrong)


def test_the_table_counts_and_marks() -> None:
    outcomes = [
        outcome("proved", "unsat", cpu=1.0, certificate=True), outcome("proved", "sat", cpu=3.0),
        outcome("refuted", "unsat?", cpu=9.0), outcome("unknown", "sat", detail="time limit reached", cpu=60.0),
        outcome("killed", ""), outcome("error", ""), outcome("proved", "unsat", cpu=5.0, certificate=False),
    ]  # fmt: skip
    summary = Summary.of(outcomes)
    assert summary == Summary(
        instances=7, solved=4, wrong=2, disputed=1, unknown=1, killed=1, errors=1, certificates=2, accepted=1, cpu=4.0
    )
    text = list(table(outcomes))
    assert text[1].endswith("net.onnx p.vnnlib  certificate accepted") and text[2].endswith("p.vnnlib  WRONG")
    assert text[3].endswith("disputed") and text[4].endswith("p.vnnlib  time limit reached")
    assert text[7].endswith("WRONG  certificate not accepted")
    assert text[8:] == [
        "4 of 7 solved, 2 wrong, 1 disputed, 1 unknown, 1 killed, 1 errors, median 4.00 CPU seconds",
        "1 of 2 certificates accepted",
    ]
    assert list(lines(Summary.of([]))) == ["0 of 0 solved, 0 wrong, 0 disputed, 0 unknown, 0 killed, 0 errors"]


def test_certificates_are_checked_in_another_process(tmp_path: Path, stub: list[str]) -> None:
    specs = {"good": ("proved good", ""), "bad": ("proved bad", ""), "none": ("proved", ""), "no": ("refuted", "")}
    path, where = folder(tmp_path, specs), tmp_path / "certificates"
    where.mkdir()
    for _ in range(2):  # a certificate of an earlier run vouches for nothing
        outcomes = bench(read_instances(path), command=stub, certificates=where)
        assert [o.certificate for o in outcomes] == [True, False, False, None]
        assert [o.wrong for o in outcomes] == [False, True, True, False]
        for file in where.iterdir():
            file.with_name(file.name.replace("good", "none")).write_text("good")
        (stale,) = where.glob("good-*")
        name = module.hashlib.sha256(b"net.onnx none.vnnlib").hexdigest()[:8]
        (where / f"none-{name}.cert").write_bytes(stale.read_bytes())


# -- the journal


def test_finished_instances_are_not_run_again(tmp_path: Path, stub: list[str]) -> None:
    path, journal = folder(tmp_path, {"a": ("proved", "unsat"), "b": ("unknown", "")}), tmp_path / "journal"
    first = bench(read_instances(path), command=stub, journal=journal)
    assert ran(path) == ["a", "b"]
    seen: list[Outcome] = []
    assert bench(read_instances(path), command=stub, journal=journal, progress=seen.append) == first == seen
    assert ran(path) == ["a", "b"]
    (again,) = bench(read_instances(path, only="b.vnn"), command=stub, journal=journal, options=["--no-attack"])
    assert again.verdict == "unknown" and ran(path) == ["a", "b", "b"]  # under other options it is another run
    bench(read_instances(path, timeout=7), command=stub, journal=journal)
    assert ran(path) == ["a", "b", "b", "a", "b"]  # and so it is under another limit
    folder(path, {"a": ("proved", "sat"), "b": ("unknown", "")})
    assert bench(read_instances(path), command=stub, journal=journal)[0].wrong  # what is expected is read anew


def test_a_torn_last_line_costs_one_instance(tmp_path: Path, stub: list[str]) -> None:
    path, journal = folder(tmp_path, {"a": ("proved", ""), "b": ("refuted", "")}), tmp_path / "journal"
    whole = bench(read_instances(path), command=stub, journal=journal)
    for cut in (1, 40):
        journal.write_bytes(journal.read_bytes()[:-cut])
        (path / "runs").unlink()
        found = bench(read_instances(path), command=stub, journal=journal)
        assert [o.verdict for o in found] == [o.verdict for o in whole] and ran(path) == ["b"]
        assert [json.loads(line)["verdict"] for line in journal.read_text().splitlines()] == ["proved", "refuted"]


@pytest.mark.parametrize("line", ["{}", "[1]", "nonsense", '{"name": "a", "settings": {}, "more": 1}'])
def test_another_file_is_no_journal(tmp_path: Path, stub: list[str], line: str) -> None:
    path, journal = folder(tmp_path, {"a": ("proved", "")}), tmp_path / "journal"
    journal.write_text(f"{line}\n")
    with pytest.raises(InvalidInput, match="line 1: no record of a bench"):
        bench(read_instances(path), command=stub, journal=journal)
    assert journal.read_text() == f"{line}\n" and ran(path) == []


def test_an_interruption_keeps_what_is_finished(tmp_path: Path, stub: list[str]) -> None:
    path = folder(tmp_path, {"a": ("proved", ""), "b": ("spawn", ""), "c": ("proved", "")})
    journal = tmp_path / "journal"

    def interrupt(outcome: Outcome) -> None:
        while not (tmp_path / "child").exists():  # until b runs
            time.sleep(0.02)
        raise KeyboardInterrupt

    started = time.monotonic()
    (found,) = bench(read_instances(path), command=stub, journal=journal, progress=interrupt)
    assert found.verdict == "proved" and time.monotonic() - started < 15
    assert ran(path) == ["a", "b"] and len(journal.read_text().splitlines()) == 1
    assert gone(int((tmp_path / "child").read_text()))
    (tmp_path / "b.vnnlib").write_text("unknown")
    assert verdicts(path, stub, journal=journal) == {"a": "proved", "b": "unknown", "c": "proved"}
    assert ran(path) == ["a", "b", "b", "c"]


def test_several_at_once_come_back_in_order(tmp_path: Path, stub: list[str]) -> None:
    path = folder(tmp_path, {"a": ("burn", ""), "b": ("refuted", ""), "c": ("unknown", "")})
    assert list(verdicts(path, stub, jobs=3).items()) == [("a", "proved"), ("b", "refuted"), ("c", "unknown")]


# -- the command


WITHOUT_TORCH = """
import sys
for name in ("torch", "numpy", "onnx"):
    sys.modules[name] = None
from soundly.cli import main
from soundly.verification import bench
real = bench.bench
bench.bench = lambda *arguments, **options: real(*arguments, command=sys.argv[1:-1], **options)
raise SystemExit(main(["bench", sys.argv[-1]]))
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


@pytest.fixture
def command(stub: list[str], monkeypatch: Any) -> Callable[..., int]:
    from soundly.cli import main

    def with_stub(instances: Any, **options: Any) -> Any:
        return bench(instances, command=stub, **options)

    monkeypatch.setattr(module, "bench", with_stub)
    return lambda *arguments: main(["bench", *map(str, arguments)])


def test_the_command_shows_the_table(tmp_path: Path, command: Callable[..., int], capsys: Any) -> None:
    path = folder(tmp_path, {"a": ("proved", "unsat"), "b": ("refuted", "sat?"), "c": ("unknown", "open")})
    assert command(path, "--timeout", 9, "--memory", 2, "--no-attack") == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["verdict", "proved", "refuted", "unknown"]
    assert last.startswith("2 of 3 solved, 0 wrong, 0 disputed, 1 unknown")
    assert "--timeout 9 --no-attack --format json --quiet --memory 2" in (path / "runs").read_text()


def test_the_command_fails_on_a_wrong_answer(tmp_path: Path, command: Callable[..., int], capsys: Any) -> None:
    path = folder(tmp_path, {"a": ("proved", "sat"), "b": ("proved", "unsat")})
    assert command(path, "--json", "--only", "b.vnnlib") == 0
    assert command(path, "--json") == 1
    text = capsys.readouterr().out
    found = json.loads(text[text.index("}\n{") + 2 :])
    assert found["summary"]["wrong"] == 1 and [o["verdict"] for o in found["outcomes"]] == ["proved", "proved"]
    assert command(path, "--only", "b.vnnlib", "--certificates", tmp_path / "new" / "folder") == 1
    assert "0 of 1 certificates accepted" in capsys.readouterr().out


def test_the_command_names_what_is_missing(tmp_path: Path, command: Callable[..., int], capsys: Any) -> None:
    assert command(tmp_path) == 2
    assert "instances.csv cannot be read" in capsys.readouterr().err
    assert command(tmp_path, "--timeout", "0") == 2


def test_interrupting_the_command(tmp_path: Path, command: Callable[..., int], capsys: Any, monkeypatch: Any) -> None:
    path = folder(tmp_path, {"a": ("proved", ""), "b": ("proved", "")})
    real = module._run

    def interrupted(instance: Instance, *rest: Any) -> Outcome:
        if instance.name.endswith("b.vnnlib"):
            raise KeyboardInterrupt
        return real(instance, *rest)

    monkeypatch.setattr(module, "_run", interrupted)
    assert command(path) == 3
    captured = capsys.readouterr()
    assert "1 of 1 solved" in captured.out and "interrupted, 1 instance left" in captured.err


def test_the_bench_itself_needs_no_torch(tmp_path: Path, stub: list[str]) -> None:
    path = folder(tmp_path, {"a": ("proved", "unsat")})
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *stub, path], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0 and "1 of 1 solved, 0 wrong" in done.stdout, done.stderr


def test_ending_the_command_ends_what_it_runs(tmp_path: Path, stub: list[str]) -> None:
    path = folder(tmp_path, {"a": ("proved", ""), "b": ("spawn", "")})
    command = [sys.executable, "-c", WITHOUT_TORCH, *stub, path]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    ) as run:
        until = time.monotonic() + 30
        while not ((tmp_path / "child").exists() and (tmp_path / "child").read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        run.terminate()
        assert run.communicate(timeout=30)[0].splitlines()[-1].startswith("1 of 1 solved") and run.returncode == 3
    assert gone(int((tmp_path / "child").read_text()))
