"""Rules made of links lead to exactly these links when their text is read back, and are few: for published pairs and for any links."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from links_support import Shapes, World
from pairs_support import PAIRS, read_pair
from profiles import examples
from rules_support import checkpoint, led, literal_plan, proposed, read_back

from ckptsurgeon.errors import PlanError
from ckptsurgeon.matching.matcher import match
from ckptsurgeon.matching.proposals.propose import propose
from ckptsurgeon.planning.diff import compare
from ckptsurgeon.planning.links import Link
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.rules.rulefile import parse_rules
from ckptsurgeon.rules.rules import Rule

pytestmark = pytest.mark.slow  # with its like

FILES = sorted(PAIRS.glob("*.json"))
MOST = {  # rules that a pair may take
    "timm_vit__hf_vit": 11,
    "hf_gpt2__nanogpt": 1,
    "hf446_mixtral__hf523_mixtral": 3,
    "hf_bert_encoder__torch_transformer_encoder": 6,
    "hf_llama__torchtune_llama3": 10,
    "microsoft_swin__timm_swin": 2,
    "openai_whisper__hf_whisper": 18,
    "segment_anything__hf_sam": 26,
    "torchvision_convnext_tiny__timm_convnext_tiny": 10,
    "torchvision_vgg16__timm_vgg16": 4,
    "facebook_convnext__hf_convnext": 8,
}


@pytest.mark.parametrize("turned", [pytest.param(False, id="forward"), pytest.param(True, id="backward", marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_rules_of_a_published_pair_lead_to_its_links(path: Path, turned: bool) -> None:
    pair = read_pair(path)
    one, other = (pair.target, pair.source) if turned else (pair.source, pair.target)
    source, target = checkpoint(one, "a.pt"), checkpoint(other, "model:Net")
    links = match(source, target).links
    for accept in (False, True):
        found = proposed(source, target, links, accept)
        back = read_back(found, source, target)
        assert back == literal_plan(found.applied, source, target)
        assert back == led(make_plan([source], target, found.rules))
    assert proposed(source, target, links, True).toml == found.toml
    if not turned and path.stem in MOST:
        assert len(found.rules) <= MOST[path.stem]


def test_every_bound_is_of_a_pair() -> None:
    assert set(MOST) <= {path.stem for path in FILES}


segments = st.sampled_from(["a", "b", "norm1", "norm2", "fc", "0", "1", "2", "10", "module", "w", "conv_1", "h"])
keys = st.lists(segments, min_size=1, max_size=4).map(".".join)
SQUARE = (2, 2)


@st.composite
def any_links(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], list[Link]]:
    """Two sides of square tensors with names that meet in every way, and links between them at random: renames, shared sources, transposes,
    parts of a whole on either side."""
    sources = draw(st.lists(keys, min_size=1, max_size=14, unique=True))
    targets = draw(st.lists(st.one_of(keys, st.sampled_from(sources)), min_size=1, max_size=14, unique=True))
    one, other = dict.fromkeys(sources, SQUARE), dict.fromkeys(targets, SQUARE)
    left, free, links = draw(st.permutations(sources)), draw(st.permutations(targets)), []
    while left and free and draw(st.integers(0, 9)):
        kind = draw(st.sampled_from(["plain"] * 6 + ["same", "transpose", "shared", "concat", "chunk", "stack"]))
        if kind == "same":
            name = next((name for name in left if name in free), None)
            if name is not None:
                links.append(Link((left.pop(left.index(name)),), (free.pop(free.index(name)),), "", 9.0))
        elif kind in ("concat", "stack") and len(left) > 1:
            some, to = (left.pop(), left.pop()), free.pop()
            other[to] = (4, 2) if kind == "concat" else (2, 2, 2)
            links.append(Link(some, (to,), f"{kind}(dim=0)", 9.0))
        elif kind in ("chunk", "shared") and len(free) > 1:
            name, to = left.pop(), (free.pop(), free.pop())
            one[name] = (4, 2) if kind == "chunk" else SQUARE
            links.append(Link((name,), to, "chunk(dim=0)" if kind == "chunk" else "", 9.0))
        else:
            links.append(Link((left.pop(),), (free.pop(),), "transpose" if kind == "transpose" else "", 9.0))
    return one, other, links


@settings(max_examples=examples(150), deadline=None)
@given(any_links())
@example(
    ({"a.w": SQUARE, "b.w": SQUARE}, {"a.w": SQUARE, "b.w": SQUARE}, [Link(("a.w",), ("b.w",), "", 9.0), Link(("b.w",), ("a.w",), "", 9.0)])
)
def test_any_links_at_all_become_rules_that_lead_to_them(
    drawn: tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], list[Link]],
) -> None:
    check_any(*drawn)


@settings(max_examples=examples(250), deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_keys_at_all_get_rules_that_lead_to_their_links(chance: Random) -> None:
    world = World(chance)
    if world.links:
        check_any(world.source, world.target, world.links)


def check_any(one: Shapes, other: Shapes, links: list[Link]) -> None:
    """Every link is written, and the rules' text leads to what one literal rule a link leads to."""
    source, target = checkpoint(one), checkpoint(other, "model:Net")
    found = proposed(source, target, links)
    assert set(found.applied) == set(links)
    try:
        assert read_back(found, source, target) == literal_plan(links, source, target)
    except PlanError:  # what the links leave open fits by two prefixes
        assert compare(source, target, found.rules).rivals


