"""Lists of tokens or labels: the text of each row of an embedding or a head.

The content decides how a file is read: JSON (a list, a dict from texts to numbers or back, a config.json, a tokenizer.json), else one token
a line. A text or a number that comes twice is an error, since it would have two meanings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

from ckptsurgeon.errors import FormatError
from ckptsurgeon.formats.json_text import integer, parse, short
from ckptsurgeon.limit_table import allowed, exceeded
from ckptsurgeon.storage.opening import open_regular

MOST_ROWS = 10_000_000
SPARSE = (4, 1000)  # factor and addend: there may be at most 4 rows for each token, and 1000 more
_FORMS = "one token a line, a JSON list, vocab.json, tokenizer.json, or a config.json with id2label"
_JSON = re.compile(r'\s*[\[{]\s*"')  # no list of lines begins so; BERT's begins with "[PAD]"
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)
Item = tuple[Any, Any]  # (token, row), unchecked


def read_labels(path: str | os.PathLike[str]) -> tuple[str | None, ...]:
    """The token or label of each row; None for a row that the file says nothing about.

    Raises:
        FormatError: the file has none of these forms, has a token or a number twice, or numbers far beyond the count of its tokens.
    """
    name = os.fspath(path)
    with open_regular(name) as file:
        if file.size > (most := allowed("label-bytes")):
            raise exceeded("label-bytes", f"is a list of {file.size:,} bytes, above the limit of {most:,}", file.size, path=name)
        raw = file.read(0, file.size).removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode("utf-8")
    except ValueError as error:
        raise FormatError("is not UTF-8 text, so no list of tokens", path=name, hint=f"give {_FORMS}") from error
    value = _value(raw, text, name)
    items = _in_order(_lines(text)) if value is None else _items(value, name)
    return _placed(items, name)


def _value(raw: bytes, text: str, path: str) -> dict[str, Any] | list[Any] | None:
    """The JSON value of a text that is a JSON object or list; None for lines."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        value: dict[str, Any] | list[Any] = parse(raw, path, "content")
    except FormatError:
        if _JSON.match(text):
            raise
        return None
    return value


def _lines(text: str) -> list[str]:
    """The lines without their line ends, and otherwise unchanged. A line ends in \\r\\n where all lines do, else in \\n.

    >>> _lines("a\\r\\n b\\r\\n"), _lines("a\\n\\r\\nb")
    (['a', ' b'], ['a', '\\r', 'b'])
    """
    lines = text.split("\n")
    last = lines.pop()
    if lines and all(line.endswith("\r") for line in lines):
        lines = [line[:-1] for line in lines]
    return [*lines, last] if last else lines


def _in_order(tokens: Iterable[Any]) -> list[Item]:
    """Tokens in the order of their rows, with the row's number; None is a row without a token."""
    return [(token, row) for row, token in enumerate(tokens) if token is not None]


def _items(value: dict[str, Any] | list[Any], path: str) -> list[Item]:
    """Each token with its row, unchecked, from any of the JSON forms."""
    if isinstance(value, list):
        return _in_order(value)
    if isinstance(value.get("model"), dict):
        return _tokenizer(value, path)
    labels = [table for name in ("id2label", "label2id") if isinstance(table := value.get(name), dict) and table]
    if labels:
        first, *rest = map(_dict, labels)
        if any(sorted(first, key=str) != sorted(items, key=str) for items in rest):
            raise FormatError("has an id2label and a label2id that contradict each other", path=path, hint="correct one, or take one out")
        return first
    return _dict(value)


def _dict(value: dict[str, Any]) -> list[Item]:
    """From texts to numbers (also as text, if every name is not a number), or from numbers as text to texts."""
    if value and all(_NUMBER.fullmatch(name) for name in value) and all(type(label) is str for label in value.values()):
        return [(label, int(name)) for name, label in value.items()]
    return [(name, int(row) if type(row) is str and _NUMBER.fullmatch(row) else row) for name, row in value.items()]


def _tokenizer(value: dict[str, Any], path: str) -> list[Item]:
    """A tokenizer.json of Hugging Face's tokenizers: `model.vocab`, and the tokens added to it."""
    vocab, added = value["model"].get("vocab"), value.get("added_tokens") or []
    if isinstance(vocab, list) and all(isinstance(entry, list) and len(entry) == 2 for entry in vocab):
        base = _in_order(entry[0] for entry in vocab)  # Unigram: [token, score]
    elif isinstance(vocab, dict):
        base = list(vocab.items())
    else:
        raise FormatError("is a tokenizer without a vocab that is a dict or a list of [token, score]", path=path, hint=f"give {_FORMS}")
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        raise FormatError("is a tokenizer whose added_tokens are no list of objects", path=path)
    known = {token: row for token, row in base if type(token) is str}
    more = [(entry.get("content"), entry.get("id")) for entry in added]
    return list(chain(base, (item for item in more if type(item[0]) is not str or known.get(item[0]) != item[1])))


def _placed(items: list[Item], path: str) -> tuple[str | None, ...]:
    """The tokens by row. FormatError for an item that is no token and row, for a token or a row that comes twice, and for rows that are
    nearly all empty."""
    for token, row in items:
        if type(token) is not str or not integer(row):
            what = f"the token {short(token)}" if type(token) is not str else f"the row {short(row)} for {token[:40]!r}"
            raise FormatError(f"is no list of tokens: it has {what}", path=path, hint=f"give {_FORMS}")
    if not items:
        raise FormatError("has no token", path=path, hint=f"give {_FORMS}")
    count = max(row for _, row in items) + 1
    if count > MOST_ROWS or count > SPARSE[0] * len(items) + SPARSE[1]:
        raise FormatError(f"has {len(items)} tokens and rows up to {count - 1}", path=path, hint="number the rows from 0 up")
    tokens: list[str | None] = [None] * count
    rows: dict[str, int] = {}
    for token, row in items:
        earlier = tokens[row]
        if earlier is not None:
            raise FormatError(f"has two tokens at row {row}: {earlier[:40]!r} and {token[:40]!r}", path=path, hint="leave one")
        if token in rows:
            raise FormatError(f"has {token[:40]!r} twice, at rows {rows[token]} and {row}", path=path, hint="make every text another one")
        tokens[row], rows[token] = token, row
    return tuple(tokens)
