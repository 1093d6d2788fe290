"""The rarer pickle opcodes, one function each, and the table of them; `machine` has the frequent ones.

Names as in CPython's `pickletools`. None of them imports or calls what a pickle names.
"""

from __future__ import annotations

import codecs
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from ckptsurgeon.errors import FormatError
from ckptsurgeon.formats.pickle.globals import construct, create, describe, set_items
from ckptsurgeon.formats.pickle.state import NO_FRAME, Machine, TruncatedPickle
from ckptsurgeon.formats.pickle.values import Inert, NumpyArray, NumpyDType, Opaque, PickledDict, TensorRef
from ckptsurgeon.limit_table import allowed, exceeded


def _pop(m: Machine) -> None:
    # A MARK is a list of its own here, so POP on an empty one drops the mark.
    if m.stack:
        m.stack.pop()
    else:
        m.stack = m.outer.pop()


def _build(m: Machine) -> None:
    state = m.stack.pop()
    target = m.stack[-1]
    kind = type(target)
    if kind is Inert:
        target.state = state
    elif kind is PickledDict:
        _set_attributes(m, target, state)
    elif kind is NumpyDType:
        if type(state) is tuple and len(state) > 1 and type(state[1]) is str:
            target.byteorder = state[1]
    elif kind is NumpyArray:
        target.shape = state[1] if type(state) is tuple and len(state) > 1 else ()
    elif kind is not TensorRef:
        raise FormatError(f"the pickle sets attributes on {describe(target)}")
    elif not target.parameter or type(state) not in (tuple, list) or len(state) != 3:
        # A Parameter's state of three says how it is trained. Any other, and a plain tensor's, is a storage, or a tensor, to take instead.
        raise FormatError("the pickle replaces a tensor's values after the tensor was made")


def _set_attributes(m: Machine, target: PickledDict, state: Any) -> None:
    """An OrderedDict's own attributes: those that it has stay, and none may hide a method by which its items are read."""
    if state is None or state == ():
        return
    if type(state) is not PickledDict or any(type(name) is str and hasattr(OrderedDict, name) for name in state):
        raise FormatError("the pickle sets attributes on a dict that are none, or that hide its methods")
    m.spend(len(state))
    target.state = {**getattr(target, "state", {}), **state}


def _items(target: Inert) -> list[Any]:
    if target.items is None:
        target.items = []
    return target.items


