"""The whole of `soundly.verify`, on networks whose truth is known: by integer programming, or by dense grids.

A wrong Proved or Refuted fails whatever the time it took; a claim with some margin must be decided.
"""

import math
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from tests.bounds.samples import made
from torch import Tensor, nn

import soundly
from soundly import Box, Claim, Empty, Proved, Refuted, Union, Unknown, check, robust, top_k, within
from soundly import pairwise as exceeds
from soundly.certificate import Certificate
from soundly.errors import CertificateError, InvalidInput
from soundly.graph.network import Network
from soundly.spec.claim import Property, Row
from soundly.spec.region import Ball
from soundly.verification.verdict import Progress, Verdict
from soundly.verification.verify import verify

F64 = torch.float64


def perceptron(sizes: tuple[int, ...], seed: int, activation: type[nn.Module] = nn.ReLU) -> Network:
    layers: list[nn.Module] = []
    for n, m in pairwise(sizes):
        layers += [nn.Linear(n, m), activation()]
    return made(nn.Sequential(*layers[:-1]), sizes[0], seed=seed)


def square(n: int, half: float = 1.0) -> Box:
    return Box(torch.full((1, n), -half), torch.full((1, n), half))


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def decide(claim: Claim, *, timeout: float = 20, attack: bool = True) -> Verdict:
    """The verdict, which is judged here: witnesses in float64, proofs by the checker."""
    verdict = verify(claim, timeout=timeout, attack=attack)
    match verdict:
        case Refuted(witness, outputs):
            # An input fixed to a decimal may be the float32 number nearest to it.
            outside = max(0.0, float(claim.region.excess(witness)))
            assert witness.shape == claim.region.shape and outside <= 1e-7 * max(1.0, float(witness.abs().max()))
            assert not claim.holds_at(witness, tolerance=outside)
            assert not claim.holds_at(witness, outputs, tolerance=outside)
        case Proved(certificate):
            assert check(certificate).accepted
        case Unknown(bound):
            # What is not decided says how near it came.
            assert math.isfinite(bound)
    return verdict


# -- piecewise linear networks: the exact minimum by mixed-integer programming


def layers_of(network: Network) -> list[tuple[np.ndarray, np.ndarray]]:
    values = {name: network.values[node].double().numpy() for name, node in network.parameters.items()}
    numbers = sorted({int(name.split(".")[0]) for name in values})
    return [(values[f"{k}.weight"], values[f"{k}.bias"]) for k in numbers]


def least(network: Network, box: Box, row: np.ndarray) -> float:
    """The minimum of row . network over a box, of a ReLU network: big-M with interval bounds, solved by HiGHS."""
    low, high = box.lower[0].numpy(), box.upper[0].numpy()
    columns, whole = [*zip(low, high, strict=True)], [0] * len(low)
    rows: list[tuple[dict[int, float], float, float]] = []
    current = list(range(len(low)))
    layers = layers_of(network)
    for k, (weight, bias) in enumerate(layers):
        centre, radius = weight @ ((low + high) / 2) + bias, abs(weight) @ ((high - low) / 2)
        low, high = centre - radius, centre + radius
        after = []
        for n in range(len(bias)):
            z = len(columns)
            columns.append((low[n], high[n]))
            whole.append(0)
            rows.append(({z: -1.0, **dict(zip(current, weight[n], strict=True))}, -bias[n], -bias[n]))
            if k == len(layers) - 1:
                after.append(z)
                continue
            y, on = z + 1, z + 2
            columns += [(max(low[n], 0.0), max(high[n], 0.0)), (0, 1)]
            whole += [0, 1]
            rows.append(({y: 1.0, z: -1.0}, 0.0, np.inf))  # y >= z
            rows.append(({y: 1.0, on: -max(high[n], 0.0)}, -np.inf, 0.0))  # y <= u on
            rows.append(({y: 1.0, z: -1.0, on: -min(low[n], 0.0)}, -np.inf, -min(low[n], 0.0)))  # y <= z - l (1 - on)
            after.append(y)
        current = after
        low, high = (low, high) if k == len(layers) - 1 else (np.maximum(low, 0), np.maximum(high, 0))
    matrix = np.zeros((len(rows), len(columns)))
    for i, (entries, _, _) in enumerate(rows):
        for j, value in entries.items():
            matrix[i, j] += value
    goal = np.zeros(len(columns))
    goal[current] = row
    ends = np.array(columns)
    found = milp(
        goal, constraints=LinearConstraint(matrix, [r[1] for r in rows], [r[2] for r in rows]),
        integrality=whole, bounds=Bounds(ends[:, 0], ends[:, 1]), options={"mip_rel_gap": 1e-9},
    )  # fmt: skip
    assert found.status == 0
    return float(found.fun)


