"""Values that a module's loading code computes from keys that the model has not: torch's own load is the measure of every one. The classes
are after torch's, detectron2's, fairseq's and timm's."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import program
from hypothesis import given, settings
from hypothesis import strategies as st
from loading_support import everything, same
from profiles import examples
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError, PlanError, RuleError, TargetError
from ckptsurgeon.planning.planfile import from_json, to_json


class Scaled(nn.Module):
    """Version 1 had another name, version 2 another scale."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))
        self.register_buffer("s", torch.ones(()))

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
        version = local.get("version") or 1
        if version < 2 and prefix + "weight" in state:
            state[prefix + "w"] = state.pop(prefix + "weight")
        if version < 3 and prefix + "w" in state:
            state[prefix + "w"] = state[prefix + "w"] * 10
        super()._load_from_state_dict(state, prefix, local, *rest)

    @staticmethod
    def old(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"weight": state["w"], "s": state["s"]}


class Fused(nn.Module):
    """One tensor for two, and a plain rename beside it, which the code takes for granted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(4))
        self.gain = nn.Parameter(torch.randn(4))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        if prefix + "q" in state:
            state[prefix + "weight"] = torch.cat([state.pop(prefix + "q"), state.pop(prefix + "k") * 2])
            state[prefix + "bias"] = state.pop(prefix + "b")
            state.pop(prefix + "unused")
        super()._load_from_state_dict(state, prefix, *rest)

    @staticmethod
    def old(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        q, k = state["weight"].chunk(2)
        return {"q": q.clone(), "k": k.clone(), "b": state["bias"], "gain": state["gain"], "unused": torch.ones(1)}


class Split(nn.Module):
    """Three layers for one, by a hook of their parent."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_load_state_dict_pre_hook(self._split)

    @staticmethod
    def _split(module: Any, state: Any, prefix: str, *_: Any) -> None:
        for kind in ("weight", "bias"):
            if f"{prefix}qk.{kind}" in state:
                state[f"{prefix}q.{kind}"], state[f"{prefix}k.{kind}"] = state.pop(f"{prefix}qk.{kind}").chunk(2)

    @staticmethod
    def old(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"qk.{kind}": torch.cat([state[f"q.{kind}"], state[f"k.{kind}"]]) for kind in ("weight", "bias")}


class InPlace(nn.Module):
    """As detectron2's FrozenBatchNorm2d, after caffe2's names: a bias for what has none, a variance without its epsilon."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(3) + 0.5)

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
        version = local.get("version")
        if version is None or version < 2:
            for new, old in (("weight", "s"), ("bias", "b"), ("running_var", "riv")):
                if prefix + old in state:
                    state[prefix + new] = state.pop(prefix + old)
            state.setdefault(prefix + "running_mean", torch.zeros(3))
        if (version is None or version < 3) and prefix + "running_var" in state:
            state[prefix + "running_var"] -= 1e-5
        super()._load_from_state_dict(state, prefix, local, *rest)

    @staticmethod
    def old(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"s": state["weight"], "b": state["bias"], "riv": state["running_var"]}


class Table(nn.Module):
    """It brings a table of another size to its own, as timm resamples position embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4))
        self.bias = nn.Parameter(torch.randn(4))
        self.register_load_state_dict_pre_hook(self._resize)

    @staticmethod
    def _resize(module: Any, state: Any, prefix: str, *_: Any) -> None:
        if prefix + "table" in state and state[prefix + "table"].numel() != 4:
            state[prefix + "table"] = state[prefix + "table"].view(2, -1).mean(0)

    @staticmethod
    def old(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"table": torch.cat([state["table"], state["table"] + 1]), "bias": state["bias"]}


