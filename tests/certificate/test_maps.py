"""Matrices, convolutions and sparse maps of a program are the matrices that they stand for."""

import importlib
from collections.abc import Iterator

import numpy as np
import pytest
from tests.certificate.claims import Claim, Node, affine
from tests.certificate.meaning import dense
from tests.certificate.samples import random_part

from soundly.certificate import Certificate

reading = importlib.import_module("soundly.certificate.reading")
programs = importlib.import_module("soundly.certificate.program")


def maps() -> Iterator[tuple[Certificate, dict, int, int]]:
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.choice([1, 2, 4, 6, 8]))
        part, m, own = random_part(rng, "0", 0, n, 0)
        steps = [{"step": "variable", "size": n}, affine(1, m, [part], "b")]
        c = Claim(steps, {"b": np.zeros(m), **own}, [(np.zeros(n), np.zeros(n), [[(np.ones(m), np.zeros(n), 0, 0)]])],
                  [(0, 0, 1, Node())]).certificate()  # fmt: skip
        yield c, part, n, m


def test_maps_are_the_matrices_they_stand_for():
    rng, kinds = np.random.default_rng(1), set()
    for c, part, n, m in maps():
        ((found, _),) = reading.read(c).program.steps[1].parts
        matrix = dense(c, part, n, m)
        x, a = rng.standard_normal((3, n)), rng.standard_normal((3, m))
        assert found.size == (m, n) and found.apply(x) == pytest.approx(x @ matrix.T, abs=1e-12)
        assert found.pull(a) == pytest.approx(a @ matrix, abs=1e-12)
        entry = rng.integers(0, m, 5)
        assert found.rows_of(entry) == pytest.approx(matrix[entry], abs=1e-12)
        assert found.absolute.apply(x) == pytest.approx(x @ abs(matrix).T, abs=1e-12)
        assert found.terms >= max((matrix != 0).sum(0).max(), (matrix != 0).sum(1).max())
        kinds.add((part["map"], part.get("transposed"), str(part.get("shape"))))
    assert len(kinds) > 8


def test_large_sparse_maps_are_the_matrices_they_stand_for():
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, 700, 900), rng.integers(0, 600, 900)
    keep = np.unique(rows * 600 + columns, return_index=True)[1]
    rows, columns = rows[keep], columns[keep]
    found = programs.Sparse(rows, columns, rng.standard_normal(len(rows)), (700, 600))
    matrix = np.zeros((700, 600))
    matrix[rows, columns] = found.values
    x, a = rng.standard_normal((2, 600)), rng.standard_normal((2, 700))
    assert found._dense is None
    entry = rng.integers(0, 700, 50)
    assert (found.rows_of(entry) == matrix[entry]).all()
    assert found.apply(x) == pytest.approx(x @ matrix.T) and found.pull(a) == pytest.approx(a @ matrix)