SIZES = {
    "2 inputs": (2, 10, 10, 2),
    "5 inputs": (5, 12, 8, 2),
    "12 inputs": (12, 10, 10, 2),
    "70 inputs": (70, 8, 6, 2),
}


def below(network: Network, region: Box, level: float) -> Claim:
    """The first output exceeds the second by more than `level`."""
    y = {0: Fraction(1), 1: Fraction(-1)}
    row = Row(y, {}, Fraction(round(-level * 2**40), 2**40))
    return Claim(network, region, Property.of([[row]], outputs=2, inputs=region.shape[1]))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", SIZES)
def test_claims_just_beside_the_exact_minimum(name, seed):
    sizes = SIZES[name]
    network, region = perceptron(sizes, seed), square(sizes[0], 0.15 if sizes[0] == 70 else 0.6)
    optimum = least(network, region, np.array([1.0, -1.0]))
    for margin in (1e-2, 1e-3, 1e-4):
        holds = decide(below(network, region, optimum - margin))
        assert isinstance(holds, Proved), (margin, holds)
        fails = decide(below(network, region, optimum + margin), timeout=20 if margin >= 1e-3 else 3)
        assert isinstance(fails, Refuted) or (margin < 1e-3 and isinstance(fails, Unknown)), (margin, fails)
        blind = decide(below(network, region, optimum + margin), timeout=20 if margin >= 1e-2 else 3, attack=False)
        assert isinstance(blind, Refuted) or (margin < 1e-2 and isinstance(blind, Unknown)), (margin, blind)


def test_the_reference_knows_the_minimum():
    """The integer program against a grid: neither above a sample, nor far below all of them."""
    network, region = perceptron((2, 10, 10, 2), 0), square(2, 0.6)
    x = torch.cartesian_prod(torch.linspace(-0.6, 0.6, 201), torch.linspace(-0.6, 0.6, 201))
    y = torch.vmap(network)(x[:, None])[:, 0]
    optimum = least(network, region, np.array([1.0, -1.0]))
    assert optimum - 1e-5 <= float((y[:, 0] - y[:, 1]).min()) <= optimum + 1e-2


# -- other networks: a dense grid


class Mixed(nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.a, self.b, self.c, self.f = nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 2), f

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.f(self.b(self.f(self.a(x)))))


