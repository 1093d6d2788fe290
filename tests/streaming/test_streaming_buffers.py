"""Reading by buffers: whatever the buffer's size, the chunks, the checksum and the comparison are those of the whole."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
from streaming_support import opened

from ckptsurgeon.errors import StaleError
from ckptsurgeon.storage import copying
from ckptsurgeon.storage.local import LocalFile

DATA = os.urandom(700)
RANGES = [(0, 0), (0, 700), (13, 500), (699, 1), (350, 350)]


@pytest.mark.parametrize("buffer", [1, 7, 350, 700, 1 << 20])
@pytest.mark.parametrize(("start", "length"), RANGES)
def test_chunks_checksum_and_comparison(start: int, length: int, buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "IN_CACHE", buffer)
    (tmp_path / "one").write_bytes(DATA)
    (tmp_path / "other").write_bytes(b"xyz" + DATA)
    with opened(tmp_path / "one") as one, opened(tmp_path / "other") as other:
        assert b"".join(bytes(chunk) for chunk in copying.chunks(LocalFile("it", one), start, length)) == DATA[start : start + length]
        assert copying.checksum(LocalFile("it", one), start, length) == zlib.crc32(DATA[start : start + length])
        assert copying.equal_ranges(LocalFile("it", one), start, LocalFile("it", other), start + 3, length)
        assert copying.equal_ranges(LocalFile("it", one), start, LocalFile("it", other), start + 2, length) == (
            DATA[start : start + length] == (b"xyz" + DATA)[start + 2 :][:length]
        )


def test_beyond_the_end_nothing_is_equal_and_nothing_is_read(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(DATA)
    (tmp_path / "other").write_bytes(DATA)
    with opened(tmp_path / "one") as one, opened(tmp_path / "other") as other:
        assert not copying.equal_ranges(LocalFile("it", one), 0, LocalFile("it", other), 0, 701)
        with pytest.raises(StaleError):
            copying.checksum(LocalFile("it", one), 0, 701)


@pytest.mark.parametrize("place", [0, 349, 350, 699])
def test_one_wrong_bit_is_seen_in_every_buffer(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "IN_CACHE", 350)
    (tmp_path / "one").write_bytes(DATA)
    (tmp_path / "other").write_bytes(DATA[:place] + bytes([DATA[place] ^ 1]) + DATA[place + 1 :])
    with opened(tmp_path / "one") as one, opened(tmp_path / "other") as other:
        assert not copying.equal_ranges(LocalFile("it", one), 0, LocalFile("it", other), 0, 700)
