"""Both trunks against reverse-mode autograd, and every model whose layer must not be edited.

A model that slips through detection makes "proved" false, so each refused model below stands for a way to be wrong:
the output is not the layer's, or what is called frozen moves with the layer's weights.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import soundly
from soundly.editing.trunk import GraphTrunk, ModuleTrunk, Trunk, trunk_of
from soundly.errors import CaptureError, EditError, InvalidInput

# Raised inside torch (2.13) the first time forward-mode differentiation is used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


class Cnn(nn.Module):
    """Convolution, batch normalisation, a residual block with GELU, max-pooling, average pooling, linear."""

    place, shape = "block", (1, 2, 8, 8)

    def __init__(self, classes: int = 5, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU())
        self.wide = nn.Conv2d(4, 6, 1)
        self.fc = nn.Linear(6, classes, bias=bias)
        self.stem[1].running_mean.uniform_(-0.2, 0.2)
        self.stem[1].running_var.uniform_(0.5, 2.0)

    def rest(self, z: Tensor, x: Tensor) -> Tensor:
        return F.softplus(self.wide(self.stem(x) + z)).mean((2, 3))

    def trunk(self, x: Tensor) -> Tensor:
        return self.rest(self.block(self.stem(x)), x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x))


class Mlp(nn.Module):
    """Two hidden layers; `after` sees the layer's output."""

    place, shape = "b", (1, 4)

    def __init__(self, after=lambda self, y: y, classes: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(4, 7), nn.Linear(7, 6), nn.Linear(6, classes, bias=bias)
        self.after = after

    def rest(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z)

    def trunk(self, x: Tensor) -> Tensor:
        return self.rest(self.b(F.silu(self.a(x))), x)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self, self.fc(self.trunk(x)))


class Decoder(nn.Module):
    """A causal transformer block with RMSNorm and SwiGLU over embeddings; logits at every token."""

    place, shape = "attended", (1, 4, 8)

    def __init__(self, classes: int = 7, bias: bool = False) -> None:
        super().__init__()
        self.qkv, self.attended = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.norm, self.up, self.down = nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 24), nn.Linear(12, 8)
        self.last = nn.LayerNorm(8)
        self.fc = nn.Linear(8, classes, bias=bias)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.reshape(*x.shape[:2], 2, 4).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)

    def rest(self, z: Tensor, x: Tensor) -> Tensor:
        x = x + z
        gate, up = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.last(x + self.down(F.silu(gate) * up))

    def trunk(self, x: Tensor) -> Tensor:
        return self.rest(self.attended(self.attend(x)), x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x))


class Recurrent(nn.Module):
    place, shape = None, (1, 3, 4)

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def trunk(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x))


def made(kind: type[nn.Module], seed: int = 0, **options) -> tuple[nn.Module, Tensor]:
    """A seeded float64 model in training mode (nothing may depend on that) and an input."""
    torch.manual_seed(seed)
    model = kind(**options).double()
    return model, torch.randn(kind.shape, dtype=torch.float64)


def jacobian(function, z: Tensor) -> Tensor:
    """d function / dz by reverse mode: [*output, *z]."""
    return torch.autograd.functional.jacobian(function, z)


def along(slope: Tensor, directions: Tensor, z: Tensor) -> Tensor:
    """The Jacobian [..., *z] applied to directions [m, *z] that may need broadcasting: [m, ...]."""
    flat = directions.expand(len(directions), *z.shape).reshape(len(directions), -1)
    return torch.einsum("...i,mi->m...", slope.reshape(*slope.shape[: slope.dim() - z.dim()], -1), flat)


def trunks(model: nn.Module, x: Tensor) -> list[Trunk]:
    graph = GraphTrunk(soundly.load(model, x), "fc")
    return [graph] if isinstance(model, Recurrent) else [graph, ModuleTrunk(model, "fc")]


ALL = [Cnn, Mlp, Decoder, Recurrent]


@pytest.mark.parametrize("kind", ALL)
def test_features_and_tangents_are_the_models_own(kind):
    model, x = made(kind)
    want = model.eval().trunk(x).detach()
    directions = torch.randn(5, *x.shape, dtype=torch.float64)
    moved = along(jacobian(model.trunk, x), directions, x)
    for trunk in trunks(model, x):
        torch.testing.assert_close(trunk.features(x), want.reshape(-1, want.shape[-1]), rtol=0, atol=1e-12)
        got = trunk.tangents(x, None, directions)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, moved.reshape(5, -1, want.shape[-1]), rtol=1e-10, atol=1e-11)
        assert torch.equal(trunk.value(x, None), x)


