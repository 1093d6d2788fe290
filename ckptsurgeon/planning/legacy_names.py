"""Parameter names that libraries have renamed, in both directions: `--auto safe` applies these renames.

Such a rename can't change the meaning of a tensor. It is applied only where a source key is not in the target, the renamed key is, and no
other source key has that name. The renames of the target's own loading code are always applied, because torch applies them too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from ckptsurgeon.planning.keys import Item, SourceKey
from ckptsurgeon.rules.loading_code import Taken, code_of
from ckptsurgeon.rules.patterns import Pattern, compile_pattern
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.rules.templates import expand

BY = "--auto safe"
# Each pair is one tensor of a module: its old name and its new name.
RENAMED: tuple[tuple[str, str], ...] = (
    # torch.nn.utils.weight_norm, and spectral_norm, of any parameter, became parametrizations
    ("{n}_g", "parametrizations.{n}.original0"),
    ("{n}_v", "parametrizations.{n}.original1"),
    ("{n}_orig", "parametrizations.{n}.original"),
    ("{n}_u", "parametrizations.{n}.0._u"),
    ("{n}_v", "parametrizations.{n}.0._v"),
    # LayerNorm in checkpoints that came from TensorFlow
    ("gamma", "weight"),
    ("beta", "bias"),
    # torchvision's DenseNet before 0.3
    ("denselayer{d}.norm.{n}.{p}", "denselayer{d}.norm{n}.{p}"),
    ("denselayer{d}.conv.{n}.{p}", "denselayer{d}.conv{n}.{p}"),
)
_PART = re.compile(r"\{[^}]*\}")
COUNTER = "num_batches_tracked"  # BatchNorm's, which torch before 0.4.1 did not have


def is_counter(key: str) -> bool:
    """Whether a key is BatchNorm's counter."""
    return key.rpartition(".")[2] == COUNTER


@dataclass(frozen=True)
class _Renaming:
    """One pair in one direction, the texts that every name has to which it applies, and how the last segment of every result ends."""

    rule: Rule
    pattern: Pattern
    texts: tuple[str, ...]
    end: str


@cache
def _renamings() -> tuple[_Renaming, ...]:
    """Each pair as renames in both directions."""
    pairs = [pair for old, new in RENAMED for pair in ((old, new), (new, old))]
    renames = [(head + pattern, head + result) for pattern, result in pairs for head in ("{**m}.", "")]
    return tuple(
        _Renaming(
            Rule("rename", pattern, result, BY),
            compile_pattern(pattern),
            tuple(filter(None, _PART.split(pattern))),
            _PART.split(result)[-1].rpartition(".")[2],
        )
        for pattern, result in renames
    )


def repaired(items: Sequence[Item], known: Collection[str], average: bool = False) -> list[Item]:
    """The items; those whose name is not in the target get the name that the target has for them. In an `average`, names are looked up for
    each source separately."""
    numbers = [item.source if average else 0 for item in items]
    taken = set(zip(numbers, (item.name for item in items), strict=True))
    possible = _possible(known)
    renamed = [
        item if item.name in known or item.entry else _repaired(item, known, number, taken, possible)
        for number, item in zip(numbers, items, strict=True)
    ]
    counts = Counter((item.source, item.name) for item in renamed)  # where two items would get one name, both stay as they are
    return [new if new is old or counts[new.source, new.name] == 1 else old for old, new in zip(items, renamed, strict=True)]


def _repaired(item: Item, known: Collection[str], number: int, taken: Collection[tuple[int, str]], renamings: Sequence[_Renaming]) -> Item:
    for rule, name in _renamed(item.name, known, renamings):
        if (number, name) not in taken:
            return item.moved(name, rule)
    return item


def _renamed(name: str, known: Collection[str], renamings: Sequence[_Renaming]) -> Iterator[tuple[Rule, str]]:
    """The known names that a name has in libraries, each with the rule that gives it."""
    for renaming in renamings:
        if all(text in name for text in renaming.texts) and (parts := renaming.pattern.match(name)) is not None:
            new = expand(renaming.rule.result, parts)
            if new in known:
                yield renaming.rule, new


def have_old_names(names: Iterable[str], known: Collection[str]) -> bool:
    """Whether libraries have renamed any of the names to a known one, or back.

    >>> have_old_names(["norm.gamma"], {"norm.weight"}), have_old_names(["norm.gamma"], {"fc.weight"})
    (True, False)
    """
    renamings = _possible(known)
    return any(True for name in names for _ in _renamed(name, known, renamings))


def _possible(known: Iterable[str]) -> list[_Renaming]:
    """The renamings that may give a known name, by its last segment."""
    leaves = {name.rpartition(".")[2] for name in known}
    return [renaming for renaming in _renamings() if any(leaf.endswith(renaming.end) for leaf in leaves)]


def renamed_by_loading_code(
    items: Sequence[Item], by_source: Mapping[int, Taken], dropped: dict[SourceKey, Rule], handed: dict[tuple[int, str], list[Item]]
) -> list[Item]:
    """The items under the names that the target's own loading code gives them.

    Those that it drops are added to `dropped` and left out. Those that torch's load needs unchanged are added to `handed`, by source and
    name.
    """
    renamed = []
    for item in items:
        taken = by_source.get(item.source)
        if taken is None or item.entry:
            renamed.append(item)
            continue
        if item.name in taken.handed:
            handed.setdefault((item.source, item.name), []).append(item)
        if item.name in taken.dropped:
            dropped.update(dict.fromkeys(item.source_keys, Rule("drop", file=code_of(taken.dropped[item.name]))))
            continue
        key, by = taken.renamed.get(item.name, ("", ""))
        renamed.append(item.moved(key, Rule("rename", file=code_of(by))) if key else item)
    return renamed
