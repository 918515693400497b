"""Attributions in the shape of captum's: `attribute(inputs, target=...)`, and with it `bounds(region, target=...)`.

Code written for captum runs with these after one change, the constructor: it takes a network, as soundly.load returns.
Numbers are captum's; results keep their autograd graph, so that they can be part of a loss. What is new is that each
attribution is a network, `network(target)`, and that bounds on it hold for every input of a region.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from soundly.errors import InvalidInput
from soundly.explanation.attribution import contributions, gradcam, integrated_gradients, smoothgrad
from soundly.explanation.certified import MapBounds, certify_map
from soundly.graph.elementwise import ABS
from soundly.graph.linear import reshape
from soundly.graph.network import Network
from soundly.spec.region import Ball, Box

Target: TypeAlias = int | Sequence[int] | Tensor
Inputs = TypeVar("Inputs", Tensor, tuple[Tensor])


class Attribution(ABC):
    """What the adapters share: a batch is explained input by input, each for its own target."""

    def __init__(self, network: Network) -> None:
        if not isinstance(network, Network):
            raise InvalidInput(f"{type(self).__name__} takes a Network, as soundly.load returns, not {network!r}.")
        self.model = network

    @abstractmethod
    def network(self, target: int) -> Network:
        """The attribution of one output, as a network of the same input."""

    def attribute(self, inputs: Inputs, target: Target = 0) -> Inputs:
        """The attributions of a batch [k, ...] of inputs; differentiable.

        Args:
            inputs: a tensor, or a tuple that holds one; then so is the result.
            target: the output to explain, or one per input.
        """
        return self._mapped(inputs, target, self.network)

    def bounds(self, region: Box | Ball, target: int, *, timeout: float | None = None) -> MapBounds:
        """Lower and upper maps over all inputs of a region, with a certificate; see `certify_map`."""
        return certify_map(self.network(target), region, timeout=timeout)

    def _mapped(self, inputs: Inputs, target: Target, of: Callable[[int], Network]) -> Inputs:
        if isinstance(inputs, tuple):  # as captum's metrics hand them over, and want them back
            if len(inputs) != 1:
                raise InvalidInput(f"inputs are {len(inputs)} tensors, but the network takes one.")
            return (self._mapped(inputs[0], target, of),)
        shape = self.model.input.shape
        if tuple(inputs.shape[1:]) != shape[1:] or shape[0] != 1:
            raise InvalidInput(f"inputs have shape {tuple(inputs.shape)}; give [k, {', '.join(map(str, shape[1:]))}].")
        given = torch.as_tensor(target).reshape(-1)
        if len(given) not in (1, len(inputs)):
            raise InvalidInput(f"target has {len(given)} entries for {len(inputs)} inputs; give one, or one each.")
        targets = given.expand(len(inputs)).tolist()
        networks = {t: of(t) for t in dict.fromkeys(targets)}
        parts: list[Tensor | None] = [None] * len(inputs)
        for t, network in networks.items():
            which = [i for i, own in enumerate(targets) if own == t]
            found = torch.vmap(network)(inputs[which][:, None])
            for i, value in zip(which, found, strict=True):
                parts[i] = value
        return torch.cat([p for p in parts if p is not None])


class Saliency(Attribution):
    """The gradient, or its size: captum.attr.Saliency.

    Args:
        abs: the absolute value, as captum has it by default.
    """

    def __init__(self, network: Network, *, abs: bool = True) -> None:
        super().__init__(network)
        self.abs = abs

    def network(self, target: int) -> Network:
        gradient = self.model.gradient(of=target)
        return replace(gradient, outputs=(ABS(gradient.output),)) if self.abs else gradient


class InputXGradient(Attribution):
    """captum.attr.InputXGradient."""

    def network(self, target: int) -> Network:
        return contributions(self.model, of=target)


class IntegratedGradients(Attribution):
    """captum.attr.IntegratedGradients with method "gausslegendre".

    Args:
        baselines: of the input's shape, or a number; 0 if None.
        n_steps: nodes of the quadrature.
    """

    def __init__(self, network: Network, *, baselines: Tensor | float | None = None, n_steps: int = 50) -> None:
        super().__init__(network)
        self.baselines, self.n_steps = baselines, n_steps

    def network(self, target: int) -> Network:
        return self._network(target, self.baselines, self.n_steps)

    def attribute(
        self,
        inputs: Inputs,
        target: Target = 0,
        baselines: Tensor | float | None = None,
        n_steps: int | None = None,
    ) -> Inputs:
        """The attributions of a batch; `baselines` and `n_steps` replace those of the constructor."""
        start = self.baselines if baselines is None else baselines
        return self._mapped(inputs, target, lambda t: self._network(t, start, n_steps or self.n_steps))

    def _network(self, target: int, baselines: Tensor | float | None, steps: int) -> Network:
        shape = self.model.input.shape
        start = torch.as_tensor(0.0 if baselines is None else baselines, dtype=self.model.dtype)
        return integrated_gradients(self.model, of=target, baseline=start.expand(shape), steps=steps)


class SmoothGrad(Attribution):
    """captum.attr.NoiseTunnel of a signed Saliency, type "smoothgrad", with noise that is drawn once.

    Args:
        nt_samples, stdevs: how many displacements, and how large.
        noise: the displacements themselves [samples, *input].
    """

    def __init__(
        self, network: Network, *, nt_samples: int = 5, stdevs: float = 1.0, seed: int = 0, noise: Tensor | None = None
    ) -> None:
        super().__init__(network)
        if noise is None:
            source = torch.Generator().manual_seed(seed)
            noise = stdevs * torch.randn((nt_samples, *network.input.shape), generator=source)
        self.noise = noise

    def network(self, target: int) -> Network:
        return smoothgrad(self.model, of=target, noise=self.noise)


class LayerGradientXActivation(Attribution):
    """captum.attr.LayerGradientXActivation.

    Args:
        layer: a place; see `Network.at`.
    """

    def __init__(self, network: Network, layer: str) -> None:
        super().__init__(network)
        self.layer = layer

    def network(self, target: int) -> Network:
        return contributions(self.model, of=target, layer=self.layer)


class LayerGradCam(Attribution):
    """captum.attr.LayerGradCam: [k, 1, *size].

    Args:
        layer: a place; see `Network.at`.
        relu_attributions: keep only the positive part.
    """

    def __init__(self, network: Network, layer: str, *, relu_attributions: bool = False) -> None:
        super().__init__(network)
        self.layer, self.relu = layer, relu_attributions

    def network(self, target: int) -> Network:
        found = gradcam(self.model, of=target, layer=self.layer, relu=self.relu)
        return replace(found, outputs=(reshape(found.output, (1, 1, *found.output.shape)),))
