"""The checker's intervals and affine forms hold every value, in samples and in rational arithmetic."""

import importlib
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.certificate.claims import Claim, Node, mlp
from tests.certificate.meaning import checker, evaluate_all, exact, points, steps_of
from tests.certificate.samples import SEEDS, neuron_certificate, random_certificate

from soundly.certificate import Certificate

intervals = importlib.import_module("soundly.certificate.intervals")
forms = importlib.import_module("soundly.certificate.forms")


def refreshed(c: Certificate, with_: Any = checker) -> list[Any]:
    """The intervals of all steps over the first box, without affine forms and with them."""
    proof, none = with_.read(c), np.full(1, -1)
    box = proof.lower[:1], proof.upper[:1]
    with np.errstate(all="ignore"):
        return [with_.refresh(proof.program, *box, None, none, proof.stored, forms=forms) for forms in (False, True)]


@cache
def sampled(seed: int) -> list[np.ndarray]:
    c = random_certificate(seed)
    with np.errstate(all="ignore"):
        return evaluate_all(c, points(c, 0, np.random.default_rng(seed)))


def escaped(seed: int, with_: Any = checker) -> bool:
    """Whether a value lies outside its step's interval, or a box counts as empty."""
    for frame, dead in refreshed(random_certificate(seed), with_):
        for low, high, value in zip(frame.lower, frame.upper, sampled(seed), strict=True):
            room = 1e-9 * (1 + np.abs(value))
            if dead[0] or not ((low <= value + room) & (value <= high + room)).all():
                return True
    return False


def test_intervals_of_every_step_hold_all_samples_and_forms_make_them_narrower():
    narrower = 0
    for seed in range(SEEDS):
        assert not escaped(seed), seed
        (plain, _), (followed, _) = refreshed(random_certificate(seed))
        for i in range(len(plain.lower)):
            with np.errstate(invalid="ignore"):
                width, other = plain.upper[i] - plain.lower[i], followed.upper[i] - followed.lower[i]
                narrower += int((width - other > 1e-6).sum())
    assert narrower > 200


def test_forms_hold_exactly():
    """Of every step of small programs, in rational arithmetic at corners and inside; their intervals, too."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        steps, arrays = mlp(rng, [2, 3, 3, 3])
        steps.append({"step": "times", "size": 3, "left": 5, "right": 2})
        steps.append({"step": "function", "from": 0, "size": 2, "function": "square"})
        steps.append({"step": "times", "size": 2, "left": 0, "right": 0})
        lower = rng.standard_normal(2)
        upper = lower + rng.random(2) * 10.0 ** rng.integers(-15, 1)
        clause = [(np.ones(2), np.zeros(2), 0.0, 0.0)]
        c = Claim(steps, arrays, [(lower, upper, [clause])], [(0, 0, 1, Node())]).certificate()
        found: list[Any] = []

        class Kept(forms.Forms):
            def follow(self, *args: Any, found: list[Any] = found) -> Any:
                found.append(super().follow(*args))
                return found[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(intervals, "Forms", Kept)
            frames = [frame for frame, _ in refreshed(c)]
        assert len(found) == len(steps)
        for t in (*np.ndindex(2, 2), *rng.random((4, 2))):
            x = [Fraction(float(a)) * (1 - Fraction(s)) + Fraction(float(b)) * Fraction(s)
                 for a, b, s in zip(lower, upper, map(float, t), strict=True)]  # fmt: skip
            base = found[0]
            e = [(v - Fraction(float(m))) / Fraction(float(base.generators[0, k, k]))
                 for k, (v, m) in enumerate(zip(x, base.centre[0], strict=True))]  # fmt: skip
            assert all(abs(v) <= 1 for v in e)
            for i, form in enumerate(found):
                for j, v in enumerate(exact(Certificate({**c.header, "program": steps_of(c, i)}, c.arrays), x)):
                    line = sum((Fraction(float(g)) * s for g, s in zip(form.generators[0, :, j], e, strict=True)),
                               Fraction(float(form.centre[0, j])))  # fmt: skip
                    assert abs(v - line) <= Fraction(float(form.rest[0, j])), (seed, i)
                    for f in frames:
                        assert Fraction(float(f.lower[i][0, j])) <= v <= Fraction(float(f.upper[i][0, j])), (seed, i)


def test_shared_intervals_give_the_bounds_of_own_ones(monkeypatch):
    certificates = [*(neuron_certificate(seed) for seed in range(20)), *(random_certificate(s) for s in range(40))]
    shared = [checker.replay(c) for c in certificates]
    monkeypatch.setattr(checker._Replayer, "_can_share", lambda *_: False)
    for c, before in zip(certificates, shared, strict=True):
        after = checker.replay(c)
        assert after.failed == before.failed and after.margin == pytest.approx(before.margin, rel=1e-9, abs=1e-9)
