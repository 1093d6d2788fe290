"""Pieces: any block of any tensor, strided or tiled, is the bytes that NumPy's slicing gives; what is no whole tensor is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import FormatError, StaleError
from ckptsurgeon.storage import copying, pieces
from ckptsurgeon.storage.opening import open_regular
from ckptsurgeon.storage.pieces import merged, runs, tiled
from ckptsurgeon.streaming import sampling
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.step_values import ranges_of
from ckptsurgeon.tensors import Checkpoint, Packed, Piece, Span, TensorMeta, contiguous_stride, find_ties

DTYPES = {"U8": np.uint8, "I16": np.int16, "F32": np.float32, "F64": np.float64}
Box = tuple[tuple[int, int], ...]


def indices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def boxes(shape: tuple[int, ...]) -> st.SearchStrategy[Box]:
    edges = [st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda pair: (min(pair), max(pair))) for size in shape]
    return st.tuples(*edges)


class Files:
    """Files as they grow: each stretch of bytes that is put into one is a span."""

    def __init__(self) -> None:
        self.data: dict[str, bytearray] = {}

    def put(self, name: str, data: bytes, gap: int = 0) -> Span:
        held = self.data.setdefault(name, bytearray())
        held += b"\xee" * gap
        held += data
        return Span(name, len(held) - len(data), len(data), name)

    def bytes_of(self, ranges: Any) -> bytes:
        return b"".join(bytes(self.data[each.file][each.offset : each.offset + each.nbytes]) for each in ranges)

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(data) for name, data in self.data.items()}


@st.composite
def cuts(draw: st.DrawFn, box: Box, depth: int = 0) -> list[Box]:
    """A box cut in two at any place of any dimension, and again."""
    wide = [dim for dim, (start, stop) in enumerate(box) if stop - start > 1]
    if not wide or depth == 4 or draw(st.integers(0, 3)) == 0:
        return [box]
    dim = draw(st.sampled_from(wide))
    place = draw(st.integers(box[dim][0] + 1, box[dim][1] - 1))
    first, second = ((*box[:dim], part, *box[dim + 1 :]) for part in ((box[dim][0], place), (place, box[dim][1])))
    return [*draw(cuts(first, depth + 1)), *draw(cuts(second, depth + 1))]


@st.composite
def tilings(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], TensorMeta, Files, list[Piece]]:
    """An array, and a tensor in pieces (blocks, or runs of elements; some empty, some turned, some lying together) that is the same."""
    code = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.lists(st.integers(0 if draw(st.integers(0, 9)) == 0 else 1, 6), min_size=0, max_size=3).map(tuple))
    array = np.arange(math.prod(shape)).astype(DTYPES[code]).reshape(shape)
    if draw(st.booleans()):
        array = array % 3  # tied pieces: equal bytes, which may lie once
    as_runs = draw(st.booleans()) and len(shape) != 1
    whole: Any = array.reshape(-1) if as_runs else array
    files, found, known = Files(), [], dict[bytes, Span]()
    for box in draw(cuts(tuple((0, size) for size in whole.shape))):
        part = whole[indices(box)]
        order = draw(st.permutations(range(part.ndim)))
        dense = part.transpose(order).copy()
        stride = [0] * part.ndim
        for dim, step in zip(order, contiguous_stride(dense.shape), strict=True):
            stride[dim] = step
        data = dense.tobytes()
        span = known.get(data) if draw(st.booleans()) else None
        span = known[data] = span or files.put(draw(st.sampled_from("ab")), data, draw(st.sampled_from([0, 0, 3])))
        found.append(Piece(span, tuple(start for start, _ in box), part.shape, tuple(stride)))
    if found and draw(st.booleans()):
        empty = (0, *found[0].sizes[1:])
        found.append(replace(found[0], sizes=empty) if found[0].sizes else found[0])
        found = found if found[-1].sizes else found[:-1]
    made = draw(st.permutations(found))
    return array, tiled("w", code, shape, made, files.sizes), files, [piece for piece in made if all(piece.sizes)]


@given(tilings(), st.data())
@settings(deadline=None, max_examples=examples(300))
def test_a_block_of_a_tiled_tensor_is_what_numpy_slices(made: Any, data: st.DataObject) -> None:
    array, tensor, files, _ = made
    assert files.bytes_of(runs(tensor)) == array.tobytes()
    box = data.draw(boxes(array.shape))
    found = list(runs(tensor, box))
    assert files.bytes_of(found) == np.ascontiguousarray(array[indices(box)]).tobytes()
    assert all(each.nbytes for each in found)
    for one, other in pairwise(found):  # neighbours are one
        assert (one.file, one.offset + one.nbytes) != (other.file, other.offset)


@given(code=st.sampled_from(sorted(DTYPES)), data=st.data())
@settings(deadline=None, max_examples=examples(300))
def test_a_block_of_a_strided_tensor_is_what_numpy_slices(code: str, data: st.DataObject) -> None:
    base = np.arange(400).astype(DTYPES[code])
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3).map(tuple))
    stride = data.draw(st.tuples(*(st.integers(0, 7) for _ in shape)))
    start = data.draw(st.integers(0, 20))
    size = base.itemsize
    array = np.lib.stride_tricks.as_strided(base[start:], shape, tuple(step * size for step in stride))
    reach = 1 + sum((count - 1) * step for count, step in zip(shape, stride, strict=True)) if array.size else 0
    files = Files()
    span = files.put("a", base.tobytes())
    tensor = TensorMeta("w", code, shape, stride, replace(span, offset=start * size, nbytes=reach * size))
    box = data.draw(boxes(shape))
    assert files.bytes_of(runs(tensor, box)) == np.ascontiguousarray(array[indices(box)]).tobytes()
    assert files.bytes_of(runs(tensor)) == np.ascontiguousarray(array).tobytes()


@given(shape=st.lists(st.integers(0, 5), max_size=4).map(tuple), offset=st.integers(0, 99), packed=st.booleans())
@settings(deadline=None)
def test_the_fast_path_is_the_slow_one(shape: tuple[int, ...], offset: int, packed: bool) -> None:
    """The whole of a tensor that lies densely in one span, as nearly every one does."""
    stride = tuple(7 if size == 1 else step for size, step in zip(shape, contiguous_stride(shape), strict=True))
    span = Span("a", offset, math.prod(shape) * 4, "0", Packed(3, 4, 1000) if packed else None)
    tensor = TensorMeta("w", "F32", shape, stride, span)
    assert list(runs(tensor)) == list(merged(pieces._ranges(tensor, tuple((0, size) for size in shape))))
    assert not math.prod(shape) or runs(tensor)[0] is span  # type: ignore[index]


def test_rows_that_lie_one_after_the_other_are_one_range() -> None:
    files = Files()
    parts = [Piece(files.put("a", bytes(32)), (start, 0), (2, 4), (4, 1)) for start in range(0, 100, 2)]
    tensor = tiled("w", "F32", (100, 4), parts, files.sizes)
    assert [(run.offset, run.nbytes) for run in runs(tensor)] == [(0, 1600)]
    assert [(run.offset, run.nbytes) for run in runs(tensor, ((3, 50), (0, 4)))] == [(48, 752)]


def test_many_pieces_cost_no_more_than_they_are() -> None:
    files = Files()
    parts = [Piece(files.put(f"{start % 7}", bytes(4)), (start,), (1,), (1,)) for start in range(20_000)]
    tensor = tiled("w", "F32", (20_000,), parts, files.sizes)
    assert sum(1 for _ in runs(tensor)) == 20_000
    vast = [Piece(Span("a", 0, 4, "a"), (0, 0), (1, 1), (1, 1)), Piece(Span("a", 0, 4, "a"), (0, 1), (1, 1), (1, 1))]
    with pytest.raises(FormatError):  # without a step for each of its rows
        tiled("w", "F32", (1 << 60, 2), vast, {"a": 4})


@given(tilings(), st.data())
@settings(deadline=None, max_examples=examples(150))
def test_a_tensor_that_lacks_a_piece_or_has_one_twice_is_refused(made: Any, data: st.DataObject) -> None:
    array, tensor, files, kept = made
    if not kept:
        return
    piece = data.draw(st.sampled_from(kept))
    rest = list(kept)
    rest.remove(piece)
    if rest:
        with pytest.raises(FormatError, match="not the whole tensor") as lacking:
            tiled("w", tensor.dtype, array.shape, rest, files.sizes)
        assert lacking.value.key == "w" and "lie in no piece" in lacking.value.problems[0]
    with pytest.raises(FormatError) as double:
        tiled("w", tensor.dtype, array.shape, [*kept, piece], files.sizes)
    assert any("lie in 2 pieces" in problem for problem in double.value.problems)


WHOLE = [Piece(Span("a", 0, 32, "a"), (0, 0), (2, 4), (4, 1)), Piece(Span("b", 0, 32, "b"), (2, 0), (2, 4), (4, 1))]
WRONG: dict[str, tuple[list[Piece], dict[str, int], str]] = {
    "a file that is not there": (WHOLE, {"a": 32}, "rows 2 to 3 lie in b, which is not there"),
    "a file that is too short": (WHOLE, {"a": 32, "b": 31}, "rows 2 to 3 reach out of b, which has 31 bytes"),
    "rows that are left out": ([WHOLE[0], replace(WHOLE[1], sizes=(1, 4))], {}, "rows 3 to 3 lie in no piece"),
    "columns that are left out": ([WHOLE[0], replace(WHOLE[1], sizes=(2, 3))], {}, r"elements [2:4, 3:4] lie in no piece"),
    "rows that lie twice": ([WHOLE[0], replace(WHOLE[1], offsets=(1, 0))], {}, "rows 1 to 1 lie in 2 pieces, in a and b"),
    "out of the tensor": ([WHOLE[0], replace(WHOLE[1], offsets=(3, 0))], {}, "a piece in b reaches out of the tensor: rows 3 to 4"),
    "before the tensor": ([replace(WHOLE[0], offsets=(-1, 0))], {}, "a piece in a reaches out of the tensor"),
    "a span that is too small": ([replace(WHOLE[0], stride=(5, 1))], {}, "rows 0 to 1 reach out of a"),
    "another number of dimensions": ([WHOLE[0], replace(WHOLE[1], offsets=(2,))], {}, "has 2 dimensions, where the others have 1"),
    "runs that leave elements out": ([Piece(Span("a", 0, 20, "a"), (0,), (5,), (1,))], {}, "elements 5 to 15 lie in no piece"),
    "nothing": ([], {}, "rows 0 to 3 lie in no piece"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_error_names_the_file_and_the_rows(name: str) -> None:
    found, sizes, words = WRONG[name]
    with pytest.raises(FormatError, match="has pieces that are not the whole tensor") as error:
        tiled("fc.weight", "F32", (4, 4), found, sizes or {"a": 32, "b": 32})
    assert any(words in problem for problem in error.value.problems), error.value.problems
    assert error.value.key == "fc.weight" and error.value.hint
    assert error.value.path == ("b" if name == "a file that is not there" else None)


# Everything that reads bytes, over one checkpoint in pieces.


def stored(folder: Path, values: dict[str, np.ndarray[Any, Any]], make: Callable[[str, Any, Files], TensorMeta]) -> Checkpoint:
    files = Files()
    tensors = {key: make(key, value, files) for key, value in values.items()}
    for name, data in files.data.items():
        Path(name).write_bytes(data)
    stamps = []
    for name in files.data:
        with open_regular(name) as file:
            stamps.append(file.stamp)
    return Checkpoint(str(folder), "raw", "f" * 64, tensors, files=tuple(stamps), ties=find_ties(tensors))


def by_columns(key: str, value: Any, files: Files) -> TensorMeta:
    """Halves of columns in two files, one of them turned; what has one dimension in runs."""
    if value.ndim != 2:
        flat = np.asarray(value).reshape(-1)
        middle = len(flat) // 2
        runs_of = [(0, flat[:middle]), (middle, flat[middle:])]
        found = [Piece(files.put("one", part.tobytes(), 5), (start,), (len(part),), (1,)) for start, part in runs_of]
        return tiled(key, "F32", value.shape, found, files.sizes)
    middle = value.shape[1] // 2
    left, right = value[:, :middle], value[:, middle:]
    return tiled(
        key,
        "F32",
        value.shape,
        [
            Piece(files.put("one", np.ascontiguousarray(left).tobytes(), 1), (0, 0), left.shape, (middle, 1)),
            Piece(files.put("two", np.ascontiguousarray(right).tobytes()), (0, middle), right.shape, (value.shape[1] - middle, 1)),
        ],
        files.sizes,
    )


def turned(key: str, value: Any, files: Files) -> TensorMeta:
    tensor = by_columns(key, value, files)
    if value.ndim != 2:
        return tensor
    right = np.ascontiguousarray(value[:, value.shape[1] // 2 :].T)
    last = replace(tensor.pieces[1], span=files.put("three", right.tobytes()), stride=(1, value.shape[0]))
    return tiled(key, "F32", value.shape, [tensor.pieces[0], last], files.sizes)


@pytest.fixture
def values() -> dict[str, np.ndarray[Any, Any]]:
    torch.manual_seed(0)
    return {key: value.numpy() for key, value in nn.Linear(50, 30).state_dict().items()}


@pytest.mark.parametrize("make", [by_columns, turned])
@pytest.mark.parametrize("buffer", [16, 400, 4 << 20])
def test_a_reader_reads_it(make: Any, buffer: int, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(copying, "BUFFER", buffer)
    found = stored(tmp_path, values, make)
    with Reader([found]) as reader:
        for key, value in values.items():
            memory = bytearray(value.nbytes)
            for read in reader.reads(found[key], memoryview(memory)):
                read.do()
            parts = [bytes(part) for part in reader.parts(found[key])]
            assert bytes(reader.read(found[key])) == bytes(memory) == b"".join(parts) == value.tobytes()
            if found[key].as_stored:
                assert {len(part) for part in parts[:-1]} <= {buffer}
                assert bytes(reader.rows(found[key], 3, 7)) == value[3:7].tobytes()
        reader.check_unchanged()


@pytest.mark.parametrize("make", [by_columns, turned])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_it_is_merged_transferred_and_sampled(
    make: Any, suffix: str, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = stored(tmp_path, values, make)
    report = cs.merge(found, nn.Linear(50, 30), f"out{suffix}")  # with the proof, which reads it again
    assert not report.fresh
    written = cs.open(f"out{suffix}")
    with Reader([written]) as reader:
        assert {key: bytes(reader.read(written[key])) for key in written} == {key: value.tobytes() for key, value in values.items()}
    model = nn.Linear(50, 30)
    cs.transfer(found, model)
    assert all(np.array_equal(value.numpy(), values[key]) for key, value in model.state_dict().items())
    before = sampling.sample(found)
    with open("one", "r+b") as file:
        file.write(bytes(3000))
    with pytest.raises(StaleError):
        sampling.sample(found)
    assert before != sampling.sample(replace(found, files=()))


def test_only_bytes_move_where_only_bytes_move(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces in row-major order are copied by the kernel; nothing else reads them."""
    monkeypatch.chdir(tmp_path)
    found = stored(tmp_path, values, by_columns)
    assert ranges_of([found["weight"]], []) is None  # side by side: put together in bands, as tests/streaming/test_streaming_bands.py tells
    files = Files()
    rows = tiled(
        "w", "F32", (6, 2), [Piece(files.put(name, bytes(24)), (at, 0), (3, 2), (2, 1)) for name, at in (("a", 0), ("b", 3))], files.sizes
    )
    assert ranges_of([rows], []) == tuple(runs(rows))
    cut = ranges_of([rows], [{"op": "slice", "dim": 0, "start": 2, "stop": 5}])
    assert cut == tuple(runs(rows, ((2, 5), (0, 2))))
    turned_round = stored(tmp_path, values, turned)
    assert ranges_of([turned_round["weight"]], []) is None


