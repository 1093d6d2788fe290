"""`apply`: do what a plan.json says."""

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
    """Do what was decided; refuse a plan whose source or target has changed since."""
    from ckptsurgeon import api

    done = api.apply(plan, note=show.note(), **choices)
    show.result(done, asked=False)
    return 0
