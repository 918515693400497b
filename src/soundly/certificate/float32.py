"""How far float32 may take a program's values from its real ones: forward, step by step, whatever the order of sums.

Steps are taken for the operations that are carried out. Affine steps that read each other may be carried out together,
or have been folded: sums may be formed in any order, products fused with them, and coefficients multiplied beforehand.
docs/certificates.md says why the bounds hold, and what they assume of the functions.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from soundly.certificate.bounding import ABOVE, Frame
from soundly.certificate.functions import Function
from soundly.certificate.intervals import refresh
from soundly.certificate.program import Affine, Apply, Map, Program, Sparse, Times, Variable
from soundly.certificate.reading import Proof

Array = npt.NDArray[np.float64]

UNIT = 2.0**-24
SMALL = 2.0**-126  # what a result may lose that underflows, even where it is flushed to zero
LARGE = 2.0**127  # what is larger may overflow
LONGEST = 2**20  # roundings of one value, at most


@dataclass(frozen=True, eq=False)
class Spread:
    """Of a step: how far what is computed may be from the real value [M, n]. Of an affine one without the roundings of
    its own: these are a multiple of `total` [M, n], of the absolute values of all that is added up, as `roundings`
    says; and `lost` [M, n] by underflow."""

    error: Array
    total: Array
    roundings: int
    lost: Array

    @property
    def all(self) -> Array:
        """The whole error; infinite where nothing is known."""
        if self.roundings > LONGEST:
            return np.full(self.error.shape, np.inf)
        rate = self.roundings * UNIT / (1 - self.roundings * UNIT)
        return _known((self.error + rate * self.total + self.lost) * ABOVE, self.total)


def _known(error: Array, size: Array) -> Array:
    """Infinite where a number may overflow, and where no number is known."""
    return np.where((error < LARGE) & (size + error < LARGE), error, np.inf)


def deviation(program: Program, frame: Frame) -> Array:
    """For every box of a frame a bound on |computed - real| of the program's last step [M, n], at every float32 point
    of the box, for every order of the sums, with or without fused products; infinite where there is none."""
    found: list[Spread] = []
    with np.errstate(all="ignore"):
        for i, step in enumerate(program.steps):
            match step:
                case Variable(size):
                    none = np.zeros((len(frame.lower[0]), size))
                    found.append(_alone(none, frame, i))
                case Affine():
                    found.append(_added(step, found))
                case Apply(source, function):
                    error, low, high = found[source].all, frame.lower[source], frame.upper[source]
                    found.append(_alone(_applied(function, error, low - error, high + error), frame, i))
                case Times(left, right):
                    a, b = (found[s].all for s in (left, right))
                    x, y = (np.maximum(np.abs(frame.lower[s]), np.abs(frame.upper[s])) for s in (left, right))
                    error = a * y + b * x + a * b + 2 * UNIT * (x + a) * (y + b) + SMALL
                    found.append(_alone(error, frame, i))
    return found[-1].all


def row_errors(proof: Proof, *, at_once: int, deadline: float = math.inf) -> Array:
    """For every row of a certificate by how much float32 may change it, on the box of its case [rows].

    Args:
        at_once: so many boxes find room together.
    """
    program, outputs = proof.program, proof.program.steps[-1].size
    lower, upper = proof.lower, proof.upper
    if program.ball is not None:
        lower, upper = program.ball.narrowed(lower, upper)
    result = np.zeros(len(proof.slack))
    first = proof.pair_rows[proof.pair_start]
    for begin in range(0, len(lower), at_once):
        some = slice(begin, begin + at_once)
        none = np.full(len(lower[some]), -1)
        frame, _ = refresh(program, lower[some], upper[some], None, none, proof.stored, deadline=deadline)
        apart = deviation(program, frame)
        for k, (start, stop) in enumerate(pairwise(first[begin : begin + at_once + 1].tolist())):
            for row in range(start, stop):
                at = slice(proof.start[row], proof.start[row + 1])
                read = proof.column[at] < outputs
                error = apart[k, proof.column[at][read]] * np.abs(proof.value[at][read])
                result[row] = error.sum() * ABOVE if np.isfinite(error).all() else np.inf
    return result


def _alone(error: Array, frame: Frame, i: int) -> Spread:
    """Of a step that is not affine. A number may be taken for zero that is too small."""
    error = np.where(np.isnan(error), np.inf, error * ABOVE + SMALL)
    size = np.maximum(np.abs(frame.lower[i]), np.abs(frame.upper[i]))
    return Spread(error, size + error, 0, np.zeros(error.shape))


def _added(step: Affine, found: list[Spread]) -> Spread:
    """Sums of sums are as long as both together; what is copied is not rounded."""
    sources = [found[s] for _, s in step.parts]
    error, total, lost = (np.zeros((len(found[0].error), step.size)) for _ in range(3))
    total = total + np.abs(step.bias) + step.bias_error
    largest = np.zeros((len(total), 1))
    for (part, _), source in zip(step.parts, sources, strict=True):
        factor = (1 + step.weight_error) * ABOVE
        error = error + factor * _image(part, source.error)
        total = total + factor * _image(part, source.total)
        lost = lost + factor * _image(part, source.lost)
        largest = np.maximum(largest, source.total.max(axis=1, keepdims=True))
    error = np.where(total + error < LARGE, error, np.inf)
    before = max((source.roundings for source in sources), default=0)
    if len(step.parts) == 1 and _moves(step):
        return Spread(error, total, before, lost)
    terms = sum(part.terms for part, _ in step.parts)
    return Spread(error, total * ABOVE, before + terms + 4, lost + (terms + 4) * SMALL * (2 + largest))


def _image(part: Map, error: Array) -> Array:
    """Errors through a map's absolute coefficients: infinite where an infinite one counts."""
    absolute = part.absolute
    far = ~np.isfinite(error)
    image: Array = absolute.apply(np.where(far, 0.0, error))
    return np.where(absolute.apply(far.astype(float)) > 0, np.inf, image) if far.any() else image


