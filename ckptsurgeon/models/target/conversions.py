"""How transformers says that the files of one of its models are read: asked of its own code, on names and shapes alone.

What `save_pretrained` writes has the names and the layout of a model's first release. transformers 5 keeps, for each model, what leads from
there to the model's own: renamings, and converters with operations on tensors. Its own functions rename the names here, so that nothing is
told twice; an operation becomes ops of ours by the table in `conversion_ops`, or is refused by its name.

Rule: nothing of transformers is imported. A model of transformers has imported what is needed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ckptsurgeon.errors import RuleError, TargetError
from ckptsurgeon.loading import Converted, Made, Naming, Shape
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.conversion_ops import Layer, Part, operate

LONGEST = 512  # characters of a name that the library's regular expressions are asked about, whose time may grow with their square
_KEPT = 4  # answers that are kept: a call asks for the same names again and again


@dataclass(frozen=True)
class _Model:
    """A model of transformers within the target: at which path, its own keys with their shapes, and what transformers says of it."""

    path: str
    own: Mapping[str, Shape]
    renamings: tuple[Any, ...]
    converters: tuple[Any, ...]
    prefix: str
    config: Any
    unexpected: re.Pattern[str] | None
    missing: re.Pattern[str] | None

    def key(self, name: str) -> str:
        """The target's key of a name of this model."""
        return f"{self.path}.{name}" if self.path else name


@dataclass
class _Group:
    """The names that one converter takes together, by the pattern that they matched, and the first key that it gives."""

    converter: Any
    key: str
    names: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class TransformersNaming:
    """A `Naming` by transformers: that of each outermost model of transformers in the target."""

    library: str
    models: tuple[_Model, ...]
    keys: frozenset[str]
    _answers: dict[tuple[tuple[str, Shape], ...], Converted] = field(default_factory=dict, repr=False, compare=False)

    def convert(self, shapes: Mapping[str, Shape]) -> Converted:
        """See `Naming`."""
        asked = tuple(shapes.items())
        found = self._answers.get(asked)
        if found is None:
            try:
                found = self._answers[asked] = user_code.call(self.library, self._convert, shapes)
            except TargetError as error:
                error.reason = f"its conversions fail on these names: {error.reason}"
                error.hint = "take names as they are: --no-conversions"
                raise
            while len(self._answers) > _KEPT:
                del self._answers[next(iter(self._answers))]
        return found

    def may_lack(self, key: str) -> bool:
        """See `Naming`."""
        return any(
            model.missing is not None and model.missing.search(key.removeprefix(model.key("")))
            for model in self.models
            if key.startswith(model.key(""))
        )

    def _convert(self, shapes: Mapping[str, Shape]) -> Converted:
        core = sys.modules["transformers.core_model_loading"]
        renamed: dict[str, str] = {}
        made: dict[str, Made] = {}
        refused: dict[str, str] = {}
        ignored: set[str] = set()
        for model, names in self._by_model(shapes):
            moved, groups, left = _sorted_out(core, model, names)
            renamed.update((name, model.key(key)) for name, key in moved.items())
            ignored.update(name for name, key in left.items() if model.unexpected is not None and model.unexpected.search(key))
            for group in groups:
                _follow(core, model, group, shapes, renamed, made, refused)
        return Converted({name: key for name, key in renamed.items() if name != key}, made, refused, frozenset(ignored))

    def _by_model(self, names: Iterable[str]) -> Iterator[tuple[_Model, dict[str, str]]]:
        """Each model with its names in the file, each as the model would have it. Those of a file that was saved from the only model of
        the target have no path before them."""
        found: list[dict[str, str]] = [{} for _ in self.models]
        for name in names:
            if len(name) > LONGEST or not name.isascii():
                continue  # no name of the library's
            place = next((place for place, model in enumerate(self.models) if name.startswith(model.key(""))), None)
            if place is not None:
                found[place][name] = name.removeprefix(self.models[place].key(""))
            elif len(self.models) == 1 and name not in self.keys:
                found[0][name] = name
        yield from zip(self.models, found, strict=True)


