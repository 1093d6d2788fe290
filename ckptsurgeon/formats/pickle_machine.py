"""A small, bounded machine for pickle opcodes. It imports nothing, calls nothing and knows no class.

Rule: one pass over the bytes, a stack, a memo, and values of `pickle_values`; whatever the allow-list does not know becomes inert.
It must never use `pickle`, and never raise anything but a CheckpointError. Opcodes as in CPython's `pickletools`.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.errors import CheckpointError, FormatError, LimitError
from ckptsurgeon.formats import limits
from ckptsurgeon.formats.pickle_globals import construct, describe, resolve, set_item
from ckptsurgeon.formats.pickle_values import Inert, NumpyArray, NumpyDType, PickledDict, TensorRef


class TruncatedPickle(FormatError):
    """The bytes end before the pickle does."""


@dataclass(frozen=True)
class Pickled:
    """A pickle's value, where it ended, and every global that it asked for beyond the allow-list."""

    value: Any
    end: int
    globals: tuple[str, ...]


def _no_persistent(_identity: Any) -> Any:
    raise FormatError("a pickle refers to something outside itself")


def run(data: bytes, start: int = 0, persistent: Callable[[Any], Any] = _no_persistent) -> Pickled:
    """Run the pickle that begins at `start`.

    `persistent` turns a persistent id into a value. Raises FormatError for what is no pickle, TruncatedPickle where the bytes end
    too early, LimitError where it would cost too much; each lists in its `problems` what the pickle had asked for until then.

    >>> run(b"\\x80\\x02}X\\x01\\x00\\x00\\x00aK\\x01s.").value
    {'a': 1}
    """
    machine = _Machine(data, start, persistent)
    try:
        return machine.run()
    except CheckpointError as error:
        name_globals(error, tuple(machine.asked))
        raise
    except (IndexError, KeyError, struct.error) as error:
        raise machine.failure("an opcode finds nothing to work on") from error
    except (ValueError, UnicodeDecodeError, OverflowError) as error:
        raise machine.failure("a number or text in it can't be read") from error


def name_globals(error: CheckpointError, asked: tuple[str, ...]) -> None:
    """Let `error` list what the pickle asked for beyond the allow-list."""
    shown = tuple(f"it asks for {name}, which is never imported or called" for name in asked[:20])
    error.problems = shown + ((f"and for {len(asked) - 20} others",) if len(asked) > 20 else ())


_SIZED = (str, bytes, list, tuple, PickledDict)


