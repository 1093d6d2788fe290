"""A file of one rank is told by name and never taken for a whole: files that torch's own distributed writers made, and simulated others.

The two ranks run in processes of their own, started once for all tests.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptsurgeon as cs
from ckptsurgeon.errors import PartError
from ckptsurgeon.formats.folders.parts import TABLE, located

WRITER = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
os.chdir(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
whole = {"fc.weight": torch.arange(24.0).reshape(6, 4), "fc.bias": torch.arange(6.0)}
sharded = distribute_tensor(whole["fc.weight"], mesh, [Shard(0)])
state = {"fc.weight": sharded, "fc.bias": distribute_tensor(whole["fc.bias"], mesh, [Replicate()])}
torch.save(state, f"dtensor.{rank}.pt")
torch.save(state, f"dtensor.legacy.{rank}.pt", _use_new_zipfile_serialization=False)
torch.save({"model": {**state, "plain": torch.ones(2)}, "epoch": 1}, f"dtensor.mixed.{rank}.pt")
torch.save({"model": whole, "optimizer": {"state": {"fc.bias": {"exp_avg": state["fc.bias"]}}, "param_groups": []}}, f"whole.{rank}.pt")
spec = ChunkShardingSpec(dim=0, placements=[f"rank:{one}/cpu" for one in range(world)])
torch.save({"w": sharded_tensor.zeros(spec, 6, 4)}, f"sharded.{rank}.pt")
dcp.save({**state, "more": sharded.clone()}, checkpoint_id="dcp")
dcp.save({"only": distribute_tensor(torch.ones(2, 2), mesh, [Shard(0)])}, checkpoint_id="dcp_one")
dcp.save(state, storage_writer=HuggingFaceStorageWriter(path="hf_ranks", save_distributed=True))
if rank == 0:
    dcp.save(whole, storage_writer=HuggingFaceStorageWriter(path="hf_whole", save_distributed=False), no_dist=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks wrote."""
    place = tmp_path_factory.mktemp("ranks")
    (place / "writer.py").write_text(WRITER)
    started = [
        subprocess.Popen(
            [sys.executable, "writer.py", str(place)],
            cwd=place,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    return place


PARTS = {
    "dtensor.0.pt": "dtensor",
    "dtensor.1.pt": "dtensor",
    "dtensor.legacy.1.pt": "dtensor",
    "dtensor.mixed.0.pt": "dtensor",
    "sharded.1.pt": "sharded-tensor",
    "dcp/__0_0.distcp": "distcp",
    "dcp_one/__1_0.distcp": "distcp",
    "dcp/.metadata": "dcp-metadata",
    "hf_ranks/shard-00001-model-00001-of-00001.safetensors": "dcp-safetensors",
    "hf_ranks/shard-00002-model-00001-of-00001.safetensors": "dcp-safetensors",
}


def told(run: Callable[..., Any], path: str, kind: str) -> None:
    """Every command names the kind, and none takes the file for a whole or calls it damaged."""
    words = TABLE[kind].reason
    hint = located(TABLE[kind], path).hint
    save_file({"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(6)}, "target.safetensors")
    torch.save({"fc.weight": torch.zeros(3, 4)}, "source.pt")
    checked = run("check", path, "--json")
    found = [finding for file in checked.json["files"] for finding in file["findings"]]
    assert checked.code == 1 and "CK108" in {finding["code"] for finding in found}, checked.out
    assert {finding["code"] for finding in found} <= {"CK108", "CK201", "CK202"} and "damaged" not in checked.out
    assert os.path.isdir(path) or any(words in finding["message"] for finding in found)
    looked = run("inspect", path)
    assert words in looked.out + looked.err and looked.code in (0, 2)
    if looked.code == 0:
        assert run("inspect", path, "--json").json["part"] == {"kind": kind, "reason": words, "hint": hint}
    for command in (
        ("diff", path, "target.safetensors"),
        ("diff", "source.pt", path),
        ("match", path, "target.safetensors"),
        ("plan", path, "target.safetensors", "-o", "plan.json"),
        ("merge", path, "-o", "out.pt"),
        ("merge", path, "target.safetensors", "-o", "out.safetensors"),
        ("merge", "source.pt", path, "-o", "out.safetensors"),
        ("merge", "--average", path, "source.pt", "-o", "out.safetensors"),
        ("verify", path, "target.safetensors"),
        ("skeleton", path, "-o", "net.json"),
    ):
        ended = run(*command)
        assert ended.code == 2 and words in ended.err and hint in ended.err, (command, ended)
    assert not any(os.path.exists(name) for name in ("plan.json", "out.pt", "out.safetensors", "net.json"))
    with pytest.raises(PartError):
        cs.transfer(path, torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 3)}))
    with pytest.raises(PartError):
        cs.open(path)


@pytest.mark.parametrize("name", PARTS)
def test_what_torchs_ranks_wrote(run: Callable[..., Any], place: Path, written: Path, name: str) -> None:
    copy = shutil.copytree if (written / name).is_dir() else shutil.copy
    (place / name).parent.mkdir(exist_ok=True)
    copy(written / name, place / name)
    told(run, name, PARTS[name])


@pytest.mark.parametrize("name", ["dcp/__0_0.distcp", "hf_ranks/shard-00001-model-00001-of-00001.safetensors", "dtensor.0.pt"])
def test_the_content_tells_it_under_another_name(run: Callable[..., Any], place: Path, written: Path, name: str) -> None:
    shutil.copy(written / name, place / "net.bin")
    told(run, "net.bin", PARTS[name])


def test_what_torchs_ranks_wrote_whole_is_read(run: Callable[..., Any], place: Path, written: Path) -> None:
    """DTensors in an optimizer's state alone, and what HuggingFaceStorageWriter saves whole, with the same metadata."""
    whole = {"fc.weight": torch.arange(24.0).reshape(6, 4), "fc.bias": torch.arange(6.0)}
    shutil.copytree(written / "hf_whole", place / "hf_whole")
    assert run("check", "hf_whole").code == 0 and run("merge", "hf_whole", "-o", "out.safetensors").code == 0
    found = load_file("out.safetensors")
    assert all(torch.equal(found[key], whole[key]) for key in whole) and found.keys() == whole.keys()
    assert run("merge", written / "whole.1.pt", "-o", "out.pt").code == 0
    made = torch.load("out.pt", weights_only=True)
    assert all(torch.equal(made[key], whole[key]) for key in whole)


def test_a_folder_of_runs_is_gone_through(run: Callable[..., Any], place: Path, written: Path) -> None:
    for name in ("dcp", "hf_ranks", "hf_whole"):
        shutil.copytree(written / name, place / "runs" / name)
    torch.save({"w": torch.ones(1)}, place / "runs" / "dcp" / "beside.pt")
    ended = run("check", "runs", "--json")
    bad = {file["path"] for file in ended.json["files"] if not file["ok"]}
    assert not bad
    assert {file["path"] for file in ended.json["files"]} == {"runs/dcp", "runs/dcp/beside.pt", "runs/hf_ranks", "runs/hf_whole"}


def command_of(run: Callable[..., Any], path: str) -> str:
    """The command that a refusal ends in, as it is printed."""
    said = str(run("skeleton", path, "-o", "net.json").err)
    return said[said.rindex("python " if "python " in said else "ckptsurgeon ") :].strip()


def as_printed(command: str) -> None:
    """Run by a shell in which `python` is this one."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    subprocess.run(command, shell=True, check=True, capture_output=True, env={**os.environ, "PATH": path})


@pytest.mark.parametrize("folder", ["ranks", "run [1]'s/ranks"])
@pytest.mark.parametrize("file", ["dcp/.metadata", "dcp/__0_0.distcp", "hf_ranks/shard-00002-model-00001-of-00001.safetensors"])
def test_the_folder_is_given_by_the_command_that_is_printed(
    run: Callable[..., Any], place: Path, written: Path, folder: str, file: str
) -> None:
    source, name = os.path.split(file)
    shutil.copytree(written / source, place / folder)
    words = shlex.split(command_of(run, os.path.join(folder, name)))
    assert words == ["ckptsurgeon", "inspect", folder]
    ended = run(*words[1:])
    assert ended.code == 0 and "fc.{weight,bias}" in ended.out


ZERO_TO_FP32 = """
import argparse, glob, os
parser = argparse.ArgumentParser()
parser.add_argument("checkpoint_dir"); parser.add_argument("output_dir"); parser.add_argument("-t", "--tag")
args = parser.parse_args()
tag = args.tag or open(os.path.join(args.checkpoint_dir, "latest")).read().strip()
assert glob.glob(os.path.join(args.checkpoint_dir, tag, "*_optim_states.pt"))
os.makedirs(args.output_dir)
"""


@pytest.mark.parametrize(
    ("path", "script"),
    [
        ("run 1", "run 1/zero_to_fp32.py"),
        ("run 1/global_step5", "run 1/zero_to_fp32.py"),
        ("run 1/global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt", "run 1/zero_to_fp32.py"),
        ("run 1/global_step5", "deepspeed/utils/zero_to_fp32.py"),
    ],
)
def test_deepspeeds_script_finds_the_folder_of_the_command(run: Callable[..., Any], place: Path, path: str, script: str) -> None:
    """A script with the arguments of DeepSpeed's own, which lies above the tags' folders or is installed, and looks where that looks."""
    (place / "run 1/global_step5").mkdir(parents=True)
    (place / script).parent.mkdir(parents=True, exist_ok=True)
    (place / script).write_text(ZERO_TO_FP32)
    (place / "run 1/latest").write_text("global_step5")
    for rank in range(2):
        torch.save({"optimizer_state_dict": STAGE_2}, place / f"run 1/global_step5/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    as_printed(command_of(run, path))
    assert (place / "merged").is_dir()


@pytest.mark.parametrize("name", ["dcp/__0_0.distcp", "dcp/.metadata", "hf_ranks/shard-00001-model-00001-of-00001.safetensors"])
def test_no_folder_is_named_that_has_not_the_rest(run: Callable[..., Any], place: Path, written: Path, name: str) -> None:
    shutil.copy(written / name, place / "net.bin")
    said = run("skeleton", "net.bin", "-o", "net.json").err
    assert "give the folder with all ranks' files" in said and "ckptsurgeon inspect" not in said
    (place / "some").mkdir()
    shutil.copy(written / "dcp/__0_0.distcp", place / "some")
    assert "never finished" in run("inspect", "some").err


SHAPES = {"fc.weight": torch.Size((6, 4)), "fc.bias": torch.Size((6,))}
EMPTY = {name: torch.empty(0, dtype=torch.float16) for name in SHAPES}
FULL = {name: torch.ones(shape) for name, shape in SHAPES.items()}
STATES = {"ds_version": "0.18.2", "ds_config": {}, "param_shapes": [SHAPES], "buffer_names": [], "dp_world_size": 2, "mp_world_size": 1}
MOMENTS = {"state": {0: {"exp_avg": torch.zeros(15)}}, "param_groups": [{"params": [0]}]}
STAGE_2 = {"zero_stage": 2, "partition_count": 2, "single_partition_of_fp32_groups": [torch.zeros(15)], "base_optimizer_state": MOMENTS}
STAGE_3 = {"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": [torch.zeros(15)], "optimizer_state_dict": MOMENTS}


def megatron(**sizes: int) -> dict[str, Any]:
    args = argparse.Namespace(num_layers=2, **sizes)
    return {"args": args, "checkpoint_version": 3.0, "iteration": 5, "model": {"language_model": {"encoder": dict(FULL)}}}


SIMULATED: dict[str, tuple[str, str | None, Any]] = {  # a path, the kind (None: a whole), what torch.save writes
    "ZeRO 3, model": ("g/zero_pp_rank_0_mp_rank_00_model_states.pt", "zero-model", {**STATES, "module": EMPTY}),
    "ZeRO 3, another name": ("net.pt", "zero-model", {**STATES, "module": {**EMPTY, "buffer": torch.ones(3)}}),
    "ZeRO 3, optimizer": ("g/zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero-optimizer", {"optimizer_state_dict": STAGE_3}),
    "ZeRO 2, optimizer": ("g/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero-optimizer", {"optimizer_state_dict": STAGE_2}),
    "ZeRO 2, optimizer, another name": ("opt.pt", "zero-optimizer", {"optimizer_state_dict": STAGE_2, "ds_version": "0.18.2"}),
    "ZeRO 2, the whole model": ("g/mp_rank_00_model_states.pt", None, {**STATES, "module": FULL}),
    "DeepSpeed, tensor parallel": ("g/mp_rank_00_model_states.pt", "deepspeed-parallel", {**STATES, "mp_world_size": 2, "module": FULL}),
    "DeepSpeed, the name alone": ("g/zero_pp_rank_0_mp_rank_00_model_states.pt", "zero-model", {"module": FULL}),
    "DeepSpeed, a layer": ("g/layer_03-model_00-model_states.pt", "deepspeed-layer", FULL),
    "FSDP, the name alone": ("model_world_size_2_rank_0.pt", "rank", FULL),
    "FSDP, one rank is all": ("model_world_size_1_rank_0.pt", None, FULL),
    "Megatron": ("net.pt", "megatron", megatron(tensor_model_parallel_size=2, pipeline_model_parallel_size=1)),
    "Megatron, pipeline": ("net.pt", "megatron", megatron(tensor_model_parallel_size=1, pipeline_model_parallel_size=4)),
    "Megatron, virtual": (
        "net.pt",
        "megatron",
        {"args": argparse.Namespace(pipeline_model_parallel_size=2), "model0": FULL},
    ),
    "Megatron, one rank is all": ("r/mp_rank_00/model_optim_rng.pt", None, megatron(tensor_model_parallel_size=1)),
    "Megatron, the name alone": ("r/mp_rank_01/model_optim_rng.pt", "megatron", {"model": FULL, "iteration": 5}),
    "Megatron, the name of a stage": ("r/mp_rank_00_001/model_optim_rng.pt", "megatron", {"model": FULL, "iteration": 5}),
    "Megatron, the name of the only one": ("r/mp_rank_00/model_optim_rng.pt", None, {"model": FULL, "iteration": 5}),
    "args of someone else": ("net.pt", None, {"args": argparse.Namespace(lr=1, model_parallel_size="none"), "model": FULL}),
}


@pytest.mark.parametrize("case", SIMULATED)
def test_what_training_frameworks_write(run: Callable[..., Any], place: Path, case: str) -> None:
    path, kind, value = SIMULATED[case]
    (place / path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, place / path)
    if kind is not None:
        return told(run, path, kind)
    assert "CK108" not in run("check", path).out and run("merge", path, "-o", "out.pt").code == 0
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in torch.load("out.pt", weights_only=True).values())
    return None


def test_a_megatron_rank_beside_others(run: Callable[..., Any], place: Path) -> None:
    for rank in range(2):
        (place / f"r/mp_rank_0{rank}").mkdir(parents=True)
        torch.save({"model": FULL}, place / f"r/mp_rank_0{rank}/model_optim_rng.pt")
    told(run, "r/mp_rank_00/model_optim_rng.pt", "megatron")
    assert TABLE["megatron-folder"].reason in run("inspect", "r").err and run("check", "r").code == 1


@pytest.mark.parametrize("info", ["", "[]", "{}x", '{"w": 1}', '{"w": {"saved_offsets": 1}}', "[" * 100_000, '{"w": {}}'])
def test_sharding_info_that_says_nothing_is_no_whole(run: Callable[..., Any], place: Path, info: str) -> None:
    save_file({"w": torch.ones(2)}, "model-00001-of-00001.safetensors", {"DCP_SHARDING_INFO": info})
    told(run, "model-00001-of-00001.safetensors", "dcp-safetensors")


def test_an_index_of_ranks_files_is_no_whole(run: Callable[..., Any], place: Path) -> None:
    (place / "f").mkdir()
    info = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [2]}})}
    save_file({"w": torch.ones(2)}, "f/model-00001-of-00001.safetensors", info)
    (place / "f/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    told(run, "f", "dcp-safetensors")


def test_one_that_asks_for_code_is_unsafe_too(run: Callable[..., Any], place: Path, written: Path) -> None:
    ended = run("check", written / "dcp/.metadata", "--json")
    found = [finding for file in ended.json["files"] for finding in file["findings"]]
    assert found[0]["code"] == "CK108" and any("Metadata" in one["message"] for one in found if one["code"] == "CK201")
