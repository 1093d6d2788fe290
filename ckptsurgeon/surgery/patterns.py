"""Patterns over keys, one form everywhere, held against the whole key.

`*` stays within a segment, `**` crosses segments; `{p}` is one segment or a piece of one, `{**rest}` one or more segments, and a result
can use both again, with arithmetic where digits were matched (`{i+1}`). `/…/` is a regular expression, whose groups a result uses by name
or number (`{1}`). `{weight,bias}` is one of several words and `{0..3}` one of several numbers, as texts fold keys. Pure text, no key is
looked up here.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from ckptsurgeon.errors import RuleError
from ckptsurgeon.surgery import long_keys
from ckptsurgeon.surgery.long_keys import Piece

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_CHOICE = r"[A-Za-z0-9_]+(?:\.\.[0-9]+)?"
_TOKEN = re.compile(
    rf"(?P<choices>\{{{_CHOICE}(?:,{_CHOICE})+\}}|\{{[0-9]+\.\.[0-9]+\}})"
    rf"|\{{\*\*(?P<many>{_NAME})\}}|\{{(?P<one>{_NAME})\}}|(?P<deep>\*\*)|(?P<star>\*)|(?P<brace>[{{}}])"
)
_PART = re.compile(r"\{([^{}]*)\}")
_REFERENCE = re.compile(rf"(?:\*\*)?({_NAME}|[1-9][0-9]*)")
_ARITHMETIC = re.compile(r"[A-Za-z0-9_ +\-*/%()]{1,100}")
MOST_CHOICES = 10_000  # numbers of a range
MOST_DEEP, MOST_IN_SEGMENT = 4, 4  # open parts of a pattern
_DIGITS = 18  # of a number that a result counts with
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_REGEX = {"star": "[^.]*", "one": "[^.]+", "many": r"[^.]+(?:\.[^.]+)*", "deep": ".*", "some": ".+", "lead": r"(?:.+\.)?", "again": ""}
LONG = 64  # characters of a key, beyond which a regular expression is not let try every way to share them out


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern; `parts` are the names (and, of a regular expression, the numbers) that a result can use."""

    text: str
    regex: re.Pattern[str]
    parts: tuple[str, ...]
    pieces: tuple[Piece, ...] = ()  # of a pattern that could try many ways to share a key out; empty for a regular expression

    def fits(self, key: str) -> bool:
        """Whether the whole of `key` matches."""
        if not self.pieces or len(key) <= LONG:
            return self.regex.fullmatch(key) is not None
        return long_keys.fits(self.pieces, key) and (not self._again or self.regex.fullmatch(key) is not None)

    @property
    def _again(self) -> bool:
        return any(piece.kind == "again" for piece in self.pieces)

    def match(self, key: str) -> dict[str, str] | None:
        """What the parts stand for when the whole of `key` matches, else None.

        >>> compile_pattern("blocks.{i}.{**rest}").match("blocks.3.attn.weight")
        {'i': '3', 'rest': 'attn.weight'}
        """
        if self.pieces and len(key) > LONG and not self._again:
            return long_keys.parts(self.pieces, key)
        found = self.regex.fullmatch(key) if self.fits(key) else None
        return None if found is None else {part: found[int(part) if part.isdecimal() else part] or "" for part in self.parts}


def compile_pattern(text: str) -> Pattern:
    """Compile a pattern. Raises RuleError, with the place, for one that is not well formed.

    >>> [bool(compile_pattern(p).match("layer1.0.conv1.weight") is not None) for p in ("layer1.*", "layer1.**", "/layer1.*weight/")]
    [False, True, True]
    """
    if text in ("", "//"):
        raise RuleError("an empty pattern matches nothing", hint="write a key or a pattern such as 'fc.*'")
    expression = len(text) > 1 and text[0] == text[-1] == "/"
    pieces = () if expression else tuple(_pieces(text))
    body = text[1:-1] if expression else "".join(map(_regex, pieces))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            regex = re.compile(body, 0 if expression else re.DOTALL)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        raise RuleError(f"the pattern {text!r} is not a regular expression: {error}") from error
    numbers = map(str, range(1, regex.groups + 1)) if expression else ()
    several = sum(piece.kind in long_keys.OPEN for piece in pieces) > 1
    return Pattern(text, regex, (*regex.groupindex, *numbers), pieces if several else ())


def _regex(piece: Piece) -> str:
    """A piece as a regular expression."""
    body = "|".join(map(re.escape, piece.texts)) if piece.texts else _REGEX[piece.kind]
    if piece.kind == "again":
        return f"(?P={piece.name})"
    return f"(?P<{piece.name}>{body})" if piece.name else f"(?:{body})" if piece.kind == "words" else body


def _pieces(text: str) -> Iterator[Piece]:
    seen: set[str] = set()
    position = 0
    _check_few(text)
    for token in _TOKEN.finditer(text):
        if token.start() > position:
            yield Piece("text", (text[position : token.start()],))
        position = token.end()
        if token["brace"]:
            raise RuleError(f"the pattern {text!r} has an odd brace at {token.start() + 1}", hint="name a part like {p} or {**rest}")
        if token["choices"]:
            yield Piece("words", _choices(text, token["choices"][1:-1]))
            continue
        name = token["one"] or token["many"]
        if name:
            yield Piece("again" if name in seen else "many" if token["many"] else "one", (), name)
            seen.add(name)
        elif token["star"]:
            yield Piece("star")
        elif text[token.start() - 1 : token.start()] in ("", ".") and text[position : position + 1] == ".":
            yield Piece("lead")  # `**.bias` and `a.**.bias` also name no segment at all, as `**/` does in a .gitignore
            position += 1
        else:
            yield Piece("some" if text[token.start() - 1 : token.start()] == "." and position == len(text) else "deep")
    if position < len(text):
        yield Piece("text", (text[position:],))


