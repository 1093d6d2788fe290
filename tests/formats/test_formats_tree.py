"""All that a torch file holds as plain values: the same as torch's own reader gives, tensors by their places, and nothing is run."""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import formats_support as support
import pytest
import safetensors.torch
import torch

from ckptsurgeon.errors import CheckpointError, FormatError, LimitError, UnreadableError
from ckptsurgeon.formats import read, read_tree
from ckptsurgeon.tensors import Refused, TensorMeta


def training() -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([("w", parameter)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 7])
    parameter.grad = torch.full((2, 3), 0.5)
    optimizer.step()
    return {
        "model": OrderedDict(w=parameter.detach()),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "best": (0.5, None, True, b"raw", 1 << 40),
        3: [torch.arange(4)[1:3]],
        "counts": Counter({"a": 2}),
        "lists": defaultdict(list, {"x": [1]}),
    }


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert type(found) is TensorMeta
        assert support.bits(support.stored(found)) == support.bits(expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert type(found) is type(expected) and found == expected


@pytest.mark.parametrize("zipped", [True, False])
def test_everything_is_there_as_torch_has_it(zipped: bool, tmp_path: Path) -> None:
    value = training()
    torch.save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    tree = read_tree(str(tmp_path / "a.pt"))
    same(tree.value, value)
    assert tree.files == read(str(tmp_path / "a.pt")).files
    assert tree.value["optimizer"]["state"][0]["exp_avg"].name == "optimizer.state.0.exp_avg"


@pytest.mark.parametrize("zipped", [True, False])
def test_what_would_have_to_run_is_refused_by_name_and_never_runs(zipped: bool, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"model": {"w": torch.ones(1)}, "x": [Bomb(), 1], "p": Path("a")}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    value = read_tree(str(tmp_path / "a.pt")).value
    assert isinstance(value["x"][0], Refused) and "exec" in value["x"][0].reason
    assert value["x"][1] == 1
    assert isinstance(value["p"], Refused)
    assert not (tmp_path / "ran").exists()


def test_what_is_shared_is_shared_and_what_contains_itself_ends(tmp_path: Path) -> None:
    shared = [1, torch.ones(2)]
    loop: list[Any] = [3]
    loop.append(loop)
    torch.save({"model": {"w": torch.ones(1)}, "a": shared, "b": shared, "loop": loop}, tmp_path / "a.pt")
    value = read_tree(str(tmp_path / "a.pt")).value
    assert value["a"] is value["b"]
    assert value["loop"][0] == 3 and isinstance(value["loop"][1], Refused)


def test_a_bomb_of_shared_lists_stays_small(tmp_path: Path) -> None:
    value: Any = [torch.ones(1)]
    for _ in range(50):
        value = [value] * 10
    torch.save({"model": {"w": torch.ones(1)}, "bomb": value}, tmp_path / "a.pt")
    assert type(read_tree(str(tmp_path / "a.pt")).value["bomb"]) is list


def test_too_deep_and_too_long_names_are_limits(tmp_path: Path) -> None:
    deep: Any = torch.ones(1)
    for _ in range(80):
        deep = [deep]
    torch.save({"model": {"w": torch.ones(1)}, "optimizer": {"state": deep, "param_groups": []}}, tmp_path / "deep.pt")
    with pytest.raises(LimitError, match="deep"):
        read_tree(str(tmp_path / "deep.pt"))
    wide: dict[str, Any] = {"k" * 100_000: {str(number): [number] for number in range(400)}}
    torch.save({"model": {"w": torch.ones(1)}, "optimizer": {"state": wide, "param_groups": []}}, tmp_path / "wide.pt")
    with pytest.raises(LimitError, match="characters"):
        read_tree(str(tmp_path / "wide.pt"))


def test_other_files_are_told(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="nothing beside them"):
        read_tree(str(tmp_path / "a.safetensors"))
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"w": 1}))
    (tmp_path / "c.pt").write_bytes(b"<html>")
    torch.save({"w": torch.ones(1000)}, tmp_path / "d.pt")
    (tmp_path / "d.pt").write_bytes((tmp_path / "d.pt").read_bytes()[:-700])
    for name in ("b.pt", "c.pt", "d.pt"):
        with pytest.raises(CheckpointError) as error:
            read_tree(str(tmp_path / name))
        assert error.value.path == str(tmp_path / name)
    with pytest.raises(UnreadableError):
        read_tree(str(tmp_path / "none.pt"))
