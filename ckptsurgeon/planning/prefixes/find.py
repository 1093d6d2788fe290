"""Finds the prefix that has to be stripped from or added to a source's names to make them the target's.

- Wrapper segments are stripped where that makes more keys equal in name and shape.
- Any other prefix is stripped or added only where it makes at least half of the smaller side's keys equal.
- A change that maps keys differently and makes at least 0.9 times as many equal is a rival (no change at all can be one, too). Where there
  are rivals, they are reported and none of them is applied.
- A prefix that gives two keys one name is never applied, nor is an optimizer's.
- Exchanging one prefix for another is only offered, never applied.

Names and shapes only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, repeat
from operator import contains

from ckptsurgeon.planning.prefixes.heads import Tensors, any_head, equal_keys, one_head, two_heads
from ckptsurgeon.planning.training_places import of_optimizer
from ckptsurgeon.tensors import TensorMeta
from ckptsurgeon.wrappers import WRAPPERS, unwrap

NEAR = 0.9  # a change that makes this share of the best one's keys equal is its rival
_HALF = 0.5  # the share of the smaller side's keys that a prefix must make equal


@dataclass(frozen=True)
class Prefix:
    """How a source's names become the target's. Prefixes end with a dot, or are empty.

    Attributes:
        stripped: the prefix that is removed from the keys that have it.
        added: the prefix that is put before every key.
        unwrapped: the wrapper segments that are removed at every position.
    """

    stripped: str = ""
    added: str = ""
    unwrapped: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.stripped or self.added or self.unwrapped)

    @property
    def of_wrappers(self) -> bool:
        """Whether only wrapper segments are removed or added."""
        return {*self.stripped.split(".")[:-1], *self.added.split(".")[:-1]} <= WRAPPERS

    def bare(self, key: str) -> str:
        """`key` without wrappers and without the stripped prefix, as patterns see it."""
        name = unwrap(key, self.unwrapped)
        return name.removeprefix(self.stripped) or name

    def target_path(self, path: str) -> str | None:
        """The path of a module in the target (`_metadata` is by path); None for a module above the stripped prefix.

        >>> Prefix("module.", "net.").target_path("module.bn"), Prefix("module.").target_path("module"), Prefix("module.").target_path("")
        ('net.bn', '', None)
        """
        name = ".".join(segment for segment in path.split(".") if segment not in self.unwrapped)
        if self.stripped and f"{name}.".startswith(self.stripped):
            name = name[len(self.stripped) :]
        elif self.stripped.startswith(f"{name}." if name else "") and self.stripped:
            return None
        return (self.added + name).rstrip(".") if name else self.added.rstrip(".")

    def __str__(self) -> str:
        words = []
        if self.unwrapped:
            words.append("wrappers " + ", ".join(f"{name}." for name in self.unwrapped) + " taken out or put in")
        if self.stripped:
            words.append(f"prefix {self.stripped} stripped")
        if self.added:
            words.append(f"prefix {self.added} added")
        return "; ".join(words)


def rename_all(keys: Iterable[str], target: Iterable[str], prefix: Prefix) -> dict[str, str]:
    """Each source key with its name after `prefix` is applied. Where wrappers are removed, the target's own wrappers are put back.

    >>> rename_all(["_orig_mod.a.w"], ["a.module.w"], Prefix(unwrapped=("_orig_mod", "module")))
    {'_orig_mod.a.w': 'a.module.w'}
    """
    if not prefix:
        return {key: key for key in keys}
    names = {key: prefix.added + prefix.bare(key) for key in keys}
    if not prefix.unwrapped:
        return names
    exact = set(target)
    back = _unique({key: unwrap(key, prefix.unwrapped) for key in exact})
    return {key: name if name in exact else back.get(name, name) for key, name in names.items()}


def _unique(names: Mapping[str, str]) -> dict[str, str]:
    """The keys by name, without names that two keys have."""
    counts = Counter(names.values())
    return {name: key for key, name in names.items() if counts[name] == 1}


@dataclass(frozen=True)
class Change:
    """A change of names: which source key becomes which target key with the same shape, and whether two keys get one name."""

    prefix: Prefix
    mapping: Mapping[str, str]
    collides: bool = False

    def within(self, rival: Change, source: Tensors) -> bool:
        """Whether the rival gives every target key the same value as this change: from the same source key, or from another key with the
        same bytes (a module that the model has under two names)."""
        if self.mapping.items() <= rival.mapping.items():
            return True
        by_rival = {name: _bytes(source[key]) for key, name in rival.mapping.items()}
        return all(by_rival.get(name) == _bytes(source[key]) for key, name in self.mapping.items())


def _bytes(tensor: TensorMeta) -> object:
    """Where a tensor's bytes are in the file and how they are read; in a skeleton its name."""
    return tensor.name if tensor.place is None else (tensor.place, tensor.dtype, tensor.stride)


