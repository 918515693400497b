"""Reading VNN-LIB 2.0 by way of the package `vnnlib`: linear queries about one network's inputs and outputs.

The package checks syntax, scopes and types; its tree is then reduced to the formulas of version 1.0. It is written in
C++, and was seen to crash on deep nesting, to accept the index -1 and to read 1.5 as the index 1. What could reach
these is refused before it sees the text, and all numbers are taken from their digits, never through floats.

Reference: Antony et al., "The VNN-LIB Standard", version 2.0, 2025, chapter "Query Language".
"""

from __future__ import annotations

import json
import math
import re
from types import ModuleType
from typing import Any, NoReturn

from soundly.errors import InvalidInput
from soundly.graph.node import Shape
from soundly.spec.claim import Shapes
from soundly.spec.vnnlib import Formula, Reader

DEPTH = 200
"""The deepest nesting. The package's parser recurses and has no limit of its own."""
TEXT = 2**24
"""The most characters of a file."""

_TOKEN = re.compile(r';[^\n]*|"[^"\n]*"|\[[^\]]*\]?|[()]|[^\s();"\[]+|"')
_INDICES = re.compile(r"\[\s*(?:[0-9]{1,9}\s*(?:,\s*[0-9]{1,9}\s*)*)?\]")
_NAME = re.compile(r'"[^"();\\\n]+"')
_REAL = re.compile(r"(\(declare-(?:input|output)\s+[A-Za-z]\w*\s+)Real\b", re.ASCII)
_HEADS = {"LessThan": "<", "LessEqual": "<=", "GreaterThan": ">", "GreaterEqual": ">=", "Equal": "="}
_OPERATORS = {"Negate": "-", "Minus": "-", "Plus": "+", "Multiply": "*"}


