"""Asks transformers how it converts the files of its models, on names and shapes alone.

`save_pretrained` writes the names and the layout of a model's first release. For each model, transformers 5 knows how to get from there to
the model's own: by renamings, and by converters with operations on tensors. Its own functions rename the names here; the table in
`conversion_ops` translates an operation into ops, or refuses it by name.

Rule: nothing of transformers is imported. Whoever has a model of transformers has imported what is needed.
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
from ckptsurgeon.models.target.conversion_ops import Conversion, Part, operate

LONGEST = 512  # characters of a name that the library's regular expressions are matched against: their time may grow quadratically
_KEPT = 4  # cached answers: one call asks for the same names several times


@dataclass(frozen=True)
class _Model:
    """A model of transformers within the target: its path, its keys with their shapes, and what transformers knows about its files."""

    path: str
    own: Mapping[str, Shape]
    renamings: tuple[Any, ...]
    converters: tuple[Any, ...]
    prefix: str
    config: Any
    unexpected: re.Pattern[str] | None
    missing: re.Pattern[str] | None

    def key(self, name: str) -> str:
        """The target's key for a name in this model."""
        return f"{self.path}.{name}" if self.path else name


@dataclass
class _Group:
    """The names that one converter takes together, by the pattern that they matched, and the first key that the converter gives."""

    converter: Any
    key: str
    names: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class TransformersNaming:
    """The `Naming` of transformers, for each outermost model of transformers in the target."""

    library: str
    models: tuple[_Model, ...]
    keys: frozenset[str]
    _answers: dict[tuple[tuple[str, Shape], ...], Converted] = field(default_factory=dict, repr=False, compare=False)

    def convert(self, shapes: Mapping[str, Shape]) -> Converted:
        """See `Naming`."""
        rows = tuple(shapes.items())
        converted = self._answers.get(rows)
        if converted is None:
            try:
                converted = self._answers[rows] = user_code.call(self.library, self._convert, shapes)
            except TargetError as error:
                error.reason = f"its conversions fail on these names: {error.reason}"
                error.hint = "take names as they are: --no-conversions"
                raise
            while len(self._answers) > _KEPT:
                del self._answers[next(iter(self._answers))]
        return converted

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
            keys, groups, unused = _sort(core, model, names)
            renamed.update((name, model.key(key)) for name, key in keys.items())
            ignored.update(name for name, key in unused.items() if model.unexpected is not None and model.unexpected.search(key))
            for group in groups:
                _add_converted(core, model, group, shapes, renamed, made, refused)
        return Converted({name: key for name, key in renamed.items() if name != key}, made, refused, frozenset(ignored))

    def _by_model(self, names: Iterable[str]) -> Iterator[tuple[_Model, dict[str, str]]]:
        """Each model with the file's names for it, each with the name without the model's path.

        If the target has only one model, names without its path belong to it too: the file was saved from that model itself.
        """
        by_model: list[dict[str, str]] = [{} for _ in self.models]
        for name in names:
            if len(name) > LONGEST or not name.isascii():
                continue  # not a name that the library gives
            index = next((index for index, model in enumerate(self.models) if name.startswith(model.key(""))), None)
            if index is not None:
                by_model[index][name] = name.removeprefix(self.models[index].key(""))
            elif len(self.models) == 1 and name not in self.keys:
                by_model[0][name] = name
        yield from zip(self.models, by_model, strict=True)


def find_naming(model: nn.Module, state: Mapping[str, Any]) -> Naming | None:
    """How transformers converts the files of `model`; None if it neither is nor contains a model of transformers 5.

    >>> find_naming(nn.Linear(1, 1), {}) is None
    True
    """
    modeling, mapping = sys.modules.get("transformers.modeling_utils"), sys.modules.get("transformers.conversion_mapping")
    if modeling is None or mapping is None or "transformers.core_model_loading" not in sys.modules:
        return None
    outermost: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, modeling.PreTrainedModel) and not any(not outer or path.startswith(f"{outer}.") for outer in outermost):
            outermost[path] = module
    library = f"transformers {getattr(sys.modules.get('transformers'), '__version__', '')}".rstrip()
    try:
        models = tuple(user_code.call(library, _learned, mapping, path, module, state) for path, module in outermost.items())
    except TargetError:
        return None  # a release with another interface
    return TransformersNaming(library, models, frozenset(state)) if models else None


