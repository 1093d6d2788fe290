"""What is left over is looked through by names and shapes, never each with each: twice as much takes about twice as long."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from pairs_support import meta

from ckptsurgeon.matching.matcher import match
from ckptsurgeon.matching.once_laid import orphans


def test_what_is_left_over_is_compared_with_few(monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons: Counter[int] = Counter()

    def counted(rule: Any) -> Any:
        def fits(*words: Any) -> bool:
            comparisons[size] += 1
            return bool(rule.fits(*words))

        return replace(rule, fits=fits)

    monkeypatch.setattr(orphans, "_RULES", tuple(map(counted, orphans._RULES)))
    for size in (400, 800):
        layers = [(f"layers.{number // 10}.part{number % 10}", number % 5) for number in range(size)]
        source = [f"{layer}.{'weight' if named else 'gain'}" for layer, named in layers]
        target = [f"{layer}.{'weight' if named else 'bias'}" for layer, named in layers]
        match({key: meta(key, (2, 2)) for key in source}, {key: meta(key, (2, 2)) for key in target})
    assert comparisons[800] <= 3 * comparisons[400]
    assert comparisons[400] < 400 * 20
