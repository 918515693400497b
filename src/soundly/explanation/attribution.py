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
from soundly.graph.linear import Combine, Sum, broadcast, mean, reshape, subtract
from soundly.graph.network import Network
from soundly.graph.node import Constant, Node
from soundly.graph.product import multiply
from soundly.graph.simplify import rebuild, simplify


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
    features = network.at(layer)
    if len(features.shape) < 3 or features.shape[0] != 1:
        raise InvalidInput(f"Grad-CAM needs a layer of shape [1, C, *size]; {layer!r} is {features.shape}.")
    (slope,) = differentiate(network.entry(of), [features])
    weights = mean(slope, range(2, len(features.shape)))
    channels = Sum((1,))(multiply(features, broadcast(weights, features.shape)))
    result = reshape(channels, features.shape[2:])
    if relu:
        result = elementwise.RELU(result)
    return simplify(replace(network, outputs=(result,), name=f"Grad-CAM of {network.name}"))


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
    parts: list[Node] = []
    for a in (nodes + 1) / 2:
        between = Combine((1 - float(a), float(a)))(start, x)
        parts.append(rebuild([slope], lambda old, new, at=between: at if old is x else new)[slope])  # type: ignore[misc]
    average = Combine(tuple(float(w) / 2 for w in weights))(*parts)
    result = multiply(subtract(x, start), average)
    values = {**network.values, start: baseline.detach().to(network.dtype, copy=True)}
    grown = replace(
        network, outputs=(result,), values=values, places={}, name=f"Integrated Gradients of {network.name}"
    )
    return simplify(grown)


def minmax(attribution: Tensor) -> Tensor:
    """A map scaled to [0, 1] by its smallest and largest entry; zeros where it is constant."""
    low, high = attribution.min(), attribution.max()
    return (attribution - low) / (high - low) if bool(high > low) else torch.zeros_like(attribution)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two maps; 0 if one is zero."""
    lengths = float(a.norm() * b.norm())
    return float((a * b).sum()) / lengths if lengths and math.isfinite(lengths) else 0.0