@pytest.mark.parametrize("kind", [Cnn, Mlp, Decoder])
def test_tangents_at_an_inner_place_go_around_what_skips_it(kind):
    model, x = made(kind)
    model.eval()
    z = trunks(model, x)[0].value(x, kind.place)
    slope = jacobian(lambda z: model.rest(z, x), z)
    for trunk in trunks(model, x):
        torch.testing.assert_close(trunk.value(x, kind.place), z, rtol=0, atol=1e-12)
        for shape in (z.shape, (1,) * z.dim(), (*z.shape[:2], *(1,) * (z.dim() - 2)), z.shape[1:]):
            directions = torch.randn(3, *shape, dtype=torch.float64)
            full = directions.reshape(3, *(1,) * (z.dim() - len(shape)), *shape)
            want = along(slope, full, z)
            if shape == z.shape[1:] and isinstance(trunk, ModuleTrunk):
                continue  # leading axes are the graph's business only
            got = trunk.tangents(x, kind.place, directions)
            torch.testing.assert_close(got, want.reshape(got.shape), rtol=1e-10, atol=1e-11)


def test_a_second_point_does_not_meet_what_is_remembered_of_the_first():
    model, x = made(Cnn)
    y = torch.randn_like(x)
    trunk = GraphTrunk(soundly.load(model, x), "fc")
    directions = torch.randn(2, *x.shape, dtype=torch.float64)
    for point in (x, y, x):
        fresh = GraphTrunk(trunk.network, "fc")
        for place, d in ((None, directions), ("block", directions.mean((2, 3, 4))[..., None, None, None])):
            assert torch.equal(trunk.tangents(point, place, d), fresh.tangents(point, place, d))
        assert torch.equal(trunk.features(point), fresh.features(point))


@pytest.mark.parametrize("kind", ALL)
def test_models_stay_as_they_were(kind):
    model, x = made(kind)
    for m, training in zip(model.modules(), [True, False] * 20, strict=False):
        m.training = training
    flags = [m.training for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kept = x.clone()
    for trunk in trunks(model, x):
        trunk.features(x), trunk.tangents(x, kind.place, torch.ones(1, *trunk.value(x, kind.place).shape).to(x))
    assert flags == [m.training for m in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, kept) and x.grad is None
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", [Cnn, Mlp])
def test_derivatives_along_a_path_are_those_at_its_points(kind):
    model, x = made(kind)
    model.eval()
    draw = torch.Generator().manual_seed(3)
    path = x + torch.randn(4, *x.shape, generator=draw, dtype=x.dtype)
    directions = torch.randn(3, *x.shape, generator=draw, dtype=x.dtype)
    for trunk in trunks(model, x):
        want = torch.stack([along(jacobian(model.trunk, point), directions, point) for point in path])
        torch.testing.assert_close(trunk.tangents_along(path, directions), want, rtol=1e-9, atol=1e-10)


def test_a_module_that_looks_at_its_input_takes_the_points_of_a_path_one_by_one():
    torch.manual_seed(0)
    model = Before(lambda m, x: m.b(m.a(x if float(x.sum()) > 0 else 2 * x))).double()
    path = torch.stack([torch.ones(1, 4, dtype=torch.float64), -torch.ones(1, 4, dtype=torch.float64)])
    directions = torch.eye(4, dtype=torch.float64)[:, None]
    slope = (model.b.weight @ model.a.weight).T
    found = ModuleTrunk(model, "fc").tangents_along(path, directions)[:, :, 0]
    torch.testing.assert_close(found, torch.stack([slope, 2 * slope]))


def test_half_precision_is_widened():
    """Features are the stored weights', not what arithmetic in bfloat16 makes of them."""
    model, x = made(Mlp)
    half = model.to(torch.bfloat16)
    wide = made(Mlp)[0].double()
    wide.load_state_dict({name: value.double() for name, value in half.state_dict().items()})
    small = x.to(torch.bfloat16)
    directions = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(1)).to(small)
    exact, trunk = wide.trunk(small.double()), ModuleTrunk(half, "fc")
    torch.testing.assert_close(trunk.features(small), exact.detach(), rtol=1e-5, atol=1e-6)
    assert float((half.trunk(small).double() - exact).detach().abs().max()) > 1e-4  # the difference shows
    slope = jacobian(wide.trunk, small.double())
    want = along(slope, directions.double(), small.double())
    torch.testing.assert_close(trunk.tangents(small, None, directions), want, rtol=1e-5, atol=1e-6)
    assert trunk.weight.dtype == half.fc.weight.dtype == torch.bfloat16
    narrowing = Before(lambda m, x: m.b(m.a(x).bfloat16())).to(torch.bfloat16)
    with pytest.raises(EditError, match=r"\.float\(\)"):
        ModuleTrunk(narrowing, "fc").features(torch.randn(1, 4))


