"""Lists the checkpoints of a path: a file is one, a Hugging Face folder is one, and any other folder stands for all in it and below.

A folder of files that ranks saved is one checkpoint, and its other files are checkpoints of their own. Files are chosen by name, since a
folder holds other files too; their formats are detected from their content later. Symbolic links to folders are not followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from ckptsurgeon.errors import PartError, UnreadableError
from ckptsurgeon.formats.folders.hf_folder import find_in_folder
from ckptsurgeon.formats.registry import SUFFIXES, of_folder
from ckptsurgeon.tensors import Archive


def expand(path: str) -> list[str]:
    """The files and Hugging Face folders of `path`, in the order of their names; `path` itself if there are none."""
    if not os.path.isdir(path):
        return [path]
    return list(_below(path)) or [path]


def size(path: str) -> int:
    """The size of a regular file in bytes; 0 for anything else."""
    try:
        return os.path.getsize(path) if os.path.isfile(path) else 0
    except (OSError, ValueError):
        return 0


def _below(top: str) -> Iterator[str]:
    refused: list[OSError] = []
    for folder, folders, names in os.walk(top, onerror=refused.append):
        if _is_hf_folder(folder):
            folders.clear()
            yield folder
            continue
        if (folder_format := of_folder(names)) is not None:
            yield folder
            names = [name for name in names if not folder_format.member(name)]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in sorted(names) if _is_checkpoint(name))
    yield from (str(error.filename) for error in refused if str(error.filename) != top)


def _is_hf_folder(folder: str) -> bool:
    try:
        find_in_folder(folder)
    except (UnreadableError, PartError):
        return False
    return True


def _is_checkpoint(name: str) -> bool:
    return name.lower().endswith(tuple(SUFFIXES)) and not name.startswith(".")


def other_checkpoints(path: str, archive: Archive) -> list[str]:
    """The files in a Hugging Face folder and below that look like checkpoints and are no part of `archive`, relative to `path`."""
    if not os.path.isdir(path) or archive.path == path:
        return []
    own_files = {os.path.normpath(stamp.path) for stamp in archive.files}
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [os.path.join(folder, name) for name in sorted(names) if _is_checkpoint(name)]
    return [os.path.relpath(file, path) for file in files if os.path.normpath(file) not in own_files]
