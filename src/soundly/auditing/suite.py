"""Suites of instances with known answers: files to hand out, and the answers under seal.

What is handed out is what VNN-COMP hands out: ONNX, VNN-LIB and instances.csv, with names that say nothing. The
answers, with the planted points, are a file of their own; its SHA-256 is handed out too, so that nobody can change them
later.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from soundly.auditing.plain import plain
from soundly.auditing.planting import BUMPS, HOSTS, POSITIONS, Instance, instance
from soundly.auditing.trained import NETS, instances, read
from soundly.errors import InvalidInput
from soundly.graph.to_onnx import to_onnx

ANSWERS, SEAL = "answers.json", "seal.txt"
MARGINS = (1e-2, 1e-3, 1e-4, 1e-6, 1e-9)
SHAPES = ((1, 3), (1, 6), (1, 10), (1, 1, 3, 3), (1, 2, 2, 3))


@dataclass(frozen=True)
class Answer:
    """What is known of an instance: whether the claim holds, its margin, and, if it does not hold, a counterexample."""

    name: str
    holds: bool
    margin: float
    witness: tuple[float, ...] = ()


def planted(count: int, seed: int = 0, *, robust: float = 0.25) -> Iterator[Instance]:
    """Instances that differ in everything there is to choose; the share `robust` of them hold.

    Bumps, positions and margins are dealt out evenly, in an order that the seed decides.
    """
    r = random.Random(seed)
    deal = list(itertools.product(BUMPS, POSITIONS, MARGINS))
    r.shuffle(deal)
    for k, (bump, position, margin) in zip(range(count), itertools.cycle(deal), strict=False):
        holds = r.random() < robust
        yield instance(
            host=r.choice(HOSTS), bump=None if r.random() < 0.1 else bump, position=position, margin=margin,
            shape=r.choice(SHAPES), eps=r.choice([0.125, 0.25, 0.5]), radius=r.choice([0.02, 0.05, 0.1]), holds=holds,
            seed=1000 * seed + k,
        )  # fmt: skip


def plain_ones(count: int, seed: int = 0, *, robust: float = 0.25) -> Iterator[Instance]:
    """Instances of dense layers and ReLUs alone, for tools that read little else."""
    r = random.Random(seed)
    deal = list(itertools.product(POSITIONS, MARGINS))
    r.shuffle(deal)
    for k, (position, margin) in zip(range(count), itertools.cycle(deal), strict=False):
        yield plain(
            position=position, size=r.choice([3, 6, 10]), eps=r.choice([0.125, 0.25, 0.5]),
            radius=r.choice([1 / 64, 1 / 32, 1 / 16]), margin=margin, holds=r.random() < robust, seed=1000 * seed + k,
        )  # fmt: skip


def trained_ones(files: Iterable[Path] = ()) -> Iterator[Instance]:
    """The planted points of trained networks: of these files or, without any, of those that come with soundly."""
    for path in files or sorted(NETS.glob("*.npz")):
        yield from instances(read(path))


def write(folder: Path, instances: Iterable[Instance], *, timeout: float = 60.0) -> int:
    """Writes a suite; returns how many instances it has.

    Raises:
        InvalidInput: the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InvalidInput(f"{folder} is not empty; name a new folder.")
    for part in ("onnx", "vnnlib"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    answers, lines = {}, ["onnx,vnnlib,timeout_s"]
    for k, made in enumerate(instances):
        number = f"{k:04d}"
        onnx, spec = f"onnx/{number}.onnx", f"vnnlib/{number}.vnnlib"
        to_onnx(replace(made.network, name="network"), folder / onnx)  # its own name tells the answer
        (folder / spec).write_text(vnnlib(made), encoding="utf-8")
        lines.append(f"{onnx},{spec},{timeout:g}")
        witness = () if made.witness is None else tuple(made.witness.flatten().tolist())
        answers[f"{onnx} {spec}"] = {"name": made.name, "holds": made.holds, "margin": made.margin, "witness": witness}
    (folder / "instances.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = (json.dumps(answers, indent=1) + "\n").encode()
    (folder / ANSWERS).write_bytes(data)
    (folder / SEAL).write_text(f"{hashlib.sha256(data).hexdigest()}  {ANSWERS}\n", encoding="utf-8")
    return len(answers)


def vnnlib(made: Instance) -> str:
    """The negation of the claim as VNN-LIB 1.0, every number in exact decimals. A tie is a violation."""
    text = [f"; {made.lower.numel()} inputs, 2 outputs"]
    text += [f"(declare-const X_{i} Real)" for i in range(made.lower.numel())]
    text += ["(declare-const Y_0 Real)", "(declare-const Y_1 Real)"]
    for i, (low, high) in enumerate(zip(made.lower.flatten().tolist(), made.upper.flatten().tolist(), strict=True)):
        text += [f"(assert (>= X_{i} {Decimal(low):f}))", f"(assert (<= X_{i} {Decimal(high):f}))"]
    return "\n".join([*text, "(assert (<= Y_0 Y_1))"]) + "\n"


def read_answers(folder: Path, *, answers: Path | None = None) -> dict[str, Answer]:
    """The answers of a suite by instance, if they are those that its seal was made for.

    Args:
        answers: where they are kept, if not in the folder.

    Raises:
        InvalidInput: a file is missing or malformed, or the seal does not fit.
    """
    path = answers or folder / ANSWERS
    try:
        data = path.read_bytes()
        seal = (folder / SEAL).read_text(encoding="utf-8").split()[0]
        if hashlib.sha256(data).hexdigest() != seal:
            raise InvalidInput(f"{path} is not the file that {folder / SEAL} was made for.")
        found = json.loads(data)
        return {
            key: Answer(str(v["name"]), bool(v["holds"]), float(v["margin"]), tuple(map(float, v["witness"])))
            for key, v in found.items()
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as problem:
        if isinstance(problem, InvalidInput):
            raise
        raise InvalidInput(f"{path} with its {SEAL} cannot be read: {problem}.") from problem