class Pooled(nn.Module):
    """From two numbers to an image, through convolutions and pools."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 36), nn.Conv2d(1, 3, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.b(self.a(x).reshape(1, 1, 6, 6)))
        return self.c(nn.functional.max_pool2d(y, 2).reshape(1, 12))


def _product(x: Tensor) -> Tensor:
    return x * x.flip(-1) + torch.tanh(x)


SMOOTH = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "sin": torch.sin, "gelu": nn.functional.gelu, "product": _product,
    "leaky": lambda x: nn.functional.leaky_relu(x, 0.1), "abs": torch.abs, "silu": nn.functional.silu,
    "hardtanh": nn.functional.hardtanh, "elu": nn.functional.elu,
}  # fmt: skip


def levels(network: Network, region: Box, steps: int = 301) -> tuple[float, float]:
    """The least of output 0 - output 1 over a grid and finer ones around it, and what the last refinement gained."""
    low, high = region.lower[0], region.upper[0]
    found = math.inf
    for _ in range(6):
        axes = [torch.linspace(float(a), float(b), steps if found == math.inf else 41, dtype=F64)
                for a, b in zip(low, high, strict=True)]  # fmt: skip
        x = torch.cartesian_prod(*axes).reshape(-1, len(axes))
        y = torch.cat([torch.vmap(network.to(F64))(part[:, None])[:, 0] for part in x.split(4096)])
        value = y[:, 0] - y[:, 1]
        before, found = found, min(found, float(value.min()))
        best = x[value.argmin()]
        width = (high - low) / 40
        low, high = (best - width).maximum(region.lower[0]), (best + width).minimum(region.upper[0])
    return found, before - found


@pytest.mark.parametrize("name", [*SMOOTH, "pooled"])
def test_claims_beside_the_minimum_of_a_grid(name):
    network = made(Pooled() if name == "pooled" else Mixed(SMOOTH[name]), 2, seed=3)
    region = square(2)
    optimum, error = levels(network, region)
    assert error < 1e-4
    for margin in (3e-2, 3e-3):
        holds = decide(below(network, region, optimum - margin))
        assert isinstance(holds, Proved), (margin, holds)
        for attack in (True, False):
            fails = decide(below(network, region, optimum + margin), attack=attack)
            assert isinstance(fails, Refuted), (margin, attack, fails)


# -- what can be claimed


def test_robustness_ranks_and_pairs():
    network = perceptron((4, 10, 10, 4), 5)
    x = torch.full((1, 4), 0.5)
    y = network(x)[0]
    order = y.argsort(descending=True).tolist()
    for claim in (
        robust(network, x, eps=0.01),
        robust(network, x, eps=0.01, norm="l2"),
        top_k(network, square(4, 0.5).intersect(Box(x - 0.01, x + 0.01)), order[:2], 2),
        exceeds(network, Box(x - 0.01, x + 0.01), order[0], order[-1]),
    ):
        assert isinstance(decide(claim), Proved), claim.name
    for claim in (
        robust(network, x, eps=0.01, label=order[1]),
        robust(network, x, eps=500.0, clip=None),
        top_k(network, Box(x - 0.01, x + 0.01), order[1:3], 2),
        exceeds(network, Box(x - 0.01, x + 0.01), order[-1], order[0]),
    ):
        assert isinstance(decide(claim), Refuted), claim.name


def test_a_ball_is_not_its_box():
    """A claim that fails in the corners of the box alone is not refuted, nor is a claim refuted outside the ball."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    network = soundly.load(layer, torch.zeros(1, 2))
    ball = Ball(torch.zeros(1, 2), 1.0, "l2")
    below_corner = within(network, ball, None, 1.9)  # sqrt 2 in the ball, 2 in the box
    assert isinstance(verify(below_corner, timeout=0.5), (Proved, Unknown))
    assert isinstance(decide(within(network, ball, None, 1.3)), Refuted)
    assert isinstance(decide(within(network, ball, None, 2.1)), Proved)


