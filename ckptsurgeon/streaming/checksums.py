"""Holds the data of zip archives against the checksums that they keep: torch.load does not look at them.

Each entry is read once and whole, by small buffers and without torch; nothing is interpreted or kept. `hold` does it for everything that is
in a file, `holding` for what a reader has read, beside other work; `holding_files` does the first beside other work.

The CRC-32 of bytes that were read part by part is made of those of its parts, as zlib's `crc32_combine` (which Python lacks) computes it: a
CRC is a polynomial over GF(2) modulo `_MODULUS`, its highest power in the lowest bit.
"""

from __future__ import annotations

import shlex
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from ckptsurgeon import formats
from ckptsurgeon.errors import CheckpointError, FormatError
from ckptsurgeon.formats.archive_tree import tensors_of
from ckptsurgeon.formats.inflate import inflated
from ckptsurgeon.formats.registry import named
from ckptsurgeon.formats.zip_directory import Entry, read_directory
from ckptsurgeon.hints import shortened
from ckptsurgeon.progress import wait_for
from ckptsurgeon.report import Finding
from ckptsurgeon.storage import copying
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.storage.opening import OpenFiles, open_regular
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.tensors import Archive, Checkpoint, FileStamp, Packed, Record, Span, TensorMeta

_ZIP = b"PK\x03\x04"
Within = Mapping[str, Mapping[str, Entry]]  # by a file's path, its entries by name
_MODULUS = 0xEDB88320
_ONE, _X8 = 1 << 31, 1 << 23  # the polynomials 1 and x ** 8, which is the shift by a byte
K = TypeVar("K")


@dataclass(frozen=True)
class Checksums:
    """The result for the file at `path`: `wrong` has the names of the entries whose data differs from its checksum, by the offset where
    they begin; `without` counts the entries that have no checksum (a CRC of zero). `keeps` is False for a format without checksums."""

    path: str
    keeps: bool
    wrong: Mapping[int, str] = field(default_factory=dict)
    without: int = 0


def check_file(seen: FileStamp, alive: Callable[[], None], within: Within | None = None) -> Checksums:
    """Read a file as it was `seen`, and compare each entry with its checksum; `alive` is called between buffers and may raise.

    `within` has the entries, where the file is no zip archive by itself. StaleError when the file is no longer what it was.
    """
    with open_regular(seen) as file:
        return _check(file, alive, within)


def _check(file: OpenFile, alive: Callable[[], None], within: Within | None = None) -> Checksums:
    if file.read(0, min(len(_ZIP), file.size)) != _ZIP:
        return Checksums(file.path, keeps=False)
    wrong: dict[int, str] = {}
    without = 0
    entries = read_directory(file, cased=True).entries if within is None else within.get(file.path, {})
    folder = f"{next(iter(entries), '').partition('/')[0]}/"
    below = len(folder) if all(name.startswith(folder) for name in entries) else 0
    for name, entry in entries.items():
        without += not entry.crc and entry.size > 0
        if not _as_it_says(file, name, entry, alive):
            wrong[entry.offset] = name[below:]
    file.check_unchanged()
    return Checksums(file.path, True, wrong, without)


def _as_it_says(file: OpenFile, name: str, entry: Entry, alive: Callable[[], None]) -> bool:
    if not entry.crc and isinstance(entry, Record):
        return True  # it has no checksum
    parts: Iterable[bytes | memoryview] = copying.chunks(file, entry.offset, entry.nbytes)
    crc = 0
    try:
        for part in inflated(parts, entry.size, file.path, name) if isinstance(entry, Packed) else parts:
            alive()
            crc = zlib.crc32(part, crc)
    except FormatError:
        return False
    return entry.crc in (0, crc)


def check_file_now(path: str) -> Checksums:
    """`check_file` for the file at `path` as it is now."""
    with open_regular(path) as file:
        return _check(file, lambda: None)


def entries_in(seen: Archive | Checkpoint) -> Within | None:
    """The entries of all tensors, file by file, of a format whose files are zip archives one after another; None of any other."""
    if not named(seen.format).joined:
        return None
    entries: dict[str, dict[str, Entry]] = {}
    for span in (span for _, tensor in tensors_of(formats.tree_of(seen).value) for span in tensor.spans):
        entry = span.packed or span.record
        if entry is not None:
            entries.setdefault(span.file, {})[span.storage] = entry
    return entries


@contextmanager
def checking_files(files: Sequence[FileStamp], within: Within | None = None) -> Iterator[list[Checksums]]:
    """While the block runs, check files as `check_file` in a second thread. The list has each file's result after the block.

    StaleError, before the block or after it, when a file is no longer what it was.
    """
    results: list[Checksums] = []
    with OpenFiles() as opened:
        files_open = [opened.add(open_regular(seen)) for seen in files]  # here, before anybody's code can change the current folder

        def work(alive: Callable[[], None]) -> None:
            results.extend(_check(file, alive, within) for file in files_open)

        with _in_a_thread(work):
            yield results


@contextmanager
def checking(reader: Reader, spans: Sequence[Span]) -> Iterator[list[Span]]:
    """While the block runs, compare the entries around spans with their checksums in a second thread, whole, each once.

    The list has the wrong ones after the block. Deflated entries are left out: they are checked where they are inflated. An error that
    keeps an entry from being read is raised after the block.
    """
    wrong: list[Span] = []
    # Files are opened here: the thread shares nothing with the block but their descriptors.
    waiting = [(span, *reader.locate(span)) for span in spans if span.record is not None and span.record.crc]

    def work(alive: Callable[[], None]) -> None:
        wrong.extend(span for span, file, offset in waiting if not _as_its_record_says(span, file, offset, alive))

    with _in_a_thread(work):
        yield wrong


