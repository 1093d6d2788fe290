"""Patterns over keys, one form everywhere, held against the whole key.

`*` stays within a segment, `**` crosses segments; `{p}` is one segment or a piece of one, `{**rest}` one or more segments, and a result
can use both again, with arithmetic where digits were matched (`{i+1}`). `/…/` is a regular expression, whose groups a result uses by name
or number (`{1}`). `{weight,bias}` is one of several words and `{0..3}` one of several numbers, as texts fold keys. Pure text, no key is
looked up here.

None can run for ever: what could share a long key out in many ways goes by `long_keys`, and every `/…/`, with what names a part twice,
by `regular_expressions`, in another process and for a bounded time.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ckptsurgeon.errors import RuleError
from ckptsurgeon.regular_expressions import MOST_GROUPS, Expression
from ckptsurgeon.rules import long_keys
from ckptsurgeon.rules.long_keys import Token

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_CHOICE = r"[A-Za-z0-9_]+(?:\.\.[0-9]+)?"
_TOKEN = re.compile(
    rf"(?P<choices>\{{{_CHOICE}(?:,{_CHOICE})+\}}|\{{[0-9]+\.\.[0-9]+\}})"
    rf"|\{{\*\*(?P<many>{_NAME})\}}|\{{(?P<one>{_NAME})\}}|(?P<deep>\*\*)|(?P<star>\*)|(?P<brace>[{{}}])"
)
_PART = re.compile(r"\{([^{}]*)\}")
_REFERENCE = re.compile(rf"(?:\*\*)?({_NAME}|[1-9][0-9]*)")
_ARITHMETIC = re.compile(r"[A-Za-z0-9_ +\-*/%()]{1,100}")
MOST_CHOICES = 10_000  # words and numbers of a pattern
MOST_DEEP, MOST_IN_SEGMENT = 4, 4  # open parts of a pattern
_DIGITS = 18  # of a number that a result counts with
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_DOT = Token("text", (".",))
_REGEX = {"star": "[^.]*", "one": "[^.]+", "many": r"[^.]+(?:\.[^.]+)*", "deep": ".*", "some": ".+", "lead": r"(?:.+\.)?", "again": ""}
_WITHIN = frozenset({"text", "words", "star", "one"})  # they stay in a segment
# Characters of a key, beyond which no regular expression is let try every way to share them out: by how many parts are free to take more
# or less; without any, there is no such length.
NO_LENGTH, LONG = 1 << 30, 64
_LENGTHS = (NO_LENGTH, LONG, 24, 12)


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern; `parts` are the names (and, of a regular expression, the numbers) that a result can use.

    `regex` is held against keys of up to `short` characters, `tokens` against longer ones, and `expression`, in another process, against
    all keys of a `/…/`, which has neither, and against long keys where a part stands twice. One without any of these is a key itself.
    """

    text: str
    parts: tuple[str, ...]
    tokens: tuple[Token, ...] = ()
    regex: re.Pattern[str] | None = None
    short: int = 0
    expression: Expression | None = field(default=None, compare=False)

    @property
    def test(self) -> Callable[[str], object]:
        """The fastest way to ask many keys whether they fit."""
        if self.regex is None and self.expression is None:
            return self.text.__eq__
        return self.regex.fullmatch if self.regex is not None and self.short == NO_LENGTH else self.fits

    def fits(self, key: str) -> bool:
        """Whether the whole of `key` matches."""
        if self.regex is not None and len(key) <= self.short:
            return self.regex.fullmatch(key) is not None
        if self.regex is None and self.expression is None:
            return key == self.text
        if self.tokens and not long_keys.fits(self.tokens, key):
            return False
        return self.expression is None or self.expression.fullmatch(key) is not None

    def match(self, key: str) -> dict[str, str] | None:
        """What the parts stand for when the whole of `key` matches, else None.

        >>> compile_pattern("blocks.{i}.{**rest}").match("blocks.3.attn.weight")
        {'i': '3', 'rest': 'attn.weight'}
        """
        if self.regex is not None and len(key) <= self.short:
            found = self.regex.fullmatch(key)
            return None if found is None else {part: found[part] for part in self.parts}
        if self.expression is None:
            return long_keys.parts(self.tokens, key) if self.tokens else {} if key == self.text else None
        groups = self.expression.fullmatch(key) if self.fits(key) else None
        numbers = self.expression.groupindex
        return None if groups is None else {part: groups[int(numbers.get(part, part)) - 1] or "" for part in self.parts}

    @property
    def choices(self) -> int:
        """How many words and numbers it has to choose from."""
        return sum(len(token.texts) for token in self.tokens if token.kind == "words")

    def learn(self, keys: Iterable[str]) -> None:
        """Say what will be held against it: a regular expression then takes all keys at once."""
        if self.expression is not None and not self.tokens:
            self.expression.learn(keys)


