"""Helpers of the tests of rules and plans: checkpoints made by hand, live ones from torch, and strategies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

from hypothesis import strategies as st
from torch import nn

from ckptsurgeon.models.target.skeleton import checkpoint_of
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.tensors import Archive, Checkpoint, Span, StateDict, TensorMeta, contiguous_stride

Shapes = Mapping[str, tuple[int, ...]] | Iterable[str]


def metas(shapes: Shapes, dtype: str = "F32", file: str | None = None) -> dict[str, TensorMeta]:
    """Tensors by name: of the given shapes, or all of shape (2,); with a `file`, each with a storage of its own."""
    items = shapes.items() if isinstance(shapes, Mapping) else [(name, (2,)) for name in shapes]
    made = {}
    for number, (name, shape) in enumerate(items):
        meta = TensorMeta(name, dtype, tuple(shape), contiguous_stride(tuple(shape)))
        span = None if file is None else Span(file, 1000 * number, meta.nbytes, str(number))
        made[name] = TensorMeta(name, dtype, meta.shape, meta.stride, span)
    return made


def checkpoint(shapes: Shapes, path: str = "a.pt", format: str = "torch-zip", dtype: str = "F32", **more: Any) -> Checkpoint:
    """A checkpoint by hand."""
    tensors = metas(shapes, dtype, path if format.startswith("torch") else None)
    more.setdefault("kind", format if format in ("model", "skeleton") else "file")
    return Checkpoint(path, format, more.pop("fingerprint", sha256(path.encode()).hexdigest()), tensors, **more)


def model(shapes: Shapes, **more: Any) -> Checkpoint:
    """A target of format `model`, by hand."""
    return checkpoint(shapes, more.pop("path", "model:Net"), more.pop("format", "model"), **more)


def live(module: nn.Module, path: str = "model:Net") -> Checkpoint:
    """A real module as a checkpoint."""
    return checkpoint_of(module, path)


def archive(roots: Mapping[str, Shapes], **more: Any) -> Archive:
    """A file with several state_dicts, by hand; every tensor has a storage of its own."""
    dicts = tuple(StateDict(root, metas(shapes, file=f"a.pt/{root}")) for root, shapes in roots.items())
    return Archive("a.pt", "torch-zip", "0", (), dicts, **more)


def rule(kind: Any, pattern: str, result: str = "") -> Rule:
    """One rule."""
    return Rule(kind, pattern, result)


# Few names and few shapes, so that sources and targets meet in every way.
_segments = st.sampled_from(["a", "b", "fc", "module", "0", "1"])
names = st.lists(_segments, min_size=1, max_size=3).map(".".join)
shapes = st.dictionaries(names, st.sampled_from([(), (1,), (2,), (2, 3)]), max_size=8)


@st.composite
def targets(draw: st.DrawFn) -> Checkpoint:
    """A target of any kind, sometimes with tied keys."""
    drawn = draw(shapes)
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for key, shape in drawn.items():
        by_shape.setdefault(shape, []).append(key)
    ties = tuple(tuple(keys) for keys in by_shape.values() if len(keys) > 1 and draw(st.booleans()))
    return checkpoint(
        drawn, "target", draw(st.sampled_from(["model", "torch-zip"])), dtype=draw(st.sampled_from(["F32", "F16"])), ties=ties
    )


patterns = st.one_of(
    names,
    st.sampled_from(["*", "**", "a.**", "**.b", "{p}", "{p}.{**rest}", "fc.*", "a*", "/.*/", "{i}.a"]),
)
drops = patterns.map(lambda text: Rule("drop", text))
any_rules = st.lists(
    st.one_of(
        drops,
        st.tuples(names, names).map(lambda pair: Rule("rename", *pair)),
        st.sampled_from([Rule("rename", "a.{**p}", "b.{**p}"), Rule("rename", "{p}.{**rest}", "{**rest}"), Rule("init", "**", "zeros")]),
    ),
    max_size=2,
)
