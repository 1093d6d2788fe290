"""A link: keys of a source and a target that hold the same values. Matching finds links, a diff shows them, rules carry them out."""

from __future__ import annotations

from dataclasses import dataclass

ENOUGH = 1.0  # points by which a choice must beat its runner-up


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
        choices: what may decide a doubt: adapt rules that are ready to be written, the text after `--adapt`.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    op: str = ""
    margin: float = 0.0
    evidence: tuple[str, ...] = ()
    runner_up: str = ""
    doubt: str = ""
    choices: tuple[str, ...] = ()

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
