"""`inspect`: what is inside a checkpoint, without running any of it."""

from __future__ import annotations

from typing import Any

import click

from ckptsurgeon.cli import options


@click.command("inspect", cls=options.Command)
@click.argument("checkpoint", metavar="CKPT")
@click.argument("patterns", nargs=-1, metavar="[PATTERN...]")
@options.root
@click.option(
    "--sort",
    type=click.Choice(["file", "name", "size"]),
    default="file",
    show_default=True,
    help="The order of tensors or modules: the file's, by name, or the largest first, with sizes.",
)
@click.option("--tree", is_flag=True, help="Show modules, each with its tensors, elements, size and share of all bytes.")
@click.option("--depth", type=options.Integer(min=1), metavar="N", show_default="3", help="With --tree, how many levels of modules.")
@options.limit
@options.tabled
def command(checkpoint: str, patterns: tuple[str, ...], show: options.Show, **choices: Any) -> int:
    """What is inside a checkpoint, without running any of it and without reading its data.

    With patterns, only tensors whose keys match one are shown: 'fc.*', 'encoder.**.bias', 'h.{0..3}.**'.
    """
    from ckptsurgeon import api

    show.result(api.inspect(checkpoint, patterns, **choices))
    return 0
