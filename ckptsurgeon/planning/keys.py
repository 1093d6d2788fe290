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

    source_keys: tuple[SourceKey, ...]
    ops: tuple[RuleOp, ...] = ()
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Item:
    """A name while rules are applied to it.

    Attributes:
        seen: the name that patterns are matched against.
        name: the name in the target, with the prefix that the target has.
        source_keys: the source tensors, in order.
        ops: the ops that make one tensor of them.
        steps: the rules that were applied, each with the index of the result that this name is.
        entry: whether it is a value that is not a tensor.
        is_first_part: whether it is the first of the parts that `unstack` numbers.
        other_keys: names by which patterns must not match it, because they are other keys of its source.
    """

    seen: str
    name: str
    source_keys: tuple[SourceKey, ...]
    ops: tuple[RuleOp, ...] = ()
    steps: tuple[tuple[Rule, int], ...] = ()
    entry: bool = False
    is_first_part: bool = False
    other_keys: frozenset[str] = frozenset()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that were applied."""
        return tuple(rule for rule, _ in self.steps)

    @property
    def source(self) -> int:
        """The number of the source that it comes from; -1 if there are several."""
        first = self.source_keys[0][0]
        return first if len(self.source_keys) == 1 or all(number == first for number, _ in self.source_keys) else -1

    @property
    def readings(self) -> tuple[str, ...]:
        """The names that a pattern may match, in order: `seen`; before any rule was applied also the key as it is in the file, and that key
        without wrapper segments. Names of other keys are left out."""
        if self.rules or len(self.source_keys) > 1:
            return (self.seen,)
        raw = self.source_keys[0][1]
        return tuple(name for name in dict.fromkeys((self.seen, raw, unwrap(raw, WRAPPERS))) if name not in self.other_keys)

    @property
    def words(self) -> str:
        """Its first key and the rules that were applied, for an error message."""
        return f"{self.source_keys[0][1]!r}" + (f" (by {', '.join(map(str, self.rules))})" if self.rules else "")

    @property
    def claim(self) -> Claim:
        """Its tensors, ops and rules, without the name."""
        return Claim(self.source_keys, self.ops, self.rules)

    def moved(self, name: str, rule: Rule, which: int = 0) -> Item:
        """The item under the name that a rule gives it; `which` is the index of the result."""
        return Item(name, name, self.source_keys, self.ops, (*self.steps, (rule, which)), self.entry)
