"""Whose each position of an optimizer is, and how its moments follow: pure, by hand-made states, and hostile ones."""

from __future__ import annotations

from typing import Any

import planning_support as support
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.errors import CheckpointError, FormatError, ModelError, RootError
from ckptsurgeon.optimizer.assign import assign, held_by_key
from ckptsurgeon.optimizer.format import SLOTS, read_saved, wanted_slots
from ckptsurgeon.optimizer.order import live_order
from ckptsurgeon.optimizer.plan import Parameter, moment_ops, plan_states
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.planning.training_places import average_roots, choose_average_root, find
from ckptsurgeon.rules.rules import from_arguments
from ckptsurgeon.tensors import Checkpoint, Refused, TensorMeta, contiguous_stride

Shape = tuple[int, ...]


def meta(shape: Shape, dtype: str = "F32", name: str = "m") -> TensorMeta:
    return TensorMeta(name, dtype, shape, contiguous_stride(shape))


def adam(shape: Shape | None) -> dict[str, Any]:
    return {} if shape is None else {"step": meta(()), "exp_avg": meta(shape), "exp_avg_sq": meta(shape)}


def saved(*groups: list[Shape | None], names: list[list[str]] | None = None) -> dict[str, Any]:
    """An Adam's state_dict whose positions have moments of these shapes (None: no state yet)."""
    state, rows, position = {}, [], 0
    for number, shapes in enumerate(groups):
        positions = list(range(position, position + len(shapes)))
        position += len(shapes)
        state.update({place: adam(shape) for place, shape in zip(positions, shapes, strict=True) if shape is not None})
        row: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "params": positions}
        rows.append(row if names is None else row | {"param_names": names[number]})
    return {"state": state, "param_groups": rows}


NET = {
    "a.weight": (4, 3),
    "a.bias": (4,),
    "n.weight": (4,),
    "n.bias": (4,),
    "n.running_mean": (4,),
    "n.running_var": (4,),
    "b.weight": (4, 3),
}


def keys(value: Any, source: Checkpoint, names: list[str] | None = None) -> list[str | None]:
    looked = read_saved(value)
    found = assign(looked, source, names)
    return [found.keys.get(position) for position in looked.flat]


def test_one_group_is_taken_in_the_models_order_without_its_buffers():
    source = support.checkpoint(NET)
    order = ["a.weight", "a.bias", "n.weight", "n.bias", "b.weight"]
    assert keys(saved([NET[key] for key in order]), source) == order
    assert keys(saved([(4, 3), None, (4,), (4,), (4, 3)]), source) == order


def test_parameters_may_be_left_out_where_only_one_way_fits():
    source = support.checkpoint({"s": (2,), "r": (3,), "q": (2, 2), "d": (3,)})
    assert keys(saved([(3,), (2, 2)]), source) == ["r", "q"]
    assert keys(saved([(2, 2), (3,)]), source) == ["q", "d"]
    for shapes in ([(3,)], [(2,), (3,)]):
        with pytest.raises(ModelError, match="in no way, or in several") as error:
            keys(saved(shapes), source)
        assert "optimizer_names=" in str(error.value.hint)
    assert keys(saved([(3,)]), source, ["d"]) == ["d"]


@pytest.mark.parametrize("shapes", [[(4, 3)] * 2, [(4,), (4, 3), (4,), (4,), (4, 3)], [(4, 3), (4,), (4,), (4,), (4, 3), (4,)], [(9,)]])
def test_an_order_that_does_not_fit_is_refused(shapes: list[Shape]) -> None:
    source = support.checkpoint({**NET, "a.weight": (4, 5)} if shapes == [(4, 3)] * 2 else NET)
    with pytest.raises(ModelError):
        keys(saved(shapes), source)


def test_keys_that_were_sorted_tell_no_order():
    shapes = {"a": (2,), "b": (3,), "c": (2, 2), "d": (3,)}
    assert keys(saved([(2, 2), (2,)]), support.checkpoint(shapes)) == ["c", "a"]
    for row in ([(3,), (3,)], [(2,), (3,), (2, 2), (3,)], [(3,)]):
        with pytest.raises(ModelError, match="sorted"):
            keys(saved(row), support.checkpoint(shapes))
    registered = Checkpoint("a.pt", "torch-zip", "0", support.metas({"b.w": (2,), "a.w": (2,)}), module_metadata={"": {}, "b": {}, "a": {}})
    assert keys(saved([(2,), (2,)]), registered) == ["b.w", "a.w"]


def test_an_order_within_a_module_is_not_proven_by_the_modules():
    tensors = support.metas({"b.bias": (2,), "b.weight": (2,)})
    kept = Checkpoint("a.pt", "torch-zip", "0", tensors, module_metadata={"": {}, "b": {}})
    with pytest.raises(ModelError, match="sorted"):
        keys(saved([(2,), (2,)]), kept)


