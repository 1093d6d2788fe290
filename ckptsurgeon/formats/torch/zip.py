"""torch's zip format (since torch 1.6): a pickle `data.pkl` and one record per storage, in one folder of a zip archive.

Reads headers only. Refuses TorchScript (it holds a program), big-endian files, and any storage whose record is not what the pickle
says. Format as in torch `serialization.py` (`_save`, `_load`) and `caffe2/serialize/inline_container.cc`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from ckptsurgeon.errors import FormatError
from ckptsurgeon.formats.inflate import inflated
from ckptsurgeon.formats.layout import RECORD, parse_provenance
from ckptsurgeon.formats.pickle.globals import MAX_INT
from ckptsurgeon.formats.pickle.machine import run
from ckptsurgeon.formats.pickle.state import TruncatedPickle, name_globals
from ckptsurgeon.formats.pickle.unpickled import Unpacked, collect
from ckptsurgeon.formats.pickle.values import StorageClass, StorageRef
from ckptsurgeon.formats.zip_directory import Entry, read_directory
from ckptsurgeon.limit_table import allowed, exceeded
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.tensors import Archive, Packed, Record, Span

# The records that torch reads by name, in addition to the storages.
_RECORDS = frozenset({"data.pkl", "byteorder", "version", "constants.pkl"})
_RECORDS |= {".data/version", ".data/serialization_id", ".format_version", ".storage_alignment"}


def read(file: OpenFile) -> Archive:
    """Read the header of a torch zip file."""
    header = _read(file)
    tree = collect(file.path, header.unpacked)
    return Archive(
        path=file.path,
        format="torch-zip",
        fingerprint=header.fingerprint,
        files=(file.stamp,),
        state_dicts=tree.state_dicts,
        globals=header.unpacked.globals,
        provenance=header.provenance,
        beside=tree.beside,
        part=tree.part,
        notes=header.notes,
    )


def unpack(file: OpenFile) -> Unpacked:
    """The whole pickle of a torch zip file, with all that it holds."""
    return _read(file).unpacked


@dataclass(frozen=True)
class _Read:
    """The result of reading a file, without its entries and storages, of which there may be a million."""

    unpacked: Unpacked
    fingerprint: str
    provenance: Mapping[str, Any] | None
    notes: tuple[str, ...]


def _read(file: OpenFile) -> _Read:
    directory = read_directory(file)
    entries = directory.entries
    data, by_name = _in_one_folder(file, entries)
    if "data.pkl" not in by_name:
        raise _no_checkpoint(file)
    if "constants.pkl" in by_name or any(name.startswith("code/") for name in by_name):
        raise FormatError(
            "is a TorchScript archive: a program, not a checkpoint",
            path=file.path,
            hint="where it is trusted: torch.save(torch.jit.load(path).state_dict(), 'out.pt')",
        )
    order = by_name.get("byteorder")
    if order is not None and order.size > 16:
        raise FormatError(f"has a byteorder of {order.size:,} bytes, where torch writes one word", path=file.path)
    if order is not None and content(file, "byteorder", order, "pickle-bytes") != b"little":
        raise FormatError("was written on a big-endian machine", path=file.path, hint="load and save it again there, on torch 2.1 or newer")
    pickle = content(file, "data.pkl", by_name["data.pkl"], "pickle-bytes")
    inflated, most = sum(entry.size for entry in entries.values() if type(entry) is Packed), allowed("inflated-data-bytes", file.size)
    if inflated > most:
        raise exceeded("inflated-data-bytes", f"inflates to {inflated:,} bytes, above the limit of {most:,}", inflated, path=file.path)
    digest = sha256(b"%d\n" % file.size)
    digest.update(pickle)
    digest.update(directory.raw)
    del directory
    storages: dict[str, StorageRef] = {}
    try:
        pickled = run(pickle, 0, lambda identity: _storage(identity, storages))
        if pickled.end != len(pickle):
            raise FormatError("has bytes after its pickle")
        nbytes, notes = len(pickle), _notes(data, entries, len(by_name), storages)
        del pickle  # freed, as the entries below are, since a million of them take much memory
        spans = {key: _whole(file.path, storage, entries.pop(f"{data}{key}", None)) for key, storage in storages.items()}
    except TruncatedPickle as error:
        early = FormatError("has a data.pkl that ends too early", path=file.path, hint="copy or download it again")
        name_globals(early, error.globals)
        raise early from error
    unpacked = Unpacked(pickled.value, pickled.globals, lambda storage: spans[storage.key], nbytes)
    return _Read(unpacked, digest.hexdigest(), _provenance(file, by_name), notes)


def content(file: OpenFile, name: str, entry: Entry, limit: str) -> bytes:
    """A small entry's bytes, inflated if need be, with its CRC checked unless the archive has none (0)."""
    bounds = {limit: allowed(limit)}
    if isinstance(entry, Packed):
        bounds["inflated-bytes"] = allowed("inflated-bytes", file.size)
    for bound, most in bounds.items():
        if entry.size > most:
            raise exceeded(bound, f"has a {name} of {entry.size:,} bytes, above the limit of {most:,}", entry.size, path=file.path)
    data = file.read(entry.offset, entry.nbytes)
    if isinstance(entry, Packed):
        data = b"".join(inflated([data], entry.size, file.path, name))
    if entry.crc and zlib.crc32(data) != entry.crc:
        raise FormatError(f"has a wrong checksum for {name}", path=file.path, hint="copy or download it again")
    return data


