"""What a live model says of how it is loaded: its modules with code of their own, and how its library's files name and lay out tensors.

Values only. `models/target` learns them from a model, `planning/own_loading` uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Loader:
    """A module that loads in its own way: its class, and the keys of the state_dict that its code can reach.

    `changes` is False where the code is known to do no more than give keys other names.
    """

    name: str
    keys: frozenset[str]
    changes: bool = True


@dataclass(frozen=True)
class Made:
    """A tensor of the model that a file holds in other parts or in another layout: of these names, in order, by these ops, it is made.

    `shape` is what comes out of them, `by` the library's own words for what is done.
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
        made: by the model's key, what it is made of.
        refused: names whose conversion is no adapter here, each with the reason.
        ignored: names that the library leaves out without a word.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Made] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()


class Naming(Protocol):
    """How the files of a model's library become the model: told by the library's own code, on names and shapes alone."""

    @property
    def library(self) -> str:
        """The library and its version."""

    def convert(self, shapes: Mapping[str, Shape]) -> Converted:
        """What becomes of these names of a file, with their shapes. The same names and shapes always give the same."""

    def may_lack(self, key: str) -> bool:
        """Whether the library loads a file without this key of the model and says nothing."""