@settings(max_examples=examples(400), deadline=None)
@given(st.data())
def test_moments_are_given_to_their_own_parameters_or_to_none(data: st.DataObject) -> None:
    """The saving model, its file in any order, and a live model with more or fewer layers: the truth is known here, and never missed."""
    names = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6, unique=True))
    shape = {f"{name}.{leaf}": data.draw(st.sampled_from([(2,), (3,), (2, 2)])) for name in names for leaf in ("w", "b")}
    trained = data.draw(st.lists(st.sampled_from(list(shape)), unique=True, min_size=1) | st.just(list(shape)))
    trained.sort(key=list(shape).index)
    several = data.draw(st.booleans())
    groups = [[key for key in trained if key.endswith(leaf)] for leaf in ("w", "b")] if several else [trained]
    how = data.draw(st.sampled_from(["registered", "plain", "sorted"]))
    tensors = support.metas({key: shape[key] for key in (sorted(shape) if how == "sorted" else shape)})
    paths = {path: {} for path in ("", *names)} if how == "registered" else {}
    source = Checkpoint("a.pt", "torch-zip", "0", tensors, module_metadata=paths)
    gone = data.draw(st.sampled_from([None, *names]))
    # the live model: the same order of registration, a layer of its own, perhaps one layer less
    live = [key for key in shape if gone is None or not key.startswith(f"{gone}.")]
    live.insert(data.draw(st.integers(0, len(live))), "new.w")
    parts = [[key for key in groups[0] if key in live]] if not several else [[key for key in group if key in live] for group in groups]
    if data.draw(st.booleans()):
        parts = [live]
    target = support.model({key: shape.get(key, (2, 2)) for key in live})
    steps = {step.target: step for step in make_plan([source], target, ()).steps} if any(key in shape for key in live) else {}
    row = live_order({key: (key,) for key in live}, [(key,) for key in live], (), [[(key,) for key in part] for part in parts],
                     [{} for _ in parts], steps, source, True)  # fmt: skip
    looked = read_saved(saved(*[[shape[key] if data.draw(st.integers(0, 9)) else None for key in group] for group in groups]))
    truth = dict(zip(looked.flat, [key for group in groups for key in group], strict=True))
    try:
        found = assign(looked, source, None, row)
    except ModelError as error:
        assert "optimizer_names=" in str(error.hint)
        return
    for position, key in found.keys.items():
        if looked.shape_of(position) is not None:
            assert key == truth[position]


def test_several_groups_are_told_where_no_shape_is_in_two():
    source = support.checkpoint({"a.weight": (4, 3), "a.bias": (4,), "b.weight": (4, 3), "b.bias": (4,)})
    assert keys(saved([(4,), (4,)], [(4, 3), (4, 3)]), source) == ["a.bias", "b.bias", "a.weight", "b.weight"]
    assert keys(saved([], [(4, 3), (4,), (4, 3), (4,)]), source)[0] == "a.weight"
    for groups in ([[(4, 3), (4,)], [(4, 3), (4,)]], [[(4,)], [(4, 3), (4, 3)]]):
        with pytest.raises(ModelError):
            keys(saved(*groups), source)


def test_buffers_of_other_dtypes_and_tied_keys_are_no_parameters():
    tensors = support.metas({"a": (2,), "b": (2,)}) | support.metas({"mask": (2,)}, "BOOL")
    source = Checkpoint("a.pt", "torch-zip", "0", tensors, ties=(("a", "b"),))
    looked = read_saved(saved([(2,)]))
    found = assign(looked, source)
    assert found.keys == {0: "a"} and found.by == "order"
    assert set(held_by_key(looked, found, source)) == {"a", "b"}


def test_names_may_stand_below_a_prefix_or_in_a_wrapper():
    names = [["a.weight", "b.weight"]]
    value = saved([(4, 3), (4, 3)], names=names)
    for prefix in ("", "module.", "net.inner."):
        source = support.checkpoint({f"{prefix}{name}": (4, 3) for name in ("b.weight", "a.weight")})
        assert keys(value, source) == [f"{prefix}a.weight", f"{prefix}b.weight"]
    wrapped = saved([(4, 3)], names=[["module.a.weight"]])
    assert keys(wrapped, support.checkpoint({"a.weight": (4, 3)})) == ["a.weight"]
    assert keys(saved([(4, 3), (1,)], names=[["a.weight", "loss.scale"]]), support.checkpoint({"a.weight": (4, 3)})) == ["a.weight", None]
    two = support.checkpoint({"x.w": (2,), "y.w": (2,)})
    with pytest.raises(ModelError, match="several ways"):
        keys(saved([(2,), (2,)], names=[["w", "v"]]), two)
    with pytest.raises(ModelError, match="none of the optimizer's names"):
        keys(saved([(2,)], names=[["q"]]), two)
    with pytest.raises(ModelError, match="moments are not those"):
        keys(saved([(2, 2)], names=[["x.w"]]), two)
    for wrong in (["x.w"], ["x.w", "x.w"], [3, 4]):
        with pytest.raises(ModelError, match="names are no names"):
            keys(saved([(2,), (2,)]), two, wrong)  # type: ignore[arg-type]


