"""The tricks by which a pickle in the suites of picklescan and fickling hides what it runs, each rebuilt to leave a marker.

Those that Python can still run are run, in a process of their own, to show that they would work; then `check` refuses them by name, alone
and before an honest state_dict, and the marker does not appear.
"""

from __future__ import annotations

import marshal
import pickle
import pickletools
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from scanners_pickles import (
    BUILD,
    MARK,
    MEMO,
    NONE,
    PLACES,
    POP,
    REDUCE,
    STOP,
    alone,
    args,
    call,
    framed,
    honest,
    in_zip,
    line,
    named,
    stacked,
    text,
)

import ckptsurgeon as cs


@dataclass(frozen=True)
class Trick:
    """A pickle's body that makes the file at the path given, what it is refused by, and whether Python 3.11 can run it."""

    body: Callable[[str], bytes]
    name: str
    runs: bool = True


def shell(path: str) -> bytes:
    """The command that leaves the marker."""
    return text(f"touch {path}")


def python(path: str) -> bytes:
    """The same in Python."""
    return text(f"open({path!r}, 'w').close()")


def got(module: str, *names: str, made: bool = False) -> bytes:
    """getattr(module.name, name), of what an import or a call has given."""
    first = stacked(module, names[0])
    return call(named("builtins", "getattr"), call(first) if made else first, *map(text, names[1:]))


def imported(name: str) -> bytes:
    """The module, by the language's own import."""
    return call(named("builtins", "__import__"), text(name))


def old_text(words: str) -> bytes:
    """STRING, in quotes."""
    return b"S'" + words.encode() + b"'\n"


def inner(path: str) -> bytes:
    """A pickle in a pickle, as bytes."""
    raw = alone(call(stacked("os", "system"), shell(path)))
    return b"B" + struct.pack("<I", len(raw)) + raw


def code(path: str) -> bytes:
    """A code object, as bytes."""
    raw = marshal.dumps(compile(f"open({path!r}, 'w').close()", "<x>", "exec"))
    return b"B" + struct.pack("<I", len(raw)) + raw


def spelled(path: str) -> bytes:
    """The names of what is imported are computed, letter by letter, so that no name stands in the file."""
    letters = "tesoym"
    join = call(named("builtins", "getattr"), text(""), text("join"))

    def word(name: str) -> bytes:
        picked = call(named("operator", "itemgetter"), *(b"K" + bytes([letters.index(letter)]) for letter in name))
        return call(join, call(picked, text(letters)))

    return call(word("os") + word("system") + b"\x93", shell(path))


def buried(path: str) -> bytes:
    """Bytes that are longer than their frame: what reads to the frame's end finds a program in them."""
    hidden = call(named("os", "system"), shell(path))
    return NONE + line("a" * (8192 * 16)) + POP + MARK + framed(b"B" + struct.pack("<I", len(hidden) + 3) + b"\0\0", 2) + hidden + b"(1"


