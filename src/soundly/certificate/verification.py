"""Replays the proof of a verification: follows its split trees and derives every bound anew.

The file holds no bound that is believed: boxes come from the cases and the splits, intervals and bounds from
`soundly.certificate.bounding`. A clause of a case is proven by a tree if below every leaf something closed it: a bound,
an empty box or an empty interval. Nodes are replayed in batches, deepest first, so that memory stays bounded.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from soundly.certificate.bounding import Bound, Exceptions, Frame, Pieces, Splits, View, pieces, relax, tangent
from soundly.certificate.conditional import Conditions, tighten
from soundly.certificate.crop import Crops
from soundly.certificate.float32 import row_errors
from soundly.certificate.format import Certificate
from soundly.certificate.forms import INPUTS as FORMS
from soundly.certificate.intervals import around, in_time, refresh
from soundly.certificate.lemmas import Narrowing, narrow
from soundly.certificate.program import Affine, Apply, Times, nonlinear_sources
from soundly.certificate.reading import BOUND, CLIP, INPUT, LEAF, REFRESH, SUMMED, TOGETHER, Proof, Refused, read
from soundly.certificate.rings import U
from soundly.certificate.rows import clipped, row_signs

Array = npt.NDArray[Any]

BATCH = 4096  # nodes at once
NUMBERS = 2**25  # of the affine forms of one node, at most
FRAME = 2**20  # neurons of all nodes of a batch with intervals of their own


@dataclass(frozen=True, eq=False)
class Replay:
    """What the trees prove.

    proven: for every clause of every case, in order, whether it is proven on its whole box.
    margin: by how much its bounds exceed the slack in the worst leaf; infinite where no bound was needed.
    pair_start: where the clauses of each case begin.
    failed: (tree, position in the tree) of leaves where a clause stays open.
    problems: why nothing was replayed.
    choices: of how many points the grid is, if one is claimed (times what other entries range over).
    remaining: of the failed leaves what is left: the box's ends, and which of the tree's clauses are open.
    """

    proven: Array
    margin: Array
    pair_start: Array
    failed: list[tuple[int, int]]
    problems: tuple[str, ...] = ()
    remaining: dict[tuple[int, int], tuple[Array, Array, Array]] = field(default_factory=dict)
    choices: int | None = None


def replay(certificate: Certificate, *, deadline: float | None = None) -> Replay:
    """Derive all bounds of a certificate of kind "verification" again.

    Args:
        deadline: on the clock of `time.monotonic`.

    Guarantee: a clause that counts as proven has, for every real point x of its case's box and the ball or grid, a row
    with s(x) > slack, for the stored network and every network within its stated errors, in real arithmetic.
    """
    try:
        proof = read(certificate)
    except Refused as problem:
        nothing = np.zeros(0, bool)
        return Replay(nothing, nothing.astype(float), np.zeros(1, int), [], (str(problem),))
    with np.errstate(all="ignore"):  # overflow ends in infinities and NaN, which prove nothing
        return _Replayer(proof, math.inf if deadline is None else deadline).run()


Neuron = tuple[int, int, float, int]
"""A split on the way to a node: step, entry, at, and +1 above or -1 below."""


@dataclass(slots=True, eq=False)
class _Node:
    """A node to be replayed: its place in the file and the state that it inherits."""

    tree: int
    place: int
    depth: int
    lower: Array
    upper: Array
    frame: Frame
    row: int
    splits: tuple[Neuron, ...]
    open: Array


@dataclass(eq=False)
class _Replayer:
    proof: Proof
    deadline: float
    pending: dict[int, list[_Node]] = field(default_factory=dict)
    shared: dict[tuple[int, int, int], tuple[Frame, Frame, dict[int, Pieces]]] = field(default_factory=dict)

    def run(self) -> Replay:
        proof, pairs = self.proof, int(self.proof.pair_start[-1])
        self.narrow = max(1, FRAME // int(proof.program.offsets[-1]))
        if proof.float32:
            changes = row_errors(proof, at_once=self.narrow, deadline=self.deadline)
            proof = self.proof = replace(proof, slack=(proof.slack + changes) * (1 + 4 * U))
        self.lemmas = Narrowing(proof.program, proof.lemmas, lambda: in_time(self.deadline))
        self.signs = row_signs(proof)
        self.failed: dict[tuple[int, int], tuple[Array, Array, Array]] = {}
        self.margin = np.full(pairs, np.inf)
        self.left_open = [np.zeros(last - first, bool) for first, last in proof.tree_clause.tolist()]
        self.batch = max(1, min(self.narrow, BATCH))
        vary = (proof.upper > proof.lower).sum(axis=1)
        self.formed = (vary <= FORMS) & (vary * int(proof.program.offsets[-1]) <= NUMBERS)
        self.varying = int(vary[self.formed].max(initial=0))
        roots = proof.tree_start[:-1]
        # Trees of one case that refresh the root alike share its intervals.
        keys = np.stack([proof.tree_case, proof.slopes_refresh[roots], proof.flags[roots] & TOGETHER], axis=1)
        unique, number = np.unique(keys, axis=0, return_inverse=True)
        order = np.argsort(number.reshape(-1), kind="stable")
        number = number.reshape(-1)[order]
        for begin in range(0, len(unique), self.narrow):
            some = unique[begin : begin + self.narrow]
            lower, upper = self._narrowed(proof.lower[some[:, 0]], proof.upper[some[:, 0]])
            row_of: dict[int, tuple[Frame, int, bool]] = {}
            for forms, which in self._alike(self._followed(some[:, 0], some[:, 2])):
                known = partial(self.lemmas.narrow, some[which, 0])
                frame, dead = self._refresh(lower[which], upper[which], None, some[which, 1], forms, known)
                row_of |= {key: (frame, row, bool(dead[row])) for row, key in enumerate(which.tolist())}
            first, last = np.searchsorted(number, [begin, begin + len(some)])
            for tree, key in zip(order[first:last].tolist(), (number[first:last] - begin).tolist(), strict=True):
                frame, row, gone = row_of[key]
                if not gone:
                    open_ = np.ones(len(self.left_open[tree]), bool)
                    node = _Node(tree, int(roots[tree]), 0, lower[key], upper[key], frame, row, (), open_)
                    self.pending.setdefault(0, []).append(node)
            while self.pending:
                # Level by level, for large batches; where too much waits, the deepest first.
                many = sum(map(len, self.pending.values())) > 4 * self.narrow
                depth = max(self.pending) if many else min(self.pending)
                waiting = self.pending[depth]
                in_time(self.deadline)
                batch, self.pending[depth] = waiting[-self.batch :], waiting[: -self.batch]
                if not self.pending[depth]:
                    del self.pending[depth]
                self._replay(batch)
            self.shared.clear()
        proven = np.zeros(pairs, bool)
        for case, (first, last), left in zip(
            proof.tree_case.tolist(), proof.tree_clause.tolist(), self.left_open, strict=True
        ):
            base = proof.pair_start[case]
            proven[base + first : base + last] |= ~left
        size = None if proof.grid is None else proof.grid.size
        return Replay(proven, self.margin, proof.pair_start, sorted(self.failed), (), self.failed, size)

    def _narrowed(self, lower: Array, upper: Array) -> tuple[Array, Array]:
        """What the ball or the grid, if there is one, leaves of boxes [k, n]."""
        for limit in (self.proof.program.ball, self.proof.grid):
            if limit is not None:
                lower, upper = limit.narrowed(lower, upper)
        return lower, upper

    def _followed(self, case: Array, flags: Array) -> Array:
        """What is followed besides intervals: 0 for nothing, 1 for affine forms, 2 for those of factors as well."""
        formed = self.formed[case].astype(int)
        return np.where(flags & TOGETHER, 2 * formed, formed)

    def _alike(self, alike: Array) -> Iterator[tuple[int, Array]]:
        """Each value with the positions that have it, so few at a time that what belongs to them finds room."""
        for value in np.unique(alike).tolist():
            which = np.flatnonzero(alike == value)
            size = max(1, self.narrow // (1 + self.varying)) if value else self.narrow
            for begin in range(0, len(which), size):
                yield value, which[begin : begin + size]

    def _refresh(
        self, lower: Array, upper: Array, inherited: Frame | None, group: Array, forms: int,
        narrow: Callable[[Frame, int, Crops], None] | None = None,
    ) -> tuple[Frame, Array]:  # fmt: skip
        proof = self.proof
        return refresh(proof.program, lower, upper, inherited, group, proof.stored, forms=forms > 0,
                       together=forms > 1, narrow=narrow, deadline=self.deadline)  # fmt: skip

    def _replay(self, batch: list[_Node]) -> None:
        proof, living = self.proof, []
        renewed = [n for n in batch if n.depth and proof.flags[n.place] & REFRESH]
        living = [n for n in batch if not (n.depth and proof.flags[n.place] & REFRESH)]
        renewed.sort(key=lambda n: id(n.frame))
        places = np.array([n.place for n in renewed], int)
        cases = proof.tree_case[np.array([n.tree for n in renewed], int)]
        for forms, which in self._alike(self._followed(cases, proof.flags[places])):
            nodes = [renewed[i] for i in which]
            held, group = self._held(nodes), np.array([proof.slopes_refresh[n.place] for n in nodes])
            frame, dead = self._refresh(held.lower[0], held.upper[0], held, group, forms)
            for row, node in enumerate(nodes):
                if not dead[row]:
                    node.frame, node.row = frame, row
                    living.append(node)
        living = self._tightened(living)
        bounded = [n for n in living if proof.flags[n.place] & BOUND]
        groups: dict[tuple[int, int, int], list[_Node]] = {}
        kinds: dict[tuple[bool, bool], list[_Node]] = {}  # by whether slopes are stored and products bounded together
        for node in bounded:
            slopes = int(proof.slopes_bound[node.place])
            if proof.flags[node.place] & SUMMED:
                view = self._mixed_view([node], bool(proof.flags[node.place] & TOGETHER and node.frame.factors))
                found = around(view, int(proof.slopes_refresh[node.place]), proof.stored, self.deadline)
                self._bound([node], view, None if found is None else replace(view, absolute=found))
            elif proof.flags[node.place] & TOGETHER and node.frame.factors:  # none where no forms are followed
                kinds.setdefault((slopes >= 0, True), []).append(node)
            else:
                groups.setdefault((id(node.frame), node.row, slopes), []).append(node)
        for key, nodes in groups.items():
            if len(nodes) > 1 and self._can_share(nodes):
                for some in self._portions(nodes):
                    self._bound(some, self._shared_view(key, some))
            else:
                kinds.setdefault((key[2] >= 0, False), []).extend(nodes)
        for (_, together), mixed in sorted(kinds.items()):
            mixed.sort(key=lambda n: id(n.frame))
            for begin in range(0, len(mixed), self.narrow):
                for some in self._portions(mixed[begin : begin + self.narrow]):
                    self._bound(some, self._mixed_view(some, together))
        for node in living:
            self._branch(node)

    def _tightened(self, living: list[_Node]) -> list[_Node]:
        """Tightens intervals where the file says how; the nodes that may still hold a counterexample."""
        proof = self.proof
        some = [n for n in living if proof.tighten_start[n.place + 1] > proof.tighten_start[n.place]]
        living = [n for n in living if proof.tighten_start[n.place + 1] == proof.tighten_start[n.place]]
        some.sort(key=lambda n: id(n.frame))
        for begin in range(0, len(some), self.narrow):
            nodes = some[begin : begin + self.narrow]
            frame = self._gather(nodes)
            dead = tighten(
                proof.program, frame, self._conditions(nodes), self._constraints, lambda: in_time(self.deadline)
            )
            for row in np.flatnonzero(~dead).tolist():
                nodes[row].frame, nodes[row].row = frame, row
                living.append(nodes[row])
        return living

    def _conditions(self, nodes: Sequence[_Node]) -> Conditions:
        """The bounds that the file has for some nodes, with the rows of their clauses and the splits on their ways."""
        proof = self.proof
        spans = [slice(*proof.tighten_start[n.place : n.place + 2]) for n in nodes]
        which = np.concatenate([np.arange(s.start, s.stop) for s in spans])
        number = np.repeat(np.arange(len(nodes)), [s.stop - s.start for s in spans])
        rows: list[tuple[int, int, float]] = []
        splits: list[tuple[int, int, int, float, int, float]] = []
        for k, (at, i) in enumerate(zip(which.tolist(), number.tolist(), strict=True)):
            node, force = nodes[i], proof.force[slice(*proof.force_start[at : at + 2])].tolist()
            pair = proof.pair_start[proof.tree_case[node.tree]] + proof.tree_clause[node.tree, 0]
            first, last = proof.pair_rows[pair : pair + 2].tolist()
            rows += [(k, r, g) for r, g in zip(range(first, last), force, strict=False)]
            splits += [(k, *s, b) for s, b in zip(node.splits, force[last - first :], strict=True)]
        of_row, row, times = map(np.array, zip(*rows, strict=True))
        known = None
        if splits:
            of_split, step, entry, at, sign, beta = map(np.array, zip(*splits, strict=True))
            known = Splits(of_split, step, entry, at.astype(float), sign, beta.astype(float))
        return Conditions(
            number, proof.tighten_round[which], proof.tighten_key[which], proof.stored.of(proof.tighten_row[which]),
            of_row, row, times.astype(float), known,
        )  # fmt: skip

    def _constraints(self, rows: Array) -> tuple[dict[int, Array], Array]:
        """Coefficients of rows by step, and how far each is above its slack where these are 0."""
        return self._rows(rows), self.proof.constant[rows] - self.proof.slack[rows]

    def _portions(self, nodes: list[_Node]) -> Iterator[list[_Node]]:
        """The nodes, so few at a time that boxes of their own, and one for each row that clips, find room."""
        proof, some, room = self.proof, list[_Node](), 0
        same = all(n.lower is nodes[0].lower and n.upper is nodes[0].upper for n in nodes)
        for node in nodes:
            clips, case = proof.flags[node.place] & CLIP, proof.tree_case[node.tree]
            first, last = proof.pair_rows[proof.pair_start[case : case + 2]]
            needs = (last - first if clips else 0 if same else 1) * len(node.lower)
            if some and room + needs > FRAME:
                yield some
                some, room = [], 0
            some.append(node)
            room += needs
        if some:
            yield some

    def _gather(self, nodes: Sequence[_Node]) -> Frame:
        """The nodes' intervals, with their boxes and their neuron splits; nodes with one frame stand together."""
        proof, found, begin = self.proof, list[Frame](), 0
        while begin < len(nodes):
            end = begin
            while end < len(nodes) and nodes[end].frame is nodes[begin].frame:
                end += 1
            found.append(nodes[begin].frame.take(np.array([n.row for n in nodes[begin:end]])))
            begin = end
        frame = Frame.join(found)
        boxes = np.stack([n.lower for n in nodes]), np.stack([n.upper for n in nodes])
        changed = {step for node in nodes for step, *_ in node.splits}
        for i in changed:
            frame.lower[i], frame.upper[i] = frame.lower[i].copy(), frame.upper[i].copy()
        if not all(np.array_equal(new, old) for new, old in zip(boxes, (frame.lower[0], frame.upper[0]), strict=True)):
            changed.add(0)
        frame.lower[0], frame.upper[0] = boxes
        for i, reader in enumerate(proof.program.steps):
            if changed.intersection(nonlinear_sources(reader)):
                frame.pieces.pop(i, None)
        self._clamp(frame, nodes)
        return frame

    def _held(self, nodes: Sequence[_Node]) -> Frame:
        """The nodes' boxes, and of other steps what lemmas and their neuron splits say."""
        facts = [self.lemmas.known(int(self.proof.tree_case[node.tree])) for node in nodes]
        changed = {step for node in nodes for step, *_ in node.splits} | {step for own in facts for step, *_ in own}
        frame = Frame()
        for i, step in enumerate(self.proof.program.steps):
            for ends, none in ((frame.lower, -np.inf), (frame.upper, np.inf)):
                unknown = np.broadcast_to(none, (len(nodes), step.size))
                ends.append(unknown.copy() if i in changed else unknown)
        frame.lower[0], frame.upper[0] = np.stack([n.lower for n in nodes]), np.stack([n.upper for n in nodes])
        for row, own in enumerate(facts):
            for fact in own:
                narrow(frame, np.array([row]), fact)
        self._clamp(frame, nodes)
        return frame

    def _clamp(self, frame: Frame, nodes: Sequence[_Node]) -> None:
        """Puts the neuron splits of the nodes into their intervals."""
        for row, node in enumerate(nodes):
            for step, entry, at, sign in node.splits:
                ends = (frame.lower if sign > 0 else frame.upper)[step]
                ends[row, entry] = max(ends[row, entry], at) if sign > 0 else min(ends[row, entry], at)
                if at in self.proof.program.parted[step]:
                    self._part(frame, row, step, entry, at, sign)

    def _part(self, frame: Frame, row: int, step: int, entry: int, at: float, sign: int) -> None:
        """Notes that a jump was split there."""
        if step not in frame.parted:
            shape = frame.lower[step].shape
            frame.parted[step] = np.full(shape, -np.inf), np.full(shape, np.inf)
        after, before = frame.parted[step]
        if sign > 0:
            after[row, entry] = max(after[row, entry], at)
        else:
            before[row, entry] = min(before[row, entry], at)

    def _splits(self, nodes: Sequence[_Node]) -> Splits | None:
        """All splits on the way to the nodes, with the multipliers that the file has for them."""
        proof = self.proof
        rows: list[tuple[int, int, int, float, int]] = []
        betas: list[Array] = []
        for i, node in enumerate(nodes):
            rows += [(i, *split) for split in node.splits]
            first, last = proof.beta_start[node.place : node.place + 2]
            betas.append(proof.beta[first:last] if last > first else np.zeros(len(node.splits)))
        if not rows:
            return None
        number, step, entry, at, sign = map(np.array, zip(*rows, strict=True))
        return Splits(number, step, entry, at.astype(float), sign, np.concatenate(betas))

    def _can_share(self, nodes: Sequence[_Node]) -> bool:
        """Whether the nodes' intervals differ in few places: not in the input, nor in a factor of a product."""
        steps = self.proof.program.steps
        if 0 in self.proof.program.bounded and any(n.lower is not nodes[0].lower for n in nodes):
            return False
        factors = {s for step in steps if isinstance(step, Times) for s in (step.left, step.right)}
        return not factors or not any(split[0] in factors for node in nodes for split in node.splits)

    def _mixed_view(self, nodes: Sequence[_Node], together: bool) -> View:
        proof, frame = self.proof, self._gather(nodes)
        rows = np.array([proof.slopes_bound[n.place] for n in nodes])
        slopes = proof.stored.of(rows) if rows[0] >= 0 else None
        found = self._pieces(frame, slopes)
        factors = frame.factors if together else {}
        found |= {i: tangent(proof.program, i, frame) for i in factors}
        return View(
            proof.program, frame, found, frame.lower[0], frame.upper[0], {}, self._splits(nodes), factors,
            proof.program.ball,
        )  # fmt: skip

    def _pieces(self, frame: Frame, slopes: Array | None) -> dict[int, Pieces]:
        program = self.proof.program
        return {
            i: frame.pieces[i]
            if i in frame.pieces and (slopes is None or not program.has_slots(i))
            else pieces(program, i, frame, slopes)
            for i, step in enumerate(program.steps)
            if isinstance(step, (Apply, Times))
        }

    def _shared_view(self, key: tuple[int, int, int], nodes: Sequence[_Node]) -> View:
        proof, program = self.proof, self.proof.program
        slopes = proof.stored.of(np.array(key[2:])) if key[2] >= 0 else None
        same_box = all(n.lower is nodes[0].lower and n.upper is nodes[0].upper for n in nodes)
        boxes = nodes[:1] if same_box else nodes
        lower, upper = np.stack([n.lower for n in boxes]), np.stack([n.upper for n in boxes])
        if key not in self.shared or 0 in program.bounded:
            frame = nodes[0].frame.take(np.array([nodes[0].row]))
            if 0 in program.bounded:
                frame.lower[0], frame.upper[0] = lower, upper
                frame.pieces = {}
            if len(self.shared) >= 4:
                self.shared.pop(next(iter(self.shared)))
            self.shared[key] = (nodes[0].frame, frame, self._pieces(frame, slopes))  # the first keeps its id alive
        _, frame, relaxed = self.shared[key]
        splits, exceptions = self._splits(nodes), {}
        if splits is not None:
            for i, step in enumerate(program.steps):
                if isinstance(step, Apply) and (splits.step == step.source).any():
                    exceptions[i] = self._exceptions(i, step, frame, slopes, splits)
        return View(program, frame, relaxed, lower, upper, exceptions, splits, ball=program.ball)

    def _exceptions(self, i: int, step: Apply, frame: Frame, slopes: Array | None, splits: Splits) -> Exceptions:
        """What step i is in the nodes where a neuron that it reads was split."""
        some = splits.step == step.source
        at, sign = splits.at[some], splits.sign[some]
        key, place = np.unique(splits.node[some] * step.size + splits.entry[some], return_inverse=True)
        node, entry = key // step.size, key % step.size
        low, high = frame.lower[step.source][0, entry], frame.upper[step.source][0, entry]
        np.maximum.at(low, place[sign > 0], at[sign > 0])
        np.minimum.at(high, place[sign < 0], at[sign < 0])
        jump = np.isin(at, list(self.proof.program.parted[step.source]))
        after, before = np.full(len(key), -np.inf), np.full(len(key), np.inf)
        np.maximum.at(after, place[(sign > 0) & jump], at[(sign > 0) & jump])
        np.minimum.at(before, place[(sign < 0) & jump], at[(sign < 0) & jump])
        sides = (low == after) & (low < high), (high == before) & (low < high)
        below, above = self.proof.program.stored(i, slopes, 1)
        relaxed = relax(self.proof.program, i, [(low, high)], below[0, entry], above[0, entry], sides)
        return Exceptions(node, entry, relaxed)

    def _bound(self, nodes: Sequence[_Node], view: View, summed: View | None = None) -> None:
        """Bounds the open clauses of the nodes, closes those that are proven, and clips boxes. Of two views, the second
        with absolute values bounded together, what either says holds."""
        proof, program = self.proof, self.proof.program
        places, trees = (np.array([getattr(n, name) for n in nodes]) for name in ("place", "tree"))
        open_ = np.concatenate([n.open for n in nodes])  # every clause of every node
        many = np.array([len(n.open) for n in nodes])
        end = np.cumsum(many)
        each = np.flatnonzero(open_)
        owners = np.repeat(np.arange(len(nodes)), many)[each]
        base = proof.pair_start[proof.tree_case[trees]] + proof.tree_clause[trees, 0]
        pairs = base[owners] + each - (end - many)[owners]
        counts = proof.pair_rows[pairs + 1] - proof.pair_rows[pairs]
        first = np.cumsum(counts) - counts
        rows = np.arange(counts.sum()) - np.repeat(first, counts) + np.repeat(proof.pair_rows[pairs], counts)
        owner = np.repeat(owners, counts)
        clips = (proof.flags[places] & CLIP) > 0
        best = np.full(len(rows), -np.inf)
        shapes = (len(rows), program.steps[0].size)
        narrow, wide = (np.full(shapes, v) if clips.any() else None for v in (-np.inf, np.inf))
        size = program.rows_at_once
        for begin in range(0, len(rows), size):
            in_time(self.deadline)
            some = slice(begin, begin + size)
            start, constant = self._rows(rows[some]), proof.constant[rows[some]]
            best[some] = view.plain(start, owner[some], constant)
            lower, a, bound = view.backward(start, owner[some], constant)
            best[some] = np.maximum(best[some], lower)
            if narrow is not None and wide is not None:
                narrow[some], wide[some] = _clipped(view, a, bound, owner[some], proof.slack[rows[some]])
            if summed is not None:
                lower, _, _ = summed.backward(self._rows(rows[some]), owner[some], constant)
                best[some] = np.maximum(best[some], lower)
        excess = best - proof.slack[rows]
        closed = np.logical_or.reduceat(np.isfinite(best) & (best > proof.slack[rows]), first)
        margin = np.maximum.reduceat(excess, first)
        done = closed
        if narrow is not None and wide is not None:
            lower, upper = (np.stack([getattr(n, name) for n in nodes]) for name in ("lower", "upper"))
            left = np.maximum(np.maximum.reduceat(narrow, first, axis=0), lower[owners])
            right = np.minimum(np.minimum.reduceat(wide, first, axis=0), upper[owners])
            done = closed | ((left > right).any(axis=1) & clips[owners])
            remain = np.flatnonzero(~done & clips[owners])
            if len(remain):
                which, starts = np.unique(owners[remain], return_index=True)
                lower, upper = (f.reduceat(x[remain], starts) for f, x in ((np.minimum, left), (np.maximum, right)))
                for i, low, high in zip(which.tolist(), lower, upper, strict=True):
                    nodes[i].lower, nodes[i].upper = low, high
        told = closed | ((proof.kind[places[owners]] == LEAF) & ~done)
        np.minimum.at(self.margin, pairs[told], margin[told])
        open_[each[done]] = False
        for node, stop, count in zip(nodes, end.tolist(), many.tolist(), strict=True):
            node.open = open_[stop - count : stop]

    def _rows(self, rows: Array) -> dict[int, Array]:
        """Coefficients of the rows: of the outputs and, where there are any, of the input."""
        proof, program = self.proof, self.proof.program
        outputs, inputs, last = program.steps[-1].size, program.steps[0].size, len(program.steps) - 1
        length = proof.start[rows + 1] - proof.start[rows]
        row = np.repeat(np.arange(len(rows)), length)
        place = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        place += np.repeat(proof.start[rows], length)
        column, value = proof.column[place], proof.value[place]
        result = np.zeros((len(rows), outputs))
        y = column < outputs
        result[row[y], column[y]] = value[y]
        found = {last: result}
        if not y.all():
            of_input = np.zeros((len(rows), inputs))
            of_input[row[~y], column[~y] - outputs] = value[~y]
            if last == 0:
                of_input += result
            found[0] = of_input
        return found

    def _branch(self, node: _Node) -> None:
        """Passes what is open to the children, or notes that a leaf left it open."""
        proof, place = self.proof, node.place
        if not node.open.any():
            return
        if proof.flags[place] & CLIP:
            (node.lower,), (node.upper,) = self._narrowed(node.lower[None], node.upper[None])
            if (node.lower > node.upper).any():
                return
        if proof.kind[place] == LEAF:
            self.left_open[node.tree] |= node.open
            position = place - int(proof.tree_start[node.tree])
            self.failed[node.tree, position] = node.lower, node.upper, node.open
            return
        what, at = int(proof.what[place]), float(proof.at[place])
        step = int(np.searchsorted(proof.program.offsets, what, side="right")) - 1
        entry = what - int(proof.program.offsets[step])
        halves = self._halves(node, step, entry, at) if proof.kind[place] != INPUT else None
        decided = self._decided(node, step, entry, at) if proof.kind[place] != INPUT else np.zeros(len(node.open))
        for side, sign in ((0, -1), (1, 1)):
            lower, upper, splits = node.lower, node.upper, node.splits
            open_ = node.open & (decided != -sign)
            if not open_.any():
                continue
            if proof.kind[place] == INPUT:
                if side == 0:
                    upper = upper.copy()
                    upper[what] = min(upper[what], at)
                else:
                    lower = lower.copy()
                    lower[what] = max(lower[what], at)
                (lower,), (upper,) = self._narrowed(lower[None], upper[None])
                if (lower > upper).any():
                    continue
            else:
                splits = (*splits, (step, entry, at, sign))
                low, high = node.frame.lower[step][node.row, entry], node.frame.upper[step][node.row, entry]
                same = [(t, s) for i, j, t, s in splits if (i, j) == (step, entry)]
                if max([low, *(t for t, s in same if s > 0)]) > min([high, *(t for t, s in same if s < 0)]):
                    continue
                if halves is not None:
                    lower, upper = halves[side]
                    if (lower > upper).any():
                        continue
            child = _Node(node.tree, int(proof.child[place]) + side, node.depth + 1, lower, upper, node.frame, node.row,
                          splits, open_)  # fmt: skip
            self.pending.setdefault(child.depth, []).append(child)

    def _decided(self, node: _Node, step: int, entry: int, at: float) -> Array:
        """For each of the tree's clauses the half, -1 or +1, in which all counterexamples at or beside the split lie
        because a row says so; 0 where none does. Both sides of a jump have a half each, and then no row tells."""
        found = np.zeros(len(node.open), int)
        if at == 0 and at not in self.proof.program.parted[step]:
            first = int(self.proof.pair_start[self.proof.tree_case[node.tree]] + self.proof.tree_clause[node.tree, 0])
            for pair, sign in self.signs.get((step, entry), ()):
                if first <= pair < first + len(found):
                    found[pair - first] = sign
        return found

    def _halves(self, node: _Node, i: int, entry: int, at: float) -> list[tuple[Array, Array]] | None:
        """What a split of an entry of step i, if that is affine in the input, leaves of the node's box on each side."""
        step = self.proof.program.steps[i]
        if not isinstance(step, Affine) or not step.parts or any(source != 0 for _, source in step.parts):
            return None
        w, b = sum(part.rows_of(np.array([entry])) for part, _ in step.parts), step.bias[entry]
        cost = node.frame.cost[i]
        assert cost is not None
        sign = np.array([-1.0, 1.0])  # sign (w x + b - at) >= 0, up to what weights and roundings may differ
        low, high = clipped(
            -sign[:, None] * w, sign * (at - b) - 4 * U * (abs(at) + abs(b)), np.full(2, cost[node.row, entry]),
            node.lower, node.upper,
        )  # fmt: skip
        low, high = np.maximum(low, node.lower), np.minimum(high, node.upper)
        same = ((low == node.lower) & (high == node.upper)).all(axis=1)
        return [(node.lower, node.upper) if same[k] else (low[k], high[k]) for k in (0, 1)]


def _clipped(view: View, a: Array, bound: Bound, owner: Array, slack: Array) -> tuple[Array, Array]:
    """For rows a x + d: what a x + d <= slack leaves of each input's interval, the others being anywhere in theirs."""
    lower, upper = (x if len(x) == 1 else x[owner] for x in (view.lower, view.upper))
    return clipped(a, bound.lower(), slack, lower, upper, view.program.contributions)
