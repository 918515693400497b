"""Reading VNN-LIB, the specifications of the verification competitions, from files that nobody vouches for.

A file declares inputs X_i and outputs Y_j and asserts linear inequalities under AND and OR; whatever satisfies all of
them is a counterexample. One pass over the tokens with a stack of its own reduces each closed parenthesis: no depth
exhausts Python's. Numbers stay exact fractions until the last step rounds outward. Alternatives that only bound inputs
become boxes; the others become clauses, multiplied out one by one and never beyond a limit. What is read here is
version 1.0; files of version 2.0 are told by their first command and taken apart in `soundly.spec.vnnlib2`.

Reference: Demarchi, Guidotti, Pulina, Tacchella, "Supporting Standardization of Neural Networks Verification with
VNNLIB and CoCoNet", FoMLAS 2023.
"""

from __future__ import annotations

import gc
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch

from soundly.errors import InvalidInput
from soundly.graph.network import Network
from soundly.graph.node import Shape
from soundly.spec.claim import CLAUSES, Claim, Property, Row, Shapes, shapes_of
from soundly.spec.region import Union, rounded

FILE_BYTES = 2**26
"""The most that a specification may hold, unpacked."""
WORK = 5 * 10**6
"""The most steps beyond one per token: terms added in nested sums, rows of multiplied clauses."""
BOUNDS = 2**25
"""The most entries of all boxes together."""
DIGITS, BITS = 1200, 20_000
"""The longest number, its exponent likewise, and the largest number computed from others."""

_TOKEN = re.compile(r';[^\n]*|"[^"]*"|\|[^|]*\||[()]|[^\s();"|]+|["|]')
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,5})?")
_VERSIONED = re.compile(r"(?:\s|;[^\n]*\n)*\(\s*vnnlib-version\b")
_VARIABLE = re.compile(r"([XY])_(0|[1-9][0-9]{0,8})")
_IGNORED = frozenset(("set-logic", "set-info", "set-option", "check-sat", "get-model", "exit"))
_COMPARE = frozenset(("<=", ">=", "<", ">", "="))
_ARITHMETIC = frozenset(("+", "-", "*", "/"))
_ONE = Fraction(1)
_NOTHING: dict[int, Fraction] = {}


@dataclass(slots=True)
class _Bound:
    """An inequality on one input: X_i >= value, or <= value if `upper`."""

    i: int
    upper: bool
    value: Fraction
    strict: bool


@dataclass(slots=True)
class _Node:
    """AND or OR of formulas. `bounds` says that nothing but input bounds lies below; `clauses` counts its clauses
    when multiplied out, up to a limit."""

    any: bool
    parts: list[Formula]
    bounds: bool
    clauses: int


Formula: TypeAlias = _Bound | Row | _Node
Linear: TypeAlias = dict[int | None, Fraction]  # X_i is i, Y_j is -1 - j, None holds the constant
Limit: TypeAlias = tuple[Fraction, bool]  # a bound and whether it is strict
Limits: TypeAlias = dict[int, tuple[Limit | None, Limit | None]]


def read_vnnlib(
    source: str | bytes | os.PathLike[str], network: Network | Shapes | tuple[Sequence[Shape], Sequence[Shape]]
) -> Claim:
    """Reads a VNN-LIB specification as a claim about a network.

    Args:
        source: a path (.vnnlib or .vnnlib.gz), the text itself, or the bytes of such a file. A str that starts with
            "(" or ";" or has several lines is text.
        network: the network, or its shapes (inputs, outputs) where only those are known; several inputs or outputs
            are numbered through in call order.

    Version 1.0 is read in full; of version 2.0, which needs the package `vnnlib`, linear queries about the inputs and
    outputs of one network.

    Returns:
        A claim whose region is a Union of boxes, widened to float64 outward (see `Box.inner`). It is empty where the
        bounds on inputs contradict each other, exactly judged. `<` and `<=` differ in `holds_at` alone.

    Raises:
        InvalidInput: the file is missing, too large, or not such a specification (with line and column), is not
            linear, leaves an input unbounded, multiplies out to too many clauses, or is about another network's
            shapes; or is of version 2.0 and goes beyond the above, or `vnnlib` is not installed.
    """
    if isinstance(network, tuple):
        network = Shapes(tuple(map(tuple, network[0])), tuple(map(tuple, network[1])))
    if not isinstance(network, (Network, Shapes)):
        raise InvalidInput(f"network is a {type(network).__name__}; give a Network or its (input, output) shapes.")
    shapes = network if isinstance(network, Shapes) else shapes_of(network)
    text, name = _text(source)
    collecting = gc.isenabled()
    gc.disable()  # formulas form no cycles; searching them for some takes half of the time
    try:
        return _read(text, name, network, shapes)
    finally:
        if collecting:
            gc.enable()


