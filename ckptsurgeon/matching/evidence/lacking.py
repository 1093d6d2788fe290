"""Links that stand in for what the source lacks: a layer took the place of another, since its own has no partner.

Rule: fresh is always possible. Sure is no link between names of two parts of an attention or of two towers, none that leaves what the rest
of its module goes to, and none whose target is not told from one that is left beside it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

from ckptsurgeon.matching.evidence.opposites import opposed
from ckptsurgeon.matching.evidence.vocabulary import SAYS_NOTHING, concepts, conflict, said_by_place
from ckptsurgeon.matching.module_tree import ROLES, around, fold, is_float, module_of
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
_MEMBER = re.compile(r"(?:^|(?<=[._]))\d{1,9}(?=\.)")  # a number that is a whole part, or ends one: `layers.0`, `layer_0`
_LEVELS = 4  # of modules around a layer that are looked at
_MOST = 32  # targets without a source that a link is compared with
_PARTS = frozenset({"q", "k", "v", "out"})  # of one attention
_TOWERS = (frozenset({"text", "image", "audio"}), frozenset({"encoder", "decoder"}))
_HEAD = frozenset({"head", "lm"})
_PARTS_OF_A_BLOCK = frozenset({"attn", "mlp"})  # a norm may be called after the one before it, or behind


def stand_ins(links: Sequence[Link], source: Tensors, target: Tensors) -> Iterator[tuple[Link, str, str]]:
    """Each link that may stand in for another, why, and its rival as `source -> target`."""
    single = [link for link in links if len(link.sources) == len(link.targets) == 1]
    sides = _words_of(source), _words_of(target)
    outputs = _outputs(source), _outputs(target)
    reached = {key for link in links if link.clear for key in link.targets}
    owners = {name: key for link in links for key in link.sources for name in link.targets}
    fresh: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for key, tensor in target.items():
        if key not in reached and is_float(tensor):
            fresh.setdefault((tensor.shape, _role(key)), []).append(key)
    ways = [_Homes(_modules_at_equal_depth, single), _Homes(_blocks, single)]
    usual = _Usual(single, reached, target)
    clear = {link.targets[0]: link.sources[0] for link in single if link.clear}
    torn = _torn_heads({key for link in links for key in link.sources}, source), _torn_heads(owners, target)
    strangers = dict(_strangers(clear, target)), dict(_strangers({key: name for name, key in clear.items()}, source))
    for link in single:
        if not link.clear:
            continue
        (key,), (name,) = link.sources, link.targets
        home = next((home for way in ways if (home := way.elsewhere(key, name))), "")
        of_parts = {outputs[0].get(module_of(key)), outputs[1].get(module_of(name))}
        if of_parts == {"mlp", "attn"} or opposed(key, name) or _exclude(key, name, sides):
            yield link, "names exclude each other", ""
        elif norm := _of_torn_head(key, name, torn[0]) or _of_torn_head(name, key, torn[1]):
            yield link, f"{norm} of its head has no partner", ""
        elif home:
            yield link, f"the rest of its module goes to {home}", ""
        elif name in strangers[0]:
            yield link, f"the others of its list come from {strangers[0][name]}", ""
        elif key in strangers[1]:
            yield link, f"the others of its list go to {strangers[1][key]}", ""
        else:
            others = fresh.get((target[name].shape, _role(name)), ())[:_MOST]
            near = (other for other in others if _beside(name, other) or (_at_the_top(name, other) and owners.get(other, key) == key))
            rival = next((other for other in near if not _told(key, name, other, usual)), "")
            if rival:
                yield link, f"{rival} is left, and as good", f"{key} -> {rival}"


def _torn_heads(done: Container[str], side: Tensors) -> dict[str, str]:
    """The layers of heads, in no list, beside which a norm has no partner, and that norm."""
    matrices = {module_of(key) for key, tensor in side.items() if len(tensor.shape) > 1}
    norms = {
        module_of(module_of(key)): module_of(key)
        for key in side
        if key not in done and not _listed(key) and module_of(key) not in matrices and "norm" in concepts(module_of(key).rpartition(".")[2])
    }
    return {layer: norms[head] for layer in matrices if (head := module_of(layer)) in norms and _HEAD & {*concepts(head)}}


def _of_torn_head(key: str, name: str, torn: Mapping[str, str]) -> str:
    """The norm without a partner beside the layer of a tensor, if that goes to a layer that is in no head."""
    return "" if _HEAD & {*concepts(module_of(module_of(name)))} else torn.get(module_of(key), "")


def _strangers(pairs: Mapping[str, str], side: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Tensors of a numbered list of one side whose partners are not of the list that the others' are of, and that list.

    All others of a list of layers go with one list, and the tensor stands between two of these; or its partner is of no list, though the
    rest of its block goes with one, and every block has such a tensor. `pairs` has the partners by that side's tensor.
    """
    lists: dict[str, dict[str, str]] = {}
    for key, partner in pairs.items():
        if kind := _listed(key):
            lists.setdefault(kind, {})[key] = partner
    homes: dict[str, Counter[str]] = {}
    for here, there in {(module_of(key), module_of(partner)) for inside in lists.values() for key, partner in inside.items()}:
        homes.setdefault(around(f"{here}.", _MEMBER), Counter())[around(f"{there}.", _MEMBER)] += 1
    members = Counter(map(_listed, side))
    for kind, inside in lists.items():
        numbers = {key: int(_cut(key)[1]) for key in inside}
        kinds = Counter(map(fold, inside.values()))
        (usual, many), *_ = kinds.most_common(1)
        for key, partner in inside.items():
            home, most = homes[around(key, _MEMBER)].most_common(1)[0]
            alone = kinds[fold(partner)] == 1 < members[kind]
            amid = _cut(key)[2].count(".") == 1 and min(numbers.values()) < numbers[key] < max(numbers.values())
            if alone and amid and 1 < many == len(inside) - 1:
                yield key, usual
            elif alone and home and most > 2 and not around(partner, _MEMBER):
                yield key, home


