"""Sizes are read and shown by one table: what is shown can be given back, and is the size that it was, as near as it says."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgeon import sizes
from ckptsurgeon.api.checking.settings import nbytes
from ckptsurgeon.limit_table import BY_NAME, shown

BYTES = st.integers(0, 1 << 62)
POWERS = {"": 1, "b": 1} | {f"{letter}{end}": 1000**power for power, letter in enumerate("kmgt", 1) for end in ("", "b")}
POWERS |= {f"{letter}i{end}": 1024**power for power, letter in enumerate("kmgt", 1) for end in ("", "b")}


@given(BYTES)
def test_exact_sizes_come_back(size: int) -> None:
    assert sizes.parsed(sizes.exact(size)) == size == nbytes(sizes.exact(size))
    assert sizes.parsed(shown(BY_NAME["pickle-bytes"], size)) == size


@given(BYTES)
def test_rounded_sizes_come_back_as_near_as_they_say(size: int) -> None:
    text = sizes.rounded(size)
    unit = POWERS[text.split()[1].lower()]
    back = sizes.parsed(text)
    assert back is not None and abs(back - size) <= max(unit / 20 + 1, size * 1e-15)
    assert unit in (1, 10**3, 10**6, 10**9, 10**12)
    number = Decimal(text.split()[0].replace(",", ""))
    assert size < 1000 or (number >= 1 and (number < 1000 or unit == 10**12))


@given(st.decimals(0, 10**9, places=3), st.sampled_from(sorted(POWERS)), st.booleans(), st.booleans())
def test_every_unit_in_any_case(number: Decimal, unit: str, upper: bool, space: bool) -> None:
    text = f"{number:f}{' ' if space else ''}{unit.upper() if upper else unit}"
    assert sizes.parsed(text) == nbytes(text) == int(number * POWERS[unit])


@pytest.mark.parametrize("text", ["", "MB", "5 apples", "-5MB", "1e9", "5 MB GB", "1.2.3", "½MB", "٣MB", "5K B"])
def test_what_is_no_size(text: str) -> None:
    assert sizes.parsed(text) is None
