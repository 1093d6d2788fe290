"""One module per container, each a line of `registry`: header to `Archive`, layout of a new file. Knows no rule and no model.

Readers are imported when a file is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptsurgeon.formats.archive_tree import ValueTree
    from ckptsurgeon.storage.opening import Source
    from ckptsurgeon.tensors import Archive

__all__ = ["read", "read_tree"]


def read(source: Source) -> Archive:
    """As `sniff.read`."""
    from ckptsurgeon.formats import sniff

    return sniff.read(source)


def read_tree(source: Source) -> ValueTree:
    """As `archive_tree.read_tree`, which only a file with a pickle needs."""
    from ckptsurgeon.formats import archive_tree

    return archive_tree.read_tree(source)
