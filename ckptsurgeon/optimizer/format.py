"""What an optimizer's state_dict may hold, in one table, and how it is looked through: pure, before any of its tensors is read.

torch stores state by position: `{"state": {0: {"exp_avg": …}}, "param_groups": [{"lr": …, "params": [0, 1]}]}`. Nothing is believed here:
what does not go together is a FormatError. Whose a position is, is not decided here.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckptsurgeon.adapters.op import Shape
from ckptsurgeon.errors import FormatError
from ckptsurgeon.tensors import Refused, TensorMeta

Leaf = Any  # a TensorMeta, a number, None, or Refused
State = Mapping[str, Leaf]


@dataclass(frozen=True)
class Slot:
    """One value that an optimizer keeps for a parameter: a `moment` of its shape, a `step` count, or a `code`, which is carried as it is or
    not at all.

    `when` is the hyper-parameter that asks for it, None for always. Without one that is `needed`, nothing of a parameter is carried;
    another starts at zero.
    """

    name: str
    kind: Literal["moment", "step", "code"] = "moment"
    when: str | None = None
    needed: bool = True


_STEP = Slot("step", "step")
# What the optimizers of bitsandbytes keep: 8-bit codes (`state1`) in blocks of the parameter's elements, which mean something only with the
# blocks' scales (`absmax1`, else `max1`) and the table of values (`qmap1`); of small parameters, float32. Newer versions save the tensors
# in a dict of their own.
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
# A hyper-parameter that tells an optimizer's saved groups from those of others: RMSprop's momentum_buffer is none for SGD.
MARKS: Mapping[str, str] = {"SGD": "dampening", "Adam": "betas", "AdamW": "betas", "RMSprop": "alpha"}


@dataclass(frozen=True)
class Saved:
    """An optimizer's state_dict that was looked through: its groups' hyper-parameters, the positions in each, in order, the parameters'
    names if it has them, and by position what it keeps."""

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
        """The shape of a position's moments; None without one. FormatError where they differ."""
        state = self.state.get(position, {})
        moments = _MOMENTS if "state2" not in state else _MOMENTS - {"state1"}  # AdEMAMix keeps two averages in one `state1`
        shapes = {name: leaf.shape for name, leaf in state.items() if type(leaf) is TensorMeta and name in moments}
        if len(set(shapes.values())) > 1:
            raise FormatError(f"has moments of unlike shapes for position {_short(position)}: {_shapes(shapes)}")
        return next(iter(shapes.values()), None)


_MOMENTS = frozenset(slot.name for slots in SLOTS.values() for slot in slots if slot.kind == "moment") | {"state1", "state2"}


