"""A file of thousands of state_dicts: the one that fits is found where little is to be looked at, else it is asked for by name."""

from __future__ import annotations

import pytest

from ckptsurgeon.errors import RootError
from ckptsurgeon.planning import roots
from ckptsurgeon.tensors import Archive, Checkpoint, StateDict, TensorMeta

SHAPE = (2, 3)


def meta(name: str, shape: tuple[int, ...] = SHAPE) -> TensorMeta:
    return TensorMeta(name, "F32", shape, (1,) * len(shape))


def archive(*found: StateDict) -> Archive:
    return Archive("it.pt", "torch-zip", "", (), found)


def checkpoint(*names: str) -> Checkpoint:
    return Checkpoint("target.pt", "torch-zip", "", {name: meta(name) for name in names})


def test_moments_by_parameter_are_no_rivals_of_the_weights() -> None:
    """As a training loop of one's own saves them: a dict for each parameter, thousands of them."""
    names = [f"layers.{index}.weight" for index in range(3000)]
    moments = [StateDict(f"moments.{index}", {"exp_avg": meta("exp_avg")}) for index in range(3000)]
    weights = StateDict("model", {f"module.{name}": meta(f"module.{name}") for name in names})
    assert roots.choose(archive(*moments, weights), target=checkpoint(*names)).root == "model"


@pytest.mark.slow
def test_too_many_that_could_fit_have_to_be_named() -> None:
    names = [f"layers.{index}.k" for index in range(3000)]
    many = archive(*(StateDict(str(index), {"k": meta("k")}) for index in range(3000)))
    with pytest.raises(RootError, match="3000 state_dicts, too many") as caught:
        roots.choose(many, target=checkpoint(*names))
    assert "root='0'" in (caught.value.hint or "")
    assert roots.choose(many, root="7", target=checkpoint(*names)).root == "7"


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod"])
def test_a_wrapper_anywhere_does_not_hide_what_fits(wrapper: str) -> None:
    wrapped = StateDict("model", {f"a.{wrapper}.w": meta("x"), f"b.w.{wrapper}": meta("y")})
    assert roots.choose(archive(wrapped, StateDict("other", {"c.v": meta("c.v")})), target=checkpoint("a.w", "b.w")).root == "model"


def test_what_stands_alone_tells_nothing_of_the_rest() -> None:
    one, other = StateDict("a", {"w": meta("w")}), StateDict("b", {"w": meta("w")})
    assert roots.checkpoint(archive(one, other), one).left_behind == ("b (1 tensor)",)
    assert roots.checkpoint(archive(one, other), one, alone=True).left_behind == ()
