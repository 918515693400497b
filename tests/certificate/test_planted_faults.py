"""The checker with one fault at a time: each shows in what it then proves, accepts or refuses."""

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tests.certificate.meaning import checker, untrue
from tests.certificate.samples import (
    SEEDS,
    ball_certificate,
    good,
    grid_certificate,
    hard,
    neuron_certificate,
    random_certificate,
)
from tests.certificate.test_absolute import escaped as sum_escaped
from tests.certificate.test_absolute import sums_certificate, too_small, untrue_sums, wrong_flags
from tests.certificate.test_ball import escapes
from tests.certificate.test_conditional import misplaced, tightened_certificate
from tests.certificate.test_decided import decided, wrong
from tests.certificate.test_intervals import escaped
from tests.certificate.test_jumps import jumps, untrue_at_jumps
from tests.certificate.test_malformed import malformed
from tests.certificate.test_products_together import (
    above_least,
    factor_escaped,
    quadratic_certificate,
    square_of_uncertain,
)
from tests.certificate.test_rounding import uncertain, unlikely
from tests.certificate.test_verification import grouped, halved

from soundly.certificate import Certificate


def broken(old: str, new: str) -> Any:
    """The checker with one piece of its source exchanged."""
    folder = Path(checker.__file__).parent
    names = ("rings", "absolute", "ball", "grid", "functions", "products", "program", "bounding", "crop", "forms",
             "intervals", "conditional", "reading", "rows", "lemmas", "verification")  # fmt: skip
    sources = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in names}
    assert sum(s.count(old) for s in sources.values()) == 1, f"{old!r} is not in the checker exactly once: adapt this"
    for name in names:
        module = ModuleType(f"broken_{name}")
        source = sources[name].replace(old, new)
        for other in names:
            source = source.replace(f"soundly.certificate.{other}", f"broken_{other}")
        sys.modules[module.__name__] = module
        exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module


def faults(with_: Any) -> Iterator[str]:
    """Everything a checker proves that is not so, or accepts that it may not, or refuses that it should accept; a
    little of every kind in turn, so that a fault shows soon."""

    def proves(c: Certificate) -> bool:
        return bool(with_.replay(c).proven.all())

    def proves_by_rounding(seed: int) -> bool:
        c, holds = hard(seed)
        return any(p and not h for p, h in zip(with_.replay(c).proven.tolist(), holds, strict=False))

    def ignores_deadline(deadline: float) -> bool:
        try:
            with_.replay(good(), deadline=deadline)
        except TimeoutError:
            return False
        return True

    kinds: dict[str, tuple[Callable[[Any], bool], Iterable[Any]]] = {
        "refuses a good certificate": (lambda c: not proves(c), [good()]),
        "proves by rounding": (proves_by_rounding, reversed(range(120))),
        "ignores stored slopes": (lambda side: not proves(grouped(side)), [1]),
        "halves boxes wrongly": (lambda error: proves(halved(error)) is not (error == 0), [0.03, 0.0]),
        "forgets the error of a bias in hidden intervals": (lambda room: proves(unlikely(room)), [0.004]),
        "loses values of intervals": (lambda seed: escaped(seed, with_), range(60)),
        "is wrong at jumps": (lambda name: proves(jumps()[name][0]) is not jumps()[name][1], jumps()),
        "proves what fails at a jump": (lambda seed: untrue_at_jumps(seed, with_), range(60)),
        "ignores the deadline": (ignores_deadline, [-1.0]),
        "forgets the error of a number": (lambda kind: proves(uncertain(kind, 0.9)), ["weight", "bias"]),
        "misplaces tightened intervals": (lambda _: misplaced(with_), [0]),
        "proves an untruth of tightened intervals": (
            lambda seed: untrue(tightened_certificate(seed), seed, with_) != [], range(40)),
        "proves an untruth of neuron splits": (
            lambda seed: untrue(neuron_certificate(seed), seed, with_) != [], range(40)),
        "proves an untruth of quadratic forms": (
            lambda seed: untrue(quadratic_certificate(seed), seed, with_) != [], range(60)),
        "loses values of factors": (lambda seed: factor_escaped(seed, with_), range(60)),
        "forgets the error of a weight in products": (proves, [square_of_uncertain()]),
        "is above a quadratic form": (
            lambda seed: next(above_least(sys.modules["broken_products"], seed), None) is not None, range(12)),
        "proves an untruth of sums": (lambda seed: untrue(sums_certificate(seed), seed, with_) != [], range(18)),
        "proves an untruth of one sum": (lambda name: proves(untrue_sums()[name]), untrue_sums()),
        "is above a row with sums": (lambda seed: sum_escaped(seed, with_), range(40)),
        "makes a norm too small": (
            lambda seed: next(too_small(sys.modules["broken_absolute"], seed), None) is not None, range(120)),
        "takes sums where they are not": (lambda name: not with_.replay(wrong_flags()[name]).problems, wrong_flags()),
        "proves an untruth of balls": (lambda seed: untrue(ball_certificate(seed), seed, with_) != [], range(60)),
        "proves an untruth of grids": (lambda seed: untrue(grid_certificate(seed), seed, with_) != [], range(60)),
        "is above a row on a ball": (lambda seed: escapes(sys.modules["broken_ball"], seed), range(60)),
        "proves an untruth": (lambda seed: untrue(random_certificate(seed), seed, with_) != [], reversed(range(SEEDS))),
    }  # fmt: skip
    takes = [("takes", lambda name: not with_.replay(malformed()[name]).problems, name) for name in malformed()]
    takes += [("closes the wrong half", lambda name: wrong(name, with_), name) for name in decided()]
    turns = zip_longest(*([(kind, fails, item) for item in items] for kind, (fails, items) in kinds.items()))
    for kind, fails, item in (*takes, *filter(None, chain.from_iterable(turns))):
        try:
            if fails(item):
                yield f"{kind}: {item}"
        except Exception as crash:
            yield f"crashes: {kind}: {item}: {crash!r}"