@settings(max_examples=examples(60), deadline=None)
@given(st.sets(st.integers(0, 40), min_size=1), st.sets(st.integers(0, 40), min_size=1), st.booleans())
def test_blocks_of_which_some_are_renamed_need_one_rule(some: set[int], all_: set[int], moved: bool) -> None:
    """Every third, or any; those of others keep their names, or have another one too."""
    called = {i: "self_attn" if i in some else "own" if moved else "attn" for i in all_}
    names = {f"h.{i}.attn.{leaf}": f"h.{i}.{called[i]}.{leaf}" for i in all_ for leaf in "qkv"}
    found = renamed(names)
    assert len(found) == (len({i in some for i in all_}) if moved else bool(some & all_))


def test_every_third_of_92_blocks() -> None:
    names = {f"net.h.{i}.self_attn.{leaf}": f"net.h.{i}.{'self_attn' if i % 3 else 'attn'}.{leaf}" for i in range(92) for leaf in "qkv"}
    names |= {f"net.h.{i}.norm.w": f"net.h.{i}.norm.w" for i in range(92)}
    assert renamed(names) == [("rename", "net.h.{i=0..90..3}.self_attn.{p}", "net.h.{i}.attn.{p}")]
    listed = {name: name.replace("attn", "mix") if name.split(".")[2] in ("0", "4", "9") else name for name in names.values()}
    assert renamed(listed) == [
        ("rename", "net.h.{i=0,9}.attn.{p}", "net.h.{i}.mix.{p}"),
        ("rename", "net.h.4.self_attn.{p}", "net.h.4.self_mix.{p}"),
    ]


def test_numbers_that_go_over_a_hole_or_into_stages_are_runs() -> None:
    assert renamed({f"h.{i}.w": f"h.{i + 2 * (i > 4)}.w" for i in range(12)}) == [("rename", "h.{i=5..11}.w", "h.{i+2}.w")]
    stages = {f"features.{i}.{leaf}": f"stages.{i // 8}.{(i - 3 * (i > 7)) % 8}.{leaf}" for i in range(11) for leaf in "wb"}
    assert len(renamed(stages)) <= 3


def test_any_experts_of_any_layers_are_few_products() -> None:
    odd = {(0, 1), (0, 5), (3, 1), (3, 5), (4, 2)}
    names = {f"l.{i}.experts.{e}.w": f"l.{i}.{'shared' if (i, e) in odd else 'experts'}.{e}.w" for i in range(6) for e in range(8)}
    assert renamed(names) == [
        ("rename", "l.{i=0,3}.experts.{j=1,5}.w", "l.{i}.shared.{j}.w"),
        ("rename", "l.4.experts.2.w", "l.4.shared.2.w"),
    ]


