"""Samples of every operation: attributes, input shapes, and an independent reference for the value.

`CASES` covers every operation class, `FUNCTIONS` every elementwise function. test_every_op.py checks all of them and
refuses an operation that has no sample here, so adding an operation adds its tests. References are plain loops or
textbook formulas, never the kernels that the operations call.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from soundly.graph import elementwise as ew
from soundly.graph.composite import Maximum, MaxPool, Normalise, Rounding, Softmax
from soundly.graph.elementwise import Elementwise
from soundly.graph.linear import Combine, Concat, Embed, Expand, Gather, Permute, Reshape, ScatterAdd, Slice, Sum
from soundly.graph.node import Op, Shape
from soundly.graph.product import Conv, ConvKernel, ConvTranspose, Dense, MatMul, Multiply


@dataclass(frozen=True)
class Case:
    """One operation with fixed attributes, its input shapes, and what it should compute.

    Attributes:
        domain: where random inputs are drawn from.
        masks: slots that hold a constant of zeros and ones.
    """

    op: Op
    shapes: tuple[Shape, ...]
    reference: Callable[..., Tensor]
    domain: tuple[float, float] = (-2.0, 2.0)
    masks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} {list(map(list, self.shapes))}".replace("(", "[").replace(")", "]")

    def draw(self, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Random inputs."""
        low, high = self.domain
        values = []
        for slot, shape in enumerate(self.shapes):
            unit = torch.rand(shape, generator=generator, dtype=torch.float64)
            values.append((unit > 0.4).to(dtype) if slot in self.masks else (low + (high - low) * unit).to(dtype))
        return values


def windows(
    x: Tensor, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape, fill: float, ceil: bool = False
) -> Tensor:
    """All windows [N, C, *out, *kernel] of x, by plain loops. With `ceil` also a last one that begins inside x."""
    n = len(kernel)
    counts = []
    for i in range(n):
        starts, at = [], -padding[i]
        span = dilation[i] * (kernel[i] - 1)
        while True:
            fits = at + span < x.shape[2 + i] + padding[i]
            previous = at - stride[i] + span < x.shape[2 + i] + padding[i] - 1
            if not (fits or (ceil and previous and at < x.shape[2 + i])):
                break
            starts.append(at)
            at += stride[i]
        counts.append(starts)
    outside = torch.full(x.shape[:2], fill, dtype=x.dtype)
    entries = []
    for start in itertools.product(*counts):
        for tap in itertools.product(*(range(k) for k in kernel)):
            at = tuple(s + d * t for s, d, t in zip(start, dilation, tap, strict=True))
            inside = all(0 <= a < size for a, size in zip(at, x.shape[2:], strict=True))
            entries.append(x[(slice(None), slice(None), *at)] if inside else outside)
    return torch.stack(entries, -1).reshape(*x.shape[:2], *map(len, counts), *kernel)


def convolution(x: Tensor, w: Tensor, op: Conv | ConvTranspose | ConvKernel) -> Tensor:
    """The cross-correlation of x with w, group by group, from its windows."""
    n = len(op.stride)
    taken = windows(x, tuple(w.shape[2:]), op.stride, op.padding, op.dilation, 0.0)
    out = taken.shape[2 : 2 + n]
    per_group = taken.reshape(x.shape[0], op.groups, w.shape[1], math.prod(out), -1)
    kernels = w.reshape(op.groups, w.shape[0] // op.groups, w.shape[1], -1)
    return torch.einsum("ngcpk,gock->ngop", per_group, kernels).reshape(x.shape[0], w.shape[0], *out)


def _transposed(op: ConvTranspose) -> Callable[..., Tensor]:
    """The adjoint in x of the plain-loop convolution."""

    def reference(y: Tensor, w: Tensor) -> Tensor:
        x = torch.zeros(y.shape[0], w.shape[1] * op.groups, *op.size, dtype=y.dtype)
        return torch.func.vjp(lambda x: convolution(x, w, op), x)[1](y)[0]

    return reference


def _kernel(op: ConvKernel) -> Callable[..., Tensor]:
    """The adjoint in w of the plain-loop convolution."""

    def reference(x: Tensor, y: Tensor) -> Tensor:
        w = torch.zeros(y.shape[1], x.shape[1] // op.groups, *op.kernel, dtype=x.dtype)
        return torch.func.vjp(lambda w: convolution(x, w, op), w)[1](y)[0]

    return reference


def _convolutions() -> list[Case]:
    """The three faces of each trilinear form <y, x * w>."""
    cases = []
    for x, w, stride, padding, dilation, groups in [
        ((2, 2, 7), (3, 2, 3), (2,), (1,), (1,), 1),
        ((1, 2, 8), (4, 1, 2), (3,), (0,), (2,), 2),
        ((2, 3, 5, 4), (2, 3, 3, 2), (1, 1), (0, 0), (1, 1), 1),
        ((1, 2, 6, 5), (2, 2, 3, 3), (2, 3), (1, 2), (1, 2), 1),
        ((1, 4, 4, 4), (4, 1, 3, 3), (1, 1), (1, 1), (1, 1), 4),
        ((1, 4, 5, 5), (6, 2, 1, 1), (2, 2), (0, 0), (1, 1), 2),
        ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1), 1),
        ((1, 2, 3, 4, 3), (2, 1, 2, 2, 1), (1, 2, 1), (1, 0, 0), (1, 1, 1), 2),
    ]:
        face = (stride, padding, dilation, groups)
        conv = Conv(*face)
        y = conv.shape(x, w)
        transposed, kernel = ConvTranspose(*face, x[2:]), ConvKernel(*face, w[2:])
        cases += [
            Case(conv, (x, w), lambda x, w, op=conv: convolution(x, w, op)),
            Case(transposed, (y, w), _transposed(transposed)),
            Case(kernel, (x, y), _kernel(kernel)),
        ]
    return cases


