"""A torch file's whole value as plain values, with a `TensorMeta` for each tensor: weights, optimizer state and all else in the file.

Rule: dicts, lists, tuples, scalars and tensors are kept; everything else becomes `Refused`, with the reason. Nothing that a file names is
imported or called, and no tensor's bytes are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.errors import CheckpointError, FormatError
from ckptsurgeon.formats.folders.hf_folder import names_in
from ckptsurgeon.formats.pickle.globals import SCALARS, key_text
from ckptsurgeon.formats.pickle.unpickled import NAMES, Claims, Locate, Unpacked, refusal, tensor_meta
from ckptsurgeon.formats.pickle.values import Encoded, PickledDict, TensorRef
from ckptsurgeon.formats.registry import module, named, of_folder
from ckptsurgeon.formats.sniff import format_of, no_collections
from ckptsurgeon.limit_table import Budget, allowed, exceeded
from ckptsurgeon.storage.files import changed
from ckptsurgeon.storage.opening import Source, open_regular
from ckptsurgeon.tensors import Archive, Checkpoint, FileStamp, Refused, TensorMeta


@dataclass(frozen=True)
class ValueTree:
    """All values of a file: `value` has dicts, lists, tuples, scalars, `TensorMeta` (named by dotted path) and `Refused`.

    A value that the pickle shares is shared in `value` too; where a container is inside itself, it is `Refused`. `files` are the files as
    read.
    """

    path: str
    value: Any
    files: tuple[FileStamp, ...] = ()


def read_tree(source: Source) -> ValueTree:
    """Everything in a torch zip or legacy file, or a folder of ranks' files, without running any of it.

    Raises:
        FormatError: a file of another format, which holds only tensors under names, or which can't be read.
        StaleError: the file has changed since it was seen.

    >>> read_tree("fixtures/net_params.pkl").value["fc3.bias"].shape
    (10,)
    """
    if isinstance(source, str) and os.path.isdir(source) and (form := of_folder(names := names_in(source))) is not None:
        with no_collections():
            tree: ValueTree = module(form.module).read_tree(source, names)
            return tree
    with no_collections(), open_regular(source) as file:
        try:
            form = format_of(file)
            if not form.pickled:
                raise FormatError("holds tensors under names and nothing beside them", hint="give the torch file that training wrote")
            unpacked: Unpacked = module(form.module).unpack(file)
            return ValueTree(file.path, plain_tree(file.path, unpacked), (file.stamp,))
        except CheckpointError as error:
            error.path = error.path or file.path
            raise


def tree_of(seen: Archive | Checkpoint) -> ValueTree:
    """Everything in a file or folder whose headers were read, as `read_tree`; StaleError where it has changed since."""
    form = named(seen.format)
    if not form.holds_folder:
        return read_tree(seen.files[0])
    with no_collections():
        tree: ValueTree = module(form.module).read_tree(seen.path, names_in(seen.path))
    if tree.files != seen.files:
        raise changed(seen.path)
    return tree


def tensors_of(value: Any, dotted: str = "") -> Iterator[tuple[str, TensorMeta]]:
    """Every tensor of a tree, by its dotted path."""
    if isinstance(value, TensorMeta):
        yield dotted, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for name, child in items:
        yield from tensors_of(child, f"{dotted}.{name}" if dotted else str(name))


def plain_tree(path: str, unpacked: Unpacked, dotted: str = "") -> Any:
    """The value of an unpacked pickle as a tree of plain values; its tensors are named below the dotted path `dotted`."""
    walk = _Walk(path, unpacked.locate, Budget(path, unpacked.nbytes), {}, allowed("nesting"), Claims())
    value = walk.plain(dotted, unpacked.value, 0)
    walk.claims.check(path)
    return value


@dataclass
class _Walk:
    """One walk over a value. `known` has the results by the ids of values, so that a shared value is walked once, and a cycle ends."""

    path: str
    locate: Locate
    budget: Budget
    known: dict[int, Any]
    deepest: int
    claims: Claims

    def plain(self, dotted: str, node: Any, depth: int) -> Any:
        kind = type(node)
        if kind in SCALARS or kind is complex:
            return node
        if depth > self.deepest and kind in (PickledDict, list, tuple):
            raise exceeded("nesting", f"nests its containers more than {self.deepest} deep", path=self.path)
        if id(node) not in self.known:
            self.known[id(node)] = Refused("a value that contains itself")
            self.known[id(node)] = self._plain(dotted, node, depth)
        return self.known[id(node)]

    def _plain(self, dotted: str, node: Any, depth: int) -> Any:
        kind = type(node)
        if kind is TensorRef:
            return tensor_meta(self.path, dotted, node, self.locate, self.claims)
        if kind is Encoded:
            return node.raw
        if kind in (list, tuple):
            return kind([self._child(dotted, str(index), child, depth) for index, child in enumerate(node)])
        if kind is not PickledDict:
            return Refused(refusal(node))
        if not all(type(key) in SCALARS for key in node):
            return Refused("a dict with keys that are neither text nor numbers")
        return {key: self._child(dotted, key if type(key) is str else key_text(key), child, depth) for key, child in node.items()}

    def _child(self, dotted: str, name: str, child: Any, depth: int) -> Any:
        if type(child) in SCALARS:
            return child
        self.budget.spend("name-characters", len(dotted) + len(name) + 1, NAMES)
        return self.plain(f"{dotted}.{name}" if dotted else name, child, depth + 1)
