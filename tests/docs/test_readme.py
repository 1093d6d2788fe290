"""What the README promises beside its blocks, which `test_pages.py` runs.

After a change of output, `python tests/docs/pages.py` writes README and guide anew; so does this file, if it is run.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from pages import PAGES, README, ROOT, rewrite, shell
from picture import PICTURE, picture, styled

MOST_LINES = 250


def test_it_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudoterminal")
def test_the_picture_is_what_diff_prints() -> None:
    """`python tests/docs/picture.py` draws it anew."""
    drawn = PICTURE.read_text()
    assert f"]({PICTURE.relative_to(ROOT)})" in README.read_text()
    assert len(set(re.findall(r'fill="(#\w+)">', drawn))) >= 4, "it has no colours"
    assert picture() == drawn


def test_a_style_ends_where_it_is_reset() -> None:
    assert list(styled("\x1b[2ma\x1b[22;1mb\x1b[39mc\x1b[0md\x1b[91me")) == [
        ("a", ' opacity="0.6"'),
        ("b", ' font-weight="bold"'),
        ("c", ' font-weight="bold"'),
        ("d", ""),
        ("e", ' fill="#ff7b72"'),
    ]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_a_person_wants_is_a_row_that_leads_into_the_guide() -> None:
    table = README.read_text().partition("| I want to … |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) >= 15
    assert all("(ckptsurgeon/guide/" in cells(line)[1] for line in table)
    for words in ("average three checkpoints", "another vocabulary", "resume with a new head", "block bad checkpoints in CI"):
        assert any(words in line for line in table), words
    reached = set(re.findall(r"ckptsurgeon/guide/([\w-]+)\.md", README.read_text()))
    assert reached == set(PAGES) - {"README"}


def test_the_speeds_are_measured_ones() -> None:
    table = README.read_text().partition("## Speed")[2].partition("\n## ")[0]
    rows = [cells(line) for line in table.splitlines() if line.startswith("|")][2:]
    measured = {
        (row[1], row[2], row[4]) for line in (ROOT / "tests/bench/RESULTS.md").read_text().splitlines() if len(row := cells(line)) == 8
    }
    assert len(rows) == 5
    assert {(seconds, size, other) for _, seconds, size, _, other in rows} <= measured


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash, which runs the commands")
def test_the_command_that_installs_also_runs_the_main_job(tmp_path: Path) -> None:
    """Its last part, by the program that is installed already; a fresh environment is .ci/run's to build."""
    install = re.search(r"```bash\n(python3 -m venv.*?merge.*?)\n```", README.read_text(), re.DOTALL)
    assert install is not None
    last = install[1].replace("\\\n", " ").split("&&")[-1].strip()
    assert last.startswith(".venv/bin/ckptsurgeon merge fixtures/")
    out = shell(last.removeprefix(".venv/bin/").replace("/tmp/merged.pt", str(tmp_path / "merged.pt")), ROOT)
    assert "verified: 15 tensors" in out and (tmp_path / "merged.pt").exists()


def test_every_command_and_every_exit_code_is_told() -> None:
    text = "".join(path.read_text() for path in PAGES.values())
    for name in ("inspect", "diff", "match", "plan", "apply", "merge", "verify", "check", "skeleton", "groups"):
        assert f"$ ckptsurgeon {name} " in text, name
    for code in (0, 1, 2, 130):
        assert re.search(rf"^\| {code} +\|", text, re.MULTILINE), code


if __name__ == "__main__":
    for name in PAGES:
        rewrite(name)
