"""The adapter `rows`: which row of a source becomes which row of a target, told by numbers or by the names of tokens and labels.

No file is read here: a rule's `source` and `target` are paths until the caller puts the lists themselves in their place. A row without a
counterpart is an error unless the rule says what fills it. The filled op holds whole runs of rows, so that most rows need no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from ckptsurgeon.adapters.op import Adapter, Check, Op, Place, Shape, one_of, signed, whole
from ckptsurgeon.errors import RuleError

MOST_ELEMENTS = 1 << 62
_EXAMPLE = "rows(source='a/vocab.txt', target='b/tokenizer.json', fill='mean') or rows(index=[3, 7, 0])"
_FILLED = {"op", "dim", "rows", "runs", "fill"}
_FILLS = one_of("mean", "zeros", "init", "none")


def _text(value: Any) -> bool:
    return type(value) is str and bool(value)


def _tokens(value: Any) -> bool:
    return _text(value) or (type(value) in (list, tuple) and all(one is None or type(one) is str for one in value))


def _index(value: Any) -> bool:
    return type(value) in (list, tuple) and all(signed(one) and one >= -1 for one in value)


def _copy(value: Any) -> bool:
    return type(value) is dict and all(type(one) is str for item in value.items() for one in item)


def _runs(value: Any) -> bool:
    return type(value) in (list, tuple) and all(type(run) in (list, tuple) and len(run) == 3 and all(map(whole, run)) for run in value)


_FIELDS: dict[str, Check] = {
    "index": _index,
    "source": _tokens,
    "target": _tokens,
    "fill": _FILLS,
    "copy": _copy,
    "scheme": _text,
    "dim": signed,
    "rows": whole,
    "runs": _runs,
}


def _infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    names = _FILLED | ({"scheme"} if op.get("fill") == "init" else set())
    lacks = sorted(names - set(op))
    wrong = [name for name, value in op.items() if name != "op" and not (name in names and _FIELDS[name](value))]
    if lacks or wrong:
        raise RuleError("the op rows " + (f"lacks {lacks[0]!r}" if lacks else f"can't have {wrong[0]!r:.60} as it is"))
    dim, rows, runs = op["dim"], op["rows"], op["runs"]
    covered, end, most = 0, 0, 0
    for start, source, count in runs:
        if start < end or not count or start + count > rows:
            raise RuleError(f"rows: the run [{start}, {source}, {count}] is empty, overlaps the one before, or leaves the {rows} rows")
        covered, end, most = covered + count, start + count, max(most, source + count)
    if covered < rows and op["fill"] == "none":
        raise RuleError(f"rows: {rows - covered} of {rows} rows have no source and no fill")
    found: list[Shape] = []
    for shape in shapes:
        if dim not in range(len(shape)) or shape[dim] < most:
            raise RuleError(f"rows: {_shape(shape)} has not the {most} rows that are taken along dim {dim}")
        if covered < rows and op["fill"] == "mean" and not shape[dim]:
            raise RuleError(f"rows: {_shape(shape)} has no rows to take the mean of")
        found.append((*shape[:dim], rows, *shape[dim + 1 :]))
        if prod(size or 1 for size in found[-1]) >= MOST_ELEMENTS:
            raise RuleError(f"rows can't make {_shape(found[-1])}")
    return tuple(found)


def _shape(shape: Shape) -> str:
    return f"the shape ({', '.join(map(str, shape))})"


def _fill(op: Op, place: Place) -> Op:
    if "runs" in op or "rows" in op:
        raise RuleError("rows and runs are a plan's own fields", hint=f"write {_EXAMPLE}")
    if not place.shapes:
        raise RuleError("rows has no tensor to work on")
    shape, fill = place.shapes[0], op.get("fill", "none")
    dim = op.get("dim", 0)
    dim += len(shape) if dim < 0 else 0
    if dim not in range(len(shape)):
        raise RuleError(f"rows: {_shape(shape)} has no dimension {op.get('dim', 0)}")
    given, wanted = shape[dim], _wanted(place, shape, dim)
    if ("scheme" in op and fill != "init") or (fill == "init" and wanted is None):
        raise RuleError(
            "rows: fill 'init' takes the target's own initial value, and only it takes a scheme",
            hint="use it in a rule's last adapter and with a target that is known",
        )
    taken, name = _by_index(op, given) if "index" in op else _by_tokens(op, given)
    if wanted is not None and wanted < len(taken):
        what = "numbers" if "index" in op else "tokens"
        raise RuleError(f"rows: the target has {wanted} rows, and its list has {len(taken)} {what}", hint="is it the list of this target?")
    taken += [None] * ((wanted or len(taken)) - len(taken))
    missing = [row for row, source in enumerate(taken) if source is None]
    if missing and fill == "none":
        few = ", ".join(name(row) for row in missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise RuleError(
            f"rows: {len(missing)} of the target's {len(taken)} rows have no counterpart in the source: {few}",
            hint="say what they get: fill='mean', 'zeros' or 'init', or copy={'<new>': 'the'} for single tokens",
        )
    fill = fill if missing else "none"  # a fill that fills nothing is no reason to ask for the target's initial value
    scheme = {"scheme": op.get("scheme", "model")} if fill == "init" else {}
    return {"op": "rows", "dim": dim, "rows": len(taken), "runs": list(_joined(taken)), "fill": fill, **scheme}


def _wanted(place: Place, shape: Shape, dim: int) -> int | None:
    if place.wanted is None:
        return None
    if len(place.wanted) != len(shape):
        raise RuleError(f"rows does not make {_shape(place.wanted)} of {_shape(shape)}: it keeps the number of dimensions")
    return place.wanted[dim]


def _joined(taken: Sequence[int | None]) -> Iterator[list[int]]:
    """The longest runs of target rows whose source rows follow each other too, as [target, source, count].

    >>> list(_joined([4, 5, None, 6, 0]))
    [[0, 4, 2], [3, 6, 1], [4, 0, 1]]
    """
    run: list[int] | None = None
    for row, source in enumerate(taken):
        if source is not None and run is not None and (row, source) == (run[0] + run[2], run[1] + run[2]):
            run[2] += 1
            continue
        if run is not None:
            yield run
        run = None if source is None else [row, source, 1]
    if run is not None:
        yield run


def _by_index(op: Op, given: int) -> tuple[list[int | None], Callable[[int], str]]:
    """The source's row for each of the target's (None for -1), and how a row is named."""
    if others := [name for name in ("source", "target", "copy") if name in op]:
        raise RuleError(f"rows takes index or lists of tokens, not index and {others[0]}", hint=f"write {_EXAMPLE}")
    index = op["index"]
    if beyond := [row for row in index if row >= given]:
        raise RuleError(f"rows: the source has {given} rows, and none with the number {beyond[0]}")
    return [None if row < 0 else row for row in index], lambda row: f"row {row}"


def _by_tokens(op: Op, given: int) -> tuple[list[int | None], Callable[[int], str]]:
    """The same by tokens: a token that `copy` names takes the row of the token it names, any other the row of the same token."""
    if "source" not in op or "target" not in op:
        raise RuleError("rows needs an index, or both a source and a target", hint=f"write {_EXAMPLE}")
    source, target = op["source"], op["target"]
    if unread := [one for one in (source, target) if type(one) is str]:
        raise RuleError(f"rows: the list {unread[0]!r} was not read")
    if len(source) > given:
        raise RuleError(f"rows: the source has {given} rows, and its list has {len(source)} tokens", hint="is it the list of this source?")
    rows, wanted = _numbered(source, "source"), _numbered(target, "target")
    copy: Mapping[str, str] = op.get("copy", {})
    problems = [f"{token!r} is no token of the target" for token in copy if token not in wanted]
    problems += [f"{token!r} is no token of the source" for token in copy.values() if token not in rows]
    if problems:
        raise RuleError("rows: copy names tokens that are not there", problems=tuple(problems))
    taken = [None if token is None else rows.get(copy.get(token, token)) for token in target]
    if target and not any(row is not None for row in taken):
        raise RuleError("rows: the two lists have no token in common", hint="are they what the two models were trained with?")
    return taken, lambda row: repr(target[row])[:60] if row < len(target) and target[row] is not None else f"row {row} (no token)"


def _numbered(tokens: Sequence[str | None], which: str) -> dict[str, int]:
    rows = {token: row for row, token in enumerate(tokens) if token is not None}
    if len(rows) != len(tokens) - sum(token is None for token in tokens):
        twice = next(token for row, token in enumerate(tokens) if token is not None and rows[token] != row)
        raise RuleError(f"rows: the {which}'s list has the token {twice!r} twice")
    return rows


def _invert(op: Op) -> Op | None:
    index = op.get("index")
    if index is None or sorted(index) != list(range(len(index))):
        return None
    back = sorted(range(len(index)), key=index.__getitem__)
    return {"op": "rows", "index": back, **{name: op[name] for name in ("dim",) if name in op}}


ROWS: dict[str, Adapter] = {
    "rows": Adapter(
        "rows chosen by number, or by the token or label that two lists have in common; the others are filled",
        _FIELDS,
        _infer,
        _fill,
        invert=_invert,
    )
}
