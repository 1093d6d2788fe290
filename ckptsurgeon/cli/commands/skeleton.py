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
    """Write a target's names and shapes as JSON, so that `check --against` can compare files with it without torch."""
    from ckptsurgeon import api
    from ckptsurgeon.cli.files import refuse_output, write_json
    from ckptsurgeon.views.text import merge as text

    refuse_output(output, overwrite, "net.json")
    target_skeleton = api.skeleton(target, note=show.note())
    value = target_skeleton.to_dict()
    write_json(output, value, overwrite, show.note())
    show.answer(lambda: text.skeleton(target_skeleton, output), lambda: value, asked=False)
    return 0
