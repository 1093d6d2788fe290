"""Small files that a command writes: whole or not at all, like every other output."""

from __future__ import annotations

import json
from typing import Any

from ckptsurgeon.streaming.atomic import new_file
from ckptsurgeon.streaming.copying import write_at


def write_json(path: str, value: dict[str, Any], overwrite: bool) -> None:
    """Write a JSON value, indented, with a newline at its end. OutputError when the path is taken or can't be written."""
    with new_file(path, overwrite) as temporary:
        write_at(temporary.fd, (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode(), 0)
