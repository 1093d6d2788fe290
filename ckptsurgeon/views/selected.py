"""Selects the tensors and modules of an archive that are shown, by root, patterns and order. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.shown import Look
from ckptsurgeon.tensors import Archive, Checkpoint, StateDict, TensorMeta

if TYPE_CHECKING:
    from ckptsurgeon.views.modules import Module, Numbers


def selected(tensors: Mapping[str, TensorMeta], look: Look) -> Mapping[str, TensorMeta]:
    """The tensors whose keys match a pattern, sorted as `look` says."""
    rows = list(tensors.items())
    if look.patterns:
        from ckptsurgeon.rules.patterns import compile_pattern

        patterns = [compile_pattern(text) for text in look.patterns]
        for pattern in patterns:
            pattern.learn(tensors)
        tests = [pattern.test for pattern in patterns]
        rows = [(key, tensor) for key, tensor in rows if any(test(key) for test in tests)]
    elif look.sort == "file":
        return tensors
    if look.sort == "name":
        rows.sort(key=lambda row: row[0])
    if look.sort == "size":
        rows.sort(key=lambda row: -row[1].nbytes)
    return dict(rows)


def roots_shown(archive: Archive) -> list[StateDict | Checkpoint]:
    """The roots whose tensors are shown: the chosen one; else, with patterns, those that have a match; else all."""
    roots: list[StateDict | Checkpoint] = [*archive.state_dicts] if archive.chosen is None else [archive.chosen]
    return [root for root in roots if selected(root.tensors, archive.look)] or roots if archive.look.patterns else roots


def tree(tensors: Mapping[str, TensorMeta], look: Look) -> list[Module]:
    """The modules of tensors, each with its tensors, elements and bytes."""
    from ckptsurgeon.views.modules import modules

    rows = ((key, (1, prod(tensor.shape), prod(tensor.shape) * BY_CODE[tensor.dtype].size)) for key, tensor in tensors.items())
    orders = {"name": by_name, "size": by_size}
    return modules(rows, look.depth, orders.get(look.sort))


def by_name(name: str, _numbers: Numbers) -> tuple[int, str]:
    """Sort modules by name."""
    return 0, name


def by_size(name: str, numbers: Numbers) -> tuple[int, str]:
    """Sort modules by their bytes, the largest first."""
    return -numbers[-1], name
