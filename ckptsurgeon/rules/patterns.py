"""Patterns over keys, in one form everywhere. A pattern must match the whole key.

`*` stays within a segment, `**` crosses segments; `{p}` is one segment or a piece of one, `{**rest}` one or more segments, and a result
can use both, with arithmetic where digits were matched (`{i+1}`). `/…/` is a regular expression, whose groups a result uses by name
or number (`{1}`). `{weight,bias}` is one of several words, `{0..3}`, `{0..90..3}` and `{0,4,9}` one of several numbers, as texts fold keys,
and `{i=0..90..3}` a part that is one of them. A character after a backslash is taken literally: `\\{`. Pure text, no key is looked up here.

No pattern can run for ever. A pattern that could divide a long key among its parts in many ways is matched by `long_keys`; every `/…/`, and
a pattern that names a part twice, is matched by `regular_expressions`, in another process and for a bounded time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ckptsurgeon.errors import RuleError
from ckptsurgeon.regular_expressions import MOST_GROUPS, Expression
from ckptsurgeon.rules import long_keys
from ckptsurgeon.rules.long_keys import Token

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_CHOICE = r"[A-Za-z0-9_]+(?:\.\.[0-9]+){0,2}"
_TOKEN = re.compile(
    rf"\\(?P<escaped>.?)|(?P<choices>\{{{NAME}={_CHOICE}(?:,{_CHOICE})*\}}|\{{{_CHOICE}(?:,{_CHOICE})+\}}|\{{[0-9]+(?:\.\.[0-9]+){{1,2}}\}})"
    rf"|\{{\*\*(?P<segments>{NAME})\}}|\{{(?P<segment>{NAME})\}}|(?P<anything>\*\*)|(?P<star>\*)|(?P<brace>[{{}}])",
    re.DOTALL,
)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_MARKS = re.compile(r"[\\*{}+]|-(?=>)")  # characters with a meaning in a pattern or between two patterns, at any position
_ORDINARY = re.compile(r"[A-Za-z0-9_.]+")
_SOURCE = re.compile(r"[0-9]{1,4}(?=:.)", re.DOTALL)  # `0:` before a pattern names its only source
MOST_CHOICES = 10_000  # words and numbers in the choices of a pattern
MOST_DEEP, MOST_IN_SEGMENT = 4, 4  # open parts of a pattern
_DOT = Token("text", (".",))
_REGEX = {
    "star": "[^.]*",
    "segment": "[^.]+",
    "segments": r"[^.]+(?:\.[^.]+)*",
    "anything": ".*",
    "nonempty": ".+",
    "leading": r"(?:.+\.)?",
    "repeated": "",
}
_WITHIN = frozenset({"text", "words", "star", "segment"})  # tokens that stay within a segment
# The longest key for which a regular expression may try every division among the parts, by the number of free parts (`_free`); without free
# parts any length will do.
NO_LENGTH, LONG = 1 << 30, 64
_LENGTHS = (NO_LENGTH, LONG, 24, 12)


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern; `parts` are the names (and, of a regular expression, the numbers) that a result can use.

    `regex` matches keys of up to `short` characters and `tokens` longer keys. `expression`, in another process, matches all keys of a
    `/…/`, which has neither, and long keys where a part occurs twice. A pattern without any of these matches only `key`.
    """

    text: str
    parts: tuple[str, ...]
    tokens: tuple[Token, ...] = ()
    regex: re.Pattern[str] | None = None
    short: int = 0
    expression: Expression | None = field(default=None, compare=False)
    key: str = ""

    @property
    def test(self) -> Callable[[str], object]:
        """The fastest function that says whether a key matches, for many keys."""
        if self.regex is None and self.expression is None:
            return self.key.__eq__
        return self.regex.fullmatch if self.regex is not None and self.short == NO_LENGTH else self.fits

    @property
    def heads(self) -> tuple[str, ...]:
        """Texts such that every key that matches begins with one of them."""
        if not self.tokens:
            return (self.key,)
        first = self.tokens[0].texts
        second = self.tokens[1].texts if len(first) == 1 and len(self.tokens) > 1 else ()
        return tuple(dict.fromkeys(first[0] + text for text in second)) or tuple(dict.fromkeys(first)) or ("",)

    def fits(self, key: str) -> bool:
        """Whether the whole of `key` matches."""
        if self.regex is not None and len(key) <= self.short:
            return self.regex.fullmatch(key) is not None
        if self.regex is None and self.expression is None:
            return key == self.key
        if self.tokens and not long_keys.fits(self.tokens, key):
            return False
        return self.expression is None or self.expression.fullmatch(key) is not None

    def match(self, key: str) -> dict[str, str] | None:
        """The text of each part when the whole of `key` matches, else None.

        >>> compile_pattern("blocks.{i}.{**rest}").match("blocks.3.attn.weight")
        {'i': '3', 'rest': 'attn.weight'}
        """
        if self.tokens and not long_keys.ends_fit(self.tokens, key):
            return None
        if self.regex is not None and len(key) <= self.short:
            match = self.regex.fullmatch(key)
            return None if match is None else {part: match[part] for part in self.parts}
        if self.expression is None:
            return long_keys.parts(self.tokens, key) if self.tokens else {} if key == self.key else None
        groups = self.expression.fullmatch(key) if self.fits(key) else None
        numbers = self.expression.groupindex
        return None if groups is None else {part: groups[int(numbers.get(part, part)) - 1] or "" for part in self.parts}

    @property
    def choices(self) -> int:
        """How many words and numbers its choices have."""
        return sum(len(token.texts) for token in self.tokens if token.kind == "words")

    def learn(self, keys: Iterable[str]) -> None:
        """Announce the keys that will be matched: a regular expression then takes all of them at once."""
        if self.expression is not None and not self.tokens:
            self.expression.learn(keys)


