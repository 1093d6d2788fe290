"""`groups`: the parameter groups that training would get, from a merged file's own record."""

from __future__ import annotations

from typing import Any

import click

from ckptsurgeon import api
from ckptsurgeon.cli import options
from ckptsurgeon.cli.output import Show
from ckptsurgeon.errors import NoRecordError
from ckptsurgeon.views import json, text


@click.command("groups", short_help="Parameter groups: what is fresh learns at its own rate.")
@click.argument("checkpoint", metavar="CKPT")
@click.argument("target", metavar="TARGET")
@click.option("--lr", type=float, required=True, help="For what was transferred.")
@click.option("--fresh-lr", type=float, help="For what is fresh.")
@click.option("--fresh-scale", type=float, help="For what is fresh, as a multiple of --lr.")
@click.option("--weight-decay", type=float, help="For all groups.")
@click.option("--override", "overrides", nargs=2, type=(str, float), multiple=True, metavar="PATTERN LR", help="A rate by pattern.")
@options.shown
def command(checkpoint: str, target: str, lr: float, overrides: tuple[tuple[str, float], ...], show: Show, **rates: Any) -> int:
    """Parameter groups for fine-tuning: what CKPT records as fresh learns at its own rate."""
    rows = api.groups(checkpoint, target, lr=lr, overrides=dict(overrides), note=show.note(), **rates)
    if not overrides and all(row["name"] != "fresh" for row in rows):
        raise NoRecordError(
            "records that nothing trainable is fresh", path=checkpoint, hint="give rates by pattern: --override 'fc3.*' 1e-2"
        )
    show.answer(lambda: text.groups(rows, show.verbose, show.width), lambda: json.groups(rows))
    return 0
