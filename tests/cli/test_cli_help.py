"""What `--help` shows: examples that work, options in groups, metavars that say what is meant."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections import Counter

import click
import pytest
from cli_support import PROGRAM

from ckptsurgeon.cli.help_pages import EXAMPLES, GROUPS, groups_of, long_name
from ckptsurgeon.cli.main import COMMANDS, cli

BASH = shutil.which("bash")


def context_of(name: str) -> click.Context:
    program = cli.make_context("ckptsurgeon", [name])
    command = cli.get_command(program, name)
    assert command is not None
    return click.Context(command, program, name)


def options_of(name: str) -> list[str]:
    context = context_of(name)
    return [long_name(one) for one in context.command.get_params(context) if isinstance(one, click.Option)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_in_exactly_one_group_of_the_table(name: str) -> None:
    context = context_of(name)
    shown = [(heading, long_name(param)) for heading, params in groups_of(context.command, context) for param in params]
    assert Counter(option for _, option in shown) == Counter(options_of(name))
    for heading, option in shown:
        assert {option, f"{name}.{option}"} & set(GROUPS[heading].split()), f"--{option} of {name} has no group in help_pages.GROUPS"


def test_every_row_of_the_table_of_groups_is_an_option() -> None:
    rows = [word for words in GROUPS.values() for word in words.split()]
    assert [word for word, times in Counter(rows).items() if times > 1] == []
    known = {option for name in COMMANDS for option in (*options_of(name), *(f"{name}.{option}" for option in options_of(name)))}
    assert sorted(set(rows) - known) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_headings_that_end_in_a_colon_and_two_examples_after_the_usage(run, name: str) -> None:
    lines = run(name, "--help").out.splitlines()
    headings = [line for line in lines[1:] if line and line[0] != " "]
    assert headings and all(line.removesuffix(":") in GROUPS and line.endswith(":") for line in headings)
    examples = re.sub(r"\\\n\s+", "", "\n".join(lines)).split("\n\n")[1].splitlines()
    assert len(examples) >= 2 and all(f"ckptsurgeon {name}" in line for line in examples)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_metavar_is_the_name_of_a_type(run, name: str) -> None:
    ended = run(name, "--help")
    assert re.findall(r"\b(TEXT|INTEGER|FLOAT|BOOLEAN|PATH)\b(?!\.\.\.)", ended.out) == []


def test_all_examples_work_one_after_another(run, place, monkeypatch) -> None:
    """In the order of use, in one copy of the fixtures: what one writes, a later one reads."""
    assert set(EXAMPLES) == {"", *COMMANDS}
    (place / "bin").mkdir()
    (place / "bin" / "ckptsurgeon").write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@"\n')
    (place / "bin" / "ckptsurgeon").chmod(0o755)
    for name in ("", *COMMANDS):
        for line, _, code in EXAMPLES[name]:
            if line.startswith("ckptsurgeon "):
                ended = run(*shlex.split(line.replace("\\\n", " "))[1:])
                assert ended.code == code and (ended.out or code == 2), (line, ended)
            elif BASH is not None:
                path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
                assert subprocess.run([BASH, "-c", line], env={**os.environ, "PATH": path}).returncode == code, line


def test_help_of_a_command_is_its_own_help(run) -> None:
    for name in COMMANDS:
        assert run("help", name) == run(name, "--help")
    ended = run("help")
    assert ended == run("--help") and ended.code == 0
    assert "No such command 'mrege'; is it merge?" in run("help", "mrege").err


def test_version_has_a_short_option(run) -> None:
    assert run("-V") == run("--version")
