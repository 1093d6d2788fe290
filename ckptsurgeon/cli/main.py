"""The entry point: runs a command, and turns every exception into one message and an exit code. Bad input never gives a traceback."""

from __future__ import annotations

import shlex
import signal
import sys
import traceback
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ckptsurgeon import __version__
from ckptsurgeon.cli.endings import as_checkpoint_error, as_options, debug, say_options, with_traceback
from ckptsurgeon.cli.output import StdoutError, color, flush, lose_stdout, open_streams, show_error, show_usage_error, tell
from ckptsurgeon.errors import CheckpointError, InternalError
from ckptsurgeon.regular_expressions import one_child

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

USAGE, INTERRUPTED, TERMINATED = 2, 130, 143


# The commands in the order of use, each a module of `commands`, with its line in `--help`.
COMMANDS = {
    "inspect": "What is inside a checkpoint, without running any of it.",
    "diff": "What matches, is missing, extra or mismatched.",
    "match": "Propose a mapping between two implementations.",
    "plan": "Decide what every key gets; write nothing but the plan.",
    "apply": "Do what a plan says, if nothing has changed since.",
    "merge": "plan, apply and verify in one.",
    "verify": "Load it strictly on a device; compare every tensor.",
    "check": "The gate: are files readable, safe, whole, and do they fit?",
    "skeleton": "Save a target's names and shapes, for check --against.",
    "groups": "Parameter groups: what is fresh learns at its own rate.",
    "adapters": "The adapters and schemes that rules can name.",
    "guide": "The manual: a page for each topic.",
    "completion": "Print the script that completes words in bash, zsh or fish.",
    "help": "Show how a command is used.",
}
_NOT_IN_GUIDE = {"guide", "completion", "help"}  # every other command has a page in the guide


class Flow(click.Group):
    """Lists its commands from the table, and imports only the one that is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use."""
        return list(COMMANDS)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Two examples, then what the program is for."""
        from ckptsurgeon.cli.help_pages import write_examples

        write_examples("", formatter)
        super().format_help_text(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands and their lines."""
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name, or an option."""
        from click.shell_completion import CompletionItem

        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        return [CompletionItem(name, help=words) for name, words in COMMANDS.items() if name.startswith(incomplete)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command of a name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"ckptsurgeon.cli.commands.{cmd_name}").command
        command.short_help = COMMANDS[cmd_name]
        command.epilog = None if cmd_name in _NOT_IN_GUIDE else f"Read more: ckptsurgeon guide {cmd_name}"
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first word names; if there is none, the error names close ones."""
        if ctx.resilient_parsing:  # a shell completes
            return super().resolve_command(ctx, args)
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            from ckptsurgeon.cli.slips import no_command

            if words := no_command(args[0], [*COMMANDS]):
                ctx.fail(words)
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and any(word[:1] == "-" and word[1:3].isalpha() and len(word) > 2 for word in rest):
            from ckptsurgeon.cli.slips import one_dash

            if words := one_dash(rest, command):
                raise click.UsageError(words, click.Context(command, ctx, name))
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors of the library that name parameters are rewritten to name the command's options."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            command = None if error.ctx is not None else self.get_command(ctx, ctx.invoked_subcommand or "")
            if command is not None:  # click's parser does not say whose option lacks its value
                error.ctx = click.Context(command, ctx, command.name)
            raise
        except CheckpointError as error:
            say_options(error, self.get_command(ctx, "merge"), self.get_command(ctx, ctx.invoked_subcommand or ""))
            raise


@click.group(
    cls=Flow,
    invoke_without_command=True,
    epilog="Read more: ckptsurgeon guide",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", prog_name="ckptsurgeon")
@color
@debug
@click.pass_context
def cli(ctx: click.Context) -> int:
    """PyTorch checkpoint surgery: see what fits, plan it, merge it, prove that it loads.

    \b
    CKPT is a file, or a Hugging Face folder. TARGET is one of
      module:Net, path/to/file.py:Net                  a class, function or model
      'module:factory(num_classes=2)'                  a call with literals
      net.json                                         a saved skeleton
      other.pt                                         another checkpoint
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        return USAGE
    return 0


class Terminated(BaseException):
    """SIGTERM as an exception, so that temporary files are removed. Not SystemExit, which user code may raise."""


def _terminated(_signal: int, _frame: object) -> NoReturn:
    raise Terminated


_interrupts: list[int] = []  # remembered here, since Python drops an exception that is raised in a finalizer or callback


def _interrupted(number: int, _frame: object) -> NoReturn:
    _interrupts.append(number)
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    can_write = open_streams()
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, _interrupted)
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's warning; NumPy is not needed
    _held = one_child()  # for all regular expressions of this call
    code = _run("--json" in sys.argv) if can_write else _no_stdout()
    if _interrupts and code != INTERRUPTED:
        tell("interrupted")
        code = INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done: an interrupt now would only print a traceback at exit
    sys.exit(code)


def _no_stdout() -> int:
    show_error(StdoutError("is closed, and the answer is written there; nothing was done", path="stdout", hint="add: > /dev/null"), False)
    return USAGE


def _tell_notes(error: BaseException) -> None:
    """Print the notes that the interrupted code added to the exception."""
    cause = error if hasattr(error, "__notes__") else error.__context__
    for words in getattr(cause, "__notes__", ()):
        tell(f"note: {as_options(words, {'resume': '--resume'})}")


def _run(as_json: bool) -> int:
    try:
        code = cli.main(prog_name="ckptsurgeon", standalone_mode=False)
        flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        show_usage_error(error, as_json)
    except (KeyboardInterrupt, click.Abort) as error:
        _tell_notes(error)
        tell("interrupted")
        return INTERRUPTED
    except Terminated as error:
        _tell_notes(error)
        return TERMINATED
    except SystemExit:  # click raises it when the reader of stdout has closed the pipe
        lose_stdout()
        return 0
    except BaseException as error:  # noqa: BLE001 - the last handler, which turns any error into a message
        if with_traceback():
            tell("".join(traceback.format_exception(error)).rstrip())
        ended = as_checkpoint_error(error)
        if isinstance(ended, InternalError):
            words = [word for word in sys.argv[1:] if word != "--debug"]
            ended.hint = f"send them what this shows: {shlex.join(['ckptsurgeon', '--debug', *words])}"
        show_error(ended, as_json)
        return ended.exit_code
    return USAGE
