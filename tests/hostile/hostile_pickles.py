"""Pickles that want to run something, or to cost something, and the files around them; made byte by byte, without torch.

Payloads are harmless: each only makes a marker file. `python -m pickletools` reads any of them.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable

HERE = "hostile_marker"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(name: str) -> bytes:
    """GLOBAL."""
    return f"c{HERE}\n{name}\n".encode()


# Each leaves one value on the stack.
OPCODES: dict[str, tuple[Callable[[str], bytes], str]] = {
    "GLOBAL REDUCE": (lambda path: named("mark") + b"(" + text(path) + b"tR", "mark"),
    "GLOBAL TUPLE1 REDUCE": (lambda path: named("mark") + text(path) + b"\x85R", "mark"),
    "STACK_GLOBAL": (lambda path: text(HERE) + text("mark") + b"\x93" + text(path) + b"\x85R", "mark"),
    "STACK_GLOBAL from the memo": (
        lambda path: text(HERE) + b"q\x000" + text("mark") + b"q\x010h\x00h\x01\x93" + text(path) + b"\x85R", "mark"),
    "INST": (lambda path: b"(" + text(path) + f"i{HERE}\nmark\n".encode(), "mark"),
    "OBJ": (lambda path: b"(" + named("mark") + text(path) + b"o", "mark"),
    "NEWOBJ": (lambda path: named("Marker") + text(path) + b"\x85\x81", "Marker"),
    "NEWOBJ_EX": (lambda path: named("Marker") + b")}" + text("path") + text(path) + b"s\x92", "Marker"),
    "BUILD": (lambda path: named("Marker") + b")\x81" + text(path) + b"b", "Marker"),
    "APPEND": (lambda path: named("Marker") + b")\x81" + text(path) + b"a", "Marker"),
    "APPENDS": (lambda path: named("Marker") + b")\x81(" + text(path) + b"e", "Marker"),
    "SETITEM": (lambda path: named("Marker") + b")\x81" + text("k") + text(path) + b"s", "Marker"),
    "SETITEMS": (lambda path: named("Marker") + b")\x81(" + text("k") + text(path) + b"u", "Marker"),
    "EXT1": (lambda path: b"\x82\xf0" + text(path) + b"\x85R", "copyreg.extension_240"),
    "EXT2": (lambda path: b"\x83\xf1\x00" + text(path) + b"\x85R", "copyreg.extension_241"),
    "EXT4": (lambda path: b"\x84\xf2\x00\x00\x00" + text(path) + b"\x85R", "copyreg.extension_242"),
    "REDUCE of a REDUCE": (lambda path: b"cbuiltins\ngetattr\n" + b"c" + f"{HERE}\nPath\n".encode() + text("write_text") + b"\x86R"
                           + b"c" + f"{HERE}\nPath\n".encode() + text(path) + b"\x85R" + text("ran") + b"\x86R", "builtins.getattr"),
    "exec": (lambda path: b"cbuiltins\nexec\n" + text(f"open({path!r}, 'w').close()") + b"\x85R", "builtins.exec"),
    "eval, as Python 2 named it": (lambda path: b"c__builtin__\neval\n" + text(f"open({path!r}, 'w').close()") + b"\x85R", "builtins.eval"),
    "os.system": (lambda path: b"cposix\nsystem\n" + text(f"touch '{path}'") + b"\x85R", "posix.system"),
    "dotted name": (lambda path: b"\x80\x04" + text("os") + text("path.os.system") + b"\x93" + text(f"touch '{path}'") + b"\x85R",
                    "os.path.os.system"),
    "map": (lambda path: b"cbuiltins\nlist\ncbuiltins\nmap\n" + named("mark") + text(path) + b"\x85\x86R\x85R", "builtins.map"),
    "in a key": (lambda path: b"}" + named("mark") + text(path) + b"\x85R" + b"Ns", "mark"),
    "torch's own runner": (
        lambda path: b"\x80\x04" + text("torch.serialization") + text("os.system")
        + b"\x93" + text(f"touch '{path}'") + b"\x85R", "torch.serialization.os.system"),
    "rebuilt by a function of the file": (
        lambda path: b"ctorch._tensor\n_rebuild_from_type_v2\n(" + named("mark") + b"ctorch\nTensor\n" + text(path) + b"\x85}tR", "mark"),
}  # fmt: skip


def zipped(pickled: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch zip around a pickle."""
    buffer = io.BytesIO()
    entries = {
        "data.pkl": pickled,
        "byteorder": b"little",
        **{f"data/{name}": data for name, data in (records or {}).items()},
        "version": b"3\n",
    }
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data, compression)  # without the time of day
    return buffer.getvalue()


