"""`check`: the gate for pre-commit and CI."""

from __future__ import annotations

import click

from ckptsurgeon import api
from ckptsurgeon.cli import options
from ckptsurgeon.cli.output import Show
from ckptsurgeon.views import json, text


@click.command("check", short_help="The gate: are files readable, safe, whole, and do they fit?")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--against", metavar="TARGET", help="What every file must fit: a skeleton (no torch needed), a model, a checkpoint.")
@options.finite
@options.root
@options.limit
@options.shown
def command(paths: tuple[str, ...], against: str | None, finite: bool, root: str | None, show: Show) -> int:
    """Are the files readable, safe, whole, and do they fit? Exit 1 when anything is found."""
    found = api.check(paths, against=against, finite=finite, root=root, note=show.note())
    show.answer(lambda: text.check(found, show.verbose), lambda: json.check(found))
    return int(not found.ok)
