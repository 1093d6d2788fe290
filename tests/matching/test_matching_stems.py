"""Names that begin alike, where underscores stand between modules: a norm stays with its convolution, and a branch is found as a whole."""

from __future__ import annotations

import pytest
from pairs_support import meta

from ckptsurgeon.matching.matcher import match
from ckptsurgeon.matching.spelling import spelled
from ckptsurgeon.matching.stems import parted
from ckptsurgeon.tensors import TensorMeta

Shapes = dict[str, tuple[int, ...]]


def side(shapes: Shapes, in_order: bool = True) -> dict[str, TensorMeta]:
    return {key: meta(key, shape) for key, shape in (shapes.items() if in_order else sorted(shapes.items()))}


def convolution(name: str, norm: str, out: int, width: int, kernel: int) -> Shapes:
    rows: Shapes = {f"{name}.weight": (out, width, kernel, kernel), f"{name}.bias": (out,)}
    return rows | {f"{norm}.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")}


# Of a block of branches: each convolution's name where all stand in one row, where branches are modules, and its channels and kernel.
BRANCHES = (
    ("1x1", "branch1", 16, 24, 1),
    ("3x3_reduce", "branch2.conv1", 16, 24, 1),
    ("3x3", "branch2.conv2", 16, 16, 3),
    ("double_3x3_reduce", "branch3.conv1", 16, 24, 1),
    ("double_3x3_1", "branch3.conv2", 24, 16, 3),
    ("double_3x3_2", "branch3.conv3", 24, 24, 3),
    ("pool_proj", "branch4.conv", 8, 24, 1),
)


def flat(end: str) -> Shapes:
    rows = convolution("conv1_7x7_s2", f"conv1_7x7_s2_{end}", 24, 3, 7)
    for block in ("3a", "3b", "4a"):
        for name, _, *shape in BRANCHES:
            rows |= convolution(f"inception_{block}_{name}", f"inception_{block}_{name}_{end}", *shape)
    return rows | {"last_linear.weight": (10, 64), "last_linear.bias": (10,)}


def nested() -> Shapes:
    rows = convolution("features.init.conv.conv", "features.init.conv.bn", 24, 3, 7)
    for block in ("stage1.unit1", "stage1.unit2", "stage2.unit1"):
        for _, name, *shape in BRANCHES:
            head = f"features.{block}.branches.{name}"
            rows |= convolution(f"{head}.conv", f"{head}.bn", *shape)
    return rows | {"output.weight": (10, 64), "output.bias": (10,)}


@pytest.mark.parametrize("in_order", [True, False], ids=["library", "sorted"])
@pytest.mark.parametrize("end", ["bn", "batch_norm"])
def test_a_norm_whose_name_begins_with_a_convolutions_goes_where_that_goes(end: str, in_order: bool) -> None:
    truth = dict(zip(nested(), flat(end), strict=True))
    found = match(side(flat(end), in_order), side(nested(), in_order))
    assert {link.targets[0]: link.sources[0] for link in found.certain} == truth


def test_parts_of_a_branch_that_one_side_names_alike_are_found_together() -> None:
    """Two branches end in convolutions of the same shapes, and only what stands before them tells them apart."""
    kinds = (("2a", "conv1x3", (1, 3)), ("2b", "conv3x1", (3, 1)))
    source: Shapes = {}
    target: Shapes = {}
    for block, unit in (("7b", "unit1"), ("7c", "unit2")):
        here, there = f"Mixed_{block}.branch3x3", f"features.{unit}.branches.branch"
        firsts = (("_1", "2.conv", (12, 16, 1, 1)), ("dbl_1", "3.conv1", (14, 16, 1, 1)), ("dbl_2", "3.conv2", (12, 14, 3, 3)))
        ends = [(f"{dbl}_{two}", f"{at}.{name}", (12, 12, *kernel)) for dbl, at in (("", 2), ("dbl", 3)) for two, name, kernel in kinds]
        for old, new, shape in (*firsts, *ends):
            source |= {f"{here}{old}.conv.weight": shape, f"{here}{old}.bn.weight": shape[:1]}
            target |= {f"{there}{new}.conv.weight": shape, f"{there}{new}.bn.weight": shape[:1]}
    found = match(side(target, False), side(source, False))
    assert {link.targets[0]: link.sources[0] for link in found.certain} == dict(zip(source, target, strict=True))


