"""What the README promises beside its blocks, which `test_pages.py` runs.

After a change of output, `python tests/docs/pages.py` writes README and guide anew; so does this file, if it is run.
"""

from __future__ import annotations

import re
from pathlib import Path

from pages import PAGES, README, ROOT, rewrite, shell


def test_the_command_that_installs_also_runs_the_main_job(tmp_path: Path) -> None:
    """Its last part, by the program that is installed already; a fresh environment is .ci/run's to build."""
    install = re.search(r"```bash\n(python3 -m venv.*?merge.*?)\n```", README.read_text(), re.DOTALL)
    assert install is not None
    last = install[1].replace("\\\n", " ").split("&&")[-1].strip()
    assert last.startswith(".venv/bin/ckptsurgeon merge fixtures/")
    out = shell(last.removeprefix(".venv/bin/").replace("/tmp/merged.pt", str(tmp_path / "merged.pt")), ROOT)
    assert "verified: 15 tensors" in out and (tmp_path / "merged.pt").exists()


def test_every_command_and_every_exit_code_is_told() -> None:
    text = "".join(path.read_text() for path in PAGES.values())
    for name in ("inspect", "diff", "match", "plan", "apply", "merge", "verify", "check", "skeleton", "groups"):
        assert f"$ ckptsurgeon {name} " in text, name
    for code in (0, 1, 2, 130):
        assert re.search(rf"^\| {code} +\|", text, re.MULTILINE), code


if __name__ == "__main__":
    for name in PAGES:
        rewrite(name)
