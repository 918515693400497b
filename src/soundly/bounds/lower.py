"""From a network to a program: data movement, sums and layers are composed into few affine steps.

Every value is kept as an affine function of earlier steps for as long as that costs nothing, and becomes a step where a
function or a product reads it, or where composing further would cost more work or an unknown amount of rounding.
Weights are constants; whatever rounding changes in them while they are folded is bounded and recorded in the step
(underflow apart). The program is compared with the network before it is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from soundly.bounds.compose import (
    Value,
    ball,
    identity,
    is_identity,
    only_moves,
    relative,
    sparse,
    summed,
    through,
    work,
)
from soundly.bounds.interval import Interval, interval_bounds
from soundly.bounds.lines import jumps
from soundly.bounds.program import Affine, Convolution, Function, Map, Matrix, Program, Sparse, Step, Times, Variable
from soundly.errors import CaptureMismatch, InvalidInput, MissingRule
from soundly.graph.composite import Rounding
from soundly.graph.elementwise import SQUARE, Elementwise
from soundly.graph.evaluate import Plan
from soundly.graph.linear import Combine, Reshape, Sum, broadcast, reshape, transpose
from soundly.graph.network import Network
from soundly.graph.node import Composite, Fill, Input, Leaf, Linear, Node, Product, dependents, topological
from soundly.graph.product import Conv, ConvTranspose, Dense, MatMul, Multiply
from soundly.graph.ring import polynomial
from soundly.graph.simplify import rebuild

_STEPS = 64  # of a staircase
_REACH = (1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01, 0.0)  # how far from the middle points of comparison lie
_ENOUGH = 4  # of them

Ends = tuple[Tensor, Tensor]


def lower(
    network: Network,
    outputs: Sequence[Node] | None = None,
    *,
    region: Mapping[Node, Ends] | None = None,
    executed: bool = False,
) -> Program:
    """The network as a program in float64: its joined flattened inputs to its joined flattened outputs.

    Args:
        outputs: nodes of the network's graph; by default the network's outputs.
        region: bounds (lower, upper), float64 and of the node's shape, of every input of the network. With them values
            may be rounded to whole numbers: the program has the steps that the region can reach, and beyond the region
            it is another function.
        executed: one step for every operation of a network in float32, nothing folded: what float32 does to each of
            them can be told from the program then. Constants are known as far as float32 knows them.

    Returns:
        A program whose steps, with coefficients anywhere within their recorded errors, contain the network in real
        arithmetic with exactly its weights; on the region, if one is given. Inputs are in the order of
        `network.inputs`, each in C order.

    Raises:
        InvalidInput: the region lacks an input, or holds bounds of another shape or type.
        MissingRule: a value depends on an input in a way that steps cannot express (rounding to whole numbers without
            a region, or to more than 64 of them), or only with very many products; a constant is not finite; or there
            was no point at which program and network are finite and could be compared.
        CaptureMismatch: the program and the network disagree at a point, which would be a defect of soundly.
    """
    for node in () if region is None else network.inputs:
        ends = (region or {}).get(node, ())
        if not ends or any(end.shape != node.shape or end.dtype != torch.float64 for end in ends):
            raise InvalidInput(f"region: give a lower and an upper bound of {node!r}, float64 of shape {node.shape}.")
    wide = network.to(torch.float64).to("cpu")
    wanted = tuple(network.outputs if outputs is None else outputs)
    with torch.no_grad():
        program = _Lowering(wide, wanted, region, network if executed else None).program
        _compare(wide, wanted, program, region, 1e-4 if executed else 1e-9)
    return program


class _Lowering:
    """One walk over the graph, inputs first; steps are appended as they become necessary."""

    def __init__(
        self,
        network: Network,
        outputs: tuple[Node, ...],
        region: Mapping[Node, Ends] | None,
        executed: Network | None = None,
    ) -> None:
        self.executed = executed is not None
        self.steps: list[Step] = [Variable(sum(math.prod(n.shape) for n in network.inputs))]
        self.made: dict[Value | tuple[object, ...], int] = {}  # steps by what they compute
        roots = _expanded(network, outputs, region)
        order = topological(roots)
        varying = dependents(order, network.inputs)
        border = [n for n in roots if n not in varying]
        border += [c for n in order if n in varying for c in n.inputs if c not in varying]
        self.constants = interval_bounds(network if executed is None else executed, {}, list(dict.fromkeys(border)))
        if executed is not None:
            self.constants = {node: _wide(bounds) for node, bounds in self.constants.items()}
        self.values: dict[Node, Value] = {}
        start = 0
        for node in network.inputs:
            columns = torch.arange(start, start := start + math.prod(node.shape))
            inputs = sparse(torch.arange(len(columns)), columns, None, (len(columns), self.steps[0].size))
            self.values[node] = Value(((inputs, 0),), torch.zeros(len(columns), dtype=torch.float64))
        readers: dict[Node, list[Node | None]] = {node: [None] * roots.count(node) for node in order}
        for node in order:
            for child in node.inputs:
                readers[child].append(node)
        for node in order:
            if node in varying and node not in self.values:
                value = self._value(node)
                if self.executed:
                    value = self._settled(value)
                elif len(readers[node]) > 1 and not _divides(node, readers[node]):
                    value = self._shared(value)
                self.values[node] = value
        self.program = self._finished(roots)

    def _finished(self, roots: tuple[Node, ...]) -> Program:
        """The steps that the joined outputs depend on, the outputs last."""
        total, start = sum(math.prod(n.shape) for n in roots), 0
        placed = []
        for node in roots:
            rows = torch.arange(start, start := start + math.prod(node.shape))
            place = sparse(rows, torch.arange(len(rows)), None, (total, len(rows)))
            placed.append(self._through(place, 0.0, self._operand(node)))
        last = self._step(summed(placed))
        if last == 0:
            self.steps.append(Affine(((identity(total), 0),), torch.zeros(total, dtype=torch.float64)))
            last = len(self.steps) - 1
        needed, stack = {0}, [last]
        while stack:
            i = stack.pop()
            if i not in needed:
                needed.add(i)
                stack += self.steps[i].sources
        position = {old: new for new, old in enumerate(sorted(needed))}
        return Program(tuple(_moved(self.steps[old], position) for old in position))

    # -- steps

    def _step(self, value: Value) -> int:
        """The step that holds the value; a new one, unless it is one already."""
        view = value.view
        if view is not None and is_identity(view[0]):
            return view[1]
        if value not in self.made:
            step = Affine(value.parts, value.bias, value.weight_error, value.bias_error)
            known = self.made.get(content := value.content)
            self.made[value] = self.made[content] = self._append(step) if known is None else known
        return self.made[value]

    def _append(self, step: Step) -> int:
        self.steps.append(step)
        return len(self.steps) - 1

    def _settled(self, value: Value) -> Value:
        """The same value as a view of a step of its own."""
        return self._whole(self._step(value))

    def _whole(self, step: int) -> Value:
        size = self.steps[step].size
        return Value(((identity(size), step),), torch.zeros(size, dtype=torch.float64))

    def _shared(self, value: Value) -> Value:
        """For several readers: a view where reading it again would repeat more work than copying."""
        cheap = all(isinstance(part, Sparse) for part, _ in value.parts)
        total = sum(work(part) for part, _ in value.parts)
        return value if cheap and total <= 2 * len(value.bias) else self._settled(value)

    # -- rules

    def _operand(self, node: Node) -> Value:
        if node in self.values:
            return self.values[node]
        centre, radius = ball(self.constants[node])
        if not bool(torch.isfinite(centre).all()):
            raise MissingRule(f"{node!r} is a constant that is not finite; nothing can be added to it.")
        return Value((), centre.reshape(-1), 0.0, None if radius is None else radius.reshape(-1))

    def _value(self, node: Node) -> Value:
        op, x = node.op, node.inputs
        if isinstance(op, Elementwise):
            return self._function(op, self.values[x[0]])
        if isinstance(op, Reshape):
            return self._operand(x[0])
        if isinstance(op, Combine):
            known = [source for c in x if c in self.values for _, source in self.values[c].parts]
            if self.executed and len(set(known)) < len(known):
                raise MissingRule(f"{node!r} adds a value to itself: what float32 makes of that is not known.")
            scaled = (self._scaled(self._operand(c), f) for c, f in zip(x, op.coefficients, strict=True) if f != 0)
            return summed(list(scaled), math.prod(node.shape))
        if isinstance(op, Linear):
            parts = [self._through(_movement(node, slot), 0.0, self._operand(c)) for slot, c in enumerate(x)]
            return summed(parts)
        if isinstance(op, Product):
            moving = [slot for slot, child in enumerate(x) if child in self.values]
            if len(moving) == 1:
                (slot,) = moving
                centre, radius = ball(self.constants[x[1 - slot]])
                centre, error = relative(centre, radius, x[1 - slot])
                return self._through(_layer(node, slot, centre), error, self.values[x[slot]])
            if isinstance(op, Multiply):
                return self._times(self.values[x[0]], self.values[x[1]])
            rows, *columns = _terms(node, 0)
            terms = torch.arange(len(rows))
            left, right = (
                self._through(sparse(terms, taken, None, (len(terms), len(v.bias))), 0.0, v)
                for taken, v in zip(columns, (self.values[child] for child in x), strict=True)
            )
            total = sparse(rows, terms, None, (math.prod(node.shape), len(terms)))
            return self._through(total, 0.0, self._times(left, right))
        raise MissingRule(f"{node!r} is neither linear, a product, elementwise nor composed of such operations.")

    def _function(self, op: Elementwise, value: Value) -> Value:
        view = value.view
        if view is not None and only_moves(view[0]):  # f(entries of y) = entries of f(y)
            moved, source = view
            return Value(((moved, self._applied(op, source)),), value.bias)
        return self._whole(self._applied(op, self._step(value)))

    def _applied(self, op: Elementwise, source: int) -> int:
        if source == 0 and jumps(op):  # which side of a jump holds is said of steps, never of inputs
            if (copy := ("inputs",)) not in self.made:
                size = self.steps[0].size
                parts = ((identity(size), 0),)
                self.made[copy] = self._append(Affine(parts, torch.zeros(size, dtype=torch.float64)))
            source = self.made[copy]
        if (op, source) not in self.made:
            self.made[op, source] = self._append(Function(source, op, self.steps[source].size))
        return self.made[op, source]

    def _times(self, a: Value, b: Value) -> Value:
        left, right = sorted((self._step(a), self._step(b)))
        if left == right:
            return self._whole(self._applied(SQUARE, left))
        if (left, right) not in self.made:
            self.made[left, right] = self._append(Times(left, right, self.steps[left].size))
        return self._whole(self.made[left, right])

    def _scaled(self, value: Value, factor: float) -> Value:
        if factor == 1:
            return value
        size = len(value.bias)
        factors = torch.full((size,), factor, dtype=torch.float64)
        return self._through(replace(identity(size), values=factors), 0.0, value)

    def _through(self, outer: Map, error: float, value: Value) -> Value:
        """As `through`, with the value made a step first where composing is not worth it."""
        result = through(outer, error, value)
        return self._through(outer, error, self._settled(value)) if result is None else result


def _wide(bounds: Interval) -> Interval:
    """The same bounds in float64."""
    lower = bounds.lower.double()
    return Interval(lower, lower if bounds.is_point else bounds.upper.double())


def _moved(step: Step, position: dict[int, int]) -> Step:
    match step:
        case Affine():
            return replace(step, parts=tuple((part, position[source]) for part, source in step.parts))
        case Function():
            return replace(step, source=position[step.source])
        case Times():
            return replace(step, left=position[step.left], right=position[step.right])
    return step


# -- the graph


def _expanded(network: Network, outputs: tuple[Node, ...], region: Mapping[Node, Ends] | None) -> tuple[Node, ...]:
    """The outputs over a graph in which what depends on inputs is elementwise, a linear map, a layer or an entrywise
    product, and nothing is computed twice."""
    changed = True
    while changed:  # expansions may hold composites
        outputs, changed = _expanded_once(network, outputs, region)
    return outputs


def _expanded_once(
    network: Network, outputs: tuple[Node, ...], region: Mapping[Node, Ends] | None
) -> tuple[tuple[Node, ...], bool]:
    order = topological(outputs)
    varying = dependents(order, network.inputs)
    rounded = [n.inputs[0] for n in order if n in varying and isinstance(n.op, Rounding)]
    ranges = interval_bounds(network, region, rounded) if rounded and region is not None else {}
    known: dict[object, Node] = {}
    expanded: list[Node] = []

    def rule(old: Node, node: Node) -> Node:
        if old in varying:
            if isinstance(node.op, Rounding):
                simpler: Node | None = _stepped(node, node.op, ranges.get(old.inputs[0]))
            else:
                simpler = _simpler(node, [c in varying for c in old.inputs])
            if simpler is not None:
                expanded.append(old)
                return simpler
        leaf = isinstance(node.op, Leaf) and not isinstance(node.op, Fill)
        return node if leaf else known.setdefault((node.op, node.inputs), node)

    new = rebuild(outputs, rule)
    return tuple(new[node] for node in outputs), bool(expanded)


def _stepped(node: Node, op: Rounding, bounds: Interval | None) -> Node:
    """The same values where all numbers that are rounded lie within their bounds."""
    low, high = (-math.inf, math.inf) if bounds is None else (float(bounds.lower.min()), float(bounds.upper.max()))
    steps = staircase(op, low, high) if high - low < _STEPS and max(-low, high) < 2.0**40 else None
    if steps is None or len(steps.breaks) > _STEPS:
        raise MissingRule(
            f"{node!r} rounds numbers that depend on an input and lie between {low:.6g} and {high:.6g}, as far as is "
            f"known; a program can hold {_STEPS} steps. Give the region of the inputs, or a smaller one."
        )
    if not steps.breaks:
        return Fill(float(steps.apply(torch.tensor(low, dtype=torch.float64))), node.shape)()
    assert bounds is not None
    return _apart(steps, bounds.lower, bounds.upper)(*node.inputs, origin=node.origin)


def _apart(steps: Elementwise, lower: Tensor, upper: Tensor) -> Elementwise:
    """The same values for all numbers between their bounds, with no number at a jump where that can be: whole numbers
    are rounded at a distance from it."""
    breaks = []
    for t, held in zip(steps.breaks, steps.held, strict=True):
        if held == "right" and not bool(((lower < t) & (upper >= t)).any()):
            below = float(upper[upper < t].amax()) if bool((upper < t).any()) else -math.inf
            t -= min(t - below, 1.0) / 4
        elif held == "left" and not bool(((lower <= t) & (upper > t)).any()):
            above = float(lower[lower > t].amin()) if bool((lower > t).any()) else math.inf
            t += min(above - t, 1.0) / 4
        breaks.append(t)
    if tuple(breaks) == steps.breaks:
        return steps
    return replace(steps, breaks=tuple(breaks), kernel=None)


def staircase(op: Rounding, lower: float, upper: float) -> Elementwise:
    """The function that rounds the numbers from `lower` to `upper`: constant between them. Further out the first and
    the last step go on, which is no longer that rounding.

    Args:
        lower, upper: finite and of moderate size; there is one step for every jump between them.
    """
    half = Fraction(1, 2)
    shift = half if op.kind == "round" else Fraction(0)
    first, last = math.ceil(Fraction(lower) - shift), math.floor(Fraction(upper) - shift)
    jumps = [k + shift for k in range(first, last + 1) if k or op.kind != "trunc"]
    rules: dict[str, Callable[[Fraction], int]]
    rules = {"floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "round": round}
    rule = rules[op.kind]
    # Where a step is one wide, its middle is; at a jump the value is that of one of the sides.
    levels = [rule(t - half) for t in jumps] + [rule(jumps[-1] + half) if jumps else rule(Fraction(lower))]
    held = ["right" if rule(t) == level else "left" for t, level in zip(jumps, levels[1:], strict=True)]
    return Elementwise(
        op.kind,
        tuple(polynomial({(0,): level}) for level in levels),
        breaks=tuple(map(float, jumps)),
        held=tuple(held),
        kernel=lambda x: op.apply(x).clamp(levels[0], levels[-1]),
        kernel_slope=torch.zeros_like,
    )


def _simpler(node: Node, varies: list[bool]) -> Node | None:
    """One step of an expansion; None where there is none."""
    op, x = node.op, node.inputs
    if isinstance(op, Composite):
        try:
            return op.expand(*x)
        except MissingRule as error:
            raise MissingRule(f"{node!r} depends on an input and has no expansion into simpler operations.") from error
    if isinstance(op, Dense) and varies[1]:
        rows = math.prod(x[0].shape[:-1])
        return reshape(MatMul()(reshape(x[0], (rows, x[0].shape[-1])), transpose(x[1])), node.shape)
    if isinstance(op, MatMul) and all(varies):
        (*batch, i, k), j = x[0].shape, node.shape[-1]
        left = broadcast(reshape(x[0], (*batch, i, k, 1)), (*batch, i, k, j))
        right = broadcast(reshape(x[1], (*batch, 1, k, j)), (*batch, i, k, j))
        return reshape(Sum((len(batch) + 1,))(Multiply()(left, right)), node.shape)
    return None


def _divides(node: Node, readers: list[Node | None]) -> bool:
    """Whether the readers take the node's entries apart, none of them twice: then nothing is shared."""
    size = math.prod(node.shape)
    taken = [math.prod(r.shape) for r in readers if r is not None and isinstance(r.op, Linear)]
    return len(taken) == len(readers) and max(taken) < size and sum(taken) <= size


