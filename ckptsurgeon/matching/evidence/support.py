"""Whether anything but a shape speaks for a link: a word, a parent, a place among matched siblings, or a role in common.

Rule: where both sides have one naming (more than half of the smaller side's keys are equal), what is left over is presumed fresh. What
speaks against that: words that stand in both differing parts of the names, the same place between neighbours that go together, a
module of many parts that is the same within.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product

from ckptsurgeon.matching.evidence.company import layers_before_norms, rest_is_a_body
from ckptsurgeon.matching.evidence.distinguish import abbreviated
from ckptsurgeon.matching.evidence.opposites import one_is_a_log
from ckptsurgeon.matching.evidence.roles import Roles
from ckptsurgeon.matching.evidence.vocabulary import SAYS_NOTHING, concepts, conflict, implied
from ckptsurgeon.matching.module_tree import ROLES, fold, is_float, module_of
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
_GENERIC = SAYS_NOTHING | {"conv", "norm", "first", "second", "final", "encoder", "decoder", "transform"}  # of what kind a tensor is
_MEMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # a number that is a whole part
ALONE = "only one of its shape here"
OF_BOTH, GATES = "the bias of what two layers add up to", "the gates of a cell, in torch's order"
_TOLD = {OF_BOTH, GATES}  # what was found by words that stand in no other name
_HALF = 0.5
_WHOLE_NAME = 3  # parts in common at the end of two names, from which on they name a tensor where no other name ends so
_MOST = 0.8  # of a side's keys, from which on a module is as good as the whole side
_MANY_PARTS = 4  # inner modules, from which on equal names within two modules are no chance


class Support:
    """What speaks for links, besides their tensors' shapes."""

    def __init__(
        self, links: Sequence[Link], source: Tensors, target: Tensors, same: Mapping[str, str], bare: Mapping[str, str], ordered: bool
    ) -> None:
        self.links, self.source, self.target, self.same, self.bare, self.ordered = links, source, target, same, bare, ordered
        self.strangers = len(same) <= _HALF * min(len(source), len(target)) or rest_is_a_body(links, same, source, target)
        """Whether the sides have two namings, or have them in a part that holds many layers and that links cover on both sides."""
        self.base = [link for link in links if link.clear and self._by_itself(link)]
        self.units = {unit for link in self.base for unit in self._units(link)}
        if not self.strangers:
            self.units |= {unit for link in links if link.clear and self._set_in(link) for unit in self._units(link)}

    def speaks_for(self, link: Link) -> bool:
        """Whether anything but shapes does: for the link, for another of its unit, or for the modules around it."""
        if not _TOLD.isdisjoint(link.evidence) or not self.units.isdisjoint(self._units(link)):
            return True
        pairs = list(product(link.sources, link.targets))
        if any(self._with_its_layer(*pair) for pair in pairs):
            return True
        if not self.strangers and any(self._around_of(*pair) in self._moved for pair in pairs):
            return True
        if not self.strangers and any(_barred(*self._within(*pair)) or self._elsewhere(*pair) or self._two_heads(*pair) for pair in pairs):
            return False
        return any(self._parent(*pair) or self._called_so(*pair) for pair in pairs) or self._place(link)

    def _set_in(self, link: Link) -> bool:
        """Whether its neighbours on both sides go together, so that it may count otherwise: what it is called must not speak against it."""
        return self._place(link) and not any(_barred(*pair) or self._two_heads(*pair) for pair in product(link.sources, link.targets))

    def _with_its_layer(self, source_key: str, target_key: str) -> bool:
        """Whether the convolutions that two norms stand behind go together for a reason."""
        before = [behind.get(module_of(key)) for behind, key in zip(self._behind, (source_key, target_key), strict=True)]
        return None not in before and not self.units.isdisjoint({(before[0], before[1]), (fold(before[0] or ""), fold(before[1] or ""))})

    @cached_property
    def _behind(self) -> tuple[dict[str, str], dict[str, str]]:
        return layers_before_norms(self.source), layers_before_norms(self.target)

    def _units(self, link: Link) -> set[tuple[str, str]]:
        """The modules whose own tensors a link puts together; between two namings, whatever their numbers are."""
        units = {
            (source_key.rpartition(".")[0], target_key.rpartition(".")[0]) for source_key, target_key in product(link.sources, link.targets)
        }
        return {(fold(source_key), fold(target_key)) for source_key, target_key in units} if self.strangers else units

    def _by_itself(self, link: Link) -> bool:
        """Whether its names do, or its role."""
        pairs = list(product(link.sources, link.targets))
        if any(self.same.get(source_key) == target_key for source_key, target_key in pairs):
            return True
        if self.strangers:
            decided = (self._complete and ALONE in link.evidence and self._in_list(link)) or any(self._word(*pair) for pair in pairs)
        else:
            decided = all(
                any(self._renamed(source_key, target_key) for source_key, target_key in pairs if target_key == target)
                for target in link.targets
            )
        return decided or self._role(link)

    def _word(self, source_key: str, target_key: str) -> bool:
        """A word that not every name has, on both sides."""
        shared = implied(concepts(source_key)) & implied(concepts(target_key))
        one_shape = len({*self.source[source_key].shape}) > 1 and self.source[source_key].shape == self.target[target_key].shape
        alone = {"proj", "linear"} if one_shape and not _of_two(source_key, target_key) else set()
        return any(not word.startswith("#") for word in shared - (SAYS_NOTHING - alone))

    def _renamed(self, source_key: str, target_key: str) -> bool:
        """Whether the parts in which two names differ say the same, or something in common, or one module was put around or taken off."""
        head, here, there, tail = _differing(self.bare.get(source_key, source_key), target_key)
        source_words, target_words = implied(_words(here)), implied(_words(there))
        if min(len(here), len(there)) == 0 and len(tail) > 1:  # a module was put around it, or taken off
            return max(len(here), len(there)) == 1
        if (
            _barred(source_key, target_key)
            or self._elsewhere(source_key, target_key)
            or self._two_heads(source_key, target_key)
            or conflict(frozenset(source_words), frozenset(target_words))
        ):
            return False
        if source_words == target_words:
            return bool(source_words) or bool(head)
        if len(tail) >= _WHOLE_NAME and self._only_one(tail):
            return True
        shared = {word for word in source_words & target_words if not word.startswith("#")}
        if head and shared - SAYS_NOTHING and (source_words <= target_words or target_words <= source_words):
            return True
        if shared - _GENERIC or abbreviated(frozenset(source_words), frozenset(target_words)):
            return True
        if min(len(here), len(there)) == 0:
            return max(len(here), len(there)) == 1 and bool(head)
        return bool(head) and not (source_words | target_words) & _TELLING and (len(tail) > 1 or head not in self.matched_modules)

    def _within(self, source_key: str, target_key: str) -> tuple[str, str]:
        """Two names without the modules in which others were moved from one to the other."""
        bare = self.bare.get(source_key, source_key)
        for here, there in {(module_of(here), module_of(there)) for here, there in self._moved} - {("", "")}:
            if bare.startswith(f"{here}.") and target_key.startswith(f"{there}."):
                return bare[len(here) :], target_key[len(there) :]
        return source_key, target_key

    def _around_of(self, source_key: str, target_key: str) -> tuple[str, str]:
        """The modules that two keys stand in, up to where their names differ."""
        bare = self.bare.get(source_key, source_key)
        tail = _differing(bare, target_key)[3]
        return ".".join(bare.split(".")[: -len(tail) or None]), ".".join(target_key.split(".")[: -len(tail) or None])

    @cached_property
    def _moved(self) -> frozenset[tuple[str, str]]:
        """Modules with many parts that are called otherwise, and are the same within: each name there goes to the same one."""
        inner: dict[tuple[str, str], set[str]] = {}
        for source_key, target_key in self._certain:
            around = self._around_of(source_key, target_key)
            inner.setdefault(around, set()).add(target_key[len(around[1]) + 1 :])
        many = {pair for pair, names in inner.items() if all(pair) and len({module_of(name) for name in names}) >= _MANY_PARTS}
        if not many:
            return frozenset()
        held = [
            Counter(head for key in keys for head in _modules(key))
            for keys in ([self.bare.get(key, key) for key in self.source], self.target)
        ]
        return frozenset(
            pair
            for pair in many
            if len(inner[pair]) == held[0][pair[0]] == held[1][pair[1]]
            and not any(_ADDED & {*concepts(name)} for name in pair)
            and not self._two_heads(*pair)
        )

    def _two_heads(self, source_key: str, target_key: str) -> bool:
        """Whether the parts in which two names differ name a head each, and each by a word of its own: `value_head`, `reward_head`."""
        _, here, there, _ = _differing(self.bare.get(source_key, source_key), target_key)
        telling = [frozenset(_words(parts)) - _GENERIC - {"head"} for parts in (here, there)]
        if telling[0] & telling[1] or abbreviated(*telling):
            return False
        own = [
            {word for part in parts if "head" in (words := concepts(part)) for word in words if word[0] != "#"} - {"head"}
            for parts in (here, there)
        ]
        return bool(own[0] and own[1]) and own[0].isdisjoint(own[1]) and not abbreviated(frozenset(own[0]), frozenset(own[1]))

    def _only_one(self, tail: Sequence[str]) -> bool:
        """Whether on each side only one name ends so."""
        if len(tail) not in self._ends:
            self._ends[len(tail)] = _ends(len(tail), self.source, self.target)
        return all(end[tuple(tail)] == 1 for end in self._ends[len(tail)])

    @cached_property
    def _ends(self) -> dict[int, tuple[Counter[tuple[str, ...]], ...]]:
        """How many names of a side end in which parts, by how many parts these are."""
        return {}

    def _elsewhere(self, source_key: str, target_key: str) -> bool:
        """Whether two names count differently, though both sides count alike."""
        if (fold(source_key), fold(target_key)) in self._shifted:
            return False
        here, there = _counted(self.bare.get(source_key, source_key)), _counted(target_key)
        if len(here) == len(there):
            members = self._members
            return any(a[1] != b[1] and (a[0] == b[0] or members[0][a[0]] == members[1][b[0]]) for a, b in zip(here, there, strict=True))
        fewer, more = sorted(([number for _, number in counted] for counted in (here, there)), key=len)
        numbers = iter(more)
        return not all(number in numbers for number in fewer)

    @cached_property
    def _members(self) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
        """The numbers of each list of a side, by what stands before them."""
        lists: tuple[dict[str, set[str]], dict[str, set[str]]] = ({}, {})
        for side, names in enumerate(([self.bare.get(key, key) for key in self.source], self.target)):
            for head, number in (counted for name in names for counted in _counted(name)):
                lists[side].setdefault(head, set()).add(number)
        return lists

    @cached_property
    def _shifted(self) -> frozenset[tuple[str, str]]:
        """Numbered names, without their numbers, that all move by one and the same amount: a whole list that is shifted."""
        rows = Counter(map(fold, self.source))
        moves: dict[tuple[str, str], list[tuple[int, ...]]] = {}
        for source_key, target_key in self._certain:
            source_numbers, target_numbers = _MEMBER.findall(self.bare.get(source_key, source_key)), _MEMBER.findall(target_key)
            if len(source_numbers) == len(target_numbers) and fold(self.bare.get(source_key, source_key)) == fold(target_key):
                by = tuple(int(b) - int(a) for a, b in zip(source_numbers, target_numbers, strict=True))
                moves.setdefault((fold(source_key), fold(target_key)), []).append(by)
        return frozenset(pair for pair, by in moves.items() if len(by) == rows[pair[0]] and len(set(by)) == 1)

    def _in_list(self, link: Link) -> bool:
        """Whether one of its keys is of a numbered list, which gives it a place among others."""
        return any(_MEMBER.search(key) for key in (*link.sources, *link.targets))

    @cached_property
    def _complete(self) -> bool:
        """Whether nothing that holds values is left over on either side."""
        source_keys, target_keys = ({pair[side] for pair in self._certain} for side in (0, 1))
        return all(
            key in done or not is_float(tensor)
            for side, done in ((self.source, source_keys), (self.target, target_keys))
            for key, tensor in side.items()
        )

    @cached_property
    def matched_modules(self) -> frozenset[str]:
        """Modules of the target, the whole aside, in which something goes by its name."""
        return frozenset(head for name in self.same.values() for head in _modules(name))

    def _parent(self, source_key: str, target_key: str) -> bool:
        """Whether the modules around two keys, short of the whole, hold other pairs."""
        least = 1 if self.strangers else 0  # the pair itself is one of them
        here = next((head for head in _modules(source_key) if self._pairs[0][head] > least), "")
        there = next((head for head in _modules(target_key) if self._pairs[1][head] > least), "")
        return bool(here and there) and self._together[here, there] > least

    @cached_property
    def _certain(self) -> list[tuple[str, str]]:
        return [pair for link in self.links if link.clear for pair in product(link.sources, link.targets)]

    def _called_so(self, source_key: str, target_key: str) -> bool:
        """Whether two bare parameters have the names that others have, of which each goes to one of the other's name, and always."""
        names = _own_name(source_key), _own_name(target_key)
        pairs, *alone = self._own_names
        return all(map(_says_something, names)) and 1 < pairs[names] - 1 == alone[0][names[0]] - 1 == alone[1][names[1]] - 1

    @cached_property
    def _own_names(self) -> tuple[Counter[tuple[str, str]], Counter[str], Counter[str]]:
        """How often bare parameters of which names go together, and how often those of one name do at all, on either side."""
        pairs = Counter((_own_name(source_key), _own_name(target_key)) for source_key, target_key in self._certain)
        counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        for names, count in pairs.items():
            for side, name in enumerate(names):
                counts[side][name] += count
        return pairs, *counts

    @cached_property
    def _around(self) -> list[tuple[str, str]]:
        """Pairs of keys that modules are told by: between two namings all, since their structure has decided."""
        return self._certain if self.strangers else self._supported

    @cached_property
    def _supported(self) -> list[tuple[str, str]]:
        """Pairs of keys that something speaks for by itself."""
        pairs = [pair for link in self.base for pair in product(link.sources, link.targets)]
        return pairs + ([pair for pair in self._certain if self._around_of(*pair) in self._moved] if self._moved else [])

    @cached_property
    def _pairs(self) -> tuple[Counter[str], Counter[str]]:
        """How many keys with a partner each module holds; none for one that is as good as the whole."""
        counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        for side, keys in enumerate({pair[side] for pair in self._around} for side in (0, 1)):
            for key in keys:
                counts[side].update(_modules(key))
            for head, count in list(counts[side].items()):
                if count > _MOST * len(keys) and len(keys) > 4:
                    del counts[side][head]
        return counts

    @cached_property
    def _together(self) -> Counter[tuple[str, str]]:
        """How many pairs of keys two modules have in common, for the nearest ones that hold several."""
        counts: Counter[tuple[str, str]] = Counter()
        for source_key, target_key in self._around:
            source_heads = [head for head in _modules(source_key) if self._pairs[0][head]]
            target_heads = [head for head in _modules(target_key) if self._pairs[1][head]]
            counts.update(product(source_heads, target_heads))
        return counts

    def _role(self, link: Link) -> bool:
        """Whether it is the one tensor of its role on both sides."""
        if len(link.sources) != 1 or len(link.targets) != 1 or (not self.strangers and self._two_heads(link.sources[0], link.targets[0])):
            return False
        return self._roles.meet(link.sources[0], link.targets[0], by_place=self.strangers)

    @cached_property
    def _roles(self) -> Roles:
        return Roles(self.source, self.target)

    def _place(self, link: Link) -> bool:
        """Whether what stands before and after it on both sides goes together."""
        if not self.ordered or len(link.sources) != 1 or len(link.targets) != 1:
            return False
        (before, after), (above, below) = self._beside[0].get(link.sources[0], ("", "")), self._beside[1].get(link.targets[0], ("", ""))
        partner = self._partner
        return all((not a and not b) or partner.get(a) == b for a, b in ((before, above), (after, below))) and bool(before and after)

    @cached_property
    def _partner(self) -> dict[str, str]:
        return dict(self._certain)

    @cached_property
    def _beside(self) -> tuple[dict[str, tuple[str, str]], dict[str, tuple[str, str]]]:
        neighbours = []
        for side in (self.source, self.target):
            keys = [key for key in side if not key.endswith("num_batches_tracked")]
            neighbours.append(dict(zip(keys, zip(["", *keys[:-1]], [*keys[1:], ""], strict=True), strict=True)))
        return neighbours[0], neighbours[1]


