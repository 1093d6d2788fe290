"""Target keys whose values the target's own loading code computes from old keys, such as a fused or a rescaled tensor.

These values are in no file: only torch's load computes them. So a plan hands the source's old keys to torch's load unchanged, and takes the
values that it leaves in the model. The code of a module gets all of its old keys or none: where one of its values is in doubt, all of them
are refused. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptsurgeon.dtypes import widens
from ckptsurgeon.errors import PlanError
from ckptsurgeon.formats.registry import loading
from ckptsurgeon.hints import shortened
from ckptsurgeon.planning.apply_rules import Names
from ckptsurgeon.planning.keys import SourceKey
from ckptsurgeon.report import Finding
from ckptsurgeon.rules.loading_code import Made, Taken, is_below
from ckptsurgeon.rules.patterns import Pattern, compile_pattern
from ckptsurgeon.tensors import Checkpoint

if TYPE_CHECKING:
    from ckptsurgeon.planning.plan_types import Plan, Step


@dataclass(frozen=True)
class Computed:
    """The values that loading code computes.

    Attributes:
        made: by target key, how the value is computed.
        source_keys: by target key, the source keys that it is computed from.
        handed: by the name that torch's load needs, the source key that it gets.
        refused: by target key, values that a plan can't have computed, each with the reason.
    """

    made: Mapping[str, Made] = field(default_factory=dict)
    source_keys: Mapping[str, tuple[SourceKey, ...]] = field(default_factory=dict)
    handed: Mapping[str, SourceKey] = field(default_factory=dict)
    refused: Mapping[str, tuple[Made, str]] = field(default_factory=dict)


def find_computed(
    sources: Sequence[Checkpoint], target: Checkpoint | None, names: Names, *, average: bool = False, allowed: Iterable[str] = ()
) -> Computed:
    """What the target's loading code computes; `allowed` are patterns of keys whose casts may lose values."""
    made: dict[str, Made] = {}
    source_keys: dict[str, tuple[SourceKey, ...]] = {}
    handed: dict[str, SourceKey] = {}
    refused: dict[str, tuple[Made, str]] = {}
    if target is None:
        return Computed()
    patterns = [compile_pattern(pattern) for pattern in allowed]
    for number, taken in names.outside.taken.items():
        for head, values in _by_module(taken).items():
            rules = (*names.inits, *names.keeps, *names.adapts)
            ruled = {key: str(rule.rule) for rule in rules for key in values if rule.match(key) is not None}
            if len(ruled) == len(values):
                continue
            items_of = {name: names.handed.get((number, name), ()) for name, path in taken.handed.items() if path == head}
            claims = {name: names.claims[name].source_keys for value in values.values() for name in value.names if name in names.claims}
            doubt = "sources are averaged, and each has its own" if average else _doubt(number, head, items_of, sources, names, values)
            reasons = {key: doubt or _unfit(value, target[key].dtype, key, patterns) or ruled.get(key, "") for key, value in values.items()}
            if any(reasons.values()):
                first = next(key for key, why in reasons.items() if why)
                refused.update({key: (value, reasons[key] or f"it is computed together with {first}") for key, value in values.items()})
                continue
            keys = {name: items[0].source_keys[0] for name, items in items_of.items()}
            made.update(values)
            handed.update(keys)
            for key, value in values.items():
                keys_of_name = {name: (keys[name],) if name in keys else claims.get(name, ()) for name in value.names}
                source_keys[key] = tuple(source_key for name in value.names for source_key in keys_of_name[name])
    return Computed({key: made[key] for key in target if key in made}, source_keys, handed, refused)


def _by_module(taken: Taken) -> dict[str, dict[str, Made]]:
    """The computed values, by the path of the outermost module whose code computes them."""
    by_head: dict[str, dict[str, Made]] = {}
    for key, value in taken.made.items():
        by_head.setdefault(value.head, {})[key] = value
    return by_head


