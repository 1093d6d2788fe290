"""Which checkpoints a path stands for: a file for itself, a Hugging Face folder for its one, any other folder for all in it and below; a
folder of ranks' files is one, and what else is in it are others.

Names decide here, since a folder holds much else; what a file is, its content tells later. Links to folders are not followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from ckptsurgeon.errors import PartError, UnreadableError
from ckptsurgeon.formats.folders.hf_folder import find_in_folder
from ckptsurgeon.formats.registry import SUFFIXES, of_folder
from ckptsurgeon.tensors import Archive


def expand(path: str) -> list[str]:
    """The files and Hugging Face folders that `path` stands for, in the order of their names; `path` itself where there is nothing."""
    if not os.path.isdir(path):
        return [path]
    return list(_below(path)) or [path]


def size(path: str) -> int:
    """The bytes of a regular file, of anything else 0."""
    try:
        return os.path.getsize(path) if os.path.isfile(path) else 0
    except (OSError, ValueError):
        return 0


def _below(top: str) -> Iterator[str]:
    refused: list[OSError] = []
    for folder, folders, names in os.walk(top, onerror=refused.append):
        if _is_one(folder):
            folders.clear()
            yield folder
            continue
        if (form := of_folder(names)) is not None:
            yield folder
            names = [name for name in names if not form.member(name)]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in sorted(names) if _is_checkpoint(name))
    yield from (str(error.filename) for error in refused if str(error.filename) != top)


def _is_one(folder: str) -> bool:
    try:
        find_in_folder(folder)
    except (UnreadableError, PartError):
        return False
    return True


def _is_checkpoint(name: str) -> bool:
    return name.lower().endswith(tuple(SUFFIXES)) and not name.startswith(".")


def other_checkpoints(path: str, archive: Archive) -> list[str]:
    """In a Hugging Face folder, the other files in it and below that look like checkpoints; those beside ranks' files are looked at."""
    if not os.path.isdir(path) or archive.path == path:
        return []
    taken = {os.path.normpath(stamp.path) for stamp in archive.files}
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(folder, name) for name in sorted(names) if _is_checkpoint(name)]
    return [os.path.relpath(file, path) for file in found if os.path.normpath(file) not in taken]
