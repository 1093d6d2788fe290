"""Folding: fewer lines, the same keys. Every folded text says exactly which keys it stands for."""

import itertools
import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgeon.errors import RuleError
from ckptsurgeon.rules.patterns import compile_pattern
from ckptsurgeon.views.folding import Several, fold, fold_keys


def folded(*keys):
    return [row.key for row in fold((key, ()) for key in keys)]


def spread(text: str) -> list[str]:
    """The keys that a folded text stands for, of those of `segments`."""
    pieces = re.split(r"\{([0-9A-Za-z_.,]+)\}", text)
    choices = []
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            choices.append([piece])
            continue
        numbers = []
        for part in piece.split(","):
            first, *ends = part.split("..")
            numbers += [str(value) for value in range(int(first), int(ends[0]) + 1, *map(int, ends[1:]))] if ends else [part]
        choices.append(numbers)
    return ["".join(parts) for parts in itertools.product(*choices)]


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        (["w"], ["w"]),
        (["h.0.w", "h.1.w", "h.2.w"], ["h.{0..2}.w"]),
        (["h.10.w", "h.9.w", "h.11.w"], ["h.{9..11}.w"]),
        (["h.0.w", "h.1.w", "h.3.w"], ["h.{0,1,3}.w"]),
        (["h.0.w", "h.1.w", "h.2.w", "h.7.w", "h.9.w", "h.10.w", "h.11.w"], ["h.{0..2,7,9..11}.w"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], ["a.{0..1}.b.{0..1}"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], ["a.{0..1}.b.0", "a.0.b.1"]),
        ([f"h.{i}.w" for i in range(0, 91, 3)], ["h.{0..90..3}.w"]),
        (["h.0.w", "h.4.w", "h.9.w"], ["h.{0,4,9}.w"]),
        (["h.2.w", "h.0.w"], ["h.{0,2}.w"]),
        ([f"h.{i * i}.w" for i in range(8)], ["h.{0,1,4,9,16,25,36,49}.w"]),
        ([f"h.{i * i}.w" for i in range(31)], ["h.{0,1,…,900: 31}.w"]),
        (["a{b}*.0 ", "a{b}*.1 ", "a{b}*.x"], ["a\\{b\\}\\*.{0..1}\\ ", "a{b}*.x"]),
        (["layer1.w", "layer2.w", "fc.w"], ["layer{1..2}.w", "fc.w"]),
        (["layer.01.w", "layer.02.w"], ["layer.01.w", "layer.02.w"]),
        (["layer.01.w", "layer.1.w", "layer.2.w"], ["layer.01.w", "layer.{1..2}.w"]),
        (["x.00", "x.0"], ["x.00", "x.0"]),
        (["h." + "9" * 5000, "h.1"], ["h." + "9" * 5000, "h.1"]),
        ([f"h.{10**17}", "h.0"], [f"h.{{0,{10**17}}}"]),
        (["h.٣", "h.٤"], ["h.٣", "h.٤"]),
        (["h.²", "h.1"], ["h.²", "h.1"]),
        (["h.{0..1}.w", "h.{0..2}.w"], ["h.{0..1}.w", "h.{0..2}.w"]),
        ([], []),
    ],
)
def test_examples(keys, lines):
    assert folded(*keys) == lines


def test_only_rows_that_say_the_same_fold():
    rows = [("h.0.w", (2,)), ("h.1.w", (2,)), ("h.2.w", (3,)), ("h.3.w", (2,))]
    assert [(row.key, row.common, row.count) for row in fold(rows)] == [("h.{0,1,3}.w", (2,), 3), ("h.2.w", (3,), 1)]


def test_rows_that_come_twice_are_counted_twice():
    rows = [("h.0.w", ()), ("h.0.w", ()), ("h.1.w", ()), ("h.2.w", ())]
    assert sum(row.count for row in fold(rows)) == 4


segments = st.sampled_from(["a", "h", "0", "1", "2", "3", "10", "01", "b2", "w"])
keys = st.lists(st.lists(segments, min_size=1, max_size=4).map(".".join), unique=True, max_size=30)


@given(keys)
def test_folded_lines_stand_for_the_keys_and_no_others(given_keys):
    rows = fold((key, ()) for key in given_keys)
    assert sorted(key for row in rows for key in spread(row.key)) == sorted(given_keys)
    assert [len(spread(row.key)) for row in rows] == [row.count for row in rows]


@given(keys)
def test_folding_again_changes_nothing(given_keys):
    once = folded(*given_keys)
    assert folded(*once) == once


def test_leaves_of_a_module_share_a_line_where_they_agree_in_what_they_must():
    said = {"w": ("F32", 4), "b": ("F32", 2), "n": ("I64", 1)}
    rows = [(f"h.{i}.{part}.{leaf}", value) for i in range(2) for part in "qk" for leaf, value in said.items()]
    found = [(row.key, row.common, row.count) for row in fold(rows, lambda common: common[0])]
    assert found == [("h.{0..1}.{q,k}.{w,b}", Several((("F32", 4), ("F32", 2))), 8), ("h.{0..1}.{q,k}.n", ("I64", 1), 4)]
    same = [(row.key, row.common) for row in fold([("n.w", 1), ("n.b", 1)], lambda _common: ())]
    assert same == [("n.{w,b}", 1)]


