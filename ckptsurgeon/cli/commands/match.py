"""`match`: find the mapping between two implementations, and write it as rules to review."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptsurgeon.cli import options

if TYPE_CHECKING:
    from ckptsurgeon.rules.rules import Rule


@click.command("match", cls=options.RuleCommand)
@click.argument("checkpoint", metavar="CKPT")
@click.argument("target", metavar="TARGET")
@options.known
@options.accept_uncertain
@options.layout
@click.option("-o", "--output", metavar="RULES.TOML", help="Where to write the rules.")
@options.overwrite
@click.option(
    "--min-coverage",
    type=options.Number(0, 1),
    metavar="SHARE",
    help="Least share of one side's tensors and elements that must be matched; 0.5 if not given.",
)
@click.option("--values", is_flag=True, help="Look at the values too: they tell a norm from a bias, never q from k from v.")
@click.option("--forward", metavar="MODULE:FUNCTION", help="Run both models on what this function of yours returns, and compare outputs.")
@click.option("--source-model", metavar="SPEC", help="For --forward: the model that CKPT is of, such as module:Net.")
@click.option(
    "--tolerance",
    type=options.Number(0, 1, max_open=True),
    metavar="SHARE",
    help="For --forward: by how much of their greatest value outputs may differ; 1e-4 if not given.",
)
@options.strict
@options.limit
@options.tabled
@options.ordered_rules
def command(
    checkpoint: str,
    target: str,
    rules: tuple[Rule | str, ...],
    output: str | None,
    overwrite: bool,
    min_coverage: float | None,
    strict: bool,
    show: options.Show,
    **choices: Any,
) -> int:
    """Find which tensor of CKPT is which of TARGET, where names, nesting, numbering, order and layout differ.

    The rules that -o writes are for you to read and commit; merge takes them by --rules. An uncertain link is shown with its runner-up and
    not applied. Give what you know already by --rename, --drop and the like.
    """
    from dataclasses import replace

    from ckptsurgeon import api

    note = show.note()
    if output is not None or overwrite:
        from ckptsurgeon.cli.files import refuse_output

        refuse_output(output, overwrite, "rules.toml")
    proposal = api.match(checkpoint, target, rules=rules, note=note, **choices)
    if min_coverage is not None:
        proposal = replace(proposal, asked=(*proposal.asked, ("min-coverage", f"{min_coverage:g}")))
    hint = "or ask for less: --min-coverage 0.1"
    refusal = proposal.refusal(less=hint) if min_coverage is None else proposal.refusal(min_coverage, hint)
    differs = proposal.forward is not None and not proposal.forward.same
    if refusal is not None:
        proposal = replace(proposal, refused=refusal.message)
    elif output is not None and not differs:
        from ckptsurgeon.cli.files import write_text
        from ckptsurgeon.views.text.words import count

        write_text(output, proposal.toml, overwrite, note)
        note(f"wrote {output}: {count(len(proposal.rules), 'rule')}")
        proposal = replace(proposal, written=output)
    show.result(proposal, asked=proposal.written is None)
    if refusal is not None and not show.json:
        from ckptsurgeon.cli.commands import merge
        from ckptsurgeon.cli.endings import say_options
        from ckptsurgeon.cli.output import show_error

        say_options(refusal, merge.command, click.get_current_context().command)
        show_error(refusal, as_json=False)
    return int(refusal is not None or differs or (strict and bool(proposal.loose)))
