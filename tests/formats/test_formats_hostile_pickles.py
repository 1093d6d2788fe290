"""Pickles that want to run something, or to cost something. Nothing runs, what was asked for is named, and the cost is bounded.

Every payload only makes a marker file, and is first shown to work in Python's own unpickler.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from formats_support import only, outcome, refusal, save_legacy, save_zip

from ckptsurgeon import formats
from ckptsurgeon.errors import CheckpointError, FormatError, LimitError
from ckptsurgeon.formats import read
from ckptsurgeon.formats.pickle_globals import ALLOWED
from ckptsurgeon.formats.pickle_machine import run
from ckptsurgeon.tensors import Archive, Refused


def mark(path: str) -> str:
    """What a payload calls; stands for os.system."""
    Path(path).write_text("ran")
    return "ran"


class Marker:
    """A class whose construction, state or items run something."""

    path: str

    def __new__(cls, path: str = "", **more: str) -> Marker:
        for each in (path, *more.values()):
            if each:
                mark(each)
        return super().__new__(cls)

    def __setstate__(self, state: str) -> None:
        mark(state)

    def append(self, item: str) -> None:
        mark(item)

    def __setitem__(self, key: str, value: str) -> None:
        mark(value)


HERE = mark.__module__


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
ids = pytest.mark.parametrize("opcode", OPCODES)


@pytest.fixture(autouse=True)
def extensions() -> Iterator[None]:
    for code in (240, 241, 242):
        copyreg.add_extension(HERE, "mark" if code == 240 else f"mark{code}", code)
    globals().update(mark241=mark, mark242=mark)
    yield
    for code in (240, 241, 242):
        copyreg.remove_extension(HERE, "mark" if code == 240 else f"mark{code}", code)


def zipped(pickled: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch zip around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        for name, data in (records or {}).items():
            archive.writestr(f"archive/data/{name}", data)
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def legacy(pickled: bytes, keys: bytes = b"\x80\x02].") -> bytes:
    """A legacy file around a pickle."""
    buffer = io.BytesIO()
    save_legacy({}, buffer)
    data = buffer.getvalue()
    return data[: data.rindex(b"\x80\x02}q\x00.")] + pickled + keys


def state_with(value: bytes) -> tuple[bytes, dict[str, bytes]]:
    """A pickle of {"w": a tensor, "evil": value}, and its storage."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x02tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + text("w") + tensor + b"s" + text("evil") + value + b"s.", {"0": bytes(8)}


