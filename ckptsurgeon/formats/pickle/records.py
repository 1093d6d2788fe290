"""Rows of plain records as Python pickles them in protocol 4, read in one step instead of some thirty opcodes each: the chunks of a
distributed checkpoint's tensors, and where they lie.

Rule: as for `tensors`, the result is the value that the opcodes would give. A record that is written in any other way, or that puts a value
into the memo which the pickle may get again, is left to the opcodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ckptsurgeon.formats.pickle.globals import ALLOWED
from ckptsurgeon.formats.pickle.state import Machine
from ckptsurgeon.formats.pickle.tensors import memo_reads
from ckptsurgeon.formats.pickle.values import Global, Inert, PickledDict

_GET = rb"(h.|j....)"
_NUMBER = rb"(?:K.|M..|J....|\x8a\x05.....)"
_TEXT = rb"(h.|j....|\x8c.[ -~]{1,255}\x94)"
_SIZES = _GET + rb"(\)|" + _NUMBER + rb"{1,3}[\x85-\x87]\x94|\(" + _NUMBER + rb"{4,64}t\x94)\x85\x94R\x94"
_OPEN, _CLOSE = _GET + rb"\)\x81\x94\}\x94\(", b"ub"
_CHUNK = re.compile(_OPEN + _GET + _SIZES + _GET + _SIZES + _CLOSE, re.DOTALL)  # an object with two sizes
_ENTRY = re.compile(  # one with a text, a number and sizes, and one with a text and two numbers
    _OPEN + _GET + _TEXT + _GET + rb"(" + _NUMBER + rb")" + _GET + _SIZES + _CLOSE
    + _OPEN + _GET + _TEXT + _GET + rb"(" + _NUMBER + rb")" + _GET + rb"(" + _NUMBER + rb")" + _CLOSE,
    re.DOTALL,
)  # fmt: skip
_EACH = re.compile(_NUMBER, re.DOTALL)
_SIZE = "torch.Size"


class Records:
    """The state of reading one pickle's records: the slots of the memo that it may read again (`reads`), and caches of values by their
    bytes."""

    def __init__(self, m: Machine, position: int) -> None:
        self.reads = {int.from_bytes(slot, "little") for slot in memo_reads(m.data, position)}
        self.usable = max(m.memo, default=-1) < len(m.memo)  # the memo's slots were used in order
        self.gets: dict[bytes, Any] = {}
        self.sizes: dict[bytes, tuple[int, ...]] = {}
        self.names: dict[tuple[bytes, ...], list[str]] = {}
        self.kinds: dict[tuple[bytes, ...], list[str]] = {}

    def read(self, m: Machine, position: int, end: int, stack: list[Any]) -> int:
        """Push the records that begin at `position`; return the offset where they end: `position` where the opcodes must read the first.

        `end` is the end of the frame, which no opcode may cross.
        """
        if not self.usable:
            return position
        data = m.data
        while True:
            slot = len(m.memo) + m.skipped
            match = _CHUNK.match(data, position, end)
            if match is not None:
                read = self._chunk(m, match.groups(), slot)
            else:
                match = _ENTRY.match(data, position, end)
                read = None if match is None else self._entry(m, match.groups(), slot)
            if match is None or read is None:
                return position
            values, kept, texts, work = read
            if not self.reads.isdisjoint(range(slot, slot + kept)):
                needed = self.reads.intersection(range(slot, slot + kept))
                if not needed <= texts.keys():
                    return position
                m.memo.update((number, texts[number]) for number in sorted(needed))
                m.skipped -= len(needed)
            m.spend(work)
            m.skipped += kept
            stack += values
            position = match.end()

    def _chunk(self, m: Machine, groups: tuple[bytes, ...], _slot: int) -> tuple[tuple[Any, ...], int, dict[int, str], int] | None:
        kind, first, *first_sizes, second = groups[:5]
        second_sizes = groups[5:]
        names = self._names(m, (first, second))
        kinds = self._kinds(m, (kind,))
        sizes = self._sizes(m, *first_sizes), self._sizes(m, *second_sizes)
        if names is None or kinds is None or None in sizes:
            return None
        record = Inert(kinds[0], (), PickledDict(zip(names, sizes, strict=True)))
        return (record,), 2 + sum(3 if size else 2 for size in sizes), {}, sum(len(size or ()) + 1 for size in sizes)

    def _entry(self, m: Machine, groups: tuple[bytes, ...], slot: int) -> tuple[tuple[Any, ...], int, dict[int, str], int] | None:
        kind, a, key, b, index, c, function, spelled, second_kind, d, file, e, offset, f, length = groups
        names, more = self._names(m, (a, b, c)), self._names(m, (d, e, f))
        kinds, size = self._kinds(m, (kind, second_kind)), self._sizes(m, function, spelled)
        texts: dict[int, str] = {}
        second = slot + 4 + (1 if key[:1] == b"\x8c" else 0) + (3 if size else 2)  # the memo slot of the second object's text
        texts_read = self._text(m, key, slot + 2, texts), self._text(m, file, second, texts)
        if names is None or more is None or kinds is None or size is None or None in texts_read:
            return None
        values = (
            Inert(kinds[0], (), PickledDict(zip(names, (texts_read[0], _number(index), size), strict=True))),
            Inert(kinds[1], (), PickledDict(zip(more, (texts_read[1], _number(offset), _number(length)), strict=True))),
        )
        return values, 4 + (3 if size else 2) + len(texts), texts, len(size) + 1

    def _value(self, m: Machine, spelled: bytes) -> Any:
        value = self.gets.get(spelled)
        if value is None:
            value = self.gets[spelled] = m.memo.get(int.from_bytes(spelled[1:], "little"))
        return value

    def _names(self, m: Machine, spelled: tuple[bytes, ...]) -> list[str] | None:
        known = self.names.get(spelled)
        if known is None:
            names = [self._value(m, get) for get in spelled]
            if set(map(type, names)) != {str} or len(set(names)) < len(names):
                return None
            known = self.names[spelled] = names
        return known

    def _kinds(self, m: Machine, spelled: tuple[bytes, ...]) -> list[str] | None:
        """The names of classes that are not on the allow-list; None where a value is on it, or is no class."""
        known = self.kinds.get(spelled)
        if known is None:
            kinds = [self._value(m, get) for get in spelled]
            if not all(type(kind) is Global and kind.name not in ALLOWED for kind in kinds):
                return None
            known = self.kinds[spelled] = [kind.name for kind in kinds]
        return known

    def _text(self, m: Machine, spelled: bytes, slot: int, texts: dict[int, str]) -> str | None:
        if spelled[:1] != b"\x8c":
            value = self._value(m, spelled)
            return value if type(value) is str else None
        if len(spelled) != spelled[1] + 3:
            return None
        text = texts[slot] = spelled[2:-1].decode()
        return text

    def _sizes(self, m: Machine, function: bytes, spelled: bytes) -> tuple[int, ...] | None:
        called = self._value(m, function)
        if type(called) is not Global or called.name != _SIZE:
            return None
        known = self.sizes.get(spelled)
        if known is None:
            if spelled == b")":
                return ()
            known = tuple(_numbers(spelled[spelled[:1] == b"(" : -2]))
            if spelled[:1] != b"(" and spelled[-2] != 0x84 + len(known):
                return None
            if len(self.sizes) < 1 << 16:
                self.sizes[spelled] = known
        return known


def _numbers(spelled: bytes) -> Iterator[int]:
    return map(_number, _EACH.findall(spelled))


def _number(raw: bytes) -> int:
    if raw[:1] == b"\x8a":
        return int.from_bytes(raw[2:], "little", signed=True)
    return int.from_bytes(raw[1:], "little", signed=len(raw) == 5)
