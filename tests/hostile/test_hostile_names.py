"""Whatever stands in keys, places, globals, metadata and paths: no command prints what steers a terminal, breaks a line or breaks JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from forked import Ended
from hostile_costs import REF, named, within
from hostile_json import FOUR, entry, safetensor
from hostile_pickles import text
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.cli import main
from ckptsurgeon.errors import CheckpointError, printable

pytestmark = pytest.mark.slow  # with its like

STEERING = [
    "\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "\r", "\n", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\u2029", "\t", "\0", "\x7f",
    "\b" * 9, "\u202e", "\u2066", "\u2069", "\u200b", "\u200f", "\ufeff", "\xad", "\U000e0041", "\u00a0", "error: ", "  try: rm -rf",
    ".", "..", "/", "{0..3}", "*", "",
]  # fmt: skip
pieces = st.one_of(st.sampled_from(STEERING), st.characters(exclude_categories=["Cs"]), st.sampled_from("abc01"))
names = st.lists(pieces, max_size=6).map("".join)
lines_of = settings(
    max_examples=examples(25),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def ended(words: Sequence[str]) -> Ended:
    """Run a command line in this process."""
    before = sys.argv
    sys.argv = ["ckptsurgeon", *words]
    try:
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            code = main._run("--json" in words)
    finally:
        sys.argv = before
    return Ended(code, out.getvalue(), err.getvalue())


def assert_safe(found: Ended, words: Sequence[str]) -> None:
    """Every line is printable, is encodable, and is one of the program's own; JSON is JSON."""
    printed = found.out + found.err
    assert found.code in (0, 1, 2) and "Traceback" not in printed, (words, found)
    printed.encode()
    for line in printed.split("\n"):
        assert line.isprintable(), (words, line)
    if "--json" in words:
        assert found.out.isascii()
        json.loads(found.out)
    elif found.code == 2:
        # A name must not look like a line of the program's: an error has one, its problems and its hint.
        assert sum(line.startswith("error: ") for line in found.err.split("\n")) == 1, (words, found)


def forms(one: str, other: str, out: str) -> Iterable[list[str]]:
    """Every command that shows what a file holds."""
    yield ["check", one, "--github"]
    yield ["check", one, other, "--full", "-v"]
    for more in ([], ["-v"], ["--json"]):
        yield ["inspect", one, *more]
        yield ["diff", one, other, *more]
        yield ["diff", other, one, *more]
        yield ["match", one, other, *more]
        yield ["check", one, *more]
        yield ["check", one, "--against", other, *more]
        yield ["verify", one, other, *more]
        yield ["plan", one, *more]
        yield ["plan", one, other, *more]
        yield ["groups", one, other, "--lr", "1", "--fresh-lr", "1", *more]
        yield ["skeleton", one, "-o", f"{out}/net.json", "--overwrite", *more]
        yield ["merge", one, "-o", f"{out}/out.pt", "--overwrite", "--drop", "none.such", *more]
        yield ["merge", one, "-o", f"{out}/out.safetensors", "--overwrite", *more]
        yield ["inspect", one, "--root", "no such", *more]


