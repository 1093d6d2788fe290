"""One module per container: sniff by content, read the header into an `Archive`, lay out a new file. Knows no rule and no model."""

from ckptsurgeon.formats.sniff import read

__all__ = ["read"]