def _listed(name: str) -> str:
    """A name without the number of the innermost list that it is in; empty where it is in none."""
    head, number, rest = _cut(name)
    return f"{head}#{rest}" if number else ""


def _words_of(side: Tensors) -> frozenset[str]:
    return frozenset(word for part in {part for key in side for part in key.split(".")[:-1]} for word in concepts(part))


_FIRST = {"output": "intermediate", "w_out": "w_in"}  # layers of an MLP, by the second one's name


def _outputs(side: Tensors) -> dict[str, str]:
    """Modules that are called an output, and what of: an MLP, whose first layer is beside it, or an attention."""
    beside: dict[str, set[str]] = {}
    modules = {module_of(key) for key in side}
    for module in modules:
        beside.setdefault(module_of(module), set()).update((last := module.rpartition(".")[2], *concepts(last)))
    found = {}
    for module in modules:
        head, _, last = module.rpartition(".")
        if "out" in {*concepts(last)} | said_by_place(module):
            of_attention = "v" in beside[head] or "attn" in concepts(head.rpartition(".")[2])
            found[module] = "mlp" if _FIRST.get(last) in beside[head] else "attn" if of_attention else ""
    return found


def _role(key: str) -> str:
    last = key.rpartition(".")[2]
    return ROLES.get(last, last)


def _own_words(key: str) -> frozenset[str]:
    """What a tensor's module is called, and what its name stands for by its place."""
    module = module_of(key)
    return frozenset(concepts(module.rpartition(".")[2])) | said_by_place(module)


def _exclude(key: str, name: str, sides: tuple[frozenset[str], frozenset[str]]) -> bool:
    """Whether two names are of other parts of an attention or of a block, or of other towers, where a side has both of these."""
    words, other_words = (frozenset(concepts(module_of(path))) for path in (key, name))
    both = [kind for kind in _TOWERS if other_words & kind <= sides[0] or words & kind <= sides[1]]
    within = [frozenset(concepts(module_of(path)[len(around(path, _MEMBER)) :])) for path in (key, name)]
    apart = "norm" not in within[0] | within[1] and conflict(*within, kinds=[_PARTS_OF_A_BLOCK])
    return apart or conflict(_own_words(key), _own_words(name), kinds=[_PARTS]) or conflict(words, other_words, kinds=both)


_Pairs = Callable[[str, str], Iterator[tuple[str, str]]]  # of what two layers stand in, by their paths


def _modules_at_equal_depth(here: str, there: str) -> Iterator[tuple[str, str]]:
    """The modules around two layers, as many parts above them."""
    for _ in range(_LEVELS):
        here, there = module_of(here), module_of(there)
        if not here or not there:
            break
        yield here, there


def _blocks(here: str, there: str) -> Iterator[tuple[str, str]]:
    """The members of the innermost lists around two layers."""
    pair = around(f"{here}.", _MEMBER), around(f"{there}.", _MEMBER)
    if all(pair):
        yield pair


