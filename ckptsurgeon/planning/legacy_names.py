"""Parameter names that libraries renamed, in both directions: what `--auto safe` renames by itself.

A repair can't change what a tensor means, and is made only where a key of the source has no place in the target and the repaired name is
there and nobody else's. What the target's own loading code does with such keys is done unasked, since torch does it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache

from ckptsurgeon.planning.keys import Item, SourceKey
from ckptsurgeon.rules.loading_code import Taken, code_of
from ckptsurgeon.rules.patterns import Pattern, compile_pattern
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.rules.templates import expand

BY = "--auto safe"
# Each pair stands for one tensor of a module: what it was called, what it is called now.
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
COUNTER = "num_batches_tracked"  # BatchNorm's, which torch before 0.4.1 did not have


def is_counter(key: str) -> bool:
    """Whether a key is BatchNorm's counter."""
    return key.rpartition(".")[2] == COUNTER


@cache
def _rules() -> tuple[tuple[Rule, Pattern], ...]:
    """Every repair as a rename, both ways."""
    pairs = [pair for old, new in RENAMED for pair in ((old, new), (new, old))]
    placed = [(head + one, head + other) for one, other in pairs for head in ("{**m}.", "")]
    return tuple((Rule("rename", one, other, BY), compile_pattern(one)) for one, other in placed)


def repaired(items: Sequence[Item], known: Collection[str], average: bool = False) -> list[Item]:
    """The items, those without a place under the name that the target has for them. In an `average` each source has names of its own."""
    numbers = [item.source if average else 0 for item in items]
    taken = set(zip(numbers, (item.name for item in items), strict=True))
    found = [
        item if item.name in known or item.entry else _repaired(item, known, number, taken)
        for number, item in zip(numbers, items, strict=True)
    ]
    wanted = Counter((item.source, item.name) for item in found)  # what two of one source would become, neither does
    return [one if one is item or wanted[one.source, one.name] == 1 else item for item, one in zip(items, found, strict=True)]


def _repaired(item: Item, known: Collection[str], number: int, taken: Collection[tuple[int, str]]) -> Item:
    for rule, pattern in _rules():
        parts = pattern.match(item.name)
        name = expand(rule.result, parts) if parts is not None else None
        if name is not None and name in known and (number, name) not in taken:
            return item.moved(name, rule)
    return item


def renamed_by_loading_code(
    items: Sequence[Item], by_source: Mapping[int, Taken], dropped: dict[SourceKey, Rule], handed: dict[tuple[int, str], list[Item]]
) -> list[Item]:
    """The items as the target's own loading code takes them: under its names, without those that it drops, which are added to `dropped`.
    Those that torch's load needs as they are are added to `handed`, by source and name."""
    found = []
    for item in items:
        of = by_source.get(item.source)
        if of is None or item.entry:
            found.append(item)
            continue
        if item.name in of.handed:
            handed.setdefault((item.source, item.name), []).append(item)
        if item.name in of.dropped:
            dropped.update(dict.fromkeys(item.places, Rule("drop", file=code_of(of.dropped[item.name]))))
            continue
        key, by = of.renamed.get(item.name, ("", ""))
        found.append(item.moved(key, Rule("rename", file=code_of(by))) if key else item)
    return found