class _Stopped(Exception):
    """The block has failed, and the thread's result is of no use."""


@contextmanager
def _in_a_thread(work: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Run `work` in a second thread while the block runs, and wait for its end. Its error is raised where the block raises none.

    `work` gets a function to call between buffers, which raises `_Stopped` once the block has failed.
    """
    stop, done = threading.Event(), threading.Event()
    failed: list[CheckpointError] = []

    def alive() -> None:
        if stop.is_set():
            raise _Stopped

    def run() -> None:
        try:
            work(alive)
            done.set()
        except _Stopped:
            return
        except CheckpointError as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
        wait_for(thread)
    except BaseException:
        stop.set()
        raise
    finally:
        thread.join()
    if failed:
        raise failed[0]
    assert done.is_set(), "the thread that computes checksums has not finished"


def _as_its_record_says(span: Span, file: OpenFile, offset: int, alive: Callable[[], None]) -> bool:
    """Whether the record around a span, which begins at `offset` in an open file, has the checksum that the file gives for it."""
    record, crc = span.record, 0
    assert record is not None
    for part in copying.chunks(file, offset - span.offset + record.offset, record.nbytes):
        alive()
        crc = zlib.crc32(part, crc)
    return crc == record.crc


def keys_in(spans: Iterable[Span], checkpoints: Iterable[Checkpoint]) -> Iterator[tuple[str, Span]]:
    """The keys of checkpoints whose tensors lie in the same storages as spans, each with the span."""
    places = {(span.file, span.storage): span for span in spans}
    for key, tensor in (item for checkpoint in checkpoints for item in checkpoint.items()):
        for span in tensor.spans:
            if (span.file, span.storage) in places:
                yield key, places[span.file, span.storage]


def refuse(wrong: Sequence[Span], checkpoints: Iterable[Checkpoint]) -> None:
    """Raises FormatError, naming every key, where data is not what its own checksum says."""
    if not wrong:
        return
    first = wrong[0].file
    in_memory = any(file.path == first and file.data is not None for checkpoint in checkpoints for file in checkpoint.files)
    problems = dict.fromkeys(
        f"{key}: its storage {span.storage}{f' in {span.file}' if span.file != first else ''} has another checksum"
        for key, span in keys_in(wrong, checkpoints)
    )
    raise FormatError(
        "has data that is not what its own checksum says",
        path=first,
        problems=shortened(problems),
        hint="copy or download it again" + ("" if in_memory else f"; see all that is wrong: ckptsurgeon check --full {shlex.quote(first)}"),
    )


def check_all(reader: Reader, checkpoints: Iterable[Checkpoint]) -> None:
    """Compare all that a reader has read so far with its checksums; FormatError, naming every key, where it is damaged."""
    with checking(reader, tuple(reader.entries().values())) as wrong:
        pass
    refuse(wrong, checkpoints)


Place = tuple[str, int]  # a file's path, and where in it an entry begins


def findings_of(checked: Checksums, places: Iterable[tuple[str, Place]], where: str = "") -> Iterator[Finding]:
    """An error for each key or entry of a file whose data differs from its checksum, and a note where there are no checksums.

    Args:
        places: keys, each with where its data lies; a damaged entry without a key is reported by the entry's name.
        where: the beginning of each sentence, such as the file's name.
    """
    words = f"{where}is not what the file's own checksum says (try: copy or download it again)"
    damaged = [(key, offset) for key, (path, offset) in places if path == checked.path and offset in checked.wrong] if checked.wrong else []
    with_key = {offset for _, offset in damaged}
    entries = [name for offset, name in checked.wrong.items() if offset not in with_key]
    yield from (Finding("checksum", words, key) for key in [*(key for key, _ in damaged), *entries])
    if checked.without:
        yield Finding("no-checksum", f"{where}{checked.without} of its entries have no checksum to be held against", level="note")


def places_in(tensors: Mapping[str, TensorMeta]) -> Iterator[tuple[str, Place]]:
    """Every key whose data lies in a zip archive, and the file and the entry that it lies in."""
    for key, tensor in tensors.items():
        for span in tensor.spans:
            entry = span.packed or span.record
            if entry is not None:
                yield key, (span.file, entry.offset)


def without(spans: Iterable[Span]) -> list[Finding]:
    """A note for each file in which some of the entries that were read have no checksum."""
    counts: dict[str, int] = {}
    for span in spans:
        entry = span.packed or span.record
        if entry is not None and not entry.crc and entry.nbytes:
            counts[span.file] = counts.get(span.file, 0) + 1
    return [
        Finding("no-checksum", f"{count} of the storages that were read have no checksum in {file}", level="note")
        for file, count in counts.items()
    ]


def _product(first: int, second: int) -> int:
    result = 0
    while second:
        if second & _ONE:
            result ^= first
        second = second << 1 & 0xFFFFFFFF
        first = first >> 1 ^ (_MODULUS if first & 1 else 0)
    return result


def combine(crc: int, following: int, nbytes: int) -> int:
    """The CRC-32 of some bytes and the `nbytes` bytes that follow them, from the CRC-32 of each.

    >>> import zlib
    >>> combine(zlib.crc32(b"check"), zlib.crc32(b"point"), 5) == zlib.crc32(b"checkpoint")
    True
    """
    shift = _X8
    while nbytes:
        if nbytes & 1:
            crc = _product(crc, shift)
        shift, nbytes = _product(shift, shift), nbytes >> 1
    return crc ^ following


def append(crcs: MutableMapping[K, int], key: K, following: int, nbytes: int) -> None:
    """Add the CRC-32 of the next `nbytes` bytes to that of the bytes before them, which `crcs` has under `key` if there are any."""
    crcs[key] = combine(crcs[key], following, nbytes) if key in crcs else following
