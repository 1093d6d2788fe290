"""One module per container: sniff by content, read the header into an `Archive`, lay out a new file. Knows no rule and no model."""

from ckptsurgeon.formats.archive_tree import ValueTree, read_tree
from ckptsurgeon.formats.registry import read

__all__ = ["ValueTree", "read", "read_tree"]
