"""What becomes of each family of hostile files, by the real program, written to RESULTS.md.

python tests/bench/hostile.py            # a table
python tests/bench/hostile.py --write    # and into RESULTS.md
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tabulate import tabulate

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "hostile"))

import make  # noqa: E402

_SECTION = re.compile(r"\n## Hostile files\n.*?(?=\n#+ |\Z)", re.DOTALL)


def main() -> int:
    """Make every file of the stories, and ask `check` about all of a family at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="write the table into RESULTS.md")
    arguments = parser.parse_args()
    families: dict[str, list[str]] = {}
    for row in make.stories():
        families.setdefault(row[0].partition("/")[0], []).append(row[0])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for family, names in families.items():
            paths = []
            for name in names:
                place = Path(folder) / make.slug(name)
                place.mkdir()
                paths.append(str(make.make(name, place)))
            done = subprocess.run(
                [sys.executable, "-m", "ckptsurgeon", "check", "--json", *paths], capture_output=True, text=True, check=False, cwd=folder
            )
            told: Counter[str] = Counter()
            for file in json.loads(done.stdout)["files"]:
                told.update({finding["code"] for finding in file["findings"]} or {"good"})
            rows.append((family, len(names), ", ".join(f"{code} {count}" for code, count in sorted(told.items()))))
    text = tabulate(rows, ("family", "files", "what check says, in how many files"), tablefmt="github") + "\n"
    print(text)
    if arguments.write:
        results = HERE / "RESULTS.md"
        what = "the story of each file stands in `tests/hostile/stories.tsv`"
        head = f"\n## Hostile files\n\n`python tests/bench/hostile.py --write`; {what}.\n\n"
        results.write_text(_SECTION.sub("", results.read_text()).rstrip("\n") + "\n" + head + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
