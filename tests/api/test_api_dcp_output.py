"""Folders of torch.distributed.checkpoint as an output: `dcp.load` reads what was planned, the same bytes each time, in flat memory."""

from __future__ import annotations

import os
import pickletools
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import api_support as support
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from profiles import examples
from torch.distributed import checkpoint as dcp

import ckptsurgeon as cs
from ckptsurgeon.errors import OutputError, PlanError, SettingsError, VerificationError

NAMES = [".metadata", "__0_0.distcp", "ckptsurgeon.json"]


def loaded(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    """What torch loads of a folder."""
    state = {key: torch.zeros_like(value) if isinstance(value, torch.Tensor) else value for key, value in like.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder)
    return state


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES), st.sampled_from(["plain", "turned", "tied", "view"])),
    min_size=1,
    max_size=6,
)


@given(rows=ROWS)
@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_torch_loads_every_tensor_whatever_it_was(rows: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("dcp")
    state: dict[str, torch.Tensor] = {}
    for number, (shape, dtype, kind) in enumerate(rows):
        value = (torch.rand(shape) * 5).to(dtype)
        if kind == "turned" and len(shape) > 1:
            value = value.transpose(0, 1)
        if kind == "view" and shape and shape[0] > 1:
            value = value[1:]
        state[f"layer.{number}"] = next(iter(state.values())) if kind == "tied" and state else value
    torch.save(state, folder / "in.pt")
    report = cs.merge(folder / "in.pt", None, folder / "out", format="dcp")
    support.same(loaded(folder / "out", state), state)
    assert sorted(os.listdir(folder / "out")) == NAMES and report.proven
    assert dict(report.files) == {name: (folder / "out" / name).stat().st_size for name in NAMES}
    cs.merge(folder / "out", None, folder / "back.pt")
    support.same(torch.load(folder / "back.pt", weights_only=True), state)


@pytest.mark.parametrize("options", [{}, {"dtype": "BF16"}, {"adapt": {"a.*": "transpose"}}], ids=str)
def test_the_same_bytes_each_time_and_nothing_of_this_machine(options: dict[str, Any], tmp_path: Path) -> None:
    torch.save({f"{name}.w": torch.rand(30, 40) for name in "abc"}, tmp_path / "in.pt")
    for name in ("one", "another place"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no remark of torch's on processes
            cs.merge(tmp_path / "in.pt", None, tmp_path / name, format="dcp", **options)
    one, two = ({file: (tmp_path / name / file).read_bytes() for file in NAMES} for name in ("one", "another place"))
    assert one == two
    texts = [str(argument) for _, argument, _ in pickletools.genops(one[".metadata"]) if isinstance(argument, str)]
    assert not any(str(tmp_path) in text or len(text) == 36 for text in texts) and "a.w" in texts


def test_renames_cuts_joins_and_new_values_as_torch_has_them(tmp_path: Path) -> None:
    state = {"q.w": torch.rand(4, 4), "k.w": torch.rand(4, 4), "out.w": torch.rand(8, 4), "steps": torch.tensor(3)}
    torch.save(state, tmp_path / "in.pt")
    target = {"qk.w": torch.zeros(8, 4), "o.w": torch.zeros(8, 4), "head.w": torch.zeros(2, 4), "steps": torch.tensor(0)}
    report = cs.merge(
        tmp_path / "in.pt",
        target,
        tmp_path / "out",
        format="dcp",
        adapt={"q.w + k.w -> qk.w": "concat"},
        rename={"out.w": "o.w"},
        init={"head.w": "ones"},
    )
    found = loaded(tmp_path / "out", target)
    support.same(
        found,
        {"qk.w": torch.cat([state["q.w"], state["k.w"]]), "o.w": state["out.w"], "head.w": torch.ones(2, 4), "steps": state["steps"]},
    )
    assert report.fresh == ("head.w",) == tuple((cs.open(tmp_path / "out").provenance or {})["fresh"])


def test_what_is_fresh_is_recorded_beside_what_torch_reads(tmp_path: Path) -> None:
    torch.save({"a.w": torch.ones(3)}, tmp_path / "in.pt")
    for options in ({}, {"provenance": False}):
        cs.merge(tmp_path / "in.pt", {"a.w": torch.zeros(3), "b.w": torch.zeros(2)}, tmp_path / "out", format="dcp", overwrite=True,
                 init={"b.w": "ones"}, **options)  # type: ignore[arg-type]  # fmt: skip
        support.same(loaded(tmp_path / "out", {"a.w": torch.zeros(3), "b.w": torch.zeros(2)}), {"a.w": torch.ones(3), "b.w": torch.ones(2)})
        found = cs.open(tmp_path / "out").provenance
        assert (found is None) if options else (found is not None and found["fresh"] == ["b.w"])
    cs.merge(tmp_path / "in.pt", None, tmp_path / "out", format="dcp", overwrite=True)
    (tmp_path / "out" / "ckptsurgeon.json").write_text("{")
    assert cs.open(tmp_path / "out").provenance is None and len(cs.open(tmp_path / "out")) == 1


def test_values_that_are_no_tensors_go_too(tmp_path: Path) -> None:
    state = {"a.w": torch.ones(3), "a._extra_state": {"scale": 2, "rows": [1, 2]}}
    torch.save(state, tmp_path / "in.pt")
    cs.merge(tmp_path / "in.pt", None, tmp_path / "out", format="dcp")
    assert loaded(tmp_path / "out", {"a.w": torch.zeros(3), "a._extra_state": {"scale": 0, "rows": [0, 0]}})["a._extra_state"] == {
        "scale": 2,
        "rows": [1, 2],
    }
    assert cs.open(tmp_path / "out").entries == {"a._extra_state": {"scale": 2, "rows": [1, 2]}}


def test_with_a_model_as_the_target_it_is_loaded_strictly(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(support.NETS)
    spec = f"{tmp_path / 'nets.py'}:Net"
    space: dict[str, Any] = {}
    exec(support.NETS, space)
    model = space["Net"]()
    torch.save({"module." + key: value for key, value in model.state_dict().items()}, tmp_path / "in.pt")
    report = cs.merge(tmp_path / "in.pt", spec, tmp_path / "out", format="dcp")
    assert report.verification is not None and report.verification.ok and report.verification.bitwise
    assert [row.key for row in report.findings if row.code == "tied-copy"] == ["out.weight"]
    assert cs.verify(tmp_path / "out", spec).ok
    cs.transfer(tmp_path / "out", fresh := space["Net"]())
    support.same(fresh.state_dict(), model.state_dict())


def test_two_values_for_one_tensor_of_the_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(support.NETS)
    space: dict[str, Any] = {}
    exec(support.NETS, space)
    state = {key: value.clone() for key, value in space["Net"]().state_dict().items()}
    state["out.weight"] += 1
    torch.save(state, tmp_path / "in.pt")
    with pytest.raises(PlanError, match="would get different values"):
        cs.merge(tmp_path / "in.pt", f"{tmp_path / 'nets.py'}:Net", tmp_path / "out", format="dcp")
    assert not (tmp_path / "out").exists()


def test_a_byte_that_is_damaged_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptsurgeon.models.sharded import save as saving

    real = saving.dcp.save

    def wrong(state: Any, storage_writer: Any) -> Any:
        done = real(state, storage_writer=storage_writer)
        path = Path(storage_writer.path) / "__0_0.distcp"
        raw = path.read_bytes()
        path.write_bytes(raw.replace(torch.full((30,), 2.0).numpy().tobytes(), torch.full((30,), 3.0).numpy().tobytes()))
        return done

    torch.save({"a": torch.full((30,), 1.0), "b": torch.full((30,), 2.0)}, tmp_path / "in.pt")
    monkeypatch.setattr(saving.dcp, "save", wrong)
    with pytest.raises(VerificationError) as caught:
        cs.merge(tmp_path / "in.pt", None, tmp_path / "out", format="dcp")
    assert caught.value.problems == ("b: its bytes differ",) and os.listdir(tmp_path) == ["in.pt"]


def test_what_a_folder_of_torchs_does_not_take(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "in.pt")
    for options, words in (
        ({"max_shard_size": "5GB"}, "Hugging Face's shards"),
        ({"resume": True}, "torch writes a DCP folder at once"),
        ({"tied": "alias"}, "safetensors gets tied keys"),
    ):
        with pytest.raises(SettingsError, match=words):
            cs.merge(tmp_path / "in.pt", None, tmp_path / "out", format="dcp", **options)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="names a file"):
        cs.merge(tmp_path / "in.pt", None, tmp_path / "out.pt", format="dcp")
    assert os.listdir(tmp_path) == ["in.pt"]


def test_a_rank_of_a_group_does_not_write_alone(tmp_path: Path) -> None:
    code = (
        "import sys, torch, ckptsurgeon as cs\n"
        "torch.distributed.init_process_group('gloo', init_method=f'file://{sys.argv[1]}/rendezvous', rank=0, world_size=1)\n"
        "try:\n    cs.merge(f'{sys.argv[1]}/in.pt', None, f'{sys.argv[1]}/out', format='dcp')\n"
        "except cs.CheckpointError as error:\n    print(error.reason)\n"
    )
    torch.save({"a": torch.ones(3)}, tmp_path / "in.pt")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert "this one is a rank of a process group" in done.stdout and not (tmp_path / "out").exists(), done


def test_a_disk_that_is_full_and_an_interrupt_leave_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(30_000), "b": torch.zeros(30_000)}, tmp_path / "in.pt")
    cs.merge(tmp_path / "in.pt", None, tmp_path / "out", format="dcp")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in NAMES}
    from ckptsurgeon.models.sharded import save as saving

    real = saving.torch.serialization.save

    def refused(*arguments: Any, **options: Any) -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 - as torch's writer ends then

    def interrupted(*arguments: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        real(*arguments, **options)

    for fails, error, words in ((refused, OutputError, "the disk is full"), (interrupted, KeyboardInterrupt, None)):
        with monkeypatch.context() as patch:
            patch.setattr("torch.distributed.checkpoint.filesystem.torch.save", fails)
            with pytest.raises(error, match=words):
                cs.merge(tmp_path / "in.pt", None, tmp_path / "out", format="dcp", overwrite=True, dtype="BF16")
        assert sorted(os.listdir(tmp_path)) == ["in.pt", "out"]
        assert {name: (tmp_path / "out" / name).read_bytes() for name in NAMES} == before


FLAT = """
import sys, torch
import ckptsurgeon as cs

def anonymous():
    rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(rows["RssAnon"].split()[0]) // 1024

from ckptsurgeon.models.sharded import save as saving
cs.merge(sys.argv[1] + "/small.pt", None, sys.argv[1] + "/first", format="dcp", **eval(sys.argv[2]))
before, seen, real = anonymous(), [], torch.save
def watched(*arguments, **options):
    seen.append(anonymous())
    return real(*arguments, **options)
torch.save = watched
cs.merge(sys.argv[1] + "/in.pt", None, sys.argv[1] + "/out", format="dcp", **eval(sys.argv[2]))
print(max(seen) - before, len(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is told by /proc")
@pytest.mark.parametrize("options", [{}, {"dtype": "BF16"}], ids=str)
def test_anonymous_memory_is_flat(options: dict[str, str], tmp_path: Path) -> None:
    torch.save({f"t{number}": torch.rand(1000, 1000) for number in range(40)}, tmp_path / "in.pt")
    torch.save({"t": torch.rand(1000, 1000)}, tmp_path / "small.pt")
    done = subprocess.run([sys.executable, "-c", FLAT, str(tmp_path), repr(options)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done
    most, count = map(int, done.stdout.split())
    assert most < 30 and count == 40, done  # of 160 MB
