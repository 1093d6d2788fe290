"""plan.json: what other programs read, and what is followed only when it adds up with the files it names."""

import copy
import json
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planning_support import any_rules, checkpoint, metas, model, rule, shapes, targets
from profiles import examples

from ckptsurgeon.adapters.table import ADAPTERS
from ckptsurgeon.errors import PlanError, RuleError, StaleError
from ckptsurgeon.planning.plan import digest, make_plan
from ckptsurgeon.planning.planfile import check_followable, from_json, to_json
from ckptsurgeon.rules.rules import Outside
from ckptsurgeon.tensors import Checkpoint, Refused


def text(value) -> bytes:
    return json.dumps(value).encode()


def again(plan):
    return from_json(text(to_json(plan)), "plan.json")


SOURCE = Checkpoint(
    "a.pt", "torch-zip", "0" * 64, metas({"module.fc1.w": (4, 3), "module.old.w": (9,), "module.fc2.w": (4, 4)}, file="a.pt"),
    entries={"module.s": 1, "module.t": 2}, module_metadata={"module.fc1": {"version": 2}}, left_behind=("epoch",), notes=("a note",),
)  # fmt: skip
TARGET = model(
    {"fc1.w": (4, 3), "fc2.w": (2, 4), "tied.w": (4, 3)}, entries={"s": None, "own": None}, ties=(("fc1.w", "tied.w"),), dtype="F16"
)
PLAN = make_plan([SOURCE], TARGET, [rule("drop", "old.*"), rule("init", "fc2.*", "zeros")], allow_cast=["fc1.*"], seed=7)


def test_the_design_page_shows_what_stands_there():
    source = checkpoint({"fc1.weight": (120, 400), "fc3.weight": (10, 84)}, fingerprint="0" * 64)
    target = model({"fc1.weight": (120, 400), "fc3.weight": (2, 84)}, fingerprint="f" * 64)
    value = to_json(make_plan([source], target))
    assert value["version"] == 1 and value["seed"] == 0
    assert value["sources"][0]["path"] == "a.pt" and value["sources"][0]["fingerprint"] == "0" * 64
    assert value["target"]["spec"] == "model:Net" and value["target"]["fingerprint"] == "f" * 64
    assert value["steps"] == [
        {
            "target": "fc1.weight",
            "dtype": "F32",
            "shape": [120, 400],
            "action": "copy",
            "sources": [{"file": 0, "key": "fc1.weight"}],
            "ops": [],
            "fresh": False,
            "reason": "same name, same shape",
        },
        {
            "target": "fc3.weight",
            "dtype": "F32",
            "shape": [2, 84],
            "action": "init",
            "sources": [],
            "ops": [{"op": "init", "scheme": "model"}],
            "fresh": True,
            "reason": "the source has another shape; the model's own value",
        },
    ]
    (dropped,) = value["dropped"]
    assert dropped == {"source": "fc3.weight", "reason": "shape (10, 84) does not fit (2, 84)", "file": 0}
    value = to_json(make_plan([source], target, dtype="F16"))
    assert value["steps"][0]["ops"] == [{"op": "cast", "dtype": "F16"}]
    assert value["steps"][1]["ops"] == [{"op": "init", "scheme": "model"}, {"op": "cast", "dtype": "F16"}]
    assert to_json(make_plan([source], None))["target"] is None


def test_a_plan_with_all_there_is_comes_back():
    plan = make_plan([replace(SOURCE, ties=())], TARGET, seed=3)
    assert plan.findings and plan.loose and plan.entries and plan.left_behind and plan.dropped
    for one in (PLAN, plan, make_plan([SOURCE], None), make_plan([SOURCE], replace(TARGET, format="torch-zip", kind="file"))):
        assert again(one) == one and digest(again(one)) == digest(one)
    assert json.loads(text(to_json(PLAN))) == to_json(PLAN)


