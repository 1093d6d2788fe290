"""A table of what an optimizer's state_dict may hold, and a parser that checks one before any of its tensors is read. Pure.

torch stores state by position: `{"state": {0: {"exp_avg": …}}, "param_groups": [{"lr": …, "params": [0, 1]}]}`. Parts that contradict each
other are a FormatError. `assign` finds which parameter a position belongs to.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckptsurgeon.adapters.op import Shape
from ckptsurgeon.errors import FormatError
from ckptsurgeon.tensors import Refused, TensorMeta

Leaf = Any  # a TensorMeta, a number, None, or Refused
State = Mapping[str, Leaf]


@dataclass(frozen=True)
class Slot:
    """One value that an optimizer keeps for a parameter.

    Attributes:
        name: its name in the state.
        kind: a `moment` of the parameter's shape, a `step` count, or a `code`, which is carried unchanged or not at all.
        when: the hyper-parameter with which the optimizer keeps it; None for always.
        needed: whether nothing of a parameter's state is carried without it; else it starts at zero.
    """

    name: str
    kind: Literal["moment", "step", "code"] = "moment"
    when: str | None = None
    needed: bool = True


_STEP = Slot("step", "step")
# What the optimizers of bitsandbytes keep: 8-bit codes (`state1`) in blocks of the parameter's elements, which have a meaning only with the
# blocks' scales (`absmax1`, else `max1`) and the table of values (`qmap1`); for small parameters, float32. Newer versions save the tensors
# in a nested dict.
BITSANDBYTES = "bitsandbytes"
_WRAPPED = "__bnb_optimizer_quant_state__"
_KEPT: tuple[str, ...] = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2", "max1", "max2", "new_max1", "new_max2")
_KEPT += ("gnorm_vec", "unorm_vec", "step")
_ADAM = (_STEP, Slot("exp_avg"), Slot("exp_avg_sq"), Slot("max_exp_avg_sq", when="amsgrad", needed=False))
SLOTS: Mapping[str, tuple[Slot, ...]] = {
    "SGD": (Slot("momentum_buffer", when="momentum"),),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "RMSprop": (
        _STEP,
        Slot("square_avg"),
        Slot("momentum_buffer", when="momentum", needed=False),
        Slot("grad_avg", when="centered", needed=False),
    ),
    BITSANDBYTES: tuple(Slot(name, "code", needed=name in ("step", "state1")) for name in _KEPT),
}
# The hyper-parameter that only this optimizer's saved groups have: RMSprop keeps a momentum_buffer as SGD does.
MARKS: Mapping[str, str] = {"SGD": "dampening", "Adam": "betas", "AdamW": "betas", "RMSprop": "alpha"}


@dataclass(frozen=True)
class Saved:
    """A parsed optimizer state_dict.

    Attributes:
        groups: the hyper-parameters of each group.
        positions: the positions in each group, in order.
        names: the parameters' names, in the order of all positions; None where it has no names.
        state: by position, the values that the optimizer keeps.
    """

    groups: tuple[Mapping[str, Any], ...]
    positions: tuple[tuple[Hashable, ...], ...]
    names: tuple[str, ...] | None
    state: Mapping[Hashable, State]

    @property
    def flat(self) -> tuple[Hashable, ...]:
        """All positions, group after group."""
        return tuple(position for group in self.positions for position in group)

    @property
    def by_bitsandbytes(self) -> bool:
        """Whether an optimizer of bitsandbytes wrote it."""
        return any("state1" in state for state in self.state.values())

    def shape_of(self, position: Hashable) -> Shape | None:
        """The shape of a position's moments; None if it has none. FormatError if they differ."""
        state = self.state.get(position, {})
        moments = _MOMENTS if "state2" not in state else _MOMENTS - {"state1"}  # AdEMAMix keeps two averages in one `state1`
        shapes = {name: leaf.shape for name, leaf in state.items() if type(leaf) is TensorMeta and name in moments}
        if len(set(shapes.values())) > 1:
            raise FormatError(f"has moments of different shapes for position {_short(position)}: {_shapes(shapes)}")
        return next(iter(shapes.values()), None)


_MOMENTS = frozenset(slot.name for slots in SLOTS.values() for slot in slots if slot.kind == "moment") | {"state1", "state2"}


