"""Makes every hostile file, always the same bytes: `python tests/hostile/make.py` writes the small ones anew into `files/`.

`stories.tsv` has the line of story of each. What is too large to keep, or is no file at all (a FIFO, a link to a device, a folder of
shards), is made where a test wants it. No torch, and no payload that does more than make a marker file.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from hostile_json import FOUR, HEADERS, INDEXES, SKELETONS, entry, safetensor, skeleton
from hostile_pickles import BOMBS, LEGACY, OPCODES, dims, legacy, long, state_with, tensor_of, text, zipped
from hostile_readings import CODECS, REPLACED, SPELLINGS, TARS
from hostile_zips import ENDS, LEGAL, LIES, Item, archive, at, changed, items, twice

HERE = Path(__file__).parent
FILES = HERE / "files"
STORIES = HERE / "stories.tsv"
MARKER = "hostile-marker-that-must-not-appear"  # what a payload would make, in the current folder
KEPT = 50_000  # bytes; what is larger is made for a test

Make = Callable[[], bytes]


def slug(words: str) -> str:
    """A case's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def zip_of(value: bytes) -> bytes:
    """A torch zip whose pickle is `value`, over a storage `0` of eight bytes."""
    return zipped(b"\x80\x02" + value + b".", {"0": bytes(8)})


def tensors(*pairs: tuple[str, bytes]) -> bytes:
    """A dict from texts to what opcodes leave."""
    return b"}(" + b"".join(text(key) + value for key, value in pairs) + b"u"


def tensor(
    shape: tuple[int, ...] = (1,), stride: tuple[int, ...] = (1,), offset: int = 0, numel: int = 2, kind: str = "torch\nFloatStorage"
) -> bytes:
    """A tensor over the storage `0`."""
    return tensor_of("0", long(numel), long(offset), dims(*shape), dims(*stride), kind)


ONE = tensors(("w", tensor()))
HONEST = zip_of(ONE)
TENSORS = safetensor({"w": entry()}, FOUR)
BESIDE = state_with(b"N")
LEGACY_BODY = (
    b"\x80\x02"
    + tensors(
        (
            "w",
            b"ctorch._utils\n_rebuild_tensor_v2\n(("
            + text("storage")
            + b"ctorch\nFloatStorage\n"
            + text("0")
            + text("cpu")
            + b"K\x02NtQK\x00K\x02\x85K\x01\x85\x89NtR",
        )
    )
    + b"."
)
LEGACY_KEYS = b"\x80\x02](" + text("0") + b"e."
OLD = legacy(LEGACY_BODY, LEGACY_KEYS) + struct.pack("<q2f", 2, 1, 2)
EVIL = OPCODES["os.system"][0](MARKER)


def _shared(kind: str = "torch\nFloatStorage", numel: int = 2) -> bytes:
    return zip_of(tensors(("a", tensor()), ("b", tensor(numel=numel, kind=kind))))


def _polyglot() -> bytes:
    # A safetensors header over all of a zip: one reader sees tensors, the other a pickle.
    inner = zip_of(tensors(("w", tensor()), ("evil", EVIL)))
    return safetensor({"w": entry(0, len(inner), (len(inner),), "U8")}, inner)


def _crc(crc: int | None = None) -> bytes:
    return archive(*(replace(item, crc=0 if crc is None else item.crc) for item in items()))


def _renamed() -> bytes:
    entries = items()
    return archive(*entries, replace(entries[at("data/0")], name="archive/data/8", header=0))


