"""What all texts are made of: shapes, counted headings, aligned rows, folded keys, findings, commands; and their styles."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from ckptsurgeon.errors import pasteable, printable
from ckptsurgeon.shown import Style, excerpt, joined, styled
from ckptsurgeon.sizes import percent
from ckptsurgeon.views.folding import Folded, Several, fold, fold_keys

if TYPE_CHECKING:
    from ckptsurgeon.adapters.op import Op
    from ckptsurgeon.command import Command, InMemory
    from ckptsurgeon.planning.quantised_weights.find import Codes
    from ckptsurgeon.report import Coverage, Finding

MOST = 12  # rows of one kind that are shown; the rest is counted
WIDEST = 240  # characters; a row with a longer cell is not aligned with the others
FIELD = 40  # characters of a field of an op
LONGEST = 200  # characters of a finding; a library's own message may be longer
_PIECES = re.compile(r"[^ ,]+[ ,]*|[ ,]+")

Row = Sequence[str]

# The style of a heading's word and count, and of the keys below it; a heading that isn't here is plain.
STYLES: dict[str, Style] = {
    "matched": "good",
    "mismatched": "changed",
    "missing": "missing",
    "unmatched": "missing",
    "extra": "extra",
    "unused": "extra",
    "dropped": "extra",
    "drop": "extra",
    "uncertain": "changed",
    "layout open": "changed",
    "not converted": "changed",
    "other dtype": "changed",
    "refused": "bad",
    "copy": "good",
    "rename": "good",
    "adapt": "good",
    "load": "good",
    "initialise": "changed",
    "transferred": "good",
    "carried": "good",
    "partly": "changed",
    "fresh": "changed",
    "at zero": "changed",
    "not carried": "changed",
    "lossy casts": "changed",
}
LEVELS: dict[str, Style] = {"error": "bad", "warning": "changed", "note": "faint"}


def shape(dims: Sequence[int]) -> str:
    """A shape as torch writes it.

    >>> shape((10, 84)), shape((6,)), shape(())
    ('(10, 84)', '(6,)', '()')
    """
    return f"({', '.join(map(str, dims))}{',' if len(dims) == 1 else ''})"


def name(text: object) -> str:
    """A key, path or reason on one line, with special characters escaped; quoted if it begins or ends with a space, or is empty.

    >>> name("a\\nb"), name(" a")
    ('a\\\\nb', "' a'")
    """
    words = printable(text)
    return words if words and words == words.strip() else f"'{words}'"


def chain(ops: Iterable[Op]) -> str:
    """Ops as text; a long field is cut.

    >>> chain([{"op": "transpose", "dims": [0, 1]}])
    'transpose(dims=[0, 1])'
    """
    cut = [{field: value if len(repr(value)) <= FIELD else Cut() for field, value in op.items()} for op in ops]
    from ckptsurgeon.adapters.table import texts

    return texts(cut)


class Cut:
    """Replaces a field that is too long to read."""

    def __repr__(self) -> str:
        return "…"


def count(number: int, thing: str) -> str:
    """A number of things.

    >>> count(1, "tensor"), count(2, "tensor")
    ('1 tensor', '2 tensors')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


_OF_SEVERAL = {"is": "are", "has": "have", "was": "were", "does": "do"}


def answer(words: str, ok: bool) -> str:
    """A good or bad result, in its style."""
    return styled(words, "good" if ok else "bad")


def of_several(message: str) -> str | None:
    """A message about one thing in the plural; None if it does not begin with a known verb.

    >>> of_several("is in the target only"), of_several("dtype F32, not F16")
    ('are in the target only', None)
    """
    verb, space, rest = message.partition(" ")
    return f"{_OF_SEVERAL[verb]}{space}{rest}" if verb in _OF_SEVERAL else None


def heading(word: str, number: int, words: str = "") -> str:
    """A counted heading; its words are left out if the count is zero."""
    counted = f"  {word:<11} {number:>5,}"
    return styled(counted, STYLES.get(word) if number else "faint", 2) + ("   " + words if number and words else "")


def level_line(level: str, words: str) -> str:
    """A finding, a warning or a note, indented: its level, then what it says. A note is faint as a whole."""
    label = f"  {level}:"
    return styled(f"{label} {words}", LEVELS.get(level), 2, None if level == "note" else len(label))


