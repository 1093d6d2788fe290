"""The pickle of a state_dict, opcode by opcode (protocol 2), as torch's weights-only reader takes it.

It names only globals that `torch.load(weights_only=True)` allows, and needs no torch. Same values, same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import OutputError
from ckptsurgeon.formats.layout import WEIGHTS, OutTensor, Stored
from ckptsurgeon.formats.pickle.unpickled import written_out
from ckptsurgeon.tensors import contiguous_stride

_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
_LONG1_BITS = 8 * 255  # the longest integer of protocol 2's LONG1


def state_dict_pickle(
    tensors: Sequence[OutTensor],
    storage_keys: Mapping[int, str],
    entries: Mapping[str, Any],
    module_metadata: Mapping[str, Any],
    order: Sequence[str],
    around: Any = WEIGHTS,
) -> bytes:
    """The pickle of an OrderedDict of tensors (and other plain `entries`), its keys in `order`, with torch's `_metadata`.

    `around` is the value that is written: the OrderedDict alone, or a training checkpoint in which `Stored` mark it and tensors.
    Raises OutputError, by key, for an entry that is not a plain value.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    parts = [_ORDERED_DICT, b"("]
    for key in order:
        parts.append(_text(key))
        parts.append(_tensor(by_name[key], storage_keys) if key in by_name else _value(key, entries[key]))
    parts.append(b"u")
    if module_metadata:
        parts += [b"}", _text("_metadata"), _ORDERED_DICT, b"("]
        for path, local in written_out(module_metadata).items():
            parts += [_text(path), _value(path, local)]
        parts.append(b"usb")
    weights = b"".join(parts)

    def stored(marker: Stored) -> bytes:
        return weights if marker.name is None else _tensor(by_name[marker.name], storage_keys)

    return b"\x80\x02" + _value("the training state", around, stored) + b"."


def _tensor(tensor: OutTensor, storage_keys: Mapping[int, str]) -> bytes:
    dtype = BY_CODE[tensor.dtype]
    typed = dtype.storage_class is not None
    kind = b"ctorch\n%s\n" % str(dtype.storage_class).encode() if typed else b"ctorch.storage\nUntypedStorage\n"
    length = prod(tensor.shape) if typed else tensor.nbytes
    storage = b"(" + _text("storage") + kind + _text(storage_keys[tensor.storage]) + _text("cpu") + _integer(length) + b"tQ"
    shape, stride = _integers(tensor.shape), _integers(contiguous_stride(tensor.shape))
    body = storage + _integer(0) + shape + stride + b"\x89" + _ORDERED_DICT
    if typed:
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + body + b"tR"
    return b"ctorch._utils\n_rebuild_tensor_v3\n(" + body + b"ctorch\n%s\n" % dtype.torch.encode() + b"tR"


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t" if values else b")"


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K%c" % value
    if 0 <= value < 65536:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a%c" % len(raw) + raw


def _value(key: str, value: Any, stored: Callable[[Stored], bytes] | None = None) -> bytes:
    kind = type(value)
    if stored is not None and kind is Stored:
        return stored(value)
    if value is None:
        return b"N"
    if kind is bool:
        return b"\x88" if value else b"\x89"
    if kind is int and value.bit_length() < _LONG1_BITS:
        return _integer(value)
    if kind is float:
        return b"G" + struct.pack(">d", value)
    if kind is str:
        return _text(value)
    if kind is bytes:
        return b"c_codecs\nencode\n(" + _text(value.decode("latin1")) + _text("latin1") + b"tR"
    if kind in (list, tuple):
        body = b"".join(_value(key, item, stored) for item in value)
        return b"](" + body + b"e" if kind is list else b"(" + body + b"t"
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_value(key, name) + _value(key, item, stored) for name, item in value.items()) + b"u"
    raise OutputError(f"has a value of type {kind.__name__} that can't be written", key=key, hint="leave it out with --drop")
