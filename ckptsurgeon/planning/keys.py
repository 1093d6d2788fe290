"""What travels through the rules: a name, and the source tensors that stand for it, with what is to be done to them."""

from __future__ import annotations

from dataclasses import dataclass

from ckptsurgeon.adapters.chain import Asked
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.wrappers import WRAPPERS, unwrap

SourceKey = tuple[int, str]  # which source, and its key as it stands under the root


@dataclass(frozen=True)
class Claim:
    """The source tensors, in order, that rules assign to one target key; the ops that make one tensor of them; and those rules."""

    places: tuple[SourceKey, ...]
    asked: tuple[Asked, ...] = ()
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Item:
    """A name on its way: what patterns see (`seen`) and where it lands (`name`, with the prefix that the target has).

    `steps` are the rules that led it here, each with which of its results it is; `entry` is set for a value that is no tensor,
    `begins` for the first of the parts that `unstack` numbers; `others` are names by which it would be read, if they were not other keys of
    its source.
    """

    seen: str
    name: str
    places: tuple[SourceKey, ...]
    asked: tuple[Asked, ...] = ()
    steps: tuple[tuple[Rule, int], ...] = ()
    entry: bool = False
    begins: bool = False
    others: frozenset[str] = frozenset()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that led it here."""
        return tuple(rule for rule, _ in self.steps)

    @property
    def source(self) -> int:
        """The number of the source that it comes from; -1 for several."""
        first = self.places[0][0]
        return first if len(self.places) == 1 or all(number == first for number, _ in self.places) else -1

    @property
    def readings(self) -> tuple[str, ...]:
        """The names by which a pattern may match: what patterns see, then, before any rule, the key as it stands in the file, and the key
        without the segments of wrappers; none that is another key as it stands there."""
        if self.rules or len(self.places) > 1:
            return (self.seen,)
        raw = self.places[0][1]
        return tuple(name for name in dict.fromkeys((self.seen, raw, unwrap(raw, WRAPPERS))) if name not in self.others)

    @property
    def words(self) -> str:
        """Its first key and the rules that led it here, as a problem names it."""
        return f"{self.places[0][1]!r}" + (f" (by {', '.join(map(str, self.rules))})" if self.rules else "")

    @property
    def claim(self) -> Claim:
        """What it is without its name."""
        return Claim(self.places, self.asked, self.rules)

    def moved(self, name: str, rule: Rule, which: int = 0) -> Item:
        """The same under the name that a rule gives, as which of its results."""
        return Item(name, name, self.places, self.asked, (*self.steps, (rule, which)), self.entry)