def _read(text: str, name: str, network: Network | Shapes, shapes: Shapes) -> Claim:
    reader = Reader(text, name)
    if _VERSIONED.match(text):
        from soundly.spec.vnnlib2 import Reader2

        reader = Reader2(text, name)
    reader.parse()
    reader.fit(shapes)
    sizes = (sum(math.prod(shape) for shape in side) for side in (shapes.inputs, shapes.outputs))
    return _claim(reader, network, *sizes)


def _text(source: str | bytes | os.PathLike[str]) -> tuple[str, str]:
    """The text and a name for messages."""
    if isinstance(source, str) and (source.lstrip()[:1] in ("(", ";", "") or "\n" in source):
        if len(source) > FILE_BYTES:
            raise InvalidInput(f"the specification has {len(source)} characters; at most {FILE_BYTES} are read.")
        return source, "the specification"
    if isinstance(source, bytes):
        name, data = "the specification", source
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        name = path.name
        try:
            with path.open("rb") as file:
                data = file.read(FILE_BYTES + 1)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{path} cannot be read: {error}.") from error
    else:
        raise InvalidInput(f"source is a {type(source).__name__}; give a path, text or bytes.")
    if data[:2] == b"\x1f\x8b":
        try:
            unpack = zlib.decompressobj(wbits=31)
            data = unpack.decompress(data, FILE_BYTES + 1)
        except zlib.error as error:
            raise InvalidInput(f"{name} is a damaged gzip file: {error}.") from error
        if not unpack.eof and len(data) <= FILE_BYTES:
            raise InvalidInput(f"{name} is a gzip file that was cut off.")
    if len(data) > FILE_BYTES:
        raise InvalidInput(f"{name} holds more than {FILE_BYTES} bytes, which no specification needs.")
    return data.decode("utf-8", "replace").removeprefix("\ufeff"), name