def names(*keys: str) -> list[str]:
    shapes = {key: (8,) if "norm" in key else (8, 8) for key in keys}
    return list(parted(side(shapes), {})[0].values())


def test_only_what_holds_several_layers_is_a_module() -> None:
    assert names("0.q_proj.weight", "0.q_norm.weight") == ["0.q_proj.weight", "0.q_norm.weight"]
    assert names("proj_in.weight", "proj_out.weight") == ["proj_in.weight", "proj_out.weight"]
    assert names(*(f"a_{way}.{end}.weight" for way in ("ab", "cd") for end in "fg"))[:2] == ["a.ab.f.weight", "a.ab.g.weight"]
    assert names("encoder_q.f.weight", "encoder_q.g.weight", "encoder_k.f.weight", "encoder_k.g.weight")[0] == "encoder_q.f.weight"


def test_a_module_and_one_whose_name_begins_with_its_stay_two() -> None:
    keys = [f"critic{end}.qf{at}.{name}.weight" for end in ("", "_target") for at in (0, 1) for name in ("fc1", "fc2")]
    assert names(*keys) == keys
    assert names("a_3x3.0.weight", "a_3x3.1.weight", "a_3x3_reduce.f.weight", "a_3x3_reduce.g.weight")[2] == "a_3x3_reduce.f.weight"
    assert names("a_3x3.0.f.weight", "a_3x3.1.g.weight", "a_3x3_reduce.f.weight", "a_3x3_reduce.g.weight")[2] == "a_3x3.reduce.f.weight"


def test_where_dots_are_numbers_within_words_are_not_cut_out() -> None:
    assert list(spelled(side({"a_3b_1x1.weight": (4, 4), "a_3b_pool.weight": (4, 4)})).values()) == ["a_3b_1x1.weight", "a_3b_pool.weight"]


def test_no_cut_changes_what_a_name_says() -> None:
    keys = [f"layer_{kind}{at}.{end}.weight" for kind in ("norm", "scale") for at in (1, 2) for end in ("a", "b")]
    assert names(*keys) == keys


def test_what_both_sides_call_the_same_stays_the_same() -> None:
    """One side has a branch more, from which alone a cut would come."""
    here = side({f"branch_{name}.{part}.weight": (4, 4) for name in ("ab", "cd") for part in ("f", "g")})
    there = {key: tensor for key, tensor in here.items() if "ab" in key}
    found = match(here, there)
    assert {link.targets[0]: link.evidence for link in found.links} == dict.fromkeys(there, ("same name and shape",))


def test_rivals_are_shown_as_the_file_spells_them() -> None:
    rows: Shapes = {}
    for name in ("one", "two"):
        rows |= convolution(f"part_{name}_x", f"part_{name}_x_bn", 8, 8, 1) | convolution(f"part_{name}_y", f"part_{name}_y_bn", 8, 8, 3)
    other: Shapes = {}
    for name in ("alpha", "beta"):
        other |= convolution(f"{name}.u.conv", f"{name}.u.bn", 8, 8, 1) | convolution(f"{name}.v.conv", f"{name}.v.bn", 8, 8, 3)
    found = match(side(rows, False), side(other, False))
    rivals = [link.runner_up.partition(" -> ")[0] for link in found.uncertain if link.runner_up]
    assert rivals and all(any(key.startswith(rival) for key in rows) for rival in rivals)


@pytest.mark.parametrize("turn", [1, -1], ids=["in the source", "in the target"])
def test_words_that_run_together_are_the_two_that_the_other_side_has(turn: int) -> None:
    run, apart = (side({f"layers.0.{name}.weight": (4, 4)}) for name in ("qtext_proj", "attn.q_text_proj"))
    assert [[*named.values()] for named in parted(*(run, apart)[::turn])][::turn] == [["layers.0.q_text_proj.weight"], [*apart]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("qpos", "q.pos"),  # two modules
        ("layernorm", "layer_norm"),  # says enough by itself
        ("a.qpos", "a.q_pos.qpos"),  # both sides have the word
        ("ab1", "a_b1"),
    ],
)
def test_other_words_stay_as_they_are(one: str, other: str) -> None:
    here, there = (side({f"layers.0.{name}.weight": (4, 4)}) for name in (one, other))
    assert [[*named.values()] for named in parted(here, there)] == [[*here], [*there]]
