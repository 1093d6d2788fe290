"""Refuses int8 codes that lie in the order of a GPU's kernels, which old versions of bitsandbytes save after a forward pass.

`weight_format` beside the codes says so (0 or "row" for rows, the order that the formula is for). A shape does not show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptsurgeon.adapters.chain import decodes
from ckptsurgeon.errors import CastError
from ckptsurgeon.formats import tree_of
from ckptsurgeon.planning.plan_types import Plan
from ckptsurgeon.planning.training_places import at_place
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.tensors import Checkpoint


def refuse(plan: Plan, sources: Sequence[Checkpoint], live: Mapping[str, Any] | None = None) -> None:
    """Raises CastError where a plan makes values of codes that are not in rows; `live` has the tensors of a source in memory."""
    made = [step for step in plan.steps if decodes(step.adapters)]
    for number, source in enumerate(sources):
        codes = dict.fromkeys(key for step in made for first, key in step.sources[::2] if first == number)
        forms = _forms(source, [f"{key.removesuffix('weight')}weight_format" for key in codes], live)
        for key, (name, form) in zip(codes, forms.items(), strict=True):
            if form not in (None, 0, "row"):
                raise CastError(
                    f"is int8 codes in the order of a GPU's kernels, not in rows ({name} is {form!r})",
                    path=source.path,
                    key=key,
                    hint="load the model with the bitsandbytes that wrote it, and save it before its first forward pass",
                )


def _forms(source: Checkpoint, names: Sequence[str], live: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the source has under each of `names`: a number, in old files text; None for nothing."""
    if live:
        values: dict[str, Any] = {name: live.get(name) for name in names}
        return {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    texts = {name: f"{source.root}.{name}".lstrip(".") for name in names}
    told = set(texts.values()) & set(source.left_behind)
    tree = tree_of(source).value if told else None
    with Reader([source]) as reader:
        return {
            name: int.from_bytes(bytes(reader.read(source[name])), "little") if name in source else at_place(tree, texts[name])
            for name in names
        }
