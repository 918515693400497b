"""Captured functions compute what PyTorch computes: a sample of every ATen rule."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.graph.captures import Call, agree, rand
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """A function of tensors of some shapes."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    positive: bool


def causal(scores: torch.Tensor) -> torch.Tensor:
    """Attention weights as they are often written by hand."""
    late = torch.ones(scores.shape[-2:]).triu(1) > 0
    return scores.masked_fill(late, float("-inf")).softmax(-1)


def case(name: str, function: Callable[..., Any], *shapes: tuple[int, ...], positive: bool = False) -> Sample:
    return Sample(name, function, shapes, positive)


aten_ops = torch.ops.aten
MASK = torch.tensor([[True, False, True], [False, True, True]])
BIAS = rand(4, 4)
LATE = torch.full((4, 4), -torch.inf, dtype=torch.float64).triu(1)
TENSOR = rand(2, 3)
FUNCTIONS = [
    # arithmetic
    case("add alpha", lambda x: torch.add(x, x.flip(0), alpha=2.5), (2, 3)),
    case("add number", lambda x: 1.5 + x - 2, (2, 3)),
    case("add broadcasts", lambda x, y: x + y, (2, 3), (3,)),
    case("sub alpha", lambda x, y: torch.sub(x, y, alpha=0.5), (2, 3), (2, 1)),
    case("rsub", lambda x: 3 - x, (2, 3)),
    case("torch.rsub", lambda x, y: torch.rsub(x, y, alpha=2), (2,), (2,)),
    case("mul broadcasts", lambda x, y: x * y, (2, 1, 3), (4, 1)),
    case("mul self", lambda x: x * x, (2, 3)),
    case("mul tensor", lambda x: x * TENSOR.to(x.dtype), (2, 3)),
    case("div number", lambda x: x / 3, (2, 3)),
    case("div tensor", lambda x: x / TENSOR.to(x.dtype), (2, 3)),
    case("div node", lambda x, y: x / y, (2, 3), (3,), positive=True),
    case("number div node", lambda x: 2 / x + 1 / x, (2, 3), positive=True),
    case("reciprocal", lambda x: x.reciprocal(), (3,), positive=True),
    case("neg", lambda x: -x, (3,)),
    case("in place", lambda x: F.relu((x * 1).add_(1).mul_(2).sub_(0.5).div_(3)), (2, 3)),
    case("pow 2", lambda x: x**2, (3,)),
    case("pow 3", lambda x: x**3, (3,)),
    case("pow half", lambda x: x**0.5 + x**-0.5 + x**1.7, (3,), positive=True),
    case("pow negative", lambda x: x**-1 + x**-3, (3,), positive=True),
    case("pow 0 and 1", lambda x: x**1 + x**0, (3,)),
    case("number to the power", lambda x: 2**x, (3,)),
    case("addcmul", lambda x, y: torch.addcmul(x, x, y, value=0.3), (2, 3), (2, 3)),
    case("addcdiv", lambda x, y: torch.addcdiv(x, x, y, value=0.3), (2, 3), (2, 3), positive=True),
    case("lerp", lambda x, y: torch.lerp(x, y, 0.3), (2, 3), (2, 3)),
    case("square sqrt rsqrt", lambda x: torch.sqrt(torch.square(x)) + torch.rsqrt(x), (3,), positive=True),
    case("maximum minimum", lambda x, y: torch.maximum(x, y) - torch.minimum(x, y), (2, 3), (3,)),
    # comparisons and choices
    case("where tensor", lambda x, y: torch.where(MASK, x, y), (2, 3), (3,)),
    case("where number", lambda x: torch.where(MASK, x, 2.0), (2, 3)),
    case("where node", lambda x, y: torch.where(x > y, x, 2 * y), (2, 3), (2, 3)),
    case("where infinite", lambda x: torch.where(MASK, torch.where(MASK, x, 0.0), torch.tensor(1.0)), (2, 3)),
    case("comparisons", lambda x: ((x > 0.1) & (x < 1)).to(x.dtype) * x + (~(x >= 0.2)) * x + (x <= 0) * 3, (2, 3)),
    case("logical", lambda x: torch.logical_not(x > 0) * x + torch.logical_and(x > 0, x < 1) * x, (2, 3)),
    case("masked fill", lambda x: x.masked_fill(MASK, 7.0), (2, 3)),
    case("hand-written causal attention", lambda x: causal(x) @ x, (3, 3)),
    case("additive causal mask", lambda x: (x @ x.T + torch.full((3, 3), -torch.inf).triu(1)).softmax(-1) @ x, (3, 3)),
    case("masks on masks", lambda x: causal(x.masked_fill(MASK[1], -torch.inf)), (2, 3, 3)),
    case("masked fill node", lambda x: x.masked_fill(x > 0, 7.0), (2, 3)),
    case("clamp", lambda x: x.clamp(-0.5, 0.7) + x.clamp(min=0.1) + x.clamp(max=0.2), (2, 3)),
    case("clamp tensors", lambda x, y: torch.clamp(x, min=y, max=y + 1), (2, 3), (3,)),
    case("clamp max tensor", lambda x: torch.clamp(x, max=TENSOR.to(x.dtype)), (2, 3)),
    case("clamp_min clamp_max", lambda x: torch.clamp_max(torch.clamp_min(x, -0.2), 0.9), (2, 3)),
    # shapes
    case("view", lambda x: x.view(2, -1).reshape(3, 4), (2, 3, 2)),
    case("flatten", lambda x: x.flatten(1).flatten(), (2, 3, 2)),
    case("flatten scalar", lambda x: x.sum().flatten(), (2,)),
    case("unflatten", lambda x: x.unflatten(1, (2, -1)), (2, 6)),
    case("unsqueeze squeeze", lambda x: x.unsqueeze(-1).squeeze(2).unsqueeze(0).squeeze(), (2, 3)),
    case("squeeze all", lambda x: x.squeeze(), (1, 3, 1)),
    case("expand", lambda x: x.expand(2, 3, -1), (3, 1)),
    case("expand_as", lambda x, y: x.expand_as(y) * y, (1, 3), (2, 3)),
    case("repeat", lambda x: x.repeat(2, 1, 2), (2, 3)),
    case("repeat_interleave", lambda x: x.repeat_interleave(2, 1), (2, 3)),
    case("tile", lambda x: torch.tile(x, (2, 2)), (2, 3)),
    case("permute", lambda x: x.permute(2, 0, 1), (2, 3, 4)),
    case("transpose", lambda x: x.transpose(-1, 0).mT, (2, 3)),
    case("t", lambda x: x.t() @ x, (2, 3)),
    case("movedim", lambda x: x.movedim(0, -1), (2, 3, 4)),
    case("contiguous clone detach", lambda x: x.contiguous().clone() + x.detach() * 0, (3,)),
    case("to double", lambda x: x.to(torch.float64).type_as(x), (3,)),
    case("select", lambda x: x[1] + x[-1] + x.select(0, 0), (3, 4)),
    case("slices", lambda x: x[1:, ::2] + x[:-1, 1::2], (3, 4)),
    case("ellipsis and none", lambda x: x[..., None, 1:3], (2, 4)),
    case("narrow", lambda x: x.narrow(1, -2, 2), (2, 4)),
    case("split", lambda x: torch.cat([a * (i + 1) for i, a in enumerate(x.split(2, 1))], 1), (2, 5)),
    case("split sizes", lambda x: x.split([1, 3, 1], -1), (2, 5)),
    case("chunk", lambda x: x.chunk(3, 1), (2, 7)),
    case("tensor_split", lambda x: x.tensor_split(3, 1), (2, 7)),
    case("unbind", lambda x: x.unbind(1)[1] * 2 + x.unbind(1)[0], (2, 3)),
    case("cat", lambda x, y: torch.cat([x, y, x], -1), (2, 3), (2, 1)),
    case("cat constant", lambda x: torch.cat([x, torch.ones(2, 1, dtype=x.dtype)], 1), (2, 3)),
    case("stack", lambda x, y: torch.stack([x, y], -1), (2, 3), (2, 3)),
    case("flip", lambda x: x.flip(0, 1), (2, 3)),
    case("roll", lambda x: x.roll((1, -1), (0, 1)), (2, 3)),
    case("roll one", lambda x: torch.roll(x, 2, -1), (2, 5)),
    case("rot90", lambda x: torch.rot90(x, 1, (0, 1)), (2, 3)),
    case("pixel shuffle", lambda x: F.pixel_shuffle(x, 2), (1, 8, 2, 3)),
    case("pixel unshuffle", lambda x: F.pixel_unshuffle(x, 2), (1, 2, 4, 6)),
    case("channel shuffle", lambda x: F.channel_shuffle(x, 2), (1, 4, 2, 2)),
    # positions
    case("index list", lambda x: x[[2, 0]], (3, 4)),
    case("index tensor", lambda x: x[:, torch.tensor([0, -1, 1])], (3, 4)),
    case("index pair", lambda x: x[torch.tensor([0, 1]), torch.tensor([2, -1])], (3, 4)),
    case("index grid", lambda x: x[torch.tensor([[0], [1]]), torch.tensor([2, 3])], (3, 4)),
    case("index_select", lambda x: x.index_select(1, torch.tensor([1, 1, 0])), (3, 4)),
    case("gather", lambda x: x.gather(1, torch.tensor([[0, 2], [1, 1]])), (2, 3)),
    case("tril", lambda x: x.tril() + x.triu(1) * 2, (3, 3)),
    case("unfold", lambda x: x.unfold(1, 2, 1), (3, 3)),
    case("diagonal", lambda x: x.diagonal(), (3, 3)),
    # padding
    case("pad", lambda x: F.pad(x, (1, 2, 0, 1)), (2, 3)),
    case("pad value", lambda x: F.pad(x, (1, 0), value=3.5), (2, 3)),
    case("pad crop", lambda x: F.pad(x, (-1, 1)), (2, 3)),
    case("pad crop value", lambda x: F.pad(x, (-1, 2), value=-2.0), (2, 3)),
    case("pad reflect 1d", lambda x: F.pad(x, (2, 1), mode="reflect"), (1, 2, 4)),
    case("pad reflect 2d", lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), (1, 1, 4, 3)),
    case("pad replicate 3d", lambda x: F.pad(x, (1, 0, 0, 1, 1, 1), mode="replicate"), (1, 1, 2, 2, 2)),
    case("pad circular", lambda x: F.pad(x, (1, 2), mode="circular"), (1, 2, 4)),
    case("pad circular 2d", lambda x: F.pad(x, (1, 1, 2, 0), mode="circular"), (1, 1, 3, 4)),
    # reductions
    case("sum", lambda x: x.sum() + x.sum(1).sum(), (2, 3)),
    case("sum dims", lambda x: x.sum((0, 2), keepdim=True), (2, 3, 2)),
    case("mean", lambda x: x.mean() + x.mean(-1, keepdim=True), (2, 3)),
    case("var forms", lambda x: x.var() + x.var(unbiased=False) + x.var(1).sum() + x.var(1, False).sum(), (3, 4)),
    case("var correction", lambda x: torch.var(x, (0, 1), correction=0, keepdim=True) + x.var(0, correction=2), (3, 4)),
    case("std forms", lambda x: x.std() + x.std(1, unbiased=False).sum() + x.std(0, keepdim=True), (3, 4)),
    case("var_mean", lambda x: torch.var_mean(x, 1), (3, 4)),
    case("amax amin", lambda x: x.amax((0, 2)) - x.amin(1).sum(), (2, 3, 2)),
    case("max min", lambda x: x.max() - x.min(), (2, 3)),
    case("max dim", lambda x: x.max(1).values + x.max(1, keepdim=True)[0].sum() - x.min(0)[0].sum(), (2, 3)),
    case("max of two", lambda x, y: torch.max(x, y) + torch.min(x, y), (2, 3), (2, 3)),
    case("norm", lambda x: x.norm(dim=1) + torch.linalg.vector_norm(x) + x.norm(1, 1) + x.norm(torch.inf, 1), (2, 3)),
    case("normalize", lambda x: F.normalize(x, dim=1), (2, 3)),
    case("cosine", lambda x, y: F.cosine_similarity(x, y), (2, 3), (2, 3)),
    case("cumsum", lambda x: x.cumsum(1), (2, 4)),
    case("softmax", lambda x: x.softmax(1) + F.softmax(x, 0), (2, 3)),
    case("log softmax", lambda x: x.log_softmax(1), (2, 3)),
    case("log softmax of large scores", lambda x: (300 * x).log_softmax(1), (2, 3)),
    case("logsumexp", lambda x: x.logsumexp(1) + torch.logsumexp(x, (0, 1), keepdim=True), (2, 3)),
    # products
    case("matmul 2d 2d", lambda x, y: x @ y, (2, 3), (3, 4)),
    case("matmul 1d 1d", lambda x, y: x @ y, (3,), (3,)),
    case("matmul 1d 2d", lambda x, y: x @ y, (3,), (3, 4)),
    case("matmul 2d 1d", lambda x, y: x @ y, (2, 3), (3,)),
    case("matmul 3d 2d", lambda x, y: x @ y, (2, 2, 3), (3, 4)),
    case("matmul 2d 3d", lambda x, y: x @ y, (2, 3), (4, 3, 2)),
    case("matmul 1d 3d", lambda x, y: x @ y, (3,), (4, 3, 2)),
    case("matmul 3d 1d", lambda x, y: x @ y, (4, 2, 3), (3,)),
    case("matmul broadcast", lambda x, y: x @ y, (2, 1, 2, 3), (4, 3, 2)),
    case("mm mv dot", lambda x, y: torch.mv(torch.mm(x, y), y[0]).dot(x[0]), (3, 3), (3, 3)),
    case("bmm", lambda x, y: torch.bmm(x, y), (2, 2, 3), (2, 3, 1)),
    case("addmm", lambda x, y: torch.addmm(x[0], x, y, beta=0.5, alpha=2), (3, 3), (3, 3)),
    case("baddbmm", lambda x, y: torch.baddbmm(y, x, y, beta=2, alpha=0.1), (2, 3, 3), (2, 3, 3)),
    case("addbmm", lambda x, y: torch.addbmm(y[0], x, y), (2, 3, 3), (2, 3, 3)),
    case("einsum", lambda x, y: torch.einsum("bij,bkj->bik", x, y), (2, 3, 4), (2, 2, 4)),
    case("outer", lambda x, y: torch.outer(x, y), (2,), (3,)),
    # attention
    case("attention", lambda x: F.scaled_dot_product_attention(x, x * 2, x), (1, 2, 4, 3)),
    case("attention causal", lambda x: F.scaled_dot_product_attention(x, x * 2, x, is_causal=True), (1, 2, 4, 3)),
    case("attention scale", lambda x: F.scaled_dot_product_attention(x, x * 2, x, scale=0.3), (1, 2, 4, 3)),
    case(
        "attention bool mask",
        lambda x: F.scaled_dot_product_attention(x, x * 2, x, attn_mask=torch.eye(4, dtype=torch.bool).roll(1, 0)),
        (1, 2, 4, 3),
    ),
    case(
        "attention float mask",
        lambda x: F.scaled_dot_product_attention(x, x * 2, x, attn_mask=(BIAS + LATE).to(x.dtype)),
        (1, 2, 4, 3),
    ),
    case("attention bias", lambda x, b: F.scaled_dot_product_attention(x, x * 2, x, attn_mask=b), (1, 2, 4, 3), (4, 4)),
    case(
        "attention grouped queries",
        lambda q, k: F.scaled_dot_product_attention(q, k, 2 * k, enable_gqa=True),
        (1, 4, 3, 2),
        (1, 2, 3, 2),
    ),
    case("longer keys", lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), (1, 3, 2), (1, 5, 2)),
    # resampling
    case("nearest", lambda x: F.interpolate(x, scale_factor=2), (1, 2, 3, 2)),
    case("nearest size", lambda x: F.interpolate(x, size=(5, 3)), (1, 2, 3, 4)),
    case("nearest fraction", lambda x: F.interpolate(x, scale_factor=1.7), (1, 2, 5)),
    case("nearest 3d", lambda x: F.interpolate(x, scale_factor=(1, 2, 3)), (1, 1, 2, 2, 2)),
    case("bilinear", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (1, 2, 3, 2)),
    case("aligned", lambda x: F.interpolate(x, size=(5, 7), mode="bilinear", align_corners=True), (1, 2, 3, 4)),
    case("bilinear fraction", lambda x: F.interpolate(x, scale_factor=(1.6, 0.7), mode="bilinear"), (1, 2, 5, 6)),
    case("bilinear shrink", lambda x: F.interpolate(x, size=(2, 1), mode="bilinear", align_corners=True), (1, 1, 5, 4)),
    case("linear", lambda x: F.interpolate(x, size=7, mode="linear"), (1, 2, 4)),
    case("trilinear", lambda x: F.interpolate(x, size=(3, 4, 2), mode="trilinear"), (1, 1, 2, 3, 2)),
    case("recomputed factors", lambda x: F.interpolate(x, scale_factor=1.6, recompute_scale_factor=True), (1, 1, 5, 4)),
    # names that only other programs use: called directly
    case("softmax names", lambda x: aten_ops._softmax(x, 1, False) + aten_ops._log_softmax(x, 0, False), (2, 3)),
    case("safe softmax", lambda x: aten_ops._safe_softmax(x, 1), (2, 3)),
    case("constant_pad_nd", lambda x: aten_ops.constant_pad_nd(x, [1, 0], 2.5), (2, 3)),
    case("arithmetic names", lambda x: torch.multiply(torch.subtract(torch.true_divide(x, 3), x), x), (2, 3)),
    case("more names", lambda x: torch.positive(x.swapaxes(0, 1)).double().clip(-1, 1).divide(2), (2, 3)),
    case("alias", lambda x: torch.concat([aten_ops.alias(x), aten_ops.lift_fresh_copy(x)]), (2, 3)),
    case("pads 1d", lambda x: aten_ops.reflection_pad1d(x, [1, 2]) + aten_ops.replication_pad1d(x, [2, 1]), (1, 2, 4)),
    case("pads 2d", lambda x: aten_ops.reflection_pad2d(x, [1, 2, 0, 1]), (1, 1, 4, 3)),
    case("pads 2d replicated", lambda x: aten_ops.replication_pad2d(x, [1, 2, 0, 1]), (1, 1, 4, 3)),
    case("pads 3d", lambda x: aten_ops.reflection_pad3d(x, [1, 1, 0, 1, 1, 0]), (1, 1, 2, 2, 2)),
    case("pads 3d replicated", lambda x: aten_ops.replication_pad3d(x, [1, 1, 0, 1, 1, 0]), (1, 1, 2, 2, 2)),
    case("max pool with indices", lambda x: aten_ops.max_pool2d_with_indices(x, [2, 2], [1, 2])[0], (1, 1, 4, 3)),
    case("max pool 3d with indices", lambda x: aten_ops.max_pool3d_with_indices(x, [2, 2, 1])[0], (1, 1, 2, 2, 2)),
    case("adaptive max pool 3d", lambda x: F.adaptive_max_pool3d(x, (2, 1, 2)), (1, 1, 3, 2, 2)),
    case(
        "convolution",
        lambda x, w: (
            aten_ops.convolution(x, w, None, [2, 1], [1, 0], [1, 1], False, [0, 0], 1)
            + aten_ops.convolution(x, w, None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1).sum()
        ),
        (1, 2, 4, 4),
        (2, 2, 3, 3),
    ),
    case("native layer norm", lambda x, w: aten_ops.native_layer_norm(x, [3], w, w, 1e-3)[0], (2, 3), (3,)),
    # functions
    *(
        case(name, getattr(F, name, None) or getattr(torch, name), (3, 5))
        for name in (
            "relu sigmoid tanh gelu silu mish softplus hardswish hardtanh relu6 elu celu selu leaky_relu abs "
            "sign exp sin cos erf atan logsigmoid softsign tanhshrink expm1 hardshrink softshrink square"
        ).split()
    ),
    case("log log1p", lambda x: torch.log(x) + torch.log1p(x), (3,), positive=True),
    case("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), (3, 5)),
    case("softplus beta", lambda x: F.softplus(x, beta=2.0), (3, 5)),
    case("elu celu alpha", lambda x: F.elu(x, 0.3) + F.celu(x, 0.5), (3, 5)),
    case("leaky slope hardtanh", lambda x: F.leaky_relu(x, 0.3) + F.hardtanh(x, -0.2, 0.4), (3, 5)),
    case("threshold", lambda x: F.threshold(x, 0.2, -3.0), (3, 5)),
    case("glu", lambda x: F.glu(x, 1), (3, 4)),
    case("dropout in evaluation", lambda x: F.dropout(x, 0.5, training=False), (3,)),
    case(
        "rounding", lambda x: torch.round(3 * x) + torch.floor(5 * x) - 2 * torch.ceil(x) + torch.trunc(4 * x), (3, 5)
    ),
    case("rms norm", lambda x: F.rms_norm(x, (3,), eps=0.1), (2, 3)),
]


def groups(size: int = 16) -> list[Any]:
    """Functions of equal shapes side by side in one module: torch.export takes long per module, not per operation."""
    alike: dict[Any, list[Sample]] = {}
    for sample in FUNCTIONS:
        alike.setdefault((sample.shapes, sample.positive), []).append(sample)
    parts = [rows[i : i + size] for rows in alike.values() for i in range(0, len(rows), size)]
    return [pytest.param(part, id=", ".join(s.name for s in part)) for part in parts]


@pytest.mark.parametrize("samples", groups())
def test_functions(samples):
    examples = [rand(*shape) for shape in samples[0].shapes]
    examples = [e.abs() + 0.5 for e in examples] if samples[0].positive else examples

    def together(*x: Tensor) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        for sample in samples:
            y = sample.function(*x)
            results += y if isinstance(y, tuple) else (y,)
        return tuple(results)

    agree(Call(together), *examples)
