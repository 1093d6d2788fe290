"""Which file of a Hugging Face folder holds its weights, or indexes them. Its name decides which file; its content decides its format."""

from __future__ import annotations

import os
import re
from dataclasses import replace

from ckptsurgeon.errors import UnreadableError
from ckptsurgeon.formats.folders import parts
from ckptsurgeon.formats.registry import SUFFIXES, of_folder
from ckptsurgeon.hints import shortened
from ckptsurgeon.storage.local import unreadable
from ckptsurgeon.tensors import Archive

# In the order in which Hugging Face's own loaders look.
FOLDER_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
)


def names_in(folder: str) -> list[str]:
    """The names in a folder, in order. UnreadableError where it can't be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from error


def _names_in(folder: str) -> list[str]:
    """The names in a folder; none where it can't be read."""
    try:
        return names_in(folder)
    except UnreadableError:
        return []


def find_in_folder(folder: str) -> str:
    """The file of a Hugging Face folder that holds or indexes its weights. UnreadableError, with what is there, when none does."""
    names = names_in(folder)
    for name in FOLDER_NAMES:
        if name in names:
            return os.path.join(folder, name)
    indexes = [name for name in names if name.endswith(".index.json")]
    if len(indexes) == 1:
        return os.path.join(folder, indexes[0])
    if (part := parts.of_folder(names)) is not None:
        raise parts.refused(part, folder)
    below = {path: _names_in(path) for name in names if os.path.isdir(path := os.path.join(folder, name))}
    within = [path for path, found in below.items() if of_folder(found) is not None or parts.of_folder(found) is not None]
    if within:
        hint = f"give one of them: {', '.join(map(parts.word, within[:5]))}"
        raise UnreadableError("is a folder without a checkpoint of its own, with folders of ranks' files in it", path=folder, hint=hint)
    files = [name for name in names if name.endswith(tuple(SUFFIXES))]
    hint = (
        f"give a file in it: {', '.join(os.path.join(folder, name) for name in files[:5])}"
        if files
        else "give a checkpoint file, or a folder with model.safetensors or an index"
    )
    raise UnreadableError("is a folder without a Hugging Face checkpoint", path=folder, hint=hint)


_NUMBER = re.compile(r"[-_.]\d+[-_]of[-_]\d+(?=\.)|\.index\.json$", re.ASCII)


def with_unread(archive: Archive) -> Archive:
    """The checkpoint of a folder or an index, with a note on files beside it that by their names are shards of it, or it in one file or
    in shards, and are not read."""
    folder, read = os.path.dirname(archive.path), {os.path.basename(stamp.path) for stamp in archive.files}
    kinds = {_NUMBER.sub("", name) for name in read}
    unread = [name for name in _names_in(folder or ".") if name not in read and _NUMBER.sub("", name) in kinds]
    if not unread:
        return archive
    note = f"beside it, and not read: {', '.join(shortened(unread))}"
    return replace(archive, notes=tuple(dict.fromkeys((*archive.notes, note))))
