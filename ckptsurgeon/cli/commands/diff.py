"""`diff`: what of a target does a checkpoint cover?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptsurgeon.cli import options

if TYPE_CHECKING:
    from ckptsurgeon.rules.rules import Rule


@click.command("diff", cls=options.RuleCommand)
@click.argument("checkpoint", metavar="CKPT")
@click.argument("target", metavar="TARGET")
@options.mapping
@click.option("--exit-code", is_flag=True, help="Exit 1 when they differ in any way, a dtype included.")
@options.strict
@options.limit
@options.shown
@options.ordered_rules
def command(
    checkpoint: str, target: str, rules: tuple[Rule | str, ...], exit_code: bool, strict: bool, show: options.Show, **choices: Any
) -> int:
    """What matches, what is missing, extra or mismatched, and how much of TARGET that covers.

    A key that --drop names is not extra. The last line is the command to run next.
    """
    from ckptsurgeon import api

    found = api.diff(checkpoint, target, rules=rules, note=show.note(), **choices)
    show.result(found)
    return int((exit_code and not found.same) or (strict and bool(found.loose)))
