"""What a model's own loading code does with a source's keys that the model has no name for. Found out by `own_loading.probe`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptsurgeon.wrappers import HIDDEN, unwrap


@dataclass(frozen=True)
class Made:
    """A value that loading code computes: from the tensors of these names, in `dtype`, by code of the class `by`.

    `fits` is False where it is put into a tensor of another shape than the model's, or not seen to be put anywhere.
    """

    names: tuple[str, ...]
    by: str
    dtype: str
    fits: bool = True


@dataclass(frozen=True)
class Taken:
    """For one source, by the names that its keys have after prefix and rules; each time with the class whose code it is.

    Attributes:
        renamed: the model's key that gets the name's tensor as it is.
        dropped: names that are taken out and given to nothing.
        made: by the model's key, what its value is computed from.
        handed: names that torch's load needs as they are, since code that computes values may look at them; each with the path of the
            outermost module whose code it is. Such code's renames are in `made`.
        failed: by path of a module, why its code could not be tried.
    """

    renamed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Made] = field(default_factory=dict)
    handed: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


def code_of(name: str) -> str:
    """How a reason names a class's own loading code."""
    return f"as {name} loads it"


def is_below(name: str, path: str) -> bool:
    """Whether a key's name lies in the module at a path; `""` is the model itself. Keys lack the segments that wrappers hide."""
    return not path or name.startswith(f"{unwrap(path, HIDDEN)}.")
