"""What a person reads: each report in about twenty lines, keys folded, totals that reconcile, and the command to run next.

Every name is made printable, so that a key can't steer a terminal. With `verbose` nothing is folded or left out; `width` is the
terminal's, in columns, and None where there is no terminal, so that a file or a program gets each row on one line.
"""

from ckptsurgeon.views.text.check import check, explain, verification
from ckptsurgeon.views.text.diff import diff, next_command, rename_hints
from ckptsurgeon.views.text.inspect import archive, known
from ckptsurgeon.views.text.match import matching
from ckptsurgeon.views.text.merge import carried, groups, report, skeleton
from ckptsurgeon.views.text.plan import plan, summary
from ckptsurgeon.views.text.words import shape, size

__all__ = [
    "archive",
    "carried",
    "check",
    "diff",
    "explain",
    "groups",
    "known",
    "matching",
    "next_command",
    "plan",
    "rename_hints",
    "report",
    "shape",
    "size",
    "skeleton",
    "summary",
    "verification",
]
