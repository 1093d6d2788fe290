"""The files that an index names: each a plain name beside it. A link may lead only to a regular file in that folder or, in a Hugging Face
cache, into the `blobs` of the same model."""

from __future__ import annotations

import os

from ckptsurgeon.errors import FormatError, UnreadableError
from ckptsurgeon.storage.local import unreadable
from ckptsurgeon.tensors import FileStamp


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