class Flagged(nn.Module):
    """As fairseq's: a tensor beside the weights says of which version they are."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))
        self.register_buffer("now", torch.tensor(2.0))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        if prefix + "flag" in state:
            flag = state.pop(prefix + "flag")
            state[prefix + "w"] = state.pop(prefix + "old") * flag
        super()._load_from_state_dict(state, prefix, *rest)

    @staticmethod
    def old(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"old": state["w"], "flag": torch.tensor(3.0), "now": state["now"]}


class Beside(nn.Module):
    """Under its own names alone: a decoder that old files left out is made of the encoder, and a gain that was one is filled in."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(3, 3), nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.full((3,), 1e-5))
        self.register_load_state_dict_pre_hook(self._complete)

    @staticmethod
    def _complete(module: Any, state: Any, prefix: str, *_: Any) -> None:
        if prefix + "enc.weight" in state and prefix + "dec.weight" not in state:
            state[prefix + "dec.weight"] = state[prefix + "enc.weight"].t()
            state.setdefault(prefix + "dec.bias", torch.zeros(3))
        if any(key.startswith(prefix + "enc.") for key in state):
            state.setdefault(prefix + "gain", torch.ones(3))

    @staticmethod
    def old(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value for key, value in state.items() if key.startswith("enc.")}


class Plain(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    @staticmethod
    def old(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state


KINDS: tuple[Any, ...] = (Scaled, Fused, Split, InPlace, Table, Flagged, Beside, Plain)


class Root(nn.Sequential):
    """The model's own `load_state_dict` renames and doubles."""

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        changed: Any = OrderedDict(
            (key.replace("first.", "m0."), value * 2 if key.startswith("first.") and value.is_floating_point() else value)
            for key, value in state.items()
        )
        changed._metadata = getattr(state, "_metadata", {})
        return super().load_state_dict(changed, strict, assign)


def of(*kinds: Any, root: type[nn.Sequential] = nn.Sequential) -> nn.Module:
    return root(OrderedDict((f"m{number}", kind()) for number, kind in enumerate(kinds)))


def old(model: nn.Module, version: int | None = 1, prefix: str = "") -> Any:
    """The model's state_dict as former code of each module saved it."""
    state: Any = OrderedDict()
    for name, module in model.named_children():
        own = {key: value.detach().clone() for key, value in module.state_dict().items()}
        state.update((f"{prefix}{name}.{key}", value) for key, value in module.old(own).items())  # type: ignore[operator]
    if version is not None:
        state._metadata = OrderedDict({f"{prefix}{path}".rstrip("."): {"version": version} for path, _ in model.named_modules()})
    return state


def write(state: Any, path: Path) -> Path:
    save_file(dict(state), path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def by_torch(model: nn.Module, state: Any) -> tuple[dict[str, Any], Any]:
    """What torch makes of a copy of the model, and which keys it says are missing and unexpected."""
    truth = copy.deepcopy(model)
    told = truth.load_state_dict(copy.deepcopy(state), strict=False)
    return everything(truth), told


def loaded(model: nn.Module, path: Path) -> dict[str, Any]:
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True))
    return everything(fresh)


@given(data=st.data())
@settings(max_examples=examples(40), deadline=None)
def test_any_tree_gets_what_torch_makes_of_its_old_keys(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("computed")
    torch.manual_seed(data.draw(st.integers(0, 99)))
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    model = of(*kinds)
    state = old(of(*kinds), data.draw(st.sampled_from([None, 1])))
    metadata = getattr(state, "_metadata", None)
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), max_size=1)):
        del state[key]
    try:
        truth, told = by_torch(model, state)
    except (KeyError, RuntimeError):
        truth, told = None, None
    if metadata is not None:
        state._metadata = metadata
    whole = told is not None and not told.missing_keys and not told.unexpected_keys
    source = write(state, folder / "a.pt") if state else None
    if source is None:
        return
    live, before = copy.deepcopy(model), everything(model)
    try:
        report = cs.transfer(source, live)
    except CheckpointError:
        assert not whole
        same(everything(live), before)
        return
    if truth is None or told is None:  # torch's load fails on the old keys: they are left out, and said
        assert any(finding.code == "loading" for finding in report.findings) or report.dropped
        return
    same(everything(live), truth)
    nothing_given = {name for name, _ in model.named_children() if not any(key.startswith(f"{name}.") for key in state)}
    made_up = {key for key in report.fresh if key.split(".")[0] in nothing_given}  # by the code, of nothing
    assert set(report.fresh) - made_up <= set(told.missing_keys)
    for name in ("o.pt", "o.safetensors"):
        try:
            merged = cs.merge(source, model, folder / name)
        except PlanError:
            assert name.endswith("safetensors") or not whole
            assert not (folder / name).exists()
            continue
        assert merged.fresh == report.fresh
        # What is fresh comes from a seeded constructor, not from this model.
        wanted, found = truth, loaded(model, folder / name)
        given_by_file = {key for key in truth if key not in report.fresh}
        same({key: found[key] for key in given_by_file}, {key: wanted[key] for key in given_by_file})
        assert cs.verify(folder / name, model).ok


