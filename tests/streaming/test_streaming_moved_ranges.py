"""Adapters that only move bytes: what the kernel copies is what the torch kernels would have made, for every chain, format and dtype."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from profiles import examples
from safetensors.torch import save_file

from ckptsurgeon import formats
from ckptsurgeon.adapters.chain import infer_chain
from ckptsurgeon.adapters.table import adapter_of
from ckptsurgeon.errors import RuleError
from ckptsurgeon.planning import roots
from ckptsurgeon.streaming.step_values import ranges_of
from ckptsurgeon.tensors import Checkpoint

Op = dict[str, Any]
SHAPES = [(6,), (4, 3), (1, 6, 2), (2, 2, 2, 3), (1, 1, 4), (0, 3), ()]


def written(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    path = folder / name
    save_file(tensors, path) if name.endswith(".safetensors") else torch.save(tensors, path)
    return roots.choose(formats.read(str(path)))


def read_pieces(pieces: Any) -> bytes:
    data = b""
    for piece in pieces:
        descriptor = os.open(piece.file, os.O_RDONLY)
        data += os.pread(descriptor, piece.nbytes, piece.offset)
        os.close(descriptor)
    return data


def dense(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""


def slow(tensors: list[torch.Tensor], ops: list[Op]) -> list[torch.Tensor]:
    for op in ops:
        tensors = list(adapter_of(op).kernel(op, tensors, lambda: torch.empty(0)))
    return tensors


small = st.integers(0, 4)
OPS = st.one_of(
    st.builds(lambda dim, one, two: {"op": "slice", "dim": dim, "start": min(one, two), "stop": max(one, two)}, small, small, small),
    st.builds(lambda dim, index, of: {"op": "chunk", "dim": dim, "index": index, "of": of}, small, st.integers(0, 2), st.integers(1, 3)),
    st.builds(lambda dim, index: {"op": "unstack", "dim": dim, "index": index}, small, small),
    st.builds(lambda dim, of: {"op": "concat", "dim": dim, "of": of}, small, st.integers(1, 4)),
    st.builds(lambda dim, of: {"op": "stack", "dim": dim, "of": of}, small, st.integers(1, 4)),
    st.builds(lambda shape: {"op": "reshape", "shape": shape}, st.sampled_from([[-1], [2, 3], [6, 2], [12], [24], [1, 4, 3], [3, 4]])),
    st.builds(
        lambda starts: {
            "op": "rows",
            "dim": 0,
            "rows": len(starts),
            "runs": [[place, start, 1] for place, start in enumerate(starts)],
            "fill": "none",
        },
        st.lists(st.integers(0, 3), min_size=1, max_size=4),
    ),
    st.builds(lambda dims: {"op": "transpose", "dims": dims}, st.sampled_from([[0, 1], [1, 0], [0, 0]])),
)


@settings(max_examples=examples(400), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from(SHAPES),
    count=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    suffix=st.sampled_from([".pt", ".safetensors"]),
    ops=st.lists(OPS, max_size=3),
)
def test_ranges_are_what_the_kernels_make(tmp_path: Path, shape: Any, count: int, dtype: torch.dtype, suffix: str, ops: list[Op]) -> None:
    tensors = [(torch.arange(torch.Size(shape).numel()).view(shape) + 31 * number).to(dtype) for number in range(count)]
    source = written(tmp_path, f"in{suffix}", {f"t{number}": tensor for number, tensor in enumerate(tensors)})
    try:
        shapes = infer_chain(ops, [shape] * count)
    except RuleError:
        return
    found = ranges_of([source[f"t{number}"] for number in range(count)], ops)
    expected = slow(tensors, ops)
    assert [tuple(one.shape) for one in expected] == list(shapes)
    if found is not None:
        assert len(expected) == 1 and read_pieces(found) == dense(expected[0])


@pytest.mark.parametrize(
    "ops",
    [
        [{"op": "slice", "dim": 0, "start": 1, "stop": 3}],
        [{"op": "chunk", "dim": 0, "index": 1, "of": 2}],
        [{"op": "reshape", "shape": [12, 1]}],
        [{"op": "unstack", "dim": 0, "index": 2}, {"op": "reshape", "shape": [3, 1]}],
        [{"op": "rows", "dim": 0, "rows": 2, "runs": [[0, 3, 1], [1, 0, 1]], "fill": "none"}],
    ],
    ids=lambda ops: ops[0]["op"],
)
def test_cuts_along_the_first_dimension_move_bytes_alone(tmp_path: Path, ops: list[Op]) -> None:
    source = written(tmp_path, "in.pt", {"t": torch.arange(12.0).view(4, 3)})
    found = ranges_of([source["t"]], ops)
    assert found is not None and read_pieces(found) == dense(slow([torch.arange(12.0).view(4, 3)], ops)[0])


def test_joins_along_the_first_dimension_move_bytes_alone(tmp_path: Path) -> None:
    tensors = {"q": torch.rand(2, 3), "k": torch.rand(4, 3)}
    source = written(tmp_path, "in.safetensors", tensors)
    found = ranges_of(list(source.values()), [{"op": "concat", "dim": 0, "of": 2}])
    assert found is not None and read_pieces(found) == dense(torch.cat([tensors[key] for key in source]))


def test_neighbours_in_a_file_are_one_piece(tmp_path: Path) -> None:
    source = written(tmp_path, "in.safetensors", {"a": torch.rand(2, 3), "b": torch.rand(2, 3)})
    found = ranges_of(list(source.values()), [{"op": "stack", "dim": 0, "of": 2}])
    assert found is not None and len(found) == 1


def test_what_scatters_or_computes_does_not_move_bytes_alone(tmp_path: Path) -> None:
    source = written(tmp_path, "in.pt", {"t": torch.rand(4, 3), "turned": torch.rand(3, 4).t()})
    assert ranges_of([source["t"]], [{"op": "transpose", "dims": [0, 1]}]) is None
    assert ranges_of([source["t"]], [{"op": "slice", "dim": 1, "start": 0, "stop": 2}]) is None
    assert ranges_of([source["turned"]], []) is None
