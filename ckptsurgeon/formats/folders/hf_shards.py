"""Checkpoints in several files: the `*.index.json` of a Hugging Face folder, with a `weight_map` from key to shard.

Rule: the index and the shards must agree on every key; a shard is a plain name beside its index, and a link may lead
only to a regular file in that folder or, in a Hugging Face cache, into the `blobs` of the same model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from ckptsurgeon.errors import CheckpointError, FormatError, RootError
from ckptsurgeon.formats.folders.hf_folder import check_link, member, with_unread
from ckptsurgeon.formats.json_text import parse, whole
from ckptsurgeon.formats.pickle.unpickled import Claims
from ckptsurgeon.formats.registry import named
from ckptsurgeon.limit_table import allowed, exceeded
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.storage.opening import open_regular
from ckptsurgeon.tensors import Archive, FileStamp, Shard, StateDict, TensorMeta


def is_own(file: OpenFile) -> bool:
    """Whether a JSON file is an index of shards, by its content."""
    return file.size <= allowed("json-bytes") and b'"weight_map"' in file.read(0, file.size)


def read(file: OpenFile, read_shard: Callable[[str], Archive]) -> Archive:
    """Read an index and the header of every shard it names."""
    if file.stamp.data is not None:
        raise FormatError("is an index in memory, and its shards are files beside it", path=file.path, hint="give the index's path")
    raw = whole(file)
    weight_map = _weight_map(raw, file.path)
    folder = os.path.dirname(file.path)
    names = sorted(set(weight_map.values()))
    for limit, count, what in (("shards", len(names), "files"), ("tensors", len(weight_map), "tensors")):
        if count > allowed(limit):
            raise exceeded(limit, f"is an index of {count:,} {what}, above the limit of {allowed(limit):,}", count, path=file.path)
    archives: dict[str, Archive] = {}
    shards: dict[str, StateDict] = {}
    for name in names:
        path = member(file.path, folder, name)
        archive = archives[name] = read_shard(path)
        if os.path.islink(path):
            check_link(file.path, folder, name, opened=archive.files[0])
        shard = shards[name] = _only_state_dict(archive)
        # Checked before the next shard is read: then a file under many names is read only once.
        unlisted = next((key for key in shard.tensors if weight_map.get(key) != name), None)
        if unlisted is not None:
            raise FormatError(f"is in the shard {name}, where the index does not have it", path=file.path, key=unlisted)
    tensors: dict[str, TensorMeta] = {}
    for key, name in weight_map.items():
        if key in shards[name].tensors:
            tensors[key] = shards[name].tensors[key]
        elif key not in shards[name].entries:
            raise FormatError(f"is in the index, but not in its shard {name}", path=file.path, key=key)
    metadata = {path: local for shard in shards.values() for path, local in shard.module_metadata.items()}
    entries = {key: entry for shard in shards.values() for key, entry in shard.entries.items()}
    formats = [named(archive.format) for archive in archives.values()]
    form = next((candidate for candidate in formats if candidate.pickled), formats[0])
    if form.pickled:
        sizes = {name: archive.files[0].size for name, archive in archives.items()}
        Claims(sum(meta.nbytes for meta in tensors.values()), sizes).check(file.path)
    stamps: list[FileStamp] = [file.stamp, *(stamp for archive in archives.values() for stamp in archive.files)]
    digest = sha256(raw + "".join(archive.fingerprint for archive in archives.values()).encode())
    archive = Archive(
        path=file.path,
        format=form.shards,
        fingerprint=digest.hexdigest(),
        files=tuple(stamps),
        state_dicts=(StateDict("", tensors, entries, metadata),),
        globals=tuple(dict.fromkeys(name for archive in archives.values() for name in archive.globals)),
        metadata={key: text for archive in reversed(archives.values()) for key, text in archive.metadata.items()},
        provenance=next((archive.provenance for archive in archives.values() if archive.provenance), None),
        part=next((archive.part for archive in archives.values() if archive.part), None),
        notes=tuple(dict.fromkeys(note for archive in archives.values() for note in archive.notes)),
    )
    return with_unread(archive)


def _weight_map(raw: bytes, path: str) -> dict[str, str]:
    value: Any = parse(raw, path, "index")
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError("has a weight_map that is not a map from keys to file names", path=path)
    return weight_map


_NAME = re.compile(r"(?:.*[-_.])?\d+[-_]of[-_](\d+)(?:\.\w+)+", re.ASCII)


def shard_of(path: str) -> Shard | None:
    """What shows that a file is one shard of several: an index in its folder that names other shards too, else its own name. None for a
    whole file.

    An index that can't be read says nothing.
    """
    folder, name = os.path.split(path)
    try:
        indexes = sorted(file for file in os.listdir(folder or ".") if file.endswith(".index.json"))
    except OSError:
        indexes = []
    for index in (os.path.join(folder, file) for file in indexes):
        try:
            with open_regular(index) as file:
                weight_map = _weight_map(whole(file), index)
        except CheckpointError:
            continue
        if name in weight_map.values():
            other_keys = frozenset(key for key, shard in weight_map.items() if shard != name)
            return Shard(index, other_keys) if other_keys else None
    numbered = _NAME.fullmatch(name)
    return Shard(folder or ".") if numbered is not None and int(numbered[1]) > 1 else None


def shard_in_words(shard: Shard) -> str:
    """What a user should know about a file that is one shard of several.

    >>> shard_in_words(Shard("hf/model.safetensors.index.json", frozenset({"fc.weight"})))
    'is one shard of several; give hf/model.safetensors.index.json for the whole checkpoint'
    """
    if shard.other_keys is None:
        return "is one shard of several by its name; for the whole checkpoint give the folder with all of them and their index"
    return f"is one shard of several; give {shard.whole} for the whole checkpoint"


def _only_state_dict(archive: Archive) -> StateDict:
    if len(archive.state_dicts) != 1 or archive.state_dicts[0].root:
        raise RootError("is a shard with more than one plain state_dict", path=archive.path)
    return archive.state_dicts[0]