def compile_pattern(text: str, whose: str = "") -> Pattern:
    """Compile a pattern; `whose` are words for errors that say where it stands.

    Raises:
        RuleError: it is not well formed.
        LimitError: it is a regular expression that takes too long.

    >>> [bool(compile_pattern(p).match("layer1.0.conv1.weight") is not None) for p in ("layer1.*", "layer1.**", "/layer1.*weight/")]
    [False, True, True]
    """
    if text in ("", "//"):
        raise RuleError("an empty pattern matches nothing", hint="write a key or a pattern such as 'fc.*'")
    if len(text) > 1 and text[0] == text[-1] == "/":
        expression = Expression(text[1:-1], whose=whose)
        numbers = map(str, range(1, expression.groups + 1))
        return Pattern(text, (*expression.groupindex, *numbers), expression=expression)
    tokens = tuple(_tokens(text))
    if len(tokens) == 1 and tokens[0].kind == "text":
        return Pattern(text, ())
    regex = re.compile(_body(tokens), re.DOTALL)
    again = any(token.kind == "again" for token in tokens)
    short = _LENGTHS[min(_free(tokens), len(_LENGTHS) - 1)]
    return Pattern(text, tuple(regex.groupindex), tokens, regex, short, Expression(regex.pattern, regex.flags, whose) if again else None)


def _segments(tokens: Iterable[Token]) -> Iterator[list[Token]]:
    """The tokens between dots, each dot and each `lead` (which ends in one) by itself."""
    segment: list[Token] = []
    for token in tokens:
        whole = token.kind != "text"
        for part in (token,) if whole else (Token("text", (one,)) for one in re.split(r"(\.)", token.texts[0]) if one):
            if part.kind == "lead" or part == _DOT:
                yield segment
                yield [part]
                segment = []
            else:
                segment.append(part)
    yield segment


def _closed(segment: Sequence[Token]) -> bool:
    """Whether several parts of a segment share it out between them, and with no other."""
    return sum(token.kind in long_keys.OPEN for token in segment) > 1 and all(token.kind in _WITHIN for token in segment)


def _body(tokens: Sequence[Token]) -> str:
    """The tokens as a regular expression.

    However a segment is shared out, it ends at the same dot: where the rest doesn't match, no other way is tried (`(?>…)`).
    """
    if any(token.kind == "again" for token in tokens):
        return "".join(map(_regex, tokens))
    bodies = [("".join(map(_regex, segment)), _closed(segment)) for segment in _segments(tokens)]
    ends = [*(following for following, _ in bodies[1:]), r"\Z"]
    return "".join(f"(?>{body}(?={end}))" if closed else body for (body, closed), end in zip(bodies, ends, strict=True))


def _free(tokens: Sequence[Token]) -> int:
    """How many parts are free to take more or less while a key is tried: each multiplies the ways by the key's length."""
    segments = list(_segments(tokens))
    within = [max(sum(token.kind in long_keys.OPEN for token in segment) - 1, 0) for segment in segments]
    across = [token for token in tokens if token.kind in long_keys.OPEN and token.kind not in _WITHIN]
    together = sum if any(token.kind == "again" for token in tokens) else max
    texts = [text for token in tokens for text in token.texts]
    tried = bool(texts) and (len(texts) > LONG or max(map(len, texts)) > LONG)  # texts that may be tried at every place
    return together(within) + max(len(across) - 1, 0) + (tried and any(token.kind in long_keys.OPEN for token in tokens))


