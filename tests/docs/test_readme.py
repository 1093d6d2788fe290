"""The README holds what the program really says: every console block is run, every Python block executed, in a copy of the fixtures.

After a change of output, `python tests/docs/test_readme.py` writes the README anew; read the difference before you commit it.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BLOCK = re.compile(r"```(?P<kind>console|python|text)\n(?P<body>.*?)```\n", re.DOTALL)


def environment() -> dict[str, str]:
    """No terminal, no colour, and the program of this Python first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def shell(command: str, folder: Path) -> str:
    """What a person sees: both streams, as they come."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, env=environment()
    )
    return done.stdout


def console(body: str, folder: Path) -> str:
    """A console block with its outputs as they are now; a command's further lines begin with `>`."""
    commands: list[list[str]] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            commands.append([line])
        elif line.startswith("> ") and commands and commands[-1][-1].endswith("\\"):
            commands[-1].append(line)
    return "".join("\n".join(lines) + "\n" + shell("\n".join(line[2:] for line in lines), folder) for lines in commands)


def render(text: str, folder: Path) -> str:
    """The README with every output as it is now. A text block right after a Python block is what that printed."""
    printed: dict[int, str] = {}

    def block(found: re.Match[str]) -> str:
        kind, body = found["kind"], found["body"]
        if kind == "console":
            body = console(body, folder)
        elif kind == "python":
            done = subprocess.run([sys.executable, "-c", body], cwd=folder, capture_output=True, text=True, timeout=300, env=environment())
            assert done.returncode == 0, f"{body}\n{done.stderr}"
            printed[found.end()] = done.stdout
        elif (at := found.start() - 1) in printed:
            body = printed[at]
        return f"```{kind}\n{body}```\n"

    return BLOCK.sub(block, text)


def copy_of_fixtures(folder: Path) -> Path:
    shutil.copytree(ROOT / "fixtures", folder / "fixtures", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "fixtures"


def test_every_block_gives_what_the_readme_says(tmp_path: Path) -> None:
    text = README.read_text()
    assert render(text, copy_of_fixtures(tmp_path)).splitlines() == text.splitlines()


def test_a_python_block_prints_nothing_that_is_not_shown(tmp_path: Path) -> None:
    text = README.read_text()
    blocks = list(BLOCK.finditer(text))
    for found, following in itertools.pairwise(blocks):
        if found["kind"] == "python" and "print(" in found["body"]:
            assert following["kind"] == "text" and following.start() == found.end() + 1, found["body"]


def test_the_command_that_installs_also_runs_the_main_job(tmp_path: Path) -> None:
    """Its last part, by the program that is installed already; a fresh environment is .ci/run's to build."""
    install = re.search(r"```bash\n(python3 -m venv.*?merge.*?)\n```", README.read_text(), re.DOTALL)
    assert install is not None
    last = install[1].replace("\\\n", " ").split("&&")[-1].strip()
    assert last.startswith(".venv/bin/ckptsurgeon merge fixtures/")
    out = shell(last.removeprefix(".venv/bin/").replace("/tmp/merged.pt", str(tmp_path / "merged.pt")), ROOT)
    assert "verified: 15 tensors" in out and (tmp_path / "merged.pt").exists()


def test_every_command_and_every_exit_code_is_in_the_readme() -> None:
    text = README.read_text()
    for name in ("inspect", "diff", "plan", "apply", "merge", "verify", "check", "skeleton", "groups"):
        assert f"$ ckptsurgeon {name} " in text, name
    for code in (0, 1, 2, 130):
        assert f"| {code} |" in text


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README.read_text()):
        assert (ROOT / target).exists(), target


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        README.write_text(render(README.read_text(), copy_of_fixtures(Path(folder))))


if __name__ == "__main__":
    main()