def read_saved(value: Any) -> Saved:
    """Parse an optimizer's state_dict, in which tensors are `TensorMeta`.

    Raises:
        FormatError: it is not an optimizer's state_dict, or its parts contradict each other; the message names the part.

    >>> saved = read_saved({"state": {0: {"momentum_buffer": None}}, "param_groups": [{"lr": 0.1, "params": [0], "param_names": ["w"]}]})
    >>> saved.names, saved.positions, saved.groups[0]["lr"]
    (('w',), ((0,),), 0.1)
    """
    if isinstance(value, Refused):
        raise FormatError(f"holds {value.reason} in place of an optimizer's state_dict", hint="save optimizer.state_dict() instead")
    value = _unflattened(value) if isinstance(value, Mapping) and value and "state" not in value else value
    state: Any = value.get("state") if isinstance(value, Mapping) else None
    groups: Any = value.get("param_groups") if isinstance(value, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(groups, (list, tuple)):
        raise FormatError("is no optimizer's state_dict: it lacks a dict `state` or a list `param_groups`")
    positions = tuple(_positions(number, group) for number, group in enumerate(groups))
    flat = [position for group in positions for position in group]
    if len(set(flat)) != len(flat):
        raise FormatError("has a position in two groups, or twice in one")
    known = set(flat)
    flattened = {position: _flat(values) for position, values in _by_position(state, known).items()}
    for position, values in flattened.items():
        if position not in known or type(position) is bool:
            raise FormatError(f"has state for position {_short(position)}, which no group has")
        if not isinstance(values, Mapping) or not all(type(name) is str for name in values):
            raise FormatError(f"has something other than named values as the state of position {_short(position)}")
    options = tuple({name: option for name, option in group.items() if name not in ("params", "param_names")} for group in groups)
    return Saved(options, positions, _names(groups, positions), flattened)


def _by_position(state: Mapping[Any, Any], known: Collection[Hashable]) -> Mapping[Any, Any]:
    """The state by the positions that groups name: torch.distributed.checkpoint writes the keys of every dict as text, numbers too.

    >>> _by_position({"0": "a", "1": "b"}, {0, 1, 2}), _by_position({"0": "a"}, {"0"})
    ({0: 'a', 1: 'b'}, {'0': 'a'})
    """
    numbers = {str(position): position for position in known if type(position) is int}
    return {numbers[key]: values for key, values in state.items()} if state and numbers.keys() >= state.keys() else state


def _unflattened(value: Mapping[Any, Any]) -> Mapping[str, Any]:
    """A flattened state, as torch's `flatten_optimizer_state_dict` makes it (`state.fc.weight.exp_avg`, `param_groups.fc.weight.lr`), in
    torch's nested form. Parameters with equal hyper-parameters become one group.

    >>> _unflattened({"state.w.step": 1, "param_groups.w.lr": 0.1, "param_groups.b.lr": 0.1})
    {'state': {'w': {'step': 1}}, 'param_groups': [{'lr': 0.1, 'params': ['w', 'b']}]}
    """
    parts: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for key, leaf in value.items():
        kind, _, rest = key.partition(".") if type(key) is str else ("", "", "")
        name, _, last = rest.rpartition(".")
        if kind not in parts or not name:
            return value
        parts[kind].setdefault(name, {})[last] = leaf
    groups: dict[str, dict[str, Any]] = {}
    for name, options in parts["param_groups"].items():
        groups.setdefault(repr(sorted(options.items())), {**options, "params": []})["params"].append(name)
    return {"state": parts["state"], "param_groups": list(groups.values())}


def _flat(values: Any) -> Any:
    """A parameter's state, with the tensors of the nested dict in which bitsandbytes saves them."""
    nested = values.get(_WRAPPED) if isinstance(values, Mapping) else None
    return {**{name: value for name, value in values.items() if name != _WRAPPED}, **nested} if isinstance(nested, Mapping) else values


def _positions(number: int, group: Any) -> tuple[Hashable, ...]:
    params: Any = group.get("params") if isinstance(group, Mapping) else None
    if not isinstance(params, (list, tuple)):
        raise FormatError(f"has no list of parameters in its group {number}")
    if not all(type(param) is str or (type(param) is int and 0 <= param < 1 << 64) for param in params):
        raise FormatError(f"has a parameter in its group {number} that is neither a position nor a name")
    return tuple(params)


def _names(groups: Sequence[Mapping[str, Any]], positions: Sequence[tuple[Hashable, ...]]) -> tuple[str, ...] | None:
    """The parameters' names, in order: the positions themselves if they are names, else `param_names`; None if a group has
    neither."""
    flat = [position for group in positions for position in group]
    if flat and all(type(position) is str for position in flat):
        return tuple(map(str, flat))
    all_names: list[str] = []
    for number, (group, params) in enumerate(zip(groups, positions, strict=True)):
        names = group.get("param_names")
        if names is None:
            if params:
                return None
            continue
        if type(names) not in (list, tuple) or len(names) != len(params) or not all(type(name) is str for name in names):
            raise FormatError(f"has param_names in its group {number} that are not one name for each of its {len(params)} parameters")
        all_names += names
    if len(set(all_names)) != len(all_names):
        raise FormatError("has the same name for two parameters")
    return tuple(all_names)


def _short(position: Hashable) -> str:
    return repr(position)[:60] if type(position) is str else str(position) if type(position) is int and position < 1 << 64 else "…"


def _shapes(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:6])


def wanted_slots(optimizer: str, group: Mapping[str, Any]) -> tuple[Slot, ...]:
    """The slots that an optimizer of `SLOTS` keeps with a group's hyper-parameters.

    >>> [slot.name for slot in wanted_slots("SGD", {"momentum": 0.9})], wanted_slots("SGD", {"momentum": 0})
    (['momentum_buffer'], ())
    """
    return tuple(slot for slot in SLOTS[optimizer] if slot.when is None or group.get(slot.when))
