"""A command to run next, as a value with two renderings: words of a shell, and the Python call that does the same.

Pure text. The call is for what is in memory and has no path that a command could name. Rules keep their order: those that the keywords
(drop, rename, keep, adapt, init) would put in another are given as `rules`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

Option = tuple[str, ...]  # its name without dashes, and its values: ("rename", "fc2.{p}", "dense2.{p}"), ("match",)
InMemory = tuple[str, str]  # of a source and a target: `file`, `state_dict` or `model` in memory, "" for what a path or a spec names
NOT_IN_MEMORY: InMemory = ("", "")

_PAIRS = ("rename", "adapt", "init")
_ORDER = ("drop", "rename", "keep", "adapt", "init")  # in which the keywords' rules come
_SOURCES = {"file": "source", "state_dict": "state_dict", "model": "source_model"}  # what a call names a source in memory by
_TARGETS = {"state_dict": "target", "model": "model"}


@dataclass(frozen=True)
class Command:
    """A command: its verb, what it is for, where it writes, and its options in their order.

    >>> Command("merge", "my net.pt", "m:Net", "out.pt", (("drop", "a"), ("match",))).words
    ('ckptsurgeon', 'merge', 'my net.pt', 'm:Net', '-o', 'out.pt', '--drop', 'a', '--match')
    """

    verb: str
    source: str
    target: str = ""
    output: str = ""
    options: tuple[Option, ...] = ()

    def having(self, *options: Option) -> Command:
        """The command with more options."""
        return replace(self, options=(*self.options, *options))

    @property
    def words(self) -> tuple[str, ...]:
        """The words that a shell needs. A path that looks like an option is said to be one of the current folder."""
        paths = [f"./{path}" if path.startswith("-") else path for path in (self.source, self.target) if path]
        return ("ckptsurgeon", self.verb, *paths, *(("-o", self.output) if self.output else ()), *as_words(self.options))

    def call(self, live: InMemory) -> str | None:
        """The Python call; None where no call does that with what is in memory.

        >>> Command("merge", "net.pt", "Net", "out.pt", (("drop", "a"), ("rename", "b", "c"))).call(("", "model"))
        "cs.transfer('net.pt', model, drop=['a'], rename={'b': 'c'})"
        >>> Command("diff", "<BytesIO 1>", "m:Net", options=(("rename", "b", "c"), ("drop", "a"))).call(("file", ""))
        "print(cs.diff(source, 'm:Net', rename={'b': 'c'}, rules=[cs.Rule('drop', 'a')]))"
        """
        held, aim = live
        given, goal = _SOURCES.get(held) or repr(self.source), _TARGETS.get(aim) or repr(self.target)
        keywords = _keywords(self.options)
        if self.verb in ("merge", "verify"):
            if aim == "model":
                return f"cs.transfer({', '.join([given, goal, *keywords])})"
            written = f"cs.merge({', '.join([given, goal, f'output={self.output!r}', *keywords])})"
            return None if held or self.verb == "verify" else written
        if self.verb == "inspect":
            return None if held in ("state_dict", "model") else f"print(cs.inspect({given}).to_text())"
        if held in ("state_dict", "model"):
            given = f"cs.skeleton({given})"
        elif held and self.verb == "match":
            given = f"cs.open({given})"
        as_toml = ".toml" if self.verb == "match" and self.output else ""
        return f"print(cs.{self.verb}({', '.join([given, goal, *keywords])}){as_toml})"


def as_words(options: Iterable[Option]) -> tuple[str, ...]:
    """Options as the words of a command line.

    >>> as_words([("drop", "a"), ("match",)])
    ('--drop', 'a', '--match')
    """
    return tuple(word for name, *values in options for word in (f"--{name}", *values))


def at_root(root: str) -> tuple[Option, ...]:
    """The option that chooses a root, where one was chosen."""
    return (("root", root),) if root else ()


def _flag(name: str) -> str:
    """A flag as a keyword: what begins with `no-` turns it off."""
    on = name.removeprefix("no-")
    return f"{on.replace('-', '_')}={on == name}"


def _keywords(options: Sequence[Option]) -> list[str]:
    """Options as keywords: those that are no rules, then the rules as far as the keywords keep their order, and the rest, and the rules
    files, as `rules`."""
    rules = [option for option in options if option[0] in (*_ORDER, "stage")]
    files = [repr(path) for name, *paths in options for path in paths if name == "rules"]
    found = [
        f"{name.replace('-', '_')}={values[0]!r}" if values else _flag(name)
        for name, *values in options
        if name not in (*_ORDER, "stage", "rules", "set")
    ]
    numbers = {name: int(value) for option, *values in options if option == "set" for name, _, value in [values[0].partition("=")]}
    found += [f"numbers={numbers}"] if numbers else []
    ranks = [_ORDER.index(name) if name in _ORDER else -1 for name, *_ in rules]
    again = [rule[:2] in [other[:2] for other in rules[:at]] for at, rule in enumerate(rules)]  # a dict has no key twice
    first = next((at for at, rank in enumerate(ranks) if rank < 0 or again[at] or rank < max(ranks[:at], default=0)), len(rules))
    for kind in _ORDER:
        mine = [tuple(values) for name, *values in rules[:first] if name == kind]
        if mine:
            found.append(f"{kind}={dict(mine) if kind in _PAIRS else [value for (value,) in mine]!r}")  # type: ignore[arg-type]
    rest = [*(f"cs.Rule({', '.join(map(repr, rule))})" for rule in rules[first:]), *files]
    return [*found, *([f"rules=[{', '.join(rest)}]"] if rest else [])]
