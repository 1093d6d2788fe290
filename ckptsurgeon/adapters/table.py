"""The one table of adapters. A name with a colon is a person's own, whose shapes its own function tells."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from typing import Any

from ckptsurgeon.adapters.combining import COMBINING
from ckptsurgeon.adapters.layout import LAYOUT, bounded
from ckptsurgeon.adapters.op import Adapter, Op, Place, Shape, wholes
from ckptsurgeon.adapters.rows import ROWS
from ckptsurgeon.adapters.scales import SCALES
from ckptsurgeon.adapters.vision import VISION
from ckptsurgeon.call_text import literal_call
from ckptsurgeon.errors import RuleError

ADAPTERS: dict[str, Adapter] = {**LAYOUT, **COMBINING, **VISION, **ROWS, **SCALES}


def _own_shape(op: Op, _shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    return (bounded(op, tuple(op["shape"])),)


def _own_filled(op: Op, _place: Place) -> Op:
    return op  # `chain` has called the person's shape function


OWN = Adapter(
    "a person's own function, `module:function`",
    {"shape": wholes, "arguments": lambda value: type(value) is dict and all(type(name) is str for name in value)},
    _own_shape,
    _own_filled,
)


def adapter_of(name: str) -> Adapter:
    """The adapter of a name. RuleError, with close names, for one that is not there."""
    found = OWN if ":" in name else ADAPTERS.get(name)
    if found is None:
        close = difflib.get_close_matches(name, ADAPTERS, n=3)
        words = f"is it {' or '.join(close)}? " if close else ""
        raise RuleError(f"there is no adapter {name!r}", hint=f"{words}the adapters are {', '.join(ADAPTERS)}")
    return found


def is_own(op: Op) -> bool:
    """Whether an op is a person's own."""
    return ":" in op["op"]


def parse_ops(text: str) -> tuple[Op, ...]:
    """The ops of a chain as a person writes it, one or more with `|` between them.

    Raises RuleError for a text that is no call with literal arguments, an unknown adapter (with close names), an unknown or unfit argument.

    >>> parse_ops("transpose | chunk(dim=0)")
    ({'op': 'transpose'}, {'op': 'chunk', 'dim': 0})
    """
    return tuple(map(_parse, _split(text)))


def _split(text: str) -> Iterator[str]:
    """The parts between bars that stand outside of quotes."""
    part, quote = "", ""
    for letter in text:
        if letter == "|" and not quote:
            yield part
            part = ""
            continue
        if letter in "'\"":
            quote = "" if quote == letter else quote or letter
        part += letter
    yield part


def _parse(text: str) -> Op:
    found = literal_call(text)
    if found is None:
        raise RuleError(f"{text.strip()!r} is no adapter", hint="write a name, or a name with literal arguments: chunk(dim=0)")
    name, args, kwargs = found
    adapter = adapter_of(name)
    if adapter is OWN:
        if args:
            raise RuleError(f"{text.strip()!r} has arguments without names", hint="name them: mylib:flip(dim=1)")
        wrong = next((word for word, value in kwargs.items() if not _plain(value)), None)
        if wrong is not None:
            reason = f"{text.strip()!r}: {wrong} is nothing that a plan can hold"
            raise RuleError(reason, hint="numbers, text, True, None, lists, and dicts by text")
        return {"op": name, "arguments": {word: _listed(value) for word, value in kwargs.items()}}
    fields = [name for name in adapter.fields if name not in adapter.planned]
    problems = [f"{word} is given twice" for word in fields[: len(args)] if word in kwargs]
    problems += [f"takes no argument {word!r}" for word in kwargs if word not in fields]
    problems += [f"takes {len(fields)} arguments, not {len(args)}"] if len(args) > len(fields) else []
    given = {**dict(zip(fields, args, strict=False)), **kwargs}
    problems += [f"{word} can't be {value!r:.60}" for word, value in given.items() if word in fields and not adapter.fields[word](value)]
    if problems:
        hint = f"write {name}({', '.join(f'{word}=...' for word in fields)}): {adapter.words}"
        raise RuleError(f"the adapter {text.strip()!r} {'; '.join(problems)}", hint=hint)
    return {"op": name, **given}


def _plain(value: Any) -> bool:
    """Whether a value is one of JSON's, so that a plan gives it back as it was."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(type(name) is str and _plain(name) and _plain(one) for name, one in value.items())
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is str:
        return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    return value is None or type(value) in (bool, int)


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _listed(one) for name, one in value.items()}
    return [_listed(one) for one in value] if isinstance(value, (list, tuple)) else value


def op_text(op: Op) -> str:
    """An op as a person would write it.

    >>> op_text({"op": "chunk", "dim": 0}), op_text({"op": "transpose"})
    ('chunk(dim=0)', 'transpose')
    """
    words = ", ".join(
        f"{name}={value!r}" for name, value in (op.get("arguments", op)).items() if name not in ("op", "shape" if is_own(op) else "")
    )
    return f"{op['op']}({words})" if words else str(op["op"])


def offers(source: Shape, target: Shape, *, safe: bool = False) -> tuple[Op, ...]:
    """The ops, as rules would write them, that make one shape the other; with `safe` only those that can't change what a tensor means."""
    found = (adapter.offer(source, target) for adapter in ADAPTERS.values() if adapter.safe or not safe)
    return tuple(op for op in found if op is not None)


def texts(ops: Iterable[Op]) -> str:
    """A chain of ops as a person would write it."""
    return " | ".join(map(op_text, ops))
