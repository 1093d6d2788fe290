"""Sizes in bytes: one table of units, by which they are read from a person and shown to one. `K M G T` are powers of 1000, `Ki Mi Gi Ti` of
1024, as everywhere in this program; what is shown is in the latter and says so, so that it can be given back."""

from __future__ import annotations

import re

KIB, MIB, GIB, TIB = (1 << bits for bits in (10, 20, 30, 40))
UNITS: dict[str, int] = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
SHOWN = ("KiB", "MiB", "GiB", "TiB")
_BY_NAME = {name.upper(): size for name, size in UNITS.items()} | {name.upper()[:-1]: size for name, size in UNITS.items() if size > 1}
_SIZE = re.compile(r"(?P<whole>\d[\d_,]{0,30})(?:\.(?P<part>\d{1,30}))?\s*(?P<unit>[A-Za-z]*)", re.ASCII)


def parsed(text: str) -> int | None:
    """The bytes that a person wrote, rounded down; None for what is no size. Units in any case, with or without the `B`.

    >>> parsed("500MB"), parsed("1.5 KiB"), parsed("1_000"), parsed("2g"), parsed("many")
    (500000000, 1536, 1000, 2000000000, None)
    """
    found = _SIZE.fullmatch(text.strip())
    unit = None if found is None else _BY_NAME.get(found["unit"].upper())
    if found is None or unit is None:
        return None
    whole, part = found["whole"].replace("_", "").replace(",", ""), found["part"] or ""
    return int(int(whole + part) * unit // 10 ** len(part))


def rounded(nbytes: float) -> str:
    """Bytes as a person reads them.

    >>> rounded(1536), rounded(12), rounded(5 << 40)
    ('1.5 KiB', '12 B', '5.0 TiB')
    """
    if nbytes < KIB:
        return f"{nbytes:.0f} B"
    unit = next((unit for unit in SHOWN if nbytes < UNITS[unit] * 1024), SHOWN[-1])
    return f"{nbytes / UNITS[unit]:.1f} {unit}"


def exact(nbytes: int) -> str:
    """Bytes as a person writes them, to the byte.

    >>> exact(1 << 31), exact(5 * 10**9), exact(1025)
    ('2GiB', '5GB', '1025')
    """
    sizes = sorted((size, unit) for unit, size in UNITS.items() if size > 1)
    return next((f"{nbytes // size}{unit}" for size, unit in reversed(sizes) if nbytes >= size and not nbytes % size), str(nbytes))
