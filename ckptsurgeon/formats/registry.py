"""The table of file formats: how a file of each begins, which module reads it, and how it differs from the others.

Rule: code that depends on the format uses the attributes of its `Format`; no other module compares names of formats. A format's module is
named as text and imported only to read such a file. A new format is one module with `read(file)`, and one row of the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

_ZIP = b"PK\x03\x04"  # how a zip archive begins; the length of its first entry's name is at byte 26, the name at byte 30


def _is_zip(head: bytes) -> bool:
    return head.startswith(_ZIP) and not _is_zip_of_arrays(head)


def _is_zip_of_arrays(head: bytes) -> bool:
    return head.startswith(_ZIP) and head[30 : 30 + int.from_bytes(head[26:28], "little")].endswith(b".npy")


def _is_pickle(head: bytes) -> bool:
    return head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


def _is_json(head: bytes) -> bool:
    return head.lstrip()[:1] == b"{"


def _never(_seen: object) -> bool:
    return False


_DCP_FILE = re.compile(r".+\.distcp|(?:__\d+)?\.metadata")


_DCP_SAFETENSORS = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True, slots=True)
class Format:
    """A format of files.

    Attributes:
        name: the `format` of an `Archive` and a `Checkpoint`.
        module: its module below `ckptsurgeon.formats`. `read(file)` there gives the Archive.
        begins: whether a file is of this format, by its first 4096 bytes. The formats are tried in the table's order.
        magic: the bytes that every file of it begins with, if any; formats with `magic` are tried first.
        family: the name of `--allow` and `--format` for it, its other versions and its shards; empty where that is `name`.
        suffixes: its file suffixes. `check FOLDER` checks files with them, and an output's suffix decides its format.
        writer: the module whose `layout_of(contents)` lays a new file out; `""` for a format that is only read.
        saved: the files of a folder of it, where its own library writes them.
        in_folder: the name of a file of it in an output folder, with `{}` for the shard's number.
        shards: the format of several such files with an index; `""` where files of it can't be shards.
        member: whether a file of this name shows that its folder is of this format. `read(folder, names)` in its module reads such a
            folder, and `read_tree(folder, names)` reads all that is in it.
        joined: its files are zip archives one after another; their checksums are checked archive by archive.
        index: it is an index of shards. `read(file, read_shard)` in its module reads it, `is_own(file)` tells it from other JSON.
        pickled: it holds a pickle: `unpack(file)` in its module reads all of it, and tensors may share bytes.
        keeps_versions: it stores the versions of modules (torch's `_metadata`).
        leaves_out_tied: its library writes a tied tensor under one name, and gives it to the other names when it loads.
        official: the library that reads it too, a name in `models.verify.official`; `""` where there is none.
    """

    name: str
    module: str = ""
    begins: Callable[[bytes], bool] = _never
    magic: bytes = b""
    family: str = ""
    suffixes: tuple[str, ...] = ()
    writer: str = ""
    saved: tuple[str, ...] = ()
    in_folder: str = ""
    shards: str = ""
    member: Callable[[str], object] = _never
    joined: bool = False
    index: bool = False
    pickled: bool = False
    keeps_versions: bool = False
    leaves_out_tied: bool = False
    official: str = ""

    @property
    def holds_folder(self) -> bool:
        """Whether a folder is of this format, by the names of the files in it."""
        return self.member is not _never

    @property
    def word(self) -> str:
        """Its name for `--allow` and `--format`."""
        return self.family or self.name


_TORCH = (".pt", ".pth", ".pkl", ".bin", ".ckpt")
TABLE: tuple[Format, ...] = (
    Format(
        "safetensors",
        "plain.safetensors",
        _is_safetensors,
        suffixes=(".safetensors",),
        writer="plain.safetensors",
        in_folder="model{}.safetensors",
        shards="safetensors-shards",
        leaves_out_tied=True,
        official="safetensors",
    ),
    Format(
        "safetensors-shards",
        "folders.hf_shards",
        _is_json,
        family="safetensors",
        index=True,
        leaves_out_tied=True,
        official="safetensors",
    ),
    Format(
        "torch-zip",
        "torch.zip",
        _is_zip,
        family="torch",
        suffixes=_TORCH,
        writer="torch.zip_writer",
        in_folder="pytorch_model{}.bin",
        shards="torch-shards",
        pickled=True,
        keeps_versions=True,
        official="torch",
    ),
    Format("torch-legacy", "torch.legacy", _is_pickle, family="torch", shards="torch-shards", pickled=True, official="torch"),
    Format("torch-shards", "folders.hf_shards", family="torch", index=True, official="torch"),
    Format("skeleton", "plain.skeleton", _is_json),
    Format("dcp", "folders.dcp", member=_DCP_FILE.fullmatch, joined=True, saved=("__0_0.distcp", ".metadata"), official="dcp"),
    Format(
        "dcp-safetensors", "folders.dcp_safetensors", family="safetensors", member=_DCP_SAFETENSORS.fullmatch, official="dcp-safetensors"
    ),
    Format("npz", "plain.npz", _is_zip_of_arrays, official="numpy"),  # no suffix: most .npz files in a folder are no checkpoints
)
BY_NAME: Mapping[str, Format] = MappingProxyType({row.name: row for row in TABLE})
WRITTEN: Mapping[str, Format] = MappingProxyType({row.word: row for row in TABLE if row.writer or row.saved})  # by the names of --format
SUFFIXES: Mapping[str, Format] = MappingProxyType({suffix: row for row in TABLE for suffix in row.suffixes})

OUTPUTS: Mapping[str, str] = MappingProxyType({suffix: row.word for suffix, row in SUFFIXES.items() if row.writer})  # by suffix
LOADING: Mapping[str, str] = MappingProxyType(
    {
        "torch": "torch.load({}, weights_only=True)",
        "safetensors": "safetensors.torch.load_file({})",
        "numpy": "{{key: torch.from_numpy(array) for key, array in numpy.load({}).items()}}",
    }
)  # by library: the call that loads a file's state_dict


def loading(name: str) -> str:
    """The Python call that loads a file of the format of this name, with `{}` for its path."""
    return LOADING.get(named(name).official, LOADING["torch"])


def named(name: str) -> Format:
    """The format of this name; for a name that is not in the table, such as `model`, a format with default attributes."""
    return BY_NAME.get(name) or Format(name)


def module(name: str) -> Any:
    """A format's module, or its writer's, imported now."""
    return import_module(f"ckptsurgeon.formats.{name}")


def of_folder(names: Collection[str]) -> Format | None:
    """The format of a folder that has files of these names; None where it is no folder of such a format."""
    return next((row for row in TABLE if any(map(row.member, names))), None)


def allowed_by() -> dict[str, tuple[str, ...]]:
    """The names that `--allow` takes, each with the formats that it allows.

    >>> allowed_by()["torch"]
    ('torch-zip', 'torch-legacy', 'torch-shards')
    """
    formats: dict[str, tuple[str, ...]] = {}
    for row in TABLE:
        formats.setdefault(row.word, tuple(member.name for member in TABLE if member.word == row.word))
        if not row.index:
            formats.setdefault(row.name, (row.name,))
    return formats
