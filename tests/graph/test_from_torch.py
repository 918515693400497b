"""Captured modules compute what the modules compute: every ATen rule, and every way in which a capture may fail.

`from_torch` compares each capture with its module itself; these tests compare again with that check switched off, so
that neither can hide the other's gaps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundly.errors import CaptureError, CaptureMismatch, DynamicModel, InvalidInput, UnsupportedOp
from soundly.graph import aten
from soundly.graph.from_torch import compare, from_torch
from soundly.graph.network import Network
from soundly.graph.node import Input, Parameter


class Call(nn.Module):
    """A function of tensors as a module, with weights of its own."""

    def __init__(self, function: Callable[..., Any], **weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *x: Tensor) -> Any:
        return self.function(*x, *self.parameters())


def agree(module: nn.Module, *examples: Tensor, tolerance: float = 1e-10) -> Network:
    """Captures without the built-in check and compares outputs and input gradients at new inputs, in float64."""
    module = module.double().eval()
    examples = tuple(e.double() if e.is_floating_point() else e for e in examples)
    network = from_torch(module, examples, check=False)
    torch.manual_seed(1)
    inputs = [e + 0.3 * torch.randn_like(e) if e.is_floating_point() else e for e in examples]
    floats = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    want = module(*[x.clone() if x.is_floating_point() else x for x in inputs])
    want = [w for w in (want if isinstance(want, tuple) else (want,)) if isinstance(w, Tensor)]
    got = network(*floats)
    got = got if isinstance(got, tuple) else (got,)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert bool(((g - w).abs() <= tolerance * (1 + w.abs())).all()), f"largest error {(g - w).abs().max()}"
    seeds = [torch.randn_like(w) for w in want]
    totals = [sum((v * s).sum() for v, s in zip(values, seeds, strict=True)) for values in (got, want)]
    slopes = [torch.autograd.grad(total, floats, allow_unused=True) for total in totals]
    for g, w in zip(*slopes, strict=True):
        zero = torch.zeros(())
        assert bool(((zero if g is None else g) - (zero if w is None else w)).abs().max() <= 1e-8)
    compare(network, module, examples)  # and the built-in check agrees
    return network


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)), dtype=torch.float64)


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


def module(name: str, make: Callable[[], nn.Module], *shape: int) -> Any:
    return pytest.param(make, shape, id=name)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x)) + x


class Native(nn.Module):
    """Batch norm under the names that other programs use."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = statistics(nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        given = (x, self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var)
        one = aten_ops.native_batch_norm(*given, False, 0.1, 1e-3)[0]
        return one + aten_ops._native_batch_norm_legit_no_training(*given, 0.1, 1e-2)[0]


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x)


class First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def statistics(norm: nn.Module) -> nn.Module:
    for value in norm.buffers():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 2.0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


