"""Confirming counterexamples where it counts: on the user's own model, in its own arithmetic, at points of the region.

A search works on a program of its own, perhaps in another floating type. Its candidates become witnesses here alone:
moved to inputs that the model's type can hold, run by onnxruntime from the original file, or by the network itself, and
judged by the claim on exactly these numbers.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from soundly.errors import InvalidInput, ModelFileError
from soundly.graph.network import Network
from soundly.spec.claim import Claim
from soundly.spec.region import Union

TOLERANCE = 1e-7
"""How far an entry x may lie outside, times max(1, |x|), where no number of the model's type lies inside: inputs fixed
to decimals are rounded to the nearest number."""
NEAR = 1e-3
"""Points this far from a violation, relative to the outputs, may still be moved into one."""
TRIES = 24
"""The most evaluations of the original model."""


@dataclass(frozen=True, eq=False)
class Replay:
    """A confirmed counterexample.

    Attributes:
        x: the witness, flat, float64: numbers that the model's own type holds.
        outputs: the model's flat outputs there, float64.
        violation: how deep it lies among the counterexamples, see `Claim.violation`; not negative.
        by: "onnxruntime" ran the original file; "network" means the network itself, in its own type and in float64.
    """

    x: Tensor
    outputs: Tensor
    violation: float
    by: Literal["onnxruntime", "network"]


def replay(claim: Claim, x: Tensor, *, model: str | os.PathLike[str] | None = None) -> Replay | None:
    """Confirms a candidate as a counterexample on the original model, at the point itself or next to it.

    Args:
        x: a point [n] near or in the region, flat.
        model: the ONNX file (.onnx or .onnx.gz) that `claim.network` was loaded from. Without one, without onnxruntime
            or where inputs are neither float nor double, the network answers. So it does for claims about gradients,
            which are another function than the file's: give no model for those. A network in float32 has to violate
            the claim in float64 as well, so that no rounding at a kink makes a witness.

    Returns:
        None if neither the point nor one of a bounded number of neighbours is a counterexample. Where the region holds
        no number of the model's type, the nearest point counts (see `TOLERANCE`) if the network, evaluated in float64
        within the region, violates the claim as well.

    Raises:
        InvalidInput: the model's inputs or outputs are not those of the claim; or there is neither model nor network.
        ModelFileError: the file cannot be read or run.
    """
    if claim.is_empty or not bool(torch.isfinite(x).all()):
        return None
    judge = _judge(claim, model)
    seen: set[bytes] = set()
    near: tuple[float, Tensor] | None = None
    for point in _projected(claim, x, judge.dtype):
        found, violation = judge(point)
        if found:
            return found
        seen.add(point.numpy().tobytes())
        if near is None or violation > near[0]:
            near = violation, point
    if near is None or not near[0] >= -NEAR * judge.scale:
        return None
    for moved in _neighbours(claim, near[1], judge.dtype):
        for point in _projected(claim, moved, judge.dtype):
            if point.numpy().tobytes() in seen:
                continue
            seen.add(point.numpy().tobytes())
            found, _ = judge(point)
            if found:
                return found
        if len(seen) >= TRIES:
            break
    return None


def witness_text(inputs: Tensor, outputs: Tensor) -> str:
    """The competitions' text of a counterexample, every number with the digits that tell it from its neighbours."""
    values = [(f"X_{i}", v) for i, v in enumerate(inputs.double().flatten().tolist())]
    values += [(f"Y_{j}", v) for j, v in enumerate(outputs.double().flatten().tolist())]
    return "sat\n(" + "\n ".join(f"({name} {value!r})" for name, value in values) + ")\n"


