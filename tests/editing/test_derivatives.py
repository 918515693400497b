"""Derivatives of higher order, Laplacians and residuals of differential equations, against nested autograd."""

import copy
import itertools

import pytest
import torch
from tests.editing.edits import exact_rows, of_kind
from tests.editing.test_trunk import Cnn, Decoder, Mlp, made
from torch import Tensor, nn

import soundly
from soundly import at, over
from soundly.editing.evidence import quantity
from soundly.editing.trunk import GraphTrunk, trunk_of
from soundly.errors import EditError, InvalidInput

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def derivative(function, x: Tensor, along: list[Tensor]) -> Tensor:
    """The directional derivative of a function with one value, by reverse-mode autograd, one order after another."""
    x = x.detach().double().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        y = function(x)
    for direction in along:
        if not y.requires_grad:
            return torch.zeros(())
        (slope,) = torch.autograd.grad(y, x, create_graph=True, allow_unused=True)
        y = torch.zeros(()) if slope is None else (slope * direction).sum()
    return y.detach()


def units(x: Tensor, *entries: int) -> list[Tensor]:
    return [torch.eye(x.numel()).double()[i].reshape(x.shape) for i in entries]


def agree(trunk, model: nn.Module, x: Tensor, order: int) -> bool:
    """Whether a trunk's derivatives along random directions are those of autograd, feature by feature.

    The third is a difference of autograd's second ones: torch's own (2.13) is wrong for the decoder, by that measure.
    """
    draw = torch.Generator().manual_seed(order)
    along = [torch.randn(2, *x.shape, generator=draw, dtype=torch.float64) for _ in range(order)]
    found = trunk.tangents(x, None, *along)
    model.eval()
    for m, position, k in itertools.product(range(2), range(found.shape[1]), range(0, found.shape[2], 3)):

        def feature(z: Tensor, p: int = position, k: int = k) -> Tensor:
            return model.trunk(z).reshape(-1, found.shape[2])[p, k]

        first = [d[m] for d in along[:2]]
        if order < 3:
            close, wanted = 1e-9, derivative(feature, x, first)
        else:
            step = 1e-4 * along[2][m]
            close = 1e-5
            wanted = (derivative(feature, x + step, first) - derivative(feature, x - step, first)) / 2e-4
        if not torch.allclose(found[m, position, k], wanted, rtol=close, atol=close):
            return False
    return True


@pytest.mark.parametrize("kind", [Mlp, Cnn, Decoder])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("form", ["graph", "module"])
def test_features_move_as_autograd_says(kind, order, form):
    model, x = made(kind)
    trunk = trunk_of(of_kind(form, model, x), "fc")
    if form == "module" and kind is not Cnn and order > 1:  # torch 2.13 differentiates SiLU forward only once
        with pytest.raises(EditError, match=r"soundly\.load"):
            agree(trunk, model, x, order)
    else:
        assert agree(trunk, model, x, order)


