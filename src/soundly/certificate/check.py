"""The checker: decides from the numbers in a certificate alone whether each row holds. This is the part to trust.

It needs numpy and shares nothing with the code that searched for the edit or the proof. Everything is evaluated in
float64 together with a bound on all rounding (derived in docs/certificates.md); a row counts as proven only where the
ends of that enclosure are finite and lie inside its bounds. What is not understood is refused, and a refusal says why.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from soundly.certificate.format import (
    DTYPES,
    FLOAT32,
    HEAD_EDIT,
    NETWORK,
    REALS,
    VERIFICATION,
    Array,
    Certificate,
    elements,
    map_file,
    parse_json,
    raw_bytes,
    reason,
)
from soundly.certificate.verification import replay
from soundly.errors import CertificateError, ModelFileError

# Each operation in float64 is exact up to a factor 1 + d, |d| <= U. FLOOR pays for all underflow in one row.
U = 2.0**-53
FLOOR = 2.0**-960
LONGEST = 2**26
CHUNK = 2**16
MAX_MODEL_HEADER = 16 << 20
SAFETENSORS = {"F32": 4, "F64": 8, "BF16": 2}


@dataclass(frozen=True)
class ClaimResult:
    """One claim: how many of its rows are proven, and how far the worst stays from its bounds (negative: beyond).

    For a verification the claims are its cases, their rows the cases' clauses.
    """

    name: str
    rows: int
    proven: int
    worst_slack: float


@dataclass(frozen=True)
class CheckResult:
    """What a certificate proves.

    accepted: every row is proven, there is at least one, and there are no problems.
    rows, proven: how many there are, how many hold.
    claims: the same for each claim; empty where problems kept the rows from being evaluated.
    problems: why the certificate is refused, besides rows that are not proven.
    arithmetic: what "proven" means.
    model_matches: whether the model file holds exactly the certificate's weights; None if they were not compared.
    """

    accepted: bool
    rows: int
    proven: int
    claims: tuple[ClaimResult, ...]
    problems: tuple[str, ...]
    arithmetic: str
    model_matches: bool | None = None


class Kind(Protocol):
    """One kind of certificate: what it must contain, and how its rows are proven."""

    arithmetic: str

    def problems(self) -> Iterator[str]:
        """Everything that keeps the rows from being evaluated. Runs first; may stop at the first that hides others."""

    def rows(self) -> int:
        """How many rows there are, as far as that is known."""

    def prove(self) -> tuple[ClaimResult, ...]:
        """What holds of each claim; their rows are all rows. Called where there are no problems."""

    def model_problems(self, model: str) -> Iterator[str]:
        """How the model file differs from the certificate."""


def check(
    certificate: Certificate | str | os.PathLike[str], *, model: str | os.PathLike[str] | None = None
) -> CheckResult:
    """Prove every row of a certificate again, trusting nothing but its numbers.

    Guarantee: a row counted as proven holds in real arithmetic, for exactly the stored numbers: lower <= row <= upper
    for a head edit; for a verification, its clause on the whole box of its case, in float32 as well if `arithmetic`
    says so. The names of claims and whether the
    numbers belong to a network are the maker's words, not checked.

    Args:
        model: a .safetensors file to compare with the certificate's weights, bit by bit.

    Raises:
        CertificateError: the file cannot be read or is of an unknown kind.
        ModelFileError: the model file cannot be read.
    """
    where = "certificate"
    if not isinstance(certificate, Certificate):
        where, certificate = str(certificate), Certificate.load(certificate)
    make = KINDS.get(certificate.kind) if isinstance(certificate.kind, str) else None
    if make is None:
        known = ", ".join(KINDS)
        raise CertificateError(f"{where}: kind {certificate.kind!r:.80} is unknown; this soundly checks: {known}.")
    kind = make(certificate)
    problems = [*_arithmetic_problems(), *kind.problems()]
    claims = () if problems else kind.prove()
    matches = None
    if model is not None and not problems:
        differences = list(kind.model_problems(os.fspath(model)))
        problems += differences
        matches = not differences
    rows, proven = kind.rows(), sum(claim.proven for claim in claims)
    accepted = not problems and 0 < proven == rows
    return CheckResult(accepted, rows, proven, claims, tuple(problems), kind.arithmetic, matches)


def _claims(certificate: Certificate, low: Array, high: Array) -> tuple[ClaimResult, ...]:
    lower, upper = certificate.arrays["lower"], certificate.arrays["upper"]
    proven = np.isfinite(low) & np.isfinite(high) & (low >= lower) & (high <= upper)
    with np.errstate(all="ignore"):
        slack = np.minimum(low - lower, upper - high)
        for start, stop in _cones(certificate).tolist():
            # The distance is rounded up by more than the radius may be (docs/certificates.md).
            missed = np.maximum(np.maximum(lower - low, high - upper)[start : stop - 1], 0.0)
            size = np.sqrt((missed * missed).sum() + FLOOR) * (1 + (stop - start + 8) * U)
            radius = low[stop - 1] - lower[stop - 1]
            proven[start:stop] = np.isfinite(size) and np.isfinite(radius) and size <= radius
            slack[start:stop] = radius - size
    slack[~np.isfinite(low) | ~np.isfinite(high) | np.isnan(slack)] = -np.inf
    spans = [(claim["name"], *claim["rows"]) for claim in certificate.header["claims"]]
    return tuple(
        ClaimResult(name, stop - start, int(proven[start:stop].sum()), float(slack[start:stop].min()))
        for name, start, stop in spans
    )


def _cones(certificate: Certificate) -> Array:
    """[q, 2]: rows start .. stop - 1 form a cone."""
    return certificate.arrays["cones"] if "cones" in certificate.arrays else np.zeros((0, 2), np.int64)


def _cone_problems(certificate: Certificate, claims: Array) -> Iterator[str]:
    """Cones must have at least two rows each, all in one claim [k, 2], and be in order without overlap; the last row
    must have a lower end only."""
    cones, lower, upper = _cones(certificate), certificate.arrays["lower"], certificate.arrays["upper"]
    if cones.shape[1] != 2:
        yield f"cones have {cones.shape[1]} numbers each; expected start, stop"
        return
    start, stop = cones.T
    wrong = (start < 0) | (stop > len(lower)) | (stop - start < 2) | (stop - start > LONGEST)
    wrong[1:] |= start[1:] < stop[:-1]
    if wrong.any():
        yield from _first("cones out of range, of one row, out of order or overlapping", wrong)
        return
    owner = np.searchsorted(claims[:, 1], start, side="right")
    yield from _first("a cone reaches beyond its claim", stop > claims[owner, 1])
    yield from _first("a cone's radius has an upper end, or no lower one", ~np.isfinite(lower[stop - 1])
                      | ~np.isposinf(upper[stop - 1]))  # fmt: skip


def _claim_problems(certificate: Certificate) -> Iterator[str]:
    """The claims must cover every row exactly once, in order, and none may be empty; bounds must be bounds."""
    lower, upper = certificate.arrays["lower"], certificate.arrays["upper"]
    claims, rows = certificate.header.get("claims"), len(lower)
    if rows == 0:
        yield "nothing is claimed: there are no rows"
    yield from _first("lower or upper is NaN", np.isnan(lower) | np.isnan(upper))
    yield from _first("no bound at all (-inf and +inf)", np.isneginf(lower) & np.isposinf(upper))
    if not isinstance(claims, list):
        yield "claims is not a list"
        return
    covered = 0
    for index, claim in enumerate(claims):
        match claim:
            case {"name": str(), "rows": [start, stop]} if (
                len(claim) == 2 and type(start) is type(stop) is int and start == covered < stop
            ):
                covered = stop
            case _:
                yield f"claim {index} must be a name and rows [start, stop] with {covered} = start < stop"
                return
    if covered != rows:
        yield f"the claims cover {covered} of {rows} rows"
    elif rows:
        yield from _cone_problems(certificate, np.array([claim["rows"] for claim in claims]))


def _arithmetic_problems() -> Iterator[str]:
    """The error bound assumes IEEE float64; a library compiled for speed can switch that off for a whole process."""
    one = np.ones(1)
    with np.errstate(all="ignore"):
        nearest = (one + 2.0**-54 == 1) & (one - 2.0**-55 == 1) & (-one - 2.0**-54 == -1)
        subnormal = (np.full(1, 2.0**-1074) * one > 0) & (np.array([1], np.uint32).view(np.float32).astype(float) > 0)
    if not (nearest & subnormal).all():
        yield "this process does not compute in IEEE float64 (rounding mode or flush-to-zero); check in a fresh process"


def _first(what: str, wrong: Array) -> Iterator[str]:
    if wrong.any():
        yield f"{what}: index {int(np.argmax(wrong))}, {int(wrong.sum())} in all"


def _widen(array: Array) -> Array:
    """float64, exactly. bfloat16 is the upper half of a float32."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class HeadEdit:
    """Rows that are linear in edited weights of the last layer: row = sum of c * (a vector . weights of a class).

    Those of a cone may miss their bounds, in the Euclidean norm by no more than the cone's last row has to spare.
    """

    arithmetic = REALS
    shapes: Mapping[str, tuple[str, str]] = {
        "vectors": ("f4 f8", "vn"), "value_vector": ("i8", "s"), "value_class": ("i8", "s"),
        "classes": ("i8", "c"), "weights": ("f4 f8 bf16", "cn"),
        "row_start": ("i8", "r"), "row_value": ("i8", "k"), "row_coefficient": ("f8", "k"),
        "lower": ("f8", "m"), "upper": ("f8", "m"), "margin": ("f8", "m"), "error": ("f8", "m"),
    }  # fmt: skip
    optional: Mapping[str, tuple[str, str]] = {"cones": ("i8", "qd")}
    entries = frozenset({"format", "version", "kind", "arithmetic", "claims", "model", "edit", "made_with"})
    stored: Mapping[object, tuple[str, str]] = {  # what the header and a .safetensors file call the dtype of weights
        DTYPES["f4"]: ("float32", "F32"), DTYPES["f8"]: ("float64", "F64"), DTYPES["bf16"]: ("bfloat16", "BF16"),
    }  # fmt: skip

    def __init__(self, certificate: Certificate) -> None:
        self.certificate = certificate
        self.header, self.arrays = certificate.header, certificate.arrays

    def rows(self) -> int:
        return self.arrays["lower"].size if "lower" in self.arrays else 0

    def prove(self) -> tuple[ClaimResult, ...]:
        return _claims(self.certificate, *self.enclose())

    def problems(self) -> Iterator[str]:
        found = list(self._own_problems())
        yield from found
        if not found:
            yield from _claim_problems(self.certificate)

    def _own_problems(self) -> Iterator[str]:
        sizes: dict[str, int] = {}
        shaped = list(self._shape_problems(sizes))
        yield from shaped
        if shaped:
            return
        start, a = self.arrays["row_start"], self.arrays
        if sizes["r"] != sizes["m"] + 1 or start[0] != 0 or start[-1] != sizes["k"]:
            yield f"row_start must have {sizes['m'] + 1} numbers, from 0 to {sizes['k']}"
            return
        if sizes["n"] == 0:
            yield "vectors have no entries"
        yield from _first("row_start decreases", start[1:] < start[:-1])
        yield from _first(f"more than {LONGEST} operations in a row", sizes["n"] + np.diff(start) > LONGEST)
        for name, size in (("row_value", sizes["s"]), ("value_vector", sizes["v"]), ("value_class", sizes["c"])):
            yield from _first(f"{name} out of range", (a[name] < 0) | (a[name] >= size))
        yield from _first("classes are negative", a["classes"] < 0)
        if len(np.unique(a["classes"])) != sizes["c"]:
            yield "classes contain the same output twice"
        if not all(np.isfinite(_widen(a["weights"][rows])).all() for rows in _chunks(sizes["c"], sizes["n"])):
            yield "weights are not finite"
        if self.header["edit"] != hashlib.sha256(raw_bytes(a["weights"])).hexdigest():
            yield "the header's hash 'edit' is not that of the weights"

    def _shape_problems(self, sizes: dict[str, int]) -> Iterator[str]:
        """Names, dtypes and shapes; fills in the sizes. What the checker would ignore, it refuses."""
        known = {**self.shapes, **{name: shape for name, shape in self.optional.items() if name in self.arrays}}
        if set(self.header) != self.entries or set(self.arrays) != set(known):
            odd = sorted((set(self.header) ^ self.entries) | (set(self.arrays) ^ set(known)))
            yield f"missing or unknown entries: {odd!s:.200}"
            return
        if self.header["arithmetic"] != REALS:
            yield f"claimed {self.header['arithmetic']!r:.80}; this checker proves {REALS!r}"
        for name, (dtypes, letters) in known.items():
            array = self.arrays[name]
            if array.dtype not in [DTYPES[dtype] for dtype in dtypes.split()] or array.ndim != len(letters):
                yield f"{name}: {array.dtype} with {array.ndim} dimensions; expected {dtypes}, [{', '.join(letters)}]"
                continue
            for letter, size in zip(letters, array.shape, strict=True):
                if sizes.setdefault(letter, size) != size:
                    yield f"{name}: shape {array.shape} disagrees with the other arrays on {letter}"
        dtype = self.stored.get(self.arrays["weights"].dtype, ("",))[0]
        match self.header["model"]:
            case {"before": str(), "after": str(), "layer": str(), "dtype": str(said)}:
                if said != dtype:
                    yield f"the header says {said!r:.80} where the weights are {dtype!r}"
            case _:
                yield "model needs the texts before, after, layer and dtype"

    def enclose(self) -> tuple[Array, Array]:
        """low, high [m] with low[i] <= row i <= high[i] in real arithmetic; NaN or infinite where nothing is known."""
        a, count, n = self.arrays, len(self.arrays["value_vector"]), self.arrays["vectors"].shape[1]
        value, magnitude = np.empty(count), np.empty(count)
        with np.errstate(all="ignore"):  # overflow ends in inf or NaN, which proves nothing
            for some in _chunks(count, n):
                product = _widen(a["vectors"][a["value_vector"][some]])
                product *= _widen(a["weights"][a["value_class"][some]])
                value[some] = product.sum(axis=1)
                magnitude[some] = np.abs(product, out=product).sum(axis=1) + FLOOR
            rows, length = len(a["lower"]), np.diff(a["row_start"])
            row, term, coefficient = np.repeat(np.arange(rows), length), a["row_value"], a["row_coefficient"]
            total = np.bincount(row, coefficient * value[term], rows)
            total_magnitude = np.bincount(row, np.abs(coefficient) * magnitude[term], rows) + FLOOR
            # docs/certificates.md derives it: n + length roundings, 8 more for the roundings of the bound itself.
            error = (n + length + 8) * U * total_magnitude
            low, high = np.nextafter(total - error, -np.inf), np.nextafter(total + error, np.inf)
            return np.where(length > 0, low, 0.0), np.where(length > 0, high, 0.0)  # an empty sum is 0

    def model_problems(self, model: str) -> Iterator[str]:
        layer, weights = self.header["model"]["layer"], self.arrays["weights"]
        file, prefix = _Safetensors(model), f"{layer}." if layer else ""
        yield from self._differences(file, f"{prefix}weight", weights[:, :-1])
        if f"{prefix}bias" in file.entries:
            yield from self._differences(file, f"{prefix}bias", weights[:, -1])
        elif np.any(_widen(weights[:, -1])):
            yield f"{model}: no tensor {prefix + 'bias'!r}, but the certificate's bias is not zero"

    def _differences(self, file: "_Safetensors", name: str, ours: Array) -> Iterator[str]:
        classes, bits = self.arrays["classes"], np.dtype(f"<u{ours.itemsize}")
        if name not in file.entries:
            yield f"{file.path}: no tensor {name!r}"
            return
        expected, (dtype, shape, begin) = self.stored[ours.dtype][1], file.entry(name)
        if dtype != expected or len(shape) != ours.ndim or shape[1:] != list(ours.shape[1:]):
            yield f"{file.path}: {name} is {dtype} {shape}; the certificate has rows of {expected} {ours.shape[1:]}"
            return
        if len(classes) and classes.max() >= shape[0]:
            yield f"{file.path}: {name} has {shape[0]} rows; the certificate has weights of row {classes.max()}"
            return
        theirs: Array = np.ndarray(shape, bits, buffer=file.data, offset=begin)
        for some in _chunks(len(classes), math.prod(shape[1:])):
            same = theirs[classes[some]] == ours[some].view(bits)
            if not same.all():
                row = int(np.argmin(same.reshape(len(same), -1).all(axis=1)))
                yield f"{file.path}: {name} differs from the certificate, first in row {classes[some][row]}"
                return