LEGACY = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",  # the magic number
    b"\x80\x02M\xe9\x03.",  # the protocol
    b"\x80\x02}(" + text("protocol_version") + b"M\xe9\x03" + text("little_endian") + b"\x88" + text("type_sizes") + b"}u.",
)


def legacy(pickled: bytes, keys: bytes = b"\x80\x02].") -> bytes:
    """A legacy file around a pickle."""
    return b"".join(LEGACY) + pickled + keys


def state_with(value: bytes) -> tuple[bytes, dict[str, bytes]]:
    """A pickle of {"w": a tensor, "evil": value}, and its storage."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x02tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + text("w") + tensor + b"s" + text("evil") + value + b"s.", {"0": bytes(8)}


def tensor_of(storage: str, numel: bytes, offset: bytes, shape: bytes, stride: bytes, kind: str = "torch\nFloatStorage") -> bytes:
    reference = b"(" + text("storage") + f"c{kind}\n".encode() + text(storage) + text("cpu") + numel + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + offset + shape + stride + b"\x89NtR"


def long(number: int) -> bytes:
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def dims(*numbers: int) -> bytes:
    return b"(" + b"".join(map(long, numbers)) + b"t"


def _deep(op: bytes, count: int, end: bytes = b"") -> bytes:
    return b"\x80\x04" + op * count + end + b"."


MEGABYTE = 1_000_000
# A story each: what one megabyte, or less, tries to cost.
BOMBS: dict[str, Callable[[], bytes]] = {
    "200,000 nested tuples": lambda: b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "nested tuples as a key": lambda: b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
    "nested lists": lambda: b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "nested dicts": lambda: b"\x80\x02" + b"}K\x01" * 200_000 + b"N" + b"s" * 200_000 + b".",
    "nested marks": lambda: b"\x80\x02" + b"(" * MEGABYTE + b".",
    "a tuple that doubles thirty times": lambda: b"\x80\x02)" + b"\x942\x86" * 30 + b".",
    "a list that doubles, in a dict": lambda: b"\x80\x02}K\x01]" + b"q\x010](h\x01h\x01e" * 60 + b"s.",
    "a list in itself": lambda: b"\x80\x02]q\x00h\x00a.",
    "calls of calls": lambda: b"\x80\x02cos\nsystem\n" + b")R" * 400_000 + b".",
    "stand-ins in stand-ins": lambda: b"\x80\x02cos\nsystem\nq\x000N" + b"\x85q\x01" + b"0h\x00h\x01R\x85q\x01" * 90_000 + b".",
    "rebuilds in rebuilds": lambda: b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x000ctorch\nTensor\nq\x010)q\x020"
    + b"(h\x00h\x01h\x02}tq\x020" * 60_000 + b"h\x00h\x02R.",
    "LONG1": lambda: b"\x80\x02" + b"\x8a\xff" + b"\xff" * 255 + b".",
    "LONG4 of a megabyte": lambda: b"\x80\x02\x8b" + struct.pack("<I", MEGABYTE) + b"\x7f" * MEGABYTE + b".",
    "LONG4 that is negative": lambda: b"\x80\x02\x8b\xff\xff\xff\xff.",
    "INT of a megabyte": lambda: b"\x80\x02I" + b"9" * MEGABYTE + b"\n.",
    "LONG of 5,000 digits": lambda: b"\x80\x02L" + b"9" * 4090 + b"9" * 910 + b"L\n.",
    "many longs": lambda: b"\x80\x02" + (b"\x8b" + struct.pack("<I", 4096) + b"\x7f" * 4096 + b"0") * 240 + b"N.",
    "integers of one hash": lambda: b"\x80\x02}("
    + b"".join(b"\x8a\x0c" + ((number << 61) - number).to_bytes(12, "little") + b"N" for number in range(1, 65_000)) + b"u.",
    "tuples of one hash": lambda: b"\x80\x02}(" + b"".join(b"G" + struct.pack(">d", number) + b"\x85N" for number in range(80_000)) + b"u.",
    "a huge memo": lambda: b"\x80\x02N" + b"\x94" * MEGABYTE + b".",
    "memo places far apart": lambda: b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", number << 14) for number in range(200_000)) + b".",
    "a long name, again and again": lambda: b"\x80\x04" + text("m" * 500_000)
    + b"q\x000" + text("n") + b"q\x01" + b"h\x00h\x01\x93" * 90_000 + b".",
    "a long text through a set": lambda: b"\x80\x04cbuiltins\nset\nq\x000" + text("m" * 500_000) + b"\x85q\x010"
    + b"h\x00h\x01R0" * 80_000 + b"N.",
    "a long list through a set": lambda: b"\x80\x04cbuiltins\nset\nq\x000](" + b"N" * 400_000 + b"e\x85q\x010"
    + b"h\x00h\x01R0" * 80_000 + b"N.",
    "a dict from a list, again and again": lambda: b"\x80\x04ccollections\nOrderedDict\nq\x000]("
    + b"".join(b"M" + struct.pack("<H", number) + b"N\x86" for number in range(60_000)) + b"e\x85q\x010" + b"h\x00h\x01R0" * 90_000 + b"N.",
    "a long text through torch.device": lambda: b"\x80\x04ctorch\ndevice\nq\x000" + text("m" * 400_000) + b"\x85q\x010"
    + b"h\x00h\x01R0" * 90_000 + b"N.",
    "a tensor of 64 dimensions, again and again": lambda: b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\nq\x000((" + text("storage")
    + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x00tQK\x00(" + b"K\x00" * 64 + b"t(" + b"K\x00" * 64 + b"ttq\x010"
    + b"h\x00h\x01R0" * 140_000 + b"N.",
    "a long key above many values": lambda: b"\x80\x02}" + text("k" * 500_000) + b"}(" + b"".join(
        b"M" + struct.pack("<H", number) + b"N" for number in range(60_000)) + b"us.",
    "one value under many keys": lambda: b"\x80\x02}q\x00(" + b"".join(
        b"M" + struct.pack("<H", number) + b"h\x00" for number in range(60_000)) + b"u.",
    "frames in frames": lambda: b"\x80\x04" + b"".join(b"\x95" + struct.pack("<Q", 9 * number) for number in reversed(range(100_000)))
    + b"N.",
    "BINBYTES8 of all there is": lambda: b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "BINUNICODE of all there is": lambda: b"\x80\x04X\xff\xff\xff\xff.",
    "only dicts": lambda: _deep(b"}", MEGABYTE),
    "only sets": lambda: _deep(b"\x8f", MEGABYTE),
    "only globals": lambda: _deep(b"ca\nb\n", 190_000),
    "only many globals": lambda: b"\x80\x02" + b"".join(b"ca\n%d\n0" % number for number in range(100_000)) + b"N.",
    "pop below the bottom": lambda: b"\x80\x020.",
    "mark popped": lambda: b"\x80\x02(1.",
    "nothing": lambda: b"\x80\x02.",
    "two values left": lambda: b"\x80\x02NN.",
    "protocol 9": lambda: b"\x80\x09N.",
    "unknown opcode": lambda: b"\x80\x02\xffN.",
    "out-of-band buffer": lambda: b"\x80\x05\x97.",
    "a dict's key twice": lambda: b"\x80\x02}(K\x01NK\x01Nu.",
    "a list as a key": lambda: b"\x80\x02}]Ns.",
    "items without values": lambda: b"\x80\x02}(Nu.",
    "a text without quotes": lambda: b"\x80\x02Sabc\n.",
    "half a surrogate": lambda: b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80Ns.",
    "not UTF-8": lambda: b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "a global named by a number": lambda: b"\x80\x04K\x01K\x02\x93.",
    "a call with a list": lambda: b"\x80\x02cos\nsystem\n]R.",
    "a memo place that is empty": lambda: b"\x80\x02h\x07.",
}  # fmt: skip
