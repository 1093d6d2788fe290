"""Rules files through the library: how they are found and read, their order, and what they name outside of themselves."""

import os
from pathlib import Path

import pytest
import torch
from api_support import same

import ckptsurgeon as cs
from ckptsurgeon.api._options import RuleOptions
from ckptsurgeon.api._rules import gather
from ckptsurgeon.errors import CheckpointError, FormatError, RuleError, UnreadableError
from ckptsurgeon.rules.rules import Rule, from_arguments

RENAME = '[[rename]]\nfrom = "{}"\nto = "{}"\n'


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(path: str, text: str | bytes) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def saved(path: str, **tensors) -> str:
    torch.save({name.replace("_", "."): tensor for name, tensor in tensors.items()}, path)
    return path


# ---- files that are none


def test_a_file_that_can_not_be_read_says_which(here):
    (here / "folder").mkdir()
    os.mkfifo(here / "pipe")
    for path in ("nowhere.toml", "folder", "pipe", Path("nowhere.toml")):
        with pytest.raises(UnreadableError) as caught:
            cs.load_rules(path)
        assert caught.value.path == str(path)
    saved("a.pt", w=torch.ones(2))
    with pytest.raises(UnreadableError, match=r"nowhere\.toml"):
        cs.merge("a.pt", None, "out.pt", rules=["nowhere.toml"])
    assert not Path("out.pt").exists()


@pytest.mark.parametrize(
    ("raw", "words"),
    [(b"\xff\xfe[\x00", "is no text"), (b"\x80", "is no text"), (b"[[rename]", "is not TOML"), (b"\x00", "is not TOML")],
)  # fmt: skip
def test_a_file_that_is_no_toml_says_so(here, raw, words):
    with pytest.raises(RuleError, match=words) as caught:
        cs.load_rules(written("r.toml", raw))
    assert caught.value.path.startswith("r.toml") and caught.value.exit_code == 2


def test_a_byte_order_mark_and_windows_line_ends_are_no_trouble(here):
    plain = RENAME.format("a.{p}", "ü.{p}")
    (found,) = cs.load_rules(written("r.toml", b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode()))
    assert found == Rule("rename", "a.{p}", "ü.{p}") and (found.file, found.line) == ("r.toml", 1)
    assert cs.load_rules(written("empty.toml", b"")) == ()


def test_the_problems_of_all_files_at_once(here):
    written("good.toml", RENAME.format("a", "b"))
    one, other = (
        written("one.toml", RENAME.format("a.{p}", "b.{q}") + "[[dorp]]\n"),
        written("c/other.toml", "[[adapt]]\nkey='a'\nop='nope'\n"),
    )
    with pytest.raises(RuleError) as caught:
        gather(RuleOptions(rules=[one, "good.toml", other]))
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == ["one.toml", "one.toml", "c/other.toml"]
    assert "line 4: there is no rule 'dorp'; is it [[drop]]?" in str(caught.value) and "no adapter 'nope'" in str(caught.value)
    with pytest.raises(RuleError) as caught:
        gather(RuleOptions(rules=[other, "good.toml"]))
    assert caught.value.path == "c/other.toml"


# ---- order


def test_arguments_come_before_files_and_files_in_the_order_given(here):
    first, second = written("1.toml", RENAME.format("a", "one")), written("2.toml", RENAME.format("b", "two"))
    arguments = from_arguments({"x": "y"}, ["z"])
    assert gather(RuleOptions(rename={"x": "y"}, drop=["z"], rules=[first, second])).rules == (
        *arguments,
        Rule("rename", "a", "one"),
        Rule("rename", "b", "two"),
    )
    assert gather(RuleOptions(rules=[Path(second), Rule("drop", "k"), first])).rules == (
        Rule("rename", "b", "two"), Rule("drop", "k"), Rule("rename", "a", "one"),
    )  # fmt: skip
    for alone in (first, Path(first), Rule("rename", "a", "one")):
        assert gather(RuleOptions(rules=alone)).rules == (Rule("rename", "a", "one"),)
    assert gather(RuleOptions(rules=())).rules == ()


def test_an_argument_overrides_a_file(here):
    saved("a.pt", fc_w=torch.arange(4.0), aux_w=torch.ones(2))
    rules = written("r.toml", RENAME.format("fc.{p}", "dense.{p}") + '[[drop]]\nkey = "aux.*"\n')
    cs.merge("a.pt", None, "file.pt", rules=rules)
    same(torch.load("file.pt"), {"dense.w": torch.arange(4.0)})
    cs.merge("a.pt", None, "argument.pt", rules=[rules], rename={"fc.w": "head.w"})
    same(torch.load("argument.pt"), {"head.w": torch.arange(4.0)})


