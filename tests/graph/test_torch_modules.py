"""Captured modules compute what PyTorch computes: the layers that networks are built of."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.graph.captures import agree, rand
from torch import Tensor, nn

from soundly.graph.from_torch import from_torch

aten_ops = torch.ops.aten


def module(name: str, make: Callable[[], nn.Module], *shape: int) -> Any:
    return pytest.param(make, shape, id=name)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x)) + x


class Native(nn.Module):
    """Batch norm under the names that other programs use."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = statistics(nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        given = (x, self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var)
        one = aten_ops.native_batch_norm(*given, False, 0.1, 1e-3)[0]
        return one + aten_ops._native_batch_norm_legit_no_training(*given, 0.1, 1e-2)[0]


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x)


class First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def statistics(norm: nn.Module) -> nn.Module:
    for value in norm.buffers():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 2.0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


MODULES = [
    module("linear", lambda: nn.Linear(3, 2), 2, 4, 3),
    module("linear without bias", lambda: nn.Linear(3, 2, bias=False), 3),
    module("conv1d", lambda: nn.Conv1d(2, 3, 3, 2, 1, 2), 2, 2, 9),
    module("conv2d", lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0)), 2, 2, 5, 4),
    module("conv2d grouped", lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), 1, 4, 5, 4),
    module("conv2d depthwise", lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), 1, 3, 4, 4),
    module("conv2d same", lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(1, 2)), 1, 2, 5, 4),
    module("conv2d valid", lambda: nn.Conv2d(2, 3, 3, padding="valid"), 1, 2, 5, 4),
    module("conv2d unbatched", lambda: nn.Conv2d(2, 3, 3), 2, 5, 4),
    module("conv2d reflect", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), 1, 2, 5, 4),
    module("conv2d circular", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 1, 2, 5, 4),
    module("conv3d", lambda: nn.Conv3d(2, 2, (2, 3, 1), padding=(0, 1, 0)), 1, 2, 3, 4, 2),
    module("conv1d same", lambda: nn.Conv1d(2, 2, 4, padding="same"), 1, 2, 6),
    module("transpose1d", lambda: nn.ConvTranspose1d(2, 3, 3, 2, 1, 1), 2, 2, 4),
    module("transpose2d", lambda: nn.ConvTranspose2d(4, 4, 3, (2, 3), 1, (1, 2), groups=2), 1, 4, 3, 2),
    module("transpose2d dilated", lambda: nn.ConvTranspose2d(2, 3, 2, 1, 0, 0, dilation=2, bias=False), 1, 2, 3, 2),
    module("transpose2d wide padding", lambda: nn.ConvTranspose2d(2, 3, 2, 3, 0, 2), 1, 2, 3, 2),
    module("transpose2d unbatched", lambda: nn.ConvTranspose2d(2, 3, 2), 2, 3, 2),
    module("transpose3d", lambda: nn.ConvTranspose3d(1, 2, 2, 2, 0, 1), 1, 1, 2, 2, 2),
    module("max pool 1d", lambda: nn.MaxPool1d(3, 2, 1, ceil_mode=True), 1, 2, 8),
    module("max pool 2d", lambda: nn.MaxPool2d(2), 1, 2, 5, 4),
    module("max pool 2d dilated", lambda: nn.MaxPool2d(3, 2, 1, 2, ceil_mode=True), 1, 2, 7, 8),
    module("max pool 2d unbatched", lambda: nn.MaxPool2d((2, 1), (1, 2)), 2, 5, 4),
    module("max pool 3d", lambda: nn.MaxPool3d(2, 1), 1, 1, 3, 3, 3),
    module("average pool 1d", lambda: nn.AvgPool1d(3, 2, 1, ceil_mode=True), 1, 2, 8),
    module("average pool 2d", lambda: nn.AvgPool2d(2), 1, 2, 5, 4),
    module("average pool without padding", lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), 1, 2, 6, 5),
    module("average pool ceil", lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), 1, 2, 6, 8),
    module("average pool ceil big stride", lambda: nn.AvgPool2d(2, 3, 1, ceil_mode=True), 1, 1, 6, 7),
    module("average pool ceil, not padding", lambda: nn.AvgPool2d(3, 2, 1, True, count_include_pad=False), 1, 2, 6, 8),
    module("average pool divisor", lambda: nn.AvgPool2d(2, 1, divisor_override=3), 1, 2, 3, 4),
    module("average pool unbatched", lambda: nn.AvgPool2d(2), 2, 4, 4),
    module("average pool 3d", lambda: nn.AvgPool3d(2, 1, 1), 1, 1, 2, 3, 2),
    module("adaptive average", lambda: nn.AdaptiveAvgPool2d((3, 2)), 1, 2, 5, 7),
    module("adaptive average one", lambda: nn.AdaptiveAvgPool2d(1), 1, 2, 5, 7),
    module("adaptive average none", lambda: nn.AdaptiveAvgPool2d((None, 2)), 1, 2, 3, 5),
    module("adaptive average 1d", lambda: nn.AdaptiveAvgPool1d(3), 1, 2, 7),
    module("adaptive average 3d", lambda: nn.AdaptiveAvgPool3d(2), 1, 1, 3, 4, 2),
    module("adaptive max", lambda: nn.AdaptiveMaxPool2d((3, 2)), 1, 2, 5, 7),
    module("adaptive max 1d", lambda: nn.AdaptiveMaxPool1d(2), 1, 2, 5),
    module("batch norm 1d", lambda: statistics(nn.BatchNorm1d(3)), 2, 3),
    module("batch norm 1d sequences", lambda: statistics(nn.BatchNorm1d(3)), 2, 3, 4),
    module("batch norm 2d", lambda: statistics(nn.BatchNorm2d(3, eps=0.1)), 2, 3, 2, 2),
    module("batch norm of this batch", lambda: nn.BatchNorm2d(3, track_running_stats=False), 2, 3, 2, 2),
    module("batch norm plain, of this batch", lambda: nn.BatchNorm1d(3, affine=False, track_running_stats=False), 4, 3),
    module("batch norm, native", lambda: Native(), 2, 3, 2),
    module("batch norm plain", lambda: statistics(nn.BatchNorm2d(3, affine=False)), 2, 3, 2, 2),
    module("layer norm", lambda: statistics(nn.LayerNorm((3, 2), eps=0.01)), 2, 3, 2),
    module("layer norm plain", lambda: nn.LayerNorm(4, elementwise_affine=False), 2, 4),
    module("rms norm eps", lambda: statistics(nn.RMSNorm(4, eps=0.1)), 2, 4),
    module("group norm", lambda: statistics(nn.GroupNorm(2, 4)), 2, 4, 3),
    module("instance norm", lambda: statistics(nn.InstanceNorm2d(3, affine=True)), 2, 3, 2, 3),
    module("instance norm tracked", lambda: statistics(nn.InstanceNorm1d(3, track_running_stats=True)), 2, 3, 4),
    module("local response norm", lambda: nn.LocalResponseNorm(2), 1, 4, 3, 3),
    module("prelu", lambda: nn.PReLU(), 2, 3),
    module("prelu per channel", lambda: nn.PReLU(3, init=0.3), 2, 3, 2, 2),
    module("prelu per channel 2d", lambda: nn.PReLU(3), 2, 3),
    module("softmax2d", lambda: nn.Softmax2d(), 1, 3, 2, 2),
    module("glu", lambda: nn.GLU(), 2, 4),
    module("identity", lambda: nn.Identity(), 2),
    module("flatten unflatten", lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 3))), 2, 6),
    module("pads", lambda: nn.Sequential(nn.ZeroPad2d(1), nn.ConstantPad2d((1, 0, 0, 2), 2.5)), 1, 1, 2, 2),
    module("more pads", lambda: nn.Sequential(nn.ReplicationPad2d((1, 0, 2, 1)), nn.CircularPad2d(1)), 1, 1, 2, 3),
    module("upsamplers", lambda: nn.Sequential(nn.Upsample(None, 2), nn.UpsamplingBilinear2d(None, 2)), 1, 1, 2, 3),
    module("dropouts", lambda: nn.Sequential(nn.Dropout(), nn.Linear(3, 3), nn.Dropout1d()), 2, 3),
    module("tied weights", Tied, 2, 3),
    module("shared modules", Shared, 2, 3),
    module("multihead attention with weights", Attention, 1, 3, 4),
    module("multihead attention without bias", lambda: Attention(bias=False, add_zero_attn=True), 1, 3, 4),
    module("multihead attention other keys", lambda: Attention(kdim=4, vdim=4, add_bias_kv=True), 1, 3, 4),
    module("encoder layer", lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True), 1, 3, 4),
    module("encoder", lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 2), 1, 3, 4),
    module("rnn", lambda: First(nn.RNN(3, 2, batch_first=True)), 1, 4, 3),
    module("lstm", lambda: First(nn.LSTM(3, 2, bidirectional=True)), 4, 2, 3),
    module("lstm projected", lambda: First(nn.LSTM(3, 4, proj_size=2)), 3, 1, 3),
    module("gru", lambda: First(nn.GRU(3, 2, num_layers=2)), 3, 1, 3),
    module("lstm cell", lambda: nn.LSTMCell(3, 2), 2, 3),
    module("gru cell", lambda: nn.GRUCell(3, 2), 2, 3),
    module("weight norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), 2, 3),
]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("make, shape", MODULES)
def test_modules(make, shape):
    torch.manual_seed(0)
    agree(make(), rand(*shape))


def test_hardsigmoid():
    """By itself: torch's own derivative of it holds a sixth only to float32's accuracy, also in float64."""
    x = torch.linspace(-4, 4, 21, dtype=torch.float64)
    network = from_torch(nn.Hardsigmoid(), x, check=False)
    assert bool(((network(x) - F.hardsigmoid(x)).abs() < 1e-12).all())
    inside = (x > -3) & (x < 3)
    total = torch.func.grad(lambda v: network(v).sum())(x)
    assert bool(((total - inside.double() / 6).abs() < 1e-12).all())