TRICKS: dict[str, Trick] = {
    # One opcode or another that reaches a global.
    "INST, which imports and calls at once": Trick(lambda p: MARK + python(p) + b"ibuiltins\nexec\n", "builtins.exec"),
    "OBJ, whose function lies below its arguments": Trick(lambda p: MARK + named("os", "system") + shell(p) + b"o", "os.system"),
    "OBJ, whose result is thrown away at once": Trick(lambda p: MARK + stacked("os", "system") + shell(p) + b"o0N", "os.system"),
    "STACK_GLOBAL on names that came from the memo": Trick(
        lambda p: (
            line("os")
            + b"p2\n0"
            + line("system")
            + b"p3\n0"
            + line("torch")
            + b"p0\n0"
            + line("LongStorage")
            + b"p1\n0g2\ng3\n\x93"
            + MARK
            + line(f"touch {p}")
            + b"tR"
        ),
        "os.system",
    ),
    "STACK_GLOBAL on names of Python 2's kind of text": Trick(
        lambda p: old_text("os") + old_text("system") + b"\x93" + old_text(f"touch {p}") + b"\x85R", "os.system"
    ),
    "STACK_GLOBAL on names that are computed": Trick(spelled, "operator.itemgetter"),
    "a dotted name, which walks from one module into another": Trick(
        lambda p: call(stacked("pathlib", "os.system"), shell(p)), "pathlib.os.system"
    ),
    "BUILD on what a call gave": Trick(lambda p: call(stacked("os", "system"), shell(p)) + b"}" + BUILD, "os.system"),
    "BUILD that overwrites a module's own names": Trick(
        lambda p: (
            stacked("torch._utils", "_rebuild_tensor")
            + POP
            + stacked("torch", "_utils")
            + b"q\x00"
            + b"}"
            + text("_rebuild_tensor")
            + text("builtins")
            + b"s"
            + BUILD
            + POP
            + NONE
        ),
        "torch._utils",
        runs=False,
    ),
    "extension registry, one byte": Trick(lambda p: b"\x82\x2a)R", "copyreg.extension_42", runs=False),
    "extension registry, two bytes": Trick(lambda p: b"\x83\xe8\x03)R", "copyreg.extension_1000", runs=False),
    "extension registry, four bytes": Trick(lambda p: b"\x84\xa0\x86\x01\x00)R", "copyreg.extension_100000", runs=False),
    # One function that finds another.
    "getattr on a module that __import__ gave": Trick(
        lambda p: call(call(named("builtins", "getattr"), imported("os"), text("system")), shell(p)), "builtins.getattr"
    ),
    "operator.attrgetter": Trick(
        lambda p: call(call(call(stacked("operator", "attrgetter"), text("system")), imported("os")), shell(p)), "operator.attrgetter"
    ),
    "_operator.methodcaller, the module below operator": Trick(
        lambda p: call(call(stacked("_operator", "methodcaller"), text("system"), shell(p)), imported("os")), "_operator.methodcaller"
    ),
    "pydoc.locate, given a dotted text": Trick(
        lambda p: call(call(stacked("pydoc", "locate"), text("os.system")), shell(p)), "pydoc.locate"
    ),
    "pydoc.locate and operator.methodcaller together": Trick(
        lambda p: call(call(stacked("operator", "methodcaller"), text("system"), shell(p)), call(stacked("pydoc", "locate"), text("os"))),
        "operator.methodcaller",
    ),
    "pkgutil.resolve_name": Trick(
        lambda p: call(call(stacked("pkgutil", "resolve_name"), text("os:system")), shell(p)), "pkgutil.resolve_name"
    ),
    "importlib by getattr": Trick(
        lambda p: call(
            call(named("builtins", "getattr"), call(stacked("importlib", "import_module"), text("os")), text("system")), shell(p)
        ),
        "importlib.import_module",
    ),
    "ctypes by getattr": Trick(
        lambda p: call(
            call(named("builtins", "getattr"), call(stacked("ctypes", "CDLL"), NONE), text("system")),
            b"C" + bytes([len(p) + 6]) + f"touch {p}".encode(),
        ),
        "ctypes.CDLL",
    ),
    "code.InteractiveInterpreter by getattr": Trick(
        lambda p: call(got("code", "InteractiveInterpreter", "runsource", made=True), python(p)), "code.InteractiveInterpreter"
    ),
    "bdb.Bdb, its method on an object of it": Trick(
        lambda p: call(stacked("bdb", "Bdb.run"), call(stacked("bdb", "Bdb")), python(p)), "bdb.Bdb.run"
    ),
    "functools.partial, with what it is to be called with": Trick(
        lambda p: call(call(stacked("functools", "partial"), stacked("os", "system"), shell(p))), "functools.partial"
    ),
    "globals, compile, eval, one after another": Trick(
        lambda p: (
            named("builtins", "eval")
            + MARK
            + named("builtins", "compile")
            + MARK
            + python(p)
            + old_text("")
            + old_text("exec")
            + b"tR"
            + call(named("builtins", "globals"))
            + b"tR"
        ),
        "builtins.compile",
    ),
    "apply, as Python 2 had it": Trick(
        lambda p: call(named("__builtin__", "apply"), named("os", "system"), args(shell(p))), "builtins.apply", runs=False
    ),
    # A pickle, or code, as bytes.
    "pickle.loads on bytes": Trick(lambda p: call(stacked("pickle", "loads"), inner(p)), "pickle.loads"),
    "marshal.loads, made a function and called": Trick(
        lambda p: call(
            call(stacked("types", "FunctionType"), call(stacked("marshal", "loads"), code(p)), call(named("builtins", "globals")))
        ),
        "marshal.loads",
    ),
    "runpy.run_path": Trick(lambda p: call(stacked("runpy", "run_path"), text("program.py")), "runpy.run_path"),
    "cProfile.run": Trick(lambda p: call(stacked("cProfile", "run"), python(p)), "cProfile.run"),
    "timeit.timeit": Trick(
        lambda p: call(stacked("timeit", "timeit"), python(p), text("pass"), stacked("time", "time"), b"K\x01"), "timeit.timeit"
    ),
    "multiprocessing.util.spawnv_passfds": Trick(
        lambda p: call(
            stacked("multiprocessing.util", "spawnv_passfds"),
            b"C\x07/bin/sh",
            MARK + b"C\x07/bin/sh" + b"C\x02-c" + b"C" + bytes([len(p) + 6]) + f"touch {p}".encode() + b"l",
            b")",
        ),
        "multiprocessing.util.spawnv_passfds",
        runs=False,  # it does not wait for what it starts
    ),
    # What makes a scan stop before it comes to the end.
    "a memo that is not there, after the call": Trick(
        lambda p: call(named("os", "system"), shell(p)) + POP + text("os") + MEMO + b"h\x03h\x00\x93", "os.system"
    ),
    "a number where a name should be, after the call": Trick(
        lambda p: call(named("os", "system"), shell(p)) + POP + b"J\x2a\x00\x00\x00" + text("os") + b"\x93", "os.system"
    ),
    "a text longer than the file, after the call": Trick(
        lambda p: call(named("builtins", "exec"), python(p)) + b"X\x3e\x00\x00\x00f = ", "builtins.exec"
    ),
    "a mark that is dropped with what stands above it": Trick(
        lambda p: MARK + call(named("os", "system"), shell(p)) + NONE + b"1N", "os.system"
    ),
    "a TUPLE without its mark, after the call": Trick(lambda p: call(named("os", "system"), shell(p)) + b"tt", "os.system"),
    "a protocol, said again in the middle": Trick(lambda p: b"\x80\x01\x80\x02" + call(named("os", "system"), shell(p)), "os.system"),
    "a list that contains itself": Trick(lambda p: b"]q\x00h\x00a" + call(named("os", "system"), shell(p)) + b"a", "os.system"),
    "a program in bytes that are longer than their frame": Trick(buried, "frame", runs=False),  # by how an unpickler buffers
}


