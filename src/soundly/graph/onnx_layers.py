"""ONNX's layers in terms of soundly's operations: convolution, pooling, normalisation, resampling, recurrence.

Paddings that ONNX allows and soundly's operations do not (one-sided, "same", larger than half a window) become explicit
padding, cropping or gathering here, and appear nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from soundly.graph import elementwise as ew
from soundly.graph.composite import MaxPool, Normalise, Softmax
from soundly.graph.linear import Combine, Concat, Sum, add, broadcast, mean, narrow, pad, reshape, scale, subtract
from soundly.graph.node import Constant, Fill, Node, Shape
from soundly.graph.onnx_call import INDICES, Array, Call, Result, normal, rule, taken
from soundly.graph.onnx_ops import powered
from soundly.graph.onnx_shapes import largest
from soundly.graph.product import Conv, ConvTranspose, Dense, multiply


def _spread(c: Call, name: str, n: int, default: int) -> Shape:
    values = tuple(c.attr(name, (default,) * n))
    if len(values) != n or any(v < 1 for v in values):
        raise ValueError(f"{name} {list(values)} do not fit {n} spatial axes")
    return values


def _pads(c: Call, size: Shape, kernel: Shape, stride: Shape, dilation: Shape) -> tuple[Shape, Shape]:
    """Padding before and after each spatial axis."""
    n, mode = len(size), c.attr("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        wide = zip(size, kernel, stride, dilation, strict=True)
        total = [max(0, (-(-m // s) - 1) * s + d * (k - 1) + 1 - m) for m, k, s, d in wide]
        less, more = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        return (less, more) if mode == "SAME_UPPER" else (more, less)
    pads = tuple(c.attr("pads", (0,) * 2 * n)) if mode != "VALID" else (0,) * 2 * n
    if len(pads) != 2 * n or any(p < 0 for p in pads):
        raise ValueError(f"pads {list(pads)} do not fit {n} spatial axes")
    return pads[:n], pads[n:]


def per_channel(x: Node, shape: Shape) -> Node:
    """One number per channel [C], repeated over a value [N, C, *size]."""
    return broadcast(reshape(x, (1, math.prod(x.shape), *(1,) * (len(shape) - 2))), shape)


@rule("Conv")
def _conv(c: Call) -> Node:
    x, w = c.node(0), c.node(1)
    n = len(x.shape) - 2
    stride, dilation = _spread(c, "strides", n, 1), _spread(c, "dilations", n, 1)
    if tuple(c.attr("kernel_shape", w.shape[2:])) != w.shape[2:]:
        raise ValueError(f"kernel_shape {c.attr('kernel_shape')} is not that of the weight {w.shape}")
    before, after = _pads(c, x.shape[2:], w.shape[2:], stride, dilation)
    if before != after:
        c.room((*x.shape[:2], *(m + b + a for m, b, a in zip(x.shape[2:], before, after, strict=True))))
        x, before = pad(x, (0, 0, *before), (0, 0, *after)), (0,) * n
    y = Conv(stride, before, dilation, c.attr("group", 1))(x, w)
    return add(y, per_channel(c.node(2), y.shape)) if c.has(2) else y


@rule("ConvTranspose")
def _conv_transpose(c: Call) -> Node:
    x, w = c.node(0), c.node(1)
    n = len(x.shape) - 2
    stride, dilation = _spread(c, "strides", n, 1), _spread(c, "dilations", n, 1)
    extra = tuple(c.attr("output_padding", (0,) * n))
    full = [
        (m - 1) * s + d * (k - 1) + 1 for m, s, d, k in zip(x.shape[2:], stride, dilation, w.shape[2:], strict=True)
    ]
    mode = c.attr("auto_pad", "NOTSET")
    wanted = c.attr("output_shape") or (
        [m * s for m, s in zip(x.shape[2:], stride, strict=True)] if "SAME" in mode else None
    )
    if wanted is None:
        before, after = _pads(c, x.shape[2:], w.shape[2:], stride, dilation)
    else:
        # Where more is wanted than there is, zeros follow.
        extra = tuple(max(e, m - f) for f, e, m in zip(full, extra, wanted[-n:], strict=True))
        total = [f + e - m for f, e, m in zip(full, extra, wanted[-n:], strict=True)]
        less, more = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        before, after = (less, more) if mode == "SAME_UPPER" else (more, less)
    size = tuple(f + e - b - a for f, e, b, a in zip(full, extra, before, after, strict=True))
    c.room((x.shape[0], w.shape[1] * c.attr("group", 1), *(max(f, s) for f, s in zip(full, size, strict=True))))
    groups = c.attr("group", 1)
    if before == after and all(0 <= e < s for e, s in zip(extra, stride, strict=True)):
        y = ConvTranspose(stride, before, dilation, groups, size)(x, w)
    else:
        y = ConvTranspose(stride, (0,) * n, dilation, groups, tuple(full))(x, w)
        after = tuple(a - e for a, e in zip(after, extra, strict=True))
        y = pad(y, (0, 0, *(-b for b in before)), (0, 0, *(-a for a in after)))
    return add(y, per_channel(c.node(2), y.shape)) if c.has(2) else y


# -- pooling


def _windows(c: Call, x: Node, kernel: Shape) -> tuple[Shape, Shape, list[list[int]], list[int]]:
    """Stride, dilation, and per spatial axis the windows' first positions and where the padded axis ends."""
    n = len(kernel)
    stride, dilation = _spread(c, "strides", n, 1), _spread(c, "dilations", n, 1)
    before, after = _pads(c, x.shape[2:], kernel, stride, dilation)
    starts, ends = [], []
    for m, k, s, d, b, a in zip(x.shape[2:], kernel, stride, dilation, before, after, strict=True):
        room = m + b + a - d * (k - 1) - 1
        count = (-(-room // s) if c.attr("ceil_mode", 0) else room // s) + 1
        if count * k > INDICES:
            raise ValueError(f"{count} windows of {k} entries")
        # With ceil_mode, a window that would start in the padding after the end is left out.
        starts.append([i * s - b for i in range(count) if not (c.attr("ceil_mode", 0) and i * s >= m + b)])
        ends.append(m + a)
        if not starts[-1] or d * (k - 1) >= m + a + b:
            raise ValueError(f"window {kernel} is larger than the padded input {x.shape}")
    return stride, dilation, starts, ends


@rule("MaxPool")
def _max_pool(c: Call) -> Node:
    x = c.node(0)
    n = len(x.shape) - 2
    kernel = _spread(c, "kernel_shape", n, 0)
    stride, dilation, starts, _ = _windows(c, x, kernel)
    padding = tuple(-s[0] for s in starts)
    whole = MaxPool(kernel, stride, padding, dilation)
    if all(2 * p <= k for p, k in zip(padding, kernel, strict=True)) and whole.shape(x.shape)[2:] == tuple(
        map(len, starts)
    ):
        return whole(x)
    # Every window is laid out in full; a tap that falls outside is replaced by one inside the same window.
    for axis, (k, d, first) in enumerate(zip(kernel, dilation, starts, strict=True), start=2):
        size = x.shape[axis]
        places = []
        for start in first:
            taps = [start + d * j for j in range(k)]
            inside = [t for t in taps if 0 <= t < size]
            if not inside:
                raise c.refuse("a pooling window that lies in the padding altogether")
            places += [t if 0 <= t < size else inside[0] for t in taps]
        c.room((*x.shape[:axis], len(places), *x.shape[axis + 1 :]))
        x = taken(x, axis, places)  # type: ignore[assignment]
    return MaxPool(kernel, kernel, (0,) * n, (1,) * n)(x)


@rule("AveragePool")
def _average_pool(c: Call) -> Node:
    x = c.node(0)
    n = len(x.shape) - 2
    kernel = _spread(c, "kernel_shape", n, 0)
    stride, dilation, starts, ends = _windows(c, x, kernel)
    counts = np.ones(())
    before, after = [], []
    for m, k, d, first, end in zip(x.shape[2:], kernel, dilation, starts, ends, strict=True):
        low, high = (first[0], end) if c.attr("count_include_pad", 0) else (0, m)
        inside = [sum(low <= p + d * j < high for j in range(k)) for p in first]
        counts = counts[..., None] * np.array(inside, np.float64)
        before.append(-first[0])
        after.append(first[-1] + d * (k - 1) + 1 - m)
    if not counts.all():
        raise c.refuse("a pooling window that lies in the padding altogether")
    y = windowed_sum(c, x, kernel, stride, dilation, before, after)
    inverse = 1 / counts
    if (inverse == inverse.reshape(-1)[0]).all():
        return scale(y, float(inverse.reshape(-1)[0]))
    return multiply(y, broadcast(c.constant("one over the window's size", inverse), y.shape))


def windowed_sum(
    c: Call, x: Node, kernel: Shape, stride: Shape, dilation: Shape, before: Sequence[int], after: Sequence[int]
) -> Node:
    """Sums over windows of the spatial axes: a reshape where they tile the input, a convolution with ones elsewhere."""
    n = len(kernel)
    if stride == kernel and set(dilation) == {1} and not any(before) and all(a <= 0 for a in after):
        x = pad(x, (0,) * (n + 2), (0, 0, *after))
        tiles = [m for size, k in zip(x.shape[2:], kernel, strict=True) for m in (size // k, k)]
        summed = Sum(tuple(range(3, 3 + 2 * n, 2)))(reshape(x, (*x.shape[:2], *tiles)))
        return reshape(summed, (*x.shape[:2], *tiles[::2]))
    x = pad(x, (0, 0, *before), (0, 0, *after))
    c.room(x.shape)
    flat = reshape(x, (x.shape[0] * x.shape[1], 1, *x.shape[2:]))
    summed = Conv(stride, (0,) * n, dilation, 1)(flat, Fill(1.0, (1, 1, *kernel))())
    return reshape(summed, (*x.shape[:2], *summed.shape[2:]))


def _spatial(x: Node) -> tuple[int, ...]:
    return tuple(range(2, len(x.shape)))


rule("GlobalAveragePool")(lambda c: mean(c.node(0), _spatial(c.node(0))))
rule("GlobalMaxPool")(lambda c: largest(c.node(0), _spatial(c.node(0))))


# -- normalisation


@rule("BatchNormalization")
def _batch_norm(c: Call) -> Node:
    if c.attr("training_mode", 0) or not c.attr("spatial", 1):
        raise c.refuse("batch normalisation in training mode, or per entry")
    x = c.node(0)
    # The statistics are data, not weights: they stay constant under edits.
    factor = c.constant("1/sqrt(var + eps)", 1 / np.sqrt(c.array(4).astype(np.float64) + c.attr("epsilon", 1e-5)))
    centre = c.constant("mean", c.array(3))
    factor = multiply(c.node(1), factor)
    shift = subtract(c.node(2), multiply(centre, factor))
    return add(multiply(x, per_channel(factor, x.shape)), per_channel(shift, x.shape))


@rule("InstanceNormalization")
def _instance_norm(c: Call) -> Node:
    x = c.node(0)
    y = Normalise(_spatial(x), c.attr("epsilon", 1e-5))(x)
    return add(multiply(y, per_channel(c.node(1), x.shape)), per_channel(c.node(2), x.shape))


@rule("LayerNormalization")
def _layer_norm(c: Call) -> Result:
    x = c.node(0)
    axes = tuple(range(c.axis(len(x.shape), -1), len(x.shape)))
    y = multiply(Normalise(axes, c.attr("epsilon", 1e-5))(x), c.node(1, x.shape))
    return [add(y, c.node(2, x.shape)) if c.has(2) else y, None, None]


@rule("RMSNormalization")
def _rms_norm(c: Call) -> Node:
    x = c.node(0)
    axes = tuple(range(c.axis(len(x.shape), -1), len(x.shape)))
    return multiply(Normalise(axes, c.attr("epsilon", 1e-5), centred=False)(x), c.node(1, x.shape))


@rule("GroupNormalization")
def _group_norm(c: Call) -> Node:
    x, groups = c.node(0), c.attr("num_groups")
    rows = reshape(x, (x.shape[0], groups, math.prod(x.shape[1:]) // groups))
    y = reshape(Normalise((2,), c.attr("epsilon", 1e-5))(rows), x.shape)

    def spread(i: int) -> Node:
        v = c.node(i)
        if v.shape != (x.shape[1],):  # opsets 18 to 20: one number per group
            v = reshape(broadcast(reshape(v, (groups, 1)), (groups, x.shape[1] // groups)), (x.shape[1],))
        return per_channel(v, x.shape)

    return add(multiply(y, spread(1)), spread(2))


@rule("MeanVarianceNormalization")
def _mean_variance(c: Call) -> Node:
    x = c.node(0)
    axes = tuple(normal(a, len(x.shape)) for a in c.attr("axes", (0, 2, 3)))
    centred = subtract(x, broadcast(mean(x, axes), x.shape))
    spread = ew.SQRT(mean(ew.SQUARE(centred), axes))
    return multiply(centred, broadcast(ew.RECIPROCAL(add(spread, Fill(1e-9, spread.shape)())), x.shape))


@rule("LpNormalization")
def _lp_norm(c: Call) -> Node:
    x, p = c.node(0), c.attr("p", 2)
    axes = (c.axis(len(x.shape), -1),)
    inverse = ew.RECIPROCAL(Sum(axes)(ew.ABS(x))) if p == 1 else ew.RSQRT(Sum(axes)(ew.SQUARE(x)))
    return multiply(x, broadcast(inverse, x.shape))


@rule("LRN")
def _local_response(c: Call) -> Node:
    x, size = c.node(0), c.attr("size")
    flat = reshape(ew.SQUARE(x), (x.shape[0], 1, x.shape[1], math.prod(x.shape[2:])))
    before = (size - 1) // 2
    sums = windowed_sum(c, flat, (size, 1), (1, 1), (1, 1), (before, 0), (size - 1 - before, 0))
    base = scale(reshape(sums, x.shape), c.attr("alpha", 1e-4) / size)
    return multiply(x, powered(add(base, Fill(c.attr("bias", 1.0), x.shape)()), -c.attr("beta", 0.75)))


@rule("Softmax", "LogSoftmax")
def _softmax(c: Call) -> Node:
    x = c.node(0)
    shape = x.shape
    axis = c.axis(len(shape), -1 if c.opset >= 13 else 1)
    if c.opset < 13 and axis != len(shape) - 1:  # earlier, all axes from this one on were taken together
        x, axis = reshape(x, (math.prod(shape[:axis]), math.prod(shape[axis:]))), 1
    if c.op == "Softmax":
        return reshape(_masked_softmax(c, x, axis), shape)
    peak = largest(x, (axis,))
    total = add(ew.LOG(Sum((axis,))(ew.EXP(subtract(x, broadcast(peak, x.shape))))), peak)
    return reshape(subtract(x, broadcast(total, x.shape)), shape)


def _masked_softmax(c: Call, x: Node, axis: int) -> Node:
    """Softmax; a fixed term of minus infinity in its argument excludes entries."""
    for i, term in enumerate(x.inputs if x.op == Combine((1.0, 1.0)) else ()):
        source = term
        while source.inputs and not isinstance(source.op, Constant):
            source = source.inputs[0] if len(source.inputs) == 1 else Fill(0.0, ())()
        entries = c.reader.entries(term) if isinstance(source.op, Constant) else None
        if entries is not None and np.isneginf(entries).any():
            finite = c.constant("bias", np.where(np.isneginf(entries), 0, entries))
            kept = c.constant("mask", (~np.isneginf(entries)).astype(np.float32))
            return Softmax(axis)(add(x.inputs[1 - i], finite), kept)
    return Softmax(axis)(x)


# -- resampling


def _coordinates(c: Call, old: int, new: int, scale_: float) -> Array:
    """Where each new position lies among the old ones."""
    i, mode = np.arange(new, dtype=np.float64), c.attr("coordinate_transformation_mode", "half_pixel")
    if c.op == "Upsample" or c.opset < 11:
        mode = "asymmetric"
    match mode:
        case "half_pixel":
            return (i + 0.5) / scale_ - 0.5
        case "half_pixel_symmetric":
            return old / 2 * (1 - new / (scale_ * old)) + (i + 0.5) / scale_ - 0.5
        case "pytorch_half_pixel":
            return (i + 0.5) / scale_ - 0.5 if new > 1 else 0 * i
        case "asymmetric":
            return i / scale_
        case "align_corners":
            return i * (old - 1) / (new - 1) if new > 1 else 0 * i
    raise c.refuse(f"Resize with coordinate_transformation_mode {mode!r}")


_NEAREST: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


@rule("Resize", "Upsample")
def _resize(c: Call) -> Node:
    x, mode = c.node(0), c.attr("mode", "nearest")
    if c.attr("antialias", 0) or c.attr("exclude_outside", 0):
        raise c.refuse("Resize with antialias or exclude_outside")
    slot = 1 if c.op == "Upsample" or c.opset < 11 else 2
    axes = [normal(a, len(x.shape)) for a in c.attr("axes", range(len(x.shape)))]
    if c.op == "Resize" and c.has(3) and c.value(3).shape != (0,):
        sizes = [int(m) for m in c.array(3)]
        factors = [m / x.shape[a] for m, a in zip(sizes, axes, strict=True)]
        policy = c.attr("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            ratio = min(factors) if policy == "not_larger" else max(factors)
            factors = [ratio] * len(axes)
            sizes = [math.floor(ratio * x.shape[a] + 0.5) for a in axes]
    else:
        entries = c.attr("scales") if "scales" in c.attributes else c.array(slot).reshape(-1)
        factors = [float(f) for f in entries]
        sizes = [math.floor(x.shape[a] * f) for a, f in zip(axes, factors, strict=True)]
    for a, new, factor in zip(axes, sizes, factors, strict=True):
        old = x.shape[a]
        if new == old and factor == 1:
            continue
        c.room((*x.shape[:a], new, *x.shape[a + 1 :]))
        c.reader.room((new,), folded=True)
        at = _coordinates(c, old, new, factor)
        if mode == "nearest":
            default = "floor" if slot == 1 else "round_prefer_floor"
            places = _NEAREST[default if slot == 1 else c.attr("nearest_mode", default)](at)
            x = taken(x, a, np.clip(places, 0, old - 1).astype(np.int64))  # type: ignore[assignment]
        elif mode in ("linear", "cubic"):
            x = _interpolated(c, x, a, at, mode)
        else:
            raise c.refuse(f"Resize with mode {mode!r}")
    return x


def _interpolated(c: Call, x: Node, axis: int, at: Array, mode: str) -> Node:
    """The entries between grid positions as weighted sums of two (linear) or four (cubic) neighbours."""
    old, base = x.shape[axis], np.floor(at)
    t = at - base
    if mode == "linear":
        weights = {0: 1 - t, 1: t}
    else:
        a = c.attr("cubic_coeff_a", -0.75)
        near = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (t, 1 - t)]
        far = [((a * d - 5 * a) * d + 8 * a) * d - 4 * a for d in (t + 1, 2 - t)]
        weights = {-1: far[0], 0: near[0], 1: near[1], 2: far[1]}
    shape = (*x.shape[:axis], len(at), *x.shape[axis + 1 :])
    column = [len(at) if i == axis else 1 for i in range(len(x.shape))]
    parts = []
    for k, weight in weights.items():
        places = np.clip(base + k, 0, old - 1).astype(np.int64)
        factor = c.constant(f"weight {k} of axis {axis}", weight.reshape(column))
        parts.append(multiply(taken(x, axis, places), broadcast(factor, shape)))  # type: ignore[arg-type]
    return add(*parts)


# -- recurrence, unrolled over the fixed length


_GATES: dict[str, Callable[[Node], Node]] = {
    "sigmoid": ew.SIGMOID, "tanh": ew.TANH, "relu": ew.RELU, "softplus": ew.SOFTPLUS,
}  # fmt: skip


@rule("LSTM", "GRU", "RNN")
def _recurrent(c: Call) -> Result:
    """Outputs Y [length, directions, batch, hidden], Y_h and (LSTM) Y_c [directions, batch, hidden]."""
    if c.attr("layout", 0) or "clip" in c.attributes or c.attr("input_forget", 0) or (c.op == "LSTM" and c.has(7)):
        raise c.refuse(f"{c.op} with layout 1, clip, coupled gates or peepholes")
    x = c.node(0)
    length, batch, _ = x.shape
    if c.has(4) and (c.array(4) != length).any():
        raise c.refuse(f"{c.op} with sequences of several lengths")
    directions = {"forward": (1,), "reverse": (-1,), "bidirectional": (1, -1)}[c.attr("direction", "forward")]
    gates = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}[c.op]
    names = [a.lower() for a in c.attr("activations", gates * len(directions))]
    if any(a not in _GATES for a in names):
        raise c.refuse(f"{c.op} with activations {names}")
    hidden = c.shape(2)[-1]
    c.room((length, len(directions), batch, 4 * hidden))
    c.reader.room((length * 64,), folded=True)
    rows, lasts, cells = [], [], []
    for i, direction in enumerate(directions):
        gate = [_GATES[a] for a in names[i * len(gates) : (i + 1) * len(gates)]]
        ys, h, cell = _unrolled(c, x, i, direction, gate, hidden)
        rows.append(reshape(Concat(0)(*(reshape(y, (1, batch, hidden)) for y in ys)), (length, 1, batch, hidden)))
        lasts.append(reshape(h, (1, batch, hidden)))
        cells.append(reshape(cell, (1, batch, hidden)))
    joined = [(1, rows), (0, lasts), (0, cells)]
    return [parts[0] if len(parts) == 1 else Concat(axis)(*parts) for axis, parts in joined][
        : 3 if c.op == "LSTM" else 2
    ]


def _unrolled(
    c: Call, x: Node, i: int, direction: int, gate: list[Callable[[Node], Node]], hidden: int
) -> tuple[list[Node], Node, Node]:
    """One direction: the hidden state at each position, the last one, and the last cell."""
    length, batch, width = x.shape

    def part(slot: int) -> Node | None:
        if not c.has(slot):
            return None
        node = narrow(c.node(slot), 0, i, 1)
        return reshape(node, node.shape[1:])

    w, r, bias = part(1), part(2), part(3)
    assert w is not None and r is not None
    zero = Fill(0.0, (batch, hidden))()
    h, cell = part(5) or zero, (part(6) if c.op == "LSTM" else None) or zero
    k = w.shape[0] // hidden
    wb = rb = None
    if bias is not None:
        wb, rb = narrow(bias, 0, 0, k * hidden), narrow(bias, 0, k * hidden, k * hidden)

    def dense(v: Node, weight: Node, b: Node | None, first: int, count: int) -> Node:
        y = Dense()(v, narrow(weight, 0, first * hidden, count * hidden))
        return y if b is None else add(y, broadcast(narrow(b, 0, first * hidden, count * hidden), y.shape))

    states: list[Node] = [zero] * length
    for t in range(length) if direction == 1 else reversed(range(length)):
        v = reshape(narrow(x, 0, t, 1), (batch, width))
        if c.op == "GRU":
            before = dense(v, w, wb, 0, 3)
            zr = gate[0](add(narrow(before, 1, 0, 2 * hidden), dense(h, r, rb, 0, 2)))
            z, reset = narrow(zr, 1, 0, hidden), narrow(zr, 1, hidden, hidden)
            if c.attr("linear_before_reset", 0):
                inner = multiply(reset, dense(h, r, rb, 2, 1))
            else:
                inner = dense(multiply(reset, h), r, rb, 2, 1)
            new = gate[1](add(narrow(before, 1, 2 * hidden, hidden), inner))
            h = add(new, multiply(z, subtract(h, new)))
        else:
            total = add(dense(v, w, wb, 0, k), dense(h, r, rb, 0, k))
            if c.op == "RNN":
                h = gate[0](total)
            else:  # gates in ONNX's order: input, output, forget, cell
                ins, out, forget, new = (narrow(total, 1, j * hidden, hidden) for j in range(4))
                cell = add(multiply(gate[0](forget), cell), multiply(gate[0](ins), gate[1](new)))
                h = multiply(gate[0](out), gate[2](cell))
        states[t] = h
    return states, h, cell
