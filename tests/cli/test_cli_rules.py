"""Rules, adapters and averages as a person types them: every option does what it says, and a mistake is told in words, at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptsurgeon import api

Run = Callable[..., Any]
RULES = """
# the encoder's fused projection, taken apart
[[adapt]]
from = "blocks.{i}.qkv.{p}"
to = ["layers.{i}.q.{p}", "layers.{i}.k.{p}", "layers.{i}.v.{p}"]
op = "chunk"

[[rename]]
from = "blocks.{i}.out.{p}"
to = "layers.{i}.o.{p}"
"""


@pytest.fixture
def files(place: Path) -> Path:
    torch.manual_seed(0)
    source = {
        f"blocks.{i}.{name}": torch.randn(shape) for i in range(3) for name, shape in (("qkv.weight", (6, 2)), ("out.weight", (2, 2)))
    }
    torch.save({**source, "pos": torch.randn(1, 5, 2)}, "a.pt")
    target = {f"layers.{i}.{name}.weight": torch.zeros(2, 2) for i in range(3) for name in "qkvo"}
    torch.save({**target, "pos": torch.zeros(1, 10, 2)}, "b.pt")
    (place / "rules.toml").write_text(RULES)
    return place


def load(path: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return found


def test_a_rules_file_and_rules_of_the_command_line(run: Run, files: Path) -> None:
    ended = run("merge", "a.pt", "b.pt", "-o", "out.pt", "--rules", "rules.toml", "--adapt", "pos", "interpolate")
    assert ended.code == 0, ended.err
    source, made = load("a.pt"), load("out.pt")
    assert torch.equal(made["layers.2.k.weight"], source["blocks.2.qkv.weight"][2:4])
    assert torch.equal(made["layers.1.o.weight"], source["blocks.1.out.weight"]) and made["pos"].abs().sum() > 0


def test_the_rules_of_the_command_line_come_before_the_files(run: Run, files: Path) -> None:
    ended = run("plan", "a.pt", "b.pt", "--rules", "rules.toml", "--drop", "blocks.0.**", "--json")
    assert ended.code == 0 and {row["source"] for row in ended.json["dropped"]} == {"blocks.0.qkv.weight", "blocks.0.out.weight", "pos"}


def test_a_rules_file_is_turned_round(run: Run, files: Path) -> None:
    assert run("merge", "a.pt", "b.pt", "-o", "there.pt", "--rules", "rules.toml", "--keep", "pos").code == 0
    ended = run("merge", "there.pt", "-o", "back.pt", "--rules", "rules.toml", "--reverse", "--drop", "pos")
    assert ended.code == 0, ended.err
    source, back = load("a.pt"), load("back.pt")
    assert back.keys() == source.keys() - {"pos"} and all(torch.equal(back[key], source[key]) for key in back)


def test_a_rule_that_can_not_be_turned_round_is_named(run: Run, files: Path) -> None:
    (files / "more.toml").write_text('[[drop]]\nkey = "pos"\n')
    ended = run("plan", "a.pt", "b.pt", "--rules", "rules.toml", "--rules", "more.toml", "--reverse")
    assert ended.code == 2 and "drop 'pos' (more.toml:1)" in ended.err and "rules.toml:3" not in ended.err


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('[[rename]]\nfrom = "a"\n', ["line 1", "needs from and to"]),
        ('[[adapt]]\nkey = "pos"\nop = "interpolat"\n', ["line 1", "interpolate"]),
        ('[[adapt]]\nkey = "pos"\nopp = "transpose"\n', ["line 3", "opp", "'op'"]),
        ('[[renam]]\nfrom = "a"\nto = "b"\n', ["line 1", "[[rename]]"]),
        ("[[rename\n", ["rules.toml:1"]),
        ('\n\n[[drop]]\nkey = "nothing.**"\n', ["rules.toml:3", "matches nothing"]),
    ],
)
def test_mistakes_in_a_rules_file_are_told_with_their_line(run: Run, files: Path, toml: str, words: list[str]) -> None:
    (files / "rules.toml").write_text(toml)
    ended = run("plan", "a.pt", "b.pt", "--rules", "rules.toml")
    assert ended.code == 2 and all(word in ended.err for word in words), ended.err
    assert "Traceback" not in ended.err and not ended.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapt", "pos", "nonsense"], "no adapter 'nonsense'"),
        (["--adapt", "pos", "interpolate(prefix=-1)"], "prefix can't be -1"),
        (["--adapt", "pos", "transpose(dims=[0, 9])"], "9"),
        (["--adapt", "poss", "transpose"], "close: pos"),
        (["--adapt", "pos", "interpolate(grid=[3, 3])"], "pos"),
        (["--adapt", "a -> b -> c", "chunk"], "more than one ' -> '"),
        (["--keep", "nothing"], "matches nothing"),
        (["--rules", "missing.toml"], "missing.toml: does not exist"),
        (["--rules", "."], ".: "),
        (["--adapt", "pos", "rows(source='no.txt', target='no.txt')"], "no.txt: does not exist"),
        (["--init", "pos", "nowhere:function"], "nowhere"),
        (["--weights", "1,2"], "goes with --average"),
        (["--average", "--weights", "a,b"], "numbers with commas"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_message(run: Run, files: Path, words: list[str], said: str) -> None:
    ended = run("plan", "a.pt", "b.pt", *words)
    assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err, ended.err


def test_diff_offers_what_would_fit_and_applies_nothing(run: Run, files: Path) -> None:
    ended = run("diff", "a.pt", "b.pt", "--rules", "rules.toml")
    assert ended.code == 0 and "fits by" in ended.out and "interpolate" in ended.out
    assert "--adapt pos" in ended.out.splitlines()[-1] and "--rules rules.toml" in ended.out.splitlines()[-1]
    found = run("diff", "a.pt", "b.pt", "--rules", "rules.toml", "--json").json
    assert [row["key"] for row in found["mismatched"]] == ["pos"] == [row["key"] for row in found["offers"]]
    assert found["offers"][0]["source_shape"] == [1, 5, 2] and len(found["adapted"]) == 9 and "pos" not in found["matched"]


def test_an_offer_is_taken_by_pasting_the_next_command(run: Run, files: Path) -> None:
    import shlex

    last = run("diff", "a.pt", "b.pt", "--rules", "rules.toml").out.splitlines()[-1]
    words = shlex.split(last.removeprefix("Next: ckptsurgeon "))
    assert run(*words).code == 0 and load("merged.pt")["pos"].abs().sum() > 0


def test_average_has_no_target(run: Run, files: Path) -> None:
    torch.save({"w": torch.zeros(2)}, "x.pt")
    torch.save({"w": torch.ones(2)}, "y.pt")
    assert run("merge", "x.pt", "y.pt", "-o", "mean.pt", "--average").code == 0
    assert run("merge", "x.pt", "y.pt", "-o", "third.pt", "--average", "--weights", "2,1").code == 0
    assert load("mean.pt")["w"].tolist() == [0.5, 0.5]
    torch.testing.assert_close(load("third.pt")["w"], torch.tensor([1 / 3, 1 / 3]))


def test_these_from_one_and_those_from_another(run: Run, files: Path) -> None:
    for number, name in enumerate(("x.pt", "y.pt", "z.pt")):
        torch.save({"body.w": torch.full((2,), float(number)), "head.w": torch.full((3,), float(number))}, name)
    ended = run("merge", "x.pt", "y.pt", "z.pt", "-o", "out.pt")
    assert ended.code == 2 and "two sources land on 'body.w'" in ended.err
    assert run("merge", "x.pt", "y.pt", "z.pt", "-o", "out.pt", "--drop", "0:head.*", "--drop", "1:body.*").code == 0
    assert load("out.pt")["body.w"].tolist() == [0, 0] and load("out.pt")["head.w"].tolist() == [1, 1, 1]


def test_auto_safe_is_asked_for_by_name(run: Run, files: Path) -> None:
    torch.save({"fc.weight": torch.ones(3, 2)}, "x.pt")
    torch.save({"fc.weight": torch.zeros(3, 2, 1, 1)}, "y.pt")
    assert run("merge", "x.pt", "y.pt", "-o", "out.pt").code == 1
    assert run("merge", "x.pt", "y.pt", "-o", "out.pt", "--auto", "safe").code == 0
    assert load("out.pt")["fc.weight"].sum() == 6
    assert run("merge", "x.pt", "y.pt", "-o", "out.pt", "--auto", "all").code == 2


@pytest.mark.parametrize("width", [80, 200])
def test_long_rules_stay_within_the_terminal(files: Path, width: int) -> None:
    adapt = {"pos": "interpolate(prefix=1, grid=[2, 2], to=[3, 3])"}
    plan = api.plan("a.pt", "b.pt", rules="rules.toml", adapt=adapt).to_text(width=width)
    diff = api.diff("a.pt", "b.pt", rules="rules.toml", adapt=adapt).to_text(width=width)
    assert max(map(len, [*plan.splitlines(), *diff.splitlines()])) <= width, plan + diff


ENDLESS = "/(a+)+/"


@pytest.mark.parametrize(
    "words",
    [
        ("diff", "long.pt", "b.pt", "--drop", ENDLESS),
        ("diff", "long.pt", "b.pt", "--rules", "endless.toml"),
        ("plan", "long.pt", "b.pt", "--rules", "endless.toml"),
        ("plan", "b.pt", "long.pt", "--init", ENDLESS, "zeros"),
        ("plan", "b.pt", "long.pt", "--keep", ENDLESS),
        ("merge", "long.pt", "-o", "out.pt", "--rename", ENDLESS, "b"),
        ("match", "long.pt", "b.pt", "--rules", "endless.toml"),
        ("merge", "long.pt", "-o", "out.pt", "--dtype", "F16", "--allow-cast", ENDLESS),
    ],
)
def test_a_regular_expression_that_would_run_for_ever_is_stopped(run: Run, files: Path, words: tuple[str, ...]) -> None:
    torch.save({"a" * 40 + "!": torch.tensor([1e9])}, "long.pt")
    (files / "endless.toml").write_text(f"# one rule\n\n[[drop]]\nkey = '{ENDLESS}'\n")
    ended = run(*words, "--limit", "regex-seconds=1")
    assert ended.code == 2 and "/(a+)+/ takes more than 1 s" in ended.err and "--limit regex-seconds=5" in ended.err
    assert "endless.toml:3" in ended.err if "--rules" in words else "endless" not in ended.err
    assert not Path("out.pt").exists()


def test_quantised_weights_on_the_command_line(run: Run, files: Path) -> None:
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    torch.save({"q.weight": weight, "q.weight_scale_inv": torch.full((1, 1), 0.5), "b": torch.ones(1)}, "fp8.pt")
    torch.save({"q.weight": torch.zeros(4, 4), "b": torch.ones(1)}, "plain.pt")
    for words in (
        ("merge", "fp8.pt", "plain.pt", "-o", "x.pt"),
        ("plan", "fp8.pt", "plain.pt"),
        ("merge", "fp8.pt", "-o", "x.pt", "--dtype", "F16"),
    ):
        ended = run(*words)
        assert ended.code == 2 and "q.weight" in ended.err and "--dequantize" in ended.err and not Path("x.pt").exists()
        error = run(*words, "--json").json["error"]
        assert (error["type"], error["key"]) == ("CastError", "q.weight")
        assert run(*words, "--dequantize", *(["--overwrite"] if words[0] == "merge" else [])).code == 0
        Path("x.pt").unlink(missing_ok=True)
    assert "--dequantize" in run("diff", "fp8.pt", "plain.pt").out.splitlines()[-1]
    assert run("diff", "fp8.pt", "plain.pt", "--json").json["quantised"][0]["scales"] == ["q.weight_scale_inv"]
    assert run("inspect", "fp8.pt", "--json").json["quantised"][0]["dequantize"] is True
    assert "CK203 (note) q.weight" in run("check", "fp8.pt", "-v").out
    assert run("check", "fp8.pt").code == 0 and "1 note" in run("check", "fp8.pt").out
    run("plan", "fp8.pt", "plain.pt", "--dequantize", "-o", "p.json")
    assert run("apply", "p.json", "-o", "y.pt", "--finite").code == 0
    assert torch.equal(torch.load("y.pt")["q.weight"], torch.full((4, 4), 0.5))
    assert run("merge", "plain.pt", "-o", "z.pt", "--dequantize").code == 2