def read_saved(value: Any) -> Saved:
    """Look through an optimizer's state_dict, whose tensors stand as `TensorMeta`.

    Raises:
        FormatError: it is none, or its parts do not go together; it names the part.

    >>> saved = read_saved({"state": {0: {"momentum_buffer": None}}, "param_groups": [{"lr": 0.1, "params": [0], "param_names": ["w"]}]})
    >>> saved.names, saved.positions, saved.groups[0]["lr"]
    (('w',), ((0,),), 0.1)
    """
    if isinstance(value, Refused):
        raise FormatError(f"holds {value.reason} in place of an optimizer's state_dict", hint="save optimizer.state_dict() instead")
    value = _unflattened(value) if isinstance(value, Mapping) and "state" not in value else value
    state: Any = value.get("state") if isinstance(value, Mapping) else None
    groups: Any = value.get("param_groups") if isinstance(value, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(groups, (list, tuple)):
        raise FormatError("is no optimizer's state_dict: it lacks a dict `state` or a list `param_groups`")
    positions = tuple(_positions(number, group) for number, group in enumerate(groups))
    flat = [position for group in positions for position in group]
    if len(set(flat)) != len(flat):
        raise FormatError("has a position in two groups, or twice in one")
    known = set(flat)
    flattened = {position: _flat(kept) for position, kept in state.items()}
    for position, kept in flattened.items():
        if position not in known or type(position) is bool:
            raise FormatError(f"has state for position {_short(position)}, which no group has")
        if not isinstance(kept, Mapping) or not all(type(name) is str for name in kept):
            raise FormatError(f"has something other than named values as the state of position {_short(position)}")
    plain = tuple({name: one for name, one in group.items() if name not in ("params", "param_names")} for group in groups)
    return Saved(plain, positions, _names(groups, positions), flattened)


def _unflattened(value: Mapping[Any, Any]) -> Mapping[str, Any]:
    """A state with one key for each value, as torch's `flatten_optimizer_state_dict` names them, as torch's own: `state.fc.weight.exp_avg`,
    and `param_groups.fc.weight.lr`. Parameters whose hyper-parameters are all equal are one group.

    >>> _unflattened({"state.w.step": 1, "param_groups.w.lr": 0.1, "param_groups.b.lr": 0.1})
    {'state': {'w': {'step': 1}}, 'param_groups': [{'lr': 0.1, 'params': ['w', 'b']}]}
    """
    parts: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for key, one in value.items():
        kind, _, rest = key.partition(".") if type(key) is str else ("", "", "")
        name, _, last = rest.rpartition(".")
        if kind not in parts or not name:
            return value
        parts[kind].setdefault(name, {})[last] = one
    groups: dict[str, dict[str, Any]] = {}
    for name, own in parts["param_groups"].items():
        groups.setdefault(repr(sorted(own.items())), {**own, "params": []})["params"].append(name)
    return {"state": parts["state"], "param_groups": list(groups.values())}


def _flat(kept: Any) -> Any:
    """A parameter's state without the dict in which bitsandbytes saves its tensors."""
    wrapped = kept.get(_WRAPPED) if isinstance(kept, Mapping) else None
    return {**{name: value for name, value in kept.items() if name != _WRAPPED}, **wrapped} if isinstance(wrapped, Mapping) else kept


def _positions(number: int, group: Any) -> tuple[Hashable, ...]:
    params: Any = group.get("params") if isinstance(group, Mapping) else None
    if not isinstance(params, (list, tuple)):
        raise FormatError(f"has no list of parameters in its group {number}")
    if not all(type(one) is str or (type(one) is int and 0 <= one < 1 << 64) for one in params):
        raise FormatError(f"has a parameter in its group {number} that is neither a position nor a name")
    return tuple(params)


def _names(groups: Sequence[Mapping[str, Any]], positions: Sequence[tuple[Hashable, ...]]) -> tuple[str, ...] | None:
    """The names in order: the positions themselves where they are names, else `param_names` where every group has it."""
    flat = [position for group in positions for position in group]
    if flat and all(type(one) is str for one in flat):
        return tuple(map(str, flat))
    found: list[str] = []
    for number, (group, own) in enumerate(zip(groups, positions, strict=True)):
        names = group.get("param_names")
        if names is None:
            if own:
                return None
            continue
        if type(names) not in (list, tuple) or len(names) != len(own) or not all(type(name) is str for name in names):
            raise FormatError(f"has param_names in its group {number} that are not one name for each of its {len(own)} parameters")
        found += names
    if len(set(found)) != len(found):
        raise FormatError("has one name for two parameters")
    return tuple(found)


def _short(position: Hashable) -> str:
    return repr(position)[:60] if type(position) is str else str(position) if type(position) is int and position < 1 << 64 else "…"


def _shapes(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:6])


def wanted_slots(optimizer: str, group: Mapping[str, Any]) -> tuple[Slot, ...]:
    """The slots that an optimizer of `SLOTS` keeps under a group's hyper-parameters.

    >>> [slot.name for slot in wanted_slots("SGD", {"momentum": 0.9})], wanted_slots("SGD", {"momentum": 0})
    (['momentum_buffer'], ())
    """
    return tuple(slot for slot in SLOTS[optimizer] if slot.when is None or group.get(slot.when))