FAULTS = {
    "no rounding in dot products": ("bound.lose(-_rowwise(np.abs(a), -worst))", "pass"),
    "no rounding of constants and of the input": ("bound = self.d - ABOVE * self.lost", "bound = self.d - 0.0"),
    "weight errors ignored": ("+ weight_error * size + bias_error", "+ bias_error"),
    "bias errors ignored": ("weight_error * size + bias_error)", "weight_error * size)"),
    "beta with the wrong sign": ("np.subtract.at(a, (row, entry), change)", "np.add.at(a, (row, entry), change)"),
    "beta without its constant": ("shift = change * splits.at[which]", "shift = 0 * change"),
    "lines exchanged": (
        "np.where(positive, owned(some.below[j]), owned(some.above[j]))",
        "np.where(positive, owned(some.above[j]), owned(some.below[j]))"),
    "offsets exchanged": (
        "np.where(positive, owned(below), owned(above))", "np.where(positive, owned(above), owned(below))"),
    "offsets above for positive coefficients": ("bound.add(_rowwise(np.minimum(a, 0.0), owned(above)))",
                                                "bound.add(_rowwise(np.maximum(a, 0.0), owned(above)))"),
    "offsets of split neurons exchanged": (
        "values * np.where(positive, below, above))", "values * np.where(positive, above, below))"),
    "split neurons counted for the wrong node": ("pair, row = _rows_of(special.node, owner)",
                                                 "pair, row = _rows_of(np.sort(special.node)[::-1], owner)"),
    "clamps exchanged": ("np.maximum.at(low, place[sign > 0], at[sign > 0])",
                         "np.maximum.at(low, place[sign < 0], at[sign < 0])"),
    "clamps exchanged in gathered frames": (
        "                ends = (frame.lower if",
        "                sign = -sign\n                ends = (frame.lower if"),
    "the input's ends exchanged": (
        "bound.add(-_product(np.abs(rest), _owned(radius + widened, owner)))",
        "bound.add(_product(rest, _owned(radius + widened, owner)))"),
    "bias forgotten": ("bound.add(a @ step.bias)", "pass"),
    "constant forgotten": ("np.zeros(len(owner)) + constant", "np.abs(constant) + np.zeros(len(owner))"),
    "slack ignored": ("best > proof.slack[rows]", "best > -proof.slack[rows] - 1e-2"),
    "all rows of a clause at once": ("closed = np.logical_or.reduceat(", "closed = True | np.logical_or.reduceat("),
    "a row skipped": ("some = slice(begin, begin + size)", "best[0] = 1e9; some = slice(begin + 1, begin + size)"),
    "one clause closes all": ("open_[each[done]] = False", "open_[each] = open_[each] & ~done.any()"),
    "clip with the wrong sign": ("known & (a < 0), edge_down, -np.inf), np.where(known & (a > 0)",
                                 "known & (a > 0), edge_down, -np.inf), np.where(known & (a < 0)"),
    "clip by the whole row": ("rest = total[:, None] - least", "rest = total[:, None] + 0 * least"),
    "clip to the smallest clause": ("((np.minimum, left), (np.maximum, right))",
                                    "((np.maximum, left), (np.minimum, right))"),
    "input split exchanged": ("upper[what] = min(upper[what], at)", "upper[what] = min(upper[what], at - 0.4)"),
    "leaves forgotten": ("self.left_open[node.tree] |= node.open", "pass"),
    "right children forgotten": ("for side, sign in ((0, -1), (1, 1)):", "for side, sign in ((0, -1),):"),
    "left children forgotten": ("for side, sign in ((0, -1), (1, 1)):", "for side, sign in ((1, 1),):"),
    "coverage unchecked": ("(np.cumsum(covered)[:-1] < 1).any()", "False"),
    "uncovered clauses proven": ("proven = np.zeros(pairs, bool)", "proven = np.ones(pairs, bool)"),
    "level order unchecked": ("(np.diff(start) != 1 + 2 * splits).any()", "False"),
    "negative beta accepted": ("(beta < 0).any()", "False"),
    "NaN accepted": ("not (np.abs(array) <= largest).all()", "(np.abs(array) > largest).any()"),
    "negative slack accepted": ("(slack < 0).any()", "False"),
    "unused arrays accepted": ("unused := set(certificate.arrays) - arrays.used", "unused := set()"),
    "intervals too narrow": ("low, high = centre - radius - cost, centre + radius + cost",
                             "low, high = centre - radius / 2, centre + radius / 2"),
    "no absolute values in radii": ("radius += part.absolute.apply(r)", "radius += np.abs(part.apply(r))"),
    "empty means proven": ("dead = dead | _settle(frame, i)\n        if tightened",
                           "dead = dead | True\n        if tightened"),
    "the wrong row of the frame": ("node.frame, node.row = frame, row", "node.frame, node.row = frame, 0"),
    "corners of products forgotten": ("corners = np.stack([a * c, a * d, b * c, b * d])",
                                      "corners = np.stack([a * c, b * d])"),
    "planes in one corner": ("for x, y in ((xl, yl), (xl, yu), (xu, yl), (xu, yu)):", "for x, y in ((xl, yl),):"),
    "curvature ignored": ("fall = reach - arc / 2", "fall = reach"),
    "steepness ignored": ("fall = reach - arc / 2", "fall = 0 * reach"),
    "half of an interval": ("a, b = np.maximum(lower[at], left), np.minimum(upper[at], right)",
                            "a, b = np.maximum(lower[at], left), np.minimum(lower[at] / 2 + upper[at] / 2, right)"),
    "rests not through absolute weights": ("rest + part.absolute.apply(form.rest + rounding * size)",
                                           "rest + part.apply(form.rest + rounding * size)"),
    "generators forgotten": ("spread = np.abs(generators).sum(axis=1)", "spread = 0 * np.abs(generators).sum(axis=1)"),
    "product of the radii forgotten": ("+ size_b * a.rest + wide_a * wide_b)", "+ size_b * a.rest)"),
    "bands forgotten": ("(steep * form.rest + half) * (1 + 8 * U)", "(steep * form.rest) * (1 + 8 * U)"),
    "rests forgotten in intervals of forms": ("wide = (self.spread + self.rest)", "wide = (self.spread)"),
    "uncertain weights forgotten in forms": ("rounding * np.abs(step.bias) + cost", "rounding * np.abs(step.bias)"),
    "one generator for all": ("generators[node, place, entry] = half[node, entry]",
                              "generators[node, 0 * place, entry] = half[node, entry]"),
    "the chord below": ("Lines(through, offset, chord, rise)", "Lines(chord, offset, through, rise)"),
    "the chord without its offset": ("np.where(across, rise * (1 + 4 * U) + TINY, 0.0)", "np.where(across, 0.0, 0.0)"),
    "stored slopes for the other side": ("2 * (program.offsets[i] + entry) + side",
                                         "2 * (program.offsets[i] + entry) + 1 - side"),
    "bounds of the other side": ("        below = side[some] == 0\n", "        below = side[some] != 0\n"),
    "halves exchanged": ("sign = np.array([-1.0, 1.0])", "sign = np.array([1.0, -1.0])"),
    "halves for the other child": ("lower, upper = halves[side]", "lower, upper = halves[1 - side]"),
    "halves by certain weights": ("np.full(2, cost[node.row, entry])", "np.zeros(2)"),
    "no bias in first rows": ("sign * step.bias[entry], lost", "0 * step.bias[entry], lost"),
    "first rows are certain": ("sign * step.bias[entry], lost", "sign * step.bias[entry], 0.0"),
    "rows of the clause without their slack": ("self.proof.constant[rows] - self.proof.slack[rows]",
                                               "self.proof.constant[rows]"),
    "rows of the clause turned round": ("added = times @ matrix", "added = -times @ matrix"),
    "constants of the clause's rows forgotten": ("total = first + times @ constant", "total = first"),
    "rows of the clause are certain": ("lost = lost + count * (times @ np.abs(constant))",
                                       "lost = -1e-3 + 0 * (times @ np.abs(constant))"),
    "multipliers of other splits": ("force[last - first :], strict=True)", "force[last - first :][::-1], strict=True)"),
    "multipliers of splits turned round": ("splits.sign[mine], splits.beta", "-splits.sign[mine], splits.beta"),
    "splits of another bound": ("Splits(place[splits.node[mine]],", "Splits(0 * place[splits.node[mine]],"),
    "bounds for another node": ("(own.node[below], entry[below])", "(0 * own.node[below], entry[below])"),
    "upper bounds as lower ones": ("np.where(own.key % 2 == 0, 1.0, -1.0)", "np.where(own.key >= 0, 1.0, -1.0)"),
    "intervals of another node": ("pieces(program, j, known, own.slopes)",
                                  "pieces(program, j, known.take(0 * each), own.slopes)"),
    "everything tightened is proven": ("dead |= (low > high).any(axis=1)", "dead |= True"),
    "tightening for several clauses": ("(rows[node] < 0).any()", "False"),
    "negative multipliers of rows": ("(force < 0).any()", "False"),
    "jumps from the wrong side": ("met &= ~(sides[0] & (lower == right)) & ~(sides[1] & (upper == left))",
                                  "met &= ~(sides[0] & (lower == left)) & ~(sides[1] & (upper == right))"),
    "jumps without a split": ("return (low == after) & (low < high), (high == before) & (low < high)",
                              "return (low >= after) & (low < high), (high <= before) & (low < high)"),
    "jumps without a split in exceptions": ("sides = (low == after) & (low < high), (high == before) & (low < high)",
                                            "sides = low < high, low < high"),
    "jumps of split points only": ("jump = np.isin(at, list(self.proof.program.parted[step.source]))",
                                   "jump = np.isfinite(at)"),
    "jumps of gathered frames at any point": ("if at in self.proof.program.parted[step]:", "if True:"),
    "refreshed intervals below 0": (
        "for ends, none in ((frame.lower, -np.inf), (frame.upper, np.inf)):",
        "for ends, none in ((frame.lower, -np.inf), (frame.upper, 0.0)):"),
    "jumps with a value of their own": ("len(set.intersection(*(f.sides(t) for f in functions))) == 1",
                                        "len(set.intersection(*(f.sides(t) for f in functions))) <= 1"),
    "jumps on either side": ("return {self.say[i]} if self.say else set()", "return {-1, 1}"),
    "own values on any side": ("== Fraction(own)\n", "!= None\n"),
    "own values forgotten": ("                    inside = (self.lower <= t) & (self.upper >= t)\n",
                             "                    inside = (self.lower > t) & (self.upper < t)\n"),
    "plain bounds without their ends": ("_rowwise(np.maximum(-a, 0.0), _owned(-high, owner))",
                                        "_rowwise(np.maximum(-a, 0.0), _owned(-low, owner))"),
    "plain bounds without rounding": ("_owned(-(2 * a.shape[1] + 16) * U * size, owner)",
                                      "_owned(0 * size, owner)"),
    "plain bounds of the wrong sign": ("_rowwise(np.maximum(a, 0.0), _owned(low, owner))",
                                       "_rowwise(np.maximum(a, 0.0), _owned(high, owner))"),
    "slopes of another bound's box": ("owner=each)", "owner=np.sort(each)[::-1])"),
    "what tangents leave ignored": ("            bound.add(value)\n", ""),
    "rests of factors forgotten": ("(np.abs(a) * (rest + rounding))", "(np.abs(a) * rounding)"),
    "signs of coefficients forgotten": ("left.generators * a[:, None, :]", "left.generators * np.abs(a)[:, None, :]"),
    "one symbol for all rests": ("generators[:, used + entry, entry]", "generators[:, used + 0 * entry, entry]"),
    "no symbols for rests": ("np.where(np.isfinite(rest), rest, 0.0)\n", "0.0\n"),
    "one symbol for two sources": ("used, rest = used + n,", "used, rest = used,"),
    "tangents through zero": ("offset = -left.centre * right.centre", "offset = 0.0 * left.centre"),
    "slopes of tangents exchanged": ("slopes, known = (right.centre, left.centre)",
                                     "slopes, known = (left.centre, right.centre)"),
    "squares left out that are none": ("better = (pivot >= PIVOT) & (now > bound)", "better = now > bound"),
    "squares without their tails": ("rest = q - square", "rest = q + 0 * square"),
    "no rounding in quadratic forms": ("return bound, lost + (4 * size + 16) * U * total", "return bound, 0 * lost"),
    "only half of a quadratic form": ("sizes = np.abs(q).sum(axis=2)", "sizes = np.abs(np.tril(q)).sum(axis=2)"),
    "factors of another node": ("factor.take(owner[some])", "factor.take(np.sort(owner)[::-1][some])"),
    "together where nothing is refreshed": ("(together & ~(refreshed & bounded)).any()", "False"),
    "dual norms exchanged": ("if self.norm == L2 else dual.max(axis=1)", "if self.norm != L2 else dual.max(axis=1)"),
    "balls of half the radius": ("dual = np.abs(h * self.radius)", "dual = np.abs(h * self.radius) / 2"),
    "balls around zero": ("at, n = h * self.centre, a.shape[1]", "at, n = 0 * h * self.centre, a.shape[1]"),
    "tangent planes turned round": ("return a + h, d,", "return a - h, d,"),
    "balls without rounding": ("(n + 16) * U * (np.abs(at).sum(axis=1) + most) + TINY", "0 * most"),
    "boxes narrowed too far": ("reach = np.maximum(1 - (total - size)", "reach = np.maximum(1 - total"),
    "boxes narrowed by another norm": ("size = near * near if self.norm == L2 else near",
                                       "size = near * near if self.norm != L2 else near"),
    "ends of points with radius 0": ("known = (self.radius > 0) & np.isfinite(ends[0])",
                                     "known = np.isfinite(ends[0])"),
    "options dropped at the upper end": ("(options <= b)", "(options < b)"),
    "options dropped at the lower end": ("(options >= a)", "(options > a)"),
    "the last option dropped": ("last = np.where(inside, options, -np.inf).max(axis=1)",
                                "last = np.sort(np.where(inside, options, first[:, None]), 1)[:, -2:].min(axis=1)"),
    "entries of a joint choice exchanged": ("np.where(some, first, 1.0)", "np.where(some, first[:, ::-1], 1.0)"),
    "options of another choice": ("zip(self.entries, self.options, strict=True)",
                                  "zip(self.entries[::-1], self.options, strict=False)"),
    "signs by rows with a constant": ("(proof.constant == 0) & (proof.slack", "(proof.slack"),
    "signs by rows with slack": ("(proof.slack == 0) & (np.diff(", "(np.diff("),
    "signs by rows of several outputs": (" & (np.diff(proof.start) == 1)", ""),
    "signs by outputs with a bias": ("(last.bias[output] == 0) & (last", "(last"),
    "signs by outputs with an uncertain bias": (" & (last.bias_error[output] == 0)", ""),
    "signs by uncertain coefficients": ("not last.weight_error < 0.5", "False"),
    "signs by outputs of several values": ("(count == 1) & (sign != 0)", "(count >= 1) & (sign != 0)"),
    "signs of the rows alone": ("sign * np.sign(c[np.arange(len(c)), at])", "sign"),
    "signs turned round": ("append((int(pair[k]), -int(sign[k])))", "append((int(pair[k]), int(sign[k])))"),
    "signs for every clause": ("found[pair - first] = sign", "found[:] = sign"),
    "signs of clauses elsewhere": ("if first <= pair < first + len(found):", "if True:"),
    "signs where a neuron is split elsewhere": ("if at == 0 and at not in", "if at not in"),
    "signs at jumps": ("if at == 0 and at not in self.proof.program.parted[step]:", "if at == 0:"),
    "half of each absolute value": ("half, size = w[some] / 2,", "half, size = w[some] / 4,"),
    "factors of absolute values forgotten": ("np.maximum(-here * self.factor[i], 0.0)", "np.maximum(-here, 0.0)"),
    "middles of both sides forgotten": ("constant = -(half @ (total @ middle + (low_at + high_at)))", "constant = 0.0"),
    "the affine part forgotten": ("b[-1, :-1] = (rest + half @ total) * radius", "b[-1, :-1] = rest * radius"),
    "the rest of a row forgotten": ("b[-1, :-1] = (rest + half @ total) * radius",
                                    "b[-1, :-1] = half @ total * radius"),
    "absolute values where they are 0 in the middle": ("b[:-1, -1] = half *", "b[:-1, -1] = 0 *"),
    "both sides exchanged": ("total, gap = low + high, low - high", "gap, total = low + high, low - high"),
    "less than the largest eigenvalue": ("lost = np.sqrt((rest * rest).sum()) + ", "lost = -0.1 * top + "),
    "no rounding in norms": ("spectral = np.sqrt(top + ABOVE * lost) + 4 * U * ABOVE * np.sqrt(size)",
                             "k, spectral = 0, np.sqrt(top)"),
    "the longest for the sum": ("found = np.sqrt((1 / (p * p)).sum())", "found = np.sqrt((1 / (p * p)).max())"),
    "absolute values of another step": ("here = a[:, self.entry[i]]", "here = a[:, self.entry[i]][:, ::-1]"),
    "affine functions of certain weights": ("bare.start(i, entry, sign, node)\n    _, a, before",
                                            "bare.start(i, entry, sign, node)\n    lost = 0.0\n    _, a, before"),
    "the lower side for both": ("1.0 - 2.0 * side[some], rows[some], stored)",
                                "1.0 + 0 * side[some], rows[some], stored)"),
    "what precedes the sums told": ("before.lose(np.inf)", "pass"),
    "sums where nothing is refreshed": ("(summed & ~(refreshed & bounded)).any()", "False"),
    "the deadline ignored": ("raise TimeoutError", "pass; TimeoutError"),
    "everything refused": ("return Replay(proven, self.margin", "return Replay(0 * proven, self.margin"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name):
    with np.errstate(all="ignore"):
        assert next(faults(broken(*FAULTS[name])), None) is not None


def test_the_checker_unchanged_has_no_faults():
    assert list(faults(broken("FRAME = 2**20", "FRAME = 2**20 "))) == []
