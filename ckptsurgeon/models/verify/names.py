"""A checkpoint's names and shapes held against a model's, with one finding per key. Pure: no file and no value is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ckptsurgeon.formats.registry import named
from ckptsurgeon.report import Finding
from ckptsurgeon.tensors import Checkpoint

Shapes = Mapping[str, tuple[int, ...] | None]


def shapes_of(state_dict: Mapping[str, object]) -> dict[str, tuple[int, ...] | None]:
    """Each key's shape, None for a value that is not a tensor.

    >>> shapes_of({"w": torch.zeros(2, 3), "_extra_state": 7})
    {'w': (2, 3), '_extra_state': None}
    """
    return {key: tuple(value.shape) if isinstance(value, torch.Tensor) else None for key, value in state_dict.items()}


def tied_in_model(checkpoint: Checkpoint, found: Iterable[str], ties: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """Model keys that a safetensors file leaves out, to the key of the file that the model ties them to.

    This is the rule of `safetensors.torch.load_model`, whose `save_model` writes one name of a tied tensor. torch's formats keep
    every name, so there it is empty.
    """
    if not named(checkpoint.format).leaves_out_tied:
        return {}
    present = set(found)
    aliases = {}
    for names in ties:
        kept = next((name for name in names if name in present), None)
        if kept is not None:
            aliases.update({name: kept for name in names if name not in present})
    return aliases


def compare_names(expected: Shapes, found: Shapes, aliases: Mapping[str, str]) -> list[Finding]:
    """Findings of the codes `missing`, `unexpected`, `shape` and `kind` (errors) and `tied` (a note for every alias).

    Args:
        expected: the model's shapes by key.
        found: the file's.
        aliases: as `tied_in_model` gives them.
    """
    findings = []
    for key, shape in expected.items():
        if key in aliases:
            findings.append(Finding("tied", f"is not in the file; the model ties it to {aliases[key]}, which is", key, "note"))
        elif key not in found:
            what = "an extra state" if shape is None else f"a tensor of shape {shape}"
            findings.append(Finding("missing", f"the model has {what} that the file lacks", key))
        elif (shape is None) != (found[key] is None):
            sides = ("no tensor", "a tensor") if shape is None else ("a tensor", "no tensor")
            findings.append(Finding("kind", f"is {sides[0]} in the model and {sides[1]} in the file", key))
        elif shape != found[key]:
            findings.append(Finding("shape", f"has the shape {shape} in the model and {found[key]} in the file", key))
    unexpected = (key for key in found if key not in expected)
    return findings + [Finding("unexpected", "is in the file, and the model has no such key", key) for key in unexpected]
