"""The pages of the guide, which ship as Markdown in `guide/`: the table of topics, and a page as it is printed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from itertools import zip_longest
from pkgutil import get_data
from textwrap import wrap
from types import MappingProxyType
from typing import Any

from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.hints import without_slip
from ckptsurgeon.shown import excerpt, joined, styled

# The topics in the order of reading, each with what its page is about. Each is a file `guide/TOPIC.md`.
TOPICS: Mapping[str, str] = MappingProxyType(
    {
        "merge": "Look at a checkpoint, see what fits a model, take it.",
        "average": "The mean of several checkpoints, or parts of several.",
        "roots": "Where a training checkpoint has its weights; prefixes as module.",
        "patterns": "Which keys a pattern matches, with a table of examples.",
        "rules": "Rename, drop, keep, adapt, init: on the command line, in a file.",
        "adapters": "Where shapes differ: another vocabulary, image size, fused qkv.",
        "match": "Load the weights of another implementation of the same model.",
        "initialise": "The values of parameters that no source gives.",
        "fine-tune": "Fresh layers learn faster; others are frozen at first, or slower.",
        "resume": "Go on training in a changed model: optimizer state, a new head.",
        "distributed": "Models over several GPUs: FSDP2, tensor parallelism, DDP.",
        "plan": "Decide now, review it, do it later.",
        "verify": "Load a file strictly on a device; what a merge proves.",
        "convert": "Other formats and dtypes; quantised weights.",
        "gate": "Block bad checkpoints in CI: check, pre-commit, GitHub Actions.",
        "safety": "Files from strangers: nothing is run, and what a file may cost.",
        "json": "JSON and exit codes, for other programs; the verbs of Python.",
        "coming-from": "From load_state_dict, timm, mmengine, MONAI: what to write here.",
    }
)
# Other words for a topic.
ALSO: Mapping[str, str] = MappingProxyType(
    {
        "glob": "patterns",
        "regex": "patterns",
        "wildcards": "patterns",
        "inspect": "merge",
        "diff": "merge",
        "transfer": "merge",
        "averaging": "average",
        "soup": "average",
        "mean": "average",
        "root": "roots",
        "prefix": "roots",
        "prefixes": "roots",
        "ema": "roots",
        "rename": "rules",
        "drop": "rules",
        "keep": "rules",
        "toml": "rules",
        "vocabulary": "adapters",
        "shapes": "adapters",
        "qkv": "adapters",
        "lora": "adapters",
        "init": "initialise",
        "initialize": "initialise",
        "finetuning": "fine-tune",
        "finetune": "fine-tune",
        "groups": "fine-tune",
        "freeze": "fine-tune",
        "lr": "fine-tune",
        "resuming": "resume",
        "optimizer": "resume",
        "fsdp": "distributed",
        "ddp": "distributed",
        "dtensor": "distributed",
        "torchrun": "distributed",
        "apply": "plan",
        "checksums": "verify",
        "dtype": "convert",
        "quantised": "convert",
        "safetensors": "convert",
        "check": "gate",
        "skeleton": "gate",
        "ci": "gate",
        "pre-commit": "gate",
        "limits": "safety",
        "pickle": "safety",
        "schemas": "json",
        "exit-codes": "json",
        "python": "json",
        "load-state-dict": "coming-from",
        "strict": "coming-from",
        "timm": "coming-from",
        "mmengine": "coming-from",
        "mmdetection": "coming-from",
        "detectron2": "coming-from",
        "monai": "coming-from",
        "transformers": "coming-from",
        "mergekit": "coming-from",
    }
)
_COMMENT = re.compile(r"<!--.*?-->\n*", re.DOTALL)  # blocks that only the tests of a page need
_PART = re.compile(r"(^```(?s:.*?)^```\n)|((?:^\|.+\|\n)+)|(.*\n)", re.MULTILINE)  # a block, a table, another line
_LINK = re.compile(r"\[([^\]]+)\]\([\w-]+\.md(?:#[\w-]+)?\)")


class TopicError(CheckpointError):
    """The guide has no page on a topic."""


def topic(word: str) -> str:
    """The topic that a word names.

    Raises:
        TopicError: there is no such topic.

    >>> topic("Patterns"), topic("regex")
    ('patterns', 'patterns')
    """
    name = word.strip().lower().replace("_", "-").replace(" ", "-").removesuffix(".md")
    name = ALSO.get(name, name)
    if name in TOPICS:
        return name
    meant = without_slip(name, [*TOPICS, *ALSO])
    meant = ALSO.get(meant or "", meant)
    message = f"the guide has no page {word!r}"
    raise TopicError(f"{message}; is it {meant}?" if meant else message, hint=f"ckptsurgeon guide{f' {meant}' if meant else ''}")


@cache
def page(name: str, width: int | None = None) -> str:
    """A topic's page as Markdown, without its comments; links to other pages are replaced by their text.

    Args:
        width: a terminal's columns, for which tables are laid out and headings get a style; None leaves the Markdown alone.
    """
    text = (get_data("ckptsurgeon", f"guide/{name}.md") or b"").decode()
    text = _LINK.sub(r"\1", _COMMENT.sub("", text)).strip("\n")
    if width is None:
        return text
    parts = []
    for block, table, line in _PART.findall(text + "\n"):
        parts += [block, _laid_out(table, width) if table else "", styled(line, "strong" if line.startswith("#") else None)]
    return excerpt(laid_out := joined(parts), 0, len(laid_out) - 1)


def _laid_out(table: str, width: int) -> str:
    """A Markdown table in columns that together are no wider than `width`, if its words allow it."""
    header, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines())
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, cells)) for cells in columns]
    least = [max(len(word) for cell in cells for word in (cell or " ").split(" ")) for cells in columns]
    while sum(widths) + 2 * (len(widths) - 1) > width and (spare := [(now, at) for at, now in enumerate(widths) if now > least[at]]):
        widths[max(spare)[1]] -= 1
    rows = [header, ["-" * wide for wide in widths], *rows]
    cells = [[wrap(cell, wide, break_on_hyphens=False) for cell, wide in zip(row, widths, strict=True)] for row in rows]
    lines = [line for row in cells for line in zip_longest(*row, fillvalue="")]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)


def listing() -> str:
    """The topics, each with one line."""
    width = max(map(len, TOPICS))
    rows = [f"  {name.ljust(width)}  {words}" for name, words in TOPICS.items()]
    return "\n".join(["The guide has a page on each of these topics:", *rows, "Read one: ckptsurgeon guide TOPIC"])


def listing_json() -> dict[str, Any]:
    """The topics for `--json`."""
    return {"version": 1, "topics": [{"name": name, "words": words} for name, words in TOPICS.items()]}


def page_json(name: str) -> dict[str, Any]:
    """A page for `--json`: its Markdown, and the topics."""
    return {**listing_json(), "topic": name, "text": page(name)}
