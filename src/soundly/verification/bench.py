"""Runs a folder of verification instances, each in a process of its own, and compares the answers with the known ones.

Time and memory are limited from outside as well, so that an instance that hangs or swells is an outcome and not the end
of the run; CPU seconds are those of the whole process, start included. A journal keeps what is finished. Nothing here
imports torch: what is measured is measured by the instances' processes alone.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from soundly.errors import InvalidInput

GRACE = 5.0
"""Seconds beyond its time limit after which a process is killed."""
SLACK = 1.25
"""How many times its memory limit a process may hold before it is killed."""
DEFAULT_LIMIT = 300.0
"""Seconds for an instance that names no limit, if none is given."""
SOUNDLY = (sys.executable, "-m", "soundly")
ANSWERS = {"proved": "unsat", "empty": "unsat", "refuted": "sat"}
_CODES = {"proved": 0, "empty": 0, "refuted": 1, "unknown": 3}
_POLL = 0.05


@dataclass(frozen=True)
class Instance:
    """One line of instances.csv. `name` is the model and the specification as written there, `expected` one of "unsat",
    "sat", "unsat?", "sat?" (tools disagreed), "open" and "" (not said)."""

    name: str
    model: Path
    spec: Path
    limit: float
    expected: str


@dataclass(frozen=True)
class Outcome:
    """What became of an instance.

    Attributes:
        verdict: "proved", "refuted", "empty", "unknown", "killed" (limits enforced from outside) or "error".
        detail: the reason for anything but an answer.
        seconds, cpu: of the whole process, wall clock and user + system.
        memory: the largest resident size, in bytes.
        certificate: whether `soundly check` accepted the certificate in another process; None if that was not asked.
        settled, subproblems: what the verdict says of itself.
    """

    name: str
    expected: str
    limit: float
    verdict: str
    detail: str = ""
    seconds: float = 0.0
    cpu: float = 0.0
    memory: int = 0
    certificate: bool | None = None
    settled: str = ""
    subproblems: int = 0

    @property
    def solved(self) -> bool:
        """Whether there is an answer, be it right or wrong."""
        return self.verdict in ANSWERS

    @property
    def contradicts(self) -> bool:
        """Whether the answer is not the expected one, which may be disputed."""
        return self.solved and self.expected.rstrip("?") in ("sat", "unsat") and (
            ANSWERS[self.verdict] != self.expected.rstrip("?")
        )  # fmt: skip

    @property
    def wrong(self) -> bool:
        """Whether the answer contradicts one that no tool disputes, or is a proof that the checker refused."""
        return (self.contradicts and not self.expected.endswith("?")) or self.certificate is False


@dataclass(frozen=True)
class Summary:
    """Counts over outcomes. `solved` includes `wrong` ones and `disputed` ones (against a "?"); `refused` certificates
    are counted among the wrong. `cpu` is the median over the solved."""

    instances: int
    solved: int
    wrong: int
    disputed: int
    unknown: int
    killed: int
    errors: int
    certificates: int
    accepted: int
    cpu: float | None

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Summary:
        def count(test: Callable[[Outcome], bool]) -> int:
            return sum(map(test, outcomes))

        times = [o.cpu for o in outcomes if o.solved]
        return cls(
            len(outcomes), count(lambda o: o.solved), count(lambda o: o.wrong),
            count(lambda o: o.contradicts and not o.wrong), count(lambda o: o.verdict == "unknown"),
            count(lambda o: o.verdict == "killed"), count(lambda o: o.verdict == "error"),
            count(lambda o: o.certificate is not None), count(lambda o: o.certificate is True),
            statistics.median(times) if times else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A finished process: its exit code (negative: the signal), its output, what it used, and why it was killed."""

    code: int
    out: str
    err: str
    seconds: float
    cpu: float
    memory: int
    killed: str = ""


