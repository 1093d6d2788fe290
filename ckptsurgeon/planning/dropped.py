"""Says why each source key that no step reads is left out, and which keys no rule names, which `strict` refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptsurgeon.planning.apply_rules import Names
from ckptsurgeon.planning.keys import SourceKey
from ckptsurgeon.planning.legacy_names import is_counter
from ckptsurgeon.planning.plan_findings import lost_parts
from ckptsurgeon.planning.plan_types import Dropped, Entry, Step
from ckptsurgeon.planning.quantised_weights.find import Codes
from ckptsurgeon.planning.resolve import Origin, is_ruled, kept_out
from ckptsurgeon.tensors import Checkpoint

OF_CODES = "belongs to the codes "  # the reason begins with it where a key's tensor is used to dequantize codes
TIED = "tied to "  # the reason begins with it where a key's tensor is taken under another name


def fates(
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    names: Names,
    origins: Mapping[str, Origin],
    steps: Sequence[Step],
    entries: Sequence[Entry],
    codes: Mapping[SourceKey, Codes] = {},
) -> tuple[Dropped, ...]:
    """Every source key that no step reads, with the reason. `codes` are the quantised weights that are dequantized: their scales are used
    for that and not written."""
    codes_of = {(number, name): key for (number, key), weight in codes.items() for name in (*weight.scales, *weight.extras)}
    used = {source_key for step in steps for source_key in step.sources} | {entry.source for entry in entries}
    kept = {} if target is None else kept_out(target, names)
    tied = _tied_to_taken(sources, steps)
    loaded = {step.target: step.reason for step in steps if step.action == "load"}
    first = {key: group[0] for group in (target.ties if target is not None else ()) for key in group}

    def why(source_key: SourceKey) -> str:
        if source_key in names.dropped:
            return str(names.dropped[source_key])
        if source_key in codes_of:
            return f"{OF_CODES}{codes_of[source_key]}, which are dequantized"
        landed = names.names_of.get(source_key, ())
        if source_key in names.applied.refused:
            return f"not converted: {names.applied.refused[source_key]}"
        name = next((name for name in landed if target is not None and name in target), landed[0] if landed else "")
        if name in kept:
            return str(kept[name])
        lost = name in names.claims and source_key not in names.claims[name].source_keys and name in origins
        if lost or names.entries.get(name, source_key) != source_key:
            return f"not averaged: {name} is the first source's" if len(sources) > 1 else f"{name} is another key's"
        if target is not None and name in target:
            if (
                name in first
                and source_key in tied
                and first[name] in map(first.get, names.names_of.get((source_key[0], tied[source_key]), ()))
            ):
                return f"{TIED}{tied[source_key]}, which is taken"
            if source_key[1] in sources[source_key[0]].entries:
                return "no tensor, which the target has there"
            if name in loaded:
                return f"{name} is {loaded[name]}"
            return f"shape {sources[source_key[0]][source_key[1]].shape} does not fit {target[name].shape}"
        return "not in the target" if f".{source_key[1]}".endswith(f".{name}") else f"not in the target, as {name}"

    return tuple(
        Dropped(number, key, why((number, key)))
        for number, source in enumerate(sources)
        for key in (*source, *source.entries)
        if (number, key) not in used
    )


def _tied_to_taken(sources: Sequence[Checkpoint], steps: Sequence[Step]) -> dict[SourceKey, str]:
    """The source keys that share a tensor with a key that a step reads, each with that key."""
    used = {source_key for step in steps for source_key in step.sources}
    groups = [(number, group) for number, source in enumerate(sources) for group in source.ties]
    taken = [next((key for key in reversed(group) if (number, key) in used), None) for number, group in groups]
    return {
        (number, key): taken_key
        for (number, group), taken_key in zip(groups, taken, strict=True)
        if taken_key is not None
        for key in group
        if (number, key) not in used
    }


def keys_without_a_rule(
    names: Names,
    target: Checkpoint | None,
    steps: Sequence[Step],
    entries: Sequence[Entry],
    dropped: Sequence[Dropped],
) -> tuple[str, ...]:
    """Every missing, extra or mismatched key that no rule names, with the reason."""
    named = is_ruled(names, target)

    def repaired(step: Step) -> bool:
        return is_counter(step.target) and step.schemes == ("zeros",)  # no rule names it, so `--auto safe` set it

    def landed(row: Dropped) -> tuple[str, ...]:
        return names.names_of.get((row.file, row.source), ("",))

    return (
        *(f"{key}: {words}" for key, words in lost_parts(target, names, steps)),
        *(f"{step.target}: {step.reason}" for step in steps if not step.sources and not named(step.target) and not repaired(step)),
        *(f"{entry.target}: not in the source" for entry in entries if entry.source is None and not named(entry.target)),
        *(
            f"{row.source}: {row.reason}"
            for row in dropped
            if (row.file, row.source) not in names.dropped
            and not any(map(named, landed(row)))
            and not row.reason.startswith((TIED, OF_CODES))
        ),
    )
