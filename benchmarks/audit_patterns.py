"""Activation patterns: recall and precision by delta, exact queries with and without a pattern, minimal patterns.

Networks are trained here, adversarially where the name says so. All rates are of test images; seconds are the
processor's, measured in one run. A query asks whether a ball around a test image keeps its class; under the pattern,
for those inputs of the ball that follow it.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import soundly
from soundly.auditing.literals import minimal_pattern
from soundly.auditing.patterns import Measured, anyone, decide, mine, precision, recall, under
from soundly.spec.claim import top_k
from soundly.spec.region import Ball, Box
from soundly.training.data import read
from soundly.verification.verdict import Proved

Report = dict[str, Any]
DELTAS = ("1", "0.99", "0.95", "0.9")


def trained(x: Tensor, y: Tensor, sizes: list[int], *, eps: float, epochs: int, seed: int = 0) -> nn.Sequential:
    """A perceptron; with eps on the worst of a few steps of a projected gradient."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in zip([x.shape[1], *sizes], [*sizes, 10], strict=True):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for some in torch.randperm(len(x)).split(128):
            z = x[some]
            for _ in range(3 if eps else 0):
                z = z.detach().requires_grad_()
                (slope,) = torch.autograd.grad(cross_entropy(model(z), y[some]), z)
                z = torch.minimum(torch.maximum(z + eps / 2 * slope.sign(), x[some] - eps), x[some] + eps).clamp(0, 1)
            optimiser.zero_grad()
            cross_entropy(model(z.detach()), y[some]).backward()
            optimiser.step()
    return model


def coverage(network: Any, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Report]:
    """Per delta, summed over the classes: neurons fixed, recall, precision."""
    x, y, test, labels = data
    found = []
    for delta in DELTAS:
        shares, hits, own, followers, right = [], 0, 0, 0, 0
        for label in range(10):
            pattern = mine(network, x[y == label][:, None], delta=delta)
            here = recall(pattern, test[labels == label][:, None])
            there = precision(pattern, test[:, None], labels, label)
            shares.append(pattern.share)
            hits, own, right, followers = (
                hits + here.hits,
                own + here.count,
                right + there.hits,
                followers + there.count,
            )
        rows = {
            "delta": delta,
            "fixed": sum(shares) / 10,
            "recall": rate(hits, own),
            "precision": rate(right, followers),
        }
        middle, low, high = rows["recall"]
        print(
            f"  delta {delta:>4}: {rows['fixed']:.0%} of neurons fixed, recall {middle:.3f} [{low:.3f}, {high:.3f}], "
            f"precision {rows['precision'][0]:.3f}",
            flush=True,
        )
        found.append(rows)
    return found


def rate(hits: int, count: int) -> tuple[float, float, float]:
    measured = Measured(hits, count)
    return measured.rate, measured.lower, measured.upper


def queries(
    network: Any, model: nn.Module, data: tuple[Tensor, Tensor, Tensor, Tensor], radii: list[float], delta: str,
    timeout: float, images: int = 10,
) -> list[Report]:  # fmt: skip
    """The same balls with and without the pattern of the image's class: verdicts, seconds, bounds."""
    x, y, test, labels = data
    patterns = [mine(network, x[y == label][:, None], delta=delta) for label in range(10)]
    with torch.no_grad():
        right = (model(test).argmax(1) == labels).nonzero()[:, 0].tolist()
    chosen: dict[int, int] = {}
    for k in right:
        label = int(labels[k])
        if label not in chosen and bool(patterns[label].follows(test[k][None, None])):
            chosen[label] = k
    found = []
    for eps in radii:
        for label, k in sorted(chosen.items())[:images]:
            claim = soundly.robust(network, test[k][None], eps=eps, label=label)
            row: Report = {"eps": eps, "label": label}
            for name in ("plain", "pattern"):
                start = time.process_time()
                if name == "plain":
                    verdict = soundly.verify(claim, timeout=timeout)
                else:
                    verdict = decide(claim, patterns[label], samples=test[k][None, None], timeout=timeout).verdict
                row[name] = type(verdict).__name__
                row[f"{name}_seconds"] = time.process_time() - start
                row[f"{name}_parts"] = verdict.effort.subproblems
            found.append(row)
        here = [r for r in found if r["eps"] == eps]
        text = [f"  eps {eps}: "]
        for name in ("plain", "pattern"):
            kinds = [r[name] for r in here]
            counts = ", ".join(f"{kinds.count(kind)} {kind.lower()}" for kind in sorted(set(kinds)))
            seconds, parts = (sum(r[f"{name}_{what}"] for r in here) for what in ("seconds", "parts"))
            text.append(f"{name} {seconds:.1f} s, {parts} subproblems ({counts}) ")
        print("".join(text), flush=True)
    return found


