"""Strict JSON from a file: duplicate names, NaN, `-0`, lone surrogates and excessive nesting are errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

from ckptsurgeon.errors import FormatError
from ckptsurgeon.limit_table import allowed, exceeded
from ckptsurgeon.storage.files import OpenFile


def parse(raw: bytes, path: str, what: str, short: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of `raw`; FormatError, naming `what`, for anything that two parsers could read differently.

    `short` gets the pairs of each object and returns a smaller value to keep instead of the dict, or None to keep the dict.
    """

    def pairs(items: list[tuple[str, Any]]) -> Any:
        if short is not None and (row := short(items)) is not None:
            return row
        result = dict(items)
        if len(result) != len(items):
            left = iter(result)  # the distinct names, in order of first occurrence
            twice = next(name for name, _ in items if name != next(left, None))
            raise FormatError(f"has the name {twice[:200]!r} twice in its {what}", path=path)
        return result

    def constant(name: str) -> NoReturn:
        raise ValueError(name)

    def number(text: str) -> int:
        if text == "-0":  # an integer for Python, but not for other parsers
            raise ValueError(text)
        return int(text)

    try:
        # A function for numbers makes parsing slow, so it is set only where such a number may occur.
        integers = number if b"-0" in raw else None
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant, parse_int=integers)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is not valid text
        return value
    except RecursionError as error:
        raise FormatError(f"has a {what} that nests far deeper than any checkpoint", path=path, hint="do not trust it") from error
    except ValueError as error:
        raise FormatError(f"has a {what} that is not valid JSON", path=path, hint="copy or download it again") from error


def bounded(file: OpenFile, nbytes: int, what: str) -> int:
    """Return `nbytes`; LimitError where JSON of this size may not be read."""
    most = allowed("json-bytes")
    if nbytes > most:
        raise exceeded("json-bytes", f"has {what} of {nbytes:,} bytes, above the limit of {most:,}", nbytes, path=file.path)
    return nbytes


def whole(file: OpenFile) -> bytes:
    """The bytes of a JSON file."""
    return file.read(0, bounded(file, file.size, "JSON"))


def integer(value: Any) -> bool:
    """Whether a JSON value is a non-negative integer of at most 63 bits (`true` is not an integer)."""
    return type(value) is int and 0 <= value < 1 << 63


def short(value: Any) -> str:
    """A JSON value in a few characters, for an error message."""
    return repr(value[:40]) if type(value) is str else f"of type {type(value).__name__}"
