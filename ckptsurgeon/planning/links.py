"""A link: keys of a source and a target that hold the same values. Matching finds links, a diff shows them, rules carry them out."""

from __future__ import annotations

from dataclasses import dataclass

from ckptsurgeon.rules.rules import quoted

ENOUGH = 1.0  # points by which a choice must beat its runner-up
LAYOUT = "layout"  # the doubt where shapes can't show the order of the elements


@dataclass(frozen=True)
class Layout:
    """One possible order of the elements of a link's keys, with the rule that makes the targets from the sources then.

    `words` describes the order; `kind` says what the doubt is about, and is the same for all links that one decision resolves.
    """

    kind: str
    words: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    op: str = ""

    @property
    def rule(self) -> tuple[str, str]:
        """The two texts of an adapt rule: the keys, and the adapters (empty where the keys are copied unchanged)."""
        return f"{' + '.join(self.sources)} -> {' + '.join(self.targets)}", self.op

    def __str__(self) -> str:
        """The rule as it is written after `--adapt`.

        >>> print(Layout("rotary", "halves", ("wq",), ("q",), "permute_rope(heads=4, to='halves')"))
        'wq -> q' "permute_rope(heads=4, to='halves')"
        """
        return " ".join(map(quoted, self.rule))


@dataclass(frozen=True)
class Link:
    """Keys of both sides that hold the same values, in a rule's form.

    Attributes:
        sources, targets: the keys, in order; only one side has more than one (the parts of a fused or stacked tensor), or one source is
            shared by several targets (`op` is empty then).
        op: the adapters that make the targets from the sources, as an `adapt` rule has them; empty where nothing is changed.
        margin: by how many points the link beats its runner-up; inf where nothing else is possible.
        evidence: the reasons for the link, in words.
        runner_up: the second-best choice, as `source -> target`, or empty.
        doubt: `"layout"` where the keys are right but shapes can't show the order of their elements (see `choices`), or empty.
        choices: the possible layouts where there is a doubt; the first is that of `sources`, `targets` and `op`.
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
        """Whether it is certain, and copies one source tensor unchanged to one target key."""
        return self.certain and not self.op and len(self.sources) == len(self.targets) == 1

    @property
    def clear(self) -> bool:
        """Whether it clearly beats its runner-up: its keys are certain, the order of their elements may be in doubt."""
        return self.margin >= ENOUGH

    @property
    def certain(self) -> bool:
        """Whether its keys and its layout are certain; other links are shown, not applied."""
        return self.clear and not self.doubt
