"""One source for several targets: an embedding that is the output layer too, or a layer that each block of the target has to itself.

Rule: a target shares a source only where the source has that shape once, and names say that both are one tensor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

from ckptsurgeon.matching.evidence.vocabulary import SAYS_NOTHING, concepts, conflict
from ckptsurgeon.matching.module_tree import ROLES, Shape, fold, module_of, squeezed
from ckptsurgeon.matching.pairing import Record
from ckptsurgeon.matching.turning import TURN
from ckptsurgeon.planning.links import ENOUGH, Link
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
_KINDS = {"conv", "norm", "attn", "mlp", "first", "second", "final", "encoder", "decoder"}  # what many layers are called
_MEMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.)")  # a number that is a whole part
# An output layer is often the embedding itself: what the two are called.
_NO_TOKENS = {"pos", "tokentype", "time", "cls", "mlp", "patch"}  # tables of something else
ONE = "the source has one embedding of that shape"
_EMBEDS, _HEADS = {"embed", "tok", "shared"}, {"head", "embed", "out", "tok", "shared", "decoder", "lm"}


def one_embedding(links: Sequence[Link], source: Tensors, target: Tensors) -> list[Link]:
    """The links, where all tensors of the target that are called embeddings, and have the shape of the source's only one, are that one.

    Output layers among them are the source's output layer, if it has one.
    """
    told = {name for link in links if link.clear for name in link.targets}
    found: dict[str, Link] = {}
    for shape in {tensor.shape for key, tensor in source.items() if len(tensor.shape) == 2 and _EMBEDS & _near(key)}:
        keys, names = ([key for key, tensor in side.items() if sorted(tensor.shape) == sorted(shape)] for side in (source, target))
        if len(names) < 2 or not all(map(_of_tokens, (keys, names))):
            continue
        heads, own_heads = (list(filter(_is_head, side)) for side in (keys, names))
        embeddings = [key for key in keys if key not in heads]
        if any(target[name].shape != shape for name in names if name not in own_heads):
            continue
        for name in names:
            one = (name in own_heads and heads) or embeddings
            if len(one) == 1 and name not in told:
                found[name] = Link((one[0],), (name,), "" if target[name].shape == source[one[0]].shape else TURN, ENOUGH, (ONE,))
    return [link for link in links if found.keys().isdisjoint(link.targets)] + [*found.values()]


def _of_tokens(keys: Sequence[str]) -> bool:
    """Whether all keys are called embeddings of tokens, or output layers, and one the former."""
    words = [_near(key) for key in keys]
    return all(_HEADS & own and not _NO_TOKENS & own for own in words) and any(_EMBEDS & own for own in words)


def _is_head(key: str) -> bool:
    return bool({"head", "lm", "out"} & _near(key))


def _near(key: str) -> set[str]:
    """The words of the last modules around a tensor: a whole model may be called after its head."""
    return set(concepts(".".join(key.split(".")[-3:])))


def shared(links: Sequence[Link], record: Record, source: Tensors, target: Tensors) -> list[Link]:
    """Targets without a source of their own, whose shape the source has once: an embedding that is the output layer too, and the like.

    A source that keeps one embedding under several names counts as having it once.
    """
    used, reached = {key for link in links if link.clear for key in link.sources}, {key for link in links for key in link.targets}
    owners: dict[Shape, Link] = {}
    for link in sorted(links, key=lambda link: link.sources[0].count(".")):
        if len(link.sources) == len(link.targets) == 1:
            owners.setdefault(target[link.targets[0]].shape, link)
    names: dict[Shape, list[str]] = {}
    lists = _lists(source)
    for key, tensor in source.items():
        names.setdefault(tuple(sorted(tensor.shape)), []).append(key)
    lost = tuple(f"{node.path}." for node in record.lost)
    tied = []
    for key, tensor in target.items():
        owner = owners.get(tensor.shape) or (_turned(owners.get(tensor.shape[::-1])) if len(tensor.shape) == 2 else None)
        if key in reached or owner is None or not squeezed(tensor.shape) or key.startswith(lost):
            continue
        once = names.get(tuple(sorted(tensor.shape)), [])
        module, owners_module = (name.rpartition(".")[0] for name in (key, owner.targets[0]))
        # A member of a list that the source has not: one of its other members is no stand-in.
        lacked = module != owners_module and fold(module) == fold(owners_module) and _in_a_list(owner.sources[0], lists)
        if not lacked and used.issuperset(once) and (len(once) == 1 or _one_embedding(once)):
            tied += _shared(key, tensor, _of_embeddings(owner, once), len(once) == 1)
    return tied


def _turned(owner: Link | None) -> Link | None:
    """The link, of the same matrix turned: an output layer that is `x @ w`."""
    return replace(owner, op=TURN) if owner is not None and not owner.op else None


def _lists(side: Tensors) -> Counter[str]:
    """How many members each numbered list has, by what stands before the number."""
    return Counter(head for head, _ in {(key[: number.start()], number[0]) for key in side for number in _MEMBER.finditer(key)})


def _in_a_list(key: str, lists: Mapping[str, int]) -> bool:
    """Whether a key stands in a numbered list of several; the layers of one sequence are none."""
    module = module_of(module_of(key))
    return any(lists[key[: number.start()]] > 1 for number in _MEMBER.finditer(f"{module}."))


def _of_embeddings(owner: Link, names: Sequence[str]) -> Link:
    """The link that a target shares; of several embeddings the one for both sides, or the encoder's, perhaps not the decoder's."""
    words = {name: set(concepts(name)) for name in names}
    several = [name for name in sorted(names, key=lambda name: ("decoder" in words[name], name)) if not {"head", "lm"} & words[name]]
    both = [name for name in several if not {"encoder", "decoder"} & words[name]]
    if len(several) < 2 or len(both) == 1:
        return owner
    return replace(owner, sources=(several[0],), margin=min(owner.margin, 0.5), runner_up=f"{several[1]} -> {owner.targets[0]}")


def _one_embedding(names: Sequence[str]) -> bool:
    """Whether all names are those of an embedding or of an output layer that is one with it, and one is the embedding's."""
    words = [set(concepts(name)) for name in names]
    return all(_HEADS & name_words for name_words in words) and any(_EMBEDS & name_words for name_words in words)