# -- maps of single operations


def _movement(node: Node, slot: int) -> Sparse:
    """A structural linear operation with coefficients +-1 towards one of its inputs, found by moving positions."""
    op, shapes = node.op, [child.shape for child in node.inputs]
    assert isinstance(op, Linear)
    size = math.prod(node.shape), math.prod(shapes[slot])
    if op.terms(*shapes) == 1:
        values = [torch.zeros(()).double().expand(shape) for shape in shapes]
        values[slot] = torch.arange(1.0, size[1] + 1, dtype=torch.float64).reshape(shapes[slot])
        found = op.apply(*values).reshape(-1)
        rows = found.nonzero()[:, 0]
        return sparse(rows, found[rows].abs().long() - 1, found[rows].sign(), size)
    seed = Input("seed", node.shape)()
    positions = torch.arange(1.0, size[0] + 1, dtype=torch.float64).reshape(node.shape)
    plan = Plan([op.adjoint(slot, seed, node.inputs)])
    found = plan({seed: positions}, dtype=torch.float64, device=torch.device("cpu"))[0].reshape(-1)
    columns = found.nonzero()[:, 0]
    rows = found[columns].abs().long() - 1
    order = torch.argsort(rows, stable=True)
    return sparse(rows[order], columns[order], found[columns][order].sign(), size)


