"""The mutation score: each fault of the catalogue planted alone, and whether the fuzzer notices within a time limit.

Every fault gets a process of its own, so that nothing it leaves in caches reaches the next one, and one that never ends
can be ended.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from soundly.auditing.faults import FAULTS, Fault, planted
from soundly.auditing.fuzzing import examine
from soundly.auditing.generation import recipe
from soundly.auditing.oracles import ORACLES

PATIENCE = 10.0
"""How many times its CPU time a process may take on a busy machine."""


@dataclass(frozen=True)
class Mutant:
    """What became of a fault: whether it was found, after how many CPU seconds, by which oracle at which seed, and what
    that said."""

    fault: Fault
    found: bool
    seconds: float
    oracle: str = ""
    seed: int = -1
    text: str = ""


def hunt(fault: Fault, *, seconds: float, first: int = 0) -> Mutant:
    """Examines soundly with the fault, in this process, until it is found or time is up.

    Every oracle goes through the seeds at its own pace, and that which has taken the least time so far is next: cheap
    ones see many recipes while a dear one sees a few.

    Args:
        seconds: of CPU time.
    """
    started = time.process_time()
    spent, seeds = dict.fromkeys(ORACLES, 0.0), dict.fromkeys(ORACLES, first)
    with planted(fault):
        while (begun := time.process_time()) < started + seconds:
            name = min(spent, key=lambda name: spent[name])
            seed, seeds[name] = seeds[name], seeds[name] + 1
            for _, text in examine(recipe(seed), seed, oracles={name: ORACLES[name][1]}):
                return Mutant(fault, True, time.process_time() - started, name, seed, text[:200])
            spent[name] += time.process_time() - begun
    return Mutant(fault, False, time.process_time() - started)


def _child(pipe: Connection, index: int, seconds: float) -> None:
    pipe.send(hunt(FAULTS[index], seconds=seconds))


def mutate(faults: Sequence[Fault] = FAULTS, *, seconds: float = 60.0) -> Iterator[Mutant]:
    """Each fault of the catalogue in turn, in a process of its own.

    Args:
        faults: members of FAULTS.
        seconds: CPU time for each; one that takes far more time than that has not ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soundly.auditing.mutation"])
    for fault in faults:
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sending, FAULTS.index(fault), seconds), daemon=True)
        started = time.monotonic()
        process.start()
        sending.close()
        try:
            if receiving.poll(PATIENCE * seconds + 20.0):
                yield receiving.recv()
            else:
                yield Mutant(fault, False, time.monotonic() - started, text="did not end")
        except EOFError:  # it died: a crash is noticed by anybody
            yield Mutant(fault, True, time.monotonic() - started, text="the process died")
        finally:
            process.kill()
            process.join()
            receiving.close()


def line(mutant: Mutant) -> str:
    """A fault and what became of it."""
    how = f"{mutant.oracle} at seed {mutant.seed}" if mutant.found else "NOT FOUND"
    return f"{mutant.fault.part:<14} {mutant.fault.name:<52} {mutant.seconds:>6.1f} s  {how}"


def score(mutants: Sequence[Mutant]) -> str:
    """How many were found, and what the search cost."""
    found, spent = sum(m.found for m in mutants), sum(m.seconds for m in mutants)
    most = max((m.seconds for m in mutants), default=0.0)
    share = 100 * found / max(1, len(mutants))
    cost = f"{spent:.0f} CPU seconds, {most:.0f} at most for one"
    return f"mutation score {found} of {len(mutants)}, {share:.0f} %; {cost}"
