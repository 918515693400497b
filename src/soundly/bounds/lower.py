"""From a network to a program: data movement, sums and layers are composed into few affine steps.

Every value is kept as an affine function of earlier steps for as long as that costs nothing, and becomes a step where a
function or a product reads it, or where composing further would cost more work or an unknown amount of rounding.
Weights are constants; whatever rounding changes in them while they are folded is bounded and recorded in the step
(underflow apart). The program is compared with the network before it is returned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soundly.bounds.interval import Interval, interval_bounds
from soundly.bounds.program import Affine, Convolution, Function, Map, Matrix, Program, Sparse, Step, Times, Variable
from soundly.errors import CaptureMismatch, MissingRule
from soundly.graph.elementwise import SQUARE, Elementwise
from soundly.graph.evaluate import Plan
from soundly.graph.linear import Combine, Reshape, Sum, broadcast, reshape, transpose
from soundly.graph.network import Network
from soundly.graph.node import Composite, Fill, Input, Leaf, Linear, Node, Product, dependents, topological
from soundly.graph.product import Conv, ConvTranspose, Dense, MatMul, Multiply
from soundly.graph.simplify import rebuild

_UNIT = 2.0**-53
_TINY = 2.0**-960  # below this a product may have underflowed


def lower(network: Network, outputs: Sequence[Node] | None = None) -> Program:
    """The network as a program in float64: its joined flattened inputs to its joined flattened outputs.

    Args:
        outputs: nodes of the network's graph; by default the network's outputs.

    Returns:
        A program whose steps, with coefficients anywhere within their recorded errors, contain the network in real
        arithmetic with exactly its weights. Inputs are in the order of `network.inputs`, each in C order.

    Raises:
        MissingRule: a value depends on an input in a way that steps cannot express (rounding to whole numbers), or
            only with very many products; or a constant is not finite.
        CaptureMismatch: the program and the network disagree at a random point, which would be a defect of soundly.
    """
    wide = network.to(torch.float64).to("cpu")
    wanted = tuple(network.outputs if outputs is None else outputs)
    with torch.no_grad():
        program = _Lowering(wide, wanted).program
        _compare(wide, wanted, program)
    return program


# Compared by identity: values serve as keys.
@dataclass(frozen=True, eq=False)
class _Value:
    """An affine function of steps that is not a step itself yet; the fields are those of `Affine`."""

    parts: tuple[tuple[Map, int], ...]
    bias: Tensor
    weight_error: float = 0.0
    bias_error: Tensor | None = None

    @property
    def view(self) -> tuple[Sparse, int] | None:
        """(map, step) where the value is a sparse map of one step, without error or bias."""
        if len(self.parts) != 1 or self.weight_error or self.bias_error is not None or bool(self.bias.any()):
            return None
        part, source = self.parts[0]
        return (part, source) if isinstance(part, Sparse) else None

    @property
    def content(self) -> tuple[object, ...]:
        """Equal for two sums of sparse maps that are the same: differentiation writes some values down twice."""
        if not all(isinstance(part, Sparse) for part, _ in self.parts):
            return (self,)
        parts = [(p.rows, p.columns, p.values, i) for p, i in self.parts if isinstance(p, Sparse)]
        numbers = [self.bias] if self.bias_error is None else [self.bias, self.bias_error]
        return self.weight_error, *(
            x.numpy().tobytes() if isinstance(x, Tensor) else x for part in (*parts, numbers) for x in part
        )


class _Lowering:
    """One walk over the graph, inputs first; steps are appended as they become necessary."""

    def __init__(self, network: Network, outputs: tuple[Node, ...]) -> None:
        self.steps: list[Step] = [Variable(sum(math.prod(n.shape) for n in network.inputs))]
        self.made: dict[_Value | tuple[object, ...], int] = {}  # steps by what they compute
        roots = _expanded(network, outputs)
        order = topological(roots)
        varying = dependents(order, network.inputs)
        border = [n for n in roots if n not in varying]
        border += [c for n in order if n in varying for c in n.inputs if c not in varying]
        self.constants = interval_bounds(network, {}, list(dict.fromkeys(border)))
        self.values: dict[Node, _Value] = {}
        start = 0
        for node in network.inputs:
            columns = torch.arange(start, start := start + math.prod(node.shape))
            inputs = _sparse(torch.arange(len(columns)), columns, None, (len(columns), self.steps[0].size))
            self.values[node] = _Value(((inputs, 0),), torch.zeros(len(columns), dtype=torch.float64))
        readers: dict[Node, list[Node | None]] = {node: [None] * roots.count(node) for node in order}
        for node in order:
            for child in node.inputs:
                readers[child].append(node)
        for node in order:
            if node in varying and node not in self.values:
                value = self._value(node)
                if len(readers[node]) > 1 and not _divides(node, readers[node]):
                    value = self._shared(value)
                self.values[node] = value
        self.program = self._finished(roots)

    def _finished(self, roots: tuple[Node, ...]) -> Program:
        """The steps that the joined outputs depend on, the outputs last."""
        total, start = sum(math.prod(n.shape) for n in roots), 0
        placed = []
        for node in roots:
            rows = torch.arange(start, start := start + math.prod(node.shape))
            place = _sparse(rows, torch.arange(len(rows)), None, (total, len(rows)))
            placed.append(self._through(place, 0.0, self._operand(node)))
        last = self._step(_sum(placed))
        if last == 0:
            identity = _identity(total)
            self.steps.append(Affine(((identity, 0),), torch.zeros(total, dtype=torch.float64)))
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

    def _step(self, value: _Value) -> int:
        """The step that holds the value; a new one, unless it is one already."""
        view = value.view
        if view is not None and _is_identity(view[0]):
            return view[1]
        if value not in self.made:
            step = Affine(value.parts, value.bias, value.weight_error, value.bias_error)
            known = self.made.get(content := value.content)
            self.made[value] = self.made[content] = self._append(step) if known is None else known
        return self.made[value]

    def _append(self, step: Step) -> int:
        self.steps.append(step)
        return len(self.steps) - 1

    def _settled(self, value: _Value) -> _Value:
        """The same value as a view of a step of its own."""
        return self._whole(self._step(value))

    def _whole(self, step: int) -> _Value:
        size = self.steps[step].size
        return _Value(((_identity(size), step),), torch.zeros(size, dtype=torch.float64))

    def _shared(self, value: _Value) -> _Value:
        """For several readers: a view where reading it again would repeat more work than copying."""
        cheap = all(isinstance(part, Sparse) for part, _ in value.parts)
        work = sum(_work(part) for part, _ in value.parts)
        return value if cheap and work <= 2 * len(value.bias) else self._settled(value)

    # -- rules

    def _operand(self, node: Node) -> _Value:
        if node in self.values:
            return self.values[node]
        centre, radius = _ball(self.constants[node])
        if not bool(torch.isfinite(centre).all()):
            raise MissingRule(f"{node!r} is a constant that is not finite; nothing can be added to it.")
        return _Value((), centre.reshape(-1), 0.0, None if radius is None else radius.reshape(-1))

    def _value(self, node: Node) -> _Value:
        op, x = node.op, node.inputs
        if isinstance(op, Elementwise):
            return self._function(op, self.values[x[0]])
        if isinstance(op, Reshape):
            return self._operand(x[0])
        if isinstance(op, Combine):
            scaled = (self._scaled(self._operand(c), f) for c, f in zip(x, op.coefficients, strict=True) if f != 0)
            return _sum(list(scaled), math.prod(node.shape))
        if isinstance(op, Linear):
            parts = [self._through(_movement(node, slot), 0.0, self._operand(c)) for slot, c in enumerate(x)]
            return _sum(parts)
        if isinstance(op, Product):
            moving = [slot for slot, child in enumerate(x) if child in self.values]
            if len(moving) == 1:
                (slot,) = moving
                centre, radius = _ball(self.constants[x[1 - slot]])
                centre, error = _relative(centre, radius, x[1 - slot])
                return self._through(_layer(node, slot, centre), error, self.values[x[slot]])
            if isinstance(op, Multiply):
                return self._times(self.values[x[0]], self.values[x[1]])
            rows, *columns = _terms(node, 0)
            terms = torch.arange(len(rows))
            left, right = (
                self._through(_sparse(terms, taken, None, (len(terms), len(v.bias))), 0.0, v)
                for taken, v in zip(columns, (self.values[child] for child in x), strict=True)
            )
            total = _sparse(rows, terms, None, (math.prod(node.shape), len(terms)))
            return self._through(total, 0.0, self._times(left, right))
        raise MissingRule(f"{node!r} is neither linear, a product, elementwise nor composed of such operations.")

    def _function(self, op: Elementwise, value: _Value) -> _Value:
        view = value.view
        if view is not None and _only_moves(view[0]):  # f(entries of y) = entries of f(y)
            moved, source = view
            return _Value(((moved, self._applied(op, source)),), value.bias)
        return self._whole(self._applied(op, self._step(value)))

    def _applied(self, op: Elementwise, source: int) -> int:
        if (op, source) not in self.made:
            self.made[op, source] = self._append(Function(source, op, self.steps[source].size))
        return self.made[op, source]

    def _times(self, a: _Value, b: _Value) -> _Value:
        left, right = sorted((self._step(a), self._step(b)))
        if left == right:
            return self._whole(self._applied(SQUARE, left))
        if (left, right) not in self.made:
            self.made[left, right] = self._append(Times(left, right, self.steps[left].size))
        return self._whole(self.made[left, right])

    def _scaled(self, value: _Value, factor: float) -> _Value:
        if factor == 1:
            return value
        size = len(value.bias)
        factors = torch.full((size,), factor, dtype=torch.float64)
        return self._through(replace(_identity(size), values=factors), 0.0, value)

    def _through(self, outer: Map, error: float, value: _Value) -> _Value:
        """outer(value), the outer coefficients being known up to the relative error; composed where that is no dearer
        than two steps, and where the rounding stays relative to each coefficient."""
        parts, worst = [], 0.0
        for inner, source in value.parts:
            composed = _composed(outer, inner, exact=not error and not value.weight_error)
            if composed is None:
                return self._through(outer, error, self._settled(value))
            if _work(composed[0]):
                parts.append((composed[0], source))
            worst = max(worst, composed[1])
        before = sum(_work(part) for part, _ in value.parts)
        limit = (2 if len(value.parts) == 1 else 1) * _work(outer) + before + len(value.bias)
        if sum(_work(part) for part, _ in parts) > limit:
            return self._through(outer, error, self._settled(value))
        bias, bias_error = _image(outer, error, value.bias, value.bias_error)
        return _Value(tuple(parts), bias, _both(_both(error, value.weight_error), worst), bias_error)


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


def _expanded(network: Network, outputs: tuple[Node, ...]) -> tuple[Node, ...]:
    """The outputs over a graph in which what depends on inputs is elementwise, a linear map, a layer or an entrywise
    product, and nothing is computed twice."""
    changed = True
    while changed:  # expansions may hold composites
        outputs, changed = _expanded_once(network, outputs)
    return outputs


def _expanded_once(network: Network, outputs: tuple[Node, ...]) -> tuple[tuple[Node, ...], bool]:
    varying = dependents(topological(outputs), network.inputs)
    known: dict[object, Node] = {}
    expanded: list[Node] = []

    def rule(old: Node, node: Node) -> Node:
        if old in varying and (simpler := _simpler(node, [c in varying for c in old.inputs])) is not None:
            expanded.append(old)
            return simpler
        leaf = isinstance(node.op, Leaf) and not isinstance(node.op, Fill)
        return node if leaf else known.setdefault((node.op, node.inputs), node)

    new = rebuild(outputs, rule)
    return tuple(new[node] for node in outputs), bool(expanded)


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
        return _sparse(rows, found[rows].abs().long() - 1, found[rows].sign(), size)
    seed = Input("seed", node.shape)()
    positions = torch.arange(1.0, size[0] + 1, dtype=torch.float64).reshape(node.shape)
    plan = Plan([op.adjoint(slot, seed, node.inputs)])
    found = plan({seed: positions}, dtype=torch.float64, device=torch.device("cpu"))[0].reshape(-1)
    columns = found.nonzero()[:, 0]
    rows = found[columns].abs().long() - 1
    order = torch.argsort(rows, stable=True)
    return _sparse(rows[order], columns[order], found[columns][order].sign(), size)


def _layer(node: Node, slot: int, constant: Tensor) -> Map:
    """A product with a constant, as a map of its other input; exactly the constant's numbers."""
    op, shape = node.op, node.inputs[slot].shape
    match op:
        case Multiply():
            size = constant.numel()
            values = constant.reshape(-1)
            rows = values.nonzero()[:, 0]
            return _sparse(rows, rows, values[rows], (size, size))
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
    return _sparse((rows + block * m).reshape(-1), (columns + block * n).reshape(-1), values, (blocks * m, blocks * n))