def test_states_that_are_kept_by_name():
    value = {"state": {"b": adam((3,)), "a": adam((2,))}, "param_groups": [{"params": ["a", "b"], "betas": ()}]}
    assert keys(value, support.checkpoint({"a": (2,), "b": (3,)})) == ["a", "b"]


GOOD = saved([(4, 3), (4,)])
WRONG: list[Any] = [
    None, 3, [], {}, "x", {"state": {}}, {"param_groups": []}, {"state": [], "param_groups": []}, {"state": {}, "param_groups": {}},
    {"state": {}, "param_groups": [3]}, {"state": {}, "param_groups": [{}]}, {"state": {}, "param_groups": [{"params": 3}]},
    {"state": {}, "param_groups": [{"params": [None]}]}, {"state": {}, "param_groups": [{"params": [True]}]},
    {"state": {}, "param_groups": [{"params": [-1]}]}, {"state": {}, "param_groups": [{"params": [1 << 70_000]}]},
    {"state": {}, "param_groups": [{"params": [[]]}]}, {"state": {}, "param_groups": [{"params": [0, 0]}]},
    {"state": {}, "param_groups": [{"params": [0]}, {"params": [0]}]}, {"state": {7: {}}, "param_groups": [{"params": [0]}]},
    {"state": {1 << 70_000: {}}, "param_groups": [{"params": [0]}]}, {"state": {0: 3}, "param_groups": [{"params": [0]}]},
    {"state": {0: {3: 4}}, "param_groups": [{"params": [0]}]}, {"state": {None: {}}, "param_groups": [{"params": [0]}]},
    {"state": {}, "param_groups": [{"params": [0], "param_names": []}]},
    {"state": {}, "param_groups": [{"params": [0], "param_names": [3]}]},
    {"state": {}, "param_groups": [{"params": [0, 1], "param_names": ["a", "a"]}]}, Refused("an object of x.Adam"),
    {"state": Refused("x"), "param_groups": []},
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_a_malformed_state_is_refused(value: Any) -> None:
    with pytest.raises(FormatError) as error:
        read_saved(value)
    assert len(str(error.value)) < 400


def test_moments_of_unlike_shapes_are_refused():
    value = saved([(4, 3)])
    value["state"][0]["exp_avg_sq"] = meta((3, 4))
    with pytest.raises(FormatError, match="moments of different shapes"):
        keys(value, support.checkpoint({"w": (4, 3)}))


_leaves = st.one_of(
    st.none(), st.integers(), st.floats(), st.text(max_size=3), st.booleans(), st.just(1 << 500), st.just(Refused("x")),
    st.sampled_from([meta(()), meta((4, 3)), meta((4,)), meta((4, 3), "I64"), meta((4, 3), "BF16"), meta((0,))]),
    st.lists(st.integers(0, 3), max_size=3),
)  # fmt: skip
_slots = st.sampled_from(["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "x"])
_positions = st.one_of(st.integers(0, 2), st.sampled_from(["w", "b"]), _leaves.filter(lambda leaf: type(leaf) is not list))
_groups = st.one_of(
    _leaves, st.fixed_dictionaries({"params": st.one_of(st.lists(_positions, max_size=3), _leaves)}, optional={"param_names": _leaves})
)
_states = st.dictionaries(_positions, st.one_of(st.dictionaries(_slots, _leaves, max_size=4), _leaves), max_size=3)

_dicts = st.fixed_dictionaries({"state": st.one_of(_states, _leaves), "param_groups": st.one_of(st.lists(_groups, max_size=2), _leaves)})
_values = st.one_of(_dicts, _leaves)


@settings(max_examples=examples(400), deadline=None)
@given(_values, st.one_of(st.none(), st.lists(st.sampled_from(["w", "b", "c"]), max_size=3)))
def test_any_state_is_planned_or_refused(value: Any, names: list[str] | None) -> None:
    source = support.checkpoint({"w": (4, 3), "b": (4,)})
    plan = make_plan([source], support.model({"w": (4, 3), "b": (4,)}), ())
    parameters = [Parameter(name, (name,), "F32", shape, SLOTS["Adam"]) for name, shape in (("w", (4, 3)), ("b", (4,)))]
    try:
        looked = read_saved(value)
        held = held_by_key(looked, assign(looked, source, names), source)
    except CheckpointError:
        return
    for found in plan_states(parameters, {step.target: step for step in plan.steps}, {(0, key): state for key, state in held.items()}):
        assert (found.reason is None) == bool(found.slots)
        for slot in found.slots:
            if slot.slot.kind == "moment" and slot.leaves:
                assert [leaf.shape for leaf in slot.leaves] == [found.parameter.shape]


def planned(source_shapes: Any, target_shapes: Any, **rules: Any) -> dict[str, Any]:
    source, target = support.checkpoint(source_shapes), support.model(target_shapes)
    plan = make_plan([source], target, from_arguments(**rules))
    held = {(0, key): adam(tensor.shape) for key, tensor in source.items()}
    parameters = [Parameter(key, (key,), "F32", tensor.shape, wanted_slots("Adam", {})) for key, tensor in target.items()]
    return {one.parameter.name: one for one in plan_states(parameters, {step.target: step for step in plan.steps}, held)}


@pytest.mark.parametrize(
    ("source", "target", "rule", "op"),
    [
        ({"w": (4, 6)}, {"w": (6, 4)}, {"w": "transpose"}, "transpose"),
        ({"w": (6, 4)}, {"a": (3, 4), "b": (3, 4)}, {"w -> a + b": "chunk"}, "chunk"),
        ({"a": (3, 4), "b": (3, 4)}, {"w": (6, 4)}, {"a + b -> w": "concat"}, "concat"),
        ({"w": (6, 4)}, {"w": (2, 4)}, {"w": "slice"}, "slice"),
        ({"w": (6, 4)}, {"w": (9, 4)}, {"w": "pad(fill='mean')"}, "pad"),
        ({"w": (2, 3, 4)}, {"w": (6, 4)}, {"w": "reshape"}, "reshape"),
        ({"w": (8, 4)}, {"w": (8, 4)}, {"w": "permute_rope(heads=2, to='halves')"}, "permute_rope"),
        ({"w": (8, 4)}, {"w": (8, 4)}, {"w": "interleave(parts=2)"}, "interleave"),
    ],
)  # fmt: skip
def test_moments_follow_their_weight(source: Any, target: Any, rule: Any, op: str) -> None:
    for found in planned(source, target, adapt=rule).values():
        assert found.reason is None and found.adapted
        moments = [slot for slot in found.slots if slot.slot.kind == "moment"]
        assert [slot.ops[0]["op"] for slot in moments] == [op, op]
        assert all(slot.ops == () for slot in found.slots if slot.slot.kind == "step")
        assert all("mean" not in repr(slot.ops) for slot in moments)


def test_what_computes_values_is_not_followed():
    found = planned({"w": (8, 3, 2, 2)}, {"w": (8, 1, 2, 2)}, adapt={"w": "in_channels"})["w"]
    assert found.reason == "its weights are computed by in_channels, which moments can't follow" and found.slots == ()
    assert moment_ops([{"op": "mylib:flip", "shape": [1], "arguments": {}}]) is None
    rows = {"op": "rows", "dim": 0, "rows": 2, "runs": [[0, 0, 1]], "fill": "init", "scheme": "model"}
    assert moment_ops([rows]) == ({"op": "rows", "dim": 0, "rows": 2, "runs": [[0, 0, 1]], "fill": "zeros"},)


def test_slots_by_the_groups_hyper_parameters():
    names = {kind: [slot.name for slot in wanted_slots(kind, {"amsgrad": True, "momentum": 0.9, "centered": True})] for kind in SLOTS}
    assert names["Adam"] == names["AdamW"] == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert names["RMSprop"] == ["step", "square_avg", "momentum_buffer", "grad_avg"]
    assert [slot.name for slot in wanted_slots("RMSprop", {"momentum": 0, "centered": False})] == ["step", "square_avg"]


def test_places_beside_the_models_root():
    state = {"state": {}, "param_groups": []}
    assert find("optimizer", {"net": {"weights": {}, "optimizer": state}}, "net.weights", None, "a.pt") == ("net.optimizer", state)
    with pytest.raises(RootError, match="2 optimizer states"):
        find("optimizer", {"optim": state, "optimizer": state}, "model", None, "a.pt")
    with pytest.raises(RootError, match="no optimizer state"):
        find("optimizer", {"optimizer": 3, "optimizer_states": []}, "", None, "a.pt")
    with pytest.raises(RootError, match="no optimizer state"):
        find("optimizer", [1], "", None, "a.pt")
    assert average_roots(["model", "ema.params", "model_ema"]) == ("ema.params", "model_ema")
    with pytest.raises(RootError, match="2 averaged copies"):
        choose_average_root(["ema.params", "model_ema"], None, "a.pt")
