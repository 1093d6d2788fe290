"""`merge`: plan, apply and verify in one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptsurgeon.cli import options

if TYPE_CHECKING:
    from ckptsurgeon.rules.rules import Rule


@click.command("merge", cls=options.RuleCommand)
@click.argument("paths", nargs=-1, required=True, metavar="CKPT... TARGET")
@options.deciding
@options.writing
@click.option("--with-optimizer", is_flag=True, help="Write a training checkpoint: the optimizer's state goes with the weights.")
@click.option("--optimizer", "optimizer_from", metavar="FILE", help="Take that state from a second file, such as optimizer.pt.")
@click.option(
    "--optimizer-names",
    metavar="FILE|model",
    callback=options.names,
    help="Whose the optimizer's positions are: a file of names, one a line or in JSON, or as the target model registers them.",
)
@click.option("--optimizer-root", metavar="ROOT", help="Where the checkpoint holds that state, such as optimizer_states.1.")
@click.option("--dry-run", is_flag=True, help="Print the plan that merge would follow, and write nothing.")
@options.limit
@options.tabled
@options.ordered_rules
def command(
    paths: tuple[str, ...],
    rules: tuple[Rule | str, ...],
    average: bool,
    weights: str | None,
    dry_run: bool,
    show: options.Show,
    **choices: Any,
) -> int:
    """Take what fits, keep or initialise the rest, write it, and prove it before the file takes its name.

    Rules hold in the order given; the first that matches a key wins. In a pattern * matches within a segment, ** across
    segments; {p} is one segment and {**rest} one or more, which a rename's result can use again; /…/ is a regular expression.
    """
    from ckptsurgeon import api

    sources, target = options.split(paths, average)
    choices |= {"average": options.mean(average, weights)}
    note = show.note()
    if dry_run:
        if choices["with_optimizer"] or choices["optimizer_from"] is not None:
            note("the plan is about the weights; what becomes of the optimizer's state is in the report of the merge itself")
        from ckptsurgeon.api._options import OutputOptions, RuleOptions, TrainingOptions, collect
        from ckptsurgeon.api._writing import refuse_idle_writing

        deciding = vars(collect(RuleOptions, {**choices, "rules": rules}))
        plan = api.plan(sources, target, note=note, max_shard_size=choices["max_shard_size"], **deciding)
        refuse_idle_writing(plan, collect(OutputOptions, choices), collect(TrainingOptions, choices), written=False)
        show.result(plan)
        return 0
    report = api.merge(sources, target, rules=rules, note=note, **choices)
    show.result(report, asked=False)
    return 0
