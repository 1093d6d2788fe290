"""The counts of a diff by module, and its keys with a letter each, as `--stat` and `--name-status` show them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ckptsurgeon.errors import SettingsError
from ckptsurgeon.planning.diff import Diff
from ckptsurgeon.views.modules import Module, modules

COUNTED = ("matched", "mismatched", "missing", "extra")
# The categories that --only takes, each with its letter, as git's from source to target. A key has the first that applies.
LETTERS = {"mismatched": "M", "missing": "A", "extra": "D", "dtype": "T", "matched": "=", "dropped": "!"}
DEPTH = 4  # the most levels of modules


def categories(words: Sequence[str]) -> tuple[str, ...]:
    """The named categories, in the order of a diff.

    Raises:
        SettingsError: there is no such category.
    """
    for word in words:
        if word not in LETTERS:
            raise SettingsError(f"there is no category {word!r}", key="--only", hint=f"one or more of {','.join(LETTERS)}")
    return tuple(word for word in LETTERS if word in words)


def counted(result: Diff) -> list[Module]:
    """The modules with the numbers of their keys in each category of `COUNTED`; a module whose keys are all in one is not split."""
    lists = (result.matched, [row.key for row in result.mismatched], result.missing, [_bare(result, key) for key in result.extra])
    rows = [(key, tuple(int(position == at) for position in range(4))) for at, keys in enumerate(lists) for key in keys]
    return [row for row in modules(rows, DEPTH, whole=lambda numbers: sum(map(bool, numbers)) == 1) if row.ends]


def _bare(result: Diff, key: str) -> str:
    return result.prefix.added + result.prefix.bare(key)


def lettered(result: Diff, only: Sequence[str], verbose: bool) -> Iterator[tuple[str, str]]:
    """Each key with its letter; matched and dropped keys only with `verbose` or if `only` names them."""
    shown = categories(only) or tuple(word for word in LETTERS if verbose or word not in ("matched", "dropped"))
    changed = {row.key for row in result.dtype_changed}
    keys = {
        "mismatched": [row.key for row in result.mismatched],
        "missing": result.missing,
        "extra": result.extra,
        "dtype": [row.key for row in result.dtype_changed],
        "matched": [key for key in result.matched if key not in changed],
        "dropped": result.dropped,
    }
    for word in shown:
        for key in keys[word]:
            yield LETTERS[word], key