def _doubt(
    number: int, head: str, handed: Mapping[str, Sequence[object]], sources: Sequence[Checkpoint], names: Names, values: Mapping[str, Made]
) -> str:
    """Why a module's code can't get its old keys unchanged from one source, or `""`."""
    for name in handed:
        items = names.handed.get((number, name), ())
        if len(items) != 1 or len(items[0].source_keys) != 1 or items[0].ops:
            return f"rules lead several tensors, or an adapted one, to {name}"
    for second, taken in names.outside.taken.items():
        if second != number and any(is_below(head, path) or is_below(path, head) or path == head for path in taken.handed.values()):
            return f"{sources[second].path} has old keys for its module too"
    for key in values:
        owner = names.claims[key].source_keys[0][0] if key in names.claims else number
        if owner != number:
            return f"{sources[owner].path} has {key} itself"
    return ""


def _unfit(value: Made, dtype: str, key: str, allowed: Sequence[Pattern]) -> str:
    """Why a computed value does not fit the target's key, whose dtype is `dtype`; `""` where it fits."""
    if not value.fits:
        return "it has another shape than the model's"
    if widens(value.dtype, dtype) or any(pattern.match(key) is not None for pattern in allowed):
        return ""
    return f"torch's load casts it from {value.dtype} to {dtype}, and what that loses is not counted; allow it: allow_cast={[key]!r}"


def refuse(computed: Computed, source: Checkpoint, names: Names) -> None:
    """Raises PlanError where a plan can't have values computed that the target's loading code computes."""
    if not computed.refused:
        return
    from ckptsurgeon.rules.drafting.cover import dropping

    old = {name for value, _ in computed.refused.values() for name in value.names}
    drops = [rule.pattern for rule in dropping(old, {name for aliases in names.names_of.values() for name in aliases} - old)]
    read = loading(source.format).format(repr(source.path))
    raise PlanError(
        "the target's own loading code computes values from keys that it has not, in a way that a plan can't follow",
        problems=shortened(
            f"{key}: a {value.by} makes it from {', '.join(value.names)}; {why}" for key, (value, why) in computed.refused.items()
        ),
        hint=f"load the file by torch once, and take what it leaves: model.load_state_dict({read}, strict=False); "
        f"torch.save(model.state_dict(), 'loaded.pt'); or leave the keys out: drop={drops}",
    )


def casts(computed: Computed, target: Checkpoint | None) -> list[Finding]:
    """Notes on casts by torch's load; what they lose is not counted."""
    return [
        Finding("cast", f"is cast from {value.dtype} to {target[key].dtype} by torch's load; what that loses is not counted", key, "note")
        for key, value in computed.made.items()
        if target is not None and not widens(value.dtype, target[key].dtype)
    ]


def step_problems(step: Step, plan: Plan, sources: Sequence[Checkpoint], target: Checkpoint | None) -> Iterator[str]:
    """Problems of a plan's step that has a value computed."""
    if target is None or step.target not in target:
        return
    if not any(path in target.loaders and step.target in target.loaders[path].keys for path in plan.loaded):
        yield f"{step.target}: no module of the target computes it"
    known = {*plan.handed.values(), *(source_key for row in plan.steps if row.action != "load" for source_key in row.sources)}
    lost = [key for number, key in step.sources if (number, key) not in known or key not in sources[number]]
    if lost:
        yield f"{step.target}: its source {lost[0]} is not there, or not handed to torch's load"
    if (step.cast or target[step.target].dtype) != step.dtype:
        yield f"{step.target}: its ops give {step.cast or target[step.target].dtype}, and its dtype says {step.dtype}"


def plan_problems(plan: Plan, sources: Sequence[Checkpoint]) -> Iterator[str]:
    """Problems of the keys that a plan hands to torch's load."""
    own = {step.target for step in plan.steps if step.action != "load"}
    if plan.handed and not any(step.action == "load" for step in plan.steps):
        yield "keys are handed to torch's load, and nothing is computed of them"
    yield from (f"{name}: is handed to torch's load, and has a step" for name in plan.handed if name in own)
    yield from (f"{key}: is handed to torch's load, and is not there" for number, key in plan.handed.values() if key not in sources[number])
