"""Names whose separators were lost or changed: `down_blocks0ff_netweight`, `down_blocks_0_ff_net.weight`.

Rule: only separators are looked past. Where that makes two keys of one side equal, neither is told by it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice

from ckptsurgeon.low_rank import PAIRED
from ckptsurgeon.matching.factors import FORMS
from ckptsurgeon.matching.module_tree import ROLES
from ckptsurgeon.tensors import TensorMeta
from ckptsurgeon.wrappers import WRAPPERS, unwrap

Tensors = Mapping[str, TensorMeta]
_SEPARATORS = re.compile(r"[^a-z0-9]+")
_SEAMS = re.compile(r"_([0-9]+)(?:_|(?=/)|$)"), re.compile(r"_?(?<![0-9])([0-9]+)(?:_|(?=[a-z.])|$)")  # numbers apart, else any
_LAST = {
    re.sub("[._]", "", name): name
    for name in (*(role for role in ROLES if len(role) > 3), *(name.format("weight") for form in FORMS for name in form.names), *PAIRED)
}
_ROLE = re.compile(rf"[._]?({'|'.join(re.sub('[._]', '[._]?', role) for role in sorted(_LAST.values(), key=len, reverse=True))})$")
_COPY = re.compile(r":\d{1,3}$")  # behind TensorFlow's names
_PARAMETER = re.compile(r"(?P<module>(?:.*\.)?)(?P<mark>_?)(?P<role>[WwBb])(?:_(?P<layer>[A-Za-z0-9]\w*))?")  # `attn.W_Q`, `mlp.b_in`
_DIMS = re.compile(r"(?<=\d)_[A-Z]{2,4}$")  # a parameter's dims in its name: `w1_EFD`
_GATE = re.compile(r"[ihx][rzifgocn]|[ihx]h", re.IGNORECASE)  # what such parameters of a recurrent cell are for
_MOST_HEADS = 4
_FLAT = 0.9  # of a side's keys, whose modules have no dot in their names, from which on dots are no separators there


def same_but_for_separators(source: Tensors, target: Tensors) -> dict[str, str]:
    """Target keys by source keys of equal shape, equal in name where separators are left out; a head of all of a side's keys may go.

    >>> from ckptsurgeon.tensors import TensorMeta
    >>> meta = lambda name: TensorMeta(name, "F32", (2,), (1,))
    >>> same_but_for_separators({"a0fcweight": meta("a0fcweight")}, {"a.0.fc.weight": meta("a.0.fc.weight")})
    {'a0fcweight': 'a.0.fc.weight'}
    """
    best: dict[str, str] = {}
    for here in _common_heads(source):
        for there in _common_heads(target):
            source_names, target_names = squashed(source, here), squashed(target, there)
            equal = {
                key: target_names[name]
                for name, key in source_names.items()
                if name in target_names and target[target_names[name]].shape == source[key].shape
            }
            best = equal if len(equal) > len(best) else best
    return best


def _common_heads(keys: Iterable[str]) -> list[str]:
    """What all keys begin with, up to each of the first separators in it, and nothing."""
    first, last = min(keys, default=""), max(keys, default="")
    same = next(
        (at for at, (first_letter, last_letter) in enumerate(zip(first, last, strict=False)) if first_letter != last_letter), len(first)
    )
    return ["", *(first[: separator.start()] for separator in islice(_SEPARATORS.finditer(first[:same].lower()), _MOST_HEADS))]


def squash(name: str) -> str:
    """The letters and digits of a name."""
    return _SEPARATORS.sub("", name.lower())


def squashed(keys: Iterable[str], head: str = "") -> dict[str, str]:
    """Keys by their letters and digits, without those that two keys have."""
    by_letters: dict[str, str | None] = {}
    for key in keys:
        name = squash(key[len(head) :])
        by_letters[name] = None if name in by_letters else key
    return {name: key for name, key in by_letters.items() if key is not None}


def spelled(tensors: Tensors) -> dict[str, str]:
    """Every key's name with dots between its modules, also where slashes are.

    Where dots separate no modules on this side, they stand around its numbers and before its role.

    >>> from ckptsurgeon.tensors import TensorMeta
    >>> spelled({"down_blocks_0_ff_netweight": TensorMeta("down_blocks_0_ff_netweight", "F32", (2,), (1,))})
    {'down_blocks_0_ff_netweight': 'down_blocks.0.ff_net.weight'}
    """
    modules = [_ROLE.sub("", _COPY.sub("", key)) for key in tensors]
    seams = _SEAMS[:1] if any("." in key or "/" in key for key in tensors) else _SEAMS  # where one is, no separator was lost
    seam = next((seam for seam in seams if any(seam.search(module) for module in modules)), None)
    if seam is not None and sum("." not in module for module in modules) >= _FLAT * len(modules):
        return unique({key: _seamed(key, module, seam) for key, module in zip(tensors, modules, strict=True)})
    return unique({key: _DIMS.sub("", _COPY.sub("", key.replace("/", "."))) for key in tensors})


def spelled_both(source: Tensors, target: Tensors) -> tuple[dict[str, str], dict[str, str]]:
    """Both sides' names, spelled; parameters are called as layers' are, where the sides do not have one naming but for separators."""
    plain = spelled(source), spelled(target)
    layered = unique(_as_layers(plain[0])), unique(_as_layers(plain[1]))
    if layered == plain or 2 * len(same_but_for_separators(source, target)) > min(len(source), len(target)):
        return plain
    return layered


def _as_layers(names: Mapping[str, str]) -> dict[str, str]:
    """The names, where a module's parameters `W_Q`, `b_Q` and `W` are called as those of layers: `Q.weight`, `Q.bias` and `weight`."""
    found = {
        key: parameter
        for key, name in names.items()
        if (parameter := _PARAMETER.fullmatch(name)) and not (parameter["layer"] and name.rpartition(".")[2] in ROLES)  # a norm's `b_2`
    }
    layers: dict[str, set[str]] = {}
    for parameter in found.values():
        layers.setdefault(parameter["module"], set()).add(parameter["layer"] or "")
    cells = {module for module, inside in layers.items() if all(map(_GATE.fullmatch, inside))}
    return dict(names) | {key: _layered(parameter) for key, parameter in found.items() if parameter["module"] not in cells}


