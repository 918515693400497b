"""What float32 may do to a network: adversarial orders of sums, fused products, other evaluations, never beyond what
the checker says; and the checker's bound with one fault at a time, which some evaluation then leaves."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import soundly
from soundly import Box
from soundly.certificate import check
from soundly.certificate.format import FLOAT32
from soundly.verification.float32 import with_float32
from soundly.verification.problem import problem_of
from soundly.verification.proof import certificate

float32 = importlib.import_module("soundly.certificate.float32")
F4 = np.float32
Order = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def total(terms: np.ndarray, fused: np.ndarray | None = None) -> np.float32:
    """Left to right in float32; with factors [n, 2] instead of terms, each product is fused with its addition."""
    found = F4(0)
    for t in terms if fused is None else fused:
        # A product of two float32 numbers is exact in float64; adding to it rounds there far below float32.
        found = F4(found + t) if fused is None else F4(np.float64(found) + np.float64(t[0]) * np.float64(t[1]))
    return found


def pairwise(terms: np.ndarray) -> np.float32:
    while len(terms) > 1:
        odd = terms[len(terms) // 2 * 2 :]
        terms = np.concatenate([(terms[0::2][: len(terms) // 2] + terms[1::2]).astype(F4), odd])
    return F4(terms[0])


ORDERS: dict[str, Order] = {
    "as they come": lambda v, g: np.arange(len(v)),
    "largest first": lambda v, g: np.argsort(-np.abs(v)),
    "smallest first": lambda v, g: np.argsort(np.abs(v)),
    "positive first": lambda v, g: np.argsort(-v),
    "shuffled": lambda v, g: g.permutation(len(v)),
}


def dense(w: np.ndarray, b: np.ndarray, x: np.ndarray, how: str, g: np.random.Generator) -> np.ndarray:
    """A layer in float32, its bias among the terms wherever the order has it."""
    y = []
    for row, bias in zip(w, b, strict=True):
        factors = np.concatenate([np.stack([row, x], 1), [[bias, F4(1)]]]).astype(F4)
        terms = (factors[:, 0] * factors[:, 1]).astype(F4)
        if how == "pairwise":
            y.append(pairwise(terms))
        elif how == "bias first, fused":
            y.append(total(terms, factors[np.r_[len(row), np.arange(len(row))]]))
        else:
            order = ORDERS[how](terms, g)
            y.append(total(terms[order]))
    return np.array(y, F4)


def perceptron(seed: int, sizes: tuple[int, ...] = (5, 12, 9, 3), scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def evaluated(model: nn.Sequential, x: np.ndarray, how: str, g: np.random.Generator) -> np.ndarray:
    for m in model:
        if isinstance(m, nn.Linear):
            x = dense(m.weight.detach().numpy(), m.bias.detach().numpy(), x, how, g)
        else:
            x = np.maximum(x, F4(0))
    return x


def spread(model: nn.Module, low: Tensor, high: Tensor, with_: Any = float32) -> np.ndarray:
    """The checker's bound for every output over a box."""
    net = soundly.load(model, (low[None].float(),))
    box = Box(low[None], high[None])
    problem = problem_of(soundly.within(net, box, -1e6, 1e6), "float32")
    proof = importlib.import_module("soundly.certificate.reading").read(_bare(problem))
    frame, _ = with_.refresh(proof.program, proof.lower, proof.upper, None, np.array([-1]), proof.stored)
    return np.asarray(with_.deviation(proof.program, frame)[0])


def _bare(problem: Any) -> Any:
    from soundly.verification.forest import Forest
    from soundly.verification.proof import Grown

    forest, none = Forest(), np.empty(0, np.int64)
    tree = forest.plant(0, 0, int(problem.spans[0, 1]))
    empty = np.empty((0, 0), np.float32)
    return certificate(problem, [Grown(forest, [tree], none, empty, {}, {}, {}, {})], claim="", model={})


def points(low: Tensor, high: Tensor, g: np.random.Generator, count: int) -> Iterator[np.ndarray]:
    for k in range(count):
        share = g.random(len(low)) if k % 3 else g.integers(0, 2, len(low))
        x = (low.numpy() + share * (high - low).numpy()).astype(F4)
        yield np.clip(x, low.numpy().astype(F4), high.numpy().astype(F4))


