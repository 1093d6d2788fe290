"""safetensors headers, skeletons and indexes of shards that lie, contradict themselves or cost too much."""

from __future__ import annotations

import json
from typing import Any


def safetensor(header: Any, data: bytes = b"", pad: bytes = b"") -> bytes:
    """A safetensors file; a header that is bytes is taken as it stands."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += pad
    return len(raw).to_bytes(8, "little") + raw + data


def entry(start: Any = 0, stop: Any = 4, shape: Any = (1,), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, stop], **more}


FOUR, EIGHT = bytes(4), bytes(8)
HUGE = 1 << 62
HEADERS: dict[str, tuple[Any, bytes]] = {
    "a gap before": ({"a": entry(4, 8)}, EIGHT),
    "a gap between": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "a gap after": ({"a": entry(0, 4)}, EIGHT),
    "an overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)),
    "the same bytes twice": ({"a": entry(0, 4), "b": entry(0, 4)}, FOUR),
    "an empty tensor within another": ({"a": entry(0, 4), "b": entry(2, 2, (0,))}, FOUR),
    "an empty tensor beyond": ({"a": entry(0, 4), "b": entry(9, 9, (0,))}, FOUR),
    "an end before the start": ({"a": entry(4, 0)}, FOUR),
    "negative offsets": ({"a": entry(-4, 0)}, FOUR),
    "an offset of minus zero": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', FOUR),
    "a shape of minus zero": (b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""),
    "offsets beyond 64 bits": ({"a": entry(1 << 64, (1 << 64) + 4)}, FOUR),
    "offsets that are floats": ({"a": entry(0.0, 4.0)}, FOUR),
    "offsets that are text": ({"a": entry("0", "4")}, FOUR),
    "offsets that are booleans": ({"a": entry(False, True, (1,), "U8")}, b"\0"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, FOUR),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, FOUR),
    "offsets that are none": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": None}}, FOUR),
    "a shape for other bytes": ({"a": entry(shape=(2,))}, FOUR),
    "a dtype for other bytes": ({"a": entry(dtype="F64")}, FOUR),
    "an unknown dtype": ({"a": entry(dtype="F33")}, FOUR),
    "a dtype of torch only": ({"a": entry(0, 16, dtype="C128")}, bytes(16)),
    "a dtype that is a number": ({"a": entry(dtype=3)}, FOUR),
    "a dtype that is a list": ({"a": entry(dtype=["F32"])}, FOUR),
    "a shape that is a number": ({"a": entry(shape=1)}, FOUR),
    "a shape that is a map": ({"a": entry(shape={})}, FOUR),
    "a negative shape": ({"a": entry(shape=(-1,))}, FOUR),
    "two negative dimensions": ({"a": entry(shape=(-1, -1))}, FOUR),
    "a shape of floats": ({"a": entry(shape=(1.0,))}, FOUR),
    "a shape of booleans": ({"a": entry(shape=(True,))}, FOUR),
    "a shape that overflows to fit": ({"a": entry(0, 0, (HUGE, HUGE, 1 << 20))}, b""),
    "a shape that overflows, and is empty": ({"a": entry(0, 0, (HUGE, HUGE, 0))}, b""),
    "a thousand dimensions": ({"a": entry(shape=(1,) * 1000)}, FOUR),
    "another field": ({"a": entry(extra=1)}, FOUR),
    "an entry that is a list": ({"a": [1]}, FOUR),
    "an entry that is none": ({"a": None}, FOUR),
    "metadata that is a list": ({"__metadata__": []}, b""),
    "metadata that is false": ({"__metadata__": False}, b""),
    "metadata that is text": ({"__metadata__": "x"}, b""),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b""),
    "a tensor named __metadata__": ({"__metadata__": entry()}, FOUR),
    "one name twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
    "one name twice, once escaped": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"\\u0061":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
    "one field twice": (b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', FOUR),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', b""),
    "one metadata name twice": (b'{"__metadata__":{"a":"1","a":"2"}}', b""),
    "half a surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
    "half a surrogate in metadata": (b'{"__metadata__":{"a":"\\udfff"}}', b""),
    "a list": (b"[]", b""),
    "nothing": (b"", b""),
    "an open brace": (b"{", b""),
    "two values": (b"{}{}", b""),
    "no JSON": (b"{a:1}", b""),
    "a comment": (b"{}//", b""),
    "NaN": (b'{"a":NaN}', b""),
    "Infinity": (b'{"a":-Infinity}', b""),
    "not UTF-8": (b'{"\xff":1}', b""),
    "a byte order mark": (b"\xef\xbb\xbf{}", b""),
    "white space first": (b" {}", b""),
    "zero bytes after": (b"{}\0\0", b""),
    "a huge number": (b'{"a":' + b"9" * 5000 + b"}", b""),
    "a huge exponent": (b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}', FOUR),
    "depth": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""),
    "depth of lists": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b""),
    "depth as a dtype": (b'{"a":{"dtype":' + b"[" * 900 + b"]" * 900 + b',"shape":[1],"data_offsets":[0,4]}}', FOUR),
}  # fmt: skip


ROW = {"name": "w", "dtype": "F32", "shape": [2, 3]}


def skeleton(**changes: Any) -> dict[str, Any]:
    return {"version": 1, "kind": "skeleton", "tensors": [ROW], **changes}


SKELETONS: dict[str, Any] = {
    "another version": skeleton(version=2),
    "no version": skeleton(version=None),
    "a version that is a list": skeleton(version=[[]]),
    "another kind": skeleton(kind="other"),
    "tensors that are none": skeleton(tensors=None),
    "tensors that are a map": skeleton(tensors={"w": 1}),
    "a tensor that is a number": skeleton(tensors=[1]),
    "a tensor twice": skeleton(tensors=[ROW, ROW]),
    "a name that is a number": skeleton(tensors=[{**ROW, "name": 3}]),
    "half a surrogate as a name": skeleton(tensors=[{**ROW, "name": "\ud800"}]),
    "an unknown dtype": skeleton(tensors=[{**ROW, "dtype": "X"}]),
    "a dtype that is a list": skeleton(tensors=[{**ROW, "dtype": [[]]}]),
    "a shape that is a number": skeleton(tensors=[{**ROW, "shape": 3}]),
    "a negative shape": skeleton(tensors=[{**ROW, "shape": [-1]}]),
    "a shape of booleans": skeleton(tensors=[{**ROW, "shape": [True]}]),
    "a shape that overflows": skeleton(tensors=[{**ROW, "shape": [1 << 62, 4]}]),
    "forty thousand dimensions": skeleton(tensors=[{**ROW, "shape": [1 << 62] * 40_000}]),
    "a shape that overflows, and is empty": skeleton(tensors=[{**ROW, "shape": [0, 1 << 62, 1 << 62]}]),
    "ties that are a number": skeleton(ties=3),
    "a tie that is a number": skeleton(ties=[3]),
    "a tie to nothing": skeleton(ties=[["w", "none"]]),
    "a tie that is a list": skeleton(ties=[[["w"]]]),
    "entries that are a map": skeleton(entries={}),
    "an entry that is a number": skeleton(entries=[3]),
    "metadata that is a list": skeleton(module_metadata=[]),
    "metadata of numbers": skeleton(module_metadata={"": 3}),
}

# The shards `one.safetensors` (a, b) and `two.safetensors` (c) are there.
A = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
INDEXES: dict[str, Any] = {
    "nothing": {},
    "a list": [],
    "none": None,
    "a number as a shard": {"a": 3},
    "none as a shard": {"a": None},
    "a key that no shard has": {**A, "d": "two.safetensors"},
    "a key in another shard than it says": {**A, "c": "one.safetensors"},
    "a shard that is not there": {"a": "one.safetensors", "b": "one.safetensors"} | {"c": "none.safetensors"},
    "a key of a shard that is not listed": {"a": "one.safetensors", "c": "two.safetensors"},
    "a path that leads up": {**A, "c": "../folder/two.safetensors"},
    "an absolute path": {**A, "c": "/etc/hostname"},
    "a path from here": {**A, "c": "./two.safetensors"},
    "a path below": {**A, "c": "sub/two.safetensors"},
    "a backslash": {**A, "c": "sub\\two.safetensors"},
    "the folder above": {**A, "c": ".."},
    "the folder": {**A, "c": "."},
    "no name": {**A, "c": ""},
    "a zero byte": {**A, "c": "two.safetensors\0"},
    "an endless name": {**A, "c": "x" * 5000},
    "itself": {**A, "c": "model.safetensors.index.json"},
    "a skeleton": {**A, "c": "net.json"},
    "a folder below": {**A, "c": "below"},
    "a link that leads out": {**A, "c": "outside"},
    "a FIFO": {**A, "c": "pipe"},
    "a device": {**A, "c": "zero"},
    "a link to nothing": {**A, "c": "dangling"},
    "a link to a link that leads out": {**A, "c": "chain"},
    "garbage": {**A, "c": "garbage"},
    "half a surrogate": {**A, "c": "\ud800"},
}
