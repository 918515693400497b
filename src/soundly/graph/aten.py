"""ATen's operations in terms of soundly's: one short rule each.

A rule receives `leaf`, which turns a fixed tensor into a constant of the graph, and the operation's own arguments, in
which whatever varies is a node. Anything ATen leaves implicit (broadcasting, type promotion, batch dimensions) is made
explicit here and appears nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from soundly.graph import elementwise
from soundly.graph.composite import Maximum, MaxPool, Normalise, Softmax, maximum_over, minimum
from soundly.graph.elementwise import Elementwise
from soundly.graph.linear import (
    Combine,
    Concat,
    Gather,
    Permute,
    Slice,
    Sum,
    add,
    broadcast,
    mean,
    narrow,
    pad,
    reshape,
    scale,
    subtract,
    transpose,
)
from soundly.graph.node import Fill, Node, Shape
from soundly.graph.product import Conv, ConvTranspose, Dense, MatMul, multiply

Value = Any
"""A node, a fixed tensor, a number, or a tuple of these."""
Leaf = Callable[[Tensor, str], Node]
Rule = Callable[..., Value]

RULES: dict[str, Rule] = {}


def supported(target: Any) -> bool:
    """Whether an exported call needs no decomposition."""
    name = getattr(target, "_opname", None)
    return name is None or name in RULES


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enters a function into the table under ATen's names."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def as_node(leaf: Leaf, value: Node | Tensor | float, shape: Sequence[int] | None = None) -> Node:
    """A value as a node, broadcast to `shape` if one is given."""
    if isinstance(value, Tensor):
        flat = value.reshape(-1)
        if flat.numel() and bool(torch.isfinite(flat[0])) and bool((flat == flat[0]).all()):
            node = Fill(float(flat[0]), tuple(value.shape))()
        else:
            if not bool(torch.isfinite(value).all()):
                raise ValueError("a constant tensor holds infinite or NaN entries")
            node = leaf(value, f"constant {list(value.shape)}")
    elif isinstance(value, Node):
        node = value
    else:
        return Fill(float(value), tuple(shape or ()))()
    return node if shape is None else broadcast(node, shape)


def _shape(value: Any) -> Shape:
    return tuple(getattr(value, "shape", ()))


def _common(*values: Any) -> Shape:
    return tuple(torch.broadcast_shapes(*(_shape(v) for v in values)))


def _pair(leaf: Leaf, a: Any, b: Any) -> tuple[Node, Node]:
    shape = _common(a, b)
    return as_node(leaf, a, shape), as_node(leaf, b, shape)


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < max(rank, 1):
        raise ValueError(f"axis {axis} of a value with {rank} axes")
    return axis % max(rank, 1)


def _axes(dim: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return tuple(range(rank))
    return tuple(sorted(_axis(d, rank) for d in ([dim] if isinstance(dim, int) else dim)))


def _drop(x: Node, axes: Sequence[int], keepdim: bool) -> Node:
    return x if keepdim else reshape(x, [n for i, n in enumerate(x.shape) if i not in axes])


def _spread(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


# -- arithmetic


@rule("add", "add_")
def _add(leaf: Leaf, a: Any, b: Any, *, alpha: float = 1) -> Node:
    x, y = _pair(leaf, a, b)
    return add(x, y) if alpha == 1 else Combine((1.0, float(alpha)))(x, y)


@rule("sub", "subtract")
def _sub(leaf: Leaf, a: Any, b: Any, *, alpha: float = 1) -> Node:
    return Combine((1.0, -float(alpha)))(*_pair(leaf, a, b))


@rule("rsub")
def _rsub(leaf: Leaf, a: Any, b: Any, alpha: float = 1) -> Node:
    return Combine((-float(alpha), 1.0))(*_pair(leaf, a, b))


@rule("mul", "multiply")
def _mul(leaf: Leaf, a: Any, b: Any) -> Node:
    if a is b:
        return elementwise.SQUARE(a)  # a square is not a product of two copies: it is never negative
    for x, factor in ((a, b), (b, a)):
        if isinstance(factor, (int, float)):
            return scale(x, float(factor))
    return multiply(*_pair(leaf, a, b))


@rule("div", "divide", "true_divide")
def _div(leaf: Leaf, a: Any, b: Any, *, rounding_mode: str | None = None) -> Node:
    if rounding_mode is not None:
        raise ValueError(f"rounding_mode={rounding_mode!r}")
    if isinstance(b, (int, float)):
        return scale(a, 1 / b)
    if isinstance(b, Tensor):
        return _mul(leaf, a, 1 / b.double())
    inverse = elementwise.RECIPROCAL(b)
    return inverse if isinstance(a, (int, float)) and a == 1 else _mul(leaf, inverse, a)


@rule("neg")
def _neg(leaf: Leaf, x: Node) -> Node:
    return scale(x, -1)


@rule("pow")
def _pow(leaf: Leaf, x: Any, exponent: Any) -> Node:
    if isinstance(exponent, Tensor) and exponent.numel() == 1:
        exponent = exponent.item()
    if isinstance(x, Node) and isinstance(exponent, (int, float)):
        known = {2: elementwise.SQUARE, 0.5: elementwise.SQRT, -0.5: elementwise.RSQRT, -1: elementwise.RECIPROCAL}
        return x if exponent == 1 else known.get(exponent, elementwise.power(float(exponent)))(x)
    base = x.item() if isinstance(x, Tensor) and x.numel() == 1 else x
    if isinstance(base, (int, float)) and base > 0:
        return elementwise.EXP(scale(exponent, math.log(base)))
    raise ValueError("a power of two variables")


@rule("addcmul")
def _addcmul(leaf: Leaf, x: Any, a: Any, b: Any, *, value: float = 1) -> Node:
    return _add(leaf, x, _mul(leaf, a, b), alpha=value)


RULES["maximum"] = lambda leaf, a, b: Maximum()(*_pair(leaf, a, b))
RULES["minimum"] = lambda leaf, a, b: minimum(*_pair(leaf, a, b))

# -- comparisons: 0 or 1 in floating point, exact away from the threshold


def _greater(leaf: Leaf, a: Any, b: Any) -> Node:
    return elementwise.STEP(subtract(*_pair(leaf, a, b)))


def _not(leaf: Leaf, x: Node) -> Node:
    return subtract(Fill(1.0, x.shape)(), x)


RULES |= {
    "gt": _greater,
    "lt": lambda leaf, a, b: _greater(leaf, b, a),
    "ge": lambda leaf, a, b: _not(leaf, _greater(leaf, b, a)),
    "le": lambda leaf, a, b: _not(leaf, _greater(leaf, a, b)),
    "logical_not": _not,
    "bitwise_not": _not,
    "logical_and": _mul,
    "bitwise_and": _mul,
}


@rule("where")
def _where(leaf: Leaf, condition: Any, a: Any, b: Any) -> Node:
    shape = _common(condition, a, b)
    if isinstance(condition, Tensor):
        # Entries that are not selected may be infinite; a fixed condition never multiplies them.
        choice = condition.expand(shape)
        if isinstance(a, Tensor):
            a = torch.where(choice, a.expand(shape), torch.zeros_like(a).expand(shape))
        if isinstance(b, Tensor):
            b = torch.where(choice, torch.zeros_like(b).expand(shape), b.expand(shape))
        chosen = as_node(leaf, choice.double(), shape)
        return add(
            multiply(chosen, as_node(leaf, a, shape)),
            multiply(as_node(leaf, (~choice).double(), shape), as_node(leaf, b, shape)),
        )
    chosen, x, y = (as_node(leaf, v, shape) for v in (condition, a, b))
    return add(y, multiply(chosen, subtract(x, y)))


@rule("masked_fill")
def _masked_fill(leaf: Leaf, x: Any, mask: Any, value: Any) -> Node:
    if isinstance(value, float) and math.isinf(value):
        raise ValueError("filling with an infinite value outside of attention")
    return _where(leaf, mask, value, x)


# -- elementwise functions


def _each(function: Elementwise) -> Rule:
    return lambda leaf, x: function(x)


RULES |= {
    name: _each(getattr(elementwise, name.upper()))
    for name in (
        "relu abs sign square sigmoid tanh silu mish exp log sqrt rsqrt reciprocal sin cos erf atan hardswish hardsigmoid"
    ).split()
}
RULES["relu_"] = RULES["relu"]
RULES["relu6"] = _each(elementwise.clip(0.0, 6.0))
RULES["gelu"] = lambda leaf, x, approximate="none": (
    elementwise.GELU_TANH if approximate == "tanh" else elementwise.GELU
)(x)
RULES["leaky_relu"] = lambda leaf, x, slope=0.01: elementwise.leaky_relu(slope)(x)
RULES["hardtanh"] = lambda leaf, x, low=-1.0, high=1.0: elementwise.clip(low, high)(x)
RULES["elu"] = lambda leaf, x, alpha=1.0, scale=1.0, input_scale=1.0: elementwise.elu(alpha, scale, input_scale)(x)
RULES["celu"] = lambda leaf, x, alpha=1.0: elementwise.elu(alpha, 1.0, 1 / alpha)(x)
RULES["selu"] = lambda leaf, x: elementwise.elu(1.6732632423543772, 1.0507009873554805)(x)
RULES["log_sigmoid"] = lambda leaf, x: scale(elementwise.SOFTPLUS(scale(x, -1)), -1)
RULES["expm1"] = lambda leaf, x: _sub(leaf, elementwise.EXP(x), 1.0)


@rule("softplus")
def _softplus(leaf: Leaf, x: Node, beta: float = 1.0, threshold: float = 20.0) -> Node:
    return scale(elementwise.SOFTPLUS(scale(x, beta)), 1 / beta)


@rule("clamp", "clip")
def _clamp(leaf: Leaf, x: Node, min: Any = None, max: Any = None) -> Node:
    if isinstance(min, (Tensor, Node)) or isinstance(max, (Tensor, Node)):
        x = x if min is None else Maximum()(*_pair(leaf, x, min))
        return x if max is None else minimum(*_pair(leaf, x, max))
    return elementwise.clip(-math.inf if min is None else float(min), math.inf if max is None else float(max))(x)


RULES["clamp_min"] = lambda leaf, x, min: _clamp(leaf, x, min)
RULES["clamp_max"] = lambda leaf, x, max: _clamp(leaf, x, None, max)


@rule("prelu", "_prelu_kernel")
def _prelu(leaf: Leaf, x: Node, weight: Any) -> Node:
    slope = as_node(leaf, weight)
    if math.prod(slope.shape) > 1 and len(slope.shape) == 1:
        slope = reshape(slope, (slope.shape[0], *(1,) * (len(x.shape) - 2)))
    below = scale(elementwise.RELU(scale(x, -1)), -1)
    return add(elementwise.RELU(x), multiply(broadcast(slope, x.shape), below))


# -- shapes


@rule("view", "reshape", "_unsafe_view")
def _view(leaf: Leaf, x: Node, shape: Sequence[int]) -> Node:
    known = math.prod(n for n in shape if n != -1)
    return reshape(x, [math.prod(x.shape) // max(known, 1) if n == -1 else n for n in shape])


@rule("flatten")
def _flatten(leaf: Leaf, x: Node, start_dim: int = 0, end_dim: int = -1) -> Node:
    if not x.shape:
        return reshape(x, (1,))
    a, b = _axis(start_dim, len(x.shape)), _axis(end_dim, len(x.shape))
    return reshape(x, (*x.shape[:a], math.prod(x.shape[a : b + 1]), *x.shape[b + 1 :]))


@rule("unflatten")
def _unflatten(leaf: Leaf, x: Node, dim: int, sizes: Sequence[int]) -> Node:
    a = _axis(dim, len(x.shape))
    known = math.prod(n for n in sizes if n != -1)
    filled = [x.shape[a] // known if n == -1 else n for n in sizes]
    return reshape(x, (*x.shape[:a], *filled, *x.shape[a + 1 :]))


@rule("unsqueeze")
def _unsqueeze(leaf: Leaf, x: Node, dim: int) -> Node:
    a = _axis(dim, len(x.shape) + 1)
    return reshape(x, (*x.shape[:a], 1, *x.shape[a:]))


@rule("squeeze")
def _squeeze(leaf: Leaf, x: Node, dim: int | Sequence[int] | None = None) -> Node:
    axes = [a for a in _axes(dim, len(x.shape)) if x.shape[a] == 1]
    return _drop(x, axes, False)


@rule("expand")
def _expand(leaf: Leaf, x: Node, size: Sequence[int], *, implicit: bool = False) -> Node:
    offset = len(size) - len(x.shape)
    return broadcast(x, [x.shape[i - offset] if n == -1 else n for i, n in enumerate(size)])


@rule("repeat")
def _repeat(leaf: Leaf, x: Node, repeats: Sequence[int]) -> Node:
    x = reshape(x, (1,) * (len(repeats) - len(x.shape)) + x.shape)
    for axis, times in enumerate(repeats):
        x = Concat(axis)(*(x,) * times) if times != 1 else x
    return x


@rule("permute")
def _permute(leaf: Leaf, x: Node, dims: Sequence[int]) -> Node:
    return Permute(tuple(_axis(d, len(x.shape)) for d in dims))(x)


@rule("transpose", "swapaxes")
def _transpose(leaf: Leaf, x: Node, a: int, b: int) -> Node:
    order = list(range(len(x.shape)))
    a, b = _axis(a, len(order)), _axis(b, len(order))
    order[a], order[b] = order[b], order[a]
    return Permute(tuple(order))(x)


RULES["t"] = RULES["numpy_T"] = lambda leaf, x: transpose(x) if len(x.shape) == 2 else x
for _name in (
    "clone",
    "contiguous",
    "alias",
    "detach",
    "lift_fresh_copy",
    "dropout",
    "native_dropout",
    "positive",
    "detach_",
):
    RULES[_name] = lambda leaf, x, *args, **kwargs: x


@rule("to", "_to_copy", "type_as", "float", "double")
def _to(leaf: Leaf, x: Node, *args: Any, **kwargs: Any) -> Node:
    types = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
    if any(not t.is_floating_point for t in types):
        raise ValueError(f"a conversion to {types[0]}: rounding to integers has no derivative")
    return x


@rule("select")
def _select(leaf: Leaf, x: Node, dim: int, index: int) -> Node:
    a = _axis(dim, len(x.shape))
    return _drop(narrow(x, a, index % x.shape[a], 1), [a], False)


@rule("slice")
def _slice(leaf: Leaf, x: Node, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Node:
    a = _axis(dim, len(x.shape))
    taken = range(x.shape[a])[slice(start, end, step)]
    if taken == range(x.shape[a]):
        return x
    n = len(x.shape)
    starts = tuple(taken.start if i == a else 0 for i in range(n))
    counts = tuple(len(taken) if i == a else size for i, size in enumerate(x.shape))
    return Slice(starts, counts, tuple(step if i == a else 1 for i in range(n)))(x)


@rule("narrow")
def _narrow(leaf: Leaf, x: Node, dim: int, start: int, length: int) -> Node:
    a = _axis(dim, len(x.shape))
    return narrow(x, a, start % max(x.shape[a], 1), length)


@rule("split", "split_with_sizes")
def _split(leaf: Leaf, x: Node, sizes: int | Sequence[int], dim: int = 0) -> tuple[Node, ...]:
    a = _axis(dim, len(x.shape))
    if isinstance(sizes, int):
        sizes = [min(sizes, x.shape[a] - i) for i in range(0, x.shape[a], sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(narrow(x, a, start, size) for start, size in zip(starts, sizes, strict=True))


@rule("chunk")
def _chunk(leaf: Leaf, x: Node, chunks: int, dim: int = 0) -> tuple[Node, ...]:
    return _split(leaf, x, -(-x.shape[_axis(dim, len(x.shape))] // chunks), dim)


@rule("unbind")
def _unbind(leaf: Leaf, x: Node, dim: int = 0) -> tuple[Node, ...]:
    return tuple(_select(leaf, x, dim, i) for i in range(x.shape[_axis(dim, len(x.shape))]))


RULES["getitem"] = lambda leaf, values, index: values[index]


@rule("cat", "concat")
def _cat(leaf: Leaf, values: Sequence[Any], dim: int = 0) -> Node:
    kept = [v for v in values if _shape(v) != (0,)]
    parts = [as_node(leaf, v) for v in kept]
    return parts[0] if len(parts) == 1 else Concat(_axis(dim, len(parts[0].shape)))(*parts)


@rule("stack")
def _stack(leaf: Leaf, values: Sequence[Any], dim: int = 0) -> Node:
    return _cat(leaf, [_unsqueeze(leaf, as_node(leaf, v), dim) for v in values], _axis(dim, len(_shape(values[0])) + 1))


@rule("pad", "constant_pad_nd")
def _pad(leaf: Leaf, x: Node, amounts: Sequence[int], mode: Any = "constant", value: float | None = None) -> Node:
    if not isinstance(mode, str):
        mode, value = "constant", mode  # constant_pad_nd(x, amounts, value)
    n = len(x.shape)
    before, after = [0] * n, [0] * n
    for i in range(len(amounts) // 2):
        before[n - 1 - i], after[n - 1 - i] = amounts[2 * i], amounts[2 * i + 1]
    if mode == "constant":
        padded = pad(x, before, after)
        if not value:
            return padded
        ones = pad(Fill(1.0, x.shape)(), before, after)
        return add(padded, scale(subtract(Fill(1.0, padded.shape)(), ones), float(value)))
    for axis in range(n):
        if before[axis] or after[axis]:
            size = x.shape[axis]
            places = torch.arange(-before[axis], size + after[axis])
            if mode == "replicate":
                places = places.clamp(0, size - 1)
            elif mode == "circular":
                places = places % size
            elif mode == "reflect":
                places = (size - 1) - ((size - 1) - places.abs()).abs()
            else:
                raise ValueError(f"padding mode {mode!r}")
            x = Gather(axis, tuple(places.tolist()))(x)
    return x


for _n in (1, 2, 3):
    RULES[f"reflection_pad{_n}d"] = lambda leaf, x, amounts: _pad(leaf, x, amounts, "reflect")
    RULES[f"replication_pad{_n}d"] = lambda leaf, x, amounts: _pad(leaf, x, amounts, "replicate")


@rule("index_select")
def _index_select(leaf: Leaf, x: Node, dim: int, index: Tensor) -> Node:
    a = _axis(dim, len(x.shape))
    return Gather(a, tuple(int(i) % x.shape[a] for i in index))(x)


@rule("embedding")
def _embedding(leaf: Leaf, weight: Node, index: Any, *args: Any, **kwargs: Any) -> Node:
    if not isinstance(index, Tensor):
        raise ValueError("token ids that depend on an input; pass embeddings instead")
    rows = Gather(0, tuple(int(i) for i in index.reshape(-1)))(weight)
    return reshape(rows, (*index.shape, weight.shape[1]))


@rule("index")
def _index(leaf: Leaf, x: Node, indices: Sequence[Tensor | None]) -> Node:
    if not all(i is None or isinstance(i, Tensor) for i in indices):
        raise ValueError("positions that depend on an input")
    used = [a for a, i in enumerate(indices) if i is not None]
    tensors = [
        i.nonzero().reshape(-1) if i.dtype == torch.bool and i.dim() == 1 else i for i in indices if i is not None
    ]
    if used != list(range(used[0], used[0] + len(used))) or any(t.dtype == torch.bool for t in tensors):
        raise ValueError("this form of advanced indexing")
    first, last = used[0], used[-1] + 1
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    flat = torch.zeros(shape, dtype=torch.long)
    for axis, t in zip(used, tensors, strict=True):
        flat = flat * x.shape[axis] + (t % x.shape[axis])
    merged = reshape(x, (*x.shape[:first], math.prod(x.shape[first:last]), *x.shape[last:]))
    taken = Gather(first, tuple(flat.reshape(-1).tolist()))(merged)
    return reshape(taken, (*x.shape[:first], *shape, *x.shape[last:]))


@rule("flip")
def _flip(leaf: Leaf, x: Node, dims: Sequence[int]) -> Node:
    for d in dims:
        a = _axis(d, len(x.shape))
        x = Gather(a, tuple(reversed(range(x.shape[a]))))(x)
    return x


@rule("roll")
def _roll(leaf: Leaf, x: Node, shifts: int | Sequence[int], dims: int | Sequence[int] = ()) -> Node:
    pairs = zip(_spread(shifts, 1), _spread(dims, 1) if dims != () else (None,), strict=True)
    for shift, d in pairs:
        if d is None:
            raise ValueError("rolling a flattened value")
        a = _axis(d, len(x.shape))
        x = Gather(a, tuple((i - shift) % x.shape[a] for i in range(x.shape[a])))(x)
    return x


@rule("pixel_shuffle")
def _pixel_shuffle(leaf: Leaf, x: Node, factor: int) -> Node:
    n, c, h, w = x.shape
    split = reshape(x, (n, c // factor**2, factor, factor, h, w))
    return reshape(Permute((0, 1, 4, 2, 5, 3))(split), (n, c // factor**2, h * factor, w * factor))


# -- reductions


@rule("sum")
def _sum(leaf: Leaf, x: Node, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Node:
    axes = _axes(dim, len(x.shape))
    return _drop(Sum(axes)(x), axes, keepdim)


@rule("mean")
def _mean(leaf: Leaf, x: Node, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Node:
    axes = _axes(dim, len(x.shape))
    return _drop(mean(x, axes), axes, keepdim)


@rule("var")
def _var(leaf: Leaf, x: Node, dim: Any = None, *args: Any, correction: Any = None, keepdim: bool = False) -> Node:
    if isinstance(dim, bool):  # var(x, unbiased)
        dim, correction = None, int(dim)
    elif args:  # var.dim(x, dim, unbiased, keepdim)
        correction, keepdim = int(args[0]), (args[1] if len(args) > 1 else keepdim)
    axes = _axes(dim, len(x.shape))
    count = math.prod(x.shape[a] for a in axes)
    centred = subtract(x, broadcast(mean(x, axes), x.shape))
    total = Sum(axes)(elementwise.SQUARE(centred))
    return _drop(scale(total, 1 / (count - (1 if correction is None else correction))), axes, keepdim)


@rule("std")
def _std(leaf: Leaf, x: Node, *args: Any, **kwargs: Any) -> Node:
    return elementwise.SQRT(_var(leaf, x, *args, **kwargs))


def _extreme(x: Node, dim: Any, keepdim: bool, sign: int) -> Node:
    axes = _axes(dim, len(x.shape))
    result = scale(x, sign)
    for a in axes:
        result = maximum_over(result, a)
    return _drop(scale(result, sign), axes, keepdim)


RULES["amax"] = lambda leaf, x, dim=(), keepdim=False: _extreme(x, dim, keepdim, 1)
RULES["amin"] = lambda leaf, x, dim=(), keepdim=False: _extreme(x, dim, keepdim, -1)


def _max(sign: int) -> Rule:
    def both(leaf: Leaf, x: Node, dim: Any = None, keepdim: bool = False) -> Value:
        if isinstance(dim, (Node, Tensor)):
            return (RULES["maximum"] if sign > 0 else RULES["minimum"])(leaf, x, dim)
        result = _extreme(x, dim, keepdim, sign)
        return result if dim is None else (result, None)

    return both


RULES["max"], RULES["min"] = _max(1), _max(-1)


@rule("softmax", "_softmax", "_safe_softmax")
def _softmax(leaf: Leaf, x: Node, dim: int, *args: Any, **kwargs: Any) -> Node:
    return Softmax(_axis(dim, len(x.shape)))(x)


@rule("logsumexp")
def _logsumexp(leaf: Leaf, x: Node, dim: Any, keepdim: bool = False) -> Node:
    axes = _axes(dim, len(x.shape))
    peak = x
    for a in axes:
        peak = maximum_over(peak, a)
    total = Sum(axes)(elementwise.EXP(subtract(x, broadcast(peak, x.shape))))
    return _drop(add(elementwise.LOG(total), peak), axes, keepdim)


@rule("log_softmax", "_log_softmax")
def _log_softmax(leaf: Leaf, x: Node, dim: int, *args: Any, **kwargs: Any) -> Node:
    total = _logsumexp(leaf, x, [dim], True)
    return subtract(x, broadcast(total, x.shape))


# -- products


@rule("linear")
def _linear(leaf: Leaf, x: Any, weight: Any, bias: Any = None) -> Node:
    w = as_node(leaf, weight)
    y = Dense()(as_node(leaf, x), reshape(w, (1, -1)) if len(w.shape) == 1 else w)
    return y if bias is None else add(y, as_node(leaf, bias, y.shape))


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(leaf: Leaf, a: Any, b: Any) -> Node:
    x, y = as_node(leaf, a), as_node(leaf, b)
    if len(y.shape) == 2 and len(x.shape) >= 1:
        return Dense()(x, transpose(y))
    drop_first, drop_last = len(x.shape) == 1, len(y.shape) == 1
    x = reshape(x, (1, *x.shape)) if drop_first else x
    y = reshape(y, (*y.shape, 1)) if drop_last else y
    batch = tuple(torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]))
    product = MatMul()(broadcast(x, (*batch, *x.shape[-2:])), broadcast(y, (*batch, *y.shape[-2:])))
    rank = len(product.shape)
    return _drop(product, [*([rank - 2] if drop_first else []), *([rank - 1] if drop_last else [])], False)


@rule("addmm", "baddbmm", "addbmm")
def _addmm(leaf: Leaf, c: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Node:
    product = _matmul(leaf, a, b)
    return Combine((float(beta), float(alpha)))(as_node(leaf, c, product.shape), product)


@rule("scaled_dot_product_attention")
def _attention(
    leaf: Leaf, q: Node, k: Node, v: Node, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    **options: Any,
) -> Node:  # fmt: skip
    enable_gqa, factor = options.get("enable_gqa", False), options.get("scale") or 1 / math.sqrt(q.shape[-1])
    if enable_gqa and k.shape[-3] != q.shape[-3]:
        times = q.shape[-3] // k.shape[-3]
        order = tuple(i // times for i in range(q.shape[-3]))
        k, v = Gather(len(k.shape) - 3, order)(k), Gather(len(v.shape) - 3, order)(v)
    scores = scale(_matmul(leaf, q, transpose(k)), factor)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    weights = _masked_softmax(leaf, scores, attn_mask)
    return _matmul(leaf, weights, v)


def _masked_softmax(leaf: Leaf, scores: Node, mask: Any) -> Node:
    last = len(scores.shape) - 1
    if mask is None:
        return Softmax(last)(scores)
    if isinstance(mask, Node):
        return Softmax(last)(_add(leaf, scores, mask))
    mask = mask.expand(scores.shape)
    kept = mask if mask.dtype == torch.bool else ~torch.isneginf(mask)
    if mask.dtype != torch.bool:
        # A finite bias is added; an infinite one excludes the entry.
        scores = _add(leaf, scores, torch.where(kept, mask, torch.zeros_like(mask)))
    if bool(kept.all()):
        return Softmax(last)(scores)
    return Softmax(last)(scores, leaf(kept.double(), "attention mask"))


@rule("conv1d", "conv2d", "conv3d")
def _conv(
    leaf: Leaf,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Node:
    x, w = as_node(leaf, x), as_node(leaf, weight)
    n = len(w.shape) - 2
    stride, dilation = _spread(stride, n), _spread(dilation, n)
    single = len(x.shape) == n + 1
    x = reshape(x, (1, *x.shape)) if single else x
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, w.shape[2:], strict=True)]
        x = pad(x, [0, 0, *(t // 2 for t in total)], [0, 0, *(t - t // 2 for t in total)])
        padding = 0
    y = Conv(stride, _spread(padding, n), dilation, groups)(x, w)
    if bias is not None:
        y = add(y, broadcast(reshape(as_node(leaf, bias), (1, y.shape[1], *(1,) * n)), y.shape))
    return reshape(y, y.shape[1:]) if single else y


@rule("convolution", "_convolution")
def _convolution(
    leaf: Leaf, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, *args: Any,
) -> Node:  # fmt: skip
    if transposed:
        return _conv_transpose(leaf, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv(leaf, x, weight, bias, stride, padding, dilation, groups)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(
    leaf: Leaf, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Node:  # fmt: skip
    x, w = as_node(leaf, x), as_node(leaf, weight)
    n = len(w.shape) - 2
    stride, padding, extra, dilation = (_spread(v, n) for v in (stride, padding, output_padding, dilation))
    single = len(x.shape) == n + 1
    x = reshape(x, (1, *x.shape)) if single else x
    size = tuple(
        (m - 1) * s - 2 * p + d * (k - 1) + e + 1
        for m, s, p, d, k, e in zip(x.shape[2:], stride, padding, dilation, w.shape[2:], extra, strict=True)
    )
    y = ConvTranspose(stride, padding, dilation, groups, size)(x, w)
    if bias is not None:
        y = add(y, broadcast(reshape(as_node(leaf, bias), (1, y.shape[1], *(1,) * n)), y.shape))
    return reshape(y, y.shape[1:]) if single else y


# -- normalisation


@rule("batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "cudnn_batch_norm")
def _batch_norm(leaf: Leaf, x: Node, weight: Any, bias: Any, running_mean: Any, running_var: Any, *args: Any) -> Value:
    eps = args[-1] if isinstance(args[-1], float) else args[-2]
    if running_mean is None or running_var is None or (args and args[0] is True):
        raise ValueError("batch norm that uses the batch's own statistics")
    channel = (1, x.shape[1], *(1,) * (len(x.shape) - 2))
    factor = elementwise.RSQRT(_add(leaf, as_node(leaf, running_var), eps))
    if weight is not None:
        factor = _mul(leaf, factor, weight)
    shift = _mul(leaf, scale(factor, -1), running_mean)
    if bias is not None:
        shift = _add(leaf, shift, bias)
    y = add(multiply(x, broadcast(reshape(factor, channel), x.shape)), broadcast(reshape(shift, channel), x.shape))
    return (y, None, None)


RULES["batch_norm"] = lambda leaf, x, w, b, m, v, training, momentum, eps, *a: _batch_norm(
    leaf, x, w, b, m, v, training, eps
)[0]
RULES["native_batch_norm"] = lambda leaf, x, w, b, m, v, training, momentum, eps: _batch_norm(
    leaf, x, w, b, m, v, training, eps
)
RULES["_native_batch_norm_legit_no_training"] = lambda leaf, x, w, b, m, v, momentum, eps: _batch_norm(
    leaf, x, w, b, m, v, eps
)


@rule("layer_norm")
def _layer_norm(
    leaf: Leaf, x: Node, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *args: Any
) -> Node:
    n = len(x.shape)
    y = Normalise(tuple(range(n - len(shape), n)), eps)(x)
    y = y if weight is None else _mul(leaf, y, weight)
    return y if bias is None else _add(leaf, y, bias)


RULES["native_layer_norm"] = lambda leaf, x, shape, w, b, eps: (_layer_norm(leaf, x, shape, w, b, eps), None, None)


@rule("rms_norm", "_fused_rms_norm")
def _rms_norm(leaf: Leaf, x: Node, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Node:
    n = len(x.shape)
    y = Normalise(tuple(range(n - len(shape), n)), 2.0**-23 if eps is None else eps, centred=False)(x)
    return y if weight is None else _mul(leaf, y, weight)


@rule("group_norm")
def _group_norm(
    leaf: Leaf, x: Node, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *args: Any
) -> Node:
    grouped = reshape(x, (x.shape[0], groups, math.prod(x.shape[1:]) // groups))
    y = reshape(Normalise((2,), eps)(grouped), x.shape)
    channel = (1, x.shape[1], *(1,) * (len(x.shape) - 2))
    y = y if weight is None else multiply(y, broadcast(reshape(as_node(leaf, weight), channel), x.shape))
    return y if bias is None else add(y, broadcast(reshape(as_node(leaf, bias), channel), x.shape))


@rule("instance_norm")
def _instance_norm(
    leaf: Leaf, x: Node, weight: Any, bias: Any, m: Any, v: Any, use_input_stats: bool, _: Any, eps: float, *a: Any
) -> Node:
    if not use_input_stats:
        return _batch_norm(leaf, x, weight, bias, m, v, eps)[0]
    return _group_norm(leaf, x, x.shape[1], weight, bias, eps)


# -- pooling


@rule("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(
    leaf: Leaf, x: Node, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Node:
    return _pool_over(x, lambda v, n: _pool_node(v, n, kernel, stride, padding, dilation, ceil_mode), kernel)


def _pool_node(x: Node, n: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> Node:
    k = _spread(kernel, n)
    return MaxPool(
        k, _spread(stride, n) if stride not in ((), []) else k, _spread(padding, n), _spread(dilation, n), ceil
    )(x)


def _pool_over(x: Node, pool: Callable[[Node, int], Node], kernel: Any) -> Node:
    n = len(kernel) if not isinstance(kernel, int) else len(x.shape) - 2
    if len(x.shape) == n + 1:
        return (lambda y: reshape(y, y.shape[1:]))(pool(reshape(x, (1, *x.shape)), n))
    return pool(x, n)


for _n in (2, 3):
    RULES[f"max_pool{_n}d_with_indices"] = lambda *args, **kwargs: (_max_pool(*args, **kwargs), None)


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _avg_pool(
    leaf: Leaf, x: Node, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Node:  # fmt: skip
    def pool(v: Node, n: int) -> Node:
        k = _spread(kernel, n)
        s = _spread(stride, n) if stride not in ((), []) else k
        p = _spread(padding, n)
        return average_pool(leaf, v, k, s, p, ceil_mode, count_include_pad, divisor_override)

    return _pool_over(x, pool, kernel)


def average_pool(
    leaf: Leaf,
    x: Node,
    kernel: Shape,
    stride: Shape,
    padding: Shape,
    ceil: bool,
    include_pad: bool,
    divisor: int | None,
) -> Node:
    """Average pooling as a convolution with ones and a division by the window's size, which may differ at the border."""
    n = len(kernel)
    extra, windows = [], []
    for size, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True):
        room = size + 2 * p - k
        count = (-(-room // s) if ceil else room // s) + 1
        if ceil and (count - 1) * s >= size + p:
            count -= 1
        extra.append(max(0, (count - 1) * s + k - size - 2 * p))
        ends = [(i * s - p, min(i * s - p + k, size + p)) for i in range(count)]
        windows.append([b - a if include_pad else min(b, size) - max(a, 0) for a, b in ends])
    channels = x.shape[1]
    flat = reshape(x, (x.shape[0] * channels, 1, *x.shape[2:]))
    if any(extra):
        flat = pad(flat, (0,) * (n + 2), (0, 0, *extra))
    sums = Conv(stride, padding, (1,) * n, 1)(flat, Fill(1.0, (1, 1, *kernel))())
    sums = Slice((0,) * (n + 2), (*sums.shape[:2], *(len(w) for w in windows)), (1,) * (n + 2))(sums)
    counts = torch.ones((), dtype=torch.float64)
    for w in windows:
        counts = counts.unsqueeze(-1) * torch.tensor(w, dtype=torch.float64)
    inverse = 1 / (counts if divisor is None else torch.full_like(counts, divisor))
    if bool((inverse == inverse.reshape(-1)[0]).all()):
        averaged = scale(sums, float(inverse.reshape(-1)[0]))
    else:
        averaged = multiply(sums, as_node(leaf, inverse, sums.shape))
    return reshape(averaged, (x.shape[0], channels, *sums.shape[2:]))


def _adaptive(n: int, reduce: Callable[[Node, Sequence[int]], Node]) -> Rule:
    """Adaptive pooling, axis by axis: window i covers floor(i n / m) to ceil((i + 1) n / m)."""

    def rule_(leaf: Leaf, x: Node, sizes: Any) -> Node:
        for axis, m in zip(range(len(x.shape) - n, len(x.shape)), _spread(sizes, n), strict=True):
            size = x.shape[axis]
            if m is None or m == size:
                continue
            ends = [(i * size // m, -(-(i + 1) * size // m)) for i in range(m)]
            parts = [reduce(narrow(x, axis, a, b - a), [axis]) for a, b in ends]
            x = parts[0] if m == 1 else Concat(axis)(*parts)
        return x

    return rule_


for _n in (1, 2, 3):
    RULES[f"adaptive_avg_pool{_n}d"] = _adaptive(_n, mean)
    RULES[f"adaptive_max_pool{_n}d"] = lambda *a, _rule=_adaptive(_n, lambda x, axes: maximum_over(x, axes[0])): (
        _rule(*a),
        None,
    )


# -- resampling


def _resized(x: Node, sizes: Any, factors: Any) -> list[int]:
    n = len(x.shape) - 2
    if sizes is not None:
        return [int(s) for s in sizes]
    return [math.floor(size * f) for size, f in zip(x.shape[2:], _spread(factors, n), strict=True)]


@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
def _nearest(leaf: Leaf, x: Node, size: Any = None, *factors: Any) -> Node:
    given = next((f for f in factors if isinstance(f, (list, tuple))), None)
    for axis, m in enumerate(_resized(x, size, given), start=2):
        old = x.shape[axis]
        ratio = old / m if given is None else 1 / given[axis - 2]
        x = Gather(axis, tuple(min(math.floor(i * ratio), old - 1) for i in range(m)))(x)
    return x


@rule("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")
def _interpolate(leaf: Leaf, x: Node, size: Any, align_corners: bool, *factors: Any) -> Node:
    given = next((f for f in factors if isinstance(f, (list, tuple))), None)
    for axis, m in enumerate(_resized(x, size, given), start=2):
        ratio = x.shape[axis] / m if given is None else 1 / given[axis - 2]
        x = resample(leaf, x, axis, interpolation(x.shape[axis], m, align_corners, ratio))
    return x


def interpolation(old: int, new: int, align_corners: bool, ratio: float) -> Tensor:
    """The matrix [new, old] of linear interpolation along one axis."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        if align_corners:
            at = i * (old - 1) / (new - 1) if new > 1 else 0.0
        else:
            at = max((i + 0.5) * ratio - 0.5, 0.0)
        left = min(int(at), old - 1)
        right = min(left + 1, old - 1)
        matrix[i, left] += 1 - (at - left)
        matrix[i, right] += at - left
    return matrix


def resample(leaf: Leaf, x: Node, axis: int, matrix: Tensor) -> Node:
    """A fixed linear map [new, old] along one axis."""
    order = [i for i in range(len(x.shape)) if i != axis] + [axis]
    y = Dense()(Permute(tuple(order))(x), leaf(matrix, "resampling"))
    back = sorted(range(len(order)), key=order.__getitem__)
    return Permute(tuple(back))(y)
