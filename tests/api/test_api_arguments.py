"""A wrong argument of any public function is an error of ours that says what was expected; what is right passes unchanged."""

from __future__ import annotations

import inspect
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon import api, finding_codes
from ckptsurgeon.argument_examples import CALLS, EXAMPLES
from ckptsurgeon.arguments import KINDS, NAMED, kind_of
from ckptsurgeon.errors import ArgumentError, CheckpointError, SettingsError
from ckptsurgeon.models.init.scheme_text import parse_scheme
from ckptsurgeon.rules import rules


def thawing() -> cs.Thaw:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    return cs.Thaw(model, torch.optim.SGD([model.bias], 1.0), ["weight"], lr=1.0)


def load_state_dict(state: Any) -> None:
    thawing().load_state_dict(state)


VERBS: dict[str, Callable[..., Any]] = {name: getattr(api, name) for name in api.__all__}
VERBS |= {"Thaw": cs.Thaw, "Thaw.load_state_dict": load_state_dict, "limits": cs.limits, "adapter": cs.adapter, "Rule": cs.Rule}


def parameters(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(VERBS[name]).parameters)


EVERY = [(verb, parameter) for verb in VERBS for parameter in parameters(verb)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the arguments name."""
    folder = tmp_path_factory.mktemp("written")
    torch.save({"weight": torch.ones(2, 2)}, folder / "half.pt")
    cs.merge(folder / "half.pt", nn.Linear(2, 2), folder / "merged.pt")
    torch.save(nn.Linear(2, 2).state_dict(), folder / "a.pt")
    (folder / "rules.toml").write_text('[[drop]]\nkey = "x"\n')
    return folder


@pytest.fixture
def base(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], dict[str, Any]]]:
    """For each verb the least arguments that are right, made anew, in a copy of the folder."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    model = lambda: nn.Linear(2, 2)  # noqa: E731
    record = lambda: cs.transfer({"weight": torch.ones(2, 2)}, model())  # noqa: E731
    frozen = model()
    frozen.weight.requires_grad_(False)
    pairs = {"source": "a.pt", "target": "a.pt"}
    return {
        "apply": lambda: {"plan": cs.plan("a.pt"), "output": "out.pt"},
        "check": lambda: {"paths": "a.pt"},
        "diff": lambda: dict(pairs),
        "freeze": lambda: {"model": model(), "what": "weight"},
        "groups": lambda: {"checkpoint": "merged.pt", "target": model(), "lr": 1.0, "fresh_lr": 1.0},
        "initialize": lambda: {"model": model(), "source": record(), "scheme": "zeros"},
        "inspect": lambda: {"path": "a.pt"},
        "load_plan": lambda: {"path": "a.pt"},
        "load_rules": lambda: {"path": "rules.toml"},
        "match": lambda: dict(pairs),
        "merge": lambda: {"sources": "a.pt", "target": None, "output": "out.pt", "overwrite": True},
        "open": lambda: {"path": "a.pt"},
        "output_format": lambda: {"output": "out.pt"},
        "param_groups": lambda: {"model": model(), "source": record(), "lr": 1.0, "fresh_lr": 1.0},
        "plan": lambda: {"sources": "a.pt", "target": "a.pt"},
        "skeleton": lambda: {"target": "a.pt"},
        "transfer": lambda: {"source": "a.pt", "model": model()},
        "unfreeze": lambda: {"model": model()},
        "verify": lambda: {"checkpoint": "a.pt", "target": "a.pt"},
        "limits": lambda: {"tensors": 5},
        "adapter": lambda: {"shape": lambda shapes: shapes[0]},
        "Rule": lambda: {"kind": "drop", "pattern": "a"},
        "Thaw.load_state_dict": lambda: {"state": thawing().state_dict()},
        "Thaw": lambda: {"model": frozen, "optimizer": torch.optim.SGD([frozen.bias], 1.0), "stages": ["weight"], "lr": 1.0},
    }


def test_every_public_function_is_held_against_the_table() -> None:
    """All but errors, and the values that only the library makes."""
    public = {name for name in cs.__all__ if callable(getattr(cs, name)) and not isinstance(getattr(cs, name), type)}
    assert public | {"Rule", "Thaw"} <= set(VERBS)


def test_the_tables_have_no_row_that_nothing_uses() -> None:
    words = {f"{verb}.{name}" for verb, name in EVERY} | {name for _, name in EVERY}
    assert set(NAMED) <= words and set(EXAMPLES) <= words and set(CALLS) <= set(VERBS)
    annotations = {str(parameters(verb)[name].annotation).removesuffix(" | None") for verb, name in EVERY}
    assert set(KINDS) <= annotations
    assert all(KINDS["Kind"].fits(kind) for kind in get_args(rules.Kind))


def test_every_parameter_of_every_verb_has_a_kind() -> None:
    assert [f"{verb}.{name}" for verb, name in EVERY if kind_of(verb, parameters(verb)[name]) is None] == []


def test_what_is_right_passes(base) -> None:
    for name, made in base.items():
        if name != "load_plan":
            VERBS[name](**made())
    assert cs.diff(Path("a.pt"), nn.Linear(2, 2)).same and cs.diff("a.pt", cs.open("a.pt"), drop=iter([])).same
    assert cs.plan(["a.pt", "a.pt"], average=(1, 2)).steps
    cs.transfer("a.pt", nn.Linear(2, 2), rename=zip(["weight"], ["weight"], strict=True), strict=1, min_coverage=1)
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, "b.pt")
    cs.merge("b.pt", nn.Linear(2, 2), Path("out.pt"), rules=["rules.toml"][:0], note=print, overwrite=True)


