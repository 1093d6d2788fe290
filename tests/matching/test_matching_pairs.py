"""Pairs of published implementations: every tensor is found, with what has to be done to it, and nothing wrong is ever sure."""

from __future__ import annotations

from pathlib import Path

import pytest
from pairs_support import PAIRS, matched, read_pair, score

FILES = sorted(PAIRS.glob("*.json"))
# What names and shapes can't tell: how many tensors stay uncertain there, and why.
UNCERTAIN = {
    "real_silero_vad_jit__real_silero_vad_16k": (2, "layers that a second net of the source has too, of the same shapes"),
    "idea_grounding_dino__hf_grounding_dino": (70, "norms that are counted on one side, and named after attentions on the other"),
    "cloneofsimo_auraflow__diffusers_auraflow": (34, "two streams of one form, told by numbers and letters on one side"),
}


@pytest.mark.parametrize("in_order", [True, False], ids=["library", "sorted"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_published_pair(path: Path, in_order: bool) -> None:
    pair = read_pair(path)
    found = score(matched(path, in_order), pair)
    assert found.wrong == 0
    assert found.missed == 0
    assert found.uncertain <= UNCERTAIN.get(pair.name, (0, ""))[0]


def test_there_are_pairs_of_every_kind() -> None:
    ops = {truth.op.partition("(")[0].split(" ")[0] for path in FILES for truth in read_pair(path).truth.values()}
    assert {"copy", "chunk", "concat", "reshape", "stack", "transpose", "permute_rows"} <= ops
    assert len(FILES) >= 20


def test_every_link_says_why() -> None:
    for path in FILES:
        pair = read_pair(path)
        found = matched(path)
        assert all(link.evidence for link in found.links)
        assert set(found.unmatched).isdisjoint(found.by_target)
        assert {*found.unmatched, *found.by_target} == set(pair.target)
        assert {*found.unused, *(key for link in found.links for key in link.sources)} == set(pair.source)
