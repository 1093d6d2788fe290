"""The adapter `rows`: which row takes which, held against plain dicts; its values, against plain indexing and NumPy's mean."""

from __future__ import annotations

import json
from typing import Any

import numpy
import pytest
import torch
from adapters_support import run
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.adapters import widening
from ckptsurgeon.adapters.op import FillContext
from ckptsurgeon.adapters.table import load
from ckptsurgeon.errors import RuleError

ADAPTER = load("rows")
Lines = list[str | None]


def filled(rows: int, wanted: int | None = None, **fields: Any) -> dict[str, Any]:
    return dict(ADAPTER.fill({"op": "rows", **fields}, FillContext(((rows, 4),), None if wanted is None else (wanted, 4))))


def taken(op: dict[str, Any]) -> list[int | None]:
    """The source's row for each of the target's, from the runs."""
    found: list[int | None] = [None] * op["rows"]
    for start, source, count in op["runs"]:
        for step in range(count):
            assert found[start + step] is None
            found[start + step] = source + step
    return found


def test_by_numbers() -> None:
    op = filled(8, index=[3, 7, 0])
    assert op == {"op": "rows", "dim": 0, "rows": 3, "runs": [[0, 3, 1], [1, 7, 1], [2, 0, 1]], "fill": "none"}
    assert filled(8, 3, index=(4, 5, 6))["runs"] == [[0, 4, 3]]
    assert filled(8, 5, index=[2, -1, 3], fill="zeros")["runs"] == [[0, 2, 1], [2, 3, 1]]
    assert filled(8, index=[-1, 0], fill="mean", dim=-2)["dim"] == 0


def test_by_tokens() -> None:
    source, target = ("<pad>", "the", "cat", "sat"), ("the", "cat", "<new>", "dog", "sat")
    op = filled(4, 8, source=source, target=target, fill="mean", copy={"<new>": "the"})
    assert op == {"op": "rows", "dim": 0, "rows": 8, "runs": [[0, 1, 2], [2, 1, 1], [4, 3, 1]], "fill": "mean"}
    assert ADAPTER.infer(op, ((4, 4), (4,))) == ((8, 4), (8,))
    init = filled(6, 8, source=source, target=target, fill="init", copy={"the": "cat"})
    assert (init["scheme"], taken(init)) == ("model", [2, 2, None, None, 3, None, None, None])
    assert filled(4, 5, source=source, target=target, fill="init", scheme="normal(std=0.02)")["scheme"] == "normal(std=0.02)"
    assert json.loads(json.dumps(op)) == op
    whole = filled(4, 4, source=source, target=source, fill="init")
    assert whole == {"op": "rows", "dim": 0, "rows": 4, "runs": [[0, 0, 4]], "fill": "none"}  # nothing to fill, nothing to ask a model for


@pytest.mark.parametrize(
    ("words", "rows", "wanted", "fields"),
    [
        (
            "3 of the target's 6 rows have no counterpart in the source: 'x', row 3 .no token., row 5 .no token.",
            4,
            6,
            {"target": ["a", "x", "b", None, "c"]},
        ),
        ("7 of the target's 8 rows .*: 'x1', 'x2', 'x3', 'x4', 'x5' \\.\\.\\.", 4, 8, {"target": ["a", *(f"x{i}" for i in range(1, 8))]}),
        ("the target has 2 rows, and its list has 3 tokens", 4, 2, {"target": ["a", "b", "c"]}),
        ("the source has 2 rows, and its list has 3 tokens", 2, 3, {"target": ["a", "b", "c"]}),
        ("no token in common", 4, 2, {"target": ["x", "y"], "fill": "mean"}),
        ("the target's list has the token 'a' twice", 4, 2, {"target": ["a", "a"]}),
        ("the source's list has the token 'b' twice", 4, 2, {"target": ["a", "b"], "source": ["b", "a", "b"]}),
        ("copy names tokens that are not there\n.*'n' is no token of the target", 4, 2, {"target": ["a", "b"], "copy": {"n": "a"}}),
        ("'m' is no token of the source", 4, 2, {"target": ["a", "n"], "copy": {"n": "m"}}),
        ("the list 'a/vocab.txt' was not read", 4, 2, {"target": ["a"], "source": "a/vocab.txt"}),
        ("the source has 4 rows, and none with the number 4", 4, 2, {"index": [0, 4]}),
        ("not index and source", 4, 2, {"index": [0, 1], "source": ["a"]}),
        ("the target has 1 rows, and its list has 2 numbers", 4, 1, {"index": [0, 1]}),
        ("1 of the target's 3 rows have no counterpart in the source: row 1", 4, 3, {"index": [0, -1, 2]}),
        ("needs an index, or both", 4, 2, {"source": ["a"]}),
        ("only it takes a scheme", 4, 2, {"index": [0, 1], "scheme": "zeros"}),
        ("last adapter", 4, None, {"index": [0, -1], "fill": "init"}),
        ("has no dimension 2", 4, 2, {"index": [0, 1], "dim": 2}),
        ("a plan's own fields", 4, 2, {"runs": [[0, 0, 2]]}),
    ],
)
def test_what_can_not_be_told_is_refused(words: str, rows: int, wanted: int | None, fields: dict[str, Any]) -> None:
    if "target" in fields:
        fields = {"source": ["a", "b", "c"], **fields}
    with pytest.raises(RuleError, match=f"(?s){words}"):
        filled(rows, wanted, **fields)


