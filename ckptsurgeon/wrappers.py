"""The one table of the segments that wrappers put into a model's names: DataParallel, torch.compile, FSDP, activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterable

# They occur at a key's beginning or within it.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
# Segments in a module's path and a parameter's name that a hook removes from the keys of the state_dict.
HIDDEN = frozenset(name for name in WRAPPERS if name.endswith("_wrapped_module"))


def unwrap(key: str, wrappers: Iterable[str]) -> str:
    """`key` without the segments in `wrappers`.

    >>> unwrap("module.layer1._orig_mod.conv.weight", ("module", "_orig_mod"))
    'layer1.conv.weight'
    """
    for wrapper in wrappers:
        if wrapper in key:
            return ".".join(segment for segment in key.split(".") if segment not in wrappers) or key
    return key
