"""`transfer` into a live model: from every kind of source, all or nothing, and without touching what is not its business."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import api_support as support
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ckptsurgeon as cs
from ckptsurgeon.errors import (
    ArgumentError,
    CastError,
    CheckpointError,
    CoverageError,
    FormatError,
    ModelError,
    PlanError,
    RootError,
    RuleError,
    StaleError,
    StrictError,
    TargetError,
    UnreadableError,
    VerificationError,
)
from ckptsurgeon.streaming.reading import Reader


def snapshot(model: nn.Module) -> dict[str, tuple[bytes, int, bool]]:
    """Every parameter and buffer: its bits, where they are, and whether it learns."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (support.bits(tensor), tensor.data_ptr(), tensor.requires_grad) for name, tensor in tensors}


def unchanged(model: nn.Module, before: dict[str, tuple[bytes, int, bool]]) -> bool:
    return snapshot(model) == before


@pytest.mark.parametrize("source", support.SOURCES)
def test_from_a_file_of_every_format(source: str, tmp_path: Path) -> None:
    state = support.network(seed=1).state_dict()
    path = support.SOURCES[source](state, tmp_path)
    model = support.network(seed=2)
    model.head.weight.requires_grad_(False)
    before = snapshot(model)
    report = cs.transfer(path, model)
    support.same(model.state_dict(), state)
    after = snapshot(model)
    assert {name: value[1:] for name, value in after.items()} == {name: value[1:] for name, value in before.items()}
    assert after["scratch"] == before["scratch"]  # a buffer that is not persistent
    assert set(report.transferred) == set(state)
    assert (report.fresh, report.dropped, report.coverage.tensors) == ((), (), 1.0)


def checkpoint(state: dict[str, Tensor], folder: Path) -> object:
    torch.save(state, folder / "in.pt")
    return cs.open(folder / "in.pt")


def module(state: dict[str, Tensor], _folder: Path) -> object:
    model = support.network(seed=5)
    model.load_state_dict(state)
    return model


def plain(state: dict[str, Tensor], _folder: Path) -> object:
    return {key: tensor.clone() for key, tensor in state.items()}


def path(state: dict[str, Tensor], folder: Path) -> object:
    torch.save(state, folder / "in.pt")
    return os.fspath(folder / "in.pt")


@pytest.mark.parametrize("kind", [checkpoint, module, plain, path])
def test_from_a_path_a_checkpoint_a_module_and_a_state_dict(kind: Callable[[Any, Path], object], tmp_path: Path) -> None:
    state = support.network(seed=1).state_dict()
    model = support.network(seed=2)
    report = cs.transfer(kind(state, tmp_path), model)
    support.same(model.state_dict(), state)
    assert model.norm.num_batches_tracked.item() == 17
    assert model.out.weight is model.embed.weight
    assert report.output is None
    text = str(report)
    assert "Net" in text and "transferred" in text and "100.0 % of tensors" in text


@pytest.mark.parametrize("kind", [checkpoint, module, plain, path])
def test_what_fits_is_taken_and_the_rest_is_fresh(kind: Callable[[Any, Path], object], tmp_path: Path) -> None:
    state = support.network(seed=1).state_dict()
    if kind is not module:
        state["surplus"] = torch.ones(2)
    model = support.network(classes=5, seed=2)
    before = snapshot(model)
    report = cs.transfer(kind(state, tmp_path), model)
    after = model.state_dict()
    for key in state:
        if not key.startswith(("head", "surplus")):
            assert support.bits(after[key]) == support.bits(state[key]), key
    assert snapshot(model)["head.weight"] == before["head.weight"]
    assert report.fresh == ("head.weight", "head.bias")
    dropped = dict(report.dropped)
    assert "(3, 4)" in dropped["head.weight"] and "(5, 4)" in dropped["head.weight"]
    assert set(dropped) == {"head.weight", "head.bias"} | ({"surplus"} if kind is not module else set())


