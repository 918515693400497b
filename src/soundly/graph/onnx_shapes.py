"""ONNX's shape operations, constants and reductions: of nodes in the graph, of arrays while reading."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from soundly.graph import elementwise as ew
from soundly.graph.composite import Maximum, Softmax, maximum_over
from soundly.graph.evaluate import Plan
from soundly.graph.linear import Combine, Concat, ScatterAdd, Sum, add, broadcast, mean, pad, reshape, scale, subtract
from soundly.graph.node import Fill, Input, Linear, Node, Shape
from soundly.graph.onnx_call import (
    FLOAT,
    INT,
    Array,
    Call,
    Result,
    Value,
    normal,
    permuted,
    rearranged,
    reshaped,
    rule,
    taken,
)
from soundly.graph.onnx_file import DTYPES
from soundly.graph.onnx_ops import negated, nonzero
from soundly.graph.product import Dense, multiply
from soundly.graph.simplify import rebuild

# -- shapes


rule("Identity", known=True)(lambda c: c.value(0))


@rule("Dropout", known=True)
def _dropout(c: Call) -> Result:
    if c.opset >= 12 and c.has(2) and bool(c.array(2)):
        raise c.refuse("dropout in training mode")
    return [c.value(0), None]


@rule("Shape", gives=INT, known=True)
def _shape(c: Call) -> Array:
    shape = c.shape(0)
    return np.array(shape[slice(c.attr("start"), c.attr("end"))], np.int64)


@rule("Size", gives=INT, known=True)
def _size(c: Call) -> Array:
    return np.array(math.prod(c.shape(0)), np.int64)


@rule("Constant", known=True)
def _constant(c: Call) -> Array:
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if name in c.attributes:
            return np.array(c.attr(name), dtype)
    if not isinstance(c.attr("value"), np.ndarray):
        raise c.refuse("a constant that is not a tensor of numbers")
    entries: Array = c.attr("value")
    return entries


@rule("ConstantOfShape", known=True)
def _constant_of_shape(c: Call) -> Array:
    shape = c.reader.room(c.numbers(0), folded=True)
    fill = c.attr("value", np.zeros(1, np.float32))
    return np.full(shape, fill.reshape(-1)[0], fill.dtype)


@rule("Range", known=True)
def _range(c: Call) -> Array:
    start, limit, step = (c.array(i).reshape(-1)[0] for i in range(3))
    count = max(0, math.ceil((float(limit) - float(start)) / float(step)))
    c.reader.room((count,), folded=True)
    return (start + np.arange(count, dtype=np.int64).astype(start.dtype) * step).astype(start.dtype)


@rule("EyeLike", known=True)
def _eye_like(c: Call) -> Array:
    rows, columns = c.reader.room(c.shape(0), folded=True)
    return np.eye(rows, columns, c.attr("k", 0), dtype=np.dtype(DTYPES[c.attr("dtype", 1)]))


@rule("Reshape", known=True)
def _reshape(c: Call) -> Result:
    old, wanted = c.shape(0), list(c.numbers(1, "shape"))
    if not c.attr("allowzero", 0):
        wanted = [old[i] if n == 0 else n for i, n in enumerate(wanted)]
    if -1 in wanted:
        rest = math.prod(n for n in wanted if n != -1)
        wanted[wanted.index(-1)] = math.prod(old) // rest if rest else 0
    if math.prod(wanted) != math.prod(old) or any(n < 0 for n in wanted):
        raise ValueError(f"a value of shape {old} cannot be reshaped to {wanted}")
    return reshaped(c.given(0), c.room(wanted))


@rule("Flatten", known=True)
def _flatten(c: Call) -> Result:
    shape, axis = c.shape(0), c.attr("axis", 1)
    if not -len(shape) <= axis <= len(shape):
        raise ValueError(f"axis {axis} does not exist in a value with {len(shape)} axes")
    axis = axis if axis >= 0 else axis + len(shape)
    return reshaped(c.given(0), (math.prod(shape[:axis]), math.prod(shape[axis:])))


@rule("Transpose", known=True)
def _transpose(c: Call) -> Result:
    n = len(c.shape(0))
    axes = [normal(a, n) for a in c.attr("perm", tuple(reversed(range(n))))]
    if sorted(axes) != list(range(n)):
        raise ValueError(f"{axes} is no order of {n} axes")
    return permuted(c.given(0), axes)


@rule("Squeeze", known=True)
def _squeeze(c: Call) -> Result:
    shape = c.shape(0)
    axes = c.numbers(1, "axes", tuple(i for i, n in enumerate(shape) if n == 1))
    drop = {normal(a, len(shape)) for a in axes}
    if any(shape[a] != 1 for a in drop):
        raise ValueError(f"axes {sorted(drop)} of a value of shape {shape} do not have length one")
    return reshaped(c.given(0), [n for i, n in enumerate(shape) if i not in drop])


@rule("Unsqueeze", known=True)
def _unsqueeze(c: Call) -> Result:
    shape, axes = c.shape(0), c.numbers(1, "axes")
    rank = len(shape) + len(axes)
    new, rest = {normal(a, rank) for a in axes}, iter(shape)
    if len(new) != len(axes):
        raise ValueError(f"axes {axes} are not distinct")
    return reshaped(c.given(0), [1 if i in new else next(rest) for i in range(rank)])


@rule("Slice", known=True)
def _slice(c: Call) -> Result:
    shape = c.shape(0)
    starts, ends = c.numbers(1, "starts"), c.numbers(2, "ends")
    axes = c.numbers(3, "axes", tuple(range(len(starts))))
    steps = c.numbers(4, "", (1,) * len(starts))
    x = c.given(0)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        a = normal(axis, len(shape))
        n = shape[a]
        # An end before the first entry, as large negative numbers mean with a negative step, is None in Python.
        stop = None if step < 0 and end < -n else end
        x = taken(x, a, range(n)[slice(start, stop, step)])
    return x


@rule("Split", known=True)
def _split(c: Call) -> Result:
    shape = c.shape(0)
    axis = c.axis(len(shape), 0)
    sizes = c.numbers(1, "split")
    if sizes is None:
        count = c.attr("num_outputs", c.outputs)
        size = -(-shape[axis] // count)
        sizes = [max(0, min(size, shape[axis] - i * size)) for i in range(count)]
    if sum(sizes) != shape[axis] or any(n < 0 for n in sizes):
        raise ValueError(f"parts {list(sizes)} do not add up to axis {axis} of a value of shape {shape}")
    ends = np.cumsum(sizes).tolist()
    return [taken(c.given(0), axis, range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


@rule("Concat", known=True)
def _concat(c: Call) -> Result:
    parts = [c.given(i) for i in range(len(c.inputs))]
    axis = c.axis(len(parts[0].shape), 1)
    if not any(isinstance(p, Node) for p in parts):
        c.reader.room((sum(p.size for p in parts if not isinstance(p, Node)),), folded=True)
        return np.concatenate(parts, axis)  # type: ignore[arg-type]
    nodes = [c.node(i) for i, part in enumerate(parts) if part.shape[axis]]
    return nodes[0] if len(nodes) == 1 else Concat(axis)(*nodes)


@rule("Gather", known=True)
def _gather(c: Call) -> Result:
    shape = c.shape(0)
    axis, index = c.axis(len(shape), 0), c.array(1)
    result = (*shape[:axis], *index.shape, *shape[axis + 1 :])
    c.reader.room(result, folded=not isinstance(c.given(0), Node))
    return reshaped(taken(c.given(0), axis, index), result)


@rule("GatherElements", known=True)
def _gather_elements(c: Call) -> Result:
    axis = c.axis(len(c.shape(0)), 0)
    return rearranged(c, lambda x: np.take_along_axis(x, c.array(1) % x.shape[axis], axis))


@rule("GatherND", known=True)
def _gather_nd(c: Call) -> Result:
    index = c.array(1)
    if c.attr("batch_dims", 0):
        raise c.refuse("GatherND with batch_dims")
    return rearranged(c, lambda x: x[tuple(np.moveaxis(index, -1, 0))])


def _replaced(c: Call, owner: Array) -> Result:
    """Operand 0 with some entries from the operand of updates: owner says which, -1 where it stays."""
    shape, reduction = c.shape(0), c.attr("reduction", "none")
    data, updates = c.given(0), c.given(2)
    size = math.prod(shape)
    if reduction == "none":
        both = [reshaped(data, (size,)), reshaped(updates, (math.prod(updates.shape),))]
        places = np.where(owner < 0, np.arange(size), owner + size)
        if not any(isinstance(p, Node) for p in both):
            return np.concatenate(both)[places].reshape(shape)  # type: ignore[arg-type]
        joined = Concat(0)(reshape(c.node(0), (size,)), reshape(c.node(2), (math.prod(updates.shape),)))
        return reshaped(taken(joined, 0, places), shape)
    raise c.refuse(f"{c.op} with reduction {reduction!r}")


@rule("ScatterND", known=True)
def _scatter_nd(c: Call) -> Result:
    index, shape = c.array(1), c.shape(0)
    depth = index.shape[-1]
    rows = index.reshape(-1, depth)
    if ((rows < -np.array(shape[:depth])) | (rows >= np.array(shape[:depth]))).any():
        raise ValueError(f"a position lies outside a value of shape {shape}")
    inner = math.prod(shape[depth:])
    flat = (
        np.ravel_multi_index(tuple((rows % np.array(shape[:depth])).T), shape[:depth])
        if depth
        else np.zeros(len(rows), int)
    )
    flat = (flat[:, None] * inner + np.arange(inner)).reshape(-1)
    if c.attr("reduction", "none") == "add":
        total = ScatterAdd(0, tuple(flat.tolist()), math.prod(shape))(reshape(c.node(2), (len(flat),)))
        return add(c.node(0), reshape(total, shape))
    owner = np.full(math.prod(c.reader.room(shape, folded=True)), -1)
    owner[flat] = np.arange(len(flat))
    return _replaced(c, owner)


@rule("ScatterElements", "Scatter", known=True)
def _scatter_elements(c: Call) -> Result:
    shape, index = c.shape(0), c.array(1)
    axis = c.axis(len(shape), 0)
    owner = np.full(c.reader.room(shape, folded=True), -1)
    where: list[Array] = list(np.indices(index.shape))
    where[axis] = index % shape[axis]
    owner[tuple(where)] = np.arange(index.size).reshape(index.shape)
    return _replaced(c, owner.reshape(-1))


@rule("Expand", known=True)
def _expand(c: Call) -> Result:
    shape = c.room(np.broadcast_shapes(c.shape(0), c.numbers(1)))
    x = c.given(0)
    if isinstance(x, Node):
        return broadcast(x, shape)
    c.reader.room(shape, folded=True)
    return np.broadcast_to(x, shape).copy()


@rule("Tile", known=True)
def _tile(c: Call) -> Result:
    shape, repeats = c.shape(0), c.numbers(1)
    result = c.room([n * r for n, r in zip(shape, repeats, strict=True)])
    x = c.given(0)
    if not isinstance(x, Node):
        c.reader.room(result, folded=True)
        return np.tile(x, repeats)
    pairs = [m for n, r in zip(shape, repeats, strict=True) for m in (r, n)]
    x = broadcast(reshape(x, [m for n in shape for m in (1, n)]), pairs)
    return reshape(x, result)


@rule("Pad", known=True)
def _pad(c: Call) -> Result:
    shape, mode = c.shape(0), c.attr("mode", "constant")
    pads = c.numbers(1, "pads") or c.attr("paddings")
    axes = [normal(a, len(shape)) for a in c.numbers(3, "", tuple(range(len(shape))))]
    if len(pads) != 2 * len(axes):
        raise ValueError(f"{len(pads)} pads do not fit {len(axes)} axes")
    before, after = [0] * len(shape), [0] * len(shape)
    for i, a in enumerate(axes):
        before[a], after[a] = pads[i], pads[len(axes) + i]
    result = c.room([n + b + a for n, b, a in zip(shape, before, after, strict=True)])
    if mode == "constant":
        fill = c.scalar(2, "value", 0.0)
        if fill is None:
            raise c.refuse("padding with a value that depends on an input")
        source = c.given(0)
        if not isinstance(source, Node) and min(*before, *after) >= 0:
            c.reader.room(result, folded=True)
            return np.pad(source, list(zip(before, after, strict=True)), constant_values=fill)
        padded = pad(c.node(0), before, after)
        inside = pad(Fill(1.0, shape)(), before, after)
        return add(padded, scale(negated(inside), float(fill))) if fill else padded
    kind = {"edge": "edge", "reflect": "reflect", "wrap": "wrap"}.get(mode)
    if kind is None:
        raise c.refuse(f"padding mode {mode!r}")
    c.reader.room((max(result, default=0),), folded=True)
    x: Array | Node = c.given(0)
    for axis, (n, b, a) in enumerate(zip(shape, before, after, strict=True)):
        if b or a:
            places: Array = np.pad(np.arange(n), (max(b, 0), max(a, 0)), mode=kind)  # type: ignore[call-overload]
            x = taken(x, axis, places[max(-b, 0) : len(places) - max(-a, 0)])
    return x


@rule("DepthToSpace", known=True)
def _depth_to_space(c: Call) -> Result:
    n, depth, h, w = c.shape(0)
    b = c.attr("blocksize")
    if c.attr("mode", "DCR") == "DCR":
        split, order = (n, b, b, depth // b**2, h, w), (0, 3, 4, 1, 5, 2)
    else:
        split, order = (n, depth // b**2, b, b, h, w), (0, 1, 4, 2, 5, 3)
    return reshaped(permuted(reshaped(c.given(0), split), order), (n, depth // b**2, h * b, w * b))


@rule("SpaceToDepth", known=True)
def _space_to_depth(c: Call) -> Result:
    n, depth, h, w = c.shape(0)
    b = c.attr("blocksize")
    if c.attr("mode", "DCR") != "DCR":
        raise c.refuse(f"SpaceToDepth with mode {c.attr('mode')!r}")
    split = reshaped(c.given(0), (n, depth, h // b, b, w // b, b))
    return reshaped(permuted(split, (0, 3, 5, 1, 2, 4)), (n, depth * b**2, h // b, w // b))


@rule("Trilu", known=True)
def _trilu(c: Call) -> Result:
    k = int(c.array(1)) if c.has(1) else 0
    x = c.given(0)
    keep = np.triu if c.attr("upper", 1) else np.tril
    if not isinstance(x, Node):
        return keep(x, k)
    mask = keep(np.ones(c.reader.room(x.shape[-2:], folded=True), FLOAT), k)
    return multiply(x, broadcast(c.constant("mask", mask), x.shape))


@rule("CumSum", known=True)
def _cumsum(c: Call) -> Result:
    shape = c.shape(0)
    axis = normal(int(c.array(1).reshape(-1)[0]), len(shape))
    n = shape[axis]
    c.reader.room((n, n), folded=True)
    matrix = np.tril(np.ones((n, n), FLOAT), -1 if c.attr("exclusive", 0) else 0)
    if c.attr("reverse", 0):
        matrix = matrix.T
    x = c.given(0)
    if not isinstance(x, Node):
        return np.moveaxis(np.moveaxis(x, axis, -1) @ matrix.T.astype(x.dtype), -1, axis)
    order = [*(i for i in range(len(shape)) if i != axis), axis]
    summed = Dense()(permuted(x, order), c.constant("triangle", matrix.copy()))  # type: ignore[arg-type]
    return permuted(summed, np.argsort(order).tolist())


@rule("NonZero", gives=INT, known=True)
def _nonzero_positions(c: Call) -> Array:
    return np.array(np.nonzero(c.array(0)), np.int64)


# -- reductions


def _reduced(c: Call) -> tuple[tuple[int, ...], Shape]:
    """The axes to reduce and the result's shape."""
    shape = c.shape(0)
    axes = c.numbers(1, "axes")
    if not axes:
        axes = () if c.attr("noop_with_empty_axes", 0) else tuple(range(len(shape)))
    over = tuple(sorted({normal(a, len(shape)) for a in axes}))
    keep = c.attr("keepdims", 1)
    return over, tuple(1 if i in over else n for i, n in enumerate(shape) if keep or i not in over)