def _shared(key: str, tensor: TensorMeta, owner: Link, once: bool) -> list[Link]:
    """The link of a target to the source that another target has, if any."""
    of = owner.targets[0]
    words, owner_words = set(concepts(key)), set(concepts(of))
    tied = bool(_EMBEDS & owner_words and _HEADS & words) and not {"pos", "tokentype"} & owner_words.union(
        words, concepts(owner.sources[0])
    )
    (module, last), (owner_module, owner_last) = ((name.rpartition(".")[0], name.rpartition(".")[2]) for name in (key, of))
    within = f"{module}.".startswith(f"{owner_module}.") or f"{owner_module}.".startswith(f"{module}.")
    if len(squeezed(tensor.shape)) < 2 and not (last == owner_last and within):
        return []  # a vector only where the one module holds the other (`head.bias` and `head.decoder.bias`)
    one_parameter = last == owner_last and (last not in ROLES or within)  # layers of one name and shape are two of a kind
    margin = min(owner.margin, inf if tied or (one_parameter and once) else 0.5)
    return [Link(owner.sources, (key,), owner.op, margin, (f"the same tensor as {of}",), owner.runner_up if margin < ENOUGH else "")]


def spread(links: Sequence[Link], source: Tensors, target: Tensors) -> list[Link]:
    """The links, where a layer that every member of a numbered list of the target has, and the source has once, goes to all members.

    Its weight is of a shape that the source has once, so far as no sure link has taken it, and both names have a word in common that says
    more than of what kind a layer is.
    """
    sure = {key for link in links if link.clear for key in (*link.sources, *link.targets)}
    members: dict[str, set[str]] = {}
    lists = _lists(source)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for key in target:
        for number in _MEMBER.finditer(key):
            head, tail = key[: number.start()], key[number.end() :]
            members.setdefault(head, set()).add(number[0])
            rows.setdefault((head, tail), {})[number[0]] = key
    free: dict[Shape, list[str]] = {}
    for key, tensor in source.items():
        if key not in sure:
            free.setdefault(tensor.shape, []).append(key)
    layers: dict[str, str] = {}  # the source's by the target's
    for (head, _), row in rows.items():
        shapes = {target[key].shape for key in row.values()}
        once = free.get(next(iter(shapes)), [])
        if len(shapes) == len(once) == 1 < len(members[head]) == len(row) and len(target[next(iter(row.values()))].shape) > 1:
            fits = all(key not in sure and _say_the_same(once[0], key) for key in row.values())
            if fits and not _in_a_list(once[0], lists):
                layers |= {module_of(key): module_of(once[0]) for key in row.values()}
    fanned = [
        Link((name,), (key,), "", ENOUGH, ("the source has it once, and each of the list to itself",))
        for key in target
        for name in (f"{layers.get(module_of(key))}.{key.rpartition('.')[2]}",)
        if key not in sure and name in source and name not in sure and source[name].shape == target[key].shape
    ]
    reached, used = {key for link in fanned for key in link.targets}, {key for link in fanned for key in link.sources}
    return [link for link in links if reached.isdisjoint(link.targets) and used.isdisjoint(link.sources)] + fanned


def _say_the_same(source_key: str, target_key: str) -> bool:
    """Whether the modules of two keys have a word in common that says what they are for, and none that excludes it."""
    words, target_words = (frozenset(concepts(module_of(key))) for key in (source_key, target_key))
    telling = (words & target_words) - SAYS_NOTHING - _KINDS
    return any(word[0] != "#" for word in telling) and not conflict(words, target_words)
