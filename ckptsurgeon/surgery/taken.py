"""What a model's own loading code does with a source's keys that the model has no name for, as a value; `models.probe` finds it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Taken:
    """For one source, by the names that its keys have after prefix and rules; each time with the class whose code it is.

    Attributes:
        renamed: the model's key that gets the name's tensor as it is.
        dropped: names that are taken out and given to nothing.
        made: by the model's key, the names whose tensors its value is computed from.
        failed: by path of a module, why its code could not be tried.
    """

    renamed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


def code_of(name: str) -> str:
    """How a reason names a class's own loading code."""
    return f"as {name} loads it"