def under(prefix: str, state: Any) -> Any:
    moved: Any = OrderedDict((prefix + key, value) for key, value in state.items())
    moved._metadata = OrderedDict((f"{prefix}{path}".rstrip("."), local) for path, local in state._metadata.items())
    return moved


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", KINDS)
def test_every_verb_says_the_same_of_each_kind(kind: Any, prefix: str, tmp_path: Path) -> None:
    model = of(kind, Plain)
    state = old(of(kind, Plain))
    truth, told = by_torch(model, state)
    assert not told.missing_keys and not told.unexpected_keys
    source = write(under(prefix, state), tmp_path / "a.pt")
    diff = cs.diff(source, model)
    assert not diff.missing and not diff.extra and not diff.mismatched, str(diff)
    plan = cs.plan(source, model)
    assert not plan.fresh and set(plan.transferred) == set(model.state_dict())
    computed = {step.target: step for step in plan.steps if step.action == "load"}
    own = {prefix + key for key in state}
    assert bool(computed) is (kind is not Plain)
    for key, step in computed.items():
        assert step.reason == f"computed (as {kind.__name__} loads it)" and kind.__name__ in str(plan)
        assert step.sources and {name for _, name in step.sources} <= own
        assert any(row.key == key and row.planned for row in diff.loaded)
    back = from_json(json.dumps(to_json(plan)).encode(), "plan.json")
    assert back == plan
    merged = cs.merge(source, model, tmp_path / "o.pt")
    assert merged.verification is not None and merged.verification.ok
    found = loaded(model, tmp_path / "o.pt")
    same({key: found[key] for key in plan.transferred}, {key: truth[key] for key in plan.transferred})
    live = copy.deepcopy(model)
    moved = cs.transfer(source, live)
    same(everything(live), truth)
    for report in (merged, moved):
        assert (report.transferred, report.fresh, report.coverage) == (plan.transferred, plan.fresh, plan.coverage)
        assert set(report.adapted) == set(computed)
    live = copy.deepcopy(model)
    cs.transfer(state, live)  # a state_dict in memory, which stays as it is
    same(everything(live), truth)
    assert all(torch.equal(value, torch.load(source, weights_only=True)[prefix + key]) for key, value in state.items())


