"""Holds the data of zip archives against the checksums that they keep: torch.load does not look at them.

Each entry is read once and whole, by small buffers and without torch; nothing is interpreted or kept. `holding` does it for what a reader
has read, beside other work; `hold` for everything that is in a file.
"""

from __future__ import annotations

import os
import shlex
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ckptsurgeon.errors import CheckpointError, FormatError, StaleError
from ckptsurgeon.formats.files import OpenFile, open_regular, stamp
from ckptsurgeon.formats.inflate import inflated
from ckptsurgeon.formats.torch.zip_directory import DEFLATED, Entry, read_directory
from ckptsurgeon.hints import shortened
from ckptsurgeon.report import Finding
from ckptsurgeon.streaming import copying
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.tensors import Checkpoint, FileStamp, Packed, Span

_ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class Held:
    """What became of one file: the storages, or other entries by name, whose data is not what its checksum says, and how many entries
    have no checksum (a CRC of zero). `keeps` is False for a format that has none."""

    keeps: bool
    wrong_storages: tuple[str, ...] = ()
    wrong_entries: tuple[str, ...] = ()
    without: int = 0


def hold(seen: FileStamp, alive: Callable[[], None]) -> Held:
    """Read a file as it was `seen`, and hold each entry against its checksum; `alive` is called between buffers and may raise.

    StaleError when the file is no longer what it was.
    """
    with open_regular(seen.path) as file:
        if file.stamp != seen:
            raise _changed(seen.path)
        if file.read(0, min(len(_ZIP), file.size)) != _ZIP:
            return Held(keeps=False)
        storages: list[str] = []
        others: list[str] = []
        without = 0
        with copying.naming(seen.path):
            for entry in read_directory(file).entries.values():
                without += not entry.crc and entry.size > 0
                if not _as_it_says(file, entry, alive):
                    name = entry.name.partition("/")[2]
                    storages += [name[len("data/") :]] if name.startswith("data/") else []
                    others += [] if name.startswith("data/") else [name]
        if stamp(seen.path, os.fstat(file.fd)) != seen:
            raise _changed(seen.path)
    return Held(True, tuple(storages), tuple(others), without)


def _as_it_says(file: OpenFile, entry: Entry, alive: Callable[[], None]) -> bool:
    if not entry.crc and entry.method != DEFLATED:
        return True  # nothing is said of it
    parts: Iterable[bytes | memoryview] = copying.chunks(file.fd, entry.offset, entry.packed)
    crc = 0
    try:
        for part in inflated(parts, entry.size, file.path, entry.name) if entry.method == DEFLATED else parts:
            alive()
            crc = zlib.crc32(part, crc)
    except FormatError:
        return False
    return entry.crc in (0, crc)


def _changed(path: str) -> StaleError:
    return StaleError("changed while it was read", path=path, hint="run it again when nothing writes to it")


@contextmanager
def holding(reader: Reader, spans: Sequence[Span]) -> Iterator[list[Span]]:
    """While the block runs, hold the entries around spans against their checksums in a second thread, whole, each once.

    Those that are wrong stand in the list after the block. Deflated entries are not among them: who inflates one holds it. What keeps an
    entry from being read is raised after the block.
    """
    wrong: list[Span] = []
    failed: list[CheckpointError] = []
    # Files are opened here: the thread shares nothing with the block but their descriptors.
    waiting = [(span, *reader.locate(span)) for span in spans if span.record is not None and span.record.crc]
    held: list[Span] = []
    stop = threading.Event()

    def work() -> None:
        try:
            for span, fd, offset in waiting:
                if not _as_its_record_says(span, fd, offset, stop):
                    wrong.append(span)
                held.append(span)
        except CheckpointError as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield wrong
    except BaseException:
        stop.set()
        raise
    finally:
        thread.join()
    if failed:
        raise failed[0]
    assert len(held) == len(waiting), "the thread that holds checksums came to no end"


