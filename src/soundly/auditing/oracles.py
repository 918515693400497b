"""What a recipe must satisfy: independent checks of capture, bounds, splitting, certificates and verdicts.

Each oracle compares with something that shares no code with what it tests: torch's own operations, values at points,
among them the corners that the bounds themselves name as worst, one part of the bounds with another, and files that
are read back. An oracle yields a sentence for every violation; refusals (`SoundlyError`) are no violations.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from soundly.auditing.subject import F64, ROUNDING, Subject
from soundly.bounds.batch import Bounder, plainly, step_rows
from soundly.bounds.frame import Frame, Split, Start
from soundly.bounds.interval import interval_bounds
from soundly.bounds.linear import linear_bounds
from soundly.bounds.optimise import raised
from soundly.bounds.program import Affine, Function, Program, Step, Times
from soundly.certificate.verification import replay
from soundly.graph.load import load
from soundly.graph.node import Node
from soundly.graph.to_onnx import to_onnx
from soundly.verification.forest import BOUND, REFRESH
from soundly.verification.input_split import InputSplit
from soundly.verification.neuron_split import NeuronSplit
from soundly.verification.problem import Problem, problem_of
from soundly.verification.proof import certificate
from soundly.verification.verdict import Proved, Refuted
from soundly.verification.verify import verify

Oracle = Callable[[Subject, random.Random], Iterator[str]]
FAR = 2.0**300
"""Certificates hold no larger numbers."""


def capture(subject: Subject, r: random.Random) -> Iterator[str]:
    """Each rule computes what torch's operation computes on the same values; gradients agree with autograd."""
    network, nodes = subject.recipe.graph()
    count = len(network.inputs)
    low, high = subject.recipe.box
    for share in (0.5, r.random()):
        point = [a + share * (b - a) for a, b in zip(low, high, strict=True)]
        expected = subject.recipe.run(point)
        given: dict[Node, Tensor] = {}
        for k, (node, want) in enumerate(zip(nodes, expected, strict=True)):
            if k >= count:
                name = subject.recipe.calls[k - count].op
                if node.shape != tuple(want.shape):
                    yield f"{name}: the rule gives shape {node.shape}, torch {tuple(want.shape)}"
                    return
                if not node.inputs:
                    continue
                (got,) = (given[node],) if node in given else network.evaluate([node], *point, given=given)
                if not _near(got, want.double()):
                    yield f"{name}: the rule and torch differ by {float((got - want).abs().max()):.3g}"
                    return
            given[node] = want.double()
    if subject.recipe.of is not None:
        nearby = torch.Generator().manual_seed(r.getrandbits(30))  # off the ties of equal entries
        point = [
            (v + 1e-6 * torch.randn(v.shape, generator=nearby, dtype=F64)).requires_grad_()
            for v in (a + r.random() * (b - a) for a, b in zip(low, high, strict=True))
        ]
        output = subject.recipe.run(point)[-1].reshape(-1)[subject.recipe.of]
        (slope,) = torch.autograd.grad(output, point[:1], allow_unused=True) if output.requires_grad else (None,)
        want = torch.zeros_like(point[0]) if slope is None else slope
        with torch.no_grad():
            got = subject.network(*(p.detach() for p in point))
        kinks = any(
            bool((v.double().abs() < 1e-12).any()) for v in subject.recipe.run([p.detach() for p in point])[count:]
        )
        if not kinks and not _near(got, want):
            yield f"the gradient and autograd differ by {float((got - want).abs().max()):.3g}"


