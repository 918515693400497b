"""The front door: a model of any supported kind becomes a Network, checked against its original."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from soundly.errors import InvalidInput, ModelFileError
from soundly.graph.network import Network

if TYPE_CHECKING:
    from torch import Tensor, nn


def load(
    model: nn.Module | str | os.PathLike[str],
    example: Tensor | Sequence[Tensor] | None = None,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Network:
    """Captures a model as a graph and compares it at once with the original.

    Args:
        model: an nn.Module, or the path of an ONNX file (.onnx or .onnx.gz).
        example: for a module: the tensors of one call; the graph has exactly their shapes.
        shapes: for an ONNX file with open dimensions: {input name: shape}.

    Raises:
        CaptureError, ModelFileError: see `from_torch` and `from_onnx`; the message names the place in the model.
    """
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        if not path.name.endswith((".onnx", ".onnx.gz")):
            raise ModelFileError(
                f"{path}: soundly reads .onnx and .onnx.gz files; load other models in PyTorch and pass the module."
            )
        from soundly.graph.from_onnx import from_onnx

        return from_onnx(path, example_shapes=shapes)
    from torch import nn

    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model must be an nn.Module or the path of an ONNX file, not {type(model).__name__}.")
    if example is None:
        raise InvalidInput("load(module, example): give an example input; its shape becomes the graph's.")
    from soundly.graph.from_torch import from_torch

    return from_torch(model, example)
