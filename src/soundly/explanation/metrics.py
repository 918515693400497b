"""What explanations are worth, measured alike: a row of one table each, whatever made them.

A method gives masks, or maps whose largest scores become masks. Each mask is asked the questions of sufficiency that
there are: does the answer stay when the other features take one value, random values, the worst ones that an attack
finds, any at all (proved)? Each is ranked as well: how fast does the answer appear and vanish along it? A mask is a map
of two values, and features of one value come and go together.

References: Bassan et al., "Explain Yourself, Briefly!", ICLR 2025 (kinds of sufficiency); Petsiuk et al., "RISE", BMVC
2018 (insertion, deletion); Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.explanation.question import Question, as_tensor, question, top_mask
from soundly.explanation.reason import Reason
from soundly.graph.network import Network
from soundly.spec.region import Box
from soundly.verification.verdict import Proved, Refuted
from soundly.verification.verify import verify

Method: TypeAlias = Callable[[Tensor, int], Any]
"""From an input [1, ...] and the network's answer there to a `Reason`, a Boolean mask, or a map of scores."""

NOTHING = "(nothing)"
"""The control: the mask that keeps no feature."""


@dataclass(frozen=True)
class Row:
    """One method, in means over inputs; shares are from 0 to 1.

    Attributes:
        size: the share of features that its masks keep.
        seconds: of wall-clock time for an explanation; None where they were given.
        late: how many explanations took longer than the limit.
        baseline: how often the answer stays when all other features take the value of the baseline.
        random: which share of random completions within the region keeps the answer.
        robust: how often no counterexample was found. Not less than `proved`; the difference is unknown.
        proved: how often no counterexample exists: with a certificate.
        insertion, deletion: area under the probability of the answer, while features are taken from the input into the
            baseline, or from it into the input, largest scores first. Good are a large and a small one.
        infidelity: mean squared error of the change of the answer's logit that a map predicts for random changes within
            the region, the map being scaled so that it is least. None for masks.
    """

    method: str
    size: float
    seconds: float | None
    late: int
    baseline: float
    random: float
    robust: float
    proved: float
    insertion: float
    deletion: float
    infidelity: float | None


@dataclass(frozen=True)
class Comparison:
    """Rows, in the order of the methods; the last one is the control that keeps nothing. Prints as a table."""

    rows: tuple[Row, ...]
    inputs: int

    def __str__(self) -> str:
        cells = [[cell.replace("_", " ") for cell in line] for line in self._cells()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in cells
        )

    def markdown(self) -> str:
        """The table for a Markdown page."""
        head, *body = self._cells()
        return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---", *["---:"] * (len(head) - 1)], *body])

    def records(self) -> list[dict[str, Any]]:
        """The rows as dictionaries, for JSON or a data frame."""
        return [asdict(row) for row in self.rows]

    def _cells(self) -> Iterator[list[str]]:
        names = [f.name for f in fields(Row)]
        yield ["", *names[1:]]
        for row in self.rows:
            yield [_cell(name, getattr(row, name)) for name in names]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("method", "late"):
        return str(value)
    return f"{value:.2g}" if name in ("seconds", "infidelity") else f"{value:.1%}"


