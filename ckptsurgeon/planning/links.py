"""A link: keys of a source and a target that hold the same values. Matching finds links, a diff shows them, rules carry them out."""

from __future__ import annotations

from dataclasses import dataclass

from ckptsurgeon.rules.rules import quoted

ENOUGH = 1.0  # points by which a choice must beat its runner-up
LAYOUT = "layout"  # the doubt about the order of elements that shapes can't show


@dataclass(frozen=True)
class Layout:
    """One way in which the elements of a link's keys may lie: what makes the targets of the sources then, each in order.

    `words` say what lies how; `kind` is what the doubt is about, the same for all links that one decision settles.
    """

    kind: str
    words: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    op: str = ""

    @property
    def rule(self) -> tuple[str, str]:
        """The two texts of an adapt rule: the keys, and the adapters (none where the keys are copied as they stand)."""
        return f"{' + '.join(self.sources)} -> {' + '.join(self.targets)}", self.op

    def __str__(self) -> str:
        """The rule as a command line has it after `--adapt`.

        >>> print(Layout("rotary", "halves", ("wq",), ("q",), "permute_rope(heads=4, to='halves')"))
        'wq -> q' "permute_rope(heads=4, to='halves')"
        """
        return " ".join(map(quoted, self.rule))


@dataclass(frozen=True)
class Link:
    """Keys of both sides that hold the same values, in a rule's form.

    Attributes:
        sources, targets: in order; more than one on one side only (parts of a fused or stacked tensor), save for one source that
            several targets share (`op` is empty then).
        op: what makes the targets of the sources, as an `adapt` rule writes it; empty where nothing is changed.
        margin: by how many points the link beats its runner-up; inf where nothing else is possible.
        evidence: what speaks for it, in words.
        runner_up: the nearest other choice, as `source -> target`, or empty.
        doubt: `"layout"` where the keys are right and the order of their elements can't be told by shapes (see `choices`), or empty.
        choices: the layouts that a doubt is between; the first is that of `sources`, `targets` and `op`.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    op: str = ""
    margin: float = 0.0
    evidence: tuple[str, ...] = ()
    runner_up: str = ""
    doubt: str = ""
    choices: tuple[Layout, ...] = ()

    @property
    def is_rename(self) -> bool:
        """Whether it is certain, and one tensor of the source goes to one of the target as it is."""
        return self.certain and not self.op and len(self.sources) == len(self.targets) == 1

    @property
    def clear(self) -> bool:
        """Whether it beats its runner-up clearly: its keys are sure, the order of their elements perhaps not."""
        return self.margin >= ENOUGH

    @property
    def certain(self) -> bool:
        """Whether its keys and its layout are sure; other links are shown and not applied."""
        return self.clear and not self.doubt