MODULES = [
    module("linear", lambda: nn.Linear(3, 2), 2, 4, 3),
    module("linear without bias", lambda: nn.Linear(3, 2, bias=False), 3),
    module("conv1d", lambda: nn.Conv1d(2, 3, 3, 2, 1, 2), 2, 2, 9),
    module("conv2d", lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0)), 2, 2, 5, 4),
    module("conv2d grouped", lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), 1, 4, 5, 4),
    module("conv2d depthwise", lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), 1, 3, 4, 4),
    module("conv2d same", lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(1, 2)), 1, 2, 5, 4),
    module("conv2d valid", lambda: nn.Conv2d(2, 3, 3, padding="valid"), 1, 2, 5, 4),
    module("conv2d unbatched", lambda: nn.Conv2d(2, 3, 3), 2, 5, 4),
    module("conv2d reflect", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), 1, 2, 5, 4),
    module("conv2d circular", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 1, 2, 5, 4),
    module("conv3d", lambda: nn.Conv3d(2, 2, (2, 3, 1), padding=(0, 1, 0)), 1, 2, 3, 4, 2),
    module("conv1d same", lambda: nn.Conv1d(2, 2, 4, padding="same"), 1, 2, 6),
    module("transpose1d", lambda: nn.ConvTranspose1d(2, 3, 3, 2, 1, 1), 2, 2, 4),
    module("transpose2d", lambda: nn.ConvTranspose2d(4, 4, 3, (2, 3), 1, (1, 2), groups=2), 1, 4, 3, 2),
    module("transpose2d dilated", lambda: nn.ConvTranspose2d(2, 3, 2, 1, 0, 0, dilation=2, bias=False), 1, 2, 3, 2),
    module("transpose2d wide padding", lambda: nn.ConvTranspose2d(2, 3, 2, 3, 0, 2), 1, 2, 3, 2),
    module("transpose2d unbatched", lambda: nn.ConvTranspose2d(2, 3, 2), 2, 3, 2),
    module("transpose3d", lambda: nn.ConvTranspose3d(1, 2, 2, 2, 0, 1), 1, 1, 2, 2, 2),
    module("max pool 1d", lambda: nn.MaxPool1d(3, 2, 1, ceil_mode=True), 1, 2, 8),
    module("max pool 2d", lambda: nn.MaxPool2d(2), 1, 2, 5, 4),
    module("max pool 2d dilated", lambda: nn.MaxPool2d(3, 2, 1, 2, ceil_mode=True), 1, 2, 7, 8),
    module("max pool 2d unbatched", lambda: nn.MaxPool2d((2, 1), (1, 2)), 2, 5, 4),
    module("max pool 3d", lambda: nn.MaxPool3d(2, 1), 1, 1, 3, 3, 3),
    module("average pool 1d", lambda: nn.AvgPool1d(3, 2, 1, ceil_mode=True), 1, 2, 8),
    module("average pool 2d", lambda: nn.AvgPool2d(2), 1, 2, 5, 4),
    module("average pool without padding", lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), 1, 2, 6, 5),
    module("average pool ceil", lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), 1, 2, 6, 8),
    module("average pool ceil big stride", lambda: nn.AvgPool2d(2, 3, 1, ceil_mode=True), 1, 1, 6, 7),
    module("average pool ceil, not padding", lambda: nn.AvgPool2d(3, 2, 1, True, count_include_pad=False), 1, 2, 6, 8),
    module("average pool divisor", lambda: nn.AvgPool2d(2, 1, divisor_override=3), 1, 2, 3, 4),
    module("average pool unbatched", lambda: nn.AvgPool2d(2), 2, 4, 4),
    module("average pool 3d", lambda: nn.AvgPool3d(2, 1, 1), 1, 1, 2, 3, 2),
    module("adaptive average", lambda: nn.AdaptiveAvgPool2d((3, 2)), 1, 2, 5, 7),
    module("adaptive average one", lambda: nn.AdaptiveAvgPool2d(1), 1, 2, 5, 7),
    module("adaptive average none", lambda: nn.AdaptiveAvgPool2d((None, 2)), 1, 2, 3, 5),
    module("adaptive average 1d", lambda: nn.AdaptiveAvgPool1d(3), 1, 2, 7),
    module("adaptive average 3d", lambda: nn.AdaptiveAvgPool3d(2), 1, 1, 3, 4, 2),
    module("adaptive max", lambda: nn.AdaptiveMaxPool2d((3, 2)), 1, 2, 5, 7),
    module("adaptive max 1d", lambda: nn.AdaptiveMaxPool1d(2), 1, 2, 5),
    module("batch norm 1d", lambda: statistics(nn.BatchNorm1d(3)), 2, 3),
    module("batch norm 1d sequences", lambda: statistics(nn.BatchNorm1d(3)), 2, 3, 4),
    module("batch norm 2d", lambda: statistics(nn.BatchNorm2d(3, eps=0.1)), 2, 3, 2, 2),
    module("batch norm, native", lambda: Native(), 2, 3, 2),
    module("batch norm plain", lambda: statistics(nn.BatchNorm2d(3, affine=False)), 2, 3, 2, 2),
    module("layer norm", lambda: statistics(nn.LayerNorm((3, 2), eps=0.01)), 2, 3, 2),
    module("layer norm plain", lambda: nn.LayerNorm(4, elementwise_affine=False), 2, 4),
    module("rms norm eps", lambda: statistics(nn.RMSNorm(4, eps=0.1)), 2, 4),
    module("group norm", lambda: statistics(nn.GroupNorm(2, 4)), 2, 4, 3),
    module("instance norm", lambda: statistics(nn.InstanceNorm2d(3, affine=True)), 2, 3, 2, 3),
    module("instance norm tracked", lambda: statistics(nn.InstanceNorm1d(3, track_running_stats=True)), 2, 3, 4),
    module("local response norm", lambda: nn.LocalResponseNorm(2), 1, 4, 3, 3),
    module("prelu", lambda: nn.PReLU(), 2, 3),
    module("prelu per channel", lambda: nn.PReLU(3, init=0.3), 2, 3, 2, 2),
    module("prelu per channel 2d", lambda: nn.PReLU(3), 2, 3),
    module("softmax2d", lambda: nn.Softmax2d(), 1, 3, 2, 2),
    module("glu", lambda: nn.GLU(), 2, 4),
    module("identity", lambda: nn.Identity(), 2),
    module("flatten unflatten", lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 3))), 2, 6),
    module("pads", lambda: nn.Sequential(nn.ZeroPad2d(1), nn.ConstantPad2d((1, 0, 0, 2), 2.5)), 1, 1, 2, 2),
    module("more pads", lambda: nn.Sequential(nn.ReplicationPad2d((1, 0, 2, 1)), nn.CircularPad2d(1)), 1, 1, 2, 3),
    module("upsamplers", lambda: nn.Sequential(nn.Upsample(None, 2), nn.UpsamplingBilinear2d(None, 2)), 1, 1, 2, 3),
    module("dropouts", lambda: nn.Sequential(nn.Dropout(), nn.Linear(3, 3), nn.Dropout1d()), 2, 3),
    module("tied weights", Tied, 2, 3),
    module("shared modules", Shared, 2, 3),
    module("multihead attention with weights", Attention, 1, 3, 4),
    module("multihead attention without bias", lambda: Attention(bias=False, add_zero_attn=True), 1, 3, 4),
    module("multihead attention other keys", lambda: Attention(kdim=4, vdim=4, add_bias_kv=True), 1, 3, 4),
    module("encoder layer", lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True), 1, 3, 4),
    module("encoder", lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 2), 1, 3, 4),
    module("rnn", lambda: First(nn.RNN(3, 2, batch_first=True)), 1, 4, 3),
    module("lstm", lambda: First(nn.LSTM(3, 2, bidirectional=True)), 4, 2, 3),
    module("lstm projected", lambda: First(nn.LSTM(3, 4, proj_size=2)), 3, 1, 3),
    module("gru", lambda: First(nn.GRU(3, 2, num_layers=2)), 3, 1, 3),
    module("lstm cell", lambda: nn.LSTMCell(3, 2), 2, 3),
    module("gru cell", lambda: nn.GRUCell(3, 2), 2, 3),
    module("weight norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), 2, 3),
]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("make, shape", MODULES)
def test_modules(make, shape):
    torch.manual_seed(0)
    agree(make(), rand(*shape))