def compare(
    network: Network,
    inputs: Tensor,
    methods: Mapping[str, Method | Any],
    *,
    eps: float | None = None,
    box: Box | None = None,
    clip: tuple[float, float] | Box | None = (0.0, 1.0),
    groups: Any = None,
    keep: int | float | str | None = None,
    baseline: Tensor | float = 0.0,
    samples: int = 100,
    limit: float = 600.0,
    timeout: float = 10.0,
    seed: int = 0,
) -> Comparison:
    """Measures explanations of a network's own answers.

    What a method says of its masks is not taken over: every mask is given to `verify`.

    Args:
        inputs: [n, ...].
        methods: by name; or instead of a function its results, an array [n, ...] of masks (Boolean) or scores.
        eps, box, clip, groups: where features may move, and what a feature is: as in `certify_mask`.
        keep: how many features maps keep: a number, a share, or the name of the method whose sizes they get, input by
            input.
        baseline: what features become that are deleted: a number, or a tensor that fits the input.
        samples: random completions of each input.
        limit: seconds; explanations that took longer are counted as late.
        timeout: seconds for each proof.

    Raises:
        InvalidInput: what a method returns does not fit the input; a map comes without `keep`.
    """
    shape = network.input.shape
    if not len(inputs) or shape[:1] != (1,) or tuple(inputs.shape[1:]) != shape[1:]:
        raise InvalidInput(f"inputs have shape {tuple(inputs.shape)}; give [n, {', '.join(map(str, shape[1:]))}].")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*methods, NOTHING)}
    for i, x in enumerate(inputs.to(network.dtype).split(1)):
        about = question(network, x, eps=eps, box=box, clip=clip, groups=groups)
        measure = _Measure(network, about, x, baseline, samples, seed + i)
        given = {name: _given(about, method, x, measure.label, i) for name, method in methods.items()}
        given[NOTHING] = _Given(torch.zeros(about.features, dtype=torch.bool), None, None, None)
        for name, explanation in given.items():
            scores, mask = explanation.scores, explanation.mask
            if mask is None:
                mask = top_mask(scores, _count(keep, given, about.features, name))
            verdict = verify(about.freed(mask), timeout=timeout)
            insertion, deletion = measure.curves(mask.double() if scores is None else scores)
            found[name].append({
                "size": float(mask.double().mean()), "seconds": explanation.seconds,
                "late": explanation.seconds is not None and explanation.seconds > limit,
                "baseline": measure.baseline(mask), "random": measure.random(mask),
                "robust": not isinstance(verdict, Refuted), "proved": isinstance(verdict, Proved),
                "insertion": insertion, "deletion": deletion,
                "infidelity": None if explanation.map is None else measure.infidelity(explanation.map),
            })  # fmt: skip
    return Comparison(tuple(_row(name, records) for name, records in found.items()), len(inputs))


def insertion_deletion(
    network: Network, x: Tensor, scores: Any, *, of: int, baseline: Tensor | float = 0.0
) -> tuple[float, float]:
    """Areas under the probability of output `of` while features come in and go out, largest scores first.

    Features of equal scores go together, and at most 64 steps are evaluated. Between two steps the curve is a line.

    Args:
        x: [1, ...], in the network's dtype.
        scores: of x's shape.
    """
    given = as_tensor(scores).double().expand(x.shape).reshape(-1)
    return _curves(network, x, given, torch.arange(x.numel()), of, baseline)


def infidelity(network: Network, x: Tensor, map: Any, changed: Tensor, *, of: int, scaled: bool = False) -> float:
    """Mean of (<map, x - z> - (f(x) - f(z)))^2 over changed inputs z, for the output f at position `of`.

    Args:
        map: the attribution, of x's shape.
        changed: inputs z [k, ...].
        scaled: of the map, times the factor that makes it least (captum: normalize=True).
    """
    of_z = torch.vmap(network)(changed[:, None].to(network.dtype)).reshape(len(changed), -1)[:, of].double()
    true = network(x).detach().reshape(-1)[of].double() - of_z.detach()
    moved = (x.double() - changed.double()).reshape(len(changed), -1)
    told = moved @ as_tensor(map).double().expand(x.shape).reshape(-1)
    if scaled and float(told.square().sum()) > 0:
        told = told * (float(told @ true) / float(told.square().sum()))
    return float((told - true).square().mean())


@dataclass(frozen=True, eq=False)
class _Given:
    """What a method said of one input: a mask or scores [features], the scores as they were if they are a map."""

    mask: Tensor | None
    scores: Tensor | None
    map: Tensor | None
    seconds: float | None


