"""Matches a pattern with a long key in time that grows with its length; a regular expression would try every division among the parts.

Rule: the answer is the regular expression's, part for part (a test holds it). The positions in a key that a token can reach are the bits
of one integer, so a token costs a few operations on it. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["text", "words", "char", "star", "segment", "segments", "anything", "nonempty", "leading", "trailing", "repeated"]
OPEN: frozenset[Kind] = frozenset({"star", "segment", "segments", "anything", "nonempty", "leading", "repeated"})


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a pattern. `name` is the name of its part, if it has one.

    `text` is one fixed text, `words` the first of several `texts` that fits. The others are open: `char` is one character of a segment,
    `star` any text within a segment, `segment` the same but not empty, `segments` whole segments, `anything` any text, `nonempty` any text
    but the empty one, `leading` any text up to a dot, or nothing; `trailing` is `leading` read backwards. `repeated` is the text of an
    earlier part, here any whole segments.
    """

    kind: Kind
    texts: tuple[str, ...] = ()
    name: str = ""


class _Key:
    """A key, and masks of its positions; bit i stands for the position before character i, `plain` marks characters that are no dots."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.size = len(text)
        self.all = (2 << self.size) - 1
        self.plain = int("".join("01"[char != "."] for char in reversed(text)) or "0", 2)
        self.dots = self.plain ^ (self.all >> 1)
        # What whole segments extend over: their characters, and a dot between two of them.
        self.inner = self.plain | (self.dots & self.plain << 1 & self.plain >> 1)

    def after(self, start: int, beyond: int) -> int:
        """Every position at least `beyond` characters after the first of `start`."""
        return self.all & -((start & -start) << beyond)

    def over(self, start: int, across: int) -> int:
        """`start`, and every position that is reached from it over characters in `across`: a carry runs along them."""
        return start | ((start & across) + across) ^ across

    def step(self, token: Token, start: int) -> int:
        """The positions where `token` can end when it begins at one of `start`."""
        kind = token.kind
        if kind in ("text", "words"):
            return self.fixed(token.texts, start)
        if kind == "char":
            return (start & self.plain) << 1
        if kind == "star":
            return self.over(start, self.plain)
        if kind == "segment":
            return self.over((start & self.plain) << 1, self.plain)
        if kind in ("segments", "repeated"):
            return self.over((start & self.plain) << 1, self.inner) & self.plain << 1
        if kind == "leading":
            return start | (self.dots & self.after(start, 1)) << 1
        if kind == "trailing":
            dotted = start & self.dots
            return start | (self.after(dotted, 2) if dotted else 0)
        return self.after(start, 0 if kind == "anything" else 1)

    def fixed(self, texts: Sequence[str], start: int) -> int:
        if len(texts) == 1:  # every occurrence that begins at a position of `start`
            occurrences, position = 0, self.text.find(texts[0])
            while position >= 0:
                occurrences |= 1 << position
                position = self.text.find(texts[0], position + 1)
            return (occurrences & start) << len(texts[0])
        known, sizes = frozenset(texts), {len(text) for text in texts}
        ends = [position + size for position in _bits(start) for size in sizes if self.text[position : position + size] in known]
        return _mask(ends, self.size)


def _bits(mask: int) -> list[int]:
    return [position for position, bit in enumerate(reversed(f"{mask:b}")) if bit == "1"]


def _mask(positions: Sequence[int], size: int) -> int:
    row = bytearray(b"0" * (size + 1))
    for position in positions:
        if position <= size:
            row[size - position] = 49
    return int(row, 2)


def _mirrored(token: Token) -> Token:
    kinds: dict[Kind, Kind] = {"leading": "trailing"}
    return replace(token, kind=kinds.get(token.kind, token.kind), texts=tuple(text[::-1] for text in token.texts))


def fits(tokens: Sequence[Token], text: str) -> bool:
    """Whether the whole of `text` matches.

    >>> fits([Token("segment", name="a"), Token("text", ("_",)), Token("star")], "x_y_z")
    True
    """
    return ends_fit(tokens, text) and bool(_reach(tokens, _Key(text))[-1] >> len(text))


def ends_fit(tokens: Sequence[Token], text: str) -> bool:
    """Whether the text has the fixed beginning and end of the tokens: most keys are ruled out by it."""
    first, last = tokens[0], tokens[-1]
    return (first.kind != "text" or text.startswith(first.texts)) and (last.kind != "text" or text.endswith(last.texts))


def _reach(tokens: Sequence[Token], key: _Key) -> list[int]:
    """Masks of the positions where each token can begin, and at last where the last token can end."""
    starts = [1]
    for token in tokens:
        starts.append(key.step(token, starts[-1]) & key.all if starts[-1] else 0)
    return starts


def parts(tokens: Sequence[Token], text: str) -> dict[str, str] | None:
    """The text of each named token where the whole of `text` matches, the first tokens as long as possible; else None.

    >>> parts([Token("segment", name="a"), Token("text", ("_",)), Token("segment", name="b")], "x_y_z")
    {'a': 'x_y', 'b': 'z'}
    """
    if not ends_fit(tokens, text):
        return None
    size, key = len(text), _Key(text)
    mirrored = [_mirrored(token) for token in reversed(tokens)]
    # Bit n - p of the reversed key is position p: reversed again, the masks say where the rest of the tokens can begin.
    rest = [int(f"{mask:0{size + 1}b}"[::-1], 2) for mask in reversed(_reach(mirrored, _Key(text[::-1])))]
    if not rest[0] & 1:
        return None
    values, position = {}, 0
    for token, after in zip(tokens, rest[1:], strict=True):
        if token.kind == "words":
            end = next(stop for word in token.texts if text.startswith(word, position) and after >> (stop := position + len(word)) & 1)
        else:
            end = (key.step(token, 1 << position) & after).bit_length() - 1
        if token.name:
            values[token.name] = text[position:end]
        position = end
    return values