def test_hardsigmoid():
    """By itself: torch's own derivative of it holds a sixth only to float32's accuracy, also in float64."""
    x = torch.linspace(-4, 4, 21, dtype=torch.float64)
    network = from_torch(nn.Hardsigmoid(), x, check=False)
    assert bool(((network(x) - F.hardsigmoid(x)).abs() < 1e-12).all())
    inside = (x > -3) & (x < 3)
    total = torch.func.grad(lambda v: network(v).sum())(x)
    assert bool(((total - inside.double() / 6).abs() < 1e-12).all())


# -- inputs, outputs, parameters, places


def test_several_inputs_and_outputs():
    module = Call(lambda x, y: (x + y, {"product": x * y, "list": [x - y]}))
    network = from_torch(module, (torch.randn(2), torch.randn(2)))
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    assert [o.tolist() for o in network(x, y)] == [[4.0, 7.0], [3.0, 10.0], [-2.0, -3.0]]
    assert len(network.inputs) == 2


def test_an_unused_input_stays_an_input():
    network = from_torch(Call(lambda x, y: 2 * x), (torch.ones(2), torch.ones(3)))
    assert network(torch.ones(2), torch.zeros(3)).tolist() == [2.0, 2.0]


def test_an_output_that_is_an_input():
    network = from_torch(Call(lambda x: (x, 2 * x)), torch.ones(2))
    assert [o.tolist() for o in network(torch.tensor([1.0, 2.0]))] == [[1.0, 2.0], [2.0, 4.0]]


