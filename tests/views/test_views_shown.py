"""What is shown of many keys: modules with sums that add up, a letter for each key, tables that a program reads, short reprs."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptsurgeon as cs
from ckptsurgeon.errors import SettingsError
from ckptsurgeon.planning.diff import compare
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.report import CarriedState, CheckReport, Coverage, FileCheck, Finding, Report, Verification
from ckptsurgeon.rules.patterns import compile_pattern
from ckptsurgeon.shown import TABLES, Shown
from ckptsurgeon.tensors import Checkpoint, TensorMeta, contiguous_stride
from ckptsurgeon.views.counted import LETTERS, counted, lettered
from ckptsurgeon.views.modules import modules
from ckptsurgeon.views.tables import FORMS, rendered


def checkpoint(shapes: dict[str, tuple[int, ...]], path: str = "net.pt", dtype: str = "F32") -> Checkpoint:
    tensors = {key: TensorMeta(key, dtype, dims, contiguous_stride(dims)) for key, dims in shapes.items()}
    return Checkpoint(path, "torch-zip", "0" * 64, tensors)


PARTS = ("attn.q", "attn.k", "attn.v", "mlp.up", "mlp.down")


def transformer(layers: int, prefix: str = "model.layers") -> dict[str, tuple[int, ...]]:
    keys = {f"{prefix}.{n}.{part}.{leaf}": dims for n in range(layers) for part in PARTS for leaf, dims in (("w", (8, 8)), ("b", (8,)))}
    return {"model.embed.w": (100, 8), **keys, "head.w": (100, 8)}


names = st.lists(st.sampled_from(["a", "h", "0", "1", "2", "10", "w", "x*", "layer{1}"]), min_size=1, max_size=5).map(".".join)


@settings(deadline=None)
@given(st.lists(names, unique=True, max_size=30), st.integers(1, 6))
def test_the_modules_of_one_level_have_all_keys_of_modules_and_no_sum_is_lost(keys: list[str], depth: int) -> None:
    rows = modules([(key, (1, index)) for index, key in enumerate(keys)], depth)
    top = [row for row in rows if row.level == 0]
    assert sum(row.numbers[0] for row in top) == len(keys) and sum(row.numbers[1] for row in top) == sum(range(len(keys)))
    assert all(row.level < depth for row in rows)
    for row in rows:
        beneath = [key for key in keys if compile_pattern(f"{row.path}.**").fits(key) or compile_pattern(row.path).fits(key)]
        assert len(beneath) == row.numbers[0], row


def test_equal_numbered_modules_are_one_row_and_a_module_of_one_part_is_named_with_it() -> None:
    rows = modules([(key, (1,)) for key in transformer(12)], 3)
    assert [("  " * row.level + row.name, row.numbers) for row in rows] == [
        ("model", (121,)),
        ("  embed", (1,)),
        ("  layers.{0..11}", (120,)),
        ("    attn", (72,)),
        ("    mlp", (48,)),
        ("head", (1,)),
    ]
    assert [row.path for row in rows if row.level == 2] == ["model.layers.{0..11}.attn", "model.layers.{0..11}.mlp"]
    rows = modules([(key, (len(key),)) for key in transformer(3)], 1, lambda name, numbers: (-numbers[0], name))
    assert [row.name for row in rows] == ["model", "head"]


def test_a_key_of_very_many_segments_is_no_stack_of_calls() -> None:
    assert modules([(".".join("ab" * 50_000), (1,))], 3)[0].numbers == (1,)


def both() -> tuple[Checkpoint, Checkpoint]:
    source = checkpoint(transformer(4) | {"head.w": (90, 8), "old.w": (3,)})
    return source, checkpoint(transformer(6) | {"new.w": (4,)}, "other.pt")


def test_a_stat_takes_modules_apart_only_where_their_keys_are_of_several_kinds() -> None:
    found = compare(*both())
    assert [(row.path, row.numbers) for row in counted(found)] == [
        ("model.embed", (1, 0, 0, 0)),
        ("model.layers.{0..3}", (40, 0, 0, 0)),
        ("model.layers.{4..5}", (0, 0, 20, 0)),
        ("head", (0, 1, 0, 0)),
        ("new", (0, 0, 1, 0)),
        ("old", (0, 0, 0, 1)),
    ]
    text = found.to_text(stat=True)
    assert re.search(r"^    all +41 +1 +21 +1$", text, re.MULTILINE) and "Next" not in text and "Coverage" in text
    assert found.to_dict(stat=True)["stat"][1] == {
        "module": "model.layers.{0..3}", "matched": 40, "mismatched": 0, "missing": 0, "extra": 0
    }  # fmt: skip
    assert "stat" not in found.to_dict()
    assert max(map(len, found.to_text(stat=True, width=48).splitlines()[1:-1])) <= 48


def test_each_key_has_one_letter() -> None:
    found = compare(*both())
    lines = [line.split("\t") for line in found.to_text(name_status=True).splitlines()]
    assert [key for letter, key in lines if letter == "A"] == list(found.missing)
    assert [key for letter, key in lines if letter == "D"] == ["old.w"] and ["M", "head.w"] in lines
    every = list(lettered(found, (), True))
    assert len({key for _, key in every}) == len(every) == len(found.matched) + len(found.missing) + 2
    half = compare(checkpoint({"w": (2,)}, dtype="F16"), checkpoint({"w": (2,)}, "other.pt"))
    assert list(lettered(half, (), True)) == [("T", "w")]


@pytest.mark.parametrize("only", [("missing",), ("mismatched", "missing"), ("extra",), ("matched",), ("dtype",), ("dropped",)])
def test_only_shows_these_and_nothing_else(only: tuple[str, ...]) -> None:
    text = compare(*both()).to_text(only=only)
    shown = {word for word in ("matched", "mismatched", "missing", "extra") if re.search(rf"^  {word} +\d", text, re.MULTILINE)}
    assert shown == set(only) & {"matched", "mismatched", "missing", "extra"}
    assert "Next:" not in text and text.splitlines()[-1].startswith("Coverage")
    assert ("model.layers.{0..3}.attn.{q,k,v}.{w,b}" in text) == ("matched" in only)


def test_a_category_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match="there is no category 'mising'") as caught:
        compare(*both()).to_text(only=("mising",))
    assert ",".join(LETTERS) in str(caught.value.hint)


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, _attrs: object) -> None:
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data.strip()


CELL = st.text(st.sampled_from('ab|<>&",\n1 '), min_size=1, max_size=6).map(lambda text: f"x{text}x")


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=4))
def test_what_a_table_holds_comes_back_by_other_readers(rows: list[tuple[str, str]]) -> None:
    printable = [[cell.replace("\n", "\\n") for cell in row] for row in rows]
    assert list(csv.reader(io.StringIO(rendered("csv", ("key", "words"), rows)))) == [["key", "words"], *printable]
    reader = Cells()
    reader.feed(rendered("html", ("key", "words"), rows))
    bare = [re.sub(r"\s+", "", cell) for row in printable for cell in row]
    assert [re.sub(r"\s+", "", cell) for cell in reader.cells] == ["key", "words", *bare]
    lines = rendered("github", ("key", "words"), rows).splitlines()
    told = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]
    assert told == printable


def results() -> list[Shown]:
    """One of each kind, of a model with ten thousand tensors and names that are long."""
    keys = {f"{'encoder.' * 30}layer.{n}.{leaf}": (n % 9 + 1, 3) for n in range(5000) for leaf in ("weight", "bias")}
    source, target = checkpoint(keys, "long/" * 99 + "net.pt"), checkpoint({f"{key}x": dims for key, dims in keys.items()}, "other.pt")
    findings = tuple(Finding("missing", "is in the target only " * 40, key) for key in keys)
    report = Report((source.path,) * 9, target.path, tuple(keys), tuple(keys), (), tuple(keys), Coverage(1, 1), findings=findings)
    return [
        source,
        source["encoder." * 30 + "layer.0.bias"],
        compare(source, target),
        compare(source, source),
        make_plan([source], source),
        report,
        findings[0],
        FileCheck("net.pt" * 99, findings),
        CheckReport((FileCheck("net.pt", findings),) * 900),
        Verification("cpu", 3, findings, source=source.path, target="model:Net"),
        CarriedState("optimizer", "names", carried=tuple(keys)),
        cs.Rule("rename", "a" * 999, "b" * 999),
    ]  # fmt: skip


@pytest.mark.parametrize("found", results(), ids=lambda found: type(found).__name__)
def test_a_repr_is_one_line_of_at_most_200_characters(found: Shown) -> None:
    line = repr(found)
    assert len(line) <= 200 and "\n" not in line and type(found).__name__ in line


def test_every_exported_type_has_a_short_repr() -> None:
    """Either by the one mechanism, or since it holds a few numbers."""
    import dataclasses

    exported = [found for found in (getattr(cs, name) for name in cs.__all__) if isinstance(found, type)]
    long = [found for found in exported if dataclasses.is_dataclass(found) and not issubclass(found, Shown)]
    assert [found.__name__ for found in long] == ["Coverage", "Progress"]


def test_every_result_of_a_command_with_a_table_has_one() -> None:
    found = {type(one).__name__: one for one in results() if type(one).__name__ in TABLES}
    assert {"Diff", "Plan", "Report", "CheckReport", "Verification"} <= set(found)
    small = compare(*both())
    for form in FORMS:
        assert "model.layers.{4..5}" in small.to_table(form) and "model.layers.4.attn.q.w" in small.to_table(form, verbose=True)
        assert "old" in small.to_table(form, stat=True)
    with pytest.raises(SettingsError, match="there is no table 'xml'"):
        small.to_table("xml")