def test_parts_of_some_layers_are_joined() -> None:
    one = {f"h.{i}.{part}.w": SQUARE for i in range(10) for part in "qk"}
    other = {(f"h.{i}.qk.w" if i % 2 else f"h.{i}.{part}.w"): ((4, 2) if i % 2 else SQUARE) for i in range(10) for part in "qk"}
    links = [Link((f"h.{i}.q.w", f"h.{i}.k.w"), (f"h.{i}.qk.w",), "concat(dim=0)", 9.0) for i in range(1, 10, 2)]
    links += [Link((name,), (name,), "", 9.0) for name in one if name in other]
    assert rules_of(one, other, links) == [("adapt", "h.{i=1..9..2}.q.w + h.{i=1..9..2}.k.w -> h.{i}.qk.w", "concat(dim=0)")]


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(2, 6), st.integers(0, 3), st.integers(0, 2), st.booleans())
def test_layers_take_one_rule_whatever_they_count_from(count: int, start: int, other_start: int, swapped: bool) -> None:
    source = checkpoint({f"h.{i + start}.{leaf}": SQUARE for i in range(count) for leaf in ("w", "b")})
    target = checkpoint({f"net.blocks.{i + other_start}.{leaf}": SQUARE for i in range(count) for leaf in ("w", "b")}, "model:Net")
    turned = {"w": "b", "b": "w"} if swapped else {"w": "w", "b": "b"}
    links = [
        Link((f"h.{i + start}.{leaf}",), (f"net.blocks.{i + other_start}.{turned[leaf]}",), "", 9.0)
        for i in range(count)
        for leaf in ("w", "b")
    ]
    found = proposed(source, target, links)
    assert len(found.rules) == (2 if swapped else 1)
    assert read_back(found, source, target) == literal_plan(links, source, target)


def rules_of(one: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]], links: list[Link]) -> list[tuple[str, ...]]:
    source, target = checkpoint(one), checkpoint(other, "model:Net")
    found = proposed(source, target, links)
    assert read_back(found, source, target) == literal_plan(links, source, target)
    return [(rule.kind, rule.pattern, rule.result) for rule in found.rules]


def renamed(pairs: dict[str, str]) -> list[tuple[str, ...]]:
    links = [Link((one,), (other,), "", 9.0) for one, other in pairs.items()]
    return rules_of(dict.fromkeys(pairs, SQUARE), dict.fromkeys(pairs.values(), SQUARE), links)


def test_stages_of_equal_depth_count_with_two_numbers() -> None:
    assert renamed({f"layers.{i}.blocks.{j}.w": f"h.{2 * i + j}.w" for i in range(3) for j in range(2)}) == [
        ("rename", "layers.{i}.blocks.{j}.w", "h.{2*i+j}.w")
    ]


def test_every_second_module_is_halved() -> None:
    assert renamed({f"features.{2 * i + 1}.w": f"stages.{i}.w" for i in range(4)}) == [("rename", "features.{i}.w", "stages.{i//2}.w")]


def test_an_exception_stands_before_the_rule() -> None:
    found = renamed({f"h.{i}.w": f"blocks.{i}.w" for i in range(5)} | {"h.5.w": "last.w"})
    assert found == [("rename", "h.5.w", "last.w"), ("rename", "h.{i}.w", "blocks.{i}.w")]


def test_words_that_both_sides_keep_become_a_part() -> None:
    names = {f"{side}.h.{i}.{leaf}": f"net.{side}.layers.{i}.{leaf}" for side in ("enc", "dec") for i in range(2) for leaf in ("w", "b")}
    assert len(renamed(names)) == 1


def test_what_keeps_its_name_needs_no_rule() -> None:
    assert renamed({name: name for name in ("a.w", "a.b", "h.0.w")}) == []
    assert renamed({f"module.{name}": name for name in ("a.w", "a.b", "h.0.w")}) == []


