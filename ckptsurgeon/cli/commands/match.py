"""`match`: find the mapping between two implementations, and write it as rules that a person reviews."""

from __future__ import annotations

from typing import Any

import click

from ckptsurgeon import api
from ckptsurgeon.api._options import facts, refuse_idle
from ckptsurgeon.cli import options
from ckptsurgeon.cli.files import write_text
from ckptsurgeon.cli.output import Show, show_error
from ckptsurgeon.matching.proposals.propose import LEAST
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.views import json, text


@click.command("match", cls=options.RuleCommand, short_help="Propose a mapping between two implementations.")
@click.argument("checkpoint", metavar="CKPT")
@click.argument("target", metavar="TARGET")
@options.known
@options.accept_uncertain
@click.option("-o", "--output", metavar="RULES.TOML", help="Where to write the rules.")
@options.overwrite
@click.option(
    "--min-coverage",
    type=click.FloatRange(0, 1),
    default=LEAST,
    show_default=True,
    metavar="SHARE",
    help="Least share of one side's tensors and elements that must be matched.",
)
@click.option("--values", is_flag=True, help="Look at the values too: they tell a norm from a bias, never q from k from v.")
@click.option("--forward", metavar="MODULE:FUNCTION", help="Run both models on what this function of yours returns, and compare outputs.")
@click.option("--source-model", metavar="SPEC", help="For --forward: the model that CKPT is of, such as module:Net.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, max_open=True),
    show_default="1e-4",
    metavar="SHARE",
    help="For --forward: by how much of their greatest value outputs may differ.",
)
@click.option("--strict", is_flag=True, help="Exit 1 when anything is uncertain.")
@options.limit
@options.shown
@options.ordered_rules
def command(
    checkpoint: str,
    target: str,
    rules: tuple[Rule | str, ...],
    output: str | None,
    overwrite: bool,
    min_coverage: float,
    strict: bool,
    show: Show,
    **choices: Any,
) -> int:
    """Find which tensor of CKPT is which of TARGET, where names, nesting, numbering, order and layout differ.

    \b
    ckptsurgeon match a.pt other:ViT                   look
    ckptsurgeon match a.pt other:ViT -o rules.toml     write, read, commit it
    ckptsurgeon merge a.pt other:ViT -o out.pt --rules rules.toml

    What is uncertain is shown with its runner-up and not applied. What you know already is said by --rename, --drop and the like.
    """
    note = show.note()
    refuse_idle(facts(output=output), overwrite=overwrite)
    found = api.match(checkpoint, target, rules=rules, note=note, **choices)
    refusal = found.refusal(min_coverage)
    differs = found.forward is not None and not found.forward.same
    if output is not None and refusal is None and not differs:
        write_text(output, found.toml, overwrite, note)
        note(f"wrote {output}: {len(found.rules)} rules")
    show.answer(
        lambda: text.matching(found, show.verbose, show.width, output if refusal is None and not differs else None),
        lambda: json.matching(found, "" if refusal is None else refusal.message),
    )
    if refusal is not None and not show.json:
        show_error(refusal, as_json=False)
    return int(refusal is not None or differs or (strict and len(found.applied) < len(found.links)))
