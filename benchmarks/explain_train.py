"""Networks trained to explain themselves: what `soundly.training` reaches.

    python benchmarks/explain.py sst [--data mnist] [--seeds 3] [--proofs 200] [--cache out] [--json]
    python benchmarks/explain.py int [--data digits] [--seeds 3] [--methods ...] [--gamma 3] [--cache out] [--json]

`sst`: a 784-128-64 network whose mask names the pixels that suffice for its prediction while the others move by 0.12.
Certified masking over all seeds, the other three maskings once; every network is measured under every masking, with no
mask and with a constant mask as controls, and its reasons on the first test images are given to `soundly.verify`.

`int`: interpretability-aware training against adversarial training: accuracy, accuracy under attack within the trained
distance and beyond, Kendall's tau between clean and attacked maps, and seconds per step.

What is trained is kept in the cache, so that an interrupted run goes on where it was.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from soundly.training import sst
from soundly.training.data import Images, read
from soundly.training.fit import fit
from soundly.training.interpretable import Loss, method
from soundly.training.maps import cnn
from soundly.training.masking import Baseline, Certified, Masking, Probabilistic, Robust
from soundly.training.report import Report, evaluate, prove, table
from soundly.training.stability import curve, stability

EPS = 0.12
METHODS = ("normal", "pgd", "trades", "ig-norm", "int-one-class", "int", "int2", "int-adv")


@dataclass(frozen=True)
class Setting:
    """What all methods share: the distance of every attack, the steps of the inner one, the epochs, the widths."""

    eps: float
    steps: int
    epochs: int
    widths: tuple[int, ...]


SETTINGS = {"digits": Setting(0.1, 10, 40, (16, 32, 32)), "mnist-5k": Setting(0.1, 5, 12, (8, 16, 16))}


def deviation(values: Sequence[float]) -> float:
    """The standard deviation; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, in percent."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation(values):.1f}"


def sst_run(data: str = "mnist", seeds: int = 3, proofs: int = 200, folder: Path = Path("out")) -> dict[str, Any]:
    """Accuracy, size and proven share of certified masking over seeds; the table of all maskings is printed."""
    images = read(data)
    measures: list[Masking] = [Baseline(), Probabilistic(EPS), Robust(EPS), Certified(EPS, method="crown-ibp")]
    trained: list[tuple[Masking, int]] = [(Certified(EPS), seed) for seed in range(seeds)]
    trained += [(masking, 0) for masking in measures[:3]]
    reports: dict[str, Report] = {}
    folder.mkdir(parents=True, exist_ok=True)
    seconds, explaining = [], []
    for masking, seed in trained:
        torch.manual_seed(seed)
        model = sst.mlp(images.shape, images.classes)
        file = folder / f"sst-{data}-{masking.name}-{seed}.pt"
        begun = time.process_time()
        sst.train(model, images.train, images.train_labels, masking, seed=seed, checkpoint=file)
        seconds.append(time.process_time() - begun)
        found = evaluate(model, images.test, images.test_labels, measures)
        begun = time.process_time()
        model.explain(images.test)
        explaining.append((time.process_time() - begun) / len(images.test))
        proved = prove(model, images.test[:proofs], eps=EPS, timeout=5)
        print(f"{masking.name} {seed}: trained in {seconds[-1]:.0f} CPU s, {proved}", file=sys.stderr, flush=True)
        reports[f"{masking.name} {seed}"] = Report(**{**vars(found), "proofs": proved})
    for line in table(reports):
        print(line)
    own = [r for title, r in reports.items() if title.startswith("certified")]
    shares = {
        "accuracy": [r.accuracy for r in own], "mask_size": [r.size for r in own],
        "proven": [r.proofs.rate for r in own if r.proofs],
        "empty": [r.empty["certified"] for r in own], "constant": [r.constant["certified"] for r in own],
    }  # fmt: skip
    for name, values in shares.items():
        print(f"{name:12} {spread(values)} %")
    return {
        "experiment": "sst", "data": data, "seeds": seeds, **{k: statistics.mean(v) for k, v in shares.items()},
        "spread": {k: deviation(v) for k, v in shares.items()},
        "seconds_per_explanation": statistics.mean(explaining), "training_cpu_seconds": seconds[:seeds],
    }  # fmt: skip


def int_run(
    data: str = "digits",
    seeds: int = 3,
    methods: Sequence[str] = METHODS,
    gamma: float = 3.0,
    folder: Path = Path("out"),
) -> dict[str, Any]:
    """For each method its clean accuracy, that within the trained distance and beyond, tau, and milliseconds per step,
    all means over seeds. Attacks: 40 steps, the first 500 test images."""
    images = read(data)
    setting = SETTINGS[data]
    eps = setting.eps
    x, y = images.test[:500], images.test_labels[:500]
    distances = [0.0, eps / 2, eps, 4 / 3 * eps, 2 * eps]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        for name in methods:
            loss = method(name, eps=eps, steps=setting.steps, gamma=gamma)
            torch.manual_seed(seed)
            model = cnn(images.shape, images.classes, setting.widths)
            fit(
                model, images.train, images.train_labels, lambda a, b, p, f=loss, m=model: f(m, a, b, p),
                epochs=setting.epochs, batch=64, lr=3e-3, seed=seed, about=(loss, setting),
                checkpoint=folder / f"int-{data}-{name}-{eps:g}-{gamma:g}-{seed}.pt",
            )  # fmt: skip
            rates, firm = curve(model, x, y, distances), stability(model, x, y, eps=eps)
            row = dict(zip(("clean", "half", "robust", "beyond", "twice"), rates, strict=True))
            found[name].append({**row, "tau": firm.tau, "kept": firm.kept})
            print(f"{name} {seed}: {found[name][-1]}", file=sys.stderr, flush=True)
    cost = step_cost(
        {name: method(name, eps=eps, steps=setting.steps, gamma=gamma) for name in methods}, images, setting
    )
    heads = ["clean", "half", "robust", "beyond", "twice", "tau", "kept"]
    print(f"{'':14}" + "".join(f"{head:>14}" for head in heads) + f"{'ms per step':>14}")
    for name, rows in found.items():
        cells = [spread([row[head] for row in rows]) for head in heads]
        print(f"{name:14}" + "".join(f"{cell:>14}" for cell in cells) + f"{1000 * cost[name]:>14.1f}")
    columns = {head: {name: [row[head] for row in rows] for name, rows in found.items()} for head in heads}
    return {
        "experiment": "int", "data": data, "seeds": seeds, "eps": eps, "gamma": gamma,
        **{head: {name: statistics.mean(v) for name, v in column.items()} for head, column in columns.items()},
        "spread": {head: {name: deviation(v) for name, v in column.items()} for head, column in columns.items()},
        "seconds_per_step": cost,
    }  # fmt: skip


def step_cost(losses: dict[str, Loss], images: Images, setting: Setting, repeats: int = 15) -> dict[str, float]:
    """Median CPU seconds of a training step, the methods taking turns so that the machine is the same for all."""
    model = cnn(images.shape, images.classes, setting.widths)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
    taken: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(repeats):
        for name, loss in losses.items():
            begun = time.process_time()
            value = loss(model, images.train[:64], images.train_labels[:64], 1.0)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            taken[name].append(time.process_time() - begun)
    return {name: statistics.median(times) for name, times in taken.items()}
