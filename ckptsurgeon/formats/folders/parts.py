"""The kinds of files that are one rank's part of a checkpoint, and of folders of such files, in one table.

A file's kind is found from its content, and from its name where the content doesn't decide. These files are never read as a checkpoint,
since their tensors are pieces. The hint is a command that reads the whole checkpoint, where the folder is known; else a sentence.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ckptsurgeon.errors import PartError
from ckptsurgeon.formats.pickle.values import Inert, PickledDict, TensorRef
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.tensors import Part

_GATHER = (
    "gather it where it was trained, and save that: "
    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict"
)
_MEGATRON = "the folder with all ranks' files holds the whole; Megatron's own tools/checkpoint/convert.py reads it"
_DEEPSPEED = "the folder with all ranks' files holds the whole; DeepSpeed's own tools read it"
# The command that reads a whole folder, the names that show that a folder is one, the names of its files, and the hint without a folder.
_SAFETENSORS, _DISTCP = re.compile(r".+\.safetensors"), re.compile(r"\.metadata|.+\.distcp")
_INSPECT = "ckptsurgeon inspect {}"
_DCP = (_INSPECT, re.compile(r"\.metadata"), _DISTCP, "give the folder with all ranks' files and .metadata in it")
_HF = (_INSPECT, _SAFETENSORS, _SAFETENSORS, "give the folder with all ranks' files in it")
_ZERO = (
    "python -m deepspeed.utils.zero_to_fp32 {} merged",
    re.compile(r"latest|.+_optim_states\.pt"),
    re.compile(r".+_states\.pt"),
    "merge the folder with all ranks' files by DeepSpeed's own zero_to_fp32.py, which lies beside it",
)
_COMMANDS: Mapping[str, tuple[str, re.Pattern[str], re.Pattern[str], str]] = {
    **dict.fromkeys(("distcp", "dcp-metadata"), _DCP),
    "dcp-safetensors": _HF,
    **dict.fromkeys(("zero-model", "zero-optimizer", "zero-folder"), _ZERO),
}


TABLE: Mapping[str, Part] = {
    row.kind: row
    for row in (
        Part("dtensor", "is one rank's file: it holds DTensors, this rank's pieces of a sharded model's tensors", _GATHER),
        Part("sharded-tensor", "is one rank's file: it holds ShardedTensors, this rank's pieces of a sharded model's tensors", _GATHER),
        Part("rank", "is one rank's file, as its name says, with this rank's pieces of a sharded model's tensors", _GATHER),
        Part(
            "dcp-safetensors",
            "is one rank's file of torch.distributed.checkpoint (HuggingFaceStorageWriter): its tensors are pieces",
            _HF[-1],
        ),
        Part(
            "distcp",
            "is one rank's data file (.distcp) of torch.distributed.checkpoint: torch files of pieces, one after another",
            _DCP[-1],
        ),
        Part(
            "dcp-metadata",
            "is the .metadata of torch.distributed.checkpoint: where the pieces lie in the ranks' files, without their data",
            _DCP[-1],
        ),
        Part(
            "zero-model",
            "is one rank's model states of DeepSpeed ZeRO stage 3: its tensors are partitioned over all ranks",
            _ZERO[-1],
        ),
        Part(
            "zero-optimizer",
            "is one rank's optimizer states of DeepSpeed ZeRO: a partition of the weights and moments",
            _ZERO[-1],
        ),
        Part("zero-folder", "is a folder of DeepSpeed ZeRO: its tensors lie in pieces in the ranks' files", _ZERO[-1]),
        Part("deepspeed-parallel", "is one rank's model states of DeepSpeed with model parallelism: its tensors are pieces", _DEEPSPEED),
        Part("deepspeed-layer", "is one layer of a pipeline of DeepSpeed, not the model", _DEEPSPEED),
        Part("megatron", "is one rank's file of Megatron with model parallelism: its tensors are pieces, or some layers only", _MEGATRON),
        Part("megatron-folder", "is a folder of Megatron's ranks (mp_rank_…), whose files hold pieces of tensors", _MEGATRON),
    )
}
_PIECES = {"DTensor": "dtensor", "ShardedTensor": "sharded-tensor"}
METADATA_CLASS = "torch.distributed.checkpoint.metadata.Metadata"
_PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size", "model_parallel_size")
# File names that decide where the content may not. A rank's number other than 0 shows that there are several ranks.
_NAMES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?:[a-z0-9]+_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt"), "zero-optimizer"),
    (re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt"), "zero-model"),
    (re.compile(r"mp_rank_(?!0+_)\d+_model_states\.pt"), "deepspeed-parallel"),
    (re.compile(r"layer_\d+-model_\d+-model_states\.pt"), "deepspeed-layer"),
    (re.compile(r"(?:model|optim)_world_size_(?!1_)\d+_rank_\d+\.pt"), "rank"),
)
_WHOLE = re.compile(r"model(?:-\d+-of-\d+)?\.safetensors")
_MEGATRON_FOLDER = re.compile(r"mp_rank_\d\d+(?:_\d{3})*")


def of_safetensors(path: str, metadata: Mapping[str, Any]) -> Part | None:
    """The part that a safetensors file is, or None. All pieces begin at 0 in rank 0's file and in a whole saved by one rank: there the
    file's name decides."""
    if "DCP_SHARDING_INFO" not in metadata:
        return None
    try:
        info = json.loads(metadata["DCP_SHARDING_INFO"])
        first = all(not any(row["saved_offsets"]) for row in info.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        first = False
    return None if first and _WHOLE.fullmatch(os.path.basename(path)) else located(TABLE["dcp-safetensors"], path)


def sharded(values: Iterable[Any]) -> Part | None:
    """The part that a file is, by the first of its values that is a DTensor or a ShardedTensor; None without one."""
    for value in values:
        if type(value) is Inert and value.name.startswith("torch.distributed."):
            kind = _PIECES.get(value.name.rpartition(".")[2])
            if kind is not None:
                return TABLE[kind]
    return None


def of_pickle(path: str, value: Any) -> Part | None:
    """The part that a training framework's file is, by its top dict, then by its name; None for any other file."""
    part = _deepspeed(value) or _megatron(path, value) if type(value) is PickledDict else None
    if part is None:
        name = os.path.basename(path)
        part = next((kind for pattern, kind in _NAMES if pattern.fullmatch(name)), None)
    return None if part is None else located(TABLE[part], path)


def _deepspeed(value: PickledDict) -> str | None:
    optimizer = value.get("optimizer_state_dict")
    if type(optimizer) is PickledDict and "partition_count" in optimizer:
        return "zero-optimizer"
    shapes, module = value.get("param_shapes"), value.get("module")
    if shapes is None and "ds_version" not in value and "ds_config" not in value:
        return None
    if type(module) is PickledDict:
        for group in shapes if type(shapes) is list else [shapes]:
            for name, shape in group.items() if type(group) is PickledDict else ():
                tensor = module.get(name)
                if type(tensor) is TensorRef and tensor.shape != shape:
                    return "zero-model"
    world = value.get("mp_world_size")
    return "deepspeed-parallel" if type(world) is int and world > 1 else None


def _megatron(path: str, value: PickledDict) -> str | None:
    args = value.get("args")
    state = args.state if type(args) is Inert else args
    sizes = [state[name] for name in _PARALLEL if type(state.get(name)) is int] if isinstance(state, dict) else []
    if not any(name == "model" or re.fullmatch(r"model\d+", name) for name in value if type(name) is str):
        return None
    if sizes:
        return "megatron" if max(sizes) > 1 else None
    folder, above = os.path.split(os.path.dirname(os.path.abspath(path)))[::-1]
    if not _MEGATRON_FOLDER.fullmatch(folder):
        return None
    try:
        ranks = [name for name in os.listdir(above) if _MEGATRON_FOLDER.fullmatch(name)]
    except OSError:
        ranks = []
    return "megatron" if len(ranks) > 1 or set(folder) & set("123456789") else None


def joined(file: OpenFile) -> bool:
    """Whether a file that begins as a zip archive is several archives, one after another: the last begins where another ends."""
    end = file.size - 22
    if end < 22:
        return False
    last = file.read(end, 22)
    if last[:4] != b"PK\5\6" or last[20:] != b"\0\0":
        return False
    size, start = int.from_bytes(last[12:16], "little"), int.from_bytes(last[16:20], "little")
    if end >= 76 and file.read(end - 20, 4) == b"PK\6\7":  # torch writes the records of zip64 too
        end -= 76
        wide = file.read(end, 56)
        size, start = int.from_bytes(wide[40:48], "little"), int.from_bytes(wide[48:56], "little")
    begin = end - size - start
    return 22 <= begin < end and file.read(begin, 4) == b"PK\3\4" and file.read(begin - 22, 4) == b"PK\5\6"


def of_broken(file: OpenFile) -> Part | None:
    """The part that a file is which could not be read as a zip archive: a `.distcp`, or None."""
    if file.size < 4 or file.read(0, 4) != b"PK\3\4":
        return None
    return TABLE["distcp"] if file.path.endswith(".distcp") or joined(file) else None


def of_folder(names: Iterable[str]) -> Part | None:
    """The part that a folder of ranks' files is, by the names in it; None for any other folder."""
    files = list(names)
    if "zero_to_fp32.py" in files or any(pattern.fullmatch(name) for name in files for pattern, _ in _NAMES[:3]):
        return TABLE["zero-folder"]
    return TABLE["megatron-folder"] if any(map(_MEGATRON_FOLDER.fullmatch, files)) else None


def refused(part: Part, path: str) -> PartError:
    """The error for a part at `path` where a whole checkpoint is needed."""
    return PartError(part.reason, path=path, hint=located(part, path).hint)


def located(part: Part, path: str) -> Part:
    """The part with a hint for `path`: a command on its folder, where that holds what the command reads."""
    if part.kind not in _COMMANDS:
        return part
    command, needed, members, _ = _COMMANDS[part.kind]
    folder = path if os.path.isdir(path) else os.path.dirname(path) or os.curdir
    try:
        names = [name for name in os.listdir(folder) if needed.fullmatch(name)]
    except OSError:
        names = []
    if not names or not (folder == path or members.fullmatch(os.path.basename(path))):
        return part
    before, _, after = command.partition("{}")
    if needed is _ZERO[1]:
        scripts = (os.path.join(home, "zero_to_fp32.py") for home in (folder, os.path.join(folder, os.pardir)))
        before = next((f"python {word(script)} " for script in scripts if os.path.isfile(script)), before)
        after += "" if "latest" in names else " -t ."  # the folder of one tag
    return replace(part, hint=before + word(folder) + after)


def word(path: str) -> str:
    """A path as a shell and a command's options take it.

    >>> word("run 1"), word("-a.pt")
    ("'run 1'", './-a.pt')
    """
    return shlex.quote(os.path.join(os.curdir, path) if path.startswith("-") else path)
