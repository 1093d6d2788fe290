"""Compares a written file with the plan, bitwise and without torch, after opening it again.

Copied tensors are compared byte for byte with their source, computed ones by the SHA-256 of the bytes that were written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from ckptsurgeon import formats
from ckptsurgeon.errors import VerificationError
from ckptsurgeon.formats.layout import WEIGHTS, Stored
from ckptsurgeon.progress import Advance, nobody
from ckptsurgeon.storage import copying
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.storage.opening import OpenFiles, open_regular
from ckptsurgeon.storage.pieces import runs
from ckptsurgeon.streaming.moved_ranges import Ranges
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.tensors import TensorMeta


@dataclass(frozen=True)
class Expected:
    """A tensor that the file must hold: copied from `ranges` of files, or a `copy` of a source tensor in pieces, or computed, with the
    SHA-256 `digest`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    ranges: Ranges | None
    digest: str | None
    copy: TensorMeta | None = None


def prove(
    path: str,
    expected: Sequence[Expected],
    entries: Mapping[str, Any],
    reader: Reader,
    around: Any = WEIGHTS,
    advance: Advance = nobody,
) -> None:
    """Raises VerificationError, naming every key, where the file or folder at `path` is not exactly what the plan says.

    `around` is the value that contains the state_dict; `advance` gets the number of bytes that were just compared.
    """
    archive = formats.read(path)
    state_dict = archive.state_dicts[0]
    problems: list[str] = []
    others: dict[str, TensorMeta] = {}
    if around != WEIGHTS:
        problems += [f"{place}: is not what was to be there" for place in _differences("", around, formats.read_tree(path).value, others)]
    tensors = {**state_dict.tensors, **others}
    names = {item.name: None for item in expected}
    problems += [f"{name}: is not in the file" for name in names if name not in tensors]
    problems += [f"{name}: is in the file, and not in the plan" for name in tensors if name not in names]
    if repr(_plain(state_dict.entries)) != repr(_plain(entries)):  # repr, since a NaN is not equal to itself
        problems.append("the values that are no tensors differ")
    with OpenFiles() as opened:
        files = {stamp.path: opened.add(open_regular(stamp.path)) for stamp in archive.files}
        for item in expected:
            tensor = tensors.get(item.name)
            if tensor is None:
                continue
            if (tensor.dtype, tensor.shape) != (item.dtype, item.shape):
                problems.append(f"{item.name}: is {tensor.dtype} {tensor.shape}, not {item.dtype} {item.shape}")
            elif not _same(files, tensor, item, reader, advance):
                problems.append(f"{item.name}: its bytes differ")
    if problems:
        raise VerificationError(
            "what was written is not what was planned; nothing was kept",
            path=path,
            problems=tuple(problems),
            hint="run it again; if it stays so, check the disk and report it",
        )


def _differences(place: str, expected: Any, written: Any, tensors: dict[str, TensorMeta]) -> Iterator[str]:
    """The places where a written value differs from the expected one. The tensors that `Stored` stands for are added to `tensors`."""
    if type(expected) is Stored:
        if expected.name is not None and type(written) is TensorMeta:
            tensors[expected.name] = written
    elif isinstance(expected, Mapping) and type(written) is dict and list(expected) == list(written):
        for name, value in expected.items():
            yield from _differences(f"{place}.{name}" if place else str(name), value, written[name], tensors)
    elif type(expected) in (list, tuple) and type(written) is type(expected) and len(written) == len(expected):
        for index, (value, item) in enumerate(zip(expected, written, strict=True)):
            yield from _differences(f"{place}.{index}", value, item, tensors)
    elif isinstance(expected, Mapping) or type(expected) is not type(written) or repr(expected) != repr(written):
        yield place


def _plain(value: Any) -> Any:
    """The value with all mappings as dicts, which is what a file holds."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _same(files: Mapping[str, OpenFile], tensor: TensorMeta, item: Expected, reader: Reader, advance: Advance) -> bool:
    written = tuple(runs(tensor))
    if len(written) > 1 or not tensor.as_stored:
        return False  # every tensor is written in one piece
    file = files[written[0].file] if written else next(iter(files.values()))
    position = written[0].offset if written else 0
    end = position + tensor.nbytes
    if item.ranges is not None:
        for each in item.ranges:
            source, offset = reader.locate(each)
            if position + each.nbytes > end or not copying.equal_ranges(file, position, source, offset, each.nbytes, advance):
                return False
            position += each.nbytes
        return position == end
    if item.copy is not None:
        for part in reader.parts(item.copy):
            nbytes = memoryview(part).nbytes
            if position + nbytes > end or file.read(position, nbytes) != part:
                return False
            position += nbytes
            advance(nbytes)
        return position == end
    digest = sha256()
    for chunk in copying.chunks(file, end - tensor.nbytes, tensor.nbytes):
        digest.update(chunk)
        advance(len(chunk))
    return digest.hexdigest() == item.digest
