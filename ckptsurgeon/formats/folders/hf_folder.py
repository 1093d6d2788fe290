"""The files of a folder: which one holds its weights, or indexes them, in Hugging Face's layout, and those that an index names.

A name decides which file; its content decides its format. An index names plain names beside it; a link may lead only to a regular file in
that folder or, in a Hugging Face cache, into the `blobs` of the same model.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace

from ckptsurgeon.errors import FormatError, UnreadableError
from ckptsurgeon.formats.folders import parts
from ckptsurgeon.formats.registry import SUFFIXES, of_folder
from ckptsurgeon.hints import shortened
from ckptsurgeon.storage.local import unreadable
from ckptsurgeon.tensors import Archive, FileStamp

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


def member(index: str, folder: str, name: str, what: str = "shard") -> str:
    """The path of the file of this name that `index` names. FormatError where it is no plain name or leads elsewhere, UnreadableError where
    nothing is there."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise FormatError(f"names the {what} {name[:200]!r}, which is not a plain file name", path=index)
    path = os.path.join(folder, name)
    if os.path.islink(path):
        check_link(index, folder, name, what)
    if not os.path.exists(path):
        raise UnreadableError(f"lacks its {what} {name!r}", path=index, hint="download the whole folder again")
    return path


def check_link(index: str, folder: str, name: str, what: str = "shard", opened: FileStamp | None = None) -> None:
    """FormatError where a link leads out of the folders that it may lead to; with `opened`, also where it no longer leads to that file."""
    real, home = os.path.realpath(os.path.join(folder, name)), os.path.realpath(folder or ".")
    before, cache, after = home.rpartition("/models--")
    blobs = f"{before}{cache}{after.partition('/')[0]}/blobs" if cache else home
    if not real.startswith((f"{home}/", f"{blobs}/")):
        raise FormatError(f"names the {what} {name!r}, a link that leads out of its folder", path=index)
    if opened is not None:
        try:
            status = os.lstat(real)
        except OSError as error:
            raise unreadable(real, error) from error
        if (status.st_dev, status.st_ino) != (opened.device, opened.inode):
            raise FormatError(f"names the {what} {name!r}, a link that was changed while it was read", path=index)
