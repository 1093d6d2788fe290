"""Colour: where it is wanted and where not, and that it is nothing but colour: without its escape codes the text is the plain one."""

from __future__ import annotations

import io
import os
import pickle
import pty
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import PROGRAM, read_to_end
from hypothesis import given
from hypothesis import strategies as st

import ckptsurgeon as cs
from ckptsurgeon.cli.main import COMMANDS
from ckptsurgeon.cli.output import COLOURS, Show, painted, wanted
from ckptsurgeon.hints import Unmissable
from ckptsurgeon.shown import Styled, excerpt, joined, spans_of, styled, styled_text
from ckptsurgeon.views.text.words import STYLES, broken, fitted, table

VARIANT = "variants:NetVariant"
CODE = re.compile(r"\x1b\[[0-9;]*m")
GREEN, YELLOW, RED, CYAN, BOLD, DIM = (f"\x1b[{code}m" for code in (32, 33, 31, 36, 1, 2))
# By command, its words, and what stands on stdout or stderr in colour.
LINES: dict[str, list[tuple[tuple[str, ...], list[str]]]] = {
    "inspect": [(("net_params.pkl",), [f"{BOLD}net_params.pkl"])],
    "diff": [
        (
            ("net_params.pkl", VARIANT),
            [
                f"  {GREEN}matched         6\x1b[0m\n",
                f"  {RED}missing         7\x1b[0m   only in the target\n",
                f"    {RED}dense2.{{weight,bias}}\x1b[0m  ",
                f"  {CYAN}extra           2\x1b[0m",
                f"{BOLD}Next:\x1b[0m ckptsurgeon",
                f"{DIM}note: imports variants",
            ],
        ),
        (
            ("net_params.pkl", "variants:NetTwoClasses", "-v"),
            [
                f"  {YELLOW}mismatched      2",
                f"    {YELLOW}fc3.weight\x1b[0m  (10,",
                f"  {DIM}missing         0",
                f"    {GREEN}conv1.bias\x1b[0m",
            ],
        ),
        (("missing.pt", VARIANT), [f"{RED}{BOLD}error:\x1b[0m missing.pt: does", f"  {BOLD}try:\x1b[0m "]),
        (("net_params.pkl", VARIANT, "--no-such-option"), [f"{RED}{BOLD}error:\x1b[0m ", f"  {BOLD}try:\x1b[0m "]),
    ],
    "match": [(("net_params.pkl", VARIANT), [f"  {GREEN}matched", f"  {RED}unmatched", f"  {CYAN}unused", f"{BOLD}Next:\x1b[0m "])],
    "plan": [
        (
            ("net_params.pkl", VARIANT),
            [f"  {GREEN}copy", f"  {YELLOW}initialise", f"  {CYAN}drop", f"    {CYAN}fc2.{{weight,bias}}\x1b[0m  "],
        )
    ],
    "apply": [(("plan.json", "-o", "o.pt", "--overwrite"), [f"  {GREEN}transferred", f"  {YELLOW}fresh", f"  {GREEN}verified\x1b[0m: 15"])],
    "merge": [
        (("net_params.pkl", VARIANT, "-o", "o.pt", "--overwrite"), [f"  {GREEN}transferred", f"  {CYAN}dropped"]),
        (("net_params.pkl", "-o", "o.pt", "--overwrite"), [f"  {GREEN}proven\x1b[0m: "]),
    ],
    "verify": [
        (("net_params.pkl", "model:Net"), [f"model:Net: {GREEN}ok\x1b[0m\n  {GREEN}verified\x1b[0m: 10"]),
        (("net_params.pkl", VARIANT), [f": {RED}{BOLD}NOT ok\x1b[0m\n  {RED}{BOLD}NOT verified\x1b[0m", f"  {RED}{BOLD}error:\x1b[0m "]),
    ],
    "check": [
        (("net_params.pkl",), [f"1 file checked, {GREEN}all good\x1b[0m"]),
        (("net_params.pkl", "model.py"), [f"{BOLD}model.py\x1b[0m: {RED}{BOLD}CK102\x1b[0m is no", f"{RED}{BOLD}1 not good\x1b[0m"]),
        (("--explain", "CK201"), [f"{BOLD}CK201 "]),
    ],
    "skeleton": [((VARIANT, "-o", "net.json", "--overwrite"), [DIM])],
    "groups": [(("merged.pt", VARIANT, "--lr", "1e-3", "--fresh-scale", "10"), [f"{BOLD}group"])],
    "guide": [(("patterns",), [])],
    "adapters": [((), [f"{BOLD}adapters\x1b[0m", f"{BOLD}schemes"])],
}
CASES = [(name, *row) for name, rows in LINES.items() for row in rows]


