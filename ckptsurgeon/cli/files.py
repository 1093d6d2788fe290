"""Small files of the commands: lists of names that they read, and text that they write, atomically as every output."""

from __future__ import annotations

import json
from typing import Any

from ckptsurgeon.errors import FormatError, OutputError, SettingsError
from ckptsurgeon.formats import json_text
from ckptsurgeon.parameter_types import Note
from ckptsurgeon.storage.copying import write_at
from ckptsurgeon.storage.opening import open_regular
from ckptsurgeon.streaming.atomic import check_free, lost, new_file


def name_list(path: str) -> tuple[str, ...]:
    """The names in a file: a JSON list of them, or one a line.

    Raises:
        UnreadableError: the file does not exist, or is no regular file.
        FormatError: the file is no text, or JSON of anything but a list of names.
    """
    with open_regular(path) as file:
        raw = json_text.whole(file)
    if raw.lstrip()[:1] == b"[":
        names = json_text.parse(raw, path, "list of names")
        if not all(type(name) is str for name in names):
            raise FormatError("holds something other than names in its list", path=path, hint='write ["a.weight", "a.bias"]')
        return tuple(names)
    try:
        return tuple(line.strip() for line in raw.decode("utf-8").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise FormatError("is no text", path=path, hint="give a file with one name a line") from error


def refuse_output(path: str | None, overwrite: bool, usual: str) -> None:
    """Raises, before the work is done, for an output that can't be written; `usual` is the name that a hint offers.

    Raises:
        OutputError: the path exists already and `overwrite` is not given, or it can't be written.
        SettingsError: `overwrite` without a path.
    """
    if path is not None:
        check_free(path, overwrite)
    elif overwrite:
        words = "replaces what -o names, and none is named"
        raise SettingsError(words, key="--overwrite", hint=f"leave it out, or add -o {usual}")


def write_json(path: str, value: dict[str, Any], overwrite: bool, note: Note) -> None:
    """Write a JSON value, indented, with a newline at its end; `note` gets the attributes of a replaced file that could not be kept.

    Raises:
        OutputError: the path exists already, can't be written, or holds a file that is no text, such as a checkpoint.
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=True) + "\n", overwrite, note, "JSON")


def write_text(path: str, value: str, overwrite: bool, note: Note, kind: str = "text") -> None:
    """Write a text; otherwise as `write_json`."""
    if overwrite and not _is_text(path):
        raise OutputError(f"is no text, and would be replaced by {kind}", path=path, hint="choose another path, or remove it first")
    with new_file(path, overwrite) as temporary:
        write_at(temporary.fd, value.encode(), 0)
    for finding in lost(temporary.lost):
        note(finding.message)


def _is_text(path: str) -> bool:
    """Whether a file begins as text, which no checkpoint does; True for a file that does not exist."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        return True  # writing raises the error
    return b"\0" not in head and not head.startswith(b"\x80")
