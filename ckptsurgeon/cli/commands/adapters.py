"""`adapters`: lists the adapters and the init schemes that rules can name, from their tables."""

from __future__ import annotations

import click

from ckptsurgeon.cli import options


@click.command("adapters", cls=options.Command)
@options.tabled
def command(show: options.Show) -> int:
    """The adapters of --adapt with their arguments, and the schemes of --init.

    An argument that is left out is computed from the shapes. Your own are named as module:function.
    """
    from ckptsurgeon.adapters.table import ADAPTERS, load
    from ckptsurgeon.models.init.scheme_text import SCHEMES
    from ckptsurgeon.views import json, tables
    from ckptsurgeon.views.text import inspect as text

    loaded = [(name, load(name)) for name in ADAPTERS]
    rows = [
        *(("adapter", name, tuple(field for field in entry.fields if field not in entry.plan_only), entry.words) for name, entry in loaded),
        *(("scheme", name, tuple(entry.parameters), entry.words) for name, entry in SCHEMES.items()),
    ]
    show.answer(lambda: text.known(rows, show.width), lambda: json.known(rows), table=lambda form: tables.known(rows, form))
    return 0
