"""Float against quantised networks on digits: the proved gap, the largest found, and what the plain difference proves.

A 64-64-32-10 perceptron; boxes of radius 0.02 around test images. `plain` is the bound of the two outputs' difference
without carrying it through the layers.

    python benchmarks/audit.py equivalence [--images N] [--json]
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import soundly
from soundly.auditing.quantisation import quantise
from soundly.graph.linear import reshape, subtract
from soundly.graph.node import Constant
from soundly.graph.simplify import rebuild
from soundly.spec.claim import within
from soundly.training.data import read
from soundly.training.fit import fit
from soundly.verification.problem import problem_of
from soundly.verification.root import root

EPS = 0.02
KINDS: tuple[dict[str, Any], ...] = (
    {"bits": 4}, {"bits": 5}, {"bits": 6}, {"bits": 7}, {"bits": 8}, {"bits": 8, "per": "channel"},
    {"bits": 8, "activations": 6},
)  # fmt: skip


def plain(net: soundly.Network, other: soundly.Network, box: soundly.Box) -> float:
    """The bound of net - other by the bounds of both."""
    leaves = {n: Constant(f"other {i}", n.shape)() for i, n in enumerate(other.values)} | {other.input: net.input}
    output = rebuild(other.outputs, lambda old, node: leaves.get(old, node))[other.output]
    values = {**net.values, **{leaves[n]: v for n, v in other.values.items()}}
    size = net.output.shape
    both = soundly.Network(net.inputs, (reshape(subtract(net.output, output), size),), values)
    return float((-root(problem_of(within(both, box, 0.0, 0.0)), sums=False).bound).max())


def equivalence(images: int) -> dict[str, Any]:
    data = read("digits")
    x, y = data.train.flatten(1), data.train_labels
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    fit(model, x, y, lambda a, b, _: cross_entropy(model(a), b), epochs=30, lr=3e-3)
    net = soundly.load(model, x[:1])
    report: dict[str, Any] = {"experiment": "equivalence", "eps": EPS, "images": images}
    print(f"{'':28}{'proved':>9}{'found':>9}{'plain':>9}{'ratio':>7}{'same class':>12}{'seconds':>9}")
    for kind in KINDS:
        other = quantise(net, **kind, calibration=x[:100, None])
        rows, same, proved, begun = [], 0, 0, time.process_time()
        for image in data.test[:images].flatten(1):
            box = soundly.Box((image[None] - EPS).clamp(0, 1), (image[None] + EPS).clamp(0, 1))
            found = soundly.gap(net, other, box, timeout=60)
            proved += isinstance(found.verdict, soundly.Proved)
            same += isinstance(soundly.verify(soundly.same_argmax(net, other, box), timeout=10), soundly.Proved)
            rows.append((found.upper, found.reached, plain(net, other, box)))
        seconds = (time.process_time() - begun) / images
        upper, reached, loose = (statistics.mean(column) for column in zip(*rows, strict=True))
        name = ", ".join(f"{key} {value}" for key, value in kind.items())
        report[name] = {
            "upper": upper, "reached": reached, "plain": loose, "same": same / images, "proved": proved / images,
            "seconds": seconds,
        }  # fmt: skip
        print(f"{name:28}{upper:9.4f}{reached:9.4f}{loose:9.4f}{upper / reached:7.2f}{same:>9}/{images}{seconds:9.2f}",
              flush=True)  # fmt: skip
    return report


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="audit.py equivalence", description=__doc__)
    parser.add_argument("--images", type=int, default=10, help="how many test images; default: 10")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parser.parse_args(arguments)
    report = equivalence(given.images)
    if given.json:
        print(json.dumps(report))
    return 0
