"""A command as the Python call that does the same, for what is in memory and has no path that a command could name.

Pure text. Rules keep their order: those that the keywords (drop, rename, keep, adapt, init) would put in another are given as `rules`.
"""

from __future__ import annotations

from collections.abc import Sequence

_PAIRS, _ONE = ("rename", "adapt", "init"), ("drop", "keep")
_ORDER = ("drop", "rename", "keep", "adapt", "init")  # in which the keywords' rules come
_VALUES = ("root", "auto")
_FLAGS = ("match", "dequantize", "reverse")
_SOURCES = {"file": "source", "state_dict": "state_dict", "model": "source_model"}  # what a call names a source in memory by
_TARGETS = {"state_dict": "target", "model": "model"}
InMemory = tuple[str, str]  # of a source and a target: `file`, `state_dict` or `model` in memory, "" for what a path or a spec names
NOT_IN_MEMORY: InMemory = ("", "")


def as_call(words: Sequence[str], live: InMemory) -> str | None:
    """A command's words as a call; None where no call does that with what is in memory.

    >>> as_call(["ckptsurgeon", "merge", "net.pt", "Net", "-o", "out.pt", "--drop", "a", "--rename", "b", "c"], ("", "model"))
    "cs.transfer('net.pt', model, drop=['a'], rename={'b': 'c'})"
    >>> as_call(["ckptsurgeon", "diff", "<BytesIO 1>", "m:Net", "--rename", "b", "c", "--drop", "a"], ("file", ""))
    "print(cs.diff(source, 'm:Net', rename={'b': 'c'}, rules=[cs.Rule('drop', 'a')]))"
    """
    verb, source, *rest = words[1:]
    target, options = ("", rest) if not rest or rest[0].startswith("-") else (rest[0], rest[1:])
    held, aim = live
    given = _SOURCES.get(held) or repr(source)
    goal = _TARGETS.get(aim) or repr(target)
    keywords, output = _keywords(options)
    if verb in ("merge", "verify"):
        if aim == "model":
            return f"cs.transfer({', '.join([given, goal, *keywords])})"
        return None if held or verb == "verify" else f"cs.merge({', '.join([given, goal, f'output={output!r}', *keywords])})"
    if held in ("state_dict", "model"):
        if verb == "inspect":
            return None
        given = f"cs.skeleton({given})"
    elif held and verb == "match":
        given = f"cs.open({given})"
    if verb == "inspect":
        return f"print(cs.inspect({given}).to_text())"
    return f"print(cs.{verb}({', '.join([given, goal, *keywords])}){'.toml' if verb == 'match' and output else ''})"


def _keywords(options: Sequence[str]) -> tuple[list[str], str]:
    """Options as keywords, and the output's path."""
    words = iter(options)
    found: list[str] = []
    rules: list[tuple[str, ...]] = []
    files: list[str] = []
    output = ""
    for word in words:
        name = word.lstrip("-")
        if name == "rules":
            files.append(repr(next(words)))
        elif name in _PAIRS:
            rules.append((name, next(words), next(words)))
        elif name in _ONE:
            rules.append((name, next(words)))
        elif name == "stage":
            rules.append((name,))
        elif name in _VALUES:
            found.append(f"{name}={next(words)!r}")
        elif name in _FLAGS:
            found.append(f"{name}=True")
        else:
            output = next(words)  # -o
    return [*found, *_rules(rules, files)], output


def _rules(rules: Sequence[tuple[str, ...]], files: Sequence[str]) -> list[str]:
    """Rules as keywords as far as those keep their order, and the rest, and the rules files, as `rules`."""
    ranks = [_ORDER.index(rule[0]) if rule[0] in _ORDER else -1 for rule in rules]
    first = next((at for at, rank in enumerate(ranks) if rank < 0 or rank < max(ranks[:at], default=0)), len(rules))
    found = []
    for kind in _ORDER:
        mine = [rule[1:] for rule in rules[:first] if rule[0] == kind]
        if mine:
            found.append(f"{kind}={dict(mine) if kind in _PAIRS else [rule[0] for rule in mine]!r}")  # type: ignore[arg-type]
    rest = [*(f"cs.Rule({', '.join(map(repr, rule))})" for rule in rules[first:]), *files]
    return [*found, *([f"rules=[{', '.join(rest)}]"] if rest else [])]
