"""Patterns over keys, one form everywhere, held against the whole key.

`*` stays within a segment, `**` crosses segments; `{p}` is one segment or a piece of one, `{**rest}` one or more segments, and a result
can use both again, with arithmetic where digits were matched (`{i+1}`). `/…/` is a regular expression. Pure text, no key is looked up here.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from ckptsurgeon.errors import RuleError

_TOKEN = re.compile(r"\{\*\*(?P<many>[A-Za-z_]\w*)\}|\{(?P<one>[A-Za-z_]\w*)\}|(?P<deep>\*\*)|(?P<star>\*)|(?P<brace>[{}])")
_PART = re.compile(r"\{(?:\*\*)?([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z_]\w*")
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_SEGMENTS = r"[^.]+(?:\.[^.]+)*"


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern; `parts` are its named parts in order."""

    text: str
    regex: re.Pattern[str]
    parts: tuple[str, ...]

    def match(self, key: str) -> dict[str, str] | None:
        """What the named parts stand for when the whole of `key` matches, else None.

        >>> compile_pattern("blocks.{i}.{**rest}").match("blocks.3.attn.weight")
        {'i': '3', 'rest': 'attn.weight'}
        """
        found = self.regex.fullmatch(key)
        return None if found is None else {name: value or "" for name, value in found.groupdict().items()}


def compile_pattern(text: str) -> Pattern:
    """Compile a pattern. Raises RuleError, with the place, for one that is not well formed.

    >>> [bool(compile_pattern(p).match("layer1.0.conv1.weight")) for p in ("layer1.*", "layer1.**", "/layer1.*weight/")]
    [False, True, True]
    """
    if not text:
        raise RuleError("an empty pattern matches nothing", hint="write a key or a pattern such as 'fc.*'")
    body = text[1:-1] if len(text) > 1 and text[0] == text[-1] == "/" else _translate(text)
    try:
        regex = re.compile(body)
    except (re.error, RecursionError, OverflowError) as error:
        raise RuleError(f"the pattern {text!r} is not a regular expression: {error}") from error
    return Pattern(text, regex, tuple(regex.groupindex))


def _translate(text: str) -> str:
    out: list[str] = []
    seen: set[str] = set()
    position = 0
    for token in _TOKEN.finditer(text):
        out.append(re.escape(text[position : token.start()]))
        position = token.end()
        if token["brace"]:
            raise RuleError(f"the pattern {text!r} has an odd brace at {token.start() + 1}", hint="name a part like {p} or {**rest}")
        name = token["one"] or token["many"]
        if name and name in seen:
            out.append(f"(?P={name})")
        elif name:
            seen.add(name)
            out.append(f"(?P<{name}>{_SEGMENTS if token['many'] else '[^.]+'})")
        elif token["deep"]:
            out.append(_deep(text, token.start(), token.end()))
            if token.start() == 0 and text[position : position + 1] == ".":
                position += 1  # `_deep` took the dot
        else:
            out.append(r"[^.]*")
    out.append(re.escape(text[position:]))
    return "".join(out)


def _deep(text: str, start: int, stop: int) -> str:
    # `**.bias` also names a `bias` at the top, as `**/` does in a .gitignore.
    if start == 0 and text[stop : stop + 1] == ".":
        return r"(?:.+\.)?"
    return ".+" if text[start - 1 : start] == "." and stop == len(text) else ".*"


def expand(template: str, parts: dict[str, str]) -> str:
    """The result of a rename: `template` with its parts filled in from a match.

    >>> expand("h.{i+1}.{p}", {"i": "3", "p": "weight"})
    'h.4.weight'
    """
    return _PART.sub(lambda found: _fill(template, found[1], parts), template)


def check_template(template: str, pattern: Pattern) -> None:
    """Raises RuleError when `template` uses a part that `pattern` does not name, or a `*`."""
    rest = _PART.sub("", template)
    if any(mark in rest for mark in "*{}"):
        raise RuleError(
            f"the result {template!r} has a '*' or an odd brace",
            hint="name the part on both sides: --rename 'fc2.{p}' 'dense2.{p}'",
        )
    for found in _PART.finditer(template):
        for name in _names(template, found[1]):
            if name not in pattern.parts:
                known = ", ".join(pattern.parts) or "none"
                raise RuleError(f"the result {template!r} uses {{{name}}}, which {pattern.text!r} does not name (it names: {known})")


def _names(template: str, expression: str) -> list[str]:
    return [node.id for node in ast.walk(_parse(template, expression)) if isinstance(node, ast.Name)]


def _parse(template: str, expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RuleError(f"the result {template!r} has {{{expression}}}, which is neither a name nor arithmetic on one") from error


def _fill(template: str, expression: str, parts: dict[str, str]) -> str:
    if _NAME.fullmatch(expression):
        return parts[expression]
    return str(_number(template, expression, _parse(template, expression), parts))


def _number(template: str, expression: str, node: ast.expr, parts: dict[str, str]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        if not parts[node.id].isdecimal():
            raise RuleError(f"the result {template!r} counts with {{{expression}}}, but {node.id!r} matched {parts[node.id]!r}")
        return int(parts[node.id])
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        one, other = (_number(template, expression, side, parts) for side in (node.left, node.right))
        if isinstance(node.op, ast.FloorDiv | ast.Mod) and other == 0:
            raise RuleError(f"the result {template!r} divides by zero in {{{expression}}}")
        return _OPERATORS[type(node.op)](one, other)
    raise RuleError(f"the result {template!r} has {{{expression}}}: only + - * // % on numbers are known")
