"""Planted instances are what they say: the point violates the claim, nothing away from it does, robust ones hold."""

import itertools
import math
from fractions import Fraction

import onnx
import pytest
import torch

from soundly.auditing import planting
from soundly.auditing.plain import plain
from soundly.auditing.planting import BUMPS, HOSTS, POSITIONS, Instance, instance
from soundly.errors import InvalidInput
from soundly.graph.to_onnx import to_onnx

F64 = torch.float64


def gaps(made: Instance, x: torch.Tensor) -> torch.Tensor:
    """Output 0 - output 1 at points, in float64."""
    y = torch.vmap(made.network.to(F64))(x).reshape(-1, 2)
    return y[:, 0] - y[:, 1]


def points(made: Instance, count: int, seed: int = 0) -> torch.Tensor:
    """Half corners, half random points."""
    share = torch.rand(count, *made.lower.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    share[::2] = share[::2].round()
    return made.lower + share * (made.upper - made.lower)


@pytest.mark.parametrize("bump", BUMPS)
def test_the_planted_point_violates_the_claim_and_is_hidden(bump) -> None:
    for k, (position, margin) in enumerate(itertools.product(POSITIONS, (1e-2, 1e-9))):
        shape = (1, 8) if k % 2 else (1, 2, 2, 2)
        made = instance(host=HOSTS[k % len(HOSTS)], bump=bump, position=position, margin=margin, shape=shape, seed=k)
        assert not made.holds and made.witness is not None
        assert bool(((made.witness >= made.lower) & (made.witness <= made.upper)).all())
        (gap,) = gaps(made, made.witness[None])
        assert -float(gap) == pytest.approx(margin, rel=1e-3) and made.margin == pytest.approx(margin, rel=1e-3)
        away = points(made, 400)
        away = away[((away - made.witness).abs().flatten(1).amax(1) > 0.06)]
        assert len(away) > 300 and float(gaps(made, away).min()) > 0.5, "nothing but the bump violates it"
        ends = (made.witness == made.lower) | (made.witness == made.upper)
        assert {"corner": bool(ends.all()), "face": bool(ends.any()), "interior": not bool(ends.any())}[position]


@pytest.mark.parametrize("host", HOSTS)
def test_robust_instances_hold_by_their_margin(host) -> None:
    for k, bump in enumerate((None, "relu", "softmax", "conv")):
        made = instance(host=host, bump=bump, position=POSITIONS[k % 3], margin=1e-3, holds=True, shape=(1, 4), seed=k)
        least = float(gaps(made, points(made, 2000)).min())
        assert made.holds and made.witness is None and made.margin == pytest.approx(1e-3, rel=1e-3)
        assert least >= made.margin - 1e-12
        if bump is None:  # then the margin is taken, at the corner
            assert least == pytest.approx(made.margin, rel=1e-6)


@pytest.mark.parametrize("margin", [1e-3, 1e-9])
def test_a_host_alone_fails_at_its_corner_by_the_margin(margin) -> None:
    made = instance(host="tanh", bump=None, margin=margin, shape=(1, 5), seed=4)
    assert made.witness is not None
    assert -float(gaps(made, made.witness[None])[0]) == pytest.approx(margin, rel=1e-3)
    inner = made.lower + 0.5 * (made.upper - made.lower) * (1 + 0.98 * (2 * torch.rand(500, 1, 5, dtype=F64) - 1))
    assert float(gaps(made, inner).min()) > 0


def test_the_answer_is_exact_in_rational_arithmetic() -> None:
    """Of ReLUs alone, all numbers are dyadic but the slopes: the margin in fractions, by the definition."""
    made = instance(host="relu", bump="relu", margin=1e-9, shape=(1, 3), radius=0.0625, seed=1)
    assert made.witness is not None
    network = made.network
    stored = {n.op.name: v.double().flatten().tolist() for n, v in network.values.items()}  # type: ignore[attr-defined]
    centre, slopes, top, point = (list(map(Fraction, v)) for v in stored.values())
    combine = next(n.op for n in network.nodes if getattr(n.op, "coefficients", (0,))[0] > 1e-2 and len(n.inputs) == 2
                   and n.inputs[0] is n.inputs[1])  # fmt: skip
    x = list(map(Fraction, made.witness.flatten().tolist()))
    assert x == point
    wall = top[0] - sum(s * abs(a - c) for s, a, c in zip(slopes, x, centre, strict=True))
    height = sum(map(Fraction, combine.coefficients))  # type: ignore[attr-defined]
    assert 0 < height - wall and math.isclose(float(height - wall), 1e-9, rel_tol=1e-4)


def test_what_cannot_be_told_apart_is_refused() -> None:
    for wrong in (
        {"margin": 1e-13},
        {"margin": 0.0},
        {"radius": -1.0},
        {"position": "edge"},
        {"host": "?"},
        {"bump": "?"},
    ):
        with pytest.raises(InvalidInput):
            instance(**{"shape": (1, 4), **wrong})


def test_a_bump_too_low_is_noticed(monkeypatch) -> None:
    """A fault of planting itself: the height without its second part, and a little less."""
    monkeypatch.setattr(planting, "two_parts", lambda q, *, down: (float(q) * 0.999, 0.0))
    with pytest.raises(InvalidInput, match=r"no counterexample|below what float64"):
        instance(margin=1e-6)


@pytest.mark.parametrize(("holds", "margin"), [(False, 1e-2), (False, 1e-9), (True, 1e-4), (True, 1e-9)])
def test_plain_instances_are_exact_and_made_of_what_every_tool_reads(holds, margin, tmp_path) -> None:
    for seed, position in enumerate(POSITIONS):
        made = plain(position=position, size=5, margin=margin, holds=holds, seed=seed)
        values = {n.op.name: v.double() for n, v in made.network.values.items()}  # type: ignore[attr-defined]

        def gap(x: list[Fraction], values=values) -> Fraction:
            """Output 0 - output 1 in fractions, from the weights as stored."""
            for k in (0, 2, 4):
                w, b = (values[f"{k}.{part}"].tolist() for part in ("weight", "bias"))
                x = [sum((Fraction(a) * t for a, t in zip(row, x, strict=True)), Fraction(c))
                     for row, c in zip(w, b, strict=True)]  # fmt: skip
                x = x if k == 4 else [max(t, Fraction(0)) for t in x]
            return x[0] - x[1]

        if holds:
            assert made.witness is None
            some = [made.upper, *points(made, 20)]
            least = min(gap(list(map(Fraction, x.flatten().tolist()))) for x in some)
            assert float(least) >= made.margin * (1 - 1e-5) and made.margin == pytest.approx(margin, rel=1e-5)
        else:
            assert made.witness is not None
            depth = -float(gap(list(map(Fraction, made.witness.flatten().tolist()))))
            assert depth == pytest.approx(margin, rel=1e-5) and made.margin == pytest.approx(depth, rel=1e-5)
            some = points(made, 300)
            some = some[(some - made.witness).abs().flatten(1).amax(1) > 0.07]
            assert len(some) > 200 and float(gaps(made, some).min()) > 0.5
        to_onnx(made.network, tmp_path / "a.onnx")
        kinds = {node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node}
        assert kinds <= {"Gemm", "Add", "Relu", "Reshape", "Constant"}


def test_plain_instances_need_exact_weights() -> None:
    with pytest.raises(InvalidInput, match="2\\^k"):
        plain(radius=0.05)
    with pytest.raises(InvalidInput, match="choose one of"):
        plain(position="edge")