def test_rules_and_initialisation(tmp_path: Path) -> None:
    state = {key.replace("conv", "first"): tensor for key, tensor in support.network(seed=1).state_dict().items()}
    torch.save(state, tmp_path / "in.pt")
    model = support.network(classes=5, seed=2)
    report = cs.transfer(
        tmp_path / "in.pt",
        model,
        rename={"first.{p}": "conv.{p}"},
        drop="norm.*",
        init={"head.weight": "xavier_normal", "head.bias": "ones"},
    )
    assert torch.equal(model.conv.weight, state["first.weight"])
    assert model.head.bias.tolist() == [1.0] * 5
    assert report.fresh[-2:] == ("head.weight", "head.bias")
    again = support.network(classes=5, seed=3)
    cs.transfer(tmp_path / "in.pt", again, rename={"first.{p}": "conv.{p}"}, drop="norm.*", init={"head.weight": "xavier_normal"}, seed=0)
    assert torch.equal(again.head.weight, model.head.weight)
    assert model.head.weight.requires_grad and model.head.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [checkpoint, module, plain])
def test_the_models_dtype_is_kept(kind: Callable[[Any, Path], object], dtype: torch.dtype, tmp_path: Path) -> None:
    state = support.network(seed=1).state_dict()
    model = support.network(seed=2).to(dtype)
    report = cs.transfer(kind(state, tmp_path), model)
    expected = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    support.same(model.state_dict(), expected)
    assert bool(report.casts) == (dtype != torch.float64)


def test_a_gradient_and_an_optimizer_keep_their_parameters(tmp_path: Path) -> None:
    model = support.network(seed=2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 1, 5, 5)).sum().backward()
    gradient = model.head.weight.grad.clone()
    cs.transfer(support.network(seed=1), model)
    assert torch.equal(model.head.weight.grad, gradient)
    optimizer.step()
    assert not torch.equal(model.head.weight, support.network(seed=1).head.weight)


def write(state: dict[str, Any], folder: Path) -> Path:
    torch.save(state, folder / "in.pt")
    return folder / "in.pt"