class Reader2(Reader):
    """Turns a file of version 2.0 into the formulas of version 1.0. Positions are line numbers; tensors are matched
    with the network's by their order."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text, name)
        self.inputs: list[tuple[str, Shape]] = []
        self.outputs: list[tuple[str, Shape]] = []
        self.first: dict[str, tuple[int, bool]] = {}  # tensor: its first position, and whether it is an input

    def fail(self, offset: int, problem: str) -> NoReturn:
        raise InvalidInput(f"{self.name}, line {offset}: {problem}")

    def parse(self) -> None:
        module = _module(self.name)
        self._guard()
        # Version 1.0.2 refuses constants before variables of the type Real, and nowhere else are the types told apart.
        text, real = _REAL.subn(r"\1float64", self.text)
        try:
            query = module.parse_query_string(text)
        except Exception as error:  # errors of C++'s library arrive as IndexError, RuntimeError and others
            self._refuse(error)
        if len(query.networks) != 1:
            raise InvalidInput(
                f"{self.name} is about {len(query.networks)} networks; only queries about one network are read."
            )
        network = query.networks[0]
        if network.hidden:
            raise InvalidInput(
                f"{self.name} declares the hidden value {network.hidden[0].name}; only inputs and outputs are read."
            )
        for tensor in (*network.inputs, *network.outputs):
            if tensor.dtype.name not in ("F32", "F64"):
                raise InvalidInput(
                    f"{self.name} declares {tensor.name} with the element type {tensor.dtype.name}; Real, float32 and "
                    "float64 are read."
                )
        if real < len(network.inputs) + len(network.outputs):
            self.assumptions = ("the query's floating-point types stand for real numbers, as in VNN-LIB 1.0",)
        for declared, side in ((network.inputs, self.inputs), (network.outputs, self.outputs)):
            if len(declared) > 1 and any(tensor.onnx_name for tensor in declared):
                raise InvalidInput(f"{self.name} gives tensors ONNX names; declare them in order and without names.")
            start = 0
            for tensor in declared:
                side.append((tensor.name, tuple(tensor.shape)))
                self.first[tensor.name] = start, side is self.inputs
                start += math.prod(tensor.shape)
        self.asserted = [self._formula(assertion.expr) for assertion in query.assertions]

    def entry(self, i: int) -> str:
        for name, shape in self.inputs:
            if i < math.prod(shape):
                place = [i // math.prod(shape[k + 1 :]) % shape[k] for k in range(len(shape))]
                return f"{name}{place}" if place else name
            i -= math.prod(shape)
        raise AssertionError(i)

    def fit(self, shapes: Shapes) -> None:
        sides = ("inputs", self.inputs, shapes.inputs), ("outputs", self.outputs, shapes.outputs)
        for kind, declared, wanted in sides:
            found = [shape for _, shape in declared]
            if found != list(wanted):
                raise InvalidInput(
                    f"{self.name} declares {kind} of the shapes {found}, but those of the network are {list(wanted)}: "
                    "it was written for another network."
                )

    # -- before and beside the package

    def _guard(self) -> None:
        """Raises where the text could crash the package or be misread by it."""
        if len(self.text) > TEXT:
            raise InvalidInput(f"{self.name} has {len(self.text)} characters; of VNN-LIB 2.0 at most {TEXT} are read.")
        if (zero := self.text.find("\0")) >= 0:
            self._at(zero, "a byte is zero: this is no text.")
        depth = 0
        version = None
        for match in _TOKEN.finditer(self.text):
            token = match.group()
            depth += (token == "(") - (token == ")")
            if version is None and token[0] == "<":
                version = token
            if token[0] == '"' and not _NAME.fullmatch(token):
                self._at(match.start(), "names in quotes hold no quotes, parentheses, semicolons or backslashes here.")
            if depth > DEPTH:
                self._at(match.start(), f"parentheses are nested more than {DEPTH} deep.")
            if token[0] == "[" and not _INDICES.fullmatch(token):
                self._at(match.start(), "square brackets hold whole numbers of up to 9 digits, separated by commas.")
        if version != "<2.0>":
            raise InvalidInput(f"{self.name} is of the VNN-LIB version {str(version)[:20]}; 1.0 and <2.0> are read.")

    def _at(self, offset: int, problem: str) -> NoReturn:
        self.fail(1 + self.text.count("\n", 0, offset), problem)

    def _refuse(self, error: Exception) -> NoReturn:
        """The package's error in one line."""
        text = str(error).strip()
        try:
            first = json.loads(text)["errors"][0]
            text = f"line {first['line']}: {first['message']}: {first['offendingSymbol']}. {first['hint']}"
        except (ValueError, LookupError, TypeError):  # syntax errors come as plain text, others as C++ puts them
            text = f"{text[:200]}."
        raise InvalidInput(f"{self.name} is no VNN-LIB 2.0, says the package vnnlib: {text}") from error

    # -- from the package's tree to formulas

    def _formula(self, node: Any) -> Formula:
        kind, at = type(node).__name__, _line(node)
        if kind in ("And", "Or"):
            return self.connect(kind == "Or", [self._formula(part) for part in node.args], at)
        if kind == "NotEqual":
            return self.connect(True, [self.compare(head, self._sides(node), at) for head in "<>"], at)
        if kind not in _HEADS:
            self.fail(at, f"{kind} is not read.")
        return self.compare(_HEADS[kind], self._sides(node), at)

    def _sides(self, node: Any) -> list[Any]:
        return [self._number(node.lhs), self._number(node.rhs)]

    def _number(self, node: Any) -> Any:
        """As `Reader` keeps them: an int is a variable, a Fraction a number, a dict a linear form."""
        kind, at = type(node).__name__, _line(node)
        if kind == "Var":
            first, is_input = self.first[node.name]
            position = 0
            for i, size in zip(node.indices, node.shape, strict=True):
                position = position * size + i
            return first + position if is_input else -1 - first - position
        if kind in _OPERATORS:
            return self.arithmetic(_OPERATORS[kind], [self._number(part) for part in node.children()], at)
        if not hasattr(node, "lexeme"):
            self.fail(at, f"{kind} is not read.")
        return self.known.get(node.lexeme) or self.symbol(node.lexeme, at)


def _line(node: Any) -> int:
    """The line of the first variable or number in an expression."""
    while not hasattr(node, "line"):
        node = node.children()[0]
    line: int = node.line
    return line


def _module(name: str) -> ModuleType:
    try:
        import vnnlib
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"{name} is VNN-LIB 2.0, which takes the package vnnlib to read: pip install 'soundly[vnnlib]'."
        ) from error
    if not hasattr(vnnlib, "parse_query_string"):
        raise InvalidInput(f"{name} is VNN-LIB 2.0, but the package vnnlib is too old; version 1.0.2 can read it.")
    module: ModuleType = vnnlib
    return module