def _layered(parameter: re.Match[str]) -> str:
    layer = f"{parameter['mark']}{parameter['layer']}." if parameter["layer"] else ""
    return f"{parameter['module']}{layer}{ROLES[parameter['role'].lower()]}"


def unwrapped(tensors: Tensors) -> dict[str, str]:
    """Every key's name without the segments of wrappers."""
    return unique({key: unwrap(key, WRAPPERS) for key in tensors})


def _seamed(key: str, module: str, seam: re.Pattern[str]) -> str:
    role = _ROLE.search(_COPY.sub("", key))
    parts = [*seam.sub(r".\1.", module.replace("/", ".")).strip(".").split("."), *([_LAST[re.sub("[._]", "", role[1])]] if role else [])]
    return ".".join(part.strip("_") or "_" for part in parts if part)


def unique(names: Mapping[str, str]) -> dict[str, str]:
    """The names; a key whose name another has, or that has none, keeps its own."""
    counts = Counter(names.values())
    return {key: name if name and counts[name] == 1 and (name == key or name not in names) else key for key, name in names.items()}


def renamed(tensors: Tensors, names: Mapping[str, str]) -> dict[str, TensorMeta]:
    """The tensors under other names."""
    return {name: tensor if name == tensor.name else replace(tensor, name=name) for key, tensor in tensors.items() for name in [names[key]]}


def paths_back(names: Mapping[str, str]) -> Callable[[str], str]:
    """What gives a path its spelling in the keys that `names` has by their names, where these differ in separators alone."""
    ordered = sorted(names)

    def back(path: str) -> str:
        at = bisect_left(ordered, path)
        name = ordered[at] if at < len(ordered) and ordered[at].startswith(path) else ""
        key = names.get(name, "")
        if not path or squash(key) != squash(name):
            weight = names.get(f"{path}.weight")  # `W_Q` is the weight of what has a bias too
            return weight or (key if path and sorted(squash(key)) == sorted(squash(name)) else path)
        letters = (place for place, letter in enumerate(key) if not _SEPARATORS.match(letter.lower()))
        last = next(islice(letters, len(squash(path)) - 1, None), None)
        return path if last is None else key[: last + 1]

    return back
