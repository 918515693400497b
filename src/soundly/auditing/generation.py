"""Random recipes: valid graphs of 1 to 12 operations, with any attributes, shapes and broadcasting that torch accepts.

Nothing here knows which arguments fit: a call is drawn freely and kept if torch runs it and its values are finite, so
validity and output shapes are learned by probing, not written down. Weights that are zero, boxes that are points and
attributes at their limits are drawn more often than chance would.

Reference: Liu et al., "NeuRI: Diversifying DNN Generation via Inductive Rule Inference", ESEC/FSE 2023 (probing
operators for what they accept; here every probe is made anew and no rule is kept).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from soundly.auditing.recipes import Argument, Call, Recipe

LARGEST, ENTRIES, OPERATIONS = 1e4, 48, 12
"""The largest magnitude of a value, the most entries it may have, and the most operations of a graph."""
TRIES = 40
"""How many calls are drawn before a graph is left at the size it has."""

Shapes = Sequence[tuple[int, ...]]
Drawn = tuple[str, list[Argument]]


def recipe(seed: int) -> Recipe:
    """The recipe of a seed: always the same."""
    r = random.Random(seed)
    inputs = [_shape(r) for _ in range(1 if r.random() < 0.85 else 2)]
    lower, upper = zip(*(_box(r, shape) for shape in inputs), strict=True)
    points = [[low + (high - low) * t for low, high in zip(lower, upper, strict=True)] for t in (0.5, 0.0, 1.0, 0.3)]
    calls: list[Call] = []
    values = [list(point) for point in points]  # at each probe, those of all calls so far
    wanted = r.randint(1, OPERATIONS)
    for _ in range(TRIES):
        if len(calls) >= wanted:
            break
        drawn = _drawn(r, [tuple(v.shape) for v in values[0]])
        found = _probed(drawn, values)
        if found is None:
            continue
        calls += drawn
        for known, new in zip(values, found, strict=True):
            known += new
    if not calls:
        return recipe(seed + 10**9)
    flat = [tuple(v.tolist() for v in side) for side in (lower, upper)]
    size = values[0][-1].numel()
    of = r.randrange(size) if r.random() < 0.2 and values[0][-1].dtype.is_floating_point else None
    return Recipe(flat[0], flat[1], tuple(calls), of, f"seed {seed}")


def _shape(r: random.Random) -> tuple[int, ...]:
    rank = r.choice([1, 2, 2, 3, 4, 4])
    shape = [r.choice([1, 2, 3, 4]) for _ in range(rank)]
    if rank == 4:
        shape = [1, r.choice([1, 2, 4]), r.choice([2, 3, 4]), r.choice([2, 3, 4])]
    while math.prod(shape) > 24:
        shape[shape.index(max(shape))] -= 1
    return tuple(shape)


def _box(r: random.Random, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(r.getrandbits(40))
    centre = torch.randn(shape, generator=generator, dtype=torch.float64) * r.choice([0.0, 0.5, 1.0])
    size = r.choice([0.0, 1e-3, 0.1, 0.3, 1.0, 1.0, 2.0])
    radius = torch.full(shape, size, dtype=torch.float64)
    if r.random() < 0.4:
        radius = radius * (torch.rand(shape, generator=generator) < 0.6)
    if r.random() < 0.3:
        centre, radius = torch.round(centre * 4) / 4, torch.round(radius * 4) / 4  # ends on kinks
    return centre - radius, centre + radius


def _probed(drawn: Sequence[Call], values: Sequence[Sequence[Tensor]]) -> list[list[Tensor]] | None:
    """The calls' values at each probe, or None if torch refuses one of them or a value is unfit."""
    found = []
    for known in values:
        some = list(known)
        for call in drawn:
            if any(not some[k].dtype.is_floating_point for k in call.sources[call.op == "where" :]):
                return None  # a comparison may choose, and nothing else
            try:
                (*_, value) = Recipe((), (), (call,)).run(some)
            except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
                return None  # torch alone says what a valid call is, in all these ways
            fit = isinstance(value, Tensor) and 0 < value.numel() <= ENTRIES and value.dim() <= 5
            if not fit or not bool(torch.isfinite(value).all()) or float(value.double().abs().max()) > LARGEST:
                return None
            some.append(value)
        if not some[-1].dtype.is_floating_point:
            return None
        found.append(some[len(known) :])
    return found