class Reader:
    """Turns the text into formulas. Positions are offsets into the text until an error needs line and column."""

    assumptions: tuple[str, ...] = ()

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name
        self.declared: dict[str, set[int]] = {"X": set(), "Y": set()}
        self.known: dict[str, Any] = {"true": _Node(False, [], True, 1), "false": _Node(True, [], True, 0)}
        self.asserted: list[Formula] = []
        self.work = 0

    def fail(self, offset: int, problem: str) -> NoReturn:
        line = self.text.count("\n", 0, offset) + 1
        column = offset - self.text.rfind("\n", 0, offset)
        raise InvalidInput(f"{self.name}, line {line}, column {column}: {problem}")

    def entry(self, i: int) -> str:
        """What the file calls an input."""
        return f"X_{i}"

    def fit(self, shapes: Shapes) -> None:
        """Raises unless the declarations are those of such a network."""
        for letter, kind, wanted in (("X", "inputs", shapes.inputs), ("Y", "outputs", shapes.outputs)):
            declared, size = self.declared[letter], sum(math.prod(shape) for shape in wanted)
            if len(declared) != size:
                raise InvalidInput(
                    f"{self.name} declares {len(declared)} {kind}, but the network has {size} (shapes {list(wanted)}): "
                    "it was written for another network."
                )
            missing = next((i for i in range(size) if i not in declared), None)
            if missing is not None:
                raise InvalidInput(f"{self.name} does not declare {letter}_{missing}, but {letter}_{max(declared)}.")

    def parse(self) -> None:
        stack: list[tuple[str | None, list[Any], int, bool]] = []
        head: str | None = None
        raw = True  # whether symbols are taken as they are
        args: list[Any] = []
        start, known = 0, self.known
        for match in _TOKEN.finditer(self.text):
            token = match.group()
            if token == "(":
                if stack and head is None:
                    self.fail(match.start(), "an operator was expected, not a parenthesis.")
                stack.append((head, args, start, raw))
                head, args, start, raw = None, [], match.start(), head in ("declare-fun", "set-info")
            elif token == ")":
                if not stack:
                    self.fail(match.start(), "this parenthesis closes nothing.")
                value = self.reduce(head, args, start, len(stack), raw)
                head, args, start, raw = stack.pop()
                if stack:
                    args.append(value)
            elif token[0] == ";":
                continue
            elif not stack:
                self.fail(match.start(), f"{_shown(token)} stands outside of any command.")
            elif head is None and not raw:
                head = token
                raw = head[0] == "d" or head[0] == "s" or head in _IGNORED
            elif raw:
                args.append(token)
            else:
                value = known.get(token)
                args.append(self.symbol(token, match.start()) if value is None else value)
        if stack:
            self.fail(start, "this parenthesis is never closed; the file may be cut off.")

    def symbol(self, token: str, offset: int) -> Fraction:
        """A number seen for the first time."""
        if _NUMBER.fullmatch(token):
            exponent = token.lower().partition("e")[2]
            if len(token) > DIGITS or abs(int(exponent or 0)) > DIGITS:
                self.fail(offset, f"the number {_shown(token)} is too long or too large.")
            value = self.known[token] = Fraction(token)
            return value
        if _VARIABLE.fullmatch(token):
            self.fail(offset, f"{token} is used but not declared.")
        self.fail(offset, f"{_shown(token)} is neither a number nor a variable X_i or Y_j.")

    def reduce(self, head: str | None, args: list[Any], at: int, depth: int, raw: bool) -> Any:
        """The value of one closed pair of parentheses; commands have none."""
        if head is None:
            if raw:
                return tuple(args)  # the argument types of declare-fun
            self.fail(at, "these parentheses are empty.")
        if (depth == 1) != (head == "assert" or raw):
            self.fail(at, f"{_shown(head)} does not belong here; " + (
                "a command such as assert or declare-const was expected." if depth == 1 else "commands do not nest."
            ))  # fmt: skip
        if head in _COMPARE:
            return self.compare(head, args, at)
        if head in ("and", "or"):
            return self.connect(head == "or", args, at)
        if head in _ARITHMETIC:
            return self.arithmetic(head, args, at)
        if head == "assert":
            if len(args) != 1 or not isinstance(args[0], (_Bound, Row, _Node)):
                self.fail(at, "assert takes one formula.")
            self.asserted.append(args[0])
        elif head in ("declare-const", "declare-fun"):
            self.declare(args, at, constant=head == "declare-const")
        elif head.startswith(("vnnlib-version", "declare-")):
            self.fail(at, f"{_shown(head)} belongs to VNN-LIB 2.0, whose files begin with (vnnlib-version <2.0>).")
        elif head not in _IGNORED:
            self.fail(at, f"{_shown(head)} is not part of VNN-LIB 1.0.")
        return None

    def declare(self, args: list[Any], at: int, *, constant: bool) -> None:
        if len(args) != (2 if constant else 3) or args[-1] != "Real" or (not constant and args[1] != ()):
            self.fail(at, "a declaration reads (declare-const X_0 Real).")
        match = _VARIABLE.fullmatch(args[0]) if isinstance(args[0], str) else None
        if match is None:
            self.fail(at, f"{_shown(str(args[0]))} is declared, but variables are called X_0, X_1 ... and Y_0, Y_1 ...")
        letter, i = match[1], int(match[2])
        if i in self.declared[letter]:
            self.fail(at, f"{args[0]} is declared twice.")
        self.declared[letter].add(i)
        self.known[args[0]] = i if letter == "X" else -1 - i

    def spend(self, steps: int, at: int) -> None:
        self.work += steps
        if self.work > WORK:
            self.fail(at, "this expression is too large to work out; write it as plain sums.")

    # -- arithmetic: an int is a variable, a Fraction a number, a dict a linear form that nobody else holds

    def linear(self, value: Any, at: int) -> Linear:
        if type(value) is int:
            return {value: _ONE}
        if type(value) is Fraction:
            return {None: value}
        if type(value) is not dict:
            self.fail(at, "a number or variable was expected, not a formula.")
        return value

    def scale(self, form: Linear, factor: Fraction, at: int) -> Linear:
        self.spend(len(form), at)
        return {key: self.sized(value * factor, at) for key, value in form.items()}

    def add(self, a: Linear, b: Linear, at: int) -> Linear:
        if len(a) < len(b):
            a, b = b, a
        self.spend(len(b), at)
        for key, value in b.items():
            a[key] = self.sized(a[key] + value, at) if key in a else value
        return a

    def sized(self, q: Fraction, at: int) -> Fraction:
        if q.numerator.bit_length() + q.denominator.bit_length() > BITS:
            self.fail(at, "the numbers in this expression grow beyond all bounds.")
        return q

    def arithmetic(self, head: str, args: list[Any], at: int) -> Fraction | Linear:
        if not args:
            self.fail(at, f"{head} has no operands.")
        if head == "-" and len(args) == 1:
            return -args[0] if type(args[0]) is Fraction else self.scale(self.linear(args[0], at), -_ONE, at)
        result = self.linear(args[0], at)
        for arg in args[1:]:
            form = self.linear(arg, at)
            if head == "+":
                result = self.add(result, form, at)
            elif head == "-":
                result = self.add(result, self.scale(form, -_ONE, at), at)
            else:
                if head == "*" and _constant(result):
                    result, form = form, result
                if not _constant(form):
                    self.fail(at, "only linear arithmetic is read: this multiplies or divides variables.")
                factor = form.get(None, Fraction(0))
                if head == "/" and factor == 0:
                    self.fail(at, "this divides by zero.")
                result = self.scale(result, 1 / factor if head == "/" else factor, at)
        return result.get(None, Fraction(0)) if _constant(result) else result

    # -- formulas

    def compare(self, head: str, args: list[Any], at: int) -> Formula:
        if len(args) != 2:
            if len(args) < 2:
                self.fail(at, f"{head} compares two sides.")
            if any(type(arg) is dict for arg in args):
                self.fail(at, f"{head} compares two sides; write a chain as an and of pairs.")
            return self.connect(False, [self.compare(head, list(pair), at) for pair in pairwise(args)], at)
        left, right = args
        if type(left) is int and type(right) is Fraction and head != "=":  # the common case
            upper, strict = head[0] == "<", len(head) == 1
            if left >= 0:
                return _Bound(left, upper, right, strict)
            return Row({-1 - left: _ONE if upper else -_ONE}, _NOTHING, -right if upper else right, strict)
        form = self.add(self.linear(left, at), self.scale(self.linear(right, at), -_ONE, at), at)
        if head == "=":
            other = self.scale(form, -_ONE, at)
            return self.connect(False, [self.row(form, False), self.row(other, False)], at)
        return self.row(form if head[0] == "<" else self.scale(form, -_ONE, at), len(head) == 1)

    def row(self, form: Linear, strict: bool) -> Formula:
        """form <= 0 as a truth value, a bound or a row."""
        b = form.get(None, Fraction(0))
        terms = {key: value for key, value in form.items() if key is not None and value != 0}
        if not terms:
            true = b < 0 or (b == 0 and not strict)
            return self.known["true" if true else "false"]
        if len(terms) == 1:
            ((i, a),) = terms.items()
            if i >= 0:
                return _Bound(i, a > 0, -b / a, strict)
        y = {-1 - key: value for key, value in terms.items() if key < 0}
        return Row(y, {key: value for key, value in terms.items() if key >= 0}, b, strict)

    def connect(self, any_: bool, parts: list[Any], at: int) -> Formula:
        bounds, clauses = True, 0 if any_ else 1
        for part in parts:
            if type(part) is _Node:
                bounds = bounds and part.bounds
                count = part.clauses
            elif type(part) is _Bound or type(part) is Row:
                bounds = bounds and type(part) is _Bound
                count = 1
            else:
                self.fail(at, f"{'or' if any_ else 'and'} joins formulas, not numbers or variables.")
            clauses = min(clauses + count if any_ else clauses * count, CLAUSES + 1)
        return parts[0] if len(parts) == 1 else _Node(any_, parts, bounds, clauses)


