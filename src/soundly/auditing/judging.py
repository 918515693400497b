"""Judging any verifier by its command line: what it claims about instances whose answers are known.

A tool is run once per instance, as VNN-COMP runs it, and says sat, unsat or something else. It is wrong if it proves
what a planted point refutes, or refutes what holds by construction; what it does not decide it has missed.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from soundly.auditing.suite import Answer
from soundly.errors import InvalidInput
from soundly.verification.bench import GRACE, SLACK, Instance, measure

OWN = f"{shlex.quote(sys.executable)} -m soundly verify {{onnx}} {{vnnlib}} --timeout {{timeout}} --format vnncomp"
"""soundly's own command."""

Claimed = Literal["unsat", "sat", "unknown"]
_WORDS: dict[str, Claimed] = {
    **dict.fromkeys(("unsat", "holds", "proved", "verified", "safe"), "unsat"),
    **dict.fromkeys(("sat", "violated", "refuted", "unsafe"), "sat"),
    **dict.fromkeys(("unknown", "timeout", "error"), "unknown"),
}  # fmt: skip


@dataclass(frozen=True)
class Judgement:
    """What a tool said of an instance, beside the answer.

    Attributes:
        claimed: "unsat" (proved), "sat" (refuted) or "unknown", for whatever else.
        detail: of "unknown", what was said instead, or why the tool was killed.
        seconds, cpu: of the process.
    """

    instance: str
    answer: Answer
    claimed: Claimed
    detail: str = ""
    seconds: float = 0.0
    cpu: float = 0.0

    @property
    def wrong(self) -> bool:
        """Whether the claim contradicts the answer."""
        return self.claimed == ("sat" if self.answer.holds else "unsat")

    @property
    def missed(self) -> bool:
        """Whether there is no claim."""
        return self.claimed == "unknown"


def judge(
    tool: str,
    instances: Sequence[Instance],
    answers: Mapping[str, Answer],
    *,
    memory: int | None = None,
    progress: Callable[[Judgement], None] | None = None,
) -> Iterator[Judgement]:
    """Runs a tool on each instance in turn, one process and one thread at a time.

    Args:
        tool: a command in which {onnx}, {vnnlib} and {timeout} are filled in. With {results} too, the answer is read
            from that file; otherwise it is the first line of the output that is a known word.
        memory: bytes for each process.

    Raises:
        InvalidInput: the tool names no network, or there is no answer for an instance.
    """
    parts = shlex.split(tool)
    if not any("{onnx}" in part for part in parts) or not any("{vnnlib}" in part for part in parts):
        raise InvalidInput("tool: write {onnx} and {vnnlib} where the files go, {timeout} where the seconds go.")
    for instance in instances:
        if instance.name not in answers:
            raise InvalidInput(f"there is no answer for {instance.name}; give the answers of this suite.")
        with TemporaryDirectory() as folder:
            results = Path(folder) / "results.txt"
            filled = {
                "{onnx}": str(instance.model), "{vnnlib}": str(instance.spec), "{timeout}": f"{instance.limit:g}",
                "{results}": str(results),
            }  # fmt: skip
            command = [_filled(part, filled) for part in parts]
            limit = None if memory is None else int(SLACK * memory)
            done = measure(command, timeout=instance.limit + GRACE, memory=limit)
            text = results.read_text(errors="replace") if results.is_file() else done.out
        claimed, detail = _said("" if done.killed else text, done.killed or done.err, done.code)
        made = Judgement(instance.name, answers[instance.name], claimed, detail, done.seconds, done.cpu)
        if progress is not None:
            progress(made)
        yield made


def _filled(part: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        part = part.replace(name, value)
    return part


def _said(text: str, errors: str, code: int) -> tuple[Claimed, str]:
    """The first line that is an answer. A tool that says nothing claims nothing, whatever its exit code."""
    for line in text.splitlines():
        word = line.strip().lower().rstrip(".,:")
        if word in _WORDS:
            return _WORDS[word], "" if _WORDS[word] != "unknown" else word
    last = [line for line in (*text.splitlines(), *errors.splitlines()) if line.strip()]
    return "unknown", (last[-1].strip() if last else f"exit code {code}")[:120]


def table(judgements: Sequence[Judgement]) -> Iterator[str]:
    """One line per wrong claim, with the sealed point next to a false proof, then the counts."""
    for j in judgements:
        if j.wrong and not j.answer.holds:
            point = ", ".join(f"{v:.9g}" for v in j.answer.witness)
            yield f"WRONG    {j.instance}  {j.answer.name}: proved, but violated by {j.answer.margin:.3g} at {point}"
        elif j.wrong:
            yield f"WRONG    {j.instance}  {j.answer.name}: refuted, but holds by {j.answer.margin:.3g}"
    for title, holds in (("planted", False), ("robust", True)):
        own = [j for j in judgements if j.answer.holds == holds]
        if own:
            wrong, missed = sum(j.wrong for j in own), sum(j.missed for j in own)
            claimed = len(own) - missed
            word = "falsely proved" if not holds else "falsely refuted"
            yield f"{title:<8} {len(own)}: {claimed} claimed, {wrong} wrong ({word}), {missed} missed"
    cpu = sum(j.cpu for j in judgements)
    yield f"{'all':<8} {len(judgements)}: {sum(j.wrong for j in judgements)} wrong, {cpu:.1f} CPU seconds"
