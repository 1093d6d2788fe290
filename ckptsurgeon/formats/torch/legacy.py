"""The format that torch wrote before 1.6, and still writes on request: five pickles, then the storages one after another.

Reads the pickles and each storage's length, never its data. Format as in torch `serialization.py` (`_legacy_save`, `_legacy_load`).
A plain `pickle.dump` file begins the same way; the error says so.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from hashlib import sha256
from typing import Any, TypeVar

from ckptsurgeon.errors import CheckpointError, FormatError, PartError, UnsafeError
from ckptsurgeon.formats.folders import parts
from ckptsurgeon.formats.pickle.globals import MAX_INT
from ckptsurgeon.formats.pickle.machine import Pickled, run
from ckptsurgeon.formats.pickle.state import TruncatedPickle, name_globals
from ckptsurgeon.formats.pickle.unpickled import Unpacked, collect
from ckptsurgeon.formats.pickle.values import Inert, StorageClass, StorageRef
from ckptsurgeon.limit_table import allowed, exceeded
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.tensors import Archive, Span

T = TypeVar("T")

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
_FIRST_WINDOW = 1 << 20
_TENSOR_BYTES = "torch.storage._load_from_bytes"  # what pickle.dump makes of a tensor's storage


def read(file: OpenFile) -> Archive:
    """Read the header of a legacy torch file; for another pickle the FormatError says what it is."""
    return _widening(file, _archive)


def unpack(file: OpenFile) -> Unpacked:
    """The whole pickle of a legacy torch file, with all that it holds."""
    return _widening(file, lambda file, data: _read(file, data)[0])


def _widening(file: OpenFile, reading: Callable[[OpenFile, bytes], T]) -> T:
    """The result of `reading` on the file's beginning. While the beginning is too short, it is called again with more of the file."""
    window = min(_FIRST_WINDOW, file.size, allowed("pickle-bytes"))
    while True:
        try:
            return reading(file, file.read(0, window))
        except TruncatedPickle as error:
            if window == file.size:
                truncated = file.truncated(file.size + 1)
                name_globals(truncated, error.globals)  # the globals that the pickle named until then
                raise truncated from error
            most = allowed("pickle-bytes")
            if window >= most:
                raise exceeded("pickle-bytes", f"has pickles of more than {most} bytes", path=file.path) from error
            window = min(window * 4, file.size, most)
        except CheckpointError as error:
            error.path = error.path or file.path
            raise


def _archive(file: OpenFile, data: bytes) -> Archive:
    unpacked, header = _read(file, data)
    tree = collect(file.path, unpacked)
    return Archive(
        path=file.path,
        format="torch-legacy",
        fingerprint=sha256(b"%d\n" % file.size + header).hexdigest(),
        files=(file.stamp,),
        state_dicts=tree.state_dicts,
        globals=unpacked.globals,
        beside=tree.beside,
        part=tree.part,
    )


def _read(file: OpenFile, data: bytes) -> tuple[Unpacked, bytes]:
    """The pickle in `data`, the file's beginning, and the header that the fingerprint is taken of."""
    first = run(data)
    if first.value != MAGIC:
        raise _other_pickle(file, first)
    protocol = run(data, first.end)
    if protocol.value != PROTOCOL:
        raise FormatError("is of a legacy protocol that no torch writes")
    system = run(data, protocol.end)
    if not isinstance(system.value, dict) or system.value.get("little_endian") is not True:
        raise FormatError("was written on a big-endian machine", hint="load and save it again there, on torch 2.1 or newer")
    storages: dict[str, StorageRef] = {}
    body = run(data, system.end, _persistent(storages))
    keys = run(data, body.end)
    offsets = _data_offsets(file, keys.value, storages, keys.end)

    def locate(storage: StorageRef) -> Span:
        offset = offsets.get(storage.key)
        if offset is None:
            raise FormatError(f"never fills its storage {storage.key!r}")
        whole = storages[storage.key]
        return Span(file.path, offset, whole.numel * _item(whole), storage.key)

    # Each of the five pickles may name globals: torch.load without `weights_only` runs them all.
    names = tuple(dict.fromkeys(name for part in (first, protocol, system, body, keys) for name in part.globals))
    # The header is the pickles, and the lengths between the storages' data.
    header = data[: keys.end] + b"".join(b"%d:%d\n" % (offsets[key], storages[key].numel) for key in offsets)
    return Unpacked(body.value, names, locate, body.end - system.end), header