class Growing(nn.Module):
    """A buffer that is None until a file has one."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))
        self.register_buffer("cache", None)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        if prefix + "cache" in state:
            self.cache = torch.zeros_like(state[prefix + "cache"])
        super()._load_from_state_dict(state, prefix, *rest)


def test_a_tensor_that_the_code_adds_to_the_model_is_not_left_out_silently() -> None:
    model = Growing()
    report = cs.transfer({"w": torch.ones(3), "cache": torch.ones(2)}, model)
    assert model.cache is None and [name for name, _ in report.dropped] == ["cache"]
    assert any(finding.key == "cache" and finding.level == "warning" for finding in report.findings)
    assert not any(finding.level == "warning" for finding in cs.transfer({"w": torch.ones(3)}, model).findings)


def test_what_a_second_source_or_a_rule_gives_is_not_computed(tmp_path: Path) -> None:
    model = of(Beside)
    source, second = write(old(model), tmp_path / "a.pt"), tmp_path / "b.pt"
    torch.save({"m0.dec.weight": torch.full((3, 3), 7.0)}, second)
    found = loaded(model, Path(str(cs.merge([source, second], model, tmp_path / "o.pt").output)))
    assert (found["m0.dec.weight"] == 7).all() and (found["m0.gain"] == 1).all()
    kept = model.state_dict()["m0.gain"].clone()
    for how in ({"keep": ["m0.gain"]}, {"init": {"m0.gain": "model"}}):
        found = torch.load(str(cs.merge(source, model, tmp_path / "k.pt", overwrite=True, **how).output))  # type: ignore[arg-type]
        assert torch.equal(found["m0.gain"], kept) and not found["m0.dec.bias"].any()
        cs.transfer(source, model, **how)  # type: ignore[arg-type]
        assert torch.equal(model.state_dict()["m0.gain"], kept)
    report = cs.transfer(source, model, init={"m0.dec.weight": "zeros"})
    assert not model.state_dict()["m0.dec.weight"].any() and "m0.dec.weight" in report.fresh


@pytest.mark.slow
def test_plan_dry_run_apply_and_verify_on_the_command_line(tmp_path: Path) -> None:
    lines = f"import sys; sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}\nfrom test_models_computed import *\n"
    (tmp_path / "nets.py").write_text(lines + "def Net(): return of(Scaled, Fused, Plain)\n")
    state = old(of(Scaled, Fused, Plain))
    write(state, tmp_path / "a.pt")
    model = of(Scaled, Fused, Plain)
    truth, _ = by_torch(model, state)
    dry = program("merge", "a.pt", "nets.py:Net", "-o", "o.pt", "--dry-run", folder=tmp_path)
    assert dry.code == 0 and "computed (as Scaled loads it)" in dry.out and "100.0%" in dry.out.replace(" %", "%"), dry.out
    assert program("plan", "a.pt", "nets.py:Net", "-o", "plan.json", folder=tmp_path).code == 0
    done = program("apply", "plan.json", "-o", "o.pt", "--json", folder=tmp_path)
    assert done.code == 0 and json.loads(done.out)["fresh"] == [], done.out + done.err
    same(loaded(model, tmp_path / "o.pt"), truth)
    assert program("verify", "o.pt", "nets.py:Net", folder=tmp_path).code == 0
    edited = json.loads((tmp_path / "plan.json").read_text())
    for edit, words in (
        (lambda plan: plan.pop("handed"), "not handed to torch's load"),
        (lambda plan: plan["handed"].update({"m1.more": {"file": 0, "key": "m9"}}), "is not there"),
        (lambda plan: plan["handed"].update({"m2.bias": {"file": 0, "key": "m2.bias"}}), "has a step"),
        (lambda plan: plan["loaded"].clear(), "no module of the target computes it"),
    ):
        other = copy.deepcopy(edited)
        edit(other)
        (tmp_path / "other.json").write_text(json.dumps(other))
        refused = program("apply", "other.json", "-o", "p.pt", folder=tmp_path)
        assert refused.code == 2 and words in refused.err, refused.out + refused.err
        assert not (tmp_path / "p.pt").exists()
    torch.save({key: value + 1 for key, value in state.items()}, tmp_path / "a.pt")
    stale = program("apply", "plan.json", "-o", "p.pt", folder=tmp_path)
    assert stale.code == 2 and "has changed" in stale.err


def test_the_models_own_load_state_dict_computes_too(tmp_path: Path) -> None:
    model = of(Plain, root=Root)
    state: Any = OrderedDict((key.replace("m0.", "first."), value) for key, value in of(Plain).state_dict().items())
    truth, _ = by_torch(model, state)
    source = write(state, tmp_path / "a.pt")
    live = copy.deepcopy(model)
    assert not cs.transfer(source, live).fresh
    same(everything(live), truth)
    assert not cs.merge(source, model, tmp_path / "o.pt").fresh
    same(loaded(model, tmp_path / "o.pt"), truth)


def test_the_target_version_is_written_with_what_torch_leaves(tmp_path: Path) -> None:
    model, state = of(Scaled), old(of(Scaled))
    cs.merge(write(state, tmp_path / "a.pt"), model, tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    assert found._metadata["m0"] == {"version": 3} and torch.equal(found["m0.w"], state["m0.weight"] * 10)
    with pytest.raises(PlanError, match="safetensors does not keep"):  # it would be scaled once more
        cs.merge(tmp_path / "a.pt", model, tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64"])
def test_a_dtype_is_chosen_for_what_torch_leaves(dtype: str, tmp_path: Path) -> None:
    model, state = of(Fused), old(of(Fused))
    report = cs.merge(write(state, tmp_path / "a.pt"), model, tmp_path / "o.pt", dtype=dtype)
    wanted = by_torch(model, state)[0]["m0.weight"]
    found = torch.load(tmp_path / "o.pt", weights_only=True)["m0.weight"]
    assert found.dtype == wanted.to(found.dtype).dtype and torch.equal(found, wanted.to(found.dtype)) and found.dtype != torch.float32
    assert dtype == "F64" or "m0.weight" in [cast.key for cast in report.casts]


def test_old_values_of_a_narrower_dtype_are_computed_in_it_as_torch_does(tmp_path: Path) -> None:
    model = of(Fused)
    state = {key: value.bfloat16() for key, value in old(of(Fused)).items()}
    truth, _ = by_torch(model, state)
    cs.merge(write(state, tmp_path / "a.pt"), model, tmp_path / "o.pt")
    same(loaded(model, tmp_path / "o.pt"), truth)
    cs.transfer(tmp_path / "a.pt", model)
    same(everything(model), truth)


def test_a_cast_that_nobody_would_count_is_asked_for(tmp_path: Path) -> None:
    model, state = of(Fused).bfloat16(), old(of(Fused))
    truth, _ = by_torch(model, state)
    source = write(state, tmp_path / "a.pt")
    before = everything(model)
    with pytest.raises(PlanError, match=r"m0\.weight: a Fused makes it from m0\.k, m0\.q; torch's load casts it from F32 to BF16"):
        cs.transfer(source, model)
    same(everything(model), before)
    report = cs.transfer(source, model, allow_cast=["m0.weight", "m0.bias"])
    same(everything(model), truth)
    assert [finding.key for finding in report.findings if finding.code == "cast"] == ["m0.weight", "m0.bias"]


def test_two_ways_to_one_value_are_refused_by_name(tmp_path: Path) -> None:
    model, state = of(Fused), old(of(Fused))
    half = write({key: state[key] for key in ("m0.q", "m0.k", "m0.b", "m0.unused")}, tmp_path / "a.pt")
    rest = write({"m0.gain": state["m0.gain"]}, tmp_path / "b.pt")
    both = write({"m0.gain": state["m0.gain"], "m0.weight": torch.ones(4, 3)}, tmp_path / "c.pt")
    truth, _ = by_torch(model, state)
    assert not cs.merge([half, rest], model, tmp_path / "o.pt").fresh
    same(loaded(model, tmp_path / "o.pt"), truth)
    with pytest.raises(PlanError, match=r"c\.pt has m0\.weight itself"):
        cs.merge([half, both], model, tmp_path / "p.pt")
    with pytest.raises(PlanError, match="has old keys for its module too"):
        cs.merge([half, write(state, tmp_path / "d.pt")], model, tmp_path / "p.pt")
    with pytest.raises(PlanError, match="averaged"):
        cs.merge([tmp_path / "d.pt", tmp_path / "d.pt"], model, tmp_path / "p.pt", average=True)
    with pytest.raises(PlanError, match=r"init 'm0\.weight'"):
        cs.merge(tmp_path / "d.pt", model, tmp_path / "p.pt", init={"m0.weight": "zeros"})
    twice = write({**state, "enc.q": state["m0.q"] + 1, "enc.gain": state.pop("m0.gain")}, tmp_path / "e.pt")
    with pytest.raises(CheckpointError, match=r"several tensors.* to m0\.q"):
        cs.merge(twice, model, tmp_path / "p.pt", rename={"enc.{p}": "m0.{p}"}, drop=["m0.gain"])
    assert not (tmp_path / "p.pt").exists()


def test_keys_that_rules_leave_out_are_not_handed_on(tmp_path: Path) -> None:
    model, state = of(Fused), old(of(Fused))
    source = write(state, tmp_path / "a.pt")
    report = cs.transfer(source, model, drop=["m0.q", "m0.k"])
    assert set(report.fresh) == {"m0.weight", "m0.bias"}
    renamed = write({key.replace("m0.", "enc."): value for key, value in state.items()}, tmp_path / "b.pt")
    truth, _ = by_torch(of(Fused), state)
    cs.transfer(renamed, model, rename={"enc.{p}": "m0.{p}"})
    same(everything(model), truth)


def test_an_adapter_that_is_asked_for_comes_before_the_models_code(tmp_path: Path) -> None:
    model, state = of(Table), old(of(Table))
    report = cs.transfer(write(state, tmp_path / "a.pt"), model, adapt={"m0.table": "slice(0, 0, 4)"})
    assert report.adapted == ("m0.table",) and torch.equal(everything(model)["m0.table"], state["m0.table"][:4])


def test_code_that_hangs_on_values_and_gives_nothing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2))

        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            value = state.pop(prefix + "old", None)
            if value is not None and float(value.sum()) <= 0:  # a stand-in has zeros
                state[prefix + "w"] = value * 2
            super()._load_from_state_dict(state, prefix, *rest)

    model = nn.ModuleDict({"m": Picky(), "fc": nn.Linear(2, 2)})
    source = write({"m.old": torch.ones(2), "fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}, tmp_path / "a.pt")
    before = everything(model)
    for act in (lambda: cs.transfer(source, model), lambda: cs.merge(source, model, tmp_path / "o.pt")):
        with pytest.raises(TargetError, match="should have computed a value, but did not"):
            act()
    same(everything(model), before)
    assert not (tmp_path / "o.pt").exists()


def test_moments_do_not_follow_a_value_that_code_computes(tmp_path: Path) -> None:
    model, state = of(Fused), old(of(Fused))
    theirs = [nn.Parameter(value) for value in state.values()]
    adam = torch.optim.Adam(theirs)
    sum(value.sum() for value in theirs).backward()  # type: ignore[union-attr]
    adam.step()
    torch.save({"model": state, "optimizer": adam.state_dict()}, tmp_path / "a.pt")
    ours = torch.optim.Adam(model.parameters())
    report = cs.transfer(tmp_path / "a.pt", model, root="model", optimizer=ours, optimizer_names=list(state))
    assert report.optimizer is not None and report.optimizer.carried == ("m0.gain",)
    assert {key: words for key, words in report.optimizer.not_carried if "m0.weight" in (key, words)} != {} or report.optimizer.zeroed
    assert "computed by load, which moments can't follow" in str(report.optimizer.not_carried)


class Halved(nn.Module):
    """A hook makes q and k of qk."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.y = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_load_state_dict_pre_hook(self.hook)

    @staticmethod
    def hook(_: nn.Module, state: Any, prefix: str, *rest: Any) -> None:
        for leaf in ("weight", "bias"):
            if (value := state.pop(f"{prefix}qk.{leaf}", None)) is not None:
                state[f"{prefix}q.{leaf}"], state[f"{prefix}k.{leaf}"] = value.chunk(2)