def listing(names: Sequence[object], most: int | None = 8) -> str:
    """Names on one line, the rest counted."""
    shown = names[:most]
    return ", ".join(name(entry) for entry in shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def places(paths: Sequence[str], verbose: bool = False) -> str:
    """Dotted paths on one line; several under one name as one, unless `verbose`.

    >>> places(["epoch", "loops.fit.step", "loops.test.step"])
    'epoch, loops.* (2)'
    """
    if verbose:
        return listing(paths, None)
    below: dict[str, list[str]] = {}
    for path in paths:
        below.setdefault(path.partition(".")[0], []).append(path)
    return listing([some[0] if len(some) == 1 else f"{top}.* ({len(some):,})" for top, some in below.items()])


def most_rows(verbose: bool) -> int | None:
    """How many rows of one kind are shown; None for all."""
    return None if verbose else MOST


def table(rows: Iterable[Row], width: int | None, most: int | None = MOST, under: str = "") -> list[str]:
    """Rows as aligned columns, indented; of more than `most` the first and the last ones, with what is between them counted.

    The last cell of a row that is too wide stands below. The first cell of each has the style of the heading that they stand under.
    """
    style = STYLES.get(under)
    every = list(rows)
    head, hidden = _gap(len(every), most)
    shown = [[name(cell) for cell in row] for row in (*every[:head], *every[head + hidden :])]
    lines: list[str] = []
    for index, (line, row) in enumerate(zip(_indented(shown, width), shown, strict=True)):
        close = f"    {'  '.join(row)}".rstrip()  # not aligned with the others
        ways = [[line], [close], [f"    {'  '.join(row[:-1])}".rstrip(), f"        {row[-1]}"]]
        shown_row = next((way for way in ways if width is None or len(row) == 1 or len(way[0]) <= width), ways[-1])
        if hidden and index == head:
            lines.append(_more(hidden))
        lines += [styled(shown_row[0], style, 4, 4 + len(row[0])), *shown_row[1:]]
    return lines


def _gap(rows: int, most: int | None) -> tuple[int, int]:
    """How many of so many rows stand before the gap, and how many are left out."""
    hidden = 0 if most is None or rows <= most + 1 else rows - most
    return (rows, 0) if most is None or not hidden else (most - most // 4, hidden)


def _more(hidden: int) -> str:
    return styled(f"    … {hidden:,} more (-v shows all)", "faint", 4)


def cut(lines: Sequence[str], most: int | None) -> list[str]:
    """The first and the last of many lines, with what is between them counted."""
    head, hidden = _gap(len(lines), most)
    return [*lines[:head], *([_more(hidden)] if hidden else []), *lines[head + hidden :]]


def right_aligned(rows: Sequence[Row]) -> list[str]:
    """Rows of a name and numbers as indented lines: the name to the left, each number to the right of its column.

    >>> right_aligned([["a", "1,000"], ["abc", "1"]])
    ['    a    1,000', '    abc      1']
    """
    widths = [max(map(columns, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for first, *numbers in rows:
        cells = [first + " " * (widths[0] - columns(first)), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
        lines.append("    " + "  ".join(cells).rstrip())
    return lines


def _indented(rows: Sequence[Row], width: int | None) -> list[str]:
    # A row with an endless cell, or wider than the terminal, stands by itself, or every other row would be as wide.
    room = WIDEST if width is None else width - 4
    wide = [any(len(cell) > WIDEST for cell in row) or (width is not None and len("  ".join(row)) > room) for row in rows]
    narrow = [row for row, alone in zip(rows, wide, strict=True) if not alone]
    lines = iter(aligned(narrow))
    return [f"    {'  '.join(row) if alone else next(lines)}".rstrip() for row, alone in zip(rows, wide, strict=True)]


def aligned(rows: Sequence[Row]) -> list[str]:
    """Rows as lines, each column as wide as its widest cell.

    >>> aligned([["a", "bc"], ["abc", "d"]])
    ['a    bc', 'abc  d']
    """
    widths = [max(map(columns, cells)) for cells in zip_longest(*rows, fillvalue="")]
    return ["  ".join(cell + " " * (width - columns(cell)) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def columns(text: str) -> int:
    """How many columns of a terminal a text takes.

    >>> columns("ab"), columns("層")
    (2, 2)
    """
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(character) else 2 if east_asian_width(character) in "WF" else 1 for character in text)


def fitted(lines: Iterable[str], width: int | None) -> str:
    """Lines as one text; those wider than the terminal are wrapped and indented. Commands to paste have their own line breaks."""
    whole = []
    for line in lines:
        if width is None or len(line) <= width or "\n" in line:
            whole.append(line)
            continue
        indent = len(line) - len(line.lstrip())
        inner = excerpt(line, indent, len(line))
        first, *rest = broken(inner, width - indent - 4)
        whole += [" " * indent + first, *(" " * (indent + 4) + more for more in rest)]
    return joined(whole, "\n")


def broken(text: str, room: int) -> list[str]:
    """Text in lines of at most `room` columns, broken after spaces and commas; a longer word stays whole.

    >>> broken("norm1.{weight,bias,running_mean}", 20)
    ['norm1.{weight,bias,', 'running_mean}']
    """
    lines, start = [], 0
    for piece in _PIECES.finditer(text):
        if piece.start() > start and piece.start() - start + len(piece[0].rstrip()) > room:
            lines.append((start, piece.start()))
            start = piece.start()
    ends = [*lines, (start, len(text))]
    return [excerpt(text, begin, begin + len(text[begin:end].rstrip())) for begin, end in ends]


def folded(rows: Iterable[tuple[str, tuple[str, ...]]], width: int | None, most: int | None = MOST, under: str = "") -> list[str]:
    """Keys with their values, folded where the values are equal; in the style of their heading."""
    return table(cells_of(fold(rows)), width, most, under)


def cells_of(rows: Iterable[Folded]) -> list[Row]:
    """Folded rows as cells; where the leaves' values differ, a cell lists all of them.

    >>> cells_of(fold([("fc.weight", ("F32", "(2, 3)")), ("fc.bias", ("F32", "(2,)"))], lambda cells: cells[0]))
    [('fc.{weight,bias}', 'F32', '(2, 3), (2,)')]
    """
    lines: list[Row] = []
    for row in rows:
        every: Any = row.common if isinstance(row.common, Several) else [row.common]
        lines.append((row.key, *(", ".join(cells if len(set(cells)) > 1 else cells[:1]) for cells in zip(*every, strict=True))))
    return lines


def keys(names: Iterable[str], width: int | None, most: int | None = MOST, under: str = "") -> list[str]:
    """Keys without values: folded, or, with `most` None, one on each line; in the style of their heading."""
    return table([(key,) for key in (names if most is None else fold_keys(names))], width, most, under)


def findings(findings: Sequence[Finding], verbose: bool, width: int | None) -> list[str]:
    """Findings, equal ones together (a note without its keys); of more than `MOST` the rest is counted."""
    together: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        together.setdefault((finding.level, finding.message), []).extend([finding.key] if finding.key is not None else [])
    lines: list[str] = []
    most = most_rows(verbose)
    shown = list(together.items())[:most]
    for (level, message), named in shown:
        words = message if verbose or len(message) <= LONGEST else f"{message[:LONGEST].rstrip()} … (-v shows all)"
        if len(named) > 1:
            plural = of_several(words)
            ending = f": {name(words)}" if plural is None else f" {name(plural)}"
            lines.append(level_line(level, f"{count(len(named), 'tensor')}{ending}"))
            lines += keys(named, width, most) if level != "note" or verbose else []
        else:
            lines.append(level_line(level, f"{''.join(f'{name(key)}: ' for key in named)}{name(words)}"))
    rest = len(together) - len(shown)
    return lines + ([styled(f"  … and {count(rest, 'finding')} more (-v shows all)", "faint", 2)] if rest else [])


def quantised(weights: Iterable[Codes], whose: str = "") -> list[str]:
    """A line for each scheme of quantisation: how many weights it has, and an example."""
    by_scheme: dict[str, list[Codes]] = {}
    for weight in weights:
        by_scheme.setdefault(weight.scheme, []).append(weight)
    return [
        f"  quantised{whose}: {count(len(same), 'weight')} as {scheme}, such as {name(same[0].key)}"
        + (f" ({listing(same[0].scales)})" if same[0].scales else "")
        for scheme, same in by_scheme.items()
    ]


def pasted(label: str, command: Command, width: int | None) -> str:
    """A command to paste; if it is wider than the terminal, on several lines, broken before options."""
    words = command.words
    label = styled(label, "strong")
    line = label + f" {pasteable(shlex.join(words))}"
    if width is None or len(line) <= width:
        return line
    parts: list[list[str]] = [[]]
    for word in words:
        if word.startswith("-"):
            parts.append([])
        parts[-1].append(word)
    lines = ["  "]
    for part in (pasteable(shlex.join(part)) for part in parts):
        if len(lines[-1]) + len(part) + 3 > width and lines[-1].strip():
            lines.append("      ")
        lines[-1] += part if not lines[-1].strip() else f" {part}"
    return joined([label, " \\\n".join(lines)], "\n")


def next_step(label: str, command: Command, live: InMemory, width: int | None) -> list[str]:
    """A command to paste; if a side is in memory, the Python call that does the same, or nothing if there is none."""
    if not any(live):
        return [pasted(label, command, width)]
    call = command.call(live)
    return [] if call is None else [styled(label, "strong") + f" {name(call)}"]


def coverage(coverage: Coverage) -> str:
    """Coverage as text; never rounded up to 100 %.

    >>> from ckptsurgeon.report import Coverage
    >>> coverage(Coverage(0.5, 0.99999))
    '50.0 % of tensors, 99.9 % of elements'
    """
    return f"{percent(coverage.tensors)} of tensors, {percent(coverage.elements)} of elements"
