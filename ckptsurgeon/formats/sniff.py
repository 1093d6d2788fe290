"""Finds a file's format by its content, never by its suffix, and reads it with the module that the registry names.

Files that people often have instead of a checkpoint (an LFS pointer, an HTML page, …) are refused by name, with a hint.
"""

from __future__ import annotations

import gc
import os
import re
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from ckptsurgeon.errors import CheckpointError, FormatError, PointerError
from ckptsurgeon.formats.folders import parts
from ckptsurgeon.formats.registry import TABLE, Format, module, of_folder
from ckptsurgeon.formats.zip_directory import ends_as_zip
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.storage.opening import Source, open_regular
from ckptsurgeon.tensors import Archive

_HEAD = 4096
_TAR = 512
_RULES = re.compile(
    rb"(?:[^\S\n]*(?:#[^\n]*)?\n)*+[^\S\n]*\[\[\s*(?:rename|drop|keep|adapt|init|stage)\s*\]\]|(?:[^\S\n]*(?:#[^\n]*)?\n)*+[^\S\n]*\[set\]"
)
_POINTER = b"version https://git-lfs"
# Offset, bytes there, what the file is, and a hint: formats that are not read.
_NOT_READ: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras, h5py)", "convert it with the library that wrote it"),
    (0, b"GGUF", "is a GGUF file (llama.cpp)", "use the original PyTorch or safetensors checkpoint"),
    (0, b"\x93NUMPY", "is a NumPy array file", "torch.save({'weight': torch.from_numpy(numpy.load(path))}, 'out.pt')"),
    (0, b"\x1f\x8b", "is compressed with gzip", "gunzip it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "unpack it and give the checkpoint inside"),
    (0, b"\x28\xb5\x2f\xfd", "is compressed with zstd", "unzstd it first"),
    (
        257,
        b"ustar",
        "is a tar archive (torch before 0.2 wrote such files)",
        "unpack it, or load and save it again with a torch of that age",
    ),
    (0, b"PK\x05\x06", "is an empty zip archive", "copy or download it again"),
    (4, b"ftyp", "is a video or image file", "give a checkpoint file"),
)


def read(source: Source) -> Archive:
    """Read the header of a checkpoint: a file, a Hugging Face folder, or its index, at a path; or a file in memory.

    Raises only CheckpointError, for anything that is no checkpoint.
    """
    with no_collections():
        if isinstance(source, str) and os.path.isdir(source):
            from ckptsurgeon.formats.folders.hf_folder import FOLDER_NAMES, find_in_folder, names_in, with_unread

            names = names_in(source)
            form = of_folder(names)
            if form is not None:
                return _read_folder(source, form, names, [name for name in FOLDER_NAMES if name in names])
            return with_unread(_read_file(find_in_folder(source), format_of))
        return _read_file(source, format_of)


def _read_folder(folder: str, form: Format, names: Collection[str], files: Sequence[str]) -> Archive:
    if files:
        words = f"holds two checkpoints: a folder of {form.name}, and {files[0]}"
        hint = f"give {parts.word(os.path.join(folder, files[0]))}, or move it to a folder of its own"
        raise FormatError(words, path=folder, hint=hint)
    try:
        archive: Archive = module(form.module).read(folder, names)
        return archive
    except CheckpointError as error:
        error.path = error.path or folder
        raise


@contextmanager
def no_collections() -> Iterator[None]:
    """Pause the garbage collector: a header makes many small values and no garbage, so that its passes find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_file(source: Source, choose: Callable[[OpenFile], Format]) -> Archive:
    with open_regular(source) as file:
        try:
            form = choose(file)
            reader = module(form.module)
            archive: Archive = reader.read(file, _read_shard) if form.index else reader.read(file)
            return archive
        except CheckpointError as error:
            error.path = error.path or file.path
            part = parts.of_broken(file) if isinstance(error, FormatError) else None
            if part is not None:
                raise parts.refused(part, file.path) from error
            raise


def _read_shard(path: str) -> Archive:
    return _read_file(path, _format_of_shard)


def _format_of_shard(file: OpenFile) -> Format:
    form = format_of(file)
    if not form.shards:  # an index in an index could lead back to itself
        raise FormatError("is named as a shard, but is of a format that has none", path=file.path)
    return form


def format_of(file: OpenFile) -> Format:
    """An open file's format, by its content. FormatError, with what the file is and a hint, where it has none that is read."""
    if not file.size:
        raise FormatError("is empty", path=file.path, hint="copy or download it again")
    head = file.read(0, min(_HEAD, file.size))
    if head.startswith(_POINTER):
        raise PointerError("is a Git LFS pointer, not the file itself", path=file.path, hint="git lfs pull")
    known = [form for form in TABLE if form.magic and head.startswith(form.magic)]
    for offset, magic, what, hint in () if known else _NOT_READ:
        if head[offset : offset + len(magic)] == magic:
            raise FormatError(what, path=file.path, hint=hint)
    text = head.lstrip()[:64].lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")):
        raise FormatError("is an HTML page", path=file.path, hint="the download was answered by a web page: log in, or use its raw link")
    if is_rules(head):
        raise FormatError("is a rules file, not a checkpoint", path=file.path, hint=f"give it beside the checkpoint: rules={file.path!r}")
    if _begins_as_tar(head[:_TAR]):
        raise FormatError(
            "is two files in one: torch and tar take its beginning for a tar archive's", path=file.path, hint="do not trust it"
        )
    for form in known or TABLE:
        if (known or form.begins(head)) and (not form.index or module(form.module).is_own(file)):
            if head[:2] != b"PK" and ends_as_zip(file):
                raise FormatError(
                    "is two files in one: it begins as a checkpoint and ends as a zip archive", path=file.path, hint="do not trust it"
                )
            return form
    if file.size < 9:
        raise FormatError("is too short to be a checkpoint", path=file.path, hint="copy or download it again")
    names = ", ".join(form.name for form in TABLE if not form.index)
    raise FormatError(
        "is not a checkpoint of a format that is read here",
        path=file.path,
        hint=f"the formats are {names}, and folders of Hugging Face",
    )


def is_rules(head: bytes) -> bool:
    """Whether a file begins as a rules file does: with a table of a rule, after any comments.

    >>> is_rules(b'# mine\\n[[drop]]\\nkey = "a"'), is_rules(b"[[tool]]")
    (True, False)
    """
    return _RULES.match(head) is not None


def _begins_as_tar(head: bytes) -> bool:
    """Whether these 512 bytes are a tar header, as Python's tarfile decides it: they hold the sum of all other bytes."""
    if len(head) < _TAR:
        return False
    field, rest = head[148:156], head[:148] + head[156:]
    sums = {8 * ord(" ") + sum(numbers) for numbers in (rest, struct.unpack(f"{len(rest)}b", rest))}
    if field[0] in (0o200, 0o377):  # GNU's way to write a large number
        return int.from_bytes(field[1:], "big") - (256**7 if field[0] == 0o377 else 0) in sums
    try:
        return int(field.partition(b"\0")[0].decode("ascii").strip() or "0", 8) in sums
    except ValueError:
        return False