def test_what_a_hook_takes_is_not_lost_and_a_rename_may_lead_to_it(tmp_path: Path) -> None:
    state = {"qk.weight": torch.randn(8, 4), "qk.bias": torch.randn(8), "y.weight": torch.ones(4, 4), "y.bias": torch.ones(4)}
    truth, _ = by_torch(Halved(), state)
    for names, rename in ((("qk", "qk"), {}), (("qk", "both"), {"both.{p}": "qk.{p}"})):
        model = Halved()
        source = write({key.replace(*names): value for key, value in state.items()}, tmp_path / "a.pt")
        report = cs.transfer(source, model, rename=rename, strict=True)
        assert not [finding for finding in report.findings if finding.level == "warning"] and report.dropped == ()
        same(everything(model), truth)
    with pytest.raises(RuleError, match=r"'kq\.weight', and none of its results is in the target"):
        cs.transfer(source, model, rename={"both.{p}": "kq.{p}"})
    report = cs.transfer(write({**Halved().state_dict(), **state}, tmp_path / "a.pt"), model)
    same(everything(model), truth)
    assert dict(report.dropped)["q.weight"] == "q.weight is computed (as Halved loads it)"


@pytest.mark.parametrize("version", [1, 2, None])
def test_moments_do_not_follow_a_value_that_code_turns_by_its_version(version: int | None, tmp_path: Path) -> None:
    class Turned(nn.Module):
        _version = 2

        def __init__(self) -> None:
            super().__init__()
            self.w, self.gain = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))

        def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
            if (local.get("version") or 1) < 2:
                state[prefix + "w"] = state[prefix + "w"].t()
            super()._load_from_state_dict(state, prefix, local, *rest)

    theirs, ours = (nn.ModuleDict({"m": Turned()}) for _ in range(2))
    adam, new = (torch.optim.Adam(model.parameters()) for model in (theirs, ours))
    sum((value * torch.randn_like(value)).sum() for value in theirs.parameters()).backward()  # type: ignore[union-attr]
    adam.step()
    state = theirs.state_dict()
    state._metadata["m"] = {} if version is None else {"version": version}  # type: ignore[attr-defined]
    torch.save({"model": state, "optimizer": adam.state_dict()}, tmp_path / "a.pt")
    for report in (
        cs.transfer(tmp_path / "a.pt", ours, optimizer=new),
        cs.merge(tmp_path / "a.pt", ours, tmp_path / "o.pt", with_optimizer=True),
    ):
        assert report.optimizer is not None
        assert report.optimizer.carried == (("m.w", "m.gain") if version == 2 else ("m.gain",))
        assert report.optimizer.not_carried == (
            () if version == 2 else (("m.w", "its weights are computed by load, which moments can't follow"),)
        )
    turned = theirs.m.w if version == 2 else theirs.m.w.t()  # type: ignore[union-attr]
    assert torch.equal(ours.m.w, turned)  # type: ignore[union-attr,arg-type]


