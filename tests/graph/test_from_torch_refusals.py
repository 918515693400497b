"""What cannot be captured is refused, and a wrong rule is noticed."""

from pathlib import Path

import pytest
import torch
from tests.graph.captures import Call
from torch import Tensor, nn

from soundly.errors import CaptureError, CaptureMismatch, DynamicModel, InvalidInput, UnsupportedOp
from soundly.graph import aten
from soundly.graph.from_torch import from_torch


def test_control_flow_on_data_is_refused():
    def branch(x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x

    with pytest.raises(DynamicModel, match="depend on the data"):
        from_torch(Call(branch), torch.randn(3))


def test_shapes_that_depend_on_data_are_refused():
    with pytest.raises(CaptureError):
        from_torch(Call(lambda x: x[x > 0]), torch.randn(3))


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_an_unsupported_operation_is_named_with_its_place():
    module = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"odd": Inner()})["odd"])
    with pytest.raises(UnsupportedOp) as refused:
        from_torch(module, torch.randn(3))
    line = Inner.forward.__code__.co_firstlineno + 1
    assert "bessel_j0" in str(refused.value) and f"1 ({Path(__file__).name}:{line})" in str(refused.value)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.to(torch.int64).to(x.dtype),
        lambda x: torch.div(x, 2.0, rounding_mode="floor"),
        lambda x: x.masked_fill(torch.tensor([True, False, True]), torch.inf),
        lambda x: x**x,
        lambda x: x + torch.tensor([torch.inf, 0.0, 0.0]),
        lambda x: torch.round(x, decimals=2),
        lambda x: x.norm(3),
        lambda x: (x[:, None] * x).masked_fill(torch.ones(3, 3).triu(1) > 0, -torch.inf).relu(),
        lambda x: (x[:, None] * x).masked_fill(torch.ones(3, 3).triu(1) > 0, -torch.inf),
    ],
)
def test_forms_without_a_rule_are_refused(function):
    with pytest.raises(UnsupportedOp):
        from_torch(Call(function), torch.rand(3))


def test_mixed_floating_types_are_refused():
    module = Call(lambda x, w: x.double() * w, w=torch.ones(3, dtype=torch.float64))
    module.register_buffer("odd", torch.ones(2))
    with pytest.raises(InvalidInput, match="floating types"):
        from_torch(module, torch.randn(2, 3))
    with pytest.raises(InvalidInput, match="float64"):
        from_torch(nn.Linear(3, 2), torch.randn(3, dtype=torch.float64), check=False)


@pytest.mark.parametrize("example", [None, (), [1.0], "x"])
def test_examples_that_are_no_tensors_are_refused(example):
    with pytest.raises(InvalidInput):
        from_torch(nn.ReLU(), example)


def test_something_that_is_no_module_is_refused():
    with pytest.raises(InvalidInput):
        from_torch(torch.relu, torch.ones(2))  # type: ignore[arg-type]


WRONG = {
    "relu": lambda leaf, x: x,
    "linear": lambda leaf, x, w, b=None: aten.RULES["matmul"](leaf, x, aten.RULES["t"](leaf, w)),
    "tanh": lambda leaf, x: aten.RULES["sin"](leaf, x),
    "softmax": lambda leaf, x, dim, *_: aten.RULES["sigmoid"](leaf, x),
}


@pytest.mark.parametrize("name", ["relu", "linear", "tanh", "softmax"])
def test_a_wrong_rule_is_refused(name, monkeypatch):
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Tanh(), nn.Softmax(-1))
    monkeypatch.setitem(aten.RULES, name, WRONG[name])
    with pytest.raises(CaptureMismatch, match="differ"):
        from_torch(module, torch.randn(2, 3))


def test_a_rule_with_the_right_value_and_a_wrong_gradient_is_refused(monkeypatch):
    """`detach` passes the value on but no gradient; read as the identity, only the gradient shows the mistake."""
    monkeypatch.setitem(aten.RULES, "detach", lambda leaf, x: x)
    monkeypatch.setitem(aten.RULES, "detach_", lambda leaf, x: x)
    with pytest.raises(CaptureMismatch, match="gradient"):
        from_torch(Call(lambda x: x * x.detach()), torch.randn(8))


def test_a_wrong_shape_is_refused(monkeypatch):
    monkeypatch.setitem(aten.RULES, "flatten", lambda leaf, x, *_: x)
    with pytest.raises(CaptureMismatch, match="shape"):
        from_torch(nn.Flatten(), torch.randn(2, 3, 4))
