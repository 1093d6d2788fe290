"""One module per container: sniff by content, read the header into an `Archive`, lay out a new file. Knows no rule and no model."""

from ckptsurgeon.formats.sniff import read
from ckptsurgeon.formats.tree import ValueTree, read_tree

__all__ = ["ValueTree", "read", "read_tree"]
