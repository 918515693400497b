"""Products bounded together: no row falls below its bound, squares cost nothing, and faults in that are found."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.bounds.samples import made
from torch import Tensor, nn

from soundly.bounds import products
from soundly.bounds.batch import Bounder
from soundly.bounds.frame import Start
from soundly.bounds.lower import lower
from soundly.bounds.program import Program, Times

F64 = torch.float64


class Energy(nn.Module):
    """By how much a quadratic energy falls in one step under a small controller; and the energy."""

    def __init__(self) -> None:
        super().__init__()
        self.control, self.push, self.root = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        after = 0.8 * x + 0.1 * self.push(torch.relu(self.control(x))) + 0.1 * torch.sin(x)
        now, then = ((v * self.root(v)).sum(-1) for v in (x, after))
        return torch.stack([now - then, x.square().sum(-1) + (x * x).sum(-1), then], -1)


@pytest.fixture(scope="module")
def program() -> Program:
    return lower(made(Energy(), 3, seed=3))


def boxes(seed: int, count: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(count, 3, generator=generator, dtype=F64)
    radius = (
        torch.rand(count, 3, generator=generator, dtype=F64) * 10 ** -torch.rand(count, 1, generator=generator).double()
    )
    return centre - radius, centre + radius


def bounded(program: Program, low: Tensor, high: Tensor, together: bool) -> Tensor:
    """Lower bounds [boxes, rows] of +- every output."""
    bounder = Bounder(program, together=together)
    frame = bounder.refresh(low, high)
    assert (frame.factors is not None) == together
    rows = torch.cat([torch.eye(program.outputs, dtype=F64), -torch.eye(program.outputs, dtype=F64)])
    owner = torch.arange(len(low)).repeat_interleave(len(rows))
    start = Start({len(program.steps) - 1: rows.repeat(len(low), 1)}, torch.zeros(len(owner), dtype=F64), owner)
    found = bounder.backward(frame, frame.known, start)
    return found.least(low[owner], high[owner]).reshape(len(low), -1)


def escapes(program: Program) -> Iterator[str]:
    """Values of rows that lie below their bounds."""
    low, high = boxes(1)
    bounds = bounded(program, low, high, True)
    generator = torch.Generator().manual_seed(2)
    share = torch.rand(400, len(low), 3, generator=generator, dtype=F64)
    share[200:] = share[200:].round()
    y = program.evaluate(low + share * (high - low))[-1]
    least = torch.cat([y, -y], -1).amin(0)
    for box, row in (least < bounds - 1e-9 * (1 + bounds.abs())).nonzero().tolist():
        yield f"row {row} in box {box}"
    forms = torch.randn(200, 4, 4, generator=generator, dtype=F64)
    e = torch.rand(500, 4, generator=generator, dtype=F64) * 2 - 1
    e[250:] = e[250:].sign()
    values = torch.einsum("pi,rij,pj->rp", e, forms, e)
    if bool((values.amin(1) < products.least(forms) - 1e-9).any()):
        yield "a quadratic form"


def test_no_row_falls_below_its_bound(program):
    assert list(escapes(program)) == []


def test_together_they_lose_less(program):
    low, high = boxes(4)
    apart, together = (bounded(program, low, high, way) for way in (False, True))
    assert bool((together > apart)[:, [0, 2, 3, 5]].all())  # the others are squares, no products
    loss = (boxes_least(program, low, high)[:, None] - torch.stack([apart, together], 1)).mean((0, 2))
    assert float(loss[1]) < 0.7 * float(loss[0])


def boxes_least(program: Program, low: Tensor, high: Tensor) -> Tensor:
    share = torch.rand(2000, len(low), 3, generator=torch.Generator().manual_seed(5), dtype=F64)
    y = program.evaluate(low + share * (high - low))[-1]
    return torch.cat([y, -y], -1).amin(0)


def test_squares_are_not_negative():
    v = torch.randn(50, 2, 5, generator=torch.Generator().manual_seed(6), dtype=F64)
    form = v.transpose(1, 2) @ v
    assert bool((products.least(form) > -1e-9).all())
    assert products.least(torch.diag_embed(torch.tensor([[1.0, -2.0, 0.5]]))).tolist() == [-2.0]


def test_products_that_something_reads_stay_alone():
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x * x.flip(-1)) * x

    steps = lower(made(Inner(), 3, seed=0)).steps
    found = products.last_products(steps)
    assert found is not None
    alone = [i for i, step in enumerate(steps) if isinstance(step, Times) and i not in found.products]
    assert len(found.products) == len(alone) == 1 and alone[0] < min(found.products)


FAULTS = {
    "squares that are none": lambda q: products._dominated((q + q.transpose(1, 2)) / 2).clamp(min=-0.1),
    "the diagonal alone": lambda q: q.diagonal(dim1=1, dim2=2).clamp(max=0).sum(-1),
    "nothing is left": lambda q: torch.zeros(len(q), dtype=q.dtype),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str, program: Program, monkeypatch: Any) -> None:
    monkeypatch.setattr(products, "least", FAULTS[name])
    assert next(escapes(program), None) is not None
