"""The messages for a malformed command line, and the command that was probably meant: a function for each kind of mistake.

Only checks which words are files; reads nothing. A command is offered only if all its words are known.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import click

from ckptsurgeon.dtypes import all_names, choice
from ckptsurgeon.hints import close_names, without_slip

# Other tools' names for commands, and the words of ckptsurgeon that do the same.
ALSO: Mapping[str, str] = MappingProxyType(
    {
        "info": "inspect",
        "show": "inspect",
        "ls": "inspect",
        "list": "inspect",
        "view": "inspect",
        "compare": "diff",
        "map": "match",
        "load": "verify",
        "test": "verify",
        "validate": "check",
        "lint": "check",
        "scan": "check",
        "convert": "merge",
        "save": "merge",
        "transfer": "merge",
        "average": "merge --average",
        "soup": "merge --average",
    }
)
_ALSO_VALUES = {
    "pt": "torch",
    "pth": "torch",
    "bin": "torch",
    "ckpt": "torch",
    "pytorch": "torch",
    "st": "safetensors",
    "sft": "safetensors",
}
_OUTPUTS = {"plan": "plan.json", "skeleton": "net.json", "match": "rules.toml"}  # what -o may be called; of others a checkpoint
_OUTPUT = "-o"
Meant = tuple[str, str | None]


def meant(error: click.ClickException, words: Sequence[str]) -> Meant:
    """The message of a usage error on one line, and the command that was meant, if it is known.

    Args:
        words: the words of the command line, without the program's name.

    >>> meant(click.UsageError("Missing  argument"), [])
    ('Missing argument', None)
    """
    for kind, say in _TABLE:
        if isinstance(error, kind) and (meaning := say(error, words)) is not None:
            return meaning
    return " ".join(error.format_message().split()), None


def _no_option(error: click.ClickException, words: Sequence[str]) -> Meant | None:
    """An unknown option: the one that was meant, close ones, or the commands that have it."""
    assert isinstance(error, click.NoSuchOption)
    name, context = error.option_name, error.ctx
    if context is None:
        return None
    if context.parent is None:  # before the command
        rest = [word for word in words if word != name]
        whole = _followed(context, [*rest, name])
        return (f"{name} stands after the command", whole) if whole is not None else None
    known = _options(context.command)
    meant = [option for option in known if _bare(option) == _bare(name)] or [option for option in known if option.startswith(name)][:1]
    meant = meant or [option for option in [without_slip(name, known)] if option is not None]
    if meant:
        position = next((index for index, word in enumerate(words) if word.partition("=")[0] == name), None)
        mended = [] if position is None else [*words[:position], words[position].replace(name, meant[0], 1), *words[position + 1 :]]
        return f"No such option {name!r}; is it {meant[0]}?", _followed(context.parent, mended)
    group = context.parent.command
    assert isinstance(group, click.Group)
    commands = {command_name: group.get_command(context.parent, command_name) for command_name in group.list_commands(context.parent)}
    with_option = [command_name for command_name, command in commands.items() if command is not None and name in _options(command)]
    if with_option:
        return f"{context.info_name} has no option {name!r}; {', '.join(with_option)} {'have' if len(with_option) > 1 else 'has'} it", None
    close = close_names(name, known)
    return (f"No such option {name!r}; is it {' or '.join(close)}?", None) if close else None


def _followed(context: click.Context, words: Sequence[str]) -> str | None:
    """The command line of these words, if they can be parsed; `context` is the program's."""
    group = context.command
    command = group.get_command(context, words[0]) if isinstance(group, click.Group) and words else None
    if command is None or {"-h", "--help"} & set(words):
        return None
    try:
        with command.make_context(words[0], list(words[1:]), context):
            return shlex.join(["ckptsurgeon", *words])
    except click.ClickException:
        return None


def _bare(option: str) -> str:
    return option.lstrip("-").replace("_", "-").lower()


def _options(command: click.Command) -> list[str]:
    return [name for param in command.params if isinstance(param, click.Option) for name in (*param.opts, *param.secondary_opts)]


def _missing(error: click.ClickException, words: Sequence[str]) -> Meant | None:
    """A missing -o, or a missing target."""
    assert isinstance(error, click.MissingParameter)
    param, context = error.param, error.ctx
    if param is None or context is None or context.parent is None or not words:
        return None
    from ckptsurgeon.models.target.slips import only_model

    message = " ".join(error.format_message().split())
    paths = context.params.get("paths") or [context.params[name] for name in ("checkpoint", "target", "plan") if context.params.get(name)]
    added: list[str] = []
    if isinstance(param, click.Option) and _OUTPUT in param.opts and paths:
        if words[-1] != paths[0] and is_new_file(words[-1]):  # OUT is there, without -o
            return message, _followed(context.parent, [*words[:-1], _OUTPUT, words[-1]])
        added = [_OUTPUT, free_name(words[0], paths)]
    elif param.name == "target" and paths and (target := only_model()) is not None:
        added = [target]
    return message, _followed(context.parent, [*words, *added]) if added else None


