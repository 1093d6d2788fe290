"""Guesses what a pattern that matches nothing was meant as: `**` for `*`, a module's keys for its name, a regular expression without
slashes.

Only a pattern that matches something is offered, the first in the order of the table. Pure text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.hints import close_hint, close_words
from ckptsurgeon.rules.patterns import compile_pattern

_NAMES = 20_000  # that are tried
_STAR = re.compile(r"(?<![^.])\*(?![^.])")  # a segment of its own
_PIECE = re.compile(r"(?<![*\\])\*(?=\.|$)(?<!\.\*)(?!^\*)")  # the end of a segment
_PART = re.compile(r"(?<!\\)\{((?![ijklns]\})[A-Za-z_]\w*)\}")  # the others are numbers, as people write them
_REGEX = re.compile(r"\\[.dw]|\.\+|^\.\*|^\^|\$$|[|()]|\[[^]]+\]")


def _each(pattern: re.Pattern[str], by: str) -> Callable[[str], Iterable[str]]:
    """A change of one match of `pattern` in a text, for each match, the last first."""
    return lambda text: [text[: match.start()] + match.expand(by) + text[match.end() :] for match in reversed(list(pattern.finditer(text)))]


def _regex(text: str) -> Iterable[str]:
    bare = text.removeprefix("^").removesuffix("$")
    return [f"/{bare}/", f"/{bare}.*/", f"/.*{bare}.*/"] if _REGEX.search(text) and "/" not in text else []


_TABLE: tuple[Callable[[str], Iterable[str]], ...] = (
    _regex,
    _each(_STAR, "**"),
    _each(_PIECE, "*.**"),
    _each(_PART, r"{**\1}"),
    lambda text: [f"{text.rstrip('.')}.**"],
    lambda text: [text.replace("/", ".")] if "/" in text.strip("/") and text[:1] != "/" else [],
    lambda text: [f"**.{text}"],
)


def _changed(texts: Iterable[str]) -> list[str]:
    return [other for text in texts for change in _TABLE for other in change(text)]


def meant(text: str, names: Iterable[str]) -> str | None:
    """The pattern that a person probably meant by one that matches none of the names; None where nothing of the kind matches.

    >>> keys = ["encoder.0.attn.weight", "encoder.0.attn.bias", "head.weight"]
    >>> [meant(text, keys) for text in ("encoder.*", "encoder.{p}", "encoder", "attn.*", r"encoder\\..*", "no.such")]
    ['encoder.**', 'encoder.{**p}', 'encoder.**', '**.attn.*', '/encoder\\\\..*/', None]
    """
    if text.startswith("/"):
        return None
    known = [name for _, name in zip(range(_NAMES), names, strict=False)]
    once = _changed([text])
    for other in dict.fromkeys([*once, *_changed(once)]):
        try:
            pattern = compile_pattern(other)
            pattern.learn(known)
            if any(map(pattern.test, known)):
                return other
        except CheckpointError:  # no pattern at all, or one that takes too long
            continue
    return None


def meant_words(text: str, names: Iterable[str]) -> str:
    """What was meant, or else close names, as words to end a sentence with; or `""`.

    >>> meant_words("fc.*", ["fc.0.weight"]), meant_words("fc4.*", ["fc1.weight"])
    ("; is it 'fc.**'?", ' (close: fc1.weight)')
    """
    known = list(names)
    found = meant(text, known)
    return f"; is it {found!r}?" if found is not None else close_words(text, known)


def meant_hint(text: str, names: Iterable[str]) -> str | None:
    """The same as a hint of its own, or else the first names; None without names."""
    known = list(names)
    found = meant(text, known)
    return f"is it {found!r}?" if found is not None else close_hint(text, known)