def intervals(subject: Subject, r: random.Random) -> Iterator[str]:
    """Every node's interval holds its values, that of a part of the box lies within that of the whole box, and that of
    a point around the value there."""
    network, nodes = subject.network, list(subject.network.nodes)
    whole = interval_bounds(network, subject.region)
    with torch.no_grad():
        found = subject.values(nodes, subject.points)
    for node, value in zip(nodes, found, strict=True):
        low, high = whole[node]
        if _escapes(value, low, high, torch.zeros(len(value), dtype=F64)):
            yield f"{node!r}: a value outside its interval"
    low, high = subject.ends
    share = torch.rand(2, len(low), dtype=F64, generator=torch.Generator().manual_seed(r.getrandbits(30)))
    inner = (low + share.amin(0) * (high - low)).clamp(low, high), (low + share.amax(0) * (high - low)).clamp(low, high)
    sizes = [math.prod(node.shape) for node in network.inputs]
    parts = zip(network.inputs, *(end.split(sizes) for end in inner), strict=True)
    part = interval_bounds(network, {n: (a.reshape(n.shape), b.reshape(n.shape)) for n, a, b in parts})
    for node in nodes:
        slack = ROUNDING * (1 + torch.maximum(whole[node].lower.abs(), whole[node].upper.abs()))
        if bool(
            (part[node].lower < whole[node].lower - slack).any() | (part[node].upper > whole[node].upper + slack).any()
        ):
            yield f"{node!r}: the interval over a part of the box is not within that over the box"


def linear(subject: Subject, r: random.Random) -> Iterator[str]:
    """Linear bounds hold values, are no looser than intervals, and commute with scaling and sign."""
    network = subject.network
    whole = interval_bounds(network, subject.region)
    inner = [n for n in network.nodes if n.inputs and 0 not in n.shape]
    for node in {network.output, r.choice(inner)} if inner else {network.output}:
        flat = math.prod(node.shape)
        generator = torch.Generator().manual_seed(r.getrandbits(30))
        rows = torch.cat([torch.eye(flat, dtype=F64)[:8], torch.randn(2, flat, generator=generator, dtype=F64)])
        with torch.no_grad():
            (value,) = subject.values([node], subject.points)
            lower_, upper_ = linear_bounds(network, rows.reshape(-1, *node.shape), subject.region, of=node)
            low, high = linear_bounds(network, -2 * rows.reshape(-1, *node.shape), subject.region, of=node)
        reached = value.reshape(len(value), -1) @ rows.T
        room = ROUNDING * (1 + value.reshape(len(value), -1).abs().amax(1))
        if _escapes(reached, lower_, upper_, room):
            yield f"{node!r}: a value outside its linear bounds"
        slack = ROUNDING * (1 + lower_.abs() + upper_.abs())
        fine = (lower_.abs() < 1e300) & (upper_.abs() < 1e300)  # doubled, others overflow
        if _differ(low[fine], -2 * upper_[fine], slack[fine]) or _differ(high[fine], -2 * lower_[fine], slack[fine]):
            yield f"{node!r}: linear bounds of a multiple are not the multiple of linear bounds"
        ends = whole[node].lower.reshape(-1)[:8], whole[node].upper.reshape(-1)[:8]
        n = len(ends[0])
        if bool((lower_[:n] < ends[0] - slack[:n]).any() | (upper_[:n] > ends[1] + slack[:n]).any()):
            yield f"{node!r}: linear bounds are looser than intervals"


