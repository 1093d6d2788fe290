"""The conversions of the target's library (transformers), applied to the names for which no rule gives a name of the target.

They are applied without being asked for, like the stripping of a wrapper's prefix, because the library's own loading applies them. A name
without a conversion stays as it is, and so does every name of a source that already has the target's names and shapes. Names and shapes
only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptsurgeon.adapters.chain import RuleOp
from ckptsurgeon.loading import Converted, Naming
from ckptsurgeon.planning.keys import Item, SourceKey
from ckptsurgeon.planning.prefixes.find import Change, Choice, Prefix, find_change, rename_all
from ckptsurgeon.report import Finding, Level
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.tensors import Checkpoint, TensorMeta
from ckptsurgeon.wrappers import WRAPPERS

Tensors = Mapping[str, TensorMeta]
_HEADS, _DEPTH = 3, 3  # how many prefixes are tried, and how many segments they have at most
_ENOUGH = 0.9  # the share of keys that go into the target, from which on no other prefix is tried


@dataclass(frozen=True)
class Applied:
    """What the conversions of a library did.

    Attributes:
        library: its name and version; empty where nothing was converted.
        renamed, made, ignored: how many tensors were renamed, made of others, and left out.
        refused: the keys that the library converts in a way that no adapter here does, each with the reason.
    """

    library: str = ""
    renamed: int = 0
    made: int = 0
    ignored: int = 0
    refused: Mapping[SourceKey, str] = field(default_factory=dict)

    def and_then(self, later: Applied) -> Applied:
        """The sum of both."""
        return Applied(
            self.library or later.library,
            self.renamed + later.renamed,
            self.made + later.made,
            self.ignored + later.ignored,
            {**self.refused, **later.refused},
        )

    @property
    def words(self) -> str:
        """What was done, in words; empty where nothing was."""
        return conversions_in_words(self.library, self.renamed, self.made, self.ignored) if self.library else ""

    def notes(self) -> list[Finding]:
        """A note on what was done, and warnings for what could not be done."""
        done = [Finding("conversions", self.words, None, "note")] if self.library else []
        return [*done, *not_converted(self.library, {key: words for (_, key), words in self.refused.items()}, "warning")]


def conversions_in_words(library: str, renamed: int, made: int, ignored: int) -> str:
    """What a library's conversions did, in words.

    >>> conversions_in_words("transformers 5", 3, 1, 0)
    'names as transformers 5 reads them: 3 renamed, 1 made of others (--no-conversions takes them as they are)'
    """
    counts = [(renamed, "renamed"), (made, "made of others"), (ignored, "left out")]
    words = ", ".join(f"{count} {word}" for count, word in counts if count)
    return f"names as {library} reads them: {words or 'none that it can convert'} (--no-conversions takes them as they are)"


def not_converted(library: str, refused: Mapping[str, str], level: Level = "error") -> list[Finding]:
    """A finding for each kind of conversion that is not done here, with the first of its keys."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in refused.items():
        by_reason.setdefault(reason, []).append(key)
    return [
        Finding(
            "conversion",
            f"is left as it is{f', with {len(keys) - 1} more' if len(keys) > 1 else ''}; {library} converts by {reason}",
            keys[0],
            level,
        )
        for reason, keys in by_reason.items()
    ]


def choose(source: Tensors, target: Checkpoint, plain: Choice) -> Choice:
    """The prefix with which the target's library converts most of a source's keys to keys of the target; the `plain` choice, made without
    conversions, where no prefix does better."""
    if target.naming is None or same_names(source, target):
        return plain
    best, most = plain, len(plain.best.mapping)
    for prefix in _prefixes(source):
        names = rename_all(source, (), prefix)
        if len(set(names.values())) < len(names):
            continue
        mapping, count = _mapping(source, target, target.naming, names)
        if count > most:
            best, most = Choice(Change(prefix, mapping)), count
        if count >= _ENOUGH * min(len(source), len(target)):
            break
    return best


def applied_prefix(source: Checkpoint, target: Checkpoint) -> Prefix:
    """The prefix that is applied between two sides, before a library's conversions if there are any."""
    return choose(source, target, find_change(source, target)).applied.prefix


def same_names(source: Tensors, target: Tensors) -> bool:
    """Whether every key of a source is in the target, with the same shape."""
    return all(key in target and target[key].shape == tensor.shape for key, tensor in source.items())


