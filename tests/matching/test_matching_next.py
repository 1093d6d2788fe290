"""Next is a command that a careful person would run: never worse, by truth, than a plain merge, and complete where the pair is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from next_support import Follower, World, follower, of_pair, values
from pairs_support import PAIRS, matched, read_pair, score, side
from torch import Tensor

from ckptsurgeon.matching.matcher import match
from ckptsurgeon.matching.result import Matching

pytestmark = pytest.mark.slow  # with its like

__all__ = ["follower"]
Shapes = dict[str, tuple[int, ...]]
FEW = 1_000_000  # elements of a pair's target, more of which are not written in a test
SMALL = [
    path for path in sorted(PAIRS.glob("*.json")) if sum(torch.Size(row[1]).numel() for row in json.loads(path.read_text())["target"]) < FEW
]


def doubted(found: Matching) -> set[str]:
    """The target keys whose layout is in doubt: these stay open."""
    return {key for link in found.links if link.doubt for key in link.targets}


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_a_published_pair_is_as_complete_as_matching_is(path: Path, suffix: str, follower: Follower) -> None:
    pair, world = read_pair(path), of_pair(path)
    found = matched(path, suffix == "pt")
    plain, got, _ = follower.follow(world, suffix)
    assert got.right >= plain.right
    assert got.wrong <= plain.wrong
    if score(found, pair).complete:
        assert got.right >= world.truth.keys() - doubted(found)


def moved(source: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The truth of renames: by target key the source's values."""
    return {name: source[key] for key, name in names.items()}


def world(shapes: Shapes, named: Callable[[str], str | None], more: Shapes | None = None, other: Shapes | None = None) -> World:
    """A source, and a target that calls keys by other names (None: has them not), has `more` keys, and `other` sizes of some of its own."""
    names = {key: name for key in shapes if (name := named(key)) is not None}
    goal = {name: (other or {}).get(name, shapes[key]) for key, name in names.items()} | (more or {})
    source = values(shapes, 1)
    fits = {key: name for key, name in names.items() if goal[name] == shapes[key]}
    return World(source, values(goal, 2), moved(source, fits))


def filled(one: World, key: str, name: str) -> World:
    """With the truth that a table's old rows are kept and the rest is the target's."""
    rows = one.source[key].shape[0]
    return World(one.source, one.target, {**one.truth, name: torch.cat([one.source[key], one.target[name][rows:]])})


def lm(layers: int = 4, vocabulary: int = 60, head: bool = True, prefix: str = "") -> Shapes:
    """A small language model."""
    found: Shapes = {"embed_tokens.weight": (vocabulary, 8)}
    for i in range(layers):
        found |= {f"layers.{i}.self_attn.{n}_proj.weight": (8, 8) for n in "qkvo"}
        found |= {f"layers.{i}.mlp.up_proj.weight": (16, 8), f"layers.{i}.mlp.down_proj.weight": (8, 16)}
        found |= {f"layers.{i}.{n}.weight": (8,) for n in ("input_layernorm", "post_attention_layernorm")}
    found |= {"norm.weight": (8,)}
    return {**{prefix + key: shape for key, shape in found.items()}, **({"lm_head.weight": (vocabulary, 8)} if head else {})}


def vit(blocks: int = 3, tokens: int = 17, classes: int = 10) -> Shapes:
    """A small image model."""
    found: Shapes = {
        "cls_token": (1, 1, 8),
        "pos_embed": (1, tokens, 8),
        "patch_embed.proj.weight": (8, 3, 4, 4),
        "patch_embed.proj.bias": (8,),
    }
    for i in range(blocks):
        for n, size in (("attn.qkv", 24), ("attn.proj", 8), ("mlp.fc1", 32)):
            found |= {f"blocks.{i}.{n}.weight": (size, 8), f"blocks.{i}.{n}.bias": (size,)}
        found |= {f"blocks.{i}.mlp.fc2.weight": (8, 32), f"blocks.{i}.mlp.fc2.bias": (8,)}
        found |= {f"blocks.{i}.{n}.{p}": (8,) for n in ("norm1", "norm2") for p in ("weight", "bias")}
    return {**found, "norm.weight": (8,), "norm.bias": (8,), "head.weight": (classes, 8), "head.bias": (classes,)}


def same_name(key: str) -> str:
    return key


def every_third(key: str) -> str:
    number = key.split(".")[1] if key.startswith("layers.") else "1"
    return key.replace("self_attn", "attention") if int(number) % 3 == 0 else key


