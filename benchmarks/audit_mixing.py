"""Mixtures of an accurate and a robust network on digits: clean accuracy, certified accuracy, attacks.

g is trained plainly, h by interval bounds; both are perceptrons with one hidden layer. Certified: the mixture's answer
is right and proved for every input within eps, whatever g says. Attacked: where it is certified, projected gradient
ascent on the mixture with 20 restarts of 40 steps; any success would be a defect.

    python benchmarks/audit.py mixing [--images N] [--json]
"""

import argparse
import json
import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import soundly
from soundly.auditing.mixing import least_margin, mixed, mixed_claim
from soundly.training.attack import ascend
from soundly.training.bounds import TrainingBounds
from soundly.training.data import read
from soundly.training.fit import fit

TRAINED, EPS = 0.1, 0.05
SHARES = (0.5, 0.55, 0.7, 0.84, 0.95, 1.0)
SCALE_G, SCALE_H = 1.0, 2.0


def networks(x: Tensor, y: Tensor) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    fit(g, x, y, lambda a, b, _: cross_entropy(g(a), b), epochs=60, lr=3e-3)
    torch.manual_seed(1)
    h = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    bounds = TrainingBounds(h, x[:64])

    def loss(a: Tensor, b: Tensor, passed: float) -> Tensor:
        share = min(1.0, 2 * passed)
        ends = ((a + s * share * TRAINED).clamp(0, 1) for s in (-1, 1))
        worst = cross_entropy(-bounds.margins(b, *ends, method="interval"), b)
        return (1 - share / 2) * cross_entropy(h(a), b) + share / 2 * worst

    fit(h, x, y, loss, epochs=40, lr=3e-3)
    return g, h


def attacked(f: Any, x: Tensor, label: int) -> bool:
    lower, upper = ((x + s * EPS).clamp(0, 1).expand(20, 1, -1) for s in (-1, 1))

    def loss(z: Tensor) -> Tensor:
        scores = f(z)[:, 0]
        return scores.index_fill(1, torch.tensor([label]), -math.inf).amax(1) - scores[:, label]

    return bool((f(ascend(loss, lower, upper, steps=40))[:, 0].argmax(1) != label).any())


def mixing(images: int) -> dict[str, Any]:
    data = read("digits")
    x, labels = data.test.flatten(1), data.test_labels
    models = networks(data.train.flatten(1), data.train_labels)
    g, h = (soundly.load(model, x[:1]) for model in models)

    def accuracy(scores: Tensor) -> float:
        return float((scores.argmax(-1) == labels).float().mean())

    with torch.no_grad():
        clean = [accuracy(model(x)) for model in models]
    print(f"clean accuracy: g {clean[0]:.3f}, h {clean[1]:.3f}")
    print(f"{'share of h':>10}{'margin':>9}{'clean':>8}{'certified':>11}{'attacked':>10}{'seconds':>9}")
    report: dict[str, Any] = {
        "experiment": "mixing", "eps": EPS, "images": images, "clean_g": clean[0], "clean_h": clean[1],
    }  # fmt: skip
    for a in SHARES:
        f = torch.vmap(mixed(g, h, a, scale_g=SCALE_G, scale_h=SCALE_H))
        own, kept, lost, begun = accuracy(f(x[:, None])[:, 0]), 0, 0, time.process_time()
        for image, label in zip(x[:images, None], labels[:images].tolist(), strict=True):
            if a <= 0.5 or int(models[1](image).argmax()) != label:
                continue  # half certifies nothing
            claim = mixed_claim(h, image, eps=EPS, a=a, label=label, scale_h=SCALE_H)
            if isinstance(soundly.verify(claim, timeout=5), soundly.Proved):
                kept += 1
                lost += attacked(f, image, label)
        seconds = (time.process_time() - begun) / images
        report[f"{a:g}"] = {"clean": own, "certified": kept / images, "attacked": lost, "seconds": seconds}
        print(f"{a:10g}{least_margin(a, 10) / SCALE_H:9.3f}{own:8.3f}{kept / images:11.2f}{lost:10d}{seconds:9.3f}",
              flush=True)  # fmt: skip
    return report


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="audit.py mixing", description=__doc__)
    parser.add_argument("--images", type=int, default=10, help="how many test images; default: 10")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parser.parse_args(arguments)
    report = mixing(given.images)
    if given.json:
        print(json.dumps(report))
    return 0
