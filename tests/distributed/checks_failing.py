"""What goes wrong on one rank is raised on all, before the first copy where it can be known, and nothing hangs; what each rank reads."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from checks import check, device, kinds, mesh, on_all, refusal, same, saved, seeded, sharded
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import ckptsurgeon as cs
from ckptsurgeon.api import _gates
from ckptsurgeon.errors import UnreadableError
from ckptsurgeon.models.sharded.values import Part, Stored
from ckptsurgeon.storage.local import LocalFile


@check(2)
def ranks_are_given_different_files(folder: Path) -> None:
    one = saved(seeded(1).state_dict(), folder / "one.safetensors")
    other = saved({**seeded(1).state_dict(), "more": torch.zeros(2)}, folder / "other.safetensors")
    model = sharded(seeded(2))
    before = seeded(2).state_dict()
    assert kinds(lambda: cs.transfer(other if dist.get_rank() else one, model)) == ["PlanError"] * 2
    wrong = refusal(lambda: cs.transfer(one, model, drop=["norm.bias"] if dist.get_rank() else []))
    assert "rank 1 has another plan than rank 0" in wrong and len(set(on_all(wrong))) == 1
    same(model, before)


@check(2)
def a_file_is_missing_on_one_rank(folder: Path) -> None:
    path = saved(seeded(1).state_dict(), folder / "net.safetensors")
    model = sharded(seeded(2))
    own = path if dist.get_rank() == 0 else folder / "no.safetensors"
    wrong = on_all(refusal(lambda: cs.transfer(own, model)))
    assert all(text.startswith("UnreadableError") for text in wrong) and "(on rank 1)" in wrong[0]
    same(model, seeded(2).state_dict())


@check(2)
def rules_or_a_record_are_missing_on_one_rank(folder: Path) -> None:
    path = saved(seeded(1).state_dict(), folder / "net.safetensors")
    model = sharded(seeded(2))
    if dist.get_rank() == 0:
        (folder / "rules.toml").write_text('[[drop]]\nkey = "tail.*"\n')
    dist.barrier()
    rules = folder / ("no.toml" if dist.get_rank() else "rules.toml")
    wrong = on_all(refusal(lambda: cs.transfer(path, model, rules=[rules])))
    assert all("no.toml" in text for text in wrong), wrong
    record = path if dist.get_rank() == 0 else folder / "no.safetensors"
    assert "" not in on_all(refusal(lambda: cs.initialize(model, record)))
    same(model, seeded(2).state_dict())


@check(2)
def a_file_fails_on_one_rank_in_mid_copy(folder: Path) -> None:
    path = saved(seeded(1).state_dict(), folder / "net.safetensors")
    model = sharded(seeded(2))
    into = Stored.into

    def failing(value: Stored, part: Part) -> None:
        if dist.get_rank() == 1 and value.key == "layers.0.bias":
            raise UnreadableError("can't be read: Input/output error", path=path)
        into(value, part)

    with mock.patch.object(Stored, "into", failing):
        wrong = on_all(refusal(lambda: cs.transfer(path, model)))
    assert all(text.startswith("UnreadableError") and "of 14 new tensors by now" in text for text in wrong), wrong
    assert "holds 2 of" in wrong[1] and "(on rank 1)" in wrong[0]


@check(2)
def an_interrupt_on_one_rank_is_raised_on_all(folder: Path) -> None:
    path = saved(seeded(1).state_dict(), folder / "net.safetensors")
    model = sharded(seeded(2))

    def failing(*_: Any, **__: Any) -> None:
        if dist.get_rank() == 1:
            raise KeyboardInterrupt

    came = ""
    with mock.patch.object(_gates, "check", failing):
        try:
            cs.transfer(path, model)
        except (KeyboardInterrupt, cs.CheckpointError) as error:
            came = type(error).__name__
    assert on_all(came) == ["CheckpointError", "KeyboardInterrupt"]


@check(2)
def a_failure_for_one_ranks_averaged_copy_is_raised_on_all(folder: Path) -> None:
    """The copies are plain models, of which each rank has its own, while the model is spread over both."""
    path = saved({"model": seeded(1).state_dict(), "ema": seeded(3).state_dict()}, folder / "train.pt")
    model, copy = DistributedDataParallel(seeded(2).to(device())), seeded(4)
    gate = _gates.check

    def failing(plan: Any, *rest: Any) -> None:
        if dist.get_rank() == 1 and plan.sources[0].root == "ema":
            raise UnreadableError("can't be read: Input/output error", path=path)
        gate(plan, *rest)

    with mock.patch.object(_gates, "check", failing):
        assert kinds(lambda: cs.transfer(path, model, ema=copy)) == ["UnreadableError"] * 2
    same(model.module, seeded(2).state_dict())
    same(copy, seeded(4).state_dict())


@check(2)
def what_cannot_be_sharded_is_refused_by_name(folder: Path) -> None:
    path = saved(seeded(1).state_dict(), folder / "net.safetensors")
    flat = FullyShardedDataParallel(seeded(2), device_id=torch.device("cpu")) if dist.get_backend() == "gloo" else None
    if flat is not None:
        assert set(kinds(lambda: cs.transfer(path, flat))) == {"ModelError"}

    class Own(nn.Linear):
        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            state[prefix + "bias"] = state[prefix + "bias"] + 1
            super()._load_from_state_dict(state, prefix, *rest)

    file = saved(nn.Linear(4, 3).state_dict(), folder / "own.safetensors")
    own = Own(4, 3)
    for name in ("weight", "bias"):
        setattr(own, name, nn.Parameter(distribute_tensor(getattr(own, name).detach(), mesh(2), [Shard(0)])))
    wrong = refusal(lambda: cs.transfer(file, own))
    assert "loading code of its own (Own)" in wrong and len(set(on_all(wrong))) == 1


class Reads:
    """Every range of bytes that is read of a file, while it is entered."""

    def __init__(self, path: Path) -> None:
        self.path, self.ranges = str(path), []

    def __enter__(self) -> Reads:
        fill, ranges, path = LocalFile.fill, self.ranges, self.path

        def counted(file: LocalFile, buffer: Any, offset: int) -> bool:
            if file.path == path:
                ranges.append((offset, offset + len(buffer)))
            return fill(file, buffer, offset)

        self.patch = mock.patch.object(LocalFile, "fill", counted)
        self.patch.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.patch.__exit__(*error)


@check(1, 2, 4)
def each_rank_reads_its_own_bytes_once(folder: Path) -> None:
    """By rows and by columns: the tensor data that is read are this rank's elements, each once, and no others."""
    torch.manual_seed(0)
    state = {"rows": torch.randn(9, 5), "columns": torch.randn(4, 10), "whole": torch.randn(3)}
    path = saved(state, folder / "net.safetensors")
    model, over = nn.Module(), mesh(dist.get_world_size())
    model.rows = nn.Parameter(distribute_tensor(torch.zeros(9, 5), over, [Shard(0)]))
    model.columns = nn.Parameter(distribute_tensor(torch.zeros(4, 10), over, [Shard(1)]))
    model.whole = nn.Parameter(torch.zeros(3))
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    with Reads(path) as reads:
        cs.transfer(path, model)
    same(model, state)
    data = [(one, two) for one, two in reads.ranges if two > start]
    own = sum(getattr(one, "to_local", lambda one=one: one)().numel() for one in model.state_dict().values()) * 4
    assert sum(two - one for one, two in data) == own, (data, own)
    assert min(one for one, _ in data) >= start
    every = sorted(one for rows in on_all([pair for pair in data if pair[1] - pair[0] != 12]) for one in rows)
    assert all(before[1] <= after[0] for before, after in pairwise(every))  # no two ranks read the same element
