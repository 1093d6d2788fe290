"""Finds the states of optimizer, scheduler and scaler in a training checkpoint, and averaged copies of the weights.

They are found by the names that training loops and frameworks use, at the top of the file or beside the model's root. Where there are two
candidates, an error lists them. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ckptsurgeon.errors import RootError
from ckptsurgeon.tensors import Refused

Kind = Literal["optimizer", "scheduler", "scaler"]
NAMES: Mapping[Kind, tuple[str, ...]] = {
    "optimizer": ("optimizer", "optimizer_state_dict", "optim", "optimizer_states", "optimizer_state", "optim_state_dict", "opt"),
    "scheduler": ("scheduler", "lr_scheduler", "lr_schedulers", "scheduler_state_dict", "lr_scheduler_state_dict", "sched"),
    "scaler": ("scaler", "grad_scaler", "scaler_state_dict", "amp_scaler", "grad_scaler_state_dict"),
}
# Files that the Trainer and accelerate write into a checkpoint's folder.
FILES: Mapping[Kind, tuple[str, ...]] = {
    "optimizer": ("optimizer.pt", "optimizer.bin"),
    "scheduler": ("scheduler.pt", "scheduler.bin"),
}
# Averaged copies: timm's state_dict_ema, torchvision's model_ema, and the names that training loops use.
AVERAGED = (
    "model_ema",
    "ema",
    "ema_state_dict",
    "state_dict_ema",
    "ema_model",
    "model_ema_state_dict",
    "ema_model_state_dict",
    "ema_params",
)
AVERAGING_STATE = "averaging_state"  # where Lightning's WeightAveraging stores what its average has besides weights: `n_averaged`
_OPTIMIZERS = frozenset(NAMES["optimizer"]) - {"opt"} | {"optimizers"}  # "opt" is also a family of language models
_NUMBERED = re.compile(r"optimizer_\d+")  # as Lightning names them in a folder of ranks' files
_MOMENT = re.compile(r"(?:\w+_)?exp_avg(?:_sq)?|exp_inf|momentum_buffer|square_avg|grad_avg|acc_delta")


def find(kind: Kind, value: Any, model_root: str, root: str | None, path: str) -> tuple[str, Any]:
    """The dotted path of the state of this kind, and the state.

    Args:
        kind: `optimizer`, `scheduler` or `scaler`.
        value: everything that the file holds: nested dicts and lists.
        model_root: the model's root; the state may be beside it.
        root: the path that the caller names, or None.
        path: the file's path, for errors.

    Raises:
        RootError: it is not there, or there are several.

    >>> find("optimizer", {"model": {}, "optim": {"state": {}}}, "model", None, "a.pt")
    ('optim', {'state': {}})
    """
    if root is not None:
        state = at_path(value, root)
        if state is None:
            raise RootError(f"has nothing at {root!r}", path=path, hint=_listing(value))
        return root, state
    candidates = [row for dotted, container in _containers(value, model_root) for row in _named(kind, dotted, container)]
    if len(candidates) > 1:
        names = ", ".join(repr(dotted) for dotted, _ in candidates[:8])
        word = f"choose one: {kind}_root={candidates[0][0]!r}" if kind == "optimizer" else "leave one in the file"
        raise RootError(f"holds {len(candidates)} {kind} states: {names}", path=path, hint=word)
    if not candidates:
        raise RootError(
            f"holds no {kind} state under a known name ({', '.join(NAMES[kind][:4])}, …)",
            path=path,
            hint=_elsewhere(kind, value, model_root),
        )
    return candidates[0]


def is_state(kind: Kind, value: Any) -> bool:
    """Whether a file's whole value is a state of this kind, like the Trainer's `optimizer.pt` and `scheduler.pt`.

    A scheduler's state has no typical keys, so any dict counts that has no key by which a scheduler's state would be found.

    >>> is_state("optimizer", {"state": {}, "param_groups": []}), is_state("optimizer", {"optimizer": {}})
    (True, False)
    """
    if not isinstance(value, Mapping):
        return False
    if kind == "optimizer":
        return "state" in value and "param_groups" in value
    return not any(name in value for name in NAMES[kind])


def _containers(value: Any, model_root: str) -> Iterator[tuple[str, Any]]:
    """The top dict, then each dict on the path to the model's root, with their paths."""
    parts = model_root.split(".") if model_root else []
    for depth in range(len(parts) or 1):
        dotted = ".".join(parts[:depth])
        container = at_path(value, dotted)
        if isinstance(container, Mapping):
            yield dotted, container