def _pooled(op: MaxPool) -> Callable[..., Tensor]:
    n = len(op.kernel)

    def reference(x: Tensor) -> Tensor:
        return windows(x, op.kernel, op.stride, op.padding, op.dilation, -math.inf, op.ceil).flatten(-n).amax(-1)

    return reference


def _embedded(x: Tensor, starts: Shape, steps: Shape, dims: Shape) -> Tensor:
    result = torch.zeros(dims, dtype=x.dtype)
    for at in itertools.product(*(range(n) for n in x.shape)):
        result[tuple(a + s * i for a, s, i in zip(starts, steps, at, strict=True))] = x[at]
    return result


def _masked_softmax(x: Tensor, mask: Tensor, axis: int) -> Tensor:
    powers = torch.exp(x) * mask
    return torch.where(mask > 0, powers / powers.sum(axis, keepdim=True), torch.zeros_like(x))


def _normalised(x: Tensor, axes: tuple[int, ...], eps: float, centred: bool) -> Tensor:
    if centred:
        return (x - x.mean(axes, keepdim=True)) / torch.sqrt(x.var(axes, correction=0, keepdim=True) + eps)
    return x / torch.sqrt(x.pow(2).mean(axes, keepdim=True) + eps)


_POOLS = [
    (MaxPool((2,), (2,), (0,), (1,)), (2, 2, 6)),
    (MaxPool((3,), (2,), (1,), (1,), True), (1, 2, 6)),
    (MaxPool((2, 2), (2, 2), (0, 0), (1, 1)), (1, 2, 4, 4)),
    (MaxPool((3, 2), (2, 1), (1, 1), (1, 2)), (1, 2, 5, 5)),
    (MaxPool((3, 3), (2, 2), (1, 1), (2, 2), True), (1, 1, 7, 8)),
    (MaxPool((2, 3), (3, 3), (0, 1), (1, 1), True), (1, 1, 6, 7)),
    (MaxPool((2, 2, 1), (1, 2, 1), (0, 1, 0), (1, 1, 1)), (1, 1, 3, 3, 2)),
]

