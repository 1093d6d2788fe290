"""`--layout`, `--set` and open layouts as a person meets them: what match, plan, merge and apply say, and with which exit code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli_schemas import fits

WQ, WK = "layers.{}.attention.wq.weight", "layers.{}.attention.wk.weight"
Q, K = "layers.{}.self_attn.q_proj.weight", "layers.{}.self_attn.k_proj.weight"


@pytest.fixture
def rotary(place: Path) -> dict[str, torch.Tensor]:
    """Meta's names in a.safetensors, transformers' in t.safetensors; nothing in them tells the number of heads."""
    torch.manual_seed(0)
    names = {"attention.wq": "q_proj", "attention.wk": "k_proj", "attention.wv": "v_proj", "attention.wo": "o_proj"}
    source = {f"layers.{i}.{name}.weight": torch.randn(32, 32) for i in range(2) for name in names}
    save_file(source, "a.safetensors")
    save_file({f"layers.{i}.self_attn.{name}.weight": torch.zeros(32, 32) for i in range(2) for name in names.values()}, "t.safetensors")
    return source


def test_match_shows_the_ways_and_exits_with_0_and_under_strict_with_1(run, rotary):
    ended = run("match", "a.safetensors", "t.safetensors")
    assert ended.code == 0 and "layout open     4   rotary" in ended.out and "uncertain       0" in ended.out
    assert "--layout as-is" in ended.out and "permute_rope(heads=heads, to='halves')" in ended.out and "--set heads=N" in ended.out
    assert "--forward" in ended.out
    assert run("match", "a.safetensors", "t.safetensors", "--strict").code == 1
    found = run("match", "a.safetensors", "t.safetensors", "--json").json
    fits(found, "match")
    doubted = {link["targets"][0]: link for link in found["links"] if link["doubt"] == "layout"}
    assert set(doubted) == {name.format(i) for name in (Q, K) for i in range(2)}
    assert all(len(link["choices"]) == 2 and not link["certain"] and not link["applied"] for link in doubted.values())


def test_each_way_that_is_shown_works(run, rotary):
    shown = run("match", "a.safetensors", "t.safetensors", "--set", "heads=4").out
    ways = re.split(r"^    \S[^:\n]*:$", shown.partition("layout open")[2].partition("    or let")[0], flags=re.M)[1:]
    assert len(ways) == 3
    for number, way in enumerate(ways):
        words = shlex.split(" ".join(line.strip() for line in way.splitlines()))
        done = run("merge", "a.safetensors", "t.safetensors", "-o", f"{number}.safetensors", "--match", *words)
        assert done.code == 0, (words, done.err)
    weight = rotary[WQ.format(1)]
    halves = weight.view(4, 4, 2, 32).transpose(1, 2).reshape(32, 32)
    pairs = weight.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
    for number, wanted in enumerate((weight, halves, pairs)):
        assert torch.equal(load_file(f"{number}.safetensors")[Q.format(1)], wanted)


@pytest.mark.parametrize("words", [["as-is"], ["as-is", "layers.**"]])
def test_what_takes_layouts_as_they_stand_is_in_the_next_command(run, rotary, words):
    shown = run("match", "a.safetensors", "t.safetensors", "--layout", *words)
    assert shown.code == 0 and "layout open" not in shown.out
    following = shlex.split(shown.out.splitlines()[-1].partition("Next: ckptsurgeon ")[2])
    done = run(*following)
    assert done.code == 0, (following, done.err)
    assert torch.equal(load_file("merged.safetensors")[Q.format(1)], rotary[WQ.format(1)])


def test_a_rules_file_that_leaves_a_layout_open_says_so(run, rotary):
    assert run("match", "a.safetensors", "t.safetensors", "-o", "rules.toml").code == 0
    words = ("merge", "a.safetensors", "t.safetensors", "-o", "o.safetensors", "--overwrite", "--rules", "rules.toml")
    done = run(*words)
    assert done.code == 0 and "rules.toml: Layout open (rotary), 4 tensors, and no way is chosen" in done.err
    path = Path("rules.toml")
    parts = path.read_text().split("\n#\n")
    way = next(at for at, part in enumerate(parts) if "# [[" in part)
    words_of_way, _, rules = parts[way].partition("\n")
    parts[way] = f"{words_of_way}\n{rules.replace('# ', '')}"
    path.write_text("\n#\n".join(parts))
    done = run(*words)
    assert done.code == 0 and "Layout open" not in done.err and "coverage 100.0 %" in done.out


def test_gate_and_up_that_one_side_counts_are_chosen_together(run, place):
    w1, w2, gate, up = (f"{name}.weight" for name in ("h.0.mlp.w1", "h.0.mlp.w2", "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"))
    source = {w1: torch.randn(24, 8), w2: torch.randn(24, 8), "h.0.mlp.c_proj.weight": torch.randn(8, 24)}
    save_file(source, "a.safetensors")
    save_file({gate: torch.zeros(24, 8), up: torch.zeros(24, 8), "layers.0.mlp.down_proj.weight": torch.zeros(8, 24)}, "t.safetensors")
    shown = run("match", "a.safetensors", "t.safetensors").out
    assert "gate or up: which of the two is which can't be told" in shown
    ways = re.split(r"^    \S[^:\n]*:$", shown.partition("layout open")[2].partition("    or let")[0], flags=re.M)[1:]
    made = []
    for way in ways:
        words = shlex.split(" ".join(line.strip() for line in way.splitlines()))
        assert run("merge", "a.safetensors", "t.safetensors", "-o", "o.safetensors", "--overwrite", "--match", *words).code == 0
        made.append(load_file("o.safetensors"))
    for merged, (of_gate, of_up) in zip(made, ((w1, w2), (w2, w1)), strict=True):
        assert torch.equal(merged[gate], source[of_gate]) and torch.equal(merged[up], source[of_up])


def test_plan_writes_what_merge_and_apply_refuse(run, rotary):
    made = run("plan", "a.safetensors", "t.safetensors", "--match", "-o", "plan.json")
    assert made.code == 0 and "open: layout; the target's value stays" in made.out and Path("plan.json").exists()
    for words in (("apply", "plan.json"), ("merge", "a.safetensors", "t.safetensors", "--match", "--accept-uncertain")):
        refused = run(*words, "-o", "out.safetensors")
        assert refused.code == 2 and "none is chosen" in refused.err and not Path("out.safetensors").exists()
        assert "--layout as-is" in refused.err and "permute_rope(heads=heads, to='pairs')" in refused.err
    again = next(line for line in run("apply", "plan.json", "-o", "out.safetensors").err.splitlines() if "plan again" in line)
    words = shlex.split(again.partition("ckptsurgeon ")[2])
    assert run(*words).code == 0 and run("apply", "plan.json", "-o", "out.safetensors").code == 0
    assert torch.equal(load_file("out.safetensors")[Q.format(0)], rotary[WQ.format(0)])


def test_as_is_for_some_and_an_adapter_for_others(run, rotary):
    op = "permute_rope(heads=heads, to='halves')"
    words = ["--layout", "as-is", "**.k_proj.weight", "--adapt", "layers.*.self_attn.q_proj.weight", op, "--set", "heads=2"]
    assert run("merge", "a.safetensors", "t.safetensors", "-o", "out.safetensors", "--match", *words).code == 0
    merged = load_file("out.safetensors")
    assert torch.equal(merged[K.format(0)], rotary[WK.format(0)])
    assert torch.equal(merged[Q.format(0)], rotary[WQ.format(0)].view(2, 8, 2, 32).transpose(1, 2).reshape(32, 32))
    half = run("merge", "a.safetensors", "t.safetensors", "-o", "half.safetensors", "--match", *words[:3])
    assert half.code == 2 and "layout open (rotary): 2 tensors" in half.err


def test_the_rules_file_is_taken_with_its_variables(run, rotary):
    assert run("match", "a.safetensors", "t.safetensors", "-o", "rules.toml").code == 0
    lines = Path("rules.toml").read_text().splitlines()
    start = next(at for at, line in enumerate(lines) if "pairs become halves" in line)
    stop = next(at for at in range(start, len(lines)) if lines[at] in ("#", ""))
    head = next(at for at, line in enumerate(lines) if line == "# [set]")
    lines[head], lines[head + 1] = "[set]", "heads = 4"
    Path("rules.toml").write_text(
        "\n".join([*lines[: start + 1], *(line.removeprefix("# ") for line in lines[start + 1 : stop]), *lines[stop:]])
    )
    assert run("merge", "a.safetensors", "t.safetensors", "-o", "out.safetensors", "--rules", "rules.toml").code == 0
    assert torch.equal(load_file("out.safetensors")[Q.format(0)], rotary[WQ.format(0)].view(4, 4, 2, 32).transpose(1, 2).reshape(32, 32))
    other = run("diff", "a.safetensors", "t.safetensors", "--rules", "rules.toml", "--set", "heads=3")
    assert other.code == 2 and "equal parts" in other.err
    assert run("diff", "a.safetensors", "t.safetensors", "--rules", "rules.toml", "--set", "heads=8").code == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--layout", "as-is"), "no match is asked for"),
        (("--match", "--layout", "pairs"), "is no layout to take"),
        (("--match", "--layout", "as-is="), "is no layout to take"),
        (("--match", "--layout", "as-is", "nothing.*"), "matches no link whose layout is in doubt"),
        (("--match", "--layout", "as-is=nothing"), "matches no link whose layout is in doubt"),
        (("--match", "--layout", "as-is", "--set", "heads"), "sets no variable"),
        (("--match", "--layout", "as-is", "--set", "heads=x"), "sets no variable"),
        (("--match", "--layout", "as-is", "--set", "hats=4"), "'hats' is set, and no rule"),
        (("--set", "heads=4"), "'heads' is set, and no rule"),
        (("--match", "--adapt", "**.q_proj.weight", "permute_rope(heads=heads, to='halves')"), "'heads' is not set"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_slips_are_told_in_a_sentence(run, rotary, words, reason):
    ended = run("merge", "a.safetensors", "t.safetensors", "-o", "out.safetensors", *words)
    assert ended.code == 2 and reason in ended.err and "Traceback" not in ended.err and not Path("out.safetensors").exists()


def test_the_hint_for_a_variable_works(run, rotary):
    words = ("--match", "--layout", "as-is", "**.k_proj.weight", "--adapt", "**.q_proj.weight", "permute_rope(heads=heads, to='halves')")
    refused = run("merge", "a.safetensors", "t.safetensors", "-o", "out.safetensors", *words)
    assert "try: --set heads=32" in refused.err


def test_a_skeleton_has_nothing_to_keep_where_a_layout_is_open(run, rotary):
    run("skeleton", "t.safetensors", "-o", "t.json")
    refused = run("plan", "a.safetensors", "t.json", "--match")
    assert refused.code == 2 and "none is chosen" in refused.err and "--layout as-is" in refused.err
    assert run("plan", "a.safetensors", "t.json", "--match", "--layout", "as-is").code == 0


def test_after_matching_verified_says_what_it_proves(run, rotary):
    done = run("merge", "a.safetensors", "t.safetensors", "-o", "out.safetensors", "--match", "--layout", "as-is")
    assert "this proves the file, not the mapping" in done.out
    plain = run("merge", "out.safetensors", "t.safetensors", "-o", "again.safetensors")
    assert "not the mapping" not in plain.out
