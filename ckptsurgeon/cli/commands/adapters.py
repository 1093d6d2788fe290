"""`adapters`: what rules can do to shapes, and the schemes of what is fresh. Words of the two tables, nothing else."""

from __future__ import annotations

import click

from ckptsurgeon.cli import options


@click.command("adapters", cls=options.Command)
@options.tabled
def command(show: options.Show) -> int:
    """The adapters of --adapt with their arguments, and the schemes of --init.

    An argument that is left out is told from the shapes. Your own are named as module:function.
    """
    from ckptsurgeon.adapters.table import ADAPTERS, load
    from ckptsurgeon.models.init.scheme_text import SCHEMES
    from ckptsurgeon.views import json, tables
    from ckptsurgeon.views.text import inspect as text

    known = [(name, load(name)) for name in ADAPTERS]
    rows = [
        *(("adapter", name, tuple(field for field in one.fields if field not in one.planned), one.words) for name, one in known),
        *(("scheme", name, tuple(one.parameters), one.words) for name, one in SCHEMES.items()),
    ]
    show.answer(lambda: text.known(rows, show.width), lambda: json.known(rows), table=lambda form: tables.known(rows, form))
    return 0
