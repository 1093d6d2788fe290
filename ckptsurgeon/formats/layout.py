"""The layout of a new file, as plain values: the formats make it, and `streaming` writes the file by it; and the record that a merge writes
about itself: its name in each format, and how it is read back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ckptsurgeon.dtypes import BY_CODE

Chunk = tuple[int, bytes]  # offset in the file, bytes
_LEAST = 1 << 20
RECORD = "ckptsurgeon.json"  # the entry of a torch zip file
RECORD_KEY = "ckptsurgeon"  # the key of a safetensors file's metadata


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Where the bytes of a tensor are copied from: the number of the file among those of all sources, and the offset of its first byte
    there. Of a tensor that is joined of several ranges it is the place of the longest, moved back to where the tensor would begin."""

    file: int
    offset: int


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor to write, dense and row-major. Tensors of one `storage` number are tied: they have the same bytes.

    `origin` is None where its value is computed.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: int
    origin: Origin | None = None

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * BY_CODE[self.dtype].size


@dataclass(frozen=True, slots=True)
class Stored:
    """A placeholder in a value such as a training checkpoint: for the tensor of that name, or the state_dict where the name is None."""

    name: str | None = None


WEIGHTS = Stored()


@dataclass(frozen=True)
class Contents:
    """The contents of a new file, independent of its format.

    Attributes:
        tensors: in the order of the state_dict.
        aliases: tied keys that are left out, each with the tied key that is written.
        entries: the values that are no tensors, by key.
        module_metadata: torch's `_metadata`.
        order: all keys, those of entries among them.
        record: the merge's record of itself, as JSON, or None.
        around: the value that contains the state_dict, as for `state_dict_pickle`.
    """

    tensors: Sequence[OutTensor]
    aliases: Mapping[str, str]
    entries: Mapping[str, Any]
    module_metadata: Mapping[str, Any]
    order: Sequence[str]
    record: str | None
    around: Any = WEIGHTS


@dataclass(frozen=True, slots=True)
class Slot:
    """A place of `nbytes` bytes at `offset` for the tensor `index` of the tensors laid out."""

    offset: int
    nbytes: int
    index: int


def follows_origins(sizes: Iterable[int]) -> bool:
    """Whether a file with tensors of these sizes is laid out so that most bytes can be shared with the files that they are copied from:
    from 1 MiB on."""
    return sum(sizes) >= _LEAST


def no_tail(_checksums: Sequence[int]) -> tuple[Chunk, ...]:
    """Nothing follows the data."""
    return ()


@dataclass(frozen=True)
class Layout:
    """A new file of `size` bytes: `slots` for the tensors' data, and `chunks` of bytes that are known before the data.

    Where `checksums` is set, `tail` makes the last chunks from the CRC-32 of each slot's bytes, in the slots' order.
    """

    slots: tuple[Slot, ...]
    chunks: tuple[Chunk, ...]
    size: int
    checksums: bool = False
    tail: Callable[[Sequence[int]], tuple[Chunk, ...]] = no_tail


@dataclass(frozen=True)
class OutFile:
    """One file of an output.

    Attributes:
        name: its name in the output folder; `""` where the output is this one file.
        tensors: its tensors.
        entries: its values that are no tensors.
        layout: its layout; the slots' indexes are those of `tensors`.
    """

    name: str
    tensors: Sequence[OutTensor]
    entries: Mapping[str, Any]
    layout: Layout

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors, those of tied ones once."""
        return sum(slot.nbytes for slot in self.layout.slots)


def parse_provenance(raw: bytes | str) -> Mapping[str, Any] | None:
    """A merge's record about itself; None where it can't be read, since a bad record is no reason to refuse weights."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    fresh = record.get("fresh") if isinstance(record, dict) else None
    return record if isinstance(fresh, list) and all(isinstance(key, str) for key in fresh) else None
