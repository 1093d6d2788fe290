"""Chains of ops over shapes: filled in when a plan is made, and inferred again when one is read. No op is known here by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ckptsurgeon.adapters.op import Op, Place, Shape
from ckptsurgeon.adapters.table import adapter_of, is_own, op_text
from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import RuleError

ON_THE_WAY = 64  # times as many elements as go in or come out, that a chain may make between
OwnShape = Callable[..., Shape]  # (shapes, **arguments) -> shape


@dataclass(frozen=True)
class Asked:
    """An op as a rule asks for it, and which of the rule's results it is for.

    `siblings` are the names of all of the rule's results, `number` what a part stands for that only the result names.
    """

    op: Op
    index: int = 0
    siblings: tuple[str, ...] = ()
    number: int | None = None


def fill_chain(
    asked: Sequence[Asked],
    shapes: Sequence[Shape],
    wanted: Shape | None,
    known: Mapping[str, Shape],
    own: Mapping[str, OwnShape] = {},
) -> tuple[tuple[Op, ...], tuple[Shape, ...]]:
    """The ops as a plan has them, and the shapes that come out.

    `wanted` is what the last op must give, `known` the target's shapes by name, `own` the shape functions of a person's own adapters.
    Raises RuleError where an op can't be told or does not go with the shapes.
    """
    ops: list[Op] = []
    given = tuple(shapes)
    # What a part of the result's name counts is the first unstack's.
    counted = next((place for place, one in enumerate(asked) if one.op["op"] == "unstack"), None)
    for place, one in enumerate(asked):
        last = place == len(asked) - 1
        siblings = tuple(known.get(name) if last else None for name in one.siblings)
        number = one.number if place == counted else None
        look = Place(given, wanted if last else None, one.index, max(len(one.siblings), 1), siblings, number)
        op: Op = one.op
        if is_own(op):
            op = {**op, "shape": list(own[str(op["op"])](given, **op["arguments"]))}
        op = {name: _listed(value) for name, value in adapter_of(str(op["op"])).fill(op, look).items()}
        given = _infer(op, given)
        ops.append(op)
    infer_chain(ops, shapes)
    return tuple(ops), given


def _listed(value: Any) -> Any:
    """As JSON has it, so that a plan is equal to what is read of it."""
    return [_listed(one) for one in value] if type(value) in (list, tuple) else value


def infer_chain(ops: Sequence[Op], shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """The shapes that come out of filled ops. RuleError where an op lacks a field, or does not go with the shapes."""
    given = tuple(shapes)
    most = 0
    for op in ops:
        given = _infer(op, given)
        most = max(most, _elements(given))
    if most > ON_THE_WAY * max(_elements(shapes), _elements(given), 1 << 16):
        raise RuleError(f"makes {most} elements on the way from {_elements(shapes)} to {_elements(given)}")
    return given


def _elements(shapes: Sequence[Shape]) -> int:
    return sum(map(prod, shapes))


def _infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    try:
        return adapter_of(str(op["op"])).infer(op, shapes)
    except KeyError as error:
        raise RuleError(f"{op_text(op)} lacks {error}") from error


def invert_chain(ops: Sequence[Op]) -> tuple[Op, ...] | None:
    """The ops that undo a rule's ops, or None where one can't be undone."""
    found = [adapter_of(str(op["op"])).invert(op) for op in reversed(ops)]
    return tuple(op for op in found if op is not None) if None not in found else None


def needs_floats(ops: Sequence[Op]) -> bool:
    """Whether a chain computes values, so that only floating tensors can take it."""
    return any(adapter_of(str(op["op"])).floats or op.get("fill") == "mean" for op in ops)


def can_compute(ops: Sequence[Op], dtype: str) -> bool:
    """Whether tensors of a dtype can take a chain.

    >>> can_compute([{"op": "average"}], "C64"), can_compute([{"op": "average"}], "I64"), can_compute([{"op": "transpose"}], "I64")
    (True, False, True)
    """
    kind = BY_CODE[dtype].kind
    taken = [op for op in ops if kind == "complex" and adapter_of(str(op["op"])).complexes]
    return kind == "float" or not needs_floats([op for op in ops if op not in taken])


def made_dtype(ops: Sequence[Op], dtype: str) -> str:
    """The dtype of what filled ops make of tensors of `dtype`.

    >>> made_dtype([{"op": "dequantize"}, {"op": "transpose"}], "I8"), made_dtype([{"op": "transpose"}], "I8")
    ('F32', 'I8')
    """
    given = [adapter_of(str(op["op"])).gives for op in ops]
    return next((code for code in reversed(given) if code is not None), dtype)


def filled_elements(ops: Sequence[Op], shape: Shape) -> int:
    """How many elements of what filled ops give, of `shape`, come from no source: rows and margins that were filled up."""
    given = 1.0
    for op in ops:
        if op["op"] == "rows" and op["rows"]:
            given *= sum(count for _, _, count in op["runs"]) / op["rows"]
        elif op["op"] == "pad" and op["size"] and op["given"]:
            given *= sum(op["given"]) / (op["size"] * len(op["given"]))
    return round(prod(shape) * (1 - given))


def check_fields(op: Mapping[str, Any]) -> None:
    """Raises RuleError for a field that the op's adapter has not, or whose value it can't have."""
    adapter = adapter_of(str(op["op"]))
    wrong = [name for name, value in op.items() if name != "op" and not (name in adapter.fields and adapter.fields[name](value))]
    if wrong:
        raise RuleError(f"the op {str(op['op'])[:40]!r} can't have {wrong[0][:40]!r} as it is")