def test_what_no_link_has_is_dropped_where_it_would_go_by_name_and_only_there() -> None:
    one = {"aux.0.w": SQUARE, "aux.1.w": SQUARE, "aux.1.b": SQUARE, "body.w": SQUARE, "free.w": SQUARE}
    other = {"aux.0.w": SQUARE, "aux.1.w": SQUARE, "aux.1.b": SQUARE, "net.w": SQUARE}
    assert rules_of(one, other, [Link(("body.w",), ("net.w",), "", 9.0)]) == [("drop", "aux.**", ""), ("rename", "body.w", "net.w")]
    # A shape that does not fit is told so by the plan, and needs no rule.
    assert rules_of({"w": (3,), "a": SQUARE}, {"w": (2,), "b": SQUARE}, [Link(("a",), ("b",), "", 9.0)]) == [("rename", "a", "b")]


def test_two_keys_that_change_places() -> None:
    assert renamed({"q.w": "k.w", "k.w": "q.w", "q.b": "k.b", "k.b": "q.b"}) == [
        ("rename", "q.{p}", "k.{p}"),
        ("rename", "k.{p}", "q.{p}"),
    ]


def test_parts_are_gathered_and_counted() -> None:
    experts = {f"l.{i}.experts.{e}.w{k}": (4, 3) for i in range(2) for e in range(3) for k in (1, 3)}
    whole = {f"h.{i}.gate_up": (3, 8, 3) for i in range(2)}
    joined = [
        Link(
            tuple(f"l.{i}.experts.{e}.w{k}" for e in range(3) for k in (1, 3)),
            (f"h.{i}.gate_up",),
            "concat(dim=0, of=2) | stack(dim=0)",
            9.0,
        )
        for i in range(2)
    ]
    assert rules_of(experts, whole, joined) == [
        ("adapt", "l.{i}.experts.{e}.w1 + l.{i}.experts.{e}.w3 -> h.{i}.gate_up", "concat(dim=0, of=2) | stack(dim=0)")
    ]
    source, target = checkpoint(whole), checkpoint(experts, "model:Net")
    back = [Link(link.targets, link.sources, "unstack(dim=0) | chunk(dim=0)", 9.0) for link in joined]
    found = proposed(source, target, back)
    assert [rule.pattern for rule in found.rules] == ["h.{i}.gate_up -> l.{i}.experts.{e}.w1 + l.{i}.experts.{e}.w3"]
    assert read_back(found, source, target)["l.1.experts.2.w3"] == (
        ("h.1.gate_up",),
        ({"op": "unstack", "dim": 0, "index": 2}, {"op": "chunk", "dim": 0, "index": 1, "of": 2}),
    )


def test_ops_of_single_tensors_are_told_by_the_targets_keys() -> None:
    one = {f"h.{i}.{part}.weight": (2, 3) for i in range(3) for part in ("a", "b")}
    other = {f"h.{i}.{part}.weight": (3, 2) for i in range(3) for part in ("a", "b")}
    assert rules_of(one, other, [Link((key,), (key,), "transpose", 9.0) for key in one]) == [("adapt", "h.*.{a,b}.weight", "transpose")]


UNCERTAIN = [
    Link(("a.w",), ("net.one.w",), "", 9.0, ("same name",)),
    Link(("b.w",), ("net.two.w",), "", 0.5, ("same place",), "c.w -> net.two.w"),
    Link(("last.w",), ("last.w",), "", 0.0, ("same name",), "c.w -> last.w"),
]


def test_uncertain_links_stand_in_comments_from_which_they_can_be_taken() -> None:
    source = checkpoint(dict.fromkeys(("a.w", "b.w", "c.w", "last.w"), SQUARE))
    target = checkpoint(dict.fromkeys(("net.one.w", "net.two.w", "last.w"), SQUARE), "model:Net")
    found = proposed(source, target, UNCERTAIN)
    assert read_back(found, source, target) == {"net.one.w": (("a.w",), ())}
    assert "margin 0.5 over c.w -> net.two.w" in found.toml and "margin 0.0 over c.w -> last.w" in found.toml
    assert [rule.kind for rule in parse_rules(found.toml, "r")] == ["drop", "rename"]

    def unmarked(line: str) -> str:
        return line.removeprefix("# ") if line.startswith(("# [[", "# from", "# to")) else line

    accepted = parse_rules("\n".join(map(unmarked, found.toml.splitlines())), "r")
    taken = proposed(source, target, UNCERTAIN, accept=True)
    assert led(make_plan([source], target, [rule for rule in accepted if rule.kind != "drop"])) == read_back(taken, source, target)
    assert len(read_back(taken, source, target)) == 3


