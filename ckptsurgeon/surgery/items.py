"""What travels through the rules: a name, and the source tensors that stand for it, with what is to be done to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ckptsurgeon.surgery.adapters.chain import Asked
from ckptsurgeon.surgery.rules import Rule

SourceKey = tuple[int, str]  # which source, and its key as it stands under the root


@dataclass(frozen=True)
class Claim:
    """The source tensors, in order, that want to be one target key, the ops that make one tensor of them, and the rules that said so."""

    places: tuple[SourceKey, ...]
    asked: tuple[Asked, ...] = ()
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Item:
    """A name on its way: what patterns see (`seen`) and where it lands (`name`, with the prefix that the target has); `entry` for a value
    that is no tensor."""

    seen: str
    name: str
    places: tuple[SourceKey, ...]
    asked: tuple[Asked, ...] = ()
    rules: tuple[Rule, ...] = ()
    entry: bool = False

    @property
    def source(self) -> int:
        """The number of the source that it comes from; -1 for several."""
        numbers = {number for number, _ in self.places}
        return numbers.pop() if len(numbers) == 1 else -1

    @property
    def claim(self) -> Claim:
        """What it is without its name."""
        return Claim(self.places, self.asked, self.rules)

    def moved(self, name: str, rule: Rule) -> Item:
        """The same under the name that a rule gives."""
        return replace(self, seen=name, name=name, rules=(*self.rules, rule))


def shortened(problems: Iterable[str], most: int = 20) -> tuple[str, ...]:
    """Problems as an error lists them: the first `most`, and how many more there are."""
    rows = tuple(problems)
    return rows[:most] + ((f"and {len(rows) - most} more",) if len(rows) > most else ())
