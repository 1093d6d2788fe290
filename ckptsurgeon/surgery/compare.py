"""Holds a source's names, shapes and dtypes against a target's. Pure: values in, a `Diff` out; no file, no torch, no printing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ckptsurgeon.surgery.naming import Names, SourceKey, name_sources
from ckptsurgeon.surgery.prefixes import Prefix
from ckptsurgeon.surgery.rules import Rule
from ckptsurgeon.tensors import Checkpoint, Coverage, Refused


@dataclass(frozen=True)
class Mismatch:
    """A key in both, with two shapes."""

    key: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class DtypeChange:
    """A matched key whose dtype (safetensors' code) differs."""

    key: str
    source_dtype: str
    target_dtype: str


@dataclass(frozen=True)
class Hint:
    """A missing key's likely source: the one extra key of the same shape and last segment, by the name that patterns see."""

    missing: str
    extra: str


@dataclass(frozen=True)
class Diff:
    """What of a target a source covers.

    Every key of the target is in exactly one of `matched`, `missing` and `mismatched`, by the target's name. Every key of the source
    matches something, or is in `extra`, `mismatched`, `dropped` or `refused`, by its own name. Values that are no tensors
    (`_extra_state`) count as keys, as they do for torch; `coverage` is of tensors.
    """

    source: str
    target: str
    root: str
    prefix: Prefix
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    dtype_changed: tuple[DtypeChange, ...]
    coverage: Coverage
    dropped: tuple[str, ...] = ()
    hints: tuple[Hint, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether the source fits the target exactly: no missing, extra or mismatched key, and no other dtype."""
        return not (self.missing or self.extra or self.mismatched or self.dtype_changed or self.refused)


def compare(source: Checkpoint, target: Checkpoint, rules: Iterable[Rule] = ()) -> Diff:
    """Compare a source with a target, after wrapper prefixes and rules.

    A key of the target that is tied to a matched one is matched too. Raises RuleError for rules that match nothing or collide.
    """
    names = name_sources([source], target, rules)
    origins = find_origins([source], target, names)
    refused = find_refused(source, 0, names)
    given = {name: key for (_, key), name in names.entries.items() if key not in refused}
    matched = [key for key, origin in origins.items() if origin.fits]
    missing = [key for key in target if key not in origins]
    mismatched = {key: origin.place[1] for key, origin in origins.items() if not origin.fits}
    used = {origin.place[1] for origin in origins.values()}
    used |= {key for name, key in given.items() if name in target.entries}
    extra = [key for (_, key) in (*names.landed, *names.entries) if key not in used and key not in refused]
    return Diff(
        source=source.path,
        target=target.path,
        root=source.root,
        prefix=names.prefixes[0],
        matched=(*matched, *(key for key in target.entries if key in given)),
        missing=(*missing, *(key for key in target.entries if key not in given)),
        extra=tuple(extra),
        mismatched=tuple(Mismatch(key, source[origin].shape, target[key].shape, origin) for key, origin in mismatched.items()),
        dtype_changed=tuple(
            DtypeChange(key, source[origins[key].place[1]].dtype, target[key].dtype)
            for key in matched
            if source[origins[key].place[1]].dtype != target[key].dtype
        ),
        coverage=Coverage.of({key: target[key] for key in matched}, target),
        dropped=tuple(key for (_, key) in names.dropped),
        hints=_hints(missing, [key for key in extra if key in source], source, target, names.prefixes[0]),
        refused=refused,
    )


def find_refused(source: Checkpoint, number: int, names: Names) -> dict[str, str]:
    """The values of a source that can't be carried and that no rule drops, each with its reason."""
    return {key: entry.reason for key, entry in source.entries.items() if isinstance(entry, Refused) and (number, key) not in names.dropped}


@dataclass(frozen=True)
class Origin:
    """Which source key stands for a target key, whether its shape fits, and the tied target key by whose name it was found."""

    place: SourceKey
    fits: bool
    tied_to: str | None = None


def find_origins(sources: Sequence[Checkpoint], target: Checkpoint, names: Names) -> dict[str, Origin]:
    """For each key of the target that a source has: where.

    A key that none has, or has with another shape, follows a key of the target that it is tied to and that fits: they are one tensor.
    """
    landed = {name: place for place, name in names.landed.items() if name in target}
    found = {}
    for key, wanted in target.items():
        if key in landed:
            number, origin = landed[key]
            found[key] = Origin(landed[key], sources[number][origin].shape == wanted.shape)
    for group in target.ties:
        fitting = [key for key in group if key in found and found[key].fits]
        if fitting:
            rest = [key for key in group if key not in fitting]
            found.update(dict.fromkeys(rest, Origin(found[fitting[0]].place, True, fitting[0])))
    return {key: found[key] for key in target if key in found}


def _hints(missing: Sequence[str], extra: Sequence[str], source: Checkpoint, target: Checkpoint, prefix: Prefix) -> tuple[Hint, ...]:
    """Missing keys with exactly one likely source. Evidence: equal shape and equal last segment, and no other key on either side
    that has these."""
    pool: dict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
    for key in extra:
        pool[(source[key].shape, key.rpartition(".")[2])].append(key)
    wanted: dict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
    for key in missing:
        wanted[(target[key].shape, key.rpartition(".")[2])].append(key)
    return tuple(
        Hint(keys[0], prefix.bare(pool[form][0])) for form, keys in wanted.items() if len(keys) == 1 and len(pool.get(form, ())) == 1
    )
