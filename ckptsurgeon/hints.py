"""Parts of messages: names that are close to an unknown name, long lists cut to a readable length, and notes that are never hidden."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

SHOWN = 20  # problems that an error lists
_POOL = 5_000  # names that are compared


class Unmissable(str):
    """A note that `-q` does not hide: code that a file names is imported, or a setting was not followed."""

    __slots__ = ()


def close_names(text: str, names: Iterable[str], most: int = 3) -> list[str]:
    """The names that look most like `text`, ignoring its wildcards and case.

    >>> close_names("fc4.*", ["conv1.weight", "fc1.weight"])
    ['fc1.weight']
    """
    from difflib import get_close_matches

    pool = list(dict.fromkeys(names))
    plain = re.sub(r"[*{}]", "", text)
    head = re.split(r"[.0-9]", plain)[0]
    by_lower = {name.lower(): name for name in reversed(pool[:_POOL])}
    close = [by_lower[name] for name in get_close_matches(plain.lower(), by_lower, n=most, cutoff=0.5)]
    return close or [name for name in pool if head and name.startswith(head)][:most]


def without_slip(text: str, names: Iterable[str]) -> str | None:
    """The name of which `text` is probably a misspelling; None where there is none.

    >>> without_slip("net_param.pkl", ["net_params.pkl", "model.py"]), without_slip("other.pkl", ["net_params.pkl"])
    ('net_params.pkl', None)
    """
    from difflib import get_close_matches

    return next(iter(get_close_matches(text, list(names)[:_POOL], n=1, cutoff=0.8)), None)


def close_words(text: str, names: Iterable[str]) -> str:
    """Close names as words to end a sentence with, or `""`.

    >>> close_words("fc4.*", ["conv1.weight", "fc1.weight"])
    ' (close: fc1.weight)'
    """
    close = close_names(text, names)
    return f" (close: {', '.join(close)})" if close else ""


def close_hint(text: str, names: Iterable[str]) -> str | None:
    """A hint with close names, or else with the first names; None without names.

    >>> close_hint("fc9.*", ["conv1.weight", "fc3.bias"]), close_hint("zz", ["conv1.weight", "fc3.bias"])
    ('is it fc3.bias?', 'there are conv1.weight, fc3.bias')
    """
    known = list(names)
    close = close_names(text, known)
    if close:
        return f"is it {' or '.join(close)}?"
    return f"there are {', '.join(known[:3])}{' …' if len(known) > 3 else ''}" if known else None


def several(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are.

    >>> several(["a", "b", "c"])
    'a and 2 more'
    """
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def shortened(problems: Iterable[str], most: int = SHOWN) -> tuple[str, ...]:
    """Problems as an error lists them: the first `most`, and how many more there are."""
    rows = tuple(problems)
    return rows[:most] + ((f"and {len(rows) - most} more",) if len(rows) > most else ())
