"""`guide`: the manual, a page for each topic."""

from __future__ import annotations

import click

from ckptsurgeon.cli import options


@click.command("guide", cls=options.Command)
@click.argument("topic", required=False, metavar="[TOPIC]")
@options.shown
def command(topic: str | None, show: options.Show) -> int:
    """Print a page of the manual; without TOPIC, the list of topics.

    On a terminal a page is shown by your pager (PAGER).
    """
    from ckptsurgeon.views import guide

    if topic is None:
        show.answer(guide.listing, guide.listing_json)
        return 0
    name = guide.topic(topic)
    show.page(lambda: guide.page(name, show.width), lambda: guide.page_json(name))
    return 0