def plain(text: str) -> str:
    return CODE.sub("", text)


@pytest.mark.parametrize(("name", "words", "lines"), CASES, ids=[f"{name} {' '.join(words)}" for name, words, _ in CASES])
def test_coloured_output_is_the_plain_one_with_colours(name: str, words: tuple[str, ...], lines: list[str], place: Path, run: Any) -> None:
    if "plan.json" in words:
        run("plan", "net_params.pkl", VARIANT, "-o", "plan.json")
    if "merged.pt" in words:
        cs.merge("net_params.pkl", VARIANT, "merged.pt")
    without, coloured = run(name, *words), run(name, *words, "--color", "always")
    assert (plain(coloured.out), plain(coloured.err), coloured.code) == (without.out, without.err, without.code)
    assert "\x1b" not in without.out + without.err
    for line in lines:
        assert line in coloured.out + coloured.err, coloured.out + coloured.err
    for line in (coloured.out + coloured.err).splitlines():  # a pager shows each line as its own codes say
        assert "\x1b" not in line or CODE.findall(line)[-1] == "\x1b[0m"


def test_every_command_has_a_row_above() -> None:
    assert sorted([*LINES, "completion", "help"]) == sorted(COMMANDS)  # which print a script, and what --help prints


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("words", "variables", "terminal", "pipe"),
    [
        ("", {}, True, False),
        ("", {"NO_COLOR": "1"}, False, False),
        ("", {"NO_COLOR": "0"}, False, False),  # any value, says no-color.org
        ("", {"NO_COLOR": ""}, True, False),
        ("", {"FORCE_COLOR": "1"}, True, True),
        ("", {"FORCE_COLOR": ""}, True, False),
        ("", {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, False),
        ("", {"NO_COLOR": "", "FORCE_COLOR": "1"}, True, True),
        ("", {"TERM": "dumb"}, False, False),
        ("", {"TERM": "dumb", "FORCE_COLOR": "1"}, True, True),
        ("--color always", {"NO_COLOR": "1"}, True, True),
        ("--color=always", {"TERM": "dumb"}, True, True),
        ("--color never", {"FORCE_COLOR": "1"}, False, False),
        ("--color auto", {"FORCE_COLOR": "1"}, True, True),
        ("--color auto", {}, True, False),
        ("--color never --color always", {}, True, True),
        ("--color nonsense", {}, True, False),  # is refused, by a message in the colours of no option
        ("--color", {}, True, False),
    ],
)
def test_what_beats_what(words: str, variables: dict[str, str], terminal: bool, pipe: bool) -> None:
    assert wanted(Stream(True), words.split(), variables) == terminal
    assert wanted(Stream(False), words.split(), variables) == pipe


def both(words: list[str], out: bool, err: bool, **env: str) -> tuple[str, str]:
    """What a run gives on stdout and on stderr, each a terminal or a pipe."""
    ends = [pty.openpty() if terminal else os.pipe() for terminal in (out, err)]
    variables = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")} | {"TERM": "xterm", **env}
    process = subprocess.Popen([*PROGRAM, *words], stdin=subprocess.DEVNULL, stdout=ends[0][1], stderr=ends[1][1], env=variables)
    for _, theirs in ends:
        os.close(theirs)
    stdout, stderr = (read_to_end(ours) for ours, _ in ends)
    process.wait(60)
    return stdout, stderr


@pytest.mark.parametrize(("out", "err"), [(True, True), (True, False), (False, True), (False, False)])
def test_each_stream_gets_colour_where_it_is_a_terminal(place: Path, out: bool, err: bool) -> None:
    texts = both(["plan", "net_params.pkl", "net_params.pkl", "-o", "plan.json"], out, err)  # which has a note
    assert ["\x1b[" in text for text in texts] == [out, err]


def test_a_dumb_terminal_gets_no_colour(place: Path) -> None:
    assert "\x1b" not in "".join(both(["plan", "net_params.pkl", "net_params.pkl", "-o", "plan.json"], True, True, TERM="dumb"))