def _reduction(
    node: Callable[[Node, tuple[int, ...]], Node], array: Callable[..., Any] | None = None
) -> Callable[[Call], Result]:
    def build(c: Call) -> Result:
        axes, shape = _reduced(c)
        x = c.given(0)
        if not isinstance(x, Node) and array is not None:
            return np.asarray(array(x, axis=axes, keepdims=True), x.dtype).reshape(shape)
        return reshape(node(c.node(0), axes), shape)

    return build


def largest(x: Node, axes: Sequence[int]) -> Node:
    for axis in axes:
        x = maximum_over(x, axis)
    return x


def _log_sum_exp(x: Node, axes: tuple[int, ...]) -> Node:
    peak = largest(x, axes)
    return add(ew.LOG(Sum(axes)(ew.EXP(subtract(x, broadcast(peak, x.shape))))), peak)


def _multiplied(x: Node, axes: tuple[int, ...]) -> Node:
    for axis in axes:
        parts = [taken(x, axis, [i]) for i in range(x.shape[axis])]
        x = parts[0]  # type: ignore[assignment]
        for part in parts[1:]:
            x = multiply(x, part)  # type: ignore[arg-type]
    return x


for _name, _node, _array in (
    ("ReduceSum", lambda x, axes: Sum(axes)(x), np.sum),
    ("ReduceMean", mean, np.mean),
    ("ReduceMax", largest, np.max),
    ("ReduceMin", lambda x, axes: scale(largest(scale(x, -1), axes), -1), np.min),
    ("ReduceProd", _multiplied, np.prod),
    ("ReduceL1", lambda x, axes: Sum(axes)(ew.ABS(x)), None),
    ("ReduceL2", lambda x, axes: ew.SQRT(Sum(axes)(ew.SQUARE(x))), None),
    ("ReduceSumSquare", lambda x, axes: Sum(axes)(ew.SQUARE(x)), None),
    ("ReduceLogSum", lambda x, axes: ew.LOG(Sum(axes)(x)), None),
    ("ReduceLogSumExp", _log_sum_exp, None),
):
    rule(_name, known=True)(_reduction(_node, _array))


