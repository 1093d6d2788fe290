"""What is asked of a file, from the words that a person writes to one frozen `Gate`; a word that means nothing is a SettingsError.

Nothing is read or imported here: a target comes as it was opened.
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
_FLAGS = {"--finite": "finite", "--full": "full"}  # that naming their code turns on


@dataclass(frozen=True)
class Gate:
    """What is asked of a file. Codes are in full, dtypes safetensors' codes, `max_size` bytes; what is empty is not asked."""

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
        """Whether findings of this code are told."""
        return finding_codes.wanted(code, self.select, self.ignore)


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
    """A gate from a person's words; without `conversions` those of the library of `against` are left out. SettingsError, its `key` the
    option, for a word that means nothing.

    Selecting what only a flag looks for (CK401, CK106) is asking for it.

    >>> gate(max_size="1.5 MB", dtypes="bfloat16,F32", select="CK4").finite
    True
    """
    if not conversions and against is None:
        raise SettingsError("is about what files are held against, and nothing is", key="--no-conversions", hint="add --against module:Net")
    if not conversions and against is not None:
        against = replace(against, checkpoint=without_conversions(against.checkpoint))
    options = {"--against": against is not None, "--max-size": max_size is not None, "--dtype": bool(_split(dtypes))}
    options |= {"--allow": bool(_split(allow)), "--finite": finite, "--full": full, "": True}
    chosen = [(word, _codes(word, "--select")) for word in _split(select)]
    notes = []
    for word, found in chosen:
        idle = {row.option for row in found} if not any(options[row.option] for row in found) else set()
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
        select=frozenset(row.code for _, found in chosen for row in found),
        ignore=frozenset(row.code for word in _split(ignore) for row in _codes(word, "--ignore")),
        notes=tuple(notes),
    )


def refuse_unheard(given: Mapping[str, Any]) -> None:
    """Raises SettingsError where one call asks for something and, by `select` or `ignore`, not to be told of it."""
    select, ignore = (
        [row.code for word in _split(given.get(name) or ()) for row in finding_codes.named(word)] for name in ("select", "ignore")
    )
    for name, option in _ASKS.items():
        found = [row.code for row in finding_codes.TABLE if row.option == option]
        if is_given(given.get(name)) and not any(finding_codes.wanted(code, select, ignore) for code in found):
            reason = f"looks for {' and '.join(found)}, which --select or --ignore leaves out"
            raise SettingsError(reason, key=option, hint=f"leave {option} out, or let {found[0]} be told")


def _split(words: Dtype | Iterable[Dtype]) -> list[str]:
    each = list(words) if isinstance(words, Iterable) and not isinstance(words, str) else [words]
    return [part.strip() for word in each for part in str(word).split(",") if part.strip()]


def _unknown(option: str, what: str, word: str, known: Sequence[str], hint: str) -> SettingsError:
    near = close_names(word, known, 1)
    return SettingsError(f"there is no {what} {word!r}{f'; is it {near[0]}?' if near else ''}", key=option, hint=hint)


def _codes(word: str, option: str) -> tuple[finding_codes.Code, ...]:
    found = finding_codes.named(word)
    if not found:
        raise _unknown(option, "code", word, [*finding_codes.BY_CODE, *(row.name for row in finding_codes.TABLE)], every_code())
    return found


def every_code() -> str:
    """The codes, as a hint names them."""
    return "all of them: ckptsurgeon check --explain all; or the beginning of some, such as CK2"


def _dtype(word: str) -> str:
    found = named(word)
    if found is None:
        raise _unknown(
            "--dtype", "dtype", word, all_names(), "write safetensors' codes or torch's names: F16, BF16, F32, or float16, bfloat16"
        )
    return found.code


def _format(word: str) -> tuple[str, ...]:
    found = allowed_by().get(word.lower())
    if found is None:
        raise _unknown("--allow", "format", word, list(allowed_by()), f"the formats are {', '.join(allowed_by())}")
    return found


def nbytes(value: Any) -> int:
    """A size that a person wrote, in bytes: 1.5 GB is 1,500,000,000, 1GiB is 1,073,741,824.

    >>> nbytes("500MB"), nbytes("1.5 KiB"), nbytes(12)
    (500000000, 1536, 12)
    """
    if type(value) is int and value >= 0:
        return value
    found = parsed(value) if isinstance(value, str) else None
    if found is None:
        raise SettingsError(f"{value!r} is no size", key="--max-size", hint="write bytes, or a number with its unit: 500MB, 1.5GB")
    return found
