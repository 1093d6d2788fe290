"""A checkpoint in an `io.BytesIO` is the checkpoint in a file: the same names, values, refusals and training state."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from profiles import examples
from safetensors.torch import save
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import ArgumentError, CheckpointError, FormatError, PlanError
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.storage.memory import file_in_memory
from ckptsurgeon.storage.opening import open_regular

FORMATS = ["zip", "legacy", "deflated", "safetensors"]


def saved(value: object, form: str) -> bytes:
    if form == "safetensors":
        return save({key: tensor.contiguous().clone() for key, tensor in value.items()})  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=form != "legacy")
    if form != "deflated":
        return buffer.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return packed.getvalue()


class Net(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.body = nn.Linear(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, rows)


@pytest.mark.parametrize("form", FORMATS)
@given(
    seed=st.integers(0, 99),
    rows=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    turned=st.booleans(),
)
@settings(deadline=None, max_examples=examples(15), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_transferred_is_what_the_file_gives(
    form: str, seed: int, rows: int, dtype: torch.dtype, turned: bool, tmp_path: Path
) -> None:
    torch.manual_seed(seed)
    source = Net(4).to(dtype).state_dict()
    if turned:
        source["body.weight"] = torch.randn(7, 5, dtype=dtype).t()  # torch keeps the stride, and so does the file
    data = saved(source, form)
    (tmp_path / "it").write_bytes(data)
    loaded = {key: value for key, value in source.items() if value.shape == Net(rows).state_dict()[key].shape}
    models, reports = [], []
    for given_source in (tmp_path / "it", io.BytesIO(data)):
        torch.manual_seed(1)
        models.append(Net(rows))
        reports.append(cs.transfer(given_source, models[-1]))
    oracle = Net(rows)
    oracle.load_state_dict({**models[0].state_dict(), **loaded})
    for model in models:
        assert all(torch.equal(value, oracle.state_dict()[key]) for key, value in model.state_dict().items())
    assert reports[0].fresh == reports[1].fresh and reports[0].coverage == reports[1].coverage


@pytest.mark.parametrize("form", FORMATS)
def test_looking_sees_the_same(form: str, tmp_path: Path) -> None:
    data = saved(Net(4).state_dict(), form)
    (tmp_path / "it").write_bytes(data)
    here, there = cs.open(tmp_path / "it"), cs.open(io.BytesIO(data))
    assert {key: (one.dtype, one.shape, one.stride) for key, one in here.items()} == {
        key: (one.dtype, one.shape, one.stride) for key, one in there.items()
    }
    assert here.fingerprint == there.fingerprint == cs.inspect(io.BytesIO(data)).fingerprint
    assert cs.diff(io.BytesIO(data), Net(2)).coverage == cs.diff(str(tmp_path / "it"), Net(2)).coverage
    assert there.path.startswith("<BytesIO ") and cs.open(io.BytesIO(data)).path != there.path


def test_where_the_buffer_stands_and_what_becomes_of_it_does_not_matter() -> None:
    source = Net(4)
    buffer = io.BytesIO(saved(source.state_dict(), "zip"))
    buffer.seek(100)
    checkpoint = cs.open(buffer)
    assert buffer.tell() == 100
    buffer.seek(0)
    buffer.write(b"x" * 10_000)
    buffer.close()
    model = Net(4)
    cs.transfer(checkpoint, model)
    assert torch.equal(model.body.weight, source.body.weight)


def test_a_training_checkpoint_gives_its_optimizers_state(tmp_path: Path) -> None:
    def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Net(4)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        model.head(model.norm(model.body(torch.randn(3, 7)))).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = trained()
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    apart = io.BytesIO(saved(optimizer.state_dict(), "zip"))
    for source, beside in ((whole, None), (model.state_dict(), apart)):
        fresh = Net(4)
        adam = torch.optim.Adam(fresh.parameters(), lr=0.1)
        cs.transfer(io.BytesIO(saved(source, "legacy")), fresh, optimizer=adam, optimizer_from=beside)
        for one, other in zip(fresh.parameters(), model.parameters(), strict=True):
            assert torch.equal(adam.state[one]["exp_avg"], optimizer.state[other]["exp_avg"])


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 100, saved(Net(2).state_dict(), "zip")[:-5], saved(Net(2).state_dict(), "safetensors")[:-5], b"<html>", b"\x80\x02"],
)
def test_what_is_no_checkpoint_is_refused_in_the_same_words(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(data)
    with pytest.raises(CheckpointError) as from_file:
        cs.open(tmp_path / "it")
    with pytest.raises(CheckpointError) as from_memory:
        cs.open(io.BytesIO(data))
    assert type(from_file.value) is type(from_memory.value) and from_file.value.reason == from_memory.value.reason
    assert str(from_memory.value.path).startswith("<BytesIO ")


def test_damaged_data_is_told_without_a_command_that_has_no_path() -> None:
    data = bytearray(saved({"weight": torch.ones(3, 3), "bias": torch.ones(3)}, "zip"))
    place = data.index(torch.ones(9).numpy().tobytes())
    data[place] ^= 1
    with pytest.raises(FormatError, match="not what its own checksum says") as found:
        cs.transfer(io.BytesIO(bytes(data)), nn.Linear(3, 3), checksums=True)
    assert found.value.hint == "copy or download it again" and found.value.problems


def test_an_index_has_its_shards_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.safetensors").write_bytes(save({"weight": torch.ones(1)}))
    with pytest.raises(FormatError, match="shards are files beside it"):
        cs.open(io.BytesIO(json.dumps({"weight_map": {"weight": "one.safetensors"}}).encode()))


def test_a_merge_is_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO(saved(Net(2).state_dict(), "zip"))
    with pytest.raises(ArgumentError, match="write it to a file"):
        cs.merge(buffer, Net(2), "out.pt")
    with pytest.raises(PlanError, match="lies in memory, and a plan names its sources by path"):
        cs.merge(cs.open(buffer), Net(2), "out.pt")
    assert list(tmp_path.iterdir()) == []


@given(data=st.binary(max_size=200), offset=st.integers(0, 220), nbytes=st.integers(0, 220))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_kind_of_file_gives_the_same_bytes(data: bytes, offset: int, nbytes: int, tmp_path: Path) -> None:
    def told(file: OpenFile) -> tuple[object, ...]:
        view = bytearray(nbytes)
        try:
            exact: object = file.read(offset, nbytes)
        except CheckpointError as error:
            exact = error.reason
        return file.size, exact, file.fill(view, offset), bytes(view), file.read_some(nbytes, offset), file.check_unchanged()

    (tmp_path / "it").write_bytes(data)
    with open_regular(str(tmp_path / "it")) as local, open_regular(file_in_memory(io.BytesIO(data))) as memory:
        assert told(local) == told(memory)
