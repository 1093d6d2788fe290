"""`completion`: prints click's script by which a shell completes commands, options, keys, roots and the like."""

from __future__ import annotations

import click

from ckptsurgeon.cli import options


@click.command("completion", cls=options.Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> int:
    """Print the script that completes commands, options, files, keys, roots, adapters, schemes and codes in a shell.

    \b
    eval "$(ckptsurgeon completion bash)"    bash: in ~/.bashrc
    eval "$(ckptsurgeon completion zsh)"     zsh: in ~/.zshrc
    ckptsurgeon completion fish | source     fish: in ~/.config/fish/config.fish

    Keys and roots are those of the checkpoint on the command line. Only its header is read.
    """
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(ctx.find_root().command, {}, "ckptsurgeon", "_CKPTSURGEON_COMPLETE").source())
    return 0
