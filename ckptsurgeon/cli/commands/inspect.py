"""`inspect`: what is inside a checkpoint, without running any of it."""

from __future__ import annotations

import click

from ckptsurgeon import api
from ckptsurgeon.api import _opening
from ckptsurgeon.cli import options
from ckptsurgeon.cli.output import Show
from ckptsurgeon.views import json, text


@click.command("inspect", short_help="What is inside a checkpoint, without running any of it.")
@click.argument("checkpoint", metavar="CKPT")
@options.root
@options.limit
@options.shown
def command(checkpoint: str, root: str | None, show: Show) -> int:
    """What is inside a checkpoint, without running any of it and without reading its data."""
    found = api.inspect(checkpoint)
    chosen = None if root is None else _opening.open_source(found, root=root, parts=True)
    show.answer(lambda: text.archive(found, show.verbose, show.width, chosen), lambda: json.archive(found, chosen))
    return 0