@ids
def test_the_payloads_are_real(opcode: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    make, _ = OPCODES[opcode]
    try:
        pickle.loads(make(str(marker)) + b".")
    except Exception:
        if not marker.exists():
            raise
    if opcode == "rebuilt by a function of the file":
        return  # calls it, then fails
    assert marker.exists()


@ids
@pytest.mark.parametrize("wrap", [zipped, legacy, lambda pickled: pickled])
def test_a_payload_alone_is_refused_and_named(opcode: str, wrap: Callable[[bytes], bytes], tmp_path: Path) -> None:
    make, name = OPCODES[opcode]
    marker = tmp_path / "marker"
    error = refusal(wrap(b"\x80\x02" + make(str(marker)) + b"."), tmp_path)
    assert name in str(error)
    assert not marker.exists()


@ids
def test_a_payload_beside_tensors_is_named_and_left_alone(opcode: str, tmp_path: Path) -> None:
    make, name = OPCODES[opcode]
    marker = tmp_path / "marker"
    pickled, records = state_with(make(str(marker)))
    (tmp_path / "it").write_bytes(zipped(pickled, records))
    archive = read(str(tmp_path / "it"))
    assert any(asked.endswith(name) for asked in archive.globals)
    state = only(archive)
    assert list(state.tensors) == ["w"]
    assert isinstance(state.entries.get("evil"), Refused) or any(place.startswith("evil") for place in archive.beside)
    assert not marker.exists()


@ids
def test_a_payload_as_persistent_id(opcode: str, tmp_path: Path) -> None:
    make, name = OPCODES[opcode]
    marker = tmp_path / "marker"
    for body in (make(str(marker)) + b"Q.", b"(" + text("storage") + make(str(marker)) + text("0") + text("cpu") + b"K\x02tQ."):
        for wrap in (zipped, legacy):
            assert name in str(refusal(wrap(b"\x80\x02" + body), tmp_path))
    assert not marker.exists()


@ids
@pytest.mark.parametrize("place", ["first", "second", "third", "keys"])
def test_a_payload_in_any_of_the_five_pickles(opcode: str, place: str, tmp_path: Path) -> None:
    make, _ = OPCODES[opcode]
    marker = tmp_path / "marker"
    evil = b"\x80\x02" + make(str(marker)) + b"."
    good = legacy(b"\x80\x02}.", keys=b"\x80\x02].")
    ends = []
    for _ in range(3):
        ends.append(run(good, ends[-1] if ends else 0).end)
    data = {
        "first": evil + good[ends[0] :],
        "second": good[: ends[0]] + evil + good[ends[1] :],
        "third": good[: ends[1]] + evil + good[ends[2] :],
        "keys": legacy(b"\x80\x02}.", keys=evil),
    }[place]
    refusal(data, tmp_path)
    assert not marker.exists()


@ids
def test_a_second_pickle_after_the_first(opcode: str, tmp_path: Path) -> None:
    make, _ = OPCODES[opcode]
    pickled, records = state_with(b"N")
    marker = tmp_path / "marker"
    for more in (make(str(marker)) + b".", b"\x80\x02" + make(str(marker)) + b"."):
        refusal(zipped(pickled + more, records), tmp_path)
    assert not marker.exists()


def test_the_allow_list_calls_nothing_of_the_file(tmp_path: Path) -> None:
    """Every entry, given hostile arguments: a value of ours or a typed error."""
    marker = tmp_path / "marker"
    evil = named("mark") + text(str(marker)) + b"\x85R"
    arguments = [
        b")",
        evil + b"\x85",
        b"(" + evil * 8 + b"t",
        b"(" + b"N" * 8 + b"t",
        b"]",
        b"(" + b"K\x07" * 3 + b"t",
        text("x") + b"\x85",
        b"N",
    ]
    for name in ALLOWED:
        module, _, attribute = name.rpartition(".")
        for each in arguments:
            for call in (b"R", b"\x81"):
                pickled = b"\x80\x04" + text(module) + text(attribute) + b"\x93" + each + call
                for end in (b".", b"Nb.", b"}b.", b"(NNNtb.", evil + b"b.", evil + b"a.", evil + b"Ns.", b"}h\x00Ns."):
                    with_end = zipped(pickled + end)
                    (tmp_path / "it").write_bytes(with_end)
                    assert isinstance(outcome(tmp_path / "it"), CheckpointError)
    assert not marker.exists()


def test_every_allowed_global_has_its_reason() -> None:
    assert all(callable(build) and reason for build, reason in ALLOWED.values())
    assert not {"builtins.getattr", "builtins.eval", "operator.attrgetter", "functools.partial", "builtins.print"} & set(ALLOWED)


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

COST = """
import sys, time
from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.formats import read
start = time.perf_counter()
try:
    read(sys.argv[1])
    told = "read"
except CheckpointError as error:
    str(error)
    told = type(error).__name__
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(told, round(time.perf_counter() - start, 3), int(peak) >> 10)
"""


def cost(path: Path) -> tuple[str, float, int]:
    """What reading comes to, in a process of its own: the outcome, seconds, and megabytes at the peak."""
    root = str(Path(formats.__file__).parents[2])
    command = [sys.executable, "-S", "-c", COST, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": root}, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told, seconds, megabytes = done.stdout.split()
    return told, float(seconds), int(megabytes)


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("wrap", [zipped, legacy, lambda pickled: pickled, lambda pickled: zipped(pickled, None, zipfile.ZIP_DEFLATED)])
def test_bombs(bomb: str, wrap: Callable[[bytes], bytes], tmp_path: Path) -> None:
    pickled = BOMBS[bomb]()
    assert len(pickled) < 1.2 * MEGABYTE
    (tmp_path / "it").write_bytes(wrap(pickled))
    told, seconds, megabytes = cost(tmp_path / "it")
    assert told in ("FormatError", "LimitError", "UnreadableError")
    assert megabytes < 200
    assert seconds < 10  # the promise is 2 s on a quiet machine


def _extra(value: bytes) -> tuple[bytes, dict[str, bytes]]:
    pickled, records = state_with(b"N")
    return pickled[:-1] + text("a._extra_state") + value + b"s" + text("b._extra_state") + value + b"s.", records


@pytest.mark.parametrize(
    "value",
    [
        b")" + b"\x942\x86" * 40,
        b"]" + b"q\x010](h\x01h\x01e" * 60,
        b"]q\x00h\x00a",
        b")" + b"\x85" * 100_000,
        text("x" * 300_000) + b"q\x010](" + b"h\x01" * 300_000 + b"e",
    ],
    ids=["doubling tuple", "doubling list", "list in itself", "nested", "long text many times"],
)
def test_bombs_in_extra_state(value: bytes, tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(zipped(*_extra(value)))
    told, seconds, megabytes = cost(tmp_path / "it")
    assert told == "read" and megabytes < 200 and seconds < 10
    entries = only(read(str(tmp_path / "it"))).entries
    assert all(isinstance(entry, Refused) for entry in entries.values()) and len(entries) == 2


def test_shared_metadata_is_told_once(tmp_path: Path) -> None:
    pickled, records = state_with(b"N")
    local = b"}(" + b"".join(text(str(number)) + b"K\x01" for number in range(30_000)) + b"uq\x010"
    paths = b"}(" + b"".join(text(f"m{number}") + b"h\x01" for number in range(30_000)) + b"u"
    body = pickled.replace(b"\x80\x02}", b"\x80\x02ccollections\nOrderedDict\n)R")[:-1]
    (tmp_path / "it").write_bytes(zipped(body + local + b"}" + text("_metadata") + paths + b"sb.", records))
    told, seconds, megabytes = cost(tmp_path / "it")
    assert told == "read" and megabytes < 200 and seconds < 10
    assert len(only(read(str(tmp_path / "it"))).module_metadata) == 30_000


def test_a_deflated_pickle_may_not_inflate_without_measure(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(zipped(b"\x80\x02" + b"]" * (1 << 28) + b".", None, zipfile.ZIP_DEFLATED))
    told, seconds, megabytes = cost(tmp_path / "it")
    assert told == "LimitError" and seconds < 1 and megabytes < 40


@pytest.mark.parametrize("program", [b"\x8b\x01\x10\0\0" + bytes(4097), b"I" + b"0" * 4097 + b"\n", b"L" + b"1" * 4097 + b"L\n"])
def test_integers_have_a_limit(program: bytes) -> None:
    with pytest.raises(LimitError, match="409"):
        run(b"\x80\x02" + program + b".")


def _tensor(storage: str, numel: bytes, offset: bytes, shape: bytes, stride: bytes, kind: str = "torch\nFloatStorage") -> bytes:
    reference = b"(" + text("storage") + f"c{kind}\n".encode() + text(storage) + text("cpu") + numel + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + offset + shape + stride + b"\x89NtR"


def long(number: int) -> bytes:
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def dims(*numbers: int) -> bytes:
    return b"(" + b"".join(map(long, numbers)) + b"t"


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((3,), (1,), 0),
        ((2,), (1,), 1),
        ((2,), (2,), 0),
        ((-1,), (1,), 0),
        ((1,), (-1,), 0),
        ((1,), (1,), -1),
        ((1,), (1,), 2),
        ((1 << 63,), (0,), 0),
        ((1 << 32, 1 << 32), (0, 0), 0),
        ((1 << 62, 4), (1, 1), 0),
        ((0, 1 << 70), (1, 1), 0),
        ((1,), (1 << 64,), 0),
        ((1,), (1,), 1 << 62),
        ((1,), (1,), 1 << 64),
        ((1 << 31,), (0,), 0),
        ((1,) * 65, (1,) * 65, 0),
        ((1, 1), (1,), 0),
    ],
)
def test_tensors_beyond_their_storage(shape: tuple[int, ...], stride: tuple[int, ...], offset: int, tmp_path: Path) -> None:
    tensor = _tensor("0", b"K\x02", long(offset), dims(*shape), dims(*stride))
    error = refusal(zipped(b"\x80\x02}" + text("w") + tensor + b"s.", {"0": bytes(8)}), tmp_path)
    assert isinstance(error, FormatError | LimitError)


@pytest.mark.parametrize(
    ("shape", "stride", "offset"), [((2,), (1,), 0), ((1,), (1,), 1), ((1000,), (0,), 1), ((), (), 1), ((0, 7), (9, 9), 0), ((0,), (1,), 2)]
)
def test_tensors_within_their_storage(shape: tuple[int, ...], stride: tuple[int, ...], offset: int, tmp_path: Path) -> None:
    tensor = _tensor("0", b"K\x02", long(offset), dims(*shape), dims(*stride))
    (tmp_path / "it").write_bytes(zipped(b"\x80\x02}" + text("w") + tensor + b"s.", {"0": bytes(8)}))
    meta = only(read(str(tmp_path / "it"))).tensors["w"]
    assert (meta.shape, meta.stride) == (shape, stride)
    assert torch.load(tmp_path / "it", weights_only=True)["w"].shape == shape


@pytest.mark.parametrize(
    "kind", ["torch\nDoubleStorage", "torch\nHalfStorage", "torch.storage\nUntypedStorage", "torch\nNoStorage", "os\nsystem"]
)
def test_one_storage_with_two_dtypes(kind: str, tmp_path: Path) -> None:
    one = _tensor("0", b"K\x02", b"K\x00", dims(1), dims(1))
    other = _tensor("0", b"K\x02", b"K\x00", dims(1), dims(1), kind)
    refusal(zipped(b"\x80\x02}(" + text("a") + one + text("b") + other + b"u.", {"0": bytes(8)}), tmp_path)


@pytest.mark.parametrize("numel", [1, 3, 0, 1 << 40, -2])
def test_one_storage_with_two_lengths(numel: int, tmp_path: Path) -> None:
    one = _tensor("0", b"K\x02", b"K\x00", dims(1), dims(1))
    other = _tensor("0", long(numel), b"K\x00", dims(), dims())
    refusal(zipped(b"\x80\x02}(" + text("a") + one + text("b") + other + b"u.", {"0": bytes(8)}), tmp_path)
    refusal(zipped(b"\x80\x02}(" + text("b") + other + b"u.", {"0": bytes(8)}), tmp_path)


def test_a_tensor_subclass_of_the_file_is_refused_by_key(tmp_path: Path) -> None:
    class Mine(torch.Tensor):
        pass

    Mine.__module__, Mine.__qualname__ = HERE, "Mine"
    globals()["Mine"] = Mine
    save_zip(OrderedDict(w=torch.ones(1), mine=torch.ones(2).as_subclass(Mine)), tmp_path / "it")
    archive = read(str(tmp_path / "it"))
    assert isinstance(only(archive).entries["mine"], Refused) and f"{HERE}.Mine" in archive.globals


def test_names_are_safe_to_print(tmp_path: Path) -> None:
    error = refusal(zipped(b"\x80\x02c\x1b[31mevil\nna\x07me\n)R."), tmp_path)
    assert "\x1b" not in str(error) and "\x07" not in str(error) and "evil" in str(error)


def test_nothing_of_pickle_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_zip({"w": torch.ones(2)}, tmp_path / "it")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("loads", "load", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert isinstance(read(str(tmp_path / "it")), Archive)
