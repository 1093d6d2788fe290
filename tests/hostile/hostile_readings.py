"""Files that two readers, or torch and a careless reader, would take for different weights; made byte by byte, without torch."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

from hostile_json import FOUR, entry, safetensor
from hostile_pickles import LEGACY, legacy, text, zipped
from hostile_zips import OTHER, Item, archive, at, items

TWO, OTHERS = struct.pack("<2f", 1, 2), struct.pack("<2f", 3, 4)
_HOOKS = b"ccollections\nOrderedDict\n)R"


def storage(key: str = "0", kind: str = "FloatStorage", view: bytes = b"") -> bytes:
    """A reference to a storage of two elements; in the old format it ends with a view, or with None."""
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + b"K\x02" + view + b"tQ"


def tensor(where: bytes, metadata: bytes = b"", length: bytes = b"K\x02") -> bytes:
    """A tensor of a storage's first elements."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + where + b"K\x00" + length + b"\x85K\x01\x85\x89" + _HOOKS + metadata + b"tR"


ONE, TWICE = tensor(storage()), tensor(storage("1"))


def _pickle(value: bytes, beside: bytes = b"") -> bytes:
    return zipped(b"\x80\x02}(" + text("v") + TWICE + beside + text("w") + value + b"u.", {"0": TWO, "1": OTHERS})


def _parameter(state: bytes) -> bytes:
    return b"ctorch._utils\n_rebuild_parameter_with_state\n(" + ONE + b"\x89" + _HOOKS + state + b"tR"


def _dict(name: str, value: bytes) -> bytes:
    return b"}" + text(name) + value + b"s"


def _lazy(bit: str, kind: str = "FloatStorage", value: bytes = b"\x88") -> bytes:
    where = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text("2") + text("cpu") + b"K\x02tQ"
    sizes = {"BoolStorage": 1, "FloatStorage": 4, "LongStorage": 8}
    return zipped(b"\x80\x02" + _dict("w", tensor(where, _dict(bit, value))) + b".", {"2": bytes(2 * sizes[kind])})


def _old(*references: tuple[str, bytes]) -> bytes:
    """A legacy file of a tensor over each storage, or view of one."""
    tensors = b"".join(
        text(f"t{number}") + tensor(storage(key, view=view), length=b"K\x01") for number, (key, view) in enumerate(references)
    )
    keys = dict.fromkeys(key for key, _ in references)
    data = b"".join(struct.pack("<q2f", 2, int(key), int(key) + 1) for key in keys)
    return legacy(b"\x80\x02}(" + tensors + b"u.", b"\x80\x02](" + b"".join(map(text, keys)) + b"e.") + data


def _view(key: str, offset: int) -> bytes:
    return text(key) + b"K%c" % offset + b"K\x01\x87"