def failures(folder: Path) -> dict[str, tuple[type[CheckpointError], Callable[[nn.Module], object]]]:
    state = support.network(seed=1).state_dict()
    big = {key: tensor * 1e30 if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    part = {**state, "norm.num_batches_tracked": torch.tensor(1.5)}
    source = write(state, folder)
    overflowing, truncating = folder / "big.pt", folder / "part.pt"
    torch.save(big, overflowing)
    torch.save(part, truncating)
    data = source.read_bytes()
    (folder / "cut.pt").write_bytes(data[: len(data) // 2])
    stale = folder / "stale.pt"
    stale.write_bytes(data)
    opened = cs.open(stale)
    stale.write_bytes(data + b"x")
    return {
        "nothing fits": (CoverageError, lambda model: cs.transfer({"x": torch.ones(1)}, model)),
        "too little fits": (CoverageError, lambda model: cs.transfer({"head.bias": torch.ones(3)}, model, min_coverage=0.5)),
        "strict": (StrictError, lambda model: cs.transfer({**state, "x": torch.ones(1)}, model, strict=True)),
        "a rule that matches nothing": (RuleError, lambda model: cs.transfer(source, model, drop=["nothing.*"])),
        "a bad scheme": (CheckpointError, lambda model: cs.transfer(source, model, drop="head.*", init={"head.*": "no_such"})),
        "overflow": (CastError, lambda model: cs.transfer(overflowing, model)),
        "overflow from memory": (CastError, lambda model: cs.transfer(big, model)),
        "truncation": (CastError, lambda model: cs.transfer(truncating, model)),
        "a missing file": (UnreadableError, lambda model: cs.transfer(folder / "none.pt", model)),
        "a truncated file": (CheckpointError, lambda model: cs.transfer(folder / "cut.pt", model)),
        "a stale checkpoint": (StaleError, lambda model: cs.transfer(opened, model)),
        "a skeleton": (PlanError, lambda model: cs.transfer(cs.skeleton(support.network()), model)),
        "a source on meta": (ModelError, lambda model: cs.transfer(support.network().to("meta"), model)),
        "another root": (RootError, lambda model: cs.transfer(state, model, root="ema")),
        "no source at all": (ArgumentError, lambda model: cs.transfer(3, model)),
    }


FAILURES = (
    "nothing fits",
    "too little fits",
    "strict",
    "a rule that matches nothing",
    "a bad scheme",
    "overflow",
    "overflow from memory",
    "truncation",
    "a missing file",
    "a truncated file",
    "a stale checkpoint",
    "a skeleton",
    "a source on meta",
    "another root",
    "no source at all",
)


@pytest.mark.parametrize("failure", FAILURES)
def test_whatever_is_wrong_the_model_is_unchanged(failure: str, tmp_path: Path) -> None:
    model = support.network(seed=2)
    if failure.startswith("overflow"):
        model = model.half()
    before = snapshot(model)
    kind, attempt = failures(tmp_path)[failure]
    with pytest.raises(kind):
        attempt(model)
    assert unchanged(model, before)


def test_a_shape_that_nothing_says_how_to_fit_is_fresh_where_torch_raises_half_way(tmp_path: Path) -> None:
    """torch's load_state_dict raises after having overwritten other tensors; see what it does, and that transfer does not."""
    state = support.network(seed=1).state_dict()
    torchs = support.network(classes=5, seed=2)
    before = snapshot(torchs)
    with pytest.raises(RuntimeError):
        torchs.load_state_dict(state)
    assert not unchanged(torchs, before)
    ours = support.network(classes=5, seed=2)
    assert cs.transfer(state, ours).fresh == ("head.weight", "head.bias")
    strict = support.network(classes=5, seed=2)
    before = snapshot(strict)
    with pytest.raises(StrictError):
        cs.transfer(state, strict, strict=True)
    assert unchanged(strict, before)


def test_overflow_and_truncation_can_be_allowed_by_name() -> None:
    model = support.network(seed=2).half()
    weight = torch.full((3, 4), 70000.0)
    cs.transfer({"head.weight": weight}, model, allow_cast="head.*")
    assert torch.isinf(model.head.weight).all()


def test_a_source_that_changes_before_the_first_copy_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(dict(support.network(seed=1).state_dict()), tmp_path)
    real = Reader.locate

    def writing(self: Reader, span: Any) -> tuple[int, int]:
        os.utime(source, ns=(5, 5))
        return real(self, span)

    monkeypatch.setattr(Reader, "locate", writing)
    model = support.network(seed=2)
    before = snapshot(model)
    with pytest.raises(StaleError):
        cs.transfer(source, model)
    assert unchanged(model, before)


def test_a_source_that_changes_during_the_copy_is_never_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(dict(support.network(seed=1).state_dict()), tmp_path)
    from ckptsurgeon.api import _live

    real = _live.put

    def writing(*arguments: Any) -> None:
        real(*arguments)
        os.utime(source, ns=(5, 5))

    monkeypatch.setattr(_live, "put", writing)
    with pytest.raises(StaleError, match="mixture"):
        cs.transfer(source, support.network(seed=2))


def test_a_model_on_meta_is_refused() -> None:
    with pytest.raises(ModelError, match="meta device") as caught:
        cs.transfer(support.network(), support.network().to("meta"))
    assert "to_empty" in (caught.value.hint or "")


class Odd(nn.Module):
    """One tensor that nothing can be copied into, after one that takes values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fine = nn.Parameter(torch.zeros(3))
        if kind == "expanded":
            self.register_buffer("odd", torch.zeros(1).expand(3))
        elif kind == "sliding":  # each row begins one element after the one before it
            self.register_buffer("odd", torch.zeros(4).as_strided((2, 3), (1, 1)))
        else:
            with torch.inference_mode():
                odd = torch.zeros(3)
            self.register_buffer("odd", odd)


@pytest.mark.parametrize("kind", ["expanded", "sliding", "inference"])
def test_a_tensor_that_can_not_be_written_to_is_found_before_the_first_copy(kind: str) -> None:
    model = Odd(kind)
    with pytest.raises(ModelError) as caught:
        cs.transfer({"fine": torch.ones(3), "odd": torch.arange(model.odd.numel()).float().reshape(model.odd.shape)}, model)
    assert caught.value.key == "odd"
    assert model.fine.tolist() == [0.0, 0.0, 0.0]


def test_a_buffer_whose_elements_interleave_holds_what_it_is_given() -> None:
    model = nn.Module()
    model.register_buffer("w", torch.zeros(8).as_strided((2, 3), (3, 2)))  # elements 0 2 4 and 3 5 7: no two are one
    cs.transfer({"w": torch.arange(6.0).reshape(2, 3)}, model)
    assert model.w.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_a_source_in_the_models_own_memory_is_not_overtaken() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    a, b = model["a"].weight.detach().clone(), model["b"].weight.detach().clone()
    cs.transfer({"a.weight": model["b"].weight, "b.weight": model["a"].weight}, model)
    assert torch.equal(model["a"].weight, b) and torch.equal(model["b"].weight, a)


class Renaming(nn.Module):
    """Its state_dict has other names than its parameters, over the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self._register_state_dict_hook(self._rename)
        self._register_load_state_dict_pre_hook(self._back)

    @staticmethod
    def _rename(_module: nn.Module, state: dict[str, Any], prefix: str, _local: object) -> None:
        for name in ("weight", "bias"):
            state[f"{prefix}outer.{name}"] = state.pop(f"{prefix}inner.{name}")

    @staticmethod
    def _back(state: dict[str, Any], prefix: str, *_: object) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}outer.{name}" in state:
                state[f"{prefix}inner.{name}"] = state.pop(f"{prefix}outer.{name}")


class Copying(nn.Module):
    """Its state_dict holds copies, as of a model that gathers shards; it keeps what it was given as a version, too."""

    damage = False

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.seen: list[Any] = []
        self._register_state_dict_hook(self._copy)
        self._register_load_state_dict_pre_hook(self._see)

    @staticmethod
    def _copy(_module: nn.Module, state: dict[str, Any], _prefix: str, _local: object) -> None:
        for key in list(state):
            state[key] = state[key].clone()

    def _see(self, state: dict[str, Any], _prefix: str, local: dict[str, Any], *_: object) -> None:
        self.seen.append(dict(state._metadata["norm"]))  # type: ignore[attr-defined]
        if self.damage and len(self.seen) == 1:
            state["norm.running_mean"] = state["norm.running_mean"] + 1


def test_hooks_that_rename_over_the_same_memory() -> None:
    model = Renaming()
    weight = torch.randn(2, 2)
    report = cs.transfer({"outer.weight": weight}, model)
    assert torch.equal(model.inner.weight, weight)
    assert report.fresh == ("outer.bias",)


def test_hooks_that_copy_are_gone_through_by_load_state_dict() -> None:
    model = Copying()
    weight = torch.tensor([[1.0, float("nan")], [-0.0, float("inf")]])
    bias = model.first.bias.detach().clone()
    cs.transfer({"first.weight": weight, "norm.running_mean": torch.tensor([3.0, 4.0])}, model)
    assert support.bits(model.first.weight) == support.bits(weight)
    assert model.norm.running_mean.tolist() == [3.0, 4.0]
    assert torch.equal(model.first.bias, bias)
    assert model.seen == [{"version": 2}]  # torch's _metadata went along


def test_hooks_that_change_what_they_are_given_give_what_torch_gives() -> None:
    model, truth = Copying(), Copying()
    truth.load_state_dict(model.state_dict())
    model.damage = truth.damage = True
    truth.seen.clear()
    given = {"first.weight": torch.ones(2, 2), "norm.running_mean": torch.ones(2)}
    state = truth.state_dict()
    state.update(given)
    truth.load_state_dict(state)
    assert truth.norm.running_mean.tolist() == [2.0, 2.0]
    cs.transfer(given, model)
    support.same(model.state_dict(), truth.state_dict())


class Losing(nn.Module):
    """Its state_dict holds copies, and its memory takes nothing: no loading code of its own makes up for that."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self._register_state_dict_hook(self._nothing)

    @staticmethod
    def _nothing(_module: nn.Module, state: dict[str, Any], _prefix: str, _local: object) -> None:
        for key in list(state):
            state[key] = torch.zeros_like(state[key])


def test_a_model_that_does_not_hold_what_it_is_given_goes_back() -> None:
    model = Losing()
    before = [tensor.clone() for tensor in model.parameters()]
    with pytest.raises(VerificationError) as caught:
        cs.transfer({"first.weight": torch.ones(2, 2)}, model)
    assert caught.value.key == "first.weight"
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


class Refusing(Copying):
    def load_state_dict(self, *arguments: Any, **words: Any) -> Any:
        with torch.no_grad():
            self.first.weight.fill_(9)
        raise ValueError("not today")


def test_a_models_own_loading_that_fails_half_way() -> None:
    model = Refusing()
    before = snapshot(model)
    with pytest.raises(TargetError, match="not today"):
        cs.transfer({"first.weight": torch.ones(2, 2)}, model)
    assert unchanged(model, before)


class Counter(nn.Module):
    def __init__(self, refuses: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.count, self.refuses = 1, refuses

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        if self.refuses and state != 1:
            raise ValueError("no such count")
        self.count = state


@pytest.mark.parametrize("from_file", [False, True])
def test_extra_state_comes_along(from_file: bool, tmp_path: Path) -> None:
    source: Any = nn.Sequential(Counter(), Counter())
    source[0].count = source[1].count = 7
    with torch.no_grad():
        source[1].weight.fill_(4)
    model = nn.Sequential(Counter(), Counter())
    cs.transfer(write(source.state_dict(), tmp_path) if from_file else source, model)
    assert [counter.count for counter in model] == [7, 7]
    assert model[1].weight.tolist() == [4.0, 4.0]


def test_an_extra_state_that_is_refused_undoes_all() -> None:
    source = nn.Sequential(Counter(), Counter())
    source[0].count = source[1].count = 7
    with torch.no_grad():
        source[0].weight.fill_(4)
    model = nn.Sequential(Counter(), Counter(refuses=True))
    with pytest.raises(TargetError, match="no such count"):
        cs.transfer(source, model)
    assert [counter.count for counter in model] == [1, 1]
    assert model[0].weight.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda model: nn.Sequential(OrderedDict(module=model))])
def test_into_a_wrapped_model(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    state = support.network(seed=1).state_dict()
    source = write({key: tensor for key, tensor in state.items() if not key.startswith("head")}, tmp_path)
    model = support.network(seed=2)
    wrapped = wrap(model)
    report = cs.transfer(source, wrapped)
    assert {key for key in report.transferred if key.endswith("conv.weight")} and len(report.transferred) == len(state) - 2
    assert torch.equal(model.conv.weight, state["conv.weight"])
    assert {key.rpartition(".")[2] for key in report.fresh} == {"weight", "bias"}
    groups = cs.param_groups(wrapped, report, lr=1e-3, fresh_lr=1e-2)
    placed = {group["name"]: {id(parameter) for parameter in group["params"]} for group in groups}
    assert placed["fresh"] == {id(model.head.weight), id(model.head.bias)}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_from_a_wrapped_models_file(prefix: str, tmp_path: Path) -> None:
    state = support.network(seed=1).state_dict()
    model = support.network(seed=2)
    report = cs.transfer(write({prefix + key: tensor for key, tensor in state.items()}, tmp_path), model)
    support.same(model.state_dict(), state)
    assert report.fresh == ()


def test_a_nested_state_dict_in_memory(tmp_path: Path) -> None:
    state = support.network(seed=1).state_dict()
    model = support.network(seed=2)
    cs.transfer({"epoch": 3, "nets": {"model": state}}, model, root="nets.model")
    support.same(model.state_dict(), state)


@pytest.mark.parametrize("head", range(1, 9))
def test_offsets_that_no_dtype_is_aligned_to(head: int, tmp_path: Path) -> None:
    """In a legacy file data lies wherever the pickle before it ends: every alignment must be read right."""
    state = {"x" * head: torch.ones(1), "longer": torch.randn(1000, dtype=torch.float64), "pairs": torch.randn(333, dtype=torch.complex128)}
    state |= {"short": torch.randn(501).half(), "counts": torch.arange(77), "turned": torch.randn(30, 20).t()}
    torch.save(state, tmp_path / "in.pkl", _use_new_zipfile_serialization=False)
    found = cs.open(tmp_path / "in.pkl")
    model = nn.Module()
    for key, tensor in state.items():
        model.register_buffer(key, torch.zeros_like(tensor, memory_format=torch.contiguous_format))
    cs.transfer(found, model)
    support.same(dict(model.named_buffers()), state)


def test_the_offsets_of_those_files_are_unaligned(tmp_path: Path) -> None:
    seen = set()
    for head in range(1, 9):  # the names of storages are addresses, so that the offsets are not quite ours to choose
        torch.save(
            {"x" * head: torch.ones(1), "long": torch.randn(10, dtype=torch.float64)},
            tmp_path / "in.pkl",
            _use_new_zipfile_serialization=False,
        )
        span = cs.open(tmp_path / "in.pkl")["long"].span
        assert span is not None
        seen.add(span.offset % 8)
    assert len(seen) > 1


def test_a_model_may_learn_from_the_mapped_values(tmp_path: Path) -> None:
    """Values come from the file's mapping: nothing of it may be held, nor the file changed, afterwards."""
    source = write(dict(support.network(seed=1).state_dict()), tmp_path)
    before = source.read_bytes()
    model = support.network(seed=2)
    cs.transfer(source, model)
    source.unlink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 1, 5, 5)).sum().backward()
    optimizer.step()
    source.write_bytes(before)
    assert not torch.equal(model.conv.weight, support.network(seed=1).conv.weight)