def planes(subject: Subject, r: random.Random) -> Iterator[str]:
    """The search's intervals hold values at every step, and the planes of its backward passes lie below their rows at
    every point, among them the planes' own worst corners: as chosen, with any other slopes, under splits, and
    optimised."""
    program, points = subject.program, subject.kept
    if not len(points):
        return
    bounder = Bounder(program, together=r.random() < 0.5)
    low, high = (end[None] for end in subject.ends)
    frame = bounder.refresh(low, high)
    if bool(frame.infeasible.any()):
        yield "the search takes the box for empty"
        return
    if subject.approximate:
        return
    for i, (step, value) in enumerate(zip(program.steps, subject.steps, strict=True)):
        # Rounding below a step may be amplified by it: what it reads must lie inside to the last digit.
        inside = torch.ones(len(points), dtype=torch.bool)
        for j in _sources(step):
            inside &= ((subject.steps[j] >= frame.lower[j]) & (subject.steps[j] <= frame.upper[j])).all(1)
        if _escapes(value[inside], frame.lower[i][0], frame.upper[i][0], subject.room[inside]):
            yield f"step {i} of the program: a value outside its interval"
            return
    generator = torch.Generator().manual_seed(r.getrandbits(30))
    defaults = frame.known
    for i in _chosen_steps(program, r):
        size = program.steps[i].size
        rows = torch.cat([torch.eye(size, dtype=F64)[:6], torch.randn(2, size, generator=generator, dtype=F64)])
        start = Start(
            {i: torch.cat([rows, -rows])},
            torch.zeros(2 * len(rows), dtype=F64),
            torch.zeros(2 * len(rows), dtype=torch.int64),
        )
        yield from _below(subject, bounder, frame, defaults, start, f"step {i}")
        plain = plainly(frame, start)
        inside = ((subject.steps[i] >= frame.lower[i]) & (subject.steps[i] <= frame.upper[i])).all(1)
        reached = subject.steps[i][inside] @ start.a[i].T
        if bool((reached < plain - subject.room[inside][:, None]).any()):
            yield f"step {i}: a row below what its intervals say"
        free = bounder.free(frame, upto=i + 1)
        if free:
            slopes = {}
            for j, side in free:
                line = defaults[j]
                own = line[2 * side] if isinstance(bounder.steps[j], Function) else torch.ones_like(frame.lower[j])
                slopes[j, side] = own * torch.rand(own.shape, generator=generator, dtype=F64)
            lines = bounder.lines(frame, slopes, upto=i + 1, known=None if frame.factors else defaults)
            if not frame.factors:
                yield from _below(subject, bounder, frame, lines, start, f"step {i} with other slopes")
        splits = _splits(subject, bounder, r, generator, i)
        if splits and not frame.factors:
            yield from _below(subject, bounder, frame, defaults, start, f"step {i} under splits", splits)
    if not frame.factors and len(program.steps) > 2 and r.random() < 0.3:
        yield from _raised(subject, bounder, frame)


def _sources(step: Step) -> list[int]:
    match step:
        case Affine(parts):
            return [source for _, source in parts]
        case Function(source):
            return [source]
        case Times(left, right):
            return [left, right]
    return []


def _chosen_steps(program: Program, r: random.Random) -> set[int]:
    last = len(program.steps) - 1
    return {last, r.randint(1, last)} if last else set()


def _below(
    subject: Subject, bounder: Bounder, frame: Frame, lines: Mapping[int, object], start: Start, what: str,
    splits: Mapping[int, Split] | None = None,
) -> Iterator[str]:  # fmt: skip
    """That the planes of a pass lie below its rows, wherever the splits allow."""
    found = bounder.backward(frame, lines, start, splits=splits, keep=True)  # type: ignore[arg-type]
    least = found.least(frame.lower[0], frame.upper[0])
    known = torch.isfinite(found.d) & torch.isfinite(found.a).all(1)
    if not bool(known.any()):
        return
    a, d, least = found.a[known], found.d[known], least[known]
    worst = torch.where(a > 0, frame.lower[0], frame.upper[0])
    points = torch.cat([subject.kept, worst])
    values = bounder.program.evaluate(points)
    allowed = torch.ones(len(points), dtype=torch.bool)
    for j, split in (splits or {}).items():
        allowed &= ((split.sign * (values[j] - split.at) >= 0) | (split.sign == 0)).all(1)
    for step in bounder.steps:  # what rounding keeps off a jump is on its wrong side
        if isinstance(step, Function) and any(low < high for _, low, high in step.op.special_points):
            value = values[step.source]
            allowed &= ((value >= frame.lower[step.source]) & (value <= frame.upper[step.source])).all(1)
    finite = torch.stack([torch.isfinite(v).all(1) for v in values]).all(0) & allowed
    size = torch.stack([v.abs().amax(1) for v in values]).amax(0)[finite]
    rows = sum((values[i][finite] @ v[known].T for i, v in start.a.items()), start.d[known])
    steep = sum((v[known].abs().sum(1) for v in found.kept.values()), a.abs().sum(1) + d.abs())  # amplifies rounding
    room = ROUNDING * (1 + size[:, None]) * (1 + steep)
    if bool((rows < points[finite] @ a.T + d - room).any()):
        yield f"{what}: a plane above its row"
    elif bool((rows < least - room).any()):
        yield f"{what}: a row below its bound"


