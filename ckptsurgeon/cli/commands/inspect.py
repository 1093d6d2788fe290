"""`inspect`: what is inside a checkpoint, without running any of it."""

from __future__ import annotations

import click

from ckptsurgeon.cli import options


@click.command("inspect", cls=options.Command)
@click.argument("checkpoint", metavar="CKPT")
@options.root
@options.limit
@options.shown
def command(checkpoint: str, root: str | None, show: options.Show) -> int:
    """What is inside a checkpoint, without running any of it and without reading its data."""
    from ckptsurgeon import api

    found = api.inspect(checkpoint)
    if root is not None:
        from dataclasses import replace

        from ckptsurgeon.api._opening import open_source

        found = replace(found, chosen=open_source(found, root=root, parts=True))
    show.result(found)
    return 0