def test_under_activation_checkpointing_old_keys_are_found(tmp_path: Path) -> None:
    model, state = of(Scaled, Fused, Plain), old(of(Scaled, Fused, Plain))
    for name in ("m0", "m1"):
        setattr(model, name, checkpoint_wrapper(getattr(model, name)))
    truth, told = by_torch(model, state)
    assert not told.missing_keys
    assert not cs.merge(write(state, tmp_path / "a.pt"), model, tmp_path / "o.pt").fresh
    same(loaded(model, tmp_path / "o.pt"), truth)
    assert not cs.transfer(tmp_path / "a.pt", model).fresh
    same(everything(model), truth)


def test_a_key_that_is_tied_to_a_computed_one_is_computed_too(tmp_path: Path) -> None:
    def net() -> nn.Module:
        model = of(Fused, Plain)
        model.out = nn.Linear(3, 4)
        model.out.weight = model.m0.weight  # type: ignore[union-attr,assignment]
        return model

    model, state = net(), old(of(Fused, Plain))
    state["out.bias"] = torch.ones(4)
    truth, _ = by_torch(model, state)
    assert not cs.merge(write(state, tmp_path / "a.pt"), model, tmp_path / "o.pt").fresh
    same(loaded(model, tmp_path / "o.pt"), truth)
    assert not cs.transfer(tmp_path / "a.pt", model).fresh
    same(everything(model), truth)