class _Machine:
    """The state of one run. Hot opcodes stand in `run`, the most frequent first, the others in the table `_RARE`."""

    def __init__(self, data: bytes, start: int, persistent: Callable[[Any], Any]) -> None:
        self.data = data
        self.position = start
        self.persistent = persistent
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.asked: dict[str, None] = {}
        self.work = 0

    def run(self) -> Pickled:
        data, memo, outer, stack, rare = self.data, self.memo, self.outer, self.stack, _RARE
        position = self.position
        from_bytes = int.from_bytes
        # An operand is passed before it is used: where it fails, `position` then tells whether the bytes had ended.
        try:
            for _ in range(limits.PICKLE_STEPS):
                op = data[position]
                position += 1
                if op == 0x72:  # LONG_BINPUT
                    position += 4
                    memo[from_bytes(data[position - 4 : position], "little")] = stack[-1]
                elif op == 0x4B:  # BININT1
                    stack.append(data[position])
                    position += 1
                elif op == 0x68:  # BINGET
                    stack.append(memo[data[position]])
                    position += 1
                elif op == 0x71:  # BINPUT
                    memo[data[position]] = stack[-1]
                    position += 1
                elif op == 0x28:  # MARK
                    outer.append(stack)
                    stack = []
                elif op == 0x58:  # BINUNICODE
                    begin = position + 4
                    position = begin + from_bytes(data[position:begin], "little")
                    stack.append(data[begin:position].decode("utf-8", "surrogatepass"))
                elif op == 0x74:  # TUPLE
                    items = tuple(stack)
                    stack = outer.pop()
                    stack.append(items)
                elif op == 0x86:  # TUPLE2
                    last = stack.pop()
                    stack[-1] = (stack[-1], last)
                elif op == 0x52:  # REDUCE
                    args = stack.pop()
                    if args:
                        self.charge(args)
                    stack[-1] = construct(stack[-1], args)
                elif op == 0x6A:  # LONG_BINGET
                    position += 4
                    stack.append(memo[from_bytes(data[position - 4 : position], "little")])
                elif op == 0x29:  # EMPTY_TUPLE
                    stack.append(())
                elif op == 0x89:  # NEWFALSE
                    stack.append(False)
                elif op == 0x51:  # BINPERSID
                    stack[-1] = self.persistent(stack[-1])
                elif op == 0x4D:  # BININT2
                    position += 2
                    stack.append(data[position - 2] | data[position - 1] << 8)
                elif op == 0x4A:  # BININT
                    position += 4
                    stack.append(from_bytes(data[position - 4 : position], "little", signed=True))
                elif op == 0x94:  # MEMOIZE
                    memo[len(memo)] = stack[-1]
                elif op == 0x85:  # TUPLE1
                    stack[-1] = (stack[-1],)
                elif op == 0x2E:  # STOP
                    value = stack.pop()
                    if stack or outer:
                        raise FormatError("the pickle stops with values left over")
                    return Pickled(value, position, tuple(self.asked))
                else:
                    handler = rare.get(op)
                    if handler is None:
                        raise FormatError(f"the pickle has an unknown opcode 0x{op:02x}")
                    self.position, self.stack = position, stack
                    handler(self)
                    position, stack = self.position, self.stack
            raise LimitError(f"the pickle takes more than {limits.PICKLE_STEPS} steps")
        finally:
            self.position = position

    def failure(self, what: str) -> FormatError:
        """The error for an opcode that failed: the bytes had ended, or they are damaged."""
        if self.position >= len(self.data):
            return TruncatedPickle("the pickle ends too early: the file is truncated")
        error = FormatError(f"the pickle is damaged: {what}")
        name_globals(error, tuple(self.asked))
        return error

    def charge(self, args: Any) -> None:
        # A memoised list or text can be handed to a constructor again and again: each copy counts.
        if type(args) is tuple:
            for arg in args:
                if type(arg) in _SIZED:
                    self.work += len(arg)
            if self.work > len(self.data):
                raise LimitError("the pickle copies more than a header should")

    def take(self, size: int) -> bytes:
        if size < 0:
            raise FormatError("the pickle has a negative length")
        chunk = self.data[self.position : self.position + size]
        self.position += size
        if len(chunk) < size:
            raise TruncatedPickle("the pickle ends too early: the file is truncated")
        return chunk

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            self.position = len(self.data)
            raise TruncatedPickle("the pickle ends too early: the file is truncated")
        chunk = self.data[self.position : end]
        self.position = end + 1
        return chunk

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.outer.pop()
        return items

    def push_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise FormatError("the pickle names a global by something other than text")
        value, known = resolve(module, name)
        if not known:
            self.asked[value.name] = None
        self.stack.append(value)


def _pop(m: _Machine) -> None:
    # A MARK is a list of its own here, so POP on an empty one drops the mark.
    if m.stack:
        m.stack.pop()
    else:
        m.stack = m.outer.pop()


def _pop_mark(m: _Machine) -> None:
    m.pop_mark()


def _build(m: _Machine) -> None:
    state = m.stack.pop()
    target = m.stack[-1]
    kind = type(target)
    if kind in (Inert, PickledDict):
        target.state = state
    elif kind is NumpyDType:
        if type(state) is tuple and len(state) > 1 and type(state[1]) is str:
            target.byteorder = state[1]
    elif kind is NumpyArray:
        target.shape = state[1] if type(state) is tuple and len(state) > 1 else ()
    elif kind is not TensorRef:  # a Parameter's own attributes are not weights
        raise FormatError(f"the pickle sets attributes on {describe(target)}")


def _items(target: Inert) -> list[Any]:
    if target.items is None:
        target.items = []
    return target.items


