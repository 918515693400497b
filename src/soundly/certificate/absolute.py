"""Sums of absolute values, bounded together: how far many values move at once, not each as far as it can.

Every value v lies between two affine functions of the input, l <= v <= u, so |v| <= (u - l) / 2 + |u + l| / 2. A row
that takes off such terms is then affine but for a sum of absolute values of affine functions, and what that is at most
on a box is one norm of a matrix, which a spectral norm bounds. docs/certificates.md says why, and pays for roundings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from soundly.certificate.rings import U

Array = npt.NDArray[Any]

ABOVE = 1 + 2.0**-16  # for the roundings of the error terms themselves
TINY = 2.0**-300  # above what underflow can change, where the largest number is about 1
ROUNDS, RANK, SEED = 60, 16, 0
SMALLEST = 2.0**-40


@dataclass(frozen=True, eq=False)
class Absolute:
    """Affine functions of the input around entries of steps whose absolute values are summed up.

    Attributes:
        entry: by the step of the absolute values, [p]; the next parts hold those of all steps in turn.
        factor: k [p] of k |v|.
        low, low_at: v >= <low, x> + low_at, [P, inputs] and [P]. high, high_at: the same for -v.
    contributions: how many terms were added up to one coefficient, besides those inside a map.
    """

    entry: Mapping[int, Array]
    factor: Mapping[int, float]
    slope: Array
    offset: Array
    contributions: int

    def take(self, i: int, a: Array) -> Array:
        """Takes out of coefficients of step i [R, n] what is a concave function of v; w >= 0 [R, p] of -w |v|."""
        here = a[:, self.entry[i]]
        weight = np.maximum(-here * self.factor[i], 0.0)
        a[:, self.entry[i]] = np.where(weight > 0, 0.0, here)
        return weight

    def most(self, weights: Mapping[int, Array], rest: Array, middle: Array, radius: Array) -> Array:
        """What rows may lose at most [R]: the greatest sum of w |v| - <rest, x - middle> over |x - middle| <= radius.

        Args:
            weights: of each step, what `take` found.
            rest: [R, inputs].
        """
        w = np.concatenate([weights[i] if i in weights else np.zeros((len(rest), len(self.entry[i])))
                            for i in self.entry], axis=1)  # fmt: skip
        with np.errstate(all="ignore"):
            return np.array([self._most(w[r], rest[r], middle, radius) for r in range(len(rest))])

    def _most(self, w: Array, rest: Array, middle: Array, radius: Array) -> float:
        some = w > 0
        half, size = w[some] / 2, np.abs(middle) + radius
        (low, high), (low_at, high_at) = self.slope[:, some], self.offset[:, some]
        total, gap = low + high, low - high
        constant = -(half @ (total @ middle + (low_at + high_at)))
        b = np.zeros((len(half) + 1, len(rest) + 1))
        b[:-1, :-1] = half[:, None] * gap * radius
        b[:-1, -1] = half * (gap @ middle + (low_at - high_at))
        b[-1, :-1] = (rest + half @ total) * radius
        terms = np.abs(rest) @ size + half @ ((np.abs(low) + np.abs(high)) @ size + np.abs(low_at) + np.abs(high_at))
        error = 2 * (len(rest) + len(half) + self.contributions + 16) * U * ABOVE * terms
        value = constant + norm(b) + error
        return float(value + 4 * U * (abs(constant) + abs(value)))


def norm(b: Array) -> float:
    """At least the greatest <s, b z> over all |s_i| <= 1, |z_j| <= 1; infinite where nothing is known.

    For any positive p and q that is at most |1 / p| |1 / q|, in the Euclidean norm, times the spectral norm of the
    matrix p_i b_ij q_j; and whatever the matrix l is, the largest eigenvalue of m is at most t + |t - m - l l'|.
    """
    most = float(np.abs(b).max(initial=0.0))
    if not np.isfinite(most):
        return np.inf
    unit = 2.0 ** min(float(np.frexp(most)[1]), 1000.0)
    b = b / unit
    p, q = _scales(b)
    n = p[:, None] * b * q
    size, k = float((n * n).sum()), sum(n.shape) + 16
    m = n @ n.T
    m = (m + m.T) / 2
    if not np.isfinite(m).all():
        return np.inf
    try:
        values, vectors = np.linalg.eigh(m)
    except np.linalg.LinAlgError:
        values, vectors = np.full(len(m), size), np.eye(len(m))
    top = max(float(values.max()), 0.0)
    root = vectors * np.sqrt(np.maximum(top - values, 0.0))
    rest = top * np.eye(len(m)) - m - root @ root.T
    lost = np.sqrt((rest * rest).sum()) + 4 * k * U * (len(m) * top + size + (root * root).sum())
    spectral = np.sqrt(top + ABOVE * lost) + 4 * U * ABOVE * np.sqrt(size)
    found = np.sqrt((1 / (p * p)).sum()) * spectral * np.sqrt((1 / (q * q)).sum()) * (1 + 8 * k * U)
    return float((found + TINY) * unit) if np.isfinite(found) else np.inf


# What follows only chooses p and q: nothing depends on it but how good the bound is.


def _scales(b: Array) -> tuple[Array, Array]:
    """The best ones where vectors of length one, s_i and z_j, make the sum of b_ij <s_i, z_j> greatest: found by turns.

    Reference: Burer and Monteiro, 2003; Boumal, Voroninski, Bandeira, "The non-convex Burer-Monteiro approach works on
    smooth semidefinite programs", NeurIPS 2016.
    """
    z = np.random.default_rng(SEED).standard_normal((b.shape[1], RANK))
    for _ in range(ROUNDS):
        s = b @ (z / _lengths(z)[:, None])
        z = b.T @ (s / _lengths(s)[:, None])
    s = b @ (z / _lengths(z)[:, None])
    return tuple(1 / np.sqrt(np.maximum(v, SMALLEST * v.max())) for v in (_lengths(s), _lengths(z)))  # type: ignore


def _lengths(v: Array) -> Array:
    return np.maximum(np.sqrt((v * v).sum(axis=1)), 2.0**-500)