def run_all(folder: Path, one: bytes, other: bytes) -> None:
    """Run every command on two files in a folder of their own."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        paths = [f"{place}/one", f"{place}/other"]
        for path, data in zip(paths, (one, other), strict=True):
            Path(path).write_bytes(data)
        for words in forms(*paths, place):
            assert_safe(ended(words), words)


@given(keys=st.lists(names, min_size=1, max_size=3, unique=True), others=st.lists(names, min_size=1, max_size=2, unique=True))
@lines_of
@example(keys=STEERING, others=["ok"])
@example(keys=["".join(STEERING)], others=["\u202e"])
def test_keys(keys: list[str], others: list[str], tmp_path: Path) -> None:
    one, other = (within(named(*((key, b"h\x01") for key in found))) for found in (keys, others))
    run_all(tmp_path, one, other)


@given(place=names, key=names, module=names, name=names)
@lines_of
@example(place="\x1b[2J", key="\n", module="os\x1b]0;x\x07", name="system\u202e")
def test_places_and_globals(place: str, key: str, module: str, name: str, tmp_path: Path) -> None:
    evil = text(module) + text(name) + b"\x93)R"
    root = named((key, b"h\x01"), (f"{key}2", evil), (f"{key}._extra_state", evil))
    one = within(named((place, root), (f"{place}3", root), ("beside" + key, evil)))
    run_all(tmp_path, one, within(named((key, b"h\x01"))))
    run_all(tmp_path, within(evil), within(named((key, b"h\x01"))))


@given(keys=st.lists(names, min_size=1, max_size=3, unique=True), metadata=st.dictionaries(names, names, max_size=3))
@lines_of
def test_safetensors_keys_and_metadata(keys: list[str], metadata: dict[str, str], tmp_path: Path) -> None:
    found = {key: entry(4 * index, 4 * index + 4) for index, key in enumerate(keys)}
    one = safetensor({**found, "__metadata__": metadata}, FOUR * len(keys))
    run_all(tmp_path, one, safetensor({"w": entry()}, FOUR))
    record = {"ckptsurgeon": json.dumps({"fresh": keys, "tool": "".join(metadata), "sources": list(metadata)})}
    run_all(tmp_path, safetensor({**found, "__metadata__": record}, FOUR * len(keys)), safetensor({"w": entry()}, FOUR))


@given(weight_map=st.dictionaries(names, names, min_size=1, max_size=3), kind=names)
@lines_of
def test_indexes_and_skeletons(weight_map: dict[str, str], kind: str, tmp_path: Path) -> None:
    rows = [{"name": key, "dtype": value or "F32", "shape": [1]} for key, value in weight_map.items()]
    other = safetensor({"w": entry()}, FOUR)
    run_all(tmp_path, json.dumps({"weight_map": weight_map}).encode(), other)
    skeleton = {"version": 1, "kind": "skeleton", "tensors": rows}
    run_all(tmp_path, json.dumps({**skeleton, "ties": [[row["name"] for row in rows]]}).encode(), other)
    honest = [{**row, "dtype": "F32"} for row in rows]
    run_all(tmp_path, json.dumps({**skeleton, "tensors": honest, "spec": kind, "entries": [f"{kind}._extra_state"]}).encode(), other)


PATHS = [
    "a\x1b[31mred",
    "a\nerror: b",
    "\u202etxt.exe",
    "a\u2028b",
    " a ",
    "\x07",
    "'",
    '"',
    "-",
    "$(touch x)",
    os.fsdecode(b"\xff\xfe.pt"),
]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("content", [None, b"", b"text", within(named(("w", b"h\x01"))), safetensor({"w": entry()}, FOUR)])
def test_paths(name: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    (tmp_path / "other").write_bytes(within(named(("w", b"h\x01"))))
    for words in forms(str(path), str(tmp_path / "other"), str(tmp_path)):
        assert_safe(ended(words), words)
    for words in (
        ["merge", str(tmp_path / "other"), "-o", f"{path}.pt"],
        ["inspect", str(tmp_path / "other"), "--root", name],
        ["diff", name, name],
    ):
        assert_safe(ended(words), words)


@given(word=names.filter(lambda word: not word.startswith("-") and "\0" not in word))
@lines_of
def test_words_of_the_command_line(word: str, tmp_path: Path) -> None:
    """What a person or a script wrote comes back in errors."""
    path = tmp_path / "it.pt"
    path.write_bytes(within(named(("w", b"h\x01"))))
    for words in (
        ["inspect", str(path), "--root", word],
        ["inspect", str(path), "--limit", word],
        ["inspect", str(path), f"--{word}x"],
        ["diff", str(path), str(path), "--drop", word],
        ["diff", str(path), str(path), "--rename", word, word],
        ["diff", str(path), str(path), "--adapt", "w", word],
        ["diff", str(path), word],
        ["diff", str(path), f"{word}:Net"],
        ["check", word, str(path), "--select", word],
        ["plan", str(path), "--init", "w", word],
        [f"{word}x"],
    ):
        assert_safe(ended(words), words)
        assert_safe(ended([*words, "--json"]), [*words, "--json"])


@given(name=st.text(st.characters()))
@example(name="\ud800")
def test_what_is_printable(name: str) -> None:
    """Escapes lose nothing that matters, and what is harmless stays as it is."""
    assert printable(name).isprintable() and "\n" not in printable(name)
    assert printable(name) == name or not name.isprintable()
    printable(name).encode()
    error = CheckpointError(name, path=name, key=name, hint=name, problems=(name, name))
    assert all(line.isprintable() for line in str(error).split("\n")) and len(str(error).split("\n")) <= 4


def test_the_values_of_refused_pickles_are_safe_too(tmp_path: Path) -> None:
    """A name that is no Unicode is told in the refusal."""
    half = b"X\x03\x00\x00\x00\xed\xa0\x80"
    for body in (
        b"}" + half + REF + b"s",
        named(("a", b"}" + half + b"h\x01s")),
        half + half + b"\x93)R",
        named(("w", b"h\x01")) + half + b"N" + b"s",
    ):
        run_all(tmp_path, within(body), within(named(("w", b"h\x01"))))