def test_token_ids_are_frozen_at_the_example():
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 3, padding_idx=0), nn.Linear(3, 2)

        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            return self.head(self.table(ids) + x)

    module = Embedded()
    ids, x = torch.tensor([[1, 5, 5], [0, 6, 2]]), torch.randn(2, 3, 3)
    network = from_torch(module, (ids, x))
    assert len(network.inputs) == 1
    torch.testing.assert_close(network(x + 1), module(ids, x + 1))
    (gradient,) = torch.autograd.grad(module(ids, x).sum(), module.table.weight)
    assert "table.weight" in network.parameters and bool(gradient.any())


def test_parameters_and_places_carry_the_modules_names():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2), nn.Tanh()))
    x = torch.randn(1, 3)
    network = from_torch(module, x)
    assert set(network.parameters) == {"0.weight", "0.bias", "2.0.weight", "2.0.bias"}
    assert {"0", "1", "2", "2.0", "2.1"} <= set(network.places)
    kept: list[Tensor] = []
    for name in ("0", "1", "2.0", "2"):
        handle = module.get_submodule(name).register_forward_hook(lambda _, __, out: kept.append(out.detach()))
        module(x)
        handle.remove()
        torch.testing.assert_close(network.evaluate([network.at(name)], x)[0], kept[-1])
    assert "test_from_torch" not in network.at("2.0").origin and network.at("2.0").origin.startswith("2.0 ")


def test_tied_and_shared_weights_are_one_parameter():
    tied, shared = from_torch(Tied(), torch.randn(2, 3)), from_torch(Shared(), torch.randn(2, 3))
    assert len([p for p in tied.nodes if isinstance(p.op, Parameter)]) == 3
    assert len([p for p in shared.nodes if isinstance(p.op, Parameter)]) == 2


def test_weights_are_shared_with_the_module_and_untouched():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train()
    module[0].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    flags = [m.training for m in module.modules()]
    network = from_torch(module, torch.randn(4, 3))
    assert [m.training for m in module.modules()] == flags == [True, False, True]
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) and value.dtype == before[name].dtype
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    weight = network.values[network.parameters["0.weight"]]
    assert weight.data_ptr() == module[0].weight.data_ptr()


def test_training_flags_are_restored_after_a_failure():
    module = nn.Sequential(nn.Linear(3, 2), Call(lambda x: torch.linalg.inv(x[:2]))).train()
    with pytest.raises(CaptureError):
        from_torch(module, torch.randn(2, 3))
    assert all(m.training for m in module.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floating_types(dtype):
    module = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)
    x = torch.randn(2, 3).to(dtype)
    network = from_torch(module, x)
    assert network.dtype == dtype and network(x).dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(network(x), module(x), rtol=tolerance, atol=tolerance)
    assert network.gradient(of=0)(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("module", [nn.ReLU(), nn.Softmax(-1), nn.Flatten(), nn.MaxPool2d(2)])
def test_modules_without_weights_compute_in_the_examples_type(module, dtype):
    x = torch.randn(1, 1, 4, 4, dtype=dtype)
    network = from_torch(module, x)
    assert network.dtype == dtype
    torch.testing.assert_close(network(x), module(x))
    other = network.to(torch.float64)
    assert other.dtype == torch.float64 and other.gradient(of=0).dtype == torch.float64


def test_a_gradient_without_weights_keeps_its_type():
    network = from_torch(nn.Linear(2, 2).double(), torch.randn(2, dtype=torch.float64))
    constant = network.gradient(of=0).gradient(of=0)
    assert constant.dtype == torch.float64
    assert constant(torch.ones(2, dtype=torch.float64)).tolist() == [0.0, 0.0]


# -- what is refused


def test_control_flow_on_data_is_refused():
    def branch(x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x

    with pytest.raises(DynamicModel, match="depend on the data"):
        from_torch(Call(branch), torch.randn(3))


def test_shapes_that_depend_on_data_are_refused():
    with pytest.raises(CaptureError):
        from_torch(Call(lambda x: x[x > 0]), torch.randn(3))


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_an_unsupported_operation_is_named_with_its_place():
    module = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"odd": Inner()})["odd"])
    with pytest.raises(UnsupportedOp) as refused:
        from_torch(module, torch.randn(3))
    line = Inner.forward.__code__.co_firstlineno + 1
    assert "bessel_j0" in str(refused.value) and f"1 (test_from_torch.py:{line})" in str(refused.value)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.to(torch.int64).to(x.dtype),
        lambda x: torch.div(x, 2.0, rounding_mode="floor"),
        lambda x: x.masked_fill(torch.tensor([True, False, True]), torch.inf),
        lambda x: x**x,
        lambda x: x + torch.tensor([torch.inf, 0.0, 0.0]),
        lambda x: F.batch_norm(x[None].T, None, None, training=True),
        lambda x: x.norm(3),
        lambda x: (x[:, None] * x).masked_fill(torch.ones(3, 3).triu(1) > 0, -torch.inf).relu(),
        lambda x: (x[:, None] * x).masked_fill(torch.ones(3, 3).triu(1) > 0, -torch.inf),
    ],
)
def test_forms_without_a_rule_are_refused(function):
    with pytest.raises(UnsupportedOp):
        from_torch(Call(function), torch.rand(3))