WRONG = [object(), nn.Linear, io.BytesIO(b"x"), b"a.pt", [3.5, object()], {1: 2}, lambda: None, 1 + 2j, os]


@pytest.mark.parametrize(("verb", "name"), EVERY, ids=lambda word: str(word))
def test_a_wrong_argument_is_an_error_that_names_the_parameter(base, verb, name) -> None:
    kind = kind_of(verb, parameters(verb)[name])
    assert kind is not None
    refused = 0
    for value in [*WRONG, *([] if parameters(verb)[name].default is None else [None])]:
        try:
            VERBS[verb](**{**base[verb](), name: value})
        except ArgumentError as error:
            refused += 1
            assert error.key == name and kind.words in error.reason and verb in error.reason and len(str(error).splitlines()[0]) < 300
            assert isinstance(error, TypeError)
        except CheckpointError:
            pass
    assert refused >= 3


WORLD = {
    "Net": lambda: nn.Linear(2, 2),
    "model": nn.Linear(2, 2),
    "optimizer": torch.optim.SGD([torch.zeros(1)], 1.0),
    "torch": torch,
    "limits": cs.limits,
    "report": {"weight": torch.ones(1)},
    "thaw": None,
}
SENSE: dict[str, Callable[[Any], object]] = {
    "adapt": lambda value: rules.compile_rules(rules.from_arguments(adapt=value)),
    "init": lambda value: [parse_scheme(scheme) for scheme in value.values()],
    "rename": lambda value: rules.compile_rules(rules.from_arguments(rename=value)),
    "select": lambda value: finding_codes.named(value[0])[0],
    "ignore": lambda value: finding_codes.named(value[0])[0],
}
# A flag or a place that does not go with the least call is refused as such, which is no fault of what the hint says.
IDLE = (
    "with_optimizer=True",
    "source_model=",
    "match=True",
    "leave it out",
    "give ",
    "--",
    "add -o",
    "ckptsurgeon",
    "transfer(",
    "check the path",
    "1 or more",
)


@pytest.mark.parametrize(("verb", "name"), EVERY, ids=lambda word: str(word))
def test_the_hint_is_right_for_its_parameter(base, verb, name) -> None:
    with pytest.raises(ArgumentError) as caught:
        VERBS[verb](**{**base[verb](), name: 1 + 2j})
    hint = caught.value.hint
    assert hint is not None and hint == CALLS.get(verb, hint)
    if verb in CALLS:
        eval(hint, WORLD)
        return
    assert hint.startswith(f"{name}=")
    kind = kind_of(verb, parameters(verb)[name])
    value = eval(hint.removeprefix(f"{name}="), {**WORLD, "thaw": thawing()})
    assert kind is not None and kind.fits(value)
    assert hint != f"{name}=True" or str(parameters(verb)[name].annotation) in ("bool", "NoDecay")
    SENSE.get(name, bool)(value)
    try:
        VERBS[verb](**{**base[verb](), name: value})
    except ArgumentError:
        raise
    except SettingsError as error:
        assert verb != "check" and str(error.hint).startswith(IDLE), error
    except CheckpointError:
        assert verb != "check"  # what the hint names is not in this small world


def test_a_rule_of_another_kind(base) -> None:
    for arguments, key, hint in (
        (("drop", 3), "pattern", "pattern='aux.**'"),
        (("nonsense", "a"), "kind", "kind='drop'"),
        (("rename", "a", ["b"]), "result", "give one of them"),
        (("a.*", "drop"), "kind", "the other way round: Rule(kind, pattern)"),
        (("drop", "a", "", 3), "file", "file='rules.toml'"),
        (("drop", "a", "", "r.toml", "3"), "line", "line=3"),
    ):
        with pytest.raises(ArgumentError) as caught:
            cs.Rule(*arguments)  # type: ignore[arg-type]
        assert (caught.value.key, caught.value.hint) == (key, hint)