def _given(about: Question, method: Method | Any, x: Tensor, label: int, i: int) -> _Given:
    seconds = None
    if callable(method):
        begun = time.perf_counter()
        said = method(x, label)
        seconds = time.perf_counter() - begun
    else:
        said = method[i]
    if isinstance(said, Reason):
        return _Given(said.kept, None, None, seconds)
    values = as_tensor(said)
    if values.dtype == torch.bool:
        return _Given(about.kept(values), None, None, seconds)
    scores, map = about.scores(values)
    return _Given(None, scores, map, seconds)


def _count(keep: int | float | str | None, given: Mapping[str, _Given], features: int, name: str) -> int:
    if isinstance(keep, str):
        sizes = given[keep].mask if keep in given else None
        if sizes is None:
            raise InvalidInput(f"keep is {keep!r}, which is not the name of a method that gives masks.")
        return int(sizes.sum())
    if keep is None:
        raise InvalidInput(f"{name} gives scores; say with keep how many features its masks keep.")
    return keep if isinstance(keep, int) else round(keep * features)


def _row(name: str, records: list[dict[str, Any]]) -> Row:
    def mean(key: str) -> float | None:
        values = [float(r[key]) for r in records if r[key] is not None]
        return math.fsum(values) / len(values) if values else None

    return Row(name, late=sum(r["late"] for r in records),
               **{f.name: mean(f.name) for f in fields(Row) if f.name not in ("method", "late")})  # type: ignore[arg-type]  # fmt: skip


class _Measure:
    """What is the same for all explanations of one input: its answer, random completions, their outputs."""

    def __init__(
        self, network: Network, about: Question, x: Tensor, baseline: Tensor | float, samples: int, seed: int
    ) -> None:
        self.network, self.about, self.x, self.value = network, about, x, baseline
        self.label = int(network(x).argmax())
        points = about.box.samples(samples, generator=torch.Generator().manual_seed(seed))
        self.z = about.box.project(points, dtype=x.dtype)

    def baseline(self, mask: Tensor) -> bool:
        x = torch.where(self._spread(mask), self.x, torch.as_tensor(self.value, dtype=self.x.dtype))
        return int(self.network(x).argmax()) == self.label

    def random(self, mask: Tensor) -> float:
        points = torch.where(self._spread(mask), self.x, self.z.reshape(-1, *self.x.shape))
        answers = torch.vmap(self.network)(points).flatten(1).argmax(1)
        return float((answers == self.label).double().mean())

    def curves(self, scores: Tensor) -> tuple[float, float]:
        return _curves(self.network, self.x, scores, self.about.member, self.label, self.value)

    def infidelity(self, map: Tensor) -> float:
        z = self.z.reshape(-1, *self.x.shape[1:])
        return infidelity(self.network, self.x, map, z, of=self.label, scaled=True)

    def _spread(self, features: Tensor) -> Tensor:
        return self.about.spread(features).reshape(self.x.shape)


STEPS = 64
"""The most points of an insertion or deletion curve."""


def _curves(
    network: Network, x: Tensor, scores: Tensor, member: Tensor, of: int, baseline: Tensor | float
) -> tuple[float, float]:
    levels = scores.unique().flip(0)
    levels = levels[torch.linspace(0, len(levels) - 1, min(len(levels), STEPS)).round().long()]
    # The least level is always among them: the last set holds all features.
    sets = torch.cat([torch.zeros(1, len(scores), dtype=torch.bool), scores >= levels[:, None]])
    chosen = sets[:, member].reshape(-1, *x.shape)
    value = torch.as_tensor(baseline, dtype=x.dtype)
    points = torch.cat([torch.where(chosen, x, value), torch.where(chosen, value, x)])
    likely = torch.vmap(network)(points).flatten(1).double().softmax(1)[:, of]
    into, out = (float(torch.trapezoid(y, sets.double().mean(1))) for y in likely.detach().chunk(2))
    return into, out
