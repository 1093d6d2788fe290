"""Chains of ops over shapes: filled when a plan is made, and inferred again when one is read. Nothing here depends on an op's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ckptsurgeon.adapters.op import FillContext, Op, Shape
from ckptsurgeon.adapters.table import adapter_of, is_user_adapter, listed, op_text
from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import RuleError

MOST_GROWTH = 64  # how many times the elements that go in or come out an intermediate result may have
UserShape = Callable[..., Shape]  # (shapes, **arguments) -> shape


@dataclass(frozen=True)
class RuleOp:
    """An op as a rule has it, and which of the rule's results it is for.

    `siblings` are the names of all of the rule's results, `number` is the number that only the result's name has. `filled` is set for an
    op that already has all fields of a plan's.
    """

    op: Op
    index: int = 0
    siblings: tuple[str, ...] = ()
    number: int | None = None
    filled: bool = False


def fill_chain(
    rule_ops: Sequence[RuleOp],
    shapes: Sequence[Shape],
    target: Shape | None,
    target_shapes: Mapping[str, Shape],
    shape_functions: Mapping[str, UserShape] = {},
) -> tuple[tuple[Op, ...], tuple[Shape, ...]]:
    """The ops as a plan has them, and the shapes that come out.

    `target` is the shape that the last op must give, `target_shapes` has the target's shapes by name, `shape_functions` those of the user's
    own adapters. Raises RuleError where an op can't be filled or does not fit the shapes.
    """
    ops: list[Op] = []
    current = tuple(shapes)
    # The number in the result's name is for the first op that counts parts.
    counting_position = counted_at([rule_op.op for rule_op in rule_ops])
    for position, rule_op in enumerate(rule_ops):
        op: Op = rule_op.op
        if not rule_op.filled:
            last = position == len(rule_ops) - 1
            siblings = tuple(target_shapes.get(name) if last else None for name in rule_op.siblings)
            part_number = rule_op.number if position == counting_position else None
            context = FillContext(current, target if last else None, rule_op.index, max(len(rule_op.siblings), 1), siblings, part_number)
            if is_user_adapter(op):
                op = {**op, "shape": list(shape_functions[str(op["op"])](current, **op["arguments"]))}
            op = {name: listed(value) for name, value in adapter_of(op).fill(op, context).items()}
        current = _infer(op, current)
        ops.append(op)
    infer_chain(ops, shapes)
    return tuple(ops), current


def infer_chain(ops: Sequence[Op], shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """The shapes that come out of filled ops. RuleError where an op lacks a field, or does not fit the shapes."""
    current = tuple(shapes)
    largest = 0
    for op in ops:
        current = _infer(op, current)
        largest = max(largest, _elements(current))
    if largest > MOST_GROWTH * max(_elements(shapes), _elements(current), 1 << 16):
        raise RuleError(f"makes {largest} elements on the way from {_elements(shapes)} to {_elements(current)}")
    return current


def _elements(shapes: Sequence[Shape]) -> int:
    return sum(map(prod, shapes))


def _infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    try:
        return adapter_of(op).infer(op, shapes)
    except KeyError as error:
        raise RuleError(f"{op_text(op)} lacks {error}") from error


def invert_chain(ops: Sequence[Op]) -> tuple[Op, ...] | None:
    """The ops that undo a rule's ops, or None where one can't be undone."""
    inverses = [adapter_of(op).invert(op) for op in reversed(ops)]
    return tuple(op for op in inverses if op is not None) if None not in inverses else None


def needs_floats(ops: Sequence[Op]) -> bool:
    """Whether a chain computes values, so that only floating tensors can take it."""
    return any(adapter_of(op).floats or op.get("fill") == "mean" for op in ops)


def decodes(ops: Sequence[Op]) -> bool:
    """Whether a chain begins with an op that decodes, so that each tensor of codes is followed by its scale."""
    return bool(ops) and adapter_of(ops[0]).decodes


def can_compute(ops: Sequence[Op], dtype: str) -> bool:
    """Whether tensors of a dtype can take a chain.

    >>> can_compute([{"op": "average"}], "C64"), can_compute([{"op": "average"}], "I64"), can_compute([{"op": "transpose"}], "I64")
    (True, False, True)
    """
    kind = BY_CODE[dtype].kind
    complex_ops = [op for op in ops if kind == "complex" and adapter_of(op).complexes]
    return kind == "float" or not needs_floats([op for op in ops if op not in complex_ops])


def made_dtype(ops: Sequence[Op], dtype: str) -> str:
    """The dtype of what filled ops make of tensors of `dtype`.

    >>> made_dtype([{"op": "dequantize"}, {"op": "transpose"}], "I8"), made_dtype([{"op": "transpose"}], "I8")
    ('F32', 'I8')
    """
    dtypes = [adapter_of(op).output_dtype for op in ops]
    return next((code for code in reversed(dtypes) if code is not None), dtype)


def counted_at(ops: Sequence[Op]) -> int | None:
    """The position of the first op that counts parts.

    >>> counted_at([{"op": "transpose"}, {"op": "unstack"}]), counted_at([{"op": "chunk"}])
    (1, None)
    """
    return next((position for position, op in enumerate(ops) if adapter_of(op).counts_parts), None)


def filled_elements(ops: Sequence[Op], shape: Shape) -> int:
    """How many elements of what filled ops give, of `shape`, come from no source but were filled."""
    return round(prod(shape) * (1 - prod(adapter_of(op).share(op) for op in ops)))


def check_fields(op: Mapping[str, Any]) -> None:
    """Raises RuleError for a field that the op's adapter does not have, or a value that the field can't have."""
    adapter = adapter_of(op)
    wrong = [name for name, value in op.items() if name != "op" and not (name in adapter.fields and adapter.fields[name](value))]
    if wrong:
        raise RuleError(f"the op {str(op['op'])[:40]!r} can't have {wrong[0][:40]!r} as it is")