WRONG = {
    "a direction forgotten": lambda honest: lambda self, x, place, *along: honest(self, x, place, *along[:-1]),
    "a direction twice": lambda honest: lambda self, x, place, *along: honest(self, x, place, along[0], along[0]),
    "half": lambda honest: lambda self, x, place, *along: honest(self, x, place, *along) / 2,
    "another row": lambda honest: lambda self, x, place, *along: honest(self, x, place, along[0], along[1].flip(0)),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_derivatives_disagree(fault, monkeypatch):
    model, x = made(Mlp)
    monkeypatch.setattr(GraphTrunk, "tangents", WRONG[fault](GraphTrunk.tangents))
    assert not agree(trunk_of(soundly.load(model, x), "fc"), model, x, 2)


@pytest.mark.parametrize("of", [0, 2])
def test_quantities_of_a_graph(of):
    """What an inner edit sees."""
    model, x = made(Mlp)
    network, p = soundly.load(model, x), at(x)
    model.eval()
    hessian = torch.autograd.functional.hessian(lambda z: model(z)[0, of], x).reshape(4, 4)
    third = derivative(lambda z: model(z)[0, of], x, [*units(x, 0, 1), torch.ones_like(x)])
    for expression, wanted in (
        (p.derivative(of, [1, 3]), hessian[1, 3]),
        (p.derivative(of, [2]), torch.autograd.functional.jacobian(lambda z: model(z)[0, of], x)[0, 2]),
        (p.derivative(of, [0, 1, torch.ones_like(x)]), third),
    ):
        (term,) = expression.terms
        assert torch.allclose(quantity(network, term.functional)(x), wanted.reshape(1), rtol=1e-9, atol=1e-12)
    (term,) = p.laplacian(of, entries=[0, 2]).terms
    found = term.matrix @ quantity(network, term.functional)(x)
    assert torch.allclose(found, (hessian[0, 0] + hessian[2, 2]).reshape(1), rtol=1e-9)


# -- differential equations: u(t, z)


class Wave(nn.Module):
    """A smooth function of time and place."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.fc = nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.b(torch.tanh(self.a(x)))))


def heat(u: nn.Module, x: Tensor) -> float:
    """u_t - u_zz / 10."""
    wide = copy.deepcopy(u).double()
    time, place = units(x, 0, 1)
    parts = [derivative(lambda z: wide(z)[0, 0], x, along) for along in ([time], [place, place])]
    return float(parts[0] - 0.1 * parts[1])


def residual(p) -> soundly.editing.constraints.Expression:  # type: ignore[name-defined]
    return p.derivative(0, [0]) - 0.1 * p.derivative(0, [1, 1])


GRID = [torch.tensor([[t, z]]) for t in (0.1, 0.5, 0.9) for z in (0.2, 0.5, 0.8)]


@pytest.mark.parametrize(("layer", "kind"), [("fc", "graph"), ("fc", "module"), ("b", "graph")])
def test_a_residual_at_collocation_points(layer, kind):
    u = Wave(0)
    start = at(torch.tensor([[0.0, 0.5]])).output(0).within(0.4, 0.6)
    constraints = [residual(at(x, name=f"u{x.tolist()}")).within(-1e-3, 1e-3) for x in GRID]
    assert max(abs(heat(u, x)) for x in GRID) > 0.05
    edit = soundly.edit(of_kind(kind, u, GRID[0]), [*constraints, start], layer=layer)
    assert edit.status == "proved", edit.reason
    edited = edit.applied_to(u) if kind == "graph" else edit.model
    # The last layer's features are those of float32; autograd computes in float64.
    assert max(abs(heat(edited, x)) for x in GRID) <= 1e-3 + (1e-6 if layer == "fc" else 0.0)
    assert 0.4 <= float(edited(torch.tensor([[0.0, 0.5]])).detach()) <= 0.6
    if layer == "fc":
        assert exact_rows(edit)


def test_a_laplacian_is_capped_on_a_region():
    torch.manual_seed(1)
    u = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    box = soundly.Box(torch.full((1, 2), -0.2), torch.full((1, 2), 0.2))
    network, wide = soundly.load(u, torch.zeros(1, 2)), copy.deepcopy(u).double()

    def laplacian(model: nn.Module, x: Tensor) -> float:
        return sum(float(derivative(lambda z: model(z)[0, 0], x, units(x, i, i))) for i in (0, 1))

    most = max(laplacian(wide, x) for x in box.samples(200))
    edit = soundly.edit(network, [over(box).laplacian(0).at_most(most - 0.02)], layer="2", time_limit=100)
    assert edit.status == "proved", edit.reason
    edited = copy.deepcopy(edit.applied_to(u)).double()
    assert max(laplacian(edited, x) for x in [*box.samples(200), *box.corners(4)]) <= most - 0.02


def test_the_second_derivative_of_a_piecewise_linear_network_is_zero():
    torch.manual_seed(0)
    u = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    edit = soundly.edit(
        soundly.load(u, torch.zeros(1, 2)), [at(torch.ones(1, 2)).laplacian(0).at_least(1.0)], layer="2"
    )
    assert edit.status == "infeasible" and edit.conflict == ("Laplacian of 0 at x",)


def test_what_does_not_fit_is_refused():
    model, x = made(Mlp)
    p = at(x)
    for wrong in ([], [4], [-1], [0, 7]):
        with pytest.raises(InvalidInput, match=r"along what|entries of the input"):
            p.derivative(0, wrong)
    with pytest.raises(InvalidInput, match="entries of the input"):
        p.laplacian(0, entries=[4])
    with pytest.raises(InvalidInput, match="entries"):
        p.laplacian(0, entries=[])
    for kind in ("graph", "module"):
        with pytest.raises(InvalidInput, match="do not fit"):
            soundly.edit(of_kind(kind, model, x), [p.derivative(0, [0, torch.ones(3)]).at_least(0)], layer="fc")
