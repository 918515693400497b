"""Explanation maps that a loss can hold: differentiable to second order, in the network's weights too.

A map gives each class a number per place of the image. All are normalised alike: where the map is complete, the numbers
of a class add up to its logit. CAM is complete on networks that end in global average pooling and a linear layer
without bias, exactly; Integrated Gradients up to its quadrature and the baseline's logit.

Reference: Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016; Selvaraju et al.,
"Grad-CAM", ICCV 2017; Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Explained(NamedTuple):
    """Logits [n, classes] and maps [n, classes, places]."""

    logits: Tensor
    maps: Tensor


class Map(Protocol):
    """Explains all classes of a network at once."""

    def __call__(self, model: ConvNet, x: Tensor) -> Explained: ...


class ConvNet(nn.Module):
    """Convolutions, global average pooling, a linear layer: what CAM explains.

    The last convolution has no ReLU after it, as in the networks of the paper on Int, so that maps have both signs.

    Attributes:
        features: from images [n, c, h, w] to [n, k, h', w'].
        head: from the features' means [n, k] to logits; without bias.
    """

    def __init__(self, features: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.features, self.head = features, nn.Linear(channels, classes, bias=False)

    def classify(self, a: Tensor) -> Tensor:
        """Logits of features."""
        logits: Tensor = self.head(a.mean((2, 3)))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


def cnn(shape: Sequence[int], classes: int, widths: Sequence[int] = (16, 32, 32)) -> ConvNet:
    """Convolutions with ReLU between them, for images of a shape [c, h, w].

    Maps come out about 4 places wide where there are layers enough to halve them. Kernels are the smallest odd ones,
    from 3, whose reach through all layers is the image's width: a place that sees little of the image says little.
    """
    side, depth = max(shape[1:]), len(widths)
    halvings = max(0, round(math.log2(side / 4)))
    halved = sorted(range(depth), key=lambda i: abs(i - depth // 2))[:halvings]  # from the middle outwards
    strides = [2 if i in halved else 1 for i in range(depth)]
    jumps = sum(math.prod(strides[:i]) for i in range(depth))  # a kernel of 1 + r reaches 1 + r * jumps pixels
    kernel = max(3, 1 + 2 * math.ceil((side - 1) / (2 * jumps)))
    layers: list[nn.Module] = []
    for before, width, stride in zip([shape[0], *widths], widths, strides, strict=False):
        layers += [nn.Conv2d(before, width, kernel, stride, padding=kernel // 2), nn.ReLU()]
    return ConvNet(nn.Sequential(*layers[:-1]), widths[-1], classes)


@dataclass(frozen=True)
class Cam:
    """Class activation maps: the head's weights times the features at each place, divided by the number of places."""

    def __call__(self, model: ConvNet, x: Tensor) -> Explained:
        a = model.features(x).flatten(2)
        maps = torch.bmm((model.head.weight / a.shape[-1]).expand(len(a), -1, -1), a)
        return Explained(maps.sum(-1), maps)  # complete: the sums are the logits


@dataclass(frozen=True)
class GradCam:
    """Grad-CAM without its ReLU, at `features`: the features weighted by the mean gradients of a class's logit.

    On a network that ends like `ConvNet` it is CAM; it stays defined where `classify` is overridden. The weights are
    differentiated too, unlike in most tools.
    """

    def __call__(self, model: ConvNet, x: Tensor) -> Explained:
        with torch.enable_grad():
            a = model.features(x)
            a = a if a.requires_grad else a.requires_grad_()
            logits = model.classify(a)
            slopes = [torch.autograd.grad(logits[:, c].sum(), a, create_graph=True)[0] for c in range(logits.shape[1])]
        weights = torch.stack(slopes, 1).mean((3, 4))  # [n, classes, k]
        return Explained(logits, torch.einsum("nck,nkp->ncp", weights, a.flatten(2)))


@dataclass(frozen=True)
class IntegratedGradients:
    """Integrated Gradients of the input from a baseline, by the midpoint rule.

    Attributes:
        points: of the quadrature; the paper on Int trains with 5.
        baseline: one number for all pixels.
    """

    points: int = 5
    baseline: float = 0.0

    def __call__(self, model: ConvNet, x: Tensor) -> Explained:
        start = torch.full_like(x, self.baseline)
        total: Tensor | None = None
        with torch.enable_grad():
            for i in range(self.points):
                between = start + (i + 0.5) / self.points * (x - start)
                between = between if between.requires_grad else between.requires_grad_()
                logits = model(between)
                slopes = torch.stack(
                    [
                        torch.autograd.grad(logits[:, c].sum(), between, create_graph=True)[0]
                        for c in range(logits.shape[1])
                    ],
                    1,
                )
                total = slopes if total is None else total + slopes
            assert total is not None
            maps = ((x - start)[:, None] * total / self.points).flatten(2)
            return Explained(model(x), maps)
