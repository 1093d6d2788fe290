"""What keeps a checkpoint from loading strictly, by names, shapes and kinds."""

from __future__ import annotations

import pytest

from ckptsurgeon.planning.fits import misfits


@pytest.mark.parametrize(
    ("given", "wanted", "words"),
    [
        ((2,), (2,), []),
        (None, None, []),
        ((2,), (3,), ["shape"]),
        (None, (2,), ["kind"]),
        ((2,), None, ["kind"]),
        (None, (), ["kind"]),
    ],
)
def test_two_values_fit_if_they_are_of_one_kind_and_shape(
    given: tuple[int, ...] | None, wanted: tuple[int, ...] | None, words: list[str]
) -> None:
    assert [found.code for found in misfits({"a": given}, {"a": wanted})] == words
    assert misfits({"m._extra_state": given}, {"m._extra_state": wanted}) == []
