"""The types that several public functions take, each by one name; `arguments` says in words what each of them accepts.

`torch` and `nn` here are imported when something of them is first used: signatures name torch's types, and only asking for their hints
(`typing.get_type_hints`) imports torch. The type of an event is imported in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from io import BytesIO
from types import ModuleType
from typing import TYPE_CHECKING, Any, ForwardRef

from ckptsurgeon.tensors import Archive, Checkpoint


class LazyModule(ModuleType):
    """A module that is imported when one of its names is first used.

    >>> LazyModule("math").sqrt(4)
    2.0
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


if TYPE_CHECKING:
    import torch as torch
    from torch import nn as nn

    from ckptsurgeon.progress import Progress

    Model = nn.Module
    Dtype = str | torch.dtype
else:
    torch, nn, progress = LazyModule("torch"), LazyModule("torch.nn"), LazyModule("ckptsurgeon.progress")
    Progress = ForwardRef("progress.Progress", module=__name__)
    Model = ForwardRef("nn.Module", module=__name__)
    Dtype = str | ForwardRef("torch.dtype", module=__name__)

Path = str | os.PathLike[str]
Note = Callable[[str], None]  # gets each note, a line of text
OnProgress = Callable[[Progress], None]  # gets each event of how far the work is
Renames = Mapping[str, str] | Iterable[tuple[str, str]]
Words = str | Iterable[str]
Given = Path | BytesIO | Checkpoint | Archive | Model | Mapping[str, Any]  # a file on disk or in memory, a spec, a model, a state_dict
Scheme = str | Callable[..., Any]  # a scheme's text, or a function (tensor, generator)
NoDecay = bool | str | Iterable[bool | str]