# -- drawing a call


def _drawn(r: random.Random, shapes: Shapes) -> list[Call]:
    """One call, or a few that belong together, of arguments that may or may not fit."""
    kind = r.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    # Later values are read more often, so that graphs grow deep and not only wide.
    index = max(r.randrange(len(shapes)), r.randrange(len(shapes)))
    return [Call(op, tuple(arguments)) for op, arguments in KINDS[kind][1](r, index, shapes)]


def _weight(r: random.Random, shape: Sequence[int]) -> Argument:
    """Random numbers, some of them zero, seldom all of one sign."""
    generator = torch.Generator().manual_seed(r.getrandbits(40))
    value = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) / math.sqrt(max(1, shape[-1]))
    if r.random() < 0.3:
        value = value * (torch.rand(tuple(shape), generator=generator) < 0.6)
    if r.random() < 0.1:
        value = value.abs()
    return {"weight": (torch.round(value * 256) / 256).tolist()}


def _number(r: random.Random) -> float:
    return r.choice([0.0, 1.0, -1.0, 0.5, 2.0, -0.25, round(r.gauss(0, 1), 3)])


def _whole(r: random.Random, n: int) -> int:
    """A number from -n - 1 to n: an axis, a position; sometimes one too far."""
    return r.randint(-n - 1, n)


def _operand(r: random.Random, index: int, shapes: Shapes) -> Argument:
    """A number, a weight or another value, which may broadcast."""
    shape = shapes[index]
    if r.random() < 0.15:
        return _number(r)
    if r.random() < 0.4:
        kept = shape[r.randint(0, len(shape)) :]
        return _weight(r, [n if r.random() < 0.7 else 1 for n in kept] or [1])
    return {"value": r.randrange(len(shapes))}


EACH = (
    "relu abs sigmoid tanh silu softplus mish elu selu celu hardtanh hardswish hardsigmoid relu6 exp sin cos erf atan "
    "square neg sign log sqrt rsqrt reciprocal expm1 log_sigmoid leaky_relu"
).split()


