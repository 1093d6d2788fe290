"""Holds a source's names, shapes and dtypes against a target's. Pure: values in, a `Diff` out; no file, no torch, no printing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ckptsurgeon.surgery.naming import Names, name_sources
from ckptsurgeon.surgery.prefixes import Prefix
from ckptsurgeon.surgery.rules import Rule
from ckptsurgeon.tensors import Checkpoint, Coverage, Refused, TensorMeta


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
    """A missing key's likely source: one extra key of the same shape whose last segment, or whose place, is the same."""

    missing: str
    extra: str


@dataclass(frozen=True)
class Diff:
    """What of a target a source covers. `matched`, `missing` and `mismatched` use the target's names, `extra` the source's own."""

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
    refused: Mapping[str, str] | None = None

    @property
    def same(self) -> bool:
        """Whether the source fits the target exactly: no missing, extra or mismatched key, and no other dtype."""
        return not (self.missing or self.extra or self.mismatched or self.dtype_changed or self.refused)


def compare(source: Checkpoint, target: Checkpoint, rules: Iterable[Rule] = ()) -> Diff:
    """Compare a source with a target, after wrapper prefixes and rules.

    A key of the target that is tied to a matched one is matched too. Raises RuleError for rules that match nothing or collide.
    """
    names = name_sources([source], target, rules)
    landed = {name: key for (_, key), name in names.landed.items()}
    follow = tied_to(target, landed)
    matched: dict[str, TensorMeta] = {}
    missing: list[str] = []
    mismatched: list[Mismatch] = []
    changed: list[DtypeChange] = []
    for key, wanted in target.items():
        origin = landed.get(key) or landed.get(follow.get(key, ""))
        if origin is None:
            missing.append(key)
            continue
        given = source[origin]
        if given.shape != wanted.shape:
            mismatched.append(Mismatch(key, given.shape, wanted.shape, origin))
            continue
        matched[key] = wanted
        if given.dtype != wanted.dtype:
            changed.append(DtypeChange(key, given.dtype, wanted.dtype))
    dropped = tuple(key for (_, key) in names.dropped)
    extra = tuple(key for (_, key), name in names.landed.items() if name not in target)
    return Diff(
        source=source.path,
        target=target.path,
        root=source.root,
        prefix=names.prefixes[0],
        matched=tuple(matched),
        missing=tuple(missing),
        extra=extra,
        mismatched=tuple(mismatched),
        dtype_changed=tuple(changed),
        coverage=Coverage.of(matched, target),
        dropped=dropped,
        hints=_hints(missing, extra, source, target),
        refused=_refused(source, names),
    )


def _refused(source: Checkpoint, names: Names) -> Mapping[str, str]:
    return {key: entry.reason for key, entry in source.entries.items() if isinstance(entry, Refused) and (0, key) not in names.dropped}


def tied_to(target: Checkpoint, landed: Mapping[str, object]) -> dict[str, str]:
    """For each target key without a source that is tied to one with a source: that one."""
    follow = {}
    for group in target.ties:
        given = next((key for key in group if key in landed), None)
        if given is not None:
            follow.update({key: given for key in group if key not in landed})
    return follow


def _hints(missing: list[str], extra: tuple[str, ...], source: Checkpoint, target: Checkpoint) -> tuple[Hint, ...]:
    """Missing keys with exactly one likely source. Evidence: equal shape, equal last segment, and most segments in common."""
    pool: dict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
    for key in extra:
        pool[(source[key].shape, key.rpartition(".")[2])].append(key)
    wanted: dict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
    for key in missing:
        wanted[(target[key].shape, key.rpartition(".")[2])].append(key)
    return tuple(Hint(keys[0], pool[form][0]) for form, keys in wanted.items() if len(keys) == 1 and len(pool.get(form, ())) == 1)
