"""The values that the opcode machine makes from a pickle: plain Python values, and inert stand-ins for everything else.

A stand-in has no behaviour: it only has a name, and the values that the pickle gave it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ckptsurgeon.dtypes import DType


class PickledDict(dict[Any, Any]):
    """A dict, or a dict subclass of the allow-list; `state` is the state that a BUILD opcode set (torch keeps `_metadata` there)."""

    __slots__ = ("state",)
    state: Any


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A global that the pickle names; it is never imported."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class StorageClass:
    """A torch storage class; `dtype` is None for `UntypedStorage`."""

    dtype: DType | None


@dataclass(slots=True, eq=False)
class Inert:
    """A stand-in for an object, or the result of a call, of a global that is not on the allow-list."""

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

    `lazy` is as in `Span`. `parameter` marks a Parameter, whose state may set other attributes than a plain tensor's.
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
    """A plain value that no state_dict needs and that is not read further: a device, a memory layout, a set."""

    what: str


@dataclass(slots=True, eq=False)
class NumpyDType:
    """A NumPy dtype by its type string, such as `f8`."""

    code: str
    byteorder: str = "<"


@dataclass(slots=True, eq=False)
class NumpyArray:
    """A NumPy array; its bytes are not read."""

    shape: Any = ()


@dataclass(frozen=True, slots=True, eq=False)
class TupleKey:
    """A dict key that is a tuple, kept as text. It is hashed by identity, since tuples of chosen integers can make a dict very slow."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Bytes that a protocol-2 pickle writes as text and a codec; the codec can encode the text."""

    text: str
    codec: str

    @property
    def raw(self) -> bytes:
        """The bytes."""
        return self.text.encode(self.codec)
