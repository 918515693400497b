"""Export of a network back to an nn.Module, for training on it or for handing it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from soundly.graph.evaluate import Plan
from soundly.graph.network import Network


class GraphModule(nn.Module):
    """A network as a module: parameters under their own names (dots become underscores), constants as buffers.

    Its forward pass is ordinary PyTorch, so a gradient network can be trained through with first-order autograd.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self._named: list[tuple[Any, str]] = []
        named = {node: name for name, node in network.parameters.items()}
        for i, (node, value) in enumerate(network.values.items()):
            if node in named:
                name = named[node].replace(".", "_")
                self.register_parameter(name, nn.Parameter(value.detach().clone()))
            else:
                name = f"constant_{i}"
                self.register_buffer(name, value.detach().clone())
            self._named.append((node, name))
        self._plan = Plan(network.outputs)

    def forward(self, *inputs: Tensor) -> Any:
        values = {node: getattr(self, name) for node, name in self._named}
        values.update(zip(self.network.inputs, inputs, strict=True))
        results = self._plan(
            values, dtype=inputs[0].dtype if inputs else torch.get_default_dtype(), device=inputs[0].device
        )
        return results[0] if len(results) == 1 else results


def to_torch(network: Network) -> nn.Module:
    """The network as an nn.Module with copies of its parameters.

    Returns:
        A module whose call takes the network's inputs and gives its output (a tuple if there are several).
    """
    return GraphModule(network)
