"""`help`: the help of a command, as its `--help` shows it."""

from __future__ import annotations

import click

from ckptsurgeon.cli import options


@click.command("help", cls=options.Command)
@click.argument("name", required=False, metavar="[COMMAND]")
@click.pass_context
def command(ctx: click.Context, name: str | None) -> int:
    """Show how a command is used, or list the commands."""
    program = ctx.find_root()
    if name is None:
        click.echo(program.get_help())
        return 0
    group = program.command
    assert isinstance(group, click.Group)
    _, shown, _ = group.resolve_command(program, [name])
    assert shown is not None
    click.echo(shown.get_help(click.Context(shown, program, name)))
    return 0
