"""File formats, one module each, listed in `registry`: reading a header to an `Archive`, and laying out a new file.

Readers are imported when a file is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptsurgeon.formats.archive_tree import ValueTree
    from ckptsurgeon.storage.opening import Source
    from ckptsurgeon.tensors import Archive, Checkpoint

__all__ = ["read", "read_tree", "tree_of"]


def read(source: Source) -> Archive:
    """As `sniff.read`."""
    from ckptsurgeon.formats import sniff

    return sniff.read(source)


def read_tree(source: Source) -> ValueTree:
    """As `archive_tree.read_tree`, which only a file with a pickle needs."""
    from ckptsurgeon.formats import archive_tree

    return archive_tree.read_tree(source)


def tree_of(seen: Archive | Checkpoint) -> ValueTree:
    """As `archive_tree.tree_of`: all that a file or folder holds whose headers were read."""
    from ckptsurgeon.formats import archive_tree

    return archive_tree.tree_of(seen)
