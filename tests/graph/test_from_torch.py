"""Captured modules compute what the modules compute: every ATen rule, and every way in which a capture may fail.

`from_torch` compares each capture with its module itself; these tests compare again with that check switched off, so
that neither can hide the other's gaps.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundly.errors import CaptureError, CaptureMismatch, DynamicModel, InvalidInput, UnsupportedOp
from soundly.graph import aten
from soundly.graph.from_torch import from_torch
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
        assert bool(((g - w).abs() <= tolerance * (1 + w.abs())).all()), f"largest error {float((g - w).abs().max())}"
    seeds = [torch.randn_like(w) for w in want]
    slopes = torch.autograd.grad(sum((w * s).sum() for w, s in zip(want, seeds, strict=True)), floats, allow_unused=True)
    ours = torch.autograd.grad(sum((g * s).sum() for g, s in zip(got, seeds, strict=True)), floats, allow_unused=True)
    for g, w in zip(ours, slopes, strict=True):
        zero = torch.zeros(())
        assert bool(((zero if g is None else g) - (zero if w is None else w)).abs().max() <= 1e-8)
    from_torch(module, examples)  # and the built-in check agrees
    return network


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)), dtype=torch.float64)


def case(name: str, function: Callable[..., Any], *shapes: tuple[int, ...], positive: bool = False) -> Any:
    """A function of the sampled tensors; the first is an input, so are the others."""
    examples = [rand(*s) for s in shapes]
    return pytest.param(function, [e.abs() + 0.5 if positive else e for e in examples], id=name)


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
    case("index bool", lambda x: x[torch.tensor([True, False, True])], (3, 4)),
    case("index_select", lambda x: x.index_select(1, torch.tensor([1, 1, 0])), (3, 4)),
    case("gather", lambda x: x.gather(1, torch.tensor([[0, 2], [1, 1]])), (2, 3)),
    case("tril", lambda x: x.tril() + x.triu(1) * 2, (3, 3)),
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
    case("norm", lambda x: x.norm(dim=1) + torch.linalg.vector_norm(x), (2, 3)),
    case("normalize", lambda x: F.normalize(x, dim=1), (2, 3)),
    case("cosine", lambda x, y: F.cosine_similarity(x, y), (2, 3), (2, 3)),
    case("cumsum", lambda x: x.cumsum(1), (2, 4)),
    case("softmax", lambda x: x.softmax(1) + F.softmax(x, 0), (2, 3)),
    case("log softmax", lambda x: x.log_softmax(1), (2, 3)),
    case("log softmax of large scores", lambda x: (300 * x).log_softmax(1), (2, 3)),
    case("logsumexp", lambda x: x.logsumexp(1) + torch.logsumexp(x, (0, 1), keepdim=True), (2, 3)),
    case("prod", lambda x: x.prod(1), (2, 3)),
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
    case("bilinear", lambda x, y: F.bilinear(x, y, rand(2, 3, 4).to(x.dtype)), (2, 3), (2, 4)),
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
    case(
        "attention longer keys", lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), (1, 3, 2), (1, 5, 2)
    ),
    case("attention by hand", lambda x: (x @ x.mT / 2 + LATE.to(x.dtype)).softmax(-1) @ x, (2, 4, 3)),
    case(
        "attention by hand, filled",
        lambda x: (x @ x.mT).masked_fill(LATE < 0, -torch.inf).softmax(-1) @ x,
        (2, 4, 3),
    ),
    # resampling
    case("nearest", lambda x: F.interpolate(x, scale_factor=2), (1, 2, 3, 2)),
    case("nearest size", lambda x: F.interpolate(x, size=(5, 3)), (1, 2, 3, 4)),
    case("nearest fraction", lambda x: F.interpolate(x, scale_factor=1.7), (1, 2, 5)),
    case("nearest 3d", lambda x: F.interpolate(x, scale_factor=(1, 2, 3)), (1, 1, 2, 2, 2)),
    case("bilinear", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (1, 2, 3, 2)),
    case("bilinear aligned", lambda x: F.interpolate(x, size=(5, 7), mode="bilinear", align_corners=True), (1, 2, 3, 4)),
    case("bilinear fraction", lambda x: F.interpolate(x, scale_factor=(1.6, 0.7), mode="bilinear"), (1, 2, 5, 6)),
    case("bilinear shrink", lambda x: F.interpolate(x, size=(2, 1), mode="bilinear", align_corners=True), (1, 1, 5, 4)),
    case("linear", lambda x: F.interpolate(x, size=7, mode="linear"), (1, 2, 4)),
    case("trilinear", lambda x: F.interpolate(x, size=(3, 4, 2), mode="trilinear"), (1, 1, 2, 3, 2)),
    case("recomputed factors", lambda x: F.interpolate(x, scale_factor=1.6, recompute_scale_factor=True), (1, 1, 5, 4)),
    # functions
    *(
        case(name, getattr(F, name, None) or getattr(torch, name), (3, 5))
        for name in (
            "relu sigmoid tanh gelu silu mish softplus hardswish hardsigmoid hardtanh relu6 elu celu selu leaky_relu abs "
            "sign exp sin cos erf atan logsigmoid softsign tanhshrink expm1 hardshrink softshrink square"
        ).split()
    ),
    case("log log1p log2", lambda x: torch.log(x) + torch.log1p(x) + torch.log2(x) + torch.log10(x), (3,), positive=True),
    case("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), (3, 5)),
    case("softplus beta", lambda x: F.softplus(x, beta=2.0), (3, 5)),
    case("elu celu alpha", lambda x: F.elu(x, 0.3) + F.celu(x, 0.7), (3, 5)),
    case("leaky slope hardtanh", lambda x: F.leaky_relu(x, 0.3) + F.hardtanh(x, -0.2, 0.4), (3, 5)),
    case("threshold", lambda x: F.threshold(x, 0.2, -3.0), (3, 5)),
    case("glu", lambda x: F.glu(x, 1), (3, 4)),
    case("dropout in evaluation", lambda x: F.dropout(x, 0.5, training=False), (3,)),
    case("rms norm", lambda x: F.rms_norm(x, (3,)), (2, 3)),
]


@pytest.mark.parametrize("function, examples", FUNCTIONS)
def test_functions(function, examples):
    agree(Call(function), *examples)


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
    for name, value in norm.named_buffers():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 2.0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


MODULES = [
    module("linear", lambda: nn.Linear(3, 2), 2, 4, 3),
    module("linear without bias", lambda: nn.Linear(3, 2, bias=False), 3),
    module("bilinear of two", lambda: Call(lambda x, w: F.bilinear(x, x, w), w=rand(2, 3, 3)), 2, 3),
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
    module(
        "average pool ceil without padding",
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        1, 2, 6, 8,
    ),  # fmt: skip
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
    module("batch norm plain", lambda: statistics(nn.BatchNorm2d(3, affine=False)), 2, 3, 2, 2),
    module("layer norm", lambda: statistics(nn.LayerNorm((3, 2), eps=0.01)), 2, 3, 2),
    module("layer norm plain", lambda: nn.LayerNorm(4, elementwise_affine=False), 2, 4),
    module("rms norm", lambda: statistics(nn.RMSNorm(4)), 2, 4),
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
    module("pads", lambda: nn.Sequential(nn.ZeroPad2d(1), nn.ConstantPad2d((1, 0, 0, 2), 2.5), nn.ReflectionPad2d(1)), 1, 1, 2, 2),
    module("replication pads", lambda: nn.Sequential(nn.ReplicationPad2d((1, 0, 2, 1)), nn.CircularPad2d(1)), 1, 1, 2, 3),
    module("upsamplers", lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.UpsamplingBilinear2d(scale_factor=2)), 1, 1, 2, 3),
    module("dropouts", lambda: nn.Sequential(nn.Dropout(), nn.Linear(3, 3), nn.AlphaDropout(), nn.Dropout1d()), 2, 3),
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
    module("lstm cell", lambda: Call(nn.LSTMCell(3, 2)), 2, 3),
    module("gru cell", lambda: nn.GRUCell(3, 2), 2, 3),
    module("weight norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), 2, 3),
    module("cosine", lambda: Call(nn.CosineSimilarity(dim=1)._wrapped_call if False else (lambda x: F.cosine_similarity(x, x.flip(0)))), 2, 3),
]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("make, shape", MODULES)
def test_modules(make, shape):
    torch.manual_seed(0)
    agree(make(), rand(*shape))