def find_naming(model: nn.Module, state: Mapping[str, Any]) -> Naming | None:
    """How the library of `model` says that its files are read; None where it is no model of transformers 5, and has none in it.

    >>> find_naming(nn.Linear(1, 1), {}) is None
    True
    """
    modeling, mapping = sys.modules.get("transformers.modeling_utils"), sys.modules.get("transformers.conversion_mapping")
    if modeling is None or mapping is None or "transformers.core_model_loading" not in sys.modules:
        return None
    outermost: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, modeling.PreTrainedModel) and not any(not head or path.startswith(f"{head}.") for head in outermost):
            outermost[path] = module
    library = f"transformers {getattr(sys.modules.get('transformers'), '__version__', '')}".rstrip()
    try:
        models = tuple(user_code.call(library, _learned, mapping, path, module, state) for path, module in outermost.items())
    except TargetError:
        return None  # another release, whose code answers otherwise
    return TransformersNaming(library, models, frozenset(state)) if models else None


def _learned(mapping: Any, path: str, module: Any, state: Mapping[str, Any]) -> _Model:
    core = sys.modules["transformers.core_model_loading"]
    head = f"{path}." if path else ""
    own = {key.removeprefix(head): tuple(getattr(value, "shape", ())) for key, value in state.items() if key.startswith(head)}
    found = mapping.get_model_conversion_mapping(module)
    unexpected = list(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
    # As transformers does when it loads: buffers that once were saved, and are computed today.
    buffers = [f"{place}.{name}" for place, one in module.named_modules() for name in one._buffers]
    unexpected += [r"rotary_emb\.inv_freq"] if any(name.endswith("rotary_emb.inv_freq") for name in buffers) else []
    unexpected += [r"(^|\.)position_ids$"] if any(name.endswith("position_ids") for name in buffers) else []
    return _Model(
        path,
        own,
        tuple(one for one in found if isinstance(one, core.WeightRenaming)),
        tuple(one for one in found if isinstance(one, core.WeightConverter)),
        str(module.base_model_prefix),
        module.config,
        _any(unexpected),
        _any(getattr(module, "_keys_to_ignore_on_load_missing", None) or ()),
    )


def _any(patterns: Iterable[str]) -> re.Pattern[str] | None:
    """One regular expression for all of the library's own, which `search` asks for anywhere in a key."""
    found = sorted(patterns)
    return re.compile("|".join(f"(?:{pattern})" for pattern in found)) if found else None


def _sorted_out(core: Any, model: _Model, names: Mapping[str, str]) -> tuple[dict[str, str], list[_Group], dict[str, str]]:
    """What transformers' loading makes of names: those that get another name, the groups that converters take, and those that are left,
    with the name that they would have."""
    renamings = deepcopy(model.renamings)  # some of them remember what they have seen
    by_pattern = {pattern: converter for converter in model.converters for pattern in converter.source_patterns}
    moved: dict[str, str] = {}
    groups: dict[str, _Group] = {}
    left: dict[str, str] = {}
    for name, given in sorted(names.items(), key=lambda row: core.dot_natural_key(row[1])):
        key, pattern = core.rename_source_key(given, renamings, model.converters, model.prefix, model.own)
        if key not in model.own and given in model.own:
            key, pattern = core.rename_source_key(given, [], [], model.prefix, model.own)
        if key not in model.own:
            left[name] = key
        elif pattern is None:
            moved[name] = key
        else:
            group = groups.setdefault(key, _Group(by_pattern[pattern], key))
            group.names.setdefault(pattern, []).append(name)
    return moved, list(groups.values()), left


def _follow(
    core: Any,
    model: _Model,
    group: _Group,
    shapes: Mapping[str, Shape],
    renamed: dict[str, str],
    made: dict[str, Made],
    refused: dict[str, str],
) -> None:
    """What a converter makes of its group, added to `renamed`, `made` or `refused`."""
    names = [name for found in group.names.values() for name in found]
    words = " and ".join(type(op).__name__ for op in group.converter.operations)
    try:
        layer = Layer(
            core.__name__,
            group.key,
            tuple(group.converter.source_patterns),
            tuple(group.converter.target_patterns),
            model.own,
            model.config,
        )
        given = {pattern: [Part((name,), (), shapes[name]) for name in found] for pattern, found in group.names.items()}
        parts = operate(group.converter.operations, given, layer)
    except RuleError as error:
        refused.update(dict.fromkeys(names, f"{words}: {error.reason}"))
        return
    for key, part in parts.items():
        if key not in model.own:
            continue
        if part.ops:
            made[model.key(key)] = Made(part.names, part.ops, part.shape, words)
        else:
            renamed[part.names[0]] = model.key(key)