def compile_pattern(text: str, whose: str = "") -> Pattern:
    """Compile a pattern; errors say with `whose` where it is written.

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
        return Pattern(text, (), key=tokens[0].texts[0])
    regex = re.compile(_body(tokens), re.DOTALL)
    repeats = any(token.kind == "repeated" for token in tokens)
    short = _LENGTHS[min(_free(tokens), len(_LENGTHS) - 1)]
    return Pattern(text, tuple(regex.groupindex), tokens, regex, short, Expression(regex.pattern, regex.flags, whose) if repeats else None)


def _segments(tokens: Iterable[Token]) -> Iterator[list[Token]]:
    """The tokens between dots, each dot and each `leading` (which ends in one) by itself."""
    segment: list[Token] = []
    for token in tokens:
        whole = token.kind != "text"
        for part in (token,) if whole else (Token("text", (text,)) for text in re.split(r"(\.)", token.texts[0]) if text):
            if part.kind == "leading" or part == _DOT:
                yield segment
                yield [part]
                segment = []
            else:
                segment.append(part)
    yield segment


def _closed(segment: Sequence[Token]) -> bool:
    """Whether a segment has several open parts, none of which reaches beyond it."""
    return sum(token.kind in long_keys.OPEN for token in segment) > 1 and all(token.kind in _WITHIN for token in segment)


def _body(tokens: Sequence[Token]) -> str:
    """The tokens as a regular expression.

    However its parts divide a segment, it ends at the same dot: where the rest doesn't match, no other division is tried (`(?>…)`).
    """
    if any(token.kind == "repeated" for token in tokens):
        return "".join(map(_regex, tokens))
    bodies = [("".join(map(_regex, segment)), _closed(segment)) for segment in _segments(tokens)]
    ends = [*(following for following, _ in bodies[1:]), r"\Z"]
    return "".join(f"(?>{body}(?={end}))" if closed else body for (body, closed), end in zip(bodies, ends, strict=True))


def _free(tokens: Sequence[Token]) -> int:
    """How many parts can be longer or shorter independently: each multiplies the possible divisions of a key by its length."""
    segments = list(_segments(tokens))
    within = [max(sum(token.kind in long_keys.OPEN for token in segment) - 1, 0) for segment in segments]
    across = [token for token in tokens if token.kind in long_keys.OPEN and token.kind not in _WITHIN]
    together = sum if any(token.kind == "repeated" for token in tokens) else max
    texts = [text for token in tokens for text in token.texts]
    searched = bool(texts) and (len(texts) > LONG or max(map(len, texts)) > LONG)  # texts that may be tried at every position
    return together(within) + max(len(across) - 1, 0) + (searched and any(token.kind in long_keys.OPEN for token in tokens))


def _regex(token: Token) -> str:
    """A token as a regular expression."""
    body = "|".join(map(re.escape, token.texts)) if token.texts else _REGEX[token.kind]
    if token.kind == "repeated":
        return f"(?P={token.name})"
    return f"(?P<{token.name}>{body})" if token.name else f"(?:{body})" if token.kind == "words" else body


def _tokens(text: str) -> Iterator[Token]:
    """The tokens of a pattern; neighbouring texts are joined."""
    plain = ""
    for token in _parsed(text):
        if token.kind == "text":
            plain += token.texts[0]
            continue
        if plain:
            yield Token("text", (plain,))
            plain = ""
        yield token
    if plain:
        yield Token("text", (plain,))


def _parsed(text: str) -> Iterator[Token]:
    seen: set[str] = set()
    position = choices = 0
    _check_few(text)
    for match in _TOKEN.finditer(text):
        if match.start() > position:
            yield Token("text", (text[position : match.start()],))
        position = match.end()
        name = match["segment"] or match["segments"]
        if match["brace"]:
            raise RuleError(
                f"the pattern {text!r} has an odd brace at {match.start() + 1}",
                hint="name a part like {p} or {**rest}; a brace of the key itself has a backslash before it: \\{",
            )
        if match["escaped"] is not None:
            check_escape("pattern", text, match["escaped"])
            yield Token("text", (match["escaped"],))
        elif match["choices"]:
            name, _, words = match["choices"][1:-1].rpartition("=")
            if name in seen:
                raise RuleError(f"the pattern {text!r} chooses {{{name}}} twice", hint=f"write {{{name}}} where it is repeated")
            seen |= {name} if name else set()
            chosen = choices_of(text, words, MOST_CHOICES - choices)
            choices += len(chosen)
            yield Token("words", chosen, name)
        elif name:
            yield Token("repeated" if name in seen else "segments" if match["segments"] else "segment", (), name)
            seen.add(name)
        elif match["star"]:
            yield Token("star")
        elif text[match.start() - 1 : match.start()] in ("", ".") and text[position : position + 1] == ".":
            yield Token("leading")  # `**.bias` and `a.**.bias` also name no segment at all, as `**/` does in a .gitignore
            position += 1
        else:
            yield Token("nonempty" if text[match.start() - 1 : match.start()] == "." and position == len(text) else "anything")
    if position < len(text):
        yield Token("text", (text[position:],))


def choices_of(text: str, choices: str, most: int = MOST_CHOICES) -> tuple[str, ...]:
    """The words and numbers of a choice, which may be ranges with a step: `weight,bias`, `0..3,7`, `0..90..3`. `text` is its pattern."""
    words: list[str] = []
    for choice in choices.split(","):
        first, *ends = choice.split("..")
        start, stop, step = (*map(_number, (first, *ends)), *(1,) * (2 - len(ends))) if ends else (0, 0, 1)
        if start < 0 or stop < start or step < 1:
            raise RuleError(f"the pattern {text!r} has {choice!r}, which is no range", hint="write it as {0..11}, by a step as {0..90..3}")
        numbers = range(start, stop + 1, step)
        if len(words) + len(numbers) > most:
            raise RuleError(f"the pattern {text!r} has more than {MOST_CHOICES} choices", hint="name the part instead: {i}")
        words += map(str, numbers) if ends else [first]
    return tuple(words)


def _number(digits: str) -> int:
    return int(digits) if digits.isdecimal() and len(digits) < 19 else -1


def listed(numbers: Sequence[int]) -> str:
    """Sorted, distinct numbers as a choice: one range where they have one step, else each run of three or more as a range.

    >>> listed([0, 3, 6, 9]), listed([0, 1, 2, 5, 7, 8]), listed([4, 9])
    ('0..9..3', '0..2,5,7,8', '4,9')
    """
    first, last, step = numbers[0], numbers[-1], numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if list(numbers) == list(range(first, last + 1, step)) and len(numbers) > (1 if step == 1 else 2):
        return f"{first}..{last}" if step == 1 else f"{first}..{last}..{step}"
    starts = [index for index, number in enumerate(numbers) if not index or number != numbers[index - 1] + 1]
    runs = [numbers[start:stop] for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True)]
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def check_escape(what: str, text: str, escaped: str) -> None:
    """RuleError for a backslash of a pattern or result before a letter or digit, or at its end."""
    if not escaped:
        raise RuleError(f"the {what} {text!r} ends in a backslash", hint="a backslash of the key itself is written as two: \\\\")
    if escaped.isalnum():
        form = "a regular expression stands between slashes: /fc[12]\\..*/" if what == "pattern" else "its groups are {1}, {2} or {name}"
        raise RuleError(f"the {what} {text!r} has a backslash before {escaped!r}", hint=form)


def literal(key: str) -> str:
    """The pattern that matches only this key; as a result it gives this key.

    >>> literal("layers.0.weight"), literal("a*{b}"), literal("7:x ")
    ('layers.0.weight', 'a\\\\*\\\\{b\\\\}', '7\\\\:x\\\\ ')
    """
    return key if _ORDINARY.fullmatch(key) else written((key,), ())


def written(texts: Sequence[str], parts: Sequence[str]) -> str:
    """The pattern of literal texts, which are escaped, with parts between them.

    >>> written(("h.", ".a{b}"), ("{0..3}",))
    'h.{0..3}.a\\\\{b\\\\}'
    """
    marked = [_MARKS.sub(r"\\\g<0>", text) for text in texts]
    whole = "".join(text + part for text, part in zip(marked, (*parts, ""), strict=True))
    if not whole:
        return whole
    if whole[0] == whole[-1] == "/" and len(whole) > 1:
        whole = f"\\{whole}"  # it would be a regular expression
    if whole[0].isspace() or whole[-1].isspace():
        inner = whole.strip()
        start = whole.index(inner)
        whole = "".join((*(f"\\{blank}" for blank in whole[:start]), inner, *(f"\\{blank}" for blank in whole[start + len(inner) :])))
    return _SOURCE.sub(r"\g<0>\\", whole, count=1) if _SOURCE.match(whole) else whole


def without_escapes(text: str) -> str:
    """A pattern or result without its escaped characters and their backslashes."""
    return _ESCAPED.sub("", text) if "\\" in text else text


def unescaped(text: str) -> str:
    """The key that a literal pattern matches.

    >>> unescaped(literal("a*{b}"))
    'a*{b}'
    """
    return _ESCAPED.sub(r"\1", text) if "\\" in text else text


def _check_few(text: str) -> None:
    """RuleError for a pattern with so many open parts that matching a long key could take for ever."""
    opens = [token for token in _TOKEN.finditer(text) if token.lastgroup not in ("choices", "brace", "escaped")]
    deep = [token for token in opens if token["segments"] or token["anything"]]
    most = max(
        (sum(1 for token in _TOKEN.finditer(segment) if token["segment"] or token["star"]) for segment in text.split(".")), default=0
    )
    if len(deep) > MOST_DEEP or most > MOST_IN_SEGMENT:
        raise RuleError(
            f"the pattern {text!r} has more than {MOST_DEEP} parts across segments, or {MOST_IN_SEGMENT} within one",
            hint="write it as several rules",
        )
    if len(opens) > MOST_GROUPS:
        raise RuleError(f"the pattern has {len(opens)} parts; at most {MOST_GROUPS} are", hint="write {**rest} for many segments")
