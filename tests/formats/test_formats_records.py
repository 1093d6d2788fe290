"""Rows of records in a `.metadata`, read in one step, are what the opcodes make of them, whatever the bytes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata

from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.formats.pickle.machine import run
from ckptsurgeon.formats.pickle.records import Records

SIZES = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 2**40)), max_size=5).map(torch.Size)
TEXTS = st.one_of(st.sampled_from(["w", "layers.0.w", "ü", "x" * 300]), st.text(max_size=4))


@st.composite
def metadata(draw: st.DrawFn) -> bytes:
    """A pickle of rows whose texts and sizes are sometimes shared."""
    shared = draw(SIZES)
    files = draw(st.lists(TEXTS, min_size=1, max_size=2))
    tensors, stored = {}, {}
    for name in draw(st.lists(TEXTS, max_size=3, unique=True)):
        sizes = draw(st.lists(st.one_of(SIZES, st.just(shared), st.builds(torch.Size, st.just(tuple(shared)))), max_size=4))
        tensors[name] = TensorStorageMetadata(TensorProperties(torch.float32), shared, [ChunkStorageMetadata(one, shared) for one in sizes])
        for number, one in enumerate(sizes):
            key = draw(st.sampled_from([name, (name + " ")[:-1]]))
            stored[MetadataIndex(key, one, draw(st.sampled_from([number, None])))] = _StorageInfo(
                draw(st.sampled_from(files)), number, 2**number
            )
    return pickle.dumps(Metadata(tensors, {}, stored), protocol=draw(st.sampled_from([2, 4, 5])))


@contextmanager
def by_opcodes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Records, "read", lambda _self, _m, position, _end, _stack: position)
        yield


def told(value: Any, known: dict[int, int]) -> Any:
    """A value as nested tuples; what can be changed and is shared is told by the number of its first place."""
    if isinstance(value, (list, dict)) or is_dataclass(value):
        if id(value) in known:
            return ("again", known[id(value)])
        known[id(value)] = len(known)
    if isinstance(value, dict):
        return (type(value).__name__, [(told(key, known), told(one, known)) for key, one in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [told(one, known) for one in value])
    if is_dataclass(value):
        return (type(value).__name__, [told(getattr(value, field.name), known) for field in fields(value)])
    return value


def outcome(raw: bytes) -> Any:
    try:
        found = run(raw)
    except CheckpointError as error:
        return type(error), error.reason
    return told(found.value, {}), found.end, found.globals


@settings(max_examples=examples(300), deadline=None)
@given(raw=metadata(), place=st.integers(0, 1 << 16), byte=st.integers(0, 255), change=st.sampled_from(["none", "one", "cut", "twice"]))
def test_records_are_what_the_opcodes_make_of_them(raw: bytes, place: int, byte: int, change: str) -> None:
    place %= len(raw)
    if change == "one":
        raw = raw[:place] + bytes([byte]) + raw[place + 1 :]
    elif change == "cut":
        raw = raw[:place]
    elif change == "twice":
        raw = raw[:place] + raw[max(place - byte, 0) : place] + raw[place:]
    fast = outcome(raw)
    with by_opcodes():
        assert fast == outcome(raw)


def test_nearly_all_records_are_read_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the property would say nothing."""
    name, chunks = "layers.0.w", [torch.Size((row, 0)) for row in range(500)]
    rows = TensorStorageMetadata(
        TensorProperties(torch.float32), torch.Size((500, 4)), [ChunkStorageMetadata(one, torch.Size((1, 4))) for one in chunks]
    )
    stored = {MetadataIndex(name, one, 0): _StorageInfo(f"__{number}_0.distcp", 0, 9) for number, one in enumerate(chunks)}
    raw, read, values = pickle.dumps(Metadata({name: rows}, {}, stored)), Records.read, []

    def counted(self: Records, m: Any, position: int, end: int, stack: list[Any]) -> int:
        before = len(stack)
        found = read(self, m, position, end, stack)
        values.append(len(stack) - before)
        return found

    monkeypatch.setattr(Records, "read", counted)
    run(raw)
    assert sum(values) > 1450
