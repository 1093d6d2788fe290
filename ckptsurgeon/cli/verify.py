"""`verify`: load it, prove it."""

from __future__ import annotations

import click

from ckptsurgeon import api
from ckptsurgeon.cli import options
from ckptsurgeon.cli.output import Show
from ckptsurgeon.views import json


@click.command("verify")
@click.argument("checkpoint", metavar="CKPT")
@click.argument("target", metavar="TARGET")
@options.root
@options.device
@click.option("--input", "inputs", multiple=True, metavar="SHAPE", help="One forward pass on 1x3x32x32 (or 1x16:I64), in eval mode.")
@options.finite
@options.seed
@options.shown
def command(
    checkpoint: str, target: str, root: str | None, device: str, inputs: tuple[str, ...], finite: bool, seed: int, show: Show
) -> int:
    """Load CKPT strictly into a fresh TARGET on a device, and compare every tensor bit for bit with the file."""
    found = api.verify(checkpoint, target, root=root, device=device, finite=finite, inputs=inputs, seed=seed, note=show.note())
    show.answer(lambda: found.text, lambda: json.verification(found))
    if not found.ok and not show.json:
        click.echo(f"{checkpoint} does not load into {target} as it should", err=True)
    return int(not found.ok)