@pytest.mark.parametrize("story", TRICKS)
def test_a_trick(story: str, tmp_path: Path) -> None:
    trick, marker = TRICKS[story], tmp_path / "ran"
    for place in ("alone", "zip", "metadata"):
        patient = tmp_path / place
        patient.write_bytes(PLACES[place](trick.body(str(marker))))
        report = cs.check(patient)
        assert not report.ok and any(trick.name in found.message for found in report.files[0].findings), (place, str(report))
        codes = {found.code for found in report.files[0].findings}
        assert ("CK102" if trick.name == "frame" else "CK201") in codes, (place, str(report))
    assert not marker.exists()


def test_the_tricks_would_work(tmp_path: Path) -> None:
    """All that Python 3.11 still runs, in one process of its own, each with a marker of its own."""
    (tmp_path / "program.py").write_text(f"open({str(tmp_path / 'runpy.run_path')!r}, 'w').close()")
    tried = []
    for number, (story, trick) in enumerate(TRICKS.items()):
        if trick.runs:
            marker = tmp_path / ("runpy.run_path" if story == "runpy.run_path" else f"ran{number}")
            (tmp_path / f"{number}.pkl").write_bytes(alone(trick.body(str(marker))))
            tried.append((number, story, marker))
    program = "import pickle, sys\nfor name in sys.argv[1:]:\n    try: pickle.load(open(name, 'rb'))\n    except Exception: pass\n"
    names = [f"{number}.pkl" for number, _, _ in tried]
    subprocess.run([sys.executable, "-c", program, *names], cwd=tmp_path, check=False, capture_output=True, timeout=60)
    assert [story for _, story, marker in tried if not marker.exists()] == []


FRAMES = {
    "bytes that go on after their frame": framed(b"B" + struct.pack("<I", 20) + b"A" * 20, 5),
    "a text that goes on after its frame": framed(b"\x8c\x14" + b"A" * 20, 3),
    "a global whose module's name goes on after its frame": framed(named("macos", "system"), 4),
    "a global whose own name goes on after its frame": framed(named("os", "system"), 7),
    "a line that goes on after its frame": framed(line("hello world"), 5),
    "a number that goes on after its frame": framed(b"J\x07\x00\x00\x00", 2),
    "a frame within a frame": framed(NONE + POP + framed(NONE), 30),
    "a frame longer than its pickle": framed(NONE + POP + b"}.", 40) + b"\0" * 40,
}