CASES: tuple[Case, ...] = (
    Case(Combine((1.0,)), ((3,),), lambda a: a),
    Case(Combine((-1.0,)), ((2, 3),), lambda a: -a),
    Case(Combine((0.3,)), ((2, 3),), lambda a: 0.3 * a),
    Case(Combine((1.0, 1.0)), ((2, 3),) * 2, lambda a, b: a + b),
    Case(Combine((1.0, -1.0)), ((4,),) * 2, lambda a, b: a - b),
    Case(Combine((0.1, -2.5, 1.0)), ((2, 2),) * 3, lambda a, b, c: 0.1 * a - 2.5 * b + c),
    Case(Combine((-1.0, 0.0)), ((),) * 2, lambda a, b: -a + 0 * b),
    Case(Sum((1,)), ((2, 3, 2),), lambda a: torch.einsum("ijk->ik", a)[:, None]),
    Case(Sum((0, 2)), ((2, 3, 2),), lambda a: torch.einsum("ijk->j", a)[None, :, None]),
    Case(Sum(()), ((2, 2),), lambda a: a),
    Case(Sum((0,)), ((40,),), lambda a: sum(a).reshape(1)),
    Case(Expand((2, 3, 4)), ((2, 1, 4),), lambda a: a.repeat(1, 3, 1)),
    Case(Expand((3, 2)), ((1, 1),), lambda a: a * torch.ones(3, 2, dtype=a.dtype)),
    Case(Reshape((3, 4)), ((2, 6),), lambda a: torch.stack([a.flatten()[4 * i : 4 * i + 4] for i in range(3)])),
    Case(Reshape(()), ((1, 1),), lambda a: a[0, 0]),
    Case(Permute((2, 0, 1)), ((2, 3, 4),), lambda a: torch.einsum("ijk->kij", a)),
    Case(Permute(()), ((),), lambda a: a),
    Case(Slice((1, 0), (2, 3), (2, 1)), ((5, 3),), lambda a: torch.stack([a[1], a[3]])),
    Case(Slice((0, 2), (2, 0), (1, 1)), ((2, 3),), lambda a: a[:, :0]),
    Case(Embed((1, 2), (1, 1), (4, 6)), ((2, 3),), lambda a: _embedded(a, (1, 2), (1, 1), (4, 6))),
    Case(Embed((0, 1), (3, 2), (5, 6)), ((2, 3),), lambda a: _embedded(a, (0, 1), (3, 2), (5, 6))),
    Case(Concat(1), ((2, 1), (2, 3), (2, 2)), lambda a, b, c: torch.hstack([a, b, c])),
    Case(Concat(0), ((2,), (1,)), lambda a, b: torch.stack([a[0], a[1], b[0]])),
    Case(Gather(1, (2, 0, 2)), ((2, 3),), lambda a: torch.stack([a[:, 2], a[:, 0], a[:, 2]], 1)),
    Case(ScatterAdd(0, (2, 0, 2), 4), ((3, 2),), lambda a: torch.stack([a[1], 0 * a[0], a[0] + a[2], 0 * a[0]])),
    Case(Multiply(), ((2, 3),) * 2, lambda a, b: torch.einsum("ij,ij->ij", a, b)),
    Case(Multiply(), ((),) * 2, lambda a, b: a * b),
    Case(MatMul(), ((2, 3), (3, 4)), lambda a, b: torch.einsum("ij,jk->ik", a, b)),
    Case(MatMul(), ((2, 1, 3), (2, 3, 2)), lambda a, b: torch.einsum("bij,bjk->bik", a, b)),
    Case(MatMul(), ((2, 30), (30, 1)), lambda a, b: torch.einsum("ij,jk->ik", a, b)),
    Case(Dense(), ((4,), (3, 4)), lambda x, w: torch.einsum("i,oi->o", x, w)),
    Case(Dense(), ((2, 2, 4), (3, 4)), lambda x, w: torch.einsum("abi,oi->abo", x, w)),
    Case(Dense(), ((2, 1), (3, 1)), lambda x, w: torch.einsum("ai,oi->ao", x, w)),
    *_convolutions(),
    Case(Maximum(), ((2, 3),) * 2, lambda a, b: torch.stack([a, b]).amax(0)),
    *(Case(op, (shape,), _pooled(op)) for op, shape in _POOLS),
    Case(Softmax(1), ((2, 4),), lambda a: torch.exp(a) / torch.exp(a).sum(1, keepdim=True)),
    Case(Softmax(0), ((3, 2, 2),), lambda a: torch.exp(a) / torch.exp(a).sum(0, keepdim=True)),
    Case(Softmax(2), ((1, 3, 4),) * 2, lambda a, m: _masked_softmax(a, m, 2), masks=(1,)),
    Case(Normalise((1,), 1e-5), ((3, 5),), lambda a: _normalised(a, (1,), 1e-5, True)),
    Case(Normalise((0, 2), 0.1), ((2, 3, 2),), lambda a: _normalised(a, (0, 2), 0.1, True)),
    Case(Normalise((1,), 1e-6, False), ((2, 4),), lambda a: _normalised(a, (1,), 1e-6, False)),
    *(
        Case(Rounding(kind), ((2, 4),), lambda a, by=by: torch.tensor(by(a.tolist()), dtype=a.dtype))
        for kind, by in [
            ("floor", lambda rows: [[math.floor(v) for v in row] for row in rows]),
            ("ceil", lambda rows: [[math.ceil(v) for v in row] for row in rows]),
            ("trunc", lambda rows: [[math.trunc(v) for v in row] for row in rows]),
            ("round", lambda rows: [[round(v) for v in row] for row in rows]),
        ]
    ),
)


@dataclass(frozen=True)
class Function:
    """An elementwise function, a formula for it that autograd can differentiate any number of times, and its domain."""

    op: Elementwise
    formula: Callable[[Tensor], Tensor]
    domain: tuple[float, float] = (-8.0, 8.0)
    pole: float | None = None

    def __str__(self) -> str:
        return self.op.name.replace("(", "[").replace(")", "]")

    @property
    def case(self) -> Case:
        return Case(self.op, ((2, 3),), self.formula, self.domain)


