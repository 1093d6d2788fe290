"""Refuses steps that would compute with quantised codes as if they were values, or part them from their scales."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import CastError
from ckptsurgeon.hints import shortened
from ckptsurgeon.planning.quantised_weights.find import EIGHT_BITS, Codes, find, is_matrix
from ckptsurgeon.tensors import Checkpoint, TensorMeta

if TYPE_CHECKING:
    from ckptsurgeon.planning.keys import SourceKey
    from ckptsurgeon.planning.plan_types import Step


def refuse_broken(
    steps: Sequence[Step],
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    allowed: Iterable[str],
    *,
    dequantizing: bool = False,
    averaged: bool = False,
) -> None:
    """Raises CastError for codes of a source or the target that would be cast, adapted or separated from their scales.

    Args:
        allowed: patterns of keys for which this is allowed.
        dequantizing: whether dequantizing was asked for, so that the hint does not offer it.
        averaged: whether the sources are averaged; tensors that are not floating are the first source's then.
    """
    from ckptsurgeon.rules.patterns import compile_pattern

    patterns = [compile_pattern(pattern) for pattern in allowed]
    by_source = [find(source) for source in sources]
    problems = [
        *_misread(steps, by_source, dequantizing, averaged),
        *_without_scales(steps, sources, by_source),
        *(_mixed(steps, find(target), by_source) if target is not None else ()),
    ]
    words_by_key: dict[str, str] = {}
    for key, words, _ in problems:
        if not any(pattern.match(key) is not None for pattern in patterns):
            words_by_key.setdefault(key, words)
    if not words_by_key:
        return
    first, alone = next(iter(words_by_key)), len(words_by_key) == 1
    words = f"if the codes are meant as they are, allow it by name: allow_cast={[first]!r}"
    ways_out = {way_out for key, _, way_out in problems if key in words_by_key} - ({_DEQUANTIZE} if dequantizing else set())
    raise CastError(
        words_by_key[first] if alone else "quantised weights, whose numbers are codes and no values",
        key=first if alone else None,
        problems=() if alone else shortened(f"{key}: {words}" for key, words in words_by_key.items()),
        hint=f"{ways_out.pop()}; {words}" if len(ways_out) == 1 and "" not in ways_out else words,
    )


Problem = tuple[str, str, str]  # a key of the output, what is wrong, and a way out, if there is one
_DEQUANTIZE = "make values of them: dequantize=True"
_OF_TARGET = "take a target that is not quantised, and quantise what comes of it"


def _misread(steps: Sequence[Step], by_source: Sequence[Mapping[str, Codes]], dequantizing: bool, averaged: bool) -> Iterator[Problem]:
    """Steps that compute with codes or separate them from their scales; with `dequantizing`, also steps that leave codes as they are."""
    if not any(by_source):
        return
    by_key = {step.target: step for step in steps}
    made = find({step.target: TensorMeta(step.target, step.dtype, step.shape, ()) for step in steps})
    plain = {step.sources[0] for step in steps if len(step.sources) == 1 and not step.changes}
    for step in steps:
        for number, key in step.sources:
            codes = by_source[number].get(key)
            if codes is None or _dequantized(step, (number, key), codes):
                continue
            what = f"{'' if key == step.target else f'{key} '}{codes.words}"
            way_out = _DEQUANTIZE if codes.op is not None else f"give the whole checkpoint: {codes.whole}" if codes.whole else ""
            needed = (*codes.own_scales, *(() if codes.op else codes.extras))
            if dequantizing and codes.op is None:
                why = "values are made of both together" if codes.whole else "how to make values of them is not known here"
                yield step.target, f"{what}, and {why}", way_out
            elif step.changes:
                yield step.target, f"{what}, and would be changed by {step.changes[0]['op']}", way_out
            elif step.cast is not None:
                yield step.target, f"{what}, and would be cast to {step.cast}", way_out
            elif averaged:
                yield step.target, f"{what}, and would be the first source's and no average", way_out
            elif lost := [name for name in needed if (number, name) not in plain]:
                yield step.target, f"{what}, and {', '.join(lost)} would not go with it", way_out
            elif not codes.tied and not codes.whole:
                made_scales = made[step.target].scales if step.target in made else ()
                if [by_key[name].sources for name in made_scales] != [((number, name),) for name in codes.scales]:
                    yield step.target, f"{what}, and would not keep these with it under its new name", way_out


def _without_scales(steps: Sequence[Step], sources: Sequence[Checkpoint], by_source: Sequence[Mapping[str, Codes]]) -> Iterator[Problem]:
    """Weights of eight bits that would be cast to floating, while a tensor of their module is unused whose shape is that of scales."""
    suspects = [
        (step, number, key)
        for step in steps
        if step.cast is not None and BY_CODE[step.cast].kind == "float"
        for number, key in step.sources
        if sources[number][key].dtype in EIGHT_BITS and is_matrix(sources[number][key]) and key not in by_source[number]
    ]
    if not suspects:
        return
    from ckptsurgeon.adapters.quantised.dequantize import block_of

    read = {source_key for step in steps for source_key in step.sources}
    unused: dict[tuple[int, str], list[TensorMeta]] = {}
    for number, source in enumerate(sources):
        for name, tensor in source.items():
            if (number, name) not in read and BY_CODE[tensor.dtype].kind == "float" and not name.endswith("bias"):
                unused.setdefault((number, name.rpartition(".")[0]), []).append(tensor)
    for step, number, key in suspects:
        tensor = sources[number][key]
        beside = [*unused.get((number, key), ()), *unused.get((number, key.rpartition(".")[0]), ())]
        scales = [other.name for other in beside if other.dtype != tensor.dtype and block_of(tensor.shape, other.shape) is not None]
        if scales:
            left = f"{', '.join(scales)} beside it, by {'their' if len(scales) > 1 else 'its'} shape perhaps its scales, would be left out"
            yield step.target, f"has {tensor.dtype} in the source and would be cast to {step.cast}, while {left}", ""


def _dequantized(step: Step, source_key: SourceKey, codes: Codes) -> bool:
    """Whether a step dequantizes the codes at `source_key` with their own scale and divisor. The blocks may be other ones, chosen by the
    user."""
    from ckptsurgeon.adapters.chain import decodes

    index = step.sources.index(source_key)
    after = step.sources[index + 1 : index + 2]
    by_formula = decodes(step.adapters) and step.adapters[0]["divisor"] == codes.divisor
    return by_formula and index % 2 == 0 and after == ((source_key[0], codes.scales[0]),)


def scales_read(steps: Sequence[Step]) -> set[SourceKey]:
    """The scales that steps use to dequantize, so that they are not written."""
    from ckptsurgeon.adapters.chain import decodes

    return {source_key for step in steps if decodes(step.adapters) for source_key in step.sources[1::2]}


def _mixed(steps: Sequence[Step], quantised: Mapping[str, Codes], by_source: Sequence[Mapping[str, Codes]]) -> Iterator[Problem]:
    """The target's quantised weights whose codes and scales would not come from the same file."""
    by_key = {step.target: step for step in steps}
    for key, codes in quantised.items():
        first, *scales = [by_key[name] for name in (key, *codes.own_scales) if name in by_key]
        if all(not row.sources and row.action == first.action for row in (first, *scales)):  # all kept, or all the model's own
            if first.cast is not None:
                yield key, f"{codes.of_target}, and would be cast to {first.cast}", _OF_TARGET
            continue
        number, source_key = first.sources[0] if len(first.sources) == 1 and not first.ops else (0, "")
        whole = by_source[number].get(source_key)
        source_scales = [] if whole is None else [((number, name),) for name in whole.own_scales]
        same = whole is not None and whole.scheme == codes.scheme and [row.sources for row in scales] == source_scales
        if not same or any(row.changes for row in scales):
            yield key, f"{codes.of_target}, and would not get codes and scales from one place", _OF_TARGET
