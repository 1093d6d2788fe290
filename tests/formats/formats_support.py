"""Helpers of the format tests: what the official libraries say, and the least that carries a layout out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from zlib import crc32

import torch

from ckptsurgeon.dtypes import BY_CODE, BY_TORCH
from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.formats import read
from ckptsurgeon.formats.layout import Layout, OutTensor
from ckptsurgeon.tensors import Archive, Span, StateDict, TensorMeta

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def code_of(tensor: torch.Tensor) -> str:
    """safetensors' code of a tensor's dtype."""
    return BY_TORCH[str(tensor.dtype).removeprefix("torch.")].code


def dtype_of(code: str) -> torch.dtype:
    """torch's dtype for a code."""
    return getattr(torch, BY_CODE[code].torch)


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's elements in row-major order, as bytes; NaN and signed zero count as they are."""
    tensor = tensor.detach()
    if tensor.itemsize == 16:
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.view(_INTEGERS[tensor.itemsize]).contiguous().numpy().tobytes()


def sample(code: str, shape: tuple[int, ...] = (2, 3), seed: int = 0) -> torch.Tensor:
    """A tensor with random bits (valid ones, for bool)."""
    generator = torch.Generator().manual_seed(seed)
    size = BY_CODE[code].size
    count = 1
    for dim in shape:
        count *= dim
    top = 2 if code == "BOOL" else 256
    raw = torch.randint(0, top, (count * size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype_of(code)).reshape(shape) if count else torch.empty(shape, dtype=dtype_of(code))


def stored(meta: TensorMeta) -> torch.Tensor:
    """The tensor that lies at a span, read by its stride."""
    span = meta.span
    assert isinstance(span, Span) and span.packed is None
    if not span.nbytes:
        return torch.empty(meta.shape, dtype=dtype_of(meta.dtype))
    with open(span.file, "rb") as file:
        file.seek(span.offset)
        raw = file.read(span.nbytes)
    assert len(raw) == span.nbytes
    return torch.frombuffer(bytearray(raw), dtype=dtype_of(meta.dtype)).as_strided(meta.shape, meta.stride)


def assert_same(found: Mapping[str, TensorMeta], expected: Mapping[str, torch.Tensor], *, strides: bool = True) -> None:
    """Names, dtypes, shapes, strides and bytes are what the official library gives."""
    assert sorted(found) == sorted(expected)
    for key, tensor in expected.items():
        meta = found[key]
        assert (meta.name, meta.dtype, meta.shape) == (key, code_of(tensor), tuple(tensor.shape))
        if strides:
            assert meta.stride == tuple(tensor.stride()), key
        assert bits(stored(meta)) == bits(tensor), key


def sharing(tensors: Mapping[str, torch.Tensor]) -> set[frozenset[str]]:
    """Which keys share a storage, as torch sees it."""
    groups: dict[int, set[str]] = {}
    for key, tensor in tensors.items():
        if tensor.untyped_storage().nbytes():
            groups.setdefault(tensor.untyped_storage().data_ptr(), set()).add(key)
    return {frozenset(keys) for keys in groups.values()}


def sharing_read(tensors: Mapping[str, TensorMeta]) -> set[frozenset[str]]:
    """Which keys share a storage, as the reader sees it (empty storages left out)."""
    groups: dict[str, set[str]] = {}
    for key, meta in tensors.items():
        assert meta.span is not None
        if meta.span.nbytes:
            groups.setdefault(meta.span.storage, set()).add(key)
    return {frozenset(keys) for keys in groups.values()}


def only(archive: Archive) -> StateDict:
    """The one state_dict of an archive."""
    (state_dict,) = archive.state_dicts
    return state_dict


def roots(archive: Archive) -> dict[str, StateDict]:
    """The archive's state_dicts by root."""
    return {state_dict.root: state_dict for state_dict in archive.state_dicts}


def save_zip(value: object, path: Path) -> None:
    """torch's zip format."""
    torch.save(value, path)


def save_legacy(value: object, path: Path) -> None:
    """The format before torch 1.6."""
    torch.save(value, path, _use_new_zipfile_serialization=False)


def refusal(data: bytes | Path, folder: Path) -> CheckpointError:
    """The error that reading gives; a reading that works fails the test."""
    if isinstance(data, bytes):
        path = folder / "patient.pt"
        path.write_bytes(data)
    else:
        path = data
    try:
        archive = read(os.fspath(path))
    except CheckpointError as error:
        assert error.path and error.reason and str(error)
        return error
    raise AssertionError(f"was read: {archive}")


def outcome(path: Path) -> Archive | CheckpointError:
    """An Archive or a CheckpointError; anything else is raised."""
    try:
        return read(os.fspath(path))
    except CheckpointError as error:
        assert str(error)
        return error


def out_tensors(tensors: Mapping[str, torch.Tensor]) -> list[OutTensor]:
    """What a writer takes: tied tensors get one storage number."""
    numbers: dict[object, int] = {}
    result = []
    for key, tensor in tensors.items():
        place = (tensor.data_ptr(), code_of(tensor), tensor.shape, tensor.stride()) if tensor.numel() else key
        result.append(OutTensor(key, code_of(tensor), tuple(tensor.shape), numbers.setdefault(place, len(numbers))))
    return result


def carry_out(layout: Layout, data: Sequence[bytes], path: Path) -> None:
    """Write a layout, given the bytes of each tensor; every byte of the file must be written exactly once."""
    written: list[tuple[int, int]] = []

    def put(offset: int, raw: bytes) -> None:
        file.seek(offset)
        file.write(raw)
        written.append((offset, offset + len(raw)))

    with open(path, "wb") as file:
        for offset, chunk in layout.chunks:
            put(offset, chunk)
        for slot in layout.slots:
            assert len(data[slot.index]) == slot.nbytes
            put(slot.offset, data[slot.index])
        if layout.checksums:
            for offset, chunk in layout.tail([crc32(data[slot.index]) for slot in layout.slots]):
                put(offset, chunk)
    position = 0
    for start, stop in sorted(written):
        assert start == position
        position = stop
    assert position == layout.size == path.stat().st_size


Save = Callable[[object, Path], None]
