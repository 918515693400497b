"""Gradient-based attributions as networks: what soundly can do to an output, it can do to these.

Each function takes a network and returns another one of the same input whose output is the explanation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.graph import elementwise
from soundly.graph.differentiate import differentiate
from soundly.graph.linear import Combine, Sum, add, broadcast, mean, reshape, subtract
from soundly.graph.network import Network
from soundly.graph.node import Constant, Node, dependents, topological
from soundly.graph.product import multiply
from soundly.graph.simplify import rebuild, simplify


def contributions(network: Network, *, of: int | Sequence[int], layer: str | None = None) -> Network:
    """What each entry contributes to one output, to first order: the entry times its gradient, as a network.

    Args:
        of: position of the output (with a batch of one: the class).
        layer: the entries of which place; those of the input if None (gradient times input).

    Returns:
        A network with an output of the place's shape. Where what follows the place is linear without a bias, the
        contributions sum to the output.

    Reference: Shrikumar et al., "Not Just a Black Box", 2016.
    """
    place = network.input if layer is None else network.at(layer)
    (slope,) = differentiate(network.entry(of), [place])
    return _attribution(network, multiply(place, slope), "contributions")


def cam(network: Network, *, of: int | Sequence[int], layer: str) -> Network:
    """The class activation map of one output, as a network: what each position of a layer adds to the output.

    Args:
        of: position of the output (with a batch of one: the class).
        layer: a place of shape [1, C, *size] which only linear maps follow, such as the last convolution before
            global average pooling and a dense layer.

    Returns:
        A network with output [*size], which sums to the output less its bias.

    Raises:
        InvalidInput: what follows the layer is not linear; see `gradcam`.

    Reference: Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016.
    """
    features, slope = _features(network, of, layer)
    if slope in dependents(topological([slope]), [*network.inputs, features]):
        raise InvalidInput(f"CAM: what follows {layer!r} is not linear, so its gradient moves with the input: gradcam.")
    return _attribution(network, reshape(Sum((1,))(multiply(features, slope)), features.shape[2:]), "CAM")


def gradcam(network: Network, *, of: int | Sequence[int], layer: str, relu: bool = False) -> Network:
    """The Grad-CAM map of one output at a layer, as a network.

    Args:
        of: position of the output (with a batch of one: the class).
        layer: a place of shape [1, C, *size]; see `Network.at`.
        relu: keep only the positive part, as in the paper's equation 2. Off by default: constraints and comparisons
            use the signed map.

    Returns:
        A network with output [*size]: sum_k mean_q(dy / dF_kq) F_kp.

    Reference: Selvaraju et al., "Grad-CAM", ICCV 2017.
    """
    features, slope = _features(network, of, layer)
    weights = mean(slope, range(2, len(features.shape)))
    channels = Sum((1,))(multiply(features, broadcast(weights, features.shape)))
    result = reshape(channels, features.shape[2:])
    if relu:
        result = elementwise.RELU(result)
    return _attribution(network, result, "Grad-CAM")


def _features(network: Network, of: int | Sequence[int], layer: str) -> tuple[Node, Node]:
    """A layer of shape [1, C, *size], and the output's gradient there."""
    features = network.at(layer)
    if len(features.shape) < 3 or features.shape[0] != 1:
        raise InvalidInput(f"a class map needs a layer of shape [1, C, *size]; {layer!r} is {features.shape}.")
    (slope,) = differentiate(network.entry(of), [features])
    return features, slope


def _attribution(network: Network, result: Node, name: str) -> Network:
    return simplify(replace(network, outputs=(result,), name=f"{name} of {network.name}"))


def smoothgrad(network: Network, *, of: int | Sequence[int], noise: Tensor) -> Network:
    """The mean gradient of one output at several fixed displacements of the input, as a network.

    Args:
        of: position of the output.
        noise: the displacements [samples, *input]. They are fixed, so that the map is a function and claims about it
            make sense.

    Returns:
        A network with an output of the input's shape.

    Reference: Smilkov et al., "SmoothGrad", 2017.
    """
    x = network.input
    if tuple(noise.shape[1:]) != x.shape or len(noise) == 0:
        raise InvalidInput(f"noise has shape {tuple(noise.shape)}; give [samples, {', '.join(map(str, x.shape))}].")
    if not bool(torch.isfinite(noise).all()):
        raise InvalidInput("noise must consist of finite numbers.")
    (slope,) = differentiate(network.entry(of), [x])
    moves = {Constant(f"noise {i}", x.shape)(): move for i, move in enumerate(noise)}
    points = [add(x, move) for move in moves]
    average = Combine((1 / len(points),) * len(points))(*(_at(slope, x, point) for point in points))
    values = {move: v.detach().to(network.dtype, copy=True) for move, v in moves.items()}
    grown = replace(network, values={**network.values, **values}, places={})
    return _attribution(grown, average, "SmoothGrad")


def _at(node: Node, x: Node, point: Node) -> Node:
    """The value of a node where x is another point."""
    return rebuild([node], lambda old, new: point if old is x else new)[node]


def integrated_gradients(network: Network, *, of: int | Sequence[int], baseline: Tensor, steps: int = 25) -> Network:
    """Integrated Gradients of one output along the straight line from `baseline`, as a network.

    Args:
        of: position of the output.
        baseline: of the input's shape.
        steps: nodes of the Gauss-Legendre quadrature. The attributions sum to the change of the output from baseline to
            input up to the quadrature's error, which smooth networks make small and kinks do not.

    Returns:
        A network with an output of the input's shape: (x - x0) * sum_s omega_s gradient(x0 + a_s (x - x0)).

    Reference: Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017.
    """
    x = network.input
    if tuple(baseline.shape) != x.shape:
        raise InvalidInput(f"baseline has shape {tuple(baseline.shape)}, but the input has {x.shape}.")
    if not bool(torch.isfinite(baseline).all()):
        raise InvalidInput("baseline must consist of finite numbers.")
    if steps < 1:
        raise InvalidInput(f"steps must be at least 1, not {steps}.")
    start = Constant("baseline", x.shape)()
    (slope,) = differentiate(network.entry(of), [x])
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    parts = [_at(slope, x, Combine((1 - float(a), float(a)))(start, x)) for a in (nodes + 1) / 2]
    average = Combine(tuple(float(w) / 2 for w in weights))(*parts)
    result = multiply(subtract(x, start), average)
    values = {**network.values, start: baseline.detach().to(network.dtype, copy=True)}
    return _attribution(replace(network, values=values, places={}), result, "Integrated Gradients")


def minmax(attribution: Tensor) -> Tensor:
    """A map scaled to [0, 1] by its smallest and largest entry; zeros where it is constant."""
    low, high = attribution.min(), attribution.max()
    return (attribution - low) / (high - low) if bool(high > low) else torch.zeros_like(attribution)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two maps; 0 if one is zero."""
    lengths = float(a.norm() * b.norm())
    return float((a * b).sum()) / lengths if lengths and math.isfinite(lengths) else 0.0
