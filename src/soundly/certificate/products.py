"""Products that only affine steps read, bounded together: what their tangent planes leave is one quadratic form.

With forms u = u0 + <U, e> + r of the factors, a sum of a u v is the sum of a (u0 v + v0 u - u0 v0), a plane in the
factors, plus <e, Q e> with Q = sum of a U V', plus what the rests r bring. All factors share the symbols e, so squares
stay squares. Every rounding is paid for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from soundly.certificate.rings import U

Array = npt.NDArray[Any]

NUMBERS = 2**17  # of quadratic forms at once
PIVOT = 2.0**-200  # a smaller one is not divided by: so underflow stays below what each row pays


@dataclass(frozen=True, eq=False)
class Factor:
    """centre [M, n] + <generators [M, S, n], e> + r, |e| <= 1, |r| <= rest [M, n]; spread >= the sum of |generators|.

    All are finite where `known`; elsewhere they mean nothing.
    """

    centre: Array
    generators: Array
    rest: Array
    spread: Array
    known: Array

    def take(self, rows: Array) -> "Factor":
        return Factor(self.centre[rows], self.generators[rows], self.rest[rows], self.spread[rows], self.known[rows])

    @staticmethod
    def join(found: Sequence["Factor"]) -> "Factor":
        most = max(f.generators.shape[1] for f in found)
        padded = [np.pad(f.generators, ((0, 0), (0, most - f.generators.shape[1]), (0, 0))) for f in found]
        centre, rest, spread, known = (
            np.concatenate([getattr(f, name) for f in found]) for name in ("centre", "rest", "spread", "known")
        )
        return Factor(centre, np.concatenate(padded), rest, spread, known)


Pair = tuple[Factor, Factor]


def remainder(factors: Mapping[int, Pair], coefficients: Mapping[int, Array], owner: Array) -> tuple[Array, Array]:
    """What rows are above their tangent planes at least, and what that may be wrong by.

    Args:
        factors: of each product.
        coefficients: of the products, [R, n].
        owner: [R], whose factors the rows are about.
    """
    value, lost = np.zeros(len(owner)), np.zeros(len(owner))
    concerned = np.zeros(len(owner), bool)
    for a in coefficients.values():
        concerned |= (a != 0).any(axis=1)
    rows = np.flatnonzero(concerned)
    symbols = max((left.generators.shape[1] for left, _ in factors.values()), default=1)
    many = max(16, NUMBERS // (symbols + 1) ** 2)
    for begin in range(0, len(rows), many):
        some = rows[begin : begin + many]
        form, error = np.zeros((len(some), symbols, symbols)), np.zeros(len(some))
        for i, a in coefficients.items():
            left, right = (factor.take(owner[some]) for factor in factors[i])
            a = a[some]
            form += (left.generators * a[:, None, :]) @ right.generators.transpose(0, 2, 1)
            rest = left.spread * right.rest + left.rest * (right.spread + right.rest)
            sizes = left.spread * right.spread + np.abs(left.centre * right.centre)
            rounding = (2 * a.shape[1] + 2 * len(coefficients) + 16) * U * sizes
            error += (np.abs(a) * (rest + rounding)).sum(axis=1)
        value[some], more = least(form)
        lost[some] = error + more
    return value, lost


def least(form: Array) -> tuple[Array, Array]:
    """Of <e, Q e> over the cube |e| <= 1, Q [R, S, S], a lower bound, and what roundings may have changed in it.

    With p = Q_kk > 0, <e, Q e> = p (e_k + sum of Q_kj e_j / p)^2 + <e, Q' e> with Q'_ij = Q_ij - Q_ki Q_kj / p: as long
    as that is better the square is left out. Then 2 |e_i e_j| <= e_i^2 + e_j^2, and e_i^2 <= 1.
    """
    q = (form + form.transpose(0, 2, 1)) / 2
    size = form.shape[1]
    bound, total = _diagonal(q)
    lost = np.zeros(len(q))
    for k in range(size):
        pivot, row = q[:, k, k], q[:, k]
        square = row[:, :, None] * row[:, None, :] / np.where(pivot >= PIVOT, pivot, np.inf)[:, None, None]
        rest = q - square
        rest[:, k, :] = rest[:, :, k] = 0.0
        now, sum_ = _diagonal(rest)
        better = (pivot >= PIVOT) & (now > bound)
        lost += np.where(better, 4 * U * (sum_ + np.abs(square).sum(axis=(1, 2))), 0.0)
        q[better], bound[better], total[better] = rest[better], now[better], sum_[better]
    return bound, lost + (4 * size + 16) * U * total


def _diagonal(q: Array) -> tuple[Array, Array]:
    """The bound by the diagonal, and the sum of all |q|."""
    sizes = np.abs(q).sum(axis=2)
    d = np.einsum("rii->ri", q)
    return np.minimum(d + np.abs(d) - sizes, 0.0).sum(axis=1), sizes.sum(axis=1)