@pytest.mark.parametrize("story", FRAMES)
def test_a_frame_ends_where_an_opcode_does(story: str, tmp_path: Path) -> None:
    """Python's unpickler in C read over a frame's end, the one in Python does not: so there are two readings, and none is taken."""
    for put in (alone, in_zip):
        (tmp_path / "patient").write_bytes(put(FRAMES[story]))
        (found,) = cs.check(tmp_path / "patient").files[0].findings
        assert found.code in ("CK101", "CK102", "CK201"), found
        assert any(words in found.message for words in ("frame", "ends too early", "truncated")), found


def test_frames_as_python_writes_them_are_read(tmp_path: Path) -> None:
    value = {"w": torch.ones(2), "bytes": b"y" * 100_000, "many": list(range(100_000)), "more": {"a": [1, {"b": (3, "x" * 70_000)}]}}
    for protocol in (2, 3, 4, 5):
        torch.save(value, tmp_path / "patient", pickle_protocol=protocol)
        assert cs.check(tmp_path / "patient").ok
        assert list(cs.open(tmp_path / "patient")) == ["w"]


@pytest.mark.parametrize("number", range(5))
def test_each_of_the_five_pickles_of_a_legacy_file_is_listened_to(number: int, tmp_path: Path) -> None:
    """The magic number, the protocol, the machine, the value, the keys: torch.load runs all five before it looks at one."""
    raw, marker = honest(legacy=True), tmp_path / "ran"
    starts, at = [], 0
    for _ in range(5):
        starts.append(at)
        *_, (_, _, last) = pickletools.genops(raw[at:])
        at += (last or 0) + 1
    at = starts[number] + 2
    patient = tmp_path / "patient"
    patient.write_bytes(raw[:at] + call(named("os", "system"), shell(str(marker))) + POP + raw[at:])
    report = cs.check(patient)
    assert [(found.code, "os.system" in found.message) for found in report.files[0].findings] == [("CK201", True)]
    assert cs.inspect(patient).globals == ("os.system",) and not marker.exists()


def test_a_magic_number_that_a_call_computes(tmp_path: Path) -> None:
    magic = alone(call(named("builtins", "eval"), text("0x1950A86A20F9469CFC6C")))
    rest = [pickle.dumps(value, 2) for value in (1001, {"little_endian": True})]
    for body in (alone(call(named("os", "system"), shell(str(tmp_path / "ran")))), alone(NONE)):
        (tmp_path / "patient").write_bytes(magic + b"".join(rest) + body + pickle.dumps([], 2))
        (found,) = cs.check(tmp_path / "patient").files[0].findings
        assert found.code == "CK201" and "builtins.eval" in found.message and not (tmp_path / "ran").exists()


def test_pickles_one_behind_another(tmp_path: Path) -> None:
    """A harmless list first, and what a scan of the first one alone does not see behind it."""
    second = alone(call(stacked("os", "system"), shell(str(tmp_path / "ran"))))
    for first in (["a", "b", "c"], [1, 2, 3, 4], 1234567):
        (tmp_path / "patient").write_bytes(pickle.dumps(first) + second)
        (found,) = cs.check(tmp_path / "patient").files[0].findings
        assert found.code in ("CK102", "CK201") and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("layer", [b"2" * 9 + b"l", b"q%c" + b"h%c" * 9 + b"l"], ids=["DUP", "memo"])
def test_a_list_of_lists_that_multiplies(layer: bytes, tmp_path: Path) -> None:
    """Ten in ten in ten …, nine layers deep, from two hundred bytes: shared, so small, until something walks it."""
    body = MARK * 9 + text("lol") + b"".join(layer.replace(b"%c", bytes([depth])) for depth in range(9))
    assert len(pickle.loads(alone(body))) == 10
    (tmp_path / "patient").write_bytes(alone(body))
    assert not cs.check(tmp_path / "patient").ok
    for place in ("zip", "metadata"):
        (tmp_path / "patient").write_bytes(PLACES[place](body))
        assert list(cs.open(tmp_path / "patient")) == ["weight", "bias"]  # beside honest tensors it costs no more than it weighs


def test_stop_and_rubbish(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for body in (
        alone(call(stacked("os", "system"), shell(str(marker)))) + b"\n\n\t\t",
        b"\x80\x04t" + STOP,
        b"\x80\x04]q\x00h\x00a" + STOP,
        b"\x80\x02}q\x00h\x00X\x01\x00\x00\x00vs" + STOP,
        b"\x80\x04\x8fq\x00(h\x00\x90" + STOP,
        b"cmod\n\xf8\n",
        REDUCE,
    ):
        (tmp_path / "patient").write_bytes(body)
        assert [found.code for found in cs.check(tmp_path / "patient").files[0].findings] in (["CK102"], ["CK201"])
    assert not marker.exists()