def test_a_stage_of_one_file_goes_on_in_the_next_and_back(here):
    one = written("1.toml", RENAME.format("a.{p}", "b.{p}") + "[[stage]]\n" + RENAME.format("b.{p}", "c.{p}"))
    two = written("2.toml", RENAME.format("x.{p}", "y.{p}") + "[[stage]]\n" + RENAME.format("y.{p}", "z.{p}"))
    source = saved("a.pt", a_w=torch.arange(3.0), x_w=torch.arange(5.0))
    cs.merge(source, None, "there.pt", rules=[one, two])
    same(torch.load("there.pt"), {"c.w": torch.arange(3.0), "z.w": torch.arange(5.0)})
    cs.merge("there.pt", None, "back.pt", rules=[one, two], reverse=True)
    same(torch.load("back.pt"), torch.load(source))


def test_reverse_is_for_files_and_says_which_rule_can_not_be_turned(here):
    one, two = written("1.toml", RENAME.format("a.{p}", "b.{p}") + '[[drop]]\nkey="k"\n'), written("2.toml", RENAME.format("c.*", "d"))
    with pytest.raises(RuleError) as caught:
        gather(RuleOptions(rules=[one, two], reverse=True))
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == ["drop 'k' (1.toml:4)", "rename 'c.*' 'd' (2.toml:1)"]
    kept = Rule("drop", "k")
    other = written("3.toml", RENAME.format("a", "b"))
    assert gather(RuleOptions(rules=[kept, other], reverse=True)).rules == (
        kept,
        Rule("rename", "b", "a"),
    )


# ---- what rules name outside of themselves


def test_token_lists_lie_beside_the_rules_file_that_names_them(here):
    written("conf/old.txt", "a\nb\nc\n")
    written("conf/more/new.txt", "c\nnew\na\n")
    rules = written("conf/rules.toml", "[[adapt]]\nkey = 'emb.w'\nop = \"rows(source='old.txt', target='more/new.txt', fill='zeros')\"\n")
    saved("a.pt", emb_w=torch.arange(6.0).view(3, 2) + 1)
    cs.merge("a.pt", None, "out.pt", rules=rules)
    wanted = {"emb.w": torch.tensor([[5.0, 6], [0, 0], [1, 2]])}
    same(torch.load("out.pt"), wanted)
    cs.merge("a.pt", None, "absolute.pt", rules=Path(rules).resolve())
    same(torch.load("absolute.pt"), wanted)
    # An argument's list lies where the person is.
    cs.merge("a.pt", None, "here.pt", adapt={"emb.w": "rows(source='conf/old.txt', target='conf/more/new.txt', fill='zeros')"})
    same(torch.load("here.pt"), wanted)
    assert set(gather(RuleOptions(rules=[rules])).outside.labels) == {"conf/old.txt", "conf/more/new.txt"}


def test_a_token_list_that_is_not_there_or_none_says_which(here):
    rules = "[[adapt]]\nkey = 'emb.w'\nop = \"rows(source='{}', target='new.txt')\"\n"
    written("c/new.txt", "a\n")
    written("c/twice.txt", "a\na\n")
    saved("a.pt", emb_w=torch.ones(1, 2))
    with pytest.raises(UnreadableError, match=r"c/old\.txt"):
        cs.merge("a.pt", None, "out.pt", rules=written("c/r.toml", rules.format("old.txt")))
    with pytest.raises(FormatError, match=r"c/twice\.txt"):
        cs.merge("a.pt", None, "out.pt", rules=written("c/r.toml", rules.format("twice.txt")))


def test_a_persons_own_adapter_is_imported_only_when_a_rule_names_it(here, monkeypatch):
    monkeypatch.syspath_prepend(str(here))
    written(
        "flips_of_mine.py",
        "import ckptsurgeon\nopen('imported', 'w').close()\n@ckptsurgeon.adapter(shape=lambda shapes: shapes[0][::-1])\n"
        "def turn(tensors):\n    return tensors[0].T.contiguous()\n",
    )
    saved("a.pt", w=torch.arange(6.0).view(2, 3), v=torch.ones(1))
    rules = written("r.toml", "[[adapt]]\nkey = 'w'\nop = 'flips_of_mine:turn'\n")
    assert cs.load_rules(rules) and not Path("imported").exists()
    said = []
    made = gather(RuleOptions(rules=[rules]), note=said.append)
    assert Path("imported").exists() and "flips_of_mine" in " ".join(map(str, said)) and set(made.outside.shapes) == {"flips_of_mine:turn"}
    cs.merge("a.pt", None, "out.pt", rules=rules)
    same(torch.load("out.pt"), {"w": torch.arange(6.0).view(2, 3).T.contiguous(), "v": torch.ones(1)})
    with pytest.raises(CheckpointError, match="nowhere_at_all"):
        cs.merge("a.pt", None, "no.pt", adapt={"w": "nowhere_at_all:turn"})


def test_malformed_rules_are_told_before_what_they_name_is_missed(here):
    saved("a.pt", w=torch.ones(2))
    with pytest.raises(RuleError) as caught:
        cs.merge("a.pt", None, "out.pt", adapt={"w": "transpos", "v": "chunk(dims=0)"}, drop="{")
    assert len(caught.value.problems) == 3