def _prefixes(source: Tensors) -> Iterator[Prefix]:
    """The changes of a source's names that are tried before the library's conversions: none, wrappers removed, a common head stripped."""
    yield Prefix()
    wrappers = tuple(sorted(name for name in WRAPPERS if any(f"{name}." in key for key in source)))
    if wrappers:
        yield Prefix(unwrapped=wrappers)
    bare = [Prefix(unwrapped=wrappers).bare(key) for key in source]
    heads: Counter[str] = Counter()
    for key in bare:
        segments = key.split(".")
        heads.update(".".join(segments[: depth + 1]) + "." for depth in range(min(_DEPTH, len(segments) - 1)))
    common = [head for head, count in heads.most_common() if 2 * count >= len(bare)]
    yield from (Prefix(head, "", wrappers) for head in common[:_HEADS])


def _mapping(source: Tensors, target: Checkpoint, naming: Naming, names: Mapping[str, str]) -> tuple[dict[str, str], int]:
    """Which target key each source key is converted to, and how many target keys get a value."""
    by_name = {name: key for key, name in names.items()}
    conversion = naming.convert({name: source[key].shape for name, key in by_name.items()})
    mapping = {}
    for name, key in by_name.items():
        target_key = conversion.renamed.get(name, name)
        if target_key in target and target[target_key].shape == source[key].shape:
            mapping[key] = target_key
    reached = set(mapping.values())
    for target_key, made in conversion.made.items():
        if target_key in target and target[target_key].shape == made.shape:
            mapping.setdefault(by_name[made.names[0]], target_key)
            reached.add(target_key)
    return mapping, len(reached)


def converted(
    items: Sequence[Item], sources: Sequence[Checkpoint], target: Checkpoint | None, dropped: dict[SourceKey, Rule]
) -> tuple[list[Item], Applied]:
    """The items as the target's library converts them: renamed, or joined, cut and transposed by ops; and what was done.

    Items that the library leaves out are added to `dropped`.
    """
    applied = Applied()
    if target is None or target.naming is None:
        return list(items), applied
    results: list[Item] = []
    for number in dict.fromkeys(item.source for item in items):
        own_items = [item for item in items if item.source == number]
        if number >= 0:
            own_items, done = _of_source(own_items, sources[number], target, target.naming, dropped)
            applied = applied.and_then(done)
        results += own_items
    return results, applied


def _of_source(
    items: list[Item], source: Checkpoint, target: Checkpoint, naming: Naming, dropped: dict[SourceKey, Rule]
) -> tuple[list[Item], Applied]:
    by_name = {item.name: item for item in items if _open(item, target)}
    tensors = {name: source[item.source_keys[0][1]] for name, item in by_name.items()}
    if same_names(tensors, target) or len(by_name) < sum(_open(item, target) for item in items):
        return items, Applied()
    conversion = naming.convert({name: tensor.shape for name, tensor in tensors.items()})
    conversion = _without_rivals(conversion, {item.name for item in items})
    if conversion == Converted():
        return items, Applied()
    by = f"as {naming.library} reads it"
    parts = {name for made in conversion.made.values() for name in made.names}
    results: list[Item] = []
    for item in items:
        if item.name not in by_name:
            results.append(item)
        elif item.name in conversion.renamed:
            results.append(item.moved(conversion.renamed[item.name], Rule("convert", file=by)))
        elif item.name in conversion.ignored:
            dropped[item.source_keys[0]] = Rule("drop", file=by)
        elif item.name not in parts:
            results.append(item)
    for key, made in conversion.made.items():
        members = [by_name[name] for name in made.names]
        steps = tuple(dict.fromkeys(step for member in members for step in member.steps))
        source_keys = tuple(source_key for member in members for source_key in member.source_keys)
        rule = Rule("convert", file=f"{made.by}, {by}")
        results.append(Item(key, key, source_keys, tuple(RuleOp(op, filled=True) for op in made.ops), (*steps, (rule, 0))))
    refused = {by_name[name].source_keys[0]: words for name, words in conversion.refused.items()}
    return results, Applied(naming.library, len(conversion.renamed), len(conversion.made), len(conversion.ignored), refused)


def _open(item: Item, target: Checkpoint) -> bool:
    """Whether a conversion may change an item: it is one tensor without ops, and no rule gave it a name of the target."""
    return not item.entry and not item.ops and len(item.source_keys) == 1 and not (item.steps and item.name in target)


def _without_rivals(conversion: Converted, names: Collection[str]) -> Converted:
    """The conversion without results whose name a source key already has and keeps."""
    changed = {*conversion.renamed, *(name for made in conversion.made.values() for name in made.names), *conversion.ignored}
    kept = set(names) - changed
    return replace(
        conversion,
        renamed={name: key for name, key in conversion.renamed.items() if key not in kept},
        made={key: made for key, made in conversion.made.items() if key not in kept},
    )