def _extend(m: _Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif type(target) is Inert:
        _items(target).extend(items)
    else:
        raise FormatError(f"the pickle appends to {describe(target)}")


def _append(m: _Machine) -> None:
    item = m.stack.pop()
    _extend(m, [item])


def _appends(m: _Machine) -> None:
    items = m.pop_mark()
    _extend(m, items)


def _set(m: _Machine, target: Any, items: list[Any]) -> None:
    if len(items) % 2:
        raise FormatError("the pickle sets a key without a value")
    if type(target) is PickledDict:
        for index in range(0, len(items), 2):
            set_item(target, items[index], items[index + 1])
    elif type(target) is Inert:
        _items(target).extend(items)
    else:
        raise FormatError(f"the pickle sets an item of {describe(target)}")


def _setitem(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _set(m, m.stack[-1], [key, value])


def _setitems(m: _Machine) -> None:
    items = m.pop_mark()
    _set(m, m.stack[-1], items)


def _dict(m: _Machine) -> None:
    items = m.pop_mark()
    result = PickledDict()
    _set(m, result, items)
    m.stack.append(result)


def _instance(m: _Machine) -> None:
    module, name = m.line().decode("ascii", "replace"), m.line().decode("ascii", "replace")
    args = tuple(m.pop_mark())
    m.push_global(module, name)
    m.stack[-1] = construct(m.stack[-1], args)


def _object(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(construct(items[0], tuple(items[1:])))


def _newobj(m: _Machine) -> None:
    args = m.stack.pop()
    m.charge(args)
    m.stack[-1] = construct(m.stack[-1], args)


def _newobj_ex(m: _Machine) -> None:
    kwargs, args = m.stack.pop(), m.stack.pop()
    m.stack[-1] = construct(m.stack[-1], args) if not kwargs else Inert(describe(m.stack[-1]), (args, kwargs))


def _global(m: _Machine) -> None:
    module = m.line().decode("utf-8", "replace")
    m.push_global(module, m.line().decode("utf-8", "replace"))


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.push_global(module, name)


def _extension(size: int) -> Callable[[_Machine], None]:
    def handler(m: _Machine) -> None:
        m.push_global("copyreg", f"extension_{m.number(size)}")

    return handler


def _persistent_line(m: _Machine) -> None:
    m.stack.append(m.persistent(m.line().decode("ascii")))


def _long(size: int) -> Callable[[_Machine], None]:
    def handler(m: _Machine) -> None:
        length = m.number(size)
        if length > limits.LONG_BYTES:
            raise LimitError(f"the pickle has an integer of {length} bytes")
        m.stack.append(int.from_bytes(m.take(length), "little", signed=True))

    return handler


def _text(size: int) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(m.take(m.number(size)).decode("utf-8", "surrogatepass"))


def _bytes(size: int) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(m.take(m.number(size)))


def _old_text(size: int) -> Callable[[_Machine], None]:
    # Python 2's str: text wherever it is UTF-8, as torch.load reads it.
    def handler(m: _Machine) -> None:
        raw = m.take(m.number(size))
        try:
            m.stack.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            m.stack.append(raw)

    return handler


def _old_line(m: _Machine) -> None:
    raw = m.line()
    if len(raw) < 2 or raw[:1] not in b"'\"" or raw[-1:] != raw[:1]:
        raise FormatError("the pickle has a text without quotes")
    m.stack.append(codecs.escape_decode(raw[1:-1])[0].decode("utf-8"))


def _int_line(m: _Machine) -> None:
    raw = m.line()
    if len(raw) > limits.LONG_BYTES:
        raise LimitError(f"the pickle has an integer of {len(raw)} digits")
    m.stack.append({b"00": False, b"01": True}[raw] if raw in (b"00", b"01") else int(raw.rstrip(b"L")))


def _frame(m: _Machine) -> None:
    size = m.number(8)
    if m.position + size > len(m.data):
        m.position = len(m.data)
        raise TruncatedPickle("the pickle ends too early: the file is truncated")


def _tuple3(m: _Machine) -> None:
    last, middle = m.stack.pop(), m.stack.pop()
    m.stack[-1] = (m.stack[-1], middle, last)


def _put(m: _Machine) -> None:
    m.memo[int(m.line()[:20])] = m.stack[-1]


def _list(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(items)


def _protocol(m: _Machine) -> None:
    version = m.number(1)
    if version > 5:
        raise FormatError(f"the pickle is of protocol {version}, which no Python writes")


_RARE: dict[int, Callable[[_Machine], None]] = {
    ord("0"): _pop,
    ord("1"): _pop_mark,
    ord("2"): lambda m: m.stack.append(m.stack[-1]),
    ord("F"): lambda m: m.stack.append(float(m.line())),
    ord("G"): lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
    ord("I"): _int_line,
    ord("L"): _int_line,
    ord("N"): lambda m: m.stack.append(None),
    ord("P"): _persistent_line,
    ord("S"): _old_line,
    ord("T"): _old_text(4),
    ord("U"): _old_text(1),
    ord("B"): _bytes(4),
    ord("C"): _bytes(1),
    ord("V"): lambda m: m.stack.append(m.line().decode("raw-unicode-escape")),
    ord("b"): _build,
    ord("a"): _append,
    ord("e"): _appends,
    ord("s"): _setitem,
    ord("u"): _setitems,
    ord("d"): _dict,
    ord("l"): _list,
    ord("]"): lambda m: m.stack.append([]),
    ord("}"): lambda m: m.stack.append(PickledDict()),
    ord("c"): _global,
    ord("i"): _instance,
    ord("o"): _object,
    ord("g"): lambda m: m.stack.append(m.memo[int(m.line()[:20])]),
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
    0x8F: lambda m: m.stack.append(Inert("builtins.set")),  # its members matter to nobody, hashing them could cost
    0x90: _appends,
    0x91: lambda m: m.stack.append(tuple(m.pop_mark())),
    0x92: _newobj_ex,
    0x93: _stack_global,
    0x95: _frame,
    0x96: _bytes(8),
}