def _layer(node: Node, slot: int, constant: Tensor) -> Map:
    """A product with a constant, as a map of its other input; exactly the constant's numbers."""
    op, shape = node.op, node.inputs[slot].shape
    match op:
        case Multiply():
            size = constant.numel()
            values = constant.reshape(-1)
            rows = values.nonzero()[:, 0]
            return sparse(rows, rows, values[rows], (size, size))
        case Dense() if slot == 0:
            return _matrix(constant, math.prod(shape[:-1]))
        case MatMul() if slot == 0 and math.prod(shape[:-2]) == 1:
            return _matrix(constant.reshape(constant.shape[-2:]).T, shape[-2])
        case MatMul() if slot == 1:
            batch, (i, k), j = math.prod(shape[:-2]), constant.shape[-2:], shape[-1]
            if batch == 1 and j == 1:
                return _matrix(constant.reshape(i, k), 1)
            weight = constant.reshape(batch * i, k, 1)
            return Convolution(weight, (batch * k, j), (batch * i, j), (1,), (0,), (1,), batch)
        case Conv() | ConvTranspose() if slot == 0:
            wide, narrow = (shape, node.shape) if isinstance(op, Conv) else (node.shape, shape)
            count = shape[0]
            weight = constant.repeat(count, *(1,) * (constant.dim() - 1)) if count > 1 else constant
            return Convolution(
                weight.contiguous(), (count * wide[1], *wide[2:]), (count * narrow[1], *narrow[2:]),
                op.stride, op.padding, op.dilation, op.groups * count, isinstance(op, ConvTranspose),
            )  # fmt: skip
    return _entries(node, slot, constant)


