"""How results are shown: `repr` is one short line, `str` the command line's table, `to_dict` and `to_json` what `--json` prints.

Results are on lower floors than the views that make their text. So one table names each result's views, which are imported when they are
needed: these are the only imports of a higher floor.

A text may be `Styled`: a `str` that knows which of its parts have a style, so that whatever measures, cuts or compares it sees plain text,
without escape codes. A style is a meaning (`good`, `missing` …), not a colour; only the command line turns it into one, where a terminal
wants it. `+`, `joined` and `excerpt` keep styles; every other operation of `str`, an f-string too, gives plain text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Literal, NamedTuple

_LONGEST = 200
# By result, the functions that make its text and its JSON. One without a text is printed as its `repr`.
VIEWS: dict[str, tuple[str | None, str]] = {
    "Archive": ("ckptsurgeon.views.text.inspect.archive", "ckptsurgeon.views.json.archive"),
    "CarriedState": ("ckptsurgeon.views.text.merge.carried", "ckptsurgeon.views.json.carried"),
    "CheckReport": ("ckptsurgeon.views.text.check.check", "ckptsurgeon.views.json.check"),
    "Checkpoint": (None, "ckptsurgeon.formats.plain.skeleton.to_json"),
    "Diff": ("ckptsurgeon.views.text.diff.diff", "ckptsurgeon.views.json.diff"),
    "Plan": ("ckptsurgeon.views.text.plan.plan", "ckptsurgeon.planning.planfile.to_json"),
    "Proposal": ("ckptsurgeon.views.text.match.matching", "ckptsurgeon.views.json.matching"),
    "Report": ("ckptsurgeon.views.text.merge.report", "ckptsurgeon.views.json.report"),
    "Verification": ("ckptsurgeon.views.text.check.verification", "ckptsurgeon.views.json.verification"),
}


# The functions of `views/tables.py` that make a result's table.
TABLES = {
    "Archive": "archive",
    "CheckReport": "check",
    "Diff": "diff",
    "Plan": "plan",
    "Proposal": "matching",
    "Report": "report",
    "Verification": "verification",
}


@dataclass(frozen=True, slots=True)
class Look:
    """Which tensors of an archive are shown, and how.

    Attributes:
        patterns: those whose keys match one of them; all without any.
        sort: `file` is the file's order, `name` by key, `size` by bytes, the largest first.
        depth: shows modules instead, down to so many levels; 0 shows tensors.
    """

    patterns: tuple[str, ...] = ()
    sort: str = "file"
    depth: int = 0


class Shown:
    """A base of frozen results (`@dataclass(frozen=True, repr=False)`) that gives them a `repr` of one line, at most 200 characters.

    It has the fields that are not empty: numbers and short texts unchanged, containers as a count.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in fields(self) if field.repr)  # type: ignore[arg-type]
        words = [f"{name}={short(value)}" for name, value in values if value not in (None, (), "", False) and _size(value) != 0]
        line = f"{type(self).__name__}({', '.join(words)})"
        return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]} …)"


class Result(Shown):
    """A result of a verb, which has a row in the table of views."""

    __slots__ = ()

    def to_text(self, *, verbose: bool = False, width: int | None = None, **how: Any) -> str:
        """The command line's text.

        Args:
            verbose: a row for every key, as `-v` shows them.
            width: the terminal's, in columns; None for one line a row.
            how: what else the command can choose of its text, such as `stat=True` for a `Diff`.

        Returns:
            The text.
        """
        return str(styled_text(self, verbose, width, **how))

    def to_table(self, form: str = "github", *, verbose: bool = False, **how: Any) -> str:
        """The rows of the text as a table, which `--table` prints.

        Args:
            form: `"github"` (Markdown), `"html"` or `"csv"`.
            verbose: a row for every key; without it keys are folded.
            how: as for `to_text`.

        Returns:
            The table as text.
        """
        table: str = _view(f"ckptsurgeon.views.tables.{TABLES[type(self).__name__]}")(self, form, verbose, **how)
        return table

    def __str__(self) -> str:
        return self.to_text()

    def to_dict(self, **how: Any) -> dict[str, Any]:
        """The result as plain values.

        Args:
            how: what else the command can choose of its JSON, such as `stat=True` for a `Diff`.

        Returns:
            What `--json` prints, as dicts and lists; the schemas that ship in the package describe it.
        """
        return {name: [*value] if isinstance(value, list) else value for name, value in self._values(**how).items()}

    def to_json(self, **how: Any) -> str:
        """The result as JSON text.

        Args:
            how: as for `to_dict`.

        Returns:
            What `--json` prints.
        """
        return "".join(self.json_parts(**how))

    def json_parts(self, **how: Any) -> Iterator[str]:
        """The text of `to_json` in parts, so that an answer about a million tensors need never be held whole.

        Args:
            how: as for `to_dict`.

        Returns:
            An iterator over the parts.
        """
        return json_parts(self._values(**how))

    def _values(self, **how: Any) -> dict[str, Any]:
        values: dict[str, Any] = _view(VIEWS[type(self).__name__][1])(self, **how)
        return values