def _constant(form: Linear) -> bool:
    return not form or (len(form) == 1 and None in form)


def _shown(token: str) -> str:
    return repr(token if len(token) <= 40 else token[:40] + "...")


# -- from formulas to boxes and clauses


def _claim(reader: Reader, network: Network | Shapes, n: int, m: int) -> Claim:
    base: Limits = {}
    rows: list[Row] = []
    unions: list[Formula] = []
    others: list[Formula] = []
    empty = never = False
    todo = reader.asserted[::-1]
    while todo:
        part = todo.pop()
        if isinstance(part, _Bound):
            empty = not _tighten(base, part) or empty
        elif isinstance(part, Row):
            rows.append(part)
        elif not part.any:
            todo.extend(reversed(part.parts))
        elif not part.parts:
            never = True
        else:
            (unions if part.bounds else others).append(part)
    never = never or any(isinstance(part, _Node) and part.clauses == 0 for part in (*unions, *others))
    boxes: list[Limits] = [] if empty else [{}]
    groups: dict[tuple[Any, ...], tuple[Limits, list[list[Row]]]] = {}
    if not empty and not never:
        boxes = [limits for limits, _ in _multiply(reader, unions, base)]
        for limits, more in _multiply(reader, others, base):
            reader.work += len(rows)
            _check_work(reader)
            key = tuple(sorted((i, *(None if e is None else (*e[0].as_integer_ratio(), e[1]) for e in ends))
                               for i, ends in limits.items())) if limits else ()  # fmt: skip
            groups.setdefault(key, (limits, []))[1].append(rows + more)
        boxes = boxes if groups else []  # every alternative contradicts the bounds on inputs
    if not groups:
        groups[()] = ({}, [])
    clauses = [clause for _, mine in groups.values() for clause in mine]
    spans, cases, first = [], [], 0
    for limits, mine in groups.values():
        for box in boxes:
            both = _both(box, limits)
            if both is not None:
                cases.append(both)
                spans.append((first, first + len(mine)))
        first += len(mine)
    if len(cases) * n > BOUNDS:
        raise InvalidInput(f"{reader.name}: {len(cases)} boxes of {n} inputs are more than memory should hold.")
    region = _region(reader, base, cases, n)
    prop = Property.of(clauses, outputs=m, inputs=n)
    first_last = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)
    return Claim(network, region, prop, first_last, reader.assumptions, reader.name)


