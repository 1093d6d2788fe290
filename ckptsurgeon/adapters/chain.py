"""Chains of ops over shapes: filled in when a plan is made, and inferred again when one is read. No op is known here by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ckptsurgeon.adapters.op import Op, Place, Shape
from ckptsurgeon.adapters.table import adapter_of, is_own, listed, op_text
from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import RuleError

ON_THE_WAY = 64  # times as many elements as go in or come out, that a chain may make between
OwnShape = Callable[..., Shape]  # (shapes, **arguments) -> shape


@dataclass(frozen=True)
class Asked:
    """An op as a rule asks for it, and which of the rule's results it is for.

    `siblings` are the names of all of the rule's results, `number` what a part stands for that only the result names. `filled` is set for
    an op that is as a plan has it already.
    """

    op: Op
    index: int = 0
    siblings: tuple[str, ...] = ()
    number: int | None = None
    filled: bool = False


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
    # What a part of the result's name counts is for the first op that counts parts.
    counted = counted_at([one.op for one in asked])
    for place, one in enumerate(asked):
        op: Op = one.op
        if not one.filled:
            last = place == len(asked) - 1
            siblings = tuple(known.get(name) if last else None for name in one.siblings)
            number = one.number if place == counted else None
            look = Place(given, wanted if last else None, one.index, max(len(one.siblings), 1), siblings, number)
            if is_own(op):
                op = {**op, "shape": list(own[str(op["op"])](given, **op["arguments"]))}
            op = {name: listed(value) for name, value in adapter_of(op).fill(op, look).items()}
        given = _infer(op, given)
        ops.append(op)
    infer_chain(ops, shapes)
    return tuple(ops), given


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
        return adapter_of(op).infer(op, shapes)
    except KeyError as error:
        raise RuleError(f"{op_text(op)} lacks {error}") from error


def invert_chain(ops: Sequence[Op]) -> tuple[Op, ...] | None:
    """The ops that undo a rule's ops, or None where one can't be undone."""
    found = [adapter_of(op).invert(op) for op in reversed(ops)]
    return tuple(op for op in found if op is not None) if None not in found else None


def needs_floats(ops: Sequence[Op]) -> bool:
    """Whether a chain computes values, so that only floating tensors can take it."""
    return any(adapter_of(op).floats or op.get("fill") == "mean" for op in ops)


def decodes(ops: Sequence[Op]) -> bool:
    """Whether a chain begins by making values of codes, so that codes and scales come in by turns."""
    return bool(ops) and adapter_of(ops[0]).decodes


def can_compute(ops: Sequence[Op], dtype: str) -> bool:
    """Whether tensors of a dtype can take a chain.

    >>> can_compute([{"op": "average"}], "C64"), can_compute([{"op": "average"}], "I64"), can_compute([{"op": "transpose"}], "I64")
    (True, False, True)
    """
    kind = BY_CODE[dtype].kind
    taken = [op for op in ops if kind == "complex" and adapter_of(op).complexes]
    return kind == "float" or not needs_floats([op for op in ops if op not in taken])


def made_dtype(ops: Sequence[Op], dtype: str) -> str:
    """The dtype of what filled ops make of tensors of `dtype`.

    >>> made_dtype([{"op": "dequantize"}, {"op": "transpose"}], "I8"), made_dtype([{"op": "transpose"}], "I8")
    ('F32', 'I8')
    """
    given = [adapter_of(op).gives for op in ops]
    return next((code for code in reversed(given) if code is not None), dtype)


def counted_at(ops: Sequence[Op]) -> int | None:
    """The place of the first op that counts parts.

    >>> counted_at([{"op": "transpose"}, {"op": "unstack"}]), counted_at([{"op": "chunk"}])
    (1, None)
    """
    return next((place for place, op in enumerate(ops) if adapter_of(op).counts_parts), None)


def filled_elements(ops: Sequence[Op], shape: Shape) -> int:
    """How many elements of what filled ops give, of `shape`, come from no source: rows and margins that were filled up."""
    return round(prod(shape) * (1 - prod(adapter_of(op).share(op) for op in ops)))


def check_fields(op: Mapping[str, Any]) -> None:
    """Raises RuleError for a field that the op's adapter has not, or whose value it can't have."""
    adapter = adapter_of(op)
    wrong = [name for name, value in op.items() if name != "op" and not (name in adapter.fields and adapter.fields[name](value))]
    if wrong:
        raise RuleError(f"the op {str(op['op'])[:40]!r} can't have {wrong[0][:40]!r} as it is")
