"""A library's own conversions, where the target is a model of it: applied to the names that no rule of a person's has settled.

They come unasked, as a wrapper's prefix does, since the library's own loading makes them. A name that no conversion can place stays as it
is, and so does every name of a source that has the target's names and shapes already. Names and shapes only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptsurgeon.adapters.chain import Asked
from ckptsurgeon.loading import Converted, Naming
from ckptsurgeon.planning.keys import Item, SourceKey
from ckptsurgeon.planning.prefixes.find import Change, Choice, Prefix, find_change, rename_all
from ckptsurgeon.report import Finding, Level
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.tensors import Checkpoint, TensorMeta
from ckptsurgeon.wrappers import WRAPPERS

Tensors = Mapping[str, TensorMeta]
_HEADS, _DEPTH = 3, 3  # prefixes that are tried, and their segments
_ENOUGH = 0.9  # of a source's keys: where as many are placed, no other prefix is tried


@dataclass(frozen=True)
class Applied:
    """What conversions have come to: by which library, how many tensors are renamed and made of others, how many names it leaves out, and
    the keys that it would convert in a way that is no adapter here, each with the reason."""

    library: str = ""
    renamed: int = 0
    made: int = 0
    ignored: int = 0
    refused: Mapping[SourceKey, str] = field(default_factory=dict)

    def and_then(self, other: Applied) -> Applied:
        """Both together."""
        return Applied(
            self.library or other.library,
            self.renamed + other.renamed,
            self.made + other.made,
            self.ignored + other.ignored,
            {**self.refused, **other.refused},
        )

    @property
    def words(self) -> str:
        """What was done; empty where nothing was."""
        return conversions_in_words(self.library, self.renamed, self.made, self.ignored) if self.library else ""

    def notes(self) -> list[Finding]:
        """What was done, and what could not be."""
        done = [Finding("conversions", self.words, None, "note")] if self.library else []
        return [*done, *not_converted(self.library, {key: words for (_, key), words in self.refused.items()}, "warning")]


def conversions_in_words(library: str, renamed: int, made: int, ignored: int) -> str:
    """What a library's conversions have come to.

    >>> conversions_in_words("transformers 5", 3, 1, 0)
    'names as transformers 5 reads them: 3 renamed, 1 made of others (--no-conversions takes them as they are)'
    """
    counts = [(renamed, "renamed"), (made, "made of others"), (ignored, "left out")]
    words = ", ".join(f"{count} {word}" for count, word in counts if count)
    return f"names as {library} reads them: {words or 'none that it can convert'} (--no-conversions takes them as they are)"


def not_converted(library: str, refused: Mapping[str, str], level: Level = "error") -> list[Finding]:
    """A finding for each conversion that is not done here, with the first of the keys that it is for."""
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
    """The prefix under which the target's library places most of a source's keys, where that is more than the `plain` choice places
    without conversions."""
    if target.naming is None or same_names(source, target):
        return plain
    best, most = plain, len(plain.best.mapping)
    for prefix in _prefixes(source):
        names = rename_all(source, (), prefix)
        if len(set(names.values())) < len(names):
            continue
        mapping, count = _places(source, target, target.naming, names)
        if count > most:
            best, most = Choice(Change(prefix, mapping)), count
        if count >= _ENOUGH * min(len(source), len(target)):
            break
    return best


def applied_prefix(source: Checkpoint, target: Checkpoint) -> Prefix:
    """The prefix between two sides that is applied unasked, before a library's conversions where there are any."""
    return choose(source, target, find_change(source, target)).applied.prefix


def same_names(source: Tensors, target: Tensors) -> bool:
    """Whether every key of a source is the target's already, with its shape."""
    return all(key in target and target[key].shape == tensor.shape for key, tensor in source.items())


def _prefixes(source: Tensors) -> Iterator[Prefix]:
    """The changes of a source's names that may stand before the library's: none, wrappers taken out, a common head stripped."""
    yield Prefix()
    held = tuple(sorted(name for name in WRAPPERS if any(f"{name}." in key for key in source)))
    if held:
        yield Prefix(unwrapped=held)
    bare = [Prefix(unwrapped=held).bare(key) for key in source]
    heads: Counter[str] = Counter()
    for key in bare:
        segments = key.split(".")
        heads.update(".".join(segments[: depth + 1]) + "." for depth in range(min(_DEPTH, len(segments) - 1)))
    common = [head for head, count in heads.most_common() if 2 * count >= len(bare)]
    yield from (Prefix(head, "", held) for head in common[:_HEADS])