def test_keys_with_the_characters_of_patterns_are_named_by_rules_too() -> None:
    one, other = {"a {x}": SQUARE, "b.w": SQUARE, "same {y}": SQUARE}, {"c.*": SQUARE, "d.w": SQUARE, "same {y}": SQUARE}
    links = [
        Link(("a {x}",), ("c.*",), "", 9.0),
        Link(("b.w",), ("d.w",), "", 9.0),
        Link(("same {y}",), ("same {y}",), "", 9.0),
    ]
    assert rules_of(one, other, links) == [("rename", "a \\{x\\}", "c.\\*"), ("rename", "b.w", "d.w")]


def test_keys_that_no_text_can_have_are_left_to_the_person() -> None:
    one, other = {"a\ud800": SQUARE, "b.w": SQUARE, "same\ud800": SQUARE}, {"c": SQUARE, "d.w": SQUARE, "same\ud800": SQUARE}
    links = [Link((name,), (to,), "", 9.0) for name, to in zip(one, other, strict=True)]
    source, target = checkpoint(one), checkpoint(other, "model:Net")
    found = proposed(source, target, links)
    assert {link.targets for link in found.applied} == {("d.w",), ("same\ud800",)}
    assert any("no text can have" in words for link in found.links for words in link.evidence)
    assert read_back(found, source, target) == {"d.w": (("b.w",), ()), "same\ud800": (("same\ud800",), ())}


def test_a_persons_rules_come_first_and_their_keys_are_not_looked_for() -> None:
    names = {f"h.{i}.{part}.w": SQUARE for i in range(2) for part in ("first", "second")}
    source = checkpoint(names | {"tower.first.w": SQUARE})
    target = checkpoint({key.replace("h.", "blocks."): shape for key, shape in names.items()}, "model:Net")
    before = (Rule("drop", "tower.**"), Rule("rename", "h.{i}.first.w", "blocks.{i}.second.w"))
    found = propose(source, target, before)
    plan = led(make_plan([source], target, found.rules))
    assert plan["blocks.0.second.w"] == (("h.0.first.w",), ())
    assert found.rules[:2] == before and "tower.**" in found.toml
    assert read_back(found, source, target) == plan


@settings(max_examples=examples(25), deadline=None)
@given(st.lists(st.integers(1, 5), min_size=5, max_size=8), st.booleans())
def test_modules_numbered_through_get_their_places_first(depths: list[int], left_over: bool) -> None:
    """Stages of any depth, in one row on the other side, as in MobileNet; the first of a stage lacks a part."""
    names: dict[str, str] = {}
    places = [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]
    for at, (stage, block) in enumerate(places, 1):
        parts = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}
        for one, other in parts.items() if block else list(parts.items())[2:]:
            names[f"features.{at}.conv.{one}.weight"] = f"blocks.{stage}.{block}.{other}.weight"
    names |= {"features.0.weight": "stem.weight", "head.weight": "classifier.weight"}
    links = [Link((one,), (other,), "", 9.0) for one, other in names.items()]
    one, other = dict.fromkeys(names, SQUARE), dict.fromkeys(names.values(), SQUARE)
    if left_over:  # in a module that moves, where the target has the same name
        one |= {"features.1.aux": SQUARE}
        other |= {"blocks.0.0.aux": SQUARE}
    source, target = checkpoint(one), checkpoint(other, "model:Net")
    found = proposed(source, target, links)
    assert read_back(found, source, target) == literal_plan(links, source, target)
    assert len(found.rules) <= max(24, len(places) + 14)


def test_two_stages_are_far_shorter() -> None:
    names = {}
    for at in range(17):
        stage, block = divmod(at * at // 17, 4)
        for one, other in (("0", "a"), ("1", "b"), ("2", "c"), ("3", "d")):
            names[f"features.{at}.{one}.w"] = f"blocks.{stage}.{block + 10 * at}.{other}.w"
    found = renamed(names)
    assert ("stage", "", "") in found and len(found) == 17 + 1 + 4
