"""Gradients as graphs agree with autograd, first and second order, on the networks people use."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from soundly.errors import InvalidInput
from soundly.graph.differentiate import differentiate
from soundly.graph.from_torch import from_torch
from soundly.graph.linear import Combine
from soundly.graph.network import Network
from soundly.graph.node import Fill, Input
from soundly.graph.product import Multiply


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm1(self.conv1(x))))
        y = self.relu(x + self.norm2(self.conv2(x)))
        return self.fc(y.mean((2, 3)))


class Fused(nn.Module):
    """Causal attention by torch's fused call, then a GELU MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, 8))
        return x + self.mlp(x)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Last(nn.Module):
    """A recurrent layer's last output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh()), (2, 5), False),
    "smooth mlp": (lambda: nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 3), nn.Softmax(-1)), (2, 5), True),
    "resnet": (Residual, (2, 3, 8, 8), False),
    "multihead": (SelfAttention, (1, 4, 8), True),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True), (1, 4, 8), True),
    "fused": (Fused, (1, 4, 8), True),
    "lstm": (lambda: Last(nn.LSTM(4, 5, batch_first=True)), (1, 5, 4), True),
    "gru": (lambda: Last(nn.GRU(4, 5, num_layers=2, batch_first=True)), (1, 4, 4), True),
}


def build(name: str) -> tuple[nn.Module, Tensor, bool]:
    make, shape, smooth = MODELS[name]
    torch.manual_seed(0)
    return make().double().eval(), torch.randn(shape, dtype=torch.float64), smooth


@pytest.fixture(params=MODELS, scope="module")
def captured(request) -> tuple[nn.Module, Tensor, bool, Network]:
    module, x, smooth = build(request.param)
    return module, x, smooth, from_torch(module, x, check=False)


def close(got: Sequence[Tensor], want: Sequence[Tensor | None], tolerance: float = 1e-8) -> None:
    for g, w in zip(got, want, strict=True):
        w = torch.zeros_like(g) if w is None else w
        assert g.shape == w.shape
        assert bool(((g - w).abs() <= tolerance * (1 + w.abs().max())).all())


def test_gradients_towards_input_and_every_parameter_are_autograds(captured):
    module, x, _, network = captured
    x = x.clone().requires_grad_()
    y = module(x)
    seed, cotangent = Input("seed", tuple(y.shape))(), torch.randn_like(y)
    names = list(network.parameters)
    parameters = dict(module.named_parameters())
    wrt = [network.input, *network.parameters.values()]
    slopes = differentiate(network.output, wrt, seed=seed)
    got = network.evaluate(slopes, x.detach(), given={seed: cotangent})
    close(got, torch.autograd.grad(y, [x, *(parameters[n] for n in names)], cotangent, allow_unused=True))
    assert set(names) == {n for n, p in parameters.items() if p.requires_grad}


def test_second_derivatives_are_autograds(captured):
    module, x, smooth, network = captured
    x = x.clone().requires_grad_()
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        y = module(x)
        entry = network.entry(1)
        (first,) = differentiate(entry, [network.input])
        (slope,) = torch.autograd.grad(y.reshape(-1)[1], x, create_graph=True)
        direction = torch.randn_like(x)
        again = Input("again", tuple(x.shape))()
        parameters = dict(module.named_parameters())
        names = list(network.parameters)
        wrt = [network.input, *network.parameters.values()]
        got = network.evaluate(differentiate(first, wrt, seed=again), x.detach(), given={again: direction})
        variables = [x, *(parameters[n] for n in names)]
        want = torch.autograd.grad(slope, variables, direction, allow_unused=True)
    close(got, want, 1e-7)
    assert not smooth or bool(got[0].any())


def test_gradients_towards_inner_nodes_are_autograds():
    module, x, _ = build("resnet")
    network = from_torch(module, x, check=False)
    kept: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_, __, output: Tensor) -> Tensor:
            kept[name] = output.clone().requires_grad_() if not output.requires_grad else output
            kept[name].retain_grad()
            return kept[name].clone()  # the next ReLU works in place

        return hook

    for name in ("conv1", "norm1", "pool", "norm2"):
        getattr(module, name).register_forward_hook(keep(name))
    y = module(x)
    y.reshape(-1)[2].backward()
    for name, value in kept.items():
        (slope,) = differentiate(network.entry(2), [network.at(name)])
        close(network.evaluate([network.at(name), slope], x), [value.detach(), value.grad])
        close([network.gradient(of=2, wrt=name)(x)], [value.grad])


def test_a_gradient_is_a_network_of_its_own():
    module, x, _ = build("smooth mlp")
    network = from_torch(module, x)
    gradient = network.gradient(of=(1, 2))
    want = torch.func.grad(lambda v: module(v)[1, 2])(x)
    close([gradient(x)], [want])
    hessian_row = gradient.gradient(of=(1, 0))
    close([hessian_row(x)], [torch.func.grad(lambda v: torch.func.grad(lambda u: module(u)[1, 2])(v)[1, 0])(x)])
    assert gradient.dtype == torch.float64


def test_mapped_batches_equal_loops(captured):
    _, x, _, network = captured
    gradient = network.gradient(of=1)
    batch = torch.stack([x, x + 0.1, 2 * x])
    for net in (network, gradient):
        close([torch.vmap(net)(batch)], [torch.stack([net(v) for v in batch])], 1e-11)


def test_the_graph_is_differentiable_by_autograd(captured):
    module, x, _, network = captured
    x = x.clone().requires_grad_()
    weights = torch.randn_like(module(x))
    (want,) = torch.autograd.grad((module(x) * weights).sum(), x)
    (got,) = torch.autograd.grad((network(x) * weights).sum(), x)
    close([got], [want])


def test_what_nothing_depends_on_is_an_explicit_zero():
    x, y = Input("x", (2,))(), Input("y", (3,))()
    total = Combine((2.0,))(x)
    slope, zero = differentiate(total, [x, y], seed=Fill(1.0, (2,))())
    assert zero.op == Fill(0.0, (3,)) and slope.shape == (2,)
    (zero,) = differentiate(total, [y], seed=Fill(1.0, (2,))())
    assert zero.op == Fill(0.0, (3,))


def test_each_variable_is_its_own_and_is_passed_through():
    """Towards an inner node and the input below it at once: the derivative of the input includes the way through."""
    x = Input("x", (1,))()
    inner = Combine((3.0,))(x)
    y = Multiply()(inner, inner)
    network = Network((x,), (y,), {}).to(torch.float64)
    at = torch.tensor([2.0], dtype=torch.float64)
    got = network.evaluate(differentiate(y, [x, inner, y]), at)
    assert [float(g) for g in got] == [36.0, 12.0, 1.0]


def test_a_missing_or_wrong_seed_is_refused():
    x = Input("x", (2,))()
    with pytest.raises(InvalidInput, match="seed"):
        differentiate(Combine((2.0,))(x), [x])
    with pytest.raises(InvalidInput, match="seed"):
        differentiate(Combine((2.0,))(x), [x], seed=Fill(1.0, (1,))())


def test_efficientnet_lite0_and_its_gradient():
    path = Path(__file__).parents[2] / "examples" / "photographs.py"
    spec = importlib.util.spec_from_file_location("photographs", path)
    assert spec and spec.loader
    photographs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(photographs)
    try:
        module = photographs.efficientnet_lite0()
    except ImportError as missing:
        pytest.skip(str(missing))
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    network = from_torch(module, x, check=False)
    module, wide = module.double(), network.to(torch.float64)
    x = x.double().requires_grad_()
    y = module(x)
    (want,) = torch.autograd.grad(y[0, 7], x)
    assert not math.isclose(float(want.abs().max()), 0.0)
    close([wide(x.detach()), wide.gradient(of=7)(x.detach())], [y.detach(), want])