def styled_text(result: Result, verbose: bool, width: int | None, **how: Any) -> str:
    """The text of `Result.to_text`, in which parts have a style."""
    path, _ = VIEWS[type(result).__name__]
    text: str = repr(result) if path is None else _view(path)(result, verbose, width, **how)
    return text


def json_parts(value: dict[str, Any]) -> Iterator[str]:
    """An answer as JSON with an indent of 2, in parts; a value that has `texts` writes itself."""
    from json import JSONEncoder, dumps

    encoder, comma = JSONEncoder(indent=2), "{"
    for name, entry in value.items():
        yield f"{comma}\n  {dumps(name)}: "
        words = entry.texts() if hasattr(entry, "texts") else encoder.iterencode(entry)
        while part := "".join(islice(words, 1 << 14)):
            yield part.replace("\n", "\n  ")
        comma = ","
    yield "\n}"


def _view(path: str) -> Any:
    from importlib import import_module

    module, _, function = path.rpartition(".")
    return getattr(import_module(module), function)


def _size(value: Any) -> int | None:
    return len(value) if isinstance(value, Sized) and not isinstance(value, str) else None


def short(value: Any) -> str:
    """A value within a `repr`: a count for what holds others, and long text cut."""
    size = _size(value)
    if isinstance(value, tuple) and len(value) <= 8 and all(type(number) is int for number in value):
        return repr(value)
    if isinstance(value, tuple | list) and size == 1 and isinstance(value[0], str):
        return f"({short(value[0])},)"
    if size is not None and isinstance(value, tuple | list | Mapping | frozenset | set):
        return f"<{size}>"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:58]} …"


# What matches; what fits in part or needs a look; only in the target; only in the source; a no; what to do next; what may be passed over.
Style = Literal["good", "changed", "missing", "extra", "bad", "strong", "faint"]


class Span(NamedTuple):
    """A part of a text, from `start` to before `stop`, and its style."""

    start: int
    stop: int
    style: Style


class Styled(str):
    """A text and the spans of it that have a style, in order, disjoint.

    >>> styled("ok", "good") + " then", (styled("ok", "good") + " then").spans
    ('ok then', (Span(start=0, stop=2, style='good'),))
    """

    __slots__ = ("spans",)
    spans: tuple[Span, ...]

    def __new__(cls, text: str, spans: Iterable[Span] = ()) -> Styled:
        """Return `text` with these spans."""
        instance = super().__new__(cls, text)
        instance.spans = tuple(spans)
        return instance

    def __add__(self, after: str) -> Styled:
        return joined((self, after))

    def __radd__(self, before: str) -> Styled:
        return joined((before, self))

    def __getnewargs__(self) -> tuple[str, tuple[Span, ...]]:  # type: ignore[override]
        return str(self), self.spans


def styled(text: str, style: Style | None, start: int = 0, stop: int | None = None) -> str:
    """Text with a style from `start` to before `stop`; what has a style already keeps it. Without a style, the text as it is.

    >>> styled("a key", "missing", 2).spans
    (Span(start=2, stop=5, style='missing'),)
    """
    if style is None:
        return text
    spans, position = [], start
    end = len(text) if stop is None else stop
    for span in spans_of(text):
        if position < span.start and position < end:
            spans.append(Span(position, min(span.start, end), style))
        spans.append(span)
        position = max(position, span.stop)
    if position < end:
        spans.append(Span(position, end, style))
    return Styled(text, sorted(spans))


def spans_of(text: str) -> tuple[Span, ...]:
    """The spans of a text that have a style; of plain text none."""
    return text.spans if isinstance(text, Styled) else ()


def joined(parts: Iterable[str], between: str = "") -> Styled:
    """Texts as one, as `str.join` makes it, with their styles.

    >>> joined(["a", styled("b", "good")], ", ").spans
    (Span(start=3, stop=4, style='good'),)
    """
    texts = [*parts]
    spans, position = [], 0
    for text in texts:
        spans += [Span(position + span.start, position + span.stop, span.style) for span in spans_of(text)]
        position += len(text) + len(between)
    return Styled(between.join(texts), spans)


def excerpt(text: str, start: int, stop: int) -> str:
    """A text from `start` to before `stop`, with its styles.

    >>> excerpt(styled("abc", "good"), 1, 2).spans
    (Span(start=0, stop=1, style='good'),)
    """
    spans = [
        Span(max(span.start, start) - start, min(span.stop, stop) - start, span.style)
        for span in spans_of(text)
        if span.start < stop and span.stop > start
    ]
    return Styled(text[start:stop], spans) if spans else text[start:stop]