def claims(network: Any, data: tuple[Tensor, Tensor, Tensor, Tensor], delta: str, timeout: float) -> Report:
    """The claims about the whole domain: the class of whatever follows, and that no input follows two patterns."""
    x, y, _, _ = data
    patterns = [mine(network, x[y == label][:, None], delta=delta) for label in range(10)]
    domain = Box(torch.zeros(1, x.shape[1]).double(), torch.ones(1, x.shape[1]).double())
    start = time.process_time()
    kinds: Report = {"class": {}, "apart": {}}
    for label in range(10):
        own = x[y == label][:1, None]
        verdict = decide(top_k(network, domain, [label], 1), patterns[label], samples=own, timeout=timeout).verdict
        kinds["class"][type(verdict).__name__] = kinds["class"].get(type(verdict).__name__, 0) + 1
        verdict = soundly.verify(
            under(anyone(network, domain), patterns[label], patterns[(label + 1) % 10]), timeout=timeout
        )
        kinds["apart"][type(verdict).__name__] = kinds["apart"].get(type(verdict).__name__, 0) + 1
    kinds["seconds"] = time.process_time() - start
    print(f"  on [0, 1]^n, delta {delta}: class {kinds['class']}, apart {kinds['apart']}, {kinds['seconds']:.1f} s",
          flush=True)  # fmt: skip
    return kinds


def minimal(network: Any, data: tuple[Tensor, Tensor, Tensor, Tensor], eps: float, delta: str, search: float) -> Report:
    """How many of a pattern's neurons balls need that are not robust without it, or that are."""
    x, y, test, labels = data
    sizes, before, seconds, recalls = [], [], 0.0, []
    for label in range(10):
        pattern = mine(network, x[y == label][:, None], delta=delta)
        k = next((k for k in (labels == label).nonzero()[:, 0].tolist() if pattern.follows(test[k][None, None])), None)
        if k is None:
            continue
        claim = top_k(network, Ball(test[k][None], eps, clip=Box(torch.zeros(1, x.shape[1]).double(),
                      torch.ones(1, x.shape[1]).double())), [label], 1)  # fmt: skip
        start = time.process_time()
        found = minimal_pattern(claim, pattern, search=search, samples=test[k][None, None], timeout=60)
        seconds += time.process_time() - start
        if isinstance(found.verdict, Proved):
            sizes.append(len(found.pattern))
            before.append(len(pattern))
            own = test[labels == label][:, None]
            recalls.append((recall(pattern, own).rate, recall(found.pattern, own).rate))
    print(f"  minimal at eps {eps}, delta {delta}: {before} -> {sizes} neurons, {seconds:.1f} s", flush=True)
    return {"eps": eps, "delta": delta, "before": before, "after": sizes, "seconds": seconds, "recall": recalls}


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="audit.py patterns", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a shorter run")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parser.parse_args(arguments)
    report = patterns(quick=given.quick)
    if given.json:
        print(json.dumps(report))
    return 0


def patterns(*, quick: bool) -> Report:
    report: Report = {}
    digits = read("digits")
    data = (digits.train.flatten(1), digits.train_labels, digits.test.flatten(1), digits.test_labels)
    for name, sizes, eps in (("digits 2x24", [24, 24], 0.0), ("digits 4x64, adversarial", [64] * 4, 0.1)):
        model = trained(data[0], data[1], sizes, eps=eps, epochs=40)
        network = soundly.load(model, data[2][:1])
        with torch.no_grad():
            accuracy = float((model(data[2]).argmax(1) == data[3]).float().mean())
        print(f"{name}: accuracy {accuracy:.3f}")
        report[name] = {"accuracy": accuracy, "coverage": coverage(network, data)}
        radii = [0.05, 0.12]
        report[name]["queries"] = queries(network, model, data, radii, "1", 30.0 if quick else 120.0)
        if len(sizes) == 2:
            report[name]["claims"] = claims(network, data, "1", 5.0)
            report[name]["minimal"] = minimal(network, data, 0.1, "1", 1.0)
    images = read("mnist-5k")
    data = (images.train.flatten(1), images.train_labels, images.test.flatten(1), images.test_labels)
    model = trained(data[0], data[1], [128, 128], eps=0.1, epochs=15)
    network = soundly.load(model, data[2][:1])
    with torch.no_grad():
        accuracy = float((model(data[2]).argmax(1) == data[3]).float().mean())
    print(f"MNIST (5,000 images) 2x128, adversarial: accuracy {accuracy:.3f}")
    report["mnist"] = {"accuracy": accuracy, "coverage": coverage(network, data)}
    report["mnist"]["queries"] = queries(
        network, model, data, [0.05] if quick else [0.05, 0.08], "1", 10.0 if quick else 30.0
    )
    return report
