"""`diff`: how much of a target a checkpoint covers."""

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
@click.option(
    "--only",
    metavar="WHAT[,WHAT...]",
    help="Show only these: matched, mismatched, missing, extra, dropped, dtype. JSON has all.",
)
@click.option("--stat", is_flag=True, help="Show how many keys of each module match, are missing, extra or mismatched.")
@click.option(
    "--name-status",
    is_flag=True,
    help="Show a letter and a key a line, as git does: M another shape, A only in TARGET, D only in CKPT, T another dtype; "
    "with -v also = matched and ! dropped by a rule.",
)
@click.option("--exit-code", is_flag=True, help="Exit 1 when they differ in any way, a dtype included.")
@options.strict
@options.limit
@options.tabled
@options.ordered_rules
def command(
    checkpoint: str,
    target: str,
    rules: tuple[Rule | str, ...],
    exit_code: bool,
    strict: bool,
    only: str | None,
    stat: bool,
    name_status: bool,
    show: options.Show,
    **choices: Any,
) -> int:
    """What matches, what is missing, extra or mismatched, and how much of TARGET that covers.

    A key that --drop names is not extra. The last line is the command to run next.
    """
    from ckptsurgeon import api

    how = _how(show, only, stat, name_status)
    result = api.diff(checkpoint, target, rules=rules, note=show.note(), **choices)
    show.result(result, **how)
    return int((exit_code and not result.same) or (strict and bool(result.loose)))


def _how(show: options.Show, only: str | None, stat: bool, name_status: bool) -> dict[str, Any]:
    """The arguments of a diff's views; a usage error for options that exclude each other."""
    given = [name for name, value in (("--only", only), ("--stat", stat), ("--name-status", name_status)) if value]
    if stat and len(given) > 1:
        raise click.UsageError(f"{given[0] if given[0] != '--stat' else given[1]} and --stat are two forms of output; give one")
    if show.json and not stat and given:
        raise click.UsageError(f"--json has every list, so that {given[0]} would do nothing; leave it out")
    if show.table and name_status:
        raise click.UsageError("--table and --name-status are two forms of output; give one")
    view_options: dict[str, Any] = {"stat": True} if stat else {}
    if only is not None:
        from ckptsurgeon.views.counted import categories

        view_options["only"] = categories([word.strip() for word in only.split(",")])
    return view_options | ({"name_status": True} if name_status else {})
