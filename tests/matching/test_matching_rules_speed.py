"""Rules for very many links are made in time that grows with the links: a model of 160 experts in 61 layers, and names that nothing folds.

The bounds are generous, and hold what is quadratic off: the first took minutes before, and takes some 3 seconds of a core.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from time import process_time

import pytest
from rules_support import checkpoint

from ckptsurgeon.matching.rules_from_links.generalise import Task, generalise
from ckptsurgeon.planning.links import Link

pytestmark = pytest.mark.slow  # with its like

LAYERS, EXPERTS = 61, 160
SQUARE = (2, 2)
chance = Random(13)
SOME = frozenset(chance.sample(range(EXPERTS), EXPERTS // 3))


def made(pairs: dict[str, str]) -> tuple[int, float]:
    """How many rules lead to these renames, and the seconds of a core that it took."""
    source, target = checkpoint(dict.fromkeys(pairs, SQUARE)), checkpoint(dict.fromkeys(pairs.values(), SQUARE), "model:Net")
    links = tuple(Link((one,), (other,), "", 9.0) for one, other in pairs.items())
    began = process_time()
    return len(generalise(Task(source, target, links))), process_time() - began


@pytest.mark.parametrize(
    ("renamed", "most"),
    [(lambda layer, expert: expert % 3 == 0, 1), (lambda layer, expert: layer % 3 == 0, 1), (lambda layer, expert: expert in SOME, 1)],
    ids=["every third expert", "every third layer", "a list of experts"],
)
def test_thirty_thousand_links_of_which_a_third_is_renamed(renamed: Callable[[int, int], bool], most: int) -> None:
    pairs = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            head = "special" if renamed(layer, expert) else "experts"
            for part in ("gate", "up", "down"):
                pairs[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"] = (
                    f"model.layers.{layer}.mlp.{head}.{expert}.{part}_proj.weight"
                )
    rules, seconds = made(pairs)
    assert rules == most and seconds < 20


def test_names_that_nothing_folds_get_a_rule_each() -> None:
    names = [f"{number:010x}" for number in chance.sample(range(1 << 40), 10_000)]
    rules, seconds = made({f"m.{one}.w": f"n.{other}.w" for one, other in zip(names[::2], names[1::2], strict=True)})
    assert rules == 5_000 and seconds < 20


def test_a_long_list_in_another_order() -> None:
    order = chance.sample(range(4_000), 4_000)
    rules, seconds = made({f"h.{at}.w": f"h.{to}.w" for at, to in enumerate(order)})
    assert rules <= 4_000 and seconds < 20


def test_long_keys_cost_what_they_are_long() -> None:
    deep = ".".join(f"block{at}.{at}" for at in range(31))  # as many segments as are looked at
    rules, seconds = made({f"{deep}.{at}.w": f"net.{deep}.{at}.v" for at in range(500)})
    assert rules == 1 and seconds < 20
