"""Sizes in bytes, and shares: how users write them, and how they are shown. Pure text.

`kB MB GB TB` are powers of 1000, as disks and Hugging Face count, and all sizes are shown in them. A user may also write `KiB MiB GiB TiB`.
"""

from __future__ import annotations

import re

KB, MB, GB, TB = (10**power for power in (3, 6, 9, 12))
SHOWN: dict[str, int] = {"kB": KB, "MB": MB, "GB": GB, "TB": TB}
UNITS: dict[str, int] = {"": 1, "B": 1, **SHOWN, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_BY_NAME = {name.upper(): size for name, size in UNITS.items()} | {name.upper()[:-1]: size for name, size in UNITS.items() if size > 1}
_SIZE = re.compile(r"(?P<whole>\d[\d_,]{0,30})(?:\.(?P<part>\d{1,30}))?\s*(?P<unit>[A-Za-z]*)", re.ASCII)


def parsed(text: str) -> int | None:
    """The number of bytes in a text, rounded down; None where it is no size. Units in any case, with or without the `B`.

    >>> parsed("500MB"), parsed("1.5 KiB"), parsed("1_000"), parsed("2g"), parsed("many")
    (500000000, 1536, 1000, 2000000000, None)
    """
    match = _SIZE.fullmatch(text.strip())
    unit = None if match is None else _BY_NAME.get(match["unit"].upper())
    if match is None or unit is None:
        return None
    whole, part = match["whole"].replace("_", "").replace(",", ""), match["part"] or ""
    return int(int(whole + part) * unit // 10 ** len(part))


def rounded(nbytes: float) -> str:
    """A number of bytes in a readable form.

    >>> rounded(1536), rounded(12), rounded(999_999), rounded(5 * 10**15)
    ('1.5 kB', '12 B', '1.0 MB', '5,000.0 TB')
    """
    if nbytes < KB:
        return f"{nbytes:.0f} B"
    unit = next((unit for unit, size in SHOWN.items() if nbytes < size * 999.95), "TB")
    return f"{nbytes / UNITS[unit]:,.1f} {unit}"


def exact(nbytes: int) -> str:
    """A number of bytes in the form that users write, exact to the byte.

    >>> exact(2 * 10**9), exact(1 << 31), exact(1025)
    ('2GB', '2GiB', '1025')
    """
    sizes = sorted((size, unit) for unit, size in UNITS.items() if size > 1)
    return next((f"{nbytes // size}{unit}" for size, unit in reversed(sizes) if nbytes >= size and not nbytes % size), str(nbytes))


def percent(share: float) -> str:
    """A share from 0 to 1, cut rather than rounded, so that only the whole is 100.0 %.

    >>> percent(0.99999), percent(1)
    ('99.9 %', '100.0 %')
    """
    return f"{int(share * 1000 + 1e-9) / 10:.1f} %"
