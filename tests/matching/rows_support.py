"""Sides of a matching as rows of keys and shapes, in a library's order or the alphabet's, and what is sure of them."""

from __future__ import annotations

import pytest
from pairs_support import meta

from ckptsurgeon.matching.result import Matching
from ckptsurgeon.tensors import TensorMeta

Rows = list[tuple[str, tuple[int, ...]]]
ORDERS = pytest.mark.parametrize("in_order", [True, False], ids=["library", "sorted"])


def side(rows: Rows, in_order: bool = True) -> dict[str, TensorMeta]:
    """The tensors of one side."""
    return {key: meta(key, shape) for key, shape in (rows if in_order else sorted(rows))}


def sides(source: Rows, target: Rows, in_order: bool = True) -> list[dict[str, TensorMeta]]:
    """Both sides."""
    return [side(rows, in_order) for rows in (source, target)]


def sure(found: Matching) -> dict[str, str]:
    """The first source of each target that is certain."""
    return {key: link.sources[0] for link in found.certain for key in link.targets}


def norm(path: str, width: int) -> Rows:
    """A norm with running statistics."""
    return [(f"{path}.{name}", (width,)) for name in ("weight", "bias", "running_mean", "running_var")]
