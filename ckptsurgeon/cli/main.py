"""The entry point: runs a command, and turns whatever ends it into one message and an exit code. Never a traceback for a bad input."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

import click

from ckptsurgeon.cli import apply, check, diff, groups, inspect, merge, plan, skeleton, verify
from ckptsurgeon.cli.output import show_error, show_usage_error
from ckptsurgeon.errors import CheckpointError, UnreadableError
from ckptsurgeon.version import VERSION

USAGE, INTERRUPTED, TERMINATED = 2, 130, 143


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, prog_name="ckptsurgeon")
def cli() -> None:
    """PyTorch checkpoint surgery: see what fits, plan it, merge it, prove that it loads.

    \b
    TARGET is module:Net, path/to/file.py:Net, module:factory(num_classes=2), a skeleton or another checkpoint.
    Start with:  ckptsurgeon diff CKPT TARGET
    """


for command in (inspect, diff, plan, apply, merge, verify, check, skeleton, groups):
    cli.add_command(command.command)


def _terminated(_signal: int, _frame: object) -> NoReturn:
    sys.exit(TERMINATED)  # as an exception, so that temporary files are taken away


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    signal.signal(signal.SIGTERM, _terminated)
    as_json = "--json" in sys.argv
    try:
        code = cli.main(standalone_mode=False)
    except CheckpointError as error:
        show_error(error, as_json)
        code = error.exit_code
    except click.ClickException as error:
        show_usage_error(error, as_json)
        code = USAGE
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        code = INTERRUPTED
    except MemoryError:
        show_error(UnreadableError("there is not enough memory for this", hint="close other programs, or use a larger machine"), as_json)
        code = USAGE
    sys.exit(code if isinstance(code, int) else 0)
