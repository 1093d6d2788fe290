"""What is missing and extra is told with its shape, in text and JSON; a head of other classes under another name is said to be that."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from safetensors.numpy import save_file

import ckptsurgeon as cs

Shapes = Mapping[str, tuple[int, ...]]
BODY = {f"layers.{i}.conv.weight": (8, 8, 3, 3) for i in range(3)}


@pytest.fixture
def told(tmp_path):
    """The diff of two files of these shapes."""

    def compare(source: Shapes, target: Shapes) -> cs.Diff:
        for name, shapes in (("a", source), ("b", target)):
            save_file({key: np.zeros(shape, np.float32) for key, shape in shapes.items()}, tmp_path / f"{name}.safetensors")
        return cs.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")

    return compare


NAMES = st.lists(st.sampled_from(["a", "b", "c", "0", "1", "weight", "bias"]), min_size=1, max_size=3).map(".".join)
SIDES = st.dictionaries(NAMES, st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple), min_size=1, max_size=8)


@settings(max_examples=examples(30), deadline=None)
@given(SIDES, SIDES)
def test_each_missing_and_extra_tensor_has_its_shape(tmp_path_factory, source: Shapes, target: Shapes) -> None:
    folder = tmp_path_factory.mktemp("sides")
    for name, shapes in (("a", source), ("b", target)):
        save_file({key: np.zeros(shape, np.float32) for key, shape in shapes.items()}, folder / f"{name}.safetensors")
    found = cs.diff(folder / "a.safetensors", folder / "b.safetensors")
    assert dict(found.missing_shapes) == {key: target[key] for key in found.missing} and list(found.missing_shapes) == list(found.missing)
    assert dict(found.extra_shapes) == {key: source[key] for key in found.extra} and list(found.extra_shapes) == list(found.extra)
    value = found.to_dict()
    assert value["missing"] == list(found.missing) and value["extra"] == list(found.extra)
    assert value["missing_shapes"] == {key: list(target[key]) for key in found.missing}
    whole = found.to_text(verbose=True)
    for key in found.missing:
        shape = f"({', '.join(map(str, target[key]))}{',' if len(target[key]) == 1 else ''})"
        assert shape in whole


def test_shapes_stand_beside_the_keys_and_fold_with_them(told) -> None:
    found = told({**BODY, "old.weight": (3, 8)}, {**BODY, **{f"new.{i}.weight": (5, 7) for i in range(9)}, "tail.bias": (2,)})
    text = str(found)
    assert "new.{0..8}.weight  (5, 7)" in text and "tail.bias" in text and "(2,)" in text
    assert any(line.split() == ["old.weight", "(3,", "8)"] for line in text.splitlines())


def test_many_kinds_of_keys_are_folded_without_shapes(told) -> None:
    odd = {f"{letter}.{name}": (number + 1,) for number, letter in enumerate("abcdefghijklm") for name in ("weight", "bias")}
    text = str(told(BODY, {**BODY, **odd}))
    assert "a.{bias,weight}" in text and "(13,)" not in text


HEAD = [
    ("fc", (1000, 512), "linear", (10, 512), "10 classes instead of 1,000"),
    ("fc", (1000, 512), "head", (10, 512), "10 classes instead of 1,000"),
    ("classifier", (1000, 64), "fc", (1, 64), "1 class instead of 1,000"),
    ("head.fc", (21, 64), "classifier.1", (1000, 64), "1,000 classes instead of 21"),
    ("module.fc", (1000, 512), "module.last", (10, 512), "10 classes instead of 1,000"),
    ("conv_head", (21, 64, 1, 1), "classifier", (5, 64, 1, 1), "5 classes instead of 21"),
]


@pytest.mark.parametrize(("old", "shape", "new", "other", "words"), HEAD)
@pytest.mark.parametrize("bias", [True, False])
def test_a_renamed_head_with_other_classes(told, old, shape, new, other, words, bias) -> None:
    def side(name: str, rows: tuple[int, ...]) -> Shapes:
        return {**BODY, f"{name}.weight": rows, **({f"{name}.bias": rows[:1]} if bias else {})}

    found = told(side(old, shape), side(new, other))
    (head,) = found.heads
    assert (head.source_shape, head.target_shape) == (shape, other)
    assert head.words == f"looks like the head under another name, with {words}: fresh"
    text = str(found)
    assert "\n  other heads     1   under other names\n" in text
    assert head.words in text and f"{head.source} " in text and f"{head.target} " in text
    assert found.to_dict()["heads"] == [
        {"source": head.source, "target": head.target, "source_shape": [*shape], "target_shape": [*other], "message": head.words}
    ]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({"fc.weight": (10, 8)}, {"head.weight": (5, 9)}),  # another width
        ({"fc.weight": (10, 8)}, {"head.weight": (10, 8)}),  # the same size: no other classes
        ({"lm_head.weight": (100, 8)}, {"output_tokens.weight": (50, 8)}),  # a vocabulary
        ({"fc.weight": (10, 8), "aux_head.weight": (10, 8)}, {"head.weight": (5, 8)}),  # two could be
        ({"fc.weight": (10, 8), "fc.bias": (10,)}, {"head.weight": (5, 8)}),  # one has a bias
        ({"layers.0.fc.weight": (10, 8), "z.weight": (1, 1)}, {"layers.0.linear.weight": (5, 8), "z.weight": (1, 1)}),  # within a list
        ({"first.weight": (10, 8), "z.weight": (1, 1)}, {"other.weight": (5, 8), "z.weight": (1, 1)}),  # no head, nor the last
    ],
)
def test_what_is_not_said_to_be_a_head(told, source, target) -> None:
    assert told({**BODY, **source}, {**BODY, **target}).heads == ()
