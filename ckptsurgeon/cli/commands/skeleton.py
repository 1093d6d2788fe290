"""`skeleton`: save a target's names, dtypes and shapes."""

from __future__ import annotations

import click

from ckptsurgeon.cli import options


@click.command("skeleton", cls=options.Command)
@click.argument("target", metavar="TARGET")
@options.output
@options.overwrite
@options.limit
@options.shown
def command(target: str, output: str, overwrite: bool, show: options.Show) -> int:
    """Write a target's names and shapes as JSON, so that a gate can hold files against it without torch."""
    from ckptsurgeon import api
    from ckptsurgeon.cli.files import refuse_taken, write_json
    from ckptsurgeon.views.text import merge as text

    refuse_taken(output, overwrite)
    found = api.skeleton(target, note=show.note())
    value = found.to_dict()
    write_json(output, value, overwrite, show.note())
    show.answer(lambda: text.skeleton(found, output), lambda: value, asked=False)
    return 0