_TELLING = {"head", "pool", "lm", "embed", "tok", "pos", "cls", "mask", "gate", "scale", "norm"}  # one of these on one side alone says no
_ADDED = {"adapter", "adapters", "lora", "prompt", "prompts", "ia3", "prefix"}  # what is put into a model to be trained anew
_KIND = {"head", "pool", "lm", "mask"}
_LM = {"lm"}


def _of_two(source_key: str, target_key: str) -> bool:
    """Whether two layers are called after two things: `final_proj` and `speaker_proj`."""
    own = [frozenset(_words(module_of(key).split(".")[-1:])) - SAYS_NOTHING for key in (source_key, target_key)]
    words = [frozenset(word for word in side if word[0] != "#") for side in own]
    return all(words) and words[0].isdisjoint(words[1]) and not abbreviated(*words)


def _barred(source_key: str, target_key: str) -> bool:
    """Whether one name alone says that the tensor was added to a model, is a head or a pooler, or a logarithm."""
    source_words, target_words = set(concepts(source_key)), set(concepts(target_key))
    return one_is_a_log(source_key, target_key) or any(
        bool(source_words & words) != bool(target_words & words) or (source_words & words and not source_words & target_words & words)
        for words in (_ADDED, _KIND, _LM)
    )


def _differing(first: str, second: str) -> tuple[str, list[str], list[str], list[str]]:
    """What two names have in common at their heads, what differs, and what they have in common at their ends."""
    a, b = first.split("."), second.split(".")
    if ROLES.get(a[-1], a[-1]) == ROLES.get(b[-1], b[-1]):
        a[-1] = b[-1]
    start = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    most = min(len(a), len(b)) - start
    end = next((at for at in range(most) if a[-1 - at] != b[-1 - at]), most)
    return ".".join(a[:start]), a[start : len(a) - end], b[start : len(b) - end], a[len(a) - end :]


def _ends(many: int, *sides: Tensors) -> tuple[Counter[tuple[str, ...]], ...]:
    return tuple(Counter(tuple(key.split(".")[-many:]) for key in side) for side in sides)


def _counted(key: str) -> list[tuple[str, str]]:
    """The numbers in a name that are whole parts, each with what stands before it."""
    return [(key[: found.start()], found[0]) for found in _MEMBER.finditer(key)]


def _own_name(key: str) -> str:
    """The name of a bare parameter; nothing for what is a layer's weight, bias or buffer."""
    name = key.rpartition(".")[2]
    return "" if name in ROLES else name


def _says_something(name: str) -> bool:
    return any(word[0] != "#" for word in set(concepts(name)) - SAYS_NOTHING)


def _words(parts: Sequence[str]) -> tuple[str, ...]:
    return concepts(".".join(parts))


def _modules(key: str) -> Iterator[str]:
    """The modules around a key, the nearest first."""
    head = key.rpartition(".")[0]
    while head:
        yield head
        head = head.rpartition(".")[0]