class Verification:
    """Rows of a network's outputs and inputs over boxes, with split trees: `soundly.certificate.verification`."""

    def __init__(self, certificate: Certificate) -> None:
        self.arithmetic = FLOAT32 if certificate.header.get("arithmetic") == FLOAT32 else NETWORK
        self.replay = replay(certificate)

    def problems(self) -> Iterator[str]:
        yield from self.replay.problems

    def rows(self) -> int:
        return len(self.replay.proven)

    def prove(self) -> tuple[ClaimResult, ...]:
        found = self.replay
        where = "" if found.choices is None else f", on a grid of {found.choices:,} choices"
        return tuple(
            ClaimResult(f"case {i}{where}", b - a, int(found.proven[a:b].sum()), float(found.margin[a:b].min()))
            for i, (a, b) in enumerate(pairwise(found.pair_start.tolist()))
        )

    def model_problems(self, model: str) -> Iterator[str]:
        yield f"{model}: a verification's program cannot be compared with a model file; leave the model out"


class _Safetensors:
    """A .safetensors file: u64 header length, JSON table, data. Parsed here, because a checker trusts no loader."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.data = map_file(path)
            length = int.from_bytes(self.data[:8], "little")
            if not 2 <= length <= min(MAX_MODEL_HEADER, len(self.data) - 8):
                raise ValueError(f"a header of {length} bytes in {len(self.data)} bytes; truncated or not .safetensors")
            self.entries = parse_json(self.data[8 : 8 + length])
        except (OSError, ValueError) as problem:
            raise ModelFileError(f"{path}: cannot be read as .safetensors: {reason(problem)}.") from problem
        self.base = 8 + length

    def entry(self, name: str) -> tuple[str, list[int], int]:
        """dtype, shape and first byte in the file, in range for the dtypes that SAFETENSORS names."""
        match self.entries[name]:
            case {"dtype": str(dtype), "shape": shape, "data_offsets": [int(begin), int(end)]}:
                size = SAFETENSORS.get(dtype)
                count = elements(shape)
                inside = 0 <= begin <= end <= len(self.data) - self.base
                if count is not None and inside and (size is None or end - begin == count * size):
                    return dtype, shape, self.base + begin
        raise ModelFileError(f"{self.path}: the entry of tensor {name!r} does not fit the file; it is damaged.")


KINDS: Mapping[str, Callable[[Certificate], Kind]] = {HEAD_EDIT: HeadEdit, VERIFICATION: Verification}
