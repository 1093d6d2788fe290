"""Holds a pattern against a long key in time that grows with its length; a regular expression would try every way to share it out.

Rule: the answer is the regular expression's own, part for part (a test holds it). The places of a key that a token of a pattern can
reach are the bits of one integer, so a token costs a few operations on it. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["text", "words", "char", "star", "one", "many", "deep", "some", "lead", "trail", "again"]
OPEN: frozenset[Kind] = frozenset({"star", "one", "many", "deep", "some", "lead", "again"})


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a pattern: fixed `text`s (of several `words` the first that fits), or what is open, with the `name` of its part.

    `char` is one character of a segment, `star` what stays in one, `one` that and not empty, `many` whole segments, `deep` anything,
    `some` anything but nothing, `lead` anything up to a dot, or nothing; `trail` is `lead` read backwards. `again` is what an earlier part
    was, here any whole segments.
    """

    kind: Kind
    texts: tuple[str, ...] = ()
    name: str = ""


class _Key:
    """A key and where its dots are not; bit i stands for the place before character i."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.size = len(text)
        self.all = (2 << self.size) - 1
        self.plain = int("".join("01"[char != "."] for char in reversed(text)) or "0", 2)
        self.dots = self.plain ^ (self.all >> 1)
        # What whole segments go over: their characters, and a dot between two of them.
        self.inner = self.plain | (self.dots & self.plain << 1 & self.plain >> 1)

    def after(self, start: int, beyond: int) -> int:
        """Every place at least `beyond` characters after the first of `start`."""
        return self.all & -((start & -start) << beyond)

    def over(self, start: int, across: int) -> int:
        """`start`, and every place that is reached from it over characters in `across`: a carry runs along them."""
        return start | ((start & across) + across) ^ across

    def step(self, token: Token, start: int) -> int:
        """The places where `token` can end when it begins at one of `start`."""
        kind = token.kind
        if kind in ("text", "words"):
            return self.fixed(token.texts, start)
        if kind == "char":
            return (start & self.plain) << 1
        if kind == "star":
            return self.over(start, self.plain)
        if kind == "one":
            return self.over((start & self.plain) << 1, self.plain)
        if kind in ("many", "again"):
            return self.over((start & self.plain) << 1, self.inner) & self.plain << 1
        if kind == "lead":
            return start | (self.dots & self.after(start, 1)) << 1
        if kind == "trail":
            dotted = start & self.dots
            return start | (self.after(dotted, 2) if dotted else 0)
        return self.after(start, 0 if kind == "deep" else 1)

    def fixed(self, texts: Sequence[str], start: int) -> int:
        if len(texts) == 1:  # every occurrence, whichever begins at a place of `start`
            found, place = 0, self.text.find(texts[0])
            while place >= 0:
                found |= 1 << place
                place = self.text.find(texts[0], place + 1)
            return (found & start) << len(texts[0])
        known, sizes = frozenset(texts), {len(text) for text in texts}
        ends = [place + size for place in _bits(start) for size in sizes if self.text[place : place + size] in known]
        return _mask(ends, self.size)


def _bits(mask: int) -> list[int]:
    return [place for place, bit in enumerate(reversed(f"{mask:b}")) if bit == "1"]


def _mask(places: Sequence[int], size: int) -> int:
    row = bytearray(b"0" * (size + 1))
    for place in places:
        if place <= size:
            row[size - place] = 49
    return int(row, 2)


def _turned(token: Token) -> Token:
    kinds: dict[Kind, Kind] = {"lead": "trail"}
    return replace(token, kind=kinds.get(token.kind, token.kind), texts=tuple(text[::-1] for text in token.texts))


def fits(tokens: Sequence[Token], text: str) -> bool:
    """Whether the whole of `text` matches.

    >>> fits([Token("one", name="a"), Token("text", ("_",)), Token("star")], "x_y_z")
    True
    """
    return _ends(tokens, text) and bool(_reach(tokens, _Key(text))[-1] >> len(text))


def _ends(tokens: Sequence[Token], text: str) -> bool:
    """Whether the fixed text that begins or ends the tokens is there: most keys are told by it."""
    first, last = tokens[0], tokens[-1]
    return (first.kind != "text" or text.startswith(first.texts)) and (last.kind != "text" or text.endswith(last.texts))


def _reach(tokens: Sequence[Token], key: _Key) -> list[int]:
    """Where each token can begin, and at last where the last one can end."""
    found = [1]
    for token in tokens:
        found.append(key.step(token, found[-1]) & key.all if found[-1] else 0)
    return found


def parts(tokens: Sequence[Token], text: str) -> dict[str, str] | None:
    """What each named token stands for where the whole of `text` matches, the first ones as long as may be; else None.

    >>> parts([Token("one", name="a"), Token("text", ("_",)), Token("one", name="b")], "x_y_z")
    {'a': 'x_y', 'b': 'z'}
    """
    if not _ends(tokens, text):
        return None
    size, key = len(text), _Key(text)
    turned = [_turned(token) for token in reversed(tokens)]
    # Bit n - p of a key read backwards is place p: turned round, where the rest of the tokens can begin.
    rest = [int(f"{mask:0{size + 1}b}"[::-1], 2) for mask in reversed(_reach(turned, _Key(text[::-1])))]
    if not rest[0] & 1:
        return None
    found, place = {}, 0
    for token, after in zip(tokens, rest[1:], strict=True):
        if token.kind == "words":
            end = next(stop for word in token.texts if text.startswith(word, place) and after >> (stop := place + len(word)) & 1)
        else:
            end = (key.step(token, 1 << place) & after).bit_length() - 1
        if token.name:
            found[token.name] = text[place:end]
        place = end
    return found
