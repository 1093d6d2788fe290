"""Finds the wrapper prefix that stands between a source's names and a target's.

Rule: the change of names that makes most keys equal in name and shape; a tie between two different mappings means none, and one under
which two keys would collide is never taken. Names and shapes only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from ckptsurgeon.tensors import TensorMeta

# Segments that wrappers (DataParallel, torch.compile, FSDP, activation checkpointing) put into a key, at its head or within.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_MOST = 6  # heads to weigh; the most frequent first
_DEPTH = 6  # segments that a head has at most


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
        """Whether nothing but wrappers' segments is taken off."""
        return not self.added and set(self.stripped.split(".")[:-1]) <= WRAPPERS

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


def unwrap(key: str, wrappers: Iterable[str]) -> str:
    """`key` without the segments in `wrappers`.

    >>> unwrap("module.layer1._orig_mod.conv.weight", ("module", "_orig_mod"))
    'layer1.conv.weight'
    """
    if not wrappers:
        return key
    return ".".join(segment for segment in key.split(".") if segment not in wrappers) or key


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


def find_prefix(source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta]) -> Prefix:
    """The prefix between the names of two checkpoints, or an empty one.

    >>> meta = lambda name: TensorMeta(name, "F32", (2,), (1,))
    >>> str(find_prefix({"module.w": meta("module.w")}, {"w": meta("w")}))
    'prefix module. stripped'
    """
    most = min(len(source), len(target))
    best = len(_equal(source, target))
    winners: list[tuple[Prefix, dict[str, str]]] = []
    for family in _families(source, target):
        if best == most:
            break  # a simpler change makes all equal, or none is needed
        for score, rows in groupby(sorted(family, key=lambda row: -row[0]), key=lambda row: row[0]):
            if score < best or (score == best and not winners):
                break
            allowed = [(prefix, mapping) for _, prefix in rows if (mapping := _mapping(source, target, prefix)) is not None]
            if allowed:
                winners = [*winners, *allowed] if score == best else allowed
                best = score
                break
    return winners[0][0] if winners and all(mapping == winners[0][1] for _, mapping in winners) else Prefix()


def _equal(source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta]) -> list[str]:
    """The keys that are equal in name and shape."""
    return [key for key, tensor in source.items() if key in target and target[key].shape == tensor.shape]


def _mapping(source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta], prefix: Prefix) -> dict[str, str] | None:
    """Which keys become equal in name and shape to which; None when two keys collide."""
    names = rename_all(source, target, prefix)
    if len(set(names.values())) != len(names):
        return None
    return {key: name for key, name in names.items() if name in target and target[name].shape == source[key].shape}


def _families(source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta]) -> Iterator[Iterable[tuple[int, Prefix]]]:
    """Plausible prefixes, each with the number of keys that it makes equal; the simplest family first."""
    yield _one_head(source, target, ())
    held = tuple(sorted(wrapper for wrapper in WRAPPERS if any(f"{wrapper}." in key for keys in (source, target) for key in keys)))
    bare = {unwrap(key, held): tensor for key, tensor in source.items()}
    if held and len(bare) == len(source):
        goal = {name: target[key] for name, key in _unique({key: unwrap(key, held) for key in target}).items()}
        yield [(len(_equal(bare, goal)), Prefix(unwrapped=held))]
        yield _one_head(bare, goal, held)
        yield _two_heads(bare, goal, held)
    else:
        yield _two_heads(source, target, ())


def _one_head(
    source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta], wrappers: tuple[str, ...]
) -> Iterator[tuple[int, Prefix]]:
    """A head that is stripped, or one that is added."""
    equal = _equal(source, target)
    lost = Counter(head for key in equal for head in _heads_of(key))
    for head, count in _counts(source, target).most_common(_MOST):
        yield count + len(equal) - lost[head], Prefix(head, "", wrappers)
    for head, count in _counts(target, source).most_common(_MOST):
        yield count, Prefix("", head, wrappers)


def _two_heads(
    source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta], wrappers: tuple[str, ...]
) -> Iterator[tuple[int, Prefix]]:
    """A head that all of the source's keys share is stripped, and what the target has is added.

    What remains must be a module's name and more, or one module would stand for any other, and one list of layers for any other.
    """
    for head in _heads_of(_common(source)):
        rest = {name: tensor for key, tensor in source.items() if "." in (name := key[len(head) :]) and not name[0].isdigit()}
        for add, count in _counts(target, rest).most_common(_MOST):
            yield count, Prefix(head, add, wrappers)


def _heads_of(key: str) -> Iterator[str]:
    """The heads of a key, each with its dot."""
    dot = key.find(".")
    for _ in range(_DEPTH):
        if dot < 0:
            return
        yield key[: dot + 1]
        dot = key.find(".", dot + 1)


def _counts(long: Mapping[str, TensorMeta], short: Mapping[str, TensorMeta]) -> Counter[str]:
    """How many of `long`'s keys are, without a head, a key of `short` with the same shape; by head."""
    shapes = {key: tensor.shape for key, tensor in short.items()}
    firsts = {key.partition(".")[0] for key in short}  # rules most heads out before a long key is looked up
    heads = []
    for key, tensor in long.items():
        dot = 0
        for segment in key.split(".", _DEPTH + 1)[:_DEPTH]:
            if dot and segment in firsts and shapes.get(key[dot:]) == tensor.shape:
                heads.append(key[:dot])
            dot += len(segment) + 1
    return Counter(heads)


def _common(keys: Iterable[str]) -> str:
    """The longest text that all keys begin with."""
    first, last = min(keys, default=""), max(keys, default="")
    length = next((index for index, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), min(len(first), len(last)))
    return first[:length]