def read_instances(folder: Path, *, timeout: float | None = None, only: str = "") -> list[Instance]:
    """The instances of folder/instances.csv.

    The columns are onnx, vnnlib, timeout_s, expected, as a first line may say, in any order and among others; without
    such a line they are the competition's: onnx, vnnlib, timeout. Where a file is missing, file.gz is taken.

    Args:
        timeout: caps the limits of the file; where it has none, this is the limit.
        only: keeps the instances whose name contains it.

    Raises:
        InvalidInput: the file is missing or malformed, or names files that are; says the line.
    """
    path = Path(folder) / "instances.csv"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = [(number, row) for number, row in enumerate(csv.reader(file), 1) if any(map(str.strip, row))]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise InvalidInput(f"{path} cannot be read: {problem}.") from problem
    columns = ["onnx", "vnnlib", "timeout_s"]
    if table and "onnx" in (titles := [cell.strip() for cell in table[0][1]]):
        columns = titles
        table.pop(0)
    found = []
    for number, row in table:
        cells = dict(zip(columns, map(str.strip, row), strict=False))
        if not cells.get("onnx") or not cells.get("vnnlib"):
            raise InvalidInput(f"{path}, line {number}: a network and a specification were expected.")
        if only not in (name := f"{cells['onnx']} {cells['vnnlib']}"):
            continue
        try:
            limit = float(cells.get("timeout_s") or timeout or DEFAULT_LIMIT)
        except ValueError:
            limit = float("nan")
        if not 0 < limit < float("inf"):
            raise InvalidInput(f"{path}, line {number}: the time limit {cells['timeout_s']!r} is no number of seconds.")
        files = []
        for cell in (cells["onnx"], cells["vnnlib"]):
            file_ = path.parent / cell
            file_ = file_ if file_.is_file() else file_.with_name(file_.name + ".gz")
            if not file_.is_file():
                raise InvalidInput(f"{path}, line {number}: {cell} is missing, and so is {cell}.gz.")
            files.append(file_)
        limit = limit if timeout is None else min(limit, timeout)
        found.append(Instance(name, files[0], files[1], limit, cells.get("expected", "")))
    if not found:
        raise InvalidInput(f"{path}: no instance" + (f" has {only!r} in its name." if only else "s."))
    return found


def measure(
    command: Sequence[str | Path],
    *,
    timeout: float,
    memory: int | None = None,
    stop: Event | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Measured:
    """Runs a command with one thread and measures it; kills it, and what it started, beyond a limit. Needs POSIX.

    Args:
        timeout: wall-clock seconds after which it is killed.
        memory: bytes of resident memory above which it is killed, watched where there is /proc.
        stop: kills it once set.
        env: what to change in the environment.
    """
    threads = {f"{kind}_NUM_THREADS": "1" for kind in ("OMP", "MKL", "OPENBLAS")}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            [os.fspath(part) for part in command], stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd,
            env={**os.environ, **threads, **(env or {})}, start_new_session=True,
        )  # fmt: skip
        killed, pause, peak, status = "", 0.001, 0, None
        try:
            while status is None:
                time.sleep(pause)
                pause = min(2 * pause, _POLL)
                pid, code, usage = os.wait4(process.pid, os.WNOHANG)
                seconds = time.perf_counter() - started
                if pid:
                    status = code
                elif not killed:
                    peak = max(peak, _peak(process.pid))
                    if stop is not None and stop.is_set():
                        killed = "interrupted"
                    elif seconds > timeout:
                        killed = f"still running after {timeout:g} s"
                    elif memory is not None and peak > memory:
                        killed = f"held {peak / 2**30:.1f} GiB"
                    if killed:
                        _kill(process.pid)
        finally:
            _kill(process.pid)  # what the process left behind belongs to its group
            process.returncode = os.waitstatus_to_exitcode(status) if status is not None else process.wait()
        for file in (out, err):
            file.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return Measured(
            process.returncode, out.read().decode(errors="replace"), err.read().decode(errors="replace"), seconds,
            usage.ru_utime + usage.ru_stime, peak or usage.ru_maxrss * unit, killed,
        )  # fmt: skip


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # all of it has ended
        return


def _peak(pid: int) -> int:
    """The most bytes a running process has held. What the system reports at its end would count this process's own
    memory, which every child holds until it executes its program."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):  # it has just ended, or this system has no /proc
        return 0


def bench(
    instances: Sequence[Instance],
    *,
    journal: Path | None = None,
    jobs: int = 1,
    memory: int | None = None,
    certificates: Path | None = None,
    options: Sequence[str] = (),
    command: Sequence[str] = SOUNDLY,
    progress: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Runs the instances. After Ctrl-C it returns the outcomes so far: fewer than there are instances.

    Args:
        journal: JSON lines; what it holds under the same limits and options is not run again. A last line cut off by
            an interruption is dropped.
        jobs: how many run at once; more than the machine has idle cores spoils the times.
        memory: bytes for each, passed on and enforced from outside.
        certificates: a folder for the certificates; each is checked in a process of its own.
        options: passed on to `soundly verify`.
        command: what stands for `soundly`.
        progress: called with each outcome as it is known, those from the journal first.

    Returns:
        The outcomes in the order of the instances.

    Raises:
        InvalidInput: the journal is no journal; says the line.
    """
    given = {"memory": memory, "certificates": certificates is not None, "options": list(options)}
    keys = [json.dumps([i.name, {"limit": i.limit, **given}]) for i in instances]
    finished = _read_journal(journal) if journal else {}
    outcomes = {k: replace(finished[key], expected=instances[k].expected)
                for k, key in enumerate(keys) if key in finished}  # fmt: skip
    if progress:
        for outcome in outcomes.values():
            progress(outcome)
    stop = Event()
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        futures = {
            pool.submit(_run, instance, memory, certificates, options, command, stop): k
            for k, instance in enumerate(instances) if k not in outcomes
        }  # fmt: skip
        try:
            for future in as_completed(futures):
                k = futures[future]
                outcomes[k] = future.result()
                if journal:
                    record = {"settings": {"limit": instances[k].limit, **given}, **asdict(outcomes[k])}
                    with journal.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                if progress:
                    progress(outcomes[k])
        except KeyboardInterrupt:
            pass  # the caller sees that outcomes are missing
        finally:
            stop.set()
            for future in futures:
                future.cancel()
    return [outcomes[k] for k in sorted(outcomes)]


