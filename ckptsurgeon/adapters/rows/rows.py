"""`rows` chooses which row of a source becomes which row of a target, by numbers or by the names of tokens and labels.

No file is read here: a rule's `source` and `target` are paths until the caller replaces them by the lists. A row without a
counterpart is an error unless the rule says what fills it. The filled op holds whole runs of rows, so that most rows need no number. Rows
are copied bit by bit, in any dtype; a mean is that of all of the source's rows, summed in float64.

>>> import torch
>>> op = {"dim": 0, "rows": 3, "runs": [[0, 1, 2]], "fill": "zeros"}
>>> ROWS.kernel(op, [torch.tensor([10, 11, 12])], None)[0].tolist()
[11, 12, 0]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from ckptsurgeon.adapters import widening
from ckptsurgeon.adapters.op import (
    Adapter,
    Check,
    FillContext,
    Initial,
    Op,
    Range,
    Shape,
    Tensor,
    list_of,
    one_of,
    signed,
    whole,
    zeros_where_filled,
)
from ckptsurgeon.adapters.shapes import MOST_ELEMENTS, checked, cut, in_words, resized
from ckptsurgeon.errors import RuleError

_EXAMPLE = "rows(source='a/vocab.txt', target='b/tokenizer.json', fill='mean') or rows(index=[3, 7, 0])"
_FILLED = ("dim", "rows", "runs", "fill")
_FILLS = one_of("mean", "zeros", "init", "none")


def _text(value: Any) -> bool:
    return type(value) is str and bool(value)


def _tokens(value: Any) -> bool:
    return _text(value) or list_of(lambda item: item is None or type(item) is str)(value)


def _row(value: Any) -> bool:
    return signed(value) and value >= -1


def _copy(value: Any) -> bool:
    return type(value) is dict and all(type(text) is str for pair in value.items() for text in pair)


def _run(value: Any) -> bool:
    return list_of(whole)(value) and len(value) == 3


_FIELDS: dict[str, Check] = {
    "index": list_of(_row),
    "source": _tokens,
    "target": _tokens,
    "fill": _FILLS,
    "copy": _copy,
    "scheme": _text,
    "dim": signed,
    "rows": whole,
    "runs": list_of(_run),
}


def _infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    names = (*_FILLED, "scheme") if op.get("fill") == "init" else _FILLED
    dim, rows, runs, *_ = checked(op, {name: _FIELDS[name] for name in names})
    covered, end, needed = 0, 0, 0
    for start, source, count in runs:
        if start < end or not count or start + count > rows:
            raise RuleError(f"rows: the run [{start}, {source}, {count}] is empty, overlaps the one before, or leaves the {rows} rows")
        covered, end, needed = covered + count, start + count, max(needed, source + count)
    if covered < rows and op["fill"] == "none":
        raise RuleError(f"rows: {rows - covered} of {rows} rows have no source and no fill")
    results: list[Shape] = []
    for shape in shapes:
        if dim not in range(len(shape)) or shape[dim] < needed:
            raise RuleError(f"rows: {in_words(shape)} has not the {needed} rows that are taken along dim {dim}")
        if covered < rows and op["fill"] == "mean" and not shape[dim]:
            raise RuleError(f"rows: {in_words(shape)} has no rows to take the mean of")
        results.append(resized(shape, dim, rows))
        if prod(size or 1 for size in results[-1]) >= MOST_ELEMENTS:
            raise RuleError(f"rows can't make {in_words(results[-1])}")
    return tuple(results)


def _fill(op: Op, context: FillContext) -> Op:
    if "runs" in op or "rows" in op:
        raise RuleError("rows and runs are a plan's own fields", hint=f"write {_EXAMPLE}")
    if not context.shapes:
        raise RuleError("rows has no tensor to work on")
    shape, fill = context.shapes[0], op.get("fill", "none")
    dim = op.get("dim", 0)
    dim += len(shape) if dim < 0 else 0
    if dim not in range(len(shape)):
        raise RuleError(f"rows: {in_words(shape)} has no dimension {op.get('dim', 0)}")
    source_rows, target_rows = shape[dim], _target_rows(context, shape, dim)
    if ("scheme" in op and fill != "init") or (fill == "init" and target_rows is None):
        raise RuleError(
            "rows: fill 'init' takes the target's own initial value, and only it takes a scheme",
            hint="use it in a rule's last adapter and with a target that is known",
        )
    sources, label = _by_index(op, source_rows) if "index" in op else _by_tokens(op, source_rows)
    if target_rows is not None and target_rows < len(sources):
        entries = "numbers" if "index" in op else "tokens"
        raise RuleError(
            f"rows: the target has {target_rows} rows, and its list has {len(sources)} {entries}", hint="is it the list of this target?"
        )
    sources += [None] * ((target_rows or len(sources)) - len(sources))
    missing = [row for row, source in enumerate(sources) if source is None]
    if missing and fill == "none":
        first_few = ", ".join(label(row) for row in missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise RuleError(
            f"rows: {len(missing)} of the target's {len(sources)} rows have no counterpart in the source: {first_few}",
            hint="say what they get: fill='mean', 'zeros' or 'init', or copy={'<new>': 'the'} for single tokens",
        )
    fill = fill if missing else "none"  # where nothing is missing, the target's initial value is not needed
    scheme = {"scheme": op.get("scheme", "model")} if fill == "init" else {}
    return {"op": "rows", "dim": dim, "rows": len(sources), "runs": list(_runs(sources)), "fill": fill, **scheme}


def _target_rows(context: FillContext, shape: Shape, dim: int) -> int | None:
    if context.target is None:
        return None
    if len(context.target) != len(shape):
        raise RuleError(f"rows does not make {in_words(context.target)} of {in_words(shape)}: it keeps the number of dimensions")
    return context.target[dim]


def _runs(sources: Sequence[int | None]) -> Iterator[list[int]]:
    """The longest runs of target rows whose source rows follow each other too, as [target, source, count].

    >>> list(_runs([4, 5, None, 6, 0]))
    [[0, 4, 2], [3, 6, 1], [4, 0, 1]]
    """
    run: list[int] | None = None
    for row, source in enumerate(sources):
        if source is not None and run is not None and (row, source) == (run[0] + run[2], run[1] + run[2]):
            run[2] += 1
            continue
        if run is not None:
            yield run
        run = None if source is None else [row, source, 1]
    if run is not None:
        yield run


def _by_index(op: Op, source_rows: int) -> tuple[list[int | None], Callable[[int], str]]:
    """The source row for each target row (None for -1), and a function that names a target row in messages."""
    if unused := [name for name in ("source", "target", "copy") if name in op]:
        raise RuleError(f"rows takes index or lists of tokens, not index and {unused[0]}", hint=f"write {_EXAMPLE}")
    index = op["index"]
    if beyond := [row for row in index if row >= source_rows]:
        raise RuleError(f"rows: the source has {source_rows} rows, and none with the number {beyond[0]}")
    return [None if row < 0 else row for row in index], lambda row: f"row {row}"


def _by_tokens(op: Op, source_rows: int) -> tuple[list[int | None], Callable[[int], str]]:
    """The same by tokens: a token that is a key of `copy` takes the row of its value there, any other the row of the same token."""
    if "source" not in op or "target" not in op:
        raise RuleError("rows needs an index, or both a source and a target", hint=f"write {_EXAMPLE}")
    source, target = op["source"], op["target"]
    if unread := [tokens for tokens in (source, target) if type(tokens) is str]:
        raise RuleError(f"rows: the list {unread[0]!r} was not read")
    if len(source) > source_rows:
        raise RuleError(
            f"rows: the source has {source_rows} rows, and its list has {len(source)} tokens", hint="is it the list of this source?"
        )
    source_numbers, target_numbers = _numbered(source, "source"), _numbered(target, "target")
    copy: Mapping[str, str] = op.get("copy", {})
    problems = [f"{token!r} is no token of the target" for token in copy if token not in target_numbers]
    problems += [f"{token!r} is no token of the source" for token in copy.values() if token not in source_numbers]
    if problems:
        raise RuleError("rows: copy names tokens that are not there", problems=tuple(problems))
    sources = [None if token is None else source_numbers.get(copy.get(token, token)) for token in target]
    if target and not any(row is not None for row in sources):
        raise RuleError("rows: the two lists have no token in common", hint="are they what the two models were trained with?")
    return sources, lambda row: repr(target[row])[:60] if row < len(target) and target[row] is not None else f"row {row} (no token)"


def _numbered(tokens: Sequence[str | None], which: str) -> dict[str, int]:
    rows = {token: row for row, token in enumerate(tokens) if token is not None}
    if len(rows) != len(tokens) - sum(token is None for token in tokens):
        repeated = next(token for row, token in enumerate(tokens) if token is not None and rows[token] != row)
        raise RuleError(f"rows: the {which}'s list has the token {repeated!r} twice")
    return rows


def _invert(op: Op) -> Op | None:
    index = op.get("index")
    if index is None or sorted(index) != list(range(len(index))):
        return None
    back = sorted(range(len(index)), key=index.__getitem__)
    return {"op": "rows", "index": back, **{name: op[name] for name in ("dim",) if name in op}}


def _covered(op: Op) -> int:
    """How many rows come from the source."""
    return sum(count for _, _, count in op["runs"])


def _range(op: Op, tensor: int, shape: Shape) -> list[Range] | None:
    parts = [cut(tensor, shape, op["dim"], start, start + count) for _, start, count in op["runs"]]
    if not parts or _covered(op) != op["rows"]:
        return None  # rows without a counterpart are filled, not moved
    return None if None in parts else [part for ranges in parts if ranges is not None for part in ranges]


def _kernel(op: Op, tensors: Sequence[Tensor], initial: Initial) -> list[Tensor]:
    holes = list(_holes(op["runs"], op["rows"]))
    initial_value = initial() if holes and op["fill"] == "init" else None  # called once: it may build a model
    return [_with_rows(tensor, op, holes, initial_value) for tensor in tensors]


def _holes(runs: Sequence[Sequence[int]], rows: int) -> Iterator[tuple[int, int]]:
    """Where the rows without a run start, and how many they are.

    >>> list(_holes([[1, 0, 2], [3, 7, 1]], 6))
    [(0, 1), (4, 2)]
    """
    end = 0
    for start, _, count in (*runs, (rows, 0, 0)):
        if start > end:
            yield end, start - end
        end = start + count


def _with_rows(tensor: Tensor, op: Op, holes: Sequence[tuple[int, int]], initial: Tensor | None) -> Tensor:
    dim = op["dim"]
    result = _copied(tensor, dim, op["rows"], op["runs"])
    if not holes:
        return result
    if initial is not None and initial.shape != result.shape:
        raise RuleError(f"rows: the target's initial value has the shape {tuple(initial.shape)}, not {tuple(result.shape)}")
    mean = _mean(tensor, dim) if op["fill"] == "mean" else None
    for start, count in holes:
        hole = result.narrow(dim, start, count)
        if mean is not None:
            hole.copy_(mean)
        elif initial is not None:
            hole.copy_(initial.narrow(dim, start, count))
        else:
            hole.zero_()
    return result


def _copied(tensor: Tensor, dim: int, rows: int, runs: Sequence[Sequence[int]]) -> Tensor:
    """`rows` rows along `dim`, those of the runs bit by bit from the source; the values of the others are undefined.

    One selection for all runs: they may be many and short.
    """
    import torch

    if not runs:
        return tensor.new_empty(resized(tuple(tensor.shape), dim, rows))
    starts, sources, counts = torch.tensor(runs, dtype=torch.int64).unbind(1)
    offsets = torch.arange(int(counts.sum())) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    index = torch.zeros(rows, dtype=torch.int64)
    index[offsets + torch.repeat_interleave(starts, counts)] = offsets + torch.repeat_interleave(sources, counts)
    if tensor.dtype == torch.complex128:
        return tensor.index_select(dim, index)
    # index_select takes integers, not every dtype.
    as_integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(as_integer).index_select(dim, index).view(tensor.dtype)


def _mean(tensor: Tensor, dim: int) -> Tensor:
    """The mean along `dim`, which stays with size 1, in the tensor's dtype."""
    import torch

    if not tensor.is_floating_point():
        raise RuleError(f"rows: there is no mean of {tensor.dtype} rows", hint="fill with zeros or init")
    rows = tensor.shape[dim]
    step = max(1, widening.BLOCK_ELEMENTS // max(1, tensor.numel() // rows))
    total = torch.zeros([1 if index == dim else size for index, size in enumerate(tensor.shape)], dtype=torch.float64)
    for start in range(0, rows, step):
        total += tensor.narrow(dim, start, min(step, rows - start)).to(torch.float64).sum(dim, keepdim=True)
    return (total / rows).to(tensor.dtype)


ROWS = Adapter(
    words="rows chosen by number, or by the token or label that two lists have in common; the others are filled",
    fields=_FIELDS,
    infer=_infer,
    fill=_fill,
    kernel=_kernel,
    moments=zeros_where_filled,
    invert=_invert,
    ranges=lambda op, shapes: [_range(op, tensor, shape) for tensor, shape in enumerate(shapes)],
    share=lambda op: _covered(op) / op["rows"] if op["rows"] else 1.0,
    fill_note=lambda op: f"{_covered(op)} of {op['rows']} rows come from the source, the rest is filled: {op['fill']}",
)
