"""Changes to a file that know its structure: past checksums, lengths and offsets, so that what is changed is read at all.

Every function takes a source of choices and bytes, and gives bytes. atheris hands in `random.Random`, hypothesis its own, which shrinks.
"""

from __future__ import annotations

import json
import pickletools
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from typing import Any

from fuzz_zips import FIELDS, Member, build, members

Mutator = Callable[[Random, bytes], bytes]

INTERESTING = (0, 1, 2, 7, 8, 63, 64, 255, 256, 4095, 1 << 15, (1 << 16) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
TEXTS = (
    "",
    "a",
    "0",
    "1",
    "storage",
    "cpu",
    "state_dict",
    "model",
    "__metadata__",
    "a.b",
    "..",
    "/",
    "x" * 300,
    "\x1b[31m",
    "\ud800",
    "é",
    "\0",
)
GLOBALS = tuple(
    name.split()
    for name in (
        "collections OrderedDict", "collections defaultdict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3",
        "torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state", "collections Counter", "torch Tensor",
        "torch._tensor _rebuild_from_type_v2", "torch FloatStorage", "torch BoolStorage",
        "torch.storage UntypedStorage", "torch Size", "torch device", "torch int8", "torch float8_e4m3fn", "numpy dtype",
        "numpy ndarray", "numpy.core.multiarray scalar", "numpy.core.multiarray _reconstruct", "numpy._core.numeric _frombuffer",
        "_codecs encode", "builtins set", "builtins complex", "builtins dict", "torch.nn.parameter Parameter",
        "torch.nn.parameter Buffer", "os system", "torch.storage _load_from_bytes", "copyreg _reconstructor",
    )
)  # fmt: skip
SINGLES = tuple(bytes([code]) for code in b"(]})NQRabdeloNstu012.\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98")


def blind(random: Random, data: bytes) -> bytes:
    """A few bytes flipped, taken out, doubled or moved."""
    raw = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at, size = random.randint(0, len(raw)), random.randint(1, 8)
        piece = bytes(raw[at : at + size])
        kind = random.randint(0, 5)
        if kind == 0 and piece:
            raw[at] ^= 1 << random.randint(0, 7)
        elif kind == 1:
            del raw[at : at + size]
        elif kind == 2:
            raw[at:at] = piece
        elif kind == 3:
            number = random.choice(INTERESTING)
            width = random.choice((1, 2, 4, 8))
            raw[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 4:
            raw[at : at + size] = bytes(random.randint(0, 255) for _ in range(random.randint(0, 4)))
        else:
            del raw[random.randint(0, len(raw)) :]
    return bytes(raw)


# Pickles: opcode by opcode.


def _opcodes(data: bytes, start: int = 0) -> tuple[list[bytes], int]:
    """The opcodes of the pickle at `start`, each with its operand, and where it ends; all the rest as one where it is no pickle."""
    found: list[bytes] = []
    places: list[int] = []
    try:
        for _, _, place in pickletools.genops(data[start:]):
            places.append(start + (place or 0))
        end = places[-1] + 1
    except (ValueError, IndexError, OverflowError, MemoryError, struct.error):
        end = len(data)
        places = places or [start]
    for place, after in zip(places, [*places[1:], end], strict=True):
        found.append(data[place:after])
    return found, end


def _fragment(random: Random) -> bytes:
    kind = random.randint(0, 6)
    if kind == 0:
        module, name = random.choice(GLOBALS)
        return f"c{module}\n{name}\n".encode()
    if kind == 1:
        text = random.choice(TEXTS).encode("utf-8", "surrogatepass")
        return b"X" + len(text).to_bytes(4, "little") + text
    if kind == 2:
        number = random.choice(INTERESTING)
        width = max((number.bit_length() + 8) // 8, 1)
        return b"\x8a" + bytes([width]) + number.to_bytes(width, "little", signed=True)
    if kind == 3:
        return b"J" + struct.pack("<i", random.choice((0, 1, -1, 2, 1000, (1 << 31) - 1, -(1 << 31))))
    if kind == 4:
        return random.choice((b"h", b"q")) + bytes([random.randint(0, 40)])
    if kind == 5:
        return random.choice((b"G\x7f\xf8\0\0\0\0\0\0", b"U\x01\xff", b"C\x01a", b"\x82\x01", b"I01\n", b"F1e999\n", b"\x80\x04", b"P0\n"))
    return random.choice(SINGLES)


def _operand(random: Random, opcode: bytes) -> bytes:
    """Another operand of the same width."""
    if opcode[:1] in (b"X", b"U", b"\x8c", b"c", b"V", b"S"):
        return _fragment(random)
    width = len(opcode) - 1
    return opcode[:1] + (random.choice(INTERESTING) % (1 << 8 * width)).to_bytes(width, "little") if 0 < width < 9 else _fragment(random)


def _renamed(random: Random, opcodes: list[bytes]) -> list[bytes]:
    """One text is another wherever it stands: what most files survive."""
    texts = sorted({one for one in opcodes if one[:1] in (b"X", b"\x8c")})
    if not texts:
        return opcodes
    old, new = random.choice(texts), random.choice(TEXTS).encode("utf-8", "surrogatepass")
    return [b"X" + len(new).to_bytes(4, "little") + new if one == old else one for one in opcodes]


def program(random: Random, data: bytes) -> bytes:
    """A pickle with some opcodes taken out, doubled, moved, changed, put in, or taken apart from their operands."""
    opcodes, end = _opcodes(data)
    if random.randint(0, 2) == 0:
        return b"".join(_renamed(random, opcodes)) + data[end:]
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(opcodes)) if opcodes else 0
        kind = random.randint(0, 6)
        if kind == 0:
            del opcodes[at : at + 1]
        elif kind == 1:
            opcodes[at:at] = opcodes[at : at + random.randint(1, 6)] * random.randint(1, 3)
        elif kind == 2 and opcodes:
            other = random.randrange(len(opcodes))
            opcodes[at], opcodes[other] = opcodes[other], opcodes[at]
        elif kind == 3 and opcodes:
            opcodes[at] = _operand(random, opcodes[at])
        elif kind == 4 and opcodes:
            opcodes[at] = blind(random, opcodes[at])
        else:
            opcodes[at:at] = [_fragment(random) for _ in range(random.randint(1, 4))]
    return b"".join(opcodes) + data[end:]


def pickles(random: Random, data: bytes) -> bytes:
    """A legacy file: one of its pickles changed, its keys or a storage's length, or the data behind."""
    parts, position = [], 0
    while position < len(data) and len(parts) < 5:
        opcodes, end = _opcodes(data, position)
        parts.append(b"".join(opcodes))
        position = end
    if random.randint(0, 9) == 0 or not parts:
        return blind(random, data)
    at = min(random.choice((0, 1, 2, 3, 3, 3, 3, 3, 4)), len(parts) - 1)
    parts[at] = program(random, parts[at])
    tail = data[position:]
    if random.randint(0, 5) == 0:
        tail = blind(random, tail)
    return b"".join(parts) + tail


# Zips: an honest container around changed entries, or one that lies in a chosen field, in one header or in both.


def archive(random: Random, data: bytes) -> bytes:
    """A zip, mostly with a changed pickle and honest headers."""
    entries = members(data)
    if not entries or random.randint(0, 11) == 0:
        return blind(random, data)
    at = random.randrange(len(entries))
    kind = random.randint(0, 15)
    if kind < 9:
        at = next((index for index, entry in enumerate(entries) if entry.name.endswith(b"data.pkl")), at)
        entries[at] = replace(entries[at], data=program(random, entries[at].data))
    elif kind == 9:
        entries[at] = replace(entries[at], data=blind(random, entries[at].data))
    elif kind == 10:
        entries[at:at] = [replace(entries[random.randrange(len(entries))], flags=random.choice((0, 0, 1, 8, 0x800)))]
    elif kind == 11:
        del entries[at]
    elif kind == 12:
        folder = entries[at].name.partition(b"/")[0]
        names = (
            b"data.pkl",
            b"byteorder",
            b"version",
            b"constants.pkl",
            b"code/a.py",
            b".data/serialization_id",
            b"data/0",
            b"ckptsurgeon.json",
            b"",
        )
        entries.append(
            Member(
                folder + b"/" + random.choice(names), random.choice((b"little", b"big", b"3\n", b"{}", b'{"fresh": ["a"]}', b"\x80\x02}."))
            )
        )
    elif kind == 13:
        entries[at] = replace(
            entries[at], method=random.choice((0, 8)), flags=random.choice((0, 8, 0x800)), extra=random.choice((b"", b"FB\2\0ZZ"))
        )
    else:
        lie = {random.choice(FIELDS): random.choice(INTERESTING) % (1 << 16)}
        both = random.randint(0, 2)
        entries[at] = replace(entries[at], local=lie if both != 1 else {}, central=lie if both != 0 else {})
    end = (
        {random.choice(("count", "here", "size", "start", "comment")): random.choice(INTERESTING) % (1 << 16)}
        if random.randint(0, 19) == 0
        else {}
    )
    return build(entries, end=end)


# JSON: as a value, sometimes as text.

WORDS = (
    "F32", "F16", "BOOL", "U8", "F4", "dtype", "shape", "data_offsets", "name", "tensors", "ties", "entries", "weight_map", "version",
    "kind", "a", "fc.weight", "copy", "rename", "adapt", "init", "keep", "op", "cast", "slice", "pad", "reshape", "rows", "concat",
    "steps", "one.safetensors", "two.bin", "three.json", "../one.safetensors", "zeros", "normal(0, 1)", "source.pt", "target", "sources",
    "file",
)  # fmt: skip


def _leaf(random: Random) -> Any:
    kind = random.randint(0, 6)
    if kind == 0:
        return random.choice(INTERESTING) * random.choice((1, 1, 1, -1))
    if kind == 1:
        return random.choice(TEXTS)
    if kind == 2:
        return random.choice(WORDS)
    if kind == 3:
        return random.choice((None, True, False, 1.5, -0.0, 1e308, 2, 3, 12))
    if kind == 4:
        return random.choice(([], {}, [[]], [0, 0], [1, 2], {"a": 1}, [None], {"op": "cast", "dtype": "F16"}))
    return random.randint(-2, 20)


def changed(random: Random, value: Any) -> Any:
    """A JSON value with one place in it changed."""
    if isinstance(value, (dict, list)) and value and random.randint(0, 7):
        names = list(value) if isinstance(value, dict) else list(range(len(value)))
        at = random.choice(names)
        kind = random.randint(0, 11)
        copied: Any = dict(value) if isinstance(value, dict) else list(value)
        if kind == 0:
            del copied[at]
        elif kind == 1 and isinstance(copied, dict):
            copied[random.choice((*WORDS, *TEXTS))] = copied[at]
        elif kind == 1:
            copied.append(copied[at])
        elif kind == 2:
            copied[at] = copied[random.choice(names)]
        else:
            copied[at] = changed(random, copied[at])
        return copied
    if type(value) is int and random.randint(0, 1):
        return value + random.choice((-1, 1, 2, 8))
    return _leaf(random)


def _texts(value: Any) -> set[str]:
    """Every text in a JSON value, names too."""
    if isinstance(value, dict):
        return {*value, *(text for one in value.values() for text in _texts(one))}
    return {text for one in value for text in _texts(one)} if isinstance(value, list) else {value} if isinstance(value, str) else set()


def _with(value: Any, old: str, new: str) -> Any:
    """The value with one text for another, wherever it stands."""
    if isinstance(value, dict):
        return {_with(name, old, new): _with(one, old, new) for name, one in value.items()}
    return [_with(one, old, new) for one in value] if isinstance(value, list) else new if value == old else value


def _gently(random: Random, value: Any) -> Any:
    """A change that most readers take: another text throughout, another order, a tensor of another shape or dtype of that size."""
    kind = random.randint(0, 3)
    texts = sorted(_texts(value) - set(WORDS[:16]))
    if kind < 2 and texts:
        return _with(value, random.choice(texts), random.choice((*TEXTS, *texts)))
    if kind == 2 and isinstance(value, dict):
        names = list(value)
        random.shuffle(names)
        return {name: value[name] for name in names}
    tensors = [one for one in (value.values() if isinstance(value, dict) else ()) if isinstance(one, dict) and "data_offsets" in one]
    if tensors and isinstance(value, dict):
        chosen = random.choice(tensors)
        same = {"F32": ("I32", "U32"), "F16": ("BF16", "I16"), "I64": ("F64", "U64", "C64"), "F8_E4M3": ("I8", "U8", "F8_E5M2")}
        new = {**chosen, "dtype": random.choice(same.get(str(chosen.get("dtype")), (chosen.get("dtype"),)))}
        new["shape"] = [1, *chosen["shape"]] if isinstance(chosen.get("shape"), list) and random.randint(0, 1) else chosen.get("shape")
        return {name: new if one is chosen else one for name, one in value.items()}
    return value


def _json(random: Random, data: bytes) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return blind(random, data)
    if gentle := random.randint(0, 2) == 0:
        value = _gently(random, value)
    for _ in range(0 if gentle else random.randint(1, 3)):
        value = changed(random, value)
    raw = json.dumps(value).encode()
    kind = random.randint(0, 11)
    if kind == 0:
        return blind(random, raw)
    if kind == 1 and raw[:1] == b"{" and len(raw) > 2:  # a name twice, or a value that JSON does not have
        return (
            b"{"
            + random.choice((raw[1:-1], b'"x": NaN', b'"x": 1e999', b'"x": -0', b'"x": ' + b"9" * 5000, b'"\\ud800": 1'))
            + b","
            + raw[1:]
        )
    if kind == 2:
        return json.dumps(value, ensure_ascii=False, indent=random.choice((None, 1))).encode("utf-8", "surrogatepass")
    return raw


def header(random: Random, data: bytes) -> bytes:
    """A safetensors file: its header as JSON, the length mended; sometimes another length, other data, or only bytes."""
    size = int.from_bytes(data[:8], "little")
    if random.randint(0, 9) == 0 or size > len(data):
        return blind(random, data)
    raw, body = data[8 : 8 + size], data[8 + size :]
    raw = _json(random, raw)
    kind = random.randint(0, 9)
    if kind == 0:
        body = blind(random, body)
    elif kind == 1:
        raw += b" " * random.randint(0, 9)
    length = len(raw) if kind != 2 else random.choice((*INTERESTING, len(raw) - 1, len(raw) + 1))
    return (length % (1 << 64)).to_bytes(8, "little") + raw + body


# Text.

PIECES = (
    "[[rename]]", "[[drop]]", "[[keep]]", "[[adapt]]", "[[init]]", "[[stage]]", 'from = "a.{p}"', 'to = "b.{p}"', 'key = "a.**"',
    "key = 1", 'op = "slice(dim=0)"', 'op = "chunk(dim=0) | reshape(shape=[2, -1])"', "op = 'pad(dim=0, size=9, fill=\"mean\")'",
    'scheme = "zeros"', "scheme = 'normal(0, 1)'", 'to = ["a", "b"]', "to = []", "a = {}", "[x]", '"""', "'''", "# [[drop]]", "\\u0000",
    "= 1", "inf", "1979-05-27", "{i+1}", "{**rest}", "**", "*", "{a,b}", "{0..99999}", "{0..9}", "{i*i*i}", "{i//0}", "{(((1)))}", "{",
    "}", "{p}", "{p}{q}", "{i%2-3}", ".", "..",
    "9" * 40, "stack(dim=0)", "rows(source='labels', target='labels')", "permute(dims=[1, 0])",
    "interleave(dim=0, parts=2)", "average(weights=[1e308, 1e308])",
)  # fmt: skip


def text(random: Random, data: bytes) -> bytes:
    """Lines and words of a text changed."""
    if random.randint(0, 9) == 0:
        return blind(random, data)
    words = data.decode("utf-8", "replace")
    if random.randint(0, 2) == 0:  # one word is another throughout, or there is more space
        found = sorted(
            set(re.findall(r"[a-z]+", words)) - {"from", "to", "key", "op", "scheme", "rename", "adapt", "init", "drop", "keep", "stage"}
        )
        old, new = random.choice(found or ["a"]), random.choice(("layer", "x", "a.b", "é", "w_1", "**", "0", "a b"))
        return re.sub(rf"\b{old}\b", lambda _: new, words).replace("\n", random.choice(("\n", "\n", "\r\n", "\n\n", "\n# x\n"))).encode()
    for _ in range(random.randint(1, 3)):
        lines = words.split("\n")
        at = random.randrange(len(lines))
        kind = random.randint(0, 5)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines[at:at] = lines[at : at + random.randint(1, 4)]
        elif kind == 2:
            lines.insert(at, random.choice(PIECES))
        else:
            place = random.randint(0, len(lines[at]))
            gone = random.choice((0, 0, 1, 3))
            lines[at] = lines[at][:place] + random.choice((*PIECES, *TEXTS)) + lines[at][place + gone :]
        words = "\n".join(lines)
    return words.encode("utf-8", "surrogatepass")


def labels(random: Random, data: bytes) -> bytes:
    """A list of tokens, as JSON or as lines."""
    return _json(random, data) if data[:1] in (b"{", b"[") and random.randint(0, 5) else text(random, data)


MUTATORS: Mapping[str, Mutator] = {
    "zip": archive,
    "legacy": pickles,
    "training": lambda random, data: archive(random, data) if data[:2] == b"PK" else pickles(random, data),
    "safetensors": header,
    "json": _json,
    "planfile": _json,
    "rulefile": text,
    "patterns": text,
    "labels": labels,
}