def test_what_is_marked_as_an_adapter_is_a_function() -> None:
    with pytest.raises(ArgumentError, match="shape: takes a function"):
        cs.adapter((2, 3))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="marks a function"):
        cs.adapter(shape=lambda shapes: shapes[0])(3)  # type: ignore[type-var]


def test_limits_of_another_kind() -> None:
    for value in (None, 3.5, b"2GiB", [1]):
        with pytest.raises(ArgumentError, match="pickle_bytes: takes a number, or text such as '2GB'") as caught:
            cs.limits(pickle_bytes=value)  # type: ignore[arg-type]
        assert caught.value.hint == "limits(pickle_bytes='2GB', tensors=10_000_000)"


def test_arguments_that_changed_places(base) -> None:
    net, plan = nn.Linear(2, 2), cs.plan("a.pt")
    for call, order in (
        (lambda: cs.transfer(net, "a.pt"), "transfer(source, model)"),
        (lambda: cs.diff(net, "a.pt"), "diff(source, target)"),
        (lambda: cs.match(net, "a.pt"), "match(source, target)"),
        (lambda: cs.plan(net, "a.pt"), "plan(sources, target)"),
        (lambda: cs.merge(net, "a.pt", "out.pt"), "merge(sources, target)"),
        (lambda: cs.verify(net, "a.pt"), "verify(checkpoint, target)"),
        (lambda: cs.apply("out.pt", plan), "apply(plan, output)"),
        (lambda: cs.freeze("weight", net), "freeze(model, what)"),
        (lambda: cs.unfreeze("weight", net), "unfreeze(model, what)"),
        (lambda: cs.param_groups(cs.transfer("a.pt", net), net, lr=1), "param_groups(model, source)"),
        (lambda: cs.initialize("a.pt", net), "initialize(model, source)"),
        (lambda: cs.Thaw(torch.optim.SGD(net.parameters(), 1.0), net, lr=1), "Thaw(model, optimizer)"),
    ):
        with pytest.raises(ArgumentError) as found:
            call()
        assert found.value.hint == f"the other way round: {order}"


def test_the_hint_is_what_to_write(base) -> None:
    with pytest.raises(ArgumentError, match=r"the class Linear .*\n  try: make one first: Linear\(...\)"):
        cs.transfer("a.pt", nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"rename: takes a dict .* a tuple of 2 .*\n  try: rename={'a.{p}': 'b.{p}'}"):
        cs.transfer("a.pt", nn.Linear(2, 2), rename=("a.{p}", "b.{p}"))  # type: ignore[arg-type]
    for call in (lambda file: cs.merge(file, "a.pt", "out.pt"), lambda file: cs.verify(file, "a.pt")):
        with pytest.raises(ArgumentError, match=r"a BytesIO was given .*\n  try: write it to a file and give its path"):
            call(io.BytesIO())
    with pytest.raises(ArgumentError, match=r"a list of 2 .*\n  try: give one of them"):
        cs.open(["a.pt", "a.pt"])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"strict: takes True or False, and 'no' was given to transfer"):
        cs.transfer("a.pt", nn.Linear(2, 2), strict="no")  # type: ignore[arg-type]


def test_what_is_in_memory_gets_a_hint_that_works(base) -> None:
    data, state = Path("a.pt").read_bytes(), nn.Linear(2, 2).state_dict()
    with pytest.raises(ArgumentError, match=r"bytes of length \d+ was given to transfer\n  try: io.BytesIO\(source\)$"):
        cs.transfer(data, nn.Linear(2, 2))  # type: ignore[arg-type]
    assert not cs.transfer(io.BytesIO(data), nn.Linear(2, 2)).fresh
    for call, hint in (
        (lambda: cs.open(state), "skeleton(path)"),  # type: ignore[arg-type]
        (lambda: cs.inspect(nn.Linear(2, 2)), "skeleton(path)"),  # type: ignore[arg-type]
        (lambda: cs.diff(state, nn.Linear(2, 2)), "skeleton(source)"),
        (lambda: cs.match(nn.Linear(2, 2), "a.pt", values=True), None),
        (lambda: cs.merge(state, nn.Linear(2, 2), "out.pt"), "torch.save(sources, 'net.pt')"),
        (lambda: cs.merge([state], nn.Linear(2, 2), "out.pt"), None),
    ):
        with pytest.raises(ArgumentError) as caught:
            call()
        assert hint is None or hint in str(caught.value.hint), caught.value
    assert cs.diff(cs.skeleton(state), nn.Linear(2, 2)).same
    closed = io.BytesIO(data)
    closed.close()
    for verb in (cs.open, cs.inspect, lambda one: cs.transfer(one, nn.Linear(2, 2)), lambda one: cs.diff(one, "a.pt")):
        with pytest.raises(CheckpointError, match="<BytesIO>: is closed"):
            verb(closed)