@dataclass(frozen=True)
class Choice:
    """The change that is applied, and its rivals.

    Attributes:
        applied: the change that is applied.
        rivals: the changes between which the names don't decide, the best first; none of them is applied then.
        among: the source's tensors that were compared: those that no rule names.
    """

    applied: Change
    rivals: tuple[Change, ...] = ()
    among: Tensors = field(default_factory=dict)

    @property
    def best(self) -> Change:
        """The change that makes most keys equal, applied or not."""
        return self.rivals[0] if self.rivals else self.applied


def find_change(source: Tensors, target: Tensors) -> Choice:
    """The change of names that is applied between two checkpoints, and its rivals."""
    most = min(len(source), len(target))
    base = Change(Prefix(), {key: key for key in equal_keys(source, target)})
    if changes_nothing(source, target, base.mapping):
        return Choice(base)
    rows = sorted(_candidates(source, target), key=lambda row: -row[0])
    prefixes = [row for row in rows if not row[1].of_wrappers]
    for score, prefix in rows:
        if not prefix.of_wrappers or score <= len(base.mapping):
            continue
        change = _change(source, target, prefix)
        if not change.collides:
            base = change
            break
        prefixes.append((score, prefix))
    near: list[Change] = []
    best = max(len(base.mapping) + 1, _HALF * most)  # how many keys must be equal at least
    for score, prefix in sorted(prefixes, key=lambda row: -row[0]):
        if score < (NEAR * best if near else best):
            break
        change = _change(source, target, prefix)
        if len(change.mapping) >= (NEAR * best if near else best) and not any(change.within(rival, source) for rival in near):
            near = [*(rival for rival in near if not rival.within(change, source)), change]
            best = max(best, len(change.mapping))
    near = sorted((rival for rival in near if len(rival.mapping) >= NEAR * best), key=lambda rival: -len(rival.mapping))
    if not near:
        return Choice(base)
    first = near[0]
    close = len(base.mapping) >= NEAR * len(first.mapping)
    if len(near) == 1 and not first.collides and (not close or base.within(first, source)):
        return Choice(base if close else first)
    stays = (base,) if base.mapping and (close or first.collides) and not base.within(first, source) else ()
    return Choice(base, (*near, *stays))


def changes_nothing(source: Tensors, target: Tensors, equal: Collection[str]) -> bool:
    """Whether no prefix makes more keys equal than the `equal` ones, because no other key has a wrapper or becomes equal without a head."""
    if len(equal) == min(len(source), len(target)):
        return True
    left, lacking = ({key: tensor for key, tensor in side.items() if key not in equal} for side in (source, target))
    if any(any(map(contains, chain(source, lacking), repeat(f"{wrapper}."))) for wrapper in WRAPPERS):
        return False
    return not (any_head(left, target) or any_head(lacking, source))


def find_exchange(source: Tensors, target: Tensors) -> tuple[Change, ...]:
    """Changes that replace a prefix of the source by another one of the target, the best and its rivals. They are offered, never applied.

    The source's names are compared without wrapper segments, as patterns see them.
    """
    bare = {unwrap(key, WRAPPERS): tensor for key, tensor in source.items()}
    rows = [(count, Prefix(strip, add)) for count, strip, add in two_heads(bare, target) if strip != add]
    best = max((count for count, _ in rows), default=0)
    if best < max(_HALF * min(len(bare), len(target)), 1):
        return ()
    exchanges: list[Change] = []
    for _, prefix in (row for row in rows if row[0] >= NEAR * best):
        change = _change(bare, target, prefix)
        if not change.collides and not any(change.within(better, bare) for better in exchanges):
            exchanges.append(change)
    return tuple(sorted(exchanges, key=lambda change: -len(change.mapping)))


def _change(source: Tensors, target: Tensors, prefix: Prefix) -> Change:
    """The change by a prefix. Where two keys get one name, the one that the prefix changes counts."""
    names = rename_all(source, target, prefix)
    mapped: dict[str, str] = {}
    for key, name in names.items():
        if name in target and target[name].shape == source[key].shape and (name not in mapped or mapped[name] == name):
            mapped[name] = key
    return Change(prefix, {key: name for name, key in mapped.items()}, len(set(names.values())) != len(names))


def _candidates(source: Tensors, target: Tensors) -> Iterator[tuple[int, Prefix]]:
    """Possible prefixes, each with the number of keys that it makes equal; the simplest first."""
    for count, strip, add in one_head(source, target):
        if not of_optimizer((strip or add).rstrip(".")):
            yield count, Prefix(strip, add)
    wrappers = tuple(sorted(wrapper for wrapper in WRAPPERS if any(f"{wrapper}." in key for keys in (source, target) for key in keys)))
    bare = {unwrap(key, wrappers): tensor for key, tensor in source.items()}
    if wrappers and len(bare) == len(source):
        bare_target = {name: target[key] for name, key in _unique({key: unwrap(key, wrappers) for key in target}).items()}
        yield len(equal_keys(bare, bare_target)), Prefix(unwrapped=wrappers)
        for count, strip, add in one_head(bare, bare_target):
            if not of_optimizer((strip or add).rstrip(".")):
                yield count, Prefix(strip, add, wrappers)
