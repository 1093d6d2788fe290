"""`plan`: decide, write nothing but the plan."""

from __future__ import annotations

from typing import Any

import click

from ckptsurgeon import api
from ckptsurgeon.cli import options
from ckptsurgeon.cli.files import write_json
from ckptsurgeon.cli.output import Show
from ckptsurgeon.surgery import planfile
from ckptsurgeon.views import text


@click.command("plan", cls=options.RuleCommand)
@click.argument("paths", nargs=-1, required=True, metavar="CKPT... TARGET")
@options.deciding
@click.option("-o", "--output", metavar="PLAN.JSON", help="Where to write the plan.")
@options.overwrite
@options.shown
@click.pass_context
def command(ctx: click.Context, /, paths: tuple[str, ...], output: str | None, overwrite: bool, show: Show, **choices: Any) -> int:
    """Decide what every key gets, and write it down. One path alone is converted."""
    sources, target = split(paths)
    made = api.plan(sources, target, rules=ctx.meta["rules"], note=show.note(), **choices)
    if output is not None:
        write_json(output, planfile.to_json(made), overwrite)
    show.answer(lambda: text.plan(made, show.verbose), lambda: planfile.to_json(made))
    return 0


def split(paths: tuple[str, ...]) -> tuple[list[str], str | None]:
    """Sources and target: the last of several paths is the target; one alone has none."""
    return ([*paths[:-1]], paths[-1]) if len(paths) > 1 else ([*paths], None)