def _each(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    name = r.choice(["relu", "relu", "relu", *EACH])
    extra: list[Argument] = []
    if name == "leaky_relu":
        extra = [r.choice([0.01, 0.2, 0.0])]
    elif name in ("elu", "celu"):
        extra = [r.choice([1.0, 0.5, 2.0])]
    elif name == "softplus":
        extra = [r.choice([1.0, 2.0])]
    elif name == "hardtanh":
        extra = [-r.random(), r.random()]
    return [(name, [{"value": i}, *extra])]


def _gelu(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    return [("gelu", [{"value": i}])]


def _clamped(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    low, high = sorted((_number(r), _number(r)))
    return [("clamp", [{"value": i}, r.choice([None, low]), high if low < high else None])]


def _powered(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    return [("pow", [{"value": i}, r.choice([2, 3, 4, 2.0, 0.5, -1, -2, 1.5])])]


def _rooted(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    """A root, logarithm or quotient of what is positive."""
    n = len(shapes)
    name = r.choice(["sqrt", "log", "reciprocal", "rsqrt"])
    begin = r.choice(["square", "abs", "exp", "softplus"])
    return [(begin, [{"value": i}]), ("add", [{"value": n}, r.choice([0.1, 0.5, 1.0])]), (name, [{"value": n + 1}])]


def _two(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    name = r.choice(["add", "sub", "mul", "mul", "div", "maximum", "minimum"])
    other = _operand(r, i, shapes)
    if name in ("maximum", "minimum") and isinstance(other, float):
        other = _weight(r, [1])
    return [(name, [{"value": i}, other] if r.random() < 0.7 or isinstance(other, float) else [other, {"value": i}])]


def _chosen(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    condition = (r.choice(["gt", "lt", "ge", "le"]), [{"value": i}, _number(r)])
    return [condition, ("where", [{"value": len(shapes)}, {"value": i}, _operand(r, i, shapes)])]


def _linear(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    rows, n = r.randint(1, 6), shapes[i][-1] if shapes[i] else 1
    return [("linear", [{"value": i}, _weight(r, [rows, n]), r.choice([None, _weight(r, [rows])])])]


def _matmul(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    if r.random() < 0.4:
        other = _weight(r, [*shapes[i][:-2], shapes[i][-1] if shapes[i] else 1, r.randint(1, 3)])
        return [("matmul", [{"value": i}, other])]
    turned = ("transpose", [{"value": r.randrange(len(shapes))}, -1, -2])
    return [turned, ("matmul", [{"value": i}, {"value": len(shapes)}])]


def _conv(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    n = len(shapes[i]) - 2
    if n not in (1, 2):
        return _viewed(r, i, shapes, 4)
    channels, groups = shapes[i][1], r.choice([1, 1, 1, 2])
    out = groups * r.randint(1, 2)

    def each(*choices: int) -> list[int]:
        return [r.choice(choices) for _ in range(n)]

    kernel, stride, padding, dilation = each(1, 2, 3), each(1, 1, 2), each(0, 0, 1, 2), each(1, 1, 2)
    if r.random() < 0.3:
        weight, bias = (
            _weight(r, [channels, max(1, out // groups), *kernel]),
            _weight(r, [max(1, out // groups) * groups]),
        )
        extra = each(0, 0, 1)
        where = [{"value": i}, weight, bias, stride, padding, extra, groups, dilation]
        return [("conv_transpose1d" if n == 1 else "conv_transpose2d", where)]
    weight, bias = _weight(r, [out, max(1, channels // groups), *kernel]), r.choice([None, _weight(r, [out])])
    return [(f"conv{n}d", [{"value": i}, weight, bias, stride, padding, dilation, groups])]


def _pool(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    n = len(shapes[i]) - 2
    if n not in (1, 2):
        return _viewed(r, i, shapes, 4)
    kernel = [r.choice([1, 2, 2, 3]) for _ in range(n)]
    stride, padding = [r.choice([1, 2]) for _ in range(n)], [r.choice([0, 0, 1]) for _ in range(n)]
    ceil, x = r.random() < 0.3, {"value": i}
    match r.choice(["max", "average", "adaptive"]):
        case "max":
            return [(f"max_pool{n}d", [x, kernel, stride, padding, [r.choice([1, 1, 2])] * n, ceil])]
        case "average":
            return [(f"avg_pool{n}d", [x, kernel, stride, padding, ceil, r.random() < 0.5])]
    return [(f"adaptive_avg_pool{n}d", [x, [r.randint(1, 3) for _ in range(n)]])]


def _normal(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    shape, x, eps = shapes[i], {"value": i}, r.choice([1e-5, 0.1, 1.0])
    if len(shape) < 2:
        return _each(r, i, shapes)
    channels = shape[1]
    match r.choice(["layer", "batch", "group", "rms"]):
        case "layer":
            return [("layer_norm", [x, [shape[-1]], _weight(r, [shape[-1]]), _weight(r, [shape[-1]]), eps])]
        case "rms":
            return [("rms_norm", [x, [shape[-1]], _weight(r, [shape[-1]]), eps])]
        case "group":
            groups = r.choice([g for g in (1, 2, 4) if channels % g == 0])
            return [("group_norm", [x, groups, _weight(r, [channels]), _weight(r, [channels]), eps])]
    variance = {"weight": [abs(_number(r)) + 0.1 for _ in range(channels)]}
    numbers = [_weight(r, [channels]) for _ in range(3)]
    return [("batch_norm", [x, *numbers, variance, False, 0.1, eps, False])]


def _soft(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    name, axis = r.choice(["softmax", "softmax", "log_softmax", "logsumexp"]), _whole(r, len(shapes[i]))
    return [(name, [{"value": i}, [axis] if name == "logsumexp" else axis])]


def _reduced(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    name = r.choice(["sum", "mean", "amax", "amin", "cumsum", "linalg_vector_norm", "var"])
    axes, keep = sorted({_whole(r, len(shapes[i])) for _ in range(r.randint(1, 2))}), r.random() < 0.5
    x = {"value": i}
    if name == "cumsum":
        return [(name, [x, axes[0]])]
    if name == "linalg_vector_norm":
        return [(name, [x, r.choice([1, 2, math.inf]), axes, keep])]
    if name == "var":
        wide = [a for a, size in enumerate(shapes[i]) if size > 1]
        return [(name, [x, [r.choice(wide)], r.random() < 0.5, keep])] if wide else _each(r, i, shapes)
    return [(name, [x, axes, keep])]


def _viewed(r: random.Random, i: int, shapes: Shapes, rank: int | None = None) -> list[Drawn]:
    """The same entries under a random shape."""
    left, sizes = math.prod(shapes[i]), list[int]()
    for _ in range((rank or r.randint(1, 4)) - 1):
        sizes.append(r.choice([d for d in range(1, left + 1) if left % d == 0]))
        left //= sizes[-1]
    sizes.append(left)
    r.shuffle(sizes)
    if rank == 4:
        sizes.sort()
    return [("reshape", [{"value": i}, [-1 if r.random() < 0.1 and n != 0 else n for n in sizes[:1]] + sizes[1:]])]


def _moved(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    shape, x = shapes[i], {"value": i}
    rank = len(shape)
    axis = _whole(r, rank)
    size = shape[axis] if -rank <= axis < rank else 1
    order = list(range(rank))
    r.shuffle(order)
    choices: list[Callable[[], Drawn]] = [
        lambda: ("permute", [x, order]),
        lambda: ("transpose", [x, axis, _whole(r, rank)]),
        lambda: ("flatten", [x, r.randint(0, rank), -1]),
        lambda: ("unsqueeze", [x, axis]),
        lambda: ("squeeze", [x]),
        lambda: ("expand", [x, [r.randint(1, 3), *shape]]),
        lambda: ("repeat", [x, [r.randint(1, 2) for _ in range(rank + r.randint(0, 1))]]),
        lambda: ("slice", [x, axis, _whole(r, size), r.choice([None, _whole(r, size)]), r.randint(1, 3)]),
        lambda: ("select", [x, axis, _whole(r, size)]),
        lambda: ("narrow", [x, axis, r.randint(0, size), r.randint(1, size)]),
        lambda: ("flip", [x, [axis]]),
        lambda: ("roll", [x, [r.randint(-2, 2)], [axis]]),
        lambda: ("index_select", [x, axis, {"index": [r.randint(0, size) for _ in range(r.randint(1, 3))]}]),
        lambda: ("constant_pad_nd", [x, [r.randint(-1, 2) for _ in range(2 * r.randint(1, rank or 1))], _number(r)]),
        lambda: ("cat", [[x, {"value": r.randrange(len(shapes))}], axis]),
        lambda: ("stack", [[x, {"value": r.randrange(len(shapes))}], axis]),
        lambda: ("upsample_nearest2d", [x, [r.randint(1, 4), r.randint(1, 4)]]),
        lambda: ("upsample_bilinear2d", [x, [r.randint(1, 4), r.randint(1, 4)], r.random() < 0.5]),
        lambda: ("pixel_shuffle", [x, 2]),
        lambda: ("diagonal", [x, r.randint(-1, 1), 0, 1]),
    ]
    return [r.choice(choices)()]


def _attended(r: random.Random, i: int, shapes: Shapes) -> list[Drawn]:
    """Attention of a value to itself through weights, masked or not."""
    n, shape = len(shapes), shapes[i]
    if len(shape) < 2:
        return _viewed(r, i, shapes, 3)
    wide = r.randint(1, 3)
    parts: list[Drawn] = [("linear", [{"value": i}, _weight(r, [wide, shape[-1]])]) for _ in range(3)]
    at = [{"value": n + k} for k in range(3)]
    return [*parts, ("scaled_dot_product_attention", [*at, None, 0.0, r.random() < 0.3])]


KINDS: dict[str, tuple[float, Callable[[random.Random, int, Shapes], list[Drawn]]]] = {
    "each": (5, _each), "gelu": (0.3, _gelu), "clamp": (0.5, _clamped), "power": (0.5, _powered),
    "root": (0.5, _rooted),
    "two": (3, _two), "where": (0.5, _chosen), "linear": (3, _linear), "matmul": (0.8, _matmul), "conv": (1.5, _conv),
    "pool": (1, _pool), "normal": (0.7, _normal), "soft": (0.7, _soft), "reduce": (1, _reduced), "view": (0.7, _viewed),
    "move": (2, _moved), "attention": (0.3, _attended),
}  # fmt: skip
"""How often each kind of call is drawn, and how."""