def test_tied_keys_with_one_source(tmp_path: Path) -> None:
    state = support.network(seed=1).state_dict()
    del state["out.weight"]
    model = support.network(seed=2)
    report = cs.transfer(write(state, tmp_path), model)
    assert torch.equal(model.out.weight, state["embed.weight"])
    assert "out.weight" in report.transferred and report.fresh == ()


def test_arrays_and_lists_instead_of_tensors_are_named_with_a_hint_that_works(tmp_path):
    """torch's load_state_dict refuses them too; a call that said that nothing fits would hide why."""
    state = {key: value.numpy() for key, value in nn.Linear(2, 3).state_dict().items()}
    np.savez(tmp_path / "net.npz", **state)
    state = dict(np.load(tmp_path / "net.npz"))
    lists = {key: value.tolist() for key, value in state.items()}
    mixed = {"weight": torch.ones(3, 2), "bias": lists["bias"]}
    for source, words in (
        (state, "source: weight: is a NumPy array, not a tensor, nor are 1 more"),
        (lists, "source: weight: is a list of numbers, not a tensor"),
        ({**state, "note": "text"}, "source: weight: is a NumPy array"),
        (mixed, "source: bias: is a list of numbers, not a tensor"),
    ):
        with pytest.raises(RuntimeError, match="expected torch"):
            nn.Linear(2, 3).load_state_dict(source)
        with pytest.raises(FormatError, match=words) as caught:
            cs.transfer(source, nn.Linear(2, 3))
        model = nn.Linear(2, 3)
        cs.transfer(eval(caught.value.hint, {"torch": torch, "np": np, "source": source, "model": model}), model)
        assert model.bias.tolist() == lists["bias"]
    with pytest.raises(FormatError, match="target: weight: is a NumPy array"):
        cs.diff(support.FIXTURES / "net_params.pkl", state)
    with pytest.raises(FormatError, match="source: is an empty dict"):
        cs.transfer({}, nn.Linear(2, 3))
    assert not cs.transfer({**nn.Linear(2, 3).state_dict(), "note": [1, 2], "epoch": 3}, nn.Linear(2, 3)).fresh
