"""The table of adapters. A new adapter is a constant in a module of its family, its name in capitals, and a line here; its module is
imported when an op names it. A name with a colon is a user's own adapter.

Callers decide by an adapter's traits, never by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NoReturn

from ckptsurgeon.adapters.op import Adapter, Check, Initial, OneOf, Op, Shape, Tensor, cannot_follow, list_of, whole
from ckptsurgeon.adapters.shapes import bounded
from ckptsurgeon.call_text import literal_call
from ckptsurgeon.errors import PlanError, RuleError
from ckptsurgeon.hints import close_names

UserKernel = Callable[..., Tensor]  # (tensors, **arguments) -> tensor

ADAPTERS = {  # each with its module, in the order in which they are shown and offered
    "transpose": "layout.dims",
    "permute": "layout.dims",
    "reshape": "layout.dims",
    "squeeze": "layout.dims",
    "unsqueeze": "layout.dims",
    "interleave": "layout.elements",
    "deinterleave": "layout.elements",
    "permute_rope": "layout.elements",
    "roll": "layout.elements",
    "slice": "combining.parts",
    "pad": "combining.pad",
    "concat": "combining.parts",
    "chunk": "combining.parts",
    "stack": "combining.parts",
    "unstack": "combining.parts",
    "average": "combining.means",
    "group_mean": "combining.means",
    "interpolate": "vision.positions",
    "relative_position_bias": "vision.positions",
    "patch_embed": "vision.kernels",
    "in_channels": "vision.kernels",
    "inflate": "vision.kernels",
    "rows": "rows.rows",
    "dequantize": "quantised.dequantize",
    "weight_norm": "factors.weight_norm",
    "spectral_norm": "factors.spectral_norm",
}


def _not_imported(op: Op, _tensors: Sequence[Tensor], _initial: Initial) -> NoReturn:
    raise PlanError(f"{op['op']!r} was not imported")


USER_ADAPTER = Adapter(
    words="a user's own function, `module:function`",
    fields={"shape": list_of(whole), "arguments": lambda value: type(value) is dict and all(type(name) is str for name in value)},
    infer=lambda op, _shapes: (bounded(op, tuple(op["shape"])),),
    fill=lambda op, _context: op,  # `chain` has called the user's shape function
    kernel=_not_imported,
    moments=cannot_follow,
    joins=True,
)


@cache
def load(name: str) -> Adapter:
    """The adapter of a name in the table; its module is imported at the first call."""
    adapter: Adapter = getattr(import_module(f"ckptsurgeon.adapters.{ADAPTERS[name]}"), name.upper())
    return adapter


def adapter_of(op: Op) -> Adapter:
    """The adapter of an op. RuleError, with close names, for an unknown name."""
    name = str(op["op"])
    if ":" in name:
        return USER_ADAPTER
    if name not in ADAPTERS:
        close = close_names(name, ADAPTERS)
        words = f"is it {' or '.join(close)}? " if close else ""
        raise RuleError(f"there is no adapter {name!r}", hint=f"{words}all of them: ckptsurgeon adapters")
    return load(name)


def is_user_adapter(op: Op) -> bool:
    """Whether an op is a user's own adapter."""
    return ":" in op["op"]


def run(op: Op, tensors: Sequence[Tensor], initial: Initial, kernels: Mapping[str, UserKernel]) -> Sequence[Tensor]:
    """The results of one filled op. PlanError for a user's own adapter that is not in `kernels`."""
    if op["op"] in kernels:
        return [kernels[op["op"]](list(tensors), **op["arguments"])]
    return adapter_of(op).kernel(op, tensors, initial)


def parse_ops(text: str) -> tuple[Op, ...]:
    """The ops of a chain as a rule writes it, one or more with `|` between them.

    Raises RuleError for a text that is no call with literal arguments, an unknown adapter (with close names), an unknown or unfit argument.

    >>> parse_ops("transpose | chunk(dim=0)")
    ({'op': 'transpose'}, {'op': 'chunk', 'dim': 0})
    """
    return tuple(map(_parse, _split(text)))


def _split(text: str) -> Iterator[str]:
    """The parts between the bars that are outside quotes."""
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
    call = literal_call(text)
    if call is None:
        raise RuleError(f"{text.strip()!r} is no adapter", hint="write a name, or a name with literal arguments: chunk(dim=0)")
    name, args, kwargs = call
    adapter = adapter_of({"op": name})
    if adapter is USER_ADAPTER:
        if args:
            raise RuleError(f"{text.strip()!r} has arguments without names", hint="name them: mylib:flip(dim=1)")
        wrong = next((word for word, value in kwargs.items() if not _plain(value)), None)
        if wrong is not None:
            reason = f"{text.strip()!r}: {wrong} is nothing that a plan can hold"
            raise RuleError(reason, hint="numbers, text, True, None, lists, and dicts by text")
        return {"op": name, "arguments": {word: listed(value) for word, value in kwargs.items()}}
    fields = [name for name in adapter.fields if name not in adapter.plan_only]
    problems = [f"{word} is given twice" for word in fields[: len(args)] if word in kwargs]
    problems += [f"takes no argument {word!r}{_close(word, fields)}" for word in kwargs if word not in fields]
    problems += [f"takes {len(fields)} arguments, not {len(args)}"] if len(args) > len(fields) else []
    values = {**dict(zip(fields, args, strict=False)), **kwargs}
    problems += [
        _wrong(word, value, adapter.fields[word]) for word, value in values.items() if word in fields and not adapter.fields[word](value)
    ]
    if problems:
        hint = f"write {name}({', '.join(f'{word}=...' for word in fields)}): {adapter.words}"
        raise RuleError(f"the adapter {text.strip()!r} {'; '.join(problems)}", hint=hint)
    return {"op": name, **values}


def _wrong(field: str, value: Any, check: Check) -> str:
    """The message for a value that an argument can't have."""
    return f"{field} can't be {value!r:.60}" + (check.meant(value) if isinstance(check, OneOf) else "")


def _close(field: str, fields: Sequence[str]) -> str:
    names = close_names(field, fields, 1)
    return f"; is it {names[0]!r}?" if names else ""


def _plain(value: Any) -> bool:
    """Whether JSON can hold a value, so that reading a plan gives the same value."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(type(name) is str and _plain(name) and _plain(item) for name, item in value.items())
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is str:
        return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    return value is None or type(value) in (bool, int)


def listed(value: Any) -> Any:
    """A value with lists for tuples, so that a plan equals the one read from its file."""
    if isinstance(value, dict):
        return {name: listed(item) for name, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def op_text(op: Op) -> str:
    """An op as a rule writes it.

    >>> op_text({"op": "chunk", "dim": 0}), op_text({"op": "transpose"})
    ('chunk(dim=0)', 'transpose')
    """
    words = ", ".join(
        f"{name}={value!r}"
        for name, value in (op.get("arguments", op)).items()
        if name not in ("op", "shape" if is_user_adapter(op) else "")
    )
    return f"{op['op']}({words})" if words else str(op["op"])


def offers(source: Shape, target: Shape, *, safe: bool = False) -> tuple[Op, ...]:
    """The ops, as rules write them, that turn a source's shape into a target's; with `safe` only those that can't change a meaning."""
    ops = (adapter.offer(source, target) for adapter in map(load, ADAPTERS) if adapter.safe or not safe)
    return tuple(op for op in ops if op is not None)


def texts(ops: Iterable[Op]) -> str:
    """A chain of ops as a rule writes it."""
    return " | ".join(map(op_text, ops))
