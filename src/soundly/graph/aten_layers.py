"""ATen's layers in terms of soundly's operations: reductions, products, normalisation, pooling, resampling.

The second half of the table that `aten.py` begins; import RULES from here to have all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from soundly.graph import elementwise
from soundly.graph.aten import RULES, Leaf, Masked, Rule, Value, _add, _axes, _axis, _drop, _mul, _spread, as_node, rule
from soundly.graph.composite import MaxPool, Normalise, Softmax, maximum_over
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

__all__ = ["RULES"]

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


@rule("var_mean")
def _var_mean(leaf: Leaf, x: Node, dim: Any = None, *args: Any, correction: Any = None, keepdim: bool = False) -> Value:
    return _var(leaf, x, dim, *args, correction=correction, keepdim=keepdim), _mean(leaf, x, dim, keepdim)


@rule("linalg_vector_norm")
def _vector_norm(
    leaf: Leaf, x: Node, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Node:
    if order == 2:
        return elementwise.SQRT(_sum(leaf, elementwise.SQUARE(x), dim, keepdim))
    if order == 1:
        return _sum(leaf, elementwise.ABS(x), dim, keepdim)
    if order == math.inf:
        return _extreme(elementwise.ABS(x), dim, keepdim, 1)
    raise ValueError(f"a norm of order {order}")


@rule("cumsum")
def _cumsum(leaf: Leaf, x: Node, dim: int, *, dtype: Any = None) -> Node:
    a = _axis(dim, len(x.shape))
    return resample(leaf, x, a, torch.ones(x.shape[a], x.shape[a], dtype=torch.float64).tril())


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
def _softmax(leaf: Leaf, x: Node | Masked, dim: int, *args: Any, **kwargs: Any) -> Node:
    softmax = Softmax(_axis(dim, len(x.shape)))
    if isinstance(x, Node):
        return softmax(x) if x.shape else Fill(1.0, ())()
    return softmax(x.scores) if bool(x.kept.all()) else softmax(x.scores, leaf(x.kept.double(), "attention mask"))


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


@rule("addmm", "baddbmm")
def _addmm(leaf: Leaf, c: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Node:
    product = _matmul(leaf, a, b)
    return Combine((float(beta), float(alpha)))(as_node(leaf, c, product.shape), product)


@rule("addbmm")
def _addbmm(leaf: Leaf, c: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Node:
    product = _sum(leaf, _matmul(leaf, a, b), 0)
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
        return _softmax(leaf, scores, last)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return _softmax(leaf, Masked(scores, mask.expand(scores.shape)), last)
    return _softmax(leaf, _add(leaf, scores, mask), last)


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


@rule("cudnn_batch_norm")
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
    """Average pooling: a convolution with ones, divided by the window's size, which may differ at the border."""
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


def _with_indices(pool: Rule) -> Rule:
    """A rule for the variant that also returns positions, which nothing may use."""
    return lambda *args, **kwargs: (pool(*args, **kwargs), None)


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
    RULES[f"adaptive_max_pool{_n}d"] = _with_indices(_adaptive(_n, lambda x, axes: maximum_over(x, axes[0])))


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
