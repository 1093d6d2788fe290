"""Byte copies: the kernel's fast path, and the slow one where the kernel can't, give the same file."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.errors import StaleError
from ckptsurgeon.storage import copying
from ckptsurgeon.storage.local import LocalFile

REAL = os.copy_file_range


def failing(number: int):  # type: ignore[no-untyped-def]
    def copy(*_args: object) -> int:
        raise OSError(number, os.strerror(number))

    return copy


def short(source: int, output: int, count: int, *offsets: int) -> int:
    return REAL(source, output, min(count, 7), *offsets)


def once_then_cross_device(source: int, output: int, count: int, offset: int, place: int) -> int:
    if place >= 7:
        raise OSError(errno.EXDEV, "no")
    return short(source, output, count, offset, place)


PATHS = {
    "kernel": REAL,
    "cross-device": failing(errno.EXDEV),
    "no such call": failing(errno.ENOSYS),
    "not supported": failing(errno.EOPNOTSUPP),
    "says zero": lambda *_args: 0,
    "short": short,
    "half and half": once_then_cross_device,
}


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[int, int]]:
    source = os.open(tmp_path / "source", os.O_RDWR | os.O_CREAT)
    output = os.open(tmp_path / "output", os.O_RDWR | os.O_CREAT)
    yield source, output
    os.close(source)
    os.close(output)


@pytest.mark.parametrize("path", PATHS, ids=str)
@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), start=st.integers(0, 40), place=st.integers(0, 6))
def test_every_path_copies_the_same_bytes(path: str, data: bytes, start: int, place: int, files: tuple[int, int]) -> None:
    source, output = files
    os.ftruncate(source, 0)
    os.ftruncate(output, 0)
    os.pwrite(source, data, 0)
    start = min(start, len(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "copy_file_range", PATHS[path])
        copying.copy_range(LocalFile("it", source), start, output, place, len(data) - start)
    assert os.pread(output, 1000, place) == data[start:]


@pytest.mark.parametrize("path", ["kernel", "cross-device"])
def test_more_than_a_buffer(path: str, files: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = files
    data = os.urandom(2 * copying.BUFFER + 17)
    os.pwrite(source, data, 0)
    monkeypatch.setattr(os, "copy_file_range", PATHS[path])
    copying.copy_range(LocalFile("it", source), 3, output, 5, len(data) - 3)
    assert os.pread(output, len(data), 5) == data[3:]
    assert copying.checksum(LocalFile("it", output), 5, len(data) - 3) == zlib.crc32(data[3:])
    assert copying.equal_ranges(LocalFile("it", source), 3, LocalFile("it", output), 5, len(data) - 3)


def test_a_file_without_holes_is_not_looked_through_for_some(files: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = files
    data = os.urandom(5 << 16)
    os.pwrite(source, data, 0)
    os.fsync(source)  # some file systems count a file's blocks only when they are written
    monkeypatch.setattr(os, "lseek", lambda *_args: pytest.fail("looked through"))
    assert copying.copy_range(LocalFile("it", source), 0, output, 0, len(data)).nbytes == len(data)
    assert os.pread(output, len(data), 0) == data


def test_a_real_refusal_is_raised(files: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = files
    os.pwrite(source, b"12345678", 0)
    monkeypatch.setattr(os, "copy_file_range", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        copying.copy_range(LocalFile("it", source), 0, output, 0, 8)


def test_a_source_that_ends_early_is_told(files: tuple[int, int]) -> None:
    source, output = files
    os.pwrite(source, b"1234", 0)
    with pytest.raises(StaleError, match="shorter"):
        copying.copy_range(LocalFile("it", source), 0, output, 0, 8)


@given(data=st.binary(min_size=1, max_size=300), where=st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_bit_is_seen(data: bytes, where: st.DataObject, files: tuple[int, int]) -> None:
    source, output = files
    position = where.draw(st.integers(0, len(data) - 1))
    other = bytearray(data)
    other[position] ^= 1 << where.draw(st.integers(0, 7))
    os.pwrite(source, data, 0)
    os.pwrite(output, other, 0)
    assert not copying.equal_ranges(LocalFile("it", source), 0, LocalFile("it", output), 0, len(data))
    assert copying.equal_ranges(LocalFile("it", source), 0, LocalFile("it", output), 0, position)
