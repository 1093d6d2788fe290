"""Finds the wrapper prefix that stands between a source's names and a target's.

Rule: the change of names that makes most keys equal in name and shape; a tie between two different mappings means none, and one under
which two keys would collide is never taken. Names and shapes only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckptsurgeon.tensors import TensorMeta

# Segments that wrappers (DataParallel, torch.compile, FSDP, activation checkpointing) put into a key, at its head or within.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_MOST = 6


@dataclass(frozen=True)
class Prefix:
    """How a source's names become the target's: wrapper segments are taken out anywhere (`unwrapped`), `stripped` is taken off the head
    of the keys that have it, and `added` is put before every key. Prefixes end with a dot, or are empty."""

    stripped: str = ""
    added: str = ""
    unwrapped: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.stripped or self.added or self.unwrapped)

    def bare(self, key: str) -> str:
        """`key` without wrappers and without the stripped prefix: what patterns see."""
        name = unwrap(key, self.unwrapped)
        return name.removeprefix(self.stripped) or name

    def __str__(self) -> str:
        words = []
        if self.unwrapped:
            words.append("wrappers " + ", ".join(f"{name}." for name in self.unwrapped) + " taken out")
        if self.stripped:
            words.append(f"prefix {self.stripped} stripped")
        if self.added:
            words.append(f"prefix {self.added} added")
        return "; ".join(words)


def unwrap(key: str, wrappers: tuple[str, ...]) -> str:
    """`key` without the segments in `wrappers`.

    >>> unwrap("module.layer1._orig_mod.conv.weight", ("module", "_orig_mod"))
    'layer1.conv.weight'
    """
    if not wrappers:
        return key
    return ".".join(segment for segment in key.split(".") if segment not in wrappers) or key


def rename_all(source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta], prefix: Prefix) -> dict[str, str]:
    """Each source key's name among the target's names, by `prefix`. Where wrappers are taken out, the target's own are put back."""
    back: dict[str, str] = {}
    if prefix.unwrapped:
        back = _unique({key: unwrap(key, tuple(WRAPPERS)) for key in target})
    names = {}
    for key in source:
        name = prefix.added + prefix.bare(key)
        names[key] = name if name in target else back.get(unwrap(name, tuple(WRAPPERS)), name) if back else name
    return names


def _unique(names: Mapping[str, str]) -> dict[str, str]:
    counts = Counter(names.values())
    return {name: key for key, name in names.items() if counts[name] == 1}


def find_prefix(source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta]) -> Prefix:
    """The prefix between the names of two checkpoints, or an empty one.

    >>> meta = lambda name: TensorMeta(name, "F32", (2,), (1,))
    >>> str(find_prefix({"module.w": meta("module.w")}, {"w": meta("w")}))
    'prefix module. stripped'
    """
    best_score, best = _score(source, target, Prefix())
    if best_score in (len(source), len(target)):
        return Prefix()
    winner, tied = Prefix(), False
    for candidate in _candidates(source, target):
        score, mapping = _score(source, target, candidate)
        if score > best_score:
            best_score, best, winner, tied = score, mapping, candidate, False
        elif score == best_score and winner and mapping != best:
            tied = True
    return Prefix() if tied else winner


def _score(source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta], prefix: Prefix) -> tuple[int, dict[str, str]]:
    """How many keys become equal in name and shape, and which; -1 when two keys collide."""
    names = rename_all(source, target, prefix)
    if len(set(names.values())) != len(names):
        return -1, {}
    mapping = {key: name for key, name in names.items() if name in target and target[name].shape == source[key].shape}
    return len(mapping), mapping


def _candidates(source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta]) -> Iterator[Prefix]:
    """Plausible prefixes, the simplest first."""
    yield from _plain(source, target, ())
    segments = {segment for key in source for segment in key.split(".")}
    held = tuple(sorted(WRAPPERS & segments))
    if held or any(WRAPPERS & set(key.split(".")) for key in target):
        wrappers = held or tuple(sorted(WRAPPERS))
        yield Prefix(unwrapped=wrappers)
        bare = {unwrap(key, wrappers): tensor for key, tensor in source.items()}
        goal = {unwrap(key, tuple(WRAPPERS)): tensor for key, tensor in target.items()}
        yield from _plain(bare, goal, wrappers)


def _plain(source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta], wrappers: tuple[str, ...]) -> Iterator[Prefix]:
    strips = _heads(source, target)
    adds = _heads(target, source)
    for head in strips:
        yield Prefix(head, "", wrappers)
    for head in adds:
        yield Prefix("", head, wrappers)
    # Both at once: take off what most of the source's keys share, then see what the target would add.
    for head in _common_heads(source):
        rest = {key.removeprefix(head): tensor for key, tensor in source.items() if key.startswith(head)}
        for add in _heads(target, rest):
            yield Prefix(head, add, wrappers)


def _heads(source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta]) -> list[str]:
    """The heads of `source`'s keys whose rest is a key of `target` with the same shape, the most frequent first."""
    counts: Counter[str] = Counter()
    for key, tensor in source.items():
        dot = key.find(".")
        while dot >= 0:
            other = target.get(key[dot + 1 :])
            if other is not None and other.shape == tensor.shape:
                counts[key[: dot + 1]] += 1
            dot = key.find(".", dot + 1)
    return [head for head, _ in counts.most_common(_MOST)]


def _common_heads(source: Mapping[str, TensorMeta]) -> list[str]:
    counts: Counter[str] = Counter()
    for key in source:
        dot = key.find(".")
        while dot >= 0:
            counts[key[: dot + 1]] += 1
            dot = key.find(".", dot + 1)
    return [head for head, count in counts.most_common(_MOST) if 2 * count >= len(source)]
