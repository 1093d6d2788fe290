"""Holds a written file against what was to be written, bitwise and without torch. It believes nothing: it opens the file afresh.

Copied tensors are compared byte for byte with their source, made ones by the SHA-256 of what was made.
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
    """A tensor as it should stand in the file: copied from `ranges` of files, or a `copy` that was put together of pieces, or made with
    `digest`."""

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
    """Raises VerificationError, naming every key, when the file or folder at `path` is not exactly what was to be written.

    `around` is the value in which the state_dict stands; `advance` gets how many bytes more were compared.
    """
    archive = formats.read(path)
    found = archive.state_dicts[0]
    problems: list[str] = []
    beside: dict[str, TensorMeta] = {}
    if around != WEIGHTS:
        problems += [f"{place}: is not what was to be there" for place in _differences("", around, formats.read_tree(path).value, beside)]
    tensors = {**found.tensors, **beside}
    names = {item.name: None for item in expected}
    problems += [f"{name}: is not in the file" for name in names if name not in tensors]
    problems += [f"{name}: is in the file, and not in the plan" for name in tensors if name not in names]
    if repr(_plain(found.entries)) != repr(_plain(entries)):  # repr, since a NaN is not equal to itself
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


def _differences(place: str, expected: Any, found: Any, tensors: dict[str, TensorMeta]) -> Iterator[str]:
    """The places where a written value is not what it was to be; the tensors that `Stored` stand for are collected, to be compared."""
    if type(expected) is Stored:
        if expected.name is not None and type(found) is TensorMeta:
            tensors[expected.name] = found
    elif isinstance(expected, Mapping) and type(found) is dict and list(expected) == list(found):
        for name, value in expected.items():
            yield from _differences(f"{place}.{name}" if place else str(name), value, found[name], tensors)
    elif type(expected) in (list, tuple) and type(found) is type(expected) and len(found) == len(expected):
        for index, (value, one) in enumerate(zip(expected, found, strict=True)):
            yield from _differences(f"{place}.{index}", value, one, tensors)
    elif isinstance(expected, Mapping) or type(expected) is not type(found) or repr(expected) != repr(found):
        yield place


def _plain(value: Any) -> Any:
    """Every kind of mapping as a dict, since that is what a file holds."""
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