def _splits(
    subject: Subject, bounder: Bounder, r: random.Random, generator: torch.Generator, upto: int
) -> dict[int, Split]:
    """Random halves of values that functions and products read, with random multipliers."""
    read = [i for i in range(upto) if bounder.read[i]]
    found = {}
    for i in r.sample(read, min(2, len(read))):
        value = subject.steps[i]
        size = (1, value.shape[1])
        sign = torch.randint(-1, 2, size, generator=generator).double() * (torch.rand(size, generator=generator) < 0.5)
        middle = value[r.randrange(len(value))][None].clone()
        found[i] = Split(sign, middle, torch.rand(size, generator=generator, dtype=F64))
    return found


def _raised(subject: Subject, bounder: Bounder, frame: Frame) -> Iterator[str]:
    """Optimised bounds stay below the rows and are no worse than those they began with."""
    last = len(bounder.steps) - 1
    size = bounder.steps[last].size
    rows = torch.eye(size, dtype=F64)[:1]
    start = Start({last: rows}, torch.zeros(1, dtype=F64))
    plain = bounder.backward(frame, frame.known, start).least(frame.lower[0], frame.upper[0])
    slopes = {key: _slope(bounder, frame, key) for key in bounder.free(frame)}
    if not slopes or not bool(torch.isfinite(plain).all()):
        return
    found = raised(bounder, frame, start, slopes, rounds=5, goal=torch.full((1,), math.inf, dtype=F64))
    reached = (subject.steps[last] @ rows.T).amin()
    steep = max(float(v.abs().max()) for v in slopes.values())  # amplifies rounding
    if bool((found.bound > reached + (1 + steep) * subject.room.max()).any()):
        yield "an optimised bound above its row"


def _slope(bounder: Bounder, frame: Frame, key: tuple[int, int]) -> Tensor:
    j, side = key
    line = frame.known[j]
    return line[2 * side] if isinstance(bounder.steps[j], Function) else torch.full_like(frame.lower[j], 0.5)


def splitting(subject: Subject, r: random.Random) -> Iterator[str]:
    """While inputs or neurons are split and boxes clipped, every counterexample stays in a part that waits; and no
    certificate of such a search, finished or not, proves a claim that a point refutes."""
    if not len(subject.kept):
        return
    size = subject.steps[-1].shape[1]
    entry = r.randrange(size)
    values = subject.steps[-1][:, entry]
    spread = float(values.max() - values.min())
    for share in (0.0, 0.3):
        room = 4 * float(subject.room.max()) + 1e-7 * spread
        level = float(values.min()) + share * spread + room
        claim = subject.claim(level, entry)
        problem = problem_of(claim)
        bad = subject.kept[
            problem.rows.worst(problem.rows.at(problem.program.evaluate(subject.kept)[-1], subject.kept)).amin(1)
            <= -room / 4
        ]
        inputs = InputSplit(problem, Bounder(problem.program, together=r.random() < 0.5))
        values_at = problem.program.evaluate(bad)
        for i, t in inputs.jumps.points:  # on which side of a jump a point is counts beyond rounding only
            far = (values_at[i] - t).abs().amin(1) > ROUNDING * (1 + values_at[i].abs().amax(1))
            bad, values_at = bad[far], [v[far] for v in values_at]
        if not len(bad):
            continue
        for turn in range(4):
            if not len(inputs) or inputs.stuck:
                break
            inputs.step(16)
            if not subject.approximate and _lost(inputs, bad):
                yield f"splitting inputs lost a counterexample of output {entry} >= {level:.9g}"
                return
            if turn in (0, 3):
                for part in inputs.stack:  # the checker shall bound what the search has not closed
                    inputs.forest.flags[part.node.numpy()] = REFRESH | BOUND
                yield from _certified(problem, [inputs.grown([0])], entry, level)
        if share and r.random() < 0.5:
            yield from _neurons(problem, bad, entry, level, subject.approximate)