def test_the_wrong_value_of_a_dict_or_a_list_is_named(base) -> None:
    for arguments, words in (
        ({"rename": {"a": "b", "fc1.{p}": 3}}, "rename: takes a dict from patterns .*, and 3 was given to diff for 'fc1.{p}'"),
        ({"rename": {5: "b"}}, "and 5 was given to diff as a key"),
        ({"rename": [("a", "b"), ("c",)]}, "and a tuple of 1 was given to diff as number 1 of them"),
        ({"drop": ["a", None]}, "drop: .* and None was given to diff as number 1 of them"),
    ):
        with pytest.raises(ArgumentError, match=words):
            cs.diff("a.pt", "a.pt", **arguments)


def test_a_word_of_the_right_kind_that_means_nothing(base) -> None:
    for verb, name in EVERY:
        if parameters(verb)[name].annotation in ("str | None", "str") and verb not in ("check", "Rule"):
            with pytest.raises(CheckpointError):
                VERBS[verb](**{**base[verb](), name: "nonsense\0"})
    assert not cs.check("a.pt", root="nonsense").ok


@pytest.mark.parametrize("path", ["", "\0", "a\0.pt", "x" * 5000, Path("folder"), Path("folder/missing"), "a.pt/b", "\ud800"], ids=ascii)
def test_paths_that_no_file_can_have(base, path) -> None:
    Path("folder").mkdir()
    calls = [VERBS[verb] for verb in ("open", "inspect", "skeleton", "load_plan", "load_rules")]
    calls += [lambda one: cs.diff(one, "a.pt"), lambda one: cs.transfer(one, nn.Linear(2, 2)), lambda one: cs.apply(one, "out.pt")]
    calls += [lambda one: cs.merge("a.pt", None, f"{os.fspath(one)}/sub/out.pt"), lambda one: cs.diff("a.pt", "a.pt", rules=one)]
    for call in calls:
        with pytest.raises(CheckpointError):
            call(path)
    if path not in (Path("folder"), Path("folder/missing")):  # shards are written into an empty folder
        with pytest.raises(CheckpointError):
            cs.merge("a.pt", None, path, format="torch")
    assert path == Path("folder") or not cs.check(path).ok


def test_a_parameter_that_there_is_not_is_pythons_own_error(base) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'rot'"):
        cs.open("a.pt", rot="x")  # type: ignore[call-arg]
    assert "rename" in inspect.signature(cs.transfer).parameters and cs.transfer.__doc__
    with pytest.raises(TypeError, match=r"transfer\(\) got an unexpected keyword argument 'renames', did you mean rename\?") as caught:
        cs.transfer("a.pt", nn.Linear(2, 2), renames={})  # type: ignore[call-arg]
    assert caught.value.__suppress_context__
    with pytest.raises(TypeError, match=r"transfer\(\) missing a required argument: 'model'$"):
        cs.transfer("a.pt")  # type: ignore[call-arg]


def test_a_result_of_many_keys_has_a_short_repr(base) -> None:
    many = {f"layers.{number}.some.long.name.weight": torch.zeros(1) for number in range(3_000)}
    torch.save(many, "many.pt")
    torch.save(dict(list(many.items())[:2_900]), "most.pt")
    small = nn.Linear(2, 2)
    results = [
        cs.open("many.pt"),
        cs.inspect("many.pt"),
        cs.inspect("many.pt").state_dicts[0],
        cs.diff("many.pt", "most.pt"),
        cs.plan("many.pt", "most.pt"),
        cs.merge("many.pt", "most.pt", "out.pt", provenance=False),
        cs.verify("many.pt", "most.pt"),
        cs.check("many.pt", against="most.pt"),
        cs.check("many.pt", against="most.pt").files[0],
        cs.match("a.pt", "a.pt"),
        cs.transfer("a.pt", small),
        cs.freeze(small, "weight"),
    ]
    for result in results:
        line = repr(result)
        assert type(result).__name__ in line and 10 < len(line) <= 200 and "\n" not in line, line
        assert isinstance(str(result), str)
    assert "2900" in repr(results[3]) and len(str(results[3])) > 200
