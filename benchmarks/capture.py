"""What capture costs, and what evaluating a captured network or its gradient costs beside PyTorch itself.

EfficientNet-Lite0 with its ImageNet weights (the demo's packages), or a small ResNet made here if they are missing.
Times are CPU seconds of this process, the least of several interleaved runs; ratios compare runs of one process.

    python benchmarks/capture.py [--repeats 10] [--json]
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import soundly


class Block(nn.Module):
    """Two convolutions with batch norm and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm_one, self.norm_two = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm_two(self.two(torch.relu(self.norm_one(self.one(x)))))
        return torch.relu(x + inner)


def resnet() -> nn.Module:
    """A small residual network on 64 x 64 images."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*stem, *(Block(64) for _ in range(6)), *head)


def model() -> tuple[str, nn.Module, Tensor]:
    """Name, module and example input."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    try:
        from photographs import efficientnet_lite0

        return "EfficientNet-Lite0", efficientnet_lite0(), torch.randn(1, 3, 224, 224)
    except ImportError as missing:
        print(f"{missing}; using a small ResNet")
        return "small ResNet", resnet().eval(), torch.randn(1, 3, 64, 64)


def least(repeats: int, *calls: Callable[[], object]) -> list[float]:
    """The least CPU time of each call, run in turn."""
    best = [float("inf")] * len(calls)
    for _ in range(repeats + 1):  # the first round warms up
        for i, call in enumerate(calls):
            started = time.process_time()
            call()
            best[i] = min(best[i], time.process_time() - started)
    return best


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    name, module, x = model()
    for parameter in module.parameters():
        parameter.requires_grad_(False)  # autograd shall compute what the gradient network computes, no more

    started = time.process_time()
    network = soundly.load(module, x)
    capture = time.process_time() - started
    started = time.process_time()
    gradient = network.gradient(of=3)
    differentiate = time.process_time() - started
    folded = soundly.fold_affine(network)

    def autograd() -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(module(leaf)[0, 3], leaf)[0]

    def plain(call: Callable[[Tensor], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return call(x)

        return run

    forward, ours, ours_folded = least(args.repeats, plain(module), plain(network), plain(folded))
    backward, ours_gradient = least(args.repeats, autograd, plain(gradient))
    result = {
        "model": name,
        "nodes": len(network.nodes),
        "gradient_nodes": len(gradient.nodes),
        "capture_cpu_seconds": capture,
        "differentiate_cpu_seconds": differentiate,
        "torch_forward_cpu_seconds": forward,
        "forward_ratio": ours / forward,
        "folded_forward_ratio": ours_folded / forward,
        "torch_gradient_cpu_seconds": backward,
        "gradient_ratio": ours_gradient / backward,
        "threads": torch.get_num_threads(),
    }
    for key, value in result.items():
        print(f"{key:<28} {value:.3g}" if isinstance(value, float) else f"{key:<28} {value}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