def _entries(node: Node, slot: int, constant: Tensor) -> Sparse:
    """Any product with a constant, coefficient by coefficient."""
    rows, columns, which = _terms(node, slot)
    size = math.prod(node.shape), math.prod(node.inputs[slot].shape)
    return _sparse(rows, columns, constant.reshape(-1)[which], size)


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


# -- composing maps


def _composed(outer: Map, inner: Map, exact: bool) -> tuple[Map, float] | None:
    """outer after inner as one map, and what rounding adds to the relative error of its coefficients; None where there
    is no such map, or where terms of different signs would be added up and not both maps are `exact`."""
    if isinstance(inner, Sparse) and _is_identity(inner):
        return outer, 0.0
    if isinstance(outer, Sparse) and _is_identity(outer):
        return inner, 0.0
    match outer, inner:
        case Sparse(), Sparse():
            return _composed_sparse(outer, inner, exact)
        case Matrix(), Sparse() if outer.blocks == 1 and inner.size[1] <= 2 * inner.size[0]:
            if len(inner.columns.unique()) < len(inner.columns):
                return None
            weight = outer.weight.new_zeros(outer.weight.shape[0], inner.size[1])
            taken = outer.weight[:, inner.rows]
            weight[:, inner.columns] = taken * inner.values
            return Matrix(weight), _product_error(taken, inner.values)
        case Sparse(), Matrix() if inner.blocks == outer.terms == 1 and outer.size[0] <= 2 * outer.size[1]:
            weight = inner.weight.new_zeros(outer.size[0], inner.weight.shape[1])
            taken = inner.weight[outer.columns]
            weight[outer.rows] = taken * outer.values[:, None]
            return Matrix(weight), _product_error(taken, outer.values)
        case Sparse(), Matrix():
            scale = _repeated(outer, inner.blocks, inner.weight.shape[0], 1)
            if scale is not None:
                weight = inner.weight * scale[:, None]
                return replace(inner, weight=weight), _product_error(inner.weight, scale)
        case Matrix(), Sparse():
            scale = _repeated(inner, outer.blocks, outer.weight.shape[1], 1)
            if scale is not None:
                return replace(outer, weight=outer.weight * scale), _product_error(outer.weight, scale)
        case Sparse(), Convolution():
            return _scaled_channels(inner, outer, not inner.transposed)
        case Convolution(), Sparse():
            return _scaled_channels(outer, inner, outer.transposed)
    return None


