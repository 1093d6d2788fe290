"""How results are shown: `repr` is one short line, `str` the command line's table, `to_dict` and `to_json` what `--json` prints.

Results stand on lower floors than the views that word them. So one table names each result's views, which are imported when they are asked
for: it is the only way up in the house.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import fields
from itertools import islice
from typing import Any

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


class Shown:
    """A base of frozen results (`@dataclass(frozen=True, repr=False)`) that gives them a `repr` of one line, at most 200 characters.

    It has the fields that are not empty: numbers and short texts as they are, all that holds others as a count.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in fields(self) if field.repr)  # type: ignore[arg-type]
        words = [f"{name}={_short(value)}" for name, value in values if value not in (None, (), "", False) and _size(value) != 0]
        line = f"{type(self).__name__}({', '.join(words)})"
        return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]} …)"


class Result(Shown):
    """A result of a verb, which has a row in the table of views."""

    __slots__ = ()

    def to_text(self, *, verbose: bool = False, width: int | None = None) -> str:
        """The command line's table.

        Args:
            verbose: a row for every key, as `-v` shows them.
            width: the terminal's, in columns; None for one line a row.

        Returns:
            The table as text.
        """
        path, _ = VIEWS[type(self).__name__]
        return repr(self) if path is None else str(_view(path)(self, verbose, width))

    def __str__(self) -> str:
        return self.to_text()

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values.

        Returns:
            What `--json` prints, as dicts and lists; the schemas that ship in the package describe it.
        """
        return {name: [*value] if isinstance(value, list) else value for name, value in self._values().items()}

    def to_json(self) -> str:
        """The result as JSON text.

        Returns:
            What `--json` prints.
        """
        return "".join(self.json_parts())

    def json_parts(self) -> Iterator[str]:
        """The text of `to_json` in parts, so that an answer about a million tensors need never be held whole.

        Returns:
            An iterator over the parts.
        """
        return json_parts(self._values())

    def _values(self) -> dict[str, Any]:
        values: dict[str, Any] = _view(VIEWS[type(self).__name__][1])(self)
        return values


def json_parts(value: dict[str, Any]) -> Iterator[str]:
    """An answer as JSON with an indent of 2, in parts; a value that has `texts` writes itself."""
    from json import JSONEncoder, dumps

    encoder, comma = JSONEncoder(indent=2), "{"
    for name, one in value.items():
        yield f"{comma}\n  {dumps(name)}: "
        words = one.texts() if hasattr(one, "texts") else encoder.iterencode(one)
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


def _short(value: Any) -> str:
    size = _size(value)
    if isinstance(value, tuple | list) and size == 1 and isinstance(value[0], str):
        return f"({_short(value[0])},)"
    if size is not None and isinstance(value, tuple | list | Mapping | frozenset | set):
        return f"<{size}>"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:58]} …"
