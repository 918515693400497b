"""From a proved edit to files: the model's own file with other weights, its certificate, and what changed.

The file that was read is kept as it is, but for the entries of the edited parameters. It is read again, and compared
with the network that was proved, before it gets its name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from soundly.editing.delta import Delta
from soundly.editing.edit import Edit
from soundly.editing.moved import Moved
from soundly.errors import EditError
from soundly.graph.load import load
from soundly.graph.network import Network
from soundly.graph.onnx_weights import replaced, write


def deliver(
    original: bytes,
    network: Network,
    edit: Edit,
    path: str | os.PathLike[str],
    *,
    certificate: str | os.PathLike[str] | None = None,
    delta: str | os.PathLike[str] | None = None,
) -> Mapping[str, Moved]:
    """Writes a proved edit of an ONNX file.

    Args:
        original: the serialised model.
        network: what was read from it and edited.
        path: where the edited model is written, .onnx or .onnx.gz; last of all files.
        certificate, delta: where these are written, if at all.

    Returns:
        The parameters that changed.

    Raises:
        EditError: nothing was proved, or the file cannot hold the edited weights.
    """
    new, proof = edit.model, edit.certificate
    if not isinstance(new, Network) or proof is None:
        raise EditError(f"there is no proved edit of a network to write: {edit.status}, {edit.reason}")
    old, weights = _bits(network), _bits(new)
    changed = [name for name, bits in weights.items() if bits != old[name]]
    data = replaced(original, {name: new.values[new.parameters[name]].numpy() for name in changed})
    difference = Delta.between(original, data)

    def accept(partial: Path) -> None:
        if _bits(load(partial)) != weights:
            raise EditError("the edited file, read again, does not hold the weights that were proved; nothing is kept.")
        if certificate is not None:
            proof.save(certificate)
        if delta is not None:
            difference.save(delta)

    write(data, path, accept)
    return {name: edit.moved[name] for name in changed}


def _bits(network: Network) -> dict[str, bytes]:
    return {name: network.values[node].detach().cpu().numpy().tobytes() for name, node in network.parameters.items()}
