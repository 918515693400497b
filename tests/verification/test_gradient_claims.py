"""Claims about gradients: for ReLU networks the exact range is known by enumerating linear regions, else by grids.

A gradient is piecewise constant or smooth; `verify` must never be wrong about its range, and right where there is some
room: a margin in the value, and for a counterexample a region that a float32 point can lie in.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from tests.bounds.samples import made
from torch import Tensor, nn

from soundly import Box, Proved, Refuted, Unknown, check, load, monotone, within
from soundly.graph.elementwise import ABS
from soundly.graph.linear import Sum
from soundly.graph.network import Network
from soundly.spec.claim import Claim
from soundly.verification.verdict import Verdict
from soundly.verification.verify import verify

F64 = torch.float64
MARGIN = 1e-3


def square(n: int, half: float = 1.0) -> Box:
    return Box(torch.full((1, n), -half), torch.full((1, n), half))


def layers(sizes: tuple[int, ...], seed: int, activation: type[nn.Module]) -> Network:
    parts: list[nn.Module] = []
    for n, m in pairwise(sizes):
        parts += [nn.Linear(n, m), activation()]
    return made(nn.Sequential(*parts[:-1]), sizes[0], seed=seed)


def weights_of(network: Network) -> list[tuple[np.ndarray, np.ndarray]]:
    values = {name: network.values[node].double().numpy() for name, node in network.parameters.items()}
    return [(values[f"{k}.weight"], values[f"{k}.bias"]) for k in sorted({int(name.split(".")[0]) for name in values})]


def inner(rows: list[np.ndarray], limits: list[float], box: Box) -> tuple[float, np.ndarray]:
    """The largest ball (in the maximum norm) where rows . x <= limits inside a box: its radius and centre."""
    low, high = box.lower[0].numpy(), box.upper[0].numpy()
    n = len(low)
    matrix = [np.append(row, np.abs(row).sum()) for row in rows]
    for i in range(n):
        unit = np.eye(n)[i]
        matrix += [np.append(unit, 1.0), np.append(-unit, 1.0)]
    right = [*limits, *np.stack([high, -low], 1).reshape(-1)]
    found = linprog(np.append(np.zeros(n), -1.0), np.array(matrix), right, bounds=[(None, None)] * n + [(0, None)])
    return (float(found.x[-1]), found.x[:-1]) if found.status == 0 else (-1.0, np.zeros(n))


@dataclass(frozen=True)
class Piece:
    """A linear region: the Jacobian [outputs, inputs] there, and how large a ball it holds."""

    jacobian: np.ndarray
    radius: float


def pieces(network: Network, box: Box) -> list[Piece]:
    """All linear regions of a ReLU network that meet the inside of a box, by linear programs."""
    steps = weights_of(network)
    n = box.shape[1]
    found = []

    def walk(k: int, neuron: int, a: np.ndarray, b: np.ndarray, mask: list[bool], rows, limits, radius, centre) -> None:
        # a x + b: the value before layer k's neurons are cut off; mask: of those decided so far.
        if k == len(steps) - 1:
            found.append(Piece(a, radius))
            return
        if neuron == len(b):
            on = np.array(mask, dtype=float)
            weight, bias = steps[k + 1]
            walk(k + 1, 0, weight @ (on[:, None] * a), weight @ (on * b) + bias, [], rows, limits, radius, centre)
            return
        here = a[neuron] @ centre + b[neuron] > 0
        for active in (here, not here):
            sign = -1.0 if active else 1.0
            more, ends = [*rows, sign * a[neuron]], [*limits, -sign * b[neuron]]
            r, c = inner(more, ends, box)
            if r > 1e-9:
                walk(k, neuron + 1, a, b, [*mask, active], more, ends, r, c)

    weight, bias = steps[0]
    radius, centre = inner([], [], box)
    walk(0, 0, weight, bias, [], [], [], radius, centre)
    assert found and all(p.jacobian.shape[1] == n for p in found)
    return found


@dataclass(frozen=True)
class Range:
    """What a function of the gradient takes, and how large a ball holds each extreme."""

    least: float
    greatest: float
    room_below: float
    room_above: float


def range_of(values: np.ndarray, radii: np.ndarray) -> Range:
    least, greatest = values.min(), values.max()
    below, above = (float(radii[np.abs(values - end) < MARGIN / 2].max()) for end in (least, greatest))
    return Range(float(least), float(greatest), below, above)


CASES = {
    "two layers, 2 inputs": ((2, 8, 2), 0),
    "two layers, 3 inputs": ((3, 7, 2), 1),
    "two layers, 4 inputs": ((4, 6, 2), 2),
    "three layers, 2 inputs": ((2, 6, 6, 2), 3),
    "three layers, 3 inputs": ((3, 5, 4, 2), 4),
    "four layers, 2 inputs": ((2, 5, 5, 5, 2), 5),
    "four layers, 4 inputs": ((4, 4, 3, 3, 2), 6),
}


@cache
def relu_case(name: str) -> tuple[Network, Box, tuple[Piece, ...]]:
    sizes, seed = CASES[name]
    network, box = layers(sizes, seed, nn.ReLU), square(sizes[0])
    return network, box, tuple(pieces(network, box))


def judged(claim: Claim, *, timeout: float = 20) -> Verdict:
    verdict = verify(claim, timeout=timeout)
    if isinstance(verdict, Proved):
        assert check(verdict.certificate).accepted
    if isinstance(verdict, Refuted):
        assert bool(claim.region.contains(verdict.witness)[()]) and not claim.holds_at(verdict.witness)
    return verdict


def bounds_hold(network: Network, box: Box, known: Range, *, room: float = 0.01) -> None:
    """The output lies within the range known, and within nothing less."""
    wide = judged(within(network, box, known.least - MARGIN, known.greatest + MARGIN))
    assert isinstance(wide, Proved), wide
    for lower, upper, space in (
        (known.least + MARGIN, None, known.room_below), (None, known.greatest - MARGIN, known.room_above)
    ):  # fmt: skip
        narrow = judged(within(network, box, lower, upper))
        assert isinstance(narrow, Refuted) or (space < room and isinstance(narrow, Unknown)), (narrow, space)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_knows_all_regions(name):
    """Gradients by autograd at random points are among the pieces', and each large piece is met."""
    network, box, known = relu_case(name)
    x = box.samples(2000).requires_grad_()
    y = torch.vmap(network.to(F64))(x)[:, 0, 0]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    rows = torch.tensor(np.array([p.jacobian[0] for p in known]))
    distance = (gradient - rows).abs().amax(-1)  # [points, pieces]
    assert float(distance.amin(1).max()) < 1e-9
    large = torch.tensor([p.radius > 0.1 for p in known])
    assert bool((distance.amin(0)[large] < 1e-9).all()) and len(known) > 4


