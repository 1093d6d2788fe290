"""Tensors in pieces side by side, put together by bands: against NumPy's slicing, and through a merge whose proof is bitwise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckptsurgeon as cs
from ckptsurgeon.errors import VerificationError
from ckptsurgeon.storage.pieces import runs
from ckptsurgeon.streaming import bands as module
from ckptsurgeon.streaming import reading
from ckptsurgeon.streaming.bands import bands, piece_ranges, side_by_side
from ckptsurgeon.tensors import Piece, Span, TensorMeta, contiguous_stride

TYPES = {"U8": numpy.uint8, "I16": numpy.int16, "F32": numpy.float32, "F64": numpy.float64, "C128": numpy.complex128}


def cut(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """A dimension in parts."""
    edges = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
    return list(itertools.pairwise(edges))


@given(data=st.data(), buffer=st.sampled_from([1, 40, 200, 1 << 20]), strided=st.sampled_from([0, 64]))
def test_bands_are_the_whole_tensor(data: st.DataObject, buffer: int, strided: int) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    code = data.draw(st.sampled_from(sorted(TYPES)))
    whole = numpy.arange(numpy.prod(shape)).reshape(shape).astype(TYPES[code])
    parts = data.draw(st.permutations(list(itertools.product(*(cut(data.draw, size) for size in shape)))))
    stored, pieces = b"", []
    for block in parts:
        raw = whole[tuple(slice(*edge) for edge in block)].tobytes()
        sizes = tuple(stop - start for start, stop in block)
        span = Span("a", len(stored), len(raw), str(len(stored)))
        pieces.append(Piece(span, tuple(start for start, _ in block), sizes, contiguous_stride(sizes)))
        stored += raw

    def read(span: Span, memory: memoryview) -> None:
        memory[:] = stored[span.offset : span.offset + span.nbytes]

    tensor = TensorMeta("w", code, shape, contiguous_stride(shape), None, tuple(pieces))
    assert sum(piece_ranges(shape, piece) for piece in pieces) >= len(list(runs(tensor)))
    if side_by_side(tensor):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "BUFFER", buffer)
            patch.setattr(module, "_STRIDED", strided)
            assert b"".join(map(bytes, bands(tensor, read))) == whole.tobytes()
    else:
        assert all(piece_ranges(shape, piece) == 1 for piece in pieces)


def test_long_ranges_are_left_to_the_kernel() -> None:
    def halves(columns: int) -> TensorMeta:
        both = [Piece(Span("a", at, 8 * columns, str(at)), (0, at), (2, columns), (columns, 1)) for at in (0, columns)]
        return TensorMeta("w", "F32", (2, 2 * columns), (2 * columns, 1), None, tuple(both))

    assert side_by_side(halves(1000)) and not side_by_side(halves(20_000))


def test_a_byte_that_went_wrong_on_its_way_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof reads the source once more: what was made wrong is no measure of itself."""
    folder = Path(__file__).parent.parent / "formats/data/dcp/tp2"
    cs.merge(folder, None, tmp_path / "good.safetensors")
    calls = []

    def wrong(tensor: TensorMeta, read: module.Read) -> Iterator[memoryview]:
        calls.append(tensor.name)
        for band in bands(tensor, read):
            band[5] ^= calls.count(tensor.name) == 1
            yield band

    monkeypatch.setattr(reading, "bands", wrong)
    with pytest.raises(VerificationError, match=r"down\.weight: its bytes differ"):
        cs.merge(folder, None, tmp_path / "bad.safetensors")
    assert calls == ["down.weight", "down.weight"]