GROWN = {"embed_tokens.weight": (67, 8), "lm_head.weight": (67, 8)}
WORLDS: dict[str, Callable[[], World]] = {
    "equal": lambda: world(lm(), same_name),
    "a prefix exchanged": lambda: world(lm(prefix="model."), lambda key: key.replace("model.", "decoder.", 1)),
    "a prefix added": lambda: world(lm(head=False), lambda key: f"net.backbone.{key}", {"net.head.weight": (3, 8)}),
    "wrappers": lambda: world({f"module._orig_mod.{key}": shape for key, shape in lm().items()}, lambda key: key[17:]),
    "every third layer": lambda: world(lm(12), every_third),
    "some modules renamed": lambda: world(vit(), lambda key: key.replace("attn.proj", "attn.out").replace("norm2", "norm_mlp")),
    "fewer layers in the target": lambda: world(lm(6), lambda key: None if key.startswith(("layers.4", "layers.5")) else key),
    "fewer layers in the source": lambda: world(
        lm(3), same_name, {k: s for k, s in lm(5).items() if k.startswith(("layers.3", "layers.4"))}
    ),
    "another head": lambda: world(vit(), same_name, None, {"head.weight": (4, 8), "head.bias": (4,)}),
    "another head under other names": lambda: world(
        vit(),
        lambda key: key.replace("head.", "classifier.").replace("blocks", "layers"),
        None,
        {"classifier.weight": (4, 8), "classifier.bias": (4,)},
    ),
    "a pooler beside a head of its shape": lambda: world(
        {**lm(head=False), "head.dense.weight": (8, 8), "head.dense.bias": (8,)},
        lambda key: None if "head" in key else f"model.{key}",
        {"pooler.dense.weight": (8, 8), "pooler.dense.bias": (8,)},
    ),
    "a grown vocabulary": lambda: filled(world(lm(head=False), same_name, None, GROWN), "embed_tokens.weight", "embed_tokens.weight"),
    "a grown vocabulary and its head": lambda: filled(
        filled(world(lm(), same_name, None, GROWN), "embed_tokens.weight", "embed_tokens.weight"), "lm_head.weight", "lm_head.weight"
    ),
    "a grown vocabulary under another name": lambda: filled(
        world(
            lm(head=False, prefix="model."), lambda key: key.replace("model.", "encoder."), None, {"encoder.embed_tokens.weight": (61, 8)}
        ),
        "model.embed_tokens.weight",
        "encoder.embed_tokens.weight",
    ),
    "few key and value heads": lambda: world(
        lm(), same_name, None, {f"layers.{i}.self_attn.{n}_proj.weight": (4, 8) for i in range(4) for n in "kv"}
    ),
    "positions of a longer text": lambda: filled(
        world({"wte.weight": (60, 8), "wpe.weight": (16, 8), "ln.weight": (8,)}, same_name, None, {"wpe.weight": (25, 8)}),
        "wpe.weight",
        "wpe.weight",
    ),
}


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("name", WORLDS)
def test_what_can_be_known_is_carried_and_nothing_else(name: str, suffix: str, follower: Follower) -> None:
    made = WORLDS[name]()
    plain, got, words = follower.follow(made, suffix)
    if not words:  # the file fits as it is
        assert name == "equal"
        return
    assert got.right == made.truth.keys()
    assert got.wrong <= plain.wrong


@pytest.mark.parametrize("seed", range(12))
def test_some_modules_under_other_names(seed: int, follower: Follower) -> None:
    """Each module's name may change for another, some everywhere, some in one layer; and the target lacks some keys and has others."""
    generator = torch.Generator().manual_seed(seed)

    def chance(share: float) -> bool:
        return bool(torch.rand((), generator=generator) < share)

    words = {"self_attn": "attention", "mlp": "feed_forward", "input_layernorm": "norm_in", "q_proj": "query", "embed_tokens": "tok_embed"}
    chosen = {one: other for one, other in words.items() if chance(0.5)}
    here = {int(torch.randint(0, 5, (), generator=generator)) for _ in range(3)} if chance(0.5) else set(range(5))

    def named(key: str) -> str | None:
        parts = key.split(".")
        if parts[0] == "layers" and int(parts[1]) not in here:
            return key
        return ".".join(chosen.get(part, part) for part in parts)

    made = world(lm(5), named, {"score.weight": (3, 8)} if chance(0.5) else None)
    plain, got, names = follower.follow(made)
    assert names or plain.right == made.truth.keys()
    if names:
        sides = [side([(key, list(tensor.shape), "float32") for key, tensor in state.items()]) for state in (made.source, made.target)]
        assert got.right >= plain.right and got.wrong <= plain.wrong
        assert got.right >= made.truth.keys() - doubted(match(*(dict(sorted(tensors.items())) for tensors in sides)))


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("more", [0, 1])
def test_next_gives_no_norm_the_bias_of_a_layer(more: int, back: bool, follower: Follower) -> None:
    """Norms are put into a sequence whose layers all have one width, and one layer more: names tear layers then."""
    plain, normed = {"stem.weight": (10, 10)}, {"stem.weight": (10, 10)}
    for at, (into, out) in enumerate([(10, 64), *[(64, 64)] * (2 + more), (64, 5)]):
        normed |= {f"net.{3 * at}.weight": (out, into)} | {f"net.{3 * at + 1}.{name}": (out,) for name in ("weight", "bias") if out > 5}
    for at, (into, out) in enumerate([(10, 64), (64, 64), (64, 64), (64, 5)]):
        plain |= {f"net.{2 * at}.weight": (out, into), f"net.{2 * at}.bias": (out,)}
    one, other = (values(shapes, seed) for seed, shapes in enumerate((normed, plain) if back else (plain, normed)))
    sure = {"stem.weight": one["stem.weight"], "net.0.weight": one["net.0.weight"]}
    places = [((3, 2), (2, 3))[not back]] if not more else []
    sure |= {f"net.{there * at}.weight": one[f"net.{here * at}.weight"] for here, there in places for at in range(4)}
    got = follower.follow(World(one, other, sure), "pt")[1]
    assert got.right >= sure.keys()
    assert "net.4.bias" not in got.wrong
