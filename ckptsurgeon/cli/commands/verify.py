"""`verify`: load it, prove it."""

from __future__ import annotations

from typing import Any

import click

from ckptsurgeon import api
from ckptsurgeon.cli import options
from ckptsurgeon.cli.output import Show
from ckptsurgeon.views import json, text


@click.command("verify", short_help="Load it strictly on a device; compare every tensor.")
@click.argument("checkpoint", metavar="CKPT")
@click.argument("target", metavar="TARGET")
@options.root
@options.device
@click.option("--input", "inputs", multiple=True, metavar="SHAPE", help="One forward pass in eval mode on 1x3x32x32, or 1x16:I64.")
@options.finite
@options.seed
@options.limit
@options.shown
def command(checkpoint: str, target: str, show: Show, **choices: Any) -> int:
    """Load CKPT strictly into a fresh TARGET on a device, and compare every tensor bit for bit with the file."""
    found = api.verify(checkpoint, target, note=show.note(), **choices)
    show.answer(lambda: text.verification(found, checkpoint, target, show.verbose, show.width), lambda: json.verification(found))
    return int(not found.ok)