def _persistent(storages: dict[str, StorageRef]) -> Callable[[Any], Any]:
    views: dict[str, tuple[str, int, int]] = {}  # by a view's own key: the storage's key, the view's offset in it, and its length

    def load(identity: Any) -> Any:
        if type(identity) is tuple and len(identity) == 4 and identity[0] == "module":
            return identity[1]  # a class, with its source beside it: inert
        if type(identity) is not tuple or len(identity) != 6 or identity[0] != "storage":
            raise FormatError("refers to something that is no storage")
        _, kind, key, _location, numel, view = identity
        if type(kind) is not StorageClass or type(key) is not str or type(numel) is not int or not 0 <= numel <= MAX_INT:
            raise FormatError("describes a storage in a way that torch does not")
        root = storages.setdefault(key, StorageRef(key, kind.dtype, numel))
        if root.dtype is not kind.dtype or root.numel != numel or key in views:
            raise FormatError(f"uses the storage {key!r} with two dtypes or lengths, or for two storages")
        if view is None:
            return root
        if type(view) is not tuple or len(view) != 3:
            raise FormatError("describes a view of a storage in a way that torch does not")
        own, offset, size = view
        if type(own) is not str or own in storages or views.setdefault(own, (key, offset, size)) != (key, offset, size):
            raise FormatError("uses one key for two views of storages")  # torch uses the first of the two for both
        if type(offset) is not int or type(size) is not int or offset < 0 or size < 0 or offset + size > numel:
            raise FormatError(f"has a view beyond its storage {key!r}")
        return StorageRef(key, kind.dtype, size, offset * _item(root))

    return load


def _item(storage: StorageRef) -> int:
    return 1 if storage.dtype is None else storage.dtype.size


def _data_offsets(file: OpenFile, keys: Any, storages: dict[str, StorageRef], position: int) -> dict[str, int]:
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise FormatError("has no list of its storages")
    offsets: dict[str, int] = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in offsets:
            raise FormatError(f"lists the storage {key[:80]!r} that nothing refers to, or lists it twice")
        (numel,) = struct.unpack("<q", file.read(position, 8))
        if numel != storage.numel:
            raise FormatError(f"has {numel} elements for the storage {key[:80]!r}, whose pickle says {storage.numel}")
        offsets[key] = position + 8
        position += 8 + numel * _item(storage)
        if position > file.size:
            raise file.truncated(position)
    if position != file.size:
        raise FormatError(f"has {file.size - position:,} bytes after its last storage")
    return offsets


def _other_pickle(file: OpenFile, first: Pickled) -> CheckpointError:
    if type(first.value) is Inert and first.value.name == parts.METADATA_CLASS:
        metadata = parts.refused(parts.TABLE["dcp-metadata"], file.path)
        name_globals(metadata, first.globals)
        return metadata
    if _TENSOR_BYTES in first.globals:
        error = FormatError(
            "was written by pickle.dump, not by torch.save",
            hint="have whoever made it write it by torch.save(state_dict, 'out.pt')",
        )
        name_globals(error, first.globals)
        return error
    try:
        collect(file.path, Unpacked(first.value, first.globals, lambda _storage: Span(file.path, 0, 0, ""), first.end))
    except PartError as found:
        return found
    except (FormatError, UnsafeError) as found:
        found.reason = f"is a plain pickle, not written by torch.save: it {found.reason}"
        return found
    error = FormatError("is a plain pickle, not written by torch.save")
    name_globals(error, first.globals)
    return error