class _Homes:
    """Where most layers of each part of the source go to."""

    def __init__(self, parts_around: _Pairs, links: Sequence[Link]) -> None:
        counts: dict[str, Counter[str]] = {}
        for layers in {(module_of(link.sources[0]), module_of(link.targets[0])): None for link in links if link.clear}:
            for here, there in parts_around(*layers):
                counts.setdefault(here, Counter())[there] += 1
        self.parts_around, self.homes = parts_around, {}
        self.guests: dict[str, set[str]] = {}
        for part, count in counts.items():
            (best, many), *_ = count.most_common(1)
            alike = sum(number for other, number in count.items() if fold(other) == fold(best))
            if many > 2 and 2 * many > alike:
                self.homes[part] = best
                self.guests.setdefault(best, set()).add(fold(part))

    def elsewhere(self, key: str, name: str) -> str:
        """Where the rest of the part goes that a tensor stands in, if its own target is in what another such part goes to."""
        here, there = next(self.parts_around(module_of(key), module_of(name)), ("", ""))
        home = self.homes.get(here, there)
        apart = not f"{home}.".startswith(f"{there}.") and not f"{there}.".startswith(f"{home}.")
        return home if apart and fold(here) in self.guests.get(there, ()) else ""


def _beside(name: str, other: str) -> bool:
    """Whether two targets stand in one member of a list, at any depth; or in two lists there, or two layers of one, as far down in each."""
    first, second = (f"{around(key, _MEMBER)}." for key in (name, other))
    if "." in (first, second):
        return False
    return first.startswith(second) or second.startswith(first) or _apart_by_one(first, second)


def _at_the_top(name: str, other: str) -> bool:
    """Whether two targets stand in no list, and in one module."""
    return not around(name, _MEMBER) + around(other, _MEMBER) and module_of(module_of(name)) == module_of(module_of(other))


def _apart_by_one(first: str, second: str) -> bool:
    """Whether two paths within a member of a list differ in one part of them, be it the number of a list in there."""
    parts = [*zip(first.split("."), second.split("."), strict=False)]
    apart = [at for at, pair in enumerate(parts) if pair[0] != pair[1]]
    return first.count(".") == second.count(".") and len(apart) == 1 and any(here.isdigit() for here, _ in parts[: apart[0]])


class _Usual:
    """How often tensors of one name go to tensors of another, in blocks whose third tensor has a source of its own.

    Of two targets that differ by the number of a list in their block alone, that number counts, and how many the list has.
    """

    def __init__(self, links: Sequence[Link], reached: Iterable[str], target: Iterable[str]) -> None:
        self.lengths = Counter(head for head, _ in {_cut(name)[:2] for name in target})
        self.blocks: dict[tuple[str, str], list[str]] = {}
        for link in links:
            if link.clear:
                name = link.targets[0]
                for kind in {fold(name), self._numbered(name)}:
                    self.blocks.setdefault((fold(link.sources[0]), kind), []).append(_block_of(name))
        self.reached = {(_block_of(name), kind) for name in reached for kind in (fold(name), self._numbered(name))}
        self.counts: dict[tuple[str, str, str], int] = {}

    def count(self, key: str, name: str, third: str) -> int:
        kinds = fold(name), fold(third)
        if kinds[0] == kinds[1]:
            kinds = self._numbered(name), self._numbered(third)
        asked = fold(key), *kinds
        if asked not in self.counts:
            self.counts[asked] = sum((block, kinds[1]) in self.reached for block in self.blocks.get(asked[:2], ()))
        return self.counts[asked]

    def _numbered(self, name: str) -> str:
        head, number, rest = _cut(name)
        return f"{fold(head)}{number}{rest} of {self.lengths[head]}"


def _cut(name: str) -> tuple[str, str, str]:
    """What stands before the number of the innermost list that a tensor is in, the number, and the rest."""
    block = around(name, _MEMBER)
    head = block.rstrip("0123456789")
    return head, block[len(head) :], name[len(block) :]


def _block_of(name: str) -> str:
    """The member of a list that the innermost list around a tensor stands in; the innermost's where it stands in none."""
    head, *_ = _cut(name)
    return around(f"{head}0.weight", _MEMBER) or around(name, _MEMBER)


def _told(key: str, name: str, other: str, usual: _Usual) -> bool:
    """Whether what a source is called has more in common with one target than with another, or goes to such a one elsewhere."""
    words, chosen, rival = (_telling(text) for text in (key, name, other))
    return len(words & chosen) > len(words & rival) or usual.count(key, name, other) > usual.count(key, other, name)


def _telling(key: str) -> frozenset[str]:
    return (frozenset(concepts(module_of(key))) | _own_words(key)) - SAYS_NOTHING
