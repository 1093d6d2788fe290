"""What a diff counts: by module, and by a letter for each key. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ckptsurgeon.errors import SettingsError
from ckptsurgeon.planning.diff import Diff
from ckptsurgeon.views.modules import Module, modules

COUNTED = ("matched", "mismatched", "missing", "extra")
# The categories that --only takes, each with its letter: git's, seen from source to target. A key has the first that holds.
LETTERS = {"mismatched": "M", "missing": "A", "extra": "D", "dtype": "T", "matched": "=", "dropped": "!"}
DEPTH = 4  # levels of modules, of which those that are not alike are taken apart


def categories(words: Sequence[str]) -> tuple[str, ...]:
    """The categories that a person named, in the order of a diff.

    Raises:
        SettingsError: there is no such category.
    """
    for word in words:
        if word not in LETTERS:
            raise SettingsError(f"there is no category {word!r}", key="--only", hint=f"one or more of {','.join(LETTERS)}")
    return tuple(word for word in LETTERS if word in words)


def counted(found: Diff) -> list[Module]:
    """The modules with the numbers of their keys that are `COUNTED`: each as large as all its keys are of one kind."""
    lists = (found.matched, [row.key for row in found.mismatched], found.missing, [_bare(found, key) for key in found.extra])
    rows = [(key, tuple(int(place == at) for place in range(4))) for at, keys in enumerate(lists) for key in keys]
    return [row for row in modules(rows, DEPTH, whole=lambda numbers: sum(map(bool, numbers)) == 1) if row.ends]


def _bare(found: Diff, key: str) -> str:
    return found.prefix.added + found.prefix.bare(key)


def lettered(found: Diff, only: Sequence[str], verbose: bool) -> Iterator[tuple[str, str]]:
    """Each key with its letter; those that match, and those that a rule drops, only where they are asked for."""
    wanted = categories(only) or tuple(word for word in LETTERS if verbose or word not in ("matched", "dropped"))
    changed = {row.key for row in found.dtype_changed}
    keys = {
        "mismatched": [row.key for row in found.mismatched],
        "missing": found.missing,
        "extra": found.extra,
        "dtype": [row.key for row in found.dtype_changed],
        "matched": [key for key in found.matched if key not in changed],
        "dropped": found.dropped,
    }
    for word in wanted:
        for key in keys[word]:
            yield LETTERS[word], key