@settings(max_examples=examples(200))
@given(shapes, st.one_of(targets(), st.none()), any_rules, st.sampled_from([None, "source", "BF16"]), st.integers(0, (1 << 63) - 1))
def test_any_plan_comes_back_and_can_be_followed(drawn, target, rules, dtype, seed):
    source = checkpoint(drawn)
    try:
        plan = make_plan([source], target, [one for one in rules if target is not None or one.kind != "init"], dtype=dtype, seed=seed)
    except RuleError:
        assume(False)
    except PlanError as error:
        assert "prefix" in str(error)  # nothing decides between two, and there is no plan
        return
    assert again(plan) == plan
    check_followable(again(plan), [source], target)


# ---- what is no plan


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"3", b"null", b'"steps"', b"{}", b'{"version": 1}', b'{"version": 1, "steps": []}', b'{"version": 2, "steps": []}',
     b'{"version": true, "steps": []}', b'{"version": 1.0, "steps": []}', b'{"version": "1", "steps": []}', b'{"steps": []}',
     b'{"version": 1, "version": 1, "steps": []}', b'{"version": NaN, "steps": []}', b"\xff\xfe", b"[" * 100000,
     b'{"version": ' + b"9" * 5000 + b', "steps": []}', b"PK\x03\x04"],
)  # fmt: skip
def test_what_is_no_plan_is_refused(raw):
    with pytest.raises(PlanError) as caught:
        from_json(raw, "plan.json")
    assert caught.value.path == "plan.json" and len(str(caught.value)) < 500


def test_a_plan_of_another_version_says_which():
    with pytest.raises(PlanError, match=r"version 2; this ckptsurgeon follows version 1"):
        from_json(text(to_json(PLAN) | {"version": 2}), "plan.json")
    for version in (True, 1.0, "1", None, [1]):
        with pytest.raises(PlanError, match="follows version 1"):
            from_json(text(to_json(PLAN) | {"version": version}), "plan.json")


def paths(value, at=()):
    yield at
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(child, (*at, key))


JUNK = [None, True, False, 0, 1, -1, 2, 1 << 63, 1.5, "", "x", "F32", "copy", "init", [], {}, [[]], [1], {"op": "cast"}, ["a", "b"]]
PATHS = [path for path in paths(to_json(PLAN)) if path]


def follow(raw: bytes):
    """What apply does with a plan.json before it does anything; None, or the refusal."""
    try:
        plan = from_json(raw, "plan.json")
        check_followable(plan, [SOURCE] * len(plan.sources), TARGET if plan.target else None)
    except (PlanError, StaleError) as error:
        return error
    return None


def without(value, path, put=()):
    made = copy.deepcopy(value)
    place = made
    for key in path[:-1]:
        place = place[key]
    if put:
        place[path[-1]] = put[0]
    else:
        del place[path[-1]]
    return made


