"""How results stand in an interactive session: `repr` is one short line, however many keys there are; `str` may be long."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import fields
from typing import Any

_LONGEST = 200


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
