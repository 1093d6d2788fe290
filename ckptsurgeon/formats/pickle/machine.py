"""A small, bounded machine for pickle opcodes. It imports nothing, calls nothing and knows no class.

Rule: one pass over the bytes, a stack, a memo, and values of `values.py`; whatever is not on the allow-list becomes inert.
It must never use `pickle`, and must raise only CheckpointError.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptsurgeon.errors import CheckpointError, FormatError
from ckptsurgeon.formats.pickle.globals import construct
from ckptsurgeon.formats.pickle.opcodes import RARE
from ckptsurgeon.formats.pickle.state import NO_FRAME, Machine, name_globals
from ckptsurgeon.formats.pickle.tensors import Extents, memo_reads, tensors
from ckptsurgeon.limit_table import allowed, exceeded

if TYPE_CHECKING:
    from ckptsurgeon.formats.pickle.records import Records


@dataclass(frozen=True)
class Pickled:
    """A pickle's value, the offset of its end, and every global that it names and that is not on the allow-list."""

    value: Any
    end: int
    globals: tuple[str, ...]


def _no_persistent(_identity: Any) -> Any:
    raise FormatError("a pickle refers to something outside itself")


def run(data: bytes, start: int = 0, persistent: Callable[[Any], Any] = _no_persistent) -> Pickled:
    """Run the pickle that begins at `start`.

    `persistent` turns a persistent id into a value. Raises FormatError for what is no pickle, TruncatedPickle where the bytes end
    too early, LimitError where it would cost too much; each lists the globals that the pickle named before.

    >>> run(b"\\x80\\x02}X\\x01\\x00\\x00\\x00aK\\x01s.").value
    {'a': 1}
    """
    machine = Machine(data, start, persistent)
    try:
        return _loop(machine)
    except CheckpointError as error:
        name_globals(error, tuple(machine.unknown_globals))
        raise
    except (IndexError, KeyError, struct.error) as error:
        raise machine.failure("an opcode finds nothing to work on") from error
    except (ValueError, UnicodeDecodeError, OverflowError) as error:
        raise machine.failure("a number or text in it can't be read") from error


def _loop(m: Machine) -> Pickled:
    """Run the opcodes; the most frequent are tested first."""
    data, memo, outer, stack, rare = m.data, m.memo, m.outer, m.stack, RARE
    position, frame = m.position, m.frame
    from_bytes = int.from_bytes
    steps, most = allowed("pickle-steps"), allowed("pickle-memo")
    # Of the values that a pickle puts into the memo, only those are kept that a later opcode may read: usually very few.
    reads: set[bytes] | None = None
    extents: Extents = {}
    records: Records | None = None
    few = len(data) <= steps  # a pickle has no more opcodes than bytes
    # `position` is moved past an operand before the operand is used: on an error it shows whether the bytes had ended.
    try:
        for _ in range(steps):
            if position >= frame:
                frame = m.close_frame(position)
            op = data[position]
            position += 1
            if op == 0x72:  # LONG_BINPUT
                position += 4
                slot = data[position - 4 : position]
                if m.skipped:
                    raise m.two_ways()
                if reads is None:
                    reads = memo_reads(data, position)
                if slot in reads:
                    memo[from_bytes(slot, "little")] = stack[-1]
                else:
                    m.dropped += 1
                if len(memo) + m.dropped > most:
                    raise m.full()
            elif op == 0x4B:  # BININT1
                stack.append(data[position])
                position += 1
            elif op == 0x68:  # BINGET
                stack.append(memo[data[position]])
                position += 1
            elif op == 0x71:  # BINPUT
                if m.skipped:
                    raise m.two_ways()
                memo[data[position]] = stack[-1]
                position += 1
            elif op == 0x28:  # MARK
                if reads is not None and data[position] == 0x28 and few and stack and frame == NO_FRAME:
                    read = tensors(m, position - 1, stack, reads, extents)
                    if read is not None:
                        position = read
                        continue
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
                    m.charge(args)
                stack[-1] = construct(stack[-1], args)
            elif op == 0x6A:  # LONG_BINGET
                position += 4
                stack.append(memo[from_bytes(data[position - 4 : position], "little")])
            elif op == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif op == 0x89:  # NEWFALSE
                stack.append(False)
            elif op == 0x51:  # BINPERSID
                stack[-1] = m.persistent(stack[-1])
            elif op == 0x4D:  # BININT2
                position += 2
                stack.append(data[position - 2] | data[position - 1] << 8)
            elif op == 0x4A:  # BININT
                position += 4
                stack.append(from_bytes(data[position - 4 : position], "little", signed=True))
            elif op == 0x94:  # MEMOIZE
                if m.dropped:
                    raise m.two_ways()
                memo[len(memo) + m.skipped] = stack[-1]
                if len(memo) + m.skipped > most:
                    raise m.full()
            elif op == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif op == 0x2E:  # STOP
                value = stack.pop()
                if stack or outer:
                    raise FormatError("the pickle stops with values left over")
                if frame != NO_FRAME:
                    m.close_frame(position)
                return Pickled(value, position, tuple(m.unknown_globals))
            else:
                handler = rare.get(op)
                if handler is None:
                    raise FormatError(f"the pickle has an unknown opcode 0x{op:02x}")
                m.position, m.stack = position, stack
                handler(m)
                position, stack, frame = m.position, m.stack, m.frame
                if (
                    op == 0x62 and few and not m.dropped and data[position : position + 1] in (b"h", b"j")
                ):  # BUILD, and more records may follow
                    if records is None:
                        from ckptsurgeon.formats.pickle.records import Records

                        records = Records(m, position)
                    position = records.read(m, position, min(frame, len(data)), stack)
                    if len(memo) + m.skipped > most:
                        raise m.full()
        raise exceeded("pickle-steps", f"the pickle takes more than {steps} steps")
    finally:
        m.position = position
