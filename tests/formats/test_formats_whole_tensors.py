"""Tensors that are read in one step are what the opcodes make of them, whatever is damaged; what is whole is held against torch."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from typing import Any

import pytest
import torch

from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.formats.pickle import machine as pickle_machine
from ckptsurgeon.formats.pickle.machine import run
from ckptsurgeon.formats.pickle.values import StorageRef, TensorRef


def pickled(value: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    archive = zipfile.ZipFile(buffer)
    return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def shown(value: Any) -> Any:
    """A value of the machine as one to compare: what a tensor is, and by a number which object is shared."""
    if isinstance(value, dict):
        return [(shown(key), shown(child)) for key, child in value.items()]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(shown, value)]
    if type(value) is TensorRef:
        return (shown(value.storage), value.dtype.code, value.offset, value.shape, value.stride, value.lazy, value.parameter)
    if type(value) is StorageRef:
        return (value.key, value.dtype and value.dtype.code, value.numel, value.start)
    return value if isinstance(value, (str, int, float, bool, bytes, type(None))) else type(value).__name__


def read(data: bytes) -> Any:
    storages: dict[Any, StorageRef] = {}

    def persistent(identity: Any) -> StorageRef:
        if type(identity) is not tuple or len(identity) != 5 or type(identity[2]) is not str:
            raise CheckpointError("no storage")
        _, kind, key, _, numel = identity
        return storages.setdefault(key, StorageRef(key, kind.dtype, numel))

    try:
        found = run(data, 0, persistent)
        return shown(found.value), found.end, found.globals
    except (CheckpointError, AttributeError) as error:
        return type(error).__name__, str(error)


def by_opcodes(data: bytes, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(pickle_machine, "tensors", lambda *_: None)
        return read(data)


def many() -> dict[str, Any]:
    """More values than BINPUT can number: tensors, views of one storage, scalars, empty ones, ties, Parameters, dtypes, a key twice."""
    whole = torch.arange(4000.0)
    state: dict[str, Any] = {}
    for i in range(60):
        name = f"layers.{i}"
        state |= {
            f"{name}.weight": torch.zeros(2, 3),
            f"{name}.conv": torch.zeros(300, 1, 3, 3),
            f"{name}.part": whole[i * 60 : i * 60 + 50],
            f"{name}.turned": whole[:600].view(20, 30).t(),
            f"{name}.scalar": torch.tensor(i),
            f"{name}.empty": torch.zeros(0, 70_000),
            f"{name}.half": torch.nn.Parameter(torch.zeros(3, dtype=torch.float16)),
            f"{name}.conj": torch.zeros(2, dtype=torch.complex64).conj(),
            f"{name}.tied": whole,
        }
    return {"model": state, "again": dict(state), "names": list(state)}


def test_every_tensor_is_what_torch_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    value = many()
    raw = pickled(value)
    found = read(raw)
    assert found == by_opcodes(raw, monkeypatch)
    (_, tensors), (_, again), (_, names) = found[0]
    assert tensors == again and names == ["list", *value["model"]]
    for (key, told), tensor in zip(tensors, value["model"].values(), strict=True):
        assert told[2:5] == (tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())), key
        assert told[6] is isinstance(tensor, torch.nn.Parameter)


def test_tensors_are_read_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first few, and those that follow one another together."""
    steps = []

    def counting(m: Any, position: int, stack: list[Any], *rest: Any, real: Any = pickle_machine.tensors) -> int | None:
        before = len(stack)
        end: int | None = real(m, position, stack, *rest)
        steps.append(0 if end is None else 1 + (len(stack) - before) // 2)
        return end

    monkeypatch.setattr(pickle_machine, "tensors", counting)
    run(pickled({str(i): torch.zeros(2) for i in range(900)}), 0, lambda identity: StorageRef(identity[2], identity[1].dtype, identity[4]))
    assert 800 < sum(steps) <= 900 and len(steps) < 10


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_damaged_reads_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    state = {str(i): torch.zeros(2, 3)[:, :2] if i % 3 else torch.zeros(70_000 // (i + 1)) for i in range(90)}
    raw = pickled({**state, "all": dict(state)})
    for _ in range(150):
        data = bytearray(raw)
        for _ in range(chance.choice((1, 1, 2, 4))):
            place = chance.randrange(len(data) // 3, len(data))
            match chance.randrange(5):
                case 0:
                    data[place] = chance.randrange(256)
                case 1:
                    data[place] = chance.choice(b"hjqrKMJX(tQR)\x85\x86\x89\x94")
                case 2:
                    del data[place : place + chance.randrange(1, 9)]
                case 3:
                    data[place:place] = b"j" + chance.randrange(700).to_bytes(4, "little")
                case 4:
                    data[place:place] = data[place - chance.randrange(1, 90) : place]
        damaged = bytes(data)
        found, expected = read(damaged), by_opcodes(damaged, monkeypatch)
        assert found == expected


def test_what_a_tensor_keeps_on_its_way_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = pickled({str(i): torch.zeros(2, 3) for i in range(90)})
    for slot in range(400, 420):
        for asking in (b"j" + slot.to_bytes(4, "little"), b"g%d\n" % slot):
            data = raw[:-2] + b"X\1\0\0\0x" + asking + raw[-2:]
            found = read(data)
            assert found == by_opcodes(data, monkeypatch) and found[0][-1][0] == "x"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_other_protocols(protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = pickled(many(), protocol)
    assert read(raw) == by_opcodes(raw, monkeypatch)


def test_values_that_are_counted_in_two_ways() -> None:
    data = b"\x80\x02N" + b"r" + (300).to_bytes(4, "little") + b"\x94."
    assert pickle.loads(data) is None
    assert read(data) == ("FormatError", "the pickle counts the values that it keeps in two ways")