@settings(max_examples=examples(1500), deadline=None)
@given(
    st.sampled_from(PATHS),
    st.one_of(st.sampled_from(JUNK), st.text(max_size=5), st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
)
def test_a_changed_plan_is_a_plan_or_a_plan_error(path, junk):
    follow(text(without(to_json(PLAN), path, (junk,))))


def test_a_plan_with_anything_missing_is_refused():
    optional = {("sources", 0, "prefix", name) for name in ("stripped", "added", "unwrapped")}
    free = ("allow_cast", "left_behind", "loose", "findings")  # lists that may be shorter
    for path in PATHS:
        named = path[0] in free and len(path) == 2
        if named or path in optional or (path[0] in ("module_metadata", "coverage") and len(path) > 1) or path == ("coverage",):
            continue
        if len(path) == 5 and path[-2] == "unwrapped":
            continue
        assert follow(text(without(to_json(PLAN), path))) is not None, path


@given(st.binary(max_size=60), st.data())
def test_a_damaged_plan_is_a_plan_or_a_plan_error(junk, data):
    raw = text(to_json(PLAN))
    start = data.draw(st.integers(0, len(raw)))
    follow(raw[:start] + junk + raw[start + data.draw(st.integers(0, 60)) :])
    if start < len(raw):
        assert isinstance(follow(raw[:start]), PlanError)


def edited(**changes):
    value = to_json(PLAN)
    value["steps"][0] |= changes
    return value


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "F99"},
        {"dtype": "F32"},
        {"dtype": "BF16"},
        {"action": "adapt"},
        {"action": "keep"},
        {"action": "init"},
        {"action": "steal"},
        {"fresh": 0},
        {"sources": []},
        {"sources": [{"file": 1, "key": "module.fc1.w"}]},
        {"sources": [{"file": 0, "key": "fc1.w"}]},
        {"sources": [{"file": 0, "key": "module.s"}]},
        {"sources": [{"file": 0, "key": "module.fc1.w"}] * 2},
        {"sources": [{"file": 0, "key": "module.fc2.w"}]},
        {"sources": [{"file": True, "key": "module.fc1.w"}]},
        {"sources": [["file", 0]]},
        {"shape": [3, 4]},
        {"shape": [12]},
        {"shape": []},
        {"shape": [-4, -3]},
        {"shape": "43"},
        {"ops": []},
        {"ops": [{"op": "cast"}]},
        {"ops": [{"op": "cast", "dtype": "F32"}]},
        {"ops": [{"op": "cast", "dtype": "F16"}] * 2},
        {"ops": [{"op": "transpose", "dims": [0, 1]}]},
        {"ops": [{"op": "init", "scheme": "zeros"}]},
        {"ops": [{"op": "cast", "dtype": ["F16"]}]},
        {"ops": [{"op": ["cast"], "dtype": "F16"}]},
        {"ops": [[["op", "cast"], ["dtype", "F16"]]]},
        {"target": "fc9.w"},
        {"target": "fc2.w"},
        {"target": 3},
    ],
)
def test_a_step_that_does_not_add_up_is_refused(changes):
    assert isinstance(follow(text(edited(**changes))), PlanError)


def test_the_plan_that_these_tests_edit_is_followed():
    assert follow(text(to_json(PLAN))) is None
    assert PLAN.steps[0].cast == "F16" and PLAN.steps[0].sources == ((0, "module.fc1.w"),)


def change(field, put):
    value = to_json(PLAN)
    value[field] = put(value[field])
    return value


