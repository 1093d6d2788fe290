"""The kernel of `rows`: rows as plain indexing gives them, fills as NumPy's mean or the target's own value, shapes as the adapter says."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from ckptsurgeon.adapters.kernels import rows as module
from ckptsurgeon.adapters.kernels.rows import KERNELS
from hypothesis import event, given, settings
from hypothesis import strategies as st

from ckptsurgeon.adapters.op import Place
from ckptsurgeon.adapters.rows import ROWS
from ckptsurgeon.errors import RuleError


def no_initial() -> torch.Tensor:
    raise AssertionError("only a fill with init asks for the target's initial value")


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint16, torch.bool, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_are_copied_bit_for_bit(dtype: torch.dtype, dim: int) -> None:
    given = (torch.arange(30).reshape(5, 6) % 7).to(dtype)
    index = [4, 0, 0, 2, 3, 1]
    op = ROWS["rows"].fill({"op": "rows", "index": index, "dim": dim}, Place(((5, 6),)))
    before = bits(given)
    (found,) = KERNELS["rows"]([given], op, no_initial)
    assert bits(found) == bits(given.view(torch.uint8).unflatten(1, (6, -1)).index_select(dim, torch.tensor(index)))
    assert bits(given) == before
    bias, head = KERNELS["rows"]([given[0], given], {**op, "dim": 0, "runs": [[0, 2, 3], [4, 1, 2]], "fill": "zeros"}, no_initial)
    assert bits(head[:3]) == bits(given[2:5]) and bits(head[4:]) == bits(given[1:3])
    assert bits(bias[:3]) == bits(given[0, 2:5]) and not any(bits(bias[3:4]) + bits(head[3]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_the_mean_is_that_of_all_source_rows(dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    torch.manual_seed(0)
    given = torch.randn(3, 50, 2).to(dtype) + 100
    op = {"op": "rows", "dim": 1, "rows": 4, "runs": [[1, 7, 2]], "fill": "mean"}
    (found,) = KERNELS["rows"]([given], op, no_initial)
    mean = torch.from_numpy(numpy.mean(given.to(torch.float64).numpy(), axis=1))
    assert torch.allclose(found[:, 0].to(torch.float64), mean.to(dtype).to(torch.float64), rtol=1e-12)
    assert torch.equal(found[:, 3], found[:, 0]) and torch.equal(found[:, 1:3], given[:, 7:9])


def test_initial_values_are_asked_for_once_and_fill_the_rows_without_a_source() -> None:
    asked: list[int] = []

    def initial() -> torch.Tensor:
        asked.append(1)
        return torch.arange(8.0).reshape(4, 2) + 0.5

    op = {"op": "rows", "dim": 0, "rows": 4, "runs": [[1, 0, 1], [3, 2, 1]], "fill": "init", "scheme": "model"}
    given = torch.ones(3, 2, dtype=torch.bfloat16)
    one, two = KERNELS["rows"]([given, given], op, initial)
    assert one.tolist() == two.tolist() == [[0.5, 1.5], [1, 1], [4.5, 5.5], [1, 1]]
    assert asked == [1] and one.dtype == torch.bfloat16
    (whole,) = KERNELS["rows"]([given], {**op, "rows": 2, "runs": [[0, 0, 2]]}, no_initial)  # nothing to fill: not asked
    assert whole.tolist() == [[1, 1], [1, 1]]
    with pytest.raises(RuleError, match=r"initial value has the shape \(4, 2\), not \(5, 2\)"):
        KERNELS["rows"]([given], {**op, "rows": 5}, initial)


def test_integers_have_no_mean() -> None:
    op = {"op": "rows", "dim": 0, "rows": 3, "runs": [[0, 0, 2]], "fill": "mean"}
    with pytest.raises(RuleError, match="no mean"):
        KERNELS["rows"]([torch.ones(2, 2, dtype=torch.int64)], op, no_initial)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_the_kernel_makes_the_shapes_that_the_adapter_says(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(3, 8) | st.integers(0, 8), max_size=3)))
    runs, end = [], 0
    for _ in range(data.draw(st.integers(0, 3))):
        start, count = end + data.draw(st.integers(0, 2)), data.draw(st.integers(1, 3) | st.integers(0, 3))
        runs.append([start, data.draw(st.integers(0, 2) | st.integers(0, 6)), count])
        end = start + count
    fill = data.draw(st.sampled_from(["mean", "zeros", "init", "none"]))
    op: dict[str, Any] = {"op": "rows", "dim": data.draw(st.integers(0, max(len(shape) - 1, 0)) | st.integers(0, 3))}
    op |= {"rows": max(end + data.draw(st.integers(-1, 2)), 0), "runs": runs, "fill": fill}
    op |= {"scheme": "model"} if fill == "init" else {}
    try:
        (expected,) = ROWS["rows"].infer(op, (shape,))
    except RuleError:
        event("refused")
        return
    event("computed")
    given = torch.randn(shape)
    (found,) = KERNELS["rows"]([given], op, lambda: torch.full(expected, 7.0))
    assert tuple(found.shape) == expected
    plain = torch.full(expected, 7.0) if fill == "init" else torch.zeros(expected)
    if fill == "mean" and shape[op["dim"]]:
        plain += given.mean(op["dim"], keepdim=True)
    for start, source, count in runs:
        plain.narrow(op["dim"], start, count).copy_(given.narrow(op["dim"], source, count))
    assert torch.allclose(found, plain, atol=1e-6)