@settings(max_examples=examples(200), deadline=None)
@given(
    source=st.lists(st.none() | st.sampled_from("abcdefgh"), max_size=8),
    target=st.lists(st.none() | st.sampled_from("abcdefgh"), max_size=8),
    more=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_each_token_takes_the_row_of_the_same_token(source: Lines, target: Lines, more: tuple[int, int]) -> None:
    rows, wanted = len(source) + more[0], len(target) + more[1]
    try:
        op = filled(rows, wanted, source=source, target=target, fill="zeros")
    except RuleError:
        twice = any(len(names := [one for one in lines if one]) != len(set(names)) for lines in (source, target))
        assert twice or not ({*source} & {*target}) - {None}
        return
    assert taken(op) == [source.index(token) if token and token in source else None for token in target] + [None] * more[1]
    starts = [(run[0] + run[2], run[1] + run[2]) for run in op["runs"]]
    assert not set(starts) & {(run[0], run[1]) for run in op["runs"]}  # no two runs that are one
    assert ADAPTER.infer(op, ((rows, 3),)) == ((wanted, 3),)


@settings(max_examples=examples(60), deadline=None)
@given(index=st.permutations(range(5)))
def test_a_permutation_is_undone(index: list[int]) -> None:
    back = ADAPTER.invert({"op": "rows", "index": index})
    assert back is not None
    once, again = taken(filled(5, 5, index=index)), taken(filled(5, 5, index=back["index"]))
    assert [once[row] for row in again if row is not None] == list(range(5))
    assert ADAPTER.invert({"op": "rows", "index": [*index, 0]}) is None
    assert ADAPTER.invert({"op": "rows", "source": "a", "target": "b"}) is None


def test_fields_take_what_a_rule_or_a_caller_gives() -> None:
    good: dict[str, Any] = {"source": "a.txt", "target": ("a", None), "copy": {"a": "b"}, "index": [0, -1], "scheme": "zeros", "dim": -1}
    assert all(ADAPTER.fields[name](value) for name, value in good.items())
    bad: dict[str, Any] = {"source": "", "target": ["a", 1], "copy": {"a": 1}, "index": [-2], "fill": None, "runs": [[0, 0]], "rows": True}
    assert not any(ADAPTER.fields[name](value) for name, value in bad.items())


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint16, torch.bool, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_are_copied_bit_for_bit(dtype: torch.dtype, dim: int) -> None:
    given = (torch.arange(30).reshape(5, 6) % 7).to(dtype)
    index = [4, 0, 0, 2, 3, 1]
    op = ADAPTER.fill({"op": "rows", "index": index, "dim": dim}, FillContext(((5, 6),)))
    before = bits(given)
    (found,) = run(op, given)
    assert bits(found) == bits(given.view(torch.uint8).unflatten(1, (6, -1)).index_select(dim, torch.tensor(index)))
    assert bits(given) == before
    bias, head = run({**op, "dim": 0, "runs": [[0, 2, 3], [4, 1, 2]], "fill": "zeros"}, given[0], given)
    assert bits(head[:3]) == bits(given[2:5]) and bits(head[4:]) == bits(given[1:3])
    assert bits(bias[:3]) == bits(given[0, 2:5]) and not any(bits(bias[3:4]) + bits(head[3]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_the_mean_is_that_of_all_source_rows(dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widening, "BLOCK_ELEMENTS", piece)
    torch.manual_seed(0)
    given = torch.randn(3, 50, 2).to(dtype) + 100
    op = {"op": "rows", "dim": 1, "rows": 4, "runs": [[1, 7, 2]], "fill": "mean"}
    (found,) = run(op, given)
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
    one, two = run(op, given, given, initial=initial)
    assert one.tolist() == two.tolist() == [[0.5, 1.5], [1, 1], [4.5, 5.5], [1, 1]]
    assert asked == [1] and one.dtype == torch.bfloat16
    (whole,) = run({**op, "rows": 2, "runs": [[0, 0, 2]]}, given)  # nothing to fill: not asked
    assert whole.tolist() == [[1, 1], [1, 1]]
    with pytest.raises(RuleError, match=r"initial value has the shape \(4, 2\), not \(5, 2\)"):
        run({**op, "rows": 5}, given, initial=initial)


def test_integers_have_no_mean() -> None:
    op = {"op": "rows", "dim": 0, "rows": 3, "runs": [[0, 0, 2]], "fill": "mean"}
    with pytest.raises(RuleError, match="no mean"):
        run(op, torch.ones(2, 2, dtype=torch.int64))