def _read_journal(path: Path) -> dict[str, Outcome]:
    """The outcomes by name and settings. A torn last line is cut off the file, or the next record would join it."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    found = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            settings = record.pop("settings")
            found[json.dumps([record["name"], settings])] = Outcome(**record)
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            raise InvalidInput(f"{path}, line {number}: no record of a bench; name another journal.") from problem
    return found


def _run(
    instance: Instance, memory: int | None, certificates: Path | None, options: Sequence[str], command: Sequence[str],
    stop: Event,
) -> Outcome:  # fmt: skip
    arguments: list[str | Path] = [
        *command,
        "verify",
        instance.model,
        instance.spec,
        "--timeout",
        f"{instance.limit:g}",
        *options,
    ]
    arguments += ["--format", "json", "--quiet"] + (["--memory", f"{memory / 2**30:g}"] if memory else [])
    certificate = None
    if certificates is not None:
        digest = hashlib.sha256(instance.name.encode()).hexdigest()[:8]
        certificate = certificates / f"{instance.spec.name.split('.vnnlib')[0]}-{digest}.cert"
        certificate.unlink(missing_ok=True)  # an older run's would vouch for this one
        arguments += ["--certificate", certificate]
    most = None if memory is None else int(SLACK * memory)
    done = measure(arguments, timeout=instance.limit + GRACE, memory=most, stop=stop)
    verdict, facts = _answer(done)
    accepted = None
    if certificate is not None and verdict == "proved":
        patience = max(60.0, 2 * instance.limit)
        checked = measure([*command, "check", certificate], timeout=patience, memory=most, stop=stop)
        accepted = checked.code == 0
    detail = "" if verdict in ANSWERS else done.killed or facts.get("reason") or _last(done)
    return Outcome(
        instance.name, instance.expected, instance.limit, verdict, detail, done.seconds, done.cpu, done.memory,
        accepted, facts.get("settled", ""), facts.get("subproblems", 0),
    )  # fmt: skip


def _answer(done: Measured) -> tuple[str, dict[str, Any]]:
    """The verdict, if output and exit code agree on one. A crashing interpreter exits with 1, which is no answer."""
    if done.killed:
        return "killed", {}
    try:
        facts = json.loads(done.out)
        verdict = facts["verdict"]
        return (verdict, facts) if _CODES[verdict] == done.code else ("error", {})
    except (ValueError, TypeError, KeyError):
        return "error", {}


def _last(done: Measured) -> str:
    lines = [line for line in done.err.splitlines() if line.strip()]
    return (lines[-1] if lines else f"exit code {done.code}")[:200]


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """One line per outcome, what is wrong marked, then the counts."""
    yield f"{'verdict':<8}  {'expected':<8}  {'cpu s':>7}  {'wall s':>7}  {'MiB':>6}  instance"
    for o in outcomes:
        mark = "  WRONG" if o.wrong else "  disputed" if o.contradicts else ""
        if o.certificate is not None:
            mark += f"  certificate {'' if o.certificate else 'not '}accepted"
        figures = f"{o.cpu:>7.2f}  {o.seconds:>7.2f}  {o.memory / 2**20:>6.0f}"
        yield f"{o.verdict:<8}  {o.expected:<8}  {figures}  {o.name}{mark}{'  ' * bool(o.detail)}{o.detail}"
    yield from lines(Summary.of(outcomes))


def lines(summary: Summary) -> Iterator[str]:
    """The counts in words."""
    s = summary
    cpu = "" if s.cpu is None else f", median {s.cpu:.2f} CPU seconds"
    yield (
        f"{s.solved} of {s.instances} solved, {s.wrong} wrong, {s.disputed} disputed, {s.unknown} unknown, "
        f"{s.killed} killed, {s.errors} errors{cpu}"
    )
    if s.certificates:
        yield f"{s.accepted} of {s.certificates} certificates accepted"