def _multiply(reader: Reader, formulas: list[Formula], base: Limits) -> Iterator[tuple[Limits, list[Row]]]:
    """The clauses of a conjunction one by one, each as limits on inputs beyond `base` and rows. Contradictory ones are
    left out. States share their tails: each is a linked list of what is chosen and of what is still to do."""
    total = 1
    for part in formulas:
        total *= part.clauses if isinstance(part, _Node) else 1
        if total > CLAUSES:
            raise InvalidInput(
                f"{reader.name}: its assertions multiply out to more than {CLAUSES} clauses; state fewer alternatives."
            )
    start: Any = None
    for part in reversed(formulas):
        start = (part, start)
    states: list[tuple[Any, Any]] = [(None, start)]
    while states:
        chosen, todo = states.pop()
        while todo is not None:
            part, todo = todo
            reader.work += 1
            if not isinstance(part, _Node):
                chosen = (part, chosen)
            elif part.any:
                states.extend((chosen, (choice, todo)) for choice in reversed(part.parts))
                reader.work += len(part.parts)
                break
            else:
                for piece in reversed(part.parts):
                    todo = (piece, todo)
                reader.work += len(part.parts)
        else:
            limits: Limits = {}
            rows: list[Row] = []
            possible = True
            while chosen is not None:
                part, chosen = chosen
                reader.work += 1
                if isinstance(part, Row):
                    rows.append(part)
                elif possible:
                    if part.i not in limits and part.i in base:
                        limits[part.i] = base[part.i]
                    possible = _tighten(limits, part)
            if possible:
                yield {i: ends for i, ends in limits.items() if base.get(i) != ends}, rows[::-1]
        _check_work(reader)


