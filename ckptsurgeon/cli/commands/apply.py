"""`apply`: carry out a plan.json."""

from __future__ import annotations

from typing import Any

import click

from ckptsurgeon.cli import options


@click.command("apply", cls=options.Command)
@click.argument("plan", metavar="PLAN.JSON")
@options.writing
@options.limit
@options.tabled
def command(plan: str, show: options.Show, **choices: Any) -> int:
    """Carry out a plan; refuse it if a source or the target has changed since."""
    from ckptsurgeon import api

    report = api.apply(plan, note=show.note(), **choices)
    show.result(report, asked=False)
    return 0
