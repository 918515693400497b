"""Writing ONNX: onnxruntime computes what the network computes, and reading the file gives the network back."""

import gzip
import math
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from soundly.errors import InvalidInput, MissingRule
from soundly.graph import Constant, Fill, Input, Network, Node, Op, Parameter, linear, product
from soundly.graph import elementwise as ew
from soundly.graph.composite import Maximum, MaxPool, Normalise, Rounding, Softmax, maximum_over
from soundly.graph.elementwise import Elementwise
from soundly.graph.from_onnx import from_onnx
from soundly.graph.from_torch import from_torch
from soundly.graph.to_onnx import OPSETS, ROWS, to_onnx

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def run(model: Any, *inputs: Tensor) -> list[Tensor]:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.tensor(y) for y in session.run(None, feed)]


def round_trip(network: Network, *inputs: Tensor, opset: int = 18, back: bool = True) -> Any:
    """Writes, validates, runs and reads back a network; all three must agree."""
    model = to_onnx(network, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    want = network.evaluate(network.outputs, *inputs)
    close(run(model, *inputs), want)
    if back:
        again = from_onnx(model)
        assert again.dtype == network.dtype
        close(again.evaluate(again.outputs, *inputs), want)
        used = {n.op.name for n in network.nodes if isinstance(n.op, Parameter)}
        assert set(again.parameters) == used
    return model


def close(got: Any, want: Any) -> None:
    for g, y in zip(got, want, strict=True):
        assert g.shape == y.shape
        if y.numel():
            assert torch.isfinite(y).all() and (g - y).abs().max() <= TOLERANCE[y.dtype] * max(
                float(y.abs().max()), 1e-6
            )


def of(op: Op, *shapes: Any, fixed: dict[int, Tensor] | None = None) -> tuple[Network, list[Tensor]]:
    """A network of one operation over inputs, and inputs for it."""
    inputs = [Input(f"x{i}", s)() for i, s in enumerate(shapes)]
    leaves: list[Node] = list(inputs)
    values = {}
    for slot, tensor in sorted((fixed or {}).items()):
        leaf = Constant(f"c{slot}", tuple(tensor.shape))()
        leaves.insert(slot, leaf)
        values[leaf] = tensor
    torch.manual_seed(0)
    return Network(tuple(inputs), (op(*leaves),), values, {}, type(op).__name__), [torch.randn(s) for s in shapes]


face = ((2, 3), (1, 2), (2, 1), 2)
x8, w8 = (3, 4, 9, 8), (6, 2, 3, 2)
y8 = product.Conv(*face).shape(x8, w8)
OPS: dict[str, Any] = {
    "sum of scaled": (linear.Combine((1.0, -1.0, 2.5)), (2, 3), (2, 3), (2, 3)),
    "negated first": (linear.Combine((-1.0, 1.0)), (2, 3), (2, 3)),
    "scaled by one": (linear.Combine((1.0,)), (2, 3)),
    "Sum": (linear.Sum((0, 2)), (2, 3, 4)),
    "Sum over nothing": (linear.Sum(()), (2, 3, 4)),
    "Expand": (linear.Expand((5, 2, 3)), (1, 2, 1)),
    "Reshape": (linear.Reshape((3, 2)), (2, 3)),
    "Reshape nothing": (linear.Reshape((4, 0)), (0, 3)),
    "Permute": (linear.Permute((2, 0, 1)), (2, 3, 4)),
    "Slice": (linear.Slice((1, 0), (2, 3), (3, 1)), (6, 4)),
    "Embed": (linear.Embed((1, 2), (1, 1), (4, 7)), (2, 3)),
    "Embed with steps": (linear.Embed((1, 0), (3, 2), (6, 5)), (2, 3)),
    "Concat": (linear.Concat(1), (2, 3), (2, 1)),
    "Gather": (linear.Gather(1, (2, 0, 2, 1)), (2, 3)),
    "ScatterAdd": (linear.ScatterAdd(1, (2, 0, 2, 1), 5), (2, 4, 3)),
    "Multiply": (product.Multiply(), (2, 3), (2, 3)),
    "MatMul": (product.MatMul(), (4, 2, 3), (4, 3, 5)),
    "Dense": (product.Dense(), (2, 3), (4, 3)),
    "Dense of a batch": (product.Dense(), (2, 5, 3), (4, 3)),
    "Dense of a vector": (product.Dense(), (3,), (4, 3)),
    "Conv": (product.Conv(*face), x8, w8),
    "ConvTranspose": (product.ConvTranspose(*face, x8[2:]), y8, w8),
    "ConvKernel": (product.ConvKernel(*face, w8[2:]), x8, y8),
    "ConvKernel 1d": (product.ConvKernel((2,), (1,), (1,), 1, (3,)), (2, 3, 8), (2, 4, 4)),
    "Conv 3d": (product.Conv((1,) * 3, (0,) * 3, (1,) * 3, 1), (1, 2, 3, 4, 3), (2, 2, 2, 2, 2)),
    "Maximum": (Maximum(), (2, 3), (2, 3)),
    "MaxPool": (MaxPool((3, 2), (2, 2), (1, 1), (1, 2)), (1, 2, 7, 8)),
    "MaxPool ceil": (MaxPool((3, 3), (2, 2), (1, 0), (1, 1), True), (1, 2, 8, 8)),
    "Softmax": (Softmax(1), (2, 3, 4)),
    "Normalise": (Normalise((1, 2), 1e-5), (2, 3, 4)),
    "Normalise uncentred": (Normalise((1,), 1e-5, centred=False), (2, 3)),
    "floor": (Rounding("floor"), (3, 9)),
    "ceil": (Rounding("ceil"), (3, 9)),
    "trunc": (Rounding("trunc"), (3, 9)),
    "round": (Rounding("round"), (3, 9)),
}
NAMED = [v for v in vars(ew).values() if isinstance(v, Elementwise)]
FAMILIES = [
    ew.leaky_relu(0.1), ew.clip(-1, 2), ew.clip(-1, math.inf), ew.clip(-math.inf, 0.5), ew.power(3), ew.power(-2),
    ew.power(1.5),
    ew.elu(1.3), ew.elu(1.0, 1.0, 0.5), ew.elu(1.67, 1.05),
]  # fmt: skip
NO_DOUBLE = {"erf", "erf, Gaussian", "erf, exp(-x^2)", "atan, 1/(1+x^2)"}
"""Rings whose base functions onnxruntime lacks in float64."""


@pytest.mark.parametrize("case", OPS)
def test_every_operation(case: str) -> None:
    network, inputs = of(OPS[case][0], *OPS[case][1:])
    round_trip(network, *inputs, back=case != "Reshape nothing")  # a reader takes a length of zero for an open one


def test_every_row_has_a_case() -> None:
    tested = {type(case[0]) for case in OPS.values()} | {Input, Parameter, Constant, Fill, Elementwise}
    assert set(ROWS) <= tested


# In float32, third derivatives lose more than five digits to cancellation, whoever evaluates them.
@pytest.mark.parametrize(
    ("order", "dtype"), [*((k, torch.float32) for k in range(3)), *((k, torch.float64) for k in range(4))]
)
@pytest.mark.parametrize("function", [*NAMED, *FAMILIES], ids=lambda f: f.name)
def test_elementwise_functions_and_their_derivatives(function: Elementwise, order: int, dtype: torch.dtype) -> None:
    f = function
    for _ in range(order):
        f = f.derivative
    if dtype == torch.float64 and f.ring.name in NO_DOUBLE and any(any(e[1:]) for p in f.pieces for e, _ in p):
        pytest.skip("onnxruntime has no float64 kernel for this function")
    x = Input("x", (3, 40))()
    shift = Constant("zero", (3, 40))()  # gives the network its floating type
    network = Network((x,), (linear.add(f(x), shift),), {shift: torch.zeros(3, 40, dtype=dtype)}, {}, f.name)
    points = torch.linspace(0.1, 4, 120) if f.ring.lower == 0 else torch.linspace(-4, 4, 120)
    edges = [b for b in f.breaks if math.isfinite(b)]
    points[: len(edges)] = torch.tensor(edges)  # the breaks themselves are points too
    round_trip(network, points.to(dtype).reshape(3, 40), back=order < 2)


def test_large_arguments_do_not_overflow_the_piece_that_is_not_meant() -> None:
    network, _ = of(ew.elu(1.3), (4,))
    x = torch.tensor([-1e4, -1.0, 1.0, 1e4])
    close(run(to_onnx(network), x), [network(x)])


@pytest.mark.parametrize("rows", ["some", "none"])
def test_masked_softmax(rows: str) -> None:
    mask = torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    network, inputs = of(Softmax(1), (3, 4), fixed={1: mask if rows == "none" else mask[[0, 1, 0]]})
    round_trip(network, *inputs)


def test_maximum_over_an_axis_and_constants() -> None:
    x = Input("x", (2, 5, 3))()
    network = Network((x,), (maximum_over(x, 1), Fill(2.0, (2, 2))(), x, x), {}, {"row maximum": x})
    round_trip(network, torch.randn(2, 5, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]


MODELS: dict[str, Any] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), (1, 5)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1,
            ceil_mode=True),
            nn.Conv2d(6, 4, 3, dilation=2, padding=2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
        ),
        (2, 4, 17, 15),
    ),
    "decoder": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=3, padding=1, output_padding=2, groups=2), nn.SiLU(), nn.GroupNorm(2, 6),
            nn.Upsample(scale_factor=2, mode="bilinear"), nn.Hardswish(),
        ),
        (1, 4, 3, 2),
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"), (1, 4, 8)),
    "recurrent": (Recurrent, (1, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_their_gradients_and_their_gradients_gradients(name: str) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    module, x = make(), torch.randn(shape)
    network = from_torch(module, x)
    model = round_trip(network, x)
    assert {t.name for t in model.graph.initializer} == set(network.parameters)
    gradient = network.gradient(of=0)
    round_trip(gradient, x)
    for parameter in list(network.parameters)[:2]:
        round_trip(network.gradient(of=0, wrt=parameter), x)
    if name not in ("mlp", "cnn"):  # piecewise linear: their second derivative vanishes
        round_trip(gradient.gradient(of=0), x)


@pytest.mark.parametrize("opset", OPSETS)
def test_operator_sets(opset: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Mish(), nn.Hardswish(), nn.Softmax(1), nn.LayerNorm(4))
    x = torch.randn(2, 4)
    network = from_torch(module, x)
    try:
        round_trip(network.gradient(of=0), x, opset=opset)
        round_trip(network, x, opset=opset)
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:  # this onnxruntime does not know so new an opset
        assert "opset" in str(error).lower() and opset > 22


def test_names_survive() -> None:
    network = from_torch(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(1, 3))
    again = from_onnx(to_onnx(network))
    assert {"0", "1", "2"} <= set(again.places)
    x = torch.randn(1, 3)
    for place in ("0", "1", "2"):
        assert torch.allclose(network.evaluate([network.at(place)], x)[0], again.evaluate([again.at(place)], x)[0])
    assert again.output is again.at("2")


def test_saving(tmp_path: Any) -> None:
    network, (x,) = of(ew.RELU, (2, 3))
    to_onnx(network, tmp_path / "m.onnx")
    to_onnx(network, tmp_path / "m.onnx.gz")
    assert gzip.decompress((tmp_path / "m.onnx.gz").read_bytes()) == (tmp_path / "m.onnx").read_bytes()
    assert torch.equal(from_onnx(tmp_path / "m.onnx.gz")(x), torch.relu(x))


def test_an_operation_without_a_row_is_named() -> None:
    class Strange(Op):
        def shape(self, *shapes: Any) -> Any:
            return shapes[0]

        def apply(self, *values: Tensor) -> Tensor:
            return values[0]

    network, _ = of(Strange(), (2,))
    with pytest.raises(MissingRule, match="Strange has no row"):
        to_onnx(network)


def test_what_cannot_be_written_is_refused() -> None:
    network = from_torch(nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(InvalidInput, match="opset 7"):
        to_onnx(network, opset=7)
    with pytest.raises(InvalidInput, match="bfloat16"):
        to_onnx(network.to(torch.bfloat16))


def test_the_weights_are_written_as_they_are() -> None:
    network = from_torch(nn.Linear(2, 2), torch.randn(1, 2))
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in to_onnx(network).graph.initializer}
    assert all(np.array_equal(stored[n], network.values[p].numpy()) for n, p in network.parameters.items())


@pytest.mark.parametrize("row", [linear.ScatterAdd, product.ConvKernel, MaxPool])
def test_a_wrong_row_is_caught(row: type[Op], monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted mistake: the result comes out twice as large."""
    case = next(c for c in OPS.values() if isinstance(c[0], row))
    network, inputs = of(case[0], *case[1:])
    right = ROWS[row]
    monkeypatch.setitem(ROWS, row, lambda w, n, *xs: w.scaled(right(w, n, *xs), 2.0))
    with pytest.raises(AssertionError):
        round_trip(network, *inputs)