@pytest.mark.parametrize(
    ("field", "put"),
    [
        ("steps", lambda rows: rows[1:]),
        ("steps", lambda rows: [*rows, rows[0]]),
        ("steps", lambda rows: [*rows, rows[0] | {"target": "more.w"}]),
        ("steps", lambda rows: [rows[0], rows[1] | {"ops": [{"op": "init", "scheme": ""}]}, rows[2]]),
        ("dropped", lambda rows: rows[1:]),
        ("dropped", lambda rows: [*rows, rows[0]]),
        ("dropped", lambda rows: [*rows, rows[0] | {"source": "nowhere"}]),
        ("dropped", lambda rows: [*rows, rows[0] | {"source": "module.fc1.w"}]),
        ("dropped", lambda rows: [rows[0] | {"file": 1}, *rows[1:]]),
        ("entries", lambda rows: rows[1:]),
        ("entries", lambda rows: [*rows, rows[0]]),
        ("entries", lambda rows: [*rows, {"target": "fc1.w", "source": None}]),
        ("entries", lambda rows: [*rows, {"target": "more", "source": None}]),
        ("entries", lambda rows: [rows[0] | {"source": {"file": 0, "key": "nowhere"}}, *rows[1:]]),
        ("entries", lambda rows: [rows[0] | {"source": {"file": 0, "key": "module.fc1.w"}}, *rows[1:]]),
        ("ties", lambda rows: []),
        ("ties", lambda rows: [["fc1.w", "fc2.w"]]),
        ("ties", lambda rows: [["fc1.w", "nowhere"]]),
        ("target", lambda row: None),
        ("target", lambda row: row | {"kind": "torch-zip"}),
        ("target", lambda row: row | {"kind": "skeleton"}),
        ("sources", lambda rows: []),
        ("sources", lambda rows: rows * 2),
        ("seed", lambda seed: -1),
        ("allow_cast", lambda rows: ["{"]),
        ("module_metadata", lambda rows: {"": {"version": []}}),
        ("module_metadata", lambda rows: {"": 3}),
        ("findings", lambda rows: [rows[0] | {"level": "fatal"}]),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_add_up_is_refused(field, put):
    error = follow(text(change(field, put)))
    assert isinstance(error, PlanError) and error.exit_code == 2


def test_what_does_not_add_up_is_told_all_at_once():
    value = to_json(PLAN)
    value["steps"][0]["shape"] = [9, 9]
    value["dropped"] = []
    error = follow(text(value))
    assert {problem.partition(":")[0] for problem in error.problems} >= {"fc1.w", "module.old.w", "module.t"}
    many = make_plan([checkpoint([])], model([f"w{i}" for i in range(50)]))
    with pytest.raises(PlanError) as caught:
        check_followable(many, [replace(checkpoint([]))], model([f"v{i}" for i in range(50)]))
    assert len(caught.value.problems) == 21


def test_a_plan_without_a_target_makes_nothing_up():
    plan = make_plan([SOURCE], None)
    value = to_json(plan)
    check_followable(again(plan), [SOURCE], None)
    value["steps"][0] |= {"action": "init", "sources": [], "ops": [{"op": "init", "scheme": "zeros"}], "fresh": True}
    with pytest.raises(PlanError):
        from_json(text(value), "plan.json")
    value = to_json(plan)
    value["entries"][0]["source"] = None
    with pytest.raises(PlanError):
        from_json(text(value), "plan.json")


def test_only_a_model_has_values_of_its_own_and_only_a_file_keeps_them():
    kept = make_plan([SOURCE], replace(TARGET, format="torch-zip", kind="file", entries={}))
    value = to_json(kept)
    value["target"]["kind"] = "model"
    with pytest.raises(PlanError, match="does not go with the target"):
        from_json(text(value), "plan.json")
    value = to_json(make_plan([SOURCE], TARGET))
    value["target"]["kind"] = "skeleton"
    with pytest.raises(PlanError, match="needs a model"):
        from_json(text(value), "plan.json")


def test_a_stale_plan_says_which_file_has_changed():
    for sources, target, path in (
        ([replace(SOURCE, fingerprint="other")], TARGET, "a.pt"),
        ([SOURCE], replace(TARGET, fingerprint="other"), "model:Net"),
    ):
        with pytest.raises(StaleError) as caught:
            check_followable(PLAN, sources, target)
        assert caught.value.path == path and caught.value.exit_code == 2
    check_followable(PLAN, [replace(SOURCE, path="moved.pt")], replace(TARGET, path="other:Net"))
    for sources, target in (([], TARGET), ([SOURCE, SOURCE], TARGET), ([SOURCE], None)):
        with pytest.raises(PlanError):
            check_followable(PLAN, sources, target)


def test_a_value_that_can_not_be_carried_any_more():
    entries = {"module.s": Refused("an object of a.B"), "module.t": 2}
    with pytest.raises(PlanError, match=r"module\.s is not there, or can't be carried"):
        check_followable(PLAN, [replace(SOURCE, entries=entries)], TARGET)


def test_a_source_of_another_shape_is_refused_though_all_fates_add_up():
    value = edited(sources=[{"file": 0, "key": "module.fc2.w"}])
    value["dropped"] = [row for row in value["dropped"] if row["source"] != "module.fc2.w"]
    error = follow(text(value))
    assert isinstance(error, PlanError) and error.problems == ("fc1.w: its source module.fc2.w has shape (4, 4), not (4, 3)",)


# ---- steps that adapt

ADAPT_SOURCES = [
    checkpoint(
        {"qkv": (12, 4), "q": (4, 4), "k": (4, 4), "e.0": (2, 3), "e.1": (2, 3), "w": (3, 2), "pos": (1, 4, 3), "rows": (5, 2),
         "own": (2, 3), "conv": (4, 3, 3, 3), "pad": (3, 2), "mid": (6, 2), "rope": (8, 2)},
        "a.pt",
    ),
    checkpoint({"mean": (2,)}, "b.pt"),
    checkpoint({"mean": (2,)}, "c.pt"),
]  # fmt: skip
ADAPT_TARGET = model(
    {"one": (4, 4), "two": (8, 4), "qk": (8, 4), "all": (2, 2, 3), "w": (2, 3), "pos": (1, 9, 3), "rows": (4, 2), "own": (3, 2),
     "mean": (2,), "conv": (4, 1, 3, 3), "pad": (5, 2), "mid": (12,), "rope": (8, 2), "copied": (5, 2)},
    dtype="F16",
)  # fmt: skip
ADAPT_PLAN = make_plan(
    ADAPT_SOURCES,
    ADAPT_TARGET,
    [
        rule("adapt", "qkv -> one + two", "chunk(sizes=[4, 8])"),
        rule("adapt", "q + k -> qk", "concat"),
        rule("adapt", "e.{e} -> all", "stack(dim=1)"),
        rule("adapt", "w", "transpose"),
        rule("adapt", "pos", "pad(dim=1, fill='mean')"),
        rule("adapt", "rows", "rows(index=[3, 0, -1, 1], fill='init')"),
        rule("adapt", "own", "my:flip(times=1, names=['a', {'b': 2.5}])"),
        rule("adapt", "1:mean + 2:mean -> mean", "average(weights=[1, 3])"),
        rule("adapt", "conv", "in_channels"),
        rule("adapt", "pad", "pad(fill='init')"),
        rule("adapt", "mid", "deinterleave(parts=2) | reshape"),
        rule("adapt", "rope", "permute_rope(heads=2, to='halves')"),
        rule("init", "pad", "normal(std=0.02)"),
        rule("init", "copied", "from(pad)"),
    ],
    outside=Outside(shapes={"my:flip": lambda shapes, **_: shapes[0][::-1]}),
)
ADAPT_PATHS = [path for path in paths(to_json(ADAPT_PLAN)) if path and path[0] == "steps"]


def follow_adapted(value):
    try:
        check_followable(from_json(text(value), "plan.json"), ADAPT_SOURCES, ADAPT_TARGET)
    except (PlanError, StaleError) as error:
        return error
    return None


def test_a_plan_that_adapts_comes_back_and_can_be_followed():
    assert ADAPT_PLAN.coverage.counts == (13, 14)
    assert again(ADAPT_PLAN) == ADAPT_PLAN and digest(again(ADAPT_PLAN)) == digest(ADAPT_PLAN)
    assert follow_adapted(to_json(ADAPT_PLAN)) is None
    assert json.loads(text(to_json(ADAPT_PLAN))) == to_json(ADAPT_PLAN)  # tuples would be lists when read


_junk = st.one_of(
    st.sampled_from(JUNK),
    st.sampled_from([[0, 1], [1, 0], [-1], [1 << 62], [1 << 400], -(1 << 70), 1e308, [[0, 0, 1]], [[0, 9, 1]], {"a": "b"}, [1.0]]),
    st.sampled_from(["zeros", "mean", "none", "init", "model", "from('pad')", "from('copied')", "halves", [1e308, 1e308], [0.5, 0.5]]),
    st.text(max_size=4), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.integers(-2, 13), max_size=4), st.lists(st.floats(0, 2), max_size=3),
)  # fmt: skip


@settings(max_examples=examples(1500), deadline=None)
@given(st.sampled_from(ADAPT_PATHS), _junk)
def test_a_changed_adapter_is_a_plan_or_a_plan_error(path, junk):
    value = without(to_json(ADAPT_PLAN), path, (junk,))
    error = follow_adapted(value)
    assert error is None or len(str(error)) < 3000
    if error is None:  # and what is followed gives each key its own shape
        assert [tuple(step["shape"]) for step in value["steps"]] == [tensor.shape for tensor in ADAPT_TARGET.values()]


FIELDS = ["dim", "dims", "index", "of", "sizes", "start", "stop", "size", "fill", "at", "value", "scheme", "shape", "weights", "parts",
          "heads", "to", "source", "target", "copy", "rows", "runs", "arguments", "mode", "op", "groups"]  # fmt: skip
NAMES = [*ADAPTERS, "cast", "init", "my:flip", ":", "a:", "", "Transpose", "conca"]


@settings(max_examples=examples(1500), deadline=None)
@given(
    st.integers(0, len(ADAPT_PLAN.steps) - 1),
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(FIELDS), _junk, max_size=4)).map(
            lambda row: row[1] | {"op": row[0]}
        ),
        max_size=3,
    ),
)
def test_any_ops_are_followed_or_a_plan_error(number, ops):
    value = to_json(ADAPT_PLAN)
    value["steps"][number]["ops"] = ops
    follow_adapted(value)