def _composed_sparse(outer: Sparse, inner: Sparse, exact: bool) -> tuple[Sparse, float] | None:
    counts = torch.bincount(inner.rows, minlength=inner.size[0])
    starts = counts.cumsum(0) - counts
    repeats = counts[outer.columns]
    total = int(repeats.sum())
    if total > len(outer.rows) + len(inner.rows) + outer.size[0]:
        return None
    left = torch.repeat_interleave(torch.arange(len(repeats)), repeats)
    right = starts[outer.columns[left]] + torch.arange(total) - (repeats.cumsum(0) - repeats)[left]
    rows, columns = outer.rows[left], inner.columns[right]
    values = outer.values[left] * inner.values[right]
    size = outer.size[0], inner.size[1]
    error = _product_error(outer.values, inner.values)
    if outer.terms == 1:
        return _sparse(rows, columns, values, size), error
    summed = _added(rows, columns, values, size, exact and not error)
    return None if summed is None else (summed[0], _both(error, summed[1]))


def _added(
    rows: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int], exact: bool
) -> tuple[Sparse, float] | None:
    """Coefficients of equal positions added up, and the relative error that this adds; None where signs differ, unless
    all are `exact` whole numbers: otherwise the error of a difference is not relative to it."""
    key, where = torch.unique(rows * size[1] + columns, return_inverse=True)
    total = values.new_zeros(len(key)).index_add(0, where, values)
    most = int(torch.bincount(where).max()) if len(where) else 1
    if most > 1:
        largest = values.new_zeros(len(key)).index_add(0, where, values.abs())
        exact = exact and bool((values == values.round()).all()) and float(largest.max()) < 2.0**53
        if not exact and not bool((total.abs() == largest).all()):
            return None
    key, total = key[total != 0], total[total != 0]
    return _sparse(key // size[1], key % size[1], total, size), 0.0 if exact else _gamma(most - 1)


def _repeated(scale: Sparse, blocks: int, size: int, inner: int) -> Tensor | None:
    """[size] where a diagonal map of [blocks, size, inner] has the same number throughout its first and last axis."""
    n = blocks * size * inner
    if scale.size != (n, n) or len(scale.rows) != n or not bool((scale.rows == scale.columns).all()):
        return None
    numbers = scale.values.reshape(blocks, size, inner)
    return numbers[0, :, 0] if bool((numbers == numbers[:1, :, :1]).all()) else None


def _scaled_channels(layer: Convolution, scale: Sparse, narrow: bool) -> tuple[Map, float] | None:
    """The layer with its narrow or wide channels scaled."""
    channels, *area = layer.narrow if narrow else layer.wide
    factors = _repeated(scale, 1, channels, math.prod(area))
    if factors is None:
        return None
    out, per_group = layer.weight.shape[:2]
    grouped = layer.weight.reshape(layer.groups, out // layer.groups, per_group, -1)
    factors = factors.reshape((layer.groups, -1, 1, 1) if narrow else (layer.groups, 1, -1, 1))
    weight = (grouped * factors).reshape(layer.weight.shape)
    return replace(layer, weight=weight), _product_error(layer.weight, factors)


def _work(part: Map) -> int:
    """How many products one application takes."""
    match part:
        case Matrix():
            return part.blocks * part.weight.numel()
        case Convolution():
            return part.weight.numel() * math.prod(part.narrow[1:])
    return len(part.rows)


def _sparse(rows: Tensor, columns: Tensor, values: Tensor | None, size: tuple[int, int]) -> Sparse:
    return Sparse(rows, columns, torch.ones(len(rows), dtype=torch.float64) if values is None else values, size)


def _identity(size: int) -> Sparse:
    return _sparse(torch.arange(size), torch.arange(size), None, (size, size))


def _is_identity(part: Sparse) -> bool:
    n = part.size[0]
    return part.size == (n, n) and len(part.rows) == n and bool(
        (part.rows == part.columns).all() & (part.values == 1).all()
    )  # fmt: skip


def _only_moves(part: Sparse) -> bool:
    """Whether every output is one input, and every input is used."""
    alone = len(part.rows) == part.size[0] and part.terms == 1 and bool((part.values == 1).all())
    return alone and len(part.columns.unique()) == part.size[1]


# -- sums, and what rounding does to them


def _sum(values: list[_Value], size: int = 0) -> _Value:
    """The sum of values; sparse maps of one step are added up where that is exact enough."""
    parts: list[tuple[Map, int]] = []
    bias = torch.zeros(len(values[0].bias) if values else size, dtype=torch.float64)
    bias_error: Tensor | None = None
    weight_error = max((value.weight_error for value in values), default=0.0)
    for value in values:
        total, lost = _two_sum(bias, value.bias)
        bias = total
        for error in (lost if bool(lost.any()) else None, value.bias_error):
            if error is not None:
                bias_error = error if bias_error is None else _up(bias_error + error)
        for part, source in value.parts:
            for i, (other, known) in enumerate(parts):
                if known == source and isinstance(part, Sparse) and isinstance(other, Sparse):
                    rows, columns = torch.cat([other.rows, part.rows]), torch.cat([other.columns, part.columns])
                    merged = _added(
                        rows, columns, torch.cat([other.values, part.values]), part.size, exact=not weight_error
                    )
                    if merged is not None:
                        parts[i] = merged[0], source
                        weight_error = _both(weight_error, merged[1])
                        break
            else:
                parts.append((part, source))
    return _Value(tuple(parts), bias, weight_error, bias_error)


def _image(outer: Map, error: float, bias: Tensor, bias_error: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """outer(bias), and by how much the true one may differ."""
    if not bool(bias.any()) and bias_error is None:
        return torch.zeros(outer.size[0], dtype=torch.float64), None
    result = outer.apply(bias)
    if isinstance(outer, Sparse) and outer.terms == 1:
        rounding = _product_error(outer.values, bias)
    else:
        rounding = _gamma(outer.terms + 1)
    relative = _both(error, rounding)
    lost = _up(relative * outer.absolute.apply(bias.abs())) if relative else None
    if bias_error is not None:
        carried = _up((1 + error) * outer.absolute.apply(bias_error))
        lost = carried if lost is None else _up(lost + carried)
    return result, lost


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and by how much exactly it was rounded (Knuth's TwoSum)."""
    total = a + b
    part = total - a
    return total, ((a - (total - part)) + (b - part)).abs()


def _up(error: Tensor) -> Tensor:
    """An error bound with room for its own rounding."""
    return error * (1 + 2.0**-20)


def _gamma(steps: int) -> float:
    """The relative error of some roundings, generously (Higham, Accuracy and Stability, 3.1)."""
    return 1.01 * steps * _UNIT


def _both(a: float, b: float) -> float:
    """The relative error of a product of two numbers with relative errors."""
    return (a + b + a * b) * (1 + 2.0**-20) if a and b else a + b


def _product_error(a: Tensor, b: Tensor) -> float:
    """The relative error of products of entries: none for two numbers of float32 or for powers of two."""
    return 0.0 if _is_binary(b) or _is_binary(a) or (_is_single(a) and _is_single(b)) else _gamma(1)


def _is_single(x: Tensor) -> bool:
    return bool((x.float().double() == x).all())


def _is_binary(x: Tensor) -> bool:
    """Whether all entries are zero or +- a moderate power of two."""
    mantissa, exponent = torch.frexp(x)
    return bool(((mantissa.abs() == 0.5) & (exponent.abs() < 64) | (x == 0)).all())


def _ball(bounds: Interval) -> tuple[Tensor, Tensor | None]:
    """Centre and radius; no radius for an exact number."""
    lower, upper = bounds
    if bounds.is_point or bool((lower == upper).all()):
        return lower, None
    centre = lower / 2 + upper / 2
    return centre, _up(torch.maximum(upper - centre, centre - lower))


def _relative(centre: Tensor, radius: Tensor | None, node: Node) -> tuple[Tensor, float]:
    """The numbers to use for a constant, and their relative error; what may only have underflowed counts as 0."""
    if not bool(torch.isfinite(centre).all()):
        raise MissingRule(f"{node!r} is a constant that is not finite; nothing can be multiplied with it.")
    if radius is None:
        return centre, 0.0
    centre = torch.where(centre.abs() + radius < _TINY, 0.0, centre)
    error = float(torch.where(centre == 0, 0.0, radius / centre.abs()).max())
    uncertain = (centre == 0) & (radius >= _TINY)
    if not error < 2.0**-10 or bool(uncertain.any()):
        raise MissingRule(f"{node!r} is a constant that cancels to zero up to rounding; fold it exactly beforehand.")
    return centre, error * (1 + 2.0**-20)


# -- the check


def _compare(network: Network, outputs: tuple[Node, ...], program: Program) -> None:
    """Raises where program and network differ at random points; points where either is not finite say nothing."""
    source = torch.Generator().manual_seed(0)
    points = torch.rand(4, program.inputs, generator=source, dtype=torch.float64) * 2 - 1
    values = program.evaluate(points)
    last = program.steps[-1]
    size = values[-1].abs()
    if isinstance(last, Affine):
        size = last.bias.abs() + sum(part.absolute.apply(values[source].abs()) for part, source in last.parts)
    for i, point in enumerate(points):
        pieces = point.split([math.prod(n.shape) for n in network.inputs])
        inputs = [piece.reshape(n.shape) for piece, n in zip(pieces, network.inputs, strict=True)]
        truth = torch.cat([y.reshape(-1) for y in network.evaluate(outputs, *inputs)])
        if not bool(torch.isfinite(truth).all() & torch.isfinite(values[-1][i]).all()):
            continue
        gap = (truth - values[-1][i]).abs()
        if not bool((gap <= 1e-9 * (1 + truth.abs() + size[i])).all()):
            raise CaptureMismatch(
                f"the program of {network.name} differs from it by {float(gap.max()):.3g} at a random point; nothing "
                "may be proved with it. Please report the network."
            )