@pytest.mark.parametrize("name", CASES)
def test_entries_of_relu_gradients(name):
    network, box, known = relu_case(name)
    radii = np.array([p.radius for p in known])
    gradient = network.gradient(of=0)
    for entry in range(2):
        values = np.array([p.jacobian[0, entry] for p in known])
        bounds_hold(gradient.with_outputs(gradient.entry(entry)), box, range_of(values, radii))


@pytest.mark.parametrize("name", CASES)
def test_norms_of_relu_gradients(name):
    """The 1-norm of the gradient: the least Lipschitz constant in the maximum norm."""
    network, box, known = relu_case(name)
    gradient = network.gradient(of=1)
    norm = gradient.with_outputs(Sum((0, 1))(ABS(gradient.output)))
    values = np.array([np.abs(p.jacobian[1]).sum() for p in known])
    bounds_hold(norm, box, range_of(values, np.array([p.radius for p in known])))


class Tilted(nn.Module):
    """A network plus a slope times the first input."""

    def __init__(self, weights: list[tuple[np.ndarray, np.ndarray]], slope: float, activation: type[nn.Module]) -> None:
        super().__init__()
        self.parts, self.slope, self.activation = nn.ModuleList(), slope, activation()
        for weight, bias in weights:
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.weight.data, layer.bias.data = torch.tensor(weight).float(), torch.tensor(bias).float()
            self.parts.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.parts[:-1]:
            y = self.activation(layer(y))
        return self.parts[-1](y)[:, 0] + self.slope * x[:, 0]


