"""The pages of the guide, which ship as Markdown in `guide/`: the table of topics, and a page as it is printed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pkgutil import get_data
from types import MappingProxyType
from typing import Any

from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.hints import close_names

# By topic, in the order in which a person meets them, what its page is about. Each is a file `guide/TOPIC.md`.
TOPICS: Mapping[str, str] = MappingProxyType(
    {
        "patterns": "Which keys a pattern matches, with a table of examples.",
    }
)
# Other words that a person may look for.
ALSO: Mapping[str, str] = MappingProxyType(
    {
        "glob": "patterns",
        "regex": "patterns",
        "wildcards": "patterns",
    }
)
_COMMENT = re.compile(r"<!--.*?-->\n*", re.DOTALL)  # what the tests of a page need and no reader does
_LINK = re.compile(r"\[([^\]]+)\]\(([\w-]+)\.md(?:#[\w-]+)?\)")


class TopicError(CheckpointError):
    """The guide has no page on a topic."""


def topic(word: str) -> str:
    """The topic that a word names.

    Raises:
        TopicError: it names none.

    >>> topic("Patterns"), topic("regex")
    ('patterns', 'patterns')
    """
    name = word.strip().lower().replace("_", "-").replace(" ", "-").removesuffix(".md")
    name = ALSO.get(name, name)
    if name in TOPICS:
        return name
    close = list(dict.fromkeys(ALSO.get(each, each) for each in close_names(name, [*TOPICS, *ALSO], 1)))
    message = f"the guide has no page {word!r}"
    raise TopicError(f"{message}; is it {close[0]}?" if close else message, hint=f"ckptsurgeon guide{f' {close[0]}' if close else ''}")


@cache
def page(name: str) -> str:
    """A topic's page as Markdown, without its comments; a link to another page is the command that prints it."""
    text = (get_data("ckptsurgeon", f"guide/{name}.md") or b"").decode()
    return _LINK.sub(lambda link: f"{link[1]} (`ckptsurgeon guide {link[2]}`)", _COMMENT.sub("", text)).strip("\n")


def listing() -> str:
    """The topics, each with one line."""
    width = max(map(len, TOPICS))
    rows = [f"  {name.ljust(width)}  {words}" for name, words in TOPICS.items()]
    return "\n".join(["The guide has a page on each of these topics:", *rows, "Read one: ckptsurgeon guide TOPIC"])


def listing_json() -> dict[str, Any]:
    """The topics for `--json`."""
    return {"version": 1, "topics": [{"name": name, "words": words} for name, words in TOPICS.items()]}


def page_json(name: str) -> dict[str, Any]:
    """A page for `--json`: its Markdown, beside the topics."""
    return {**listing_json(), "topic": name, "text": page(name)}