def rows(*terms: tuple[dict[int, float], dict[int, float], float]) -> list[Row]:
    return [
        Row(
            {j: Fraction(w) for j, w in y.items()}, {i: Fraction(v) for i, v in x.items()}, Fraction(b)
        )
        for y, x, b in terms
    ]  # fmt: skip


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_conjunctions_over_outputs_and_inputs(activation):
    """A clause is a counterexample only where all its rows hold, whichever reads inputs: against a grid."""
    network, region = perceptron((2, 8, 8, 3), 1, activation), square(2)
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 201, dtype=F64)] * 2)
    y = torch.vmap(network.to(F64))(grid[:, None])[:, 0]
    centre = float(y[:, 0].median())
    conjunction = torch.maximum(torch.maximum(y[:, 0] - centre, centre - y[:, 0] - 0.01), grid[:, 0] + y[:, 1])
    optimum = float(conjunction.min())
    seen = set()
    for shift in (0.05, -0.05):
        level = round((optimum - shift) * 2**30) / 2**30
        clause = rows(
            ({0: 1.0}, {}, -centre - level), ({0: -1.0}, {}, centre - 0.01 - level), ({1: 1.0}, {0: 1.0}, -level)
        )
        other = rows(({2: 1.0}, {1: 0.5}, 100.0))  # never true
        claim = Claim(network, region, Property.of([other, clause], outputs=3, inputs=2))
        verdict = decide(claim)
        assert isinstance(verdict, Proved if shift > 0 else Refuted), (shift, verdict)
        seen.add(type(verdict))
    assert seen == {Proved, Refuted}


def test_unions_prove_every_box():
    network = perceptron((2, 10, 10, 2), 2)
    boxes = [Box(f64(a, b)[None], f64(a + 0.4, b + 0.4)[None]) for a, b in ((-1, -1), (0.3, 0.2), (-0.5, 0.6))]
    optima = [least(network, box, np.array([1.0, -1.0])) for box in boxes]
    region, lowest = Union.of(boxes), min(optima)
    assert isinstance(decide(below(network, region, lowest - 1e-2)), Proved)
    verdict = decide(below(network, region, lowest + 1e-2))
    assert isinstance(verdict, Refuted) and boxes[int(np.argmin(optima))].contains(verdict.witness)[()]
    # With clauses of its own each box needs its own level alone.
    y = {0: Fraction(1), 1: Fraction(-1)}
    for shift, kind in ((-1e-2, Proved), (1e-2, Refuted)):
        clauses = [[Row(y, {}, -Fraction(round((o + shift) * 2**30), 2**30))] for o in optima]
        spans = torch.tensor([[0, 1], [1, 2], [2, 3]])
        claim = Claim(network, region, Property.of(clauses, outputs=2, inputs=2), spans=spans)
        assert isinstance(decide(claim), kind)


def test_wide_unions_are_settled_box_by_box():
    """Many inputs vary, so neurons are split in each box."""
    network = perceptron((70, 8, 6, 2), 1)
    boxes = [Box(torch.full((1, 70), a), torch.full((1, 70), a + 0.2)) for a in (-0.2, 0.1)]
    lowest = min(least(network, box, np.array([1.0, -1.0])) for box in boxes)
    assert isinstance(decide(below(network, Union.of(boxes), lowest - 1e-2)), Proved)
    assert isinstance(decide(below(network, Union.of(boxes), lowest + 1e-2)), Refuted)


def test_constant_inputs():
    network = perceptron((4, 10, 10, 2), 3)
    low, high = f64(-0.5, 0.25, -0.7, 0.1)[None], f64(0.5, 0.25, 0.2, 0.1)[None]
    optimum = least(network, Box(low, high), np.array([1.0, -1.0]))
    assert isinstance(decide(below(network, Box(low, high), optimum - 1e-3)), Proved)
    assert isinstance(decide(below(network, Box(low, high), optimum + 1e-3)), Refuted)
    # One point: nothing can be split.
    y = network.to(F64)(low)[0]
    value = float(y[0] - y[1])
    assert isinstance(decide(below(network, Box(low, low), value - 1e-6)), Proved)
    assert isinstance(decide(below(network, Box(low, low), value + 1e-3)), Refuted)


def test_empty_regions_claim_nothing():
    network = perceptron((2, 4, 2), 0)
    empty = Box(torch.ones(1, 2), torch.zeros(1, 2))
    assert isinstance(verify(within(network, empty, 0.0, 0.0)), Empty)
    assert isinstance(verify(within(network, Union.of([empty, empty]), 0.0, 0.0)), Empty)
    mixed = Union.of([empty, Box(torch.zeros(1, 2), torch.zeros(1, 2))])
    assert isinstance(decide(within(network, mixed, -100.0, 100.0)), Proved)


