"""A sample of a checkpoint's data: a few reads that show whether a file was saved again with other values.

Up to 16 MiB of data are sampled whole; of more, 64 bytes from the middle of every tensor, up to 4,096 of them. A change elsewhere is
missed: `digest` reads all. Data whose checksum stands in the header needs no sample, since the fingerprint has it. No torch; nothing is
inflated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256

from ckptsurgeon.progress import phase
from ckptsurgeon.storage import copying
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.tensors import Checkpoint, Span, TensorMeta

BYTES = 64
MOST = 4096
WHOLE = 16 << 20
LAST = 64  # of the keys in the file's order, and by name: training changes a model's end most often
_NUMBER = re.compile("([0-9]+)")


def sample(checkpoint: Checkpoint) -> str:
    """SHA-256 (hex) of the sampled bytes, tensor after tensor; `""` where the header has the checksums of all data, or there is none.

    Raises:
        StaleError: a file is no longer what it was when its header was read.
        UnreadableError: it can't be read.
    """
    places = {key: spans for key, tensor in checkpoint.tensors.items() if (spans := _unsummed(tensor))}
    if not places:
        return ""
    found = sha256()
    with Reader([checkpoint]) as reader:
        for file, offset, size in _parts(places):
            found.update(reader.open(file).read(offset, size))
        reader.check_unchanged()
    return found.hexdigest()


def _parts(places: Mapping[str, Sequence[Span]]) -> Iterator[tuple[str, int, int]]:
    """The file, offset and length of each place to sample."""
    whole = dict.fromkeys(_stored(span) for spans in places.values() for span in spans)
    if sum(nbytes for _, _, nbytes in whole) <= WHOLE:
        yield from whole
        return
    for number, key in enumerate(chosen(list(places))):
        file, offset, nbytes = _stored(places[key][number % len(places[key])])  # of pieces one, so that every file has its turn
        size = min(nbytes, BYTES)
        yield file, offset + (nbytes - size) // 2, size


def _stored(span: Span) -> tuple[str, int, int]:
    stored = span.packed or span
    return span.file, stored.offset, stored.nbytes


def digest(checkpoint: Checkpoint) -> str:
    """SHA-256 (hex) of all bytes of the files, one after the other; `""` for what has none. Raises as `sample`."""
    if not checkpoint.files:
        return ""
    found = sha256()
    with Reader([checkpoint]) as reader, phase("reading values", sum(stamp.size for stamp in checkpoint.files)) as advance:
        for stamp in checkpoint.files:
            for part in copying.chunks(reader.open(stamp.path), 0, stamp.size):
                found.update(part)
                advance(len(part))
        reader.check_unchanged()
    return found.hexdigest()


def chosen(keys: Sequence[str], most: int = MOST, last: int = LAST) -> list[str]:
    """Up to `most` of the keys, in their order: the last ones in that order and by name, and of the others some spread evenly.

    >>> chosen(["w10", "a", "w2", "b", "c"], most=4, last=1)
    ['w10', 'a', 'b', 'c']
    """
    if len(keys) <= most:
        return list(keys)
    ends = {*keys[-last:], *sorted(keys, key=_by_name)[-last:]}
    others = [key for key in keys if key not in ends]
    count = most - len(ends)
    spread = {others[place * (len(others) - 1) // max(count - 1, 1)] for place in range(count)}
    return [key for key in keys if key in ends or key in spread]


def _by_name(key: str) -> list[tuple[int, str]]:
    """Orders names as a person would: `w2` before `w10`."""
    parts = [part.lstrip("0") if place % 2 else part for place, part in enumerate(_NUMBER.split(key))]
    return [(len(part) if place % 2 else 0, part) for place, part in enumerate(parts)]


def _unsummed(tensor: TensorMeta) -> list[Span]:
    """The spans of a tensor that have bytes, and no checksum of them in the header."""
    return [span for span in tensor.spans if span.nbytes and not ((entry := span.packed or span.record) is not None and entry.crc)]