def _no_checkpoint(file: OpenFile) -> FormatError:
    words = "is a zip archive, but none that torch.save wrote"
    return FormatError(words, path=file.path, hint="unpack it and give the checkpoint inside")


def _in_one_folder(file: OpenFile, entries: Mapping[str, Entry]) -> tuple[str, dict[str, Entry]]:
    """The prefix of the names of the storages' records, and all other entries by their names within the archive's one folder."""
    folder = next(iter(entries), "").partition("/")[0] + "/"
    data = f"{folder}data/"
    not_data = [name for name in entries if not name.startswith(data)]
    if not entries or not all(name.startswith(folder) for name in not_data):
        raise _no_checkpoint(file)
    by_name = {name[len(folder) :]: entries[name] for name in not_data}
    for name in by_name:
        if name not in _RECORDS and name.lower() in _RECORDS:  # torch ignores case in names, and other readers don't
            raise FormatError(f"has the entry {name!r}, where torch writes {name.lower()!r}", path=file.path, hint="do not trust it")
    return data, by_name


def _storage(identity: Any, storages: dict[str, StorageRef]) -> StorageRef:
    if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
        raise FormatError("refers to something that is no storage")
    _, kind, key, _location, numel = identity
    if type(kind) is not StorageClass or type(key) is not str or type(numel) is not int or not 0 <= numel <= MAX_INT:
        raise FormatError("describes a storage in a way that torch does not")
    known = storages.get(key)
    if known is None:
        known = storages[key] = StorageRef(key, kind.dtype, numel)
    elif known.dtype is not kind.dtype or known.numel != numel:
        raise FormatError(f"uses the storage {key!r} with two dtypes or lengths")
    return known


def _whole(path: str, storage: StorageRef, entry: Entry | None) -> Span:
    """The span of a storage; FormatError where its record is missing or has another length than the pickle says."""
    nbytes = storage.numel * (1 if storage.dtype is None else storage.dtype.size)
    if entry is None:
        raise FormatError(f"lacks the record of its storage {storage.key!r}")
    if entry.size != nbytes:
        raise FormatError(f"has a record of {entry.size:,} bytes for the storage {storage.key!r}, whose pickle says {nbytes:,}")
    if isinstance(entry, Record):
        return Span(path, entry.offset, nbytes, storage.key, None, entry)
    return Span(path, 0, nbytes, storage.key, entry)


def _provenance(file: OpenFile, entries: Mapping[str, Entry]) -> Mapping[str, Any] | None:
    entry = entries.get(RECORD)
    return parse_provenance(content(file, RECORD, entry, "json-bytes")) if entry else None


def _notes(data: str, entries: Mapping[str, Entry], count: int, storages: Mapping[str, StorageRef]) -> tuple[str, ...]:
    notes = []
    unused = len(entries) - count - (data in entries) - sum(key != "" for key in storages)
    if unused:
        notes.append(f"{unused} storages that nothing refers to")
    records = [entry for name, entry in entries.items() if name.startswith(data) and entry.size]
    if records and not any(entry.crc for entry in records):
        notes.append("written without checksums (every CRC is zero)")
    return tuple(notes)