def _matrix(weight: Tensor, blocks: int) -> Map:
    """A dense map, or a sparse one where the weights do little more than select."""
    m, n = weight.shape
    rows, columns = weight.nonzero(as_tuple=True)
    if len(rows) * 4 > m * n or len(rows) > 2 * max(m, n):
        return Matrix(weight.contiguous(), blocks)
    block = torch.arange(blocks)[:, None]
    values = weight[rows, columns].repeat(blocks)
    return sparse((rows + block * m).reshape(-1), (columns + block * n).reshape(-1), values, (blocks * m, blocks * n))


def _entries(node: Node, slot: int, constant: Tensor) -> Sparse:
    """Any product with a constant, coefficient by coefficient."""
    rows, columns, which = _terms(node, slot)
    size = math.prod(node.shape), math.prod(node.inputs[slot].shape)
    return sparse(rows, columns, constant.reshape(-1)[which], size)


def _terms(node: Node, slot: int, most: int = 2**24) -> tuple[Tensor, Tensor, Tensor]:
    """The products that a product adds up: positions in the result, in one input and in the other, in order of the
    first. Unit vectors times positions say which they are."""
    shape, other = node.inputs[slot].shape, node.inputs[1 - slot].shape
    n, m = math.prod(shape), math.prod(node.shape)
    if m * n > most:
        raise MissingRule(f"{node!r} has {m} results of {n} varying numbers: too many to write down their products.")
    positions = torch.arange(1.0, math.prod(other) + 1, dtype=torch.float64).reshape(other)
    units = torch.eye(n, dtype=torch.float64).reshape(n, *shape)
    pairs = ((unit, positions) if slot == 0 else (positions, unit) for unit in units)
    found = torch.stack([node.op.apply(*pair).reshape(-1) for pair in pairs], 1).round().long()
    rows, columns = found.nonzero(as_tuple=True)
    return rows, columns, found[rows, columns] - 1