def _learned(mapping: Any, path: str, module: Any, state: Mapping[str, Any]) -> _Model:
    core = sys.modules["transformers.core_model_loading"]
    prefix = f"{path}." if path else ""
    own = {key.removeprefix(prefix): tuple(getattr(value, "shape", ())) for key, value in state.items() if key.startswith(prefix)}
    conversions = mapping.get_model_conversion_mapping(module)
    unexpected = list(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
    # As transformers does when it loads: buffers that were saved in the past, and are computed now.
    buffers = [f"{inner}.{name}" for inner, submodule in module.named_modules() for name in submodule._buffers]
    unexpected += [r"rotary_emb\.inv_freq"] if any(name.endswith("rotary_emb.inv_freq") for name in buffers) else []
    unexpected += [r"(^|\.)position_ids$"] if any(name.endswith("position_ids") for name in buffers) else []
    return _Model(
        path,
        own,
        tuple(conversion for conversion in conversions if isinstance(conversion, core.WeightRenaming)),
        tuple(conversion for conversion in conversions if isinstance(conversion, core.WeightConverter)),
        str(module.base_model_prefix),
        module.config,
        _any(unexpected),
        _any(getattr(module, "_keys_to_ignore_on_load_missing", None) or ()),
    )


def _any(patterns: Iterable[str]) -> re.Pattern[str] | None:
    """One regular expression for all of the library's."""
    ordered = sorted(patterns)
    return re.compile("|".join(f"(?:{pattern})" for pattern in ordered)) if ordered else None


def _sort(core: Any, model: _Model, names: Mapping[str, str]) -> tuple[dict[str, str], list[_Group], dict[str, str]]:
    """What transformers' loading does with names: the key of each name that is taken as it is, the groups that converters take, and the
    unused names with the key that they would get."""
    renamings = deepcopy(model.renamings)  # some of them have a state
    by_pattern = {pattern: converter for converter in model.converters for pattern in converter.source_patterns}
    keys: dict[str, str] = {}
    groups: dict[str, _Group] = {}
    unused: dict[str, str] = {}
    for name, own_name in sorted(names.items(), key=lambda row: core.dot_natural_key(row[1])):
        key, pattern = core.rename_source_key(own_name, renamings, model.converters, model.prefix, model.own)
        if key not in model.own and own_name in model.own:
            key, pattern = core.rename_source_key(own_name, [], [], model.prefix, model.own)
        if key not in model.own:
            unused[name] = key
        elif pattern is None:
            keys[name] = key
        else:
            group = groups.setdefault(key, _Group(by_pattern[pattern], key))
            group.names.setdefault(pattern, []).append(name)
    return keys, list(groups.values()), unused


def _add_converted(
    core: Any,
    model: _Model,
    group: _Group,
    shapes: Mapping[str, Shape],
    renamed: dict[str, str],
    made: dict[str, Made],
    refused: dict[str, str],
) -> None:
    """Add what a converter does with its group to `renamed`, `made` or `refused`."""
    names = [name for matching in group.names.values() for name in matching]
    words = " and ".join(type(op).__name__ for op in group.converter.operations)
    try:
        conversion = Conversion(
            core.__name__,
            group.key,
            tuple(group.converter.source_patterns),
            tuple(group.converter.target_patterns),
            model.own,
            model.config,
        )
        inputs = {pattern: [Part((name,), (), shapes[name]) for name in matching] for pattern, matching in group.names.items()}
        parts = operate(group.converter.operations, inputs, conversion)
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