@pytest.mark.parametrize(
    "words", [("diff", "net_params.pkl", VARIANT, "--json"), ("diff", "x.pt", VARIANT, "--json"), ("check", "x.pt", "--github")]
)
def test_what_programs_read_has_no_colour(run: Any, words: tuple[str, ...]) -> None:
    ended = run(*words, "--color", "always")
    assert ended.out and "\x1b" not in ended.out


def test_the_option_stands_on_the_program_too_and_other_values_are_refused(run: Any) -> None:
    assert GREEN in run("--color", "always", "diff", "net_params.pkl", VARIANT).out
    ended = run("diff", "net_params.pkl", VARIANT, "--color", "sometimes")
    assert ended.code == 2 and "sometimes" in ended.err and "'auto', 'always', 'never'" in ended.err


def test_names_that_hold_escape_codes_stay_escaped(place: Path, run: Any) -> None:
    torch.save({"a\x1b[31mred": torch.zeros(2), "fc1.bias": torch.zeros(120)}, "esc.pt")
    ended = run("diff", "esc.pt", "model:Net", "--color", "always")
    assert rf"    {CYAN}a\x1b[31mred" + "\x1b[0m" in ended.out
    assert "\x1b" not in plain(ended.out)


def test_notes_about_whose_code_runs_are_not_faint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.argv", ["ckptsurgeon"])
    Show().note()("plain")
    Show(quiet=True).note()(Unmissable("must be seen"))
    assert capsys.readouterr().err == f"{DIM}note: plain\x1b[0m\nnote: must be seen\n"


@pytest.mark.parametrize("width", [None, 24, 60, 80, 200])
def test_colour_moves_no_column_and_no_break(place: Path, width: int | None) -> None:
    results = (cs.diff("net_params.pkl", VARIANT), cs.plan("net_params.pkl", VARIANT), cs.match("net_params.pkl", VARIANT))
    for found in results:
        text = styled_text(found, False, width)
        assert plain(painted(text)) == text == found.to_text(width=width) and type(found.to_text(width=width)) is str
        assert "\x1b" in painted(text)


def is_upper(text: str) -> None:
    """Hold that the capitals of a text, and nothing else, are styled."""
    covered = {at for start, stop, style in spans_of(text) if style == "good" for at in range(start, stop)}
    assert {at for at, letter in enumerate(text) if letter.isupper()} == covered
    starts = [place for start, stop, _ in spans_of(text) for place in (start, stop)]
    assert starts == sorted(starts)


PIECES = st.lists(st.text("ab ,\n", max_size=9) | st.text("AB", min_size=1, max_size=9).map(lambda text: styled(text, "good")), max_size=9)


@given(PIECES, st.integers(1, 30), st.integers(0, 40), st.integers(0, 40))
def test_styles_stay_with_their_letters(parts: list[str], room: int, start: int, stop: int) -> None:
    whole = joined(parts)
    added = Styled("")
    for piece in parts:
        added = added + piece
    assert whole == "".join(parts) == added and whole.spans == added.spans
    start, stop = sorted((start, stop))
    made = ("x " + whole, excerpt(whole, start, stop), joined(parts, ", "), fitted(["  " + whole], room + 6), *broken(whole, room))
    for text in (whole, *made):
        is_upper(text)
        assert plain(painted(text)) == text
    assert broken(whole, room) == broken(str(whole), room)


def test_a_style_around_others_leaves_them() -> None:
    inner = "ab" + styled("CD", "good") + "ef" + styled("GH", "bad") + "ij"
    assert spans_of(styled(inner, "faint", 1)) == (
        (1, 2, "faint"), (2, 4, "good"), (4, 6, "faint"), (6, 8, "bad"), (8, 10, "faint")
    )  # fmt: skip
    assert styled("text", None).__class__ is str
    again = pickle.loads(pickle.dumps(inner))
    assert again == inner and again.spans == inner.spans


def test_a_row_is_styled_where_its_key_stands_whatever_is_cut_off() -> None:
    rows = [("key" + "x" * 30, "F32", "because of this and that"), ("層", "F32", "why"), *((f"k{n}", "", "") for n in range(40))]
    for line, row in zip(table(rows, 40, 12, "missing"), [rows[0], None, rows[1]], strict=False):
        assert [line[start:stop] for start, stop, _ in spans_of(line)] == ([row[0]] if row else [])


def test_every_style_has_a_colour() -> None:
    assert set(STYLES.values()) <= set(COLOURS)
