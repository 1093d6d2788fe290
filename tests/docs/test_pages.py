"""The README and the guide hold what the program really says: every block of every page is run, in a copy of the fixtures."""

from __future__ import annotations

import doctest
import itertools
import re
import shutil
from pathlib import Path
from types import ModuleType

import pages
import picture
import pytest
from pages import BLOCK, GUIDE, PAGES, WIDTH, copy_of_fixtures, render, wrapped

from ckptsurgeon.rules.patterns import compile_pattern
from ckptsurgeon.rules.templates import check_template, expand
from ckptsurgeon.views import guide

GUIDE_PAGES = {name: path for name, path in PAGES.items() if path.parent == GUIDE}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash, which runs the commands")
@pytest.mark.parametrize("name", PAGES)
def test_every_block_gives_what_the_page_says(name: str, tmp_path: Path) -> None:
    text = PAGES[name].read_text()
    assert render(text, copy_of_fixtures(tmp_path)).splitlines() == text.splitlines()


@pytest.mark.parametrize("name", PAGES)
def test_a_python_block_prints_nothing_that_is_not_shown(name: str) -> None:
    for block, following in itertools.pairwise([*BLOCK.finditer(PAGES[name].read_text()), None]):
        if block is not None and block["kind"] == "python" and not block["file"] and "print(" in block["body"]:
            assert following is not None and following["kind"] == "text" and following.start() == block.end() + 1, block["body"]


@pytest.mark.parametrize("name", GUIDE_PAGES)
def test_every_block_of_the_guide_is_of_a_kind_that_is_run(name: str) -> None:
    text = GUIDE_PAGES[name].read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(blocks)
    ends = {block.end() for block in blocks if block["kind"] == "python"}
    for block in blocks:
        ran = block["kind"] in ("console", "python") or block["file"] or (block["kind"] == "text" and block.start() - 1 in ends)
        assert ran, block[0]


def test_every_page_is_a_topic_and_every_topic_a_page() -> None:
    assert sorted(guide.TOPICS) == sorted(GUIDE_PAGES)
    assert set(guide.ALSO.values()) <= set(guide.TOPICS) and not set(guide.ALSO) & set(guide.TOPICS)


@pytest.mark.parametrize("name", GUIDE_PAGES)
def test_a_page_reads_well_on_a_terminal(name: str) -> None:
    """Eighty columns, but for blocks; no comment and no bare link is left."""
    page = guide.page(name, WIDTH)
    assert page.startswith("# ")
    assert "<!--" not in page and ".md)" not in page
    for line in BLOCK.sub("", page + "\n").splitlines():
        assert len(line) <= WIDTH, line


@pytest.mark.parametrize("module", [pages, picture], ids=lambda module: module.__name__)
def test_the_examples_of_what_runs_pages(module: ModuleType) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


@pytest.mark.parametrize("name", GUIDE_PAGES)
def test_wrapping_changes_no_word_and_is_done(name: str) -> None:
    text = GUIDE_PAGES[name].read_text()
    assert wrapped(text).split() == text.split() and wrapped(text) == text


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", BLOCK.sub("", PAGES[name].read_text())):
        assert (PAGES[name].parent / target).exists(), target


def rows_below(heading: str) -> list[list[str]]:
    """The table below a heading of the page on patterns, its cells without backticks; a cell of several values has them in a row."""
    _, _, rest = guide.page("patterns").partition(f"\n{heading}\n")
    table = [line for line in rest.split("\n## ")[0].splitlines() if line.startswith("|")]
    assert len(table) > 5
    return [line.strip("|").split(" | ") for line in table[2:]]


def values(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_of_patterns_is_true() -> None:
    for pattern, yes, no in rows_below("## What matches"):
        (text,) = values(pattern)
        compiled = compile_pattern(text)
        assert values(yes) and values(no)
        assert [key for key in values(yes) if not compiled.fits(key)] == [], text
        assert [key for key in values(no) if compiled.fits(key)] == [], text


def test_the_table_of_renames_is_true() -> None:
    for pattern, result, key, renamed in rows_below("## Use a part again"):
        (compiled,) = map(compile_pattern, values(pattern))
        (template,), (before,), (after,) = values(result), values(key), values(renamed)
        check_template(template, compiled)
        parts = compiled.match(before)
        assert parts is not None and expand(template, parts) == after
