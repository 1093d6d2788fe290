"""Guesses the pattern that was meant by one that matches nothing: with `**` for `*`, a module's keys for its name, or the slashes of a
regular expression.

The guess is the first pattern of the table that matches a name. Pure text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.hints import close_hint, close_words
from ckptsurgeon.rules.patterns import compile_pattern

_MOST_NAMES = 20_000  # that a guess is tried on
_STAR = re.compile(r"(?<![^.])\*(?![^.])")  # a segment of its own
_PIECE = re.compile(r"(?<![*\\])\*(?=\.|$)(?<!\.\*)(?!^\*)")  # the end of a segment
_PART = re.compile(r"(?<!\\)\{((?![ijklns]\})[A-Za-z_]\w*)\}")  # a part with one of the names excepted is usually a number
_REGEX = re.compile(r"\\[.dw]|\.\+|^\.\*|^\^|\$$|[|()]|\[[^]]+\]")


def _replace_each(pattern: re.Pattern[str], new: str) -> Callable[[str], Iterable[str]]:
    """A function from a text to its variants with one match of `pattern` replaced, the last match first."""
    return lambda text: [
        text[: match.start()] + match.expand(new) + text[match.end() :] for match in reversed(list(pattern.finditer(text)))
    ]


def _regex(text: str) -> Iterable[str]:
    bare = text.removeprefix("^").removesuffix("$")
    return [f"/{bare}/", f"/{bare}.*/", f"/.*{bare}.*/"] if _REGEX.search(text) and "/" not in text else []


_TABLE: tuple[Callable[[str], Iterable[str]], ...] = (
    _regex,
    _replace_each(_STAR, "**"),
    _replace_each(_PIECE, "*.**"),
    _replace_each(_PART, r"{**\1}"),
    lambda text: [f"{text.rstrip('.')}.**"],
    lambda text: [text.replace("/", ".")] if "/" in text.strip("/") and text[:1] != "/" else [],
    lambda text: [f"**.{text}"],
)


def _changed(texts: Iterable[str]) -> list[str]:
    return [variant for text in texts for change in _TABLE for variant in change(text)]


def meant(text: str, names: Iterable[str]) -> str | None:
    """The pattern that a user probably meant by one that matches none of the names; None where no guess matches either.

    >>> keys = ["encoder.0.attn.weight", "encoder.0.attn.bias", "head.weight"]
    >>> [meant(text, keys) for text in ("encoder.*", "encoder.{p}", "encoder", "attn.*", r"encoder\\..*", "no.such")]
    ['encoder.**', 'encoder.{**p}', 'encoder.**', '**.attn.*', '/encoder\\\\..*/', None]
    """
    if text.startswith("/"):
        return None
    known = [name for _, name in zip(range(_MOST_NAMES), names, strict=False)]
    once = _changed([text])
    for candidate in dict.fromkeys([*once, *_changed(once)]):
        try:
            pattern = compile_pattern(candidate)
            pattern.learn(known)
            if any(map(pattern.test, known)):
                return candidate
        except CheckpointError:  # not a pattern, or one that takes too long
            continue
    return None


def meant_words(text: str, names: Iterable[str]) -> str:
    """The guess, or else close names, as words that end a sentence; `""` without either.

    >>> meant_words("fc.*", ["fc.0.weight"]), meant_words("fc4.*", ["fc1.weight"])
    ("; is it 'fc.**'?", ' (close: fc1.weight)')
    """
    known = list(names)
    guess = meant(text, known)
    return f"; is it {guess!r}?" if guess is not None else close_words(text, known)


def meant_hint(text: str, names: Iterable[str]) -> str | None:
    """The guess as a hint, or else the first names; None without names."""
    known = list(names)
    guess = meant(text, known)
    return f"is it {guess!r}?" if guess is not None else close_hint(text, known)
