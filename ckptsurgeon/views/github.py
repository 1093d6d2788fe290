"""`check` as workflow commands of GitHub Actions, which shows them as annotations beside the files.

Every line but the last is one workflow command, and no name or message can add another. Form: GitHub, "Workflow commands for GitHub
Actions"; escapes as in actions/toolkit, `command.ts`.
"""

from __future__ import annotations

import os

from ckptsurgeon.errors import printable
from ckptsurgeon.finding_codes import BY_CODE
from ckptsurgeon.report import CheckReport
from ckptsurgeon.views.text.check import about, alike, followed, totals

_COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}


def check(report: CheckReport, workspace: str | None = None) -> str:
    """An annotation for each finding, keys with the same finding together, and the totals; paths are relative to the `workspace`."""
    lines = []
    for file in report.files:
        relative = _place(file.path, workspace)
        for (code, level, message), keys in alike(file.findings).items():
            row = BY_CODE.get(code)
            title = f"{code} {row.name}" if row else code
            lines.append(f"::{_COMMANDS[level]} file={_property(relative)},title={_property(title)}::{_data(about(keys, message, None))}")
    if report.settings is not None:
        kind = "warning" if report.settings.not_used else "notice"
        relative = _property(_place(report.settings.path, workspace))
        lines.append(f"::{kind} file={relative},title=settings::{_data(followed(report.settings))}")
    return "\n".join([*lines, totals(report)])


def _place(path: str, workspace: str | None) -> str:
    if not workspace:
        return path
    inside = os.path.relpath(os.path.realpath(path), os.path.realpath(workspace))
    return path if inside.startswith("..") else inside


def _data(text: str) -> str:
    return printable(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
