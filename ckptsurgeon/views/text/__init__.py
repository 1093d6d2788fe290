"""What a person reads: each report in about twenty lines, keys folded, totals that reconcile, and the command to run next.

Every name is made printable, so that a key can't steer a terminal. With `verbose` nothing is folded or left out; `width` is the
terminal's, in columns, and None where there is no terminal, so that a file or a program gets each row on one line.
"""

from ckptsurgeon.views.text.checked import check, explain, verification
from ckptsurgeon.views.text.compared import diff, next_command, rename_hints
from ckptsurgeon.views.text.done import carried, groups, report, skeleton
from ckptsurgeon.views.text.inside import archive, known
from ckptsurgeon.views.text.matched import matching
from ckptsurgeon.views.text.planned import plan, summary
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
