"""`plan`: decide, write nothing but the plan."""

from __future__ import annotations

from typing import Any

import click

from ckptsurgeon import api
from ckptsurgeon.api._options import facts, refuse_idle
from ckptsurgeon.cli import options
from ckptsurgeon.cli.files import write_json
from ckptsurgeon.cli.output import Show
from ckptsurgeon.planning import planfile
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.views import text


@click.command("plan", cls=options.RuleCommand, short_help="Decide what every key gets; write nothing but the plan.")
@click.argument("paths", nargs=-1, required=True, metavar="CKPT... TARGET")
@options.deciding
@click.option("-o", "--output", metavar="PLAN.JSON", help="Where to write the plan.")
@click.option("--full", is_flag=True, help="Digest all data, so that apply notices any change; reads whole files.")
@options.overwrite
@options.limit
@options.shown
@options.ordered_rules
def command(
    paths: tuple[str, ...],
    rules: tuple[Rule | str, ...],
    average: bool,
    weights: str | None,
    output: str | None,
    overwrite: bool,
    show: Show,
    **choices: Any,
) -> int:
    """Decide what every key gets, and why. One path alone is converted.

    \b
    ckptsurgeon plan net.pt model:Net -o plan.json    review it, commit it
    ckptsurgeon apply plan.json -o merged.pt          refused when it is stale
    """
    sources, target = split(paths, average)
    refuse_idle(facts(output=output), overwrite=overwrite)
    note = show.note()
    made = api.plan(sources, target, rules=rules, average=mean(average, weights), note=note, **choices)
    if output is not None:
        write_json(output, planfile.to_json(made), overwrite, note)
        note(f"wrote {output}; follow it with: ckptsurgeon apply {output} -o OUT")
    show.answer(lambda: text.plan(made, show.verbose, show.width), lambda: planfile.to_json(made))
    return 0


def split(paths: tuple[str, ...], average: bool) -> tuple[list[str], str | None]:
    """Sources and target: the last of several paths is the target; one alone has none, and neither has an average."""
    return ([*paths[:-1]], paths[-1]) if len(paths) > 1 and not average else ([*paths], None)


def mean(average: bool, weights: str | None) -> list[float] | bool | None:
    """What `--average` and `--weights` ask for."""
    refuse_idle(facts(average=average), weights=weights)
    if weights is None:
        return average or None
    try:
        return [float(weight) for weight in weights.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--weights are numbers with commas between them, as in 3,1; not {weights!r}") from error
