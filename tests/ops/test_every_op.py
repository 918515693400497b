"""Every operation against references: the keystone of the tests.

Each check is a plain function of one sample and raises AssertionError, so that test_seeded_faults.py can call it on a
broken operation and see it fail. Adding an operation without samples fails here first.
"""

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from tests.ops.samples import CASES, FUNCTIONS, Case
from torch import Tensor

from soundly.bounds.interval import interval_bounds
from soundly.errors import MissingRule
from soundly.graph.differentiate import differentiate
from soundly.graph.elementwise import Elementwise
from soundly.graph.evaluate import Plan
from soundly.graph.network import Network
from soundly.graph.node import Composite, Constant, Input, Leaf, Linear, Node, Op, Product, topological

ALL = (*CASES, *(f.case for f in FUNCTIONS))
cases = pytest.mark.parametrize("case", ALL, ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves(case: Case) -> tuple[Node, ...]:
    """A fresh leaf per slot."""
    return tuple((Constant if i in case.masks else Input)(f"x{i}", s)() for i, s in enumerate(case.shapes))


def free(case: Case) -> list[int]:
    """The slots that are variables."""
    return [i for i in range(len(case.shapes)) if i not in case.masks]


def values_of(nodes: Sequence[Node], given: dict[Node, Tensor]) -> tuple[Tensor, ...]:
    like = next(iter(given.values()))
    return Plan(nodes)(given, dtype=like.dtype, device=like.device)


def same(got: Tensor, want: Tensor, tolerance: float = 1e-8) -> None:
    assert tuple(got.shape) == tuple(want.shape), f"shapes {tuple(got.shape)} and {tuple(want.shape)}"
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    assert bool(((got - want).abs() <= tolerance * scale).all()), f"{got} is not {want}"


def pulled(case: Case, cotangent: Tensor, x: list[Tensor]) -> list[Tensor]:
    """The reference's vector-Jacobian product by autograd, per free slot."""
    x = [v.clone().requires_grad_(i not in case.masks) for i, v in enumerate(x)]
    y = case.reference(*x)
    wanted = [x[i] for i in free(case)]
    if not y.requires_grad:
        return [torch.zeros_like(v) for v in wanted]
    found = torch.autograd.grad(y, wanted, cotangent, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(found, wanted, strict=True)]


# -- values, shapes, derivatives


def check_value(case: Case) -> None:
    """apply computes the reference, in float64 and in float32."""
    x = case.draw(generator())
    same(case.op.apply(*x), case.reference(*x), 1e-12)
    got = case.op.apply(*(v.float() for v in x))
    assert got.dtype == torch.float32
    same(got.double(), case.reference(*(v.float().double() for v in x)), 1e-5)


def check_shape(case: Case) -> None:
    """The shape rule says what apply returns."""
    x = case.draw(generator())
    assert tuple(case.op.shape(*case.shapes)) == tuple(case.op.apply(*x).shape)
    assert case.op(*leaves(case)).shape == tuple(case.op.apply(*x).shape)


def check_slots(case: Case) -> None:
    """Every adjoint and partial derivative is autograd's, and fits the dot-product identity."""
    x, nodes = case.draw(generator()), leaves(case)
    y = case.op(*nodes)
    seed = Input("seed", y.shape)()
    cotangent = torch.randn(y.shape, generator=generator(1), dtype=torch.float64)
    given = {seed: cotangent, **dict(zip(nodes, x, strict=True))}
    slots = differentiate(y, [nodes[i] for i in free(case)], seed=seed)
    got = values_of(slots, given)
    for slot, (value, want) in enumerate(zip(got, pulled(case, cotangent, x), strict=True)):
        assert slots[slot].shape == case.shapes[slot]
        same(value, want)
    paired = (case.op.apply(*x) * cotangent).sum()
    if isinstance(case.op, Linear):
        same(sum((g * v).sum() for g, v in zip(got, x, strict=True)), paired, 1e-10)
    elif isinstance(case.op, Product):
        for value, factor in zip(got, x, strict=True):
            same((value * factor).sum(), paired, 1e-10)


def check_second_order(case: Case) -> None:
    """The derivative's derivative is autograd's."""
    x, nodes = case.draw(generator()), leaves(case)
    y = case.op(*nodes)
    seed = Input("seed", y.shape)()
    cotangent = torch.randn(y.shape, generator=generator(1), dtype=torch.float64)
    first = differentiate(y, [nodes[0]], seed=seed)[0]
    again = Input("again", first.shape)()
    other = torch.randn(first.shape, generator=generator(2), dtype=torch.float64)
    wrt = [seed, *(nodes[i] for i in free(case))]
    given = {seed: cotangent, again: other, **dict(zip(nodes, x, strict=True))}
    got = values_of(differentiate(first, wrt, seed=again), given)

    variables = [cotangent.clone().requires_grad_(), *(x[i].clone().requires_grad_() for i in free(case))]
    filled = list(x)
    for slot, v in zip(free(case), variables[1:], strict=True):
        filled[slot] = v
    value = case.reference(*filled)
    if not value.requires_grad:
        return
    (slope,) = torch.autograd.grad(value, variables[1], variables[0], create_graph=True, allow_unused=True)
    if slope is None or not slope.requires_grad:
        return
    found = torch.autograd.grad(slope, variables, other, allow_unused=True)
    for value, want, v in zip(got, found, variables, strict=True):
        same(value, torch.zeros_like(v) if want is None else want)


def check_vmap(case: Case) -> None:
    """A mapped batch equals a loop, for the value and its derivative."""
    batch = [case.draw(generator(seed)) for seed in range(3)]
    stacked = [torch.stack(rows) for rows in zip(*batch, strict=True)]
    same(torch.vmap(case.op.apply)(*stacked), torch.stack([case.op.apply(*x) for x in batch]), 1e-12)
    nodes = leaves(case)
    y = case.op(*nodes)
    seed = Input("seed", y.shape)()
    slots = differentiate(y, [nodes[i] for i in free(case)], seed=seed)
    cotangent = torch.randn((3, *y.shape), generator=generator(1), dtype=torch.float64)

    def slopes(c: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        return values_of(slots, {seed: c, **dict(zip(nodes, x, strict=True))})

    mapped = torch.vmap(slopes)(cotangent, *stacked)
    for i, x in enumerate(batch):
        for got, want in zip(mapped, slopes(cotangent[i], *x), strict=True):
            same(got[i], want, 1e-12)


def check_equality(case: Case) -> None:
    """Operations are compared and hashed by value."""
    twin = dataclasses.replace(case.op)
    assert twin is not case.op and twin == case.op and hash(twin) == hash(case.op)
    for other in ALL:
        assert (other.op == case.op) == (repr(other.op) == repr(case.op) and type(other.op) is type(case.op))


# -- what the kinds promise


def matrix(op: Op, shapes: Sequence[tuple[int, ...]], slot: int) -> Tensor:
    """The linear map towards one slot, column by column, the other inputs being zero."""
    zeros = [torch.zeros(s, dtype=torch.float64) for s in shapes]
    columns = []
    for i in range(math.prod(shapes[slot])):
        x = [z.clone() for z in zeros]
        x[slot].view(-1)[i] = 1.0
        columns.append(op.apply(*x).reshape(-1))
    return torch.stack(columns, 1) if columns else torch.zeros(math.prod(op.shape(*shapes)), 0, dtype=torch.float64)


def check_linear(case: Case) -> None:
    """The map is its matrix, and its signs, its absolute map and its number of terms are the matrix's."""
    op, x = case.op, case.draw(generator())
    assert isinstance(op, Linear)
    parts = [matrix(op, case.shapes, slot) for slot in range(len(x))]
    same(op.apply(*x).reshape(-1), sum(m @ v.reshape(-1) for m, v in zip(parts, x, strict=True)), 1e-12)
    same(op.apply(*(-2.5 * v for v in x)), -2.5 * op.apply(*x), 1e-12)
    signs = op.signs(len(x))
    assert len(signs) == len(x)
    for part, sign in zip(parts, signs, strict=True):
        assert bool((sign * part >= 0).all())
    for slot, part in enumerate(parts):
        same(matrix(op.absolute, case.shapes, slot), part.abs(), 1e-12)
    whole = torch.cat(parts, 1)
    operations = (whole != 0).sum(1) + ((whole != 0) & (whole.abs() != 1)).any(1)
    assert op.terms(*case.shapes) >= max([1, *operations.tolist()])


def check_product(case: Case) -> None:
    """The map is linear in each input with coefficients 0 and 1, and `terms` counts the products of an output entry."""
    op, (a, b) = case.op, case.draw(generator())
    assert isinstance(op, Product)
    form = torch.stack(
        [matrix(_fixed(op, i, case.shapes[0]), case.shapes[1:], 0) for i in range(math.prod(case.shapes[0]))],
        1,
    )
    assert set(form.unique().tolist()) <= {0.0, 1.0}
    expected = torch.einsum("oij,i,j->o", form, a.reshape(-1), b.reshape(-1))
    same(op.apply(a, b).reshape(-1), expected, 1e-12)
    assert op.terms(*case.shapes) >= int(form.sum((1, 2)).max())


def _fixed(op: Product, index: int, shape: tuple[int, ...]) -> Op:
    """The product with its first input fixed to a unit vector, as an operation of the second."""

    class Fixed(Op):
        def apply(self, *values: Tensor) -> Tensor:
            unit = torch.zeros(math.prod(shape), dtype=torch.float64)
            unit[index] = 1.0
            return op.apply(unit.reshape(shape), *values)

        def shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
            return op.shape(shape, *shapes)

    return Fixed()


def inner(node: Node, stop: Sequence[Node]) -> list[Node]:
    return [n for n in topological([node]) if not isinstance(n.op, Leaf) and n not in stop]


def check_closure(case: Case) -> None:
    """The adjoint of a linear map is linear, and its adjoint the map; the partial of a product is one product of the
    cotangent and the other input, up to linear maps."""
    nodes, x = leaves(case), case.draw(generator())
    y = case.op(*nodes)
    seed = Input("seed", y.shape)()
    for slot in range(len(nodes)):
        if isinstance(case.op, Linear):
            adjoint = case.op.adjoint(slot, seed, nodes)
            assert all(isinstance(n.op, Linear) for n in inner(adjoint, ()))
            back = differentiate(adjoint, [seed], seed=nodes[slot])[0]
            assert all(isinstance(n.op, Linear) for n in inner(back, ()))
            alone = [v if i == slot else torch.zeros_like(v) for i, v in enumerate(x)]
            same(values_of([back], dict(zip(nodes, x, strict=True)))[0], case.op.apply(*alone), 1e-12)
        else:
            assert isinstance(case.op, Product)
            partial = case.op.partial(slot, seed, nodes)
            used = inner(partial, ())
            assert sum(isinstance(n.op, Product) for n in used) == 1
            assert all(isinstance(n.op, (Product, Linear)) for n in used)
            assert {n for n in topological([partial]) if isinstance(n.op, Input)} == {seed, nodes[1 - slot]}


def check_composite(case: Case) -> None:
    """The expansion computes the same value and the same derivative; what has no expansion encloses itself."""
    op, x, nodes = case.op, case.draw(generator()), leaves(case)
    assert isinstance(op, Composite)
    try:
        expansion = op.expand(*nodes)
    except MissingRule:
        assert op.enclose(*((v, v) for v in x), unit=0.0) is not None
        return
    assert type(expansion.op) is not type(op)
    given = dict(zip(nodes, x, strict=True))
    same(values_of([expansion], given)[0], op.apply(*x), 1e-12)
    seed = Input("seed", expansion.shape)()
    cotangent = torch.randn(expansion.shape, generator=generator(1), dtype=torch.float64)
    given[seed] = cotangent
    wanted = [nodes[i] for i in free(case)]
    slopes = values_of(differentiate(expansion, wanted, seed=seed), given)
    for got, want in zip(slopes, pulled(case, cotangent, x), strict=True):
        same(got, want)


# -- intervals


def contains(bounds: tuple[Tensor, Tensor], value: Tensor) -> Tensor:
    lower, upper = bounds
    unknown = torch.isinf(lower) & torch.isinf(upper) & (lower < upper)
    return ((lower <= value) & (value <= upper)) | (torch.isnan(value) & unknown)


def assert_enclosed(
    network: Network, nodes: Sequence[Node], region: dict[Node, tuple[Tensor, Tensor]], seed: int = 0
) -> None:
    """No node's value at a random point, a random corner or an end of the region escapes its interval: not in the
    network's own floating type, and not in float64, which stands for the reals. There is no tolerance."""
    bounds = interval_bounds(network, region, nodes)
    wide, plan, source = network.to(torch.float64), Plan(nodes), generator(seed)
    kinds, found = [], []
    for kind in ("random", "random", "random", "corner", "corner", "corner", "lower", "upper"):
        point = {}
        for node, (lower, upper) in region.items():
            if kind in ("lower", "upper"):
                point[node] = lower if kind == "lower" else upper
            else:
                unit = torch.rand(lower.shape, generator=source).to(lower)
                unit = unit.round() if kind == "corner" else unit
                value = torch.where(unit == 0, lower, torch.where(unit == 1, upper, lower + unit * (upper - lower)))
                point[node] = torch.maximum(torch.minimum(value, upper), lower)
        for net in (network, wide):
            given = {**net.values, **{n: v.to(net.dtype) for n, v in point.items()}}
            found.append([v.double() for v in plan(given, dtype=net.dtype, device=torch.device("cpu"))])
            kinds.append(f"in {net.dtype} at a {kind} point")
    for node, values in zip(nodes, map(torch.stack, zip(*found, strict=True)), strict=True):
        lower, upper = (b.double() for b in bounds[node])
        assert not bool(torch.isnan(lower).any() | torch.isnan(upper).any()), f"NaN in the bounds of {node}"
        escaped = ~contains((lower, upper), values)
        if bool(escaped.any()):
            which, *rest = escaped.nonzero()[0].tolist()
            at = tuple(rest)
            raise AssertionError(
                f"{node} is {float(values[which][at])!r} {kinds[which]}, "
                f"outside of [{float(lower[at])!r}, {float(upper[at])!r}]"
            )


BOXES = ("point", "hair", "thin", "wide", "kink above", "kink below", "large", "small")


def box(x: Tensor, kind: str, domain: tuple[float, float], source: torch.Generator) -> tuple[Tensor, Tensor]:
    """An interval around or near x, inside the domain."""
    x = x.float()
    widths = {"point": 0.0, "hair": 1e-6, "thin": 0.05, "wide": 1.5, "large": 30.0, "small": 1e-4}
    if kind in ("large", "small"):
        x = x * {"large": 100.0, "small": 1e-3}[kind]
    if kind in ("kink above", "kink below"):
        width = x.abs()
        lower, upper = (torch.zeros_like(x), width) if kind == "kink above" else (-width, torch.zeros_like(x))
    else:
        width = widths[kind] * torch.rand(x.shape, generator=source)
        lower, upper = x - width, x + width
    return lower.clamp(*domain), upper.clamp(*domain)


def check_enclosed(case: Case, *, kinds: Sequence[str] = BOXES) -> None:
    """Intervals hold every node of the operation, its derivative and its second derivative, whichever leaves range."""
    nodes = leaves(case)
    y = case.op(*nodes)
    seed = Input("seed", y.shape)()
    first = differentiate(y, [nodes[i] for i in free(case)], seed=seed)
    again = Input("again", first[0].shape)()
    second = differentiate(first[0], [seed, *(nodes[i] for i in free(case))], seed=again)
    every = topological([y, *first, *second])
    variables = [n for n in (*(nodes[i] for i in free(case)), seed, again) if n in every]
    domain = case.domain if case.domain[0] > 0 else (-math.inf, math.inf)
    source = generator(3)
    for i, kind in enumerate(kinds):
        for ranging in (variables, (variables[:1], variables[1:], [seed])[i % 3]):
            drawn = dict(zip(nodes, case.draw(source), strict=True))
            values = {n: drawn[n].float() for n in nodes if n in every}
            values |= {n: torch.randn(n.shape, generator=source) for n in (seed, again) if n in every}
            region = {}
            for node in ranging:
                if node in values:
                    low_high = domain if node in drawn else (-math.inf, math.inf)
                    region[node] = box(values.pop(node), kind, low_high, source)
            assert_enclosed(Network((), (y,), values), every, region, seed=len(region))


# -- export


def check_onnx(case: Case) -> None:
    """onnxruntime computes the same from the exported model, and reading it back gives the same function again."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from soundly.graph.from_onnx import from_onnx
    from soundly.graph.to_onnx import to_onnx

    nodes, x = leaves(case), [v.float() for v in case.draw(generator())]
    fixed = {nodes[i]: x[i] for i in case.masks}
    inputs = tuple(nodes[i] for i in free(case))
    network = Network(inputs, (case.op(*nodes),), fixed)
    model = to_onnx(network)
    given = [x[i] for i in free(case)]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    (got,) = session.run(None, dict(zip(names, (v.numpy() for v in given), strict=True)))
    same(torch.from_numpy(got), network(*given), 1e-5)
    same(from_onnx(model)(*given), network(*given), 1e-5)


# -- the tests


def concrete(kind: type[Op]) -> set[type[Op]]:
    """All operation classes of the graph package that can be used as they are."""
    found: set[type[Op]] = set()
    for child in kind.__subclasses__():
        found |= concrete(child)
        ours = child.__module__.startswith("soundly.") and not child.__name__.startswith("_")
        if ours and dataclasses.is_dataclass(child):
            found.add(child)
    return found


def test_every_operation_has_samples():
    assert concrete(Op) - concrete(Leaf) - {Elementwise} == {type(case.op) for case in CASES}


@cases
def test_value_is_the_reference(case):
    check_value(case)


@cases
def test_shape_rule_is_the_actual_shape(case):
    check_shape(case)


@cases
def test_every_slot_is_differentiated_as_autograd_does(case):
    check_slots(case)


@cases
def test_second_derivatives_are_autograds(case):
    check_second_order(case)


@cases
def test_a_mapped_batch_equals_a_loop(case):
    check_vmap(case)


@cases
def test_operations_are_equal_by_value(case):
    check_equality(case)


@cases
def test_an_exported_model_computes_the_same(case):
    check_onnx(case)


@pytest.mark.parametrize("case", [c for c in CASES if isinstance(c.op, Linear)], ids=str)
def test_linear_maps_are_what_they_say(case):
    check_linear(case)
    check_closure(case)


@pytest.mark.parametrize("case", [c for c in CASES if isinstance(c.op, Product)], ids=str)
def test_products_are_what_they_say(case):
    check_product(case)
    check_closure(case)


@pytest.mark.parametrize("case", [c for c in CASES if isinstance(c.op, Composite)], ids=str)
def test_composites_are_their_expansion(case):
    check_composite(case)


@cases
def test_no_value_escapes_its_interval(case):
    check_enclosed(case)


@pytest.mark.parametrize("case", [c for c in CASES if not c.masks], ids=str)
def test_shapes_that_do_not_fit_are_refused(case):
    """A value of other shapes is never computed silently: where the rule accepts them, apply returns what it says."""
    for extra in ((1,), (7,), (2, 3)):
        for slot in range(len(case.shapes)):
            shapes = [(*extra, *s) if i == slot else s for i, s in enumerate(case.shapes)]
            try:
                promised = case.op.shape(*shapes)
            except (ValueError, IndexError):
                continue
            assert tuple(promised) == tuple(case.op.apply(*(torch.zeros(s) for s in shapes)).shape)