def _check_work(reader: Reader) -> None:
    if reader.work > 4 * WORK:
        raise InvalidInput(f"{reader.name}: its assertions multiply out to too many rows; state fewer alternatives.")


def _tighten(limits: Limits, bound: _Bound) -> bool:
    """Adds a bound; False if nothing is left between the ends."""
    low, high = limits.get(bound.i, (None, None))
    new = (bound.value, bound.strict)
    if bound.upper:
        if high is None or new[0] < high[0] or (new[0] == high[0] and new[1]):
            high = new
    elif low is None or new[0] > low[0] or (new[0] == low[0] and new[1]):
        low = new
    limits[bound.i] = (low, high)
    if low is None or high is None:
        return True
    return low[0] < high[0] or (low[0] == high[0] and not low[1] and not high[1])


def _both(a: Limits, b: Limits) -> Limits | None:
    """The conjunction of two sets of limits, None where it is empty."""
    if not a or not b:
        return a or b
    result = dict(a)
    for i, ends in b.items():
        for upper, end in enumerate(ends):
            if end is not None and not _tighten(result, _Bound(i, upper == 1, *end)):
                return None
    return result


def _region(reader: Reader, base: Limits, cases: list[Limits], n: int) -> Union:
    """The boxes in float64. Outer ends never lose a point; inner ends are the float64 numbers of the exact set."""

    def end(i: int, limit: Limit | None, side: int) -> tuple[float, float]:
        if limit is None:
            word = "above" if side else "below"
            raise InvalidInput(
                f"{reader.name}: input {reader.entry(i)} is not bounded from {word}; assert a bound on it."
            )
        value, strict = limit
        down, up = rounded(value)
        outer, inner = (up, down) if side else (down, up)
        if strict and down == up:
            inner = math.nextafter(inner, -math.inf if side else math.inf)
        if not math.isfinite(outer) or not math.isfinite(inner):
            raise InvalidInput(f"{reader.name}: a bound on input {reader.entry(i)} lies beyond the range of float64.")
        return outer, inner

    count = len(cases)
    if not count:
        return Union(torch.empty((0, n)), torch.empty((0, n)))
    varied = {i for case in cases for i in case}
    columns = [[0.0] * n for _ in range(4)]  # lower, upper, inner lower, inner upper
    for i in range(n):
        low, high = base.get(i, (None, None))
        if i in varied:
            continue
        (columns[0][i], columns[2][i]), (columns[1][i], columns[3][i]) = end(i, low, 0), end(i, high, 1)
    tables = [torch.tensor(column, dtype=torch.float64).repeat(count, 1) for column in columns]
    rows, places, values = [], [], ([], [], [], [])  # type: ignore[var-annotated]
    for k, case in enumerate(cases):
        for i in case if len(varied) == len(case) else varied:
            low, high = case[i] if i in case else base.get(i, (None, None))
            lower, upper = end(i, low, 0), end(i, high, 1)
            rows.append(k)
            places.append(i)
            for column, value in zip(values, (lower[0], upper[0], lower[1], upper[1]), strict=True):
                column.append(value)
    index = (torch.tensor(rows, dtype=torch.int64), torch.tensor(places, dtype=torch.int64))
    for table, column in zip(tables, values, strict=True):
        table.index_put_(index, torch.tensor(column, dtype=torch.float64))
    return Union(tables[0], tables[1], (tables[2], tables[3]))