def _named(kind: Kind, dotted: str, container: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The states of this kind directly in a container, by known names."""
    numbered = [key for key in container if type(key) is str and _NUMBERED.fullmatch(key)] if kind == "optimizer" else []
    for name in (*NAMES[kind], *numbered):
        value = container.get(name)
        full = f"{dotted}.{name}" if dotted else name
        if isinstance(value, (list, tuple)):  # Lightning has lists
            yield from ((f"{full}.{index}", item) for index, item in enumerate(value) if isinstance(item, Mapping))
        elif isinstance(value, (Mapping, Refused)):
            yield full, value


def at_path(value: Any, path: str) -> Any:
    """The value at a dotted path in nested dicts and lists; None where there is none.

    >>> at_path({"optimizer_states": [{"state": {}}]}, "optimizer_states.0")
    {'state': {}}
    """
    if not path:
        return value
    if isinstance(value, Mapping):
        items = [(key if type(key) is str else str(key), child) for key, child in value.items() if type(key) in (str, int)]
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        items = [(str(index), child) for index, child in enumerate(value)]
    else:
        return None
    for name, child in items:
        if name == path:
            return child
    for name, child in items:
        if path.startswith(f"{name}."):
            below = at_path(child, path[len(name) + 1 :])
            if below is not None:
                return below
    return None


def of_optimizer(path: str) -> bool:
    """Whether a dotted path is within an optimizer's state, or is that of a dict with one kind of moment by parameter name.

    >>> of_optimizer("optimizer.state.0"), of_optimizer("exp_avg"), of_optimizer("model.optimizer_head")
    (True, True, False)
    """
    return any(segment in _OPTIMIZERS or _MOMENT.fullmatch(segment) or _NUMBERED.fullmatch(segment) for segment in path.split("."))


def all_moments(keys: Iterable[str]) -> bool:
    """Whether all keys are those of moments and step counts.

    >>> all_moments(["fc.weight.exp_avg", "fc.weight.step"]), all_moments(["step"])
    (True, False)
    """
    ends = {key.rpartition(".")[2] for key in keys}
    moments = {end for end in ends if _MOMENT.fullmatch(end)}
    return bool(moments) and ends - moments <= {"step"}


def lightning_average(roots: Iterable[str], beside: Iterable[str] = ()) -> str | None:
    """The root at which Lightning's WeightAveraging stored the average; None in any other file.

    It saves the average's weights as `state_dict`, the trained weights as `current_model_state`, and what else the average has
    (`n_averaged`) as `averaging_state`.

    >>> lightning_average(["state_dict", "current_model_state", "averaging_state"])
    'state_dict'
    """
    names = {*roots, *beside}
    return "state_dict" if {"state_dict", AVERAGING_STATE} <= names else None


def average_roots(roots: Sequence[str]) -> tuple[str, ...]:
    """The roots that are averaged copies, by their name or by Lightning's.

    >>> average_roots(["model", "model_ema", "ema.net.params", "emax"])
    ('model_ema', 'ema.net.params')
    """
    lightning = lightning_average(roots)
    named = (root for root in roots if any(root == name or root.startswith(f"{name}.") for name in AVERAGED))
    return (*((lightning,) if lightning is not None and "current_model_state" in roots else ()), *named)


def choose_average_root(roots: Sequence[str], named: str | None, path: str) -> str:
    """The root of the averaged copy: the root that the caller names, or else the only averaged copy. RootError otherwise."""
    if named is not None:
        return named
    copies = average_roots(roots)
    if len(copies) == 1:
        return copies[0]
    if copies:
        raise RootError(
            f"holds {len(copies)} averaged copies: {', '.join(copies[:8])}", path=path, hint=f"choose one: ema_root={copies[0]!r}"
        )
    known = f"its roots are {', '.join(repr(root) for root in roots[:8])}; choose one, as in ema_root={next(iter(roots), 'ema')!r}"
    raise RootError(f"holds no averaged copy under a known name ({', '.join(AVERAGED[:4])}, …)", path=path, hint=known)


def _listing(value: Any) -> str:
    """The names at the top of a file, as a hint, and the path of an optimizer's state where one stands at the top or one level below.

    >>> _listing({"model": {}, "run": {"mine": {"state": {}, "param_groups": []}}})
    "it holds model, run; name the optimizer's, as in optimizer_root='run.mine'"
    """
    top = {name: child for name, child in value.items() if type(name) is str} if isinstance(value, Mapping) else {}
    if not top:
        return "give a training checkpoint"
    below = {f"{name}.{inner}": state for name, child in top.items() if isinstance(child, Mapping) for inner, state in child.items()}
    paths = [path for path, state in {**top, **below}.items() if is_state("optimizer", state)]
    shown = f"{', '.join(name[:60] for name in [*top][:12])}{', …' if len(top) > 12 else ''}"
    if not paths:
        return f"it holds {shown}; if another file has the optimizer's state, name it: optimizer_from='optimizer.pt'"
    return f"it holds {shown}; name the optimizer's, as in optimizer_root={paths[0]!r}"


def _elsewhere(kind: Kind, value: Any, model_root: str) -> str:
    """A hint for a state that is under no known name: name its path, or, where the file holds only weights, the file that has it."""
    rest = [child for name, child in value.items() if name != model_root.partition(".")[0]] if isinstance(value, Mapping) else []
    if kind == "optimizer" and any(isinstance(child, (Mapping, Refused)) for child in rest):
        return _listing(value)
    return f"if another file has it, name it: {kind}_from='{kind}.pt'" if kind in FILES else "give a training checkpoint"
