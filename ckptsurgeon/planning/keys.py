"""A name while rules are applied to it: the source tensors that it stands for, and the ops that are applied to them."""

from __future__ import annotations

from dataclasses import dataclass

from ckptsurgeon.adapters.chain import RuleOp
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.wrappers import WRAPPERS, unwrap

SourceKey = tuple[int, str]  # the number of the source, and the key as it is below the root


@dataclass(frozen=True)
class Claim:
    """The source tensors, in order, that rules assign to one target key; the ops that make one tensor of them; and the rules."""

    places: tuple[SourceKey, ...]
    asked: tuple[RuleOp, ...] = ()
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Item:
    """A name while rules are applied to it.

    Attributes:
        seen: the name that patterns are matched against.
        name: the name in the target, with the prefix that the target has.
        places: the source tensors, in order.
        asked: the ops that make one tensor of them.
        steps: the rules that were applied, each with the index of the result that this name is.
        entry: whether it is a value that is not a tensor.
        begins: whether it is the first of the parts that `unstack` numbers.
        others: names that patterns must not match it by, because they are other keys of its source.
    """

    seen: str
    name: str
    places: tuple[SourceKey, ...]
    asked: tuple[RuleOp, ...] = ()
    steps: tuple[tuple[Rule, int], ...] = ()
    entry: bool = False
    begins: bool = False
    others: frozenset[str] = frozenset()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that were applied."""
        return tuple(rule for rule, _ in self.steps)

    @property
    def source(self) -> int:
        """The number of the source that it comes from; -1 if there are several."""
        first = self.places[0][0]
        return first if len(self.places) == 1 or all(number == first for number, _ in self.places) else -1

    @property
    def readings(self) -> tuple[str, ...]:
        """The names that a pattern may match, in order: `seen`; before any rule was applied also the key as it is in the file, and that key
        without wrapper segments. Names of other keys are left out."""
        if self.rules or len(self.places) > 1:
            return (self.seen,)
        raw = self.places[0][1]
        return tuple(name for name in dict.fromkeys((self.seen, raw, unwrap(raw, WRAPPERS))) if name not in self.others)

    @property
    def words(self) -> str:
        """Its first key and the rules that were applied, for an error message."""
        return f"{self.places[0][1]!r}" + (f" (by {', '.join(map(str, self.rules))})" if self.rules else "")

    @property
    def claim(self) -> Claim:
        """Its tensors, ops and rules, without the name."""
        return Claim(self.places, self.asked, self.rules)

    def moved(self, name: str, rule: Rule, which: int = 0) -> Item:
        """The item under the name that a rule gives it; `which` is the index of the result."""
        return Item(name, name, self.places, self.asked, (*self.steps, (rule, which)), self.entry)
