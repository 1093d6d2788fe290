"""The findings of a plan: values that can't be carried, ties that are lost, parts that go nowhere. No step is decided here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod

from ckptsurgeon.adapters.table import adapter_of
from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import UnsafeError
from ckptsurgeon.formats.folders.hf_shards import shard_in_words
from ckptsurgeon.hints import SHOWN, several, shortened
from ckptsurgeon.low_rank import lost_factors
from ckptsurgeon.planning.apply_rules import Names
from ckptsurgeon.planning.plan_types import Step
from ckptsurgeon.planning.quantised_weights.find import is_matrix
from ckptsurgeon.planning.quantised_weights.refuse import scales_read
from ckptsurgeon.planning.resolve import find_refused, find_unkept
from ckptsurgeon.report import Coverage, Finding
from ckptsurgeon.rules.loading_code import Taken
from ckptsurgeon.sizes import percent
from ckptsurgeon.tensors import Checkpoint, find_overlaps

LITTLE = 0.1  # share of a target's elements below which there is a warning
_PARAMETRIZED = re.compile(r"(?:.*\.)?parametrizations\.[^.]+\.")  # where torch's parametrize keeps what one tensor is made of
OTHER_TARGET = "give the model itself, or its skeleton, as the target"


def refuse_unsafe(sources: Sequence[Checkpoint], target: Checkpoint | None, names: Names) -> None:
    """Raises UnsafeError for all values that would have to be carried and can't be."""
    for number, source in enumerate(sources):
        refused = find_refused(source, number, names)
        if refused:
            bare = [names.prefixes[number].bare(key) for key in refused]
            raise UnsafeError(
                "has values inside its state_dict that can't be carried",
                path=source.path,
                problems=shortened(f"{key}: {reason}" for key, reason in refused.items()),
                hint=f"leave them out: drop={bare[:SHOWN]!r}",
            )
    unkept = {} if target is None else find_unkept(target, names.entries)
    if unkept and target is not None:
        raise UnsafeError(
            "has values inside its state_dict that can't be kept",
            path=target.path,
            problems=shortened(f"{key}: {reason}" for key, reason in unkept.items()),
            hint=OTHER_TARGET,
        )


def little(coverage: Coverage, sources: Sequence[Checkpoint], look: str) -> list[Finding]:
    """A warning where almost nothing of a target comes from the sources: often the checkpoint is another model's, or the names differ.

    Args:
        look: the command that shows the names of both.
    """
    if not coverage.counts[0] or coverage.elements >= LITTLE:
        return []
    share = "less than 0.1 %" if coverage.elements < 0.001 else percent(coverage.elements)
    whose = sources[0].path if len(sources) == 1 else f"{len(sources)} sources"
    return [Finding("little", f"only {share} of the target's elements come from {whose}; see what is in the way: {look}", None, "warning")]


def replaced(sources: Sequence[Checkpoint], target: Checkpoint | None, steps: Sequence[Step]) -> list[Finding]:
    """A note where the target is a file and the source replaces all of its tensors: perhaps the mean of both was meant."""
    if target is None or target.kind != "file" or len(sources) != 1 or len(sources[0]) != len(target):
        return []
    if any(step.action != "copy" or step.changes for step in steps):
        return []
    words = f"nothing of {target.path} is in the result: all of its tensors are {sources[0].path}'s (--average takes the mean of both)"
    return [Finding("replaced", words, None, "note")]


def untried(taken: Mapping[int, Taken]) -> list[Finding]:
    """Warnings for loading code that failed when it was tried on the names of a source, or makes new tensors for them."""
    return [
        *(
            Finding(
                "loading", f"the loading code of {by} makes a new tensor for it, which is not followed: it is left out", name, "warning"
            )
            for by_source in taken.values()
            for name, by in by_source.grown.items()
        ),
        *(
            Finding(
                "loading",
                f"{path or 'the model itself'}: its own loading code fails, so that what it takes can't be told: {reason}",
                None,
                "warning",
            )
            for by_source in taken.values()
            for path, reason in by_source.failed.items()
        ),
    ]