def is_new_file(word: str) -> bool:
    """Whether a word may be the name of a file that is to be written.

    >>> is_new_file("out.pt"), is_new_file("model:Net"), is_new_file("model.py")
    (True, False, False)
    """
    return bool(re.fullmatch(r"[^:()]+\.\w+", word)) and not os.path.exists(word) and not word.endswith(".py")


def free_name(command: str, paths: Sequence[str]) -> str:
    """A file name for the output that does not exist."""
    stem, suffix = os.path.splitext(_OUTPUTS.get(command, "merged.pt"))
    if command == "merge" and len(paths) == 1:
        stem, old = os.path.splitext(os.path.basename(os.path.normpath(paths[0])))
        suffix = ".safetensors" if old != ".safetensors" else suffix  # which is torch's
    number, name = 2, f"{stem}{suffix}"
    while os.path.exists(name):
        number, name = number + 1, f"{stem}_{number}{suffix}"
    return name


def _other(error: click.ClickException, words: Sequence[str]) -> Meant | None:
    """A file in place of the command, or another tool's name for one of the commands."""
    match = re.fullmatch(r"No such command '(.*?)'(?:\.|; is it .*)?", error.format_message(), re.DOTALL)
    if match is None or not words or words[0] != match[1]:
        return None
    message = f"No such command {words[0]!r}"
    program = error.ctx.find_root() if isinstance(error, click.UsageError) and error.ctx is not None else None
    if program is not None and isinstance(program.command, click.Group):
        command = without_slip(words[0], program.command.list_commands(program))
        if command is not None and words[0] not in ALSO:
            return f"{message}; is it {command}?", _followed(program, [command, *words[1:]])
    if words[0] in ALSO:
        return f"{message}; it is {ALSO[words[0]]}", shlex.join(["ckptsurgeon", *ALSO[words[0]].split(), *words[1:]])
    if os.path.exists(words[0]):
        paths = [word for word in words[1:] if not word.startswith("-")]
        command = "diff" if paths and len(words) == 2 else "inspect"
        return f"{message}; it is a file, and a command comes first", shlex.join(["ckptsurgeon", command, *words])
    return None


def _choice(error: click.ClickException, words: Sequence[str]) -> Meant | None:
    """A value that is none of an option's choices: the one that was meant."""
    assert isinstance(error, click.BadParameter)
    kind = error.param.type if error.param is not None else None
    match = re.search(r"'([^']*)' is not one of", error.format_message())
    if not isinstance(kind, click.Choice) or match is None or error.param is None:
        return None
    known = [str(value) for value in kind.choices]
    names = [*known, *(name for name in all_names() if choice(name) in known)] if error.param.name == "dtype" else known
    synonym = _ALSO_VALUES.get(match[1].lower().lstrip("."))
    close = [synonym] if synonym in known else close_names(match[1], names, 1)
    ending = f"; is it {close[0]}?" if close else ""
    return f"{' '.join(error.format_message().split()).rstrip('.')}{ending}", None


def _share(error: click.ClickException, words: Sequence[str]) -> Meant | None:
    """A percentage in place of a share."""
    message = " ".join(error.format_message().split()).rstrip(".")
    match = re.search(r": (?='.*%' is|.*<=1$)'?(\d\d?(?:\.\d+)?|100(?:\.0)?)%?'? is not", message)
    return (f"{message}; is it {float(match[1]) / 100:g}?", None) if match is not None else None


_TABLE: tuple[tuple[type[click.ClickException], Callable[[click.ClickException, Sequence[str]], Meant | None]], ...] = (
    (click.NoSuchOption, _no_option),
    (click.MissingParameter, _missing),
    (click.BadParameter, _choice),
    (click.BadParameter, _share),
    (click.UsageError, _other),
)


def one_dash(words: Sequence[str], command: click.Command) -> str | None:
    """The message for a long option with one dash, which click reads as a short one and its value (`-out x` as `-o ut`); else None.

    >>> one_dash(["-out", "x"], click.Command("a", params=[click.Option(["-o", "--output"])]))
    "'-out' has one dash; is it --output?"
    """
    known = [name for param in command.params if isinstance(param, click.Option) for name in param.opts if name.startswith("--")]
    for word in words:
        if re.fullmatch(r"-[a-z][a-z]+(?:-[a-z]+)*", word) and (close := [name for name in known if name.startswith(f"-{word}")]):
            return f"{word!r} has one dash; is it {' or '.join(close)}?"
    return None


def no_command(word: str, commands: Sequence[str]) -> str | None:
    """The message for a word that is close to a command's name; None for any other."""
    close = close_names(word, commands) if word not in ALSO and not os.path.exists(word) else []
    return f"No such command {word!r}; is it {' or '.join(close)}?" if close else None