def test_an_adapter_without_one_of_its_fields_is_refused():
    for path in ADAPT_PATHS:
        if type(path[-1]) is str and "arguments" not in path[:-1]:  # a person's own function may do without an argument
            assert isinstance(follow_adapted(without(to_json(ADAPT_PLAN), path)), PlanError), path


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("one", {"ops": [{"op": "slice", "dim": 0, "start": 0, "stop": 5}, {"op": "cast", "dtype": "F16"}]}),
        ("one", {"ops": [{"op": "slice", "dim": 0, "start": -4, "stop": 0}, {"op": "cast", "dtype": "F16"}]}),
        ("one", {"ops": [{"op": "slice", "dim": 0, "start": 0, "stop": 4}]}),
        ("one", {"ops": [{"op": "cast", "dtype": "F16"}, {"op": "slice", "dim": 0, "start": 0, "stop": 4}]}),
        ("one", {"ops": []}),
        ("one", {"action": "copy"}),
        ("one", {"sources": []}),
        ("qk", {"sources": [{"file": 0, "key": "q"}]}),
        ("qk", {"sources": [{"file": 0, "key": "q"}, {"file": 0, "key": "w"}]}),
        ("qk", {"sources": [{"file": 0, "key": "q"}] * 3}),
        ("mean", {"ops": [{"op": "average", "weights": [0.5, 0.6]}, {"op": "cast", "dtype": "F16"}]}),
        ("mean", {"ops": [{"op": "average", "weights": [1.0]}, {"op": "cast", "dtype": "F16"}]}),
        ("mean", {"ops": [{"op": "average"}, {"op": "cast", "dtype": "F16"}]}),
        ("own", {"ops": [{"op": "my:flip", "arguments": {}, "shape": [2, 3]}, {"op": "cast", "dtype": "F16"}]}),
        ("own", {"ops": [{"op": "my:flip", "arguments": {}, "shape": [-3, -2]}, {"op": "cast", "dtype": "F16"}]}),
        ("own", {"ops": [{"op": "my:flip", "arguments": []}, {"op": "cast", "dtype": "F16"}]}),
        ("own", {"ops": [{"op": "my:flip"}, {"op": "cast", "dtype": "F16"}]}),
        ("w", {"ops": [{"op": "transpose"}, {"op": "cast", "dtype": "F16"}]}),
        ("w", {"shape": [1 << 62] * 30}),
        ("pad", {"shape": [1 << 62] * 30}),
        ("w", {"ops": [{"op": "transpose", "dims": [0, 0]}, {"op": "cast", "dtype": "F16"}]}),
        ("w", {"ops": [{"op": "transpos", "dims": [0, 1]}, {"op": "cast", "dtype": "F16"}]}),
        ("pad", {"ops": [{"op": "pad", "dim": 0, "size": 5, "fill": "init", "at": "end"}, {"op": "cast", "dtype": "F16"}]}),
        ("copied", {"ops": [{"op": "init", "scheme": "from('nowhere')"}]}),
        ("copied", {"ops": [{"op": "init", "scheme": "from('copied')"}]}),
        ("copied", {"ops": [{"op": "init", "scheme": "from('w')"}]}),
    ],
)
def test_an_adapter_that_does_not_add_up_is_refused(target, changes):
    value = to_json(ADAPT_PLAN)
    next(step for step in value["steps"] if step["target"] == target).update(changes)
    assert isinstance(follow_adapted(value), PlanError)