def _as_its_record_says(span: Span, fd: int, offset: int, stop: threading.Event) -> bool:
    """Whether the record around a span, which begins at `offset` in an open file, is what its checksum says; False when it is stopped."""
    record, crc = span.record, 0
    assert record is not None
    with copying.naming(span.file):
        for part in copying.chunks(fd, offset - span.offset + record.offset, record.nbytes):
            if stop.is_set():
                return False
            crc = zlib.crc32(part, crc)
    return crc == record.crc


def entries_of(checkpoint: Checkpoint) -> tuple[Span, ...]:
    """A span of each zip entry that a checkpoint's tensors lie in."""
    found: dict[tuple[str, int], Span] = {}
    for tensor in checkpoint.values():
        entry = None if tensor.span is None else tensor.span.packed or tensor.span.record
        if tensor.span is not None and entry is not None:
            found.setdefault((tensor.span.file, entry.offset), tensor.span)
    return tuple(found.values())


def keys_in(spans: Iterable[Span], checkpoints: Iterable[Checkpoint]) -> Iterator[tuple[str, Span]]:
    """The keys of checkpoints whose tensors lie in the same storages as spans, each with the span."""
    places = {(span.file, span.storage): span for span in spans}
    for key, tensor in (item for checkpoint in checkpoints for item in checkpoint.items()):
        if tensor.span is not None and (tensor.span.file, tensor.span.storage) in places:
            yield key, places[tensor.span.file, tensor.span.storage]


def refuse(wrong: Sequence[Span], checkpoints: Iterable[Checkpoint]) -> None:
    """Raises FormatError, naming every key, where data is not what its own checksum says."""
    if not wrong:
        return
    first = wrong[0].file
    problems = dict.fromkeys(
        f"{key}: its storage {span.storage}{f' in {span.file}' if span.file != first else ''} has another checksum"
        for key, span in keys_in(wrong, checkpoints)
    )
    raise FormatError(
        "has data that is not what its own checksum says",
        path=first,
        problems=shortened(problems),
        hint=f"copy or download it again; see all that is wrong: ckptsurgeon check --full {shlex.quote(first)}",
    )


def damaged(checkpoint: Checkpoint) -> list[Finding]:
    """What there is to say of the checksums of a checkpoint's tensors, stored or deflated, where nothing else reads them."""
    spans = entries_of(checkpoint)
    with Reader([checkpoint]) as reader:
        wrong = held(reader, spans) + [span for span in spans if span.packed is not None and not _inflates(reader, span, span.packed)]
        reader.check_unchanged()
    return [*damage(wrong, checkpoint), *without(spans)]


def _inflates(reader: Reader, span: Span, packed: Packed) -> bool:
    with copying.naming(span.file):
        name = f"data/{span.storage}"
        return _as_it_says(reader.open(span.file), Entry(name, packed.offset, packed.nbytes, packed.size, packed.crc, DEFLATED), _go_on)


def _go_on() -> None:
    """Nothing needs to be told between two buffers."""


def held(reader: Reader, spans: Sequence[Span]) -> list[Span]:
    """Those spans the entries around which are not what their checksums say."""
    with holding(reader, spans) as wrong:
        pass
    return wrong


def hold_all(reader: Reader, checkpoints: Iterable[Checkpoint]) -> None:
    """Hold all that a reader has read until now against its checksums; FormatError, naming every key, where it is damaged."""
    refuse(held(reader, tuple(reader.entries().values())), checkpoints)


def damage(wrong: Iterable[Span], checkpoint: Checkpoint) -> list[Finding]:
    """An error for each key whose data is not what the file's own checksum says."""
    words = "is not what the file's own checksum says (try: copy or download it again)"
    return [Finding("checksum", words, key) for key, _ in keys_in(wrong, [checkpoint])]


def without(spans: Iterable[Span]) -> list[Finding]:
    """A note for each file some of whose entries have no checksum that they could be held against."""
    counts: dict[str, int] = {}
    for span in spans:
        entry = span.packed or span.record
        if entry is not None and not entry.crc and entry.nbytes:
            counts[span.file] = counts.get(span.file, 0) + 1
    return [
        Finding("no-checksum", f"{count} of the storages that were read have no checksum in {file}", level="note")
        for file, count in counts.items()
    ]