@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_sums_leaves_the_bound(seed):
    model = perceptron(seed, scale=[1.0, 3.0][seed % 2])
    g = np.random.default_rng(seed)
    low, high = (torch.full((5,), v).double() for v in (-1.0, 1.0))
    most, worst = spread(model, low, high), np.zeros(3)
    wide = perceptron(seed, scale=[1.0, 3.0][seed % 2])
    wide.double()
    with torch.no_grad():
        for p, q in zip(wide.parameters(), model.parameters(), strict=True):
            p.copy_(q.double())
    for x in points(low, high, g, 12):
        real = wide(torch.from_numpy(x).double()[None]).detach().numpy()[0]
        for how in (*ORDERS, "pairwise", "bias first, fused"):
            worst = np.maximum(worst, np.abs(evaluated(model, x, how, g).astype(float) - real))
        worst = np.maximum(worst, np.abs(model(torch.from_numpy(x)[None]).detach().numpy()[0].astype(float) - real))
    assert (worst <= most).all()
    assert (worst > most / 3000).all()  # of worst cases in every layer, over the whole box


class Mixed(nn.Module):
    """Convolution, normalisation, pooling, products, a residual, and functions of every kind that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.left, self.right, self.out = nn.Linear(36, 6), nn.Linear(36, 6), nn.Linear(6, 4)
        self.norm.running_mean.uniform_(-0.5, 0.5)
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(x)))
        x = nn.functional.max_pool2d(x + nn.functional.leaky_relu(self.two(x), 0.3), 2)
        x = x.flatten(1)
        y = self.left(x) * torch.sigmoid(self.right(x))
        return self.out(torch.tanh(y) + torch.clamp(y, -0.3, 0.4) - 0.1 * y.abs())


def test_a_network_of_many_operations():
    torch.manual_seed(0)
    model = Mixed().eval()
    low, high = torch.rand(1, 6, 6).double() - 0.1, None
    low = low.float().double()
    high = low + 0.125
    net = soundly.load(model, (low[None].float(),))
    problem = problem_of(soundly.within(net, Box(low[None], high[None]), -1e6, 1e6), "float32")
    proof = importlib.import_module("soundly.certificate.reading").read(_bare(problem))
    frame, _ = float32.refresh(proof.program, proof.lower, proof.upper, None, np.array([-1]), proof.stored)
    most = float32.deviation(proof.program, frame)[0]
    assert np.isfinite(most).all()
    assert most.max() < 1e-3
    wide = Mixed().double().eval()
    wide.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    worst, g = np.zeros(4), torch.Generator().manual_seed(0)
    for k in range(40):
        share = torch.rand(low.shape, generator=g) if k % 2 else torch.randint(0, 2, low.shape, generator=g)
        x = torch.lerp(low.float(), high.float(), share.float())[None]
        real = wide(x.double()).detach()
        for value in (model(x), model(x.to(memory_format=torch.channels_last)), model(x.repeat(5, 1, 1, 1))[4:]):
            worst = np.maximum(worst, (value.double() - real).abs().detach().numpy()[0])
    assert (worst <= most).all()
    assert (worst > 0).all()


# ---------------------------------------------------------------- faults


def broken(old: str, new: str) -> ModuleType:
    """The bound with one piece of its source exchanged."""
    source = Path(float32.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} is not in the module exactly once: adapt this"
    module = ModuleType("broken_float32")
    importlib.import_module("sys").modules[module.__name__] = module
    exec(compile(source.replace(old, new), module.__name__, "exec"), module.__dict__)
    return module


def summing(n: int, bias: float, weight: float) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(n, 1))
    with torch.no_grad():
        model[0].weight.fill_(weight)
        model[0].bias.fill_(bias)
    return model


class Chain(nn.Module):
    """What a first layer loses goes through a function, or a product, and counts a thousand times in the end."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.last = kind, summing(2000, 1.0, 2.0**-24), nn.Linear(1, 1)
        with torch.no_grad():
            self.last.weight.fill_(1000.0)
            self.last.bias.fill_(0.0)

    def after(self, y: Tensor) -> Tensor:
        match self.kind:
            case "relu":
                y = torch.relu(y)
            case "abs":
                y = torch.abs(y)
            case "square":
                y = torch.square(y)
            case "exp":
                y = torch.exp(y)
            case "times":
                y = torch.relu(y) * torch.sigmoid(y)
            case "step":
                y = torch.sign(y - 1.0001)
        return self.last(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.first(x))


def escapes(with_: Any) -> list[str]:
    """Evaluations that leave the bound: sums that begin with their bias, by much smaller terms, all rounded away."""
    found = []
    ones = torch.ones(2000).double()
    model = summing(2000, 1.0, 2.0**-24)
    begun = dense(model[0].weight.detach().numpy(), model[0].bias.detach().numpy(), np.ones(2000, F4),
                  "largest first", np.random.default_rng(0))  # fmt: skip
    assert begun[0] == 1
    real = 1 + 2000 * 2.0**-24
    if not abs(float(begun[0]) - real) <= spread(model, ones, ones, with_)[0]:
        found.append("sum")
    for kind in ("none", "relu", "abs", "square", "exp", "times", "step"):
        chain = Chain(kind)
        computed = chain.after(torch.from_numpy(begun)[None]).double()
        chain.double()
        exact = chain.after(torch.tensor([[real]], dtype=torch.float64))
        most = spread(Chain(kind), ones, ones, with_)[0]
        if not abs(float((computed - exact).detach())) <= most:
            found.append(kind)
    return found


