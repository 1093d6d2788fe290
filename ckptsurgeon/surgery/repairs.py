"""Names that a library gave up for others, in both directions: what `--auto safe` may rename without being told.

A repair can't change what a tensor means, and is made only where a key of the source has no place in the target and the repaired name is
there and nobody else's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache

from ckptsurgeon.surgery.items import Item
from ckptsurgeon.surgery.patterns import Pattern, compile_pattern, expand
from ckptsurgeon.surgery.rules import Rule

BY = "--auto safe"
# Each pair of names stands for one tensor: what it was called, what it is called now.
RENAMED: tuple[tuple[str, str], ...] = (
    # torch.nn.utils.weight_norm, and spectral_norm, became parametrizations
    ("{**m}.weight_g", "{**m}.parametrizations.weight.original0"),
    ("{**m}.weight_v", "{**m}.parametrizations.weight.original1"),
    ("{**m}.weight_orig", "{**m}.parametrizations.weight.original"),
    ("{**m}.weight_u", "{**m}.parametrizations.weight.0._u"),
    ("{**m}.weight_v", "{**m}.parametrizations.weight.0._v"),
    # LayerNorm in checkpoints that came from TensorFlow
    ("{**m}.gamma", "{**m}.weight"),
    ("{**m}.beta", "{**m}.bias"),
    # torchvision's DenseNet before 0.3
    ("{**m}.denselayer{d}.norm.{n}.{p}", "{**m}.denselayer{d}.norm{n}.{p}"),
    ("{**m}.denselayer{d}.conv.{n}.{p}", "{**m}.denselayer{d}.conv{n}.{p}"),
)
COUNTER = "num_batches_tracked"  # BatchNorm's, which torch before 0.4.1 did not have


@cache
def _rules() -> tuple[tuple[Rule, Pattern], ...]:
    """Every repair as a rename, both ways."""
    pairs = [pair for old, new in RENAMED for pair in ((old, new), (new, old))]
    return tuple((Rule("rename", one, other, BY), compile_pattern(one)) for one, other in pairs)


def repaired(items: Sequence[Item], known: Collection[str]) -> list[Item]:
    """The items, those without a place under the name that the target has for them."""
    taken = {item.name for item in items}
    return [item if item.name in known or item.entry else _repaired(item, known, taken) for item in items]


def _repaired(item: Item, known: Collection[str], taken: Collection[str]) -> Item:
    for rule, pattern in _rules():
        parts = pattern.match(item.name)
        name = expand(rule.result, parts) if parts is not None else None
        if name is not None and name in known and name not in taken:
            return item.moved(name, rule)
    return item