# -- the check


def _compare(
    network: Network,
    outputs: tuple[Node, ...],
    program: Program,
    region: Mapping[Node, Ends] | None,
    tolerance: float,
) -> None:
    """Raises unless program and network agree, up to a relative tolerance, at some random points of the region, which
    lie ever closer to its middle as long as either is not finite there."""
    source = torch.Generator().manual_seed(0)
    low, high = (torch.full((program.inputs,), end, dtype=torch.float64) for end in (-1.0, 1.0))
    if region is not None:
        low, high = (torch.cat([region[node][side].reshape(-1) for node in network.inputs]) for side in (0, 1))
    last, agreed = program.steps[-1], 0
    for reach in _REACH:
        share = torch.rand(program.inputs, generator=source, dtype=torch.float64)
        point = torch.lerp(low, high, 0.5 + reach * (share - 0.5))
        pieces = point.split([math.prod(n.shape) for n in network.inputs])
        inputs = [piece.reshape(n.shape) for piece, n in zip(pieces, network.inputs, strict=True)]
        truth = torch.cat([y.reshape(-1) for y in network.evaluate(outputs, *inputs)])
        values = program.evaluate(point)
        if not bool(torch.isfinite(truth).all() & torch.isfinite(values[-1]).all()):
            continue
        size = values[-1].abs()
        if isinstance(last, Affine):
            parts = (part.absolute.apply(values[source].abs()) for part, source in last.parts)
            size = sum(parts, last.bias.abs())
        gap = (truth - values[-1]).abs()
        if bool((gap <= tolerance * (1 + truth.abs() + size)).all()):
            agreed += 1
        elif not _at_jump(program, values):
            raise CaptureMismatch(
                f"the program of {network.name} differs from it by {float(gap.max()):.3g} at a random point; nothing "
                "may be proved with it. Please report the network."
            )
        if agreed == _ENOUGH:
            return
    if not agreed:
        raise MissingRule(
            f"the program of {network.name} could not be compared with it: at every point that was tried one of them "
            "is not finite, or at a jump. Nothing may be proved with it; give a region where the network is defined."
        )


def _at_jump(program: Program, values: list[Tensor]) -> bool:
    """Whether a function is read so near to a jump that rounding may decide its side; perhaps that of a constant: then
    both values lie within its error."""
    folded = (step for step in program.steps if isinstance(step, Affine) and step.bias_error is not None)
    if any(bool((step.bias_error > 1e-9 * (1 + step.bias.abs())).any()) for step in folded):  # type: ignore[operator]
        return True
    return any(
        bool(((values[step.source] - t).abs() <= 1e-9 * (1 + abs(t))).any())
        for step in program.steps if isinstance(step, Function)
        for t, least, greatest in step.op.special_points if least < greatest
    )  # fmt: skip