def test_a_property_without_counterexamples():
    """Bounds at infinity: nothing can violate them, nothing is claimed."""
    network = perceptron((2, 4, 2), 0)
    claim = within(network, square(2), -math.inf, math.inf)
    assert claim.property.clauses == 0
    assert isinstance(verify(claim, timeout=5), Empty)


def test_a_clause_that_is_always_true():
    """A clause without rows makes every input a counterexample."""
    network = perceptron((2, 4, 2), 0)
    claim = Claim(network, square(2), Property.of([rows(({0: 1.0}, {}, 100.0)), []], outputs=2, inputs=2))
    assert isinstance(decide(claim), Refuted)


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 5), nn.Linear(3, 5)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            z = torch.relu(self.a(x)) - torch.relu(self.b(y))
            return z, z.sum(-1)

    torch.manual_seed(1)
    network = soundly.load(Two(), (torch.zeros(1, 2), torch.zeros(1, 3)))
    region = soundly.join(square(2), square(3))
    x = region.corners(32)
    y = torch.stack([torch.cat([v.reshape(-1) for v in network.to(F64)(p[None, :2], p[None, 2:])]) for p in x])
    assert isinstance(decide(within(network, region, y.amin(0) - 3, y.amax(0) + 3)), Proved)
    verdict = decide(within(network, region, y.amin(0) - 3, y.amax(0) - 0.1))
    assert isinstance(verdict, Refuted) and verdict.witness.shape == (5,)


# -- limits


def hard() -> Claim:
    """True, and out of reach within seconds."""
    network = perceptron((40, 60, 60, 60, 2), 7)
    x = square(40, 1.0).samples(4000)
    y = torch.vmap(network)(x.float())[:, 0]
    return below(network, square(40, 1.0), float((y[:, 0] - y[:, 1]).min()) * 1.0 - 1.0)


@pytest.fixture(scope="module")
def hard_claim() -> Claim:
    return hard()


@pytest.mark.parametrize("timeout", [0.05, 1.5])
@pytest.mark.parametrize("attack", [True, False])
def test_time_limits_are_kept(hard_claim, timeout, attack):
    begun = time.monotonic()
    verdict = verify(hard_claim, timeout=timeout, attack=attack)
    spent = time.monotonic() - begun
    assert spent < timeout + 1
    if isinstance(verdict, Unknown):
        assert "time" in verdict.reason and 0 < verdict.open <= 1
        assert timeout < 1 or (math.isfinite(verdict.bound) and verdict.bound < 0)
        assert verdict.effort.seconds <= spent
    else:
        assert isinstance(verdict, Refuted) and not hard_claim.holds_at(verdict.witness)


def test_interrupting_returns_what_is_known(hard_claim):
    told: list[Progress] = []

    def interrupt(progress: Progress) -> None:
        told.append(progress)
        if len(told) == 2:
            raise KeyboardInterrupt

    verdict = verify(hard_claim, timeout=30, attack=False, progress=interrupt)
    assert isinstance(verdict, Unknown) and verdict.reason == "interrupted"
    assert math.isfinite(verdict.bound) and verdict.bound == told[-1].bound
    assert told[0].seconds <= told[1].seconds and told[0].subproblems <= told[1].subproblems


def test_memory_limits_end_the_search(hard_claim):
    verdict = verify(hard_claim, timeout=30, attack=False, memory=1)
    assert isinstance(verdict, Unknown) and "memory" in verdict.reason and verdict.effort.seconds < 10


def test_errors_of_callers():
    network = perceptron((2, 4, 2), 0)
    with pytest.raises(InvalidInput, match="give a Claim"):
        verify(network)  # type: ignore[arg-type]
    for timeout in (0, -1.0, math.nan):
        with pytest.raises(InvalidInput, match="timeout"):
            verify(within(network, square(2), 0, 0), timeout=timeout)


