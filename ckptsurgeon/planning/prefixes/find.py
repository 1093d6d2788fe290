"""Finds the prefix that stands between a source's names and a target's.

Rule: the segments of wrappers are stripped where that makes more keys equal in name and shape. Any other prefix is stripped or added only
where it makes at least half of the smaller side's keys equal and no other change (none included) that maps them otherwise makes 0.9 as many
equal: such rivals are told, and none of them is applied. One under which two keys would collide is never applied, nor is one of an
optimizer's, and one prefix is never exchanged for another, only offered. Names and shapes only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ckptsurgeon.planning.prefixes.heads import Tensors, equal_keys, one_head, two_heads
from ckptsurgeon.planning.training_places import of_optimizer
from ckptsurgeon.tensors import TensorMeta
from ckptsurgeon.wrappers import WRAPPERS, unwrap

NEAR = 0.9  # of what the best change explains: whatever explains as much is its rival
_HALF = 0.5  # of the smaller side's keys, that a prefix must explain


@dataclass(frozen=True)
class Prefix:
    """How a source's names become the target's: wrapper segments are taken out anywhere (`unwrapped`), `stripped` is taken off the head
    of the keys that have it, and `added` is put before every key. Prefixes end with a dot, or are empty."""

    stripped: str = ""
    added: str = ""
    unwrapped: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.stripped or self.added or self.unwrapped)

    @property
    def of_wrappers(self) -> bool:
        """Whether nothing but wrappers' segments is taken off or put in."""
        return {*self.stripped.split(".")[:-1], *self.added.split(".")[:-1]} <= WRAPPERS

    def bare(self, key: str) -> str:
        """`key` without wrappers and without the stripped prefix: what patterns see."""
        name = unwrap(key, self.unwrapped)
        return name.removeprefix(self.stripped) or name

    def place(self, path: str) -> str | None:
        """Where a module's path goes (`_metadata` is by path); None for one that lies above all that is taken.

        >>> Prefix("module.", "net.").place("module.bn"), Prefix("module.").place("module"), Prefix("module.").place("")
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
    """Each source key's name among the target's names, by `prefix`. Where wrappers are taken out, the target's own are put back.

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
    """The keys by their names, without names that two keys have."""
    counts = Counter(names.values())
    return {name: key for key, name in names.items() if counts[name] == 1}


@dataclass(frozen=True)
class Change:
    """A change of names: which source keys it makes equal to which target keys in name and shape, and whether two keys collide on one."""

    prefix: Prefix
    mapping: Mapping[str, str]
    collides: bool = False

    def within(self, other: Change, source: Tensors) -> bool:
        """Whether the other gives all that this one gives: by the same keys, or by others that are the very same bytes (a module that
        stands in the model at two places)."""
        if self.mapping.items() <= other.mapping.items():
            return True
        given = {name: _bytes(source[key]) for key, name in other.mapping.items()}
        return all(given.get(name) == _bytes(source[key]) for key, name in self.mapping.items())


def _bytes(tensor: TensorMeta) -> object:
    """Where a tensor's bytes lie and how they are read; in a skeleton its name."""
    return tensor.name if tensor.place is None else (tensor.place, tensor.dtype, tensor.stride)


@dataclass(frozen=True)
class Choice:
    """The change that is applied, and, where several explain about as much and map keys otherwise, those, the best first.

    `among` are the source's tensors that were looked at: those that no rule names.
    """

    applied: Change
    rivals: tuple[Change, ...] = ()
    among: Tensors = field(default_factory=dict)

    @property
    def best(self) -> Change:
        """The change that explains most, applied or not."""
        return self.rivals[0] if self.rivals else self.applied


def find_change(source: Tensors, target: Tensors) -> Choice:
    """The change of names between two checkpoints that is applied unasked, and its rivals."""
    most = min(len(source), len(target))
    base = Change(Prefix(), {key: key for key in equal_keys(source, target)})
    if len(base.mapping) == most:
        return Choice(base)
    rows = sorted(_candidates(source, target), key=lambda row: -row[0])
    others = [row for row in rows if not row[1].of_wrappers]
    for score, prefix in rows:
        if not prefix.of_wrappers or score <= len(base.mapping):
            continue
        change = _change(source, target, prefix)
        if not change.collides:
            base = change
            break
        others.append((score, prefix))
    near: list[Change] = []
    best = max(len(base.mapping) + 1, _HALF * most)  # what must be explained at least
    for score, prefix in sorted(others, key=lambda row: -row[0]):
        if score < (NEAR * best if near else best):
            break
        change = _change(source, target, prefix)
        if len(change.mapping) >= (NEAR * best if near else best) and not any(change.within(one, source) for one in near):
            near = [*(one for one in near if not one.within(change, source)), change]
            best = max(best, len(change.mapping))
    near = sorted((one for one in near if len(one.mapping) >= NEAR * best), key=lambda one: -len(one.mapping))
    if not near:
        return Choice(base)
    first = near[0]
    close = len(base.mapping) >= NEAR * len(first.mapping)
    if len(near) == 1 and not first.collides and (not close or base.within(first, source)):
        return Choice(base if close else first)
    stays = (base,) if base.mapping and (close or first.collides) and not base.within(first, source) else ()
    return Choice(base, (*near, *stays))


def find_exchange(source: Tensors, target: Tensors) -> tuple[Change, ...]:
    """Prefixes of which one could be exchanged for another of the target's, the best and its rivals: offered, and never applied unasked.

    The source's names are those without the segments of wrappers, as patterns see them.
    """
    given = {unwrap(key, WRAPPERS): tensor for key, tensor in source.items()}
    rows = [(count, Prefix(strip, add)) for count, strip, add in two_heads(given, target) if strip != add]
    best = max((count for count, _ in rows), default=0)
    if best < max(_HALF * min(len(given), len(target)), 1):
        return ()
    found: list[Change] = []
    for _, prefix in (row for row in rows if row[0] >= NEAR * best):
        change = _change(given, target, prefix)
        if not change.collides and not any(change.within(one, given) for one in found):
            found.append(change)
    return tuple(sorted(found, key=lambda one: -len(one.mapping)))


def _change(source: Tensors, target: Tensors, prefix: Prefix) -> Change:
    """What a prefix makes equal. Where two keys collide on a name, the one that the prefix changes counts."""
    names = rename_all(source, target, prefix)
    mapped: dict[str, str] = {}
    for key, name in names.items():
        if name in target and target[name].shape == source[key].shape and (name not in mapped or mapped[name] == name):
            mapped[name] = key
    return Change(prefix, {key: name for name, key in mapped.items()}, len(set(names.values())) != len(names))


def _candidates(source: Tensors, target: Tensors) -> Iterator[tuple[int, Prefix]]:
    """Plausible prefixes, each with the number of keys that it makes equal; the simplest first."""
    for count, strip, add in one_head(source, target):
        if not of_optimizer((strip or add).rstrip(".")):
            yield count, Prefix(strip, add)
    held = tuple(sorted(wrapper for wrapper in WRAPPERS if any(f"{wrapper}." in key for keys in (source, target) for key in keys)))
    bare = {unwrap(key, held): tensor for key, tensor in source.items()}
    if held and len(bare) == len(source):
        goal = {name: target[key] for name, key in _unique({key: unwrap(key, held) for key in target}).items()}
        yield len(equal_keys(bare, goal)), Prefix(unwrapped=held)
        for count, strip, add in one_head(bare, goal):
            if not of_optimizer((strip or add).rstrip(".")):
                yield count, Prefix(strip, add, held)
