"""A command to run next, as a value with two renderings: words of a shell, and the Python call that does the same.

Pure text. The call is for sources and targets in memory, which no command can name. Rules keep their order: where the keywords (drop,
rename, keep, adapt, init) would change it, rules are passed as `rules`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

Option = tuple[str, ...]  # its name without dashes, and its values: ("rename", "fc2.{p}", "dense2.{p}"), ("match",)
InMemory = tuple[str, str]  # of a source and a target: `file`, `state_dict` or `model` for one in memory, "" for one with a path or a spec
NOT_IN_MEMORY: InMemory = ("", "")

_PAIRS = ("rename", "adapt", "init")
_ORDER = ("drop", "rename", "keep", "adapt", "init")  # of the keywords' rules
_SOURCES = {"file": "source", "state_dict": "state_dict", "model": "source_model"}  # the names of a source in memory in a call
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
        """The Python call; None where no call does this with a source or target in memory.

        >>> Command("merge", "net.pt", "Net", "out.pt", (("drop", "a"), ("rename", "b", "c"))).call(("", "model"))
        "cs.transfer('net.pt', model, drop=['a'], rename={'b': 'c'})"
        >>> Command("diff", "<BytesIO 1>", "m:Net", options=(("rename", "b", "c"), ("drop", "a"))).call(("file", ""))
        "print(cs.diff(source, 'm:Net', rename={'b': 'c'}, rules=[cs.Rule('drop', 'a')]))"
        """
        source_kind, target_kind = live
        source, target = _SOURCES.get(source_kind) or repr(self.source), _TARGETS.get(target_kind) or repr(self.target)
        keywords = _keywords(self.options)
        if self.verb in ("merge", "verify"):
            if target_kind == "model":
                return f"cs.transfer({', '.join([source, target, *keywords])})"
            written = f"cs.merge({', '.join([source, target, f'output={self.output!r}', *keywords])})"
            return None if source_kind or self.verb == "verify" else written
        if self.verb == "inspect":
            return None if source_kind in ("state_dict", "model") else f"print(cs.inspect({source}).to_text())"
        if source_kind in ("state_dict", "model"):
            source = f"cs.skeleton({source})"
        elif source_kind and self.verb == "match":
            source = f"cs.open({source})"
        as_toml = ".toml" if self.verb == "match" and self.output else ""
        return f"print(cs.{self.verb}({', '.join([source, target, *keywords])}){as_toml})"


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
    """A flag as a keyword: a name that begins with `no-` is False."""
    on = name.removeprefix("no-")
    return f"{on.replace('-', '_')}={on == name}"


def _keywords(options: Sequence[Option]) -> list[str]:
    """Options as keywords: first the options that are no rules, then the rules as far as keywords keep their order; all other rules, and
    the rules files, as `rules`."""
    rules = [option for option in options if option[0] in (*_ORDER, "stage")]
    files = [repr(path) for name, *paths in options for path in paths if name == "rules"]
    keywords = [
        f"{name.replace('-', '_')}={values[0].removeprefix('as-is=')!r}" if values else _flag(name)
        for name, *values in options
        if name not in (*_ORDER, "stage", "rules", "set")
    ]
    numbers = {name: int(value) for option, *values in options if option == "set" for name, _, value in [values[0].partition("=")]}
    keywords += [f"numbers={numbers}"] if numbers else []
    ranks = [_ORDER.index(name) if name in _ORDER else -1 for name, *_ in rules]
    again = [rule[:2] in [earlier[:2] for earlier in rules[:index]] for index, rule in enumerate(rules)]  # a dict has no key twice
    first = next(
        (index for index, rank in enumerate(ranks) if rank < 0 or again[index] or rank < max(ranks[:index], default=0)), len(rules)
    )
    for kind in _ORDER:
        mine = [tuple(values) for name, *values in rules[:first] if name == kind]
        if mine:
            keywords.append(f"{kind}={dict(mine) if kind in _PAIRS else [value for (value,) in mine]!r}")  # type: ignore[arg-type]
    rest = [*(f"cs.Rule({', '.join(map(repr, rule))})" for rule in rules[first:]), *files]
    return [*keywords, *([f"rules=[{', '.join(rest)}]"] if rest else [])]
