"""Pickles that want to run something, or to cost something. Nothing runs, what was asked for is named, and the cost is bounded.

Every payload only makes a marker file, and is first shown to work in Python's own unpickler.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import hostile_marker
import pytest
import torch
from formats_support import only, outcome, refusal, save_zip
from hostile_pickles import BOMBS, MEGABYTE, OPCODES, dims, legacy, long, named, state_with, tensor_of, text, zipped

from ckptsurgeon import formats
from ckptsurgeon.errors import CheckpointError, FormatError, LimitError
from ckptsurgeon.formats import read
from ckptsurgeon.formats.pickle.globals import ALLOWED
from ckptsurgeon.formats.pickle.machine import run
from ckptsurgeon.tensors import Archive, Refused

ids = pytest.mark.parametrize("opcode", OPCODES)


@pytest.fixture(autouse=True)
def extensions() -> Iterator[None]:
    with hostile_marker.extensions():
        yield


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


# Reads the files that stdin names, each in a child, whose peak begins as this small process's size.
COST = """
import os, signal, sys, time
from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.formats import read
for path in sys.stdin:
    if os.fork():
        if os.wait()[1]:
            print("died", 0, 0, flush=True)
        continue
    signal.alarm(60)
    start = time.perf_counter()
    try:
        read(path.removesuffix(chr(10)))
        told = "read"
    except CheckpointError as error:
        str(error)
        told = type(error).__name__
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(told, round(time.perf_counter() - start, 3), int(peak) >> 10, flush=True)
    os._exit(0)
"""


@cache
def reader() -> subprocess.Popen[str]:
    """The process that reads, started once; it ends with this one, which closes its stdin."""
    root = str(Path(formats.__file__).parents[2])
    command = [sys.executable, "-S", "-c", COST]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": root})


def cost(path: Path) -> tuple[str, float, int]:
    """What reading comes to, in a process of its own: the outcome, seconds, and megabytes at the peak."""
    process = reader()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{path}\n")
    process.stdin.flush()
    told, seconds, megabytes = process.stdout.readline().split()
    return told, float(seconds), int(megabytes)


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("wrap", [zipped, legacy, lambda pickled: pickled, lambda pickled: zipped(pickled, None, zipfile.ZIP_DEFLATED)])
def test_bombs(bomb: str, wrap: Callable[[bytes], bytes], tmp_path: Path) -> None:
    pickled = BOMBS[bomb]()
    assert len(pickled) < 1.2 * MEGABYTE
    (tmp_path / "it").write_bytes(wrap(pickled))
    told, seconds, megabytes = cost(tmp_path / "it")
    assert told in ("FormatError", "UnsafeError", "LimitError", "UnreadableError")
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
    with pytest.raises(LimitError, match="4,0"):
        run(b"\x80\x02" + program + b".")


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
    tensor = tensor_of("0", b"K\x02", long(offset), dims(*shape), dims(*stride))
    error = refusal(zipped(b"\x80\x02}" + text("w") + tensor + b"s.", {"0": bytes(8)}), tmp_path)
    assert isinstance(error, FormatError | LimitError)


@pytest.mark.parametrize(
    ("shape", "stride", "offset"), [((2,), (1,), 0), ((1,), (1,), 1), ((1000,), (0,), 1), ((), (), 1), ((0, 7), (9, 9), 0), ((0,), (1,), 2)]
)
def test_tensors_within_their_storage(shape: tuple[int, ...], stride: tuple[int, ...], offset: int, tmp_path: Path) -> None:
    tensor = tensor_of("0", b"K\x02", long(offset), dims(*shape), dims(*stride))
    (tmp_path / "it").write_bytes(zipped(b"\x80\x02}" + text("w") + tensor + b"s.", {"0": bytes(8)}))
    meta = only(read(str(tmp_path / "it"))).tensors["w"]
    assert (meta.shape, meta.stride) == (shape, stride)
    assert torch.load(tmp_path / "it", weights_only=True)["w"].shape == shape


@pytest.mark.parametrize(
    "kind", ["torch\nDoubleStorage", "torch\nHalfStorage", "torch.storage\nUntypedStorage", "torch\nNoStorage", "os\nsystem"]
)
def test_one_storage_with_two_dtypes(kind: str, tmp_path: Path) -> None:
    one = tensor_of("0", b"K\x02", b"K\x00", dims(1), dims(1))
    other = tensor_of("0", b"K\x02", b"K\x00", dims(1), dims(1), kind)
    refusal(zipped(b"\x80\x02}(" + text("a") + one + text("b") + other + b"u.", {"0": bytes(8)}), tmp_path)


@pytest.mark.parametrize("numel", [1, 3, 0, 1 << 40, -2])
def test_one_storage_with_two_lengths(numel: int, tmp_path: Path) -> None:
    one = tensor_of("0", b"K\x02", b"K\x00", dims(1), dims(1))
    other = tensor_of("0", long(numel), b"K\x00", dims(), dims())
    refusal(zipped(b"\x80\x02}(" + text("a") + one + text("b") + other + b"u.", {"0": bytes(8)}), tmp_path)
    refusal(zipped(b"\x80\x02}(" + text("b") + other + b"u.", {"0": bytes(8)}), tmp_path)


def test_a_tensor_subclass_of_the_file_is_refused_by_key(tmp_path: Path) -> None:
    class Mine(torch.Tensor):
        pass

    Mine.__module__, Mine.__qualname__ = __name__, "Mine"
    globals()["Mine"] = Mine
    save_zip(OrderedDict(w=torch.ones(1), mine=torch.ones(2).as_subclass(Mine)), tmp_path / "it")
    archive = read(str(tmp_path / "it"))
    assert isinstance(only(archive).entries["mine"], Refused) and f"{__name__}.Mine" in archive.globals


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