@given(st.lists(st.tuples(st.text(alphabet="ab0129.{},", max_size=8), st.sampled_from([1, 2])), max_size=30))
def test_no_row_is_lost(rows):
    assert sum(row.count for row in fold(rows)) == len(rows)
    assert {row.common for row in fold(rows)} == {common for _, common in rows}


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        (["fc.weight", "fc.bias"], ["fc.{weight,bias}"]),
        (["h.0.w", "h.1.w", "h.0.b", "h.1.b"], ["h.{0..1}.{w,b}"]),
        (["w", "b"], ["w", "b"]),
        (["p.0", "p.1", "p.2"], ["p.{0..2}"]),
        (["p.0a", "p.1a", "p.0b", "p.1b"], ["p.{0..1}a", "p.{0..1}b"]),
        (["a*.w", "a*.b", "a*.c d", "q.w"], ["a\\*.{w,b}", "a*.c d", "q.w"]),
        (["p.0.w", "p.2.w", "q.w"], ["p.{0,2}.w", "q.w"]),
        ([f"h.{i}.self.{p}.{q}" for i in range(3) for p in "qkv" for q in "wb"], ["h.{0..2}.self.{q,k,v}.{w,b}"]),
        (["m.q.w", "m.q.b", "m.k.w"], ["m.q.{w,b}", "m.k.w"]),
        (["m.q.w", "m.k.w", "m.k.b", "n.k.w"], ["m.q.w", "m.k.{w,b}", "n.k.w"]),
        (["a.w", "b.w"], ["a.w", "b.w"]),
        (["m.01.w", "m.q.w", "m.k.w"], ["m.01.w", "m.{q,k}.w"]),
        (["m.conv1.w", "m.conv2.w", "m.bn.w"], ["m.conv{1..2}.w", "m.bn.w"]),
        ([f"m.{letter}" for letter in "abcdefghij"], ["m.{a,b,c,d,e,f,g,h}", "m.{i,j}"]),
    ],
)
def test_words_share_a_line(keys, lines):
    assert fold_keys(keys) == lines


ODD = st.sampled_from(["a", "w", "*", "{0..1}", "{", "b}", "\\", "a+b", " ", "->", "/", ":x", "01"])
NUMBERS = st.integers(0, 40).map(str)
odd_keys = st.lists(st.lists(st.one_of(ODD, NUMBERS, NUMBERS), min_size=1, max_size=4).map(".".join), unique=True, max_size=40)


@given(odd_keys, st.lists(st.integers(0, 60), unique=True, max_size=40))
def test_a_folded_text_that_is_printed_whole_is_a_pattern_of_these_keys_alone(given_keys, numbers):
    """Against every key of the list, its neighbours, and the numbers between: by the pattern, not by this module's own words."""
    given_keys = list(dict.fromkeys([*given_keys, *(f"h.{number}.{leaf}" for number in numbers for leaf in ("w", "b"))]))
    near = {re.sub(r"[0-9]+", lambda found: str(int(found[0]) + 1), key) for key in given_keys}
    every = {*given_keys, *near, *(f"h.{number}.w" for number in range(70))}
    reached: list[str] = []
    for row in fold((key, ()) for key in given_keys):
        if row.count == 1:
            assert row.key in given_keys
            reached.append(row.key)
        elif "…" in row.key:
            with pytest.raises(RuleError):
                compile_pattern(row.key)
            reached += [""] * row.count
        else:
            matched = [key for key in every if compile_pattern(row.key).fits(key)]
            assert len(matched) == row.count
            reached += matched
    whole = [key for key in reached if key]
    assert len(reached) == len(given_keys) and set(whole) <= set(given_keys) and len(set(whole)) == len(whole)


@given(odd_keys.map(lambda keys: [key for key in keys if "{0..1}" not in key]))
def test_folded_siblings_are_patterns_too(given_keys):
    reached = []
    for line in fold_keys(given_keys):
        if line in given_keys:
            reached.append(line)
        elif "…" in line:
            return
        else:
            reached += [key for key in given_keys if compile_pattern(line).fits(key)]
    assert sorted(reached) == sorted(given_keys)


@pytest.mark.parametrize(("count", "lines"), [(46, 1), (47, 2), (60, 2)])
def test_words_fold_in_no_key_of_so_many_segments(count: int, lines: int) -> None:
    keys = [".".join([*"a" * 23, word, *"b" * (count - 24)]) for word in ("q", "k")]
    assert len(fold_keys(keys)) == lines
    assert spread(fold_keys(keys)[0])[0] == keys[0]


def test_a_key_of_half_a_million_segments_is_not_cut_at_its_dots() -> None:
    head = "a." * 450_000
    tracemalloc.start()
    try:
        lines = fold_keys([f"{head}0.w", f"{head}1.w", "b.w", "b.v"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert lines == [f"{head}{{0..1}}.w", "b.{w,v}"]
    assert peak < 20_000_000  # a pair for each segment takes a hundred million