def winners(x: Node, axis: int, *, last: bool = False) -> Node:
    """1 at the first (or last) largest entry along an axis, else 0: exact, from running maxima on both sides."""
    x, n = _scores(x, axis), x.shape[axis]
    order = range(n - 1, -1, -1) if last else range(n)
    parts = [taken(x, axis, [i]) for i in order]
    after: list[Node | None] = [None] * n
    for i in range(n - 2, -1, -1):
        step = after[i + 1]
        after[i] = parts[i + 1] if step is None else Maximum()(parts[i + 1], step)  # type: ignore[assignment, arg-type]
    before: Node | None = None
    flags: list[Node] = []
    for part, later in zip(parts, after, strict=True):
        assert isinstance(part, Node)
        flag = None if later is None else negated(ew.STEP(subtract(later, part)))
        if before is not None:
            strictly = ew.STEP(subtract(part, before))
            flag = strictly if flag is None else multiply(flag, strictly)
        flags.append(Fill(1.0, part.shape)() if flag is None else flag)
        before = part if before is None else Maximum()(before, part)
    flags = flags[::-1] if last else flags
    return flags[0] if n == 1 else Concat(axis)(*flags)


def _scores(x: Node, axis: int) -> Node:
    """Simpler numbers in the same order along an axis: where these all come from one softmax, moved, its scores."""
    node = x
    while isinstance(node.op, Linear) and len(node.inputs) == 1 and node.op.terms(node.inputs[0].shape) == 1:
        (node,) = node.inputs
    if not isinstance(node.op, Softmax) or len(node.inputs) > 1:
        return x
    apart = tuple(1 if i == node.op.axis else n for i, n in enumerate(node.shape))
    number = torch.arange(1.0, 1 + math.prod(apart), dtype=torch.float64).reshape(apart).expand(node.shape)
    seed = Input("softmax", node.shape)()
    of = Plan([_above(x, node, seed)])({seed: number}, dtype=torch.float64, device=torch.device("cpu"))[0]
    same = bool((of != 0).all() & (of == of.narrow(axis, 0, 1)).all())
    return _above(x, node, node.inputs[0]) if same else x


