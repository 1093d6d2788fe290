"""`groups`: the parameter groups for training, from a merged file's record of what is fresh."""

from __future__ import annotations

import shlex
from typing import Any

import click

from ckptsurgeon.cli import options


@click.command("groups", cls=options.Command)
@click.argument("checkpoint", metavar="CKPT")
@click.argument("target", metavar="TARGET")
@click.option("--lr", type=options.Number(0), metavar="RATE", required=True, help="The learning rate of what was transferred.")
@click.option("--fresh-lr", type=options.Number(0), metavar="RATE", help="The learning rate of what is fresh.")
@click.option("--fresh-scale", type=options.Number(0), metavar="FACTOR", help="The learning rate of what is fresh, as a multiple of --lr.")
@click.option("--weight-decay", type=options.Number(0), metavar="DECAY", help="The weight decay of all groups.")
@click.option(
    "--override", "overrides", nargs=2, type=(str, float), multiple=True, metavar="PATTERN RATE", help="A rate for the keys that match."
)
@click.option(
    "--layer-decay",
    type=options.Number(0),
    metavar="FACTOR",
    help="Layer by layer: what was transferred learns at --lr times FACTOR to the power of its depth below the head.",
)
@click.option("--layers", multiple=True, metavar="PATTERN", help="With --layer-decay, what a layer is: 'encoder.layer.{i}.**'.")
@click.option("--no-decay", is_flag=True, help="No weight decay for biases, parameters of one dimension, norms and embeddings.")
@click.option("--no-decay-for", multiple=True, metavar="PATTERN", help="No weight decay for these.")
@click.option(
    "--partial",
    type=click.Choice(["transferred", "fresh"]),
    help="What partly transferred tensors, such as a grown vocabulary, count as; transferred if not given.",
)
@options.limit
@options.tabled
def command(
    checkpoint: str,
    target: str,
    lr: float,
    overrides: tuple[tuple[str, float], ...],
    layer_decay: float | None,
    layers: tuple[str, ...],
    no_decay: bool,
    no_decay_for: tuple[str, ...],
    show: options.Show,
    **choices: Any,
) -> int:
    """Parameter groups for fine-tuning: what CKPT records as fresh learns at its own rate.

    Fresh parameters and overrides keep their rates under --layer-decay.
    """
    from ckptsurgeon import api
    from ckptsurgeon.errors import NoRecordError

    try:
        rows = api.groups(
            checkpoint,
            target,
            lr=lr,
            overrides=dict(overrides),
            layer_decay=layer_decay,
            layers=layers or None,
            no_decay=[no_decay, *no_decay_for],
            note=show.note(),
            **choices,
        )
    except NoRecordError as error:
        words = ["ckptsurgeon", "merge", checkpoint, target, "-o", "merged.pt"]
        error.hint = f"merge it first, which records what is fresh, and ask for the groups of merged.pt: {shlex.join(words)}"
        raise
    if not overrides and layer_decay is None and all(row["name"].split("/")[0] != "fresh" for row in rows):
        last = rows[-1]["params"][-1]
        pattern = f"{last.rpartition('.')[0]}.*" if "." in last else last
        raise NoRecordError(
            "records that nothing trainable is fresh",
            path=checkpoint,
            hint=f"give rates by pattern: {shlex.join(['--override', pattern, '1e-2'])}",
        )
    from ckptsurgeon.views import json, tables
    from ckptsurgeon.views.text import merge as text

    show.answer(
        lambda: text.groups(rows, show.verbose, show.width),
        lambda: json.groups(rows),
        table=lambda form: tables.groups(rows, form, show.verbose),
    )
    return 0