def test_the_worst_case_is_covered():
    assert escapes(float32) == []


FAULTS = {
    "half of the roundings": ("rate = self.roundings * UNIT", "rate = self.roundings / 2 * UNIT"),
    "half of the unit": ("UNIT = 2.0**-24", "UNIT = 2.0**-25"),
    "a layer forgotten": ("error = error + factor * _image(part, source.error)", "error = error"),
    "sums apart": ("before + terms + 4,", "terms + 4,"),
    "only one rounding of a sum": ("terms = sum(part.terms for part, _ in step.parts)", "terms = 1"),
    "errors end in functions": ("np.where(error == 0, 0.0, steepest * error)", "0.0 * error"),
    "half of a slope": ("steepest = np.maximum(np.abs(flat), np.abs(steep))",
                        "steepest = np.maximum(np.abs(flat), np.abs(steep)) / 2"),
    "errors end in products": ("error = a * y + b * x + a * b", "error = a * b"),
    "half of a product": ("error = a * y + b * x + a * b", "error = a * y + a * b"),
    "jumps forgotten": ("_jump(function, i, t), 0.0)", "0.0, 0.0)"),
    "biases forgotten": ("total = total + np.abs(step.bias) + step.bias_error", "total = total"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name):
    assert escapes(broken(*FAULTS[name])) != []


# ---------------------------------------------------------------- claims


def test_a_claim_that_rounding_decides():
    """A sum that is above 1 in real numbers, and 1 in float32 if it is formed from its bias."""
    model, one = summing(2000, 1.0, 2.0**-24), torch.ones(1, 2000)
    net = soundly.load(model, (one,))
    box = Box(one - 2.0**-10, one)
    narrow = soundly.within(net, box, 1 + 1900 * 2.0**-24, None)
    assert isinstance(soundly.verify(narrow), soundly.Proved)
    assert isinstance(soundly.verify(narrow, arithmetic="float32", timeout=5), soundly.Unknown)
    proof = soundly.verify(soundly.within(net, box, 0.999, None), arithmetic="float32")
    assert isinstance(proof, soundly.Proved)
    assert check(proof.certificate).arithmetic == FLOAT32
    # A certificate for the reals that says more than it proves.
    real = soundly.verify(narrow).certificate
    said = type(real)({**real.header, "arithmetic": FLOAT32}, real.arrays)
    assert not check(said).accepted


def test_margins_are_what_the_checker_says():
    model = perceptron(3)
    net = soundly.load(model, (torch.zeros(1, 5),))
    box = Box(torch.full((1, 5), -0.25), torch.full((1, 5), 0.25))
    claim = soundly.within(net, box, -3.0, 3.0)
    problem = with_float32(problem_of(claim, "float32"), np.inf)
    assert bool((problem.slack > problem.stated).all())
    low = torch.full((5,), -0.25).double()
    most = spread(model, low, -low)
    assert np.allclose(problem.slack.numpy().reshape(-1, 3).max(0), most, rtol=1e-3) or np.allclose(
        np.sort(problem.slack.numpy())[-1], most.max(), rtol=1e-3
    )


def test_what_is_not_known_is_said():
    torch.manual_seed(0)
    plain = nn.Linear(3, 2)
    soft = soundly.load(nn.Sequential(plain, nn.Softmax(-1)), (torch.zeros(1, 3),))
    normal = soundly.load(nn.Sequential(plain, nn.LayerNorm(2)), (torch.zeros(1, 3),))
    wide = soundly.load(nn.Linear(3, 2).double(), (torch.zeros(1, 3, dtype=torch.float64),))
    box = Box(torch.zeros(1, 3), torch.ones(1, 3))
    for net, words in ((soft, "rounded"), (normal, "rounded"), (wide, "float64")):
        with pytest.raises(soundly.errors.InvalidInput, match=words):
            soundly.verify(soundly.within(net, box, -9.0, 9.0), arithmetic="float32")
    with pytest.raises(soundly.errors.InvalidInput, match="arithmetic"):
        soundly.verify(soundly.within(wide, box, -9.0, 9.0), arithmetic="bfloat16")


def test_overflow_is_never_covered():
    """In real numbers the sum is small; on its way float32 overflows."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3e38, -3e38]]))
    net = soundly.load(model, (torch.zeros(1, 2),))
    box = Box(torch.full((1, 2), 1.5), torch.full((1, 2), 1.5))
    verdict = soundly.verify(soundly.within(net, box, -1e30, 1e30), arithmetic="float32", timeout=5, attack=False)
    assert isinstance(verdict, soundly.Unknown)
    assert "float32" in verdict.reason
