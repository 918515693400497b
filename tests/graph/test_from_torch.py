"""Captures as networks: inputs, outputs, parameters, places and types are the module's, which stays untouched."""

import pytest
import torch
from tests.graph.captures import Call
from tests.graph.test_torch_modules import Shared, Tied
from torch import Tensor, nn

from soundly.errors import CaptureError, InvalidInput
from soundly.graph.from_torch import from_torch
from soundly.graph.node import Input, Parameter


def test_several_inputs_and_outputs():
    module = Call(lambda x, y: (x + y, {"product": x * y, "list": [x - y]}))
    network = from_torch(module, (torch.randn(2), torch.randn(2)))
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    assert [o.tolist() for o in network(x, y)] == [[4.0, 7.0], [3.0, 10.0], [-2.0, -3.0]]
    assert len(network.inputs) == 2


def test_an_unused_input_stays_an_input():
    network = from_torch(Call(lambda x, y: 2 * x), (torch.ones(2), torch.ones(3)))
    assert network(torch.ones(2), torch.zeros(3)).tolist() == [2.0, 2.0]


def test_an_output_that_is_an_input():
    network = from_torch(Call(lambda x: (x, 2 * x)), torch.ones(2))
    assert [o.tolist() for o in network(torch.tensor([1.0, 2.0]))] == [[1.0, 2.0], [2.0, 4.0]]


def test_token_ids_are_frozen_at_the_example():
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 3, padding_idx=0), nn.Linear(3, 2)

        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            return self.head(self.table(ids) + x)

    module = Embedded()
    ids, x = torch.tensor([[1, 5, 5], [0, 6, 2]]), torch.randn(2, 3, 3)
    network = from_torch(module, (ids, x))
    assert len(network.inputs) == 1
    torch.testing.assert_close(network(x + 1), module(ids, x + 1))
    (gradient,) = torch.autograd.grad(module(ids, x).sum(), module.table.weight)
    assert "table.weight" in network.parameters and bool(gradient.any())


def test_parameters_and_places_carry_the_modules_names():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2), nn.Tanh()))
    x = torch.randn(1, 3)
    network = from_torch(module, x)
    assert set(network.parameters) == {"0.weight", "0.bias", "2.0.weight", "2.0.bias"}
    assert {"0", "1", "2", "2.0", "2.1"} <= set(network.places)
    kept: list[Tensor] = []
    for name in ("0", "1", "2.0", "2"):
        handle = module.get_submodule(name).register_forward_hook(lambda _, __, out: kept.append(out.detach()))
        module(x)
        handle.remove()
        torch.testing.assert_close(network.evaluate([network.at(name)], x)[0], kept[-1])
    assert "test_from_torch" not in network.at("2.0").origin and network.at("2.0").origin.startswith("2.0 ")


def test_tied_and_shared_weights_are_one_parameter():
    tied, shared = from_torch(Tied(), torch.randn(2, 3)), from_torch(Shared(), torch.randn(2, 3))
    assert len([p for p in tied.nodes if isinstance(p.op, Parameter)]) == 3
    assert len([p for p in shared.nodes if isinstance(p.op, Parameter)]) == 2


def test_weights_are_shared_with_the_module_and_untouched():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train()
    module[0].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    flags = [m.training for m in module.modules()]
    network = from_torch(module, torch.randn(4, 3))
    assert [m.training for m in module.modules()] == flags == [True, False, True]
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) and value.dtype == before[name].dtype
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    weight = network.values[network.parameters["0.weight"]]
    assert weight.data_ptr() == module[0].weight.data_ptr()


def test_training_flags_are_restored_after_a_failure():
    module = nn.Sequential(nn.Linear(3, 2), Call(lambda x: torch.linalg.inv(x[:2]))).train()
    with pytest.raises(CaptureError):
        from_torch(module, torch.randn(2, 3))
    assert all(m.training for m in module.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floating_types(dtype):
    module = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)
    x = torch.randn(2, 3).to(dtype)
    network = from_torch(module, x)
    assert network.dtype == dtype and network(x).dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(network(x), module(x), rtol=tolerance, atol=tolerance)
    assert network.gradient(of=0)(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("module", [nn.ReLU(), nn.Softmax(-1), nn.Flatten(), nn.MaxPool2d(2)])
def test_modules_without_weights_compute_in_the_examples_type(module, dtype):
    x = torch.randn(1, 1, 4, 4, dtype=dtype)
    network = from_torch(module, x)
    assert network.dtype == dtype
    torch.testing.assert_close(network(x), module(x))
    other = network.to(torch.float64)
    assert other.dtype == torch.float64 and other.gradient(of=0).dtype == torch.float64


def test_a_gradient_without_weights_keeps_its_type():
    network = from_torch(nn.Linear(2, 2).double(), torch.randn(2, dtype=torch.float64))
    constant = network.gradient(of=0).gradient(of=0)
    assert constant.dtype == torch.float64
    assert constant(torch.ones(2, dtype=torch.float64)).tolist() == [0.0, 0.0]


def test_networks_refuse_other_shapes_and_types():
    network = from_torch(nn.Linear(3, 2), torch.randn(1, 3))
    with pytest.raises(InvalidInput, match="vmap"):
        network(torch.randn(2, 3))
    with pytest.raises(InvalidInput, match="float64"):
        network(torch.randn(1, 3, dtype=torch.float64))
    with pytest.raises(InvalidInput, match="takes 1"):
        network(torch.randn(1, 3), torch.randn(1, 3))
    with pytest.raises(InvalidInput, match="Near"):
        network.at("nowhere")
    assert isinstance(network.input.op, Input)


class Rescaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([1.0, 2.0, 3.0]).to(x)


class Overwriting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return x * x


@pytest.mark.parametrize("module", [Rescaled(), Overwriting()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constants_of_another_type_and_overwritten_inputs(module, dtype):
    x = torch.randn(3, dtype=dtype)
    kept = x.clone()
    network = from_torch(module, x)
    assert torch.equal(x, kept)
    assert torch.allclose(network(x), module(kept.clone()), rtol=1e-6)