class _Judge(ABC):
    """Evaluates the original model and asks the claim."""

    dtype: torch.dtype = torch.float64
    by: Literal["onnxruntime", "network"]

    def __init__(self, claim: Claim) -> None:
        self.claim, self.scale = claim, 1.0

    @abstractmethod
    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The flat outputs at a flat point, in float64: all of them have to violate the claim."""

    def __call__(self, x: Tensor) -> tuple[Replay | None, float]:
        """The replay if x is a counterexample, and how deep it lies if it is not too far off to tell."""
        claim, shaped = self.claim, x.reshape(self.claim.region.shape)
        answers = [(shaped, y) for y in self.outputs(x)]
        tolerance = 0.0
        if not bool(claim.region.contains(shaped)[()]):
            exact = claim.region.project(shaped)
            if not bool(((exact - shaped).abs() <= TOLERANCE * shaped.abs().clamp(min=1)).all()):
                return None, -math.inf
            tolerance = float(claim.region.excess(torch.stack([shaped, exact])).max())
            if isinstance(claim.network, Network):
                answers.append((exact, claim.outputs(exact)))
        if not all(bool(torch.isfinite(y).all()) for _, y in answers):
            return None, -math.inf
        outputs = answers[0][1]
        self.scale = max(1e-6, float(outputs.abs().max())) if len(outputs) else 1.0
        violation = min(claim.violation(point, y, tolerance=tolerance) for point, y in answers)
        if any(claim.holds_at(point, y, tolerance=tolerance) for point, y in answers):
            return None, violation
        # The rounded rows of exact decimals may be off by an ulp where the exact ones are judged true.
        return Replay(x, outputs, max(violation, 0.0), self.by), violation


class _ByNetwork(_Judge):
    by = "network"

    def __init__(self, claim: Claim, network: Network) -> None:
        super().__init__(claim)
        self.dtype = network.dtype

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        own = self.claim.outputs(x.to(self.dtype)).double()
        return (own,) if self.dtype == torch.float64 else (own, self.claim.outputs(x))


class _ByRuntime(_Judge):
    by = "onnxruntime"

    def __init__(self, claim: Claim, session: Any, name: str) -> None:
        super().__init__(claim)
        self.session, self.name = session, name
        self.ports = [(port.name, _TYPES[port.type]) for port in session.get_inputs()]
        if len(self.ports) != len(claim.shapes.inputs):
            raise InvalidInput(
                f"model: {name} takes {len(self.ports)} inputs, the claim's network {len(claim.shapes.inputs)}; pass "
                "the file it was loaded from."
            )
        narrow = any(kind != np.float64 for _, kind in self.ports)
        self.dtype = torch.float32 if narrow else torch.float64

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = self.claim.inputs(x)
        feed = {name: v.numpy().astype(kind) for (name, kind), v in zip(self.ports, parts, strict=True)}
        try:
            results = self.session.run(None, feed)
        except Exception as error:  # onnxruntime's own types share no public base
            raise ModelFileError(f"{self.name}: onnxruntime cannot run the model: {error}") from error
        y = torch.cat([torch.from_numpy(np.asarray(r).astype(np.float64)).reshape(-1) for r in results])
        if len(y) != self.claim.property.outputs:
            raise InvalidInput(
                f"model: {self.name} has {len(y)} outputs, but the claim is about {self.claim.property.outputs}; pass "
                "the file that its network was loaded from, and none for a claim about gradients."
            )
        return (y,)


_TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64}


def _judge(claim: Claim, model: str | os.PathLike[str] | None) -> _Judge:
    if model is not None:
        path = Path(model)
        session = runtime(path)
        if session is not None and all(port.type in _TYPES for port in session.get_inputs()):
            return _ByRuntime(claim, session, path.name)
    if not isinstance(claim.network, Network):
        raise InvalidInput(
            f"{claim.name} was read without its network: name the model's file, and install onnxruntime."
        )
    return _ByNetwork(claim, claim.network)


def runtime(path: Path) -> Any:
    """An onnxruntime session of the file as it is, on one thread; None without onnxruntime.

    Raises:
        ModelFileError: the file cannot be read, or onnxruntime refuses it.
    """
    try:
        stamp = path.stat()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error}.") from error
    return _session(path, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=2)
def _session(path: Path, modified: int, size: int) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None
    from soundly.graph.onnx_file import read_file

    file = read_file(path)
    external = any(t.data_location for t in file.model.graph.initializer)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(
            str(path) if external else file.data, options, providers=["CPUExecutionProvider"], enable_fallback=False
        )
    except Exception as error:
        raise ModelFileError(f"{path.name}: onnxruntime refuses the model: {error}") from error


def _projected(claim: Claim, x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The point moved into the region, for a Union into each of the boxes next to it: flat float64 points."""
    region, x = claim.region, x.detach().double().cpu().reshape(claim.region.shape)
    parts: Sequence[Any] = [region]
    if isinstance(region, Union):
        nearest = region.project(x)
        boxes = region.members(nearest, tolerance=1e-6).nonzero().flatten().tolist()
        parts = [region[i] for i in boxes if not region[i].is_empty][:8] or [region]
    for part in parts:
        lower, upper = part.box.points
        point = part.project(x, dtype=dtype).double()
        held = (point >= lower) & (point <= upper)
        yield torch.where(held, point, part.project(x).to(dtype).double()).reshape(-1)


def _neighbours(claim: Claim, x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Points near x: along the gradient of the clause that is nearest to true, then a few units in the last place off,
    at random."""
    box = claim.region.box
    width = (box.upper - box.lower).flatten()
    if isinstance(claim.network, Network):
        network = claim.network.to(torch.float64)
        point = x.clone().requires_grad_()
        y = torch.cat([v.reshape(-1) for v in network.evaluate(network.outputs, *claim.inputs(point))])
        worst = claim.property.worst(y, point)
        if len(worst) and worst.requires_grad:
            (gradient,) = torch.autograd.grad(worst.min(), point)
            gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
            for length in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
                yield x - length * width * gradient.sign()
    generator = torch.Generator().manual_seed(0)
    unit = torch.finfo(dtype).eps * x.abs().clamp(min=1e-30)
    for k in range(TRIES):
        yield x + unit * torch.randint(-1 - k // 4, 2 + k // 4, x.shape, generator=generator)
