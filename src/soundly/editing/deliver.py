"""From a proved edit to files: the model's own file with other weights, its certificate, and what changed.

The file that was read is kept as it is, but for the entries of the edited parameters. It is read again, and compared
with the network that was proved, before it gets its name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from soundly.editing.delta import Delta
from soundly.editing.edit import Edit
from soundly.errors import EditError
from soundly.graph.load import load
from soundly.graph.network import Network
from soundly.graph.onnx_weights import replaced, write


@dataclass(frozen=True)
class Moved:
    """How far an edit moved a parameter.

    Attributes:
        changed, of: how many entries changed, of how many.
        norm, largest: the Euclidean norm of the change, and the largest change of an entry.
        relative: the norm over that of the parameter before; infinite if that is 0.
    """

    changed: int
    of: int
    norm: float
    largest: float
    relative: float


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
    return {name: _moved(difference, name, network) for name in difference.changes}


def _bits(network: Network) -> dict[str, bytes]:
    return {name: network.values[node].detach().cpu().numpy().tobytes() for name, node in network.parameters.items()}


def _moved(delta: Delta, name: str, network: Network) -> Moved:
    change, before = delta.changes[name], network.values[network.parameters[name]].double()
    moved = change.new.astype(float) - change.old.astype(float)
    norm, size = math.sqrt(float((moved**2).sum())), float(before.norm())
    return Moved(len(moved), before.numel(), norm, float(abs(moved).max()), norm / size if size else math.inf)
