"""Networks with everything that programs are made of, and what a program must compute."""

import math

import torch
from torch import Tensor, nn

from soundly.bounds.program import Affine, Function, Program
from soundly.graph import elementwise as ew
from soundly.graph.from_torch import from_torch
from soundly.graph.linear import (
    Combine,
)  # fmt: skip
from soundly.graph.network import Network
from soundly.graph.node import Fill, Input, Node

F64 = torch.float64


class Block(nn.Module):
    """A residual block with batch normalisation, and a shortcut with a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.norm2, self.short = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1, stride=2)
        self.stem, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.norm2(self.two(torch.relu(self.norm(self.one(x)))))
        z = torch.relu(y + self.short(x))
        w = torch.relu(self.norm2(self.two(z)) + z)
        return self.head(w.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v)


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(2, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.max_pool2d(torch.tanh(self.conv(x / 3 - 0.1)), 2, padding=1)
        z = nn.functional.avg_pool2d(y, 2, stride=1).permute(0, 2, 3, 1).permute(0, 3, 1, 2)
        return torch.cat([self.up(z).flatten(1), y.flatten(1)[:, ::3]], 1).abs()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def made(module: nn.Module, *shape: int, seed: int = 0) -> Network:
    """The captured module, with random weights and running statistics."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.dtype.is_floating_point:
                value.copy_(torch.randn(value.shape, generator=source) / math.sqrt(max(1, value[0].numel())))
            if name.endswith("running_var"):
                value.abs_().add_(0.5)
    return from_torch(module.eval(), (torch.zeros(1, *shape),))


def mlp(activation: type[nn.Module] = nn.ReLU) -> Network:
    return made(nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 6), activation(), nn.Linear(6, 3)), 4)


def convnet() -> Network:
    layers = [nn.Conv2d(1, 3, 3, stride=2), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)]
    return made(nn.Sequential(*layers), 1, 7, 7)


NETWORKS = {
    "mlp": mlp,
    "convnet": convnet,
    "residual": lambda: made(Block(), 2, 6, 6),
    "pools": lambda: made(Pools(), 2, 8, 8),
    "attention": lambda: made(Attention(), 3, 4),
    "lstm": lambda: made(Recurrent(), 3, 3),
    "gradient of relu": lambda: mlp().gradient(of=1),
    "gradient of tanh": lambda: mlp(nn.Tanh).gradient(of=2),
    "gradient of weights": lambda: mlp().gradient(of=0, wrt="0.weight"),
    "gradient of convnet": lambda: convnet().gradient(of=1),
    "gradient of kernel": lambda: convnet().gradient(of=0, wrt="2.weight"),
    "gradient of attention": lambda: made(Attention(), 3, 4).gradient(of=3),
}


def function(op: ew.Elementwise, factor: float = 1.0, shift: float = 0.0) -> Network:
    x = Input("x", (3,))()
    moved = Combine((factor, 1.0))(x, Fill(shift, (3,))())
    return Network((x,), (op(moved),), {}, like=torch.empty(0, dtype=F64))


def box(network: Network, low: float, high: float) -> dict[Node, tuple[Tensor, Tensor]]:
    return {n: tuple(torch.full(n.shape, end, dtype=F64) for end in (low, high)) for n in network.inputs}


def assert_computes(program: Program, network: Network, tolerance: float = 1e-10, count: int = 5) -> None:
    wide = network.to(F64)
    points = torch.randn(count, program.inputs, generator=torch.Generator().manual_seed(7), dtype=F64)
    found = program.evaluate(points)[-1]
    for point, y in zip(points, found, strict=True):
        pieces = point.split([math.prod(n.shape) for n in network.inputs])
        truth = wide.evaluate(
            network.outputs, *(p.reshape(n.shape) for p, n in zip(pieces, network.inputs, strict=True))
        )
        truth = torch.cat([t.reshape(-1) for t in truth])
        assert bool(((y - truth).abs() <= tolerance * (1 + truth.abs())).all())


def kinds(program: Program) -> list[str]:
    def kind(step) -> str:
        if isinstance(step, Affine):
            return "+".join(type(part).__name__ for part, _ in step.parts)
        return str(step.op) if isinstance(step, Function) else type(step).__name__

    return [kind(step) for step in program.steps]