STORAGES: dict[str, Make] = {
    "a view beyond its storage": lambda: zip_of(tensors(("w", tensor((3,))))),
    "an offset beyond its storage": lambda: zip_of(tensors(("w", tensor(offset=2)))),
    "a negative stride": lambda: zip_of(tensors(("w", tensor(stride=(-1,))))),
    "a negative shape": lambda: zip_of(tensors(("w", tensor((-1,))))),
    "a shape that wraps to one": lambda: zip_of(tensors(("w", tensor((1 << 32, 1 << 32), (0, 0))))),
    "an offset that wraps": lambda: zip_of(tensors(("w", tensor(offset=1 << 62)))),
    "an empty shape that overflows": lambda: zip_of(tensors(("w", tensor((0, 1 << 70), (1, 1))))),
    "sixty five dimensions": lambda: zip_of(tensors(("w", tensor((1,) * 65, (1,) * 65)))),
    "stride zero that inflates": lambda: zip_of(tensors(("w", tensor((1 << 31,), (0,))))),
    "stride zero a little": lambda: zip_of(tensors(("w", tensor((1000,), (0,))))),
    "one storage as float and double": lambda: _shared("torch\nDoubleStorage"),
    "one storage as float and bytes": lambda: _shared("torch.storage\nUntypedStorage"),
    "one storage with two lengths": lambda: _shared(numel=1),
    "a storage of endless length": lambda: zip_of(tensors(("w", tensor(numel=1 << 200)))),
    "a storage length of four thousand bytes": lambda: zip_of(
        tensors(("w", tensor_of("0", b"\x8b\x00\x10\0\0" + b"\x7f" * 4096, b"K\x00", dims(0), dims(1))))
    ),
    "a storage class of the file": lambda: zip_of(tensors(("w", tensor(kind="os\nsystem")))),
    "a storage class that torch lacks": lambda: zip_of(tensors(("w", tensor(kind="torch\nNoStorage")))),
    "a record that is not there": lambda: zipped(b"\x80\x02" + ONE + b"."),
    "a record with another length": lambda: zipped(b"\x80\x02" + ONE + b".", {"0": bytes(7)}),
    "a record that nothing refers to": lambda: zipped(b"\x80\x02" + ONE + b".", {"0": bytes(8), "9": b"payload"}),
    "a storage that is never filled": lambda: legacy(LEGACY_BODY, b"\x80\x02]."),
    "a storage that is filled twice": lambda: legacy(LEGACY_BODY, b"\x80\x02](" + text("0") * 2 + b"e.") + struct.pack("<q2f", 2, 1, 2) * 2,
    "a length that differs from the pickle's": lambda: legacy(LEGACY_BODY, LEGACY_KEYS) + struct.pack("<q3f", 3, 1, 2, 3),
    "a length that is negative": lambda: legacy(LEGACY_BODY, LEGACY_KEYS) + struct.pack("<q", -1),
    "data beyond the file": lambda: legacy(LEGACY_BODY, LEGACY_KEYS) + struct.pack("<qf", 2, 1),
    "a legacy file that is honest": lambda: OLD,
}  # fmt: skip
NAMES: dict[str, Make] = {
    "1 and text 1": lambda: zip_of(b"}(K\x01" + tensor() + text("1") + tensor() + b"u"),
    "a dot b and a within b": lambda: zip_of(tensors(("a.b", tensors(("w", tensor()))), ("a", tensors(("b", tensors(("w", tensor()))))))),
    "half a surrogate": lambda: zip_of(b"}X\x03\x00\x00\x00\xed\xa0\x80" + tensor() + b"s"),
    "a tensor named metadata": lambda: zip_of(tensors(("__metadata__", tensor()))),
    "an empty name": lambda: zip_of(tensors(("", tensor()))),
    "terminal escapes": lambda: zip_of(tensors(("a\x1b[31mred\x1b]0;title\x07", tensor()))),
    "line breaks": lambda: zip_of(tensors(("a\nerror: b\r\tc\x0b\x85\u2028", tensor()))),
    "text that runs backwards": lambda: zip_of(tensors(("user\u202etxt.exe\u2066", tensor()))),
    "a global with escapes": lambda: zip_of(b"c\x1b[31mos\n" + "\u202esys".encode() + b"\x07\n)R"),
    "metadata with escapes": lambda: safetensor({"__metadata__": {"a\u001b[2J": "\u001b]0;x\u0007"}, "w\u001b[1m": entry()}, FOUR),
    "one key twice": lambda: zip_of(b"}(" + (text("w") + tensor()) * 2 + b"u"),
    "two roots of one name": lambda: zip_of(tensors(("a.b", ONE), ("a", tensors(("b", ONE))))),
}
NESTED: dict[str, Make] = {
    "a pickle within a pickle": lambda: zip_of(tensors(("w", tensor()), ("bytes", b"C" + bytes([len(EVIL) + 1]) + EVIL + b"."))),
    "a pickle after the pickle": lambda: zipped(BESIDE[0] + EVIL + b".", BESIDE[1]),
    "a pickle after a bare one": lambda: b"\x80\x02N.\x80\x02" + EVIL + b".",
    "a payload as the magic number": lambda: b"\x80\x02" + EVIL + b"." + b"".join(LEGACY[1:]) + b"\x80\x02}.\x80\x02].",
    "a payload as the protocol": lambda: LEGACY[0] + b"\x80\x02" + EVIL + b"." + LEGACY[2] + b"\x80\x02}.\x80\x02].",
    "a payload as the system": lambda: LEGACY[0] + LEGACY[1] + b"\x80\x02" + EVIL + b"." + b"\x80\x02}.\x80\x02].",
    "a payload as the list of storages": lambda: legacy(b"\x80\x02}.", b"\x80\x02" + EVIL + b"."),
    "a payload behind a wrong opcode": lambda: zip_of(EVIL + b"\xff"),
    "a payload behind the end": lambda: b"\x80\x02" + EVIL,
    "a zip named as a pickle": lambda: zipped(zip_of(ONE), {"0": bytes(8)}),
}
POLYGLOTS: dict[str, Make] = {
    "safetensors over a zip": _polyglot,
    "a zip behind a pickle": lambda: b"\x80\x02N." + HONEST,
    "a zip behind a legacy file": lambda: OLD + HONEST,
    "a legacy file before a zip's end": lambda: HONEST[:-22] + OLD + HONEST[-22:],
    "two zips": lambda: HONEST + HONEST,
    "HTML before a zip": lambda: b"<!DOCTYPE html>" + HONEST,
    "a script before a zip": lambda: b"#!/bin/sh\ntouch " + MARKER.encode() + b"\n" + HONEST,
    "a zip before safetensors": lambda: HONEST + TENSORS,
    "JSON before a zip": lambda: json.dumps(skeleton()).encode() + HONEST,
    "two pickles of one name": lambda: twice("data.pkl", b"\x80\x02" + EVIL + b"."),
    "two storages of one name": lambda: twice("data/0", bytes(24)),
    "two entries of one place": _renamed,
    "another zip in the comment": lambda: archive(*items(), comment=archive(*items())),
    "bytes behind the end": lambda: archive(*items()) + b"more",
    "bytes behind safetensors": lambda: TENSORS + b"more",
    "bytes behind a legacy file": lambda: OLD + b"more",
}
CHECKSUMS: dict[str, Make] = {
    "no checksums at all": _crc,
    "a wrong checksum of the pickle": lambda: changed("data.pkl", crc=1),
    "a wrong checksum of a deflated pickle": lambda: changed("data.pkl", crc=1, method=8),
    "a wrong checksum of a storage": lambda: changed("data/0", crc=1),
    "a deflated storage": lambda: changed("data/1", method=8),
    "a wrong checksum of a deflated storage": lambda: changed("data/1", method=8, crc=1),
    "a deflated storage that ends early": lambda: changed("data/1", method=8, size=601, local_size=601),
    "a deflated pickle that inflates to more": lambda: changed("data.pkl", method=8, size=10, local_size=10),
    "bytes behind a deflated storage": lambda: changed("data/1", method=8, stray=b"STRAY"),
    "bytes behind a deflated storage without a checksum": lambda: changed("data/1", method=8, stray=b"STRAY", crc=0),
    "bytes behind a deflated pickle": lambda: changed("data.pkl", method=8, stray=b"STRAY"),
    "a deflated storage cut short": lambda: changed("data/1", method=8, cut=3),
    "a deflated storage cut short without a checksum": lambda: changed("data/1", method=8, cut=3, crc=0),
    "a storage without a checksum": lambda: changed("data/0", crc=0),
    "a deflated storage without a checksum": lambda: changed("data/1", method=8, crc=0),
    "a wrong checksum of an entry that torch skips": lambda: changed("version", crc=1),
    "a size that deflate can't reach": lambda: changed("data/0", method=8, size=1 << 20, local_size=1 << 20),
}  # fmt: skip
STRANGERS: dict[str, Make] = {
    "nothing": lambda: b"",
    "a Git LFS pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
    "HTML": lambda: b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n",
    "XML": lambda: b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>\n',
    "text": lambda: b"import this\n",
    "zeros": lambda: bytes(1000),
    "gzip": lambda: b"\x1f\x8b\x08\x00" + bytes(30),
    "tar": lambda: bytes(257) + b"ustar\x0000" + bytes(300),
    "HDF5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(100),
    "an array": lambda: b"\x93NUMPY\x01\x00" + bytes(100),
    "a zip of something": lambda: archive(Item("folder/readme.txt", b"words")),
    "an empty zip": lambda: b"PK\x05\x06" + bytes(18),
    "TorchScript": lambda: archive(*items(), Item("archive/code/model.py", b"1 / 0\n"), Item("archive/constants.pkl", b"\x80\x02).")),
    "big endian": lambda: archive(*(replace(item, data=b"big") if item.name.endswith("byteorder") else item for item in items())),
    "a zip cut in half": lambda: HONEST[: len(HONEST) // 2],
    "a legacy file cut in half": lambda: OLD[: len(OLD) // 2],
    "safetensors cut in half": lambda: TENSORS[: len(TENSORS) // 2],
    "a skeleton cut in half": lambda: json.dumps(skeleton()).encode()[:40],
    "a header length of 2 to the 63": lambda: (1 << 63).to_bytes(8, "little") + b"{}",
    "a header length above the limit": lambda: (100_000_001).to_bytes(8, "little") + b"{}",
    "a header length beyond the file": lambda: (1000).to_bytes(8, "little") + b"{}",
}


def _family(name: str, suffix: str, makers: Mapping[str, Make]) -> dict[str, Make]:
    return {f"{name}/{slug(case)}{suffix}": make for case, make in makers.items()}


def _opcodes(wrap: Callable[[bytes], bytes]) -> dict[str, Make]:
    return {case: lambda make=make: wrap(make(MARKER)) for case, (make, _) in OPCODES.items()}  # type: ignore[misc]


def _bytes(table: Mapping[str, object], make: Callable[[object], bytes]) -> dict[str, Make]:
    return {case: lambda value=value: make(value) for case, value in table.items()}  # type: ignore[misc]


def _legal(changes: object) -> bytes:
    assert isinstance(changes, dict)
    rest = dict(changes)
    return changed(rest.pop("name"), **rest)


# Every file by its name: the family is its folder.
MAKERS: dict[str, Make] = {
    **_family("opcodes-beside-tensors", ".pt", _opcodes(lambda evil: zipped(*state_with(evil)))),
    **_family("opcodes-alone", ".pt", _opcodes(lambda evil: legacy(b"\x80\x02" + evil + b"."))),
    **_family("opcodes-as-storage", ".pt", _opcodes(lambda evil: zip_of(evil + b"Q"))),
    **_family("nested", ".pt", NESTED),
    **_family("bombs", ".pt", {case: lambda make=make: zipped(make()) for case, make in BOMBS.items()}),  # type: ignore[misc]
    **_family("storages", ".pt", STORAGES),
    **_family("names", ".pt", NAMES),
    **_family("zip-lies", ".pt", _bytes(LIES, lambda lie: changed("data/0", **lie))),  # type: ignore[arg-type]
    **_family("zip-ends", ".pt", _bytes(ENDS, lambda end: archive(*items(), **end))),  # type: ignore[arg-type]
    **_family("zip-legal", ".pt", _bytes(LEGAL, _legal)),
    **_family("polyglots", ".pt", POLYGLOTS),
    **_family("replaced", ".pt", REPLACED),
    **_family("codecs", ".pt", CODECS),
    **_family("spellings", ".pt", SPELLINGS),
    **_family("tars", ".pt", TARS),
    **_family("checksums", ".pt", CHECKSUMS),
    **_family("safetensors", ".safetensors", _bytes(HEADERS, lambda case: safetensor(*case))),  # type: ignore[misc]
    **_family("skeletons", ".json", _bytes(SKELETONS, lambda value: json.dumps(value).encode())),
    **_family("strangers", ".pt", STRANGERS),
}


def shards(folder: Path, weight_map: object) -> Path:
    """A folder with shards `one` and `two`, much that is none, and an index that may lie; the index."""
    folder.mkdir()
    (folder / "below").mkdir()
    one = safetensor({"a": entry(), "b": entry(4, 8)}, FOUR * 2)
    two = safetensor({"c": entry()}, FOUR)
    for path, data in ((folder / "one", one), (folder / "two", two), (folder / "below" / "two", two), (folder.parent / "outside", two)):
        path.with_suffix(".safetensors").write_bytes(data)
    (folder / "outside").symlink_to(folder.parent / "outside.safetensors")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "chain").symlink_to("outside")
    (folder / "garbage").write_bytes(b"garbage of some length")
    (folder / "net.json").write_text(json.dumps(skeleton(tensors=[{"name": "c", "dtype": "F32", "shape": [1]}])))
    os.mkfifo(folder / "pipe")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _link(path: Path, to: str) -> Path:
    path.symlink_to(to)
    return path


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


# What is no file, or more than one: made at a path, by the same kind of name.
PLACES: dict[str, Callable[[Path], Path]] = {
    "places/a-fifo": _fifo,
    "places/a-link-to-dev-zero": lambda path: _link(path, "/dev/zero"),
    "places/a-link-to-dev-null": lambda path: _link(path, "/dev/null"),
    "places/a-link-to-itself": lambda path: _link(path, path.name),
    "places/a-link-to-nothing": lambda path: _link(path, "nowhere"),
    "places/an-empty-folder": _folder,
    "places/a-missing-file": lambda path: path,
    **{f"indexes/{slug(case)}": lambda path, case=case: shards(path, INDEXES[case]) for case in INDEXES},  # type: ignore[misc]
}


def make(name: str, folder: Path) -> Path:
    """The hostile thing of a name: the file that is kept, or one made in `folder`."""
    kept = FILES / name
    if kept.exists():
        return kept
    if name in PLACES:
        return PLACES[name](folder / slug(name))
    path = folder / name.replace("/", "-")
    path.write_bytes(MAKERS[name]())
    return path


def stories() -> list[list[str]]:
    """The rows of the table: name, outcome of reading, verdict of `check`, story."""
    lines = STORIES.read_text().splitlines()
    assert lines[0] == "file\toutcome\tcheck\tstory"
    return [line.split("\t") for line in lines[1:]]


def main() -> None:
    """Write the small files anew, and take away those that have no maker."""
    for path in FILES.rglob("*"):
        if path.is_file() and path.relative_to(FILES).as_posix() not in MAKERS:
            path.unlink()
    kept = 0
    for name, maker in MAKERS.items():
        data = maker()
        if len(data) <= KEPT:
            (FILES / name).parent.mkdir(parents=True, exist_ok=True)
            (FILES / name).write_bytes(data)
            kept += 1
    print(f"{kept} files kept, {len(MAKERS) - kept} too large, {len(PLACES)} that are no file")


if __name__ == "__main__":
    sys.exit(main())