def test_mixed_floating_types_are_refused():
    module = Call(lambda x, w: x.double() * w, w=torch.ones(3, dtype=torch.float64))
    module.register_buffer("odd", torch.ones(2))
    with pytest.raises(InvalidInput, match="floating types"):
        from_torch(module, torch.randn(2, 3))
    with pytest.raises(InvalidInput, match="float64"):
        from_torch(nn.Linear(3, 2), torch.randn(3, dtype=torch.float64), check=False)


@pytest.mark.parametrize("example", [None, (), [1.0], "x"])
def test_examples_that_are_no_tensors_are_refused(example):
    with pytest.raises(InvalidInput):
        from_torch(nn.ReLU(), example)


def test_something_that_is_no_module_is_refused():
    with pytest.raises(InvalidInput):
        from_torch(torch.relu, torch.ones(2))  # type: ignore[arg-type]


WRONG = {
    "relu": lambda leaf, x: x,
    "linear": lambda leaf, x, w, b=None: aten.RULES["matmul"](leaf, x, aten.RULES["t"](leaf, w)),
    "tanh": lambda leaf, x: aten.RULES["sin"](leaf, x),
    "softmax": lambda leaf, x, dim, *_: aten.RULES["sigmoid"](leaf, x),
}


@pytest.mark.parametrize("name", ["relu", "linear", "tanh", "softmax"])
def test_a_wrong_rule_is_refused(name, monkeypatch):
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Tanh(), nn.Softmax(-1))
    monkeypatch.setitem(aten.RULES, name, WRONG[name])
    with pytest.raises(CaptureMismatch, match="differ"):
        from_torch(module, torch.randn(2, 3))


def test_a_rule_with_the_right_value_and_a_wrong_gradient_is_refused(monkeypatch):
    """`detach` passes the value on but no gradient; read as the identity, only the gradient shows the mistake."""
    monkeypatch.setitem(aten.RULES, "detach", lambda leaf, x: x)
    monkeypatch.setitem(aten.RULES, "detach_", lambda leaf, x: x)
    with pytest.raises(CaptureMismatch, match="gradient"):
        from_torch(Call(lambda x: x * x.detach()), torch.randn(8))


def test_a_wrong_shape_is_refused(monkeypatch):
    monkeypatch.setitem(aten.RULES, "flatten", lambda leaf, x, *_: x)
    with pytest.raises(CaptureMismatch, match="shape"):
        from_torch(nn.Flatten(), torch.randn(2, 3, 4))


def test_networks_refuse_other_shapes_and_types():
    network = from_torch(nn.Linear(3, 2), torch.randn(1, 3))
    with pytest.raises(InvalidInput, match="vmap"):
        network(torch.randn(2, 3))
    with pytest.raises(InvalidInput, match="float64"):
        network(torch.randn(1, 3, dtype=torch.float64))
    with pytest.raises(InvalidInput, match="takes 1"):
        network(torch.randn(1, 3), torch.randn(1, 3))
    with pytest.raises(InvalidInput, match="Near"):
        network.at("nowhere")
    assert isinstance(network.input.op, Input)


class Rescaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([1.0, 2.0, 3.0]).to(x)


class Overwriting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return x * x


@pytest.mark.parametrize("module", [Rescaled(), Overwriting()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constants_of_another_type_and_overwritten_inputs(module, dtype):
    x = torch.randn(3, dtype=dtype)
    kept = x.clone()
    network = from_torch(module, x)
    assert torch.equal(x, kept)
    assert torch.allclose(network(x), module(kept.clone()), rtol=1e-6)
