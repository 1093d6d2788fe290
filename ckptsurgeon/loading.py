"""How a live model is loaded: its modules with loading code of their own, and how its library's files name and lay out tensors.

Values only. `models/target` makes them from a model, `planning/own_loading` uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Loader:
    """A module with its own loading code: its class, and the keys of the state_dict that the code can reach.

    `changes` is False where the code is known only to rename keys.
    """

    name: str
    keys: frozenset[str]
    changes: bool = True


@dataclass(frozen=True)
class Made:
    """A tensor of the model that a file stores in parts or in another layout: it is made by `ops` from the tensors `names`, in order.

    `shape` is the shape of the result, `by` the library's own description.
    """

    names: tuple[str, ...]
    ops: tuple[Mapping[str, Any], ...]
    shape: Shape
    by: str


@dataclass(frozen=True)
class Converted:
    """What a library's conversions do with the names of one file.

    Attributes:
        renamed: the model's key that gets the name's tensor as it is.
        made: by the model's key, how it is made.
        refused: names whose conversion no adapter can do, each with the reason.
        ignored: names that the library leaves out without a warning.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Made] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()


class Naming(Protocol):
    """How the files of a model's library become the model, by the library's own code, from names and shapes only."""

    @property
    def library(self) -> str:
        """The library and its version."""

    def convert(self, shapes: Mapping[str, Shape]) -> Converted:
        """The conversion of a file's names, with their shapes. The same names and shapes always give the same result."""

    def may_lack(self, key: str) -> bool:
        """Whether the library loads a file without this key of the model and doesn't warn."""