def _regex(token: Token) -> str:
    """A token as a regular expression."""
    body = "|".join(map(re.escape, token.texts)) if token.texts else _REGEX[token.kind]
    if token.kind == "again":
        return f"(?P={token.name})"
    return f"(?P<{token.name}>{body})" if token.name else f"(?:{body})" if token.kind == "words" else body


def _tokens(text: str) -> Iterator[Token]:
    seen: set[str] = set()
    position = choices = 0
    _check_few(text)
    for match in _TOKEN.finditer(text):
        if match.start() > position:
            yield Token("text", (text[position : match.start()],))
        position = match.end()
        if match["brace"]:
            raise RuleError(f"the pattern {text!r} has an odd brace at {match.start() + 1}", hint="name a part like {p} or {**rest}")
        if match["choices"]:
            chosen = _choices(text, match["choices"][1:-1], MOST_CHOICES - choices)
            choices += len(chosen)
            yield Token("words", chosen)
            continue
        name = match["one"] or match["many"]
        if name:
            yield Token("again" if name in seen else "many" if match["many"] else "one", (), name)
            seen.add(name)
        elif match["star"]:
            yield Token("star")
        elif text[match.start() - 1 : match.start()] in ("", ".") and text[position : position + 1] == ".":
            yield Token("lead")  # `**.bias` and `a.**.bias` also name no segment at all, as `**/` does in a .gitignore
            position += 1
        else:
            yield Token("some" if text[match.start() - 1 : match.start()] == "." and position == len(text) else "deep")
    if position < len(text):
        yield Token("text", (text[position:],))


def _choices(text: str, choices: str, most: int) -> tuple[str, ...]:
    """One of several words, or a number from one to another, as texts fold keys: `{weight,bias}`, `{0..3,7}`."""
    words: list[str] = []
    for choice in choices.split(","):
        first, dots, last = choice.partition("..")
        if dots and not (first.isdecimal() and len(last) < 19 and int(first) <= int(last)):
            raise RuleError(f"the pattern {text!r} has {choice!r}, which is no range", hint="write it as {0..11}")
        if len(words) + (int(last) - int(first) if dots else 0) >= most:
            raise RuleError(f"the pattern {text!r} has more than {MOST_CHOICES} choices", hint="name the part instead: {i}")
        words += map(str, range(int(first), int(last) + 1)) if dots else [first]
    return tuple(words)


def _check_few(text: str) -> None:
    """Raises RuleError for a pattern with so many open parts that holding it against a long key could take for ever."""
    opens = [token for token in _TOKEN.finditer(text) if token.lastgroup not in ("choices", "brace")]
    deep = [token for token in opens if token["many"] or token["deep"]]
    most = max((sum(1 for token in _TOKEN.finditer(segment) if token["one"] or token["star"]) for segment in text.split(".")), default=0)
    if len(deep) > MOST_DEEP or most > MOST_IN_SEGMENT:
        raise RuleError(
            f"the pattern {text!r} has more than {MOST_DEEP} parts across segments, or {MOST_IN_SEGMENT} within one",
            hint="write it as several rules",
        )
    if len(opens) > MOST_GROUPS:
        raise RuleError(f"the pattern has {len(opens)} parts; at most {MOST_GROUPS} are", hint="write {**rest} for many segments")


def check_template(template: str, pattern: Pattern) -> None:
    """Raises RuleError when `template` is not well formed, or uses a part that `pattern` does not name."""
    if not template:
        raise RuleError("the result is empty", hint="to leave keys out: drop=['aux.**']")
    rest = _PART.sub("", template)
    if any(mark in rest for mark in "*{}"):
        raise RuleError(
            f"the result {template!r} has a '*' or an odd brace",
            hint="name the part on both sides: rename={'fc2.{p}': 'dense2.{p}'}",
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
