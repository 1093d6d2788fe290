"""The options of a check as one frozen `Gate`; an option that can't be understood is a SettingsError.

Nothing is read or imported here: the target was opened before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptsurgeon import finding_codes
from ckptsurgeon.api._opening import Target, without_conversions
from ckptsurgeon.api._options import is_given
from ckptsurgeon.dtypes import all_names, named
from ckptsurgeon.errors import SettingsError
from ckptsurgeon.formats.registry import allowed_by
from ckptsurgeon.hints import close_names
from ckptsurgeon.parameter_types import Dtype, Words
from ckptsurgeon.sizes import parsed

_ASKS = {"against": "--against", "max_size": "--max-size", "dtypes": "--dtype", "allow": "--allow", "finite": "--finite", "full": "--full"}
_FLAGS = ("--finite", "--full")  # selecting their codes turns them on


@dataclass(frozen=True)
class Gate:
    """What is checked. Finding codes are complete, dtypes are safetensors' codes, `max_size` is in bytes; an empty field is not checked."""

    against: Target | None = None
    root: str | None = None
    finite: bool = False
    full: bool = False
    max_size: int | None = None
    dtypes: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    select: frozenset[str] = frozenset()
    ignore: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def wants(self, code: str) -> bool:
        """Whether findings of this code are reported."""
        return finding_codes.is_reported(code, self.select, self.ignore)


def gate(
    *,
    against: Target | None = None,
    root: str | None = None,
    conversions: bool = True,
    finite: bool = False,
    full: bool = False,
    max_size: int | str | None = None,
    dtypes: Dtype | Iterable[Dtype] = (),
    allow: Words = (),
    select: Words = (),
    ignore: Words = (),
) -> Gate:
    """A gate from the arguments of `check`. Raises SettingsError for an invalid one; its `key` is the option.

    Selecting a code that only a flag looks for (CK401, CK106) turns the flag on.

    >>> gate(max_size="1.5 MB", dtypes="bfloat16,F32", select="CK4").finite
    True
    """
    if not conversions and against is None:
        raise SettingsError("is about a target, and none is given", key="--no-conversions", hint="add --against module:Net")
    if not conversions and against is not None:
        against = replace(against, checkpoint=without_conversions(against.checkpoint))
    options = {"--against": against is not None, "--max-size": max_size is not None, "--dtype": bool(_split(dtypes))}
    options |= {"--allow": bool(_split(allow)), "--finite": finite, "--full": full, "": True}
    chosen = [(word, _codes(word, "--select")) for word in _split(select)]
    notes = []
    for word, rows in chosen:
        idle = {row.option for row in rows} if not any(options[row.option] for row in rows) else set()
        options.update(dict.fromkeys(idle & set(_FLAGS), True))
        if idle and not idle & set(_FLAGS):
            notes.append(f"nothing is looked for under {word} without {' or '.join(sorted(idle))}")
    return Gate(
        against=against,
        root=root,
        finite=options["--finite"],
        full=options["--full"],
        max_size=None if max_size is None else nbytes(max_size),
        dtypes=tuple(dict.fromkeys(map(_dtype, _split(dtypes)))),
        allow=tuple(dict.fromkeys(name for word in _split(allow) for name in _format(word))),
        select=frozenset(row.code for _, rows in chosen for row in rows),
        ignore=frozenset(row.code for word in _split(ignore) for row in _codes(word, "--ignore")),
        notes=tuple(notes),
    )


def refuse_unheard(arguments: Mapping[str, Any]) -> None:
    """Raises SettingsError for an option whose findings `select` or `ignore` hides."""
    select, ignore = (
        [row.code for word in _split(arguments.get(name) or ()) for row in finding_codes.named(word)] for name in ("select", "ignore")
    )
    for name, option in _ASKS.items():
        codes = [row.code for row in finding_codes.TABLE if row.option == option]
        if is_given(arguments.get(name)) and not any(finding_codes.is_reported(code, select, ignore) for code in codes):
            reason = f"looks for {' and '.join(codes)}, which --select or --ignore leaves out"
            raise SettingsError(reason, key=option, hint=f"leave {option} out, or let {codes[0]} be reported")


def _split(words: Dtype | Iterable[Dtype]) -> list[str]:
    items = list(words) if isinstance(words, Iterable) and not isinstance(words, str) else [words]
    return [part.strip() for word in items for part in str(word).split(",") if part.strip()]


def _unknown(option: str, what: str, word: str, known: Sequence[str], hint: str) -> SettingsError:
    near = close_names(word, known, 1)
    return SettingsError(f"there is no {what} {word!r}{f'; is it {near[0]}?' if near else ''}", key=option, hint=hint)


def _codes(word: str, option: str) -> tuple[finding_codes.Code, ...]:
    rows = finding_codes.named(word)
    if not rows:
        raise _unknown(option, "code", word, [*finding_codes.BY_CODE, *(row.name for row in finding_codes.TABLE)], every_code())
    return rows


def every_code() -> str:
    """The hint for an unknown code."""
    return "all of them: ckptsurgeon check --explain all; or the beginning of some, such as CK2"


def _dtype(word: str) -> str:
    dtype = named(word)
    if dtype is None:
        raise _unknown(
            "--dtype", "dtype", word, all_names(), "write safetensors' codes or torch's names: F16, BF16, F32, or float16, bfloat16"
        )
    return dtype.code


def _format(word: str) -> tuple[str, ...]:
    formats = allowed_by().get(word.lower())
    if formats is None:
        raise _unknown("--allow", "format", word, list(allowed_by()), f"the formats are {', '.join(allowed_by())}")
    return formats


def nbytes(value: Any) -> int:
    """A size in bytes: 1.5 GB is 1,500,000,000, 1GiB is 1,073,741,824.

    >>> nbytes("500MB"), nbytes("1.5 KiB"), nbytes(12)
    (500000000, 1536, 12)
    """
    if type(value) is int and value >= 0:
        return value
    size = parsed(value) if isinstance(value, str) else None
    if size is None:
        raise SettingsError(f"{value!r} is no size", key="--max-size", hint="write bytes, or a number with its unit: 500MB, 1.5GB")
    return size
