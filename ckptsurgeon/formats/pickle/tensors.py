"""A tensor as torch has always written it (protocol 2, `_rebuild_tensor_v2`), read in one step instead of some thirty opcodes.

Rule: nothing is read here that the opcodes would not read to the same value. What is spelled otherwise in the least, or keeps a value on
its way that the pickle may ask for again, is left to the opcodes.
"""

from __future__ import annotations

import re
from typing import Any

from ckptsurgeon.formats.pickle.globals import construct
from ckptsurgeon.formats.pickle.state import Machine
from ckptsurgeon.formats.pickle.values import Global, TensorRef

_NUMBER = rb"(?:K.|M..|J....)"
_SIZES = rb"(\(?" + _NUMBER + rb"{1,8}[\x85-\x87t])r(....)"
_TENSOR = re.compile(
    rb"\(\(h(.)h(.)"  # 'storage', its class
    rb"(?:h(.)|j(....)|X(.)\0\0\0([0-9]{1,20})r(....))"  # its key
    rb"h(.)(" + _NUMBER + rb")tr(....)Q"  # where it was, and its length
    rb"(" + _NUMBER + rb")" + _SIZES + _SIZES +  # offset, shape, stride
    rb"\x89h(.)\)Rr(....)tr(....)R",  # requires_grad, hooks
    re.DOTALL,
)  # fmt: skip
_EACH = re.compile(_NUMBER, re.DOTALL)
_ASKED = re.compile(rb"j(?=(....))", re.DOTALL)
_ASKED_LINE = re.compile(rb"g(?=([0-9]{1,19})\n)")
_SMALL = frozenset(place.to_bytes(4, "little") for place in range(256))  # what BINGET can ask for


def asked_for(data: bytes, start: int) -> set[bytes]:
    """The memo's places that the pickle may ask for from `start` on, as LONG_BINPUT writes them: those of every GET, and a few by chance.

    >>> sorted(asked_for(b"j" + bytes([1, 2, 0, 0]) + b"g300" + bytes([10]), 0) - _SMALL)
    [b'\\x01\\x02\\x00\\x00', b',\\x01\\x00\\x00']
    """
    lines = {int(place) for place in _ASKED_LINE.findall(data, start)}
    return {*_SMALL, *_ASKED.findall(data, start), *(place.to_bytes(4, "little") for place in lines if place < 1 << 32)}


def tensor(
    m: Machine, position: int, function: Any, asked: set[bytes], sizes: dict[bytes, tuple[int, ...]]
) -> tuple[TensorRef, int] | None:
    """The tensor whose arguments begin at `position`, for `function`, and where it ends; None where the opcodes must read it.

    `sizes` keeps the shapes and strides that were read.
    """
    found = _TENSOR.match(m.data, position)
    if found is None or type(function) is not Global or function.name != "torch._utils._rebuild_tensor_v2":
        return None
    (word, kind, short, long, length, key, key_put, place, numel, put, offset, shape, shape_put, stride, stride_put, hooks,
     hooks_put, args_put) = found.groups()  # fmt: skip
    if not asked.isdisjoint((put, shape_put, stride_put, hooks_put, args_put, key_put)):
        return None
    memo = m.memo
    made = memo.get(hooks[0])
    if type(made) is not Global or made.name != "collections.OrderedDict":
        return None
    if key is not None:
        if len(key) != length[0]:
            return None
        name: Any = key.decode()
    else:
        name = memo.get(short[0] if short is not None else int.from_bytes(long, "little"))
    dims, steps = sizes.get(shape) or _sizes(shape, sizes), sizes.get(stride) or _sizes(stride, sizes)
    if not dims or not steps or word[0] not in memo or kind[0] not in memo or place[0] not in memo:
        return None
    storage = m.persistent((memo[word[0]], memo[kind[0]], name, memo[place[0]], _number(numel)))
    return construct(function, (storage, _number(offset), dims, steps, False, None)), found.end()


def _number(raw: bytes) -> int:
    return int.from_bytes(raw[1:], "little", signed=len(raw) == 5)


def _sizes(raw: bytes, known: dict[bytes, tuple[int, ...]]) -> tuple[int, ...]:
    """The numbers of a tuple; none where it is no whole tuple of them."""
    numbers = tuple([_number(one) for one in _EACH.findall(raw[raw[:1] == b"(" : -1])])
    end = b"t" if raw[:1] == b"(" else bytes([0x84 + len(numbers)])
    if raw[-1:] != end:
        return ()
    known[raw] = numbers
    return numbers
