"""Provable editing: ProGrad's experiments, and what goes beyond them.

    python benchmarks/edit.py function    a tanh network under -x <= N'(x) <= x: at 2048 points, and for every x
    python benchmarks/edit.py interior    inner layers of small networks, up to 40 points
    python benchmarks/edit.py region      caps on partial derivatives for all inputs of a box
    python benchmarks/edit.py gradcam     Grad-CAM maps of real networks on real photographs
    python benchmarks/edit.py ig          Integrated Gradients of a language model

Every experiment takes --json and then prints one JSON object as its last line. Published figures are those of Tao and
Thakur, "Provable Gradient Editing of Deep Neural Networks", NeurIPS 2025, with Gurobi on a server.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import soundly
from soundly.editing.constraints import Constraint
from soundly.training.constrained import fit

Report = dict[str, Any]


def mlp(*widths: int, act: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(a, b)] + [act()] * (i + 2 < len(widths))
    return nn.Sequential(*layers)


# -- the function experiment


def wanted(x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) = -x cos x + sin x and its derivative x sin x, which lies between -x and x."""
    return -x * torch.cos(x) + torch.sin(x), x * torch.sin(x)


def trained(xs: Tensor, epochs: int) -> nn.Sequential:
    """The paper's protocol: 4 layers, 100 wide, tanh; Adam 0.01, decay 0.997, batches of 64; values and slopes."""

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        x = batch.requires_grad_()
        y = module(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        f, df = wanted(x.detach())
        return (y - f).square().mean() + (slope - df).square().mean()

    torch.manual_seed(0)
    module = mlp(1, 100, 100, 100, 1, act=nn.Tanh)
    fit(module, xs.float(), loss, epochs=epochs, batch=64, learning_rate=1e-2, decay=0.997)
    return module


def errors(module: nn.Module, xs: Tensor) -> tuple[int, float, float]:
    """Violations of -x <= N'(x) <= x, mean squared errors of slopes and of values, by autograd in float64."""
    x = xs.clone().requires_grad_()
    y = copy.deepcopy(module).double()(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    f, df = wanted(xs)
    violations = int((slope.abs() > xs).sum())
    return violations, float((slope - df).square().mean()), float((y.detach() - f).square().mean())


def function(args: argparse.Namespace) -> Report:
    end = 3 * math.pi
    xs = (torch.arange(1, 2049, dtype=torch.float64) * end / 2048)[:, None]  # at 0 only equality would do
    clock = time.perf_counter()
    module = trained(xs, args.epochs)
    training, before = time.perf_counter() - clock, errors(module, xs)
    network = soundly.load(module, torch.zeros(1, 1))

    clock = time.perf_counter()
    goals, constraints = [], []
    values, slopes = wanted(xs)
    for x, f, df in zip(xs, values, slopes, strict=True):
        point = soundly.at(x[None], name=f"x = {float(x):.4f}")
        goals += [point.gradient(of=0).near(df), point.output(of=0).near(f)]
        if float(x) < 0.01 or args.points:
            constraints.append(point.gradient(of=0).within(-x, x))
    area = soundly.over(soundly.Box(torch.tensor([[0.01]]).double(), torch.tensor([[end]]).double()), name="0.01..3 pi")
    if not args.points:
        slope, x = area.gradient(of=0), area.coordinates()
        constraints += [(slope - x).at_most(0.0), (slope + x).at_least(0.0)]
    edit = soundly.edit(
        network, constraints, layer="6", goals=goals, goal_weight=1 / args.ridge, time_limit=300, progress=print
    )
    seconds = time.perf_counter() - clock
    print(f"trained in {training:.0f} s: {before[0]} of 2048 violated, slopes {before[1]:.3g}, values {before[2]:.3g}")
    print(f"edit {edit.status} {edit.reason}: stating and solving {seconds - edit.seconds['check']:.2f} s, proof "
          f"{edit.seconds['check']:.2f} s")  # fmt: skip
    report: Report = {
        "experiment": "function", "constraints": edit.rows, "proven": edit.proven, "seconds": edit.seconds["solve"],
        "seconds_all": seconds, "interval_proven": edit.status == "proved" and not args.points,
        "interval_seconds": edit.seconds["check"], "before": before,
    }  # fmt: skip
    if edit.model is not None:
        after = errors(edit.applied_to(module), xs)
        print(f"edited: {after[0]} of 2048 violated, slopes {after[1]:.3g}, values {after[2]:.3g}"
              "   (published: 0, 1.09e-4, 1.5e-5, in 10 s, at the samples)")  # fmt: skip
        change = max(float(d.abs().max()) for d in edit.delta.values())
        report |= {"violations": after[0], "gradient_mse": after[1], "output_mse": after[2], "largest_change": change}
    return report


# -- inner layers at points


def interior(args: argparse.Namespace) -> Report:
    """Gradients and outputs of a random network moved to those of another, at 40 points; conv nets as well."""
    torch.manual_seed(0)
    cases: list[tuple[str, nn.Sequential, str, tuple[int, ...], int]] = [
        ("MLP 2-64-64-64-1, second layer", mlp(2, 64, 64, 64, 1, act=nn.ReLU), "2", (1, 2), 40),
        ("MLP 2-64-64-64-1, second layer, GELU", mlp(2, 64, 64, 64, 1, act=nn.GELU), "2", (1, 2), 40),
        ("conv net 8-16, second convolution", conv_net(), "3", (1, 1, 8, 8), 40),
    ]
    cases += [(f"MLP 2-32-32-32-1, seed {i}", mlp(2, 32, 32, 32, 1, act=nn.ReLU), str(2 * (i % 3)), (1, 2), 10)
              for i in range(args.random)]  # fmt: skip
    rows = proven = found = 0
    table = []
    for i, (name, module, layer, shape, points) in enumerate(cases):
        torch.manual_seed(i)
        constraints = towards_another(module, layer, shape, points)
        network = soundly.load(module, torch.zeros(shape))
        clock, cpu = time.perf_counter(), time.process_time()
        edit = soundly.edit(network, constraints, layer=layer, time_limit=args.limit)
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
        found += edit.status == "proved"
        rows, proven = rows + edit.rows, proven + edit.proven
        table.append({"case": name, "status": edit.status, "rows": edit.rows, "before": edit.rows_before,
                      "seconds": clock, "cpu_seconds": cpu, "solve": edit.seconds["solve"]})  # fmt: skip
        print(f"{name:40} {edit.status:10} {edit.rows_before:4} of {edit.rows} rows held before, {clock:.1f} s "
              f"({cpu:.1f} CPU s) {edit.reason[:80]}")  # fmt: skip
    return {"experiment": "interior", "constraints": rows, "proven": proven, "found": found / len(cases),
            "seconds": sum(row["seconds"] for row in table), "cases": table}  # fmt: skip


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1),
    )  # fmt: skip


