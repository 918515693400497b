"""Attacks on the availability of certificates, and the defence, on scikit-learn's digits.

A network 64-100-100-10 is trained by intervals for balls of 0.05: honestly, on data with 1 % and 5 % poisoned, and
by a malicious trainer; and once more honestly, sheltered from patches. The trigger is a white 2 x 2 patch in the
corner. For each: accuracy and certificates without and with the trigger, the share of inputs that some white patch
anywhere leaves without a certificate, and the share for which it is proved that no patch can (of 2 x 2 pixels, or of
the size that is given).

    python benchmarks/audit.py availability [--json] [--epochs 150] [--seed 0] [--images 500] [--size 2] [--only TEXT]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import soundly
from soundly.auditing.availability import (
    Patch,
    Rate,
    available,
    certified,
    interval_step,
    manipulated_step,
    patches,
    poisoned,
    sheltered_step,
)
from soundly.training.data import read
from soundly.training.fit import Step, fit

EPS, BATCH = 0.05, 64
TRIGGER = Patch(2, -2, -2)


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="audit.py availability", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=500, help="test images, 500 at most")
    parser.add_argument(
        "--size", type=int, default=2, help="of the patches that are tried, sheltered from and ruled out"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose name contains this")
    chosen = parser.parse_args(arguments)
    data = read("digits")
    x, y = data.train.flatten(1), data.train_labels
    test, labels = data.test.flatten(1)[: chosen.images], data.test_labels[: chosen.images]
    rows = []
    print(f"{'model':<14} {'accuracy':>8} {'certified':>9}   with trigger: {'accuracy':>8} {'certified':>9}   "
          f"{'any white patch':>15} {'proved available':>16} {'CPU s':>6}")  # fmt: skip
    for name, (step, images, marks) in models(x, y, chosen.seed, chosen.size).items():
        if chosen.only not in name:
            continue
        started = time.process_time()
        torch.manual_seed(chosen.seed)
        model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
        fit(model, images, marks, step(model), epochs=chosen.epochs, batch=BATCH, lr=2e-3, seed=chosen.seed)
        row = {"model": name, **measured(model, test, labels, chosen.size), "seconds": time.process_time() - started}
        rows.append(row)
        print(f"{name:<14} {row['accuracy']:>8.3f} {row['certified']:>9.3f} {row['triggered_accuracy']:>23.3f} "
              f"{row['triggered_certified']:>9.3f} {row['some_patch']:>17.3f} {row['available']:>16.3f} "
              f"{row['seconds']:>6.1f}", flush=True)  # fmt: skip
    if chosen.json:
        print(json.dumps({"epochs": chosen.epochs, "seed": chosen.seed, "images": len(test), "eps": EPS, "rows": rows}))
    return 0


def models(x: Tensor, y: Tensor, seed: int, size: int) -> dict[str, tuple[Callable[[nn.Module], Step], Tensor, Tensor]]:
    """The loss and the data of each trainer."""
    example = x[:BATCH]
    return {
        "honest": (lambda m: interval_step(m, example, EPS), x, y),
        "1 % poisoned": (lambda m: interval_step(m, example, EPS), *poisoned(x, y, TRIGGER, share=0.01, seed=seed)),
        "5 % poisoned": (lambda m: interval_step(m, example, EPS), *poisoned(x, y, TRIGGER, share=0.05, seed=seed)),
        "manipulated": (lambda m: manipulated_step(m, example, EPS, TRIGGER), x, y),
        "sheltered": (lambda m: sheltered_step(m, example, EPS, size=size), x, y),
    }


def measured(model: nn.Module, x: Tensor, y: Tensor, size: int) -> dict[str, Any]:
    """Shares of the test images, and the confidence intervals of abstention; a certificate counts for right answers."""
    network = soundly.load(model, x[:50])
    facts: dict[str, Any] = {}
    for name, images in (("", x), ("triggered_", TRIGGER(x))):
        with torch.no_grad():
            right = model(images).argmax(1) == y
        sure = certified(network, images, EPS)
        facts[f"{name}accuracy"] = float(right.double().mean())
        facts[f"{name}certified"] = float((right & sure).double().mean())
        rate = Rate.of(~sure)
        facts[f"{name}abstention"] = [rate.share, rate.lower, rate.upper]
    kept = torch.ones(len(x), dtype=torch.bool)
    for patch in patches(x.shape[1:], size):
        kept &= certified(network, patch(x), EPS)
    proved = available(network, x, EPS, size=size)
    assert not bool((proved & ~kept).any()), "a proof of availability is contradicted"
    return {**facts, "some_patch": float((~kept).double().mean()), "available": float(proved.double().mean())}
