"""Numbers in keys, and how those of targets follow from those of sources. Pure text and integers; no key is looked up here.

Rule: a target's number is constant, or it is computed from a source's numbers as a rename can do it (`{i+1}`, `{2*i}`, `{i//2}`,
`{2*i+j}`). A form must hold for every row.

Dots within braces (`{i=0..90..3}`) don't end a segment of a pattern.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ckptsurgeon.rules.patterns import without_escapes

_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")
_MOST_STEPS = 8  # the largest factor or divisor
_ENOUGH = 3  # rows that are needed for any form but a shift
NAMES = "ijklmnrstuvwxyz"  # for numbers, in the order of the pattern
_TOKEN = re.compile(r"[^.\\{]+|\\.|\{[^{}]*\}|.", re.DOTALL)
_CHOICES = re.compile(r"(\\.)|(\{[A-Za-z_][A-Za-z0-9_]*)=[^{}]*(?=\})", re.DOTALL)


@dataclass(frozen=True)
class Cut:
    """A key as texts and the numbers between them."""

    texts: tuple[str, ...]
    numbers: tuple[int, ...]

    def written(self, parts: Sequence[str]) -> str:
        """The key with `parts` in place of its numbers."""
        return "".join(itertools.chain.from_iterable(itertools.zip_longest(self.texts, parts, fillvalue="")))

    def until(self, slot: int) -> tuple[str, ...]:
        """The texts before a number."""
        return self.texts[: slot + 1]


def cut(key: str) -> Cut:
    """A key cut at its numbers.

    >>> cut("layer1.0.conv1.weight")
    Cut(texts=('layer', '.', '.conv', '.weight'), numbers=(1, 0, 1))
    """
    parts = _NUMBER.split(key)
    return Cut(tuple(parts[::2]), tuple(map(int, parts[1::2])))


@dataclass(frozen=True)
class Form:
    """How a number is computed: `(times * a + b + plus) // over % rest`, where a is the number in slot `slot` and b the one in slot
    `other`."""

    slot: int
    plus: int = 0
    times: int = 1
    over: int = 1
    rest: int = 0
    other: int = -1

    @property
    def effort(self) -> int:
        """How hard it is to read; 0 for the unchanged number."""
        return (self.plus != 0) + 3 * (self.times > 1) + 3 * (self.over > 1) + 3 * (self.rest > 0) + 5 * (self.other >= 0)

    def __call__(self, numbers: Sequence[int]) -> int:
        number = self.times * numbers[self.slot] + self.plus + (numbers[self.other] if self.other >= 0 else 0)
        number //= self.over
        return number % self.rest if self.rest else number

    def written(self, names: Sequence[str]) -> str:
        """The form in braces; `names` are the slots' names.

        >>> Form(0, plus=-1, over=2).written("ij"), Form(0, times=2, other=1).written("ij"), Form(1).written("ij")
        ('{(i-1)//2}', '{2*i+j}', '{j}')
        """
        text = f"{self.times}*{names[self.slot]}" if self.times > 1 else names[self.slot]
        text += f"+{names[self.other]}" if self.other >= 0 else ""
        text += f"{self.plus:+d}" if self.plus else ""
        text = f"({text})" if self.plus and (self.over > 1 or self.rest) else text
        return f"{{{text}{f'//{self.over}' if self.over > 1 else ''}{f'%{self.rest}' if self.rest else ''}}}"


def fit(rows: Collection[tuple[int, int]], slot: int) -> Form | None:
    """The form that gives the second number of each row from the first; None where no form does.

    >>> fit({(1, 0), (3, 1), (5, 2)}, 0), fit({(0, 1), (5, 2)}, 0)
    (Form(slot=0, plus=0, times=1, over=2, rest=0, other=-1), None)
    """
    return next((form for form in _forms(rows, slot) if all(form((0,) * slot + (number,)) == result for number, result in rows)), None)


def _forms(rows: Collection[tuple[int, int]], slot: int) -> Iterator[Form]:
    low, high = min(rows), max(rows)
    yield Form(slot, low[1] - low[0])
    if len({number for number, _ in rows}) < _ENOUGH:
        return
    rise, run = high[1] - low[1], high[0] - low[0]
    if rise > run and rise % run == 0 and rise // run <= _MOST_STEPS:
        yield Form(slot, low[1] - rise // run * low[0], rise // run)
    if 0 < rise < run:
        for over in range(2, _MOST_STEPS + 1):
            yield from (Form(slot, plus, over=over) for plus in (0, *range(-1, -over, -1), *range(1, over)))
    if (rest := max(result for _, result in rows) + 1) > 1:
        yield Form(slot, rest=rest)


def fit_two(rows: Collection[tuple[tuple[int, ...], int]], slots: Collection[int]) -> Form | None:
    """The form that uses two slots, as for blocks that are numbered through all stages of equal length.

    >>> fit_two([((0, 0), 0), ((0, 1), 1), ((1, 0), 2), ((1, 1), 3)], (0, 1))
    Form(slot=0, plus=0, times=2, over=1, rest=0, other=1)
    """
    if len(rows) < _ENOUGH + 1:
        return None
    first, value = next(iter(rows))
    for slot, other in itertools.permutations(slots, 2):
        for times in range(1, _MOST_STEPS + 1):
            plus = value - times * first[slot] - first[other]
            form = Form(slot, plus, times, other=other)
            if all(form(numbers) == result for numbers, result in rows):
                return form
    return None


def segments(pattern: str) -> list[str]:
    """The texts between dots, except for dots in braces.

    >>> segments("layers.{i=0..90..3}.attn.{p}")
    ['layers', '{i=0..90..3}', 'attn', '{p}']
    """
    if "{" not in pattern:
        return pattern.split(".")
    texts = [""]
    for token in _TOKEN.findall(pattern):
        if token == ".":
            texts.append("")
        else:
            texts[-1] += token
    return texts


def plain(segment: str) -> str:
    """A segment as a result writes it: without the choices of its parts.

    >>> plain("h{i=0,4,9}")
    'h{i}'
    """
    return _CHOICES.sub(r"\1\2", segment) if "=" in segment else segment


def is_open(pattern: str) -> bool:
    """Whether a pattern has parts, so that it is no literal key."""
    return "{" in without_escapes(pattern)