def _places(source: Tensors, target: Checkpoint, naming: Naming, names: Mapping[str, str]) -> tuple[dict[str, str], int]:
    """Which keys of a source lead to which of the target's, one for each, and how many of the target's are reached."""
    by_name = {name: key for key, name in names.items()}
    found = naming.convert({name: source[key].shape for name, key in by_name.items()})
    mapping = {}
    for name, key in by_name.items():
        placed = found.renamed.get(name, name)
        if placed in target and target[placed].shape == source[key].shape:
            mapping[key] = placed
    reached = set(mapping.values())
    for placed, made in found.made.items():
        if placed in target and target[placed].shape == made.shape:
            mapping.setdefault(by_name[made.names[0]], placed)
            reached.add(placed)
    return mapping, len(reached)


def converted(
    items: Sequence[Item], sources: Sequence[Checkpoint], target: Checkpoint | None, dropped: dict[SourceKey, Rule]
) -> tuple[list[Item], Applied]:
    """The items as the target's library takes them: renamed, or joined, cut and turned by ops; those that it leaves out are added to
    `dropped`. And what that came to."""
    applied = Applied()
    if target is None or target.naming is None:
        return list(items), applied
    found: list[Item] = []
    for number in dict.fromkeys(item.source for item in items):
        own = [item for item in items if item.source == number]
        if number >= 0:
            own, done = _of_source(own, sources[number], target, target.naming, dropped)
            applied = applied.and_then(done)
        found += own
    return found, applied


def _of_source(
    items: list[Item], source: Checkpoint, target: Checkpoint, naming: Naming, dropped: dict[SourceKey, Rule]
) -> tuple[list[Item], Applied]:
    asked = {item.name: item for item in items if _open(item, target)}
    tensors = {name: source[item.places[0][1]] for name, item in asked.items()}
    if same_names(tensors, target) or len(asked) < sum(_open(item, target) for item in items):
        return items, Applied()
    answer = naming.convert({name: tensor.shape for name, tensor in tensors.items()})
    answer = _without_rivals(answer, {item.name for item in items})
    if answer == Converted():
        return items, Applied()
    by = f"as {naming.library} reads it"
    parts = {name for made in answer.made.values() for name in made.names}
    found: list[Item] = []
    for item in items:
        if item.name not in asked:
            found.append(item)
        elif item.name in answer.renamed:
            found.append(item.moved(answer.renamed[item.name], Rule("convert", file=by)))
        elif item.name in answer.ignored:
            dropped[item.places[0]] = Rule("drop", file=by)
        elif item.name not in parts:
            found.append(item)
    for key, made in answer.made.items():
        members = [asked[name] for name in made.names]
        steps = tuple(dict.fromkeys(step for member in members for step in member.steps))
        places = tuple(place for member in members for place in member.places)
        rule = Rule("convert", file=f"{made.by}, {by}")
        found.append(Item(key, key, places, tuple(Asked(op, filled=True) for op in made.ops), (*steps, (rule, 0))))
    refused = {asked[name].places[0]: words for name, words in answer.refused.items()}
    return found, Applied(naming.library, len(answer.renamed), len(answer.made), len(answer.ignored), refused)


def _open(item: Item, target: Checkpoint) -> bool:
    """Whether a conversion may take an item: one tensor as it is, which no rule has given a name of the target."""
    return not item.entry and not item.asked and len(item.places) == 1 and not (item.steps and item.name in target)


def _without_rivals(answer: Converted, names: Collection[str]) -> Converted:
    """Without what would land on a name that a key of the source has and keeps: that key is the name's own."""
    goes = {*answer.renamed, *(name for made in answer.made.values() for name in made.names), *answer.ignored}
    stays = set(names) - goes
    return replace(
        answer,
        renamed={name: key for name, key in answer.renamed.items() if key not in stays},
        made={key: made for key, made in answer.made.items() if key not in stays},
    )
