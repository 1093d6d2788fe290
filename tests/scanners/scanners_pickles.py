"""A few words to write pickles opcode by opcode, and to put one where a stranger would: alone, in torch's zip, in a legacy file."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO

import torch

STOP, POP, DUP, MARK, NONE, REDUCE, BUILD, MEMO = b".", b"0", b"2", b"(", b"N", b"R", b"b", b"\x94"


def text(words: str) -> bytes:
    """BINUNICODE."""
    raw = words.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def line(words: str) -> bytes:
    """UNICODE, a line."""
    return b"V" + words.encode("raw-unicode-escape") + b"\n"


def named(module: str, name: str) -> bytes:
    """GLOBAL, as protocols 0 to 3 have it."""
    return f"c{module}\n{name}\n".encode()


def stacked(module: str, name: str) -> bytes:
    """STACK_GLOBAL, as protocol 4 has it."""
    return text(module) + text(name) + b"\x93"


def args(*values: bytes) -> bytes:
    """A tuple."""
    return MARK + b"".join(values) + b"t"


def call(function: bytes, *values: bytes) -> bytes:
    """REDUCE."""
    return function + args(*values) + REDUCE


def framed(body: bytes, size: int | None = None) -> bytes:
    """A frame around `body`, of another size where one is given."""
    return b"\x95" + struct.pack("<Q", len(body) if size is None else size) + body


def zipped(entries: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these entries."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, raw in entries.items():
            archive.writestr(name, raw)
    return buffer.getvalue()


def honest(legacy: bool = False) -> bytes:
    """What torch.save makes of a small state_dict."""
    buffer = BytesIO()
    state = {"weight": torch.arange(4.0), "bias": torch.ones(1).half()}
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _entries(raw: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(BytesIO(raw)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def _beside(body: bytes) -> bytes:
    """The honest pickle, which first runs `body` and forgets what it gave."""
    program = next(raw for name, raw in _entries(honest()).items() if name.endswith("data.pkl"))
    return program[:2] + body + POP + program[2:]


def alone(body: bytes) -> bytes:
    """The pickle and nothing else."""
    return b"\x80\x04" + body + STOP


def in_zip(body: bytes) -> bytes:
    """In torch's zip, before an honest state_dict."""
    entries = _entries(honest())
    return zipped({name: _beside(body) if name.endswith("data.pkl") else raw for name, raw in entries.items()})


def in_legacy(body: bytes) -> bytes:
    """In a legacy file, before an honest state_dict."""
    raw = honest(legacy=True)
    stream = BytesIO(raw)
    for _ in range(3):
        pickle.load(stream)  # our own file: numbers and a dict of texts
    start = stream.tell()
    return raw[: start + 2] + body + POP + raw[start + 2 :]


def as_metadata(body: bytes) -> bytes:
    """As a value in the dict of an honest state_dict's zip."""
    entries = _entries(honest())
    name = next(name for name in entries if name.endswith("data.pkl"))
    program = entries[name]
    return zipped({**entries, name: program[:-1] + text("more") + body + b"s" + STOP})


PLACES: Mapping[str, Callable[[bytes], bytes]] = {"alone": alone, "zip": in_zip, "legacy": in_legacy, "metadata": as_metadata}