def towards_another(module: nn.Sequential, layer: str, shape: tuple[int, ...], points: int) -> list[Constraint]:
    """At random points, two gradient entries and the output within 2 and 5 % of those of the network with noise on the
    layer: a change exists, perhaps only across other activation patterns."""
    star = copy.deepcopy(module).double()
    weight = star.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight += 0.5 * weight.std() * torch.randn_like(weight)
    constraints: list[Constraint] = []
    seen = []
    for i in range(points):
        x = torch.rand(shape) * 2 - 1
        wide = x.double().requires_grad_()
        y = star(wide)
        (slope,) = torch.autograd.grad(y.sum(), wide)
        seen.append((soundly.at(x, name=f"x{i}"), slope.reshape(-1)[:2], float(y.detach())))
    size = max(float(slope.abs().max()) for _, slope, _ in seen)
    spread = max(abs(y) for _, _, y in seen)
    for point, slope, y in seen:
        constraints.append(point.gradient(of=0, entries=[0, 1]).within(slope - 0.02 * size, slope + 0.02 * size))
        constraints.append(point.output(of=0).within(y - 0.05 * spread, y + 0.05 * spread))
    return constraints


# -- regions


def region(args: argparse.Namespace) -> Report:
    """The largest partial derivative over a box is capped below what it was, for every input."""
    # The last box is small: bounds on slopes widen with every input, and halving all of eight takes 256 parts.
    cases = [(d, (d, *(24,) * depth, 1), act, layer, radius)
             for d, depth, act, layer, radius in (
                 (2, 1, nn.ReLU, "0", 0.5), (2, 2, nn.ReLU, "4", 0.5), (2, 2, nn.ReLU, "2", 0.5),
                 (2, 3, nn.ReLU, "6", 0.5), (3, 2, nn.Tanh, "2", 0.5), (4, 2, nn.Tanh, "4", 0.5),
                 (8, 2, nn.Tanh, "2", 0.1))]  # fmt: skip
    table, rows, proven = [], 0, 0
    for i, (d, widths, act, layer, radius) in enumerate(cases):
        torch.manual_seed(i)
        module = mlp(*widths, act=act)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter *= 1.8
        network = soundly.load(module, torch.zeros(1, d))
        box = soundly.Box(torch.full((1, d), -radius), torch.full((1, d), radius))
        slopes = torch.vmap(network.gradient(of=0))(box.samples(4000).float())[..., 0]
        most, least = float(slopes.max()), float(slopes.min())
        cap = most - 0.3 * (most - least)
        constraint = soundly.over(box, name="box").gradient(of=0, entries=[0]).at_most(cap)
        clock, cpu = time.perf_counter(), time.process_time()
        edit = soundly.edit(network, [constraint], layer=layer, time_limit=args.limit)
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
        rows, proven = rows + edit.rows, proven + edit.proven
        name = f"{'-'.join(map(str, widths))} {act.__name__}, layer {layer}, within {radius}"
        after = math.nan
        if isinstance(edit.model, soundly.Network):
            after = float(torch.vmap(edit.model.gradient(of=0))(box.samples(20000).float())[..., 0].max())
        print(f"{name:40} {edit.status:9} largest slope seen {most:.3f} -> {after:.4f}, cap {cap:.4f}, {clock:.1f} s "
              f"({cpu:.1f} CPU s) {edit.reason[:60]}")  # fmt: skip
        table.append({"case": name, "status": edit.status, "cap": cap, "before": most, "after": after,
                      "seconds": clock, "cpu_seconds": cpu})  # fmt: skip
    return {"experiment": "region", "constraints": rows, "proven": proven,
            "seconds": sum(row["seconds"] for row in table), "cases": table}  # fmt: skip


def gradcam(args: argparse.Namespace) -> Report:
    from edit_gradcam import run

    return run(args.images)


def ig(args: argparse.Namespace) -> Report:
    from edit_lm import run

    found = run(args.sentences)
    for name, value in found.items():
        print(f"{name:28} {value}")
    parts = sum(seconds for name, seconds in found.items() if name.endswith("_seconds") and name != "cpu_seconds")
    return {"experiment": "ig", "constraints": found["rows"], "proven": found["proven_rows"], "seconds": parts, **found}


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "function": function, "interior": interior, "region": region, "gradcam": gradcam, "ig": ig,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--epochs", type=int, default=300, help="function: epochs of training")
    parser.add_argument("--ridge", type=float, default=1e-8, help="function: weight of the change beside the errors")
    parser.add_argument("--points", action="store_true", help="function: constrain the samples only")
    parser.add_argument("--random", type=int, default=30, help="interior: random cases that have an answer")
    parser.add_argument("--images", type=int, default=100, help="gradcam: how many noisy crops")
    parser.add_argument("--sentences", type=int, default=100, help="ig: how many misclassified sentences")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one edit")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    report = EXPERIMENTS[args.experiment](args)
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
