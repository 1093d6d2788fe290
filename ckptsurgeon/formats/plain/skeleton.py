"""A skeleton as JSON: a model's names, dtypes, shapes, ties and `_metadata`, without data, so that `check --against` needs no torch.

Other programs may read it too: `{"version": 1, "kind": "skeleton", "tensors": [{"name", "dtype", "shape"}…], …}`.
"""

from __future__ import annotations

import json
import os
import shlex
from hashlib import sha256
from math import prod
from typing import Any

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import FormatError
from ckptsurgeon.formats.json_text import integer, parse, short, whole
from ckptsurgeon.formats.pickle.unpickled import written_out
from ckptsurgeon.limit_table import allowed, exceeded
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.tensors import Archive, Checkpoint, StateDict, TensorMeta, contiguous_stride

VERSION = 1
KIND = "skeleton"
_OTHER = ("is JSON, not a skeleton", "make one of your model with `ckptsurgeon skeleton model:Net -o net.json`")
# Other JSON files in the folders of checkpoints: names in them, what they are, and a hint.
_OTHERS: tuple[tuple[frozenset[str], str, str], ...] = (
    (frozenset({"sources", "target", "steps"}), "is a plan, not a checkpoint", "follow it: ckptsurgeon apply {path} -o out.pt"),
    (frozenset({"weight_map"}), "is an index of shards, not a skeleton", _OTHER[1]),
    (frozenset({"model_type"}), "is a configuration of transformers, not a checkpoint", "give its folder: {folder}"),
    (frozenset({"architectures"}), "is a configuration, not a checkpoint", "give its folder: {folder}"),
)


def read(file: OpenFile) -> Archive:
    """Read a skeleton; FormatError for any other JSON."""
    raw = whole(file)
    value = parse(raw, file.path, "content")
    if not isinstance(value, dict) or value.get("kind") != KIND:
        keys = frozenset(value) if isinstance(value, dict) else frozenset()
        what, hint = next(((what, hint) for needs, what, hint in _OTHERS if needs <= keys), _OTHER)
        raise FormatError(
            what, path=file.path, hint=hint.format(path=shlex.quote(file.path), folder=shlex.quote(os.path.dirname(file.path) or "."))
        )
    if value.get("version") != VERSION:
        raise FormatError(f"is a skeleton of another version than {VERSION}", path=file.path)
    tensors: dict[str, TensorMeta] = {}
    rows = value.get("tensors")
    if not isinstance(rows, list):
        raise FormatError("is a skeleton without its list of tensors", path=file.path)
    if len(rows) > (most := allowed("tensors")):
        raise exceeded("tensors", f"is a skeleton of {len(rows):,} tensors, above the limit of {most:,}", len(rows), path=file.path)
    for row in rows:
        meta = _tensor(file.path, row)
        if meta.name in tensors:
            raise FormatError("is in the skeleton twice", path=file.path, key=meta.name)
        tensors[meta.name] = meta
    ties = value.get("ties", [])
    if not isinstance(ties, list) or not all(
        isinstance(group, list) and all(isinstance(key, str) and key in tensors for key in group) for group in ties
    ):
        raise FormatError("is a skeleton whose ties name other keys than its own", path=file.path)
    entries = value.get("entries", [])
    metadata = value.get("module_metadata", {})
    named = isinstance(entries, list) and all(isinstance(key, str) for key in entries)
    if not named or not isinstance(metadata, dict) or not all(isinstance(local, dict) for local in metadata.values()):
        raise FormatError("is a skeleton whose entries or module_metadata have another type", path=file.path)
    return Archive(
        path=file.path,
        format="skeleton",
        kind="skeleton",
        fingerprint=fingerprint(tensors, tuple(tuple(group) for group in ties)),
        files=(),
        state_dicts=(StateDict("", tensors, dict.fromkeys(entries), metadata, tuple(tuple(group) for group in ties)),),
    )


def _tensor(path: str, row: Any) -> TensorMeta:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise FormatError("is a skeleton with a tensor that has no name", path=path)
    name, code, shape = row["name"], row.get("dtype"), row.get("shape")
    if not isinstance(code, str) or code not in BY_CODE:
        raise FormatError(f"has the unknown dtype {short(code)}", path=path, key=name)
    if not isinstance(shape, list) or len(shape) > 64 or not all(map(integer, shape)) or prod(size or 1 for size in shape) >= 1 << 63:
        raise FormatError("has a shape that is not a list of non-negative integers", path=path, key=name)
    return TensorMeta(name, code, tuple(shape), contiguous_stride(tuple(shape)))


def fingerprint(tensors: dict[str, TensorMeta], ties: tuple[tuple[str, ...], ...]) -> str:
    """SHA-256 (hex) of names, dtypes, shapes and ties; the same for a model and its skeleton."""
    rows = [[meta.name, meta.dtype, list(meta.shape)] for meta in tensors.values()]
    return sha256(json.dumps([rows, ties], separators=(",", ":")).encode()).hexdigest()


def to_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """The skeleton of any checkpoint, as JSON values that `read` can read."""
    return {
        "version": VERSION,
        "kind": KIND,
        "spec": checkpoint.path,
        "tensors": [{"name": meta.name, "dtype": meta.dtype, "shape": list(meta.shape)} for meta in checkpoint.values()],
        "ties": [list(group) for group in checkpoint.ties],
        "entries": list(checkpoint.entries),
        "module_metadata": {path: dict(local) for path, local in written_out(checkpoint.module_metadata).items()},
    }
