"""ATen's operations in terms of soundly's, one short rule each: arithmetic, elementwise functions, shapes.

A rule receives `leaf`, which turns a fixed tensor into a constant of the graph, and the operation's own arguments, in
which whatever varies is a node. Anything ATen leaves implicit (broadcasting, type promotion, batch dimensions) is made
explicit here and appears nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soundly.graph import elementwise
from soundly.graph.composite import Maximum, Rounding, minimum
from soundly.graph.elementwise import Elementwise
from soundly.graph.linear import (
    Combine,
    Concat,
    Gather,
    Permute,
    Slice,
    add,
    broadcast,
    narrow,
    pad,
    reshape,
    scale,
    subtract,
    transpose,
)
from soundly.graph.node import Fill, Node, Shape
from soundly.graph.product import multiply

Value = Any
"""A node, a fixed tensor, a number, or a tuple of these."""
Leaf = Callable[[Tensor, str], Node]
Rule = Callable[..., Value]

RULES: dict[str, Rule] = {}


def supported(target: Any) -> bool:
    """Whether an exported call needs no decomposition."""
    return not hasattr(target, "_opname") or op_name(target) in RULES


def op_name(target: Any) -> str:
    """The name in the table: without overload, and without the underscore of an in-place variant."""
    name: str = getattr(target, "_opname", getattr(target, "__name__", str(target)))
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


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


@rule("add")
def _add(leaf: Leaf, a: Any, b: Any, *, alpha: float = 1) -> Any:
    for x, mask in ((a, b), (b, a)):
        if isinstance(mask, Tensor) and isinstance(x, Node) and bool(torch.isneginf(mask).any()):
            hidden = torch.isneginf(mask)
            scores = _add(leaf, x, mask.masked_fill(hidden, 0.0))
            return Masked(scores, ~hidden.expand(scores.shape))
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


@dataclass(frozen=True)
class Masked:
    """Scores of which only some count, the others being minus infinity: on the way to a softmax and of no other use."""

    scores: Node
    kept: Tensor

    @property
    def shape(self) -> Shape:
        return self.scores.shape


@rule("masked_fill")
def _masked_fill(leaf: Leaf, x: Any, mask: Any, value: Any) -> Node | Masked:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if number == -math.inf and isinstance(mask, Tensor) and isinstance(x, (Node, Masked)):
        scores, kept = (x.scores, x.kept) if isinstance(x, Masked) else (x, torch.ones(x.shape, dtype=torch.bool))
        return Masked(scores, kept & ~mask.bool().expand(scores.shape))
    if isinstance(number, float) and math.isinf(number):
        raise ValueError("filling with an infinite value, other than minus infinity before a softmax")
    return _where(leaf, mask, value, x)


# -- elementwise functions


def _each(function: Elementwise) -> Rule:
    return lambda leaf, x: function(x)


RULES |= {
    name: _each(getattr(elementwise, name.upper()))
    for name in (
        "relu abs sign square sigmoid tanh silu mish exp log sqrt rsqrt reciprocal sin cos erf atan "
        "hardswish hardsigmoid"
    ).split()
}
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
RULES["log1p"] = lambda leaf, x: elementwise.LOG(_add(leaf, x, 1.0))
RULES["expm1"] = lambda leaf, x: _sub(leaf, elementwise.EXP(x), 1.0)


RULES["floor"] = lambda leaf, x: Rounding("floor")(x)
RULES["ceil"] = lambda leaf, x: Rounding("ceil")(x)
RULES["trunc"] = lambda leaf, x: Rounding("trunc")(x)
RULES["round"] = lambda leaf, x: Rounding("round")(x)


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
):
    RULES[_name] = lambda leaf, x, *args, **kwargs: x


RULES["_assert_tensor_metadata"] = lambda leaf, *args, **kwargs: None


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


def _moved(move: Callable[..., Tensor]) -> Rule:
    """What only moves entries: they go where the same operation puts their positions."""

    def taken(leaf: Leaf, x: Node, *args: Any, **kwargs: Any) -> Node:
        places = move(torch.arange(math.prod(x.shape)).reshape(x.shape), *args, **kwargs)
        flat = Gather(0, tuple(places.reshape(-1).tolist()))(reshape(x, (math.prod(x.shape),)))
        return reshape(flat, places.shape)

    return taken


RULES["diagonal"] = _moved(torch.diagonal)
RULES["unfold"] = _moved(Tensor.unfold)
RULES["gather"] = _moved(lambda places, dim, index, **_: torch.gather(places, dim, index))


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
