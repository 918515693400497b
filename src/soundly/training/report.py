"""What a self-explaining network's reasons are worth: size, faithfulness under every masking, controls, proofs.

A small faithful mask means little by itself. Two controls are always reported beside it: the empty mask (a robust
network needs no reason) and one constant mask of the same size for all inputs (a network may ignore the rest). And each
masking is measured, whichever was trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.explanation.reason import certify_mask
from soundly.graph.load import load
from soundly.training.masking import Masking
from soundly.training.sst import THRESHOLD, SelfExplaining
from soundly.verification.verdict import Proved, Refuted

CHUNK = 100


@dataclass(frozen=True)
class Proofs:
    """Verdicts on reasons, counted; what is unknown belongs to neither side."""

    proved: int
    refuted: int
    unknown: int

    @property
    def rate(self) -> float:
        """The share that is proved, of all."""
        return self.proved / max(1, self.proved + self.refuted + self.unknown)


@dataclass(frozen=True)
class Report:
    """Shares, from 0 to 1.

    Attributes:
        accuracy: on all examples.
        size: mean share of features in a reason.
        varying: share of features that some reasons hold and others do not (between 1% and 99% of them).
        faithful, empty, constant: by masking, how often the prediction stays: with the network's reasons, with no
            reason, and with the features that are most often in a reason, as many as a reason has in the mean.
        proofs: by `soundly.verify`, of the first examples' reasons.
    """

    accuracy: float
    size: float
    varying: float
    faithful: Mapping[str, float]
    empty: Mapping[str, float]
    constant: Mapping[str, float]
    proofs: Proofs | None = None


def evaluate(
    model: SelfExplaining, x: Tensor, y: Tensor, maskings: Sequence[Masking], *, measured: int = 500, seed: int = 0
) -> Report:
    """Measures a network's reasons, without proofs; `prove` adds these.

    Args:
        x, y: test examples; accuracy and size are of all.
        measured: how many of the first are used for faithfulness; a multiple of 100.
    """
    if not len(x):
        raise InvalidInput("there are no examples to evaluate.")
    explained = [model.explain(part) for part in x.split(1000)]
    predicted, masks = (torch.cat(parts) for parts in zip(*explained, strict=True))
    often = masks.float().mean(0)
    size = float(often.mean())
    kept = often.flatten().argsort(descending=True)[: round(size * often.numel())]
    constant = torch.zeros_like(often).flatten().index_fill(0, kept, 1.0).reshape(often.shape)
    rates: dict[str, dict[str, float]] = {"faithful": {}, "empty": {}, "constant": {}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.no_grad():
            inputs = model.embed(x[:measured])
        for masking in maskings:
            stays: dict[str, list[Tensor]] = {name: [] for name in rates}
            for i in range(0, len(inputs), CHUNK):
                part, label = inputs[i : i + CHUNK], predicted[i : i + CHUNK]
                own = masks[i : i + CHUNK].to(part)
                for name, mask in (
                    ("faithful", own), ("empty", torch.zeros_like(own)), ("constant", constant.expand_as(own)),
                ):  # fmt: skip
                    stays[name].append(masking.faithful(model.classifier, part, mask, label).detach())
            for name, found in stays.items():
                rates[name][masking.name] = float(torch.cat(found).float().mean())
    varying = ((often > 0.01) & (often < 0.99)).float().mean()
    accuracy = float((predicted == y).float().mean())
    return Report(accuracy, size, float(varying), rates["faithful"], rates["empty"], rates["constant"])


def prove(
    model: SelfExplaining,
    x: Tensor,
    *,
    eps: float,
    clip: tuple[float, float] | None = (0.0, 1.0),
    timeout: float = 20.0,
    progress: Callable[[Proofs], None] | None = None,
) -> Proofs:
    """Asks `soundly.certify_mask` of each example whether its reason is sufficient within eps: every proof is checked.

    Args:
        x: examples [n, ...]; embedded ones where the network embeds its inputs.
        timeout: seconds for each.
    """
    network = load(model.classifier, x[:1])
    found = Proofs(0, 0, 0)
    logits, scores = (v.detach() for v in model.both(x))
    reasons = scores.sigmoid() >= THRESHOLD
    for one, label, reason in zip(x.split(1), logits.argmax(1).tolist(), reasons.split(1), strict=True):
        match certify_mask(network, one, reason, eps=eps, target=label, clip=clip, timeout=timeout):
            case Proved():
                found = replace(found, proved=found.proved + 1)
            case Refuted():
                found = replace(found, refuted=found.refuted + 1)
            case _:
                found = replace(found, unknown=found.unknown + 1)
        if progress is not None:
            progress(found)
    return found


def table(reports: Mapping[str, Report]) -> Iterator[str]:
    """One line per network, in percent; behind each faithfulness the two controls: no mask, a constant mask."""
    names = list(next(iter(reports.values())).faithful)
    heads = "".join(f"{name:>22}" for name in names)
    yield f"{'':<20}{'accuracy':>9}{'size':>7}{'varying':>9}{'proved':>8}{heads}"
    for title, r in reports.items():
        cells = "".join(f"{f'{r.faithful[n]:.1%} ({r.empty[n]:.0%}, {r.constant[n]:.0%})':>22}" for n in names)
        proved = "-" if r.proofs is None else f"{r.proofs.rate:.1%}"
        yield f"{title:<20}{r.accuracy:>9.1%}{r.size:>7.1%}{r.varying:>9.1%}{proved:>8}{cells}"


def plot(reports: Mapping[str, Report], file: str | os.PathLike[str]) -> None:
    """Draws size against faithfulness: one line per masking, its two controls in the same colour beside it.

    Args:
        file: .png, .svg or .pdf.

    Raises:
        InvalidInput: matplotlib is not installed (extra `report`).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise InvalidInput("plot needs matplotlib: pip install soundly[report]") from missing
    rows = sorted(reports.values(), key=lambda r: r.size)
    sizes = [100 * r.size for r in rows]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in rows[0].faithful:
        (line,) = axes.plot(sizes, [100 * r.faithful[name] for r in rows], "o-", label=name)
        axes.plot(sizes, [100 * r.constant[name] for r in rows], "x--", color=line.get_color(), alpha=0.6)
        axes.plot(sizes, [100 * r.empty[name] for r in rows], ".:", color=line.get_color(), alpha=0.6)
    if all(r.proofs for r in rows):
        axes.plot(sizes, [100 * r.proofs.rate for r in rows if r.proofs], "ks-", label="proved")
    axes.set(xlabel="features in a reason, %", ylabel="predictions that stay, %", ylim=(0, 102))
    axes.legend(title="dashed: one constant mask\ndotted: no mask", loc="lower right")
    figure.savefig(file)
