"""Results of renames: a template with the parts of a pattern in braces, and arithmetic on those that matched digits. Pure text.

Braces hold a part, or arithmetic with parts. A brace, star or backslash of the name itself is written after a backslash, as in a pattern.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable
from functools import lru_cache

from ckptsurgeon.errors import RuleError
from ckptsurgeon.rules.patterns import NAME, Pattern, check_escape

_PART = re.compile(r"\\.|\{([^{}]*)\}", re.DOTALL)
_ESCAPE = re.compile(r"\\(.?)", re.DOTALL)
_REFERENCE = re.compile(rf"(?:\*\*)?({NAME}|[1-9][0-9]*)")
_ARITHMETIC = re.compile(r"[A-Za-z0-9_ +\-*/%()]{1,100}")
_DIGITS = 18  # at most, of a number in the arithmetic of a result
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def check_template(template: str, pattern: Pattern) -> None:
    """Raises RuleError when `template` is not well formed, or uses a part that `pattern` does not name."""
    if not template:
        raise RuleError("the result is empty", hint="to leave keys out: drop=['aux.**']")
    for escape in _ESCAPE.finditer(template):
        check_escape("result", template, escape[1])
    rest = _PART.sub("", template)
    if any(mark in rest for mark in "*{}"):
        raise RuleError(
            f"the result {template!r} has a '*' or an odd brace",
            hint="name the part on both sides: rename={'fc2.{p}': 'dense2.{p}'}; write a star of the name itself as \\*",
        )
    for braced in _PART.finditer(template):
        if braced[1] is None:
            continue
        reference = _REFERENCE.fullmatch(braced[1].strip())
        names = [reference[1]] if reference else re.findall(NAME, braced[1])
        if not names or (reference is None and not _ARITHMETIC.fullmatch(braced[1])):
            raise RuleError(f"the result {template!r} has {braced[0]}, which is neither a part nor arithmetic on one")
        for name in names:
            if name not in pattern.parts:
                known = ", ".join(pattern.parts) or "none"
                raise RuleError(f"the result {template!r} uses {{{name}}}, which {pattern.text!r} does not name (it names: {known})")
        if reference is None:
            _check_arithmetic(template, braced[0], _parse(template, braced[1]))


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

    Raises RuleError where arithmetic uses text, divides by zero, or gives a negative number.

    >>> expand("h.{i+1}.{p}", {"i": "3", "p": "weight"})
    'h.4.weight'
    """
    return _PART.sub(lambda match: match[0][1:] if match[1] is None else _fill(template, match[1], parts), template)


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
        left, right = (_number(template, expression, side, parts) for side in (node.left, node.right))
        if isinstance(node.op, ast.FloorDiv | ast.Mod) and right == 0:
            raise RuleError(f"the result {template!r} divides by zero in {{{expression}}}")
        number = _OPERATORS[type(node.op)](left, right)
    assert isinstance(number, int)
    if abs(number) >= 10**_DIGITS:
        raise RuleError(f"the result {template!r} has a number of more than {_DIGITS} digits in {{{expression}}}")
    return number