# -- numbers that prove nothing


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308])
@pytest.mark.parametrize("where", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_weights_that_are_not_numbers_prove_nothing(where, value):
    network = perceptron((2, 4, 2), 0).to(F64)
    broken = network.parameters[where]
    weights = network.values[broken].clone()
    weights.view(-1)[0] = value
    claim = within(network.with_values({where: weights}), square(2), -100.0, 100.0)
    verdict = verify(claim, timeout=3)
    assert not isinstance(verdict, Proved)


def test_a_strict_minimum_is_neither_proved_nor_refuted():
    """relu(x) >= 0 holds with equality: no bound is above zero, and no point below."""
    network = soundly.load(nn.ReLU(), torch.zeros(1, 2))
    verdict = verify(within(network, square(2), 0.0, None), timeout=0.5)
    assert isinstance(verdict, (Proved, Unknown))
    assert not isinstance(verify(within(network, square(2), 1e-9, None), timeout=0.5), Proved)


# -- certificates

CHECKER = """
import sys
from soundly.certificate import check
for path in sys.argv[1:]:
    result = check(path)
    print(result.accepted, result.rows, result.proven)
assert "torch" not in sys.modules and "scipy" not in sys.modules
"""


def true_claims() -> dict[str, Claim]:
    """One of every kind, proved at the root, by splitting inputs and by splitting neurons."""
    found = {}
    for name, sizes in SIZES.items():
        network, region = perceptron(sizes, 1), square(sizes[0], 0.15 if sizes[0] == 70 else 0.6)
        optimum = least(network, region, np.array([1.0, -1.0]))
        found[name] = below(network, region, optimum - 1e-2)
        found[f"{name}, easy"] = below(network, region, optimum - 10)
    for name in (*SMOOTH, "pooled"):
        network = made(Pooled() if name == "pooled" else Mixed(SMOOTH[name]), 2, seed=3)
        found[name] = below(network, square(2, 0.5), levels(network, square(2, 0.5), 41)[0] - 0.05)
    network = perceptron((2, 8, 8, 3), 1)
    low = torch.tensor([[[-1.0, -1.0]], [[0.0, 0.5]]])
    y = torch.vmap(network)(Union(low, low + 0.5).samples(500).float())[:, 0]
    clauses = [rows(({j: 1.0}, {0: 0.25}, 1.5 - float(y[:, j].min())), ({1: -1.0}, {}, 0.0)) for j in (0, 2)]
    spans = torch.tensor([[0, 2], [1, 2]])
    found["union"] = Claim(network, Union(low, low + 0.5), Property.of(clauses, outputs=3, inputs=2), spans=spans)
    return found


def test_a_fresh_process_accepts_every_proof(tmp_path):
    proofs, settled = [], set()
    for name, claim in true_claims().items():
        verdict = verify(claim, timeout=20)
        assert isinstance(verdict, Proved), (name, verdict)
        proofs.append((verdict.certificate, claim))
        settled.add(verdict.effort.settled)
    assert settled == {"root bound", "input splitting", "neuron splitting"}
    paths = [tmp_path / f"{k}.cert" for k in range(len(proofs))]
    for path, (certificate, _) in zip(paths, proofs, strict=True):
        certificate.save(path)
    found = subprocess.run(
        [sys.executable, "-c", CHECKER, *map(str, paths)], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(Path(soundly.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = found.stdout.splitlines()
    assert len(lines) == len(paths)
    for line, (_, claim) in zip(lines, proofs, strict=True):
        accepted, count, proven = line.split()
        clauses = claim.property.clauses
        if isinstance(claim.region, Union):
            spans = claim.spans if claim.spans is not None else torch.tensor([[0, clauses]] * len(claim.region))
            clauses = int((spans[:, 1] - spans[:, 0])[claim.region.filled].sum())
        assert accepted == "True" and int(count) == int(proven) == clauses


@pytest.fixture(scope="module")
def proof() -> tuple[Certificate, Claim]:
    network, region = perceptron((2, 10, 10, 2), 0), square(2, 0.6)
    claim = below(network, region, least(network, region, np.array([1.0, -1.0])) - 1e-2)
    verdict = verify(claim, timeout=20)
    assert isinstance(verdict, Proved)
    return verdict.certificate, claim


def test_a_certificate_holds_the_claim(proof):
    """Box, row and weights of the certificate are the claim's, bit by bit."""
    certificate, claim = proof
    arrays = certificate.arrays
    assert np.array_equal(arrays["box_lower"], claim.region.lower.numpy().reshape(1, -1))
    assert np.array_equal(arrays["box_upper"], claim.region.upper.numpy().reshape(1, -1))
    assert arrays["row_column"].tolist() == [0, 1] and arrays["row_value"].tolist() == [1.0, -1.0]
    assert arrays["row_constant"].tolist() == claim.property.b.tolist()
    affine = [step for step in certificate.header["program"] if step["step"] == "affine"]
    for step, (weight, bias) in zip(affine, layers_of(claim.network), strict=True):
        assert np.array_equal(arrays[step["parts"][0]["array"]], weight) and np.array_equal(arrays[step["bias"]], bias)


@pytest.mark.parametrize("name", ["weights", "box_upper", "row_constant", "at"])
def test_altered_arrays_are_noticed(proof, tmp_path, name):
    """In the file the digest fails; in memory a proof of something else is made, and not by chance."""
    certificate, _ = proof
    if name == "weights":
        name = next(s["parts"][0]["array"] for s in certificate.header["program"] if s["step"] == "affine")
    path = tmp_path / "proof.cert"
    certificate.save(path)
    assert check(path).accepted
    data = bytearray(path.read_bytes())
    # One byte of the array, wherever the file keeps it.
    at = data.find(np.ascontiguousarray(certificate.arrays[name]).tobytes())
    assert at >= 0
    data[at + certificate.arrays[name].nbytes - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CertificateError):
        assert check(path).accepted
    changed = dict(certificate.arrays)
    changed[name] = np.array(changed[name] + 5.0 * (-1 if name == "row_constant" else 1), changed[name].dtype)
    forged = Certificate(certificate.header, changed)
    assert not check(forged).accepted


def test_the_words_of_a_certificate(proof):
    certificate, claim = proof
    assert certificate.header["claim"] == claim.name and certificate.kind == "verification"
    assert "torch" in certificate.header["made_with"] and certificate.header["model"] == {}


def test_nothing_is_proved_without_an_accepted_certificate(monkeypatch, proof):
    """Were the checker to refuse everything, the answer would be Unknown."""
    import soundly.verification.verify as module

    _, claim = proof
    accepted = module.replay_proof(proof[0].certificate if hasattr(proof[0], "certificate") else proof[0])
    assert bool(accepted.proven.all()) and not accepted.failed

    def refuse(certificate, *, deadline=None):
        return replace(accepted, proven=~accepted.proven)

    monkeypatch.setattr(module, "replay_proof", refuse)
    verdict = verify(claim, timeout=10)
    assert isinstance(verdict, Unknown) and "certificate" in verdict.reason


@pytest.mark.parametrize("margin", [1e-2, -1e-2])
def test_a_faulty_search_proves_nothing_false(monkeypatch, margin):
    """Bounds that are too high by 0.1: false claims are never proved, for the checker finds the leaves open."""
    from soundly.bounds import frame

    real = frame.Pass.least
    monkeypatch.setattr(frame.Pass, "least", lambda self, low, high: real(self, low, high) + 0.1)
    network, region = perceptron((2, 10, 10, 2), 0), square(2, 0.6)
    optimum = least(network, region, np.array([1.0, -1.0]))
    verdict = verify(below(network, region, optimum + margin), timeout=1.5, attack=False)
    assert not isinstance(verdict, Proved if margin > 0 else Refuted)
