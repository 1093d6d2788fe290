"""`plan`: decide, write nothing but the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptsurgeon.cli import options

if TYPE_CHECKING:
    from ckptsurgeon.rules.rules import Rule


@click.command("plan", cls=options.RuleCommand)
@click.argument("paths", nargs=-1, required=True, metavar="CKPT... TARGET")
@options.deciding
@click.option("-o", "--output", metavar="PLAN.JSON", help="Where to write the plan.")
@click.option("--full", is_flag=True, help="Digest all data, so that apply notices any change; reads whole files.")
@options.overwrite
@options.max_shard_size
@options.limit
@options.tabled
@options.ordered_rules
def command(
    paths: tuple[str, ...],
    rules: tuple[Rule | str, ...],
    average: bool,
    weights: str | None,
    output: str | None,
    overwrite: bool,
    show: options.Show,
    **choices: Any,
) -> int:
    """Decide what every key gets, and why. One path alone is converted.

    Review the plan and commit it; `ckptsurgeon apply` does what it says, and refuses it once a file or the model has changed.
    """
    from ckptsurgeon import api

    sources, target = options.split(paths, average)
    if output is not None or overwrite:
        from ckptsurgeon.cli.files import refuse_output

        refuse_output(output, overwrite, "plan.json")
    note = show.note()
    decided = api.plan(sources, target, rules=rules, average=options.mean(average, weights), note=note, **choices)
    if output is not None:
        import shlex

        from ckptsurgeon.cli.files import write_json
        from ckptsurgeon.cli.slips import free_name

        write_json(output, decided.to_dict(), overwrite, note)
        note(f"wrote {output}; follow it with: {shlex.join(['ckptsurgeon', 'apply', output, '-o', free_name('apply', sources)])}")
    show.result(decided, asked=output is None)
    return 0
