"""Folders of torch.distributed.checkpoint against torch's own readers of them.

Those in `formats/data/dcp` were saved by 2 and 4 real ranks (`make.py` there); random state_dicts are saved here by one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from profiles import examples
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ckptsurgeon as cs
from ckptsurgeon import formats
from ckptsurgeon.errors import CheckpointError, FormatError, UnreadableError
from ckptsurgeon.formats.archive_tree import tensors_of
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.values import tensor_from
from ckptsurgeon.tensors import Checkpoint, Refused, TensorMeta

DATA = Path(__file__).parent.parent / "formats/data/dcp"
FOLDERS = ("fsdp2", "fsdp4", "tp2")


@pytest.fixture
def folder(place: Path) -> Callable[[str], str]:
    """Gives a copy of one of the kept folders, by its name."""

    def copied(name: str) -> str:
        shutil.copytree(DATA / name, place / name)
        return name

    return copied


def by_torch(path: Any) -> Any:
    """All that torch's own tool makes of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(path, "by_torch.pt")
    return torch.load("by_torch.pt", weights_only=False)


def tensors(path: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by its dotted place, as our reader gives it."""
    tree = formats.tree_of(cs.inspect(path))
    with Reader([Checkpoint(str(path), "dcp", "", {}, files=tree.files)]) as reader:
        return {place: tensor_from(reader.read(meta), meta.dtype).view(meta.shape) for place, meta in tensors_of(tree.value)}


def flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts and lists by dotted place."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        yield place, value
        return
    for key, child in items:
        yield from flat(child, f"{place}.{key}" if place else str(key))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_what_ranks_saved_is_what_torch_reads(folder: Callable[[str], str], name: str) -> None:
    path = folder(name)
    theirs = dict(flat(by_torch(path)))
    ours = tensors(path)
    assert ours.keys() == {place for place, value in theirs.items() if isinstance(value, torch.Tensor)} and len(ours) > 8
    assert all(same(ours[place], theirs[place]) for place in ours)
    told = dict(flat(formats.tree_of(cs.inspect(path)).value))
    assert {place: value for place, value in told.items() if not isinstance(value, TensorMeta)} == {
        place: value for place, value in theirs.items() if not isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("name", FOLDERS)
def test_the_model_is_merged_into_a_file(run: Callable[..., Any], folder: Callable[[str], str], name: str) -> None:
    path = folder(name)
    ended = run("merge", path, "-o", "out.safetensors")
    assert ended.code == 0 and "root model" in ended.out and "proven" in ended.out
    run("merge", path, "-o", "out.pt", "--root", "optim")
    theirs = by_torch(path)
    ours = {**torch.load("out.pt", weights_only=True)}
    assert all(same(ours[f"state.{place}"], value) for place, value in flat(theirs["optim"]["state"]))
    from safetensors.torch import load_file

    weights = load_file("out.safetensors")
    assert weights.keys() == theirs["model"].keys() and all(same(weights[key], theirs["model"][key]) for key in weights)


def test_inspect_shows_the_root_and_the_optimizers_part(run: Callable[..., Any], folder: Callable[[str], str]) -> None:
    path = folder("fsdp2")
    said = run("inspect", path)
    assert said.code == 0 and "fsdp2: dcp" in said.out and "root model: 5 tensors" in said.out and "root optim: 12 tensors" in said.out
    told = run("inspect", path, "--json").json
    assert [root["root"] for root in told["roots"]] == ["model", "optim"] and told["globals"] == [] and told["format"] == "dcp"
    assert {"state.emb.weight.exp_avg", "state.emb.weight.step"} <= cs.open(path, root="optim").keys()


def test_it_is_read_without_torch(folder: Callable[[str], str]) -> None:
    code = (
        "import sys, ckptsurgeon as cs; cs.inspect('fsdp4'); cs.diff('fsdp4', 'fsdp4'); cs.merge('fsdp4', None, 'o.safetensors');"
        "assert 'torch' not in sys.modules and 'pickle' not in sys.modules"
    )
    folder("fsdp4")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ranks_that_saved_each_by_itself(folder: Callable[[str], str]) -> None:
    """Without collectives each rank has a `__N.metadata`; what all have is taken once, where it is the same."""
    path = folder("ranks2")
    found = tensors(path)
    whole = torch.arange(24.0).reshape(6, 4)
    assert same(found["rows"], whole) and same(found["columns"], whole + 100)
    assert same(found["all"], torch.arange(6).to(torch.float8_e4m3fn))
    os.remove("ranks2/__1.metadata")
    with pytest.raises(FormatError, match="rows 3 to 5 lie in no piece"):
        cs.inspect(path)


def test_a_value_that_ranks_did_not_save_alike_is_refused(place: Path) -> None:
    for rank in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"w": torch.arange(3.0), "b": torch.full((2,), float(rank)), "rng": rank}, checkpoint_id=f"rank{rank}")
        os.makedirs("both", exist_ok=True)
        raw = Path(f"rank{rank}/.metadata").read_bytes().replace(b"__0_0.distcp", b"__%d_0.distcp" % rank)
        Path(f"both/__{rank}.metadata").write_bytes(raw)
        shutil.copy(f"rank{rank}/__0_0.distcp", f"both/__{rank}_0.distcp")
    found = cs.inspect("both").state_dicts[0]
    assert list(found.tensors) == ["w"]
    assert isinstance(found.entries["b"], Refused) and "with different contents" in found.entries["b"].reason


def test_a_save_that_never_finished(run: Callable[..., Any], folder: Callable[[str], str]) -> None:
    path = folder("fsdp2")
    os.rename("fsdp2/.metadata", "fsdp2/.metadata.tmp")
    for command in (("inspect", path), ("merge", path, "-o", "o.pt"), ("diff", path, path)):
        ended = run(*command)
        assert ended.code == 2 and "never finished" in ended.err and ".metadata.tmp is there" in ended.err
    os.remove("fsdp2/.metadata.tmp")
    with pytest.raises(UnreadableError, match="never finished"):
        cs.open(path)


def test_a_missing_file_and_a_short_one_are_named_with_their_rows(run: Callable[..., Any], folder: Callable[[str], str]) -> None:
    path = folder("fsdp4")
    os.truncate("fsdp4/__1_0.distcp", 9000)
    ended = run("inspect", path)
    assert ended.code == 2 and "__1_0.distcp" in ended.err and "which has 9,000 bytes" in ended.err and "rows " in ended.err
    os.remove("fsdp4/__1_0.distcp")
    ended = run("inspect", path)
    assert ended.code == 2 and "rows 1 to 1 lie in fsdp4/__1_0.distcp, which is not there" in ended.err
    assert run("check", path).code == 1
    (place := Path("fsdp4/.metadata")).write_bytes(place.read_bytes()[:-5])
    assert "ends too early" in run("inspect", path).err


def test_a_large_metadata_is_refused_with_the_limit_that_lets_it_in(run: Callable[..., Any], folder: Callable[[str], str]) -> None:
    path = folder("fsdp2")
    with cs.limits(dcp_metadata_bytes=100), pytest.raises(CheckpointError, match=r"\.metadata") as refused:
        cs.inspect(path)
    assert "dcp-metadata-bytes=" in (refused.value.hint or "")
    assert run("inspect", path, "--limit", "dcp-metadata-bytes=100").code == 2 and run("inspect", path).code == 0


def test_what_metadata_does_not_name_is_told(folder: Callable[[str], str]) -> None:
    path = folder("fsdp2")
    shutil.copy("fsdp2/__1_0.distcp", "fsdp2/__2_0.distcp")
    with open("fsdp2/__0_0.distcp", "ab") as file:
        file.write(b"more")
    notes = " ".join(cs.inspect(path).notes)
    assert "__0_0.distcp has 4 bytes that .metadata does not name" in notes and "does not name __2_0.distcp" in notes


def test_full_holds_every_chunk_against_its_checksum(run: Callable[..., Any], folder: Callable[[str], str]) -> None:
    path = folder("fsdp2")
    assert run("check", path, "--full").code == 0
    every = dict(tensors_of(formats.tree_of(cs.inspect(path)).value))
    for key in ("model.emb.weight", "optim.state.up.weight.exp_avg", "lst.1"):
        span = every[key].spans[-1]
        with open(span.file, "r+b") as file:
            file.seek(span.offset)
            old = file.read(1)
            file.seek(span.offset)
            file.write(bytes([old[0] ^ 1]))
        ended = run("check", path, "--full")
        assert ended.code == 1 and "CK106" in ended.out and os.path.basename(span.file) in ended.out, key
        assert run("check", path).code == 0
        with open(span.file, "r+b") as file:
            file.seek(span.offset)
            file.write(old)
    assert run("check", path, "--full").code == 0


def test_a_damaged_chunk_is_not_merged(run: Callable[..., Any], folder: Callable[[str], str]) -> None:
    path = folder("tp2")
    span = cs.open(path)["up.weight"].spans[1]
    with open(span.file, "r+b") as file:
        file.seek(span.offset)
        file.write(b"\xff")
    ended = run("merge", path, "-o", "o.safetensors")
    assert ended.code == 2 and "up.weight" in ended.err and "__1_0.distcp" in ended.err and not os.path.exists("o.safetensors")
    assert run("verify", path, DATA / "fsdp2").code == 1


def test_it_is_verified_by_torchs_reading_of_every_blob(run: Callable[..., Any], folder: Callable[[str], str], place: Path) -> None:
    path = folder("tp2")
    (place / "net.py").write_text(
        "from torch import nn, tensor\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.emb, self.up, self.down = nn.Embedding(3, 6), nn.Linear(6, 6), nn.Linear(6, 4, bias=False)\n"
        "        self.register_buffer('seen', tensor(0))\n"
    )
    ended = run("verify", path, "net:Net", "--json")
    assert ended.code == 0 and ended.json["tensors"] == 5 and ended.json["findings"] == []
    assert run("merge", path, "net:Net", "-o", "o.safetensors").code == 0


def test_torchs_safetensors_of_ranks(run: Callable[..., Any], folder: Callable[[str], str]) -> None:
    """HuggingFaceStorageWriter's files: one folder, whose pieces make whole tensors."""
    path = folder("hf2")
    assert run("inspect", path, "--json").json["format"] == "dcp-safetensors" and "files of 2 ranks" in run("inspect", path).out
    assert run("merge", path, "-o", "o.safetensors").code == 0 and run("check", path).code == 0
    from safetensors.torch import load_file

    found, whole = load_file("o.safetensors"), torch.arange(24.0).reshape(6, 4)
    assert same(found["rows"], whole) and same(found["all"], torch.arange(6).to(torch.float8_e4m3fn)) and len(found) == 2
    os.rename("hf2/shard-00001-model-00001-of-00001.safetensors", "first")
    with pytest.raises(FormatError, match="rows 0 to 2 lie in no piece") as refused:
        cs.open(path)
    assert refused.value.key == "rows"
    shutil.copy("hf2/shard-00002-model-00001-of-00001.safetensors", "hf2/shard-00003-model-00001-of-00001.safetensors")
    os.rename("first", "hf2/shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(FormatError, match="rows 3 to 5 lie in 2 pieces, in hf2/shard-00002"):
        cs.open(path)


def test_a_folder_of_two_checkpoints_is_refused(run: Callable[..., Any], folder: Callable[[str], str]) -> None:
    path = folder("fsdp2")
    run("merge", path, "-o", "fsdp2/model.safetensors")
    ended = run("inspect", path)
    assert ended.code == 2 and "holds two checkpoints" in ended.err and run("inspect", "fsdp2/model.safetensors").code == 0


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16]


@st.composite
def some_tensor(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    count = 1
    for size in shape:
        count *= size
    raw = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=count * 16, max_size=count * 16)), dtype=torch.uint8)
    made = raw[: count * dtype.itemsize].view(dtype).reshape(shape)
    return made.permute(draw(st.permutations(range(len(shape))))) if shape else made


LEAVES = st.one_of(some_tensor(), st.integers(-(2**70), 2**70), st.text(max_size=3), st.none(), st.floats(allow_nan=False), st.booleans())
KEYS = st.text("ab_0", min_size=1, max_size=2)
NESTED = st.dictionaries(KEYS, st.recursive(LEAVES, lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3)))


@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=NESTED)
def test_any_state_dict_is_read_as_torch_reads_it(place: Path, state: dict[str, Any]) -> None:
    shutil.rmtree("any", ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id="any")
    try:
        theirs = dict(flat(by_torch("any")))
    except CheckpointException:  # torch's tool flattens some once more, and then finds nothing under the new names
        reject()
    kept = {key: value for key, value in theirs.items() if isinstance(value, torch.Tensor)}
    try:
        ours = tensors("any")
    except CheckpointError as error:
        assert "no tensors under names" in error.reason
        return
    assert ours.keys() == kept.keys() and all(same(ours[key], kept[key]) for key in kept)
