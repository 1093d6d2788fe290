"""`check` as workflow commands of GitHub Actions, which shows them as annotations beside the files.

Every line but the last begins with a command of ours, and no name or message can begin another. Form: GitHub, "Workflow commands for GitHub
Actions"; escapes as in actions/toolkit, `command.ts`.
"""

from __future__ import annotations

import os

from ckptsurgeon.errors import printable
from ckptsurgeon.finding_codes import BY_CODE
from ckptsurgeon.report import CheckReport
from ckptsurgeon.views.text.check import about, alike, followed, totals

_COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}


def check(found: CheckReport, workspace: str | None = None) -> str:
    """An annotation for each thing found, keys of which the same is said together, and the totals; paths as the `workspace` has them."""
    lines = []
    for file in found.files:
        place = _place(file.path, workspace)
        for (code, level, message), keys in alike(file.findings).items():
            row = BY_CODE.get(code)
            title = f"{code} {row.name}" if row else code
            lines.append(f"::{_COMMANDS[level]} file={_property(place)},title={_property(title)}::{_data(about(keys, message, None))}")
    if found.settings is not None:
        kind = "warning" if found.settings.not_used else "notice"
        place = _property(_place(found.settings.path, workspace))
        lines.append(f"::{kind} file={place},title=settings::{_data(followed(found.settings))}")
    return "\n".join([*lines, totals(found)])


def _place(path: str, workspace: str | None) -> str:
    if not workspace:
        return path
    inside = os.path.relpath(os.path.realpath(path), os.path.realpath(workspace))
    return path if inside.startswith("..") else inside


def _data(text: str) -> str:
    return printable(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