def findings(sources: Sequence[Checkpoint], target: Checkpoint | None, names: Names, steps: Sequence[Step]) -> tuple[Finding, ...]:
    """Notes on overlaps, prefixes, conversions and partly filled tensors, and warnings for lost parts, ties and low-rank factors."""
    findings = [
        Finding(
            "overlap", f"shares memory with {second} in {source.path} without being the same tensor; they are written apart", key, "note"
        )
        for source in sources
        for key, second in find_overlaps(source)
    ]
    for first, *rest in target.overlaps if target is not None else ():
        words = f"shares a part of its memory with {first} in the target: both hold what is there as loading leaves it"
        findings += [Finding("overlap", words, key, "note") for key in rest]
    for source, prefix in zip(sources, names.prefixes, strict=True):
        if prefix:
            findings.append(Finding("prefix", f"{source.path}: {prefix}", None, "note"))
    findings += names.applied.notes()
    findings += [Finding("lost-part", words, key, "warning") for key, words in lost_parts(target, names, steps)]
    findings += [Finding("partial", _filled(step), step.target, "note") for step in steps if step.sources and step.filled]
    origin = {step.target: step for step in steps}
    leader = {(number, key): (number, group[0]) for number, source in enumerate(sources) for group in source.ties for key in group}
    for group in target.ties if target is not None else ():
        tensors = {(tuple(leader.get(read, read) for read in origin[key].sources), repr(origin[key].adapters)) for key in group}
        if len(tensors - {((), "()")}) > 1:
            findings.append(
                Finding("untied", f"one tensor in the target ({', '.join(group)}), but apart in the source", group[0], "warning")
            )
    findings += _lost_factors(sources, names, steps)
    findings += _whole_numbers(sources, steps)
    findings += _lost_aliases(sources, steps)
    findings += _parted(sources, names, steps)
    for source in sources:
        notes = (*source.notes, *((shard_in_words(source.shard),) if source.shard is not None else ()))
        findings += [Finding("source", f"{source.path}: {note}", None, "note") for note in notes]
    return tuple(findings)


def _lost_aliases(sources: Sequence[Checkpoint], steps: Sequence[Step]) -> list[Finding]:
    """Notes on names that a file records for a tensor which it stores under another one, as safetensors does where a model ties the two,
    and that get no value from it."""
    given = {step.target for step in steps if step.sources}
    return [
        Finding(
            "alias", f"{source.path} records it as another name of {kept}, which only a model that ties the two gives it", alias, "note"
        )
        for source in sources
        for alias, kept in source.metadata.items()
        if kept in source and alias not in source and alias not in given
    ]


def _parted(sources: Sequence[Checkpoint], names: Names, steps: Sequence[Step]) -> list[Finding]:
    """Warnings for tensors that are taken from a torch parametrization of which other tensors go nowhere: they may be no weight alone."""
    taken = {source_key: step.target for step in steps for source_key in step.sources}
    left: dict[tuple[int, str], list[str]] = {}
    for number, source in enumerate(sources):
        for key in source:
            found = _PARAMETRIZED.match(key)
            if found is not None and (number, key) not in taken and (number, key) not in names.dropped:
                left.setdefault((number, found[0]), []).append(key)
    return [
        Finding("parted", f"comes from {key} without {several(left[place])}, which belong to one parametrization", target, "warning")
        for (number, key), target in taken.items()
        if left and (found := _PARAMETRIZED.match(key)) is not None and (place := (number, found[0])) in left
    ]


def _lost_factors(sources: Sequence[Checkpoint], names: Names, steps: Sequence[Step]) -> list[Finding]:
    """A warning for each source with low-rank factors that no step uses and no rule drops."""
    taken = {source_key for step in steps for source_key in step.sources} | names.dropped.keys()
    warnings = []
    for number, source in enumerate(sources):
        words = lost_factors(key for key in source if (number, key) not in taken)
        warnings += [Finding("lost-factors", f"{source.path}: {words}", None, "warning")] if words else []
    return warnings


def _whole_numbers(sources: Sequence[Checkpoint], steps: Sequence[Step]) -> list[Finding]:
    """A warning where matrices of whole numbers become floating weights: they may be codes, whose scales are elsewhere."""
    keys = [
        step.target
        for step in steps
        if step.cast is not None and BY_CODE[step.cast].kind == "float" and not step.changes
        for number, key in step.sources
        if BY_CODE[sources[number][key].dtype].kind in ("int", "bool") and is_matrix(sources[number][key])
    ]
    if not keys:
        return []
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    words = f"holds whole numbers in the source, and floating ones in the target{more}: if they are codes, their scales are not there"
    return [Finding("codes", words, keys[0], "warning")]


def _filled(step: Step) -> str:
    """How much of a tensor that was filled up comes from the source, in words."""
    by_adapter = next((words for op in step.adapters if (words := adapter_of(op).fill_note(op)) is not None), None)
    if by_adapter is not None:
        return by_adapter
    total = prod(step.shape)
    return f"{total - step.filled} of {total} elements come from the source, the rest is filled"


def lost_parts(target: Checkpoint | None, names: Names, steps: Sequence[Step]) -> list[tuple[str, str]]:
    """Source keys that a step reads and that rules also give a name that neither the target nor its loading code has, each with a
    warning."""
    if target is None:
        return []
    used = {source_key for step in steps for source_key in step.sources} - scales_read(steps)
    read = {(number, name) for number, taken in names.outside.taken.items() for name in taken.read}
    return [
        (source_key[1], f"{name} is not in the target, and what {source_key[1]} has for it goes nowhere")
        for source_key, targets in names.names_of.items()
        if source_key in used
        for name in targets
        if name not in target and (source_key[0], name) not in read
    ]
