"""Links at random between sides whose keys meet in every way: numbers with steps, characters that patterns use, keys within keys, swaps and
cycles, joins and cuts."""

from __future__ import annotations

from random import Random

from ckptsurgeon.planning.links import Link

Shapes = dict[str, tuple[int, ...]]
SQUARE = (2, 2)
WORDS = ("a", "b", "w", "fc", "norm1", "conv_1", "h", "x-y")
ODD = (*"*{}/\\>-|é'\"#\n", "{i}", "{i=0,1}", "{0..3}", "a+b", "p q", " ", " z", "z ", "->", "\\d", "0:", "7:x", "module", "_orig_mod")
PICKS = ("all", "third", "half")


class World:
    """Two sides and their links, as a random generator makes them."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.source: Shapes = dict.fromkeys(self._keys(), SQUARE)
        self.target: Shapes = {}
        self.links: list[Link] = []
        self._heads: dict[str, str] = {}
        self._pick = chance.choice(PICKS)
        left = list(self.source)
        if len(left) > 1 and chance.random() < 0.4:  # all of them change places
            some = [left.pop() for _ in range(chance.randint(2, max(2, len(left) // 2)))]
            for one, other in zip(some, [*some[1:], some[0]], strict=True):
                self._link([one], [other])
        while left:
            self._some(left)
        for _ in range(chance.randint(0, 4)):  # that no link reaches, and many a source key has as its name
            name = chance.choice(list(self.source)) if chance.random() < 0.7 else self._key()
            self.target.setdefault(name, chance.choice([SQUARE, (3,)]))

    def _segment(self) -> str:
        kind = self.chance.random()
        if kind < 0.6:
            return self.chance.choice(WORDS)
        return str(self.chance.randrange(13)) if kind < 0.9 else self.chance.choice(ODD)

    def _key(self) -> str:
        return ".".join(self._segment() for _ in range(self.chance.randint(1, 4)))

    def _keys(self) -> list[str]:
        found: dict[str, None] = {}
        for _ in range(self.chance.randint(1, 4)):
            head, tail, step = self._key(), self._key(), self.chance.choice([1, 1, 2, 3])
            listed = self.chance.random() < 0.6
            for at in range(self.chance.randint(1, 14)):
                found[f"{head}.{at * step}.{tail}" if listed else self._key()] = None
        for key in list(found):
            if self.chance.random() < 0.1:
                found[f"{key}.{self._segment()}"] = None
            if self.chance.random() < 0.05 and "." in key:
                found[key.rsplit(".", 1)[0]] = None
        keys = list(found)[:60]
        self.chance.shuffle(keys)
        return keys

    def _name(self, key: str) -> str:
        """Its name on the other side: another first segment, for all or some of them."""
        numbers = [int(segment) for segment in key.split(".") if segment.isdecimal()]
        if {"all": False, "third": all(number % 3 for number in numbers), "half": self.chance.random() < 0.5}[self._pick]:
            return self._free(key)
        first, dot, rest = key.partition(".")
        head = self._heads.setdefault(first, self.chance.choice([first, first, self._segment(), self._key()]))
        return self._free(head + dot + rest)

    def _free(self, name: str) -> str:
        while name in self.target:
            name += ".t"
        return name

    def _link(self, sources: list[str], targets: list[str], op: str = "", shape: tuple[int, ...] = SQUARE) -> None:
        self.target.update(dict.fromkeys(targets, shape))
        self.links.append(Link(tuple(sources), tuple(targets), op, 9.0))

    def _some(self, left: list[str]) -> None:
        """Take a key or two, and link them in one of the ways."""
        key = left.pop()
        way = self.chance.choice([*["plain"] * 12, "none", "join", "cut", "transpose"])
        if way == "join" and left:
            op, shape = self.chance.choice([("concat(dim=0)", (4, 2)), ("stack(dim=0)", (2, 2, 2))])
            self._link([key, left.pop()], [self._name(key)], op, shape)
        elif way == "cut":
            op, self.source[key] = self.chance.choice([("chunk(dim=0)", (4, 2)), ("unstack(dim=0)", (2, 2, 2)), ("", SQUARE)])
            one = self._name(key)
            self.target[one] = SQUARE
            self._link([key], [one, self._free(self._key())], op)
        elif way != "none":
            self._link([key], [self._name(key)], "transpose" if way == "transpose" else "")
