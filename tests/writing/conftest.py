"""What the tests of outputs share."""

from __future__ import annotations

import pytest

from ckptsurgeon.cli import main


@pytest.fixture
def commands() -> dict[str, tuple[str, ...]]:
    """A command line of each command that writes a file, in a folder of `setting` with a `plan.json`."""
    found = {
        "plan": ("plan", "a.pt", "b.pt", "-o", "out.json"),
        "merge": ("merge", "a.pt", "b.pt", "-o", "out.pt"),
        "apply": ("apply", "plan.json", "-o", "out.safetensors"),
        "skeleton": ("skeleton", "a.pt", "-o", "out.json"),
        "match": ("match", "a.pt", "b.pt", "-o", "out.toml"),
    }
    writers = {name for name in main.COMMANDS if _writes(name)}
    assert writers <= set(found), "a command with -o that no test of outputs knows: add a line for it"
    return {name: words for name, words in found.items() if name in writers}


def _writes(name: str) -> bool:
    command = main.cli.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None
    return any("-o" in parameter.opts for parameter in command.params)