def tilted(network: Network, slope: float, activation: type[nn.Module] = nn.ReLU) -> Network:
    module = Tilted(weights_of(network), slope, activation)
    return load(module, torch.zeros(network.input.shape))


@pytest.mark.parametrize("name", CASES)
def test_monotonicity_of_relu_networks(name):
    network, box, known = relu_case(name)
    slopes = np.array([p.jacobian[0, 0] for p in known])
    ends = range_of(slopes, np.array([p.radius for p in known]))
    for increasing, end, room in ((True, ends.least, ends.room_below), (False, ends.greatest, ends.room_above)):
        for margin in (MARGIN, -MARGIN):
            slope = (margin if increasing else -margin) - end
            claim = monotone(tilted(network, slope), box, of=0, entry=0, increasing=increasing)
            verdict = judged(claim)
            if margin > 0:
                assert isinstance(verdict, Proved), verdict
            else:
                assert isinstance(verdict, Refuted) or (room < 0.01 and isinstance(verdict, Unknown)), (verdict, room)


SMOOTH = {"two layers": ((2, 8, 2), 0), "three layers": ((2, 5, 5, 2), 1), "3 inputs": ((3, 5, 2), 2)}


def sampled(network: Network, box: Box, steps: int) -> Tensor:
    """Outputs on a grid and on finer grids around the extremes: [m, outputs]."""
    n = box.shape[1]
    low, high = box.lower[0], box.upper[0]

    def on(low: Tensor, high: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        axes = [torch.linspace(float(a), float(b), steps, dtype=F64) for a, b in zip(low, high, strict=True)]
        x = torch.cartesian_prod(*axes).reshape(-1, n)
        y = [torch.vmap(network.to(F64))(p[:, None]).reshape(len(p), -1) for p in x.split(4096)]
        return x, torch.cat(y)

    x, y = on(low, high, steps)
    found, cell = [y], (high - low) / (steps - 1)
    for best in {*y.argmin(0).tolist(), *y.argmax(0).tolist()}:
        found.append(on((x[best] - cell).maximum(low), (x[best] + cell).minimum(high), 21)[1])
    return torch.cat(found)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize("name", SMOOTH)
def test_entries_and_norms_of_smooth_gradients(name, activation):
    sizes, seed = SMOOTH[name]
    network, box = layers(sizes, seed, activation), square(sizes[0])
    gradient = network.gradient(of=0)
    norm = gradient.with_outputs(Sum((0, 1))(ABS(gradient.output)))
    for function in (gradient.with_outputs(gradient.entry(0)), norm):
        y = sampled(function, box, 101 if sizes[0] == 2 else 31)[:, 0]
        least, greatest = float(y.min()), float(y.max())
        margin = 0.02 * (greatest - least)
        assert isinstance(judged(within(function, box, least - margin, greatest + margin)), Proved)
        assert isinstance(judged(within(function, box, least + margin, None)), Refuted)
        assert isinstance(judged(within(function, box, None, greatest - margin)), Refuted)


def test_monotonicity_of_a_smooth_network():
    network, box = layers((2, 6, 2), 4, nn.Tanh), square(2)
    gradient = network.gradient(of=0)
    y = sampled(gradient.with_outputs(gradient.entry(0)), box, 101)
    for increasing, end in ((True, float(y.min())), (False, float(y.max()))):
        for margin, kind in ((0.01, Proved), (-0.01, Refuted)):
            slope = (margin if increasing else -margin) - end
            claim = monotone(tilted(network, slope, nn.Tanh), box, of=0, entry=0, increasing=increasing)
            assert isinstance(judged(claim), kind)


def test_a_gradient_that_reaches_its_bound_is_not_refuted():
    """The gradient of a dead ReLU is exactly zero: increasing, though no strict bound can say so."""
    network = layers((2, 4, 2), 0, nn.ReLU)
    positive = {name: network.values[node].abs() for name, node in network.parameters.items() if "weight" in name}
    claim = monotone(network.with_values(positive), square(2, 3.0), of=0, entry=1)
    assert not isinstance(judged(claim, timeout=0.5), Refuted)
    assert isinstance(judged(within(claim.network, claim.region, -1e-6, None)), Proved)
