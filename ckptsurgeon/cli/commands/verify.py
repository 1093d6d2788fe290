"""`verify`: load a checkpoint into a fresh model, and compare."""

from __future__ import annotations

from typing import Any

import click

from ckptsurgeon.cli import options


@click.command("verify", cls=options.Command)
@click.argument("checkpoint", metavar="CKPT")
@click.argument("target", metavar="TARGET")
@options.root
@options.device
@click.option("--input", "inputs", multiple=True, metavar="SHAPE", help="One forward pass in eval mode on 1x3x32x32, or 1x16:I64.")
@options.finite
@options.seed
@options.conversions
@options.limit
@options.tabled
def command(checkpoint: str, target: str, show: options.Show, **choices: Any) -> int:
    """Load CKPT strictly into a fresh TARGET on a device, and compare every tensor bit for bit with the file."""
    from ckptsurgeon import api

    verification = api.verify(checkpoint, target, note=show.note(), **choices)
    show.result(verification, asked=not verification.ok)
    return int(not verification.ok)
