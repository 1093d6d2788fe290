"""Reads a checkpoint's files by torch's, safetensors' and NumPy's own readers, file by file, always `weights_only` and on the CPU.

Our reader is compared with these, so none of our own code reads here, with one exception: torch would unpickle the `.metadata` of a
distributed checkpoint without restrictions. So our reader finds where the ranks' tensors are, and torch reads each of them. If these
readers refuse a file, their own words are reported.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch

from ckptsurgeon.errors import TargetError
from ckptsurgeon.formats.folders.dcp import contents_of
from ckptsurgeon.formats.folders.dcp_metadata import Blob, TensorRow
from ckptsurgeon.formats.folders.nesting import nested
from ckptsurgeon.formats.registry import named
from ckptsurgeon.models.target import user_code
from ckptsurgeon.tensors import Checkpoint

Reader = Callable[[str, str], Any]  # takes a file's path and the root to read


def _torch(path: str, _root: str) -> Any:
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _safetensors(path: str, _root: str) -> Any:
    return safetensors.torch.load_file(path, device="cpu")


def _numpy(path: str, _root: str) -> Any:
    import numpy

    with numpy.load(path, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def _dcp(path: str, root: str) -> Any:
    contents = contents_of(path, os.listdir(path))

    def load(blob: Blob | None) -> Any:
        assert blob is not None
        with open(os.path.join(path, blob.file), "rb") as file:
            file.seek(blob.offset)
            return torch.load(io.BytesIO(file.read(blob.length)), map_location="cpu", weights_only=True)

    def whole(row: TensorRow) -> torch.Tensor:
        tensor = torch.empty(row.shape, dtype=getattr(torch, row.dtype.torch))
        for chunk in row.chunks:
            if all(chunk.sizes):
                tensor[tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))] = load(chunk.blob)
        return tensor

    keys = [key for key in contents.order if not root or key.startswith(f"{root}.")]
    leaves = {key: whole(contents.tensors[key]) if key in contents.tensors else load(contents.values[key]) for key in keys}
    return nested(leaves, contents.paths)


def _dcp_safetensors(path: str, _root: str) -> Any:
    shape: dict[str, list[int]] = {}
    pieces: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for name in filter(named("dcp-safetensors").member, os.listdir(path)):
        with safetensors.safe_open(os.path.join(path, name), "pt") as file:
            info = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for key in file.keys():  # noqa: SIM118
                tensor, offsets = file.get_tensor(key), info[key]["saved_offsets"]
                ends = [start + size for start, size in zip(offsets, tensor.shape, strict=True)]
                shape[key] = list(map(max, shape.get(key, ends), ends))
                pieces.setdefault(key, []).append((offsets, tensor))
    whole = {key: torch.empty(shape[key], dtype=parts[0][1].dtype) for key, parts in pieces.items()}
    for key, parts in pieces.items():
        for offsets, tensor in parts:
            whole[key][tuple(slice(start, start + size) for start, size in zip(offsets, tensor.shape, strict=True))] = tensor
    return whole


READERS: dict[str, Reader] = {
    "torch": _torch,
    "safetensors": _safetensors,
    "numpy": _numpy,
    "dcp": _dcp,
    "dcp-safetensors": _dcp_safetensors,
}  # by a format's `official`


def data_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The files that hold tensors, in the order in which the checkpoint first names them; its only file if it has no tensors."""
    if named(checkpoint.format).holds_folder:
        return (checkpoint.path,)
    spans = (span for tensor in checkpoint.values() for span in tensor.spans)
    files = tuple(dict.fromkeys(span.file for span in spans if span is not None))
    return files or tuple(stamp.path for stamp in checkpoint.files) or (checkpoint.path,)


def load_file(checkpoint: Checkpoint, file: str) -> Mapping[str, Any]:
    """The state_dict at the checkpoint's root in one of its files.

    Raises:
        TargetError: the format has no such reader, the reader refuses the file, or it has no dict at the root.
    """
    reader = READERS.get(named(checkpoint.format).official)
    if reader is None:
        raise TargetError(f"a {checkpoint.format} holds no values to load", path=file)
    loaded = user_code.call(file, reader, file, checkpoint.root)
    state = at_root(loaded, checkpoint.root)
    if not isinstance(state, Mapping):
        where = f"at the root {checkpoint.root!r}" if checkpoint.root else "at its top"
        raise TargetError(f"holds no dict {where} when torch loads it", path=file)
    return state


def at_root(loaded: object, root: str) -> object:
    """The value at a root's dotted path in nested dicts and lists; None if there is none.

    >>> at_root({"ema": {"net.params": {"w": 1}}}, "ema.net.params"), at_root([{"w": 1}], "0")
    ({'w': 1}, {'w': 1})
    """
    if not root:
        return loaded
    if isinstance(loaded, Mapping):
        items = [(str(key), value) for key, value in loaded.items()]
    elif isinstance(loaded, Sequence) and not isinstance(loaded, (str, bytes)):
        items = [(str(index), value) for index, value in enumerate(loaded)]
    else:
        return None
    for name, value in items:
        if name == root:
            return value
    for name, value in items:
        if root.startswith(f"{name}."):
            nested_value = at_root(value, root[len(name) + 1 :])
            if nested_value is not None:
                return nested_value
    return None
