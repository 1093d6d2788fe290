"""Keys that are equal on both sides are set aside, and the diff is the same as without this."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_support import checkpoint, metas, rule, shapes, targets

from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.matching.proposals import advise
from ckptsurgeon.planning import diff
from ckptsurgeon.planning.prefixes import find
from ckptsurgeon.planning.prefixes.unchanged import set_aside
from ckptsurgeon.rules.rules import Outside
from ckptsurgeon.tensors import Checkpoint

CODES = {"a.weight": (2, 3), "a.SCB": (2,)}


def nothing_set_aside(source, target, rules, outside):
    return (), source, target


def told(source, target, auto):
    """The diff and the advice that follows it, or the error."""
    try:
        found = diff.compare(source, target, auto=auto)
    except CheckpointError as error:
        return str(error)
    return found, advise.advise(found, source, target, auto=auto)


@st.composite
def sources(draw: st.DrawFn, target: Checkpoint) -> Checkpoint:
    """A source with many of the keys of a target, some in another shape or dtype, sometimes with codes and values that are no tensors."""
    same = {key: target[key].shape for key in target if draw(st.integers(0, 3))}
    drawn = {**draw(shapes), **same, **(CODES if draw(st.booleans()) else {})}
    entries = draw(st.dictionaries(st.sampled_from(["a._extra_state", "b", "fc"]), st.just(1), max_size=2))
    made = checkpoint({key: shape for key, shape in drawn.items() if key not in entries}, entries=entries)
    others = {key: replace(tensor, dtype="I8") for key, tensor in made.items() if key == "a.weight" or draw(st.integers(0, 9)) == 0}
    return replace(made, tensors={**made, **others})


@given(st.data(), targets(), st.sampled_from([None, "safe"]))
def test_a_diff_is_the_same_as_if_no_key_was_set_aside(data, target, auto):
    target = replace(target, entries=data.draw(st.sampled_from([{}, {"b": 1}]))) if "b" not in target else target
    old, new = data.draw(
        st.sampled_from([("", ""), ("x.gamma", "x.weight"), ("bias", "beta"), ("x.w_g", "x.parametrizations.w.original0")])
    )
    target = replace(target, tensors={**target, **metas({new: (2,)} if new else {})})
    source = data.draw(sources(target))
    source = replace(source, tensors={**source, **metas({old: (2,)} if old and old not in source else {})})
    found = told(source, target, auto)
    with pytest.MonkeyPatch.context() as patch:
        for module in (diff, advise):
            patch.setattr(module, "set_aside", nothing_set_aside)
        patch.setattr(advise, "have_old_names", lambda names, known: True)
        patch.setattr(find, "changes_nothing", lambda source, target, equal: False)
        assert told(source, target, auto) == found


def test_equal_keys_cost_nothing_but_a_look():
    keys = {f"layers.{i}.weight": (2, 2) for i in range(50)}
    source, target = checkpoint({**keys, "fc.weight": (2, 2)}), checkpoint({**keys, "head.weight": (2, 2)}, "b.pt")
    equal, left, lacking = set_aside(source, target, (), Outside())
    assert list(equal) == list(keys) and list(left) == ["fc.weight"] and list(lacking) == ["head.weight"]


@pytest.mark.parametrize(
    ("source", "more"),
    [
        ({"a.w": (2,), "x.b.w": (2,)}, {}),  # a prefix makes another key equal
        ({"a.w": (2,), "module.c.w": (2,)}, {}),  # a wrapper
        (CODES, {}),
        ({"a.w": (2,), "c.w": (2,)}, {"ties": (("a.w", "b.w"),)}),
        ({"a.w": (2,), "c.w": (2,)}, {"entries": {"a.w": 1}}),
    ],
)
def test_a_key_that_anything_may_concern_is_not_set_aside(source, more):
    side = checkpoint(source)
    side = replace(side, tensors={key: replace(tensor, dtype="I8") if key == "a.weight" else tensor for key, tensor in side.items()})
    target = checkpoint({**dict.fromkeys(("a.w", "b.w"), (2,)), **CODES}, "b.pt", **more)
    assert set_aside(side, target, (), Outside()) == ((), side, target) or not set_aside(side, target, (), Outside())[0]


def test_rules_may_concern_any_key():
    side = checkpoint({"a.w": (2,)})
    assert not set_aside(side, side, [rule("keep", "a.*")], Outside())[0]