def test_a_float32_model_computes_in_its_own_type_and_a_widened_network_in_float64():
    model, x = made(Cnn)
    narrow, small = model.float().eval(), x.float()
    wide = made(Cnn)[0].eval()
    wide.load_state_dict({name: value.double() for name, value in narrow.state_dict().items()})
    directions = torch.randn(3, *x.shape, dtype=torch.float64)
    exact = along(jacobian(wide.trunk, small.double()), directions, x)[:, 0]
    network = soundly.load(narrow, small)
    for trunk in (GraphTrunk(network, "fc"), ModuleTrunk(narrow, "fc")):
        assert trunk.weight.dtype == torch.float32
        torch.testing.assert_close(trunk.tangents(small, None, directions)[:, 0], exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trunk.features(small), narrow.trunk(small).double(), rtol=0, atol=1e-6)
    widened = GraphTrunk(network.to(torch.float64), "fc").tangents(small, None, directions)[:, 0]
    torch.testing.assert_close(widened, exact, rtol=1e-10, atol=1e-11)


class InPlace(nn.Module):
    """A place whose value the next operation overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.conv(x)).mean((2, 3)))


def test_a_place_keeps_its_value_where_the_next_operation_works_in_place():
    torch.manual_seed(0)
    model, x = InPlace().double(), torch.randn(1, 2, 5, 5, dtype=torch.float64)
    want = model.conv(x)
    assert bool((want < 0).any())
    directions = torch.randn(4, *want.shape, dtype=torch.float64)
    slope = jacobian(lambda z: z.relu().mean((2, 3)), want)
    for trunk in trunks(model, x):
        torch.testing.assert_close(trunk.value(x, "conv"), want, rtol=0, atol=1e-12)
        torch.testing.assert_close(trunk.tangents(x, "conv", directions), along(slope, directions, want))


# -- layers that must not be edited


def refused(model: nn.Module | None, x: Tensor, *, kind: str, layer: str = "fc", place: str | None = None) -> str:
    """The message with which a trunk refuses a model: at once or when it is first asked for a derivative."""
    with pytest.raises((EditError, InvalidInput)) as caught:
        trunk = trunk_of(soundly.load(model, x) if kind == "graph" else model, layer)
        trunk.tangents(x, place, torch.ones(1, *trunk.value(x, place).shape, dtype=x.dtype))
    return str(caught.value)


AFTER = {
    "softmax": lambda m, y: y.softmax(-1),
    "scaled": lambda m, y: 2 * y,
    "negated": lambda m, y: -y,
    "scaled in place": lambda m, y: y.mul_(2),
    "clamped, far away": lambda m, y: y.clamp(-50, 50),
    "clamped in place": lambda m, y: y.clamp_(-50, 50),
    "relu": lambda m, y: (y + 0).relu(),
    "bias twice": lambda m, y: y + m.fc.bias,
    "bias three times": lambda m, y: y + 2 * m.fc.bias,
    "relu of its bias": lambda m, y: y + m.fc.bias.relu(),
    "another parameter": lambda m, y: y + m.b.bias[:3],
    "a number": lambda m, y: y + 1.0,
    "its own weight": lambda m, y: y + m.fc.weight.sum(1),
    "squared": lambda m, y: y * y,
    "summed": lambda m, y: y.sum(-1, keepdim=True),
    "flipped": lambda m, y: y.flip(-1),
    "added to itself": lambda m, y: y + y,
}


@pytest.mark.parametrize("kind", ["graph", "module"])
@pytest.mark.parametrize("after", AFTER)
def test_a_layer_that_is_not_last_is_refused(kind, after):
    model, x = made(Mlp, after=AFTER[after])
    assert "'fc'" in refused(model, x, kind=kind)


@pytest.mark.parametrize(
    "after", [lambda m, y: y, lambda m, y: y.reshape(3, 1), lambda m, y: y[None], lambda m, y: y.float().double()]
)
def test_shapes_after_the_layer_do_not_matter(after):
    torch.manual_seed(0)
    model, x = Mlp(after), torch.randn(1, 4)  # float32, so that the round trip changes nothing
    want = model.trunk(x).double()
    torch.testing.assert_close(ModuleTrunk(model, "fc").features(x), want, rtol=0, atol=1e-6)
    if model(x).dtype == torch.float32:
        torch.testing.assert_close(GraphTrunk(soundly.load(model, x), "fc").features(x), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change", [lambda b: b[:, None], torch.relu, torch.abs, torch.neg, lambda b: 2 * b, lambda b: b.flip(0), torch.mean]
)
def test_what_is_made_from_the_bias_is_not_the_bias(change):
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.tanh(), self.fc.weight) + change(self.fc.bias)

    torch.manual_seed(0)
    assert "'fc'" in refused(Square().double(), torch.randn(1, 3, 4, dtype=torch.float64), kind="graph")


def test_a_layer_that_is_unknown_or_not_linear_is_refused_with_those_there_are():
    model, x = made(Mlp)
    for kind in ("graph", "module"):
        for layer in ("head", "", "after", "fc.weight.x"):
            message = refused(model, x, kind=kind, layer=layer)
            assert "fc" in message and repr(layer) in message
        assert "'a'" in refused(model, x, kind=kind, layer="a")
    model, x = made(Cnn)
    for kind in ("graph", "module"):
        assert "'wide'" in refused(model, x, kind=kind, layer="wide")
        assert "'stem'" in refused(model, x, kind=kind, layer="stem")
    with pytest.raises(InvalidInput, match="must be a soundly Network"):
        trunk_of("model.onnx", "fc")


class Tied(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.embed, self.mid, self.fc = nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        if what == "weight":
            self.fc.weight = self.embed.weight
        elif what == "bias":
            self.fc.bias = self.embed.bias
        elif what == "memory of the bias":
            self.fc.bias = nn.Parameter(self.embed.bias.detach())
        elif what == "memory":
            self.fc.weight = nn.Parameter(self.embed.weight.detach())
        elif what == "part of the memory":
            everything = torch.randn(5, 6)
            self.embed.weight, self.fc.weight = nn.Parameter(everything[:4]), nn.Parameter(everything[1:])
        elif what == "buffer":
            self.register_buffer("mean", self.fc.weight.detach()[0])
        self.functional = what == "functional"

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.mid(torch.tanh(self.embed(x))))
        return self.fc(h + self.fc.weight.mean(0) if self.functional else h)


@pytest.mark.parametrize(
    "what", ["weight", "bias", "memory", "memory of the bias", "part of the memory", "buffer", "functional"]
)
def test_a_layer_whose_weights_act_elsewhere_too_is_refused(what):
    torch.manual_seed(0)
    model, x = Tied(what), torch.randn(1, 6)
    assert "'fc'" in refused(model, x, kind="module")
    if what in ("weight", "bias", "functional"):  # a graph copies values, so shared memory alone ties nothing there
        assert "'fc'" in refused(model, x, kind="graph")
    free = Tied("nothing")
    assert all(isinstance(t.features(x), Tensor) for t in trunks(free, x))


def test_a_layer_in_a_common_block_of_memory_is_not_tied():
    torch.manual_seed(0)
    model, x = Tied("nothing"), torch.randn(1, 6)
    block = torch.randn(48)
    model.embed.weight, model.fc.weight = nn.Parameter(block[:24].reshape(4, 6)), nn.Parameter(block[24:].reshape(4, 6))
    assert ModuleTrunk(model, "fc").features(x).shape == (1, 6)


class Twice(nn.Module):
    def __init__(self, again: str, bias: bool) -> None:
        super().__init__()
        self.a, self.fc, self.again = nn.Linear(4, 4), nn.Linear(4, 4, bias=bias), again

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.fc(torch.tanh(self.fc(h))) if self.again == "nested" else self.fc(h) + self.fc(-h)


@pytest.mark.parametrize("kind", ["graph", "module"])
@pytest.mark.parametrize("again", ["nested", "side by side"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_applied_twice_is_refused(kind, again, bias):
    torch.manual_seed(0)
    assert "'fc'" in refused(Twice(again, bias), torch.randn(1, 4), kind=kind)


def test_a_layer_registered_under_two_names_is_refused_as_a_module():
    model, x = made(Mlp)
    model.alias = model.fc
    assert "alias" in refused(model, x, kind="module")


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight, self.bias)


def test_layers_that_only_look_like_a_linear_one_are_refused():
    def doubled(model):
        model.fc = Doubled(6, 3).double()

    def hooked(model):
        model.fc.register_forward_hook(lambda m, args, out: 3 * out)

    def normed(model):
        nn.utils.parametrizations.weight_norm(model.fc)

    def masked(model):
        prune.l1_unstructured(model.fc, "weight", 0.5)

    for change in (doubled, hooked, normed, masked):
        model, x = made(Mlp)
        change(model)
        assert "'fc'" in refused(model, x, kind="module"), change.__name__
    for change in (doubled, hooked):
        model, x = made(Mlp)
        change(model)
        assert "'fc'" in refused(model, x, kind="graph"), change.__name__


class Before(Mlp):
    """What is before the layer, as the test wants it."""

    def __init__(self, before) -> None:
        super().__init__()
        self.before = before

    def trunk(self, x: Tensor) -> Tensor:
        return self.before(self, x)


def test_a_random_trunk_is_refused():
    torch.manual_seed(0)
    model, x = Before(lambda m, x: torch.dropout(m.b(m.a(x)), 0.5, True)), torch.randn(1, 4)
    assert "random" in refused(model, x, kind="module")
    with pytest.raises(CaptureError):
        soundly.load(model, x)


def test_a_trunk_that_overwrites_its_input_works_on_a_copy():
    torch.manual_seed(0)
    model, x = Before(lambda m, x: m.b(m.a(x.mul_(0.5)))).double(), torch.randn(1, 4, dtype=torch.float64)
    kept = x.clone()
    trunk = ModuleTrunk(model, "fc")
    directions = torch.eye(4, dtype=torch.float64)[:, None]
    for _ in range(2):
        torch.testing.assert_close(trunk.features(x), model.b(model.a(0.5 * kept)).detach())
        torch.testing.assert_close(trunk.tangents(x, None, directions)[:, 0], 0.5 * (model.b.weight @ model.a.weight).T)
        assert torch.equal(x, kept)


def test_a_layer_called_by_keyword_is_refused():
    class Keyword(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=self.trunk(x))

    torch.manual_seed(0)
    assert "by position" in refused(Keyword(), torch.randn(1, 4), kind="module")


def test_the_output_may_be_in_a_container_but_not_be_one_of_several():
    torch.manual_seed(0)
    x = torch.randn(1, 4)
    assert ModuleTrunk(Mlp(lambda m, y: {"logits": y}), "fc").features(x).shape == (1, 6)
    assert "'fc'" in refused(Mlp(lambda m, y: (y, y)), x, kind="module")


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.side, self.unused = nn.Linear(4, 6), nn.Linear(4, 3), nn.Linear(2, 2)
        self.fc, self.out = nn.Linear(6, 3), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(torch.tanh(self.a(x)))[:, None])


@pytest.mark.parametrize("kind", ["graph", "module"])
@pytest.mark.parametrize("place", ["fc", "out", "unused", "nowhere"])
def test_places_without_influence_on_the_features_are_refused(kind, place):
    torch.manual_seed(0)
    model, x = Places().double(), torch.randn(1, 4, dtype=torch.float64)
    assert repr(place) in refused(model, x, kind=kind, place=place)


@pytest.mark.parametrize("kind", ["graph", "module"])
def test_directions_and_inputs_that_do_not_fit_are_refused(kind):
    model, x = made(Mlp)
    trunk = trunk_of(soundly.load(model, x) if kind == "graph" else model, "fc")
    for shape in ((2, 1, 5), (2, 3, 4), (1, 2, 1, 4)):
        with pytest.raises(InvalidInput, match="do not fit"):
            trunk.tangents(x, None, torch.ones(shape, dtype=torch.float64))
    with pytest.raises((InvalidInput, RuntimeError)):
        trunk.features(torch.ones(1, 5, dtype=torch.float64))


def test_a_module_whose_features_are_not_finite_is_refused():
    model, x = made(Mlp)
    with pytest.raises(InvalidInput, match="not finite"):
        ModuleTrunk(model, "fc").features(x * float("nan"))
