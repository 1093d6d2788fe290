"""`skeleton`: save a target's names, dtypes and shapes."""

from __future__ import annotations

import click

from ckptsurgeon import api
from ckptsurgeon.cli import options
from ckptsurgeon.cli.files import write_json
from ckptsurgeon.cli.output import Show
from ckptsurgeon.formats.plain import skeleton
from ckptsurgeon.views import text


@click.command("skeleton", short_help="Save a target's names and shapes, for check --against.")
@click.argument("target", metavar="TARGET")
@options.output
@options.overwrite
@options.limit
@options.shown
def command(target: str, output: str, overwrite: bool, show: Show) -> int:
    """Write a target's names and shapes as JSON, so that a gate can hold files against it without torch."""
    found = api.skeleton(target, note=show.note())
    value = skeleton.to_json(found)
    write_json(output, value, overwrite, show.note())
    show.answer(lambda: text.skeleton(found, output), lambda: value)
    return 0
