"""Tensors as torch has always written them (protocol 2, `_rebuild_tensor_v2`), read in one step instead of some thirty opcodes each.

Rule: the result is the value that the opcodes would give. A tensor that is written in any other way, or that puts a value into the memo
which the pickle may read again, is left to the opcodes.
"""

from __future__ import annotations

import re
from typing import Any

from ckptsurgeon.formats.pickle.globals import construct, extent, view
from ckptsurgeon.formats.pickle.state import Machine
from ckptsurgeon.formats.pickle.values import Global, StorageRef

_NUMBER = rb"(?:K.|M..|J....)"
_SIZES = rb"(\(?" + _NUMBER + rb"{1,8}[\x85-\x87t])r(....)"
_TENSOR = re.compile(
    rb"\((\(h(.)h(.)"  # the storage: 'storage', its class
    rb"(?:h(.)|j(....)|X(.)\0\0\0([0-9]{1,20})r(....))"  # its key
    rb"h(.)(" + _NUMBER + rb")t)r(....)Q"  # where it was, and its length
    rb"(" + _NUMBER + rb")" + _SIZES + _SIZES +  # offset, shape, stride
    rb"\x89h(.)\)Rr(....)tr(....)R",  # requires_grad, hooks
    re.DOTALL,
)  # fmt: skip
_NEXT = re.compile(rb"r(....)h(.)(?=\(\()", re.DOTALL)  # after a tensor's key: the function that makes it
_EACH = re.compile(_NUMBER, re.DOTALL)
_GET = re.compile(rb"j(?=(....))", re.DOTALL)
_GET_LINE = re.compile(rb"g(?=([0-9]{1,19})\n)")
_SMALL = frozenset(slot.to_bytes(4, "little") for slot in range(256))  # the slots that BINGET can name


def memo_reads(data: bytes, start: int) -> set[bytes]:
    """The slots of the memo that the pickle may read from `start` on, as LONG_BINPUT writes them: those of every GET, and a few by chance.

    >>> sorted(memo_reads(b"j" + bytes([1, 2, 0, 0]) + b"g300" + bytes([10]), 0) - _SMALL)
    [b'\\x01\\x02\\x00\\x00', b',\\x01\\x00\\x00']
    """
    lines = {int(slot) for slot in _GET_LINE.findall(data, start)}
    return {*_SMALL, *_GET.findall(data, start), *(slot.to_bytes(4, "little") for slot in lines if slot < 1 << 32)}


Extents = dict[
    tuple[bytes, bytes], tuple[tuple[int, ...], tuple[int, ...], int]
]  # shape, stride and `extent`, by their bytes in the pickle


def tensors(m: Machine, position: int, stack: list[Any], reads: set[bytes], extents: Extents) -> int | None:
    """Replace the function on top of `stack` by the tensor whose arguments begin at `position`, and push each key and tensor that follow;
    return the offset where they end. None where the opcodes must read even the first.

    `extents` caches shapes and strides that were read.
    """
    function = stack[-1]
    if type(function) is not Global or function.name != "torch._utils._rebuild_tensor_v2":
        return None
    data, memo, persistent, match, following = m.data, m.memo, m.persistent, _TENSOR.match, _NEXT.match
    storages: dict[bytes, Any] = {}  # by their bytes in the pickle, where these write nothing to the memo
    end, key = None, None
    while (tensor_match := match(data, position)) is not None:
        (spelled, word, kind, short, long, length, digits, digits_put, location, numel, put, offset, shape, shape_put, stride, stride_put,
         hooks, hooks_put, args_put) = tensor_match.groups()  # fmt: skip
        if not reads.isdisjoint((put, shape_put, stride_put, hooks_put, args_put, digits_put)):
            break
        ordered_dict = memo.get(hooks[0])
        if type(ordered_dict) is not Global or ordered_dict.name != "collections.OrderedDict":
            break
        dims, steps, reach = extents.get((shape, stride)) or (_sizes(shape), _sizes(stride), None)
        if not dims or not steps:
            break
        storage = storages.get(spelled)
        if storage is None:
            if digits is None:
                name = memo.get(short[0] if short is not None else int.from_bytes(long, "little"))
            elif len(digits) == length[0]:
                name = digits.decode()
            else:
                break
            if word[0] not in memo or kind[0] not in memo or location[0] not in memo:
                break
            storage = persistent((memo[word[0]], memo[kind[0]], name, memo[location[0]], _number(numel)))
            if digits is None:
                storages[spelled] = storage
        if type(storage) is not StorageRef or storage.dtype is None or len(dims) != len(steps):
            tensor = construct(function, (storage, _number(offset), dims, steps, False, None))
        else:
            if reach is None:
                reach = extent(dims, steps)
                extents[shape, stride] = dims, steps, reach
            tensor = view(storage, storage.dtype, _number(offset), dims, steps, reach)
        if key is None:
            stack[-1] = tensor
        else:
            stack += (key, tensor)
        m.dropped += 6
        end = tensor_match.end()
        if (
            data.startswith(b"r", end) and data[end + 1 : end + 5] not in reads and end + 5 < len(data)
        ):  # the tensor itself is put into the memo
            end += 5
            m.dropped += 1
        begin = end + 5
        stop = begin + int.from_bytes(data[end + 1 : begin], "little")
        head = following(data, stop) if data.startswith(b"X", end) else None  # the next key is text, as torch writes it
        if head is None or head[1] in reads or memo.get(head[2][0]) is not function:
            break
        text = data[begin:stop]
        if not text.isascii():
            break
        key, position = text.decode(), head.end()
    return end


def _number(raw: bytes) -> int:
    return int.from_bytes(raw[1:], "little", signed=len(raw) == 5)


def _sizes(raw: bytes) -> tuple[int, ...]:
    """The numbers of a tuple; an empty tuple where the bytes are not a whole tuple of numbers."""
    numbers = tuple([_number(number) for number in _EACH.findall(raw[raw[:1] == b"(" : -1])])
    end = b"t" if raw[:1] == b"(" else bytes([0x84 + len(numbers)])
    return numbers if raw[-1:] == end else ()
