"""`apply`: do what a plan.json says."""

from __future__ import annotations

from typing import Any

import click

from ckptsurgeon import api
from ckptsurgeon.cli import options
from ckptsurgeon.cli.output import Show
from ckptsurgeon.views import json, text


@click.command("apply", short_help="Do what a plan says, if nothing has changed since.")
@click.argument("plan", metavar="PLAN.JSON")
@options.writing
@options.limit
@options.shown
def command(plan: str, show: Show, **choices: Any) -> int:
    """Do what was decided; refuse a plan whose source or target has changed since."""
    done = api.apply(plan, note=show.note(), **choices)
    show.answer(lambda: text.report(done, show.verbose, show.width), lambda: json.report(done))
    return 0
