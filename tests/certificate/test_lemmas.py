"""Lemmas: what is proved of single neurons is true, by mixed-integer programs, whatever the file says."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.certificate.claims import Claim, Lemma, Node, affine, changed, mlp
from tests.certificate.lemma_samples import SCORES, extreme, with_lemmas
from tests.certificate.meaning import checker, evaluate_all, points
from tests.certificate.test_planted_faults import broken

from soundly.certificate import Certificate, check

SEEDS = (10, 30)
NAMES = [f"lemma_{name}" for name in (
    "case", "key", "value", "start", "what", "at", "slot_start", "slots", "slopes", "beta")]  # fmt: skip


def replayed(c: Certificate, with_: Any = checker) -> Any:
    """The replay of a certificate, done, or None if it is refused."""
    try:
        found = with_._Replayer(with_.read(c), np.inf)
    except with_.Refused:
        return None
    with np.errstate(all="ignore"):
        found.run()
    return found


def proved(c: Certificate, with_: Any = checker) -> list[bool]:
    found = replayed(c, with_)
    return [] if found is None else [found.lemmas.proved[k] for k in range(len(c.arrays["lemma_key"]))]


def least(c: Certificate, seed: int, k: int) -> float:
    """By how much the lemma holds on its box."""
    starts = np.cumsum([0, *(step["size"] for step in c.header["program"])])
    neuron, side = divmod(int(c.arrays["lemma_key"][k]), 2)
    step = int(np.searchsorted(starts, neuron, side="right")) - 1
    sign = 1 - 2 * side
    found = extreme(seed, int(c.arrays["lemma_case"][k]), step, neuron - int(starts[step]), sign)
    return found - sign * float(c.arrays["lemma_value"][k])


def put(c: Certificate, name: str, k: int, value: Any) -> Certificate:
    array = np.array(c.arrays[name])
    array[k] = value
    return changed(c, **{name: array})


def beyond(c: Certificate, seed: int, *lemmas: int, room: float = 1e-6) -> Certificate:
    """With lemmas that say more than is true, by that much."""
    for k in lemmas:
        sign = 1 - 2 * int(c.arrays["lemma_key"][k] % 2)
        c = put(c, "lemma_value", k, float(c.arrays["lemma_value"][k]) + sign * (least(c, seed, k) + room))
    return c


def split_at_all(c: Certificate) -> int:
    """A lemma whose tree is split."""
    return int(np.flatnonzero(np.diff(c.arrays["lemma_start"]) > 1)[0])


@cache
def sharp(seed: int) -> Certificate:
    """With values nearly as good as the checker can prove them: whatever it gets wrong, one of them is not proved."""
    c = with_lemmas(seed)
    good = c.arrays["lemma_value"]
    bad = beyond(c, seed, *range(len(good))).arrays["lemma_value"]
    for _ in range(10):
        middle = (good + bad) / 2
        found = np.array(proved(changed(c, lemma_value=middle)))
        good, bad = np.where(found, middle, good), np.where(found, bad, middle)
    return changed(c, lemma_value=good)


def misled(seed: int, with_: Any = checker) -> str | None:
    """What a checker gets wrong about lemmas."""
    c = sharp(seed)
    if not with_.replay(c).proven.all():
        return "refuses a good certificate"
    found = replayed(c, with_)
    if not all(found.lemmas.proved.values()):
        return "does not prove a lemma"
    every = range(len(found.lemmas.proved))
    key, case = c.arrays["lemma_key"], c.arrays["lemma_case"]
    untrue = {
        "too much": beyond(c, seed, *every), "a lemma of another box": changed(c, lemma_case=1 - case),
        "the opposite": changed(c, lemma_key=key ^ 1), "a lemma of another place": changed(c, lemma_key=key[::-1]),
    }  # fmt: skip
    for what, other in untrue.items():
        if any(good and least(other, seed, k) < 0 for k, good in zip(every, proved(other, with_), strict=True)):
            return f"proves {what}"
    held = below(found, with_)
    for k, value in enumerate(c.arrays["lemma_value"].tolist()):
        _, entry, side, _ = found.lemmas._fact(k)
        if float((held.upper if side else held.lower)[SCORES][case[k], entry]) != value:
            return "forgets a lemma below a root"
    if any(lost(other, seed, with_) for other in (c, beyond(c, seed, *every, room=0.5))):
        return "narrows an interval wrongly"
    return None


def below(found: Any, with_: Any) -> Any:
    """What is known of the cases below their roots."""
    proof = found.proof
    return found._held([
        with_._Node(k, int(proof.tree_start[k]), 1, proof.lower[k], proof.upper[k], None, 0, (), None) for k in (0, 1)
    ])  # fmt: skip


def lost(c: Certificate, seed: int, with_: Any = checker) -> bool:
    """Whether values of points lie outside the intervals of roots, or of what is known below them."""
    found, cases = replayed(c, with_), np.arange(2)
    proof = found.proof
    with np.errstate(all="ignore"):
        frame, _ = found._refresh(proof.lower, proof.upper, None, np.full(2, -1), 0,
                                  lambda *args: found.lemmas.narrow(cases, *args))  # fmt: skip
    for case in cases:
        values = evaluate_all(c, points(c, case, np.random.default_rng(seed), 500))
        for ends in (below(found, with_), frame):
            for v, low, high in zip(values, ends.lower, ends.upper, strict=True):
                if (v < low[case] - 1e-9).any() or (v > high[case] + 1e-9).any():
                    return True
    return False


@pytest.mark.parametrize("seed", SEEDS)
def test_lemmas_prove_what_bounds_alone_do_not(seed):
    c = with_lemmas(seed)
    assert len(c.arrays["lemma_key"]) >= 3 and check(c).accepted
    bare = changed(c, **{name: c.arrays[name][: name.endswith("start")] for name in NAMES})
    assert not check(bare).accepted and not check(bare).problems
    assert all(least(c, seed, k) > 0 for k in range(len(c.arrays["lemma_key"])))
    assert misled(seed) is None


def test_altered_lemmas_prove_nothing_false(seed=10):
    """Refused, not proved, or true of the numbers as they now are; and never a crash."""
    rng, outcome = np.random.default_rng(seed), {"refused": 0, "open": 0, "proved": 0}
    starts = np.cumsum([0, *(step["size"] for step in with_lemmas(seed).header["program"])])
    for _ in range(80):
        c = with_lemmas(seed)
        name = NAMES[int(rng.choice(len(NAMES)))]
        array = np.array(c.arrays[name])
        at = int(rng.integers(len(array)))
        match int(rng.integers(5)):
            case 0:
                array[at] = rng.choice([array[at] + 1, -array[at], 0, array[at] - 1])
            case 1:
                array[at] = array[int(rng.integers(len(array)))]
            case 2 if name == "lemma_value":
                array[at] += 0.01 * rng.standard_normal()
            case 3 if array.dtype.kind == "f":
                array[at] = rng.choice([np.nan, np.inf, 1e30, rng.standard_normal()])
            case 4 if name == "lemma_key":
                array[at] = rng.integers(2 * starts[1], 2 * starts[SCORES + 1])
            case _:
                array = array[rng.permutation(len(array))]
        c = changed(c, **{name: array})
        found = proved(c)
        outcome["refused" if not found else "proved" if all(found) else "open"] += 1
        for k, good in enumerate(found):
            if good and name in ("lemma_case", "lemma_value", "lemma_key"):
                assert least(c, seed, k) > -1e-6
    assert min(outcome.values()) > 5


def test_a_lemma_that_is_not_proved_narrows_nothing():
    c = with_lemmas(10)
    k = split_at_all(c)
    result = check(beyond(c, 10, k, room=1.0))
    assert not result.accepted and not result.problems


def dense_claim(**lemma: Any) -> Claim:
    """A lemma about the last score of a dense network, where nothing can be cropped, and a row that needs it."""
    steps, arrays = mlp(np.random.default_rng(3), [2, 6, 6, 1], "relu")
    steps += [{"step": "function", "from": 5, "size": 1, "function": "step"},
              affine(7, 1, [{"map": "matrix", "from": 6, "array": "last", "blocks": 1}], "none")]  # fmt: skip
    arrays |= {"last": np.ones((1, 1)), "none": np.zeros(1)}
    box = (np.full(2, -1.0), np.full(2, 1.0))
    blank = Claim(steps, arrays, [(*box, [[(np.ones(1), np.zeros(2), -0.5, 0.0)]])], [(0, 0, 1, Node())])
    c = blank.certificate()
    scores = evaluate_all(c, points(c, 0, np.random.default_rng(0), 4000))[5]
    arrays["b2"] = arrays["b2"] - scores.min() + 0.05
    key = 2 * (2 + 6 + 6 + 6 + 6)
    blank.lemmas = [Lemma(**{"key": key, "value": 0.001, "root": Node(), **lemma})]
    return blank


def halved(levels: int, value: float) -> Claim:
    """Every neuron of the first layers is split, one after the other."""
    root = Node()
    leaves = [(root, 0)]
    for k in range(levels):
        leaves = [(child, depth + 1) for node, depth in leaves for child in node.split(2, 2 + k + 6 * (k > 5), 0.0)]
    for leaf, depth in leaves:
        leaf.beta = np.zeros(depth)
    return dense_claim(value=value, root=root, slopes=[[]] * len(leaves))


def test_lemmas_of_what_cannot_be_cropped():
    assert not check(dense_claim().certificate()).accepted
    c = halved(6, 0.001).certificate()
    rng = np.random.default_rng(1)
    assert proved(c) == [check(c).accepted]
    worst = evaluate_all(c, points(c, 0, rng, 4000))[5].min()
    outcomes = [proved(halved(6, v).certificate())[0] for v in np.linspace(worst - 3, worst + 1e-6, 8)]
    assert outcomes[0] and not outcomes[-1] and outcomes == sorted(outcomes, reverse=True)


def broken_lemmas() -> dict[str, Certificate]:
    c = with_lemmas(10)
    k, neurons = split_at_all(c), sum(step["size"] for step in c.header["program"])
    inner = int(np.flatnonzero(c.arrays["lemma_what"] >= 0)[0])
    leaf = int(np.flatnonzero(c.arrays["lemma_what"] < 0)[0])
    short = {name: c.arrays[name][:-1] for name in NAMES}
    return {
        **{f"{name} shorter": changed(c, **{name: array}) for name, array in short.items() if len(array)},
        "of no case": put(c, "lemma_case", k, 2), "of a negative case": put(c, "lemma_case", k, -1),
        "about an input": put(c, "lemma_key", k, 0), "about nothing": put(c, "lemma_key", k, 2 * neurons),
        "NaN": put(c, "lemma_value", k, np.nan), "infinite": put(c, "lemma_value", k, -np.inf),
        "split of an input": put(c, "lemma_what", inner, 0), "split of nothing": put(c, "lemma_what", inner, neurons),
        "split of a later step": put(c, "lemma_what", inner, neurons - 50),
        "split of its own step": put(c, "lemma_what", inner, int(c.arrays["lemma_key"][0]) // 2),
        "a leaf split": put(c, "lemma_what", leaf, int(c.arrays["lemma_what"][inner])),
        "a split turned leaf": put(c, "lemma_what", inner, -1), "below -1": put(c, "lemma_what", leaf, -2),
        "split at NaN": put(c, "lemma_at", inner, np.nan), "leaf with a point": put(c, "lemma_at", leaf, 1.0),
        "slopes NaN": put(c, "lemma_slopes", 0, np.nan), "negative multiplier": put(c, "lemma_beta", 0, -1.0),
        "slots beyond": put(c, "lemma_slots", 0, 2 * neurons),
        "a slot twice": put(c, "lemma_slots", 0, int(c.arrays["lemma_slots"][1])),
        "no trees": changed(c, lemma_start=np.zeros_like(c.arrays["lemma_start"])),
    }  # fmt: skip


@pytest.mark.parametrize("name", broken_lemmas())
def test_malformed_lemmas_are_refused(name):
    result = check(broken_lemmas()[name])
    assert not result.accepted and len(result.problems) == 1


FAULTS = {
    "another entry": ("int(of.step[k]), int(of.entry[k]),", "int(of.step[k]), (int(of.entry[k]) + 1) % 48,"),
    "another sign": ("sign = 1.0 - 2.0 * self.lemmas.side[numbers]", "sign = 2.0 * self.lemmas.side[numbers] - 1.0"),
    "the other end": ("ends, meet = (frame.upper, np.minimum) if side else",
                      "ends, meet = (frame.upper, np.minimum) if not side else"),
    "narrows every box": ("narrow(frame, cases == self.lemmas.case[k],", "narrow(frame, cases >= 0,"),
    "known of every box": ("if proved and self.lemmas.case[k] == case]", "if proved]"),
    "known of no box": ("if proved and self.lemmas.case[k] == case]", "if not proved]"),
    "proved on another box": ("== cases).argmax(axis=1)", "== cases).argmin(axis=1)"),
    "up to some slack": ("bound >= (sign * self.lemmas.value[numbers])[owner]",
                         "bound >= (sign * self.lemmas.value[numbers])[owner] - 1.0"),
    "value of another sign": ("bound >= (sign * self.lemmas", "bound >= (-sign * self.lemmas"),
    "another place's crop": ("crop.view(whole, row[which], place)", "crop.view(whole, row[which], place - 1)"),
    "another entry of the crop": ("crop.view(whole, row[which], place).frame, i, new[which], inner,",
                                  "crop.view(whole, row[which], place).frame, i, new[which], inner[::-1],"),
    "what is not proved": ("            if self.proved[k]:\n", "            if True:\n"),
    "one side of a split": ("for side, sign in enumerate((-1, 1)):", "for side, sign in enumerate((-1, -1)):"),
    "every leaf is empty": ("empty = np.zeros(len(leaves), bool)", "empty = np.ones(len(leaves), bool)"),
    "a clamp of the wrong side": ("np.maximum.at(low, (node[right], entry[right]), at[right])",
                                  "np.maximum.at(low, (node[left], entry[left]), at[left])"),
    "multipliers of the wrong sign": ("at.astype(float), sign, force.astype(float)",
                                      "at.astype(float), -sign, force.astype(float)"),
    "slopes of the other side": ("slopes[side, n, entry] = value", "slopes[1 - side, n, entry] = value"),
    "one leaf decides": ("numbers[owner[~closed]].tolist(), False)",
                         "numbers[owner[~closed & ~closed.any()]].tolist(), False)"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name):
    with np.errstate(all="ignore"):
        assert misled(10, broken(*FAULTS[name])) is not None


def test_the_checker_unchanged_is_not_misled():
    assert misled(10, broken("FRAME = 2**20", "FRAME = 2**20 ")) is None


def test_limits_are_kept():
    def late() -> None:
        raise TimeoutError

    found = replayed(with_lemmas(10))
    found.lemmas.limit, found.lemmas.proved = late, {}
    with pytest.raises(TimeoutError), np.errstate(all="ignore"):
        found._refresh(found.proof.lower, found.proof.upper, None, np.full(2, -1), 0,
                       lambda *args: found.lemmas.narrow(np.arange(2), *args))  # fmt: skip
