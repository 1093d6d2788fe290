"""Files of one megabyte that try to cost much: memory, time, or output. A story each, in the name. `cost` measures what they come to.

Measured as a person pays it: the real program, in a process of its own.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostile_json import safetensor
from hostile_pickles import BOMBS, dims, legacy, tensor_of, text, zipped

ROOT = Path(__file__).parents[2]
FOLDER_OF_SHARDS = "indexes: "  # begins the names of what is a folder
Make = Callable[[], bytes]
REF = tensor_of("0", b"K\x02", b"K\x00", dims(2), dims(1))


def within(body: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """A torch zip whose pickle is `body`, in which `h\\x01` is a tensor."""
    return zipped(b"\x80\x02" + REF + b"q\x010" + body + b".", {"0": bytes(8)}, method)


def named(*pairs: tuple[str, bytes]) -> bytes:
    """A dict from texts to what opcodes leave."""
    return b"}(" + b"".join(text(key) + value for key, value in pairs) + b"u"


def numbered(first: int, count: int, value: bytes = b"h\x01") -> bytes:
    """A dict from numbers to one value each."""
    return b"}(" + b"".join(b"J" + struct.pack("<i", first + index) + value for index in range(count)) + b"u"


def named_global(number: int) -> bytes:
    return f"ca\n{number:x}\n".encode()


def beside(body: bytes) -> bytes:
    """One tensor, and a list of something beside it."""
    return within(named(("w", b"h\x01"), ("x", b"](" + body + b"e")))


def empty(names: Sequence[str], shape: Sequence[int] = (0,)) -> bytes:
    """A safetensors file of empty tensors."""
    row = {"dtype": "U8", "shape": list(shape), "data_offsets": [0, 0]}
    return safetensor(json.dumps(dict.fromkeys(names, row), separators=(",", ":")).encode())


def filled(names: Sequence[str]) -> bytes:
    """A safetensors file of tensors of two elements."""
    rows = {name: {"dtype": "U8", "shape": [2], "data_offsets": [2 * index, 2 * index + 2]} for index, name in enumerate(names)}
    return safetensor(json.dumps(rows, separators=(",", ":")).encode(), bytes(2 * len(names)))


def own_tensors(count: int, kind: str = "torch\nByteStorage", far: bool = False) -> bytes:
    """Tensors of their own over one storage, each in as few bytes as opcodes allow."""
    place = b"(" + text("storage") + f"c{kind}\n".encode() + text("0") + text("cpu") + b"M\xff\xfftQq\x03"
    head = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x020" + place + b"0K\x01\x85q\x040N0}("
    rows = (
        b"J" + struct.pack("<i", index) + b"h\x02(h\x03M" + struct.pack("<H", index % 60_000 if far else 0) + b"M\xff\x0f\x85h\x04\x89NtR"
        for index in range(count)
    )
    return zipped(head + b"".join(rows) + b"u.", {"0": bytes(65_535)})


def metadata_of_many() -> bytes:
    """A `_metadata` whose paths share one dict of many entries."""
    local = b"}(" + b"".join(text(str(number)) + b"K\x01" for number in range(40_000)) + b"uq\x020"
    paths = b"}(" + b"".join(text(f"m{number}") + b"h\x02" for number in range(40_000)) + b"u"
    body = b"ccollections\nOrderedDict\n)R(" + text("w") + b"h\x01u" + local + b"}" + text("_metadata") + paths + b"sb"
    return within(body)


WIDE = "\U0001f600"
COSTS: dict[str, Make] = {
    "pickle: one tensor under 160,000 keys": lambda: within(numbered(70_000, 140_000)),
    "pickle: the same, deflated": lambda: within(numbered(70_000, 140_000), zipfile.ZIP_DEFLATED),
    "pickle: one tensor under as many keys as are allowed": lambda: within(numbered(70_000, 19_900)),
    "pickle: as many tensors as are allowed": lambda: own_tensors(19_900),
    "pickle: overlapping tensors": lambda: own_tensors(19_900, far=True),
    "pickle: 43,000 tensors in 23 bytes each": lambda: own_tensors(40_000),
    "pickle: 70,000 roots of one long key": lambda: within(text("k" * 500_000) + b"q\x020](" + b"}h\x02h\x01s" * 70_000 + b"e"),
    "pickle: 140,000 roots of a short key": lambda: within(text("k") + b"q\x020](" + b"}h\x02h\x01s" * 140_000 + b"e"),
    "pickle: 6,000 roots": lambda: within(text("k") + b"q\x020](" + b"}h\x02h\x01s" * 6_000 + b"e"),
    "pickle: a place of wide letters above many": lambda: within(b"}" + text(WIDE * 60_000) + numbered(0, 16) + b"s"),
    "pickle: a key of 450,000 numbers": lambda: within(named(("1." * 450_000, b"h\x01"), ("w", b"h\x01"))),
    "pickle: 1,000 keys of 450 numbers": lambda: within(named(*(("1." * 450 + str(index), b"h\x01") for index in range(1000)))),
    "pickle: one long key among 10,000": lambda: within(
        named(("k" * 700_000, b"h\x01"), *((f"{index:x}", b"h\x01") for index in range(10_000)))
    ),
    "pickle: a key of braces": lambda: within(named(("{" * 900_000, b"h\x01"), ("w.", b"h\x01"))),
    "pickle: a key of dots": lambda: within(named(("." * 900_000, b"h\x01"), ("w", b"h\x01"))),
    "pickle: a key of digits": lambda: within(named(("7" * 900_000, b"h\x01"), ("w", b"h\x01"))),
    "pickle: a key of wrappers": lambda: within(named(("module." * 120_000, b"h\x01"), ("w", b"h\x01"))),
    "pickle: keys of ever more wrappers": lambda: within(named(*(("module." * index + "w", b"h\x01") for index in range(500)))),
    "pickle: 15,000 keys of one long prefix": lambda: within(
        named(*(("a.b.c.d.e.f.g.h." * 3 + f"{index:x}", b"h\x01") for index in range(15_000)))
    ),
    "pickle: 450,000 times one list beside": lambda: beside(b"]q\x02" + b"h\x02" * 450_000),
    "pickle: 900,000 lists beside": lambda: beside(b"]" * 900_000),
    "pickle: 900,000 dicts beside": lambda: beside(b"}" * 900_000),
    "pickle: 110,000 lists with a list beside": lambda: beside(b"]]a" * 110_000),
    "pickle: 240,000 dicts with one key": lambda: zipped(b"\x80\x02(" + b"}NNs" * 240_000 + b"t."),
    "pickle: 120,000 dicts with one key": lambda: zipped(b"\x80\x02(" + b"}NNs" * 120_000 + b"t."),
    "pickle: 490,000 lists and their memo": lambda: zipped(b"\x80\x02(" + b"]\x94" * 490_000 + b"t."),
    "pickle: 490,000 tuples": lambda: zipped(b"\x80\x02(" + b"N\x85" * 490_000 + b"t."),
    "pickle: 230,000 stand-ins beside": lambda: beside(b"cos\nsystem\nq\x02" + b"h\x02)R" * 230_000),
    "pickle: 130,000 refused values": lambda: within(
        named(("w", b"h\x01")) + b"cos\nsystem\n)Rq\x020" + numbered(70_000, 130_000, b"h\x02")[1:]
    ),
    "pickle: 19,000 refused values of a long name": lambda: within(
        named(("w", b"h\x01")) + b"c" + b"m" * 990 + b"\nn\n)Rq\x020" + numbered(70_000, 19_000, b"h\x02")[1:]
    ),
    "pickle: 110,000 globals": lambda: beside(b"".join(named_global(number) for number in range(110_000))),
    "pickle: 9,900 globals": lambda: beside(b"".join(named_global(number) for number in range(9_900))),
    "pickle: long names put together from two": lambda: beside(
        b"".join(text("m" * 450 + str(place)) + b"r" + struct.pack("<I", place) + b"0" for place in range(250))
        + b"".join(bytes((104, one, 104, other, 0x93)) for one in range(250) for other in range(250))
    ),
    "pickle: a long tuple handed to calls": lambda: beside(
        b"cos\nsystem\nq\x020(" + b"N" * 400_000 + b"tq\x030N" + b"h\x02h\x03R0" * 90_000
    ),
    "pickle: a long tuple handed to NEWOBJ_EX": lambda: beside(
        b"cos\nsystem\nq\x020(" + b"N" * 400_000 + b"tq\x030}q\x040N" + b"h\x02h\x03h\x04\x920" * 70_000
    ),
    "pickle: a shared _metadata": metadata_of_many,
    "pickle: extra states that share a list": lambda: within(
        b"]("
        + b"K\x01" * 300_000
        + b"eq\x020"
        + named(("w", b"h\x01"), *((f"{index:x}._extra_state", b"h\x02") for index in range(15_000)))
    ),
    "pickle: stride 0": lambda: within(named(("w", tensor_of("0", b"K\x02", b"K\x00", dims(1 << 27), dims(0))))),
    "pickle: a place of 52 long names": lambda: within(
        b"".join(b"}" + text("a" * 10_000) for _ in range(52)) + named(("w", b"h\x01")) + b"s" * 52
    ),
    "zip: 7,000 entries": lambda: zipped(b"\x80\x02" + REF + b".", {**{f"{index:x}": b"" for index in range(1, 7000)}, "0": bytes(8)}),
    "zip: 6,000 named storages": lambda: zipped(
        b"\x80\x02}("
        + b"".join(b"J" + struct.pack("<i", index) + tensor_of(f"{index:x}", b"K\x00", b"K\x00", dims(0), dims(1)) for index in range(2800))
        + b"u.",
        {f"{index:x}": b"" for index in range(2800)},
    ),
    "zip: a deflated pickle that says 256 MB": lambda: zipped(b"\x80\x02" + b"]" * (1 << 28) + b".", None, zipfile.ZIP_DEFLATED),
    "zip: a deflated pickle of a megabyte of lists": lambda: zipped(b"\x80\x02" + b"]" * 1_040_000 + b".", None, zipfile.ZIP_DEFLATED),
    "legacy: 900,000 marks": lambda: legacy(b"\x80\x02" + b"(" * 900_000 + b"."),
    "legacy: 300,000 storages listed": lambda: legacy(b"\x80\x02}.", b"\x80\x02](" + text("0") * 150_000 + b"e."),
    "legacy: many storages": lambda: (
        legacy(
            b"\x80\x02}("
            + b"".join(
                b"J"
                + struct.pack("<i", index)
                + b"("
                + text("storage")
                + b"ctorch\nFloatStorage\n"
                + text(f"{index:x}")
                + text("cpu")
                + b"K\x00NtQ"
                for index in range(12_000)
            )
            + b"u.",
            b"\x80\x02](" + b"".join(text(f"{index:x}") for index in range(12_000)) + b"e.",
        )
        + bytes(8 * 12_000)
    ),
    "safetensors: 18,500 tensors": lambda: empty([f"{index:x}" for index in range(18_500)]),
    "safetensors: 18,500 that overlap": lambda: safetensor(
        {f"{index:x}": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} for index in range(14_000)}, b"\0"
    ),
    "safetensors: 64 dimensions each": lambda: empty([f"{index:x}" for index in range(5_500)], [0] * 64),
    "safetensors: one long name among 10,000": lambda: empty(["k" * 400_000, *(f"{index:x}" for index in range(10_000))]),
    "safetensors: a name of 470,000 numbers": lambda: empty(["1." * 470_000, "w"]),
    "safetensors: 2,000 names of 200 numbers": lambda: empty(["1." * 200 + str(index) for index in range(2_000)]),
    "safetensors: names of one long prefix": lambda: empty(["a." * 100 + str(index) for index in range(3_500)]),
    "safetensors: names that fold in two ways": lambda: empty([f"{index // 100}.{index * index % 9973}.w" for index in range(16_000)]),
    "safetensors: a name of wide letters": lambda: empty([WIDE * 80_000]),
    "safetensors: 85,000 metadata": lambda: safetensor({"__metadata__": {f"{index:x}": "" for index in range(75_000)}}),
    "safetensors: 330,000 lists": lambda: safetensor(b'{"a":[' + b"[]," * 330_000 + b"[]]}"),
    "safetensors: numbers of 4,300 digits": lambda: safetensor(b'{"a":[' + (b"9" * 4300 + b",") * 230 + b"1]}"),
    "safetensors: depth": lambda: safetensor(b'{"a":' + b"[" * 500_000 + b"]" * 490_000 + b"}"),
    "safetensors: depth within other depth": lambda: safetensor(b'{"a":[' + (b"[" * 900 + b"]" * 900 + b",") * 500 + b"1]}"),
    "skeleton: 20,000 tensors": lambda: json.dumps(
        {"version": 1, "kind": "skeleton", "tensors": [{"name": f"{index:x}", "dtype": "U8", "shape": []} for index in range(19_000)]}
    ).encode(),
    "skeleton: ties of one tensor": lambda: json.dumps(
        {"version": 1, "kind": "skeleton", "tensors": [{"name": "w", "dtype": "U8", "shape": []}], "ties": [["w"] * 160_000]}
    ).encode(),
    "skeleton: a shared tie of many": lambda: json.dumps(
        {"version": 1, "kind": "skeleton", "tensors": [{"name": "w", "dtype": "U8", "shape": []}], "ties": [["w"]] * 110_000}
    ).encode(),
    FOLDER_OF_SHARDS + "9,000 files": lambda: json.dumps(
        {"weight_map": {f"{index:x}": f"{index}.safetensors" for index in range(9_000)}}
    ).encode(),
    FOLDER_OF_SHARDS + "40,000 files": lambda: json.dumps({"weight_map": {f"{index:x}": f"{index:x}" for index in range(40_000)}}).encode(),
    FOLDER_OF_SHARDS + "40,000 keys of one file": lambda: json.dumps(
        {"weight_map": {f"{index:x}": "one" for index in range(50_000)}}
    ).encode(),
    **{f"pickle: {name}": lambda make=make: zipped(make()) for name, make in BOMBS.items()},  # type: ignore[misc]
}


def _hexes(count: int, before: str = "", behind: str = "") -> list[str]:
    return [f"{before}{index:x}{behind}" for index in range(count)]


# A source and a target that are held against each other; a story each.
PAIRS: dict[str, tuple[Make, Make]] = {
    "the target's 16,000 names behind a prefix": (lambda: empty(_hexes(16_000, "x.")), lambda: empty(_hexes(16_000))),
    "no name of 16,000": (lambda: empty(_hexes(16_000, "x.")), lambda: empty(_hexes(16_000, "y"))),
    "no name but the last segment": (lambda: empty(_hexes(16_000, "x", ".w")), lambda: empty(_hexes(16_000, "y", ".w"))),
    "no shape of 16,000": (lambda: empty(_hexes(16_000), [0, 4, 4]), lambda: empty(_hexes(16_000), [0, 5, 5])),
    "many heads": (
        lambda: empty([f"{index % 97}.{index % 89}.{index % 83}.{index:x}" for index in range(13_000)]),
        lambda: empty([f"{index % 79}.{index % 73}.{index:x}" for index in range(13_000)]),
    ),
    "450,000 segments": (lambda: empty(["a." * 450_000]), lambda: empty(["b." * 450_000 + "a"])),
    "a name of 900,000 letters": (lambda: empty(["a" * 900_000]), lambda: empty(["b" * 900_000])),
    "6,000 roots and 14,000 keys": (COSTS["pickle: 6,000 roots"], lambda: filled(_hexes(14_000, "x", ".k"))),
}


def write(name: str, folder: Path) -> Path:
    """The file of a name in `folder`; an index lies among links to one file of a megabyte."""
    if not name.startswith(FOLDER_OF_SHARDS):
        path = folder / "it.pt"
        path.write_bytes(COSTS[name]())
        return path
    path = folder / "model.safetensors.index.json"
    path.write_bytes(COSTS[name]())
    (folder / "one").write_bytes(empty([f"{index:x}" for index in range(18_000)]))
    for shard in sorted(set(json.loads(path.read_bytes())["weight_map"].values())):
        if shard != "one" and len(shard) > 5:
            (folder / shard).symlink_to("one")
    return path


COMMANDS: Mapping[str, Sequence[str]] = {
    "inspect": ("inspect", "FILE"),
    "inspect -v": ("inspect", "-v", "FILE"),
    "inspect --json": ("inspect", "--json", "FILE"),
    "diff": ("diff", "FILE", "FILE"),
    "diff -v --json": ("diff", "-v", "--json", "FILE", "FILE"),
    "check --json": ("check", "--json", "FILE"),
}


@dataclass(frozen=True)
class Cost:
    """What a run came to: its exit code, seconds of the processor, megabytes at the peak."""

    code: int
    seconds: float
    megabytes: float


BOUND = Cost(0, 2, 200)  # what the project promises for a hostile file of one megabyte
_LAUNCH = """
import os, resource, sys
words = sys.argv[1:]
child = os.fork()
if not child:
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.execv(words[0], words)
_, status, used = os.wait4(child, 0)
print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def cost(words: Sequence[str]) -> Cost:
    """Run the program as a process of its own. It is launched by a small one: a large one's memory would count as its child's."""
    command = [sys.executable, "-S", "-E", "-c", _LAUNCH, sys.executable, "-m", "ckptsurgeon", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    code, seconds, kilobytes = done.stdout.split()
    return Cost(int(code), float(seconds), int(kilobytes) / 1024)
