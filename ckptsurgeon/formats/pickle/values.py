"""What the opcode machine makes of a pickle: plain Python values, and inert stand-ins for everything else.

None of these does anything: a stand-in only has a name, and whatever the pickle put into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ckptsurgeon.dtypes import DType


class PickledDict(dict[Any, Any]):
    """A dict, or a dict subclass of the allow-list; `state` is what a BUILD gave it (torch puts `_metadata` there)."""

    __slots__ = ("state",)
    state: Any


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A name that the pickle asked for; never imported."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class StorageClass:
    """A torch storage class; `dtype` is None for `UntypedStorage`."""

    dtype: DType | None


@dataclass(slots=True, eq=False)
class Inert:
    """Stands for an object of a class, or the result of a call, beyond the allow-list."""

    name: str
    args: Any = ()
    state: Any = None
    items: list[Any] | None = None


@dataclass(slots=True, eq=False)
class StorageRef:
    """A storage: its key in the file, dtype (None if untyped), and length in elements (bytes if untyped).

    `start` (in bytes) is where a legacy storage view begins within the storage that the file holds.
    """

    key: str
    dtype: DType | None
    numel: int
    start: int = 0


@dataclass(slots=True, eq=False)
class TensorRef:
    """A tensor: a storage, an offset into it (in elements of `dtype`), shape and stride (in elements).

    `lazy` is as in `Span`. A `parameter` is a tensor that takes other attributes than a plain one does.
    """

    storage: StorageRef
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    lazy: tuple[str, ...] = ()
    parameter: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """A plain value that no state_dict needs and that has no spelling among ours: a device, a memory layout, a set."""

    what: str


@dataclass(slots=True, eq=False)
class NumpyDType:
    """A NumPy dtype by its type string, such as `f8`."""

    code: str
    byteorder: str = "<"


@dataclass(slots=True, eq=False)
class NumpyArray:
    """A NumPy array; its bytes are left where they are."""

    shape: Any = ()


@dataclass(frozen=True, slots=True, eq=False)
class TupleKey:
    """A dict's key that is a tuple, kept as text: hashed by identity, as tuples of chosen integers can make a dict very slow."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Bytes that a protocol-2 pickle spells as text and a codec, which can spell it."""

    text: str
    codec: str

    @property
    def raw(self) -> bytes:
        """The bytes."""
        return self.text.encode(self.codec)
