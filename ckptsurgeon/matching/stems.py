"""Names that begin alike, where underscores stand between modules: `branch_3x3_1_bn` in `branch_3x3.1.bn`; and words run together.

Rule: a norm whose name begins with a convolution's stands in one module with it. Then, where several names begin alike and each of the
ways in which they go on holds several layers, what they have in common is a module. Both sides are looked at together, so that equal names
stay equal; and no cut is made that changes what a name says. A word that says nothing by itself, and that the other side writes as two,
is these two (`qpos` and `q_pos`). And a bias beside a layer that has none, with nothing else in their module, is the bias of that layer
(`conv.bias` and `conv.lin.weight`), where the other side has no layer called so.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import pairwise

from ckptsurgeon.matching.evidence.vocabulary import SAYS_NOTHING, concepts
from ckptsurgeon.matching.spelling import unique
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
_SEPARATOR = re.compile(r"[._]")
_WORDS = re.compile(r"([._])")  # the same, which keeps what separates
_MEMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a number that is a whole part
_HOLE = "{}"  # in its place


def parted(source: Tensors, target: Tensors) -> tuple[dict[str, str], dict[str, str]]:
    """Every key's name on both sides, with dots where underscores stand between modules; the last part of a key stays as it is.

    >>> from ckptsurgeon.tensors import TensorMeta
    >>> meta = lambda key, *shape: TensorMeta(key, "F32", shape, ())
    >>> parted({key: meta(key, 8, *more) for key, more in (("a_1x1.weight", (4, 1, 1)), ("a_1x1_bn.weight", ()))}, {})[0]
    {'a_1x1.weight': 'a_1x1.weight', 'a_1x1_bn.weight': 'a_1x1.bn.weight'}
    """
    modules = [{*map(_module, side)} for side in (source, target)]
    names = {module: module for side in (source, target) for module in map(_module, side)}
    if any("_" in module for module in names):
        names |= _companions(source) | _companions(target)
        apart = _run_together(*modules) | _run_together(*modules[::-1])
        if apart:
            names = {module: "".join(apart.get(word, word) for word in _WORDS.split(name)) for module, name in names.items()}
        folded = {name: _MEMBER.sub(_HOLE, name) for name in names.values() if _HOLE not in name}
        heads = _shared_heads({*folded.values()})
        cuts = {name: cut for name in {*folded.values()} if (cut := _cut(name, heads)) != name}
        names = {module: _filled(cuts[folded[name]], name) if folded.get(name) in cuts else name for module, name in names.items()}
    here, there = ({key: _within(names[_module(key)], key) for key in side} for side in (source, target))
    return unique(here | _with_bias(here, source, there)), unique(there | _with_bias(there, target, here))


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _within(module: str, key: str) -> str:
    return f"{module}.{key.rpartition('.')[2]}" if module else key


def _with_bias(names: Mapping[str, str], side: Tensors, other_names: Mapping[str, str]) -> dict[str, str]:
    """By key of the one weight of a layer, beside its bias in the module around it, the name that it would have in a layer with that."""
    keys = {name: key for key, name in names.items()}
    biased = {_module(name): side[key].shape for name, key in keys.items() if name.rpartition(".")[2] == "bias" and "." in name}
    inside: dict[str, list[str]] = {}
    for name in names.values():
        head = _module(name)
        while head:
            if head in biased:
                inside.setdefault(head, []).append(name)
            head = _module(head)
    others = {_layer(name) for name in other_names.values()}
    apart = {}
    for module, within in inside.items():
        weight = next((name for name in within if name.endswith(".weight")), "")
        layer = _module(weight)
        if (
            len(within) == 2
            and _module(layer) == module
            and SAYS_NOTHING.issuperset(concepts(layer[len(module) + 1 :]))
            and biased[module] in {side[keys[weight]].shape[:1], side[keys[weight]].shape[-1:]}
            and _layer(weight) not in others
        ):
            apart[keys[weight]] = f"{module}.weight"
    return apart


def _layer(name: str) -> str:
    """The last two parts of a name."""
    return ".".join(name.split(".")[-2:])


def _run_together(modules: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Words in one side's names that say nothing, and that the names of the other side have as two only: by word, these two."""
    words, other_words = ({word for name in side for word in _SEPARATOR.split(name)} for side in (modules, others))
    pairs: dict[str, set[str]] = {}
    for part in {part for name in others for part in name.split(".") if "_" in part}:
        for first, second in pairwise(part.split("_")):
            if first.isalpha() and second.isalpha():
                pairs.setdefault(first + second, set()).add(f"{first}_{second}")
    unknown = {word for word in pairs.keys() & words - other_words if concepts(word) == (word,)}
    return {word: min(pairs[word]) for word in unknown if len(pairs[word]) == 1}


def _companions(side: Tensors) -> dict[str, str]:
    """By module of a norm whose name begins with that of a layer of its width, a name in that layer's module."""
    widths = {_module(key): tensor.shape[0] for key, tensor in side.items() if len(tensor.shape) > 1 and key.endswith(".weight")}
    names = {}
    for key, tensor in side.items():
        module = _module(key)
        for cut in re.finditer("_", module) if len(tensor.shape) == 1 else ():
            head, last = module[: cut.start()], module[cut.end() :]
            if widths.get(head) == tensor.shape[0] and "." not in last and "norm" in concepts(last):
                names[module] = f"{head}.{last}"
    return names


def _shared_heads(names: Collection[str]) -> set[str]:
    """What several names begin with, where each of the ways in which they go on holds several layers.

    A module and one whose name begins with its are two modules: `critic`, `critic_target`. A layer or a list, and one more, are in one.
    """
    ways: dict[str, dict[str, set[str]]] = {}
    for name in names:
        for cut in _SEPARATOR.finditer(f"{name}."):
            ways.setdefault(name[: cut.start()], {}).setdefault(_way(name, cut.start()), set()).add(name)
    return {
        head
        for head, by_way in ways.items()
        if len(by_way) > 1
        and all(map(_is_group, *zip(*by_way.items(), strict=True)))
        and (head in names or all(name.startswith(_HOLE, len(head) + 1) for name in by_way.get(".", ())))
    }


def _way(name: str, at: int) -> str:
    """How a name goes on at a separator: by its next word, or in a module."""
    return re.split(_SEPARATOR, name[at + 1 :], maxsplit=1)[0] if name[at : at + 1] == "_" else "."


def _is_group(way: str, names: Collection[str]) -> bool:
    """Whether several layers go on in a way, and not by a letter, which may name one of two towers."""
    return len(names) > 1 and not (len(way) == 1 and way.isalpha())


def _cut(name: str, heads: Collection[str]) -> str:
    """A name with dots where it parts from others, and says the same so."""
    done = name
    for cut in re.finditer("_", name):
        if name[: cut.start()] in heads:
            apart = f"{done[: cut.start()]}.{done[cut.end() :]}"
            done = apart if concepts(apart) == concepts(done) else done
    return done


def _filled(name: str, numbered: str) -> str:
    """A name with the numbers of lists that another has, in their order."""
    numbers = iter(_MEMBER.findall(numbered))
    return "".join(part if part != _HOLE else next(numbers) for part in re.split(r"(\{\})", name))
