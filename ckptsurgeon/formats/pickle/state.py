"""The state of one run over a pickle's opcodes, and what every opcode may do with it: take bytes, push, pop to a mark.

It imports nothing that a pickle names, calls nothing, and raises nothing but a CheckpointError or what `machine.run` words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckptsurgeon.errors import CheckpointError, FormatError, LimitError, PartError
from ckptsurgeon.formats.pickle.globals import resolve
from ckptsurgeon.formats.pickle.values import PickledDict
from ckptsurgeon.limit_table import Budget, allowed, exceeded


class TruncatedPickle(FormatError):
    """The bytes end before the pickle does."""


def name_globals(error: CheckpointError, names: tuple[str, ...]) -> None:
    """Add to `error` the globals that the pickle names beyond the allow-list."""
    shown = tuple(f"it asks for {name}, which is never imported or called" for name in names[:20])
    error.globals = names
    if isinstance(error, PartError):  # found by these globals
        return
    error.problems = shown + ((f"and for {len(names) - 20} others",) if len(names) > 20 else ())


_SIZED = (str, bytes, list, tuple, PickledDict)
NO_FRAME = 1 << 64  # where a frame ends when none is open


class Machine:
    """A stack, the stacks below its marks, a memo, and the position of the next opcode."""

    def __init__(self, data: bytes, start: int, persistent: Callable[[Any], Any]) -> None:
        self.data = data
        self.position = start
        self.frame = NO_FRAME
        self.persistent = persistent
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.dropped = 0  # values that the pickle puts into memo slots by number, and never reads
        self.skipped = 0  # values that it puts into the next memo slot, and never reads
        self.unknown_globals: dict[str, None] = {}
        self.globals: dict[tuple[str, str], Any] = {}
        self.budget = Budget(None, len(data))

    def failure(self, what: str) -> FormatError:
        """The error for an opcode that failed: the bytes had ended, or they are damaged."""
        ended = self.position >= len(self.data)
        error = (
            TruncatedPickle("the pickle ends too early: the file is truncated") if ended else FormatError(f"the pickle is damaged: {what}")
        )
        name_globals(error, tuple(self.unknown_globals))
        return error

    def two_ways(self) -> FormatError:
        """The error for a pickle that numbers some memo slots itself and uses the next slot for others: readers count these differently."""
        return FormatError("the pickle counts the values that it keeps in two ways")

    def full(self) -> LimitError:
        """The error for a memo of too many values."""
        most = allowed("pickle-memo")
        return exceeded("pickle-memo", f"the pickle keeps more than {most} values to use again")

    def close_frame(self, position: int) -> int:
        # Python's two unpicklers read an opcode that crosses its frame's end differently.
        if position != self.frame:
            raise FormatError("the pickle has a frame that ends within an opcode, or after the pickle itself")
        self.frame = NO_FRAME
        return NO_FRAME

    def charge(self, args: Any) -> None:
        # A tuple, list or text in the memo can be an argument again and again: each use counts.
        if type(args) is tuple:
            self.spend(len(args))  # before they are walked
            self.spend(sum(len(arg) for arg in args if type(arg) in _SIZED))

    def spend(self, work: int) -> None:
        self.budget.spend("pickle-copies", work, "the pickle copies more than the {} values that a header may")

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
        value = self.globals.get((module, name))
        if value is None:
            self.spend(len(module) + len(name))  # two memoised texts can be put together again and again
            value, known = resolve(module, name)
            self.globals[module, name] = value
            if not known:
                self.unknown_globals[value.name] = None
                self.budget.spend("globals", 1, "the pickle asks for more than {} names")
        self.stack.append(value)
