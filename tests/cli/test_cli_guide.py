"""`guide`: the list of topics, a page, a topic that there is not, and the pager on a terminal."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from cli_support import on_a_terminal
from test_cli_schemas import fits

from ckptsurgeon.cli.main import COMMANDS
from ckptsurgeon.views import guide


def test_without_a_topic_each_is_listed_with_a_line(run) -> None:
    ended = run("guide")
    assert ended.code == 0 and ended.err == ""
    for name, words in guide.TOPICS.items():
        assert f"  {name} " in ended.out and words in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    listed = run("guide", "--json").json
    fits(listed, "guide")
    assert [row["name"] for row in listed["topics"]] == list(guide.TOPICS)


@pytest.mark.parametrize("name", guide.TOPICS)
def test_a_page(run, name: str) -> None:
    ended = run("guide", name)
    assert ended.code == 0 and ended.out == f"{guide.page(name)}\n" and ended.out.startswith("# ")
    as_json = run("guide", name, "--json").json
    fits(as_json, "guide")
    assert as_json["topic"] == name and as_json["text"] == guide.page(name)


@pytest.mark.parametrize(
    ("word", "meant"), [("pattern", "patterns"), ("patern", "patterns"), ("zzz", None), *((word, None) for word in ("../README", ""))]
)
def test_a_topic_that_is_not_there(run, word: str, meant: str | None) -> None:
    ended = run("guide", word)
    assert ended.code == 2 and ended.out == ""
    assert (f"is it {meant}?" in ended.err) is (meant is not None)
    assert (f"try: ckptsurgeon guide {meant}" if meant else "try: ckptsurgeon guide\n") in ended.err
    fits(run("guide", word, "--json").json, "error")


def test_another_word_for_a_topic(run) -> None:
    for word, name in guide.ALSO.items():
        assert run("guide", word.upper()).out == f"{guide.page(name)}\n"


def test_the_help_of_a_command_leads_to_its_page(run) -> None:
    for name in set(COMMANDS) - {"guide", "completion", "help"}:
        last = run(name, "--help").out.splitlines()[-1].strip()
        assert last == f"Read more: ckptsurgeon guide {name}"
        assert f"ckptsurgeon {name}" in run("guide", name).out
    assert run("--help").out.splitlines()[-1].strip() == "Read more: ckptsurgeon guide"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudoterminal")
def test_a_terminal_gets_a_page_by_the_pager(tmp_path: Path) -> None:
    pager = tmp_path / "pager"
    pager.write_text(f"#!/bin/sh\necho paged\nexec {sys.executable} -c 'import sys; sys.stdout.write(sys.stdin.read())'\n")
    pager.chmod(0o755)
    assert on_a_terminal("guide", "json", PAGER=str(pager), COLUMNS="70") == f"paged\n{guide.page('json', 70)}\n"
    assert "paged" not in on_a_terminal("guide", PAGER=str(pager))
    assert "paged" not in on_a_terminal("guide", "patterns", "--json", PAGER=str(pager))


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("less") is None, reason="needs a pseudoterminal and less")
def test_headings_are_bold_where_the_pager_can_show_it() -> None:
    bold = "\x1b[1m# Patterns: which keys a rule means\x1b[0m"
    less = {"PAGER": "less -F -X", "TERM": "xterm-256color", "LESS": "-R", "LINES": "500"}
    assert bold in on_a_terminal("guide", "patterns", **less)
    assert bold not in on_a_terminal("guide", "patterns", **less, NO_COLOR="1")
