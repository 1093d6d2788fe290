"""torch's other distributed layout: a folder of each rank's safetensors files (`HuggingFaceStorageWriter(save_distributed=True)`).

There is no index. Each file says in `DCP_SHARDING_INFO` where its pieces begin; a tensor's shape is as large as its pieces reach. So a
tensor without its last rows looks whole, and a note says so.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from hashlib import sha256
from typing import Any

from ckptsurgeon.errors import FormatError
from ckptsurgeon.formats.archive_tree import ValueTree
from ckptsurgeon.formats.folders.hf_folder import check_link, member
from ckptsurgeon.formats.json_text import integer, parse
from ckptsurgeon.formats.plain import safetensors
from ckptsurgeon.formats.registry import BY_NAME
from ckptsurgeon.limit_table import allowed, exceeded
from ckptsurgeon.storage.opening import open_regular
from ckptsurgeon.storage.pieces import tiled
from ckptsurgeon.tensors import Archive, Piece, StateDict, TensorMeta

FORMAT, INFO = "dcp-safetensors", "DCP_SHARDING_INFO"
_ANEW = "copy or download the folder again; do not trust it"


def read(folder: str, names: Collection[str]) -> Archive:
    """Read the headers of all ranks' files in a folder that has files of these names.

    Raises:
        FormatError: pieces that lack elements or have some twice, by file and rows; files that describe a tensor differently.
    """
    shards = sorted(filter(BY_NAME[FORMAT].member, names))
    if len(shards) > (most := allowed("shards")):
        raise exceeded("shards", f"is a folder of {len(shards)} files, above the limit of {most}", len(shards), path=folder)
    archives = [_shard(folder, name) for name in shards]
    pieces: dict[str, list[Piece]] = {}
    dtypes: dict[str, str] = {}
    for archive in archives:
        starts = _starts(archive)
        for key, tensor in archive.state_dicts[0].tensors.items():
            if dtypes.setdefault(key, tensor.dtype) != tensor.dtype:
                raise FormatError(f"is {tensor.dtype} here, and {dtypes[key]} in another file", path=archive.path, key=key, hint=_ANEW)
            assert tensor.span is not None
            pieces.setdefault(key, []).append(Piece(tensor.span, starts[key], tensor.shape, tensor.stride))
    sizes = {archive.files[0].path: archive.files[0].size for archive in archives}
    ranks = len({name.split("-")[1] for name in shards})
    return Archive(
        path=folder,
        format=FORMAT,
        fingerprint=sha256("".join(archive.fingerprint for archive in archives).encode()).hexdigest(),
        files=tuple(archive.files[0] for archive in archives),
        state_dicts=(StateDict("", {key: _whole(key, dtypes[key], of_key, sizes) for key, of_key in pieces.items()}),),
        metadata={key: value for key, value in archives[0].metadata.items() if key != INFO},
        notes=(f"files of {ranks} rank{'s' if ranks > 1 else ''}; that there were no more of them stands in none",),
    )


def read_tree(folder: str, names: Collection[str]) -> ValueTree:
    """All that such a folder holds: tensors under names."""
    archive = read(folder, names)
    return ValueTree(folder, dict(archive.state_dicts[0].tensors), archive.files)


def _shard(folder: str, name: str) -> Archive:
    path = member(folder, folder, name)
    with open_regular(path) as file:
        if os.path.islink(path):
            check_link(folder, folder, name, opened=file.stamp)
        return safetensors.read(file)


def _starts(archive: Archive) -> dict[str, tuple[int, ...]]:
    """The offsets of each of a file's tensors in the whole tensor."""
    info: Any = parse(archive.metadata.get(INFO, "{}").encode(), archive.path, INFO)
    starts: dict[str, tuple[int, ...]] = {}
    for key, tensor in archive.state_dicts[0].tensors.items():
        row = info.get(key) if isinstance(info, dict) else None
        offsets = row.get("saved_offsets") if isinstance(row, dict) else None
        if not isinstance(offsets, list) or len(offsets) != len(tensor.shape) or not all(map(integer, offsets)):
            raise FormatError(f"has no place in the whole tensor: its file's {INFO} does not say one", path=archive.path, key=key)
        starts[key] = tuple(offsets)
    return starts


def _whole(key: str, dtype: str, pieces: list[Piece], sizes: dict[str, int]) -> TensorMeta:
    if len({len(piece.sizes) for piece in pieces}) > 1:
        raise FormatError("has as many dimensions in one file as it has not in another", path=pieces[0].span.file, key=key, hint=_ANEW)
    shape = tuple(max(ends) for ends in zip(*([stop for _, stop in piece.block] for piece in pieces), strict=True))
    return tiled(key, dtype, shape, pieces, sizes)