REPLACED: dict[str, Callable[[], bytes]] = {
    "a storage built into a tensor": lambda: _pickle(ONE + b"(" + storage("1") + b"K\x00K\x02\x85K\x01\x85tb"),
    "another tensor built into a Parameter": lambda: _pickle(_parameter(b"N") + b"(" + TWICE + b"N" + _HOOKS + b"\x89\x89tb"),
    "a Parameter with other data": lambda: _pickle(_parameter(_dict("data", TWICE))),
    "a Parameter with other data in its slots": lambda: _pickle(_parameter(b"N" + _dict("data", TWICE) + b"\x86")),
    "a Parameter that writes over its storage": lambda: _pickle(_parameter(_dict("real", TWICE))),
    "a tensor of a type, with other data": lambda: _pickle(
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\nctorch\nTensor\n(" + storage()
        + b"K\x00K\x02\x85K\x01\x85\x89" + _HOOKS + b"t" + _dict("data", TWICE) + b"tR"),
    "a Counter of pairs": lambda: _pickle(ONE, text("c") + b"ccollections\nCounter\n](" + text("w") + TWICE + b"\x86e\x85R"),
    "an OrderedDict that hides its keys": lambda: zipped(
        b"\x80\x02" + _HOOKS + text("w") + ONE + b"s" + _dict("keys", b"ctorch\nSize\n") + b"b.", {"0": TWO}),
    "a length in octal": lambda: _pickle(tensor(storage(), length=b"I02\n")),
    "memo places that differ in the 21st digit": lambda: _pickle(
        b"g1" + b"0" * 20 + b"\n", text("a") + ONE + b"p1" + b"0" * 20 + b"\n" + text("b") + TWICE + b"p1" + b"0" * 19 + b"1\n"),
    "a view's key used for two views": lambda: _old(("0", _view("9", 0)), ("0", _view("9", 1))),
    "a view's key that is a storage's": lambda: _old(("0", _view("1", 0)), ("1", b"N")),
    "views of a storage that are honest": lambda: _old(("0", _view("8", 0)), ("0", _view("9", 1)), ("0", b"N")),
    "a conjugate of real numbers": lambda: _lazy("conj"),
    "a negation of truths": lambda: _lazy("neg", "BoolStorage"),
    "a negation that is false": lambda: _lazy("neg", value=b"\x89"),
    "a negation that is honest": lambda: _lazy("neg"),
}  # fmt: skip


def _encoded(codec: str, *more: bytes) -> bytes:
    return _pickle(ONE, text("raw") + b"c_codecs\nencode\n(" + text("abc") + text(codec) + b"".join(more) + b"tR")


ODD_CODECS = ("rot13", "hex", "zlib", "idna", "unicode_escape", "LATIN1", "latin-1", "utf8")
CODECS: dict[str, Callable[[], bytes]] = {
    **{codec: lambda codec=codec: _encoded(codec) for codec in ODD_CODECS},  # type: ignore[misc]
    "a module of the current folder": lambda: _encoded("..evil"),
    "what to do on errors": lambda: _encoded("latin1", text("ignore")),
    "no codec": lambda: _pickle(ONE, text("raw") + b"c_codecs\nencode\n" + text("abc") + b"\x85R"),
    "text that the codec can't spell": lambda: _pickle(ONE, text("raw") + b"c_codecs\nencode\n(" + text("\u0416") + text("latin1") + b"tR"),
    "latin1, which is honest": lambda: _encoded("latin1"),
    "utf-8, which is honest": lambda: _encoded("utf-8"),
}  # fmt: skip


def _named(name: str, data: bytes, instead: str = "") -> bytes:
    """The honest archive with one entry more, or with one renamed."""
    return archive(*(item for item in items() if not instead or not item.name.endswith(instead)), Item(name, data))


def _in_folder(folder: str) -> bytes:
    return archive(*(replace(item, name=item.name.replace("archive", folder, 1)) for item in items()))


PICKLE = items()[at("data.pkl")].data
SPELLINGS: dict[str, Callable[[], bytes]] = {
    "a second pickle in capitals": lambda: _named("archive/DATA.PKL", PICKLE),
    "the pickle in capitals only": lambda: _named("archive/Data.pkl", PICKLE, "data.pkl"),
    "a second storage in capitals": lambda: _named("archive/DATA/0", OTHER),
    "a second byte order": lambda: _named("archive/BYTEORDER", b"big"),
    "a byte order in capitals only": lambda: _named("archive/ByteOrder", b"big", "byteorder"),
    "a second version": lambda: _named("archive/Version", b"9\n"),
    "a version in capitals only": lambda: _named("archive/VERSION", b"9\n", "version"),
    "two serialization ids": lambda: archive(
        *items(), Item("archive/.data/serialization_id", b"1"), Item("archive/.DATA/serialization_id", b"2")),
    "two spellings of what nobody reads": lambda: archive(*items(), Item("archive/extra/a", b"1"), Item("archive/extra/A", b"2")),
    "a folder in two spellings": lambda: _named("Archive/data.pkl", PICKLE),
    "a folder above": lambda: _in_folder(".."),
    "the folder itself": lambda: _in_folder("."),
    "no folder's name": lambda: _in_folder(""),
    "a way up within": lambda: _named("archive/../data.pkl", PICKLE),
    "a way round within": lambda: _named("archive/./data/0", OTHER),
    "an empty part within": lambda: _named("archive//data.pkl", PICKLE),
    "folders of their own, which are honest": lambda: archive(Item("archive/", b""), Item("archive/data/", b""), *items()),
}  # fmt: skip


def as_tar(data: bytes) -> bytes:
    """The same with the sum that tar wants at its place, among 512 bytes that are filler there."""
    head = bytearray(data[:512])
    head[148:156] = b" " * 8
    head[148:156] = b"%07o " % sum(head)
    return bytes(head) + data[512:]


def _filled_system() -> bytes:
    return LEGACY[2].replace(b"}(", b"}(" + text(" " * 600) + b"N", 1)


OLD = _old(("0", b"N"))
TARS: dict[str, Callable[[], bytes]] = {
    "a tar header in a legacy file": lambda: as_tar(OLD.replace(LEGACY[2], _filled_system())),
    "a tar header in safetensors": lambda: as_tar(safetensor({"__metadata__": {"a": " " * 600}, "w": entry()}, FOUR)),
    "a tar header in a zip": lambda: as_tar(
        archive(replace(items()[0], local_extra=struct.pack("<2H", 0x5A5A, 600) + b" " * 600), *items()[1:])),
    "a tar header in a skeleton": lambda: as_tar(b'{"a": "' + b" " * 600 + b'"}'),
    "a legacy file with room for one": lambda: OLD.replace(LEGACY[2], _filled_system()),
}  # fmt: skip
