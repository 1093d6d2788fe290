"""Small files of a command's own: lists that it reads, and what it writes, whole or not at all, like every other output."""

from __future__ import annotations

import json
from typing import Any

from ckptsurgeon.errors import FormatError, OutputError
from ckptsurgeon.formats import json_text
from ckptsurgeon.parameter_types import Note
from ckptsurgeon.storage.copying import write_at
from ckptsurgeon.storage.opening import open_regular
from ckptsurgeon.streaming.atomic import check_free, lost, new_file


def name_list(path: str) -> tuple[str, ...]:
    """The names in a file: a JSON list of them, or one a line.

    Raises:
        UnreadableError: it is not there, or no regular file.
        FormatError: it is no text, or JSON of something else.
    """
    with open_regular(path) as file:
        raw = json_text.whole(file)
    if raw.lstrip()[:1] == b"[":
        found = json_text.parse(raw, path, "list of names")
        if not all(type(name) is str for name in found):
            raise FormatError("holds something other than names in its list", path=path, hint='write ["a.weight", "a.bias"]')
        return tuple(found)
    try:
        return tuple(line.strip() for line in raw.decode("utf-8").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise FormatError("is no text", path=path, hint="give a file with one name a line") from error


def refuse_taken(path: str, overwrite: bool) -> None:
    """OutputError for a path that is taken or can't be written, before the work is done."""
    check_free(path, overwrite)


def write_json(path: str, value: dict[str, Any], overwrite: bool, note: Note) -> None:
    """Write a JSON value, indented, with a newline at its end; `note` is told what the file that is replaced had and this one can't have.

    Raises:
        OutputError: the path is taken, can't be written, or holds what is no text: somebody's checkpoint is not replaced by a plan of it.
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=True) + "\n", overwrite, note, "JSON")


def write_text(path: str, value: str, overwrite: bool, note: Note, kind: str = "text") -> None:
    """Write a text as it is; `write_json` says the rest."""
    if overwrite and not _is_text(path):
        raise OutputError(f"is no text, and would be replaced by {kind}", path=path, hint="choose another path, or remove it first")
    with new_file(path, overwrite) as temporary:
        write_at(temporary.fd, value.encode(), 0)
    for finding in lost(temporary.lost):
        note(finding.message)


def _is_text(path: str) -> bool:
    """Whether the start of a file is text, which no checkpoint is; true for a file that is not there."""
    try:
        with open(path, "rb") as file:
            found = file.read(4096)
    except OSError:
        return True  # whoever writes will tell
    return b"\0" not in found and not found.startswith(b"\x80")