def _pieces(*parts: tuple[float, Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """Given (end, function) by increasing end: each function up to and including its end."""

    def formula(x: Tensor) -> Tensor:
        result = parts[-1][1](x)
        for end, part in reversed(parts[:-1]):
            result = torch.where(x <= end, part(x), result)
        return result

    return formula


def _number(c: float) -> Callable[[Tensor], Tensor]:
    return lambda x: 0 * x + c


def _softplus(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0 * x) + torch.log1p(torch.exp(-x.abs()))


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _elu(alpha: float, scale: float, rate: float) -> Callable[[Tensor], Tensor]:
    return _pieces((0.0, lambda x: scale * alpha * torch.expm1(rate * x)), (math.inf, lambda x: scale * x))


POSITIVE = (1e-3, 8.0)
FUNCTIONS: tuple[Function, ...] = (
    Function(ew.RELU, _pieces((0.0, _number(0)), (math.inf, lambda x: x))),
    Function(ew.ABS, _pieces((0.0, lambda x: -x), (math.inf, lambda x: x))),
    Function(ew.STEP, _pieces((0.0, _number(0)), (math.inf, _number(1)))),
    Function(ew.SIGN, lambda x: torch.sign(x) + 0 * x),
    Function(ew.SQUARE, lambda x: x * x),
    Function(ew.HARDSIGMOID, _pieces((-3.0, _number(0)), (3.0, lambda x: (x + 3) / 6), (math.inf, _number(1)))),
    Function(ew.HARDSWISH, _pieces((-3.0, _number(0)), (3.0, lambda x: x * (x + 3) / 6), (math.inf, lambda x: x))),
    Function(ew.SIGMOID, _sigmoid),
    Function(ew.TANH, lambda x: 2 * _sigmoid(2 * x) - 1),
    Function(ew.SILU, lambda x: x * _sigmoid(x)),
    Function(ew.GELU, lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
    Function(ew.GELU_TANH, lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))),
    Function(ew.SOFTPLUS, _softplus),
    Function(ew.MISH, lambda x: x * torch.tanh(_softplus(x))),
    Function(ew.EXP, lambda x: torch.exp(x)),
    Function(ew.LOG, lambda x: torch.log(x), POSITIVE),
    Function(ew.SQRT, lambda x: torch.sqrt(x), POSITIVE),
    Function(ew.RSQRT, lambda x: 1 / torch.sqrt(x), POSITIVE),
    Function(ew.RECIPROCAL, lambda x: 1 / x, pole=0.0),
    Function(ew.SIN, lambda x: torch.sin(x)),
    Function(ew.COS, lambda x: torch.cos(x)),
    Function(ew.ERF, lambda x: torch.erf(x)),
    Function(ew.ATAN, lambda x: torch.atan(x)),
    Function(ew.leaky_relu(0.01), _pieces((0.0, lambda x: 0.01 * x), (math.inf, lambda x: x))),
    Function(ew.leaky_relu(-0.5), _pieces((0.0, lambda x: -0.5 * x), (math.inf, lambda x: x))),
    Function(ew.clip(0.0, 6.0), _pieces((0.0, _number(0)), (6.0, lambda x: x), (math.inf, _number(6)))),
    Function(ew.clip(-0.3, 0.1), _pieces((-0.3, _number(-0.3)), (0.1, lambda x: x), (math.inf, _number(0.1)))),
    Function(ew.clip(-math.inf, 0.5), _pieces((0.5, lambda x: x), (math.inf, _number(0.5)))),
    Function(ew.clip(-1.5, math.inf), _pieces((-1.5, _number(-1.5)), (math.inf, lambda x: x))),
    Function(ew.power(0), lambda x: 0 * x + 1),
    Function(ew.power(3), lambda x: x * x * x),
    Function(ew.power(4), lambda x: (x * x) ** 2),
    Function(ew.power(-2), lambda x: 1 / (x * x), pole=0.0),
    Function(ew.power(-3), lambda x: 1 / (x * x * x), pole=0.0),
    Function(ew.power(1.5), lambda x: x * torch.sqrt(x), POSITIVE),
    Function(ew.power(-0.25), lambda x: 1 / torch.sqrt(torch.sqrt(x)), POSITIVE),
    Function(ew.elu(1.0), _elu(1.0, 1.0, 1.0)),
    Function(ew.elu(1.6732632423543772, 1.0507009873554805), _elu(1.6732632423543772, 1.0507009873554805, 1.0)),
    Function(ew.elu(0.7, 1.0, 1 / 0.7), _elu(0.7, 1.0, 1 / 0.7)),
)