def _choices(text: str, choices: str) -> tuple[str, ...]:
    """One of several words, or a number from one to another, as texts fold keys: `{weight,bias}`, `{0..3,7}`."""
    words: list[str] = []
    for choice in choices.split(","):
        first, dots, last = choice.partition("..")
        if dots and not (first.isdecimal() and int(first) <= int(last) < int(first) + MOST_CHOICES):
            raise RuleError(f"the pattern {text!r} has {choice!r}, which is no range", hint="write it as {0..11}")
        words += map(str, range(int(first), int(last) + 1)) if dots else [first]
    return tuple(words)


def _check_few(text: str) -> None:
    """Raises RuleError for a pattern with so many open parts that holding it against a long key could take for ever."""
    deep = [token for token in _TOKEN.finditer(text) if token["many"] or token["deep"]]
    most = max((sum(1 for token in _TOKEN.finditer(segment) if token["one"] or token["star"]) for segment in text.split(".")), default=0)
    if len(deep) > MOST_DEEP or most > MOST_IN_SEGMENT:
        raise RuleError(
            f"the pattern {text!r} has more than {MOST_DEEP} parts across segments, or {MOST_IN_SEGMENT} within one",
            hint="write it as several rules",
        )


def check_template(template: str, pattern: Pattern) -> None:
    """Raises RuleError when `template` is not well formed, or uses a part that `pattern` does not name."""
    if not template:
        raise RuleError("the result is empty", hint="to leave keys out: --drop PATTERN")
    rest = _PART.sub("", template)
    if any(mark in rest for mark in "*{}"):
        raise RuleError(
            f"the result {template!r} has a '*' or an odd brace",
            hint="name the part on both sides: --rename 'fc2.{p}' 'dense2.{p}'",
        )
    if re.search(r"\\[0-9g]", rest):
        raise RuleError(f"the result {template!r} has a backslash", hint="a regular expression's groups are {1}, {2} or {name}")
    for found in _PART.finditer(template):
        reference = _REFERENCE.fullmatch(found[1].strip())
        names = [reference[1]] if reference else re.findall(_NAME, found[1])
        if not names or (reference is None and not _ARITHMETIC.fullmatch(found[1])):
            raise RuleError(f"the result {template!r} has {found[0]}, which is neither a part nor arithmetic on one")
        for name in names:
            if name not in pattern.parts:
                known = ", ".join(pattern.parts) or "none"
                raise RuleError(f"the result {template!r} uses {{{name}}}, which {pattern.text!r} does not name (it names: {known})")
        if reference is None:
            _check_arithmetic(template, found[0], _parse(template, found[1]))


@lru_cache(maxsize=256)
def _parse(template: str, expression: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RuleError(f"the result {template!r} has {{{expression}}}, which is neither a part nor arithmetic on one") from error


def _check_arithmetic(template: str, part: str, tree: ast.expr) -> None:
    for node in ast.walk(tree):
        known = isinstance(node, ast.Name | ast.BinOp | ast.expr_context) or type(node) in _OPERATORS
        if not known and not (isinstance(node, ast.Constant) and type(node.value) is int):
            raise RuleError(f"the result {template!r} has {part}: only + - * // % on numbers are known")


def expand(template: str, parts: dict[str, str]) -> str:
    """The result of a rename: a checked `template` with its parts filled in from a match.

    Raises RuleError where it counts with what are no digits, divides by zero, or comes below zero.

    >>> expand("h.{i+1}.{p}", {"i": "3", "p": "weight"})
    'h.4.weight'
    """
    return _PART.sub(lambda found: _fill(template, found[1], parts), template)


def _fill(template: str, expression: str, parts: dict[str, str]) -> str:
    reference = _REFERENCE.fullmatch(expression.strip())
    if reference:
        return parts[reference[1]]
    number = _number(template, expression, _parse(template, expression), parts)
    if number < 0:
        raise RuleError(f"the result {template!r} comes to {number} in {{{expression}}}")
    return str(number)


def _number(template: str, expression: str, node: ast.expr, parts: dict[str, str]) -> int:
    if isinstance(node, ast.Constant):
        number = node.value
    elif isinstance(node, ast.Name):
        digits = parts[node.id]
        if not (digits.isascii() and digits.isdecimal() and len(digits) <= _DIGITS):
            raise RuleError(f"the result {template!r} counts with {{{expression}}}, but {node.id!r} matched {digits[:40]!r}")
        number = int(digits)
    else:
        assert isinstance(node, ast.BinOp)
        one, other = (_number(template, expression, side, parts) for side in (node.left, node.right))
        if isinstance(node.op, ast.FloorDiv | ast.Mod) and other == 0:
            raise RuleError(f"the result {template!r} divides by zero in {{{expression}}}")
        number = _OPERATORS[type(node.op)](one, other)
    assert isinstance(number, int)
    if abs(number) >= 10**_DIGITS:
        raise RuleError(f"the result {template!r} has a number of more than {_DIGITS} digits in {{{expression}}}")
    return number
