"""Refuses int8 weights that are stored in the order of a GPU's kernels, as old versions of bitsandbytes save them after a forward pass.

The entry `weight_format` beside the weight names the order; only 0 or "row" can be dequantised. The shape does not show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptsurgeon.adapters.chain import decodes
from ckptsurgeon.errors import CastError
from ckptsurgeon.formats import tree_of
from ckptsurgeon.planning.plan_types import Plan
from ckptsurgeon.planning.training_places import at_path
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.tensors import Checkpoint


def refuse(plan: Plan, sources: Sequence[Checkpoint], live: Mapping[str, Any] | None = None) -> None:
    """Raises CastError where a plan dequantises a weight that is not stored in rows; `live` has the tensors of a source in memory."""
    steps = [step for step in plan.steps if decodes(step.adapters)]
    for number, source in enumerate(sources):
        keys = dict.fromkeys(key for step in steps for source_number, key in step.sources[::2] if source_number == number)
        formats = _forms(source, [f"{key.removesuffix('weight')}weight_format" for key in keys], live)
        for key, (name, format_) in zip(keys, formats.items(), strict=True):
            if format_ not in (None, 0, "row"):
                raise CastError(
                    f"is int8 codes in the order of a GPU's kernels, not in rows ({name} is {format_!r})",
                    path=source.path,
                    key=key,
                    hint="load the model with the bitsandbytes that wrote it, and save it before its first forward pass",
                )


def _forms(source: Checkpoint, names: Sequence[str], live: Mapping[str, Any] | None) -> dict[str, Any]:
    """The source's entry under each of `names`: a number, or text in old files; None where there is none."""
    if live:
        values: dict[str, Any] = {name: live.get(name) for name in names}
        return {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    places = {name: f"{source.root}.{name}".lstrip(".") for name in names}
    outside = set(places.values()) & set(source.left_behind)
    tree = tree_of(source).value if outside else None
    with Reader([source]) as reader:
        return {
            name: int.from_bytes(bytes(reader.read(source[name])), "little") if name in source else at_path(tree, places[name])
            for name in names
        }