def _moves(step: Affine) -> bool:
    """Whether every entry is another one, or its negative, or zero."""
    part = step.parts[0][0]
    return (
        isinstance(part, Sparse)
        and len(np.unique(part.rows)) == len(part.rows)
        and bool((np.abs(part.values) == 1).all())
        and not step.bias.any()
        and not step.bias_error.any()
        and step.weight_error == 0
    )


def _applied(function: Function, error: Array, low: Array, high: Array) -> Array:
    """What an error makes of f between low and high, and what f adds to it."""
    least, greatest = function.range(low, high)
    apart = greatest - least  # where f may jump, the computed value lies on either side
    slopes = Function(function.ring, function.slopes, function.breaks, (np.nan,) * len(function.breaks))
    flat, steep = slopes.range(low, high)
    steepest = np.maximum(np.abs(flat), np.abs(steep))
    carried = np.where(error == 0, 0.0, steepest * error)
    for i, t in enumerate(function.breaks):
        if not function.ends[i][3]:
            carried = carried + np.where((low <= t) & (high >= t) & (error > 0), _jump(function, i, t), 0.0)
    return np.minimum(carried, np.where(error == 0, 0.0, apart)) + _own(function, low, high)


def _jump(function: Function, i: int, t: float) -> float:
    """How far values at a break are apart, at most."""
    at = np.full(1, t)
    ends = [function.ring.enclose(p, at, at) for p in function.pieces[i : i + 2]]
    if not np.isnan(function.held[i]):
        ends.append((np.full(1, function.held[i]),) * 2)
    return float(max(high[0] for _, high in ends) - min(low[0] for low, _ in ends)) * ABOVE


def _own(function: Function, low: Array, high: Array) -> Array:
    """The roundings of f itself: each base function errs by 4 units in its last place at most, and the polynomial is
    summed up as it stands. Pieces that are 0, x, -x or a number of float32 are exact."""
    found = np.zeros(low.shape)
    for (a, b, _, _), piece in zip(function.ends, function.pieces, strict=True):
        exact = all(
            (not any(t.exponents) and float(np.float32(float(t.coefficient))) == t.coefficient)
            or (abs(t.coefficient) == 1 and t.exponents[0] == 1 and not any(t.exponents[1:]))
            for t in piece
        )
        if exact and len(piece) <= 1:
            continue
        left, right = np.clip(low, a, b), np.clip(high, a, b)
        values = function.ring.values(left, right)
        sizes = [np.maximum(np.abs(v), np.abs(w)) for v, w in (values.x, *values.bases)]
        total = np.zeros(low.shape)
        for t in piece:
            term = np.full(low.shape, abs(float(t.coefficient)))
            for size, e in zip(sizes, t.exponents, strict=True):
                term = term * size**e if e else term
            total = total + term
        if values.known is not None:
            total = np.where(values.known, total, np.inf)
        steps = 8 + len(piece) + 9 * max(sum(t.exponents) for t in piece)
        far = max(abs(float(t.coefficient)) * 1024.0 ** t.exponents[0] for t in piece)
        rounded = 2 * steps * UNIT * total + (1 + len(piece) * far) * SMALL
        found = np.maximum(found, np.where((high < a) | (low > b), 0.0, np.where(np.isnan(rounded), np.inf, rounded)))
    for held in function.held:
        if not np.isnan(held) and float(np.float32(held)) != held:
            found = found + 2 * UNIT * abs(held)
    return found
