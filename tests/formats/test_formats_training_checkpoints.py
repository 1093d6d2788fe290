"""Nested training checkpoints, and what stands beside the tensors in them: all of it is told, none of it is run."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from formats_support import Save, assert_same, only, roots, save_legacy, save_zip, stored

from ckptsurgeon.errors import FormatError, LimitError
from ckptsurgeon.formats import read
from ckptsurgeon.formats.pickle.machine import run
from ckptsurgeon.formats.pickle.state import TruncatedPickle
from ckptsurgeon.formats.torch.legacy import MAGIC, PROTOCOL
from ckptsurgeon.limit_table import allowed
from ckptsurgeon.tensors import Archive, Refused

both = pytest.mark.parametrize("save", [save_zip, save_legacy])


class Config:
    """Stands for a library's own configuration object."""

    def __init__(self) -> None:
        self.layers = 3


class Mode(enum.Enum):
    TRAIN = 1


class Holder(torch.nn.Module):
    """A module with extra state."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.fc, self.extra = torch.nn.Linear(2, 2), extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def _net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


def _read(value: Any, save: Save, path: Path) -> Archive:
    save(value, path)
    return read(str(path))


@both
def test_a_training_checkpoint(save: Save, tmp_path: Path) -> None:
    net = _net()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    value = {
        "epoch": 7,
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1),
        "losses": [0.5, 0.25],
        "empty": {},
        "best": None,
    }
    archive = _read(value, save, tmp_path / "it.pt")
    assert only(archive).root == "model"
    assert_same(only(archive).tensors, torch.load(tmp_path / "it.pt", weights_only=False)["model"])
    assert only(archive).module_metadata == dict(value["model"]._metadata)
    assert sorted(archive.beside) == ["args", "best", "empty", "epoch", "losses", "optimizer"]
    assert archive.globals == ("argparse.Namespace",)


@both
def test_a_lightning_checkpoint_that_weights_only_refuses(save: Save, tmp_path: Path) -> None:
    value = {
        "epoch": 3,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": OrderedDict((f"model.{key}", tensor) for key, tensor in _net().state_dict().items()),
        "hyper_parameters": {"config": Config(), "mode": Mode.TRAIN, "path": Path("x")},
        "callbacks": {Config: {"best": torch.tensor(0.5)}, Mode: {"count": 1}},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "loops": {"fit_loop": {"state_dict": {}}},
    }
    save(value, tmp_path / "it.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "it.ckpt", weights_only=True)
    archive = read(str(tmp_path / "it.ckpt"))
    here = Config.__module__
    assert {f"{here}.Config", f"{here}.Mode"} < set(archive.globals)
    found = roots(archive)
    assert list(found) == ["state_dict", f"callbacks.<{here}.Config>"]
    assert_same(found["state_dict"].tensors, value["state_dict"])
    assert {"hyper_parameters.config", "hyper_parameters.mode", "optimizer_states.0", "loops.fit_loop.state_dict"} < set(archive.beside)


@both
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"model": {"w": 1}, "model_ema": {"w": 2}}, ["model", "model_ema"]),
        ({"state": {"net": {"w": 1}}, "ema": {"module": {"w": 2}}}, ["state.net", "ema.module"]),
        ([{"w": 1}, {"v": 2}], ["0", "1"]),
        (({"w": 1}, 5), ["0"]),
        ({"models": [{"w": 1}, {"w": 2}]}, ["models.0", "models.1"]),
        ({"generator": {"w": 1}, "discriminator": {"v": 2}}, ["generator", "discriminator"]),
        ({"w": 1, "sub": {"v": 2}}, ["", "sub"]),
        ({0: 1, 1: 2}, [""]),
        (collections.defaultdict(dict, {"model": {"w": 1}}), ["model"]),
    ],
)
def test_roots_in_file_order(value: Any, expected: list[str], save: Save, tmp_path: Path) -> None:
    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return type(node)(*([dict] if isinstance(node, collections.defaultdict) else []), {k: filled(v) for k, v in node.items()})
        return type(node)(map(filled, node)) if isinstance(node, (list, tuple)) else torch.full((node,), float(node))

    archive = _read(filled(value), save, tmp_path / "it")
    assert [state_dict.root for state_dict in archive.state_dicts] == expected


@both
def test_a_dict_named_twice_is_told_once_and_noted(save: Save, tmp_path: Path) -> None:
    state = {"w": torch.ones(2)}
    archive = _read({"model": state, "ema": state}, save, tmp_path / "it")
    assert only(archive).root == "model" and archive.beside == ("ema",)


@both
def test_values_beside_tensors_stand_apart(save: Save, tmp_path: Path) -> None:
    value = {
        "w": torch.ones(2),
        "int": 3,
        "big": 1 << 70,
        "float": 0.5,
        "none": None,
        "text": "ü",
        "bytes": b"\x00\xff",
        "scalar": numpy.float64(2.5),
        "scalar32": numpy.float32(1.5),
        "flag": numpy.bool_(True),
        "dtype": torch.float16,
        "device": torch.device("cuda:7"),
        "size": torch.Size([1, 2]),
        "set": {1, 2},
        "complex": 1 + 2j,
        "counter": collections.Counter("aab"),
        "array": numpy.ones(3),
        "layout": torch.strided,
        "tuple": ({"deep": [1]},),
    }
    archive = _read(value, save, tmp_path / "it")
    assert list(only(archive).tensors) == ["w"]
    told = set(archive.beside) | set(only(archive).entries) | {"w"}
    missing = {key for key in value if not any(place == key or place.startswith(f"{key}.") for place in told)}
    assert not missing
    assert only(archive).entries["array"] == Refused("a NumPy array, not a tensor")


@both
@pytest.mark.parametrize(
    "extra",
    [
        {"scale": 1.5, "names": ["a", "b"], "nested": {"t": (1, None, True)}},
        b"\x00\x80\xff",
        "text",
        7,
        [],
        {"numpy": numpy.float32(0.5), "many": list(range(1000))},
        {"shared": [[1, 2]] * 3},
    ],
)
def test_extra_state_is_carried(extra: Any, save: Save, tmp_path: Path) -> None:
    archive = _read(Holder(extra).state_dict(), save, tmp_path / "it")
    assert only(archive).entries == {"_extra_state": extra}
    assert sorted(only(archive).tensors) == ["fc.bias", "fc.weight"]
    assert archive.beside == ()


@both
def test_extra_state_that_is_a_tensor_is_a_tensor(save: Save, tmp_path: Path) -> None:
    archive = _read(Holder(torch.arange(3)).state_dict(), save, tmp_path / "it")
    assert "_extra_state" in only(archive).tensors


@both
@pytest.mark.parametrize("extra", [{"t": torch.ones(1)}, Config(), {"deep": [Config()]}, io.BytesIO(b"x"), {(1, 2): 3}, numpy.ones(2)])
def test_extra_state_that_cant_be_carried_is_refused_by_key(extra: Any, save: Save, tmp_path: Path) -> None:
    archive = _read(Holder(extra).state_dict(), save, tmp_path / "it")
    assert isinstance(only(archive).entries["_extra_state"], Refused)
    assert archive.beside == ()


@both
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(2, 2).to_sparse(), "sparse"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    ],
)
def test_tensors_without_plain_storage_are_refused_by_key(tensor: torch.Tensor, words: str, save: Save, tmp_path: Path) -> None:
    entries = only(_read({"w": torch.ones(1), "odd": tensor}, save, tmp_path / "it")).entries
    assert list(entries) == ["odd"] and words in entries["odd"].reason


@both
def test_keys_that_are_no_text(save: Save, tmp_path: Path) -> None:
    statistics = {(0, 1): 1, (1, 0): 2, b"raw": 3, None: 4, 0.5: 5, Mode.TRAIN: 6, torch.float32: 7, (0, (1, 2)): 8}
    archive = _read({"model": {"w": torch.ones(1)}, "statistics": statistics}, save, tmp_path / "it")
    assert len([place for place in archive.beside if place.startswith("statistics.")]) == len(statistics)
    assert "statistics.(0, 1)#0" in archive.beside or "statistics.(0, 1)" in archive.beside


@both
@pytest.mark.parametrize("value", [{1: 1, "1": 2}, {"a.b": {"w": 1}, "a": {"b": {"w": 2}}}])
def test_two_keys_that_read_the_same_are_refused(value: Any, save: Save, tmp_path: Path) -> None:
    def filled(node: Any) -> Any:
        return {key: filled(child) for key, child in node.items()} if isinstance(node, dict) else torch.ones(node)

    save(filled(value), tmp_path / "it")
    with pytest.raises(FormatError):
        read(str(tmp_path / "it"))


@both
def test_depth_has_a_limit(save: Save, tmp_path: Path) -> None:
    value: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(allowed("nesting")):
        value = {"d": value}
    assert only(_read(value, save, tmp_path / "it")).root == ".".join("d" * allowed("nesting"))
    with pytest.raises(LimitError, match="more than 64 deep"):
        _read({"d": value}, save, tmp_path / "it")


def _legacy(identities: list[Any], tensors: Any, storages: list[tuple[str, bytes]]) -> bytes:
    """A legacy file in which the strings 'storage:N' stand for the persistent ids given."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return identities[value.number] if isinstance(value, Stand) else None

        def reducer_override(self, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return NotImplemented
            return torch._utils._rebuild_tensor_v2, (value.storage, value.offset, value.shape, value.stride, False, OrderedDict())

    buffer = io.BytesIO()
    for value in (MAGIC, PROTOCOL, {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}):
        pickle.dump(value, buffer, protocol=2)
    Pickler(buffer, protocol=2).dump(tensors)
    pickle.dump([key for key, _ in storages], buffer, protocol=2)
    for _, data in storages:
        buffer.write(struct.pack("<q", len(data) // 4) + data)
    return buffer.getvalue()


class Stand:
    """Stands for a storage in `_legacy`."""

    def __init__(self, number: int) -> None:
        self.number = number


class Tensor:
    """Stands for a tensor in `_legacy`."""

    def __init__(self, storage: Stand, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride


def test_legacy_views_of_storages(tmp_path: Path) -> None:
    data = torch.arange(20.0)
    view = ("storage", torch.FloatStorage, "root", "cpu", 20, ("view", 5, 10))
    whole = ("storage", torch.FloatStorage, "root", "cpu", 20, None)
    value = {"view": Tensor(Stand(0), 2, (2, 3), (3, 1)), "whole": Tensor(Stand(1), 0, (20,), (1,))}
    path = tmp_path / "it"
    path.write_bytes(_legacy([view, whole], value, [("root", data.numpy().tobytes())]))
    tensors = only(read(str(path))).tensors
    assert_same(tensors, torch.load(path, weights_only=True))
    assert stored(tensors["view"]).tolist() == [[7, 8, 9], [10, 11, 12]]


@pytest.mark.parametrize(
    "identity",
    [
        ("storage", torch.FloatStorage, "root", "cpu", 20, ("view", 15, 10)),
        ("storage", torch.FloatStorage, "root", "cpu", 20, ("view", -1, 10)),
        ("storage", torch.FloatStorage, "root", "cpu", 20, ("view", 0, 5)),
        ("storage", torch.FloatStorage, "root", "cpu", 20, "view"),
        ("storage", torch.FloatStorage, "root", "cpu", 21, None),
        ("storage", torch.DoubleStorage, "root", "cpu", 20, None),
        ("storage", torch.FloatStorage, "missing", "cpu", 20, None),
        ("storage", torch.FloatStorage, ("root",), "cpu", 20, None),
        ("storage", "FloatStorage", "root", "cpu", 20, None),
        ("storage", torch.FloatStorage, "root", "cpu", -1, None),
        ("else", 1),
        "storage",
        7,
    ],
)
def test_legacy_storages_that_lie(identity: Any, tmp_path: Path) -> None:
    path = tmp_path / "it"
    whole = ("storage", torch.FloatStorage, "root", "cpu", 20, None)
    value = {"odd": Tensor(Stand(0), 0, (10,), (1,)), "whole": Tensor(Stand(1), 0, (20,), (1,))}
    path.write_bytes(_legacy([identity, whole], value, [("root", bytes(80))]))
    with pytest.raises(FormatError):
        read(str(path))
    path.write_bytes(_legacy([whole, whole], value, [("root", bytes(80))]))
    assert len(only(read(str(path))).tensors) == 2


@pytest.mark.parametrize(
    "storages", [[], [("root", bytes(76))], [("root", bytes(80)), ("root", bytes(80))], [("root", bytes(80)), ("x", b"")]]
)
def test_legacy_storages_that_are_not_filled_or_not_used(storages: list[tuple[str, bytes]], tmp_path: Path) -> None:
    path = tmp_path / "it"
    whole = ("storage", torch.FloatStorage, "root", "cpu", 20, None)
    path.write_bytes(_legacy([whole], {"w": Tensor(Stand(0), 0, (20,), (1,))}, storages))
    with pytest.raises(FormatError):
        read(str(path))


def test_legacy_headers_longer_than_one_window(tmp_path: Path) -> None:
    value = {f"слой.{index}.{'ж' * 40}": torch.full((1,), float(index)) for index in range(9000)}
    save_legacy(value, tmp_path / "it")
    assert_same(only(read(str(tmp_path / "it"))).tensors, value)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_cut_anywhere_is_seen_as_cut(protocol: int) -> None:
    row = [1, 300, 70000, -5, 1 << 40, 0.5, "x" * 300, None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    value = {"ключ": row, "more": {str(index): [index, row] for index in range(300)}, "list": list(range(10)), "last": "ж"}
    data = pickle.dumps(value, protocol=protocol)
    assert run(data).value == value
    for length in range(len(data)):
        with pytest.raises(TruncatedPickle):
            run(data[:length])
