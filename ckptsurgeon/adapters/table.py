"""The one table of adapters: a new one is a module in its room, and its line here; it is imported when an op names it. A name with a
colon is a person's own adapter.

Others ask for an adapter's traits, never for its name.
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

OwnKernel = Callable[..., Tensor]  # (tensors, **arguments) -> tensor

ADAPTERS = {  # each with its room, in the order in which they are shown and offered
    "transpose": "layout",
    "permute": "layout",
    "reshape": "layout",
    "squeeze": "layout",
    "unsqueeze": "layout",
    "interleave": "layout",
    "deinterleave": "layout",
    "permute_rope": "layout",
    "roll": "layout",
    "slice": "combining",
    "pad": "combining",
    "concat": "combining",
    "chunk": "combining",
    "stack": "combining",
    "unstack": "combining",
    "average": "combining",
    "group_mean": "combining",
    "interpolate": "vision",
    "relative_position_bias": "vision",
    "patch_embed": "vision",
    "in_channels": "vision",
    "inflate": "vision",
    "rows": "rows",
    "dequantize": "quantised",
    "weight_norm": "factors",
    "spectral_norm": "factors",
}


def _not_imported(op: Op, _tensors: Sequence[Tensor], _initial: Initial) -> NoReturn:
    raise PlanError(f"{op['op']!r} was not imported")


OWN = Adapter(
    words="a person's own function, `module:function`",
    fields={"shape": list_of(whole), "arguments": lambda value: type(value) is dict and all(type(name) is str for name in value)},
    infer=lambda op, _shapes: (bounded(op, tuple(op["shape"])),),
    fill=lambda op, _place: op,  # `chain` has called the person's shape function
    kernel=_not_imported,
    moments=cannot_follow,
    joins=True,
)


@cache
def load(name: str) -> Adapter:
    """The adapter of a name of the table. Its module is imported when it is first asked for."""
    found: Adapter = import_module(f"ckptsurgeon.adapters.{ADAPTERS[name]}.{name}").ADAPTER
    return found


def adapter_of(op: Op) -> Adapter:
    """The adapter of an op. RuleError, with close names, for one that is not there."""
    name = str(op["op"])
    if ":" in name:
        return OWN
    if name not in ADAPTERS:
        close = close_names(name, ADAPTERS)
        words = f"is it {' or '.join(close)}? " if close else ""
        raise RuleError(f"there is no adapter {name!r}", hint=f"{words}all of them: ckptsurgeon adapters")
    return load(name)


def is_own(op: Op) -> bool:
    """Whether an op is a person's own."""
    return ":" in op["op"]


def run(op: Op, tensors: Sequence[Tensor], initial: Initial, own: Mapping[str, OwnKernel]) -> Sequence[Tensor]:
    """What one filled op makes of tensors. PlanError for a person's own that was not handed in."""
    if op["op"] in own:
        return [own[op["op"]](list(tensors), **op["arguments"])]
    return adapter_of(op).kernel(op, tensors, initial)


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
    adapter = adapter_of({"op": name})
    if adapter is OWN:
        if args:
            raise RuleError(f"{text.strip()!r} has arguments without names", hint="name them: mylib:flip(dim=1)")
        wrong = next((word for word, value in kwargs.items() if not _plain(value)), None)
        if wrong is not None:
            reason = f"{text.strip()!r}: {wrong} is nothing that a plan can hold"
            raise RuleError(reason, hint="numbers, text, True, None, lists, and dicts by text")
        return {"op": name, "arguments": {word: listed(value) for word, value in kwargs.items()}}
    fields = [name for name in adapter.fields if name not in adapter.planned]
    problems = [f"{word} is given twice" for word in fields[: len(args)] if word in kwargs]
    problems += [f"takes no argument {word!r}{_close(word, fields)}" for word in kwargs if word not in fields]
    problems += [f"takes {len(fields)} arguments, not {len(args)}"] if len(args) > len(fields) else []
    given = {**dict(zip(fields, args, strict=False)), **kwargs}
    problems += [
        _wrong(word, value, adapter.fields[word]) for word, value in given.items() if word in fields and not adapter.fields[word](value)
    ]
    if problems:
        hint = f"write {name}({', '.join(f'{word}=...' for word in fields)}): {adapter.words}"
        raise RuleError(f"the adapter {text.strip()!r} {'; '.join(problems)}", hint=hint)
    return {"op": name, **given}


def _wrong(word: str, value: Any, check: Check) -> str:
    """What is said of an argument that an adapter does not take."""
    return f"{word} can't be {value!r:.60}" + (check.meant(value) if isinstance(check, OneOf) else "")


def _close(word: str, fields: Sequence[str]) -> str:
    close = close_names(word, fields, 1)
    return f"; is it {close[0]!r}?" if close else ""


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


def listed(value: Any) -> Any:
    """A value as JSON has it, so that a plan is equal to what is read of it."""
    if isinstance(value, dict):
        return {name: listed(one) for name, one in value.items()}
    return [listed(one) for one in value] if isinstance(value, (list, tuple)) else value


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
    found = (adapter.offer(source, target) for adapter in map(load, ADAPTERS) if adapter.safe or not safe)
    return tuple(op for op in found if op is not None)


def texts(ops: Iterable[Op]) -> str:
    """A chain of ops as a person would write it."""
    return " | ".join(map(op_text, ops))