def _lost(search: InputSplit, bad: Tensor) -> bool:
    kept = torch.zeros(len(bad), dtype=torch.bool)
    for part in search.stack:
        room = ROUNDING * (1 + part.upper.abs().amax())
        inside = (bad[:, None] >= part.lower - room) & (bad[:, None] <= part.upper + room)
        kept |= (inside.all(2) & part.open.any(1)).any(1)
    return not bool(kept.all())


def _neurons(problem: Problem, bad: Tensor, entry: int, level: float, sampled: bool) -> Iterator[str]:
    from soundly.bounds.conditional import with_rows

    rows = problem.rows
    program = with_rows(problem.program, rows.y, rows.x if rows.reads_inputs else None, rows.constant)
    bounder = Bounder(program)
    root = bounder.refresh(problem.lower, problem.upper)
    if bool(root.infeasible.any()):
        yield "the search takes the box for empty"
        return
    search = NeuronSplit(problem, bounder, 0, root, [0], margin=1e-9)
    search.begin(3)
    values = torch.cat(program.evaluate(bad), 1)
    for _ in range(3):
        if not len(search.waiting):
            break
        search.step(8, 3)
        parts = [search.waiting, *search.stuck]
        kept = torch.zeros(len(bad), dtype=torch.bool)
        for part in parts:
            held = (part.neuron >= 0)[None]
            value = values[:, part.neuron.clamp(min=0)]
            side = part.sign * (value - part.at) >= -ROUNDING * (1 + value.abs())
            kept |= (side | ~held).all(2).any(1)
        if not sampled and not bool(kept.all()):
            yield f"splitting neurons lost a counterexample of output {entry} >= {level:.9g}"
            return
    if search.proved:
        yield from _certified(problem, [search.grown([0])], entry, level)


def _certified(problem: Problem, grown: list[object], entry: int, level: float) -> Iterator[str]:
    if not abs(level) < FAR:
        return
    proof = certificate(problem, grown, claim="audit", model={})  # type: ignore[arg-type]
    result = replay(proof)
    if result.problems:
        yield f"a certificate that the search wrote is malformed: {result.problems[0]}"
    elif bool(result.proven.any()):
        yield f"the checker proves output {entry} >= {level:.9g}, which a point refutes"


def verdicts(subject: Subject, r: random.Random) -> Iterator[str]:
    """No claim that a point refutes is proved, and none that intervals prove is refuted."""
    if not len(subject.kept):
        return
    entry = r.randrange(subject.steps[-1].shape[1])
    values = subject.steps[-1][:, entry]
    room = 4 * float(subject.room.max())
    spread = float(values.max() - values.min())
    level = float(values.min()) + max(room, r.choice([0.0, 1e-4, 0.1]) * spread)
    verdict = verify(subject.claim(level, entry), timeout=0.5, attack=r.random() < 0.5)
    if isinstance(verdict, Proved):
        yield f"output {entry} >= {level!r} was proved, and a point refutes it"
    (bounds,) = (interval_bounds(subject.network, subject.region)[node] for node in [subject.network.output])
    least = float(bounds.lower.reshape(-1)[entry])
    if math.isfinite(least) and abs(least) < 1e9:
        verdict = verify(subject.claim(least - room, entry), timeout=0.5)
        if isinstance(verdict, Refuted):
            yield f"output {entry} >= {least - room!r} was refuted, and intervals prove it"


