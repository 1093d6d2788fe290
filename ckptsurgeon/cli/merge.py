"""`merge`: plan, apply and verify in one."""

from __future__ import annotations

from typing import Any

import click

from ckptsurgeon import api
from ckptsurgeon.cli import options
from ckptsurgeon.cli.output import Show
from ckptsurgeon.cli.plan import split
from ckptsurgeon.surgery import planfile
from ckptsurgeon.views import json, text

DECIDING = ("root", "dtype", "allow_cast", "seed", "min_coverage", "strict")


@click.command("merge", cls=options.RuleCommand)
@click.argument("paths", nargs=-1, required=True, metavar="CKPT... TARGET")
@options.deciding
@options.writing
@click.option("--dry-run", is_flag=True, help="Print the plan that merge would follow, and write nothing.")
@options.shown
@click.pass_context
def command(ctx: click.Context, /, paths: tuple[str, ...], dry_run: bool, show: Show, **choices: Any) -> int:
    """Take what fits, keep or initialise the rest, write it, and prove it before the file takes its name.

    One path alone is converted to OUT's format.
    """
    sources, target = split(paths)
    rules, note = ctx.meta["rules"], show.note()
    if dry_run:
        made = api.plan(sources, target, rules=rules, note=note, **{name: choices[name] for name in DECIDING})
        show.answer(lambda: text.plan(made, show.verbose), lambda: planfile.to_json(made))
        return 0
    done = api.merge(sources, target, rules=rules, note=note, **choices)
    show.answer(lambda: text.report(done, show.verbose), lambda: json.report(done))
    return 0