def test_tensors_of_the_same_pieces_are_tied(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = Files()
    first = by_columns("a", values["weight"], files)
    assert find_ties({"a": first, "b": replace(first, name="b"), "c": by_columns("c", values["weight"], files)}) == (("a", "b"),)


@given(tilings(), st.data())
@settings(deadline=None, max_examples=examples(100))
def test_a_cut_along_the_first_dimension_is_the_rows_of_a_block(made: Any, data: st.DataObject) -> None:
    array, tensor, _, _ = made
    if not array.ndim or not array.size or not tensor.as_stored or ranges_of([tensor], []) is None:
        return  # scattered, or side by side: put together in bands
    start = data.draw(st.integers(0, array.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, array.shape[0]))
    block = ((start, stop), *((0, size) for size in array.shape[1:]))
    assert ranges_of([tensor], [{"op": "slice", "dim": 0, "start": start, "stop": stop}]) == tuple(runs(tensor, block))


def test_many_rows_of_many_ranges_are_found_at_once() -> None:
    """A table lies in a thousand files, and its rows are turned round; a step for each pair of a row and a range would not end."""
    files = Files()
    parts = [Piece(files.put(str(at), bytes(8 * 20)), (20 * at, 0), (20, 2), (2, 1)) for at in range(1000)]
    tensor = tiled("w", "F32", (20_000, 2), parts, files.sizes)
    op = {"op": "rows", "dim": 0, "rows": 20_000, "runs": [[19_999 - row, row, 1] for row in reversed(range(20_000))], "fill": "none"}
    assert len(ranges_of([tensor], [op]) or ()) == 20_000
