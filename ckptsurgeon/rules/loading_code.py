"""What a model's own loading code does with a source's keys that the model has no name for. `own_loading.probe` finds it out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from ckptsurgeon.tensors import Checkpoint, TensorMeta
from ckptsurgeon.wrappers import HIDDEN, unwrap


@dataclass(frozen=True)
class Made:
    """A value that loading code computes: from the tensors of these names, in `dtype`, by code of the class `by`.

    `fits` is False where its shape is not that of the model's tensor, or where the code was not seen to store it anywhere. `head` is the
    path of the outermost module whose code it is. A value is `filled` in where the code makes it of no tensor; its name is then one that
    the code got.
    """

    names: tuple[str, ...]
    by: str
    dtype: str
    fits: bool = True
    head: str = ""
    filled: bool = False

    @property
    def read(self) -> tuple[str, ...]:
        """The names that the code made it of."""
        return () if self.filled else self.names

    @property
    def words(self) -> str:
        """The computation in words, as a reason."""
        what = f"computed from {', '.join(self.names)}" if not self.filled else "filled in"
        return f"is {what}, {code_of(self.by)}"


@dataclass(frozen=True)
class Taken:
    """What loading code does with the names of one source, as they are after prefix and rules. Each entry names the class whose code it is.

    Attributes:
        renamed: the model's key that gets the name's tensor as it is.
        dropped: names that the code removes without using them.
        made: by the model's key, how its value is computed.
        handed: names that torch's load needs as they are, since code that computes values may look at them; each with the path of the
            outermost module whose code it is. Such code's renames are in `made`.
        failed: by path of a module, why its code could not be tried.
        grown: names for which the code makes new tensors in the model, each with the class; they are among those `dropped`.
        changed: the model's keys that get anything but their own value.
    """

    renamed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Made] = field(default_factory=dict)
    handed: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    grown: Mapping[str, str] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()

    @property
    def read(self) -> set[str]:
        """The names that the code makes values of."""
        return {name for made in self.made.values() for name in made.read}

    def words(self) -> Iterator[tuple[str, str]]:
        """Each name that the code renames or leaves out, and each key that it computes, with the reason in words."""
        yield from self.moved()
        yield from ((key, made.words) for key, made in self.made.items())

    def moved(self) -> Iterator[tuple[str, str]]:
        """Each name that the code renames or leaves out, with the reason in words."""
        yield from ((name, f"→ {key}, {code_of(by)}") for name, (key, by) in self.renamed.items())
        yield from ((name, f"left out, {code_of(by)}") for name, by in self.dropped.items())


def needs_probe(tensors: Mapping[str, TensorMeta], target: Checkpoint, absent: Collection[str]) -> bool:
    """Whether a module with loading code gets names that the target lacks, or has with another shape, or lacks one of the keys `absent`."""
    unfitting = [name for name, meta in tensors.items() if name not in target or target[name].shape != meta.shape]
    return any(is_below(name, path) for path in target.loaders for name in (*unfitting, *absent))


def code_of(name: str) -> str:
    """The words with which a reason names a class's own loading code."""
    return f"as {name} loads it"


def is_below(name: str, path: str) -> bool:
    """Whether a key is in the module at a path; `""` is the model itself. Keys lack the segments that wrappers hide."""
    return not path or name.startswith(f"{unwrap(path, HIDDEN)}.")