def _above(x: Node, old: Node, new: Node) -> Node:
    """The node with another one at the place of `old`."""
    return rebuild([x], lambda node, made: new if node is old else made)[x]


@rule("ArgMax", "ArgMin", gives=INT)
def _arg_extreme(c: Call) -> Node:
    x = c.node(0) if c.op == "ArgMax" else scale(c.node(0), -1)
    axis = c.axis(len(x.shape), 0)
    flags = winners(x, axis, last=bool(c.attr("select_last_index", 0)))
    index = [taken(flags, axis, [i]) for i in range(x.shape[axis])]
    total = Combine(tuple(map(float, range(len(index)))))(*index)  # type: ignore[arg-type]
    shape = [1 if i == axis else n for i, n in enumerate(x.shape) if c.attr("keepdims", 1) or i != axis]
    return reshape(total, shape)


@rule("Hardmax")
def _hardmax(c: Call) -> Node:
    x = c.node(0)
    if c.opset >= 13:
        return winners(x, c.axis(len(x.shape), -1))
    axis = c.axis(len(x.shape), 1)
    return reshape(winners(reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))), 1), x.shape)


@rule("OneHot", known=True)
def _one_hot(c: Call) -> Result:
    index, depth, ends = c.given(0), int(c.array(1).reshape(-1)[0]), c.array(2)
    rank = len(index.shape) + 1
    axis = c.axis(rank, -1)
    shape = c.room((*index.shape[:axis], depth, *index.shape[axis:]))
    column = [*index.shape[:axis], 1, *index.shape[axis:]]
    levels = np.arange(depth).reshape([depth if i == axis else 1 for i in range(rank)])
    if not isinstance(index, Node):
        c.reader.room(shape, folded=True)
        places = np.where(index < 0, index + depth, index).reshape(column)
        return Value(c.name, ends.dtype, shape, array=np.where(places == levels, ends[1], ends[0]))
    if c.value(0).dtype.kind == "f":
        raise c.refuse("OneHot of indices that are not whole numbers")
    position = broadcast(reshape(index, column), shape)
    flags = [
        _levels(subtract(position, broadcast(c.constant(f"levels {k}", levels - k * depth), shape))) for k in (0, 1)
    ]  # positions from -depth to -1 count from the end
    node = scale(add(*flags), float(ends[1]) - float(ends[0]))
    return Value(c.name, ends.dtype, shape, node=add(node, Fill(float(ends[0]), shape)()))


def _levels(difference: Node) -> Node:
    """1 where a whole number is zero, else 0."""
    return negated(nonzero(difference, whole=True))
