"""How a new file will look before a byte of it is written: pure values that the formats make and `streaming` carries out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ckptsurgeon.dtypes import BY_CODE

Chunk = tuple[int, bytes]  # offset in the file, bytes


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor to write, dense and row-major. Tensors of one `storage` number are tied: they have the same bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * BY_CODE[self.dtype].size


@dataclass(frozen=True, slots=True)
class Stored:
    """Stands in a value, such as a training checkpoint, for the tensor of that name; for the state_dict itself where the name is None."""

    name: str | None = None


WEIGHTS = Stored()


@dataclass(frozen=True)
class Contents:
    """What a new file is to hold, whatever its format.

    Attributes:
        tensors: in the order of the state_dict.
        aliases: tied keys that are left out, each with the key that stands for it.
        entries: the values that are no tensors, by key.
        module_metadata: torch's `_metadata`.
        order: all keys, those of entries among them.
        record: what a merge tells of itself, as JSON, or None.
        around: the value in which the state_dict stands, as for `state_dict_pickle`.
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


def no_tail(_checksums: Sequence[int]) -> tuple[Chunk, ...]:
    """Nothing follows the data."""
    return ()


@dataclass(frozen=True)
class Layout:
    """A file to be: the `slots` for data, the `chunks` known before, `size` in all.

    Where `checksums` is set, the CRC-32 of each slot's bytes, in the slots' order, makes the last chunks through `tail`.
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
        name: what it is called in its folder; `""` where the output is this one file.
        tensors: its tensors.
        entries: its values that are no tensors.
        layout: how it lies on disk; the slots' indexes are those of `tensors`.
    """

    name: str
    tensors: Sequence[OutTensor]
    entries: Mapping[str, Any]
    layout: Layout

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors, those of tied ones once."""
        return sum(slot.nbytes for slot in self.layout.slots)