def _extend(m: Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif type(target) is Inert:
        _items(target).extend(items)
    else:
        raise FormatError(f"the pickle appends to {describe(target)}")


def _appends(m: Machine) -> None:
    _extend(m, m.pop_mark())


def _set(m: Machine, target: Any, items: list[Any]) -> None:
    if len(items) % 2:
        raise FormatError("the pickle sets a key without a value")
    if type(target) is PickledDict:
        set_items(target, items[::2], items[1::2])
    elif type(target) is Inert:
        _items(target).extend(items)
    else:
        raise FormatError(f"the pickle sets an item of {describe(target)}")


def _setitem(m: Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _set(m, m.stack[-1], [key, value])


def _setitems(m: Machine) -> None:
    items = m.pop_mark()
    _set(m, m.stack[-1], items)


def _dict(m: Machine) -> None:
    items = m.pop_mark()
    result = PickledDict()
    _set(m, result, items)
    m.stack.append(result)


def _instance(m: Machine) -> None:
    module, name = m.line().decode("ascii", "replace"), m.line().decode("ascii", "replace")
    args = tuple(m.pop_mark())
    m.charge(args)
    m.push_global(module, name)
    m.stack[-1] = construct(m.stack[-1], args)


def _object(m: Machine) -> None:
    function, *items = m.pop_mark()
    args = tuple(items)
    m.charge(args)
    m.stack.append(construct(function, args))


def _newobj(m: Machine) -> None:
    args = m.stack.pop()
    m.charge(args)
    m.stack[-1] = create(m.stack[-1], args)


def _newobj_ex(m: Machine) -> None:
    kwargs, args = m.stack.pop(), m.stack.pop()
    m.charge(args)
    m.stack[-1] = create(m.stack[-1], args) if not kwargs else Inert(describe(m.stack[-1]), (args, kwargs))


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.push_global(module, name)


def _extension(size: int) -> Callable[[Machine], None]:
    return lambda m: m.push_global("copyreg", f"extension_{m.number(size)}")


def _check_integer(length: int, what: str) -> None:
    most = allowed("integer-bytes")
    if length > most:
        raise exceeded("integer-bytes", f"the pickle has an integer of {length:,} {what}, above the limit of {most:,}", length)


def _long(size: int) -> Callable[[Machine], None]:
    def handler(m: Machine) -> None:
        length = m.number(size)
        _check_integer(length, "bytes")
        m.stack.append(int.from_bytes(m.take(length), "little", signed=True))

    return handler


def _text(size: int) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(m.take(m.number(size)).decode("utf-8", "surrogatepass"))


def _bytes(size: int) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(m.take(m.number(size)))


def _old_text(size: int) -> Callable[[Machine], None]:
    # Python 2's str: text wherever it is UTF-8, as torch.load reads it.
    def handler(m: Machine) -> None:
        raw = m.take(m.number(size))
        try:
            m.stack.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            m.stack.append(raw)

    return handler


def _old_line(m: Machine) -> None:
    raw = m.line()
    if len(raw) < 2 or raw[:1] not in b"'\"" or raw[-1:] != raw[:1]:
        raise FormatError("the pickle has a text without quotes")
    m.stack.append(codecs.escape_decode(raw[1:-1])[0].decode("utf-8"))


# Numbers in lines, as Python writes them. What it does not write, such as 010 or 1_0, readers take for different numbers, or for none.
_INTEGER = re.compile(rb"0|-?[1-9][0-9]*")
_FLOAT = re.compile(rb"-?(?:[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?|inf|nan)")
_SLOT = re.compile(rb"0|[1-9][0-9]{0,18}")


def _number_line(m: Machine, form: re.Pattern[bytes], suffix: bytes = b"") -> bytes:
    raw = m.line()
    _check_integer(len(raw), "digits")
    number = raw.removesuffix(suffix)
    if form.fullmatch(number) is None:
        raise FormatError("the pickle has a number that is not written as Python writes it")
    return number


def _int_line(m: Machine) -> None:
    if m.data.startswith((b"00\n", b"01\n"), m.position):
        m.stack.append(m.line() == b"01")
    else:
        m.stack.append(int(_number_line(m, _INTEGER)))


def _slot(m: Machine) -> int:
    return int(_number_line(m, _SLOT))


def _frame(m: Machine) -> None:
    size = m.number(8)
    if m.position + size > len(m.data):
        m.position = len(m.data)
        raise TruncatedPickle("the pickle ends too early: the file is truncated")
    if m.frame != NO_FRAME:
        raise FormatError("the pickle has a frame within another")
    if size:
        m.frame = m.position + size


def _tuple3(m: Machine) -> None:
    last, middle = m.stack.pop(), m.stack.pop()
    m.stack[-1] = (m.stack[-1], middle, last)


def _put(m: Machine) -> None:
    if m.skipped:
        raise m.two_ways()
    m.memo[_slot(m)] = m.stack[-1]
    if len(m.memo) > allowed("pickle-memo"):
        raise m.full()


def _list(m: Machine) -> None:
    items = m.pop_mark()
    m.stack.append(items)


def _frozenset(m: Machine) -> None:
    m.pop_mark()
    m.stack.append(Opaque("a set"))


def _protocol(m: Machine) -> None:
    version = m.number(1)
    if version > 5:
        raise FormatError(f"the pickle is of protocol {version}, which no Python writes")


RARE: dict[int, Callable[[Machine], object]] = {
    ord("0"): _pop,
    ord("1"): Machine.pop_mark,
    ord("2"): lambda m: m.stack.append(m.stack[-1]),
    ord("F"): lambda m: m.stack.append(float(_number_line(m, _FLOAT))),
    ord("G"): lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
    ord("I"): _int_line,
    ord("L"): lambda m: m.stack.append(int(_number_line(m, _INTEGER, b"L"))),
    ord("N"): lambda m: m.stack.append(None),
    ord("P"): lambda m: m.stack.append(m.persistent(m.line().decode("ascii"))),
    ord("S"): _old_line,
    ord("T"): _old_text(4),
    ord("U"): _old_text(1),
    ord("B"): _bytes(4),
    ord("C"): _bytes(1),
    ord("V"): lambda m: m.stack.append(m.line().decode("raw-unicode-escape")),
    ord("b"): _build,
    ord("a"): lambda m: _extend(m, [m.stack.pop()]),
    ord("e"): _appends,
    ord("s"): _setitem,
    ord("u"): _setitems,
    ord("d"): _dict,
    ord("l"): _list,
    ord("]"): lambda m: m.stack.append([]),
    ord("}"): lambda m: m.stack.append(PickledDict()),
    ord("c"): lambda m: m.push_global(m.line().decode("utf-8", "replace"), m.line().decode("utf-8", "replace")),
    ord("i"): _instance,
    ord("o"): _object,
    ord("g"): lambda m: m.stack.append(m.memo[_slot(m)]),
    ord("p"): _put,
    0x80: _protocol,
    0x81: _newobj,
    0x82: _extension(1),
    0x83: _extension(2),
    0x84: _extension(4),
    0x87: _tuple3,
    0x88: lambda m: m.stack.append(True),
    0x8A: _long(1),
    0x8B: _long(4),
    0x8C: _text(1),
    0x8D: _text(8),
    0x8E: _bytes(8),
    0x8F: lambda m: m.stack.append(Inert("builtins.set")),  # its members are not needed, and hashing them could be slow
    0x90: _appends,
    0x91: _frozenset,
    0x92: _newobj_ex,
    0x93: _stack_global,
    0x95: _frame,
    0x96: _bytes(8),
}