def exact(subject: Subject, r: random.Random) -> Iterator[str]:
    """For piecewise linear programs: bounds lie below the exact minimum, which mixed-integer programming finds."""
    if not all(
        isinstance(s, Affine) or (isinstance(s, Function) and s.op.name in _PIECES) for s in subject.program.steps[1:]
    ):
        return
    if len(subject.program.steps) < 3 or sum(s.size for s in subject.program.steps) > 80:
        return
    from soundly.auditing.truth import least

    entry = r.randrange(subject.program.outputs)
    low, high = subject.ends
    found = least(subject.program, low, high, entry)
    if found is None:
        return
    bounder = Bounder(subject.program)
    frame = bounder.refresh(low[None], high[None])
    start = Start(
        {len(bounder.steps) - 1: step_rows(torch.tensor([entry]), subject.program.outputs, low)},
        torch.zeros(1, dtype=F64),
    )
    bound = float(bounder.backward(frame, frame.known, start).least(low, high))
    room = 1e-5 * (1 + abs(found) + float(subject.room.max()))
    if bound > found + room:
        yield f"output {entry}: the bound {bound:.9g} lies above the exact minimum {found:.9g}"
    for level, wrong in ((found - room, Refuted), (found + room, Proved)):
        if isinstance(verify(subject.claim(level, entry), timeout=1.0), wrong):
            yield f"output {entry} >= {level!r} was {wrong.__name__.lower()}, but its exact minimum is {found!r}"


_PIECES = ("relu", "abs")


def files(subject: Subject, r: random.Random) -> Iterator[str]:
    """What is captured by torch.export, and what is written as ONNX and read again, computes the same."""
    recipe, network = subject.recipe, subject.network
    point = [a + 0.5 * (b - a) for a, b in zip(*recipe.box, strict=True)]
    want = network(*point)
    if recipe.of is None:
        got = load(recipe.module(), point)(*point)
        if not _near(got, want):
            yield f"the exported module and the recipe differ by {float((got - want).abs().max()):.3g}"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.onnx"
        to_onnx(network.to(torch.float32), path)
        back = load(path).to(F64)
    inputs = dict(zip((n.op.name for n in network.inputs), point, strict=True))  # type: ignore[attr-defined]
    read = back(*(inputs[n.op.name] for n in back.inputs))  # type: ignore[attr-defined]
    values = [v for v in subject.values(list(network.nodes), torch.cat([p.reshape(-1) for p in point])[None])]
    scale = max(float(v.abs().max()) for v in values if v.numel())
    jumps = any("sign" in str(n.op) or "step" in str(n.op) or "'" in str(n.op) for n in network.nodes)
    if not jumps and float((read - want).abs().max()) > 1e-3 * (1 + scale):
        yield f"the file that was written and the network differ by {float((read - want).abs().max()):.3g}"


ORACLES: dict[str, tuple[float, Oracle]] = {
    "capture": (1.0, capture), "intervals": (1.0, intervals), "linear": (0.3, linear), "planes": (1.0, planes),
    "splitting": (0.25, splitting), "exact": (0.3, exact), "verdicts": (0.1, verdicts), "files": (0.03, files),
}  # fmt: skip
"""Each oracle, and the share of recipes that it sees: the dear ones see fewer."""


def _near(got: Tensor, want: Tensor) -> bool:
    room = 1e-8 * (1 + want.abs().amax()) if want.numel() else 0.0
    same = (got - want).abs() <= room
    return got.shape == want.shape and bool((same | (got == want) | (got.isnan() & want.isnan())).all())


def _escapes(value: Tensor, low: Tensor, high: Tensor, room: Tensor) -> bool:
    """Whether a finite value [k, *shape] leaves [low, high]; NaN bounds hold nothing."""
    room = room.reshape(-1, *(1 for _ in low.shape))
    return bool((torch.isfinite(value) & ~((value >= low - room) & (value <= high + room))).any())


def _differ(a: Tensor, b: Tensor, room: Tensor) -> bool:
    return not bool(((a == b) | ((a - b).abs() <= room)).all())
